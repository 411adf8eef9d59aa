"""How time and memory of an update grow: with groups, with completions, with the vocabulary.

The update of GRPO in float32 on random tokens as in `grpo_update`, prompts of 46. Time: 1 to 8
prompts with 8 completions each, seconds for every sampled token. Memory, above imports, weights,
gradients and the optimiser's state: 4 prompts with 8 to 64 completions each; then for vocabularies
of 8, 32 and 128 thousand, of the projection to log-probabilities alone, forward and backward, and
of the whole update of a small random model, where the gradient of the embedding and the optimiser's
temporaries count as well. The rows with a limit hold the largest over the smallest.
"""

from collections.abc import Callable

from benchmarks.grpo_update import given_samples, ours, update_turn_by_turn
from benchmarks.harness import Contender, Outcome, race
from benchmarks.language import (
    ADAM,
    COMPLETIONS,
    LONGEST,
    PROMPTS,
    import_model_code,
    small_model,
)
from benchmarks.rows import Row, Setting
from benchmarks.turns import Turns

PROMPT_LENGTH = 46
GROUPS = (1, 2, 4, 8)
GROUP_SIZES = (8, 16, 32, 64)
VOCABULARIES = (2**13, 2**15, 2**17)
TOKENS = 2048  # that the projection is measured with
WIDTH = 576  # of their hidden states, as in SmolLM2
TIME_LIMIT = 1.25
MEMORY_LIMIT = 1.3


def small(turns: Turns, *, vocabulary: int) -> None:
    """The update of a small random model, on the same tokens whatever its vocabulary."""
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
    update_turn_by_turn(turns, method, loop, *given_samples(VOCABULARIES[0], PROMPT_LENGTH))


def projection(turns: Turns, *, vocabulary: int) -> None:
    """Log-probabilities of tokens from hidden states, and the gradients of states and matrix."""
    import torch

    from postgrad.objectives.projection import project_logprobs

    draws = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draws, requires_grad=True)
    weight = torch.randn(vocabulary, WIDTH, generator=draws).requires_grad_()
    targets = torch.randint(vocabulary, (TOKENS,), generator=draws)
    turns.imported(4 * (hidden.numel() + weight.numel()))  # the gradients; the rest is there
    while turns.begin():
        hidden.grad = weight.grad = None
        logprobs, _ = project_logprobs(hidden, weight, targets)
        logprobs.sum().backward()
        turns.end(tokens=TOKENS)


def measure(setting: Setting) -> list[Row]:
    task = {"model": setting.model, "prompt_length": PROMPT_LENGTH, "precision": "fp32"}
    by_groups = race(
        [
            Contender(f"{count} × {COMPLETIONS}", ours, arguments=task | {"prompts": count})
            for count in GROUPS
        ],
        setting.repeats,
    )
    by_size = _one_by_one(
        [
            Contender(f"{PROMPTS} × {size}", ours, arguments=task | {"completions": size})
            for size in GROUP_SIZES
        ],
        setting.repeats,
    )
    alone = _one_by_one(
        [
            Contender(f"vocabulary of {size:,}", projection, arguments={"vocabulary": size})
            for size in VOCABULARIES
        ],
        setting.repeats,
    )
    whole = _one_by_one(
        [
            Contender(f"vocabulary of {size:,}", small, arguments={"vocabulary": size})
            for size in VOCABULARIES
        ],
        setting.repeats,
    )
    return [
        *_rows("update", by_groups, "time a token", lambda o: 1 / o.rate("tokens"), TIME_LIMIT),
        *_rows("update", by_size, "memory", _peak, MEMORY_LIMIT),
        *_rows("projection", alone, "memory", _peak, MEMORY_LIMIT),
        *_rows("update of a small model", whole, "memory", _peak, MEMORY_LIMIT),
    ]


def _one_by_one(contenders: list[Contender], repeats: int) -> dict[str, Outcome]:
    """Outcomes where memory alone is asked for: each then has that of the machine to itself."""
    return {
        name: outcome
        for contender in contenders
        for name, outcome in race([contender], repeats).items()
    }


def _peak(outcome: Outcome) -> float:
    return max(outcome.peak or 0, 2**20)  # a mebibyte is within the noise


def _rows(
    what: str,
    outcomes: dict[str, Outcome],
    quantity: str,
    value: Callable[[Outcome], float],
    limit: float,
) -> list[Row]:
    """A row for every size, and that of the largest over the smallest."""
    rows = []
    for name, outcome in outcomes.items():
        row = Row(f"{what}, {name}", unit="tokens/s", failure=outcome.failure)
        if outcome.failure is None:
            row.ours, row.memory = outcome.rate("tokens"), outcome.peak
            row.turns = {"ours": outcome.seconds}
        rows.append(row)
    smallest, *_, largest = outcomes
    growth = Row(
        f"{what}, {quantity}: {largest} over {smallest}", unit="×", reach=limit, at_most=True
    )
    first, last = outcomes[smallest], outcomes[largest]
    if first.failure is None and last.failure is None:
        growth.ours = value(last) / value(first)
    return [*rows, growth]
