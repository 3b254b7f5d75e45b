"""`tests/lab/lab`: the laboratory by hand."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from phaul_lab.host import ADDRESSES
from phaul_lab.image import DEFAULT_SUITE, cache_dir, ensure_image, suites
from phaul_lab.lab import Kind, Lab, checkout_name, checkouts_labs, pycriu_dir
from phaul_lab.shell import LabError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab", description="Hosts a and b for tests.")
    parser.add_argument(
        "--name", help="of the laboratory; default: the one that was brought up last"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="bring the hosts up with the current wheel on them")
    up.add_argument("--hosts", default="a,b", help="as a,b,c (default: a,b)")
    up.add_argument(
        "--memory", type=int, metavar="MIB", help="of each emulated host that is not up yet"
    )
    up.add_argument("--native", action="store_true", help="hosts of namespaces, not emulated ones")
    up.add_argument(
        "--suite", default="", help=f"of software: {', '.join(suites())}; of each host: a=.,b=."
    )
    run = commands.add_parser("exec", help="run a command: lab exec HOST -- ARGV...")
    run.add_argument("-t", action="store_true", help="with a terminal")
    run.add_argument("host", choices=ADDRESSES)
    run.add_argument("argv", nargs=argparse.REMAINDER)
    push = commands.add_parser("push", help="copy a file to a host")
    push.add_argument("host", choices=ADDRESSES)
    push.add_argument("file", type=Path)
    push.add_argument("target")
    for name, text in (("cut", "unplug the cable"), ("mend", "plug it in again")):
        cable = commands.add_parser(name, help=text)
        cable.add_argument("host", choices=ADDRESSES, nargs="?", default="a")
    commands.add_parser(
        "down", help="end the hosts and forget their disks: all of this checkout, without --name"
    )
    status = commands.add_parser("status", help="what is up")
    status.add_argument("--json", action="store_true")
    root = commands.add_parser("root", help="print the path of an image's unpacked root")
    root.add_argument("--suite", default=DEFAULT_SUITE, choices=suites())
    commands.add_parser("pycriu", help="print a directory with the image's pycriu, for PYTHONPATH")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        return _run(given)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1


def _kind(native: bool, suite: str) -> Kind:
    """What `--native` and `--suite` ask for."""
    if "=" not in suite:
        return Kind(native, suite)
    pairs = [part.partition("=") for part in suite.split(",")]
    return Kind(native, suites={host: name for host, _, name in pairs})


def _last() -> Path:
    """Where the name of the laboratory lies that was brought up last by hand."""
    return cache_dir() / "labs" / f"{checkout_name()}.last"


def _lab(name: str | None) -> Lab:
    if name is None and _last().exists():
        name = _last().read_text()
    return Lab(name)


def _up(given: argparse.Namespace) -> None:
    if given.memory:
        os.environ["PHAUL_LAB_MEMORY"] = str(given.memory)
    kind = _kind(given.native, given.suite)
    lab = Lab(given.name or kind.name)
    lab.up([name for name in given.hosts.split(",") if name], kind)
    if given.name is None:
        _last().write_text(lab.name)


def _run(given: argparse.Namespace) -> int:
    match given.command:
        case "up":
            _up(given)
        case "exec":
            argv = given.argv[1:] if given.argv[:1] == ["--"] else given.argv
            if not argv:
                raise LabError("exec what? lab exec HOST -- ARGV...")
            command = _lab(given.name).exec_argv(given.host, argv, tty=given.t)
            sys.stdout.flush()
            os.execvp(command[0], command)
        case "push":
            _lab(given.name).push(given.host, given.file, given.target)
        case "cut":
            _lab(given.name).cut(given.host)
        case "mend":
            _lab(given.name).mend(given.host)
        case "down":
            for lab in [Lab(given.name)] if given.name else checkouts_labs():
                lab.down()
        case "status":
            labs = [Lab(given.name)] if given.name else checkouts_labs() or [Lab()]
            _status(labs, as_json=given.json)
        case "root":
            print(ensure_image(given.suite).root)
        case "pycriu":
            print(pycriu_dir())
    return 0


def _status(labs: Sequence[Lab], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"name": lab.name, "hosts": lab.status()} for lab in labs]))
        return
    for lab in labs:
        status = lab.status()
        if not status:
            print(f"laboratory {lab.name}: down")
        for name, facts in status.items():
            state = f"up, pid {facts['pid']}" if facts["pid"] else "down"
            made_of = f"{facts['kind']}, {facts['suite']}"
            print(f"laboratory {lab.name}: host {name} ({facts['address']}, {made_of}): {state}")
