"""Several processes train as one: what they compute, what they hold, and what passes between one process and two.

Launching takes seconds, so one launch of two processes by torchrun makes all runs (this file, as a script); the same runs are
made by one process, and the tests compare.
"""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hope
import train
from data import Corpus

SMALL = dict(vocab_size=256, d_model=32, n_head=2, n_layer=2, chunk=16, chunk_proj=16)
WRITES = dict(SMALL, cms=(16, 32, hope.INF), cms_rate=(4.0, 2.0))
MODELS = {
    "hope": hope.HopeConfig.preset("tiny", "hope", **WRITES),
    "hope-attention": hope.HopeConfig.preset("tiny", "hope-attention", **WRITES),
    "transformer++": hope.HopeConfig.preset("tiny", "transformer++", **SMALL),
}
# Runs of one process: architecture and settings.
ALONE = {f"{arch}-{o}": (arch, dict(optimizer=o)) for arch in MODELS for o in ("adamw", "m3")} | {
    "hope-truncated": ("hope", dict(truncate=True)),
    "hope-muon": ("hope", dict(optimizer="muon")),
}
# Runs of two: which of those they must equal, and what differs. All at the default learning rate.
RUNS = {
    f"{name}-{kind}": (name, dict(parallel=kind))
    for name in ALONE
    if name != "hope-truncated"
    for kind in ("ddp", "fsdp")
} | {
    "hope-micro-ddp": ("hope-adamw", dict(parallel="ddp", micro_batch=1)),
    "hope-recompute-fsdp": ("hope-adamw", dict(parallel="fsdp", recompute=True)),
    "hope-hsdp": ("hope-adamw", dict(parallel="fsdp", nodes=2)),
    "hope-truncated-fsdp": ("hope-truncated", dict(parallel="fsdp", micro_batch=1)),
}
CONFIG = train.TrainConfig(
    data="text.txt",
    steps=20,
    batch_size=4,
    seq_len=48,
    optimizer="adamw",
    eval_every=10,
    save_every=10,
    warmup=0.0,
    ema=0.5,
)


class Gappy(Corpus):
    """Leaves targets out, in every row another part of them, so that processes score different numbers of tokens."""

    def batch(self, step, rows):
        x, y = super().batch(step, rows)
        for row, targets in zip(rows, y):
            targets[: 7 * row] = -100
        return x, y


def make(name: str, arch: str, world: train.World, **settings) -> torch.nn.Module:
    """A run in a directory called `name`; returns the trained model."""
    run, kept = train.Run(Path(name)), []
    before = train.make_optimizers
    train.make_optimizers = lambda model, config: kept.append(model) or before(model, config)
    try:
        train.training_loop(run, world, replace(CONFIG, out=name, **settings), MODELS[arch])
    finally:
        run.lock.release()
        train.make_optimizers = before
    return kept[0]


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        k: p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for k, p in model.named_parameters()
    }


@contextmanager
def exact_muon():
    """torch's Muon orthogonalises in bfloat16, which makes differences in the last bit of float32 ten thousand times as large,
    be it between one process and two or between two orders of a batch's rows. Within, it does so in float32.
    """
    low, torch.Tensor.bfloat16 = torch.Tensor.bfloat16, torch.Tensor.clone
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = low


def main() -> None:
    torch.set_num_threads(1)
    train.sample_text = lambda *args: ""
    train.Corpus = Gappy
    world = train.World(CONFIG)
    for name, (alone, settings) in RUNS.items():
        arch, same = ALONE[alone]
        with exact_muon():
            save_file(whole(make(name, arch, world, **{**same, **settings})), f"{name}.{world.rank}")
    low = make("low", "hope", world, parallel="fsdp", precision="bfloat16")
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    save_file(whole(low), f"low.{world.rank}")
    # What one process has begun, two go on with.
    save_file(whole(make("one", "hope", world, parallel="fsdp")), f"one.{world.rank}")
    world.close()
    sys.stdout.flush()
    os._exit(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory in which all runs were made, by one process (ALONE) and by two (RUNS)."""
    here, path = os.getcwd(), tmp_path_factory.mktemp("runs")
    os.chdir(path)
    train.Corpus = Gappy
    sample, train.sample_text = train.sample_text, lambda *args: ""
    try:
        g = torch.Generator().manual_seed(0)
        words = "the memory reads what the memory wrote and forgets the rest of it".split()
        Path("text.txt").write_text(" ".join(words[i] for i in torch.randint(len(words), (1500,), generator=g)))
        alone = train.World(CONFIG)
        for name, (arch, settings) in ALONE.items():
            with exact_muon():
                make(name, arch, alone, **settings)
        make("one", "hope", alone)
        lose_the_end("one")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent)}
        done = subprocess.run(torchrun, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        yield path
    finally:
        train.Corpus, train.sample_text = Corpus, sample
        os.chdir(here)


def lose_the_end(run: str) -> None:
    """As if killed before the last checkpoint was complete."""
    path = Path(run, "checkpoints/step-000020")
    path.rename(path.with_name(".step-000020"))


def rows(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]


def assert_same_run(a: str, b: str) -> None:
    for x, y in zip(rows(a), rows(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5), x["step"]
        assert x.get("val_loss") == pytest.approx(y.get("val_loss"), abs=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(runs, name):
    assert_same_run(name, RUNS[name][0])
    assert rows(name)[-1]["loss"] < 0.97 * rows(name)[0]["loss"]  # and it learns


@pytest.mark.parametrize("name", [*RUNS, "low", "one"])
def test_processes_hold_the_same_parameters(runs, name):
    a, b = load_file(f"{name}.0"), load_file(f"{name}.1")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_bfloat16_trains_nearly_as_float32_and_takes_another_path(runs):
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(rows("low"), rows("hope-adamw"), strict=True)]
    assert 1e-5 < max(apart) < 0.1


def test_the_in_context_levels_are_written_in_these_runs(runs):
    off = replace(MODELS["hope"], cms_rate=(0.0,))
    torch.manual_seed(0)
    model = hope.Hope(MODELS["hope"])
    model.load_state_dict(load_file("hope-adamw-fsdp.0"))
    x, y = Gappy.open(CONFIG).batch(0, range(4))
    on = model.observe(x, y)[0].item()
    silent = hope.Hope(off)
    silent.load_state_dict(model.state_dict(), strict=False)
    assert abs(on - silent.observe(x, y)[0].item()) > 1e-3


def test_two_processes_go_on_with_the_run_of_one(runs):
    assert_same_run("one", "hope-adamw")


def test_one_process_goes_on_with_the_run_of_two(runs):
    lose_the_end("hope-hsdp")
    make("hope-hsdp", "hope", train.World(CONFIG))
    assert_same_run("hope-hsdp", "hope-adamw")


def test_a_checkpoint_of_two_processes_holds_what_they_trained(runs):
    for name in ("hope-adamw-ddp", "hope-adamw-fsdp"):
        model = hope.Hope(MODELS["hope"])
        config, model_config, sha256 = train.from_json(Path(name, "config.json"))
        stored = train.to_json(config, model_config, sha256)
        train.Run(Path(name)).load(
            Path(name, "checkpoints/step-000020"), stored, train.tensors_of(model), train.World(CONFIG)
        )
        trained = load_file(f"{name}.0")
        assert all(torch.equal(p, trained[k]) for k, p in model.named_parameters())


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
        pytest.param("60m", dict(seq_len=256, batch_size=2, optimizer="adamw"), marks=pytest.mark.slow),
    ],
)
def test_the_plan_foretells_the_memory_of_a_step(size, settings, capsys):
    config = train.TrainConfig(size=size, precision="float32", **settings)
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in settings.items()]
    foretold = planned(capsys, "--size", size, "--precision", "float32", *flags)["ddp"][5]
    assert foretold == pytest.approx(peak_bytes(config, hope.HopeConfig.preset(size, config.arch)), rel=0.15)


@pytest.mark.parametrize("optimizer", train.KEPT)
def test_optimizers_keep_as_many_numbers_as_the_plan_says(optimizer):
    model = hope.Hope(hope.HopeConfig.preset("tiny", n_layer=1))
    optimizers = train.make_optimizers(model, replace(CONFIG, optimizer=optimizer, seq_len=512))
    tokens = torch.zeros(1, 2, dtype=torch.long)
    model.observe(tokens, tokens, backward=True)
    for o in optimizers:
        o.step()
    for kind, of_each in (("matrix", train.KEPT[optimizer]), ("rest", 2.0)):
        weights = hope.param_groups(model)[kind]
        kept = sum(v.numel() for o in optimizers for p in weights for v in o.state.get(p, {}).values())
        of_each += bool(CONFIG.ema)  # the plan adds the average of the weights to what KEPT says
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
    whole = train.rehearse(model, config, 2, 384, dtype)
    assert list(train.forecast(model, config, 2, dtype)) == pytest.approx(list(whole), rel=0.02)


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


def hope_on_meta(size: str, arch: str) -> hope.Hope:
    with torch.device("meta"):
        return hope.Hope(hope.HopeConfig.preset(size, arch))


if __name__ == "__main__":
    main()
