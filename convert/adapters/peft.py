"""Adapters of PEFT, read: adapter_model.safetensors or .bin, and adapter_config.json.

LoRA with its variants DoRA and rsLoRA, on linear layers, on experts that are a module
each (transformers 4), and on parameters that hold all experts (transformers 5,
peft.tuners.lora.layer.ParamWrapper): there lora_A is (r * E, in), expert by expert, and
lora_B is (out, r * E), rank by rank.
"""

import re
from pathlib import Path
from typing import NoReturn

import numpy as np

from mm1_mlx.checkpoint.folder import inside, read_json
from mm1_mlx.errors import CheckpointError

from .. import numbers
from ..readers import LazyArray, read_safetensors, read_torch
from .arrays import Adapter, Base, Pair, split_rows, stack
from .names import Names, Site, folded_note, lost, whole_weights
from .peft_config import CONFIG_FILE, PeftConfig

FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What LLaVA's own training leaves beside them: the connector, trained whole.
BESIDE = "non_lora_trainables.bin"
_PREFIX = re.compile(r"base_model\.model\.|base_model\.")
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>A|B|magnitude_vector|embedding_A|embedding_B)"
    r"(\.default)?(\.weight)?"
)
_INNER = ".base_layer"  # of a module that is adapted
_EMBEDDINGS = "decoder.embed_tokens.weight"
_Kinds = dict[str, np.ndarray]


def read(folder: Path, names: Names, base: Base) -> Adapter:
    """The adapter of a PEFT folder for the model of `names`.

    base: gives the model's own weights, for what has no place here but in these.
    CheckpointError for what cannot be represented, or is of another model.
    """
    config = PeftConfig(read_json(folder / CONFIG_FILE), str(folder))
    return _Reading(folder, names, base, config).adapter


def _arrays(folder: Path) -> dict[str, LazyArray]:
    there = [name for name in FILES if (folder / name).is_file()]
    if not there:
        raise CheckpointError(
            f"{folder} has no {FILES[0]} or {FILES[1]}: no arrays of an adapter."
        )
    beside = [BESIDE] if (folder / BESIDE).is_file() else []
    found: dict[str, LazyArray] = {}
    for name in (there[0], *beside):
        path = inside(folder, name)
        read_file = read_safetensors if path.suffix == ".safetensors" else read_torch
        for key, array in read_file(path).items():
            found[_PREFIX.sub("", key, count=1)] = array
    return found


class _Reading:
    """One folder's arrays, each used once."""

    def __init__(self, folder: Path, names: Names, base: Base, config: PeftConfig):
        self.folder, self.names, self.base, self.config = folder, names, base, config
        self.adapter = Adapter(dropout=config.dropout)
        modules: dict[str, _Kinds] = {}
        plain: dict[str, np.ndarray] = {}
        for name, array in _arrays(folder).items():
            if array.dtype not in numbers.FLOATS:
                self.refuse(f"has {name} in the type {array.dtype}, which is no float")
            values = numbers.to_float32(array.read(), array.dtype)
            if match := _LORA.fullmatch(name):
                kind = match["kind"].replace("magnitude_vector", "m")
                modules.setdefault(match["module"], {})[kind] = values
            elif ".lora_" in name:
                self.refuse(f"has the array {name}, which is no part of LoRA")
            else:
                plain[name] = values
        self._read_whole(plain)
        self._read_pairs(modules)
        if not self.adapter.pairs and not self.adapter.whole:
            self.refuse("holds nothing")

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"The adapter {self.folder} {what}.")

    # --- whole weights ---------------------------------------------------------------

    def _read_whole(self, plain: dict[str, np.ndarray]) -> None:
        """modules_to_save, and the tables that PEFT saves because of their size."""
        copies = {name for name in plain if name.endswith(f"{_INNER}.weight")}
        for name in sorted(copies):
            self._check_copy(name.replace(_INNER, ""), plain.pop(name))
        head = self._take_tied_head(plain)
        whole = self.adapter.whole = whole_weights(self.names, plain, str(self.folder))
        if head is not None:
            if not np.array_equal(head, whole.get(_EMBEDDINGS, head[:0])):
                self.refuse(
                    "trains the head apart from the embeddings, but in this model "
                    "both are one table (tie_word_embeddings)"
                )
        elif _EMBEDDINGS in whole:
            self._refuse_untied()

    def _check_copy(self, name: str, array: np.ndarray) -> None:
        """A table that PEFT saves beside its pair must be the model's own."""
        found = whole_weights(self.names, {name: array}, str(self.folder))
        for weight, copy in found.items():
            far = np.abs(self.base(weight) - copy).max()
            if far > 0.02 * np.abs(copy).max(initial=0):  # other than by rounding
                self.refuse(
                    f"was trained on another {name} than this model's: they differ by "
                    f"up to {far:.3g}"
                )

    def _take_tied_head(self, plain: dict[str, np.ndarray]) -> np.ndarray | None:
        if not self.names.config.text_config.tie_word_embeddings:
            return None
        heads = [name for name in plain if name.endswith("lm_head.weight")]
        return plain.pop(heads[0]) if heads else None

    def _refuse_untied(self) -> None:
        """PEFT's copy of the embeddings leaves a tied head as it was, unless told."""
        tied = self.names.config.text_config.tie_word_embeddings
        if tied and not self.config.tied:
            self.refuse(
                "trains the embeddings and not the head, but in this model both are "
                "one table (tie_word_embeddings). Train it with ensure_weight_tying"
            )

    # --- pairs -----------------------------------------------------------------------

    def _read_pairs(self, modules: dict[str, _Kinds]) -> None:
        sites: dict[str, list[Site]] = {}
        for site in self.names.sites:
            if site.parameter or not site.experts:  # else mlx-lm's
                sites.setdefault(site.module, []).append(site)
        experts: dict[str, dict[int, Pair]] = {}
        unknown, folded = [], 0
        for module, kinds in modules.items():
            outer = module
            while outer.endswith(_INNER):
                outer = outer.removesuffix(_INNER)
            if outer in sites:
                site = self._fitting(module, sites[outer], kinds)
                pair = self._pair(site, kinds)
                parts = split_rows(pair, [part.rows for part in site.parts])
                for part, one in zip(site.parts, parts, strict=True):
                    if site.expert is None:
                        self._add(part.name, one)
                    elif site.expert in experts.setdefault(part.name, {}):
                        self.refuse(f"has two pairs of {part.name}")
                    else:
                        experts[part.name][site.expert] = one
            elif outer in self.names.plain:
                self._fold(outer, self.names.plain[outer], kinds)
                folded += 1
            else:
                unknown.append(outer)
        if unknown:
            self.refuse(lost(self.names, unknown, list(sites)))
        for name, found in experts.items():
            self._add(name, self._stacked(name, found))
        if folded:
            self.adapter.notes.append(folded_note(folded))

    def _add(self, name: str, pair: Pair) -> None:
        if name in self.adapter.pairs:
            self.refuse(f"has two pairs of {name}")
        self.adapter.pairs[name] = pair

    def _fitting(self, module: str, sites: list[Site], kinds: _Kinds) -> Site:
        """Which parameter of a module a pair is of: the one whose shape it has."""
        a, b = kinds.get("A"), kinds.get("B")
        if a is None or b is None:
            self.refuse(f"has a pair of {module} without its lora_A or lora_B")
        for site in sites:
            rank = self.config.rank(site.key) * max(site.experts, 1)
            tail = (1, 1) if a.shape[2:] == (1, 1) and not site.experts else ()
            wanted = (rank, site.columns, *tail), (site.rows, rank, *tail)
            if (a.shape, b.shape) == wanted:
                return site
        site = sites[0]
        rank = self.config.rank(site.key)
        size = f"{site.rows} x {site.columns}"
        many = f" of {site.experts} experts" if site.experts else ""
        self.refuse(
            f"has pairs of {a.shape} and {b.shape} for {module}, where this model has "
            f"{size}{many} and {CONFIG_FILE} says the rank {rank}: it is of another "
            f"model, or its files are not of one adapter"
        )

    def _pair(self, site: Site, kinds: _Kinds) -> Pair:
        a, b, m = kinds["A"], kinds["B"], kinds.get("m")
        if a.ndim == 4:  # of a convolution of 1 x 1
            a, b = a[..., 0, 0], b[..., 0, 0]
        self._check_lengths(site.key, m, site.rows)
        if site.experts:
            a = a.reshape(site.experts, -1, site.columns)
            b = b.reshape(site.rows, -1, site.experts).transpose(2, 0, 1)
        m = None if m is None else m.reshape(-1)
        return Pair(a, b, m, self.config.scale(site.key))

    def _check_lengths(self, key: str, m: np.ndarray | None, rows: int) -> None:
        if (m is not None) != self.config.dora or (m is not None and m.size != rows):
            self.refuse(
                f"has DoRA's row lengths of {key} against what {CONFIG_FILE} says, or "
                f"not {rows} of them"
            )

    def _stacked(self, name: str, found: dict[int, Pair]) -> Pair:
        """One pair of all experts; those without one get zeros."""
        count, rows, columns = self.names.part_of(name)
        if len(found) < count and self.config.dora:
            self.refuse(f"has DoRA's pairs of {len(found)} of {count} experts ({name})")
        some = next(iter(found.values()))
        none = Pair(
            np.zeros((some.rank, columns), np.float32),
            np.zeros((rows, some.rank), np.float32),
            None,
            some.scale,
        )
        return stack([found.get(e, none) for e in range(count)])

    def _fold(self, module: str, weight: str, kinds: _Kinds) -> None:
        """A pair of what takes none here, added to the weight itself."""
        if weight in self.adapter.whole:
            self.refuse(f"has {module} both whole and with a pair")
        if "embedding_A" in kinds and "embedding_B" in kinds and "m" not in kinds:
            a, b, m = kinds["embedding_B"].T, kinds["embedding_A"].T, None
            self._refuse_untied()
        elif "A" in kinds and "B" in kinds:
            a, b, m = kinds["A"], kinds["B"], kinds.get("m")
            self._check_lengths(module, m, len(b))
        else:
            self.refuse(f"has {', '.join(kinds)} of {module}, which is no whole pair")
        key = self.config.key_of(module)
        rank, (rows, columns) = self.config.rank(key), self.names.shapes[weight]
        if a.shape != (rank, columns) or b.shape != (rows, rank):
            self.refuse(
                f"has pairs of {a.shape} and {b.shape} for {module}, where this model "
                f"has {rows} x {columns}: it is of another model"
            )
        m = None if m is None else m.reshape(-1)
        pair = Pair(a, b, m, self.config.scale(key))
        self.adapter.whole[weight] = pair.merged(self.base(weight))
