"""Sampling groups of completions, against `generate` of transformers.

4 prompts of 46 random tokens, new ones in every turn, with 8 completions each of exactly 64 tokens,
at temperature 1 from the whole vocabulary. In bf16 transformers gets the model loaded in bf16, its
faster way; ours keeps float32 weights, as in training, and samples under autocast.
"""

from benchmarks.harness import PEERS, Contender, race
from benchmarks.language import (
    COMPLETIONS,
    FP32_AND_BF16,
    LONGEST,
    PROMPTS,
    import_model_code,
    parameters,
    random_tokens,
    vocabulary_of,
)
from benchmarks.rows import Row, Setting, compared
from benchmarks.turns import Turns

PROMPT_LENGTH = 46
REACH = 3.0


def prompts_of(model: str, turn: int) -> list[list[int]]:
    return random_tokens(vocabulary_of(model), [PROMPT_LENGTH] * PROMPTS, seed=turn)


def ours(turns: Turns, *, model: str, precision: str) -> None:
    import torch

    from postgrad.api import prepare
    from postgrad.sampling.generation import SamplingSettings, generate
    from postgrad.training.optimise import autocast

    import_model_code()
    turns.imported(4 * parameters(model))
    method, loop = prepare(
        "grpo",
        model=model,
        data=[{"prompt": "A question"}],
        reward=lambda completions: [0.0] * len(completions),
        precision=precision,
        device="cpu",
    )
    method.policy.end_tokens = frozenset()  # no response ends early
    turn = 0
    while turns.begin():
        with autocast(loop.precision, method.place.device):
            rollouts = generate(
                method.policy,
                [torch.tensor(prompt) for prompt in prompts_of(model, turn)],
                SamplingSettings(max_new_tokens=LONGEST),
                samples=COMPLETIONS,
                seeds=range(PROMPTS * COMPLETIONS),
            )
        turns.end(tokens=sum(map(len, rollouts.responses)))
        turn += 1


def transformers(turns: Turns, *, model: str, precision: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import_model_code()
    turns.imported((2 if precision == "bf16" else 4) * parameters(model))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    turn = 0
    while turns.begin():
        rows = [prompt for prompt in prompts_of(model, turn) for _ in range(COMPLETIONS)]
        ids = torch.tensor(rows)
        found = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=LONGEST,
            max_new_tokens=LONGEST,
        )
        turns.end(tokens=found[:, PROMPT_LENGTH:].numel())
        turn += 1


def measure(setting: Setting) -> list[Row]:
    rows = []
    for precision in FP32_AND_BF16:
        task = {"model": setting.model, "precision": precision}
        outcomes = race(
            [
                Contender("ours", ours, arguments=task),
                Contender("transformers", transformers, PEERS, task),
            ],
            setting.repeats,
        )
        name = f"generation, {precision}"
        rows.append(compared(name, "transformers", outcomes, rate="tokens", reach=REACH))
    return rows
