"""Open one image file as RGB, whatever its format, depth, orientation or metadata."""

import contextlib
import io
import re
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000  # 8,000 x 8,000
MAX_BYTES = 1_000_000_000
MIN_SIDE = 8
MAX_RATIO = 50  # of the longer side to the shorter
PNG = b"\x89PNG\r\n\x1a\n"
KNOWN = ("JPEG", "PNG", "GIF", "TIFF", "JPEG2000", "BMP", "WEBP", "AVIF")  # formats that begin as no other file does


def open_picture(content: bytes | Path, name: str) -> Image.Image:
    """Open an image file, or its bytes, as upright RGB, the first frame if it moves; `name` is used in messages.

    Transparent pixels become white. 16-bit, 32-bit and float grey is scaled from darkest to brightest.

    Raises:
        ValueError: unreadable, truncated, tiny, oversized, very thin, or with pixels that are not numbers.
    """
    name = printable(name)
    try:
        data = content if isinstance(content, bytes) else _read(content)
        with Image.open(io.BytesIO(_without_metadata(data))) as image:
            _check(image)
            image.load()
            with contextlib.suppress(Exception):  # broken metadata raises many kinds, and the pixels are whole
                ImageOps.exif_transpose(image, in_place=True)
            if data.startswith(PNG):
                _mend_transparency(image, depth=data[24])
            return _as_rgb(image)
    except _Refused as error:
        raise ValueError(f"{name} {error}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} cannot be read as an image ({len(data):,} bytes of no known format)") from None
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f"{name} cannot be read as an image ({type(error).__name__}: {error})") from error


class _Refused(ValueError):
    """A rule of ours, not a decoder's error."""


def printable(name: str | Path) -> str:
    """The name with line breaks, and bytes that are no UTF-8, escaped."""
    return repr(str(name))[1:-1]


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise _Refused("is not a regular file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise _Refused(f"has {size:,} bytes, more than {MAX_BYTES:,}; make it smaller first")
    return path.read_bytes()


def _check(image: Image.Image) -> None:
    width, height = image.size
    if image.format == "EPS":
        raise _Refused("is a PostScript program; convert it to PNG first")
    if width * height > MAX_PIXELS:
        raise _Refused(f"has {width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller first")
    if min(width, height) < MIN_SIDE:
        raise _Refused(f"has {width} x {height} pixels; at least {MIN_SIDE} a side are needed")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise _Refused(f"has {width} x {height} pixels; sides may differ {MAX_RATIO}-fold at most: crop it first")


def _without_metadata(data: bytes) -> bytes:
    """Drop what may be broken or huge and makes no pixel: a PNG's texts and profile, a JPEG's index of more images."""
    if data.startswith(b"\xff\xd8"):
        return re.sub(rb"(\xff\xe2..)MPF\0", rb"\1none", data, count=1, flags=re.DOTALL)
    if not data.startswith(PNG):
        return data
    kept, place = [PNG], len(PNG)
    while place + 8 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind = data[place + 4 : place + 8]
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):  # critical chunks begin with a capital
            kept.append(data[place : place + 12 + length])
        place += 12 + length
    return b"".join(kept)


def _mend_transparency(image: Image.Image, depth: int) -> None:
    """Pillow scales a PNG's pixels to 8 bits, but not its transparent colour."""
    colour = image.info.get("transparency")
    if image.mode in ("1", "L") and isinstance(colour, int) and depth < 8:
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    if image.mode == "RGB" and isinstance(colour, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise _Refused("has pixels that are not finite numbers")
    colour = image.info.get("transparency")
    clear = values == colour if isinstance(colour, int) else np.zeros(values.shape, bool)
    seen = values[~clear]
    low, high = (seen.min(), seen.max()) if seen.size else (0.0, 0.0)
    if low < high:
        values = (values - low) / (high - low) * 255
    elif image.mode.startswith("I;16"):
        values /= 257
    values[clear] = 255
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8)).convert("RGB")


def is_picture(path: str | Path) -> bool:
    """Return True if the file begins as an image of a usual format does; no pixel is read."""
    try:
        Image.open(path, formats=KNOWN).close()
    except OSError:
        return False
    except Exception:  # of a decoder that knows the file, and stumbles over its metadata
        return True
    return True


def as_pil(image: Image.Image | np.ndarray) -> Image.Image:
    """Return a uint8 array (H, W, 3) or PIL image as an RGB PIL image; transparent pixels become white."""
    return _as_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))
