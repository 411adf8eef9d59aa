"""Can a network share prompts? Asked of its configuration, then of its own output."""

from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postgrad.models.attention import (
    IMPLEMENTATION,
    AttentionForm,
    UnsupportedAttention,
    register,
)
from postgrad.models.lean import make_lean
from postgrad.models.network import base_of, output_layer, packed_hidden, pad_right
from postgrad.models.packing import SharedPrefixes
from postgrad.objectives.projection import project_logits

Output = Literal["logits", "states"]  # what of a network is used: its output layer, or its body

_PROMPTS, _COMPLETIONS = (9, 5), ((4, 7), (3,))  # tokens of each prompt, and of its completions
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the norm; below float32: _ROUGH
_ROUGH = 3e-2


def enable_sharing(network: nn.Module, output: Output = "logits") -> str | None:
    """Let the network take its attention from layouts; the reason (one line) if it cannot.

    The network shares prompts only if its configuration names nothing but causal attention, full
    or in a sliding window, and a packed row of short random sequences gives the logits (or the last
    hidden states) that the network's own padded forward gives. Otherwise its attention is left as
    it was.
    """
    register()
    base = base_of(network)
    reason = _structural_obstacle(base, output)
    if reason is not None:
        return reason
    own = base.config._attn_implementation
    with torch.no_grad():
        sequences = _random_sequences(base)
        try:
            # the reference is the architecture's own code: other kernels may drop a soft cap
            base.set_attn_implementation("eager")
            expected = _plain(base, sequences, output)
            base.set_attn_implementation(IMPLEMENTATION)
            make_lean(base)
            witness = _Witness(sequences)
            actual = _shared(base, witness, output)
        except (UnsupportedAttention, TypeError, ValueError, RuntimeError, KeyError) as problem:
            # an architecture can refuse a packed row in any of these ways: it takes the plain path
            base.set_attn_implementation(own)
            return (str(problem).splitlines() or [type(problem).__name__])[0]
    reason = witness.wrong_windows(base.config.get_text_config(decoder=True))
    if reason is None:
        distance = float((actual - expected).norm() / expected.norm())
        if not distance < _TOLERANCE.get(base.dtype, _ROUGH):
            reason = f"packed tokens change its {output} by {distance:.1e} of their norm"
    if reason is not None:
        base.set_attn_implementation(own)
    return reason


def _structural_obstacle(base: Any, output: Output) -> str | None:
    if not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} does not look its attention up by name"
    if output == "logits" and output_layer(base) is None:
        return "its output layer is not a plain linear map"
    config = base.config.get_text_config(decoder=True)
    foreign = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if foreign:
        return f"it has layers of type {sorted(foreign)[0]!r}"
    return None


def _random_sequences(base: Any) -> tuple[list[Tensor], list[Tensor], list[int]]:
    vocabulary = base.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> Tensor:
        return torch.randint(vocabulary, (size,), generator=generator).to(base.device)

    prompts = [draw(size) for size in _PROMPTS]
    completions = [draw(size) for sizes in _COMPLETIONS for size in sizes]
    owners = [owner for owner, sizes in enumerate(_COMPLETIONS) for _ in sizes]
    return prompts, completions, owners


def _plain(
    base: Any, sequences: tuple[list[Tensor], list[Tensor], list[int]], output: Output
) -> Tensor:
    prompts, completions, owners = sequences
    whole = [torch.cat([prompts[o], c]) for o, c in zip(owners, completions, strict=True)]
    ids, mask = pad_right(whole)
    given = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if output == "logits":
        values = base(**given).logits
    else:
        values = base.get_decoder()(**given).last_hidden_state
    parts = [values[i, len(prompts[o]) : len(whole[i])] for i, o in enumerate(owners)]
    return torch.cat(parts).float()


def _shared(base: Any, witness: "_Witness", output: Output) -> Tensor:
    packed = witness.packed
    hidden = packed_hidden(base, packed.tokens, packed.positions, witness)
    rows = torch.cat([hidden[start:stop] for start, stop in packed.completion_rows])
    if output == "states":
        return rows.float()
    layer = output_layer(base)
    assert layer is not None
    return project_logits(rows, layer.weight, layer.bias, layer.transform).float()


class _Witness:
    """The layout of the probe, which also remembers the window of every layer."""

    def __init__(self, sequences: tuple[list[Tensor], list[Tensor], list[int]]):
        self.packed = SharedPrefixes(*sequences)
        self._windows: list[int | None] = []

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        self._windows.append(form.window)
        return self.packed.attend(layer, query, key, value, form)

    def wrong_windows(self, config: Any) -> str | None:
        """The probe is shorter than most windows, so these are compared to the configuration."""
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            window = None
        types = getattr(config, "layer_types", None)
        if types:
            expected = [window if kind == "sliding_attention" else None for kind in types]
        else:
            expected = [window] * config.num_hidden_layers
        if Counter(expected) == Counter(self._windows):
            return None
        return "its layers do not tell their sliding windows"
