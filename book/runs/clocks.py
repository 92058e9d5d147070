"""The run behind the clocks of each size: tiny Hope at equal tokens, on long streams, with fast clocks, slow ones and none.

    python book/runs/clocks.py               what is missing; about 25 minutes of one core; writes clocks.json
    python book/runs/clocks.py --most 4      only so many trainings more
    python book/runs/clocks.py --seeds 3,4   also with these seeds
    python book/runs/clocks.py --quick       3 steps of each, and nothing is written

The arms have about as many parameters and read the same windows in the same order: `fast` is the CMS of sizes up to 170m,
`slow` that of 340m and more, `unwritten` the same chain of three MLPs of which none is written in context, and `one level`
a single MLP as wide as the three together, a Transformer's. A training is the loop of train.py with its settings for tiny,
one stream of 4,096 bytes of the text that ships with Python a step, gradients through the whole stream. What is shown are
bits per byte of another text, 8 streams of 4,096 bytes, with writes and without, and for each 512 bytes of a stream.
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
ARMS = {"fast": (64.0, 256.0, INF), "slow": (512.0, 2048.0, INF), "unwritten": (INF, INF, INF), "one level": (INF,)}
SEEDS, STEPS, ROWS, LENGTH, SHOWN, PART = (0, 1, 2), 40, 1, 4096, 8, 512


@cache
def texts() -> tuple[bytes, bytes]:
    """What is trained on, and what is held out."""
    return tuple(part.encode() for part in pydoc_text())


def windows(text: bytes, n: int, g: torch.Generator | None = None) -> Tensor:
    """n windows of LENGTH + 1 bytes, at random or evenly spread."""
    last = len(text) - LENGTH - 1
    starts = torch.linspace(0, last, n).long() if g is None else torch.randint(last, (n,), generator=g)
    return torch.stack([torch.tensor(list(text[s : s + LENGTH + 1])) for s in starts.tolist()])


def learn(model: hope.Hope, seed: int, steps: int) -> list[float]:
    """The training loop of train.py, in short. Returns the loss of every step in bits."""
    config, g = train.TrainConfig(steps=STEPS, seq_len=LENGTH), torch.Generator().manual_seed(seed)
    optimizers, losses = train.make_optimizers(model, config), []
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, config) * group.get("lr_scale", 1.0)
        x = windows(texts()[0], ROWS, g)
        loss, _ = model.observe(x[:, :-1], x[:, 1:], backward=True)
        losses.append(loss.item() / math.log(2))
        train.clip_gradients(model, config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
    return losses


@torch.no_grad()
def bits(model: hope.Hope, levels: tuple | None = None, shown: int = SHOWN) -> list[float]:
    """Bits per byte of every PART of the held-out streams."""
    x = windows(texts()[1], shown)
    loss, _ = model.observe(x[:, :-1], x[:, 1:], levels=levels, reduction="none")
    return [round(part.mean().item() / math.log(2), 4) for part in loss.split(PART, 1)]


def row(arm: str, seed: int, steps: int = STEPS, shown: int = SHOWN) -> dict:
    torch.manual_seed(seed)
    model, begun = hope.Hope(hope.HopeConfig.preset("tiny", cms=ARMS[arm])), time.process_time()
    losses = learn(model, seed, steps)
    spent = time.process_time() - begun
    found = {"on": bits(model, None, shown)}
    found["off"] = bits(model, (), shown) if model.config.written else found["on"]
    means = {f"held out, writes {name}": round(sum(parts) / len(parts), 4) for name, parts in found.items()}
    size = max(1, steps // 10)
    return means | {
        "parts": found,
        "losses": [round(sum(z) / size, 3) for z in zip(*[iter(losses)] * size)],
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(spent, 1),
    }


def stored() -> dict:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}


def keep(name: str, found: dict) -> None:
    rows = stored()["rows"] | {name: found}
    made = {
        "command": "python book/runs/clocks.py",
        "seeds": sorted({int(row.split(", ")[1]) for row in rows}),
        "steps": STEPS,
        "streams a step": ROWS,
        "bytes a stream": LENGTH,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "hope": hope.__version__},
        "training bytes": len(texts()[0]),
    }
    text = json.dumps({"rows": rows, "made": made}).replace('}, "', '},\n"').replace('"rows": {', '"rows": {\n')
    write_atomically(RESULT, text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=10**6, help="how many trainings before stopping")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="those that are trained")
    parser.add_argument("--quick", action="store_true", help="try the script; keeps nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if given.quick:
        for arm in ARMS:
            print(arm, row(arm, 0, steps=3, shown=1), flush=True)
        return
    todo = [(arm, seed) for seed in map(int, given.seeds.split(",")) for arm in ARMS]
    todo = [(arm, seed) for arm, seed in todo if f"{arm}, {seed}" not in stored()["rows"]]
    todo.sort(key=lambda run: run[0] == "one level")  # the arms that differ in nothing but clocks come first
    for n, (arm, seed) in list(enumerate(todo))[: given.most]:
        found = row(arm, seed)
        keep(f"{arm}, {seed}", found)
        short = {name: found[name] for name in found if name not in ("parts", "losses")}
        print(f"{len(todo) - n:3} to do:", arm, seed, short, flush=True)


if __name__ == "__main__":
    main()
