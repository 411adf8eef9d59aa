"""Where TRL's GRPO has the same loss as a choice of parts, they agree in value and gradient.

TRL's own trainer computes its loss, in float64, from a policy whose log-probabilities are a table.
TRL is no dependency of this library: without it these tests are skipped.
"""

import os

import pytest
import torch

from postgrad.batch import Batch
from postgrad.config import validated
from postgrad.methods.language.parts.base import Around
from postgrad.methods.language.parts.estimator import Estimator, EstimatorSettings
from postgrad.models.embedded import tiny_network, tiny_tokenizer
from postgrad.models.scoring import TokenScores
from postgrad.objectives.policy_gradient import aggregate, kl_estimate

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LONGEST = 7
AGGREGATIONS = {
    "grpo": "sequence-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "sequence-sum-constant",
    "luspo": "sequence-sum",
}


def drawn(seed=0):
    """Ragged responses of two groups of four, one of them without a difference in its rewards."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 1, 4, 6, 3, 7, 2, 5])
    mask = torch.arange(LONGEST) < lengths[:, None]
    new = -2 * torch.rand(8, LONGEST, generator=random, dtype=torch.float64)
    old = new + 0.4 * torch.randn(8, LONGEST, generator=random, dtype=torch.float64)
    reference = new + 0.4 * torch.randn(8, LONGEST, generator=random, dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    return new.requires_grad_(), old, reference, advantages, mask


def theirs(tmp_path, new, old, reference, advantages, mask, beta=0.0, **settings):
    tokenizer = tiny_tokenizer()
    trainer = trl.GRPOTrainer(
        model=tiny_network(tokenizer, seed=0),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=LONGEST,
            beta=0.0,
            **settings,
        ),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"prompt": "1 + 1 = "}] * 8),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.steps_per_generation = 1
    trainer.beta = beta  # the reference's log-probabilities are given, so it loads none
    # what the network would have said; everything after that is TRL's
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (new, torch.zeros_like(new), None)
    ids = torch.zeros(8, LONGEST, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(8, 1, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    return trainer._compute_loss(trainer.model.train(), inputs)


def ours(new, old, reference, advantages, counted, aggregation, beta=0.0, **parts):
    estimator = Estimator(validated(EstimatorSettings, parts), Around(samples=4))
    batch = Batch(mask=counted, advantages=advantages, old_logprobs=old)
    losses, metrics = estimator.token_losses(batch, TokenScores(new, counted, None))
    losses = losses + beta * kl_estimate(new, reference, counted)
    return aggregate(losses, counted, aggregation, constant=LONGEST), metrics


def expect_agreement(tmp_path, trl_settings, **our_settings):
    data = drawn()
    their_loss = theirs(tmp_path, *data, **trl_settings)
    our_loss, metrics = ours(*data, **our_settings)
    (their_gradient,) = torch.autograd.grad(their_loss, data[0])
    (our_gradient,) = torch.autograd.grad(our_loss, data[0])
    assert float(our_loss.detach()) == pytest.approx(float(their_loss.detach()), abs=1e-6)
    assert float(their_gradient.abs().max()) > 1e-3
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-6, rtol=1e-6)
    return metrics


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_loss_types_are_aggregations_and_levels_are_gradients(loss_type, level, tmp_path):
    metrics = expect_agreement(
        tmp_path,
        {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "epsilon": 0.1,
            "epsilon_high": 0.15,
        },
        aggregation=AGGREGATIONS[loss_type],
        gradient=level,
        mask={"name": "ppo", "clip_low": 0.1, "clip_high": 0.15},
    )
    assert 0 < metrics["ratio/clipped"] < 1


def test_delta_is_the_dual_clip(tmp_path):
    expect_agreement(
        tmp_path,
        {"loss_type": "grpo", "epsilon": 0.1, "delta": 1.3},
        aggregation="sequence-mean",
        mask={"name": "ppo", "clip_low": 0.1, "clip_high": 0.1, "dual_clip": 1.3},
    )


def test_the_kl_of_the_loss(tmp_path):
    expect_agreement(
        tmp_path,
        {"loss_type": "dr_grpo", "epsilon": 0.2, "beta": 0.04, "use_bias_correction_kl": False},
        aggregation="sequence-sum-constant",
        beta=0.04,
        mask={"name": "ppo", "clip_low": 0.2, "clip_high": 0.2},
    )
