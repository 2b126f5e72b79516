"""How a model writes boxes and points in text; the part box_config of a config.json.

Plain Python, as config.py. mm1_mlx/inputs/boxes.py reads and writes them.
"""

from dataclasses import dataclass

from mm1_mlx.config_checks import Strict

# Of each style the usual scale and frame. Sources: Ferret's conversation templates,
# LLaVA issue 606, Qwen-VL's paper. MM1.5's papers give the form of "mm1" alone; its
# scale and frame here are ours.
STYLES: dict[str, tuple[int, str]] = {
    "mm1": (1000, "image"),  # <x1,y1,x2,y2>
    "ferret": (1000, "image"),  # [x1, y1, x2, y2]
    "llava": (100, "padded"),  # [0.12, 0.30, 0.45, 0.60]
    "qwen": (1000, "image"),  # <box>(x1,y1),(x2,y2)</box>
}
FRAMES = ("image", "padded")


@dataclass(frozen=True, kw_only=True)
class BoxFormat(Strict):
    """A style of boxes and points, and what their numbers are parts of.

    style: "mm1", "ferret", "llava" or "qwen", see STYLES. scale: the numbers count
    parts of so many to a side: whole numbers from 0 to scale - 1, rounded down, for
    "llava" decimals as fine as that. frame: the sides are those of the picture
    ("image"), or of the square that the model reads ("padded": with borders, unless
    another resize mode cuts or squashes it). Scale and frame have a default for each
    style.
    """

    _name = "box_config"

    style: str
    scale: int | None = None
    frame: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self._one_of("style", tuple(STYLES))
        scale, frame = STYLES[self.style]
        if self.scale is None:
            object.__setattr__(self, "scale", scale)
        if self.frame is None:
            object.__setattr__(self, "frame", frame)
        self._at_least(2, "scale")
        self._one_of("frame", FRAMES)
