"""Supervised fine-tuning on real runs of the tiny model."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.supervised.sft import SFT, SFTSettings
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i} + {i} = ", "completion": str(2**i)} for i in range(16)]


def made(**config):
    values = {"model": "tiny", "batch_size": 8, "max_response_tokens": 16, **config}
    return SFT(validated(SFTSettings, values), Place(), data=ROWS)


def gradients(method, batch, budget=None):
    method.policy.zero_grad(set_to_none=True)
    settings = LoopSettings(learning_rate=1e-12, clip_norm=0, token_budget=budget)
    metrics = Optimisers(method.modules(), settings, torch.device("cpu"))(method.loss, batch)
    return metrics["loss"], {name: p.grad.clone() for name, p in method.policy.named_parameters()}


def test_the_loss_is_the_cross_entropy_of_response_tokens():
    """Against torch's cross-entropy with the prompt's labels ignored, one item at a time."""
    method = made()
    batch = method.collect(0)
    total, count = 0.0, 0
    with torch.no_grad():
        loss, _ = method.loss(batch)
        for prompt, response in zip(batch.prompts, batch.responses, strict=True):
            ids = torch.cat([prompt, response])
            labels = ids.clone()
            labels[: len(prompt)] = -100
            logits = method.policy.network(input_ids=ids[None]).logits[0]
            total += float(
                torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
            )
            count += len(response)
    assert float(loss) == pytest.approx(total / count, abs=1e-5)
    assert batch.tokens == count


def test_every_response_ends_with_the_end_token_unless_it_is_cut():
    method = made(max_response_tokens=4)
    end = method.policy.tokenizer.eos_token_id
    for row, response in zip(ROWS, method.items.responses, strict=True):
        assert len(response) == min(4, len(row["completion"]) + 1)
        assert (response[-1] == end) == (len(row["completion"]) < 4)


@pytest.mark.parametrize("budget", [1, 50])
def test_micro_batches_add_up_to_the_same_step(budget):
    method = made()
    batch = method.collect(0)
    loss, expected = gradients(method, batch)
    in_parts, got = gradients(method, batch, budget)
    assert len(list(batch.split(budget))) > 1
    assert in_parts == pytest.approx(loss, abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


def test_it_learns_sixteen_answers_by_heart(tmp_path):
    settings = {**SMALL, "learning_rate": 5e-3, "batch_size": 16, "max_response_tokens": 16}
    run = train("sft", data=ROWS, steps=80, output=tmp_path / "run", **settings)
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(math.log(100), abs=1.0)
    assert losses[-1] < 0.3 * losses[0]
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    assert {(row["prompt"], row["response"]) for row in samples} <= {
        (row["prompt"], row["completion"]) for row in ROWS
    }
    assert run.finished.step == 80


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "demonstrations.jsonl", ROWS)
    settings = {
        **SMALL,
        "data": data,
        "batch_size": 6,
        "max_response_tokens": 16,
        "save_every": 2,
        "schedule": "constant",
    }
    assert_resumes("sft", tmp_path, **settings)


def test_held_out_loss_is_per_token(tmp_path):
    data = {"name": write_rows(tmp_path / "rows.jsonl", ROWS)}
    run = train(
        "sft",
        data=data,
        eval_data=data,
        steps=1,
        batch_size=16,
        max_response_tokens=16,
        output=tmp_path / "run",
        **SMALL,
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    # the first step's batch is all rows, before that step: the first evaluation's loss
    assert rows[0]["evaluation/loss"] == pytest.approx(rows[1]["loss"], abs=1e-5)
    assert run.evaluation["loss"] < rows[0]["evaluation/loss"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "row 2: column 'completion' is empty"),
        ({"prompt": "a", "completion": None}, "row 2: column 'completion' is missing or null"),
        ({"prompt": "a" * 1020, "completion": "b"}, "row 2: the prompt has 1020 tokens"),
    ],
)
def test_an_unusable_row_is_named(row, message, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message):
        train("sft", data=[ROWS[0], row], max_response_tokens=16, output=run, **SMALL)
    assert not run.exists()


def test_evaluations_also_judge_what_it_answers(tmp_path):
    settings = {**SMALL, "steps": 2, "evaluate_every": 0, "output": str(tmp_path / "run")}
    data = {"name": "addition", "settings": {"size": 8}}
    asked = {"reward": "addition", "max_new_tokens": 4, "temperature": 0.0}
    run = train("sft", data=data, frontier=asked, eval_size=4, **settings)
    first = read_rows(run.folder / "metrics.jsonl")[0]
    assert first["evaluation/kl"] == 0.0  # of the untrained policy to itself
    assert 0.0 <= first["evaluation/reward"] <= 1.0
    assert first["evaluation/length"] <= 4


def test_whole_texts_have_no_prompts_to_judge_answers_of(tmp_path):
    path = write_rows(tmp_path / "texts.jsonl", [{"text": "a b c"}] * 4)
    with pytest.raises(PostgradError, match=r"frontier\.reward: whole texts have no prompts"):
        train("sft", data=str(path), eval_data=str(path), frontier={"reward": "exact"}, **SMALL)
