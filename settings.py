"""Every choice there is about a model, as settings that know their limits and say what is allowed.

    MemoryConfig      a sequence layer: `MemoryConfig.preset("titans")` is a row of choices, as every known layer is
    HopeConfig        a model: `HopeConfig.preset("tiny", arch="hope")`; sizes and architectures are rows as well
    setting           a field of a config: default, help and limits; train.py makes a flag of each
    check_settings    types, choices and limits of all fields; check_rules, what fields must have in common
    require           ValueError with a message unless something holds

hope.py says what a model does with them. train.py and evaluation.py make their own options of such fields.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

INF = float("inf")


# ---- Settings that know their limits ----


def require(holds: Any, message: str) -> None:
    """ValueError with this message unless it holds."""
    if not holds:
        raise ValueError(message)


def check_preset(kind: str, name: str, table: dict) -> None:
    require(name in table, f"no {kind} called {name!r}; choose one of: {', '.join(table)}")


LIMITS = {"least": ("at least", operator.ge), "above": ("above", operator.gt),
          "most": ("at most", operator.le), "below": ("below", operator.lt)}  # fmt: skip
KINDS = {int: Integral, float: Real}


def setting(default: Any, text: str, **limits: float) -> Any:
    """A config field; `text` is what `train.py --help` says of it. Its value, or each of a tuple, keeps to LIMITS."""
    return field(default=default, metadata={"help": text, "limits": limits})


def check_settings(config: Any) -> None:
    """ValueError for a field of another type than it is annotated with, none of its choices, or beyond its limits."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        hint, value, limits = hints[f.name], getattr(config, f.name), f.metadata.get("limits", {})
        given = f"{f.name} is {value!r}"
        if get_origin(hint) is Literal:
            require(value in get_args(hint), f"{given}; allowed: {', '.join(map(str, get_args(hint)))}")
            continue
        if get_origin(hint) is tuple:
            require(isinstance(value, tuple), f"{given}; give a tuple, such as {f.default}")
            hint = get_args(hint)[0]
        allowed = " and ".join(f"{LIMITS[name][0]} {limit}" for name, limit in limits.items())
        for one in value if isinstance(value, tuple) else (value,):
            require(isinstance(one, KINDS.get(hint, hint)), f"{given}; it must be of type {hint.__name__}")
            fits = all(LIMITS[name][1](one, limit) for name, limit in limits.items())
            require(fits, f"{given}; it must be {allowed}")


def check_rules(config: Any, *rules: tuple[Any, str]) -> None:
    """ValueError with the message of the first rule that does not hold; {name} in it stands for a field."""
    for holds, message in rules:
        require(holds, message.format_map(vars(config)))


# ---- Models ----


@dataclass(frozen=True)
class MemoryConfig:
    """What a memory is. Each known sequence layer is a row of choices here (`MemoryConfig.preset`)."""

    d_model: int = setting(128, "model width", least=1)
    n_head: int = setting(4, "heads; every head has memories of its own, d_model / n_head wide", least=1)
    depth: Literal[0, 1, 2] = setting(2, "0: softmax attention; 1: linear memory M x; 2: MLP x + W1 silu(W2 x), eq. 89")
    objective: Literal["dot", "l2"] = setting(
        "dot",
        "inner loss: dot is -<M k, v>, l2 is 1/2 |M k - v|^2; beside the delta term dot is the delta rule, which "
        "leaves a pair that is written again as it is, where l2 takes M k back twice: once by that term, once by its gradient",
    )
    rule: Literal["gd", "dgd"] = setting("dgd", "inner optimizer: gradient descent or delta gradient descent (eq. 88)")
    origin: Literal["start", "zero"] = setting(
        "start",
        "what decay and the delta term take an MLP memory's hidden layer back to: its start state, or 0; toward 0, the "
        "features silu(W2 k) by which a value is found again shrink with every token and every write",
    )
    hidden_rate: float = setting(
        0.1, "eta of an MLP memory's hidden layer, as a part of eta: what was written is read through it", least=0
    )
    spread: float = setting(
        1.0,
        "size of W2 k in the main memory at the start; far below 1, silu is linear, its output small, and a write "
        "hardly shows in a read; 0 for 1 / sqrt(head width), as in the other memories, which are to change little",
        least=0,
    )
    step: Literal["exact", "mean", "one"] = setting(
        "exact",
        "inner step: exact is beta eta / (1 + eta |x|^2), eta learnt (eq. 57); mean divides it by the chunk; one is 1",
    )
    beta: float = setting(
        1.0, "what an inner step tends to, times 1 / |x|^2; above 1 the delta rule may change signs", above=0, most=2
    )
    momentum: bool = setting(True, "momentum on the inner gradient, with a learnt gate theta")
    decay: Literal["gate", "fixed", "none"] = setting(
        "gate", "retention alpha: a learnt gate, a fixed number for every head (RetNet's), or none: all is kept"
    )
    decay_first: bool = setting(
        False,
        "the delta term erases what decay has left, alpha (M - eta' M x x^T); off: alpha M - eta' M x x^T (eq. 88)",
    )
    adaptive: tuple[str, ...] = setting(
        ("k", "v", "eta", "alpha"), "which of k, v, q, eta, alpha are read from memories that are written too"
    )
    own_input: bool = setting(
        True,
        "every adaptive memory has an input projection of its own; with one for all, k and v are alike at the start, "
        "and a key holds what its value does",
    )
    self_values: bool = setting(True, "every memory generates the value it is written with (eq. 84)")
    chunk: int = setting(64, "tokens between two refreshes of the main memory's gradients", least=1)
    chunk_proj: int = setting(64, "the same for the memories that produce k, v, q, eta, alpha", least=1)
    read: Literal["token", "after", "chunk"] = setting(
        "token", "y_t is read from the state before token t (eq. 86), after it, or at the chunk's start"
    )
    conv: int = setting(4, "width of the causal depthwise convolution in front; 0 for none", least=0)
    qk_norm: bool = setting(True, "l2-normalise keys and queries")
    value_norm: bool = setting(True, "l2-normalise self-generated values and rescale them by a learnt factor")
    memory_norm: bool = setting(False, "MLP memories with a layer norm inside: x + norm(W1 silu(W2 x))")
    expand: int = setting(1, "hidden width of an MLP memory, as a multiple of the head width", least=1)
    rotary: bool = setting(False, "rotary positions on keys and queries")
    project: bool = setting(
        True, "static projections into and out of the heads; off: the paper's literal form, one head"
    )
    remat: int = setting(16, "chunks between states kept for the backward pass; it recomputes others; 0: all", least=0)
    window: int = setting(0, "softmax attention only: how many tokens back it sees; 0 for all", least=0)
    n_kv_head: int = setting(0, "softmax attention only: heads of keys and values; 0 for n_head", least=0)
    bias: bool = setting(False, "softmax attention only: biases in its projections")
    y_norm: bool = setting(True, "normalise what a head reads before the projection out of the heads")
    rope_theta: float = setting(10000.0, "rotary positions: base of the frequencies", above=0, below=INF)

    LINEAR = dict(depth=1, momentum=False, decay="none", adaptive=(), self_values=False, read="after")
    DEEP = dict(
        objective="l2", rule="gd", step="mean", adaptive=(), self_values=False, chunk=16, chunk_proj=16,
        origin="zero", hidden_rate=1.0,
    )  # fmt: skip
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
        check_preset("memory preset", name, cls.PRESETS)
        return cls(**{**cls.PRESETS[name], **overrides})

    def __post_init__(self) -> None:
        check_settings(self)
        rotary, static = self.rotary or self.depth == 0, not {"k", "q"} & set(self.adaptive)
        check_rules(
            self,
            (self.d_model % self.n_head == 0, "d_model {d_model} is not a multiple of n_head {n_head}"),
            (set(self.adaptive) <= {"k", "v", "q", "eta", "alpha"},
             "adaptive is {adaptive}; allowed: k, v, q, eta, alpha"),
            (self.project or self.n_head == 1, "project=False has one head, but n_head is {n_head}; set n_head=1"),
            ("eta" not in self.adaptive or self.step != "one",
             "adaptive names eta, which a memory with step {step!r} does not have; leave it out of adaptive"),
            ("alpha" not in self.adaptive or self.decay == "gate",
             "adaptive names alpha, which a memory with decay {decay!r} does not have; leave it out of adaptive"),
             (self.n_head % (self.n_kv_head or 1) == 0,
              "n_kv_head is {n_kv_head}; give a divisor of n_head {n_head}, or 0 for n_head itself"),
             (self.depth == 0 or not (self.n_kv_head or self.bias),
             "n_kv_head and bias are for softmax attention, but depth is {depth}; set depth=0"),
            (self.depth == 2 or not (self.memory_norm or self.expand > 1),
             "memory_norm and expand are for MLP memories, but depth is {depth}; set depth=2"),
            (not rotary or self.d_model // self.n_head % 2 == 0,
             "rotary positions need an even head width, not {d_model} / {n_head}; change n_head or d_model"),
            (not self.rotary or static, "rotary positions are for static k and q; take them out of adaptive"),
        )  # fmt: skip

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_head


@dataclass(frozen=True)
class HopeConfig:
    """A language model: `n_layer` blocks of a memory and a continuum memory system (eqs. 94-97)."""

    vocab_size: int = setting(256, "number of tokens", least=1)
    n_layer: int = setting(2, "blocks", least=1)
    memory: MemoryConfig = MemoryConfig()
    pattern: tuple[str, ...] = setting(("memory",), "layers of the blocks in turn: memory, or attention over `window`")
    cms: tuple[float, ...] = setting(
        (64, 256, INF),
        "chunk size of each MLP of the CMS; hope and hope-attention from 340m on have 512,2048,inf, since short segments "
        "keep a GPU waiting; inf moves with the outer optimizer only, at every step; one longer than a training sequence "
        "moves its start state once per chunk, by the sum of its gradients", least=1,
    )  # fmt: skip
    cms_hidden: float = setting(
        2.0, "hidden width of these MLPs, times d_model; presets fit it to the size's parameters", above=0, below=INF
    )
    cms_rate: tuple[float, ...] = setting(
        (1.0,), "inner step per mean gradient of a chunk, one or one for each level; 0: no writes", least=0, below=INF
    )
    learn_rates: bool = setting(True, "whether these step sizes are learnt, up to twice the given ones")
    wiring: Literal["sequential", "nested", "independent"] = setting(
        "sequential", "a chain (eq. 73), one with start states learnt a level up (eq. 72), or side by side (eq. 74)"
    )
    mlp: Literal["silu", "swiglu", "gelu"] = setting("silu", "kind of MLP; gelu is its tanh form")
    mlp_bias: bool = setting(False, "biases in the MLPs; they are not written in context")
    norm: Literal["rms", "layer"] = setting("rms", "norm in front of every layer; layer is LayerNorm, with a bias")
    norm_eps: float = setting(1e-3, "what the norms add to the mean square", least=0, below=INF)
    n_position: int = setting(0, "learnt absolute positions, and so the longest stream; 0 for none", least=0)
    tied: bool = setting(False, "the output head is the embedding")
    inner_grad: Literal["first-order", "full"] = setting(
        "first-order", "whether the outer gradient sees through the inner one (full costs a second derivative)"
    )

    # Width, heads, depth, what a block weighs in units of d_model^2 (what its memory leaves goes to the MLPs), and the
    # CMS where the architecture has none of its own. A segment ends with every chunk of its fastest level; large models
    # are trained on devices that need long segments to be busy. Slow levels cost about half of what writing is worth: at
    # tiny size, equal tokens and streams of 4,096 bytes .2 bits per byte of .4. Chapter 19 weighs this against time.
    SIZES = {
        "tiny": dict(d_model=128, n_head=4, n_layer=2, weight=17.6),
        "60m": dict(d_model=512, n_head=8, n_layer=8, weight=12.97, vocab_size=32000),
        "170m": dict(d_model=768, n_head=12, n_layer=16, weight=12.8, vocab_size=32000),
        "340m": dict(d_model=1024, n_head=16, n_layer=24, weight=10.9, vocab_size=32000, cms=(512, 2048, INF)),
        "760m": dict(d_model=1536, n_head=24, n_layer=24, weight=11.7, vocab_size=32000, cms=(512, 2048, INF)),
        "1.3b": dict(d_model=2048, n_head=32, n_layer=24, weight=11.6, vocab_size=32000, cms=(512, 2048, INF)),
    }  # fmt: skip
    TRANSFORMER = dict(cms=(INF,), mlp="swiglu")
    ARCHS = {  # with the memory of the same name, unless another is named
        "hope": {},
        "hope-attention": dict(memory="attention"),
        "transformer++": dict(TRANSFORMER, memory="attention"),
        **dict.fromkeys(("titans", "dla", "ttt", "deltanet", "gated-deltanet"), TRANSFORMER),
        **dict.fromkeys(("linear-attention", "retnet"), TRANSFORMER),
        "samba": dict(TRANSFORMER, memory="gated-deltanet", pattern=("memory", "attention"), window=2048),
    }  # fmt: skip

    @classmethod
    def preset(cls, size: str = "tiny", arch: str = "hope", **overrides: Any) -> HopeConfig:
        """`arch` at `size`, with any field of HopeConfig or MemoryConfig overridden by its name."""
        check_preset("size", size, cls.SIZES)
        check_preset("architecture", arch, cls.ARCHS)
        settings = {"memory": arch, **cls.SIZES[size], **cls.ARCHS[arch], **overrides}
        memory, weight = settings.pop("memory"), settings.pop("weight")
        inner = {f.name: settings.pop(f.name) for f in fields(MemoryConfig) if f.name in settings}
        unknown = set(settings) - {f.name for f in fields(cls)}
        require(not unknown, f"unknown setting {sorted(unknown)}; see HopeConfig and MemoryConfig for the names")
        config = cls(memory=MemoryConfig.preset(memory, **inner), **settings)
        if "cms_hidden" in settings:
            return config
        from hope import make_layer  # here, since hope.py imports this file; only the layer itself knows its size

        with torch.device("meta"):
            used = sum(p.numel() for p in make_layer(config.memory).parameters())
        matrices, d = len(config.cms) * (3 if config.mlp == "swiglu" else 2), config.memory.d_model
        hidden, unit = (weight * d * d - used) / (matrices * d), 8 if d < 512 else 32
        return replace(config, cms_hidden=max(1, round(hidden / unit)) * unit / d)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> HopeConfig:
        """What `dataclasses.asdict` makes of a config, after JSON: lists for tuples, "inf" for infinity."""
        tuples = lambda given: {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        settings = tuples(stored)
        for name in ("cms", "cms_rate"):
            settings[name] = tuple(map(float, settings[name]))
        return cls(**{**settings, "memory": MemoryConfig(**tuples(stored["memory"]))})

    def __post_init__(self) -> None:
        check_settings(self)
        whole = all(c == INF or c == int(c) for c in self.cms)
        finite = [c for c in self.cms if c != INF]
        check_rules(
            self,
            (self.cms, "cms is empty; give at least one chunk size, inf for a plain MLP"),
            (whole, "cms is {cms}; chunk sizes are whole numbers from 1, or inf"),
            (round(self.cms_hidden * self.memory.d_model) >= 1,
             f"cms_hidden is {{cms_hidden}}, no whole unit; give at least 1 / d_model = {1 / self.memory.d_model}"),
            (len(self.cms_rate) in (1, len(finite)),
             f"cms_rate is {{cms_rate}}; give one step size, or one for each of {len(finite)} in-context levels"),
            (self.wiring != "nested" or list(self.cms) == sorted(self.cms),
             "cms is {cms}; nested levels go from fast to slow, so sort the chunk sizes"),
            (self.pattern and set(self.pattern) <= {"memory", "attention"},
             "pattern is {pattern}; it lists one or more of: memory, attention"),
        )  # fmt: skip

    @property
    def rates(self) -> list[float]:
        """Inner step size of every level of the CMS; 0 for one that is not written in context."""
        finite = sum(c != INF for c in self.cms)
        given = iter(self.cms_rate * finite if len(self.cms_rate) == 1 else self.cms_rate)
        return [0.0 if c == INF else next(given) for c in self.cms]

    @property
    def written(self) -> list[int]:
        """Places in `cms` of the levels that are written in context."""
        return [i for i, rate in enumerate(self.rates) if rate > 0]

    @property
    def clocks(self) -> list[int]:
        """Their chunk sizes."""
        return [int(self.cms[i]) for i in self.written]

    def layer(self, i: int) -> MemoryConfig:
        """The sequence layer of block i."""
        m = self.memory
        if self.pattern[i % len(self.pattern)] == "memory":
            return m
        return MemoryConfig.preset("attention", d_model=m.d_model, n_head=m.n_head, conv=m.conv, window=m.window)
