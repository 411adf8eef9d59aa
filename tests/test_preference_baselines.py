"""IPO, SLiC-HF, SimPO and ORPO: their equations, and real runs of the tiny model."""

import math

import pytest
import torch

from language_runs import SMALL, assert_same_run, moved, with_margins, write_rows
from postgrad.api import resume, train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.preference.ipo import IPO
from postgrad.methods.language.preference.orpo import ORPO
from postgrad.methods.language.preference.simpo import SimPO
from postgrad.methods.language.preference.slic import SLiC
from postgrad.objectives.pairwise import (
    ipo,
    log_odds,
    logistic,
    negative_likelihood,
    odds_ratio,
    simpo,
    slic,
)
from postgrad.training.record import read_rows

ROWS = [
    {"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}, no doubt"}
    for i in range(20)
]
KINDS = {"ipo": IPO, "slic": SLiC, "simpo": SimPO, "orpo": ORPO}


def made(kind, **config):
    values = {"model": "tiny", "batch_size": 8, **config}
    return kind(validated(kind.Config, values), Place(), data=ROWS)


def logprobs(size=11, seed=0):
    random = torch.Generator().manual_seed(seed)
    return -5 * torch.rand(2, size, generator=random, dtype=torch.float64)


def slope(loss, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at).sum(), at)[0]


# The pure functions ------------------------------------------------------------------------------


def test_ipo_pulls_every_margin_to_one_finite_value():
    delta = torch.tensor([-2.0, 2.5, 9.0], dtype=torch.float64)
    assert ipo(delta, 0.2).tolist() == [20.25, 0.0, 42.25]
    assert (slope(lambda d: ipo(d, 0.2), delta).sign() == torch.tensor([-1, 0, 1])).all()


def test_slic_stops_pushing_at_the_margin_and_keeps_to_its_target():
    logp_w = torch.tensor([-3.0, -3.0, -3.0], dtype=torch.float64)
    logp_l = torch.tensor([-2.0, -3.5, -4.5], dtype=torch.float64)
    # gaps -1, 0.5 and 1.5 against a margin of 1, and half of 3 nats of cross-entropy
    assert slic(logp_w, logp_l, 1.0, 0.5, logp_w).tolist() == [3.5, 2.0, 1.5]
    assert slope(lambda w: slic(w, logp_l, 1.0, 0.5, w), logp_w).tolist() == [-1.5, -1.5, -0.5]
    assert slope(lambda x: slic(logp_w, x, 1.0, 0.5, logp_w), logp_l).tolist() == [1.0, 1.0, 0.0]


def test_simpo_is_logistic_beyond_a_margin():
    mean_w, mean_l = logprobs()
    torch.testing.assert_close(simpo(mean_w, mean_l, 2.0, 0.0), logistic(2 * (mean_w - mean_l)))
    # with the gap at gamma / beta the pair is where DPO's is at the reference
    at_margin = simpo(mean_l + 0.25, mean_l, 2.0, 0.5)
    torch.testing.assert_close(at_margin, torch.full_like(at_margin, math.log(2)))


def test_log_odds_are_those_of_the_probability():
    p = torch.tensor([1e-12, 1e-3, 0.3, 0.5, 0.50001, 0.9, 1 - 1e-9], dtype=torch.float64)
    torch.testing.assert_close(log_odds(p.log()), torch.log(p / (1 - p)), atol=1e-6, rtol=1e-9)
    # d log_odds / d log p = 1 / (1 - p)
    torch.testing.assert_close(slope(log_odds, p.log()), 1 / (1 - p), atol=0, rtol=1e-6)


def test_odds_of_certainty_are_finite_with_finite_gradients():
    certain = torch.tensor([0.0, -1e-30, -100.0], dtype=torch.float32)
    assert log_odds(certain).isfinite().all()
    assert slope(log_odds, certain).isfinite().all()
    loss = odds_ratio(certain, certain.flip(0))
    assert loss.isfinite().all()


def test_the_odds_ratio_of_the_worked_pair():
    """p_w = 0.5, p_l = 0.2: odds 1 and 1/4, their ratio 4, -log sigma(log 4) = -log 0.8."""
    mean_w, mean_l = (torch.tensor([p], dtype=torch.float64).log() for p in (0.5, 0.2))
    assert float(odds_ratio(mean_w, mean_l)) == pytest.approx(-math.log(0.8), abs=1e-12)


def test_the_mean_likelihood_is_of_sequences_not_of_all_tokens():
    logp, lengths = torch.tensor([-2.0, -9.0]), torch.tensor([1, 9])
    assert negative_likelihood(logp, lengths).tolist() == [2.0, 1.0]
    assert negative_likelihood(logp).tolist() == [2.0, 9.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: slic(x, x, 0.0, 0.5, x), "delta > 0"),
        (lambda x: slic(x, x, 1.0, -0.5, x), "weight >= 0"),
        (lambda x: slic(x, x, 1.0, 0.5, x[:1]), "one shape"),
        (lambda x: simpo(x, x, 0.0, 0.5), "beta must be positive"),
        (lambda x: simpo(x, x[:, None], 1.0, 0.5), "one shape"),
        (lambda x: odds_ratio(x.exp(), x), "got positive values"),
        (lambda x: odds_ratio(x, x[:1]), "one shape"),
        (lambda x: negative_likelihood(x, torch.zeros(2)), "without tokens"),
    ],
)
def test_wrong_calls_of_the_functions(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([-1.0, -2.0]))


# The methods -------------------------------------------------------------------------------------


def scored(method, batch, place):
    """Sums and lengths `[B]` of one response of each pair, apart from the method's own way."""
    scores = method.policy.score(batch.prompts, [pair[place] for pair in batch.responses])
    return scores.logprobs.sum(1), scores.mask.sum(1)


def expected(method, batch):
    """The loss by the papers' equations, written out."""
    with torch.no_grad():
        (won, n), (lost, m) = scored(method, batch, 0), scored(method, batch, 1)
        if isinstance(method, IPO):
            with method.policy.reference():
                won = won - scored(method, batch, 0)[0]
                lost = lost - scored(method, batch, 1)[0]
            return (won / n - lost / m - 5.0) ** 2  # beta 0.1
        if isinstance(method, SLiC):
            return (1.0 - won + lost).clamp(min=0) - 0.5 * won
        p, q = (won / n).exp(), (lost / m).exp()
        if isinstance(method, SimPO):
            return -torch.log(torch.sigmoid(2.0 * (p.log() - q.log()) - 0.5))
        ratio = (p / (1 - p)) / (q / (1 - q))
        return -p.log() - 0.1 * torch.log(torch.sigmoid(ratio.log()))


@pytest.mark.parametrize("kind", KINDS.values())
def test_the_loss_is_the_papers(kind):
    method = moved(made(kind))
    batch = method.collect(0)
    loss, _ = method.loss(batch)
    assert float(loss) == pytest.approx(float(expected(method, batch).mean()), abs=1e-4)


@pytest.mark.parametrize("kind", [SLiC, SimPO, ORPO])
def test_without_a_reference_none_is_made_or_asked(kind):
    method = made(kind)
    batch = method.collect(0)
    assert batch.reference.isnan().all()
    assert not method.policy._frozen
    loss, metrics = method.loss(batch)
    loss.backward()
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_terms_of_a_loss_are_reported():
    method = moved(made(ORPO, beta=0.3))
    loss, metrics = method.loss(method.collect(0))
    total = metrics["loss/nll"] + 0.3 * metrics["loss/odds_ratio"]
    assert float(loss) == pytest.approx(total, abs=1e-5)


def test_ipo_without_length_normalisation_is_equation_17():
    method = made(IPO, length_normalised=False, beta=0.25)
    assert method.losses(with_margins(torch.tensor([1.0, 2.0]))).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("slug", KINDS)
def test_it_learns_to_tell_twenty_pairs_apart(slug, tmp_path):
    # the rejected responses are the longer ones: only a learnt difference of means tells them
    settings = {**SMALL, "steps": 30, "batch_size": 20, "token_budget": None}
    train(slug, data=ROWS, output=tmp_path / "run", **settings)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["rewards/accuracy"] == 1.0
    assert rows[-1]["rewards/margin"] > rows[0]["rewards/margin"]


@pytest.mark.parametrize("slug", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(slug, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    settings = {**SMALL, "data": data, "batch_size": 8, "save_every": 2}
    train(slug, steps=4, output=tmp_path / "whole", **settings)
    train(slug, steps=2, output=tmp_path / "parts", **settings)
    resume(tmp_path / "parts", steps=4, allow_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("slug", "setting", "message"),
    [
        ("ipo", {"beta": 0}, "beta: .*greater than 0, got 0"),
        ("slic", {"delta": 0}, "delta: .*greater than 0, got 0"),
        ("slic", {"weight": -1}, "weight: .*greater than or equal to 0, got -1"),
        ("simpo", {"gamma": -0.5}, "gamma: .*greater than or equal to 0, got -0.5"),
        ("orpo", {"beta": -1}, "beta: .*greater than 0, got -1"),
        ("simpo", {"gama": 1}, "unknown key 'gama': did you mean 'gamma'"),
    ],
)
def test_a_bad_setting_is_named(slug, setting, message, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message) as caught:
        train(slug, data=ROWS, output=run, **{**SMALL, **setting})
    assert "\n" not in str(caught.value)
    assert not run.exists()
