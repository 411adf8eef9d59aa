"""Log-probabilities, entropies and embeddings of responses, each prompt computed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from postgrad.models.fused_projection import project_logprobs
from postgrad.models.network import (
    OutputLayer,
    base_of,
    output_layer,
    packed_hidden,
    pad_right,
)
from postgrad.models.packing import SharedPrefixes
from postgrad.objectives.projection import differentiable_logits, project_logits

_LOGITS_AT_ONCE = 2**22  # where whole distributions are asked for

# of logits `[m, V]` before some of the response tokens, and which of them: a number `[m]` each
OfLogits = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class TokenScores:
    """What a policy says about the tokens of N responses, T being the longest.

    Attributes:
        logprobs: `[N, T]` in nats, at least float32; 0 where `mask` is False.
        mask: `[N, T]` bool, True at the tokens of the responses.
        entropies: `[N, T]` in nats, 0 where masked; None unless asked for.
    """

    logprobs: Tensor
    mask: Tensor
    entropies: Tensor | None

    def rows(self) -> list[tuple[Tensor, Tensor | None]]:
        """Of each item the log-probabilities `[L]` and entropies `[L]` of its response."""
        lengths = self.mask.sum(-1).tolist()
        return [
            (self.logprobs[i, :n], None if self.entropies is None else self.entropies[i, :n])
            for i, n in enumerate(lengths)
        ]

    @classmethod
    def of_rows(
        cls, rows: Sequence[tuple[Tensor, Tensor | None]], device: torch.device
    ) -> "TokenScores":
        """The scores of N items from those of each (see `rows`), on a device."""
        logprobs, mask = pad_right([own.to(device) for own, _ in rows])
        entropies = [entropy.to(device) for _, entropy in rows if entropy is not None]
        return cls(logprobs, mask, pad_right(entropies)[0] if entropies else None)


def distinct(prompts: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The different prompts in order of appearance, and for each item which of them it has."""
    places: dict[tuple[int, ...], int] = {}
    unique: list[Tensor] = []
    owners = []
    for prompt in prompts:
        key = tuple(prompt.tolist())
        if key not in places:
            places[key] = len(unique)
            unique.append(prompt)
        owners.append(places[key])
    return unique, owners


def score_shared(
    network: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    temperature: float,
    entropy: bool,
) -> TokenScores:
    """Scores of responses `[L]` after prompts `[P]`, by one packed row of tokens.

    The network must take layouts (`probing.enable_sharing`).
    """
    hidden = predicting_states(network, prompts, responses)
    layer = output_layer(network)
    assert layer is not None
    logprobs, entropies = project_logprobs(
        hidden,
        layer.weight,
        torch.cat(list(responses)),
        bias=layer.bias,
        temperature=temperature,
        transform=layer.transform,
        entropy=entropy,
    )
    _, mask = pad_right(list(responses))
    return TokenScores(
        spread(logprobs, mask), mask, None if entropies is None else spread(entropies, mask)
    )


def predicting_states(
    network: nn.Module, prompts: Sequence[Tensor], responses: Sequence[Tensor]
) -> Tensor:
    """The last hidden states `[tokens, d]` before each response token, by one packed row."""
    unique, owners = distinct(prompts)
    packed = SharedPrefixes(unique, [response[:-1] for response in responses], owners)
    rows = [
        row
        for (start, stop), owner, response in zip(
            packed.completion_rows, owners, responses, strict=True
        )
        if len(response)
        for row in (packed.prompt_rows[owner][1] - 1, *range(start, stop))
    ]
    return _rows(packed_hidden(network, packed.tokens, packed.positions, packed), rows)


def final_states(
    network: nn.Module, prompts: Sequence[Tensor], responses: Sequence[Tensor]
) -> Tensor:
    """The last hidden states `[N, d]` after each prompt and its response, by one packed row."""
    unique, owners = distinct(prompts)
    packed = SharedPrefixes(unique, responses, owners)
    rows = [
        stop - 1 if stop > start else packed.prompt_rows[owner][1] - 1
        for (start, stop), owner in zip(packed.completion_rows, owners, strict=True)
    ]
    return _rows(packed_hidden(network, packed.tokens, packed.positions, packed), rows)


def plain_states(
    network: nn.Module, prompts: Sequence[Tensor], responses: Sequence[Tensor]
) -> list[Tensor]:
    """For each item its last hidden states `[L + 1, d]`, from the prompt's last token on.

    By the network's own forward over padded full sequences.
    """
    ids, real = pad_right([torch.cat(pair) for pair in zip(prompts, responses, strict=True)])
    output = base_of(network).get_decoder()(
        input_ids=ids, attention_mask=real.long(), use_cache=False
    )
    states: Tensor = output.last_hidden_state
    return [
        states[i, len(prompt) - 1 : len(prompt) + len(response)]
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def score_plain(
    network: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    temperature: float,
    entropy: bool,
) -> TokenScores:
    """The same by the network's own forward over padded full sequences, for any architecture."""
    logits = _predicting_logits(network, prompts, responses).float() / temperature
    table = logits.log_softmax(-1)
    logprobs = table.gather(-1, torch.cat(list(responses))[:, None]).squeeze(-1)
    _, mask = pad_right(list(responses))
    entropies = spread(-(table.exp() * table).sum(-1), mask) if entropy else None
    return TokenScores(spread(logprobs, mask), mask, entropies)


def _predicting_logits(
    network: nn.Module, prompts: Sequence[Tensor], responses: Sequence[Tensor]
) -> Tensor:
    """The logits `[tokens, V]` before each response token, by the network's own forward."""
    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    ids, real = pad_right(whole)
    logits: Tensor = network(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
    predicting = [
        torch.arange(len(p) - 1, len(p) + len(r) - 1, device=ids.device) + i * ids.shape[1]
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
    ]
    return logits.flatten(0, 1)[torch.cat(predicting)]


def embed_shared(
    network: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    skips: Sequence[int],
) -> Tensor:
    """Mean last hidden states `[N, d]` of prompt tokens from `skip` on and response tokens."""
    unique, owners = distinct(prompts)
    packed = SharedPrefixes(unique, responses, owners)
    hidden = packed_hidden(network, packed.tokens, packed.positions, packed)
    weights = torch.zeros(len(prompts), len(hidden), device=hidden.device)
    for i, (owner, skip) in enumerate(zip(owners, skips, strict=True)):
        first, last = packed.prompt_rows[owner]
        start, stop = packed.completion_rows[i]
        beyond = max(0, skip - (last - first))  # tokens of the response that are skipped as well
        weights[i, first + skip : last] = 1
        weights[i, start + beyond : stop] = 1
    return _means(weights, hidden)


def embed_plain(
    network: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    skips: Sequence[int],
) -> Tensor:
    """The same by the network's own forward over padded full sequences."""
    ids, real = pad_right([torch.cat(pair) for pair in zip(prompts, responses, strict=True)])
    output = base_of(network).get_decoder()(
        input_ids=ids, attention_mask=real.long(), use_cache=False
    )
    first = torch.tensor(list(skips), device=ids.device)
    pooled = real & (torch.arange(ids.shape[1], device=ids.device) >= first[:, None])
    return _means(pooled[:, None].float(), output.last_hidden_state).squeeze(1)


def _means(weights: Tensor, hidden: Tensor) -> Tensor:
    """Means of hidden states, in float32 also where autocast would round them."""
    with torch.autocast(hidden.device.type, enabled=False):
        return (weights @ hidden.float()) / weights.sum(-1, keepdim=True)


def _rows(hidden: Tensor, rows: list[int]) -> Tensor:
    # not by [...]: its backward adds in an order that differs from run to run
    return hidden.index_select(0, torch.tensor(rows, dtype=torch.long, device=hidden.device))


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """`[N, T]` with the values `[mask.sum()]` where the mask is True and 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


@dataclass(frozen=True)
class Predictions:
    """What a network predicts before each of `[tokens]`: hidden states and the layer after them.

    Without a layer the states are the logits themselves.
    """

    states: Tensor
    layer: OutputLayer | None

    def log_probabilities(self, rows: slice, temperature: float) -> Tensor:
        """`[rows, V]` in at least float32, without gradients."""
        states = self.states[rows]
        if self.layer is None:
            return (states.float() / temperature).log_softmax(-1)
        weight, bias = self.layer.weight, self.layer.bias
        logits = project_logits(
            states.to(weight.dtype), weight, bias, self.layer.transform, temperature
        )
        return logits.log_softmax(-1)


@torch.no_grad()
def predictions(
    network: nn.Module, prompts: Sequence[Tensor], responses: Sequence[Tensor], shares: bool
) -> Predictions:
    """Of response tokens, by one packed row if the network `shares` prompts."""
    if shares:
        return Predictions(predicting_states(network, prompts, responses), output_layer(network))
    return Predictions(_predicting_logits(network, prompts, responses), None)


@torch.no_grad()
def divergences(one: Predictions, other: Predictions, temperature: float) -> Tensor:
    """KL(one || other) `[tokens]` of the predictions, over the whole vocabulary.

    A few tokens at a time, so that `[tokens, V]` is held for those only.
    """
    parts = []
    for rows in _few_at_once(one.states, one.layer):
        own = one.log_probabilities(rows, temperature)
        gap = own - other.log_probabilities(rows, temperature)
        parts.append((own.exp() * gap).sum(-1))
    return torch.cat(parts)


def of_logits(
    network: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    shares: bool,
    function: OfLogits,
) -> Tensor:
    """`function` of the logits before every response token `[tokens]`, with gradients.

    A few tokens at a time, whose logits are computed again for the backward pass: the function is
    called twice, and must do the same both times.
    """
    if shares:
        states, layer = predicting_states(network, prompts, responses), output_layer(network)
    else:
        states, layer = _predicting_logits(network, prompts, responses), None
    places = _few_at_once(states, layer)
    parts = states.split([rows.stop - rows.start for rows in places])

    def one(states: Tensor, rows: slice) -> Tensor:
        if layer is None:
            return function(states.float(), rows)
        logits = differentiable_logits(states, layer.weight, layer.bias, layer.transform)
        return function(logits, rows)

    again = partial(checkpoint, one, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(part, rows) for part, rows in zip(parts, places, strict=True)])


def _few_at_once(states: Tensor, layer: OutputLayer | None) -> list[slice]:
    """The rows of `[tokens, …]` in parts whose logits may be held."""
    width = states.shape[1] if layer is None else len(layer.weight)
    size = max(1, _LOGITS_AT_ONCE // width)
    return [slice(start, min(start + size, len(states))) for start in range(0, len(states), size)]
