"""Workers on a Ray cluster that draw with vLLM, by the weights that are sent to them."""

import pytest

from language_runs import SMALL
from postgrad.api import train
from postgrad.training.record import read_rows
from with_vllm.models import write_small_model

pytest.importorskip("ray")


@pytest.mark.parametrize("stale", [0, 1])
def test_workers_draw_with_vllm_by_the_weights_of_their_step(tmp_path, stale):
    train(
        "grpo",
        **{**SMALL, "model": write_small_model(tmp_path / "model"), "learning_rate": 1e-2},
        data=[{"prompt": f"{i}+{i}="} for i in range(8)],
        reward=lambda completions: [len(set(text)) / 10 for text in completions],
        steps=4,
        batch_size=4,
        rollout={
            "engine": "vllm",
            "cache_gib": 0.1,
            "workers": 2,
            "chunk": 8,
            "stale": stale,
            "samples": 4,
            "max_new_tokens": 8,
        },
        output=tmp_path / "run",
    )
    steps = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    assert len(steps) == 4
    assert steps[-1]["rollout/workers"] == 2
    assert sum(row["rollout/restarts"] for row in steps) == 0
    # kernels differ by a thousandth; weights of another step by far more
    close = [row["engine/logprob_difference"] < 2e-3 for row in steps]
    assert close == [step < 1 or stale == 0 for step in range(4)]
    assert all(row["engine/effective_samples"] > (0.99 if stale == 0 else 0.1) for row in steps)
