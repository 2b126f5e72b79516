"""MLX's generated Metal source: how to get it, its parts, where a line came from."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from .findings import HostError, Place

_VERSION = version("mlx")
_SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", re.DOTALL)
_INSTANCE = re.compile(
    r'template \[\[host_name\("[^"]*"\)\]\] \[\[kernel\]\] decltype\(.*\) (.*);\n'
)
_PARAMETER = re.compile(r"\s*(.*?)\s*\[\[(\w+)(?:\(\d+\))?\]\]", re.DOTALL)


@dataclass(frozen=True)
class Parameter:
    """One of the kernel function's; attribute is "buffer" or that of a thread."""

    type: str
    name: str
    attribute: str

    @property
    def is_reference(self) -> bool:
        """MLX passes 0-d inputs by reference to constant memory."""
        return self.type.endswith("&")


@dataclass(frozen=True)
class Generated:
    """The source that MLX would hand to Metal for one combination of types."""

    text: str
    function: str
    parameters: tuple[Parameter, ...]
    instance: str  # the function with its template arguments
    code: str  # the text without the explicit instantiation
    header: str
    body: str

    def place(self, line: int) -> Place | None:
        """Which line of the header or body a line of `code` is."""
        body_at = self._start(self.body)
        if body_at is not None:
            offset = line - body_at
            lines = self.body.splitlines()
            if 0 <= offset < len(lines):
                return Place("body", offset + 1, lines[offset])
        lines = self.header.splitlines()
        if 1 <= line <= len(lines):
            return Place("header", line, lines[line - 1])
        return None

    def _start(self, part: str) -> int | None:
        match = _SIGNATURE.search(self.code)
        at = self.code.find(part, match.end() if match else 0)
        return None if at < 0 else self.code.count("\n", 0, at) + 1


def generate(
    kernel: Callable[..., Any],
    inputs: Sequence[mx.array],
    settings: dict[str, Any],
    *,
    header: str,
    body: str,
) -> Generated:
    """Have MLX generate the source, without running it and without a GPU.

    A kernel that is called while a function is being exported is only recorded
    (github.com/ml-explore/mlx/pull/3650), with its whole source.
    """
    found: list[str] = []

    def on_primitive(event: dict[str, Any]) -> None:
        if event.get("type") == "primitive" and event["name"] == "CustomKernel":
            found.append(event["arguments"][1])

    def call(*arrays: mx.array) -> Any:
        return kernel(inputs=list(arrays), **settings)

    mx.export_function(on_primitive, call, *inputs)
    if len(found) != 1:
        raise HostError(f"MLX {_VERSION} recorded {len(found)} kernels, not 1.")
    return parse(found[0], header=header, body=body)


def parse(text: str, *, header: str, body: str) -> Generated:
    """The parts of a generated source."""
    match = _SIGNATURE.search(text)
    if match is None:
        raise HostError(f"MLX {_VERSION} generates a signature that is unknown.")
    parameters = []
    for piece in match.group(2).split(",\n"):
        one = _PARAMETER.fullmatch(piece)
        if one is None:
            raise HostError(f"MLX {_VERSION} generates the parameter {piece!r}.")
        kind, name = one.group(1).rsplit(" ", 1)
        parameters.append(Parameter(kind.strip(), name, one.group(2)))
    instance = _INSTANCE.search(text)
    return Generated(
        text=text,
        function=match.group(1),
        parameters=tuple(parameters),
        instance=instance.group(1) if instance else match.group(1),
        code=text[: instance.start()] if instance else text,
        header=header,
        body=body,
    )
