"""The worlds of the language claims: what is called gold, optimal or flipped is so."""

import math

import pytest
import torch

from language_runs import SMALL, untimed
from postgrad.api import train
from postgrad.claims import copg, dpo, opinions, pro, rdpo, rso
from postgrad.claims.log_linear_bandit import Bandit
from postgrad.claims.stepping import train_in_steps
from postgrad.models.language import load_policy
from postgrad.objectives.pairwise import logistic, robust


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))


def test_stepping_is_training(tmp_path):
    rows = [{"prompt": f"{i}: ", "completion": str(i * i)} for i in range(12)]
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "max_response_tokens": 8}
    stepped = load_policy("tiny", seed=5)
    found = [
        {"step": step, **metrics}
        for step, metrics in train_in_steps("sft", 5, {"model": stepped, "data": rows}, **settings)
    ]
    more = {**SMALL, **settings, "warmup_steps": 5, "seed": 5, "output": tmp_path / "run"}
    run = train("sft", data=rows, **more)
    assert untimed(tmp_path / "run") == found
    for one, other in zip(stepped.parameters(), run.method.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gold_counts_words():
    assert opinions.gold(" warm, old and bitter.") == 0
    assert opinions.gold(" lovely, good and superb.") == 3
    assert opinions.gold(" badly, rude and dullish.") == -1


def test_subjects_are_apart():
    splits = opinions.subjects()
    assert {name: len(set(prompts)) for name, prompts in splits.items()} == {
        "training": 150,
        "validation": 20,
        "test": 30,
    }
    assert len(set().union(*splits.values())) == 200


def test_labels_follow_bradley_terry_and_flip_once(monkeypatch):
    """A policy that says good or bad: labels favour good by sigma(2), flips undo that."""

    def texts(policy, prompts, count, *stream, temperature):
        class Said:
            texts = [" good." if i % 2 else " bad." for i in range(len(prompts) * count)]

        return Said

    monkeypatch.setattr(opinions, "sample", texts)
    clean = opinions.preferences(None, seed=0)
    flipped = opinions.preferences(None, seed=0, flip_rate=0.3)
    right = [row["chosen"] == " good." for row in clean]
    changed = [a["chosen"] != b["chosen"] for a, b in zip(clean, flipped, strict=True)]
    expected = 1 / (1 + math.exp(-2))
    assert len(clean) == 300
    # within four standard errors
    assert sum(right) / 300 == pytest.approx(expected, abs=4 * 0.019)
    assert sum(changed) / 300 == pytest.approx(0.3, abs=4 * 0.027)
    assert opinions.preferences(None, seed=0, flip_rate=0.3) == flipped


def test_lists_are_scored_by_gold_with_noise(monkeypatch):
    """Subjects in turn get six different opinions, six equal ones, and five that are empty."""

    def texts(policy, prompts, count, *stream):
        several = [
            [f" good{', good' * i}." for i in range(count)],
            [" bad."] * count,
            [" "] * (count - 1) + [" good."],
        ]

        class Said:
            texts = [text for i in range(len(prompts)) for text in several[i % 3]]

        return Said

    monkeypatch.setattr(opinions, "sample", texts)
    rows = opinions.rankings(None, seed=0, size=6)
    assert len(rows) == 50
    assert all(len(row["responses"]) == len(row["scores"]) == 6 for row in rows)
    errors = torch.tensor(
        [
            score - opinions.gold(text)
            for row in rows
            for text, score in zip(row["responses"], row["scores"], strict=True)
        ]
    )
    # within four standard errors
    assert float(errors.mean()) == pytest.approx(0, abs=4 / 300**0.5)
    assert float(errors.std()) == pytest.approx(1, abs=4 / 600**0.5)
    assert opinions.rankings(None, seed=0, size=6) == rows


def test_lists_of_the_bandit_hold_different_actions_and_noisy_rewards():
    bandit = Bandit.draw(0, 0, 0.0)
    prompt, actions, values = bandit.lists(0, 2000, 8, noise=0.5)
    assert all(len(set(several)) == 8 for several in actions.tolist())
    reward = (bandit.features @ bandit.weights)[prompt].gather(1, actions)
    assert float((values - reward).std()) == pytest.approx(0.5, abs=0.02)
    _, shorter, fewer = bandit.lists(0, 2000, 2, noise=0.5)
    assert shorter.equal(actions[:, :2])
    assert fewer.equal(values[:, :2])


def test_at_a_fixed_divergence_no_direction_beats_the_true_weights():
    bandit = Bandit.draw(0, 0, 0.0)
    best = bandit.reward_at(bandit.weights, 1.0)
    assert bandit.reward_at(7 * bandit.weights, 1.0) == pytest.approx(best)
    for _ in range(5):
        other = bandit.weights + 0.3 * torch.randn(8, dtype=torch.float64)
        assert bandit.reward_at(other, 1.0) < best


def test_a_ranker_learns_which_words_win():
    rows = [{"chosen": f" good, {w}.", "rejected": f" bad, {w}."} for w in ("old", "new", "red")]
    ranker = rso.Ranker(rows * 20)
    said = ranker([" good.", " old.", " bad.", " unheard."], [" bad.", " red.", " good.", " odd."])
    assert said[0] > 0.9
    assert said[1] == pytest.approx(0.5, abs=1e-6)
    assert said[2] == pytest.approx(1 - said[0])
    assert said[3] == 0.5
    assert ranker.accuracy([" good.", " bad.", " lovely.", " good, bad, bad."]) == 1.0


def test_pairs_for_copg_have_gold_scores_and_for_the_others_ranks():
    texts = ((" bad.", " good and warm."), (" old.", " new."))
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in texts]

    def scores(arm):
        made = copg.scored(rows, arm)
        assert made[0]["chosen"] == " good and warm."
        return [(row["score_chosen"], row["score_rejected"]) for row in made]

    assert scores("CoPG") == [(2.0, -1.0), (0.0, 0.0)]
    assert scores("IPO") == [(0.25, -0.25), (0.0, 0.0)]
    assert scores("DPO") == [(0.25, -0.25)]


def test_the_bandits_optimum_is_where_its_reward_is():
    bandit = Bandit.draw(0, 100, 0.0)
    assert bandit.gap(bandit.weights) == pytest.approx(0, abs=1e-12)
    for _ in range(5):
        other = bandit.weights + 0.1 * torch.randn(8, dtype=torch.float64)
        assert bandit.gap(other) > 0
    assert bandit.error(bandit.weights) == 0


def test_flips_change_that_share_of_the_bandits_labels():
    clean, noisy = Bandit.draw(3, 20_000, 0.0), Bandit.draw(3, 20_000, 0.3)
    assert clean.features.equal(noisy.features)
    flipped = (clean.pairs[:, 1] != noisy.pairs[:, 1]).double().mean()
    assert float(flipped) == pytest.approx(0.3, abs=0.015)
    assert (clean.pairs[:, 1] != clean.pairs[:, 2]).all()


def test_with_much_data_rdpo_finds_the_clean_reward_and_dpo_does_not():
    bandit = Bandit.draw(1, 60_000, 0.2)
    corrected = bandit.fit(lambda delta: robust(delta, 0.2))
    plain = bandit.fit(logistic)
    assert bandit.error(corrected) < 0.12
    assert bandit.error(plain) > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_pros_tabular_optimum_is_the_world_that_ranked(seed):
    assert abs(pro.tabular_divergence(seed)) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_dpos_tabular_optimum_is_the_tilted_reference(seed):
    assert abs(dpo.tabular_divergence(seed)) < 1e-6


def test_a_quick_run_gives_the_metric_and_repeats_to_the_bit():
    for claim, arm in ((dpo, "DPO"), (rdpo, "IPO")):
        first, second = claim.run(arm, 0, True), claim.run(arm, 0, True)
        assert claim.CLAIM.metric in first.values
        assert first == second
