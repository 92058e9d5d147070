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
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from backend import constexpr, jit, layers_by_triton, on_device, precision, tl
from kernels import (
    EPS,
    _begins,
    _dot,
    _GateGradients,
    _gates,
    _gates_backward,
    _matrix,
    _normalized,
    _softplus,
    _steps,
    _store_matrix,
    _store_tokens,
    _Stream,
    _tokens,
)  # fmt: skip

# What a program keeps in `work`: LINES (C,), SQUARES (C, C), then tiles of tokens, see `_Chunk`. Lines and squares are of
# gates, as reads have them (before, gain_m; between, gain) and the chunk's end (after, gain, keep; all, gain_m and keep_m in
# one line); of steps; of scores, S = (step x)^T x, and (1 + between S)^-1; and of gradients, named with d_.
LINES, SQUARES, TILES = constexpr(17), constexpr(10), constexpr(13)
BEFORE, GAIN_M, AFTER, GAIN_END, KEEP, ENDS = (constexpr(k) for k in range(6))
ETA, STEP_2, STEP_1, RETENTION = (constexpr(k) for k in range(6, 10))
D_BEFORE, D_GAIN_M, D_AFTER, D_GAIN_END, D_KEEP, D_ENDS, D_ETA = (constexpr(k) for k in range(10, 17))
BETWEEN, GAIN, D_BETWEEN, D_GAIN, S_2, INVERSE_2, S_1, INVERSE_1, D_S, D_S_READ = (constexpr(k) for k in range(10))
# Tiles: z = W2 k; of both layers input (the hidden layer's are the keys), gradient d, p = M_{t-1} x_t; what is read of W2;
# the gradient of what the solve makes p of; gradients of the layers' d and x, and of what is read of W2.
Z, HIDDEN, D2, P2, D1, P1, READ, DZ, D_D1, D_HIDDEN, D_READ, D_D2, D_KEYS = (constexpr(k) for k in range(13))

# What all memories share, from the program's first token on; None for what is read from memories.
_Streams = namedtuple("_Streams", "u k v q eta alpha theta u_next u_row k_row v_row q_row")
# Read-outs of eta and alpha, (E,) and a number each, of the program's head.
_ReadOuts = namedtuple("_ReadOuts", "eta_read eta_bias alpha_read alpha_bias")
# Where what is read of memories, or the gradient of it, lies in work: tiles (E, C) in this order, only of those read.
_Reads = namedtuple("_Reads", "k v q eta alpha")
# A chunk: streams of keys, values, queries; where alpha is; where work and its tiles of `slot` numbers begin.
_Chunk = namedtuple("_Chunk", "k v q alpha work tiles slot")
# The matrices of one memory: W2 (H, E), W1 (E, H), their momenta; W2's start state; the factor of its values.
_Memory = namedtuple("_Memory", "W2 W1 m2 m1 S2 scale")
# One layer of it: matrix and momentum (O, I) and what the matrix starts from; streams x, d, p; the places in work of its
# steps, S and inverse. On the way back also the gradients of matrix, momentum and start, streams dd and dx.
_Layer = namedtuple("_Layer", "M m start x d p step S inverse O I")
_Back = namedtuple("_Back", "M m start d x q")


@jit
def _line(work, k, C: tl.constexpr):
    return work + k * C + tl.arange(0, C)


@jit
def _square(work, k, C: tl.constexpr):
    t = tl.arange(0, C)
    return work + (LINES + k * C) * C + t[:, None] * C + t[None, :]


@jit
def _add(p, value, C: tl.constexpr):
    """Add to a line or square, of which each thread has the numbers it has of `value`."""
    tl.store(p, tl.load(p) + value)


@jit
def _tile(c, k, size):
    """The k-th of work's tiles, of `size` numbers a token."""
    return _Stream(c.tiles + k * c.slot, size, size)


@jit
def _silu(z):
    return z * tl.sigmoid(z)


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
def _normalized_backward(x, dy, eps: tl.constexpr = EPS):
    """The gradient of x from that of _normalized(x)."""
    n = tl.sqrt(tl.sum(x * x, 0))
    y = x / tl.maximum(n, eps)[None, :]
    along = tl.where(n > eps, tl.sum(dy * y, 0), 0.0)
    return (dy - y * along[None, :]) / tl.maximum(n, eps)[None, :]


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
def _answer(c, m, x, E: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """x + W1 silu(W2 x) for a tile x; leaves z = W2 x in tile Z."""
    e, h = tl.arange(0, BE), tl.arange(0, BH)
    z = _dot(_matrix(m.W2, h, e, H, E), x, PRECISION)
    _store_tokens(_tile(c, Z, H), z, h, CHUNK, C)
    tl.debug_barrier()
    return x + _dot(_matrix(m.W1, e, h, E, H), _silu(z), PRECISION)


@jit
def _answer_backward(c, m, d, x, dy, E: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """Of `_answer` at the stream x, from the gradient dy: returns that of x, adds those of W2 and W1 to the `_Memory` d."""
    e, h = tl.arange(0, BE), tl.arange(0, BH)
    z = _tokens(_tile(c, Z, H), h, CHUNK, C)
    _add_matrix(d.W1, _dot(dy, tl.trans(_silu(z)), PRECISION), e, h, E, H)
    tl.debug_barrier()
    dz = _dot(tl.trans(_matrix(m.W1, e, h, E, H)), dy, PRECISION) * _slope(z)
    tl.debug_barrier()
    _add_matrix(d.W2, _dot(dz, tl.trans(_tokens(x, e, CHUNK, C)), PRECISION), h, e, H, E)
    tl.debug_barrier()
    return dy + _dot(tl.trans(_matrix(m.W2, h, e, H, E)), dz, PRECISION)


@jit
def _add_matrix(to, value, o, i, O, I):
    value += _matrix(to, o, i, O, I)
    tl.debug_barrier()
    _store_matrix(to, value, o, i, O, I)
    tl.debug_barrier()


@jit
def _add_tokens(to, value, i, CHUNK: tl.constexpr, C: tl.constexpr):
    value += _tokens(to, i, CHUNK, C)
    tl.debug_barrier()
    _store_tokens(to, value, i, CHUNK, C)
    tl.debug_barrier()


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
def _memory(states, plane, j, scale, S2, E: tl.constexpr, H: tl.constexpr):
    """Where memory j of the program is: states (4, all memories of all programs, E H), a plane for each matrix."""
    here = states + j * E * H
    start = S2 if S2 is None else S2 + j * E * H
    factor = scale if scale is None else scale + j
    return _Memory(here, here + plane, here + 2 * plane, here + 3 * plane, start, factor)


@jit
def _hidden_layer(c, m, E: tl.constexpr, H: tl.constexpr):
    return _Layer(m.W2, m.m2, m.S2, c.k, _tile(c, D2, H), _tile(c, P2, H), STEP_2, S_2, INVERSE_2, H, E)


@jit
def _output_layer(c, m, E: tl.constexpr, H: tl.constexpr):
    x, d, p = _tile(c, HIDDEN, H), _tile(c, D1, E), _tile(c, P1, E)
    return _Layer(m.W1, m.m1, None, x, d, p, STEP_1, S_1, INVERSE_1, E, H)


@jit
def _inputs(x, s, j, E: tl.constexpr):
    """The stream of what memory j is read at, from token s on."""
    return _Stream(x.u + s * x.u_row + j * x.u_next, x.u_row, E)


@jit
def _gate(read, bias, at, E: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, BE: tl.constexpr):
    """<read, x> + bias, a number a token (C,), for the tile x at `at`."""
    e = tl.arange(0, BE)
    x = _tokens(_Stream(at, E, E), e, CHUNK, C)
    return tl.sum(x * tl.load(read + e, mask=e < E, other=0.0)[:, None], 0) + tl.load(bias)


@jit
def _begin_chunk(
    x, gates, states, plane, work, s, adaptive, E: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, QK_NORM: tl.constexpr,
    HIDDEN_RATE: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The `_Chunk` from token s on: reads the adaptive memories, and leaves in work what memories share."""
    e, t = tl.arange(0, BE), tl.arange(0, C)
    reads = work + (LINES + SQUARES * C) * C
    at, tiles = _reads_at(x, reads, E * C), reads + 2 * adaptive * E * C
    k = _Stream(at.k, E, E) if x.k is None else _Stream(x.k + s * x.k_row, x.k_row, E)
    v = _Stream(at.v, E, E) if x.v is None else _Stream(x.v + s * x.v_row, x.v_row, E)
    q = _Stream(at.q, E, E) if x.q is None else _Stream(x.q + s * x.q_row, x.q_row, E)
    alpha = work + RETENTION * C if x.alpha is None else x.alpha + s
    c = _Chunk(k, v, q, alpha, work, tiles, max(E, H) * C)
    tl.debug_barrier()
    if x.u is not None:
        for j in tl.range(0, adaptive, disable_licm=True):
            u = _tokens(_inputs(x, s, j, E), e, CHUNK, C)
            y = _answer(c, _memory(states, plane, j, None, None, E, H), u, E, H, CHUNK, C, BE, BH, PRECISION)
            y = tl.where(_normal(x, j, QK_NORM), _normalized(y), y)
            _store_tokens(_Stream(reads + j * E * C, E, E), y, e, CHUNK, C)
            tl.debug_barrier()
    if x.eta is None:
        eta = _softplus(_gate(gates.eta_read, gates.eta_bias, at.eta, E, CHUNK, C, BE))
    else:
        eta = _steps(x.eta + s, CHUNK, C)
    tl.store(_line(work, ETA, C), eta)
    if x.alpha is None:
        gate = _gate(gates.alpha_read, gates.alpha_bias, at.alpha, E, CHUNK, C, BE)
        tl.store(_line(work, RETENTION, C), tl.sigmoid(gate))
    tl.debug_barrier()
    g = _gates(alpha, x.theta + s, CHUNK, True, PRECISION, C)
    tl.store(_square(work, BETWEEN, C), g.reads.between)
    tl.store(_square(work, GAIN, C), g.reads.gain)
    tl.store(_line(work, BEFORE, C), g.reads.before)
    tl.store(_line(work, GAIN_M, C), g.reads.gain_m)
    tl.store(_line(work, AFTER, C), g.end.after)
    tl.store(_line(work, GAIN_END, C), g.end.gain)
    tl.store(_line(work, KEEP, C), g.end.keep)
    ends = tl.where(t == 0, g.end.all, tl.where(t == 1, g.end.gain_m, g.end.keep_m))
    tl.store(_line(work, ENDS, C), ends)
    tl.debug_barrier()
    keys = _tokens(k, e, CHUNK, C)
    tl.store(_line(work, STEP_2, C), _step(HIDDEN_RATE * tl.load(_line(work, ETA, C)), keys))
    tl.debug_barrier()
    _scores(c, k, STEP_2, S_2, INVERSE_2, e, CHUNK, C, PRECISION)
    return c


@jit
def _scores(c, x, step, S, inverse, i, CHUNK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """A layer's scores S, and (1 + A)^-1 of its system A = between S, into work: of the 16 x 16 blocks on the diagonal by
    substitution, a token of each after the other; with T, what these give, N = T (A without them) has N^4 = 0."""
    EXACT: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32x3"
    tile = _tokens(x, i, CHUNK, C)
    scores = _dot(tl.trans(tile * tl.load(_line(c.work, step, C))[None, :]), tile, PRECISION)
    tl.store(_square(c.work, S, C), scores)
    tl.debug_barrier()
    s, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    near, inverse = s // 16 == t // 16, _square(c.work, inverse, C)
    A_T = tl.trans(tl.where(near, tl.load(_square(c.work, BETWEEN, C)) * tl.load(_square(c.work, S, C)), 0.0))
    T = tl.where(s == t, 1.0, 0.0)
    for token in tl.range(1, 16, disable_licm=True):
        row = tl.sum(tl.where(s % 16 == token, A_T, 0.0), 0)
        T = tl.where(near & (t % 16 == token), T - tl.sum(T * row[None, :], 1)[:, None], T)
    tl.store(inverse, T)
    tl.debug_barrier()
    if C > 16:
        A = tl.where(near, 0.0, tl.load(_square(c.work, BETWEEN, C)) * tl.load(_square(c.work, S, C)))
        N, R = _square(c.work, D_S, C), _square(c.work, D_S_READ, C)  # nobody needs these now
        tl.store(N, _dot(tl.load(inverse), A, EXACT))
        tl.debug_barrier()
        tl.store(R, tl.load(inverse) - _dot(tl.load(N), tl.load(inverse), EXACT))
        tl.debug_barrier()
        if C > 32:
            N_N = _dot(tl.load(N), tl.load(N), EXACT)
            tl.debug_barrier()
            tl.store(N, N_N)
            tl.debug_barrier()
            tl.store(inverse, tl.load(R) + _dot(tl.load(N), tl.load(R), EXACT))
        else:
            tl.store(inverse, tl.load(R))
        tl.debug_barrier()


@jit
def _found(c, M, m, x, o, i, O, I, CHUNK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """What a chunk's start gives of a read at the stream x: before (M x) + gain_m (m x), with matrices M and m."""
    at = _tokens(x, i, CHUNK, C)
    y = tl.load(_line(c.work, BEFORE, C))[None, :] * _dot(_matrix(M, o, i, O, I), at, PRECISION)
    tl.debug_barrier()
    y += tl.load(_line(c.work, GAIN_M, C))[None, :] * _dot(_matrix(m, o, i, O, I), at, PRECISION)
    tl.debug_barrier()
    return y


@jit
def _solve(c, layer, y, o, CHUNK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """p of a layer, from what the chunk's start gives of reads at its inputs, into its stream."""
    scores = tl.load(_square(c.work, GAIN, C)) * tl.load(_square(c.work, layer.S, C))
    y -= _dot(_tokens(layer.d, o, CHUNK, C), scores, PRECISION)
    tl.debug_barrier()
    p = _dot(y, tl.load(_square(c.work, layer.inverse, C)), PRECISION)
    _store_tokens(layer.p, p, o, CHUNK, C)
    tl.debug_barrier()


@jit
def _layers(
    c, m, E: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, L2: tl.constexpr, SELF_VALUES: tl.constexpr, C: tl.constexpr, BE: tl.constexpr,
    BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A memory's writes in a chunk, eqs. 84 and 88: leaves in work both layers' x, d and p, and z. Where a layer has a
    state to start from, its matrix has come from there, and what it has of a read at x is less that of the start."""
    e, h = tl.arange(0, BE), tl.arange(0, BH)
    hidden, out = _hidden_layer(c, m, E, H), _output_layer(c, m, E, H)
    value = _tokens(c.v, e, CHUNK, C)
    if SELF_VALUES:
        value = tl.load(m.scale) * _normalized(_answer(c, m, value, E, H, CHUNK, C, BE, BH, PRECISION))
    _store_tokens(out.d, -value, e, CHUNK, C)
    tl.debug_barrier()
    z = _dot(_matrix(m.W2, h, e, H, E), _tokens(c.k, e, CHUNK, C), PRECISION)
    tl.debug_barrier()
    x = _silu(z)
    _store_tokens(_tile(c, Z, H), z, h, CHUNK, C)
    _store_tokens(out.x, x, h, CHUNK, C)
    tl.store(_line(c.work, STEP_1, C), _step(tl.load(_line(c.work, ETA, C)), x))
    tl.debug_barrier()
    y = _dot(_matrix(m.W1, e, h, E, H), _tokens(out.x, h, CHUNK, C), PRECISION)
    if L2:
        d = y + _tokens(c.k, e, CHUNK, C) + _tokens(out.d, e, CHUNK, C)
        tl.debug_barrier()
        _store_tokens(out.d, d, e, CHUNK, C)
    y *= tl.load(_line(c.work, BEFORE, C))[None, :]
    tl.debug_barrier()
    y += tl.load(_line(c.work, GAIN_M, C))[None, :] * _dot(
        _matrix(m.m1, e, h, E, H), _tokens(out.x, h, CHUNK, C), PRECISION
    )
    tl.debug_barrier()
    _scores(c, out.x, STEP_1, S_1, INVERSE_1, h, CHUNK, C, PRECISION)
    _solve(c, out, y, e, CHUNK, C, PRECISION)
    d = _dot(tl.trans(_matrix(m.W1, e, h, E, H)), _tokens(out.d, e, CHUNK, C), PRECISION)
    _store_tokens(hidden.d, d * _slope(_tokens(_tile(c, Z, H), h, CHUNK, C)), h, CHUNK, C)
    tl.debug_barrier()
    y = _found(c, m.W2, m.m2, c.k, h, e, H, E, CHUNK, C, PRECISION)
    if m.S2 is not None:
        start = _dot(_matrix(m.S2, h, e, H, E), _tokens(c.k, e, CHUNK, C), PRECISION)
        y -= tl.load(_line(c.work, BEFORE, C))[None, :] * start
        tl.debug_barrier()
    _solve(c, hidden, y, h, CHUNK, C, PRECISION)


@jit
def _read(c, layer, q, o, i, CHUNK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """M_{t-1} q_t of a layer, a tile, for the stream q."""
    O, I = layer.O, layer.I
    y = _found(c, layer.M, layer.m, q, o, i, O, I, CHUNK, C, PRECISION)
    if layer.start is not None:
        rest = 1.0 - tl.load(_line(c.work, BEFORE, C))
        start = _dot(_matrix(layer.start, o, i, O, I), _tokens(q, i, CHUNK, C), PRECISION)
        y += rest[None, :] * start
        tl.debug_barrier()
    S = _read_scores(c, layer, q, i, CHUNK, C, PRECISION)
    y -= _dot(_tokens(layer.d, o, CHUNK, C), tl.load(_square(c.work, GAIN, C)) * S, PRECISION)
    tl.debug_barrier()
    y -= _dot(_tokens(layer.p, o, CHUNK, C), tl.load(_square(c.work, BETWEEN, C)) * S, PRECISION)
    tl.debug_barrier()
    return y


@jit
def _read_scores(c, layer, q, i, CHUNK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    xe = _tokens(layer.x, i, CHUNK, C) * tl.load(_line(c.work, layer.step, C))[None, :]
    S = _dot(tl.trans(xe), _tokens(q, i, CHUNK, C), PRECISION)
    tl.debug_barrier()
    return S


@jit
def _end(c, layer, to_M, to_m, o, i, CHUNK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """A layer's matrix and momentum at the chunk's end."""
    work, O, I = c.work, layer.O, layer.I
    ends = work + ENDS * C
    xe = tl.trans(_tokens(layer.x, i, CHUNK, C) * tl.load(_line(work, layer.step, C))[None, :])
    d = _tokens(layer.d, o, CHUNK, C)
    m = _matrix(layer.m, o, i, O, I)
    _store_matrix(
        to_m, tl.load(ends + 2) * m - _dot(tl.load(_line(work, KEEP, C))[None, :] * d, xe, PRECISION), o, i, O, I
    )
    tl.debug_barrier()
    writes = tl.load(_line(work, GAIN_END, C))[None, :] * d
    writes += tl.load(_line(work, AFTER, C))[None, :] * _tokens(layer.p, o, CHUNK, C)
    M = tl.load(ends) * _matrix(layer.M, o, i, O, I) + tl.load(ends + 1) * m - _dot(writes, xe, PRECISION)
    if layer.start is not None:
        M += (1.0 - tl.load(ends)) * _matrix(layer.start, o, i, O, I)
    _store_matrix(to_M, M, o, i, O, I)
    tl.debug_barrier()


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
    return _ReadOuts(
        eta_read if eta_read is None else eta_read + head * E, eta_bias if eta_bias is None else eta_bias + head,
        alpha_read if alpha_read is None else alpha_read + head * E,
        alpha_bias if alpha_bias is None else alpha_bias + head,
    )  # fmt: skip


@jit
def _layer_forward(
    u, k, v, q, eta, alpha, theta, at, states, S2, scale, eta_read, eta_bias, alpha_read, alpha_bias, Y, work,
    chunks, slots, heads, memories, adaptive, u_next, u_row, k_row, v_row, q_row, work_size,
    E: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, L2: tl.constexpr, SELF_VALUES: tl.constexpr, QK_NORM: tl.constexpr, HIDDEN_RATE: tl.constexpr,
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
        c = _begin_chunk(
            x, gates, now, plane, work, s, adaptive, E, H, CHUNK, QK_NORM, HIDDEN_RATE, C, BE, BH, PRECISION
        )
        for j in tl.range(0, memories, disable_licm=True):
            m, to = _memory(now, plane, j, scale, S2, E, H), _memory(new, plane, j, scale, S2, E, H)
            _layers(c, m, E, H, CHUNK, L2, SELF_VALUES, C, BE, BH, PRECISION)
            hidden, out = _hidden_layer(c, m, E, H), _output_layer(c, m, E, H)
            if j == memories - 1:
                r = _read(c, hidden, c.q, h, e, CHUNK, C, PRECISION)
                _store_tokens(_tile(c, READ, H), _silu(r), h, CHUNK, C)
                tl.debug_barrier()
                y = _read(c, out, _tile(c, READ, H), e, h, CHUNK, C, PRECISION) + _tokens(c.q, e, CHUNK, C)
                _store_tokens(_Stream(Y + (n * chunks * CHUNK + s) * E, E, E), y, e, CHUNK, C)
            _end(c, hidden, to.W2, to.m2, h, e, CHUNK, C, PRECISION)
            _end(c, out, to.W1, to.m1, e, h, CHUNK, C, PRECISION)


# ---- Backward ----


@jit
def _layer_backward(
    c, layer, to, q, dr, read, o, i, CHUNK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Of `_end`, and of `_read` at the stream q with the gradient dr if `read`, and of the `_solve` before them. In the
    letters of `kernels._chunk_backward`: E and E_m are the gradients of the chunk's end, U = E (step x)^T, dz that of what
    the solve turns into p. Turns E and E_m, in the `_Back` to, into those of the chunk's start; puts the gradients of d,
    x and q into streams; adds those of the start, of steps and gates to what is there. Returns that of the steps."""
    work, O, I = c.work, layer.O, layer.I
    step = tl.load(_line(work, layer.step, C))
    xe = _tokens(layer.x, i, CHUNK, C) * step[None, :]
    U = _dot(_matrix(to.M, o, i, O, I), xe, PRECISION)
    tl.debug_barrier()
    dz = -tl.load(_line(work, AFTER, C))[None, :] * U
    d = _tokens(layer.d, o, CHUNK, C)
    _add(_line(work, D_AFTER, C), -tl.sum(_tokens(layer.p, o, CHUNK, C) * U, 0), C)
    _add(_line(work, D_GAIN_END, C), -tl.sum(d * U, 0), C)
    dd = -tl.load(_line(work, GAIN_END, C))[None, :] * U
    tl.debug_barrier()
    U = _dot(_matrix(to.m, o, i, O, I), xe, PRECISION)
    tl.debug_barrier()
    _add(_line(work, D_KEEP, C), -tl.sum(d * U, 0), C)
    dd -= tl.load(_line(work, KEEP, C))[None, :] * U
    if read:
        S = _read_scores(c, layer, q, i, CHUNK, C, PRECISION)
        y = _tokens(dr, o, CHUNK, C)
        dd -= _dot(y, tl.trans(tl.load(_square(work, GAIN, C)) * S), PRECISION)
        tl.debug_barrier()
        dz -= _dot(y, tl.trans(tl.load(_square(work, BETWEEN, C)) * S), PRECISION)
        tl.debug_barrier()
    dz = _dot(dz, tl.trans(tl.load(_square(work, layer.inverse, C))), PRECISION)
    to_z = _Stream(c.tiles + DZ * c.slot, O, O)
    _store_tokens(to_z, dz, o, CHUNK, C)
    tl.debug_barrier()
    scores = tl.load(_square(work, GAIN, C)) * tl.load(_square(work, layer.S, C))
    dd -= _dot(dz, tl.trans(scores), PRECISION)
    _store_tokens(to.d, dd, o, CHUNK, C)
    tl.debug_barrier()
    _score_gradients(c, layer, tl.load(_square(work, layer.S, C)), to_z, D_S, o, CHUNK, C, PRECISION)
    if read:
        S = _read_scores(c, layer, q, i, CHUNK, C, PRECISION)
        _score_gradients(c, layer, S, dr, D_S_READ, o, CHUNK, C, PRECISION)
        dq = _read_backward(c, layer, q, dr, D_S_READ, o, i, CHUNK, C, PRECISION)
        _store_tokens(to.q, dq, i, CHUNK, C)
        tl.debug_barrier()
    writes = tl.load(_line(work, GAIN_END, C))[None, :] * _tokens(layer.d, o, CHUNK, C)
    writes += tl.load(_line(work, AFTER, C))[None, :] * _tokens(layer.p, o, CHUNK, C)
    dxe = -_dot(tl.trans(_matrix(to.M, o, i, O, I)), writes, PRECISION)
    tl.debug_barrier()
    writes = tl.load(_line(work, KEEP, C))[None, :] * _tokens(layer.d, o, CHUNK, C)
    dxe -= _dot(tl.trans(_matrix(to.m, o, i, O, I)), writes, PRECISION)
    tl.debug_barrier()
    x = _tokens(layer.x, i, CHUNK, C)
    dxe -= _dot(x, tl.trans(tl.load(_square(work, D_S, C))), PRECISION)
    tl.debug_barrier()
    if read:
        dxe -= _dot(_tokens(q, i, CHUNK, C), tl.trans(tl.load(_square(work, D_S_READ, C))), PRECISION)
        tl.debug_barrier()
    d_step = tl.sum(dxe * x, 0)
    _store_tokens(to.x, dxe * step[None, :], i, CHUNK, C)
    tl.debug_barrier()
    dx = _read_backward(c, layer, layer.x, to_z, D_S, o, i, CHUNK, C, PRECISION)
    _add_tokens(to.x, dx, i, CHUNK, C)
    _start_backward(c, layer, to, q, dr, to_z, read, o, i, CHUNK, C, PRECISION)
    return d_step


@jit
def _score_gradients(
    c, layer, S, dy, place, o, CHUNK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Of reads with scores S and the gradient dy: that of S without its sign, into work; adds those of between and gain."""
    y = _tokens(dy, o, CHUNK, C)
    of = _dot(tl.trans(_tokens(layer.d, o, CHUNK, C)), y, PRECISION)
    tl.debug_barrier()
    minus_dS = tl.load(_square(c.work, GAIN, C)) * of
    _add(_square(c.work, D_GAIN, C), -S * of, C)
    tl.debug_barrier()
    of = _dot(tl.trans(_tokens(layer.p, o, CHUNK, C)), y, PRECISION)
    tl.debug_barrier()
    minus_dS += tl.load(_square(c.work, BETWEEN, C)) * of
    _add(_square(c.work, D_BETWEEN, C), -S * of, C)
    tl.store(_square(c.work, place, C), minus_dS)
    tl.debug_barrier()


@jit
def _read_backward(
    c, layer, at, dy, scores, o, i, CHUNK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The gradient of what is read at, `at`, from that of the reads, dy, but for what its scores do as those of writes;
    adds those of before and gain_m."""
    work, O, I = c.work, layer.O, layer.I
    y = _dot(tl.trans(_matrix(layer.M, o, i, O, I)), _tokens(dy, o, CHUNK, C), PRECISION)
    tl.debug_barrier()
    d_at = tl.load(_line(work, BEFORE, C))[None, :] * y
    if layer.start is not None:
        of_start = _dot(tl.trans(_matrix(layer.start, o, i, O, I)), _tokens(dy, o, CHUNK, C), PRECISION)
        y -= of_start
        d_at -= tl.load(_line(work, BEFORE, C))[None, :] * of_start
        tl.debug_barrier()
    x = _tokens(at, i, CHUNK, C)
    _add(_line(work, D_BEFORE, C), tl.sum(x * y, 0), C)
    y = _dot(tl.trans(_matrix(layer.m, o, i, O, I)), _tokens(dy, o, CHUNK, C), PRECISION)
    tl.debug_barrier()
    d_at += tl.load(_line(work, GAIN_M, C))[None, :] * y
    _add(_line(work, D_GAIN_M, C), tl.sum(x * y, 0), C)
    tl.debug_barrier()
    xe = _tokens(layer.x, i, CHUNK, C) * tl.load(_line(work, layer.step, C))[None, :]
    d_at -= _dot(xe, tl.load(_square(work, scores, C)), PRECISION)
    tl.debug_barrier()
    return d_at


@jit
def _start_backward(
    c, layer, to, q, dr, dz, read, o, i, CHUNK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The gradients of matrix and momentum at the chunk's start, and of what the matrix starts from."""
    work, O, I = c.work, layer.O, layer.I
    ends, t = work + ENDS * C, tl.arange(0, C)
    E, E_m, m = _matrix(to.M, o, i, O, I), _matrix(to.m, o, i, O, I), _matrix(layer.m, o, i, O, I)
    change = _matrix(layer.M, o, i, O, I)
    if layer.start is not None:
        change -= _matrix(layer.start, o, i, O, I)
    d_ends = tl.where(t == 0, tl.sum(change * E), tl.where(t == 1, tl.sum(m * E), tl.sum(m * E_m)))
    _add(_line(work, D_ENDS, C), tl.where(t < 3, d_ends, 0.0), C)
    tl.debug_barrier()
    dm = tl.load(ends + 2) * E_m + tl.load(ends + 1) * E
    y, x = tl.load(_line(work, GAIN_M, C))[None, :] * _tokens(dz, o, CHUNK, C), tl.trans(_tokens(layer.x, i, CHUNK, C))
    dm += _dot(y, x, PRECISION)
    tl.debug_barrier()
    if read:
        y, x = tl.load(_line(work, GAIN_M, C))[None, :] * _tokens(dr, o, CHUNK, C), tl.trans(_tokens(q, i, CHUNK, C))
        dm += _dot(y, x, PRECISION)
        tl.debug_barrier()
    _store_matrix(to.m, dm, o, i, O, I)
    tl.debug_barrier()
    dM = tl.load(ends) * E
    y, x = tl.load(_line(work, BEFORE, C))[None, :] * _tokens(dz, o, CHUNK, C), tl.trans(_tokens(layer.x, i, CHUNK, C))
    dM += _dot(y, x, PRECISION)
    tl.debug_barrier()
    if read:
        y, x = tl.load(_line(work, BEFORE, C))[None, :] * _tokens(dr, o, CHUNK, C), tl.trans(_tokens(q, i, CHUNK, C))
        dM += _dot(y, x, PRECISION)
        tl.debug_barrier()
    if layer.start is not None:
        d_start = _matrix(to.M, o, i, O, I) - dM
        if read:
            d_start += _dot(_tokens(dr, o, CHUNK, C), tl.trans(_tokens(q, i, CHUNK, C)), PRECISION)
            tl.debug_barrier()
        _add_matrix(to.start, d_start, o, i, O, I)
    tl.debug_barrier()
    _store_matrix(to.M, dM, o, i, O, I)
    tl.debug_barrier()


@jit
def _memory_backward(
    c, m, d, d_scale, dk, dv, dq, dy, read, E: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, L2: tl.constexpr, SELF_VALUES: tl.constexpr,
    HIDDEN_RATE: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Turns the gradients of a memory's matrices at the chunk's end, in the `_Memory` d, into those at its start; adds to
    those of its start state and scale, to the streams dk, dv, dq, and to those of eta and gates in work."""
    e, h = tl.arange(0, BE), tl.arange(0, BH)
    _layers(c, m, E, H, CHUNK, L2, SELF_VALUES, C, BE, BH, PRECISION)
    hidden, out = _hidden_layer(c, m, E, H), _output_layer(c, m, E, H)
    z, r, dr = _tile(c, Z, H), _tile(c, READ, H), _tile(c, D_READ, H)
    if read:
        tile = _read(c, hidden, c.q, h, e, CHUNK, C, PRECISION)
        _store_tokens(r, _silu(tile), h, CHUNK, C)
        _store_tokens(_tile(c, D_KEYS, H), tile, h, CHUNK, C)
        tl.debug_barrier()
    dd1, dh, dd2, d_keys = _tile(c, D_D1, E), _tile(c, D_HIDDEN, H), _tile(c, D_D2, H), _tile(c, D_KEYS, E)
    d_step = _layer_backward(c, out, _Back(d.W1, d.m1, None, dd1, dh, dr), r, dy, read, e, h, CHUNK, C, PRECISION)
    x, eta = _tokens(out.x, h, CHUNK, C), tl.load(_line(c.work, ETA, C))
    d_eta, dx = _step_backward(eta, x, d_step)
    _add(_line(c.work, D_ETA, C), d_eta, C)
    _add_tokens(dh, dx, h, CHUNK, C)
    if read:
        tile = _tokens(dr, h, CHUNK, C) * _slope(_tokens(_tile(c, D_KEYS, H), h, CHUNK, C))
        tl.debug_barrier()
        _store_tokens(dr, tile, h, CHUNK, C)
        tl.debug_barrier()
    to_q = _tile(c, P1, E)
    d_step = _layer_backward(
        c, hidden, _Back(d.W2, d.m2, d.S2, dd2, d_keys, to_q), c.q, dr, read, h, e, CHUNK, C, PRECISION
    )
    if read:
        tile = _tokens(to_q, e, CHUNK, C)
        if m.S2 is not None:
            tile += _dot(tl.trans(_matrix(m.S2, h, e, H, E)), _tokens(dr, h, CHUNK, C), PRECISION)
            tl.debug_barrier()
        _add_tokens(dq, tile, e, CHUNK, C)
    d_eta, tile = _step_backward(HIDDEN_RATE * eta, _tokens(c.k, e, CHUNK, C), d_step)
    _add(_line(c.work, D_ETA, C), HIDDEN_RATE * d_eta, C)
    tile += _tokens(d_keys, e, CHUNK, C)
    _add_tokens(dk, tile, e, CHUNK, C)
    # The inner loss's gradients: d2 = (W1^T d1) silu'(z).
    zs, dd = _tokens(z, h, CHUNK, C), _tokens(dd2, h, CHUNK, C)
    back = _dot(tl.trans(_matrix(m.W1, e, h, E, H)), _tokens(out.d, e, CHUNK, C), PRECISION)
    tl.debug_barrier()
    dz, d_back = dd * back * _bend(zs), dd * _slope(zs)
    _store_tokens(dd2, d_back, h, CHUNK, C)  # from now on of W1^T d1
    tl.debug_barrier()
    _add_matrix(d.W1, _dot(_tokens(out.d, e, CHUNK, C), tl.trans(d_back), PRECISION), e, h, E, H)
    d1 = _dot(_matrix(m.W1, e, h, E, H), _tokens(dd2, h, CHUNK, C), PRECISION)
    _add_tokens(dd1, d1, e, CHUNK, C)
    # d1 = k + y - value, y = W1 silu(z), z = W2 k.
    if L2:
        d1 = _tokens(dd1, e, CHUNK, C)
        _add_tokens(dk, d1, e, CHUNK, C)
        _add_matrix(d.W1, _dot(d1, tl.trans(_tokens(out.x, h, CHUNK, C)), PRECISION), e, h, E, H)
        tile = _dot(tl.trans(_matrix(m.W1, e, h, E, H)), _tokens(dd1, e, CHUNK, C), PRECISION)
        _add_tokens(dh, tile, h, CHUNK, C)
    dz += _tokens(dh, h, CHUNK, C) * _slope(zs)
    _add_matrix(d.W2, _dot(dz, tl.trans(_tokens(c.k, e, CHUNK, C)), PRECISION), h, e, H, E)
    tile = _dot(tl.trans(_matrix(m.W2, h, e, H, E)), dz, PRECISION)
    _add_tokens(dk, tile, e, CHUNK, C)
    d_value = -_tokens(dd1, e, CHUNK, C)
    if SELF_VALUES:
        value = _answer(c, m, _tokens(c.v, e, CHUNK, C), E, H, CHUNK, C, BE, BH, PRECISION)
        tl.debug_barrier()
        more = tl.sum(d_value * _normalized(value))
        d_value = _normalized_backward(value, tl.load(m.scale) * d_value)
        d_value = _answer_backward(c, m, d, c.v, d_value, E, H, CHUNK, C, BE, BH, PRECISION)
        tl.debug_barrier()
        tl.store(d_scale, tl.load(d_scale) + more)
    _add_tokens(dv, d_value, e, CHUNK, C)


@jit
def _gate_backward(
    read, d_read, d_bias, at, to, d, E: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, BE: tl.constexpr
):
    """Of `_gate`, with the gradient d (C,) of what it returns: that of the tile at `at`, to `to`; adds to the others."""
    e = tl.arange(0, BE)
    weight = tl.load(read + e, mask=e < E, other=0.0)
    _store_tokens(_Stream(to, E, E), weight[:, None] * d[None, :], e, CHUNK, C)
    more = tl.sum(_tokens(_Stream(at, E, E), e, CHUNK, C) * d[None, :], 1)
    tl.store(d_read + e, tl.load(d_read + e, mask=e < E, other=0.0) + more, mask=e < E)
    more = tl.sum(tl.where(tl.arange(0, C) < CHUNK, d, 0.0))
    tl.store(d_bias, tl.load(d_bias) + more)
    tl.debug_barrier()


@jit
def _layer_backward_chunks(
    u, k, v, q, eta, alpha, theta, at, states, S2, scale, eta_read, eta_bias, alpha_read, alpha_bias,
    dY, du, dk, dv, dq, d_eta, d_alpha, d_theta, d_states, dS2, d_scale, d_eta_read, d_eta_bias, d_alpha_read,
    d_alpha_bias, work,
    chunks, heads, memories, adaptive, u_next, u_row, k_row, v_row, q_row, work_size,
    E: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, L2: tl.constexpr, SELF_VALUES: tl.constexpr, QK_NORM: tl.constexpr, HIDDEN_RATE: tl.constexpr,
    C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The backward pass of `_layer_forward`, with the states of all chunks, on the same grid: from the last chunk on.
    d_states (4, n, memories, E H) comes as the gradients of the end and leaves as those of the start. du (n, s,
    adaptive, E), dk, dv, dq (n, s, E), d_eta, d_alpha, d_theta (n, s); of what sequences share each program has its own
    part: dS2 (n, memories, E H), d_scale (n, memories), d_.._read (n, E), d_.._bias (n,), which come as 0."""
    n = tl.program_id(0).to(tl.int64)
    head, e, t = n % heads, tl.arange(0, BE), tl.arange(0, C)
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
    reads = work + (LINES + SQUARES * C) * C
    found, back = _reads_at(x, reads, E * C), _reads_at(x, reads + adaptive * E * C, E * C)
    first = n * chunks * CHUNK  # token
    for i in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - i
        now, s = states + chunk * 4 * plane, chunk * CHUNK
        c = _begin_chunk(
            x, gates, now, plane, work, s, adaptive, E, H, CHUNK, QK_NORM, HIDDEN_RATE, C, BE, BH, PRECISION
        )
        to_k = _Stream(back.k, E, E) if dk is None else _Stream(dk + (first + s) * E, E, E)
        to_v = _Stream(back.v, E, E) if dv is None else _Stream(dv + (first + s) * E, E, E)
        to_q = _Stream(back.q, E, E) if dq is None else _Stream(dq + (first + s) * E, E, E)
        dy, zeros = _Stream(dY + (first + s) * E, E, E), tl.zeros((BE, C), tl.float32)
        _store_tokens(to_k, zeros, e, CHUNK, C)
        _store_tokens(to_v, zeros, e, CHUNK, C)
        _store_tokens(to_q, _tokens(dy, e, CHUNK, C), e, CHUNK, C)
        tl.store(_square(work, D_BETWEEN, C), tl.zeros((C, C), tl.float32))
        tl.store(_square(work, D_GAIN, C), tl.zeros((C, C), tl.float32))
        for line in tl.static_range(D_BEFORE, LINES):
            tl.store(_line(work, line, C), tl.zeros((C,), tl.float32))
        tl.debug_barrier()
        for j in tl.range(0, memories, disable_licm=True):
            m, d = _memory(now, plane, j, scale, S2, E, H), _memory(d_states, plane, j, d_scale, dS2, E, H)
            _memory_backward(
                c, m, d, d.scale, to_k, to_v, to_q, dy, (j == memories - 1).to(tl.int32), E, H, CHUNK, L2, SELF_VALUES,
                HIDDEN_RATE, C, BE, BH, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
        da, dth = _chunk_gates_backward(c, x.theta + s, CHUNK, C, PRECISION)
        tl.store(d_theta + first + s + t, dth, mask=t < CHUNK)
        rate = tl.load(_line(work, D_ETA, C))
        if eta is None:
            rate *= tl.sigmoid(_gate(gates.eta_read, gates.eta_bias, found.eta, E, CHUNK, C, BE))
            _gate_backward(
                gates.eta_read, d_eta_read + n * E, d_eta_bias + n, found.eta, back.eta, rate, E, CHUNK, C, BE
            )
        else:
            tl.store(d_eta + first + s + t, rate, mask=t < CHUNK)
        if alpha is None:
            now_alpha = tl.load(_line(work, RETENTION, C))
            _gate_backward(
                gates.alpha_read, d_alpha_read + n * E, d_alpha_bias + n, found.alpha, back.alpha,
                da * now_alpha * (1.0 - now_alpha), E, CHUNK, C, BE,
            )  # fmt: skip
        else:
            tl.store(d_alpha + first + s + t, da, mask=t < CHUNK)
        tl.debug_barrier()
        if u is not None:
            for j in tl.range(0, adaptive, disable_licm=True):
                m, d = _memory(now, plane, j, None, None, E, H), _memory(d_states, plane, j, None, None, E, H)
                at_u, row = _inputs(x, s, j, E), adaptive * E
                y = _answer(c, m, _tokens(at_u, e, CHUNK, C), E, H, CHUNK, C, BE, BH, PRECISION)
                tl.debug_barrier()
                d_read = _tokens(_Stream(back.k + j * E * C, E, E), e, CHUNK, C)
                d_read = tl.where(_normal(x, j, QK_NORM), _normalized_backward(y, d_read), d_read)
                d_u = _answer_backward(c, m, d, at_u, d_read, E, H, CHUNK, C, BE, BH, PRECISION)
                _store_tokens(_Stream(du + (first + s) * row + j * E, row, E), d_u, e, CHUNK, C)
                tl.debug_barrier()


@jit
def _chunk_gates_backward(c, theta, CHUNK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of alpha and theta (C,) from those in work."""
    work = c.work
    ends = work + D_ENDS * C
    d = _GateGradients(
        tl.load(_square(work, D_BETWEEN, C)), tl.load(_square(work, D_GAIN, C)), tl.load(_line(work, D_BEFORE, C)),
        tl.load(_line(work, D_GAIN_M, C)), tl.load(_line(work, D_AFTER, C)), tl.load(_line(work, D_GAIN_END, C)),
        tl.load(_line(work, D_KEEP, C)), tl.load(ends), tl.load(ends + 1), tl.load(ends + 2),
    )  # fmt: skip
    g = _gates(c.alpha, theta, CHUNK, True, PRECISION, C)
    zeros, zero = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    return _gates_backward(g, theta, d, zeros, zero, True, PRECISION)


# ---- What hope.py calls ----


def layer_fits(c: Any, x: Tensor) -> bool:
    """Whether `memory_layer` computes a layer of these settings (a `hope.MemoryConfig`) for streams like x."""
    if not torch.is_grad_enabled() or x.dtype == torch.float64 or not layers_by_triton(x):
        return False
    learns = (c.depth, c.rule, c.step, c.beta, c.momentum, c.decay_first) == (2, "dgd", "exact", 1, True, False)
    reads = c.read == "token" and not c.memory_norm and (c.value_norm or not c.self_values)
    tiles = c.chunk == c.chunk_proj <= 64 and c.d_head <= 64 and c.expand * c.d_head <= 128
    return learns and reads and tiles


# Whatever a gradient may be wanted of, in the order of `_LayerFunction`'s inputs. The first seven are streams.
INPUTS = "u k v q eta alpha theta W2 W1 m2 m1 start scale eta_read eta_bias alpha_read alpha_bias".split()
STATES = range(7, 11)  # of them
WARPS = 8  # of a program with chunks of 33 to 64 tokens; shorter ones have 4


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
        Y, states = layer_forward(inputs, keep, *flags)
        ctx.flags = flags
        ctx.save_for_backward(*inputs, states if keep else None)
        ctx.set_materialize_grads(False)
        end = states[-1] if keep else states[Y.shape[2] // flags[0] % 2].clone()
        return Y, *(z.view(inputs[k].shape) for z, k in zip(end, STATES))

    @staticmethod
    def backward(ctx, *grads):
        *inputs, states = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            raise RuntimeError(
                "a memory layer in one launch has no second derivative; set one_launch = False of the Memory"
            )
        if states is None:
            states = layer_forward(inputs, True, *ctx.flags)[1]
        *made, d_states = layer_backward(inputs, states, grads, *ctx.flags)
        of = {k: z.view(inputs[k].shape) for k, z in zip(STATES, d_states)}
        made = iter(made)
        return None, None, *(None if z is None else of[k] if k in of else next(made) for k, z in enumerate(inputs))


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
    work_size = (LINES.value + SQUARES.value * C + 2 * adaptive * E + TILES.value * max(E, H)) * C
    sizes = dict(
        heads=h, memories=n, adaptive=adaptive, u_next=0 if u is None or u.shape[3] == 1 else u.stride(3), **rows,
        work_size=work_size, E=E, H=H, CHUNK=chunk, L2=l2, SELF_VALUES=self_values, QK_NORM=qk_norm,
        HIDDEN_RATE=hidden_rate, C=C, BE=tile(E), BH=tile(H), PRECISION=precision(at.device),
        num_warps=WARPS if C == 64 else 4, num_stages=1,
    )  # fmt: skip
    return [*streams, at], sizes, inputs[7].new_empty(b * h, work_size)


def forward_chunks(inputs, keep, *flags):
    """Y (b, h, s, e) and `_layer_forward`'s states, (slots, 4, b, h, n, H e), all of them or two."""
    Y, states = _forward_shapes(inputs, keep, *flags)
    b, h, s, _ = Y.shape
    streams, sizes, work = _launched(inputs, *flags)
    torch.stack([z.reshape(states.shape[2:]) for z in inputs[7:11]], out=states[0])
    rest = [None if z is None else z.contiguous() for z in inputs[11:]]
    with on_device(work.device):
        _layer_forward[(b * h,)](*streams, states, *rest, Y, work, s // flags[0], len(states), **sizes)
    return Y, states


def backward_chunks(inputs, states, grads, *flags):
    """Gradients of the inputs that there are, those of the four states last and as one, (4, b, h, n, H e)."""
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
    made = (*d_streams, *(None if z is None else z.sum(0) for z in parts), d_states)
    return [z for z in made if z is not None]


# ---- As operations of PyTorch's: each is one, with a shape and a cost, for tensors without numbers as well ----


def _forward_shapes(inputs, keep, chunk, *flags):
    b, h, n, H, E = inputs[7].shape
    s = inputs[6].shape[2]
    new = inputs[7].new_empty
    return new(b, h, s, E), new(s // chunk + 1 if keep else 2, 4, b, h, n, H * E)


def _backward_shapes(inputs, states, grads, *flags):
    others = [z for k, z in enumerate(inputs) if z is not None and k not in STATES]
    return [*(z.new_empty(z.shape) for z in others), states.new_empty(states.shape[1:])]


FLAGS = "int chunk, int adaptive, bool l2, bool self_values, bool qk_norm, float hidden_rate"
operation = partial(torch.library.custom_op, mutates_args=())
layer_forward = operation(
    "hope::layer_forward", forward_chunks, schema=f"(Tensor?[] inputs, bool keep, {FLAGS}) -> (Tensor, Tensor)"
)
layer_backward = operation(
    "hope::layer_backward", backward_chunks,
    schema=f"(Tensor?[] inputs, Tensor states, Tensor?[] grads, {FLAGS}) -> Tensor[]",
)  # fmt: skip
layer_forward.register_fake(_forward_shapes)
layer_backward.register_fake(_backward_shapes)
FORWARD, BACKWARD = torch.ops.hope.layer_forward, torch.ops.hope.layer_backward


def _products(shapes: Sequence, chunk: int, adaptive: int, l2: bool, self_values: bool) -> tuple[int, int]:
    """Multiplications in the products of a program's chunk, forward and backward, for shapes of `INPUTS`."""
    n, H, E = shapes[7][2:]
    start, reads = shapes[11] is not None, adaptive * (shapes[0] is not None)
    matrix, square, cube = E * H * chunk, chunk * chunk, chunk**3  # of a matrix, of scores, with a tile; of gates
    inverse = 2 * ((chunk > 16) + (chunk > 32)) * cube
    begin = 2 * reads * matrix + square * E + inverse + cube
    layers = (6 + start + 2 * self_values) * matrix + square * (2 * E + 3 * H) + inverse
    read_hidden = (2 + start) * matrix + square * (E + 2 * H)
    read = read_hidden + 2 * matrix + square * (2 * E + H)
    forward = begin + n * (layers + 4 * matrix) + read
    # On the way back layers are computed again, and of what is read the hidden layer.
    back = (21 + start + 2 * l2 + 6 * self_values) * matrix + 6 * square * (E + H)
    read_back = read_hidden + (8 + 3 * start) * matrix + 8 * square * (E + H)
    backward = begin + n * (layers + back) + read_back + 6 * reads * matrix + 5 * cube
    return forward, backward


@register_flop_formula(FORWARD)
def _(inputs, keep, chunk, adaptive, l2, self_values, *flags, out_shape=None):
    b, h, s = inputs[6]
    return 2 * b * h * (s // chunk) * _products(inputs, chunk, adaptive, l2, self_values)[0]


@register_flop_formula(BACKWARD)
def _(inputs, states, grads, chunk, adaptive, l2, self_values, *flags, out_shape=None):
    b, h, s = inputs[6]
    return 2 * b * h * (s // chunk) * _products(inputs, chunk, adaptive, l2, self_values)[1]


def traffic(operation: Any, args: Sequence, out: Sequence[Tensor]) -> int | None:
    """Bytes that the two operations move, None for others: what they are given and give, once; and for every chunk its
    states, which are read and written, on the way back read, where gradients of states are read and written.

    `work` is left out, as if it stayed in a GPU's cache: half a megabyte a program at 64 numbers a head and chunks of
    64, of which an H100 has 50 for its 132 multiprocessors. That is optimistic.
    """
    if operation not in (FORWARD, BACKWARD):
        return None
    size = lambda tensors: sum(z.numel() * z.element_size() for z in tensors if z is not None)
    inputs, back = args[0], operation is BACKWARD
    b, _, s = inputs[6].shape
    chunks, states = s // args[3 if back else 2], size(inputs[7:11])
    shared = size(inputs) - states
    if back:
        return shared + size(args[2]) + size(out) + chunks * (3 * states + 2 * b * size(inputs[11:12]))
    return shared + size(out[:1]) + (2 + 2 * chunks) * states
