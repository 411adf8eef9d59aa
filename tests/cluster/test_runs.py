"""Runs whose responses are drawn by workers: the same numbers, on-policy and drawn ahead."""

import shutil

import faults
import pytest
import torch

from language_runs import SMALL, final_weights, write_rows
from language_runs import untimed as with_restarts
from postgrad.api import resume, train
from postgrad.errors import PostgradError
from postgrad.methods.language import engines
from postgrad.training.record import read_rows
from several import together

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
ROLLOUT = {"samples": 4, "max_new_tokens": 8}
WORKERS = {"workers": 2, "chunk": 4}


# a reward that places orders for the workers in the step that is asked for
REWARD = """
from pathlib import Path

HERE = Path(__file__).parent
SEEN = []


def letters(completions):
    SEEN.append(completions)
    plan = HERE / "plan"
    if plan.exists() and len(SEEN) == 4:
        for name in plan.read_text().split():
            (HERE / "orders" / name).touch()
        plan.unlink()
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]
"""


def untimed(run):
    """What neither lost workers nor a stop may change."""
    lost = ("rollout/restarts", "rollout/workers", "rollout/pushes")
    return [{k: v for k, v in row.items() if k not in lost} for row in with_restarts(run)]


def same_weights(one, other):
    first, second = final_weights(one), final_weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def settings(cluster, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "reward.py").write_text(REWARD)
    reward = f"{tmp_path / 'reward.py'}:letters"
    return {**SMALL, "data": data, "reward": reward, "batch_size": 4, "steps": 4}


@pytest.fixture
def orders(tmp_path, monkeypatch):
    """The workers' engine follows orders, given in this folder."""
    folder = tmp_path / "orders"
    folder.mkdir()
    monkeypatch.setattr(engines, "made_engine", faults.obedient(folder))
    return folder


def ahead(steps, **more):
    return {**ROLLOUT, **WORKERS, "stale": steps, **more}


def test_on_policy_a_run_is_that_of_one_process(settings, tmp_path):
    train("grpo", output=tmp_path / "here", rollout=ROLLOUT, **settings)
    train("grpo", output=tmp_path / "there", rollout={**ROLLOUT, **WORKERS}, **settings)
    assert same_weights(tmp_path / "here", tmp_path / "there")
    last = read_rows(tmp_path / "there" / "metrics.jsonl")[-1]
    assert last["rollout/pushes"] == 1
    assert last["rollout/restarts"] == 0
    assert last["throughput/worker_tokens_per_second"] > 0


def test_windows_of_long_responses_are_carried_over(settings, tmp_path):
    """Truncated PPO waits for a window of tokens; what is unfinished goes on in the next step."""
    long = {"max_new_tokens": 12, "samples": 2}
    more = {"window": 5, "critic_warm_up": 1, "minibatches": 1, **settings}
    train("t-ppo", output=tmp_path / "here", rollout=long, **more)
    run = train("t-ppo", output=tmp_path / "there", rollout={**long, **WORKERS}, **more)
    assert same_weights(tmp_path / "here", tmp_path / "there")
    steps = [row for row in untimed(tmp_path / "there") if "response/carried" in row]
    assert steps
    assert run.method.slots.state_dict()["begun"]


def test_prompts_that_take_long_are_carried_over(settings, tmp_path):
    more = {"carry": 1, "window": 2, **settings}
    train("grpo", output=tmp_path / "here", rollout=ROLLOUT, **more)
    train("grpo", output=tmp_path / "there", rollout={**ROLLOUT, **WORKERS}, **more)
    assert same_weights(tmp_path / "here", tmp_path / "there")
    assert "rollout/carried" in read_rows(tmp_path / "there" / "metrics.jsonl")[-1]


def test_drawn_ahead_a_run_is_that_of_a_lagging_sampler(settings, tmp_path):
    settings |= {"steps": 5, "learning_rate": 1e-2}
    lagging = {"sync_delay": 2, "rollout": ROLLOUT}
    train("grpo", output=tmp_path / "simulated", **lagging, **settings)
    train("grpo", output=tmp_path / "ahead", rollout=ahead(2), **settings)
    simulated, found = untimed(tmp_path / "simulated"), untimed(tmp_path / "ahead")
    steps = [row for row in found if "rollout/staleness" in row]
    assert [row["rollout/staleness"] for row in steps] == [0, 1, 2, 2, 2]
    assert all(row["ratio/mean"] != pytest.approx(1, abs=1e-4) for row in steps[1:])
    for one, other in zip(simulated, found, strict=True):
        assert one.keys() <= other.keys()
        assert {key: other[key] for key in one} == pytest.approx(one, rel=1e-3, abs=1e-5)


def trained(output, settings):
    train("grpo", output=output, **settings)


@pytest.mark.parametrize("shard", [False, True])
def test_several_training_processes_have_workers_together(settings, cluster, tmp_path, shard):
    there = {"address": cluster.address}
    train("grpo", output=tmp_path / "one", rollout=ahead(1), **settings)
    more = settings | {"rollout": ahead(1, **there), "shard": shard}
    assert not together(2, tmp_path / "processes", trained, tmp_path / "several", more)
    for one, other in zip(untimed(tmp_path / "one"), untimed(tmp_path / "several"), strict=True):
        names = [name for name in one if name in ("loss", "gradient_norm", "reward")]
        assert [other[n] for n in names] == pytest.approx([one[n] for n in names], 1e-4, 1e-5)
    runs = [with_restarts(tmp_path / name) for name in ("one", "several")]
    one, other = (sum(row.get("rollout/pushes", 0) for row in rows) for rows in runs)
    assert one == other > 0


def test_drawn_ahead_repeats_resumes_and_outlives_its_workers(settings, orders, tmp_path):
    settings |= {"save_every": 2, "keep_checkpoints": 9, "steps": 6, "rollout": ahead(1)}
    once, again = tmp_path / "once", tmp_path / "again"
    train("grpo", output=once, **settings)
    (tmp_path / "plan").write_text("kill.0 kill.1")
    train("grpo", output=again, **settings)
    assert sum(row.get("rollout/restarts", 0) for row in with_restarts(again)) == 2
    assert untimed(again) == untimed(once)
    assert same_weights(once, again)
    # as if it had been killed after the checkpoint of step 4, when more was under way
    shutil.rmtree(once / "checkpoints" / "step-00000006")
    resume(once)
    assert untimed(once) == untimed(again)
    assert same_weights(once, again)


def test_workers_lost_for_good_stop_the_run_which_resumes(settings, orders, tmp_path):
    settings |= {"steps": 6, "rollout": ahead(1)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train("grpo", output=whole, **settings)
    (tmp_path / "plan").write_text(f"kill.0 kill.1 {faults.REFUSE}")
    with pytest.raises(PostgradError) as caught:
        train("grpo", output=parts, **settings)
    line = str(caught.value)
    assert "\n" not in line
    assert "the model's memory is taken" in line
    assert f"continue with --resume {parts}" in line
    for found in orders.iterdir():
        found.unlink()
    resume(parts)
    assert untimed(parts) == untimed(whole)
    assert same_weights(parts, whole)
