"""Two views of a picture: how self-supervised pairs come about."""

import torch
from torch import Tensor


def view(pixels: Tensor, generator: torch.Generator, *, shift: int, noise: float) -> Tensor:
    """A random view of images `[B, channels, height, width]`.

    Each image is moved by up to `shift` pixels along both axes (its border is repeated), and gets
    Gaussian noise of standard deviation `noise`. Draws come from the CPU `generator` alone.
    """
    count, _, height, width = pixels.shape
    moves = torch.randint(-shift, shift + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + moves[0]).clamp(0, height - 1).to(pixels.device)
    columns = (torch.arange(width) + moves[1]).clamp(0, width - 1).to(pixels.device)
    items = torch.arange(count, device=pixels.device)[:, None, None]
    moved = pixels.movedim(1, -1)[items, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    speckle = torch.randn(pixels.shape, generator=generator).to(pixels)
    return moved + noise * speckle
