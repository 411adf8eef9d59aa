"""One optimiser step of DPO on 4 pairs, against TRL.

Prompts of 256 tokens and responses of 64 (the end token included), of random words. Every step has
pairs of its own, so both score the reference on them within the step. TRL runs without gradient
checkpointing, its faster way; the memory of both counts above two models, one with its gradients
and its optimiser's state.
"""

from benchmarks.harness import PEERS, Contender, race
from benchmarks.language import (
    ADAM,
    FP32_AND_BF16,
    import_model_code,
    parameters,
    random_texts,
    step_by_turn,
    train_turn_by_turn,
    trl_settings,
)
from benchmarks.rows import Row, Setting, compared
from benchmarks.turns import Turns

PAIRS = 4
PROMPT_LENGTH = 256
RESPONSE_LENGTH = 64
REACH = 2.5
MEMORY_REACH = 3.0
REFERENCE = 4  # bytes a parameter


def pairs(model: str, count: int) -> list[dict[str, str]]:
    prompts = random_texts(model, [PROMPT_LENGTH] * count, seed=1)
    responses = random_texts(model, [RESPONSE_LENGTH - 1] * 2 * count, seed=2)
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in zip(
            prompts, responses[:count], responses[count:], strict=True
        )
    ]


def ours(turns: Turns, *, model: str, precision: str) -> None:
    from postgrad.api import prepare

    import_model_code()
    turns.imported((ADAM + REFERENCE) * parameters(model))
    method, loop = prepare(
        "dpo",
        model=model,
        data=pairs(model, PAIRS * turns.count),
        batch_size=PAIRS,
        max_response_tokens=RESPONSE_LENGTH,
        precision=precision,
        device="cpu",
    )
    train_turn_by_turn(turns, method, loop, lambda batch: int(batch.cost.sum()))


def trl(turns: Turns, *, model: str, precision: str) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    import_model_code()
    turns.imported((ADAM + REFERENCE) * parameters(model))
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            **trl_settings(turns, precision, checkpointing=False),
            per_device_train_batch_size=PAIRS,
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(pairs(model, PAIRS * turns.count)),
        callbacks=[step_by_turn(turns)],
    )
    trainer.train()


def measure(setting: Setting) -> list[Row]:
    rows = []
    for precision in FP32_AND_BF16:
        task = {"model": setting.model, "precision": precision}
        outcomes = race(
            [Contender("ours", ours, arguments=task), Contender("TRL", trl, PEERS, task)],
            setting.repeats,
        )
        name = f"DPO step, {precision}"
        rows.append(compared(name, "TRL", outcomes, reach=REACH, memory_reach=MEMORY_REACH))
    return rows
