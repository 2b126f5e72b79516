"""How a model reads large pictures in tiles: its part of the configuration.

Only plain Python here, as in config.py.
"""

from dataclasses import dataclass, field

from mm1_mlx.config_checks import Strict

MOST_TILES = 256  # of one picture
INDICATORS = ("index", "separators", "none")

_TYPES = ("anyres", "crops", "dynamic", "sub_images")
_MM1_5 = {"min_tiles": 4, "max_tiles": 9, "max_images": 2}  # its training


@dataclass(frozen=True, kw_only=True)
class TilingConfig(Strict):
    """How a large picture is read in parts, each as large as the encoder's input.

    type: "anyres" (LLaVA-NeXT, HyperCLOVAX): a grid out of `grids`, each tile through
        the connector, the tokens of all tiles as one map, padding cut off, a learned
        token at the end of each row; the overview first. "crops" (360VL): a fixed grid
        whose features are put together before a connector of their own; the overview
        last. "dynamic" (MM1.5 section 3.5): a grid of min_tiles to max_tiles that suits
        the picture; "sub_images" (MM1 section 5): one fixed grid. Both: each tile is
        to the model a picture of its own, and the overview comes last (MM1 does not
        say where; MM1.5 found last to be better).
    grids: [rows, columns] that may be chosen from; one for "crops" and "sub_images"
        (MM1: 2 x 2); none for "dynamic", which has all.
    unpad: of "anyres": whether the tokens of padding are cut off, and rows end with a
        token.
    overview: of "anyres": "squash" to a square, or "fit" into one, with padding. Of
        "crops" it is made of the large square, else as a whole picture is read.
    pad_color: of padding in "anyres", red, green and blue from 0 to 255; "dynamic" pads
        with the colour that whole pictures are padded with (MM1.5 does not say).
    min_tiles, max_tiles: of "dynamic", without the overview; 1 x 1 has none.
    indicator: text before each tile of "dynamic" and "sub_images": "index" "(k,i,j)",
        "separators" "," and "<n>" between, ":" before the overview, or "none".
    max_images: of "dynamic": a prompt with more has whole pictures only.
    default: what is read where nobody chooses: "tiles", or "native": whole pictures,
        of a model that can do both.
    """

    _name = "tiling_config"

    type: str
    grids: list = field(default_factory=list)
    unpad: bool = True
    overview: str = "squash"
    pad_color: list[int] = field(default_factory=lambda: [0, 0, 0])
    min_tiles: int | None = None
    max_tiles: int | None = None
    indicator: str | None = None  # "index" for "dynamic"
    max_images: int | None = None
    default: str = "tiles"

    def __post_init__(self):
        super().__post_init__()
        self._one_of("type", _TYPES)
        self._one_of("overview", ("squash", "fit"))
        self._one_of("default", ("tiles", "native"))
        self._one_of("indicator", (None, *INDICATORS))
        if len(self.pad_color) != 3 or not all(0 <= c <= 255 for c in self.pad_color):
            self._refuse("pad_color", "three whole numbers from 0 to 255")
        if self.type == "dynamic":
            self._check_dynamic()
        else:
            self._check_fixed()
        if self.arranges and self.default != "tiles":
            self._refuse("default", f"'tiles' for {self.type!r}")
        if self.arranges and self.indicator not in (None, "none"):
            self._refuse("indicator", f"null for {self.type!r}")
        if self.indicator is None:
            self._set("indicator", "index" if self.type == "dynamic" else "none")

    def _check_dynamic(self) -> None:
        if self.grids:
            self._refuse("grids", "[] for 'dynamic': min_tiles and max_tiles say it")
        for key, usual in _MM1_5.items():
            if getattr(self, key) is None:
                self._set(key, usual)
        self._at_least(1, "min_tiles", "max_tiles", "max_images")
        if self.most > MOST_TILES:
            self._refuse("max_tiles", f"at most {MOST_TILES}")
        if self.least > self.most:
            self._refuse("min_tiles", f"at most max_tiles ({self.most})")

    def _check_fixed(self) -> None:
        for key in _MM1_5:
            if getattr(self, key) is not None:
                self._refuse(key, f"null for {self.type!r}")
        if self.type == "sub_images" and not self.grids:
            self._set("grids", [[2, 2]])
        pairs = [g for g in self.grids if isinstance(g, list) and len(g) == 2]
        sizes = [n for g in pairs for n in g]
        good = all(isinstance(n, int) and 1 <= n <= 64 for n in sizes)
        if not pairs or len(pairs) != len(self.grids) or not good:
            self._refuse("grids", "a list of [rows, columns]")
        if self.type != "anyres" and len(self.grids) != 1:
            self._refuse("grids", f"one [rows, columns] for {self.type!r}")
        rows, columns = self.grids[0]
        if self.type != "anyres" and (rows != columns or rows < 2):
            self._refuse("grids", "as many rows as columns, at least 2")

    def _set(self, key: str, value: object) -> None:
        object.__setattr__(self, key, value)  # the dataclass is frozen

    @property
    def arranges(self) -> bool:
        """Whether a picture's tiles are put together inside the model; else each is a
        picture to it, with Q tokens."""
        return self.type in ("anyres", "crops")

    @property
    def least(self) -> int:
        """Tiles of the smallest grid of "dynamic"."""
        return self.min_tiles or 1

    @property
    def most(self) -> int:
        """Tiles of the largest grid of "dynamic"."""
        return self.max_tiles or 1
