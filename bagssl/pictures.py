"""One picture in a file, of whatever format and mode, becomes 8-bit RGB pixels."""

import contextlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bagssl.catalogue import refusal
from bagssl.errors import InputError

_TIFF_BITS, _TIFF_KIND = 258, 262  # tags: bits of a sample; 0 where white is zero


def read(path: Path, size: int | None) -> np.ndarray | InputError:
    """One picture as uint8 [3, H, W], its centred square at `size` px if one is given; or why it cannot be read."""
    try:
        with open(path, "rb") as stream, Image.open(stream) as image:  # what Pillow opens by name, it may turn wrong
            depth, white_is_zero = _as_stored(image)
            image.load()
            image = rgb(_upright(image), image.format, depth, white_is_zero)
    except Exception as error:  # noqa: BLE001 - decoders meet bad bytes with errors of every kind
        return refusal(f"{path} cannot be read as an image ({error or type(error).__name__})")
    return np.asarray(fit(image, size)).transpose(2, 0, 1)


def fit(image: Image.Image, size: int | None) -> Image.Image:
    """Its centred square, resampled (bicubic, antialiased) to size×size px; without a size the image itself."""
    if size is None:
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _as_stored(image: Image.Image) -> tuple[int, bool]:
    """Bits of a deep grey, and whether white is its zero: Pillow gives them as they stand in the file.

    A PNG's transparent grey is brought to the eight bits of its pixels. What is not read rightly raises ValueError.
    """
    raw = image.tile[0].args if image.format == "PNG" and image.tile else None
    if raw == "RGB;16B" and "transparency" in image.info:  # Pillow keeps eight bits, and the colour has sixteen
        raise ValueError("one of its 16-bit colours is transparent: save it with an alpha channel")
    if raw in ("L;2", "L;4") and "transparency" in image.info:
        most = 2 ** int(raw[-1]) - 1
        image.info["transparency"] = (image.info["transparency"] & most) * 255 // most
    tags = getattr(image, "tag_v2", {})
    return tags.get(_TIFF_BITS, (16,))[0], tags.get(_TIFF_KIND) == 0


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF says it is to be seen; what else stands there, and whether it is sound, is no matter."""
    with contextlib.suppress(Exception):
        image.getexif()  # read, and then kept from being written again
        for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
            image.info.pop(name, None)
        image = ImageOps.exif_transpose(image)
    return image


def rgb(image: Image.Image, kind: str | None, depth: int = 16, white_is_zero: bool = False) -> Image.Image:
    """An image of any mode in 8-bit RGB; kind: of its file; depth and white_is_zero: of a deep grey."""
    if image.mode.startswith("I;16") or image.mode == "I" and kind in ("PNG", "PPM"):  # of their 32 bits 16 are used
        deep = np.asarray(image)
        grey = (deep >> depth - 8).astype(np.uint8)
        grey[deep == image.info.get("transparency", -1)] = 255
        return Image.fromarray(255 - grey if white_is_zero else grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, or a sign; 8 and 16 bits without one are read")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
