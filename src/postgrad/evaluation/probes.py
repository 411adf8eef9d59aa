"""What frozen representations hold: linear probe, nearest neighbours, accuracy by class."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def class_accuracies(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The share of each class's items `[n]` that are predicted right: `[classes]`.

    ValueError if a class has no items: its accuracy, and the balanced one, would be undefined.
    """
    counts = torch.bincount(labels, minlength=classes)
    if int(counts.min()) == 0:
        raise ValueError(f"class {int(counts.argmin())} has no items to measure its accuracy on")
    right = torch.bincount(labels[predicted == labels], minlength=classes)
    return right.double() / counts


def linear_probe(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    classes: int,
    penalty: float = 1e-3,
    iterations: int = 100,
) -> Tensor:
    """Class predictions `[m]` for `queries` `[m, r]` of a linear classifier trained on `features`.

    Multinomial logistic regression on features `[n, r]`, standardised, with labels `[n]`. Every
    class has the same total weight in its loss, so that a rare class is not sacrificed. The problem
    is convex; L-BFGS starts at zero, so the result does not depend on a seed.
    """
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    inputs = (features - mean) / deviation
    counts = torch.bincount(labels, minlength=classes)
    weights = len(labels) / (classes * counts.clamp(min=1).to(inputs))
    with torch.enable_grad():
        matrix = torch.zeros(
            inputs.shape[1], classes, dtype=inputs.dtype, device=inputs.device, requires_grad=True
        )
        bias = torch.zeros(classes, dtype=inputs.dtype, device=inputs.device, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [matrix, bias], max_iter=iterations, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            optimiser.zero_grad()
            loss = cross_entropy(inputs @ matrix + bias, labels, weights, reduction="sum")
            loss = loss / len(labels) + penalty * matrix.square().sum()
            loss.backward()
            return loss

        optimiser.step(objective)
    with torch.no_grad():
        return ((queries - mean) / deviation @ matrix + bias).argmax(dim=1)


def nearest_neighbours(
    features: Tensor, labels: Tensor, queries: Tensor, *, classes: int, neighbours: int = 5
) -> Tensor:
    """Class predictions `[m]` by a vote of the most similar items, weighted by cosine similarity.

    `features` `[n, r]` with `labels` `[n]`; `queries` `[m, r]`. Similarities are shifted to [0, 2].
    """
    similarity = normalize(queries, dim=-1) @ normalize(features, dim=-1).T
    near, index = similarity.topk(min(neighbours, len(features)), dim=1)
    votes = torch.zeros(len(queries), classes, dtype=near.dtype, device=near.device)
    return votes.scatter_add_(1, labels[index], near + 1).argmax(dim=1)


def spearman(left: Tensor, right: Tensor) -> float:
    """Spearman's rank correlation of two vectors `[n]`; ties share their mean rank.

    0 if one of them is constant: there is no order to correlate with.
    """
    if left.shape != right.shape or left.ndim != 1 or len(left) < 2:
        raise ValueError(f"expected two vectors [n], got {list(left.shape)}, {list(right.shape)}")
    a, b = _mean_ranks(left), _mean_ranks(right)
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else 0.0


def _mean_ranks(values: Tensor) -> Tensor:
    below = (values.unsqueeze(0) < values.unsqueeze(1)).sum(1)
    equal = (values.unsqueeze(0) == values.unsqueeze(1)).sum(1)
    return below.double() + (equal.double() - 1) / 2
