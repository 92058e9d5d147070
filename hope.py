"""Hope: self-modifying Titans followed by a continuum memory system (CMS), and the memories they are made of.

Follows *Nested Learning* (Behrouz, Razaviyayn, Zhong, Mirrokni; arXiv 2512.24695); equation numbers are the arXiv
version's. In the order of this file:

    HopeState and its parts        what is carried between two calls, so that a stream may be cut anywhere
    Memory, Attention              sequence layers: `Memory.preset("hope", d_model=256)`
    MLP, CMS, Block, Hope          the model: `forward` reads a stream, `observe` learns from it, `generate` goes on

What a model may be is said in settings.py (`hope.MemoryConfig`, `hope.HopeConfig`). inner.py reads a memory as it
stands, kernels.py computes the writes. What works on a model without being a part of it stands elsewhere, and is found
here as well: `hope.levels` in levels.py, `hope.load` and `hope.from_pretrained` in pretrained.py. train.py comes next.

What to know before reading:

- A memory is a small network whose weights are state. Reading it is a forward pass; writing it is a step of an inner
  optimizer. Its start state is a parameter, and gradients flow through every write, so the start state is meta-learnt.
- Time runs in chunks. Inside a chunk every inner gradient is taken at the state the chunk started from (eq. 90, with
  the index that does not leak); the writes themselves act token by token, in one call of `kernels.dgd_chunk`.
- Shapes: b batch, t time, d model width, h heads, e head width, n memories side by side, c tokens of a chunk.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial, wraps
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from fused import layer_fits, memory_layer
from inner import apply_memory, inner_gradients, layer_norm, unit
from kernels import chunk_gates, chunks_by_triton, dgd_chunk, in_float32, scans
from scan import memory_scan
from settings import INF, HopeConfig, MemoryConfig, require

__version__ = "0.1.0"  # pyproject.toml reads it here
# What works on a model and is no part of it, by the file where it stands.
ELSEWHERE = {
    **dict.fromkeys(("Level", "Levels", "levels", "param_groups", "slow_groups"), "levels"),
    **dict.fromkeys(("from_pretrained", "load"), "pretrained"),
}
__all__ = [
    "CMS", "GATES", "INF", "MLP", "Attention", "Block", "FastMLP", "Hope", "HopeConfig", "HopeState", "Memory",
    "MemoryConfig", "apply_memory", "compile_parts", "make_layer", "map_state", "rotate", "sample", "token_loss",
    *ELSEWHERE,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """A name of ELSEWHERE, looked up when it is asked for, since those files import this one."""
    if name in ELSEWHERE:
        return getattr(importlib.import_module(ELSEWHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- States ----


def map_state(fn: Callable[..., Tensor], state: Any, *others: Any) -> Any:
    """Apply `fn` to every tensor of a state (dataclasses, lists and tuples), together with those of states like it."""
    if isinstance(state, Tensor):
        return fn(state, *others)
    if is_dataclass(state):
        parts = {f.name: map_state(fn, *(getattr(s, f.name) for s in (state, *others))) for f in fields(state)}
        return replace(state, **parts)
    if isinstance(state, (list, tuple)):
        return type(state)(map_state(fn, *s) for s in zip(state, *others, strict=True))
    return state


def outline(state: Any) -> Any:
    """The kinds and shapes of a state's parts, but for how many sequences there are and how many keys are kept."""
    if isinstance(state, Tensor):
        return tuple(state.shape[1:])
    if isinstance(state, AttentionState):
        state = replace(state, k=state.k[:, :, :0], v=state.v[:, :, :0])
    if is_dataclass(state):
        return type(state).__name__, *(outline(getattr(state, f.name)) for f in fields(state))
    return [outline(part) for part in state] if isinstance(state, (list, tuple)) else state is None


def check_batch(state: Any, b: int) -> None:
    """ValueError unless `state` is one of b sequences."""
    sizes: set[int] = set()
    map_state(lambda z: sizes.add(z.shape[0]) or z, state)
    given = f"the state is of {', '.join(map(str, sizes))} sequences and the input of {b}"
    require(sizes <= {b}, f"{given}; HopeState.select takes some of them")


def check_state(model: Hope, state: HopeState, b: int) -> None:
    """ValueError unless `state` is one of `model`, of b sequences."""
    anew = "give a HopeState that this model returned, or none to start anew"
    require(isinstance(state, HopeState), f"the state is a {type(state).__name__}; {anew}")
    check_batch(state, b)
    own = model.init_state(0)
    pairs = [(state.memories, own.memories), (state.cms, own.cms)]
    if state.segment is not None:
        pairs.append((state.segment.memories, own.memories))
    for given, expected in pairs:
        require(len(given) == len(expected), f"the state has {len(given)} blocks and the model {len(expected)}; {anew}")
        for i, (one, other) in enumerate(zip(outline(given), outline(expected))):
            require(one == other, f"block {i} of the state has the parts {one} and the model's {other}; {anew}")


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        found.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


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


def nothing(like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of these shapes, which take no memory."""
    return [torch.zeros((), dtype=w.dtype, device=w.device).expand_as(w) for w in like]


@dataclass
class FastMLP:
    """In-context change of one MLP of a CMS, per sequence: tensors (b, *weight.shape)."""

    delta: list[Tensor]
    total: list[Tensor]  # gradient summed since the chunk began
    start: list[Tensor] | None = None  # nested wiring: what delta restarts from when the next slower chunk ends
    start_total: list[Tensor] | None = None  # and the gradient summed since that chunk began
    at_rest = None  # see `weights`; no field, so that any change of the state drops it

    def weights(self, matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """W + delta of each matrix (o, i) as `dtype`, (b, o, i): one copy, kept until delta moves."""
        if self.at_rest is None or self.at_rest[0].dtype != dtype:
            copies = [torch.empty_like(d, dtype=dtype) for d in self.delta]
            with torch.no_grad():
                self.at_rest = [torch.add(w, d, out=copy) for w, d, copy in zip(matrices, self.delta, copies)]
        return [GradientAlso.apply(copy, d) for copy, d in zip(self.at_rest, self.delta)]

    def same(self, new: FastMLP) -> FastMLP:
        """`new`, whose delta has the values of this one's."""
        new.at_rest = self.at_rest
        return new

    def add(self, gradient: list[Tensor]) -> FastMLP:
        """With a segment's gradient in the sums, which are that gradient where nothing is in them (see `nothing`)."""
        plus = lambda sums: sums and [a + g if any(a.stride()) else g for a, g in zip(sums, gradient)]
        return self.same(replace(self, total=plus(self.total), start_total=plus(self.start_total)))

    def move(self, step: Tensor) -> FastMLP:
        """At the end of its chunk (eq. 71)."""
        delta = [w - step * g for w, g in zip(self.delta, self.total)]
        return replace(self, delta=delta, total=nothing(delta))

    def restart(self, step: Tensor) -> FastMLP:
        """At the end of the next slower chunk, in nested wiring: back to the start state, which moves (eq. 72)."""
        start = [w - step * g for w, g in zip(self.start, self.start_total)]
        return FastMLP(start, nothing(start), start, nothing(start))


@dataclass
class Segment:
    """What the CMS keeps of the tokens since its last write, until its next."""

    tokens: Tensor  # (b, s)
    targets: Tensor  # (b, s)
    memories: list[MemoryState | AttentionState]  # as they stood before these tokens
    levels: list[int] | None = None  # which levels learn from it, and from how surprising a one: see `Hope.observe`
    surprise: float = 0.0

    def extend(self, tokens: Tensor, targets: Tensor) -> Segment:
        return replace(self, tokens=torch.cat([self.tokens, tokens], 1), targets=torch.cat([self.targets, targets], 1))


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

    def save(self, path: str | Path, model: nn.Module | None = None) -> None:
        """Write the state to a safetensors file; with `model`, also a fingerprint of the weights that it belongs to."""
        tensors: dict[str, Tensor] = {}

        def describe(part: Any) -> Any:
            if isinstance(part, Tensor):
                name = str(len(tensors))
                tensors[name] = part.detach().cpu().clone(memory_format=torch.contiguous_format)
                return {"tensor": name}
            if is_dataclass(part):
                return {"class": type(part).__name__} | {f.name: describe(getattr(part, f.name)) for f in fields(part)}
            return [describe(one) for one in part] if isinstance(part, (list, tuple)) else part

        state = json.dumps(describe(self))
        save_file(tensors, path, {"state": state, "model": "" if model is None else fingerprint(model)})

    @staticmethod
    def load(path: str | Path, model: Hope | None = None) -> HopeState:
        """A state that `save` wrote; nothing is unpickled. With `model`, on its device and checked to be one of its.

        ValueError for any other file, and for a state of another model or of other weights.
        """
        classes = {c.__name__: c for c in (HopeState, MemoryState, AttentionState, Weights, FastMLP, Segment)}
        device = "cpu" if model is None else str(model.embed.weight.device)

        def build(part: Any) -> Any:
            if isinstance(part, list):
                return [build(one) for one in part]
            if not isinstance(part, dict):
                return part
            if "tensor" in part:
                return file.get_tensor(part["tensor"])
            return classes[part["class"]](**{name: build(one) for name, one in part.items() if name != "class"})

        try:
            with safe_open(path, "pt", device=device) as file:
                about = file.metadata() or {}
                state, rows = build(json.loads(about["state"])), len(file.get_tensor("0"))
            if model is not None:
                check_state(model, state, rows)
                require(about["model"] in ("", fingerprint(model)), "it was saved with a model of other weights")
        except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as e:
            raise ValueError(f"{path} is not a state of this model ({e}); give a file that HopeState.save made") from e
        return state


# ---- Memories ----


def piece_lengths(start: int, length: int, clocks: Sequence[int]) -> list[int]:
    """Cut tokens start, ..., start + length - 1 at every multiple of every clock: how long the pieces are."""
    lengths, t, end = [], start, start + length
    while t < end:
        lengths.append(min([end - t, *(clock - t % clock for clock in clocks)]))
        t += lengths[-1]
    return lengths


def cut_streams(streams: dict[str, Tensor], lengths: list[int]) -> list[dict[str, Tensor]]:
    """Cut streams (b, h, t, ...) into pieces of these lengths.

    By `split`, not by slices: the gradient of a slice is as long as the whole stream, of all slices together quadratic.
    """
    pieces = zip(*(z.split(lengths, 2) for z in streams.values()))
    return [dict(zip(streams, piece)) for piece in pieces]


def causal_conv(conv: nn.Conv1d | None, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x: (b, t, d) and the inputs before it -> the convolution's output (b, t, d) and the new tail."""
    if conv is None or x.shape[1] == 0:
        return x, tail
    x = torch.cat([tail.to(x.dtype), x], 1)
    return conv(x.mT).mT, x[:, x.shape[1] - tail.shape[1] :]


def rotate(x: Tensor, start: int, theta: float = 10000.0) -> Tensor:
    """Rotary embedding of x (b, h, t, e) at positions start, start + 1, ..."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# A gate's learnt number becomes a step size above 0, or a retention between 0 and 1.
GATES = {"eta": F.softplus, "alpha": torch.sigmoid, "theta": torch.sigmoid}


def fixed_retention(n_head: int, device: torch.device | None = None) -> Tensor:
    """RetNet's retention, a number for every head: (n_head,)."""
    return 1 - 2.0 ** -(5 + torch.arange(n_head, device=device))


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


def check_gradients(module: nn.Module, wanted: bool) -> None:
    """ValueError if gradients are wanted of inference tensors, which have none for good."""
    lost = wanted and next(module.parameters()).is_inference()
    require(not lost, "this model was made under torch.inference_mode and cannot learn in context; make it outside")


class SequenceLayer(nn.Module):
    """What memories and attention have in common: a convolution in front, heads, a norm and a projection behind."""

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.config = config
        d, h, e = config.d_model, config.n_head, config.d_head
        self.conv = nn.Conv1d(d, d, config.conv, groups=d, bias=False) if config.conv else None
        self.to_y = nn.Linear(d, d, bias=config.bias) if config.project else None
        self.y_norm = nn.Parameter(torch.ones(h, 1, e)) if config.project and config.y_norm else None

    def _start_conv_as_identity(self) -> None:
        if self.conv is not None:
            nn.init.normal_(self.conv.weight, std=0.1)
            with torch.no_grad():
                self.conv.weight[:, 0, -1] += 1

    def _empty_tail(self, b: int) -> Tensor | None:
        if self.conv is None:
            return None
        return self.conv.weight.new_zeros(b, self.config.conv - 1, self.config.d_model)

    def _begin(self, x: Tensor, state: Any) -> Any:
        """The state to go on with; ValueError unless x is (b, t, d) and the state is one of b sequences."""
        d = self.config.d_model
        check_gradients(self, torch.is_grad_enabled())
        fits = x.dim() == 3 and x.shape[-1] == d and x.is_floating_point()
        require(fits, f"x is {x.dtype} of shape {tuple(x.shape)}; give floats (batch, time, d_model = {d})")
        if state is None:
            return self.init_state(x.shape[0])
        check_batch(state, x.shape[0])
        return state

    def _heads(self, x: Tensor, to: nn.Linear | None) -> Tensor:
        return rearrange(x if to is None else to(x), "b t (h e) -> b h t e", e=self.config.d_head)

    def _out(self, y: Tensor) -> Tensor:
        """y: (b, h, t, e) -> (b, t, d)"""
        if self.to_y is None:
            return rearrange(y, "b h t e -> b t (h e)")
        if self.y_norm is not None:
            y = unit(y) * y.shape[-1] ** 0.5 * self.y_norm
        return self.to_y(rearrange(y, "b h t e -> b t (h e)").to(self.to_y.weight.dtype))


def make_layer(config: MemoryConfig) -> Memory | Attention:
    """The sequence layer that `config` describes: Attention where depth is 0, else a Memory."""
    return Attention(config) if config.depth == 0 else Memory(config)


class Memory(SequenceLayer):
    """A sequence layer: in every head a memory that is written and read token by token.

        Memory.preset("titans", d_model=256)        Memory(d_model=256, n_head=4, chunk=32)        Memory(config)

    Reads (eq. 86):   k, v, eta, alpha = M_k(x), M_v(x), M_eta(x), M_alpha(x);   y = M(q);   q = W_q x
    Writes (eq. 88):  each memory M_b moves by delta gradient descent on loss(M_b; k, M_b(v)), see `kernels.dgd_chunk`

    where the names in `config.adaptive` are memories of their own and the rest static projections of x. Choices the
    paper leaves open: heads; eta and alpha are scalars per head, read out of M_eta and M_alpha by a learnt vector;
    the step that multiplies a layer's update is the minimiser of eq. 56 for that layer's input,
    eta / (1 + eta |x|^2); momentum averages the inner gradient (weights theta and 1 - theta: with the gradient frozen
    over a chunk, a sum would overshoot by 1 / (1 - theta)) and leaves the delta term alone; self-generated values are
    l2-normalised and rescaled by a learnt factor, without which a model writes ever larger targets for itself.

    Five choices decide whether a value is found again; tests/bench/recall.py --why shows them. The hidden layer makes
    features, the output layer stores: decay and delta term take W2 back to its start state W2_0, not to 0 (`origin`),
    W2' = W2_0 + (W2 - W2_0)(alpha I - eta' k k^T) - eta' grad k^T, so that silu(W2 k) outlasts writing and forgetting,
    and it moves slowly (`hidden_rate`). In the main memory it starts as large as a silu needs (`spread`). The inner
    loss is the dot product, with which a pair that is written again stays (`objective`). And k and v are not read at
    the same input (`own_input`).

    Plain gradient descent (ttt, titans, dla) has no delta term to bound it. c gradients that are all taken at the
    chunk's start add up, and a layer's loss has curvature |x|^2 along its input x: if c eta' |x|^2 is above 2, a chunk
    overshoots by more than the error it began with, and the next by more again. With `step="mean"` it is at most 1.
    (TTT, too, averages over its mini-batch, and divides its rate by the head width, about |x|^2.)
    A layer norm in the memory does not go with decay, which is why TTT has it and Titans does not: y = x + LN(W1 h)
    depends on the direction of W1 only, so its gradient is G / |W1|, at a right angle to W1, and a token takes |W1|^2
    to alpha^2 |W1|^2 + (eta' G / |W1|)^2. Decay lets it fall until |W1|^4 = (eta' G)^2 / (1 - alpha^2), where a token
    turns W1 by eta' G / |W1|^2 = (1 - alpha^2)^(1/2), 0.19 for the alpha of the start, *whatever eta is*: by 12 within
    a chunk of 64, in which gradients stand still. So gradients through the chunks multiply, 5e7 at 2,048 tokens.
    """

    def __init__(self, config: MemoryConfig | None = None, **settings: Any):
        super().__init__(replace(config, **settings) if config else MemoryConfig(**settings))
        c, d, h = self.config, self.config.d_model, self.config.n_head
        require(c.depth > 0, "depth is 0: softmax attention; use hope.make_layer or Memory.preset('attention')")
        self.compiled = False  # whether complete chunks run through torch.compile, see `compile_parts`
        self.one_launch = True  # whether they may run through `fused.memory_layer`, which has no second derivative
        self.adaptive = [name for name in ("k", "v", "q", "eta", "alpha") if name in c.adaptive]

        self.to_k, self.to_v, self.to_q = (
            nn.Linear(d, d, bias=False) if name not in c.adaptive else None for name in "kvq"
        )
        inputs = (len(c.adaptive) if c.own_input else min(1, len(c.adaptive))) if c.project else 0
        self.to_u = nn.Linear(d, inputs * d, bias=False) if inputs else None
        # A gate is bias + <read, M(x)> per head if adaptive, bias + W x if not. At the start: remember, learn slowly.
        self.gates = nn.ModuleDict()
        for name, present, bias in (
            ("eta", c.step != "one", -2.0),
            ("alpha", c.decay == "gate", 4.0),
            ("theta", c.momentum, 0.0),
        ):
            if present:
                self.gates[name] = Gate(h, c.d_head, bias) if name in c.adaptive else StaticGate(d, h, bias)
        self.start = nn.ParameterDict()
        self.parts = ["proj", "main"] if self.adaptive else ["main"]
        for part in self.parts:
            self._make_start(part, len(self.adaptive) if part == "proj" else 1)
        # Parts with one clock are run together, as one group, the main memory last: group -> its parts.
        self.groups = {"main": self.parts} if c.chunk == c.chunk_proj else {part: [part] for part in self.parts}
        self.clocks = {"proj": c.chunk_proj, "main": c.chunk}
        self._start_conv_as_identity()

    @staticmethod
    def preset(name: str, **overrides: Any) -> Memory | Attention:
        """The layer called `name` in `MemoryConfig.PRESETS`, with any field overridden."""
        return make_layer(MemoryConfig.preset(name, **overrides))

    def _make_start(self, part: str, n: int) -> None:
        """Start states of n memories side by side."""
        h, e, hidden = self.config.n_head, self.config.d_head, self.config.expand * self.config.d_head
        if self.config.depth == 1:
            self.start[f"{part}_0"] = nn.Parameter(torch.zeros(h, n, e, e))
        else:
            spread = (part == "main" and self.config.spread) or e**-0.5
            self.start[f"{part}_0"] = nn.Parameter(torch.randn(h, n, hidden, e) * spread)
            self.start[f"{part}_1"] = nn.Parameter(torch.randn(h, n, e, hidden) / math.sqrt(hidden) * 0.3)
        if self.config.self_values and self.config.value_norm:
            self.start[f"{part}_scale"] = nn.Parameter(torch.ones(h, n, 1, 1))

    def start_weights(self, part: str) -> list[Tensor]:
        """Start states of a part's layers, each (h, n, o, i)."""
        return [self.start[f"{part}_{layer}"] for layer in range(self.config.depth)]

    def _joined(self, group: str, name: int | str) -> Tensor:
        """A layer's start state, or the values' "scale", of all memories of a group: (h, n, ...)."""
        return in_float32(torch.cat([self.start[f"{part}_{name}"] for part in self.groups[group]], 1))

    def _init_group(self, group: str, b: int) -> Weights | None:
        if group not in self.groups:
            return None
        now = [self._joined(group, layer).expand(b, -1, -1, -1, -1) for layer in range(self.config.depth)]
        return Weights(now, [torch.zeros_like(w) for w in now] if self.config.momentum else None, now)

    def init_state(self, b: int) -> MemoryState:
        """The state of b sequences before their first token."""
        return MemoryState(0, self._empty_tail(b), self._init_group("proj", b), self._init_group("main", b))

    def restart_graph(self, state: MemoryState) -> MemoryState:
        """The same state as values, as a detached change of the start state: gradients reach that and nothing else."""
        new = map_state(Tensor.detach, state)
        for name in self.groups:
            starts = [self._joined(name, layer) for layer in range(self.config.depth)]
            graft = lambda weights: [w + (start - start.detach()) for w, start in zip(weights, starts)]
            group, ended = getattr(new, name), state.t % self.clocks[name] == 0  # then the anchor is not read any more
            group = replace(group, now=graft(group.now), anchor=group.anchor if ended else graft(group.anchor))
            new = replace(new, **{name: group})
        return new

    def forward(self, x: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """x: (b, t, d) -> y (b, t, d) and the state after its last token. Any cut of x gives the same y."""
        state = self._begin(x, state)
        if x.shape[1] == 0:
            return torch.zeros_like(x), state
        x, tail = causal_conv(self.conv, x, state.tail)
        streams = self._streams(x, state.t)
        kind = next(iter(streams.values())).dtype  # float32 at least; a state of another type is taken as that
        groups = {name: map_state(lambda w: w.to(kind), getattr(state, name)) for name in self.groups}
        with torch.autocast(x.device.type, enabled=False):
            y, groups = self._scan(streams, groups, state.t)
        y = y.to(x.dtype) if self.to_y is None else y
        return self._out(y), MemoryState(state.t + x.shape[1], tail, groups.get("proj"), groups["main"])

    def _streams(self, x: Tensor, t: int) -> dict[str, Tensor]:
        """What no memory has a part in, all tokens at once: k, v, q (b, h, t, e); eta, alpha, theta (b, h, t); and what
        adaptive memories are read at, u (b, h, t, 1 or one for each, e)."""
        c, streams = self.config, {}
        if self.adaptive:
            u = x if self.to_u is None else self.to_u(x)
            streams["u"] = rearrange(u, "b t (h n e) -> b h t n e", h=c.n_head, e=c.d_head)
        for name, to in (("k", self.to_k), ("v", self.to_v), ("q", self.to_q)):
            if name not in self.adaptive:
                streams[name] = self._heads(x, to)
        for name in ("u", "k", "q"):  # in this order, so that gradients are summed alike in every process
            if name in streams and c.qk_norm:
                streams[name] = unit(streams[name])
            if name in streams and c.rotary and name != "u":
                streams[name] = rotate(streams[name], t, c.rope_theta)
        for name, gate in self.gates.items():
            if name not in self.adaptive:
                streams[name] = GATES[name](gate(x))
        streams = {name: in_float32(z) for name, z in streams.items()}
        some = next(iter(streams.values()))
        if c.step == "one":
            streams["eta"] = some.new_ones(some.shape[:3])
        if c.decay == "none":
            streams["alpha"] = some.new_ones(some.shape[:3])
        elif c.decay == "fixed":  # RetNet's
            streams["alpha"] = some.new_ones(some.shape[:3]) * fixed_retention(c.n_head, x.device)[:, None]
        return streams

    def _scan(self, streams: dict[str, Tensor], groups: dict[str, Weights], t: int) -> tuple[Tensor, dict]:
        """Tokens from time t on: in one launch, or in spans whose inner states the backward pass recomputes."""
        c, some = self.config, next(iter(streams.values()))
        if not c.decay_first and c.beta == 1 and scans(some, c.d_head):
            return self._launch(streams, groups, t)
        if self.one_launch and layer_fits(c, some):
            return self._whole_chunks(streams, groups, t)
        lengths = piece_lengths(0, some.shape[2], [c.remat * c.chunk] if c.remat else [])
        spans, ys = cut_streams(streams, lengths), []
        for i, (n, span) in enumerate(zip(lengths, spans)):
            # The last span's graph is needed first, and is no larger than the one recomputed after it.
            if i + 1 < len(spans) and torch.is_grad_enabled():
                y, groups = checkpoint(self._span, span, groups, t, use_reentrant=False, preserve_rng_state=False)
            else:
                y, groups = self._span(span, groups, t)
            ys.append(y)
            t += n
        return torch.cat(ys, 2), groups

    def _span(self, streams: dict[str, Tensor], groups: dict[str, Weights], t: int) -> tuple[Tensor, dict]:
        """Any number of tokens from time t on: streams (b, h, s, e), gates (b, h, s) -> y (b, h, s, e), new groups."""
        ys, some = [], next(iter(streams.values()))
        lengths = piece_lengths(t, some.shape[2], list(self.clocks.values()))
        for n, piece in zip(lengths, cut_streams(streams, lengths)):
            for name, group in groups.items():
                if t % self.clocks[name] == 0:
                    groups = {**groups, name: replace(group, anchor=group.now)}
            compiled = self.compiled and n == self.config.chunk and not chunks_by_triton(some)
            step = compiled_step() if compiled else Memory._write_and_read
            y, groups = step(self, piece, groups)
            ys.append(y)
            t += n
        return torch.cat(ys, 2), groups

    def _whole_chunks(self, streams: dict[str, Tensor], groups: dict[str, Weights], t: int) -> tuple[Tensor, dict]:
        """`_span` with gradients: whole chunks in one launch of `fused.memory_layer`, what is left as ever."""
        length, chunk = next(iter(streams.values())).shape[2], self.config.chunk
        begun = min(-t % chunk, length)
        lengths, ys = [begun, (length - begun) // chunk * chunk, (length - begun) % chunk], []
        for n, piece, run in zip(lengths, cut_streams(streams, lengths), (self._span, self._fused, self._span)):
            if n:
                y, groups = run(piece, groups, t)
                ys.append(y)
                t += n
        return torch.cat(ys, 2), groups

    def _fused(self, streams: dict[str, Tensor], groups: dict[str, Weights], t: int) -> tuple[Tensor, dict]:
        """`_span` for whole chunks, from the beginning of one on."""
        c, (now, momentum) = self.config, (groups["main"].now, groups["main"].momentum)
        inputs = dict(streams, W2=now[0], W1=now[1], m2=momentum[0], m1=momentum[1])
        if c.origin == "start":
            inputs["start"] = self._joined("main", 0)
        if c.self_values:
            inputs["scale"] = self._joined("main", "scale")
        for name in self.gates.keys() & set(self.adaptive):
            inputs |= {f"{name}_{part}": in_float32(z) for part, z in self.gates[name].named_parameters()}
        y, now, momentum = memory_layer(
            inputs, chunk=c.chunk, adaptive=len(self.adaptive), objective=c.objective, self_values=c.self_values,
            qk_norm=c.qk_norm, hidden_rate=c.hidden_rate, keep=not c.remat,
        )  # fmt: skip
        return y, {"main": Weights(now, momentum, now)}  # the chunk has ended: the next one reads what is now

    def _launch(self, streams: dict[str, Tensor], groups: dict[str, Weights], t: int) -> tuple[Tensor, dict]:
        """`_span` without gradients, in one launch of `scan.memory_scan`, which writes to copies of the groups."""
        c = self.config
        joined = map_state(lambda *parts: torch.cat(parts, 2), *groups.values())
        join = lambda what: torch.cat([self._joined(name, what) for name in groups], 1)
        y = memory_scan(
            streams, joined.now, joined.momentum, joined.anchor, t=t, chunk=c.chunk, chunk_proj=c.chunk_proj,
            gates={name: (in_float32(gate.read), in_float32(gate.bias))
                   for name, gate in self.gates.items() if name in self.adaptive},
            scale=join("scale") if c.self_values and c.value_norm else None, adaptive=len(self.adaptive),
            start=join(0) if c.depth == 2 and c.origin == "start" else None, hidden_rate=c.hidden_rate,
            objective=c.objective, step=c.step, read=c.read, self_values=c.self_values, qk_norm=c.qk_norm,
            norm=c.memory_norm, delta=c.rule == "dgd",
        )  # fmt: skip
        new, begin = {}, 0
        for name, group in groups.items():
            part = slice(begin, begin + group.now[0].shape[2])
            new[name] = map_state(lambda w: w[:, :, part], joined)
            begin = part.stop
        return y, new

    def _write_and_read(self, streams: dict[str, Tensor], groups: dict[str, Weights]) -> tuple[Tensor, dict]:
        """Tokens that lie within one chunk: streams (b, h, c, e), gates (b, h, c) -> y (b, h, c, e), new groups."""
        c = self.config
        if self.adaptive:
            streams = {**streams, **self._adaptive_reads(streams["u"], groups.get("proj", groups["main"]).anchor)}
        k, v, q, eta, alpha = (streams[name].unsqueeze(2) for name in ("k", "v", "q", "eta", "alpha"))
        theta = streams["theta"].unsqueeze(2) if c.momentum else None
        if c.decay_first:  # gradients are divided by alpha below; so little of a state is as good as nothing
            alpha = alpha.clamp(min=1e-3)
        alone = k.shape[3] == 1 and not torch.is_grad_enabled()  # needs none, and kernels make their own
        gates = None if alone or chunks_by_triton(k) else chunk_gates(alpha, theta, ema=True)
        written, inner_read = {}, None
        for name, group in groups.items():
            query = q if name == "main" and c.read != "chunk" else None
            now, momentum = [], []
            gradients = inner_gradients(group.anchor, k, self._values(name, group, v), c.objective, c.memory_norm)
            for layer, (x, Wx, gradient) in enumerate(gradients):
                hidden = layer + 1 < c.depth
                rate = eta * c.hidden_rate if hidden else eta
                step = rate if c.step == "one" else c.beta * rate / (1 + rate * x.square().sum(-1))
                step = step / c.chunk if c.step == "mean" else step
                if c.decay_first:  # erase alpha M x, but write as much as ever
                    step, gradient = alpha * step, gradient / alpha.unsqueeze(-1)
                change, at_anchor = group.now[layer], group.now[layer] is group.anchor[layer]
                start = self._joined(name, layer) if hidden and c.origin == "start" else None
                if start is not None:
                    change, at_anchor = change - start, False
                weights, m, read = dgd_chunk(
                    change, x, gradient, step, alpha, theta=theta, Q=query, inclusive=c.read == "after",
                    m=group.momentum[layer] if c.momentum else None, delta=c.rule == "dgd", gates=gates, readers=1,
                    ema=True, MX=Wx if at_anchor else None,
                )  # fmt: skip
                if start is not None:
                    weights = start + weights
                    read = None if query is None else read + query @ start[:, -1:].mT
                now.append(weights)
                momentum.append(m)
                query = F.silu(read) if hidden and read is not None else read
            written[name] = Weights(now, momentum if c.momentum else None, group.anchor)
            inner_read = query
        if c.read == "chunk":
            y = apply_memory([w[:, :, -1:] for w in groups["main"].anchor], q, c.memory_norm)
        elif c.depth == 1:
            y = inner_read
        else:
            y = q + (layer_norm(inner_read)[0] if c.memory_norm else inner_read)
        return y.squeeze(2), written

    def _adaptive_reads(self, u: Tensor, anchor: list[Tensor]) -> dict[str, Tensor]:
        """What the adaptive memories answer to u (b, h, c, 1 or n, e): k, v, q (b, h, c, e), eta and alpha (b, h,
        c)."""
        reads = apply_memory(
            [w[:, :, : len(self.adaptive)] for w in anchor], u.transpose(2, 3), self.config.memory_norm
        )
        found = dict(zip(self.adaptive, reads.unbind(2)))
        for name, read in found.items():
            if name in self.gates:
                found[name] = GATES[name](self.gates[name](read))
            elif name != "v" and self.config.qk_norm:
                found[name] = unit(read)
        return found

    def _values(self, name: str, group: Weights, v: Tensor) -> Tensor:
        """What a group's memories are written with: v (b, h, 1, c, e), or each with its own value (b, h, n, c, e)."""
        if not self.config.self_values:
            return v
        own = apply_memory(group.anchor, v, self.config.memory_norm)  # eq. 84
        return self._joined(name, "scale") * unit(own) if self.config.value_norm else own


@cache
def compiled_step() -> Callable:
    """`Memory._write_and_read` compiled: one chunk, since a loop over chunks would be compiled for its length."""
    return torch.compile(Memory._write_and_read, dynamic=False)


class Attention(SequenceLayer):
    """Softmax attention (eq. 62): the memory without parameters, whose state is every key and value it has seen.

    Rotary positions, normalised queries and keys, `n_kv_head` heads of keys and values; with `window` it sees only that
    many tokens, itself included (eq. 63).
    """

    def __init__(self, config: MemoryConfig):
        super().__init__(config)
        d, h, e = config.d_model, config.n_head, config.d_head
        self.n_kv = config.n_kv_head or h
        self.to_k, self.to_v, self.to_q = (nn.Linear(d, n * e, bias=config.bias) for n in (self.n_kv, self.n_kv, h))
        self.scale = nn.Parameter(torch.full((h, 1, 1), 10.0 if config.qk_norm else e**-0.5))
        self._start_conv_as_identity()

    def init_state(self, b: int) -> AttentionState:
        """The state of b sequences before their first token."""
        empty = self.to_k.weight.new_zeros(b, self.n_kv, 0, self.config.d_head)
        return AttentionState(0, self._empty_tail(b), empty, empty)

    def restart_graph(self, state: AttentionState) -> AttentionState:
        """The same state as values."""
        return map_state(Tensor.detach, state)

    def forward(self, x: Tensor, state: AttentionState | None = None) -> tuple[Tensor, AttentionState]:
        """x: (b, t, d) -> y (b, t, d) and the state after its last token. Any cut of x gives the same y."""
        c, state = self.config, self._begin(x, state)
        x, tail = causal_conv(self.conv, x, state.tail)
        q, k, v = (self._heads(x, to) for to in (self.to_q, self.to_k, self.to_v))
        if c.qk_norm:
            q, k = unit(q), unit(k)
        q = q * self.scale
        if c.rotary:
            q, k = rotate(q, state.t, c.rope_theta), rotate(k, state.t, c.rope_theta)
        k, v = torch.cat([state.k.to(k.dtype), k], 2), torch.cat([state.v.to(v.dtype), v], 2)
        keys, queries = k.shape[2], q.shape[2]
        key = torch.arange(keys, device=x.device)
        query = key[keys - queries :, None]
        seen = (key <= query) & (key > query - c.window) if c.window else key <= query
        causal, gqa = queries == keys and not c.window, self.n_kv != c.n_head
        mask = None if causal else seen
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=gqa)
        if c.window:
            k, v = k[:, :, -c.window :], v[:, :, -c.window :]
        return self._out(y), AttentionState(state.t + x.shape[1], tail, k, v)


# ---- Continuum memory system ----


class GradientAlso(torch.autograd.Function):
    """`value` (b, o, i), with its gradient also for `part`, one of its summands: of that shape, or (o, i)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, part: Tensor) -> Tensor:
        ctx.shape = part.shape
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.sum_to_size(ctx.shape)


class FastLinear(nn.Linear):
    """A linear layer that may have a weight for every sequence, its own plus something, (b, o, i). x: (b, t, i)."""

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        if weight is None:
            return super().forward(x)
        y = x @ GradientAlso.apply(weight, self.weight).mT
        return y if self.bias is None else y + self.bias.to(y.dtype)


class BoundedGain(torch.autograd.Function):
    """x (..., d) as it is, for a norm in front of a branch; where the mean square of x is below the norm's eps, its
    gradient is scaled down by their ratio.

    There a norm only multiplies, by eps^(-1/2). Tokens that are 0, with nothing else in front of them, are 0 in every
    block, so that in going back the factors of all norms would multiply: 1e13 in two blocks, infinity in eight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.eps = eps
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        size = ctx.saved_tensors[0].detach().square().mean(-1, keepdim=True)
        return gradient * (size / ctx.eps).clamp(max=1), None


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(BoundedGain.apply(x, self.eps))


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(BoundedGain.apply(x, self.eps))


def make_norm(config: HopeConfig, last: bool = False) -> nn.Module:
    """In front of a branch of a block, or the last one: by its gain, what is 0 still learns, through no branch."""
    kinds = {"rms": nn.RMSNorm, "layer": nn.LayerNorm} if last else {"rms": RMSNorm, "layer": LayerNorm}
    return kinds[config.norm](config.memory.d_model, eps=config.norm_eps)


class MLP(nn.Module):
    """One block of a CMS, x + W_out silu(W_in norm(x)), or its SwiGLU or GELU form.

    Its two matrices may be others for every sequence, see `FastMLP.weights`; norm and biases stay.
    """

    def __init__(self, config: HopeConfig):
        super().__init__()
        d, hidden, self.kind = config.memory.d_model, round(config.cms_hidden * config.memory.d_model), config.mlp
        self.norm = make_norm(config)
        self.w_in = FastLinear(d, 2 * hidden if self.kind == "swiglu" else hidden, bias=config.mlp_bias)
        self.w_out = FastLinear(hidden, d, bias=config.mlp_bias)

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """The weights that a CMS may write."""
        return self.w_in.weight, self.w_out.weight

    def forward(self, x: Tensor, matrices: Sequence[Tensor] | None = None) -> Tensor:
        w_in, w_out = matrices or (None, None)
        z = self.w_in(self.norm(x), w_in)
        if self.kind == "swiglu":
            gate, z = z.chunk(2, -1)
            z = F.silu(gate) * z
        else:
            z = F.gelu(z, approximate="tanh") if self.kind == "gelu" else F.silu(z)
        return x + self.w_out(z, w_out)


class CMS(nn.Module):
    """Continuum memory system: MLPs, block l written every C_l tokens (eqs. 70 to 74).

    A block with finite C_l is a fast weight, theta + delta with one delta per sequence. `write` moves it by the sum of
    the chunk's gradients of the task loss, divided by C_l so that rates compare across levels. C_l = inf: an MLP.
    Wired in a chain (sequential), side by side (independent: the changes that the blocks make are added), or nested: a
    chain in which a block falls back to its start state when the next slower block's chunk ends, and that start state
    itself moves by the gradients of the slower chunk.
    """

    def __init__(self, config: HopeConfig):
        super().__init__()
        self.chunks, self.wiring = config.cms, config.wiring
        self.levels = nn.ModuleList(MLP(config) for _ in config.cms)
        self.written = config.written  # places of the levels that are written in context
        self.start_rates = [config.rates[i] for i in self.written]
        # Nested wiring: the level at whose chunk's end one restarts, the next slower of those that are written.
        self.slower = dict(zip(self.written, self.written[1:])) if config.wiring == "nested" else {}
        # Learnt and bounded: rates grow at most twofold, since a far too large one destroys what was learnt.
        self.raw_rates = nn.Parameter(torch.zeros(len(self.written))) if config.learn_rates and self.written else None

    def rates(self) -> list[Tensor] | list[float]:
        """Step size of every level that is written in context, per mean gradient of its chunk."""
        if self.raw_rates is None:
            return self.start_rates
        return [2 * rate * torch.sigmoid(raw) for rate, raw in zip(self.start_rates, in_float32(self.raw_rates))]

    def init_state(self, b: int) -> list[FastMLP | None]:
        """Of every level the change in b sequences, 0 at first; None where none is written."""
        state: list[FastMLP | None] = [None] * len(self.levels)
        for i in self.written:
            # In float32 at least: steps are small beside what they have added up to.
            zeros = [in_float32(w.new_zeros(b, *w.shape)) for w in self.levels[i].matrices]
            sums = nothing(zeros)
            state[i] = FastMLP(zeros, sums, zeros, sums) if i in self.slower else FastMLP(zeros, sums)
        return state

    def forward(self, x: Tensor, state: Sequence[FastMLP | None]) -> Tensor:
        """x: (b, t, d) -> (b, t, d), through the weights as they stand."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        weights = [fast and fast.weights(level.matrices, dtype) for level, fast in zip(self.levels, state)]
        if self.wiring == "independent":
            return x + sum(level(x, own) - x for level, own in zip(self.levels, weights))
        for level, own in zip(self.levels, weights):
            x = level(x, own)
        return x

    def write(self, state: list[FastMLP | None], gradients: dict[int, list[Tensor]], t: int) -> list[FastMLP | None]:
        """Add a segment's gradients, of levels that learn those of its two matrices; where a chunk ends at t, move."""
        steps = {i: rate / self.chunks[i] for i, rate in zip(self.written, self.rates())}
        new = list(state)
        for i in self.written:
            fast, slower = state[i].add(gradients[i]) if i in gradients else state[i], self.slower.get(i)
            if slower is not None and t % self.chunks[slower] == 0:
                fast = fast.restart(steps[slower])
            elif t % self.chunks[i] == 0:
                fast = fast.move(steps[i])
            new[i] = fast
        return new


# ---- Hope ----


class Block(nn.Module):
    """Block i of the model: a sequence layer, then a CMS."""

    def __init__(self, config: HopeConfig, i: int):
        super().__init__()
        self.norm = make_norm(config)
        self.memory = make_layer(config.layer(i))
        self.cms = CMS(config)
        # Of torch's attentions only the one spelt out in PyTorch has a second derivative, of memories the plain form.
        self.attend = partial(sdpa_kernel, SDPBackend.MATH) if config.inner_grad == "full" else nullcontext
        self.memory.one_launch = config.inner_grad != "full"

    def forward(self, x: Tensor, memory: Any, cms: list[FastMLP | None]) -> tuple[Tensor, Any]:
        with self.attend():
            y, memory = self.memory(self.norm(x), memory)
        return self.cms(x + y, cms), memory


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


@dataclass(frozen=True)
class Lesson:
    """How `Hope.observe` learns from a segment; see there."""

    levels: list[int] | None = None
    surprise: float = 0.0
    truncate: bool = False
    scored: Tensor | None = None  # what parameter gradients are divided by, for those of a mean

    def backward(self, losses: Tensor) -> None:
        """Add to the gradients of all leaves that the losses hang on."""
        total = losses.sum()
        (total if self.scored is None else total / self.scored).backward()


def check_tokens(tokens: Tensor, vocab_size: int, like: Tensor | None = None) -> Tensor:
    """`tokens` as int64, or ValueError unless they are integers (b, t) within the vocabulary.

    With the tokens they are `like`, they are targets: of that shape, -100 is allowed. What values are is looked up on
    the CPU only, since a GPU would have to be waited for.
    """
    name, also = ("tokens", "") if like is None else ("targets", ", or -100 to leave one out")
    require(isinstance(tokens, Tensor), f"{name} are a {type(tokens).__name__}; give a tensor (batch, time)")
    given = f"{name} are {tokens.dtype} of shape {tuple(tokens.shape)}"
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    require(whole and tokens.dim() == 2, f"{given}; give integers (batch, time), as by tokens[None] for one sequence")
    same = like is None or like.shape == tokens.shape
    require(same, f"{given}, but not the tokens; give each token its target")
    tokens = tokens.long()
    if type(tokens) is Tensor and tokens.device.type == "cpu":
        beyond = tokens[((tokens < 0) | (tokens >= vocab_size)) & ((tokens != -100) | (like is None))].tolist()
        require(not beyond, f"{name} hold {beyond[:3]}; allowed: 0 to {vocab_size - 1}{also}")
    return tokens


def outside_inference_mode(method: Callable) -> Callable:
    """Under torch.inference_mode a method runs as under torch.no_grad: a CMS needs gradients."""

    @wraps(method)
    def run(*args: Any, **how: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **how)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **how)

    return run


def own_deltas(state: list[FastMLP | None], learn: Sequence[int], detach: bool) -> list[FastMLP | None]:
    """A CMS's state with deltas of its own for levels that learn, to which a gradient can be taken that reaches no
    further back; leaves with `detach`."""
    own = lambda d: d.view_as(d) if d.requires_grad and not detach else d.detach().requires_grad_()
    of = lambda fast: fast.same(replace(fast, delta=[own(d) for d in fast.delta]))
    return [of(fast) if i in learn else fast for i, fast in enumerate(state)]


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
        self.norm = make_norm(config, last=True)
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
        memories, cms = zip(*((block.memory.init_state(b), block.cms.init_state(b)) for block in self.blocks))
        return HopeState(list(memories), list(cms))

    def _run(self, tokens: Tensor, memories: list, cms: list) -> tuple[Tensor, list]:
        """Logits (b, t, vocab_size) and the memories after the last token; the CMS is read as it stands."""
        x, new = self.embed(tokens), []
        if self.embed_position is not None:
            start, longest = memories[0].t, self.config.n_position
            end = start + tokens.shape[1]
            reach = f"the stream reaches {end} tokens, but this model has learnt positions for {longest}"
            require(end <= longest, f"{reach}; start a new state there")
            x = x + self.embed_position.weight[start:end]
        for block, memory, fast in zip(self.blocks, memories, cms):
            if self.recompute and torch.is_grad_enabled():
                x, memory = checkpoint(block, x, memory, fast, use_reentrant=False, preserve_rng_state=False)
            else:
                x, memory = block(x, memory, fast)
            new.append(memory)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x), new

    def _begin(self, tokens: Tensor, state: HopeState | None) -> tuple[Tensor, HopeState]:
        """Both as they are computed with, or ValueError."""
        check_gradients(self, torch.is_grad_enabled() or bool(self.config.written))
        tokens = check_tokens(tokens, self.config.vocab_size)
        if state is None:
            return tokens, self.init_state(tokens.shape[0])
        check_state(self, state, tokens.shape[0])
        return tokens, map_state(lambda z: z.clone() if z.is_inference() else z, state)

    def _bank(self, state: HopeState) -> HopeState:
        """The state with the open segment's gradient in the sums of the CMS, so that unobserved tokens may follow."""
        segment = state.segment
        if segment is None or segment.levels == []:
            return replace(state, segment=None)
        _, _, cms, _ = self._learn(segment, segment.tokens.shape[1], state.cms, state.observed, Lesson())
        return replace(state, cms=cms, segment=None)

    @outside_inference_mode
    def forward(self, tokens: Tensor, state: HopeState | None = None) -> tuple[Tensor, HopeState]:
        """Read a stream without scoring it: memories are written, the CMS is read as it stands.

        tokens: (b, t) integers. Returns logits (b, t, vocab_size) and the state.
        """
        tokens, state = self._begin(tokens, state)
        require(state.pending is None, "a token of this state waits for its target; continue with observe or stream")
        state = self._bank(state)
        logits, memories = self._run(tokens, state.memories, state.cms)
        return logits, replace(state, memories=memories)

    @outside_inference_mode
    def observe(
        self, tokens: Tensor, targets: Tensor | None = None, state: HopeState | None = None, backward: bool = False,
        reduction: Literal["mean", "none"] = "mean", levels: Sequence[int] | None = None, surprise: float = 0.0,
        truncate: bool = False, logits: bool = False,
    ) -> tuple[Tensor, HopeState] | tuple[Tensor, HopeState, Tensor]:  # fmt: skip
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
                not grow with the stream and one pass serves parameters and CMS. Start states of memories learn from
                every segment, as if it had begun with them; what a write did for later segments, and so the learnt
                rates of the CMS, get no gradient.
            logits: return the logits (b, t, vocab_size) that were scored as well, after loss and state.
        """
        require(backward or not truncate, "truncate=True is about the backward pass; set backward=True as well")
        require(reduction in ("mean", "none"), f"reduction is {reduction!r}; allowed: mean, none")
        able = self.config.written
        unable = set(levels or ()) - set(able)
        require(not unable, f"levels {sorted(unable)} of the CMS do not learn in context; those that do: {able}")
        tokens, state = self._begin(tokens, state)
        if targets is None:
            if state.pending is not None:
                tokens = torch.cat([state.pending, tokens], 1)
            state = replace(state, pending=tokens[:, -1:])
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
        else:
            require(state.pending is None, "a token of this state waits for its target; go on without targets")
            targets = check_tokens(targets, self.config.vocab_size, like=tokens)
        scored = (targets != -100).sum().clamp(min=1)
        levels = None if levels is None else [*levels]
        lesson = Lesson(levels, surprise, truncate, scored if reduction == "mean" else None)
        if state.segment and (state.segment.levels, state.segment.surprise) != (levels, surprise):
            state = self._bank(state)
        losses, scores, lengths = [], [], piece_lengths(state.observed, tokens.shape[1], self.config.clocks)
        for piece in zip(tokens.split(lengths, 1), targets.split(lengths, 1)):
            state = self.restart_graph(state) if truncate and losses else state
            loss, state, score = self._observe_piece(*piece, state, lesson)
            losses.append(loss.detach() if truncate else loss)
            scores += [score] if logits else []
        loss = torch.cat(losses, 1) if losses else in_float32(self.embed.weight.new_zeros(tokens.shape))
        if reduction == "mean":
            loss = loss.sum() / scored
        if backward and not truncate:
            loss.sum().backward()
        found = (loss, state)
        if logits:
            found += (torch.cat(scores, 1) if scores else loss.new_zeros(*tokens.shape, self.config.vocab_size),)
        return map_state(Tensor.detach, found) if backward else found

    def _observe_piece(
        self, tokens: Tensor, targets: Tensor, state: HopeState, lesson: Lesson, read: tuple | None = None
    ) -> tuple[Tensor, HopeState, Tensor]:
        """Tokens (b, s) that lie within one segment -> losses, the state, logits; `read`: what `_run` makes of them."""
        observed, segment = state.observed + tokens.shape[1], state.segment
        if self.config.clocks:
            before = 0 if segment is None else segment.tokens.shape[1]
            begun = Segment(tokens[:, :0], targets[:, :0], state.memories, lesson.levels, lesson.surprise)
            segment = (segment or begun).extend(tokens, targets)
        if any(observed % clock == 0 for clock in self.config.clocks):
            losses, memories, cms, logits = self._learn(segment, before, state.cms, observed, lesson)
            segment = None
        else:
            logits, memories = read or self._run(tokens, state.memories, state.cms)
            losses, cms = token_loss(logits, targets), state.cms
            if lesson.truncate:
                with torch.autocast(tokens.device.type, enabled=False):
                    lesson.backward(losses)
        return losses, replace(state, memories=memories, cms=cms, observed=observed, segment=segment), logits

    def restart_graph(self, state: HopeState) -> HopeState:
        """The same state as values, with memories that hang on their start states once more and on nothing else."""
        restart = lambda memories: [block.memory.restart_graph(m) for block, m in zip(self.blocks, memories)]
        segment = state.segment and replace(state.segment, memories=restart(state.segment.memories))
        cms = [[fast and fast.same(map_state(Tensor.detach, fast)) for fast in block] for block in state.cms]
        return replace(state.detach(), memories=restart(state.memories), cms=cms, segment=segment)

    def _learn(
        self, segment: Segment, before: int, cms: list[list[FastMLP | None]], t: int, lesson: Lesson
    ) -> tuple[Tensor, list, list[list[FastMLP | None]], Tensor]:
        """Run a segment and write the CMS with its gradient, at time t.

        That gradient reaches back to the segment's start and no further: it is taken to deltas made fresh for it. Where
        the segment's parameter gradients are wanted at once (`truncate`), one pass yields both, unless the first
        `before` of its tokens were observed by an earlier call, which has gone back through their losses already.
        Returns losses of the other tokens, the memories after the last one, the CMS, and logits of the other tokens.
        """
        keep_graph = torch.is_grad_enabled()
        full = keep_graph and self.config.inner_grad == "full" and not lesson.truncate
        learn = self.config.written if segment.levels is None else segment.levels
        with torch.set_grad_enabled(keep_graph or bool(learn)):
            fresh = [own_deltas(state, learn, detach=lesson.truncate) for state in cms]
            logits, memories = self._run(segment.tokens, segment.memories, fresh)
            losses = token_loss(logits, segment.targets)
            deltas, layout = tree_flatten([{i: state[i].delta for i in learn} for state in fresh])
            with torch.autocast(logits.device.type, enabled=False):
                if lesson.truncate and before == 0:
                    lesson.backward(losses)
                    found = [d.grad if lesson.scored is None else d.grad * lesson.scored for d in deltas]
                else:
                    how = dict(retain_graph=keep_graph, create_graph=full)
                    found = torch.autograd.grad(losses.sum(), deltas, **how) if deltas else []
                    if lesson.truncate:
                        lesson.backward(losses[:, before:])
        if segment.surprise:  # sequences share nothing, so a gradient of the sum is each sequence's own
            teaches = losses.detach().sum(1) > segment.surprise * (segment.targets != -100).sum(1)
            found = [g * teaches[:, None, None] for g in found]
        each = zip(self.blocks, fresh, tree_unflatten(found, layout))
        with torch.set_grad_enabled(keep_graph and not lesson.truncate):
            new = [block.cms.write(state, gradients, t) for block, state, gradients in each]
        found = (losses[:, before:], memories, new, logits[:, before:])
        return found if keep_graph else map_state(Tensor.detach, found)

    @outside_inference_mode
    def restart(self, state: HopeState) -> HopeState:
        """The state in front of another text: memories as before the first token, the CMS with what it has learnt.

        The clock goes on, and an open chunk counts.
        """
        sizes: list[int] = []
        map_state(lambda z: sizes.append(len(z)) or z, state.memories)
        check_state(self, state, sizes[0])
        state = self._bank(state)
        return replace(state, memories=self.init_state(sizes[0]).memories, pending=None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def stream(
        self, tokens: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        state: HopeState | None = None, stop: Sequence[int] = (), memorize: bool | Sequence[int] = True,
        surprise: float = 0.0, learn_own: bool = False,
    ) -> Iterator[tuple[Tensor, HopeState]]:  # fmt: skip
        """Continue prompts by sampled tokens: yields the next of every sequence, and the state after them.

        By that state `observe`, `stream` and `generate` go on: what was said is in its memories, but for the last
        token, which waits there for the next. The CMS learns from the prompt, which is observed.

        Args:
            tokens: (b, t) prompts.
            temperature: 0 picks the likeliest token.
            top_k, top_p: sample among that many of the likeliest tokens, or the fewest with that much probability.
            state: continue from here.
            stop: tokens after which a sequence is finished and repeats them; when all are, so is the stream.
            memorize: whether the CMS learns from the prompt, or which of its levels; see `observe`, also for surprise.
            learn_own: it learns from what the model says itself in the same way; else that is only read.
        """
        levels = {True: None, False: []}[memorize] if isinstance(memorize, bool) else [*memorize]
        lesson = Lesson(levels, surprise)
        _, state = self.observe(tokens, state=state, levels=levels, surprise=surprise)
        require(state.pending.shape[1] > 0, "the prompt is empty; give at least one token")
        state = state if learn_own else self._bank(state)
        done, stop = torch.zeros_like(state.pending, dtype=torch.bool), state.pending.new_tensor(list(stop))
        while not done.all():
            last = state.pending
            logits, memories = self._run(last, state.memories, state.cms)
            new = torch.where(done, last, sample(logits[:, -1], temperature, top_k, top_p))
            if learn_own:
                _, state, _ = self._observe_piece(last, new.masked_fill(done, -100), state, lesson, (logits, memories))
            else:
                state = replace(state, memories=memories)
            state = replace(state, pending=new)
            done = done | torch.isin(new, stop)
            yield new, state

    def generate(self, tokens: Tensor, max_new_tokens: int, state: HopeState | None = None, **how: Any) -> Tensor:
        """The next tokens (b, max_new_tokens) of prompts (b, t).

        A finished sequence is filled up with its stop token. `how`: temperature and so on, see `stream`, which also
        gives the state to go on from. Prompts of different lengths cannot run together, since their chunks would end at
        other times.
        """
        require(max_new_tokens >= 0, f"max_new_tokens is {max_new_tokens}; give a number from 0")
        said = [new for new, _ in islice(self.stream(tokens, state=state, **how), max_new_tokens)]
        return torch.cat([tokens[:, :0].long(), *said, *said[-1:] * (max_new_tokens - len(said))], 1)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every token in nats, 0 where the target is -100. (b, t, vocab), (b, t) -> (b, t)"""
    given = f"logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}"
    require(logits.shape[:-1] == targets.shape, f"{given}; give (b, t, vocab) and (b, t)")
    losses = F.cross_entropy(in_float32(logits).flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """logits (b, vocab) -> tokens (b, 1). ValueError for logits that are not finite, and for settings out of range."""
    fits = temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
    given = f"temperature {temperature}, top_k {top_k}, top_p {top_p}"
    require(fits, f"{given}; allowed: temperature >= 0, top_k >= 1, 0 < top_p <= 1")
    best, likeliest = in_float32(logits).max(-1, keepdim=True)
    fits = best.isfinite().all()
    require(fits, "logits are not finite: training diverged; take an earlier checkpoint, or a lower rate")
    if temperature == 0:
        return likeliest
    logits = (in_float32(logits) - best) / max(temperature, 1e-30)  # the best is 0 at any temperature
    p, order = torch.softmax(logits, -1).sort(-1, descending=True)
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        p[p.cumsum(-1) - p >= top_p] = 0
    return order.gather(-1, torch.multinomial(p, 1))
