"""Listwise preference losses: functions of the scores of a ranked list of responses."""

import torch
from torch import Tensor


def plackett_luce(scores: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking under the Plackett-Luce model, `[...]`.

    `scores` `[..., K]` are in ranked order, best first; with s_k = beta log(pi/pi_ref)(y_(k)):
    -sum_{k<K} [ s_k - log sum_{j>=k} exp s_j ] (DPO, arXiv 2305.18290, appendix A.3). For K = 2 it
    is DPO's loss of the pair.
    """
    if scores.ndim < 1 or scores.shape[-1] < 2:
        raise ValueError(f"a ranking needs at least 2 scores, got shape {list(scores.shape)}")
    remaining = torch.logcumsumexp(scores.flip(-1), dim=-1).flip(-1)
    return (remaining - scores)[..., :-1].sum(-1)
