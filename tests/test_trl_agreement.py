"""Where TRL has the same losses, they agree with ours in value and gradient.

TRL's own trainers compute theirs, in float64, from a policy whose log-probabilities are a table.
TRL is no dependency of this library: without it these tests are skipped.
"""

import copy
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from postgrad.models.embedded import tiny_network, tiny_tokenizer
from postgrad.objectives.pairwise import (
    hinge,
    ipo,
    logistic,
    margin,
    negative_likelihood,
    odds_ratio,
    robust,
    rpo,
    sequence_logprobs,
    simpo,
    smoothed,
)
from postgrad.objectives.unpaired import kto, mismatched_kl

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

N, T, PROMPT = 5, 9, 3  # pairs, tokens, and how many of them are the prompt's
PAIRS = [
    {"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}, no doubt"}
    for i in range(4)
]
LABELLED = [
    {"prompt": f"{i} + {i} = ", "completion": f"{2 * i + i % 2}", "label": i % 2 == 0}
    for i in range(4)
]


def trainer_of(kind, config, rows, tmp_path, **settings):
    """A real trainer of TRL's on the tiny model; `settings` choose its loss."""
    tokenizer = tiny_tokenizer()
    arguments = config(
        output_dir=str(tmp_path),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        **settings,
    )
    reference = {}
    if kind.__name__ not in ("CPOTrainer", "ORPOTrainer"):
        reference = {"ref_model": tiny_network(tokenizer, seed=1)}
    return kind(
        model=tiny_network(tokenizer, seed=0),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
        **reference,
    )


class Table(nn.Module):
    """A policy that looks its tokens' log-probabilities up: table `i` for ids that begin by i."""

    def __init__(self, *tables: Tensor):
        super().__init__()
        self.tables = nn.ParameterList(tables)

    def forward(self, input_ids: Tensor, labels: Tensor, **ignored):
        table = self.tables[int(input_ids[0, 0])]
        zeros = torch.zeros_like(table)
        return SimpleNamespace(
            log_probs=torch.where(labels[:, 1:] >= 0, table, 0.0),
            entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
        )  # fmt: skip


def completions(rows: int) -> Tensor:
    """A mask of responses of various lengths after prompts of one, `[rows, T]`."""
    lengths = 1 + torch.arange(rows) % (T - PROMPT)
    places = torch.arange(T)[None, :]
    return (places >= PROMPT) & (places < PROMPT + lengths[:, None])


def table(rows: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return -2 * torch.rand(rows, T - 1, generator=random, dtype=torch.float64)


def expect_agreement(theirs: Tensor, their_table: Tensor, ours: Tensor, our_table: Tensor) -> None:
    (their_gradient,) = torch.autograd.grad(theirs, their_table)
    (our_gradient,) = torch.autograd.grad(ours, our_table)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    assert float(their_gradient.abs().max()) > 1e-3
    torch.testing.assert_close(our_gradient.double(), their_gradient.double(), atol=1e-6, rtol=1e-6)


class OurPairs:
    """The pairs of the tests, as our functions take them."""

    def __init__(self) -> None:
        self.mask = completions(2 * N)
        self.table = table(2 * N, seed=0).requires_grad_()
        self.reference = table(2 * N, seed=1)
        response = self.mask[:, 1:]
        self.won, self.lost = sequence_logprobs(self.table, response).chunk(2)
        self.ref_won, self.ref_lost = sequence_logprobs(self.reference, response).chunk(2)
        self.lengths_won, self.lengths_lost = response.sum(1).chunk(2)

    @property
    def delta(self) -> Tensor:
        return margin(self.won, self.lost, self.ref_won, self.ref_lost)

    def mean_delta(self) -> Tensor:
        return margin(
            self.won / self.lengths_won,
            self.lost / self.lengths_lost,
            self.ref_won / self.lengths_won,
            self.ref_lost / self.lengths_lost,
        )

    def means(self) -> tuple[Tensor, Tensor]:
        return self.won / self.lengths_won, self.lost / self.lengths_lost


def sppo_of_a_certain_pair(pairs: OurPairs) -> Tensor:
    sppo = pytest.importorskip("postgrad.objectives.iterative").sppo
    ratio = torch.stack([pairs.won - pairs.ref_won, pairs.lost - pairs.ref_lost], 1)
    return sppo(ratio, torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(ratio), 0.5).sum(1)


@pytest.mark.parametrize(
    ("loss_type", "settings", "ours"),
    [
        ("sigmoid", {"beta": 0.3}, lambda pairs: logistic(0.3 * pairs.delta)),
        ("hinge", {"beta": 0.3}, lambda pairs: hinge(0.3 * pairs.delta)),
        (
            "robust",
            {"beta": 0.3, "label_smoothing": 0.2},
            lambda pairs: robust(0.3 * pairs.delta, 0.2),
        ),
        ("ipo", {"beta": 0.3}, lambda pairs: ipo(pairs.mean_delta(), 0.3)),
        ("sppo_hard", {"beta": 0.5}, sppo_of_a_certain_pair),
    ],
)
def test_dpo_trainer(loss_type, settings, ours, tmp_path):
    pairs = OurPairs()
    expected = ours(pairs).mean()
    trainer = trainer_of(
        trl.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, loss_type=[loss_type], **settings
    )
    trainer.precompute_ref_logps = True  # the reference's log-probabilities come with the batch
    policy = Table(pairs.table.detach())
    inputs = {
        "input_ids": torch.zeros(2 * N, T, dtype=torch.long),
        "attention_mask": torch.ones(2 * N, T, dtype=torch.long),
        "completion_mask": pairs.mask.long(),
        "ref_chosen_logps": pairs.ref_won,
        "ref_rejected_logps": pairs.ref_lost,
    }
    loss = trainer.compute_loss(policy, inputs)
    expect_agreement(loss, policy.tables[0], expected, pairs.table)


def test_rpo_as_a_sum_of_two_of_trls_losses(tmp_path):
    """TRL's SFT term is one mean over all tokens: with responses of one length, our average."""
    pairs = OurPairs()
    pairs.mask = torch.arange(T)[None, :].expand(2 * N, T) >= PROMPT
    response = pairs.mask[:, 1:]
    pairs.won, pairs.lost = sequence_logprobs(pairs.table, response).chunk(2)
    pairs.ref_won, pairs.ref_lost = sequence_logprobs(pairs.reference, response).chunk(2)
    expected = rpo(0.5 * pairs.delta, pairs.won, 0.2, response.sum(1)[:N]).mean()
    trainer = trainer_of(
        trl.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path,
        loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], beta=0.5,
    )  # fmt: skip
    trainer.precompute_ref_logps = True
    policy = Table(pairs.table.detach())
    inputs = {
        "input_ids": torch.zeros(2 * N, T, dtype=torch.long),
        "attention_mask": torch.ones(2 * N, T, dtype=torch.long),
        "completion_mask": pairs.mask.long(),
        "ref_chosen_logps": pairs.ref_won,
        "ref_rejected_logps": pairs.ref_lost,
    }
    loss = trainer.compute_loss(policy, inputs)
    expect_agreement(loss, policy.tables[0], expected, pairs.table)


@pytest.mark.parametrize("settings", [{}, {"desirable_weight": 1.3, "undesirable_weight": 0.7}])
@pytest.mark.parametrize("seed", [0, 2])  # of the policy: above and below the clamp of the KL
def test_kto_trainer(settings, seed, tmp_path):
    mask = completions(6)
    response = mask[:, 1:]
    ours, mismatched = table(6, seed).requires_grad_(), table(6, seed + 1)
    known, known_mismatched = (
        sequence_logprobs(table(6, s), response) for s in (seed + 10, seed + 11)
    )
    desirable = torch.tensor([True, False, False, True, True, False])
    kl = mismatched_kl(sequence_logprobs(mismatched, response) - known_mismatched)
    weights = settings.values()
    losses = kto(sequence_logprobs(ours, response) - known, desirable, kl, 0.2, *weights)

    trainer = trainer_of(trl.KTOTrainer, trl.KTOConfig, LABELLED, tmp_path, beta=0.2, **settings)
    trainer.precompute_ref_logps = True
    policy = Table(ours.detach(), mismatched)
    inputs = {
        "input_ids": torch.zeros(6, T, dtype=torch.long),
        "attention_mask": torch.ones(6, T, dtype=torch.long),
        "completion_mask": mask.long(),
        "KL_input_ids": torch.ones(6, T, dtype=torch.long),
        "KL_attention_mask": torch.ones(6, T, dtype=torch.long),
        "KL_completion_mask": mask.long(),
        "label": desirable,
        "ref_logps": known,
        "ref_KL_logps": known_mismatched,
    }
    loss = trainer.compute_loss(policy, inputs)
    expect_agreement(loss, policy.tables[0], losses.mean(), ours)


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        (
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5},
            lambda pairs: simpo(*pairs.means(), 2.0, 0.5),
        ),
        (
            {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1},
            lambda pairs: smoothed(0.3 * (pairs.won - pairs.lost), 0.1),
        ),
    ],
)
def test_cpo_trainer(settings, ours, tmp_path):
    cpo = pytest.importorskip("trl.experimental.cpo")
    pairs = OurPairs()
    trainer = trainer_of(cpo.CPOTrainer, cpo.CPOConfig, PAIRS, tmp_path, **settings)
    theirs = OurPairs()
    given = theirs.means() if settings["loss_type"] == "simpo" else (theirs.won, theirs.lost)
    losses, _, _ = trainer.cpo_loss(*given)
    expect_agreement(losses.mean(), theirs.table, ours(pairs).mean(), pairs.table)


def test_orpo_trainer(tmp_path):
    orpo = pytest.importorskip("trl.experimental.orpo")
    pairs, theirs = OurPairs(), OurPairs()
    trainer = trainer_of(orpo.ORPOTrainer, orpo.ORPOConfig, PAIRS, tmp_path, beta=0.25)
    won, lost = theirs.means()
    losses, *_ = trainer.odds_ratio_loss(won, lost)  # to be subtracted from the SFT loss
    theirs_whole = (negative_likelihood(won) - losses).mean()
    own_won, own_lost = pairs.means()
    ours = (negative_likelihood(own_won) + 0.25 * odds_ratio(own_won, own_lost)).mean()
    expect_agreement(theirs_whole, theirs.table, ours, pairs.table)


def test_the_documented_subclass_trains_with_trl(tmp_path):
    """The example of docs/objectives.md, as it stands: its loss is RPO's, and falls."""
    text = (Path(__file__).parent.parent / "docs/objectives.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    network = tiny_network(tiny_tokenizer(), seed=0)
    values = {"network": network, "reference": copy.deepcopy(network), "batches": []}
    exec(next(block for block in blocks if "def token_logprobs" in block), values)
    exec(next(block for block in blocks if "from trl" in block), values)
    trainer = trainer_of(
        values["RPOTrainer"], trl.DPOConfig, PAIRS, tmp_path,
        max_steps=8, learning_rate=1e-3, logging_steps=1, beta=0.1,
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    with torch.no_grad():
        mask = batch["completion_mask"][:, 1:].bool()
        network, reference = trainer.model, trainer.ref_model
        logits = [model(batch["input_ids"]).logits[:, :-1] for model in (network, reference)]
        tokens = batch["input_ids"][:, 1:, None]
        now, then = (l.log_softmax(-1).gather(-1, tokens).squeeze(-1) for l in logits)
        won, lost = (torch.where(mask, now - then, 0.0).sum(1)).chunk(2)
        nll = -(torch.where(mask, now, 0.0).sum(1) / mask.sum(1)).chunk(2)[0]
        expected = (-torch.log(torch.sigmoid(0.1 * (won - lost))) + 0.2 * nll).mean()
        loss = trainer.compute_loss(network, batch)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
