"""Containers of docker move, whatever docker itself makes of checkpoints."""

from __future__ import annotations

import pytest
from phaul_engines.docker.arrival import is_ours
from phaul_engines.docker.config import differences

from tests.e2e.conftest import wait_until
from tests.e2e.docker_hosts import IMAGE, DockerContainer, DockerHosts, docker_hosts, docker_lab

__all__ = ["docker_hosts", "docker_lab"]

RICH = (
    "--env WHO=me --label tier=front --hostname web.example --memory 256m --pids-limit 100 "
    "--cap-add NET_ADMIN --ulimit nofile=1000:2000 --workdir /data --add-host db:10.1.2.3 "
    "--stop-signal SIGINT --stop-timeout 3 --log-opt max-size=1m --shm-size 32m "
    "--tmpfs /scratch:size=1m --sysctl net.core.somaxconn=200 --restart on-failure:3 "
    "--health-cmd true --health-interval 1h --volume rich-data:/store --volume /anonymous "
    "--network none"
)


@pytest.mark.needs("docker-networks", "controllers")
@pytest.mark.thorough
def test_a_container_moves_with_its_configuration_and_comes_back(docker_hosts: DockerHosts) -> None:
    """Dirtier, volumes, limits, restart policy: the same there; docker can do all with it."""
    docker_hosts.volumes.append("rich-data")
    web = docker_hosts.dirtier("a", "rich", "--mib", "16", "--hot-mib", "2", flags=RICH)
    status = web.file("a", "/data/status")
    wait_until("it tells", lambda: bool(docker_hosts.sh("a", f"cat {status}", check=False)))
    web.exec("a", "sh", "-c", "echo kept > /store/file; echo new > /anonymous/file; rm /bin/nc")
    before = web.inspect("a")
    for host, to in (("a", "b"), ("b", "a")):
        moved = web.migrate(host, to)
        assert moved.code == 0, moved.stderr
        assert web.dirtier(to).verified_on(to)["wrong"] == 0
        assert web.status(host) == ""
        assert differences(before, web.inspect(to), ours=is_ours) == []
        # CRIU would put it where it was at the source: out of its limits and of docker's reach.
        cgroup = docker_hosts.sh(to, "cat /proc/$1/cgroup", str(web.pid(to)))
        assert cgroup.endswith(web.inspect(to)["Id"])
        assert web.exec(to, "cat", "/store/file", "/anonymous/file") == "kept\nnew\n"
        assert "nc" not in web.exec(to, "ls", "/bin").split()
        for both in ("a", "b"):
            assert docker_hosts.leftovers(both) == ""
    assert int(web.exec("a", "cat", "/sys/fs/cgroup/memory.max")) == 256 << 20
    docker_hosts.sh("a", "docker stop -t 5 rich && docker start rich")
    wait_until("it runs again", lambda: web.status("a") == "running")
    assert web.exec("a", "cat", "/store/file") == "kept\n"


def test_restart_always_leaves_no_second_copy(docker_hosts: DockerHosts) -> None:
    """Its end at the source is no failure that docker would mend."""
    web = docker_hosts.dirtier("a", "always", flags=f"{docker_hosts.network} --restart always")
    moved = web.migrate("a", "b", "--config", _config(docker_hosts, "{source: keep}"))
    assert moved.code == 0, moved.stderr
    assert web.inspect("b")["HostConfig"]["RestartPolicy"]["Name"] == "always"
    kept = docker_hosts.sh("a", "docker ps -a --format '{{.Names}} {{.State}}'").splitlines()
    assert [line.split()[1] for line in kept if line.startswith("always-moved-")] == ["exited"]
    assert docker_hosts.sh("a", "pgrep -x piggie-dirty", check=False) == ""
    # The policy works there: what it starts is a new one.
    docker_hosts.sh("b", "kill -9 $1", str(web.pid("b")))
    wait_until("docker restarts it", lambda: web.inspect("b")["RestartCount"] == 1)


def _config(docker_hosts: DockerHosts, options: str) -> str:
    path = "/var/tmp/docker.yaml"
    docker_hosts.sh("a", 'printf "engines: {docker: %s}" "$1" > "$2"', options, path)
    return path


def test_a_failed_restore_leaves_the_source_running_and_a_retry_works(
    docker_hosts: DockerHosts,
) -> None:
    """Docker agrees at both ends; the reason is CRIU's own."""
    for host in ("a", "b"):
        docker_hosts.sh(host, "mkdir -p /srv/same")
    docker_hosts.sh("a", "touch /srv/same/file")
    script = "exec 3</same/file; exec piggie-dirty --status /data/status --verifies 4000 --mib 8"
    flags = f"{docker_hosts.network} --restart always --volume /srv/same:/same"
    web = docker_hosts.run("a", "fails", "sh", "-c", script, flags=flags)
    config = _config(docker_hosts, "{mounts: {/srv/same: shared}}")
    failed = web.migrate("a", "b", "--config", config)
    assert failed.code == 4, failed.stderr
    assert "docker's restore failed" in failed.stderr
    assert "same/file" in failed.stderr
    _lives_only_on_a(docker_hosts, web)
    docker_hosts.sh("b", "touch /srv/same/file")
    moved = web.migrate("a", "b", "--config", config)
    docker_hosts.sh("a", "rm -r /srv/same")
    assert moved.code == 0, moved.stderr
    assert web.dirtier("b").verified_on("b")["wrong"] == 0
    assert web.inspect("b")["HostConfig"]["RestartPolicy"]["Name"] == "always"


def test_the_hook_is_installed_when_containers_run_already(docker_hosts: DockerHosts) -> None:
    """They migrate like any other; an operator's programs veto that, or follow it."""
    for host in ("a", "b"):
        docker_hosts.sh(host, "phaul-runtime hook remove docker")
    web = docker_hosts.dirtier(
        "a", "before", "--mib", "8", flags=f"{docker_hosts.network} --restart always"
    )
    hooks = "/etc/phaul-runtime/hooks"
    for host in ("a", "b"):
        docker_hosts.sh(host, "phaul-runtime hook install docker; phaul-runtime hook list")
        follow = 'printf "#!/bin/sh\\necho \\$PHAUL_ROLE \\$@ >/tmp/follow\\n" >$1; chmod 755 $1'
        docker_hosts.sh(host, follow, f"{hooks}/committed.d/50-follow")
    veto = f"{hooks}/post_restore.d/50-veto"
    docker_hosts.sh(
        "b", 'printf "#!/bin/sh\\necho not today >&2; exit 3\\n" > "$1"; chmod 755 "$1"', veto
    )
    failed = web.migrate("a", "b")
    docker_hosts.sh("b", 'rm "$1"', veto)
    assert failed.code == 4
    assert "50-veto" in failed.stderr
    assert "not today" in failed.stderr
    _lives_only_on_a(docker_hosts, web)
    moved = web.migrate("a", "b")
    assert moved.code == 0, moved.stderr
    for host, role in (("a", "source"), ("b", "destination")):
        docker_hosts.sh(host, f"rm {hooks}/committed.d/50-follow")
        followed = docker_hosts.sh(host, "cat /tmp/follow; rm /tmp/follow")
        assert followed == f"{role} before committed {role}"


def _lives_only_on_a(docker_hosts: DockerHosts, web: DockerContainer) -> None:
    assert web.status("a") == "running"
    assert web.inspect("a")["HostConfig"]["RestartPolicy"]["Name"] == "always"
    assert web.status("b") == ""
    assert docker_hosts.leftovers("b") == ""
    assert web.dirtier("a").verified_on("a")["wrong"] == 0


def test_an_image_that_is_missing_is_carried(docker_hosts: DockerHosts) -> None:
    """By save and load, before anything is frozen."""
    web = docker_hosts.dirtier("a", "carried", "--mib", "4")
    docker_hosts.sh("b", f"docker rmi {IMAGE}")
    moved = web.migrate("a", "b")
    assert moved.code == 0, moved.stderr
    assert moved.named("tree_synced")[0]["tree"] == "image"
    assert web.inspect("b")["Image"] == docker_hosts.sh("a", f"docker images -q --no-trunc {IMAGE}")
    for host in ("a", "b"):
        assert docker_hosts.leftovers(host) == ""


@pytest.mark.needs("docker-networks")
@pytest.mark.thorough
def test_shared_memory_files_move(docker_hosts: DockerHosts) -> None:
    """/dev/shm is docker's mount, which CRIU leaves to others; the network is the default one."""
    web = docker_hosts.dirtier("a", "shm", "--mib", "4", flags="--publish 8099:80")
    web.exec("a", "sh", "-c", "echo in memory > /dev/shm/note")
    moved = web.migrate("a", "b")
    assert moved.code == 0, moved.stderr
    assert web.exec("b", "cat", "/dev/shm/note") == "in memory\n"
    assert web.dirtier("b").verified_on("b")["wrong"] == 0
    assert docker_hosts.sh("b", "docker port shm").splitlines()[0] == "80/tcp -> 0.0.0.0:8099"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--network none --volume /var/tmp:/host", "/var/tmp of this host is mounted"),
        pytest.param(
            "--network none --volume taken:/store", "no move left it", marks=pytest.mark.thorough
        ),
        pytest.param(
            "--network only-here",
            "the network only-here is missing there",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_what_cannot_move_is_refused_first(
    docker_hosts: DockerHosts, flags: str, reason: str
) -> None:
    """Exit code 3, and nothing was touched."""
    docker_hosts.sh("a", "docker network create only-here", check=False)
    docker_hosts.sh("b", "docker volume create taken; touch /var/lib/docker/volumes/taken/_data/x")
    docker_hosts.volumes.append("taken")
    web = docker_hosts.dirtier("a", "refused", "--mib", "4", flags=flags)
    refused = web.migrate("a", "b")
    assert refused.code == 3
    assert reason in refused.stderr
    assert web.status("a") == "running"
    assert web.status("b") == ""
    docker_hosts.clear()
    docker_hosts.sh("a", "docker network rm only-here", check=False)


def test_a_name_that_is_none(docker_hosts: DockerHosts) -> None:
    """It says which there are."""
    web = docker_hosts.dirtier("a", "present", "--mib", "4")
    done = docker_hosts.hosts.migrate("a", "absent", "ssh://root@b", "--engine", "docker")
    assert done.code == 3
    assert "absent" in done.stderr
    assert "present" in done.stderr
    assert web.status("a") == "running"
