"""What a run takes of memory and time, found out without running it: `python train.py --plan`.

In this file, in this order:

    Device             what a device can do: launches, bytes and operations a second
    Meter, rehearse    counts them, and the memory, in a micro-batch of tensors that have shapes but no numbers
    forecast           the same of a large model, from thinner and shorter ones
    print_plan         the tables: memory by part; time, and what it goes to
"""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import hope
from data import UserError, asked_size, explained, make_tokenizer, prepare, task_of
from hope import Hope, HopeConfig

if TYPE_CHECKING:  # for annotations: the settings of a run, and of the question
    from train import Command, TrainConfig

# Numbers that an optimizer keeps for each of a matrix. Deep momentum shares memories between layers: that of one layer.
KEPT = {"muon": 1.0, "adamw": 2.0, "m3": 5.0, "dgd": 0.0, "delta-momentum": 1.0, "deep-momentum": 0.533}


@dataclass(frozen=True)
class Device:
    """What `--plan` must know of a device, in seconds, bytes a second and arithmetic operations a second."""

    name: str
    launch: float  # from one operation to the next, as the processor gives them to the device
    least: float  # of any operation, once it is given
    bandwidth: float
    float32: float
    bfloat16: float
    measured: bool = True

    @staticmethod
    def known() -> Device:
        """The one that was measured, as tests/bench/gpu.json has it; else an H100, by what others report of it."""
        path = Path(__file__).with_name("tests") / "bench" / "gpu.json"
        if not path.exists():
            return Device("H100", 6.5e-6, 2e-6, 2.8e12, 45e12, 400e12, measured=False)
        with explained(f"{path} cannot be used", "measure anew, or delete it"):
            return Device(**json.loads(path.read_text())["device"])

    def seconds(self, moved: float, float32: float, bfloat16: float) -> float:
        """The time that an operation takes at least: of its bytes and its arithmetic the larger, and not below `least`."""
        return max(self.least, moved / self.bandwidth, float32 / self.float32 + bfloat16 / self.bfloat16)


class Cost(NamedTuple):
    """What a micro-batch takes, see `rehearse`."""

    peak: float  # bytes beyond the weights, gradients included
    state: float  # bytes of the states at the end
    launches: float  # operations that are no views
    moved: float  # bytes that they read and write
    float32: float  # arithmetic, a multiply and an add as two: of matrix products and attention, what is recomputed
    bfloat16: float  # as often as it is computed
    busy: float  # seconds of the device, if it need not wait: the sum of `Device.seconds`


def numel_bytes(values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))


class Meter(TorchDispatchMode):
    """Counts what `Cost` holds, and the bytes of all tensors that operations make while they live.

    torch's FlopCounterMode has hooks that stop `autograd.grad` to leaves, which the CMS needs; its table of operations serves.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.now, self.peak, self.launches, self.moved, self.busy = device, 0, 0, 0, 0, 0.0
        self.arithmetic = {"float32": 0, "bfloat16": 0}
        self.live: set[int] = set()

    def add_operation(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        flops, moved = 0, numel_bytes((args, kwargs, out))
        if count := flop_registry.get(func.overloadpacket):
            flops = count(*args, **kwargs, out_val=out)
        elif "attention_for_cpu" in func.name():  # which the table lacks
            q, k = (args[i + ("backward" in func.name())] for i in (0, 1))
            flops = (10 if "backward" in func.name() else 4) * q.numel() * k.shape[-2]
        low = flops and next(t for t in tree_leaves(out) if isinstance(t, Tensor)).dtype.itemsize == 2
        self.arithmetic["bfloat16" if low else "float32"] += flops
        self.launches, self.moved = self.launches + 1, self.moved + moved
        self.busy += self.device.seconds(moved, 0 if low else flops, flops if low else 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        free = (
            func.namespace == "prim" or func.is_view or any(name in func.name() for name in ("empty", "_unsafe_view"))
        )
        if not free:
            self.add_operation(func, args, kwargs or {}, out)
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if id(storage) not in self.live:
                weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
                self.live.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def gone(self, storage: int, size: int) -> None:
        self.live.remove(storage)
        self.now -= size


def rehearse(model_config: HopeConfig, config: TrainConfig, rows: int, t: int, dtype: torch.dtype) -> Cost:
    """One micro-batch of (rows, t) tokens, forward and backward, with tensors that have shapes but no numbers.

    Of the memories' chunks it is the plain form that is counted.
    """
    with FakeTensorMode():
        model = Hope(model_config)
        model.recompute = config.recompute
        tokens = torch.zeros(rows, t, dtype=torch.long)
        with Meter(Device.known()) as meter:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                how = dict(backward=config.truncate, truncate=config.truncate)
                losses, state = model.observe(tokens, tokens, reduction="none", **how)
            if not config.truncate:
                losses.sum().backward()
        size = []
        hope.map_state(lambda z: size.append(z.numel() * z.element_size()) or z, state)
    return Cost(meter.peak, sum(size), meter.launches, meter.moved, **meter.arithmetic, busy=meter.busy)


def forecast(model_config: HopeConfig, config: TrainConfig, rows: int, dtype: torch.dtype) -> Cost:
    """`rehearse` for the whole model and sequence; where that is much work, extended from shorter and thinner ones.

    All its numbers are polynomials of the layers and of the rounds of the CMS (a round is the slowest level's chunk):
    linear in both, with attention quadratic in rounds. In a layer's first round less is kept than in any later one.
    """
    c, t = model_config, config.seq_len
    unit, whole_round = min(c.clocks, default=t), max(c.clocks, default=t)
    period, rounds = len(c.pattern), t / whole_round

    def count(periods: int, n: float) -> Cost:
        layers, length = periods * period, round(n * whole_round)
        print(f"counting a step of {layers} layers and {length} tokens without numbers ...", file=sys.stderr)
        return rehearse(replace(c, n_layer=layers), config, rows, length, dtype)

    if t / unit * c.n_layer <= 16:
        return rehearse(c, config, rows, t, dtype)
    terms, points = lambda p, n: [1, p], [(1, rounds), (2, rounds)]
    if rounds > 4 and all(c.layer(i).depth for i in range(period)):
        terms = lambda p, n: [1, p, n, p * n, p * (n == 1)]
        points = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    elif rounds > 4:  # attention
        terms = lambda p, n: [1, p, n, p * n, n * n, p * n * n]
        points = [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4)]
    as_rows = lambda points: torch.tensor([terms(*point) for point in points], dtype=torch.float64)
    counted = torch.tensor([count(*point) for point in points], dtype=torch.float64)
    return Cost(*(as_rows([(c.n_layer / period, rounds)]) @ torch.linalg.solve(as_rows(points), counted))[0].tolist())


def foreseen_vocabulary(config: TrainConfig) -> int:
    """How many kinds of tokens a run will have; of those that train:N will learn, the most."""
    if task := task_of(config.data):
        return task.vocab_size
    name, folder = config.tokenizer_name, Path(config.data)
    if (folder / "manifest.json").is_file():
        return prepare(config)[2].vocab_size
    return asked_size(name) if name.startswith("train:") else make_tokenizer(name, tuple).vocab_size


def print_plan(config: TrainConfig, model_config: HopeConfig, command: Command) -> None:
    """Print what a run takes: memory of a GPU by part, operations, days. Allocates no model."""
    gpus, device = command.gpus, Device.known()
    on = f"{gpus} GPU{'s' * (gpus > 1)}"
    if config.batch_size % gpus or gpus % config.nodes:
        raise UserError(
            f"{on} on {config.nodes} nodes cannot share {config.batch_size} sequences a step evenly; "
            "change --gpus, --nodes or --batch-size"
        )
    if not config.init_from:
        model_config = replace(model_config, vocab_size=foreseen_vocabulary(config))
    with torch.device("meta"):
        model = Hope(model_config)
    size = sum(p.numel() for p in model.parameters())
    matrix = sum(p.numel() for p in hope.param_groups(model)["matrix"])
    dtype = torch.float32 if config.precision == "float32" else torch.bfloat16
    share = config.batch_size // gpus
    rows = min(share, config.micro_batch or share)
    cost = forecast(model_config, config, rows, dtype)
    peak, state = cost.peak, cost.state
    slow = sum(p.numel() for group in hope.slow_groups(model, config.seq_len) for p in group["params"])
    kept = KEPT[config.optimizer] * matrix + KEPT["adamw"] * (size - matrix) + slow + bool(config.ema) * size
    optimizer, per_node, low = 4 * kept, gpus // config.nodes, dtype.itemsize
    print(
        f"{config.arch}, size {config.size}: {size:,} parameters, of which {model.embed.weight.numel():,} embed tokens"
    )
    print(f"a step: {config.batch_size} sequences of {config.seq_len} tokens on {on}, {rows} of a GPU's {share} at once, {dtype}\n")  # fmt: skip
    table = {"ddp": (4 * size, 4 * size, optimizer)}
    if gpus > 1:
        whole = low * matrix + 4 * (size - matrix)  # gathered for the step
        table["fsdp"] = (4 * size / per_node + whole, 4 * size * (1 + 1 / per_node), optimizer / per_node)
    heads = ("GB per GPU", "parameters", "gradients", "optimizer", "states", "activations", "peak")
    print("{:<12}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}".format(*heads))
    for name, (weights, gradients, buffers) in table.items():
        # Gradients come as activations go, so the rehearsed peak is less than their sum; from the second micro-batch on,
        # all gradients are there from the start.
        most = max(peak, gradients) if share <= rows else gradients + max(0.0, peak - 4 * size) + state
        parts = (weights, gradients, buffers, state, max(0.0, peak - state - 4 * size), weights + buffers + most)
        print(f"{name:<12}" + "".join(f"{x / 1e9:>12.3f}" for x in parts))
    step = config.batch_size * config.seq_len
    tokens, flops = command.tokens or config.steps * step, (cost.float32 + cost.bfloat16) / (rows * config.seq_len)
    print(f"\n{flops:.3g} operations a token, {flops / 6 / size:.2f} x 6 per parameter; {tokens:.3g} tokens are {tokens / step:,.0f} steps")  # fmt: skip
    print_time(cost, device, rows * config.seq_len, gpus, tokens)


def print_time(cost: Cost, device: Device, micro_batch: int, gpus: int, tokens: float) -> None:
    """How long a micro-batch of so many tokens takes, what takes longest in it, and the days that `tokens` take.

    While the device works, the processor gives it what comes next, so that the longer of the two counts. Optimizers
    and what processes exchange once a step are left out.
    """
    arithmetic = cost.float32 / device.float32 + cost.bfloat16 / device.bfloat16
    terms = {
        "launches": (cost.launches * device.launch, f"{cost.launches:,.0f} of {1e6 * device.launch:.3g} us"),
        "bytes": (cost.moved / device.bandwidth, f"{cost.moved:.3g} at {device.bandwidth:.3g} a second"),
        "arithmetic": (arithmetic, f"{cost.float32:.3g} in float32 at {device.float32:.3g} a second, "
                                   f"{cost.bfloat16:.3g} in bfloat16 at {device.bfloat16:.3g}"),
    }  # fmt: skip
    seconds = max(cost.launches * device.launch, cost.busy)
    work = max(("bytes", "arithmetic"), key=lambda name: terms[name][0])
    binding = work if cost.busy > terms["launches"][0] else "launches"
    known = "measured" if device.measured else "assumed; tests/bench/gpu.json may hold what was measured"
    print(f"\na micro-batch of {micro_batch:,} tokens on a {device.name} ({known})")
    for name, (term, how) in terms.items():
        print(f"  {name:<12}{term:>9.3g} s  {how}{'  <- what takes longest' if name == binding else ''}")
    print(f"  {'work':<12}{cost.busy:>9.3g} s  operation by operation, each the larger of bytes and arithmetic, at least {1e6 * device.least:.3g} us")  # fmt: skip
    speed, used = gpus * micro_batch / seconds, (cost.float32 + cost.bfloat16) / seconds / device.bfloat16
    print(f"{gpus} x {device.name}: {speed:,.0f} tokens/s, {used:.1%} of the rate in bfloat16, {tokens / speed / 86400:.3g} days")  # fmt: skip
