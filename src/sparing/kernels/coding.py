"""Numbers as small whole numbers (asymmetric, as in KIVI, Liu et al. 2024, arXiv:2402.02750).

    z = min x,   s = (max x − min x) / (2^b − 1),   code = round((x − z) / s),   x̃ = z + s · code,   |x − x̃| ≤ s / 2

Where all numbers are equal, s = 0 and x̃ = x. Two 4-bit codes share a byte: of C elements, element i is in the low half
of byte i, and element C / 2 + i in its high half.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BITS = (8, 4)


def encode(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x, and scales and zeros that are shared along `dim`.

    Args:
        x: (..., C). bits: 8 or 4.

    Returns:
        uint8 codes (..., C · bits / 8, rounded up), and scales and zeros of the shape of x without `dim`, in float32
        (float64 for float64).
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    zeros, most = exact.amin(dim, keepdim=True), exact.amax(dim, keepdim=True)
    scales = (most - zeros) / (2**bits - 1)
    codes = ((exact - zeros) / scales.where(scales > 0, 1.0)).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        low, high = F.pad(codes, (0, codes.shape[-1] % 2)).chunk(2, dim=-1)
        codes = low | high << 4
    return codes, scales.squeeze(dim), zeros.squeeze(dim)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor, dim: int, bits: int, width: int) -> Tensor:
    """What codes stand for, (..., width); the arguments as `encode` takes and gives them."""
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)[..., :width]
    return torch.addcmul(zeros.unsqueeze(dim), codes.to(scales.dtype), scales.unsqueeze(dim))
