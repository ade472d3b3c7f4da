"""Open one image file as RGB, whatever its format, depth, orientation or metadata."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 64_000_000  # 8,000 x 8,000
MIN_SIDE = 8
MAX_RATIO = 50  # of the longer side to the shorter
PNG = b"\x89PNG\r\n\x1a\n"
SIGNATURES = (b"\xff\xd8\xff", PNG, b"GIF8", b"BM", b"II*\0", b"MM\0*")
TURNS = {  # EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(content: bytes | Path, name: str) -> Image.Image:
    """Open an image as upright RGB. Transparent pixels become white; 16-bit and float grey is scaled to 0..255.

    Args:
        content: the file, or its bytes.
        name: used in messages.

    Raises:
        ValueError: unreadable, truncated, tiny, oversized, very thin, or with pixels that are not numbers.
    """
    try:
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        with Image.open(io.BytesIO(_without_text(data))) as image:
            _check_size(*image.size, name)
            turned = TURNS.get(_orientation(image))
            rgb = _as_rgb(image)
        return rgb.transpose(turned) if turned is not None else rgb
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f"{name} cannot be read as an image ({type(error).__name__}: {error})") from error


class _Refused(ValueError):
    """A rule of ours, not a decoder's error."""


def _check_size(width: int, height: int, name: str) -> None:
    size = f"{name} has {width} x {height} pixels"
    if width * height > MAX_PIXELS:
        raise _Refused(f"{size}, more than {MAX_PIXELS:,}; make it smaller first")
    if min(width, height) < MIN_SIDE:
        raise _Refused(f"{size}; at least {MIN_SIDE} a side are needed")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise _Refused(f"{size}; the longer side may be at most {MAX_RATIO} times the shorter, so crop it first")


def _without_text(data: bytes) -> bytes:
    """Drop a PNG's text chunks: they may hold megabytes that a decoder refuses to unpack."""
    if not data.startswith(PNG):
        return data
    kept, place = [PNG], len(PNG)
    while place + 8 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        end = place + 12 + length
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if the metadata is broken."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata raises many kinds, and the pixels are whole
        return 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit or float grey, from darkest to brightest; a transparent value becomes white."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite numbers")
    low, high = values.min(), values.max()
    grey = ((values - low) * (255 / max(1e-6, high - low))).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = np.where(values == clear, 255, grey).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def is_picture(path: Path) -> bool:
    """Return True if the file begins as an image does."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError:
        return False
    return start.startswith(SIGNATURES) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP") or start[4:8] == b"ftyp"


def as_pil(image: Image.Image | np.ndarray) -> Image.Image:
    """Return a uint8 array (H, W, 3) or PIL image as an RGB PIL image."""
    return image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
