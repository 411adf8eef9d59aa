"""The four parts of a policy gradient: the identities between them, and any of them composed."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, untimed, write_rows
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.parts.choices import (
    AdvantageChoice,
    DenominatorChoice,
    GradientChoice,
    MaskChoice,
)
from postgrad.methods.language.verifiable.policy_gradient import PolicyGradient
from postgrad.models.language import load_policy
from postgrad.models.snapshots import LaggingPolicy
from postgrad.objectives.estimator import (
    clip_bounds,
    one_side,
    ring,
    sequence_weight,
    shaped_weight,
    stabilised,
    token_weight,
    two_side,
)
from postgrad.objectives.policy_gradient import clipped_surrogate, importance_ratio
from postgrad.reports.method import method_facts, method_text

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def made(**config):
    settings = {"model": "tiny", **SHORT, **config}
    return PolicyGradient(
        validated(PolicyGradient.Config, settings), Place(), data=ROWS, reward=letters
    )


def ragged(seed=0, responses=6, tokens=7):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (responses,), generator=random)
    mask = torch.arange(tokens) < lengths[:, None]
    new = torch.randn(responses, tokens, generator=random).clamp(max=0).requires_grad_()
    old = new.detach() + 0.4 * torch.randn(responses, tokens, generator=random)
    advantages = torch.randn(responses, generator=random)[:, None].expand(-1, tokens)
    return new, old, advantages, mask


# Pure functions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [None, 1.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_clip_as_a_mask_is_ppos_loss_with_its_gradient(level, dual):
    new, old, advantages, mask = ragged()
    ratio = importance_ratio(new, old, mask, level)
    expected = clipped_surrogate(ratio, advantages, 0.1, 0.2, dual)
    (wanted,) = torch.autograd.grad(expected[mask].sum(), new)
    weight = {"token": token_weight, "sequence": sequence_weight}[level](new - old, mask)
    keep, bound = clip_bounds(ratio.detach(), advantages, 0.1, 0.2, dual)
    loss = -stabilised(weight, keep, bound) * advantages
    assert 0 < int((~keep & mask).sum()) < int(mask.sum())
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss[mask].sum(), new)
    torch.testing.assert_close(got, wanted)


def test_with_the_policy_as_denominator_the_gradient_is_reinforce():
    new, _, advantages, mask = ragged()
    weight = token_weight(new - new.detach(), mask)
    (got,) = torch.autograd.grad(-(weight * advantages)[mask].sum(), new)
    torch.testing.assert_close(got, torch.where(mask, -advantages, 0.0))


def test_supervised_fine_tuning_is_an_advantage_of_one_over_the_policy_itself():
    """The worked example of arXiv 2509.04419: logits (0.2, -0.5, 1), the third one shown."""
    logits = torch.tensor([0.2, -0.5, 1.0], requires_grad=True)
    logprob = logits.log_softmax(0)[2]
    assert -logprob.item() == pytest.approx(0.514295, abs=1e-6)
    (likelihood,) = torch.autograd.grad(-logprob, logits, retain_graph=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    weight = token_weight((logprob - logprob.detach())[None, None], one)
    (unified,) = torch.autograd.grad(-weight.sum(), logits)
    expected = torch.tensor([0.268664, 0.133414, -0.402078])
    torch.testing.assert_close(unified, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(unified, likelihood)


def test_the_shape_weighs_unlikely_tokens_more():
    probabilities = torch.tensor([[0.9, 0.5, 0.05]])
    logprobs = probabilities.log().requires_grad_()
    weight = shaped_weight(logprobs, torch.ones(1, 3, dtype=torch.bool))
    expected = torch.tensor([[0.9, 0.833333, 0.333333]])
    torch.testing.assert_close(weight.detach(), expected, atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(weight.sum(), logprobs)
    expected = torch.tensor([[0.09, 0.138889, 0.222222]])
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)


def test_the_masks_of_rec_by_hand():
    advantages = torch.tensor([0.75, -0.25, -0.25, -0.25])
    ratio = torch.tensor([1.5, 0.7, 0.9, 1.3])
    assert one_side(ratio, advantages, 0.2, 0.2).tolist() == [False, False, True, True]
    assert two_side(ratio, 0.2, 0.2).tolist() == [False, False, True, False]
    assert ring(ratio, advantages, 0.2, 0.2, 0.6, 2.0).tolist() == [False, False, True, False]
    far = torch.tensor([0.3, 3.5, 0.3, 3.5])  # what pulls back counts again
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert ring(far, signs, 0.2, 0.2, 0.6, 2.0).tolist() == [True, True, False, False]


def test_padding_reaches_neither_values_nor_gradients():
    new, old, _, mask = ragged()
    spoilt = torch.where(mask, new.detach(), torch.nan).requires_grad_()
    for weigh in (token_weight, sequence_weight):
        weight = weigh(spoilt - old, mask)
        assert bool(torch.isfinite(weight).all())
        (gradient,) = torch.autograd.grad(weight.sum(), spoilt)
        assert bool((gradient[~mask] == 0).all())


def test_wrong_calls_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for call, message in (
        (lambda: token_weight(x, mask.float()), "mask"),
        (lambda: shaped_weight(x, mask, gamma=0.0), "gamma must be above 0"),
        (lambda: clip_bounds(x, x, 1.5, 0.2), "must lie in"),
        (lambda: clip_bounds(x, x, 0.2, 0.2, 1.0), "dual_clip must be above 1"),
        (lambda: clip_bounds(x, x[:1], 0.2, 0.2), "shape"),
        (lambda: one_side(x, x, -0.1, 0.2), "must lie in"),
        (lambda: ring(x, x, 0.2, 0.2, 0.1, 2.0), "outer range must contain"),
        (lambda: stabilised(x, mask[:1]), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Composed ----------------------------------------------------------------------------------------

PARTS = [
    *[("mask", name) for name in MaskChoice.implementations],
    *[("denominator", name) for name in DenominatorChoice.implementations],
    *[("advantage", name) for name in AdvantageChoice.implementations],
    *[("gradient", name) for name in GradientChoice.implementations if name != "shaped"],
]

FITTING = {"riskpo": {"bundle": 2}}  # what a part needs beside its defaults in so small a setting


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_part_can_be_chosen_and_learns_something_finite(kind, name):
    method = made(**{kind: {"name": name, **FITTING.get(name, {})}})
    batch = method.collect(0)
    loss, metrics = method.loss(batch)
    loss.backward()
    gradients = [p.grad for p in method.policy.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert metrics["ratio/mean"] == pytest.approx(1.0)
    assert any(bool(gradient.any()) for gradient in gradients)


def test_off_policy_parts_differ_where_they_should():
    """Once the policy differs from the sampler, the parts differ from each other."""
    losses = {}
    for mask, denominator in (
        ("ppo", "sampler"),
        ("none", "sampler"),
        ("one-side", "policy"),
        ("none", "policy"),
    ):
        method = made(mask=mask, denominator=denominator, minibatches=2)
        batch = method.collect(0)
        with torch.no_grad():
            for parameter in method.policy.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.add_(0.05 * noise)
        losses[mask, denominator] = method.loss(batch)[0].item()
    assert len({round(loss, 6) for loss in losses.values()}) == 4
    # REINFORCE's loss is minus the mean advantage of a token, wherever the policy is
    batch = made(minibatches=2).collect(0)
    mean = float((batch.advantages[:, None] * batch.mask).sum() / batch.mask.sum())
    assert losses["none", "policy"] == pytest.approx(-mean, abs=1e-6)


def test_on_policy_all_masks_and_both_denominators_have_one_gradient():
    gradients = []
    for mask, denominator in (("ppo", "sampler"), ("ring", "policy"), ("none", "policy")):
        method = made(mask=mask, denominator=denominator)
        method.loss(method.collect(0))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.policy.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_truncated_responses_can_be_left_out():
    rollout = {"samples": 4, "max_new_tokens": 6, "stop": list("abcdefghi")}
    method = made(mask={"name": "none", "drop_truncated": True}, rollout=rollout)
    batch = method.collect(0)
    cut = ~batch.finished
    assert 0 < int(cut.sum()) < len(batch)
    assert not bool(batch.mask[cut].any())
    assert bool(batch.mask[~cut].any(1).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "shaped"}, "gradient: 'shaped' .*denominator=one, not over 'sampler'"),
        ({"rollout": {"samples": 1}}, "rollout.samples: a group's mean .* at least 2"),
        (
            {"mask": {"name": "ring", "outer_low": 0.1}},
            r"mask.outer_low: must be above mask.clip_low, 0.2, got 0.1",
        ),
        ({"advantage": "standardized"}, "advantage: .*did you mean 'standardised'"),
        ({"advantage": {"name": "standardised", "epz": 1}}, "advantage: .*did you mean 'eps'"),
        ({"denominator": {"name": "one", "x": 1}}, "denominator: unknown key 'x'"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_loaded(settings, message, tmp_path):
    given = {**SMALL, **SHORT, "data": ROWS, "reward": letters, "model": "no-such-folder"}
    with pytest.raises(PostgradError, match=message) as caught:
        train("policy-gradient", output=tmp_path / "run", **{**given, **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_part_brings_its_own_settings():
    """GRPO's deviation has an `eps`; the part chosen instead knows nothing of it."""
    facts = {fact.key: fact for fact in method_facts("grpo").settings}
    assert facts["advantage"].default == "standardised"
    assert "standardised | leave-one-out" in facts["advantage"].values
    assert facts["advantage.eps"].default == "0.0001"
    assert facts["mask.clip_high"].default == "0.2"
    text = method_text("grpo")
    assert "standardised: reward minus its group's mean, over the group's standard" in text


def test_parts_are_in_the_configuration_of_a_run_in_full(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    run = train(
        "policy-gradient", data=data, reward="numeric", steps=1, output=tmp_path / "run",
        mask={"clip_high": 0.28}, **SMALL, **SHORT,
    )  # fmt: skip
    text = (run.folder / "config.yaml").read_text()
    assert "clip_high: 0.28" in text
    assert "clip_low: 0.2" in text


def test_a_run_with_a_part_that_remembers_resumes(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes(
        "policy-gradient", tmp_path, data=data, reward="numeric", advantage="moving-mean",
        **SMALL, **SHORT,
    )  # fmt: skip


# Samples of an older policy ----------------------------------------------------------------------


def test_the_sampler_is_brought_up_to_date_now_and_then_and_late():
    policy = load_policy("tiny")
    lagging = LaggingPolicy(policy, every=3, delay=2)
    name, parameter = next(iter(policy.named_parameters()))
    seen = []
    for step in range(9):
        with torch.no_grad():
            parameter.fill_(step)
        with lagging.acting(step):
            seen.append(int(dict(policy.named_parameters())[name].flatten()[0]))
    assert seen == [0, 0, 0, 0, 0, 3, 3, 3, 6]


def test_ratios_are_to_the_policy_that_sampled():
    method = made(sync_every=4)
    method.collect(0)
    moved(method)
    batch = method.collect(1)
    torch.testing.assert_close(batch.old_logprobs, batch.sampled_logprobs, atol=1e-5, rtol=0)
    assert method.loss(batch)[1]["ratio/mean"] != pytest.approx(1.0, abs=1e-3)
    fresh = method.collect(4)
    assert method.loss(fresh)[1]["ratio/mean"] == pytest.approx(1.0, abs=1e-5)


def moved(method):
    with torch.no_grad():
        for parameter in method.policy.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.add_(0.02 * noise)


def test_earlier_samples_come_back_with_the_probabilities_they_had():
    method = made(replay=2, replay_steps=1)
    first = method.collect(0)
    assert len(first) == 16
    moved(method)
    second = method.collect(1)
    assert second.group.unique().tolist() == [0, 1, 2, 3, 4, 5]
    fresh, earlier = second.select(torch.arange(16)), second.select(torch.arange(16, 24))
    assert fresh.step.unique().tolist() == [1]
    assert earlier.step.unique().tolist() == [0]
    texts = dict(zip(first.texts, first.old_logprobs, strict=True))
    for text, old in zip(earlier.texts, earlier.old_logprobs, strict=True):
        known = texts[text]
        assert old[: len(known)].equal(known)
    _, metrics = method.loss(fresh)
    assert metrics["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    _, metrics = method.loss(earlier)
    assert metrics["ratio/mean"] != pytest.approx(1.0, abs=1e-3)
    described = method.describe_batch(second)
    assert described["replay/age"] == pytest.approx(8 / 24)
    assert described["reward"] == pytest.approx(float(fresh.reward.mean()))
    # of two steps back nothing is left
    assert set(method.collect(2).step.tolist()) == {1, 2}


def test_a_run_with_replay_resumes(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes(
        "policy-gradient", tmp_path, data=data, reward="numeric", replay=3, replay_steps=2,
        **SMALL, **SHORT,
    )  # fmt: skip


def test_a_run_with_a_lagging_sampler_resumes(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes(
        "policy-gradient", tmp_path, data=data, reward="numeric", sync_every=3, sync_delay=1,
        **SMALL, **SHORT,
    )  # fmt: skip
    rows = untimed(tmp_path / "whole")
    assert rows[0]["ratio/mean"] == pytest.approx(1.0)
