"""Hope: self-modifying Titans followed by a continuum memory system, and the memories they are made of.

Follows *Nested Learning* (Behrouz, Razaviyayn, Zhong, Mirrokni; arXiv 2512.24695). Equation numbers are the arXiv
version's. What to know before reading:

- A memory is a small network whose weights are state. Reading it is a forward pass; writing it is a step of an inner
  optimizer. Its start state is a parameter, and gradients flow through every write, so the start state is meta-learnt.
- Time runs in chunks. Inside a chunk every inner gradient is taken at the state the chunk started from (eq. 90, with
  the index that does not leak); the writes themselves act token by token, in one call of `kernels.dgd_chunk`.
- A state carries everything between calls, so a sequence may be cut anywhere.
- Shapes: b batch, t time, d model width, h heads, e head width, n memories side by side, c tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import EPS, chunk_gates, dgd_chunk, memory_scan, scans, uses_triton

INF = float("inf")


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


def check_choices(config: Any) -> None:
    """Raise ValueError for a field of `config` annotated as a Literal that holds something else."""
    for name, hint in get_type_hints(type(config)).items():
        allowed, value = get_args(hint), getattr(config, name)
        if "Literal" in str(hint) and value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")


def check_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")


def unknown_preset(kind: str, name: str, table: dict) -> ValueError:
    return ValueError(f"no {kind} called {name!r}; choose one of: {', '.join(table)}")


def setting(default: Any, help: str) -> Any:
    """A config field; `help` is what `train.py --help` says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class MemoryConfig:
    """What a memory is. Each known sequence layer is a row of choices here (`MemoryConfig.preset`)."""

    d_model: int = setting(128, "model width")
    n_head: int = setting(4, "heads; every head has memories of its own, d_model / n_head wide")
    depth: Literal[0, 1, 2] = setting(
        2, "0: softmax attention, no parameters; 1: linear memory M x; 2: MLP memory x + W1 silu(W2 x) (eq. 89)"
    )
    objective: Literal["dot", "l2"] = setting("l2", "inner loss: dot is -<M k, v>, l2 is 1/2 |M k - v|^2")
    rule: Literal["gd", "dgd"] = setting("dgd", "inner optimizer: gradient descent or delta gradient descent (eq. 88)")
    step: Literal["exact", "mean", "one"] = setting(
        "exact",
        "inner step: exact is beta eta / (1 + eta |x|^2), eta learnt (eq. 57); mean is that divided by the chunk; one is 1",
    )
    beta: float = setting(
        1.0, "what an inner step tends to, times 1 / |x|^2; up to 2, which lets the delta rule change signs"
    )
    momentum: bool = setting(True, "momentum on the inner gradient, with a learnt gate theta")
    decay: Literal["gate", "fixed", "none"] = setting(
        "gate",
        "retention alpha: a learnt gate, a fixed number for every head (RetNet's), or none: nothing is forgotten",
    )
    decay_first: bool = setting(
        False,
        "the delta term erases what decay has left, alpha (M - eta' M x x^T); off: alpha M - eta' M x x^T (eq. 88)",
    )
    adaptive: tuple[str, ...] = setting(
        ("k", "v", "eta", "alpha"), "which of k, v, q, eta, alpha are read from memories that are written too"
    )
    self_values: bool = setting(True, "every memory generates the value it is written with (eq. 84)")
    chunk: int = setting(64, "tokens between two refreshes of the main memory's gradients")
    chunk_proj: int = setting(64, "the same for the memories that produce k, v, q, eta, alpha")
    read: Literal["token", "after", "chunk"] = setting(
        "token",
        "token: y_t from the state before token t (eq. 86); after: from the one after it; chunk: the chunk's start",
    )
    conv: int = setting(4, "width of the causal depthwise convolution in front; 0 for none")
    qk_norm: bool = setting(True, "l2-normalise keys and queries")
    value_norm: bool = setting(True, "l2-normalise self-generated values and rescale them by a learnt factor")
    memory_norm: bool = setting(False, "MLP memories with a layer norm inside: x + norm(W1 silu(W2 x))")
    spread: float = setting(
        0.0, "MLP memories: standard deviation of W2 k for a unit key k, at the start; 0 for 1 / sqrt(head width)"
    )
    expand: int = setting(1, "hidden width of an MLP memory, as a multiple of the head width")
    rotary: bool = setting(False, "rotary positions on keys and queries")
    project: bool = setting(
        True, "static projections into and out of the heads; off is the paper's literal form, one head"
    )
    remat: int = setting(
        16, "chunks between two states that are kept for the backward pass, which recomputes those between; 0 keeps all"
    )
    window: int = setting(0, "softmax attention only: how many tokens back it sees; 0 for all")
    n_kv_head: int = setting(
        0, "softmax attention only: heads of keys and values, shared by the n_head of queries; 0 for n_head"
    )
    bias: bool = setting(False, "softmax attention only: biases in its projections")
    y_norm: bool = setting(True, "normalise what a head reads before the projection out of the heads")
    rope_theta: float = setting(10000.0, "rotary positions: base of the frequencies")

    LINEAR = dict(depth=1, objective="dot", momentum=False, decay="none", adaptive=(), self_values=False, read="after")
    DEEP = dict(rule="gd", step="mean", adaptive=(), self_values=False, chunk=16, chunk_proj=16, spread=1.0)
    PRESETS = {
        "hope": {},
        "linear-attention": dict(LINEAR, rule="gd", step="one"),
        "retnet": dict(LINEAR, rule="gd", step="one", decay="fixed", rotary=True),
        "deltanet": LINEAR,
        "gated-deltanet": dict(LINEAR, decay="gate", decay_first=True),
        "ttt": dict(DEEP, momentum=False, decay="none", read="after", memory_norm=True, expand=4),
        "titans": DEEP,
        "dla": dict(DEEP, objective="dot", momentum=False),
        "attention": dict(depth=0, adaptive=(), rotary=True),
    }

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MemoryConfig:
        """The layer called `name` (see PRESETS), with any field overridden. ValueError for an unknown name."""
        if name not in cls.PRESETS:
            raise unknown_preset("memory preset", name, cls.PRESETS)
        return cls(**{**cls.PRESETS[name], **overrides})

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "d_model", "n_head", "chunk", "chunk_proj", "expand")
        if self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}")
        if unknown := set(self.adaptive) - {"k", "v", "q", "eta", "alpha"}:
            raise ValueError(f"adaptive names {sorted(unknown)}; allowed: k, v, q, eta, alpha")
        if self.conv < 0 or self.window < 0:
            raise ValueError(f"conv is {self.conv}, window is {self.window}; neither can be negative")
        if not self.project and self.n_head > 1:
            raise ValueError(f"project=False is the one-head form, but n_head is {self.n_head}; set n_head=1")
        for name, off in (("eta", self.step == "one"), ("alpha", self.decay != "gate")):
            if name in self.adaptive and off:
                raise ValueError(f"adaptive names {name}, which this memory does not have; leave it out of adaptive")
        if self.n_kv_head < 0 or self.n_head % (self.n_kv_head or 1):
            raise ValueError(
                f"n_kv_head is {self.n_kv_head}; give a divisor of n_head {self.n_head}, or 0 for n_head itself"
            )
        if not 0 < self.beta <= 2:
            raise ValueError(f"beta is {self.beta}; it must be above 0 and at most 2, beyond which writes overshoot")
        if self.spread < 0:
            raise ValueError(f"spread is {self.spread}; it cannot be negative")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta is {self.rope_theta}; it must be above 0")
        if self.depth > 0 and (self.n_kv_head or self.bias):
            raise ValueError(f"n_kv_head and bias are for softmax attention, but depth is {self.depth}; set depth=0")
        if self.depth < 2 and (self.memory_norm or self.expand > 1):
            raise ValueError(f"memory_norm and expand are for MLP memories, but depth is {self.depth}; set depth=2")
        if (self.rotary or self.depth == 0) and self.d_head % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.d_head}; change n_head or d_model")
        if self.rotary and {"k", "q"} & set(self.adaptive):
            raise ValueError("rotary positions are for static keys and queries; take k and q out of adaptive")

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_head


@dataclass(frozen=True)
class HopeConfig:
    """A language model: `n_layer` blocks of a memory and a continuum memory system (eqs. 94-97)."""

    vocab_size: int = setting(256, "number of tokens")
    n_layer: int = setting(2, "blocks")
    memory: MemoryConfig = MemoryConfig()
    pattern: tuple[str, ...] = setting(
        ("memory",),
        "sequence layers of successive blocks, repeated: memory, or attention over the last `window` tokens",
    )
    cms: tuple[float, ...] = setting(
        (64, 256, INF),
        "chunk size of each MLP of the continuum memory system; inf moves with the outer optimizer only, at every step; a "
        "chunk longer than a training sequence moves its start state once per chunk, by the sum of its gradients",
    )
    cms_hidden: float = setting(
        2.0,
        "hidden width of each of these MLPs, as a multiple of d_model; presets fit it to the size's parameter budget",
    )
    cms_rate: tuple[float, ...] = setting(
        (1.0,),
        "inner step size per mean gradient of a chunk, one for all in-context levels or one each; 0 for no writes",
    )
    learn_rates: bool = setting(True, "whether these step sizes are learnt, up to twice the given ones")
    wiring: Literal["sequential", "nested", "independent"] = setting(
        "sequential",
        "how levels are joined: in a chain (eq. 73), in a chain with start states learnt one level up (eq. 72), "
        "or side by side (eq. 74)",
    )
    mlp: Literal["silu", "swiglu", "gelu"] = setting("silu", "kind of MLP; gelu is its tanh form")
    mlp_bias: bool = setting(False, "biases in the MLPs; they are not written in context")
    norm: Literal["rms", "layer"] = setting("rms", "norm in front of every layer; layer is LayerNorm, with a bias")
    norm_eps: float = setting(1e-3, "what the norms add to the mean square")
    n_position: int = setting(0, "learnt absolute positions, and so the longest stream; 0 for none")
    tied: bool = setting(False, "the output head is the embedding")
    inner_grad: Literal["first-order", "full"] = setting(
        "first-order", "whether the outer gradient sees through the inner one (full costs a second derivative)"
    )

    # Width, heads, depth, and what a block weighs in units of d_model^2: what its memory leaves goes to the MLPs.
    SIZES = {
        "tiny": dict(d_model=128, n_head=4, n_layer=2, weight=17.6),
        "60m": dict(d_model=512, n_head=8, n_layer=8, weight=12.97, vocab_size=32000),
        "170m": dict(d_model=768, n_head=12, n_layer=16, weight=12.8, vocab_size=32000),
        "340m": dict(d_model=1024, n_head=16, n_layer=24, weight=10.9, vocab_size=32000),
        "760m": dict(d_model=1536, n_head=24, n_layer=24, weight=11.7, vocab_size=32000),
        "1.3b": dict(d_model=2048, n_head=32, n_layer=24, weight=11.6, vocab_size=32000),
    }  # fmt: skip
    TRANSFORMER = dict(cms=(INF,), mlp="swiglu")
    ARCHS = {
        "hope": dict(memory="hope"),
        "hope-attention": dict(memory="attention"),
        "transformer++": dict(TRANSFORMER, memory="attention"),
        "titans": dict(TRANSFORMER, memory="titans"),
        "deltanet": dict(TRANSFORMER, memory="deltanet"),
        "gated-deltanet": dict(TRANSFORMER, memory="gated-deltanet"),
        "retnet": dict(TRANSFORMER, memory="retnet"),
        "linear-attention": dict(TRANSFORMER, memory="linear-attention"),
        "ttt": dict(TRANSFORMER, memory="ttt"),
        "dla": dict(TRANSFORMER, memory="dla"),
        "samba": dict(TRANSFORMER, memory="gated-deltanet", pattern=("memory", "attention"), window=2048),
    }  # fmt: skip

    @classmethod
    def preset(cls, size: str = "tiny", arch: str = "hope", **overrides: Any) -> HopeConfig:
        """`arch` at `size`, with any field of HopeConfig or MemoryConfig overridden by its name."""
        if size not in cls.SIZES:
            raise unknown_preset("size", size, cls.SIZES)
        if arch not in cls.ARCHS:
            raise unknown_preset("architecture", arch, cls.ARCHS)
        settings = {**cls.SIZES[size], **cls.ARCHS[arch], **overrides}
        memory, weight = settings.pop("memory"), settings.pop("weight")
        inner = {f.name: settings.pop(f.name) for f in fields(MemoryConfig) if f.name in settings}
        if unknown := set(settings) - {f.name for f in fields(cls)}:
            raise ValueError(f"unknown setting {sorted(unknown)}; see HopeConfig and MemoryConfig for the names")
        config = cls(memory=MemoryConfig.preset(memory, **inner), **settings)
        if "cms_hidden" in settings:
            return config
        with torch.device("meta"):
            used = sum(p.numel() for p in Memory(config.memory).parameters())
        matrices = len(config.cms) * (3 if config.mlp == "swiglu" else 2)
        d = config.memory.d_model
        hidden, unit = (weight * d * d - used) / (matrices * d), 8 if d < 512 else 32
        return replace(config, cms_hidden=max(1, round(hidden / unit)) * unit / d)

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "vocab_size", "n_layer")
        if self.norm_eps < 0 or self.n_position < 0:
            raise ValueError(f"norm_eps is {self.norm_eps}, n_position is {self.n_position}; neither can be negative")
        if not self.cms:
            raise ValueError("cms is empty; give at least one chunk size, inf for a plain MLP")
        for c in self.cms:
            if c != INF and (c < 1 or c != int(c)):
                raise ValueError(f"cms has {c}; chunk sizes are whole numbers from 1, or inf")
        finite = sum(c != INF for c in self.cms)
        if min(self.cms_rate, default=-1) < 0 or len(self.cms_rate) not in (1, finite):
            raise ValueError(
                f"cms_rate is {self.cms_rate}; give one step size from 0, or one for each of {finite} in-context levels"
            )
        if self.wiring == "nested" and list(self.cms) != sorted(self.cms):
            raise ValueError(f"cms is {self.cms}; nested levels go from fast to slow, so sort the chunk sizes")
        if not self.pattern or set(self.pattern) - {"memory", "attention"}:
            raise ValueError(f"pattern is {self.pattern}; it lists one or more of: memory, attention")

    @property
    def rates(self) -> list[float]:
        """Inner step size of every level of the CMS; 0 for one that is not written in context."""
        rates = iter(self.cms_rate * (len(self.cms) if len(self.cms_rate) == 1 else 1))
        return [0.0 if c == INF else next(rates) for c in self.cms]

    @property
    def clocks(self) -> list[int]:
        """Chunk sizes of the levels that are written in context."""
        return [int(c) for c, rate in zip(self.cms, self.rates) if rate > 0]

    def layer(self, i: int) -> MemoryConfig:
        """The sequence layer of block i."""
        m = self.memory
        if self.pattern[i % len(self.pattern)] == "memory":
            return m
        return MemoryConfig.preset("attention", d_model=m.d_model, n_head=m.n_head, conv=m.conv, window=m.window)


# ----------------------------------------------------------------------------------------------------------------------
# States


def map_state(fn: Callable[..., Tensor], state: Any, *others: Any) -> Any:
    """Apply `fn` to every tensor of a state (dataclasses, lists and tuples), together with those of states like it."""
    if isinstance(state, Tensor):
        return fn(state, *others)
    if is_dataclass(state):
        parts = {f.name: map_state(fn, *(getattr(s, f.name) for s in (state, *others))) for f in fields(state)}
        return replace(state, **parts)
    if isinstance(state, (list, tuple)):
        return type(state)(map_state(fn, *s) for s in zip(state, *others))
    return state


@dataclass
class Weights:
    """One group of n memories in mid-stream: per layer, tensors (b, h, n, o, i)."""

    now: list[Tensor]
    momentum: list[Tensor] | None
    anchor: list[Tensor]  # `now` as it was when the open chunk began; gradients are taken here


@dataclass
class MemoryState:
    t: int  # tokens seen
    tail: Tensor | None  # (b, conv - 1, d) inputs that the convolution still needs
    proj: Weights | None  # None also if all memories have one chunk size: they then stand together in `main`, M last
    main: Weights


@dataclass
class AttentionState:
    t: int
    tail: Tensor | None
    k: Tensor  # (b, h, s, e), those that are still seen
    v: Tensor
    first: Tensor  # (b,) index of a sequence's first key; those before it were forgotten by a reset
    cut: bool = False  # whether there was a reset


@dataclass
class FastMLP:
    """In-context change of one MLP of a CMS, per sequence: tensors (b, *weight.shape)."""

    delta: list[Tensor]
    total: list[Tensor]  # gradient summed since the chunk began
    start: list[Tensor] | None = None  # nested wiring: what delta restarts from when the next slower chunk ends
    start_total: list[Tensor] | None = None  # and the gradient summed since that chunk began


@dataclass
class HopeState:
    """Everything `Hope` carries between two calls.

    `memories` stand after the last token. A CMS is written when its chunk is complete, by gradients through that whole
    chunk, so an open segment keeps its tokens and the memories it began with (`segment`).
    """

    memories: list[MemoryState | AttentionState]
    cms: list[list[FastMLP | None]]
    observed: int = 0  # tokens observed, which is the clock of the CMS
    pending: Tensor | None = None  # (b, 1) the last token, whose target has not been seen
    segment: Segment | None = None

    def detach(self) -> HopeState:
        """The same state cut off from the graph that made it."""
        return map_state(Tensor.detach, self)

    def select(self, rows: Sequence[int] | Tensor) -> HopeState:
        """The state of these sequences of the batch, in this order; a row may be taken more than once, to branch."""
        return map_state(lambda z: z[rows], self)

    def save(self, path: Any) -> None:
        """Write the state to a file."""
        torch.save(map_state(lambda z: z.detach().cpu().clone(), self), path)

    @staticmethod
    def load(path: Any) -> HopeState:
        """A state that `save` wrote. Only tensors and the classes of states are read, no other code can run."""
        classes = [HopeState, MemoryState, AttentionState, Weights, FastMLP, Segment]
        with torch.serialization.safe_globals(classes):
            return torch.load(path, weights_only=True)


@dataclass
class Segment:
    tokens: Tensor  # (b, s)
    targets: Tensor  # (b, s)
    memories: list[MemoryState | AttentionState]


# ----------------------------------------------------------------------------------------------------------------------
# Memories


def causal_conv(conv: nn.Conv1d | None, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x: (b, t, d) and the inputs before it -> the convolution's output (b, t, d) and the new tail."""
    if conv is None or x.shape[1] == 0:
        return x, tail
    x = torch.cat([tail.to(x.dtype), x], 1)
    return conv(x.mT).mT, x[:, x.shape[1] - tail.shape[1] :]


def unit(x: Tensor) -> Tensor:
    """x: (..., e) at length 1, or times 1 / `kernels.EPS` where it is shorter than that: what is 0 has a gradient."""
    return F.normalize(x, dim=-1, eps=EPS)


def layer_norm(y: Tensor) -> tuple[Tensor, Tensor]:
    """y: (..., e) with mean 0 and spread 1, or less where its own was not far above EPS; and what it was divided by."""
    std = (y.var(-1, correction=0, keepdim=True) + EPS**2).sqrt()
    return (y - y.mean(-1, keepdim=True)) / std, std


def apply_memory(layers: Sequence[Tensor], x: Tensor, norm: bool = False) -> Tensor:
    """Read memories of weights (b, h, n, o, i) at x (b, h, n or 1, c, i): M x, or x + W1 silu(W2 x) (eq. 89)."""
    if len(layers) == 1:
        return x @ layers[0].mT
    w2, w1 = layers
    y = F.silu(x @ w2.mT) @ w1.mT
    return x + (layer_norm(y)[0] if norm else y)


def inner_gradients(
    layers: Sequence[Tensor], k: Tensor, v: Tensor, objective: str, norm: bool = False
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer its input x (..., c, i), what it makes of it, W x, and the inner loss's gradient there (..., c, o)."""
    if len(layers) == 1:
        y = k @ layers[0].mT
        return [(k, y, y - v if objective == "l2" else -v)]
    w2, w1 = layers
    z = k @ w2.mT
    gate = torch.sigmoid(z)
    hidden = z * gate
    out = y = hidden @ w1.mT
    if norm:
        y, std = layer_norm(y)
    d1 = k + y - v if objective == "l2" else -v
    if norm:  # through the layer norm
        d1 = (d1 - d1.mean(-1, keepdim=True) - y * (d1 * y).mean(-1, keepdim=True)) / std
    return [(k, z, (d1 @ w1) * (gate * (1 + z - hidden))), (hidden, out, d1)]


def rotate(x: Tensor, start: int, theta: float = 10000.0) -> Tensor:
    """Rotary embedding of x (b, h, t, e) at positions start, start + 1, ..."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def cut_streams(streams: dict[str, Tensor], room: Callable[[int], int]) -> list[tuple[int, dict[str, Tensor]]]:
    """Cut streams (b, h, t, ...) into pieces of at most room(s) tokens from s on: their lengths and the pieces.

    By `split`, not by slices: the gradient of a slice is as long as the whole stream, of all slices together quadratic.
    """
    t, sizes = next(iter(streams.values())).shape[2], []
    while sum(sizes) < t:
        sizes.append(min(room(sum(sizes)), t - sum(sizes)))
    pieces = zip(*(z.split(sizes, 2) for z in streams.values()))
    return [(n, dict(zip(streams, piece))) for n, piece in zip(sizes, pieces)]


# A gate's learnt number becomes a step size above 0, or a retention between 0 and 1.
GATES = {"eta": F.softplus, "alpha": torch.sigmoid, "theta": torch.sigmoid}


class Memory(nn.Module):
    """A sequence layer: in every head a memory that is written and read token by token.

    Reads (eq. 86):   k, v, eta, alpha = M_k(x), M_v(x), M_eta(x), M_alpha(x);   y = M(q);   q = W_q x
    Writes (eq. 88):  each memory M_b moves by delta gradient descent on loss(M_b; k, M_b(v)), see `kernels.dgd_chunk`

    where the names in `config.adaptive` are memories of their own and the rest static projections of x. Choices the
    paper leaves open: heads; eta and alpha are scalars per head, read out of M_eta and M_alpha by a learnt vector;
    the step that multiplies a layer's update is the minimiser of eq. 56 for that layer's input,
    eta / (1 + eta |x|^2); momentum averages the inner gradient (weights theta and 1 - theta: with the gradient frozen
    over a chunk, a sum would overshoot by 1 / (1 - theta)) and leaves the delta term alone; self-generated values are
    l2-normalised and rescaled by a learnt factor, without which a model writes ever larger targets for itself.

    Plain gradient descent (ttt, titans, dla) has no delta term to bound it. c gradients that are all taken at the chunk's
    start add up, and a layer's loss has curvature |x|^2 along its input x: if c eta' |x|^2 is above 2, a chunk overshoots by
    more than the error it began with, and the next by more again. With `step="mean"`, eta' = eta / (1 + eta |x|^2) / c, it
    is at most 1. (TTT, too, averages over its mini-batch, and divides its rate by the head width, about |x|^2.)
    A layer norm in the memory goes with steps but not with decay, which is why TTT has it and Titans does not: y = x +
    LN(W1 h) depends on the direction of W1 only, so its gradient is G / |W1|, at a right angle to W1, and a token takes
    |W1|^2 to alpha^2 |W1|^2 + (eta' G / |W1|)^2. Without decay |W1| grows, and steps turn W1 less and less. With decay it falls
    until |W1|^4 = (eta' G)^2 / (1 - alpha^2), where a token turns W1 by eta' G / |W1|^2 = (1 - alpha^2)^(1/2), 0.19 for the
    alpha of the start, *whatever eta is*: by 12 within a chunk of 64, in which gradients stand still. So gradients through
    the chunks multiply, from 13 at 256 tokens to 5e7 at 2,048 and more.
    """

    def __new__(cls, config: MemoryConfig | None = None):
        # Attention is the member of the family without parameters: `Memory(config)` makes either. Copies come without config.
        return super().__new__(Attention if cls is Memory and config and config.depth == 0 else cls)

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.config = config
        d, h, e = config.d_model, config.n_head, config.d_head
        self.conv = nn.Conv1d(d, d, config.conv, groups=d, bias=False) if config.conv else None
        self.to_y = nn.Linear(d, d, bias=config.bias) if config.project else None
        self.y_norm = nn.Parameter(torch.ones(h, 1, e)) if config.project and config.y_norm else None
        self.compiled = False  # whether complete chunks run through torch.compile, see `compile_parts`
        self._init_parts()
        if self.conv is not None:  # starts as the identity
            nn.init.normal_(self.conv.weight, std=0.1)
            with torch.no_grad():
                self.conv.weight[:, 0, -1] += 1

    def _init_parts(self) -> None:
        c, d, h, e = self.config, self.config.d_model, self.config.n_head, self.config.d_head
        self.adaptive = [b for b in ("k", "v", "q", "eta", "alpha") if b in c.adaptive]
        static = lambda name, width: None if name in c.adaptive else nn.Linear(d, width, bias=False)
        self.to_k, self.to_v, self.to_q = static("k", d), static("v", d), static("q", d)
        self.to_u = nn.Linear(d, d, bias=False) if c.adaptive and c.project else None
        # A gate is bias + <read, M(x)> per head if adaptive, bias + W x if not. At the start: remember, learn slowly.
        self.gates = nn.ModuleDict()
        for name, present, bias in (
            ("eta", c.step != "one", -2.0),
            ("alpha", c.decay == "gate", 4.0),
            ("theta", c.momentum, 0.0),
        ):
            if present:
                self.gates[name] = Gate(h, e, bias) if name in c.adaptive else StaticGate(d, h, bias)
        if c.decay == "fixed":
            self.register_buffer("fixed_alpha", 1 - 2.0 ** -(5 + torch.arange(h)).view(h, 1), persistent=False)
        self.start = nn.ParameterDict()
        # Memories with one clock are run together, the main one last.
        parts = {"proj": len(self.adaptive), "main": 1} if self.adaptive else {"main": 1}
        self.groups = {"main": list(parts)} if c.chunk == c.chunk_proj else {part: [part] for part in parts}
        for group, n in parts.items():
            if c.depth == 1:
                self.start[f"{group}_0"] = nn.Parameter(torch.zeros(h, n, e, e))
            else:
                hidden = c.expand * e
                self.start[f"{group}_0"] = nn.Parameter(torch.randn(h, n, hidden, e) * (c.spread or e**-0.5))
                self.start[f"{group}_1"] = nn.Parameter(torch.randn(h, n, e, hidden) / math.sqrt(hidden) * 0.3)
            if c.self_values and c.value_norm:
                self.start[f"{group}_scale"] = nn.Parameter(torch.ones(h, n, 1, 1))

    def start_weights(self, group: str) -> list[Tensor]:
        """Start states of a group's layers, each (h, n, o, i)."""
        return [self.start[f"{group}_{layer}"] for layer in range(self.config.depth)]

    def init_state(self, b: int) -> MemoryState:
        """The state of b sequences before their first token."""

        def group(name: str) -> Weights | None:
            if name not in self.groups:
                return None
            layers = zip(*(self.start_weights(part) for part in self.groups[name]))
            now = [torch.cat(layer, 1).expand(b, -1, -1, -1, -1) for layer in layers]
            momentum = [torch.zeros_like(w) for w in now] if self.config.momentum else None
            return Weights(now, momentum, now)

        return MemoryState(0, self._empty_tail(b), group("proj"), group("main"))

    def restart_graph(self, state: MemoryState) -> MemoryState:
        """The same state as values, as a detached change of the start state: gradients reach that and nothing else."""
        graft = lambda now, start: now.detach() + (start - start.detach())
        return map_state(graft, state, self.init_state(state.main.now[0].shape[0]))

    def _empty_tail(self, b: int) -> Tensor | None:
        if self.conv is None:
            return None
        return self.conv.weight.new_zeros(b, self.config.conv - 1, self.config.d_model)

    def _heads(self, x: Tensor, to: nn.Linear | None) -> Tensor:
        return rearrange(x if to is None else to(x), "b t (h e) -> b h t e", e=self.config.d_head)

    def _out(self, y: Tensor) -> Tensor:
        """y: (b, h, t, e) -> (b, t, d)"""
        if self.to_y is None:
            return rearrange(y, "b h t e -> b t (h e)")
        if self.y_norm is not None:
            y = unit(y) * y.shape[-1] ** 0.5 * self.y_norm
        return self.to_y(rearrange(y, "b h t e -> b t (h e)").to(self.to_y.weight.dtype))

    def forward(self, x: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """x: (b, t, d) -> y (b, t, d) and the state after its last token. Any cut of x gives the same y."""
        c = self.config
        state = state or self.init_state(x.shape[0])
        x, tail = causal_conv(self.conv, x, state.tail)
        # What does not depend on a memory is computed for all tokens at once; (b, h, t, e) and gates (b, h, t).
        streams = {"u": self._heads(x, self.to_u)} if self.adaptive else {}
        for name, to in (("k", self.to_k), ("v", self.to_v), ("q", self.to_q)):
            if name not in self.adaptive:
                streams[name] = self._heads(x, to)
        for name in ("u", "k", "q"):
            if name in streams and c.qk_norm:
                streams[name] = unit(streams[name])
            if name in streams and c.rotary and name != "u":
                streams[name] = rotate(streams[name], state.t, c.rope_theta)
        for name, gate in self.gates.items():
            if name not in self.adaptive:
                streams[name] = GATES[name](gate(x))
        groups = {name: group for name in ("proj", "main") if (group := getattr(state, name)) is not None}
        ys, t = [], state.t
        with torch.autocast(x.device.type, enabled=False):
            streams = {name: z if z.dtype == torch.float64 else z.float() for name, z in streams.items()}
            some = next(iter(streams.values()))
            one = some.new_ones(some.shape[:3])
            fused = not c.decay_first and c.beta == 1 and scans(some, c.d_head)
            if c.step == "one":
                streams["eta"] = one
            if c.decay != "gate":
                streams["alpha"] = one * self.fixed_alpha.to(one) if c.decay == "fixed" else one
            spans = cut_streams(streams, lambda s: x.shape[1] if fused else c.remat * c.chunk or x.shape[1])
            for n, span in spans:
                # The last span's graph is needed first, and is no larger than the one recomputed after it.
                if t + n < state.t + x.shape[1] and torch.is_grad_enabled():
                    y, groups = checkpoint(self._span, span, groups, t, use_reentrant=False)
                else:
                    y, groups = (self._fused if fused else self._span)(span, groups, t)
                ys.append(y)
                t += n
        y = self._out(torch.cat(ys, 2)) if ys else torch.zeros_like(x)
        return y, MemoryState(state.t + x.shape[1], tail, groups.get("proj"), groups["main"])

    def _span(self, streams: dict[str, Tensor], groups: dict[str, Weights], t: int) -> tuple[Tensor, dict]:
        """Any number of tokens from time t on: streams (b, h, s, e), gates (b, h, s) -> y (b, h, s, e), new groups."""
        c, ys = self.config, []
        for n, piece in cut_streams(streams, lambda s: min(size - (t + s) % size for size in (c.chunk, c.chunk_proj))):
            if t % c.chunk_proj == 0 and "proj" in groups:
                groups = {**groups, "proj": replace(groups["proj"], anchor=groups["proj"].now)}
            if t % c.chunk == 0:
                groups = {**groups, "main": replace(groups["main"], anchor=groups["main"].now)}
            compiled = self.compiled and n == c.chunk and not uses_triton(next(iter(piece.values())))
            step = compiled_step() if compiled else Memory._write_and_read
            y, groups = step(self, piece, groups)
            ys.append(y)
            t += n
        return torch.cat(ys, 2), groups

    def _fused(self, streams: dict[str, Tensor], groups: dict[str, Weights], t: int) -> tuple[Tensor, dict]:
        """`_span` without gradients, in one launch of `kernels.memory_scan`."""
        c = self.config
        parts = [part for name in groups for part in self.groups[name]]
        scales = [self.start[f"{part}_scale"] for part in parts] if c.self_values and c.value_norm else []
        join = lambda layers: [torch.cat(layer, 2) for layer in zip(*layers)]  # copies
        now, anchor = join(g.now for g in groups.values()), join(g.anchor for g in groups.values())
        momentum = join(g.momentum for g in groups.values()) if c.momentum else None
        y = memory_scan(
            streams, now, momentum, anchor, t=t, chunk=c.chunk, chunk_proj=c.chunk_proj, adaptive=len(self.adaptive),
            gates={name: (gate.read, gate.bias) for name, gate in self.gates.items() if name in self.adaptive},
            scale=torch.cat(scales, 1) if scales else None, objective=c.objective, step=c.step, read=c.read,
            self_values=c.self_values, qk_norm=c.qk_norm, norm=c.memory_norm, delta=c.rule == "dgd",
        )  # fmt: skip
        sizes = [g.now[0].shape[2] for g in groups.values()]
        cut = lambda layers: zip(*(layer.split(sizes, 2) for layer in layers))
        states = zip(cut(now), cut(momentum) if c.momentum else [None] * len(sizes), cut(anchor))
        return y, {k: Weights(list(w), m and list(m), list(a)) for k, (w, m, a) in zip(groups, states)}

    def _write_and_read(self, streams: dict[str, Tensor], groups: dict[str, Weights]) -> tuple[Tensor, dict]:
        """Tokens that lie within one chunk: streams (b, h, c, e), gates (b, h, c) -> y (b, h, c, e), new groups."""
        c, z = self.config, dict(streams)
        if self.adaptive:
            source = groups.get("proj", groups["main"]).anchor
            reads = apply_memory([w[:, :, : len(self.adaptive)] for w in source], z["u"].unsqueeze(2), c.memory_norm)
            for name, read in zip(self.adaptive, reads.unbind(2)):
                if name in self.gates:
                    read = GATES[name](self.gates[name](read))
                z[name] = unit(read) if c.qk_norm and name in "kq" else read
        k, v, y, eta, alpha = (z[name].unsqueeze(2) for name in ("k", "v", "q", "eta", "alpha"))
        theta = z["theta"].unsqueeze(2) if c.momentum else None
        if c.decay_first:  # gradients are divided by alpha below; so little of a state is as good as nothing
            alpha = alpha.clamp(min=1e-3)
        through = None if uses_triton(k) else chunk_gates(alpha, theta, ema=True)  # kernels make their own
        new = {}
        for name, group in groups.items():
            value = v
            if c.self_values:
                value = apply_memory(group.anchor, v, c.memory_norm)
                if c.value_norm:
                    scale = torch.cat([self.start[f"{part}_scale"] for part in self.groups[name]], 1)
                    value = scale * unit(value)
            query = y if name == "main" and c.read != "chunk" else None
            now, momentum = [], []
            gradients = inner_gradients(group.anchor, k, value, c.objective, c.memory_norm)
            for layer, (x, Wx, grad) in enumerate(gradients):
                step = eta if c.step == "one" else c.beta * eta / (1 + eta * x.square().sum(-1))
                step = step / c.chunk if c.step == "mean" else step
                if c.decay_first:  # erase alpha M x, but write as much as ever
                    step, grad = alpha * step, grad / alpha.unsqueeze(-1)
                weights, m, query = dgd_chunk(
                    group.now[layer], x, grad, step, alpha, theta=theta, Q=query, inclusive=c.read == "after",
                    m=group.momentum[layer] if c.momentum else None, delta=c.rule == "dgd", gates=through, readers=1,
                    ema=True, MX=Wx if group.now[layer] is group.anchor[layer] else None,
                )  # fmt: skip
                now.append(weights)
                momentum.append(m)
                if query is not None and layer + 1 < c.depth:
                    query = F.silu(query)
            new[name] = Weights(now, momentum if c.momentum else None, group.anchor)
        if query is None:
            y = apply_memory([w[:, :, -1:] for w in groups["main"].anchor], y, c.memory_norm)
        elif c.depth == 1:
            y = query
        else:
            y = y + (layer_norm(query)[0] if c.memory_norm else query)
        return y.squeeze(2), new


@cache
def compiled_step() -> Callable:
    """`Memory._write_and_read` compiled: one chunk, since a loop over chunks would be compiled for its length."""
    return torch.compile(Memory._write_and_read, dynamic=False)


def compile_parts(model: nn.Module) -> None:
    """Compile what every call has in common: MLPs, and the step of a complete chunk of a memory.

    The first calls take a minute. What is kept for the backward pass halves: what is cheap is computed again.
    """
    import torch._dynamo.config as dynamo  # takes a second
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # a segment's graph serves two backward passes
    functorch.activation_memory_budget = 0.5
    dynamo.recompile_limit = 64  # one for each shape, first chunk or later, with gradients or without
    for module in model.modules():
        if isinstance(module, MLP):
            module.compile()
        elif isinstance(module, Memory):
            module.compiled = True


class Gate(nn.Module):
    """(b, h, c, e) -> (b, h, c): a scalar per head, read out of an adaptive memory's output."""

    def __init__(self, n_head: int, d_head: int, bias: float):
        super().__init__()
        self.read = nn.Parameter(torch.randn(n_head, 1, d_head) * 0.1)
        self.bias = nn.Parameter(torch.full((n_head, 1), bias))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.read).sum(-1) + self.bias


class StaticGate(nn.Linear):
    """(b, t, d) -> (b, h, t): a scalar per head, straight from the layer's input."""

    def __init__(self, d_model: int, n_head: int, bias: float):
        super().__init__(d_model, n_head)
        nn.init.constant_(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mT


class Attention(Memory):
    """Softmax attention (eq. 62): the memory without parameters, whose state is every key and value it has seen.

    Rotary positions, normalised queries and keys, `n_kv_head` heads of keys and values; with `window` it sees only that
    many tokens, itself included (eq. 63).
    """

    def _init_parts(self) -> None:
        c, d, h = self.config, self.config.d_model, self.config.n_head
        self.n_kv = c.n_kv_head or h
        self.to_k, self.to_v, self.to_q = (nn.Linear(d, n * c.d_head, bias=c.bias) for n in (self.n_kv, self.n_kv, h))
        self.scale = nn.Parameter(torch.full((h, 1, 1), 10.0 if c.qk_norm else c.d_head**-0.5))

    def init_state(self, b: int) -> AttentionState:
        empty = self.to_k.weight.new_zeros(b, self.n_kv, 0, self.config.d_head)
        return AttentionState(0, self._empty_tail(b), empty, empty, empty.new_zeros(b, dtype=torch.long))

    def restart_graph(self, state: AttentionState) -> AttentionState:
        return map_state(Tensor.detach, state)

    def forward(self, x: Tensor, state: AttentionState | None = None) -> tuple[Tensor, AttentionState]:
        """x: (b, t, d) -> y (b, t, d) and the state after its last token. Any cut of x gives the same y."""
        c = self.config
        state = state or self.init_state(x.shape[0])
        x, tail = causal_conv(self.conv, x, state.tail)
        q, k, v = (self._heads(x, to) for to in (self.to_q, self.to_k, self.to_v))
        if c.qk_norm:
            q, k = unit(q), unit(k)
        q = q * self.scale
        if c.rotary:
            q, k = rotate(q, state.t, c.rope_theta), rotate(k, state.t, c.rope_theta)
        k, v = torch.cat([state.k.to(k.dtype), k], 2), torch.cat([state.v.to(v.dtype), v], 2)
        key = torch.arange(k.shape[2], device=x.device)
        now = key[k.shape[2] - q.shape[2] :, None]
        seen = (key <= now) & (key > now - c.window) if c.window else key <= now
        plain = q.shape[2] == k.shape[2] and not c.window
        if state.cut:
            plain, seen = False, seen & (key >= state.first[:, None, None, None])
        mask, gqa, first = None if plain else seen, self.n_kv != c.n_head, state.first
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, scale=1.0, enable_gqa=gqa)
        if c.window:
            first = (first - max(0, k.shape[2] - c.window)).clamp(min=0)
            k, v = k[:, :, -c.window :], v[:, :, -c.window :]
        return self._out(y), AttentionState(state.t + x.shape[1], tail, k, v, first, state.cut)


# ----------------------------------------------------------------------------------------------------------------------
# Continuum memory system


class FastLinear(nn.Linear):
    """A linear layer whose weight (o, i) is changed per sequence by delta, (b, o, i) or None. x: (b, t, i)."""

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        if delta is None:
            return super().forward(x)
        y = x @ (self.weight + delta).to(x.dtype).mT
        return y if self.bias is None else y + self.bias.to(y.dtype)


def make_norm(config: HopeConfig) -> nn.Module:
    return {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[config.norm](config.memory.d_model, eps=config.norm_eps)


class MLP(nn.Module):
    """One block of a CMS, x + W_out silu(W_in norm(x)), or its SwiGLU or GELU form.

    `delta` changes the two matrices per sequence; norm and biases stay.
    """

    def __init__(self, config: HopeConfig):
        super().__init__()
        d, hidden, self.kind = config.memory.d_model, round(config.cms_hidden * config.memory.d_model), config.mlp
        self.norm = make_norm(config)
        self.w_in = FastLinear(d, 2 * hidden if self.kind == "swiglu" else hidden, bias=config.mlp_bias)
        self.w_out = FastLinear(hidden, d, bias=config.mlp_bias)

    def forward(self, x: Tensor, delta: Sequence[Tensor] | None = None) -> Tensor:
        d_in, d_out = delta or (None, None)
        z = self.w_in(self.norm(x), d_in)
        if self.kind == "swiglu":
            gate, z = z.chunk(2, -1)
            z = F.silu(gate) * z
        else:
            z = F.gelu(z, approximate="tanh") if self.kind == "gelu" else F.silu(z)
        return x + self.w_out(z, d_out)


class CMS(nn.Module):
    """Continuum memory system: MLPs, block l written every C_l tokens (eqs. 70 to 74).

    A block with finite C_l is a fast weight, theta + delta with one delta per sequence. `write` moves it by the sum of
    the chunk's gradients of the task loss, divided by C_l so that rates compare across levels. C_l = inf is a plain MLP.
    Wired in a chain (sequential), side by side (independent: the changes that the blocks make are added), or nested: a
    chain in which a block falls back to its start state when the next slower block's chunk ends, and that start state
    itself moves by the gradients of the slower chunk.
    """

    def __init__(self, config: HopeConfig):
        super().__init__()
        self.chunks, self.wiring = config.cms, config.wiring
        self.levels = nn.ModuleList(MLP(config) for _ in config.cms)
        self.start_rates = config.rates
        # Learnt and bounded: rates grow at most twofold, since a far too large one destroys what was learnt.
        zero = torch.zeros(len(config.clocks))
        self.raw_rates = nn.Parameter(zero) if config.learn_rates and config.clocks else None

    @property
    def fast(self) -> list[bool]:
        """Which levels are written in context."""
        return [rate > 0 for rate in self.start_rates]

    def rates(self) -> list[Tensor]:
        """Step size of every in-context level, per mean gradient of its chunk."""
        start = [rate for rate in self.start_rates if rate > 0]
        if self.raw_rates is None:
            return [torch.tensor(rate) for rate in start]
        return [2 * rate * torch.sigmoid(raw) for rate, raw in zip(start, self.raw_rates)]

    def _slower(self) -> list[int | None]:
        """For every level the one at whose chunk's end it restarts: in nested wiring, the next slower in-context level."""
        if self.wiring != "nested":
            return [None] * len(self.chunks)
        return [next((j for j in range(i + 1, len(self.fast)) if self.fast[j]), None) for i in range(len(self.fast))]

    def init_state(self, b: int) -> list[FastMLP | None]:
        state: list[FastMLP | None] = []
        for level, fast, slower in zip(self.levels, self.fast, self._slower()):
            weights = (level.w_in.weight, level.w_out.weight)
            # In float32 at least: steps are small beside what they have added up to.
            zeros = [w.new_zeros(b, *w.shape, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
            state.append(FastMLP(zeros, zeros, *([zeros, zeros] if slower is not None else [])) if fast else None)
        return state

    def forward(self, x: Tensor, state: Sequence[FastMLP | None]) -> Tensor:
        """x: (b, t, d) -> (b, t, d), through the weights as they stand."""
        if self.wiring == "independent":
            return x + sum(level(x, fast and fast.delta) - x for level, fast in zip(self.levels, state))
        for level, fast in zip(self.levels, state):
            x = level(x, fast and fast.delta)
        return x

    def write(self, state: list[FastMLP | None], grads: list[list[Tensor] | None], t: int) -> list[FastMLP | None]:
        """Add a segment's gradients; levels whose chunk ends at time t take their step (eq. 71)."""
        learnt = iter(self.rates())
        rates = [next(learnt) if fast else None for fast in self.fast]
        add = lambda totals, grad: [a + g for a, g in zip(totals, grad)]
        step = lambda weights, totals, i: [w - rates[i] / self.chunks[i] * a for w, a in zip(weights, totals)]
        new: list[FastMLP | None] = []
        for i, (fast, grad, slower) in enumerate(zip(state, grads, self._slower())):
            if fast is None:
                new.append(None)
                continue
            zeros = [torch.zeros_like(g) for g in grad]
            fast = replace(fast, total=add(fast.total, grad))
            if t % self.chunks[i] == 0:
                fast = replace(fast, delta=step(fast.delta, fast.total, i), total=zeros)
            if slower is not None:
                fast = replace(fast, start_total=add(fast.start_total, grad))
                if t % self.chunks[slower] == 0:
                    start = step(fast.start, fast.start_total, slower)
                    fast = FastMLP(start, zeros, start, zeros)
            new.append(fast)
        return new


# ----------------------------------------------------------------------------------------------------------------------
# Hope


class Block(nn.Module):
    def __init__(self, config: HopeConfig, i: int):
        super().__init__()
        self.norm = make_norm(config)
        self.memory = Memory(config.layer(i))
        self.cms = CMS(config)

    def forward(self, x: Tensor, memory: Any, cms: list[FastMLP | None]) -> tuple[Tensor, Any]:
        y, memory = self.memory(self.norm(x), memory)
        return self.cms(x + y, cms), memory


class Hope(nn.Module):
    """Language model of `n_layer` blocks, each a memory and a CMS. See HopeConfig for its relatives."""

    def __init__(self, config: HopeConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # keep no block's inner activations for the backward pass, which then runs it again
        d = config.memory.d_model
        self.embed = nn.Embedding(config.vocab_size, d)
        self.embed_position = nn.Embedding(config.n_position, d) if config.n_position else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = None if config.tied else nn.Linear(d, config.vocab_size, bias=False)
        for name, module in self.named_modules():
            if type(module) in (nn.Linear, FastLinear):
                shrink = (2 * config.n_layer) ** -0.5 if name.endswith(("to_y", "w_out")) else 1.0
                nn.init.normal_(module.weight, std=shrink * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
        nn.init.normal_(self.embed.weight, std=d**-0.5 if config.tied else 1.0)

    def init_state(self, b: int) -> HopeState:
        """The state of b sequences before their first token."""
        return HopeState(
            [block.memory.init_state(b) for block in self.blocks], [block.cms.init_state(b) for block in self.blocks]
        )

    def reset(self, state: HopeState, rows: Sequence[int]) -> HopeState:
        """The state with these sequences back before their first token; the others are left as they are.

        Chunks go on by the batch's common clock. Raises ValueError inside a CMS segment or with a pending token, where
        a sequence cannot be reset without touching the others.
        """
        if state.segment is not None or state.pending is not None:
            clock = min(self.config.clocks, default=1)
            raise ValueError(
                f"reset after {state.observed} observed tokens, inside a CMS chunk or with a token pending; "
                f"give targets to observe and reset at a multiple of {clock} tokens"
            )
        fresh, rows = self.init_state(1), torch.as_tensor(rows)

        def put(old: Tensor, new: Tensor) -> Tensor:
            old = old.clone()
            old[rows] = new.to(old.dtype)
            return old

        memories = []
        for old, new in zip(state.memories, fresh.memories):
            if isinstance(old, AttentionState):  # keys are as many as before, only out of these sequences' sight
                new = replace(new, k=old.k[rows], v=old.v[rows], first=torch.full_like(new.first, old.k.shape[2]))
                old = replace(old, cut=True)
            memories.append(map_state(put, old, new))
        return replace(state, memories=memories, cms=map_state(put, state.cms, fresh.cms))

    def _run(self, tokens: Tensor, memories: list, cms: list) -> tuple[Tensor, list]:
        x, new = self.embed(tokens), []
        if self.embed_position is not None:
            start, longest = memories[0].t, self.config.n_position
            if start + tokens.shape[1] > longest:
                raise ValueError(
                    f"the stream reaches {start + tokens.shape[1]} tokens, but this model has learnt positions for "
                    f"{longest}; start a new state there"
                )
            x = x + self.embed_position.weight[start : start + tokens.shape[1]]
        for block, memory, fast in zip(self.blocks, memories, cms):
            if self.recompute and torch.is_grad_enabled():
                x, memory = checkpoint(block, x, memory, fast, use_reentrant=False, preserve_rng_state=False)
            else:
                x, memory = block(x, memory, fast)
            new.append(memory)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x), new

    def _check(self, tokens: Tensor, state: HopeState | None) -> HopeState:
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; give integers (batch, time)")
        return state or self.init_state(tokens.shape[0])

    def forward(self, tokens: Tensor, state: HopeState | None = None) -> tuple[Tensor, HopeState]:
        """Read a stream without scoring it: memories are written, the CMS is read as it stands.

        tokens: (b, t) integers. Returns logits (b, t, vocab_size) and the state.
        """
        state = self._check(tokens, state)
        if state.pending is not None:
            raise ValueError(
                "this state has a pending token from observe; continue with observe, or pass targets to it"
            )
        state = self._close_segment(state)
        logits, memories = self._run(tokens, state.memories, state.cms)
        return logits, replace(state, memories=memories)

    def _close_segment(self, state: HopeState) -> HopeState:
        """Bank the gradient of an open segment, so that tokens which are not observed may follow."""
        if state.segment is None:
            return state
        open, none = state.segment, state.segment.tokens[:, :0]
        _, _, cms = self._segment(open, none, none, state.cms, state.observed)
        return replace(state, cms=cms, segment=None)

    def observe(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        state: HopeState | None = None,
        backward: bool = False,
        reduction: Literal["mean", "none"] = "mean",
        levels: Sequence[int] | None = None,
        surprise: float = 0.0,
        truncate: bool = False,
    ) -> tuple[Tensor, HopeState]:
        """Read a stream and learn from it: memories are written, and so is the CMS, by its own prediction errors.

        The stream is cut wherever a level's chunk ends. After each segment, every level adds the gradient of the
        segment's loss to its sum, and levels whose chunk is complete take their step (eq. 71); the next segment runs
        with the new weights. The same at training and at inference. Any cut of a stream gives the same result.

        Args:
            tokens: (b, t) integers.
            targets: (b, t) what each token should be followed by, -100 to leave one out. Without targets the stream
                predicts itself: the last token waits in the state for the first of the next call.
            backward: also accumulate parameter gradients of the mean loss; the state returned is then detached.
            reduction: "mean" nats per scored token, or "none" for all (b, t).
            levels: which in-context levels of the CMS learn, by their place in `config.cms`; all if left out.
            surprise: only segments whose mean loss exceeds this many nats per token teach, for each sequence by itself.
            truncate: with `backward`, go back through each segment by itself as soon as it is read, so that memory does
                not grow with the stream. Start states of memories learn from every segment, as if it had begun with
                them; what a write did for later segments, and so the learnt rates of the CMS, get no gradient.
        """
        if truncate and not backward:
            raise ValueError("truncate=True is about the backward pass; set backward=True as well")
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction is {reduction!r}; allowed: mean, none")
        state = self._check(tokens, state)
        able = [i for i, rate in enumerate(self.config.rates) if rate > 0]
        if unable := set(levels or ()) - set(able):
            raise ValueError(f"levels {sorted(unable)} of the CMS do not learn in context; those that do: {able}")
        if targets is None:
            if state.pending is not None:
                tokens = torch.cat([state.pending, tokens], 1)
            state = replace(state, pending=tokens[:, -1:])
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
        elif state.pending is not None:
            raise ValueError("this state has a pending token from observe without targets; go on without targets")
        losses, s, scored = [], 0, (targets != -100).sum().clamp(min=1)
        while s < tokens.shape[1]:
            n = min([tokens.shape[1] - s, *(c - state.observed % c for c in self.config.clocks)])
            loss, state = self._observe_piece(tokens[:, s : s + n], targets[:, s : s + n], state, levels, surprise)
            if truncate:
                with torch.autocast(tokens.device.type, enabled=False):
                    (loss.sum() / (scored if reduction == "mean" else 1)).backward()
                loss, state = loss.detach(), self._restart_graph(state)
            losses.append(loss)
            s += n
        loss = torch.cat(losses, 1) if losses else tokens.new_zeros(tokens.shape, dtype=self.embed.weight.dtype)
        if reduction == "mean":
            loss = loss.sum() / scored
        if backward:
            if not truncate:
                loss.sum().backward()
            loss, state = loss.detach(), state.detach()
        return loss, state

    def _restart_graph(self, state: HopeState) -> HopeState:
        """The same state as values, with memories that hang on their start states once more and on nothing else."""
        restart = lambda memories: [b.memory.restart_graph(m) for b, m in zip(self.blocks, memories)]
        segment = state.segment and replace(state.segment, memories=restart(state.segment.memories))
        return replace(state.detach(), memories=restart(state.memories), segment=segment)

    def _observe_piece(
        self, tokens: Tensor, targets: Tensor, state: HopeState, levels: Sequence[int] | None, surprise: float
    ) -> tuple[Tensor, HopeState]:
        """Tokens that lie within one segment."""
        observed, clocks = state.observed + tokens.shape[1], self.config.clocks
        open = state.segment or Segment(tokens[:, :0], targets[:, :0], state.memories)
        if all(observed % c for c in clocks):
            logits, memories = self._run(tokens, state.memories, state.cms)
            open = Segment(torch.cat([open.tokens, tokens], 1), torch.cat([open.targets, targets], 1), open.memories)
            state = replace(state, memories=memories, observed=observed, segment=open if clocks else None)
            return token_loss(logits, targets), state
        loss, memories, cms = self._segment(open, tokens, targets, state.cms, observed, levels, surprise)
        return loss, replace(state, memories=memories, cms=cms, observed=observed, segment=None)

    def _segment(
        self,
        open: Segment,
        tokens: Tensor,
        targets: Tensor,
        cms: list,
        t: int,
        levels: Sequence[int] | None = None,
        surprise: float = 0.0,
    ) -> tuple[Tensor, list, list[list[FastMLP | None]]]:
        """Run an open segment's tokens and those that follow, and write the CMS at time t.

        The gradient reaches back to the segment's start and no further: it is taken to deltas made fresh for it.
        """
        graph = torch.is_grad_enabled()
        full = graph and self.config.inner_grad == "full"
        with torch.enable_grad():
            leaf = lambda d: d.view_as(d) if d.requires_grad else d.detach().requires_grad_()
            fresh = [[f and replace(f, delta=[leaf(d) for d in f.delta]) for f in layer] for layer in cms]
            logits, memories = self._run(torch.cat([open.tokens, tokens], 1), open.memories, fresh)
            targets = torch.cat([open.targets, targets], 1)
            loss = token_loss(logits, targets)
            deltas = [d for layer in fresh for f in layer if f for d in f.delta]
            teaches = loss.detach().sum(1) > surprise * (targets != -100).sum(1)
            taught = (loss * teaches[:, None]).sum()
            with torch.autocast(tokens.device.type, enabled=False):
                grads = iter(torch.autograd.grad(taught, deltas, retain_graph=graph, create_graph=full))
        loss = loss[:, open.tokens.shape[1] :]
        new = []
        for block, layer in zip(self.blocks, fresh):
            found = [f and [next(grads) for _ in f.delta] for f in layer]
            if levels is not None:
                found = [f and [g * (i in levels) for g in f] for i, f in enumerate(found)]
            new.append(block.cms.write(layer, found, t))
        if not graph:
            loss, memories, new = (map_state(Tensor.detach, z) for z in (loss, memories, new))
        return loss, memories, new

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        state: HopeState | None = None,
        stop: Sequence[int] = (),
        memorize: bool | Sequence[int] = True,
        surprise: float = 0.0,
    ) -> Tensor:
        """Continue prompts by sampled tokens.

        The prompt is observed, so the CMS learns from it; what the model says itself is only read.

        Args:
            tokens: (b, t) prompts, or a list of prompts of different lengths.
            temperature: 0 picks the likeliest token.
            top_k, top_p: sample among that many of the likeliest tokens, or the fewest with that much probability.
            state: continue from here; the prompts must then be of one length.
            stop: tokens after which a sequence is finished.
            memorize: whether the CMS learns from the prompt, or which of its levels do; see `observe`, also for surprise.

        Returns:
            (b, max_new_tokens) new tokens; a finished sequence is filled up with its stop token.
        """
        if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(
                f"temperature {temperature}, top_k {top_k}, top_p {top_p}; "
                "allowed: temperature >= 0, top_k >= 1, 0 < top_p <= 1"
            )
        device = self.embed.weight.device
        if not isinstance(tokens, Tensor):
            # Prompts of one length run together; others cannot join, since their chunks would end at other times.
            rows: dict[int, list[int]] = {}
            for i, prompt in enumerate(tokens):
                rows.setdefault(len(prompt), []).append(i)
            if state is not None and len(rows) > 1:
                raise ValueError(
                    f"a state continues prompts of one length, not of {sorted(rows)}; generate for each by itself"
                )
            new = torch.empty(len(tokens), max_new_tokens, dtype=torch.long, device=device)
            for group in rows.values():
                batch = torch.stack([torch.as_tensor(tokens[i], dtype=torch.long, device=device) for i in group])
                new[group] = self.generate(
                    batch, max_new_tokens, temperature, top_k, top_p, state, stop, memorize, surprise
                )
            return new
        if tokens.shape[1] == 0 and (state is None or state.pending is None):
            raise ValueError("the prompt is empty; give at least one token")
        levels = {True: None, False: []}[memorize] if isinstance(memorize, bool) else memorize
        _, state = self.observe(tokens, state=state, levels=levels, surprise=surprise)
        new, done = [state.pending], torch.zeros_like(state.pending, dtype=torch.bool)
        state = replace(state, pending=None, segment=None)  # nothing more is observed
        for _ in range(max_new_tokens):
            logits, state = self(new[-1], state)
            new.append(torch.where(done, new[-1], sample(logits[:, -1], temperature, top_k, top_p)))
            done |= torch.isin(new[-1], torch.tensor(list(stop), device=device, dtype=torch.long))
            if done.all():
                new += [new[-1]] * (max_new_tokens + 1 - len(new))
                break
        return torch.cat(new[1:], 1)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every token in nats, 0 where the target is -100. (b, t, vocab), (b, t) -> (b, t)"""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """logits (b, vocab) -> tokens (b, 1)"""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    p, order = torch.softmax(logits.float() / temperature, -1).sort(-1, descending=True)
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        p[p.cumsum(-1) - p >= top_p] = 0
    return order.gather(-1, torch.multinomial(p, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Level stacking


@dataclass(frozen=True)
class Family:
    """How one kind of pre-trained model maps to Hope-Attention."""

    settings: dict[str, Any]
    norm_eps: str  # what its config calls it
    requires: dict[str, tuple]  # options of its config, and the values that Hope-Attention can stand for
    names: dict[str, str]  # our modules -> its modules; of several on one side, each is a slice of the rows


LLAMA = Family(
    settings=dict(norm="rms", mlp="swiglu", rotary=True),
    norm_eps="rms_norm_eps",
    requires={"hidden_act": ("silu",), "use_sliding_window": (False,)},
    names={
        "embed": "model.embed_tokens",
        "blocks.{}.norm": "model.layers.{}.input_layernorm",
        "blocks.{}.memory.to_q": "model.layers.{}.self_attn.q_proj",
        "blocks.{}.memory.to_k": "model.layers.{}.self_attn.k_proj",
        "blocks.{}.memory.to_v": "model.layers.{}.self_attn.v_proj",
        "blocks.{}.memory.to_y": "model.layers.{}.self_attn.o_proj",
        "blocks.{}.cms.levels.0.norm": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.cms.levels.0.w_in": "model.layers.{}.mlp.gate_proj model.layers.{}.mlp.up_proj",
        "blocks.{}.cms.levels.0.w_out": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "head": "lm_head",
    },
)
GPT2 = Family(
    settings=dict(norm="layer", mlp="gelu", rotary=False),
    norm_eps="layer_norm_epsilon",
    requires={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    names={
        "embed": "transformer.wte",
        "embed_position": "transformer.wpe",
        "blocks.{}.norm": "transformer.h.{}.ln_1",
        "blocks.{}.memory.to_q blocks.{}.memory.to_k blocks.{}.memory.to_v": "transformer.h.{}.attn.c_attn",
        "blocks.{}.memory.to_y": "transformer.h.{}.attn.c_proj",
        "blocks.{}.cms.levels.0.norm": "transformer.h.{}.ln_2",
        "blocks.{}.cms.levels.0.w_in": "transformer.h.{}.mlp.c_fc",
        "blocks.{}.cms.levels.0.w_out": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
)
FAMILIES = {"LlamaForCausalLM": LLAMA, "MistralForCausalLM": LLAMA, "Qwen2ForCausalLM": LLAMA, "GPT2LMHeadModel": GPT2}


def from_pretrained(
    model_or_path: Any, *, cms: Sequence[float] = (64,), cms_rate: Sequence[float] = (0.01,), **overrides: Any
) -> Hope:
    """A pre-trained Transformer as Hope-Attention, its MLPs the start states of a CMS (sec. 7.3).

    The first level of every CMS is the pre-trained MLP. Further levels have the same shape and start with w_out = 0:
    they add nothing until they are written. So with rates 0 the logits are the original's, and with `cms=(inf, 64)`
    the pre-trained MLPs stay as they are and only what is stacked on them is written.

    Args:
        model_or_path: a Llama, Mistral, Qwen2 or GPT-2 language model of transformers, or what its
            `AutoModelForCausalLM.from_pretrained` takes: a name or a folder. The weights are copied, as float32.
        cms, cms_rate: chunk size of every level and inner step sizes, as in HopeConfig. Pre-trained weights bear small
            steps only: SmolLM2-135M gains at 0.01 with chunks of 64, and is badly hurt at 0.1 with chunks of 256.
        overrides: fields of HopeConfig or MemoryConfig that the checkpoint does not fix, such as `wiring`; with a name
            or a folder, anything else is passed on to transformers, such as `gguf_file`.

    Raises ImportError without transformers, and ValueError for a kind of model or an option of its that Hope-Attention
    cannot stand for, or for an override of what the checkpoint fixes.
    """
    known = {f.name for config in (HopeConfig, MemoryConfig) for f in fields(config)}
    extra = {name: overrides.pop(name) for name in set(overrides) - known}
    model = model_or_path
    if not isinstance(model, nn.Module):
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise ImportError('transformers is missing; run: pip install "nested-learning-hope[pretrained]"') from None
        model = AutoModelForCausalLM.from_pretrained(model, **extra)
    elif extra:
        raise ValueError(f"unknown setting {sorted(extra)}; see HopeConfig and MemoryConfig for the names")
    if type(model).__name__ not in FAMILIES:
        raise ValueError(f"cannot take over a {type(model).__name__}; allowed: {', '.join(FAMILIES)}")
    family = FAMILIES[type(model).__name__]
    settings = pretrained_settings(model, family)
    if fixed := set(overrides) & set(settings):
        raise ValueError(f"the checkpoint fixes {', '.join(sorted(fixed))}; leave out what is fixed")
    new = Hope(HopeConfig.preset(cms=tuple(cms), cms_rate=tuple(cms_rate), **settings, **overrides))
    with torch.no_grad():
        for ours, theirs in family.names.items():
            for layer in range(new.config.n_layer if "{}" in ours else 1):
                if ours != "head" or not new.config.tied:
                    copy_modules(new, ours.replace("{}", str(layer)), model, theirs.replace("{}", str(layer)))
        for block in new.blocks:
            for level in block.cms.levels[1:]:
                level.w_out.weight.zero_()
    return new


def pretrained_settings(model: nn.Module, family: Family) -> dict[str, Any]:
    """Fields of HopeConfig and MemoryConfig with which Hope computes what `model` does. ValueError if none do."""
    c, embed = model.config, model.get_input_embeddings().weight
    d_model = c.hidden_size
    # transformers 4 has rope_theta and, for other kinds than the default, rope_scaling; 5 has rope_parameters.
    rope = {"rope_theta": getattr(c, "rope_theta", 10000.0)}
    rope |= (getattr(c, "rope_scaling", None) or {}) | (getattr(c, "rope_parameters", None) or {})
    found = {name: (getattr(c, name, allowed[0]), allowed) for name, allowed in family.requires.items()}
    found["rope_type"] = rope.get("rope_type", rope.get("type", "default")), ("default",)
    found["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0), (1.0,)
    found["head_dim"] = getattr(c, "head_dim", None), (None, d_model / c.num_attention_heads)
    for name, (value, allowed) in found.items():
        if value not in allowed:
            raise ValueError(f"this checkpoint has {name} {value!r}; allowed: {', '.join(map(str, allowed))}")
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    return family.settings | dict(
        memory="attention", depth=0, pattern=("memory",), project=True, conv=0, qk_norm=False, y_norm=False,
        vocab_size=len(embed), d_model=d_model, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
        n_kv_head=getattr(c, "num_key_value_heads", None) or 0, window=getattr(c, "sliding_window", None) or 0,
        rope_theta=rope["rope_theta"], n_position=0 if family.settings["rotary"] else c.max_position_embeddings,
        norm_eps=getattr(c, family.norm_eps), bias=any("attn." in b for b in biases), mlp_bias=any("mlp." in b for b in biases),
        cms_hidden=model.get_submodule(family.names["blocks.{}.cms.levels.0.w_out"].format(0)).weight.numel() / d_model**2,
        tied=model.get_output_embeddings().weight is embed,
    )  # fmt: skip


def copy_modules(ours: nn.Module, to: str, theirs: nn.Module, source: str) -> None:
    """Copy weights and biases between modules named by `to` and `source`; of several, the rows are joined and split."""
    targets, sources = (
        [root.get_submodule(s) for s in names.split()] for root, names in ((ours, to), (theirs, source))
    )
    for what in ("weight", "bias"):
        rows = [getattr(m, what, None) for m in sources]
        if rows[0] is None:  # a bias that only we have stays 0
            continue
        rows = [r.T if type(m).__name__ == "Conv1D" and r.ndim == 2 else r for m, r in zip(sources, rows)]
        parts = [getattr(m, what) for m in targets]
        for part, row in zip(parts, torch.cat(rows).split([len(p) for p in parts])):
            part.copy_(row)


# ----------------------------------------------------------------------------------------------------------------------
# Levels and parameter groups


def param_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Split parameters for the outer optimizer: "matrix" for Muon and its like, "rest" for AdamW.

    A matrix maps one representation to another. Embeddings, the output head, norms, gates, convolutions and the start
    states of memories (stacks of small matrices, one for every head) belong to the rest.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "rest": []}
    for name, p in model.named_parameters():
        inner = p.ndim == 2 and name.endswith("weight") and not any(s in name for s in ("embed", "head", "gates"))
        groups["matrix" if inner else "rest"].append(p)
    return groups


def slow_groups(model: Hope, seq_len: int) -> list[dict[str, Any]]:
    """Blocks of the CMS whose chunk C is longer than a training sequence: parameter groups with a `period` in outer steps.

    The sequences of a batch are streams side by side, each seq_len tokens longer after every step, so that C tokens take
    C / seq_len steps, rounded up. `Accumulate` makes the blocks' start states move once in so many.
    """
    chunks = {i: c for i, c in enumerate(model.config.cms) if seq_len < c < INF}
    params = lambda i: [p for block in model.blocks for p in block.cms.levels[i].parameters()]
    return [{"params": params(i), "period": math.ceil(c / seq_len), "chunk": int(c)} for i, c in chunks.items()]


@dataclass(frozen=True)
class Level:
    """One component of a model or optimizer, seen as an associative memory with a frequency of its own."""

    level: int  # 1 is the fastest
    component: str
    period: float | None  # tokens between two updates, 0 for "solved anew at every token", None for the outer step
    context: str
    objective: str
    rule: str
    size: int  # numbers that move: per sequence for states, in all for parameters
    steps: int = 1  # outer steps between two updates, where period is None

    @property
    def every(self) -> str:
        if self.period is None:
            return "outer step" if self.steps == 1 else f"{self.steps} outer steps"
        return f"{self.period:g} tokens" if self.period > 1 else "token"


class Levels(list[Level]):
    """Levels from fastest to slowest; prints as a table."""

    # Kinds of clock and their colours, the same throughout the book (book/style.mplstyle); the faster, the lighter.
    CLOCKS = (
        ("solved anew", "#9b3f86"),
        ("every token", "#e69f00"),
        ("every chunk", "#2a8f83"),
        ("outer step", "#1b3a6b"),
    )

    def __str__(self) -> str:
        head = ("level", "component", "every", "context", "objective", "rule", "numbers")
        rows = [(str(r.level), r.component, r.every, r.context, r.objective, r.rule, f"{r.size:,}") for r in self]
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        line = lambda row: "  ".join(c.ljust(w) for c, w in zip(row[:-1], widths)) + "  " + row[-1].rjust(widths[-1])
        return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, rows)])

    def plot(self, step: int = 512, ax: Any = None) -> Any:
        """Draw when each component moves, over two outer steps of `step` tokens; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        ax = ax or plt.subplots(figsize=(6.4, 0.8 + 0.31 * len(self)), layout="constrained")[1]
        for row, level in enumerate(self):
            period = max(1, int(step * level.steps if level.period is None else level.period))
            kind, color = self.CLOCKS[3 if level.period is None else min(2, math.ceil(level.period))]
            label = None if kind in ax.get_legend_handles_labels()[1] else kind
            moves = range(period, 2 * step + 1, period)
            ax.vlines(moves, row - 0.38, row + 0.38, color=color, linewidth=2, label=label)
        ax.set(xlabel="tokens", xlim=(0, 2 * step * 1.01), xticks=range(0, 2 * step + 1, max(1, step // 4)))
        ax.set_yticks(range(len(self)), [f"{level.component}  {level.level}" for level in self])
        ax.invert_yaxis()
        ax.grid(False)
        ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0), handlelength=0.8, frameon=False)
        return ax


# What an optimizer keeps for its parameters, as memories of the gradient: name of the buffer -> objective, rule.
# A rule may name the optimizer's settings.
BUFFERS = {
    "AdamW": {"first moment": ("-<m, g>", "EMA (eq. 33)"), "second moment": ("-<v, g^2>", "EMA")},
    "Muon": {"momentum": ("-<m, g>", "EMA (eq. 42)")},
    "SGD": {},
    "Accumulate": {"sum": ("-<m, g>", "GD, emptied once moved by")},
    "DGD": {},
    "DeltaMomentum": {"momentum": ("1/2 |m g^T + I|^2", "delta GD with decay (eq. 49)")},
    "PreconditionedMomentum": {
        "momentum": ("-<m, P(g)>", "GD with decay (eq. 47)"),
        "preconditioner": ("mean of g^2 or g g^T", "EMA, {preconditioner}"),
    },
    "DeepMomentum": {"MLP": ("1/2 |m(g) + g|^2", "GD with decay (eq. 50)")},
    "M3": {
        "fast momentum": ("-<m, g>", "EMA (Alg. 1)"),
        "second moment": ("-<v, g^2>", "EMA"),
        "slow momentum": ("-<m, g>", "EMA (eq. 75)"),
    },
}


def buffer_size(optimizer: torch.optim.Optimizer, buffer: str) -> int:
    """Numbers in one of the BUFFERS of an optimizer."""
    groups = optimizer.param_groups
    if buffer == "MLP":  # one for every shape
        return sum(
            2 * d * max(1, round(g["hidden"] * d))
            for g in groups
            for d, _ in {(min(p.shape), p.shape) for p in g["params"]}
        )
    if buffer == "preconditioner":
        kinds = {"identity": lambda p: 0, "diagonal": Tensor.numel, "kronecker": lambda p: sum(n * n for n in p.shape)}
        return sum(kinds[g["preconditioner"]](p) for g in groups for p in g["params"])
    return sum(p.numel() for g in groups for p in g["params"])


def levels(model: Hope, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = ()) -> Levels:
    """Every component of `model` and of the optimizers that train it, ordered by update frequency (Definition 2).

    A component is faster than another if it moves more often, or as often and the other's next state needs its own.
    Raises ValueError for an optimizer whose memories are not known here.
    """
    c = model.config
    found: list[tuple] = []  # period and outer steps, rank where they are equal, then the columns

    def add(
        period: float, rank: int, component: str, context: str, objective: str, rule: str, size: int, steps: int = 1
    ) -> None:
        found.append((period, steps, rank, component, context, objective, rule, size))

    outer = INF
    kinds = [block.memory for block in model.blocks]
    if attention := [a for a in kinds if a.config.depth == 0]:
        window = attention[0].config.window
        seen = f"last {window} tokens" if window else "all tokens so far"
        add(0, 0, "softmax attention", seen, "regression (eq. 62)", "solved exactly", 0)
    if memories := [a for a in kinds if a.config.depth > 0]:
        m = c.memory
        loss = "1/2 |M k - v|^2" if m.objective == "l2" else "-<M k, v>"
        rule = "delta GD (eq. 88)" if m.rule == "dgd" else "GD (eq. 17)"
        values = "keys, own values" if m.self_values else "keys, values"
        for group, name, period in (
            ("main", "memory M", m.chunk if m.read == "chunk" else 1),
            ("proj", "memories " + ",".join(memories[0].adaptive), m.chunk_proj),
        ):
            if group == "proj" and not m.adaptive:
                continue
            size = len(memories) * sum(w.numel() for w in memories[0].start_weights(group))
            if m.momentum:
                add(period, 0, f"{name.removeprefix('memories ')}: momentum", "inner gradients", "-<m, g>", "EMA", size)
            add(period, 1, name, values, loss, rule, size)
    for chunk, level, fast in zip(c.cms, model.blocks[0].cms.levels, model.blocks[0].cms.fast):
        if fast:
            size = c.n_layer * sum(w.numel() for w in (level.w_in.weight, level.w_out.weight))
            add(chunk, 2, f"CMS, C = {chunk:g}", "the stream", "next-token loss", "GD (eq. 71)", size)
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    for o in optimizers:
        kind = type(o).__name__
        if kind not in BUFFERS:
            raise ValueError(f"levels knows nothing of the optimizer {kind}; allowed: {', '.join(BUFFERS)}")
        for buffer, (objective, rule) in BUFFERS[kind].items():
            if size := buffer_size(o, buffer):
                steps = o.param_groups[0]["every"] if buffer == "slow momentum" else 1
                rule = rule.format(**o.param_groups[0])
                add(outer, 0, f"{kind}: {buffer}", "outer gradients", objective, rule, size, steps)
    rule = " and ".join(type(o).__name__ for o in optimizers if type(o).__name__ != "Accumulate") or "no optimizer given"
    size = sum(p.numel() for p in model.parameters())
    for group in (g for o in optimizers if type(o).__name__ == "Accumulate" for g in o.param_groups):
        slow = sum(p.numel() for p in group["params"])
        name = f"CMS, C = {group['chunk']}: start state" if "chunk" in group else "slow parameters"
        add(outer, 3, name, "training text", "next-token loss", rule, slow, group["period"])
        size -= slow
    add(outer, 3, "parameters, start states", "training text", "next-token loss", rule, size)
    order = sorted({row[:3] for row in found})
    table = [
        Level(order.index(row[:3]) + 1, row[3], None if row[0] == outer else row[0], *row[4:], row[1])
        for row in sorted(found, key=lambda row: row[:3])
    ]
    return Levels(table)
