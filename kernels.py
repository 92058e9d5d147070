"""The inner loops of Nested Learning: the plain PyTorch that defines each, then Triton kernels that compute the same.

    dgd_chunk       delta gradient descent (eq. 88) with retention and momentum, as every parametric memory runs it
                    inside a chunk: all tokens at once, without a loop. `dgd_loop` is its specification, token by token
    chunk_gates     what the gates of a chunk make of its writes
    newton_schulz   orthogonalises the momentum of Muon and M3
    uses_triton     which of the two runs: Triton on GPUs, unless HOPE_KERNELS or `using` says otherwise; see backend.py

Read down to `newton_schulz` to know what is computed, and go on to hope.py, which calls it. The rest is how a GPU
does it: `dgd_chunk` in Triton, forward and backward, then Newton-Schulz. Whole layers in one launch are in scan.py, for
reading, and in fused.py, for training.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from functools import lru_cache, partial, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from backend import chunks_by_triton, constexpr, jit, on_device, precision, scans, suits, tl, uses_triton, using
from backend import triton as triton  # None where it is not installed

__all__ = [
    "EPS", "Gates", "chunk_gates", "dgd_chunk", "dgd_loop", "newton_schulz", "NEWTON_SCHULZ", "scans",
    "uses_triton", "using",
]  # fmt: skip

# Vectors shorter than this are not brought to length 1 (`hope.unit`), and spreads not to 1 (`hope.layer_norm`): small
# beside the length of a key, about sqrt(head width), and of what a unit vector reads. So what is 0 gets its gradient
# times 10, not times 1e12.
EPS = 0.1


class Gates(NamedTuple):
    """What the gates of a chunk of c tokens make of its writes, for every time t = 0..c and token s = 1..c; the letters
    are those of the derivation: D and T, the products of consecutive alpha and theta. Without momentum, the first."""

    retain: Tensor  # (..., c + 1, c + 1): gamma, what is left at t of the memory at the start, then D, of a write at s
    through: Tensor | None = None  # the same by way of the momentum: gain_m = D Theta, then gain = D T
    keep: Tensor | None = None  # (..., c + 1): what the momentum keeps at the end of its start, and of the writes to it
    gamma = property(lambda self: self.retain[..., 0])
    decay = property(lambda self: self.retain[..., 1:])


def in_float32(z: Tensor) -> Tensor:
    """z in float32 at least."""
    return z if z.dtype == torch.float64 else z.float()


class _SegmentProducts(torch.autograd.Function):
    """Products of consecutive gates. a: (..., c) -> P (..., c + 1, c + 1), P[t, s] = a_{s+1} ... a_t, 0 for s > t.

    Not differences of cumulative logarithms: a gate of exactly 0 is legal and must not give NaN. Nor does the backward
    pass divide by a gate: without a_r, P[t, s] is P[t, r] P[r - 1, s].
    """

    @staticmethod
    def forward(ctx, a):
        c = a.shape[-1]
        lower = torch.ones(c, c + 1, dtype=torch.bool, device=a.device).tril()
        P = F.pad(torch.where(lower, a.unsqueeze(-1), 1.0).cumprod(-2), (0, 0, 1, 0), value=1.0)
        P = F.threshold(P, 1e-30, 0.0).tril()  # what is too small to matter: denormal numbers slow a CPU down
        ctx.save_for_backward(P)
        return P

    @staticmethod
    def backward(ctx, g):
        (P,) = ctx.saved_tensors
        with torch.autocast(P.device.type, enabled=False):
            return (P[..., 1:] * (g @ P.mT)[..., :-1]).sum(-2)


def chunk_gates(alpha: Tensor, theta: Tensor | None, ema: bool = False) -> Gates:
    """`Gates` of alpha and theta, each (..., c), in float32 at least. With `ema` a write enters the momentum with
    weight 1 - theta, which makes it an average of the last gradients, not their sum."""
    alpha = in_float32(alpha)
    if theta is None:
        return Gates(_SegmentProducts.apply(alpha))
    alpha, theta = torch.broadcast_tensors(alpha, in_float32(theta))
    retain, momentum = _SegmentProducts.apply(torch.stack([alpha, theta])).unbind()
    if ema:
        momentum = momentum * F.pad(1 - theta, (1, 0), value=1.0).unsqueeze(-2)
    return Gates(retain, retain[..., 1:] @ momentum[..., 1:, :], momentum[..., -1, :])


# What is the same for all tokens of a chunk, see `dgd_chunk`.
_Rule = namedtuple("_Rule", "ema inclusive delta readers")


def dgd_chunk(
    M: Tensor, X: Tensor, D: Tensor, eta: Tensor, alpha: Tensor, *, m: Tensor | None = None,
    theta: Tensor | None = None, Q: Tensor | None = None, inclusive: bool = False, delta: bool = True,
    gates: Gates | None = None, MX: Tensor | None = None, readers: int | None = None, ema: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
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
        gates: `chunk_gates(alpha, theta, ema)`, for callers who share it between several memories; kernels make their
            own.
        MX: (..., c, o) X M^T, for callers who have it already.
        readers: how many memories are read, the last ones along the last leading dimension; all if left out.
        ema: a write enters the momentum with weight 1 - theta.

    Leading dimensions broadcast, and any of them, c, o, i may be 0. Everything is differentiable. Tensors may be of any
    floating types: all is computed, and returned, in the widest of them, float32 at least. ValueError for shapes that
    do not fit and for other types.

    Returns:
        (M, m, R): memory and momentum after the chunk (m is None without `theta`), and the reads (..., c, o),
        None without Q.
    """
    inputs = M, m, X, D, Q, eta, alpha, theta
    _check_chunk(*inputs)
    rule = _Rule(ema, inclusive, delta, readers)
    if chunks_by_triton(X) and suits(*inputs):
        return _TritonChunk.apply(rule, *inputs)
    return _reference(*inputs, rule, gates, MX)


def _check_chunk(*inputs: Tensor | None) -> None:
    """ValueError for inputs of `dgd_chunk` that do not fit."""
    M, m, X, D, Q, eta, alpha, theta = inputs
    if m is not None and theta is None:
        raise ValueError("dgd_chunk: m was given without theta; pass theta (..., c), or leave m out")
    (o, i), c = M.shape[-2:], X.shape[-2]
    endings = (o, i), (o, i), (c, i), (c, o), (c, i), (c,), (c,), (c,)
    for name, z, ending in zip(("M", "m", "X", "D", "Q", "eta", "alpha", "theta"), inputs, endings):
        if z is not None and z.shape[-len(ending) :] != ending:
            sizes = f"M is (..., {o}, {i}), and X has {c} tokens"
            raise ValueError(f"dgd_chunk: {name} is {tuple(z.shape)}; it needs to end in {ending}: {sizes}")
        if z is not None and not z.dtype.is_floating_point:
            raise ValueError(f"dgd_chunk: {name} is {z.dtype}; it needs a floating type, as in {name}.float()")


class _Layout(NamedTuple):
    """How several memories lie in the tensors of a chunk, and which of them are read when.

    Tensors broadcast along `lead`, the leading dimensions of all memories together. Rows of memories, which have tokens
    as their last axis, do not depend on each other. So memories side by side (the last dimension of `lead`) that share
    inputs, steps and gates are `joined`, computed as one that has the rows of all."""

    lead: torch.Size
    o: int  # rows of a memory
    joined: bool
    readers: int | None
    times: slice  # of the times 0..c those of the reads: without the last one, or without the first

    def rows(self, z: Tensor) -> Tensor:
        """(..., o, k) -> (*lead, o, k), or (..., 1, n o, k) if joined."""
        z = z.expand(*self.lead, *z.shape[-2:])
        return z.reshape(*self.lead[:-1], 1, self.lead[-1] * self.o, z.shape[-1]) if self.joined else z

    def apart(self, z: Tensor) -> Tensor:
        """The inverse, also of the rows that are read."""
        return z.unflatten(-2, (-1, self.o)).squeeze(-4) if self.joined else z

    def read(self, z: Tensor) -> Tensor:
        """The part of z (..., n or 1, a, b), made of inputs, that belongs to the memories that are read."""
        return z if self.readers is None or z.shape[-3] == 1 else z[..., -self.readers :, :, :]

    def read_rows(self, z: Tensor) -> Tensor:
        """The same of what `rows` gives."""
        joined = self.joined and self.readers is not None
        return z[..., z.shape[-2] - self.readers * self.o :, :] if joined else self.read(z)


def _reference(M, m, X, D, Q, eta, alpha, theta, rule: _Rule, gates: Gates | None = None, MX: Tensor | None = None):
    """`dgd_chunk` in plain PyTorch: types and shapes. What it computes is in `_plain_chunk`."""
    tensors = [z for z in (M, m, X, D, Q, eta, alpha, theta) if z is not None]
    dtype = reduce(torch.promote_types, {z.dtype for z in tensors}, torch.float32)
    to = lambda z: None if z is None else z.to(dtype)
    c, MX = X.shape[-2], MX if rule.delta else None
    with torch.autocast(X.device.type, enabled=False):
        M, m, X, D, Q, eta, alpha, theta, MX = (to(z) for z in (M, m, X, D, Q, eta, alpha, theta, MX))
        m = torch.zeros_like(M) if m is None and theta is not None else m
        if c == 1 and not torch.is_grad_enabled():  # for one token the loop is the shortest
            return dgd_loop(M, X, D, eta, alpha, m=m, theta=theta, Q=Q, **rule._asdict())
        retain, through, keep = map(to, gates or chunk_gates(alpha, theta, rule.ema))
        inputs = [X, eta.unsqueeze(-1), retain]
        shaped = [M, D, *inputs, m, Q if rule.readers is None else None]
        lead = torch.broadcast_shapes(*(z.shape[:-2] for z in shaped if z is not None))
        shared = all(z is None or z.dim() < 3 or z.shape[-3] == 1 for z in (*inputs, Q))
        joined = shared and len(lead) > 0 and lead[-1] > 1 and M.shape[-2] > 0
        layout = _Layout(lead, M.shape[-2], joined, rule.readers, slice(+rule.inclusive, c + rule.inclusive))
        return _PlainChunk.apply(M, m, X, D, eta, Q, MX, retain, through, keep, rule.delta, layout)


def _add_product(z: Tensor, a: Tensor, b: Tensor, by: float = 1.0) -> Tensor:
    """z += by a b, summed over what z shares; in one operation where there is nothing to sum. Returns z."""
    lead = z.shape[:-2]
    if z.is_contiguous() and torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]) == lead:
        flat = lambda y: y.expand(*lead, *y.shape[-2:]).reshape(lead.numel(), *y.shape[-2:])
        flat(z).baddbmm_(flat(a), flat(b), alpha=by)
        return z
    return z.add_((a @ b).sum_to_size(z.shape), alpha=by)


def _plain_chunk(M, m, X, D, eta, Q, MX, retain, through, keep, delta: bool, layout: _Layout):
    """A chunk. In the letters of `Gates`, with  Xe = eta X,  S = X Xe^T,  S_Q = Q Xe^T,  and tokens as columns of
    P and of Delta, the gradients D:

        P (1 + D S)^T = M (gamma X)^T + m (gain_m X)^T - Delta (D T  S)^T           p_t = M_{t-1} x_t
        V = D_c P + (D T)_c Delta                             what is written at every token, as M has it at the end
        M_c = gamma_c M + gain_m_c m - V Xe,    m_c = keep_0 m - Delta (keep Xe)
        R = M (gamma Q)^T + m (gain_m Q)^T - Delta (D T  S_Q)^T - P (D S_Q)^T

    Gates multiply entry by entry, those of the reads at their times; X and Q rather than M, of which there is more.
    D T is D without momentum. Returns memory, momentum and reads, and for the backward pass P, (1 + D S)^-1 and V.
    """
    c, rows, read, read_rows, times = X.shape[-2], layout.rows, layout.read, layout.read_rows, layout.times
    gains = retain if through is None else through
    gamma, decay, gain_m, gain = retain[..., :1], retain[..., 1:], gains[..., :1], gains[..., 1:]
    Xe = eta.unsqueeze(-1) * X
    M, m, Delta = rows(M), None if m is None else rows(m), rows(D.mT)
    P = inverse = m_end = R = None
    V = gain[..., c:, :] * Delta
    if delta:
        at_X = M @ (gamma[..., :c, :] * X).mT if MX is None else gamma[..., :c, :].mT * rows(MX.mT)
        at_X = at_X if m is None else _add_product(at_X, m, (gain_m[..., :c, :] * X).mT)
        S = X @ Xe.mT
        A = decay[..., :c, :] * S
        eye = torch.eye(c, dtype=A.dtype, device=A.device).expand_as(A)
        inverse = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
        P = _add_product(at_X, Delta, (gain[..., :c, :] * S).mT, -1) @ inverse.mT
        V = torch.addcmul(V, decay[..., c:, :], P)
    M_end = gamma[..., c:, :] * M
    if m is not None:
        M_end = torch.addcmul(M_end, gain_m[..., c:, :], m)
        m_end = layout.apart(_add_product(keep[..., None, :1] * m, Delta, keep[..., 1:, None] * Xe, -1))
    M_end = layout.apart(_add_product(M_end, V, Xe, -1))
    if Q is not None:
        S_Q = Q @ read(Xe).mT
        R = read_rows(M) @ (read(gamma[..., times, :]) * Q).mT
        R = R if m is None else _add_product(R, read_rows(m), (read(gain_m[..., times, :]) * Q).mT)
        R = _add_product(R, read_rows(Delta), (read(gain[..., times, :]) * S_Q).mT, -1)
        R = _add_product(R, read_rows(P), (read(decay[..., times, :]) * S_Q).mT, -1) if delta else R
        R = layout.apart(R).mT
    return M_end, m_end, R, P, inverse, V


class _PlainChunk(torch.autograd.Function):
    """`_plain_chunk` with a backward pass by hand, which takes less than half of autograd's operations and memory."""

    @staticmethod
    def forward(ctx, *inputs):
        M, m, R, *made = _plain_chunk(*inputs)
        ctx.delta, ctx.layout = inputs[-2:]
        ctx.save_for_backward(*inputs[:-2], *made)
        ctx.set_materialize_grads(False)
        return M, m, R

    @staticmethod
    def backward(ctx, *grads):
        *inputs, P, inverse, V = ctx.saved_tensors
        with torch.autocast(inputs[0].device.type, enabled=False):
            if torch.is_grad_enabled():  # a second derivative is wanted
                again = lambda *inputs: _plain_chunk(*inputs, ctx.delta, ctx.layout)[:3]
                return *_derivatives(again, inputs, grads), None, None
            return *_plain_chunk_backward(*inputs, P, inverse, V, ctx.layout, *grads), None, None


def _derivatives(fn: Callable, inputs: tuple, grads: tuple) -> list[Tensor | None]:
    """Gradients of fn(*inputs) by its inputs, made by autograd to be differentiated again; None where there is none.

    Inputs get names of their own: some may have been made of others (MX of X), and a derivative by one of them must
    not go through another.
    """
    inputs = [None if z is None else z.view_as(z) for z in inputs]
    pairs = [(z, g) for z, g in zip(fn(*inputs), grads) if z is not None and g is not None]
    wanted = [k for k, z in enumerate(inputs) if z is not None and z.requires_grad]
    outputs, grads = [z for z, _ in pairs], [g for _, g in pairs]
    found = torch.autograd.grad(outputs, [inputs[k] for k in wanted], grads, create_graph=True, allow_unused=True)
    return [dict(zip(wanted, found)).get(k) for k in range(len(inputs))]


def _plain_chunk_backward(M, m, X, D, eta, Q, MX, retain, through, keep, P, inverse, V, layout, dM, dm, dR):
    """Gradients of `_plain_chunk`'s tensors, in its letters; MX is M X^T where the caller had it.

    Since  P = (what a read at X finds) (1 + D S)^-T,  its gradient is that of such a read with  dP (1 + D S)^-1.
    """
    c, rows, momentum = X.shape[-2], layout.rows, m is not None
    Xe = eta.unsqueeze(-1) * X
    start, start_m, Delta = rows(M), rows(m) if momentum else None, rows(D.mT)
    d_retain, d_through, d_keep = (None if z is None else torch.zeros_like(z) for z in (retain, through, keep))
    gains, d_gains = (through, d_through) if momentum else (retain, d_retain)
    gamma, decay, gain_m, gain = retain[..., :1], retain[..., 1:], gains[..., :1], gains[..., 1:]
    d_gamma, d_decay, d_gain_m, d_gain = d_retain[..., :1], d_retain[..., 1:], d_gains[..., :1], d_gains[..., 1:]
    add = lambda d, z, by=1.0: d.add_(z.sum_to_size(d.shape), alpha=by)

    def scale_backward(x, minus_dx, gate, d_gate, d, by):
        # Of  gate x,  whose gradient is by d: adds to those of gate (..., c, 1) and of x.
        add(d_gate, (d * x).sum(-1, keepdim=True), by)
        add(minus_dx, gate * d, -by)

    end = start.new_zeros(()).expand_as(start) if dM is None else rows(dM)
    U = end @ Xe.mT  # -dV
    d_start, d_Delta, dP, d_start_m = gamma[..., c:, :] * end, -gain[..., c:, :] * U, None, None
    add(d_gamma[..., c:, :], end * start)
    add(d_gain[..., c:, :], Delta * U, -1)
    minus_dXe = (V.mT @ end).sum_to_size(Xe.shape)
    if P is not None:
        dP = -decay[..., c:, :] * U
        add(d_decay[..., c:, :], P * U, -1)
    if momentum:
        d_start_m = gain_m[..., c:, :] * end
        add(d_gain_m[..., c:, :], end * start_m)
    if dm is not None:
        end_m, kept, d_kept = rows(dm), keep.unsqueeze(-1), d_keep.unsqueeze(-1)
        scale_backward(Xe, minus_dXe, kept[..., 1:, :], d_kept[..., 1:, :], Delta.mT @ end_m, -1)
        _add_product(d_Delta, end_m, (kept[..., 1:, :] * Xe).mT, -1)
        d_start_m.addcmul_(kept[..., :1, :], end_m)
        add(d_kept[..., :1, :], end_m * start_m)
    starts = [(gamma, d_gamma, start, d_start), (gain_m, d_gain_m, start_m, d_start_m)][: 1 + momentum]

    def read_backward(at, dy, times, part, part_rows, starts):
        """Of a read  y = M (gamma at)^T + m (gain_m at)^T - Delta (D T  S)^T - P (D S)^T  of the memories that `part`
        and `part_rows` pick; by way of M and m as far as `starts` has them. Returns minus the gradient of `at`, and
        adds to all others, but to that of P not where it is P that is read."""
        xe, minus_dS = part(Xe), None
        S = at @ xe.mT
        for z, gate, d_gate, dz in (Delta, gain, d_gain, d_Delta), (P, decay, d_decay, None if at is X else dP):
            if z is not None:
                gate, d_gate = part(gate[..., times, :]), part(d_gate[..., times, :])
                d = (dy.mT @ part_rows(z)).sum_to_size(torch.broadcast_shapes(S.shape, gate.shape))
                add(d_gate, S * d, -1)
                minus_dS = gate * d if minus_dS is None else torch.addcmul(minus_dS, gate, d)
            if dz is not None:
                _add_product(part_rows(dz), dy, gate * S, -1)
        _add_product(part(minus_dXe), minus_dS.mT, at)
        minus_d_at = (minus_dS @ xe).sum_to_size(at.shape)
        for gate, d_gate, w, dw in starts:
            gate, d_gate = part(gate[..., times, :]), part(d_gate[..., times, :])
            scale_backward(at, minus_d_at, gate, d_gate, dy.mT @ part_rows(w), 1)
            _add_product(part_rows(dw), dy, gate * at)
        return minus_d_at

    dQ, dMX, minus_dX = None, None, 0.0
    if dR is not None:
        dR = dR.mT.flatten(-3, -2).unsqueeze(-3) if layout.joined else dR.mT
        dQ = -read_backward(Q, dR, layout.times, layout.read, layout.read_rows, starts)
    if P is not None:
        d_at_X, same = dP @ inverse, lambda z: z
        if MX is not None:  # its gradient is the caller's to go on with
            dMX = layout.apart(gamma[..., :c, :].mT * d_at_X).mT.sum_to_size(MX.shape)
            add(d_gamma[..., :c, :].mT, d_at_X * rows(MX.mT))
        minus_dX = read_backward(X, d_at_X, slice(0, c), same, same, starts[MX is not None :])
    d_eta = -(minus_dXe * X).sum(-1).sum_to_size(eta.shape)
    dX = -(minus_dX + eta.unsqueeze(-1) * minus_dXe).sum_to_size(X.shape)
    dM, dm = (None if z is None else layout.apart(d).sum_to_size(z.shape) for z, d in ((M, d_start), (m, d_start_m)))
    dD = layout.apart(d_Delta).mT.sum_to_size(D.shape)
    return dM, dm, dX, dD, d_eta, dQ, dMX, d_retain, d_through, d_keep


def dgd_loop(M, X, D, eta, alpha, *, m=None, theta=None, Q=None, inclusive=False, delta=True, readers=None, ema=False):
    """The specification of `dgd_chunk`: the same arguments, one token at a time, as the equations are written."""
    momentum = theta is not None
    m = torch.zeros_like(M) if momentum and m is None else m
    reads = []
    for t in range(X.shape[-2]):
        x, d, step, keep = X[..., t, :, None], D[..., t, :, None], eta[..., t, None, None], alpha[..., t, None, None]
        before = M
        write = -step * d * x.mT
        if momentum:
            kept = theta[..., t, None, None]
            write = m = kept * m + (write * (1 - kept) if ema else write)
        M = keep * M + write
        if delta:
            M = M - step * (before @ x) * x.mT
        if Q is not None:
            seen = M if inclusive else before
            seen = seen if readers is None else seen[..., -readers:, :, :]
            reads.append((seen @ Q[..., t, :, None]).squeeze(-1))
    return M, m if momentum else None, torch.stack(reads, -2) if reads else None


# One step takes a singular value s to a s + b s^3 + c s^5 with these a, b, c. They were searched for: of all triples
# that bring s into [0.7, 1.2] in five steps, though rounding changes every step by 2%, these raise small s the fastest
# (a is largest).
NEWTON_SCHULZ = (3.457, -5.065, 2.323)


def newton_schulz(G: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Nearly the orthogonal factor U V^T of every matrix G = U S V^T, by matrix products only (eqs. 42 to 44).

    Each step takes every singular value s to a s + b s^3 + c s^5, after G was divided by its Frobenius norm |G|. All
    singular values of at least |G| / 570 end in [0.7, 1.2] after 5 steps, in bfloat16 too (each step more reaches 3.4
    times further down). Smaller ones end below 1.2, so a G of 0 gives 0.

    Args:
        G: (..., m, n), of any scale: it is divided by its largest entry before it is squared.
        dtype: what to compute in; by default float64 for float64, else bfloat16 on GPUs and float32 on CPUs.

    Returns (..., m, n) of G's dtype; not finite where G is not. ValueError for less than two dimensions or one step, or
    for numbers that are not real.
    """
    if not G.dtype.is_floating_point:
        raise ValueError(f"newton_schulz: G is {G.dtype}; it needs a floating type, as in G.float()")
    if G.ndim < 2 or steps < 1:
        raise ValueError(f"newton_schulz: G has shape {tuple(G.shape)}, steps is {steps}; needs (..., m, n), 1 or more")
    if G.numel() == 0:
        return G.clone()
    if dtype is None:
        dtype = torch.float64 if G.dtype == torch.float64 else torch.bfloat16 if G.is_cuda else torch.float32
    a, b, c = NEWTON_SCHULZ
    X = in_float32(G).reshape(-1, *G.shape[-2:])
    X = X.mT if G.shape[-2] > G.shape[-1] else X  # square the smaller side
    tiny = torch.finfo(X.dtype).tiny
    X = X / X.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)
    X = (X / X.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=tiny)).to(dtype)
    fast = X.dtype != torch.float64 and uses_triton(X)
    for _ in range(steps):
        A = _symmetric(X) if fast else X @ X.mT
        B = _symmetric(A, A, b, c) if fast else torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if G.shape[-2] > G.shape[-1] else X).reshape(G.shape).to(G.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# `dgd_chunk` in Triton.
#
# Work: the reference solves one c x c system for a chunk. A kernel goes through the chunk in blocks of BC tokens: a
# block's system is BC x BC, solved by forward substitution, and earlier blocks act through the memory, which they have
# written. Rows of a memory do not depend on each other: a program has BO of them, and one launch has all sequences,
# heads, memories and blocks of rows. A memory stays in the cache and passes through registers in tiles of BI columns.
#
# Tiles: tokens are the last axis of all: x, q (BI, BC), d, p, r (BO, BC); scores and gates (BC, BC) are [s, t] for a
# write at s and time t. (The compiler gives each warp a share of a product's first axis and all of its last: with
# tokens first, each warp would hold whole memories.) A block is padded to BC tokens that change nothing: eta = 0, x = d
# = q = 0, gates 1.
#
# Registers: a thread has 255, and what does not fit spills to memory. Hence `disable_licm`, which computes again in
# each turn of a loop what would else be held throughout, and a barrier between products, over which none is begun
# early. Barriers also stand, by necessity, wherever threads of a program read or overwrite what others of them wrote or
# read.

BC = constexpr(16)  # tokens in a block
BI = constexpr(16)  # columns in a tile of a memory

# What a block of tokens keeps in global memory: lines (BC,), then squares (BC, BC); the size in numbers.
LINES = constexpr(9)
FORWARD_WORK = (LINES + 4 * BC) * BC  # see `_put_gates`
BACKWARD_WORK = (LINES + 5 * BC) * BC  # see `_chunk_backward_tokens`

# Tokens in memory from p on: `size` numbers each, `row` numbers from the beginning of one to that of the next.
_Stream = namedtuple("_Stream", "p row size")
# The gates of a block, (BC,), and their products: before each, after each (0 for padding), of all, and (BC, BC) between
# s and t, both left out, 0 for s >= t.
_Decays = namedtuple("_Decays", "now before after all between")
# What a read at t has of the start's M (before) and m (gain_m), and of writes p (between) and d (gain), (BC, BC).
_Reads = namedtuple("_Reads", "before gain_m between gain")
# What a block's end has: M of the start's M (all) and m (gain_m) and of writes p (after) and d (gain), (BC,); m of the
# start's m (keep_m) and of writes d (keep).
_End = namedtuple("_End", "all gain_m keep_m after gain keep")
# The `_Decays` of alpha and theta; the `_Reads` before the write at t; the `_End`; what m has at t of a write at s (BC,
# BC) and of the start's m (BC,); the weight of a write as it enters m. Without momentum a write d reaches M at once, as
# p does, and what belongs to the momentum are placeholders.
_BlockGates = namedtuple("_BlockGates", "alpha theta reads end in_m start_in_m weight")
# The gradients of what is not a gate in `_BlockGates`: of reads, then of the end.
_GateGradients = namedtuple("_GateGradients", "between gain before gain_m after gain_end keep all gain_m_end keep_m")
# A block of tokens for rows o of one memory on the way back: streams (None without the delta term or queries), the
# states at its start, the gradients of those at its end (m is None without momentum).
_Saved = namedtuple("_Saved", "x d p dz q dr read step M m end end_m work left o")


@jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32. tf32x3 splits each factor into two of 11 bits and leaves out the product of the small parts, an
    error of 2^-20 |a| |b|. Triton's own mode of that name holds all four parts in registers at once, and spills."""
    if PRECISION == "tf32x3":
        a_high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        b_high = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        y = tl.dot(a - a_high, b_high, input_precision="tf32")
        y = tl.dot(a_high, b_high, y, input_precision="tf32")
        return tl.dot(a_high, b - b_high, y, input_precision="tf32")
    return tl.dot(a, b, input_precision=PRECISION)


@jit
def _matrix(p, o, i, O, I):
    """Load rows o and columns i of a matrix (O, I) in float32; 0 outside."""
    mask = (o < O)[:, None] & (i < I)[None, :]
    return tl.load(p + o[:, None] * I + i[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _store_matrix(p, value, o, i, O, I):
    mask = (o < O)[:, None] & (i < I)[None, :]
    tl.store(p + o[:, None] * I + i[None, :], value, mask=mask)


@jit
def _tokens(x, i, left, C: tl.constexpr = BC):
    """Load numbers i of a block of tokens of the stream x in float32, (i, C); 0 outside and from token `left` on."""
    t = tl.arange(0, C)
    mask = (i < x.size)[:, None] & (t < left)[None, :]
    return tl.load(x.p + t[None, :] * x.row + i[:, None], mask=mask, other=0.0).to(tl.float32)


@jit
def _store_tokens(x, value, i, left, C: tl.constexpr = BC):
    t = tl.arange(0, C)
    mask = (i < x.size)[:, None] & (t < left)[None, :]
    tl.store(x.p + t[None, :] * x.row + i[:, None], value, mask=mask)


@jit
def _steps(eta, left, C: tl.constexpr = BC):
    t = tl.arange(0, C)
    return tl.load(eta + t, mask=t < left, other=0.0).to(tl.float32)


@jit
def _line(work, k):
    """Where the k-th line of a block's work is."""
    return work + k * BC + tl.arange(0, BC)


@jit
def _square(work, k):
    """Where the k-th square of a block's work is."""
    t = tl.arange(0, BC)
    return work + (LINES + k * BC) * BC + t[:, None] * BC + t[None, :]


@jit
def _diagonal(C: tl.constexpr = BC):
    t = tl.arange(0, C)
    return t[:, None] == t[None, :]


@jit
def _normalized(y, eps: tl.constexpr = EPS):
    """`hope.unit` of every column."""
    return y / tl.maximum(tl.sqrt(tl.sum(y * y, 0)), eps)[None, :]


@jit
def _softplus(z):
    small = tl.exp(-tl.abs(z))  # where it is small 1 + small would lose it, not the series of log
    series = small * (1.0 - small * (0.5 - small * (1.0 / 3.0 - small * 0.25)))
    return tl.maximum(z, 0.0) + tl.where(small < 0.03, series, tl.log(1.0 + small))


@jit
def _decays(gate, left, C: tl.constexpr = BC):
    s, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    line = tl.arange(0, C)
    now = tl.load(gate + line, mask=line < left, other=1.0).to(tl.float32)
    last = tl.load(gate + line - 1, mask=(line > 0) & (line <= left), other=1.0).to(tl.float32)
    coming = tl.load(gate + line + 1, mask=line + 1 < left, other=1.0).to(tl.float32)
    between = tl.cumprod(tl.where(t > s + 1, last[None, :], 1.0), 1)
    between = tl.where(t > s, between, 0.0)
    before, after = tl.cumprod(last, 0), tl.cumprod(coming, 0, reverse=True)
    product = tl.sum(tl.where(line == 0, after * now, 0.0))
    return _Decays(now, before, tl.where(line < left, after, 0.0), product, between)


@jit
def _gates(alpha, theta, left, EMA: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr = BC):
    """The `_BlockGates` of a block."""
    a = _decays(alpha, left, C)
    th, in_m, start_in_m, weight = a, a.between, a.now, a.now
    reads = _Reads(a.before, a.before, a.between, a.between)
    end = _End(a.all, a.all, a.all, a.after, a.after, a.after)
    if theta is not None:
        th = _decays(theta, left, C)
        weight = 1.0 - th.now if EMA else tl.full((C,), 1.0, tl.float32)
        start_in_m = th.now * th.before
        in_m = tl.where(_diagonal(C), 1.0, th.now[None, :] * th.between) * weight[:, None]
        start_seen = tl.sum(start_in_m[:, None] * a.between, 0)
        reads = _Reads(a.before, start_seen, a.between, _dot(in_m, a.between, PRECISION))
        gain = tl.sum(in_m * a.after[None, :], 1)
        end = _End(a.all, tl.sum(a.after * start_in_m), th.all, a.after, gain, th.after * weight)
    return _BlockGates(a, th, reads, end, in_m, start_in_m, weight)


@jit
def _reads_of_queries(g, theta, INCLUSIVE: tl.constexpr):
    """The `_Reads` of queries: `INCLUSIVE` ones see alpha_t times what there was before the write at t, and it."""
    reads = g.reads
    if INCLUSIVE:
        now, seen = g.alpha.now, g.reads
        between = now[None, :] * seen.between + tl.where(_diagonal(), 1.0, 0.0)
        gain = between if theta is None else now[None, :] * seen.gain + g.in_m
        reads = _Reads(now * seen.before, now * seen.gain_m + g.start_in_m, between, gain)
    return reads


@jit
def _put_gates(work, alpha, theta, left, EMA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr):
    """What `_block` needs of `_gates`, into memory: made once for a block of tokens and kept out of registers.

    Squares: between and gain of reads at x, and from 2 on of queries, where INCLUSIVE makes them something else.
    Lines: before and gain_m of both alike; after, gain and keep of the end; its three scalars.
    """
    g, t = _gates(alpha, theta, left, EMA, PRECISION), tl.arange(0, BC)
    _put_reads(work, 0, g.reads)
    if INCLUSIVE:
        _put_reads(work, 2, _reads_of_queries(g, theta, INCLUSIVE))
    tl.store(_line(work, 4), g.end.after)
    tl.store(_line(work, 5), g.end.gain)
    tl.store(_line(work, 6), g.end.keep)
    tl.store(_line(work, 7), tl.where(t == 0, g.end.all, tl.where(t == 1, g.end.gain_m, g.end.keep_m)))
    tl.debug_barrier()


@jit
def _put_reads(work, k, reads):
    tl.store(_square(work, k), reads.between)
    tl.store(_square(work, k + 1), reads.gain)
    tl.store(_line(work, k), reads.before)
    tl.store(_line(work, k + 1), reads.gain_m)


@jit
def _inverse(A):
    """(1 + A)^-1 for A (BC, BC) strictly upper triangular, by substitution, a token after the other."""
    s, t = tl.arange(0, BC)[:, None], tl.arange(0, BC)[None, :]
    T, A_T = tl.where(s == t, 1.0, 0.0), tl.trans(A)
    for token in tl.range(1, BC, disable_licm=True):
        row = tl.sum(tl.where(s == token, A_T, 0.0), 0)
        T = tl.where(t == token, T - tl.sum(T * row[None, :], 1)[:, None], T)
    return T


@jit
def _write(M, m, x, step, d, p, end, o, left, O, PRECISION: tl.constexpr):
    """A block of writes to rows o of memory M and momentum m, in place, tile by tile."""
    writes = end.gain[None, :] * d
    if p is not None:
        writes += end.after[None, :] * p
    for i0 in tl.range(0, x.size, BI, disable_licm=True):
        i = i0 + tl.arange(0, BI)
        xe = tl.trans(_tokens(x, i, left) * step[None, :])
        w = end.all * _matrix(M, o, i, O, x.size) - _dot(writes, xe, PRECISION)
        if m is not None:
            w_m = _matrix(m, o, i, O, x.size)
            w += end.gain_m * w_m
            w_m = end.keep_m * w_m - _dot(end.keep[None, :] * d, xe, PRECISION)
        tl.debug_barrier()
        _store_matrix(M, w, o, i, O, x.size)
        if m is not None:
            _store_matrix(m, w_m, o, i, O, x.size)


@jit
def _move(to, W, S, first, size):
    """Numbers of W, from the first one on, to the same place in `to`, plus those of S if there is one; 0 without W."""
    at = tl.arange(0, 1024)
    for i in tl.range(0, size, 1024):
        w, there = tl.zeros((1024,), tl.float32), i + at < size
        if W is not None:
            w += tl.load(W + first + i + at, mask=there).to(tl.float32)
        if S is not None:
            w += tl.load(S + first + i + at, mask=there).to(tl.float32)
        tl.store(to + first + i + at, w, mask=there)


@jit
def _reader(n, memories, readers):
    """Whether memory n is read, 0 or 1 (the last `readers` of every `memories` are), and its place among them."""
    j = n % memories - (memories - readers)
    return (j >= 0).to(tl.int32), n // memories * readers + tl.maximum(j, 0)


@jit
def _block(
    M, m, x, d, q, read, step, work, o, left, to_p,
    DELTA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of tokens for rows o of one memory, with the gates that `_put_gates` left in `work`. With Y = M X^T and
    S = (step X) X^T,  p = (before Y - d (gain S)) (1 + between S)^-1;  a read r, the same at q, less p (between S).

    Writes M and m in place, p to the stream to_p if there is one; returns r (BO, BC), zeros unless `read`.
    """
    O, I = d.size, x.size
    zero, no_scores = tl.zeros((o.shape[0], BC), tl.float32), tl.zeros((BC, BC), tl.float32)
    r, p = zero, None
    if DELTA:
        y, y_m, S = zero, zero, no_scores
        for i0 in tl.range(0, I, BI, disable_licm=True):
            i = i0 + tl.arange(0, BI)
            z = _tokens(x, i, left)
            S += _dot(tl.trans(z * step[None, :]), z, PRECISION)
            y += _dot(_matrix(M, o, i, O, I), z, PRECISION)
            if m is not None:
                y_m += _dot(_matrix(m, o, i, O, I), z, PRECISION)
        tl.debug_barrier()
        inverse = _inverse(tl.load(_square(work, 0)) * S)
        gain = tl.load(_square(work, 1))
        p = tl.load(_line(work, 0))[None, :] * y - _dot(_tokens(d, o, left), gain * S, PRECISION)
        if m is not None:
            p += tl.load(_line(work, 1))[None, :] * y_m
        p = _dot(p, inverse, PRECISION)
        if to_p is not None:
            _store_tokens(to_p, p, o, left)
        tl.debug_barrier()
    if q is not None and read:
        k: tl.constexpr = 2 if INCLUSIVE else 0  # the first of the reads' squares and lines
        r_m, S = zero, no_scores
        for i0 in tl.range(0, I, BI, disable_licm=True):
            i = i0 + tl.arange(0, BI)
            z = _tokens(q, i, left)
            S += _dot(tl.trans(_tokens(x, i, left) * step[None, :]), z, PRECISION)
            r += _dot(_matrix(M, o, i, O, I), z, PRECISION)
            if m is not None:
                r_m += _dot(_matrix(m, o, i, O, I), z, PRECISION)
        tl.debug_barrier()
        gain = tl.load(_square(work, k + 1))
        r = tl.load(_line(work, k))[None, :] * r - _dot(_tokens(d, o, left), gain * S, PRECISION)
        if m is not None:
            r += tl.load(_line(work, k + 1))[None, :] * r_m
        if DELTA:
            r -= _dot(p, tl.load(_square(work, k)) * S, PRECISION)
        tl.debug_barrier()
    scalars = work + 7 * BC
    end = _End(
        tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2),
        tl.load(_line(work, 4)), tl.load(_line(work, 5)), tl.load(_line(work, 6)),
    )  # fmt: skip
    _write(M, m, x, step, _tokens(d, o, left), p, end, o, left, O, PRECISION)
    return r


@jit
def _chunk_forward(
    M, m, X, D, Q, eta, alpha, theta, at, M_end, m_end, R, P, states, work, c, memories, readers,
    x_row, d_row, q_row, O, I,
    BO: tl.constexpr, EMA: tl.constexpr, DELTA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dgd_chunk`: block of tokens by block, what `_block` says. Grid (memories in all, blocks of rows); at: (n, 8),
    where each one's part of the eight inputs begins. A backward pass runs it again, to have P and
    states (n, blocks, 2, O, I), those that blocks of tokens start from."""
    n = tl.program_id(0).to(tl.int64)
    read, n_read = _reader(n, memories, readers)
    at += n * 8
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    first, size = tl.program_id(1) * BO * I, min(BO, O - tl.program_id(1) * BO) * I  # the numbers of these rows
    X, D, eta = X + tl.load(at + 2), D + tl.load(at + 3), eta + tl.load(at + 5)
    M_end += n * O * I
    _move(M_end, M + tl.load(at), None, first, size)
    if theta is not None:
        m_end += n * O * I
        _move(m_end, m if m is None else m + tl.load(at + 1), None, first, size)
    if Q is not None:
        Q += tl.load(at + 4)
    work += (n * tl.num_programs(1) + tl.program_id(1)) * FORWARD_WORK
    for s in tl.range(0, c, BC, disable_licm=True):
        tl.debug_barrier()
        if states is not None:
            state = states + (n * tl.cdiv(c, BC) + s // BC) * (2 * O * I)
            _move(state, M_end, None, first, size)
            if theta is not None:
                _move(state + O * I, m_end, None, first, size)
        left = min(BC, c - s)
        th = None if theta is None else theta + tl.load(at + 7) + s
        _put_gates(work, alpha + tl.load(at + 6) + s, th, left, EMA, INCLUSIVE, PRECISION)
        q = None if Q is None else _Stream(Q + s * q_row, q_row, I)
        p = None if P is None else _Stream(P + (n * c + s) * O, O, O)
        x, d = _Stream(X + s * x_row, x_row, I), _Stream(D + s * d_row, d_row, O)
        step = _steps(eta + s, left)
        r = _block(M_end, m_end, x, d, q, read, step, work, o, left, p, DELTA, INCLUSIVE, PRECISION)
        if Q is not None:
            _store_tokens(_Stream(R + (n_read * c + s) * O, O, O), r, o, left * read)


@jit
def _decays_backward(g, d_before, d_after, d_all, d_between, PRECISION: tl.constexpr):
    """Gradient of gates (BC,) from those of their products: a product without one factor is a product of two others, so
    that nothing is divided by a gate, which may be 0."""
    d = tl.sum(_dot(tl.trans(g.between), d_between, PRECISION) * g.between, 1)
    d += g.before * tl.sum(g.between * d_before[None, :], 1)
    return d + g.after * (tl.sum(g.between * d_after[:, None], 0) + d_all * g.before)


@jit
def _start_gradient(w, w_m, at, dy, reads, o, i, left, PRECISION: tl.constexpr):
    """Tiles w, w_m of the gradients of a block's start, with what reads at the tokens `at` with gradient dy add."""
    x, y = tl.trans(_tokens(at, i, left)), _tokens(dy, o, left)
    w += _dot(reads.before[None, :] * y, x, PRECISION)
    w_m += _dot(reads.gain_m[None, :] * y, x, PRECISION)  # of no use without momentum, and then left out
    return w, w_m


@jit
def _chunk_backward(
    X, D, Q, eta, alpha, theta, at, P, dR, dM, dm, ends, dD, dZ, work, c, memories, readers, x_row, d_row, q_row, O, I,
    BO: tl.constexpr, EMA: tl.constexpr, DELTA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of the backward pass that goes from token to token: dM, dm, dD, and dZ (n, c, O), the gradient of what
    the solve turns into P. On the grid of `_chunk_forward`, block of tokens by block from the last one on. In the
    letters of `_block`, with _q for what queries see, _end for the block's end, U = dM (step X)^T and U_m that of dm:

        dz = -(after U + dR (between_q S_q)^T) (1 + between S)^-T
        dd = -gain_end U - keep U_m - dR (gain_q S_q)^T - dz (gain S)^T
        dM = all dM + (before dz) X + (before_q dR) Q
        dm = keep_m dm + gain_m_end dM + (gain_m dz) X + (gain_m_q dR) Q

    dM and dm come as the gradients of the chunk's end and leave as those of its start. Kept for
    `_chunk_backward_tokens`: ends (n, blocks, 2, O, I), gradients of the blocks' ends, and what gates need, in `work`.
    """
    n = tl.program_id(0).to(tl.int64)
    read, n_read = _reader(n, memories, readers)
    at += n * 8
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    X, D, eta, alpha = X + tl.load(at + 2), D + tl.load(at + 3), eta + tl.load(at + 5), alpha + tl.load(at + 6)
    ends += (n + 1) * tl.cdiv(c, BC) * (2 * O * I)
    work += (n * tl.num_programs(1) + tl.program_id(1) + 1) * tl.cdiv(c, BC) * BACKWARD_WORK
    dM += n * O * I
    if theta is not None:
        theta += tl.load(at + 7)
        dm += n * O * I
    if Q is not None:
        Q += tl.load(at + 4)
    for block in tl.range(0, tl.cdiv(c, BC), disable_licm=True):
        s = (tl.cdiv(c, BC) - 1 - block) * BC
        ends -= 2 * O * I
        work -= BACKWARD_WORK
        left = min(BC, c - s)
        x = _Stream(X + s * x_row, x_row, I)
        to_z = None if dZ is None else _Stream(dZ + (n * c + s) * O, O, O)
        q = None if Q is None else _Stream(Q + s * q_row, q_row, I)
        dy = None if Q is None else _Stream(dR + (n_read * c + s) * O, O, O)
        step = _steps(eta + s, left)
        g = _gates(alpha + s, None if theta is None else theta + s, left, EMA, PRECISION)
        u = tl.zeros((BO, BC), tl.float32)
        u_m, S, S_q = u, tl.zeros((BC, BC), tl.float32), tl.zeros((BC, BC), tl.float32)
        for i0 in tl.range(0, I, BI, disable_licm=True):
            i = i0 + tl.arange(0, BI)
            xe = _tokens(x, i, left) * step[None, :]
            u += _dot(_matrix(dM, o, i, O, I), xe, PRECISION)
            if theta is not None:
                u_m += _dot(_matrix(dm, o, i, O, I), xe, PRECISION)
            if DELTA:
                S += _dot(tl.trans(xe), _tokens(x, i, left), PRECISION)
            if Q is not None and read:
                S_q += _dot(tl.trans(xe), _tokens(q, i, left), PRECISION)
        d = _tokens(_Stream(D + s * d_row, d_row, O), o, left)
        dd = -g.end.gain[None, :] * u
        tl.store(_line(work, 0), -tl.sum(d * u, 0))
        if DELTA:
            dz = -g.end.after[None, :] * u
            p = _tokens(_Stream(P + (n * c + s) * O, O, O), o, left)
            tl.store(_line(work, 1), -tl.sum(p * u, 0))
        if theta is not None:
            dd -= g.end.keep[None, :] * u_m
            tl.store(_line(work, 2), -tl.sum(d * u_m, 0))
        reads_q = _reads_of_queries(g, theta, INCLUSIVE)
        if Q is not None and read:
            dr = _tokens(dy, o, left)
            dd -= _dot(dr, tl.trans(reads_q.gain * S_q), PRECISION)
            if DELTA:
                dz -= _dot(dr, tl.trans(reads_q.between * S_q), PRECISION)
        if DELTA:
            dz = _dot(dz, tl.trans(_inverse(g.reads.between * S)), PRECISION)
            dd -= _dot(dz, tl.trans(g.reads.gain * S), PRECISION)
            _store_tokens(to_z, dz, o, left)
        _store_tokens(_Stream(dD + (n * c + s) * O, O, O), dd, o, left)
        tl.debug_barrier()
        for i0 in tl.range(0, I, BI, disable_licm=True):
            i = i0 + tl.arange(0, BI)
            end = _matrix(dM, o, i, O, I)
            _store_matrix(ends, end, o, i, O, I)
            w = g.end.all * end
            w_m = w
            if theta is not None:
                end_m = _matrix(dm, o, i, O, I)
                _store_matrix(ends + O * I, end_m, o, i, O, I)
                w_m = g.end.gain_m * end + g.end.keep_m * end_m
            if DELTA:
                w, w_m = _start_gradient(w, w_m, x, to_z, g.reads, o, i, left, PRECISION)
            if Q is not None and read:
                w, w_m = _start_gradient(w, w_m, q, dy, reads_q, o, i, left, PRECISION)
            tl.debug_barrier()
            _store_matrix(dM, w, o, i, O, I)
            if theta is not None:
                _store_matrix(dm, w_m, o, i, O, I)
        tl.debug_barrier()


@jit
def _chunk_backward_tokens(
    X, D, Q, eta, alpha, theta, at, P, dR, states, ends, dZ, work, dX, dQ, d_eta, c, memories, readers,
    x_row, d_row, q_row, O, I,
    BO: tl.constexpr, EMA: tl.constexpr, DELTA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX, dQ and d_eta, for all blocks of tokens at once: the grid has them as its last axis. With the states M, m that
    a block starts from and the gradients E, E_m of its end:

        dS = -gain (D^T dz) - between (P^T dz), and dS_q the same with dR              `_backward_scores`
        dQ = (M^T dR) before_q + (m^T dR) gain_m_q + (step X) dS_q                     `_backward_queries`
        dX = (M^T dz) before + (m^T dz) gain_m + (step X) dS + step d(step X)          `_backward_inputs`
        d(step X) = X dS^T + Q dS_q^T - E^T (gain_end D + after P) - E_m^T (keep D)

    What all rows share comes in parts, one for each block of rows: dX, dQ (blocks of rows, n, c, I), d_eta (.., n, c)
    and work (n, blocks of rows, blocks, BACKWARD_WORK). Its squares: the gradients, without their sign, of the scores
    of q and x; those of `between`, of `gain` and of what `gain` has at t itself. Its lines: the gradients of gain,
    after and keep of the end, of the gate, of before and then gain_m as x and as q see them, of the end's scalars.
    """
    n = tl.program_id(0).to(tl.int64)
    read, n_read = _reader(n, memories, readers)
    s = tl.program_id(2) * BC
    part = (tl.program_id(1) * tl.num_programs(0) + n) * c + s
    at += n * 8
    state = (n * tl.num_programs(2) + tl.program_id(2)) * (2 * O * I)
    states, ends = states + state, ends + state
    work += ((n * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)) * BACKWARD_WORK
    x, d = _Stream(X + tl.load(at + 2) + s * x_row, x_row, I), _Stream(D + tl.load(at + 3) + s * d_row, d_row, O)
    p, dz, q, dr, to_q, m, end_m, th = None, None, None, None, None, None, None, None
    if DELTA:
        p, dz = _Stream(P + (n * c + s) * O, O, O), _Stream(dZ + (n * c + s) * O, O, O)
    if Q is not None:
        q, dr = _Stream(Q + tl.load(at + 4) + s * q_row, q_row, I), _Stream(dR + (n_read * c + s) * O, O, O)
        n_reads = tl.num_programs(0) // memories * readers
        to_q = _Stream(dQ + ((tl.program_id(1) * n_reads + n_read) * c + s) * I, I, I)
    if theta is not None:
        m, end_m, th = states + O * I, ends + O * I, theta + tl.load(at + 7) + s
    left, o = min(BC, c - s), tl.program_id(1) * BO + tl.arange(0, BO)
    step = _steps(eta + tl.load(at + 5) + s, left)
    b = _Saved(x, d, p, dz, q, dr, read, step, states, m, ends, end_m, work, left, o)
    alpha += tl.load(at + 6) + s
    _backward_scores(b, alpha, th, EMA, INCLUSIVE, PRECISION)
    _backward_scalars(b)
    tl.debug_barrier()
    g = _gates(alpha, th, left, EMA, PRECISION)  # once more: kept, they would take registers
    _backward_queries(b, to_q, _reads_of_queries(g, th, INCLUSIVE), PRECISION)
    d_step = _backward_inputs(b, _Stream(dX + part * I, I, I), g, PRECISION)
    t = tl.arange(0, BC)
    tl.store(d_eta + part + t, d_step, mask=t < left)


@jit
def _backward_scores(b, alpha, theta, EMA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr):
    """The squares of a block's work, and the gate's line."""
    g = _gates(alpha, theta, b.left, EMA, PRECISION)
    d_now, d_between = tl.zeros((BC,), tl.float32), tl.zeros((BC, BC), tl.float32)
    d_gain = d_between
    if INCLUSIVE:
        tl.store(_square(b.work, 4), d_gain)
    if b.q is not None and b.read:
        minus_dS, d_between, d_gain = _score_gradients(b, b.q, b.dr, _reads_of_queries(g, theta, INCLUSIVE), PRECISION)
        tl.store(_square(b.work, 0), minus_dS)
        if INCLUSIVE:
            d_now += tl.sum(d_gain * g.reads.gain + d_between * g.reads.between, 0)
            tl.store(_square(b.work, 4), d_gain)
            d_gain, d_between = g.alpha.now[None, :] * d_gain, g.alpha.now[None, :] * d_between
    if b.p is not None:
        minus_dS, more_between, more_gain = _score_gradients(b, b.x, b.dz, g.reads, PRECISION)
        tl.store(_square(b.work, 1), minus_dS)
        d_between, d_gain = d_between + more_between, d_gain + more_gain
    tl.store(_square(b.work, 2), d_between)
    tl.store(_square(b.work, 3), d_gain)
    tl.store(_line(b.work, 3), d_now)


@jit
def _score_gradients(b, at, dy, reads, PRECISION: tl.constexpr):
    """Of reads at the tokens `at` with gradient dy: that of their scores S without its sign, of between, of gain."""
    S = tl.zeros((BC, BC), tl.float32)
    for i0 in tl.range(0, b.x.size, BI, disable_licm=True):
        i = i0 + tl.arange(0, BI)
        S += _dot(tl.trans(_tokens(b.x, i, b.left) * b.step[None, :]), _tokens(at, i, b.left), PRECISION)
    tl.debug_barrier()
    of_d = _dot(tl.trans(_tokens(b.d, b.o, b.left)), _tokens(dy, b.o, b.left), PRECISION)
    minus_dS, d_gain, d_between = reads.gain * of_d, -S * of_d, tl.zeros((BC, BC), tl.float32)
    if b.p is not None:
        tl.debug_barrier()
        of_p = _dot(tl.trans(_tokens(b.p, b.o, b.left)), _tokens(dy, b.o, b.left), PRECISION)
        minus_dS += reads.between * of_p
        d_between = -S * of_p
    tl.debug_barrier()
    return minus_dS, d_between, d_gain


@jit
def _read_backward(b, at, dy, reads, i, PRECISION: tl.constexpr):
    """Of reads at the tokens `at` with gradient dy, by way of the start: numbers i of the gradient of `at`, and what
    they give to those of before and gain_m."""
    y = _dot(tl.trans(_matrix(b.M, b.o, i, dy.size, at.size)), _tokens(dy, b.o, b.left), PRECISION)
    d_at, d_before = reads.before[None, :] * y, tl.sum(_tokens(at, i, b.left) * y, 0)
    d_gain_m = tl.zeros((BC,), tl.float32)
    tl.debug_barrier()
    if b.m is not None:
        y = _dot(tl.trans(_matrix(b.m, b.o, i, dy.size, at.size)), _tokens(dy, b.o, b.left), PRECISION)
        d_at += reads.gain_m[None, :] * y
        d_gain_m = tl.sum(_tokens(at, i, b.left) * y, 0)
        tl.debug_barrier()
    return d_at, d_before, d_gain_m


@jit
def _backward_scalars(b):
    """The gradients of the end's scalars."""
    O, I, t = b.d.size, b.x.size, tl.arange(0, BC)
    scalars = tl.zeros((BC,), tl.float32)
    for i0 in tl.range(0, I, BI, disable_licm=True):
        i = i0 + tl.arange(0, BI)
        end = _matrix(b.end, b.o, i, O, I)
        scalars += tl.where(t == 0, tl.sum(_matrix(b.M, b.o, i, O, I) * end), 0.0)
        if b.m is not None:
            m = _matrix(b.m, b.o, i, O, I)
            d_keep_m = tl.sum(m * _matrix(b.end_m, b.o, i, O, I))
            scalars += tl.where(t == 1, tl.sum(m * end), tl.where(t == 2, d_keep_m, 0.0))
    tl.store(_line(b.work, 8), scalars)


@jit
def _backward_queries(b, to_q, reads, PRECISION: tl.constexpr):
    """dQ, and what queries give to the gradients of before and gain_m."""
    d_before, d_gain_m = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if b.q is not None and b.read:
        for i0 in tl.range(0, b.x.size, BI, disable_licm=True):
            i = i0 + tl.arange(0, BI)
            dq, more, more_m = _read_backward(b, b.q, b.dr, reads, i, PRECISION)
            d_before, d_gain_m = d_before + more, d_gain_m + more_m
            dq -= _dot(_tokens(b.x, i, b.left) * b.step[None, :], tl.load(_square(b.work, 0)), PRECISION)
            _store_tokens(to_q, dq, i, b.left)
    tl.store(_line(b.work, 5), d_before)
    tl.store(_line(b.work, 7), d_gain_m)


@jit
def _backward_inputs(b, to_x, g, PRECISION: tl.constexpr):
    """dX, the gradient of the steps, which is returned, and those of before and gain_m as x sees them."""
    O, I = b.d.size, b.x.size
    d_before, d_gain_m, d_step = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for i0 in tl.range(0, I, BI, disable_licm=True):
        i = i0 + tl.arange(0, BI)
        dx, dxe = tl.zeros((BI, BC), tl.float32), tl.zeros((BI, BC), tl.float32)
        writes = g.end.gain[None, :] * _tokens(b.d, b.o, b.left)
        if b.p is not None:
            dx, more, more_m = _read_backward(b, b.x, b.dz, g.reads, i, PRECISION)
            d_before, d_gain_m = d_before + more, d_gain_m + more_m
            x, minus_dS = _tokens(b.x, i, b.left), tl.load(_square(b.work, 1))
            dx -= _dot(x * b.step[None, :], minus_dS, PRECISION)
            dxe -= _dot(x, tl.trans(minus_dS), PRECISION)
            tl.debug_barrier()
            writes += g.end.after[None, :] * _tokens(b.p, b.o, b.left)
        dxe -= _dot(tl.trans(_matrix(b.end, b.o, i, O, I)), writes, PRECISION)
        tl.debug_barrier()
        if b.m is not None:
            writes = g.end.keep[None, :] * _tokens(b.d, b.o, b.left)
            dxe -= _dot(tl.trans(_matrix(b.end_m, b.o, i, O, I)), writes, PRECISION)
            tl.debug_barrier()
        if b.q is not None and b.read:
            dxe -= _dot(_tokens(b.q, i, b.left), tl.trans(tl.load(_square(b.work, 0))), PRECISION)
        d_step += tl.sum(dxe * _tokens(b.x, i, b.left), 0)
        _store_tokens(to_x, dx + dxe * b.step[None, :], i, b.left)
        tl.debug_barrier()
    tl.store(_line(b.work, 4), d_before)
    tl.store(_line(b.work, 6), d_gain_m)
    return d_step


@jit
def _gates_backward(g, theta, d, d_in_m, d_start_in_m, EMA: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of alpha and theta (BC,), the second None without momentum, from the `_GateGradients` of a block and
    those that reach in_m and start_in_m in another way."""
    a, th, between, d_between, d_after, d_theta = g.alpha, g.theta, g.alpha.between, d.between, d.after, None
    if theta is None:
        d_between += d.gain
        d_after += d.gain_end
    else:
        d_in_m += d.gain_end[:, None] * a.after[None, :] + _dot(d.gain, tl.trans(between), PRECISION)
        d_start_in_m += d.gain_m_end * a.after + tl.sum(between * d.gain_m[None, :], 1)
        d_between += _dot(tl.trans(g.in_m), d.gain, PRECISION) + g.start_in_m[:, None] * d.gain_m[None, :]
        d_after += tl.sum(g.in_m * d.gain_end[:, None], 0) + d.gain_m_end * g.start_in_m
        d_theta = tl.sum(d_in_m * g.weight[:, None] * th.between, 0) + d_start_in_m * th.before
        if EMA:
            unweighted = tl.where(_diagonal(th.now.shape[0]), 1.0, th.now[None, :] * th.between)
            d_theta -= tl.sum(d_in_m * unweighted, 1) + d.keep * th.after
        d_th_between = th.now[None, :] * d_in_m * g.weight[:, None]
        d_theta += _decays_backward(th, th.now * d_start_in_m, d.keep * g.weight, d.keep_m, d_th_between, PRECISION)
    return _decays_backward(a, d.before, d_after, d.all, d_between, PRECISION), d_theta


@jit
def _chunk_backward_gates(
    alpha, theta, at, work, d_alpha, d_theta, c,
    EMA: tl.constexpr, DELTA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_alpha, d_theta (n, c) from the gradients in `work`, of products of gates. Grid (n, blocks of tokens)."""
    n = tl.program_id(0).to(tl.int64)
    s, t = tl.program_id(1) * BC, tl.arange(0, BC)
    left = min(BC, c - s)
    alpha += tl.load(at + n * 8 + 6) + s
    if theta is not None:
        theta += tl.load(at + n * 8 + 7) + s
    work += (n * tl.num_programs(1) + tl.program_id(1)) * BACKWARD_WORK
    d_between, d_gain = tl.load(_square(work, 2)), tl.load(_square(work, 3))
    d_gain_end, d_now = tl.load(_line(work, 0)), tl.load(_line(work, 3))
    d_before, d_before_q = tl.load(_line(work, 4)), tl.load(_line(work, 5))
    d_gain_m, d_gain_m_q = tl.load(_line(work, 6)), tl.load(_line(work, 7))
    d_after = tl.load(_line(work, 1)) if DELTA else tl.zeros((BC,), tl.float32)
    scalars = tl.load(_line(work, 8))
    d_all = tl.sum(tl.where(t == 0, scalars, 0.0))
    d_gain_m_end, d_keep_m = tl.sum(tl.where(t == 1, scalars, 0.0)), tl.sum(tl.where(t == 2, scalars, 0.0))
    d_keep = d_after if theta is None else tl.load(_line(work, 2))
    g = _gates(alpha, theta, left, EMA, PRECISION)
    a, d_start, d_in_m = g.alpha, tl.zeros((BC,), tl.float32), tl.zeros((BC, BC), tl.float32)
    if INCLUSIVE:
        d_now += d_before_q * a.before + d_gain_m_q * g.reads.gain_m
        d_start += d_gain_m_q
        d_before_q, d_gain_m_q = a.now * d_before_q, a.now * d_gain_m_q
        if theta is not None:
            d_in_m += tl.load(_square(work, 4))
    d_before, d_gain_m = d_before + d_before_q, d_gain_m + d_gain_m_q
    d = _GateGradients(
        d_between, d_gain, d_before, d_gain_m, d_after, d_gain_end, d_keep, d_all, d_gain_m_end, d_keep_m
    )
    d_a, d_theta_now = _gates_backward(g, theta, d, d_in_m, d_start, EMA, PRECISION)
    if theta is not None:
        tl.store(d_theta + n * c + s + t, d_theta_now, mask=t < left)
    tl.store(d_alpha + n * c + s + t, d_now + d_a, mask=t < left)


def _tiles(o: int, i: int, BO: int) -> dict:
    """Sizes of the chunk kernels' tiles. A warp has 16 rows of a memory; with more, registers run out."""
    return dict(O=o, I=i, BO=BO, num_warps=BO // 16, num_stages=1)


@lru_cache(maxsize=512)
def _begins(lead: tuple, layouts: tuple, device: torch.device) -> Tensor:
    """(n, k) int64: where the part of each of n = prod(lead) memories begins in k tensors of these (shape, stride).

    A tensor that has fewer along the last dimension belongs to the last ones.
    """
    columns = []
    for layout in layouts:
        at = torch.zeros((), dtype=torch.int64, device=device)
        for size, stride in zip(*layout):
            at = at.unsqueeze(-1) + stride * torch.arange(size, device=device)
        if at.ndim and at.shape[-1] not in (1, lead[-1]):
            at = F.pad(at, (lead[-1] - at.shape[-1], 0))
        columns.append(at.expand(lead).reshape(-1))
    return torch.stack(columns, -1).contiguous()


class _TritonChunk(torch.autograd.Function):
    """`dgd_chunk` by the kernels: one launch forward, four backward; only the inputs are stored."""

    @staticmethod
    def forward(ctx, rule, *inputs):
        (o, i), c = inputs[0].shape[-2:], inputs[2].shape[-2]
        packed = lambda z, k: z.stride(-1) == 1 and (k > 1 or z.stride(-2) == z.shape[-1])
        inputs = tuple(None if z is None else z if packed(z, k) else z.contiguous() for k, z in enumerate(inputs))
        M, m, X, D, Q, eta, alpha, theta = inputs
        own = 2, 2, 2, 2, 2, 1, 1, 1  # dimensions of each that are not leading ones
        layouts = tuple(((), ()) if z is None else (tuple(z.shape[:-k]), z.stride()[:-k]) for z, k in zip(inputs, own))
        lead = torch.broadcast_shapes(*(a for z, (a, _) in zip(inputs, layouts) if rule.readers is None or z is not Q))
        new = lambda *shape: torch.empty(*shape, dtype=torch.float32, device=X.device)
        M_end, m_end = new(*lead, o, i), None if theta is None else new(*lead, o, i)
        of_reads = lead if rule.readers is None else (*lead[:-1], rule.readers)
        R = None if Q is None else new(*of_reads, c, o)
        ctx.flags = dict(EMA=rule.ema, DELTA=rule.delta, INCLUSIVE=rule.inclusive, PRECISION=precision(X.device))
        ctx.sizes = dict(
            memories=1 if rule.readers is None else lead[-1], readers=rule.readers or 1,
            x_row=X.stride(-2), d_row=D.stride(-2), q_row=0 if Q is None else Q.stride(-2), **ctx.flags,
        )  # fmt: skip
        at, tiles = _begins(tuple(lead), layouts, X.device), _tiles(o, i, 32 if o > 16 else 16)
        grid = len(at), -(-o // tiles["BO"])
        work = new(*grid, FORWARD_WORK.value)
        with on_device(X.device):
            _chunk_forward[grid](*inputs, at, M_end, m_end, R, None, None, work, c, **ctx.sizes, **tiles)
        ctx.save_for_backward(*inputs, at)
        ctx.rule, ctx.lead = rule, lead
        ctx.set_materialize_grads(False)
        return M_end, m_end, R

    @staticmethod
    def backward(ctx, dM, dm, dR):
        *inputs, at = ctx.saved_tensors
        M, m, X, D, Q, eta, alpha, theta = inputs
        if torch.is_grad_enabled():  # a second derivative is wanted: the reference's backward pass has one
            return None, *_derivatives(partial(_reference, rule=ctx.rule), inputs, (dM, dm, dR))
        lead, (o, i), c = ctx.lead, M.shape[-2:], X.shape[-2]
        tiles = _tiles(o, i, 16)
        row_blocks, blocks = -(-o // tiles["BO"]), -(-c // BC.value)
        grid = len(at), row_blocks
        new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=X.device)
        of_end = lambda g: new(*lead, o, i).zero_() if g is None else g.clone(memory_format=torch.contiguous_format)
        dM, dm = of_end(dM), None if theta is None else of_end(dm)
        dR, Q = (None, None) if dR is None else (dR.contiguous(), Q)
        dX, d_eta = new(row_blocks, *lead, c, i), new(row_blocks, *lead, c)
        dQ = None if Q is None else new(row_blocks, *dR.shape[:-1], i)
        d_alpha, d_theta = new(*lead, c), None if theta is None else new(*lead, c)
        M_end, m_end = torch.empty_like(dM), None if theta is None else torch.empty_like(dm)
        dD, (P, dZ) = new(*lead, c, o), new(2, len(at), c, o) if ctx.rule.delta else (None, None)
        states, ends = new(len(at), blocks, 2, o, i), new(len(at), blocks, 2, o, i)
        work = new(*grid, blocks, BACKWARD_WORK.value)
        shared, sizes = (X, D, Q, eta, alpha, theta, at, P, dR), dict(**ctx.sizes, **tiles)
        with on_device(X.device):
            again = M, m, X, D, None, eta, alpha, theta, at, M_end, m_end, None, P, states, work
            _chunk_forward[grid](*again, c, **sizes)
            _chunk_backward[grid](*shared, dM, dm, ends, dD, dZ, work, c, **sizes)
            _chunk_backward_tokens[*grid, blocks](*shared, states, ends, dZ, work, dX, dQ, d_eta, c, **sizes)
            gates = alpha, theta, at, work.sum(1), d_alpha, d_theta
            _chunk_backward_gates[len(at), blocks](*gates, c, **ctx.flags, num_warps=1)
        dX, dQ, d_eta = (None if z is None else z.sum(0) for z in (dX, dQ, d_eta))
        grads = dM, dm, dX, dD, dQ, d_eta, d_alpha, d_theta
        fold = lambda g, z: None if z is None or g is None else g.sum_to_size(z.shape).to(z.dtype)
        return None, *(fold(g, z) for g, z in zip(grads, inputs))


# ----------------------------------------------------------------------------------------------------------------------
# Newton-Schulz in Triton: of its three products two are symmetric, and half of such a product is enough.


@jit
def _symmetric_product(
    X, C, Y, M, K, beta, alpha, HAS_C: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """Y = beta C + alpha X X^T for X (n, M, K), Y, C (n, M, M), symmetric. Grid (tiles from the diagonal down, n)."""
    p, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # Rows of tiles above this one hold row (row + 1) / 2 tiles; the root may be off by one.
    row = ((tl.sqrt(8.0 * p + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > p, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= p, row + 1, row)
    i, j = row * B + tl.arange(0, B), (p - row * (row + 1) // 2) * B + tl.arange(0, B)
    k, X = tl.arange(0, BK), X + n * M * K
    y = tl.zeros((B, B), tl.float32)
    for k0 in range(0, K, BK):
        a = tl.load(X + i[:, None] * K + k0 + k[None, :], mask=(i < M)[:, None] & (k0 + k < K)[None, :], other=0.0)
        b = tl.load(X + j[:, None] * K + k0 + k[None, :], mask=(j < M)[:, None] & (k0 + k < K)[None, :], other=0.0)
        y += tl.dot(a, tl.trans(b)) if PRECISION == "half" else _dot(a, tl.trans(b), PRECISION)
    y *= alpha
    here = (i < M)[:, None] & (j < M)[None, :]
    at = n * M * M + i[:, None] * M + j[None, :]
    if HAS_C:
        y += beta * tl.load(C + at, mask=here, other=0.0).to(tl.float32)
    tl.store(Y + at, y, mask=here)
    tl.store(Y + n * M * M + i[:, None] + j[None, :] * M, y, mask=here & (j[None, :] < row * B))  # off the diagonal


def _symmetric(X: Tensor, C: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """beta C + alpha X X^T for X (n, m, k) and a symmetric C (n, m, m), in X's dtype, accumulated in float32."""
    X = X.contiguous()
    n, m, k = X.shape
    Y = torch.empty(n, m, m, dtype=X.dtype, device=X.device)
    B = 64 if m > 32 else 16
    tiles = -(-m // B)
    products = precision(X.device) if X.dtype == torch.float32 else "half"
    with on_device(X.device):
        _symmetric_product[tiles * (tiles + 1) // 2, n](
            X, X if C is None else C, Y, m, k, beta, alpha, C is not None, B, 32, products,
            num_warps=B // 16, num_stages=3,
        )  # fmt: skip
    return Y
