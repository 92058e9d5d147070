"""The inner loops of Nested Learning, each written first as the plain PyTorch that defines it.

`dgd_chunk` is the recurrence that every parametric memory of `hope.Memory` runs inside a chunk: delta gradient
descent (eq. 88) with retention and momentum, all tokens of the chunk at once and without a loop. `newton_schulz`
orthogonalises the momentum of Muon and M3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _segment_products(a: Tensor) -> Tensor:
    """Products of consecutive gates. a: (..., c) -> (..., c + 1, c + 1), entry [t, s] = a_{s+1} ... a_t, 0 for s > t.

    Products rather than differences of cumulative logarithms: a gate of exactly 0 is legal and must not give NaN.
    """
    c = a.shape[-1]
    lower = torch.ones(c + 1, c + 1, dtype=torch.bool, device=a.device).tril()
    factors = torch.where(lower[:c], a.unsqueeze(-1), 1.0)
    products = F.pad(factors.cumprod(-2), (0, 0, 1, 0), value=1.0)
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
    MX: Tensor | None = None,
    readers: int | None = None,
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
        MX: (..., c, o) X M^T, for callers who have it already.
        readers: how many memories are read, the last ones along the last leading dimension; all if left out.

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
            m, theta, Q, MX = (None if z is None else z.float() for z in (m, theta, Q, MX))
        gamma, decay, gain, gain_m, keep = chunk_gates(alpha, theta) if gates is None else gates

        def left(rows: slice, of_M: Tensor, of_m: Tensor | None, n: int | None = None) -> Tensor:
            """What is left of the start state, or of reads of it, at the times `rows`, for the last n memories or all."""
            gate = lambda z: _last(z[..., rows, None], n)
            y = gate(gamma) * of_M
            return y if of_m is None else torch.addcmul(y, gate(gain_m), of_m)

        at = lambda q, M: None if M is None else q @ M.mT
        at_X = left(slice(0, c), at(X, M) if MX is None else MX, at(X, m)) if delta else None
        at_Q = None
        if Q is not None:
            of = at(Q, _last(M, readers)), at(Q, _last(m, readers))
            at_Q = left(slice(int(inclusive), c + int(inclusive)), *of, readers)
        end = left(slice(c, c + 1), M, m)
        end_m = None if m is None else keep[..., :1, None] * m
        keep = None if keep is None else keep[..., 1:]
        lead = torch.broadcast_shapes(*(z.shape[:-2] for z in (end, X, D, eta.unsqueeze(-1), decay)))
        if Q is not None and readers is None:
            lead = torch.broadcast_shapes(lead, Q.shape[:-2])
        return _Chunk.apply(end, end_m, at_X, at_Q, X, D, eta, Q, decay, gain, keep, inclusive, readers, lead)


def _flatten(lead: torch.Size) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """How to bring a tensor (..., a, b) to (n, a, b) with the leading dimensions `lead`, and how to undo it."""
    flat = lambda z: z.expand(*lead, *z.shape[-2:]).reshape(-1, *z.shape[-2:])
    return flat, lambda z: z.view(*lead, *z.shape[-2:])


def _last(z: Tensor | None, readers: int | None) -> Tensor | None:
    """The part of z (..., n or 1, a, b) that belongs to the last `readers` memories."""
    return z if z is None or readers is None or z.shape[-3] == 1 else z[..., -readers:, :, :]


def _aliases(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same tensors under names of their own: some may have been made of others (at_X of X), and a derivative by one
    of them must not go through another."""
    return [None if z is None else z.view_as(z) for z in tensors]


def _chunk(end, end_m, at_X, at_Q, X, D, eta, Q, decay, gain, keep, inclusive, readers, lead):
    """A chunk's writes, and what is read of them, on top of what is left of the start state: of memory and momentum at
    the end (end, end_m), of their reads at X and Q (at_X, at_Q). `lead`: all leading dimensions.

    Returns M, m, R and, for the backward pass, P, the inverse of its system, and the writes.
    """
    c = X.shape[-2]
    gain = decay if gain is None else gain
    flat, whole = _flatten(lead)
    Xe = eta.unsqueeze(-1) * X
    D3, Xe3 = flat(D), flat(Xe)
    m = P = inverse = R = None
    writes = flat(gain[..., c, :, None]) * D3
    if at_X is not None:  # p_t = M_{t-1} x_t solves a unit lower triangular system
        scores = X @ Xe.mT
        A = decay[..., :c, :] * scores
        eye = torch.eye(c, dtype=A.dtype, device=A.device).expand_as(A)
        inverse = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
        P = flat(inverse) @ torch.baddbmm(flat(at_X), flat(gain[..., :c, :] * scores), D3, alpha=-1)
        writes = torch.addcmul(writes, flat(decay[..., c, :, None]), P)
    if Q is not None:
        rows, scores = slice(int(inclusive), c + int(inclusive)), Q @ _last(Xe, readers).mT
        gate = lambda z: _last(z[..., rows, :], readers)
        R = (-gate(gain) * scores) @ _last(whole(D3), readers)
        R = R if at_Q is None else at_Q + R
        if P is not None:
            R = R - (gate(decay) * scores) @ _last(whole(P), readers)
    minus = lambda z, a: whole(a.mT @ -Xe3 if z is None else torch.baddbmm(flat(z), a.mT, Xe3, alpha=-1))
    M = minus(end, writes)
    if keep is not None:
        m = minus(end_m, flat(keep.unsqueeze(-1)) * D3)
    return M, m, R, P, inverse, writes


class _Chunk(torch.autograd.Function):
    """`_chunk` with a backward pass by hand, a fraction of autograd's operations.

    Where memories share their input, whatever belongs to the input is summed over them before it is used.
    """

    @staticmethod
    def forward(ctx, end, end_m, at_X, at_Q, X, D, eta, Q, decay, gain, keep, *flags):
        *out, P, inverse, writes = _chunk(end, end_m, at_X, at_Q, X, D, eta, Q, decay, gain, keep, *flags)
        ctx.save_for_backward(at_X, X, D, eta, Q, decay, gain, keep, P, inverse, writes)
        ctx.flags, ctx.device = flags, X.device.type
        ctx.added = [None if z is None else z.shape for z in (end, end_m, at_Q)]  # their gradient is the result's
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        with torch.autocast(ctx.device, enabled=False):
            return _Chunk._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx, dM, dm, dR):
        at_X, *inputs, P, inverse, writes = ctx.saved_tensors
        inclusive, readers, lead = ctx.flags
        d_added = [g.sum_to_size(z) if z and g is not None else None for z, g in zip(ctx.added, (dM, dm, dR))]
        if torch.is_grad_enabled():  # a second derivative is wanted: leave it to autograd
            at_X, *inputs = _aliases(at_X, *inputs)
            outs = _chunk(None, None, at_X, None, *inputs, *ctx.flags)[:3]
            pairs = [(o, g) for o, g in zip(outs, (dM, dm, dR)) if o is not None and g is not None]
            wanted = [z for z in (at_X, *inputs) if z is not None and z.requires_grad]
            outs, grads = zip(*pairs)
            got = iter(torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True))
            d_at_X, *rest = (next(got) if z is not None and z.requires_grad else None for z in (at_X, *inputs))
            return *d_added[:2], d_at_X, d_added[2], *rest, None, None, None
        X, D, eta, Q, decay, gain, keep = inputs
        c, momentum = X.shape[-2], gain is not None
        gain = gain if momentum else decay
        flat, whole = _flatten(lead)
        Xe = eta.unsqueeze(-1) * X
        D3, Xe3 = flat(D), flat(Xe)
        d_decay, d_gain, d_keep = torch.zeros_like(decay), torch.zeros_like(gain), None
        fold = lambda z, like: z.sum_to_size(*like.shape[:-2], *z.shape[-2:])
        # The gradient of a gate (..., c) that scaled the rows of a tensor (n, c, o) on its way to one with gradient g.
        rows_of = lambda a, g, gate: whole(a * g).sum(-1).sum_to_size(gate.shape)

        dM3 = flat(D.new_zeros(D.shape[-1], X.shape[-1]) if dM is None else dM)
        U = Xe3 @ dM3.mT  # minus the gradient of the writes
        dD = flat(-gain[..., c, :, None]) * U
        d_gain[..., c, :] -= rows_of(D3, U, gain[..., c, :])
        dXe = writes @ dM3  # minus the gradient of Xe
        if P is not None:
            dP = flat(-decay[..., c, :, None]) * U
            d_decay[..., c, :] -= rows_of(P, U, decay[..., c, :])
        if dm is not None:
            dm3, kept = flat(dm), flat(keep.unsqueeze(-1))
            Um = Xe3 @ dm3.mT
            dD.addcmul_(kept, Um, value=-1)
            d_keep = -rows_of(D3, Um, keep)
            dXe.baddbmm_(kept * D3, dm3)
        dXe = fold(whole(dXe), Xe)

        def read_backward(rows: slice, q: Tensor, dy: Tensor, n: int | None, to: dict[str, Tensor]) -> Tensor:
            """Backward of y = start - (gain * scores) D - (decay * scores) P with scores = q Xe^T and dy of shape y.

            Adds to the gradients of Xe, the gates and, as far as they are in `to`, of D and P; returns minus that of q.
            """
            part = lambda z: _last(whole(z), n)
            xe, minus_d_scores = _last(Xe, n), 0.0
            scores = q @ xe.mT
            for name, z, gate, d_gate in (("D", D3, gain, d_gain), ("P", P, decay, d_decay)):
                if z is None:
                    continue
                gate, d_gate = (_last(g[..., rows, :], n) for g in (gate, d_gate))
                if name in to and n is None:
                    to[name].baddbmm_(flat(gate * scores).mT, flat(dy), alpha=-1)
                elif name in to:
                    part(to[name]).sub_((gate * scores).mT @ dy)
                d = fold(dy @ part(z).mT, scores)
                d_gate -= (scores * d).sum_to_size(gate.shape)
                minus_d_scores = minus_d_scores + gate * d if name == "D" else torch.addcmul(minus_d_scores, gate, d)
            _last(dXe, n).add_((minus_d_scores.mT @ q).sum_to_size(xe.shape))
            return (minus_d_scores @ xe).sum_to_size(q.shape)

        dQ = d_at_X = None
        if dR is not None:
            to = {"D": dD} if P is None else {"D": dD, "P": dP}
            dQ = -read_backward(slice(int(inclusive), c + int(inclusive)), Q, dR, readers, to)
        minus_dX = 0.0
        if P is not None:  # P = inverse (a read's result at X), so that its gradient is a read's with inverse^T dP
            d_at_X = whole(flat(inverse).mT @ dP)
            minus_dX = read_backward(slice(0, c), X, d_at_X, None, {"D": dD})
            d_at_X = d_at_X.sum_to_size(at_X.shape)
        d_eta = -(dXe * X).sum(-1).sum_to_size(eta.shape)
        dX = -(minus_dX + eta.unsqueeze(-1) * dXe).sum_to_size(X.shape)
        if not momentum:
            d_decay, d_gain = d_decay + d_gain, None
        d_gates = d_decay, d_gain, d_keep
        return *d_added[:2], d_at_X, d_added[2], dX, fold(whole(dD), D), d_eta, dQ, *d_gates, None, None, None


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


# Quintic a s + b s^3 + c s^5, found by search: steepest at 0 among those that end in [0.7, 1.2] though every step is 2% off.
NEWTON_SCHULZ = (3.457, -5.065, 2.323)


def newton_schulz(G: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Nearly the orthogonal factor U V^T of every matrix G = U S V^T, by matrix products only (eqs. 42 to 44).

    Each step takes every singular value s to a s + b s^3 + c s^5, after G was divided by its Frobenius norm |G|. All
    singular values of at least |G| / 570 end in [0.7, 1.2] after 5 steps, in bfloat16 too (each step more reaches 3.4
    times further down). Smaller ones end below 1.2, so a G of 0 gives 0.

    Args:
        G: (..., m, n), of any scale: it is divided by its largest entry before it is squared.
        dtype: what to compute in; by default float64 for float64, else bfloat16 on GPUs and float32 on CPUs.

    Returns (..., m, n) of G's dtype; not finite where G is not. ValueError for less than two dimensions or one step.
    """
    if G.ndim < 2 or steps < 1:
        raise ValueError(
            f"newton_schulz: G has shape {tuple(G.shape)}, steps is {steps}; needs (..., m, n) and 1 or more"
        )
    if dtype is None:
        dtype = torch.float64 if G.dtype == torch.float64 else torch.bfloat16 if G.is_cuda else torch.float32
    a, b, c = NEWTON_SCHULZ
    X = (G if G.dtype == torch.float64 else G.float()).reshape(-1, *G.shape[-2:])
    X = X.mT if G.shape[-2] > G.shape[-1] else X  # square the smaller side
    tiny = torch.finfo(X.dtype).tiny
    X = X / X.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)
    X = (X / X.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=tiny)).to(dtype)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if G.shape[-2] > G.shape[-1] else X).reshape(G.shape).to(G.dtype)
