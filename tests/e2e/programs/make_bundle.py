"""Runs on a host of the laboratory: makes a bundle out of the host's own programs.

make_bundle.py '{"path": "/var/lib/bundles/web", "args": ["redis-server"], ...}'
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOLS = ("sh", "cat", "ls", "sleep", "kill", "rm", "mkdir")


def copy_program(root: Path, name: str) -> None:
    real = Path(shutil.which(name) or name).resolve()
    target = root / "bin" / name
    shutil.copy(real, target)
    libraries = subprocess.run(["ldd", real], capture_output=True, text=True, check=False).stdout
    for library in re.findall(r"/\S+", libraries):
        place = root / library.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(library).resolve(), place)


def main(spec: dict[str, Any]) -> None:
    bundle = Path(spec["path"])
    root = bundle / "rootfs"
    for name in ("bin", "dev", "proc", "sys", "tmp", "etc", "run", "data"):
        (root / name).mkdir(parents=True)
    for name in {*TOOLS, spec["args"][0], *spec.get("programs", [])}:
        copy_program(root, name)
    subprocess.run(["runc", "spec"], cwd=bundle, check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update(args=spec["args"], terminal=spec.get("terminal", False))
    config["root"]["readonly"] = False
    linux = config["linux"]
    network = spec.get("network", "own")
    if network == "host":
        linux["namespaces"] = [n for n in linux["namespaces"] if n["type"] != "network"]
    elif network != "own":
        for namespace in linux["namespaces"]:
            if namespace["type"] == "network":
                namespace["path"] = network
    if spec.get("uts") == "host":
        # It then tells the name of the host that it runs on.
        linux["namespaces"] = [n for n in linux["namespaces"] if n["type"] != "uts"]
        del config["hostname"]
    linux["resources"].update(spec.get("resources", {}))
    for source, destination in spec.get("binds", {}).items():
        config["mounts"].append(
            {"type": "bind", "source": source, "destination": destination, "options": ["rbind"]}
        )
    (bundle / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
