"""GRPO and what all clipped policy-gradient methods share, on real rollouts of the tiny model."""

import json
import threading

import pytest
import torch

from language_runs import SMALL, assert_resumes, assert_same_run, moved, write_rows
from postgrad.api import resume, train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.grpo import GRPO, GRPOSettings
from postgrad.models.language import load_policy
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}


def letters(completions):
    """The share of letters: a reward that a policy without any training varies in."""
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def made(reward=letters, **config):
    values = {"model": "tiny", **SHORT, **config}
    return GRPO(validated(GRPOSettings, values), Place(), data=ROWS, reward=reward)


def one_step(method, batch, **settings):
    """What the loop's optimiser does with the method's update; the gradients stay in place."""
    loop = LoopSettings(
        **{"learning_rate": 1e-12, "clip_norm": 0, "token_budget": None, **settings}
    )
    return method.update(batch, Optimisers(method.modules(), loop, torch.device("cpu")))


def taken_gradients(method):
    return {name: p.grad.clone() for name, p in method.policy.named_parameters()}


def test_the_loss_is_deepseekmaths_computed_one_token_at_a_time():
    """Equation 3 of the paper with its KL, by loops over a real rollout after a real step."""
    method = made(
        minibatches=2, kl_coefficient=0.04, mask={"name": "ppo", "clip_low": 0.05, "clip_high": 0.1}
    )
    batch = method.collect(0)
    moved(method)
    loss, metrics = method.loss(batch)

    def logprobs(network, prompt, response):
        with torch.no_grad():
            table = network(input_ids=torch.cat([prompt, response])[None]).logits[0].log_softmax(-1)
        return [table[len(prompt) - 1 + t, token] for t, token in enumerate(response)]

    initial = load_policy("tiny").network
    total, clipped = 0.0, 0
    for i, (prompt, response) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        rewards = torch.tensor(
            letters([batch.texts[j] for j in range(len(batch)) if batch.group[j] == batch.group[i]])
        )
        advantage = (batch.reward[i] - rewards.mean()) / (rewards.std() + 1e-4)
        tokens = 0.0
        for new, old in zip(
            logprobs(method.policy.network, prompt, response),
            logprobs(initial, prompt, response),
            strict=True,
        ):
            ratio = (new - old).exp()
            bounded = min(max(ratio, torch.tensor(0.95)), torch.tensor(1.1))
            divergence = (old - new).exp() - (old - new) - 1
            tokens += 0.04 * divergence - min(ratio * advantage, bounded * advantage)
            clipped += int(bounded * advantage < ratio * advantage)
        total += tokens / len(response)
    assert clipped > 0
    assert loss.item() == pytest.approx(float(total / len(batch)), abs=2e-5)
    assert metrics["ratio/clipped"] == pytest.approx(clipped / int(batch.mask.sum()))


def test_on_the_first_step_the_ratio_is_one_and_nothing_is_clipped():
    metrics = one_step(made(), made().collect(0))
    assert metrics["ratio/mean"] == 1.0
    assert metrics["ratio/clipped"] == 0.0
    # centred advantages: the loss is zero although its gradient is not
    assert abs(metrics["loss"]) < 1e-6
    assert metrics["gradient_norm"] > 0


def test_the_scored_policy_is_the_one_that_sampled():
    method = made(rollout={"samples": 4, "max_new_tokens": 5, "temperature": 0.7})
    batch = method.collect(0)
    with torch.no_grad():
        scores = method._score(batch)
    torch.testing.assert_close(scores.logprobs, batch.sampled_logprobs, atol=1e-5, rtol=0)
    assert scores.mask.equal(batch.mask)


def test_old_log_probabilities_are_scored_once_for_several_steps():
    method = made(minibatches=2, epochs=2)
    scored = []
    score = method.policy.score
    method.policy.score = lambda *args, **more: scored.append(len(args[0])) or score(*args, **more)
    batch = method.collect(0)
    assert scored == [16]
    torch.testing.assert_close(batch.old_logprobs, batch.sampled_logprobs, atol=1e-5, rtol=0)
    one_step(method, batch)
    assert scored == [16, 8, 8, 8, 8]


def test_with_one_step_a_rollout_nothing_old_is_scored():
    assert "old_logprobs" not in made().collect(0)


def test_minibatches_are_whole_groups_and_cover_every_epoch():
    method = made(minibatches=3, epochs=2)
    parts = list(method.minibatches(method.collect(0)))
    assert [len(part) for part in parts] == [8, 4, 4] * 2
    for epoch in (parts[:3], parts[3:]):
        assert sorted(torch.cat([part.group for part in epoch]).tolist()) == sorted(
            [0, 1, 2, 3] * 4
        )
    again = list(method.minibatches(method.collect(0)))
    assert [part.group.tolist() for part in again] == [part.group.tolist() for part in parts]


def test_the_second_minibatch_sees_a_policy_that_has_moved():
    method = made(minibatches=2)
    metrics = one_step(method, method.collect(0), learning_rate=0.01)
    assert metrics["ratio/mean"] != pytest.approx(1.0, abs=1e-3)


def test_groups_without_a_difference_have_no_gradient():
    method = made(lambda completions: [1.0] * len(completions))
    batch = method.collect(0)
    assert method.describe_batch(batch)["reward/degenerate_groups"] == 1.0
    one_step(method, batch)
    assert all(gradient.eq(0).all() for gradient in taken_gradients(method).values())


def test_degenerate_groups_are_counted():
    method = made(lambda completions: [float(i in (0, 5)) for i in range(len(completions))])
    metrics = method.describe_batch(method.collect(0))
    assert metrics["reward/degenerate_groups"] == 0.5
    assert metrics["reward"] == pytest.approx(2 / 16)


def test_rejection_fine_tuning_raises_what_was_right_and_nothing_else():
    def first_of_each_prompt(completions):
        return [float(i % 4 == 0) for i in range(len(completions))]

    method = made(first_of_each_prompt, advantage="reward")
    batch = method.collect(0)
    assert batch.advantages.equal(batch.reward)
    one_step(method, batch)
    got = taken_gradients(method)
    right = batch.select(batch.reward.nonzero().squeeze(1))
    method.policy.zero_grad(set_to_none=True)
    scores = method._score(right)
    lengths = scores.mask.sum(1)
    (-(scores.logprobs.sum(1) / lengths).sum() / len(batch)).backward()
    for name, expected in taken_gradients(method).items():
        torch.testing.assert_close(got[name], expected, atol=1e-7, rtol=1e-4)


def test_a_single_sample_does_without_the_group():
    batch = made(advantage="reward", rollout={"samples": 1, "max_new_tokens": 5}).collect(0)
    assert len(batch) == 4


@pytest.mark.parametrize("budget", [1, 40])
@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "sequence-sum-constant"])
def test_micro_batches_add_up_to_the_same_step(aggregation, budget):
    method = made(aggregation=aggregation, kl_coefficient=0.1)
    batch = method.collect(0)
    whole = one_step(method, batch)
    expected = taken_gradients(method)
    parts = one_step(method, batch, token_budget=budget)
    assert len(list(batch.split(budget))) > 3
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    for name, gradient in taken_gradients(method).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-3)


def test_rollouts_depend_on_seed_and_step_alone():
    first, second, later = made().collect(3), made().collect(3), made().collect(4)
    assert first.texts == second.texts
    assert first.texts != later.texts


def test_the_mean_reward_rises(tmp_path):
    settings = {**SMALL, **SHORT, "learning_rate": 3e-3}
    settings["rollout"] = {"samples": 8, "max_new_tokens": 5}
    train("grpo", data=ROWS, reward=letters, steps=40, output=tmp_path / "run", **settings)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["reward"] for row in rows if "reward" in row]
    first, last = torch.tensor(rewards[:8]), torch.tensor(rewards[-8:])
    # far beyond the noise of a mean over eight steps
    noise = float((first.var() / 8 + last.var() / 8).sqrt())
    assert float(last.mean() - first.mean()) > max(0.2, 4 * noise)
    sample = read_rows(tmp_path / "run" / "samples.jsonl")[0]
    assert {"prompt", "response", "reward", "advantage", "tokens", "advantages"} <= sample.keys()
    assert "".join(sample["tokens"]) == sample["response"]
    assert sample["advantages"] == [sample["advantage"]] * len(sample["tokens"])


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def letters(completions):\n"
        "    return [sum(c.isalpha() for c in t) / max(len(t), 1) for t in completions]\n"
    )
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "prompts.jsonl", ROWS),
        "reward": f"{reward}:letters",
        "minibatches": 2,
        "kl_coefficient": 0.01,
        "save_every": 2,
    }
    assert_resumes("grpo", tmp_path, **settings)


def test_held_out_prompts_are_answered_greedily(tmp_path):
    run = train(
        "grpo", data="addition", eval_size=8, steps=1, output=tmp_path / "run", **SMALL, **SHORT
    )
    assert run.evaluation["reward"] == 0.0
    assert 1 <= run.evaluation["length"] <= 5


def test_reward_functions_see_columns_and_token_ids():
    seen = {}

    def reward(prompts, completions, completion_ids, answer):
        seen.update(prompts=prompts, ids=completion_ids, answer=answer)
        return [0.0] * len(completions)

    batch = made(reward).collect(0)
    assert seen["ids"] == [response.tolist() for response in batch.responses]
    assert seen["prompts"][0] == seen["prompts"][3] != seen["prompts"][4]
    assert [str(2 * int(prompt[:2])) for prompt in seen["prompts"]] == seen["answer"]


def test_several_rewards_are_weighed_and_reported():
    batch = made(["numeric*2", {"name": "length", "target": 3, "weight": 0.5}]).collect(0)
    terms = made(["numeric", {"name": "length", "target": 3}]).collect(0)
    columns = terms.fields()
    torch.testing.assert_close(
        batch.reward, 2 * columns["reward/numeric"] + 0.5 * columns["reward/length"]
    )
    assert columns["reward/length"].lt(0).any()


# Faults: all found before any compute, one line each, and nothing is written


def refused(tmp_path, message, **settings):
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message) as caught:
        train("grpo", output=run, **{"data": ROWS, "reward": letters, **SMALL, **SHORT, **settings})
    assert "\n" not in str(caught.value)
    assert not run.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": {"samples": 1}}, r"rollout.samples: .*at least 2 samples, got 1"),
        ({"rollout": {"max_new_tokens": 0}}, r"rollout.max_new_tokens: .*greater than 0, got 0"),
        ({"rollout": {"max_new_tokens": 1024}}, r"leaves no room for a prompt"),
        ({"rollout": {"temperature": 0}}, r"rollout.temperature: .*greater than 0"),
        ({"minibatches": 5}, r"minibatches: 5 .*batch_size of 4"),
        ({"mask": {"clip_low": 1.0}}, r"^mask.clip_low: .*less than 1"),
        ({"mask": {"dual_clip": 1.0}}, r"^mask.dual_clip: .*greater than 1"),
        ({"mask": "pppo"}, r"^mask: unknown mask 'pppo': did you mean 'ppo'"),
        ({"mask": {"clip_hihg": 1.0}}, r"^mask: unknown key 'clip_hihg': did you mean 'clip_high'"),
        ({"gradient": "shaped"}, r"gradient: 'shaped' .* over denominator=one, not over 'sampler'"),
        ({"reward": "nummeric"}, r"unknown reward 'nummeric': did you mean 'numeric'"),
        ({"reward_time_limit": 0}, r"reward_time_limit: .*greater than 0"),
        ({"data": [{"prompt": ""}]}, r"row 1: column 'prompt' is empty"),
        (
            {"data": [{"prompt": "1"}, {"prompt": "2" * 1020}]},
            r"row 2: the prompt has 1020 tokens, at most 1019 fit",
        ),
        ({"max_prompt_tokens": 4}, r"row 1: the prompt has 6 tokens, at most 4 fit"),
        ({"reward": None, "data": [{"prompt": "1"}]}, r"reward: .* brings no verifier of its own"),
    ],
)
def test_a_bad_setting_or_row_is_named(settings, message, tmp_path):
    refused(tmp_path, message, **settings)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0]", "returned 1 values for 2 completions"),
        ("None", "returned None, expected a list"),
        ("[None, 1.0]", "returned None for completion 1"),
        ("[1.0, float('nan')]", "returned nan for completion 2"),
        ("['1', 1]", "returned '1' .*for completion 1, expected a finite number"),
        ("1 / 0", r"raised ZeroDivisionError: division by zero \(reward.py, line 2\)"),
    ],
)
def test_a_reward_function_that_misbehaves_stops_the_run_before_it_starts(
    returned, message, tmp_path
):
    path = tmp_path / "reward.py"
    path.write_text(f"def score(completions):\n    return {returned}\n")
    refused(tmp_path, message, reward=f"{path}:score")


def test_a_reward_function_that_hangs_stops_the_run_before_it_starts(tmp_path):
    released = threading.Event()

    def hanging(completions):
        released.wait()

    refused(tmp_path, "hanging.* within its limit of 0.2", reward=hanging, reward_time_limit=0.2)
    released.set()


def test_a_reward_that_fails_later_names_the_completion(tmp_path):
    calls = []

    def late(completions):
        calls.append(len(completions))
        return [float("nan") if len(calls) > 2 else 0.0] * len(completions)

    run = tmp_path / "run"
    with pytest.raises(PostgradError, match="step 2: reward 'late' returned nan for completion 1"):
        train("grpo", data=ROWS, reward=late, steps=3, output=run, **SMALL, **SHORT)
    assert calls == [2, 16, 16]
    samples = json.loads((run / "failure" / "step-00000002" / "samples.json").read_text())
    assert len(samples) == 16
    assert samples[0]["reward"] == "nan"
    assert samples[0]["prompts"] in [row["prompt"] for row in ROWS]
    assert (run / "checkpoints" / "step-00000001").is_dir()


def test_a_run_whose_reward_fails_later_goes_on_from_there(tmp_path):
    reward = tmp_path / "reward.py"
    good = "def score(completions):\n    return [0.5] * len(completions)\n"
    reward.write_text(
        "calls = []\n"
        "def score(completions):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 2:\n"
        "        raise OSError('the judge is away')\n"
        "    return [0.5] * len(completions)\n"
    )
    data = write_rows(tmp_path / "prompts.jsonl", ROWS)
    settings = {**SMALL, **SHORT, "data": data, "reward": f"{reward}:score", "steps": 3}
    stopped = "step 2: reward .* raised OSError: the judge is away .* --resume .*parts"
    with pytest.raises(PostgradError, match=stopped):
        train("grpo", output=tmp_path / "parts", **settings)
    reward.write_text(good)
    resume(tmp_path / "parts")
    train("grpo", output=tmp_path / "whole", **settings)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
