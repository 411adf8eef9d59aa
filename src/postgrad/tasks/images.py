"""Labelled images for representation learning: scikit-learn's digits, or a folder of images."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from postgrad.errors import MissingExtra, PostgradError, unknown

SPLITS = ("train", "validation", "test")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
_TRAIN_SHARE = 0.8


@dataclass(frozen=True)
class Images:
    """Images of one split; a sample's position is its stable index.

    `pixels` `[n, channels, height, width]` float32 in [0, 1]; `labels` `[n]` int64, positions in
    `classes`. Labels serve evaluation only.
    """

    name: str
    pixels: numpy.ndarray
    labels: numpy.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.pixels.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageOptions:
    """How images are split and read.

    - `head`: class c keeps at most `head * decay**c` training images; None: four fifths of it.
    - `decay`: 1 keeps the classes balanced, less makes a long tail.
    - `split_seed`: which images are for training and which for validation.
    - `size`: images are squares of so many pixels. Those of a folder are scaled to it; a digit
      (8 x 8) stands at a random place of it.
    - `colour`: images of a folder keep their three channels.
    """

    head: int | None = None
    decay: float = 1.0
    split_seed: int = 0
    size: int = 32
    colour: bool = True

    def __post_init__(self) -> None:
        for key in ("head", "split_seed", "size"):
            value = getattr(self, key)
            if type(value) is not int and not (key == "head" and value is None):
                raise PostgradError(f"data.settings.{key}: expected a whole number, got {value!r}")
        if type(self.decay) not in (int, float) or not 0 < self.decay <= 1:
            raise PostgradError(f"data.settings.decay: expected in (0, 1], got {self.decay!r}")
        if type(self.colour) is not bool:
            raise PostgradError(
                f"data.settings.colour: expected true or false, got {self.colour!r}"
            )
        if self.head is not None and self.head < 1:
            raise PostgradError(f"data.settings.head: expected at least 1, got {self.head}")
        if self.split_seed < 0:
            raise PostgradError(
                f"data.settings.split_seed: expected at least 0, got {self.split_seed}"
            )
        if self.size < 8:
            raise PostgradError(f"data.settings.size: expected at least 8, got {self.size}")


_DIGITS = {"head": 150, "decay": 0.7, "size": 8}


def is_images(name: str) -> bool:
    """Whether `name` means images: the digits, or a folder."""
    return name == "digits" or os.path.isdir(name)


def load_images(
    name: str, *, split: str = "train", settings: dict[str, Any] | None = None
) -> Images:
    """The images of one split of `name`: `digits`, or a folder with one subfolder a class.

    `settings` are the fields of `ImageOptions`. Digits (1797 images of 8 x 8) have a long tail
    unless told otherwise: class c keeps 150 * 0.7**c training images. Whatever training leaves out
    of a class is halved between validation and test. Raises `PostgradError` for an unknown name,
    split or setting, an unreadable image, or a class too small to be split.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    defaults = _DIGITS if name == "digits" else {}
    chosen = {**defaults, **(settings or {})}
    known = ImageOptions.__dataclass_fields__
    for key in chosen:
        if key not in known:
            raise unknown("key", f"data.settings.{key}", [f"data.settings.{k}" for k in known])
    options = ImageOptions(**chosen)
    pixels, labels, classes = _digits(options) if name == "digits" else _folder(Path(name), options)
    index = _split(labels, classes, options)[split]
    return Images(name, pixels[index], labels[index], classes)


def _split(
    labels: numpy.ndarray, classes: tuple[str, ...], options: ImageOptions
) -> dict[str, numpy.ndarray]:
    """The positions of each split's images, in the order of the data.

    The test images do not depend on `split_seed`: what is tuned on one split is unseen in another.
    """
    fixed = numpy.random.default_rng(0)
    chance = numpy.random.default_rng(options.split_seed)
    parts: dict[str, list[numpy.ndarray]] = {split: [] for split in SPLITS}
    for number, name in enumerate(classes):
        members = fixed.permutation(numpy.flatnonzero(labels == number))
        if len(members) < 3:
            raise PostgradError(
                f"class {name!r} has {len(members)} image(s): one each for training, validation "
                "and test are needed"
            )
        keep = int(_TRAIN_SHARE * len(members))
        if options.head is not None:
            keep = min(round(options.head * options.decay**number), len(members) - 2)
        keep = max(keep, 1)
        middle = keep + (len(members) - keep) // 2
        seen = chance.permutation(members[:middle])
        for split, part in zip(SPLITS, (seen[:keep], seen[keep:], members[middle:]), strict=True):
            parts[split].append(part)
    return {split: numpy.sort(numpy.concatenate(parts[split])) for split in SPLITS}


def _digits(options: ImageOptions) -> tuple[numpy.ndarray, numpy.ndarray, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "representation") from error
    found = load_digits()
    room = options.size - found.images.shape[-1]
    places = numpy.random.default_rng(options.split_seed).integers(
        0, room + 1, (2, len(found.images))
    )
    pixels = numpy.zeros((len(found.images), 1, options.size, options.size), numpy.float32)
    for image, digit, y, x in zip(pixels, found.images, *places, strict=True):
        image[0, y : y + len(digit), x : x + len(digit)] = digit / 16
    return pixels, found.target.astype(numpy.int64), tuple(map(str, found.target_names))


def _folder(
    folder: Path, options: ImageOptions
) -> tuple[numpy.ndarray, numpy.ndarray, tuple[str, ...]]:
    if not os.path.isdir(folder):
        raise PostgradError(
            f"data: {str(folder)!r} is neither 'digits' nor a folder with one subfolder a class"
        )
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    if len(classes) < 2:
        raise PostgradError(f"{folder}: expected a subfolder for each of at least 2 classes")
    pixels, labels = [], []
    for number, name in enumerate(classes):
        for path in sorted((folder / name).iterdir()):
            if path.suffix.lower() in _SUFFIXES:
                pixels.append(_read(path, options))
                labels.append(number)
    if not pixels:
        raise PostgradError(f"{folder}: no images ({', '.join(sorted(_SUFFIXES))}) in subfolders")
    return numpy.stack(pixels), numpy.array(labels, dtype=numpy.int64), classes


def _read(path: Path, options: ImageOptions) -> numpy.ndarray:
    """One image `[channels, size, size]` in [0, 1]."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtra("pillow", "representation") from error
    try:
        with Image.open(path) as image:
            plain = image.convert("RGB" if options.colour else "L")
            scaled = plain.resize((options.size, options.size))
            values = numpy.asarray(scaled, dtype=numpy.float32) / 255
    except (UnidentifiedImageError, OSError) as error:
        raise PostgradError(f"{path} cannot be read as an image") from error
    return values.transpose(2, 0, 1) if options.colour else values[None]
