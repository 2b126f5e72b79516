"""What lmms-eval's tasks show, as `generate` takes it: pictures, frames of videos."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm1_mlx.errors import MM1Error
from mm1_mlx.inputs.prompts import IMAGE_TOKEN
from mm1_mlx.inputs.video import ENDINGS, video_frames


def pictures_of(given: Any, frames: int) -> list[Any]:
    """Visuals as pictures; so many frames of a video.

    A path is a picture or a video by its ending, as lmms-eval's own chat tasks have it
    (api/task.py). MM1Error for what is neither.
    """
    found: list[Any] = []
    for one in given if isinstance(given, (list, tuple)) else [given] if given else []:
        place = _place(one) if isinstance(one, dict) else one
        if isinstance(place, (str, Path)) and _is_video(place):
            found += video_frames(place, frames)
        else:
            found.append(place)
    return found


def with_marks(text: str, count: int) -> str:
    """The text with a mark for each picture, or none: then they come first."""
    if text.count(IMAGE_TOKEN) in (0, count):
        return text
    return text.replace(IMAGE_TOKEN, "").strip()


def cleaned(messages: Sequence[dict[str, Any]], frames: int) -> list[dict[str, Any]]:
    """Messages whose texts have no mark: each picture is a part of its own."""
    found = []
    for message in messages:
        parts = message["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        clean = [_part(part, frames) for part in parts]
        found.append({**message, "content": clean})
    return found


def _part(part: dict[str, Any], frames: int) -> dict[str, Any]:
    """A part of a message as this package has it."""
    if part["type"] == "text":
        return {**part, "text": part["text"].replace(IMAGE_TOKEN, "")}
    if part["type"] != "video":
        return part
    url = part.get("url")
    held = {**url, **part, "url": _named(url)} if isinstance(url, dict) else part
    return {"type": "video", "video": _place(held), "frames": frames}


def _place(visual: dict[str, Any]) -> Any:
    """The file of a visual. MM1Error where it is sound, or a part of a video."""
    names = ("start_time", "end_time", "video_start", "video_end")
    if any(visual.get(name) is not None for name in names):
        raise MM1Error(
            "A document shows a part of a video, but mm1_mlx reads whole ones. Leave "
            "this task out."
        )
    place = _named(visual)
    if place is None or visual.get("type") == "audio":
        raise MM1Error(
            f"A document has a visual with {', '.join(map(str, visual))}, but mm1_mlx "
            f"takes pictures and videos only. Leave this task out."
        )
    return place


def _named(visual: dict[str, Any]) -> Any:
    return visual.get("url") or visual.get("path")


def _is_video(place: str | Path) -> bool:
    return Path(place).suffix.lower().lstrip(".") not in ENDINGS
