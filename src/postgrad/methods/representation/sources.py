"""Where pairs to contrast come from: two views of an image, or an anchor text and its positive."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.evaluation.probes import class_accuracies, linear_probe, nearest_neighbours
from postgrad.evaluation.retrieval import retrieval_metrics
from postgrad.methods.base import Metrics, Place
from postgrad.models.encoders import BagEncoder, ImageEncoder, ImageShape, TextShape, save_encoder
from postgrad.sampling.views import view
from postgrad.seeding import derive, generator
from postgrad.tasks import Examples
from postgrad.tasks.images import Images


class EncoderSettings(Settings):
    """The sizes of the encoder, which is trained from scratch."""

    width: int = setting(16, "images: channels of the first convolution", gt=0)
    buckets: int = setting(8192, "texts: hash buckets of the vocabulary", gt=1)
    representation: int = setting(64, "images: size of what the probes read", gt=0)
    embedding: int | None = setting(
        None, "size of what the contrast compares; empty: 32 for images, 128 for texts", gt=0
    )


class ViewSettings(Settings):
    """How two views of an image differ."""

    shift: int = setting(1, "largest move in pixels, both axes", ge=0)
    noise: float = setting(0.1, "standard deviation of pixel noise (pixels in [0, 1])", ge=0)


class PairSource(Protocol):
    """Samples with a stable index, two embeddings of each, and what they are good for.

    `bimodal`: the two embeddings are of different kinds, compared only across the two.
    """

    bimodal: bool
    encoder: nn.Module

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, step: int) -> Batch:
        """Samples `index` `[B]` as the fields `index`, `left` and `right`."""
        ...

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, d]` of the two sides, not normalised."""
        ...

    def evaluate(self) -> Metrics: ...

    def describe(self, index: int) -> dict[str, Any]:
        """A sample for people to read."""
        ...

    def fingerprint(self) -> str: ...

    def save(self, folder: Path) -> None: ...


class ImageViews:
    """Two random views of each image, drawn afresh at every step; one encoder for both."""

    bimodal = False

    def __init__(
        self,
        images: Images,
        held_out: Images | None,
        encoder: EncoderSettings,
        views: ViewSettings,
        place: Place,
    ):
        if held_out is not None and images.pixels.shape[1:] != held_out.pixels.shape[1:]:
            raise PostgradError(
                f"eval_data: images of shape {list(held_out.pixels.shape[1:])} cannot test a model "
                f"of {list(images.pixels.shape[1:])} (channels, height, width)"
            )
        self.images, self.held_out = images, held_out
        self._views, self._place = views, place
        self.pixels, self.labels = self._tensors(images)
        _, channels, size, _ = self.pixels.shape
        shape = ImageShape(
            channels, size, encoder.width, encoder.representation, encoder.embedding or 32
        )
        self.encoder = _seeded(place, lambda: ImageEncoder(shape))

    def _tensors(self, images: Images) -> tuple[Tensor, Tensor]:
        device = self._place.device
        return torch.from_numpy(images.pixels).to(device), torch.from_numpy(images.labels).to(
            device
        )

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor, step: int) -> Batch:
        pixels = self.pixels[index.to(self.pixels.device)]
        chance = generator(self._place.seed, "views", step)
        left, right = (
            view(pixels, chance, shift=self._views.shift, noise=self._views.noise) for _ in range(2)
        )
        return Batch(index=index, left=left, right=right)

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        left, right = self.encoder(torch.cat([batch.left, batch.right])).chunk(2)
        return left, right

    def evaluate(self) -> Metrics:
        """Balanced accuracy of a linear probe and of nearest neighbours on the held-out images.

        Both learn from the representations and labels of the training images. `tail` is the mean
        over the rarer half of the classes.
        """
        if self.held_out is None:
            return {}
        pixels, labels = self._tensors(self.held_out)
        seen = self.encoder.represent(self.pixels).float()
        new = self.encoder.represent(pixels).float()
        classes = len(self.images.classes)
        rare = self.frequencies().argsort()[: classes // 2]
        metrics = {}
        for name, predict in (("probe", linear_probe), ("neighbours", nearest_neighbours)):
            predicted = predict(seen, self.labels, new, classes=classes)
            accuracy = class_accuracies(predicted.cpu(), labels.cpu(), classes)
            metrics[f"{name}_balanced_accuracy"] = float(accuracy.mean())
            metrics[f"{name}_tail_accuracy"] = float(accuracy[rare].mean())
        return metrics

    def frequencies(self) -> Tensor:
        """How many training images each class has, `[classes]`."""
        return torch.bincount(self.labels.cpu(), minlength=len(self.images.classes))

    def describe(self, index: int) -> dict[str, Any]:
        label = self.images.classes[int(self.images.labels[index])]
        return {"prompt": f"image {index} of class {label}"}

    def fingerprint(self) -> str:
        return self.images.fingerprint

    def save(self, folder: Path) -> None:
        save_encoder(self.encoder, folder)


class TextPairs:
    """An anchor text and its positive: two kinds of text, compared across; one encoder for both."""

    bimodal = True

    def __init__(
        self, pairs: Examples, held_out: Examples | None, encoder: EncoderSettings, place: Place
    ):
        if held_out is not None and len(held_out) < 2:
            raise PostgradError("eval_data: retrieval needs at least 2 pairs")
        self.pairs, self.held_out = pairs, held_out
        shape = TextShape(encoder.buckets, encoder.embedding or 128)
        self.encoder = _seeded(place, lambda: BagEncoder(shape))

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, index: Tensor, step: int) -> Batch:
        rows = [self.pairs.rows[i] for i in index.tolist()]
        return Batch(
            index=index,
            left=[row["anchor"] for row in rows],
            right=[row["positive"] for row in rows],
        )

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.encoder(batch.left), self.encoder(batch.right)

    def evaluate(self) -> Metrics:
        """Retrieval of the positive of each held-out anchor among all held-out positives."""
        if self.held_out is None:
            return {}
        anchors = self.encoder([row["anchor"] for row in self.held_out.rows])
        positives = self.encoder([row["positive"] for row in self.held_out.rows])
        return retrieval_metrics(anchors, positives)

    def describe(self, index: int) -> dict[str, Any]:
        row = self.pairs.rows[index]
        return {"prompt": row["anchor"], "response": row["positive"]}

    def fingerprint(self) -> str:
        return self.pairs.fingerprint

    def save(self, folder: Path) -> None:
        save_encoder(self.encoder, folder)


def _seeded(place: Place, make: Any) -> Any:
    """A freshly initialised module that depends on the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(place.seed, "encoder"))
        return make().to(place.device)
