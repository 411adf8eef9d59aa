"""GRPO-Guard and Flow-GRPO: the card's identities on a real network, training, resume, faults."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgrad import api
from postgrad.batch import Batch
from postgrad.config import LoopSettings
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.diffusion.base import FlowPolicyGradient, scaled_clip
from postgrad.methods.diffusion.flow_grpo import FlowGRPO
from postgrad.methods.diffusion.grpo_guard import GRPOGuard
from postgrad.models.flow import ClassFlow
from postgrad.rewards.images import load_image_rewards
from postgrad.training.optimise import Optimisers

BOTH = pytest.mark.parametrize("kind", [FlowGRPO, GRPOGuard])
SLUGS = {FlowGRPO: "flow-grpo", GRPOGuard: "grpo-guard"}


def small_flow() -> ClassFlow:
    torch.manual_seed(0)
    return ClassFlow("ab", (1, 4, 4), 16, 1)


def build(kind: type[FlowPolicyGradient], **settings: Any) -> FlowPolicyGradient:
    settings = {
        "prompts": 2,
        "samples": 4,
        "sampling_steps": 5,
        "evaluation_samples": 2,
        **settings,
    }
    return kind(kind.Config(**settings), Place(seed=3), model=small_flow())


def whole(method: FlowPolicyGradient) -> Batch:
    """All trained steps of the first collected batch, as one minibatch."""
    (batch,) = method.minibatches(method.collect(0))
    return batch


def shift_velocity(method: FlowPolicyGradient, by: float) -> None:
    with torch.no_grad():
        method.policy.network.leave.bias.add_(by)


def per_dimension_mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


# --- mathematics ---------------------------------------------------------------------------------


@BOTH
def test_the_ratio_is_one_while_the_policy_is_the_one_that_sampled(kind):
    method = build(kind, updates=1)
    batch = whole(method)
    log_ratio = method.log_ratio(batch, *method.score_steps(batch))
    assert torch.equal(batch.time[: method.trained_steps], torch.linspace(1, 0, 6)[:4])
    torch.testing.assert_close(log_ratio, torch.zeros(32), atol=1e-5, rtol=0)


def test_log_ratios_are_those_of_the_card():
    """RatioNorm is mean(dmu eps) with eps the noise of the step, whatever s; the plain is not."""
    plain, guard = build(FlowGRPO, updates=1), build(GRPOGuard, updates=1)
    for method in (plain, guard):
        batch = whole(method)
        shift_velocity(method, 0.05)
        mean, logprobs = method.score_steps(batch)
        s = batch.deviations
        eps = (batch.next_latents - batch.old_means) / s.view(-1, 1, 1, 1)
        moved = mean - batch.old_means
        normalised = per_dimension_mean(moved * eps)
        bias = per_dimension_mean(moved.square()) / (2 * s.square())
        expected = normalised if method is guard else normalised / s - bias
        torch.testing.assert_close(
            method.log_ratio(batch, mean, logprobs), expected, atol=2e-5, rtol=1e-4
        )


def test_the_first_gradient_is_the_policy_gradient_without_the_noise():
    """At theta = old: -A / D_j d mean_d[(mu - mu_old) eps], with no factor 1/s."""
    method = build(GRPOGuard, updates=1)
    batch = whole(method)
    loss, _ = method.loss(batch)
    parameters = list(method.policy.parameters())
    found = torch.autograd.grad(loss, parameters)
    mean, _ = method.score_steps(batch)
    eps = (batch.next_latents - batch.old_means) / batch.deviations.view(-1, 1, 1, 1)
    length = batch.time - batch.next_time
    linear = -batch.advantages * per_dimension_mean((mean - batch.old_means) * eps) / length
    expected = torch.autograd.grad(linear.mean(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_the_bias_over_the_batch_is_one_number_for_all():
    sample, batchwise = (
        build(GRPOGuard, updates=1, bias_reduce=reduce) for reduce in ("sample", "batch")
    )
    batch = whole(sample)
    shift_velocity(sample, 0.05)
    mean, logprobs = sample.score_steps(batch)
    s = batch.deviations
    own = per_dimension_mean((mean - batch.old_means).square())
    difference = sample.log_ratio(batch, mean, logprobs) - batchwise.log_ratio(
        batch, mean, logprobs
    )
    torch.testing.assert_close(difference, (own - own.mean()) / (2 * s), atol=1e-5, rtol=1e-3)


def test_plain_ratios_fall_below_one_where_there_is_little_noise_and_guarded_ones_do_not():
    means = {}
    for kind in (FlowGRPO, GRPOGuard):
        method = build(kind, updates=1, samples=300, sampling_steps=10)
        batch = whole(method)
        shift_velocity(method, 0.3)
        with torch.no_grad():
            log_ratio = method.log_ratio(batch, *method.score_steps(batch))
        means[kind] = log_ratio.exp().view(-1, method.trained_steps).mean(0)
    assert float(means[FlowGRPO][-1]) < 0.95
    assert float(means[FlowGRPO][-1]) < float(means[FlowGRPO][4]) < 1
    assert float((means[GRPOGuard] - 1).abs().max()) < 0.005


@BOTH
def test_micro_batches_add_up_to_the_whole_gradient(kind):
    gradients = []
    for budget in (None, 7):
        method = build(kind, updates=1, kl_coefficient=0.1)
        batch = whole(method)
        shift_velocity(method, 0.02)
        for part in batch.split(budget):
            method.loss(part)[0].backward()
        gradients.append([p.grad for p in method.policy.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_the_divergence_to_the_initial_model_starts_at_zero_and_pulls_back():
    method = build(FlowGRPO, updates=1, kl_coefficient=1.0, clip=1e-6)
    batch = whole(method)
    assert method.loss(batch)[1]["kl_to_reference"] == pytest.approx(0.0, abs=1e-9)
    shift_velocity(method, 0.1)
    quiet = batch.with_fields(advantages=torch.zeros_like(batch.advantages))
    loss, metrics = method.loss(quiet)
    assert metrics["kl_to_reference"] > 0
    loss.backward()
    assert float(method.policy.network.leave.bias.grad.mean()) > 0


# --- the batch -----------------------------------------------------------------------------------


def test_advantages_are_standardised_within_prompts_and_clamped():
    method = build(GRPOGuard, samples=6, advantage_clip=1.2)
    batch = method.collect(0)
    rewards = batch.rewards.view(2, 6)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (
        rewards.std(1, correction=0, keepdim=True) + 1e-4
    )
    torch.testing.assert_close(batch.advantages.view(2, 6), expected.clamp(-1.2, 1.2))
    assert batch.prompts == [p for p in dict.fromkeys(batch.prompts) for _ in range(6)]


def test_updates_share_the_images_and_leave_out_the_last_step():
    method = build(GRPOGuard, updates=2)
    parts = list(method.minibatches(method.collect(0)))
    assert [len(part) for part in parts] == [16, 16]
    assert all(float(part.next_time.min()) == pytest.approx(0.2) for part in parts)
    everything = build(GRPOGuard, trained_fraction=1.0, updates=1)
    assert float(whole(everything).next_time.min()) == 0.0


def test_rollouts_in_chunks_are_the_same_for_every_run():
    first, second = (build(GRPOGuard, rollout_batch=3).collect(1) for _ in range(2))
    assert torch.equal(first.path, second.path)
    assert first.path.shape == (8, 6, 1, 4, 4)


def test_one_update_reports_ratios_and_clipping():
    method = build(GRPOGuard)
    optimise = Optimisers(method.modules(), LoopSettings(learning_rate=1e-2), method.place.device)
    metrics = method.update(method.collect(0), optimise)
    for name in ("clip/clipped", "clip/clipped_positive", "clip/clipped_negative"):
        assert 0 <= metrics[name] <= 1
    assert metrics["clip/clipped"] > 0
    for step in range(4):
        assert metrics[f"ratio/mean_step_{step}"] == pytest.approx(1.0, abs=0.3)
        assert metrics[f"ratio/std_step_{step}"] > 0


# --- training ------------------------------------------------------------------------------------


@pytest.fixture
def flow_folder(tmp_path: Path) -> Path:
    small_flow().save(tmp_path / "flow")
    return tmp_path / "flow"


def settings_of(folder: Path, **over: Any) -> dict[str, Any]:
    return {
        "model": str(folder),
        "prompts": 2,
        "samples": 4,
        "sampling_steps": 4,
        "evaluation_steps": 4,
        "log": [],
        "report": False,
        "learning_rate": 1e-3,
        **over,
    }


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clock = ("time/", "throughput/")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(clock)} for line in lines
    ]


@BOTH
def test_a_resumed_run_is_the_uninterrupted_run(kind, flow_folder: Path, tmp_path: Path):
    settings = settings_of(flow_folder, kl_coefficient=0.01, save_every=1, evaluate_every=2)
    through = api.train(SLUGS[kind], **settings, steps=4, output=str(tmp_path / "through"))
    api.train(SLUGS[kind], **settings, steps=2, output=str(tmp_path / "halves"))
    halves = api.resume(tmp_path / "halves", steps=4, allow_changes=True)
    for one, other in zip(
        through.method.policy.parameters(), halves.method.policy.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    assert rows(tmp_path / "halves") == rows(tmp_path / "through")
    saved = [
        (run / "model" / "model.safetensors").read_bytes()
        for run in (through.folder, halves.folder)
    ]
    assert saved[0] == saved[1]


@BOTH
def test_the_reward_rises(kind, tmp_path: Path):
    run = api.train(
        SLUGS[kind],
        model=small_flow(),
        steps=30,
        samples=16,
        prompts=2,
        learning_rate=1e-2,
        log=[],
        report=False,
        output=str(tmp_path / "run"),
    )
    found = rows(tmp_path / "run")
    before, after = found[0]["evaluation/reward"], run.evaluation["reward"]
    spread = found[1]["reward/within_group_std"]
    assert after - before > spread
    samples = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(samples[0])
    assert row["image"].startswith("data:image/png;base64,")
    assert row["prompt"] in ("a", "b")
    assert row["left-ink"] == pytest.approx(row["reward"])
    again = api.train(
        "grpo-guard", **settings_of(run.folder / "model", steps=1, output=str(tmp_path / "on"))
    )
    assert again.finished.step == 1


def test_the_users_prompts_and_reward(flow_folder: Path, tmp_path: Path):
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a", "target": 0.2}\n{"prompt": "b", "target": 0.8}\n', encoding="utf-8"
    )
    (tmp_path / "mine.py").write_text(
        "def close(prompts, completions, target):\n"
        "    assert completions[0].shape == (1, 4, 4) and len(prompts) == len(target)\n"
        "    return [-abs(float(c.mean()) - t) for c, t in zip(completions, target)]\n",
        encoding="utf-8",
    )
    reward = [{"name": f"{tmp_path / 'mine.py'}:close", "weight": 2.0}, "ink*0.5"]
    run = api.train(
        "grpo-guard",
        **settings_of(flow_folder, data=str(tmp_path / "prompts.jsonl"), reward=reward, steps=1),
        output=str(tmp_path / "run"),
    )
    row = rows(run.folder)[1]
    close = next(value for key, value in row.items() if key.endswith(":close"))
    assert row["reward"] == pytest.approx(2 * close + 0.5 * row["reward/ink"], abs=1e-6)


def test_a_diffusers_pipeline_trains_and_its_adapters_are_saved(tmp_path: Path):
    from test_flow_models import stable_diffusion_3

    stable_diffusion_3().save_pretrained(tmp_path / "sd3")
    (tmp_path / "prompts.csv").write_text("prompt\na cat\na dog\n", encoding="utf-8")
    run = api.train(
        "grpo-guard",
        **settings_of(tmp_path / "sd3", data=str(tmp_path / "prompts.csv"), reward="ink"),
        steps=2,
        resolution=16,
        guidance=2.0,
        lora={"rank": 2, "alpha": 4},
        evaluation_samples=2,
        token_budget=64,
        output=str(tmp_path / "run"),
    )
    assert (run.folder / "model" / "pytorch_lora_weights.safetensors").is_file()
    assert rows(run.folder)[2]["gradient_norm"] > 0


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "samples"),
        ({"model": "digit-flow"}, "unknown model 'digit-flow': did you mean 'digits-flow'"),
        ({"reward": "left-inc"}, "unknown image reward 'left-inc': did you mean 'left-ink'"),
        ({"prompts": 3}, "prompts: 3 distinct prompts a step asked for, the data has 2"),
        ({"trained_fraction": 0.1}, "trained_fraction: 0.1 of 4 sampling_steps leaves no step"),
        ({"updates": 9}, "updates: 9 updates cannot share 8 images"),
        ({"tune": "lora"}, "tune: .* 'lora' is for diffusers"),
        ({"bias_reduce": "none"}, "bias_reduce"),
        ({"noise_level": 0}, "noise_level"),
        ({"clp": 0.1}, "unknown key 'clp': did you mean 'clip'"),
    ],
)
def test_settings_that_cannot_work_stop_before_anything_is_written(
    settings: dict[str, Any], message: str, flow_folder: Path, tmp_path: Path
):
    wanted = {**settings_of(flow_folder), **settings}
    with pytest.raises(PostgradError, match=message):
        api.train("grpo-guard", **wanted, output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('x')", "raised KeyError"),
        ("return [1.0]", "returned 1 values for"),
        ("return [None for _ in completions]", "returned None"),
        ("return [float('nan') for _ in completions]", "returned nan"),
        ("return ['good' for _ in completions]", "'good'"),
    ],
)
def test_rewards_that_cannot_work_stop_before_anything_is_written(
    body: str, message: str, flow_folder: Path, tmp_path: Path
):
    (tmp_path / "bad.py").write_text(f"def bad(completions, **_):\n    {body}\n", encoding="utf-8")
    with pytest.raises(PostgradError, match=message):
        api.train(
            "grpo-guard",
            **settings_of(flow_folder, reward=f"{tmp_path / 'bad.py'}:bad"),
            output=str(tmp_path / "run"),
        )
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_no_class_is_named_with_its_row(flow_folder: Path, tmp_path: Path):
    (tmp_path / "prompts.csv").write_text("prompt\na\nbird\n", encoding="utf-8")
    with pytest.raises(PostgradError, match=r"prompts.csv, row \d+: unknown class 'bird'"):
        api.train("grpo-guard", **settings_of(flow_folder, data=str(tmp_path / "prompts.csv")))


@pytest.mark.parametrize(("kind", "clips"), [(FlowGRPO, (5e-3, 1e-4)), (GRPOGuard, (1e-3, 2e-6))])
def test_the_clip_follows_the_number_of_dimensions(kind, clips):
    assert [scaled_clip(clips, d) for d in (64, 65536)] == pytest.approx(clips)
    assert scaled_clip(clips, 2048) == pytest.approx((clips[0] * clips[1]) ** 0.5)
    assert build(kind).clip == pytest.approx(scaled_clip(kind.clips, 16))
    assert kind.clips == clips
    assert build(kind, clip=0.3).clip == 0.3
    assert scaled_clip(clips, 1) <= 0.5


def test_image_rewards_measure_what_they_say():
    image = torch.zeros(1, 4, 4)
    image[..., :2] = 1.0
    rewards = load_image_rewards(["ink", {"name": "left-ink", "weight": 3}])
    total, terms = rewards(["a", "a"], [image, 1 - image], {})
    assert terms == {"ink": [0.5, 0.5], "left-ink": [1.0, 0.0]}
    assert total == [3.5, 0.5]
