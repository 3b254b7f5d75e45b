"""Options of the runc and crun engines: `engines.runc` and `engines.crun` in the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

AbsolutePath = Annotated[str, Field(pattern="^/")]


class RuncOptions(BaseModel):
    """What can be configured for `--engine runc`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    binary: str = Field("runc", min_length=1, description="the runtime, on both hosts")
    root: AbsolutePath | None = Field(
        None, description="the runtime's --root, where it keeps its containers' state"
    )
    tcp_established: bool = Field(
        False, description="carry established TCP connections; their address has to move too"
    )
    network_lock: Literal["release", "keep"] = Field(
        "release",
        description="CRIU's lock in a named network namespace, once the container has moved away",
    )
    file_locks: bool = Field(True, description="carry file locks")
    ext_unix_sk: bool = Field(False, description="carry unix sockets that lead out, cut off")
    stdio: Literal["refuse", "devnull"] = Field(
        "refuse", description="pipes to the starter of the container: refuse, or /dev/null there"
    )
    console_socket: AbsolutePath | None = Field(
        None, description="socket at the destination that takes the container's terminal"
    )
    mounts: dict[AbsolutePath, Literal["shared", "rsync"] | AbsolutePath] = Field(
        {},
        description="host directories that are mounted in: shared, rsync, or their path there",
    )


class CrunOptions(RuncOptions):
    """What can be configured for `--engine crun`."""

    binary: str = Field("crun", min_length=1, description="the runtime, on both hosts")
