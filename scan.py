"""A memory layer with MLP memories on a GPU, with gradients: one launch forward, one more and one back.

    layer_fits      whether there is such a launch for a layer's settings, and for tensors like one
    memory_layer    what `hope.Memory` does with whole chunks

`kernels.memory_scan` is the same without gradients, for any number of tokens and every kind of memory.

Work: a program has one head of one sequence and goes through its chunks; in each, through its memories, which share
keys, values and gates. All tokens of a chunk are one tile, and so is every matrix of a memory: with chunks of 64 and
heads of 64 each product is 64 x 64 x 64. The letters are those of kernels.py: tokens are the last axis of all, scores
and gates (C, C) are [s, t] for a write at s and time t, states and gradients stay in the cache.

Memory: the backward pass needs the states that chunks start from; all else in a chunk it computes again. The forward
pass has two of them in turn, or keeps them all; where it did not, the backward pass begins by running it once more.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backend import constexpr, jit, on_device, precision, tl, uses_triton
from kernels import (
    EPS, _begins, _dot, _End, _GateGradients, _gates, _gates_backward, _matrix, _normalized, _softplus, _steps,
    _store_matrix, _store_tokens, _Stream, _tokens,
)  # fmt: skip

SQUARES = constexpr(6)  # (C, C) each in a program's work: between, gain, S, inverse of `_Chunk`; gradients of the first

# What all memories share, from the program's first token on; None for what is read from memories.
_Streams = namedtuple("_Streams", "u k v q eta alpha theta u_next u_row k_row v_row q_row")
# Read-outs of eta and alpha, (E,) and a number each, of the program's head.
_Gates = namedtuple("_Gates", "eta_read eta_bias alpha_read alpha_bias")
# Where what is read of memories, or the gradient of it, lies in work: tiles (E, C) in this order, only of those read.
_Reads = namedtuple("_Reads", "k v q eta alpha")
# A chunk: streams; step sizes eta; the hidden layers' inner steps; what reads have of the chunk's start (C,); its `_End`.
_Chunk = namedtuple("_Chunk", "k v q eta step2 before gain_m end work")
# The matrices of one memory: W2 (H, E), W1 (E, H), their momenta; W2's start state; the factor of its values.
_Memory = namedtuple("_Memory", "W2 W1 m2 m1 S2 scale")
# Of a layer in a chunk: its inputs x, the gradients d, p = M_{t-1} x_t, inner steps, scores S, (1 + between S)^-1.
_Layer = namedtuple("_Layer", "x d p step S inverse")


@jit
def _square(work, k, C: tl.constexpr):
    """Where the k-th square of a program's work is."""
    t = tl.arange(0, C)
    return work + k * C * C + t[:, None] * C + t[None, :]


@jit
def _inverse(A, C: tl.constexpr, PRECISION: tl.constexpr):
    """(1 + A)^-1 for A (C, C) strictly upper triangular, C up to 64: of the 16 x 16 blocks on the diagonal by
    substitution, a token of each after the other; with T, what these give, N = T (A without them) has N^4 = 0."""
    EXACT: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32x3"
    s, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    near = s // 16 == t // 16
    T, A_T = tl.where(s == t, 1.0, 0.0), tl.trans(tl.where(near, A, 0.0))
    for token in tl.range(1, 16, disable_licm=True):
        row = tl.sum(tl.where(s % 16 == token, A_T, 0.0), 0)
        T = tl.where(near & (t % 16 == token), T - tl.sum(T * row[None, :], 1)[:, None], T)
    if C > 16:
        N = _dot(T, tl.where(near, 0.0, A), EXACT)
        T -= _dot(N, T, EXACT)
        if C > 32:
            T += _dot(_dot(N, N, EXACT), T, EXACT)
    return T


@jit
def _slope(z):
    """The derivative of silu."""
    g = tl.sigmoid(z)
    return g * (1.0 + z * (1.0 - g))


@jit
def _bend(z):
    """The derivative of `_slope`."""
    g = tl.sigmoid(z)
    return g * (1.0 - g) * (2.0 + z * (1.0 - 2.0 * g))


@jit
def _answer(w2, w1, x, PRECISION: tl.constexpr):
    """x + W1 silu(W2 x), and W2 x."""
    z = _dot(w2, x, PRECISION)
    return x + _dot(w1, z * tl.sigmoid(z), PRECISION), z


@jit
def _answer_backward(w2, w1, x, z, dy, PRECISION: tl.constexpr):
    """Gradients of W2, W1 and x."""
    dz = _dot(tl.trans(w1), dy, PRECISION) * _slope(z)
    dw1 = _dot(dy, tl.trans(z * tl.sigmoid(z)), PRECISION)
    return _dot(dz, tl.trans(x), PRECISION), dw1, dy + _dot(tl.trans(w2), dz, PRECISION)


@jit
def _normalized_backward(x, dy, eps: tl.constexpr = EPS):
    """The gradient of x from that of _normalized(x)."""
    n = tl.sqrt(tl.sum(x * x, 0))
    y = x / tl.maximum(n, eps)[None, :]
    along = tl.where(n > eps, tl.sum(dy * y, 0), 0.0)
    return (dy - y * along[None, :]) / tl.maximum(n, eps)[None, :]


@jit
def _reads_at(x, at, size):
    """`_Reads` from `at` on, for tiles of `size` numbers."""
    v = at + (size if x.k is None else 0)
    q = v + (size if x.v is None else 0)
    eta = q + (size if x.q is None else 0)
    return _Reads(at, v, q, eta, eta + (size if x.eta is None else 0))


@jit
def _normal(x, j, QK_NORM: tl.constexpr):
    """Whether what memory j is read for is normalised: keys and queries."""
    q_place = (1 if x.k is None else 0) + (1 if x.v is None else 0) if x.q is None else -1
    return QK_NORM & ((j == (0 if x.k is None else -1)) | (j == q_place))


@jit
def _memory(states, plane, j, scale, S2, E, H):
    """Where memory j of the program is: states (4, all memories of all programs, E H), a plane for each matrix."""
    here = states + j * E * H
    start = S2 if S2 is None else S2 + j * E * H
    factor = scale if scale is None else scale + j
    return _Memory(here, here + plane, here + 2 * plane, here + 3 * plane, start, factor)


@jit
def _inputs(x, s, j, E):
    """The stream of what memory j is read at, from token s on."""
    return _Stream(x.u + s * x.u_row + j * x.u_next, x.u_row, E)


@jit
def _begin_chunk(
    x, gates, states, plane, work, s, adaptive, E, H, CHUNK: tl.constexpr, QK_NORM: tl.constexpr,
    HIDDEN_RATE: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk from token s on: what adaptive memories answer, and what memories share."""
    e, h, t = tl.arange(0, BE), tl.arange(0, BH), tl.arange(0, C)
    retention, tiles = work + SQUARES * C * C, work + SQUARES * C * C + C
    tl.debug_barrier()
    for j in tl.range(0, adaptive, disable_licm=True):
        m = _memory(states, plane, j, None, None, E, H)
        u = _tokens(_inputs(x, s, j, E), e, CHUNK, C)
        y, z = _answer(_matrix(m.W2, h, e, H, E), _matrix(m.W1, e, h, E, H), u, PRECISION)
        y = tl.where(_normal(x, j, QK_NORM), _normalized(y), y)
        _store_tokens(_Stream(tiles + j * E * C, E, E), y, e, CHUNK, C)
    tl.debug_barrier()
    at = _reads_at(x, tiles, E * C)
    k = _Stream(at.k, E, E) if x.k is None else _Stream(x.k + s * x.k_row, x.k_row, E)
    v = _Stream(at.v, E, E) if x.v is None else _Stream(x.v + s * x.v_row, x.v_row, E)
    q = _Stream(at.q, E, E) if x.q is None else _Stream(x.q + s * x.q_row, x.q_row, E)
    if x.eta is None:
        eta = _softplus(_gate(gates.eta_read, gates.eta_bias, at.eta, E, CHUNK, C, BE))
    else:
        eta = _steps(x.eta + s, CHUNK, C)
    alpha = retention if x.alpha is None else x.alpha + s
    if x.alpha is None:
        tl.store(retention + t, tl.sigmoid(_gate(gates.alpha_read, gates.alpha_bias, at.alpha, E, CHUNK, C, BE)))
        tl.debug_barrier()
    g = _gates(alpha, x.theta + s, CHUNK, True, PRECISION, C)
    keys = _tokens(k, e, CHUNK, C)
    step2 = _step(HIDDEN_RATE * eta, keys)
    S = _dot(tl.trans(keys * step2[None, :]), keys, PRECISION)
    tl.store(_square(work, 0, C), g.reads.between)
    tl.store(_square(work, 1, C), g.reads.gain)
    tl.store(_square(work, 2, C), S)
    tl.store(_square(work, 3, C), _inverse(g.reads.between * S, C, PRECISION))
    tl.debug_barrier()
    return _Chunk(k, v, q, eta, step2, g.reads.before, g.reads.gain_m, g.end, work), g


@jit
def _gate(read, bias, at, E, CHUNK: tl.constexpr, C: tl.constexpr, BE: tl.constexpr):
    """<read, x> + bias, a number a token (C,), for the tile x at `at`."""
    e = tl.arange(0, BE)
    x = _tokens(_Stream(at, E, E), e, CHUNK, C)
    return tl.sum(x * tl.load(read + e, mask=e < E, other=0.0)[:, None], 0) + tl.load(bias)


@jit
def _step(eta, x):
    """The minimiser of eq. 56 for every input x."""
    return eta / (1.0 + eta * tl.sum(x * x, 0))


@jit
def _step_backward(eta, x, d_step):
    """Gradients of eta and x, of which `_step` makes the inner step."""
    part = 1.0 / (1.0 + eta * tl.sum(x * x, 0))
    return d_step * part * part, x * (-2.0 * d_step * (eta * part) * (eta * part))[None, :]


@jit
def _layers(
    c, m, E, H, CHUNK: tl.constexpr, L2: tl.constexpr, SELF_VALUES: tl.constexpr, C: tl.constexpr, BE: tl.constexpr,
    BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A memory's two layers in a chunk, W2's then W1's, and z = W2 k: eqs. 84 and 88."""
    e, h = tl.arange(0, BE), tl.arange(0, BH)
    w2, w1 = _matrix(m.W2, h, e, H, E), _matrix(m.W1, e, h, E, H)
    k, value = _tokens(c.k, e, CHUNK, C), _tokens(c.v, e, CHUNK, C)
    if SELF_VALUES:
        value, z = _answer(w2, w1, value, PRECISION)
        value = tl.load(m.scale) * _normalized(value)
    z = _dot(w2, k, PRECISION)
    hidden = z * tl.sigmoid(z)
    y = _dot(w1, hidden, PRECISION)
    d1 = k + y - value if L2 else -value
    d2 = _dot(tl.trans(w1), d1, PRECISION) * _slope(z)
    between, gain = tl.load(_square(c.work, 0, C)), tl.load(_square(c.work, 1, C))
    S2, inverse2 = tl.load(_square(c.work, 2, C)), tl.load(_square(c.work, 3, C))
    found = z if m.S2 is None else z - _dot(_matrix(m.S2, h, e, H, E), k, PRECISION)
    found = c.before[None, :] * found + c.gain_m[None, :] * _dot(_matrix(m.m2, h, e, H, E), k, PRECISION)
    p2 = _dot(found - _dot(d2, gain * S2, PRECISION), inverse2, PRECISION)
    step1 = _step(c.eta, hidden)
    S1 = _dot(tl.trans(hidden * step1[None, :]), hidden, PRECISION)
    inverse1 = _inverse(between * S1, C, PRECISION)
    found = c.before[None, :] * y + c.gain_m[None, :] * _dot(_matrix(m.m1, e, h, E, H), hidden, PRECISION)
    p1 = _dot(found - _dot(d1, gain * S1, PRECISION), inverse1, PRECISION)
    return _Layer(k, d2, p2, c.step2, S2, inverse2), _Layer(hidden, d1, p1, step1, S1, inverse1), z


@jit
def _read(c, layer, M, m, q, C: tl.constexpr, PRECISION: tl.constexpr):
    """M_{t-1} q_t of a layer with matrix M and momentum m, as tiles."""
    S = _dot(tl.trans(layer.x * layer.step[None, :]), q, PRECISION)
    between, gain = tl.load(_square(c.work, 0, C)), tl.load(_square(c.work, 1, C))
    r = c.before[None, :] * _dot(M, q, PRECISION) + c.gain_m[None, :] * _dot(m, q, PRECISION)
    return r - _dot(layer.d, gain * S, PRECISION) - _dot(layer.p, between * S, PRECISION)


@jit
def _read_hidden(c, m, layer, q, E, H, C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr):
    """The same of W2, which moves from its start state on."""
    e, h = tl.arange(0, BE), tl.arange(0, BH)
    w2, m2 = _matrix(m.W2, h, e, H, E), _matrix(m.m2, h, e, H, E)
    if m.S2 is None:
        r = _read(c, layer, w2, m2, q, C, PRECISION)
    else:
        start = _matrix(m.S2, h, e, H, E)
        r = _read(c, layer, w2 - start, m2, q, C, PRECISION) + _dot(start, q, PRECISION)
    return r


@jit
def _end(c, layer, M, m, PRECISION: tl.constexpr):
    """Tiles of a layer's matrix and momentum at the chunk's end."""
    xe, end = tl.trans(layer.x * layer.step[None, :]), c.end
    writes = end.gain[None, :] * layer.d + end.after[None, :] * layer.p
    M_end = end.all * M + end.gain_m * m - _dot(writes, xe, PRECISION)
    return M_end, end.keep_m * m - _dot(end.keep[None, :] * layer.d, xe, PRECISION)


@jit
def _layer_forward(
    u, k, v, q, eta, alpha, theta, at, states, S2, scale, eta_read, eta_bias, alpha_read, alpha_bias, Y, work,
    chunks, slots, heads, memories, adaptive, u_next, u_row, k_row, v_row, q_row, work_size, E, H,
    CHUNK: tl.constexpr, L2: tl.constexpr, SELF_VALUES: tl.constexpr, QK_NORM: tl.constexpr, HIDDEN_RATE: tl.constexpr,
    C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`memory_layer`. Grid (sequences x heads); at: (n, 7), where each one's part of the first seven begins; states:
    (slots, 4, n, memories, E H), the first one given, those at the start of chunk i in slot i modulo `slots`."""
    n = tl.program_id(0).to(tl.int64)
    head, e, h = n % heads, tl.arange(0, BE), tl.arange(0, BH)
    x = _at_program(u, k, v, q, eta, alpha, theta, at + n * 7, u_next, u_row, k_row, v_row, q_row)
    gates = _at_head(eta_read, eta_bias, alpha_read, alpha_bias, head, E)
    plane = tl.num_programs(0).to(tl.int64) * memories * E * H
    states += n * memories * E * H
    S2 = S2 if S2 is None else S2 + head * memories * E * H
    scale = scale if scale is None else scale + head * memories
    work += n * work_size
    for chunk in tl.range(0, chunks, disable_licm=True):
        now, new = states + chunk % slots * 4 * plane, states + (chunk + 1) % slots * 4 * plane
        s = chunk * CHUNK
        c, g = _begin_chunk(
            x, gates, now, plane, work, s, adaptive, E, H, CHUNK, QK_NORM, HIDDEN_RATE, C, BE, BH, PRECISION
        )
        for j in tl.range(0, memories, disable_licm=True):
            m, to = _memory(now, plane, j, scale, S2, E, H), _memory(new, plane, j, scale, S2, E, H)
            hidden, out, z = _layers(c, m, E, H, CHUNK, L2, SELF_VALUES, C, BE, BH, PRECISION)
            w2, m2 = _matrix(m.W2, h, e, H, E), _matrix(m.m2, h, e, H, E)
            if S2 is None:
                w2, m2 = _end(c, hidden, w2, m2, PRECISION)
            else:
                start = _matrix(m.S2, h, e, H, E)
                w2, m2 = _end(c, hidden, w2 - start, m2, PRECISION)
                w2 += start
            w1, m1 = _end(c, out, _matrix(m.W1, e, h, E, H), _matrix(m.m1, e, h, E, H), PRECISION)
            _store_matrix(to.W2, w2, h, e, H, E)
            _store_matrix(to.W1, w1, e, h, E, H)
            _store_matrix(to.m2, m2, h, e, H, E)
            _store_matrix(to.m1, m1, e, h, E, H)
            if j == memories - 1:
                queries = _tokens(c.q, e, CHUNK, C)
                r = _read_hidden(c, m, hidden, queries, E, H, C, BE, BH, PRECISION)
                w1, m1 = _matrix(m.W1, e, h, E, H), _matrix(m.m1, e, h, E, H)
                y = queries + _read(c, out, w1, m1, r * tl.sigmoid(r), C, PRECISION)
                _store_tokens(_Stream(Y + (n * chunks * CHUNK + s) * E, E, E), y, e, CHUNK, C)


@jit
def _at_program(u, k, v, q, eta, alpha, theta, at, u_next, u_row, k_row, v_row, q_row):
    return _Streams(
        u if u is None else u + tl.load(at), k if k is None else k + tl.load(at + 1),
        v if v is None else v + tl.load(at + 2), q if q is None else q + tl.load(at + 3),
        eta if eta is None else eta + tl.load(at + 4), alpha if alpha is None else alpha + tl.load(at + 5),
        theta + tl.load(at + 6), u_next, u_row, k_row, v_row, q_row,
    )  # fmt: skip


@jit
def _at_head(eta_read, eta_bias, alpha_read, alpha_bias, head, E):
    return _Gates(
        eta_read if eta_read is None else eta_read + head * E, eta_bias if eta_bias is None else eta_bias + head,
        alpha_read if alpha_read is None else alpha_read + head * E,
        alpha_bias if alpha_bias is None else alpha_bias + head,
    )  # fmt: skip


# ---- Backward ----

# Gradients of one layer's part in a chunk: of its matrix and momentum at the start, of what makes its writes.
_LayerGradients = namedtuple("_LayerGradients", "M m x d step q gates")


@jit
def _nothing(C: tl.constexpr):
    """`_GateGradients` of 0, but for those of squares, which lie in work."""
    line, number = tl.zeros((C,), tl.float32), tl.sum(tl.zeros((C,), tl.float32))
    return _GateGradients(number, number, line, line, line, line, line, number, number, number)


@jit
def _sum(a, b):
    """Of two `_GateGradients`, without the squares."""
    return _GateGradients(
        a.between, a.gain, a.before + b.before, a.gain_m + b.gain_m, a.after + b.after, a.gain_end + b.gain_end,
        a.keep + b.keep, a.all + b.all, a.gain_m_end + b.gain_m_end, a.keep_m + b.keep_m,
    )  # fmt: skip


@jit
def _layer_backward(c, layer, M, m, E, E_m, q, dr, read, C: tl.constexpr, PRECISION: tl.constexpr):
    """From the gradients E and E_m of the chunk's end, and dr of what is read at q if `read`: that of `_end` and `_read`,
    with what made p. In the letters of `kernels._chunk_backward`; U = E (step x)^T, dz is the gradient of what the
    solve turns into p. Adds those of between and gain to work."""
    x, d, p, end = layer.x, layer.d, layer.p, c.end
    xe = x * layer.step[None, :]
    between, gain = tl.load(_square(c.work, 0, C)), tl.load(_square(c.work, 1, C))
    d_between, d_gain = tl.load(_square(c.work, 4, C)), tl.load(_square(c.work, 5, C))
    U, U_m = _dot(E, xe, PRECISION), _dot(E_m, xe, PRECISION)
    dz, dd = -end.after[None, :] * U, -end.gain[None, :] * U - end.keep[None, :] * U_m
    dxe = -_dot(tl.trans(E), end.gain[None, :] * d + end.after[None, :] * p, PRECISION)
    dxe -= _dot(tl.trans(E_m), end.keep[None, :] * d, PRECISION)
    dM, dm = end.all * E, end.keep_m * E_m + end.gain_m * E
    dq, d_before, d_gain_m = tl.zeros_like(x), tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    if read:
        S = _dot(tl.trans(xe), q, PRECISION)
        of_d, of_p = _dot(tl.trans(d), dr, PRECISION), _dot(tl.trans(p), dr, PRECISION)
        dd -= _dot(dr, tl.trans(gain * S), PRECISION)
        dz -= _dot(dr, tl.trans(between * S), PRECISION)
        d_gain, d_between = d_gain - S * of_d, d_between - S * of_p
        minus_dS = gain * of_d + between * of_p
        y, y_m = _dot(tl.trans(M), dr, PRECISION), _dot(tl.trans(m), dr, PRECISION)
        dq = c.before[None, :] * y + c.gain_m[None, :] * y_m - _dot(xe, minus_dS, PRECISION)
        dxe -= _dot(q, tl.trans(minus_dS), PRECISION)
        d_before, d_gain_m = tl.sum(q * y, 0), tl.sum(q * y_m, 0)
        dM += _dot(c.before[None, :] * dr, tl.trans(q), PRECISION)
        dm += _dot(c.gain_m[None, :] * dr, tl.trans(q), PRECISION)
    dz = _dot(dz, tl.trans(layer.inverse), PRECISION)
    dd -= _dot(dz, tl.trans(gain * layer.S), PRECISION)
    of_d, of_p = _dot(tl.trans(d), dz, PRECISION), _dot(tl.trans(p), dz, PRECISION)
    d_gain, d_between = d_gain - layer.S * of_d, d_between - layer.S * of_p
    minus_dS = gain * of_d + between * of_p
    y, y_m = _dot(tl.trans(M), dz, PRECISION), _dot(tl.trans(m), dz, PRECISION)
    dx = c.before[None, :] * y + c.gain_m[None, :] * y_m - _dot(xe, minus_dS, PRECISION)
    dxe -= _dot(x, tl.trans(minus_dS), PRECISION)
    d_before, d_gain_m = d_before + tl.sum(x * y, 0), d_gain_m + tl.sum(x * y_m, 0)
    dM += _dot(c.before[None, :] * dz, tl.trans(x), PRECISION)
    dm += _dot(c.gain_m[None, :] * dz, tl.trans(x), PRECISION)
    tl.debug_barrier()
    tl.store(_square(c.work, 4, C), d_between)
    tl.store(_square(c.work, 5, C), d_gain)
    tl.debug_barrier()
    gates = _GateGradients(
        0.0, 0.0, d_before, d_gain_m, -tl.sum(p * U, 0), -tl.sum(d * U, 0), -tl.sum(d * U_m, 0),
        tl.sum(M * E), tl.sum(m * E), tl.sum(m * E_m),
    )  # fmt: skip
    return _LayerGradients(dM, dm, dx + dxe * layer.step[None, :], dd, tl.sum(dxe * x, 0), dq, gates)


@jit
def _add_tokens(to, value, i, CHUNK: tl.constexpr, C: tl.constexpr):
    """Add a tile to what a stream holds."""
    value += _tokens(to, i, CHUNK, C)
    tl.debug_barrier()
    _store_tokens(to, value, i, CHUNK, C)


@jit
def _memory_backward(
    c, m, d, dS2, d_scale, dk, dv, dq, dy, read, E, H, CHUNK: tl.constexpr, L2: tl.constexpr, SELF_VALUES: tl.constexpr,
    HIDDEN_RATE: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Turns the gradients of a memory's matrices at the chunk's end, in the `_Memory` d, to those at its start, in place;
    adds to dS2 and d_scale, and to the streams dk, dv, dq. Returns what it adds to eta's and the gates'."""
    e, h = tl.arange(0, BE), tl.arange(0, BH)
    hidden, out, z = _layers(c, m, E, H, CHUNK, L2, SELF_VALUES, C, BE, BH, PRECISION)
    w2, w1 = _matrix(m.W2, h, e, H, E), _matrix(m.W1, e, h, E, H)
    m2, m1 = _matrix(m.m2, h, e, H, E), _matrix(m.m1, e, h, E, H)
    q, r = tl.zeros((BE, C), tl.float32), tl.zeros((BH, C), tl.float32)
    if read:
        q = _tokens(c.q, e, CHUNK, C)
        r = _read_hidden(c, m, hidden, q, E, H, C, BE, BH, PRECISION)
    of_out = _layer_backward(
        c, out, w1, m1, _matrix(d.W1, e, h, E, H), _matrix(d.m1, e, h, E, H),
        r * tl.sigmoid(r), _tokens(dy, e, CHUNK, C), read, C, PRECISION,
    )  # fmt: skip
    dr, E2 = of_out.q * _slope(r), _matrix(d.W2, h, e, H, E)
    change = w2 if m.S2 is None else w2 - _matrix(m.S2, h, e, H, E)
    of_hidden = _layer_backward(
        c, hidden, change, m2, E2, _matrix(d.m2, h, e, H, E), q, dr, read, C, PRECISION
    )
    if read:
        more = of_hidden.q
        if m.S2 is not None:
            more += _dot(tl.trans(_matrix(m.S2, h, e, H, E)), dr, PRECISION)
        _add_tokens(dq, more, e, CHUNK, C)
    if m.S2 is not None:
        more = E2 - of_hidden.M + _matrix(dS2, h, e, H, E)
        if read:
            more += _dot(dr, tl.trans(q), PRECISION)
        tl.debug_barrier()
        _store_matrix(dS2, more, h, e, H, E)
    # Inner steps; then the inner loss's gradients  d1 = k + y - value,  d2 = (W1^T d1) silu'(z),  y = W1 silu(z).
    d_eta, dh = _step_backward(c.eta, out.x, of_out.step)
    d_eta2, d_keys = _step_backward(HIDDEN_RATE * c.eta, hidden.x, of_hidden.step)
    d_eta += HIDDEN_RATE * d_eta2
    d_keys += of_hidden.x
    dh += of_out.x
    back = _dot(tl.trans(w1), out.d, PRECISION)
    d_back, dz = of_hidden.d * _slope(z), of_hidden.d * back * _bend(z)
    d1 = of_out.d + _dot(w1, d_back, PRECISION)
    d_w1 = of_out.M + _dot(out.d, tl.trans(d_back), PRECISION)
    if L2:
        d_keys += d1
        d_w1 += _dot(d1, tl.trans(out.x), PRECISION)
        dh += _dot(tl.trans(w1), d1, PRECISION)
    dz += dh * _slope(z)
    d_w2 = of_hidden.M + _dot(dz, tl.trans(hidden.x), PRECISION)
    d_keys += _dot(tl.trans(w2), dz, PRECISION)
    d_value = -d1
    if SELF_VALUES:
        v = _tokens(c.v, e, CHUNK, C)
        value, zv = _answer(w2, w1, v, PRECISION)
        more_scale = tl.load(d_scale) + tl.sum(d_value * _normalized(value))
        d_value = _normalized_backward(value, tl.load(m.scale) * d_value)
        more_w2, more_w1, d_value = _answer_backward(w2, w1, v, zv, d_value, PRECISION)
        d_w2, d_w1 = d_w2 + more_w2, d_w1 + more_w1
        tl.debug_barrier()
        tl.store(d_scale, more_scale)
    _add_tokens(dk, d_keys, e, CHUNK, C)
    _add_tokens(dv, d_value, e, CHUNK, C)
    _store_matrix(d.W2, d_w2, h, e, H, E)
    _store_matrix(d.W1, d_w1, e, h, E, H)
    _store_matrix(d.m2, of_hidden.m, h, e, H, E)
    _store_matrix(d.m1, of_out.m, e, h, E, H)
    tl.debug_barrier()
    return d_eta, _sum(of_out.gates, of_hidden.gates)


@jit
def _gate_backward(read, d_read, d_bias, at, to, d, E, CHUNK: tl.constexpr, C: tl.constexpr, BE: tl.constexpr):
    """Of `_gate`, with the gradient d (C,) of what it returns: that of the tile at `at`, to `to`; adds to the others."""
    e = tl.arange(0, BE)
    weight = tl.load(read + e, mask=e < E, other=0.0)
    _store_tokens(_Stream(to, E, E), weight[:, None] * d[None, :], e, CHUNK, C)
    more = tl.sum(_tokens(_Stream(at, E, E), e, CHUNK, C) * d[None, :], 1)
    tl.store(d_read + e, tl.load(d_read + e, mask=e < E) + more, mask=e < E)
    d = tl.sum(tl.where(tl.arange(0, C) < CHUNK, d, 0.0))
    tl.store(d_bias, tl.load(d_bias) + d)


@jit
def _layer_backward_chunks(
    u, k, v, q, eta, alpha, theta, at, states, S2, scale, eta_read, eta_bias, alpha_read, alpha_bias,
    dY, du, dk, dv, dq, d_eta, d_alpha, d_theta, d_states, dS2, d_scale, d_eta_read, d_eta_bias, d_alpha_read,
    d_alpha_bias, work,
    chunks, heads, memories, adaptive, u_next, u_row, k_row, v_row, q_row, work_size, E, H,
    CHUNK: tl.constexpr, L2: tl.constexpr, SELF_VALUES: tl.constexpr, QK_NORM: tl.constexpr, HIDDEN_RATE: tl.constexpr,
    C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The backward pass of `_layer_forward`, with the states of all chunks, on the same grid: from the last chunk on.
    d_states (4, n, memories, E H) comes as the gradients of the end and leaves as those of the start. du (n, s,
    adaptive, E), dk, dv, dq (n, s, E), d_eta, d_alpha, d_theta (n, s); of what sequences share each program has its own
    part: dS2 (n, memories, E H), d_scale (n, memories), d_.._read (n, E), d_.._bias (n,), which come as 0."""
    n = tl.program_id(0).to(tl.int64)
    head, e, h, t = n % heads, tl.arange(0, BE), tl.arange(0, BH), tl.arange(0, C)
    x = _at_program(u, k, v, q, eta, alpha, theta, at + n * 7, u_next, u_row, k_row, v_row, q_row)
    gates = _at_head(eta_read, eta_bias, alpha_read, alpha_bias, head, E)
    size = E * H
    plane = tl.num_programs(0).to(tl.int64) * memories * size
    states, d_states = states + n * memories * size, d_states + n * memories * size
    S2 = S2 if S2 is None else S2 + head * memories * size
    scale = scale if scale is None else scale + head * memories
    dS2 = dS2 if dS2 is None else dS2 + n * memories * size
    d_scale = d_scale if d_scale is None else d_scale + n * memories
    work += n * work_size
    tiles = work + SQUARES * C * C + C
    found, back = _reads_at(x, tiles, E * C), _reads_at(x, tiles + adaptive * E * C, E * C)
    first = n * chunks * CHUNK  # token
    for i in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - i
        now, s = states + chunk * 4 * plane, chunk * CHUNK
        c, g = _begin_chunk(
            x, gates, now, plane, work, s, adaptive, E, H, CHUNK, QK_NORM, HIDDEN_RATE, C, BE, BH, PRECISION
        )
        to_k = _Stream(back.k, E, E) if dk is None else _Stream(dk + (first + s) * E, E, E)
        to_v = _Stream(back.v, E, E) if dv is None else _Stream(dv + (first + s) * E, E, E)
        to_q = _Stream(back.q, E, E) if dq is None else _Stream(dq + (first + s) * E, E, E)
        dy, zeros = _Stream(dY + (first + s) * E, E, E), tl.zeros((BE, C), tl.float32)
        _store_tokens(to_k, zeros, e, CHUNK, C)
        _store_tokens(to_v, zeros, e, CHUNK, C)
        _store_tokens(to_q, _tokens(dy, e, CHUNK, C), e, CHUNK, C)
        tl.store(_square(work, 4, C), tl.zeros((C, C), tl.float32))
        tl.store(_square(work, 5, C), tl.zeros((C, C), tl.float32))
        tl.debug_barrier()
        d_rate, dg = tl.zeros((C,), tl.float32), _nothing(C)
        for j in tl.range(0, memories, disable_licm=True):
            m, d = _memory(now, plane, j, scale, S2, E, H), _memory(d_states, plane, j, None, None, E, H)
            to_start, to_scale = dS2 if dS2 is None else dS2 + j * size, d_scale if d_scale is None else d_scale + j
            more, more_g = _memory_backward(
                c, m, d, to_start, to_scale, to_k, to_v, to_q, dy, (j == memories - 1).to(tl.int32), E, H, CHUNK, L2,
                SELF_VALUES, HIDDEN_RATE, C, BE, BH, PRECISION,
            )  # fmt: skip
            d_rate, dg = d_rate + more, _sum(dg, more_g)
        dg = _GateGradients(
            tl.load(_square(work, 4, C)), tl.load(_square(work, 5, C)), dg.before, dg.gain_m, dg.after, dg.gain_end,
            dg.keep, dg.all, dg.gain_m_end, dg.keep_m,
        )  # fmt: skip
        zero, zeros = tl.zeros((C,), tl.float32), tl.zeros((C, C), tl.float32)
        da, dth = _gates_backward(g, theta, dg, zeros, zero, True, PRECISION)
        tl.store(d_theta + first + s + t, dth, mask=t < CHUNK)
        if eta is None:
            rate = _gate(gates.eta_read, gates.eta_bias, found.eta, E, CHUNK, C, BE)
            d_rate *= tl.sigmoid(rate)
            _gate_backward(
                gates.eta_read, d_eta_read + n * E, d_eta_bias + n, found.eta, back.eta, d_rate, E, CHUNK, C, BE
            )
        else:
            tl.store(d_eta + first + s + t, d_rate, mask=t < CHUNK)
        if alpha is None:
            da *= g.alpha.now * (1.0 - g.alpha.now)
            _gate_backward(
                gates.alpha_read, d_alpha_read + n * E, d_alpha_bias + n, found.alpha, back.alpha, da, E, CHUNK, C, BE
            )
        else:
            tl.store(d_alpha + first + s + t, da, mask=t < CHUNK)
        tl.debug_barrier()
        for j in tl.range(0, adaptive, disable_licm=True):
            m, d = _memory(now, plane, j, None, None, E, H), _memory(d_states, plane, j, None, None, E, H)
            w2, w1 = _matrix(m.W2, h, e, H, E), _matrix(m.W1, e, h, E, H)
            at_u = _tokens(_inputs(x, s, j, E), e, CHUNK, C)
            y, z = _answer(w2, w1, at_u, PRECISION)
            d_read = _tokens(_Stream(back.k + j * E * C, E, E), e, CHUNK, C)
            d_read = tl.where(_normal(x, j, QK_NORM), _normalized_backward(y, d_read), d_read)
            d_w2, d_w1, d_u = _answer_backward(w2, w1, at_u, z, d_read, PRECISION)
            d_w2, d_w1 = d_w2 + _matrix(d.W2, h, e, H, E), d_w1 + _matrix(d.W1, e, h, E, H)
            tl.debug_barrier()
            _store_matrix(d.W2, d_w2, h, e, H, E)
            _store_matrix(d.W1, d_w1, e, h, E, H)
            row = adaptive * E
            _store_tokens(_Stream(du + (first + s) * row + j * E, row, E), d_u, e, CHUNK, C)
        tl.debug_barrier()


# ---- What hope.py calls ----


def layer_fits(c: Any, x: Tensor) -> bool:
    """Whether `memory_layer` computes a layer of these settings (a `hope.MemoryConfig`) for streams like x."""
    if not torch.is_grad_enabled() or x.dtype == torch.float64 or not uses_triton(x):
        return False
    learns = (c.depth, c.rule, c.step, c.beta, c.momentum, c.decay_first) == (2, "dgd", "exact", 1, True, False)
    reads = c.read == "token" and not c.memory_norm and (c.value_norm or not c.self_values)
    tiles = c.chunk == c.chunk_proj <= 64 and c.d_head <= 64 and c.expand * c.d_head <= 128
    return learns and reads and tiles


# Whatever a gradient may be wanted of, in the order of `_LayerFunction`'s inputs. The first seven are streams.
INPUTS = "u k v q eta alpha theta W2 W1 m2 m1 start scale eta_read eta_bias alpha_read alpha_bias".split()


def memory_layer(
    inputs: dict[str, Tensor], *, chunk: int, adaptive: int, objective: str, self_values: bool, qk_norm: bool,
    hidden_rate: float, keep: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """Whole chunks of a `hope.Memory`, which defines what this computes, in one launch; differentiable; float32.

    Args:
        inputs: of `INPUTS`, as there are: u (b, h, s, 1 or `adaptive`, e); k, v, q (b, h, s, e), eta, alpha (b, h, s)
            where they are not read from memories; theta (b, h, s); the states W2, m2 (b, h, n, H, e), W1, m1 (b, h, n,
            e, H) of n memories, the adaptive ones first, the main one last; start (h, n, H, e), what decay and delta
            term take W2 back to; scale (h, n, 1, 1) of self-generated values; read-outs (h, 1, e), (h, 1).
        chunk: tokens of a chunk, up to 64; s is a multiple of it, and the states are those of a chunk's beginning.
        keep: hold on to the states that chunks start from, and do not run the forward pass again to have them.

    Returns y (b, h, s, e), [W2, W1] and [m2, m1] after the last chunk. RuntimeError when a second derivative is taken.
    """
    flags = chunk, adaptive, objective == "l2", self_values, qk_norm, hidden_rate
    y, W2, W1, m2, m1 = _LayerFunction.apply(flags, keep, *(inputs.get(name) for name in INPUTS))
    return y, [W2, W1], [m2, m1]


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flags, keep, *inputs):
        Y, states = forward_chunks(inputs, keep, *flags)
        ctx.flags = flags
        ctx.save_for_backward(*inputs, states if keep else None)
        ctx.set_materialize_grads(False)
        end = states[-1] if keep else states[Y.shape[2] // flags[0] % 2].clone()
        return Y, *(z.view(inputs[k].shape) for z, k in zip(end, (7, 8, 9, 10)))

    @staticmethod
    def backward(ctx, *grads):
        *inputs, states = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            raise RuntimeError("a memory layer in one launch has no second derivative; set one_launch = False of the Memory")
        if states is None:
            states = forward_chunks(inputs, True, *ctx.flags)[1]
        made = iter(backward_chunks(inputs, states, grads, *ctx.flags))
        return None, None, *(None if z is None else next(made) for z in inputs)


def _launched(inputs: Sequence[Tensor | None], chunk: int, adaptive: int, l2: bool, self_values: bool, qk_norm: bool,
              hidden_rate: float) -> tuple[list, dict, Tensor]:  # fmt: skip
    """What both kernels are called with: streams and where they begin, sizes and flags, and a tensor for work."""
    streams = [z if z is None or z.stride(-1) == 1 else z.contiguous() for z in inputs[:7]]
    b, h, n, H, E = inputs[7].shape
    layouts = tuple(((), ()) if z is None else (tuple(z.shape[:2]), z.stride()[:2]) for z in streams)
    at = _begins((b, h), layouts, inputs[7].device)
    rows = {f"{name}_row": 0 if z is None else z.stride(2) for name, z in zip("ukvq", streams)}
    u = streams[0]
    tile = lambda size: max(16, 1 << (size - 1).bit_length())
    C = tile(chunk)
    work_size = SQUARES.value * C * C + C + 2 * adaptive * E * C
    sizes = dict(
        heads=h, memories=n, adaptive=adaptive, u_next=0 if u is None or u.shape[3] == 1 else u.stride(3), **rows,
        work_size=work_size, E=E, H=H, CHUNK=chunk, L2=l2, SELF_VALUES=self_values, QK_NORM=qk_norm,
        HIDDEN_RATE=hidden_rate, C=C, BE=tile(E), BH=tile(H), PRECISION=precision(at.device),
        num_warps=8 if C == 64 else 4, num_stages=1,
    )  # fmt: skip
    return [*streams, at], sizes, inputs[7].new_empty(b * h, work_size)


def forward_chunks(inputs, keep, *flags):
    b, h, n, H, E = inputs[7].shape
    s = inputs[6].shape[2]
    chunks = s // flags[0]
    slots = chunks + 1 if keep else 2
    streams, sizes, work = _launched(inputs, *flags)
    states, Y = work.new_empty(slots, 4, b, h, n, H * E), work.new_empty(b, h, s, E)
    torch.stack([z.reshape(b, h, n, H * E) for z in inputs[7:11]], out=states[0])
    rest = [None if z is None else z.contiguous() for z in inputs[11:]]
    with on_device(work.device):
        _layer_forward[(b * h,)](*streams, states, *rest, Y, work, chunks, slots, **sizes)
    return Y, states


def backward_chunks(inputs, states, grads, *flags):
    b, h, n, H, E = inputs[7].shape
    adaptive = flags[1]
    streams, sizes, work = _launched(inputs, *flags)
    s = inputs[6].shape[2]
    new = lambda *shape: work.new_empty(b, h, *shape)
    of = lambda z, *shape: None if z is None else new(*shape)
    u, k, v, q, eta, alpha, theta = inputs[:7]
    dY = work.new_zeros(b, h, s, E) if grads[0] is None else grads[0].contiguous()
    d_states = work.new_empty(4, b, h, n, H * E)
    for to, g in zip(d_states, grads[1:]):
        to.zero_() if g is None else to.copy_(g.reshape(b, h, n, H * E))
    d_streams = [of(u, s, adaptive, E), of(k, s, E), of(v, s, E), of(q, s, E), of(eta, s), of(alpha, s), new(s)]
    rest = [None if z is None else z.contiguous() for z in inputs[11:]]
    parts = [None if z is None else z.new_zeros(b, *z.shape) for z in rest]
    with on_device(work.device):
        _layer_backward_chunks[(b * h,)](
            *streams, states, *rest, dY, *d_streams, d_states, *parts, work, s // flags[0], **sizes
        )
    if u is not None and u.shape[3] == 1:
        d_streams[0] = d_streams[0].sum(3, keepdim=True)
    shaped = [z.view(like.shape) for z, like in zip(d_states, inputs[7:11])]
    return [z for z in (*d_streams, *shaped, *(None if z is None else z.sum(0) for z in parts)) if z is not None]
