"""Make the bundled `cifar10_mini` from the full CIFAR-10 and CIFAR-100: three contact sheets and their index.

    MLLMFL_DATA=~/data python scripts/make_cifar10_mini.py          # about two minutes, writes into the package

Three disjoint parts. `train`: 500 images a class of CIFAR-10's training set. `web`: the server's open pool, 150 further
images a class of CIFAR-10's training set and 15 a class of CIFAR-100's as clutter, shuffled together. `test`: 200 a
class of CIFAR-10's test set. `--check` decodes the committed sheets and says how far they are from the originals.
"""

import argparse
import hashlib
import io
import json

import numpy as np
from PIL import Image

from mllmfl_lite.data import load_images
from mllmfl_lite.data.cifar import MINI_FOLDER, cut_sheet, mini_index
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.repro import numpy_generator, write_atomically

SEED = 20250
TRAIN_PER_CLASS, WEB_PER_CLASS, CLUTTER_PER_CLASS, TEST_PER_CLASS = 500, 150, 15, 200
QUALITY = 93  # AVIF 4:4:4, about 620 bytes an image at 41 dB
COLUMNS = 100


def draw(data: ImageSet, per_class: int, skip: int = 0) -> np.ndarray:
    """`per_class` indices of each class, in class order, after skipping the first `skip` of its shuffled list."""
    rng = numpy_generator(SEED, data.origin)
    shuffled = [rng.permutation(np.flatnonzero(data.labels == c)) for c in range(data.num_classes)]
    return np.concatenate([np.sort(own[skip : skip + per_class]) for own in shuffled])


def encode(images: np.ndarray) -> bytes:
    """A contact sheet, `COLUMNS` images a row, as AVIF without chroma subsampling."""
    rows = images.reshape(-1, COLUMNS, 32, 32, 3).transpose(0, 2, 1, 3, 4)
    sheet = Image.fromarray(rows.reshape(-1, COLUMNS * 32, 3))
    out = io.BytesIO()
    sheet.save(out, format="AVIF", quality=QUALITY, subsampling="4:4:4", speed=3, max_threads=1)
    return out.getvalue()


def entry(part: str, pieces: list[tuple[ImageSet, np.ndarray]], names: tuple[str, ...], shuffle: bool = False) -> dict:
    """Write one part's sheet; return its entry in the index."""
    offsets = np.cumsum([0] + [data.num_classes for data, _ in pieces[:-1]])
    images = np.concatenate([data.images[chosen] for data, chosen in pieces])
    labels = np.concatenate([data.labels[chosen] + o for (data, chosen), o in zip(pieces, offsets, strict=True)])
    places = [(data.origin, int(i)) for data, chosen in pieces for i in chosen]
    order = numpy_generator(SEED, part).permutation(len(labels)) if shuffle else np.arange(len(labels))
    content = encode(images[order])
    write_atomically(MINI_FOLDER / f"{part}.avif", content)
    return {
        "sheet": f"{part}.avif",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "columns": COLUMNS,
        "names": list(names),
        "labels": labels[order].tolist(),
        "origins": [data.origin for data, _ in pieces],
        "origin": [[data.origin for data, _ in pieces].index(places[i][0]) for i in order],
        "index": [places[i][1] for i in order],
    }


def make() -> None:
    ten, test, hundred = load_images("cifar10"), load_images("cifar10", "test"), load_images("cifar100")
    web = [(ten, draw(ten, WEB_PER_CLASS, skip=TRAIN_PER_CLASS)), (hundred, draw(hundred, CLUTTER_PER_CLASS))]
    parts = {
        "train": entry("train", [(ten, draw(ten, TRAIN_PER_CLASS))], ten.names),
        "web": entry("web", web, ten.names + hundred.names, shuffle=True),
        "test": entry("test", [(test, draw(test, TEST_PER_CLASS))], test.names),
    }
    index = {"seed": SEED, "encoding": f"AVIF 4:4:4 quality {QUALITY}", "parts": parts}
    write_atomically(MINI_FOLDER / "index.json", json.dumps(index, separators=(",", ":")).encode())


def originals(item: dict) -> np.ndarray:
    """The images of one entry of the index, from the full sets."""
    sets = [load_images(*origin.split("/")) for origin in item["origins"]]
    return np.stack([sets[o].images[i] for o, i in zip(item["origin"], item["index"], strict=True)])


def check() -> None:
    for part, item in mini_index()["parts"].items():
        with Image.open(MINI_FOLDER / item["sheet"]) as sheet:
            decoded = cut_sheet(np.asarray(sheet.convert("RGB")), item["columns"])
        error = (decoded.astype(float) - originals(item)) ** 2
        each = 10 * np.log10(255**2 / np.maximum(error.mean((1, 2, 3)), 1e-9))
        print(
            f"{part:5s} {len(decoded):5d} images, {item['bytes'] / len(decoded):.0f} bytes each, PSNR over all "
            f"{10 * np.log10(255**2 / error.mean()):.1f} dB, worst image {each.min():.1f} dB"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare the committed sheets with the originals")
    if not parser.parse_args().check:
        make()
    check()
