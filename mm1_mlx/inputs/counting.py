"""How many pictures and tokens a prompt has, and what would fit if it is too long."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ContextError, PromptError
from mm1_mlx.grids import Layout
from mm1_mlx.inputs.prompts import plural
from mm1_mlx.inputs.resolution import Way


@dataclass(frozen=True)
class Slot:
    """The place of one picture in a prompt.

    ids: what stands there: image ids, and text between tiles. tokens: how many of them
    are image ids. way, layout: how the picture is read; width and height of the layout
    are 0 where nothing asked for them.
    """

    ids: list[int]
    tokens: int
    way: Way
    layout: Layout


def listing(counts: Sequence[int], usual: int = 0) -> str:
    """ "576", or "1824 and 2340" where pictures differ."""
    return " and ".join(map(str, dict.fromkeys(counts))) or str(usual)


def per_prompt(images: Any, count: int, batch: bool) -> list[list]:
    """The list of images of each prompt."""
    if images is None:
        return [[] for _ in range(count)]
    if not batch:
        return [list(images) if isinstance(images, (list, tuple)) else [images]]
    _check_entries(images, count, "images", "an image, a list, or None")
    return [_listed(entry) for entry in images]


def resolutions(resolution: Any, count: int, batch: bool) -> list:
    """The resolution, or list of them, of each prompt: one for all, or one for each."""
    if not batch or not isinstance(resolution, (list, tuple)):
        return [resolution] * count
    _check_entries(resolution, count, "resolution", "one, a list, or None")
    return list(resolution)


def _check_entries(given: Any, count: int, name: str, kinds: str) -> None:
    if not isinstance(given, (list, tuple)) or len(given) != count:
        found = len(given) if isinstance(given, Sequence) else 1
        raise PromptError(
            f"The batch has {plural(count, 'prompt')} but {name}= has "
            f"{plural(found, 'entry', 'entries')}. "
            f"Give a list with one entry ({kinds}) for each prompt."
        )


def _listed(entry: Any) -> list:
    if entry is None:
        return []
    return list(entry) if isinstance(entry, (list, tuple)) else [entry]


def layouts_of(slots: Sequence[Slot]) -> tuple[Layout, ...]:
    """The tiles of each picture, where some are read in tiles; else none."""
    if any(_joined(slot) or slot.layout.tiles > 1 for slot in slots):
        return tuple(slot.layout for slot in slots)
    return ()


def check_ids(ids: list[int], counts: list[int], config: MM1Config) -> None:
    """PromptError unless ids are the model's, and have a place for each picture.

    counts: tokens of the pictures.
    """
    image = config.image_token_id
    found = ids.count(image)  # type: ignore[arg-type]
    if found < sum(counts):
        raise PromptError(
            f"The prompt has {found} image ids, but {plural(len(counts), 'image')} "
            f"of {listing(counts)} tokens were expected: the chat template leaves "
            f"out a message with an image. Take another template."
        )
    if counts and found != sum(counts):
        raise PromptError(
            f"The prompt has {found} image ids, but {plural(len(counts), 'image')} "
            f"of {listing(counts)} tokens were expected: the text holds the "
            f"vocabulary's own mark with the id {image}. Take it out."
        )
    if not counts and found and config.reads_images:
        raise PromptError(
            f"The prompt has {found} image ids, but no image: the text holds the "
            f"vocabulary's own mark with the id {image}. Take it out."
        )
    vocab = config.text_config.vocab_size
    if beyond := [i for i in ids if i >= vocab and i != image]:
        raise PromptError(
            f"The tokenizer gives the id {beyond[0]}, but the model knows only "
            f"{vocab}: the tokenizer files are not this model's."
        )
    if not ids:
        raise PromptError("The prompt is empty: write a question or a text.")


# --- too long ------------------------------------------------------------------------

# The slot of a picture, by its number, if it were read in another way.
Reread = Callable[[int, Way], Slot]


def too_long(
    length: int,
    slots: Sequence[Slot],
    max_tokens: int,
    context: int,
    native: Way | None,
    reread: Reread,
) -> ContextError:
    """The error of a prompt of `length` tokens, and what would fit.

    native: how a picture is read whole, or None where the model reads tiles only.
    """
    image_tokens = sum(slot.tokens for slot in slots)
    marks = sum(len(slot.ids) for slot in slots) - image_tokens
    text = length - image_tokens - marks
    total = length + max_tokens
    marked = f" + {marks} that mark tiles" if marks else ""
    wish = _wish(text, len(slots), max_tokens)
    answer = f" + {max_tokens} for the answer" if max_tokens else ""
    room = context - max(max_tokens, 1)  # an answer has a token at least
    kept = _kept(length, slots, room)
    ways = _what_fits(length, slots, room, native, reread)
    if kept:
        ways.append(f"{kept} of the {len(slots)} images")
    return ContextError(
        f"The prompt is too long: {text} text tokens + {image_tokens} image tokens "
        f"({_pictures(slots)}){marked}{answer} = {total}, but the model's context is "
        f"{context}.",
        [len(slot.ids) for slot in slots],
        length - room,
        ways=ways,
        wish=wish or ("" if ways else "Take a model with a longer context."),
    )


def _wish(text: int, images: int, max_tokens: int) -> str:
    """What else to do: only what there is can become less."""
    less = [
        wish
        for wish, there in (
            ("shorten the text", text),
            ("give fewer images", images > 1),
            ("ask for a shorter answer", max_tokens > 1),
        )
        if there
    ]
    if not less:
        return ""
    *first, last = less
    found = f"{', '.join(first)}{',' * (len(first) > 1)} or {last}" if first else last
    return found.capitalize() + "."


def _pictures(slots: Sequence[Slot]) -> str:
    """ "2 images of 144", "1 image in 10 tiles of 144"."""
    images = plural(len(slots), "image")
    tiles = sum(slot.layout.tiles for slot in slots)
    if tiles == len(slots) or any(_joined(slot) for slot in slots):
        return f"{images} of {listing([slot.tokens for slot in slots])}"
    each = listing([slot.tokens // slot.layout.tiles for slot in slots])
    return f"{images} in {tiles} tiles of {each}"


def _joined(slot: Slot) -> bool:
    return slot.way.tiling is not None and slot.way.tiling.arranges


def _what_fits(
    length: int, slots: Sequence[Slot], room: int, native: Way | None, reread: Reread
) -> list[str]:
    """Single changes, each by its flag and setting."""
    ways = []
    text = length - sum(len(slot.ids) for slot in slots)
    most = max((slot.layout.rows * slot.layout.columns for slot in slots), default=0)
    tile = min((slot.tokens // slot.layout.tiles for slot in slots), default=1)
    # Of a larger number a grid may take half, for the picture's shape.
    for count in range(min(most - 1, 2 * room // tile), 0, -1):
        other = [_fewer(slot.way, count) for slot in slots]
        if text + _length(other, reread) <= room:
            if [slot.way for slot in slots] != other:
                ways.append(f"--max-tiles {count} (max_tiles={count})")
            break
    if native is not None and any(slot.way != native for slot in slots):
        whole = _length([native] * len(slots), reread)
        if text + whole <= min(room, length - 1):
            ways.append(_whole(slots))
    return ways


def _whole(slots: Sequence[Slot]) -> str:
    """A number of tiles may have been asked for, which goes with no other way."""
    tilings = [slot.way.tiling for slot in slots]
    cut = any(tiling is not None and tiling.type == "dynamic" for tiling in tilings)
    without = " without --max-tiles" if cut else ""
    return f"--resolution native{without} (resolution='native')"


def _kept(length: int, slots: Sequence[Slot], room: int) -> int:
    """How many pictures fit, from the first on."""
    kept, used = 0, length - sum(len(slot.ids) for slot in slots)
    for slot in slots:
        used += len(slot.ids)
        if used > room:
            break
        kept += 1
    return kept


def _fewer(way: Way, most: int) -> Way:
    """The way with at most so many dynamic tiles."""
    tiling = way.tiling
    if tiling is None or tiling.type != "dynamic" or tiling.most <= most:
        return way
    least = min(tiling.least, most)
    return Way(way.settings, replace(tiling, min_tiles=least, max_tiles=most))


def _length(ways: Sequence[Way], reread: Reread) -> int:
    return sum(len(reread(number, way).ids) for number, way in enumerate(ways))
