"""What the benchmarks of language models share: the model, texts of known length, TRL's loop."""

import json
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.turns import Turns

ADAM = 16  # bytes a parameter: weight, gradient and two moments in float32
PROMPTS = 4
COMPLETIONS = 8  # a prompt
LONGEST = 64  # tokens of a completion

FP32_AND_BF16 = ("fp32", "bf16")


def parameters(model: str) -> int:
    """How many numbers a saved model has, each tensor counted once."""
    with (Path(model) / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    total = 0
    for tensor in header.values():
        size = 1
        for length in tensor["shape"]:
            size *= length
        total += size
    return total


def config(model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return found


def vocabulary_of(model: str) -> int:
    return int(config(model)["vocab_size"])


def random_tokens(vocabulary: int, lengths: list[int], seed: int) -> list[list[int]]:
    """Rows of random tokens, the same in every environment; the first few, special ones, not."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def random_texts(model: str, lengths: list[int], seed: int) -> list[str]:
    """Texts of random common words, with exactly as many tokens as asked for.

    Words are taken that are one token together with the space before them; in a model of
    characters, letters.
    """
    vocabulary = json.loads((Path(model) / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = sorted(vocabulary["model"]["vocab"])
    words = [" " + token[1:] for token in tokens if re.fullmatch("Ġ[a-z]{3,}", token)]
    words = words or [token for token in tokens if re.fullmatch("[a-z]", token)]
    draw = random.Random(seed)
    return ["".join(draw.choice(words) for _ in range(length)) for length in lengths]


def save_small_model(folder: str | Path) -> None:
    """Write a small random model with its tokenizer, for trials."""
    from postgrad.models.embedded import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"
    small_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def small_model(vocabulary: int) -> Any:
    """A Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def import_model_code() -> None:
    """Import what transformers imports only when it loads a model: it is no part of a peak."""
    import transformers.models.llama.modeling_llama  # noqa: F401


def train_turn_by_turn(turns: Turns, method: Any, loop: Any, tokens: Callable[[Any], int]) -> None:
    """Let a prepared method take one whole step a turn, as the library's loop does.

    `tokens` counts those of a batch.
    """
    from postgrad.training.optimise import Optimisers, autocast

    optimise = Optimisers(method.modules(), loop, method.place.device)
    step = 0
    while turns.begin():
        optimise.set_step(step)
        with autocast(loop.precision, method.place.device):
            batch = method.collect(step)
        method.update(batch, optimise)
        turns.end(tokens=tokens(batch))
        step += 1


def chosen_precision(precision: str | None) -> dict[str, str]:
    """Our setting for a precision; None leaves the method's own default."""
    return {} if precision is None else {"precision": precision}


def trl_settings(turns: Turns, precision: str | None, checkpointing: bool | None) -> dict[str, Any]:
    """TRL's settings for a race: as many steps as turns, nothing written; None: its default."""
    chosen: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "max_steps": turns.count,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 10_000,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    if precision is not None:
        chosen["bf16"] = precision == "bf16"
    if checkpointing is not None:
        chosen["gradient_checkpointing"] = checkpointing
    return chosen


def step_by_turn(turns: Turns, numbers: Callable[[], dict[str, float]] = dict) -> Any:
    """A callback by which each optimiser step of a transformers trainer is one turn.

    `numbers` says at its end what else is to be remembered of it.
    """
    from transformers import TrainerCallback

    class StepByTurn(TrainerCallback):
        def on_step_begin(self, *given: Any, **named: Any) -> None:
            turns.begin()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            turns.end(**numbers())

    return StepByTurn()
