"""Random streams that are functions of names: nothing to save, nothing to lose on resume."""

import hashlib
import random

import torch


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for the stream called `names` under `seed`; different names, other streams."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for the stream called `names`."""
    return torch.Generator().manual_seed(derive(seed, *names))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
