"""A memory layer with MLP memories on a GPU, with gradients: one launch forward, one or two back.

    layer_fits      whether there is such a launch for a layer's settings, and for tensors like one
    memory_layer    what `hope.Memory` does with whole chunks

`scan.memory_scan` is the same without gradients, for any number of tokens and every kind of memory.

Work: a program has one head of one sequence and goes through its chunks; in each, through its memories, which share
keys, values and gates. All tokens of a chunk are one tile, and so is every matrix of a memory: with chunks of 64 and
heads of 64 each product is 64 x 64 x 64. The letters are those of kernels.py: tokens are the last axis of all, scores
and gates (C, C) are [s, t] for a write at s and time t. What a chunk makes goes through memory from a product to the
next, in a part of `work` that the program has for itself and that should stay in the cache.

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
)

# What a program keeps in `work`: LINES (C,), TABLES (C, C), reads of adaptive memories and their gradients, TILES of
# tokens. Lines and tables are of gates, as reads have them (before, gain_m; between, gain) and the chunk's end (after,
# gain, keep; all, gain_m and keep_m in one line); of steps; of scores, S = (step x)^T x, and (1 + between S)^-1; of
# gradients, with d_ in front. Tiles are z = W2 k; of both layers their input (the hidden layer's are the keys), their
# gradient d and p = M_{t-1} x_t; silu of what is read of W2, and that itself; the gradient of what the solve makes p
# of; those of both layers' d and x, and of what is read of W2.
LINES, TABLES, TILES = constexpr(17), constexpr(10), constexpr(14)
BEFORE, GAIN_M, AFTER, GAIN_END, KEEP, ENDS, ETA, STEP_2, STEP_1, RETENTION = (constexpr(k) for k in range(10))
D_BEFORE, D_GAIN_M, D_AFTER, D_GAIN_END, D_KEEP, D_ENDS, D_ETA = (constexpr(k) for k in range(10, 17))
BETWEEN, GAIN, D_BETWEEN, D_GAIN, S_2, INVERSE_2, S_1, INVERSE_1, D_S, D_S_READ = (constexpr(k) for k in range(10))
Z, HIDDEN, D_2, P_2, D_1, P_1, SILU, READ, DZ, DD_1, D_HIDDEN, D_READ, DD_2, D_KEYS = (constexpr(k) for k in range(14))

# Arguments whose values machine code does not depend on: one compilation serves all lengths.
COUNTS = "chunks", "slots"

# What all memories share, from the program's first token on; None for what is read from memories.
_Streams = namedtuple("_Streams", "u k v q eta alpha theta u_next u_row k_row v_row q_row")
# Read-outs of eta and alpha, (E,) and a number each, of the program's head, or their gradients.
_ReadOuts = namedtuple("_ReadOuts", "eta_read eta_bias alpha_read alpha_bias")
# Where what is read of memories, or the gradient of it, lies in work: tiles (E, C) in this order, only of those read.
_Reads = namedtuple("_Reads", "k v q eta alpha")
# A chunk: streams of keys, values, queries; where alpha, work and its tiles are; widths E and H of memories, with their
# numbers e = 0, 1, ... and h, and the tokens t of a tile; how many of these are the chunk's.
_Chunk = namedtuple("_Chunk", "k v q alpha work tiles E H e h t length")
# The matrices of one memory: W2 (H, E), W1 (E, H), their momenta; W2's start state; the factor of its values. Or where
# their gradients are.
_Memory = namedtuple("_Memory", "W2 W1 m2 m1 S2 scale")
# One layer of it: matrix and momentum, and what the matrix starts from; streams x, d, p; where in work its steps, S and
# inverse are; rows and columns, and how many.
_Layer = namedtuple("_Layer", "M m start x d p step S inverse o i O I")
# On the way back: the gradients of matrix, momentum and start; the streams for those of d, x and what is read at.
_Back = namedtuple("_Back", "M m start d x q")


@jit
def _line(c, k):
    """Where line k is."""
    return c.work + k * c.t.shape[0] + c.t


@jit
def _row(c, k):
    """Line k, for every row of a tile."""
    return tl.load(_line(c, k))[None, :]


@jit
def _table(c, k):
    """Where table k is."""
    C: tl.constexpr = c.t.shape[0]
    return c.work + (LINES + k * C) * C + c.t[:, None] * C + c.t[None, :]


@jit
def _tile(c, k, size):
    """The stream of tile k, with `size` numbers a token."""
    return _Stream(c.tiles + k * tl.maximum(c.E, c.H) * c.t.shape[0], size, size)


@jit
def _get(c, x, i):
    """Numbers i of a chunk's tokens of a stream."""
    return _tokens(x, i, c.length, c.t.shape[0])


@jit
def _put(c, to, value, i):
    """Into a stream, and wait until it is there."""
    _store_tokens(to, value, i, c.length, c.t.shape[0])
    tl.debug_barrier()


@jit
def _add(c, to, value, i):
    value += _get(c, to, i)
    tl.debug_barrier()
    _put(c, to, value, i)


@jit
def _add_to(p, value):
    """Add to a line, a table or a number: each thread to those of which it has the value."""
    tl.store(p, tl.load(p) + value)


@jit
def _add_matrix(to, value, o, i, O, I):
    value += _matrix(to, o, i, O, I)
    tl.debug_barrier()
    _store_matrix(to, value, o, i, O, I)
    tl.debug_barrier()


@jit
def _product(a, b, PRECISION: tl.constexpr):
    """a b. A barrier keeps the compiler from beginning the next product early: registers hold the factors of one."""
    y = _dot(a, b, PRECISION)
    tl.debug_barrier()
    return y


@jit
def _of(layer, matrix):
    """The tile of a layer's matrix, or of what has its shape."""
    return _matrix(matrix, layer.o, layer.i, layer.O, layer.I)


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
def _answer(c, m, x, PRECISION: tl.constexpr):
    """x + W1 silu(W2 x) for the stream x; leaves W2 x in tile Z."""
    z = _product(_matrix(m.W2, c.h, c.e, c.H, c.E), _get(c, x, c.e), PRECISION)
    _put(c, _tile(c, Z, c.H), z, c.h)
    return _product(_matrix(m.W1, c.e, c.h, c.E, c.H), _silu(z), PRECISION) + _get(c, x, c.e)


@jit
def _answer_backward(c, m, d, x, dy, PRECISION: tl.constexpr):
    """Of `_answer`, from the gradient dy: returns that of x, adds those of W2 and W1 to the `_Memory` d."""
    z = _get(c, _tile(c, Z, c.H), c.h)
    _add_matrix(d.W1, _product(dy, tl.trans(_silu(z)), PRECISION), c.e, c.h, c.E, c.H)
    dz = _product(tl.trans(_matrix(m.W1, c.e, c.h, c.E, c.H)), dy, PRECISION) * _slope(z)
    _add_matrix(d.W2, _product(dz, tl.trans(_get(c, x, c.e)), PRECISION), c.h, c.e, c.H, c.E)
    return dy + _product(tl.trans(_matrix(m.W2, c.h, c.e, c.H, c.E)), dz, PRECISION)


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
def _memory(states, plane, j, scale, S2, size):
    """Where memory j of the program is: states (4, all memories of all programs, size), a plane for each matrix."""
    here = states + j * size
    start = S2 if S2 is None else S2 + j * size
    factor = scale if scale is None else scale + j
    return _Memory(here, here + plane, here + 2 * plane, here + 3 * plane, start, factor)


@jit
def _hidden_layer(c, m):
    d, p = _tile(c, D_2, c.H), _tile(c, P_2, c.H)
    return _Layer(m.W2, m.m2, m.S2, c.k, d, p, STEP_2, S_2, INVERSE_2, c.h, c.e, c.H, c.E)


@jit
def _output_layer(c, m):
    x, d, p = _tile(c, HIDDEN, c.H), _tile(c, D_1, c.E), _tile(c, P_1, c.E)
    return _Layer(m.W1, m.m1, None, x, d, p, STEP_1, S_1, INVERSE_1, c.e, c.h, c.E, c.H)


@jit
def _inputs(x, s, j, E):
    """The stream of what memory j is read at, from token s on."""
    return _Stream(x.u + s * x.u_row + j * x.u_next, x.u_row, E)


@jit
def _gate(c, read, bias, at):
    """<read, x> + bias, a number a token (C,), for the tile x at `at`."""
    weight = tl.load(read + c.e, mask=c.e < c.E, other=0.0)
    return tl.sum(_get(c, _Stream(at, c.E, c.E), c.e) * weight[:, None], 0) + tl.load(bias)


@jit
def _begin_chunk(
    x, gates, states, plane, work, s, adaptive, E: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr,
    QK_NORM: tl.constexpr, HIDDEN_RATE: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The `_Chunk` from token s on: reads the adaptive memories, and leaves in work what memories share."""
    reads, t = work + (LINES + TABLES * C) * C, tl.arange(0, C)
    at, tiles = _reads_at(x, reads, E * C), reads + 2 * adaptive * E * C
    k = _Stream(at.k, E, E) if x.k is None else _Stream(x.k + s * x.k_row, x.k_row, E)
    v = _Stream(at.v, E, E) if x.v is None else _Stream(x.v + s * x.v_row, x.v_row, E)
    q = _Stream(at.q, E, E) if x.q is None else _Stream(x.q + s * x.q_row, x.q_row, E)
    alpha = work + RETENTION * C if x.alpha is None else x.alpha + s
    c = _Chunk(k, v, q, alpha, work, tiles, E, H, tl.arange(0, BE), tl.arange(0, BH), t, CHUNK)
    tl.debug_barrier()
    if x.u is not None:
        for j in tl.range(0, adaptive, disable_licm=True):
            y = _answer(c, _memory(states, plane, j, None, None, E * H), _inputs(x, s, j, E), PRECISION)
            y = tl.where(_normal(x, j, QK_NORM), _normalized(y), y)
            _put(c, _Stream(reads + j * E * C, E, E), y, c.e)
    if x.eta is None:
        eta = _softplus(_gate(c, gates.eta_read, gates.eta_bias, at.eta))
    else:
        eta = _steps(x.eta + s, CHUNK, C)
    tl.store(_line(c, ETA), eta)
    if x.alpha is None:
        tl.store(_line(c, RETENTION), tl.sigmoid(_gate(c, gates.alpha_read, gates.alpha_bias, at.alpha)))
    tl.debug_barrier()
    g = _gates(alpha, x.theta + s, CHUNK, True, PRECISION, C)
    tl.store(_table(c, BETWEEN), g.reads.between)
    tl.store(_table(c, GAIN), g.reads.gain)
    tl.store(_line(c, BEFORE), g.reads.before)
    tl.store(_line(c, GAIN_M), g.reads.gain_m)
    tl.store(_line(c, AFTER), g.end.after)
    tl.store(_line(c, GAIN_END), g.end.gain)
    tl.store(_line(c, KEEP), g.end.keep)
    tl.store(_line(c, ENDS), tl.where(t == 0, g.end.all, tl.where(t == 1, g.end.gain_m, g.end.keep_m)))
    tl.debug_barrier()
    tl.store(_line(c, STEP_2), _step(HIDDEN_RATE * tl.load(_line(c, ETA)), _get(c, k, c.e)))
    tl.debug_barrier()
    _scores(c, _hidden_layer(c, _Memory(None, None, None, None, None, None)), PRECISION)
    return c


@jit
def _scores(c, layer, PRECISION: tl.constexpr):
    """A layer's scores S, and (1 + A)^-1 of its system A = between S, into work: of the 16 x 16 blocks on the diagonal
    by substitution, a token of each after the other; with T, what these give, N = T (A without them) has N^4 = 0."""
    EXACT: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32x3"
    x = _get(c, layer.x, layer.i)
    tl.store(_table(c, layer.S), _product(tl.trans(x * _row(c, layer.step)), x, PRECISION))
    tl.debug_barrier()
    s, t = c.t[:, None], c.t[None, :]
    near, inverse = s // 16 == t // 16, _table(c, layer.inverse)
    A_T = tl.trans(tl.where(near, tl.load(_table(c, BETWEEN)) * tl.load(_table(c, layer.S)), 0.0))
    T = tl.where(s == t, 1.0, 0.0)
    for token in tl.range(1, 16, disable_licm=True):
        row = tl.sum(tl.where(s % 16 == token, A_T, 0.0), 0)
        T = tl.where(near & (t % 16 == token), T - tl.sum(T * row[None, :], 1)[:, None], T)
    tl.store(inverse, T)
    tl.debug_barrier()
    if c.t.shape[0] > 16:
        N, R = _table(c, D_S), _table(c, D_S_READ)  # nobody needs these now
        A = tl.where(near, 0.0, tl.load(_table(c, BETWEEN)) * tl.load(_table(c, layer.S)))
        tl.store(N, _dot(tl.load(inverse), A, EXACT))
        tl.debug_barrier()
        tl.store(R, tl.load(inverse) - _dot(tl.load(N), tl.load(inverse), EXACT))
        tl.debug_barrier()
        if c.t.shape[0] > 32:
            N_N = _dot(tl.load(N), tl.load(N), EXACT)
            tl.debug_barrier()
            tl.store(N, N_N)
            tl.debug_barrier()
            tl.store(inverse, tl.load(R) + _dot(tl.load(N), tl.load(R), EXACT))
        else:
            tl.store(inverse, tl.load(R))
        tl.debug_barrier()


@jit
def _found(c, layer, x, IN_WHOLE: tl.constexpr, PRECISION: tl.constexpr):
    """What a chunk's start gives of a read at the stream x, before (M x) + gain_m (m x). Of a matrix that comes from a
    start state only what it differs by is forgotten, and counts; that of the start is added if `IN_WHOLE`."""
    y = _row(c, BEFORE) * _product(_of(layer, layer.M), _get(c, x, layer.i), PRECISION)
    y += _row(c, GAIN_M) * _product(_of(layer, layer.m), _get(c, x, layer.i), PRECISION)
    if layer.start is not None:
        start = _product(_of(layer, layer.start), _get(c, x, layer.i), PRECISION)
        y -= _row(c, BEFORE) * start
        if IN_WHOLE:
            y += start
    return y


@jit
def _solve(c, layer, y, PRECISION: tl.constexpr):
    """p of a layer, from what the chunk's start gives of reads at its inputs, into its stream."""
    y -= _product(_get(c, layer.d, layer.o), tl.load(_table(c, GAIN)) * tl.load(_table(c, layer.S)), PRECISION)
    _put(c, layer.p, _product(y, tl.load(_table(c, layer.inverse)), PRECISION), layer.o)


@jit
def _layers(c, m, L2: tl.constexpr, SELF_VALUES: tl.constexpr, PRECISION: tl.constexpr):
    """A memory's writes in a chunk, eqs. 84 and 88: leaves in work x, d and p of both its layers, and z."""
    hidden, out = _hidden_layer(c, m), _output_layer(c, m)
    if SELF_VALUES:
        value = tl.load(m.scale) * _normalized(_answer(c, m, c.v, PRECISION))
    else:
        value = _get(c, c.v, c.e)
    _put(c, out.d, -value, c.e)
    z = _product(_of(hidden, m.W2), _get(c, c.k, c.e), PRECISION)
    x = _silu(z)
    tl.store(_line(c, STEP_1), _step(tl.load(_line(c, ETA)), x))
    _put(c, _tile(c, Z, c.H), z, c.h)
    _put(c, out.x, x, c.h)
    if L2:
        y = _product(_of(out, m.W1), _get(c, out.x, c.h), PRECISION)
        _add(c, out.d, y + _get(c, c.k, c.e), c.e)
    _scores(c, out, PRECISION)
    _solve(c, out, _found(c, out, out.x, False, PRECISION), PRECISION)
    d = _product(tl.trans(_of(out, m.W1)), _get(c, out.d, c.e), PRECISION)
    _put(c, hidden.d, d * _slope(_get(c, _tile(c, Z, c.H), c.h)), c.h)
    _solve(c, hidden, _found(c, hidden, c.k, False, PRECISION), PRECISION)
    return hidden, out


@jit
def _read(c, layer, q, PRECISION: tl.constexpr):
    """M_{t-1} q_t of a layer, a tile, for the stream q."""
    y, S = _found(c, layer, q, True, PRECISION), _read_scores(c, layer, q, PRECISION)
    y -= _product(_get(c, layer.d, layer.o), tl.load(_table(c, GAIN)) * S, PRECISION)
    return y - _product(_get(c, layer.p, layer.o), tl.load(_table(c, BETWEEN)) * S, PRECISION)


@jit
def _read_scores(c, layer, q, PRECISION: tl.constexpr):
    return _product(tl.trans(_get(c, layer.x, layer.i) * _row(c, layer.step)), _get(c, q, layer.i), PRECISION)


@jit
def _read_hidden(c, hidden, PRECISION: tl.constexpr):
    """What queries read of W2, into tile READ, and silu of it, into SILU, which is returned."""
    r = _read(c, hidden, c.q, PRECISION)
    _put(c, _tile(c, READ, c.H), r, c.h)
    _put(c, _tile(c, SILU, c.H), _silu(r), c.h)
    return _tile(c, SILU, c.H)


@jit
def _end(c, layer, to_M, to_m, PRECISION: tl.constexpr):
    """A layer's matrix and momentum at the chunk's end."""
    ends = c.work + ENDS * c.t.shape[0]
    xe = tl.trans(_get(c, layer.x, layer.i) * _row(c, layer.step))
    m = tl.load(ends + 2) * _of(layer, layer.m)
    m -= _product(_row(c, KEEP) * _get(c, layer.d, layer.o), xe, PRECISION)
    _store_matrix(to_m, m, layer.o, layer.i, layer.O, layer.I)
    M = tl.load(ends) * _of(layer, layer.M) + tl.load(ends + 1) * _of(layer, layer.m)
    M -= _product(_writes(c, layer), xe, PRECISION)
    if layer.start is not None:
        M += (1.0 - tl.load(ends)) * _of(layer, layer.start)
    _store_matrix(to_M, M, layer.o, layer.i, layer.O, layer.I)
    tl.debug_barrier()


@jit
def _writes(c, layer):
    """What has been written at every token, as the matrix has it at the chunk's end."""
    return _row(c, GAIN_END) * _get(c, layer.d, layer.o) + _row(c, AFTER) * _get(c, layer.p, layer.o)


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


@partial(jit, do_not_specialize=COUNTS)
def _layer_forward(
    u, k, v, q, eta, alpha, theta, at, states, S2, scale, eta_read, eta_bias, alpha_read, alpha_bias, Y, work,
    chunks, slots, heads, memories, adaptive, u_next, u_row, k_row, v_row, q_row, work_size,
    E: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, L2: tl.constexpr, SELF_VALUES: tl.constexpr,
    QK_NORM: tl.constexpr, HIDDEN_RATE: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`memory_layer`. Grid (sequences x heads); at: (n, 7), where each one's part of the first seven begins; states:
    (slots, 4, n, memories, E H), the first one given, those at the start of chunk i in slot i modulo `slots`."""
    n, size = tl.program_id(0).to(tl.int64), E * H
    head, plane = n % heads, tl.num_programs(0).to(tl.int64) * memories * size
    x = _at_program(u, k, v, q, eta, alpha, theta, at + n * 7, u_next, u_row, k_row, v_row, q_row)
    gates = _at_head(eta_read, eta_bias, alpha_read, alpha_bias, head, E)
    states, work = states + n * memories * size, work + n * work_size
    S2 = S2 if S2 is None else S2 + head * memories * size
    scale = scale if scale is None else scale + head * memories
    for chunk in tl.range(0, chunks, disable_licm=True):
        now, new = states + chunk % slots * 4 * plane, states + (chunk + 1) % slots * 4 * plane
        s = chunk * CHUNK
        c = _begin_chunk(
            x, gates, now, plane, work, s, adaptive, E, H, CHUNK, QK_NORM, HIDDEN_RATE, C, BE, BH, PRECISION
        )
        for j in tl.range(0, memories, disable_licm=True):
            m, to = _memory(now, plane, j, scale, S2, size), _memory(new, plane, j, None, None, size)
            hidden, out = _layers(c, m, L2, SELF_VALUES, PRECISION)
            if j == memories - 1:
                y = _read(c, out, _read_hidden(c, hidden, PRECISION), PRECISION) + _get(c, c.q, c.e)
                _put(c, _Stream(Y + (n * chunks * CHUNK + s) * E, E, E), y, c.e)
            _end(c, hidden, to.W2, to.m2, PRECISION)
            _end(c, out, to.W1, to.m1, PRECISION)


# ---- Backward ----


@jit
def _layer_backward(c, layer, to, q, dr, read, PRECISION: tl.constexpr):
    """Of `_end`, and of `_read` at the stream q with the gradient dr if `read`, and of the `_solve` before them. In the
    letters of `kernels._chunk_backward`: E and E_m are the gradients of the chunk's end, U = E (step x)^T, dz that of
    what the solve turns into p. Turns E and E_m, in the `_Back` to, into those of the chunk's start; puts the gradients
    of d, x and q into streams; adds those of the start and of gates to what is there. Returns that of the steps."""
    o, i = layer.o, layer.i
    to_z = _tile(c, DZ, layer.O)
    U = _product(_of(layer, to.M), _get(c, layer.x, i) * _row(c, layer.step), PRECISION)
    _add_to(_line(c, D_AFTER), -tl.sum(_get(c, layer.p, o) * U, 0))
    _add_to(_line(c, D_GAIN_END), -tl.sum(_get(c, layer.d, o) * U, 0))
    dz, dd = -_row(c, AFTER) * U, -_row(c, GAIN_END) * U
    U = _product(_of(layer, to.m), _get(c, layer.x, i) * _row(c, layer.step), PRECISION)
    _add_to(_line(c, D_KEEP), -tl.sum(_get(c, layer.d, o) * U, 0))
    dd -= _row(c, KEEP) * U
    if read:
        S = _read_scores(c, layer, q, PRECISION)
        dd -= _product(_get(c, dr, o), tl.trans(tl.load(_table(c, GAIN)) * S), PRECISION)
        dz -= _product(_get(c, dr, o), tl.trans(tl.load(_table(c, BETWEEN)) * S), PRECISION)
    dz = _product(dz, tl.trans(tl.load(_table(c, layer.inverse))), PRECISION)
    _put(c, to_z, dz, o)
    scores = tl.load(_table(c, GAIN)) * tl.load(_table(c, layer.S))
    _put(c, to.d, dd - _product(_get(c, to_z, o), tl.trans(scores), PRECISION), o)
    _score_gradients(c, layer, tl.load(_table(c, layer.S)), to_z, D_S, PRECISION)
    if read:
        _score_gradients(c, layer, _read_scores(c, layer, q, PRECISION), dr, D_S_READ, PRECISION)
        _put(c, to.q, _read_backward(c, layer, q, dr, D_S_READ, PRECISION), i)
    dxe = -_product(tl.trans(_of(layer, to.M)), _writes(c, layer), PRECISION)
    dxe -= _product(tl.trans(_of(layer, to.m)), _row(c, KEEP) * _get(c, layer.d, o), PRECISION)
    dxe -= _product(_get(c, layer.x, i), tl.trans(tl.load(_table(c, D_S))), PRECISION)
    if read:
        dxe -= _product(_get(c, q, i), tl.trans(tl.load(_table(c, D_S_READ))), PRECISION)
    d_step = tl.sum(dxe * _get(c, layer.x, i), 0)
    _put(c, to.x, dxe * _row(c, layer.step), i)
    _add(c, to.x, _read_backward(c, layer, layer.x, to_z, D_S, PRECISION), i)
    _start_backward(c, layer, to, q, dr, to_z, read, PRECISION)
    return d_step


@jit
def _score_gradients(c, layer, S, dy, place, PRECISION: tl.constexpr):
    """Of reads with scores S and gradient dy: that of S without its sign, into work; adds those of between and gain."""
    of = _product(tl.trans(_get(c, layer.d, layer.o)), _get(c, dy, layer.o), PRECISION)
    _add_to(_table(c, D_GAIN), -S * of)
    minus_dS = tl.load(_table(c, GAIN)) * of
    of = _product(tl.trans(_get(c, layer.p, layer.o)), _get(c, dy, layer.o), PRECISION)
    _add_to(_table(c, D_BETWEEN), -S * of)
    tl.store(_table(c, place), minus_dS + tl.load(_table(c, BETWEEN)) * of)
    tl.debug_barrier()


@jit
def _read_backward(c, layer, at, dy, scores, PRECISION: tl.constexpr):
    """The gradient of the stream `at` from that of reads there, dy, where these see what `_found` without `IN_WHOLE`
    and the scores do of it; adds those of before and gain_m."""
    x, dy = _get(c, at, layer.i), _get(c, dy, layer.o)
    y = _product(tl.trans(_of(layer, layer.M)), dy, PRECISION)
    if layer.start is not None:
        y -= _product(tl.trans(_of(layer, layer.start)), dy, PRECISION)
    _add_to(_line(c, D_BEFORE), tl.sum(x * y, 0))
    d_at = _row(c, BEFORE) * y
    y = _product(tl.trans(_of(layer, layer.m)), dy, PRECISION)
    _add_to(_line(c, D_GAIN_M), tl.sum(x * y, 0))
    d_at += _row(c, GAIN_M) * y
    return d_at - _product(_get(c, layer.x, layer.i) * _row(c, layer.step), tl.load(_table(c, scores)), PRECISION)


@jit
def _start_backward(c, layer, to, q, dr, dz, read, PRECISION: tl.constexpr):
    """The gradients of matrix and momentum at the chunk's start, and of what the matrix starts from."""
    ends, t = c.work + ENDS * c.t.shape[0], c.t
    o, i, O, I = layer.o, layer.i, layer.O, layer.I
    E, E_m, m, change = _of(layer, to.M), _of(layer, to.m), _of(layer, layer.m), _of(layer, layer.M)
    if layer.start is not None:
        change -= _of(layer, layer.start)
    d_ends = tl.where(t == 0, tl.sum(change * E), tl.where(t == 1, tl.sum(m * E), tl.sum(m * E_m)))
    _add_to(_line(c, D_ENDS), tl.where(t < 3, d_ends, 0.0))
    tl.debug_barrier()
    dm = tl.load(ends + 2) * E_m + tl.load(ends + 1) * E
    dm += _product(_row(c, GAIN_M) * _get(c, dz, o), tl.trans(_get(c, layer.x, i)), PRECISION)
    if read:
        dm += _product(_row(c, GAIN_M) * _get(c, dr, o), tl.trans(_get(c, q, i)), PRECISION)
    _store_matrix(to.m, dm, o, i, O, I)
    dM = tl.load(ends) * E + _product(_row(c, BEFORE) * _get(c, dz, o), tl.trans(_get(c, layer.x, i)), PRECISION)
    if read:
        dM += _product(_row(c, BEFORE) * _get(c, dr, o), tl.trans(_get(c, q, i)), PRECISION)
    if layer.start is not None:
        d_start = _of(layer, to.M) - dM
        if read:
            d_start += _product(_get(c, dr, o), tl.trans(_get(c, q, i)), PRECISION)
        _add_matrix(to.start, d_start, o, i, O, I)
    tl.debug_barrier()
    _store_matrix(to.M, dM, o, i, O, I)
    tl.debug_barrier()


@jit
def _memory_backward(
    c,
    m,
    d,
    dk,
    dv,
    dq,
    dy,
    read,
    L2: tl.constexpr,
    SELF_VALUES: tl.constexpr,
    HIDDEN_RATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Turns the gradients of a memory's matrices at the chunk's end, in the `_Memory` d, into those at its start; adds
    to those of its start state and scale, to the streams dk, dv, dq, and to those of eta and gates in work."""
    hidden, out = _layers(c, m, L2, SELF_VALUES, PRECISION)
    dd_1, dd_2, dh, d_keys = _tile(c, DD_1, c.E), _tile(c, DD_2, c.H), _tile(c, D_HIDDEN, c.H), _tile(c, D_KEYS, c.E)
    r, dr = _tile(c, SILU, c.H), _tile(c, D_READ, c.H)
    if read:
        _read_hidden(c, hidden, PRECISION)
    d_step = _layer_backward(c, out, _Back(d.W1, d.m1, None, dd_1, dh, dr), r, dy, read, PRECISION)
    eta = tl.load(_line(c, ETA))
    d_eta, dx = _step_backward(eta, _get(c, out.x, c.h), d_step)
    _add_to(_line(c, D_ETA), d_eta)
    _add(c, dh, dx, c.h)
    to_q = _tile(c, P_1, c.E)  # the output layer needs its p no more
    if read:
        slopes = _slope(_get(c, _tile(c, READ, c.H), c.h)) * _get(c, dr, c.h)
        tl.debug_barrier()
        _put(c, dr, slopes, c.h)
    d_step = _layer_backward(c, hidden, _Back(d.W2, d.m2, d.S2, dd_2, d_keys, to_q), c.q, dr, read, PRECISION)
    if read:
        d_queries = _get(c, to_q, c.e)
        if m.S2 is not None:
            d_queries += _product(tl.trans(_of(hidden, m.S2)), _get(c, dr, c.h), PRECISION)
        _add(c, dq, d_queries, c.e)
    d_eta, dx = _step_backward(HIDDEN_RATE * eta, _get(c, c.k, c.e), d_step)
    _add_to(_line(c, D_ETA), HIDDEN_RATE * d_eta)
    _add(c, dk, dx + _get(c, d_keys, c.e), c.e)
    # Of the inner loss's gradients  d1 = k + y - value,  d2 = (W1^T d1) silu'(z),  then of  y = W1 silu(z),  z = W2 k.
    z = _get(c, _tile(c, Z, c.H), c.h)
    back = _product(tl.trans(_of(out, m.W1)), _get(c, out.d, c.e), PRECISION)
    dz, d_back = _get(c, dd_2, c.h) * back * _bend(z), _get(c, dd_2, c.h) * _slope(z)
    tl.debug_barrier()
    _put(c, dd_2, d_back, c.h)
    _add_matrix(d.W1, _product(_get(c, out.d, c.e), tl.trans(d_back), PRECISION), c.e, c.h, c.E, c.H)
    _add(c, dd_1, _product(_of(out, m.W1), _get(c, dd_2, c.h), PRECISION), c.e)
    if L2:
        d1 = _get(c, dd_1, c.e)
        _add(c, dk, d1, c.e)
        _add_matrix(d.W1, _product(d1, tl.trans(_get(c, out.x, c.h)), PRECISION), c.e, c.h, c.E, c.H)
        _add(c, dh, _product(tl.trans(_of(out, m.W1)), _get(c, dd_1, c.e), PRECISION), c.h)
    dz += _get(c, dh, c.h) * _slope(z)
    _add_matrix(d.W2, _product(dz, tl.trans(_get(c, c.k, c.e)), PRECISION), c.h, c.e, c.H, c.E)
    _add(c, dk, _product(tl.trans(_of(hidden, m.W2)), dz, PRECISION), c.e)
    d_value = -_get(c, dd_1, c.e)
    if SELF_VALUES:
        value = _answer(c, m, c.v, PRECISION)
        _add_to(d.scale, tl.sum(d_value * _normalized(value)))
        d_value = _normalized_backward(value, tl.load(m.scale) * d_value)
        d_value = _answer_backward(c, m, d, c.v, d_value, PRECISION)
    _add(c, dv, d_value, c.e)


@jit
def _gate_backward(c, read, at, to, d, d_read, d_bias):
    """Of `_gate`, with the gradient d (C,) of what it returns: that of the tile at `at` to `to`; adds to the others."""
    there = c.e < c.E
    weight = tl.load(read + c.e, mask=there, other=0.0)
    more = tl.sum(_get(c, _Stream(at, c.E, c.E), c.e) * d[None, :], 1)
    tl.store(d_read + c.e, tl.load(d_read + c.e, mask=there, other=0.0) + more, mask=there)
    _add_to(d_bias, tl.sum(tl.where(c.t < c.length, d, 0.0)))
    _put(c, _Stream(to, c.E, c.E), weight[:, None] * d[None, :], c.e)


@partial(jit, do_not_specialize=COUNTS)
def _layer_backward_chunks(
    u, k, v, q, eta, alpha, theta, at, states, S2, scale, eta_read, eta_bias, alpha_read, alpha_bias,
    dY, du, dk, dv, dq, d_eta, d_alpha, d_theta, d_states, dS2, d_scale, d_eta_read, d_eta_bias, d_alpha_read,
    d_alpha_bias, work,
    chunks, heads, memories, adaptive, u_next, u_row, k_row, v_row, q_row, work_size,
    E: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, L2: tl.constexpr, SELF_VALUES: tl.constexpr,
    QK_NORM: tl.constexpr, HIDDEN_RATE: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The backward pass of `_layer_forward`, with the states of all chunks, on the same grid: from the last chunk on.
    d_states (4, n, memories, E H) comes as the gradients of the end and leaves as those of the start. du (n, s,
    adaptive, E), dk, dv, dq (n, s, E), d_eta, d_alpha, d_theta (n, s); of what sequences share each program has its own
    part: dS2 (n, memories, E H), d_scale (n, memories), d_.._read (n, E), d_.._bias (n,), which come as 0."""
    n, size = tl.program_id(0).to(tl.int64), E * H
    head, plane = n % heads, tl.num_programs(0).to(tl.int64) * memories * size
    x = _at_program(u, k, v, q, eta, alpha, theta, at + n * 7, u_next, u_row, k_row, v_row, q_row)
    gates = _at_head(eta_read, eta_bias, alpha_read, alpha_bias, head, E)
    d_gates = _at_head(d_eta_read, d_eta_bias, d_alpha_read, d_alpha_bias, n, E)
    states, d_states, work = states + n * memories * size, d_states + n * memories * size, work + n * work_size
    S2 = S2 if S2 is None else S2 + head * memories * size
    scale = scale if scale is None else scale + head * memories
    dS2 = dS2 if dS2 is None else dS2 + n * memories * size
    d_scale = d_scale if d_scale is None else d_scale + n * memories
    reads, t = work + (LINES + TABLES * C) * C, tl.arange(0, C)
    found, back = _reads_at(x, reads, E * C), _reads_at(x, reads + adaptive * E * C, E * C)
    for i in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - i
        now, s = states + chunk * 4 * plane, chunk * CHUNK
        first = n * chunks * CHUNK + s  # token, of all
        c = _begin_chunk(
            x, gates, now, plane, work, s, adaptive, E, H, CHUNK, QK_NORM, HIDDEN_RATE, C, BE, BH, PRECISION
        )
        to_k = _Stream(back.k if dk is None else dk + first * E, E, E)
        to_v = _Stream(back.v if dv is None else dv + first * E, E, E)
        to_q = _Stream(back.q if dq is None else dq + first * E, E, E)
        dy, zeros = _Stream(dY + first * E, E, E), tl.zeros((BE, C), tl.float32)
        _put(c, to_k, zeros, c.e)
        _put(c, to_v, zeros, c.e)
        _put(c, to_q, _get(c, dy, c.e), c.e)
        tl.store(_table(c, D_BETWEEN), tl.zeros((C, C), tl.float32))
        tl.store(_table(c, D_GAIN), tl.zeros((C, C), tl.float32))
        for line in tl.static_range(D_BEFORE, LINES):
            tl.store(_line(c, line), tl.zeros((C,), tl.float32))
        tl.debug_barrier()
        for j in tl.range(0, memories, disable_licm=True):
            m, d = _memory(now, plane, j, scale, S2, size), _memory(d_states, plane, j, d_scale, dS2, size)
            read = (j == memories - 1).to(tl.int32)
            _memory_backward(c, m, d, to_k, to_v, to_q, dy, read, L2, SELF_VALUES, HIDDEN_RATE, PRECISION)
        da, d_th = _chunk_gates_backward(c, x.theta + s, PRECISION)
        tl.store(d_theta + first + t, d_th, mask=t < CHUNK)
        d_rate = tl.load(_line(c, D_ETA))
        if eta is None:
            d_rate *= tl.sigmoid(_gate(c, gates.eta_read, gates.eta_bias, found.eta))
            _gate_backward(c, gates.eta_read, found.eta, back.eta, d_rate, d_gates.eta_read, d_gates.eta_bias)
        else:
            tl.store(d_eta + first + t, d_rate, mask=t < CHUNK)
        if alpha is None:
            kept = tl.load(_line(c, RETENTION))
            da *= kept * (1.0 - kept)
            _gate_backward(c, gates.alpha_read, found.alpha, back.alpha, da, d_gates.alpha_read, d_gates.alpha_bias)
        else:
            tl.store(d_alpha + first + t, da, mask=t < CHUNK)
        if u is not None:
            for j in tl.range(0, adaptive, disable_licm=True):
                m, d = _memory(now, plane, j, None, None, size), _memory(d_states, plane, j, None, None, size)
                y = _answer(c, m, _inputs(x, s, j, E), PRECISION)
                d_read = _get(c, _Stream(back.k + j * E * C, E, E), c.e)
                d_read = tl.where(_normal(x, j, QK_NORM), _normalized_backward(y, d_read), d_read)
                d_u, row = _answer_backward(c, m, d, _inputs(x, s, j, E), d_read, PRECISION), adaptive * E
                _put(c, _Stream(du + first * row + j * E, row, E), d_u, c.e)


@jit
def _chunk_gates_backward(c, theta, PRECISION: tl.constexpr):
    """Gradients of alpha and theta (C,) from those in work."""
    ends = c.work + D_ENDS * c.t.shape[0]
    d = _GateGradients(
        tl.load(_table(c, D_BETWEEN)), tl.load(_table(c, D_GAIN)), tl.load(_line(c, D_BEFORE)),
        tl.load(_line(c, D_GAIN_M)), tl.load(_line(c, D_AFTER)), tl.load(_line(c, D_GAIN_END)),
        tl.load(_line(c, D_KEEP)), tl.load(ends), tl.load(ends + 1), tl.load(ends + 2),
    )  # fmt: skip
    C: tl.constexpr = c.t.shape[0]
    g, zero = _gates(c.alpha, theta, c.length, True, PRECISION, C), tl.zeros((C,), tl.float32)
    return _gates_backward(g, theta, d, tl.zeros((C, C), tl.float32), zero, True, PRECISION)


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
    work_size = (LINES.value + TABLES.value * C + 2 * adaptive * E + TILES.value * max(E, H)) * C
    sizes = dict(
        heads=h, memories=n, adaptive=adaptive, u_next=0 if u is None or u.shape[3] == 1 else u.stride(3), **rows,
        work_size=work_size, E=E, H=H, CHUNK=chunk, L2=l2, SELF_VALUES=self_values, QK_NORM=qk_norm,
        HIDDEN_RATE=hidden_rate, C=C, BE=tile(E), BH=tile(H), PRECISION=precision(at.device),
        num_warps=WARPS if C == 64 else 4, num_stages=1,
    )  # fmt: skip
    return [*streams, at], sizes, inputs[7].new_empty(b * h, work_size)


def _forward_chunks(inputs, keep, *flags):
    """Y (b, h, s, e) and `_layer_forward`'s states, (slots, 4, b, h, n, H e), all of them or two."""
    Y, states = _forward_shapes(inputs, keep, *flags)
    b, h, s, _ = Y.shape
    streams, sizes, work = _launched(inputs, *flags)
    torch.stack([z.reshape(states.shape[2:]) for z in inputs[7:11]], out=states[0])
    rest = [None if z is None else z.contiguous() for z in inputs[11:]]
    with on_device(work.device):
        _layer_forward[(b * h,)](*streams, states, *rest, Y, work, s // flags[0], len(states), **sizes)
    return Y, states


def _backward_chunks(inputs, states, grads, *flags):
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
as_operation = partial(torch.library.custom_op, mutates_args=())
layer_forward = as_operation(
    "hope::layer_forward", _forward_chunks, schema=f"(Tensor?[] inputs, bool keep, {FLAGS}) -> (Tensor, Tensor)"
)
layer_backward = as_operation(
    "hope::layer_backward", _backward_chunks,
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
    layers = (6 + start + l2 + 2 * self_values) * matrix + square * (2 * E + 3 * H) + inverse
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

    `work` is left out, as if it stayed in a GPU's cache. It is half a megabyte a program with heads of 64 and chunks of
    64, for 132 multiprocessors of an H100 more than its cache of 50. A chunk of a program with 5 memories loads and
    stores 7 MB forward and 20 back: were all of it to go to memory, 250 MB a token at 760m, beside 93 of the whole model.
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
