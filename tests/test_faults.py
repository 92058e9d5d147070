"""What may go wrong in a long run: kills, signals, full disks, damaged files, losses that are no number."""

import ctypes
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import train
from data import Corpus, Tokenizer, UserError, file_sha256, read_signed, signed

SMALL = "--d-model 16 --n-head 2 --n-layer 1 --chunk 16 --chunk-proj 16 --cms 16,32,inf --seq-len 64 --data text.txt --batch-size 4 --optimizer adamw".split()  # fmt: skip
KILLS = int(os.environ.get("KILLS", 4))  # more for a longer trial


@pytest.fixture(autouse=True)
def in_a_directory_with_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "sample_text", lambda *args: "")
    words = "the memory reads what the memory wrote and forgets the rest of it".split()
    g = torch.Generator().manual_seed(0)
    Path("text.txt").write_text(" ".join(words[i] for i in torch.randint(len(words), (1500,), generator=g)))


def run(*args):
    return train.main([*SMALL, *args])


def rows(path):
    return train.Run(Path(path)).log()


def results(path):
    return [(r["step"], r["loss"], r["grad_norm"], r.get("val_loss")) for r in rows(path)]


def tensors(checkpoint):
    [file] = Path(checkpoint).glob("*.safetensors")
    return safetensors.torch.load_file(file)


def refused(capsys, *args):
    capsys.readouterr()
    assert train.main(list(args)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: error: "), lines
    return lines[0]


# Children are forked from a process that has imported train: they start at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])


def in_child(args, directory, file_limit, drop_rights):
    os.chdir(directory)
    out = os.open("out.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    train.sample_text = lambda *args: ""
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if drop_rights:  # root may write anywhere, unless it gives that right up
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0
    code = train.main(args)
    sys.stdout.flush()
    os._exit(code)


def start(*args, file_limit=0, drop_rights=False):
    child = FORKS.Process(target=in_child, args=(args, os.getcwd(), file_limit, drop_rights))
    child.start()
    return child


def finished(*args, **limits):
    """Run in a child; its exit code and what it wrote."""
    Path("out.txt").unlink(missing_ok=True)
    child = start(*args, **limits)
    child.join(120)
    return child.exitcode, Path("out.txt").read_text()


def wait_for(true, seconds=60):
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline, "nothing happened"
        time.sleep(0.001)


def test_runs_killed_at_any_moment_end_as_if_undisturbed():
    steps = ["--steps", str(8 + 5 * KILLS), "--save-every", "2", "--eval-every", "3"]
    run(*steps, "--out", "whole")
    g, log, killed = random.Random(0), Path("cut/log.jsonl"), []
    lines = lambda: len(log.read_text().splitlines()) if log.exists() else 0
    half = lambda: list(Path("cut/checkpoints").glob(".step-*"))
    for i in range(KILLS):
        for left in half():
            shutil.rmtree(left)
        child, before = start(*SMALL, *steps, "--out", "cut"), lines()
        wait_for(lambda: lines() != before or not child.is_alive())
        enough = lines() + g.randrange(6)
        wait_for(lambda: lines() >= enough or not child.is_alive())
        time.sleep(g.uniform(0, 0.2))  # in a step, a validation, or a save
        if i % 2 == 0:  # surely in a save
            wait_for(lambda: half() or not child.is_alive())
            time.sleep(g.uniform(0, 0.01))
        child.kill()
        child.join()
        killed.append((child.exitcode, lines(), bool(half())))
    assert run(*steps, "--out", "cut") == 0
    print("exit code, rows in the log, whether half a checkpoint is left:", *killed)
    assert sum(code == -signal.SIGKILL for code, _, _ in killed) >= KILLS // 2
    assert results("cut") == results("whole")
    a, b = (tensors(train.Run(Path(path)).saved()[-1]) for path in ("cut", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(number):
    child = start(*SMALL, "--steps", "500", "--save-every", "500", "--eval-every", "500", "--out", "mine")
    wait_for(lambda: len(rows("mine")) >= 3)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == 130
    assert "Stopped and saved after step" in Path("out.txt").read_text()
    assert train.Run(Path("mine")).saved()[-1].name == f"step-{rows('mine')[-1]['step']:06d}"


def test_only_one_run_trains_in_a_directory_and_its_death_frees_it(capsys):
    args = [*SMALL, "--steps", "4", "--save-every", "2", "--out", "mine"]
    child = start(*args[:-4], "--steps", "4", "--save-every", "1", "--out", "other")
    child.join(60)
    assert child.exitcode == 0
    child = start(*SMALL, "--steps", "500", "--out", "mine")
    wait_for(lambda: rows("mine"))
    assert "another process trains in mine" in refused(capsys, *SMALL, "--steps", "500", "--out", "mine")
    child.kill()
    child.join()
    assert "holds a run with steps = 500, not 4" in refused(capsys, *args)  # no longer locked


def test_a_full_disk_ends_the_run_and_names_the_last_good_checkpoint():
    args = [*SMALL, "--steps", "6", "--save-every", "2", "--eval-every", "6", "--out", "mine"]
    code, out = finished(*args, file_limit=100_000)
    assert code == 2 and "no checkpoint can be written to mine/checkpoints (File too large); there is none" in out
    assert "Traceback" not in out
    run("--steps", "6", "--save-every", "2", "--eval-every", "6", "--out", "whole")
    assert train.main(args) == 0 and results("mine") == results("whole")
    shutil.rmtree("mine/checkpoints/step-000006")
    code, out = finished(*args, file_limit=100_000)
    assert code == 2 and "the last good one is mine/checkpoints/step-000004; make room, then go on" in out


def test_a_directory_that_cannot_be_written_is_refused():
    os.makedirs("closed")
    os.chmod("closed", 0o555)
    code, out = finished(*SMALL, "--steps", "2", "--out", "closed/mine", drop_rights=os.geteuid() == 0)
    assert code == 2
    assert (
        out == "train.py: error: closed/mine cannot be written (Permission denied); use another directory (--out DIR)\n"
    )


@pytest.fixture
def trained(tmp_path_factory):
    """A run of 6 steps in mine, checkpoints of steps 4 and 6, and a copy in whole; the command that made it."""
    args, once = ["--steps", "6", "--save-every", "2", "--eval-every", "3"], tmp_path_factory.getbasetemp() / "trained"
    if not once.exists():
        assert run(*args, "--out", "mine") == 0
        shutil.move("mine", once)
    for copy in ("mine", "whole"):
        shutil.copytree(once, copy)
    return [*SMALL, *args, "--out", "mine"]


@pytest.mark.parametrize("how", ["deleted", "truncated", "without a file", "a bit flipped", "with another file"])
def test_a_damaged_newest_checkpoint_is_set_aside_for_the_one_before(trained, how, capsys):
    newest = Path("mine/checkpoints/step-000006")
    [file] = newest.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    if how == "deleted":
        shutil.rmtree(newest)
    elif how == "truncated":
        file.write_bytes(raw[:1000])
    elif how == "without a file":
        file.unlink()
    elif how == "a bit flipped":
        raw[-100] ^= 1
        file.write_bytes(raw)
    else:
        Path(newest, ".metadata").write_bytes(pickle.dumps({}))
    capsys.readouterr()
    assert train.main(trained) == 0
    out = capsys.readouterr().out
    assert "going on after step 4" in out and "2 steps that were taken after that checkpoint are taken again" in out
    if how != "deleted":
        assert "step-000006 cannot be loaded" in out and Path("mine/checkpoints/damaged-step-000006").exists()
    assert results("mine") == results("whole")


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_alone(trained, capsys):
    for file in Path("mine/checkpoints").glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    before = sorted(Path("mine").rglob("*"))
    assert "step-000004 cannot be loaded" in refused(capsys, *trained)
    assert sorted(Path("mine").rglob("*")) == before and results("mine") == results("whole")


def broken(monkeypatch, steps, how):
    """From now on the given steps (counted from 0) have a loss or a gradient that is no good."""
    real, count = train.find_gradients, iter(range(10**6))

    def gradients(model, *args):
        loss = real(model, *args)
        if next(count) in steps:
            if how == "gradient":
                next(model.parameters()).grad[0] = math.nan
            return loss * {"nan": math.nan, "inf": math.inf, "gradient": 1, "spike": 20}[how]
        return loss

    monkeypatch.setattr(train, "find_gradients", gradients)


@pytest.mark.parametrize("how", ["nan", "inf", "gradient", "spike"])
def test_a_step_without_a_usable_gradient_is_skipped_and_counted(how, monkeypatch, capsys):
    broken(monkeypatch, {2, 4}, how)
    extra = ["--spike", "3"] if how == "spike" else []
    assert run("--steps", "6", "--save-every", "1", "--keep", "6", "--eval-every", "6", "--out", "mine", *extra) == 0
    assert [bool(r.get("skipped")) for r in rows("mine")] == [False, False, True, False, True, False]
    assert f"step     3: skipped, {rows('mine')[2]['skipped']}" in capsys.readouterr().out
    assert (rows("mine")[2]["loss"] is None) == (how in ("nan", "inf"))
    at = [tensors(f"mine/checkpoints/step-{step:06d}") for step in range(1, 7)]
    equal = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)
    assert equal(at[1], at[2]) and equal(at[3], at[4]) and not equal(at[2], at[3])
    assert read_signed(Path("mine/checkpoints/step-000006/state.json"))["skips"] == 2


def test_a_spike_is_no_reason_unless_asked_for(monkeypatch):
    broken(monkeypatch, {2}, "spike")
    assert run("--steps", "4", "--eval-every", "4", "--out", "mine") == 0
    assert not any("skipped" in r for r in rows("mine"))


def test_a_run_that_diverges_stops_and_names_the_batch_and_the_last_good_checkpoint(monkeypatch, capsys):
    broken(monkeypatch, range(3, 100), "nan")
    args = ["--steps", "50", "--save-every", "2", "--max-skips", "5", "--out", "mine"]
    error = refused(capsys, *SMALL, *args)
    assert "loss nan, gradient norm" in error and "5 steps in a row were skipped" in error
    assert "the batch is that of step 8 and seed 0" in error
    assert "the last good checkpoint mine/checkpoints/step-000006; try a smaller --lr" in error
    assert "in a row were skipped; the batch is that of step 8" in refused(
        capsys, *SMALL, *args
    )  # 3 of 5 are remembered


def rewrite(checkpoint, change):
    """Change a checkpoint's tensors, and sign it as if it were whole."""
    [file] = Path(checkpoint).glob("*.safetensors")
    raw = file.read_bytes()
    new = change(safetensors.torch.load(raw))
    file.write_bytes(new if isinstance(new, bytes) else safetensors.torch.save(new))
    state = read_signed(Path(checkpoint, "state.json"))
    state["files"] = {file.name: file_sha256(file)}
    Path(checkpoint, "state.json").write_text(signed(state))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda t: pickle.dumps(Payload()), "cannot be loaded"),
        (
            lambda t: {**t, "model.norm.weight": torch.ones(3)},
            r"saved torch.Size\(\[3\]\) and current: torch.Size\(\[16\]\) for model.norm.weight",
        ),
        (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, "Missing key.* model.norm.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_reason(trained, change, why, capsys):
    for path in Path("mine/checkpoints").iterdir():
        rewrite(path, change)
    for command in (trained, ["--sample", "mine"], ["--export", "mine"]):
        assert re.search(why, refused(capsys, *command)), why
    assert not Path("executed").exists()


def test_a_checkpoint_of_another_run_is_refused(trained, capsys):
    run("--steps", "6", "--save-every", "2", "--lr", "0.5", "--out", "other")
    shutil.rmtree("mine/checkpoints")
    shutil.copytree("other/checkpoints", "mine/checkpoints")
    assert "it is of a run with lr = 0.5, not 0.01" in refused(capsys, *trained)


def test_exported_weights_start_another_run(trained, capsys):
    assert train.main(["--export", "mine"]) == 0
    weights = safetensors.torch.load_file("mine/export/model.safetensors")
    stored = tensors("mine/checkpoints/step-000006")
    assert all(torch.equal(w, stored[f"model.{k}"]) for k, w in weights.items())
    more = ["--data", "text.txt", "--seq-len", "64", "--init-from", "mine/export", "--steps", "1", "--out"]
    assert train.main([*more, "tuned", "--lr", "1e-9", "--weight-decay", "0"]) == 0
    tuned = tensors("tuned/checkpoints/step-000001")
    assert all(torch.allclose(w, tuned[f"model.{k}"], atol=1e-6) for k, w in weights.items())
    capsys.readouterr()
    assert train.main(["--plan", *more, "a"]) == 0 and not Path("a").exists()
    assert f"{sum(w.numel() for w in weights.values()):,} parameters" in capsys.readouterr().out
    assert "w_in.weight: copying a param with shape torch.Size([16, 16])" in refused(
        capsys, *more, "a", "--cms-hidden", "2"
    )
    assert not Path("a").exists()
    Path("mine/export/model.safetensors").write_bytes(b"other weights")
    assert "model.safetensors was altered" in refused(capsys, *more, "a")


def mutated(raw, g):
    """Bytes with something wrong in them: bits flipped, cut off, left out, put in, said twice."""
    raw = bytearray(raw)
    a, b = sorted(g.randrange(len(raw) + 1) for _ in range(2))
    b = min(b, a + 200)
    kind = g.choice(["flip", "flip", "cut", "delete", "insert", "repeat", "zero", "text"])
    if kind == "flip":
        for _ in range(g.randrange(1, 4)):
            raw[g.randrange(len(raw))] ^= 1 << g.randrange(8)
    elif kind == "cut":
        del raw[g.randrange(len(raw)) :]
    elif kind == "delete":
        del raw[a:b]
    elif kind == "insert":
        raw[a:a] = g.randbytes(g.randrange(1, 20))
    elif kind == "repeat":
        raw[a:a] = raw[a:b]
    elif kind == "zero":
        raw[a:b] = bytes(b - a)
    else:  # another number, name or kind of value, where there is text
        raw[a : a + 1] = g.choice([b"9", b'"', b"null", b"-1", b"[]", b"{}", b"1e999", b"\xff", b"\n"])
    return bytes(raw)


def test_five_hundred_damaged_files_are_loaded_rightly_or_refused_in_one_line(trained, capsys):
    train.main(["--export", "mine"])
    config, model_config, sha256 = train.from_json(Path("mine/config.json"))
    about, world = train.to_json(config, model_config, sha256), train.World(config)
    newest = Path("mine/checkpoints/step-000006")
    saved = train.Hope(model_config)
    tokenizer = Tokenizer()
    train.Run(Path("mine")).load(newest, about, train.tensors_of(saved), world)

    def load():
        model = train.Hope(model_config)
        train.Run(Path("mine")).load(newest, about, train.tensors_of(model), world)
        return model

    def take_over():
        model = train.Hope(model_config)
        train.init_from(model, tokenizer, Path("mine/export"))
        return model

    def settings():
        assert train.to_json(*train.from_json(Path("mine/config.json"))) == about

    cases = [(file, load, 130) for file in newest.iterdir()]
    cases += [(file, take_over, 80) for file in Path("mine/export").iterdir()]
    cases += [(Path("mine/config.json"), settings, 80)]
    g, outcomes = random.Random(0), {"loaded": 0, "refused": 0}
    for file, use, times in cases:
        raw = file.read_bytes()
        for _ in range(times):
            new = mutated(raw, g)
            file.write_bytes(new)
            try:
                model = use()
            except UserError as e:
                assert "\n" not in str(e) and str(file.parent) in str(e)
                outcomes["refused"] += 1
            else:
                outcomes["loaded"] += 1
                if model:
                    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), saved.parameters()))
        file.write_bytes(raw)
        use()
    assert sum(outcomes.values()) >= 500 and outcomes["refused"] > 450, outcomes


def test_damaged_tokens_and_manifests_are_loaded_rightly_or_refused_in_one_line():
    config = train.TrainConfig(data="text.txt", seq_len=64, data_dir="data", verify_data=True)
    whole = Corpus.open(config)
    x, _ = whole.batch(0, range(2))
    [folder] = [p for p in Path("data").iterdir() if p.is_dir()]
    g, outcomes = random.Random(0), {"loaded": 0, "refused": 0}
    for file in [p for p in folder.iterdir() if p.stat().st_size]:
        raw = file.read_bytes()
        for _ in range(50):
            file.write_bytes(mutated(raw, g))
            try:
                again = Corpus.open(config)
            except UserError as e:
                assert "\n" not in str(e)
                outcomes["refused"] += 1
            else:
                outcomes["loaded"] += 1
                assert again.sha256 == whole.sha256 and torch.equal(again.batch(0, range(2))[0], x)
        file.write_bytes(raw)
        Corpus.open(config)
    assert outcomes["refused"] > 50, outcomes


def torchrun(*args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ranks_of(launcher):
    return [int(p) for p in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks' processes in /proc")
def test_torchrun_ends_all_ranks_on_a_signal_and_restarts_them_after_a_death():
    steps = ["--steps", "60", "--save-every", "10", "--eval-every", "30"]
    run(*steps, "--out", "whole")
    command = [train.__file__, *SMALL, *steps, "--out", "mine", "--parallel", "fsdp"]
    launcher = torchrun(*command)
    wait_for(lambda: len(rows("mine")) >= 3)
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=60)
    stopped = int(re.search(r"Stopped and saved after step (\d+)", out)[1])
    assert 3 <= stopped < 60 and train.Run(Path("mine")).saved()[-1].name == f"step-{stopped:06d}", out

    launcher = torchrun("--max-restarts=1", *command)
    wait_for(lambda: len(rows("mine")) >= max(stopped, 10) + 3)
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    out, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, out
    assert out.count("going on after step") == 2
    for a, b in zip(rows("mine"), rows("whole"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
