"""The long run of chapter 19: Hope, Titans, DeltaNet and Transformer++ at five sizes, at equal tokens and at equal time.

    python book/runs/scaling.py              what is missing; about 45 minutes of one core; writes scaling.json
    python book/runs/scaling.py --most 5     only so many trainings more
    python book/runs/scaling.py --seeds 3,4  also with these seeds
    python book/runs/scaling.py --size 64x2  of one size only, beside a run that does another
    python book/runs/scaling.py --quick      8 steps of each at the least size, and nothing is written

At a size, every architecture has about as many parameters. A training is chapter 15's: 100 steps of 4 windows of 256 bytes of
the text that ships with Python, by train.py's optimizers and schedule; a seed sets start weights and windows, which are the
same for all architectures. The learning rate of an architecture is the best of four (of equally good ones the least) at 32x2,
and for 192x2 of four at that size, by a seed of its own and on a text for tuning. What is shown are seeds 0 to 2 at that rate on another text: 44 windows
of 512 bytes, read with `Hope.observe`.

For equal time, the three faster ones also train longer at one size, about until they have taken as long as Hope, each run
with the whole schedule. Whether the rate still fits at the largest size is tried with half of it and double.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import hope
import train
from data import pydoc_text, write_atomically
from hope import INF

RESULT = Path(__file__).with_suffix(".json")
ARCHS = ("hope", "titans", "deltanet", "transformer++")
SIZES = {"32x1": (32, 1), "32x2": (32, 2), "64x2": (64, 2), "96x2": (96, 2), "192x2": (192, 2)}  # width, blocks
SEEDS, STEPS, ROWS, LENGTH = (0, 1, 2), 100, 4, 256
RATES = {"32x2": (0.02, 0.04, 0.08, 0.16), "192x2": (0.01, 0.02, 0.04, 0.08)}  # for sizes from there on
TUNING_SEED = 10
FLAT = 0.02  # bits per byte between learning rates that count as equally good
LONGER_AT, LONGER = "64x2", {"transformer++": 8, "deltanet": 6, "titans": 3}  # times the steps
CHECKED_AT, CHECKED = "96x2", ("hope", "transformer++")
CLOCKS = (32.0, 128.0, INF)  # of Hope's CMS, as in chapter 15


def build(arch: str, size: str, seed: int) -> hope.Hope:
    torch.manual_seed(seed)
    width, n_layer = SIZES[size]
    clocks = {"cms": CLOCKS} if arch == "hope" else {}
    shape = dict(d_model=width, n_head=width // 32, n_layer=n_layer)
    return hope.Hope(hope.HopeConfig.preset("tiny", arch, **shape, **clocks))


@cache
def texts() -> dict[str, bytes]:
    training, held_out = (part.encode() for part in pydoc_text())
    half = len(held_out) // 2
    return {"training": training, "tuning": held_out[:half], "held out": held_out[half:]}


def windows(text: bytes, n: int, t: int, g: torch.Generator | None = None) -> Tensor:
    """n windows of t + 1 bytes, at random or evenly spread."""
    last = len(text) - t - 1
    starts = torch.linspace(0, last, n).long() if g is None else torch.randint(last, (n,), generator=g)
    return torch.stack([torch.tensor(list(text[s : s + t + 1])) for s in starts.tolist()])


def learn(model: hope.Hope, lr: float, steps: int, seed: int) -> tuple[list[float], list[float]]:
    """The training loop of train.py, in short. Returns loss (bits) and gradient norm of every step."""
    config, g = train.TrainConfig(lr=lr, steps=steps, seq_len=LENGTH), torch.Generator().manual_seed(seed)
    optimizers, losses, norms = train.make_optimizers(model, config), [], []
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, config) * group.get("lr_scale", 1.0)
        x = windows(texts()["training"], ROWS, LENGTH, g)
        loss, _ = model.observe(x[:, :-1], x[:, 1:], backward=True)
        losses.append(loss.item() / math.log(2))
        norms.append(train.clip_gradients(model, 1.0).item())
        for optimizer in optimizers:
            optimizer.step()
    return losses, norms


@torch.no_grad()
def bits(model: hope.Hope, text: str, levels: tuple | None = None) -> float | None:
    """Bits per byte, or None where the model has diverged."""
    x = windows(texts()[text], 44, 512)
    found = model.observe(x[:, :-1], x[:, 1:], levels=levels)[0].item() / math.log(2)
    return round(found, 4) if math.isfinite(found) else None


def row(arch: str, size: str, times: int, lr: float, seed: int, steps: int = STEPS) -> dict:
    model, begun = build(arch, size, seed), time.process_time()
    losses, norms = learn(model, lr, times * steps, seed)
    spent = time.process_time() - begun
    found = {text: bits(model, text) for text in ("tuning", "held out")}
    parts = lambda z: [round(sum(p) / len(p), 3) for p in zip(*[iter(z)] * max(1, len(z) // 10))]
    found |= {"losses": parts(losses), "norms": parts(norms)}
    if arch == "hope":
        found["held out, no writes"] = bits(model, "held out", ())
        x = windows(texts()["held out"], 4, 512)
        with torch.no_grad():
            memory = train.memory_numbers(model, x[:, :-1], x[:, 1:])
        found |= {name: [[round(n, 3) for n in z] if isinstance(z, list) else round(z, 3) for z in each]
                  for name, each in memory.items()}  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    outside = sum(p.numel() for part in (model.embed, model.head) for p in part.parameters())
    return found | {"parameters": total, "non-embedding": total - outside, "seconds": round(spent, 2)}


def name_of(arch: str, size: str, times: int, lr: float, seed: int) -> str:
    return f"{arch}, {size}, x{times}, {lr}, {seed}"


def tuned_at(size: str) -> str:
    """The widest size with rates of its own that is no wider than this one."""
    width = lambda name: SIZES[name][0]
    return max((at for at in RATES if width(at) <= width(size)), key=width)


def best_rate(rows: dict, arch: str, size: str) -> float:
    """The least of four that comes within FLAT of the best on the text for tuning."""
    at = tuned_at(size)
    found = {lr: rows[name_of(arch, at, 1, lr, TUNING_SEED)]["tuning"] or INF for lr in RATES[at]}
    return min(lr for lr in found if found[lr] < min(found.values()) + FLAT)


def missing(rows: dict, seeds: tuple[int, ...]) -> list[tuple[str, str, int, float, int]]:
    """The next trainings to do: the rates; seed by seed all sizes but the largest; the longer ones; the largest size."""
    tuning = [(arch, at, 1, lr, TUNING_SEED) for at, rates in RATES.items() for lr in rates for arch in ARCHS]
    if todo := [key for key in tuning if name_of(*key) not in rows]:
        return todo
    best = lambda arch, size: best_rate(rows, arch, size)
    shown = [(arch, size, 1, best(arch, size), seed) for seed in seeds for size in SIZES for arch in ARCHS]
    small, large = ([key for key in shown if (key[1] == CHECKED_AT) is at] for at in (False, True))
    longer = [(arch, LONGER_AT, n, best(arch, LONGER_AT), seed) for seed in seeds for arch, n in LONGER.items()]
    checked = [(arch, CHECKED_AT, 1, x * best(arch, CHECKED_AT), seeds[0]) for x in (0.5, 2) for arch in CHECKED]
    return [key for key in small + longer + large + checked if name_of(*key) not in rows]


def stored() -> dict:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}


def keep(key: tuple, found: dict, seeds: tuple[int, ...]) -> None:
    training = texts()["training"]
    made = {
        "command": "python book/runs/scaling.py",
        "seeds": seeds,
        "tuning seed": TUNING_SEED,
        "rates": RATES,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "hope": hope.__version__},
        "training bytes": len(training),
    }
    rows = stored()["rows"] | {name_of(*key): found}
    text = json.dumps({"rows": rows, "made": made}).replace('}, "', '},\n"').replace('"rows": {', '"rows": {\n')
    write_atomically(RESULT, text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=10**6, help="how many trainings before stopping")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="those that are shown")
    parser.add_argument("--size", choices=SIZES, help="only this one")
    parser.add_argument("--quick", action="store_true", help="try the script; keeps nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if given.quick:
        for arch in ARCHS:
            print(arch, row(arch, "32x1", 1, RATES["32x2"][1], 0, steps=8), flush=True)
        return
    seeds = tuple(map(int, given.seeds.split(",")))
    for _ in range(given.most):
        todo = [key for key in missing(stored()["rows"], seeds) if given.size in (None, key[1])]
        if not todo:
            break
        found = row(*todo[0])
        keep(todo[0], found, seeds)
        short = {name: found[name] for name in ("tuning", "held out", "non-embedding", "seconds")}
        print(f"{len(todo):3} to do:", name_of(*todo[0]), short, flush=True)


if __name__ == "__main__":
    main()
