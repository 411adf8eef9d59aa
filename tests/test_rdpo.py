"""Robust DPO: what it adds to DPO's family, on real runs of the tiny model."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, with_margins, write_rows
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.preference.dpo import DPO
from postgrad.methods.language.preference.rdpo import RobustDPO
from postgrad.training.record import read_rows

ROWS = [
    {"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}"} for i in range(20)
]


def made(kind=RobustDPO, **config):
    values = {"model": "tiny", "batch_size": 8, **config}
    return kind(validated(kind.Config, values), Place(), data=ROWS)


@pytest.mark.parametrize(
    ("flip_rate", "loss", "reverse"), [(0.1, 0.614008, 0.776508), (0.2, 0.586925, None)]
)
def test_the_worked_example(flip_rate, loss, reverse):
    """The card's pair: beta 0.1 and Delta 1.3."""
    method = made(flip_rate=flip_rate)
    delta = torch.tensor([1.3, -1.3], dtype=torch.float64)
    got = method.losses(with_margins(delta))
    assert float(got[0]) == pytest.approx(loss, abs=1e-6)
    if reverse is not None:
        assert float(got[1]) == pytest.approx(reverse, abs=1e-6)
    clean = (1 - flip_rate) * got[0] + flip_rate * got[1]
    assert float(clean) == pytest.approx(0.630258, abs=1e-6)


def gradient(method):
    loss, _ = method.loss(method.collect(0))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in method.policy.named_parameters()}


def test_without_flips_it_is_dpo_value_and_gradient():
    robust = moved(made(flip_rate=0.0))
    plain = made(DPO)
    plain.policy.load_state_dict(robust.policy.state_dict())
    (value, got), (expected_value, expected) = gradient(robust), gradient(plain)
    assert value == expected_value
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_at_the_reference_its_push_is_dpos_over_one_minus_two_flips():
    (loss, got), (_, plain) = gradient(made(flip_rate=0.3)), gradient(made(DPO))
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    for name, expected in plain.items():
        torch.testing.assert_close(got[name], expected / 0.4, atol=1e-7, rtol=1e-4)


def test_a_negative_loss_is_no_error(tmp_path):
    """On separable pairs the loss is unbounded below: training goes on through zero."""
    train(
        "rdpo",
        data=ROWS,
        flip_rate=0.4,
        steps=25,
        batch_size=20,
        beta=1.0,
        output=tmp_path / "run",
        **SMALL,
    )
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0 < losses[0]


def test_the_cap_stops_the_push():
    method = made(flip_rate=0.4, beta=1.0, largest_margin=2.0)
    delta = torch.tensor([1.9, 2.1, -2.1], requires_grad=True)
    method.losses(with_margins(delta)).sum().backward()
    assert delta.grad[0] < 0
    assert delta.grad[1:].tolist() == [0.0, 0.0]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    settings = {**SMALL, "data": data, "batch_size": 8, "flip_rate": 0.2, "save_every": 2}
    assert_resumes("rdpo", tmp_path, **settings)


@pytest.mark.parametrize("flip_rate", [0.5, 0.7, -0.1])
def test_a_flip_rate_out_of_range_says_why(flip_rate, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(
        PostgradError, match=r"flip_rate: .*\[0, 0.5\).*denominator 1 - 2"
    ) as caught:
        train("rdpo", data=ROWS, flip_rate=flip_rate, output=run, **SMALL)
    assert "\n" not in str(caught.value)
    assert str(flip_rate) in str(caught.value)
    assert not run.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"beta": 0}, "beta: .*greater than 0"), ({"largest_margin": 0}, "largest_margin: .*than 0")],
)
def test_a_bad_setting_is_named(setting, message, tmp_path):
    with pytest.raises(PostgradError, match=message):
        train("rdpo", data=ROWS, output=tmp_path / "run", **{**SMALL, **setting})
    assert not (tmp_path / "run").exists()
