"""Pictures that stay on the disk until somebody looks at them, for sets that no memory holds::

    paths, labels = read_list("ImageNet_LT_train.txt")    # lines: train/n01440764/n01440764_762.JPEG 0
    check_files(ImageFiles("/data/imagenet", paths))      # every file is opened once, before anything trains

An `ImageFiles` stands where an array of images stands: it has a length, is cut by an index array or a slice, and gives
its pictures one by one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mllmfl_lite.data.images import UNLABELLED, ImageFiles, ImageSet
from mllmfl_lite.data.pictures import BadPictureError, DataError, open_picture
from mllmfl_lite.repro import count_cores, progress_bar, write_atomically, write_json

SHOWN = 10  # bad files named in an error; the list beside has all


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


FOLDER_VARIABLE = "MLLMFL_DATA"


def data_folder() -> Path:
    """Where the full data sets are kept: ``$MLLMFL_DATA``, or a folder in the user's cache."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if not chosen:
        return Path.home() / ".cache" / "mllmfl_lite"
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        raise DataError(f"{FOLDER_VARIABLE}={chosen} is not a folder; create it, or unset the variable")
    return folder


def find_folder(name: str) -> Path:
    """A folder of pictures by its path, or by its name in `data_folder`; whether it is there, its reader checks."""
    return Path(name) if Path(name).is_dir() else data_folder() / name


ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


class PictureSource:
    """Pictures with ids.

    Args:
        ids: unique names, in order.
        files: for each id the file's name.
        reader: from an id to the picture's bytes, path, or array.
        problems: what was left out when the source was made, a sentence each.
    """

    def __init__(self, ids: Sequence[str], files: Sequence[str], reader, problems: Sequence[str] = ()):
        twice = [i for i, count in Counter(ids).items() if count > 1]
        if twice:
            raise BadPictureError(f"ids must be unique; {twice[0]!r} stands {Counter(ids)[twice[0]]} times")
        self.ids, self._files, self._reader = list(ids), dict(zip(ids, files, strict=True)), reader
        self.problems = list(problems)

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int | None) -> PictureSource:
        """The first `count` pictures under their own ids; all of them for None."""
        ids = self.ids[:count]
        return PictureSource(ids, [self._files[i] for i in ids], self._reader)

    def file(self, i: str) -> str:
        """The file's name of picture `i`."""
        return self._files[i]

    def open(self, i: str) -> Image.Image:
        """Picture `i` as RGB.

        Raises:
            BadPictureError: it cannot be used.
        """
        content = self._reader(i)
        return content if isinstance(content, Image.Image) else open_picture(content, self._files[i])


def array_source(data: ImageSet, prefix: str = "") -> PictureSource:
    """The images of a set; ids are their numbers, with as many digits as the longest."""
    digits = len(str(max(0, len(data) - 1)))
    ids = [f"{prefix}{i:0{digits}d}" for i in range(len(data))]
    place = {name: i for i, name in enumerate(ids)}
    return PictureSource(ids, [f"{name}.png" for name in ids], lambda i: Image.fromarray(data.images[place[i]]))


def pool_source(pool: ImageSet) -> PictureSource:
    """The pictures of a server's pool, in memory or in files; ids are numbers, or the files' names."""
    if not isinstance(pool.images, ImageFiles):
        return array_source(pool)
    names = pool.images.paths.tolist()
    return PictureSource(names, names, lambda i: pool.images.root / i)


def folder_source(folder: str | Path) -> PictureSource:
    """The pictures in a folder and the folders inside it; ids are their paths in it.

    Raises:
        BadPictureError: no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadPictureError(f"{folder} is not a folder; give the folder that holds the pictures")
    names = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file()
    )
    if not names:
        raise BadPictureError(f"{folder} holds no picture; known endings: {' '.join(sorted(ENDINGS))}")
    return PictureSource(names, names, lambda i: folder / i)


def folder_images(folder: str | Path, size: int = 224) -> ImageSet:
    """The pictures of `folder_source` as an unlabelled image set: each has the one class of `UNLABELLED`.

    Args:
        folder: that holds the pictures.
        size: pixels a side at which training looks at them.

    Raises:
        BadPictureError: no such folder, or no picture in it.
        DataError: pictures that cannot be read.
    """
    files = ImageFiles(Path(folder), np.array(folder_source(folder).ids), size)
    check_files(files)
    return ImageSet(files, np.zeros(len(files), np.int64), UNLABELLED, str(folder))
