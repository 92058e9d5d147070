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
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import fused
import graphs
import hope
from backend import foreseen_on_gpu
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
    layers: float = 0.0  # of `fused.memory_layer`, whose products wait for each other; 0: not measured, as float32
    view: float = 0.0  # of an operation that only looks at a tensor in another way, which the processor makes alone
    matrix: float = 0.0  # of every matrix of a batch of products, beyond its arithmetic
    cached: float = 0.0  # bytes a second of operations that move less than `cache` bytes; 0: as any other
    cache: float = 0.0
    alone: bool = False  # the device gives itself the operations, as a CPU does, and cannot work meanwhile
    measured: bool = True

    @staticmethod
    def known() -> Device:
        """The one that was measured, as tests/bench/gpu.json has it; else an H100, by what others report of it."""
        path = Path(__file__).with_name("tests") / "bench" / "gpu.json"
        if not path.exists():
            return Device("H100", 6.5e-6, 2e-6, 2.8e12, 45e12, 400e12, measured=False)
        with explained(f"{path} cannot be used", "measure anew, or delete it"):
            return Device(**json.loads(path.read_text())["device"])


class Cost(NamedTuple):
    """What a micro-batch, a part of a model in it, or an optimizer's step takes, see `rehearse`."""

    peak: float = 0.0  # bytes beyond the weights, gradients included, when those of all parts are most
    state: float = 0.0  # bytes of the states at the end
    launches: float = 0.0  # operations that are no views
    views: float = 0.0
    moved: float = 0.0  # bytes that operations read and write
    float32: float = 0.0  # arithmetic, a multiply and an add as two: of matrix products and attention, what is
    bfloat16: float = 0.0  # recomputed as often as it is computed;
    layers: float = 0.0  # of `fused.memory_layer`
    by_bytes: float = 0.0  # seconds of the device for operations that are as long as their bytes take, by
    by_arithmetic: float = 0.0  # their arithmetic,
    by_least: float = 0.0  # and by neither: for these `Device.least`

    def given(self, device: Device) -> float:
        """Seconds that it takes to give the device all its operations."""
        return self.launches * device.launch + self.views * device.view

    def work(self) -> float:
        """Seconds of the device, if it need not wait."""
        return self.by_bytes + self.by_arithmetic + self.by_least

    def seconds(self, device: Device) -> float:
        """While a device works, the processor gives it what comes next, so that the longer of the two counts."""
        both = (self.given(device), self.work())
        return sum(both) if device.alone else max(both)


def total(parts: Iterable[Cost]) -> Cost:
    return Cost(*map(sum, zip(*parts)))


def numel_bytes(values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))


class Meter(TorchDispatchMode):
    """Counts what `Cost` holds for every part of a model, and the bytes of tensors while they live.

    torch's FlopCounterMode has hooks that stop `autograd.grad` to leaves, which the CMS needs; its table of operations
    serves. An operation of a backward pass is of the part whose forward pass made the node that runs; autograd numbers
    its nodes.
    """

    PARTS = ("memories", "CMS", "CMS writes", "norms and sums", "the rest")  # the first four are those of the layers

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.sums = device, {part: dict.fromkeys(Cost._fields, 0) for part in self.PARTS}
        self.live, self.most = dict.fromkeys(self.PARTS, 0), 0
        self.made: dict[int, str] = {}  # the part of every living storage
        self.stack, self.last, self.owner = ["the rest"], "the rest", {}
        self.numbers, self.of = [0], ["the rest"]  # from which node on what part makes them

    @property
    def parts(self) -> dict[str, Cost]:
        return {part: Cost(**sums) for part, sums in self.sums.items()}

    def watch(self, model: Hope) -> None:
        """Tell the parts of this model apart."""
        for block in model.blocks:
            memory, cms = block.memory, block.cms
            methods = {
                "norms and sums": (block, "forward"),
                "CMS": (cms, "forward init_state"),
                "CMS writes": (cms, "write"),
            }
            for part, (module, names) in (methods | {"memories": (memory, "forward init_state restart_graph")}).items():
                for name in names.split():
                    setattr(module, name, partial(self.run, part, getattr(module, name)))
            self.owner |= {id(p): "memories" for p in memory.parameters()} | {id(p): "CMS" for p in cms.parameters()}
            self.owner |= {id(p): "norms and sums" for p in block.parameters() if id(p) not in self.owner}
        self.owner = {id(p): "the rest" for p in model.parameters()} | self.owner

    def run(self, part: str, method: Callable, *args: Any, **how: Any) -> Any:
        self.enter(part)
        try:
            return method(*args, **how)
        finally:
            self.stack.pop()
            self.enter(self.stack.pop())

    def enter(self, part: str) -> None:
        self.stack.append(part)
        self.numbers.append(torch._C._autograd._get_sequence_nr())
        self.of.append(part)

    def part(self) -> str:
        """To which part what is computed now belongs."""
        if len(self.stack) > 1 or torch._C._current_graph_task_id() < 0:
            return self.stack[-1]
        if node := torch._C._current_autograd_node():  # else a sum of gradients, which the node before has led to
            if getattr(node, "variable", None) is not None:  # a leaf, into which gradients go
                self.last = self.owner.get(id(node.variable), "CMS writes")
            else:
                self.last = self.of[bisect_right(self.numbers, node._sequence_nr()) - 1]
        return self.last

    def add_operation(self, sums: dict[str, float], func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        flops, device, layer = 0, self.device, fused.traffic(func.overloadpacket, args, out)
        moved = layer or numel_bytes((args, kwargs, out))
        if count := flop_registry.get(func.overloadpacket):
            flops = count(*args, **kwargs, out_val=out)
        elif "attention_for_cpu" in func.name():  # which the table lacks
            q, k = (args[i + ("backward" in func.name())] for i in (0, 1))
            flops = (10 if "backward" in func.name() else 4) * q.numel() * k.shape[-2]
        elif func.overloadpacket is torch.ops.aten.linalg_solve_triangular:  # nor these
            flops = args[1].numel() * args[0].shape[-1]
        low = flops and next(t for t in tree_leaves(out) if isinstance(t, Tensor)).dtype.itemsize == 2
        kind = "layers" if layer else "bfloat16" if low else "float32"
        sums[kind] += flops
        sums["launches"], sums["moved"] = sums["launches"] + 1, sums["moved"] + moved
        batch = args[0].shape[0] if func.overloadpacket is torch.ops.aten.bmm else 0
        rate = device.cached if moved < device.cache else device.bandwidth
        times = {"by_bytes": moved / rate, "by_least": device.least}
        times["by_arithmetic"] = flops / (getattr(device, kind) or device.float32) + batch * device.matrix
        longest = max(times, key=times.get)
        sums[longest] += times[longest]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for by every backward pass
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:  # there are no numbers
            return 1.0
        out, part = func(*args, **(kwargs or {})), self.part()
        if func.is_view or func.overloadpacket is torch.ops.aten._unsafe_view:
            self.sums[part]["views"] += 1
        elif func.namespace != "prim" and "empty" not in func.name():
            self.add_operation(self.sums[part], func, args, kwargs or {}, out)
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if id(storage) not in self.made:
                weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
                self.made[id(storage)] = part
                self.live[part] += storage.nbytes()
                if (now := sum(self.live.values())) > self.most:
                    self.most = now
                    for one in self.PARTS:
                        self.sums[one]["peak"] = self.live[one]
        return out

    def gone(self, storage: int, size: int) -> None:
        self.live[self.made.pop(storage)] -= size


def rehearse(model_config: HopeConfig, config: TrainConfig, rows: int, t: int, dtype: torch.dtype) -> dict[str, Cost]:
    """One micro-batch of (rows, t) tokens, forward and backward, by parts: tensors have shapes but no numbers.

    For a GPU whole chunks are counted as `fused.memory_layer` runs them, an operation for a layer, unless HOPE_KERNELS is
    "reference"; for `Device.alone`, and where that does not fit, the plain form, operation by operation.
    """
    device = Device.known()
    with FakeTensorMode(), nullcontext() if device.alone else foreseen_on_gpu():
        model = Hope(model_config)
        model.recompute = config.recompute
        tokens = torch.zeros(rows, t, dtype=torch.long)
        with Meter(device) as meter:
            meter.watch(model)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                how = dict(backward=config.truncate, truncate=config.truncate)
                losses, state = model.observe(tokens, tokens, reduction="none", **how)
            if not config.truncate:
                losses.sum().backward()
        for part, of_part in (("memories", state.memories), ("CMS", state.cms)):
            hope.map_state(
                lambda z: meter.sums[part].update(state=meter.sums[part]["state"] + numel_bytes(z)) or z, of_part
            )
    return meter.parts


def forecast(model_config: HopeConfig, config: TrainConfig, rows: int, dtype: torch.dtype) -> dict[str, Cost]:
    """`rehearse` for the whole model and sequence; where that is much work, extended from shorter and thinner ones.

    All numbers of the layers are polynomials of how many they are and of the rounds of the CMS (a round is the slowest
    level's chunk): linear in both, for attention quadratic in rounds. In its first round a layer keeps less than later.
    Those of the rest are linear in both.
    """
    c, t = model_config, config.seq_len
    unit, whole_round = min(c.clocks, default=t), max(c.clocks, default=t)
    period, rounds = len(c.pattern), t / whole_round
    if t / unit * c.n_layer <= 16:
        return rehearse(c, config, rows, t, dtype)
    points, bends = [(1, rounds), (2, rounds)], None
    if rounds > 4 and all(c.layer(i).depth for i in range(period)):
        points, bends = [(1, 1), (1, 2), (1, 3), (2, 1)], lambda n: n == 1
    elif rounds > 4:  # attention
        points, bends = [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3)], lambda n: n * n
    counted = []
    for p, n in points:
        layers, tokens = p * period, round(n * whole_round)
        print(f"counting a step of {layers} layers and {tokens} tokens without numbers ...", file=sys.stderr)
        counted.append(rehearse(replace(c, n_layer=layers), config, rows, tokens, dtype))

    def extended(numbers: list[float], terms: Callable[[float, float], list[float]]) -> float:
        as_rows = lambda points: torch.tensor([terms(*point) for point in points], dtype=torch.float64)
        weights = torch.linalg.lstsq(as_rows(points), torch.tensor(numbers, dtype=torch.float64)[:, None]).solution
        return (as_rows([(c.n_layer / period, rounds)]) @ weights).item()

    def terms_of(part: str, number: str) -> Callable[[float, float], list[float]]:
        if bends is None:
            return lambda p, n: [1, p]
        if part == "the rest":
            return lambda p, n: [1, n, p]
        # What is computed once a round, not for every layer: gradients for the CMS do not reach below the first one.
        # What is kept once: what the layer keeps for a moment that is at work when most is kept.
        if number == "peak":
            return lambda p, n: [1, p, p * n, p * bends(n)]
        return lambda p, n: [n, p, p * n, p * bends(n)] + [n * n] * (len(points) > 4)

    whole = {}
    for part in Meter.PARTS:
        numbers = zip(Cost._fields, zip(*(one[part] for one in counted)))
        whole[part] = Cost(*(extended(found, terms_of(part, number)) for number, found in numbers))
    return whole


def step_cost(model_config: HopeConfig, config: TrainConfig, make_optimizers: Callable) -> Cost:
    """What clipping the gradients and the optimizers' step take, extended from two thin models."""

    device = Device.known()

    def count(periods: int) -> Cost:
        with FakeTensorMode():
            model = Hope(replace(model_config, n_layer=periods * len(model_config.pattern)))
            optimizers = make_optimizers(model, config)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            if config.optimizer == "dgd":  # which takes in what the layers are given
                tokens = torch.zeros(1, 2, dtype=torch.long)
                model.observe(tokens, tokens, backward=True)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups if "foreach" in group):
                group["foreach"] = not device.alone  # on GPUs torch's optimizers take all weights at once
            for _ in range(2):  # the first one makes the state
                with Meter(device) as meter:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
                    for optimizer in optimizers:
                        optimizer.step()
        return meter.parts["the rest"]

    one, two = torch.tensor([count(1), count(2)], dtype=torch.float64)
    return Cost(*(one + (model_config.n_layer / len(model_config.pattern) - 1) * (two - one)).tolist())


def foreseen_vocabulary(config: TrainConfig) -> int:
    """How many kinds of tokens a run will have; of those that train:N will learn, the most."""
    if task := task_of(config.data):
        return task.vocab_size
    name, folder = config.tokenizer_name, Path(config.data)
    if (folder / "manifest.json").is_file():
        return prepare(config)[2].vocab_size
    return asked_size(name) if name.startswith("train:") else make_tokenizer(name, tuple).vocab_size


def print_plan(config: TrainConfig, model_config: HopeConfig, command: Command, make_optimizers: Callable) -> None:
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
    cost = total(forecast(model_config, config, rows, dtype).values())
    peak, state = cost.peak, cost.state
    slow = sum(p.numel() for group in hope.slow_groups(model, config.seq_len) for p in group["params"])
    kept = KEPT[config.optimizer] * matrix + KEPT["adamw"] * (size - matrix) + slow + bool(config.ema) * size
    optimizer, per_node, low = 4 * kept, gpus // config.nodes, dtype.itemsize
    print(
        f"{config.arch}, size {config.size}: {size:,} parameters, of which {model.embed.weight.numel():,} embed tokens"
    )
    at_once = f"{rows} of a GPU's {share} at once, {dtype}"
    print(f"a step: {config.batch_size} sequences of {config.seq_len} tokens on {on}, {at_once}\n")
    table = {"ddp": (4 * size, 4 * size, optimizer)}
    if gpus > 1:
        whole = low * matrix + 4 * (size - matrix)  # gathered for the step
        table["fsdp"] = (4 * size / per_node + whole, 4 * size * (1 + 1 / per_node), optimizer / per_node)
    heads = ("GB per GPU", "parameters", "gradients", "optimizer", "states", "activations", "peak")
    print("{:<12}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}".format(*heads))
    for name, (weights, gradients, buffers) in table.items():
        # Gradients come as activations go, so the rehearsed peak is less than their sum; from the second micro-batch
        # on, all gradients are there from the start.
        most = max(peak, gradients) if share <= rows else gradients + max(0.0, peak - 4 * size)
        parts = (weights, gradients, buffers, state, max(0.0, peak - state - 4 * size), weights + buffers + most)
        print(f"{name:<12}" + "".join(f"{x / 1e9:>12.3f}" for x in parts))
    step = config.batch_size * config.seq_len
    tokens = command.tokens or config.steps * step
    flops = (cost.float32 + cost.bfloat16 + cost.layers) / (rows * config.seq_len)
    steps = f"{tokens:.3g} tokens are {tokens / step:,.0f} steps"
    print(f"\n{flops:.3g} operations a token, {flops / 6 / size:.2f} x 6 per parameter; {steps}")
    if config.capture:
        segments = len(graphs.segments(model_config, config.seq_len))
        print(f"captured: {cost.launches:,.0f} operations in graphs of {segments} segments, given one after another")
        cost = cost._replace(launches=3 * segments + 1, views=0)  # tokens, targets, graph; and once the start states
    print_time(cost, device, rows * config.seq_len)
    update = step_cost(model_config, config, make_optimizers)
    seconds = -(-share // rows) * cost.seconds(device) + update.seconds(device)
    speed, used = step / seconds, flops * step / gpus / seconds / device.bfloat16
    counts = f"{update.launches:,.0f} launches, {update.moved:.3g} bytes"
    print(f"an optimizer's step: {counts}, {update.seconds(device):.3g} s")
    days = f"{used:.1%} of the rate in bfloat16, {tokens / speed / 86400:.3g} days"
    print(f"{gpus} x {device.name}: {speed:,.0f} tokens/s, {days}")


def print_time(cost: Cost, device: Device, micro_batch: int) -> None:
    """How long a micro-batch of so many tokens takes, and what takes longest in it: to give the device its operations,
    or these themselves. What processes exchange once a step is left out."""
    known = "measured" if device.measured else "assumed; tests/bench/gpu.json may hold what was measured"
    layers = f", {cost.layers:.3g} of memory layers at {device.layers or device.float32:.3g}" if cost.layers else ""
    parts = {
        "bytes": (cost.by_bytes, f"of {cost.moved:.3g} at {device.bandwidth:.3g} a second"),
        "arithmetic": (cost.by_arithmetic, f"of {cost.float32:.3g} in float32 at {device.float32:.3g} a second, "
                                           f"{cost.bfloat16:.3g} in bfloat16 at {device.bfloat16:.3g}{layers}"),
        "least": (cost.by_least, f"for operations too small for either to count, {1e6 * device.least:.3g} us each"),
    }  # fmt: skip
    views = f", {cost.views:,.0f} views of {1e6 * device.view:.3g} us" if device.view else ""
    given = f"{cost.launches:,.0f} of {1e6 * device.launch:.3g} us{views}"
    work = "operation by operation, the larger of bytes and arithmetic:"
    mark = "  <- what takes longest"
    print(f"\na micro-batch of {micro_batch:,} tokens on a {device.name} ({known})")
    if cost.layers and not device.layers:
        print(
            "  memory layers in one launch, by fused.py, which no GPU has run: its rate is a guess, that of float32, and"
        )
        print("  `work` is taken to stay in the cache; HOPE_KERNELS=reference counts them operation by operation")
    print(f"  {'launches':<13}{cost.given(device):>9.3g} s  {given}{mark * (cost.given(device) > cost.work())}")
    print(f"  {'work':<13}{cost.work():>9.3g} s  {work}{mark * (cost.given(device) <= cost.work())}")
    for name, (seconds, how) in parts.items():
        print(f"    {name:<11}{seconds:>9.3g} s  {how}")
