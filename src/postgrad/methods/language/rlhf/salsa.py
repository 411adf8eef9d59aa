"""Soup-based Alignment Learning for Stronger Adaptation."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Place
from postgrad.methods.data import DataSettings, find_data
from postgrad.methods.language.rlhf.actor_critic import (
    ActorCritic,
    ActorCriticSettings,
    over_tokens,
)
from postgrad.methods.language.supervised.sft import FORMATS, SFT, SFTSettings
from postgrad.models.language import LanguagePolicy
from postgrad.models.snapshots import Snapshot, soup
from postgrad.tasks import Examples
from postgrad.timing import timed


class SALSASettings(ActorCriticSettings):
    """SALSA's settings."""

    second: str | None = setting(
        None, "folder or Hub id of another model that was fine-tuned from the same pretrained one "
        "as `model`, with another seed or other data"
    )  # fmt: skip
    share: float = setting(
        0.5, "a: the share of `model` in the soup; 1 is PPO", ge=0, le=1, source="paper"
    )
    start: Literal["first", "soup"] = setting(
        "first", "where the policy starts: at `model` or at the soup", source="paper (uncertain)"
    )
    soup_data: DataSettings | None = setting(
        None, "demonstrations on which the soup must be about as good as the two models are; not "
        "tried when empty"
    )  # fmt: skip
    soup_tolerance: float = setting(
        0.05, "nats a token by which the soup's loss there may exceed that of the worse model", ge=0
    )


class SALSA(ActorCritic):
    """Soup-based Alignment Learning for Stronger Adaptation (Chegini et al. 2024,
    arXiv:2411.01798).

    PPO's KL penalty ties the policy to one fine-tuned model, which may lie at the edge of the basin
    that fine-tuning finds. The mean of the weights of two fine-tuned models lies nearer its middle,
    where rewards are higher, so the policy may go further from where it starts:

        theta_soup = a theta_1 + (1 - a) theta_2
        r_t = -beta log(pi_old(y_t|s_t) / pi_soup(y_t|s_t)) + [t last] R(x, y)

    All floating-point parameters are averaged, in float32; buffers are the first model's. PPO with
    a critic goes on as ever, by default from theta_1, so that at the first step the KL is not 0;
    the critic starts from theta_1's body, wherever the policy does. A KL is only comparable with
    that of another run if it is to the same policy: `kl` is to the soup, `kl/first` and `kl/second`
    are to the two models, whose weights are kept for that.

    There is no official code; that the policy starts at theta_1 and the size of beta could not be
    checked against the paper (uncertain). Averages of low-rank factors are no averages of weights,
    so adapters are refused (merge them first).
    """

    Config = SALSASettings
    config: SALSASettings

    def __init__(
        self,
        config: SALSASettings,
        place: Place,
        *,
        second: LanguagePolicy | None = None,
        soup_data: Examples | list[dict[str, Any]] | None = None,
        **given: Any,
    ):
        if config.tune == "lora":
            raise PostgradError(_ADAPTED)
        super().__init__(config, place, **given)
        if self.policy.adapted:
            raise PostgradError(_ADAPTED)
        self._soup_data = None
        if soup_data is not None or config.soup_data is not None:
            named = config.soup_data or DataSettings(name="soup_data")
            self._soup_data = find_data(named, place, FORMATS, soup_data)
        other = self.other_policy("second", config.second, second)
        network = self.policy.network
        weights = dict(other.network.named_parameters())
        require_alike(dict(network.named_parameters()), weights)
        self.parents = {"first": Snapshot(network), "second": Snapshot(network)}
        with torch.no_grad():
            self.parents["second"].load_state_dict(weights)
        mixed = soup(
            [parent.weights for parent in self.parents.values()], [config.share, 1 - config.share]
        )
        self.policy.freeze_reference(mixed)
        if config.start == "soup":
            network.load_state_dict(mixed, strict=False)

    def check(self) -> None:
        super().check()
        if self._soup_data is None:
            return
        imitation = self._imitation(self._soup_data.first(self.config.eval_size))
        losses = {}
        for name, weights in self.parents.items():
            with weights.acting():
                losses[name] = imitation.evaluate()["loss"]
        with self.policy.reference():
            mixed = imitation.evaluate()["loss"]
        if not mixed <= max(losses.values()) + self.config.soup_tolerance:
            raise PostgradError(
                f"second: the soup's loss on soup_data is {mixed:.3f}, those of the two models are "
                f"{losses['first']:.3f} and {losses['second']:.3f}: expected at most "
                f"{self.config.soup_tolerance:g} above the worse; were both fine-tuned from one "
                "pretrained model?"
            )

    def _imitation(self, data: Examples) -> SFT:
        """What evaluates to the mean loss a token on demonstrations, of the policy as it acts."""
        values = {
            "max_prompt_tokens": self.config.max_prompt_tokens,
            "max_response_tokens": min(512, self.policy.context_length // 2),
        }
        config = validated(SFTSettings, values)
        return SFT(config, self.place, model=self.policy, data=data, eval_data=data)

    def with_known(self, batch: Batch) -> Batch:
        batch = super().with_known(batch)
        for name, weights in self.parents.items():
            with timed("scoring"), weights.acting():
                logprobs = over_tokens(batch, self._score)
            divergence = (batch.old_logprobs - logprobs).sum(1)
            batch = batch.with_fields(**{f"kl/{name}": divergence})
        return batch

    def describe_batch(self, batch: Batch) -> Metrics:
        fields = batch.fields()
        divergences = {f"kl/{name}": float(fields[f"kl/{name}"].mean()) for name in self.parents}
        return {**super().describe_batch(batch), **divergences}


def require_alike(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Stop unless weights can be averaged name by name, those of the settings model and second."""
    for name in [*first, *second]:
        if name not in first or name not in second:
            missing = "model" if name not in first else "second"
            raise PostgradError(
                f"second: expected the architecture of model, but {missing} has no weights {name}"
            )
    for name, weight in first.items():
        if weight.shape != second[name].shape:
            raise PostgradError(
                f"second: expected the architecture of model, whose {name} is "
                f"{list(weight.shape)}, found {list(second[name].shape)}"
            )
        for key, tensor in (("model", weight), ("second", second[name])):
            if not tensor.is_floating_point():
                raise PostgradError(
                    f"{key}: expected floating-point weights to average, but {name} is "
                    f"{tensor.dtype} (quantised?)"
                )


_ADAPTED = "tune: salsa averages weights, which low-rank factors do not allow: expected full"
