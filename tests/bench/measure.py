"""What a GPU really does with this model, in under ten minutes: `python tests/bench/gpu.py --measure`.

    python tests/bench/gpu.py --measure [--dry] [--out DIR] [--groups rates,kernels,...]

Every group runs in a process of its own, since a bad kernel poisons its process, and has a limit; together they stop
before 9.5 minutes. Prints a table and writes one file, DIR/gpu.json, anew after every group: `device`, from which
`train.py --plan` takes its constants where DIR is this folder, and `rows` by group. Needs torch, triton, einops, numpy,
safetensors and tqdm.
--dry does everything on a CPU, tiny, with the kernels in Triton's interpreter: its numbers say nothing.

    rates      launches, views, bandwidth, matrix products: the constants of --plan
    kernels    every Triton kernel against float64, and 30 repeats bit for bit
    layer      a layer in one launch, by chunks, the reference, the compiled reference; its rate, for --plan
    chunk      a chunk of a layer's memories: Triton, the reference, the compiled reference, by batch
    segment    a segment of training as configured and with the clocks of small sizes, by layers
    graphs     the same as a CUDA graph (--dry: what would be recorded, run again), beside itself without
    layers     whole models of the size: time and memory
    train      train.py itself: one rank of FSDP2, validation, a checkpoint
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fused
import graphs
import hope
import kernels
import plan

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {  # seconds
    "rates": 60, "kernels": 180, "layer": 200, "chunk": 90, "segment": 110, "graphs": 80, "layers": 80, "train": 90,
}  # fmt: skip
WHOLE = 560.0

Row = dict[str, Any]


class Bench:
    """Where and at what sizes to measure."""

    def __init__(self, dry: bool):
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.size, self.layers = ("tiny", (1, 2)) if dry else ("760m", (2, 6))
        self.name = "CPU" if dry else torch.cuda.get_device_name()

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, act: Callable[[], object], repeats: int = 20, warm: int = 3) -> float:
        """Of one call, when many follow each other; on a CPU without what other processes take of it."""
        clock = time.process_time if self.dry else time.perf_counter
        for _ in range(warm):
            act()
        self.wait()
        begun = clock()
        for _ in range(repeats):
            act()
        self.wait()
        return (clock() - begun) / repeats

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        g = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, device=self.device, generator=g).to(dtype)

    def peak(self) -> Row:
        return {} if self.dry else {"peak_GB": torch.cuda.max_memory_allocated() / 1e9}

    def forget(self) -> None:
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def launch_and_view(bench: Bench) -> tuple[float, float]:
    """Seconds from one small operation to the next, autograd's part included, and of a view."""
    small, w = bench.random(16), bench.random(16).requires_grad_()
    counts = {}
    for what, step in (("launch", lambda z: z * small), ("view", lambda z: z.view(4, 4).view(16))):

        def chain(length: int = 100) -> None:
            z = w * small
            for _ in range(length):
                z = step(z)
            z.sum().backward()

        with plan.Meter(plan.Device("", 0.0, 0.0, 1.0, 1.0, 1.0)) as meter:
            chain()
        counts[what] = plan.total(meter.parts.values()), bench.seconds(chain, 20)
    (a, launches), (b, views) = counts["launch"], counts["view"]
    # Two chains, two unknowns: seconds = operations x launch + views x view.
    matrix = torch.tensor([[a.launches, a.views], [b.launches, b.views]], dtype=torch.float64)
    return torch.linalg.solve(matrix, torch.tensor([launches, views], dtype=torch.float64)).tolist()


def rates(bench: Bench) -> Iterator[Row]:
    """What `plan.Device` holds, in the row "device", and what of it depends on the size."""
    n, long = (2**12, 2**16) if bench.dry else (2**10, 2**29)
    launch, view = launch_and_view(bench)
    yield dict(what="an operation, forward or backward", us=1e6 * launch)
    yield dict(what="a view", us=1e6 * view)
    least = launch
    if not bench.dry:
        graph, small = torch.cuda.CUDAGraph(), bench.random(16)
        z = small + small
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(200):
                z = z + small
        least = bench.seconds(graph.replay, 50) / 200
        yield dict(what="an operation in a graph", us=1e6 * least)
    bandwidth = 0.0
    for numbers in (n, long // 64, long):
        source = torch.ones(numbers, device=bench.device)
        target = torch.empty_like(source)
        bandwidth = 8 * numbers / bench.seconds(lambda: torch.add(source, 1.0, out=target), 20)
        yield dict(what=f"adding to {numbers:,} numbers", GB_s=bandwidth / 1e9)
    found = {}
    for dtype, precision in ((torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "high")):
        torch.set_float32_matmul_precision(precision)
        name = "bfloat16" if dtype == torch.bfloat16 else {"highest": "float32", "high": "tf32"}[precision]
        for d, count in ((64, 4096), (512, 64), (4096, 1)) if not bench.dry else ((16, 4), (64, 1)):
            x = bench.random(count, d, d, dtype=dtype)
            found[name, d] = 2 * count * d**3 / bench.seconds(lambda: x @ x, 20)
            yield dict(what=f"{count} products of {d} x {d}, {name}", TFLOP_s=found[name, d] / 1e12)
    torch.set_float32_matmul_precision("highest")
    # Products in float32 are the memories' small ones, in bfloat16 those of the weights.
    small_d, large_d = (16, 64) if bench.dry else (64, 4096)
    device = plan.Device(
        bench.name, launch, least, bandwidth, found["float32", small_d], found["bfloat16", large_d],
        view=max(0.0, view), alone=bench.dry,
    )  # fmt: skip
    yield dict(what="device", **asdict(device))


def kernel_calls(bench: Bench) -> Iterator[tuple[str, Callable[[str, torch.dtype], list[torch.Tensor]]]]:
    """Every kernel at the size's shapes: a call with a choice of kernels and a type -> what it computes."""
    m = hope.HopeConfig.preset(bench.size).memory
    c, e, heads = (24, 16, 1) if bench.dry else (m.chunk, m.d_head, m.n_head)
    lead = (2, heads, 1 + len(m.adaptive))

    def chunk(choice: str, dtype: torch.dtype) -> list[torch.Tensor]:
        args = chunk_arguments(bench, lead, c, e, dtype)
        with kernels.using(choice):
            out = kernels.dgd_chunk(**args, ema=True, readers=1)
            return [*out, *torch.autograd.grad(out, list(args.values()), [torch.ones_like(z) for z in out])]

    def memory_scan(choice: str, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = replace(m, d_model=e, n_head=1, chunk=8, chunk_proj=8) if bench.dry else m
        layer = hope.Memory(config).to(bench.device, dtype)
        x = bench.random(1 if bench.dry else 2, 2 * config.chunk, config.d_model, seed=1).to(dtype)
        with kernels.using(choice), torch.no_grad():
            y, state = layer(x)
        found = [y]
        hope.map_state(lambda z: found.append(z) or z, state)
        return found

    def orthogonal(choice: str, dtype: torch.dtype) -> list[torch.Tensor]:
        size = (48, 80) if bench.dry else (1536, 2112)
        with kernels.using(choice):
            return [kernels.newton_schulz(bench.random(*size).to(dtype))]

    def whole_layer(choice: str, dtype: torch.dtype) -> list[torch.Tensor]:
        layer, x = make_layer(bench, 1 if bench.dry else 2, dtype)
        with kernels.using(choice):
            return run_layer(layer, x)[1]

    yield from (("dgd_chunk, forward and backward", chunk), ("memory_scan", memory_scan), ("newton_schulz", orthogonal))
    yield "memory_layer, forward and backward", whole_layer


def make_layer(bench: Bench, batch: int, dtype: torch.dtype = torch.float32) -> tuple[hope.Memory, torch.Tensor]:
    """A layer of the size that keeps its states, and 512 tokens for it."""
    m = replace(hope.HopeConfig.preset(bench.size).memory, remat=0)
    if bench.dry:
        m = replace(m, d_model=16, n_head=1, chunk=8, chunk_proj=8, adaptive=("k",))
    torch.manual_seed(0)
    layer = hope.Memory(m).to(bench.device, dtype)
    x = bench.random(batch, 2 * m.chunk if bench.dry else 512, m.d_model, dtype=dtype, seed=1)
    return layer, x.requires_grad_()


def run_layer(layer: hope.Memory, x: torch.Tensor) -> tuple[Callable[[], list], list[torch.Tensor]]:
    """Its backward pass, which may be gone through again, and all it computes: output, state, gradients."""
    y, state = layer(x)
    out = [y, *state.main.now, *state.main.momentum]
    g = torch.Generator(x.device).manual_seed(2)
    seeds = [torch.randn(z.shape, device=z.device, generator=g).to(z) for z in out]
    wanted = [x, *layer.parameters()]
    back = lambda: list(torch.autograd.grad(out, wanted, seeds, retain_graph=True, allow_unused=True))
    return back, [z.detach() for z in (*out, *back()) if z is not None]


def chunk_arguments(bench: Bench, lead: tuple, c: int, e: int, dtype: torch.dtype = torch.float32) -> dict:
    draw = lambda *shape, seed=0, n=lead[2]: bench.random(*lead[:2], n, *shape, seed=seed)
    args = dict(
        M=draw(e, e), m=draw(e, e, seed=1), X=F.normalize(draw(c, e, seed=2, n=1), dim=-1), D=draw(c, e, seed=3)
    )
    args |= {name: draw(c, seed=4 + i, n=1).sigmoid() for i, name in enumerate(("eta", "alpha", "theta"))}
    args["Q"] = draw(c, e, seed=8, n=1)
    return {name: z.to(dtype).requires_grad_() for name, z in args.items()}


def largest_errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """Of every tensor, beside its largest number."""
    error = lambda a, b: (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-9)
    return [error(a, b).item() for a, b in zip(found, exact, strict=True)]


def check_kernels(bench: Bench) -> Iterator[Row]:
    repeats = 2 if bench.dry else 30
    for name, call in kernel_calls(bench):
        exact, first = call("reference", torch.float64), call("triton", torch.float32)
        errors = largest_errors(first, exact)
        same = all(
            all(torch.equal(a, b) for a, b in zip(first, call("triton", torch.float32))) for _ in range(repeats - 1)
        )
        yield dict(kernel=name, largest_error=max(errors), right=max(errors) < 2e-3, repeats=repeats, same_bits=same)


def chunk(bench: Bench) -> Iterator[Row]:
    m = hope.HopeConfig.preset(bench.size).memory
    ways = (("triton", "triton", "highest"), ("triton tf32", "triton", "high"), ("reference", "reference", "highest"))
    ways += (("reference tf32", "reference", "high"), ("compiled tf32", "reference", "high"))
    for batch in (1,) if bench.dry else (2, 8):
        args = chunk_arguments(bench, (batch, m.n_head, 1 + len(m.adaptive)), m.chunk, m.d_head)
        for how, choice, precision in ways:
            if bench.dry and (choice == "triton" or "compiled" in how):
                continue
            torch.set_float32_matmul_precision(precision)
            step = torch.compile(kernels.dgd_chunk, dynamic=False) if "compiled" in how else kernels.dgd_chunk
            try:
                with kernels.using(choice):
                    run = lambda: step(**args, ema=True, readers=1)
                    out = run()
                    ones = [torch.ones_like(z) for z in out]
                    back = lambda: torch.autograd.grad(out, list(args.values()), ones, retain_graph=True)
                    forward, backward = bench.seconds(run), bench.seconds(back)
                yield dict(how=how, batch=batch, forward_us=1e6 * forward, backward_us=1e6 * backward)
            except Exception as e:  # the others are still worth their time
                yield dict(how=how, batch=batch, failed=repr(e)[:300])
    torch.set_float32_matmul_precision("highest")


def layer(bench: Bench) -> Iterator[Row]:
    """The ways to compute a layer, and then their rate in the first. What is asked first is what decides; a way is
    compiled when it is its turn: that of `fused.memory_layer`'s backward pass takes most of a minute, every time."""
    ways = [("triton", fused.WARPS), ("chunks", 0), ("reference", 0), ("compiled", 0), ("triton 4 warps", 4)]
    exact = run_layer(*make_layer(bench, 2, torch.float64))[1]
    precisions, batches = (("highest",), (2,)) if bench.dry else (("highest", "high"), (8, 2))
    for precision, (how, warps), batch in product(precisions, ways, batches):
        if bench.dry and how not in ("reference", "triton") or how == "compiled" and batch == 2:
            continue
        torch.set_float32_matmul_precision(precision)
        of, x = make_layer(bench, batch)
        of.one_launch, of.compiled = warps > 0, how == "compiled"
        name = how + " tf32" * (precision == "high")
        before, fused.WARPS = fused.WARPS, warps
        meter = plan.Meter(plan.Device("", 0.0, 0.0, 1.0, 1.0, 1.0))
        try:
            with kernels.using("reference" if how in ("reference", "compiled") else "triton"):
                with meter if name == "triton" else nullcontext():
                    back, found = run_layer(of, x)
                repeats = dict(repeats=1, warm=0) if bench.dry else {}
                forward, backward = bench.seconds(lambda: of(x), **repeats), bench.seconds(back, **repeats)
            row = dict(how=name, batch=batch, forward_us=1e6 * forward, backward_us=1e6 * backward)
            yield row | (dict(largest_error=max(largest_errors(found, exact))) if batch == 2 else {})
            if name == "triton" and batch == batches[0]:
                yield dict(what="device", layers=plan.total(meter.parts.values()).layers / (forward + backward))
        except Exception as e:  # the others are still worth their time
            yield dict(how=name, batch=batch, failed=repr(e)[:300])
        finally:
            fused.WARPS = before
            bench.forget()
    torch.set_float32_matmul_precision("highest")


def make_model(bench: Bench, layers: int, clocks: tuple) -> hope.Hope:
    bench.forget()
    config = hope.HopeConfig.preset(bench.size, cms=clocks)
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = hope.Hope(replace(config, n_layer=layers, vocab_size=64 if bench.dry else 32000))
    torch.nn.init.normal_(model.head.weight, std=0.02)  # of zeros all other gradients would be
    return model


def train_segments(bench: Bench, layers: int, batch: int, clocks: tuple, repeats: int) -> Row:
    """Segments of training one after another, each with its backward pass and its writes."""
    model = make_model(bench, layers, clocks)
    x = torch.randint(model.config.vocab_size, (batch, int(clocks[0])), device=bench.device)
    state = [model.init_state(batch)]

    def segment() -> None:
        with torch.autocast(bench.device, torch.bfloat16):
            _, state[0] = model.observe(x, x, state[0], reduction="none", backward=True, truncate=True)

    seconds = bench.seconds(segment, repeats, 2)
    speed = batch * clocks[0] / seconds
    return dict(
        layers=layers, batch=batch, clocks=list(map(str, clocks)), ms=1e3 * seconds, tokens_s=speed, **bench.peak()
    )


def clock_choices(bench: Bench) -> list[tuple[int, tuple]]:
    """Batches and clocks: those of small sizes, and as configured."""
    fast, configured = (hope.HopeConfig.preset(size).cms for size in ("tiny", bench.size))
    return [(2, (16, 64, hope.INF))] if bench.dry else [(2, fast), (8, fast), (8, configured)]


def segment(bench: Bench) -> Iterator[Row]:
    for batch, clocks in clock_choices(bench):
        few, more = (train_segments(bench, n, batch, clocks, 4) for n in bench.layers)
        yield from (few, more)
        per_layer = (more["ms"] - few["ms"]) / (bench.layers[1] - bench.layers[0])
        n = hope.HopeConfig.preset(bench.size).n_layer
        whole = few["ms"] + per_layer * (n - bench.layers[0])
        row = dict(layers=f"{n} foretold", batch=batch, clocks=few["clocks"], ms=whole)
        yield row | dict(tokens_s=1e3 * batch * clocks[0] / whole, ms_per_layer=per_layer)


def one_round(bench: Bench, batch: int, clocks: tuple) -> Iterator[Row]:
    """A round of the slowest clock from a start state, as `observe` goes through it and by graphs; and how far their
    losses and gradients differ."""
    autocast = lambda: torch.autocast(bench.device, torch.bfloat16)
    model, length = make_model(bench, bench.layers[1], clocks), int(clocks[1])
    x, y = torch.randint(model.config.vocab_size, (2, batch, length), device=bench.device)
    row = dict(layers=bench.layers[1], batch=batch, clocks=list(map(str, clocks)))

    def plain() -> torch.Tensor:
        with autocast():
            return model.observe(x, y, reduction="none", backward=True, truncate=True)[0].sum()

    def timed(act: Callable[[], object]) -> Row:
        seconds = bench.seconds(act, 3, 1) / (length / clocks[0])
        return dict(ms=1e3 * seconds, tokens_s=batch * clocks[0] / seconds, **bench.peak())

    loss = plain().item()
    expected = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    yield dict(how="plain", **row, **timed(plain))
    begun = time.perf_counter()
    captured = graphs.Captured(model, batch, length, autocast)
    captured.zero_gradients()
    bench.wait()
    row |= dict(graphs=len(captured.records), to_capture_s=time.perf_counter() - begun)
    norm = lambda tensors: torch.stack([z.norm() for z in tensors]).norm()
    row["loss_error"] = abs(captured(x, y).item() / loss - 1)
    row["gradient_error"] = (norm(p.grad - g for p, g in expected.items()) / norm(expected.values())).item()
    yield dict(how="captured", **row, **timed(lambda: captured(x, y)))


def by_graphs(bench: Bench) -> Iterator[Row]:
    for batch, clocks in clock_choices(bench):
        yield from one_round(bench, batch, clocks)


def layers(bench: Bench) -> Iterator[Row]:
    n = hope.HopeConfig.preset(bench.size).n_layer
    for batch, clocks in clock_choices(bench):
        yield train_segments(bench, n, min(batch, 4), clocks, 3)


# train.py where matplotlib may be missing: then there is no loss.png.
TRAIN = f"""
import runpy, sys
from unittest.mock import MagicMock
try:
    import matplotlib.figure
except ImportError:
    sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = MagicMock()
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


def train(bench: Bench) -> Iterator[Row]:
    """One rank of FSDP2 over NCCL (gloo): two steps, a checkpoint, and on from there."""
    size = ["--size", "tiny" if bench.dry else "60m", "--seq-len", "64" if bench.dry else "2048"]
    how = "--tokenizer bytes --parallel fsdp --truncate --optimizer adamw --batch-size 2".split()
    how += ["--save-every", "2", "--eval-every", "2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "train_here.py")
        script.write_text(TRAIN)
        for steps in ("2", "4"):
            begun = time.perf_counter()
            command = [
                *launch,
                str(script),
                *size,
                *how,
                "--steps",
                steps,
                "--schedule",
                "wsd",
                "--out",
                f"{folder}/run",
            ]
            ended = subprocess.run([*command, "--data-dir", folder], capture_output=True, text=True, cwd=ROOT)
            if ended.returncode:
                raise RuntimeError(ended.stderr[-1500:])
            last = json.loads(Path(folder, "run/log.jsonl").read_text().splitlines()[-1])
            yield dict(
                steps=last["step"],
                seconds=time.perf_counter() - begun,
                loss=last["loss"],
                tokens_s=last["tokens_per_s"],
            )


GROUPS = {
    "rates": rates,
    "kernels": check_kernels,
    "layer": layer,
    "chunk": chunk,
    "segment": segment,
    "graphs": by_graphs,
    "layers": layers,
    "train": train,
}


def show(row: Row) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def run_group(name: str, dry: bool, path: Path) -> None:
    """In a process of its own: the group's rows, as lines of JSON, until it ends or is ended."""
    bench = Bench(dry)
    with open(path, "w", buffering=1) as file:
        try:
            for row in GROUPS[name](bench):
                file.write(json.dumps(row) + "\n")
                print(f"  {show(row)}", flush=True)
        except Exception as e:
            file.write(json.dumps({"failed": repr(e)[:500]}) + "\n")
            print("  FAILED " + traceback.format_exc()[-2000:], flush=True)


def measure(dry: bool, out: Path, groups: list[str]) -> int:
    """All groups one after the other; the number of those that failed or were stopped."""
    out.mkdir(parents=True, exist_ok=True)
    begun, result, bad = time.perf_counter(), {"torch": torch.__version__, "dry": dry, "rows": {}}, 0
    environment = os.environ | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else {})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        for name in groups:
            limit = 900.0 if dry else min(LIMITS[name], WHOLE - (time.perf_counter() - begun))
            print(f"== {name}", flush=True)
            path = Path(folder, name)
            command = [sys.executable, "-u", __file__, "--group", name, "--to", str(path), *["--dry"] * dry]
            try:
                subprocess.run(command, timeout=max(1.0, limit), env=environment)
                stopped = []
            except subprocess.TimeoutExpired:
                stopped = [{"failed": f"stopped after {limit:.0f} s"}]
                print(f"  stopped after {limit:.0f} s", flush=True)
            rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            rows = (rows + stopped) or [{"failed": "the process died"}]
            bad += any("failed" in row or row.get("right") is False or row.get("same_bits") is False for row in rows)
            result["rows"][name] = rows
            for row in rows:
                if row.get("what") == "device":
                    result.setdefault("device", {}).update({k: v for k, v in row.items() if k != "what"})
            (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{out / 'gpu.json'}: {time.perf_counter() - begun:.0f} s, {bad} of {len(groups)} groups with a fault")
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    run_group(given.group, given.dry, given.to)
