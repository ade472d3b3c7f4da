"""Pictures that stay on the disk until somebody looks at them, for sets that no memory holds::

    paths, labels = read_list("ImageNet_LT_train.txt")    # lines: train/n01440764/n01440764_762.JPEG 0
    check_files(ImageFiles("/data/imagenet", paths))      # every file is opened once, before anything trains

An `ImageFiles` stands where an array of images stands: it has a length, is cut by an index array or a slice, and gives
its pictures one by one.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mllmfl_lite.repro import count_cores, progress_bar, write_atomically, write_json

MAX_PIXELS = 64_000_000  # 8,000 x 8,000; a 20,000 x 20,000 picture would take 1.2 GB
MIN_SIDE = 8
SHOWN = 10  # bad files named in an error; the list beside has all


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


@dataclass(frozen=True)
class ImageFiles:
    """Pictures in files below one folder.

    Attributes:
        root: the folder.
        paths: of the files below it, str (N,).
        size: pixels a side of the squares that training and testing see.
    """

    root: Path
    paths: np.ndarray
    size: int = 224

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel; got {self.size}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, chosen: int | slice | np.ndarray) -> Image.Image | ImageFiles:
        """The picture at a number, RGB, or the files at a slice or an index array.

        Raises:
            BadPictureError: the picture is gone or damaged.
        """
        if isinstance(chosen, (int, np.integer)):
            return open_picture(Path(self.root) / self.paths[chosen], self.paths[chosen])
        return ImageFiles(self.root, self.paths[chosen], self.size)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[i] for i in range(len(self)))

    def digest(self) -> bytes:
        """What tells two sets of files apart: names and the size they are looked at. Contents are not read."""
        return f"{self.size}\n".encode() + "\n".join(self.paths.tolist()).encode()


def read_list(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Paths, str (N,), and labels, int64 (N,), of a list file: a line ``path label`` each, in the file's order.

    Raises:
        DataError: no such file, no lines, or a line of another form, which is named with its number.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list {path} cannot be read ({error}); put it there") from error
    pairs = [line.rsplit(maxsplit=1) for line in lines]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2 or not pair[1].isascii() or not pair[1].isdigit() or len(pair[1]) > 9:
            raise DataError(
                f"line {number} of {path} must be a path and a class number, as in "
                f"'train/n01440764/n01440764_762.JPEG 0'; it is {lines[number - 1][:100]!r}"
            )
    if not pairs:
        raise DataError(f"the list {path} has no lines; fetch it again")
    paths, labels = zip(*pairs, strict=True)
    return np.array(paths), np.array(labels, dtype=np.int64)


def check_files(files: ImageFiles, workers: int | None = None) -> None:
    """Open every picture once, all of it. What was found good is remembered until a file changes.

    Args:
        files: the pictures.
        workers: threads; default one a core.

    Raises:
        DataError: how many are missing or cannot be read, the first of them by name, and the file that lists all.
    """
    root = Path(files.root)
    stamp = root / ".checked.json"
    known, key = _known(stamp), _state(files)
    if key in known:
        return
    with (
        ThreadPoolExecutor(workers or count_cores()) as pool,
        progress_bar(len(files), "picture", f"checking {root.name}") as bar,
    ):
        bad = []
        for trouble in pool.map(lambda name: _trouble(root, name), files.paths):
            bar.update()
            bad += [trouble] if trouble else []
    if bad:
        raise DataError(_report(bad, len(files), root))
    _try_to(write_json, stamp, [*known, key])


def _report(bad: list[str], total: int, root: Path) -> str:
    listed = root / "bad_files.txt"
    kept = _try_to(write_atomically, listed, ("\n".join(bad) + "\n").encode())
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return (
        f"{len(bad)} of {total} pictures below {root} are missing or cannot be read: {'; '.join(bad[:SHOWN])}{more}. "
        f"Put the originals there, or take their lines out of the list"
        + (f"; all of them stand in {listed}" if kept else "")
    )


def _trouble(root: Path, name: str) -> str:
    if not (root / name).exists():
        return f"{name} is missing"
    try:
        open_picture(root / name, name)
    except BadPictureError as error:
        return str(error)
    return ""


def _state(files: ImageFiles) -> str:
    """A checksum over names, sizes and times of change."""
    digest = hashlib.sha256()
    for path in files.paths:
        try:
            found = (Path(files.root) / path).stat()
            digest.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path} missing\n".encode())
    return digest.hexdigest()


def _known(stamp: Path) -> list[str]:
    try:
        return list(json.loads(stamp.read_text()))
    except (OSError, ValueError, TypeError):
        return []


def _try_to(write, path: Path, content) -> bool:
    """Whether it could be written; a data folder may well be read-only."""
    try:
        write(path, content)
    except OSError:
        return False
    return True
