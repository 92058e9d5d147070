"""What several chapters of the book share: colours, comparisons, small layers, a small world, and plots.

A notebook imports it from its own folder. Of chapters 1 to 9 only the two pages of chapter 5 do, those from 10 on all.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hope

TOKEN, CHUNK, OUTER, ANEW = "C0", "C1", "C2", "C3"  # colours of book/style.mplstyle: which clock moves a thing
exact = dict(rtol=0, atol=1e-10)  # "equal" in float64: to rounding


def off(a: Tensor, b: Tensor) -> float:
    """How far a is from b, as a part of b."""
    return ((a - b).norm() / b.norm()).item()


def argmin(objective: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The minimiser, shaped as `like`, of a quadratic function of one tensor, from its derivatives."""
    f = lambda z: objective(z.view_as(like))
    anywhere = torch.ones(like.numel(), dtype=like.dtype)
    hessian = torch.autograd.functional.hessian(f, anywhere)
    slope = torch.autograd.functional.jacobian(f, anywhere)
    assert torch.linalg.eigvalsh(hessian)[0] > 0, "there is a minimum, and one only"
    return (anywhere - torch.linalg.solve(hessian, slope)).view_as(like)


def power(A: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(A)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def adam_steps(grads: Tensor, betas: tuple[float, float]) -> Tensor:
    """The steps (t, n) of torch.optim.Adam, rate 1 and eps 0, on descent directions (t, n)."""
    w, path = torch.nn.Parameter(torch.zeros_like(grads[0])), [torch.zeros_like(grads[0])]
    adam = torch.optim.Adam([w], lr=1.0, betas=betas, eps=0.0)
    for grad in grads:
        w.grad = -grad
        adam.step()
        path.append(w.detach().clone())
    return torch.stack(path).diff(dim=0)


def routed(preset: str, d: int, **settings: Any) -> hope.Memory | hope.Attention:
    """A layer of hope without positions whose tokens [a; b; c] have key a, value b, query c, each of width d."""
    settings = {"conv": 0, "project": False, "rotary": False, "qk_norm": False, **settings}
    layer = hope.make_layer(hope.MemoryConfig.preset(preset, d_model=3 * d, n_head=1, **settings))
    layer.requires_grad_(False)
    for i, to in enumerate((layer.to_k, layer.to_v, layer.to_q)):
        for p in to.parameters():
            p.zero_()
        to.weight[:d, i * d : (i + 1) * d] = torch.eye(d)
    return layer


def drawn(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The module in float64, every parameter drawn anew by its name: matrices by their width, vectors moved a little.

    What a chapter prints then does not hang on how hope starts a module, nor on which other parameters it has.
    """
    module = module.double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            g = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            z = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.copy_(z / p.shape[-1] ** 0.5 if p.ndim > 1 else p + 0.1 * z)
    return module


def tensors(state: Any) -> list[Tensor]:
    """All tensors of a state."""
    found: list[Tensor] = []
    hope.map_state(lambda z: found.append(z) or z, state)
    return found


def rms(x: Tensor, norm: torch.nn.RMSNorm) -> Tensor:
    """RMS norm, written out. x: (..., d)"""
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def spread(ax: Any, x: Any, runs: Tensor, band: bool = True, **style: Any) -> None:
    """Mean of runs (n, len(x)), and from the smallest to the largest: as a band, or as bars at the points."""
    mean, low, high = runs.mean(0), runs.min(0).values, runs.max(0).values
    if band:
        (line,) = ax.plot(x, mean, **style)
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    else:
        ax.errorbar(x, mean, torch.stack([mean - low, high - mean]), **{"capsize": 3, "elinewidth": 0.9, **style})


# A small world, in which one thing stays and another changes: bigram tables of VOCAB tokens, two of which speak in turn.
VOCAB = 16


def table(n: int, g: torch.Generator) -> Tensor:
    """n random tables: which token follows each. (n, VOCAB) integers"""
    return torch.rand(n, VOCAB, generator=g).argsort(-1)


def language_and_topics(language: Tensor, topics: Tensor, stay: int, t: int, g: torch.Generator) -> Tensor:
    """Streams in which every next token is, by chance, what the language says (.45), what the topic says (.45), or any (.1).

    language: (b, VOCAB), topics: (b, n, VOCAB), of which each stays for `stay` tokens. Returns tokens (b, t + 1).
    """
    b = len(language)
    x = torch.randint(VOCAB, (b, t + 1), generator=g)
    who = torch.rand(b, t, generator=g)
    for i in range(t):
        says = torch.where(who[:, i, None] < 0.45, language, topics[:, i // stay])
        x[:, i + 1] = torch.where(who[:, i] < 0.9, says.gather(1, x[:, i, None])[:, 0], x[:, i + 1])
    return x
