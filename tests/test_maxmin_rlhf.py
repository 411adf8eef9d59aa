"""MaxMin-RLHF: the worst-off group's reward, and groups learnt from users' pairs."""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch

from language_runs import SMALL, assert_resumes, assert_same_run, write_rows
from postgrad.advantages.maxmin import GroupWeights, maxmin_reward
from postgrad.api import resume, train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.rlhf.actor_critic import ActorCritic
from postgrad.methods.language.rlhf.maxmin_rlhf import MaxMinRLHF
from postgrad.models.scalar import load_scalar
from postgrad.objectives.mixture import (
    assign_users,
    em_reward_mixture,
    linear_reward,
    user_likelihoods,
)
from postgrad.training.record import read_rows

PROMPTS = [{"prompt": letter} for letter in "abcdefgh"]
# users 0, 3, 4 … like vowels and 1, 2, 5, 6 … like digits: not those of even and odd number
LIKES_DIGITS = (False, True, True, False)
PAIRS = [
    {
        "prompt": "abcdefgh"[i % 8],
        "chosen": "x7z5" if LIKES_DIGITS[user % 4] else "aezo",
        "rejected": "aezo" if LIKES_DIGITS[user % 4] else "x7z5",
        "user": f"user {user}",
    }
    for i in range(4)
    for user in range(8)
]
SHORT = {
    "batch_size": 8,
    "epochs": 2,
    "rollout": {"samples": 1, "max_new_tokens": 6},
    "frontier": {"max_new_tokens": 6},
    "reference_samples": 16,
}
EM = {"rounds": 3, "steps": 4, "batch_size": 8, "rate": 3.0}
REWARDS = """
def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]

def digits(completions):
    return [sum(letter.isdigit() for letter in text) / 6 for text in completions]
"""


def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]


def digits(completions):
    return [sum(letter.isdigit() for letter in text) / 6 for text in completions]


def made(reward=(vowels, digits), rows=PROMPTS, kind=MaxMinRLHF, steps=100, **config):
    values = {"model": "tiny", **SHORT, **config}
    if kind is ActorCritic:
        values.pop("reference_samples")
    given = {"data": rows, "eval_data": PROMPTS}
    reward = list(reward) if isinstance(reward, tuple) else reward
    found = kind(validated(kind.Config, values), Place(steps=steps), **given, reward=reward)
    found.check()
    return found


# The reward ---------------------------------------------------------------------------------

SCORES = torch.tensor([[1.0, -0.5, 2.0], [0.2, 0.4, 0.3]], dtype=torch.float64)


def test_the_worked_example_of_the_reward():
    assert maxmin_reward(SCORES, "group").tolist() == [0.2, 0.4, 0.3]
    assert float(maxmin_reward(SCORES, "group").mean()) == pytest.approx(0.3)
    assert maxmin_reward(SCORES, "sample").tolist() == [0.2, -0.5, 0.3]
    assert float(maxmin_reward(SCORES, "sample").mean()) == pytest.approx(0, abs=1e-12)


def test_the_form_of_weights_lies_between_groups():
    for weights, expected in (([1.0, 0.0], SCORES[0]), ([0.5, 0.5], SCORES.mean(0))):
        found = maxmin_reward(SCORES, "weights", torch.tensor(weights))
        torch.testing.assert_close(found, expected)


def test_identities_of_the_reward():
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randn(3, 7, generator=random, dtype=torch.float64)
        least = scores.mean(1).min()
        by_group, by_sample = (maxmin_reward(scores, form) for form in ("group", "sample"))
        assert float(by_group.mean()) == pytest.approx(float(least))
        assert by_sample.mean() <= by_group.mean()
        torch.testing.assert_close(maxmin_reward(scores + 5, "group"), by_group + 5)
        order = torch.randperm(3, generator=random)
        assert maxmin_reward(scores[order], "group").equal(by_group)
    same = scores[:1].repeat(3, 1)
    for form in ("group", "sample"):
        assert maxmin_reward(same, form).equal(scores[0])


def test_of_equal_groups_the_first_counts():
    scores = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert maxmin_reward(scores, "group").tolist() == [2.0, 0.0]


def test_weights_move_to_the_worse_off_and_come_back_from_a_checkpoint():
    weights = GroupWeights(3, 0.5)
    assert weights.value.tolist() == pytest.approx([1 / 3] * 3)
    weights.update(torch.tensor([1.0, 0.0, 2.0]))
    expected = torch.softmax(torch.tensor([-0.5, 0.0, -1.0], dtype=torch.float64), 0)
    torch.testing.assert_close(weights.value, expected)
    weights.update(torch.tensor([1.0, 0.0, 2.0]) + 7)  # a common level changes nothing
    expected = torch.softmax(torch.tensor([-1.0, 0.0, -2.0], dtype=torch.float64), 0)
    torch.testing.assert_close(weights.value, expected)
    other = GroupWeights(3, 0.5)
    other.load_state_dict(weights.state_dict())
    for one in (weights, other):
        one.update(torch.tensor([0.0, 3.0, 0.0]))
    assert other.value.equal(weights.value)
    greedy = GroupWeights(3, 1e4)
    greedy.update(torch.tensor([0.2, 0.1, 0.3]))
    assert greedy.value.tolist() == pytest.approx([0, 1, 0])


def test_the_saddle_point_is_the_tilt_by_the_weights():
    """Policies exp(sum_u lambda_u r_u / beta) / Z with lambda by exponentiated gradient.

    Where both groups have weight they are equally well off, and no other policy of that form
    serves the worst-off better, KL included.
    """
    rewards = torch.tensor([[2.0, 0.0, 1.2], [0.0, 3.0, 1.0]], dtype=torch.float64)
    beta, weights = 0.5, GroupWeights(2, 0.05)

    def served(lambdas):
        policy = (lambdas @ rewards / beta).softmax(0)
        divergence = (policy * (policy * 3).log()).sum()
        means = rewards @ policy
        return means, float(means.min() - beta * divergence)

    for _ in range(2000):
        weights.update(served(weights.value)[0])
    means, value = served(weights.value)
    assert float(means[0]) == pytest.approx(float(means[1]), abs=1e-6)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    best = max(served(torch.stack([share, 1 - share]))[1] for share in grid)
    assert best <= value < best + 2e-3


@pytest.mark.parametrize(
    ("scores", "arguments", "message"),
    [
        (torch.zeros(3), ("group",), r"\[U, N\]"),
        (torch.tensor([[1.0, torch.nan]]), ("sample",), "finite"),
        (SCORES, ("mean",), "'group', 'sample' or 'weights'"),
        (SCORES, ("group", torch.tensor([0.5, 0.5])), "weights go with"),
        (SCORES, ("weights",), "weights go with"),
        (SCORES, ("weights", torch.tensor([1.0])), "2 groups need as many"),
        (SCORES, ("weights", torch.tensor([0.9, 0.3])), "sum to 1"),
    ],
)
def test_a_wrong_call_says_why(scores, arguments, message):
    with pytest.raises(ValueError, match=message):
        maxmin_reward(scores, *arguments)


# The mixture --------------------------------------------------------------------------------


def test_the_worked_example_of_the_e_step():
    margins = torch.tensor([[0.5, -0.2], [1.0, -1.5]], dtype=torch.float64)
    found = user_likelihoods(margins, torch.tensor([0, 0]), 1)
    torch.testing.assert_close(
        found.squeeze(1), torch.tensor([-1.272216, -2.014675]).double(), atol=1e-6, rtol=0
    )
    assert assign_users(found).tolist() == [0]


def test_users_are_assigned_whole_and_large_margins_do_not_overflow():
    margins = torch.tensor([[900.0, -1.0, 0.0], [-1.0, 900.0, 0.0]])
    users = torch.tensor([0, 0, 1])
    found = user_likelihoods(margins, users, 2)
    assert found[:, 0].tolist() == pytest.approx([-1.313262] * 2)
    assert assign_users(found).tolist() == [0, 0]  # equals: the first
    assert assign_users(user_likelihoods(900 * margins, users, 2)).tolist() == [0, 0]


DECAY = 1e-3


class Linear:
    """Groups of users with linear utilities of differences `[N, d]`."""

    def __init__(self, seed, users=12, pairs=30):
        random = torch.Generator().manual_seed(seed)
        self.truth = (torch.arange(users) % 3 == 0).long()
        self.users = torch.arange(users).repeat_interleave(pairs)
        self.differences = torch.randn(users * pairs, 4, generator=random, dtype=torch.float64)
        weights = torch.tensor([[2.0, 1.0, 0, 0], [-2.0, 1.0, 0, 1.0]], dtype=torch.float64)
        margins = (self.differences * weights[self.truth[self.users]]).sum(1)
        lost = torch.rand(margins.shape, generator=random) > margins.sigmoid()
        self.differences[lost] *= -1

    def mixture(self, groups=2, **settings):
        return em_reward_mixture(
            partial(linear_reward, self.differences, decay=DECAY),
            lambda theta: self.differences @ theta,
            self.users,
            groups,
            generator=torch.Generator().manual_seed(0),
            **settings,
        )


@pytest.mark.parametrize("seed", range(3))
def test_em_finds_the_groups_and_its_likelihood_never_falls(seed):
    world = Linear(seed)
    found = world.mixture(restarts=5)
    history = torch.tensor(found.history)
    assert (history.diff() >= -1e-3).all()
    right = float((found.assignment == world.truth).double().mean())
    assert max(right, 1 - right) == 1.0
    assert found.likelihood == found.history[-1]
    assert found.likelihood >= world.mixture(restarts=1).likelihood


def test_a_linear_reward_is_at_the_minimum_wherever_it_starts():
    world = Linear(0)
    mine = world.users < 5
    expected = linear_reward(world.differences, mine, decay=0.5)
    wrong = torch.sigmoid(-(world.differences[mine] @ expected))
    gradient = world.differences[mine].T @ wrong - 0.5 * expected
    torch.testing.assert_close(gradient, torch.zeros(4).double(), atol=1e-8, rtol=0)
    far = linear_reward(world.differences, mine, -20 * expected, decay=0.5)
    torch.testing.assert_close(far, expected)
    with pytest.raises(ValueError, match="boolean"):
        linear_reward(world.differences, world.users)
    with pytest.raises(ValueError, match="decay"):
        linear_reward(world.differences, mine, decay=0.0)


def test_em_with_one_group_is_one_fit():
    world = Linear(0)
    found = world.mixture(groups=1, rounds=1)
    everyone = torch.ones(len(world.users), dtype=torch.bool)
    expected = linear_reward(world.differences, everyone, decay=DECAY)
    torch.testing.assert_close(found.models[0], expected)
    assert found.assignment.tolist() == [0] * 12


def test_em_needs_users_for_its_groups():
    with pytest.raises(ValueError, match="1 to 12 groups of 12 users, got 13"):
        Linear(0).mixture(groups=13)
    with pytest.raises(ValueError, match="each of 0 to 2 with a pair"):
        user_likelihoods(torch.zeros(1, 2), torch.tensor([0, 2]), 3)
    with pytest.raises(ValueError, match="finite"):
        user_likelihoods(torch.full((1, 1), torch.inf), torch.tensor([0]), 1)


# The method ---------------------------------------------------------------------------------


def test_with_one_reward_twice_it_is_plain_rlhf():
    def again(completions):
        return vowels(completions)

    for form in ("group", "sample", "weights"):
        found = made((vowels, again), reference_samples=0, maxmin=form).collect(0)
        plain = made(vowels, kind=ActorCritic).collect(0)
        torch.testing.assert_close(found.reward, plain.reward)
        torch.testing.assert_close(found.advantages, plain.advantages)


def test_with_one_reward_it_says_that_it_is_plain_rlhf():
    with pytest.warns(UserWarning, match="plain RLHF"):
        found = made(vowels, reference_samples=0)
    torch.testing.assert_close(
        found.collect(0).token_rewards, made(vowels, kind=ActorCritic).collect(0).token_rewards
    )


def test_the_worst_off_group_is_the_one_in_the_metrics():
    found = made(reference_samples=0)
    batch = found.collect(0)
    means = [sum(f(batch.texts)) / 8 for f in (vowels, digits)]
    metrics = found.describe_batch(batch)
    assert metrics["reward/vowels"] == pytest.approx(means[0])
    assert metrics["reward/digits"] == pytest.approx(means[1])
    assert metrics["maxmin/value"] == pytest.approx(min(means)) == pytest.approx(metrics["reward"])
    assert metrics["maxmin/worst_group"] == 1 + means.index(min(means))


def test_rewards_of_the_reference_have_mean_0_and_deviation_1():
    """Whatever their scale and level: 100 x + 7 is worth what x is."""

    def shifted(completions):
        return [100 * value + 7 for value in vowels(completions)]

    found = made((vowels, shifted), reference_samples=400)
    batch = found.collect(0)
    scores = found.scores({n: batch.fields()[f"reward/{n}"] for n in ("vowels", "shifted")})
    torch.testing.assert_close(scores[0], scores[1], atol=1e-3, rtol=0)
    assert batch.fields()["reward/shifted"].mean() > 7  # metrics are of what was given
    many = [found.collect(step) for step in range(12)]
    every = torch.cat([part.reward for part in many])
    assert float(every.mean()) == pytest.approx(0, abs=0.3)
    assert float(every.std()) == pytest.approx(1, abs=0.3)


def test_the_weights_follow_the_worse_off(tmp_path):
    run = train(
        "maxmin-rlhf",
        data=PROMPTS,
        eval_data=write_rows(tmp_path / "held.jsonl", PROMPTS),
        reward=[vowels, digits],
        maxmin="weights",
        weights_rate=20.0,
        output=tmp_path / "run",
        steps=3,
        **{**SMALL, **SHORT, "reference_samples": 0},
    )
    rows = [r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "reward" in r]
    assert rows[0]["maxmin/weight/vowels"] == 0.5
    for before, after in pairwise(rows):
        gap = before["reward/vowels"] - before["reward/digits"]
        shift = after["maxmin/weight/vowels"] - before["maxmin/weight/vowels"]
        assert gap * shift < 0
    found = run.evaluation
    assert found["reward"] == pytest.approx(min(found["reward/vowels"], found["reward/digits"]))


def learnt(tmp_path, em=EM, **settings):
    return {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "pairs.jsonl", PAIRS),
        "em": {**EM, **em},
        **settings,
    }


@pytest.mark.parametrize("start", ["states", "turns"])
def test_groups_are_found_from_users_and_the_policy_serves_both(start, tmp_path):
    train(
        "maxmin-rlhf",
        output=tmp_path / "run",
        steps=20,
        **learnt(
            tmp_path, {"start": start}, eval_data=write_rows(tmp_path / "held.jsonl", PROMPTS)
        ),
    )
    groups = json.loads((tmp_path / "run" / "model" / "groups.json").read_text())
    found = {digits: {groups[f"user {u}"] for u in range(8) if LIKES_DIGITS[u % 4] == digits}
             for digits in (False, True)}  # fmt: skip
    assert len(found[False]) == len(found[True]) == 1
    assert found[False] != found[True]
    (of_vowels,) = found[False]
    model = load_scalar(str(tmp_path / "run" / "model" / of_vowels))
    prompt = model.render("a")
    texts = [model.encode_response(text) for text in ("aezo", "x7z5")]
    first, second = model.rewards([prompt] * 2, texts).tolist()
    assert first > second
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    learning = [row for row in rows if "users/group-1" in row]
    assert len(learning) == 12
    assert learning[-1]["accuracy"] > 0.9
    assert learning[-1]["likelihood"] > learning[4]["likelihood"]
    assert len([row for row in rows if "maxmin/value" in row]) == 8


def test_it_learns_for_both(tmp_path):
    train(
        "maxmin-rlhf",
        data=PROMPTS * 8,
        reward=[vowels, digits],
        output=tmp_path,
        **{
            **SMALL,
            **SHORT,
            "steps": 14,
            "batch_size": 32,
            "epochs": 4,
            "learning_rate": 3e-3,
            "critic_rate": 1.0,
            "kl_coefficient": 0.0,
            "reference_samples": 0,
            "maxmin": "weights",
            "weights_rate": 1.0,
        },
    )
    rows = read_rows(tmp_path / "metrics.jsonl")
    worst = [min(row["reward/vowels"], row["reward/digits"]) for row in rows]
    assert sum(worst[-3:]) > sum(worst[:3]) + 0.2


@pytest.mark.parametrize("first", [3, 6], ids=["learning rewards", "learning the policy"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(first, tmp_path):
    em = {"rounds": 2, "steps": 2, "batch_size": 8, "rate": 3.0}
    settings = learnt(tmp_path, maxmin="weights", em=em, save_every=first, keep_checkpoints=9)
    train("maxmin-rlhf", steps=8, output=tmp_path / "whole", **settings)
    train("maxmin-rlhf", steps=8, output=tmp_path / "parts", **settings)
    for later in range(first + 1, 9):
        folder = tmp_path / "parts" / "checkpoints" / f"step-{later:08d}"
        (folder / "manifest.json").unlink(missing_ok=True)
    resume(tmp_path / "parts", steps=8, allow_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_given_rewards_by_name_resume_too(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", PROMPTS),
        "reward": [f"{tmp_path}/rewards.py:{name}" for name in ("vowels", "digits")],
    }
    assert_resumes("maxmin-rlhf", tmp_path, **settings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"reward": None}, "reward: rows brings no verifier"),
        ({"reward": None, "rows": [{**PAIRS[0]}, {**PAIRS[1], "user": None}]},
         "rows, row 2: column 'user' is missing or empty"),
        ({"reward": None, "rows": PAIRS, "em": {"groups": 9}},
         "em.groups: rows has pairs of 8 users, who cannot form 9 groups"),
        ({"reward": None, "rows": PAIRS, "em": EM, "steps": 12},
         "steps: expected more than the em.rounds x em.steps = 12"),
        ({"maxmin": "mean"}, "maxmin: "),
        ({"weights_rate": 0}, "weights_rate: .*greater than 0"),
    ],
)  # fmt: skip
def test_faults_are_named_before_any_step(setting, message):
    with pytest.raises(PostgradError, match=message) as caught:
        made(**setting)
    assert "\n" not in str(caught.value)
