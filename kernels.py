"""The inner loops of Nested Learning, each written first as the plain PyTorch that defines it.

`dgd_chunk` is the recurrence that every parametric memory of `hope.Memory` runs inside a chunk: delta gradient
descent (eq. 88) with retention and momentum, all tokens of the chunk at once and without a loop.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _segment_products(a: Tensor) -> Tensor:
    """Products of consecutive gates. a: (..., c) -> (..., c + 1, c + 1), entry [t, s] = a_{s+1} ... a_t, 0 for s > t.

    Products rather than differences of cumulative logarithms: a gate of exactly 0 is legal and must not give NaN.
    """
    c = a.shape[-1]
    lower = torch.ones(c + 1, c + 1, dtype=torch.bool, device=a.device).tril()
    below = torch.ones(c, c + 1, dtype=torch.bool, device=a.device).tril()
    factors = torch.where(below, a.unsqueeze(-1), 1.0)
    first = torch.ones_like(factors[..., :1, :])
    return torch.where(lower, torch.cat([first, factors.cumprod(-2)], -2), 0.0)


def chunk_gates(alpha: Tensor, theta: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the gates of a chunk, each (..., c), make of a write, for every time t = 0..c and token s = 1..c.

    Returns gamma (..., c + 1), what is left at t of the start state; decay (..., c + 1, c), what is left at t of a write
    at s; gain, the same for a write that enters through the momentum; gain_m (..., c + 1), what the start momentum has
    added by t; keep (..., c + 1), what is left at the end of the start momentum and of the writes to it.
    """
    retain = _segment_products(alpha)
    gamma, decay = retain[..., :, 0], retain[..., :, 1:]
    if theta is None:
        return gamma, decay, decay, None, None
    momentum = _segment_products(theta)
    through = decay @ momentum[..., 1:, :]
    return gamma, decay, through[..., 1:], through[..., 0], momentum[..., -1, :]


def dgd_chunk(
    M: Tensor,
    X: Tensor,
    D: Tensor,
    eta: Tensor,
    alpha: Tensor,
    *,
    m: Tensor | None = None,
    theta: Tensor | None = None,
    Q: Tensor | None = None,
    inclusive: bool = False,
    delta: bool = True,
    gates: tuple | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Delta gradient descent over one chunk (eq. 88; with momentum where `theta` is given), exact and loop-free.

    For t = 1..c, with x_t, d_t, q_t the rows of X, D, Q:

        m_t = theta_t m_{t-1} - eta_t d_t x_t^T                              (theta = 0 without momentum)
        M_t = alpha_t M_{t-1} - eta_t (M_{t-1} x_t) x_t^T + m_t
        R_t = M_{t-1} q_t, or M_t q_t when `inclusive`

    Args:
        M: (..., o, i) the memory at the chunk's start.
        X: (..., c, i) the inputs of this layer, one row a token.
        D: (..., c, o) the gradient of the inner loss with respect to this layer's output, taken at the chunk's start.
        eta, alpha, theta: (..., c) step size, retention and momentum gate of each token; 0 and 1 are legal.
        m: (..., o, i) momentum at the chunk's start; zeros if left out. Needs `theta`.
        Q: (..., c, i) queries, one a token.
        delta: False leaves out the term with M_{t-1} x_t, which makes the rule plain gradient descent.

    Leading dimensions broadcast. Everything is differentiable, and computed in float32 at least.

    Returns:
        (M, m, R): memory and momentum after the chunk (m is None without `theta`), and the reads (..., c, o),
        None without Q.
    """
    if m is not None and theta is None:
        raise ValueError("dgd_chunk: m was given without theta; pass theta (..., c), or leave m out")
    c = X.shape[-2]
    for name, gate in (("eta", eta), ("alpha", alpha), ("theta", theta)):
        if gate is not None and gate.shape[-1] != c:
            raise ValueError(f"dgd_chunk: {name} has {gate.shape[-1]} entries for {c} tokens; it needs one a token")
    if D.shape[-2] != c or D.shape[-1] != M.shape[-2] or X.shape[-1] != M.shape[-1]:
        raise ValueError(
            f"dgd_chunk: M {tuple(M.shape)}, X {tuple(X.shape)}, D {tuple(D.shape)} do not fit; "
            "M is (..., o, i), X (..., c, i), D (..., c, o)"
        )
    with torch.autocast(X.device.type, enabled=False):
        if X.dtype in (torch.bfloat16, torch.float16):
            M, X, D, eta, alpha = (z.float() for z in (M, X, D, eta, alpha))
            m, theta, Q = (None if z is None else z.float() for z in (m, theta, Q))
        gates = chunk_gates(alpha, theta) if gates is None else gates
        gamma, decay, gain, gain_m, keep = gates
        lead = torch.broadcast_shapes(M.shape[:-2], X.shape[:-2], D.shape[:-2], eta.shape[:-1], alpha.shape[:-1])
        flat = lambda z: z.expand(*lead, *z.shape[-2:]).reshape(-1, *z.shape[-2:])
        Xe = eta.unsqueeze(-1) * X
        M3, D3 = flat(M), flat(D)
        m3 = None if m is None else flat(m)

        def read(rows: slice, q: Tensor, P: Tensor | None) -> tuple[Tensor, Tensor]:
            """The memory after `rows` steps applied to q (..., c, i); P: (n, c, o) once known. (n, c, o), q_t . eta_s x_s"""
            scores = q @ Xe.mT
            y = flat(gamma[..., rows, None] * q) @ M3.mT
            if m3 is not None:
                y = torch.baddbmm(y, flat(gain_m[..., rows, None] * q), m3.mT)
            y = torch.baddbmm(y, flat(gain[..., rows, :] * scores), D3, alpha=-1)
            through = flat(decay[..., rows, :] * scores)
            return (y if P is None else torch.baddbmm(y, through, P, alpha=-1)), through

        P = None
        if delta:  # p_t = M_{t-1} x_t solves a unit lower triangular system
            rhs, A = read(slice(0, c), X, None)
            eye = torch.eye(c, dtype=A.dtype, device=A.device).expand_as(A)
            P = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True) @ rhs

        R = None
        if Q is not None:
            R = read(slice(1, c + 1) if inclusive else slice(0, c), Q, P)[0].reshape(*lead, c, -1)

        end = torch.baddbmm(flat(gamma[..., c, None, None] * M), D3.mT, flat(gain[..., c, :, None] * Xe), alpha=-1)
        if P is not None:
            end = torch.baddbmm(end, P.mT, flat(decay[..., c, :, None] * Xe), alpha=-1)
        m_end = None
        if theta is not None:
            m_end = -D3.mT @ flat(keep[..., 1:, None] * Xe)
            if m is not None:
                m_end = m_end + flat(keep[..., :1, None] * m)
                end = end + flat(gain_m[..., c, None, None] * m)
            m_end = m_end.reshape(*lead, *M.shape[-2:])
        return end.reshape(*lead, *M.shape[-2:]), m_end, R


def dgd_loop(M, X, D, eta, alpha, *, m=None, theta=None, Q=None, inclusive=False, delta=True):
    """The specification of `dgd_chunk`: the same arguments, one token at a time, as the equations are written."""
    momentum = theta is not None
    if momentum and m is None:
        m = torch.zeros_like(M)
    reads = []
    for t in range(X.shape[-2]):
        x, d = X[..., t, :], D[..., t, :]
        step, keep = eta[..., t, None, None], alpha[..., t, None, None]
        before = M
        write = -step * d.unsqueeze(-1) * x.unsqueeze(-2)
        if momentum:
            m = theta[..., t, None, None] * m + write
            write = m
        M = keep * M + write
        if delta:
            M = M - step * (before @ x.unsqueeze(-1)) * x.unsqueeze(-2)
        if Q is not None:
            reads.append(((M if inclusive else before) @ Q[..., t, :, None]).squeeze(-1))
    return M, m if momentum else None, torch.stack(reads, -2) if reads else None
