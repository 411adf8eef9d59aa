"""PPO for control, the baseline of the family."""

from typing import ClassVar

from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import FourParts, Metrics
from postgrad.methods.control.on_policy import OnPolicy, OnPolicySettings
from postgrad.models.distributions import Distribution
from postgrad.objectives.policy_gradient import clip_fractions, clipped_surrogate


class PPO(OnPolicy):
    """Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347) for Gymnasium.

    Idea: several passes over the same data are safe if a sample stops pushing the policy once its
    probability ratio has left [1 - clip, 1 + clip] in the direction that its advantage asks for.

        J(theta) = mean_i min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i)
        rho_i = pi_theta(a_i|s_i) / pi_k(a_i|s_i)

    Deviations: policy and value are separate networks with an optimiser each; advantages are
    standardised over the whole batch, not over each minibatch. Everything else than the policy's
    loss is shared with `mdpo`; `policy_minibatch=` (empty) optimises on the full batch as it does.
    """

    class Config(OnPolicySettings):
        m: int = setting(10, "passes over the batch by the policy", source="paper, table 3", gt=0)
        policy_minibatch: int | None = setting(
            64, "steps in one gradient step of the policy", source="paper, table 3", gt=0
        )
        clip: float = setting(
            0.2, "how far a ratio may leave 1", source="paper, table 3", gt=0, lt=1
        )

    settings: Config
    parts: ClassVar[FourParts] = FourParts(
        mask="1 where rho moved less than clip towards the advantage's sign, else 0",
        denominator="collecting policy pi_k",
        advantage="GAE(lambda), standardised over the batch",
        gradient="log pi(a|s), m passes of minibatches",
    )

    def surrogate(
        self, policy: Distribution, old: Distribution, batch: Batch
    ) -> tuple[Tensor, Metrics]:
        clip = self.settings.clip
        ratio = (policy.logprobs(batch.actions) - batch.old_logprobs).exp()
        fractions = clip_fractions(ratio.detach(), batch.advantages, clip, clip)
        metrics = {name: float(value) for name, value in fractions.items()}
        metrics["kl"] = float(policy.kl(old).detach().mean())
        return clipped_surrogate(ratio, batch.advantages, clip, clip), metrics
