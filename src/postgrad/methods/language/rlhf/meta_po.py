"""Meta Policy Optimization: a judge whose rubric is rewritten while the policy learns from it."""

import json
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Metrics, Place
from postgrad.methods.language.base import Given, RolloutSettings
from postgrad.methods.language.rewarded import require_one
from postgrad.methods.language.rlhf.actor_critic import ActorCritic, ActorCriticSettings
from postgrad.rewards import RewardSpec
from postgrad.rewards.evolving import EvolvingReward, Normalise, Selector, items_of
from postgrad.rewards.functions import load_function
from postgrad.rewards.rubrics import JUDGE, RubricJudge, RubricWriter
from postgrad.sampling.chat import ChatSettings, load_chat
from postgrad.sampling.generation import Rollouts
from postgrad.seeding import generator
from postgrad.timing import timed

_SCRIPT = "official script"


class ItemSettings(Settings):
    """One criterion of a rubric."""

    text: str = setting("", "what is judged, and what earns how many points", min_length=1)
    points: float = setting(5.0, "the most points it gives", gt=0, source="official code, essays")


class MetaPOSettings(ActorCriticSettings):
    """Meta policy optimisation's settings."""

    batch_size: int = setting(64, "prompts a step", gt=0, source=_SCRIPT)
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=1, max_new_tokens=1000), "how the policy is sampled", source=_SCRIPT
    )
    rubric: str | list[str | ItemSettings] = setting(
        [], "the first rubric: one criterion, or several, each a text or a text and its points"
    )
    judge: RewardSpec | None = setting(
        None, "what scores responses by the rubric: module:function or file.py:function"
    )
    judge_model: ChatSettings | None = setting(
        None, "language model that judges, in place of a function"
    )
    judge_instruction: str | None = setting(
        None, "what it is asked, with {criterion}, {points}, {prompt} and {response} in it; if "
        "empty, for a reason and a score",
    )  # fmt: skip
    refine: RewardSpec | None = setting(
        None, "what rewrites the rubric, the meta judge: module:function or file.py:function"
    )
    meta_model: ChatSettings | None = setting(
        None, "language model that rewrites the rubric, in place of a function"
    )
    screen: RewardSpec | None = setting(
        None, "with selector=screened and a function as meta judge: what labels records good, ok "
        "or bad by how well they were scored"
    )  # fmt: skip
    interval: int = setting(20, "steps between changes of the rubric", gt=0, source=_SCRIPT)
    meta_samples: int = setting(
        16, "judged responses that the meta judge reads", gt=0, source=_SCRIPT
    )
    selector: Selector = setting(
        "uniform", "which: any, evenly from low, middle and high rewards, or the worst scored",
        source="official code; stratified: its maths task",
    )  # fmt: skip
    normalise: Normalise = setting(
        "sum", "the reward: the sum of the items' points, or the mean of their shares of them",
        source="official code",
    )  # fmt: skip
    most_unread: float = setting(
        0.5, "share of a step's scores that may be unreadable, which count as 0, before the run "
        "stops", ge=0, le=1
    )  # fmt: skip
    reward: list[RewardSpec] | RewardSpec | None = setting(
        None, "what evaluations report, not learnt from; if empty, the score by the first rubric"
    )
    reward_time_limit: float = setting(
        600.0, "seconds that a call of judge, meta judge or reward may take", gt=0
    )
    kl_coefficient: float = setting(
        0.02, "of the KL to the reference, in each token's reward", ge=0, source=_SCRIPT
    )
    missing_end_penalty: float = setting(
        1.0, "taken off the reward of a response that did not end in time", ge=0, source=_SCRIPT
    )


class MetaPO(ActorCritic):
    """Meta Policy Optimization, MPO (Kim et al. 2025, arXiv:2504.20157).

    A judge with a short fixed rubric is soon exploited, a long one is costly to write. Here a meta
    judge reads judged responses from time to time, sees what the rubric P misses and writes the
    next, so that the reward follows the policy:

        R(x, y)  = sum_j s_j(x, y; P_k)              the judge's score of each item of P_k
        r_t      = -beta log(pi_old/pi_ref) + [t last] R          then as PPO (`ppo-language`)
        P_{k+1}  = refine(P_k, some of the records since P_k)     every `interval` steps

    Judge and meta judge are functions of the user's (see `postgrad.rewards.evolving`) or language
    models, `judge_model` and `meta_model`. The latter analyses every chosen record, refines the
    rubric after it, and merges the refined ones. Rewards of different rubrics cannot be compared:
    evaluations report a fixed one. All rubrics are in the checkpoints and, with the model, in
    `rubrics.json`.

    Deviations: a judging model is asked once an item, for a reason and a number together, without
    constrained decoding; merged items keep their order; the maths task's plans, clusters of
    problems and coin between judge and rule are left to functions of the user's. Critic and
    optimisers go on when the rubric changes, so expect the value loss to jump.
    """

    Config = MetaPOSettings
    recipe = {**ActorCritic.recipe, "learning_rate": 3e-6}
    parts = FourParts(
        mask="PPO clip: no gradient where the ratio leaves [1 - eps, 1 + eps] on the winning side",
        denominator="the policy that sampled",
        advantage="GAE(gamma, lambda) of the score by a rubric that evolves, less KL, and a critic",
        gradient="token log-likelihood ratio",
    )
    config: MetaPOSettings

    def __init__(
        self,
        config: MetaPOSettings,
        place: Place,
        *,
        judge: Any = None,
        refine: Any = None,
        screen: Any = None,
        rubric: Any = None,
        reward: Any = None,
        **given: Unpack[Given],
    ):
        stored = config.interval * config.batch_size * config.rollout.samples
        if config.meta_samples > stored:
            raise PostgradError(
                f"meta_samples: expected at most the {stored} responses of {config.interval} "
                f"steps, got {config.meta_samples}"
            )
        self.evolving = _evolving(config, place, judge, refine, screen, rubric)
        if reward is None:
            reward = config.reward or self.evolving.by_first_rubric
        super().__init__(config, place, reward=reward, **given)

    def check(self) -> None:
        self.evolving.probe(self.data.rows[0])
        super().check()

    def collect(self, step: int) -> Batch:
        if step > 0 and step % self.config.interval == 0:
            random = generator(self.place.seed, "meta step", step)
            with timed("meta judge"):
                self.evolving.update(step, self.config.meta_samples, self.config.selector, random)
        return super().collect(step)

    def judge(
        self, rows: list[dict[str, Any]], rollouts: Rollouts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with timed("reward"):
            scored = self.evolving.score(rows, rollouts.texts)
        self.evolving.remember(rows, rollouts.texts, scored)
        return torch.tensor(scored.rewards), {"unread_items": torch.tensor(scored.unread).float()}

    def describe_batch(self, batch: Batch) -> Metrics:
        return {
            **super().describe_batch(batch),
            "rubric/version": float(self.evolving.version),
            "rubric/items": float(len(self.evolving.rubric)),
            "rubric/points": sum(item.points for item in self.evolving.rubric),
        }

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        rows = super().samples(batch)
        records = self.evolving.records[-len(batch) :]  # those of this batch, in its order
        for row, record in zip(rows, records, strict=False):
            row["rubric_version"] = self.evolving.version
            row["scores"] = record["scores"]
            row["evaluation"] = record["evaluation"]
        rows[0]["rubric"] = "\n".join(
            f"{item.text} ({item.points:g})" for item in self.evolving.rubric
        )
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "evolving": self.evolving.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.evolving.load_state_dict(state["evolving"])

    def save(self, folder: Path) -> None:
        super().save(folder)
        history = json.dumps(self.evolving.history(), ensure_ascii=False, indent=1)
        (folder / "rubrics.json").write_text(history + "\n", encoding="utf-8")


def _evolving(
    config: MetaPOSettings, place: Place, judge: Any, refine: Any, screen: Any, rubric: Any
) -> EvolvingReward:
    """The reward that the settings name, with the parts that a Python caller gave."""
    if judge is None:
        require_one(judge=config.judge, judge_model=config.judge_model)
        judge = config.judge
        if config.judge_model is not None:
            instruction = JUDGE if config.judge_instruction is None else config.judge_instruction
            if "{response}" not in instruction:
                raise PostgradError("judge_instruction: expected a text with {response} in it")
            judge = RubricJudge(load_chat(config.judge_model, place.device), instruction)
    screen = screen if screen is not None else config.screen
    if refine is None:
        require_one(refine=config.refine, meta_model=config.meta_model)
        refine = config.refine
        if config.meta_model is not None:
            writer = RubricWriter(load_chat(config.meta_model, place.device))
            refine, screen = writer.refine, screen or writer.screen
    if config.selector == "screened" and screen is None:
        raise PostgradError("screen: selector=screened needs a function that labels records")
    return EvolvingReward(
        items_of(_plain(config.rubric) if rubric is None else rubric, "rubric"),
        load_function(judge, "judge"),
        load_function(refine, "refine"),
        load_function(screen, "screen") if screen is not None else None,
        normalise=config.normalise,
        most_unread=config.most_unread,
        time_limit=config.reward_time_limit,
    )


def _plain(rubric: str | list[str | ItemSettings]) -> Any:
    if isinstance(rubric, str):
        return rubric
    return [item if isinstance(item, str) else item.model_dump() for item in rubric]
