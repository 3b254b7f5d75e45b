"""Options of the process engine: `engines.process` in the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ProcessOptions(BaseModel):
    """What can be configured for `--engine process`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tcp_established: bool = Field(
        False, description="carry established TCP connections; their address has to move too"
    )
    shell_job: Literal["auto", True, False] = Field(
        "auto", description="the tree's session leader stays outside, as for a job of a shell"
    )
    ghost_limit_mib: int = Field(
        64, ge=0, le=65536, description="largest deleted but open file carried inside the images"
    )
    file_locks: bool = Field(True, description="carry file locks")
