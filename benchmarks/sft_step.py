"""One optimiser step of supervised fine-tuning on 16 texts of ragged lengths, against TRL.

Lengths are drawn log-uniformly from 16 to 512 tokens, of random words; all tokens but the first of
a text are learnt, on both sides, and every step sees all 16 texts, so that the work is equal. TRL
runs without gradient checkpointing, its faster way, and twice: with `packing=True`, texts put
together to rows of 1024 tokens, and with its default, padded batches of 8. In both it accumulates
gradients to one step.

On a CPU there is no flash attention. With torch's own attention (`sdpa`) transformers derives from
the positions which tokens belong to one text, so packed texts do not see each other.
"""

import random

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

TEXTS = 16
SHORTEST, LONGEST = 16, 512
PACKED = 1024  # tokens of a packed row
PADDED = 8  # texts of a padded batch
REACH = 1.3


def texts(model: str) -> list[dict[str, str]]:
    draw = random.Random(1)
    lengths = [round(SHORTEST * (LONGEST / SHORTEST) ** draw.random()) for _ in range(TEXTS)]
    # the end token makes the length full
    return [{"text": text} for text in random_texts(model, [n - 1 for n in lengths], seed=2)]


def ours(turns: Turns, *, model: str, precision: str) -> None:
    from postgrad.api import prepare

    import_model_code()
    turns.imported(ADAM * parameters(model))
    method, loop = prepare(
        "sft",
        model=model,
        data=texts(model),
        batch_size=TEXTS,
        max_response_tokens=LONGEST,
        precision=precision,
        device="cpu",
    )
    train_turn_by_turn(turns, method, loop, lambda batch: int(batch.cost.sum()))


def trl(turns: Turns, *, model: str, precision: str, packing: bool) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    import_model_code()
    turns.imported(ADAM * parameters(model))
    settings = trl_settings(turns, precision, checkpointing=False)
    # a step ends with the epoch, which is never longer than so many batches
    settings["gradient_accumulation_steps"] = TEXTS
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **settings,
            packing=packing,
            max_length=PACKED,
            per_device_train_batch_size=1 if packing else PADDED,
            model_init_kwargs={"attn_implementation": "sdpa"},
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(texts(model)),
    )
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    trainer.add_callback(step_by_turn(turns, lambda: {"tokens": tokens}))
    trainer.train()


def measure(setting: Setting) -> list[Row]:
    rows = []
    for precision in FP32_AND_BF16:
        task = {"model": setting.model, "precision": precision}
        outcomes = race(
            [
                Contender("ours", ours, arguments=task),
                Contender("TRL, packing", trl, PEERS, task | {"packing": True}),
                Contender("TRL, padding", trl, PEERS, task | {"packing": False}),
            ],
            setting.repeats,
        )
        name = f"SFT step, {precision}"
        rows += [
            compared(name, peer, outcomes, rate="tokens", reach=REACH)
            for peer in ("TRL, packing", "TRL, padding")
        ]
    return rows
