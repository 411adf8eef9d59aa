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
    if stale:  # the ratio is to the probabilities of the engine, whose weights are older
        assert [row["rollout/staleness"] for row in steps] == [0, 1, 1, 1]
        assert steps[0]["ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert all(abs(row["ratio/mean"] - 1) > 1e-3 for row in steps[1:])
        assert not any(name.startswith("engine/") for row in steps for name in row)
    else:  # kernels differ by far less than the weights of another step would
        assert all(row["engine/logprob_difference"] < 1e-4 for row in steps)
        assert all(row["rollout/pushes"] == 1 for row in steps)
