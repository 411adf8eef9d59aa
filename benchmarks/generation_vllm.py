"""Sampling groups of completions in bf16, against vLLM's CPU build.

The same work as in `generation`. vLLM runs in the process itself with its own defaults, prefix
caching included; the prompts of every turn are new, as in training.
"""

from benchmarks.generation import PROMPT_LENGTH, ours, prompts_of
from benchmarks.harness import VLLM, Contender, race
from benchmarks.language import COMPLETIONS, LONGEST, parameters
from benchmarks.rows import Row, Setting, compared
from benchmarks.turns import Turns

REACH = 2.0


def vllm(turns: Turns, *, model: str) -> None:
    from vllm import LLM, SamplingParams

    turns.imported(2 * parameters(model))
    engine = LLM(model=model, dtype="bfloat16", max_model_len=2 * (PROMPT_LENGTH + LONGEST))
    settings = SamplingParams(
        n=COMPLETIONS, temperature=1.0, ignore_eos=True, max_tokens=LONGEST, detokenize=True
    )
    turn = 0
    while turns.begin():
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of(model, turn)]
        found = engine.generate(prompts, settings, use_tqdm=False)
        turns.end(tokens=sum(len(one.token_ids) for request in found for one in request.outputs))
        turn += 1


def measure(setting: Setting) -> list[Row]:
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    outcomes = race(
        [
            Contender("ours", ours, arguments={"model": setting.model, "precision": "bf16"}),
            Contender("vLLM", vllm, VLLM, {"model": setting.model}, environment),
        ],
        setting.repeats,
    )
    note = "vLLM's memory holds its cache of 1 GiB, taken at the start"
    return [compared("generation, bf16", "vLLM", outcomes, rate="tokens", reach=REACH, note=note)]
