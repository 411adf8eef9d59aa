"""Reward modelling: its losses, preference strength, contrast and MetaRM."""

import json
import math

import pytest
import torch

from language_runs import SMALL, assert_same_run, write_rows
from postgrad import inspection
from postgrad.api import resume, train
from postgrad.batch import Batch
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.evaluation.statistics import separation
from postgrad.methods.base import Place
from postgrad.methods.language.rlhf.preference_strength import treated
from postgrad.methods.language.rlhf.reward_modeling import STRENGTH_FILE, RewardModeling
from postgrad.methods.language.rlhf.shifted_responses import displaced
from postgrad.models.language import load_policy
from postgrad.models.scalar import ScalarModel
from postgrad.objectives.contrastive import info_nce
from postgrad.objectives.reward_modeling import (
    bradley_terry,
    preference_strength,
    sinkhorn_codes,
    spread_of_rewards,
    swav,
    weakest,
)
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

# the digit is good, the letter bad
ROWS = [
    {"prompt": f"number {i}:", "chosen": f"{i % 10}", "rejected": "abcdefghij"[i % 10]}
    for i in range(40)
]
LISTS = [{"prompt": f"word {i}:", "responses": [f"a{i}", f"b{i}", f"{i}c"]} for i in range(6)]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# The losses ----------------------------------------------------------------------------------


def test_the_worked_example():
    d = tensor(0.8)
    assert float(bradley_terry(d)) == pytest.approx(0.371101, abs=1e-6)
    assert float(bradley_terry(d, smoothing=0.1)) == pytest.approx(0.451101, abs=1e-6)
    assert float(bradley_terry(d, margin=1.3 / 3)) == pytest.approx(0.526527, abs=1e-6)
    assert float(bradley_terry(d, flip=torch.tensor([True]))) == pytest.approx(1.171101, abs=1e-6)


def test_a_flip_is_a_soft_label_of_one():
    d = torch.linspace(-3, 3, 7).double()
    flipped = bradley_terry(d, flip=torch.ones(7, dtype=torch.bool))
    torch.testing.assert_close(bradley_terry(d, smoothing=torch.ones(7).double()), flipped)
    torch.testing.assert_close(flipped, bradley_terry(-d))


def test_gradients():
    d = tensor(-1.3, 0.2, 2.0).requires_grad_()
    (smoothed,) = torch.autograd.grad(bradley_terry(d, smoothing=0.1).sum(), d)
    torch.testing.assert_close(smoothed, torch.sigmoid(d.detach()) - 0.9)
    (with_margin,) = torch.autograd.grad(bradley_terry(d, margin=0.7).sum(), d)
    torch.testing.assert_close(with_margin, -torch.sigmoid(0.7 - d.detach()))
    torch.testing.assert_close(bradley_terry(d + 0.7, margin=0.7), bradley_terry(d))
    best = tensor(math.log(9)).requires_grad_()
    assert float(best.detach()) == pytest.approx(2.197225, abs=1e-6)
    (rest,) = torch.autograd.grad(bradley_terry(best, smoothing=0.1).sum(), best)
    assert float(rest) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smoothing": 0.5}, r"smoothing must lie in \[0, 0.5\), got 0.5"),
        ({"smoothing": -0.1}, "smoothing must lie"),
        ({"smoothing": torch.tensor([0.5, 1.2])}, "a soft label is a probability"),
        ({"margin": math.nan}, "a margin is not finite"),
        ({"margin": torch.tensor([0.0, math.nan])}, "a margin is not finite"),
        ({"margin": torch.zeros(3)}, r"margin \[3\] does not fit \[2\]"),
        ({"flip": torch.ones(1).bool()}, r"flip \[1\] does not fit \[2\]"),
    ],
)
def test_labels_and_margins_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(torch.zeros(2), **arguments)


# Preference strength -------------------------------------------------------------------------


def test_strength_of_a_pair_worked_out_by_hand():
    scores = torch.stack([tensor(1.2, 0.4, 0.9), tensor(0.5, 0.6, 0.1)], -1)[:, None]
    mu, sigma = preference_strength(scores)
    assert float(mu) == pytest.approx(0.433333, abs=1e-6)
    assert float(sigma) == pytest.approx(0.449691, abs=1e-6)
    moved, same = preference_strength(scores + tensor(5.0, -2.0, 0.3)[:, None, None])
    torch.testing.assert_close((moved, same), (mu, sigma))  # what depends on the prompt alone
    turned, same = preference_strength(scores.flip(-1))
    torch.testing.assert_close((turned, same), (-mu, sigma))


def test_normalised_strength_forgets_the_scale_of_each_model():
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 20, 2, generator=random, dtype=torch.float64)
    scaled = scores * tensor(1.0, 100.0, 0.01)[:, None, None]
    torch.testing.assert_close(
        preference_strength(scaled, normalised=True), preference_strength(scores, normalised=True)
    )
    with pytest.raises(ValueError, match="at least 2 models, got 1"):
        preference_strength(scores[:1])
    with pytest.raises(ValueError, match="expected scores of shape"):
        preference_strength(scores[..., :1])


def test_the_weakest_pairs():
    mu = tensor(0.3, -1.0, 2.0, -1.0, 0.1)
    assert weakest(mu, 0.4).tolist() == [False, True, False, True, False]
    assert weakest(mu, 0.39).tolist() == [False, True, False, False, False]
    assert not weakest(mu, 0.0).any()
    with pytest.raises(ValueError, match=r"\[0, 0.5\], got 0.6"):
        weakest(mu, 0.6)


def test_treatments():
    mu = tensor(-2.0, -0.5, 0.5, 3.0)
    flipped = treated(mu, ("flip", "soft", "margin"), 0.25, 0.0)
    assert flipped.flip.tolist() == [True, False, False, False]
    assert flipped.margin.tolist() == [2.0, 0.0, 0.5, 3.0]
    torch.testing.assert_close(flipped.smoothing, torch.sigmoid(tensor(-2.0, 0.5, -0.5, -3.0)))
    dropped = treated(mu, ("drop",), 0.25, 0.1)
    assert dropped.kept.tolist() == [1, 2, 3]
    assert not dropped.flip.any()
    assert dropped.smoothing.tolist() == pytest.approx([0.1] * 4)
    assert not dropped.margin.any()


def test_separation_is_the_area_under_the_curve():
    assert separation([3, 2], [1, 0]) == 1
    assert separation([1, 3], [2, 1]) == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    with pytest.raises(ValueError, match="no values"):
        separation([], [1])


# The contrast --------------------------------------------------------------------------------


def test_simcse_worked_out_by_hand():
    h_s, h_t = tensor((1, 0), (0.6, 0.8)), tensor((0.8, 0.6), (0, 1))
    losses = info_nce(h_s, h_t, temperature=0.1)
    torch.testing.assert_close(losses, tensor(0.000335, 1.783901), atol=1e-6, rtol=0)


def test_codes_use_all_prototypes_evenly():
    scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + tensor(3, 0, 0, 0)
    codes = sinkhorn_codes(scores, sharpness=1.0, iterations=50)
    torch.testing.assert_close(codes.sum(1), torch.ones(64))
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 16.0), atol=1e-3, rtol=0)


def test_swav_is_least_where_views_agree_and_its_codes_have_no_gradient():
    random = torch.Generator().manual_seed(0)
    view = torch.randn(16, 8, generator=random)
    other = torch.randn(16, 8, generator=random)
    prototypes = torch.randn(4, 8, generator=random, requires_grad=True)
    same = swav(view, view, prototypes, temperature=0.1)
    apart = swav(view, other, prototypes, temperature=0.1)
    assert same.mean().item() < apart.mean().item()
    code = sinkhorn_codes(
        torch.nn.functional.normalize(view, dim=-1)
        @ torch.nn.functional.normalize(prototypes, dim=-1).T
    )
    predicted = torch.nn.functional.normalize(view, dim=-1) @ (
        torch.nn.functional.normalize(prototypes, dim=-1).T
    )
    by_hand = -2 * (code * (predicted / 0.1).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(same, by_hand)
    (found,) = torch.autograd.grad(same.sum(), prototypes)
    (expected,) = torch.autograd.grad(by_hand.sum(), prototypes)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="at least 2"):
        swav(view[:1], view[:1], prototypes, temperature=0.1)
    with pytest.raises(ValueError, match="temperature"):
        swav(view, view, prototypes, temperature=0)


# MetaRM --------------------------------------------------------------------------------------


def test_spread_worked_out_by_hand():
    rewards = tensor((1.0, 0.2, -0.5))
    assert float(spread_of_rewards(rewards)) == pytest.approx(0.483497, abs=1e-6)
    torch.testing.assert_close(spread_of_rewards(rewards + 7), spread_of_rewards(rewards))
    padded = tensor((1.0, 0.2, -0.5, math.nan))
    present = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(spread_of_rewards(padded, present), spread_of_rewards(rewards))
    for k in (2, 5):
        equal, apart = torch.zeros(1, k), 1e3 * torch.arange(k)[None].float()
        assert float(spread_of_rewards(equal)) == pytest.approx((k - 1) / (2 * k))
        assert float(spread_of_rewards(apart)) == pytest.approx((k - 1) / k)
    with pytest.raises(ValueError, match="at least 2 responses"):
        spread_of_rewards(torch.zeros(2, 1))


def test_equal_rewards_pull_at_nothing():
    rewards = torch.zeros(1, 3, requires_grad=True)
    spread_of_rewards(rewards).sum().backward()
    assert not rewards.grad.any()


class Scalar(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(tensor(0.3))


def test_meta_rm_on_one_number():
    """r = theta x: the first-order step of the method, and the second-order one beside it."""
    model, eta, alpha = Scalar(), 0.1, 0.1
    spread = spread_of_rewards(model.theta * tensor((1.0, -1.0)))
    assert spread.item() == pytest.approx(0.322828, abs=1e-6)
    (direction,) = torch.autograd.grad(spread.sum(), model.theta, create_graph=True)
    assert direction.item() == pytest.approx(0.228784, abs=1e-6)
    second = bradley_terry((model.theta + eta * direction) * 0.5)
    (gradient,) = torch.autograd.grad(second.sum(), model.theta)
    assert float(gradient) == pytest.approx(-0.226800, abs=1e-6)
    assert 0.3 - alpha * float(gradient) == pytest.approx(0.322680, abs=1e-6)
    with displaced(model, [direction.detach()], eta):
        assert model.theta.item() == pytest.approx(0.322878, abs=1e-6)
        bradley_terry(model.theta * 0.5).sum().backward()
        assert float(model.theta.grad) == pytest.approx(-0.229864, abs=1e-6)
        torch.optim.SGD(model.parameters(), lr=alpha).step()
    assert model.theta.item() == pytest.approx(0.322986, abs=1e-6)


def test_a_displacement_without_a_step_leaves_nothing_behind():
    model = load_policy("tiny")
    before = [p.detach().clone() for p in model.parameters()]
    direction = [torch.randn_like(p) for p in before]
    with displaced(model, direction, 0.1):
        assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# The method ----------------------------------------------------------------------------------


def made(rows=ROWS, steps=100, given=None, **config):
    values = {"model": "tiny", "batch_size": 8, "max_response_tokens": 16, **config}
    place = Place(steps=steps)
    return RewardModeling(validated(RewardModeling.Config, values), place, data=rows, **given or {})


def stirred(method):
    """The method with a head that says something."""
    random = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(method.model.head.weight, generator=random)
    return method


def one_step(method, step=0):
    """The weights after one step of the method."""
    loop = validated(LoopSettings, {"learning_rate": 1e-3, "steps": 10})
    optimise = Optimisers(method.modules(), loop, torch.device("cpu"))
    optimise.set_step(0)
    metrics = method.update(method.collect(step), optimise)
    return metrics, {name: p.detach().clone() for name, p in method.model.named_parameters()}


def test_a_new_model_starts_at_log_two_and_its_loss_is_bradley_terry():
    method = made()
    batch = method.collect(0)
    assert method.loss(batch)[0].item() == pytest.approx(math.log(2), abs=1e-6)
    stirred(method)
    one, other = (
        method.model.rewards(batch.prompts, [pair[i] for pair in batch.responses]) for i in (0, 1)
    )
    expected = torch.nn.functional.softplus(other - one).mean()
    torch.testing.assert_close(method.loss(batch)[0], expected, rtol=1e-4, atol=1e-5)


def test_options_that_are_off_leave_plain_bradley_terry():
    """p = 0, m = 0, no flip and eta = 0, each through its own path."""
    _, plain = one_step(stirred(made()))
    rows = [{**row, "strength": 0.0} for row in ROWS]
    for options in (
        {"rows": rows, "strength": "flip", "flip_share": 0.0},
        {"rows": rows, "strength": "margin"},
        {"label_smoothing": 0.0},
        {"meta": {"rate": 0.0}, "given": {"meta_data": LISTS}},
    ):
        _, found = one_step(stirred(made(**options)))
        assert all(torch.equal(found[name], weight) for name, weight in plain.items()), options


def test_micro_batches_add_up_to_the_batch():
    method = stirred(made(rows=[{**row, "strength": 0.3} for row in ROWS], strength="margin+soft"))
    batch = method.collect(0)
    whole = method.loss(batch)[0]
    parts = sum(method.loss(part)[0] for part in batch.split(40))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_it_learns_and_is_evaluated_and_used_by_name(tmp_path):
    data = write_rows(tmp_path / "train.jsonl", ROWS)
    unseen = [{**row, "prompt": f"number {i + 40}:"} for i, row in enumerate(ROWS)]
    run = train(
        "reward-modeling", data=data, eval_data=write_rows(tmp_path / "test.jsonl", unseen),
        steps=40, batch_size=16, output=tmp_path / "run", **SMALL,
    )  # fmt: skip
    assert run.evaluation["accuracy"] > 0.9
    again = inspection.evaluate(str(tmp_path / "run"), None, 128)
    assert again["accuracy"] == run.evaluation["accuracy"]
    reward = str(tmp_path / "run" / "model")
    elsewhere = inspection.evaluate(reward, str(tmp_path / "test.jsonl"), 128)
    assert elsewhere["accuracy"] == run.evaluation["accuracy"]
    longer = made(model=reward)  # goes on from it
    for name, weight in run.method.model.state_dict().items():
        assert torch.equal(longer.model.state_dict()[name], weight)


def test_the_ensemble_finds_flipped_pairs(tmp_path):
    data = {"name": write_rows(tmp_path / "rows.jsonl", ROWS * 2), "flip_rate": 0.2}
    train(
        "reward-modeling", data=data, strength="flip+margin", flip_share=0.2, ensemble=3,
        ensemble_epochs=3, steps=8, batch_size=8, output=tmp_path / "run", **SMALL,
    )  # fmt: skip
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "step" in row]
    members = [row for row in rows if "ensemble/loss" in row]
    assert len(members) == 3
    assert members[-1]["strength/detection"] > 0.9
    assert members[-1]["strength/right_in_decile_10"] == 1
    first = next(row for row in rows if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=0.5)  # the final model starts anew
    written = read_rows(tmp_path / "run" / "model" / STRENGTH_FILE)
    assert len(written) == 80
    weak = sorted(written, key=lambda row: row["strength"])[:12]
    assert sum(row["flipped"] for row in weak) >= 11
    # as data with strengths they need no ensemble
    reused = made(rows=written, strength="flip", flip_share=0.2)
    assert reused.members == 0
    assert int(reused.treatment().flip.sum()) == 16


def test_members_leave_weights_and_optimiser_as_they_were():
    method = stirred(made(strength="soft", ensemble=2))
    before = {name: p.detach().clone() for name, p in method.model.named_parameters()}
    _, after = one_step(method)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    first = method.scores[0].clone()
    assert not first.isnan().any()
    one_step(method, 1)
    assert not torch.equal(method.scores[1], first)  # another order, another model


@pytest.mark.parametrize(
    "options",
    [
        {"strength": "flip+soft", "ensemble": 2},
        {"contrast": {"kind": "swav", "prototypes": 4}},
        {"contrast": {"kind": "simcse", "of": "response"}},
        {"meta_policy": "tiny", "meta": {"prompts": 2, "max_new_tokens": 4, "rate": 0.1}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(options, tmp_path):
    settings = {
        **SMALL,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS[:16]),
        "batch_size": 8,
        "max_response_tokens": 16,
        **options,
    }
    train("reward-modeling", steps=5, output=tmp_path / "whole", **settings)
    train("reward-modeling", steps=3, output=tmp_path / "parts", **settings)
    resume(tmp_path / "parts", steps=5, allow_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("kind", ["simcse", "swav"])
@pytest.mark.parametrize("of", ["difference", "response"])
def test_the_contrast_is_added_to_the_whole_batch(kind, of):
    method = stirred(made(contrast={"kind": kind, "of": of, "weight": 0.5}))
    batch = method.collect(0)
    assert len(list(batch.split(1))) == 1  # not cut, whatever the token budget
    value, metrics = method.loss(batch)
    expected = metrics["loss/pairs"] + 0.5 * metrics["loss/contrast"]
    assert value.item() == pytest.approx(expected, rel=1e-5)
    again, _ = method.loss(batch)
    assert torch.equal(value, again)  # the views follow from the step
    plain = stirred(made())
    assert metrics["loss/pairs"] == pytest.approx(plain.loss(plain.collect(0))[0].item(), rel=1e-6)
    value.backward()
    assert all(p.grad is not None for p in method.modules()["reward_model"].parameters())


def test_meta_rm_takes_the_gradient_at_the_displaced_weights():
    method = stirred(made(meta={"rate": 0.5, "prompts": 6}, given={"meta_data": LISTS}))
    plain = stirred(made())
    spread, direction = method.shifted.spread(0)
    with torch.no_grad():
        for p, towards in zip(plain.model.parameters(), direction, strict=True):
            p.add_(towards, alpha=0.5)
    plain.loss(plain.collect(0))[0].backward()
    expected = [p.grad for p in plain.model.parameters()]
    seen = []

    def optimise(loss, batch):
        loss(batch)[0].backward()
        seen.extend(p.grad for p in method.model.parameters())
        return {"loss": 0.0}

    optimise.autocast = lambda: torch.no_grad()  # as the loop may be in when it collects
    metrics = method.update(method.collect(0), optimise)
    assert metrics["meta/spread"] == spread
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    # J rises along its gradient
    with displaced(method.model, direction, 0.05):
        assert method.shifted.spread(0)[0] > spread


def test_responses_of_a_policy_are_drawn_anew_in_every_step():
    method = made(given={"meta_policy": load_policy("tiny", seed=1)}, meta={"prompts": 4})
    first, again, second = (method.shifted.batch(step) for step in (0, 0, 1))
    assert isinstance(first, Batch)

    def texts(batch):
        return [[r.tolist() for r in several] for several in batch.responses]

    assert texts(first) == texts(again) != texts(second)
    assert all(len(several) > 1 for several in first.responses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": "flp"}, "unknown remedy of strength 'flp': did you mean 'flip'"),
        ({"strength": "flip+drop"}, "strength: .*either flip or drop"),
        ({"strength": "soft", "label_smoothing": 0.1}, "label_smoothing: strength=soft"),
        ({"label_smoothing": 0.5}, "label_smoothing: .*less than 0.5"),
        ({"flip_share": 0.6}, "flip_share: .*less than or equal to 0.5"),
        ({"ensemble": 1}, "ensemble: .*greater than or equal to 2"),
        ({"strength": "flip", "steps": 10}, "steps: the first 10 train the ensemble .*got 10"),
        ({"contrast": {"kind": "simcse", "dropout": 0.0}}, "contrast.dropout: .*greater than 0"),
        ({"contrast": {"kind": "simcse"}, "batch_size": 1}, "contrast.kind: .*at least 2, got 1"),
        ({"contrast": {"kind": "simsce"}}, "contrast.kind"),
        ({"meta": {"samples": 1}}, "meta.samples: .*greater than or equal to 2"),
        ({"tune": "lora"}, "tune: a reward model is trained in full"),
    ],
)
def test_faults(settings, message, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(PostgradError, match=message) as caught:
        train("reward-modeling", data=data, output=tmp_path / "run", **{**SMALL, **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_faults_of_data():
    with pytest.raises(PostgradError, match=r"row 1: column 'strength' holds 'high', expected"):
        made(rows=[{**row, "strength": "high"} for row in ROWS], strength="flip")
    with pytest.raises(PostgradError, match="rankings need the columns prompt, responses"):
        made(given={"meta_data": [{"prompt": "a"}, {"prompt": "b"}]})


def test_a_reward_model_may_be_given(tmp_path):
    model = ScalarModel.on_body_of(load_policy("tiny"))
    assert made(given={"model": model}).model is model
    assert model.prompts_as_turns is False
    model.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["prompts_as_turns"] is False
