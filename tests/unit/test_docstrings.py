"""Every public method says what it does, unless it overrides one that does."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import phaul_engines
import phaul_hooks
import pytest

import phaul_runtime


def modules() -> Iterator[str]:
    for package in (phaul_runtime, phaul_engines, phaul_hooks):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "_pb2" not in found.name and not found.name.endswith("__main__"):
                yield found.name


def silent(module: ModuleType) -> Iterator[str]:
    for name, kind in vars(module).items():
        if inspect.isclass(kind) and kind.__module__ == module.__name__ and name[0] != "_":
            for method, value in vars(kind).items():
                target = value.fget if isinstance(value, property) else value
                target = getattr(target, "__func__", target)
                if not inspect.isfunction(target) or target.__doc__:
                    continue
                if method[0] == "_" or target.__name__ == "<lambda>":
                    continue
                if not any(method in vars(above) for above in kind.__mro__[1:]):
                    yield f"{name}.{method}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_every_public_method_says_what_it_does(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"an extra is not installed: {error}")
    assert not list(silent(module))
