"""Guided Hybrid Policy Optimization."""

from dataclasses import replace
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Place
from postgrad.methods.data import column_texts
from postgrad.methods.language.base import Given, render_prompts
from postgrad.methods.language.parts.choices import AdvantageChoice
from postgrad.methods.language.verifiable.solving import SolvingPolicyGradient, SolvingSettings
from postgrad.models.scoring import TokenScores
from postgrad.sampling.difficulty import of_groups, solve_counts
from postgrad.sampling.hints import HintUnit, make_hint
from postgrad.tasks.formats import Row, edited, stated_answer

_CODE = "official code"
_HINT = "{hint}"


class GHPOSettings(SolvingSettings):
    """GHPO's settings."""

    advantage: AdvantageChoice = setting("standardised", "from rewards to advantages", source=_CODE)
    hint_ratios: list[float] = setting(
        [0.25, 0.5, 0.75],
        "shares of the solution that are shown one after the other until a response is right",
        source=_CODE,
    )
    hint_unit: HintUnit = setting("characters", "what a share is counted in", source=_CODE)
    hint_text: str = setting(
        "\n\nA correct solution begins like this; go on from there:\n{hint}",
        "what is added to the prompt, or to the user's last turn, with {hint} in it",
    )
    spare_answer: bool = setting(
        True, "a hint ends before the last place where the row's answer stands in the solution"
    )
    solution_column: str = setting("solution", "the column of the solutions", min_length=1)
    start_hint_step: int = setting(0, "steps before hints begin", ge=0, source="official config")
    cold_start_steps: int = setting(
        0, "first steps, in which every prompt has a hint (paper, uncertain: 20)", ge=0
    )
    cold_start_ratio: float = setting(
        0.5, "share of the solution in those hints", gt=0, lt=1, source="official config"
    )
    logprob_prompt: Literal["hinted", "original"] = setting(
        "hinted",
        "the prompt under which responses are learnt: that which they answer, or the one without "
        "hint",
    )


class GHPO(SolvingPolicyGradient):
    """Guided Hybrid Policy Optimization (arXiv:2507.10628).

    Where all G responses to a question q are wrong GRPO's gradient vanishes. Such questions are
    asked again with a growing beginning of their reference solution h, until a response is right,
    and the group that came of it is learnt from as any other:

        q*  = q                     where some response to q is right
        q*  = q + hint(omega, h)    otherwise; omega = 1/4, 1/2, 3/4 while all are wrong
        A_i = (r_i - mean(r)) / (std(r) + 1e-4)
        L   = 1/#tokens sum_{i,t} max(-rho A, -clip(rho, 1 - eps, 1 + eps) A)
        rho = pi(o_it | q*, o_i<t) / pi_old(o_it | q*, o_i<t)

    Easy questions are left alone, so imitation gives way to exploration by itself. Hints are part
    of the prompt and carry no loss; evaluation is without. A question counts as difficult by its
    `accuracy` term alone, while advantages are of the whole reward.

    Deviations: each group keeps the prompt that it answers; the official code computes the
    log-probabilities of groups that an earlier stage rescued under the question without hint, as
    `logprob_prompt=original` does for all. Hints spare the answer. The cold start (uncertain) is
    off.
    """

    Config = GHPOSettings
    several_turns = False
    config: GHPOSettings

    def __init__(
        self, config: GHPOSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        ratios = config.hint_ratios
        if sorted(set(ratios)) != ratios or not all(0 < ratio < 1 for ratio in ratios):
            raise PostgradError(f"hint_ratios: expected rising numbers between 0 and 1: {ratios}")
        if _HINT not in config.hint_text:
            raise PostgradError(f"hint_text: expected {_HINT} in it, got {config.hint_text!r}")
        super().__init__(config, place, reward=reward, **given)
        asked = {*ratios, *([config.cold_start_ratio] if config.cold_start_steps else [])}
        self._hinted: dict[float, list[Tensor]] = {0.0: self.prompts}
        if asked:
            self._solutions = column_texts(self.data, "solution_column", config.solution_column)
            for ratio in asked:
                self._hinted[ratio] = self._with_hints(ratio)

    def _with_hints(self, ratio: float) -> list[Tensor]:
        """Token ids of all prompts, each with so much of its solution."""
        rows = [
            {**row, "prompt": self._hint(row, solution, ratio)}
            for row, solution in zip(self.data.rows, self._solutions, strict=True)
        ]
        hinted = replace(self.data, name=f"{self.data.name} with hints", rows=rows)
        return render_prompts(self.policy, hinted, self.config, self.config.rollout.max_new_tokens)

    def _hint(self, row: Row, solution: str, ratio: float) -> str | list[Row]:
        config = self.config
        answer = stated_answer(row) if config.spare_answer else None
        hint = make_hint(solution, ratio, config.hint_unit, answer)
        added = config.hint_text.replace(_HINT, hint) if hint else ""
        return edited(row["prompt"], lambda text: text + added)

    def sampled(self, index: list[int], step: int) -> Batch:
        config = self.config
        first = config.cold_start_ratio if step < config.cold_start_steps else 0.0
        everyone = list(range(len(index)))
        batch = self._asked(index, everyone, first, 0, step)
        stages = config.hint_ratios if step >= config.start_hint_step else []
        for stage, ratio in enumerate(stages, 1):
            right, _ = solve_counts(self.solved(batch), batch.group)
            failed = right == 0
            if not bool(failed.any()):
                break
            again = self._asked(index, failed.nonzero().squeeze(1).tolist(), ratio, stage, step)
            joined = batch.select(of_groups(~failed, batch.group)).joined(again)
            batch = joined.select(joined.group.argsort(stable=True))
        if config.logprob_prompt == "original":
            prompts = [self.prompts[row] for row in batch.row.tolist()]
            lengths = torch.tensor([len(prompt) for prompt in prompts])
            pairs = zip(batch.prompts, prompts, strict=True)
            as_drawn = torch.tensor([torch.equal(one.cpu(), other.cpu()) for one, other in pairs])
            batch = batch.with_fields(prompts=prompts, shared_cost=lengths, as_drawn=as_drawn)
        return batch

    def drawn(self, batch: Batch, scores: TokenScores) -> Tensor:
        mask = super().drawn(batch, scores)
        return mask & batch.as_drawn.to(mask)[:, None] if "as_drawn" in batch else mask

    def _asked(
        self, index: list[int], groups: list[int], ratio: float, stage: int, step: int
    ) -> Batch:
        """Rewarded responses to the questions in these places of `index`, with such hints."""
        samples = self.config.rollout.samples
        rows = [index[group] for group in groups]
        stream: tuple[str | int, ...] = ("rollout", step)
        if stage:
            stream = ("hinted", stage, step)
        rollouts = self.roll_out([self._hinted[ratio][row] for row in rows], *stream)
        return self.rewarded(
            rollouts,
            step,
            row=torch.tensor(rows).repeat_interleave(samples),
            group=torch.tensor(groups).repeat_interleave(samples),
            stage=torch.full((len(rows) * samples,), stage),
        )

    def describe_batch(self, batch: Batch) -> Metrics:
        """Besides, the share of prompts that ended with each hint, and what was sampled for it."""
        right, _ = solve_counts(self.solved(batch), batch.group)
        shares = {
            f"hint/{ratio:g}": float((batch.stage == stage).float().mean())
            for stage, ratio in enumerate(self.config.hint_ratios, 1)
        }
        return {
            **super().describe_batch(batch),
            **shares,
            "hint/all_wrong": float((right == 0).float().mean()),
            "hint/responses": float((batch.stage + 1).sum()),
        }
