"""Photos as people hold them: cameras store them as they were held themselves."""

from PIL import Image

# EXIF orientation -> how to turn the stored picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of a picture's info, what Image.getexif reads the orientation from.
_SAID_IN = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says; broken EXIF data is no reason to fail.

    What was turned says so no more, for it may come here again.
    """
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {k: v for k, v in turned.info.items() if k not in _SAID_IN}
    return turned
