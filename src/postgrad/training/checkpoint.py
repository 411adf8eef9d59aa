"""Checkpoints: written atomically, verified by checksum, holding everything a run needs."""

import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """As `save_checkpoint`, of a state that `flatten` has made; by this process alone."""
    target = folder / f"step-{step:08d}"
    structure, tensors = state
    temporary = _begin(target, structure)
    with _nothing_half_written(target):
        save_file(tensors, temporary / TENSORS)
    names = [STRUCTURE, TENSORS]
    _finish(temporary, target, dict(zip(names, _digests(temporary, names), strict=True)), keep)
    return target


def write_checkpoint_in_shares(folder: Path, step: int, state: Flat, keep: int) -> Path:
    """The same by all processes, each of which writes its share of the tensors."""
    from postgrad.training.shares import write_shares

    target = folder / f"step-{step:08d}"
    structure, tensors = state
    temporary = processes.agreed(lambda: _begin(target, structure))
    with _nothing_half_written(target):
        write_shares(temporary, tensors)
    names = processes.agreed(lambda: sorted(path.name for path in temporary.iterdir()))
    found = processes.divided(names, lambda own: _digests(temporary, own))
    digests = dict(zip(names, found, strict=True))
    processes.agreed(lambda: _finish(temporary, target, digests, keep))
    return target


def _begin(target: Path, structure: Any) -> Path:
    """A folder for a checkpoint that is being written, with all of it but the tensors."""
    temporary = target.parent / f".writing-{target.name}-{os.getpid()}"
    with _nothing_half_written(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target.parent)
        _put_back(target.parent)
        temporary.mkdir()
        (temporary / STRUCTURE).write_text(json.dumps(structure), encoding="utf-8")
    return temporary


def _digests(folder: Path, names: Sequence[str]) -> list[str]:
    with _nothing_half_written(folder):
        return [digest(folder / name) for name in names]


def _finish(temporary: Path, target: Path, digests: dict[str, str], keep: int) -> None:
    """Make what was written a checkpoint: with its checksums, on the disk, under its name."""
    folder = target.parent
    manifest = {"step": _step(target), "sha256": digests}
    with _nothing_half_written(target):
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


@contextmanager
def _nothing_half_written(target: Path) -> Iterator[None]:
    """An error of the disk leaves nothing of `target`, and says what there is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        folder = target.parent
        _clear(folder)
        last = checkpoints(folder)
        kept = f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        raise PostgradError(
            f"cannot write checkpoint {target}: {getattr(error, 'strerror', error)}; {kept}"
        ) from error


def _clear(folder: Path) -> None:
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


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


def load_latest(
    folder: Path, say: Any, *, in_shares: bool = False
) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint whose checksums hold; `say` hears of damaged ones passed over.

    With `in_shares`, tensors that several processes wrote come as each one's share.
    """
    processes.agreed(lambda: _put_back(folder))
    for path in reversed(checkpoints(folder)):
        damage = _damage(path)
        if damage is None:
            try:
                structure = json.loads((path / STRUCTURE).read_text(encoding="utf-8"))
                return _step(path), unflatten(structure, _tensors(path, in_shares))
            except (ValueError, SafetensorError):
                damage = "its content is no checkpoint"
        say(f"checkpoint {path} is damaged ({damage}); trying the one before")
    return None


def _tensors(path: Path, in_shares: bool) -> dict[str, Tensor]:
    if (path / TENSORS).is_file():
        return load_file(path / TENSORS)
    from postgrad.training.shares import read_shares

    return read_shares(path, in_shares)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; its files are read once, by all processes together."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected = dict(manifest["sha256"])
        files = expected.keys() - {STRUCTURE}
        whole = (
            path.name == f"step-{manifest['step']:08d}"
            and STRUCTURE in expected
            and {each.name for each in path.glob("*.safetensors")} <= files
            and len(files) > 0
            and all(name == Path(name).name for name in files)
        )
    except (ValueError, KeyError, TypeError, OSError):
        whole = False
    if not whole:
        return "its manifest cannot be read"

    def damaged(name: str) -> str | None:
        if not (path / name).is_file():
            return f"{name} is missing"
        if digest(path / name) != expected[name]:
            return f"{name} does not match its checksum"
        return None

    found = processes.divided(sorted(expected), lambda own: [damaged(name) for name in own])
    return next(filter(None, found), None)
