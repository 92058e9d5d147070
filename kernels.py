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
        return gamma, decay, None, None, None
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
        return _Chunk.apply(M, X, D, eta, m, Q, *gates, inclusive, delta)


def _chunk(M, X, D, eta, m, Q, gamma, decay, gain, gain_m, keep, inclusive, delta):
    """`dgd_chunk` in terms of `chunk_gates`. Returns M, m, R and, for the backward pass, P and the system's inverse."""
    c = X.shape[-2]
    gain = decay if gain is None else gain
    Xe = eta.unsqueeze(-1) * X

    def read(rows: slice, q: Tensor, scores: Tensor) -> Tensor:
        """What the start state and the gradients make of q after `rows` steps; scores: q_t . eta_s x_s."""
        y = (gamma[..., rows, None] * q) @ M.mT - (gain[..., rows, :] * scores) @ D
        return y if m is None else y + (gain_m[..., rows, None] * q) @ m.mT

    P = inverse = R = m_end = None
    if delta:  # p_t = M_{t-1} x_t solves a unit lower triangular system
        before = slice(0, c)
        scores = X @ Xe.mT
        A = decay[..., before, :] * scores
        eye = torch.eye(c, dtype=A.dtype, device=A.device).expand_as(A)
        inverse = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
        P = inverse @ read(before, X, scores)
    if Q is not None:
        rows, scores = slice(int(inclusive), c + int(inclusive)), Q @ Xe.mT
        R = read(rows, Q, scores)
        R = R if P is None else R - (decay[..., rows, :] * scores) @ P
    writes = gain[..., c, :, None] * D
    writes = writes if P is None else writes + decay[..., c, :, None] * P
    end = gamma[..., c, None, None] * M - writes.mT @ Xe
    if keep is not None:
        m_end = -(keep[..., 1:, None] * D).mT @ Xe
        if m is not None:
            m_end = m_end + keep[..., :1, None] * m
            end = end + gain_m[..., c, None, None] * m
    return end, m_end, R, P, inverse


class _Chunk(torch.autograd.Function):
    """`_chunk` with a backward pass by hand: a third of autograd's operations, and only P and the inverse are stored."""

    @staticmethod
    def forward(ctx, M, X, D, eta, m, Q, gamma, decay, gain, gain_m, keep, inclusive, delta):
        *out, P, inverse = _chunk(M, X, D, eta, m, Q, gamma, decay, gain, gain_m, keep, inclusive, delta)
        ctx.save_for_backward(M, X, D, eta, m, Q, gamma, decay, gain, gain_m, keep, P, inverse)
        ctx.flags = inclusive, delta
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    def backward(ctx, dM_end, dm_end, dR):
        *inputs, P, inverse = ctx.saved_tensors
        inclusive, delta = ctx.flags
        if torch.is_grad_enabled():  # a second derivative is wanted: leave it to autograd
            outs = _chunk(*inputs, inclusive, delta)[:3]
            pairs = [(o, g) for o, g in zip(outs, (dM_end, dm_end, dR)) if o is not None and g is not None]
            wanted = [z for z in inputs if z is not None and z.requires_grad]
            outs, grads = zip(*pairs)
            got = iter(torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True))
            return *(next(got) if z is not None and z.requires_grad else None for z in inputs), None, None
        M, X, D, eta, m, Q, gamma, decay, gain, gain_m, keep = inputs
        momentum = gain is not None
        gain = gain if momentum else decay
        c = X.shape[-2]
        before, rows = slice(0, c), slice(int(inclusive), c + int(inclusive))
        Xe = eta.unsqueeze(-1) * X
        dM_end = torch.zeros_like(M) if dM_end is None else dM_end
        d_gamma, d_decay, d_gain = (torch.zeros_like(z) for z in (gamma, decay, gain))
        d_gain_m = None if m is None else torch.zeros_like(gain_m)
        d_keep = torch.zeros_like(keep) if momentum else None
        rowsum = lambda a, b: (a * b).sum(-1)
        total = lambda a, b: (a * b).sum((-1, -2))

        def add(to: Tensor, where: tuple | slice, g: Tensor) -> None:
            part = to[..., where] if isinstance(where, slice) else to[where]
            part += g.sum_to_size(part.shape)

        # M_end = gamma_c M + gain_m_c m - writes^T Xe
        U = Xe @ dM_end.mT
        dD = -gain[..., c, :, None] * U
        dM = gamma[..., c, None, None] * dM_end
        add(d_gamma, (..., c), total(M, dM_end))
        add(d_gain, (..., c, before), -rowsum(D, U))
        writes = gain[..., c, :, None] * D
        dP = None
        if delta:
            writes = writes + decay[..., c, :, None] * P
            dP = -decay[..., c, :, None] * U
            add(d_decay, (..., c, before), -rowsum(P, U))
        dXe = -writes @ dM_end
        dm = None
        if m is not None:
            dm = gain_m[..., c, None, None] * dM_end
            add(d_gain_m, (..., c), total(m, dM_end))
        if momentum and dm_end is not None:  # m_end = keep_0 m - (keep D)^T Xe
            Um = Xe @ dm_end.mT
            kept = keep[..., 1:, None]
            dD = dD - kept * Um
            dXe = dXe - (kept * D) @ dm_end
            add(d_keep, slice(1, None), -rowsum(D, Um))
            if m is not None:
                dm = dm + keep[..., :1, None] * dm_end
                add(d_keep, (..., 0), total(m, dm_end))

        def read_backward(rows: slice, q: Tensor, dy: Tensor) -> Tensor:
            """Backward of a read at q: adds to every other gradient, returns that of q."""
            nonlocal dD, dM, dm, dXe, dP
            scores = q @ Xe.mT
            dy_M = dy @ M
            dq = gamma[..., rows, None] * dy_M
            add(d_gamma, rows, rowsum(q, dy_M))
            dM = dM + dy.mT @ (gamma[..., rows, None] * q)
            if m is not None:
                dy_m = dy @ m
                dq = dq + gain_m[..., rows, None] * dy_m
                add(d_gain_m, rows, rowsum(q, dy_m))
                dm = dm + dy.mT @ (gain_m[..., rows, None] * q)
            dB = -dy @ D.mT
            dD = dD - (gain[..., rows, :] * scores).mT @ dy
            add(d_gain, (..., rows, slice(None)), scores * dB)
            d_scores = gain[..., rows, :] * dB
            if delta:
                dA = -dy @ P.mT
                add(d_decay, (..., rows, slice(None)), scores * dA)
                d_scores = d_scores + decay[..., rows, :] * dA
                if rows_of_reads:
                    dP = dP - (decay[..., rows, :] * scores).mT @ dy
            dXe = dXe + d_scores.mT @ q
            return dq + d_scores @ Xe

        dQ = dX = None
        rows_of_reads = True
        if dR is not None:
            dQ = read_backward(rows, Q, dR)
        if delta:  # P = inverse (what the rest makes of X): its gradient is a read's with dy = inverse^T dP
            rows_of_reads = False
            dX = read_backward(before, X, inverse.mT @ dP)
        dX = eta.unsqueeze(-1) * dXe if dX is None else dX + eta.unsqueeze(-1) * dXe
        if not momentum:
            d_decay, d_gain = d_decay + d_gain, None
        fit = lambda g, z: None if g is None or z is None else g.sum_to_size(z.shape)
        return (
            fit(dM, M), fit(dX, X), fit(dD, D), fit(rowsum(dXe, X), eta), fit(dm, m), fit(dQ, Q),
            d_gamma, d_decay, d_gain, d_gain_m, d_keep, None, None,
        )  # fmt: skip


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
