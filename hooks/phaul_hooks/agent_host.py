"""`phaul-runtime hook install agent`: the agent as a service of systemd.

Puts a unit and a configuration of its own into place; starting it is the operator's. The
configuration is never overwritten, the unit only if it was made by this: its first line says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phaul_hooks.hostfile import write_whole
from phaul_runtime.errors import Refused
from phaul_runtime.hosthooks import HostHook, Status
from phaul_runtime.system import proc

UNIT = "phaul-runtime-agent.service"
SYSTEMD = Path("/etc/systemd/system")
CONFIG = Path("/etc/phaul-runtime/agent.yaml")
_HERE = Path(__file__).parent
_PROGRAM = "@PROGRAM@"
_MODE = 0o755


class AgentHost(HostHook):
    """A host that is a destination at any time: `tls://host`."""

    def install(self) -> Sequence[str]:
        path, wanted = SYSTEMD / UNIT, _unit()
        found = _read(path)
        if found is not None and not _ours(found):
            raise Refused(
                f"{path} is there and was made by somebody else", hint=f"move {path} away"
            )
        if not SYSTEMD.parent.is_dir():
            raise Refused("there is no systemd on this host", hint="run phaul-runtime agent by it")
        done: list[str] = []
        try:
            if not CONFIG.exists():
                CONFIG.parent.mkdir(mode=_MODE, parents=True, exist_ok=True)
                write_whole(CONFIG, (_HERE / CONFIG.name).read_bytes())
                done.append(f"{CONFIG} was made: address and certificates")
            if found != wanted:
                path.parent.mkdir(mode=_MODE, parents=True, exist_ok=True)
                write_whole(path, wanted.encode())
                done.append(f"{path} was {'made' if found is None else 'renewed'}")
                done.append(f"to do: systemctl daemon-reload && systemctl enable --now {UNIT}")
        except OSError as error:
            raise Refused(f"cannot write {error.filename}: {error.strerror}") from error
        return done

    def remove(self) -> Sequence[str]:
        """See `HostHook`; a configuration that was changed stays."""
        path = SYSTEMD / UNIT
        found = _read(path)
        if found is not None and _ours(found) and _enabled():
            raise Refused(
                "the agent's unit is enabled", hint=f"systemctl disable --now {UNIT}, then again"
            )
        done: list[str] = []
        try:
            if found is not None and _ours(found):
                path.unlink()
                done.append(f"{path} was removed")
                done.append("to do: systemctl daemon-reload")
            if _read(CONFIG) == _read(_HERE / CONFIG.name):
                CONFIG.unlink()
                done.append(f"{CONFIG} was removed")
        except OSError as error:
            raise Refused(f"cannot remove {error.filename}: {error.strerror}") from error
        return done

    def status(self) -> Status:
        found = _read(SYSTEMD / UNIT)
        if found is None or not _ours(found):
            return Status(False)
        lines: list[str] = []
        if found != _unit():
            lines.append("its unit is another version's: hook install agent")
        if not _enabled():
            lines.append(f"not enabled: systemctl enable --now {UNIT}")
        return Status(True, lines)


def _unit() -> str:
    program = " ".join(proc.interpreter("phaul_runtime"))
    return (_HERE / UNIT).read_text(encoding="utf-8").replace(_PROGRAM, program)


def _ours(text: str) -> bool:
    first = (_HERE / UNIT).read_text(encoding="utf-8").partition("\n")[0]
    return text.startswith(first)


def _enabled() -> bool:
    return any(path.is_symlink() for path in SYSTEMD.glob(f"*.target.wants/{UNIT}"))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
