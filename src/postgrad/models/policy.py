"""A causal language model as a policy: it scores, embeds, acts as its reference, saves itself."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from postgrad import processes
from postgrad.errors import PostgradError
from postgrad.models.lean_decoding import lean_layers
from postgrad.models.network import base_of, linear_layers, pad_right
from postgrad.models.scoring import (
    OfLogits,
    TokenScores,
    divergences,
    embed_plain,
    embed_shared,
    of_logits,
    predictions,
    score_plain,
    score_shared,
    spread,
)
from postgrad.models.text_network import TextNetwork
from postgrad.products import PackedLinear


class LanguagePolicy(TextNetwork):
    """A causal language model and its tokenizer.

    The network stays in evaluation mode, so that a response has one probability and not one for
    every dropout mask. Besides what every `TextNetwork` has:

    Attributes:
        end_tokens: the ids that end a response.
        engine: what draws responses in its place (`sampling.engines.Engine`); None: this process.
    """

    engine: Any = None

    def __init__(self, network: nn.Module, tokenizer: Any):
        super().__init__(network, tokenizer, "logits")
        self.end_tokens = _end_tokens(base_of(network), tokenizer)
        # kept in tuples, which are no submodules: neither trained nor saved in a checkpoint
        self._frozen: tuple[nn.Module, ...] = ()
        self._rounded: tuple[nn.Module, ...] = ()
        self._in_reference = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LanguagePolicy":
        super()._apply(fn, recurse)
        for frozen in self._frozen:
            frozen._apply(fn, recurse)
        self._rounded = ()
        return self

    # Numbers ---------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Tensor],
        responses: Sequence[Tensor],
        *,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> TokenScores:
        """Log-probabilities (and entropies) of the tokens of responses after their prompts.

        Args:
            prompts: N of `[P]`, P ≥ 1.
            responses: N of `[L]`; one without tokens has a row without True in the mask.
            temperature: divides the logits.
            entropy: whether the entropies of the predictions are wanted too.

        Returns:
            Tensors `[N, T]`, through which gradients flow to the trainable weights.

        Raises:
            PostgradError: prompt and response together exceed the model's context.
        """
        prompts, responses = self.checked(prompts, responses)
        compute = score_shared if self.shares_prefixes else score_plain

        def scores(share: Sequence[int]) -> TokenScores:
            some, others = [prompts[i] for i in share], [responses[i] for i in share]
            return TokenScores(*self(run, some, others))

        def run(some: list[Tensor], others: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
            found = compute(self._network(), some, others, temperature, entropy)
            return found.logprobs, found.mask, found.entropies

        every = range(len(prompts))
        # where weights are sharded all must compute something, as each needs the others' shares
        few = len(prompts) < processes.count()
        if torch.is_grad_enabled() or not processes.dividing() or few:
            return scores(every)
        rows = processes.divided(every, lambda share: scores(share).rows())
        return TokenScores.of_rows(rows, self.device)

    def of_logits(
        self, prompts: Sequence[Tensor], responses: Sequence[Tensor], function: OfLogits
    ) -> Tensor:
        """A function of the logits before each response token, `[N, T]`, 0 at padding.

        For losses that need the whole vocabulary. `function` takes the logits `[m, V]` of some of
        the tokens of all responses, one after the other, and the slice that says which, and gives
        `[m]`. It is called again in the backward pass, so that `[tokens, V]` is never held.
        """
        prompts, responses = self.checked(prompts, responses)
        _, mask = pad_right(responses)
        found = self(of_logits, self._network(), prompts, responses, self.shares_prefixes, function)
        return spread(found, mask)

    def divergence(
        self, prompts: Sequence[Tensor], responses: Sequence[Tensor], *, temperature: float = 1.0
    ) -> Tensor:
        """KL(policy || reference) `[N, T]` of the next token, at each of the responses' tokens.

        Over the whole vocabulary; 0 at padding; without gradients. It takes a forward pass of both.
        """
        prompts, responses = self.checked(prompts, responses)
        own = self(predictions, self._network(), prompts, responses, self.shares_prefixes)
        with self.reference():
            other = self(predictions, self._network(), prompts, responses, self.shares_prefixes)
        _, mask = pad_right(responses)
        return spread(divergences(own, other, temperature), mask)

    def embed(
        self,
        prompts: Sequence[Tensor],
        responses: Sequence[Tensor],
        *,
        skip: int | Sequence[int] = 0,
    ) -> Tensor:
        """Mean last hidden states `[N, d]` of prompts' tokens from `skip` on and of responses'.

        The states are those after the final normalisation; the means are not normalised.
        Responses may be empty. Gradients flow to the trainable weights.

        Raises:
            ValueError: an item has no token left to average over.
            PostgradError: prompt and response together exceed the model's context.
        """
        prompts, responses = self.checked(prompts, responses)
        skips = [skip] * len(prompts) if isinstance(skip, int) else list(skip)
        if len(skips) != len(prompts):
            raise ValueError(f"{len(prompts)} items need as many skips, got {len(skips)}")
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if not 0 <= skips[i] < len(prompt) + len(response):
                raise ValueError(
                    f"item {i} has {len(prompt) + len(response)} tokens and skips {skips[i]}: "
                    "nothing is left to average over"
                )
        compute = embed_shared if self.shares_prefixes else embed_plain
        means: Tensor = self(compute, self._network(), prompts, responses, skips)
        return means

    # Variants of the network -----------------------------------------------------------------

    def _network(self) -> nn.Module:
        return self._frozen[0] if self._in_reference and not self.adapted else self.network

    def freeze_reference(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Keep the present weights, or others `weights` by name, as the reference policy.

        With an adapter nothing is copied: the reference is the network with the adapter off. Of
        sharded weights every process keeps the whole.
        """
        if self.adapted:
            if weights is not None:
                raise PostgradError("tune=lora: the reference is the base model, no other weights")
            return
        with self.whole():
            frozen = copy.deepcopy(self.whole_network).requires_grad_(False)
        if weights is not None:
            frozen.load_state_dict(weights, strict=False)
        self._frozen = (frozen,)

    @property
    def reference_weights(self) -> dict[str, Tensor]:
        """The reference's weights by name, for `freeze_reference`; none where nothing is kept."""
        return {
            name: parameter.detach()
            for frozen in self._frozen
            for name, parameter in frozen.named_parameters()
        }

    @property
    def is_reference(self) -> bool:
        """Whether it acts as the reference policy at present (see `reference`)."""
        return self._in_reference

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy scores, embeds and samples as the reference policy, without gradients.

        Raises:
            ValueError: full weights are trained and `freeze_reference` was never called.
        """
        if not self.adapted and not self._frozen:
            raise ValueError(
                "there is no reference policy: call freeze_reference() before training"
            )
        adapter_off = self.network.disable_adapter() if self.adapted else nullcontext()
        self._in_reference = True
        try:
            with torch.no_grad(), adapter_off:
                yield
        finally:
            self._in_reference = False

    @contextmanager
    def sampling_network(self) -> Iterator[nn.Module]:
        """The network to sample from, which stays the reference's if this is called within one.

        For every token all matrices are read again; under autocast they would be rounded again,
        too. So a copy of the network is used whose matrices are rounded, and on CPUs packed, once
        per call; all else it shares. A network that cannot share prompts keeps its rounded
        matrices from call to call.
        """
        network: Any = self._network()
        if network is self.network:
            network = self.whole_network
        if network is not self.network and self.adapted and self._in_reference:
            with network.disable_adapter(), self._to_sample_from(network) as ready:
                yield ready
            return
        with self._to_sample_from(network) as ready:
            yield ready

    @contextmanager
    def _to_sample_from(self, network: nn.Module) -> Iterator[nn.Module]:
        device = self.device.type
        rounding = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if rounding else base_of(network).dtype
        if self.shares_prefixes:
            packed = _packed_copy(network, dtype)
            try:
                yield packed
            finally:
                # a module with a forward method of its own refers to itself: without this the copy
                # would stay until the next garbage collection
                for module in packed.modules():
                    vars(module).pop("forward", None)
            return
        if not rounding or not _has_float_matrices(network):
            # what switches the adapter off is kept in the modules, so its copy stays without it
            yield _sharing_copy(network) if self._in_reference and self.adapted else network
            return
        lasting = not self._in_reference and not self._whole
        rounded = self._rounded[0] if lasting and self._rounded else _sharing_copy(network)
        _round_matrices(network, rounded, torch.get_autocast_dtype(device))
        if lasting:
            self._rounded = (rounded,)
        yield rounded

    def portable(self) -> tuple[nn.Module, Any]:
        """Network, in CPU memory, and tokenizer, for another process to make a policy of."""
        copied = _sharing_copy(self.whole_network, "cpu")
        for module in copied.modules():
            vars(module).pop("forward", None)  # the other policy finds out for itself
        return copied, self.tokenizer


def _end_tokens(base: Any, tokenizer: Any) -> frozenset[int]:
    settings = getattr(base, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ends = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return frozenset(end for end in ends if end is not None)


def _has_float_matrices(network: nn.Module) -> bool:
    return any(layer.weight.dtype == torch.float32 for _, layer in linear_layers(network))


def _sharing_copy(network: nn.Module, device: str | None = None) -> nn.Module:
    """A copy of the module tree around the same tensors, where they lie on that device already."""
    tensors = [*network.parameters(), *network.buffers()]
    moved = {id(tensor): tensor if device is None else _at(tensor, device) for tensor in tensors}
    return copy.deepcopy(network, moved)


def _at(tensor: Tensor, device: str) -> Tensor:
    there = tensor.detach().to(device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(there, requires_grad=tensor.requires_grad)
    return there


def _packed_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose linear layers are rounded to `dtype` and packed, sharing all other tensors."""
    copied = _sharing_copy(network)
    lean = list(lean_layers(copied, dtype))
    for _, layer, forward in lean:
        layer.forward = forward
    inside = tuple(f"{name}." for name, _, _ in lean)
    for name, layer in list(linear_layers(copied)):
        if name.startswith(inside):
            continue
        matrix = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
        biases = None if layer.bias is None else [layer.bias]
        copied.set_submodule(name, PackedLinear([matrix], biases, dtype))
    return copied


def _round_matrices(network: nn.Module, rounded: nn.Module, dtype: torch.dtype) -> None:
    """Give the matrices of the copy the present values of the network's, in `dtype`."""
    pairs = zip(linear_layers(network), linear_layers(rounded), strict=True)
    for (_, source), (_, target) in pairs:
        if target.weight is source.weight:
            target.weight = nn.Parameter(source.weight.detach().to(dtype), requires_grad=False)
        else:
            target.weight.data.copy_(source.weight.detach())
