"""Adapters of PEFT, written: what PeftModel.from_pretrained loads."""

from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.errors import CheckpointError

from .arrays import Adapter, Base, Pair, even, join_rows, most_common, of_expert
from .names import Names, Order, Site
from .peft_config import patterns, targets

_PREFIX = "base_model.model."
_NONE = "dummy-target-modules"  # PEFT's own word for no target_modules
# On transformers 5, PEFT takes dense layers of Qwen3-MoE that are called so for its
# experts, and drops their pairs (peft 0.21, utils/transformers_weight_conversion.py).
_TAKEN = (".gate_proj", ".up_proj", ".down_proj")


def made(
    adapter: Adapter, names: Names, base: Base, model: str | None, transformers: int
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays and the adapter_config.json of an adapter, as PEFT's.

    base: gives the model's own weights, to complete modules of which only a part was
    trained whole. model: base_model_name_or_path. transformers: 5 or 4, by whose names.
    CheckpointError for what PEFT has no form for.
    """
    return _Writing(adapter, names, base, transformers).made(model)


class _Writing:
    def __init__(
        self, adapter: Adapter, names: Names, base: Base, transformers: int
    ) -> None:
        self.adapter, self.names, self.base = adapter, names, base
        self.transformers = transformers
        self.order: Order = names.order(transformers)
        self.arrays: dict[str, mx.array] = {}
        self.pairs: dict[str, Pair] = {}  # by Site.key
        self.modules: list[str] = []
        self.parameters: list[str] = []

    def made(self, model: str | None) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """As the function of this name gives them."""
        dora = {pair.m is not None for pair in self.adapter.pairs.values()}
        if len(dora) > 1:
            raise CheckpointError(
                "Some pairs of this adapter have DoRA's row lengths and some have "
                "none; PEFT has one kind for all."
            )
        sites = self._chosen()
        for site, pair in self._joined(sites):
            self._add(site, pair, sites)
        saved = self._save_whole()
        rank, scale = self._usual()
        ranks = {key: pair.rank for key, pair in self.pairs.items()}
        alphas = {key: p.rank * p.scale for key, p in self.pairs.items()}
        decoder_alone = self.names.config.vision_config is None
        return self.arrays, {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if decoder_alone else None,
            "base_model_name_or_path": model,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": _tidy(rank * scale),
            "lora_dropout": self._dropout(),
            "use_dora": dora == {True},
            "use_rslora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "target_modules": self._targets(),
            "target_parameters": self._names_of(self.parameters) or None,
            "modules_to_save": saved or None,
            "rank_pattern": patterns(ranks, rank),
            "alpha_pattern": {
                key: _tidy(value)
                for key, value in patterns(alphas, rank * scale).items()
            },
        }

    # --- pairs -----------------------------------------------------------------------

    def _chosen(self) -> dict[str, list[Site]]:
        """Projection of ours -> its module in PEFT, or its experts' modules."""
        known: dict[str, list[Site]] = {}
        for site in self.names.sites:
            if site.parameter or not site.experts:
                for part in site.parts:
                    known.setdefault(part.name, []).append(site)
        chosen = {}
        for name in self.adapter.pairs:
            sites = sorted(known.get(name, []), key=lambda s: self.order(_whole(s)))
            if not sites:
                raise CheckpointError(
                    f"The adapter has a pair of {name}, but a model of the kind "
                    f"{self.names.source.name} has no module that is that."
                )
            best = sites[0]
            chosen[name] = [best]
            if best.expert is not None:
                rank = self.order(_whole(best))
                chosen[name] = [s for s in sites if self.order(_whole(s)) == rank]
            self._check_experts(name, best)
        return chosen

    def _check_experts(self, name: str, site: Site) -> None:
        if site.parameter and self.adapter.pairs[name].m is not None:
            raise CheckpointError(
                f"The adapter has DoRA on experts ({name}), which PEFT has not where "
                f"they are one array. Write it with the names of transformers 4 "
                f"(--transformers 4), or train LoRA."
            )
        qwen3 = self.names.source.name == "qwen_moe" and (
            self.names.config.text_config.qk_norm == "head"
        )
        dense = site.expert is None and site.parameter is None
        if self.transformers >= 5 and qwen3 and dense and site.module.endswith(_TAKEN):
            raise CheckpointError(
                f"The adapter has a pair of {name} ({site.module}), which PEFT on "
                f"transformers 5 takes for one of the experts and drops. Write it "
                f"with the names of transformers 4 (--transformers 4), or train "
                f"without the part 'mlp'."
            )

    def _joined(self, chosen: dict[str, list[Site]]) -> list[tuple[Site, Pair]]:
        """Each module of PEFT with its pair."""
        found: dict[Site, None] = {
            site: None for sites in chosen.values() for site in sites
        }
        made = []
        for site in found:
            there = [self.adapter.pairs.get(part.name) for part in site.parts]
            some = next(pair for pair in there if pair is not None)
            pairs = [
                _zeros(some, part.rows) if pair is None else pair
                for part, pair in zip(site.parts, there, strict=True)
            ]
            if site.expert is not None:
                pairs = [of_expert(pair, site.expert) for pair in pairs]
            made.append((site, pairs[0] if len(pairs) == 1 else join_rows(pairs)))
        return self._even_experts(made)

    def _even_experts(self, found: list[tuple[Site, Pair]]) -> list[tuple[Site, Pair]]:
        """Where each expert is a module: one rank and scale for all of them.

        PEFT on transformers 5 makes one array of such modules, and knows one rank then.
        """
        each = [(s, p) for s, p in found if s.expert is not None]
        if not each:
            return found
        alike = even([pair for _, pair in each])
        changed = dict(zip((site for site, _ in each), alike, strict=True))
        return [(site, changed.get(site, pair)) for site, pair in found]

    def _add(self, site: Site, pair: Pair, chosen: dict[str, list[Site]]) -> None:
        module, a, b = site.module, pair.a, pair.b
        if site.parameter:
            self.parameters.append(site.key)
            module += self._nesting(site, chosen)
            a = a.reshape(-1, site.columns)  # (r * E, in), expert by expert
            b = b.transpose(1, 2, 0).reshape(site.rows, -1)  # rank by rank
        else:
            self.modules.append(module)
        if site.is_conv:
            a, b = a[..., None, None], b[..., None, None]
        self.pairs[site.key] = pair
        self._write(f"{module}.lora_A.weight", a)
        self._write(f"{module}.lora_B.weight", b)
        if pair.m is not None:
            m = pair.m[None, :, None, None] if site.is_conv else pair.m
            self._write(f"{module}.lora_magnitude_vector", m)

    def _nesting(self, site: Site, chosen: dict[str, list[Site]]) -> str:
        """PEFT puts one wrapper around the other, in the order of the parameters:
        gate_up_proj, down_proj. The last one is outside."""
        others = {
            other.key
            for sites in chosen.values()
            for other in sites
            if other.parameter and other.module == site.module
        }
        outer = any(key.endswith(".down_proj") for key in others - {site.key})
        return ".base_layer" if outer else ""

    def _write(self, name: str, array: np.ndarray) -> None:
        self.arrays[_PREFIX + name] = mx.array(np.ascontiguousarray(array))

    def _dropout(self) -> float:
        """Of the next training. PEFT refuses one where experts are one array, and on
        transformers 5 makes one of experts that are modules."""
        dropout = self.adapter.dropout
        if not dropout or not any(p.a.ndim > 2 for p in self.adapter.pairs.values()):
            return dropout
        self.adapter.notes.append(
            f"PEFT takes no dropout with experts: lora_dropout is 0, it was {dropout:g}"
        )
        return 0.0

    def _usual(self) -> tuple[int, float]:
        """The rank and the scale that need no pattern: of experts that are modules."""
        each = {s.key for s in self.names.sites if s.expert is not None}
        pairs = [pair for key, pair in self.pairs.items() if key in each]
        found = pairs or list(self.pairs.values())
        if not found:
            return 8, 1.0
        usual: Any = most_common((pair.rank, pair.scale) for pair in found)
        return usual

    # --- whole weights ---------------------------------------------------------------

    def _save_whole(self) -> list[str]:
        """Write what modules_to_save needs; gives its entries."""
        whole = dict(self.adapter.whole)
        if not whole:
            return []
        split = self.names.split
        found: dict[str, np.ndarray] = {}
        for weight, array in whole.items():
            found |= split(weight, array, self.order)
        table = "decoder.embed_tokens.weight"
        if table in whole and self.names.config.text_config.tie_word_embeddings:
            # PEFT trains a copy of the table, and the head would stay as it was.
            found["lm_head.weight"] = whole[table]
        modules = self._outermost({name.rpartition(".")[0] for name in found})
        for weight in self.names.pieces.keys() - whole.keys():
            name = min((p.name for p in self.names.pieces[weight]), key=self.order)
            if any(name.startswith(f"{module}.") for module in modules):
                found |= split(weight, self.base(weight), self.order)
        for name, array in found.items():
            self._write(name, array)
        return sorted(modules)

    def _outermost(self, modules: set[str]) -> set[str]:
        for module in sorted(modules):
            if module in ("", "model"):
                raise CheckpointError(
                    "The adapter has trained an array of the model itself whole "
                    "(image_newline), which PEFT's modules_to_save cannot name. Leave "
                    "that part out, or fuse the adapter (python -m mm1_mlx.fuse)."
                )
        return {
            module
            for module in modules
            if not any(module.startswith(f"{other}.") for other in modules)
        }

    # --- names -----------------------------------------------------------------------

    def _targets(self) -> list[str] | str:
        if not self.modules and not self.parameters:
            return _NONE
        return self._names_of(self.modules)

    def _names_of(self, keys: list[str]) -> list[str]:
        every: dict[str, set[str]] = {}
        for pieces in self.names.pieces.values():
            best = min(self.order(piece.name) for piece in pieces)
            for name in (p.name for p in pieces if self.order(p.name) == best):
                for key in (name, name.rpartition(".")[0]):
                    every.setdefault(key.rpartition(".")[2], set()).add(key)
        return targets(keys, lambda end: every.get(end, set()))


def _whole(site: Site) -> str:
    """A name of an array, as names are sorted by."""
    return site.key if site.parameter else f"{site.module}.weight"


def _zeros(like: Pair, rows: int) -> Pair:
    """A pair that adds nothing, beside another in one module."""
    if like.m is not None:
        raise CheckpointError(
            "The adapter has DoRA on some projections of a fused weight and not on "
            "all, which PEFT cannot represent."
        )
    b = np.zeros((*like.b.shape[:-2], rows, like.rank), np.float32)
    return Pair(like.a, b, None, like.scale)


def _tidy(value: float) -> float | int:
    """8.0 as 8, as PEFT writes it."""
    return int(value) if value == int(value) else value
