"""The laboratory: emulated Debian hosts on one machine, for real moves between real kernels."""

from phaul_lab.lab import Lab
from phaul_lab.shell import LabError

__all__ = ["Lab", "LabError"]
