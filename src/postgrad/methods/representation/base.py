"""The family of contrasts between two embeddings of each sample: a method fills in the loss."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.data import DataSettings, find_data, find_held_out
from postgrad.methods.representation.sources import (
    EncoderSettings,
    ImageViews,
    PairSource,
    TextPairs,
    ViewSettings,
)
from postgrad.sampling.epochs import Epochs
from postgrad.tasks import Examples
from postgrad.tasks.images import Images, is_images, load_images


class ContrastSettings(Settings):
    """Settings of every method that contrasts two embeddings of each sample."""

    data: DataSettings = setting(
        DataSettings(name="digits"),
        "images (digits, or a folder with a subfolder a class), or pairs of texts (docstrings, …)",
    )
    eval_data: DataSettings | None = setting(None, "held-out data; the data's test split if empty")
    batch_size: int = setting(64, "samples a step", ge=2)
    encoder: EncoderSettings = setting(EncoderSettings(), "sizes of the encoder")
    views: ViewSettings = setting(ViewSettings(), "how two views of an image differ")


class Contrast(Method):
    """An encoder trained by telling a sample's two embeddings from those of other samples.

    Images give two random views each, pairs of texts an anchor and its positive. A subclass fills
    `contrast`.
    """

    config: ContrastSettings
    recipe = {"steps": 700, "learning_rate": 2e-3, "schedule": "cosine", "sample_every": 100}

    def __init__(
        self,
        config: ContrastSettings,
        place: Place,
        *,
        data: Images | Examples | list[dict[str, Any]] | None = None,
    ):
        super().__init__(config, place)
        self.source = _source(config, place, data)
        if len(self.source) < 2:
            raise PostgradError(
                f"data: a contrast needs at least 2 samples, got {len(self.source)}"
            )
        self._epochs = Epochs(len(self.source), config.batch_size, place.seed)

    @abstractmethod
    def contrast(self, left: Tensor, right: Tensor, index: Tensor) -> tuple[Tensor, Metrics]:
        """The loss `[B]` of embeddings `[B, d]` of samples `index` `[B]`, and metrics."""

    def modules(self) -> dict[str, nn.Module]:
        return {"encoder": self.source.encoder}

    def collect(self, step: int) -> Batch:
        return self.source.batch(self._epochs.indices(step), step)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        left, right = self.source.embed(batch)
        # similarities are divided by small temperatures: half precision would show
        with torch.autocast(left.device.type, enabled=False):
            loss, metrics = self.contrast(left.float(), right.float(), batch.index)
        return loss.sum() / batch.items, metrics

    def evaluate(self) -> Metrics:
        return self.source.evaluate()

    def embed(self, texts: list[str]) -> Tensor:
        """Embeddings `[N, d]` of texts; a `PostgradError` if the encoder is one of images."""
        if not isinstance(self.source, TextPairs):
            raise PostgradError("this run's encoder is for images, not for texts")
        with torch.no_grad():
            return self.source.encoder(texts).float().cpu()

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return [self.source.describe(i) for i in batch.index[:4].tolist()]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.source.fingerprint()}

    def save(self, folder: Path) -> None:
        self.source.save(folder)


def _source(
    config: ContrastSettings,
    place: Place,
    data: Images | Examples | list[dict[str, Any]] | None,
) -> PairSource:
    if isinstance(data, Images) or (data is None and is_images(config.data.name)):
        images = data if isinstance(data, Images) else _images(config.data, "data")
        held_out = config.eval_data
        if held_out is None and data is None:
            held_out = config.data.model_copy(update={"split": "test"})
        unseen = _images(held_out, "eval_data") if held_out else None
        return ImageViews(images, unseen, config.encoder, config.views, place)
    pairs = find_data(config.data, place, "pairs", data)
    tests = find_held_out(config, place, "pairs", data)
    return TextPairs(pairs, tests, config.encoder, place)


def _images(config: DataSettings, key: str) -> Images:
    for field in ("format", "columns", "limit", "flip_rate"):
        if getattr(config, field):
            raise PostgradError(f"{key}.{field}: images have none, it is for texts")
    return load_images(config.name, split=config.split or "train", settings=config.settings)
