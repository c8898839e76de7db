"""One picture in a file, of whatever format and mode, becomes 8-bit RGB pixels."""

import contextlib
import errno
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bagssl.catalogue import one_line, refusal, root_of
from bagssl.errors import InputError
from bagssl.paths import write_text

SPARE = 2  # pixels of a reduced JPEG for each that is asked for: with fewer a decoder's way to reduce shows
NAMED = 6  # pictures that cannot be read, in a line
_TIFF_BITS, _TIFF_KIND = 258, 262  # tags: bits of a sample; 0 where white is zero
_ORIENTATION = 274  # in EXIF
_LACKING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def read(path: Path, size: int | None, reduced: bool = False) -> np.ndarray | InputError:
    """One picture as uint8 [3, H, W], its centred square at `size` px if one is given; or why it cannot be read.

    reduced: a JPEG may be decoded at a half, a quarter or an eighth, which takes less time, where `SPARE` times `size`
    px are left. What that leaves out is finer than `size` px can show: a photo becomes the same but for rounding.
    """
    try:
        with open(path, "rb") as stream, Image.open(stream) as image:  # what Pillow opens by name, it may turn wrong
            depth, white_is_zero = _as_stored(image)
            square = _reduce(image, size) if reduced and size else None
            image.load()
            image = rgb(_upright(image), image.format, depth, white_is_zero)
    except Exception as error:  # decoders meet bad bytes with errors of every kind
        if isinstance(error, OSError) and error.errno in _LACKING:  # then it is not the picture that is to be left out
            raise
        return refusal(f"{path} cannot be read as an image ({error or type(error).__name__})")
    return np.asarray(fit(image, size, square)).transpose(2, 0, 1)


def fit(image: Image.Image, size: int | None, square: tuple[float, ...] | None = None) -> Image.Image:
    """Its centred square, resampled (bicubic, antialiased) to size×size px; without a size the image itself.

    square: another box to take (left, top, right, bottom, in px).
    """
    if size is None:
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC, box=square or _square(*image.size))


def _square(width: int, height: int) -> tuple[int, int, int, int]:
    """The box of the centred square: left, top, right, bottom."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _reduce(image: Image.Image, size: int) -> tuple[float, ...] | None:
    """Have a JPEG decoded at the least scale at which `SPARE` times `size` px are left: its square, in the new pixels.

    None for what is decoded as it is: other formats, and what is to be turned.
    """
    width, height = image.size
    if image.format not in ("JPEG", "MPO") or _is_turned(image):
        return None
    drafted = image.draft(None, (SPARE * size,) * 2)
    if not drafted:
        return None
    # its last row or column may hold but a part of a pixel: the box counts in parts, so that the square is the same
    scale = width / drafted[1][2]
    return tuple(edge / scale for edge in _square(width, height))


def _is_turned(image: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # see `_upright`
        return image.getexif().get(_ORIENTATION, 1) != 1
    return False


def _as_stored(image: Image.Image) -> tuple[int, bool]:
    """Bits of a deep grey, and whether white is its zero: Pillow gives them as they stand in the file.

    A PNG's transparent grey is brought to the eight bits of its pixels. What is not read rightly raises ValueError.
    """
    raw = image.tile[0][3] if image.format == "PNG" and image.tile else None  # older Pillows have tuples without names
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
        image = ImageOps.exif_transpose(image) if _is_turned(image) else image  # which would copy it
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
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Around the reading of pictures: what would decompress to more than Pillow deems safe is not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # of odd EXIF data
        yield


# What is said of those that cannot be read


def listing(name: str, root: Path | None) -> Path:
    """The file that names the pictures of a dataset which cannot be read, beside its cache."""
    return root_of(root) / f"{name}.unreadable.txt"


def skip_unreadable(wrong: Sequence[tuple[str, str]], beside: Path, skip: bool) -> str:
    """Half a line on the pictures that cannot be read, each given by its name and the reason, and left out.

    All of them are named in the file `beside`, on each line one and the reason, by a tab. Raises InputError, which
    names the first, unless they are to be skipped.
    """
    if skip and not wrong:
        beside.unlink(missing_ok=True)
    if not wrong:
        return ""
    if skip or len(wrong) > NAMED:
        write_text(beside, "".join(f"{one_line(name)}\t{one_line(reason)}\n" for name, reason in wrong))
    if skip:
        return f"; {len(wrong):,} that cannot be read are left out, and named in {beside}"
    others = ", ".join([*(name for name, _ in wrong[1:NAMED]), *["..."] * (len(wrong) > NAMED)])
    more = f", nor can {len(wrong) - 1:,} more ({others})" if others else ""
    where = f"; all of them stand in {beside}" if len(wrong) > NAMED else ""
    them = "them" if more else "it"
    raise refusal(f"{wrong[0][1]}{more}{where}: replace or remove {them}, or leave {them} out by --skip-unreadable")


def check_left(classes: Sequence[str], split: str, counts: Sequence[int]) -> None:
    """Raises InputError for a class of which no picture could be read."""
    for label, count in zip(classes, counts, strict=True):
        if not count:
            raise refusal(f"no {split} image of the class {label!r} can be read: replace them, or leave the class out "
                          "by --classes")
