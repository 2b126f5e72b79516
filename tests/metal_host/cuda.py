"""Metal kernels on NVIDIA: the same bodies, through cuda_prelude.h and NVRTC.

A second compiler reads each body, without a GPU, and where MLX has its CUDA back end a
second parallel machine runs it. `CudaKernel` stands in for mx.fast.metal_kernel:

    monkeypatch.setattr(mx.fast, "metal_kernel", CudaKernel)

Without a GPU it compiles, and gives zeros. NVRTC comes from PyPI, for x86-64 and arm64
Linux: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime. CI does not install it.

MLX would compile a text, too (mx.fast.cuda_kernel), but by its own options, under which
each function of a header has to say __device__, and it keeps what it compiled by the
kernel's name alone. So it is compiled here, under a name made of the text, and what is
run (mx.fast.precompiled_cuda_kernel) is what was compiled.
"""

import ctypes
import hashlib
import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

PRELUDE = Path(__file__).with_name("cuda_prelude.h")
USUAL = "sm_80"  # what is compiled for where no GPU is

_TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
}


class CudaError(Exception):
    """What a kernel is not, in CUDA: the compiler's words, or a limit."""


# --- the text ----------------------------------------------------------------------


def translated(text: str) -> str:
    """Metal's address spaces in CUDA's words, token by token.

    An array in threadgroup memory is __shared__. Pointers there and elsewhere are plain
    pointers. (Not by macros: `device` stands inside of __device__.)
    """
    array = r"\bthreadgroup\s+([\w:<>, ]+?\s+\w+\s*\[)"
    text = re.sub(array, r"__shared__ \1", text)
    return re.sub(r"\b(device|constant|threadgroup|thread)\b(?=[\s&*])", "", text)


def cuda_source(
    source: str,
    header: str,
    inputs: Sequence[tuple[str, mx.Dtype]],
    outputs: Sequence[tuple[str, mx.Dtype]],
    template: Sequence[tuple[str, Any]],
) -> tuple[str, str, list[tuple[str, str]]]:
    """The kernel's name, its text, and which extras it takes, in their order.

    An extra is an input's name and "shape", "strides" or "ndim", which the body names
    as in Metal. Each becomes an array behind the inputs; behind these stands the grid.
    """
    extras = [
        (name, what)
        for name, _ in inputs
        for what in ("shape", "strides", "ndim")
        if f"{name}_{what}" in source
    ]
    arguments = [f"const {_TYPES[dtype]}* {name}" for name, dtype in inputs]
    for name, what in extras:
        kind = "int64_t" if what == "strides" else "int32_t"
        label = f"{name}_{what}" + ("_at" if what == "ndim" else "")
        arguments.append(f"const {kind}* {label}")
    arguments.append("const int32_t* mm1_grid")
    arguments += [f"{_TYPES[dtype]}* {name}" for name, dtype in outputs]
    lines = [f"int {name}_ndim = *{name}_ndim_at;" for name, w in extras if w == "ndim"]
    for name, value in template:
        if isinstance(value, mx.Dtype):
            lines.append(f"using {name} = {_TYPES[value]};")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            lines.append(f"constexpr {kind} {name} = {int(value)};")
    body = "\n".join([*lines, "MM1_PLACE(mm1_grid);", translated(source)])
    text = f"({', '.join(arguments)}) {{\n{body}\n}}\n"
    header = translated(header)
    name = "mm1_" + hashlib.sha256((header + text).encode()).hexdigest()[:16]
    return name, f'{header}\nextern "C" __global__ void {name}{text}', extras


# --- the compiler ------------------------------------------------------------------


@cache
def find_nvrtc() -> tuple[ctypes.CDLL, list[Path]] | None:
    """NVRTC and the folders of CUDA's headers, from packages of PyPI, or None."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    libraries = [f for place in places for f in place.glob("*/lib/libnvrtc.so.*")]
    headers = [f for place in places for f in place.glob("*/include/cuda_fp16.h")]
    if not libraries or not headers:
        return None
    return ctypes.CDLL(str(libraries[0])), [file.parent for file in headers]


def architecture() -> str:
    """Of this machine's GPU."""
    if not mx.cuda.is_available():
        return USUAL
    return str(mx.device_info(mx.gpu)["architecture"])


def compiled(name: str, text: str) -> bytes:
    """A kernel's machine code. Raises CudaError with the compiler's words."""
    found = find_nvrtc()
    assert found is not None
    library, folders = found
    whole = f'#include "{PRELUDE.name}"\n{text}'.encode()
    flags = [f"--gpu-architecture={architecture()}", "--std=c++17", "-default-device"]
    flags.append("-diag-suppress=177")  # a place that the body does not ask for
    flags += [f"--include-path={folder}" for folder in [PRELUDE.parent, *folders]]
    options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    program = ctypes.c_void_p()
    label = f"{name}.cu".encode()
    _call(library.nvrtcCreateProgram(ctypes.byref(program), whole, label, 0, 0, 0))
    try:
        if library.nvrtcCompileProgram(program, len(flags), options):
            log = _read(library, program, "ProgramLog")
            raise CudaError(log.decode().rstrip("\0\n"))
        return _read(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _call(status: int) -> None:
    if status:
        raise CudaError(f"NVRTC gives status {status}.")


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _call(getattr(library, f"nvrtcGet{what}")(program, text))
    return text.raw


# --- the kernel --------------------------------------------------------------------


class CudaKernel:
    """What mx.fast.metal_kernel gives, for NVIDIA.

    Raises CudaError for a text that does not compile, and where threads work together
    in a threadgroup that the grid cuts off: CUDA has only whole ones.
    """

    compiled: ClassVar[dict[str, bytes]] = {}  # by the text's name

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        **_: Any,
    ):
        self.name, self.source, self.header = name, source, header
        self.inputs, self.outputs = list(input_names), list(output_names)
        self.contiguous = ensure_row_contiguous

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None = None,
        **_: Any,
    ) -> list[mx.array]:
        block = [min(g, t) for g, t in zip(grid, threadgroup, strict=True)]
        self._check_whole(grid, block)
        name, text, extras = cuda_source(
            self.source,
            self.header,
            [(n, a.dtype) for n, a in zip(self.inputs, inputs, strict=True)],
            list(zip(self.outputs, output_dtypes, strict=True)),
            template or [],
        )
        if name not in self.compiled:
            self.compiled[name] = compiled(name, text)
        if not mx.cuda.is_available():
            shaped = zip(output_shapes, output_dtypes, strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in shaped]
        given = dict(zip(self.inputs, inputs, strict=True))
        more = [_extra(given[name], what) for name, what in extras]
        more.append(mx.array(list(grid), mx.int32))
        return mx.fast.precompiled_cuda_kernel(
            name=name,
            compiled_source=self.compiled[name],
            inputs=[*inputs, *more],
            output_shapes=list(output_shapes),
            output_dtypes=list(output_dtypes),
            scalars=[],
            grid=(grid[0], grid[1], grid[2]),
            threadgroup=(block[0], block[1], block[2]),
            ensure_row_contiguous=True,
        )

    def _check_whole(self, grid: Sequence[int], block: Sequence[int]) -> None:
        together = re.search(
            r"\b(simd_\w+|\w+_barrier)\s*\(", self.header + self.source
        )
        if together and any(g % b for g, b in zip(grid, block, strict=True)):
            raise CudaError(
                f"{self.name}: the grid {tuple(grid)} is no multiple of the "
                f"threadgroup {tuple(block)}, whose threads work together "
                f"({together[1]})."
            )


def _extra(array: mx.array, what: str) -> mx.array:
    """Shape, strides (of a contiguous copy, which it will be) or ndim, as an array."""
    if what == "ndim":
        return mx.array([array.ndim], mx.int32)
    if what == "shape":
        return mx.array(array.shape, mx.int32)
    strides = [1]
    for size in array.shape[:0:-1]:
        strides.append(strides[-1] * size)
    return mx.array(strides[::-1], mx.int64)
