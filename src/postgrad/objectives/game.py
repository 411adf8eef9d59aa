"""Preference games in tables: exact values, best responses, duality gaps and Nash policies.

A game over K responses is `preferences` P `[K, K]`, P[i, j] the probability that i is preferred to
j, with P + P^T = 1. A policy is a distribution `[K]`. The game that is regularised towards a
reference mu by tau > 0 is (Nash-MD, arXiv 2312.00886)

    J(p, q) = p^T P q - tau KL(p || mu) + tau KL(q || mu)

It is symmetric, so both players have one equilibrium policy, which is unique for tau > 0. With
tau = 0 an equilibrium is a von Neumann winner: no policy is preferred to it.

Steps towards it take and return log-policies, since a policy may come to be smaller than a number
can hold. Several games at once are a leading dimension of all arguments. The last part of this
module is what the same methods need on sampled responses.
"""

from typing import Literal

import torch
from torch import Tensor

from postgrad.objectives.shapes import (
    expect_dimensions,
    expect_numbers,
    expect_same_shape,
    expect_tokens,
)

KLCredit = Literal["sequence", "token"]


def random_game(size: int, generator: torch.Generator) -> Tensor:
    """P `[size, size]` float64 with independent uniform entries above the diagonal."""
    upper = torch.rand(size, size, generator=generator, dtype=torch.float64).triu(1)
    game = upper + (1 - upper.mT).tril(-1)
    return game + 0.5 * torch.eye(size, dtype=torch.float64)


def wins_against(preferences: Tensor, opponent: Tensor) -> Tensor:
    """P(y > opponent) `[..., K]` of every response y."""
    return (preferences @ opponent.unsqueeze(-1)).squeeze(-1)


def best_response(preferences: Tensor, opponent: Tensor, mu: Tensor, tau: float) -> Tensor:
    """argmax_p J(p, opponent) = mu exp(P opponent / tau) / Z, `[..., K]`; at tau 0 the best row."""
    wins = wins_against(preferences, opponent)
    if tau == 0:
        expect_numbers(wins=wins)
        return torch.nn.functional.one_hot(wins.argmax(-1), wins.shape[-1]).to(wins)
    return (mu.log() + wins / tau).softmax(-1)


def game_value(preferences: Tensor, p: Tensor, q: Tensor, mu: Tensor, tau: float) -> Tensor:
    """J(p, q), a number for each game."""
    value = (p * wins_against(preferences, q)).sum(-1)
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
    return wins_against(preferences, policy).amax(-1) - 0.5


def nash_policy(preferences: Tensor, mu: Tensor, tau: float, tolerance: float = 1e-12) -> Tensor:
    """The equilibrium `[K]` of the regularised game, tau > 0, to a duality gap of `tolerance`.

    The extragradient method (arXiv 2503.08942) on logits, which converges linearly.

    Raises:
        ValueError: tau is not positive.
        RuntimeError: the gap is still larger after a million steps.
    """
    if not tau > 0:
        raise ValueError(f"the equilibrium is unique for tau > 0 only, got {tau}")
    expect_game(preferences)
    if not bool((mu > 0).all()):
        raise ValueError("mu must be positive everywhere")
    log_mu = mu.log()
    log_policy = log_mu
    for count in range(1_000_000):
        log_policy = extragradient_step(preferences, log_policy, log_mu, tau, 1 / (tau + 1))
        policy = log_policy.exp()
        if count % 50 == 0 and bool((duality_gap(preferences, policy, mu, tau) < tolerance).all()):
            return policy
    raise RuntimeError(f"no equilibrium to a gap of {tolerance} within a million steps")


def hedge_self_play(
    preferences: Tensor, logits: Tensor, step: float, count: int
) -> tuple[Tensor, Tensor]:
    """Average and last of `count` policies `[K]` that play themselves (SPO, arXiv 2401.04056).

    pi_{t+1} = pi_t exp(step M pi_t)/Z with M = 2 P - 1, starting at softmax(logits). No response is
    preferred to the average by more than regret/count, while the last may go round in cycles.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 policy, got {count}")
    total = torch.zeros_like(logits)
    policy = logits.softmax(-1)
    for _ in range(count):
        policy = logits.softmax(-1)
        total = total + policy
        logits = logits + step * (2 * preferences - 1) @ policy
    return total / count, policy


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats; terms of p = 0 are 0."""
    return torch.where(p == 0, 0.0, p * (p.log() - q.log())).sum(-1)


# Steps ----------------------------------------------------------------------------------------


def geometric_mixture(first: Tensor, second: Tensor, coefficient: float) -> Tensor:
    """Logits of first^(1 - c) second^c / Z from logits of both `[..., K]`, c in [0, 1].

    At 0 and 1 the result is `first` and `second` themselves, to the bit.
    """
    expect_same_shape(first=first, second=second)
    if not 0 <= coefficient <= 1:
        raise ValueError(f"the coefficient of a mixture must lie in [0, 1], got {coefficient}")
    if coefficient in (0, 1):
        return second if coefficient == 1 else first
    return (1 - coefficient) * first + coefficient * second


def mirror_step(
    preferences: Tensor,
    log_policy: Tensor,
    opponent: Tensor,
    log_mu: Tensor,
    tau: float,
    eta: float,
) -> Tensor:
    """One step of mirror descent in the regularised game, `[..., K]`.

    argmax_p eta P(p > opponent) - eta tau KL(p || mu) - (1 - eta tau) KL(p || policy), which is
    policy^(1 - eta tau) mu^(eta tau) exp(eta P(. > opponent)) / Z. Against the policy itself it is
    self-play (online mirror descent), without a regulariser if tau = 0; with eta tau = 1 it is the
    best response.

    Args:
        preferences: P `[..., K, K]`.
        log_policy: `[..., K]`.
        opponent: a distribution `[..., K]`.
        log_mu: the reference, `[..., K]`.
        tau: strength of the regulariser, at least 0.
        eta: step size, positive, with eta tau of at most 1.
    """
    expect_same_shape(log_policy=log_policy, opponent=opponent, log_mu=log_mu)
    expect_game(preferences)
    if not (tau >= 0 and eta > 0 and eta * tau <= 1):
        raise ValueError(
            f"tau must be at least 0, eta positive and eta tau at most 1, got {tau} and {eta}"
        )
    centre = geometric_mixture(log_policy, log_mu, eta * tau)
    return (centre + eta * wins_against(preferences, opponent)).log_softmax(-1)


def nash_md_step(
    preferences: Tensor, log_policy: Tensor, log_mu: Tensor, tau: float, eta: float
) -> Tensor:
    """Nash-MD (arXiv 2312.00886): the mirror step against policy^(1 - eta tau) mu^(eta tau) / Z.

    With eta_t = 2 / (tau (t + 2)), t from 0, KL(equilibrium || policy) after T steps is at most
    8 / (tau^2 (T + 1)). A constant eta ends at a distance of order eta from the equilibrium.
    """
    opponent = geometric_mixture(log_policy, log_mu, eta * tau).softmax(-1)
    return mirror_step(preferences, log_policy, opponent, log_mu, tau, eta)


def extragradient_step(
    preferences: Tensor, log_policy: Tensor, log_mu: Tensor, tau: float, eta: float
) -> Tensor:
    """EGPO (arXiv 2503.08942): the mirror step from the policy against where it would lead.

    ahead = mirror step against the policy itself; then the step from the OLD policy against ahead.
    eta tau must be below 1.
    """
    if not eta * tau < 1:
        raise ValueError(f"eta tau must be below 1, got {eta} times {tau}")
    ahead = mirror_step(preferences, log_policy, log_policy.softmax(-1), log_mu, tau, eta)
    return mirror_step(preferences, log_policy, ahead.exp(), log_mu, tau, eta)


def expect_game(preferences: Tensor) -> None:
    """Raise ValueError unless `preferences` is `[..., K, K]` with P + P^T = 1."""
    if preferences.ndim < 2 or preferences.shape[-1] != preferences.shape[-2]:
        raise ValueError(f"preferences must be [..., K, K], got {list(preferences.shape)}")
    sums = preferences + preferences.mT
    if not bool(((sums - 1).abs() <= 1e-6).all()):
        raise ValueError(
            "preferences must satisfy P + P^T = 1 with 1/2 on the diagonal, found a sum of "
            f"{float(sums.flatten()[(sums - 1).abs().argmax()]):g}"
        )


# Sampled responses ----------------------------------------------------------------------------


def nash_weights(
    wins: Tensor, log_ratio: Tensor, mask: Tensor, tau: float, kl: KLCredit = "sequence"
) -> Tensor:
    """The constants `[N, T]` that multiply log pi(y_t) in Nash-MD-PG (arXiv 2312.00886).

    w = P(y > y') - 1/2 - tau sum_t log pi/mu(y_t), the same at every token of y ("sequence"), or
    w_t = P(y > y') - 1/2 - tau log pi/mu(y_t) ("token": a token answers for its own log-ratio
    alone, not for those after it; biased). 0 at padding; no gradient.

    Args:
        wins: P(y > y') `[N]`, in [0, 1], for y of the policy and y' of its opponent.
        log_ratio: log pi(y_t) - log mu(y_t), `[N, T]`.
        mask: which tokens count, `[N, T]`.
        tau: strength of the KL to the reference mu, at least 0.
        kl: what of the log-ratio a token answers for.
    """
    expect_tokens(mask, log_ratio=log_ratio)
    _expect_wins(wins)
    if wins.shape != mask.shape[:1]:
        raise ValueError(f"wins {list(wins.shape)} do not fit a mask of {list(mask.shape)}")
    if not tau >= 0:
        raise ValueError(f"tau must be at least 0, got {tau}")
    if kl not in ("sequence", "token"):
        raise ValueError(f"kl must be 'sequence' or 'token', got {kl!r}")
    ratios = torch.where(mask, log_ratio.detach(), 0.0)
    charged = ratios.sum(1, keepdim=True) if kl == "sequence" else ratios
    return torch.where(mask, (wins.detach() - 0.5).unsqueeze(1) - tau * charged, 0.0)


def online_ipo(delta: Tensor, wins: Tensor, other_wins: Tensor, beta: float) -> Tensor:
    """(Delta - (P(y > m) - P(y' > m)) / beta)^2 `[B]` (EGPO, arXiv 2503.08942), m the opponent.

    For a table of K logits, and the mean over all ordered pairs, gradient descent at the rate
    eta beta K / 4 is the mirror step against m. An estimate of the wins from a single response of
    m leaves the gradient unbiased.

    Args:
        delta: log pi/pi_ref(y) - log pi/pi_ref(y'), `[B]`.
        wins: P(y > m) `[B]`, in [0, 1]; constant.
        other_wins: P(y' > m) `[B]`, in [0, 1]; constant.
        beta: strength of the KL to the reference, positive.
    """
    expect_same_shape(delta=delta, wins=wins, other_wins=other_wins)
    _expect_wins(wins)
    _expect_wins(other_wins)
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return (delta - (wins - other_wins).detach() / beta).square()


def _expect_wins(wins: Tensor) -> None:
    expect_dimensions(1, wins=wins)
    if not bool(((wins >= 0) & (wins <= 1)).all()):
        raise ValueError("wins must be probabilities in [0, 1]")
