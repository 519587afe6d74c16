"""Checksums of weights: do two processes, or two devices, hold the same bits?"""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor


def checksum(tensor: Tensor) -> str:
    """Type, shape and a 128-bit hash (XXH3) of a tensor's bits. It guards against accidents, not against
    malice, and costs no more than reading the tensor once."""
    data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    size = "x".join(map(str, tensor.shape))
    return f"{xxhash.xxh3_128_hexdigest(data)}-{str(tensor.dtype).removeprefix('torch.')}-{size}"
