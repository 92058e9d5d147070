"""Recall in context: how many of the values that a sequence has shown are found again by their keys.

    python tests/bench/recall.py [--task TASK] [--arch hope,deltanet] [--seeds 0,1,2] [--lr 0.01] [--steps N] [--FIELD VALUE ...]
    python tests/bench/recall.py --why gates|hidden|decay|chunk|keys [--seeds 0]

FIELD is any field of HopeConfig or MemoryConfig. A row is printed for every architecture and learning rate: accuracy on
held-out sequences for every seed, the same at twice the length, and the steps to 95% on other held-out sequences.

TASK is one of tasks.py that has a length, with its options, as in mqar,filler=values; recall is the default (4 pairs).
old-recall and old-mqar have the rows that figures before tasks.py were measured on.
"""

from __future__ import annotations

import argparse
import ast
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import hope
import tasks
from kernels import dgd_chunk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "book"))
from runs.fit import fit  # noqa: E402

BATCH, STEPS = 32, {"recall": 600, "mqar": 1536}


def make(name: str) -> tasks.Task:
    """A task of tasks.py, or with old- in front of its name: then rows of different splits are only unlikely to meet."""
    task = tasks.make(name.removeprefix("old-"))
    if name.startswith("old-"):
        keyed = lambda split, seed, i: np.random.default_rng((tasks.SPLITS.index(split), seed, i))
        task.row = lambda split, seed, i: task.draw(keyed(split, seed, i), split, i)
    return task


@torch.no_grad()
def accuracy(model: hope.Hope, tokens: torch.Tensor, targets: torch.Tensor) -> float:
    asked = targets != -100
    hits = [model(t)[0].argmax(-1)[a] == y[a] for t, y, a in zip(*(z.split(64) for z in (tokens, targets, asked)))]
    return 100 * torch.cat(hits).float().mean().item()


def build(name: str, arch: str, **overrides) -> hope.Hope:
    """The yardstick's size: width 64, 2 layers, 2 heads."""
    given = dict(d_model=64, n_head=2, n_layer=2, vocab_size=make(name).vocab_size, cms_hidden=2.0)
    return hope.Hope(hope.HopeConfig.preset("tiny", arch, **{**given, **overrides}))


class Result(NamedTuple):
    accuracy: float
    longer: float
    reached: int  # steps to 95% on selection rows, 0 if never
    steps: int
    curve: list[float]  # accuracy on selection rows every 50 steps
    model: hope.Hope


def train(
    name: str, arch: str = "hope", seed: int = 0, lr: float = 1e-2, steps: int = 0, stop: float = 99.0, **overrides
) -> Result:
    """Train by AdamW; stops early once accuracy on selection rows is `stop`. The reported rows are others."""
    torch.manual_seed(seed)
    task, model = make(name), build(name, arch, **overrides)
    steps = steps or STEPS.get(task.name, 1000)
    held, curve, reached, n = task.rows("selection", 0, 0, 128), [], 0, 0

    def loss(n: int) -> torch.Tensor:
        tokens, targets = task.rows("train", seed, n * BATCH, BATCH)
        return F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())

    for n in fit(model, lr, steps, loss):
        if n % 50 == 0 or n == steps:
            curve.append(accuracy(model, *held))
            reached = reached or (n if curve[-1] >= 95 else 0)
            if curve[-1] >= stop:
                break
    longer = make(f"{name},length={2 * task.length}")
    final = [accuracy(model, *which.rows("test", 0, 0, 256)) for which in (task, longer)]
    return Result(*final, reached, n, curve, model)


# ----------------------------------------------------------------------------------------------------------------------
# Why: one cause at a time, in a single memory without anything learnt


def memory(e: int = 32, spread: float = 1.0, n: int = 64) -> list[torch.Tensor]:
    """W2, W1 of n memories at their start, but for W1 = 0, so that what is read was written."""
    return [torch.randn(n, e, e) * spread, torch.zeros(n, e, e)]


def pairs(count: int, e: int = 32, n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit keys and values (n, count, e)."""
    return F.normalize(torch.randn(n, count, e), dim=-1), F.normalize(torch.randn(n, count, e), dim=-1)


def write(
    layers: list[torch.Tensor], k: torch.Tensor, v: torch.Tensor, eta: float, alpha: float = 1.0, *, chunk: int = 64,
    objective: str = "dot", hidden_rate: float = 0.1, start: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Memories after k, v (n, t, e) were written: hope.Memory's rule with the same gates at every token.

    Decay and delta term take W2 back to `start`, or to 0.
    """
    back = [torch.zeros(()) if start is None else start, torch.zeros(())]
    for k_c, v_c in zip(k.split(chunk, 1), v.split(chunk, 1)):
        new = []
        gradients = hope.inner_gradients(layers, k_c, v_c + k_c if objective == "l2" else v_c, objective)
        for layer, (x, _, grad) in enumerate(gradients):
            rate = eta * hidden_rate if layer == 0 else eta
            step = rate / (1 + rate * x.square().sum(-1))
            change = dgd_chunk(layers[layer] - back[layer], x, grad, step, torch.full_like(step, alpha))[0]
            new.append(back[layer] + change)
        layers = new
    return layers


def found(layers: list[torch.Tensor], k: torch.Tensor, v: torch.Tensor) -> float:
    """How much of v a read at k gives back, <W1 silu(W2 k), v>."""
    return ((hope.apply_memory(layers, k) - k) * v).sum(-1).mean().item()


def why_gates() -> Iterator[dict]:
    """A write of step eta shows in a read as eta |h|^2 / (1 + eta |h|^2), h = silu(W2 k): small features make slow gates."""
    for spread in (32**-0.5, 0.5, 1.0):
        for bias in (-2.0, 0.0, 2.0):
            layers, (k, v) = memory(spread=spread), pairs(1)
            features = F.silu(k @ layers[0].mT).square().sum(-1).mean().item()
            eta = F.softplus(torch.tensor(bias)).item()
            part = found(write(layers, k, v, eta, start=layers[0]), k, v)
            yield dict(spread=spread, eta_bias=bias, eta=eta, features=features, found=part)


def why_hidden() -> Iterator[dict]:
    """The delta term that takes the hidden layer toward 0 takes W2 k there for every key that is written."""
    for origin in ("zero", "start"):
        for hidden_rate in (1.0, 0.1, 0.0):
            layers, (k, v) = memory(), pairs(4)
            before = F.silu(k @ layers[0].mT).norm(dim=-1)
            start = layers[0] if origin == "start" else None
            layers = write(layers, k, v, 1.0, hidden_rate=hidden_rate, start=start)
            left = (F.silu(k @ layers[0].mT).norm(dim=-1) / before).mean().item()
            yield dict(origin=origin, hidden_rate=hidden_rate, features_left=left, found=found(layers, k, v))


def why_decay() -> Iterator[dict]:
    """Forgetting takes W2 toward 0, and what is written after that is not found; toward the start, it is."""
    alpha = torch.sigmoid(torch.tensor(4.0)).item()
    for origin in ("zero", "start"):
        for tokens in (0, 64, 256, 1024):
            layers, (k, v), others = memory(), pairs(4), pairs(tokens)
            start = layers[0] if origin == "start" else None
            if tokens:  # nothing is written, all is forgotten
                layers = write(layers, *others, 0.0, alpha, start=start)
            yield dict(origin=origin, tokens_before=tokens, found=found(write(layers, k, v, 0.127, start=start), k, v))


def why_chunk() -> Iterator[dict]:
    """Four pairs written again in every chunk: dot keeps them, l2 takes what is there back twice."""
    for objective in ("dot", "l2"):
        layers, (k, v) = memory(), pairs(4)
        start = layers[0]
        for times in range(1, 5):
            layers = write(layers, k, v, 1.0, objective=objective, chunk=4, start=start)
            yield dict(objective=objective, times_written=times, found=found(layers, k, v))


def why_keys() -> Iterator[dict]:
    """How alike the key and the value of a token are at the start of training."""
    for own_input in (False, True):
        torch.manual_seed(0)
        layer = hope.Memory(hope.MemoryConfig(d_model=64, n_head=2, own_input=own_input, conv=0))
        u = layer.to_u(torch.randn(512, 64)).view(512, 2, -1, 32).transpose(0, 1)
        u = F.normalize(u, dim=-1).expand(2, 512, 4, 32).transpose(1, 2)
        k, v = hope.apply_memory(layer.start_weights("proj"), u)[:, :2].unbind(1)
        yield dict(own_input=own_input, cosine_of_key_and_value=F.cosine_similarity(k, v, dim=-1).mean().item())


WHY = {"gates": why_gates, "hidden": why_hidden, "decay": why_decay, "chunk": why_chunk, "keys": why_keys}


def value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return float(text) if text == "inf" else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="recall")
    parser.add_argument("--arch", default="hope", help="several with commas")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--lr", default="0.01")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--stop", type=float, default=99.0)
    parser.add_argument("--why", choices=WHY, help="show a cause in a single memory instead of training")
    args, rest = parser.parse_known_args()
    overrides = {name.removeprefix("--").replace("-", "_"): value(v) for name, v in zip(rest[::2], rest[1::2])}
    torch.set_flush_denormal(True)
    if args.why:
        torch.manual_seed(int(args.seeds.split(",")[0]))
        print(WHY[args.why].__doc__)
        for line in WHY[args.why]():
            print("   ".join(f"{name} {z:.3f}" if isinstance(z, float) else f"{name} {z}" for name, z in line.items()))
        return
    for arch in args.arch.split(","):
        for lr in map(float, args.lr.split(",")):
            for seed in map(int, args.seeds.split(",")):
                start = time.perf_counter()
                r = train(args.task, arch, seed, lr, args.steps, args.stop, **overrides)
                print(
                    f"{args.task:5} {arch:16} lr {lr:g} seed {seed}  {r.accuracy:5.1f}  x2 {r.longer:5.1f}  95% at {r.reached:4}  "
                    f"of {r.steps:4}  {time.perf_counter() - start:4.0f} s  [{' '.join(f'{a:.0f}' for a in r.curve)}]  {' '.join(rest)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
