"""Train Hope and its relatives, sample from them, and go on where a run stopped.

    python train.py                                    Hope, size tiny, on the text that ships with Python
    python train.py --arch transformer++               the baseline, same data, same steps
    python train.py --sample runs/tiny --prompt "The " continue a prompt with a trained model
    python train.py --resume runs/tiny                 go on with a run that was stopped

Every setting is a flag; a run directory holds config.json, log.jsonl, loss.png and checkpoints. Nothing is unpickled.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import hope
from hope import Hope, HopeConfig, MemoryConfig, check_choices, check_positive, setting


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The model has a config of its own, `hope.HopeConfig`."""

    size: Literal[tuple(HopeConfig.SIZES)] = setting("tiny", "width and depth of the model")
    arch: Literal[tuple(HopeConfig.ARCHS)] = setting("hope", "architecture")
    data: str = setting("pydoc", "pydoc (the text that ships with Python), or the path of a text file in UTF-8")
    out: str = setting("", "run directory; default: runs/SIZE, with -ARCH appended for other architectures than hope")
    steps: int = setting(200, "optimizer steps")
    batch_size: int = setting(2, "sequences a step")
    seq_len: int = setting(512, "tokens of a sequence")
    optimizer: Literal["muon", "adamw"] = setting(
        "muon", "muon: Muon for matrices, AdamW for the rest; adamw: AdamW for all"
    )
    lr: float = setting(1e-2, "peak learning rate")
    warmup: float = setting(0.05, "part of the steps over which the learning rate rises")
    final_lr: float = setting(0.05, "learning rate at the end, as a part of the peak; it falls along a cosine")
    weight_decay: float = setting(0.1, "decoupled weight decay of the matrices")
    grad_clip: float = setting(1.0, "gradient norm above which gradients are scaled down")
    seed: int = setting(0, "seeds the start weights and the order of the data")
    eval_every: int = setting(50, "steps between two validations")
    save_every: int = setting(50, "steps between two checkpoints")
    keep: int = setting(2, "checkpoints that are kept")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "steps", "batch_size", "seq_len", "eval_every", "save_every", "keep")
        if self.lr <= 0 or self.grad_clip <= 0:
            raise ValueError(f"lr is {self.lr}, grad_clip is {self.grad_clip}; both must be positive")
        if not 0 <= self.warmup <= 1 or not 0 <= self.final_lr <= 1:
            raise ValueError(f"warmup is {self.warmup}, final_lr is {self.final_lr}; both are parts, from 0 to 1")

    @property
    def run_dir(self) -> Path:
        name = self.size if self.arch == "hope" else f"{self.size}-{self.arch}"
        return Path(self.out or f"runs/{name}")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def pydoc_text() -> tuple[str, str]:
    """English about Python from the standard library's `pydoc_data`: (training text, held-out text).

    Topics quote each other at length, so a paragraph is kept only where it first occurs, longest topic first; else the
    held-out text would have been seen in training. Every tenth topic is held out.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [p for p in topics[name].split("\n\n") if len(p) < 80 or p.strip() not in seen]
        new = {p.strip() for p in paragraphs if len(p) >= 80}
        seen |= new
        if new:
            kept[name] = "\n\n".join(paragraphs)
    held_out = sorted(kept)[5::10]
    return tuple("\n\n".join(kept[n] for n in sorted(kept) if (n in held_out) is held) for held in (False, True))


def scramble(*numbers: int) -> int:
    """A pseudo-random 64-bit integer, a pure function of the given ones (each is mixed in by splitmix64)."""
    z = 0
    for number in numbers:
        z = (z + number + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
    return z


def shuffled(i: int, n: int, key: int) -> int:
    """The i-th element of a permutation of range(n) that `key` picks, without the permutation being made.

    A Feistel network permutes the numbers below the next power of 4; where it leads out of range(n), it is applied
    until it leads back (cycle walking), which keeps it a permutation and takes less than 4 turns on average.
    """
    half = ((n - 1).bit_length() + 1) // 2
    while True:
        left, right = i >> half, i % 2**half
        for turn in range(6):
            left, right = right, left ^ scramble(key, turn, right) % 2**half
        i = left << half | right
        if i < n:
            return i


class Corpus:
    """Byte tokens of a text, split into training and held-out tokens."""

    def __init__(self, data: str, seq_len: int, batch_size: int, seed: int):
        if data == "pydoc":
            train, val = (t.encode() for t in pydoc_text())
        else:
            text = self._read(Path(data))
            cut = len(text) - len(text) // 10
            train, val = text[:cut], text[cut:]
        for part, name in ((train, "training"), (val, "held-out")):
            if len(part) < 2 * seq_len + 1:
                raise UserError(
                    f"--data {data}: its {name} part has {len(part)} bytes, too few for --seq-len {seq_len}; "
                    "give more text or a shorter --seq-len"
                )
        self.sha256 = hashlib.sha256(train + b"\0" + val).hexdigest()
        self.train, self.val = (torch.frombuffer(bytearray(p), dtype=torch.uint8) for p in (train, val))
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed

    @staticmethod
    def _read(path: Path) -> bytes:
        fix = "give the path of a text file in UTF-8, or pydoc"
        if not path.is_file():
            raise UserError(f"--data {path}: no such file; {fix}")
        try:
            raw = path.read_bytes()
            raw.decode()
        except OSError as e:
            raise UserError(f"--data {path}: cannot be read ({e.strerror}); {fix}") from e
        except UnicodeDecodeError as e:
            raise UserError(f"--data {path}: not text, byte {e.start} is not UTF-8; {fix}") from e
        if not raw.strip():
            raise UserError(f"--data {path}: the file is empty; {fix}")
        if b"\0" in raw:
            raise UserError(f"--data {path}: not text, it holds zero bytes; {fix}")
        return raw

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        """Tokens and targets (len(rows), seq_len) of these rows of the batch of `batch_size` rows that a step reads.

        A pure function of (seed, step, row): it is the same for any number of ranks and any micro-batches, of which
        each takes rows of its own. An epoch visits every window once, from a start of its own.
        """
        n = len(self.train) // self.seq_len - 1  # one window less, so that an epoch can start at any offset
        windows = []
        for i in (step * self.batch_size + row for row in rows):
            epoch = scramble(self.seed, i // n)
            start = epoch % self.seq_len + self.seq_len * shuffled(i % n, n, epoch)
            windows.append(self.train[start : start + self.seq_len + 1])
        x = torch.stack(windows).long()
        return x[:, :-1], x[:, 1:]

    def validation(self, most: int = 40) -> tuple[Tensor, Tensor]:
        """At most `most` windows of held-out text, evenly spread: tokens and targets (n, t)."""
        n = (len(self.val) - 1) // self.seq_len
        starts = [i * self.seq_len for i in range(n)][:: max(1, math.ceil(n / most))]
        x = torch.stack([self.val[s : s + self.seq_len + 1] for s in starts]).long()
        return x[:, :-1], x[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------
# Run directory: config, log, checkpoints, picture


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def to_json(train: TrainConfig, model: HopeConfig, sha256: str) -> dict:
    def plain(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: plain(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(x) for x in v]
        return "inf" if v == hope.INF else v

    return {"train": plain(asdict(train)), "model": plain(asdict(model)), "data_sha256": sha256}


def from_json(path: Path) -> tuple[TrainConfig, HopeConfig, str]:
    try:
        stored = json.loads(path.read_text())
        model = dict(stored["model"])
        memory = dict(model.pop("memory"))
        memory["adaptive"] = tuple(memory["adaptive"])
        for name in ("cms", "cms_rate"):
            model[name] = tuple(float(c) for c in model[name])
        model["pattern"] = tuple(model["pattern"])
        config = HopeConfig(memory=MemoryConfig(**memory), **model)
        return TrainConfig(**stored["train"]), config, stored["data_sha256"]
    except FileNotFoundError as e:
        raise UserError(f"{path.parent} is no run directory, it has no config.json; give one that train.py made") from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} cannot be used ({type(e).__name__}: {e}); restore it, or start anew with --out") from e


class Run:
    """A run directory: config.json, log.jsonl, loss.png, checkpoints/step-000100."""

    # What may differ between the start of a run and its continuation.
    FREE = {"out", "device", "keep", "eval_every", "save_every"}

    def __init__(self, path: Path):
        self.path = path
        self.log_path, self.checkpoints = path / "log.jsonl", path / "checkpoints"

    def open(self, config: TrainConfig, model: HopeConfig, sha256: str) -> None:
        """Make the directory, or check that the one that is there belongs to this very run."""
        new, path = to_json(config, model, sha256), self.path / "config.json"
        if path.exists():
            old = to_json(*from_json(path))
            flat = lambda c: {**c["train"], **c["model"], **c["model"]["memory"], "data_sha256": c["data_sha256"]}
            old, new = flat(old), flat(new)
            differ = [k for k in new if k not in self.FREE | {"memory"} and new[k] != old[k]]
            if differ:
                k = differ[0]
                raise UserError(
                    f"{self.path} holds a run with {k} = {old[k]}, not {new[k]}; "
                    f"use another directory (--out DIR) or go on with that run (--resume {self.path})"
                )
            return
        # A hidden file is what a process killed in its first second leaves; anything else is somebody's.
        if self.path.exists() and not (self.path.is_dir() and all(p.name[0] == "." for p in self.path.iterdir())):
            raise UserError(f"{self.path} exists and is no run directory; use another one (--out DIR)")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(new, indent=2) + "\n")
        except OSError as e:
            raise UserError(f"{self.path} cannot be written ({e.strerror}); use another directory (--out DIR)") from e

    def saved(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step-*"))

    def save(self, step: int, model: Hope, optimizers: list, keep: int) -> None:
        """Write a checkpoint beside, then rename it: a reader sees all of it or none."""
        target, beside = self.checkpoints / f"step-{step:06d}", self.checkpoints / f".step-{step:06d}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, beside / "model.safetensors")
        tensors = {}
        for i, optimizer in enumerate(optimizers):
            for j, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{i}.{j}.{key}": torch.as_tensor(v).contiguous() for key, v in state.items()}
        save_file(tensors, beside / "optimizer.safetensors")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(beside, target)
        for old in self.saved()[:-keep]:
            shutil.rmtree(old)

    def load(self, path: Path, model: Hope, optimizers: list | None = None) -> int:
        """Load a checkpoint; returns its step."""
        try:
            model.load_state_dict(load_file(path / "model.safetensors"))
            if optimizers is not None:
                tensors = load_file(path / "optimizer.safetensors")
                for i, optimizer in enumerate(optimizers):
                    state = optimizer.state_dict()
                    for name, tensor in tensors.items():
                        which, j, key = name.split(".", 2)
                        if int(which) == i:
                            state["state"].setdefault(int(j), {})[key] = tensor
                    optimizer.load_state_dict(state)
            return int(path.name.removeprefix("step-"))
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as e:
            reason = str(e).strip().splitlines()[0] if str(e) else type(e).__name__
            raise UserError(f"checkpoint {path} cannot be loaded ({reason}); delete it to use the one before") from e

    def log(self) -> list[dict]:
        """Rows of log.jsonl, without a last one that a killed process left half written."""
        if not self.log_path.exists():
            return []
        lines = self.log_path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def append(self, row: dict) -> None:
        with open(self.log_path, "a") as f:
            f.write(json.dumps(row) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop log rows of steps that a resumed run will take again."""
        if self.log_path.exists():
            write_atomically(self.log_path, "".join(json.dumps(r) + "\n" for r in self.log() if r["step"] <= step))

    def plot(self, title: str) -> None:
        rows = self.log()
        bits = 1 / math.log(2)
        loss = [(r["step"], r["loss"] * bits) for r in rows]
        smooth, mean = [], None
        for step, y in loss:
            mean = y if mean is None else 0.9 * mean + 0.1 * y
            smooth.append((step, mean))
        val = [(r["step"], r["val_bpb"]) for r in rows if "val_bpb" in r]
        fig = Figure(figsize=(7, 4), layout="constrained")  # not pyplot: no display and no backend is touched
        ax = fig.subplots()
        ax.plot(*zip(*loss), color="#9ecae1", linewidth=0.8, label="training, each step")
        ax.plot(*zip(*smooth), color="#08519c", linewidth=1.8, label="training, running mean")
        if val:
            ax.plot(*zip(*val), "o--", color="#d94801", label="validation")
            ax.annotate(f"{val[-1][1]:.2f}", val[-1], xytext=(0, 8), textcoords="offset points", ha="center")
        ax.set(xlabel="step", ylabel="bits per byte", title=title, ylim=(0, None))
        ax.grid(alpha=0.3)
        ax.legend()
        fig.savefig(self.path / "loss.png", dpi=150)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not available here; use cpu, or auto") from e


def make_optimizers(model: Hope, config: TrainConfig) -> list[torch.optim.Optimizer]:
    groups = hope.param_groups(model)
    adamw = dict(lr=config.lr, betas=(0.9, 0.95))
    if config.optimizer == "muon":
        # match_rms_adamw gives Muon's step the size of AdamW's, so that one learning rate serves both.
        muon = dict(lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        return [torch.optim.Muon(groups["matrix"], **muon), torch.optim.AdamW(groups["rest"], weight_decay=0, **adamw)]
    split = [
        {"params": groups["matrix"], "weight_decay": config.weight_decay},
        {"params": groups["rest"], "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(split, **adamw)]


def learning_rate(step: int, config: TrainConfig) -> float:
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return config.lr * (step + 1) / rise
    along = (step - rise) / max(1, config.steps - rise)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * along)) / 2)


def validate(model: Hope, corpus: Corpus, device: torch.device) -> float:
    """Mean loss in nats per token over held-out windows, each observed from the start state, CMS writes included."""
    with torch.no_grad():
        losses = [
            model.observe(x.to(device), y.to(device), reduction="none")[0]
            for x, y in zip(*(z.split(20) for z in corpus.validation()))
        ]
    return torch.cat(losses).double().mean().item()


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a flag, so that a step is finished and saved; a second one stops at once."""

    def __enter__(self) -> Interrupt:
        self.hit = False
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True

    def __exit__(self, *error: Any) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


class Progress:
    """A progress bar on a terminal; elsewhere a line at every validation."""

    def __init__(self, start: int, stop: int):
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=stop, initial=start, disable=None, bar_format=form, leave=True)

    def show(self, row: dict) -> None:
        text = f"loss {row['loss'] / math.log(2):.2f} bits/byte, {row['tokens_per_s']:,.0f} tokens/s"
        if "val_bpb" in row:
            self.bar.write(f"step {row['step']:>5}: {text}, validation {row['val_bpb']:.3f} bits/byte")
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()


def train(config: TrainConfig, model_config: HopeConfig) -> int:
    """Train, or go on training, in `config.run_dir`. Returns the process's exit code."""
    torch.set_flush_denormal(True)  # states that decay to nothing would slow a CPU down fivefold
    device = pick_device(config.device)
    corpus = Corpus(config.data, config.seq_len, config.batch_size, config.seed)
    run = Run(config.run_dir)
    run.open(config, model_config, corpus.sha256)
    torch.manual_seed(config.seed)
    model = Hope(model_config).to(device)
    optimizers = make_optimizers(model, config)
    start = 0
    if run.saved():
        start = run.load(run.saved()[-1], model, optimizers)
        print(f"{run.path}: going on after step {start}" if start < config.steps else f"{run.path}: finished already")
    run.forget_after(start)
    size = sum(p.numel() for p in model.parameters())
    title = f"{config.arch}, size {config.size}, {size:,} parameters"
    print(f"\n{title}")
    print(f"{len(corpus.train):,} bytes of training text, {len(corpus.val):,} held out ({config.data}), on {device}\n")
    print(f"{hope.levels(model, optimizers)}\n")

    step, seen, clock = start, 0, time.perf_counter()
    with Interrupt() as interrupt, Progress(start, config.steps) as progress:
        while step < config.steps:
            lr = learning_rate(step, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad()
            x, y = corpus.batch(step, range(config.batch_size))
            loss, _ = model.observe(x.to(device), y.to(device), backward=True)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip, error_if_nonfinite=False)
            if not math.isfinite(norm.item()) or not math.isfinite(loss.item()):
                raise UserError(
                    f"loss {loss.item():.3g}, gradient norm {norm.item():.3g} at step {step + 1}: training diverged; "
                    f"try a smaller --lr than {config.lr:g}"
                )
            for optimizer in optimizers:
                optimizer.step()
            step, seen = step + 1, seen + x.numel()
            speed = seen / (time.perf_counter() - clock)
            row = {
                "step": step, "loss": loss.item(), "lr": lr, "grad_norm": norm.item(),
                "tokens": step * x.numel(), "tokens_per_s": round(speed, 1),
            }  # fmt: skip
            if step % config.eval_every == 0 or step == config.steps:
                row["val_loss"] = validate(model, corpus, device)
                row["val_bpb"] = row["val_loss"] / math.log(2)
            run.append(row)
            stop = step == config.steps or interrupt.hit
            if step % config.save_every == 0 or stop:
                run.save(step, model, optimizers, config.keep)
                run.plot(title)
            progress.show(row)
            if stop:
                break
    if step < config.steps:
        print(f"\nStopped and saved after step {step}. To go on: python train.py --resume {run.path}")
        return 130
    print(f"\nvalidation: {run.log()[-1]['val_bpb']:.3f} bits per byte after {config.steps} steps")
    print(f"loss curve: {run.path}/loss.png\n\nA sample:\n")
    print(sample_text(model, seed=config.seed, **SAMPLING))
    print(f'\nMore: python train.py --sample {run.path} --prompt "The "')
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


# What a sample is drawn with unless flags say otherwise, at the end of training and by --sample.
SAMPLING = {"prompt": "The ", "max_new_tokens": 300, "temperature": 1.0, "top_k": None, "top_p": 0.9}


def sample_text(
    model: Hope,
    *,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> str:
    device = model.embed.weight.device
    torch.manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())], device=device)
    new = model.generate(tokens, max_new_tokens, temperature, top_k, top_p)
    return prompt + bytes(new[0].tolist()).decode(errors="replace")


def sample(args: argparse.Namespace) -> int:
    run = Run(Path(args.sample))
    config, model_config, _ = from_json(run.path / "config.json")
    if not run.saved():
        raise UserError(f"{run.path} has no checkpoint yet; train first: python train.py --resume {run.path}")
    if not args.prompt:
        raise UserError('--prompt is empty; give some text to start from, as in --prompt "The "')
    model = Hope(model_config).to(pick_device(args.device or config.device))
    run.load(run.saved()[-1], model)
    seed = config.seed if args.seed is None else args.seed
    print(sample_text(model, seed=seed, **{name: getattr(args, name) for name in SAMPLING}))
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the nearest flag."""

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments"):
            flag = message.split(":", 1)[1].split()[0]
            close = difflib.get_close_matches(flag.split("=")[0], self._option_string_actions, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            message = f"unknown flag {flag}{hint} (python train.py --help lists all)"
        print(f"train.py: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(c) for c in text.split(",") if c)


def names(text: str) -> tuple[str, ...]:
    return tuple(n for n in text.split(",") if n)


def add_fields(parser: argparse.ArgumentParser, title: str, config: type, skip: tuple[str, ...] = ()) -> None:
    """One flag for every field. What is not given stays None, so that presets and stored runs keep their values."""
    group = parser.add_argument_group(title)
    hints = get_type_hints(config)
    for f in fields(config):
        if f.name in skip:
            continue
        hint, flag = hints[f.name], "--" + f.name.replace("_", "-")
        shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        help = f.metadata["help"].replace("%", "%%") + (f" (default: {shown})" if shown != "" else "")
        if hint is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help)
        elif "Literal" in str(hint):
            options = get_args(hint)
            group.add_argument(flag, type=type(options[0]), choices=options, help=help)
        elif "tuple[float" in str(hint):
            group.add_argument(flag, type=numbers, metavar="X,X,...", help=help)
        elif "tuple[str" in str(hint):
            group.add_argument(flag, type=names, metavar="NAME,NAME,...", help=help)
        else:
            group.add_argument(flag, type=hint, metavar={int: "N", float: "X", str: "TEXT"}[hint], help=help)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        usage="python train.py [FLAG ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    act = parser.add_argument_group("instead of starting a run")
    act.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, with the settings it was started with")
    act.add_argument("--sample", metavar="DIR", help="print a sample from the newest checkpoint of the run in DIR")
    act.add_argument("--prompt", metavar="TEXT", help="what the sample starts with (default: '%(default)s')")
    act.add_argument("--max-new-tokens", type=int, metavar="N", help="length of the sample (default: %(default)s)")
    act.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest (default: %(default)s)")
    act.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens only")
    act.add_argument("--top-p", type=float, metavar="X", help="sample among the likeliest tokens that have X of the probability (default: %(default)s)")  # fmt: skip
    parser.set_defaults(**SAMPLING)
    add_fields(parser, "training", TrainConfig)
    add_fields(parser, "model (defaults are those of --arch hope)", HopeConfig, skip=("memory", "vocab_size"))
    add_fields(parser, "memory, the sequence layer (defaults are those of --arch hope)", MemoryConfig)
    return parser


def given(args: argparse.Namespace, config: type) -> dict[str, Any]:
    values = {f.name: getattr(args, f.name, None) for f in fields(config)}
    return {k: v for k, v in values.items() if v is not None}


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.sample:
            return sample(args)
        settings = given(args, TrainConfig)
        model_settings = {**given(args, HopeConfig), **given(args, MemoryConfig)}
        if not args.resume:
            config = TrainConfig(**settings)
            return train(config, HopeConfig.preset(config.size, config.arch, vocab_size=256, **model_settings))
        config, model, _ = from_json(Path(args.resume) / "config.json")
        stored = {**asdict(config), **asdict(model), **asdict(model.memory)}
        for name, value in {**settings, **model_settings}.items():
            if name not in Run.FREE and stored[name] != value:
                raise UserError(
                    f"--{name.replace('_', '-')} {value} differs from {stored[name]}, which the run in {args.resume} "
                    "was started with; leave it out, or start a new run with --out DIR"
                )
        free = {k: v for k, v in settings.items() if k in Run.FREE}
        return train(TrainConfig(**{**asdict(config), **free, "out": args.resume}), model)
    except (UserError, ValueError) as e:
        print(f"train.py: error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
