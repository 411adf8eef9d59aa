"""One update of GRPO on given samples (scoring, backward, optimiser step), against TRL.

4 prompts of 46 random tokens, or one of 512, with 8 completions each of 16 to 64 random tokens, the
same for both. TRL's GRPOTrainer is handed them by `rollout_func`. In the rows of one precision TRL
runs without gradient checkpointing, its faster way, and once more, for its memory alone, with it,
its default; in the row of defaults both choose for themselves.

The share of the machine is what the update needs over what the machine could do meanwhile: 6
operations for every token and parameter (a prompt counts once, the embedding's matrix only at
sampled tokens), against square matrix products of the same precision, timed in the same race: those
of `torch.mm`, and in float32 also those of oneDNN, which the library asks where it is faster.
"""

import random
from typing import Any

from benchmarks.harness import PEERS, Contender, Outcome, race
from benchmarks.language import (
    ADAM,
    COMPLETIONS,
    FP32_AND_BF16,
    LONGEST,
    PROMPTS,
    chosen_precision,
    config,
    import_model_code,
    parameters,
    random_tokens,
    step_by_turn,
    trl_settings,
    vocabulary_of,
)
from benchmarks.machine import matrix_rate
from benchmarks.rows import Row, Setting, compared
from benchmarks.turns import Turns

PROMPT_LENGTHS = (46, 512)
REACH = {46: 4.0, 512: 5.0}
REACH_OF_DEFAULTS = 10.0
MEMORY_REACH = 6.0
SHARE_REACH = {"fp32": 0.8, "bf16": 0.6}
GROUPS = {46: PROMPTS, 512: 1}
SHORTEST = 16
CHECKPOINTING = "TRL, checkpointing"


def given_samples(
    vocabulary: int, prompt_length: int, prompts: int | None = None, completions: int = COMPLETIONS
) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts, and the completions of the first, the second …, as token ids."""
    prompts = prompts or GROUPS[prompt_length]
    draw = random.Random(1)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(prompts * completions)]
    return (
        random_tokens(vocabulary, [prompt_length] * prompts, seed=2),
        random_tokens(vocabulary, lengths, seed=3),
    )


def ours(
    turns: Turns,
    *,
    model: str,
    prompt_length: int,
    precision: str | None,
    prompts: int | None = None,
    completions: int = COMPLETIONS,
) -> None:
    from postgrad.api import prepare

    import_model_code()
    turns.imported(ADAM * parameters(model))
    samples = given_samples(vocabulary_of(model), prompt_length, prompts, completions)
    method, loop = prepare(
        "grpo",
        model=model,
        data=[{"prompt": "A question"}] * len(samples[0]),
        reward=lambda completions: [0.0] * len(completions),
        batch_size=len(samples[0]),
        rollout={"samples": completions, "max_new_tokens": LONGEST},
        device="cpu",
        **chosen_precision(precision),
    )
    update_turn_by_turn(turns, method, loop, *samples)


def update_turn_by_turn(
    turns: Turns, method: Any, loop: Any, prompts: list[list[int]], responses: list[list[int]]
) -> None:
    """Let a prepared GRPO learn from the same samples in every turn."""
    import torch

    from postgrad.methods.language.rollouts import rollout_batch
    from postgrad.sampling.generation import Rollouts
    from postgrad.training.optimise import Optimisers

    optimise = Optimisers(method.modules(), loop, method.place.device)
    group = torch.arange(len(responses)) // (len(responses) // len(prompts))
    rollouts = Rollouts(
        prompts=[torch.tensor(prompts[i]) for i in group.tolist()],
        responses=[torch.tensor(response) for response in responses],
        logprobs=[torch.full((len(response),), -1.0) for response in responses],
        finished=torch.ones(len(responses), dtype=torch.bool),
        texts=[""] * len(responses),
    )
    step = 0
    while turns.begin():
        reward = torch.randn(len(responses))
        optimise.set_step(step)
        batch = rollout_batch(rollouts, step, group=group, reward=reward, terms={})
        method.update(method.learnable(batch), optimise)
        step += 1
        turns.end(tokens=sum(map(len, responses)))


def trl(
    turns: Turns,
    *,
    model: str,
    prompt_length: int,
    precision: str | None,
    checkpointing: bool | None,
) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    import_model_code()
    turns.imported(ADAM * parameters(model))
    prompts, responses = given_samples(vocabulary_of(model), prompt_length)

    def given(asked: list[Any], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [prompts[i // COMPLETIONS] for i in range(len(responses))],
            "completion_ids": responses,
            "logprobs": None,
        }

    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(
            **trl_settings(turns, precision, checkpointing),
            per_device_train_batch_size=len(responses),
            num_generations=COMPLETIONS,
            max_completion_length=LONGEST,
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=lambda completions, **columns: [random.random() for _ in completions],
        train_dataset=Dataset.from_list([{"prompt": f"Question {i}"} for i in range(64)]),
        rollout_func=given,
        callbacks=[step_by_turn(turns)],
    )
    trainer.train()


def operations(model: str, prompt_length: int) -> float:
    """Floating-point operations that one update cannot do without."""
    prompts, responses = given_samples(vocabulary_of(model), prompt_length)
    sampled = sum(map(len, responses))
    unique = sampled + sum(map(len, prompts))
    embedding = vocabulary_of(model) * config(model)["hidden_size"]
    return 6.0 * (parameters(model) - embedding) * unique + 6.0 * embedding * sampled


def measure(setting: Setting) -> list[Row]:
    rows = []
    for prompt_length in PROMPT_LENGTHS:
        for precision in FP32_AND_BF16:
            rows += _same_precision(setting, prompt_length, precision)
    return [*rows, _defaults(setting)]


def _same_precision(setting: Setting, prompt_length: int, precision: str) -> list[Row]:
    task = {"model": setting.model, "prompt_length": prompt_length, "precision": precision}
    rate = {"precision": precision}
    onednn = Contender("oneDNN", matrix_rate, arguments=rate | {"onednn": True})
    outcomes = race(
        [
            Contender("ours", ours, arguments=task),
            Contender("TRL", trl, PEERS, task | {"checkpointing": False}),
            Contender("torch.mm", matrix_rate, arguments=rate),
            *([onednn] if precision == "fp32" else []),
        ],
        setting.repeats,
    )
    checkpointing = Contender(CHECKPOINTING, trl, PEERS, task | {"checkpointing": True})
    outcomes |= race([checkpointing], repeats=1)
    name = f"update, prompts of {prompt_length}, {precision}"
    rows = [
        compared(name, "TRL", outcomes, reach=REACH[prompt_length], memory_reach=MEMORY_REACH),
        compared(name, CHECKPOINTING, outcomes, memory_reach=MEMORY_REACH, timed=False),
    ]
    rows += [
        _share(setting, prompt_length, precision, outcomes["ours"], who, outcomes[who])
        for who in ("torch.mm", "oneDNN")
        if who in outcomes
    ]
    return rows


def _share(
    setting: Setting, prompt_length: int, precision: str, we: Outcome, who: str, they: Outcome
) -> Row:
    name = f"share of {who}, prompts of {prompt_length}, {precision}"
    row = Row(name, unit="share", reach=SHARE_REACH[precision])
    failures = [outcome.failure for outcome in (we, they) if outcome.failure]
    if failures:
        row.failure = "\n".join(failures)
        return row
    needed, rate = operations(setting.model, prompt_length), they.rate("operations")
    row.ours = needed / we.time / rate
    row.note = f"{needed / 1e12:.3g} Tflop, of a machine that does {rate / 1e12:.3g} Tflop/s"
    row.turns = {"ours": we.seconds, who: they.seconds}
    return row


def _defaults(setting: Setting) -> Row:
    task = {"model": setting.model, "prompt_length": PROMPT_LENGTHS[0], "precision": None}
    outcomes = race(
        [
            Contender("ours", ours, arguments=task),
            Contender("TRL", trl, PEERS, task | {"checkpointing": None}),
        ],
        setting.repeats,
    )
    return compared(
        f"update, prompts of {PROMPT_LENGTHS[0]}, defaults of both",
        "TRL",
        outcomes,
        reach=REACH_OF_DEFAULTS,
        memory_reach=MEMORY_REACH,
    )
