"""Pictures from anywhere, opened with care: an array, a folder of the reader's own, or the archive of CC-595K.

A `PictureSource` knows the ids of its pictures, the file of each, and opens them one by one as RGB. What is no picture,
is cut, tiny or a decompression bomb raises `BadPictureError` with the name and the reason, and harms nothing else.
"""

from __future__ import annotations

import json
import threading
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

from mllmfl_lite.data.folders import PictureSource
from mllmfl_lite.data.pictures import MAX_PIXELS, BadPictureError


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
