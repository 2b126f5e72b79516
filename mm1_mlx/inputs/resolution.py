"""How the pictures of a prompt are read: `resolution` and `max_tiles`, for a model.

MM1 section 5: 336 pixels and more by interpolated positions, up to 672, and above that
sub-images of half the side with an overview; MM1.5 section 3.5: tiles that suit the
picture ("dynamic").
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from mm1_mlx.config import MM1Config, TilingConfig
from mm1_mlx.config_tiling import MOST_TILES
from mm1_mlx.errors import MM1Warning, PromptError
from mm1_mlx.grids import Layout
from mm1_mlx.inputs.prompts import plural
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.tiling import layout_of, whole

NAMES = ("native", "dynamic")
LARGEST_WHOLE = 672  # pixels; MM1 cuts what is larger
LARGEST = 8192

_CHOICES = "'native', 'dynamic' or a number of pixels such as 336, 672 or 1344"


@dataclass(frozen=True)
class Way:
    """How one picture is read.

    settings: of one tile. tiling: how it is cut; None: it is one tile.
    """

    settings: ImageSettings
    tiling: TilingConfig | None = None

    def layout(self, width: int, height: int) -> Layout:
        """How the tiles of a picture of width x height pixels lie."""
        if self.tiling is None:
            return whole(width, height)
        return layout_of(width, height, self.settings.size, self.tiling)


def ways_of(
    resolution: Any,
    max_tiles: int | None,
    count: int,
    config: MM1Config,
    settings: ImageSettings,
    *,
    own: Any = None,
    own_tiles: int | None = None,
    frames: Sequence[bool] = (),
) -> list[Way]:
    """How each of a prompt's `count` pictures is read.

    resolution: "native" (the encoder's own size, or the tiles that LLaVA-NeXT and
    360VL were trained with), a number of pixels, "dynamic", or None for the model's
    own; or a list of these, one for each picture. max_tiles: of "dynamic", instead of
    the model's own. A prompt with more pictures than the tiling's max_images has no
    tiles, unless the list asks for them. own, own_tiles: taken in place of None, and
    known to suit the model, as what its adapter was trained with: nothing is warned of
    them. own may be a list, too. frames: which pictures are frames of a video, which
    only checkpoints that read everything in their own tiles cut, and a list that says
    so.

    Raises PromptError; MM1Warning where a model was never trained for tiles, and where
    pictures are not read in tiles as was asked.
    """
    if max_tiles is not None:
        _check_max_tiles(max_tiles)
    resolution, known = check_resolution(resolution), own is not None
    if resolution is None and isinstance(own, list):
        # As of a draft model, which reads what its model was asked for.
        resolution, max_tiles, own = own, own_tiles, None

    def way_of(one: Any) -> Way:
        tiles = own_tiles if (one, max_tiles) == (None, None) else max_tiles
        return _way(own if one is None else one, tiles, config, settings)

    if isinstance(resolution, list):
        if len(resolution) != count:
            raise PromptError(
                f"resolution has {plural(len(resolution), 'entry', 'entries')}, but "
                f"the prompt has {plural(count, 'image')}. Give one for each image, or "
                f"one for all."
            )
        ways = list(map(way_of, resolution))
        _check_cut(ways, max_tiles, "no entry of the list of resolutions is 'dynamic'")
        trained = {None, own, "native"}
        known = known and (own is None or trained.issuperset(resolution))
    else:
        way = way_of(resolution)
        plain = Way(settings)
        films = bool(frames) and all(frames) and not _arranged(way)
        reason = "frames of a video are not cut" if films else None
        _check_cut([plain if films else way], max_tiles, reason)
        ways = _together(way, resolution, plain, [*frames] or [False] * count)
        known = known and resolution in (None, own)
    if not known:
        _warn_untrained(ways, config.tiling_config)
    return ways


def _together(way: Way, asked: Any, plain: Way, frames: list[bool]) -> list[Way]:
    """The ways of a prompt's pictures that are all asked for alike. plain: whole."""
    if way.tiling is None or _arranged(way):
        return [way] * len(frames)
    most = way.tiling.max_images
    if most is not None and len(frames) > most:
        if asked == "dynamic":
            _warn_whole(len(frames), most)
        return [plain] * len(frames)
    if asked is not None and any(frames):
        _warn_of_frames(asked)
    return [plain if frame else way for frame in frames]


def _check_cut(ways: list[Way], max_tiles: int | None, reason: str | None) -> None:
    """PromptError for max_tiles where nothing is cut into dynamic tiles."""
    if max_tiles is None or not ways or any(map(_is_dynamic, ways)):
        return
    if _arranged(ways[0]):
        raise PromptError(
            f"max_tiles is {max_tiles}, but this checkpoint reads pictures in tiles as "
            f"it was trained to: leave it out (--max-tiles)."
        )
    raise PromptError(
        f"max_tiles is {max_tiles}, but no picture is read in dynamic tiles: "
        + (reason or "give resolution 'dynamic' with it (--resolution dynamic)")
        + "."
    )


def of_frames(resolution: Any, own: Any) -> Any:
    """The resolution of frames of a video where this is the one of the other pictures.

    own: of the processor, where it is None. MM1Warning where frames are not read as was
    asked.
    """
    wanted = own if resolution is None else resolution
    if wanted is not None and not _cuts(wanted):
        return resolution
    if resolution is not None:
        _warn_of_frames(resolution)
    return "native"


def _cuts(resolution: Any) -> bool:
    return resolution == "dynamic" or (
        isinstance(resolution, Integral) and int(resolution) > LARGEST_WHOLE
    )


def _warn_of_frames(resolution: Any) -> None:
    warnings.warn(
        f"Frames of a video are not cut into tiles: they are read with resolution "
        f"'native', not {resolution!r}.",
        MM1Warning,
        stacklevel=2,
    )


def is_native(resolution: Any, config: MM1Config, settings: ImageSettings) -> bool:
    """Whether one resolution reads a picture as "native" does."""
    if resolution == "native":
        return True
    resolution = check_resolution(resolution)
    ways = [_way(one, None, config, settings) for one in (resolution, "native")]
    return ways[0] == ways[1]


def with_default(
    config: MM1Config, size: int, resolution: Any, max_tiles: int | None
) -> MM1Config | None:
    """The config of a model that reads pictures so where nobody chooses.

    resolution, max_tiles: as ways_of takes them, None the model's own. size: the side
    of a tile. None where a config cannot say it: it has no other size of whole
    pictures, and no other tiles.
    """
    tiling = config.tiling_config
    if (resolution, max_tiles) == (None, None) or (tiling and tiling.arranges):
        return config
    if resolution in ("native", size):
        if tiling is not None:
            tiling = replace(tiling, default="native")
    elif resolution in (None, "dynamic"):
        tiling = replace(_dynamic(tiling, max_tiles), default="tiles")
    elif resolution > LARGEST_WHOLE and resolution == 2 * size:
        tiling = replace(_sub_images(tiling), default="tiles")
    else:
        return None
    return replace(config, tiling_config=tiling)


def _arranged(way: Way) -> bool:
    return way.tiling is not None and way.tiling.arranges


def _is_dynamic(way: Way) -> bool:
    return way.tiling is not None and way.tiling.type == "dynamic"


def _check_max_tiles(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        found = repr(value)
    elif 1 <= value <= MOST_TILES:
        return
    else:
        found = str(value)
    raise PromptError(
        f"max_tiles is {found}, but must be a whole number from 1 to {MOST_TILES}."
    )


def check_resolution(asked: Any) -> Any:
    """What was asked, its numbers as Python's; PromptError for what never can be."""
    if isinstance(asked, (list, tuple)):
        return [check_resolution(one) for one in asked]
    if isinstance(asked, Integral) and not isinstance(asked, bool):
        return int(asked)
    if asked is not None and asked not in NAMES:
        raise PromptError(f"resolution is {asked!r}, but must be {_CHOICES}.")
    return asked


def _own(config: MM1Config, asked: Any) -> TilingConfig | None:
    """The tiles of a model where nobody asks for others."""
    tiling = config.tiling_config
    if tiling is None or tiling.arranges:
        return tiling
    return tiling if asked is None and tiling.default == "tiles" else None


def _way(
    asked: Any, max_tiles: int | None, config: MM1Config, settings: ImageSettings
) -> Way:
    tiling = config.tiling_config
    if tiling is not None and tiling.arranges and asked not in (None, "native"):
        raise PromptError(
            f"This checkpoint reads pictures in tiles of {settings.size} pixels as it "
            f"was trained to ({tiling.type}) and in no other way: take resolution "
            f"'native' (--resolution native), not {asked!r}."
        )
    if asked == "dynamic":
        return Way(settings, _dynamic(tiling, max_tiles))
    if asked is None or asked == "native":
        own = _own(config, asked)
        if own is not None and own.type == "dynamic":
            own = _dynamic(own, max_tiles)
        return Way(settings, own)
    if asked <= LARGEST_WHOLE or asked == settings.size:
        return Way(_sized(settings, asked, asked, config))
    half = _sized(settings, asked, asked // 2, config)
    return Way(half, _sub_images(tiling))


def _sub_images(tiling: TilingConfig | None) -> TilingConfig:
    """MM1's four parts and an overview, with the texts that the model knows."""
    if tiling is not None and tiling.type == "sub_images" and tiling.grids == [[2, 2]]:
        return tiling
    indicator = None if tiling is None else tiling.indicator
    return TilingConfig(type="sub_images", indicator=indicator)


def _dynamic(tiling: TilingConfig | None, max_tiles: int | None) -> TilingConfig:
    if tiling is None or tiling.type != "dynamic":
        tiling = TilingConfig(type="dynamic")
    if max_tiles is None:
        return tiling
    return replace(tiling, max_tiles=max_tiles, min_tiles=min(tiling.least, max_tiles))


def _warn_whole(count: int, most: int) -> None:
    warnings.warn(
        f"The prompt has {count} images, and with more than {most} none is cut into "
        f"tiles: resolution 'dynamic' is not used. Ask with fewer; or for single ones, "
        f"in Python by a list, with --shots by --high-resolution-shots N.",
        MM1Warning,
        stacklevel=2,
    )


def _warn_untrained(ways: list[Way], trained: TilingConfig | None) -> None:
    """Say which tiles the model's config does not know."""
    unknown: list[str] = []
    for way in ways:
        type = way.tiling.type if way.tiling else None
        if type == "dynamic" and (trained is None or trained.type != "dynamic"):
            unknown.append("dynamic tiles")
        elif type == "sub_images" and trained is None:
            unknown.append(f"sub-images (resolution {2 * way.settings.size})")
    for what in dict.fromkeys(unknown):
        warnings.warn(
            f"This model's config does not say that it was trained for {what}: its "
            f"answers may be worse than with resolution 'native'.",
            MM1Warning,
            stacklevel=2,
        )


def _sized(
    settings: ImageSettings, asked: int, side: int, config: MM1Config
) -> ImageSettings:
    """The settings of tiles of another side; `asked` is what the user wrote."""
    vision, connector = config.vision_config, config.connector_config
    if vision is None or connector is None or asked == settings.size:
        return settings
    patch, times = vision.patch_size, 1 if side == asked else 2
    if not patch <= asked <= LARGEST:
        raise PromptError(
            f"resolution is {asked}, but must be from {patch} (one patch) to {LARGEST} "
            f"pixels."
        )
    unit = patch * times
    if asked % unit:
        low = asked // unit * unit
        raise PromptError(
            f"resolution is {asked}, but must be a multiple of "
            f"{'the patch size' if times == 1 else 'twice the patch size'} ({unit}): "
            f"take {low} or {low + unit}."
        )
    pooled = round((connector.num_query_tokens or 0) ** 0.5)
    if connector.pooling == "strided" and side // patch < pooled:
        raise PromptError(
            f"resolution is {asked}, which gives {side // patch} x {side // patch} "
            f"patches, but the connector makes {pooled} x {pooled} tokens of them: "
            f"take {pooled * patch * times} or more."
        )
    return replace(settings, size=side)
