"""Is there an MLX that works here? If not, one line that says what to install."""

import os
import platform
import sys
from contextlib import suppress
from importlib.util import find_spec

from mm1_mlx.errors import MM1Error


def require_mlx() -> None:
    """Import MLX, or raise MM1Error with the one thing to do on this machine."""
    if sys.platform.startswith("linux") and "mlx.core" not in sys.modules:
        _prefer_openblas()
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise MM1Error(advice(str(error))) from error


def _prefer_openblas() -> None:
    """Have MLX's CPU back end multiply with the system's OpenBLAS, if it is there.

    The wheel brings BLAS's reference code, which is several times slower. What is
    loaded for all to see before MLX is, MLX's calls are bound to.
    """
    import ctypes

    # Its threads look for work for 2^20 cycles, half a millisecond, before they sleep.
    # By default it is 2^26, and a process that ends just then waits for ever (OpenBLAS
    # 0.3.21: blas_thread_shutdown_ joins a thread that has missed its call).
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
    with suppress(OSError):  # not installed
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)


def advice(reason: str) -> str:
    """Why MLX cannot be imported here (`reason` is what Python said), and the cure."""
    if sys.platform == "darwin":
        return _advice_for_mac(reason)
    if sys.platform.startswith("linux"):
        return _advice_for_linux(reason)
    return (
        f"MLX does not run on {platform.system()}: use a Mac with Apple silicon, or "
        f"Linux (on Windows: WSL)."
    )


def _advice_for_mac(reason: str) -> str:
    if platform.machine() != "arm64":
        return (
            f"This is an x86 Python ({sys.executable}), running under Rosetta or on an "
            f"Intel Mac; MLX needs Apple silicon and an arm64 Python. Make the virtual "
            f"environment with one: brew install python, or python.org's installer."
        )
    release = platform.mac_ver()[0]
    major = release.partition(".")[0]
    if major.isdigit() and 10 < int(major) < 14:  # 10: an old Python hides the number
        return f"This Mac has macOS {release}, but MLX needs macOS 14 or newer."
    if find_spec("mlx") is None:
        return "MLX is not installed: run pip install mlx in this environment."
    return f"MLX cannot be loaded ({_one_line(reason)}): run pip install -U mlx."


def _advice_for_linux(reason: str) -> str:
    backends = {"mlx-cpu": "cpu", "mlx-cuda-12": "cuda12", "mlx-cuda-13": "cuda13"}
    found = [extra for name, extra in backends.items() if _installed(name)]
    if not found:
        return (
            "MLX has no back end here: run pip install 'mm1_mlx[cpu]' (in a clone: "
            "pip install -e '.[cpu]'); with an NVIDIA GPU use the extra cuda12 or "
            "cuda13 in place of cpu."
        )
    if len(found) > 1:
        return (
            f"MLX has more than one back end here ({', '.join(found)}), and they "
            f"exclude each other: make a new environment with one of these extras."
        )
    if found[0] != "cpu":
        return (
            f"MLX's CUDA back end cannot be loaded ({_one_line(reason)}): it needs an "
            f"NVIDIA driver for {found[0]}; without one use the extra cpu in a new "
            f"environment."
        )
    return (
        f"MLX cannot be loaded ({_one_line(reason)}): run "
        f"pip install --force-reinstall 'mlx[cpu]'."
    )


def _installed(name: str) -> bool:
    # Slow to import, and only a failure needs it.
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _one_line(text: str) -> str:
    return " ".join(text.split())
