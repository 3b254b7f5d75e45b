from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Error(_message.Message):
    __slots__ = ("kind", "message", "hint", "log", "log_text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    LOG_TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    hint: str
    log: _containers.RepeatedScalarFieldContainer[str]
    log_text: str
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., log: _Optional[_Iterable[str]] = ..., log_text: _Optional[str] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: Error
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class MigrationRef(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class StartIterRequest(_message.Message):
    __slots__ = ("id", "local")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    id: str
    local: bool
    def __init__(self, id: _Optional[str] = ..., local: bool = ...) -> None: ...

class StartIterReply(_message.Message):
    __slots__ = ("error", "parent")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    error: Error
    parent: _containers.RepeatedCompositeFieldContainer[ImagePart]
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., parent: _Optional[_Iterable[_Union[ImagePart, _Mapping]]] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("error", "protocol", "facts")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    error: Error
    protocol: int
    facts: HostFacts
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., protocol: _Optional[int] = ..., facts: _Optional[_Union[HostFacts, _Mapping]] = ...) -> None: ...

class HostFacts(_message.Message):
    __slots__ = ("hostname", "phaul_version", "kernel", "arch", "page_size", "root", "criu_version", "page_format", "criu_problem", "dirty_tracking", "lazy_pages", "cpu_model", "cpu_flags", "cpuinfo", "memory_available", "workdir", "workdir_fs", "workdir_free", "workdir_problem", "boot_id", "state_dir", "state_fs", "state_problem", "leftovers", "rsync", "pid_namespace")
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    PHAUL_VERSION_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    ARCH_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    CRIU_VERSION_FIELD_NUMBER: _ClassVar[int]
    PAGE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CRIU_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    DIRTY_TRACKING_FIELD_NUMBER: _ClassVar[int]
    LAZY_PAGES_FIELD_NUMBER: _ClassVar[int]
    CPU_MODEL_FIELD_NUMBER: _ClassVar[int]
    CPU_FLAGS_FIELD_NUMBER: _ClassVar[int]
    CPUINFO_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    WORKDIR_FIELD_NUMBER: _ClassVar[int]
    WORKDIR_FS_FIELD_NUMBER: _ClassVar[int]
    WORKDIR_FREE_FIELD_NUMBER: _ClassVar[int]
    WORKDIR_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_DIR_FIELD_NUMBER: _ClassVar[int]
    STATE_FS_FIELD_NUMBER: _ClassVar[int]
    STATE_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    LEFTOVERS_FIELD_NUMBER: _ClassVar[int]
    RSYNC_FIELD_NUMBER: _ClassVar[int]
    PID_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    hostname: str
    phaul_version: str
    kernel: str
    arch: str
    page_size: int
    root: bool
    criu_version: str
    page_format: int
    criu_problem: str
    dirty_tracking: bool
    lazy_pages: bool
    cpu_model: str
    cpu_flags: _containers.RepeatedScalarFieldContainer[str]
    cpuinfo: bytes
    memory_available: int
    workdir: str
    workdir_fs: str
    workdir_free: int
    workdir_problem: str
    boot_id: str
    state_dir: str
    state_fs: str
    state_problem: str
    leftovers: _containers.RepeatedScalarFieldContainer[str]
    rsync: bool
    pid_namespace: str
    def __init__(self, hostname: _Optional[str] = ..., phaul_version: _Optional[str] = ..., kernel: _Optional[str] = ..., arch: _Optional[str] = ..., page_size: _Optional[int] = ..., root: bool = ..., criu_version: _Optional[str] = ..., page_format: _Optional[int] = ..., criu_problem: _Optional[str] = ..., dirty_tracking: bool = ..., lazy_pages: bool = ..., cpu_model: _Optional[str] = ..., cpu_flags: _Optional[_Iterable[str]] = ..., cpuinfo: _Optional[bytes] = ..., memory_available: _Optional[int] = ..., workdir: _Optional[str] = ..., workdir_fs: _Optional[str] = ..., workdir_free: _Optional[int] = ..., workdir_problem: _Optional[str] = ..., boot_id: _Optional[str] = ..., state_dir: _Optional[str] = ..., state_fs: _Optional[str] = ..., state_problem: _Optional[str] = ..., leftovers: _Optional[_Iterable[str]] = ..., rsync: bool = ..., pid_namespace: _Optional[str] = ...) -> None: ...

class FileFact(_message.Message):
    __slots__ = ("path", "size", "mode", "uid", "gid", "build_id", "digest", "directory", "written", "executable", "mtime_ns", "shared_map", "path_only", "leased", "user", "owner_may_place", "device", "inode", "born_ns", "held_by")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    GID_FIELD_NUMBER: _ClassVar[int]
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    EXECUTABLE_FIELD_NUMBER: _ClassVar[int]
    MTIME_NS_FIELD_NUMBER: _ClassVar[int]
    SHARED_MAP_FIELD_NUMBER: _ClassVar[int]
    PATH_ONLY_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    OWNER_MAY_PLACE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INODE_FIELD_NUMBER: _ClassVar[int]
    BORN_NS_FIELD_NUMBER: _ClassVar[int]
    HELD_BY_FIELD_NUMBER: _ClassVar[int]
    path: str
    size: int
    mode: int
    uid: int
    gid: int
    build_id: str
    digest: bytes
    directory: bool
    written: bool
    executable: bool
    mtime_ns: int
    shared_map: bool
    path_only: bool
    leased: bool
    user: FileUser
    owner_may_place: bool
    device: int
    inode: int
    born_ns: int
    held_by: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, path: _Optional[str] = ..., size: _Optional[int] = ..., mode: _Optional[int] = ..., uid: _Optional[int] = ..., gid: _Optional[int] = ..., build_id: _Optional[str] = ..., digest: _Optional[bytes] = ..., directory: bool = ..., written: bool = ..., executable: bool = ..., mtime_ns: _Optional[int] = ..., shared_map: bool = ..., path_only: bool = ..., leased: bool = ..., user: _Optional[_Union[FileUser, _Mapping]] = ..., owner_may_place: bool = ..., device: _Optional[int] = ..., inode: _Optional[int] = ..., born_ns: _Optional[int] = ..., held_by: _Optional[_Iterable[str]] = ...) -> None: ...

class FileUser(_message.Message):
    __slots__ = ("uid", "gid", "groups")
    UID_FIELD_NUMBER: _ClassVar[int]
    GID_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    uid: int
    gid: int
    groups: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, uid: _Optional[int] = ..., gid: _Optional[int] = ..., groups: _Optional[_Iterable[int]] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("check", "level", "text", "hint")
    CHECK_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    check: str
    level: str
    text: str
    hint: str
    def __init__(self, check: _Optional[str] = ..., level: _Optional[str] = ..., text: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("engine", "manifest", "files", "memory", "cpuinfo", "same_host", "id", "target", "source", "restore")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    CPUINFO_FIELD_NUMBER: _ClassVar[int]
    SAME_HOST_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    engine: str
    manifest: bytes
    files: _containers.RepeatedCompositeFieldContainer[FileFact]
    memory: int
    cpuinfo: bytes
    same_host: bool
    id: str
    target: str
    source: str
    restore: str
    def __init__(self, engine: _Optional[str] = ..., manifest: _Optional[bytes] = ..., files: _Optional[_Iterable[_Union[FileFact, _Mapping]]] = ..., memory: _Optional[int] = ..., cpuinfo: _Optional[bytes] = ..., same_host: bool = ..., id: _Optional[str] = ..., target: _Optional[str] = ..., source: _Optional[str] = ..., restore: _Optional[str] = ...) -> None: ...

class CheckReply(_message.Message):
    __slots__ = ("error", "findings", "files")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    error: Error
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    files: _containers.RepeatedCompositeFieldContainer[FileVerdict]
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., files: _Optional[_Iterable[_Union[FileVerdict, _Mapping]]] = ...) -> None: ...

class FileVerdict(_message.Message):
    __slots__ = ("path", "reason", "copyable")
    PATH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COPYABLE_FIELD_NUMBER: _ClassVar[int]
    path: str
    reason: str
    copyable: bool
    def __init__(self, path: _Optional[str] = ..., reason: _Optional[str] = ..., copyable: bool = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("id", "engine", "manifest", "options", "lost_s", "commit_s", "criu_log_level", "target", "source", "restore", "memory", "page_server", "page_format", "post_copy", "late_memory")
    ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    LOST_S_FIELD_NUMBER: _ClassVar[int]
    COMMIT_S_FIELD_NUMBER: _ClassVar[int]
    CRIU_LOG_LEVEL_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PAGE_SERVER_FIELD_NUMBER: _ClassVar[int]
    PAGE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    POST_COPY_FIELD_NUMBER: _ClassVar[int]
    LATE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    id: str
    engine: str
    manifest: bytes
    options: bytes
    lost_s: float
    commit_s: float
    criu_log_level: int
    target: str
    source: str
    restore: str
    memory: int
    page_server: str
    page_format: int
    post_copy: bool
    late_memory: int
    def __init__(self, id: _Optional[str] = ..., engine: _Optional[str] = ..., manifest: _Optional[bytes] = ..., options: _Optional[bytes] = ..., lost_s: _Optional[float] = ..., commit_s: _Optional[float] = ..., criu_log_level: _Optional[int] = ..., target: _Optional[str] = ..., source: _Optional[str] = ..., restore: _Optional[str] = ..., memory: _Optional[int] = ..., page_server: _Optional[str] = ..., page_format: _Optional[int] = ..., post_copy: bool = ..., late_memory: _Optional[int] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("error", "trees")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TREES_FIELD_NUMBER: _ClassVar[int]
    error: Error
    trees: _containers.RepeatedCompositeFieldContainer[TreePlace]
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., trees: _Optional[_Iterable[_Union[TreePlace, _Mapping]]] = ...) -> None: ...

class ArrivedRequest(_message.Message):
    __slots__ = ("id", "name")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ArrivedReply(_message.Message):
    __slots__ = ("error", "trees")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TREES_FIELD_NUMBER: _ClassVar[int]
    error: Error
    trees: _containers.RepeatedCompositeFieldContainer[TreePlace]
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., trees: _Optional[_Iterable[_Union[TreePlace, _Mapping]]] = ...) -> None: ...

class TreePlace(_message.Message):
    __slots__ = ("name", "path")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: bytes
    def __init__(self, name: _Optional[str] = ..., path: _Optional[bytes] = ...) -> None: ...

class FilePart(_message.Message):
    __slots__ = ("id", "head", "offset", "data")
    ID_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    id: str
    head: FileFact
    offset: int
    data: bytes
    def __init__(self, id: _Optional[str] = ..., head: _Optional[_Union[FileFact, _Mapping]] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ImageParts(_message.Message):
    __slots__ = ("id", "parts")
    ID_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    parts: _containers.RepeatedCompositeFieldContainer[ImagePart]
    def __init__(self, id: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[ImagePart, _Mapping]]] = ...) -> None: ...

class ImagePart(_message.Message):
    __slots__ = ("name", "data", "more")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    more: bool
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ..., more: bool = ...) -> None: ...

class PrepareReply(_message.Message):
    __slots__ = ("error", "pid", "restore_ms", "images_ms", "full_because")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    RESTORE_MS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_MS_FIELD_NUMBER: _ClassVar[int]
    FULL_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    error: Error
    pid: int
    restore_ms: float
    images_ms: float
    full_because: str
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., pid: _Optional[int] = ..., restore_ms: _Optional[float] = ..., images_ms: _Optional[float] = ..., full_because: _Optional[str] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("error", "pid", "since_resume_ms", "resume_ms")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SINCE_RESUME_MS_FIELD_NUMBER: _ClassVar[int]
    RESUME_MS_FIELD_NUMBER: _ClassVar[int]
    error: Error
    pid: int
    since_resume_ms: float
    resume_ms: float
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., pid: _Optional[int] = ..., since_resume_ms: _Optional[float] = ..., resume_ms: _Optional[float] = ...) -> None: ...

class FilledReply(_message.Message):
    __slots__ = ("error", "over", "pages", "missing", "faults", "worst_fault_ms", "ms", "full_because", "remote_missing", "filled", "present", "dropped", "ended", "unshared", "lost", "notes")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    WORST_FAULT_MS_FIELD_NUMBER: _ClassVar[int]
    MS_FIELD_NUMBER: _ClassVar[int]
    FULL_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    REMOTE_MISSING_FIELD_NUMBER: _ClassVar[int]
    FILLED_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    UNSHARED_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    error: Error
    over: bool
    pages: int
    missing: int
    faults: int
    worst_fault_ms: float
    ms: float
    full_because: str
    remote_missing: int
    filled: int
    present: int
    dropped: int
    ended: int
    unshared: int
    lost: int
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., over: bool = ..., pages: _Optional[int] = ..., missing: _Optional[int] = ..., faults: _Optional[int] = ..., worst_fault_ms: _Optional[float] = ..., ms: _Optional[float] = ..., full_because: _Optional[str] = ..., remote_missing: _Optional[int] = ..., filled: _Optional[int] = ..., present: _Optional[int] = ..., dropped: _Optional[int] = ..., ended: _Optional[int] = ..., unshared: _Optional[int] = ..., lost: _Optional[int] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class BeatReply(_message.Message):
    __slots__ = ("error", "bytes", "state", "failure", "trees")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    TREES_FIELD_NUMBER: _ClassVar[int]
    error: Error
    bytes: int
    state: str
    failure: Error
    trees: _containers.RepeatedCompositeFieldContainer[TreeFailure]
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., bytes: _Optional[int] = ..., state: _Optional[str] = ..., failure: _Optional[_Union[Error, _Mapping]] = ..., trees: _Optional[_Iterable[_Union[TreeFailure, _Mapping]]] = ...) -> None: ...

class TreeFailure(_message.Message):
    __slots__ = ("name", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    error: Error
    def __init__(self, name: _Optional[str] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class LookRequest(_message.Message):
    __slots__ = ("id", "wait_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    id: str
    wait_s: float
    def __init__(self, id: _Optional[str] = ..., wait_s: _Optional[float] = ...) -> None: ...

class LookReply(_message.Message):
    __slots__ = ("error", "source", "destination")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    error: Error
    source: End
    destination: End
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., source: _Optional[_Union[End, _Mapping]] = ..., destination: _Optional[_Union[End, _Mapping]] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("state", "alive", "held")
    STATE_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    state: str
    alive: bool
    held: bool
    def __init__(self, state: _Optional[str] = ..., alive: bool = ..., held: bool = ...) -> None: ...

class SettleRequest(_message.Message):
    __slots__ = ("id", "role", "verdict")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    id: str
    role: str
    verdict: str
    def __init__(self, id: _Optional[str] = ..., role: _Optional[str] = ..., verdict: _Optional[str] = ...) -> None: ...

class SettleReply(_message.Message):
    __slots__ = ("error", "pid", "warnings", "post_copy", "missing")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    POST_COPY_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    error: Error
    pid: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    post_copy: bool
    missing: int
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., pid: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ..., post_copy: bool = ..., missing: _Optional[int] = ...) -> None: ...
