"""What chapter 14 tells of the kernels on GPUs: compiled ahead of time to machine code, with no GPU there.

    python runs/occupancy.py      in the folder book/; half a minute on one core; needs triton; writes runs/occupancy.json

Every kernel of a memory layer at size 760m, by the functions of tests/bench/gpu.py: what it takes of a multiprocessor, and
the bytes and operations that one chunk of the layer cannot do without. No random numbers: a run repeats to the last digit,
with the same version of triton.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
TARGETS, SIZE, BATCH = ["sm_80", "sm_90", "gfx942"], "760m", 2


def bench():
    """tests/bench/gpu.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu_bench", HERE.parents[1] / "tests/bench/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # so that everything is compiled
    import triton

    began, gpu = time.process_time(), bench()
    memory_layer = ("chunk", "memory_scan")
    taken = gpu.occupation(TARGETS, [SIZE], "hope", memory_layer)
    least = [row for row in gpu.floors([SIZE], BATCH) if row["kernel"].startswith("chunk")]
    made = {
        "command": "python runs/occupancy.py",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "cpu seconds": round(time.process_time() - began),
    }
    keep = ("kernel", "target", "warps", "registers", "spilled", "shared", "occupancy")
    found = {
        "made": made,
        "size": SIZE,
        "batch": BATCH,
        "limits": {target: gpu.LIMITS[target] for target in TARGETS},
        "taken": [{k: row[k] for k in keep} for row in taken],
        "least": [{k: row[k] for k in ("kernel", "MB", "GFLOP")} for row in least],
    }
    (HERE / "occupancy.json").write_text(json.dumps(found) + "\n")
    print(made)
