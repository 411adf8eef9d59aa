"""Reward models of groups of people, from pairs whose annotators are known but not their groups.

Hard expectation-maximisation over users (MaxMin-RLHF, arXiv 2402.08925, algorithm 2). A group's
reward r_u gives each of N pairs a margin r_u(x, y_w) - r_u(x, y_l), and with it the Bradley-Terry
likelihood sigma(margin). A user belongs to the group under which all of their pairs together are
likeliest; assigning single pairs would not identify the groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from postgrad.objectives.shapes import expect_dimensions, expect_numbers

Model = TypeVar("Model")
_NEWTON, _SMALLEST = 10, 1e-9  # steps: near the end each doubles the number of right digits


def user_likelihoods(margins: Tensor, users: Tensor, count: int) -> Tensor:
    """sum over a user's pairs of log sigma(margin), `[U, H]`, from `margins` `[U, N]`.

    `users` `[N]` holds the user of each pair, 0 to H - 1 with H = `count`.

    Raises:
        ValueError: shapes that do not fit, margins that are not finite, or a user without pairs.
    """
    if margins.ndim != 2 or users.shape != margins.shape[1:]:
        raise ValueError(
            f"margins must be [U, N] and users [N], got {list(margins.shape)} and "
            f"{list(users.shape)}"
        )
    if not bool(margins.isfinite().all()):
        raise ValueError("margins must be finite")
    if users.is_floating_point() or users.unique().tolist() != list(range(count)):
        raise ValueError(f"users must be whole numbers, each of 0 to {count - 1} with a pair")
    totals = torch.zeros(len(margins), count, dtype=margins.dtype, device=margins.device)
    return totals.index_add(1, users, logsigmoid(margins))


def assign_users(likelihoods: Tensor) -> Tensor:
    """The E-step: each user's likeliest group `[H]`, the first of equals, from `[U, H]`.

    The groups have no prior: a small group is no less likely.
    """
    if likelihoods.ndim != 2 or not len(likelihoods):
        raise ValueError(f"likelihoods must be [U, H], got {list(likelihoods.shape)}")
    expect_numbers(likelihoods=likelihoods)
    return likelihoods.argmax(0)


@dataclass(frozen=True)
class Mixture(Generic[Model]):
    """What hard EM found.

    Attributes:
        models: of each group.
        assignment: `[H]` the group of each user.
        likelihood: sum over users of their log-likelihood under their group.
        history: the same after every round; it never falls if no M-step raises its loss.
    """

    models: list[Model]
    assignment: Tensor
    likelihood: float
    history: list[float]


def em_reward_mixture(
    fit: Callable[[Tensor, Model | None], Model],
    margins: Callable[[Model], Tensor],
    users: Tensor,
    groups: int,
    *,
    rounds: int = 10,
    restarts: int = 1,
    generator: torch.Generator,
) -> Mixture[Model]:
    """Hard EM over users, the likeliest of `restarts` runs.

    Args:
        fit: the M-step: a model for the pairs where its argument `[N]` (bool) is true, continued
            from the group's previous model (None in the first round).
        margins: what a model gives to all pairs, `[N]`.
        users: `[N]` the user of each pair, 0 to H - 1.
        groups: how many, at most H.
        rounds: M-steps with the E-steps that follow them.
        restarts: the first assigns users in turn (user number modulo groups), as the official code
            does; further ones at random. Hard EM has local optima.
        generator: for those.

    A group that loses all users keeps its model.
    """
    if not len(users):
        raise ValueError("users must be those of at least one pair, got none")
    count = int(users.max()) + 1
    if not 1 <= groups <= count:
        raise ValueError(f"expected 1 to {count} groups of {count} users, got {groups}")
    if rounds < 1 or restarts < 1:
        raise ValueError(f"expected at least one round and run, got {rounds} and {restarts}")
    return max(
        (
            _em(fit, margins, users, _first_assignment(count, groups, run, generator), rounds)
            for run in range(restarts)
        ),
        key=lambda mixture: mixture.likelihood,
    )


def _first_assignment(count: int, groups: int, run: int, generator: torch.Generator) -> Tensor:
    in_turn = torch.arange(count) % groups
    return in_turn[torch.randperm(count, generator=generator)] if run else in_turn


def _em(
    fit: Callable[[Tensor, Model | None], Model],
    margins: Callable[[Model], Tensor],
    users: Tensor,
    assignment: Tensor,
    rounds: int,
) -> Mixture[Model]:
    count = len(assignment)
    models = [fit((assignment == group)[users], None) for group in range(int(assignment.max()) + 1)]
    history: list[float] = []
    while True:
        likelihoods = user_likelihoods(torch.stack([margins(m) for m in models]), users, count)
        assignment = assign_users(likelihoods)
        history.append(float(likelihoods.amax(0).sum()))
        if len(history) == rounds:
            return Mixture(models, assignment, history[-1], history)
        for group, model in enumerate(models):
            mine = (assignment == group)[users]
            if bool(mine.any()):
                models[group] = fit(mine, model)


def linear_reward(
    differences: Tensor, mine: Tensor, start: Tensor | None = None, decay: float = 1.0
) -> Tensor:
    """Weights `[d]` of the Bradley-Terry reward that is linear in features: the M-step of many.

    The minimum of -sum log sigma(weights . x) + decay/2 |weights|^2 over the rows x of
    `differences` `[N, d]` (the chosen response's features minus the rejected one's) where `mine`
    `[N]` is true, by Newton's method from `start`.
    """
    expect_dimensions(2, differences=differences)
    if mine.shape != differences.shape[:1] or mine.dtype != torch.bool:
        raise ValueError(f"mine must be boolean [N], got {mine.dtype} {list(mine.shape)}")
    if not decay > 0:
        raise ValueError(f"the decay must be above 0, got {decay}")
    rows = differences[mine]
    prior = decay * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    weights = rows.new_zeros(rows.shape[1]) if start is None else start

    def loss(at: Tensor) -> Tensor:
        return -logsigmoid(rows @ at).sum() + decay / 2 * at.square().sum()

    for _ in range(_NEWTON):
        wrong = torch.sigmoid(-(rows @ weights))
        curvature = (rows * (wrong * (1 - wrong))[:, None]).T @ rows + prior
        step = torch.linalg.solve(curvature, rows.T @ wrong - prior @ weights)
        # from far away, where little curves, a full step may lead uphill
        while loss(weights + step) > loss(weights) and float(step.norm()) > _SMALLEST:
            step = step / 2
        weights = weights + step
    return weights
