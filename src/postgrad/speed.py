"""How fast the language engine is on this machine, and how close to what the machine can do.

Weights are random, in the shape of a real model: speed does not depend on their values, and nothing
is downloaded.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from postgrad.api import prepare
from postgrad.errors import unknown
from postgrad.methods.language.rollouts import rollout_batch
from postgrad.models.embedded import tiny_tokenizer
from postgrad.models.language import LanguagePolicy
from postgrad.products import product
from postgrad.sampling.generation import Rollouts, SamplingSettings, generate
from postgrad.training.loop import pick_device
from postgrad.training.optimise import Optimisers, autocast, native_precision


@dataclass(frozen=True)
class Shape:
    """A Llama's size."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 1000),
    "135m": Shape(576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M's
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151936),  # Qwen2.5-1.5B's
}


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        matrix_rate: operations a second of square products, the machine's measure.
        copy_rate: bytes a second read and written by copying, the memory's measure.
        update_seconds: median of one GRPO update.
        update_tokens_per_second: tokens of the network's row (prompts once a group) a second.
        utilisation: operations that these tokens need (6 a token and parameter), over the matrix
            rate and the time.
        decoded_tokens_per_second: of sampling.
        bandwidth: bytes of weights and of keys and values that a decoding step has to read, over
            the copy rate and the time.
        peak_bytes: most memory allocated on the GPU; None on a CPU.
    """

    device: str
    precision: str
    shape: str
    prompts: int
    completions: int
    prompt_tokens: int
    new_tokens: int
    matrix_rate: float
    copy_rate: float
    update_seconds: float
    update_tokens_per_second: float
    utilisation: float
    decoded_tokens_per_second: float
    bandwidth: float
    peak_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    *,
    device: str = "auto",
    shape: str | None = None,
    prompts: int = 8,
    completions: int = 8,
    prompt_tokens: int = 128,
    new_tokens: int | None = None,
    repeats: int = 5,
) -> Speed:
    """Time GRPO's update and sampling with random weights and tokens.

    Args:
        device: auto, cpu, cuda …
        shape: one of `SHAPES`; 1.5b on a GPU and 135m on a CPU when empty.
        new_tokens: of each completion; 1024 on a GPU and 64 on a CPU when empty.
        repeats: counted turns of each kind, after two that are not counted.
    """
    place = pick_device(device)
    shape = shape or ("135m" if place.type == "cpu" else "1.5b")
    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    new_tokens = new_tokens or (64 if place.type == "cpu" else 1024)
    clock = _Clock(place, repeats)
    precision = native_precision(place)
    policy = _random_policy(SHAPES[shape], prompt_tokens + new_tokens).to(place)
    method, loop = prepare(
        "grpo",
        model=policy,
        data=[{"prompt": "a"}],
        reward=lambda completions: [0.0] * len(completions),
        device=str(place),
        precision=precision,
        rollout={"samples": completions, "max_new_tokens": new_tokens},
        token_budget=2048 if place.type == "cpu" else 16384,
    )
    random = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        return torch.randint(SHAPES[shape].vocabulary, (length,), generator=random).to(place)

    asked = [draw(prompt_tokens) for _ in range(prompts)]

    def sample() -> None:
        with autocast(precision, place):
            generate(
                policy,
                asked,
                SamplingSettings(max_new_tokens=new_tokens),
                samples=completions,
                seeds=range(prompts * completions),
            )

    decoding = clock(sample)
    rows = prompts * completions
    rollouts = Rollouts(
        prompts=[prompt for prompt in asked for _ in range(completions)],
        responses=[draw(new_tokens) for _ in range(rows)],
        logprobs=[torch.zeros(new_tokens)] * rows,
        finished=torch.ones(rows, dtype=torch.bool),
        texts=[""] * rows,
    )
    group = torch.arange(rows) // completions
    optimise = Optimisers(method.modules(), loop, place)

    def update() -> None:
        reward = torch.randn(rows, generator=random)
        batch = rollout_batch(rollouts, 0, group=group, reward=reward, terms={})
        method.update(method.learnable(batch), optimise)  # type: ignore[attr-defined]

    updating = clock(update)
    parameters = sum(p.numel() for p in policy.parameters())
    embedding = SHAPES[shape].vocabulary * SHAPES[shape].width
    sampled = rows * new_tokens
    tokens = sampled + prompts * prompt_tokens
    needed = 6.0 * (parameters - embedding) * tokens + 6.0 * embedding * sampled
    matrix_rate = _matrix_rate(clock, place, precision)
    copy_rate = _copy_rate(clock, place)
    read = _bytes_of_decoding(SHAPES[shape], parameters, precision, prompts, completions,
                              prompt_tokens, new_tokens)  # fmt: skip
    return Speed(
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
        precision=precision,
        shape=shape,
        prompts=prompts,
        completions=completions,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        matrix_rate=matrix_rate,
        copy_rate=copy_rate,
        update_seconds=updating,
        update_tokens_per_second=tokens / updating,
        utilisation=needed / matrix_rate / updating,
        decoded_tokens_per_second=sampled / decoding,
        bandwidth=read / copy_rate / decoding,
        peak_bytes=torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None,
    )


def report(speed: Speed) -> str:
    """A few lines for a terminal."""
    lines = [
        f"{speed.device}, {speed.precision}: products {speed.matrix_rate / 1e12:.3g} Tflop/s, "
        f"copying {speed.copy_rate / 1e9:.3g} GB/s",
        f"a model of shape {speed.shape} with random weights, {speed.prompts} prompts of "
        f"{speed.prompt_tokens} tokens x {speed.completions} completions of {speed.new_tokens}",
        f"update:   {speed.update_seconds:.3g} s, {speed.update_tokens_per_second:,.0f} tokens/s, "
        f"{speed.utilisation:.0%} of the machine's products",
        f"sampling: {speed.decoded_tokens_per_second:,.0f} tokens/s, "
        f"{speed.bandwidth:.0%} of the memory's bandwidth",
    ]
    if speed.peak_bytes is not None:
        lines.append(f"peak:     {speed.peak_bytes / 2**30:.1f} GiB")
    return "\n".join(lines)


class _Clock:
    """Median seconds of some work, after two turns that are not counted."""

    def __init__(self, place: torch.device, repeats: int):
        self._place, self._repeats = place, repeats

    def __call__(self, work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(2 + self._repeats):
            self._settle()
            started = time.perf_counter()
            work()
            self._settle()
            seconds.append(time.perf_counter() - started)
        return median(seconds[2:])

    def _settle(self) -> None:
        if self._place.type == "cuda":
            torch.cuda.synchronize(self._place)


def _random_policy(shape: Shape, context: int) -> LanguagePolicy:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=max(1024, context),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    policy = LanguagePolicy(LlamaForCausalLM(config), tiny_tokenizer())
    policy.end_tokens = frozenset()  # no completion ends early
    return policy


def _matrix_rate(clock: _Clock, place: torch.device, precision: str) -> float:
    side = 8192 if place.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.randn(2, side, side).to(place, dtype)
    count = 10

    def multiply() -> None:
        for _ in range(count):
            product(left, right)

    return 2.0 * side**3 * count / clock(multiply)


def _copy_rate(clock: _Clock, place: torch.device) -> float:
    source = torch.ones(2**30 if place.type == "cuda" else 2**28, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / clock(lambda: target.copy_(source))


def _bytes_of_decoding(
    shape: Shape,
    parameters: int,
    precision: str,
    prompts: int,
    completions: int,
    prompt_tokens: int,
    new_tokens: int,
) -> float:
    """What sampling has to read: in each step the weights once, the keys and values of each prompt
    once, and those of each completion so far; keys and values are kept in float32."""
    cache = 2 * 4 * shape.layers * shape.key_heads * (shape.width // shape.heads)  # a token
    weights = parameters * (2 if precision == "bf16" else 4) * new_tokens
    of_prompts = prompts * prompt_tokens * cache * new_tokens
    of_completions = prompts * completions * cache * new_tokens * (new_tokens + 1) / 2
    return float(weights + of_prompts + of_completions)
