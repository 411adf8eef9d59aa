"""Checkpoints: written atomically, verified by checksum, holding everything a run needs."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from postgrad import processes
from postgrad.errors import PostgradError
from postgrad.training.files import digest, flush
from postgrad.training.tree import flatten, unflatten

MANIFEST, STRUCTURE, TENSORS = "manifest.json", "state.json", "state.safetensors"
_ASIDE = ".replaced-"
Flat = tuple[Any, dict[str, Tensor]]


def random_states() -> dict[str, Any]:
    """The states of every global random generator."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """What training can change in a module: its trainable parameters and its buffers.

    A module without trainable parameters (a target network, say) is kept whole. Parameters that
    stay frozen beside trainable ones come back from the base model, as with adapters.
    """
    parameters = dict(module.named_parameters())
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    persistent = module.state_dict().keys()
    buffers = {name: b for name, b in module.named_buffers() if name in persistent}
    return {**{name: p.detach() for name, p in (trainable or parameters).items()}, **buffers}


def load_module_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    expected = module_state(module)
    if expected.keys() != state.keys():
        odd = sorted(expected.keys() ^ state.keys())[0]
        raise PostgradError(f"the checkpoint does not fit this model: parameter {odd!r}")
    with torch.no_grad():
        for name, target in expected.items():
            if target.shape != state[name].shape:
                raise PostgradError(
                    f"the checkpoint does not fit this model: {name!r} has shape "
                    f"{tuple(state[name].shape)}, expected {tuple(target.shape)}"
                )
            target.copy_(processes.like(target, state[name]))


def in_one_piece(state: Any) -> Any:
    """The same state with the tensors that processes hold in shares gathered, by all of them."""
    if isinstance(state, Tensor):
        return processes.whole(state).cpu() if processes.in_shares(state) else state
    if isinstance(state, dict):
        return {key: in_one_piece(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(in_one_piece, state))
    return state


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as `folder/step-NNNNNNNN`, whole or not at all; older ones beyond `keep` go."""
    return write_checkpoint(folder, step, flatten(state), keep)


def write_checkpoint(folder: Path, step: int, state: Flat, keep: int) -> Path:
    """As `save_checkpoint`, of a state that `flatten` has copied."""
    target = folder / f"step-{step:08d}"
    temporary = folder / f".writing-{step:08d}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".writing-*"):
            shutil.rmtree(leftover)
        _put_back(folder)
        temporary.mkdir()
        structure, tensors = state
        (temporary / STRUCTURE).write_text(json.dumps(structure), encoding="utf-8")
        save_file(tensors, temporary / TENSORS)
        digests = {name: digest(temporary / name) for name in (STRUCTURE, TENSORS)}
        manifest = {"step": step, "sha256": digests}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        aside = folder / f"{_ASIDE}{target.name}"
        if target.exists():  # one of this step is there until the new one is
            target.rename(aside)
        temporary.rename(target)
        flush(folder)
        if aside.exists():
            shutil.rmtree(aside)
        for old in checkpoints(folder)[:-keep]:
            (old / MANIFEST).unlink()  # so that half of it is not taken for a checkpoint
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = checkpoints(folder)
        kept = f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        raise PostgradError(
            f"cannot write checkpoint {target}: {getattr(error, 'strerror', error)}; {kept}"
        ) from error
    return target


def _put_back(folder: Path) -> None:
    """Undo what a kill left of replacing a checkpoint: the old one counts until a new one does."""
    for aside in folder.glob(f"{_ASIDE}*"):
        target = folder / aside.name.removeprefix(_ASIDE)
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


def load_latest(folder: Path, say: Any) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint whose checksums hold; `say` hears of damaged ones passed over."""
    _put_back(folder)
    for path in reversed(checkpoints(folder)):
        damage = _damage(path)
        if damage is None:
            try:
                structure = json.loads((path / STRUCTURE).read_text(encoding="utf-8"))
                state = unflatten(structure, load_file(path / TENSORS))
            except (ValueError, SafetensorError):
                damage = "its content is no checkpoint"
            else:
                return int(path.name.removeprefix("step-")), state
        say(f"checkpoint {path} is damaged ({damage}); trying the one before")
    return None


def _damage(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected = dict(manifest["sha256"])
        whole = path.name == f"step-{manifest['step']:08d}" and expected.keys() == {
            STRUCTURE, TENSORS
        }  # fmt: skip
    except (ValueError, KeyError, TypeError, OSError):
        whole = False
    if not whole:
        return "its manifest cannot be read"
    for name, known in expected.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if digest(path / name) != known:
            return f"{name} does not match its checksum"
    return None
