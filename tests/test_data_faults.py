"""Data that cannot be used: one line that names the file, the row and the column."""

import gzip
import json

import pytest

from postgrad.errors import PostgradError
from postgrad.tasks import Examples, load


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SKY = [user("What color is the sky?")]
BLUE, GREEN = [assistant("It is blue.")], [assistant("It is green.")]

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
# the second row of a file whose first is good, and what the error says after its place
FAULTS = {
    "missing field": (GOOD, {"prompt": "p", "chosen": "c"}, "'rejected' is missing or null"),
    "null field": (GOOD, {**GOOD, "chosen": None}, "'chosen' is missing or null"),
    "null prompt": (GOOD, {**GOOD, "prompt": None}, "'prompt' is missing or null"),
    "empty prompt": (GOOD, {**GOOD, "prompt": "  "}, "'prompt' is empty"),
    "no messages": ({"prompt": SKY}, {"prompt": []}, "'prompt' is empty"),
    "no content": ({"prompt": SKY}, {"prompt": [user("")]}, "message 1 has no content"),
    "empty response": (GOOD, {**GOOD, "rejected": ""}, "'rejected' is empty"),
    "same": (GOOD, {**GOOD, "rejected": "c"}, "chosen and rejected are the same"),
    "same in other spelling": (
        {"prompt": SKY, "chosen": BLUE, "rejected": GREEN},
        {"prompt": SKY, "chosen": BLUE, "rejected": SKY + BLUE},
        "'rejected' continues the prompt with the turns user, assistant; expected one turn",
    ),
    "wrong type": (GOOD, {**GOOD, "chosen": 3}, "'chosen' holds int, expected text"),
    "wrong type of prompt": (GOOD, {**GOOD, "prompt": 3}, "holds int, expected text or a list"),
    "half a conversation": (GOOD, {**GOOD, "chosen": BLUE}, "is a conversation, one is not"),
    "nothing shared": (
        {"chosen": "a b", "rejected": "a c"},
        {"chosen": "one", "rejected": "two"},
        "share no beginning to be the prompt",
    ),
    "no turn shared": (
        {"chosen": SKY + BLUE, "rejected": SKY + GREEN},
        {"chosen": BLUE, "rejected": GREEN},
        "share no first turn to be the prompt",
    ),
    "unknown role": (
        {"prompt": SKY},
        {"prompt": [{"role": "usr", "content": "x"}]},
        "unknown role 'usr': did you mean 'user'",
    ),
    "picture": (
        {"prompt": SKY},
        {"prompt": [user([{"type": "image", "url": "x"}])]},
        "a message part of type 'image', expected text",
    ),
    "null answer": (
        {"prompt": "p", "answer": "a"},
        {"prompt": "p", "answer": None},
        "'answer' is missing or null",
    ),
    "label": (
        {"prompt": "p", "completion": "c", "label": True},
        {"prompt": "p", "completion": "c", "label": "good"},
        "'label' is 'good', expected true or false",
    ),
    "ranking of one": (
        {"prompt": "p", "responses": ["a", "b"]},
        {"prompt": "p", "responses": ["a"]},
        "a ranking needs at least 2 responses, column 'responses' has 1",
    ),
    "responses not a list": (
        {"prompt": "p", "responses": ["a", "b"]},
        {"prompt": "p", "responses": {"a": 1}},
        "'responses' holds dict, expected a list",
    ),
    "responses not JSON": (
        {"prompt": "p", "responses": ["a", "b"]},
        {"prompt": "p", "responses": "a, b"},
        "'responses' is not a list in JSON",
    ),
    "wrong count of scores": (
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": "p", "responses": ["a", "b"], "scores": [1]},
        "'scores' has 1 values for 2 responses",
    ),
    "score that is no number": (
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]},
        "'scores' holds nan, expected a number",
    ),
    "negative equal to the positive": (
        {"anchor": "a", "positive": "p", "negative": "n"},
        {"anchor": "a", "positive": "p", "negative": "p"},
        "a negative is the same as the positive",
    ),
    "no positives": (
        {"query": "a", "pos": ["p"], "neg": ["n"]},
        {"query": "a", "pos": [], "neg": ["n"]},
        "'positive' is empty",
    ),
    "not an object": (GOOD, ["p", "c", "r"], "expected an object with named columns, got list"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_names_its_row(case, tmp_path):
    good, bad, message = FAULTS[case]
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(bad) + "\n", encoding="utf-8")
    with pytest.raises(PostgradError) as caught:
        load(str(path))
    # the blank line counts: the number is that of the line in the file
    assert str(caught.value).startswith(f"{path}, row 3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


FILES = {
    "d.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', r"row 2: not valid JSON \(Expecting value"),
    "broken.json": (b'[{"prompt": "a"},]', "broken.json: not valid JSON"),
    "empty.jsonl": (b" \n", "the file is empty"),
    "none.json": (b"[]", "the file holds no rows"),
    "header.csv": (b"prompt,answer\n", "the file holds no rows"),
    "wide.csv": (b"prompt,answer\na,b\na,b,c\n", "row 2: 3 fields, the header has 2"),
    "quote.csv": (b'prompt\na\n"b', "row 2: not valid CSV"),
    "cell.csv": (b"prompt,answer\na,b\n,c\n", "row 2: column 'prompt' is missing or null"),
    "latin.jsonl": (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "row 2: not UTF-8"),
    "d.parquet": (b"not parquet", "not a valid Parquet file"),
    "d.jsonl.gz": (b"not gzip", "cannot be read"),
    "short.jsonl.gz": (gzip.compress(b'{"prompt": "a"}')[:-9], "cannot be read"),
    "notes.txt": (b"hello", "unknown file type '.txt'"),
    "other.jsonl": (
        b'{"question": "a", "x": 1}',
        r"the columns question, x match no format .* perhaps columns.prompt=question",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_used(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PostgradError, match=message) as caught:
        load(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_names_that_are_no_data(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "q"}', encoding="utf-8")
    file = str(tmp_path / "train.jsonl")
    with pytest.raises(PostgradError, match=r"no such file: did you mean .*train\.jsonl"):
        load(str(tmp_path / "tran.jsonl"))
    with pytest.raises(PostgradError, match="nor a folder"):
        load(str(tmp_path / "none" / "d.jsonl"))
    with pytest.raises(PostgradError, match="is not a file"):
        load(str(tmp_path))
    with pytest.raises(PostgradError, match="'docstring': did you mean 'docstrings'"):
        load("docstring")
    with pytest.raises(PostgradError, match="name is empty"):
        load("")
    with pytest.raises(PostgradError, match="unknown column 'qestion': did you mean 'question'"):
        load(file, columns={"prompt": "qestion"})
    with pytest.raises(PostgradError, match="unknown format 'prompt': did you mean 'prompts'"):
        load(file, format="prompt")
    with pytest.raises(PostgradError, match="only embedded tasks take settings, got size"):
        load(file, settings={"size": 3})
    with pytest.raises(PostgradError, match="a file has one split, train; got 'test'"):
        load(file, split="test", columns={"prompt": "question"})
    with pytest.raises(PostgradError, match=r"the split train\[5:\] is empty \(1 rows"):
        load(file, split="train[5:]", columns={"prompt": "question"})
    with pytest.raises(PostgradError, match="expected a name or a part"):
        load(file, split="train[:x]")
    with pytest.raises(PostgradError, match="rows: no rows"):
        Examples.from_rows([])


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "x" * 5000 + ".csv"])
def test_a_name_that_no_file_can_have(name):
    with pytest.raises(PostgradError, match="cannot be read"):
        load(name)


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000])
def test_json_beyond_the_limits_of_its_reader(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(PostgradError, match="row 2: not valid JSON"):
        load(str(file))
