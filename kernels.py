"""The inner loops of Nested Learning, each written first as the plain PyTorch that defines it.

`dgd_chunk` is the recurrence that every parametric memory of `hope.Memory` runs inside a chunk: delta gradient
descent (eq. 88) with retention and momentum, all tokens of the chunk at once and without a loop.
"""

from __future__ import annotations

from collections.abc import Callable

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
    products = torch.cat([first, factors.cumprod(-2)], -2)
    # Products too small to matter become 0, since denormal numbers slow a CPU down; those that are 0 keep their gradient.
    return torch.where(lower & ((products > 1e-30) | (products == 0)), products, 0.0)


def chunk_gates(
    alpha: Tensor, theta: Tensor | None, ema: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the gates of a chunk, each (..., c), make of a write, for every time t = 0..c and token s = 1..c.

    Returns gamma (..., c + 1), what is left at t of the start state; decay (..., c + 1, c), what is left at t of a write
    at s; gain, the same for a write that enters through the momentum; gain_m (..., c + 1), what the start momentum has
    added by t; keep (..., c + 1), what is left at the end of the start momentum and of the writes to it. With `ema`
    a write enters the momentum with weight 1 - theta, which makes it an average of the last gradients, not their sum.
    """
    retain = _segment_products(alpha)
    gamma, decay = retain[..., :, 0], retain[..., :, 1:]
    if theta is None:
        return gamma, decay, None, None, None
    momentum = _segment_products(theta)
    if ema:
        weight = torch.cat([torch.ones_like(theta[..., :1]), 1 - theta], -1)
        momentum = momentum * weight.unsqueeze(-2)
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
        gates: `chunk_gates(alpha, theta)`, for callers who share it between several memories.

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


def _flatten(*tensors: Tensor | None) -> tuple[Callable[[Tensor], Tensor], torch.Size]:
    """How to bring tensors (..., a, b) to (n, a, b) with all leading dimensions broadcast, and these dimensions."""
    lead = torch.broadcast_shapes(*(z.shape[:-2] for z in tensors if z is not None))
    return lambda z: z.expand(*lead, *z.shape[-2:]).reshape(-1, *z.shape[-2:]), lead


def _chunk(M, X, D, eta, m, Q, gamma, decay, gain, gain_m, keep, inclusive, delta):
    """`dgd_chunk` in terms of `chunk_gates`. Returns M, m, R and, for the backward pass, P and the system's inverse."""
    c = X.shape[-2]
    flat, lead = _flatten(M, X, D, eta.unsqueeze(-1), decay, m, Q)
    gain = decay if gain is None else gain
    Xe = eta.unsqueeze(-1) * X
    M3, D3, Xe3, m3 = flat(M), flat(D), flat(Xe), None if m is None else flat(m)

    def read(rows: slice, q: Tensor, scores: Tensor) -> Tensor:
        """What the start state and the gradients make of q after `rows` steps; scores: q_t . eta_s x_s."""
        y = flat(gamma[..., rows, None] * q) @ M3.mT
        if m is not None:
            y = torch.baddbmm(y, flat(gain_m[..., rows, None] * q), m3.mT)
        return torch.baddbmm(y, flat(gain[..., rows, :] * scores), D3, alpha=-1)

    P = inverse = R = m_end = None
    if delta:  # p_t = M_{t-1} x_t solves a unit lower triangular system
        scores = X @ Xe.mT
        A = decay[..., :c, :] * scores
        eye = torch.eye(c, dtype=A.dtype, device=A.device).expand_as(A)
        inverse = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
        P = flat(inverse) @ read(slice(0, c), X, scores)
    if Q is not None:
        rows, scores = slice(int(inclusive), c + int(inclusive)), Q @ Xe.mT
        R = read(rows, Q, scores)
        R = R if P is None else torch.baddbmm(R, flat(decay[..., rows, :] * scores), P, alpha=-1)
        R = R.view(*lead, c, -1)
    writes = gain[..., c, :, None] * D.expand(*lead, *D.shape[-2:])
    if P is not None:
        P = P.view(*lead, c, -1)
        writes = torch.addcmul(writes, decay[..., c, :, None], P)
    start = gamma[..., c, None, None] * M
    if keep is not None:
        m_start = torch.zeros_like(M3)
        if m is not None:
            start = torch.addcmul(start, gain_m[..., c, None, None], m)
            m_start = flat(keep[..., :1, None] * m)
        m_end = torch.baddbmm(m_start, flat(keep[..., 1:, None] * D).mT, Xe3, alpha=-1).view(*lead, *M.shape[-2:])
    end = torch.baddbmm(flat(start), flat(writes).mT, Xe3, alpha=-1).view(*lead, *M.shape[-2:])
    return end, m_end, R, P, inverse


class _Chunk(torch.autograd.Function):
    """`_chunk` with a backward pass by hand: a fraction of autograd's operations, and only P and the inverse are stored.

    Where memories share their input, whatever belongs to the input is summed over them before it is used.
    """

    @staticmethod
    def forward(ctx, M, X, D, eta, m, Q, gamma, decay, gain, gain_m, keep, inclusive, delta):
        *out, P, inverse = _chunk(M, X, D, eta, m, Q, gamma, decay, gain, gain_m, keep, inclusive, delta)
        ctx.save_for_backward(M, X, D, eta, m, Q, gamma, decay, gain, gain_m, keep, P, inverse)
        ctx.flags, ctx.device = (inclusive, delta), M.device.type
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        with torch.autocast(ctx.device, enabled=False):
            return _Chunk._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx, dM_end, dm_end, dR):
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
        momentum, c = gain is not None, X.shape[-2]
        gain = gain if momentum else decay
        flat, lead = _flatten(M, X, D, eta.unsqueeze(-1), decay, m, Q)
        Xe = eta.unsqueeze(-1) * X
        M3, D3, Xe3 = flat(M), flat(D), flat(Xe)
        m3, P3 = (None if z is None else flat(z) for z in (m, P))
        d_gamma, d_decay, d_gain = (torch.zeros_like(z) for z in (gamma, decay, gain))
        d_gain_m = None if m is None else torch.zeros_like(gain_m)
        d_keep = torch.zeros_like(keep) if momentum else None
        # Sum a product (n, a, b) over the leading dimensions that `like` (..., a, b) does not have.
        fold = lambda z, like: z.view(*lead, *z.shape[-2:]).sum_to_size(*like.shape[:-2], *z.shape[-2:])
        rowsum = lambda a, b: (a * b).sum(-1)
        total = lambda a, b: (a * b).sum((-1, -2))

        def add(to: Tensor, where: tuple, g: Tensor, sign: int = 1) -> None:
            part = to[(..., *where)]
            part.add_(g.sum_to_size(part.shape), alpha=sign)

        # M_end = gamma_c M + gain_m_c m - writes^T Xe
        dM_end = torch.zeros_like(M3).view(*lead, *M.shape[-2:]) if dM_end is None else dM_end
        dM_end3 = flat(dM_end)
        U = (Xe3 @ dM_end3.mT).view(*lead, c, -1)
        dD = flat(-gain[..., c, :, None] * U)
        dM = flat(gamma[..., c, None, None] * dM_end)
        add(d_gamma, (c,), total(M, dM_end))
        add(d_gain, (c, slice(None)), rowsum(D, U), -1)
        writes = gain[..., c, :, None] * D.expand(*lead, *D.shape[-2:])
        if delta:
            writes = torch.addcmul(writes, decay[..., c, :, None], P)
            dP = flat(-decay[..., c, :, None] * U)
            add(d_decay, (c, slice(None)), rowsum(P, U), -1)
        d_writes = flat(writes) @ dM_end3
        dm = None
        if m is not None:
            dm = flat(gain_m[..., c, None, None] * dM_end)
            add(d_gain_m, (c,), total(m, dM_end))
        if momentum and dm_end is not None:  # m_end = keep_0 m - (keep D)^T Xe
            Um = (Xe3 @ flat(dm_end).mT).view(*lead, c, -1)
            kept = keep[..., 1:, None]
            dD = dD.addcmul_(flat(-kept), flat(Um))
            d_writes = torch.baddbmm(d_writes, flat(kept * D), flat(dm_end))
            add(d_keep, (slice(1, None),), rowsum(D, Um), -1)
            if m is not None:
                dm = dm.addcmul_(flat(keep[..., :1, None]), flat(dm_end))
                add(d_keep, (0,), total(m, dm_end))
        dXe = -fold(d_writes, Xe)

        def read_backward(rows: slice, q: Tensor, dy: Tensor, through_P: bool) -> Tensor:
            """Backward of a read at q (..., c, i), dy (n, c, o): adds to the other gradients, returns that of q."""
            nonlocal dXe
            scores = q @ Xe.mT
            dy_M = fold(dy @ M3, q)
            dq = gamma[..., rows, None] * dy_M
            add(d_gamma, (rows,), rowsum(q, dy_M))
            dM.baddbmm_(dy.mT, flat(gamma[..., rows, None] * q))
            if m is not None:
                dy_m = fold(dy @ m3, q)
                dq = torch.addcmul(dq, gain_m[..., rows, None], dy_m)
                add(d_gain_m, (rows,), rowsum(q, dy_m))
                dm.baddbmm_(dy.mT, flat(gain_m[..., rows, None] * q))
            dD.baddbmm_(flat(gain[..., rows, :] * scores).mT, dy, alpha=-1)
            dB = fold(dy @ D3.mT, scores)
            add(d_gain, (rows, slice(None)), scores * dB, -1)
            d_scores = gain[..., rows, :] * dB
            if delta:
                if through_P:
                    dP.baddbmm_(flat(decay[..., rows, :] * scores).mT, dy, alpha=-1)
                dA = fold(dy @ P3.mT, scores)
                add(d_decay, (rows, slice(None)), scores * dA, -1)
                d_scores = torch.addcmul(d_scores, decay[..., rows, :], dA)
            dXe = dXe - (d_scores.mT @ q).sum_to_size(dXe.shape)
            return dq - (d_scores @ Xe).sum_to_size(dq.shape)

        dQ, dX = None, 0.0
        if dR is not None:
            dQ = read_backward(slice(int(inclusive), c + int(inclusive)), Q, flat(dR), True)
        if delta:  # P = inverse (what the rest makes of X): its gradient is a read's with dy = inverse^T dP
            dX = read_backward(slice(0, c), X, flat(inverse).mT @ dP, False)
        dX = dX + (eta.unsqueeze(-1) * dXe).sum_to_size(X.shape)
        if not momentum:
            d_decay, d_gain = d_decay + d_gain, None
        d_eta = rowsum(dXe, X).sum_to_size(eta.shape)
        dm = None if m is None else fold(dm, m)
        return fold(dM, M), dX, fold(dD, D), d_eta, dm, dQ, d_gamma, d_decay, d_gain, d_gain_m, d_keep, None, None


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
