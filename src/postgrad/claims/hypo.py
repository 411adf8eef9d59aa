"""HyPO's claim: where the pairs do not cover all responses, it keeps the reward that DPO loses."""

from typing import Any

import torch
from torch import Tensor

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.opinions import TOKENS, preferences, reference_policy, trained
from postgrad.objectives.divergence import reverse_kl_surrogate
from postgrad.objectives.pairwise import logistic, margin
from postgrad.seeding import generator

BETA, WEIGHT = 0.1, 0.05
FEATURES = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.49, 0.49, 0.02], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
WEIGHTS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
BETAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
PAIRS, STEPS, PROMPTS, SAMPLES, RATE = 1000, 1500, 64, 2, 0.05
METRIC = "reward on three arms"

# beta and lambda on the three arms, and the method on a language model
ARMS: dict[str, tuple[float, float, str, dict[str, Any]]] = {
    "HyPO": (BETA, WEIGHT, "hypo", {"learning_rate": 1e-4, "kl_weight": 0.03}),
    "DPO": (BETA, 0.0, "dpo", {"learning_rate": 3e-5}),
    "DPO, beta 1": (1.0, 0.0, "dpo", {"learning_rate": 1e-4}),
}
OPINION_STEPS, TEMPERATURE = 100, 0.5


def run(arm: str, seed: int, quick: bool) -> Outcome:
    beta, weight, slug, settings = ARMS[arm]
    exact = on_three_arms(beta, weight, seed, 50 if quick else STEPS)
    policy = reference_policy(seed, *([5] if quick else []))
    if slug == "hypo":
        settings = {**settings, "rollout": {"samples": SAMPLES, "max_new_tokens": TOKENS}}
    found = trained(
        slug,
        {"max_response_tokens": TOKENS, "beta": beta, **settings},
        policy,
        {"data": preferences(policy, seed, temperature=TEMPERATURE)},
        seed,
        steps=10 if quick else OPINION_STEPS,
        samples=30 if quick else 600,
    )
    return Outcome(
        exact.values | {f"opinions: {name}": value for name, value in found.values.items()},
        exact.curves | {f"opinions: {name}": curve for name, curve in found.curves.items()},
    )


def log_policy(theta: Tensor) -> Tensor:
    """log pi `[..., 3]` of theta `[...]`: pi is proportional to pi_ref exp(theta features)."""
    return (REFERENCE.log() + theta.unsqueeze(-1) * FEATURES).log_softmax(-1)


def judged(theta: Tensor) -> tuple[float, float]:
    """Expected reward and KL to the reference."""
    log_pi = log_policy(theta)
    return float(log_pi.exp() @ REWARDS), float(log_pi.exp() @ (log_pi - REFERENCE.log()))


def pair_loss(theta: Tensor, beta: float) -> Tensor:
    """DPO's loss `[..., 2]` of the pair of arms 1 and 2, labelled either way."""
    log_pi, log_ref = log_policy(theta), REFERENCE.log().expand(*theta.shape, 3)
    first = margin(log_pi[..., 0], log_pi[..., 1], log_ref[..., 0], log_ref[..., 1])
    return torch.stack([logistic(beta * first), logistic(-beta * first)], -1)


def exact_minimum(weight: float, beta: float = BETA) -> Tensor:
    """theta at the least expected loss of infinitely many pairs and samples, on a grid."""
    grid = torch.linspace(-50, 50, 100_001, dtype=torch.float64)
    log_pi = log_policy(grid)
    wins = torch.sigmoid(REWARDS[0] - REWARDS[1])
    pairs = pair_loss(grid, beta) @ torch.stack([wins, 1 - wins])
    divergence = (log_pi.exp() * (log_pi - REFERENCE.log())).sum(-1)
    return grid[(pairs + weight * divergence).argmin()]


def on_three_arms(beta: float, weight: float, seed: int, steps: int) -> Outcome:
    """The deciding numbers: Adam on sampled pairs of the first two arms, and on own samples."""
    random = generator(seed, "three arms")
    chance = torch.rand(PAIRS, generator=random, dtype=torch.float64)
    labels = (chance > torch.sigmoid(REWARDS[0] - REWARDS[1])).long()
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([theta], lr=RATE)
    followed = []
    for step in range(steps):
        drawn = labels[torch.randint(PAIRS, (PROMPTS,), generator=random)]
        loss = pair_loss(theta, beta)[drawn].mean()
        log_pi = log_policy(theta)
        if weight > 0:
            own = torch.multinomial(
                log_pi.detach().exp(), PROMPTS * SAMPLES, True, generator=random
            )
            own = own.view(PROMPTS, SAMPLES, 1)
            mask = torch.ones_like(own, dtype=torch.bool)
            surrogate = reverse_kl_surrogate(log_pi[own], REFERENCE.log()[own], mask)
            loss = loss + weight * surrogate.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 25 == 24:
            followed.append((float(step + 1), *judged(theta.detach())))
    reward, divergence = judged(theta.detach())
    values = {METRIC: reward, "KL on three arms": divergence}
    curves = {
        "reward": [(step, reward) for step, reward, _ in followed],
        "KL": [(step, divergence) for step, _, divergence in followed],
    }
    if weight > 0:
        minima = [(weight, *judged(exact_minimum(weight))) for weight in WEIGHTS]
        curves["exact reward over lambda"] = [(weight, reward) for weight, reward, _ in minima]
        curves["exact KL over lambda"] = [(weight, kl) for weight, _, kl in minima]
    else:
        minima = [(beta, *judged(exact_minimum(0.0, beta))) for beta in BETAS]
        curves["exact reward over beta"] = [(beta, reward) for beta, reward, _ in minima]
        curves["exact KL over beta"] = [(beta, kl) for beta, _, kl in minima]
    return Outcome(values, curves)


CLAIM = Claim(
    slug="hypo",
    statement="Where offline pairs do not cover all responses, HyPO's reverse KL on its own "
    "samples keeps the reward that DPO loses to responses it never sees.",
    task="three responses of one log-linear parameter (features 0.5, 0 and 1; reference 0.49, 0.49 "
    "and 0.02; rewards 1, 0 and -1); 1000 Bradley-Terry pairs of the first two, beta 0.1; Adam on "
    "64 pairs a step and, for HyPO, 2 fresh samples of 64 prompts; expected reward at the end",
    metric=METRIC,
    higher_is_better=True,
    method="HyPO",
    baseline="DPO",
    arms=tuple(ARMS),
    run=run,
    notes="On the three responses all arms take 1500 steps of Adam at 0.05 on the same 1000 labels."
    " lambda 0.05 is from the exact curve over lambda, which shows a threshold (between 0.02 and "
    "0.03) below which HyPO fails as DPO does. The comparison is at the same beta: DPO with a beta "
    "of 1, from the exact curve over beta, reaches as much (0.60 to 0.59). "
    "The values called opinions are those of a tiny language model after 100 steps on pairs "
    "from a narrow sampler (temperature 0.5). Chosen on seed 100, which is not reported: for HyPO "
    "lambda 0.03 (0.1 was tried too, and no other learning rate), for DPO a learning rate of 3e-5 "
    "(1e-4 was tried), with a beta of 1 of 1e-4 (3e-4 was tried). There HyPO reaches more reward "
    "than DPO of the same beta within 1 nat (1.31 to 1.05) and ends at 1.3 nats where DPO ends at "
    "3.3, with slightly less reward (1.46 to 1.50). DPO with a beta of 1 does about as well as "
    "HyPO: 1.25 within 1 nat, 1.44 at 1.5 nats at the end. So in both worlds a larger beta, if one "
    "knows which, does what the KL on own samples does.",
)
