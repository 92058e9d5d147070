"""The inner loops of Nested Learning, each written first as the plain PyTorch that defines it.

`dgd_chunk` is the recurrence that every parametric memory of `hope.Memory` runs inside a chunk: delta gradient
descent (eq. 88) with retention and momentum, all tokens of the chunk at once and without a loop. `newton_schulz`
orthogonalises the momentum of Muon and M3. On GPUs Triton kernels compute the same (see `uses_triton`), and
`memory_scan` does all chunks of a memory layer in one launch where no gradients are wanted; `hope.Memory` defines that.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # not for this platform: the reference does everything
    triton = tl = None
    jit = lambda fn: fn

# Vectors shorter than this are not brought to length 1 (`hope.unit`), and spreads not to 1 (`hope.layer_norm`): small beside
# the length of a key, about sqrt(head width), and of what a unit vector reads. So what is 0 gets its gradient times 10,
# not times 1e12.
EPS = 0.1


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
    ema: bool = False,
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
        gates: `chunk_gates(alpha, theta, ema)`, for callers who share it between several memories; kernels make their own.
        MX: (..., c, o) X M^T, for callers who have it already.
        readers: how many memories are read, the last ones along the last leading dimension; all if left out.
        ema: a write enters the momentum with weight 1 - theta.

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
    if uses_triton(X) and _suits(M, X, D, eta, alpha, m, theta, Q):
        return _TritonChunk.apply(ema, inclusive, delta, readers, M, m, X, D, Q, eta, alpha, theta)
    return _reference(M, m, X, D, Q, eta, alpha, theta, ema, inclusive, delta, gates, MX, readers)


def _reference(M, m, X, D, Q, eta, alpha, theta, ema, inclusive, delta, gates=None, MX=None, readers=None):
    """`dgd_chunk` in plain PyTorch."""
    c = X.shape[-2]
    with torch.autocast(X.device.type, enabled=False):
        if X.dtype in (torch.bfloat16, torch.float16):
            M, X, D, eta, alpha = (z.float() for z in (M, X, D, eta, alpha))
            m, theta, Q, MX = (None if z is None else z.float() for z in (m, theta, Q, MX))
        gamma, decay, gain, gain_m, keep = chunk_gates(alpha, theta, ema) if gates is None else gates

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


def _by_autograd(fn: Callable, inputs: tuple, grads: tuple) -> list[Tensor | None]:
    """Gradients of fn(*inputs) by its inputs, to be differentiated again; None where there is none.

    Inputs get names of their own: some may have been made of others (at_X of X), and a derivative by one of them must not
    go through another.
    """
    inputs = [None if z is None else z.view_as(z) for z in inputs]
    outs, grads = zip(*((z, g) for z, g in zip(fn(*inputs), grads) if z is not None and g is not None))
    wanted = [z for z in inputs if z is not None and z.requires_grad]
    got = iter(torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(got) if z is not None and z.requires_grad else None for z in inputs]


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
            again = lambda at_X, *inputs: _chunk(None, None, at_X, None, *inputs, *ctx.flags)[:3]
            d_at_X, *rest = _by_autograd(again, (at_X, *inputs), (dM, dm, dR))
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


def dgd_loop(M, X, D, eta, alpha, *, m=None, theta=None, Q=None, inclusive=False, delta=True, ema=False):
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
            kept = theta[..., t, None, None]
            m = kept * m + (write * (1 - kept) if ema else write)
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
    fast = X.dtype != torch.float64 and X.numel() and uses_triton(X)
    for _ in range(steps):
        A = _symmetric(X) if fast else X @ X.mT
        B = _symmetric(A, A, b, c) if fast else torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if G.shape[-2] > G.shape[-1] else X).reshape(G.shape).to(G.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Which of the two runs


CHOICES = "auto", "reference", "triton"


def uses_triton(z: Tensor) -> bool:
    """Whether the Triton kernels run for tensors on z's device, as the environment's HOPE_KERNELS says: "auto" (Triton on
    GPUs), "reference" or "triton". ValueError for anything else, RuntimeError for "triton" where it can't run."""
    choice = os.environ.get("HOPE_KERNELS") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"HOPE_KERNELS is {choice!r}; allowed: {', '.join(CHOICES)}; unset it for auto")
    if choice == "triton" and triton is None:
        raise RuntimeError("HOPE_KERNELS is triton, which is not installed; `pip install triton`, or set it to auto")
    if choice == "triton" and not z.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError(
            f"HOPE_KERNELS is triton, which needs a GPU, but tensors are on {z.device}; move them, or set it to auto"
        )
    if choice == "auto" and triton is not None and z.is_cuda and (0, 0) < _capability(z.device) < (8, 0):
        _fall_back(
            "GPUs before sm_80 have neither TF32 nor bfloat16 products, and kernels spill there; HOPE_KERNELS=triton tries"
        )
        return False
    return triton is not None and (choice == "triton" or choice == "auto" and z.is_cuda)


@contextmanager
def using(choice: str) -> Iterator[None]:
    """For as long as it lasts, HOPE_KERNELS is `choice`, for the whole process: "reference", "triton" or "auto"
    (see `uses_triton`). What it was comes back at the end, also after an error. ValueError for any other choice."""
    if choice not in CHOICES:
        raise ValueError(f"kernels.using({choice!r}): allowed are {', '.join(CHOICES)}")
    before = os.environ.get("HOPE_KERNELS")
    os.environ["HOPE_KERNELS"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["HOPE_KERNELS"]
        else:
            os.environ["HOPE_KERNELS"] = before


@lru_cache(maxsize=None)
def _capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) for AMD's."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


def _precision(device: torch.device) -> str:
    """How the chunk kernels multiply, see `_dot`. `torch.set_float32_matmul_precision("high")` allows plain TF32."""
    if device.type == "cuda" and _capability(device) < (8, 0):  # AMD's multiply float32 as it is
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@lru_cache(maxsize=None)
def _fall_back(why: str) -> None:
    warnings.warn(f"kernels: the plain PyTorch reference runs instead of Triton: {why}", stacklevel=3)


def _suits(*tensors: Tensor | None) -> bool:
    """Whether `dgd_chunk`'s kernels take these M, X, ...; a warning, once, says why not."""
    M, X = tensors[:2]
    wrong = {z.dtype for z in tensors if z is not None} - {torch.float32, torch.bfloat16, torch.float16}
    why = None
    if wrong:
        why = f"no kernel for {', '.join(map(str, wrong))}; use float32 or bfloat16"
    elif max(M.shape[-2:]) > 256:
        why = f"a memory of {M.shape[-2]} x {M.shape[-1]} is wider than 256; use more heads or a smaller `expand`"
    if why:
        _fall_back(why)
    return why is None and X.numel() > 0


def _on(device: torch.device):
    """Kernels are launched on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ----------------------------------------------------------------------------------------------------------------------
# `dgd_chunk` in Triton. The reference solves one c x c system for a chunk; a kernel goes through the chunk in blocks
# of BC tokens: a block's system is BC x BC, solved by forward substitution, and what earlier blocks contribute
# arrives through the memory. Rows of a memory do not depend on each other, so a program has BO of them; one launch
# covers all sequences, heads, memories and blocks of rows. The memory passes through registers in tiles of BI columns
# and rests in the cache; gates become BC x BC products in registers. A block is padded to BC tokens that change
# nothing: eta = 0, x = d = q = 0 and gates 1. Tokens are the last axis of all tiles: x, q (BI, BC), d, p, r (BO, BC),
# scores and gates [s, t] for a write at s and time t. The compiler stacks the warps of chained products along the
# first axis: with tokens there, every warp would hold whole memories. Loops keep what does not change in them where
# it is (`disable_licm`), and barriers separate products: both keep the compiler from holding too much at once, and
# nothing spills.


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
def _tokens(p, row, t, i, c, I):
    """Load a block of tokens in float32, (I, BC); a token is `row` numbers after the one before it; 0 outside."""
    mask = (i < I)[:, None] & (t < c)[None, :]
    return tl.load(p + t[None, :] * row + i[:, None], mask=mask, other=0.0).to(tl.float32)


@jit
def _store_tokens(p, value, row, t, i, c, I):
    mask = (i < I)[:, None] & (t < c)[None, :]
    tl.store(p + t[None, :] * row + i[:, None], value, mask=mask)


@jit
def _decays(gate, t, c):
    """Of the gates (BC,) of a block: themselves, and their products before t, after t, of all, and between s and t."""
    now = tl.load(gate + t, mask=t < c, other=1.0).to(tl.float32)
    last = tl.load(gate + t - 1, mask=(t > 0) & (t <= c), other=1.0).to(tl.float32)
    next = tl.load(gate + t + 1, mask=t + 1 < c, other=1.0).to(tl.float32)
    between = tl.cumprod(tl.where(t[None, :] > t[:, None] + 1, last[None, :], 1.0), 1)
    between = tl.where(t[None, :] > t[:, None], between, 0.0)
    before, after = tl.cumprod(last, 0), tl.cumprod(next, 0, reverse=True)
    everything = tl.sum(tl.where(t == 0, after * now, 0.0))
    return now, before, tl.where(t < c, after, 0.0), everything, between


@jit
def _gates(alpha, theta, t, c, EMA: tl.constexpr, PRECISION: tl.constexpr):
    """`_decays` of alpha; then what momentum makes of a write: what M has of it before t (BC, BC) and at the block's end
    (BC,), the same of the start momentum, what m has of it at the end, and of the start momentum; then what m has of it
    at t (BC, BC) and of the start momentum at t (BC,), the weights of writes, and `_decays` of theta.

    Without momentum a write reaches M at once, and the rest are placeholders.
    """
    now, before, after, everything, between = _decays(alpha, t, c)
    gain, gain_end, gain_m, gain_m_end, keep, keep_m = between, after, before, everything, after, everything
    N, start, weight, th_now, th_before, th_after, th_between = between, now, now, now, now, now, between
    if theta is not None:
        th_now, th_before, th_after, keep_m, th_between = _decays(theta, t, c)
        weight = 1.0 - th_now if EMA else tl.full(th_now.shape, 1.0, tl.float32)
        keep, start = th_after * weight, th_now * th_before
        N = tl.where(t[:, None] == t[None, :], 1.0, th_now[None, :] * th_between) * weight[:, None]
        gain, gain_end = _dot(N, between, PRECISION), tl.sum(N * after[None, :], 1)
        gain_m, gain_m_end = tl.sum(start[:, None] * between, 0), tl.sum(after * start)
    return (
        now, before, after, everything, between, gain, gain_end, gain_m, gain_m_end, keep, keep_m,
        N, start, weight, th_now, th_before, th_after, th_between,
    )  # fmt: skip


@jit
def _after_write(now, before, between, gain, gain_m, N, start, theta, t):
    """before, between, gain, gain_m as reads after the write at t see them: alpha_t times what there was, and the write."""
    between = now[None, :] * between + tl.where(t[:, None] == t[None, :], 1.0, 0.0)
    return now * before, between, between if theta is None else now[None, :] * gain + N, now * gain_m + start


@jit
def _put_gates(to, alpha, theta, t, c, EMA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr):
    """What `_block` needs of `_gates`, into memory, (4 BC + 8, BC): made once for a block of tokens and kept out of
    registers. What reads need stands apart where it is something else."""
    gates = _gates(alpha, theta, t, c, EMA, PRECISION)
    now, before, after, everything, between, gain, gain_end, gain_m, gain_m_end, keep, keep_m, N, start = gates[:13]
    BC: tl.constexpr = t.shape[0]
    line = to + 4 * BC * BC + t
    tl.store(line, before)
    tl.store(line + BC, gain_m)
    tl.store(line + 4 * BC, after)
    tl.store(line + 5 * BC, gain_end)
    tl.store(line + 6 * BC, keep)
    tl.store(line + 7 * BC, tl.where(t == 0, everything, tl.where(t == 1, gain_m_end, keep_m)))
    _store_matrix(to, between, t, t, BC, BC)
    _store_matrix(to + BC * BC, gain, t, t, BC, BC)
    if INCLUSIVE:
        before, between, gain, gain_m = _after_write(now, before, between, gain, gain_m, N, start, theta, t)
        tl.store(line + 2 * BC, before)
        tl.store(line + 3 * BC, gain_m)
        _store_matrix(to + 2 * BC * BC, between, t, t, BC, BC)
        _store_matrix(to + 3 * BC * BC, gain, t, t, BC, BC)
    tl.debug_barrier()


@jit
def _inverse(A, t):
    """(1 + A)^-1 for A (BC, BC) strictly upper triangular, by substitution, a token after the other."""
    T, A_T = tl.where(t[:, None] == t[None, :], 1.0, 0.0), tl.trans(A)
    for token in tl.range(1, A.shape[0], disable_licm=True):
        here = t[None, :] == token
        row = tl.sum(tl.where(t[:, None] == token, A_T, 0.0), 0)
        T = tl.where(here, T - tl.sum(T * row[None, :], 1)[:, None], T)
    return T


@jit
def _write(M, m, X, step, d, p, left_at_end, t, o, left, O, I, row,
           to_M, to_m, BI: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A block of writes: rows o of memory M and momentum m, tile by tile, into to_M and to_m."""
    after, everything, gain_end, gain_m_end, keep, keep_m = left_at_end
    writes = gain_end[None, :] * d
    if p is not None:
        writes += after[None, :] * p
    for i0 in tl.range(0, I, BI, disable_licm=True):
        i = i0 + tl.arange(0, BI)
        xe = tl.trans(_tokens(X, row, t, i, left, I) * step[None, :])
        w = everything * _matrix(M, o, i, O, I) - _dot(writes, xe, PRECISION)
        if m is not None:
            w_m = _matrix(m, o, i, O, I)
            w += gain_m_end * w_m
            _store_matrix(to_m, keep_m * w_m - _dot(keep[None, :] * d, xe, PRECISION), o, i, O, I)
        _store_matrix(to_M, w, o, i, O, I)


@jit
def _copy(to, M, o, O, I, BI: tl.constexpr):
    """Rows o of a matrix, or zeros if M is None."""
    for i0 in tl.range(0, I, BI):
        i = i0 + tl.arange(0, BI)
        w = tl.zeros((o.shape[0], BI), tl.float32) if M is None else _matrix(M, o, i, O, I)
        _store_matrix(to, w, o, i, O, I)


@jit
def _reader(n, memories, readers):
    """Whether memory n is read, 0 or 1 (the last `readers` of every `memories` are), and its place among those that are."""
    j = n % memories - (memories - readers)
    return (j >= 0).to(tl.int32), n // memories * readers + tl.maximum(j, 0)


@jit
def _block(
    M, m, X, x_row, D, d_row, Q, q_row, read, step, gates, t, o, left, O, I, P, BI: tl.constexpr,
    DELTA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of tokens for rows o of one memory. With `gates` of `_put_gates`, Y = M X^T and S = (step X) X^T of the
    block,  p = (before Y - d (gain S)) (1 + between S)^-1;  a read is the same sum at q, with p; `_write` ends the block.

    Writes M and m in place, p to P if there is one; returns r (BO, BC), zeros unless `read`.
    """
    BC: tl.constexpr = t.shape[0]
    line = gates + 4 * BC * BC + t
    zero = tl.zeros((o.shape[0], BC), tl.float32)
    r, p = zero, None
    if DELTA:
        y, y_m, scores = zero, zero, tl.zeros((BC, BC), tl.float32)
        for i0 in tl.range(0, I, BI, disable_licm=True):
            i = i0 + tl.arange(0, BI)
            x = _tokens(X, x_row, t, i, left, I)
            scores += _dot(tl.trans(x * step[None, :]), x, PRECISION)
            y += _dot(_matrix(M, o, i, O, I), x, PRECISION)
            if m is not None:
                y_m += _dot(_matrix(m, o, i, O, I), x, PRECISION)
        tl.debug_barrier()
        inverse = _inverse(_matrix(gates, t, t, BC, BC) * scores, t)
        gain = _matrix(gates + BC * BC, t, t, BC, BC)
        p = tl.load(line)[None, :] * y - _dot(_tokens(D, d_row, t, o, left, O), gain * scores, PRECISION)
        if m is not None:
            p += tl.load(line + BC)[None, :] * y_m
        p = _dot(p, inverse, PRECISION)
        if P is not None:
            _store_tokens(P, p, O, t, o, left, O)
        tl.debug_barrier()
    if Q is not None:
        if read:
            r_m, scores = zero, tl.zeros((BC, BC), tl.float32)
            for i0 in tl.range(0, I, BI, disable_licm=True):
                i = i0 + tl.arange(0, BI)
                q = _tokens(Q, q_row, t, i, left, I)
                scores += _dot(tl.trans(_tokens(X, x_row, t, i, left, I) * step[None, :]), q, PRECISION)
                r += _dot(_matrix(M, o, i, O, I), q, PRECISION)
                if m is not None:
                    r_m += _dot(_matrix(m, o, i, O, I), q, PRECISION)
            tl.debug_barrier()
            for_q: tl.constexpr = 2 if INCLUSIVE else 0
            gain = _matrix(gates + (for_q + 1) * BC * BC, t, t, BC, BC)
            r = tl.load(line + for_q * BC)[None, :] * r - _dot(
                _tokens(D, d_row, t, o, left, O), gain * scores, PRECISION
            )
            if m is not None:
                r += tl.load(line + (for_q + 1) * BC)[None, :] * r_m
            if DELTA:
                r -= _dot(p, _matrix(gates + for_q * BC * BC, t, t, BC, BC) * scores, PRECISION)
            tl.debug_barrier()
    scalars = gates + (4 * BC + 7) * BC
    everything, gain_m_end, keep_m = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    left_at_end = tl.load(line + 4 * BC), everything, tl.load(line + 5 * BC), gain_m_end, tl.load(line + 6 * BC), keep_m
    d = _tokens(D, d_row, t, o, left, O)
    _write(M, m, X, step, d, p, left_at_end, t, o, left, O, I, x_row, M, m, BI, PRECISION)
    return r


@jit
def _chunk_forward(
    M, m, X, D, Q, eta, alpha, theta, at, M_end, m_end, R, P, work, c, memories, readers, x_row, d_row, q_row,
    O, I, BC: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    EMA: tl.constexpr, DELTA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dgd_chunk`: block of tokens by block, what `_block` says. Grid (memories in all, blocks of rows); at: (n, 8), where
    each one's part of the eight inputs begins; P only if there is a backward pass to come."""
    n = tl.program_id(0).to(tl.int64)
    read, n_read = _reader(n, memories, readers)
    at += n * 8
    t, o = tl.arange(0, BC), tl.program_id(1) * BO + tl.arange(0, BO)
    X, D, eta = X + tl.load(at + 2), D + tl.load(at + 3), eta + tl.load(at + 5)
    M_end += n * O * I
    _copy(M_end, M + tl.load(at), o, O, I, BI)
    if theta is not None:
        m_end += n * O * I
        _copy(m_end, m if m is None else m + tl.load(at + 1), o, O, I, BI)
    if Q is not None:
        Q += tl.load(at + 4)
    work += (n * tl.num_programs(1) + tl.program_id(1)) * ((4 * BC + 8) * BC)
    for s in tl.range(0, c, BC, disable_licm=True):
        tl.debug_barrier()  # a program's threads read what others of them wrote
        left = min(BC, c - s)
        step = tl.load(eta + s + t, mask=t < left, other=0.0).to(tl.float32)
        th = None if theta is None else theta + tl.load(at + 7) + s
        _put_gates(work, alpha + tl.load(at + 6) + s, th, t, left, EMA, INCLUSIVE, PRECISION)
        r = _block(
            M_end, None if theta is None else m_end, X + s * x_row, x_row, D + s * d_row, d_row,
            None if Q is None else Q + s * q_row, q_row, read, step, work, t, o, left, O, I,
            None if P is None else P + (n * c + s) * O, BI, DELTA, INCLUSIVE, PRECISION,
        )  # fmt: skip
        if Q is not None:
            _store_tokens(R + (n_read * c + s) * O, r, O, t, o, left * read, O)


@jit
def _decays_backward(d_before, d_after, d_everything, d_between, before, after, between, PRECISION: tl.constexpr):
    """Gradient of gates (BC,) from those of their products: a product without one factor is a product of two others, so
    that nothing is divided by a gate, which may be 0."""
    d = tl.sum(_dot(tl.trans(between), d_between, PRECISION) * between, 1)
    d += before * tl.sum(between * d_before[None, :], 1)
    return d + after * (tl.sum(between * d_after[:, None], 0) + d_everything * before)


@jit
def _chunk_states(
    M, m, X, D, eta, alpha, theta, at, P, states, c, x_row, d_row,
    O, I, BC: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    EMA: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states that blocks of tokens start from, (n, blocks, 2, O, I): what `_block` writes, from P, without a solve."""
    n = tl.program_id(0).to(tl.int64)
    at += n * 8
    t, o = tl.arange(0, BC), tl.program_id(1) * BO + tl.arange(0, BO)
    X, D, eta, alpha = X + tl.load(at + 2), D + tl.load(at + 3), eta + tl.load(at + 5), alpha + tl.load(at + 6)
    states += n * tl.cdiv(c, BC) * (2 * O * I)
    _copy(states, M + tl.load(at), o, O, I, BI)
    if theta is not None:
        theta += tl.load(at + 7)
        _copy(states + O * I, m if m is None else m + tl.load(at + 1), o, O, I, BI)
    for s in tl.range(0, c - BC, BC, disable_licm=True):
        tl.debug_barrier()
        step = tl.load(eta + s + t).to(tl.float32)
        g = _gates(alpha + s, None if theta is None else theta + s, t, BC, EMA, PRECISION)
        d = _tokens(D + s * d_row, d_row, t, o, BC, O)
        p = _tokens(P + (n * c + s) * O, O, t, o, BC, O) if DELTA else None
        _write(
            states, None if theta is None else states + O * I, X + s * x_row, step, d, p,
            (g[2], g[3], g[6], g[8], g[9], g[10]), t, o, BC, O, I, x_row,
            states + 2 * O * I, states + 3 * O * I, BI, PRECISION,
        )  # fmt: skip
        states += 2 * O * I


@jit
def _chunk_backward(
    X, D, Q, eta, alpha, theta, at, P, dR, dM, dm, ends, dD, dZ, work, c, memories, readers,
    x_row, d_row, q_row,
    O, I, BC: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    EMA: tl.constexpr, DELTA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of the backward pass that goes from token to token: dM, dm, dD, and dZ (n, c, O), the gradient of what the
    solve turns into P. On the grid of `_chunk_forward`, block of tokens by block from the last one on. In the letters of
    `_block`, S_q the scores of queries, U = dM (step X)^T and U_m the same of dm:

        dz = -(after U + dR (between_q S_q)^T) (1 + between S)^-T
        dd = -gain_end U - keep U_m - dR (gain_q S_q)^T - dz (gain S)^T
        dM = everything dM + (before dz) X + (before_q dR) Q
        dm = keep_m dm + gain_m_end dM + (gain_m dz) X + (gain_m_q dR) Q

    dM and dm come as the gradients of the chunk's end and leave as those of its start. Kept for `_chunk_backward_tokens`:
    ends (n, blocks, 2, O, I), the gradients of the blocks' ends, and what gates need in `work`, see there.
    """
    n = tl.program_id(0).to(tl.int64)
    read, n_read = _reader(n, memories, readers)
    at += n * 8
    t, o = tl.arange(0, BC), tl.program_id(1) * BO + tl.arange(0, BO)
    X, D, eta, alpha = X + tl.load(at + 2), D + tl.load(at + 3), eta + tl.load(at + 5), alpha + tl.load(at + 6)
    ends += (n + 1) * tl.cdiv(c, BC) * (2 * O * I)
    work += (n * tl.num_programs(1) + tl.program_id(1) + 1) * tl.cdiv(c, BC) * ((5 * BC + 9) * BC)
    dM += n * O * I
    if theta is not None:
        theta += tl.load(at + 7)
        dm += n * O * I
    if Q is not None:
        Q += tl.load(at + 4)
    for block in tl.range(0, tl.cdiv(c, BC), disable_licm=True):
        s = (tl.cdiv(c, BC) - 1 - block) * BC
        ends -= 2 * O * I
        work -= (5 * BC + 9) * BC
        line = work + 5 * BC * BC + t
        left = min(BC, c - s)
        step = tl.load(eta + s + t, mask=t < left, other=0.0).to(tl.float32)
        gates = _gates(alpha + s, None if theta is None else theta + s, t, left, EMA, PRECISION)
        now, before, after, everything, between, gain, gain_end, gain_m, gain_m_end, keep, keep_m, N, start = gates[:13]
        u = tl.zeros((BO, BC), tl.float32)  # the gradient of a write at each token, as far as it comes from the end
        u_m, scores, q_scores = u, tl.zeros((BC, BC), tl.float32), tl.zeros((BC, BC), tl.float32)
        for i0 in tl.range(0, I, BI, disable_licm=True):
            i = i0 + tl.arange(0, BI)
            x = _tokens(X + s * x_row, x_row, t, i, left, I)
            xe = x * step[None, :]
            u += _dot(_matrix(dM, o, i, O, I), xe, PRECISION)
            if theta is not None:
                u_m += _dot(_matrix(dm, o, i, O, I), xe, PRECISION)
            if DELTA:
                scores += _dot(tl.trans(xe), x, PRECISION)
            if Q is not None:
                if read:
                    q_scores += _dot(tl.trans(xe), _tokens(Q + s * q_row, q_row, t, i, left, I), PRECISION)
        d = _tokens(D + s * d_row, d_row, t, o, left, O)
        dd = -gain_end[None, :] * u
        tl.store(line, -tl.sum(d * u, 0))
        if DELTA:
            dz = -after[None, :] * u
            tl.store(line + BC, -tl.sum(_tokens(P + (n * c + s) * O, O, t, o, left, O) * u, 0))
        if theta is not None:
            dd -= keep[None, :] * u_m
            tl.store(line + 2 * BC, -tl.sum(d * u_m, 0))
        before_q, b_q, g_q, gain_m_q = before, between, gain, gain_m
        if INCLUSIVE:
            before_q, b_q, g_q, gain_m_q = _after_write(now, before, between, gain, gain_m, N, start, theta, t)
        if Q is not None:
            if read:
                dy = _tokens(dR + (n_read * c + s) * O, O, t, o, left, O)
                dd -= _dot(dy, tl.trans(g_q * q_scores), PRECISION)
                if DELTA:
                    dz -= _dot(dy, tl.trans(b_q * q_scores), PRECISION)
        if DELTA:  # p = (what a read at x would give without p) T: the gradient of a read with dy = dz
            dz = _dot(dz, tl.trans(_inverse(between * scores, t)), PRECISION)
            dd -= _dot(dz, tl.trans(gain * scores), PRECISION)
            _store_tokens(dZ + (n * c + s) * O, dz, O, t, o, left, O)
        _store_tokens(dD + (n * c + s) * O, dd, O, t, o, left, O)
        tl.debug_barrier()
        for i0 in tl.range(0, I, BI, disable_licm=True):
            i = i0 + tl.arange(0, BI)
            end = _matrix(dM, o, i, O, I)
            _store_matrix(ends, end, o, i, O, I)
            w = everything * end
            if theta is not None:
                end_m = _matrix(dm, o, i, O, I)
                _store_matrix(ends + O * I, end_m, o, i, O, I)
                w_m = gain_m_end * end + keep_m * end_m
            if DELTA:
                x = tl.trans(_tokens(X + s * x_row, x_row, t, i, left, I))
                dz = _tokens(dZ + (n * c + s) * O, O, t, o, left, O)
                w += _dot(before[None, :] * dz, x, PRECISION)
                if theta is not None:
                    w_m += _dot(gain_m[None, :] * dz, x, PRECISION)
            if Q is not None:
                if read:
                    q = tl.trans(_tokens(Q + s * q_row, q_row, t, i, left, I))
                    dy = _tokens(dR + (n_read * c + s) * O, O, t, o, left, O)
                    w += _dot(before_q[None, :] * dy, q, PRECISION)
                    if theta is not None:
                        w_m += _dot(gain_m_q[None, :] * dy, q, PRECISION)
            tl.debug_barrier()
            _store_matrix(dM, w, o, i, O, I)
            if theta is not None:
                _store_matrix(dm, w_m, o, i, O, I)
        tl.debug_barrier()


@jit
def _chunk_backward_tokens(
    X, D, Q, eta, alpha, theta, at, P, dR, states, ends, dZ, work, dX, dQ, d_eta, c, memories, readers,
    x_row, d_row, q_row,
    O, I, BC: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    EMA: tl.constexpr, DELTA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX, dQ and d_eta, for all blocks of tokens at once: the grid has them as its last axis. With the states M, m that a
    block starts from and the gradients E, E_m of its end:

        dS = -gain (D^T dz) - between (P^T dz), and dS_q the same with dR
        dQ = (M^T dR) before_q + (m^T dR) gain_m_q + (step X) dS_q
        dX = (M^T dz) before + (m^T dz) gain_m + (step X) dS + step d(step X)
        d(step X) = X dS^T + Q dS_q^T - E^T (gain_end D + after P) - E_m^T (keep D)

    What all rows share comes in parts, one for each block of rows: dX, dQ (blocks of rows, n, c, I), d_eta (.., n, c) and
    work (n, blocks of rows, blocks, 5 BC + 9, BC): the gradients of scores of q, of scores of x, of `between`, of `gain`
    and of what `gain` has at t itself; then lines for those of gain_end, after, keep, the gate, before and gain_m as
    x and as q see them, and of everything, gain_m_end, keep_m.
    """
    n = tl.program_id(0).to(tl.int64)
    read, n_read = _reader(n, memories, readers)
    s = tl.program_id(2) * BC
    left = min(BC, c - s)
    part = (tl.program_id(1) * tl.num_programs(0) + n) * c + s
    at += n * 8
    t, o = tl.arange(0, BC), tl.program_id(1) * BO + tl.arange(0, BO)
    X, D = X + tl.load(at + 2) + s * x_row, D + tl.load(at + 3) + s * d_row
    state = (n * tl.num_programs(2) + tl.program_id(2)) * (2 * O * I)
    states, ends = states + state, ends + state
    work += ((n * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)) * ((5 * BC + 9) * BC)
    tokens = (n * c + s) * O
    if Q is not None:
        dR += (n_read * c + s) * O
        dQ += ((tl.program_id(1) * (tl.num_programs(0) // memories * readers) + n_read) * c + s) * I
        Q += tl.load(at + 4) + s * q_row
    step = tl.load(eta + tl.load(at + 5) + s + t, mask=t < left, other=0.0).to(tl.float32)
    th = None if theta is None else theta + tl.load(at + 7) + s
    gates = _gates(alpha + tl.load(at + 6) + s, th, t, left, EMA, PRECISION)
    now, before, after, everything, between, gain, gain_end, gain_m, gain_m_end, keep, keep_m, N, start = gates[:13]
    d_now, d_between = tl.zeros((BC,), tl.float32), tl.zeros((BC, BC), tl.float32)
    d_gain = d_between
    if INCLUSIVE:
        _store_matrix(work + 4 * BC * BC, d_gain, t, t, BC, BC)
    if Q is not None:
        if read:
            scores = tl.zeros((BC, BC), tl.float32)
            for i0 in tl.range(0, I, BI, disable_licm=True):
                i = i0 + tl.arange(0, BI)
                xe = tl.trans(_tokens(X, x_row, t, i, left, I) * step[None, :])
                scores += _dot(xe, _tokens(Q, q_row, t, i, left, I), PRECISION)
            b_q, g_q = between, gain
            if INCLUSIVE:
                b_q, g_q = _after_write(now, before, between, gain, gain_m, N, start, theta, t)[1:3]
            part_of = _dot(tl.trans(_tokens(D, d_row, t, o, left, O)), _tokens(dR, O, t, o, left, O), PRECISION)
            dS, d_gain = g_q * part_of, -scores * part_of
            tl.debug_barrier()
            if DELTA:
                dy = _tokens(dR, O, t, o, left, O)
                part_of = _dot(tl.trans(_tokens(P + tokens, O, t, o, left, O)), dy, PRECISION)
                dS += b_q * part_of
                d_between = -scores * part_of
            _store_matrix(work, dS, t, t, BC, BC)
            if INCLUSIVE:
                d_now += tl.sum(d_gain * gain + d_between * between, 0)
                _store_matrix(work + 4 * BC * BC, d_gain, t, t, BC, BC)
                d_gain, d_between = now[None, :] * d_gain, now[None, :] * d_between
    if DELTA:
        scores = tl.zeros((BC, BC), tl.float32)
        for i0 in tl.range(0, I, BI, disable_licm=True):
            x = _tokens(X, x_row, t, i0 + tl.arange(0, BI), left, I)
            scores += _dot(tl.trans(x * step[None, :]), x, PRECISION)
        tl.debug_barrier()
        dz = _tokens(dZ + tokens, O, t, o, left, O)
        part_of = _dot(tl.trans(_tokens(D, d_row, t, o, left, O)), dz, PRECISION)
        _store_matrix(work + BC * BC, gain * part_of, t, t, BC, BC)
        d_gain -= scores * part_of
        tl.debug_barrier()
        dz = _tokens(dZ + tokens, O, t, o, left, O)
        part_of = _dot(tl.trans(_tokens(P + tokens, O, t, o, left, O)), dz, PRECISION)
        d_between -= scores * part_of
        part_of = between * part_of + _matrix(work + BC * BC, t, t, BC, BC)
        tl.debug_barrier()
        _store_matrix(work + BC * BC, part_of, t, t, BC, BC)
    _store_matrix(work + 2 * BC * BC, d_between, t, t, BC, BC)
    _store_matrix(work + 3 * BC * BC, d_gain, t, t, BC, BC)
    line = work + 5 * BC * BC + t
    tl.store(line + 3 * BC, d_now)
    tl.debug_barrier()

    th = None if theta is None else theta + tl.load(at + 7) + s
    gates = _gates(alpha + tl.load(at + 6) + s, th, t, left, EMA, PRECISION)  # again: kept, they would take registers
    now, before, after, everything, between, gain, gain_end, gain_m, gain_m_end, keep, keep_m, N, start = gates[:13]
    before_q, gain_m_q = before, gain_m
    if INCLUSIVE:
        before_q, gain_m_q = now * before, now * gain_m + start
    d_before, d_before_q, d_gain_m, d_gain_m_q = (tl.zeros((BC,), tl.float32),) * 4
    d_everything = tl.sum(d_before)
    d_gain_m_end, d_keep_m = d_everything, d_everything
    for i0 in tl.range(0, I, BI, disable_licm=True):
        i = i0 + tl.arange(0, BI)
        w, end = _matrix(states, o, i, O, I), _matrix(ends, o, i, O, I)
        d_everything += tl.sum(w * end)
        if theta is not None:
            w_m = _matrix(states + O * I, o, i, O, I)
            d_gain_m_end += tl.sum(w_m * end)
            d_keep_m += tl.sum(w_m * _matrix(ends + O * I, o, i, O, I))
        tl.debug_barrier()
        if Q is not None:
            if read:
                q, dy = _tokens(Q, q_row, t, i, left, I), _tokens(dR, O, t, o, left, O)
                y = _dot(tl.trans(_matrix(states, o, i, O, I)), dy, PRECISION)
                dq = before_q[None, :] * y
                if INCLUSIVE:
                    d_before_q += tl.sum(q * y, 0)
                else:
                    d_before += tl.sum(q * y, 0)
                tl.debug_barrier()
                if theta is not None:
                    dy = _tokens(dR, O, t, o, left, O)
                    y = _dot(tl.trans(_matrix(states + O * I, o, i, O, I)), dy, PRECISION)
                    dq += gain_m_q[None, :] * y
                    if INCLUSIVE:
                        d_gain_m_q += tl.sum(q * y, 0)
                    else:
                        d_gain_m += tl.sum(q * y, 0)
                xe = _tokens(X, x_row, t, i, left, I) * step[None, :]
                dq -= _dot(xe, _matrix(work, t, t, BC, BC), PRECISION)
                _store_tokens(dQ, dq, I, t, i, left, I)
    tl.store(line + 5 * BC, d_before_q)
    tl.store(line + 7 * BC, d_gain_m_q)
    tl.store(line + 8 * BC, tl.where(t == 0, d_everything, tl.where(t == 1, d_gain_m_end, d_keep_m)))
    d_step = tl.zeros((BC,), tl.float32)
    for i0 in tl.range(0, I, BI, disable_licm=True):
        i = i0 + tl.arange(0, BI)
        dx, dxe = tl.zeros((BI, BC), tl.float32), tl.zeros((BI, BC), tl.float32)
        writes = gain_end[None, :] * _tokens(D, d_row, t, o, left, O)
        if DELTA:
            x, dz = _tokens(X, x_row, t, i, left, I), _tokens(dZ + tokens, O, t, o, left, O)
            y = _dot(tl.trans(_matrix(states, o, i, O, I)), dz, PRECISION)
            d_before += tl.sum(x * y, 0)
            dx += before[None, :] * y
            tl.debug_barrier()
            if theta is not None:
                x, dz = _tokens(X, x_row, t, i, left, I), _tokens(dZ + tokens, O, t, o, left, O)
                y = _dot(tl.trans(_matrix(states + O * I, o, i, O, I)), dz, PRECISION)
                d_gain_m += tl.sum(x * y, 0)
                dx += gain_m[None, :] * y
                tl.debug_barrier()
                x = _tokens(X, x_row, t, i, left, I)
            dS = _matrix(work + BC * BC, t, t, BC, BC)
            dx -= _dot(x * step[None, :], dS, PRECISION)
            dxe -= _dot(x, tl.trans(dS), PRECISION)
            tl.debug_barrier()
            writes += after[None, :] * _tokens(P + tokens, O, t, o, left, O)
        dxe -= _dot(tl.trans(_matrix(ends, o, i, O, I)), writes, PRECISION)
        tl.debug_barrier()
        if theta is not None:
            writes = keep[None, :] * _tokens(D, d_row, t, o, left, O)
            dxe -= _dot(tl.trans(_matrix(ends + O * I, o, i, O, I)), writes, PRECISION)
            tl.debug_barrier()
        if Q is not None:
            if read:
                dS = _matrix(work, t, t, BC, BC)
                dxe -= _dot(_tokens(Q, q_row, t, i, left, I), tl.trans(dS), PRECISION)
        d_step += tl.sum(dxe * _tokens(X, x_row, t, i, left, I), 0)
        _store_tokens(dX + part * I, dx + dxe * step[None, :], I, t, i, left, I)
        tl.debug_barrier()
    tl.store(d_eta + part + t, d_step, mask=t < left)
    tl.store(line + 4 * BC, d_before)
    tl.store(line + 6 * BC, d_gain_m)


@jit
def _chunk_backward_gates(
    alpha, theta, at, work, d_alpha, d_theta, c, row_blocks,
    BC: tl.constexpr, EMA: tl.constexpr, DELTA: tl.constexpr, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_alpha, d_theta (n, c) from the products of gates, whose gradients are in `work`, a part for each of the
    blocks of rows. Grid (n, blocks of tokens)."""
    n = tl.program_id(0).to(tl.int64)
    s, t = tl.program_id(1) * BC, tl.arange(0, BC)
    left = min(BC, c - s)
    alpha += tl.load(at + n * 8 + 6) + s
    if theta is not None:
        theta += tl.load(at + n * 8 + 7) + s
    work += (n * row_blocks * tl.num_programs(1) + tl.program_id(1)) * ((5 * BC + 9) * BC)
    d_between, d_gain, dN = (tl.zeros((BC, BC), tl.float32),) * 3
    d_gain_end, d_after, d_keep, d_now, d_before, d_before_q, d_gain_m, d_gain_m_q, scalars = (
        tl.zeros((BC,), tl.float32),
    ) * 9
    for _ in tl.range(0, row_blocks, disable_licm=True):
        line = work + 5 * BC * BC + t
        d_between += _matrix(work + 2 * BC * BC, t, t, BC, BC)
        d_gain += _matrix(work + 3 * BC * BC, t, t, BC, BC)
        d_gain_end += tl.load(line)
        if DELTA:
            d_after += tl.load(line + BC)
        if theta is not None:
            d_keep += tl.load(line + 2 * BC)
            if INCLUSIVE:
                dN += _matrix(work + 4 * BC * BC, t, t, BC, BC)
        d_now += tl.load(line + 3 * BC)
        d_before += tl.load(line + 4 * BC)
        d_before_q += tl.load(line + 5 * BC)
        d_gain_m += tl.load(line + 6 * BC)
        d_gain_m_q += tl.load(line + 7 * BC)
        scalars += tl.load(line + 8 * BC)
        work += tl.num_programs(1) * ((5 * BC + 9) * BC)
    d_everything = tl.sum(tl.where(t == 0, scalars, 0.0))
    (
        now, before, after, everything, between, gain, gain_end, gain_m, gain_m_end, keep, keep_m,
        N, start, weight, th_now, th_before, th_after, th_between,
    ) = _gates(alpha, theta, t, left, EMA, PRECISION)  # fmt: skip
    if INCLUSIVE:
        d_now += d_before_q * before
        d_before += now * d_before_q
    if theta is None:
        d_between += d_gain
        d_after += d_gain_end
    else:
        d_gain_m_end, d_keep_m = tl.sum(tl.where(t == 1, scalars, 0.0)), tl.sum(tl.where(t == 2, scalars, 0.0))
        dN += d_gain_end[:, None] * after[None, :]
        d_start = d_gain_m_end * after
        if INCLUSIVE:
            d_now += d_gain_m_q * gain_m
            d_start += d_gain_m_q
            d_gain_m += now * d_gain_m_q
        d_start += tl.sum(between * d_gain_m[None, :], 1)
        d_between += _dot(tl.trans(N), d_gain, PRECISION) + start[:, None] * d_gain_m[None, :]
        d_after += tl.sum(N * d_gain_end[:, None], 0) + d_gain_m_end * start
        dN += _dot(d_gain, tl.trans(between), PRECISION)
        d_theta_now = tl.sum(dN * weight[:, None] * th_between, 0) + d_start * th_before
        if EMA:
            inclusive = tl.where(t[:, None] == t[None, :], 1.0, th_now[None, :] * th_between)
            d_theta_now -= tl.sum(dN * inclusive, 1) + d_keep * th_after
        d_theta_now += _decays_backward(
            th_now * d_start, d_keep * weight, d_keep_m, th_now[None, :] * dN * weight[:, None],
            th_before, th_after, th_between, PRECISION,
        )  # fmt: skip
        tl.store(d_theta + n * c + s + t, d_theta_now, mask=t < left)
    d_now += _decays_backward(d_before, d_after, d_everything, d_between, before, after, between, PRECISION)
    tl.store(d_alpha + n * c + s + t, d_now, mask=t < left)


def _blocks(o: int, i: int, BO: int) -> dict:
    """Sizes of the chunk kernels' tiles. A warp has 16 rows of a memory; more, or wider tiles, and registers run out."""
    return dict(O=o, I=i, BC=16, BO=BO, BI=16, num_warps=BO // 16, num_stages=1)


@lru_cache(maxsize=512)
def _begins(lead: tuple, layouts: tuple, device: torch.device) -> Tensor:
    """(n, k) int64: where the part of each of n = prod(lead) memories begins in k tensors of these leading (shape, stride).

    A tensor that has fewer along the last dimension belongs to the last ones.
    """
    columns = []
    for layout in layouts:
        at = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(*layout):
            at = at.unsqueeze(-1) + stride * torch.arange(size)
        if at.ndim and at.shape[-1] not in (1, lead[-1]):
            at = F.pad(at, (lead[-1] - at.shape[-1], 0))
        columns.append(at.expand(lead).reshape(-1))
    return torch.stack(columns, -1).contiguous().to(device)


def _launch(inputs: tuple, ema: bool, inclusive: bool, delta: bool, readers: int | None, keep_P: bool = False):
    """Run `_chunk_forward`. Returns M, m, R, P and what the backward pass needs."""
    (o, i), c = inputs[0].shape[-2:], inputs[2].shape[-2]
    packed = lambda z, k: z.stride(-1) == 1 and (k > 1 or z.stride(-2) == z.shape[-1])
    inputs = tuple(None if z is None else z if packed(z, k) else z.contiguous() for k, z in enumerate(inputs))
    M, m, X, D, Q, eta, alpha, theta = inputs
    leads = [
        ((), ()) if z is None else (z.shape[:-k], z.stride()[:-k]) for z, k in zip(inputs, (2, 2, 2, 2, 2, 1, 1, 1))
    ]
    lead = torch.broadcast_shapes(*(shape for z, (shape, _) in zip(inputs, leads) if readers is None or z is not Q))
    at = _begins(tuple(lead), tuple((tuple(a), tuple(b)) for a, b in leads), X.device)
    new = lambda *shape: torch.empty(*shape, dtype=torch.float32, device=X.device)
    M_end, m_end = new(*lead, o, i), None if theta is None else new(*lead, o, i)
    of_reads = lead if readers is None else (*lead[:-1], readers)
    R, P = None if Q is None else new(*of_reads, c, o), new(*lead, c, o) if keep_P and delta else None
    reads = dict(memories=1, readers=1) if readers is None else dict(memories=lead[-1], readers=readers)
    rows = dict(x_row=X.stride(-2), d_row=D.stride(-2), q_row=0 if Q is None else Q.stride(-2))
    sizes, flags = _blocks(o, i, 32 if o > 16 else 16), dict(EMA=ema, DELTA=delta, PRECISION=_precision(X.device))
    grid = (len(at), -(-o // sizes["BO"]))
    work = new(*grid, 4 * sizes["BC"] + 8, sizes["BC"])
    with _on(X.device):
        _chunk_forward[grid](
            *inputs, at, M_end, m_end, R, P, work, c, **reads, **rows, **sizes, **flags, INCLUSIVE=inclusive
        )
    return M_end, m_end, R, P, inputs, (at, lead, reads, {**rows, **flags})


class _TritonChunk(torch.autograd.Function):
    """`dgd_chunk` by the kernels: one launch forward, four backward; only P is stored."""

    @staticmethod
    def forward(ctx, ema, inclusive, delta, readers, *inputs):
        M, m, R, P, inputs, ctx.call = _launch(inputs, ema, inclusive, delta, readers, any(ctx.needs_input_grad))
        ctx.save_for_backward(*inputs, P)
        ctx.flags = dict(ema=ema, inclusive=inclusive, delta=delta, readers=readers)
        ctx.set_materialize_grads(False)
        return M, m, R

    @staticmethod
    def backward(ctx, dM, dm, dR):
        *inputs, P = ctx.saved_tensors
        M, m, X, D, Q, eta, alpha, theta = inputs
        if torch.is_grad_enabled():  # a second derivative is wanted: the reference's backward pass has one
            return *(None,) * 4, *_by_autograd(partial(_reference, **ctx.flags), inputs, (dM, dm, dR))
        (at, lead, reads, flags), (o, i), c = ctx.call, M.shape[-2:], X.shape[-2]
        flags = {**flags, **_blocks(o, i, 16)}
        BC, grid = flags["BC"], (len(at), -(-o // flags["BO"]))
        blocks = -(-c // BC)
        new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=X.device)
        of_end = lambda g: new(*lead, o, i).zero_() if g is None else g.clone(memory_format=torch.contiguous_format)
        dM, dm = of_end(dM), None if theta is None else of_end(dm)
        dR, Q = (None, None) if dR is None else (dR.contiguous(), Q)
        part = lambda z, *shape: None if z is None else new(grid[1], *shape)
        dX, dQ, d_eta = part(X, *lead, c, i), part(Q, *(() if Q is None else dR.shape[:-1]), i), part(eta, *lead, c)
        d_alpha, d_theta = new(*lead, c), None if theta is None else new(*lead, c)
        dD, dZ = new(*lead, c, o), None if P is None else new(len(at), c, o)
        states, ends = new(len(at), blocks, 2, o, i), new(len(at), blocks, 2, o, i)
        work = new(*grid, blocks, 5 * BC + 9, BC)
        shared = (X, D, Q, eta, alpha, theta, at, P, dR)
        with _on(X.device):
            plain = {k: flags[k] for k in flags if k != "q_row"}
            _chunk_states[grid](M, m, X, D, eta, alpha, theta, at, P, states, c, **plain)
            flags |= dict(reads, INCLUSIVE=ctx.flags["inclusive"])
            _chunk_backward[grid](*shared, dM, dm, ends, dD, dZ, work, c, **flags)
            _chunk_backward_tokens[(*grid, blocks)](*shared, states, ends, dZ, work, dX, dQ, d_eta, c, **flags)
            flags = {k: flags[k] for k in ("BC", "EMA", "DELTA", "INCLUSIVE", "PRECISION")}
            _chunk_backward_gates[(len(at), blocks)](
                alpha, theta, at, work, d_alpha, d_theta, c, grid[1], **flags, num_warps=1
            )
        dX, dQ, d_eta = (None if z is None else z.sum(0) for z in (dX, dQ, d_eta))
        grads = dM, dm, dX, dD, dQ, d_eta, d_alpha, d_theta
        fold = lambda g, z: None if z is None or g is None else g.sum_to_size(z.shape).to(z.dtype)
        return *(None,) * 4, *(fold(g, z) for g, z in zip(grads, inputs))


# ----------------------------------------------------------------------------------------------------------------------
# A whole memory layer in Triton, for inputs without gradients: what `hope.Memory` does chunk by chunk, in one launch. A
# program has one head of one sequence and all its memories, one after the other, block of tokens by block: memories of a
# head share keys, values and gates, and the memories that make these are read as they were when the chunk began. Its part
# of the states stays in the cache, activations of a block (BC tokens) pass through `work` from a product to the next.
# The price: there are no more programs than heads times sequences, so that few sequences leave a large GPU idle. Rows can't
# be spread over programs, as `dgd_chunk` does: both layers and the normalisations need all rows of the one before.


@jit
def _apply(W, X, row, t, o, left, O, I, BI: tl.constexpr, PRECISION: tl.constexpr):
    """Rows o of W x, (BO, BC)."""
    y = tl.zeros((o.shape[0], t.shape[0]), tl.float32)
    for i0 in tl.range(0, I, BI, disable_licm=True):
        i = i0 + tl.arange(0, BI)
        y += _dot(_matrix(W, o, i, O, I), _tokens(X, row, t, i, left, I), PRECISION)
    return y


@jit
def _layer_norm(y, e, E, eps: tl.constexpr = EPS):
    """`hope.layer_norm` of the columns of y (BE, BC), and what it divided them by."""
    y = tl.where((e < E)[:, None], y - tl.sum(y, 0)[None, :] / E, 0.0)
    std = tl.sqrt(tl.sum(y * y, 0) / E + eps * eps)
    return y / std[None, :], std


@jit
def _mlp(W2, W1, X, row, z, hidden, t, e, left, E, H, NORM: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr):
    """y = W1 silu(W2 x), (BE, BC), or its layer norm, and the standard deviations that this divides by; leaves z = W2 x
    and silu(z) where it is told. Without W1, W2 x."""
    std = tl.full(t.shape, 1.0, tl.float32)
    if W1 is None:
        y = _apply(W2, X, row, t, e, left, E, E, BI, PRECISION)
    else:
        tl.debug_barrier()
        for o0 in tl.range(0, H, e.shape[0], disable_licm=True):
            o = o0 + e
            y = _apply(W2, X, row, t, o, left, H, E, BI, PRECISION)
            _store_tokens(z, y, H, t, o, left, H)
            _store_tokens(hidden, y * tl.sigmoid(y), H, t, o, left, H)
        tl.debug_barrier()
        y = _apply(W1, hidden, H, t, e, left, E, H, BI, PRECISION)
        if NORM:
            y, std = _layer_norm(y, e, E)
    return y, std


@jit
def _normalized(y, eps: tl.constexpr = EPS):
    """`hope.unit` of every column."""
    return y / tl.maximum(tl.sqrt(tl.sum(y * y, 0)), eps)[None, :]


@jit
def _gate(read, bias, head, X, t, e, left, E):
    """<read, x> + bias, a number a token (BC,)."""
    weight = tl.load(read + head * E + e, mask=e < E, other=0.0).to(tl.float32)
    return tl.sum(_tokens(X, E, t, e, left, E) * weight[:, None], 0) + tl.load(bias + head).to(tl.float32)


@jit
def _step(eta, x2, chunk, STEP: tl.constexpr):
    """The inner step for inputs of squared length x2: the minimiser of eq. 56, its average over the chunk, or eta as it is."""
    return eta if STEP == "one" else eta / (1.0 + eta * x2) / (chunk if STEP == "mean" else 1)


@jit
def _move(to, W, size):
    at = tl.arange(0, 1024)
    for i in tl.range(0, size, 1024):
        tl.store(to + i + at, tl.load(W + i + at, mask=i + at < size), mask=i + at < size)


@jit
def _memory_scan(
    U, K, V, Q, eta, alpha, theta, at, W2, W1, m2, m1, A2, A1, scale, eta_read, eta_bias, alpha_read, alpha_bias, Y, work,
    blocks, t0, length, heads, memories, adaptive, u_row, k_row, v_row, q_row, E, H,
    CHUNK: tl.constexpr, CHUNK_PROJ: tl.constexpr, L2: tl.constexpr, STEP: tl.constexpr, SELF_VALUES: tl.constexpr, QK_NORM: tl.constexpr, NORM: tl.constexpr,
    EMA: tl.constexpr, DELTA: tl.constexpr, READ: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, BI: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`memory_scan`. Grid (sequences x heads); at: (n, 7), where each one's part of the first seven begins.

    For every block of tokens: at a chunk's start now becomes anchor (A2, A1); the adaptive ones of k, v, q, eta, alpha
    are read from anchors; then for every memory, eqs. 84 and 88: its value; the inner loss's gradients at the outputs of
    both layers,  d1 = k + y - v,  d2 = (W1^T d1) silu'(z),  with the anchor; `_block` for each layer, the main memory's
    (the last one's) with reads. W1 is None for a linear memory, which has d1 only.
    """
    n = tl.program_id(0).to(tl.int64)
    head, at, size = n % heads, at + n * 7, E * H
    t, e = tl.arange(0, BC), tl.arange(0, BE)
    z = work + n * ((4 * H + (1 + adaptive) * E + 1 + 4 * BC + 8) * BC)
    hidden, d2, q1 = z + H * BC, z + 2 * H * BC, z + 3 * H * BC
    d1 = z + 4 * H * BC
    reads = d1 + E * BC
    line = reads + adaptive * E * BC
    gates = line + BC
    v_at = reads + (E * BC if K is None else 0)
    q_at = v_at + (E * BC if V is None else 0)
    eta_at = q_at + (E * BC if Q is None else 0)
    alpha_at = eta_at + (E * BC if eta is None else 0)
    k_place = 0 if K is None else -1
    q_place = (1 if K is None else 0) + (1 if V is None else 0) if Q is None else -1
    s = t0 * 0
    for _ in tl.range(0, blocks, disable_licm=True):
        left = min(min(BC, length - s), min(CHUNK - (t0 + s) % CHUNK, CHUNK_PROJ - (t0 + s) % CHUNK_PROJ))
        tl.debug_barrier()
        if (t0 + s) % CHUNK_PROJ == 0:
            first = n * memories * size
            _move(A2 + first, W2 + first, (memories - 1) * size)
            if W1 is not None:
                _move(A1 + first, W1 + first, (memories - 1) * size)
        if (t0 + s) % CHUNK == 0:
            last = (n * memories + memories - 1) * size
            _move(A2 + last, W2 + last, size)
            if W1 is not None:
                _move(A1 + last, W1 + last, size)
        tl.debug_barrier()
        if U is not None:
            u = U + tl.load(at) + s * u_row
            for j in tl.range(0, adaptive, disable_licm=True):
                here = (n * memories + j) * size
                y, std = _mlp(
                    A2 + here, None if W1 is None else A1 + here, u, u_row, z, hidden, t, e, left, E, H, NORM, BI,
                    PRECISION,
                )  # fmt: skip
                if W1 is not None:
                    y += _tokens(u, u_row, t, e, left, E)
                if QK_NORM:
                    if (j == k_place) | (j == q_place):
                        y = _normalized(y)
                _store_tokens(reads + j * E * BC, y, E, t, e, left, E)
            tl.debug_barrier()
        k, k_r, v, v_r, q, q_r = reads, E, v_at, E, q_at, E
        if K is not None:
            k, k_r = K + tl.load(at + 1) + s * k_row, k_row
        if V is not None:
            v, v_r = V + tl.load(at + 2) + s * v_row, v_row
        if Q is not None:
            q, q_r = Q + tl.load(at + 3) + s * q_row, q_row
        if eta is not None:
            rate = tl.load(eta + tl.load(at + 4) + s + t, mask=t < left, other=0.0)
        else:  # softplus
            rate = _gate(eta_read, eta_bias, head, eta_at, t, e, left, E)
            small = tl.exp(-tl.abs(rate))
            series = small * (1.0 - small * (0.5 - small * (1.0 / 3.0 - small * 0.25)))
            rate = tl.maximum(rate, 0.0) + tl.where(small < 0.03, series, tl.log(1.0 + small))
        if alpha is not None:
            keep = alpha + tl.load(at + 5) + s
        else:
            keep = line
            tl.store(line + t, tl.sigmoid(_gate(alpha_read, alpha_bias, head, alpha_at, t, e, left, E)))
            tl.debug_barrier()
        th = None if theta is None else theta + tl.load(at + 6) + s
        _put_gates(gates, keep, th, t, left, EMA, READ == "after", PRECISION)
        if READ == "chunk":
            last = (n * memories + memories - 1) * size
            y, std = _mlp(
                A2 + last, None if W1 is None else A1 + last, q, q_r, z, hidden, t, e, left, E, H, NORM, BI, PRECISION
            )
            if W1 is not None:
                y += _tokens(q, q_r, t, e, left, E)
            _store_tokens(Y + (n * length + s) * E, y, E, t, e, left, E)
        for j in tl.range(0, memories, disable_licm=True):
            here = (n * memories + j) * size
            a2, a1 = A2 + here, None if W1 is None else A1 + here
            value = _tokens(v, v_r, t, e, left, E)
            if SELF_VALUES:
                y, std = _mlp(a2, a1, v, v_r, z, hidden, t, e, left, E, H, NORM, BI, PRECISION)
                value = y if W1 is None else value + y
                if scale is not None:
                    value = tl.load(scale + head * memories + j) * _normalized(value)
            x, d = _tokens(k, k_r, t, e, left, E), -value
            if W1 is None:
                if L2:
                    d += _apply(a2, k, k_r, t, e, left, E, E, BI, PRECISION)
                _store_tokens(d2, d, E, t, e, left, E)
            else:
                y, std = _mlp(a2, a1, k, k_r, z, hidden, t, e, left, E, H, NORM, BI, PRECISION)
                if L2:
                    d += x + y
                if NORM:
                    d = (d - tl.sum(d, 0)[None, :] / E - y * (tl.sum(d * y, 0) / E)[None, :]) / std[None, :]
                _store_tokens(d1, d, E, t, e, left, E)
            step, hidden2 = _step(rate, tl.sum(x * x, 0), CHUNK, STEP), tl.zeros((BC,), tl.float32)
            tl.debug_barrier()
            if W1 is not None:
                for o0 in tl.range(0, H, BE, disable_licm=True):
                    o, back = o0 + e, tl.zeros((BE, BC), tl.float32)
                    for i0 in tl.range(0, E, BI, disable_licm=True):
                        i = i0 + tl.arange(0, BI)
                        back += _dot(tl.trans(_matrix(a1, i, o, E, H)), _tokens(d1, E, t, i, left, E), PRECISION)
                    zs, hs = _tokens(z, H, t, o, left, H), _tokens(hidden, H, t, o, left, H)
                    _store_tokens(d2, back * tl.sigmoid(zs) * (1.0 + zs - hs), H, t, o, left, H)
                    hidden2 += tl.sum(hs * hs, 0)
                tl.debug_barrier()
            read = (j == memories - 1).to(tl.int32) if READ != "chunk" else 0
            for o0 in tl.range(0, H, BE, disable_licm=True):
                o = o0 + e
                r = _block(
                    W2 + here, None if theta is None else m2 + here, k, k_r, d2, H,
                    None if READ == "chunk" else q, q_r, read, step, gates, t, o, left, H, E, None, BI, DELTA, READ == "after", PRECISION,
                )  # fmt: skip
                if READ != "chunk":
                    if W1 is None:
                        _store_tokens(Y + (n * length + s) * E, r, E, t, e, left * read, E)
                    else:
                        _store_tokens(q1, r * tl.sigmoid(r), H, t, o, left * read, H)
            if W1 is not None:
                tl.debug_barrier()
                r = _block(
                    W1 + here, None if theta is None else m1 + here, hidden, H, d1, E,
                    None if READ == "chunk" else q1, H, read, _step(rate, hidden2, CHUNK, STEP), gates, t, e, left, E, H, None, BI, DELTA, READ == "after", PRECISION,
                )  # fmt: skip
                if READ != "chunk":
                    if NORM:
                        r, std = _layer_norm(r, e, E)
                    r += _tokens(q, q_r, t, e, left, E)
                    _store_tokens(Y + (n * length + s) * E, r, E, t, e, left * read, E)
            tl.debug_barrier()
        s += left


def scans(x: Tensor, width: int) -> bool:
    """Whether `memory_scan` runs for streams like x of heads this wide: by Triton, without gradients."""
    if torch.is_grad_enabled() or x.dtype == torch.float64 or not uses_triton(x):
        return False
    if width > 128:
        _fall_back(
            f"chunk by chunk: heads of {width} are wider than 128, what one launch for all chunks takes; use more"
        )
    return width <= 128


def memory_scan(
    streams: dict[str, Tensor], now: list[Tensor], momentum: list[Tensor] | None, anchor: list[Tensor], *,
    t: int, chunk: int, chunk_proj: int, adaptive: int, gates: dict[str, tuple[Tensor, Tensor]], scale: Tensor | None,
    objective: str, step: str, read: str, self_values: bool, qk_norm: bool, norm: bool, delta: bool,
) -> Tensor:  # fmt: skip
    """All tokens of a `hope.Memory`, which defines what this computes, in one launch: no state leaves the GPU's kernel
    from chunk to chunk. Without gradients; float32.

    Args:
        streams: what does not depend on a memory: u, k, v, q (b, h, s, e), eta, alpha, theta (b, h, s). Of k, v, q, eta,
            alpha those left out are read at u from the first `adaptive` memories, in this order.
        now, momentum, anchor: per layer (b, h, n, o, i), the main memory last, contiguous: *changed in place*.
        t: tokens before the first; chunks begin at multiples of `chunk` (main memory) and `chunk_proj` (the others).
        gates: (read (h, 1, e), bias (h, 1)) of eta and alpha where they are adaptive.
        scale: (h, n, 1, 1) of self-generated values, which are normalised then.

    Returns y (b, h, s, e).
    """
    some = next(iter(streams.values()))
    b, h, n, H, E = now[0].shape
    length = some.shape[2]
    names = "u", "k", "v", "q", "eta", "alpha", "theta"
    inputs = [streams.get(name) for name in names]
    inputs = [z if z is None or z.stride(-1) == 1 else z.contiguous() for z in inputs]
    layouts = tuple(((), ()) if z is None else (tuple(z.shape[:2]), z.stride()[:2]) for z in inputs)
    at = _begins((b, h), layouts, some.device)
    rows = {f"{name}_row": 0 if z is None else z.stride(-2) for name, z in zip(names[:4], inputs)}
    both = lambda layers: (None, None) if layers is None else (*layers, None)[:2]
    eta_gate, alpha_gate = (gates.get(name, (None, None)) for name in ("eta", "alpha"))
    Y = torch.empty(b, h, length, E, dtype=torch.float32, device=some.device)
    BE = 64 if E <= 64 else 128
    work = torch.empty(
        b * h, 16 * (4 * H + (1 + adaptive) * E + 1 + 4 * 16 + 8), dtype=torch.float32, device=some.device
    )
    blocks, s = 0, t
    while s < t + length:
        blocks, s = blocks + 1, min(s + 16, t + length, s - s % chunk + chunk, s - s % chunk_proj + chunk_proj)
    with _on(some.device):
        _memory_scan[(b * h,)](
            *inputs, at, *both(now), *both(momentum), *both(anchor), scale, *eta_gate, *alpha_gate, Y, work,
            blocks, t, length, h, n, adaptive, **rows, E=E, H=H, CHUNK=chunk, CHUNK_PROJ=chunk_proj, L2=objective == "l2", STEP=step,
            SELF_VALUES=self_values, QK_NORM=qk_norm, NORM=norm, EMA=True, DELTA=delta, READ=read, BC=16, BE=BE, BI=16,
            PRECISION=_precision(some.device), num_warps=BE // 16, num_stages=1,
        )  # fmt: skip
    return Y


# ----------------------------------------------------------------------------------------------------------------------
# Newton-Schulz in Triton: of its three products two are symmetric, and half of such a product is enough.


@jit
def _symmetric_product(
    X, C, Y, M, K, beta, alpha, HAS_C: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """Y = beta C + alpha X X^T for X (n, M, K), Y and a symmetric C (n, M, M). Grid (tiles from the diagonal down, n)."""
    p, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = ((tl.sqrt(8.0 * p + 1.0) - 1.0) / 2.0).to(
        tl.int32
    )  # rows above hold row (row + 1) / 2 tiles; the root may be off
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
    precision = _precision(X.device) if X.dtype == torch.float32 else "half"
    with _on(X.device):
        _symmetric_product[tiles * (tiles + 1) // 2, n](
            X,
            X if C is None else C,
            Y,
            m,
            k,
            beta,
            alpha,
            C is not None,
            B,
            32,
            precision,
            num_warps=B // 16,
            num_stages=3,
        )
    return Y
