"""Small encoders trained from scratch: images by convolutions, texts by bags of hashed words."""

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from postgrad.errors import PostgradError, unknown

_CONFIG, _WEIGHTS = "encoder.json", "encoder.safetensors"
_WORD = re.compile(r"\d+|[A-Z]+(?![a-z])|[A-Z]?[^\W\dA-Z_]+")


def projection_head(representation: int, embedding: int) -> nn.Module:
    """The head through which the contrast is learned; representations are read before it."""
    return nn.Sequential(
        nn.Linear(representation, representation), nn.ReLU(), nn.Linear(representation, embedding)
    )


@dataclass(frozen=True)
class ImageShape:
    """The sizes of an `ImageEncoder`: images, channels of its convolutions, outputs."""

    channels: int
    size: int
    width: int
    representation: int
    embedding: int


class ImageEncoder(nn.Module):
    """Two strided convolutions, then a representation, then a projection head.

    `represent` maps images `[n, channels, size, size]` to `[n, representation]`, for use;
    `forward` maps them to embeddings `[n, embedding]`, not normalised, for the contrast.
    """

    def __init__(self, shape: ImageShape):
        super().__init__()
        self.shape = shape
        side = -(-shape.size // 4)
        self.body = nn.Sequential(
            nn.Conv2d(shape.channels, shape.width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(shape.width, 2 * shape.width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * shape.width * side * side, shape.representation),
            nn.ReLU(),
        )
        self.head = projection_head(shape.representation, shape.embedding)

    def represent(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(images)
        return found

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.represent(images))
        return found


@dataclass(frozen=True)
class TextShape:
    """The sizes of a `BagEncoder`: hash buckets of its vocabulary, output."""

    buckets: int
    embedding: int


class BagEncoder(nn.Module):
    """The weighted mean of learned word embeddings, with a learned weight for each word.

    Words are cut at underscores and capitals (`getItem`, `get_item`: get, item), lower-cased and
    hashed, so there is no vocabulary to build; their order is ignored. Natural language and source
    code share the words, so that texts with common words are alike before any training.
    """

    def __init__(self, shape: TextShape):
        super().__init__()
        self.shape = shape
        self.words = nn.EmbeddingBag(shape.buckets, shape.embedding, mode="sum")
        self.log_weights = nn.Parameter(torch.zeros(shape.buckets))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[n, embedding]`, not normalised; zero for a text without words."""
        bags = [hashed_words(text, self.shape.buckets) for text in texts]
        lengths = torch.tensor([len(bag) for bag in bags])
        flat = torch.tensor([word for bag in bags for word in bag], dtype=torch.long)
        starts = lengths.cumsum(0) - lengths
        device = self.log_weights.device
        flat, starts = flat.to(device), starts.to(device)
        shares = (1 / lengths.clamp(min=1)).repeat_interleave(lengths).to(device)
        weights = self.log_weights[flat].exp() * shares
        found: Tensor = self.words(flat, starts, per_sample_weights=weights)
        return found


def hashed_words(text: str, buckets: int) -> list[int]:
    """The hash buckets of a text's words, the same on every machine; a wordless text has none."""
    return [zlib.crc32(word.lower().encode()) % buckets for word in _WORD.findall(text)]


_KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "images": (ImageEncoder, ImageShape),
    "texts": (BagEncoder, TextShape),
}


def save_encoder(encoder: ImageEncoder | BagEncoder, folder: Path) -> None:
    """Write `encoder.json` (kind and sizes) and `encoder.safetensors` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, (cls, _) in _KINDS.items() if isinstance(encoder, cls))
    description = {"kind": kind, "shape": asdict(encoder.shape)}
    (folder / _CONFIG).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    weights = {name: value.contiguous().cpu() for name, value in encoder.state_dict().items()}
    save_file(weights, folder / _WEIGHTS)


def load_encoder(folder: str | Path) -> ImageEncoder | BagEncoder:
    """The encoder that `save_encoder` wrote into `folder`, in evaluation mode."""
    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        raise PostgradError(f"{folder} holds no encoder: it has no {_CONFIG}")
    description = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if description["kind"] not in _KINDS:
        raise unknown("kind of encoder", description["kind"], _KINDS)
    encoder_class, shape_class = _KINDS[description["kind"]]
    encoder: ImageEncoder | BagEncoder = encoder_class(shape_class(**description["shape"]))
    try:
        encoder.load_state_dict(load_file(folder / _WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        line = " ".join(str(error).split())
        raise PostgradError(
            f"{folder / _WEIGHTS} holds no weights of an encoder: {line}"
        ) from error
    return encoder.eval()
