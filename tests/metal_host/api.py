"""The public functions: see README.md."""

import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import mlx.core as mx

from . import toolchain
from .kernel import HostKernel
from .session import ACTIVE, Session, active_session

T = TypeVar("T")
_SHUFFLED = 1001  # the first schedule that runs lanes in random order too


def why_not() -> str | None:
    """Why kernels cannot be run here, in one line, or None."""
    if sys.platform == "win32":
        return "Metal kernels on the host need Linux or macOS."
    return toolchain._search()[1] or None


@contextmanager
def host_kernels(
    *,
    seed: int = 0,
    checked: bool = True,
    lint: bool = True,
    strict: bool = True,
    allow: Collection[str] = (),
) -> Iterator[Session]:
    """Run every kernel that is made with mx.fast.metal_kernel inside on the CPU.

    seed: the schedule: 0 moves all simdgroups together, odd ones run one as far as it
        can go, even ones choose anew at every step; over 1000 lanes are shuffled too.
    checked: races, bounds, uninitialised reads. False is 5 to 20 times faster and
        finds only what faults.
    lint: what Apple's compilers would refuse, and address spaces.
    strict: raise KernelError for a finding; False only records it.
    allow: kinds of findings that are none here, e.g. ("never-written",).

    mx.compile is off inside, because kernels need values. Yields the Session.
    """
    if reason := why_not():
        from .findings import HostError

        raise HostError(reason)
    session = Session(seed, checked, lint, strict, allow)
    outer = active_session()
    original = mx.fast.metal_kernel
    token = ACTIVE.set(session)
    if outer is None:
        mx.fast.metal_kernel = _maker(original)  # type: ignore[assignment]
        mx.disable_compile()
    try:
        yield session
    finally:
        ACTIVE.reset(token)
        if outer is None:
            mx.fast.metal_kernel = original  # type: ignore[assignment]
            if not os.environ.get("MLX_DISABLE_COMPILE"):
                mx.enable_compile()


def _maker(original: Callable[..., Any]) -> Callable[..., HostKernel]:
    def metal_kernel(*args: Any, **settings: Any) -> HostKernel:
        return HostKernel(original, *args, **settings)

    return metal_kernel


def schedules(count: int = 8) -> list[int]:
    """Seeds for host_kernels: in step, one by one, at random; the last quarter of them
    with lanes in random order.
    """
    shuffled = count // 4
    return [*range(count - shuffled), *range(_SHUFFLED, _SHUFFLED + shuffled)]


def under_schedules(
    function: Callable[[], T], count: int = 8, **settings: Any
) -> list[T]:
    """What a function returns under each schedule. settings: of host_kernels.

    Arrays are evaluated inside, so that their kernels run under their schedule.
    """
    results = []
    for seed in schedules(count):
        with host_kernels(seed=seed, **settings):
            result = function()
            mx.eval(result)
            results.append(result)
    return results


def fresh_import(name: str) -> ModuleType:
    """A new copy of a module, for one that makes its kernels when it is imported.

    Call it inside host_kernels. The copy is not in sys.modules.
    """
    parent, _, child = name.rpartition(".")
    outer = importlib.import_module(parent) if parent else None
    old, attribute = sys.modules.pop(name, None), getattr(outer, child, None)
    try:
        return importlib.import_module(name)
    finally:
        sys.modules.pop(name, None)
        if old is not None:
            sys.modules[name] = old
        if outer is not None and attribute is not None:
            setattr(outer, child, attribute)
