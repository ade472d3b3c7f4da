"""Pictures from anywhere, opened with care: an array, a folder of the reader's own, or the archive of CC-595K.

A `PictureSource` knows the ids of its pictures, the file of each, and opens them one by one as RGB. What is no picture,
is cut, tiny or a decompression bomb raises `BadPictureError` with the name and the reason, and harms nothing else.
"""

from __future__ import annotations

import json
import threading
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from mllmfl_lite.data import UNLABELLED, ImageSet
from mllmfl_lite.files import MAX_PIXELS, BadPictureError, ImageFiles, check_files, open_picture

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


def cc595k_source(chat: str | Path, images: str | Path) -> PictureSource:
    """CC-595K as it is distributed: ``chat.json`` and ``images.zip``, which is read in place and never unpacked.

    Entries whose picture is not in the archive, whose id came before, or that lack a field are left out and named in
    `problems`; fields that are not known are ignored and counted there.

    Args:
        chat: ``chat.json``: a list of ``{"id", "image", "conversations"}``.
        images: ``images.zip``, or an unpacked folder.

    Raises:
        BadPictureError: a file is missing or is not what it should be, or the archive's names lead out of it.
    """
    entries = _read_chat(Path(chat))
    read, there = _read_archive(Path(images))
    ids, files, problems, unknown = [], [], [], Counter()
    seen = set()
    for number, entry in enumerate(entries):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("id"), str)
            or not isinstance(entry.get("image"), str)
        ):
            problems.append(f"entry {number} lacks 'id' or 'image'")
        elif entry["id"] in seen:
            problems.append(f"entry {number}: id {entry['id']!r} stands twice; the first one is used")
        elif entry["image"] not in there:
            problems.append(f"entry {number}: {entry['image']!r} is not in {Path(images).name}")
        else:
            seen.add(entry["id"])
            ids.append(entry["id"])
            files.append(entry["image"])
            unknown.update(set(entry) - {"id", "image", "conversations"})
    problems += [f"field {name!r} is not known and ignored, in {count} entries" for name, count in unknown.items()]
    if not ids:
        raise BadPictureError(
            f"{chat} and {images} have no picture in common; {'; '.join(problems[:3]) or 'the list is empty'}"
        )
    source = PictureSource(ids, files, None, problems)
    source._reader = lambda i: read(source.file(i))
    return source


def _read_chat(path: Path) -> list:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadPictureError(f"{path} cannot be read as JSON ({error}); CC-595K calls it chat.json") from error
    if not isinstance(entries, list):
        raise BadPictureError(f"{path} must hold one JSON list; it holds a {type(entries).__name__}")
    return entries


def _read_archive(path: Path):
    """A function from a name to bytes or a path, and the names there are."""
    if path.is_dir():
        return (lambda name: path / name), {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise BadPictureError(
            f"{path} cannot be opened as a zip archive ({error}); CC-595K calls it images.zip"
        ) from error
    names = {info.filename for info in archive.infolist() if not info.is_dir()}
    leading_out = sorted(
        name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
    )
    if leading_out:
        raise BadPictureError(f"{path} has names that lead out of it, such as {leading_out[0]!r}; it is not used")
    lock = threading.Lock()

    def read(name: str) -> bytes:
        with lock:
            if archive.getinfo(name).file_size > 16 * MAX_PIXELS:
                raise BadPictureError(
                    f"{name} would unpack to {archive.getinfo(name).file_size:,} bytes; it is not read"
                )
            try:
                return archive.read(name)
            except (zipfile.BadZipFile, OSError, EOFError) as error:
                raise BadPictureError(f"{name} is damaged in {path.name} ({error})") from error

    return read, names
