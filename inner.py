"""The network that a memory is, read as it stands, and the gradients of its inner loss; `hope.Memory` writes it.

    unit, layer_norm    what keys, values and outputs are normalised by
    apply_memory        eq. 89: a read
    inner_gradients     what the memory's own loss asks of its layers; kernels.py turns it into writes

hope.py offers all but `answer` as its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import EPS


class Unit(torch.autograd.Function):
    """`unit`, with a backward pass of half the operations and a fifth of the time that autograd's takes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        n = x.norm(dim=-1, keepdim=True).clamp(min=EPS)
        y = x / n
        ctx.save_for_backward(x, y, n)
        return y

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        x, y, n = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            n = x.norm(dim=-1, keepdim=True).clamp(min=EPS)
        return torch.addcmul(g, y, (g * y).sum(-1, keepdim=True) * (n > EPS), value=-1) / n


def unit(x: Tensor) -> Tensor:
    """x: (..., e) at length 1, or times 1 / `kernels.EPS` where it is shorter than that: what is 0 has a gradient."""
    return Unit.apply(x) if torch.is_grad_enabled() else F.normalize(x, dim=-1, eps=EPS)


def layer_norm(y: Tensor) -> tuple[Tensor, Tensor]:
    """y: (..., e) with mean 0 and spread 1, or less where its own was not far above EPS; and what it was divided by."""
    std = (y.var(-1, correction=0, keepdim=True) + EPS**2).sqrt()
    return (y - y.mean(-1, keepdim=True)) / std, std


def answer(w: Tensor, x: Tensor) -> Tensor:
    """W x: weights (..., n, o, i), inputs (..., n or 1, c, i) -> (..., n, c, o), with tokens last in memory.

    At an input that n memories share they answer as one with the rows of all, in one product.
    """
    if x.dim() == w.dim() > 2 and x.shape[-3] < w.shape[-3]:
        return (w.flatten(-3, -2) @ x.squeeze(-3).mT).unflatten(-2, (-1, w.shape[-2])).mT
    return (w @ x.mT).mT


def apply_memory(layers: Sequence[Tensor], x: Tensor, norm: bool = False) -> Tensor:
    """Read memories of weights (b, h, n, o, i) at x (b, h, n or 1, c, i): M x, or x + W1 silu(W2 x) (eq. 89)."""
    if len(layers) == 1:
        return answer(layers[0], x)
    y = answer(layers[1], F.silu(answer(layers[0], x)))
    return (layer_norm(y)[0] if norm else y) + x


def inner_gradients(
    layers: Sequence[Tensor], k: Tensor, v: Tensor, objective: str, norm: bool = False
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer its input x (..., c, i), what it makes of it, W x, and the inner loss's gradient there (..., c, o)."""
    if len(layers) == 1:
        y = answer(layers[0], k)
        return [(k, y, y - v if objective == "l2" else -v)]
    w2, w1 = layers
    z = answer(w2, k)
    gate = torch.sigmoid(z)
    hidden = z * gate
    out = y = answer(w1, hidden)
    if norm:
        y, std = layer_norm(y)
    d1 = y + k - v if objective == "l2" else -v
    if norm:  # through the layer norm
        d1 = (d1 - d1.mean(-1, keepdim=True) - y * (d1 * y).mean(-1, keepdim=True)) / std
    return [(k, z, answer(w1.mT, d1.expand_as(y)) * (gate * (1 + z - hidden))), (hidden, out, d1)]
