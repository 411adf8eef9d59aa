"""Engines as methods see them: what differs from the trainer is measured, mended, or refused."""

import socket

import pytest
import torch

from language_runs import SMALL, moved
from postgrad.api import prepare, train
from postgrad.config import LoopSettings
from postgrad.errors import PostgradError
from postgrad.methods.language import engines
from postgrad.models.exporting import checksum, exported_weights
from postgrad.models.language import LoraSettings, load_policy
from postgrad.models.snapshots import Snapshot
from postgrad.objectives.mismatch import Mismatch, mismatch, truncated_weights
from postgrad.sampling.engines import Drawn
from postgrad.sampling.generation import generate
from postgrad.training.checkpoint import load_module_state, module_state
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}
CPU = torch.device("cpu")


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


class Shifted:
    """Draws as this process does, and says that every token was so much likelier than it was."""

    exact = False

    def __init__(self, shift):
        self.shift, self.closed = shift, 0

    def draw(self, policy, wanted):
        policy.engine = None
        try:
            drawn = generate(
                policy, wanted.prompts, wanted.settings, seeds=wanted.seeds, limits=wanted.limits
            )
        finally:
            policy.engine = self
        return [
            Drawn(tokens, logprobs + self.shift, bool(over))
            for tokens, logprobs, over in zip(
                drawn.responses, drawn.logprobs, drawn.finished, strict=True
            )
        ]

    def metrics(self):
        return {"engine/answers": 42.0}

    def close(self):
        self.closed += 1


def made(slug, shift=None, **settings):
    policy = load_policy("tiny")
    if shift is not None:
        policy.engine = Shifted(shift)
    everything = {**SMALL, **SHORT, "data": ROWS, "reward": letters, **settings}
    everything["rollout"] = {**SHORT["rollout"], **settings.get("rollout", {})}
    return prepare(slug, **{**everything, "model": policy})[0]


def test_weights_are_ratios_up_to_the_cap():
    trainer = torch.tensor([[-1.0, -1.0, -2.0, -0.5]])
    sampler = torch.tensor([[-1.0, -3.0, -1.0, 7.0]])
    mask = torch.tensor([[True, True, True, False]])
    weights = truncated_weights(trainer, sampler, mask, 2.0)
    # e^0, e^2 = 7.389 cut to 2, e^-1, and no token
    assert weights.tolist() == [[1.0, 2.0, pytest.approx(0.36787944), 1.0]]


def test_the_mismatch_is_what_one_computes_by_hand():
    trainer = torch.tensor([[-1.0, -1.0, -2.0, -0.5]])
    sampler = torch.tensor([[-1.0, -1.6931472, -1.3068528, 7.0]])  # ratios 1, 2 and 1/2
    mask = torch.tensor([[True, True, True, False]])
    assert mismatch(trainer, sampler, mask, 1.5).metrics() == {
        "logprob_difference": pytest.approx(2 * 0.6931472 / 3),
        "logprob_difference_largest": pytest.approx(0.6931472),
        # exp(d) - 1 - d: 0, 1 - log 2 and -1/2 + log 2, so a sum of 1/2
        "kl": pytest.approx(0.5 / 3),
        # (1 + 2 + 1/2)^2 / (3 (1 + 4 + 1/4))
        "effective_samples": pytest.approx(12.25 / 15.75),
        "capped": pytest.approx(1 / 3),
    }


def test_the_mismatch_of_parts_adds_up_to_that_of_the_whole():
    trainer, sampler = -torch.rand(2, 6, 5)
    mask = torch.rand(6, 5) < 0.7
    whole = mismatch(trainer, sampler, mask, 1.2).metrics()
    parts = sum(
        (mismatch(trainer[i], sampler[i], mask[i], 1.2) for i in range(6)), Mismatch()
    ).metrics()
    assert parts == {name: pytest.approx(value) for name, value in whole.items()}


def test_the_same_probabilities_differ_in_nothing():
    logprobs, mask = -torch.rand(3, 4), torch.ones(3, 4, dtype=torch.bool)
    found = mismatch(logprobs, logprobs, mask, 2.0).metrics()
    assert found == {**dict.fromkeys(found, 0.0), "effective_samples": pytest.approx(1.0)}
    assert mismatch(logprobs, logprobs, ~mask, 2.0).metrics() == {}


def gradient(method, batch):
    """Of the loss, by the embeddings."""
    loss, _ = method.loss(batch)
    return torch.autograd.grad(loss, next(iter(method.policy.parameters())))[0]


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize(("shift", "weight"), [(-0.3, 1.3498588), (-2.0, 2.0), (0.5, 0.6065307)])
def test_grpo_weighs_every_token_by_how_much_likelier_the_trainer_finds_it(shift, weight, updates):
    plain, corrected = made("grpo", epochs=updates), made("grpo", shift, epochs=updates)
    batch = corrected.collect(0)
    if updates > 1:  # what was likely before counts, and not what is likely after a step
        moved(plain), moved(corrected)
    expected = weight * gradient(plain, batch)
    # all tokens have one weight, so the gradient has it too
    torch.testing.assert_close(gradient(corrected, batch), expected, rtol=1e-3, atol=1e-6)
    assert expected.norm() > 0.01


def test_without_the_correction_the_mismatch_is_measured_all_the_same():
    plain, other = made("grpo"), made("grpo", -0.3, rollout={"correction": "none"})
    batch = other.collect(0)
    torch.testing.assert_close(gradient(other, batch), gradient(plain, batch))
    found = other.engine_metrics()
    assert found["engine/logprob_difference"] == pytest.approx(0.3, abs=1e-4)
    assert found["engine/answers"] == 42


def test_ppo_weighs_the_policys_tokens_and_not_the_critics():
    plain, corrected = made("ppo-language"), made("ppo-language", -0.3)
    batch = corrected.collect(0)
    expected = 1.3498588 * gradient(plain, batch)
    torch.testing.assert_close(gradient(corrected, batch), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(corrected.value_loss(batch)[0], plain.value_loss(batch)[0])


def test_a_demonstration_was_drawn_by_nobody_and_keeps_its_weight():
    method = made("grpo", -0.3)
    batch = method.collect(0)
    shown = batch.with_fields(sampled_logprobs=torch.zeros_like(batch.sampled_logprobs))
    torch.testing.assert_close(gradient(method, shown), gradient(made("grpo"), shown))


def test_a_run_says_how_far_engine_and_trainer_are_apart_and_closes_the_engine(tmp_path):
    policy = load_policy("tiny")
    policy.engine = engine = Shifted(-0.3)
    settings = {**SMALL, **SHORT, "data": ROWS, "reward": letters, "steps": 2, "output": tmp_path}
    train("grpo", **{**settings, "model": policy})
    first = next(row for row in read_rows(tmp_path / "metrics.jsonl") if "reward" in row)
    assert first["engine/logprob_difference"] == pytest.approx(0.3, abs=1e-4)
    assert first["engine/logprob_difference_largest"] == pytest.approx(0.3, abs=1e-4)
    assert first["engine/effective_samples"] == pytest.approx(1.0, abs=1e-4)
    assert first["engine/answers"] == 42
    assert engine.closed == 1
    assert policy.engine is None


# Weights -------------------------------------------------------------------------------------


def one_step(optimise, policy):
    def loss(batch):
        return policy.score(batch.prompts, batch.responses).logprobs.sum(), {}

    from postgrad.batch import Batch

    tokens = [torch.tensor([5, 6, 7])]
    optimise(loss, Batch(prompts=tokens, responses=tokens, mask=torch.ones(1, 3).bool()))


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_every_way_to_change_weights_is_seen(tune):
    policy = load_policy("tiny", tune=tune, lora=LoraSettings(rank=2))
    optimise = Optimisers({"policy": policy}, LoopSettings(learning_rate=1e-6), CPU)
    optimise.set_step(0)
    seen = [checksum(policy)]
    assert checksum(policy) == seen[0]

    with optimise.looking_ahead():
        one_step(optimise, policy)
        seen.append(checksum(policy))
    assert checksum(policy) == seen[0]

    before = Snapshot(policy)
    kept = {name: value.clone() for name, value in module_state(policy).items()}
    one_step(optimise, policy)
    seen.append(checksum(policy))
    with before.acting():
        assert checksum(policy) == seen[0]
    load_module_state(policy, kept)
    assert checksum(policy) == seen[0]
    with torch.no_grad():
        next(p for p in policy.parameters() if p.requires_grad).view(-1)[3] += 1e-7
    seen.append(checksum(policy))
    assert len(set(seen[:1] + seen[2:])) == 3


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_exported_weights_are_those_of_the_saved_model(tune, tmp_path):
    policy = load_policy("tiny", tune=tune, lora=LoraSettings(rank=2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    before = checksum(policy)
    exported = exported_weights(policy.network)
    assert checksum(policy) == before
    policy.save(tmp_path)
    saved = load_policy(str(tmp_path)).network
    output = exported.pop("lm_head.weight")  # tied to the embeddings here
    assert torch.equal(output, exported["model.embed_tokens.weight"])
    assert exported.keys() == {name for name, _ in saved.named_parameters()}
    for name, value in saved.named_parameters():
        torch.testing.assert_close(exported[name], value.detach())


# Refusals ------------------------------------------------------------------------------------


@pytest.fixture
def closed_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"server": "localhost:8000"}, "rollout.server: expected an address like http://"),
        ({"server": "http://me:secret@localhost"}, "rollout.server: expected an address without"),
        ({"correction_cap": 0}, "rollout.correction_cap: input should be greater than 0, got 0"),
        ({"engine": "vlm"}, "rollout.engine: "),
    ],
)
def test_bad_settings_are_one_line(rollout, message):
    settings = {"rollout": {"engine": "vllm-server", **rollout}, "data": ROWS, "reward": letters}
    with pytest.raises(PostgradError) as caught:
        prepare("grpo", model="tiny", **settings)
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_stops_the_run_before_it_starts(
    closed_port, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    rollout = {"engine": "vllm-server", "server": f"http://127.0.0.1:{closed_port}"}
    with pytest.raises(PostgradError, match="does not answer") as caught:
        train("grpo", model="tiny", data=ROWS, rollout=rollout, output=tmp_path / "run")
    assert "a-secret" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_top_p_and_the_correction_do_not_go_together():
    with pytest.raises(PostgradError, match=r"rollout\.top_p=1, got 0\.9"):
        made("grpo", -0.3, rollout={"top_p": 0.9})
    made("grpo", -0.3, rollout={"top_p": 0.9, "correction": "none"}).collect(0)


@pytest.mark.parametrize("slug", ["disco", "rloo"])
def test_a_method_without_a_correction_says_so_before_it_is_made(slug, monkeypatch):
    monkeypatch.setattr(engines, "made_engine", lambda rollout, place: Shifted(-0.3))

    def long(completions):
        return [float(len(text) > 4) for text in completions]

    given = {"model": "tiny", "data": ROWS, "reward": long}
    with pytest.raises(PostgradError, match=r"no correction .* expected none, got"):
        prepare(slug, **given)
    without = prepare(slug, **given, rollout={**SHORT["rollout"], "correction": "none"})[0]
    loss, _ = without.loss(without.collect(0))
    assert torch.isfinite(loss)
