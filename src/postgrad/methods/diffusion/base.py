"""Grouped policy gradients on flow models: stochastic trajectories in, a clipped surrogate out."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postgrad.advantages.group import group_standardised
from postgrad.batch import Batch
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, Optimise, Place
from postgrad.methods.diffusion.settings import FlowSettings, find_flow, find_prompts
from postgrad.models.averaging import AveragedWeights
from postgrad.models.flow import FlowPolicy
from postgrad.models.pictures import png_data_uri
from postgrad.objectives.flow import flow_sde_step, gaussian_step_kl, gaussian_step_logprob
from postgrad.objectives.policy_gradient import clip_fractions
from postgrad.rewards.images import load_image_rewards
from postgrad.sampling.epochs import Epochs
from postgrad.sampling.flow import deterministic_samples, stochastic_trajectories
from postgrad.seeding import generator
from postgrad.tasks import Examples
from postgrad.timing import timed


class FlowPolicyGradient(Method):
    """The family's machinery; a method fills `log_ratio` and `surrogate`.

    A collected batch has one item a sampled image. Its minibatches have one item a trained step of
    an image's trajectory, so that micro-batches can be as small as one pass of the network.
    """

    Config = FlowSettings
    config: FlowSettings
    #: the clip at 64 and at 65,536 latent dimensions; a log-ratio is a mean over dimensions, and
    #: the more there are the less it varies
    clips: ClassVar[tuple[float, float]]

    def __init__(
        self,
        config: FlowSettings,
        place: Place,
        *,
        model: FlowPolicy | None = None,
        data: Examples | list[dict[str, Any]] | None = None,
        reward: Any = None,
    ):
        super().__init__(config, place)
        self.trained_steps = int(config.trained_fraction * config.sampling_steps)
        if self.trained_steps < 1:
            raise PostgradError(
                f"trained_fraction: {config.trained_fraction} of {config.sampling_steps} "
                "sampling_steps leaves no step to train on"
            )
        self.policy = find_flow(config, place, model)
        self.clip = config.clip or scaled_clip(self.clips, math.prod(self.policy.latent_shape))
        self.data = find_prompts(config.data, place, self.policy, data)
        self.rows = self.data.rows
        if config.prompts > len(self.rows):
            raise PostgradError(
                f"prompts: {config.prompts} distinct prompts a step asked for, the data has "
                f"{len(self.rows)}"
            )
        if config.prompts * config.samples < config.updates:
            raise PostgradError(
                f"updates: {config.updates} updates cannot share "
                f"{config.prompts * config.samples} images"
            )
        held_out = config.eval_data and find_prompts(config.eval_data, place, self.policy, None)
        self.held_out = (held_out or self.data).rows[: config.evaluation_prompts]
        self.rewards = load_image_rewards(
            config.reward if reward is None else reward, time_limit=config.reward_time_limit
        )
        if config.kl_coefficient > 0:
            self.policy.freeze_reference()
        self.average = AveragedWeights(self.policy, config.average_decay)
        self._order = Epochs(len(self.rows), config.prompts, place.seed)
        self._log_ratios: list[Tensor] = []

    @abstractmethod
    def log_ratio(self, batch: Batch, mean: Tensor, logprobs: Tensor) -> Tensor:
        """log of the ratio `[N]` of steps, given their mean and log-probability as they are now."""

    @abstractmethod
    def surrogate(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        """The loss `[N]` of every step."""

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def check(self) -> None:
        # two of one image, so that one value for the whole batch does not pass for one an image
        latents = torch.zeros(2, *self.policy.latent_shape, device=self.place.device)
        self._score([self.rows[0]] * 2, self.policy.decode(latents))

    def collect(self, step: int) -> Batch:
        config = self.config
        chosen = [self.rows[number] for number in self._order.indices(step).tolist()]
        rows = [row for row in chosen for _ in range(config.samples)]
        prompts = [row["prompt"] for row in rows]
        with timed("rollout"):
            parts = [
                stochastic_trajectories(
                    self.policy,
                    prompts[start : start + config.rollout_batch],
                    config.sampling_steps,
                    config.noise_level,
                    generator(self.place.seed, "rollout", step, start),
                )
                for start in range(0, len(prompts), config.rollout_batch)
            ]
            images = torch.cat([self.policy.decode(part.path[:, -1]).cpu() for part in parts])
        with timed("reward"):
            totals, terms = self._score(rows, images)
        rewards = torch.tensor(totals)
        groups = torch.arange(len(chosen)).repeat_interleave(config.samples)
        # in the authors' code too: the population's deviation, 1e-4, and advantages clipped
        advantages = group_standardised(rewards, groups, std="population", eps=1e-4)
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
        return Batch(
            prompts=prompts,
            images=list(images),
            rewards=rewards,
            groups=groups,
            advantages=advantages,
            terms=[{name: values[i] for name, values in terms.items()} for i in range(len(rows))],
            step=torch.full((len(rows),), step),
            path=torch.cat([part.path for part in parts]),
            means=torch.cat([part.means for part in parts]),
            logprobs=torch.cat([part.logprobs for part in parts]),
            times=parts[0].times.expand(len(rows), -1),
            deviations=parts[0].deviations.expand(len(rows), -1),
        )

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        """The images in random halves (thirds …), each as the trained steps of its trajectories."""
        random = generator(self.place.seed, "minibatches", int(batch.step[0]))
        for part in torch.randperm(len(batch), generator=random).chunk(self.config.updates):
            yield self._steps_of(batch.select(part))

    def _steps_of(self, images: Batch) -> Batch:
        """One item a trained step: what `loss` reads."""
        trained = self.trained_steps

        def steps(values: Tensor) -> Tensor:
            return values[:, :trained].flatten(0, 1)

        def every(values: Tensor) -> Tensor:
            return values.to(images.path.device).repeat_interleave(trained)

        return Batch(
            prompts=[prompt for prompt in images.prompts for _ in range(trained)],
            rewards=every(images.rewards),
            advantages=every(images.advantages),
            latents=steps(images.path),
            next_latents=steps(images.path[:, 1:]),
            old_means=steps(images.means),
            old_logprobs=steps(images.logprobs),
            time=steps(images.times),
            next_time=steps(images.times[:, 1:]),
            deviations=steps(images.deviations),
            cost=torch.full((len(images) * trained,), self.policy.cost),
        )

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        mean, logprobs = self.score_steps(batch)
        log_ratio = self.log_ratio(batch, mean, logprobs)
        self._log_ratios.append(log_ratio.detach())
        losses = self.surrogate(log_ratio, batch)
        metrics: Metrics = {}
        if self.config.kl_coefficient > 0:
            with torch.no_grad(), self.policy.reference():
                reference, _ = self.score_steps(batch)
            divergence = gaussian_step_kl(mean, reference, batch.deviations)
            losses = losses + self.config.kl_coefficient * divergence
            metrics["kl_to_reference"] = float(divergence.detach().mean())
        return losses.sum() / batch.items, metrics

    def score_steps(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean `[N, ...]` and log-probability `[N]` of sampled steps under the policy as it is."""
        velocity = self.policy.velocity(batch.latents, batch.time, batch.prompts)
        mean, std = flow_sde_step(
            batch.latents, velocity, batch.time, batch.next_time, self.config.noise_level
        )
        return mean, gaussian_step_logprob(batch.next_latents, mean, std)

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        every = []
        for part in self.minibatches(batch):
            self._log_ratios = []
            every.append(optimise(self.loss, part))
            self.average.update()
        metrics = {name: sum(m[name] for m in every) / len(every) for name in every[0]}
        # the first update's ratios are one; the last's are furthest from the policy that sampled
        return metrics | self._ratio_metrics(torch.cat(self._log_ratios), part)

    def _ratio_metrics(self, log_ratios: Tensor, batch: Batch) -> Metrics:
        ratios, clip = log_ratios.exp(), self.clip
        fractions = clip_fractions(ratios, batch.advantages, clip, clip)
        metrics = {f"clip/{name}": float(value) for name, value in fractions.items()}
        by_step = ratios.view(-1, self.trained_steps)
        for number, (mean, std) in enumerate(
            zip(by_step.mean(0).tolist(), by_step.std(0, correction=0).tolist(), strict=True)
        ):
            metrics[f"ratio/mean_step_{number}"] = mean
            metrics[f"ratio/std_step_{number}"] = std
        return metrics

    def describe_batch(self, batch: Batch) -> Metrics:
        by_group = batch.rewards.view(-1, self.config.samples)
        means = {
            f"reward/{name}": sum(terms[name] for terms in batch.terms) / len(batch)
            for name in batch.terms[0]
        }
        return {
            "reward": float(batch.rewards.mean()),
            "reward/within_group_std": float(by_group.std(1).mean()),
            **means,
        }

    def evaluate(self) -> Metrics:
        """Reward and diversity of deterministic samples from the averaged weights.

        `diversity` is the root mean square distance of a pixel between two images of one prompt.
        """
        samples, batch = self.config.evaluation_samples, self.config.rollout_batch
        rows = [row for row in self.held_out for _ in range(samples)]
        prompts = [row["prompt"] for row in rows]
        with self.average.applied():
            images = torch.cat(
                [
                    self.policy.decode(
                        deterministic_samples(
                            self.policy,
                            prompts[start : start + batch],
                            self.config.evaluation_steps,
                            generator(self.place.seed, "evaluation", start),
                        )
                    ).cpu()
                    for start in range(0, len(prompts), batch)
                ]
            )
        totals, _ = self._score(rows, images)
        groups = images.reshape(len(self.held_out), samples, -1)
        # the mean square distance of two of n is twice their variance with n - 1
        diversity = (2 * groups.var(1)).mean().sqrt()
        return {"reward": sum(totals) / len(totals), "diversity": float(diversity)}

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        rows = []
        number = min(len(batch), 2 * self.config.samples)
        for i in range(0, number, max(1, number // 8)):
            row = {
                "prompt": batch.prompts[i],
                "reward": float(batch.rewards[i]),
                "advantage": float(batch.advantages[i]),
            }
            if "images" in batch:
                row |= {"image": png_data_uri(batch.images[i]), **batch.terms[i]}
            rows.append(row)
        return rows

    def _score(
        self, rows: list[dict[str, Any]], images: Tensor
    ) -> tuple[list[float], dict[str, list[float]]]:
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        return self.rewards([row["prompt"] for row in rows], list(images.cpu()), columns)

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])

    def save(self, folder: Path) -> None:
        """Write the model with its averaged weights."""
        with self.average.applied():
            self.policy.save(folder)


def scaled_clip(clips: tuple[float, float], dimensions: int) -> float:
    """The clip at this many latent dimensions: the power law through those at 64 and at 65,536."""
    few, many = clips
    share = math.log(dimensions / 64) / math.log(65536 / 64)
    clip: float = few * (many / few) ** share
    return min(clip, 0.5)
