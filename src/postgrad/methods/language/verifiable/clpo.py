"""Curriculum-guided Learning for Policy Optimization."""

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, NothingToLearn, Place
from postgrad.methods.language.base import (
    Given,
    RolloutSettings,
    draw_responses,
    render_prompt,
)
from postgrad.methods.language.parts.choices import AdvantageChoice, MaskChoice
from postgrad.methods.language.verifiable.solving import SolvingPolicyGradient, SolvingSettings
from postgrad.rewards import RewardFunction, RewardSpec
from postgrad.rewards.functions import Term, columns_of, expect_list, load_function
from postgrad.sampling.difficulty import (
    EASY,
    HARD,
    MEDIUM,
    difficulty,
    has_signal,
    of_groups,
    solve_counts,
)
from postgrad.sampling.rewriting import extract_rewrite, reveals
from postgrad.tasks.formats import Row, edited, stated_answer

_SCRIPT, _CODE = "official script", "official code"
_NAMES = {EASY: "easy", MEDIUM: "medium", HARD: "hard"}
_REWRITTEN = {"both": (MEDIUM, HARD), "hard": (HARD,), "medium": (MEDIUM,), "none": ()}
_TEXT = (
    "Rewrite the following problem {how}. Its answer is {answer} and must stay so; do not reveal "
    "it. Give nothing but the rewritten problem, between ``` and ```.\n\n{prompt}"
)


class CLPOSettings(SolvingSettings):
    """CLPO's settings."""

    rollout: RolloutSettings = setting(
        RolloutSettings(samples=4), "how the policy is sampled", source=_SCRIPT
    )
    mask: MaskChoice = setting(
        {"name": "ppo", "dual_clip": 3.0}, "which tokens teach", source="verl"
    )
    advantage: AdvantageChoice = setting(
        {"name": "standardised", "eps": 1e-6}, "from rewards to advantages", source=_SCRIPT
    )
    kl_coefficient: float = setting(
        0.001, "weight of the KL to the initial policy", ge=0, source=_SCRIPT
    )
    kl_scale_hard: float = setting(0.5, "multiple of it on hard prompts", ge=0, source=_SCRIPT)
    kl_scale_other: float = setting(1.0, "multiple of it on the others", ge=0, source=_SCRIPT)
    hard: float = setting(0.3, "up to this share of right responses a prompt is hard", ge=0, le=1,
                          source=_SCRIPT)  # fmt: skip
    medium_low: float = setting(0.3, "above this share it is medium …", ge=0, le=1, source=_SCRIPT)
    medium_high: float = setting(0.7, "… up to this one", ge=0, le=1, source=_SCRIPT)
    rewrite: Literal["both", "hard", "medium", "none"] = setting(
        "both", "which prompts are rewritten", source=_CODE
    )
    rewriter: RewardSpec | None = setting(
        None, "a function that rewrites, file.py:function; empty: the policy does"
    )
    rewrite_hard: str = setting(
        _TEXT.replace("{how}", "in simpler and clearer words"),
        "what the policy is asked for hard prompts, with {prompt} and perhaps {answer}",
    )
    rewrite_medium: str = setting(
        _TEXT.replace("{how}", "in other words, as a new variation"),
        "the same for medium prompts",
    )
    rewrite_temperature: float = setting(0.7, "at which rewrites are sampled", gt=0, source=_CODE)
    rewrite_tokens: int = setting(400, "longest rewrite in tokens", gt=0, source=_CODE)


class CLPO(SolvingPolicyGradient):
    """Curriculum Learning meets Policy Optimization (Zhang et al. 2025, arXiv:2509.25004).

    What is mastered and what fails as a whole gives no gradient. The share of right responses to a
    problem says how hard it is for the present policy: hard up to 0.3, medium up to 0.7, else easy.
    The policy itself rewrites hard problems in simpler words and medium ones in other words, with
    the same answer, and responds to the rewrites as well. What is left is learnt from:

        B   = groups of problems and of rewrites with 0 < accuracy < 1
        A_i = (r_i - mean(r)) / (std(r) + 1e-6)  within its group
        L   = L_clip + beta mean_t( lambda k3_t ),  lambda = 0.5 on hard problems and their
              rewrites, 1 on the others

    so that the policy may go further from the initial one where it has most to learn. A problem
    that fails as a whole comes back through a rewrite that does not. Rewrites themselves are not
    trained on. `rewrite=none` with both scales 1 is GRPO on groups with a signal.

    Deviations: a step of which no group has a signal is passed over, where the code takes all for
    the sake of the KL alone. Rewrites that reveal the answer are dropped. The name of the weights
    lambda is uncertain.
    """

    Config = CLPOSettings
    several_turns = False
    recipe = {**SolvingPolicyGradient.recipe, "warmup_steps": 10}
    config: CLPOSettings

    def __init__(
        self,
        config: CLPOSettings,
        place: Place,
        *,
        reward: Any = None,
        rewriter: RewardFunction | None = None,
        **given: Unpack[Given],
    ):
        _check(config)
        named = rewriter if rewriter is not None else config.rewriter
        self.rewriter: Term | None = None if named is None else load_function(named, "rewriter")
        super().__init__(config, place, reward=reward, **given)
        if config.rewrite != "none" and "answer" not in self.data.columns:
            raise PostgradError(
                f"rewrite: a rewrite is to keep the answer, and {self.data.name} has no column "
                "'answer': take rewrite=none"
            )
        self._seen: Metrics = {}

    def sampled(self, index: list[int], step: int) -> Batch:
        """Responses to problems and to their rewrites, each with the difficulty of the problem."""
        first = super().sampled(index, step)
        right, total = solve_counts(self.solved(first), first.group)
        config = self.config
        labels = difficulty(right / total, config.hard, config.medium_low, config.medium_high)
        first = first.with_fields(difficulty=labels[first.group])
        wanted = [g for g in range(len(index)) if int(labels[g]) in _REWRITTEN[config.rewrite]]
        rewrites = self._rewrites([index[g] for g in wanted], labels[wanted], step)
        pairs = zip(wanted, rewrites, strict=True)
        found = [(g, rewrite) for g, rewrite in pairs if rewrite is not None]
        self._seen = {
            "reward": float(first.reward.mean()),
            "reward/degenerate_groups": 1 - float(has_signal(right, total).float().mean()),
            **{f"difficulty/{n}": float((labels == d).float().mean()) for d, n in _NAMES.items()},
            "rewrite/usable": len(found) / max(len(wanted), 1),
        }
        if not found:
            self._seen |= {"rewrite/reward": 0.0, "rewrite/rescued": 0.0}
            return first
        samples = config.rollout.samples
        groups = torch.tensor([g for g, _ in found])
        rollouts = self.roll_out([prompt for _, prompt in found], "rewritten", step)
        second = self.rewarded(
            rollouts,
            step,
            row=torch.tensor(index)[groups].repeat_interleave(samples),
            group=len(index) + torch.arange(len(found)).repeat_interleave(samples),
            difficulty=labels[groups].repeat_interleave(samples),
        )
        again, of = solve_counts(self.solved(second), second.group)
        hopeless = right == 0
        rescued = int((hopeless[groups] & has_signal(again, of)).sum())
        self._seen |= {
            "rewrite/reward": float(second.reward.mean()),
            "rewrite/rescued": rescued / max(int(hopeless.sum()), 1),
        }
        return first.joined(second)

    def _rewrites(self, rows: list[int], labels: Tensor, step: int) -> list[Tensor | None]:
        """The prompts that these rows' problems are rewritten to; None where that failed."""
        if not rows:
            return []
        problems = [self.data.rows[row] for row in rows]
        hard = [label == HARD for label in labels.tolist()]
        if self.rewriter is None:
            texts = self._by_policy(problems, hard, step)
        else:
            texts = self._by_function(self.rewriter, problems, hard)
        room = self.policy.context_length - self.config.rollout.max_new_tokens
        prompts: list[Tensor | None] = []
        for problem, text in zip(problems, texts, strict=True):
            answer = stated_answer(problem) or ""
            if text is None or reveals(text, str(problem["prompt"]), answer):
                prompts.append(None)
                continue
            prompt = render_prompt(self.policy, self.data, _put(text, problem["prompt"]))
            prompts.append(prompt if len(prompt) <= room else None)
        return prompts

    def _by_policy(self, problems: list[Row], hard: list[bool], step: int) -> list[str | None]:
        config, asked = self.config, []
        for problem, is_hard in zip(problems, hard, strict=True):
            text = config.rewrite_hard if is_hard else config.rewrite_medium
            text = text.replace("{answer}", stated_answer(problem) or "")
            asked.append(render_prompt(self.policy, self.data, _filled(text, problem["prompt"])))
        fits = [i for i, p in enumerate(asked) if len(p) < self.policy.context_length]
        texts: list[str | None] = [None] * len(problems)
        if fits:
            settings = {
                "max_new_tokens": config.rewrite_tokens,
                "temperature": config.rewrite_temperature,
                "stop": [],
            }
            drawn = draw_responses(
                self.policy,
                [asked[i] for i in fits],
                config.rollout.model_copy(update=settings),
                self.place.seed,
                "rewrite",
                step,
                samples=1,
            )
            for i, text in zip(fits, drawn.texts, strict=True):
                texts[i] = extract_rewrite(text)
        return texts

    def _by_function(
        self, rewriter: Term, problems: list[Row], hard: list[bool]
    ) -> list[str | None]:
        available = {
            **columns_of(problems),
            "prompts": [problem["prompt"] for problem in problems],
            "modes": ["simplify" if is_hard else "diversify" for is_hard in hard],
        }
        returned = rewriter.call(available, self.config.reward_time_limit)
        texts = expect_list(returned, len(problems), rewriter.title, "texts")
        return [text if isinstance(text, str) and text.strip() else None for text in texts]

    def selected(self, batch: Batch) -> Batch:
        """The groups of which some responses are right and some are not, with their KL's scale."""
        signal = has_signal(*solve_counts(self.solved(batch), batch.group))
        self._seen["groups"] = float(signal.sum())
        if not bool(signal.any()):
            raise NothingToLearn("no prompt of the step has both right and wrong responses")
        kept = batch.select(of_groups(signal, batch.group))
        config = self.config
        scale = torch.where(kept.difficulty == HARD, config.kl_scale_hard, config.kl_scale_other)
        return kept.with_fields(kl_scale=scale)

    def describe_batch(self, batch: Batch) -> Metrics:
        return {**super().describe_batch(batch), **self._seen}


def _put(text: str, prompt: str | list[Row]) -> str | list[Row]:
    return edited(prompt, lambda _: text)


def _filled(text: str, prompt: str | list[Row]) -> str | list[Row]:
    return edited(prompt, lambda own: text.replace("{prompt}", own))


def _check(config: CLPOSettings) -> None:
    if not config.hard <= config.medium_low <= config.medium_high:
        raise PostgradError(
            "hard, medium_low, medium_high: expected rising thresholds, got "
            f"{config.hard:g}, {config.medium_low:g}, {config.medium_high:g}"
        )
    for name, text in (
        ("rewrite_hard", config.rewrite_hard),
        ("rewrite_medium", config.rewrite_medium),
    ):
        if "{prompt}" not in text:
            raise PostgradError(f"{name}: expected {{prompt}} in it, got {text!r}")
    if config.kl_coefficient == 0 and config.kl_scale_hard != config.kl_scale_other:
        raise PostgradError(
            "kl_scale_hard, kl_scale_other: they scale the KL, which kl_coefficient=0 leaves out: "
            "make them equal"
        )
