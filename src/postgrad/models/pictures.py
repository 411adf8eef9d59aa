"""Images as PNG data URIs, so that a report can show them without files beside it."""

import base64
import struct
import zlib

import torch
from torch import Tensor


def png_data_uri(image: Tensor, smallest_side: int = 64) -> str:
    """An image `[C, H, W]` in [0, 1] (one channel: grey, three: RGB) as `data:image/png;base64,…`.

    Images smaller than `smallest_side` are enlarged by whole pixels.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected an image [1 or 3, H, W], got shape {list(image.shape)}")
    factor = max(1, -(-smallest_side // min(image.shape[1:])))
    image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    bytes_per_pixel = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu()
    channels, height, width = image.shape
    # every row of a PNG starts with the number of its filter: 0, none
    rows = b"".join(b"\0" + row.numpy().tobytes() for row in bytes_per_pixel.contiguous())
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows, 9))
        + _chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
