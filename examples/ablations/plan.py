"""What is trained: every run of the ablations, its recipe, and what it starts from.

A cell is a choice of everything that the ablations vary; a run is a cell with a seed.
Cells that several tables share are trained once. Before them come the parts that they
start from: encoders, and decoders that have read text, as MM1's had.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

SEEDS = (0, 1, 2)
PATCH = 8
EXPERTS = 8
VISION_RATE = 0.2  # of a trained encoder: it forgets at the full rate
# caption : interleaved : text, as MM1 section 3.3 writes it
Mix = tuple[int, int, int]
TRAINED = ("all", "encoder frozen", "connector only")


@dataclass(frozen=True)
class Cell:
    """One choice on every axis; the defaults are the base that all tables share."""

    connector: str = "c_abstractor"
    tokens: int = 16  # of a picture
    pixels: int = 48  # a picture's side
    mix: Mix = (45, 45, 10)  # MM1's final mix
    encoder: str = "regions"  # what it learned before: an objective, or "none"
    decoder: str = "dense"  # "dense", "experts" or "wide"
    trained: str = "all"  # one of TRAINED

    @property
    def name(self) -> str:
        """Its folder: the shape, and whatever else is not the base's."""
        parts = [self.connector, str(self.tokens), str(self.pixels)]
        if self.mix != BASE.mix:
            parts.append("mix_" + "_".join(map(str, self.mix)))
        parts += [
            getattr(self, key).replace(" ", "_")
            for key in ("encoder", "decoder", "trained")
            if getattr(self, key) != getattr(BASE, key)
        ]
        return "-".join(parts)


BASE = Cell()

_TYPES = ("average_pool", "attention_pool", "c_abstractor")
# MM1: 64 and 144 tokens, 224 and 336 pixels; here the same ratios.
TOKENS, PIXELS = (16, 36), (48, 72)
MOST_TOKENS = max(TOKENS)
_MIXES: tuple[Mix, ...] = (
    (100, 0, 0), (0, 100, 0), (50, 50, 0), (50, 10, 40), (66, 33, 0), (33, 66, 0),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells that are compared, and the keys in which they differ."""

    name: str
    title: str
    keys: tuple[str, ...]
    cells: tuple[Cell, ...]


TABLES = (
    Table(
        "connectors",
        "Connector, tokens per picture, resolution",
        ("connector", "tokens", "pixels"),
        (
            *(
                Cell(connector=kind, tokens=tokens, pixels=pixels)
                for pixels in PIXELS
                for tokens in TOKENS
                for kind in _TYPES
            ),
            Cell(connector="mlp", tokens=36, pixels=48),  # all 36 patches
            Cell(tokens=4, pixels=48),
            Cell(tokens=36, pixels=96),
        ),
    ),
    Table(
        "mix",
        "Caption : interleaved : text",
        ("mix",),
        (BASE, *(Cell(mix=mix) for mix in _MIXES)),
    ),
    Table(
        "encoders",
        "What the encoder learned before",
        ("encoder",),
        (BASE, *(Cell(encoder=o) for o in ("none", "global", "reconstruction"))),
    ),
    Table(
        "experts",
        "Dense and sparse decoders",
        ("decoder",),
        (BASE, Cell(decoder="experts"), Cell(decoder="wide")),
    ),
    Table(
        "parts",
        "Which parts are trained",
        ("trained",),
        tuple(Cell(trained=trained) for trained in TRAINED),
    ),
)
BY_NAME = {table.name: table for table in TABLES}
# How all are run: four tables are whole before the one that costs more.
BY_VALUE = tuple(
    BY_NAME[name] for name in ("mix", "encoders", "experts", "parts", "connectors")
)


@dataclass(frozen=True)
class Size:
    """How large models, runs and tests are; QUICK is for a look at the machinery."""

    width: int = 96
    layers: int = 3
    batch: int = 8  # rows of a joint step; an encoder step has eight times the pictures
    steps: dict[str, int] = field(
        default_factory=lambda: {"encoder": 600, "decoder": 500, "joint": 450}
    )
    rate: float = 0.002
    each: int = 100  # test questions of each task; see measure.py


FULL = Size()
QUICK = Size(
    width=16, layers=1, batch=2, each=1, steps={"encoder": 2, "decoder": 2, "joint": 4}
)


@dataclass(frozen=True)
class Run:
    """One training run. kind: "encoder", "decoder" (parts that others start from) or
    "joint", which is measured."""

    kind: str
    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """Its folder below --out."""
        cell = self.cell
        if self.kind == "encoder":
            return f"encoder-{cell.encoder}-{cell.pixels}-seed{self.seed}"
        if self.kind == "decoder":
            return f"decoder-{cell.decoder}-seed{self.seed}"
        return f"{cell.name}-seed{self.seed}"

    @property
    def needs(self) -> tuple["Run", ...]:
        """The runs that must be done before this one."""
        if self.kind != "joint":
            return ()
        cell, found = self.cell, []
        if cell.encoder != "none":
            part = Cell(encoder=cell.encoder, pixels=cell.pixels)
            found.append(Run("encoder", part, self.seed))
        return (*found, Run("decoder", Cell(decoder=cell.decoder), self.seed))

    @property
    def cost(self) -> float:
        """Minutes of a processor core, about: seconds of a step, measured on an x86-64
        server with its cores shared with other work, which makes them long. Those of a
        joint step are computed from shorter rows with fewer pictures."""
        patches = (self.cell.pixels // PATCH) ** 2
        if self.kind == "encoder":
            seconds = 0.30 + 0.0067 * (patches - 36)
        elif self.kind == "decoder":
            seconds = 0.15
        else:
            seconds = 0.41 + 0.0036 * (patches - 36)
        return seconds * FULL.steps[self.kind] / 60

    def recipe(self, size: Size) -> dict[str, Any]:
        """What `pretrain` reads."""
        stage = "encoder" if self.kind == "encoder" else "joint"
        settings = {"encoder": _encoder_stage, "decoder": _decoder_stage}
        make = settings.get(self.kind, _joint_stage)
        return {
            "seed": self.seed,
            "data": "examples.ablations.world",
            "images": {
                "size": self.cell.pixels,
                "resize_mode": "pad",
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.35, 0.35, 0.35],
                "pad_color": [122, 116, 104],
            },
            "model": model_config(self.cell, size),
            "stages": {stage: make(self.cell, size)},
        }


def runs_of(tables: tuple[Table, ...], seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    """Every run of these tables once, each after those that it needs; the first seed
    of a table's cells comes before the second."""
    found: dict[Run, None] = {}
    for table in tables:
        for seed in seeds:
            for cell in table.cells:
                run = Run("joint", cell, seed)
                found |= dict.fromkeys((*run.needs, run))
    return list(found)


def as_dict(cell: Cell) -> dict[str, Any]:
    """A cell as JSON holds it."""
    return {**asdict(cell), "mix": list(cell.mix)}


def cell_of(values: dict[str, Any]) -> Cell:
    """A cell from JSON."""
    return Cell(**{**values, "mix": tuple(values["mix"])})


def value_of(cell: Cell, key: str) -> str:
    """What a table shows of a cell under one of its keys."""
    value = getattr(cell, key)
    return "/".join(map(str, value)) if key == "mix" else str(value)


# --- recipes -------------------------------------------------------------------------


def model_config(cell: Cell, size: Size) -> dict[str, Any]:
    """The model of a cell; mm1-tiny's kinds of layers, smaller."""
    width = size.width
    connector: dict[str, Any] = {
        "type": cell.connector,
        "num_query_tokens": None if cell.connector == "mlp" else cell.tokens,
        "hidden_size": width,
        "depth": 1,
        "num_attention_heads": 4,
        "hidden_act": "relu",
        "norm_output": True,
    }
    text: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "hidden_act": "relu2",
        "gated_mlp": False,
    }
    if cell.decoder == "experts":  # two at a time, each half as large: the same work
        text["moe_config"] = {
            "num_local_experts": EXPERTS,
            "moe_intermediate_size": 2 * width,
            "first_sparse_layer": 0,
        }
    elif cell.decoder == "wide":  # dense, with as many weights as all experts together
        more = (EXPERTS // 2 - 1) * 4 * width * -(-size.layers // 2)
        text["intermediate_size"] = 4 * width + more // size.layers
    return {
        "vision_config": {
            "hidden_size": width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": 4,
            "intermediate_size": 4 * width,
            "image_size": cell.pixels,
            "patch_size": PATCH,
            "hidden_act": "relu2",
            "norm_type": "rms_norm",
            "class_token": False,
            "norm_out": True,
            "patch_bias": True,
            "qkv_bias": False,
            "attention_out_bias": False,
            "mlp_bias": False,
            "feature_layer": -1,
            "feature_norm": True,
        },
        "connector_config": connector,
        "text_config": text,
        "image_token_id": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }


def _common(size: Size, kind: str) -> dict[str, Any]:
    steps = size.steps[kind]
    return {
        "steps": steps,
        "batch": size.batch,
        "learning_rate": size.rate,
        "warmup": max(steps // 8, 1),
        "floor": 0.05,
    }


def _encoder_stage(cell: Cell, size: Size) -> dict[str, Any]:
    stage = _common(size, "encoder")
    return {**stage, "batch": 8 * size.batch, "objective": cell.encoder}


def _decoder_stage(cell: Cell, size: Size) -> dict[str, Any]:
    """Text alone. Room for one picture, which stays blank."""
    return {
        **_common(size, "decoder"),
        "row_length": 128,
        "images_per_row": 1 / size.batch,
        "targets_per_row": 32,
        "mix": {"text": 1.0},
    }


def _joint_stage(cell: Cell, size: Size) -> dict[str, Any]:
    """Rows of two to three captions, or of four pictures with text after each.

    A picture counts as MOST_TOKENS whatever it takes, and there is room for nearly all
    pictures that are drawn: runs of one seed and mix read the same rows.
    """
    caption, interleaved, text = (share / 100 for share in cell.mix)
    # An encoder that knows nothing yet learns as fast as the rest: README.md says so.
    vision = 1.0 if cell.encoder == "none" else VISION_RATE
    return {
        **_common(size, "joint"),
        "row_length": 256,
        "image_counts_as": MOST_TOKENS,
        "images_per_row": 5.25 if interleaved == 1 else 4.5,
        "targets_per_row": 52,
        "mix": {"caption": caption, "interleaved": interleaved, "text": text},
        "vision_rate": vision if cell.trained == "all" else 0.0,
        "decoder_rate": 0.0 if cell.trained == "connector only" else 1.0,
    }
