"""Kahneman-Tversky Optimization: its equation, and real runs of the tiny model."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.preference.kto import KTO, KTOSettings
from postgrad.objectives.unpaired import kto, mismatched_kl
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [
    {"prompt": f"{i} + {i} = ", "completion": f"{2 * i + i % 2}, say", "label": i % 2 == 0}
    for i in range(20)
]
PAIRS = [
    {"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}"} for i in range(8)
]


def made(rows=ROWS, **config):
    values = {"model": "tiny", "batch_size": 8, **config}
    objects = {"data": rows}
    if "held_out" in values:
        objects["eval_data"] = values.pop("held_out")
    return KTO(validated(KTOSettings, values), Place(), **objects)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# The pure functions ------------------------------------------------------------------------------


def test_the_worked_example():
    """beta 0.5, z 1: sigma(0.5) = 0.622459 on either side of the reference point."""
    ratio, desirable = tensor(2.0, 2.0, 0.0, 0.0), torch.tensor([True, False, True, False])
    losses = kto(ratio, desirable, torch.tensor(1.0), 0.5, 1.0, 2.0)
    low, high = 0.377541, 0.622459
    assert losses.tolist() == pytest.approx([low, 2 * high, high, 2 * low], abs=1e-6)


def test_its_push_is_largest_at_the_reference_point_and_by_the_label():
    ratio = torch.linspace(-40, 40, 81, dtype=torch.float64).requires_grad_()
    kl, everything = torch.tensor(3.0), torch.ones(81, dtype=torch.bool)
    for desirable, sign in ((everything, -1), (~everything, 1)):
        (push,) = torch.autograd.grad(kto(ratio, desirable, kl, 0.5).sum(), ratio)
        assert (push.sign() == sign).all()
        assert float(ratio[push.abs().argmax()]) == 3.0
        assert float(push.abs().max()) == pytest.approx(0.5 * 0.25)
        assert float(push[0].abs()) < 1e-8 > float(push[-1].abs())


def test_the_reference_point_is_a_clamped_mean_without_gradient():
    ratio = tensor(3.0, -1.0).requires_grad_()
    kl = mismatched_kl(ratio)
    assert float(kl) == 1.0
    assert not kl.requires_grad
    assert float(mismatched_kl(-ratio)) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, d: kto(x, d, torch.tensor(0.0), 0.0), "beta must be positive"),
        (lambda x, d: kto(x, d, torch.tensor(0.0), 0.1, -1.0), "weights must be at least 0"),
        (lambda x, d: kto(x, d[:1], torch.tensor(0.0), 0.1), "one shape"),
        (lambda x, d: kto(x, d, torch.zeros(3), 0.1), "one shape"),
        (lambda x, d: kto(x, d.long(), torch.tensor(0.0), 0.1), "desirable must be boolean"),
        (lambda x, d: kto(x[None], d[None], torch.tensor(0.0), 0.1), "1 dimension"),
        (lambda x, d: mismatched_kl(x[:0]), "at least one mismatched pair"),
    ],
)
def test_wrong_calls_of_the_functions(call, message):
    with pytest.raises(ValueError, match=message):
        call(tensor(1.0, 2.0), torch.tensor([True, False]))


# The method --------------------------------------------------------------------------------------


def test_at_the_reference_every_response_loses_half_its_weight():
    method = made(undesirable_weight=3.0)
    batch = method.collect(0)
    assert float(batch.kl[0]) == pytest.approx(0, abs=1e-4)
    loss, metrics = method.loss(batch)
    weights = torch.where(batch.desirable, 1.0, 3.0)
    assert float(loss) == pytest.approx(float(weights.mean()) / 2, abs=1e-4)
    assert metrics["rewards/signed"] == pytest.approx(0, abs=1e-5)


def test_the_loss_is_the_papers_with_the_neighbours_responses_in_the_reference_point():
    method = moved(made(beta=0.3), 0.05)
    batch = method.collect(0)
    optimiser = torch.optim.Adam(method.policy.parameters(), lr=2e-3)
    for _ in range(10):  # towards the responses, so that the reference point is positive
        scores = method.policy.score(batch.prompts, [several[0] for several in batch.responses])
        optimiser.zero_grad()
        (-scores.logprobs.sum()).backward()
        optimiser.step()
    batch = method.collect(0)

    def ratio(prompts, responses):
        with torch.no_grad():
            now = method.policy.score(prompts, responses).logprobs.sum(1)
            with method.policy.reference():
                return now - method.policy.score(prompts, responses).logprobs.sum(1)

    responses = [several[0] for several in batch.responses]
    own = ratio(batch.prompts, responses)
    others = ratio(batch.prompts, [responses[-1], *responses[:-1]])
    kl = max(0.0, float(others.mean()))
    assert kl > 1
    assert abs(kl - float(own.mean())) > 0.01
    assert float(batch.kl[0]) == pytest.approx(kl, abs=1e-3)
    sign = torch.where(batch.desirable, 1.0, -1.0)
    expected = 1 - torch.sigmoid(sign * 0.3 * (own - kl))
    loss, metrics = method.loss(batch)
    assert float(loss) == pytest.approx(float(expected.mean()), abs=1e-4)
    assert metrics["rewards/signed"] == pytest.approx(float((sign * 0.3 * own).mean()), abs=1e-4)


@pytest.mark.parametrize("budget", [1, 60])
def test_micro_batches_add_up_to_the_same_step(budget):
    """Also where a part holds one label alone: the reference point is the whole batch's."""
    method = moved(made())
    batch = method.collect(0)

    def gradients(budget):
        settings = LoopSettings(learning_rate=1e-12, clip_norm=0, token_budget=budget)
        metrics = Optimisers(method.modules(), settings, torch.device("cpu"))(method.loss, batch)
        return metrics, {n: p.grad.clone() for n, p in method.policy.named_parameters()}

    (whole, expected), (cut, got) = gradients(None), gradients(budget)
    assert cut["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert cut["rewards/signed"] == pytest.approx(whole["rewards/signed"], abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


def test_preferences_serve_as_two_labelled_responses():
    method = made(PAIRS)
    assert len(method.data) == 16
    labels = [row["label"] for row in method.data.examples]
    texts = [method.policy.decode(responses[0]) for responses in method.data.responses]
    assert labels == [True, False] * 8
    assert texts[:2] == ["0", "1"]


def test_it_learns_what_is_liked(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    settings = {**SMALL, "data": data, "eval_data": data, "batch_size": 20, "beta": 1.0}
    run = train("kto", steps=30, output=tmp_path / "run", evaluate_every=30, **settings)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(0.5, abs=1e-4)
    assert losses[-1] < 0.3
    assert run.evaluation["accuracy"] == 1.0
    assert run.evaluation["margin"] > 1
    assert math.isfinite(run.evaluation["loss"])
    sample = read_rows(tmp_path / "run" / "samples.jsonl")[-1]
    assert (sample["reward"] > 0) == sample["desirable"]


def test_evaluation_without_one_of_the_labels_gives_the_loss_alone():
    method = made(held_out=[row for row in ROWS if row["label"]])
    with torch.no_grad():
        assert method.evaluate().keys() == {"loss"}


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    settings = {**SMALL, "data": data, "batch_size": 8, "save_every": 2}
    assert_resumes("kto", tmp_path, **settings)


@pytest.mark.parametrize(
    ("rows", "setting", "message"),
    [
        (ROWS, {"batch_size": 1}, "batch_size: .*greater than or equal to 2, got 1"),
        (ROWS[:1], {}, "rows: the KL needs at least 2 labelled responses a step, got 1"),
        (ROWS, {"beta": 0}, "beta: .*greater than 0"),
        (ROWS, {"desirable_weight": -1}, "desirable_weight: .*greater than or equal to 0"),
        ([{**ROWS[0], "label": "maybe"}], {}, "row 1: column 'label' is 'maybe', expected true or"),
        ([{"prompt": "a", "completion": "b"}], {}, "prompt, completion, label; missing: label"),
    ],
)
def test_a_fault_is_named(rows, setting, message, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message) as caught:
        train("kto", data=rows, output=run, **{**SMALL, **setting})
    assert "\n" not in str(caught.value)
    assert not run.exists()
