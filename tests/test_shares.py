"""Checkpoints of weights in shares: written and read by any number of processes, or not at all."""

import os
import shutil
import signal
import sys

import pytest
import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing import ProcessExitedException

from postgrad import processes
from postgrad.training.checkpoint import checkpoints, load_latest, write_checkpoint_in_shares
from postgrad.training.tree import flatten
from several import together

SIZES = {"matrix": (70, 5), "few rows": (2, 3), "one": (1,)}  # fewer rows than processes too
PLAIN = {"count": torch.tensor(3.0), "states": torch.arange(9, dtype=torch.uint8), "name": "run"}


def values(step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def in_shares(tensor):
    mesh = init_device_mesh("cpu", (processes.count(),))
    return distribute_tensor(tensor, mesh, [Shard(0)])


def write(folder, *steps):
    with processes.joined():
        for step in steps:
            shares = {name: in_shares(value) for name, value in values(step).items()}
            write_checkpoint_in_shares(folder, step, flatten({**shares, **PLAIN}), keep=2)


def same(found, step):
    """Whether what was read is what was written, whole or in shares."""
    assert found["name"] == "run"
    assert torch.equal(found["states"], PLAIN["states"])
    assert found["count"] == 3.0
    return all(torch.equal(processes.whole(found[n]), value) for n, value in values(step).items())


def read(folder, step, damage):
    lines = []
    with processes.joined():
        reached, found = load_latest(folder, lines.append, in_shares=True)
        assert processes.in_shares(found["matrix"])
        assert found["matrix"].to_local().numel() < 350
        assert reached == step
        assert same(found, step)
        target = in_shares(torch.zeros(70, 5))
        assert torch.equal(processes.whole(processes.like(target, found["matrix"])),
                           values(step)["matrix"])  # fmt: skip
        _, whole = load_latest(folder, lines.append)
        assert not processes.in_shares(whole["matrix"])
        assert same(whole, step)
    assert all(damage in line for line in lines)
    assert bool(lines) == bool(damage)


def test_each_writes_its_share_and_any_number_reads_them(tmp_path):
    folder = tmp_path / "run"
    assert not together(3, tmp_path, write, folder, 1, 2)
    files = sorted(checkpoints(folder)[-1].glob("*.safetensors"))
    assert len(files) == 3
    numbers = []
    for file in files:
        with safe_open(file, "pt") as opened:
            numbers.append(opened.get_slice("root.matrix").get_shape()[0])
    assert sorted(numbers) == [22, 24, 24]  # of 70 rows
    assert {path.suffix for path in checkpoints(folder)[-1].iterdir()} == {".json", ".safetensors"}
    for world in (2, 4):
        together(world, tmp_path, read, folder, 2, "")
    reached, found = load_latest(folder, lambda line: pytest.fail(line))
    assert reached == 2
    assert same(found, 2)


@pytest.mark.parametrize("damage", ["does not match its checksum", "is missing"])
def test_a_damaged_share_is_found_by_all_and_the_one_before_is_read(tmp_path, damage):
    folder = tmp_path / "run"
    together(2, tmp_path, write, folder, 1, 2)
    share = sorted(checkpoints(folder)[-1].glob("*.safetensors"))[1]
    content = bytearray(share.read_bytes())
    content[-3] ^= 1
    share.unlink()
    if damage != "is missing":
        share.write_bytes(content)
    together(2, tmp_path, read, folder, 1, damage)


def write_killed(folder, number):
    """One of the processes is killed at its n-th look at the folder of the second checkpoint."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if any(f"{folder}/.writing-step-00000002" in str(argument) for argument in arguments):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1":
        sys.addaudithook(watch)
    write(folder, 1, 2)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_that_is_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path, number):
    folder = tmp_path / "run"
    with pytest.raises(ProcessExitedException, match="signal SIGKILL"):
        together(2, tmp_path / "first", write_killed, folder, number)
    reached, found = load_latest(folder, lambda line: pytest.fail(line))
    assert reached == 1
    assert same(found, 1)
    together(2, tmp_path / "second", write, folder, 2)  # over what the kill left
    assert load_latest(folder, lambda line: pytest.fail(line))[0] == 2
    assert not list(folder.glob(".*"))


def write_on_full_disk(folder):
    write(folder, 1)
    if os.environ["RANK"] == "0":
        free = shutil.disk_usage(folder).free
        (folder.parent / "filler").write_bytes(bytes(free - 2 * 4096))
    write(folder, 2)


def test_a_full_disk_is_said_by_all_and_nothing_is_half_written(small_disk, tmp_path):
    folder = small_disk / "run"
    errors = together(2, tmp_path / "processes", write_on_full_disk, folder)
    assert set(errors) == {"error-0", "error-1"}
    for line in errors.values():
        assert "No space left on device; the last good checkpoint is" in line
        assert "\n" not in line
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
