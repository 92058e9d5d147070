"""The long runs of chapter 18: formal languages (the paper's Table 5) and MAD (Table 4).

    python book/runs/formal.py                     what is missing; about 15 minutes of one core; writes formal.json
    python book/runs/formal.py --only languages    or mad; --arch hope,deltanet for some architectures
    python book/runs/formal.py --seeds 0,1,2,3,4   more of them
    python book/runs/formal.py --quick             two short trainings, shown and not kept

One block, AdamW, a warm-up of 20 steps, then the rate falls to a tenth. A seed sets the start weights and the training
rows. The rate is chosen by seed 0 on selection rows, the highest accuracy, then the lowest loss; what is shown are test
rows at that rate. A string of a language counts only if all its sets of next symbols are right. All arms are kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import hope
import tasks
from data import write_atomically

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs.fit import fit  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
RATES = {"languages": (0.01, 0.03, 0.1), "mad": (0.003, 0.01, 0.03)}

LANGUAGES = tuple(tasks.LANGUAGES)
BINS = ((1, 40), (41, 80), (81, 160))
LINEAR = dict(depth=1, adaptive=(), self_values=False, momentum=False)
ARCHS = {  # as chapter 18 names them: preset and changes
    "transformer++": ("transformer++", {}),
    "linear hope": ("hope", LINEAR),
    "deltanet": ("deltanet", {}),
    "hope": ("hope", dict(chunk=16, chunk_proj=16)),
    "gated-deltanet to 2": ("gated-deltanet", dict(beta=2.0)),
    "titans": ("titans", dict(chunk=8, chunk_proj=8)),
}

MAD = {
    "compression": "compression,symbols=12",
    "in-context recall": "in-context-recall,pairs=16",
    "fuzzy recall": "fuzzy-recall,length=32,motif=2",
    "selective copying": "selective-copying,length=32,copy=4",
    "memorisation": "memorisation,vocab=64",
}
MAD_ARCHS = {
    "transformer++": ("transformer++", {}),
    "deltanet": ("deltanet", {}),
    "hope": ("hope", dict(chunk=16, chunk_proj=16)),
    "titans": ("titans", {}),
}


def train(spec: str, arch: tuple[str, dict], seed: int, lr: float, steps: int, d: int, batch: int = 16) -> hope.Hope:
    """A model of one block, trained on a task of tasks.py."""
    torch.manual_seed(seed)
    task, (preset, changes) = tasks.make(spec), arch
    sizes = dict(d_model=d, n_head=2, n_layer=1, vocab_size=task.vocab_size, cms_hidden=2.0)
    model = hope.Hope(hope.HopeConfig.preset("tiny", preset, **{**sizes, **changes}))

    def loss(n: int) -> Tensor:
        tokens, targets = task.rows("train", seed, (n - 1) * batch, batch)
        return F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())

    for _ in fit(model, lr, steps, loss, [{"params": [*model.parameters()], "weight_decay": 0.01}]):
        pass
    return model


@torch.no_grad()
def scored(model: hope.Hope, task: tasks.Task, rows: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy in percent, and loss."""
    logits = model(rows[0])[0]
    loss = F.cross_entropy(logits.flatten(0, 1), rows[1].flatten()).item()
    return round(task.scores(logits, rows[1], rows[0])["accuracy"], 1), round(loss, 4)


@cache
def strings(language: str) -> list[tuple[Tensor, Tensor]]:
    """Test rows of each bin, every string once."""
    (_, short), *_, (_, longest) = BINS
    task = tasks.make(f"{language},longest={short},longer={longest}")
    tokens, targets = task.rows("test", 0, 0, 512)
    tokens, first = torch.unique(tokens, dim=0, return_inverse=True)
    rows = torch.zeros(len(tokens), targets.shape[1], dtype=torch.long).index_copy_(0, first, targets)
    length = (tokens > 0).sum(1)
    found = []
    for low, high in BINS:
        inside = torch.nonzero((length >= low) & (length <= high))[:128, 0]
        found.append((tokens[inside, :high], rows[inside, :high]))
    return found


def language_row(language: str, arch: str, lr: float, seed: int, steps: int = 200) -> dict:
    task = tasks.make(language)
    model = train(language, ARCHS[arch], seed, lr, steps, d=32)
    selection, loss = scored(model, task, task.rows("selection", 0, 0, 64))
    found = dict(selection=selection, loss=loss, bins=[], symbols=[])
    for tokens, targets in strings(language):
        with torch.no_grad():
            right = model(tokens)[0].argmax(-1) == targets
        asked = targets >= 0
        found["bins"].append(round(100 * (right | ~asked).all(1).float().mean().item(), 1))
        found["symbols"].append(round(100 * right[asked].float().mean().item(), 1))
    return found


def mad_row(task_name: str, arch: str, lr: float, seed: int, steps: int = 250) -> dict:
    task = tasks.make(MAD[task_name])
    model = train(task.spec, MAD_ARCHS[arch], seed, lr, steps, d=64)
    selection, loss = scored(model, task, task.rows("selection", 0, 0, 64))
    return dict(selection=selection, loss=loss, test=scored(model, task, task.rows("test", 0, 0, 256))[0])


# ----------------------------------------------------------------------------------------------------------------------

PARTS = {"languages": (language_row, LANGUAGES, ARCHS), "mad": (mad_row, MAD, MAD_ARCHS)}


def name_of(task: str, arch: str, lr: float, seed: int) -> str:
    return f"{task}; {arch}; {lr}; {seed}"


def rates_of(task: str) -> tuple[float, ...]:
    return RATES["mad" if task in MAD else "languages"]


def best_rate(rows: dict, task: str, arch: str) -> float:
    """By seed 0 on selection rows."""
    tried = {lr: rows[name_of(task, arch, lr, 0)] for lr in rates_of(task)}
    return min(tried, key=lambda lr: (-tried[lr]["selection"], tried[lr]["loss"]))


def shown(rows: dict, task: str, arch: str, seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict]:
    """The rows of these seeds at the best rate, those that there are; none before all rates are tried."""
    if any(name_of(task, arch, lr, 0) not in rows for lr in rates_of(task)):
        return []
    names = [name_of(task, arch, best_rate(rows, task, arch), seed) for seed in seeds]
    return [rows[name] for name in names if name in rows]


def missing(rows: dict, part: str, seeds: tuple[int, ...], chosen: list[str]) -> list[tuple[str, str, float, int]]:
    """The next trainings to do, one architecture after the other: three rates, then the other seeds at the best."""
    _, names, archs = PARTS[part]
    for arch in chosen or archs:
        tuning = [(task, arch, lr, 0) for task in names for lr in rates_of(task)]
        if todo := [key for key in tuning if name_of(*key) not in rows]:
            return todo
        wanted = [(task, arch, best_rate(rows, task, arch), seed) for seed in seeds for task in names]
        if todo := [key for key in wanted if name_of(*key) not in rows]:
            return todo
    return []


def stored() -> dict:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {part: {} for part in PARTS}


def keep(part: str, name: str, found: dict) -> None:
    """Into the file, which other parts may have written to meanwhile."""
    rows = stored()
    rows[part][name] = found
    rows["made"] = {
        "command": "python book/runs/formal.py",
        "rates": RATES,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "hope": hope.__version__},
    }
    write_atomically(RESULT, json.dumps(rows).replace('}, "', '},\n"') + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--arch", default="", help="several with commas; all if none")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    seeds = tuple(int(seed) for seed in given.seeds.split(","))
    chosen = [arch for arch in given.arch.split(",") if arch]
    for part in [given.only] if given.only else PARTS:
        row = PARTS[part][0]
        while todo := missing({} if given.quick else stored()[part], part, seeds, chosen):
            key, begun = todo[0], time.process_time()
            found = row(*key, steps=20) if given.quick else row(*key)
            found["cpu seconds"] = round(time.process_time() - begun, 1)
            print(f"{part}: {len(todo)} to go with {key[1]}; {key[0]}, {key[2]}, {key[3]}: {found}", flush=True)
            if given.quick:
                break
            keep(part, name_of(*key), found)


if __name__ == "__main__":
    main()
