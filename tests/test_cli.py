"""What a user sees: answers, and one clear line with exit code 2 for every mistake."""

import json
import re
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy
import pytest
from click.testing import CliRunner

from postgrad.catalogue import entries
from postgrad.claims.base import load_claim
from postgrad.claims.run import _kept
from postgrad.cli import main

TINY_DPO = ["train", "dpo", "--model", "tiny", "max_response_tokens=64", "steps=1"]
TINY_GRPO = [
    "train", "grpo", "--model", "tiny", "--data", "addition", "data.settings.size=8",
    "rollout.max_new_tokens=4", "steps=1", "batch_size=2", "eval_size=2",
]  # fmt: skip

STUDY = "online-offline-gap"


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(main, [str(a) for a in arguments])

    return run


@pytest.fixture
def refused(call, tmp_path):
    """The command is refused with one line that matches, and leaves nothing behind."""

    def check(pattern, *arguments):
        before = sorted(tmp_path.rglob("*"))
        result = call(*arguments)
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert result.exit_code == 2, result.output + repr(result.exception)
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        assert re.search(pattern, lines[0]), lines[0]
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return check


def rows(path, *values):
    Path(path).write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


PAIR = {"prompt": "a b", "chosen": "good", "rejected": "bad"}


def test_the_list_names_all_methods(call):
    listed = json.loads(call("list", "--json").stdout)
    assert len(listed) == len(entries()) >= 81
    assert {"slug", "title", "paper", "family", "status"} <= listed[0].keys()
    only = json.loads(call("list", "--family", "control", "--json").stdout)
    assert {row["family"] for row in only} == {"control"}
    assert "grace" in call("list").stdout


def test_a_study_is_listed_by_whether_its_result_is_there(call):
    def row(slug):
        listed = json.loads(call("list", "--ready", "--json").stdout)
        return next((row for row in listed if row["slug"] == slug), None)

    recorded = entries()["on-policy-suboptimal"].result() is not None
    assert (row("on-policy-suboptimal") is not None) == recorded
    assert row("dpo")["study"] is False
    listed = json.loads(call("list", "--json").stdout)
    studies = {row["slug"] for row in listed if row["study"]}
    assert studies == {"on-policy-suboptimal", "online-offline-gap"}


def test_a_study_is_reproduced_with_its_findings(call):
    """Arms that have been run are not run again: here they were made up."""
    claim = load_claim("on-policy-suboptimal")
    metrics = {claim.metric, *(finding.metric for finding in claim.findings)}
    for arm in claim.arms:
        kept = _kept(Path("made"), arm, 0)
        kept.parent.mkdir(exist_ok=True)
        outcome = {"values": dict.fromkeys(metrics, 0.5), "curves": {}, "seconds": 1.0}
        kept.write_text(json.dumps(outcome))
    done = call("reproduce", claim.slug, "--quick", "--seeds", 1, "--output", "made")
    assert done.exit_code == 0, done.output
    said = [line for line in done.stdout.splitlines() if "quick run, not decided: " in line]
    expected = [f"{f.statement} ({f.metric})" for f in claim.findings]
    assert [line.partition(": ")[2] for line in said] == expected
    assert "Findings" in Path("made/report.html").read_text()


def test_show_prints_equation_settings_and_sources(call):
    shown = call("show", "rdpo")
    assert shown.exit_code == 0, shown.output
    for expected in ("2403.00409", "flip_rate", "(1 - eps) l(h)", "learning_rate"):
        assert expected in shown.stdout
    parts = call("show", "grpo").stdout
    assert "ppo: PPO's clip" in parts


def test_training_leaves_a_complete_run_and_can_be_inspected(call, tmp_path):
    done = call(*TINY_GRPO, "output=run")
    assert done.exit_code == 0, done.output
    assert "run folder: run" in done.stdout
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "report.html", "events"):
        assert (tmp_path / "run" / name).exists(), name
    assert call("sample", "run", "001+002=", "--max-new-tokens", 3).exit_code == 0
    assert "reward" in call("evaluate", "run").stdout
    assert "reward" in call("evaluate", "run", "--task", "addition", "--limit", 2).stdout
    again = call("train", "--config", "run/config.yaml", "output=again", "report=false")
    assert again.exit_code == 0, again.output

    def losses(folder):
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("loss") for line in lines]

    assert losses("run") == losses("again")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("grace", ["--model", "tiny", "rollout.max_new_tokens=2", "rollout.samples=2"]),
        ("infonce", ["--model", "tiny"]),
        ("isogclr", []),
    ],
)
def test_texts_are_embedded(call, refused, tmp_path, method, settings):
    quick = ["--data", "docstrings", "steps=1", "batch_size=2", "report=false", "output=run"]
    if method != "isogclr":
        quick += ["eval_size=2", "max_text_tokens=8"]
    done = call("train", method, *settings, *quick)
    assert done.exit_code == 0, done.output
    Path("texts.txt").write_text("one\nanother\n" * 20)
    assert call("embed", "run", "texts.txt").exit_code == 0
    vectors = numpy.load("texts.npy")
    assert len(vectors) == 40
    assert numpy.isfinite(vectors).all()
    assert numpy.allclose(vectors[0], vectors[38], atol=1e-4)
    assert abs(vectors[0] - vectors[1]).max() > 1e-3
    refused("gone.txt does not exist", "embed", "run", "gone.txt")
    Path("hole.txt").write_text("one\n\n")
    refused("hole.txt, row 2: the text is empty", "embed", "run", "hole.txt")


def test_a_run_on_images_embeds_no_texts(call, refused):
    arguments = ["train", "isogclr", "steps=1", "report=false", "output=run"]
    assert call(*arguments).exit_code == 0
    Path("texts.txt").write_text("one\n")
    refused("encoder is for images", "embed", "run", "texts.txt")


def test_a_resumed_run_says_which_keys_differ(call, tmp_path):
    assert call(*TINY_GRPO, "output=run", "report=false").exit_code == 0
    changed = call("train", "--resume", "run", "learning_rate=0.5")
    assert changed.exit_code == 2
    assert "learning_rate: 1e-06 then, 0.5 now" in changed.stderr
    assert call("train", "--resume", "run", "steps=2", "--allow-changes").exit_code == 0


def test_own_data_and_own_reward(call, tmp_path):
    rows("pairs.jsonl", *({"question": f"q{i}", "yes": f"a{i}", "no": "z"} for i in range(8)))
    done = call(
        *TINY_DPO, "--data", "pairs.jsonl", "data.columns.prompt=question",
        "data.columns.chosen=yes", "data.columns.rejected=no", "batch_size=4", "output=dpo",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows("prompts.jsonl", *({"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)))
    Path("reward.py").write_text(
        "def right(completions, answer, **columns):\n"
        "    return [float(a in c) for a, c in zip(answer, completions)]\n"
    )
    done = call(
        "train", "grpo", "--model", "tiny", "--data", "prompts.jsonl", "reward=reward.py:right",
        "steps=1", "batch_size=2", "rollout.max_new_tokens=4", "output=grpo",
    )  # fmt: skip
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("unknown method 'dpoo': did you mean 'dpo'", ["train", "dpoo"]),
        ("unknown method 'dppo'", ["show", "dppo"]),
        ("unknown method 'dppo'", ["reproduce", "dppo"]),
        ("unknown family 'contrl': did you mean 'control'", ["list", "--family", "contrl"]),
        ("bq-nco is planned", ["train", "bq-nco"]),
        ("bq-nco is planned", ["reproduce", "bq-nco"]),
        ("gap is a study.*`postgrad reproduce online-offline-gap`", ["train", STUDY]),
        ("gap is a study", ["compare", "dpo", STUDY, "--data", "docstrings", "--budget", "16"]),
        ("unknown key 'betta': did you mean 'beta'", ["train", "dpo", "betta=1"]),
        ("unknown key .*'rollout.sample'|'sample'", ["train", "grpo", "rollout.sample=1"]),
        ("beta: .*greater than 0", ["train", "dpo", "beta=-1"]),
        ("steps: .*integer", ["train", "dpo", "steps=many"]),
        ("flip_rate: .*0.5", ["train", "rdpo", "flip_rate=0.5"]),
        ("max_new_tokens: .*greater than 0", ["train", "grpo", "rollout.max_new_tokens=0"]),
        ("rollout.samples: .*at least 2", [*TINY_GRPO, "rollout.samples=1"]),
        ("'addtion'.*did you mean 'addition'", [*TINY_GRPO, "--data", "addtion"]),
        ("chain_sum", [*TINY_GRPO, "--data", "reasoning-gym/chain_sums"]),
        ("'tinny'.*'tiny'", [*TINY_GRPO, "--model", "tinny"]),
        ("absent.jsonl: no such file", [*TINY_DPO, "--data", "absent.jsonl"]),
        ("absent.yaml does not exist", ["train", "dpo", "--config", "absent.yaml"]),
        ("not a run folder", ["train", "--resume", "nowhere"]),
        ("is no run folder", ["evaluate", "nowhere"]),
        ("device: .*'gpu'", [*TINY_GRPO, "device=gpu"]),
        ("expected key=value", [*TINY_GRPO, "steps"]),
        ("which method", ["train"]),
        ("named twice", ["compare", "dpo", "dpo", "--data", "docstrings", "--budget", "16"]),
        ("budget: ", ["compare", "dpo", "sft", "--data", "docstrings", "--budget", "1"]),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(refused, pattern, arguments):
    refused(pattern, *arguments)


def test_a_setting_given_as_an_option_is_told_how(call):
    result = call("train", "grpo", "--batch-size", "3")
    assert result.exit_code == 2
    assert "Settings are given without dashes: batch_size=VALUE" in result.stderr
    assert "VALUE" not in call("inspect", "--batch-size", "3").stderr


@pytest.mark.parametrize(
    ("pattern", "content"),
    [
        ("d.jsonl: .*(empty|no rows)", ""),
        ("d.jsonl.*(row|line) 2", json.dumps(PAIR) + "\n{broken\n"),
        (
            "d.jsonl, row 2.*rejected",
            "\n".join(map(json.dumps, [PAIR, {"prompt": "x", "chosen": "y"}])),
        ),
        ("d.jsonl, row 1.*chosen", json.dumps({**PAIR, "chosen": None})),
        ("d.jsonl, row 1.*prompt", json.dumps({**PAIR, "prompt": ""})),
        ("d.jsonl, row 1.*same|identical", json.dumps({**PAIR, "rejected": "good"})),
        ("rejected", json.dumps({"prompt": "x", "answer": "y"})),
        ("d.jsonl, row 1.*1200 tokens|tokens, at most", json.dumps({**PAIR, "prompt": "x" * 1200})),
        (
            "no chat template",
            json.dumps({**PAIR, "prompt": [{"role": "user", "content": "hello"}]}),
        ),
    ],
)
def test_mistakes_in_data(refused, pattern, content):
    Path("d.jsonl").write_text(content)
    refused(pattern, *TINY_DPO, "--data", "d.jsonl")


def test_an_unknown_column_names_the_nearest(refused):
    rows("d.jsonl", {"question": "x", "chosen": "a", "rejected": "b"})
    refused(
        "'questoin'.*did you mean 'question'",
        *TINY_DPO, "--data", "d.jsonl", "data.columns.prompt=questoin",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "body"),
    [
        ("reward.py.*ZeroDivisionError.*line 2", "return [1 / 0]"),
        ("returned 1 .*2|expected 2", "return [1.0]"),
        ("None", "return None"),
        ("None", "return [None for c in completions]"),
        ("nan", "return [float('nan') for c in completions]"),
        ("inf", "return [float('inf') for c in completions]"),
        ("'good'|str", "return ['good' for c in completions]"),
        ("0.2 s|time", "import time\n    time.sleep(60)"),
    ],
)
def test_mistakes_of_a_reward_function_are_found_before_any_compute(refused, pattern, body):
    Path("reward.py").write_text(f"def score(completions, **columns):\n    {body}\n")
    sys.dont_write_bytecode = True
    refused(pattern, *TINY_GRPO, "reward=reward.py:score", "reward_time_limit=0.2")


def test_a_reward_that_does_not_exist(refused):
    Path("reward.py").write_text("def score(completions):\n    return [0.0]\n")
    refused("'scores'.*'score'", *TINY_GRPO, "reward=reward.py:scores")
    refused("absent.py", *TINY_GRPO, "reward=absent.py:score")
    refused("'exat'.*'exact'", *TINY_GRPO, "reward=exat")


def test_an_output_that_cannot_be_written_or_holds_a_run(call, refused):
    Path("file").write_text("")
    refused("output: .*not writable", *TINY_GRPO, "output=file/run")
    assert call(*TINY_GRPO, "output=run", "report=false").exit_code == 0
    refused("already holds a run", *TINY_GRPO, "output=run")


def test_debug_shows_the_traceback(call):
    result = call("--debug", "train", "dppo")
    assert result.exit_code == 1
    assert "unknown method" in str(result.exception)


@pytest.mark.parametrize("arguments", [["--help"], ["list"]])
def test_help_and_list_answer_at_once_without_torch(arguments):
    program = (
        "import sys; from postgrad.cli import main\n"
        "try: main(sys.argv[1:], standalone_mode=False)\n"
        "finally: assert not {'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)"
    )
    times = []
    for _ in range(3):
        children = _cpu_of_children()
        subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
        times.append(_cpu_of_children() - children)
    assert min(times) < 0.3


def _cpu_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_import_is_light():
    program = (
        "import sys, postgrad\nassert 'torch' not in sys.modules\nassert callable(postgrad.train)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_completion_scripts(call):
    for shell in ("bash", "zsh", "fish"):
        assert "_POSTGRAD_COMPLETE" in call("completion", shell).stdout


def test_doctor(call):
    told = call("doctor")
    assert told.exit_code == 0, told.output
    for expected in ("torch", "extra", "smollm2", "bubblewrap"):
        assert expected in told.stdout.lower()


def test_doctor_in_a_source_tree_that_is_not_installed(call, monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("postgrad.doctor.requires", requires)
    told = call("doctor")
    assert told.exit_code == 0, told.output
    assert "source tree" in told.stdout


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "postgrad", "list", "--ready"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "grpo" in done.stdout
