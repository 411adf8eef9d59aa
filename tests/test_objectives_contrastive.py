"""InfoNCE, NT-Xent and CLIP's loss against plain loops."""

import math

import pytest
import torch
from torch import Tensor

from postgrad.objectives.contrastive import clip_loss, cosine_similarities, info_nce, nt_xent


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def negative_log_softmax(positive: float, others: list[float], temperature: float) -> float:
    total = sum(math.exp(x / temperature) for x in [positive, *others])
    return math.log(total) - positive / temperature


def test_info_nce_with_in_batch_and_hard_negatives():
    anchors, positives = embeddings(2, 3, 4)
    negatives = embeddings(3, 2, 4, seed=1)
    loss = info_nce(anchors, positives, negatives, temperature=0.2)
    for i in range(3):
        others = [cosine(anchors[i], positives[j]) for j in range(3) if j != i]
        others += [cosine(anchors[i], n) for n in negatives.flatten(0, 1)]
        expected = negative_log_softmax(cosine(anchors[i], positives[i]), others, 0.2)
        assert float(loss[i]) == pytest.approx(expected)


def test_info_nce_with_its_own_negatives_only():
    anchors, positives = embeddings(2, 3, 4)
    negatives = embeddings(3, 2, 4, seed=1)
    loss = info_nce(anchors, positives, negatives, temperature=0.2, in_batch=False)
    for i in range(3):
        others = [cosine(anchors[i], n) for n in negatives[i]]
        expected = negative_log_softmax(cosine(anchors[i], positives[i]), others, 0.2)
        assert float(loss[i]) == pytest.approx(expected)
    without = info_nce(anchors, positives, temperature=0.2)
    assert (without < info_nce(anchors, positives, negatives, temperature=0.2)).all()


def test_nt_xent():
    views = embeddings(2, 3, 4)
    loss = nt_xent(views[0], views[1], temperature=0.3)
    for i in range(3):
        expected = 0.0
        for v in range(2):
            others = [
                cosine(views[v, i], views[w, j]) for w in range(2) for j in range(3) if j != i
            ]
            expected += negative_log_softmax(cosine(views[0, i], views[1, i]), others, 0.3) / 2
        assert float(loss[i]) == pytest.approx(expected)


def test_clip_loss():
    left, right = embeddings(2, 3, 4)
    loss = clip_loss(left, right, temperature=0.3)
    for i in range(3):
        own = cosine(left[i], right[i])
        to_right = [cosine(left[i], right[j]) for j in range(3) if j != i]
        to_left = [cosine(left[j], right[i]) for j in range(3) if j != i]
        expected = negative_log_softmax(own, to_right, 0.3) + negative_log_softmax(
            own, to_left, 0.3
        )
        assert float(loss[i]) == pytest.approx(expected / 2)


@pytest.mark.parametrize("loss", [info_nce, nt_xent, clip_loss])
def test_only_directions_matter(loss):
    a, b = embeddings(2, 4, 5)
    rotation = torch.linalg.qr(embeddings(5, 5, seed=2)).Q
    torch.testing.assert_close(loss(3 * a @ rotation, 0.1 * b @ rotation), loss(a, b))


@pytest.mark.parametrize("loss", [info_nce, nt_xent, clip_loss])
def test_a_learned_temperature_receives_a_gradient(loss):
    a, b = embeddings(2, 4, 5)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss(a, b, temperature=temperature).sum().backward()
    with torch.no_grad():
        numeric = (
            loss(a, b, temperature=0.2 + 1e-6) - loss(a, b, temperature=0.2 - 1e-6)
        ).sum() / 2e-6
    assert float(temperature.grad) == pytest.approx(float(numeric), rel=1e-5)


def test_similarities_keep_their_precision_under_autocast():
    a, b = embeddings(2, 4, 64).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cosine_similarities(a, b)
    assert torch.equal(inside, cosine_similarities(a, b))


def test_wrong_calls_are_refused():
    a = torch.ones(2, 3)
    with pytest.raises(ValueError, match="temperature must be positive"):
        nt_xent(a, a, temperature=0.0)
    with pytest.raises(ValueError, match="one shape"):
        clip_loss(a, torch.ones(3, 3))
    with pytest.raises(ValueError, match="hard negatives are needed"):
        info_nce(a, a, in_batch=False)
    with pytest.raises(ValueError, match="do not fit anchors"):
        info_nce(a, a, torch.ones(2, 1, 4))
    for loss in (info_nce, nt_xent, clip_loss):
        with pytest.raises(ValueError, match="at least 2"):
            loss(a[:1], a[:1])
