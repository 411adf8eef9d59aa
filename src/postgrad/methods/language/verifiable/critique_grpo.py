"""Critique-GRPO."""

import re
from typing import Any, Unpack

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Metrics, Place
from postgrad.methods.language.base import Given, render_prompt
from postgrad.methods.language.parts.base import Around
from postgrad.methods.language.parts.choices import AdvantageChoice, MaskChoice
from postgrad.methods.language.parts.estimator import Estimator, EstimatorSettings
from postgrad.methods.language.verifiable.solving import SolvingPolicyGradient, SolvingSettings
from postgrad.models.scoring import TokenScores
from postgrad.objectives.policy_gradient import Aggregation
from postgrad.rewards import RewardFunction, RewardSpec
from postgrad.rewards.corrections import Corrections
from postgrad.sampling.difficulty import of_groups, solve_counts
from postgrad.sampling.generation import Rollouts
from postgrad.sampling.refinement import select_refinements
from postgrad.tasks.formats import edited

_CODE, _PAPER = "official script", "paper"
_PLACES = ("{prompt}", "{response}", "{critique}")
_PLACE = re.compile("|".join(map(re.escape, _PLACES)))


class CritiqueGRPOSettings(SolvingSettings):
    """Critique-GRPO's settings."""

    mask: MaskChoice = setting("none", "which tokens teach", source=_CODE)
    advantage: AdvantageChoice = setting(
        "centred",
        "from rewards to advantages (the code in effect: standardised, eps 1e-6)",
        source=_PAPER,
    )
    aggregation: Aggregation = setting(
        "sequence-sum-constant", "how token losses become one", source=_PAPER
    )
    entropy_coefficient: float = setting(0.001, "weight of the entropy bonus", ge=0, source=_CODE)
    critique: RewardSpec = setting(
        "simple-gt",
        "simple: right or wrong; simple-gt: and the true answer; or a function of your own",
        source=_CODE,
    )
    refined: int = setting(
        1, "refinements in a group, each in the place of a first response", gt=0, source=_CODE
    )
    gamma: float = setting(
        0.1, "a refined token of probability p weighs p / (p + gamma)", gt=0, source=_CODE
    )
    refinement_text: str = setting(
        "{prompt}\n\nA previous solution:\n{response}\n\nWhat is to be said of it: {critique}\n\n"
        "Correct its errors and write the whole solution anew, step by step, in the form that was "
        "asked for.",
        "what the policy is asked to refine a response by, with {prompt}, {response}, {critique}",
    )


class CritiqueGRPO(SolvingPolicyGradient):
    """Critique-GRPO (Zhang et al. 2025, arXiv:2506.03106).

    A reward in numbers leaves some questions unsolved for good; told what is wrong with its answer
    the same policy often mends it. To each of n responses y_i to a question x there is a critique
    c_i, and one refinement y'_i sampled from pi(.|x, y_i, c_i). The k best refinements take the
    place of k first responses, and the policy learns to give them without the critique:

        A_i = r_i - mean(r)  over the n - k responses and k refinements of x
        L   = mean_i 1/L_max sum_t l_it
        responses:    l_it = -A_i pi(y_it | x) / pi_old(y_it | x)
        refinements:  l_it = -A_i f(pi(y'_it | x)),  f(p) = p / (p + gamma)

    Refinements are conditioned on x alone and of unknown probability there, so their denominator is
    1; the shape f lets unlikely tokens count. There is neither clip nor KL. Groups that are right
    throughout are not refined.

    Deviations: advantages are without the deviation, as in the paper; the code as released divides
    by it. A refinement whose question would leave no room for it in the context is not asked for.
    A critique by another model, or by the policy itself, is a function of yours.
    """

    Config = CritiqueGRPOSettings
    several_turns = False
    parts = FourParts(
        mask="none",
        denominator="responses: the policy that sampled; refinements: 1",
        advantage="reward minus its group's mean, refinements included",
        gradient="responses: each token's probability; refinements: p / (p + gamma)",
    )
    config: CritiqueGRPOSettings

    def __init__(
        self,
        config: CritiqueGRPOSettings,
        place: Place,
        *,
        reward: Any = None,
        critique: RewardFunction | None = None,
        **given: Unpack[Given],
    ):
        samples = config.rollout.samples
        if config.refined > samples:
            raise PostgradError(
                f"refined: at most rollout.samples, {samples}, refinements fit into a group, "
                f"got {config.refined}"
            )
        for part in _PLACES:
            if part not in config.refinement_text:
                raise PostgradError(f"refinement_text: expected {part} in it")
        self.critique = Corrections(critique or config.critique, config.reward_time_limit)
        super().__init__(config, place, reward=reward, **given)
        shaped = EstimatorSettings.model_validate(
            {
                "mask": "none",
                "denominator": "one",
                "advantage": "reward",
                "gradient": {"name": "shaped", "gamma": config.gamma},
            }
        )
        self.of_refinements = Estimator(shaped, Around(seed=place.seed, rows=self.data.rows))

    def check(self) -> None:
        super().check()
        self.critique.probe(self.data.rows[0])

    def sampled(self, index: list[int], step: int) -> Batch:
        """First responses, and in each group that is not right throughout the best refinements."""
        first = super().sampled(index, step)
        first = first.with_fields(refined=torch.zeros(len(first), dtype=torch.bool))
        right, total = solve_counts(self.solved(first), first.group)
        wanting = first.select(of_groups(right < total, first.group))
        refinements = self._refined(wanting, step)
        if refinements is None:
            return first
        kept = [
            places[select_refinements(refinements.reward[places], min(most, len(places)))]
            for group in refinements.group.unique()
            for places in [(refinements.group == group).nonzero().squeeze(1)]
            for most in [self.config.refined]
        ]
        best = refinements.select(torch.cat(kept))
        replaced = torch.bincount(best.group, minlength=len(index))
        place_in_group = torch.arange(len(first)) % self.config.rollout.samples
        stay = first.select((place_in_group >= replaced[first.group]).nonzero().squeeze(1))
        joined = stay.joined(best)
        return joined.select(joined.group.argsort(stable=True))

    def _refined(self, first: Batch, step: int) -> Batch | None:
        """One refinement of each of these responses, as responses to the bare questions."""
        if len(first) == 0:
            return None
        rows = [self.data.rows[row] for row in first.row.tolist()]
        critiques = self.critique.of_rows(
            rows, first.texts, first.reward.tolist(), self.solved(first).tolist()
        )
        asked = [
            render_prompt(self.policy, self.data, self._question(*parts))
            for parts in zip(rows, first.texts, critiques, strict=True)
        ]
        room = self.policy.context_length - self.config.rollout.max_new_tokens
        fits = [i for i, prompt in enumerate(asked) if len(prompt) <= room]
        if not fits:
            return None
        drawn = self.roll_out([asked[i] for i in fits], "refinement", step, samples=1)
        first = first.select(torch.tensor(fits))
        bare = Rollouts(first.prompts, drawn.responses, drawn.logprobs, drawn.finished, drawn.texts)
        refined = torch.ones(len(first), dtype=torch.bool)
        return self.rewarded(bare, step, row=first.row, group=first.group, refined=refined)

    def _question(self, row: dict[str, Any], response: str, critique: str) -> Any:
        def asked(prompt: str) -> str:
            values = {"{prompt}": prompt, "{response}": response, "{critique}": critique}
            return _PLACE.sub(lambda found: values[found[0]], self.config.refinement_text)

        return edited(row["prompt"], asked)

    def token_losses(self, batch: Batch, scores: TokenScores) -> tuple[Tensor, Metrics]:
        responses, metrics = super().token_losses(batch, scores)
        refinements, _ = self.of_refinements.token_losses(batch, scores)
        refined = batch.refined.to(scores.mask)[:, None]
        return torch.where(refined, refinements, responses), metrics

    def drawn(self, batch: Batch, scores: TokenScores) -> Tensor:
        """Refinements were drawn after a critique; their part has a correction of its own."""
        return super().drawn(batch, scores) & ~batch.refined.to(scores.mask)[:, None]

    def describe_batch(self, batch: Batch) -> Metrics:
        refined = batch.refined
        return {
            **super().describe_batch(batch),
            "refinement/groups": len(batch.group[refined].unique()) / len(batch.group.unique()),
            "refinement/right": float(
                self.solved(batch)[refined].float().sum() / max(int(refined.sum()), 1)
            ),
        }
