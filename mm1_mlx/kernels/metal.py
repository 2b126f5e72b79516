"""What all Metal kernels share: when one is used, and how its source is built."""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.errors import ConfigError

Template = Sequence[tuple[str, Any]]
Size = tuple[int, int, int]

_FORCED: ContextVar[frozenset[str] | None] = ContextVar("forced", default=None)

_WATCHED: ContextVar[list[str] | None] = ContextVar("watched", default=None)


class MetalKernel:
    """A kernel's source, which MLX builds when it is first called.

    Importing a kernel costs nothing then. It is built again where mx.fast.metal_kernel
    is another function than before: so tests run the same source on the CPU
    (tests/metal_host). source: the body, header: what stands before it. contiguous:
    copy inputs that are not; without it the body goes by NAME_strides.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        source: str,
        header: str = "",
        contiguous: bool = True,
    ):
        self.name = name
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.source, self.header = source, header
        self.contiguous = contiguous
        self._built: Any = None
        self._maker: Any = None

    def __call__(
        self,
        arrays: Sequence[mx.array],
        *,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
        grid: Size,
        threadgroup: Size,
        template: Template = (),
    ) -> list[mx.array]:
        """Run it. shapes, dtypes: of the outputs. grid: threads, not threadgroups."""
        if (names := _WATCHED.get()) is not None:
            names.append(self.name)
        if self._maker is not mx.fast.metal_kernel:
            self._maker = mx.fast.metal_kernel
            self._built = mx.fast.metal_kernel(
                name=self.name,
                input_names=self.inputs,
                output_names=self.outputs,
                source=self.source,
                header=self.header,
                ensure_row_contiguous=self.contiguous,
            )
        return self._built(
            inputs=list(arrays),
            template=list(template),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[tuple(shape) for shape in shapes],
            output_dtypes=list(dtypes),
        )


def bits_of(number: float) -> int:
    """A float32 as an int of the same bits: templates take no floats.

    A body reads it as as_type<float>(NAME). Of none below 0: MLX writes a template's
    numbers into the kernel's name, where a minus cannot stand.
    """
    return struct.unpack("<i", struct.pack("<f", number))[0]


def has_metal() -> bool:
    """Whether arrays are computed by Metal here."""
    return mx.metal.is_available() and mx.default_device().type == mx.gpu


def chosen(name: str, *, default: bool = True) -> bool:
    """Whether a kernel is to run, where its shapes allow it.

    `forced` decides, then the user's settings, then default; the last two only where
    there is Metal, and the kernel has given there what its definition gives.
    """
    names = _FORCED.get()
    if names is not None:
        return name in names
    if not (has_metal() and user_choices().get(name, default)):
        return False
    from mm1_mlx.kernels.trial import proven  # it imports the kernels

    return proven(name)


@contextmanager
def forced(*names: str) -> Iterator[None]:
    """Use exactly these kernels inside, Metal or not: for tests and measurements."""
    token = _FORCED.set(frozenset(names))
    try:
        yield
    finally:
        _FORCED.reset(token)


@contextmanager
def watched() -> Iterator[list[str]]:
    """A list that receives the names of the kernels that are called inside.

    Where one declines, its definition gives the same: only this tells them apart.
    """
    names: list[str] = []
    token = _WATCHED.set(names)
    try:
        yield names
    finally:
        _WATCHED.reset(token)


def settings_file() -> Path:
    """Where a user's choices are kept: $MM1_MLX_SETTINGS, or in the home folder."""
    given = os.environ.get("MM1_MLX_SETTINGS")
    return Path(given or "~/.config/mm1_mlx/settings.json").expanduser()


@cache
def user_choices() -> dict[str, bool]:
    """Which kernels the user has switched on or off, by name.

    Raises ConfigError for a file that is not what `benchmark kernels` writes.
    """
    file = settings_file()
    if not file.is_file():
        return {}
    try:
        choices = json.loads(file.read_text(encoding="utf-8")).get("kernels", {})
        sound = all(type(value) is bool for value in choices.values())
    except (OSError, ValueError, AttributeError):
        sound, choices = False, {}
    if not sound:
        raise ConfigError(
            f'{file} is broken: expected {{"kernels": {{"NAME": true or false}}}}. '
            f"Correct it or remove it."
        )
    return choices


def write_choices(choices: Mapping[str, bool]) -> Path:
    """Keep choices, with those that the user's settings file has; give the file.

    The file is replaced as a whole: nobody reads half of it. Raises ConfigError where
    it is broken or cannot be written.
    """
    file = settings_file()
    user_choices.cache_clear()
    kernels = {**user_choices(), **choices}
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        text = json.dumps({**found, "kernels": kernels}, indent=2, sort_keys=True)
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, file)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise ConfigError(
            f"{file} cannot be written ({error.strerror}): name another with "
            f"$MM1_MLX_SETTINGS."
        ) from error
    user_choices.cache_clear()
    return file
