"""Drawing a token from logits: one uniform number, the inverse of the cumulative distribution."""

from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad.errors import PostgradError


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled.

    Attributes:
        max_new_tokens: a response is cut after this many tokens.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: keep the most probable tokens that together reach this probability; 1 keeps all.
        top_k: keep this many of the most probable tokens; 0 keeps all.
        stop: a response ends with the token that completes one of these strings.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, allowed, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or above"),
            ("stop", all(self.stop), "strings that are not empty"),
        ):
            if not allowed:
                raise PostgradError(f"{key} must be {expected}, got {getattr(self, key)!r}")


def restrict(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Logits `[n, V]` at the sampling temperature, with -inf for what top-k and top-p exclude.

    The order is temperature, then top-k, then top-p. A tie with the last token kept is kept too.
    """
    if settings.temperature not in (0, 1):
        logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        least = logits.topk(settings.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.top_p < 1:
        ranked = logits.sort(-1, descending=True).values
        probabilities = ranked.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        last = (before < settings.top_p).sum(-1, keepdim=True) - 1
        logits = logits.masked_fill(logits < ranked.gather(-1, last), -torch.inf)
    return logits


def draw(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """Tokens `[n]` and their log-probabilities `[n]` from logits `[n, V]` and uniforms `[n]`.

    The log-probability is that of the distribution drawn from: at the sampling temperature and
    renormalised over what top-k and top-p keep. At temperature 0 the most probable token is taken
    and its log-probability is that at temperature 1. A row's outcome depends on nothing but its
    own logits and its own number in [0, 1).
    """
    if settings.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, _chosen(logits, tokens) - logits.logsumexp(-1)
    logits = restrict(logits, settings)
    peak = logits.amax(-1)
    tokens, total = _inverse(logits - peak[:, None], uniforms[:, None])
    return tokens[:, 0], _chosen(logits, tokens[:, 0]) - peak - total.log()


def draw_several(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """Independent tokens `[n, K]` from every row of logits `[n, V]`, by uniforms `[n, K]`.

    As in `draw`, each is decided by its row's logits and its own number alone.
    """
    tempered = logits / temperature
    return _inverse(tempered - tempered.amax(-1, keepdim=True), uniforms)[0]


def _inverse(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens `[n, K]` at the uniforms `[n, K]` of the cumulative distribution of `[n, V]`.

    Also the sums `[n]` of exp(logits), whose memory is taken; no logit is above 0.
    """
    weights = logits.exp_()
    # in float64, or a token of no weight could lie between two sums that differ by rounding; on
    # CPUs torch sums so by itself
    cumulative = weights.cumsum(-1, dtype=torch.float64) if logits.is_cuda else weights.cumsum_(-1)
    total = cumulative[:, -1:]
    # strictly below the total, so that the token found always has a probability above 0
    below = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum((uniforms * total).to(total.dtype), below)
    return torch.searchsorted(cumulative, threshold, right=True), total[:, 0].to(logits.dtype)


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(-1, tokens[:, None]).squeeze(-1)


def uniform_stream(seed: int, length: int) -> Tensor:
    """The numbers `[length]` in [0, 1) that a sample with this seed draws its tokens by.

    A longer stream starts with the shorter one.
    """
    generator = torch.Generator().manual_seed(int(seed))
    return torch.rand(length, generator=generator, dtype=torch.float64)
