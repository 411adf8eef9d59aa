"""Direct Advantage Policy Optimization."""

from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from postgrad.advantages.steps import balanced, clear_states, step_advantages
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, Optimise, Place
from postgrad.methods.language.base import (
    Given,
    RolloutSettings,
    draw_responses,
    find_materials,
    prompt_minibatches,
    render_prompts,
    require_minibatches,
)
from postgrad.methods.language.comparisons import SCORING_TOKENS
from postgrad.methods.language.critics import chance_loss, find_critic
from postgrad.methods.language.prefixes import (
    Splitter,
    completions,
    flattened,
    restored,
    states_of,
    tried_steps,
)
from postgrad.methods.language.rewarded import RewardedSettings, TaskReward
from postgrad.models.scalar import ScalarModel
from postgrad.objectives.advantage_regression import advantage_regression
from postgrad.objectives.pairwise import sequence_logprobs
from postgrad.sampling.epochs import Epochs
from postgrad.sampling.generation import Rollouts
from postgrad.seeding import derive, generator
from postgrad.timing import timed


class DirectAdvantageSettings(RewardedSettings):
    """Settings of direct advantage policy optimisation."""

    batch_size: int = setting(8, "prompts a step of gathering", gt=0)
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=16, max_new_tokens=256),
        "how solutions and completions are sampled; `samples` completions a state",
        source="paper",
    )
    solutions: int = setting(32, "solutions drawn a prompt", gt=0, source="paper")
    selected: int = setting(
        6, "of them whose beginnings are states, right and wrong ones", gt=0, source="paper"
    )
    delimiter: str = setting(
        "\n", "what a step ends with; if empty, every token is one", source="paper: lines"
    )
    gather_steps: int = setting(
        100, "first steps of an iteration, in which states are gathered and the critic learns", gt=0
    )
    iterations: int = setting(
        1, "the run's steps are shared among so many, each with the last one's policy as reference "
        "(paper: up to 2)", gt=0
    )  # fmt: skip
    values: Literal["critic", "outcomes"] = setting(
        "critic", "what a step is worth: what the critic says of the state after it, or the mean "
        "outcome of the completions that began with it, without a critic", source="paper"
    )  # fmt: skip
    critic: str | None = setting(
        None, "reward model (a folder or a Hub id) that the critic starts from; if empty, the body "
        "of the policy (paper: another model)"
    )  # fmt: skip
    critic_rate: float = setting(
        10.0, "the critic's learning rate, in multiples of the policy's", gt=0, source="paper"
    )
    critic_epochs: int = setting(
        1, "passes over the states of a step of gathering", gt=0, source="paper"
    )
    critic_minibatches: int = setting(1, "the critic's optimiser steps a pass", gt=0)
    least_gap: float = setting(
        0.1, "between the best and the worst step of a state that is learnt from", ge=0,
        source="paper, appendix",
    )  # fmt: skip
    states: int = setting(
        128, "states a step of the policy's, with all their steps", gt=0,
        source="paper: 2048 steps of 16 completions",
    )  # fmt: skip
    beta: float = setting(0.01, "strength of the KL to the reference", gt=0, source="paper")


class DirectAdvantage(Method):
    """Direct Advantage Policy Optimization (Liu et al. 2024, arXiv:2412.18279); not ByteDance's
    DAPO, a form of GRPO.

    Outcomes treat all steps of a response alike, and training actor and critic together is
    unstable. Here the reference stays as it is while a critic learns its chance of success from any
    beginning; then the policy's log-ratios are regressed on advantages of steps that were tried in
    the same state. Nothing is sampled in the second part. With a state s the prompt and the first
    steps, M completions of it by pi_ref, m(s) the share of them that succeed, and a_i their first
    steps:

        L_critic = - m(s) log V(s) - (1 - m(s)) log(1 - V(s))
        Q(s, a)  = V(s a), or the reward if a ends the response
        A(s, a_i) = Q(s, a_i) - (1/M) sum_j Q(s, a_j)
        L = 1/2 mean_s mean_a [A(s, a)/beta - log pi(a|s)/pi_ref(a|s)]^2

    log pi(a|s) is the sum over the tokens of the step, delimiter and end token included. The inner
    mean is over the different steps of a state; states whose steps' advantages lie less than
    `least_gap` apart are left out. Where the paper's theorem holds (tables, exact A) no state gets
    worse.

    An iteration's first `gather_steps` sample, and the critic takes optimiser steps on each batch
    of states; the others regress. The policy is the reference until the first of those. With beta
    0.01 the aims are tens of nats, which no distribution can reach: small learning rates and an
    early stop (stop_metric=reward) belong to it, and log_ratio/above and log_ratio/below show what
    becomes of steps better and worse than the mean.

    Deviations: equal beginnings of a prompt's solutions are one state; a step that says nothing (a
    blank line) belongs to the next; the critic starts from the policy's body and goes on from one
    iteration to the next (uncertain); all states of a batch of prompts are learnt before the next
    batch is drawn. Of the official code only a description was found.
    """

    Config = DirectAdvantageSettings
    recipe = {"precision": "auto", "learning_rate": 5e-7, "steps": 200}
    config: DirectAdvantageSettings

    def __init__(
        self,
        config: DirectAdvantageSettings,
        place: Place,
        *,
        reward: Any = None,
        **given: Unpack[Given],
    ):
        super().__init__(config, place)
        require_minibatches(config.critic_minibatches, config.batch_size)
        if config.rollout.samples < 2:
            raise PostgradError(
                "rollout.samples: an advantage needs at least 2 completions of a state, got "
                f"{config.rollout.samples}"
            )
        if config.selected > config.solutions:
            raise PostgradError(
                f"selected: at most as many as there are solutions ({config.solutions}), got "
                f"{config.selected}"
            )
        found = find_materials(config, place, "prompts", given)
        self.policy, self.data, self.order = found.policy, found.data, found.order
        self.reward = TaskReward(config, self.data, reward)
        room = config.rollout.max_new_tokens
        self.prompts = render_prompts(self.policy, self.data, config, room)
        self.held_out = found.held_out
        if self.held_out is not None:
            self.held_out_prompts = render_prompts(self.policy, self.held_out, config, room)
        self.critic = None
        if config.values == "critic":
            longest = max(map(len, self.prompts)) + room
            self.critic = find_critic(config.critic, self.policy, config, place, longest)
        self._steps: Batch | None = None  # tried in the states gathered in this iteration
        self._iteration = -1  # that they are of
        self.ends = Splitter(self.policy, config.delimiter)

    def check(self) -> None:
        self.reward.probe()
        config = self.config
        if self.place.steps // config.iterations <= config.gather_steps:
            raise PostgradError(
                f"steps: expected more than gather_steps = {config.gather_steps} in each of "
                f"{config.iterations} iteration(s), after which the policy learns, got "
                f"{self.place.steps} in all"
            )

    def modules(self) -> dict[str, nn.Module]:
        critic = {} if self.critic is None else {"critic": self.critic}
        return {"policy": self.policy, **critic}

    def rates(self) -> dict[str, float]:
        return {"critic": self.config.critic_rate}

    def _when(self, step: int) -> tuple[int, int]:
        """The iteration that a step belongs to, and which of its steps it is."""
        each = self.place.steps // self.config.iterations
        iteration = min(step // each, self.config.iterations - 1)
        return iteration, step - iteration * each

    def collect(self, step: int) -> Batch:
        iteration, place = self._when(step)
        gathering = self.config.gather_steps
        if place < gathering:
            return self._gathered(iteration * gathering + place, step)
        assert self._steps is not None
        if "advantages" not in self._steps:
            self._steps = self._with_advantages(self._steps)
        return self._some_states(self._steps, place - gathering, iteration)

    # What was tried ----------------------------------------------------------------------------

    def _gathered(self, number: int, step: int) -> Batch:
        """The steps tried in the states of some prompts' solutions."""
        config, seed = self.config, self.place.seed
        index = self.order.indices(number).tolist()
        prompts = [self.prompts[i] for i in index]
        solutions = draw_responses(
            self.policy,
            prompts,
            config.rollout,
            seed,
            "solutions",
            number,
            samples=config.solutions,
        ).responses
        rewards = self._rewarded([i for i in index for _ in range(config.solutions)], solutions)
        prefixes: list[Tensor] = []
        owner: list[int] = []
        for place, of_prompt in enumerate(rewards.split(config.solutions)):
            random = generator(seed, "selected", number, place)
            chosen = balanced(of_prompt, config.selected, random)
            several = [solutions[place * config.solutions + i] for i in chosen]
            prefixes += self.ends.beginnings(several, config.rollout.max_new_tokens)
            owner += [place] * (len(prefixes) - len(owner))
        own = [prompts[place] for place in owner]
        ends = completions(self.policy, own, prefixes, config.rollout, seed, "completions", number)
        samples = config.rollout.samples
        whole = [torch.cat([prefixes[i // samples], end]) for i, end in enumerate(ends)]
        outcomes = self._rewarded([index[i] for i in owner for _ in range(samples)], whole)
        tried = tried_steps(own, prefixes, ends, outcomes, self.ends)
        return tried.with_fields(
            group=torch.tensor(owner)[tried.state], step=torch.full((len(tried),), step)
        )

    def _rewarded(self, index: list[int], responses: list[Tensor]) -> Tensor:
        """Rewards `[N]` of whole responses to the prompts of the rows `index` `[N]`."""
        texts = [self.policy.decode(response) for response in responses]
        ended = torch.ones(len(responses), dtype=torch.bool)
        rows = [self.data.rows[i] for i in index]
        rewards, _ = self.reward.of(rows, Rollouts([], responses, [], ended, texts))
        if not bool(((rewards >= 0) & (rewards <= 1)).all()):
            raise PostgradError(
                "reward: expected chances of success, from 0 to 1, got "
                f"{float(rewards.min()):g} to {float(rewards.max()):g}"
            )
        return rewards

    def _with_advantages(self, steps: Batch) -> Batch:
        """The steps of clear states, with advantages and the reference's log-probabilities."""
        values = steps.outcomes
        if self.critic is not None:
            values = torch.where(steps.final, values, self._values(self.critic, steps))
        advantages = step_advantages(values, steps.counts, steps.state)
        clear = clear_states(advantages, steps.state, self.config.least_gap)
        if not clear.any():
            raise PostgradError(
                f"least_gap: in none of {int(steps.state[-1]) + 1} states are the steps' "
                f"advantages {self.config.least_gap:g} apart: gather more, or lower it"
            )
        known = steps.with_fields(advantages=advantages).select(clear.nonzero().squeeze(1))
        state = known.state.unique_consecutive(return_inverse=True)[1]
        known = known.with_fields(state=state, group=state)
        return known.with_fields(reference=self._reference(known))

    @torch.no_grad()
    def _values(self, critic: ScalarModel, steps: Batch) -> Tensor:
        """V `[n]` of the states that the steps lead to."""
        with timed("scoring"):
            parts = [critic.rewards(p.prompts, p.responses) for p in steps.split(SCORING_TOKENS)]
        return torch.cat(parts).sigmoid().cpu()

    @torch.no_grad()
    def _reference(self, steps: Batch) -> Tensor:
        """log pi(a|s) `[n]` of the policy as it is, before it learns."""
        with timed("scoring"):
            parts = [self._logprobs(part) for part in steps.split(SCORING_TOKENS)]
        return torch.cat(parts).cpu()

    def _logprobs(self, steps: Batch) -> Tensor:
        temperature = self.config.rollout.temperature
        scores = self.policy.score(steps.prompts, steps.responses, temperature=temperature)
        return sequence_logprobs(scores.logprobs, scores.mask)

    def _some_states(self, steps: Batch, place: int, iteration: int) -> Batch:
        """All steps of some states, weighted so that states, and the steps in each, count alike."""
        seed = derive(self.place.seed, "states", iteration)
        order = Epochs(int(steps.state[-1]) + 1, self.config.states, seed)
        chosen = torch.isin(steps.state, order.indices(place)).nonzero().squeeze(1)
        batch = steps.select(chosen)
        several = batch.state.bincount()[batch.state]
        mask = torch.arange(int(batch.cost.max())) < batch.cost[:, None]
        return batch.with_fields(weights=1 / (order.size * several), mask=mask)

    # Learning from it --------------------------------------------------------------------------

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        if "advantages" in batch:
            return super().update(batch, optimise)
        metrics = self._learn_values(batch, optimise) if self.critic is not None else {}
        iteration, _ = self._when(int(batch.step[0]))
        if self._steps is None or iteration != self._iteration:
            self._steps, self._iteration = batch, iteration
        else:
            more = batch.with_fields(state=batch.state + int(self._steps.state[-1]) + 1)
            self._steps = self._steps.joined(more)
        return metrics

    def _learn_values(self, tried: Batch, optimise: Optimise) -> Metrics:
        config, critic = self.config, self.critic
        assert critic is not None
        parts = prompt_minibatches(
            states_of(tried), config.critic_epochs, config.critic_minibatches, self.place.seed
        )
        every = [optimise(lambda part: chance_loss(critic, part), p, "critic") for p in parts]
        return {f"critic/{n}": sum(m[n] for m in every) / len(every) for n in every[0]}

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        logprobs = self._logprobs(batch)
        device = logprobs.device
        reference, advantages = batch.reference.to(device), batch.advantages.to(device)
        losses = advantage_regression(logprobs, reference, advantages, self.config.beta)
        log_ratio = (logprobs - reference).detach()
        above = advantages > 0
        return (batch.weights.to(device) * losses).sum(), {
            "log_ratio/above": _mean(log_ratio[above]),
            "log_ratio/below": _mean(log_ratio[~above]),
        }

    # What is told of it ------------------------------------------------------------------------

    def describe_batch(self, batch: Batch) -> Metrics:
        if "advantages" in batch:
            assert self._steps is not None
            return {
                "states": float(self._steps.state[-1] + 1),
                "steps_a_state": len(batch) / len(batch.state.unique()),
                "advantage/spread": float(batch.advantages.std(correction=0)),
            }
        states = states_of(batch)
        return {
            "reward": float(states.success.mean()),
            "states": float(len(states)),
            "steps_a_state": len(batch) / len(states),
        }

    def evaluate(self) -> Metrics:
        """Mean reward of greedy responses to held-out prompts."""
        if self.held_out is None:
            return {}
        rollout = self.config.rollout
        return self.reward.evaluate(self.policy, self.held_out, self.held_out_prompts, rollout)

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        named = {"outcomes": "mean outcome", "counts": "times tried", "advantages": "advantage"}
        return [
            {
                "prompt": self.policy.decode(batch.prompts[i]),
                "step": self.policy.decode(batch.responses[i]),
                **{to: float(batch.fields()[n][i]) for n, to in named.items() if n in batch},
            }
            for i in range(min(len(batch), 16))
        ]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        steps = None if self._steps is None else flattened(self._steps)
        return {"steps": steps, "iteration": self._iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._iteration = state["iteration"]
        if state["steps"] is not None:
            self._steps = restored(state["steps"], self.place.device)

    def save(self, folder: Path) -> None:
        self.policy.save(folder)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
