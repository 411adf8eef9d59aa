"""Retrieval: does a query find its own document among all of them?"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def ranks(queries: Tensor, documents: Tensor) -> Tensor:
    """The rank `[n]` (from 1) of each query's own document among all n by cosine similarity.

    `queries`, `documents` `[n, d]`; row i of one belongs to row i of the other. Ties count against
    the query, so that embeddings that are all alike find nothing.
    """
    if queries.ndim != 2 or queries.shape != documents.shape or not len(queries):
        raise ValueError(
            "queries and documents must both be [n, d], got "
            f"{list(queries.shape)} and {list(documents.shape)}"
        )
    if not (torch.isfinite(queries).all() and torch.isfinite(documents).all()):
        raise ValueError("an embedding is NaN or infinite")
    # autocast would round the similarities, and with them the ranks
    with torch.autocast(queries.device.type, enabled=False):
        similarity = normalize(queries.float(), dim=-1) @ normalize(documents.float(), dim=-1).T
    # equal embeddings may differ in the last bits of their similarities
    own = similarity.diagonal().unsqueeze(1) - 1e-6
    return (similarity >= own).sum(dim=1)


def retrieval_metrics(
    queries: Tensor, documents: Tensor, *, recall_at: Sequence[int] = (5, 10)
) -> dict[str, float]:
    """`mrr` (mean reciprocal rank), `top1` and `recall@k` of queries `[n, d]` among n documents."""
    rank = ranks(queries, documents).double()
    metrics = {"mrr": float((1 / rank).mean()), "top1": float((rank == 1).double().mean())}
    return metrics | {f"recall@{k}": float((rank <= k).double().mean()) for k in recall_at}
