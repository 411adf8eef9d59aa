"""From the spans of a critique to the scores of tokens."""

import pytest
import torch

from postgrad.rewards.annotations import INSTRUCTION, Annotator, filled, quotes_in
from postgrad.rewards.spans import (
    Span,
    fading,
    place_spans,
    places_by_words,
    token_places,
    token_scores,
    walk_words,
)

TEXT = "The soup was warm, warm and don't-ask old."


def places_of(*tokens):
    """Where the tokens stand that are a text when joined."""
    ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def quoted(text, *quotes):
    found = place_spans(text, [Span(1.0, quote) for quote in quotes])
    return [place and text[slice(*place)] for place in found]


def starts(text, *quotes):
    return [place and place[0] for place in place_spans(text, [Span(1.0, q) for q in quotes])]


def test_a_quote_given_twice_is_found_twice_and_then_no_more():
    assert starts(TEXT, "warm", "warm", "warm") == [13, 19, None]


def test_quotes_are_found_as_whole_words_before_parts_of_words():
    assert starts("oldest and old", "old") == [11]
    assert starts("oldest", "old") == [0]
    assert starts("x+=y; x+=z", "+=", "+=") == [1, 7]


def test_quotes_may_differ_in_case_spaces_and_punctuation():
    assert quoted(TEXT, "  WARM and ", "soup  was 'warm'", "dont ask") == [
        "warm, warm"[6:] + " and",
        "soup was warm",
        None,
    ]
    assert quoted("(a) b", "A B") == ["a) b"]


def test_what_is_not_in_the_text_has_no_place():
    assert place_spans(TEXT, [Span(1, "cold"), Span(1, ""), Span(1, place=(3, 4))]) == [None] * 3
    assert token_scores("a b", [Span(1, "c"), Span(-1, "b")], places_of("a", " b"))[1] == 1


@pytest.mark.parametrize(
    "tokens",
    [
        ("The", " soup", " was", " warm", ",", " old", "."),
        ("Th", "e so", "up", " w", "as", " war", "m,", " ol", "d."),
        tuple("The soup was warm, old."),
    ],
)
def test_every_way_to_split_words_scores_the_same_words(tokens):
    text = "".join(tokens)
    spans = [Span(1, "warm"), Span(-1, "old.")]
    places = places_of(*tokens)
    scores, skipped = token_scores(text, spans, places)
    assert skipped == 0
    # "warm" is at 13 to 16 and "old" at 19 to 21: each letter's token has its word's score
    letters = [1 if 13 <= i <= 16 else -1 if 19 <= i <= 21 else 0 for i in range(len(text))]
    expected = [sum(letters[slice(*place)]) for place in places]
    assert scores.sign().tolist() == torch.tensor(expected).sign().tolist()
    # undivided: a span of k tokens counts k times
    assert set(scores.tolist()) == {-1, 0, 1}


def test_punctuation_has_no_score_unless_it_is_all_that_is_quoted():
    places = places_of("x", " +=", " y", ";", "<end>"[:0])
    assert token_scores("x += y;", [Span(1, "x += y;")], places)[0].tolist() == [1, 0, 1, 0, 0]
    assert token_scores("x += y;", [Span(-1, "+=")], places)[0].tolist() == [0, -1, 0, 0, 0]


def test_the_lowest_score_counts_where_spans_overlap_and_the_default_where_there_is_none():
    """The scheme for programs: every word is good unless it is wrong or to be improved."""
    places = [*places_of("a", " b", " c", ",", " d"), None]
    spans = [Span(0, "b c"), Span(-1, "c")]
    scores, _ = token_scores("a b c, d", spans, places, default=1.0)
    assert scores.tolist() == [1, 0, -1, 0, 1, 0]


def test_characters_may_be_named_in_place_of_a_quote():
    spans = [Span(1, place=(1, 4)), Span(-1, place=(4, 6))]
    assert token_scores("a bc de", spans, places_of(*"a bc de"))[0].tolist() == [
        0, 0, 1, 1, 0, -1, 0
    ]  # fmt: skip


def test_places_follow_from_the_tokens_own_texts():
    words = {1: "a", 2: " b", 3: "", 4: "c"}
    places = token_places(lambda ids: "".join(words[i] for i in ids), [1, 2, 4, 3], "a bc")
    assert places == [(0, 1), (1, 3), (3, 4), (4, 4)]


def test_places_follow_from_growing_beginnings_where_a_character_is_several_tokens():
    text = "né €"
    ids = list(text.encode())
    places = token_places(lambda part: bytes(part).decode(errors="replace"), ids, text)
    assert places == [(0, 1), (1, 1), (1, 2), (2, 3), (3, 3), (3, 3), (3, 4)]


def test_places_follow_from_the_words_where_decoding_changes_the_text():
    words = {1: "So", 2: "up", 3: "!", 4: "is", 5: "good"}

    def decode(ids):
        return " ".join(words[i] for i in ids)

    text = "Soup ! is  good"
    places = token_places(decode, [1, 2, 3, 4, 5], text)
    assert places == [(0, 4), (0, 4), None, (7, 9), (11, 15)]
    assert token_scores(text, [Span(1, "soup")], places)[0].tolist() == [1, 1, 0, 0, 0]


def test_the_walk_along_words():
    tokens = ["The", " so", "up", ",", " w", "arm", "."]
    assert walk_words(tokens, ["The", "soup,", "warm."]) == [range(1), range(1, 3), range(3, 6)]
    # a word is looked for from five tokens on, and a lost one leaves the walk where it was
    assert walk_words(list("abcdef"), ["e"]) == [range(4, 5)]
    assert walk_words(list("abcdef"), ["f"]) == [None]
    assert walk_words(list("abcdef"), ["xyz", "ab"]) == [None, range(2)]
    # at most nine tokens are joined
    assert walk_words(list("abcdefghi"), ["abcdefghi"]) == [range(9)]
    assert walk_words(list("abcdefghij"), ["abcdefghij"]) == [None]
    assert walk_words([], ["a"]) == [None]
    assert places_by_words("ab", ["ab", ""]) == [(0, 2), None]
    with pytest.raises(ValueError, match="at least 1"):
        walk_words([], [], most=0)


def test_a_long_candidate_ends_the_search_from_there():
    """`abxyz` has three letters too many for `ab`; from the second token on it is found."""
    assert walk_words(["wxyzv", "ab"], ["ab"]) == [range(1, 2)]


def test_fading_by_hand():
    scores = torch.zeros(1, 63)
    scores[0, 2] = 1
    weights = fading(scores, 48)[0]
    found = [float(weights[2 + n - 1]) for n in (42, 48, 54, 60)]
    expected = [0.999955, 0.997527, 0.500000, 0.002473]
    assert found == pytest.approx(expected, abs=1e-6)
    assert weights[:2].tolist() == [1, 1]
    assert fading(torch.zeros(1, 60), 1).tolist() == [[1] * 60]
    with pytest.raises(ValueError, match=r"\[N, T\]"):
        fading(torch.zeros(3), 48)


QUOTES = [("so warm", 1.0), ("old", -1.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"feedback": "x", "good_spans": ["so warm"], "poor_spans": ["old"]}', QUOTES),
        ('Well [1] {so}.\n```json\n[["so warm", 1], ["old", -1]]\n```', QUOTES),
        ('I say: {"spans": [("so warm", 1), ("old", -1)]}.', QUOTES),
        ("('old', -1), then [('so warm', 1), ('old', -1)]", QUOTES),
        ('{"wrong_code": ["x = 1"], "improvement_code": ["y"]}', [("x = 1", -1), ("y", 0)]),
        (
            '{"good_spans": ["draft"]} no: {"good_spans": ["so warm"], "poor_spans": ["old"]}',
            QUOTES,
        ),
        ('{"good_spans": [], "poor_spans": []}', None),
        ('{"good_spans": ["so warm"', None),
        ('[["old", 7]]', None),
        ('{"good_spans": "all of it"}', None),
        ("It is good.", None),
        ("[" * 3000, None),
    ],
)
def test_quotes_are_read_from_what_a_model_wrote(text, expected):
    assert quotes_in(text) == expected


def test_an_annotator_asks_about_every_response():
    asked = []

    def chat(prompts, max_tokens):
        asked.extend(prompts)
        return [['{"good_spans": ["soup"], "poor_spans": []}'], ["no idea"]]

    talk = [{"role": "user", "content": "Hungry {response}?"}]
    said = Annotator(chat)(["Eat what?", talk], ["the soup", "{prompt}"])
    assert said == [[("soup", 1.0)], None]
    assert "Request:\nEat what?\n\nResponse:\nthe soup\n" in asked[0]
    assert "Request:\nuser: Hungry {response}?\n\nResponse:\n{prompt}\n" in asked[1]
    assert '{"feedback": "one paragraph"' in asked[1]
    assert filled("{a}{b}", a="{b}", b="x") == "{b}x"
    assert {"{prompt}", "{response}"} <= set(INSTRUCTION.split())
