"""--resolution and --max-tiles: how large pictures are read; for every door."""

import argparse
from typing import Any

from mm1_mlx.cli.parser import whole_number
from mm1_mlx.config_tiling import MOST_TILES


def resolution(text: str) -> str | int:
    """A type for add_argument: "native", "dynamic", or a number of pixels."""
    if text in ("native", "dynamic"):
        return text
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"must be native, dynamic or a number of pixels, not '{text}'"
    )


def add_resolution(group: Any) -> None:
    """The two flags, beside the others about pictures."""
    group.add_argument(
        "--resolution",
        type=resolution,
        metavar="R",
        help="native, 336, 448, 560, 672, 1344 (four parts and an overview, as MM1) or "
        "dynamic (tiles that suit the picture, as MM1.5); any other number of pixels "
        "too (as the model's config says)",
    )
    group.add_argument(
        "--max-tiles",
        type=whole_number(1, MOST_TILES),
        metavar="N",
        help="tiles at most for --resolution dynamic, beside the overview; MM1.5: 9, "
        "up to 16 (the model's)",
    )


def add_picture_limits(group: Any) -> None:
    """Which pictures are read at all."""
    add = group.add_argument
    add(
        "--max-image-pixels",
        type=whole_number(1),
        metavar="N",
        help="refuse pictures with more pixels than this",
    )
    add(
        "--allow-url",
        action="store_true",
        help="let --image be an https address too",
    )


def picture_limits(args: argparse.Namespace) -> dict[str, Any]:
    """What these flags say, as keyword arguments of load_image."""
    limits: dict[str, Any] = {"allow_url": args.allow_url}
    if args.max_image_pixels is not None:
        limits["max_pixels"] = args.max_image_pixels
    return limits
