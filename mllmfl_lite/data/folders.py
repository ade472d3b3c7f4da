"""Images in the user's own folders: where they are, lists of them, folders as unlabelled sets."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np

from mllmfl_lite.data.images import UNLABELLED, ImageFiles, ImageSet
from mllmfl_lite.data.pictures import is_picture

FOLDER_VARIABLE = "MLLMFL_DATA"
ENDINGS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
SHOWN = 10  # files named in a message


def data_folder() -> Path:
    """The folder of full data sets: ``$MLLMFL_DATA``, or one in the user's cache.

    Raises:
        ValueError: the variable names no folder.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if not chosen:
        return Path.home() / ".cache" / "mllmfl_lite"
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{FOLDER_VARIABLE}={chosen} is not a folder; create it, or unset the variable")
    return folder


def find_folder(name: str) -> Path:
    """A folder by its path, or by its name in `data_folder`."""
    return Path(name) if Path(name).is_dir() else data_folder() / name


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file (UTF-8, with or without byte-order mark) that are not blank, with their numbers.

    Raises:
        ValueError: the file is absent or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}); put it there, or convert it") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def read_list(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a list file with a line ``path label`` each: paths, str (N,), and labels, int64 (N,).

    Raises:
        ValueError: no such file, no lines, or a line of another form, which is named.
    """
    pairs = []
    for number, line in read_lines(Path(path)):
        pair = line.rsplit(maxsplit=1)
        if len(pair) != 2 or not (pair[1].isascii() and pair[1].isdigit() and len(pair[1]) < 10):
            raise ValueError(
                f"line {number} of {path} must be a path and a class number, as in "
                f"'train/n01440764/n01440764_762.JPEG 0'; it is {line[:100]!r}"
            )
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"the list {path} has no lines; fetch it again")
    paths, labels = zip(*pairs, strict=True)
    return np.array(paths), np.array(labels, dtype=np.int64)


def require_files(files: ImageFiles, advice: str) -> None:
    """Raise `ValueError` if files are absent, with their number, the first names and the advice. None is opened."""
    missing = [path for path in files.paths if not os.path.isfile(os.path.join(files.root, path))]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ValueError(
            f"{len(missing)} of {len(files)} listed images are missing below {files.root}: "
            f"{', '.join(missing[:SHOWN])}{more}. {advice}"
        )


def folder_images(folder: str | Path, size: int = 224) -> ImageSet:
    """The images in a folder and the folders inside it, as an unlabelled set; ids are their paths in it.

    Hidden files and folders are skipped. Files are chosen by ending or by their first bytes, and opened when needed.

    Args:
        folder: that holds the images.
        size: pixels a side at which training sees them.

    Raises:
        ValueError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds the images")
    names, special = [], []
    for place, inside, files in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        special += [os.path.join(place, name) for name in inside if Path(name).suffix.lower() in ENDINGS]
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            known = path.suffix.lower() in ENDINGS
            if path.is_file() and (known or is_picture(path)):
                names.append(path.relative_to(folder).as_posix())
            elif known:
                special.append(str(path))
    if special:
        warnings.warn(f"skipped, no regular files: {', '.join(sorted(special)[:SHOWN])}", stacklevel=2)
    if not names:
        raise ValueError(f"{folder} holds no image; known endings: {' '.join(sorted(ENDINGS))}")
    files = ImageFiles(folder, np.array(sorted(names)), size)
    return ImageSet(files, np.zeros(len(files), np.int64), UNLABELLED, folder.name)
