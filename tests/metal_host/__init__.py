"""Runs the Metal kernels of mx.fast.metal_kernel on a CPU, and finds what is wrong.

See README.md in this folder. Nothing here is imported by the library.
"""

from .api import fresh_import, host_kernels, schedules, under_schedules, why_not
from .findings import KINDS, Finding, HostError, KernelError, Place, Run
from .session import Session

__all__ = [
    "KINDS",
    "Finding",
    "HostError",
    "KernelError",
    "Place",
    "Run",
    "Session",
    "fresh_import",
    "host_kernels",
    "schedules",
    "under_schedules",
    "why_not",
]
