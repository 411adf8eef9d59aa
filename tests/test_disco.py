"""DisCO: scores, the objective and its limits, exact micro-batches, and runs of the method."""

import itertools

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, untimed, write_rows
from postgrad.advantages.group import group_mean_centred
from postgrad.api import train
from postgrad.claims.disco import gradient_norms, of_disco, of_grpo, of_mean_baseline
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.disco import DisCO, DisCOSettings
from postgrad.objectives.discriminative import (
    discriminative_objective,
    hinge_coefficient,
    old_divergence,
    sequence_score,
)
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {
    "rollout": {"samples": 6, "max_new_tokens": 5, "temperature": 0.8},
    "batch_size": 4,
    "minibatches": 2,
}
SCORES = torch.tensor([-0.5, -0.7, -0.4, -1.0, -1.2])
RIGHT, GROUP = torch.tensor([1.0, 1, 0, 0, 0]), torch.zeros(5, dtype=torch.long)


def lettered(completions):
    """Right is what begins with a letter: about every second response of an untrained policy."""
    return [float(text[:1].isalpha()) for text in completions]


def made(reward=lettered, **config):
    values = {"model": "tiny", **SHORT, **config}
    return DisCO(validated(DisCOSettings, values), Place(), data=ROWS, reward=reward)


# The objective -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "value", "negatives"),
    [
        (None, 0.266667, (-0.333333, -0.333333, -0.333333)),
        (1.0, 0.206395, (-0.500465, -0.274661, -0.224874)),
        (10.0, 0.260855, (-0.349055, -0.328727, -0.322218)),
        (0.1, -0.090420, (-0.997194, -0.002472, -0.000335)),
    ],
)
def test_the_worked_example(tau, value, negatives):
    scores = SCORES.clone().requires_grad_()
    objective = discriminative_objective(scores, RIGHT, GROUP, tau)
    assert objective.item() == pytest.approx(value, abs=1e-6)
    (gradient,) = torch.autograd.grad(objective, scores)
    assert gradient.tolist() == pytest.approx([0.5, 0.5, *negatives], abs=1e-6)
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-6)
    raised = discriminative_objective(scores + 3, RIGHT, GROUP, tau)
    assert raised.item() == pytest.approx(value, abs=1e-5)


def test_the_limits_of_tau():
    plain = discriminative_objective(SCORES, RIGHT, GROUP)
    loose = discriminative_objective(SCORES.double(), RIGHT.double(), GROUP, 1e5)
    assert float(loose) == pytest.approx(float(plain), abs=1e-5)
    strict = discriminative_objective(SCORES, RIGHT, GROUP, 1e-4)
    assert float(strict) == pytest.approx(-0.6 - -0.4, abs=1e-3)


def test_prompts_that_compare_nothing_count_in_the_mean_alone():
    scores = torch.cat([SCORES, torch.tensor([5.0, 6.0, -7.0])]).requires_grad_()
    rewards = torch.cat([RIGHT, torch.tensor([1.0, 1.0, 0.0])])
    groups = torch.cat([GROUP, torch.tensor([4, 4, 9])])
    objective = discriminative_objective(scores, rewards, groups, 1.0)
    assert objective.item() == pytest.approx(0.206395 / 3, abs=1e-6)
    (gradient,) = torch.autograd.grad(objective, scores)
    assert gradient[5:].tolist() == [0, 0, 0]
    alone = discriminative_objective(scores[5:], rewards[5:], groups[5:], 1.0)
    (gradient,) = torch.autograd.grad(alone, scores)
    assert alone.item() == 0
    assert not gradient.any()


def test_scores_and_divergence_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    old = torch.log(torch.tensor([[0.5, 0.5, 0.5], [0.25, 1.0, 1.0]]))
    new = torch.log(torch.tensor([[0.25, 0.5, 1.0], [0.5, 1.0, 1.0]])).requires_grad_()
    likelihood = sequence_score(new, old, mask)
    assert likelihood.tolist() == pytest.approx([-(3 * 0.693147) / 3, -0.693147], abs=1e-6)
    ratio = sequence_score(new, old, mask, "likelihood-ratio")
    assert ratio.tolist() == pytest.approx([(0.5 + 1 + 2) / 3, 2.0])
    divergence = old_divergence(new, old, mask)
    assert divergence.sum().item() == pytest.approx(-0.693147, abs=1e-6)
    low = old_divergence(new, old, mask, "k3")
    expected = (new - old).exp() - 1 - (new - old)
    torch.testing.assert_close(low, torch.where(mask, expected, 0.0))
    assert bool((low >= 0).all())


def test_at_the_sampler_both_scores_have_one_gradient():
    old = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] * 3 + [False]])
    gradients = []
    for kind in ("log-likelihood", "likelihood-ratio"):
        new = old.clone().requires_grad_()
        gradients.append(torch.autograd.grad(sequence_score(new, old, mask, kind).sum(), new)[0])
    torch.testing.assert_close(*gradients)


def test_plain_discrimination_is_reinforce_without_the_weight_of_difficulty():
    """dJ/ds = (r - p) / (G p (1 - p)): Dr. GRPO's weights over p (1 - p)."""
    scores = SCORES.clone().requires_grad_()
    objective = discriminative_objective(scores, RIGHT, GROUP)
    (gradient,) = torch.autograd.grad(objective, scores)
    expected = group_mean_centred(RIGHT, GROUP) / (5 * 0.4 * 0.6)
    torch.testing.assert_close(gradient, expected)


def test_gradients_by_difficulty_on_a_bandit():
    """GRPO's follow sqrt(p (1 - p)), those of a mean baseline p (1 - p), DisCO-b's neither."""
    rates = torch.tensor([rate for rate, _ in gradient_norms(of_grpo)])
    spread = rates * (1 - rates)

    def relative(objective):
        norms = torch.tensor([norm for _, norm in gradient_norms(objective)])
        return norms / norms[len(norms) // 2]

    assert len(rates) == 19
    torch.testing.assert_close(relative(of_grpo), (spread / 0.25).sqrt())
    torch.testing.assert_close(relative(of_mean_baseline), spread / 0.25)
    torch.testing.assert_close(relative(discriminative_objective), torch.ones(19))
    assert float(relative(of_disco).min()) > 0.9


def test_the_penalty_costs_nothing_within_the_allowance():
    assert hinge_coefficient(3e-4, 1e-4, 1e3) == pytest.approx(0.2)
    assert hinge_coefficient(1e-4, 1e-4, 1e3) == 0
    assert hinge_coefficient(-1.0, 1e-4, 1e3) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: discriminative_objective(SCORES, RIGHT / 2, GROUP), "must be 0 or 1, got 0.5"),
        (lambda: discriminative_objective(SCORES, RIGHT, GROUP, 0.0), "tau must be above 0"),
        (lambda: discriminative_objective(SCORES, RIGHT, GROUP[1:]), "one shape"),
        (
            lambda: sequence_score(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2).bool()),
            "without tokens",
        ),
        (lambda: old_divergence(torch.zeros(1, 2), torch.zeros(1, 3), RIGHT[None] > 0), "shape"),
        (lambda: hinge_coefficient(0.0, -1.0, 1.0), "delta and beta"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The method --------------------------------------------------------------------------------------


def one_step(method, batch, **settings):
    """What the loop's optimiser does with one optimiser step; the gradients stay in place."""
    loop = LoopSettings(**{"learning_rate": 1e-12, "clip_norm": 0, **settings})
    metrics = method.update(batch, Optimisers(method.modules(), loop, torch.device("cpu")))
    return metrics, {n: p.grad.clone() for n, p in method.policy.named_parameters()}


def after_a_change(**config):
    """A method of one optimiser step whose policy has left the one that sampled."""
    method = made(minibatches=1, epochs=1, sync_every=2, **config)
    batch = method.collect(0)
    moved(method)
    return method, batch


@pytest.mark.parametrize("score", ["log-likelihood", "likelihood-ratio"])
def test_the_loss_is_the_papers_by_loops(score):
    method, batch = after_a_change(score=score, tau=0.5, delta=1e-3, beta=50.0)
    loss, metrics = method.loss(batch)
    loss.backward()
    got = {n: p.grad.clone() for n, p in method.policy.named_parameters()}
    method.policy.zero_grad(set_to_none=True)
    scores = method._score(batch)
    lengths = [len(response) for response in batch.responses]
    divergence, values = 0.0, []
    for i, length in enumerate(lengths):
        new, old = scores.logprobs[i, :length], batch.old_logprobs[i, :length]
        divergence = divergence + (old - new).sum() / sum(lengths)
        terms = new if score == "log-likelihood" else (new - old).exp()
        values.append(terms.mean())
    total = 0.0
    for group in range(4):
        own = [i for i in range(len(batch)) if batch.group[i] == group]
        right = [values[i] for i in own if batch.reward[i] == 1]
        wrong = [values[i] for i in own if batch.reward[i] == 0]
        if right and wrong:
            negatives = 0.5 * torch.stack([(s / 0.5).exp() for s in wrong]).mean().log()
            total = total + torch.stack(right).mean() - negatives
    expected = -total / 4 + 25.0 * (divergence - 1e-3).clamp(min=0).square()
    expected.backward()
    assert metrics["objective"] == pytest.approx((total / 4).item(), rel=1e-4)
    assert metrics["kl_from_sampler"] == pytest.approx(divergence.item(), rel=1e-4)
    assert metrics["penalty/slope"] > 0
    for name, parameter in method.policy.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("budget", [1, 20, 70])
def test_micro_batches_give_the_same_step_even_where_they_cut_a_group(budget):
    method, batch = after_a_change(tau=0.1, delta=1e-3)
    whole, expected = one_step(method, batch, token_budget=None)
    parts, got = one_step(method, batch, token_budget=budget)
    cut = list(batch.split(budget))
    groups = [set(part.group.tolist()) for part in cut]
    shared = any(a & b for a, b in itertools.pairwise(groups))
    assert shared == (budget < 70)
    assert len(cut) > 1
    for name in ("objective", "kl_from_sampler", "penalty/slope", "loss"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4), name
    assert whole["penalty/slope"] > 0
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-3)


def test_the_first_optimiser_step_has_no_penalty_and_later_ones_have():
    method = made(minibatches=2, delta=0.0, beta=1e4)
    seen = []
    measured = method.measured
    method.measured = lambda *args: seen.append(measured(*args)) or seen[-1]
    method.update(
        method.collect(0),
        Optimisers(method.modules(), LoopSettings(learning_rate=1e-2), torch.device("cpu")),
    )
    first, second = (float(batch.divergence[0]) for batch in seen)
    assert abs(first) < 1e-5
    assert second > 1e-3
    assert float(seen[1].slope[0]) == pytest.approx(1e4 * second, rel=1e-4)


def test_without_right_responses_nothing_moves():
    method = made(lambda completions: [0.0] * len(completions), minibatches=1)
    _, gradients = one_step(method, method.collect(0))
    assert not any(bool(gradient.any()) for gradient in gradients.values())


def test_an_entropy_bonus_is_taken_from_the_loss():
    method = made(minibatches=1)
    with_bonus = made(minibatches=1, entropy_coefficient=0.1)
    batch = method.collect(0)
    plain, _ = method.loss(batch)
    loss, metrics = with_bonus.loss(batch)
    assert loss.item() == pytest.approx(plain.item() - 0.1 * metrics["entropy"], abs=1e-5)


def test_rewards_between_right_and_wrong_are_refused(tmp_path):
    halves = [0.0, 0.5, 1.0, 0.25]
    with pytest.raises(PostgradError, match=r"must be 0 or 1, got 0.25, 0.5"):
        train(
            "disco", data=ROWS, steps=1, output=tmp_path / "run", **SMALL, **SHORT,
            reward=lambda completions: [halves[i % 4] for i in range(len(completions))],
        )  # fmt: skip


def test_the_mean_reward_rises(tmp_path):
    settings = {**SMALL, **SHORT, "learning_rate": 2e-3, "delta": 1e-2}
    train("disco", data=ROWS, reward=lettered, steps=24, output=tmp_path / "run", **settings)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "objective" in row]
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-6:]) / 6 - sum(rewards[:6]) / 6 > 0.2


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def lettered(completions):\n"
        "    return [float(text[:1].isalpha()) for text in completions]\n"
    )
    data = write_rows(tmp_path / "prompts.jsonl", ROWS)
    settings = {**SMALL, **SHORT, "data": data, "reward": f"{reward}:lettered"}
    assert_resumes("disco", tmp_path, **settings, save_every=2)
    assert any(row.get("penalty/slope", 0) > 0 for row in untimed(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0}, r"^tau: .*greater than 0"),
        ({"delta": -1}, r"^delta: .*greater than or equal to 0"),
        ({"negatives": "mean", "tau": 1.0}, "tau: DisCO-b, negatives=mean, has no temperature"),
        ({"negatives": "hard"}, "negatives: .*'log-sum-exp' or 'mean'"),
        ({"score": "likelihood"}, "score: .*'log-likelihood' or 'likelihood-ratio'"),
        ({"mask": "none"}, "mask: DisCO's objective .* has no such part"),
        ({"aggregation": "sequence-mean"}, "aggregation: DisCO's objective .* has no such part"),
        ({"kl_coefficient": 0.1}, "kl_coefficient: expected 0, got 0.1"),
        ({"rollout": {"samples": 1}}, "rollout.samples: .* at least 2"),
    ],
)
def test_a_bad_setting_is_named(settings, message, tmp_path):
    given = {"data": ROWS, "reward": lettered, **SMALL, **SHORT, "model": "no-such-folder"}
    with pytest.raises(PostgradError, match=message) as caught:
        train("disco", output=tmp_path / "run", **{**given, **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
