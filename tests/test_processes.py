"""Several processes take the steps that one takes: same losses, samples, weights, faults."""

import json
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from language_runs import SMALL, untimed, write_rows
from postgrad import launch, processes
from postgrad.api import resume, train
from postgrad.errors import PostgradError
from postgrad.sampling.first import EngineOfFirst
from postgrad.sampling.generation import SamplingSettings, draw_here, generate, wanted
from several import together

SUMS = {**SMALL, "data": "addition", "batch_size": 4, "steps": 3, "save_every": 1}
ROLLOUT = {"samples": 4, "max_new_tokens": 8}


def lengths(completions):
    """A reward that differs within groups."""
    return [len(text) / 10 for text in completions]


def trained(slug, output, settings):
    train(slug, output=output, **settings)


def resumed(output, settings):
    resume(output, allow_changes=True, **settings)


def rewarded(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("def lengths(completions):\n    return [len(t) / 10 for t in completions]\n")
    return f"{path}:lengths"


def steps(run):
    """The metrics of a run; but means over micro-batches depend on how a batch was cut."""
    exact = ("loss", "gradient_norm", "reward", "advantage", "response", "evaluation", "length")
    return [
        # and of pairs that are as good as each other at the start rounding decides
        {k: v for k, v in row.items() if k.startswith(exact) and k != "rewards/accuracy"}
        for row in untimed(run)
        if "loss" in row
    ]


def assert_close_runs(one, other):
    first, second = steps(one), steps(other)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    one, other = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    for name, weights in one.items():
        torch.testing.assert_close(weights, other[name], rtol=1e-4, atol=1e-4)


LISTS = [
    {"prompt": f"say {i}", "responses": [f"yes {i}", "no", "maybe so"], "scores": [2.0, 0.5, 0.0]}
    for i in range(8)
]
PAIRS = [{"prompt": f"say {i}", "chosen": f"yes {'very ' * i}", "rejected": "no"} for i in range(8)]
ANSWERS = [{"prompt": f"say {i}", "completion": "yes " * (i + 1)} for i in range(8)]
TRIPLES = [
    {"anchor": f"find {a}", "positive": f"def {b}(): {a}", "negative": f"def {c}()"}
    for a, b, c in zip("bcdfghjk", "rmvnsptq", "mrnvpsqt", strict=True)
]


CASES = {
    "grpo": {"rollout": ROLLOUT, "kl_coefficient": 0.1, "entropy_coefficient": 0.01},
    # normalised over the whole batch, in several optimiser steps
    "policy-gradient": {
        "rollout": ROLLOUT,
        "advantage": {"name": "batch"},
        "epochs": 2,
        "minibatches": 2,
        "mask": "ppo",
        "kl_coefficient": 0.1,
    },
    "ppo-language": {"rollout": {"max_new_tokens": 8}, "critic_rate": 1.0},
}


@pytest.mark.parametrize(
    "slug", ["grpo", "policy-gradient", "ppo-language", "sft", "dpo", "lipo", "grace"]
)
def test_sharded_weights_learn_the_same(tmp_path, slug):
    sharded_learns_the_same(tmp_path, slug)


@pytest.mark.parametrize("slug", ["grpo", "dpo"])
def test_sharded_weights_with_an_adapter_learn_the_same(tmp_path, slug):
    sharded_learns_the_same(tmp_path, slug, tune="lora", lora={"rank": 3}, learning_rate=1e-2)


@pytest.mark.parametrize(
    ("slug", "more"),
    [
        ("grpo", {"sync_delay": 1}),
        ("nash-md", {"opponent": "average", "decay": 0.5}),
        ("apo", {"minibatches": 2, "learning_rate": 1e-4}),
        ("mixed-po", {"dpo_steps": 1, "gamma": 1.5, "minibatches": 1}),
    ],
)
def test_earlier_weights_of_sharded_ones_learn_the_same(tmp_path, slug, more):
    """A lagging sampler, a moving average, what a round began with, a renewed reference."""
    sharded_learns_the_same(tmp_path, slug, rollout=ROLLOUT, **more)


def sharded_learns_the_same(tmp_path, slug, **more):
    rows = {"sft": ANSWERS, "dpo": PAIRS, "mixed-po": PAIRS, "lipo": LISTS, "grace": TRIPLES}
    settings = {**SUMS, "schedule": "constant", **CASES.get(slug, {}), **more}
    if slug in rows:
        settings["data"] = write_rows(tmp_path / "rows.jsonl", rows[slug])
    if slug not in rows or slug == "mixed-po":
        settings["reward"] = rewarded(tmp_path)
    if slug == "grace":
        settings |= {"rollout": ROLLOUT, "instruction": "Say:"}
    trained(slug, tmp_path / "alone", settings | {"steps": 4})
    sharded = settings | {"shard": True, "steps": 2}
    assert not together(2, tmp_path / "two", trained, slug, tmp_path / "parts", sharded)
    written = sorted((tmp_path / "parts" / "checkpoints" / "step-00000002").iterdir())
    assert [path.suffix for path in written] == [".json", *[".safetensors"] * 2, ".json"]
    # and on, in three processes and then in one
    assert not together(3, tmp_path / "three", resumed, tmp_path / "parts", {"steps": 3})
    resumed(tmp_path / "parts", {"steps": 4, "shard": False})
    assert_close_runs(tmp_path / "alone", tmp_path / "parts")


def shares(folder):
    from postgrad.models.language import load_policy

    with processes.joined():
        policy = load_policy("tiny")
        before = {name: p.detach().clone() for name, p in policy.network.named_parameters()}
        policy.shard()
        own = sum(p.to_local().numel() for p in policy.network.parameters())
        every = sum(p.numel() for p in policy.network.parameters())
        assert own < 0.52 * every
        with policy.whole(), policy.sampling_network() as network:
            assert not any(hasattr(p, "to_local") for p in network.parameters())
            for name, parameter in network.named_parameters():
                assert torch.equal(parameter, before[name])
        policy.freeze_reference()
        for name, weights in policy.reference_weights.items():
            assert torch.equal(weights, before[name])
        (folder / f"done-{processes.rank()}").touch()


class Here:
    """An engine that draws in this process, when it is its turn."""

    exact = True
    drew = 0

    def draw(self, policy, wanted):
        Here.drew += 1
        if any(len(prompt) > 5 for prompt in wanted.prompts):
            raise PostgradError("the engine cannot be reached")
        return draw_here(policy, wanted)

    def ask(self, policy, wanted):
        drawn = self.draw(policy, wanted)
        return SimpleNamespace(drawn=lambda: drawn, drawn_anyhow=lambda policy: drawn)

    def metrics(self):
        return {"drew": Here.drew}

    def close(self):
        Here.drew = -1


def engaged(folder, shard):
    from postgrad.models.language import load_policy

    settings = SamplingSettings(max_new_tokens=6)
    with processes.joined():
        policy = load_policy("tiny")
        prompts = [policy.render(text) for text in ("a", "b", "c")]
        seeds = list(range(6))
        expected = generate(policy, prompts, settings, samples=2, seeds=seeds)
        if shard:
            policy.shard()
        policy.engine = EngineOfFirst(Here)
        assert policy.engine.exact
        found = generate(policy, prompts, settings, samples=2, seeds=seeds)
        asked = policy.engine.ask(policy, wanted(policy, prompts, settings, samples=2, seeds=seeds))
        for drawn in (found.responses, [d.tokens for d in asked.drawn()],
                      [d.tokens for d in asked.drawn_anyhow(policy)]):  # fmt: skip
            assert all(map(torch.equal, drawn, expected.responses))
        assert policy.engine.metrics() == {"drew": 2}
        assert Here.drew == (2 if processes.first() else 0)
        policy.engine.close()
        assert Here.drew == (-1 if processes.first() else 0)
        (folder / f"done-{processes.rank()}").touch()
        generate(policy, [policy.render("too long a prompt")], settings, seeds=[0])


@pytest.mark.parametrize("shard", [False, True])
def test_the_engine_of_the_first_process_draws_for_all(tmp_path, shard):
    errors = together(2, tmp_path, engaged, tmp_path, shard)
    assert len(list(tmp_path.glob("done-*"))) == 2
    assert errors == dict.fromkeys(("error-0", "error-1"), "the engine cannot be reached")


def test_vllm_within_a_process_is_refused_for_several(tmp_path):
    settings = SUMS | {"rollout": {"engine": "vllm"}}
    errors = together(2, tmp_path / "share", trained, "grpo", tmp_path / "run", settings)
    line = (
        "rollout.engine: vLLM within a process serves that one alone, and there are 2: expected "
        "vllm-server, or rollout.workers above 0"
    )
    assert errors == dict.fromkeys(("error-0", "error-1"), line)


def adapted_reference():
    """A sharded policy with an adapter that matters samples as its reference without it."""
    from postgrad.models.language import LoraSettings, load_policy

    with processes.joined():
        policy = load_policy("tiny", tune="lora", lora=LoraSettings(rank=2))
        prompts, settings = [policy.render("abc")] * 4, SamplingSettings(max_new_tokens=8)
        before = generate(policy, prompts, settings, seeds=range(4))
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5)
        policy.shard()
        after = generate(policy, prompts, settings, seeds=range(4))
        with policy.reference():
            found = generate(policy, prompts, settings, seeds=range(4))
        assert any(not torch.equal(a, b) for a, b in zip(after.responses, before.responses,
                                                         strict=True))  # fmt: skip
        assert all(map(torch.equal, found.responses, before.responses))
        torch.testing.assert_close(found.logprobs, before.logprobs, atol=1e-5, rtol=1e-4)
        raise PostgradError("all is well")


def test_the_reference_of_sharded_weights_has_no_adapter(tmp_path):
    errors = together(2, tmp_path, adapted_reference)
    assert errors == dict.fromkeys(("error-0", "error-1"), "all is well")


def test_a_process_holds_its_share_and_samples_by_the_whole(tmp_path):
    assert not together(2, tmp_path, shares, tmp_path)
    assert len(list(tmp_path.glob("done-*"))) == 2


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("slug", CASES)
def test_a_policy_gradient_is_the_same_on_any_number_of_processes(tmp_path, slug, world):
    settings = {**SUMS, **CASES[slug], "reward": rewarded(tmp_path)}
    trained(slug, tmp_path / "alone", settings)
    assert not together(world, tmp_path / "share", trained, slug, tmp_path / "several", settings)
    assert json.loads((tmp_path / "several" / "run.json").read_text())["processes"] == world
    assert any(abs(row["loss"]) > 1e-3 for row in steps(tmp_path / "alone"))
    assert_close_runs(tmp_path / "alone", tmp_path / "several")


@pytest.mark.parametrize(
    ("slug", "rows", "more"),
    [
        ("sft", ANSWERS, {}),
        ("dpo", PAIRS, {}),
        ("lipo", LISTS, {}),
        ("differential-information", PAIRS, {}),
        # its hard negatives come from the whole batch
        ("grace", TRIPLES, {"rollout": ROLLOUT, "instruction": "Say:"}),
    ],
)
def test_methods_on_data_are_the_same_on_two_processes(tmp_path, slug, rows, more):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {**SMALL, "data": data, "batch_size": 4, "steps": 3, **more}
    trained(slug, tmp_path / "alone", settings)
    assert not together(2, tmp_path / "share", trained, slug, tmp_path / "several", settings)
    assert_close_runs(tmp_path / "alone", tmp_path / "several")


def test_a_loss_over_the_whole_batch_is_computed_by_all(tmp_path):
    rows = [{"anchor": f"the {i} of things", "positive": f"def {i}(x)"} for i in range(8)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    settings = {"data": data, "batch_size": 4, "steps": 2, "log": [], "report": False}
    trained("simclr", tmp_path / "alone", settings)
    assert not together(2, tmp_path / "share", trained, "simclr", tmp_path / "several", settings)
    for a, b in zip(steps(tmp_path / "alone"), steps(tmp_path / "several"), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    settings = {**SUMS, "rollout": ROLLOUT, "reward": rewarded(tmp_path)}
    trained("grpo", tmp_path / "alone", {**settings, "steps": 4})
    assert not together(
        4, tmp_path / "one", trained, "grpo", tmp_path / "parts", settings | {"steps": 2}
    )
    assert not together(2, tmp_path / "two", resumed, tmp_path / "parts", {"steps": 3})
    resumed(tmp_path / "parts", {"steps": 4})
    assert_close_runs(tmp_path / "alone", tmp_path / "parts")


def once(folder):
    """Divided and agreed work, done as often as it should be."""
    with processes.joined():
        found = processes.divided(range(5), lambda share: [(i, processes.rank()) for i in share])
        assert [i for i, _ in found] == list(range(5))
        assert [rank for _, rank in found] == [0, 1, 1, 2, 2] or processes.count() != 3
        calls = []
        assert processes.agreed(lambda: calls.append(1) or processes.rank()) == 0
        assert len(calls) == (1 if processes.first() else 0)
        assert processes.any_of(processes.rank() == 2)
        assert not processes.any_of(False)
        parameter = torch.nn.Parameter(torch.zeros(3))
        idle = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        if processes.rank():
            parameter.grad = torch.full((3,), float(processes.rank()))
        processes.sum_gradients([parameter, idle])
        assert parameter.grad.tolist() == [3.0] * 3
        assert idle.grad.tolist() == [0.0] * 2
        (folder / f"done-{processes.rank()}").touch()


def test_shares_are_even_and_what_must_be_done_once_is(tmp_path):
    assert not together(3, tmp_path, once, tmp_path)
    assert len(list(tmp_path.glob("done-*"))) == 3


def parted_and_met():
    for _ in range(5):
        with processes.joined():
            assert processes.gathered(processes.rank) == [0, 1]


def test_processes_that_parted_meet_again(tmp_path):
    assert not together(2, tmp_path, parted_and_met)


def mistaken():
    def compute(share):
        if 3 in share:
            raise PostgradError("row 3 is odd")
        return list(share)

    with processes.joined():
        processes.divided(range(4), compute)


def test_a_mistake_that_one_finds_stops_all(tmp_path):
    errors = together(2, tmp_path, mistaken)
    assert errors == {"error-0": "process 1: row 3 is odd", "error-1": "row 3 is odd"}


def test_a_wrong_reward_stops_all_with_the_same_line(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text(
        "def lengths(completions, answer):\n    return [1.0 / (16 - len(answer))] * len(answer)\n"
    )
    settings = {**SUMS, "rollout": ROLLOUT, "reward": f"{path}:lengths"}
    errors = together(2, tmp_path / "share", trained, "grpo", tmp_path / "run", settings)
    assert set(errors) == {"error-0", "error-1"}
    assert all("ZeroDivisionError" in error for error in errors.values())


def command(*words, **more):
    return subprocess.run(
        [sys.executable, "-m", "postgrad", *words],
        capture_output=True,
        text=True,
        timeout=200,
        **more,
    )


def test_the_command_starts_them_and_says_things_once(tmp_path):
    settings = ["batch_size=2", "steps=2", "log=[]", "report=false", "model=tiny", "data=addition"]
    done = command("train", "grpo", *settings, "processes=2", f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1
    assert len(untimed(tmp_path / "run")) == 4
    wrong = command("train", "grpo", *settings, "processes=2", f"output={tmp_path / 'run'}")
    assert wrong.returncode == 2
    assert wrong.stderr.count("already holds a run") == 1
    assert "Traceback" not in wrong.stderr


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_machines_that_meet_take_the_same_steps(tmp_path):
    settings = ["batch_size=2", "steps=2", "log=[]", "report=false", "model=tiny", "data=addition"]
    words = ["train", "grpo", *settings, "precision=fp32", "rollout.max_new_tokens=8"]
    assert command(*words, f"output={tmp_path / 'one'}").returncode == 0
    there = ["nodes=2", f"rendezvous=localhost:{free_port()}", f"output={tmp_path / 'two'}"]
    # two launchers stand for two machines
    with ThreadPoolExecutor() as machines:
        first, second = machines.map(lambda _: command(*words, *there), range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (first.stdout + second.stdout).count("run folder:") == 1
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_machines_that_do_not_meet_say_so(monkeypatch):
    monkeypatch.setattr(launch, "_PATIENCE", 2)
    address = f"localhost:{free_port()}"
    line = f"rendezvous: 2 machines have not met at {address} within 2 s"
    with pytest.raises(PostgradError, match=line):
        launch.launch(launch.Layout(nodes=2, rendezvous=address), ["list"])


def test_sigterm_saves_once_and_the_run_goes_on(tmp_path):
    settings = ["batch_size=2", "steps=100000", "log=[]", "report=false", "model=tiny"]
    run = tmp_path / "run"
    words = ["train", "grpo", "data=addition", *settings, "processes=2", f"output={run}"]
    started = subprocess.Popen(
        [sys.executable, "-m", "postgrad", *words], stderr=subprocess.PIPE, text=True
    )
    for line in started.stderr:
        if re.match("step 2/", line):
            break
    started.send_signal(signal.SIGTERM)
    _, errors = started.communicate(timeout=100)
    assert started.returncode == 130
    assert "Traceback" not in errors
    saved = sorted((run / "checkpoints").glob("step-*"))
    assert len(saved) == 1
    step = int(saved[0].name.removeprefix("step-"))
    assert step >= 2
    done = command("train", "--resume", str(run), "--allow-changes", f"steps={step + 1}")
    assert done.returncode == 0, done.stderr
    assert untimed(run)[-1]["step"] == step + 1


@pytest.mark.parametrize(
    ("slug", "message"),
    [
        ("simclr", "shard: the encoder of this method cannot be sharded"),
        ("mdpo", "shard: .* of this method cannot be sharded"),
        ("differential-information", "shard: this method takes two gradients apart: expected fals"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_a_folder_is_made(tmp_path, slug, message):
    more = {}
    if slug == "differential-information":
        more = {"model": "tiny", "data": write_rows(tmp_path / "rows.jsonl", PAIRS)}
    with pytest.raises(PostgradError, match=message):
        train(slug, output=tmp_path / "run", shard=True, **more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": 2}, "rendezvous: with nodes above 1, expected host:port"),
        ({"nodes": 2, "rendezvous": "here"}, "got 'here'"),
        ({"nodes": 2, "rendezvous": "here:door"}, "got 'here:door'"),
        ({"nodes": 2, "rendezvous": "localhost:65536"}, "got 'localhost:65536'"),
        ({"nodes": 2, "rendezvous": "no.such.invalid:1"}, "there is no machine 'no.such.invalid'"),
        ({"processes": 0}, "processes: "),
        ({"processes": "many"}, "processes: "),
    ],
)
def test_a_wrong_layout_is_named(settings, message):
    with pytest.raises(PostgradError, match=message):
        launch.layout(settings)
