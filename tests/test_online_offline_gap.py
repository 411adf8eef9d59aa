"""The study of online and offline: who is judged by what, and what is replayed."""

import pytest
import torch

from postgrad.batch import Batch
from postgrad.claims import online_offline_gap as study
from postgrad.claims.hundred_arms import Budget
from postgrad.claims.online_offline_gap import World, online_ipo, online_run, reference, trained
from postgrad.claims.opinions import gold_preference
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.evaluation.statistics import value_at
from postgrad.methods.base import Place
from postgrad.methods.language.preference.online_dpo import OnlineDPO, OnlineDPOSettings
from postgrad.objectives.pairwise import ipo, logistic, margin


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTGRAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield World.of(0, quick=True)


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def follow(world, collect):
    policy = reference(world.seed, world.quick)
    rate, _ = study.ARMS[study.ONLINE]
    steps = list(trained(policy, world, online_ipo(world), rate, 2, collect))
    assert steps == [1, 2]
    return weights(policy)


# The loss ------------------------------------------------------------------------------------


def test_the_worked_example():
    won, lost = torch.tensor([[-2.0, -2.2], [-1.5, -1.2]], dtype=torch.float64)
    h = margin(won[:1], lost[:1], won[1:], lost[1:]).requires_grad_()
    assert h.item() == pytest.approx(0.5)
    loss = ipo(h, 0.5)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.25)
    assert h.grad.item() == pytest.approx(-1.0)
    assert logistic(0.5 * h).item() == pytest.approx(0.575939, abs=1e-6)
    swapped = margin(lost[:1], won[:1], lost[1:], won[1:])
    assert swapped.item() == pytest.approx(-h.item())
    assert ipo(torch.tensor([1.0]), 0.5).item() == 0


@pytest.mark.parametrize(("h", "expected"), [(0.4, 0.84), (0.5, 0.85)])
def test_the_expected_loss_of_a_noisy_label(h, expected):
    """P = 0.7 and beta 0.5: least at (2P - 1)/(2 beta) = 0.4."""
    delta = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    loss = 0.7 * ipo(delta, 0.5) + 0.3 * ipo(-delta, 0.5)
    assert loss.item() == pytest.approx(expected)
    loss.sum().backward()
    assert delta.grad.item() == pytest.approx(2 * (h - 0.4))


def test_online_dpo_takes_ipos_loss_and_refuses_smoothing_with_it():
    values = {"model": "tiny", "batch_size": 2, "rollout": {"samples": 2, "max_new_tokens": 4}}
    rows = [{"prompt": f"{i}+1="} for i in range(4)]

    def made(**changes):
        settings = validated(OnlineDPOSettings, {**values, **changes})
        return OnlineDPO(
            settings,
            Place(),
            data=rows,
            reward=lambda completions: list(map(float, map(len, completions))),
        )

    loss, _ = (method := made(loss="ipo", beta=0.25)).loss(method.collect(0))
    assert loss.item() == pytest.approx(4.0, abs=1e-5)  # (0 - 1/(2 beta))^2 at the reference
    with pytest.raises(PostgradError, match=r"label_smoothing: .*loss=ipo, got 0\.1"):
        made(loss="ipo", label_smoothing=0.1)


# The protocol --------------------------------------------------------------------------------


def test_golden_pairs_are_split_and_the_proxy_has_not_seen_those_held_out(world):
    assert len(world.held_out) == pytest.approx((len(world.pairs) + len(world.held_out)) / 5, abs=1)
    assert world.proxy(["good."], ["bad."])[0] == pytest.approx(
        1 - world.proxy(["bad."], ["good."])[0]
    )
    gap = world.proxy.scores(["good."])[0] - world.proxy.scores(["bad."])[0]
    assert torch.sigmoid(torch.tensor(gap)).item() == pytest.approx(
        world.proxy(["good."], ["bad."])[0]
    )


def test_at_the_reference_nothing_is_told_apart(world):
    start = world.judged(reference(0, True), 0)
    assert start.divergence == 0
    assert start.accuracy == 0.5


def test_a_win_is_a_matter_of_the_golden_judge(world, monkeypatch):
    """A policy that always approves thrice, against opponents of known rewards."""

    class Said:
        texts = [" good, lovely and warm."] * 2
        prompts = responses = [torch.tensor([1])] * 2

    monkeypatch.setattr(study, "sample", lambda *given, **named: Said)
    monkeypatch.setattr(study, "log_ratios", lambda *given: torch.zeros(2))
    monkeypatch.setattr(study, "log_ratios_of", lambda *given: torch.zeros(1))
    opponents = [" old.", " bad and dull."]
    monkeypatch.setattr(study.World, "size", study.QUICK)
    made = World(
        world.pairs, world.held_out, world.proxy, study.rewards(opponents, world.proxy), 0, True
    )
    expected = sum(gold_preference(Said.texts, opponents)) / 2
    assert made.judged(None, 0).gold == pytest.approx(expected)


def test_replayed_in_order_the_online_run_comes_again_to_the_bit(world):
    final, pairs = online_run(world)
    size = study.BATCH

    def in_order(method, step):
        return pairs.select(torch.arange(step * size, (step + 1) * size))

    again = follow(world, in_order)
    assert same(again, weights(final))
    other = follow(world, study.shuffled(pairs, 0))
    assert not same(other, again)


def test_every_recorded_pair_is_shuffled_in_once(world):
    pairs = Batch(number=torch.arange(96))
    collect = study.shuffled(pairs, 0)
    found = torch.cat([collect(None, step).number for step in range(3)])
    assert sorted(found.tolist()) == list(range(96))
    assert found.tolist() != list(range(96))


def test_online_with_a_sampler_that_never_learns_is_offline_on_the_references_pairs(world):
    kept = []

    def beforehand(method, step):
        if not kept:
            kept.extend(method.collect(number) for number in range(world.size.steps))
        return kept[step]

    def frozen(method, step):
        with method.policy.reference():
            return method.collect(step)

    assert same(follow(world, frozen), follow(world, beforehand))


def test_a_curve_is_read_where_it_first_reaches_a_divergence():
    curve = [(0.0, 0.5), (1.0, 0.7), (3.0, 0.9), (2.0, 0.1), (4.0, 0.0)]
    assert value_at(curve, 0.5) == pytest.approx(0.6)
    assert value_at(curve, 2.0) == pytest.approx(0.8)
    assert value_at(curve, 9.0) == 0.0  # it never gets there: its furthest point
    assert value_at(curve[:4], 3.0) == 0.9
    with pytest.raises(ValueError, match="at least one point"):
        value_at([], 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_on_the_bandit_small_batches_have_a_gap_where_the_reference_does_not_go(seed):
    online, _ = study.in_tables(True, seed, Budget())
    offline, _ = study.in_tables(False, seed, Budget())
    gaps = {
        name: online[f"bandit, {name}: reward at 1 nat"]
        - offline[f"bandit, {name}: reward at 1 nat"]
        for name in ("R1", "R2")
    }
    assert gaps["R1"] > 0.02
    assert gaps["R1"] > gaps["R2"]
