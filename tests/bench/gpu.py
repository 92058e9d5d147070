"""The Triton kernels without a GPU: machine code for every target, what it takes of a GPU, and how fast it can be; what a
step takes, by parts of a layer; and on a GPU, what is so (--measure, see measure.py).

    python tests/bench/gpu.py [--targets sm_75,sm_80,sm_90,sm_100,gfx942] [--sizes tiny,760m] [--arch hope]
        [--kernels chunk,memory_scan,layer,symmetric] [--out DIR] [--gpu]
    python tests/bench/gpu.py --counts [--sizes 760m] [--arch hope]
    python tests/bench/gpu.py --measure [--dry] [--groups rates,kernels,...] [--out DIR]

Compiles every kernel at the shapes that every `--size` has and prints two tables: registers, bytes of stack that a
thread spills to, shared memory and estimated occupancy of each; and bytes, FLOPs, their ratio and the least time on an
A100 and an H100. With --out they are also written to DIR as kernels.json. With --gpu the kernels run and are timed beside
the reference. Needs triton, and TRITON_INTERPRET unset. With --counts it prints instead, for every size, how many launches,
bytes and operations a token takes in training, by part of the model (4,096 tokens, micro-batch 8, --truncate), with
memory layers in one launch (fused.py); HOPE_KERNELS=reference counts them operation by operation.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from torch.utils.flop_counter import flop_registry
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fused
import hope
import kernels
import scan

TARGETS = {
    **{f"sm_{a}": GPUTarget("cuda", a, 32) for a in (75, 80, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a multiprocessor (a compute unit) has: registers of 32 bits, bytes of shared memory, warps, programs.
LIMITS = {
    "sm_75": (65536, 64 << 10, 32, 16), "sm_80": (65536, 164 << 10, 64, 32), "sm_90": (65536, 228 << 10, 64, 32),
    "sm_100": (65536, 228 << 10, 64, 32), "gfx942": (4 * 512 * 64, 64 << 10, 32, 32),
}  # fmt: skip
# Published rates (vendor's data sheets, SXM modules, dense): bytes/s of memory, FLOP/s in TF32 and in bfloat16.
RATES = {"A100 80GB": (2.039e12, 156e12, 312e12), "H100": (3.35e12, 494.7e12, 989.4e12)}
BLOCK = kernels.BC.value  # tokens that kernels take at once


def shapes(m: hope.MemoryConfig) -> list[tuple[int, int]]:
    """Rows and width of the layers of a memory."""
    hidden = m.expand * m.d_head
    return [(m.d_head, m.d_head)] if m.depth == 1 else [(hidden, m.d_head), (m.d_head, hidden)]


def calls(m: hope.MemoryConfig, o: int, i: int, precision: str):
    """The kernels of `dgd_chunk` for a layer (o, i) of a memory as a call has them: arguments, warps, stages."""
    none = set() if m.momentum else {"m", "theta", "m_end", "dm", "d_theta"}
    none |= set() if m.read != "chunk" else {"Q", "R", "dR", "dQ"}
    none |= set() if m.rule == "dgd" else {"P", "dZ"}
    flags = dict(EMA=True, DELTA=m.rule == "dgd", INCLUSIVE=m.read == "after", PRECISION=precision)
    for name in ("forward", "states", "backward", "backward_tokens", "backward_gates"):
        sizes = kernels._tiles(o, i, 32 if name == "forward" and o > 16 else 16)
        fn = kernels._chunk_forward if name == "states" else getattr(kernels, f"_chunk_{name}")
        out = {"forward": {"P", "states"}, "states": {"Q", "R"}}.get(name, set())
        warps = 1 if name == "backward_gates" else sizes["num_warps"]
        yield f"chunk_{name}", fn, arguments(fn, none | out, {**flags, **sizes}), warps, 1


def scan_call(m: hope.MemoryConfig, precision: str):
    """The launch that takes a whole layer of this kind over all chunks."""
    static = set("kvq") - set(m.adaptive)
    none = {name.upper() for name in "kvq" if name not in static} | (set() if m.adaptive else {"U"})
    none |= set() if m.depth == 2 else {"W1", "m1", "A1"}
    none |= set() if m.depth == 2 and m.origin == "start" else {"S2"}
    none |= set() if m.momentum else {"theta", "m2", "m1"}
    none |= set() if m.self_values and m.value_norm else {"scale"}
    for name in ("eta", "alpha"):
        none |= {name} if name in m.adaptive else {f"{name}_read", f"{name}_bias"}
    constants = dict(
        L2=m.objective == "l2", STEP=m.step, SELF_VALUES=m.self_values, QK_NORM=m.qk_norm, NORM=m.memory_norm, EMA=True,
        DELTA=m.rule == "dgd", HIDDEN_RATE=m.hidden_rate, READ=m.read, CHUNK=m.chunk, CHUNK_PROJ=m.chunk_proj, BE=64,
        PRECISION=precision,
    )  # fmt: skip
    fn = scan._memory_scan
    return "memory_scan", fn, arguments(fn, none, constants), constants["BE"] // 16, 1


def layer_inputs(m: hope.MemoryConfig, tokens: int) -> tuple[list, tuple]:
    """What `fused.memory_layer`'s operations are given for one head: `fused.INPUTS`, without numbers, and
    flags."""
    n, e, hidden = 1 + len(m.adaptive), m.d_head, m.expand * m.d_head
    shapes = dict.fromkeys("kvq", (1, 1, tokens, e)) | dict.fromkeys(("eta", "alpha", "theta"), (1, 1, tokens))
    shapes = {name: shape for name, shape in shapes.items() if name not in m.adaptive}
    if m.adaptive:
        shapes["u"] = 1, 1, tokens, len(m.adaptive) if m.own_input else 1, e
    shapes |= dict.fromkeys(("W2", "m2"), (1, 1, n, hidden, e)) | dict.fromkeys(("W1", "m1"), (1, 1, n, e, hidden))
    shapes |= dict(start=(1, n, hidden, e)) if m.origin == "start" else {}
    shapes |= dict(scale=(1, n, 1, 1)) if m.self_values else {}
    for name in {"eta", "alpha"} & set(m.adaptive):
        shapes |= {f"{name}_read": (1, 1, e), f"{name}_bias": (1, 1)}
    inputs = [torch.empty(shapes[k], device="meta") if k in shapes else None for k in fused.INPUTS]
    return inputs, (m.chunk, len(m.adaptive), m.objective == "l2", m.self_values, m.qk_norm, m.hidden_rate)


def has_launch(m: hope.MemoryConfig) -> bool:
    """Whether a GPU has a single launch for such a layer, and another for its backward pass."""
    with patch.object(fused, "layers_by_triton", lambda z: True):
        return fused.layer_fits(m, torch.zeros(1))


def layer_calls(m: hope.MemoryConfig, precision: str):
    """These launches."""
    inputs, flags = layer_inputs(m, m.chunk)
    constants = fused._launched(inputs, *flags)[1]
    names = [{"start": "S2"}.get(name, name) for name, z in zip(fused.INPUTS, inputs) if z is None]
    none = {*names, *(f"d{name}" for name in names), *(f"d_{name}" for name in names)}
    for name, fn in (("forward", fused._layer_forward), ("backward", fused._layer_backward_chunks)):
        args = arguments(fn, none, constants | dict(PRECISION=precision))
        yield f"layer_{name}", fn, args, constants["num_warps"], constants["num_stages"]


def newton_schulz_calls(precision: str):
    for dtype, p in (("fp32", precision), ("bf16", "half")):
        args = dict(X=f"*{dtype}", C=f"*{dtype}", Y=f"*{dtype}", M="i32", K="i32", beta="fp32", alpha="fp32")
        args |= dict(HAS_C=True, B=64, BK=32, PRECISION=p)
        yield f"symmetric {dtype}", kernels._symmetric_product, args, 4, 3


def arguments(fn, none: set, constants: dict) -> dict:
    """Of a kernel: constants, None, int32 for numbers, and pointers to float32, or int64 for `at`."""
    numbers = "c blocks chunks slots memories readers O I E H t0 length heads adaptive u_next work_size".split()
    number = lambda k: k in numbers or k.endswith("_row")
    args = {k: "i32" if number(k) else "*i64" if k == "at" else "*fp32" for k in fn.arg_names}
    constant = {fn.arg_names[n] for n in fn.constexprs}
    return {k: constants[k] if k in constant else None if k in none else v for k, v in args.items()}


def build(fn, args: dict, warps: int, stages: int, target: str) -> dict:
    """Compile one kernel for one target: registers a thread, bytes spilled a thread, shared memory, occupancy."""
    kind = lambda k, v: v if isinstance(v, str) and not k.isupper() or v in ("*fp32", "*bf16", "i32") else "constexpr"
    signature = {k: kind(k, v) for k, v in args.items()}
    constants = {k: v for k, v in args.items() if signature[k] == "constexpr"}
    even = lambda k: (
        signature[k].startswith("*")
        or signature[k] == "i32"
        and (k in "OIEH" or k.endswith(("_row", "_next", "_size")))
    )  # as they are at every size
    aligned = {(n,): [["tt.divisibility", 16]] for n, k in enumerate(args) if even(k)}
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


def cost(kernel: str, m: hope.MemoryConfig, o: int, i: int, read: bool, tokens: int = 0) -> tuple[float, float]:
    """Bytes that must move and FLOPs of products for one memory (o, i) and a chunk, or one head and so many `tokens`."""
    c, state, d = m.chunk, o * i * (2 if m.momentum else 1), m.rule == "dgd"
    blocks, rows = -(-c // BLOCK), -(-o // (32 if kernel == "chunk_forward" and o > 16 else 16))
    pairs = BLOCK * (i * rows + 2 * o)  # of tokens in a block: scores, and what is made of them
    if kernel == "chunk_forward":
        numbers, macs = 2 * state + c * (i + o), state * (1 + d) + d * pairs
        numbers, macs = numbers + read * c * (i + o), macs + read * (state + pairs)
    elif kernel == "chunk_states":
        numbers, macs = state * (2 + blocks) + c * (i + o + d * o), state * (1 + d) + d * pairs
    elif kernel == "chunk_backward":
        numbers, macs = state * (2 + blocks) + c * (i + 2 * o + d * 2 * o), state * (1 + d) + d * pairs
        numbers, macs = numbers + read * c * (i + o), macs + read * (state + pairs)
    elif kernel == "chunk_backward_tokens":
        work = blocks * rows * kernels.BACKWARD_WORK.value
        numbers, macs = 2 * state * blocks + work + c * (i + o + d * 2 * o + rows * i), state * (1 + d)
        numbers, macs = numbers + read * c * (i + o + rows * i), macs + read * state
        macs += (d + read) * (pairs + 2 * BLOCK * i * rows)
    elif kernel == "chunk_backward_gates":
        numbers, macs = blocks * (3 * BLOCK + 9) * BLOCK + 4 * c, (6 if m.momentum else 1) * BLOCK * BLOCK
    elif kernel == "memory_scan":  # o, i: a layer; all memories of a head, one launch
        n, layers = 1 + len(m.adaptive), m.depth
        c, streams = tokens, 4 + (m.adaptive == ()) - len(set(m.adaptive) & set("kvq"))
        numbers = n * layers * (2 * state + 2 * o * i) + c * (streams + 1) * i
        per_layer = state * (1 + d) + d * pairs
        macs = o * i * layers * (len(m.adaptive) + n * (1 + m.self_values)) + n * (layers - 1) * o * i
        macs += n * layers * per_layer + (m.read != "chunk") * layers * (state + pairs)
    elif kernel in ("layer_forward", "layer_backward"):  # likewise
        return layer_cost(kernel, m, tokens)
    else:
        raise ValueError(f"no kernel {kernel}")
    return 4.0 * numbers, 2.0 * c * macs


def layer_cost(kernel: str, m: hope.MemoryConfig, tokens: int) -> tuple[float, float]:
    """`cost` of a whole layer, or of its backward pass from the states of all chunks, as fused.py counts it."""
    inputs, flags = layer_inputs(m, tokens)
    operation, args = fused.FORWARD, (inputs, True, *flags)
    out = Y, states = fused._forward_shapes(*args)
    if kernel == "layer_backward":
        operation, args = fused.BACKWARD, (inputs, states, [Y, *inputs[7:11]], *flags)
        out = fused._backward_shapes(*args)
    return fused.traffic(operation, args, out), float(flop_registry[operation](*args, out_val=out))


def occupation(targets: list[str], sizes: list[str], arch: str, names: tuple[str, ...]) -> list[dict]:
    """Every kernel that `arch` at these sizes launches, compiled once for all sizes that need the same machine code; of
    those whose names begin with one of `names`."""
    rows = []
    for target in targets:
        precision, found = "tf32x3" if target in ("sm_80", "sm_90", "sm_100") else "ieee", {}
        for size in sizes:
            m = hope.HopeConfig.preset(size, arch).memory
            launches = [(call, f"{o}x{i}") for o, i in shapes(m) for call in calls(m, o, i, precision)]
            launches += [(scan_call(m, precision), f"{m.d_head}x{m.d_head}")]
            if has_launch(m):
                launches += [(call, f"{m.d_head}x{m.d_head}") for call in layer_calls(m, precision)]
            launches += [(call, "any") for call in newton_schulz_calls(precision)]
            for (name, fn, args, warps, stages), memory in launches:
                of = found.setdefault(repr((name, args, warps)), ((name, fn, args, warps, stages), set(), set()))
                of[1].add(size)
                of[2].add(memory)
        for (name, fn, args, warps, stages), of, memories in found.values():
            if not name.startswith(names):
                continue
            row = dict(kernel=name, memory=" ".join(sorted(memories)), sizes=sorted(of), target=target, warps=warps)
            rows.append(row | build(fn, args, warps, stages, target))
            print_row(rows[-1], ("kernel", "memory", "target", "warps", "registers", "spilled", "shared", "occupancy"))
    return rows


def floors(sizes: list[str], batch: int = 8, tokens: int = 2048) -> list[dict]:
    """Of a Hope layer: one chunk of all its memories by `dgd_chunk`'s kernels, `tokens` by the scan, and a product of
    Newton-Schulz for one matrix of d_model^2."""
    rows = []

    def add(kernel, size, moved, flops, rate):
        row = dict(kernel=kernel, size=size, MB=moved / 1e6, GFLOP=flops / 1e9, intensity=flops / moved)
        row |= {f"{gpu} us": 1e6 * max(moved / r[0], flops / r[rate]) for gpu, r in RATES.items()}
        rows.append(row)
        print_row(row, tuple(row))

    for size in sizes:
        m = hope.HopeConfig.preset(size).memory
        for name in ("forward", "states", "backward", "backward_tokens", "backward_gates"):
            costs = [
                cost(f"chunk_{name}", m, o, i, r) for o, i in shapes(m) for r in [False] * len(m.adaptive) + [True]
            ]
            moved, flops = (batch * m.n_head * sum(z) for z in zip(*costs))
            add(f"chunk_{name}", size, moved, 3 * flops, 1)  # three TF32 products for one in float32
        moved, flops = (batch * m.n_head * z for z in cost("memory_scan", m, *shapes(m)[0], True, tokens))
        add("memory_scan", size, moved, 3 * flops, 1)
        for name in ("layer_forward", "layer_backward"):
            moved, flops = (batch * m.n_head * z for z in cost(name, m, *shapes(m)[0], True, tokens))
            add(name, size, moved, 3 * flops, 1)
        d, tiles = m.d_model, -(-m.d_model // 64)
        flops = 2.0 * tiles * (tiles + 1) / 2 * 64 * 64 * d
        add("symmetric fp32", size, 4 * 3 * d * d, 3 * flops, 1)
        add("symmetric bf16", size, 2 * 3 * d * d, flops, 2)
    return rows


def print_row(row: dict, keys: tuple) -> None:
    show = lambda v: f"{v:.2f}" if isinstance(v, float) else str(v)
    print("  ".join(f"{k} {show(row[k])}" for k in keys), flush=True)


def timings(layers: dict[str, hope.MemoryConfig], batch=8, tokens=2048, device="cuda", bench=None) -> list[dict]:
    """Milliseconds by the kernels and by the reference, on this GPU: a chunk of all memories of a layer, forward and
    backward, and a whole layer over so many tokens without gradients."""
    if bench is None:
        from triton.testing import do_bench as bench

    rows = []
    for size, m in layers.items():
        c, (o, i) = m.chunk, shapes(m)[0]
        g = torch.Generator(device).manual_seed(0)
        rand = lambda *shape: torch.randn(batch, m.n_head, 1 + len(m.adaptive), *shape, device=device, generator=g)
        one = lambda *shape: rand(*shape)[:, :, :1].contiguous()  # what the memories of a head share
        args = dict(
            M=rand(o, i), m=rand(o, i), X=torch.nn.functional.normalize(one(c, i), dim=-1), D=rand(c, o), Q=one(c, i)
        )
        args |= {k: one(c).sigmoid() for k in ("eta", "alpha", "theta")}
        args = {k: v.requires_grad_() for k, v in args.items()}
        layer, x = hope.Memory(m).to(device), torch.randn(batch, tokens, m.d_model, device=device, generator=g)
        for choice in ("triton", "reference"):
            with kernels.using(choice):
                run = lambda: kernels.dgd_chunk(**args, ema=True, readers=1)
                out = run()
                grads = [torch.randn_like(z) for z in out]
                back = lambda: torch.autograd.grad(out, list(args.values()), grads, retain_graph=True)
                row = dict(kernels=choice, size=size, memory=f"{o}x{i}", forward_ms=bench(run), backward_ms=bench(back))
                with torch.no_grad():
                    row["layer_ms"] = bench(lambda: layer(x))
            rows.append(row)
            print_row(row, tuple(row))
    return rows


def counts(sizes: list[str], arch: str, tokens: int = 4096, batch: int = 8) -> list[dict]:
    """Launches, bytes and operations of a training step, forward and backward, a token, by part of the model."""
    import plan
    import train

    rows = []
    for size in sizes:
        config = train.TrainConfig(size=size, arch=arch, seq_len=tokens, batch_size=batch, truncate=True)
        parts = plan.forecast(hope.HopeConfig.preset(size, arch), config, batch, torch.bfloat16)
        for part, cost in (parts | {"all": plan.total(parts.values())}).items():
            row = dict(size=size, part=part, launches=cost.launches, MB=cost.moved / 1e6)
            row |= {"MFLOP float32": cost.float32 / 1e6, "MFLOP bfloat16": cost.bfloat16 / 1e6}
            row["MFLOP memory layers"] = cost.layers / 1e6
            rows.append({k: v if isinstance(v, str) else v / (tokens * batch) for k, v in row.items()})
            print_row(rows[-1], tuple(rows[-1]))
    return rows


def main() -> None:
    import measure  # which stands beside this file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--sizes", default=",".join(hope.HopeConfig.SIZES))
    parser.add_argument("--arch", default="hope", help="of hope.HopeConfig.ARCHS with memories")
    parser.add_argument("--kernels", default="", help="beginnings of their names, with commas; all if left out")
    parser.add_argument("--out", type=Path, help="directory for kernels.json")
    parser.add_argument("--gpu", action="store_true", help="run and time the kernels too; needs a GPU")
    parser.add_argument("--counts", action="store_true", help="print what a token takes in training instead")
    parser.add_argument("--measure", action="store_true", help="measure the GPU instead, for train.py --plan")
    parser.add_argument("--dry", action="store_true", help="measure: everything tiny, on a CPU")
    parser.add_argument("--groups", default=",".join(measure.GROUPS), help="measure: these of its groups")
    args = parser.parse_args()
    if args.measure:
        groups = args.groups.split(",")
        if unknown := set(groups) - set(measure.GROUPS):
            parser.error(f"--groups: {', '.join(sorted(unknown))} is not known; allowed: {', '.join(measure.GROUPS)}")
        if not args.dry and not torch.cuda.is_available():
            parser.error("--measure: torch sees no GPU here; --dry tries it on a CPU")
        if args.dry and not args.out:
            parser.error("--dry: say by --out where gpu.json goes, which --plan is not to take for a GPU's")
        sys.exit(measure.measure(args.dry, args.out or Path(__file__).parent, groups) > 0)
    targets, sizes = args.targets.split(","), args.sizes.split(",")
    for given, allowed, what in ((targets, TARGETS, "--targets"), (sizes, hope.HopeConfig.SIZES, "--sizes")):
        if unknown := set(given) - set(allowed):
            parser.error(f"{what}: {', '.join(sorted(unknown))} is not known; allowed: {', '.join(allowed)}")
    if args.counts:
        counts(sizes, args.arch)
        return
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no GPU here; leave it out")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    print("== what kernels take of a processor")
    results = {"occupation": occupation(targets, sizes, args.arch, tuple(args.kernels.split(",")))}
    print(
        "== one chunk of a layer by dgd_chunk, 2,048 tokens by the scan, batch 8; a matrix of d_model^2 by Newton-Schulz"
    )
    if "sm_75" in targets:
        print("   (on sm_75 the plain reference runs unless HOPE_KERNELS is triton)")
    results["floors"] = floors(sizes)
    if args.gpu:
        print("== times on this GPU")
        results["timings"] = timings({size: hope.HopeConfig.preset(size).memory for size in sizes})
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernels.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
