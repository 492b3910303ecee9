"""Real images for the study: Fashion-MNIST as its four IDX files, CIFAR-10 as a folder of JPEG files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from data import Digits
from PIL import Image
from subject import MissingDataError
from torch.nn import functional as F

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
FASHION_PREFIX = {"train": "train", "test": "t10k"}
_IDX_HEADER = {"images": 16, "labels": 8}  # bytes


def load_fashion(folder: Path, part: str) -> Digits:
    """Images [N, 1, 32, 32] in [-1, 1], padded with black from 28x28, and their classes; `part` is train or test.

    Raises:
        MissingDataError: no such files in `folder`.
    """
    pixels = _idx(folder, part, "images").reshape(-1, 1, 28, 28)
    images = F.pad(torch.from_numpy(pixels).float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return Digits(images, torch.from_numpy(_idx(folder, part, "labels").astype(np.int64)))


def _idx(folder: Path, part: str, kind: str) -> np.ndarray:
    rank = 3 if kind == "images" else 1
    path = folder / f"{FASHION_PREFIX[part]}-{kind}-idx{rank}-ubyte.gz"
    if not path.is_file():
        raise MissingDataError(
            f"there is no {path}. Install Debian's package dataset-fashion-mnist, or name the folder of the four IDX "
            "files with --data."
        )
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=_IDX_HEADER[kind]).copy()


def load_cifar10(folder: Path, part: str) -> Digits:
    """Images [N, 3, 32, 32] in [-1, 1] and their classes, from `folder/<part>/<class>/*.jpg`.

    Raises:
        MissingDataError: no such folder.
    """
    classes = sorted(path for path in (folder / part).glob("*") if path.is_dir())
    if len(classes) != 10:
        raise MissingDataError(
            f"{folder / part} does not hold CIFAR-10's ten folders of JPEG files; name it with --data."
        )
    files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.glob("*.jpg"))]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Digits(images, torch.tensor([label for _, label in files]))
