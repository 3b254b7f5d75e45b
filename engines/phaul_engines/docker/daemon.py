"""A docker daemon: the calls that a move needs, and what their failures mean.

By the docker package's low-level client; it knows no checkpoints, for which its session is used.
It speaks HTTP by requests, whose errors come through.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound, NullResource

from phaul_engines.docker.daemon_findings import parse_api_version
from phaul_runtime.boundedjson import read_json_file
from phaul_runtime.errors import MigrationFailed, PhaulError, Refused
from phaul_runtime.system.cancel import Cancellation

_CHUNK = 1 << 20
_POLL_S = 0.5


class Daemon:
    """One docker daemon.

    Args:
        url: of its socket, as `unix:///var/run/docker.sock`.
        timeout_s: longest wait for one answer.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._opened: Any = None

    @property
    def _api(self) -> Any:
        if self._opened is None:
            try:
                self._opened = docker.APIClient(
                    base_url=self.url, version="auto", timeout=self._timeout_s
                )
            except (DockerException, requests.RequestException) as error:
                raise Refused(
                    f"no docker daemon answers at {self.url}",
                    hint="start dockerd, or set engines.docker.host",
                ) from error
        return self._opened

    @contextlib.contextmanager
    def _asked(self, what: str) -> Iterator[Any]:
        """Translate what goes wrong in a call; `what` for the message."""
        api = self._api
        try:
            yield api
        except APIError as error:
            text = str(error.explanation or error).strip()
            raise MigrationFailed(f"docker: {what}: {text}") from error
        except (DockerException, requests.RequestException) as error:
            raise MigrationFailed(f"docker: {what}: {error}") from error

    # -- what there is ---------------------------------------------------------------------

    @property
    def api_version(self) -> tuple[int, int]:
        """The API that is spoken with it.

        Raises:
            Refused: it does not answer.
        """
        return parse_api_version(str(self._api._version))

    def version(self) -> Mapping[str, Any]:
        """`GET /version`."""
        with self._asked("version") as api:
            return cast(Mapping[str, Any], api.version(api_version=False))

    def wait(self, within_s: float) -> None:
        """Wait until it answers, or that time is over; a daemon that died is soon started again."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            try:
                self.version()
            except PhaulError:
                time.sleep(_POLL_S)
            else:
                return

    def info(self) -> Mapping[str, Any]:
        """`GET /info`."""
        with self._asked("info") as api:
            return cast(Mapping[str, Any], api.info())

    @functools.cached_property
    def root(self) -> Path:
        """Where it keeps everything, as /var/lib/docker."""
        return Path(str(self.info()["DockerRootDir"]))

    def directory(self, container_id: str) -> Path:
        """Where it keeps what it knows of a container."""
        return self.root / "containers" / container_id

    def kept(self, container_id: str) -> Mapping[str, Any]:
        """What it keeps of a container in its own file; empty where that cannot be read."""
        try:
            found = read_json_file(self.directory(container_id) / "config.v2.json")
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def cgroup(self, facts: Mapping[str, Any]) -> str:
        """The cgroup that docker makes for a container (`GET /containers/{id}/json`)."""
        parent = str(facts["HostConfig"].get("CgroupParent") or "")
        if self.info().get("CgroupDriver") != "systemd":
            return f"/{(parent or 'docker').strip('/')}/{facts['Id']}"
        slices = (parent or "system.slice").removesuffix(".slice").split("-")
        # a-b.slice lies in a.slice (systemd.slice(5)).
        path = "/".join("-".join(slices[:n]) + ".slice" for n in range(1, len(slices) + 1))
        return f"/{path}/docker-{facts['Id']}.scope"

    def container(self, name: str) -> dict[str, Any] | None:
        """`GET /containers/{name}/json`; None if there is none.

        Waits while one of that name is being started.
        """
        with self._asked(f"inspect {name}") as api:
            try:
                return cast(dict[str, Any], api.inspect_container(name))
            except (NotFound, NullResource):
                return None

    def names(self) -> list[str]:
        """The containers that run."""
        with self._asked("ps") as api:
            return [name.lstrip("/") for c in api.containers() for name in c["Names"][:1]]

    def image_id(self, name: str) -> str:
        """The id that an image has here; empty if it is missing."""
        with self._asked(f"inspect the image {name}") as api:
            try:
                return str(api.inspect_image(name)["Id"])
            except (ImageNotFound, NotFound):
                return ""

    def network(self, name: str) -> Mapping[str, Any] | None:
        """`GET /networks/{name}`; None if there is none."""
        with self._asked(f"inspect the network {name}") as api:
            try:
                return cast(Mapping[str, Any], api.inspect_network(name))
            except NotFound:
                return None

    def volume(self, name: str) -> Mapping[str, Any] | None:
        """`GET /volumes/{name}`; None if there is none."""
        with self._asked(f"inspect the volume {name}") as api:
            try:
                return cast(Mapping[str, Any], api.inspect_volume(name))
            except NotFound:
                return None

    def users_of(self, volume: str) -> list[str]:
        """The containers that have a volume, running or not."""
        with self._asked("ps") as api:
            found = api.containers(all=True, filters={"volume": volume})
        return [name.lstrip("/") for c in found for name in c["Names"][:1]]

    # -- what is done ----------------------------------------------------------------------

    def save(self, image: str, path: Path) -> Iterator[int]:
        """Write an image to a file (`docker save`); yields the bytes of each part."""
        with self._asked(f"save {image}") as api, path.open("wb") as file:
            for part in api.get_image(image, chunk_size=_CHUNK):
                file.write(part)
                yield len(part)

    def load(self, path: Path, cancellation: Cancellation) -> None:
        """`docker load`.

        Raises:
            Cancelled: that was asked for before docker had read it all.
        """
        with self._asked("load") as api, path.open("rb") as file:
            for line in api.load_image(_parts(file, cancellation), quiet=True):
                if "error" in line:
                    raise MigrationFailed(f"docker: load: {line['error']}")

    def create(self, name: str, body: Mapping[str, Any]) -> str:
        """Create a container; its id."""
        with self._asked(f"create {name}") as api:
            return str(api.create_container_from_config(dict(body), name)["Id"])

    def connect(self, container: str, network: str, endpoint: Mapping[str, Any]) -> None:
        """Connect a container with a network, with an `EndpointConfig`."""
        with self._asked(f"connect with the network {network}") as api:
            url = f"{self._base}/networks/{network}/connect"
            body = {"Container": container, "EndpointConfig": dict(endpoint)}
            api._raise_for_status(api.post(url, json=body, timeout=self._timeout_s))

    @property
    def _base(self) -> str:
        return f"{self._api.base_url}/v{self._api._version}"

    def start(self, container: str, checkpoint: str, timeout_s: float) -> None:
        """Start a container from a checkpoint; returns once it runs.

        Raises:
            MigrationFailed: it does not; or it ran already, where docker does nothing.
        """
        with self._asked("start --checkpoint") as api:
            url = f"{self._base}/containers/{container}/start"
            answer = api.post(url, params={"checkpoint": checkpoint}, timeout=timeout_s)
            api._raise_for_status(answer)
        if answer.status_code == 304:
            raise MigrationFailed("docker: start --checkpoint: the container runs already")

    def set_restart_policy(self, container: str, policy: Mapping[str, Any]) -> None:
        """`docker update --restart`."""
        with self._asked("update --restart") as api:
            api.update_container(container, restart_policy=dict(policy))

    def rename(self, container: str, name: str) -> None:
        """`docker rename`."""
        with self._asked(f"rename to {name}") as api:
            api.rename(container, name)

    def remove(self, container: str, *, force: bool = False) -> None:
        """`docker rm --volumes`: unnamed volumes go with it; nothing if it is gone already."""
        with self._asked("rm") as api:
            try:
                api.remove_container(container, v=True, force=force)
            except NotFound:
                return

    def kill(self, container: str) -> None:
        """`docker kill`; nothing if it does not run."""
        with self._asked("kill") as api:
            try:
                api.kill(container)
            except APIError as error:
                if error.status_code not in (404, 409):
                    raise

    def remove_volume(self, name: str) -> None:
        """`docker volume rm`; nothing if it is gone already."""
        with self._asked(f"volume rm {name}") as api:
            try:
                api.remove_volume(name)
            except NotFound:
                return


def _parts(file: BinaryIO, cancellation: Cancellation) -> Iterator[bytes]:
    while part := file.read(_CHUNK):
        cancellation.check()
        yield part
