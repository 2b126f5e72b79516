"""Pictures: file, bytes, array or address -> RGB image -> pixels for the encoder.

What happens to a picture on the way to RGB: EXIF rotation is applied, transparency is
laid over white, 16-bit grey is rounded to 8 bits, an animation gives its first frame.
Colour profiles are ignored, as the processors of the checkpoints ignore them.
"""

import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image

from mm1_mlx.errors import ImageError
from mm1_mlx.inputs.orientation import upright
from mm1_mlx.inputs.settings import CLIP_MEAN, CLIP_STD, RESIZE_MODES, ImageSettings
from mm1_mlx.inputs.sources import MAX_BYTES, read_source

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "MAX_PIXELS",
    "RESIZE_MODES",
    "ImageSettings",
    "fit",
    "image_size",
    "load_image",
    "pixels",
    "resize",
]

MAX_PIXELS = 64_000_000
# No step of a resize makes more pixels than this at once (4 bytes each in Pillow).
MAX_STEP = 100_000_000
# Pixels of what is copied of a large picture at once. (Small parts are also faster:
# their memory is used again. 12 megapixels copied for the GPU: 12 ms for 75.)
STRIP = 1_000_000
_PILLOW_LIMIT = threading.Lock()  # held while Pillow's global limit is another

# Pillow's plugins, by what the file starts with: only these formats are ever opened.
_PLUGINS = {
    "PNG": "PngImagePlugin",
    "JPEG": "JpegImagePlugin",  # also MPO, the two-picture JPEG of some phones
    "WEBP": "WebPImagePlugin",
    "GIF": "GifImagePlugin",
    "BMP": "BmpImagePlugin",
    "TIFF": "TiffImagePlugin",
    "PPM": "PpmImagePlugin",
    "ICO": "IcoImagePlugin",
    "AVIF": "AvifImagePlugin",
}
_READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, ICO, AVIF and HEIC"

# Things people take for pictures, for a message that says what the file is.
_OTHERS = (
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript file"),
    (b"8BPS", "a Photoshop file"),
    (b"PK\x03\x04", "a zip archive or office document"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL picture"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 picture"),
    (b"\x1aE\xdf\xa3", "a video"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
_HEIF_BRANDS = _HEIC_BRANDS | {b"mif1", b"msf1", b"mif2"}


def file_format(data: bytes) -> str | None:
    """The format that the first bytes name, or None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM":
        return "BMP"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if data[:1] == b"P" and data[1:2] in b"1234567fF" and data[2:3].isspace():
        return "PPM"
    if data[:4] == b"\0\0\1\0":
        return "ICO"
    if data[4:8] == b"ftyp":
        size = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[8:12], *(data[i : i + 4] for i in range(16, size, 4))}
        if data[8:12] in _HEIC_BRANDS:
            return "HEIF"
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & _HEIF_BRANDS:
            return "HEIF"
    return None


def _not_an_image(data: bytes, name: str) -> ImageError:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = next((what for start, what in _OTHERS if data.startswith(start)), None)
    if found is None and data[4:8] == b"ftyp":
        found = "a video"
    if found is None and (head.startswith(b"<svg") or b"<svg" in head):
        found = "an SVG drawing"
    if found is None and head.startswith((b"<!doctype html", b"<html")):
        found = "a web page"
    if found is None:
        found = "not an image, or of a format that is not read"
    return ImageError(
        f"{name} is {found}. Readable are {_READABLE}: export it as PNG or JPEG."
    )


def check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    """ImageError for a picture of no pixels, or of more than `max_pixels`."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height}: it holds no pixels.")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width}x{height}, {width * height:,} pixels, but at most "
            f"{max_pixels:,} are decoded. Make it smaller, or allow it with "
            f"--max-image-pixels {width * height} (max_pixels=...)."
        )


def _decode_heif(data: bytes, max_pixels: int, name: str) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError(
            f"{name} is a HEIC picture, and reading it needs one more package: "
            f"pip install 'mm1_mlx[heic]'"
        ) from error
    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
    check_size(file.size, max_pixels, name)
    return file.to_pillow()  # libheif has turned it upright already


def _open(kind: str, data: bytes) -> Image.Image:
    """The header of a picture, read by the one plugin of its format.

    The plugin is called directly: Image.open would import every plugin for the rarer
    formats, and applies a limit that is a global of Pillow and not the caller's.
    """
    from importlib import import_module

    import_module(f"PIL.{_PLUGINS[kind]}")
    return Image.OPEN[kind][0](io.BytesIO(data), "")


@contextmanager
def _pillow_allows(max_pixels: int) -> Iterator[None]:
    """Let Pillow's own limit be `max_pixels`, where the caller asked for more than it.

    The plugins of WebP and TIFF check a global of Pillow, which no argument reaches.
    It is raised for one picture, and never where nobody gave a limit: MAX_PIXELS.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if max_pixels == MAX_PIXELS or limit is None or max_pixels <= limit:
        yield
        return
    with _PILLOW_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _over_pillows_limit(error: Exception, name: str) -> ImageError:
    count = re.search(r"\((\d+) pixels\)", str(error))
    pixels = f"{int(count[1]):,} pixels" if count else "too many pixels"
    asked = count[1] if count else "N"
    return ImageError(
        f"{name} has {pixels}, over Pillow's own limit (PIL.Image.MAX_IMAGE_PIXELS). "
        f"Make it smaller, or allow it with --max-image-pixels {asked} "
        f"(max_pixels=...)."
    )


def _decode(
    data: bytes, name: str, max_pixels: int, load: Callable | None = None
) -> list[Image.Image]:
    """The first frame of a picture file, or what `load` takes of it; upright, in the
    mode it is stored in."""
    kind = file_format(data)
    if kind is None:
        raise _not_an_image(data, name)
    try:
        if kind == "HEIF":
            return [_decode_heif(data, max_pixels, name)]
        if kind == "AVIF":
            from PIL import features

            if not features.check("avif"):
                raise ImageError(
                    f"{name} is an AVIF picture, which this Pillow cannot read: "
                    f"pip install --upgrade pillow"
                )
        with _pillow_allows(max_pixels):
            image = _open(kind, data)
            check_size(image.size, max_pixels, name)
            frames = [image] if load is None else load(image)
            image.load()
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # WebP and TIFF check before us
        raise _over_pillows_limit(error, name) from error
    # Broken files make decoders raise nearly anything: OSError, SyntaxError, EOFError,
    # struct.error, zlib.error, IndexError, OverflowError, ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"{name} is a damaged or cut off {kind} file ({reason[:120]}). Save or "
            f"download it again."
        ) from error
    return [upright(frame) for frame in frames]


def _deep_grey(image: Image.Image, name: str) -> Image.Image:
    """16-bit, 32-bit and floating-point grey as 8-bit grey.

    Whole numbers up to 65535 are 16-bit grey; floats in 0..1 or 0..255 are taken as
    such; any other range is stretched from its lowest to its highest value.
    """
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    else:
        values = values.astype(np.int64)
    low, high = values.min(), values.max()
    if image.mode == "F" and low >= 0 and high <= 1:
        grey = values * 255
    elif image.mode == "F" and low >= 0 and high <= 255:
        grey = values
    elif image.mode != "F" and low >= 0 and high <= 65535:
        grey = values / 257
    else:
        grey = (values - low) * (255 / max(high - low, 1e-30))
    result = Image.fromarray(np.floor(grey + 0.5).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # a 16-bit PNG can name one value as transparent
        mask = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        result = Image.merge("LA", (result, mask))
    return result


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any mode as RGB, transparency over white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        image = _deep_grey(image, name)
    try:
        clear = image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
        if clear or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(image.convert("RGB"), mask=image.getchannel("A"))
            return white
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"{name} has the colour mode {image.mode}, which cannot be turned into "
            f"RGB. Export it as PNG or JPEG."
        ) from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shape = array.shape
    if array.dtype != np.uint8:
        raise ImageError(
            f"{name} has the type {array.dtype}, but uint8 values from 0 to 255 were "
            f"expected. For floats from 0 to 1: (array * 255).round().astype('uint8')."
        )
    if array.ndim == 3 and shape[-1] == 1:
        array = array[..., 0]
    channels = array.shape[2:] or (1,)
    if array.ndim not in (2, 3) or channels[0] not in (1, 3, 4) or not array.size:
        raise ImageError(
            f"{name} has the shape {shape}, but (H, W, 3), (H, W, 4) or (H, W) was "
            f"expected: one picture, colours last."
        )
    return Image.fromarray(np.ascontiguousarray(array))


def load_image(
    source: Any,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    allow_url: bool = False,
) -> Image.Image:
    """The picture as an RGB image, upright, its first frame, transparency over white.

    source: a path (as a terminal pastes it), file:// or data: URL, https:// URL with
    allow_url, bytes, an open binary file, a PIL image, or a NumPy or MLX array of
    uint8 in (H, W, 3), (H, W, 4) or (H, W). Float arrays are refused, because 0..1 and
    0..255 cannot be told apart for a dark picture.
    max_pixels: checked on the header, before anything is decoded.

    Raises ImageError, in one line, for everything that is not a whole picture.
    """
    if isinstance(source, Image.Image):
        name = "The given PIL image"
        check_size(source.size, max_pixels, name)
        try:
            source.load()
        except Exception as error:
            raise ImageError(f"{name} cannot be loaded: {error}") from error
        image = _to_rgb(upright(source), name)
        return image.copy() if image is source else image
    is_mlx = type(source).__module__.partition(".")[0] == "mlx"
    if isinstance(source, np.ndarray) or is_mlx:
        name = "The given array"
        if is_mlx and str(source.dtype) != "mlx.core.uint8":
            raise ImageError(
                f"{name} has the type {source.dtype}, but uint8 values from 0 to 255 "
                f"were expected. For floats from 0 to 1: (array * 255).round()."
                f"astype(mx.uint8)."
            )
        image = _from_array(np.asarray(source), name)
        check_size(image.size, max_pixels, name)
        return _to_rgb(image, name)
    data, name = read_source(source, allow_url=allow_url, max_bytes=max_bytes)
    return decoded(data, name, max_pixels)


def decoded(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As load_image, of what read_source gave."""
    return _to_rgb(_decode(data, name, max_pixels)[0], name)


def decoded_frames(
    data: bytes, name: str, max_pixels: int, load: Callable
) -> list[Image.Image]:
    """As `decoded`: the frames that `load` takes of what Pillow opened."""
    return [_to_rgb(each, name) for each in _decode(data, name, max_pixels, load)]


def is_decoded(source: Any) -> bool:
    """Whether a source is a picture's pixels, not a file of it in some format."""
    is_mlx = type(source).__module__.partition(".")[0] == "mlx"
    return is_mlx or isinstance(source, (Image.Image, np.ndarray))


def image_size(source: Any) -> tuple[int, int]:
    """Width and height that `load_image` gives, from the header where that tells it.

    Raises ImageError as `load_image` does, but not for what is broken further on.
    """
    if isinstance(source, (str, bytes, PathLike)):
        data, name = read_source(source)
        # Whether a TIFF's size is given upright differs by Pillow's version.
        if (kind := file_format(data)) in _PLUGINS and kind != "TIFF":
            try:
                image = _open(kind, data)
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            except Exception:
                return load_image(source).size  # it says what is wrong
            check_size(image.size, MAX_PIXELS, name)
            width, height = image.size
            return (height, width) if turned else (width, height)
    return load_image(source).size


def _check_step(image: Image.Image, width: int, height: int) -> None:
    if width * height > MAX_STEP:
        raise ImageError(
            f"A picture of {image.width}x{image.height} is too long on one side to be "
            f"resized: cut it into parts first."
        )


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture in a new size, by Pillow's antialiased 8-bit bicubic filter.

    Two calls, one axis each, horizontal first: Pillow before version 13 does so inside
    one call, Pillow 13 chooses the order by the sizes (its pull request 9549), and
    the order changes pixels. So the result does not depend on the installed version.
    """
    _check_step(image, width, image.height)
    _check_step(image, width, height)
    bicubic = Image.Resampling.BICUBIC
    if image.width != width:
        image = image.resize((width, image.height), bicubic)
    if image.height != height:
        image = image.resize((width, height), bicubic)
    return image


def _fit_crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest side to `size`, then the middle square.

    The long side is int(size * long / short) and the offset is floored: so does
    transformers' CLIP processor; rounding either moves the picture by a pixel.
    """
    short, long = sorted(image.size)
    long = size * long // short
    start = (long - size) // 2
    width, height = image.size
    if width >= height:
        _check_step(image, long, height)
        row = image.resize((long, height), Image.Resampling.BICUBIC)
        return resize(row.crop((start, 0, start + size, height)), size, size)
    if size * long <= MAX_STEP:
        return resize(image, size, long).crop((0, start, size, start + size))
    # A sliver: only the part that is kept is computed. The filter is the same, its
    # position is a 32-bit float inside Pillow.
    column = resize(image, size, height)
    scale = height / long
    box = (0, start * scale, size, (start + size) * scale)
    return column.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _fit_pad(image: Image.Image, size: int, color: tuple[int, int, int]) -> Image.Image:
    """Padded to a square, then resized; exactly so, but without the square.

    A 1x20000 picture would need a canvas of 400 million pixels. The horizontal pass
    works on single rows, so rows can be padded and resized in strips.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    _check_step(image, size, side)
    narrow = Image.new("RGB", (size, side), color)
    if width == side:
        narrow.paste(resize(image, size, height), (0, top))
        return resize(narrow, size, size)
    rows = max(STRIP // side, 1)
    for start in range(0, height, rows):
        strip = Image.new("RGB", (side, min(rows, height - start)), color)
        strip.paste(image, (left, -start))
        narrow.paste(resize(strip, size, strip.height), (0, top + start))
    return resize(narrow, size, size)


def fit(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """The RGB picture as a square of settings.size pixels, by settings.resize_mode."""
    size = settings.size
    if image.mode != "RGB":
        image = _to_rgb(image, "The given PIL image")
    if settings.resize_mode == "squash":
        return resize(image, size, size)
    if settings.resize_mode == "crop":
        return _fit_crop(image, size)
    return _fit_pad(image, size, settings.pad_color)


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """Normalised pixels (H, W, 3) float32, H = W = settings.size.

    (value / 255 - mean) / std, from a table of 256 values per channel.
    """
    return normalised(fit(image, settings), settings)


def normalised(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """An RGB picture's values as the encoder wants them. (H, W, 3) float32."""
    values, table = np.asarray(image), levels(settings)
    # By channel: four times as fast as one look-up by value and channel.
    channels = [table[:, c].take(values[..., c]) for c in range(3)]
    return np.stack(channels, axis=-1)


def levels(settings: ImageSettings) -> np.ndarray:
    """What each 8-bit value of each channel becomes. (256, 3) float32."""
    values = np.arange(256)[:, None] / 255
    mean, std = np.array(settings.image_mean), np.array(settings.image_std)
    return ((values - mean) / std).astype(np.float32)
