"""`phaul-runtime check`."""

from __future__ import annotations

from typing import Any

import click

from phaul_runtime.cli.options import chosen_target, configure, move_options
from phaul_runtime.cli.outlet import tell
from phaul_runtime.cli.views import make_view
from phaul_runtime.errors import ExitCode
from phaul_runtime.source.migration import Migration


@click.command("check")
@move_options
def check_command(**given: Any) -> int:
    """Report on both hosts, and on TARGET if one is named; changes nothing.

    \b
    Exit codes: 0 a move may be tried; 3 something refuses.
    """
    config = configure(given)
    view = make_view(given["output"])
    refused = Migration(config, chosen_target(given), view).check()
    if not refused:
        return 0
    tell(
        f"phaul-runtime: {len(refused)} checks refuse: "
        + ", ".join(sorted({f.finding.check for f in refused})),
    )
    return int(ExitCode.REFUSED)
