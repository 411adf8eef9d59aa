"""The study of on-policy data and negative gradients: its theory, its losses, its bandit."""

import math

import pytest
import torch

from postgrad.advantages.pairing import reward_pairs
from postgrad.advantages.sample_weights import (
    best_of_n_weights,
    exponential_weights,
    without_negatives,
)
from postgrad.claims import on_policy_suboptimal as study
from postgrad.claims.hundred_arms import (
    ACTIONS,
    PEAKS,
    Budget,
    Drawn,
    Network,
    Reinforce,
    Table,
    best_of_n,
    data_policy,
    draw_contexts,
    fitted_network,
    learn,
    pairwise,
    peaked_reward,
    preferred_fine_tuning,
    reward_weighted,
)
from postgrad.objectives.one_step import forward_kl_step, reverse_kl_step
from postgrad.objectives.pairwise import ipo, logistic, margin

P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
Q = torch.tensor([0.05, 0.15, 0.8], dtype=torch.float64)
REWARDS = torch.tensor([[0.2, 0.9, 0.9, 0.1], [0.5, 0.4, 0.3, 0.0]], dtype=torch.float64)


def close(found, *expected):
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
    )


# One step ------------------------------------------------------------------------------------


def test_the_worked_example_of_one_step():
    forward, reverse = forward_kl_step(P, Q, 0.1), reverse_kl_step(P, Q, 0.1)
    close(forward.gradient, 0.65, 0.05, -0.70)
    close(forward.policy, 0.681716, 0.206820, 0.111464)
    close(forward.log_ratio, -0.026468, 0.033532, 0.108532)
    assert float(forward.constant) == pytest.approx(0.038532, abs=1e-6)
    assert float(forward.divergence) == pytest.approx(1.488448, abs=1e-6)
    close(reverse.gradient, 0.659487, -0.281850, -0.377637)
    close(reverse.policy, 0.679170, 0.213203, 0.107627)
    close(reverse.log_ratio, -0.030209, 0.063925, 0.073504)
    assert float(reverse.constant) == pytest.approx(0.035740, abs=1e-6)
    assert float(reverse.divergence) == pytest.approx(1.696932, abs=1e-6)


def test_the_constant_is_that_of_every_bin():
    for step in (forward_kl_step(P, Q, 0.1), reverse_kl_step(P, Q, 0.1)):
        torch.testing.assert_close(step.log_ratio + 0.1 * step.gradient, step.constant.expand(3))


def test_gradients_are_those_of_fine_tuning_and_of_policy_gradients():
    """Forward: of -E_q log p. Reverse: minus the policy gradient of E_p log q/p."""
    logits = P.log().requires_grad_()
    (fine_tuning,) = torch.autograd.grad(-(Q * logits.log_softmax(0)).sum(), logits)
    torch.testing.assert_close(forward_kl_step(P, Q, 1.0).gradient, fine_tuning)
    log_p = logits.log_softmax(0)
    returns = (Q.log() - log_p).detach()
    (towards,) = torch.autograd.grad((P * returns * log_p).sum(), logits)
    torch.testing.assert_close(reverse_kl_step(P, Q, 1.0).gradient, -towards)


def test_the_reverse_step_hardly_touches_what_is_unlikely():
    p = torch.tensor([0.6, 0.4 - 1e-6, 1e-6], dtype=torch.float64)
    q = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64)
    steps = {"forward": forward_kl_step(p, q, 0.1), "reverse": reverse_kl_step(p, q, 0.1)}
    moved = {name: float(step.log_ratio[2] - step.constant) for name, step in steps.items()}
    assert moved["forward"] == pytest.approx(0.08, abs=1e-6)
    assert abs(moved["reverse"]) < 1e-5


@pytest.mark.parametrize(
    ("policy", "target", "eta"), [(P, Q, 0.0), (P, 2 * Q, 0.1), (P[:2], Q, 0.1), (P - 0.1, Q, 0.1)]
)
def test_one_step_refuses_what_is_no_distribution(policy, target, eta):
    for step in (forward_kl_step, reverse_kl_step):
        with pytest.raises(ValueError, match=r"positive|one shape"):
            step(policy, target, eta)


# Losses --------------------------------------------------------------------------------------


def test_equally_good_samples_share_the_weight_of_the_best():
    close(best_of_n_weights(REWARDS)[0], 0, 0.5, 0.5, 0)
    close(best_of_n_weights(REWARDS, against_worst=0.1)[1], 1, 0, 0, -0.1)
    close(best_of_n_weights(torch.ones(1, 2).double(), 1.0)[0], 0, 0)


def test_reward_weights_lie_between_fine_tuning_on_all_and_best_of_n():
    every = exponential_weights(REWARDS, 1e9, normalised=True)
    torch.testing.assert_close(every, torch.full_like(REWARDS, 0.25))
    best = exponential_weights(REWARDS, 1e-3, normalised=True)
    torch.testing.assert_close(best, best_of_n_weights(REWARDS))
    torch.testing.assert_close(exponential_weights(REWARDS, 0.5), (REWARDS / 0.5).exp())


def test_without_negatives_nothing_is_pushed_down():
    weights = without_negatives(torch.tensor([[-1.0, 0.5], [0.0, 2.0]]))
    assert weights.tolist() == [[0.0, 1.5], [1.0, 3.0]]


def test_pairs_are_those_whose_rewards_differ_enough():
    prompt, better, worse = reward_pairs(REWARDS, threshold=0.25)
    found = set(zip(prompt.tolist(), better.tolist(), worse.tolist(), strict=True))
    assert found == {(0, 1, 0), (0, 1, 3), (0, 2, 0), (0, 2, 3), (1, 0, 3), (1, 1, 3), (1, 2, 3)}
    assert len(reward_pairs(torch.ones(3, 4))[0]) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_of_n_weights(torch.ones(2, 1)), "at least 2 samples"),
        (lambda: best_of_n_weights(torch.ones(3)), r"\[P, N\]"),
        (lambda: best_of_n_weights(REWARDS, -1.0), "against_worst"),
        (lambda: exponential_weights(REWARDS, 0.0), "beta"),
        (lambda: exponential_weights(REWARDS * math.inf, 1.0), "finite"),
        (lambda: reward_pairs(torch.ones(2, 1)), "at least 2"),
        (lambda: reward_pairs(REWARDS, -0.1), "threshold"),
        (lambda: Budget(samples=1), "2 samples"),
        (lambda: Budget(steps=0), "step"),
        (lambda: Budget().in_rounds(7), "do not make 7 rounds"),
        (lambda: ipo(torch.zeros(1), -10.0), "beta"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def drawn(rewards=REWARDS):
    random = torch.Generator().manual_seed(0)
    reference, sampler = -torch.rand(2, *rewards.shape, generator=random, dtype=torch.float64)
    return Drawn(rewards, reference, sampler)


def gradient(objective, logprobs):
    logprobs = logprobs.clone().requires_grad_()
    objective(logprobs).backward()
    return logprobs.grad


def test_of_two_samples_all_pairs_are_the_one_pair_of_dpo():
    found = drawn(REWARDS[:, :2])  # the second is better, then the first
    logprobs = found.sampler - 0.3
    by_hand = margin(
        torch.stack([logprobs[0, 1], logprobs[1, 0]]),
        torch.stack([logprobs[0, 0], logprobs[1, 1]]),
        torch.stack([found.reference[0, 1], found.reference[1, 0]]),
        torch.stack([found.reference[0, 0], found.reference[1, 1]]),
    )
    value = pairwise(lambda delta: logistic(0.1 * delta))(found)(logprobs)
    torch.testing.assert_close(value, logistic(0.1 * by_hand).mean())


def test_the_studys_ipo_has_the_margin_of_the_usual_one():
    found = drawn()
    value = study.LOSSES["IPO"]()(found)(found.sampler)
    usual = pairwise(lambda delta: (delta - 10.0).square())(found)(found.sampler)
    torch.testing.assert_close(value, usual)


def test_where_all_rewards_are_equal_there_is_nothing_to_learn():
    found = drawn(torch.ones(2, 4, dtype=torch.float64))
    for name in ("DPO", "IPO", "REINFORCE", "REINFORCE without negatives", "PPO", "Pref-FT"):
        assert not gradient(study.LOSSES[name]()(found), found.sampler).any(), name


def test_weights_are_minus_the_gradients():
    found = drawn()
    cases = {
        best_of_n(0.1): best_of_n_weights(REWARDS, 0.1),
        reward_weighted(0.5): exponential_weights(REWARDS, 0.5),
        preferred_fine_tuning: torch.tensor([[1.0, 2, 2, 0], [3, 2, 1, 0]]).double() / 4,
    }
    for loss, weights in cases.items():
        torch.testing.assert_close(gradient(loss(found), found.sampler), -weights / 2)


def test_reinforce_standardises_by_all_that_it_has_seen():
    loss = Reinforce()
    loss(drawn(REWARDS[:1]))
    weights = -4 * gradient(loss(drawn(REWARDS[1:])), torch.zeros(1, 4, dtype=torch.float64))
    every = REWARDS.flatten()
    expected = (REWARDS[1:] - every.mean()) / every.std(correction=0)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-6)
    positive = -gradient(Reinforce(negatives=False)(drawn()), torch.zeros(2, 4).double())
    assert float(positive.min()) == 0


def test_ppo_begins_as_reinforce_and_stops_at_the_clip():
    found = drawn()
    at_start = gradient(Reinforce(clip=0.2)(found), found.sampler)
    torch.testing.assert_close(at_start, gradient(Reinforce()(found), found.sampler))
    beyond = gradient(Reinforce(clip=0.2)(found), found.sampler + math.log(1.3))
    assert not beyond[REWARDS.mean() < REWARDS].any()


# The bandit ----------------------------------------------------------------------------------


def test_the_data_policy_is_the_squashed_cauchy():
    edges = torch.linspace(-1, 1, ACTIONS + 1, dtype=torch.float64).atanh()
    below = 0.5 + torch.arctan((edges + 0.7) / 0.4) / math.pi
    expected = below.diff()
    found = data_policy(0)
    assert float(found.sum()) == pytest.approx(1)
    assert (found > 0).all()
    # five standard errors of a share of 10 000 draws
    assert ((found - expected).abs() < 5 * (expected / 10_000).sqrt()).all()
    covered = {name: float(found @ peaked_reward(peak)) for name, peak in PEAKS.items()}
    assert covered["R2"] > 4 * covered["R1"]


@pytest.mark.parametrize("name", study.LOSSES)
def test_online_in_one_round_is_offline(name):
    def learnt(budget):
        contexts, reward = draw_contexts(1, 0), peaked_reward(PEAKS["R1"])
        return learn(Table(data_policy(0)), contexts, reward, study.LOSSES[name](), budget, 0)

    budget = Budget(rounds=3, steps=10)
    points = learnt(budget.in_rounds(1))
    assert points == learnt(budget.offline())
    assert points[-1].step == 30
    assert points[-1].reward != points[0].reward


def test_at_the_start_the_policy_is_its_reference():
    reference = fitted_network(0, data_policy(0), 3)
    contexts = draw_contexts(4, 0)
    start = learn(
        reference, contexts, peaked_reward(70), best_of_n(), Budget(rounds=1, steps=1), 0
    )[0]
    assert start.divergence == 0


def test_a_network_is_fitted_to_the_data_policy():
    contexts, target = draw_contexts(50, 1, "test"), data_policy(0)

    def divergence(network):
        with torch.no_grad():
            return float((target * (target.log() - network(contexts))).sum(-1).mean())

    assert divergence(fitted_network(0, target, 200)) < 0.1 < divergence(Network(0))


def test_online_beats_offline_where_the_reference_does_not_go():
    """The study's claim in its tables; IPO is no match for the tuned offline DPO there."""
    ends = {}
    for online in (True, False):
        values, _ = study.in_tables("IPO", online, 0, Budget())
        ends[online] = values
    assert ends[True]["reward on R1"] > ends[False]["reward on R1"] + 0.3
    assert ends[True]["reward on R1 less that on R2"] > ends[False]["reward on R1 less that on R2"]
