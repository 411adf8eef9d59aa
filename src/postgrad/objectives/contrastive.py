"""Contrastive losses between embeddings: InfoNCE, NT-Xent (SimCLR) and CLIP's symmetric loss.

Embeddings are normalised here, so similarities are cosines. Each loss is per item of the batch. An
item's negatives are the other items: such a batch cannot be cut into parts for one optimiser step.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from postgrad.objectives.shapes import expect_dimensions, expect_same_shape


def cosine_similarities(left: Tensor, right: Tensor) -> Tensor:
    """Cosines `[..., n, m]` of `[..., n, d]` and `[..., m, d]`.

    In float32 or better even under autocast: a temperature of 0.01 magnifies errors hundredfold.
    """
    precision = torch.promote_types(left.dtype, torch.float32)
    with torch.autocast(left.device.type, enabled=False):
        left, right = left.to(precision), right.to(precision)
        return normalize(left, dim=-1) @ normalize(right, dim=-1).mT


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    in_batch: bool = True,
) -> Tensor:
    """InfoNCE `[B]`: -log softmax of the positive's similarity (arXiv 1807.03748, eq. 4).

    `anchors`, `positives` `[B, d]`; `negatives` `[B, M, d]`, M hard negatives for each anchor. With
    `in_batch` an anchor's candidates are the positives and hard negatives of ALL anchors; without
    it only its own positive and its own hard negatives.
    """
    _expect_pairs(temperature, anchors=anchors, positives=positives)
    if negatives is not None:
        expect_dimensions(3, negatives=negatives)
        if (len(negatives), negatives.shape[-1]) != tuple(anchors.shape):
            raise ValueError(
                f"negatives {list(negatives.shape)} do not fit anchors {list(anchors.shape)}"
            )
    if in_batch:
        if negatives is None:
            _at_least_two(anchors)
            candidates = positives
        else:
            candidates = torch.cat([positives, negatives.flatten(0, 1)])
        similarities = cosine_similarities(anchors, candidates)
        target = torch.arange(len(anchors), device=anchors.device)
    elif negatives is not None:
        own = torch.cat([positives.unsqueeze(1), negatives], dim=1)
        similarities = cosine_similarities(anchors.unsqueeze(1), own).squeeze(1)
        target = torch.zeros(len(anchors), dtype=torch.long, device=anchors.device)
    else:
        raise ValueError("without in-batch negatives, hard negatives are needed")
    return cross_entropy(similarities / temperature, target, reduction="none")


def nt_xent(view_a: Tensor, view_b: Tensor, *, temperature: float | Tensor = 0.5) -> Tensor:
    """SimCLR's loss `[B]` of two views `[B, d]`, averaged over the two (arXiv 2002.05709, eq. 1).

    A view is told from the 2B - 2 views of other items; its own other view is the positive.
    """
    _expect_pairs(temperature, view_a=view_a, view_b=view_b)
    count = _at_least_two(view_a)
    views = torch.cat([view_a, view_b])
    itself = torch.eye(2 * count, dtype=torch.bool, device=views.device)
    logits = (cosine_similarities(views, views) / temperature).masked_fill(itself, -torch.inf)
    other_view = torch.arange(2 * count, device=views.device).roll(count)
    return cross_entropy(logits, other_view, reduction="none").view(2, count).mean(0)


def clip_loss(left: Tensor, right: Tensor, *, temperature: float | Tensor = 0.07) -> Tensor:
    """CLIP's loss `[B]` of pairs across two modalities `[B, d]` (arXiv 2103.00020, fig. 3).

    The mean of telling the right item from the left one and the left item from the right one.
    """
    _expect_pairs(temperature, left=left, right=right)
    count = _at_least_two(left)
    logits = cosine_similarities(left, right) / temperature
    own = torch.arange(count, device=logits.device)
    return (
        cross_entropy(logits, own, reduction="none")
        + cross_entropy(logits.T, own, reduction="none")
    ) / 2


def _expect_pairs(temperature: float | Tensor, **embeddings: Tensor) -> None:
    expect_dimensions(2, **embeddings)
    expect_same_shape(**embeddings)
    if not bool(torch.as_tensor(temperature) > 0):
        raise ValueError(f"temperature must be positive, got {temperature}")


def _at_least_two(embeddings: Tensor) -> int:
    if len(embeddings) < 2:
        raise ValueError("a batch of one item has no negatives: at least 2 are needed")
    return len(embeddings)
