"""Where a policy stands between reward and divergence: how preference methods are compared."""

from collections.abc import Mapping
from typing import Any, Self

import torch

from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.evaluation.statistics import mean_interval
from postgrad.methods.base import Metrics, Place
from postgrad.methods.language.base import LanguageSettings, Materials, render_prompts
from postgrad.models.language import LanguagePolicy
from postgrad.models.snapshots import Snapshot
from postgrad.rewards import RewardSet, RewardSpec, load_rewards
from postgrad.rewards.preferences import BradleyTerry, Noisy, Preference
from postgrad.sampling.generation import Rollouts, SamplingSettings, generate
from postgrad.seeding import derive
from postgrad.tasks import Examples


class FrontierSettings(Settings):
    """Reward and KL of fresh samples on held-out prompts."""

    reward: list[RewardSpec] | RewardSpec | None = setting(
        None, "what fresh samples are worth; with it evaluations measure reward and KL"
    )
    samples: int = setting(1, "samples a held-out prompt", gt=0)
    max_new_tokens: int = setting(64, "longest sample in tokens", gt=0)
    temperature: float = setting(
        1.0, "sampling temperature; 0: the likeliest response, and kl is of that one alone", ge=0
    )


class Frontier:
    """Measures fresh samples of a policy on held-out prompts.

    Their reward, their KL to the reference, and how often they are preferred to its own samples.

    Every measurement draws with the same numbers, so that two policies differ by what they learnt.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        held_out: Examples,
        rewards: RewardSet | None,
        preference: Preference | None,
        config: LanguageSettings,
        settings: FrontierSettings,
        seed: int,
    ):
        self.samples: list[dict[str, Any]] = []  # of the last measurement, for people to read
        self._rewards = rewards
        self._preference = preference
        self._settings = settings
        self._seed = seed
        self._rows = [row for row in held_out.rows for _ in range(settings.samples)]
        self._prompts = render_prompts(policy, held_out, config, reserve=settings.max_new_tokens)
        self._opponents: list[str] | None = None

    @classmethod
    def of(
        cls,
        config: LanguageSettings,
        settings: FrontierSettings,
        found: Materials,
        place: Place,
        preference: Preference | None = None,
        rewards: RewardSet | None = None,
    ) -> Self | None:
        """What the settings ask for; None without held-out prompts or anything to judge by.

        The reward is the settings' own, or else `rewards`, or else that behind `preference`.
        """
        preference = preference.unspoilt if isinstance(preference, Noisy) else preference
        if rewards is None and isinstance(preference, BradleyTerry):
            rewards = preference.rewards
        if settings.reward is not None:
            if found.held_out is None:
                raise PostgradError("frontier.reward: there are no held-out prompts: set eval_data")
            rewards = load_rewards(settings.reward)
            rewards.probe(found.held_out.rows[0])
        if found.held_out is None or (rewards is None and preference is None):
            return None
        return cls(found.policy, found.held_out, rewards, preference, config, settings, place.seed)

    @torch.no_grad()
    def measure(
        self, policy: LanguagePolicy, others: Mapping[str, Snapshot] | None = None
    ) -> Metrics:
        """Means over fresh samples.

        `reward`, and each term of it if there are several; `kl`, the mean of log pi/pi_ref in nats
        a response, and `kl_to_NAME` likewise, to `others`, weights of the policy by name; `length`
        in tokens; and `win_rate` against samples of the reference, with its 95 % interval.
        """
        drawn = self._drawn(policy, "policy")
        now = policy.score(drawn.prompts, drawn.responses).logprobs.sum(1)
        with policy.reference():
            before = policy.score(drawn.prompts, drawn.responses).logprobs.sum(1)
        lengths = [len(response) for response in drawn.responses]
        metrics = {"kl": float((now - before).mean()), "length": sum(lengths) / len(lengths)}
        for name, weights in (others or {}).items():
            with weights.acting():
                before = policy.score(drawn.prompts, drawn.responses).logprobs.sum(1)
            metrics[f"kl_to_{name}"] = float((now - before).mean())
        judged: dict[str, list[float]] = {}
        if self._rewards is not None:
            ids = [response.tolist() for response in drawn.responses]
            judged["reward"], terms = self._rewards.of_rows(self._rows, drawn.texts, ids)
            if len(terms) > 1:
                judged |= {f"reward/{name}": values for name, values in terms.items()}
        if self._preference is not None:
            if self._opponents is None:
                with policy.reference():
                    self._opponents = self._drawn(policy, "reference").texts
            judged["win_rate"] = self._preference(self._rows, drawn.texts, self._opponents)
            if len(self._rows) > 1:
                interval = mean_interval(judged["win_rate"])
                metrics |= {"win_rate/low": interval.low, "win_rate/high": interval.high}
        self.samples = [
            {
                "prompt": policy.decode(drawn.prompts[i]),
                "response": drawn.texts[i],
                **{name: values[i] for name, values in judged.items()},
            }
            for i in range(min(8, len(drawn.texts)))
        ]
        means = {name: sum(values) / len(values) for name, values in judged.items()}
        return {**means, **metrics}

    def _drawn(self, policy: LanguagePolicy, who: str) -> Rollouts:
        settings = self._settings
        sampling = SamplingSettings(settings.max_new_tokens, settings.temperature)
        seeds = [derive(self._seed, "frontier", who, i) for i in range(len(self._rows))]
        return generate(policy, self._prompts, sampling, samples=settings.samples, seeds=seeds)
