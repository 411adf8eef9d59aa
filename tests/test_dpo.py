"""DPO and what all pairwise preference methods share, on real runs of the tiny model."""

import math

import pytest
import torch

from language_runs import (
    SMALL,
    assert_resumes,
    moved,
    untimed,
    with_margins,
    write_rows,
)
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.comparisons import accuracy, compared
from postgrad.methods.language.preference.dpo import DPO, DPOSettings
from postgrad.models.language import LoraSettings, load_policy
from postgrad.training.checkpoint import load_latest
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [
    {"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1 + i % 3}, no doubt"}
    for i in range(20)
]


def pairs_file(folder, rows=ROWS):
    return write_rows(folder / "pairs.jsonl", rows)


def made(config=None, rows=ROWS, **objects):
    values = {"model": "tiny", "batch_size": 8, **(config or {})}
    return DPO(validated(DPOSettings, values), Place(), data=rows, **objects)


def gradients(method, batch, budget=None):
    """The gradients that one step of the loop would take."""
    method.policy.zero_grad(set_to_none=True)
    settings = LoopSettings(learning_rate=1e-12, clip_norm=0, token_budget=budget)
    metrics = Optimisers(method.modules(), settings, torch.device("cpu"))(method.loss, batch)
    return metrics, {name: p.grad.clone() for name, p in method.policy.named_parameters()}


def test_at_the_reference_loss_is_log_two_and_accuracy_a_tie():
    method = made(eval_data=ROWS)
    with torch.no_grad():
        loss, metrics = method.loss(method.collect(0))
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/accuracy"] == 0.5
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0.0
    with torch.no_grad():
        held_out = method.evaluate()
    assert held_out["accuracy"] == 0.5
    assert held_out["margin"] == 0.0
    assert held_out["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_accuracy_counts_ties_half():
    rewards = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.1, 0.0]])
    unscored, present = torch.full((4, 2), torch.nan), torch.ones(4, 2, dtype=torch.bool)
    assert accuracy(rewards, unscored, present) == 0.625


def test_accuracy_of_lists_leaves_out_equal_scores_and_what_is_not_there():
    rewards = torch.tensor([[3.0, 2.0, 9.0], [1.0, 2.0, 9.0]])
    scores = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, torch.nan]])
    present = torch.tensor([[True, True, True], [True, True, False]])
    # 3 > 2 right, 3 > 9 wrong, 2 > 9 not asked (equal scores), 1 > 2 wrong
    assert accuracy(rewards, scores, present) == pytest.approx(1 / 3)


def test_the_margin_is_that_of_plain_sequence_log_probabilities():
    """Against an independent computation: one sequence at a time, no padding, no sharing."""
    method = moved(made({"beta": 0.5}))
    batch = method.collect(0)
    frozen = load_policy("tiny").network

    def logprob(network, prompt, response):
        ids = torch.cat([prompt, response])[None]
        table = network(input_ids=ids).logits[0].log_softmax(-1)
        return float(sum(table[len(prompt) - 1 + t, token] for t, token in enumerate(response)))

    losses = []
    with torch.no_grad():
        for prompt, (chosen, rejected) in zip(batch.prompts, batch.responses, strict=True):
            delta = (
                logprob(method.policy.network, prompt, chosen)
                - logprob(frozen, prompt, chosen)
                - logprob(method.policy.network, prompt, rejected)
                + logprob(frozen, prompt, rejected)
            )
            losses.append(math.log1p(math.exp(-0.5 * delta)))
        loss, _ = method.loss(batch)
    assert float(loss) == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_the_first_gradient_is_half_beta_times_the_difference_of_scores():
    """Equation 8 at the reference, where every pair's weight is 1/2."""
    method = made({"beta": 0.2})
    batch = method.collect(0)
    _, got = gradients(method, batch)
    method.policy.zero_grad(set_to_none=True)
    chosen, rejected = zip(*batch.responses, strict=True)
    scores = method.policy.score(batch.prompts * 2, [*chosen, *rejected])
    won, lost = scores.logprobs.sum(1).chunk(2)
    (-0.2 * 0.5 * (won - lost).mean()).backward()
    for name, parameter in method.policy.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-7, rtol=1e-4)


def test_only_the_predictions_of_response_tokens_carry_a_gradient():
    method = made()
    batch = method.collect(0)
    hidden = []
    method.policy.network.model.norm.register_forward_hook(lambda _, __, out: hidden.append(out))
    loss, _ = method.loss(batch)
    (gradient,) = torch.autograd.grad(loss, hidden)
    learning = int(gradient.flatten(0, -2).abs().sum(-1).gt(0).sum())
    # one state, that of the prompt's last token, predicts both first tokens; if these are the same
    # then the push up and the push down cancel
    expected = sum(
        len(won) + len(lost) - 2 + int(won[0] != lost[0]) for won, lost in batch.responses
    )
    assert learning == expected
    assert learning < gradient.flatten(0, -2).shape[0]


def test_a_batch_of_other_lengths_does_not_change_a_pair():
    method = moved(made())
    with torch.no_grad():
        method.data.know_reference(method.policy, torch.arange(20))

        def margins(*rows):
            return compared(method.policy, method.data.batch(torch.tensor(rows))).delta

        alone = torch.cat([margins(i) for i in range(4)])
        together = margins(0, 1, 2, 3, 19, 10)
    torch.testing.assert_close(together[:4], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("budget", "parts"), [(1, 8), (100, 2), (100_000, 1)])
def test_micro_batches_add_up_to_the_same_step(budget, parts):
    method = moved(made())
    batch = method.collect(0)
    whole, expected = gradients(method, batch)
    cut, got = gradients(method, batch, budget)
    assert len(list(batch.split(budget))) == parts
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)
    assert cut["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert cut["rewards/margin"] == pytest.approx(whole["rewards/margin"], abs=1e-5)


def test_it_learns_twenty_pairs_by_heart(tmp_path):
    run = train("dpo", data=ROWS, steps=40, batch_size=10, output=tmp_path / "run", **SMALL)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["rewards/accuracy"] == 1.0
    assert rows[-1]["rewards/margin"] > 0.5
    assert rows[-1]["loss"] < 0.5
    assert run.method.data.reference.isfinite().all()
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    assert {"prompt", "chosen", "rejected", "margin"} <= samples[0].keys()
    assert samples[-1]["margin"] > 0


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    settings = {**SMALL, "data": pairs_file(tmp_path), "batch_size": 8, "save_every": 2}
    assert_resumes("dpo", tmp_path, **settings)
    assert [row["step"] for row in untimed(tmp_path / "whole")] == [1, 2, 3, 4]


def test_the_reference_is_scored_once_and_kept_in_the_checkpoint(tmp_path):
    settings = {**SMALL, "data": pairs_file(tmp_path), "batch_size": 10, "save_every": 1}
    train("dpo", steps=3, output=tmp_path / "run", **settings)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    # two batches are all pairs: the third step knows every reference already
    assert [("time/scoring" in row) for row in rows] == [True, True, False]
    step, state = load_latest(tmp_path / "run" / "checkpoints", print)
    reference = state["method"]["reference"]
    assert step == 3
    everything = made({"batch_size": 20}).collect(0)
    expected = everything.reference[everything.index.argsort()]
    torch.testing.assert_close(reference, expected, atol=1e-4, rtol=0)


def test_with_lora_the_reference_is_the_adapter_switched_off():
    settings = LoraSettings(rank=4, alpha=8)
    method = moved(made(model=load_policy("tiny", tune="lora", lora=settings)), 0.1)
    plain = made()
    torch.testing.assert_close(
        method.collect(0).reference, plain.collect(0).reference, atol=1e-4, rtol=0
    )
    with torch.no_grad():
        loss, _ = method.loss(method.collect(0))
    assert abs(float(loss) - math.log(2)) > 1e-3
    trained = [name for name, p in method.policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_the_reference_stays_when_the_policy_moves():
    method = made({"batch_size": 20})
    before = method.collect(0).reference.clone()
    method.data.reference.fill_(torch.nan)
    moved(method)
    torch.testing.assert_close(method.collect(0).reference, before, atol=0, rtol=0)
    frozen = [p for network in method.policy._frozen for p in network.parameters()]
    assert not any(p.requires_grad for p in frozen)


def test_rows_from_python_have_no_test_split_of_another_task():
    assert made().held_out is None


def test_a_long_response_is_cut_and_keeps_its_first_tokens():
    method = made({"max_response_tokens": 4})
    rejected = [responses[1] for responses in method.data.responses]
    assert max(map(len, rejected)) == 4
    assert method.policy.decode(rejected[0]) == ROWS[0]["rejected"][:4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "same", "rejected": "same"}, r"row 2: chosen and rejected are the same"),
        ({"chosen": "12345678", "rejected": "12345679"}, r"row 2: .*same after tokenisation .*=4"),
        ({"chosen": "yes", "rejected": ""}, r"row 2: column 'rejected' is empty"),
        ({"chosen": "yes", "rejected": None}, r"row 2: column 'rejected' is missing or null"),
        ({"chosen": "yes", "rejected": "no", "prompt": " "}, r"row 2: column 'prompt' is empty"),
        (
            {"chosen": "a", "rejected": "b", "prompt": "x" * 1021},
            r"row 2: .*1021 tokens.* 1020 fit",
        ),
    ],
)
def test_an_unusable_pair_is_named(row, message, tmp_path):
    data = pairs_file(tmp_path, [ROWS[0], {"prompt": "say: ", **row}])
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message) as caught:
        train("dpo", data=data, max_response_tokens=4, output=run, **SMALL)
    assert "\n" not in str(caught.value)
    assert not run.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 0}, "beta: .*greater than 0, got 0"),
        ({"beta": -0.1}, "beta: .*greater than 0"),
        ({"label_smoothing": 0.5}, "label_smoothing: .*less than 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing: .*greater than or equal to 0"),
        ({"max_response_tokens": 0}, "max_response_tokens: .*greater than 0"),
        ({"max_response_tokens": 1024}, "leaves no room for a prompt in the model's context"),
        ({"betta": 0.2}, "unknown key 'betta': did you mean 'beta'"),
    ],
)
def test_a_bad_setting_is_named_before_anything_is_written(setting, message, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message):
        train("dpo", data=pairs_file(tmp_path), output=run, **{**SMALL, **setting})
    assert not run.exists()


def test_data_without_preferences_are_refused(tmp_path):
    data = pairs_file(tmp_path, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(PostgradError, match="chosen, rejected"):
        train("dpo", data=data, output=tmp_path / "run", **SMALL)


def test_label_smoothing_pulls_confident_margins_back():
    plain, smooth = made(), made({"label_smoothing": 0.2})
    delta = torch.tensor([50.0, -50.0, 0.0])
    difference = smooth.losses(with_margins(delta)) - plain.losses(with_margins(delta))
    torch.testing.assert_close(difference, 0.2 * 0.1 * delta)
