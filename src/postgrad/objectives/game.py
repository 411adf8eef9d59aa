"""Preference games in tables: exact values, best responses, duality gaps and Nash policies.

A game over K responses is `preferences` P `[K, K]`, P[i, j] the probability that i is preferred to
j, with P + P^T = 1. A policy is a distribution `[K]`. The game that is regularised towards a
reference mu by tau > 0 is (Nash-MD, arXiv 2312.00886)

    J(p, q) = p^T P q - tau KL(p || mu) + tau KL(q || mu)

It is symmetric, so both players have one equilibrium policy, which is unique for tau > 0. With
tau = 0 an equilibrium is a von Neumann winner: no policy is preferred to it.
"""

import torch
from torch import Tensor


def random_game(size: int, generator: torch.Generator) -> Tensor:
    """P `[size, size]` float64 with independent uniform entries above the diagonal."""
    upper = torch.rand(size, size, generator=generator, dtype=torch.float64).triu(1)
    game = upper + (1 - upper.mT).tril(-1)
    return game + 0.5 * torch.eye(size, dtype=torch.float64)


def best_response(preferences: Tensor, opponent: Tensor, mu: Tensor, tau: float) -> Tensor:
    """argmax_p J(p, opponent) = mu exp(P opponent / tau) / Z, `[K]`; with tau = 0 the best row."""
    wins = preferences @ opponent
    if tau == 0:
        return torch.nn.functional.one_hot(wins.argmax(), len(wins)).to(wins)
    return (mu.log() + wins / tau).softmax(-1)


def game_value(preferences: Tensor, p: Tensor, q: Tensor, mu: Tensor, tau: float) -> Tensor:
    """J(p, q), a number."""
    value = p @ preferences @ q
    if tau == 0:
        return value
    return value - tau * divergence(p, mu) + tau * divergence(q, mu)


def duality_gap(preferences: Tensor, policy: Tensor, mu: Tensor, tau: float) -> Tensor:
    """max_p J(p, policy) - min_q J(policy, q): 0 at the equilibrium alone, positive elsewhere."""
    # the game is symmetric: the reply that hurts `policy` most is the best response to it
    reply = best_response(preferences, policy, mu, tau)
    return game_value(preferences, reply, policy, mu, tau) - game_value(
        preferences, policy, reply, mu, tau
    )


def exploitability(preferences: Tensor, policy: Tensor) -> Tensor:
    """max_y P(y > policy) - 1/2: how much the best single response beats the policy by."""
    return (preferences @ policy).max() - 0.5


def nash_policy(preferences: Tensor, mu: Tensor, tau: float, tolerance: float = 1e-12) -> Tensor:
    """The equilibrium `[K]` of the regularised game, tau > 0, to a duality gap of `tolerance`.

    The extragradient method (arXiv 2503.08942) on logits, which converges linearly.

    Raises:
        ValueError: tau is not positive.
        RuntimeError: the gap is still larger after a million steps.
    """
    if not tau > 0:
        raise ValueError(f"the equilibrium is unique for tau > 0 only, got {tau}")
    step = 1 / (tau + 1)
    anchor = mu.log()
    logits = anchor.clone()

    def moved(policy: Tensor) -> Tensor:
        return (1 - step * tau) * logits + step * tau * anchor + step * preferences @ policy

    for count in range(1_000_000):
        logits = moved(moved(logits.softmax(-1)).softmax(-1))
        policy = logits.softmax(-1)
        if count % 50 == 0 and duality_gap(preferences, policy, mu, tau) < tolerance:
            return policy
    raise RuntimeError(f"no equilibrium to a gap of {tolerance} within a million steps")


def hedge_self_play(
    preferences: Tensor, logits: Tensor, step: float, count: int
) -> tuple[Tensor, Tensor]:
    """Average and last of `count` policies `[K]` that play themselves (SPO, arXiv 2401.04056).

    pi_{t+1} = pi_t exp(step M pi_t)/Z with M = 2 P - 1, starting at softmax(logits). No response is
    preferred to the average by more than regret/count, while the last may go round in cycles.
    """
    total = torch.zeros_like(logits)
    policy = logits.softmax(-1)
    for _ in range(count):
        policy = logits.softmax(-1)
        total = total + policy
        logits = logits + step * (2 * preferences - 1) @ policy
    return total / count, policy


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats; terms of p = 0 are 0."""
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum()
