"""Does the arithmetic of `train.py --plan` foretell a step's time? Asked of this CPU, whose constants are measured first.

    python tests/bench/forecast.py

prints, for Hope and Transformer++ of size tiny, the forward and backward pass of a batch as foretold and as it is. Foretold
is too little, .45 of Hope's and .7 of the Transformer's: a CPU cannot give itself the next operation while it works, small
matrices stay far below the rate of larger ones, and Python's own time is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import plan
import train
from hope import Hope, HopeConfig


def seconds(act: Callable[[], object], repeats: int = 15) -> float:
    """Median processor time of one call, after two to warm up; it does not count what others make this process wait."""
    times = []
    for _ in range(repeats + 2):
        begun = time.process_time()
        act()
        times.append(time.process_time() - begun)
    return median(times[2:])


def small_operations() -> Tensor:
    """Forward and backward through tensors so small that only their number counts."""
    x, w = torch.ones(2, 4, 8, 8, requires_grad=True), torch.ones(2, 4, 8, 8, requires_grad=True)
    for _ in range(20):
        x = F.silu(x @ w.mT) * w + x.sum(-1, keepdim=True)
    x.sum().backward()
    return x


def measure() -> plan.Device:
    """This CPU. It gives operations to itself, so that launches and work are one."""
    endless = plan.Device("", 0.0, 0.0, 1.0, 1.0, 1.0)
    with plan.Meter(endless) as meter:
        small_operations()
    least = seconds(small_operations) / meter.launches
    a, b = torch.ones(2**20), torch.ones(2**20)
    bandwidth = 2 * 4 * 2**20 / seconds(lambda: torch.add(a, 1.0, out=b))
    m, n = torch.ones(40, 64, 32), torch.ones(40, 32, 64)
    rate = 2 * 40 * 64 * 32 * 64 / seconds(lambda: m @ n)
    return plan.Device("CPU", 0.0, least, bandwidth, rate, rate)


def foretold_and_found(arch: str, device: plan.Device, seq_len: int = 256) -> tuple[float, float]:
    """Seconds of a batch's forward and backward pass."""
    config, model_config = train.TrainConfig(arch=arch, seq_len=seq_len), HopeConfig.preset("tiny", arch)
    with patch.object(plan.Device, "known", lambda: device):
        foretold = plan.rehearse(model_config, config, config.batch_size, seq_len, torch.float32).busy
    torch.manual_seed(0)
    model, x = Hope(model_config), torch.randint(256, (config.batch_size, seq_len))
    return foretold, seconds(lambda: model.observe(x, x, reduction="none")[0].sum().backward(), 5)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    device = measure()
    print(
        f"{device.least * 1e6:.1f} us an operation, {device.bandwidth / 1e9:.1f} GB/s, {device.float32 / 1e9:.1f} GFLOP/s"
    )
    for arch in ("hope", "transformer++"):
        foretold, found = foretold_and_found(arch, device)
        print(
            f"{arch:<14} foretold {foretold * 1e3:7.1f} ms, found {found * 1e3:7.1f} ms, ratio {foretold / found:.2f}"
        )


if __name__ == "__main__":
    main()
