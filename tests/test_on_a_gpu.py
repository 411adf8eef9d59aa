"""Runs with every tensor where it belongs, on a pretended GPU, take the steps of runs on a CPU."""

import json

import pytest
import torch

from language_runs import untimed
from postgrad.api import train
from postgrad.catalogue import method_class
from pretended_gpu import CUDA, pretended
from test_bad_input import FUNCTIONS, ROW, valid

REWARD = """
def vowels(completions):
    return [float(sum(c in "aeiou" for c in text) % 2) for text in completions]
"""
# one of every way to collect a batch and to learn from it
SLUGS = [
    "grpo", "spo-single-stream", "rloo", "ppo-language", "dapo-direct-advantage",
    "dpo", "kto", "lipo", "sft", "reward-modeling", "nash-md", "egpo", "grace", "infonce",
    "simclr", "flow-grpo", "mdpo",
]  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    rows = [{**ROW, "prompt": f"What is 2 + 3 + {i}?"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(FUNCTIONS + REWARD)
    return folder


@pytest.mark.parametrize("slug", SLUGS)
def test_a_run_on_a_gpu_takes_the_steps_of_one_on_a_cpu(slug, here, tmp_path):
    known = method_class(slug).Config.model_fields
    settings = valid(slug, here) | {
        "steps": 2, "precision": "fp32", "warmup_steps": 0, "report": False, "log": [],
    }  # fmt: skip
    if "rollout" in known:
        settings["rollout"] = {**settings.get("rollout", {}), "max_new_tokens": 8}
    if "reward" in settings:
        settings["reward"] = f"{here}/own.py:vowels"
    train(slug, output=tmp_path / "cpu", quiet=True, **{**settings, "device": "cpu"})
    with pretended():
        train(slug, output=tmp_path / "gpu", quiet=True, **{**settings, "device": "cuda"})
    ours, expected = untimed(tmp_path / "gpu"), untimed(tmp_path / "cpu")
    assert [row.keys() for row in ours] == [row.keys() for row in expected]
    for one, other in zip(ours, expected, strict=True):
        for name in {"loss", "gradient_norm", "reward"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretended():
        numbers, places = torch.arange(6.0, device="cuda"), torch.tensor([0, 2])
        assert numbers.device == CUDA
        with pytest.raises(RuntimeError, match="one device"):
            numbers + torch.ones(6)
        with pytest.raises(RuntimeError, match="one device"):
            torch.ones(6)[places.to("cuda")]
        with pytest.raises(RuntimeError, match="one device"):
            numbers[places] = torch.ones(2)
        assert (numbers[places] * torch.tensor(2.0)).tolist() == [0.0, 4.0]
        assert not (numbers + 1).cpu().is_cuda
