"""Which weights of a model are trained, and how: by part, with pairs or whole."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mm1_mlx.adapters.layers import AdaptedLinear, AdaptedStack, PairSettings, Rows
from mm1_mlx.adapters.parts import PARTS, part_of_weight
from mm1_mlx.adapters.switch import AdapterMark
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError
from mm1_mlx.models.moe import Experts, QuantizedStack
from mm1_mlx.quantization.modules import module_at, replace_module

# Linear here, but a convolution of pixels, or too small for a low rank.
_NO_PAIRS = ("patch_embed", ".se.fc1", ".se.fc2", "shared_expert_gate")
_WHOLE_ONLY = ("embeddings", "router", "norms")


@dataclass(frozen=True, kw_only=True)
class Target:
    """How a part is trained: with pairs of these settings, or whole (pairs None)."""

    pairs: PairSettings | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained.

    parts: by name of PARTS; the others are frozen. layers: how many of the decoder's
    layers, None for all; first: counted from the start, else from the end. projections:
    names like "q_proj" that get pairs, None for all of a part.
    """

    parts: dict[str, Target] = field(default_factory=dict)
    layers: int | None = None
    first: bool = False
    projections: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(self.parts.keys() - set(PARTS)):
            raise ConfigError(
                f"There is no part {unknown[0]!r} to train. The parts are: "
                f"{', '.join(PARTS)}."
            )
        for name in _WHOLE_ONLY:
            if name in self.parts and self.parts[name].pairs is not None:
                raise ConfigError(
                    f"The part {name!r} takes no low-rank pairs: train it whole "
                    f"({name}=full), or not at all."
                )

    def has_layer(self, number: int, count: int) -> bool:
        """Whether a decoder layer is among those that are trained."""
        if self.layers is None:
            return True
        return number < self.layers if self.first else number >= count - self.layers


def adapt(model: nn.Module, plan: Plan, seed: int = 0) -> None:
    """Freeze a model and make what the plan names trainable, in place.

    Linear layers and experts of parts with pairs are replaced by adapted ones. seed: of
    the pairs. ConfigError where a part is not there, or is packed and should be trained
    whole.
    """
    _check_bare(model)
    _check_parts(model, plan)
    _check_projections(model, plan)
    model.unfreeze()  # an owner that froze an array would freeze the layer in its place
    key = mx.random.key(seed)
    for path, rows in list(projections(model)):
        settings = _pairs_of(model, plan, path)
        names = plan.projections
        chosen = [part for part in rows if names is None or part.name in names]
        if settings is None or not chosen:
            continue
        layer = add_adapter(model, path, rows, settings)
        for part in chosen:
            _check_rank(settings.rank, path, part, layer.input_dims)
            key, own = mx.random.split(key)
            layer.add_pair(part.name, own)
    model.freeze()
    # Weights that change are nobody else's: a cache of theirs must fit no other model.
    model["decoder"].adapter = AdapterMark("in training", f"training {uuid4()}")
    _thaw(model, plan)
    if not tree_flatten(model.trainable_parameters()):
        raise ConfigError("Nothing would be trained: the plan names no weight.")


def add_adapter(
    model: nn.Module, path: str, rows: list[Rows], settings: PairSettings
) -> Any:
    """Replace the linear layer or stack at a path by an adapted one without pairs."""
    layer = adapted(model, path, rows, settings)
    replace_module(model, path, layer)
    return layer


def adapted(
    model: nn.Module, path: str, rows: list[Rows], settings: PairSettings
) -> Any:
    """What could stand at a path: an adapted layer without pairs. Not put there."""
    base: Any = module_at(model, path)
    if isinstance(base, mx.array | QuantizedStack):
        return AdaptedStack(base, rows, settings)
    return AdaptedLinear(base, rows, settings)


def _weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What can have pairs: linear layers, and stacks of experts."""
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            for name in module.stacks:
                yield f"{path}.{name}", module[name]
        elif path.endswith(_NO_PAIRS):
            continue
        elif isinstance(module, nn.Linear | nn.QuantizedLinear):
            yield path, module


def projections(model: nn.Module) -> Iterator[tuple[str, list[Rows]]]:
    """Path of every weight that can have pairs, and the projections inside it."""
    modules: Any = dict(model.named_modules())
    for path, weight in _weights(model):
        owner, _, name = path.rpartition(".")
        array: mx.array = weight if isinstance(weight, mx.array) else weight["weight"]
        count = array.shape[-2]
        if name == "qkv_proj":
            attention = modules[owner]
            q = attention.num_heads * attention.head_dim
            kv = attention.num_kv_heads * attention.head_dim
            sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        elif name == "kv_proj":
            sizes = {"k_proj": count // 2, "v_proj": count // 2}
        elif name == "gate_up_proj":
            sizes = {"gate_proj": count // 2, "up_proj": count // 2}
        else:  # of a list of layers: a key of digits would become a list's index
            sizes = {"linear" if name.isdigit() else name: count}
        yield path, _rows(sizes)


def _rows(sizes: dict[str, int]) -> list[Rows]:
    rows, start = [], 0
    for name, size in sizes.items():
        rows.append(Rows(name, start, start + size))
        start += size
    return rows


def _in_plan(model: nn.Module, plan: Plan, name: str) -> Target | None:
    """How a weight is trained, or None."""
    target = plan.parts.get(part_of_weight(name))
    owner, kind, number, *_ = *name.split("."), "", ""
    if target is None or kind != "layers":
        return target
    if owner == "vision":  # a block after the features (LLaVA's last) cannot learn
        return target if int(number) < model["vision"].used_layers else None
    if owner != "decoder":
        return target
    count = len(model["decoder"]["layers"])
    return target if plan.has_layer(int(number), count) else None


def _pairs_of(model: nn.Module, plan: Plan, path: str) -> PairSettings | None:
    target = _in_plan(model, plan, path + ".weight")
    return None if target is None else target.pairs


def _thaw(model: nn.Module, plan: Plan) -> None:
    """Make pairs, and the weights of parts that are trained whole, trainable."""
    for path, module in model.named_modules():
        if path.rpartition(".pairs.")[1]:
            module.unfreeze(recurse=False)
            continue
        keys = []
        for key, value in module.items():
            if not isinstance(value, mx.array) or key.startswith("_"):
                continue
            target = _in_plan(model, plan, f"{path}.{key}" if path else key)
            if target is not None and target.pairs is None:
                keys.append(key)
        if keys:
            _refuse_packed(path, module)
            for key in keys:  # in 16 bits small updates would vanish
                module[key] = module[key].astype(mx.float32)
            module.unfreeze(recurse=False, keys=keys)


def _refuse_packed(path: str, module: nn.Module) -> None:
    if "scales" in module:
        raise ConfigError(
            f"{path} is quantized: it cannot be trained whole. Train it with low-rank "
            f"pairs, or start from a model of 16 bits."
        )


def _check_bare(model: nn.Module) -> None:
    held = getattr(model, "adapters", None)
    on = any(isinstance(m, AdaptedLinear | AdaptedStack) for m in model.modules())
    if on or (held is not None and held.names):
        raise ConfigError(
            "The model has an adapter already, on it or beside it. Train on a model "
            "that was loaded without one, or into which it was fused."
        )


def _check_parts(model: nn.Module, plan: Plan) -> None:
    flat: Any = tree_flatten(model.parameters())
    there = {part_of_weight(name) for name, _ in flat}
    if lacking := sorted(plan.parts.keys() - there):
        raise ConfigError(
            f"This model has no part {lacking[0]!r} to train. It has: "
            f"{', '.join(part for part in PARTS if part in there)}."
        )


def _check_projections(model: nn.Module, plan: Plan) -> None:
    there: set[str] = set()
    for path, rows in projections(model):
        if _pairs_of(model, plan, path) is not None:
            there |= {part.name for part in rows}
    if lacking := [name for name in plan.projections or () if name not in there]:
        raise ConfigError(
            f"There is no projection {lacking[0]!r} in what gets pairs "
            f"({', '.join(plan.parts)}). It has: {', '.join(sorted(there)) or 'none'}."
        )


def _check_rank(rank: int, path: str, part: Rows, columns: int) -> None:
    rows = part.stop - part.start
    if rank > min(rows, columns):
        raise ConfigError(
            f"The rank is {rank}, but {part.name} of {path} is {rows} x {columns} and "
            f"can have {min(rows, columns)} at most. Give a lower one (--rank), name "
            f"other projections, or train the part whole."
        )


@dataclass(frozen=True)
class Trained:
    """One line of the table: a part, how it is trained, and its numbers."""

    part: str
    how: str
    trained: int
    total: int


def summary(model: nn.Module, config: MM1Config) -> list[Trained]:
    """What is trained of every part, in numbers of parameters.

    total: of the model without adapters, as if it were not packed.
    """
    from mm1_mlx.memory import weight_shapes

    total: dict[str, int] = {}
    for name, shape in weight_shapes(config).items():
        size = 1
        for n in shape:
            size *= n
        part = part_of_weight(name)
        total[part] = total.get(part, 0) + size
    trained: dict[str, int] = {}
    how: dict[str, str] = {}
    modules = dict(model.named_modules())
    flat: Any = tree_flatten(model.trainable_parameters())
    for name, array in flat:
        path, pairs, _ = name.partition(".pairs.")
        part = part_of_weight(path + ".weight" if pairs else name)
        trained[part] = trained.get(part, 0) + array.size
        how[part] = _how(modules[path].settings) if pairs else "full"
    return [
        Trained(part, how.get(part, "frozen"), trained.get(part, 0), total[part])
        for part in PARTS
        if part in total
    ]


def _how(settings: PairSettings) -> str:
    kind = "DoRA" if settings.dora else "LoRA"
    return f"{kind}, rank {settings.rank}, scale {settings.scale:g}"


def table(lines: list[Trained]) -> str:
    """A summary for people."""
    out = [f"{'part':<12}{'trained':>14}{'of':>16}  how"]
    for line in lines:
        out.append(f"{line.part:<12}{line.trained:>14,}{line.total:>16,}  {line.how}")
    trained, total = (sum(getattr(x, k) for x in lines) for k in ("trained", "total"))
    out.append(f"{'all':<12}{trained:>14,}{total:>16,}  {trained / total:.3%}")
    return "\n".join(out)
