"""f-DPG: distributional policy gradient under any f-divergence."""

from contextlib import nullcontext
from math import inf
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from postgrad.advantages.running_means import MovingMean, PartitionFunctions
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Method, Metrics, Place
from postgrad.methods.data import DataSettings
from postgrad.methods.language.base import (
    Given,
    LanguageSettings,
    RolloutSettings,
    draw_responses,
    find_materials,
    render_prompts,
)
from postgrad.methods.language.comparisons import SCORING_TOKENS
from postgrad.methods.language.frontier import Frontier, FrontierSettings
from postgrad.models.snapshots import Snapshot
from postgrad.objectives.divergence import (
    DIVERGENCES,
    DivergenceName,
    divergence_by_samples,
    pseudo_rewards,
    weighted_reinforce,
)
from postgrad.objectives.pairwise import sequence_logprobs
from postgrad.rewards import RewardSpec, load_rewards
from postgrad.rewards.targets import Target, TargetKind
from postgrad.timing import timed

_PATIENCE = 10  # steps without a single sample of positive target probability
_REPORTED: tuple[DivergenceName, ...] = ("forward-kl", "tv", "js")


class FDPGSettings(LanguageSettings):
    """f-DPG's settings."""

    data: DataSettings = setting(DataSettings(name="reasoning-gym/chain_sum"), "prompts")
    batch_size: int = setting(16, "prompts a step", gt=0, source="official code")
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=64),
        "how the policy is sampled; the estimate of Z wants many samples a prompt",
        source="official code: 1024 samples",
    )
    reward: list[RewardSpec] | RewardSpec | None = setting(
        None, "what the target is made of; the data's own verifier when empty"
    )
    reward_time_limit: float = setting(60.0, "seconds a reward call may take", gt=0)
    target: TargetKind = setting(
        "exponential",
        "P = a b with a reward b of 0 or 1; P = a exp(r / beta); or P = a exp(sum lambda_i r_i), "
        "in which each reward has the mean that `moments` names",
    )
    beta: float = setting(0.1, "temperature of the exponential target", gt=0)
    moments: list[float] = setting([], "the wanted mean of each reward, with target=distributional")
    moment_samples: int = setting(
        512, "samples a prompt to fit lambda by", gt=0, source="official code"
    )
    divergence: DivergenceName = setting(
        "js", "what is minimised between policy and target", source="official code"
    )
    floor: float | None = setting(
        None, "log P is at least log a - floor; reverse-kl and reverse-chi2 need it where P is 0",
        gt=0,
    )  # fmt: skip
    baseline_window: int = setting(
        1024, "pseudo-rewards that the baseline is the mean of", gt=0, source="official code"
    )
    proposal: Literal["policy", "frozen"] = setting(
        "policy", "what is sampled: the policy, or a copy that follows it when it has come closer "
        "to the target, with importance weights (GDC++)"
    )  # fmt: skip
    proposal_interval: int = setting(
        16, "steps between two looks whether the copy should follow", gt=0, source="official code"
    )
    frontier: FrontierSettings = setting(
        FrontierSettings(), "reward and KL of fresh samples, in every evaluation"
    )


class FDPG(Method):
    """f-DPG (Go, Korbak, Kruszewski, Rozen, Ryu, Dymetman 2023, arXiv:2302.08215).

    Alignment as making the policy pi close to a target p = P/Z that is made of the initial policy a
    and a reward. RLHF means one target and one divergence, the reverse KL; here both are chosen,
    and the divergence sets how much diversity is kept. With t = pi(x)/p(x) of a whole response,

        grad D_f(pi || p) = E_pi[f'(t) grad log pi(x)]
        L = -mean w (-f'(t) - B) log pi(x),    t, w, B constant

    B is the mean of the last pseudo-rewards -f'(t); Z of a prompt is the mean of P/q over all
    samples of it so far, so that prompts should come again or have many samples; w = pi/q is 1 when
    the policy itself is sampled. Prompts whose Z is still 0 are passed over. `forward-kl` is DPG
    (with proposal=frozen GDC++), `reverse-kl` with the exponential target is RL with a KL penalty
    beta, `js` the paper's default. With several prompts each has its own target.

    Deviations, the official code being the model: AdamW; fewer samples by default; whether the
    frozen proposal follows is decided on one step's samples; Z is never clipped. The floor for
    targets with zeros is ours: the paper leaves the reverse KL out there (uncertain). chi2 and
    reverse-chi2 come from the code alone. The lambda of `moments` is fitted once, on the prompts of
    the first step, so that the means over prompts are right.
    """

    Config = FDPGSettings
    recipe = {
        "precision": "auto",
        "learning_rate": 1.41e-5,
        "warmup_steps": 12,
        "steps": 100,
    }
    config: FDPGSettings

    def __init__(
        self, config: FDPGSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        super().__init__(config, place)
        config.rollout.require_unaltered("the target's Z")
        self._divergence = DIVERGENCES[config.divergence]
        if config.target == "binary" and config.floor is None and self._divergence.limit == inf:
            raise PostgradError(
                f"floor: divergence={config.divergence} is infinite where target=binary is 0: set "
                "it (e.g. floor=5), or take another divergence"
            )
        found = find_materials(config, place, "prompts", given)
        self.policy, self.data, self.order = found.policy, found.data, found.order
        spec = reward if reward is not None else (config.reward or self.data.verifier)
        if spec is None:
            raise PostgradError(
                f"reward: {self.data.name} brings no verifier of its own: name what the target is "
                "made of, e.g. reward=file.py:function"
            )
        rewards = load_rewards(spec, time_limit=config.reward_time_limit)
        self.target = Target(
            rewards, config.target, beta=config.beta, moments=config.moments, floor=config.floor
        )
        self.prompts = render_prompts(self.policy, self.data, config, config.rollout.max_new_tokens)
        self.policy.freeze_reference()
        self.partitions = PartitionFunctions(len(self.prompts))
        self.baseline = MovingMean(config.baseline_window)
        self.proposal = Snapshot(self.policy) if config.proposal == "frozen" else None
        self.frontier = Frontier.of(config, config.frontier, found, place, rewards=rewards)

    def check(self) -> None:
        self.target.probe(self.data.rows[0])

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def collect(self, step: int) -> Batch:
        index = self.order.indices(step)
        if self.target.needs_fit:
            with self.policy.reference():
                sampled = self._draw(index, "moments", samples=self.config.moment_samples)
            self.target.fit(sampled.fields(), len(index))
        with nullcontext() if self.proposal is None else self.proposal.acting():
            batch = self._draw(index, "rollout", step)
        q = batch.log_proposal
        log_policy = q if self.proposal is None else self._known(batch)
        with self.policy.reference():
            log_base = self._known(batch)
        log_target = log_base + self.target.log_factor(batch.fields())
        self.partitions.update(batch.group, log_target - q)
        if self.partitions.empty and step + 1 >= _PATIENCE:
            raise PostgradError(
                f"target: it has no support on samples, none of {step + 1} steps' has a positive "
                "probability: take more samples a step, or a less rare target"
            )
        log_z = self.partitions.log(batch.group)
        met = log_z > -inf
        batch = batch.with_fields(
            log_policy=log_policy,
            log_base=log_base,
            log_partition=log_z,
            pseudo_reward=torch.zeros_like(q),
            **{f"divergence/{name}": torch.zeros_like(q) for name in _REPORTED},
        )
        known = (log_policy[met], q[met], log_target[met], log_z[met])
        batch.pseudo_reward[met] = pseudo_rewards(self._divergence, known[0], *known[2:])
        for name in _REPORTED:
            values = divergence_by_samples(DIVERGENCES[name], *known)
            batch.fields()[f"divergence/{name}"][met] = values
        advantages = torch.where(met, batch.pseudo_reward - self.baseline.value, 0.0)
        self.baseline.update(batch.pseudo_reward[met])
        if self.proposal is not None and (step + 1) % self.config.proposal_interval == 0:
            self._follow_if_closer(self.proposal, *known)
        return batch.with_fields(advantages=advantages)

    def _draw(self, index: Tensor, *stream: str | int, samples: int | None = None) -> Batch:
        """Measured samples to these rows' prompts, with log q of them under what acts now."""
        drawn = draw_responses(
            self.policy,
            [self.prompts[i] for i in index.tolist()],
            self.config.rollout,
            self.place.seed,
            *stream,
            samples=samples,
        )
        rows = index.repeat_interleave(len(drawn.texts) // len(index))
        with timed("reward"):
            measured = self.target.measure(
                [self.data.rows[i] for i in rows.tolist()], drawn.texts, drawn.responses
            )
        return Batch(
            prompts=drawn.prompts,
            responses=drawn.responses,
            texts=drawn.texts,
            finished=drawn.finished,
            log_proposal=torch.stack([tokens.double().sum() for tokens in drawn.logprobs]).cpu(),
            group=rows,
            cost=torch.tensor([len(response) for response in drawn.responses]),
            shared_cost=torch.tensor([len(prompt) for prompt in drawn.prompts]),
        ).with_fields(**measured)

    @torch.no_grad()
    def _known(self, batch: Batch) -> Tensor:
        """Log-probabilities `[n]` float64 of the responses, without gradients."""
        with timed("scoring"):
            parts = [self._logprobs(part).double().cpu() for part in batch.split(SCORING_TOKENS)]
        return torch.cat(parts)

    def _logprobs(self, batch: Batch) -> Tensor:
        scores = self.policy.score(batch.prompts, batch.responses)
        return sequence_logprobs(scores.logprobs, scores.mask)

    def _follow_if_closer(
        self, proposal: Snapshot, log_policy: Tensor, q: Tensor, log_target: Tensor, log_z: Tensor
    ) -> None:
        """Sample from the policy of now if KL(p || pi) - KL(p || q) = E_q[p/q log q/pi] < 0."""
        if float(((log_target - log_z - q).exp() * (q - log_policy)).sum()) < 0:
            proposal.follow()

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        logprobs = self._logprobs(batch)
        log_weights = None
        if self.proposal is not None:
            log_weights = (batch.log_policy - batch.log_proposal).to(logprobs.device)
        losses = weighted_reinforce(logprobs, batch.advantages.to(logprobs.device), log_weights)
        return losses.sum() / batch.items, {}

    def describe_batch(self, batch: Batch) -> Metrics:
        met = batch.log_partition > -inf
        weights = (batch.log_policy - batch.log_proposal).exp()
        metrics = {
            name: float(values.mean())
            for name, values in batch.fields().items()
            if name.startswith("reward")
        }
        if met.any():
            metrics |= {
                name: float(values[met].mean())
                for name, values in batch.fields().items()
                if name.startswith(("divergence/", "pseudo_reward", "log_partition"))
            }
        return {
            **metrics,
            "kl_to_reference": float((weights * (batch.log_policy - batch.log_base)).mean()),
            "entropy": float(-(weights * batch.log_policy).mean()),
            "without_support": float((~met).double().mean()),
            "response/length": float(batch.cost.float().mean()),
            "response/truncated": float((~batch.finished).float().mean()),
        }

    def evaluate(self) -> Metrics:
        """Reward and KL to the initial policy of fresh samples on held-out prompts."""
        return self.frontier.measure(self.policy) if self.frontier is not None else {}

    def evaluation_samples(self) -> list[dict[str, Any]]:
        return self.frontier.samples if self.frontier is not None else []

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return [
            {
                "prompt": self.policy.decode(batch.prompts[i]),
                "response": batch.texts[i],
                "reward": float(batch.reward[i]),
                "pseudo-reward": float(batch.pseudo_reward[i]),
                "log policy / initial": float(batch.log_policy[i] - batch.log_base[i]),
            }
            for i in range(min(len(batch), 8))
        ]

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return {
            "partitions": self.partitions.state_dict(),
            "baseline": self.baseline.state_dict(),
            "target": self.target.fitted,
            "proposal": None if self.proposal is None else self.proposal.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.partitions.load_state_dict(state["partitions"])
        self.baseline.load_state_dict(state["baseline"])
        self.target.fitted = state["target"]
        if self.proposal is not None:
            self.proposal.load_state_dict(state["proposal"])

    def save(self, folder: Path) -> None:
        self.policy.save(folder)
