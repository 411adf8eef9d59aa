"""The claim of differential information: of all rewards only DPO's log-ratio finds the target."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.opinions import (
    TOKENS,
    log_ratios_of,
    preferences,
    reference_policy,
    subjects,
    trained,
)
from postgrad.methods.language.preference.differential_information import measure_information
from postgrad.objectives.gradients import without_lowering
from postgrad.objectives.information import (
    differential_information,
    entropy,
    rejected_distribution,
)
from postgrad.objectives.pairwise import hinge, ipo, logistic, pair_weight
from postgrad.seeding import generator

RESPONSES, STEPS, RATE = 32, 2000, 0.05
COEFFICIENTS = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)  # tried for each rival
METRIC = "divergence from the target"

# the loss `[V, V]` of every pair of a chosen and a rejected response, from their log-probabilities
# and log-ratios to the reference, with one coefficient
PairLosses = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def _log_odds(logp: Tensor) -> Tensor:
    return logp - torch.log1p(-logp.exp().clamp(max=1 - 1e-12))


LOSSES: dict[str, tuple[PairLosses, Sequence[float]]] = {
    "DPO": (lambda lw, ll, rw, rl, beta: logistic(beta * (rw - rl)), [1.0]),
    "DPO-PG": (lambda lw, ll, rw, rl, beta: logistic(beta * (rw - rl)), [1.0]),
    "hinge": (lambda lw, ll, rw, rl, beta: hinge(beta * (rw - rl)), COEFFICIENTS),
    "IPO": (lambda lw, ll, rw, rl, beta: ipo(rw - rl, beta), COEFFICIENTS),
    "CPO": (lambda lw, ll, rw, rl, beta: logistic(beta * (lw - ll)) - lw, COEFFICIENTS),
    "ORPO": (
        lambda lw, ll, rw, rl, share: share * logistic(_log_odds(lw) - _log_odds(ll)) - lw,
        COEFFICIENTS,
    ),
    "SLiC": (lambda lw, ll, rw, rl, share: hinge(lw - ll) - share * lw, COEFFICIENTS),
    "SimPO": (lambda lw, ll, rw, rl, beta: logistic(beta * (lw - ll - 0.5)), COEFFICIENTS),
}
# on a language model
METHODS = {"DPO": "dpo", "DPO-PG": "differential-information"}
LEARNING_RATE = 3e-5


def run(arm: str, seed: int, quick: bool) -> Outcome:
    steps = STEPS // 20 if quick else STEPS
    loss, coefficients = LOSSES[arm]
    reference, target = torch.randn(
        2, RESPONSES, generator=generator(seed, "policies"), dtype=torch.float64
    ).log_softmax(-1)
    rejected = rejected_distribution(reference, target, 1.0)
    fits = [
        fitted(loss, coefficient, reference, rejected, steps, projected=arm == "DPO-PG")
        for coefficient in coefficients
    ]
    distances = [jensen_shannon(policy, target) for policy in fits]
    best = fits[min(range(len(fits)), key=distances.__getitem__)]
    values = {
        METRIC: min(distances),
        "that of the reference": jensen_shannon(reference, target),
        "change of the chosen log-likelihood": float((reference.exp() * (best - reference)).sum()),
    }
    if arm == "DPO":
        values |= of_two_kinds(seed, steps)
    if arm not in METHODS:
        return Outcome(values)
    policy = reference_policy(seed, *([5] if quick else []))
    rows = preferences(policy, seed)
    found = trained(
        METHODS[arm],
        {"max_response_tokens": TOKENS, "learning_rate": LEARNING_RATE},
        policy,
        {"data": rows},
        seed,
        steps=10 if quick else 100,
        every=10 if quick else 20,
        samples=30 if quick else 300,
    )
    prompts = [policy.render(prompt) for prompt in subjects()["test"]]
    more = measure_information(policy, prompts, 4 if quick else 32, TOKENS, seed)
    more["change of the chosen log-likelihood"] = float(
        log_ratios_of(policy, rows, "chosen").mean()
    )
    named = {f"opinions: {name}": value for name, value in (found.values | more).items()}
    curves = {f"opinions: {name}": points for name, points in found.curves.items()}
    return Outcome(values | named, curves)


def fitted(
    loss: PairLosses,
    coefficient: float,
    reference: Tensor,
    rejected: Tensor,
    steps: int,
    projected: bool = False,
) -> Tensor:
    """log pi `[V]` after Adam on the exact mean loss of y_w ~ reference, y_l ~ rejected.

    `projected` takes from every step what lowers the chosen responses.
    """
    pairs = reference.exp()[:, None] * rejected.exp()[None, :]
    logits = reference.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=RATE)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        policy = logits.log_softmax(-1)
        ratio = policy - reference
        values = loss(policy[:, None], policy[None, :], ratio[:, None], ratio[None, :], coefficient)
        (slope,) = torch.autograd.grad((pairs * values).sum(), logits, retain_graph=projected)
        if projected:
            h = coefficient * (ratio[:, None] - ratio[None, :])
            weights = (pairs * coefficient * pair_weight(h)).detach()
            (up,) = torch.autograd.grad((weights * policy[:, None]).sum(), logits)
            (ascent,), _ = without_lowering([-slope], [up])
            slope = -ascent
        logits.grad = slope
        optimiser.step()
    return logits.detach().log_softmax(-1)


def jensen_shannon(first: Tensor, second: Tensor) -> float:
    """The Jensen-Shannon divergence of two policies, from log-probabilities, in nats."""
    middle = torch.logaddexp(first, second) - torch.tensor(2.0).log()
    return float(
        ((first.exp() * (first - middle)).sum() + (second.exp() * (second - middle)).sum()) / 2
    )


def of_two_kinds(seed: int, steps: int, divergence: float = 0.5) -> dict[str, float]:
    """DPO to targets at one KL(target || reference) that concentrate on one response, or spread."""
    random = generator(seed, "kinds")
    reference = torch.randn(RESPONSES, generator=random, dtype=torch.float64).log_softmax(-1)
    spread = torch.randn(RESPONSES, generator=random, dtype=torch.float64)
    one = torch.nn.functional.one_hot(reference.argsort()[RESPONSES // 2], RESPONSES).double()
    values: dict[str, float] = {}
    for name, tilt in (("one response", one), ("spread", spread)):
        low, high = 0.0, 50.0
        for _ in range(60):  # the divergence grows with the tilt's size
            size = (low + high) / 2
            target = (reference + size * tilt).log_softmax(-1)
            far = (target.exp() * (target - reference)).sum() > divergence
            low, high = (low, size) if far else (size, high)
        rejected = rejected_distribution(reference, target, 1.0)
        policy = fitted(LOSSES["DPO"][0], 1.0, reference, rejected, steps)
        values |= {
            f"{name}: entropy of the information": float(
                entropy(differential_information(target, reference))
            ),
            f"{name}: change of the chosen log-likelihood": float(
                (reference.exp() * (policy - reference)).sum()
            ),
            f"{name}: minus KL(reference || target)": float(
                (reference.exp() * (target - reference)).sum()
            ),
            f"{name}: change of the policy's entropy": float(entropy(policy) - entropy(reference)),
        }
    return values


CLAIM = Claim(
    slug="differential-information",
    statement="Where preferences encode the information from reference to target, DPO's log-ratio "
    "finds the target and other rewards do not; DPO-PG keeps the chosen responses' likelihood and "
    "learns information of lower entropy.",
    task="32 responses, Gaussian logits, beta 1: chosen ~ reference, rejected ∝ reference "
    "(reference/target), exact expectation over all pairs, 2000 steps of Adam; Jensen-Shannon "
    "divergence of the fitted policy from the target",
    metric=METRIC,
    higher_is_better=False,
    method="DPO",
    baseline="SimPO",
    arms=tuple(LOSSES),
    run=run,
    notes="The verdict is on the first half of the claim and exact: with infinite data of this kind"
    " DPO's fit is the target to seven digits, and no other loss comes nearer than 0.03 (IPO "
    "is the nearest by a little; each loss has its best of several beta or margin). The "
    "second half holds in part: DPO-PG keeps the likelihood of chosen responses (it falls by "
    "0.03 nats where DPO's falls by 1.06), and for that hardly moves towards the target. On "
    "the opinions, a tiny language model and 300 noisy pairs, its projection changes little "
    "(nothing at all on one seed), and the entropy of the information it learns is not lower "
    "than DPO's.",
)
