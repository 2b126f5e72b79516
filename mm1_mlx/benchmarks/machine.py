"""What measured times depend on: the machine and the versions."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("mm1_mlx", "mlx", "numpy", "pillow", "tokenizers")


def machine() -> dict[str, str]:
    """System, processor, and the versions of what is measured."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def machine_lines(more: dict[str, str] | None = None) -> list[str]:
    """The same as lines of text, and more of them."""
    values = machine() | (more or {})
    return [f"{name}: {value}" for name, value in values.items()]


def _version(package: str) -> str:
    if package == "mm1_mlx":
        from mm1_mlx._version import __version__

        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
