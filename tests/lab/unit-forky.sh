#!/bin/sh
# The tests that need no laboratory, in a host of namespaces: on forky's Python, pycriu and programs.
#
#   unit-forky.sh [PYTEST-ARGUMENT...]      without a path: unit, contract and integration tests
set -eu
cd "$(dirname "$0")/../.."
# As phaul_lab.lab names this checkout's laboratories.
name=${PHAUL_LAB:-$(printf %s "$(pwd -P)" | sha256sum | cut -c1-8)}-unit
lab="tests/lab/lab --name $name"
trap '$lab down' EXIT
trap 'exit 1' HUP INT TERM
$lab up --native --suite forky --hosts a
git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - |
    $lab exec a -- sh -c 'mkdir /src && tar -C /src -xf - 2>/dev/null
        echo /opt/phaul-runtime/phaul >$(echo /opt/phaul-tests/lib/python3*/site-packages)/phaul.pth'
case " $*" in *" tests/"*) ;; *) set -- "$@" tests/unit tests/contract tests/integration ;; esac
# The commands that the wheel installs, for this Python.
$lab exec a -- /opt/phaul-tests/bin/python -I -c '
import importlib.metadata, pathlib, sys
here = pathlib.Path(sys.executable).parent
for entry in importlib.metadata.distribution("phaul-runtime").entry_points.select(group="console_scripts"):
    text = f"#!{sys.executable}\nimport sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
    (here / entry.name).write_text(text)
    (here / entry.name).chmod(0o755)
'
$lab exec a -- sh -c 'cd /src && PATH=/opt/phaul-tests/bin:$PATH PYTHONPATH=/src/engines:/src/hooks \
    exec /opt/phaul-tests/bin/python -m pytest "$@"' sh "$@"
