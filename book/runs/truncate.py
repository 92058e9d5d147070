"""What `--truncate` costs: tiny Hope trained by train.py with gradients through the whole stream, and through a segment.

    python book/runs/truncate.py             what is missing; about 30 minutes of one core; writes truncate.json
    python book/runs/truncate.py --most 4    only so many trainings more
    python book/runs/truncate.py --quick     2 steps of each, and nothing is written

Both of a pair read the same rows in the same order. What is kept is the validation that train.py logs after the last step,
in bits per byte. A training that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import hope
from data import write_atomically

RESULT, ROOT = Path(__file__).with_suffix(".json"), Path(hope.__file__).parent
LENGTHS = {512: "--steps 200 --batch-size 4", 2048: "--steps 100 --batch-size 2"}
SEEDS = (2, 0, 1)
RUNS = [(length, seed, cut) for seed in SEEDS for length in LENGTHS for cut in (False, True)]


def name_of(length: int, seed: int, cut: bool) -> str:
    return f"{length}, {seed}, {'truncate' if cut else 'whole'}"


def command(length: int, seed: int, cut: bool) -> str:
    return f"python train.py {LENGTHS[length]} --seq-len {length} --seed {seed}" + " --truncate" * cut


def trained(line: str, out: Path, more: tuple[str, ...] = ()) -> dict:
    """The last row of the log of a run that a command starts, or goes on with, in the folder `out`."""
    flags = [*shlex.split(line)[1:], "--eval-every", "1000", "--device", "cpu", "--out", str(out), *more]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *flags], cwd=ROOT, capture_output=True, text=True, env=alone)
    if done.returncode:
        raise RuntimeError(f"{line}\n{done.stderr[-3000:]}")
    rows = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
    return next(row for row in reversed(rows) if "val_bpb" in row)


def stored() -> dict:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}, "made": {}}


def keep(name: str, found: dict) -> None:
    versions = {"torch": torch.__version__, "python": platform.python_version(), "hope": hope.__version__}
    made = {"command": "python book/runs/truncate.py", "seeds": SEEDS, "threads": 1, "versions": versions}
    before = stored()
    now = {"rows": before["rows"] | {name: found}, "made": before["made"] | made}
    write_atomically(RESULT, json.dumps(now, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=10**6, help="how many trainings before stopping")
    parser.add_argument("--quick", action="store_true", help="try the script; keeps nothing")
    given = parser.parse_args()
    todo = [run for run in RUNS if given.quick or name_of(*run) not in stored()["rows"]]
    for run in todo[: given.most]:
        name = name_of(*run).replace(", ", "-") + "-quick" * given.quick
        line, out, begun = command(*run), ROOT / "runs" / f"truncate-{name}", time.monotonic()
        last = trained(line, out, ("--steps", "2", "--seq-len", "128") if given.quick else ())
        shutil.rmtree(out)
        found = {"command": line, "step": last["step"], "bits per byte": round(last["val_bpb"], 4)}
        print(name_of(*run), found, f"{time.monotonic() - begun:.0f} s", flush=True)
        if not given.quick:
            keep(name_of(*run), found)


if __name__ == "__main__":
    main()
