"""Images in the user's own folders: where they are, lists of them, folders as unlabelled sets."""

import os
import re
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mllmfl_lite.data.images import UNLABELLED, ImageFiles, ImageSet
from mllmfl_lite.data.pictures import is_picture, printable
from mllmfl_lite.repro import count_cores

FOLDER_VARIABLE = "MLLMFL_DATA"
ENDINGS = (
    *(".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl"),
    *(".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
HIDDEN = (".", "@eaDir", "__MACOSX", "$RECYCLE.BIN")  # how names of hidden copies begin
SHOWN = 10  # names in a message


def data_folder() -> Path:
    """The folder of full data sets: ``$MLLMFL_DATA``, or one in the user's cache."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if not chosen:
        return Path.home() / ".cache" / "mllmfl_lite"
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{FOLDER_VARIABLE}={chosen} is not a folder; create it, or unset the variable")
    return folder


def find_folder(name: str) -> Path:
    """A folder by its path, or by its name in `data_folder`."""
    path = Path(name).expanduser()
    return path if path.is_dir() else data_folder() / name


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 text file that are not blank, without blanks around them, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}); put it there, or convert it") from error
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_list(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Read a list file with a line ``path label`` each: paths (N,), and labels, int64 (N,).

    No lines, or a line of another form (it is named), is a `ValueError`.
    """
    paths, labels = [], []
    for number, line in read_lines(Path(path)):
        found = re.fullmatch(r"(.+?)[ \t]+([0-9]{1,9})", line)
        if not found:
            rule = f"line {number} of {path} must be a path and a class number, as in 'train/n01440764/x.JPEG 0'"
            raise ValueError(f"{rule}; it is {line[:100]!r}")
        paths.append(found[1])
        labels.append(int(found[2]))
    if not paths:
        raise ValueError(f"the list {path} has no lines; fetch it again")
    return paths, np.array(labels, dtype=np.int64)


def require_files(files: ImageFiles, advice: str) -> None:
    """Raise `ValueError` if files are absent, with their number, the first names and the advice. None is opened."""
    missing = [path for path in files.paths if not os.path.isfile(os.path.join(files.root, path))]
    if missing:
        problem = f"{len(missing)} of {len(files)} listed images are missing below {files.root}"
        raise ValueError(f"{problem}: {_some(missing)}. {advice}")


def find_unreadable(files: ImageFiles) -> dict[str, str]:
    """Open every image and return the paths of those that cannot be used, with the reason."""
    with ThreadPoolExecutor(count_cores()) as threads:
        jobs = [threads.submit(lambda i: files[i].close(), i) for i in range(len(files))]
    return {path: str(job.exception()) for path, job in zip(files.paths, jobs, strict=True) if job.exception()}


def folder_images(folder: str | Path, size: int = 224) -> ImageSet:
    """The images in a folder and the folders inside it, as an unlabelled set; ids are their paths in it.

    Hidden files and folders are skipped. Files are chosen by ending or by their first bytes, and opened when needed, at
    `size` pixels a side. What has an image's ending and is no regular file is skipped with a warning, as are folders
    that lead in a circle.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds the images")
    found, skipped = _walk(folder)
    if skipped:
        warnings.warn(f"skipped, no regular files or folders: {_some(skipped)}", stacklevel=2)
    if not found:
        raise ValueError(f"{folder} holds no image; known endings: {' '.join(ENDINGS)}")
    paths = sorted(path.relative_to(folder).as_posix() for path in found)
    files = ImageFiles(folder, np.array(paths, dtype=object), size)
    return ImageSet(files, np.zeros(len(files), np.int64), UNLABELLED, folder.name)


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images below a folder, in no order, and what was skipped. Each folder is entered once, links last."""
    images, skipped, waiting, entered = list[Path](), list[Path](), [folder], set[str]()
    while waiting:
        place = waiting.pop()
        try:
            if (real := os.path.realpath(place)) in entered:
                raise OSError("entered before")
            entered.add(real)
            for path in sorted(path for path in place.iterdir() if not path.name.startswith(HIDDEN)):
                known = path.suffix.lower() in ENDINGS
                if path.is_file():
                    images += [path] if known or is_picture(path) else []
                elif known:
                    skipped.append(path)
                elif path.is_dir():
                    waiting.insert(0 if path.is_symlink() else len(waiting), path)
        except OSError:
            skipped.append(place)
    return images, sorted(skipped)


def _some(names: Iterable[str | Path]) -> str:
    """The first names of a list, and how many more there are."""
    shown = [printable(name) for name in names]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")
