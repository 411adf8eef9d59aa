"""The world of strings with a hidden score."""

import math
from itertools import pairwise

import pytest
import torch

from postgrad.claims import rto, salsa, symbols
from postgrad.sampling.generation import Rollouts


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))


def test_the_worth_is_the_sum_over_neighbours():
    hidden = torch.arange(64.0).view(8, 8)
    assert symbols.worth(hidden, "a", "bc") == 1 + 10
    assert symbols.worth(hidden, "a", "b?c") == 1  # no letter has no neighbours
    assert symbols.worth(hidden, "a", "") == 0
    assert symbols.worth(hidden, "h", "h" * 20) == 12 * 63
    score = symbols.score_by(hidden, scale=0.1)
    assert score(prompts=["a", "c"], completions=["b", "d"]) == pytest.approx([0.1, 1.9])


def test_strings_follow_the_chain():
    table = symbols.chain(3)
    rows = symbols.strings(table, 4000, "test")
    counts = torch.zeros(8, 8)
    for row in rows:
        letters = row["prompt"] + row["completion"]
        assert len(letters) == 13
        for a, b in pairwise(letters):
            counts[symbols.LETTERS.index(a), symbols.LETTERS.index(b)] += 1
    shares = counts / counts.sum(1, keepdim=True)
    torch.testing.assert_close(shares, table, atol=0.03, rtol=0)
    assert rows == symbols.strings(table, 4000, "test")


def test_labels_follow_bradley_terry(monkeypatch):
    """Strings that are worth 0 and 2 in turn: the better is chosen with sigma(2)."""

    def drawn(policy, count, *stream):
        texts = ["a" if i % 2 else "h" for i in range(8 * count)]
        nothing = [torch.zeros(1)] * len(texts)
        return Rollouts(nothing, nothing, nothing, torch.ones(len(texts)).bool(), texts)

    monkeypatch.setattr(symbols, "sample", drawn)
    hidden = torch.zeros(8, 8)
    hidden[:, 7] = 2.0
    rows = symbols.preferences(None, hidden, 2000, seed=0)
    right = sum(row["chosen"] == "h" for row in rows) / len(rows)
    assert len(rows) == 2000
    assert {row["prompt"] for row in rows} == set(symbols.LETTERS)
    # within four standard errors
    assert right == pytest.approx(1 / (1 + math.exp(-2)), abs=4 * 0.0073)


def test_what_is_made_once_is_the_same_later():
    first = symbols.reference_policy(7, steps=3)
    again = symbols.reference_policy(7, steps=3)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    other = symbols.reference_policy(8, steps=3)
    assert any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    )
    measured = symbols.measure(first, again, symbols.hidden_score(7), 0, count=2)
    assert measured.divergence == 0


def test_two_models_learn_from_different_strings():
    rows = salsa.demonstrations(0)
    half = salsa.DEMONSTRATIONS
    parts = [{str(row) for row in rows[i * half : (i + 1) * half]} for i in range(3)]
    assert all(len(part) > 0.95 * half for part in parts)
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_token_rewards_that_are_the_hidden_numbers_correlate_with_them():
    hidden = symbols.hidden_score(0)
    written = ["abcdefgh", "hgfedcba", "aa"]
    ratios = torch.full((3, 8), torch.nan)
    for row, letters in enumerate(written):
        places = [symbols.LETTERS.index(letter) for letter in letters]
        for place, pair in enumerate(pairwise(places)):
            ratios[row, place] = 0.3 * hidden[pair] - 1
    assert rto.correlation(ratios, written, hidden) == pytest.approx(1, abs=1e-5)
    assert rto.correlation(-ratios, written, hidden) == pytest.approx(-1, abs=1e-5)
    assert abs(rto.correlation(ratios, written, symbols.hidden_score(1))) < 0.9
