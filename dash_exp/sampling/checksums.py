"""Checksums of weights: do two processes, or two devices, hold the same bits?"""

from __future__ import annotations

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> str:
    """A sum over the bits of a tensor that changes with any one of them and with their order.

    The bits are read as 64-bit words w_i (the last one filled with zeros); the result is the sum of the
    words and of w_i x m_i, both modulo 2^64, with odd multipliers m_i that differ between neighbours, and
    type and shape. Not cryptographic: it guards against accidents, at the speed of memory.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if rest := -data.numel() % 8:
        data = torch.nn.functional.pad(data, (0, rest))
    plain = weighed = 0
    for first in range(0, data.numel(), _CHUNK):
        part = data[first : first + _CHUNK]
        words = (part if part.storage_offset() % 8 == 0 else part.clone()).view(torch.int64)
        places = torch.arange(first // 8, first // 8 + len(words), device=words.device)
        plain += int(words.sum())
        weighed += int((words * (places * 2 + 1)).sum())
    size = "x".join(map(str, tensor.shape))
    return f"{plain % 2**64:016x}{weighed % 2**64:016x}-{str(tensor.dtype).removeprefix('torch.')}-{size}"


_CHUNK = 1 << 23
"""Bytes at a time, so that the products stay in the cache."""
