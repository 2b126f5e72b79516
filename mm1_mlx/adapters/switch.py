"""Adapters on a model and off it again: nothing is copied, and nothing is compiled.

An adapter is layers that stand in place of the model's, around the same frozen weights,
and weights that were trained whole, which change places with the model's.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mm1_mlx.adapters.about import read_as_trained
from mm1_mlx.adapters.layers import AdaptedLinear, AdaptedStack
from mm1_mlx.errors import MM1Error
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.quantization.modules import module_at, replace_module

Layer = AdaptedLinear | AdaptedStack


class AdapterMark:
    """What a cache remembers of the adapter that filled it.

    Equal marks are of the same weights, whatever the names. digest: of the weights, or
    what gives it: it is computed when two marks are compared or one is saved.
    """

    def __init__(self, name: str, digest: str | Callable[[], str]):
        self.name = name
        self._digest = digest

    @cached_property
    def digest(self) -> str:
        """A SHA-256, in hexadecimal."""
        return self._digest if isinstance(self._digest, str) else self._digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterMark) and self.digest == other.digest

    __hash__ = None  # type: ignore[assignment]


class Adapter:
    """An adapter that fits a model. Made off it; put_on and take_off move it.

    layers: by the path where they belong. weights: trained whole, by name; while the
    adapter is on, the model's own are here. reading: the resolution and max_tiles that
    it was trained with; see reading_of.
    """

    def __init__(
        self,
        layers: dict[str, Layer],
        weights: dict[str, mx.array],
        name: str,
        reading: dict[str, Any] | None = None,
    ):
        self.layers, self.weights = layers, weights
        self.reading = reading or {}
        fixed = dict(self.arrays())
        how = {path: layer.settings for path, layer in layers.items()}
        self.mark = AdapterMark(name, lambda: _digest(fixed, how))

    def arrays(self) -> Iterator[tuple[str, mx.array]]:
        """All that it holds beside the model, by name."""
        for path, layer in self.layers.items():
            flat: Any = tree_flatten(layer.pairs)
            yield from ((f"{path}.{name}", array) for name, array in flat)
        yield from self.weights.items()

    def put_on(self, model: MM1) -> None:
        """Onto a model without an adapter, in place."""
        for layer in self.layers.values():
            layer.train(model.training)  # in eval, stacks the pairs; may lack memory
        self._change_places(model)
        for path, layer in self.layers.items():
            replace_module(model, path, layer)
        model.decoder.adapter = self.mark

    def take_off(self, model: MM1) -> None:
        """Off the model that it is on, in place."""
        for path, layer in self.layers.items():
            replace_module(model, path, layer.frozen)
            layer.unstack()
        self._change_places(model)
        model.decoder.adapter = None

    def _change_places(self, model: MM1) -> None:
        for name, array in self.weights.items():
            owner, _, key = name.rpartition(".")
            place: Any = module_at(model, owner)
            at: Any = int(key) if isinstance(place, list) else key
            self.weights[name], place[at] = place[at], array


def _digest(arrays: dict[str, mx.array], settings: dict) -> str:
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.array(array.flatten().view(mx.uint8)).data)
    return digest.hexdigest()


class Adapters:
    """Which adapters a model has beside each other, by name, and which is in use."""

    def __init__(self) -> None:
        self._all: dict[str, Adapter] = {}
        self._in_use: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in the order in which they came."""
        return tuple(self._all)

    @property
    def in_use(self) -> str | None:
        """The name of the one that answers; None: the base model does."""
        return self._in_use

    def __repr__(self) -> str:
        return f"Adapters({', '.join(self.names)}; in use: {self.in_use})"

    def check_new(self, names: Iterable[str]) -> None:
        """MM1Error where a name cannot be given to an adapter."""
        for name in names:
            if not isinstance(name, str) or not name:
                raise MM1Error(f"An adapter's name is {name!r}, but must be a text.")
            if name in self._all:
                raise MM1Error(
                    f"There is an adapter {name!r} already. Give another name, or "
                    f"drop_adapter(model, {name!r}) first."
                )

    def add(self, adapters: dict[str, Adapter]) -> None:
        """More of them, off the model."""
        self._all |= adapters

    def use(self, model: MM1, name: str | None) -> None:
        """Put one on the model, in place of the one that is there; None: the base."""
        self._check_known(name)
        if name == self._in_use:
            return
        if self._in_use is not None:
            self._all[self._in_use].take_off(model)
            self._in_use = None
        if name is not None:
            self._all[name].put_on(model)
            self._in_use = name

    @property
    def reading(self) -> dict[str, Any]:
        """How the one in use was trained to read pictures; see reading_of."""
        return {} if self._in_use is None else self._all[self._in_use].reading

    def drop(self, model: MM1, name: str) -> None:
        """Forget one, and take it off the model if it is there."""
        self._check_known(name)
        if name == self._in_use:
            self.use(model, None)
        del self._all[name]

    def _check_known(self, name: str | None) -> None:
        if name is None or name in self._all:
            return
        there = ", ".join(map(repr, self._all)) or "none; load_adapters loads some"
        raise MM1Error(f"There is no adapter {name!r} on this model. It has: {there}.")

    @contextmanager
    def set_aside(self, model: MM1) -> Iterator[None]:
        """The base model, until the block ends, however it ends."""
        before = self._in_use
        self.use(model, None)
        try:
            yield
        finally:
            self.use(model, before)


def adapters_of(model: MM1) -> Adapters:
    """The adapters beside each other on a model; none at first.

    MM1Error where the model has one of its own, or several processes share it.
    """
    if model.adapters is not None:
        return model.adapters
    if model.decoder.group is not None:
        raise MM1Error(
            "This model is shared by several processes, which hold parts of its layers:"
            " adapters cannot be switched on it. Give one to load(adapter_path=...)."
        )
    if model.decoder.adapter is not None:
        raise MM1Error(
            f"The model has the adapter {model.decoder.adapter.name!r} for good (of "
            f"load(adapter_path=...), or in training). Load it without an adapter, and "
            f"give all of them to load_adapters."
        )
    model.adapters = Adapters()
    return model.adapters


def use_adapter(model: MM1, name: str | None, processor: Any = None) -> None:
    """Answer with one of a model's adapters from now on; None: with none of them.

        load_adapters(model, {"cats": "cats-adapter", "style": "style-adapter"})
        use_adapter(model, "cats")
        print(generate(model, processor, "What is this?", images=["cat.png"]))
        use_adapter(model, None)

    processor: reads pictures from now on in the resolution that the adapter was trained
    with, and as the model does where it says none.

    Nothing is read, copied or compiled. A cache or an answer that was begun with
    another adapter is refused; image tokens that you keep yourself (encode_images) are
    of the adapter that was in use, if it has the encoder or the connector. Raises
    MM1Error for a name that load_adapters was not given.
    """
    held = adapters_of(model)
    held.use(model, name)
    if processor is not None:
        read_as_trained(processor, held.reading)


def drop_adapter(model: MM1, name: str) -> None:
    """Forget an adapter of load_adapters and give its memory back.

    Where it is in use, the base model answers from now on. Raises MM1Error for a name
    that is not there.
    """
    adapters_of(model).drop(model, name)
