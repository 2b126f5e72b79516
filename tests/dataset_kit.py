"""What tiny made-up datasets are made of; their pictures have one colour."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from helpers import need
from mm1_mlx.evaluation.samples import Sample
from mm1_mlx.inputs.images import load_image

COLOURS = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 128, 0): "green"}


def png(colour: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    """A picture's bytes."""
    held = io.BytesIO()
    Image.new("RGB", size, colour).save(held, "PNG")
    return held.getvalue()


def put(folder: Path, name: str, content: Any = "red") -> Path:
    """A file: bytes, what is written as JSON, or a picture of a colour."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str) and path.suffix in (".jpg", ".png", ".jpeg"):
        content = png(content)
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    path.write_bytes(content)
    return path


def lines(rows: Sequence[Any]) -> str:
    """A JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def colour(sample: Sample, which: int = 0) -> str:
    """What a sample's picture shows, read as the processor reads it."""
    return COLOURS[load_image(sample.images[which]).getpixel((0, 0))]  # type: ignore


def cell(colour: str = "red", path: str | None = None) -> dict[str, Any]:
    """A picture as the hub's tables hold it."""
    return {"bytes": png(colour), "path": path}


def write_table(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """A parquet file as the hub has: pictures are {"bytes", "path"}."""
    arrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])

    def kind(name: str) -> Any:
        values = [row.get(name) for row in rows]
        some = next((v for v in values if v not in (None, [])), None)
        inner = some[0] if isinstance(some, list) else some
        if not (isinstance(inner, dict) and "bytes" in inner):
            return None
        return arrow.list_(picture) if isinstance(some, list) else picture

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {
        name: arrow.array([row.get(name) for row in rows], kind(name)) for name in names
    }
    parquet.write_table(arrow.table(columns), path, **settings)
    return path
