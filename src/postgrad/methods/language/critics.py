"""A second network beside the policy that reads its tokens: a critic, a guide …"""

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Place
from postgrad.methods.language.base import LanguageSettings
from postgrad.models.language import LanguagePolicy
from postgrad.models.scalar import ScalarModel, load_scalar
from postgrad.models.text_network import TextNetwork
from postgrad.objectives.advantage_regression import success_loss


def find_critic(
    name: str | None, policy: LanguagePolicy, config: LanguageSettings, place: Place, longest: int
) -> ScalarModel:
    """The reward model called `name` as a critic, or if None the policy's body with a new head.

    `longest` is the most tokens that it will have to read.
    """
    if name is None:
        return ScalarModel.on_body_of(policy)
    critic = load_scalar(name, device=place.device, trust_remote_code=config.trust_remote_code)
    require_readable("critic", name, critic, policy, config, longest)
    return critic


def require_readable(
    key: str,
    name: str,
    other: TextNetwork,
    policy: LanguagePolicy,
    config: LanguageSettings,
    longest: int,
) -> None:
    """Stop unless what the setting `key` names knows the policy's tokens, `longest` of them."""
    if other.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise PostgradError(
            f"{key}: {name} has another vocabulary than the model {config.model}: it "
            "cannot read the policy's tokens"
        )
    if other.context_length < longest:
        raise PostgradError(
            f"{key}: {name} has a context of {other.context_length} tokens, but prompts and "
            f"responses may have {longest}: shorten them or name another"
        )


def chance_loss(critic: ScalarModel, states: Batch) -> tuple[Tensor, Metrics]:
    """The share in the loss of a critic that learns chances of success, and how far it is off.

    V(s) = sigmoid(critic) is read at the end of the prompts (with the responses, if any), and
    `success` `[n]` is the share of completions that succeeded. `least_loss` is what V = success
    would have.
    """
    logits = critic.rewards(states.prompts, states.responses)
    success = states.success.to(logits.device)
    least = -(torch.xlogy(success, success) + torch.xlogy(1 - success, 1 - success))
    return success_loss(logits, success).sum() / states.items, {
        "error": float((logits.detach().sigmoid() - success).abs().mean()),
        "least_loss": float(least.mean()),
    }
