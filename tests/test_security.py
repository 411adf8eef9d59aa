"""No pickle is loaded from files of others, and no secret is written into files of one's own."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from click.testing import CliRunner

from language_runs import SMALL, write_rows
from postgrad.api import resume, train
from postgrad.cli import main
from postgrad.errors import PostgradError
from postgrad.models.control import Policy, PolicyShape, save_policy
from postgrad.models.control import load_policy as load_control_policy
from postgrad.models.encoders import ImageEncoder, ImageShape, load_encoder, save_encoder
from postgrad.models.flow import ClassFlow, load_class_flow
from postgrad.models.language import load_policy
from postgrad.secrecy import blanked, blanked_command, require_no_secrets
from postgrad.tasks import load
from postgrad.training.checkpoint import digest, load_latest, save_checkpoint

SECRET = "Zx81-hush/+quiet9"
TINY = {
    **SMALL,
    "data": {"name": "addition", "settings": {"size": 16}},
    "batch_size": 2,
    "rollout": {"samples": 2, "max_new_tokens": 3},
    "eval_size": 2,
    "steps": 2,
}


class Hostile:
    """Whoever unpickles this has run a command: it leaves a file behind."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """A file that is there once somebody has unpickled what is hostile."""
    path = tmp_path / "unpickled"
    pickle.loads(pickle.dumps(Hostile(path)))
    assert path.exists()  # it would work
    path.unlink()
    yield path
    assert not path.exists()


def hostile_bytes(mark):
    return [pickle.dumps(Hostile(mark), protocol) for protocol in (0, 2, 4)]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv", "data.parquet",
                                  "data.npz", "data.npy", "data.pkl", "data.pt",
                                  "data.jsonl.gz"])  # fmt: skip
def test_a_pickle_as_data(tmp_path, mark, name):
    for content in hostile_bytes(mark):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PostgradError) as caught:
            load(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    if name in ("data.npz", "data.npy"):
        array = numpy.array([Hostile(mark)], dtype=object)
        save = numpy.savez if name.endswith("z") else numpy.save
        save(tmp_path / name, array, allow_pickle=True)
        with pytest.raises(PostgradError):
            load(str(tmp_path / name))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    load_policy("tiny").save(folder)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "pytorch_model.pt"])
def test_a_pickle_in_a_model_folder(tmp_path, mark, model_folder, name):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Hostile(mark)}, tmp_path / "zipped")
    for content in (*hostile_bytes(mark), (tmp_path / "zipped").read_bytes()):
        (folder / name).write_bytes(content)
        with pytest.raises(PostgradError, match="cannot be loaded") as caught:
            load_policy(str(folder))
        assert "\n" not in str(caught.value)


def test_a_pickle_beside_good_weights_is_left_alone(tmp_path, mark, model_folder):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    torch.save({"weight": Hostile(mark)}, folder / "pytorch_model.bin")
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        (folder / name).write_bytes(hostile_bytes(mark)[1])
    load_policy(str(folder))


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_pickle_in_a_checkpoint(tmp_path, mark, name):
    """Even with a manifest that vouches for it."""
    folder = tmp_path / "checkpoints"
    for content in hostile_bytes(mark):
        path = save_checkpoint(folder, 1, {"a": torch.ones(2)}, keep=1)
        (path / name).write_bytes(content)
        if name != "manifest.json":
            manifest = json.loads((path / "manifest.json").read_text())
            manifest["sha256"][name] = digest(path / name)
            (path / "manifest.json").write_text(json.dumps(manifest))
        lines = []
        assert load_latest(folder, lines.append) is None
        assert "is damaged" in lines[0]


@pytest.mark.parametrize("kind", ["encoder", "control policy", "flow"])
def test_a_pickle_as_the_weights_of_our_own_models(tmp_path, mark, kind):
    if kind == "encoder":
        save_encoder(ImageEncoder(ImageShape(1, 8, 4, 8, 4)), tmp_path / "model")
        read = load_encoder
    elif kind == "flow":
        ClassFlow(("0", "1"), (1, 8, 8), 8, 1).save(tmp_path / "model")
        read = load_class_flow
    else:
        save_policy(
            Policy(PolicyShape("categorical", 2, 2, (4,), False), torch.Generator()),
            {},
            tmp_path / "model",
        )
        read = load_control_policy
    read(tmp_path / "model")
    (weights,) = (tmp_path / "model").rglob("*.safetensors")
    for content in hostile_bytes(mark):
        weights.write_bytes(content)
        with pytest.raises(PostgradError) as caught:
            read(tmp_path / "model")
        assert "\n" not in str(caught.value)


def everything_written(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


REWARD = """
import os

def score(completions):
    return [0.5] * len(completions)

def tells(completions):
    raise ValueError(f"no entry with {os.environ['MY_API_KEY']}")

def bad(completions, **columns):
    return [float("nan")] * len(completions)
"""


@pytest.fixture
def secret(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MY_API_KEY", "HUB_TOKEN", "CLIENT_SECRET", "POSTGRAD_REWARD_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    (tmp_path / "reward.py").write_text(REWARD)
    return SECRET.encode()


def test_secrets_reach_no_file_of_a_run(tmp_path, secret, monkeypatch):
    """Not from the command line, nor from data that hold them, nor in a report."""
    rows = [{"prompt": f"{a}+{a}= {SECRET} http://me:hunter22@host/", "answer": "1"}
            for a in range(4)]  # fmt: skip
    write_rows(tmp_path / "data.jsonl", rows)
    command = ["postgrad", "train", "grpo", "--token", "hunter22", SECRET,
               "reward.api_key=hunter22", "url=http://me:hunter22@host/"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    settings = {**TINY, "data": "data.jsonl", "report": True, "log": ["tensorboard"]}
    run = train("grpo", output="run", reward="reward.py:score", **settings)
    written = everything_written(run.folder)
    assert {path.name for path in written} >= {"run.json", "config.yaml", "report.html"}
    for path, content in written.items():
        assert secret not in content, path
        assert b"hunter22" not in content, path
    told = json.loads((run.folder / "run.json").read_text())["command"]
    assert told[:6] == ["postgrad", "train", "grpo", "--token", "***", "***"]
    assert told[6:] == ["reward.api_key=***", "url=http://me:***@host/"]
    assert "***" in (run.folder / "samples.jsonl").read_text()

    with pytest.raises(PostgradError, match="returned nan"):
        train("grpo", output="bad", reward="reward.py:bad", **settings)
    resume(run.folder)
    for path, content in everything_written(tmp_path / "bad").items():
        assert secret not in content, path


def test_secrets_reach_no_line_on_the_screen(tmp_path, secret):
    words = ["train", "grpo", "model=tiny", "data=addition", "steps=1", "output=run",
             "reward=reward.py:tells"]  # fmt: skip
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "raised ValueError: no entry with ***" in done.output
    assert SECRET not in done.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": f"x{SECRET}"}, "model: holds the value of the variable "),
        ({"reward": {"name": "r.py:f", "api_key": "abc"}}, "reward.api_key: holds a secret"),
        ({"reward": [{"name": "r.py:f", "password": "abc"}]}, "reward.password: holds a secret"),
        ({"reward": {"name": "r", "hub_token": "hf_abcdEFGH12345678"}}, "token: holds a secret"),
        ({"judge": {"server": "http://me:pw@host/v1"}}, "judge.server: .* address with a password"),
    ],
)  # fmt: skip
def test_settings_with_secrets_are_refused(secret, settings, message):
    with pytest.raises(PostgradError, match=message) as caught:
        require_no_secrets(settings)
    for hidden in (SECRET, "abc", ":pw@", "hf_"):
        assert hidden not in str(caught.value)


def test_plain_settings_are_no_secrets(secret, monkeypatch):
    monkeypatch.setenv("SSH_KEY", "/tmp")
    monkeypatch.setenv("A_KEY", "short")
    require_no_secrets(
        {
            "data": {"columns": {"answer_key": "answer"}, "name": "short/tmp"},
            "reward": {"end_token": "</answer>", "token_variable": "MY_API_KEY"},
            "server": "http://localhost:8000/v1",
            "list": [1, None, "a"],
        }
    )
    assert blanked("http://localhost:8000/a@b mail@host.org 12:30") == (
        "http://localhost:8000/a@b mail@host.org 12:30"
    )
    command = ["postgrad", "train", "rollout.max_new_tokens=64", "--resume", "runs/key"]
    assert blanked_command(command) == command


def test_a_run_with_a_secret_in_its_settings_leaves_nothing(tmp_path, secret):
    with pytest.raises(PostgradError, match=r"reward\.api_key: holds a secret"):
        train("grpo", output="run", reward={"name": "reward.py:score", "api_key": "abc"}, **TINY)
    assert not (tmp_path / "run").exists()


def test_blanking_takes_no_time_on_long_texts(secret):
    text = "a" * 10**6 + "://" * 10**5 + "a:b" * 10**5
    code = f"from postgrad.secrecy import blanked; blanked({text[:10]!r} * 100000)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert blanked(text) == text
