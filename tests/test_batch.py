import pytest
import torch

from postgrad.batch import Batch
from postgrad.config import LoopSettings
from postgrad.methods.base import Place
from postgrad.sampling.epochs import Epochs
from postgrad.training.optimise import Optimisers
from regression import Regression, RegressionSettings


def ragged():
    return Batch(
        names=list("abcd"),
        mask=torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool),
        cost=torch.tensor([5, 3, 4, 1]),
    )


def test_parts_respect_the_budget_and_keep_the_totals_of_the_whole():
    parts = list(ragged().split(8))
    assert [part.names for part in parts] == [["a", "b"], ["c", "d"]]
    assert all((part.items, part.tokens) == (4, 6) for part in parts)


def test_an_item_larger_than_the_budget_is_a_part_of_its_own():
    assert [part.names for part in ragged().split(2)] == [["a"], ["b"], ["c"], ["d"]]


def test_a_selection_is_a_whole_of_its_own():
    chosen = ragged().select(torch.tensor([2, 0]))
    assert (chosen.names, chosen.items, chosen.tokens) == (["c", "a"], 2, 5)


def test_joined_batches_are_one_whole():
    first, second = ragged().split(8)
    both = second.joined(first)
    assert (both.names, both.items, both.tokens) == (["c", "d", "a", "b"], 4, 6)
    assert both.cost.tolist() == [4, 1, 5, 3]


def test_joined_responses_may_differ_in_length():
    short = Batch(mask=torch.ones(1, 2).bool(), names=["a"])
    long = Batch(mask=torch.ones(2, 3).bool(), names=["b", "c"])
    for one, other in ((short, long), (long, short)):
        both = one.joined(other)
        assert both.mask.sum(1)[[both.names.index(name) for name in "abc"]].tolist() == [2, 3, 3]
        assert both.mask.shape == (3, 3)


def test_fields_must_be_of_one_length_and_unknown_ones_are_named():
    with pytest.raises(ValueError, match="one common length"):
        Batch(a=[1], b=[1, 2])
    with pytest.raises(AttributeError, match="'rewards'"):
        _ = ragged().rewards


@pytest.mark.parametrize("budget", [2, 6, 100, None])
def test_micro_batches_give_the_step_of_the_whole_batch(budget):
    def trained(token_budget):
        torch.manual_seed(0)
        method = Regression(RegressionSettings(), Place())
        settings = LoopSettings(learning_rate=0.1, token_budget=token_budget)
        optimise = Optimisers(method.modules(), settings, torch.device("cpu"))
        metrics = optimise(method.loss, method.collect(0))
        return method.network.weight.detach(), metrics

    weight, metrics = trained(budget)
    expected, whole = trained(10_000)
    torch.testing.assert_close(weight, expected)
    assert metrics["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert metrics["error"] == pytest.approx(whole["error"], rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-5)


def test_an_epoch_sees_every_item_once_and_batches_have_no_repeats():
    order = Epochs(10, 3, seed=1)
    seen = torch.cat([order.indices(step) for step in range(order.per_epoch)])
    assert len(seen.unique()) == 9
    assert not torch.equal(order.indices(0), order.indices(3))
    assert torch.equal(order.indices(5), Epochs(10, 3, seed=1).indices(5))
    assert len(Epochs(2, 8, seed=0).indices(0)) == 2


def test_groups_stay_whole_and_pay_for_their_prompt_once():
    batch = Batch(
        names=list("abcdef"),
        cost=torch.tensor([2, 2, 2, 2, 2, 2]),
        shared_cost=torch.tensor([10, 10, 10, 10, 10, 10]),
        group=torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    assert [part.names for part in batch.split(28)] == [["a", "b", "c", "d"], ["e", "f"]]
    assert [part.names for part in batch.split(27)] == [["a", "b"], ["c", "d"], ["e", "f"]]
    # a group that is too large alone is cut, and each piece has the prompt
    assert [part.names for part in batch.split(13)] == [[name] for name in "abcdef"]
