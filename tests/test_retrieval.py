"""Retrieval and probes: known answers, invariances, and embeddings that carry nothing."""

import pytest
import torch
from scipy.stats import spearmanr

from postgrad.evaluation.probes import (
    class_accuracies,
    linear_probe,
    nearest_neighbours,
    spearman,
)
from postgrad.evaluation.retrieval import ranks, retrieval_metrics


def test_ranks_of_a_worked_example():
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    # the first finds its own, the second prefers document 0, the third is furthest from its own
    queries = torch.tensor([[2.0, 0.1], [1.0, 0.5], [3.0, 0.4]])
    assert ranks(queries, documents).tolist() == [1, 2, 3]
    metrics = retrieval_metrics(queries, documents, recall_at=(2,))
    assert metrics["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert metrics["top1"] == pytest.approx(1 / 3)
    assert metrics["recall@2"] == pytest.approx(2 / 3)


def test_identical_embeddings_find_nothing():
    same = torch.ones(10, 4)
    assert ranks(same, same).tolist() == [10] * 10
    assert retrieval_metrics(same, same)["top1"] == 0


def test_random_embeddings_are_at_chance():
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(2, 400, 16, generator=generator).unbind()
    metrics = retrieval_metrics(queries, documents)
    assert metrics["recall@10"] == pytest.approx(10 / 400, abs=0.025)


def test_scale_and_rotation_change_nothing():
    generator = torch.Generator().manual_seed(1)
    queries, documents = torch.randn(2, 50, 8, generator=generator).unbind()
    documents = documents + queries
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    expected = ranks(queries, documents)
    assert torch.equal(ranks(3 * queries @ rotation, 0.1 * documents @ rotation), expected)


@pytest.mark.parametrize("documents", [torch.ones(3, 4), torch.ones(2, 3), torch.ones(2)])
def test_wrong_shapes_are_errors(documents):
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        retrieval_metrics(torch.ones(2, 4), documents)


def test_embeddings_that_are_not_finite_are_errors():
    with pytest.raises(ValueError, match="NaN"):
        retrieval_metrics(torch.ones(2, 2), torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]))


def test_class_accuracies_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 2, 2])
    found = class_accuracies(predicted, labels, 3)
    assert found.tolist() == pytest.approx([2 / 3, 1 / 2, 1.0])
    with pytest.raises(ValueError, match="class 3 has no items"):
        class_accuracies(predicted, labels, 4)


def _blobs(counts, seed, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[0.0, 3.0], [3.0, 0.0], [-3.0, -3.0]])
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    return centres[labels] + spread * torch.randn(len(labels), 2, generator=generator), labels


@pytest.mark.parametrize("predict", [linear_probe, nearest_neighbours])
def test_probes_separate_what_is_separable(predict):
    features, labels = _blobs([60, 20, 5], 0)
    queries, truth = _blobs([20, 20, 20], 1)
    assert torch.equal(predict(features, labels, queries, classes=3), truth)


def test_linear_probe_does_not_sacrifice_the_rare_class():
    generator = torch.Generator().manual_seed(2)
    labels = torch.tensor([0] * 500 + [1] * 10)
    features = labels[:, None] * 1.0 + 0.5 * torch.randn(510, 1, generator=generator)
    queries = torch.tensor([[-0.2], [1.2]])
    assert linear_probe(features, labels, queries, classes=2).tolist() == [0, 1]
    # with equal weights for the classes the border lies near the middle, at 0.5
    border = linear_probe(features, labels, torch.tensor([[0.2], [0.8]]), classes=2)
    assert border.tolist() == [0, 1]


def test_linear_probe_ignores_the_scale_of_features():
    features, labels = _blobs([30, 30, 30], 3, spread=2.0)
    queries, _ = _blobs([20, 20, 20], 4, spread=2.0)
    plain = linear_probe(features, labels, queries, classes=3)
    scaled = linear_probe(features * 100 + 7, labels, queries * 100 + 7, classes=3)
    assert (plain == scaled).float().mean() > 0.95


def test_spearman_agrees_with_scipy_and_knows_constants():
    left = torch.tensor([1.0, 2.0, 2.0, 5.0, 4.0, -1.0])
    right = torch.tensor([3.0, 1.0, 4.0, 9.0, 9.0, 0.0])
    assert spearman(left, right) == pytest.approx(spearmanr(left, right).statistic)
    assert spearman(left, 2 * left + 1) == pytest.approx(1)
    assert spearman(left, torch.ones(6)) == 0
