"""One run of a built kernel: its buffers, the call of the runtime, what comes back."""

import ctypes
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from . import toolchain
from .build import Built, source_line
from .findings import Finding, HostError, Place, Run
from .generated import Generated

# The runtime has one state: see state.h.
_LOCK = threading.Lock()


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("pointer", ctypes.c_void_p),
        ("begin", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("is_output", ctypes.c_int),
        ("is_initialised", ctypes.c_int),
    )


class _Statistics(ctypes.Structure):
    _fields_ = (
        ("switches", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("simd_functions", ctypes.c_uint64),
        ("accesses", ctypes.c_uint64),
    )


class _Finding(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char_p),
        ("message", ctypes.c_char_p),
        ("example", ctypes.c_char_p),
        ("line", ctypes.c_int),
        ("pc", ctypes.c_size_t),
        ("other", ctypes.c_size_t),
        ("count", ctypes.c_uint64),
    )


@cache
def _runtime() -> ctypes.CDLL:
    """The runtime; global, because kernels look its functions up."""
    runtime = ctypes.CDLL(str(toolchain.runtime_library()), mode=ctypes.RTLD_GLOBAL)
    runtime.msl_alloc.restype = ctypes.c_void_p
    runtime.msl_alloc.argtypes = [ctypes.c_size_t]
    runtime.msl_free.restype = None
    runtime.msl_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    runtime.msl_finding.restype = None
    runtime.msl_run.restype = ctypes.c_int
    return runtime


def load_runtime() -> None:
    """Load the runtime: before the first kernel."""
    _runtime()


@dataclass
class Strided:
    """Values of an array and how they lie in memory, strides in elements."""

    values: np.ndarray  # bfloat16 as uint16
    dtype: mx.Dtype

    @property
    def strides(self) -> list[int]:
        return [stride // self.values.itemsize for stride in self.values.strides]


def strided(array: mx.array, *, contiguous: bool) -> Strided:
    """An array as a kernel gets it: its own strides, or row-contiguous."""
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(bits)
    values = np.asarray(bits)
    if contiguous:
        values = np.ascontiguousarray(values).reshape(array.shape)
    return Strided(values, array.dtype)


def to_array(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The other way."""
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def empty(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> Strided:
    """An output before the kernel runs: init_value, or bytes that nobody may read."""
    if init_value is not None:
        return strided(mx.full(shape, init_value, dtype=dtype), contiguous=True)
    like = strided(mx.zeros(shape, dtype=dtype), contiguous=True).values
    values = np.empty(like.shape, like.dtype)
    values.reshape(-1).view(np.uint8)[...] = 0xFF if values.dtype != np.bool_ else 1
    return Strided(values, dtype)


@dataclass
class _Held:
    name: str
    array: Strided
    output: bool
    initialised: bool
    begin: int = 0
    pointer: int = 0
    size: int = 0

    def allocate(self) -> None:
        """Copy the memory between the array's first and last element."""
        values = self.array.values
        low = sum(min(0, s * (n - 1)) for s, n in _spans(values))
        high = sum(max(0, s * (n - 1)) for s, n in _spans(values)) + values.itemsize
        self.size = high - low if values.size else 0
        self.begin = _runtime().msl_alloc(self.size) or 0
        if not self.begin:
            raise HostError(f"No memory for the {self.size} bytes of '{self.name}'.")
        self.pointer = self.begin - low
        if self.size:
            ctypes.memmove(self.begin, values.ctypes.data + low, self.size)

    def as_struct(self) -> _Buffer:
        name = self.name.encode()
        return _Buffer(
            self.pointer, self.begin, self.size, name, self.output, self.initialised
        )

    def result(self) -> mx.array:
        values = np.empty(self.array.values.shape, self.array.values.dtype)
        ctypes.memmove(values.ctypes.data, self.pointer, values.nbytes)
        return to_array(values, self.array.dtype)

    def free(self) -> None:
        if self.begin:
            _runtime().msl_free(self.begin, self.size)


def _spans(values: np.ndarray) -> list[tuple[int, int]]:
    return [(s, n) for s, n in zip(values.strides, values.shape, strict=True) if n > 0]


def launch(
    built: Built,
    generated: Generated,
    inputs: dict[str, Strided],
    outputs: dict[str, Strided],
    record: Run,
    *,
    initialised: bool,
) -> list[mx.array]:
    """Run a kernel; fills in the record's findings and statistics."""
    held = [
        _hold(parameter.name, inputs, outputs, initialised)
        for parameter in generated.parameters
        if parameter.attribute == "buffer"
    ]
    try:
        for one in held:
            one.allocate()
        with _LOCK:
            _call(built, generated, held, record)
        results = {one.name: one.result() for one in held if one.output}
        return [results[name] for name in outputs]
    finally:
        for one in held:
            one.free()


def _hold(
    name: str,
    inputs: dict[str, Strided],
    outputs: dict[str, Strided],
    initialised: bool,
) -> _Held:
    """The buffer of a parameter; MLX makes three of an input's name."""
    if name in inputs:
        return _Held(name, inputs[name], output=False, initialised=True)
    if name in outputs:
        return _Held(name, outputs[name], output=True, initialised=initialised)
    base, _, what = name.rpartition("_")
    array = inputs[base]
    described: Any = {
        "shape": lambda: np.array(array.values.shape, np.int32),
        "strides": lambda: np.array(array.strides, np.int64),
        "ndim": lambda: np.array(array.values.ndim, np.int32),
    }[what]()
    return _Held(name, Strided(described, mx.int32), output=False, initialised=True)


def _call(built: Built, generated: Generated, held: list[_Held], record: Run) -> None:
    buffers = (_Buffer * len(held))(*(one.as_struct() for one in held))
    statistics = _Statistics()
    start = time.perf_counter()
    count = _runtime().msl_run(
        ctypes.c_void_p(built.entry),
        buffers,
        len(held),
        (ctypes.c_uint * 3)(*record.grid),
        (ctypes.c_uint * 3)(*record.threadgroup),
        int(record.checked),
        ctypes.c_uint64(record.seed),
        ctypes.byref(statistics),
    )
    record.seconds = time.perf_counter() - start
    record.switches = statistics.switches
    record.barriers = statistics.barriers
    record.simd_functions = statistics.simd_functions
    record.accesses = statistics.accesses
    for index in range(count):
        raw = _Finding()
        _runtime().msl_finding(index, ctypes.byref(raw))
        finding = _translate(raw, built, generated)
        kind = record.remarks if finding.kind == "remark" else record.findings
        kind.append(finding)


def _translate(raw: _Finding, built: Built, generated: Generated) -> Finding:
    def place(offset: int) -> Place | None:
        line = source_line(built.path, offset) if offset else None
        return generated.place(line) if line else None

    here = generated.place(raw.line) if raw.line else place(raw.pc)
    return Finding(
        kind=raw.kind.decode(),
        message=raw.message.decode(),
        place=here,
        other=place(raw.other),
        example=raw.example.decode(),
        count=raw.count,
    )
