"""Every format in every spelling, from every kind of file, and the conversions between them."""

import csv
import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from postgrad.errors import PostgradError
from postgrad.tasks import FORMATS, Examples, load


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SKY = [user("What color is the sky?")]
BLUE, GREEN = [assistant("It is blue.")], [assistant("It is green.")]

# raw row, recognised format, normalised row
ROWS = {
    "prompt-only": ({"prompt": "The sky is"}, "prompts", {"prompt": "The sky is"}),
    "prompt-only conversational": ({"prompt": SKY}, "prompts", {"prompt": SKY}),
    "prompt and answer": (
        {"prompt": "1+1=", "answer": 2, "level": "easy"},
        "prompts",
        {"prompt": "1+1=", "answer": 2, "level": "easy"},
    ),
    "prompt-completion": (
        {"prompt": "The sky is", "completion": " blue."},
        "demonstrations",
        {"prompt": "The sky is", "completion": " blue."},
    ),
    "prompt-completion conversational": (
        {"prompt": SKY, "completion": BLUE},
        "demonstrations",
        {"prompt": SKY, "completion": "It is blue."},
    ),
    "unpaired preference": (
        {"prompt": "The sky is", "completion": " green.", "label": False},
        "labelled",
        {"prompt": "The sky is", "completion": " green.", "label": False},
    ),
    "unpaired preference conversational": (
        {"prompt": SKY, "completion": BLUE, "label": 1},
        "labelled",
        {"prompt": SKY, "completion": "It is blue.", "label": True},
    ),
    "preference": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        "preferences",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    ),
    "preference implicit": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "preferences",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    ),
    "preference implicit, words that begin alike": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        "preferences",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."},
    ),
    "preference implicit, one the beginning of the other": (
        {"chosen": "The sky is blue today", "rejected": "The sky is blue"},
        "preferences",
        {"prompt": "The sky is", "chosen": " blue today", "rejected": " blue"},
    ),
    "preference conversational": (
        {"prompt": SKY, "chosen": BLUE, "rejected": GREEN},
        "preferences",
        {"prompt": SKY, "chosen": "It is blue.", "rejected": "It is green."},
    ),
    "preference implicit conversational": (
        {"chosen": SKY + BLUE, "rejected": SKY + GREEN},
        "preferences",
        {"prompt": SKY, "chosen": "It is blue.", "rejected": "It is green."},
    ),
    "preference with the prompt also as text": (
        {"prompt": "What color is the sky?", "chosen": SKY + BLUE, "rejected": SKY + GREEN},
        "preferences",
        {"prompt": SKY, "chosen": "It is blue.", "rejected": "It is green."},
    ),
    "preference with the prompt repeated": (
        {"prompt": SKY, "chosen": SKY + BLUE, "rejected": SKY + GREEN},
        "preferences",
        {"prompt": SKY, "chosen": "It is blue.", "rejected": "It is green."},
    ),
    "preference with a text prompt and messages": (
        {"prompt": "What color is the sky?", "chosen": BLUE, "rejected": GREEN},
        "preferences",
        {"prompt": SKY, "chosen": "It is blue.", "rejected": "It is green."},
    ),
    "ranking best first": (
        {"prompt": "p", "responses": ["a", "b", "c"]},
        "rankings",
        {"prompt": "p", "responses": ["a", "b", "c"]},
    ),
    "ranking with scores": (
        {"prompt": SKY, "responses": [GREEN, BLUE], "scores": [1, 4.5]},
        "rankings",
        {"prompt": SKY, "responses": ["It is blue.", "It is green."], "scores": [4.5, 1]},
    ),
    "ranking with ranks": (
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 3, 1]},
        "rankings",
        {"prompt": "p", "responses": ["c", "a", "b"], "ranks": [1, 2, 3]},
    ),
    "triplet": (
        {"anchor": "a", "positive": "p", "negative": "n"},
        "triples",
        {"anchor": "a", "positive": "p", "negative": "n"},
    ),
    "triplet of query, pos and neg": (
        {"query": "a", "pos": ["p"], "neg": ["n", "m"]},
        "triples",
        {"anchor": "a", "positive": "p", "negative": "n", "negatives": ["n", "m"]},
    ),
    "n-tuple": (
        {"query": "a", "positive": "p", "negative_1": "n", "negative_2": "m"},
        "triples",
        {"anchor": "a", "positive": "p", "negative": "n", "negatives": ["n", "m"]},
    ),
    "pair": ({"anchor": "a", "positive": "p"}, "pairs", {"anchor": "a", "positive": "p"}),
    "text": ({"text": "The sky is blue."}, "text", {"text": "The sky is blue."}),
    "messages": ({"messages": SKY + BLUE}, "text", {"text": SKY + BLUE}),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "What color is the sky?"},
                {"from": "gpt", "value": "It is blue."},
            ]
        },
        "text",
        {"text": SKY + BLUE},
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_recognised_and_normalised(case):
    raw, format, expected = ROWS[case]
    examples = Examples.from_rows([raw])
    assert examples.format == format
    assert examples.rows == [expected]


@pytest.mark.parametrize("case", ROWS)
def test_normalised_rows_stay_as_they_are(case):
    first = Examples.from_rows([ROWS[case][0]])
    again = Examples.from_rows(first.rows, format=first.format)
    assert again.rows == first.rows
    assert again.fingerprint == first.fingerprint


def test_every_format_is_covered():
    assert {format for _, format, _ in ROWS.values()} == set(FORMATS)


@pytest.mark.parametrize("case", ROWS)
def test_json_lines_and_parquet_give_the_same(case, tmp_path):
    raw, _, expected = ROWS[case]
    (tmp_path / "d.jsonl").write_text(json.dumps(raw) + "\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([raw]), tmp_path / "d.parquet")
    lines = load(str(tmp_path / "d.jsonl"))
    table = load(str(tmp_path / "d.parquet"))
    assert lines.rows == table.rows == [expected]
    assert lines.fingerprint == table.fingerprint


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_csv_of_text_and_of_json(tmp_path):
    rows = [{"prompt": 'a "quoted",\nsecond line', "chosen": "[1, 2]", "rejected": "x"}]
    assert load(write_csv(tmp_path / "d.csv", rows)).rows == rows
    talk = [{"prompt": json.dumps(SKY), "completion": json.dumps(BLUE), "label": "False"}]
    normalised = {"prompt": SKY, "completion": "It is blue.", "label": False}
    assert load(write_csv(tmp_path / "talk.csv", talk)).rows == [normalised]
    ranked = [{"prompt": "p", "responses": '["a", "b"]', "scores": "[0.5, 2]"}]
    assert load(write_csv(tmp_path / "ranked.csv", ranked)).rows == [
        {"prompt": "p", "responses": ["b", "a"], "scores": [2, 0.5]}
    ]


def test_json_and_gzip(tmp_path):
    rows = [{"prompt": "á"}, {"prompt": "b"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    for name in ("list.json", "lines.json", "d.jsonl.gz", "marked.jsonl"):
        assert load(str(tmp_path / name)).rows == rows


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert load(str(tmp_path / "d.jsonl")).rows == [{"prompt": "a\u2028b"}]


def test_data_set_of_the_hub_form(tmp_path, monkeypatch):
    """`owner/name` is read by `datasets`, which takes a folder of that name for it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    examples = load("owner/name", split="train[1:3]", columns={"prompt": "question"})
    assert examples.rows == [{"prompt": f"q{i}", "answer": f"a{i}"} for i in (1, 2)]
    with pytest.raises(PostgradError, match=r"owner/name: cannot be loaded.*validation"):
        load("owner/name", split="validation")


def test_unreachable_data_set_is_one_line(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PostgradError, match=r"^nobody-at-all/nothing-here: cannot be") as caught:
        load("nobody-at-all/nothing-here")
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PostgradError, match=r"'pyarrow'.*postgrad\[data\]"):
        load(str(tmp_path / "d.parquet"))
    with pytest.raises(PostgradError, match=r"'datasets'.*postgrad\[data\]"):
        load("owner/name")


def test_columns_are_mapped_and_the_others_kept():
    raw = [{"question": "1+1=", "prompt": "unused", "solution": "2", "level": 3}]
    examples = Examples.from_rows(raw, columns={"prompt": "question", "answer": "solution"})
    assert examples.rows == [{"prompt": "1+1=", "answer": "2", "level": 3}]


def test_pairs_and_triples_by_position_when_asked_for():
    raw = [{"a": "q", "b": "p", "c": "n"}]
    triple = Examples.from_rows(raw, format="triples")
    assert triple.rows == [{"anchor": "q", "positive": "p", "negative": "n"}]
    pair = Examples.from_rows([{"question": "q", "answer": "p"}], format="pairs")
    assert pair.rows == [{"anchor": "q", "positive": "p"}]


def test_several_positives_give_several_rows_of_the_same_number():
    raw = [{"query": "a", "pos": ["p"]}, {"query": "b", "pos": ["q", "r"]}]
    examples = Examples.from_rows(raw)
    assert [row["positive"] for row in examples] == ["p", "q", "r"]
    assert examples.where(2) == "rows, row 2"


def test_rows_get_the_same_columns():
    examples = Examples.from_rows([{"prompt": "a", "hint": "h"}, {"prompt": "b", "level": 1}])
    assert examples[1] == {"prompt": "b", "hint": None, "level": 1}


def test_message_parts_nulls_and_tool_calls():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    told = {"role": "tool", "content": "blue", "name": None}
    parts = {"role": "user", "content": [{"type": "text", "text": "sky?"}]}
    examples = Examples.from_rows([{"prompt": [parts, call, told]}])
    assert examples[0]["prompt"] == [
        user("sky?"),
        {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "blue"},
    ]


PREFERENCES = [{"prompt": "p", "chosen": "c", "rejected": "r", "id": 7}]
CONVERSIONS = [
    (PREFERENCES, "demonstrations", [{"prompt": "p", "id": 7, "completion": "c"}]),
    (
        PREFERENCES,
        "labelled",
        [
            {"prompt": "p", "id": 7, "completion": "c", "label": True},
            {"prompt": "p", "id": 7, "completion": "r", "label": False},
        ],
    ),
    (PREFERENCES, "rankings", [{"prompt": "p", "id": 7, "responses": ["c", "r"]}]),
    (PREFERENCES, "prompts", PREFERENCES),
    (
        [{"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 2]}],
        "preferences",
        [{"prompt": "p", "chosen": "b", "rejected": "a"}],
    ),
    (
        [{"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]}],
        "demonstrations",
        [{"prompt": "p", "completion": "b"}],
    ),
    (
        [{"anchor": "a", "positive": "p", "negative": "n"}],
        "pairs",
        [{"anchor": "a", "positive": "p", "negative": "n"}],
    ),
    (
        [{"prompt": "1+1=", "answer": 2}],
        "demonstrations",
        [{"prompt": "1+1=", "answer": 2, "completion": "2"}],
    ),
    (
        [
            {"prompt": "p", "completion": "good", "label": True},
            {"prompt": "p", "completion": "bad", "label": False},
        ],
        "demonstrations",
        [{"prompt": "p", "completion": "good"}],
    ),
    ([{"prompt": "a", "completion": " b"}], "text", [{"text": "a b"}]),
    ([{"prompt": SKY, "completion": BLUE}], "text", [{"text": SKY + BLUE}]),
    (
        [{"messages": SKY + BLUE + [user("Sure?"), assistant("Yes.")]}],
        "demonstrations",
        [{"prompt": SKY + BLUE + [user("Sure?")], "completion": "Yes."}],
    ),
]


@pytest.mark.parametrize(("raw", "format", "expected"), CONVERSIONS)
def test_conversions_keep_the_meaning(raw, format, expected):
    examples = Examples.from_rows(raw)
    converted = examples.require(format)
    assert converted.format == format
    assert converted.rows == expected
    assert examples.require("triples", examples.format) is examples


def test_a_conversion_still_names_the_row_of_the_source(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": "p", "responses": ["a", "b"], "scores": s} for s in ([1, 2], [3, 3])]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(PostgradError, match=r"d\.jsonl, row 2: all scores are 3"):
        load(str(path)).require("preferences")
    labelled = Examples.from_rows(PREFERENCES * 2).require("labelled")
    assert [labelled.where(i) for i in (1, 2)] == ["rows, row 1", "rows, row 2"]


def test_require_says_what_is_missing_and_what_was_found():
    prompts = Examples.from_rows([{"prompt": "p", "output": "o"}])
    expected = (
        r"^rows \(prompts\): demonstrations need the columns prompt, completion; missing: "
        r"completion; found: prompt, output; perhaps columns.completion=output$"
    )
    with pytest.raises(PostgradError, match=expected):
        prompts.require("demonstrations")
    with pytest.raises(PostgradError, match="missing: anchor, positive, negative"):
        prompts.require("triples")
    with pytest.raises(PostgradError, match="did you mean 'preferences'"):
        prompts.require("preference")
    with pytest.raises(PostgradError, match="missing: prompt, completion; found: text"):
        Examples.from_rows([{"text": "t"}]).require("demonstrations")


def test_parts_of_a_split_are_disjoint_and_keep_their_row_numbers(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = "\n".join(json.dumps({"prompt": f"p{i}"}) for i in range(10))
    path.write_text(lines, encoding="utf-8")
    train, held_out = load(str(path), split="train[:80%]"), load(str(path), split="train[80%:]")
    assert [row["prompt"] for row in [*train, *held_out]] == [f"p{i}" for i in range(10)]
    assert (len(train), held_out.where(0)) == (8, f"{path}, row 9")
    assert load(str(path), split="train[2:4]").rows == [{"prompt": "p2"}, {"prompt": "p3"}]
    assert train.first(None) is train
    assert len(train.first(3)) == 3


def test_fingerprint_tells_content():
    one, other = ({"prompt": "p", "answer": a} for a in ("1", "2"))
    fingerprint = Examples.from_rows([one, other]).fingerprint
    assert fingerprint == Examples.from_rows([dict(one), dict(other)], name="x").fingerprint
    assert fingerprint != Examples.from_rows([other, one]).fingerprint
    assert len(fingerprint) == 64
    tags = Examples.from_rows([{"prompt": "p", "tags": {"a", "b", "c"}}]).fingerprint
    assert tags == Examples.from_rows([{"prompt": "p", "tags": {"c", "b", "a"}}]).fingerprint
