"""What is learnt from an engine's samples, corrected for the probabilities it drew them by."""

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics
from postgrad.methods.language.base import RolloutSettings
from postgrad.models.policy import LanguagePolicy
from postgrad.objectives.mismatch import Mismatch, mismatch, truncated_weights


class EngineCorrection:
    """Measures how an engine and the trainer disagree, and weighs token losses for it.

    Where this process samples, or an engine does exactly as it would, nothing is done.
    """

    def __init__(self, policy: LanguagePolicy, rollout: RolloutSettings):
        """Raises PostgradError where samples do not come from what the policy says."""
        self._policy, self._rollout = policy, rollout
        self._found = Mismatch()
        if self.needed and rollout.correction != "none":
            for key, value, whole in (("top_p", rollout.top_p, 1), ("top_k", rollout.top_k, 0)):
                if value != whole:
                    raise PostgradError(
                        f"rollout.correction: {rollout.correction!r} compares the engine's "
                        "probabilities with the policy's over all tokens, so expected "
                        f"rollout.{key}={whole}, got {value} (rollout.correction=none learns "
                        "without it)"
                    )

    @property
    def needed(self) -> bool:
        """Whether what draws is not the policy that is scored, to the last digit."""
        engine = self._policy.engine
        return engine is not None and not engine.exact

    def weights(self, batch: Batch, own: Tensor, mask: Tensor) -> Tensor:
        """What to multiply the token losses by, `[N, T]`.

        `own` `[N, T]` are the log-probabilities that the sampling policy has in this process,
        `mask` `[N, T]` the tokens that count. A token whose sampling log-probability is 0 was no
        choice of the engine's (a tool's, a demonstration's, a given beginning's): its weight is 1.
        """
        if not self.needed:
            return torch.ones_like(own)
        drawn_by = batch.sampled_logprobs[:, : own.shape[1]].to(own)
        drawn = mask & (drawn_by != 0)
        cap = self._rollout.correction_cap
        self._found += mismatch(own, drawn_by, drawn, cap)
        if self._rollout.correction == "none":
            return torch.ones_like(own)
        return truncated_weights(own, drawn_by, drawn, cap)

    def metrics(self) -> Metrics:
        """How engine and trainer disagreed since the last call."""
        found, self._found = self._found, Mismatch()
        return {f"engine/{name}": value for name, value in found.metrics().items()}
