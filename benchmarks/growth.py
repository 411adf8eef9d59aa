"""How time and memory of an update grow: with groups, with completions, with the vocabulary.

The update of GRPO in float32 on random tokens as in `grpo_update`, prompts of 46. Time: 1 to 8
prompts with 8 completions each, seconds for every sampled token. Memory, above imports, weights,
gradients and the optimiser's state: 4 prompts with 8 to 64 completions each, and a small random
model with vocabularies of 8, 32 and 128 thousand. The rows with a limit hold the largest over the
smallest.
"""

from benchmarks.grpo_update import given_samples, ours, update_turn_by_turn
from benchmarks.harness import Contender, Outcome, race
from benchmarks.language import (
    ADAM,
    COMPLETIONS,
    LONGEST,
    PROMPTS,
    import_model_code,
    random_tokens,
    small_model,
)
from benchmarks.rows import Row, Setting
from benchmarks.turns import Turns

PROMPT_LENGTH = 46
GROUPS = (1, 2, 4, 8)
GROUP_SIZES = (8, 16, 32, 64)
VOCABULARIES = (2**13, 2**15, 2**17)
TIME_LIMIT = 1.25
MEMORY_LIMIT = 1.3


def small(turns: Turns, *, model: str, vocabulary: int) -> None:
    """The update of a small random model, on the tokens that a smaller vocabulary has as well."""
    from postgrad.api import prepare
    from postgrad.models.embedded import tiny_tokenizer
    from postgrad.models.language import LanguagePolicy

    import_model_code()
    network = small_model(vocabulary)
    size = sum(parameter.numel() for parameter in network.parameters())
    turns.imported((ADAM - 4) * size)  # the weights are there already
    method, loop = prepare(
        "grpo",
        model=LanguagePolicy(network, tiny_tokenizer()),
        data=[{"prompt": "A question"}] * PROMPTS,
        reward=lambda completions: [0.0] * len(completions),
        batch_size=PROMPTS,
        rollout={"samples": COMPLETIONS, "max_new_tokens": LONGEST},
        device="cpu",
    )
    update_turn_by_turn(turns, method, loop, *given_samples(model, PROMPT_LENGTH))


def measure(setting: Setting) -> list[Row]:
    task = {"model": setting.model, "prompt_length": PROMPT_LENGTH, "precision": "fp32"}
    by_groups = race(
        [
            Contender(f"{count} groups of {COMPLETIONS}", ours, arguments=task | {"prompts": count})
            for count in GROUPS
        ],
        setting.repeats,
    )
    by_size = race(
        [
            Contender(f"groups of {size}", ours, arguments=task | {"completions": size})
            for size in GROUP_SIZES
        ],
        setting.repeats,
    )
    by_vocabulary = race(
        [
            Contender(
                f"vocabulary of {size:,}",
                small,
                arguments={"model": setting.model, "vocabulary": size},
            )
            for size in VOCABULARIES
        ],
        setting.repeats,
    )
    return [
        *_times(by_groups),
        *_memories(by_size, "completions"),
        *_memories(by_vocabulary, "vocabulary"),
    ]
