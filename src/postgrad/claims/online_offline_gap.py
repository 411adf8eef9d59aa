"""A study: the gap between online and offline alignment (Tang et al. 2024, arXiv:2405.08448).

A golden judge labels pairs of an older policy; from here on only it counts as truth. One arm
learns from these pairs directly. The other samples from its own policy and is labelled by a proxy
that was fitted to the same pairs: both see the same information, and have the same loss, IPO's:

    Delta = log pi/pi_ref(y_w) - log pi/pi_ref(y_l)
    L = (Delta - 1/(2 beta))^2

Every checkpoint is judged by its win rate against the reference, under the golden judge, and by
its KL to the reference; arms are compared at the same KL. The gap is then put to the test:

    H1 coverage         learn offline, in random order, from the very pairs of the online run
    H2 quality          learn offline from pairs of the final online policy, golden labels
    H3 classification   use the policy as a classifier of held-out pairs: is Delta > 0?
    H4 loss             the same with Best-of-2, L = -log pi(y_w)

The paper finds that online wins throughout, that H1 and H2 help in part, that offline policies
classify better and generate worse, and that the gap stays with Best-of-2. Deviations: a tiny model
that writes opinions, whose golden judge counts words; a proxy that is a logistic regression on
words; AdamW; one size of model (the paper's H5 has several), one beta. Besides it the bandit of
`hundred_arms`, exactly.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.hundred_arms import (
    PEAKS,
    Budget,
    Table,
    data_policy,
    draw_contexts,
    learn,
    pairwise,
    peaked_reward,
)
from postgrad.claims.opinions import (
    TOKENS,
    gold,
    log_ratios,
    log_ratios_of,
    preferences,
    reference_policy,
    sample,
    subjects,
)
from postgrad.claims.rso import Ranker
from postgrad.claims.stepping import Collect, own_batch, train_in_steps
from postgrad.evaluation.statistics import value_at
from postgrad.methods.language.online import OnlinePreference
from postgrad.models.language import LanguagePolicy
from postgrad.objectives.pairwise import ipo
from postgrad.seeding import generator

BETA = 0.1
BATCH, OLDER = 32, 100  # OLDER: steps of the policy that wrote the pairs
NATS = (1.0, 0.5, 0.25)
MARGIN = 10.0  # 1/(2 beta), on the bandit
ROLLOUT = {"samples": 2, "max_new_tokens": TOKENS}
METRIC = "gold win rate at 1 nat"
ONLINE, OFFLINE = "online IPO", "offline IPO"
SHUFFLED = "offline IPO on the online run's pairs, shuffled"
FINAL = "offline IPO on pairs of the final online policy"
ONLINE_BEST, OFFLINE_BEST = "online Best-of-2", "offline Best-of-2"
# learning rate and how long, in units of the online run's steps
ARMS = {
    ONLINE: (2e-4, 1),
    SHUFFLED: (2e-4, 1),
    OFFLINE: (3e-4, 3),
    FINAL: (2e-4, 1),
    ONLINE_BEST: (1e-4, 1),
    OFFLINE_BEST: (1e-4, 1),
}


@dataclass(frozen=True)
class Size:
    """How much of everything: opinions on a subject, written, of the reference, and judged."""

    written: int
    opponents: int
    judged: int
    steps: int
    checkpoints: int


FULL = Size(written=12, opponents=20, judged=8, steps=40, checkpoints=8)
QUICK = Size(written=2, opponents=1, judged=1, steps=2, checkpoints=1)


@dataclass(frozen=True)
class World:
    """The golden pairs to learn from and to classify, the proxy, and what the reference says.

    `opponents` are the gold rewards, and proxy rewards, `[n]`, of opinions of the reference.
    """

    pairs: list[dict[str, str]]
    held_out: list[dict[str, str]]
    proxy: Ranker
    opponents: tuple[Tensor, Tensor]
    seed: int
    quick: bool

    @classmethod
    def of(cls, seed: int, quick: bool) -> "World":
        size = QUICK if quick else FULL
        older = reference_policy(seed, 4 if quick else OLDER)
        rows = preferences(older, seed, samples=size.written)
        pairs = [row for i, row in enumerate(rows) if i % 5]
        proxy = Ranker(pairs)
        drawn = sample(
            reference(seed, quick), subjects()["test"], size.opponents, "opponents", seed
        )
        return cls(pairs, rows[::5], proxy, rewards(drawn.texts, proxy), seed, quick)

    @property
    def size(self) -> Size:
        return QUICK if self.quick else FULL

    def judged(self, policy: LanguagePolicy, step: int) -> "Judged":
        """A policy by fresh opinions on the test subjects, and by the held-out pairs."""
        drawn = sample(policy, subjects()["test"], self.size.judged, "judged", self.seed, step)
        golden, guessed = (
            float(torch.sigmoid(own.unsqueeze(1) - others).mean())
            for own, others in zip(rewards(drawn.texts, self.proxy), self.opponents, strict=True)
        )
        chosen, rejected = (
            log_ratios_of(policy, self.held_out, name) for name in ("chosen", "rejected")
        )
        return Judged(
            step=float(step),
            divergence=float(log_ratios(policy, drawn.prompts, drawn.responses).mean()),
            gold=golden,
            proxy=guessed,
            accuracy=float(((chosen - rejected).sign() + 1).mean() / 2),
            length=sum(map(len, drawn.responses)) / len(drawn.responses),
        )


@dataclass(frozen=True)
class Judged:
    """A checkpoint: KL in nats, win rates by gold and by proxy, accuracy, tokens a response."""

    step: float
    divergence: float
    gold: float
    proxy: float
    accuracy: float
    length: float


def reference(seed: int, quick: bool) -> LanguagePolicy:
    """The policy that every arm starts from, which stays its reference."""
    policy = reference_policy(seed, *([5] if quick else []))
    policy.freeze_reference()
    return policy


def rewards(texts: list[str], proxy: Ranker) -> tuple[Tensor, Tensor]:
    """Gold and proxy rewards `[n]`; P(a over b) is the sigmoid of a difference of either."""
    return torch.tensor([gold(text) for text in texts]), torch.tensor(proxy.scores(texts))


def run(arm: str, seed: int, quick: bool) -> Outcome:
    world = World.of(seed, quick)
    points = list(judged_in_training(arm, world))
    by_name = {
        name: [(point.divergence, getattr(point, kind)) for point in points]
        for name, kind in (
            ("gold win rate", "gold"),
            ("proxy win rate", "proxy"),
            ("accuracy", "accuracy"),
        )
    }
    values = {
        f"{name} at {nats:g} {'nat' if nats == 1 else 'nats'}": value_at(curve, nats)
        for nats in NATS
        for name, curve in by_name.items()
    }
    values["best gold win rate"] = max(point.gold for point in points)
    values |= {f"{name} at the end": curve[-1][1] for name, curve in by_name.items()}
    values["KL at the end"] = points[-1].divergence
    values["tokens a response at the end"] = points[-1].length
    values["accuracy of the proxy"] = proxy_accuracy(world)
    curves = {f"{name} over KL": curve for name, curve in by_name.items()}
    curves["KL"] = [(point.step, point.divergence) for point in points]
    if arm in (ONLINE, OFFLINE):
        found, more = in_tables(
            arm == ONLINE, seed, Budget(rounds=3, steps=5) if quick else Budget()
        )
        values, curves = values | found, curves | more
    return Outcome(values, curves)


def judged_in_training(arm: str, world: World) -> Iterator[Judged]:
    """Train one arm from the reference, judged now and then."""
    policy = reference(world.seed, world.quick)
    rate, times = ARMS[arm]
    steps = times * world.size.steps
    collect: Collect = own_batch
    if arm in (ONLINE, SHUFFLED):
        training = online_ipo(world)
        if arm == SHUFFLED:
            collect = shuffled(online_run(world)[1], world.seed)
    elif arm == ONLINE_BEST:
        training = Training(
            "best-of-n",
            {"rollout": ROLLOUT},
            {"data": prompts(), "reward": world.proxy.scores},
        )
    elif arm == OFFLINE_BEST:
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in world.pairs]
        training = Training("sft", {"max_response_tokens": TOKENS}, {"data": rows})
    else:
        rows = world.pairs
        if arm == FINAL:
            rows = preferences(online_run(world)[0], world.seed, samples=world.size.written)
        training = Training(
            "ipo",
            {
                "beta": BETA,
                "length_normalised": False,
                "max_response_tokens": TOKENS,
            },
            {"data": rows},
        )
    yield world.judged(policy, 0)
    for step in trained(policy, world, training, rate, steps, collect):
        if step % (steps // world.size.checkpoints) == 0:
            yield world.judged(policy, step)


@dataclass(frozen=True)
class Training:
    """A method of the library, its settings, and what it takes from Python besides the model."""

    slug: str
    settings: dict[str, Any]
    objects: dict[str, Any]


def prompts() -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in subjects()["training"]]


def online_ipo(world: World) -> Training:
    return Training(
        "online-dpo",
        {"loss": "ipo", "beta": BETA, "rollout": ROLLOUT},
        {"data": prompts(), "preference": world.proxy},
    )


def trained(
    policy: LanguagePolicy,
    world: World,
    training: Training,
    rate: float,
    steps: int,
    collect: Collect = own_batch,
) -> Iterator[int]:
    """Train the policy; yields the steps made."""
    made = train_in_steps(
        training.slug,
        world.seed,
        {"model": policy, **training.objects},
        collect,
        steps=steps,
        learning_rate=rate,
        batch_size=BATCH,
        warmup_steps=10,
        schedule="constant",
        **training.settings,
    )
    for step, _ in made:
        yield step


def online_run(world: World) -> tuple[LanguagePolicy, Batch]:
    """The final policy of the online run, and all pairs that it learnt from, in order."""
    kept: list[Batch] = []

    def recorded(method: OnlinePreference, step: int) -> Batch:
        kept.append(method.collect(step))
        return kept[-1]

    policy = reference(world.seed, world.quick)
    rate, times = ARMS[ONLINE]
    for _ in trained(policy, world, online_ipo(world), rate, times * world.size.steps, recorded):
        pass
    return policy, functools.reduce(Batch.joined, kept)


def shuffled(pairs: Batch, seed: int) -> Collect:
    """Batches of recorded pairs in random order, each pair once."""
    order = torch.randperm(len(pairs), generator=generator(seed, "shuffled"))
    return lambda method, step: pairs.select(order[step * BATCH : (step + 1) * BATCH])


def proxy_accuracy(world: World) -> float:
    """How often the proxy classifies the held-out pairs as they are labelled."""
    chosen, rejected = ([row[name] for row in world.held_out] for name in ("chosen", "rejected"))
    said = torch.tensor(world.proxy(chosen, rejected)) - 0.5
    return float((said.sign() + 1).mean() / 2)


def in_tables(
    online: bool, seed: int, budget: Budget
) -> tuple[dict[str, float], dict[str, list[tuple[float, float]]]]:
    """The same question exactly, on the bandit of a hundred actions.

    Offline pairs come in the small batches that the online run has, or all at once.
    """
    values, curves = {}, {}
    budgets = {
        "": replace(budget, online=online),
        ", offline in one batch": budget if online else budget.offline(),
    }
    for name, peak in PEAKS.items():
        for form, how in budgets.items():
            points = learn(
                Table(data_policy(seed)),
                draw_contexts(1, seed),
                peaked_reward(peak),
                pairwise(lambda delta: ipo(delta, 1 / (2 * MARGIN))),
                how,
                seed,
                every=5,
            )
            curve = [(point.divergence, point.reward) for point in points]
            values[f"bandit, {name}{form}: reward at 1 nat"] = value_at(curve, 1.0)
            values[f"bandit, {name}{form}: reward at the end"] = curve[-1][1]
            values[f"bandit, {name}{form}: KL at the end"] = curve[-1][0]
            curves[f"bandit, {name}{form}: reward over KL"] = curve
    return values, curves


CLAIM = Claim(
    slug="online-offline-gap",
    statement="At the same KL from the reference, IPO online, labelled by a proxy fitted to the "
    "golden pairs, wins more often under the golden judge than IPO offline on those pairs.",
    task="a tiny language model writes opinions such as `the soup was warm, old and bitter.`; the "
    "golden judge counts approving less disapproving words (Bradley-Terry); 900 pairs on 150 "
    "subjects by a half-trained policy, a fifth of them held out; the proxy is a logistic "
    "regression on words; IPO with beta 0.1, 32 pairs a step; win rate against the reference on 30 "
    "other subjects, where the path over KL first reaches 1 nat",
    metric=METRIC,
    higher_is_better=True,
    method=ONLINE,
    baseline=OFFLINE,
    arms=tuple(ARMS),
    run=run,
    findings=(
        Finding(
            "The best checkpoint of the online run wins more often than that of the offline run.",
            "best gold win rate",
            ONLINE,
            OFFLINE,
        ),
        Finding(
            "H1: covering the very pairs of the online run does not make offline match online.",
            METRIC,
            ONLINE,
            SHUFFLED,
        ),
        Finding("H1: but it helps.", METRIC, SHUFFLED, OFFLINE),
        Finding(
            "H2: pairs of the final online policy do not make offline match online.",
            METRIC,
            ONLINE,
            FINAL,
        ),
        Finding("H2: but they help.", METRIC, FINAL, OFFLINE),
        Finding(
            "H3: at the same KL the offline policy classifies held-out golden pairs better.",
            "accuracy at 1 nat",
            OFFLINE,
            ONLINE,
        ),
        Finding("H3: so it does at the end.", "accuracy at the end", OFFLINE, ONLINE),
        Finding(
            "H4: Best-of-2, too, wins more often online than offline at the same KL.",
            "gold win rate at 0.5 nats",
            ONLINE_BEST,
            OFFLINE_BEST,
        ),
        *(
            Finding(
                f"Exactly, on a bandit, {where}: online has more reward at the same KL.",
                f"bandit, {form}: reward at 1 nat",
                ONLINE,
                OFFLINE,
            )
            for where, form in (
                ("if the reference rarely takes the best actions (R1)", "R1"),
                ("if it often does (R2)", "R2"),
                ("R1, if all offline pairs come in one batch", "R1, offline in one batch"),
            )
        ),
    ),
    notes="All arms read their number off the path over KL where it first reaches it; one that "
    "never does counts with its furthest checkpoint. beta is 0.1, the only one tried; 40 steps "
    "online, 120 offline. Learning rates on seed 100, which is not reported: online IPO 2e-4 (of "
    "1e-4 and 2e-4), offline 3e-4 (of 1e-4, 2e-4, 3e-4 and 1e-3, which went to 15 nats), "
    "Best-of-2 1e-4 (of 1e-4 and 3e-4, which online went to 40 nats); the two ablations have that "
    "of the online run. On the bandit the gap at the same KL depends on the batches of the offline "
    "arm: in the online run's small ones it is behind, with all 3000 samples in one it is not.",
)
