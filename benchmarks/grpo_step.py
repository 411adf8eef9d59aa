"""A whole step of GRPO (generation, reward, update), against TRL, each with its own defaults.

4 questions as chats with 8 completions each of at most 64 new tokens, which nearly all answers
fill; the reward counts the letter e. How many tokens there are is up to the draws: those of every
turn are kept with its seconds.
"""

from typing import Any

from benchmarks.harness import PEERS, Contender, race
from benchmarks.language import (
    ADAM,
    COMPLETIONS,
    LONGEST,
    PROMPTS,
    import_model_code,
    parameters,
    step_by_turn,
    train_turn_by_turn,
    trl_settings,
)
from benchmarks.rows import Row, Setting, compared
from benchmarks.turns import Turns

REACH = 6.0


def questions(count: int) -> list[dict[str, Any]]:
    texts = [
        f"A farmer keeps {i + 3} hens and {2 * i + 5} geese. Every hen lays 4 eggs a week and "
        "every goose 2. How many eggs are there after a week? Answer step by step."
        for i in range(count)
    ]
    # as plain text an instruction model would mostly end at once, and learn not to
    return [{"prompt": [{"role": "user", "content": text}]} for text in texts]


def letters(completions: list[Any], **columns: Any) -> list[float]:
    """How often each answer has the letter e. TRL passes answers as messages, postgrad as text."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text.count("e")) for text in texts]


def ours(turns: Turns, *, model: str) -> None:
    from postgrad.api import prepare

    import_model_code()
    turns.imported(ADAM * parameters(model))
    method, loop = prepare(
        "grpo",
        model=model,
        data=questions(PROMPTS * turns.count),
        reward=letters,
        batch_size=PROMPTS,
        rollout={"samples": COMPLETIONS, "max_new_tokens": LONGEST},
        device="cpu",
    )
    train_turn_by_turn(turns, method, loop, lambda batch: batch.tokens)


def trl(turns: Turns, *, model: str) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    import_model_code()
    turns.imported(ADAM * parameters(model))
    tokens: list[int] = []

    def rewarded(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> Any:
        tokens[:] = map(len, completion_ids)
        return letters(completions)

    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(
            **trl_settings(turns, None, None),
            per_device_train_batch_size=PROMPTS * COMPLETIONS,
            num_generations=COMPLETIONS,
            max_completion_length=LONGEST,
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=rewarded,
        train_dataset=Dataset.from_list(questions(PROMPTS * turns.count)),
        callbacks=[step_by_turn(turns, lambda: {"tokens": sum(tokens)})],
    )
    trainer.train()


def measure(setting: Setting) -> list[Row]:
    task = {"model": setting.model}
    outcomes = race(
        [Contender("ours", ours, arguments=task), Contender("TRL", trl, PEERS, task)],
        setting.repeats,
    )
    tokens = ", ".join(
        f"{name} {sum(n['tokens'] for n in outcome.numbers) / len(outcome.numbers):.0f}"
        for name, outcome in outcomes.items()
        if outcome.numbers
    )
    return [
        compared(
            "whole step, defaults of both",
            "TRL",
            outcomes,
            reach=REACH,
            note=f"mean tokens sampled a step: {tokens}",
        )
    ]
