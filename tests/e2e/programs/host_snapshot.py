"""Runs on a host of the laboratory: prints what the host is like, as JSON.

One object: the kind of thing to its lines, sorted. What changes by itself is left out here, each
with its reason; what a move may change is for the test to say.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PLACES = ("/run", "/tmp", "/var/tmp", "/var/lib", "/etc", "/dev", "/root")
# An engine's store of layers has whole root file systems in it: known by their names.
NOT_BELOW = re.compile(
    r"/var/lib/(docker|containers)/.*overlay[^/]*/[^/]+/[^/]+"
    r"|/var/lib/containerd/.*/snapshots/\d+/(fs|work)"
    r"|/var/lib/bundles/[^/]+/rootfs|/run/containerd/.*/rootfs|/dev/pts|/run/netns/.*"
)
NOT_COMPARED = re.compile(
    r"fs/(dentry-state|inode-|file-nr|aio-nr|quota/)"  # what the kernel has in use
    r"|kernel/(random/|ns_last_pid|pty/nr|keys/|tainted)"
    r"|net/netfilter/nf_conntrack_count|vm/stat_refresh"
    r"|vm/min_free_kbytes"  # the kernel's own, by the memory that a machine is given or loses
    r"|net/ipv[46]/(neigh|conf)/(veth|docker|br-)"  # of links, which are compared themselves
    r"|net/ipv[46]/route/flush|vm/(drop_caches|compact_memory)|fs/binfmt_misc"  # to be written to
)
SET_IN_CGROUPS = (
    "cgroup.subtree_control", "cgroup.freeze", "cgroup.type", "cpu.max", "memory.max", "pids.max",
    "freezer.state",
)  # fmt: skip


# Of the kernel: what is not in it can change no option of cgroup2, and sees what others change.
FIRST_CGROUP_NAMESPACE = 0xEFFFFFFB


def said(*argv: str) -> list[str]:
    """The lines that a program says; none where it is not installed."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return []
    return done.stdout.splitlines()


def text_of(path: Path | str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError as error:
        return f"({error.strerror})"


def mounts() -> Iterator[str]:
    """Each mount with its own options and those of its file system."""
    for line in Path("/proc/1/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        _, _, _, root, place, options, *_ = before.split(" ")
        kind, source, of_all = after.split(" ", 2)
        if kind == "cgroup2" and os.stat("/proc/1/ns/cgroup").st_ino != FIRST_CGROUP_NAMESPACE:
            of_all = "(the machine's)"
        yield f"{place} {kind} {source} root={root} {options} {of_all}"


def namespaces() -> Iterator[str]:
    """Those that are not pid 1's, by who is in them."""
    members: dict[str, list[str]] = {}
    for entry in (entry for entry in os.listdir("/proc") if entry.isdigit()):
        for kind in ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"):
            try:
                found = os.readlink(f"/proc/{entry}/ns/{kind}")
                if found != os.readlink(f"/proc/1/ns/{kind}"):
                    members.setdefault(found, []).append(text_of(f"/proc/{entry}/comm"))
            except OSError:
                continue
    for found, names in members.items():
        yield f"{found.partition(':')[0]} of {','.join(sorted(set(names)))}"


def rules() -> Iterator[str]:
    """Of the host's network, and of each that has a name."""
    named = [
        path for place in ("/run/netns", "/run/docker/netns") for path in Path(place).glob("*")
    ]
    # Docker has a name for the host's own, too.
    own = os.stat("/proc/1/ns/net").st_ino
    for path in (None, *(path for path in named if path.stat().st_ino != own)):
        enter = [] if path is None else ["nsenter", f"--net={path}"]
        for argv in (["nft", "-s", "list", "ruleset"], ["iptables-save"], ["ip6tables-save"]):
            table = ""
            for line in said(*enter, *argv):
                rule = re.sub(r"\[\d+:\d+\]|counter packets \d+ bytes \d+", "", line).strip()
                if rule.startswith(("table ", "*")):
                    table = rule.strip(" {")
                elif rule.startswith(("chain ", "set ")):
                    table = f"{' '.join(table.split(' ')[:3])} {rule.strip(' {')}"
                if rule and not rule.startswith(("#", "COMMIT", "}")):
                    yield f"{path or 'host'}: {argv[0]}: {table}: {rule}"


def cgroups() -> Iterator[str]:
    """Every group of every hierarchy that is mounted, and what is set in it."""
    for line in Path("/proc/1/mountinfo").read_text().splitlines():
        place, kind = line.split(" ")[4], line.partition(" - ")[2].split(" ")[0]
        if kind not in ("cgroup", "cgroup2"):
            continue
        for directory, _, files in os.walk(place):
            info = os.stat(directory)
            values = [
                f"{name}={text_of(Path(directory, name))}"
                for name in SET_IN_CGROUPS
                if name in files
            ]
            yield f"{directory} {stat.filemode(info.st_mode)} {info.st_uid} {' '.join(values)}"


def sysctls() -> Iterator[str]:
    for directory, _, files in os.walk("/proc/sys"):
        for name in files:
            path = Path(directory, name)
            short = str(path)[len("/proc/sys/") :]
            if not NOT_COMPARED.match(short) and path.stat().st_mode & 0o444:
                yield f"{short} = {text_of(path)}"


def files() -> Iterator[str]:
    """Names, kinds, modes and owners; of what lies in /etc, what it says too."""
    places = [Path("/", name) for name in os.listdir("/")]
    for directory in PLACES:
        for above, inside, names in os.walk(directory):
            if NOT_BELOW.fullmatch(above):
                inside.clear()
                continue
            places += [Path(above, name) for name in (*inside, *names)]
    for path in places:
        try:
            info = path.lstat()
            line = f"{path} {stat.filemode(info.st_mode)} {info.st_uid}:{info.st_gid}"
            if stat.S_ISREG(info.st_mode) and str(path).startswith("/etc/"):
                line += f" {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        except OSError:
            continue
        yield line


def listening() -> Iterator[str]:
    for kind in ("-t", "-u", "-w", "-x"):
        for line in said("ss", "-Hln", kind):
            # A unix socket's number is another each time; its name stays.
            yield f"{kind} {line.split()[4 if kind == '-x' else 3]}"


def processes() -> Iterator[str]:
    """All but those that belong to a session of a test's."""
    names, above = {}, {}
    for entry in (entry for entry in os.listdir("/proc") if entry.isdigit()):
        try:
            text = Path("/proc", entry, "stat").read_text(errors="replace")
        except OSError:
            continue
        names[int(entry)] = text[text.index("(") + 1 : text.rindex(")")]
        above[int(entry)] = int(text[text.rindex(")") + 2 :].split()[1])
    for pid, name in names.items():
        line = {name}
        parent = above[pid]
        while parent in names:
            line.add(names[parent])
            parent = above[parent]
        if not line & {"sshd-session", "sshd-auth"} and names.get(parent, name) != "kthreadd":
            yield name


def links() -> Iterator[str]:
    for line in said("ip", "-o", "link"):
        yield "link " + re.sub(r"^\d+: |@if\d+|\bqlen \d+", "", line)
    for line in said("ip", "-o", "addr"):
        yield "address " + re.sub(r"^\d+: | (valid|preferred)_lft \S+", "", line)
    for family in ("-4", "-6"):
        for kind in ("route", "rule"):
            yield from (f"{kind} {family} {line}" for line in said("ip", family, kind))


def main() -> None:
    kinds = {
        "mounts": mounts(),
        "rules": rules(),
        "cgroups": cgroups(),
        "namespaces": namespaces(),
        "sysctls": sysctls(),
        "files": files(),
        "listening": listening(),
        "processes": processes(),
        "links": links(),
    }
    found = {}
    for kind, lines in kinds.items():
        # What is there twice is told twice.
        counted = Counter(re.sub(r"\s+", " ", line).strip() for line in lines)
        found[kind] = sorted(
            line if number == 1 else f"{line} ({number} times)" for line, number in counted.items()
        )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
