"""The long runs of chapter 18: recall (the paper's Table 3) and Hope without one part at a time (Table 6).

    python book/runs/recall.py                       what is missing of all; hours of one core; writes recall.json
    python book/runs/recall.py --only ablation       or text, or table; --arch deltanet,titans for some of the table
    python book/runs/recall.py --import-log FILE     takes what tests/bench/recall.py has printed already
    python book/runs/recall.py --quick               a short training of each part, shown and not kept

table: tests/bench/recall.py's training, width 64, two blocks, every architecture at three rates with three seeds; also
printed by `python tests/bench/recall.py --task recall --arch ARCH --lr 0.003,0.01,0.02 --seeds 0,1,2`. Rows of the task
old-recall are the same draws under another split of training and test. MQAR has filler 0, width 128 and rates of its own.
ablation: the same training of Hope with one block, one part taken away, and its accuracy far behind what it was trained on.
text: chapter 15's training (parts.py) for the parts that it does not take away, with six seeds; and for Hope itself, since
sums may be in another order than when parts.json was made, which moves a run as far as another seed does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import time
from pathlib import Path

import torch

import hope
import tasks
from data import write_atomically

HERE = Path(__file__).resolve().parent
RESULT = Path(__file__).with_suffix(".json")
SEEDS, RATES = (0, 1, 2), (0.003, 0.01, 0.02)
SHORT = dict(chunk=16, chunk_proj=16)
ARCHS = {
    **dict.fromkeys(("transformer++", "deltanet", "gated-deltanet", "titans", "ttt", "dla"), {}),
    **dict.fromkeys(("linear-attention", "retnet"), {}),
    "hope": SHORT,
}
MQAR, MQAR_SETTINGS = "mqar,filler=nothing", dict(d_model=128, steps=1536, stop=96.0)
MQAR_RATES = {
    "transformer++": (0.002, 0.003, 0.006),
    "deltanet": (0.002, 0.003, 0.006),
    "hope": (0.002, 0.003, 0.005),
}
MQAR_ONCE = {("hope", 0.005): (1,)}  # it goes nowhere there, for half an hour a seed

WHOLE = "Hope"
PARTS = {  # what is changed of Hope
    WHOLE: {},
    "no delta term": dict(rule="gd"),
    "no momentum": dict(momentum=False),
    "no decay": dict(decay="none", adaptive=("k", "v", "eta")),
    "static k": dict(adaptive=("v", "eta", "alpha")),
    "static v": dict(adaptive=("k", "eta", "alpha")),
    "adaptive q": dict(adaptive=("k", "v", "q", "eta", "alpha")),
    "chunk 64": dict(chunk=64, chunk_proj=64),
}
TEXT = (WHOLE, "no delta term", "static k", "static v", "adaptive q")  # the others are in parts.json
TEXT_SEEDS = (0, 1, 2, 3, 4, 5)
FAR, BIN = 128, 16  # tokens to read after learning 32, and of a stretch


def load(path: Path):
    """A script as a module under another name, since two are called recall."""
    spec = importlib.util.spec_from_file_location(f"script_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bench():
    return load(HERE.parents[1] / "tests" / "bench" / "recall.py")


def name_of(task: str, arch: str, lr: float, seed: int) -> str:
    return f"{task}; {arch}; {lr:g}; {seed}"


# ---- The table ----

LINE = re.compile(
    r"(?P<task>\S+) +(?P<arch>\S+) +lr (?P<lr>\S+) seed (?P<seed>\d+) +(?P<accuracy>\S+) +x2 +(?P<longer>\S+) +"
    r"95% at +(?P<reached>\d+) +of +(?P<steps>\d+) +(?P<seconds>\d+) s +\[(?P<curve>[\d ]*)\] *(?P<flags>.*)"
)


def read_log(text: str) -> dict[str, dict]:
    """Rows that tests/bench/recall.py has printed, of the settings above; others are left out."""
    found = {}
    for line in text.splitlines():
        if not (match := LINE.fullmatch(line.strip())):
            continue
        g = match.groupdict()
        task = {"small": "old-recall"}.get(g["task"], g["task"])
        flags = dict(zip(g["flags"].split()[::2], g["flags"].split()[1::2]))
        settings = ARCHS.get(g["arch"])
        wanted = {f"--{name}": str(value) for name, value in (settings or {}).items()}
        if task == MQAR:
            wanted["--d_model"] = "128"
        if settings is None or flags != wanted:
            continue
        found[name_of(task, g["arch"], float(g["lr"]), int(g["seed"]))] = dict(
            accuracy=float(g["accuracy"]), longer=float(g["longer"]), reached=int(g["reached"]), steps=int(g["steps"]),
            curve=[int(a) for a in g["curve"].split()],
        )  # fmt: skip
    return found


def table_row(task: str, arch: str, lr: float, seed: int, **settings) -> dict:
    r = bench().train(task, arch, seed, lr, **{**ARCHS[arch], **(MQAR_SETTINGS if task == MQAR else {}), **settings})
    return dict(
        accuracy=round(r.accuracy, 1), longer=round(r.longer, 1), reached=r.reached, steps=r.steps,
        curve=[round(a) for a in r.curve],
    )  # fmt: skip


def found_at(rows: dict, arch: str, lr: float, seed: int) -> dict | None:
    """A row of dense recall, of whichever of the two splits there is."""
    return rows.get(name_of("recall", arch, lr, seed)) or rows.get(name_of("old-recall", arch, lr, seed))


def missing_table(rows: dict, archs: list[str]) -> list[tuple]:
    wanted = [("recall", arch, lr, seed) for seed in SEEDS for lr in (0.01, 0.003, 0.02) for arch in archs]
    todo = [key for key in wanted if not found_at(rows, *key[1:])]
    mqar = [
        (MQAR, arch, lr, seed)
        for arch in MQAR_RATES
        for lr in MQAR_RATES[arch]
        for seed in MQAR_ONCE.get((arch, lr), SEEDS)
        if arch in archs
    ]
    return todo + [key for key in mqar if name_of(*key) not in rows]


# ---- Without one part ----


def ablation_row(arm: str, seed: int, steps: int = 400) -> dict:
    r = bench().train("recall", "hope", seed, 0.01, steps, **{"n_layer": 1, **SHORT, **PARTS[arm]})
    tokens, targets = tasks.make(f"recall,length={FAR}").rows("test", 0, 0, 256)
    with torch.no_grad():
        right = (r.model(tokens)[0].argmax(-1) == targets).float()
    asked = (targets >= 0).float()
    far = right.view(256, -1, BIN).sum((0, 2)) / asked.view(256, -1, BIN).sum((0, 2))
    return dict(
        accuracy=round(r.accuracy, 1), longer=round(r.longer, 1), reached=r.reached, steps=r.steps,
        far=[round(100 * a, 1) for a in far.tolist()],
    )  # fmt: skip


def text_row(arm: str, seed: int, **_) -> dict:
    """Bits per byte, as chapter 15 has them."""
    parts = load(HERE / "parts.py")
    lr = parts.best_rate(parts.stored()["rows"], WHOLE)
    torch.manual_seed(seed)
    sizes = {**parts.SIZE, "cms": parts.CLOCKS, **PARTS[arm]}
    model = hope.Hope(hope.HopeConfig.preset("tiny", "hope", **sizes))
    parts.learn(model, lr, seed)
    found = {text: parts.bits(model, text) for text in ("held out", "program code")}
    return found | {"parameters": sum(p.numel() for p in model.parameters()), "lr": lr}


# ----------------------------------------------------------------------------------------------------------------------


def stored() -> dict:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"table": {}, "ablation": {}, "text": {}}


def keep(part: str, found: dict[str, dict]) -> None:
    """Into the file, which other parts may have written to meanwhile."""
    rows = stored()
    rows[part] |= found
    rows["made"] = {
        "command": "python book/runs/recall.py",
        "seeds": SEEDS,
        "rates": RATES,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "hope": hope.__version__},
    }
    write_atomically(RESULT, json.dumps(rows).replace('}, "', '},\n"') + "\n")


def missing(part: str, archs: list[str]) -> list[tuple]:
    rows = stored()[part]
    if part == "table":
        return missing_table(rows, archs)
    arms, seeds = (PARTS, SEEDS) if part == "ablation" else (TEXT, TEXT_SEEDS)
    return [(arm, seed) for seed in seeds for arm in arms if f"{arm}; {seed}" not in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ablation", "text", "table"))
    parser.add_argument("--arch", default=",".join(ARCHS), help="of the table, several with commas")
    parser.add_argument("--import-log", type=Path, nargs="*", default=[], help="what tests/bench/recall.py has printed")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for log in given.import_log:
        rows = read_log(log.read_text())
        keep("table", rows)
        print(f"{log}: {len(rows)} rows")
    if given.import_log:
        return
    row = dict(ablation=ablation_row, text=text_row, table=table_row)
    for part in [given.only] if given.only else row:
        while todo := missing(part, given.arch.split(",")):
            key, begun = todo[0], time.process_time()
            found = row[part](*key, **({"steps": 5} if given.quick else {}))
            name = name_of(*key) if part == "table" else f"{key[0]}; {key[1]}"
            print(f"{part}: {len(todo)} to go; {name}: {found} {time.process_time() - begun:.0f} s", flush=True)
            if given.quick:
                break
            keep(part, {name: found})


if __name__ == "__main__":
    main()
