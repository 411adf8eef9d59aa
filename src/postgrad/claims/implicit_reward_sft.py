"""The claim of SFT by f-divergences: staying near the reference makes a better start for DPO."""

from typing import Any

import torch
from torch import Tensor

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.opinions import (
    TOKENS,
    gold,
    log_ratios,
    log_ratios_of,
    measure,
    preferences,
    reference_policy,
    sample,
    subjects,
)
from postgrad.claims.stepping import train_in_steps
from postgrad.models.language import LanguagePolicy
from postgrad.objectives.supervised import Divergence, f_divergence, f_divergence_sft
from postgrad.seeding import generator

METRIC = "reward after DPO"
STEPS = 100  # of each stage
RATE = 1e-3  # the usual learning rate of the first stage
DPO_RATE = 3e-5
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT": ("sft", {"learning_rate": RATE}),
    "SFT, rate/4": ("sft", {"learning_rate": RATE / 4}),
    "Pearson": (
        "implicit-reward-sft",
        {"learning_rate": RATE, "divergence": "pearson", "beta": 0.1},
    ),
    "Hellinger": (
        "implicit-reward-sft",
        {"learning_rate": RATE, "divergence": "hellinger", "beta": 0.3},
    ),
}
DIVERGENCES: dict[str, Divergence] = {
    "SFT": "tv",
    "Pearson": "pearson",
    "Hellinger": "hellinger",
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    steps, samples = (10, 30) if quick else (STEPS, 600)
    policy = reference_policy(seed, *([5] if quick else []))
    policy.freeze_reference()
    pairs = preferences(policy, seed)
    kept = sample(policy, subjects()["test"], samples // 30, "kept", seed)
    prompts = subjects()["training"][: 20 if quick else None]
    slug, settings = ARMS[arm]
    objects = {"model": policy, "data": demonstrations(policy, seed, prompts)}
    common: dict[str, Any] = {"steps": steps, "batch_size": 32, "schedule": "constant"}
    common |= {"warmup_steps": 10, "max_response_tokens": TOKENS}
    for _ in train_in_steps(slug, seed, objects, **{**common, **settings}):
        pass
    after = measure(policy, "test", samples // 30, seed, "after SFT")
    values = {
        "reward after SFT": after.reward,
        "KL to the reference after SFT": after.divergence,
        "KL of the reference after SFT": -float(
            log_ratios(policy, kept.prompts, kept.responses).mean()
        ),
        "accuracy of the implicit reward": implicit_accuracy(policy, pairs),
    }
    policy.freeze_reference()  # DPO's is the result of SFT
    settings = {**common, "learning_rate": DPO_RATE}
    for _ in train_in_steps("dpo", seed, {"model": policy, "data": pairs}, **settings):
        pass
    end = measure(policy, "test", samples // 30, seed, "after DPO")
    values = {METRIC: end.reward, **values, "KL of DPO to its start": end.divergence}
    if arm in DIVERGENCES:
        values |= in_a_table(DIVERGENCES[arm], seed)
    return Outcome(values)


def demonstrations(policy: LanguagePolicy, seed: int, prompts: list[str]) -> list[dict[str, str]]:
    """On every subject the best of four opinions of the reference, by gold reward."""
    texts = sample(policy, prompts, 4, "demonstrations", seed).texts
    best = (max(texts[4 * i : 4 * i + 4], key=gold) for i in range(len(prompts)))
    return [
        {"prompt": prompt, "completion": text}
        for prompt, text in zip(prompts, best, strict=True)
        if text.strip()
    ]


def implicit_accuracy(policy: LanguagePolicy, pairs: list[dict[str, str]]) -> float:
    """How often the implicit reward beta log pi/pi_ref prefers what the labels prefer."""
    chosen, rejected = (log_ratios_of(policy, pairs, name) for name in ("chosen", "rejected"))
    return float((chosen > rejected).float().mean())


def in_a_table(kind: Divergence, seed: int, outcomes: int = 6) -> dict[str, float]:
    """Exact optima for a random expert and reference, beta 1, of the loss without a value; and how
    far the optimal value of the loss with one is from that of the problem it is the dual of."""
    draws = torch.randn(2, outcomes, generator=generator(seed, "expert"), dtype=torch.float64)
    expert, reference = draws.softmax(-1)

    def dual(logits: Tensor, value: Tensor | float = 0.0) -> Tensor:
        # beyond the floor Hellinger's loss is so large that no line search goes there; the others
        # have none, and where a loss is flat the search ends in 0/0
        floor = -1 + 1e-6 if kind == "hellinger" else None
        losses = f_divergence_sft(
            logits.log_softmax(0), reference.log(), kind, 1.0, value, floor=floor
        )
        return (expert * losses).sum()

    def primal(logits: Tensor) -> Tensor:
        log_policy = logits.log_softmax(0)  # finite, also where the policy itself underflows
        policy = log_policy.exp()
        return f_divergence(policy, expert, kind) + (policy * (log_policy - reference.log())).sum()

    start = reference.log()
    fixed, _ = minimum(lambda variables: dual(variables), start)
    policy = fixed.softmax(0)
    found = {"table: KL to the reference": float((policy * (policy / reference).log()).sum())}
    if kind != "tv":  # whose conjugate is that of |t| <= 1/2 only
        _, least = minimum(primal, start)
        free = torch.cat([start, torch.zeros(1, dtype=torch.float64)])
        _, dual_least = minimum(lambda v: dual(v[:-1], v[-1]), free)
        found["table: gap between primal and dual"] = abs(least + dual_least)
    return found


def minimum(objective: Any, start: Tensor) -> tuple[Tensor, float]:
    """Where a function of float64 variables is least, by L-BFGS from `start`, and its value."""
    variables = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [variables],
        max_iter=1000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value: Tensor = objective(variables)
        value.backward()
        return value

    optimiser.step(closure)
    return variables.detach(), float(closure().detach())


CLAIM = Claim(
    slug="implicit-reward-sft",
    statement="After SFT by a divergence in which the reference survives, or with a smaller "
    "learning rate, the same DPO reaches more reward than after plain SFT.",
    task="a tiny language model writes opinions such as `the soup was warm, old and bitter.`; gold "
    "reward = approving words - disapproving words (-3 to 3). First 100 steps on 150 "
    "demonstrations (best of four by gold reward), then 100 steps of DPO on 300 pairs drawn from "
    "the reference on 150 subjects; measured on 30 other subjects",
    metric=METRIC,
    higher_is_better=True,
    method="Hellinger",
    baseline="SFT",
    arms=tuple(ARMS),
    run=run,
    notes="Not separable with three seeds: after the Hellinger form one seed's DPO ran far from its"
    " start (4.9 nats) and ended at 1.15, the other two seeds end above plain SFT; the "
    "smaller learning rate alone (SFT, rate/4) is as good as any. What does hold on every "
    "seed: a smaller KL to the reference after SFT by Hellinger or by the smaller rate (not "
    "with Pearson). Rates and betas were fixed before the reported seeds and"
    " not tuned arm by arm. The values called table are exact optima for random distributions"
    " over six outcomes.",
)
