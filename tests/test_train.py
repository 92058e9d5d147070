"""The command line: what it prints and leaves behind, how it stops and goes on, and what it refuses."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hope
import train

SMALL = "--d-model 16 --n-head 2 --n-layer 1 --chunk 16 --chunk-proj 16 --cms 16,32,inf --seq-len 64 --data text.txt".split()
ROOT = Path(train.__file__).parent


@pytest.fixture(autouse=True)
def in_a_directory_with_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "the memory reads what the memory wrote and forgets the rest of it".split()
    g = torch.Generator().manual_seed(0)
    Path("text.txt").write_text(" ".join(words[i] for i in torch.randint(len(words), (1500,), generator=g)))


def run(*args):
    return train.main([*SMALL, *args])


def rows(path="runs/tiny"):
    return [json.loads(line) for line in Path(path, "log.jsonl").read_text().splitlines()]


def stripped(rows):
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in rows]


def test_a_run_prints_and_leaves_what_it_promises(capsys):
    assert run("--steps", "6", "--eval-every", "3", "--save-every", "3") == 0
    out = capsys.readouterr().out
    assert "memories k,v,eta,alpha" in out and "CMS, C = 32" in out
    bpb = float(re.search(r"validation: ([\d.]+) bits per byte", out)[1])
    log = rows()
    assert [r["step"] for r in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["val_bpb"] == pytest.approx(bpb, abs=1e-3) == log[-1]["val_loss"] / math.log(2)
    assert all(0 < r["loss"] < 10 and r["grad_norm"] > 0 and r["tokens_per_s"] > 0 for r in log)
    assert Path("runs/tiny/loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path("runs/tiny/config.json").read_text())["model"]["cms"] == [16.0, 32.0, "inf"]
    assert [p.name for p in train.Run(Path("runs/tiny")).saved()] == ["step-000003", "step-000006"]

    assert train.main(["--sample", "runs/tiny", "--prompt", "the mem", "--max-new-tokens", "9"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("the mem") and len(first) > len("the mem\n")
    train.main(["--sample", "runs/tiny", "--prompt", "the mem", "--max-new-tokens", "9"])
    assert capsys.readouterr().out == first  # seeded
    assert run("--steps", "6", "--eval-every", "3", "--save-every", "3") == 0  # the same command: nothing left to do
    assert "finished already" in capsys.readouterr().out and stripped(rows()) == stripped(log)


@pytest.mark.parametrize("arch", ["transformer++", "hope-attention"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_other_architectures_and_optimizers_learn(arch, optimizer, capsys):
    assert run("--arch", arch, "--steps", "30", "--eval-every", "30", "--optimizer", optimizer) == 0
    log = rows(f"runs/tiny-{arch}")
    assert log[-1]["loss"] < 0.75 * log[0]["loss"]


def test_an_interrupted_run_goes_on_to_the_same_end(capsys):
    assert run("--steps", "8", "--out", "whole", "--eval-every", "4") == 0
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--steps", "8", "--out", "cut", "--eval-every", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 60
    while not Path("cut/log.jsonl").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert re.search(r"Stopped and saved after step \d+. To go on: python train.py --resume cut", out)
    stopped = len(rows("cut"))
    assert 1 <= stopped < 8
    assert train.main(["--resume", "cut"]) == 0
    assert f"going on after step {stopped}" in capsys.readouterr().out
    keep = lambda rs: [(r["step"], r["loss"], r["grad_norm"], r.get("val_bpb")) for r in rs]
    assert keep(rows("cut")) == keep(rows("whole"))
    a, b = (load_file(f"{d}/checkpoints/step-000008/model.safetensors") for d in ("cut", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_killed_run_loses_only_the_steps_after_its_checkpoint():
    run("--steps", "6", "--out", "whole", "--eval-every", "6", "--save-every", "2")
    run("--steps", "6", "--out", "cut", "--eval-every", "6", "--save-every", "2")
    import shutil

    shutil.rmtree("cut/checkpoints/step-000006")  # as if killed after step 6 was logged and before it was saved
    os.makedirs("cut/checkpoints/.step-000006")  # half a checkpoint
    with open("cut/log.jsonl", "a") as f:
        f.write('{"step": 7, "lo')  # and half a row
    assert train.main(["--resume", "cut"]) == 0
    assert [r["loss"] for r in rows("cut")] == [r["loss"] for r in rows("whole")]


def test_a_run_killed_before_it_began_can_be_started_again():
    os.makedirs("begun")
    Path("begun/.config.json.new").write_text('{"train"')
    assert run("--steps", "1", "--out", "begun") == 0 and len(rows("begun")) == 1


def error(capsys, *args):
    """Run a command that must be refused: exit code 2 and one line on stderr, which is returned."""
    files = lambda: {p: p.read_bytes() for p in Path().rglob("*") if p.is_file() and p.parts[0] != "data"}
    before = files()
    try:
        code = train.main(list(args))
    except SystemExit as e:
        code = e.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1, lines
    assert before == files(), "something was written"
    return lines[0]


def test_bad_commands_get_one_line_with_the_fix(capsys):
    Path("empty.txt").write_text(" \n")
    Path("binary.bin").write_bytes(b"\xff\xfe\x00abc" * 100)
    Path("zeros.txt").write_bytes(b"abc\0" * 100)
    Path("short.txt").write_text("too short " * 20)
    for args, message in (
        (["--chunks", "3"], "unknown flag --chunks; did you mean --chunk?"),
        (["--size", "giant"], "invalid choice: 'giant' (choose from 'tiny', '60m'"),
        (["--arch", "rnn"], "choose from 'hope', 'hope-attention', 'transformer++'"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--lr", "-1"], "both must be positive"),
        (["--cms", "8,1.5"], "whole numbers from 1, or inf"),
        (["--cms", "a,b"], "argument --cms"),
        (["--adaptive", "k,w"], "allowed: k, v, q, eta, alpha"),
        (["--decay", "none"], "leave it out of adaptive"),
        (["--device", "tpu9"], "--device tpu9 is not available here"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file; give files or patterns"),
        (["--data", "empty.txt"], "there is no text in it"),
        (["--data", "binary.bin"], "not text, byte 0 is not UTF-8"),
        (["--data", "zeros.txt"], "not text, it holds zero bytes"),
        (["--data", "short.txt"], "too few for --seq-len 512"),
        (["--data", "."], "no such file"),
        (["--resume", "nowhere"], "nowhere is no run directory"),
        (["--sample", "nowhere"], "nowhere is no run directory"),
        (["--out", "text.txt", "--data", "text.txt", "--seq-len", "64"], "text.txt exists and is no run directory"),
    ):
        assert message in error(capsys, *args), args


def test_a_run_directory_is_never_overwritten_by_another_run(capsys):
    run("--steps", "1", "--out", "mine")
    capsys.readouterr()
    assert "mine holds a run with steps = 1, not 2; use another directory" in error(
        capsys, *SMALL, "--out", "mine", "--steps", "2"
    )
    assert "chunk = 16, not 8" in error(capsys, *SMALL, "--out", "mine", "--steps", "1", "--chunk", "8")
    assert "--lr 0.5 differs from 0.01" in error(capsys, "--resume", "mine", "--lr", "0.5")
    Path("text.txt").write_text(Path("text.txt").read_text() + "more")
    assert "data_sha256" in error(capsys, "--resume", "mine")
    os.makedirs("other")
    Path("other/notes.txt").write_text("mine")
    assert "other exists and is no run directory" in error(capsys, *SMALL, "--out", "other")


def test_a_damaged_run_directory_is_named(capsys):
    run("--steps", "1", "--out", "mine")
    capsys.readouterr()
    weights = Path("mine/checkpoints/step-000001/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    assert "step-000001 cannot be loaded" in error(capsys, "--sample", "mine")
    Path("mine/config.json").write_text('{"train": {}}')
    assert "config.json cannot be used" in error(capsys, "--resume", "mine")


def test_sampling_refuses_what_it_cannot_do(capsys):
    run("--steps", "1", "--out", "mine")
    capsys.readouterr()
    assert "--prompt is empty" in error(capsys, "--sample", "mine", "--prompt", "")
    assert "top_k 0" in error(capsys, "--sample", "mine", "--top-k", "0")


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for action in train.make_parser()._actions:
        assert action.help and action.option_strings[-1] in text, action


def test_held_out_text_is_not_in_the_training_text():
    training, held_out = train.pydoc_text()
    long = [p for p in held_out.split("\n\n") if len(p) >= 80]
    assert len(long) > 100 and not any(p in training for p in long)
    assert len(training) > 3 * len(held_out) > 100_000


def test_the_learning_rate_rises_and_falls_as_documented():
    config = train.TrainConfig(steps=100, lr=1.0, warmup=0.1, final_lr=0.2)
    rates = [train.learning_rate(s, config) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.2, abs=1e-3)


def test_diverging_training_stops_with_a_reason(capsys, monkeypatch):
    monkeypatch.setattr(hope.Hope, "observe", lambda self, *a, **k: (torch.tensor(float("nan")), None))
    assert run("--steps", "3") == 2
    assert "training diverged; try a smaller --lr" in capsys.readouterr().err
