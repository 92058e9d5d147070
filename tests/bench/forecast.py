"""Does the arithmetic of `train.py --plan` foretell a step's time? Asked of this CPU, whose constants are measured first.

    python tests/bench/forecast.py [--sizes tiny,60m] [--arch hope,transformer++] [--seq-len 256] [--rounds 3]
        [--optimizer muon]

prints, for every architecture and size, a training step (forward and backward pass, clipping, optimizer) as foretold
and as it is, in processor time of one thread; constants, forecasts and steps are taken in turn, so that what else the
machine does falls on all of them alike. Constants are the same for all architectures: launches and views in a chain of
small ones, and how much longer they take in narrow models of other architectures; bytes over a mix of the element-wise
operations that models consist of, in the cache and beyond it; arithmetic of large products, and what a matrix of a batch
costs beyond that. Foretold is .82 of Hope's step and .76 of Transformer++'s at size tiny, .89 and .93 at 60m (two
sequences of 256, and of 128 tokens with AdamW). What is missing is not counted: convolutions and triangular solves far
below the rate of large products, exponentials, Python between operations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measure import Bench, launch_and_view
from torch import Tensor

import hope
import plan
import train

OTHERS = ("titans", "dla", "ttt", "deltanet", "gated-deltanet", "retnet", "linear-attention")  # than those foretold
CACHE = 2**20  # bytes; larger results are new pages of memory every time


def mixed(n: int) -> Callable[[], list[Tensor]]:
    """Element-wise operations on n numbers, as models have them; together they move 48 bytes a number."""
    a, b = torch.ones(n // 64, 64), torch.ones(n // 64, 64)
    silu_backward = torch.ops.aten.silu_backward
    return lambda: [a * b, F.silu(a), silu_backward(a, b), a.sum(-1), a.mT.contiguous()]


def measure(bench: Bench) -> plan.Device:
    """This CPU. It gives operations to itself, so that launches and work add up."""
    launch, view = launch_and_view(bench)
    speed = {}
    for n in (2**14, 2**21):
        act = mixed(n)
        with plan.Meter(plan.Device("", 0.0, 0.0, 1.0, 1.0, 1.0)) as meter:
            act()
        cost = plan.total(meter.parts.values())
        seconds = bench.seconds(act, max(4, 2**21 // n))
        speed[n] = cost.moved / max(seconds - cost.launches * launch, 0.2 * seconds)
    rate = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, y = torch.ones(512, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
        rate[dtype] = 2 * 512 * 512 * 1024 / bench.seconds(lambda: x @ y, 5)
    x, y = torch.ones(40, 64, 32), torch.ones(40, 32, 64)
    one = bench.seconds(lambda: torch.bmm(x, y), 30) - launch - 2 * 40 * 64 * 32 * 64 / rate[torch.float32]
    device = plan.Device(
        "CPU", launch, 0.0, speed[2**21], rate[torch.float32], rate[torch.bfloat16], view,
        matrix=max(0.0, one / 40), cached=speed[2**14], cache=CACHE, alone=True,
    )  # fmt: skip
    slower = median(slowness(bench, arch, device) for arch in OTHERS)
    return replace(device, launch=slower * launch, view=slower * view)


def slowness(bench: Bench, arch: str, device: plan.Device) -> float:
    """How much longer an operation of a narrow model takes than one of a loop that does the same again and again, with
    code and tensors at hand."""
    config = train.TrainConfig(arch=arch, seq_len=64)
    model_config = hope.HopeConfig.preset("tiny", arch, d_model=16, n_head=2, chunk=32)
    cost = plan.total(counted(lambda: plan.rehearse(model_config, config, 2, 64, torch.float32), device).values())
    model, x = hope.Hope(model_config), torch.randint(256, (2, 64))
    seconds = bench.seconds(lambda: model.observe(x, x, reduction="none")[0].sum().backward(), 5)
    return (seconds - cost.work()) / cost.given(device)


def counted(count: Callable[[], Any], device: plan.Device) -> Any:
    known, plan.Device.known = plan.Device.known, lambda: device
    try:
        return count()
    finally:
        plan.Device.known = known


def foretold(config: train.TrainConfig, model: hope.HopeConfig, device: plan.Device) -> tuple[float, float]:
    """Seconds of a micro-batch, and of the optimizer's step."""
    rehearse = lambda: plan.rehearse(model, config, config.batch_size, config.seq_len, torch.float32)
    update = counted(lambda: plan.step_cost(model, config, train.make_optimizers), device)
    return plan.total(counted(rehearse, device).values()).seconds(device), update.seconds(device)


def make_step(
    config: train.TrainConfig, model_config: hope.HopeConfig
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The two parts of a step: gradients, and what the optimizers do with them."""
    torch.manual_seed(0)
    model, world = hope.Hope(model_config), train.World(config)
    optimizers = train.make_optimizers(model, config)
    x = torch.randint(model_config.vocab_size, (config.batch_size, config.seq_len))

    def gradients() -> None:
        model.zero_grad()
        train.find_gradients(model, x, x, config, world)

    def update() -> None:
        train.clip_gradients(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()

    return gradients, update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny")
    parser.add_argument("--arch", default="hope,transformer++")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    bench = Bench(dry=True)
    kinds = [(size, arch) for size in args.sizes.split(",") for arch in args.arch.split(",")]
    found = {kind: [] for kind in kinds}
    steps = {}
    for _ in range(args.rounds):
        device = measure(bench)
        print(f"{1e6 * device.launch:.1f} us an operation, {1e6 * device.view:.1f} a view, {1e6 * device.matrix:.1f} a matrix; "
              f"{device.cached / 1e9:.0f} and {device.bandwidth / 1e9:.0f} GB/s, {device.float32 / 1e9:.0f} GFLOP/s")  # fmt: skip
        for size, arch in kinds:
            settings = dict(seq_len=args.seq_len, optimizer=args.optimizer, precision="float32")
            config = train.TrainConfig(size=size, arch=arch, **settings)
            model = hope.HopeConfig.preset(size, arch)
            if (size, arch) not in steps:
                steps[size, arch] = make_step(config, model)
            said = foretold(config, model, device)
            found[size, arch].append((*said, *(bench.seconds(act, 2, 1) for act in steps[size, arch])))
    for (size, arch), rows in found.items():
        said, did, update_said, update_did = (median(row[i] for row in rows) for i in (0, 2, 1, 3))
        ratio = median((row[0] + row[1]) / (row[2] + row[3]) for row in rows)
        print(f"{size:<5} {arch:<14} foretold {1e3 * said:6.0f} + {1e3 * update_said:5.0f} ms, found {1e3 * did:6.0f} + "
              f"{1e3 * update_did:5.0f} ms, ratio {ratio:.2f}; without the optimizer {said / did:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
