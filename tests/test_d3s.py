"""D3S: the choice of responses against brute force, that of tokens, and both in real updates."""

import itertools

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.advantages.group import group_standardised
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.d3s import D3S
from postgrad.methods.language.verifiable.policy_gradient import PolicyGradient
from postgrad.objectives.policy_gradient import importance_ratio
from postgrad.sampling.down_sampling import LinearSchedule, select_max_variance, select_tokens
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}
EVERYTHING = {
    f"{what}_{when}": 1.0 for what in ("responses", "tokens") for when in ("initial", "final")
}


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def made(kind=D3S, steps=10, **config):
    settings = {"model": "tiny", **SHORT, **config}
    place = Place(steps=steps)
    return kind(validated(kind.Config, settings), place, data=ROWS, reward=letters)


# The choice of responses ---------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 10))
def test_the_choice_has_the_largest_variance_of_all_subsets(n):
    values = torch.randn(9, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    found = select_max_variance(values, n)
    best = max(float(values[list(some)].var()) for some in itertools.combinations(range(9), n))
    assert len(set(found.tolist())) == n
    assert float(values[found].var()) == pytest.approx(best)
    # the same for any multiple
    assert select_max_variance(-3 * values, n).equal(found)


def test_the_worked_example():
    """Three groups of four, population deviation: 4 of 12 responses with variance 5/3."""
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1])
    groups = torch.arange(3).repeat_interleave(4)
    advantages = group_standardised(rewards, groups, "population", 0.0)
    found = advantages[select_max_variance(advantages, 4)]
    expected = torch.tensor([-1.732051, -0.577350, 0.577350, 1.732051])
    torch.testing.assert_close(found.sort().values, expected, atol=1e-6, rtol=0)
    assert float(found.var(correction=0)) == pytest.approx(1.666667, abs=1e-6)
    # what has no advantage is taken only when nothing else is left
    assert not bool((advantages[select_max_variance(advantages, 8)] == 0).any())
    assert int((advantages[select_max_variance(advantages, 9)] == 0).sum()) == 1


@pytest.mark.parametrize("n", range(2, 9))
def test_a_standardised_set_has_subsets_of_at_least_its_own_variance(n):
    """Lemma 1 of the paper, with the unbiased variance."""
    for values in (torch.randn(8), torch.tensor([1.0, -1] * 4), torch.arange(8.0)):
        values = (values - values.mean()) / values.std(correction=0)
        assert float(values[select_max_variance(values, n)].var()) >= 8 / 7 - 1e-5


def test_ties_are_broken_the_same_way_every_time():
    values = torch.tensor([1.0, -1, 1, -1, 1, -1])
    first = select_max_variance(values, 2)
    assert sorted(values[first].tolist()) == [-1, 1]
    assert select_max_variance(values, 2).equal(first)


def test_each_group_has_its_own_choice():
    values = torch.tensor([0.0, 9, 1, 8, 5, 7, 6, 5])
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    found = select_max_variance(values, 2, groups)
    assert found.tolist() == [0, 1, 6, 7]  # in each, the smallest and the largest


def test_tokens_of_the_largest_keys():
    keys = torch.tensor([1.732051, 1.732051, 1.732051, 0.577350]) * torch.tensor(
        [0.1, 0.9, 0.4, 0.6]
    )
    expected = torch.tensor([0.173205, 1.558846, 0.692820, 0.346410])
    torch.testing.assert_close(keys, expected, atol=1e-6, rtol=0)
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert select_tokens(keys[None], mask, 0.5).tolist() == [[False, True, True, False]]


def test_padding_is_never_chosen_and_ties_do_not_add_tokens():
    keys = torch.tensor([[0.0, 0, 5], [3, 2, 1]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert select_tokens(keys, mask, 1.0).equal(mask)
    assert select_tokens(keys, mask, 0.6).tolist() == [[False] * 3, [True] * 3]
    assert select_tokens(keys, mask, 0.8).sum() == 4  # one of two zeros
    wide = torch.cat([mask, mask], 1)  # a part of a larger mask is one as well
    assert select_tokens(keys, wide[:, :3], 0.8).equal(select_tokens(keys, mask, 0.8))
    own = select_tokens(keys, mask, 0.5, "response")
    assert own.sum(1).tolist() == [1, 2]
    assert select_tokens(keys, mask, 0.01).sum() == 1


def test_schedules_begin_and_end_exactly():
    schedule = LinearSchedule(0.2, 0.7)
    assert [schedule.at(p) for p in (0.0, 1.0)] == [0.2, 0.7]
    assert schedule.at(0.5) == pytest.approx(0.45)


def test_wrong_calls_are_refused():
    values, mask = torch.arange(4.0), torch.ones(2, 2, dtype=torch.bool)
    for call, message in (
        (lambda: select_max_variance(values, 1), "between 2 and 4, got 1"),
        (lambda: select_max_variance(values, 5), "between 2 and 4, got 5"),
        (lambda: select_max_variance(values[None], 2), r"\[N\]"),
        (lambda: select_max_variance(values / 0, 2), "finite"),
        (lambda: select_max_variance(values, 2, torch.zeros(3)), "groups must be"),
        (lambda: select_max_variance(values, 2, torch.tensor([0, 0, 0, 1])), "2 and 1"),
        (lambda: select_tokens(values.view(2, 2), mask, 0.0), "fraction"),
        (lambda: select_tokens(values, mask, 0.5), "of its shape"),
        (lambda: select_tokens(values.view(2, 2), mask, 0.5, "token"), "scope"),
        (lambda: LinearSchedule(0, 1).at(1.5), "progress"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# The method ----------------------------------------------------------------------------------


def test_with_everything_chosen_it_is_grpo_over_all_tokens():
    ours = made(mask={"name": "d3s", **EVERYTHING})
    plain = made(PolicyGradient, advantage="standardised")
    gradients = []
    for method in (ours, plain):
        method.loss(method.collect(0))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.policy.parameters()]))
    torch.testing.assert_close(*gradients)


def test_only_what_is_chosen_is_scored_for_the_update():
    method = made(mask={"name": "d3s", "responses_initial": 0.5})
    scored = []
    score = method.policy.score
    method.policy.score = lambda *args, **more: scored.append(len(args[0])) or score(*args, **more)
    batch = method.collect(0)
    assert len(batch) == 8
    method.loss(batch)
    assert scored == [8, 8]
    metrics = method.describe_batch(batch)
    assert metrics["selected/responses"] == 8
    assert metrics["selected/tokens"] == int(batch.mask.sum()) == batch.tokens
    lengths = sum(len(response) for response in batch.responses)
    assert batch.tokens == round(0.2 * lengths)


def test_both_shares_grow_with_the_run():
    method = made(steps=4)
    sizes = [len(method.collect(step)) for step in range(4)]
    assert sizes == [4, 7, 10, 13]


def test_the_reward_is_that_of_all_samples():
    ours, plain = made(), made(PolicyGradient)
    batch = ours.collect(0)
    expected = plain.describe_batch(plain.collect(0))["reward"]
    assert ours.describe_batch(batch)["reward"] == pytest.approx(expected)
    assert float(batch.reward.mean()) != pytest.approx(expected)


def test_groups_can_be_chosen_from_one_by_one_or_first():
    within = made(mask={"name": "d3s", "across": "group", "responses_initial": 0.5}).collect(0)
    assert within.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    two = made(mask={"name": "d3s", "per_group": 0.5, "responses_initial": 0.25}).collect(0)
    assert len(two) == 4
    assert max(two.group.unique(return_counts=True)[1]) <= 2


def test_the_ratio_of_a_response_is_that_of_all_its_tokens():
    method = made(
        mask={"name": "d3s", "clip_low": 0.9, "clip_high": 9.0}, gradient="sequence", minibatches=2
    )
    batch = method.collect(0)
    moved(method, 0.02)
    with torch.no_grad():
        scores = method._score(batch)
        losses, _ = method.token_losses(batch, scores)
        loss = method.loss(batch)[0]
    every = importance_ratio(
        scores.logprobs, batch.old_logprobs[:, : scores.mask.shape[1]], scores.mask, "sequence"
    )
    torch.testing.assert_close(losses, -every * batch.advantages[:, None])
    chosen = batch.mask[:, : losses.shape[1]]
    assert int(chosen.sum()) < int(scores.mask.sum())
    assert loss.item() == pytest.approx(losses[chosen].mean().item(), abs=1e-6)


def test_it_goes_with_another_method():
    method = made(PolicyGradient, mask="d3s", advantage="leave-one-out")
    assert len(method.collect(0)) == 4


def test_it_learns_from_few_tokens(tmp_path):
    settings = {**SMALL, **SHORT, "learning_rate": 5e-3, "steps": 30}
    settings["rollout"] = {"samples": 8, "max_new_tokens": 4}
    train("d3s", data=ROWS, reward=letters, output=tmp_path / "run", **settings)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    rewards = torch.tensor([row["reward"] for row in rows])
    first, last = rewards[:8], rewards[-8:]
    noise = float((first.var() / 8 + last.var() / 8).sqrt())
    assert float(last.mean() - first.mean()) > max(0.2, 4 * noise)
    trained = sum(row["selected/tokens"] for row in rows)
    assert trained < 0.5 * 30 * 32 * 4


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    """At constant shares, as schedules depend on the length of the run."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    mask = {"responses_final": 0.25, "tokens_final": 0.2}
    assert_resumes("d3s", tmp_path, data=data, reward="numeric", mask=mask, **SMALL, **SHORT)


def test_schedules_that_fall_are_pointed_out():
    with pytest.warns(UserWarning, match="mask.tokens_initial is above mask.tokens_final"):
        made(mask={"name": "d3s", "tokens_initial": 0.5, "tokens_final": 0.2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": {"responses_initial": 0.05}}, "mask.responses_initial: .* 0.05 of 16 are 1"),
        ({"mask": {"across": "group"}}, "mask.responses_initial: .* 0.25 of 4 are 1"),
        ({"mask": {"per_group": 0.25}}, "mask.per_group: .* 0.25 of 4 are 1"),
        ({"mask": {"tokens_final": 0.0}}, "mask.tokens_final: .*greater than 0"),
        ({"mask": {"tokens_final": 1.5}}, "mask.tokens_final: .*less than or equal to 1"),
        ({"mask": {"scope": "token"}}, "mask.scope: .*batch"),
        ({"rollout": {"samples": 1}, "batch_size": 8}, "rollout.samples: .* at least 2"),
    ],
)
def test_a_bad_setting_is_named_before_anything_is_loaded(settings, message, tmp_path):
    given = {**SMALL, **SHORT, "data": ROWS, "reward": letters, "model": "no-such-folder"}
    with pytest.raises(PostgradError, match=message) as caught:
        train("d3s", output=tmp_path / "run", **{**given, **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
