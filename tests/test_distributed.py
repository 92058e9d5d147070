"""Several processes train as one: what they compute, what they hold, and what passes between one process and two.

Launching takes seconds, so one launch of two processes by torchrun makes all runs (this file, as a script); the same runs are
made by one process, and the tests compare.
"""

import json
import os
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


if __name__ == "__main__":
    main()
