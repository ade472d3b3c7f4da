"""Pictures that stay on the disk until somebody looks at them, for sets that no memory holds::

    paths, labels = read_list("ImageNet_LT_train.txt")    # lines: train/n01440764/n01440764_762.JPEG 0
    check_files(ImageFiles("/data/imagenet", paths))      # every file is opened once, before anything trains

An `ImageFiles` stands where an array of images stands: it has a length, is cut by an index array or a slice, and gives
its pictures one by one.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000  # 8,000 x 8,000; a 20,000 x 20,000 picture would take 1.2 GB


MIN_SIDE = 8


class DataError(RuntimeError):
    """Images are missing, damaged, or not what they should be; the message says what to put where."""


class BadPictureError(ValueError):
    """A picture, or the place where pictures should be, cannot be used; the message names it and says why."""


def open_picture(content: bytes | Path, name: str) -> Image.Image:
    """A picture as RGB, upright: CMYK and grey are converted, transparency is laid on white.

    Args:
        content: the file, or its bytes.
        name: what to call it in messages.

    Raises:
        BadPictureError: not a picture, cut off, larger than `MAX_PIXELS`, or smaller than `MIN_SIDE` a side.
    """
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadPictureError(
                    f"{name} has {width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller first"
                )
            if min(width, height) < MIN_SIDE:
                raise BadPictureError(
                    f"{name} has {width} x {height} pixels; {MIN_SIDE} a side are needed to see anything"
                )
            return _as_rgb(ImageOps.exif_transpose(image))
    except BadPictureError:
        raise
    except Image.DecompressionBombError as error:
        raise BadPictureError(f"{name} has too many pixels ({error}); make it smaller first") from error
    except Exception as error:  # Pillow's decoders raise a great many kinds
        raise BadPictureError(f"{name} is no whole picture ({type(error).__name__}: {error})") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits of grey: from darkest to brightest
        image = image.convert("F")
        low, high = image.getextrema()
        image = image.point(lambda v: v * (255 / max(1e-6, high - low)) - low * 255 / max(1e-6, high - low)).convert(
            "L"
        )
    return image.convert("RGB")


def as_pil(image) -> Image.Image:
    """A picture of either kind, uint8 array (H, W, 3) or PIL image, as a PIL image."""
    return image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
