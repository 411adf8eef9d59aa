"""Advantages over time: generalised advantage estimation, of environments and of tokens."""

import torch
from torch import Tensor


@torch.no_grad()
def generalised_advantage(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    truncations: Tensor,
    *,
    discount: float,
    lambda_: float,
) -> tuple[Tensor, Tensor]:
    """GAE(lambda) advantages and TD(lambda) returns, both `[T, B]` (arXiv 1506.02438, eq. 16).

    All inputs are `[T, B]`: T steps of B environments.

    - `values` V(s_t); `next_values` V of the state that step t really led to, which after the end
      of an episode is its final state and not the first state of the next episode.
    - `terminations` (boolean): the episode ended there; nothing follows, so nothing is bootstrapped
      and `next_values` is not read.
    - `truncations` (boolean): the episode was cut (a time limit); V(s_{t+1}) still counts, but the
      sum stops.

    delta_t = r_t + discount V(s_{t+1}) - V(s_t);  A_t = delta_t + discount lambda A_{t+1};
    return_t = A_t + V(s_t). The recursion assumes that step T - 1 is cut, as at a horizon.
    """
    named = {
        "rewards": rewards,
        "values": values,
        "next_values": next_values,
        "terminations": terminations,
        "truncations": truncations,
    }
    if rewards.ndim != 2 or len({tensor.shape for tensor in named.values()}) > 1:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named.items())
        raise ValueError(f"all inputs must be [T, B], got {found}")
    if terminations.dtype != torch.bool or truncations.dtype != torch.bool:
        raise ValueError("terminations and truncations must be boolean")
    if not (0 <= discount <= 1 and 0 <= lambda_ <= 1):
        raise ValueError(f"discount and lambda_ must lie in [0, 1], got {discount}, {lambda_}")
    bootstrap = torch.where(terminations, 0.0, next_values)
    deltas = rewards + discount * bootstrap - values
    ends = terminations | truncations
    advantages = torch.empty_like(deltas)
    following = deltas.new_zeros(deltas.shape[1:])
    for step in reversed(range(len(deltas))):
        following = deltas[step] + discount * lambda_ * torch.where(ends[step], 0.0, following)
        advantages[step] = following
    return advantages, advantages + values


@torch.no_grad()
def token_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float, lambda_: float
) -> tuple[Tensor, Tensor]:
    """GAE(lambda) over the tokens of responses: advantages and returns, both `[N, T]`.

    `rewards` `[N, T]` of each token, `values` `[N, T]` V(s_t) of the state in which token t is
    chosen, `mask` `[N, T]` the response tokens, without gaps from the first on. Nothing follows a
    response's last token. Both are 0 at padding, whatever that holds.
    """
    ended = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
    return _over_tokens(rewards, values, mask, ended, discount, lambda_)


@torch.no_grad()
def egae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    finished: Tensor,
    *,
    discount: float,
    lambda_: float,
) -> Tensor:
    """Extended GAE `[N, T]`: of responses some of which go on in a later step (T-PPO, 2506.15050).

    Like `token_advantages`, of a window of each response. Where `finished` `[N]` is true nothing
    follows the last token; elsewhere something does, and the state after it, which no one has
    evaluated yet, counts as much as the last one that was: V(s_e) = V(s_{e-1}).
    """
    if finished.shape != mask.shape[:1] or finished.dtype != torch.bool:
        raise ValueError(
            f"finished must be boolean [{len(mask)}], got {finished.dtype} {list(finished.shape)}"
        )
    advantages, _ = _over_tokens(rewards, values, mask, finished, discount, lambda_)
    if bool(rewards.masked_fill(~mask, 0.0)[~finished].any()):
        raise ValueError("a response that is not finished has no reward yet")
    return advantages


def _over_tokens(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    finished: Tensor,
    discount: float,
    lambda_: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns `[N, T]` of tokens; what is not `finished` `[N]` goes on."""
    named = {"rewards": rewards, "values": values, "mask": mask}
    if rewards.ndim != 2 or len({tensor.shape for tensor in named.values()}) > 1:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named.items())
        raise ValueError(f"all inputs must be [N, T], got {found}")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("the mask has gaps: tokens of a response follow one another")
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    following = torch.where(last, values, following)
    advantages, returns = generalised_advantage(
        rewards.t(),
        values.t(),
        following.t(),
        (last & finished[:, None]).t(),
        (last & ~finished[:, None]).t(),
        discount=discount,
        lambda_=lambda_,
    )
    return advantages.t().masked_fill(~mask, 0.0), returns.t().masked_fill(~mask, 0.0)
