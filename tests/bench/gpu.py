"""The Triton kernels without a GPU: machine code for every target, what it takes of a GPU, and how fast it can be.

    python tests/bench/gpu.py [--targets sm_75,sm_80,sm_90,sm_100,gfx942] [--sizes tiny,760m] [--out DIR] [--gpu]

Compiles every kernel at the shapes that every `--size` has and prints two tables: registers, spilled bytes, shared
memory and estimated occupancy of each; and bytes, FLOPs and the least time on an A100 and an H100, for one chunk of
a layer. With --out they are also written to DIR as kernels.json. With --gpu the kernels run and are timed beside the
reference. Needs triton, and TRITON_INTERPRET unset.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import hope
import kernels

TARGETS = {
    **{f"sm_{a}": GPUTarget("cuda", a, 32) for a in (75, 80, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a multiprocessor (a compute unit) has: registers of 32 bits, bytes of shared memory, warps, programs.
LIMITS = {
    "sm_75": (65536, 64 << 10, 32, 16), "sm_80": (65536, 164 << 10, 64, 32), "sm_90": (65536, 228 << 10, 64, 32),
    "sm_100": (65536, 228 << 10, 64, 32), "gfx942": (4 * 512 * 64, 64 << 10, 32, 32),
}  # fmt: skip
# Published rates (vendor's data sheets, SXM modules, dense): bytes/s of memory, FLOP/s in TF32.
RATES = {"A100 80GB": (2.039e12, 156e12), "H100": (3.35e12, 494.7e12)}


def shapes(sizes: list[str]) -> dict[tuple[int, int, int], list[str]]:
    """(chunk, rows, width of a memory) -> the sizes whose layers have it."""
    found: dict[tuple[int, int, int], list[str]] = {}
    for size in sizes:
        memory = hope.HopeConfig.preset(size).memory
        hidden = memory.expand * memory.d_head
        for shape in {(memory.chunk, hidden, memory.d_head), (memory.chunk, memory.d_head, hidden)}:
            found.setdefault(shape, []).append(size)
    return found


def calls(c: int, o: int, i: int, precision: str, momentum=True, read=True, delta=True, inclusive=False, scan=False):
    """Every kernel with the arguments of a call: types as strings, constants, warps."""
    none = set() if momentum else {"m", "theta", "m_end", "dm", "d_theta"}
    none |= set() if read else {"Q", "R", "dQ", "dR"}
    none |= set() if delta else {"P", "dZ"}
    none |= set() if scan else {"anchor"}
    constants = dict(x_row=i, d_row=o, q_row=i, EMA=True, DELTA=delta, INCLUSIVE=inclusive, PRECISION=precision)
    for name, rows in (
        ("forward", 32),
        ("states", 16),
        ("backward", 16),
        ("backward_tokens", 16),
        ("backward_gates", 16),
    ):
        if scan and name != "forward":
            continue
        sizes = kernels._blocks(o, i, min(rows, 16 if o <= 16 else 32))
        constants |= sizes | {"ROWS": -(-o // sizes["BO"])}
        args = {k: None if k in none else "*fp32" for k in getattr(kernels, f"_chunk_{name}").arg_names}
        args |= {k: v for k, v in dict(at="*i64", c="i32", chunk="i32").items() if k in args}
        args |= {k: v for k, v in constants.items() if k in args}
        warps = 1 if name == "backward_gates" else sizes["num_warps"]
        yield f"chunk_{name}", getattr(kernels, f"_chunk_{name}"), args, warps, 1
    for dtype in ("fp32", "bf16") if not scan else ():
        p = precision if dtype == "fp32" else "half"
        args = dict(X=f"*{dtype}", C=f"*{dtype}", Y=f"*{dtype}", M="i32", K="i32", beta="fp32", alpha="fp32")
        yield (
            f"symmetric {dtype}",
            kernels._symmetric_product,
            args | dict(HAS_C=True, B=64, BK=32, PRECISION=p),
            4,
            3,
        )


def build(fn, args: dict, warps: int, stages: int, target: str) -> dict:
    """Compile one kernel for one target: registers a thread, bytes spilled a thread, shared memory, occupancy."""
    kind = lambda k, v: v if isinstance(v, str) and k != "PRECISION" else "constexpr"
    signature = {k: kind(k, v) for k, v in args.items()}
    constants = {k: v for k, v in args.items() if signature[k] == "constexpr"}
    aligned = {(n,): [["tt.divisibility", 16]] for n, k in enumerate(args) if signature[k].startswith("*")}
    source = ASTSource(fn, signature, constants, aligned)
    made = triton.compile(source, target=TARGETS[target], options=dict(num_warps=warps, num_stages=stages))
    if target.startswith("sm"):
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(made.asm["cubin"])
            f.flush()
            text = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
        width = 32
    else:
        text = made.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])
        width = 64
    have, memory, most_warps, most = LIMITS[target]
    by_registers = have // (max(1, -(-registers // 8) * 8) * width * warps)
    programs = min(by_registers, memory // max(made.metadata.shared + 1024, 1), most_warps // warps, most)
    return dict(
        registers=registers, spilled=spilled, shared=made.metadata.shared, occupancy=programs * warps / most_warps
    )


def cost(name: str, c: int, o: int, i: int, n: int, passes: int = 3) -> tuple[float, float]:
    """Bytes that must move and FLOPs of a kernel's products for n memories with momentum, reads and the delta rule."""
    block, state, half = 16, o * i, min(32, o)
    blocks = -(-c // block)
    tokens = c * (3 * o + 2 * i)  # x, q of width i; d, p and what is read of width o
    if name == "chunk_forward":
        numbers, flops = 4 * state + tokens, 6 * state + 2 * block * (i * o / half + 2 * o)
    elif name == "chunk_states":
        numbers, flops = 2 * state * (1 + blocks) + c * (i + 2 * o), 2 * state
    elif name == "chunk_backward":
        numbers, flops = 2 * state * (2 + blocks) + tokens + 2 * c * o, 6 * state + 2 * block * (i * o / 16 + 2 * o)
    elif name == "chunk_backward_tokens":
        numbers, flops = 4 * state * blocks + tokens + 2 * c * i * o / 16, 6 * state + 6 * block * (i * o / 16 + o)
    else:
        raise ValueError(name)
    return 4.0 * n * numbers, 2.0 * n * c * flops * passes


def occupation(targets: list[str], sizes: list[str], **flags) -> list[dict]:
    rows = []
    for (c, o, i), of in shapes(sizes).items():
        for target in targets:
            precision = "tf32x3" if target in ("sm_80", "sm_90", "sm_100") else "ieee"
            for name, fn, args, warps, stages in calls(c, o, i, precision, **flags):
                row = dict(kernel=name, memory=f"{o}x{i}", sizes=of, target=target, warps=warps)
                rows.append(row | build(fn, args, warps, stages, target))
                print_row(
                    rows[-1], ("kernel", "memory", "target", "warps", "registers", "spilled", "shared", "occupancy")
                )
    return rows


def floors(sizes: list[str], batch: int = 8) -> list[dict]:
    rows = []
    for size in sizes:
        m = hope.HopeConfig.preset(size).memory
        n = batch * m.n_head * (1 + len(m.adaptive))
        for name in ("chunk_forward", "chunk_states", "chunk_backward", "chunk_backward_tokens"):
            size_bytes, flops = cost(name, m.chunk, m.d_head, m.d_head, n)
            row = dict(kernel=name, size=size, MB=size_bytes / 1e6, GFLOP=flops / 1e9, intensity=flops / size_bytes)
            row |= {f"{gpu} us": 1e6 * max(size_bytes / b, flops / f) for gpu, (b, f) in RATES.items()}
            rows.append(row)
            print_row(row, tuple(row))
    return rows


def print_row(row: dict, keys: tuple) -> None:
    show = lambda v: f"{v:.2f}" if isinstance(v, float) else str(v)
    print("  ".join(f"{k} {show(row[k])}" for k in keys), flush=True)


def timings(sizes: list[str], batch: int = 8) -> list[dict]:
    """Milliseconds of a chunk of every size, forward and backward, by the kernels and by the reference, on this GPU."""
    from triton.testing import do_bench

    rows = []
    for (c, o, i), of in shapes(sizes).items():
        heads = hope.HopeConfig.preset(of[-1]).memory.n_head
        g = torch.Generator("cuda").manual_seed(0)
        rand = lambda *shape: torch.randn(batch, heads, 5, *shape, device="cuda", generator=g)
        args = dict(
            M=rand(o, i), m=rand(o, i), X=torch.nn.functional.normalize(rand(c, i), dim=-1), D=rand(c, o), Q=rand(c, i)
        )
        args |= {k: rand(c).sigmoid() for k in ("eta", "alpha", "theta")}
        args = {k: v.requires_grad_() for k, v in args.items()}
        for choice in ("triton", "reference"):
            os.environ["HOPE_KERNELS"] = choice
            run = lambda: kernels.dgd_chunk(**args, ema=True)
            out = [z for z in run() if z is not None]
            grads = [torch.randn_like(z) for z in out]
            back = lambda: torch.autograd.grad(out, list(args.values()), grads, retain_graph=True)
            row = dict(
                kernels=choice, memory=f"{o}x{i}", size=of[-1], forward_ms=do_bench(run), backward_ms=do_bench(back)
            )
            rows.append(row)
            print_row(row, tuple(row))
    os.environ.pop("HOPE_KERNELS")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--sizes", default=",".join(hope.HopeConfig.SIZES))
    parser.add_argument("--out", type=Path, help="directory for kernels.json")
    parser.add_argument("--gpu", action="store_true", help="run and time the kernels too; needs a GPU")
    args = parser.parse_args()
    targets, sizes = args.targets.split(","), args.sizes.split(",")
    for given, allowed, what in ((targets, TARGETS, "--targets"), (sizes, hope.HopeConfig.SIZES, "--sizes")):
        if unknown := set(given) - set(allowed):
            parser.error(f"{what}: {', '.join(sorted(unknown))} is not known; allowed: {', '.join(allowed)}")
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no GPU here; leave it out")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    print("== what kernels take of a processor")
    results = {"occupation": occupation(targets, sizes)}
    print("== one chunk of a layer, batch 8: what moves, what is computed, the least time")
    results["floors"] = floors(sizes)
    if args.gpu:
        print("== times on this GPU")
        results["timings"] = timings(sizes)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernels.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
