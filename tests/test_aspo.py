"""ASPO: the bounded bias and its limits, the reward that it replaces, and runs of the method."""

import random

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.advantages.group import group_standardised
from postgrad.advantages.shaping import shape_advantage, shaped_rewards
from postgrad.catalogue import method_class
from postgrad.claims.stepping import train_in_steps
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.models.language import load_policy
from postgrad.sampling.conversations import first_replies

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
TOOL = {"name": "calculator", "opening": "a", "closing": "e"}
PLACES = torch.tensor([100.0, 400.0, 1000.0, 7.0])
LENGTHS = torch.tensor([900.0, 1000.0, 1400.0, 80.0])
ADVANTAGES = torch.tensor([0.8, 0.8, 0.8, -0.8])
RIGHT = torch.tensor([True, True, True, False])
ONE = torch.zeros(4, dtype=torch.long)


def ragged(seed=0, count=40):
    draw = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 5, (count,), generator=draw)
    advantages = torch.randn(count, generator=draw)
    eligible = torch.rand(count, generator=draw) < 0.6
    places = torch.rand(count, generator=draw) * 50
    return advantages, eligible, places, places + 10, groups


# The pure functions ------------------------------------------------------------------------------


def test_the_worked_example():
    shaped = shape_advantage(ADVANTAGES, RIGHT, PLACES, LENGTHS, ONE)
    expected = torch.tensor([1.36, 0.981818, 0.24, -0.8])
    torch.testing.assert_close(shaped, expected, atol=1e-6, rtol=0)
    # the raw bias, within bounds that are wide enough
    wide = shape_advantage(10 * ADVANTAGES, RIGHT, PLACES, LENGTHS, ONE) - 10 * ADVANTAGES
    expected = torch.tensor([0.727273, 0.181818, -0.909091, 0.0])
    torch.testing.assert_close(wide, expected, atol=1e-5, rtol=0)


def test_the_reward_punishes_correct_answers():
    rewards = shaped_rewards(torch.ones(3), RIGHT[:3], PLACES[:3], ONE[:3])
    expected = torch.tensor([0.087287, 0.021822, -0.109109])
    torch.testing.assert_close(rewards - 1, expected, atol=1e-6, rtol=0)
    expected = torch.tensor([0.872872, 0.218218, -1.091089])
    found = group_standardised(rewards, ONE[:3], eps=0.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    far = torch.tensor([0.0] * 9 + [1000.0])
    shaped = shaped_rewards(torch.ones(10), far >= 0, far, torch.zeros(10).long(), limit=1.5)
    assert float(shaped[-1]) == pytest.approx(1 - 0.1 * 1.5)


def test_nothing_changes_without_weight_or_company():
    advantages, eligible, places, lengths, groups = ragged()
    for settings in ({"delta": 0.0}, {"bound": 0.0}):
        same = shape_advantage(advantages, eligible, places, lengths, groups, **settings)
        assert same.equal(advantages)
    alone = torch.zeros_like(eligible)
    alone[groups.argsort()[0]] = True
    assert shape_advantage(advantages, alone, places, lengths, groups).equal(advantages)
    assert shaped_rewards(advantages, alone, places, groups).equal(advantages)
    none = torch.zeros_like(eligible)
    assert shape_advantage(advantages, none, places, lengths, groups).equal(advantages)


def test_no_sign_changes_and_what_is_not_eligible_stays():
    advantages, eligible, places, lengths, groups = ragged()
    shaped = shape_advantage(advantages, eligible, places, lengths, groups, delta=-50, bound=0.99)
    assert shaped.sign().equal(advantages.sign())
    assert shaped[~eligible].equal(advantages[~eligible])
    assert bool((shaped[eligible] != advantages[eligible]).any())
    zero = shape_advantage(torch.zeros(4), RIGHT, PLACES, LENGTHS, ONE)
    assert zero.equal(torch.zeros(4))


def test_level_and_unit_of_the_places_do_not_matter_and_biases_cancel():
    advantages, eligible, places, lengths, groups = ragged()
    shaped = shape_advantage(advantages, eligible, places, lengths, groups)
    moved = shape_advantage(advantages, eligible, places + 11, lengths, groups)
    torch.testing.assert_close(moved, shaped, atol=1e-5, rtol=0)
    scaled = shape_advantage(advantages, eligible, 3 * places, 3 * lengths, groups)
    torch.testing.assert_close(scaled, shaped, atol=1e-5, rtol=0)
    large = torch.full_like(advantages, 1e3)
    bias = shape_advantage(large, eligible, places, lengths, groups) - large
    sums = torch.zeros(5).index_add(0, groups, bias)
    torch.testing.assert_close(sums, torch.zeros(5), atol=2e-3, rtol=0)


def test_wrong_calls_are_refused():
    good = [ADVANTAGES, RIGHT, PLACES, LENGTHS, ONE]
    for place, wrong, message in (
        (0, ADVANTAGES[:3], r"all must be \[N\]"),
        (1, RIGHT.float(), "eligible must be boolean"),
        (2, torch.full((4,), torch.nan), "finite feature"),
        (3, torch.zeros(4), "must be positive"),
        (4, ONE.float(), "groups integer"),
    ):
        call = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises(ValueError, match=message):
            shape_advantage(*call)
    for settings, message in (({"delta": float("nan")}, "delta"), ({"bound": 1.0}, "bound")):
        with pytest.raises(ValueError, match=message):
            shape_advantage(*good, **settings)
    with pytest.raises(ValueError, match="limit above 0"):
        shaped_rewards(ADVANTAGES, RIGHT, PLACES, ONE, limit=0.0)


def test_the_first_call_is_found_by_the_turns():
    written = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    turns = torch.tensor([[0, 0, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    lengths = torch.tensor([4, 4, 3])
    # a reply; a reply without tokens; no call, and padding
    assert first_replies(written, turns, lengths).tolist() == [2, 1, -1]
    with pytest.raises(ValueError, match="must be"):
        first_replies(written, turns[:, :3], lengths)


# The method --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caller():
    """A model that calls after 0 to 8 dots, and is right or wrong whatever their number."""
    choose = random.Random(0)
    shown = [
        {"prompt": row["prompt"],
         "completion": "." * choose.randint(0, 8) + "[1]1" + choose.choice("xy")}
        for row in ROWS * 40
    ]  # fmt: skip
    policy = load_policy("tiny")
    given = {"model": policy, "data": shown}
    for _ in train_in_steps("sft", 0, given, steps=60, batch_size=16, learning_rate=3e-3):
        pass
    return policy.state_dict()


def loaded(weights):
    policy = load_policy("tiny")
    policy.load_state_dict(weights)
    return policy


CALLING = {
    "tool": "calculator",
    "batch_size": 8,
    "rollout": {"samples": 8, "max_new_tokens": 16},
}


def ends_in_x(completions):
    return [float(text.endswith("x")) for text in completions]


def half(completions):
    return [float(text[-1:].isalpha()) for text in completions]


def made(slug="aspo", reward=half, model="tiny", **config):
    kind = method_class(slug)
    given = {} if isinstance(model, str) else {"model": model}
    values = {**CALLING, **config, **({} if given else {"model": model})}
    return kind(validated(kind.Config, values), Place(), data=ROWS, reward=reward, **given)


def test_advantages_are_dapos_but_of_correct_calls(caller):
    method = made(reward=ends_in_x, model=loaded(caller))
    batch = method.collect(0)
    plain = group_standardised(batch.reward, batch.group)
    place = first_replies(batch.written, batch.turns, batch.cost)
    called = [text.find("]") + 1 or -1 for text in batch.texts]  # one token a character
    assert sum(found == there for found, there in zip(place.tolist(), called, strict=True)) > 50
    eligible = (batch.reward == 1) & (place >= 0)
    changed = batch.advantages != plain
    assert int(changed.sum()) > 10
    assert not bool((changed & ~eligible).any())
    assert batch.advantages.sign().equal(plain.sign())
    for group in batch.group.unique():
        here = (batch.group == group) & eligible
        order = place[here].argsort()
        assert bool((batch.advantages[here][order].diff() <= 1e-6).all())
    metrics = method.describe_batch(batch)
    assert 0.8 < metrics["tool/share"] <= 1
    assert 3 < metrics["tool/first"] < 10
    assert 0.8 < metrics["tool/rounds"] < 2


def test_it_composes_with_any_policy_gradient():
    batch = made("grpo", tool="none", advantage="early-call").collect(0)
    assert batch.advantages.equal(group_standardised(batch.reward, batch.group))


def test_calls_come_earlier_and_answers_stay_right(caller):
    # all calls of the last five steps of two runs: a late policy may hardly call in one of them
    first, right = {}, {}
    for slug in ("dapo", "aspo"):
        places, right[slug] = [], 0.0
        for seed in (1, 3):
            of_steps = []

            def collected(method, step, of_steps=of_steps):
                batch = method.collect(step)
                place = first_replies(batch.written, batch.turns, batch.cost)
                of_steps.append(place[place >= 0].float())
                return batch

            given = {"model": loaded(caller), "data": ROWS, "reward": ends_in_x}
            steps = train_in_steps(
                slug, seed, given, collected, steps=25, learning_rate=4e-4, precision="fp32",
                **CALLING,
            )  # fmt: skip
            right[slug] += [metrics["reward"] for _, metrics in steps][-1] / 2
            places += of_steps[-5:]
        assert len(torch.cat(places)) > 100
        first[slug] = float(torch.cat(places).mean())
    assert first["aspo"] < first["dapo"] - 0.4
    assert right["aspo"] > right["dapo"] - 0.1


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def half(completions):\n    return [float(t[-1:].isalpha()) for t in completions]\n"
    )
    assert_resumes(
        "aspo", tmp_path, data=data, reward=f"{reward}:half", tool=TOOL, batch_size=4,
        rollout={"samples": 4, "max_new_tokens": 40}, **SMALL,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tool": "none"}, "tool: aspo prefers early calls .*calculator.*got 'none'"),
        ({"max_turns": 1}, "max_turns: .* at least 2 turns, got 1"),
        ({"advantage": {"name": "early-call", "delta": 0.5}}, "delta"),
        ({"advantage": {"name": "early-call", "delta": float("nan")}}, "delta"),
        ({"advantage": {"name": "early-call", "bound": 1.0}}, "bound"),
        ({"rollout": {"samples": 1, "max_new_tokens": 6}}, "rollout.samples: .* at least 2"),
    ],
)
def test_faults_give_one_line(config, message):
    with pytest.raises(PostgradError, match=message) as caught:
        made(**config)
    assert "\n" not in str(caught.value)
