"""A whole memory layer in Triton, for inputs without gradients: what `hope.Memory` does chunk by chunk, in one launch.

    memory_scan     any number of tokens, through memories of every kind; fused.py is for training

A program has one head of one sequence and all its memories, one after the other, block of tokens by block: memories of a
head share keys, values and gates, and the memories that make these are read as they were when the chunk began. Its part
of the states stays in the cache, activations of a block (BC tokens) pass through `work` from a product to the next. The
price: there are no more programs than heads times sequences, so that few sequences leave a large GPU idle. Rows can't be
spread over programs, as `dgd_chunk` does: both layers and the normalisations need all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend import jit, on_device, precision, tl
from kernels import (
    BC,
    BI,
    EPS,
    FORWARD_WORK,
    _begins,
    _block,
    _dot,
    _matrix,
    _move,
    _normalized,
    _put_gates,
    _softplus,
    _steps,
    _store_tokens,
    _Stream,
    _tokens,
)


@jit
def _apply(W, x, o, left, O, PRECISION: tl.constexpr):
    """Rows o of W x, (BO, BC)."""
    y = tl.zeros((o.shape[0], BC), tl.float32)
    for i0 in tl.range(0, x.size, BI, disable_licm=True):
        i = i0 + tl.arange(0, BI)
        y += _dot(_matrix(W, o, i, O, x.size), _tokens(x, i, left), PRECISION)
    return y


@jit
def _layer_norm(y, e, E, eps: tl.constexpr = EPS):
    """`hope.layer_norm` of the columns of y (BE, BC), and what it divided them by."""
    y = tl.where((e < E)[:, None], y - tl.sum(y, 0)[None, :] / E, 0.0)
    std = tl.sqrt(tl.sum(y * y, 0) / E + eps * eps)
    return y / std[None, :], std


@jit
def _mlp(W2, W1, x, z, hidden, e, left, NORM: tl.constexpr, PRECISION: tl.constexpr):
    """x + y with y = W1 silu(W2 x), (BE, BC), or its layer norm, then y and the standard deviations that this divides
    by; leaves W2 x and silu(W2 x) in the streams z and hidden. Without W1, W2 x."""
    std, E = tl.full((BC,), 1.0, tl.float32), x.size
    if W1 is None:
        y = _apply(W2, x, e, left, E, PRECISION)
    else:
        tl.debug_barrier()
        for o0 in tl.range(0, z.size, e.shape[0], disable_licm=True):
            y = _apply(W2, x, o0 + e, left, z.size, PRECISION)
            _store_tokens(z, y, o0 + e, left)
            _store_tokens(hidden, y * tl.sigmoid(y), o0 + e, left)
        tl.debug_barrier()
        y = _apply(W1, hidden, e, left, E, PRECISION)
        if NORM:
            y, std = _layer_norm(y, e, E)
    return y if W1 is None else y + _tokens(x, e, left), y, std


@jit
def _gate(read, bias, head, x, e, left):
    """<read, x> + bias, a number a token (BC,)."""
    weight = tl.load(read + head * x.size + e, mask=e < x.size, other=0.0).to(tl.float32)
    return tl.sum(_tokens(x, e, left) * weight[:, None], 0) + tl.load(bias + head).to(tl.float32)


@jit
def _step(eta, x2, chunk, STEP: tl.constexpr):
    """The inner step for inputs of squared length x2: the minimiser of eq. 56, that over the chunk's length, or eta."""
    return eta if STEP == "one" else eta / (1.0 + eta * x2) / (chunk if STEP == "mean" else 1)


@jit
def _memory_scan(
    U, K, V, Q, eta, alpha, theta, at, W2, W1, m2, m1, A2, A1, S2, scale, eta_read, eta_bias, alpha_read, alpha_bias, Y,
    work, blocks, t0, length, heads, memories, adaptive, u_next, u_row, k_row, v_row, q_row, E, H,
    CHUNK: tl.constexpr, CHUNK_PROJ: tl.constexpr, L2: tl.constexpr, STEP: tl.constexpr, SELF_VALUES: tl.constexpr,
    QK_NORM: tl.constexpr, NORM: tl.constexpr, EMA: tl.constexpr, DELTA: tl.constexpr, HIDDEN_RATE: tl.constexpr,
    READ: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`memory_scan`. Grid (sequences x heads); at: (n, 7), where each one's part of the first seven begins.

    For every block of tokens: at a chunk's start now becomes anchor (A2, A1); the adaptive ones of k, v, q, eta, alpha
    are read from anchors; then for every memory, eqs. 84 and 88: its value; the inner loss's gradients at the outputs
    of both layers,  d1 = k + y - v,  d2 = (W1^T d1) silu'(z),  with the anchor; `_block` for each layer, the main
    memory's (the last one's) with reads. W1 is None for a linear memory, which has d1 only. With start states S2, W2 is
    what differs from them.
    """
    n = tl.program_id(0).to(tl.int64)
    head, at, size = n % heads, at + n * 7, E * H
    all_of_it, last = n * memories * size, (n * memories + memories - 1) * size
    if S2 is not None:
        S2 -= (n - head) * memories * size  # which sequences share, so that it is found where W2 is
    t, e = tl.arange(0, BC), tl.arange(0, BE)
    work += n * (FORWARD_WORK + BC * (1 + 4 * H + (1 + adaptive) * E))
    gates, retention = work, work + FORWARD_WORK
    z_at = retention + BC
    z, hidden = _Stream(z_at, H, H), _Stream(z_at + H * BC, H, H)
    d2, q1 = _Stream(z_at + 2 * H * BC, H, H), _Stream(z_at + 3 * H * BC, H, H)
    d1, reads = _Stream(z_at + 4 * H * BC, E, E), z_at + 4 * H * BC + E * BC
    # Reads of the adaptive memories follow one another in this order, and only theirs.
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
            _move(A2, W2, S2, all_of_it, (memories - 1) * size)
            if W1 is not None:
                _move(A1, W1, None, all_of_it, (memories - 1) * size)
        if (t0 + s) % CHUNK == 0:
            _move(A2, W2, S2, last, size)
            if W1 is not None:
                _move(A1, W1, None, last, size)
        tl.debug_barrier()
        if U is not None:
            for j in tl.range(0, adaptive, disable_licm=True):
                a2, a1 = A2 + all_of_it + j * size, None if W1 is None else A1 + all_of_it + j * size
                u = _Stream(U + tl.load(at) + s * u_row + j * u_next, u_row, E)
                y, plain, std = _mlp(a2, a1, u, z, hidden, e, left, NORM, PRECISION)
                if QK_NORM:
                    if (j == k_place) | (j == q_place):
                        y = _normalized(y)
                _store_tokens(_Stream(reads + j * E * BC, E, E), y, e, left)
            tl.debug_barrier()
        k = _Stream(reads, E, E) if K is None else _Stream(K + tl.load(at + 1) + s * k_row, k_row, E)
        v = _Stream(v_at, E, E) if V is None else _Stream(V + tl.load(at + 2) + s * v_row, v_row, E)
        q = _Stream(q_at, E, E) if Q is None else _Stream(Q + tl.load(at + 3) + s * q_row, q_row, E)
        if eta is not None:
            rate = _steps(eta + tl.load(at + 4) + s, left)
        else:
            rate = _gate(eta_read, eta_bias, head, _Stream(eta_at, E, E), e, left)
            rate = _softplus(rate)
        if alpha is not None:
            retained = alpha + tl.load(at + 5) + s
        else:
            retained = retention
            gate = _gate(alpha_read, alpha_bias, head, _Stream(alpha_at, E, E), e, left)
            tl.store(retention + t, tl.sigmoid(gate))
            tl.debug_barrier()
        th = None if theta is None else theta + tl.load(at + 6) + s
        _put_gates(gates, retained, th, left, EMA, READ == "after", PRECISION)
        out = _Stream(Y + (n * length + s) * E, E, E)
        if READ == "chunk":
            y, plain, std = _mlp(A2 + last, None if W1 is None else A1 + last, q, z, hidden, e, left, NORM, PRECISION)
            _store_tokens(out, y, e, left)
        for j in tl.range(0, memories, disable_licm=True):
            here = all_of_it + j * size
            a2, a1 = A2 + here, None if W1 is None else A1 + here
            value = _tokens(v, e, left)
            if SELF_VALUES:
                value, plain, std = _mlp(a2, a1, v, z, hidden, e, left, NORM, PRECISION)
                if scale is not None:
                    value = tl.load(scale + head * memories + j) * _normalized(value)
            found, y, std = _mlp(a2, a1, k, z, hidden, e, left, NORM, PRECISION)
            x, d = _tokens(k, e, left), found - value if L2 else -value
            if NORM and W1 is not None:
                d = (d - tl.sum(d, 0)[None, :] / E - y * (tl.sum(d * y, 0) / E)[None, :]) / std[None, :]
            _store_tokens(d2 if W1 is None else d1, d, e, left)
            slow = rate if W1 is None else rate * HIDDEN_RATE
            step, hidden2 = _step(slow, tl.sum(x * x, 0), CHUNK, STEP), tl.zeros((BC,), tl.float32)
            tl.debug_barrier()
            if W1 is not None:
                for o0 in tl.range(0, H, BE, disable_licm=True):
                    o, back = o0 + e, tl.zeros((BE, BC), tl.float32)
                    for i0 in tl.range(0, E, BI, disable_licm=True):
                        i = i0 + tl.arange(0, BI)
                        back += _dot(tl.trans(_matrix(a1, i, o, E, H)), _tokens(d1, i, left), PRECISION)
                    zs, hs = _tokens(z, o, left), _tokens(hidden, o, left)
                    _store_tokens(d2, back * tl.sigmoid(zs) * (1.0 + zs - hs), o, left)
                    hidden2 += tl.sum(hs * hs, 0)
                tl.debug_barrier()
            read, to_read = (j == memories - 1).to(tl.int32), None if READ == "chunk" else q
            w_m = None if theta is None else m2 + here
            for o0 in tl.range(0, H, BE, disable_licm=True):
                o = o0 + e
                r = _block(
                    W2 + here, w_m, k, d2, to_read, read, step, gates, o, left, None, DELTA, READ == "after", PRECISION
                )
                if READ != "chunk":
                    if W1 is None:
                        _store_tokens(out, r, e, left * read)
                    else:
                        if S2 is not None and read:
                            r += _apply(S2 + here, q, o, left, H, PRECISION)
                        _store_tokens(q1, r * tl.sigmoid(r), o, left * read)
            if W1 is not None:
                tl.debug_barrier()
                w_m, to_read = None if theta is None else m1 + here, None if READ == "chunk" else q1
                r = _block(
                    W1 + here, w_m, hidden, d1, to_read, read, _step(rate, hidden2, CHUNK, STEP), gates, e, left, None,
                    DELTA, READ == "after", PRECISION,
                )  # fmt: skip
                if READ != "chunk":
                    if NORM:
                        r, std = _layer_norm(r, e, E)
                    _store_tokens(out, r + _tokens(q, e, left), e, left * read)
            tl.debug_barrier()
        s += left


def memory_scan(
    streams: dict[str, Tensor], now: list[Tensor], momentum: list[Tensor] | None, anchor: list[Tensor], *,
    t: int, chunk: int, chunk_proj: int, adaptive: int, gates: dict[str, tuple[Tensor, Tensor]], scale: Tensor | None,
    objective: str, step: str, read: str, self_values: bool, qk_norm: bool, norm: bool, delta: bool,
    hidden_rate: float, start: Tensor | None,
) -> Tensor:  # fmt: skip
    """All tokens of a `hope.Memory`, which defines what this computes, in one launch: no state leaves the GPU's kernel
    from chunk to chunk. Without gradients; float32.

    Args:
        streams: what does not depend on a memory: u (b, h, s, 1 or `adaptive`, e), k, v, q (b, h, s, e), eta, alpha,
            theta (b, h, s). Of k, v, q, eta, alpha those left out are read from the first `adaptive` memories, in this
            order, all at one u or each at its own.
        now, momentum, anchor: per layer (b, h, n, o, i), the main memory last, contiguous: *changed in place*.
        t: tokens before the first; chunks begin at multiples of `chunk` (main memory) and `chunk_proj` (the others).
        gates: (read (h, 1, e), bias (h, 1)) of eta and alpha where they are adaptive.
        scale: (h, n, 1, 1) of self-generated values, which are normalised then.
        hidden_rate: what part of eta an MLP memory's hidden layer is written with.
        start: (h, n, o, i), what decay and delta term take that layer back to; None for 0.

    Returns y (b, h, s, e). ValueError for states that can't be changed in place.
    """
    if any(z.dtype != torch.float32 or not z.is_contiguous() for z in (*now, *(momentum or ()), *anchor)):
        raise ValueError("memory_scan: states are changed in place; pass them as .float().contiguous()")
    b, h, n, H, E = now[0].shape
    length, device = next(iter(streams.values())).shape[2], now[0].device
    names = "u", "k", "v", "q", "eta", "alpha", "theta"
    inputs = [streams.get(name) for name in names]
    inputs = [z if z is None or z.stride(-1) == 1 else z.contiguous() for z in inputs]
    layouts = tuple(((), ()) if z is None else (tuple(z.shape[:2]), z.stride()[:2]) for z in inputs)
    rows = {f"{name}_row": 0 if z is None else z.stride(2) for name, z in zip(names[:4], inputs)}
    u_next = 0 if inputs[0] is None or inputs[0].shape[3] == 1 else inputs[0].stride(3)
    both = lambda layers: (None, None) if layers is None else (*layers, None)[:2]
    eta_gate, alpha_gate = (gates.get(name, (None, None)) for name in ("eta", "alpha"))
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=device)
    Y = new(b, h, length, E)
    if Y.numel() == 0:
        return Y
    BE = 64 if E <= 64 else 128
    work = new(b * h, FORWARD_WORK.value + BC.value * (1 + 4 * H + (1 + adaptive) * E))
    if start is not None:
        start = start.contiguous()
        now[0].sub_(start)
    blocks, s = 0, t
    while s < t + length:
        blocks, s = blocks + 1, min(s + BC.value, t + length, s - s % chunk + chunk, s - s % chunk_proj + chunk_proj)
    with on_device(device):
        _memory_scan[(b * h,)](
            *inputs, _begins((b, h), layouts, device), *both(now), *both(momentum), *both(anchor), start, scale,
            *eta_gate, *alpha_gate, Y, work, blocks, t, length, h, n, adaptive, u_next, **rows, E=E, H=H, CHUNK=chunk,
            CHUNK_PROJ=chunk_proj, L2=objective == "l2", STEP=step, SELF_VALUES=self_values, QK_NORM=qk_norm, NORM=norm,
            EMA=True, DELTA=delta, HIDDEN_RATE=hidden_rate, READ=read, BE=BE, PRECISION=precision(device),
            num_warps=BE // 16, num_stages=1,
        )  # fmt: skip
    if start is not None:
        now[0].add_(start)
    return Y
