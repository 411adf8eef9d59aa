"""Looking at what was trained: evaluate a run or a model, let it answer, let it embed."""

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy
import torch
from torch import Tensor

from postgrad.api import build
from postgrad.catalogue import method_class
from postgrad.config import LoopSettings, resolve
from postgrad.errors import PostgradError
from postgrad.evaluation.control import evaluate_saved_policy
from postgrad.evaluation.language import evaluate_policy, evaluate_reward
from postgrad.methods.base import Method, Place
from postgrad.methods.representation.text import TextEncoder
from postgrad.models.control import is_policy
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.models.scalar import is_reward_model
from postgrad.rewards.learned import learned_reward
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.seeding import seed_everything
from postgrad.tasks import Examples, load
from postgrad.training.checkpoint import load_latest, load_module_state
from postgrad.training.loop import pick_device
from postgrad.training.optimise import evaluated
from postgrad.training.record import is_run, read_config


@runtime_checkable
class Embedder(Protocol):
    """A method whose model embeds texts."""

    def embed(self, texts: list[str]) -> Tensor: ...


def open_run(folder: Path) -> tuple[Method, LoopSettings]:
    """The method of a run with its newest good checkpoint loaded, and the loop's settings."""
    saved = read_config(folder)
    slug = str(saved.pop("method"))
    kind = method_class(slug)
    loop, own = resolve(kind.Config, kind.recipe, saved)
    seed_everything(loop.seed)
    method = build(slug, own, Place(loop.seed, pick_device(loop.device), loop.steps), {})
    found = load_latest(folder / "checkpoints", lambda line: None)
    if found is None:
        raise PostgradError(f"{folder} has no good checkpoint: train it first")
    _, state = found
    for name, module in method.modules().items():
        load_module_state(module, state["modules"][name])
    method.load_state_dict(state["method"])
    return method, loop


def evaluate(run_or_model: str, task: str | None, limit: int) -> dict[str, float]:
    """Metrics of a run on its own held-out data, or of any model on a task.

    What is measured follows from the task: mean reward of greedy answers where it has a verifier,
    retrieval for triples, the share of chosen responses that are likelier (or, of a reward model,
    worth more) for preference pairs,
    next-token loss for demonstrations and plain text. A control policy's task is the id of an
    environment, by default the one it learned in.
    """
    folder = Path(run_or_model)
    control = next(filter(is_policy, (folder / "model", folder)), None)
    if control is not None and (task is not None or not is_run(folder)):
        return evaluate_saved_policy(control, environment=task)
    if task is None:
        if not is_run(folder):
            raise PostgradError(f"--task: {run_or_model} is no run folder, so name a task or data")
        return _own_evaluation(folder)
    split = "test" if Examples.has_test_split(task) else "train"
    examples = load(task, split=split)
    examples = examples.first(limit)
    model = str(folder / "model" if is_run(folder) else folder)
    if is_reward_model(model):
        return evaluate_reward(learned_reward(model), examples)
    return evaluate_policy(_policy(run_or_model), examples)


def _own_evaluation(folder: Path) -> dict[str, float]:
    method, loop = open_run(folder)
    metrics = evaluated(method, loop.precision)
    if not metrics:
        raise PostgradError(f"{folder} has no held-out data: name some with --task")
    return metrics


def sample(
    run: str, prompt: str, max_new_tokens: int = 128, temperature: float = 0.7, seed: int = 0
) -> str:
    """What the language model of a run (or any named model) answers to `prompt`."""
    if not prompt.strip():
        raise PostgradError("the prompt is empty")
    policy = _policy(run)
    chat = [{"role": "user", "content": prompt}]
    ids = policy.render(chat if policy.has_chat_template else prompt)
    settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=temperature)
    with torch.no_grad():
        return generate(policy, [ids], settings, seeds=[seed]).texts[0]


def embed_file(run: str, file: Path, output: Path | None) -> tuple[Path, tuple[int, ...]]:
    """Embed every line of a text file, or every `text` of a JSON Lines file, into a .npy file."""
    texts = _texts(file)
    target = output or file.with_suffix(".npy")
    folder = Path(run)
    if is_run(folder):
        method, _ = open_run(folder)
        if not isinstance(method, Embedder):
            raise PostgradError(f"{run}: its method does not train an embedder")
        vectors = method.embed(texts)
    else:
        vectors = TextEncoder(_policy(run), max_text_tokens=512).embed_all(texts)
    try:
        numpy.save(target, vectors.numpy())
    except OSError as error:
        raise PostgradError(f"cannot write {target}: {error.strerror}") from error
    return target, tuple(vectors.shape)


def _texts(file: Path) -> list[str]:
    if not file.is_file():
        raise PostgradError(f"file {file} does not exist")
    lines = file.read_text(encoding="utf-8").splitlines()
    texts = []
    for number, line in enumerate(lines, start=1):
        if file.suffix == ".jsonl":
            try:
                line = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise PostgradError(f"{file}, row {number}: expected a 'text' field") from error
        if not isinstance(line, str) or not line.strip():
            raise PostgradError(f"{file}, row {number}: the text is empty")
        texts.append(line)
    if not texts:
        raise PostgradError(f"file {file} is empty")
    return texts


def _policy(run_or_model: str) -> LanguagePolicy:
    folder = Path(run_or_model)
    if is_run(folder):
        if not (folder / "model" / "config.json").is_file():
            raise PostgradError(f"{folder} holds no finished language model")
        return load_policy(str(folder / "model"))
    return load_policy(run_or_model)
