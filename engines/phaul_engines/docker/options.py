"""Options of the docker engine: `engines.docker` in the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from phaul_engines.oci.options import AbsolutePath


class DockerOptions(BaseModel):
    """What can be configured for `--engine docker`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    host: str = Field(
        "unix:///var/run/docker.sock",
        pattern="^unix:///",
        description="the daemon's socket, on both hosts",
    )
    runtime_root: AbsolutePath = Field(
        "/run/docker/runtime-runc/moby",
        description="where its runc keeps the containers' state, on both hosts",
    )
    timeout_s: float = Field(120, gt=0, description="longest wait for an answer of the daemon")
    tcp_established: bool = Field(
        False, description="carry established TCP connections; their address has to move too"
    )
    file_locks: bool = Field(True, description="carry file locks")
    ext_unix_sk: bool = Field(False, description="carry unix sockets that lead out, cut off")
    source: Literal["remove", "keep"] = Field(
        "remove",
        description="its container once it has moved: remove, or keep it, renamed",
    )
    image: Literal["carry", "require"] = Field(
        "carry", description="an image that is missing there: carry it over, or refuse"
    )
    volumes: dict[str, Literal["shared", "rsync"]] = Field(
        {}, description="volumes by name: rsync (as without a word), or shared by both hosts"
    )
    mounts: dict[AbsolutePath, Literal["shared", "rsync"] | AbsolutePath] = Field(
        {}, description="host paths that are mounted in: shared, rsync, or their path there"
    )
