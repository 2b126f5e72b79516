"""Draw examples/shapes.png: a red circle, a blue square and a yellow star on white.

python examples/draw_shapes.py
"""

import math
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, DETAIL = 256, 4  # drawn four times as large, then reduced: smooth edges


def star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The ten corners of a five-pointed star that stands upright."""
    corners = []
    for i in range(10):
        r = radius if i % 2 == 0 else radius * 0.382  # the regular pentagram
        angle = math.pi * (i / 5 - 0.5)
        corners.append((x + r * math.cos(angle), y + r * math.sin(angle)))
    return corners


def draw() -> Image.Image:
    """The picture, 256 x 256 RGB."""
    large = Image.new("RGB", (SIDE * DETAIL, SIDE * DETAIL), "white")
    pen = ImageDraw.Draw(large)

    def scaled(*points):
        return [(x * DETAIL, y * DETAIL) for x, y in points]

    pen.ellipse(scaled((24, 30), (104, 110)), fill=(220, 30, 30))
    pen.rectangle(scaled((150, 40), (226, 116)), fill=(30, 60, 220))
    pen.polygon(scaled(*star(128, 186, 52)), fill=(255, 225, 25))
    return large.resize((SIDE, SIDE), Image.Resampling.BOX)


if __name__ == "__main__":
    path = Path(__file__).parent / "shapes.png"
    draw().save(path, optimize=True)
    print(path)
