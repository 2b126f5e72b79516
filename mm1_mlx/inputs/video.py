"""Video as pictures: frames at uniform places of a folder, an animation, or a film.

MM1.5 (section on video) reads 24 frames of a video as so many pictures, in their order.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mm1_mlx.errors import ImageError, PromptError
from mm1_mlx.inputs.images import (
    MAX_PIXELS,
    check_size,
    decoded_frames,
    file_format,
    load_image,
)
from mm1_mlx.inputs.prompts import IMAGE_TOKEN, VIDEO_TOKEN, plural
from mm1_mlx.inputs.sources import pasted_path, read_source, shown

FRAMES = 24  # MM1.5
MOST_FRAMES = 4096  # more than any context holds; each is kept in memory
ENDINGS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "ico")
ENDINGS += ("avif", "heic", "heif")
_FRAME = "mm1_mlx: frame"  # in a picture's info


class Film(NamedTuple):
    """Where a frame comes from.

    source: of its video, None where it has no path or address. frames: how many were
    asked for; count: how many there are. number: of this one, from 0.
    """

    source: Any
    frames: int
    count: int
    number: int


def uniform_places(count: int, wanted: int) -> list[int]:
    """Which of `count` frames are taken: the middle one of each of `wanted` equal
    parts, (2i + 1) * count // (2 * wanted); all, where there are no more than that."""
    if count <= wanted:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def natural_order(name: str | Path) -> list[tuple[bool, int, str]]:
    """A key to sort names by, in which frame2 stands before frame10."""
    parts = re.split(r"(\d+)", str(name).casefold())
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder in natural order, hidden ones left out.

    ImageError where there are none.
    """
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower().lstrip(".") in ENDINGS and path.name[0] != "."
    ]
    if not found:
        raise ImageError(
            f"The folder {shown(str(folder))} has no pictures: expected files that end "
            f"with .png, .jpg, .webp or another picture format."
        )
    return sorted(found, key=natural_order)


def video_frames(
    source: Any,
    frames: int = FRAMES,
    *,
    max_pixels: int = MAX_PIXELS,
    allow_url: bool = False,
) -> list[Image.Image]:
    """RGB frames of a video, at most `frames`, in their order; see uniform_places.

    source: a folder of pictures (in natural order) or a list of them, a GIF, WebP or
    PNG animation, or a film (mp4, mov, webm, ...; needs the package av); a file as
    load_image takes it. A still picture is a video of one frame.

    Raises ImageError, in one line, for what is none of these or is damaged.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise ImageError(f"frames is {frames!r}, but must be a whole number above 0.")
    if frames > MOST_FRAMES:
        raise ImageError(f"frames is {frames}, but must be {MOST_FRAMES} at most.")

    def choose(count: int) -> list[int]:
        return uniform_places(count, frames)

    limits: dict[str, Any] = {"max_pixels": max_pixels, "allow_url": allow_url}
    found = _found(source, choose, limits)
    named = isinstance(source, (str, os.PathLike))
    if isinstance(source, (list, tuple)):
        named = all(isinstance(one, (str, os.PathLike)) for one in source)
    for i, frame in enumerate(found):
        frame.info[_FRAME] = Film(source if named else None, frames, len(found), i)
    return found


def is_frame(image: Any) -> bool:
    """Whether a picture is one of video_frames."""
    return film_of(image) is not None


def film_of(image: Any) -> Film | None:
    """What a picture of video_frames comes from; None for other pictures."""
    return image.info.get(_FRAME) if isinstance(image, Image.Image) else None


def _found(
    source: Any, choose: Callable[[int], list[int]], limits: dict[str, Any]
) -> list[Image.Image]:
    max_pixels, allow_url = limits["max_pixels"], limits["allow_url"]
    path = _path(source)
    if path is not None and path.is_dir():
        source = pictures_in(path)
    if isinstance(source, (list, tuple)):
        if not source:
            raise ImageError("The video has no frames: the list of them is empty.")
        return [load_image(source[i], **limits) for i in choose(len(source))]
    if path is not None and path.is_file() and _is_film(_head(path)):
        with path.open("rb") as file:  # no name: av would take one as an address
            return _film(file, shown(str(path)), choose, max_pixels)
    kinds = (str, os.PathLike, bytes, bytearray, memoryview)
    if not isinstance(source, kinds) and not callable(getattr(source, "read", None)):
        raise ImageError(
            f"A video of type {type(source).__name__} cannot be used: give its file (a "
            f"path, bytes, or an open file), a folder of pictures, or a list of them, "
            f"one for each frame."
        )
    data, name = read_source(source, allow_url=allow_url)
    if _is_film(data[:512]):
        return _film(BytesIO(data), name, choose, max_pixels)
    return decoded_frames(data, name, max_pixels, lambda image: _taken(image, choose))


def _path(source: Any) -> Path | None:
    """The file or folder that a source names, or None: bytes, an address, a list, and
    nothing, of which read_source says so."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    text = os.fsdecode(os.fspath(source))
    if not text.strip() or re.match(r"\s*(data:|(?!file:)[a-zA-Z]+://)", text):
        return None
    try:
        return pasted_path(text)
    except ValueError:  # a null byte: read_source says so
        return None


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError:  # read_source says why
        return b""


def _taken(image: Image.Image, choose: Callable[[int], list[int]]) -> list:
    """The chosen frames of an animation that Pillow opened."""
    # The still of an APNG, for programs that show no animation, is no frame of it.
    first = int(bool(image.info.get("default_image")))
    count = getattr(image, "n_frames", 1) - first
    frames = []
    # A phone's MPO is a photo with smaller ones of it behind.
    for place in choose(1 if image.format == "MPO" else count):
        image.seek(first + place)
        frames.append(image.copy())
    return frames


# --- films ---------------------------------------------------------------------------


def _is_film(head: bytes) -> bool:
    """Whether a file that begins so is left to the package av."""
    if file_format(head) is not None:
        return False
    starts = (b"\x1aE\xdf\xa3", b"FLV\1", b"\0\0\1\xba", b"\0\0\1\xb3", b"OggS")
    riff = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    transport = head[:1] == b"G" and head[188:189] == b"G"
    quicktime = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    return head.startswith(starts) or riff or transport or quicktime


def _film(
    source: Any, name: str, choose: Callable[[int], list[int]], max_pixels: int
) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise ImageError(
            f"{name} is a film, and reading it needs one more package: "
            f"pip install 'mm1_mlx[video]'. Or give a folder of its frames."
        ) from error
    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise ImageError(
                    f"{name} has no pictures: it is sound alone, or was cut off."
                )
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            check_size((stream.width, stream.height), max_pixels, name)
            found = [_upright(frame) for frame in _picked(container, stream, choose)]
    except ImageError:
        raise
    # PyAV's errors are OSErrors and ValueErrors; broken files bring others, too.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"{name} is a damaged or cut off film, or of a kind that is not read "
            f"({reason[:120]}). Save it again, or give a folder of its frames."
        ) from error
    if not found:
        raise ImageError(f"{name} has no frames: it is damaged or was cut off.")
    return found


def _picked(
    container: Any, stream: Any, choose: Callable[[int], list[int]]
) -> Iterator[Any]:
    """The chosen frames. Only what stands between a key frame and them is decoded."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
    container.seek(0, stream=stream)
    if len(stamps) < len(packets):  # frames without times: count them
        count = sum(1 for _ in container.decode(stream))
        container.seek(0, stream=stream)
        wanted = set(choose(count))
        frames = enumerate(container.decode(stream))
        yield from (frame for place, frame in frames if place in wanted)
        return
    keys = sorted(packet.pts for packet in packets if packet.is_keyframe)
    frames, frame = None, None
    for place in choose(len(stamps)):
        wanted = stamps[place]
        key = keys[max(bisect_right(keys, wanted) - 1, 0)] if keys else wanted
        if frames is None or frame is None or frame.pts < key:
            container.seek(wanted, stream=stream)
            frames, frame = container.decode(stream), None
        while frame is None or frame.pts < wanted:
            frame = next(frames, None)
            if frame is None:
                return
        yield frame


def _upright(frame: Any) -> Image.Image:
    """The frame turned as a phone's film says."""
    picture = frame.to_image()
    turn = getattr(frame, "rotation", 0) % 360  # counterclockwise
    return picture.rotate(turn, expand=True) if turn else picture


# --- in a prompt ---------------------------------------------------------------------


def place_videos(
    prompt: str, images: Sequence[Any], videos: Sequence[Sequence[Any]]
) -> tuple[str, list]:
    """A prompt with <video> where each video belongs, as one with pictures alone.

    videos: the frames of each. Gives the text with an <image> for each frame, and all
    pictures in the order of their places. Without marks in the text, pictures come
    first, then videos, then the text. Raises PromptError for another number of marks.
    """
    pieces = re.split(f"({IMAGE_TOKEN}|{VIDEO_TOKEN})", prompt)
    found = {mark: pieces.count(mark) for mark in (IMAGE_TOKEN, VIDEO_TOKEN)}
    # Without videos the processor counts, and knows more to say.
    if not any(found.values()) or not (videos or found[VIDEO_TOKEN]):
        return prompt, [*images, *(frame for frames in videos for frame in frames)]
    for mark, given in ((IMAGE_TOKEN, images), (VIDEO_TOKEN, videos)):
        if found[mark] != len(given):
            what = plural(len(given), mark.strip("<>"))
            raise PromptError(
                f"The prompt has {found[mark]} {mark}, but {what} "
                f"{'was' if len(given) == 1 else 'were'} given. Write {mark} once for "
                f"each, where it belongs, or no {IMAGE_TOKEN} and no {VIDEO_TOKEN} to "
                f"put all of them first."
            )
    left, films = list(images), list(videos)
    sources: list = []
    for i, piece in enumerate(pieces):
        if piece == IMAGE_TOKEN:
            sources.append(left.pop(0))
        elif piece == VIDEO_TOKEN:
            frames = films.pop(0)
            pieces[i] = IMAGE_TOKEN * len(frames)
            sources += frames
    return "".join(pieces), sources
