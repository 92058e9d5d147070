"""What `--plan` says: memory against torch's allocator, counts against arithmetic by hand, and what it calls the longest."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import backend
import fused
import hope
import kernels
import plan
import train

ROOT = Path(plan.__file__).parent
README = (ROOT / "README.md").read_text()
SMALL = ["--plan", "--arch", "transformer++", "--seq-len", "32"]


def peak_bytes(config: train.TrainConfig, model_config: hope.HopeConfig) -> float:
    """What torch's allocator has given out at most in a step, weights and optimizer included."""
    torch.manual_seed(0)
    world, model = train.World(config), hope.Hope(model_config)
    model.recompute = config.recompute
    optimizers = train.make_optimizers(model, config)
    x = torch.randint(model_config.vocab_size, (config.batch_size, config.seq_len))
    for i in range(2):
        with torch.profiler.profile(profile_memory=True) as seen:
            train.find_gradients(model, x, x, config, world)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    kept = [v for optimizer in optimizers for state in optimizer.state.values() for v in state.values()]
    return peak + 4 * sum(t.numel() for t in [*model.parameters(), *kept])


def planned(capsys, *args: str) -> dict[str, list[float]]:
    """The rows of --plan's table: bytes of parameters, gradients, optimizer, states, activations, peak."""
    assert train.main(["--plan", *args]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^(ddp|fsdp) +([\d. ]+)$", out, re.M)
    return {name: [1e9 * float(x) for x in row.split()] for name, row in rows}


@pytest.mark.parametrize(
    "size, settings",
    [
        ("tiny", dict(seq_len=128, batch_size=2)),
        ("tiny", dict(seq_len=256, batch_size=2, arch="transformer++", optimizer="adamw")),
        ("tiny", dict(seq_len=128, batch_size=2, truncate=True, recompute=True)),
        ("tiny", dict(seq_len=128, batch_size=6, truncate=True, micro_batch=3)),
        pytest.param("60m", dict(seq_len=256, batch_size=2, optimizer="adamw"), marks=pytest.mark.slow),
    ],
)
def test_the_plan_foretells_the_memory_of_a_step(size, settings, capsys, monkeypatch):
    monkeypatch.setenv("HOPE_KERNELS", "reference")
    config = train.TrainConfig(size=size, precision="float32", **settings)
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in settings.items()]
    foretold = planned(capsys, "--size", size, "--precision", "float32", *flags)["ddp"][5]
    assert foretold == pytest.approx(peak_bytes(config, hope.HopeConfig.preset(size, config.arch)), rel=0.15)


class NoLaunch:
    def __getitem__(self, grid):
        return lambda *args, **settings: None


@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
@pytest.mark.parametrize("remat", [0, 1])
def test_the_plan_foretells_the_memory_of_layers_in_one_launch(remat, capsys, monkeypatch):
    """All is allocated as on a GPU; what the kernels would write into it is left out."""
    settings = dict(seq_len=256, batch_size=2, truncate=True)
    flags = ["--precision", "float32", "--seq-len=256", "--batch-size=2", "--truncate", "--cms=256,inf"]
    foretold = planned(capsys, *flags, f"--remat={remat}")["ddp"][5]
    monkeypatch.setattr(fused, "layers_by_triton", lambda z: True)
    for name in ("_layer_forward", "_layer_backward_chunks"):
        monkeypatch.setattr(fused, name, NoLaunch())
    model = hope.HopeConfig.preset("tiny", cms=(256, hope.INF), remat=remat)
    assert foretold == pytest.approx(peak_bytes(train.TrainConfig(precision="float32", **settings), model), rel=0.15)


COUNT_PRODUCTS = """
import torch, hope, kernels, fused
from torch.utils.flop_counter import flop_registry
from triton.runtime.interpreter import InterpreterBuilder

multiplied = 0

def counting(self, a, b, *rest, dot=InterpreterBuilder.create_dot):
    global multiplied
    multiplied += a.data.size * b.data.shape[-1]
    return dot(self, a, b, *rest)

InterpreterBuilder.create_dot = counting
fused.precision = lambda device: "ieee"  # a product is one

def compared(name):
    run, formula = getattr(fused, name), flop_registry[getattr(torch.ops.hope, name)]

    def call(*args):
        global multiplied
        if layer.config.chunk == 16:  # shapes, as said; outputs that share nothing with each other and with inputs
            torch.library.opcheck(run, args, test_utils=("test_schema", "test_faketensor"))
        multiplied = 0
        out = run(*args)
        print(name, 2 * multiplied, formula(*args, out_val=out))
        return out

    return call

fused.layer_forward, fused.layer_backward = map(compared, ("layer_forward", "layer_backward"))
for chunk, more in (
    (16, {}),
    (64, dict(adaptive=(), expand=2, self_values=False, origin="zero")),
    (32, dict(adaptive=("q",), objective="l2")),
):
    layer = hope.Memory(hope.MemoryConfig(d_model=32, n_head=2, chunk=chunk, chunk_proj=chunk, remat=1, **more))
    layer(torch.randn(1, chunk * (1 + (chunk == 16)), 32))[0].sum().backward()
"""


@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
def test_the_products_of_a_memory_layer_are_as_many_as_the_plan_says():
    """Exactly those that Triton's interpreter is asked for, forward, forward again and backward."""
    env = os.environ | {"TRITON_INTERPRET": "1", "HOPE_KERNELS": "triton", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", COUNT_PRODUCTS], env=env, capture_output=True, text=True)
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [name for name, *_ in lines] == 3 * ["layer_forward", "layer_forward", "layer_backward"], run.stderr[-3000:]
    assert all(did == said and int(did) > 1e5 for _, did, said in lines), run.stdout


def test_the_plan_for_a_gpu_counts_a_memory_layer_as_one_operation_each_way(monkeypatch):
    settings = dict(d_model=64, n_head=2, n_layer=1, chunk=16, chunk_proj=16, cms=(64, hope.INF))
    config = train.TrainConfig(seq_len=64, truncate=True)

    def count(remat: int) -> plan.Cost:
        model = hope.HopeConfig.preset("tiny", remat=remat, **settings)
        return plan.rehearse(model, config, 2, 64, torch.float32)["memories"]

    kept, again = count(remat=0), count(remat=1)
    assert again.layers > kept.layers > 0
    assert again.launches == kept.launches + 2  # the forward pass once more, and a copy of the last of two states
    # Bytes of the forward pass: 2 x 2 heads, 5 memories of 4 matrices of 32^2, whose states 4 chunks read and write. They
    # are first put together, and at the end copied.
    states, start = 4 * 4 * 5 * 4 * 32**2, 4 * 2 * 5 * 32**2
    streams = 4 * 4 * 64 * (4 * 32 + 32 + 1 + 32)  # u, an input for each of four; q; theta; y
    shared = start + 4 * 2 * (5 + 2 * (32 + 1))  # factors of values, read-outs
    assert again.moved - kept.moved == streams + shared + (2 + 2 * 4) * states + 2 * states
    monkeypatch.setenv("HOPE_KERNELS", "reference")
    plain = count(remat=0)
    assert plain.layers == 0 and plain.launches > 3 * kept.launches and plain.moved > 2 * kept.moved
    monkeypatch.delenv("HOPE_KERNELS")
    cpu = plan.Device("CPU", 1e-6, 0.0, 1e10, 1e10, 1e10, alone=True)
    monkeypatch.setattr(plan.Device, "known", lambda: cpu)
    alone = count(remat=0)
    assert (alone.launches, alone.moved, alone.layers) == (plain.launches, plain.moved, 0)


@pytest.mark.parametrize(
    "rows, fits",
    [
        ({"layer": [("triton", 8, 9.0), ("compiled", 8, 10.0), ("triton", 2, 3.0), ("chunks", 2, 2.0)]}, True),
        ({"layer": [("triton", 8, 9.0), ("reference", 8, 10.0), ("compiled", 8, 8.0)]}, False),
        ({"layer": [("triton", 8, 9.0), ("reference tf32", 8, 8.0), ("triton 4 warps", 8, 12.0)]}, True),
        ({"layer": [("triton", 8, None), ("reference", 8, 10.0)]}, False),  # it failed
        ({"layer": [("triton", 8, 9.0), ("compiled", 8, 10.0)], "kernels": [False]}, False),  # it is wrong
        ({"layer": [("triton", 8, 9.0), ("compiled", 8, 10.0)], "kernels": [True]}, True),
    ],
)
def test_a_memory_layer_takes_one_launch_where_that_was_right_and_fastest(rows, fits, tmp_path, monkeypatch):
    timed = lambda how, batch, us: (
        dict(how=how, batch=batch) | (dict(forward_us=us, backward_us=us) if us else dict(failed="no"))
    )
    found = {"layer": [timed(*row) for row in rows["layer"]]}
    found["kernels"] = [
        dict(kernel="memory_layer, forward and backward", right=right, same_bits=True)
        for right in rows.get("kernels", [])
    ]
    os.makedirs(tmp_path / "tests/bench")
    (tmp_path / "tests/bench/gpu.json").write_text(json.dumps({"device": {"name": "card"}, "rows": found}))
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "backend.py"))
    backend.slow_at.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    monkeypatch.setattr(backend, "capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "triton", backend)
    z = SimpleNamespace(is_cuda=True, is_meta=False, device="cuda")
    assert backend.layers_by_triton(z) == fits
    with backend.foreseen_on_gpu():
        assert backend.layers_by_triton(torch.zeros(1, device="meta")) == fits
    with backend.using("triton"):
        assert backend.layers_by_triton(z)
    backend.slow_at.cache_clear()


def test_tensors_without_numbers_take_one_launch_only_where_a_gpu_is_foreseen():
    m, x = hope.MemoryConfig(d_model=32, n_head=1, chunk=16, chunk_proj=16), torch.zeros(1, device="meta")
    assert not fused.layer_fits(m, x)
    with backend.foreseen_on_gpu():
        assert fused.layer_fits(m, x) and not fused.layer_fits(m, torch.zeros(1))
        assert not kernels.uses_triton(x)  # chunks by themselves are counted in the plain form
        assert not fused.layer_fits(hope.MemoryConfig(d_model=32, n_head=1, chunk=128, chunk_proj=128), x)
        with kernels.using("reference"):
            assert not fused.layer_fits(m, x)
    assert not fused.layer_fits(m, x)


@pytest.mark.parametrize("optimizer", plan.KEPT)
def test_optimizers_keep_as_many_numbers_as_the_plan_says(optimizer):
    model, config = (
        hope.Hope(hope.HopeConfig.preset("tiny", n_layer=1)),
        train.TrainConfig(optimizer=optimizer, ema=0.5),
    )
    optimizers = train.make_optimizers(model, config)
    tokens = torch.zeros(1, 2, dtype=torch.long)
    model.observe(tokens, tokens, backward=True)
    for o in optimizers:
        o.step()
    for kind, of_each in (("matrix", plan.KEPT[optimizer]), ("rest", 2.0)):
        weights = hope.param_groups(model)[kind]
        kept = sum(v.numel() for o in optimizers for p in weights for v in o.state.get(p, {}).values())
        of_each += bool(config.ema)  # the plan adds the average of the weights to what KEPT says
        assert kept / sum(p.numel() for p in weights) == pytest.approx(of_each, abs=1e-3)


def test_the_plan_counts_the_tokens_of_the_tokenizer(capsys):
    assert train.main(["--plan", "--size", "60m", "--arch", "transformer++", "--tokenizer", "train:8000"]) == 0
    assert "4,096,000 embed tokens" in capsys.readouterr().out
    assert train.main(["--plan", "--tokenizer", "train:8"]) == 2
    assert "a number of tokens from 257" in capsys.readouterr().err


@pytest.mark.parametrize("arch", [pytest.param("hope", marks=pytest.mark.slow), "hope-attention"])
def test_the_plan_of_a_long_stream_is_extended_from_short_ones(arch):
    config, dtype = train.TrainConfig(seq_len=384), torch.float32
    model = hope.HopeConfig.preset("tiny", arch, d_model=32, n_head=2, n_layer=3, chunk=64, cms=(64, hope.INF))
    whole, extended = (
        f.values() for f in (plan.rehearse(model, config, 2, 384, dtype), plan.forecast(model, config, 2, dtype))
    )
    assert list(plan.total(extended)) == pytest.approx(list(plan.total(whole)), rel=0.02)


def test_the_plan_of_many_gpus(capsys):
    flags = ["--size", "1.3b", "--arch", "transformer++", "--batch-size", "64", "--seq-len", "64", "--gpus", "8"]
    table = planned(capsys, *flags)
    p = sum(w.numel() for w in hope_on_meta("1.3b", "transformer++").parameters())
    assert table["ddp"][:2] == pytest.approx([4 * p, 4 * p], rel=1e-2)
    assert table["fsdp"][2] == pytest.approx(table["ddp"][2] / 8, rel=1e-2)
    assert table["fsdp"][5] < table["ddp"][5]
    train.main(["--plan", *flags, "--tokens", "1e11"])
    out = capsys.readouterr().out
    flops = float(re.search(r"([\d.e+]+) operations a token", out)[1])
    speed, used, days = re.search(r"8 x H100: ([\d,]+) tokens/s, ([\d.]+)% of .*, ([\d.e+-]+) days", out).groups()
    speed, used, days = float(speed.replace(",", "")), float(used) / 100, float(days)
    assert flops == pytest.approx(6 * p, rel=0.1)  # short rows: attention itself hardly counts
    assert days == pytest.approx(1e11 / speed / 86400, rel=0.02)
    assert used == pytest.approx(speed * flops / (8 * 400e12), rel=0.02)
    assert train.main(["--plan", *flags, "--gpus", "5"]) == 2


def test_the_table_of_the_readme_is_what_the_plan_printed():
    """As book/runs/plans.py keeps it: memory of a GPU, tokens a second and days on eight, for the README's commands."""
    plans = json.loads((ROOT / "book/runs/plans.json").read_text())["plans"]
    rows = re.findall(r"^\| (\S+) \| .* \| (\d) \| (\d+) GB \| ([\d,]+) \| ([\d.]+) \|$", README, re.M)
    assert [row[0] for row in rows] == ["340m", "760m", "1.3b"]
    peak_of = lambda printed: float(re.search(r"^fsdp.* ([\d.]+)$", printed, re.M)[1])
    for size, rows_at_once, memory, speed, days in rows:
        plan_of = plans[f"{size}, as in the README"]
        printed = "\n".join(plan_of["printed"])
        assert f" --size {size} " in plan_of["command"] and f" --micro-batch {rows_at_once} " in plan_of["command"]
        assert f"{peak_of(printed):.0f}" == memory and peak_of(printed) < 80
        assert f" {speed} tokens/s" in printed and f" {days} days" in printed and "which no GPU has run" in printed
        # The README's own command trains with what was planned.
        assert size == "340m" or f"--size {size} --steps" in README and f"--micro-batch {rows_at_once} $R" in README
    said = re.sub(r"\s+", " ", README)
    days, speed, memory = re.search(r"760m takes ([\d.]+) days, at ([\d,]+) tokens/s in (\d+) GB", said).groups()
    plain = "\n".join(plans["760m, plain memories"]["printed"])
    assert f" {speed} tokens/s" in plain and f" {days} days" in plain and f"{peak_of(plain):.0f}" == memory
    days, memory = re.search(r"keeps all their states: ([\d.]+) days, in (\d+) GB", said).groups()
    kept = "\n".join(plans["760m, nothing recomputed"]["printed"])
    assert f" {days} days" in kept and f"{peak_of(kept):.0f}" == memory
    days = re.search(r"760m takes ([\d.]+) days with `--cms", said)[1]
    assert f" {days} days" in "\n".join(plans["760m, fast clocks"]["printed"])
    assert "--seq-len 4096 --batch-size 128 --truncate --remat 1" in README


def hope_on_meta(size: str, arch: str) -> hope.Hope:
    with torch.device("meta"):
        return hope.Hope(hope.HopeConfig.preset(size, arch))


def test_one_gpu_is_one_gpu_and_two_are_two(capsys):
    for gpus, text in (("1", "tokens on 1 GPU, "), ("2", "tokens on 2 GPUs, ")):
        assert train.main([*SMALL, "--gpus", gpus]) == 0 and text in capsys.readouterr().out


def test_the_plan_counts_launches_bytes_and_arithmetic_and_takes_the_larger_of_each():
    device = plan.Device("slow", launch=1.0, least=2.0, bandwidth=8.0, float32=100.0, bfloat16=1000.0, view=0.5)
    a, b = torch.ones(4, 8), torch.ones(8, 16)
    with plan.Meter(device) as meter:
        c = a @ b  # 4 (32 + 128 + 64) bytes, 2 x 4 x 8 x 16 operations
        c.mT.reshape(-1)[:2].view(2)  # of these only reshape copies: 2 x 256 bytes
        a[0, :1].add_(1.0)  # 8 bytes, fewer than the least time takes
        a.bfloat16() @ b.bfloat16()  # 6 bytes an element to turn, 2 x (32 + 128 + 64) bytes
    cost = plan.total(meter.parts.values())
    moved = [896, 512, 8, 6 * 32, 6 * 128, 448]
    assert (cost.launches, cost.moved, cost.float32, cost.bfloat16) == (6, sum(moved), 1024, 1024)
    assert cost.work() == pytest.approx(sum(max(2.0, z / 8) for z in moved)) and cost.by_least == 2.0
    assert cost.given(device) == 6 + 0.5 * cost.views and cost.views >= 4
    assert cost.seconds(device) == cost.work() > cost.given(device)
    assert cost.seconds(replace(device, alone=True)) == cost.work() + cost.given(device)
    quick = replace(device, bandwidth=1e9, float32=1e2)
    with plan.Meter(quick) as meter:
        a @ b
    assert plan.total(meter.parts.values()).by_arithmetic == pytest.approx(10.24)


def test_an_operation_belongs_to_the_part_that_made_it_necessary():
    """What layers and the rest take is counted apart, forward and backward: a layer more changes the layers' only."""
    settings = dict(d_model=32, n_head=2, chunk=16, cms=(16, hope.INF))
    config, count = train.TrainConfig(seq_len=32, truncate=True), []
    for n in (1, 2):
        model = hope.HopeConfig.preset("tiny", n_layer=n, **settings)
        count.append(plan.rehearse(model, config, 2, 32, torch.float32))
    one, two = count
    assert all(getattr(one["the rest"], n) == getattr(two["the rest"], n) for n in ("launches", "moved", "float32"))
    for part in ("memories", "CMS", "CMS writes", "norms and sums"):
        assert two[part].launches == pytest.approx(2 * one[part].launches, rel=0.02) and one[part].launches > 0
    d, vocab = 32, model.vocab_size
    assert one["the rest"].float32 == 3 * 2 * (2 * 32) * d * vocab  # the head: forward, and to weights and to inputs
    hidden = model.cms_hidden * d
    assert one["CMS"].float32 == 3 * 2 * (2 * 32) * 2 * 2 * d * hidden  # two levels of two matrices


def lines_of(out: str) -> dict[str, float]:
    return {
        name: float(s)
        for name, s in re.findall(r"^ +(launches|work|bytes|arithmetic|least) +([\d.e+-]+) s ", out, re.M)
    }


@pytest.mark.parametrize("bound", ["launches", "bytes", "arithmetic", "least"])
def test_what_the_plan_calls_the_longest_is_so_in_what_it_prints(bound, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "__file__", str(tmp_path / "plan.py"))
    os.makedirs(tmp_path / "tests/bench")
    slow = {"launches": dict(launch=1.0), "bytes": dict(bandwidth=1.0), "arithmetic": dict(float32=1.0)}
    settings = dict(launch=1e-9, least=1e-9, bandwidth=1e15, float32=1e15, bfloat16=1e15) | slow.get(
        bound, dict(least=1.0)
    )
    device = plan.Device("card", **settings)
    (tmp_path / "tests/bench/gpu.json").write_text(json.dumps({"device": asdict(device)}))
    assert train.main([*SMALL, "--precision", "float32"]) == 0
    out = capsys.readouterr().out
    found, marked = lines_of(out), re.findall(r"^ +(\w+) .*<- what takes longest", out, re.M)
    assert "card (measured)" in out
    assert marked == ["launches" if bound == "launches" else "work"] == [max(("launches", "work"), key=found.get)]
    parts = {name: found[name] for name in ("bytes", "arithmetic", "least")}
    assert sum(parts.values()) == pytest.approx(found["work"], rel=0.01)
    assert bound == "launches" or max(parts, key=parts.get) == bound
    config = train.TrainConfig(seq_len=32)
    step = float(re.search(r"an optimizer's step: .* ([\d.e+-]+) s$", out, re.M)[1]) + max(
        found["launches"], found["work"]
    )
    speed = float(re.search(r"1 x card: ([\d,]+) tokens/s", out)[1].replace(",", ""))
    assert speed == pytest.approx(config.batch_size * 32 / step, rel=0.02, abs=1)


def test_the_plan_says_what_it_assumes_and_refuses_a_damaged_measurement(tmp_path, monkeypatch, capsys):
    assert train.main(SMALL) == 0 and "H100 (assumed; " in capsys.readouterr().out
    monkeypatch.setattr(plan, "__file__", str(tmp_path / "plan.py"))
    os.makedirs(tmp_path / "tests/bench")
    (tmp_path / "tests/bench/gpu.json").write_text("{}")
    assert train.main(SMALL) == 2 and "gpu.json cannot be used" in capsys.readouterr().err


def test_the_plan_says_that_memory_layers_in_one_launch_are_untried(tmp_path, monkeypatch, capsys):
    """Until they are measured; then it takes their rate."""
    flags = ["--plan", "--seq-len", "64", "--truncate"]
    monkeypatch.setattr(plan, "__file__", str(tmp_path / "plan.py"))
    os.makedirs(tmp_path / "tests/bench")
    device = plan.Device("card", 6e-6, 2e-6, 3e12, 4e13, 4e14)
    for measured, choice, untried, rate in (
        (0.0, "auto", True, "of memory layers at 4e+13"),
        (5e13, "auto", False, "of memory layers at 5e+13"),
        (0.0, "reference", False, None),
    ):
        path = tmp_path / "tests/bench/gpu.json"
        path.write_text(json.dumps({"device": asdict(replace(device, layers=measured))}))
        with kernels.using(choice):
            assert train.main(flags) == 0
        out = capsys.readouterr().out
        assert ("which no GPU has run" in out) == untried and ("memory layers" in out) == bool(rate)
        assert not rate or rate in out


@pytest.mark.parametrize("optimizer", plan.KEPT)
def test_the_optimizers_step_is_counted_for_every_layer(optimizer):
    config = train.TrainConfig(optimizer=optimizer)
    model = hope.HopeConfig.preset("tiny", n_layer=3, d_model=32, n_head=2)
    thin = plan.step_cost(replace(model, n_layer=1), config, train.make_optimizers)
    whole = plan.step_cost(model, config, train.make_optimizers)
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in hope.Hope(m).parameters()) for m in (replace(model, n_layer=1), model)]
    assert whole.launches > thin.launches > 0
    # To clip, gradients are read, and scaled in place; an optimizer reads and writes at least the weights.
    assert whole.moved - thin.moved >= 4 * (sizes[1] - sizes[0]) * (3 + 3)


def measured_dry(out: Path, groups: str) -> dict:
    """tests/bench/gpu.py --measure on this CPU."""
    command = [
        sys.executable,
        str(ROOT / "tests/bench/gpu.py"),
        "--measure",
        "--dry",
        "--groups",
        groups,
        "--out",
        str(out),
    ]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads((out / "gpu.json").read_text())
    assert found["dry"] and list(found["rows"]) == groups.split(",")
    assert not any("failed" in row for rows in found["rows"].values() for row in rows)
    return found


@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
def test_the_measurement_of_a_gpu_runs_dry_and_the_plan_takes_its_constants(tmp_path, monkeypatch, capsys):
    found = measured_dry(tmp_path / "tests/bench", "rates,kernels,layer,segment,graphs")
    device = plan.Device(**found["device"])
    assert device.name == "CPU" and 1e-7 < device.launch < 1e-3 and device.bandwidth > 1e8 and device.float32 > 1e8
    checked = found["rows"]["kernels"]
    assert [row["kernel"].split(",")[0] for row in checked] == [
        "dgd_chunk",
        "memory_scan",
        "newton_schulz",
        "memory_layer",
    ]
    assert all(row["right"] and row["same_bits"] for row in checked)
    ways = [row for row in found["rows"]["layer"] if "how" in row]
    assert [row["how"] for row in ways] == ["triton", "reference"] and device.layers > 0
    assert all(row["largest_error"] < 1e-4 and row["backward_us"] > row["forward_us"] > 0 for row in ways)
    assert all(row["ms"] > 0 and row["tokens_s"] > 0 for row in found["rows"]["segment"] + found["rows"]["graphs"])
    plain, captured = found["rows"]["graphs"]
    assert (plain["how"], captured["how"]) == ("plain", "captured") and captured["graphs"] == 4  # in a chunk of 64
    assert captured["loss_error"] < 1e-3 and captured["gradient_error"] < 1e-2
    monkeypatch.setattr(plan, "__file__", str(tmp_path / "plan.py"))
    assert train.main(SMALL) == 0
    out = capsys.readouterr().out
    assert "on a CPU (measured)" in out and "1 x CPU: " in out and "assumed" not in out


@pytest.mark.slow
@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
def test_the_rest_of_the_measurement_runs_dry(tmp_path):
    found = measured_dry(tmp_path, "chunk,layers,train")
    assert "device" not in found and [row["steps"] for row in found["rows"]["train"]] == [2, 4]


def test_a_measurement_needs_a_gpu_or_to_be_dry(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for more, said in (
        ([], "torch sees no GPU here; --dry tries it"),
        (["--dry"], "say by --out where"),
        (["--groups", "a"], "a is not known"),
    ):
        run = subprocess.run([sys.executable, str(ROOT / "tests/bench/gpu.py"), "--measure", *more],
                             env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)  # fmt: skip
        assert run.returncode == 2 and said in run.stderr


@pytest.mark.slow
def test_a_step_takes_as_long_on_this_cpu_as_the_plan_foretells():
    """Within 30%, with constants that were measured just before, on other architectures."""
    run = subprocess.run([sys.executable, str(ROOT / "tests/bench/forecast.py")], env=os.environ | {"PYTHONPATH": str(ROOT)},
                         capture_output=True, text=True)  # fmt: skip
    ratios = {arch: float(ratio) for arch, ratio in re.findall(r"^tiny +(\S+) .* ratio ([\d.]+);", run.stdout, re.M)}
    assert set(ratios) == {"hope", "transformer++"} and all(0.7 < ratio < 1.3 for ratio in ratios.values()), (
        run.stdout + run.stderr
    )
