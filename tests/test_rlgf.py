"""RLGF: roll-ins and their masks, who speaks when, and real runs."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.advantages.roll_in import roll_in_lengths, roll_in_masks
from postgrad.advantages.temporal import token_advantages
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.rlhf.actor_critic import ActorCritic
from postgrad.methods.language.rlhf.rlgf import RLGF
from postgrad.models.language import load_policy
from postgrad.objectives.policy_gradient import aggregate, clipped_surrogate
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.sampling.roll_in import PolicySpeaker, TextSpeaker
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": letter, "completion": "aeiou"} for letter in "abcdefgh"]
SHORT = {
    "batch_size": 8,
    "epochs": 2,
    "minibatches": 2,
    "rollout": {"samples": 1, "max_new_tokens": 6},
    "frontier": {"max_new_tokens": 6},
}
REWARD = """
def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]
"""


def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]


def says_z(prompts, beginnings):
    return ["z" * 20 for _ in beginnings]


def made(kind=RLGF, *, steps=10, guide=says_z, data=ROWS, **config):
    own = {"kl_coefficient": 0.0, "discount": 0.99, "standardise": False}
    values = {"model": "tiny", **SHORT, **(own if kind is ActorCritic else {}), **config}
    guides = {} if kind is ActorCritic else {"guide": guide}
    place = Place(steps=steps)
    return kind(validated(kind.Config, values), place, data=data, reward=vowels, **guides)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def step(method, number):
    loop = LoopSettings(learning_rate=1e-3)
    optimise = Optimisers(method.modules(), loop, method.place.device, method.rates())
    batch = method.collect(number)
    return batch, {**method.describe_batch(batch), **method.update(batch, optimise)}


# Roll-ins and masks -------------------------------------------------------------------------


def test_the_worked_example():
    """T = 5, R = 1 at the end, h = 2: what PPO++ and AggreVaTeD make of the same response."""
    mask = torch.ones(1, 5, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 0, 0, 0, 1]])
    values = torch.tensor([[0.2, 0.3, 0.4, 0.5, 0.6]])
    advantages, _ = token_advantages(rewards, values, mask, discount=0.99, lambda_=0.95)
    expected = torch.tensor([[0.662483, 0.601258, 0.537223, 0.470200, 0.400000]])
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    ratio = torch.tensor([[1.0, 1.1, 0.7, 1.3, 0.9]])
    loss = clipped_surrogate(ratio, advantages, 0.2, 0.2)
    expected = -torch.tensor([[0.662483, 0.661384, 0.376056, 0.564240, 0.360000]])
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    for scheme, value in (("ppo++", -0.433432), ("aggrevated", -0.661934)):
        policy, _ = roll_in_masks(mask, torch.tensor([2]), scheme)
        assert float(aggregate(loss, policy, "token-mean")) == pytest.approx(value, abs=1e-6)


def test_a_roll_in_is_uniform_and_leaves_something_over():
    uniforms = (torch.arange(6000, dtype=torch.float64) + 0.5) / 6000
    found = roll_in_lengths(torch.full((6000,), 7), uniforms)
    assert found.unique(return_counts=True)[1].tolist() == [1000] * 6
    assert (found.min(), found.max()) == (1, 6)
    edges = torch.tensor([0.0, 0.999999, 0.5, 0.5])
    assert roll_in_lengths(torch.tensor([2, 2, 1, 0]), edges).tolist() == [1, 1, 0, 0]
    near = torch.tensor([1 - 2**-24])  # times 12 is 12 in float32
    assert roll_in_lengths(torch.tensor([13]), near).tolist() == [12]


def test_roll_in_and_roll_out_share_the_tokens_between_them():
    lengths, roll_ins = torch.tensor([6, 4, 3, 1]), torch.tensor([2, 3, 0, 0])
    mask = torch.arange(6) < lengths[:, None]
    ends, ends_too = roll_in_masks(mask, roll_ins, "ppo++")
    begins, follows = roll_in_masks(mask, roll_ins, "aggrevated")
    assert torch.equal(ends, ends_too)
    assert torch.equal(ends, follows)
    assert torch.equal(begins | ends, mask)
    assert not (begins & ends).any()
    assert begins.sum(1).tolist() == roll_ins.tolist()
    last, follows = roll_in_masks(mask, roll_ins, "aggrevated", last_only=True)
    assert last.nonzero().tolist() == [[0, 1], [1, 2]]
    assert torch.equal(ends, follows)


def test_wrong_calls_are_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="at most those of its response"):
        roll_in_masks(mask, torch.tensor([1, 4]), "ppo++")
    with pytest.raises(ValueError, match=r"mask must be boolean \[N, T\]"):
        roll_in_masks(mask.float(), torch.tensor([1, 1]), "ppo++")
    with pytest.raises(ValueError, match="scheme must be"):
        roll_in_masks(mask, torch.tensor([1, 1]), "lols")
    with pytest.raises(ValueError, match=r"must both be \[N\]"):
        roll_in_lengths(torch.tensor([2]), torch.rand(2))
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        roll_in_lengths(torch.tensor([2]), torch.ones(1))


# Who speaks ---------------------------------------------------------------------------------


def test_a_policy_goes_on_from_any_beginning():
    policy = load_policy("tiny")
    prompts = [policy.render(text) for text in ("a", "b", "c")]
    beginnings = [policy.encode_response(text, end=False) for text in ("", "xy", "xyzxy")]
    settings = SamplingSettings(6)
    found = PolicySpeaker(policy, settings)([{}] * 3, prompts, beginnings, [1, 2, 3])
    scores = policy.score(prompts, found.responses).logprobs
    for i, (prompt, beginning) in enumerate(zip(prompts, beginnings, strict=True)):
        response, begun = found.responses[i], len(beginning)
        assert torch.equal(response[:begun], beginning)
        assert begun < len(response) <= 6
        alone = generate(policy, [torch.cat([prompt, beginning])], settings, seeds=[i + 1])
        assert torch.equal(response[begun:], alone.responses[0][: 6 - begun])
        torch.testing.assert_close(
            found.logprobs[i][begun:], scores[i, begun : len(response)], atol=1e-5, rtol=0
        )
        assert not found.logprobs[i][:begun].any()
        assert found.texts[i] == policy.decode(response)
        assert torch.equal(found.prompts[i], prompt)


def test_a_limit_of_one_sample_cuts_it_and_no_other():
    policy = load_policy("tiny")
    prompts, settings = [policy.render(text) for text in "abc"], SamplingSettings(8)
    whole = generate(policy, prompts, settings, seeds=[1, 2, 3])
    cut = generate(policy, prompts, settings, seeds=[1, 2, 3], limits=[8, 2, 5])
    for i, limit in enumerate((8, 2, 5)):
        assert torch.equal(cut.responses[i], whole.responses[i][:limit])
        ends = bool(whole.finished[i]) and len(whole.responses[i]) <= limit
        assert bool(cut.finished[i]) == ends
    with pytest.raises(ValueError, match="limits must be at least 1"):
        generate(policy, prompts, settings, seeds=[1, 2, 3], limits=[8, 0, 5])


def test_a_function_of_texts_speaks_in_the_policys_tokens():
    policy = load_policy("tiny")
    seen = []

    def guide(prompts, beginnings):
        seen.append((prompts, beginnings))
        return ["bc", "bcdefgh"]

    rows = [{"prompt": "one"}, {"prompt": "two"}]
    prompts = [policy.render(row["prompt"]) for row in rows]
    beginnings = [policy.encode_response(text, end=False) for text in ("", "a")]
    found = TextSpeaker(guide, policy, 4)(rows, prompts, beginnings, [0, 0])
    assert seen == [(["one", "two"], ["", "a"])]
    assert found.texts == ["bc", "abcd"]
    assert found.finished.tolist() == [True, False]
    assert int(found.responses[0][-1]) in policy.end_tokens
    for answer, problem in ((["bc"], "list of 2 texts"), ([1, 2], "expected texts, got int")):
        with pytest.raises(PostgradError, match=problem):
            TextSpeaker(lambda *_, told=answer: told, policy, 4)(rows, prompts, beginnings, [0, 0])


def test_who_begins_and_who_ends():
    for scheme in ("ppo++", "aggrevated"):
        method = made(scheme=scheme, roll_in=1.0)
        batch = method.collect(0)
        h = batch.roll_ins
        assert (h >= 1).all() or scheme == "aggrevated"  # one that ends at once has no roll-in
        for i, text in enumerate(batch.texts):
            begins, ends = text[: int(h[i])], text[int(h[i]) :]
            of_guide = begins if scheme == "ppo++" else ends
            assert set(of_guide) <= {"z"}
        lengths = torch.tensor([len(response) for response in batch.responses])
        whole = torch.arange(int(lengths.max())) < lengths[:, None]
        policy, critic = roll_in_masks(whole, h, scheme)
        assert torch.equal(batch.mask, policy)
        assert torch.equal(batch.critic_mask, critic)


def test_without_roll_ins_it_is_ppo():
    plain = made(ActorCritic).collect(0)
    method = made(roll_in=0.0, supervised_weight=0.0)
    batch = method.collect(0)
    for name, value in plain.fields().items():
        found = batch.fields()[name]
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found, value, rtol=0, atol=0)
    assert batch.texts == plain.texts
    assert torch.equal(batch.critic_mask, plain.mask)
    value, _ = made(ActorCritic).loss(plain)
    assert torch.equal(method.loss(batch)[0], value)


def test_aggrevated_without_roll_ins_learns_nothing_and_stays_finite():
    method = made(
        scheme="aggrevated",
        roll_in=0.0,
        supervised_weight=0.0,
        guide=lambda prompts, beginnings: ["aeiou"] * len(beginnings),
    )
    before = weights(method.policy)
    batch, metrics = step(method, 0)
    assert batch.tokens == 0
    assert metrics["loss"] == metrics["gradient_norm"] == 0
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    assert metrics["value/loss"] > 0
    assert same(before, weights(method.policy))


def test_schemes_that_mix():
    def schemes(**config):
        method = made(**config)
        return [method.scheme(number) for number in range(40)]

    assert set(schemes(scheme="lols", ppo_share=1.0)) == {"ppo++"}
    assert set(schemes(scheme="lols", ppo_share=0.0)) == {"aggrevated"}
    assert 25 < schemes(scheme="lols", ppo_share=0.8).count("ppo++") < 40
    assert schemes(scheme="d2lols", switch_step=3) == ["aggrevated"] * 3 + ["ppo++"] * 37
    assert set(schemes(scheme="d2lols", switch_step=0)) == {"ppo++"}


def test_forced_tokens_do_not_matter_and_the_guide_gets_no_gradient():
    guide = load_policy("tiny", seed=1)
    method = made(guide=guide, roll_in=1.0, supervised_weight=0.0)
    batch = method.collect(0)
    value, _ = method.loss(batch)
    value.backward()
    assert all(p.grad is None for p in guide.parameters())
    gradient = {name: p.grad.clone() for name, p in method.policy.named_parameters()}
    method.policy.zero_grad()
    old = torch.where(batch.mask, batch.old_logprobs, -1e4)  # exp of the difference overflows
    again, _ = method.loss(batch.with_fields(old_logprobs=old))
    again.backward()
    assert torch.equal(again, value)
    for name, parameter in method.policy.named_parameters():
        assert torch.equal(parameter.grad, gradient[name])


def test_the_divergence_is_that_of_the_policys_own_tokens():
    method = made(guide=load_policy("tiny", seed=1), kl_coefficient=0.5, standardise=False)
    with torch.no_grad():
        for parameter in method.policy.parameters():
            parameter.mul_(1.05)
    batch = method.collect(0)
    difference = batch.old_logprobs - batch.reference_logprobs
    assert (difference[~batch.mask] == 0).all()
    assert (difference[batch.mask] != 0).all()
    penalty = batch.token_rewards.sum(1) - batch.reward
    torch.testing.assert_close(penalty, -0.5 * difference.sum(1), atol=1e-5, rtol=0)
    assert method.divergence(batch) == pytest.approx(float(difference.sum(1).mean()))


def test_each_scheme_has_its_critic():
    method = made(scheme="d2lols", switch_step=1, supervised_weight=0.0)
    assert list(method.modules()) == ["policy", "critic", "guide_critic"]
    for number, learns in ((0, "guide_critic"), (1, "critic")):
        before = {name: weights(module) for name, module in method.modules().items()}
        step(method, number)
        for name in ("critic", "guide_critic"):
            kept = same(before[name], weights(method.modules()[name]))
            assert kept == (name != learns)
    assert list(made(scheme="aggrevated").modules()) == ["policy", "critic"]


def test_the_likelihood_of_the_datas_completions_is_added():
    rows = [{**row, "completion": row["prompt"] * (i + 1)} for i, row in enumerate(ROWS)]
    with_it, without = (made(data=rows, supervised_weight=w) for w in (0.1, 0.0))
    (batch,) = list(made(data=rows, epochs=1, minibatches=1).minibatches(with_it.collect(0)))
    plain, _ = without.loss(batch)
    found, metrics = with_it.loss(batch)
    prompts = [with_it.policy.render(row["prompt"]) for row in rows]
    ends = [with_it.policy.encode_response(row["completion"])[:6] for row in rows]
    mean = with_it.policy.score(prompts, ends).logprobs.sum().item() / sum(map(len, ends))
    assert metrics["supervised/loss"] == pytest.approx(-mean, rel=1e-5)
    assert (found - plain).item() == pytest.approx(-0.1 * mean, rel=1e-4)
    parts = sum(with_it.loss(part)[0].item() for part in batch.split(20))
    assert parts == pytest.approx(found.item(), rel=1e-4)


# Real runs ----------------------------------------------------------------------------------


def test_it_learns(tmp_path):
    train(
        "rlgf",
        data=ROWS * 8,
        reward=vowels,
        guide=lambda prompts, beginnings: ["aeiou"] * len(beginnings),
        output=tmp_path,
        **{
            **SMALL,
            **SHORT,
            "steps": 10,
            "batch_size": 32,
            "minibatches": 1,
            "epochs": 4,
            "schedule": "constant",
            "learning_rate": 3e-3,
            "critic_rate": 1.0,
            "roll_in": 0.5,
        },
    )
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert sum(row["reward"] for row in rows[-3:]) > sum(row["reward"] for row in rows[:3]) + 0.45
    assert rows[-1]["supervised/loss"] < rows[0]["supervised/loss"] - 1


@pytest.mark.parametrize("scheme", ["lols", "d2lols"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, scheme):
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    load_policy("tiny", seed=1).save(tmp_path / "guide")
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "reward": f"{reward}:vowels",
        "guide": tmp_path / "guide",
        "scheme": scheme,
        "ppo_share": 0.5,
        "switch_step": 1,
        "schedule": "constant",
    }
    assert_resumes("rlgf", tmp_path, **settings)


def test_faults(tmp_path):
    with pytest.raises(PostgradError, match="guide: expected a folder"):
        made(guide=None)
    with pytest.raises(PostgradError, match=r"roll_in: .*less than or equal to 1, got 1.5"):
        made(roll_in=1.5)
    with pytest.raises(PostgradError, match="supervised_weight: rows, row 1 has neither"):
        made(data=[{"prompt": "a"}] * 8)
    with pytest.warns(UserWarning, match="switch_step: 20 of 10 steps"):
        made(scheme="d2lols", steps=10)
    broken = made(guide=lambda prompts, beginnings: 1 / 0)
    with pytest.raises(PostgradError, match=r"guide raised ZeroDivisionError.*test_rlgf.py"):
        broken.collect(0)
