"""Who learns what, from what, and how often (Definition 2): the view of a model as memories with clocks of their own.

    levels           every component of a model and of its optimizers, from fastest to slowest
    Levels, Level    what it returns: a list of rows that prints as a table and draws as a timeline
    param_groups     what is given to which outer optimizer (torch's or one of optim.py)
    slow_groups      blocks of the CMS whose start states move more slowly than that, for `optim.Accumulate`

They are found as `hope.levels` and so on. The components are in hope.py, the optimizers in optim.py, known here by the
names of their classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hope import INF, Attention, Hope, Memory
from settings import require


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
    """Blocks of the CMS whose chunk C is longer than a training sequence, as parameter groups with a `period` in steps.

    The sequences of a batch are streams side by side, each seq_len tokens longer after every step, so C tokens take
    C / seq_len steps, rounded up. `optim.Accumulate` makes the blocks' start states move once in so many.
    """
    groups = []
    for i, chunk in enumerate(model.config.cms):
        if seq_len < chunk < INF:
            params = [p for block in model.blocks for p in block.cms.levels[i].parameters()]
            groups.append({"params": params, "period": math.ceil(chunk / seq_len), "chunk": int(chunk)})
    return groups


@dataclass(frozen=True)
class Level:
    """One component of a model or optimizer, seen as an associative memory with a frequency of its own."""

    component: str
    period: float | None  # tokens between two updates, 0 for "solved anew at every token", None for the outer step
    context: str
    objective: str
    rule: str
    size: int  # numbers that move: per sequence for states, in all for parameters
    steps: int = 1  # outer steps between two updates, where period is None
    rank: int = 0  # of components that move equally often: one whose next state needs the other's comes after it
    level: int = 0  # 1 is the fastest; `levels` counts

    @property
    def order(self) -> tuple[float, int, int]:
        """Grows from fast to slow (Definition 2)."""
        return INF if self.period is None else self.period, self.steps, self.rank

    @property
    def every(self) -> str:
        if self.period is None:
            return "outer step" if self.steps == 1 else f"{self.steps} outer steps"
        return f"{self.period:g} tokens" if self.period > 1 else "token"


class Levels(list[Level]):
    """Levels from fastest to slowest; prints as a table, in which (88) is an equation of the paper."""

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


# What an optimizer keeps for its parameters, as memories of the gradient: name of the buffer -> objective, rule. A rule
# may name the optimizer's settings. By the name of its class: this file and optim.py need not know each other.
BUFFERS = {
    "AdamW": {"first moment": ("-<m, g>", "EMA (33)"), "second moment": ("-<v, g^2>", "EMA")},
    "Muon": {"momentum": ("-<m, g>", "EMA (42)")},
    "SGD": {},
    "Accumulate": {"sum": ("-<m, g>", "GD, emptied once moved by")},
    "DGD": {},
    "DeltaMomentum": {"momentum": ("1/2 |m g^T + I|^2", "delta rule (49)")},
    "PreconditionedMomentum": {
        "momentum": ("-<m, P(g)>", "GD, decay (47)"),
        "preconditioner": ("mean of g^2 or g g^T", "EMA, {preconditioner}"),
    },
    "DeepMomentum": {"MLP": ("1/2 |m(g) + g|^2", "GD, decay (50)")},
    "M3": {
        "fast momentum": ("-<m, g>", "EMA (Alg. 1)"),
        "second moment": ("-<v, g^2>", "EMA"),
        "slow momentum": ("-<m, g>", "EMA (75)"),
    },
}


def buffer_size(optimizer: torch.optim.Optimizer, buffer: str) -> int:
    """Numbers in one of the BUFFERS of an optimizer."""
    size = 0
    for group in optimizer.param_groups:
        shapes = [(len(p), math.prod(p.shape[1:])) for p in group["params"] if p.ndim > 1]  # as matrices
        if buffer == "MLP":  # one for every shape
            widths = [min(shape) for shape in set(shapes)]
            size += sum(2 * d * max(1, round(group["hidden"] * d)) for d in widths)
        elif buffer != "preconditioner" or group["preconditioner"] == "diagonal":
            size += sum(p.numel() for p in group["params"])
        elif group["preconditioner"] == "kronecker":
            size += sum(m * m + n * n for m, n in shapes)
    return size


def levels(model: Hope, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = ()) -> Levels:
    """Every component of `model` and of the optimizers that train it, ordered by update frequency (Definition 2).

    A component is faster than another if it moves more often, or as often and the other's next state needs its own.
    Raises ValueError for another kind of model, and for an optimizer whose memories are not known here.
    """
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    require(isinstance(model, Hope), f"levels are those of a hope.Hope, not of a {type(model).__name__}")
    for one in optimizers:
        kind = type(one).__name__
        require(kind in BUFFERS, f"levels knows nothing of the optimizer {kind}; allowed: {', '.join(BUFFERS)}")
    found = model_levels(model) + optimizer_levels(optimizers) + parameter_levels(model, optimizers)
    found.sort(key=lambda row: row.order)
    orders = sorted({row.order for row in found})
    return Levels(replace(row, level=orders.index(row.order) + 1) for row in found)


def model_levels(model: Hope) -> list[Level]:
    """What is written in context: the sequence layers and the CMS."""
    c, m, layers, found = model.config, model.config.memory, [block.memory for block in model.blocks], []
    attention = [layer for layer in layers if isinstance(layer, Attention)]
    memories = [layer for layer in layers if isinstance(layer, Memory)]
    if attention:
        window = attention[0].config.window
        seen = f"last {window} tokens" if window else "all so far"
        found.append(Level("softmax attention", 0, seen, "regression", "exact (62)", 0))
    loss = "1/2 |M k - v|^2" if m.objective == "l2" else "-<M k, v>"
    rule = "DGD (88)" if m.rule == "dgd" else "GD (17)"
    pairs = "k, own v" if m.self_values else "k, v"
    for part in reversed(memories[0].parts) if memories else ():
        size = len(memories) * sum(w.numel() for w in memories[0].start_weights(part))
        short = "memory M" if part == "main" else ",".join(memories[0].adaptive)
        period = m.chunk_proj if part == "proj" else m.chunk if m.read == "chunk" else 1
        if m.momentum:
            found.append(Level(f"{short}: momentum", period, "gradients", "-<m, g>", "EMA", size))
        found.append(Level("memories " * (part == "proj") + short, period, pairs, loss, rule, size, rank=1))
    for i in c.written:
        size = c.n_layer * sum(w.numel() for w in model.blocks[0].cms.levels[i].matrices)
        name = f"CMS, C = {c.cms[i]:g}"
        found.append(Level(name, c.cms[i], "stream", "next token", "GD (71)", size, rank=2))
    return found


def optimizer_levels(optimizers: Sequence[torch.optim.Optimizer]) -> list[Level]:
    """What optimizers keep."""
    found = []
    for optimizer in optimizers:
        kind, settings = type(optimizer).__name__, optimizer.param_groups[0]
        for buffer, (objective, rule) in BUFFERS[kind].items():
            size, steps = buffer_size(optimizer, buffer), settings["every"] if buffer == "slow momentum" else 1
            if size:
                name, rule = f"{kind}: {buffer}", rule.format(**settings)
                found.append(Level(name, None, "gradients", objective, rule, size, steps))
    return found


def parameter_levels(model: Hope, optimizers: Sequence[torch.optim.Optimizer]) -> list[Level]:
    """What optimizers move: parameters that `optim.Accumulate` holds back, and the others."""
    movers = [type(o).__name__ for o in optimizers if type(o).__name__ != "Accumulate"]
    rule, found = ", ".join(movers) or "no optimizer given", []
    rest = sum(p.numel() for p in model.parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups if type(optimizer).__name__ == "Accumulate" else ():
            name = f"CMS, C = {group['chunk']}: start state" if "chunk" in group else "slow parameters"
            size, period = sum(p.numel() for p in group["params"]), group["period"]
            found.append(Level(name, None, "text", "next token", rule, size, period, rank=3))
            rest -= size
    name = "parameters, start states"
    return [*found, Level(name, None, "text", "next token", rule, rest, rank=3)]
