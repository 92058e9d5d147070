"""What chapter 19 reads: `train.py --plan` for the three sizes, as commanded there and with one thing changed at a time.

    python book/runs/plans.py                what is missing; writes plans.json; a few minutes of one core
    python book/runs/plans.py --anew         all of them, after a change of the code

The forecast is kept as it was printed, beside the command that printed it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import hope
from data import write_atomically

RESULT, ROOT = Path(__file__).with_suffix(".json"), Path(hope.__file__).parent
TOKENS = {"340m": 15e9, "760m": 30e9, "1.3b": 100e9}
RECIPE = "--data fineweb-edu --optimizer adamw --lr 4e-4 --seq-len 4096 --batch-size 128 --truncate"
README = {size: f"--micro-batch {4 if size == '1.3b' else 8} --remat 1" for size in TOKENS}
PLANS = {f"{size}, as in the README": (size, flags) for size, flags in README.items()} | {
    "760m, nothing recomputed": ("760m", "--micro-batch 8 --remat 0"),
    "760m, plain memories": ("760m", README["760m"]),
    "760m, captured": ("760m", README["760m"] + " --capture"),
    "760m, fast clocks": ("760m", "--micro-batch 8 --cms 64,256,inf"),
    "760m, transformer++": ("760m", "--micro-batch 8 --arch transformer++"),
}


def command(name: str) -> str:
    size, flags = PLANS[name]
    line = f"python train.py --plan --gpus 8 --size {size} --tokens {TOKENS[size]:g} {RECIPE} {flags}"
    return "HOPE_KERNELS=reference " * ("plain" in name) + line


def made() -> dict:
    versions = {"torch": torch.__version__, "python": platform.python_version(), "hope": hope.__version__}
    return {"command": "python book/runs/plans.py", "versions": versions}


def run(line: str) -> str:
    """What a command prints, `python` and perhaps a variable before it, run where train.py is."""
    variable, _, flags = line.rpartition("python ")
    env = os.environ | dict(z.split("=") for z in variable.split())
    done = subprocess.run([sys.executable, *shlex.split(flags)], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{line}\n{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", action="store_true", help="also those that are stored")
    given = parser.parse_args()
    plans = json.loads(RESULT.read_text())["plans"] if RESULT.exists() and not given.anew else {}
    for name in PLANS:
        line = command(name)
        if plans.get(name, {}).get("command") != line:
            plans[name] = {"command": line, "printed": run(line).splitlines()}
            write_atomically(RESULT, json.dumps({"made": made(), "plans": plans}, indent=1) + "\n")
            print(name, plans[name]["printed"][-1], sep=": ", flush=True)


if __name__ == "__main__":
    main()
