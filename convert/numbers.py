"""Types of numbers without torch: casts and quantization, a few rows at a time.

bfloat16 has no type in NumPy; it goes by its bits, in uint16. Types have the names that
safetensors writes ("BF16").
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

FLOATS = ("F64", "F32", "F16", "BF16")
BY_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_CHUNK = 32 << 20  # bytes of float32 that are worked on at a time
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def rows(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array as parts along its first axis, none of them large; contiguous."""
    if array.ndim == 0:
        yield array.reshape(1)
        return
    row = max(1, array[:1].size * 4)
    step = max(1, _CHUNK // row)
    for start in range(0, len(array), step):
        yield np.ascontiguousarray(array[start : start + step])


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Any of FLOATS as float32, exactly (float64: rounded)."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def cast(array: np.ndarray, dtype: str, target: str) -> np.ndarray:
    """From one of FLOATS to another, to the nearest number, ties to even.

    As torch does it, so float64 goes to 16 bits by way of float32.
    """
    if dtype == target:
        return array
    if target != "BF16":
        with np.errstate(over="ignore"):  # infinity, as everywhere
            return to_float32(array, dtype).astype(_NUMPY[target])
    bits = to_float32(array, dtype).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def to_mlx(array: np.ndarray, dtype: str) -> mx.array:
    """As an MLX array of its own type; float64 as float32."""
    if dtype == "BF16":
        return mx.array(array).view(mx.bfloat16)
    return mx.array(array.astype(np.float32) if dtype == "F64" else array)


def from_mlx(array: mx.array) -> np.ndarray:
    """The bytes of an MLX array; bfloat16 as bits."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array, copy=False)


def quantized_slots(
    shape: tuple[int, ...], dtype: str, settings: dict
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of what quantize gives: weight, scales and, if affine, biases."""
    *leading, columns = shape
    group, bits = settings["group_size"], settings["bits"]
    mode = settings.get("mode", "affine")
    scales = (*leading, columns // group)
    slots = {"weight": ("U32", (*leading, columns * bits // 32))}
    if mode == "affine":
        return slots | {"scales": (dtype, scales), "biases": (dtype, scales)}
    return slots | {"scales": ("U8", scales)}


def quantize(array: np.ndarray, dtype: str, settings: dict) -> list[np.ndarray]:
    """Weight, scales and, if affine, biases of some rows. dtype: of the scales."""
    how = {k: settings[k] for k in ("group_size", "bits", "mode") if k in settings}
    parts = mx.quantize(to_mlx(array, dtype), **how)
    mx.eval(*parts)
    return [from_mlx(part) for part in parts]


def dequantize(parts: dict[str, np.ndarray], dtype: str, settings: dict) -> np.ndarray:
    """The numbers of a packed weight, float32. dtype: of its scales as they are."""
    how = {k: settings[k] for k in ("group_size", "bits", "mode") if k in settings}
    weight = mx.array(parts["weight"])
    scales = to_mlx(parts["scales"], dtype)
    biases = to_mlx(parts["biases"], dtype) if "biases" in parts else None
    whole = mx.dequantize(weight, scales, biases, **how).astype(mx.float32)
    mx.eval(whole)
    return np.array(whole)
