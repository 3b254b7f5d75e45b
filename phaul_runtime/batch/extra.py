"""What a batch needs beyond the rest: the extra `batch`."""

from __future__ import annotations

from importlib import import_module

from phaul_runtime.errors import UsageError


def require(*names: str) -> None:
    """Raise if a package of the extra is missing.

    Raises:
        UsageError: it names the package and the extra.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise UsageError(
                f"batches need the Python package {name}: {error}",
                hint="pip install 'phaul-runtime[batch]'",
            ) from error
