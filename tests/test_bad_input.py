"""Configurations and data files that are wrong in every way: one line and exit code 2, or a run.

Each case is a valid one with a fault that hypothesis chooses, checked to the end of
`postgrad.api.prepare`. What is refused there must be refused by the command line, and a sample of
what is taken is trained for a step. The cases are the same in every run; POSTGRAD_FUZZ=10 makes ten
times as many.
"""

import contextlib
import csv
import io
import json
import os
import signal
import string
import subprocess
import sys
import zlib
from itertools import count

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from postgrad import api
from postgrad.catalogue import entries, method_class
from postgrad.cli import main
from postgrad.config import LoopSettings, dotted_keys, read_yaml
from postgrad.errors import PostgradError

MORE = int(os.environ.get("POSTGRAD_FUZZ", "1"))
SECONDS = 60  # for one case
# what chooses among faults; hypothesis looks for a simpler case where one fails
CHANCE = st.randoms(use_true_random=False)
METHODS = [slug for slug, entry in entries().items() if entry.python and not entry.study]

ROW = {
    "prompt": "What is 2 + 3?",
    "answer": "5",
    "chosen": "It is 5.",
    "rejected": "It is 4.",
    "score_chosen": 1.0,
    "score_rejected": 0.0,
    "solution": "2 + 3 = 5, so the answer is 5.",
    "hint": "five",
    "anchor": "two and three",
    "positive": "five",
    "negative": "four",
}
FUNCTIONS = """
def right(completions, prompts, **columns):
    return [(1 + len(str(p)) % 2) * float("5" in t) for p, t in zip(prompts, completions)]

def judge(completions, rubric):
    return [[5.0] for _ in completions]

def refine(rubric, records):
    return rubric

def critique(completions):
    return [None for _ in completions]
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with data, reward functions and a model, which cases only read."""
    folder = tmp_path_factory.mktemp("input")
    rows = [{**ROW, "prompt": f"What is 2 + 3 + {i}?"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(FUNCTIONS)
    return folder


def valid(slug, here):
    """Settings with which `slug` can be prepared in little time."""
    fields = method_class(slug).Config.model_fields
    data = {"name": str(here / "rows.jsonl")}
    known = {
        "model": "tiny",
        "data": data,
        "eval_data": data,
        "reward": f"{here}/own.py:right",
        "environments": 2,
        "hidden": [8],
        "evaluation_episodes": 1,
        "evaluation_samples": 2,
        "batch_size": 8,
    }
    found = {name: value for name, value in known.items() if name in fields}
    if slug in OWN:
        found = OWN[slug](found, here)
    for name in ("judge", "critique", "refine"):
        if name in found:
            found[name] = f"{here}/{found[name]}"
    return {"steps": 1, "log": [], "report": False, "device": "cpu", **found}


def without(*names, **others):
    return lambda found, here: {
        **{name: value for name, value in found.items() if name not in names},
        **others,
    }


OWN = {
    "isogclr": without("model", "data", "eval_data"),
    "simclr": without("model", "data", "eval_data"),
    "flow-grpo": without("model", "reward", "data", "eval_data", prompts=2),
    "grpo-guard": without("model", "reward", "data", "eval_data", prompts=2),
    "riskpo": without(batch_size=5),
    "salsa": without(second="tiny"),
    "rlgf": without(guide="tiny"),
    "rto": without(dpo_model="tiny"),
    "mixed-po": without(dpo_steps=1, steps=2, gamma=1.5),
    "dapo-direct-advantage": without(gather_steps=1, steps=2),
    "meta-po": without(judge="own.py:judge", refine="own.py:refine", rubric="It is right."),
    "dsp": without(black_box={"name": "tiny"}),
    "text2grad": without(critique="own.py:critique"),
}


def fuzzed(cases, slug):
    """So many cases of `slug`, the same in every run."""
    chosen = settings(
        max_examples=cases * MORE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(zlib.crc32(slug.encode()))(chosen(test))


# Running a case -------------------------------------------------------------------------------


@contextlib.contextmanager
def limited():
    """A case that takes longer than SECONDS is a fault, not a wait."""

    def stop(number, frame):
        raise TimeoutError(f"the case took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused_in_one_line(arguments, folder, why):
    """The command line says one line, exits with 2, and leaves nothing in `folder`."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, f"exit {result.exit_code} {result.exception!r}; {why}"
    written = result.stderr.replace("\r", "\n").splitlines()
    lines = [line for line in written if line and not line.startswith("Loading weights")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: "), lines[0]
    assert len(lines[0]) < 2000, f"a line of {len(lines[0])} characters"
    assert not (folder / "run").exists(), "a partly written run folder"


def check(slug, config, folder, train):
    """One configuration file, as text or bytes: says whether it is taken or refused."""
    path = folder / "config.yaml"
    path.write_bytes(
        config if isinstance(config, bytes) else config.encode("utf-8", "surrogatepass")
    )
    arguments = ["train", slug, "--config", str(path)]
    with limited():
        try:
            values = read_yaml(path)
            values.setdefault("output", str(folder / "run"))
            method, loop = api.prepare(slug, config=values)
        except PostgradError as error:
            refused_in_one_line(arguments, folder, str(error))
            return f"refused: {error}"
        with contextlib.closing(method):
            assert not (folder / "run").exists()
        if train and loop.steps == 1:
            values["output"] = str(folder / "run")
            path.write_text(yaml.safe_dump(values))
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code in (0, 2), f"{result.exit_code} {result.exception!r}"
    return "taken"


# Faults of configurations ---------------------------------------------------------------------

VALUES = [
    None,
    True,
    False,
    "",
    " ",
    "\t",
    "é中\u202e",
    "x" * 10_000,
    "a\nb",
    "\0",
    "-",
    ".",
    "/",
    "~",
    "~nobody/x",
    "null",
    "1e5",
    "nan",
    "${HOME}",
    "../../etc/passwd",
    "own.py:nothing",
    "a:b",
    ":",
    "{}",
    "%s",
    0,
    -1,
    1,
    2,
    3,
    2**31,
    2**63,
    10**40,
    -(2**70),
    0.0,
    -0.0,
    0.5,
    1.5,
    -0.1,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    [],
    [1],
    [[]],
    [[[1]]],
    ["a", "b"],
    [None],
    [{"name": "x"}],
    {},
    {"a": 1},
    {"name": None},
    {"name": ["x"]},
    {"name": {"name": "x"}},
    {"": ""},
    {"name": "", "extra": 1},
]
RAW = [
    "!!python/object/apply:os.system ['true']",
    "!!binary aGVsbG8=",
    "2024-01-01",
    "0x10",
    "0o17",
    "1_000",
    "12:30:45",
    "&a [*a]",
    "&b {name: *b}",
    "*nowhere",
    "!!set {a, b}",
    "? x",
    "| \n  text",
    "!unknown x",
    "[1, 2",
    "'open",
    "{a: 1, a: 2}",
    "<<",
    "@",
    "`x`",
    "\x07",
    "!!float x",
    "!!int ''",
    "!!timestamp x",
    "{[1]: 2}",
    "{? {a: 1} : b}",
]


def nested(values, dotted, value):
    """`values` with the dotted key set, over whatever stands in its way."""
    first, _, rest = dotted.partition(".")
    inner = values.get(first)
    if rest:
        inner = {"name": inner} if isinstance(inner, str) else inner
        value = nested(inner if isinstance(inner, dict) else {}, rest, value)
    return {**values, first: value}


def misspelt(key, random):
    place = random.randrange(len(key))
    return random.choice(
        [
            key[:place] + key[place + 1 :],
            key + "s",
            key.upper(),
            key.replace("_", "-"),
            key[:place] + random.choice(string.ascii_letters) + key[place:],
            " " + key,
            key + "\u00a0",
        ]
    )


def faulty(slug, values, random):
    """A configuration file of `slug` with one fault or several, as text or bytes."""
    keys = [*dotted_keys(method_class(slug).Config), *dotted_keys(LoopSettings)]
    text = None
    for _ in range(random.choice([1, 1, 1, 2])):
        key = random.choice([key for key in keys if key not in NEVER])
        kind = random.randrange(8)
        if kind < 4:
            values = nested(values, key, random.choice(VALUES))
        elif kind == 4:
            values = {**values, misspelt(key, random): random.choice(VALUES)}
        elif kind == 5:
            raw = random.choice(RAW)
            first = key.partition(".")[0]
            rest = {name: value for name, value in values.items() if name != first}
            text = yaml.safe_dump(rest, allow_unicode=True) + f"{first}: {raw}\n"
        elif kind == 6:
            text = yaml.safe_dump(values)
            text += random.choice(
                [
                    f"{key}: 1\n{key}: 2\n",
                    "\tsteps: 1\n",
                    "---\nsteps: 1\n",
                    "- 1\n",
                    ": x\n",
                    "}\n",
                    "%YAML 9.9\n",
                    "# only\r\nsteps:  1\r\n",
                    "1: 2\n",
                    "null: 1\n",
                    "? [a]\n: b\n",
                    "steps: 1 # \u0000\n",
                    "method: dpo\n",
                    "<<: {steps: 2}\n",
                    "<<: 3\n",
                    "\ud800: 1\n",
                ]
            )
        else:
            data = bytearray(yaml.safe_dump(values).encode())
            place = random.randrange(len(data))
            how = random.randrange(4)
            if how == 0:
                return bytes(data[:place])
            if how == 1:
                data[place] = random.randrange(256)
                return bytes(data)
            if how == 2:
                return random.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\x1f\x8b"]) + data
            return random.randbytes(200)
    return yaml.safe_dump(values, allow_unicode=True) if text is None else text


# that would be tried: a wait or a machine is what they ask for
NEVER = {"threads", "processes", "nodes", "rendezvous"}


@pytest.mark.slow
@pytest.mark.parametrize("slug", METHODS)
def test_a_faulty_configuration_is_refused_in_one_line_or_runs(slug, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check(slug, yaml.safe_dump(valid(slug, here)), tmp_path, train=True) == "taken"
    numbers = count()

    @fuzzed(20, slug)
    @given(random=CHANCE)
    def refused_or_runs(random):
        config = faulty(slug, valid(slug, here), random)
        number = next(numbers)
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            check(slug, config, folder, train=number % 20 == 0)
        except Exception as error:
            shown = config.replace("x" * 9_900, "…") if isinstance(config, str) else config
            raise AssertionError(f"{slug}: {error!r}\n{shown!r}") from error

    refused_or_runs()
    assert next(numbers) >= 20 * MORE


# Faults of data files -------------------------------------------------------------------------

READERS = ("dpo", "sft", "grpo", "copg", "kto", "reward-modeling", "infonce", "lipo")
CELLS = [
    None,
    "",
    " ",
    "\n",
    0,
    1,
    -1,
    1.5,
    True,
    float("nan"),
    float("inf"),
    [],
    [1],
    {},
    {"a": 1},
    [{"role": "user", "content": "x"}],
    [{"role": "user"}],
    [{"role": 1, "content": 1}],
    [{"role": "assistant", "content": None}],
    "\u202e\0\ud83d\ude00",
    "x" * 100_000,
    "5\r\n6",
    10**400,
]
LINES = [
    b"",
    b"   ",
    b"{",
    b"}",
    b"null",
    b"[]",
    b"1",
    b'"text"',
    b"{}",
    b'{"prompt": ',
    b"\x00",
    b"\xff\xfe",
    b'{"prompt": NaN}',
    b'{"prompt": "a", "prompt": "b"}',
    b"[" * 100_000,
    b"prompt,chosen",
    b"\xef\xbb\xbf",
    b'{"prompt": "\\ud800"}',
    b"# comment",
    b'{"": 1}',
    b'{"prompt": {"a": [1, {"b": null}]}}',
    b"1" * 5000,
]


def table(rows, kind):
    """The rows as the bytes of a file of that kind."""
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "json":
        return json.dumps(rows).encode()
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    target = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), target)
    return target.getvalue()


def faulty_file(folder, random):
    """The path of a data file with a fault, of any kind and place."""
    kind = random.choice(["jsonl", "jsonl", "json", "csv", "parquet"])
    rows = [{**ROW, "prompt": f"What is 2 + 3 + {i}?", "id": i} for i in range(12)]
    columns = list(ROW)
    where = random.randrange(len(rows))
    fault = random.randrange(14)
    if fault == 0:
        for row in rows:
            del row[columns[random.randrange(5)]]
            break
    elif fault == 1:
        for row in rows:
            row.pop(random.choice(columns), None)
    elif fault < 5:
        rows[where] = {**rows[where], random.choice(columns): random.choice(CELLS)}
    elif fault == 5:
        rows = [rows[0]] * len(rows)
    elif fault == 6:
        rows = []
    try:
        data = table(rows, kind)
    except (ValueError, TypeError, OverflowError, pytest.importorskip("pyarrow").ArrowException):
        kind, data = "jsonl", table(rows, "jsonl")  # a table cannot hold them
    if fault == 7:
        data = data[: random.randrange(len(data))]
    elif fault == 8:
        changed = bytearray(data)
        changed[random.randrange(len(changed))] = random.randrange(256)
        data = bytes(changed)
    elif fault == 9:
        lines = data.split(b"\n")
        lines.insert(random.randrange(len(lines)), random.choice(LINES))
        data = b"\n".join(lines)
    elif fault == 10:
        data = random.choice(
            [
                b"\xef\xbb\xbf" + data,
                data.replace(b"\n", b"\r\n"),
                data.decode("latin1").encode("utf-16"),
                data + data,
                b"\n\n" + data,
                random.randbytes(500),
                b"",
                data + b"\x1f\x8b",
            ]
        )
    name = f"rows.{kind}"
    if fault == 11:
        name = random.choice(
            ["rows.jsonl", "rows.csv", "rows.json", "rows.parquet", "rows.jsonl.gz"]
        )
    path = folder / name
    if fault == 12:
        how = random.randrange(4)
        if how == 0:
            path.mkdir()
        elif how == 1:
            path.symlink_to(path)
        elif how == 2:
            path = folder / random.choice(
                ["missing.jsonl", "a\nb.jsonl", "x" * 300 + ".jsonl", "\0.csv"]
            )
        else:
            os.mkfifo(path)
        return path
    path.write_bytes(data)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("slug", READERS)
def test_a_faulty_data_file_is_refused_in_one_line_or_read(slug, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbers = count()

    @fuzzed(80, slug)
    @given(random=CHANCE)
    def refused_or_read(random):
        number = next(numbers)
        folder = tmp_path / str(number)
        folder.mkdir()
        path = faulty_file(folder, random)
        config = valid(slug, here)
        config["data"] = {"name": str(path)}
        config.pop("eval_data", None)
        try:
            check(slug, yaml.safe_dump(config), folder, train=number % 20 == 0)
        except Exception as error:
            size = path.stat().st_size if path.is_file() else None
            held = path.read_bytes()[:2000] if size else size
            raise AssertionError(f"{slug}: {error!r}\n{path}\n{held!r}") from error

    refused_or_read()
    assert next(numbers) >= 80 * MORE


@pytest.mark.parametrize(
    "words",
    [
        ["train", "dpo", "--config", "missing.yaml"],
        ["train", "dpo", "beta=nan"],
        ["train", "dpo", "--model", "tiny", "--data", "a\nb.jsonl"],
        ["train", "nothing", "a=1"],
        ["train", "grpo", "steps=!!int ''"],
        ["train", "grpo", "--config", "."],
    ],
)
def test_the_program_itself_says_one_line_and_exits_with_2(words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from postgrad.cli import main; main()", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
