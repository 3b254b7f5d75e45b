"""The process engine: a tree of processes by the pid of its root. Read `engine`."""

from phaul_engines.process.engine import ProcessEngine

__all__ = ["ProcessEngine"]
