"""Kernel launches and bytes of a decoder's layer on Metal, counted without a Mac.

MLX writes down the operations of a token (mx.export_function); metal_rules says how
many kernels its Metal back end launches for each, with the copies that it makes of
inputs that do not lie as a kernel wants them. What a layer takes is the difference
between two models of which one has a layer more. Beside ours stands mlx-lm on the same
sizes.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mm1_mlx.benchmarks.machine import machine
from mm1_mlx.benchmarks.metal_layout import Layout, fresh
from mm1_mlx.benchmarks.metal_rules import Operation, cost
from mm1_mlx.config import DecoderConfig, MoEConfig
from mm1_mlx.errors import MM1Error
from mm1_mlx.kernels.fused import replaced
from mm1_mlx.kernels.metal import forced
from mm1_mlx.models.decoder import Decoder

# A decoder as wide as MM1's 3B (with fewer key heads), and Mixtral's experts.
WIDTH, INNER, HEADS, KEYS, VOCABULARY, EXPERTS, CHOSEN = 3072, 8064, 24, 8, 1024, 8, 2
CONTEXT, PROMPT = 5, 64  # tokens in the cache; of a prompt behind them

_PLACEHOLDER = re.compile(r"mm1count_(.+?)_(\d+)_end")
_fast = mx.fast


@dataclass(frozen=True)
class Count:
    """What a piece of a graph takes on Metal.

    by_name: kernels of each operation. copies: those that only move an input.
    nbytes: read and written. merges: kernels beside `launches` that add up the parts in
    which MLX makes a long sum, where that fills the GPU better.
    """

    launches: int
    copies: int
    nbytes: int
    by_name: Counter[str]
    merges: int = 0

    def __sub__(self, other: "Count") -> "Count":
        names = Counter(self.by_name)
        names.subtract(other.by_name)
        return Count(
            self.launches - other.launches,
            self.copies - other.copies,
            self.nbytes - other.nbytes,
            +names,
            self.merges - other.merges,
        )


# --- Any graph -----------------------------------------------------------------------


def count_launches(function: Callable[..., Any], *arrays: mx.array) -> Count:
    """What a function of arrays takes on Metal; nothing of it is computed.

    Raises MM1Error for an operation without a rule.
    """
    events: list[dict[str, Any]] = []
    chains: list[tuple[Callable[..., Any], list[mx.array]] | None] = []
    with _as_on_metal(chains):
        mx.export_function(events.append, function, *arrays)
    layouts: dict[str, Layout] = {}
    total, copies, moved, merges, names = 0, 0, 0, 0, Counter[str]()
    for event in events:
        if event["type"] == "inputs":
            layouts |= {n: fresh(s, d.size) for n, s, d in event["inputs"]}
        elif event["type"] == "constants":
            layouts |= {
                name: fresh(array.shape, array.dtype.size)
                for name, array in event["constants"]
            }
        elif event["type"] == "primitive":
            operation = _operation(event, layouts, chains)
            found = cost(operation)
            for (name, *_), layout in zip(event["outputs"], found.outputs, strict=True):
                layouts[name] = layout
            total, copies = total + found.launches, copies + found.copies
            moved, merges = moved + found.nbytes, merges + found.merges
            if found.launches > found.copies:
                names[operation.name] += found.launches - found.copies
    if copies:
        names["copy"] = copies
    return Count(total, copies, moved, names, merges)


def _operation(
    event: dict[str, Any], layouts: dict[str, Layout], chains: list
) -> Operation:
    name, arguments = event["name"], event["arguments"]
    if name == "CustomKernel":
        found = _PLACEHOLDER.search(arguments[0])
        name = "metal_kernel"
        if found:
            name, arguments = found[1], [int(found[2])]
        if name == "fused":
            chain = chains[arguments[0]]
            arguments = [1 if chain is None else _kernels_of(*chain)]
    return Operation(
        name=name,
        inputs=[layouts[name] for name, *_ in event["inputs"]],
        shapes=[tuple(shape) for _, shape, _ in event["outputs"]],
        itemsizes=[dtype.size for *_, dtype in event["outputs"]],
        arguments=arguments,
    )


def _placeholder(
    kind: str, inputs: Sequence[mx.array], outputs: Sequence[mx.array], number: int = 0
) -> list[mx.array]:
    """Stands in a graph for an operation that the CPU back end would take apart."""
    kernel = mx.fast.metal_kernel(
        name=f"mm1count_{kind}_{number}_end",
        input_names=[f"a{i}" for i in range(len(inputs))],
        output_names=[f"b{i}" for i in range(len(outputs))],
        source="",
        ensure_row_contiguous=False,
    )
    call: Any = kernel
    return call(
        inputs=list(inputs),
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[x.shape for x in outputs],
        output_dtypes=[x.dtype for x in outputs],
    )


def _kernels_of(chain: Callable[..., Any], like: Sequence[mx.array]) -> int:
    """How many kernels mx.compile makes of a chain, of arrays like these."""
    inputs = [mx.zeros(x.shape, x.dtype) for x in like]
    mx.eval(inputs)
    made = mx.compile(chain)(*inputs)
    text = io.StringIO()
    mx.export_to_dot(text, *(made if isinstance(made, (tuple, list)) else [made]))
    names = re.findall(r'label ="([^"]+)", shape=rectangle', text.getvalue())
    return sum(name not in ("Broadcast", "BroadcastAxes") for name in names)


@contextmanager
def _as_on_metal(chains: list) -> Iterator[None]:
    """Operations stay whole that a GPU does in one kernel. chains: those that MLX
    compiles are added, with arrays like their inputs, or None for one kernel."""

    def fused(chain: Callable[..., Any], arrays: Sequence[mx.array]) -> Any:
        made = chain(*arrays)
        many = isinstance(made, (tuple, list))
        chains.append((chain, list(arrays)))
        wanted = made if many else [made]
        out = _placeholder("fused", arrays, wanted, len(chains) - 1)
        return tuple(out) if many else out[0]

    def norm(kind: str) -> Callable[..., mx.array]:
        def call(x: mx.array, *weights: Any) -> mx.array:
            arrays = [w for w in weights if isinstance(w, mx.array)]
            return _placeholder(kind, [x, *arrays], [x])[0]

        return call

    def rope(x: mx.array, dims: int, **settings: Any) -> mx.array:
        more = [settings.get(n) for n in ("offset", "freqs")]
        arrays = [a for a in more if isinstance(a, mx.array)]
        return _placeholder("rope", [x, *arrays], [x], dims)[0]

    def attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
        out = mx.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
        return _placeholder("attention", [q, k, v], [out])[0]

    put = {
        "rms_norm": norm("rms_norm"),
        "layer_norm": norm("layer_norm"),
        "rope": rope,
        "scaled_dot_product_attention": attention,
    }
    before = {name: getattr(_fast, name) for name in put}
    try:
        for name, function in put.items():
            setattr(_fast, name, function)
        with replaced(fused), _mlx_lm_fused(chains):
            yield
    finally:
        for name, function in before.items():
            setattr(_fast, name, function)


@contextmanager
def _mlx_lm_fused(chains: list) -> Iterator[None]:
    """mlx-lm's SwiGLU, which it compiles, as one kernel; nothing without mlx-lm."""
    import sys

    def swiglu(gate: mx.array, x: mx.array) -> mx.array:
        chains.append(None)
        return _placeholder("fused", [gate, x], [x], len(chains) - 1)[0]

    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("mlx_lm.models.") and hasattr(module, "swiglu")
    ]
    before = [module.swiglu for module in modules]
    try:
        for module in modules:
            module.swiglu = swiglu  # type: ignore[attr-defined]
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.swiglu = function  # type: ignore[attr-defined]


# --- Layers --------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A layer's count. kind: "dense" or "moe"; bits of the weights; rows of a batch;
    tokens of each, 1 to decode."""

    program: str
    kind: str
    bits: int
    rows: int
    tokens: int
    count: Count


Filled = Callable[[int, int], list]


def ours(kind: str, layers: int, bits: int) -> tuple[Any, Filled]:
    """A decoder of ours, and what makes a cache of rows with so many tokens."""
    sparse = MoEConfig(
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        sparse_step=1,
        first_sparse_layer=0,
    )
    decoder = Decoder(
        DecoderConfig(
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KEYS,
            vocab_size=VOCABULARY,
            moe_config=sparse if kind == "moe" else None,
        )
    )
    decoder.set_dtype(mx.bfloat16)
    if bits != 16:
        _quantize(decoder, bits)
    _empty(decoder)

    def cache(rows: int, context: int) -> list:
        entries: list[Any] = decoder.make_cache()
        for entry in entries:
            entry.state = stored = _stored(rows, context)
            entry.trim(stored[0].shape[2] - context)
        return entries

    return decoder, cache


def _empty(model: nn.Module) -> None:
    """Zeros for weights, of which no memory is taken, ready to answer."""

    def nothing(weight: mx.array) -> mx.array:
        return mx.broadcast_to(mx.array(0, weight.dtype), weight.shape)

    model.update(tree_map(nothing, model.parameters()))  # type: ignore[arg-type]
    mx.eval(model.parameters())
    model.eval()


def _quantize(decoder: Decoder, bits: int) -> None:
    how = {"group_size": 64, "bits": bits, "mode": "affine"}
    nn.quantize(
        decoder, 64, bits, class_predicate=lambda _, m: isinstance(m, nn.Linear)
    )
    for layer in decoder.layers:
        if "moe" in layer:
            experts = layer.moe.experts
            experts.quantize(dict.fromkeys(experts.stacks, how))


def _stored(rows: int, context: int) -> tuple[mx.array, mx.array]:
    """Keys and values with room for a prompt."""
    room = -(-(context + PROMPT) // 256) * 256
    shape = (rows, KEYS, room, WIDTH // HEADS)
    return mx.zeros(shape, mx.bfloat16), mx.zeros(shape, mx.bfloat16)


def theirs(kind: str, layers: int, bits: int) -> tuple[Any, Filled]:
    """mlx-lm's Llama or Mixtral of the same sizes; MM1Error where it is missing."""
    try:
        from mlx_lm.models import llama, mixtral
        from mlx_lm.models.cache import KVCache
    except ImportError as error:
        raise MM1Error("mlx-lm is not installed: pip install mlx-lm") from error
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "rms_norm_eps": 1e-5,
    }
    if kind == "moe":
        sizes |= {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
        model: Any = mixtral.Model(mixtral.ModelArgs(model_type="mixtral", **sizes))
    else:
        model = llama.Model(llama.ModelArgs(model_type="llama", **sizes))
    model.set_dtype(mx.bfloat16)
    if bits != 16:
        nn.quantize(
            model,
            64,
            bits,
            class_predicate=lambda _, m: (
                hasattr(m, "to_quantized") and not isinstance(m, nn.Embedding)
            ),
        )
    _empty(model)

    def cache(rows: int, context: int) -> list:
        entries = [KVCache() for _ in range(layers)]
        for entry in entries:
            entry.keys, entry.values = _stored(rows, context)
            entry.offset = context
        return entries

    return model, cache


# What is on by default where there is Metal, and all of them.
KERNELS = ("router", "add_norm")
ALL_KERNELS = (*KERNELS, "router_matvec", "routed_experts")
PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "mm1_mlx": (ours, KERNELS),
    "all kernels": (ours, ALL_KERNELS),
    "no kernels": (ours, ()),
    "mlx-lm": (theirs, ()),
}


def count_layer(
    program: str,
    kind: str,
    bits: int,
    rows: int = 1,
    tokens: int = 1,
    context: int = CONTEXT,
) -> Count:
    """What one layer takes for `tokens` new tokens behind others in each of `rows`."""
    found = []
    make, kernels = PROGRAMS[program]
    for layers in (2, 3):
        model, make_cache = make(kind, layers, bits)
        cache = make_cache(rows, context)
        # What is not computed yet would be counted.
        mx.eval([(entry.keys, entry.values) for entry in cache])
        ids = mx.zeros((rows, tokens), mx.int32)
        with forced(*kernels):
            found.append(count_launches(lambda ids: model(ids, cache=cache), ids))  # noqa: B023
    return found[1] - found[0]


def measure_launches(
    programs: Sequence[str] = tuple(PROGRAMS), context: int = CONTEXT
) -> list[Row]:
    """Every program, dense and with experts, 16 and 4 bits, alone and in a batch."""
    return [
        Row(program, kind, bits, rows, tokens, found)
        for kind in ("dense", "moe")
        for bits in (16, 4)
        for rows, tokens in ((1, 1), (8, 1), (1, PROMPT))
        for program in programs
        for found in [count_layer(program, kind, bits, rows, tokens, context)]
    ]


# --- For JSON and for people ---------------------------------------------------------


def as_object(rows: Sequence[Row], context: int = CONTEXT) -> dict[str, Any]:
    """All of it for JSON."""
    return {
        "machine": machine(),
        "sizes": {
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KEYS,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": CHOSEN,
            "cached_tokens": context,
        },
        "rows": [asdict(row) for row in rows],
    }


def as_table(rows: Sequence[Row]) -> str:
    """All of it as text, a line for each kind of step."""
    programs = list(dict.fromkeys(row.program for row in rows))
    lines = [
        "kernels that a layer launches on Metal, copies of inputs among them, and MB "
        "that it moves; bfloat16",
        "+n: more that add up sums which MLX makes in parts (of a prompt, of a long "
        "cache); M3 or M4, no Max",
        f"{'':6}{'bits':>5}{'rows':>5}{'tokens':>7}"
        + "".join(f"{name:>14}{'copies':>8}{'MB':>8}" for name in programs),
    ]
    found = {(r.kind, r.bits, r.rows, r.tokens, r.program): r.count for r in rows}
    for kind, bits, batch, tokens in dict.fromkeys(key[:4] for key in found):
        line = f"{kind:6}{bits:>5}{batch:>5}{tokens:>7}"
        for name in programs:
            count = found[kind, bits, batch, tokens, name]
            launches = f"{count.launches}+{count.merges}".removesuffix("+0")
            line += f"{launches:>14}{count.copies:>8}{count.nbytes / 1e6:>8.1f}"
        lines.append(line)
    return "\n".join(lines)
