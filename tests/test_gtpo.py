"""GTPO: conflict tokens and the entropy filter by hand, and the method on real rollouts."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.advantages.conflicts import (
    conflict_masks,
    conflict_weights,
    entropy_filter,
    longest_run,
    response_entropy,
)
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.gtpo import GTPO
from postgrad.objectives.policy_gradient import aggregate
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
CONSTANT = {**SMALL, "schedule": "constant"}  # the recipe's cosine depends on the run's length
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}


# Four responses: 0 is padding
IDS = torch.tensor([[1, 2, 5, 8, 9], [1, 2, 6, 8, 9], [1, 3, 7, 9, 0], [1, 2, 4, 9, 0]])
MASK = IDS > 0
BETTER = torch.tensor([0.5, -0.5, -0.5, 0.5])
ONE_GROUP = torch.zeros(4, dtype=torch.long)


def marked(rows):
    return torch.tensor([[token == "1" for token in row] for row in rows])


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def made(reward=letters, **config):
    settings = {"model": "tiny", **SHORT, **config}
    return GTPO(validated(GTPO.Config, settings), Place(), data=ROWS, reward=reward)


def test_conflict_tokens_are_shared_openings_and_endings():
    opening, ending = conflict_masks(IDS, MASK, BETTER, ONE_GROUP)
    assert opening.equal(marked(["11000", "11000", "10000", "11000"]))
    assert ending.equal(marked(["00011", "00011", "00010", "00010"]))
    assert (opening | ending).sum(1).tolist() == [4, 4, 2, 3]
    assert longest_run(opening, ending).tolist() == [2, 2, 1, 2]
    weights = conflict_weights(opening, ending, BETTER)
    expected = [[2, 2, 1, 2, 2], [0, 0, 1, 0, 0], [0, 1, 1, 0, 1], [2, 2, 1, 2, 1]]
    assert weights.tolist() == expected
    swapped = conflict_weights(*conflict_masks(IDS, MASK, -BETTER, ONE_GROUP), -BETTER)
    assert swapped.equal(2 - weights)


def test_the_worked_example_to_its_digits():
    """Four responses of entropies 0.2, 0.3, 0.9 and 0.1: coefficients of grad log pi and loss."""
    weights = conflict_weights(*conflict_masks(IDS, MASK, BETTER, ONE_GROUP), BETTER)
    entropy = torch.tensor([0.2, 0.3, 0.9, 0.1])
    keep = entropy_filter(entropy)
    assert keep.tolist() == [True, True, False, True]
    advantages = BETTER - 0.1 * entropy
    torch.testing.assert_close(advantages[keep], torch.tensor([0.48, -0.53, 0.49]))
    logprobs = torch.full((4, 5), -0.7, requires_grad=True)
    rho = (logprobs - logprobs.detach()).exp()
    loss = aggregate(
        -rho * advantages[:, None] * weights, MASK & keep[:, None], "sequence-mean", items=4
    )
    assert loss.item() == pytest.approx(-0.403875, abs=1e-6)
    loss.backward()
    expected = torch.tensor(
        [
            [0.048, 0.048, 0.024, 0.048, 0.048],
            [0, 0, -0.0265, 0, 0],
            [0, 0, 0, 0, 0],
            [0.06125, 0.06125, 0.030625, 0.06125, 0],
        ]
    )
    torch.testing.assert_close(-logprobs.grad, expected, atol=1e-7, rtol=0)


def random_responses(seed, tokens=6):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 3, (8, tokens), generator=random)
    lengths = torch.randint(1, tokens + 1, (8,), generator=random)
    mask = torch.arange(tokens) < lengths[:, None]
    better = torch.tensor([1.0, 1, -1, 0, 2, -1, -1, 0])
    groups = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
    return ids, mask, lengths, better, groups


@pytest.mark.parametrize("seed", range(5))
def test_runs_are_those_found_one_token_at_a_time(seed):
    ids, mask, lengths, better, groups = random_responses(seed)
    opening, ending = conflict_masks(ids, mask, better, groups)

    def contested(i, place):
        """Whether the token at `place` (negative: from the end) of response i is contested."""

        def has(j):
            inside = -lengths[j] <= place < lengths[j]
            return inside and ids[j, place % lengths[j]] == ids[i, place % lengths[i]]

        peers = [j for j in range(8) if groups[j] == groups[i]]
        return better[i] != 0 and all(
            any(has(j) for j in peers if better[j] * sign > 0) for sign in (1, -1)
        )

    for i in range(8):
        n = int(lengths[i])
        first = next((t for t in range(n) if not contested(i, t)), n)
        last = next((t for t in range(n) if not contested(i, -1 - t)), n)
        assert opening[i].tolist() == [t < first for t in range(6)]
        assert ending[i].tolist() == [n - last <= t < n for t in range(6)]


def test_the_ending_is_the_opening_of_the_responses_reversed():
    ids, mask, lengths, better, groups = random_responses(0)
    turned = torch.zeros_like(ids)
    for i, n in enumerate(lengths.tolist()):
        turned[i, :n] = ids[i, :n].flip(0)
    opening, ending = conflict_masks(ids, mask, better, groups)
    begins, ends = conflict_masks(turned, mask, better, groups)
    for i, n in enumerate(lengths.tolist()):
        assert ending[i, :n].equal(begins[i, :n].flip(0))
        assert opening[i, :n].equal(ends[i, :n].flip(0))


def test_a_response_that_others_share_whole_is_in_both_runs_once():
    ids = torch.tensor([[1, 2], [1, 2]])
    runs = conflict_masks(ids, ids > 0, torch.tensor([1.0, -1.0]), torch.zeros(2).long())
    better = torch.tensor([1.0, -1.0])
    assert conflict_weights(*runs, better).tolist() == [[2, 2], [0, 0]]
    assert conflict_weights(*runs, better, stack_runs=True).tolist() == [[4, 4], [0, 0]]


def test_the_filter_is_off_where_the_policy_was_uncertain_from_the_start():
    entropy = torch.tensor([0.1, math.log(2), 0.8])
    assert entropy_filter(entropy).tolist() == [True, entropy[1] <= math.log(2), False]
    assert entropy_filter(entropy, initial=0.5).tolist() == entropy_filter(entropy).tolist()
    assert entropy_filter(entropy, initial=0.7).all()
    means = response_entropy(torch.tensor([[1.0, 2, 9], [4, 9, 9]]), marked(["110", "000"]))
    assert means.tolist() == [1.5, 0]


def test_wrong_calls_are_refused():
    tokens = torch.ones(2, 3, dtype=torch.bool)
    for call, message in (
        (lambda: conflict_masks(IDS, MASK.flip(1), BETTER, ONE_GROUP), "first tokens of each row"),
        (lambda: conflict_masks(IDS[:, :2], MASK, BETTER, ONE_GROUP), "of its shape"),
        (lambda: conflict_masks(IDS, MASK, BETTER[:2], ONE_GROUP), "advantages and groups"),
        (lambda: conflict_masks(IDS, IDS, BETTER, ONE_GROUP), "boolean"),
        (lambda: conflict_weights(tokens, tokens, BETTER), r"must be \[2\]"),
        (lambda: entropy_filter(BETTER, 0.0), "above 0"),
        (lambda: entropy_filter(IDS.float()), r"must be \[N\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# The method ----------------------------------------------------------------------------------


def test_without_conflicts_entropy_and_filter_it_is_dr_grpo_over_the_mean_of_sequences():
    plain = made(
        mask={"name": "gtpo", "conflicts": False, "entropy_threshold": None},
        advantage={"name": "gtpo", "gamma": 0.0},
    )
    other = made(mask="none", advantage="centred")
    gradients = []
    for method in (plain, other):
        method.loss(method.collect(0))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.policy.parameters()]))
    torch.testing.assert_close(*gradients)


SHARP = {"samples": 8, "max_new_tokens": 5, "temperature": 0.1}  # so that responses agree


def test_the_loss_is_the_papers_on_real_rollouts():
    """The objective by loops, where some responses are uncertain and some tokens in conflict."""
    threshold = float(made(rollout=SHARP).collect(0).entropies.mean())
    method = made(
        rollout=SHARP,
        mask={"name": "gtpo", "compare_with_start": False, "entropy_threshold": threshold},
    )
    batch = method.collect(0)
    metrics = method.describe_batch(batch)
    assert 0 < metrics["mask/uncertain"] < 1
    assert 0 < metrics["mask/in_conflict"] < 1
    total = 0.0
    for i in range(len(batch)):
        n = len(batch.responses[i])
        entropy = float(batch.entropies[i, :n].mean())
        if entropy > threshold:
            continue
        rewards = batch.reward[batch.group == batch.group[i]]
        advantage = float(batch.reward[i] - rewards.mean()) - 0.1 * entropy
        total -= advantage * float(batch.token_weights[i, :n].sum()) / n
    assert method.loss(batch)[0].item() == pytest.approx(total / len(batch), abs=1e-5)


def test_conflict_tokens_of_worse_responses_have_no_gradient():
    method = made(rollout=SHARP)
    batch = method.collect(0)
    logprobs = method._score(batch).logprobs.detach().requires_grad_()
    scores = method._score(batch)
    scores = type(scores)(logprobs, scores.mask, None)
    method.token_losses(batch, scores)[0].sum().backward()
    means = torch.stack([batch.reward[batch.group == g].mean() for g in batch.group])
    worse, better = batch.reward < means - 1e-6, batch.reward > means + 1e-6
    assert set(batch.token_weights[better].flatten().tolist()) == {1.0, 2.0}
    assert set(batch.token_weights[worse].flatten().tolist()) == {0.0, 1.0}
    shared = (batch.token_weights == 0) & batch.mask
    assert bool((logprobs.grad[shared] == 0).all())
    assert bool((logprobs.grad[batch.mask & ~shared] != 0).all())


def test_with_equal_rewards_all_that_was_sampled_goes_down():
    method = made(lambda completions: [1.0] * len(completions))
    batch = method.collect(0)
    assert bool((batch.advantages < 0).all())
    assert method.describe_batch(batch)["advantage/entropy_shift"] == pytest.approx(
        -float(batch.advantages.mean()), abs=1e-6
    )
    assert bool((batch.token_weights == 1).all())


def test_an_uncertain_start_is_remembered(tmp_path):
    """The tiny model starts near ln 100: no response is left out, and none after a resume."""
    method = made()
    assert method.describe_batch(method.collect(0))["mask/uncertain"] == 0
    state = method.state_dict()
    assert state["mask"]["initial_entropy"] > math.log(2)
    other = made()
    other.load_state_dict({"mask": {"initial_entropy": 0.1}})
    with pytest.raises(PostgradError, match="every response of the step was left out"):
        other.collect(0)


def test_it_learns(tmp_path):
    settings = {**SMALL, **SHORT, "learning_rate": 5e-3}
    settings["rollout"] = {"samples": 8, "max_new_tokens": 4}
    train("gtpo", data=ROWS, reward=letters, steps=30, output=tmp_path / "run", **settings)
    rewards = [
        row["reward"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "reward" in row
    ]
    first, last = torch.tensor(rewards[:8]), torch.tensor(rewards[-8:])
    noise = float((first.var() / 8 + last.var() / 8).sqrt())
    assert float(last.mean() - first.mean()) > max(0.2, 4 * noise)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes("gtpo", tmp_path, data=data, reward="numeric", **CONSTANT, **SHORT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": {"samples": 1}}, "rollout.samples: .* at least 2"),
        ({"minibatches": 2}, "epochs, minibatches: the mask of GTPO .* got 2"),
        ({"sync_every": 2}, "sync_every, .*replay.*: the mask of GTPO .* no older policy"),
        ({"mask": {"entropy_threshold": 0}}, "mask.entropy_threshold: .*greater than 0"),
        ({"advantage": {"gamma": -1}}, "advantage.gamma: .*greater than or equal to 0"),
        ({"mask": {"stack": True}}, "mask: unknown key 'stack': did you mean 'stack_runs'"),
    ],
)
def test_a_bad_setting_is_named_before_anything_is_loaded(settings, message, tmp_path):
    given = {**SMALL, **SHORT, "data": ROWS, "reward": letters, "model": "no-such-folder"}
    with pytest.raises(PostgradError, match=message) as caught:
        train("gtpo", output=tmp_path / "run", **{**given, **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
