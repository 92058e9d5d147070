"""The command line: what it prints and leaves behind, how it stops and goes on, and what it refuses."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hope
import optim
import train
from data import Corpus, pydoc_text

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
    a, b = (load_file(next(Path(d, "checkpoints/step-000008").glob("*.safetensors"))) for d in ("cut", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


def test_a_killed_run_loses_only_the_steps_after_its_checkpoint():
    run("--steps", "6", "--out", "whole", "--eval-every", "6", "--save-every", "2")
    run("--steps", "6", "--out", "cut", "--eval-every", "6", "--save-every", "2")
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
    Path("short.txt").write_text("too short " * 20)
    for args, message in (
        (["--chunks", "3"], "unknown flag --chunks; did you mean --chunk?"),
        (["--size", "giant"], "invalid choice: 'giant' (choose from 'tiny', '60m'"),
        (["--arch", "rnn"], "choose from 'hope', 'hope-attention', 'transformer++'"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--lr", "-1"], "lr is -1.0; it must be above 0"),
        (["--lr", "inf"], "lr is inf; it must be above 0 and below inf"),
        (["--lr", "nan"], "lr is nan; it must be above 0"),
        (["--grad-clip", "nan"], "grad_clip is nan; it must be above 0"),
        (["--cms-rate", "inf"], "cms_rate is (inf,); it must be at least 0 and below inf"),
        (["--cms-hidden", "0"], "cms_hidden is 0.0; it must be above 0 and below inf"),
        (["--peak-tflops", "-1"], "peak_tflops is -1.0; it must be at least 0 and below inf"),
        (["--weight-decay", "-1"], "weight_decay is -1.0; it must be at least 0"),
        (["--spike", ".5"], "spike is 0.5; it must be a factor above 1, or 0"),
        (["--plan", "--tokens", "-1"], "tokens is -1.0; it must be at least 0"),
        (["--plan", "--gpus", "0"], "gpus is 0; it must be at least 1"),
        (["--seed", "9" * 20], f"seed is {'9' * 20}; it must be at least 0 and below {2**64}"),
        (["--sample", "a", "--max-new-tokens", "0"], "max_new_tokens is 0; it must be at least 1"),
        (["--sample", "a", "--temperature", "nan"], "temperature is nan; it must be at least 0"),
        (["--sample", "a", "--top-k", "-1"], "top_k is -1; it must be at least 0"),
        (["--sample", "a", "--resume", "b"], "--sample and --resume are different things to do; give one of them"),
        (["--export", "a", "--plan"], "--export and --plan are different things to do"),
        (["--sample", "a", "--lr", "3"], "--sample does not read --lr; leave it out"),
        (["--sample", "a", "--gpus", "3"], "--sample does not read --gpus; leave it out"),
        (["--export", "a", "--top-k", "3"], "--export does not read --top-k; leave it out"),
        (["--export", "a", "--chunk", "3"], "--export does not read --chunk; leave it out"),
        (["--plan", "--prompt", "a"], "--prompt is for --sample; leave it out, or give --sample as well"),
        (["--tokens", "1e9"], "--tokens is for --plan; leave it out, or give --plan as well"),
        (["--cms", "8,1.5"], "whole numbers from 1, or inf"),
        (["--cms", "a,b"], "argument --cms"),
        (["--adaptive", "k,w"], "allowed: k, v, q, eta, alpha"),
        (["--decay", "none"], "leave it out of adaptive"),
        (["--device", "tpu9"], "--device tpu9 is not available here"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file; give files, folders or patterns"),
        (["--data", "empty.txt"], "there is no text in it"),
        (
            ["--data", "binary.bin"],
            "binary.bin cannot be read (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0",
        ),
        (["--data", "short.txt"], "too few for --seq-len 512"),
        (["--resume", "nowhere"], "nowhere is no run directory"),
        (["--sample", "nowhere"], "nowhere is no run directory"),
        (["--out", "text.txt", "--data", "text.txt", "--seq-len", "64"], "text.txt exists and is no run directory"),
    ):
        assert message in error(capsys, *args), args


def test_a_run_directory_is_never_overwritten_by_another_run(capsys):
    run("--steps", "1", "--out", "mine")
    capsys.readouterr()
    assert "mine holds a run with batch_size = 2, not 4; use another directory" in error(
        capsys, *SMALL, "--out", "mine", "--steps", "2", "--batch-size", "4"
    )
    assert "chunk = 16, not 8" in error(capsys, *SMALL, "--out", "mine", "--steps", "1", "--chunk", "8")
    assert "mine holds a run with lr = 0.01, not 0.5" in error(capsys, "--resume", "mine", "--lr", "0.5")
    Path("text.txt").write_text(Path("text.txt").read_text() + "more")
    assert "data_sha256" in error(capsys, "--resume", "mine")
    os.makedirs("other")
    Path("other/notes.txt").write_text("mine")
    assert "other exists and is no run directory" in error(capsys, *SMALL, "--out", "other")


def test_a_damaged_run_directory_is_named(capsys):
    run("--steps", "1", "--out", "mine")
    capsys.readouterr()
    weights = next(Path("mine/checkpoints/step-000001").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    assert "step-000001 cannot be loaded" in error(capsys, "--sample", "mine")
    Path("mine/config.json").write_text('{"train": {}}')
    assert "config.json cannot be used" in error(capsys, "--resume", "mine")


def test_a_sample_needs_a_prompt_and_weights_that_are_numbers_and_shows_control_characters(capsys, monkeypatch):
    run("--steps", "1", "--out", "mine")
    capsys.readouterr()
    assert "--prompt is empty" in error(capsys, "--sample", "mine", "--prompt", "")
    found = train.trained(Path("mine"), None)
    _, model, tokenizer, _ = found
    monkeypatch.setattr(train, "trained", lambda *args: found)
    with monkeypatch.context() as patch:
        said = [(torch.tensor([[byte]]), None) for byte in b"b\x07\x9b\n\tc\0"]
        patch.setattr(model, "stream", lambda *args, **how: iter(said))
        assert train.sample_text(model, tokenizer, train.Command(prompt="a\x1b"), 0) == "a\\x1bb\\x07\ufffd\n\tc"
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    assert "this model gives no sample" in error(capsys, "--sample", "mine")


def test_an_export_is_sampled_as_its_run_is(capsys):
    run("--steps", "2", "--out", "mine")
    assert train.main(["--export", "mine"]) == 0
    capsys.readouterr()
    samples = []
    for path in ("mine", "mine/export"):
        assert train.main(["--sample", path, "--max-new-tokens", "20"]) == 0
        samples.append(capsys.readouterr().out)
    assert samples[0] == samples[1]
    assert "mine/export is an export already" in error(capsys, "--export", "mine/export")


def test_a_run_without_clipping_can_be_gone_on_with(capsys):
    assert run("--steps", "2", "--grad-clip", "inf", "--out", "mine") == 0
    assert json.loads(Path("mine/config.json").read_text())["train"]["grad_clip"] == "inf"
    shutil.rmtree("mine/checkpoints")
    assert train.main(["--resume", "mine"]) == 0 and len(rows("mine")) == 2


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("again", [["--resume", "mine"], None], ids=["resume", "same command"])
def test_a_finished_run_is_made_longer(schedule, again, capsys):
    plan = [
        "--schedule",
        schedule,
        "--warmup",
        "0",
        "--decay-part",
        ".5",
        "--eval-every",
        "3",
        "--save-every",
        "2",
        "--keep",
        "1",
    ]
    command = [*SMALL, *plan, "--out", "mine"]
    assert train.main([*command, "--steps", "6"]) == 0
    assert train.main([*(again or command), "--steps", "12"]) == 0
    out = capsys.readouterr().out
    assert "mine: 12 steps instead of 6" in out
    config = train.TrainConfig(steps=12, schedule=schedule, warmup=0.0, decay_part=0.5)
    assert [r["lr"] for r in rows("mine")][6:] == [train.learning_rate(step, config) for step in range(6, 12)]
    if schedule == "wsd":  # as if it had been meant to be so long
        assert "from step-000003, before the learning rate fell" in out
        assert Path("mine/checkpoints/decayed-6-step-000006").exists()
        assert run(*plan, "--out", "whole", "--steps", "12") == 0
        assert stripped(rows("mine")) == stripped(rows("whole"))
    assert train.main(["--resume", "mine"]) == 0
    out = capsys.readouterr().out
    assert "train longer: --resume mine --steps 24" in out and "after 12 steps" in out
    assert "holds a run with steps = 12, not 7" in error(capsys, "--resume", "mine", "--steps", "7")


def test_speed_is_that_of_the_last_seconds(monkeypatch):
    now, recent = [100.0], train.deque()
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])

    def step(seconds, pause=0.0):
        now[0] += pause + seconds
        return train.present_rate(recent, now[0] - seconds)

    assert step(60.0) == pytest.approx(1 / 60)  # compiling
    assert step(1.0, pause=20.0) == pytest.approx(1.0)  # after a validation
    assert [step(0.5) for _ in range(20)][-1] == pytest.approx(2.0)


def test_the_loss_curves_running_mean_starts_at_the_loss(monkeypatch):
    run_dir, drawn = train.Run(Path(".")), []
    Path("log.jsonl").write_text("".join(json.dumps({"step": i + 1, "loss": 2.0}) + "\n" for i in range(60)))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **settings: drawn.append(figure))
    run_dir.plot("constant", 1.5)
    each, mean, _ = drawn[0].axes[0].lines
    assert list(each.get_ydata()) == [3.0] * 60 and mean.get_ydata() == pytest.approx([3.0] * 60)


def test_what_takes_long_is_said(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(hope, "compile_parts", lambda model: said.append("compiled"))
    monkeypatch.setattr(train.tqdm, "set_postfix_str", lambda bar, text, **settings: said.append(text))
    run("--steps", "1", "--eval-every", "1", "--compile")
    assert "compiling: the first step" in capsys.readouterr().out and "compiled" in said
    assert any(re.fullmatch(r"validating, \d+ of \d+ rows", text) for text in said)


@pytest.mark.skipif(not Path("/proc").exists(), reason="sees in /proc how far the imports are")
def test_an_interrupt_during_the_imports_ends_without_a_traceback():
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.time() + 60
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not err


def test_help_is_one_screen_and_help_all_explains_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert train.main(["--help"]) == 0
    narrow = capsys.readouterr().out.splitlines()
    assert sum(len(line) > 80 for line in narrow) <= 2 and len(narrow) <= 75
    monkeypatch.setenv("COLUMNS", "120")
    assert train.main(["--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 45 and all(
        f"  --{name}" in short for name in ("help-all", "data", "steps", "plan")
    )
    assert train.main(["--help-all"]) == 0
    text = capsys.readouterr().out
    for action in train.make_parser()._actions:
        assert action.help and action.option_strings[-1] in text, action


def test_held_out_text_is_not_in_the_training_text():
    training, held_out = pydoc_text()
    long = [p for p in held_out.split("\n\n") if len(p) >= 80]
    assert len(long) > 100 and not any(p in training for p in long)
    assert len(training) > 3 * len(held_out) > 100_000


def test_the_learning_rate_rises_and_falls_as_documented():
    config = train.TrainConfig(steps=100, lr=1.0, warmup=0.1, final_lr=0.2)
    rates = [train.learning_rate(s, config) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.2, abs=1e-3)


def test_wsd_rises_stays_and_falls_in_a_line():
    config = train.TrainConfig(steps=100, lr=1.0, warmup=0.1, final_lr=0.2, schedule="wsd", decay_part=0.3)
    rates = [train.learning_rate(s, config) for s in range(100)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and set(rates[10:71]) == {1.0}
    assert rates[70:] == pytest.approx([1 - 0.8 * i / 30 for i in range(30)])


def test_one_batch_is_learnt_by_heart(capsys):
    assert run("--overfit-one-batch", "--steps", "150", "--eval-every", "150", "--d-model", "32") == 0
    log = rows()
    assert log[-1]["loss"] < 0.1 < 1 < log[0]["loss"]
    x, _ = Corpus.open(train.TrainConfig(data="text.txt", seq_len=64, overfit_one_batch=True)).batch(7, range(2))
    y, _ = Corpus.open(train.TrainConfig(data="text.txt", seq_len=64)).batch(0, range(2))
    assert torch.equal(x, y)


def test_the_average_of_weights_follows_its_definition_and_swaps_places_with_them():
    p, average = torch.nn.Parameter(torch.zeros(3)), 0.0
    ema = optim.EMA([p], decay=0.5)
    for t in range(1, 30):
        with torch.no_grad():
            p.copy_(torch.full((3,), math.sin(t)))
        ema.step()
        keep = min(0.5, t / (10 + t))
        average = math.sin(t) if t == 1 else keep * average + (1 - keep) * math.sin(t)
    weights = p.detach().clone()
    with train.averaged([ema]):
        assert p.detach().tolist() == pytest.approx([average] * 3, rel=1e-5)
    assert torch.equal(p, weights) and not torch.allclose(p, ema.state[p]["average"])


def test_averaged_weights_are_saved_validated_and_sampled(capsys, monkeypatch):
    sampled = []
    monkeypatch.setattr(train, "sample_text", lambda model, *a, **k: sampled.append(model.head.weight.clone()) or "")
    options = ["--eval-every", "4", "--save-every", "4"]
    assert run("--steps", "8", "--ema", "0.9", "--out", "whole", *options) == 0
    assert run("--steps", "8", "--out", "plain", *options) == 0
    assert [r["loss"] for r in rows("whole")] == [r["loss"] for r in rows("plain")]  # training knows nothing of it
    assert rows("whole")[-1]["val_loss"] != rows("plain")[-1]["val_loss"]
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoints/step-000008")
    assert train.main(["--resume", "cut"]) == 0
    assert [r.get("val_loss") for r in rows("cut")] == [r.get("val_loss") for r in rows("whole")]
    assert train.main(["--sample", "whole"]) == 0
    whole, plain, cut, again = sampled
    assert torch.equal(whole, cut) and torch.equal(whole, again) and not torch.equal(whole, plain)


def test_a_run_stopped_inside_the_chunk_of_a_slow_block_goes_on_as_if_it_had_not_stopped(capsys):
    slow = ["--steps", "5", "--eval-every", "5", "--save-every", "2", "--cms", "16,150,inf"]
    assert run(*slow, "--out", "whole") == 0
    assert "C = 150: start state" in capsys.readouterr().out
    shutil.copytree("whole", "cut")
    for step in ("4", "5"):  # at step 2 of a period of 3
        shutil.rmtree(f"cut/checkpoints/step-00000{step}")
    assert train.main(["--resume", "cut"]) == 0
    assert stripped(rows("cut")) == stripped(rows("whole"))
    assert run("--cms", "16,150,inf", "--optimizer", "dgd", "--out", "no") == 2
    assert "a CMS chunk of 150 tokens spans 3 steps of --seq-len 64" in capsys.readouterr().err


def test_only_matrices_decay(tmp_path):
    for optimizer in ("muon", "adamw"):
        model = hope.Hope(hope.HopeConfig.preset("tiny"))
        groups = [
            g for o in train.make_optimizers(model, train.TrainConfig(optimizer=optimizer)) for g in o.param_groups
        ]
        decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
        kinds = hope.param_groups(model)
        assert {decay[id(p)] for p in kinds["matrix"]} == {0.1} and {decay[id(p)] for p in kinds["rest"]} == {0}


def test_the_log_holds_what_its_schema_says(capsys):
    assert run("--steps", "3", "--eval-every", "2", "--peak-tflops", "1e-6", "--arch", "samba", "--window", "8", "--n-layer", "2", "--cms", "16,inf") == 0  # fmt: skip
    plain, seen, _ = rows("runs/tiny-samba")
    always = {name for name, meaning in train.LOG.items() if not meaning.startswith("*")}
    of_tasks = {"val_accuracy", "val_parts"}
    assert set(plain) == always - {"skipped"} and set(seen) == set(train.LOG) - {"skipped"} - of_tasks
    model = hope.Hope(train.from_json(Path("runs/tiny-samba/config.json"))[1])
    n = sum(p.numel() for p in model.parameters()) - model.embed.weight.numel()
    assert plain["utilisation"] == pytest.approx(6 * n * plain["tokens_per_s"] / 1e6, rel=0.01)
    assert seen["eta"][1] is seen["alpha"][1] is seen["memory_norm"][1] is None  # softmax attention
    assert 0 < seen["eta"][0] and 0 < seen["alpha"][0] < 1 and seen["memory_norm"][0] > 0
    assert [len(layer) for layer in seen["cms_norm"]] == [1, 1] and seen["cms_norm"][0][0] > 0


def test_memory_numbers_are_the_means_over_tokens_and_leave_no_hook():
    torch.manual_seed(0)
    config = hope.HopeConfig.preset("tiny", d_model=32, n_head=2, chunk=16, chunk_proj=16, cms=(16, hope.INF))
    model = hope.Hope(config)
    for block in model.blocks:
        block.memory.compiled = True  # compiled chunks would not call the gates
    x = torch.randint(256, (2, 48))
    for gate, bias, mean in (("eta", 1.5, math.log1p(math.exp(1.5))), ("alpha", -1.0, 1 / (1 + math.e))):
        with torch.no_grad():
            model.blocks[0].memory.gates[gate].read.zero_()
            model.blocks[0].memory.gates[gate].bias.fill_(bias)
        assert train.memory_numbers(model, x, x)[gate][0] == pytest.approx(mean, rel=1e-5)
    numbers = train.memory_numbers(model, x, x)
    for block in model.blocks:
        assert block.memory.compiled
        block.memory.compiled = False
    _, state = model.observe(x, x)
    main = state.memories[1].main.now
    norms = [sum(w[b, h, -1].square().sum() for w in main).sqrt() for b in range(2) for h in range(2)]
    assert numbers["memory_norm"][1] == pytest.approx(sum(norms).item() / 4, rel=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_settings_and_rows_or_is_named_as_missing(name, monkeypatch, capsys):
    class Fake:  # neither package is part of the tests' installation; both document this interface
        calls = []
        init = staticmethod(lambda **settings: Fake.calls.append(settings))
        log = staticmethod(lambda numbers, step: Fake.calls.append((step, numbers)))

    monkeypatch.setitem(sys.modules, name, None)
    assert run("--steps", "1", "--tracker", name) == 2
    assert f"--tracker {name} needs {name}, which is missing; run: pip install {name}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, name, Fake)
    assert run("--steps", "2", "--eval-every", "2", "--tracker", name, "--out", "seen") == 0
    start, *logged = Fake.calls
    assert start["name"] == "seen" and start["config"]["steps"] == 2 and start["resume"] == "allow"
    assert [step for step, _ in logged] == [1, 2] and logged[1][1]["eta/0"] > 0
    assert {k: v for k, v in logged[0][1].items() if k != "step"} == {
        k: v for k, v in rows("seen")[0].items() if k != "step"
    }
