"""Losses of iterative preference methods: each round is centred at the policy that sampled.

Round t draws responses from pi_t and fits the next policy to what was preferred among them.
`centre` are log-probabilities under pi_t, `reference` those under pi_ref; a pair `[B, 2]` has its
winner first. eta is the weight of the KL to the centre: an inverse step size, larger is smaller.
"""

import torch
from torch import Tensor

from postgrad.objectives.pairwise import ipo, logistic, margin
from postgrad.objectives.shapes import expect_same_shape


def mirror_step(centre: Tensor, values: Tensor, eta: float) -> Tensor:
    """log of centre exp(values / eta) / Z, `[..., K]`, of log-probabilities of K responses.

    The exact solution of a round in tables. With values P(y > pi_t) it is the target of SPPO, of
    DNO, and (around a `geometric_centre`) of INPO (arXiv 2407.00617, eq. 5); with a reward it is
    that of DPO centred at pi_t.
    """
    expect_same_shape(centre=centre, values=values)
    _expect_positive(eta=eta)
    return (centre + values / eta).log_softmax(-1)


def geometric_centre(centre: Tensor, reference: Tensor, share: float) -> Tensor:
    """log of pi_t^(1 - share) pi_ref^share, of any shape and not normalised.

    In differences between responses the normaliser cancels.
    """
    expect_same_shape(centre=centre, reference=reference)
    if not 0 <= share <= 1:
        raise ValueError(f"the reference's share of the centre must lie in [0, 1], got {share}")
    return (1 - share) * centre + share * reference


def inpo(logprobs: Tensor, reference: Tensor, centre: Tensor, eta: float, tau: float) -> Tensor:
    """INPO's loss `[B]` of pairs (arXiv 2407.00617, eq. 8): (h_t - 1/(2 eta))^2.

    h_t = log pi(y_w)/pi(y_l) - (tau/eta) log pi_ref(y_w)/pi_ref(y_l)
    - (1 - tau/eta) log pi_t(y_w)/pi_t(y_l). All log-probabilities are `[B, 2]`; tau in [0, eta].
    """
    _expect_pairs(logprobs=logprobs, reference=reference, centre=centre)
    _expect_positive(eta=eta)
    mixed = geometric_centre(centre, reference, tau / eta)
    return ipo(margin(logprobs[:, 0], logprobs[:, 1], mixed[:, 0], mixed[:, 1]), eta)


def sppo(log_ratio: Tensor, wins: Tensor, eta: float) -> Tensor:
    """SPPO's loss of each response (arXiv 2405.00675): (log pi/pi_t - (P(y > pi_t) - 1/2)/eta)^2.

    `log_ratio`, to the centre, and `wins`, win rates in [0, 1], have one shape, which the loss has.
    """
    expect_same_shape(log_ratio=log_ratio, wins=wins)
    _expect_positive(eta=eta)
    _expect_rates(wins)
    return (log_ratio - (wins - 0.5) / eta).square()


def soft_pair(logprobs: Tensor, centre: Tensor, wins: Tensor, eta: float) -> Tensor:
    """DNO's loss `[B]` of pairs (arXiv 2404.03715, algorithm 1), the pair in either order.

    With the target q = sigma(r_1 - r_2) of the win rates r against pi_t and the margin
    Delta = eta [log pi(y_1)/pi_t(y_1) - log pi(y_2)/pi_t(y_2)]:
    -q log sigma(Delta) - (1 - q) log sigma(-Delta). All arguments are `[B, 2]`.
    """
    _expect_pairs(logprobs=logprobs, centre=centre, wins=wins)
    _expect_positive(eta=eta)
    _expect_rates(wins)
    delta = eta * margin(logprobs[:, 0], logprobs[:, 1], centre[:, 0], centre[:, 1])
    target = torch.sigmoid(wins[:, 0] - wins[:, 1])
    return target * logistic(delta) + (1 - target) * logistic(-delta)


def extrapolated_logits(now: Tensor, before: Tensor, alpha: float) -> Tensor:
    """Logits `[..., V]` of pi_now (pi_now / pi_before)^alpha / Z (APO, arXiv 2410.06293)."""
    expect_same_shape(now=now, before=before)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must lie in [0, 1), got {alpha}")
    return (1 + alpha) * now - alpha * before


def _expect_pairs(**tensors: Tensor) -> None:
    expect_same_shape(**tensors)
    name, first = next(iter(tensors.items()))
    if first.ndim != 2 or first.shape[1] != 2:
        raise ValueError(f"{name} must be pairs [B, 2], got shape {list(first.shape)}")


def _expect_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _expect_rates(wins: Tensor) -> None:
    if not bool(((wins >= 0) & (wins <= 1)).all()):
        raise ValueError("win rates must lie in [0, 1]")
