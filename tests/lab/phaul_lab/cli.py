"""`tests/lab/lab`: the laboratory by hand."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from phaul_lab.host import ADDRESSES
from phaul_lab.image import ensure_image
from phaul_lab.lab import Lab, pycriu_dir
from phaul_lab.shell import LabError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab", description="Emulated hosts a and b for tests.")
    parser.add_argument("--name", help="of the laboratory; default: one for each checkout")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="bring the hosts up with the current wheel on them")
    up.add_argument("--hosts", default="a,b", help="as a,b,c (default: a,b)")
    up.add_argument("--memory", type=int, metavar="MIB", help="of each host that is not up yet")
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
    commands.add_parser("down", help="end the hosts and forget their disks")
    status = commands.add_parser("status", help="what is up")
    status.add_argument("--json", action="store_true")
    commands.add_parser("root", help="print the path of the image's unpacked root")
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


def _run(given: argparse.Namespace) -> int:
    lab = Lab(given.name)
    match given.command:
        case "up":
            if given.memory:
                os.environ["PHAUL_LAB_MEMORY"] = str(given.memory)
            lab.up([name for name in given.hosts.split(",") if name])
        case "exec":
            argv = given.argv[1:] if given.argv[:1] == ["--"] else given.argv
            if not argv:
                raise LabError("exec what? lab exec HOST -- ARGV...")
            command = lab.exec_argv(given.host, argv, tty=given.t)
            sys.stdout.flush()
            os.execvp(command[0], command)
        case "push":
            lab.push(given.host, given.file, given.target)
        case "cut":
            lab.cut(given.host)
        case "mend":
            lab.mend(given.host)
        case "down":
            lab.down()
        case "status":
            _status(lab, as_json=given.json)
        case "root":
            print(ensure_image().root)
        case "pycriu":
            print(pycriu_dir())
    return 0


def _status(lab: Lab, *, as_json: bool) -> None:
    status = lab.status()
    if as_json:
        print(json.dumps({"name": lab.name, "hosts": status}))
        return
    if not status:
        print(f"laboratory {lab.name}: down")
    for name, facts in status.items():
        state = f"up, pid {facts['pid']}, ssh port {facts['port']}" if facts["pid"] else "down"
        print(f"laboratory {lab.name}: host {name} ({facts['address']}): {state}")
