"""The outer training loop of small tasks: tests/bench/recall.py, and the runs of chapters 17 and 18."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import hope


def fit(
    model: hope.Hope, lr: float, steps: int, loss: Callable[[int], Tensor], groups: list[dict] | None = None
) -> Iterator[int]:
    """Train by AdamW on loss(1), ..., loss(steps); yields each number once its step is taken, and the caller may stop.

    The rate rises over 20 steps and falls on a line to a tenth; gradients are clipped to norm 1. groups: the optimizer's,
    by default matrices with a weight decay of .1 and the rest with none.
    """
    if groups is None:
        matrices, rest = (hope.param_groups(model)[name] for name in ("matrix", "rest"))
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    schedule = lambda i: min(1.0, (i + 1) / 20) * (1 - 0.9 * i / steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for n in range(1, steps + 1):
        loss(n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield n
