"""Train Hope and its relatives, sample from them, and go on where a run stopped.

    python train.py                                    Hope, size tiny, on the text that ships with Python
    python train.py --arch transformer++               the baseline, same data, same steps
    python train.py --data my.txt                      your own text: files, patterns, or a data set of the hub
    python train.py --data task:mqar,pairs=8           one of the paper's synthetic tasks, see tasks.py
    python train.py --sample runs/tiny --prompt "The " continue a prompt with a trained model
    python train.py --chat runs/tiny                   talk to it, and have it read your files
    torchrun --nproc_per_node=8 train.py --size 760m   eight GPUs; --nodes for more than one machine

In this file, in this order:

    TrainConfig        every setting of a run; each field is a flag
    Run                a run's directory: config.json, log.jsonl, loss.png, checkpoints
    World, distribute  several processes that train as one (DDP, FSDP2, HSDP); one process is a group of one
    training_loop      where to begin if you know nanoGPT
    trained, export    what comes of a run: samples, and weights for others
    main               the command line

The model is in hope.py: `Hope.observe` reads a batch, gives its loss and writes the memories. The optimizers are in
optim.py; what makes rows of tokens of the text that --data names is in data.py; what --plan foretells, in plan.py.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C during the seconds that the imports take ends the process without a traceback
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

import argparse
import difflib
import json
import math
import re
import shutil
import threading
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import chat
import graphs
import hope
import hub
import kernels
import optim
import plan
import tasks
from data import (
    Corpus,
    Tokenizer,
    UserError,
    explained,
    extra,
    file_sha256,
    make_tokenizer,
    put_in_place,
    read_signed,
    reason,
    signed,
    task_of,
    tokenizer_in,
    write_atomically,
)  # fmt: skip
from hope import INF, Hope, HopeConfig, MemoryConfig
from pretrained import init_from, of_transformers, pretrained_config
from settings import check_settings, setting

# A state's tensors may be views, which nothing writes in place.
warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)


# Learning rate of the matrices in parts of --lr. Those of the last four were the best of tests/bench/optimizers.py.
MATRIX_LR = {"muon": 1.0, "adamw": 1.0, "m3": 3.0, "dgd": 100.0, "delta-momentum": 10.0, "deep-momentum": 300.0}


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The model has a config of its own, `hope.HopeConfig`."""

    size: Literal[tuple(HopeConfig.SIZES)] = setting("tiny", "width and depth of the model")
    arch: Literal[tuple(HopeConfig.ARCHS)] = setting("hope", "architecture")
    data: str = setting(
        "pydoc",
        "pydoc, shipped with Python; fineweb-edu, pg19, wikitext-103, tinystories; hf:NAME from the hub; files "
        "and patterns with commas between: UTF-8, .jsonl, .parquet, .gz, .zst; what --prepare made; several by share "
        "of tokens: NAME@0.8,NAME@0.2; task:NAME,OPTION=VALUE,... of tasks.py",
    )
    data_config: str = setting("", "config of a data set of the hub, where it has several")
    data_split: str = setting("train", "split of a data set of the hub")
    text_field: str = setting("text", "field of a jsonl file, parquet file or data set that holds the text")
    tokenizer: str = setting(
        "",
        "bytes; train:N, N byte pairs of the data; gpt2 or another of tiktoken's; a .tiktoken file; a folder with a "
        "tokenizer.json; default: bytes for tiny, else train:32000",
    )
    held_out: float = setting(
        0.0, "part of the documents that is held out; 0: a tenth, less of the named data sets", least=0, below=1
    )
    min_chars: int = setting(0, "leave out documents with fewer characters", least=0)
    max_chars: int = setting(0, "leave out documents with more characters; 0: none", least=0)
    deduplicate: bool = setting(
        False, "leave out documents whose text came before in the same source; takes 100 bytes of memory for each"
    )
    reset_at_documents: bool = setting(False, "a row holds one document, or a part: memories see no other one")
    data_dir: str = setting("data", "where prepared data is kept")
    verify_data: bool = setting(False, "compare the hashes of prepared data, not only names and sizes")
    out: str = setting("", "run directory; default: runs/SIZE or runs/TASK, and -ARCH unless that is hope")
    steps: int = setting(200, "optimizer steps", least=1)
    batch_size: int = setting(2, "sequences a step; of a task 32, if it is not given", least=1)
    seq_len: int = setting(512, "tokens of a sequence; a task has its own", least=1)
    optimizer: Literal[tuple(MATRIX_LR)] = setting("muon", "what trains the matrices; AdamW trains the rest")
    lr: float = setting(1e-2, "peak learning rate", above=0, below=INF)
    schedule: Literal["cosine", "wsd"] = setting("cosine", "the learning rate falls along a cosine, or only at the end")
    warmup: float = setting(0.05, "part of the steps over which the learning rate rises", least=0, most=1)
    decay_part: float = setting(0.2, "wsd: part of the steps over which the learning rate falls", least=0, most=1)
    final_lr: float = setting(0.05, "learning rate at the end, as a part of the peak", least=0, most=1)
    weight_decay: float = setting(
        0.1, "decoupled weight decay of the matrices; nothing else decays", least=0, below=INF
    )
    grad_clip: float = setting(1.0, "gradient norm above which gradients are scaled down", above=0)
    seed: int = setting(0, "seeds the start weights, the order of the data, and samples", least=0, below=2**64)
    ema: float = setting(
        0.0, "validate and sample with an average of the weights that keeps this part a step; 0: none", least=0, below=1
    )
    init_from: str = setting(
        "",
        "a folder that --export made, or one of a pre-trained Llama, Mistral, Qwen2 or GPT-2 model, whose MLPs then "
        "learn in context: start with its weights, settings and tokenizer",
    )
    overfit_one_batch: bool = setting(False, "read the first batch at every step: the loss must fall to almost nothing")
    eval_every: int = setting(50, "steps between two validations", least=1)
    save_every: int = setting(50, "steps between two checkpoints", least=1)
    keep: int = setting(2, "checkpoints that are kept", least=1)
    tracker: Literal["none", "trackio", "wandb"] = setting("none", "where the log goes as well")
    peak_tflops: float = setting(
        0.0, "peak of one device in 10^12 operations a second; 0: a known GPU's in bfloat16", least=0, below=INF
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    precision: Literal["auto", "float32", "bfloat16"] = setting("auto", "of matrix products; auto: bfloat16 on GPUs")
    parallel: Literal["auto", "ddp", "fsdp"] = setting(
        "auto", "ddp: all weights in every process; auto: fsdp from 300M"
    )
    nodes: int = setting(1, "machines; with fsdp every machine holds the whole model, in parts (HSDP)", least=1)
    micro_batch: int = setting(
        0, "sequences that a process takes at once, the rest of its share follows; 0 for all", least=0
    )
    recompute: bool = setting(False, "recompute blocks in the backward pass: less memory, up to two thirds more time")
    truncate: bool = setting(False, "go back through one CMS segment at a time: memory does not grow with --seq-len")
    compile: bool = setting(False, "compile memories and MLPs: on CPUs a minute or two, then 1.2 to 1.4 times as fast")
    capture: bool = setting(
        False,
        "with truncate, on a GPU: every segment as a CUDA graph, launched at once; needs all weights in every process; "
        "measured on no GPU yet",
    )
    max_skips: int = setting(
        10, "stop after skipping so many steps in a row, whose loss or gradient was not finite", least=1
    )
    spike: float = setting(
        0.0, "also skip a step whose loss is over this many times its running mean; 0 for never", least=0, below=INF
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if 0 < self.spike <= 1:
            raise ValueError(f"spike is {self.spike}; it must be a factor above 1, or 0 to skip no finite step")
        if 0 < self.max_chars < self.min_chars:
            raise ValueError(f"max_chars is {self.max_chars}; it must be at least min_chars, {self.min_chars}")
        if self.capture and not self.truncate:
            raise ValueError("capture takes one segment at a time, and so does truncate; give --truncate as well")
        if self.capture and (self.compile or self.optimizer == "dgd"):
            other = "compile, which was not tried with it" if self.compile else "optimizer dgd, which looks into layers"
            raise ValueError(f"capture does not go with {other}; leave out one of them")
        if task := task_of(self.data):
            if self.seq_len != task.length:
                rows = f"rows of {self.data} have {task.length} tokens"
                raise ValueError(f"seq_len is {self.seq_len}, but {rows}; leave it out or give seq_len {task.length}")
            if self.tokenizer not in ("", "bytes"):
                raise ValueError(f"tokenizer is {self.tokenizer}, but {self.data} has tokens of its own; leave it out")

    @property
    def run_dir(self) -> Path:
        name = self.data[5:].split(",")[0] if self.data.startswith("task:") else self.size
        return Path(self.out or f"runs/{name}{'' if self.arch == 'hope' else '-' + self.arch}")

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer or ("bytes" if self.size == "tiny" else "train:32000")


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Command:
    """What to do instead of starting a run, and how."""

    resume: str = setting("", "go on with the run in this directory, with the settings it was started with")
    prepare: bool = setting(False, "prepare the data for such a run, and stop")
    sample: str = setting("", "print a sample from the run or the export in this directory")
    chat: str = setting("", "talk to the run or the export in this directory; it learns from what it reads")
    export: str = setting("", "write the weights of the run in directory DIR to DIR/export, for transformers too")
    plan: bool = setting(False, "print memory, operations and days that a run takes; starts none")
    gpus: int = setting(1, "plan: how many GPUs", least=1)
    tokens: float = setting(0.0, "plan: tokens to train on; 0: those of --steps", least=0, below=INF)
    prompt: str = setting("The ", "sample: what it starts with")
    max_new_tokens: int = setting(300, "sample, chat: the most that is said at once", least=1)
    temperature: float = setting(1.0, "sample, chat: 0 takes the likeliest", least=0, below=INF)
    top_k: int = setting(0, "sample, chat: among so many likeliest tokens only; 0: among all", least=0)
    top_p: float = setting(
        0.9, "sample, chat: among the likeliest tokens that have this much of the probability", above=0, most=1
    )

    # Flags that only one of these reads, and those of the settings of a run that are all that one reads of them.
    DRAWING = {"max_new_tokens", "temperature", "top_k", "top_p"}
    OWN = {
        "sample": {"prompt", *DRAWING},
        "chat": DRAWING,
        "plan": {"gpus", "tokens"},
    }
    READS = {"sample": {"device", "seed"}, "chat": {"device", "seed"}, "export": {"device"}}

    def __post_init__(self) -> None:
        check_settings(self)
        instead = [name for name in ("sample", "chat", "export", "resume", "prepare", "plan") if getattr(self, name)]
        if len(instead) > 1 and not set(instead) <= {"resume", "plan"}:
            raise ValueError(f"--{' and --'.join(instead)} are different things to do; give one of them")

    def refuse_ignored(self, flags: Iterable[str]) -> None:
        """ValueError if one of the flags given has no effect on what is to be done."""
        for name in flags:
            for command, reads in self.READS.items():
                if getattr(self, command) and name not in {command, *reads, *self.OWN.get(command, ())}:
                    raise ValueError(f"--{command} does not read {as_flag(name)}; leave it out")
            readers = [command for command, own in self.OWN.items() if name in own]
            if readers and not any(getattr(self, command) for command in readers):
                those = " or ".join(f"--{command}" for command in readers)
                raise ValueError(f"{as_flag(name)} is for {those}; leave it out, or give {those} as well")


# ---- Run directory: config, log, checkpoints, picture ----

# What a row of log.jsonl holds, one row a step; those marked * with every validation only. A tracker gets the same.
LOG = {
    "step": "optimizer steps taken, this one included",
    "loss": "mean over the batch's scored tokens, nats per token",
    "lr": "learning rate of this step",
    "grad_norm": "norm of the gradient before clipping",
    "tokens": "tokens read so far: step x batch_size x seq_len",
    "tokens_per_s": "of the steps of the last seconds, validation and saving left out",
    "utilisation": "6 operations per token and parameter (embedding left out), a part of the devices' peak, if known",
    "skipped": "why this step changed nothing, if it was skipped: loss and grad_norm are null if not finite",
    "val_loss": "* nats per token of held-out text",
    "val_bpb": "* the same in bits per byte of the text; not of a task",
    "val_accuracy": "* of a task: percent of the answers that are right, or of rows if they count as a whole",
    "val_parts": "* of some tasks: the same for parts of the rows",
    "eta": "* mean inner step size, one number per layer; null for a layer without",
    "alpha": "* mean retention, likewise",
    "memory_norm": "* Frobenius norm of a head's memory M after a held-out row, mean over heads, one number per layer",
    "cms_norm": "* the same for what each in-context level of a CMS has learnt from the row, one list per layer",
}


def to_json(config: TrainConfig, model: HopeConfig, sha256: dict[str, str]) -> dict:
    """What a run's config.json holds; `sha256` are the fingerprints of its data and its tokenizer."""
    plain = lambda pairs: {k: "inf" if v == INF else v for k, v in pairs}
    stored = {part: asdict(c, dict_factory=plain) for part, c in (("train", config), ("model", model))}
    stored["model"]["cms"] = ["inf" if c == INF else c for c in model.cms]
    return json.loads(json.dumps(stored | sha256))  # lists for tuples, as it will be read


def from_json(path: Path) -> tuple[TrainConfig, HopeConfig, dict[str, str]]:
    fix = "restore it, or start anew with --out"
    if not path.exists():
        raise UserError(f"{path.parent} is no run directory, it has no config.json; give one that train.py made")
    stored = read_signed(path, fix)
    with explained(f"{path} cannot be used", fix):
        sha256 = {name: stored[name] for name in ("data_sha256", "tokenizer_sha256")}
        config = {k: INF if v == "inf" else v for k, v in stored["train"].items()}
        return TrainConfig(**config), HopeConfig.from_dict(stored["model"]), sha256


# Settings that may differ between the start of a run and its continuation.
FREE = {
    "out", "device", "keep", "eval_every", "save_every", "data_dir", "verify_data", "tracker", "peak_tflops",
    "parallel", "nodes", "micro_batch", "recompute", "compile", "capture", "max_skips",
    "min_chars", "max_chars", "deduplicate",  # data_sha256 says whether they changed anything
}  # fmt: skip


def differing(old: dict, new: dict) -> str:
    """The first setting that two runs do not share and may not change, as `name = old, not new`; steps may grow."""
    flat = lambda c: {**c["train"], **c["model"], **c["model"]["memory"], "data_sha256": c["data_sha256"]}
    old, new = flat(old), flat(new)
    free = FREE | {"memory"} | ({"steps"} if new["steps"] > old["steps"] else set())
    changed = (k for k in new if k not in free and new[k] != old.get(k))
    return next((f"{k} = {old.get(k)}, not {new[k]}" for k in changed), "")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


class Run:
    """A run directory: config.json, log.jsonl, loss.png, checkpoints/step-000100.

    A checkpoint is a directory of safetensors files, which every process writes a part of, and state.json: the step,
    the run's settings, and the sha256 of every file and of itself. It can be loaded by any number of processes. Nothing
    is unpickled: safetensors and JSON hold no code.
    """

    def __init__(self, path: Path):
        self.path, self.log_path, self.checkpoints = path, path / "log.jsonl", path / "checkpoints"
        self.track: Callable[[dict], Any] = lambda row: None
        self.lock = FileLock(path / ".lock", timeout=0)
        self.writer = ThreadPoolExecutor(1)
        self.written: Future | None = None

    def open(self, config: dict) -> str:
        """Make the directory, or check that the one that is there belongs to this very run; and lock it.

        A run may be made longer. Its learning rate is then what `learning_rate` makes of the new number of steps: along
        the longer cosine from where it stands; with wsd from the checkpoint before the decay, and later ones are set
        aside. Returns what there is to say of it.
        """
        path, other = self.path / "config.json", "use another directory (--out DIR)"
        # A hidden file is what a process killed in its first second leaves; anything else is somebody's.
        if self.path.exists() and not path.exists():
            if not self.path.is_dir() or any(p.name[0] != "." for p in self.path.iterdir()):
                raise UserError(f"{self.path} exists and is no run directory; {other}")
        with explained(f"{self.path} cannot be written", other, OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            with explained(f"another process trains in {self.path}", f"wait for it, or {other}", Timeout):
                self.lock.acquire()  # let go when the process ends, however it does
            if not path.exists():
                write_atomically(path, signed(config))
        old, model, sha256 = from_json(path)
        if found := differing(to_json(old, model, sha256), config):
            raise UserError(f"{self.path} holds a run with {found}; {other} or go on with it (--resume {self.path})")
        steps, how = config["train"]["steps"], "the learning rate follows the schedule of the new length"
        if steps == old.steps:
            return ""
        early = [p for p in self.saved() if step_of(p) <= decay_start(old)]
        if old.schedule == "wsd" and early:
            for late in self.saved()[len(early) :]:
                os.replace(late, late.with_name(f"decayed-{old.steps}-{late.name}"))
            how = f"it goes on from {early[-1].name}, before the learning rate fell"
        write_atomically(path, signed(config))
        return f"{self.path}: {steps} steps instead of {old.steps}; {how}"

    def saved(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step-*"))

    def save(self, state: dict, tensors: dict[str, Tensor], config: TrainConfig, world: World) -> None:
        """Start to write a checkpoint. Tensors are copied at once; the files are written while training goes on.

        The newest `keep` are kept, and the one from which a run with wsd can be made longer. It is written beside and
        renamed at the end: a reader sees all of it or none. `wait` tells whether it worked.
        """
        self.wait(world)
        state = dict(state)  # of this step, while training goes on
        target, beside = (self.checkpoints / f"{dot}step-{state['step']:06d}" for dot in ("", "."))

        def make_room() -> None:
            with self.writing():
                for old in self.checkpoints.glob(".step-*"):
                    shutil.rmtree(old)
                beside.mkdir(parents=True)

        world.first(make_room)
        writer = dcp.HuggingFaceStorageWriter(str(beside), save_distributed=True)
        parts = dcp.async_save(tensors, storage_writer=writer, process_group=world.writers)

        def finish() -> None:
            with self.writing():
                parts.result()  # of all processes
                if world.rank == 0:
                    files = {p.name: file_sha256(p) for p in sorted(beside.iterdir())}
                    write_atomically(beside / "state.json", signed({**state, "files": files}))
                    put_in_place(beside, target)
                    for old in self.saved()[: -config.keep]:
                        if config.schedule != "wsd" or step_of(old) != decay_start(config):
                            shutil.rmtree(old)

        self.written = self.writer.submit(finish)

    def wait(self, world: World) -> None:
        """Until the checkpoint that is being written is complete. UserError, in all processes, if it cannot be."""
        written, self.written = self.written, None
        world.together(lambda: written and written.result())

    def writing(self) -> AbstractContextManager[None]:
        last = f"the last good one is {self.saved()[-1]}" if self.saved() else "there is none before it"
        fix = f"{last}; make room, then go on: python train.py --resume {self.path}"
        what = f"no checkpoint can be written to {self.checkpoints}"
        return explained(what, fix, Exception, dcp.CheckpointException)

    def load(self, path: Path, config: dict, tensors: dict[str, Tensor], world: World) -> dict:
        """Fill `tensors` in place from a checkpoint and return its state. UserError, in all processes, says why not."""

        what, fix = f"checkpoint {path} cannot be loaded", "delete it to use the one before"

        def check() -> dict:
            with explained(what, fix):
                state = read_signed(path / "state.json", f"delete {path} to use the one before")
                if found := differing(state["config"], config):
                    raise ValueError(f"it is of a run with {found}")
                names = sorted(state["files"])
                if found := {p.name for p in path.iterdir()} ^ {*names, "state.json"}:
                    raise ValueError(f"{min(found)} is {'missing' if found & set(names) else 'not one of its files'}")
                for name in names[world.rank :: world.size]:
                    if file_sha256(path / name) != state["files"][name]:
                        raise ValueError(f"{name} was altered")
                return state

        def fill() -> None:
            with explained(what, fix, Exception, dcp.CheckpointException):
                reader = dcp.HuggingFaceStorageReader(str(path))
                dcp.load(tensors, storage_reader=reader, process_group=world.writers)

        state = world.together(check)
        world.together(fill)
        return state

    def log(self) -> list[dict]:
        """Rows of log.jsonl, without those that are damaged, such as the last one of a process killed in writing it."""
        rows = []
        for line in self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []:
            try:
                row = json.loads(line)
                rows += [row] if isinstance(row["step"], int) and "loss" in row else []
            except (ValueError, TypeError, KeyError, RecursionError):
                pass
        return rows

    def append(self, row: dict) -> None:
        with open(self.log_path, "a") as f:
            f.write(json.dumps(row) + "\n")
        self.track(row)

    def forget_after(self, step: int) -> int:
        """Drop log rows of steps that a resumed run will take again; returns how many."""
        rows = self.log()
        kept = [r for r in rows if r["step"] <= step]
        if self.log_path.exists():
            write_atomically(self.log_path, "".join(json.dumps(r) + "\n" for r in kept))
        return len(rows) - len(kept)

    def plot(self, title: str, bits: float, unit: str = "byte") -> None:
        """Draw loss.png; `bits` are bits per `unit` for a nat per token."""
        from matplotlib.figure import Figure  # takes half a second; no display and no backend is touched

        rows = self.log()
        steps, loss = (np.array([r[name] for r in rows if "skipped" not in r]) for name in ("step", "loss"))
        few = max(1, min(20, len(loss) // 5))
        read = np.minimum(np.arange(len(loss)) + 1, few)  # at the start there are fewer to average
        smooth = np.convolve(loss, np.ones(few))[: len(loss)] / read if len(loss) else loss
        validated = [r for r in rows if "val_loss" in r]
        fig = Figure(figsize=(7, 4), layout="constrained")
        ax = fig.subplots()
        ax.plot(steps, loss * bits, color="#9ecae1", linewidth=0.8, label="training, each step")
        ax.plot(steps, smooth * bits, color="#08519c", linewidth=1.8, label=f"training, mean of {few} steps")
        places = [r["step"] for r in validated]
        ax.plot(places, [r["val_loss"] * bits for r in validated], "o--", color="#d94801", label="validation")
        ax.set(xlabel="step", ylabel=f"bits per {unit}", title=title, ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        lines = ax.get_lines()
        if accuracy := [r["val_accuracy"] for r in validated if "val_accuracy" in r]:
            right = ax.twinx()
            right.set(ylabel="percent right", ylim=(0, 102))
            lines += right.plot(places, accuracy, "s-", color="#238b45", label="validation, percent right")
        ax.legend(handles=lines, loc="center right" if accuracy else "best")
        fig.savefig(self.path / "loss.png", dpi=150)


def numbers_in(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in dicts and lists, each called by the way to it, such as eta/0."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers_in(part, f"{name}/{key}" if name else key)
    elif isinstance(value, (int, float)):
        yield name, value


def make_tracker(config: TrainConfig) -> Callable[[dict], Any]:
    """What takes a row of the log to the tracker that `config` names; those that are known have the same interface."""
    if config.tracker == "none":
        return lambda row: None
    module = extra(config.tracker, f"--tracker {config.tracker}")
    module.init(project="nested-learning-hope", name=str(config.run_dir), config=asdict(config), resume="allow")
    return lambda row: module.log(dict(numbers_in(row)), step=row["step"])


# ---- Distribution ----


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with explained(f"--device {name} is not available here", "use cpu, or auto", RuntimeError, AssertionError):
        device = torch.empty(0, device=name).device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else device


class World:
    """The processes that train together: this one alone, or those that torchrun started, one for each GPU.

    They take the same steps in the same order, and what one of them decides or finds wrong they all get to know.
    """

    def __init__(self, config: TrainConfig):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(config.device)
        if config.batch_size % self.size or self.size % config.nodes:
            uneven = f"{self.size} processes on {config.nodes} nodes cannot share {config.batch_size} sequences evenly"
            raise UserError(f"{uneven}; give a multiple of them as --batch-size, and --nodes as torchrun's --nnodes")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            store = dist.HashStore()
            if "RANK" in os.environ:
                store, _, _ = next(rendezvous("env://"))
            if os.environ.get("LOCAL_WORLD_SIZE") == str(self.size):
                # Where torchrun restarts processes, its store still knows the addresses of those that died.
                store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
        # Processes agree by gloo, beside the computation on GPUs; so does the writer of checkpoints, in its own group.
        self.writers = dist.new_group(backend="gloo")

    def share(self, n: int) -> range:
        """Which of n rows are this process's."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, *values: float) -> list[float]:
        """Each value's sum over processes."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def together(self, act: Callable[[], Any]) -> Any:
        """act() in every process; a UserError of one is raised in all."""
        found, error, errors = None, "", [""] * self.size
        try:
            found = act()
        except UserError as e:
            error = str(e)
        dist.all_gather_object(errors, error)
        for error in filter(None, errors):
            raise UserError(error)
        return found

    def first(self, act: Callable[[], Any]) -> Any:
        """What act() returns in the first process, or its UserError, in all of them."""
        found = [self.together(lambda: act() if self.rank == 0 else None)]
        dist.broadcast_object_list(found, device=torch.device("cpu"))
        return found[0]

    def close(self) -> None:
        dist.barrier()
        dist.destroy_process_group()


def distribute(model: Hope, config: TrainConfig, world: World) -> None:
    """Cut the model up among the processes if it is to be (FSDP2).

    One group of weights for each block, gathered in bfloat16 where matrix products are; the start states and gates of
    memories have a group of their own, in float32. Hope runs a block once for every segment of a stream, and each run
    has a backward pass of its own for the CMS. Gathering weights and adding up gradients each time would cost one
    exchange a segment; so weights are gathered once a step (`gathered`), gradients are added up once a step
    (`sum_gradients`), and FSDP's hooks do nothing in between.
    """
    small = sum(p.numel() for p in model.parameters()) < 300e6 or world.size == 1
    if config.parallel == "ddp" or (config.parallel == "auto" and small):
        return
    per_node = world.size // config.nodes
    shape, names = ((config.nodes, per_node), ("node", "gpu")) if config.nodes > 1 else ((world.size,), ("gpu",))
    settings = dict(mesh=init_device_mesh(world.device.type, shape, mesh_dim_names=names), reshard_after_forward=False)
    low = torch.bfloat16 if precision(config, world.device) == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        exact = [getattr(block.memory, name, None) for name in ("start", "gates")]
        if exact := [module for module in exact if module]:
            fully_shard(exact, **settings)
        fully_shard(block, mp_policy=policy, **settings)
    fully_shard(model, **settings)
    model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(False)
    register_fsdp_forward_method(model, "observe")


def precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    low = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if low else torch.float32


def computing_in(config: TrainConfig, world: World) -> torch.autocast:
    """Matrix products in the run's precision."""
    dtype = precision(config, world.device)
    return torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def gathered(model: Hope) -> Iterator[None]:
    """Within, every process has all weights."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for handle in [part.unshard(async_op=True) for part in parts]:
        handle.wait()
    yield
    for part in parts:
        part.reshard()


def sum_gradients(model: Hope, config: TrainConfig, world: World) -> None:
    """Add up over processes what the step's backward passes have accumulated in each, once a step."""
    if isinstance(model, FSDPModule):
        # FSDP adds gradients up at the end of a backward pass. One over no tokens adds nothing of its own.
        model.set_requires_gradient_sync(True)
        with computing_in(config, world):
            nothing = model(torch.zeros(1, 0, dtype=torch.long, device=world.device))[0]
        nothing.sum().backward()
        model.set_requires_gradient_sync(False)
    elif world.size > 1:
        for work in [dist.all_reduce(p.grad, async_op=True) for p in model.parameters() if p.grad is not None]:
            work.wait()


# ---- Training ----


def make_optimizers(model: Hope, config: TrainConfig) -> list[torch.optim.Optimizer]:
    groups, name = hope.param_groups(model), config.optimizer
    adamw = dict(lr=config.lr, betas=(0.9, 0.95))
    decay = config.weight_decay / MATRIX_LR[name]  # a step of decay is lr times this
    matrix = [{"params": groups["matrix"], "weight_decay": decay, "lr_scale": MATRIX_LR[name]}]
    rest = [{"params": groups["rest"], "weight_decay": 0.0}]
    slow = hope.slow_groups(model, config.seq_len)
    if slow and name == "dgd":
        raise UserError(
            f"--optimizer dgd needs the inputs of a step, and a CMS chunk of {slow[0]['chunk']} tokens spans "
            f"{slow[0]['period']} steps of --seq-len {config.seq_len}; give --seq-len {slow[-1]['chunk']}, or another "
            "optimizer"
        )
    first = [optim.Accumulate(slow)] if slow else []
    last = [optim.EMA(model.parameters(), config.ema)] if config.ema else []
    if name == "adamw":
        return [*first, torch.optim.AdamW(matrix + rest, **adamw), *last]
    make = {
        # match_rms_adamw gives Muon's step the size of AdamW's, so that one learning rate serves both.
        "muon": lambda: torch.optim.Muon(matrix, lr=config.lr, adjust_lr_fn="match_rms_adamw"),
        "m3": lambda: optim.M3(matrix, lr=config.lr, dtype=precision(config, model.embed.weight.device)),
        "dgd": lambda: optim.DGD(model, matrix, lr=config.lr, delta=0.01),
        "delta-momentum": lambda: optim.DeltaMomentum(matrix, lr=config.lr),
        "deep-momentum": lambda: optim.DeepMomentum(matrix, lr=config.lr),
    }
    return [*first, make[name](), torch.optim.AdamW(rest, **adamw), *last]


@contextmanager
def averaged(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Inside, the average of the weights, if a run keeps one, is the model's, and they wait in its place."""

    @torch.no_grad()
    def swap() -> None:
        for average in (o for o in optimizers if isinstance(o, optim.EMA)):
            for p, state in average.state.items():
                weights = p.detach().clone()
                p.copy_(state["average"])
                state["average"].copy_(weights)

    swap()
    try:
        yield
    finally:
        swap()


def rise_of(config: TrainConfig) -> int:
    """Steps over which the learning rate rises."""
    return max(1, round(config.warmup * config.steps))


def decay_start(config: TrainConfig) -> int:
    """Steps taken before the learning rate begins to fall."""
    rise = rise_of(config)
    return max(rise, config.steps - round(config.decay_part * config.steps)) if config.schedule == "wsd" else rise


def learning_rate(step: int, config: TrainConfig) -> float:
    rise, start = rise_of(config), decay_start(config)
    if step < rise:
        return config.lr * (step + 1) / rise
    along = max(0.0, (step - start) / max(1, config.steps - start))
    left = 1 - along if config.schedule == "wsd" else (1 + math.cos(math.pi * along)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)


def at_once(config: TrainConfig, world: World) -> int:
    """Rows that a process takes at once, in training and, so that it needs no more memory, in validation."""
    return config.micro_batch or config.batch_size // world.size


def validate(model: Hope, corpus: Corpus, config: TrainConfig, world: World, bar: tqdm) -> dict[str, Any]:
    """What is found on held-out rows (see LOG), each observed from the start state, CMS writes included."""
    x, y = corpus.validation()
    mine = list(world.share(len(x)))
    # Under FSDP2 processes must run the model equally often: who has a row less takes one that does not count.
    idle = [0] * (math.ceil(len(x) / world.size) - len(mine))
    x, y = x[mine + idle].to(world.device), y[mine + idle].to(world.device)
    y[len(mine) :] = -100
    found: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))  # by name, a sum and of how many
    few, task = at_once(config, world), corpus.task
    with torch.no_grad():
        for i, (xs, ys) in enumerate(zip(x.split(few), y.split(few))):
            bar.set_postfix_str(f"validating, {i * few} of {len(x)} rows")
            losses, _, *logits = model.observe(xs, ys, reduction="none", logits=task is not None)
            found["loss"] += losses.double().sum().item(), (ys != -100).sum().item()
            for name, right_of_asked in task.counts(logits[0].argmax(-1), ys).items() if task else ():
                found[name] += right_of_asked
    sums = world.sum(*np.ravel([*found.values()]))
    found = dict(zip(found, zip(sums[::2], sums[1::2])))
    total, count = found.pop("loss")
    if not task:
        return {"val_loss": total / count, "val_bpb": total / count * corpus.bits}
    parts = tasks.percent(found)
    row = {"val_loss": total / count, "val_accuracy": parts.pop("accuracy")}
    return row | ({"val_parts": parts} if parts else {})


def find_gradients(
    model: Hope, x: Tensor, y: Tensor, config: TrainConfig, world: World, captured: graphs.Captured | None = None
) -> Tensor:
    """Gradients of the mean loss per scored token of the global batch, of which x, y are this process's rows.

    Returns this process's part of that loss. States live for one call of `observe`: no sequence sees another's. Rows on
    the CPU are counted without waiting for a GPU.
    """
    [scored] = world.sum((y != -100).sum().item())
    average = world.size if isinstance(model, FSDPModule) else 1  # FSDP divides what it adds up by this
    x, y, total = x.to(world.device), y.to(world.device), torch.zeros((), device=world.device)
    if captured:
        captured.zero_gradients()
    with gathered(model):
        for xs, ys in zip(x.split(at_once(config, world)), y.split(at_once(config, world))):
            if captured:
                total += captured(xs, ys) / max(1, scored)
                continue
            with computing_in(config, world):
                how = dict(backward=config.truncate, truncate=config.truncate)
                losses = model.observe(xs, ys, reduction="none", **how)[0]  # the state, which is large, goes at once
            loss = losses.sum() / max(1, scored)
            if not config.truncate:
                (loss * average).backward()
            total += loss.detach()
        sum_gradients(model, config, world)
    if config.truncate:  # the sum's gradients: the mean's are so much smaller
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(average / max(1, scored))
    return total


def clip_gradients(model: Hope, most: float) -> Tensor:
    """Scale gradients down to a norm of `most`; returns the norm that they had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most, error_if_nonfinite=False)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def why_skip(loss: float, norm: float, state: dict, config: TrainConfig) -> str:
    """Why this step is not taken, or nothing; keeps count in `state`, which goes into the checkpoint."""
    mean, why = state["mean_loss"], ""
    if not math.isfinite(loss) or not math.isfinite(norm):
        why = f"loss {loss:.3g}, gradient norm {norm:.3g}"
    elif config.spike and mean is not None and loss > config.spike * mean:
        why = f"loss {loss:.3g}, over {config.spike:g} times its running mean {mean:.3g}"
    else:
        state["mean_loss"] = loss if mean is None else 0.9 * mean + 0.1 * loss
    state["skips"] += bool(why)
    state["skips_in_a_row"] = state["skips_in_a_row"] + 1 if why else 0
    return why


def tensors_of(model: Hope, optimizers: Sequence[torch.optim.Optimizer] = ()) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: weights, optimizer states (if there are none yet, empty ones), torch's RNG."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        if not optimizer.state:
            get_optimizer_state_dict(model, optimizer)  # makes them, without a step
        for p, state in optimizer.state.items():
            prefix = f"{type(optimizer).__name__}.{names[p]}"
            tensors |= {f"{prefix}.{key}": v if v.ndim else v.view(1) for key, v in state.items()}
    return tensors


# Dense bfloat16 peaks in 10^12 operations a second, by a part of the name that torch gives the GPU.
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}


def peak_flops(config: TrainConfig, device: torch.device) -> float:
    """Of one device; 0 if it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return 1e12 * (config.peak_tflops or next((peak for part, peak in PEAKS.items() if part in name), 0))


@torch.no_grad()
def memory_numbers(model: Hope, x: Tensor, y: Tensor) -> dict[str, list]:
    """What memories do on rows x, y: mean eta and alpha, and norms of the states after them, per layer (see LOG)."""
    seen: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

    def note(name: str, layer: int) -> Callable:
        return lambda gate, inputs, z: seen[name, layer].append(hope.GATES[name](z).flatten())

    # Neither compiled chunks nor a layer's single launch call the gates.
    with ExitStack() as undo, kernels.using("reference"):
        for i, block in enumerate(model.blocks):
            for name, gate in getattr(block.memory, "gates", {}).items():
                undo.callback(gate.register_forward_hook(note(name, i)).remove)
        for module in model.modules():
            if getattr(module, "compiled", False):
                undo.callback(setattr, module, "compiled", True)
                module.compiled = False
        _, state = model.observe(x, y)
    norm = lambda weights: sum(w.float().square().sum((-2, -1)) for w in weights).sqrt().mean().item()
    mean = lambda found: torch.cat(found).mean().item() if found else None
    main = [m.main.now if isinstance(m, hope.MemoryState) else None for m in state.memories]
    return {name: [mean(seen[name, i]) for i in range(len(model.blocks))] for name in ("eta", "alpha")} | {
        "memory_norm": [norm([w[:, :, -1] for w in now]) if now else None for now in main],
        "cms_norm": [[norm(block.delta) for block in layer if block] for layer in state.cms],
    }


SPEED_SECONDS = 5.0


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turns Ctrl-C and SIGTERM into a flag, so that a step is finished and saved; a second one stops at once.

    Under torchrun it does not, since torchrun passes a Ctrl-C on that the process gets by itself as well; it kills what
    is left after 30 seconds.
    """
    hit = threading.Event()

    def note(number: int, frame: Any) -> None:
        if hit.is_set() and "RANK" not in os.environ:
            raise KeyboardInterrupt
        hit.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield hit
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def present_rate(recent: deque[tuple[float, float]], begun: float) -> float:
    """Steps a second, of those that ended in the last SPEED_SECONDS and the one that began at `begun` and ends now."""
    now = time.perf_counter()
    recent.append((now, now - begun))
    while now - recent[0][0] > SPEED_SECONDS:
        recent.popleft()
    return len(recent) / sum(seconds for _, seconds in recent)


def outcome(row: dict) -> str:
    """What a validation found."""
    return f"{row['val_bpb']:.3f} bits per byte" if "val_bpb" in row else f"{row['val_accuracy']:.1f}% right"


def show(bar: tqdm, row: dict, corpus: Corpus) -> None:
    """A row of the log on the progress bar; what is to stay, a validation or a skipped step, on a line of its own."""
    loss = (row["loss"] or math.nan) * corpus.bits
    text = f"loss {loss:.2f} bits per {corpus.unit}, {row['tokens_per_s']:,.0f} tokens/s"
    if "skipped" in row:
        bar.write(f"step {row['step']:>5}: skipped, {row['skipped']}")
    if "val_loss" in row:
        bar.write(f"step {row['step']:>5}: {text}, validation {outcome(row)}")
    bar.set_postfix_str(text, refresh=False)
    bar.update()


def resume(run: Run, config: dict, model: Hope, optimizers: list, world: World) -> dict:
    """Load the newest checkpoint that can be loaded, if there is any; returns its state, or that of a run's start."""
    say = print if world.rank == 0 else lambda text: None
    state = {"step": 0, "config": config, "mean_loss": None, "skips": 0, "skips_in_a_row": 0}
    saved, bad = world.first(run.saved), []
    tensors = tensors_of(model, optimizers) | {"rng": torch.get_rng_state()} if saved else {}
    for path in reversed(saved):
        try:
            state = run.load(path, config, tensors, world)
            torch.set_rng_state(tensors["rng"])
            say(f"{run.path}: going on after step {state['step']}")
            break
        except UserError as e:
            if path == saved[0]:
                raise
            bad.append(path)
            say(f"{e}: done, it is set aside")

    def clean() -> None:
        for path in bad:
            path.rename(path.with_name(f"damaged-{path.name}"))
        if lost := run.forget_after(state["step"]):
            say(f"{lost} steps that were taken after that checkpoint are taken again")

    world.first(clean)
    return state


def train(config: TrainConfig, model_config: HopeConfig) -> int:
    """Train, or go on training, in `config.run_dir`. Returns the process's exit code."""
    world, run = World(config), Run(config.run_dir)
    try:
        code = training_loop(run, world, config, model_config)
        world.close()
        return code
    finally:
        run.lock.release()


def result(run: Run) -> str:
    last = next((row for row in reversed(run.log()) if "val_loss" in row), None)
    found = f"{outcome(last)} after {last['step']} steps" if last else "none in the log"
    return f"validation: {found}\nloss curve: {run.path}/loss.png"


def training_loop(run: Run, world: World, config: TrainConfig, model_config: HopeConfig) -> int:
    torch.set_flush_denormal(True)  # states that decay to nothing would slow a CPU down fivefold
    if world.device.type == "cuda" and precision(config, world.device) == torch.bfloat16:
        torch.set_float32_matmul_precision("high")  # what stays float32, memories, multiplies in TF32
    say = print if world.rank == 0 else lambda *text: None
    if config.compile and model_config.inner_grad == "full":
        raise UserError("torch.compile has no second derivatives, which --inner-grad full needs; leave out one of them")
    # Unprepared data is prepared by the first process to lock it, and the others wait.
    corpus = world.together(lambda: Corpus.open(config))
    tokenizer = corpus.tokenizer
    there = model_config.vocab_size if config.init_from else 0  # embeddings
    model_config = replace(model_config, vocab_size=max(corpus.vocab_size, there))
    hashes = {"data_sha256": corpus.sha256, "tokenizer_sha256": tokenizer and tokenizer.sha256}
    stored = to_json(config, model_config, hashes)
    torch.manual_seed(config.seed)
    model = Hope(model_config).to(world.device)
    if config.init_from:
        world.together(lambda: init_from(model, tokenizer, Path(config.init_from)))
    if longer := world.first(lambda: run.open(stored)):
        say(longer)
    world.first(lambda: tokenizer and tokenizer.save(run.path))
    model.recompute = config.recompute
    distribute(model, config, world)
    if config.compile:
        say("compiling: the first step and the first validation take a minute or two more")
        hope.compile_parts(model)
    optimizers = make_optimizers(model, config)
    state = resume(run, stored, model, optimizers, world)
    start = state["step"]
    if start == config.steps:
        again = f"train longer: --resume {run.path} --steps {2 * start}"
        say(f"{run.path}: finished already; {again}\n{result(run)}")
        return 0
    size = sum(p.numel() for p in model.parameters())
    what = f"from {Path(config.init_from).name}" if config.init_from else f"size {config.size}"
    title = f"{config.arch}, {what}, {size:,} parameters"
    on = f"{world.size} x {world.device.type}" if world.size > 1 else world.device
    view = hope.levels(model, [o for o in optimizers if not isinstance(o, optim.EMA)])
    say(f"\n{title}\n{corpus}, on {on}\n\n{view}\n")
    how = at_once(config, world), config.batch_size // world.size, config.seq_len, partial(computing_in, config, world)
    captured = graphs.for_training(model, *how) if config.capture else None
    peak, inner = world.size * peak_flops(config, world.device), size - model.embed.weight.numel()
    if world.rank == 0:
        run.track = make_tracker(config)
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
    bar = tqdm(total=config.steps, initial=start, disable=True if world.rank else None, bar_format=form)
    tokens, stop, recent = config.batch_size * config.seq_len, False, deque()
    with interruptible() as interrupt, bar:
        for step in range(start + 1, config.steps + 1):
            lr, begun = learning_rate(step - 1, config), time.perf_counter()
            for optimizer in optimizers:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_scale", 1.0)
            x, y = corpus.batch(step - 1, world.share(config.batch_size))
            loss = find_gradients(model, x, y, config, world, captured)
            norm = clip_gradients(model, config.grad_clip)
            loss, norm = torch.stack([loss, norm]).tolist()  # a GPU is waited for once a step
            loss, stop = world.sum(loss, interrupt.is_set())
            skipped = why_skip(loss, norm, state, config)
            if not skipped:
                for optimizer in optimizers:
                    optimizer.step()
            state["step"] = step
            speed = tokens * present_rate(recent, begun)
            row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": step * tokens}
            row |= {"tokens_per_s": round(speed, 1)} | ({"utilisation": 6 * inner * speed / peak} if peak else {})
            if skipped:
                finite = {name: row[name] if math.isfinite(row[name]) else None for name in ("loss", "grad_norm")}
                row |= {"skipped": skipped, **finite}
            diverged, last = state["skips_in_a_row"] >= config.max_skips, step == config.steps
            if not diverged and (step % config.eval_every == 0 or last):
                with averaged(optimizers), gathered(model), computing_in(config, world):
                    row |= validate(model, corpus, config, world, bar)
                    few = min(4, at_once(config, world))
                    row |= memory_numbers(model, *(z[:few].to(world.device) for z in corpus.validation()))
            if world.rank == 0:
                run.append(row)
                show(bar, row, corpus)
            if diverged:
                run.wait(world)
                batch = f"the batch is that of step {step} and seed {config.seed}"
                good = f"the last good checkpoint {run.saved()[-1] if run.saved() else 'none'}"
                many = f"{config.max_skips} steps in a row were skipped"
                fix = f"try a smaller --lr than {config.lr:g}"
                raise UserError(f"{skipped} at step {step}: training diverged, {many}; {batch}, {good}; {fix}")
            before_decay = config.schedule == "wsd" and step == decay_start(config)
            if step % config.save_every == 0 or stop or last or before_decay:
                tensors = tensors_of(model, optimizers) | {"rng": torch.get_rng_state()}
                run.save(state, tensors, config, world)
            if world.rank == 0 and ("val_loss" in row or stop):
                run.plot(title, corpus.bits, corpus.unit)
            if stop:
                break
        run.wait(world)
    if state["step"] < config.steps:
        say(f"\nStopped and saved after step {state['step']}. To go on: python train.py --resume {run.path}")
        return 130
    if world.rank == 0:
        print(f"\n{result(run)}\n\nA sample:\n")
    with averaged(optimizers), gathered(model), computing_in(config, world):
        world.first(lambda: print(sample(model, tokenizer, config, Command(), config.seed)))
    say(f"\nMore: python train.py --sample {run.path} " + ("--seed 1" if corpus.task else '--prompt "The "'))
    return 0


# ---- Sampling and export ----


def sample(model: Hope, tokenizer: Tokenizer | None, config: TrainConfig, how: Command, seed: int) -> str:
    """What a model of a run writes, or of a task, what it answers."""
    task = task_of(config.data)
    return sample_answers(model, task, seed) if task else sample_text(model, tokenizer, how, seed)


@torch.no_grad()
def sample_answers(model: Hope, task: tasks.Task, seed: int, most: int = 256) -> str:
    """The end of a test row, with the model's answers in brackets."""
    tokens, targets = (z.to(model.embed.weight.device) for z in task.rows("test", seed, 0, 1))
    answers = model.observe(tokens, targets, reduction="none", logits=True)[2].argmax(-1)
    return task.show(*(z[0, -most:] for z in (tokens, targets, answers)))


def drawing(how: Command) -> dict[str, Any]:
    return dict(temperature=how.temperature, top_k=how.top_k or None, top_p=how.top_p)


def sample_text(model: Hope, tokenizer: Tokenizer, how: Command, seed: int) -> str:
    """The prompt and what the model makes of it, up to the end of the document, control characters as \\x1b."""
    torch.manual_seed(seed)
    tokens = tokenizer.encode(how.prompt).tolist()
    longest = model.config.n_position or math.inf  # with learnt positions a stream has an end
    most = int(min(how.max_new_tokens, max(1, longest - len(tokens))))
    fix = "it has diverged: train anew with a smaller --lr, or delete its last checkpoints"
    with explained("this model gives no sample", fix, RuntimeError, ValueError):
        said = [piece for piece, _ in chat.say(model, tokenizer, tokens, most, **drawing(how))]
    return chat.printable("".join([how.prompt, *said]))


def trained(path: Path, device: str | None) -> tuple[TrainConfig, Hope, Tokenizer | None, dict]:
    """Settings, model (its averaged weights, if any) and tokenizer of the run or export at `path`, and what it is.

    A run's newest checkpoint, unless `path` is that of another one. A run on a task has no tokenizer. It may also be
    the folder of a pre-trained model of transformers.
    """
    chosen = path if path.parent.name == "checkpoints" else None
    path = chosen.parents[1] if chosen else path
    run = Run(path)
    if theirs := of_transformers(path):
        config = TrainConfig(arch="hope-attention", init_from=str(path))
        model = hope.from_pretrained(theirs(weights=True)).to(World(replace(config, device=device or "auto")).device)
        return config, model, make_tokenizer(str(path), tuple), {}
    config, model_config, sha256 = from_json(path / "config.json")
    exported = (path / "model.safetensors").exists()
    anew = f"or have it written anew: python train.py --resume {path}"
    if not run.saved() and not exported:
        raise UserError(f"{path} has no checkpoint yet; train first: python train.py --resume {path}")
    is_text = not config.data.startswith("task:")
    tokenizer = Tokenizer.of(path, sha256["tokenizer_sha256"], f"restore it, {anew}") if is_text else None
    world = World(replace(config, device=device or config.device))
    model = Hope(model_config).to(world.device)
    if exported:
        init_from(model, tokenizer, path)
        return config, model, tokenizer, to_json(config, model_config, sha256)
    average = [optim.EMA(model.parameters(), config.ema)] if config.ema else []
    about = to_json(config, model_config, sha256)
    if chosen and chosen not in run.saved():
        raise UserError(f"there is no {chosen}; there are: {', '.join(p.name for p in run.saved())}")
    state = run.load(chosen or run.saved()[-1], about, tensors_of(model, average), world)
    with averaged(average):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(weights)
    return config, model, tokenizer, about | {"step": state["step"]}


def export(run: Path, device: str | None) -> None:
    """Write RUN/export: weights, settings and tokenizer for --init-from, and what transformers needs; see hub.py."""
    if (run / "model.safetensors").exists():
        raise UserError(f"{run} is an export already; give the run that it was made from")
    _, model, tokenizer, about = trained(run, device)
    target, beside = run / "export", run / ".export"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    validated = [row for row in Run(run).log() if "val_loss" in row and row["step"] <= about["step"]]
    hub.write_folder(beside, model, tokenizer, about, validated[-1] if validated else {})
    put_in_place(beside, target)
    print(f"{target}: {sum(p.numel() for p in model.parameters()):,} parameters; AutoModelForCausalLM reads it as well")


# ---- Command line: one flag for every field of the four configs ----

# What --help shows; --help-all shows everything.
EVERYDAY = (
    "resume", "prepare", "sample", "chat", "export", "plan", "prompt", "size", "arch", "data", "tokenizer", "out",
    "steps", "batch_size", "seq_len", "optimizer", "lr", "seed", "device",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the nearest flag."""

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments"):
            flag = message.split(":", 1)[1].split()[0]
            close = difflib.get_close_matches(flag.split("=")[0], self._option_string_actions, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            message = f"unknown flag {flag}{hint} (python train.py --help-all lists all)"
        print(f"train.py: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def number_list(text: str) -> tuple[float, ...]:
    return tuple(float(c) for c in text.split(",") if c)


def name_list(text: str) -> tuple[str, ...]:
    return tuple(n for n in text.split(",") if n)


# How the value of a flag is read and called in the help, by the type of its field.
KINDS = {
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    str: {"type": str, "metavar": "TEXT"},
    tuple[float, ...]: {"type": number_list, "metavar": "X,X,..."},
    tuple[str, ...]: {"type": name_list, "metavar": "NAME,NAME,..."},
    bool: {"action": argparse.BooleanOptionalAction},
}


class Help(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, up to 120; what an example does stands below it where there is no room beside it."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(re.sub(r"(?<=\S) {2,}", "\n        ", s) if len(s) > width else s for s in lines)


def make_parser(everything: bool = True) -> argparse.ArgumentParser:
    """A parser in which flags that are not given are None, so that presets and stored runs keep their values."""
    look = dict(formatter_class=Help, description=__doc__.split("\n\nIn this file")[0])
    parser = Parser(prog="train.py", usage="python train.py [FLAG ...]", allow_abbrev=False, add_help=False, **look)
    parser.add_argument("--help", action="store_true", help="what most runs need")
    parser.add_argument(
        "--help-all", action="store_true", help="every flag, those of the model and its memories as well"
    )
    for title, config in (
        ("instead of starting a run", Command),
        ("training", TrainConfig),
        ("model (defaults are those of --arch hope)", HopeConfig),
        ("memory, the sequence layer (defaults are those of --arch hope)", MemoryConfig),
    ):
        group, hints = parser.add_argument_group(title), get_type_hints(config)
        for f in fields(config):
            if f.name in ("memory", "vocab_size"):  # a config of its own, and what the tokenizer has
                continue
            hint = hints[f.name]
            choices = get_args(hint) if "Literal" in str(hint) else None
            kind = {"choices": choices, "type": type(choices[0])} if choices else KINDS[hint]
            shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
            text = f.metadata["help"].replace("%", "%%") + f" (default: {shown})" * (shown not in ("", "False"))
            text = text if everything or f.name in EVERYDAY else argparse.SUPPRESS
            group.add_argument(as_flag(f.name), default=None, help=text, **kind)
    return parser


def given(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """What the command line says of a config's fields."""
    values = {f.name: getattr(args, f.name, None) for f in fields(config)}
    return {k: v for k, v in values.items() if v is not None}


def configs(args: argparse.Namespace) -> tuple[TrainConfig, HopeConfig]:
    """The configs of a run, which are those of --resume, of --init-from or of a preset, changed by what is given."""
    settings, outer, inner = (given(args, config) for config in (TrainConfig, HopeConfig, MemoryConfig))
    if task := task_of(settings.get("data", "")):
        settings = {"seq_len": task.length, "batch_size": 32} | settings
    if not (folder := args.resume or args.init_from):
        config = TrainConfig(**settings)
        return config, HopeConfig.preset(config.size, config.arch, **outer, **inner)
    if not args.resume and (theirs := of_transformers(Path(folder))):
        base = {"arch": "hope-attention", "tokenizer": folder, "out": f"runs/{Path(folder).resolve().name}"}
        return TrainConfig(**base | settings), pretrained_config(theirs(), **outer, **inner)
    config, model, _ = from_json(Path(folder, "config.json"))
    base = {"size": config.size, "arch": config.arch, "tokenizer": tokenizer_in(Path(folder))}
    settings = asdict(config) | settings | {"out": folder} if args.resume else base | settings
    return TrainConfig(**settings), replace(model, memory=replace(model.memory, **inner), **outer)


def run_command(args: argparse.Namespace) -> int:
    command = Command(**given(args, Command))
    command.refuse_ignored(name for name, value in vars(args).items() if value not in (None, False))
    if folder := command.sample or command.chat:
        if not command.prompt:
            raise UserError('--prompt is empty; give some text to start from, as in --prompt "The "')
        config, model, tokenizer, _ = trained(Path(folder), args.device)
        seed = config.seed if args.seed is None else args.seed
        if command.sample:
            print(sample(model, tokenizer, config, command, seed))
            return 0
        if tokenizer is None:
            raise UserError(f"{folder} was trained on {config.data}, which is no text to talk in; see --sample")
        torch.manual_seed(seed)
        title = f"{folder}: {config.arch}, {sum(p.numel() for p in model.parameters()):,} parameters"
        chat.talk(model, tokenizer, title, max_new_tokens=command.max_new_tokens, **drawing(command))
    elif command.export:
        export(Path(command.export), args.device)
    elif command.plan:
        plan.print_plan(*configs(args), command, make_optimizers)
    elif command.prepare:
        print(Corpus.open(configs(args)[0]))
    else:
        return train(*configs(args))
    return 0


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.help or args.help_all:
        make_parser(args.help_all).print_help()
        return 0
    try:
        return run_command(args)
    except (UserError, ValueError) as e:
        message = str(e)
    except OSError as e:
        message = f"{e.filename or 'writing'}: {reason(e)}"
    except KeyboardInterrupt:  # outside the steps, where nothing is lost: data that is prepared so far is kept
        print("train.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    if os.environ.get("RANK", "0") == "0":  # the others found the same
        print(f"train.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    if "RANK" in os.environ:  # gloo's threads sometimes abort a process that ends as usual
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
