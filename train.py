"""Train Hope and its relatives, sample from them, and go on where a run stopped.

    python train.py                                    Hope, size tiny, on the text that ships with Python
    python train.py --arch transformer++               the baseline, same data, same steps
    python train.py --data my.txt                      your own text: files, patterns, or a data set of the hub
    python train.py --sample runs/tiny --prompt "The " continue a prompt with a trained model
    python train.py --resume runs/tiny                 go on with a run that was stopped
    torchrun --nproc_per_node=8 train.py --size 760m   eight GPUs; --nodes for more than one machine

Every setting is a flag; a run directory holds config.json, log.jsonl, loss.png and checkpoints. Nothing is unpickled.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import difflib
import glob
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from safetensors import SafetensorError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import hope
import optim
from hope import Hope, HopeConfig, MemoryConfig, check_choices, check_positive, setting

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process needs none
# A state's tensors may be views, which nothing writes in place.
warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The model has a config of its own, `hope.HopeConfig`."""

    size: Literal[tuple(HopeConfig.SIZES)] = setting("tiny", "width and depth of the model")
    arch: Literal[tuple(HopeConfig.ARCHS)] = setting("hope", "architecture")
    data: str = setting(
        "pydoc",
        "pydoc (the text that ships with Python); fineweb-edu, wikitext-103, tinystories; hf:NAME for any data set of the "
        "Hugging Face hub; files and patterns, separated by commas: text in UTF-8, .jsonl, .parquet, also .gz and .zst; or a "
        "folder that --prepare made",
    )
    data_config: str = setting("", "config of a data set of the hub, where it has several")
    data_split: str = setting("train", "split of a data set of the hub")
    text_field: str = setting("text", "field of a jsonl file, parquet file or data set that holds the text")
    tokenizer: str = setting(
        "",
        "bytes; train:N for N byte pairs learnt from the data; a tiktoken encoding such as gpt2; or a .tiktoken file; "
        "default: bytes for size tiny, else train:32000",
    )
    held_out: float = setting(
        0.0, "part of the documents that is held out; 0 for the data's own: a tenth, less of the named data sets"
    )
    reset_at_documents: bool = setting(
        False, "rows hold one document each, filled up if it is short, so that memories and attention see no other one"
    )
    data_dir: str = setting("data", "where prepared data is kept")
    verify_data: bool = setting(False, "hash prepared data anew, even if it looks untouched by size and time of change")
    out: str = setting("", "run directory; default: runs/SIZE, with -ARCH appended for other architectures than hope")
    steps: int = setting(200, "optimizer steps")
    batch_size: int = setting(2, "sequences a step")
    seq_len: int = setting(512, "tokens of a sequence")
    optimizer: Literal["muon", "adamw", "m3", "dgd", "delta-momentum", "deep-momentum"] = setting(
        "muon", "what trains the matrices; AdamW trains the rest"
    )
    lr: float = setting(1e-2, "peak learning rate")
    schedule: Literal["cosine", "wsd"] = setting(
        "cosine",
        "how the learning rate falls after its rise: along a cosine, or not until the end, then straight (wsd)",
    )
    warmup: float = setting(0.05, "part of the steps over which the learning rate rises")
    decay_part: float = setting(0.2, "wsd: part of the steps over which the learning rate falls")
    final_lr: float = setting(0.05, "learning rate at the end, as a part of the peak")
    weight_decay: float = setting(0.1, "decoupled weight decay of the matrices; nothing else decays")
    grad_clip: float = setting(1.0, "gradient norm above which gradients are scaled down")
    seed: int = setting(0, "seeds the start weights and the order of the data")
    ema: float = setting(
        0.0, "decay per step of an average of the weights, with which validation and samples are done; 0 for none"
    )
    init_from: str = setting("", "a folder that --export made: start with its model's weights, settings and tokenizer")
    overfit_one_batch: bool = setting(False, "read the first batch at every step: the loss must fall to almost nothing")
    eval_every: int = setting(50, "steps between two validations")
    save_every: int = setting(50, "steps between two checkpoints")
    keep: int = setting(2, "checkpoints that are kept")
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = setting(
        "none", "where the log goes besides log.jsonl"
    )
    peak_tflops: float = setting(
        0.0,
        "peak of one device, in 10^12 operations a second, to measure utilisation by; 0 for known GPUs' in bfloat16",
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of matrix products; memories and optimizers stay in float32. auto: bfloat16 on GPUs"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = setting(
        "auto",
        "under torchrun: ddp keeps the model in every process, fsdp a part of it; auto: fsdp from 300M parameters",
    )
    nodes: int = setting(1, "machines; with fsdp every machine holds the whole model, in parts (HSDP)")
    micro_batch: int = setting(0, "sequences that a process takes at once, the rest of its share follows; 0 for all")
    recompute: bool = setting(
        False,
        "recompute every block in the backward pass: less memory, a third more time, two thirds with a CMS written in context",
    )
    truncate: bool = setting(
        False,
        "go back through each segment of the CMS by itself: memory does not grow with --seq-len, but nothing learns from what a "
        "write does for later segments",
    )
    compile: bool = setting(
        False,
        "compile the memories' chunks and the MLPs with torch.compile: on CPUs a minute or two, then 1.2 to 1.4 times as fast",
    )
    max_skips: int = setting(
        10, "a step whose loss or gradient is not finite is skipped; after so many in a row the run stops"
    )
    spike: float = setting(0.0, "also skip a step whose loss is over this many times its running mean; 0 for never")

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "steps", "batch_size", "seq_len", "eval_every", "save_every", "keep", "nodes", "max_skips")
        if self.micro_batch < 0:
            raise ValueError(f"micro_batch is {self.micro_batch}; give a number of sequences, or 0 for all at once")
        if self.lr <= 0 or self.grad_clip <= 0:
            raise ValueError(f"lr is {self.lr}, grad_clip is {self.grad_clip}; both must be positive")
        for name in ("warmup", "decay_part", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a part, from 0 to 1")
        if self.spike < 0 or 0 < self.spike <= 1:
            raise ValueError(f"spike is {self.spike}; give a factor above 1, or 0 to skip no finite step")
        for name in ("held_out", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is from 0 to below 1")

    @property
    def run_dir(self) -> Path:
        name = self.size if self.arch == "hope" else f"{self.size}-{self.arch}"
        return Path(self.out or f"runs/{name}")

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer or ("bytes" if self.size == "tiny" else "train:32000")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside, then rename: a reader sees all of it or what was there before."""
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def reason(e: BaseException) -> str:
    """An exception in one line, with its type unless that says nothing."""
    while isinstance(e, CheckpointException) and e.failures:
        e = next(iter(e.failures.values()))[0]
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    text = (str(e).strip().splitlines() or [""])[0][:200]
    return text if text and type(e) is ValueError else f"{type(e).__name__}: {text}".removesuffix(": ")


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# How text is split before byte pairs are merged: GPT-4's pattern, as tiktoken has it for cl100k_base.
SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"


def extra(module: str, what: str) -> Any:
    """Import a package that the default run does without."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        name = module.split(".")[0]
        install = name if name in ("tensorboard", "trackio", "wandb") else '"nested-learning-hope[data]"'
        raise UserError(f"{what} needs {name}, which is missing; run: pip install {install}") from e


class Tokenizer:
    """Text as bytes, or as byte pairs merged by rank: what a `.tiktoken` file holds, together with a split pattern.

    One token, `eot`, stands in front of every document. Among bytes it is the zero byte, which text does without;
    otherwise the first number that `ranks` leaves free. decode(encode(text)) == text for any text; half a surrogate
    pair, which is no text, becomes a question mark.
    """

    def __init__(self, ranks: dict[bytes, int] | None = None, pattern: str = SPLIT):
        self.ranks, self.pattern = ranks, pattern
        used = {0: b""} | {i: bytes([i]) for i in range(1, 256)} if ranks is None else {i: t for t, i in ranks.items()}
        self.eot = 0 if ranks is None else next(i for i in range(len(used) + 1) if i not in used)
        self.vocab_size = max(*used, self.eot) + 1
        # Bytes of text that every token stands for; bits per byte are counted with it.
        self.lengths = np.array([len(used.get(i, b"")) for i in range(self.vocab_size)])
        self.dtype = np.uint8 if ranks is None else np.uint16 if self.vocab_size <= 2**16 else np.uint32
        if ranks is not None:
            tiktoken = extra("tiktoken", "--tokenizer")
            self.encoding = tiktoken.Encoding(
                "", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|eot|>": self.eot}
            )

    @cached_property
    def sha256(self) -> str:
        return fingerprint([self.pattern, sorted((i, t.hex()) for t, i in self.ranks.items())] if self.ranks else None)

    def encode(self, text: str) -> np.ndarray:
        raw = text.encode(errors="replace")
        if self.ranks is None:
            return np.frombuffer(raw, np.uint8)
        return self.encoding.encode_to_numpy(raw.decode(), disallowed_special=()).astype(self.dtype)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is not UTF-8 is shown as U+FFFD."""
        if self.ranks is None:
            return bytes(tokens).decode(errors="replace")
        return self.encoding.decode_bytes([t for t in tokens if self.lengths[t]]).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write tokenizer.tiktoken and, for the pattern, tokenizer.json; bytes need neither."""
        if self.ranks is not None:
            lines = (f"{base64.b64encode(t).decode()} {i}\n" for t, i in sorted(self.ranks.items(), key=lambda r: r[1]))
            write_atomically(folder / "tokenizer.json", json.dumps({"pattern": self.pattern}) + "\n")
            write_atomically(folder / "tokenizer.tiktoken", "".join(lines))

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Read a `.tiktoken` file, with the pattern from the .json file beside it, or GPT-4's if there is none."""
        try:
            lines = (line.split() for line in path.read_text().splitlines() if line)
            ranks = {base64.b64decode(token, validate=True): int(i) for token, i in lines}
            beside = path.with_suffix(".json")
            pattern = json.loads(beside.read_text())["pattern"] if beside.exists() else SPLIT
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"tokenizer {path} cannot be read ({e}); it must be a file in tiktoken's format") from e
        numbers = sorted(ranks.values())
        if not {bytes([i]) for i in range(256)} <= set(ranks) or len(set(numbers)) < len(ranks) or numbers[0] < 0:
            raise UserError(f"tokenizer {path} cannot be used; it must hold all 256 bytes and no number twice")
        if numbers[-1] > 2 * len(ranks):
            raise UserError(f"tokenizer {path} numbers {len(ranks)} tokens up to {numbers[-1]}; number them from 0 on")
        try:
            return Tokenizer(ranks, pattern)
        except ValueError as e:
            raise UserError(f"tokenizer {path} cannot be used ({e})") from e

    @staticmethod
    def train(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
        """Byte-pair encoding learnt from texts, at most 1 GB of them. Text too small for so many tokens gives fewer."""
        trainer, left = extra("rustbpe", "--tokenizer train:N").Tokenizer(), 2**30

        def some() -> Iterator[str]:
            nonlocal left
            for text in texts:
                yield text
                left -= len(text)
                if left <= 0:
                    return

        trainer.train_from_iterator(some(), vocab_size=vocab_size - 1, pattern=SPLIT)  # one is for eot
        tokenizer = Tokenizer({bytes(token): i for token, i in trainer.get_mergeable_ranks()})
        if tokenizer.vocab_size < vocab_size:
            print(f"the text yields {tokenizer.vocab_size:,} tokens, not {vocab_size:,}: the vocabulary is that small")
        return tokenizer


def asked_size(name: str) -> int:
    """The N of train:N."""
    if not name[6:].isdecimal() or not 257 <= int(name[6:]) <= 2**24:
        raise UserError(f"--tokenizer {name}: the vocabulary is a number of tokens from 257, as in train:32000")
    return int(name[6:])


def make_tokenizer(name: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that --tokenizer names; `texts` are what train:N learns from."""
    if name == "bytes":
        return Tokenizer()
    if name.startswith("train:"):
        return Tokenizer.train(asked_size(name), texts())
    if name.endswith(".tiktoken"):
        return Tokenizer.load(Path(name))
    tiktoken = extra("tiktoken", f"--tokenizer {name}")
    if name not in tiktoken.list_encoding_names():
        raise UserError(
            f"--tokenizer {name}: no such tokenizer; allowed: bytes, train:N, a .tiktoken file, "
            f"{', '.join(tiktoken.list_encoding_names())}"
        )
    try:
        named = tiktoken.get_encoding(name)
    except OSError as e:
        raise UserError(
            f"--tokenizer {name} must be downloaded once, and that failed ({type(e).__name__}); "
            "connect to the network, or use bytes, train:N or a .tiktoken file"
        ) from e
    return Tokenizer(named._mergeable_ranks, named._pat_str)  # the way tiktoken's own README extends an encoding


# ----------------------------------------------------------------------------------------------------------------------
# Data: documents -> shards of tokens -> the rows of a step


def pydoc_documents() -> list[tuple[str, bool]]:
    """English about Python from the standard library's `pydoc_data`: topics, and whether each is held out.

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
    return [(kept[name], i % 10 == 5) for i, name in enumerate(sorted(kept))]


def pydoc_text() -> tuple[str, str]:
    """The same as two texts, for training and held out."""
    return tuple("\n\n".join(t for t, held in pydoc_documents() if held is which) for which in (False, True))


# Named data sets of the Hugging Face hub: their names there, configs, and the part that is held out. WikiText's rows
# are lines, and an article begins with a line such as " = Title = ".
HUB = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-100BT", 0.0005),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1", 0.01),
    "tinystories": ("roneneldan/TinyStories", None, 0.01),
}
WIKITEXT_TITLE = re.compile(r" = [^=].* = \n")
PIECE = 2**20  # bytes of a text file that are read at once, and characters that are tokenised at once
SHARD = 2**25  # tokens of a shard, which is what an interrupted preparation does not have to do again


def parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class Source:
    """The text that --data names, piece by piece, always in the same order.

    Iterating gives (text, whether it begins a document). A text file is one document and comes in pieces; a row of a
    jsonl or parquet file or of a data set is one. `position` is where to go on, and is set to start from there.
    """

    def __init__(self, config: TrainConfig):
        self.data, self.field = config.data, config.text_field
        self.position: Any = [0, 0]
        self.held_out = config.held_out or 0.1
        if config.data in HUB or config.data.startswith("hf:"):
            name, preset, held_out = HUB.get(config.data, (config.data[3:], None, 0.1))
            self.held_out = config.held_out or held_out
            self.hub = (name, config.data_config or preset, config.data_split)
            self.identity = {"hub": self.hub}
        else:
            self.hub, self.files = None, self._find(config.data)
            self.identity = {"files": [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]}
        self.identity |= {"field": self.field, "held_out": self.held_out}

    @staticmethod
    def _find(data: str) -> list[Path]:
        found: set[str] = set()
        for pattern in [data] if Path(data).is_file() else data.split(","):
            files = [f for f in glob.glob(pattern, recursive=True) if Path(f).is_file()]
            if not files:
                raise UserError(
                    f"--data {pattern}: no such file; give files or patterns separated by commas, hf:NAME for a data "
                    f"set of the Hugging Face hub, or one of: pydoc, {', '.join(HUB)}"
                )
            found |= set(files)
        return [Path(f) for f in sorted(found)]

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        if self.hub:
            yield from self._rows()
            return
        first, done = self.position
        for i, path in list(enumerate(self.files))[first:]:
            self.position = [i, done]
            for piece in islice(self._read(path), done, None):
                self.position = [i, self.position[1] + 1]
                yield piece
            done = 0

    def _rows(self) -> Iterator[tuple[str, bool]]:
        datasets, (name, config, split) = extra("datasets", f"--data {self.data}"), self.hub
        again = "run the same command again to go on where it stopped"
        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
            if self.position != [0, 0]:
                rows.load_state_dict(self.position)
            iterator = iter(rows)
        except Exception as e:  # many kinds, from three libraries
            raise UserError(
                f"--data {self.data}, config {config}, split {split} cannot be read ({reason(e)}); "
                "check the names (--data-config, --data-split) and the network"
            ) from e
        self.state = rows.state_dict
        while True:
            try:
                row = next(iterator, None)
            except Exception as e:
                raise UserError(f"--data {self.data}: reading failed ({reason(e)}); {again}") from e
            if row is None:
                return
            text = self._field(row, f"--data {self.data}")
            yield text, self.data != "wikitext-103" or WIKITEXT_TITLE.fullmatch(text) is not None

    def now(self) -> Any:
        return self.state() if self.hub else self.position

    def _field(self, row: Any, where: str) -> str:
        if not isinstance(row, dict) or not isinstance(row.get(self.field), str):
            fields = ", ".join(row) if isinstance(row, dict) else "no JSON object"
            raise UserError(f"{where}: no text in field {self.field!r}, there is: {fields}; name it by --text-field")
        return row[self.field]

    @staticmethod
    def _open(path: Path, where: str) -> Any:
        if path.suffix == ".zst":  # by pyarrow: the zstandard package takes a file that was cut for a whole one
            return io.BufferedReader(extra("pyarrow", where).input_stream(str(path), compression="zstd"))
        return (gzip.open if path.suffix == ".gz" else open)(path, "rb")

    def _read(self, path: Path) -> Iterator[tuple[str, bool]]:
        """(piece, whether it begins a document) of a file."""
        kind = [s for s in path.suffixes if s not in (".gz", ".zst")][-1:]
        where = f"--data {path}"
        try:
            if kind == [".parquet"]:
                parquet = extra("pyarrow.parquet", where).ParquetFile(path)
                columns = [self.field] if self.field in parquet.schema_arrow.names else None
                for batch in parquet.iter_batches(64, columns=columns):
                    for row in batch.to_pylist():
                        yield self._field(row, where), True
                return
            with self._open(path, where) as f:
                if kind == [".jsonl"]:
                    for n, line in enumerate(f, 1):
                        if line.strip():
                            yield self._field(parse(line), f"{where}, line {n}"), True
                    return
                decoder, seen, begins = codecs.getincrementaldecoder("utf-8")(), 0, True
                while True:
                    block = f.read(PIECE)
                    start = seen - len(decoder.getstate()[0])  # the last block may have cut a character
                    try:
                        text = decoder.decode(block, final=not block)
                    except UnicodeDecodeError as e:
                        raise UserError(f"{where}: not text, byte {start + e.start} is not UTF-8") from e
                    if "\0" in text:
                        raise UserError(f"{where}: not text, it holds zero bytes; give text in UTF-8")
                    if not block:
                        return
                    yield text, begins
                    seen, begins = seen + len(block), False
        except UserError:
            raise
        except Exception as e:  # damaged archives raise whatever their library likes
            raise UserError(f"{where} cannot be read ({reason(e)}); restore it, or leave it out") from e


def jobs(source: Source, held: bool | None = None) -> Iterator[tuple[list[tuple[str, bool, bool]], dict]]:
    """Gather pieces to tokenise at once, each (text, begins, held out), with the position after them.

    A document is held out by the hash of its first piece, so that copies of it are on the same side. `held` is the side
    of the document in which the position lies. Documents without text are left out.
    """
    job, size, fresh = [], 0, held is None
    for text, begins in source:
        fresh |= begins
        if fresh and not text.strip():
            continue
        if fresh:
            first = hashlib.sha256(text.encode(errors="replace")).digest()[:8]
            held = int.from_bytes(first, "big") < source.held_out * 2**64
        job.append((text, fresh, held))
        size, fresh = size + len(text), False
        if size >= PIECE:
            yield job, {"source": source.now(), "held": held}
            job, size = [], 0
    if job:
        yield job, {"source": source.now(), "held": held}


# What a shard holds: tokens for training and held out, and where in them documents start (an eot each).
SPLITS = ("train", "held_out")


def tokenise(tokenizer: Tokenizer, job: list[tuple[str, bool, bool]]) -> dict[str, list[np.ndarray]]:
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for text, begins, held in job:
        tokens = tokenizer.encode(text)
        parts[SPLITS[held]].append(np.insert(tokens, 0, tokenizer.eot) if begins else tokens)
    return parts


def to_shard(tokenizer: Tokenizer, parts: list[dict[str, list[np.ndarray]]]) -> dict[str, np.ndarray]:
    """The tensors of a shard; either split begins with an eot, as if a document cut by the shard's end began anew."""
    shard = {}
    for split in SPLITS:
        found = [z for part in parts for z in part[split]]
        cut = found and found[0][0] != tokenizer.eot
        head = np.array([tokenizer.eot] * bool(cut), tokenizer.dtype)
        shard[split] = np.concatenate([head, *found])
        shard[f"{split}_starts"] = np.flatnonzero(shard[split] == tokenizer.eot)
    return shard


def shard_sizes(shard: dict[str, np.ndarray]) -> dict[str, int]:
    return {**{s: len(shard[s]) for s in SPLITS}, "documents": sum(len(shard[f"{s}_starts"]) for s in SPLITS)}


def prepare(config: TrainConfig) -> tuple[Path, dict, Tokenizer]:
    """Shards of the data that `config` names, made by the first process that asks: folder, manifest, tokenizer.

    Reading is one thread's work, tokenising is spread over all cores, and no more than a shard is held in memory. After
    every shard the manifest is written, with the position in the source, so that whatever stops the preparation, it
    goes on from there; a folder is named by a hash of what it was made from. Shards whose size or time of change is not
    the manifest's are hashed again before they are used, with `verify_data` all are. `data` may also be such a folder,
    which was prepared elsewhere.
    """
    name, folder = config.tokenizer_name, Path(config.data)
    ready = (folder / "manifest.json").is_file()
    if not ready:
        source = Source(config)
        identity = source.identity | {"tokenizer": name}
        if name.endswith(".tiktoken"):
            identity["tokenizer_file"] = Tokenizer.load(Path(name)).sha256
        label = "-".join(re.findall(r"[\w.]+", f"{config.data}-{name}"))[-60:]
        folder = Path(config.data_dir) / f"{label}-{fingerprint(identity)[:8]}"
    manifest = read_manifest(folder)
    if ready and not manifest["complete"]:
        raise UserError(f"--data {folder}: its preparation was not finished; finish it where it was begun")
    if ready and config.tokenizer and config.tokenizer != manifest["source"]["tokenizer"]:
        raise UserError(
            f"--data {folder} was prepared with --tokenizer {manifest['source']['tokenizer']}; leave --tokenizer out"
        )
    thorough = config.verify_data and os.environ.get("LOCAL_RANK", "0") == "0"
    if manifest["complete"] and not thorough and not suspects(folder, manifest):
        return folder, manifest, prepared_tokenizer(folder, manifest)
    if manifest["complete"] and not os.access(folder, os.W_OK):
        verify_shards(folder, manifest, thorough)
        return folder, manifest, prepared_tokenizer(folder, manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            manifest = read_manifest(folder)  # another process may have made it meanwhile
            verify_shards(folder, manifest, thorough)
            if manifest["complete"]:
                return folder, manifest, prepared_tokenizer(folder, manifest)
            if not (folder / "tokenizer.tiktoken").exists():
                texts = lambda: (text for job, _ in jobs(Source(config)) for text, _, held in job if not held)
                make_tokenizer(name, texts).save(folder)
            manifest |= {"source": identity, "held_out": source.held_out}
            manifest["tokenizer_sha256"] = (tokenizer := prepared_tokenizer(folder, {})).sha256
            make_shards(folder, manifest, tokenizer, source)
    except OSError as e:
        raise UserError(
            f"{folder} cannot be written ({e.strerror or e}); make room or use another --data-dir; "
            "the same command goes on where this one stopped"
        ) from e
    return folder, manifest, tokenizer


def make_shards(folder: Path, manifest: dict, tokenizer: Tokenizer, source: Source) -> None:
    if manifest["shards"]:
        print(f"{folder}: going on after {len(manifest['shards'])} shards")
        source.position = manifest["position"]["source"]
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts, size, queue = [], 0, deque()

    def write(position: dict | None) -> None:
        nonlocal parts, size
        if size:
            shard, file = to_shard(tokenizer, parts), f"shard-{len(manifest['shards']):05d}.safetensors"
            raw = safetensors.numpy.save(shard)
            write_atomically(folder / file, raw)
            row = {"file": file, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
            row["mtime_ns"] = (folder / file).stat().st_mtime_ns
            manifest["shards"].append(row | shard_sizes(shard))
        manifest.update(position=position, complete=position is None)
        write_manifest(folder, manifest)
        parts, size = [], 0

    held = (manifest["position"] or {}).get("held")
    bar = tqdm(desc=f"preparing {folder}", unit="B", unit_scale=True, disable=None, leave=False)
    with ThreadPoolExecutor(workers) as pool, bar:  # tiktoken works without Python's lock
        for job, position in chain(jobs(source, held), repeat((None, None), 2 * workers)):
            if job:
                queue.append((pool.submit(tokenise, tokenizer, job), position, sum(len(text) for text, _, _ in job)))
            if queue and (not job or len(queue) >= 2 * workers):
                future, position, length = queue.popleft()
                parts.append(future.result())
                size += sum(len(z) for split in SPLITS for z in parts[-1][split])
                bar.update(length)
                if size >= SHARD:
                    write(position)
    write(None)


def write_manifest(folder: Path, manifest: dict) -> None:
    write_atomically(
        folder / "manifest.json", json.dumps({"sha256": fingerprint(manifest), **manifest}, indent=1) + "\n"
    )


def read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    if not path.exists():
        return {"complete": False, "position": None, "shards": []}
    try:
        manifest = json.loads(path.read_text())
        if manifest.pop("sha256") != fingerprint(manifest):
            raise ValueError("it was altered")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} cannot be used ({e}); restore it, or delete {folder} to prepare it anew") from e


def prepared_tokenizer(folder: Path, manifest: dict) -> Tokenizer:
    path = folder / "tokenizer.tiktoken"
    tokenizer = Tokenizer.load(path) if path.exists() else Tokenizer()
    if manifest.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(f"{path} is missing or altered; restore it, or delete {folder} to prepare it anew")
    return tokenizer


def suspects(folder: Path, manifest: dict) -> list[dict]:
    """Shards that were changed since their hash was taken. UserError for one that is missing or has another size."""
    found = []
    for row in manifest["shards"]:
        path = folder / row["file"]
        try:
            stat = path.stat()
        except OSError as e:
            raise UserError(f"{path} is missing; restore it, or delete {folder} to prepare it anew") from e
        if stat.st_size != row["bytes"]:
            raise UserError(
                f"{path} has {stat.st_size} bytes, not {row['bytes']}; restore it, or delete {folder} to prepare it anew"
            )
        if stat.st_mtime_ns != row["mtime_ns"]:
            found.append(row)
    return found


def verify_shards(folder: Path, manifest: dict, thorough: bool) -> None:
    """Hash the shards that may have changed, or all; what is as it was is remembered by its new time of change."""

    def check(row: dict) -> None:
        path = folder / row["file"]
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != row["sha256"]:
                raise UserError(f"{path} was altered; restore it, or delete {folder} to prepare it anew")
        row["mtime_ns"] = path.stat().st_mtime_ns

    changed = suspects(folder, manifest)
    rows = manifest["shards"] if thorough else changed
    with ThreadPoolExecutor() as pool:
        list(
            tqdm(pool.map(check, rows), desc="verifying", total=len(rows), disable=None if rows else True, leave=False)
        )
    if changed and os.access(folder, os.W_OK):
        write_manifest(folder, manifest)


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


class Rows:
    """The rows that tokens are cut into, of `seq_len` tokens each, and numbered.

    `spans` are (shard, split, first, last) and hold the tokens; no row reaches over two of them. Packed, a row is any
    window; with `reset` it is a piece of one document, and short ones are filled up with targets -100.
    """

    def __init__(self, shard: Callable[[int], Any], spans: list[tuple[int, str, int, int]], seq_len: int, reset: bool):
        self.shard, self.spans, self.seq_len, self.reset = shard, spans, seq_len, reset
        self.bounds = lru_cache(64)(self._bounds)  # of a hundred billion tokens, documents alone would fill the memory
        self.tokens = sum(last - first for _, _, first, last in spans)

    def index(self, slack: int) -> list[int]:
        """How many rows there are up to the end of every span, if `slack` tokens of each are left out."""
        if self.reset:
            rows = [int(self.bounds(s)[1][-1]) for s in range(len(self.spans))]
        else:
            rows = [max(0, (last - first - slack - 1) // self.seq_len) for _, _, first, last in self.spans]
        return np.cumsum(rows).tolist()

    def _bounds(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a span: where its documents begin, and how many rows there are before each; both with the end."""
        number, split, first, last = self.spans[s]
        starts = self.shard(number)[f"{split}_starts"][:]
        inside = starts[(starts > first) & (starts < last - 1)]
        bounds = np.concatenate([[first], inside, [last - 1]])
        return bounds, np.concatenate([[0], np.cumsum(-(-np.diff(bounds) // self.seq_len))])

    def row(self, index: list[int], i: int, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets (seq_len,) of row i; packed, `offset` tokens after the beginning of its span."""
        s = bisect_right(index, i)
        i -= index[s - 1] if s else 0
        number, split, first, _ = self.spans[s]
        start, stop = first + offset + i * self.seq_len, None
        if self.reset:
            bounds, before = self.bounds(s)
            document = int(np.searchsorted(before, i, "right")) - 1
            start = int(bounds[document] + (i - before[document]) * self.seq_len)
            stop = int(bounds[document + 1]) + 1
        stop = min(stop or start + self.seq_len + 1, start + self.seq_len + 1)
        tokens = self.shard(number)[split][start:stop].astype(np.int64)
        missing = (0, self.seq_len + 1 - len(tokens))
        return np.pad(tokens[:-1], missing), np.pad(tokens[1:], missing, constant_values=-100)


class Corpus:
    """Tokens to train on and tokens held out, and which of them every step reads.

    Documents are held out whole, by a hash of their text. Where there are so few that chance would decide how much that
    is, it is the end of the text instead, be it in the middle of a document.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        shard: Callable[[int], Any],
        sizes: list[dict],
        held_out: float | None,
    ):
        """`shard(i)` maps names to tensors that can be sliced; `held_out` is None where documents are sorted already."""
        self.config, self.tokenizer, self.seq_len = config, tokenizer, config.seq_len
        spans = {split: [(i, split, 0, s[split]) for i, s in enumerate(sizes) if s[split]] for split in SPLITS}
        total, documents = sum(s[split] for s in sizes for split in SPLITS), sum(s["documents"] for s in sizes)
        if held_out is not None and documents * held_out < 10:
            everything, keep = spans["train"] + spans["held_out"], total - int(total * held_out)
            spans = {split: [] for split in SPLITS}
            for i, split, first, last in everything:
                cut = min(keep, last)
                spans["train"] += [(i, split, first, cut)] if cut > first else []
                spans["held_out"] += [(i, split, cut, last)] if cut < last else []
                keep -= cut
        self.train, self.held_out = (
            Rows(shard, spans[split], self.seq_len, config.reset_at_documents) for split in SPLITS
        )
        # An epoch starts at an offset of its own, below seq_len.
        self.train_index, self.held_out_index = self.train.index(self.seq_len - 1), self.held_out.index(0)
        for rows, index, name in (
            (self.train, self.train_index, "training"),
            (self.held_out, self.held_out_index, "held-out"),
        ):
            if not index or not index[-1]:
                raise UserError(
                    f"--data {config.data}: its {name} part has {rows.tokens} tokens, too few for --seq-len "
                    f"{self.seq_len}; give more text or a shorter --seq-len"
                )
        scored = self.validation()[1].numpy()
        scored = scored[scored >= 0]
        # Exact on what is scored, so that bits per byte compare between tokenizers.
        self.tokens_per_byte = len(scored) / tokenizer.lengths[scored].sum()

    @classmethod
    def open(cls, config: TrainConfig) -> Corpus:
        """The corpus of a run, prepared if it is not yet. UserError for data that cannot be had or was damaged."""
        if config.data == "pydoc":  # small enough to be made anew in memory
            documents = pydoc_documents()
            tokenizer = make_tokenizer(config.tokenizer_name, lambda: (text for text, held in documents if not held))
            shard = to_shard(tokenizer, [tokenise(tokenizer, [(text, True, held) for text, held in documents])])
            corpus = cls(config, tokenizer, lambda i: shard, [shard_sizes(shard)], None)
            corpus.sha256, corpus.source = hashlib.sha256(safetensors.numpy.save(shard)).hexdigest(), "pydoc"
            return corpus
        folder, manifest, tokenizer = prepare(config)
        rows = manifest["shards"]
        if not rows:
            raise UserError(f"--data {config.data}: there is no text in it; give some")

        @lru_cache(256)
        def shard(i: int) -> dict[str, Any]:
            try:
                file = safetensors.safe_open(folder / rows[i]["file"], "np")
                return {name: file.get_slice(name) for name in file.keys()}
            except (OSError, SafetensorError) as e:
                raise UserError(f"{folder / rows[i]['file']} cannot be read ({reason(e)}); restore it") from e

        corpus = cls(config, tokenizer, shard, rows, manifest["held_out"])
        corpus.source = str(folder)
        corpus.sha256 = fingerprint([row["sha256"] for row in rows] + [manifest["held_out"], tokenizer.sha256])
        return corpus

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        """Tokens and targets (len(rows), seq_len) of these rows of the batch of `batch_size` rows that a step reads.

        A pure function of (seed, step, row): it is the same for any number of ranks and any micro-batches, of which
        each takes rows of its own. An epoch visits every row of the corpus once, in an order of its own.
        """
        n, first = self.train_index[-1], 0 if self.config.overfit_one_batch else step * self.config.batch_size
        found = []
        for i in (first + row for row in rows):
            epoch = scramble(self.config.seed, i // n)
            found.append(self.train.row(self.train_index, shuffled(i % n, n, epoch), epoch % self.seq_len))
        x, y = (torch.from_numpy(np.stack(z)) for z in zip(*found))
        return x, y

    def validation(self, most: int = 40) -> tuple[Tensor, Tensor]:
        """At most `most` rows of held-out text, evenly spread: tokens and targets (n, t)."""
        n = self.held_out_index[-1]
        found = [self.held_out.row(self.held_out_index, i) for i in range(0, n, math.ceil(n / most))]
        x, y = (torch.from_numpy(np.stack(z)) for z in zip(*found))
        return x, y


# ----------------------------------------------------------------------------------------------------------------------
# Run directory: config, log, checkpoints, picture


def to_json(train: TrainConfig, model: HopeConfig, sha256: dict[str, str]) -> dict:
    """What a run's config.json holds; `sha256` are the fingerprints of its data and its tokenizer."""

    def plain(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: plain(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(x) for x in v]
        return "inf" if v == hope.INF else v

    return {"train": plain(asdict(train)), "model": plain(asdict(model)), **sha256}


def signed(value: dict) -> str:
    """As JSON, with a fingerprint that tells when it was altered."""
    return json.dumps(value | {"sha256": fingerprint(value)}, indent=1) + "\n"


def read_signed(path: Path) -> dict:
    value = json.loads(path.read_text())
    if value.pop("sha256") != fingerprint(value):
        raise ValueError("it was altered")
    return value


def from_json(path: Path) -> tuple[TrainConfig, HopeConfig, dict[str, str]]:
    try:
        stored = read_signed(path)
        model = dict(stored["model"])
        memory = dict(model.pop("memory"))
        memory["adaptive"] = tuple(memory["adaptive"])
        for name in ("cms", "cms_rate"):
            model[name] = tuple(float(c) for c in model[name])
        model["pattern"] = tuple(model["pattern"])
        config = HopeConfig(memory=MemoryConfig(**memory), **model)
        sha256 = {name: stored[name] for name in ("data_sha256", "tokenizer_sha256")}
        return TrainConfig(**stored["train"]), config, sha256
    except FileNotFoundError as e:
        raise UserError(f"{path.parent} is no run directory, it has no config.json; give one that train.py made") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise UserError(f"{path} cannot be used ({reason(e)}); restore it, or start anew with --out") from e


def differing(old: dict, new: dict) -> str:
    """The first setting that two runs do not share and that may not change during a run, as `name = old, not new`."""
    flat = lambda c: {**c["train"], **c["model"], **c["model"]["memory"], "data_sha256": c["data_sha256"]}
    old, new = flat(old), flat(new)
    for k in new:
        if k not in Run.FREE | {"memory"} and new[k] != old.get(k):
            return f"{k} = {old.get(k)}, not {new[k]}"
    return ""


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Make renames in a directory last beyond a power failure."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


# What a row of log.jsonl holds, one row a step; those marked * with every validation only. A tracker gets the same.
LOG = {
    "step": "optimizer steps taken, this one included",
    "loss": "mean over the batch's scored tokens, nats per token",
    "lr": "learning rate of this step",
    "grad_norm": "norm of the gradient before clipping",
    "tokens": "tokens read so far: step x batch_size x seq_len",
    "tokens_per_s": "since this process started, validation and saving included",
    "utilisation": "part of the devices' peak that 6 operations per parameter (embedding left out) and token make up; "
    "only where the peak is known or given by --peak-tflops",
    "skipped": "why this step changed nothing; only where one was skipped: loss and grad_norm are null if not finite",
    "val_loss": "* nats per token of held-out text",
    "val_bpb": "* the same in bits per byte of the text",
    "eta": "* mean inner step size, one number per layer; null for a layer without",
    "alpha": "* mean retention, likewise",
    "memory_norm": "* Frobenius norm of a head's memory M after a held-out row, mean over heads, one number per layer",
    "cms_norm": "* the same for what each in-context level of a CMS has learnt from the row, one list per layer",
}


class Run:
    """A run directory: config.json, log.jsonl, loss.png, checkpoints/step-000100.

    A checkpoint is a directory of safetensors files, which every process writes a part of, and state.json: the step,
    the run's settings, and the sha256 of every file and of itself. It can be loaded by any number of processes.
    """

    # What may differ between the start of a run and its continuation.
    FREE = {
        "out", "device", "keep", "eval_every", "save_every", "data_dir", "verify_data", "tracker", "peak_tflops",
        "parallel", "nodes", "micro_batch", "recompute", "compile", "max_skips",
    }  # fmt: skip

    def __init__(self, path: Path):
        self.path = path
        self.log_path, self.checkpoints = path / "log.jsonl", path / "checkpoints"
        self.track: Callable[[dict], None] = lambda row: None
        self.lock = FileLock(path / ".lock", timeout=0)
        self.writer = ThreadPoolExecutor(1)
        self.written: Future | None = None

    def open(self, config: dict) -> None:
        """Make the directory, or check that the one that is there belongs to this very run; and lock it."""
        path = self.path / "config.json"
        # A hidden file is what a process killed in its first second leaves; anything else is somebody's.
        if self.path.exists() and not path.exists():
            if not (self.path.is_dir() and all(p.name[0] == "." for p in self.path.iterdir())):
                raise UserError(f"{self.path} exists and is no run directory; use another one (--out DIR)")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()  # let go when the process ends, however it does
            if not path.exists():
                write_atomically(path, signed(config))
        except Timeout as e:
            raise UserError(
                f"another process trains in {self.path}; wait for it, or use another directory (--out DIR)"
            ) from e
        except OSError as e:
            raise UserError(f"{self.path} cannot be written ({e.strerror}); use another directory (--out DIR)") from e
        if found := differing(to_json(*from_json(path)), config):
            raise UserError(
                f"{self.path} holds a run with {found}; "
                f"use another directory (--out DIR) or go on with that run (--resume {self.path})"
            )

    def close(self) -> None:
        self.lock.release()

    def saved(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step-*"))

    def save(self, state: dict, tensors: dict[str, Tensor], keep: int, world: World) -> None:
        """Start to write a checkpoint. Tensors are copied at once; the files are written while training goes on.

        It is written beside and renamed at the end: a reader sees all of it or none. `wait` tells whether it worked.
        """
        self.wait(world)
        state = dict(state)  # of this step, while training goes on
        target, beside = (self.checkpoints / f"{dot}step-{state['step']:06d}" for dot in ("", "."))

        def prepare() -> None:
            try:
                for old in self.checkpoints.glob(".step-*"):
                    shutil.rmtree(old)
                beside.mkdir(parents=True)
            except OSError as e:
                raise self.cannot_write(e) from e

        world.first(prepare)
        parts = dcp.async_save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(beside), save_distributed=True),
            process_group=world.writers,
            no_dist=not world.launched,
        )

        def finish() -> None:
            parts.result()  # of all processes
            if world.rank == 0:
                described = {**state, "files": {p.name: file_sha256(p) for p in sorted(beside.iterdir())}}
                write_atomically(beside / "state.json", signed(described))
                sync_directory(beside)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(beside, target)
                sync_directory(self.checkpoints)
                for old in self.saved()[:-keep]:
                    shutil.rmtree(old)

        self.written = self.writer.submit(finish)

    def wait(self, world: World) -> None:
        """Until the checkpoint that is being written is complete. UserError, in all processes, if it cannot be."""
        written, self.written, error = self.written, None, ""
        try:
            if written:
                written.result()
        except (Exception, CheckpointException) as e:
            error = str(self.cannot_write(e))
        world.agree(error)

    def cannot_write(self, e: BaseException) -> UserError:
        last = f"the last good one is {self.saved()[-1]}" if self.saved() else "there is none before it"
        return UserError(
            f"no checkpoint can be written to {self.checkpoints} ({reason(e)}); {last}; "
            f"make room, then go on: python train.py --resume {self.path}"
        )

    def check(self, path: Path, world: World) -> dict:
        """The state of a checkpoint whose files are all as they were written."""
        state = read_signed(path / "state.json")
        if path.name != f"step-{state['step']:06d}":
            raise ValueError(f"it is of step {state['step']}")
        names = sorted(state["files"])
        if found := {p.name for p in path.iterdir()} ^ {*names, "state.json"}:
            raise ValueError(f"{sorted(found)[0]} is {'missing' if found & set(names) else 'not one of its files'}")
        for name in names[world.rank :: world.size]:
            if file_sha256(path / name) != state["files"][name]:
                raise ValueError(f"{name} was altered")
        return state

    def load(self, path: Path, config: dict, tensors: dict[str, Tensor], world: World, only: Any = "") -> dict:
        """Fill `tensors` in place from a checkpoint and return its state. UserError, in all processes, says why not.

        `only` is the beginning of the names that are wanted, or a tuple of some. Nothing is unpickled: safetensors and JSON hold no code.
        """
        error, state = "", {}
        try:
            state = self.check(path, world)
            if found := differing(state["config"], config):
                raise ValueError(f"it is of a run with {found}")
            reader = HuggingFaceStorageReader(str(path))
            stored = {k: v for k, v in reader.read_metadata().state_dict_metadata.items() if k.startswith(only)}
            if found := stored.keys() ^ tensors.keys():
                raise ValueError(f"{min(found)} is {'missing' if min(found) in tensors else 'not known here'}")
            for name, tensor in tensors.items():
                shape, dtype = stored[name].size, stored[name].properties.dtype
                if (shape, dtype) != (tensor.shape, tensor.dtype):
                    raise ValueError(f"{name} is {tuple(shape)} {dtype}, not {tuple(tensor.shape)} {tensor.dtype}")
                if sum(math.prod(c.sizes) for c in stored[name].chunks) != tensor.numel():
                    raise ValueError(f"parts of {name} are missing")
        except Exception as e:  # whatever a damaged file leads its reader to
            error = reason(e)
        else:
            world.agree()
            try:
                dcp.load(tensors, storage_reader=reader, process_group=world.writers, no_dist=not world.launched)
            except (Exception, CheckpointException) as e:
                error = reason(e)
        world.agree(error and f"checkpoint {path} cannot be loaded ({error}); delete it to use the one before")
        return state

    def log(self) -> list[dict]:
        """Rows of log.jsonl, without those that are damaged, such as the last one of a process killed in writing it."""
        rows = []
        if self.log_path.exists():
            for line in self.log_path.read_text(errors="replace").splitlines():
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

    def plot(self, title: str, bits: float) -> None:
        rows = self.log()
        loss = [(r["step"], r["loss"] * bits) for r in rows if "skipped" not in r]
        smooth, mean = [], None
        for step, y in loss:
            mean = y if mean is None else 0.9 * mean + 0.1 * y
            smooth.append((step, mean))
        loss, smooth = (line[:: max(1, len(line) // 2000)] for line in (loss, smooth))  # more than can be seen
        val = [(r["step"], r["val_bpb"]) for r in rows if "val_bpb" in r]
        fig = Figure(figsize=(7, 4), layout="constrained")  # not pyplot: no display and no backend is touched
        ax = fig.subplots()
        if loss:
            ax.plot(*zip(*loss), color="#9ecae1", linewidth=0.8, label="training, each step")
            ax.plot(*zip(*smooth), color="#08519c", linewidth=1.8, label="training, running mean")
        if val:
            ax.plot(*zip(*val), "o--", color="#d94801", label="validation")
            ax.annotate(f"{val[-1][1]:.2f}", val[-1], xytext=(0, 8), textcoords="offset points", ha="center")
        ax.set(xlabel="step", ylabel="bits per byte", title=title, ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend()
        fig.savefig(self.path / "loss.png", dpi=150)


def make_tracker(config: TrainConfig, start: int) -> Callable[[dict], None]:
    """What takes a row of the log to the tracker that `config` names; lists become one number per layer."""
    if config.tracker == "none":
        return lambda row: None
    what, name = f"--tracker {config.tracker}", str(config.run_dir)
    if config.tracker == "tensorboard":
        tensorboard = extra("tensorboard", what) and extra("torch.utils.tensorboard", what)
        writer = tensorboard.SummaryWriter(f"{name}/tensorboard", purge_step=start + 1)
        log = lambda numbers, step: [writer.add_scalar(k, v, step) for k, v in numbers.items()] and writer.flush()
    else:  # these two have the same interface
        module = extra(config.tracker, what)
        module.init(project="nested-learning-hope", name=name, config=asdict(config), resume="allow")
        log = lambda numbers, step: module.log(numbers, step=step)

    def flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, list):
            for i, part in enumerate(value):
                yield from flat(f"{name}/{i}", part)
        elif isinstance(value, (int, float)):
            yield name, value

    return lambda row: log({k: v for name in row for k, v in flat(name, row[name])}, row["step"])


# ----------------------------------------------------------------------------------------------------------------------
# Distribution


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not available here; use cpu, or auto") from e


class World:
    """The processes that train together: this one alone, or those that torchrun started, one for each GPU.

    They take the same steps in the same order, and what one of them decides or finds wrong they all get to know.
    """

    def __init__(self, config: TrainConfig):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.launched = "RANK" in os.environ
        self.device = pick_device(config.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if config.batch_size % self.size or self.size % config.nodes:
            raise UserError(
                f"{self.size} processes on {config.nodes} nodes cannot share {config.batch_size} sequences a step evenly; "
                "give a --batch-size that is a multiple of the number of processes, and --nodes as torchrun's --nnodes"
            )
        if config.parallel == "fsdp" and not self.launched:
            raise UserError(
                "--parallel fsdp is for several processes; start it with: torchrun --nproc_per_node=N train.py"
            )
        # Processes agree by gloo, beside the computation on GPUs; so does the writer of checkpoints, in its own group.
        self.writers = None
        if self.launched:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            store, rank, size = next(rendezvous("env://"))
            if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
                # Where torchrun restarts processes, its store still knows the addresses of those that died.
                store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            self.writers = dist.new_group(backend="gloo")

    def share(self, n: int) -> range:
        """Which of n rows are this process's."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, *values: float) -> list[float]:
        """Each value's sum over processes."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.launched:
            dist.all_reduce(total)
        return total.tolist()

    def agree(self, error: str = "") -> None:
        """Raise the first process's error in all of them."""
        errors = [error]
        if self.launched:
            errors = [""] * self.size
            dist.all_gather_object(errors, error)
        for e in filter(None, errors):
            raise UserError(e)

    def together(self, act: Callable[[], Any]) -> Any:
        """act() in every process; a UserError of one is raised in all."""
        found, error = None, ""
        try:
            found = act()
        except UserError as e:
            error = str(e)
        self.agree(error)
        return found

    def first(self, act: Callable[[], Any]) -> Any:
        """What act() returns in the first process, or its UserError, in all of them."""
        found = [self.together(lambda: act() if self.rank == 0 else None)]
        if self.launched:
            dist.broadcast_object_list(found, device=torch.device("cpu"))
        return found[0]

    def close(self) -> None:
        if self.launched:
            dist.barrier()
            dist.destroy_process_group()


def distribute(model: Hope, config: TrainConfig, world: World) -> None:
    """Cut the model up among the processes if it is to be (FSDP2).

    One group of weights for each block, gathered in bfloat16 where matrix products are; the start states and gates of
    memories have a group of their own, in float32. Hope runs a block once for every segment of a stream, and each run has
    a backward pass of its own for the CMS. Gathering weights and adding up gradients each time would cost one exchange a
    segment; so weights are gathered once a step (`gathered`), gradients are added up once a step (`sum_gradients`),
    and FSDP's hooks do nothing in between.
    """
    size = sum(p.numel() for p in model.parameters())
    if not world.launched or config.parallel == "ddp" or (config.parallel == "auto" and size < 300e6):
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
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        for bucket in buckets(grads, 2**24):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(part.view_as(g))


def buckets(tensors: list[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Neighbours together, of `most` numbers or a little more."""
    bucket, count = [], 0
    for tensor in tensors:
        bucket.append(tensor)
        count += tensor.numel()
        if count >= most:
            yield bucket
            bucket, count = [], 0
    if bucket:
        yield bucket


# ----------------------------------------------------------------------------------------------------------------------
# Training


# Learning rate of the matrices in parts of --lr. Those of the last four were the best of tests/bench/optimizers.py.
MATRIX_LR = {"muon": 1.0, "adamw": 1.0, "m3": 3.0, "dgd": 100.0, "delta-momentum": 10.0, "deep-momentum": 300.0}


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
            f"{slow[0]['period']} steps of --seq-len {config.seq_len}; give --seq-len {slow[-1]['chunk']}, or another optimizer"
        )
    first = [optim.Accumulate(slow)] if slow else []
    if name == "adamw":
        return [*first, torch.optim.AdamW(matrix + rest, **adamw)]
    make = {
        # match_rms_adamw gives Muon's step the size of AdamW's, so that one learning rate serves both.
        "muon": lambda: torch.optim.Muon(matrix, lr=config.lr, adjust_lr_fn="match_rms_adamw"),
        "m3": lambda: optim.M3(matrix, lr=config.lr, dtype=precision(config, model.embed.weight.device)),
        "dgd": lambda: optim.DGD(model, matrix, lr=config.lr, delta=0.01),
        "delta-momentum": lambda: optim.DeltaMomentum(matrix, lr=config.lr),
        "deep-momentum": lambda: optim.DeepMomentum(matrix, lr=config.lr),
    }
    return [*first, make[name](), torch.optim.AdamW(rest, **adamw)]


def make_average(model: Hope, config: TrainConfig) -> list[optim.EMA]:
    """The average of the weights that a run keeps: a list of one, or of none."""
    return [optim.EMA(model.parameters(), config.ema)] if config.ema else []


@contextmanager
def averaged(averages: list[optim.EMA]) -> Iterator[None]:
    """Inside, the average, if there is one, is the model's weights, and they wait in its place."""

    @torch.no_grad()
    def swap() -> None:
        for p, state in (item for average in averages for item in average.state.items()):
            weights = p.detach().clone()
            p.copy_(state["average"])
            state["average"].copy_(weights)

    swap()
    try:
        yield
    finally:
        swap()


def learning_rate(step: int, config: TrainConfig) -> float:
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return config.lr * (step + 1) / rise
    fall = config.steps - rise
    if config.schedule == "wsd":
        fall = min(fall, round(config.decay_part * config.steps))
    along = max(0.0, (step - (config.steps - fall)) / max(1, fall))
    left = 1 - along if config.schedule == "wsd" else (1 + math.cos(math.pi * along)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)


def at_once(config: TrainConfig, world: World) -> int:
    """Rows that a process takes at once, in training and, so that it needs no more memory, in validation."""
    return config.micro_batch or config.batch_size // world.size


def validate(model: Hope, corpus: Corpus, config: TrainConfig, world: World) -> float:
    """Mean loss in nats per token over held-out windows, each observed from the start state, CMS writes included."""
    x, y = corpus.validation()
    mine = list(world.share(len(x)))
    # Under FSDP2 processes must run the model equally often: who has a row less takes one that does not count.
    idle = [0] * (math.ceil(len(x) / world.size) - len(mine))
    x, y = x[mine + idle], y[mine + idle]
    y[len(mine) :] = -100
    rows = [z.to(world.device) for z in (x, y)]
    with torch.no_grad():
        losses = [
            model.observe(x, y, reduction="none")[0].double().sum().item()
            for x, y in zip(*(z.split(at_once(config, world)) for z in rows))
        ]
    total, count = world.sum(sum(losses), (rows[1] != -100).sum().item())
    return total / count


def find_gradients(model: Hope, x: Tensor, y: Tensor, config: TrainConfig, world: World) -> float:
    """Gradients of the mean loss per scored token of the global batch, of which x, y are this process's rows.

    Returns this process's part of that loss. States live for one call of `observe`: no sequence sees another's.
    """
    [scored] = world.sum((y != -100).sum().item())
    average = world.size if isinstance(model, FSDPModule) else 1  # FSDP divides what it adds up by this
    total = torch.zeros((), device=x.device)
    with gathered(model):
        for xs, ys in zip(*(z.split(at_once(config, world)) for z in (x, y))):
            with computing_in(config, world):
                how = {"backward": True, "truncate": True} if config.truncate else {}
                losses, _ = model.observe(xs, ys, reduction="none", **how)
            loss = losses.sum() / max(1, scored)
            if not config.truncate:
                (loss * average).backward()
            total += loss.detach()
        sum_gradients(model, config, world)
    if config.truncate:  # the sum's gradients: the mean's are so much smaller
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(average / max(1, scored))
    return total.item()


def clip_gradients(model: Hope, most: float) -> float:
    """Scale gradients down to a norm of `most`; returns the norm that they had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most, error_if_nonfinite=False)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def make_states(model: Hope, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Make the optimizers' states, to be filled by a checkpoint; else they begin with the first step."""
    for optimizer in optimizers:
        get_optimizer_state_dict(model, optimizer)


def tensors_of(model: Hope, optimizers: Sequence[torch.optim.Optimizer] = ()) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: weights and optimizer states, as they stand."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": p.detach() for p, name in names.items()}
    for kind, optimizer in ((type(o).__name__, o) for o in optimizers):
        for p, state in optimizer.state.items():
            tensors |= {f"{kind}.{names[p]}.{key}": v if v.ndim else v.view(1) for key, v in state.items()}
    return tensors


# Dense bfloat16 peaks in 10^12 operations a second, by a part of the name that torch gives the GPU.
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}


def peak_flops(config: TrainConfig, device: torch.device) -> float | None:
    if config.peak_tflops or device.type != "cuda":
        return config.peak_tflops * 1e12 or None
    return next((peak * 1e12 for name, peak in PEAKS.items() if name in torch.cuda.get_device_name(device)), None)


@torch.no_grad()
def memory_numbers(model: Hope, x: Tensor, y: Tensor) -> dict[str, list]:
    """What memories do on rows x, y: mean eta and alpha, and norms of the states after them, per layer (see LOG)."""
    sums: dict[str, list] = {name: [[] for _ in model.blocks] for name in ("eta", "alpha")}
    hooks = []
    for i, block in enumerate(model.blocks):
        for name, gate in getattr(block.memory, "gates", {}).items():
            if name in sums:
                note = lambda module, inputs, z, name=name, i=i: sums[name][i].append(
                    (hope.GATES[name](z).mean().item(), z.numel())
                )
                hooks.append(gate.register_forward_hook(note))
    # Compiled chunks and a layer's single launch do not call the gates.
    kernels, compiled = os.environ.get("HOPE_KERNELS"), [m for m in model.modules() if getattr(m, "compiled", False)]
    os.environ["HOPE_KERNELS"] = "reference"
    for memory in compiled:
        memory.compiled = False
    try:
        _, state = model.observe(x, y)
    finally:
        for hook in hooks:
            hook.remove()
        for memory in compiled:
            memory.compiled = True
        os.environ.pop("HOPE_KERNELS")
        if kernels is not None:
            os.environ["HOPE_KERNELS"] = kernels
    norm = lambda layers: sum(w.float().square().sum((-2, -1)) for w in layers).sqrt().mean().item()
    mean = lambda found: sum(m * n for m, n in found) / sum(n for _, n in found) if found else None
    return {name: [mean(found) for found in layers] for name, layers in sums.items()} | {
        "memory_norm": [
            norm([w[:, :, -1] for w in m.main.now]) if isinstance(m, hope.MemoryState) else None for m in state.memories
        ],
        "cms_norm": [[norm(fast.delta) for fast in layer if fast] for layer in state.cms],
    }


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a flag, so that a step is finished and saved; a second one stops at once.

    Under torchrun it does not, but torchrun itself kills what is left after 30 seconds.
    """

    def __enter__(self) -> Interrupt:
        self.hit = False
        self.launched = "RANK" in os.environ  # torchrun passes a Ctrl-C on that the process gets by itself as well
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.hit and not self.launched:
            raise KeyboardInterrupt
        self.hit = True

    def __exit__(self, *error: Any) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


class Progress:
    """A progress bar on a terminal; elsewhere a line at every validation."""

    def __init__(self, start: int, stop: int, rank: int):
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=stop, initial=start, disable=True if rank else None, bar_format=form, leave=True)

    def show(self, row: dict, bits: float) -> None:
        if "skipped" in row:
            self.bar.write(f"step {row['step']:>5}: skipped, {row['skipped']}")
        text = f"loss {(row['loss'] or math.nan) * bits:.2f} bits/byte, {row['tokens_per_s']:,.0f} tokens/s"
        if "val_bpb" in row:
            self.bar.write(f"step {row['step']:>5}: {text}, validation {row['val_bpb']:.3f} bits/byte")
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()


def resume(run: Run, config: dict, model: Hope, optimizers: list, world: World) -> dict:
    """Load the newest checkpoint that can be loaded, if there is any; returns its state, or that of a run's start."""
    say = print if world.rank == 0 else lambda text: None
    state = {"step": 0, "config": config, "best_val_loss": None, "skips": 0, "skips_in_a_row": 0, "mean_loss": None}
    bad: list[Path] = []
    if saved := world.first(run.saved):
        make_states(model, optimizers)
        tensors = tensors_of(model, optimizers) | {"rng": torch.get_rng_state()}
        for path in reversed(saved):
            try:
                state = run.load(path, config, tensors, world)
                break
            except UserError as e:
                bad.append(path)
                if path == saved[0]:
                    raise
                say(f"{e}: done, it is set aside")
        torch.set_rng_state(tensors["rng"])
        say(f"{run.path}: going on after step {state['step']}")

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
        code = train_in(run, world, config, model_config)
        world.close()
        return code
    finally:
        run.close()


def train_in(run: Run, world: World, config: TrainConfig, model_config: HopeConfig) -> int:
    torch.set_flush_denormal(True)  # states that decay to nothing would slow a CPU down fivefold
    say = print if world.rank == 0 else lambda *text: None
    if config.compile and model_config.inner_grad == "full":
        raise UserError("torch.compile has no second derivatives, which --inner-grad full needs; leave out one of them")
    # Unprepared data is prepared by the first process to lock it, and the others wait.
    corpus = world.together(lambda: Corpus.open(config))
    model_config = replace(model_config, vocab_size=corpus.tokenizer.vocab_size)
    sha256 = {"data_sha256": corpus.sha256, "tokenizer_sha256": corpus.tokenizer.sha256}
    stored = to_json(config, model_config, sha256)

    def begin() -> None:
        run.open(stored)
        corpus.tokenizer.save(run.path)

    torch.manual_seed(config.seed)
    model = Hope(model_config).to(world.device)
    if config.init_from:
        world.together(lambda: init_from(model, corpus.tokenizer, Path(config.init_from)))
    world.first(begin)
    model.recompute = config.recompute
    distribute(model, config, world)
    if config.compile:
        hope.compile_parts(model)
    optimizers, averages = make_optimizers(model, config), make_average(model, config)
    state = resume(run, stored, model, optimizers + averages, world)
    start = state["step"]
    if start == config.steps:
        say(f"{run.path}: finished already")
    size = sum(p.numel() for p in model.parameters())
    title = f"{config.arch}, size {config.size}, {size:,} parameters"
    on = f"{world.size} x {world.device.type}" if world.size > 1 else world.device
    say(f"\n{title}")
    say(
        f"{corpus.train.tokens:,} tokens to train on, {corpus.held_out.tokens:,} held out ({corpus.source}), "
        f"{corpus.tokenizer.vocab_size:,} kinds of tokens, {1 / corpus.tokens_per_byte:.2f} bytes each, on {on}\n"
    )
    say(f"{hope.levels(model, optimizers)}\n")

    bits = corpus.tokens_per_byte / math.log(2)  # of nats per token, in bits per byte
    peak, inner = peak_flops(config, world.device), size - model.embed.weight.numel()
    if world.rank == 0:
        run.track = make_tracker(config, start)
    step, clock = start, time.perf_counter()
    with Interrupt() as interrupt, Progress(start, config.steps, world.rank) as progress:
        while step < config.steps:
            lr = learning_rate(step, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_scale", 1.0)
                optimizer.zero_grad()
            x, y = corpus.batch(step, world.share(config.batch_size))
            loss = find_gradients(model, x.to(world.device), y.to(world.device), config, world)
            norm = clip_gradients(model, config.grad_clip)
            loss, stop = world.sum(loss, interrupt.hit)
            skipped = refused(loss, norm, state, config)
            if not skipped:
                for optimizer in optimizers + averages:
                    optimizer.step()
            step += 1
            state["step"] = step
            tokens = config.batch_size * config.seq_len
            speed = (step - start) * tokens / (time.perf_counter() - clock)
            row = {
                "step": step, "loss": loss, "lr": lr, "grad_norm": norm,
                "tokens": step * tokens, "tokens_per_s": round(speed, 1),
            }  # fmt: skip
            if peak:
                row["utilisation"] = 6 * inner * speed / peak / world.size
            if skipped:
                row |= {"skipped": skipped, "loss": finite(loss), "grad_norm": finite(norm)}
            if state["skips_in_a_row"] >= config.max_skips:
                if world.rank == 0:
                    run.append(row)
                run.wait(world)
                raise UserError(
                    f"{skipped} at step {step}: training diverged, {config.max_skips} steps in a row were skipped; "
                    f"the batch is that of step {step} and seed {config.seed}, the last good checkpoint "
                    f"{run.saved()[-1] if run.saved() else 'none'}; try a smaller --lr than {config.lr:g}"
                )
            if step % config.eval_every == 0 or step == config.steps:
                with averaged(averages), gathered(model), computing_in(config, world):
                    row["val_loss"] = validate(model, corpus, config, world)
                    row["val_bpb"] = row["val_loss"] * bits
                    few = min(4, at_once(config, world))
                    row |= memory_numbers(model, *(z[:few].to(world.device) for z in corpus.validation()))
                state["best_val_loss"] = min(row["val_loss"], state["best_val_loss"] or math.inf)
            stop = stop or step == config.steps
            if world.rank == 0:
                run.append(row)
                progress.show(row, bits)
            if step % config.save_every == 0 or stop:
                tensors = tensors_of(model, optimizers + averages) | {"rng": torch.get_rng_state()}
                run.save(state, tensors, config.keep, world)
            if world.rank == 0 and ("val_loss" in row or stop):
                run.plot(title, bits)
            if stop:
                break
        run.wait(world)
    if step < config.steps:
        say(f"\nStopped and saved after step {step}. To go on: python train.py --resume {run.path}")
        return 130
    if world.rank == 0:
        print(f"\nvalidation: {run.log()[-1]['val_bpb']:.3f} bits per byte after {config.steps} steps")
        print(f"loss curve: {run.path}/loss.png\n\nA sample:\n")
    with averaged(averages), gathered(model), computing_in(config, world):
        if world.rank == 0:
            print(sample_text(model, corpus.tokenizer, seed=config.seed, **SAMPLING))
    say(f'\nMore: python train.py --sample {run.path} --prompt "The "')
    return 0


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def refused(loss: float, norm: float, state: dict, config: TrainConfig) -> str:
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


# ----------------------------------------------------------------------------------------------------------------------
# Plan


# What a process on a CPU holds beside tensors, measured with torch 2.13 and glibc: bytes of Python and its libraries, and
# how much larger the heap is than the tensors in it, since glibc keeps freed blocks (1.1 to 1.35 times).
LIBRARIES, HEAP = 0.45e9, 1.25
# What --plan assumes unless flags say otherwise. A100 and H100: dense bfloat16 and memory as their makers state them.
PLAN = {"gpus": 1, "tokens": 0.0, "utilisation": 0.3}
GPUS = {"A100": (312e12, 80e9), "H100": (989e12, 80e9)}


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while they live, their peak, and arithmetic operations."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        elif "attention_for_cpu" in func.name():  # which the registry lacks
            q, k = (args[i + ("backward" in func.name())] for i in (0, 1))
            self.flops += (10 if "backward" in func.name() else 4) * q.numel() * k.shape[-2]
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            key, size = id(storage), storage.nbytes()
            if key not in self.known:

                def gone(_: Any, key: int = key, size: int = size) -> None:
                    del self.known[key]
                    self.now -= size

                self.known[key] = weakref.ref(storage, gone)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out


def rehearse(model_config: HopeConfig, config: TrainConfig, rows: int, t: int, dtype: torch.dtype) -> Tensor:
    """One micro-batch of (rows, t) tokens, forward and backward, with tensors that have shapes but no numbers.

    Returns peak bytes beyond the weights, gradients included; bytes of the states at the end; operations (a multiply and
    an add count as two; matrix products and attention are counted, what is recomputed as often as it is computed).
    """
    with FakeTensorMode():
        model = Hope(model_config)
        model.recompute = config.recompute
        tokens = torch.zeros(rows, t, dtype=torch.long)
        with Meter() as meter:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                how = {"backward": True, "truncate": True} if config.truncate else {}
                losses, state = model.observe(tokens, tokens, reduction="none", **how)
            if not config.truncate:
                losses.sum().backward()
        size = []
        hope.map_state(lambda z: size.append(z.numel() * z.element_size()) or z, state)
    return torch.tensor([meter.peak, sum(size), meter.flops], dtype=torch.float64)


def forecast(model_config: HopeConfig, config: TrainConfig, rows: int, dtype: torch.dtype) -> list[float]:
    """`rehearse` for the whole model and sequence; where that is much work, extended from shorter and thinner ones.

    All three numbers are linear in layers and in whole rounds of the CMS (the slowest level's chunk); with attention,
    quadratic in rounds.
    """
    c, t = model_config, config.seq_len
    unit, round_ = min(c.clocks, default=t), max(c.clocks, default=t)
    p, n = len(c.pattern), t / round_
    thin = lambda layers, length: rehearse(replace(c, n_layer=layers), config, rows, length, dtype)
    if t / unit * c.n_layer <= 16:
        return thin(c.n_layer, t).tolist()

    def long(layers: int) -> Tensor:
        if n <= 4:
            return thin(layers, t)
        two, three, four = (thin(layers, k * round_) for k in (2, 3, 4))  # the first is unlike those that follow
        bend = (four - 2 * three + two) / 2 if any(c.layer(i).depth == 0 for i in range(p)) else 0 * two
        return two + (three - two) * (n - 2) + bend * (n - 2) * (n - 3)

    one, two = long(p), long(2 * p)
    return (one + (two - one) / p * (c.n_layer - p)).tolist()


def buffers(config: TrainConfig) -> tuple[float, float]:
    """Bytes that the optimizers keep for a byte of the matrices and of the other weights, seen on a small model."""
    model = Hope(HopeConfig.preset(arch=config.arch, d_model=32, n_head=2, n_layer=1, cms_hidden=2.0))
    optimizers = make_optimizers(model, config) + make_average(model, config)
    optimizers = [o for o in optimizers if not isinstance(o, optim.Accumulate)]
    model.observe(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long), backward=True)
    for optimizer in optimizers:
        optimizer.step()
    matrices, found = set(hope.param_groups(model)["matrix"]), [0, 0]
    for p, state in (item for optimizer in optimizers for item in optimizer.state.items()):
        found[p not in matrices] += sum(v.numel() for v in state.values())
    return tuple(
        n / sum(p.numel() for p in model.parameters() if (p in matrices) is inner)
        for n, inner in zip(found, (True, False))
    )


def foreseen_vocabulary(config: TrainConfig) -> int:
    """How many kinds of tokens a run will have; of those that train:N will learn, the most."""
    name, folder = config.tokenizer_name, Path(config.data)
    if (folder / "manifest.json").is_file():
        return prepared_tokenizer(folder, read_manifest(folder)).vocab_size
    return asked_size(name) if name.startswith("train:") else make_tokenizer(name, tuple).vocab_size


def plan(config: TrainConfig, model_config: HopeConfig, assumed: dict[str, float]) -> int:
    """Print what a run takes: memory of a GPU by part, operations, days. Allocates no model."""
    gpus = int(assumed["gpus"])
    if gpus < 1 or config.batch_size % gpus or gpus % config.nodes:
        raise UserError(
            f"{gpus} GPUs on {config.nodes} nodes cannot share {config.batch_size} sequences a step evenly; change --gpus, --nodes or --batch-size"
        )
    if not 0 < assumed["utilisation"] <= 1:
        raise UserError(f"--utilisation is {assumed['utilisation']}; give a part of the GPUs' peak, above 0, up to 1")
    model_config = replace(model_config, vocab_size=foreseen_vocabulary(config))
    with torch.device("meta"):
        model = Hope(model_config)
    size = sum(p.numel() for p in model.parameters())
    matrix = sum(p.numel() for p in hope.param_groups(model)["matrix"])
    dtype = torch.float32 if config.precision == "float32" else torch.bfloat16
    share = config.batch_size // gpus
    rows = min(share, config.micro_batch or share)
    peak, state, flops = forecast(model_config, config, rows, dtype)
    flops /= rows * config.seq_len
    kept = buffers(config)
    slow = sum(p.numel() for group in hope.slow_groups(model, config.seq_len) for p in group["params"])
    optimizer = 4 * (kept[0] * matrix + kept[1] * (size - matrix) + slow)
    step = config.batch_size * config.seq_len
    print(
        f"{config.arch}, size {config.size}: {size:,} parameters, of which {model.embed.weight.numel():,} embed tokens"
    )
    print(
        f"a step: {config.batch_size} sequences of {config.seq_len} tokens on {gpus} GPUs, {rows} of a GPU's {share} at once, {dtype}\n"
    )
    per_node, low = gpus // config.nodes, 2 if dtype == torch.bfloat16 else 4
    table = {"ddp": (4 * size, 4 * size, optimizer)}
    if gpus > 1:
        whole = low * matrix + 4 * (size - matrix)  # gathered for the step
        table["fsdp"] = (4 * size / per_node + whole, 4 * size * (1 + 1 / per_node), optimizer / per_node)
    print(
        f"{'GB per GPU':<12}"
        + "".join(f"{k:>12}" for k in ("parameters", "gradients", "optimizer", "states", "activations", "peak"))
    )
    highest = {}
    for name, (weights, gradients, buffer) in table.items():
        # Gradients come as activations go, so the rehearsed peak is less than their sum; from the second micro-batch on,
        # all gradients are there from the start.
        most = max(peak, gradients) if share <= rows else gradients + max(0.0, peak - 4 * size) + state
        highest[name] = weights + buffer + most
        parts = (weights, gradients, buffer, state, max(0.0, peak - state - 4 * size), highest[name])
        print(f"{name:<12}" + "".join(f"{x / 1e9:>12.3f}" for x in parts))
    print("\npeak is of tensors. A process on a CPU holds more, in GB:")
    for name, most in highest.items():
        saved = 2 * (4 * size + optimizer) / (per_node if name == "fsdp" else 1)  # copied, and copied into files' bytes
        parts = (LIBRARIES, (HEAP - 1) * most, saved, most + LIBRARIES + (HEAP - 1) * most + saved)
        print(
            "{:<12}libraries {:.3f}, memory that glibc keeps {:.3f}, a checkpoint being written {:.3f}: resident about "
            "{:.3f}".format(name, *(x / 1e9 for x in parts))
        )
    tokens = assumed["tokens"] or config.steps * step
    print(
        f"\n{flops:.3g} operations a token, {flops / 6 / size:.2f} x 6 per parameter; {tokens:.3g} tokens are {tokens / step:,.0f} steps"
    )
    for name, (rate, _) in GPUS.items():
        speed = gpus * rate * assumed["utilisation"] / flops
        print(
            f"{gpus} x {name} at {assumed['utilisation']:.0%} of {rate / 1e12:.0f} TFLOP/s: {speed:,.0f} tokens/s, {tokens / speed / 86400:.3g} days"
        )
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


# What a sample is drawn with unless flags say otherwise, at the end of training and by --sample.
SAMPLING = {"prompt": "The ", "max_new_tokens": 300, "temperature": 1.0, "top_k": None, "top_p": 0.9}


def sample_text(
    model: Hope,
    tokenizer: Tokenizer,
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
    tokens = torch.tensor([tokenizer.encode(prompt).tolist()], device=device)
    new = model.generate(tokens, max_new_tokens, temperature, top_k, top_p, stop=[tokenizer.eot])[0].tolist()
    return prompt + tokenizer.decode(new[: new.index(tokenizer.eot)] if tokenizer.eot in new else new)


def trained(path: Path, device: str | None) -> tuple[TrainConfig, Hope, Tokenizer, dict]:
    """Settings, model (its averaged weights, if it has some) and tokenizer of the run at `path`, and what it is."""
    run = Run(path)
    config, model_config, sha256 = from_json(path / "config.json")
    if not run.saved():
        raise UserError(f"{path} has no checkpoint yet; train first: python train.py --resume {path}")
    tokenizer = prepared_tokenizer(path, {})
    if tokenizer.sha256 != sha256["tokenizer_sha256"]:
        raise UserError(
            f"{path}/tokenizer.tiktoken is missing or not the run's; restore it, or have it written anew: "
            f"python train.py --resume {path}"
        )
    world = World(replace(config, device=device or config.device))
    model = Hope(model_config).to(world.device)
    averages = make_average(model, config)
    make_states(model, averages)
    about = to_json(config, model_config, sha256)
    state = run.load(run.saved()[-1], about, tensors_of(model, averages), world, only=("model.", "EMA."))
    with averaged(averages):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(weights)
    return config, model, tokenizer, about | {"step": state["step"]}


def sample(args: argparse.Namespace) -> int:
    if not args.prompt:
        raise UserError('--prompt is empty; give some text to start from, as in --prompt "The "')
    config, model, tokenizer, _ = trained(Path(args.sample), args.device)
    seed = config.seed if args.seed is None else args.seed
    print(sample_text(model, tokenizer, seed=seed, **{name: getattr(args, name) for name in SAMPLING}))
    return 0


def export(args: argparse.Namespace) -> int:
    """Write RUN/export: model.safetensors, config.json and, where there is one, the tokenizer; see --init-from."""
    run = Path(args.export)
    config, model, tokenizer, about = trained(run, args.device)
    target, beside = run / "export", run / ".export"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
        write_atomically(beside / "model.safetensors", safetensors.torch.save(weights))
        tokenizer.save(beside)
        about["model_sha256"] = file_sha256(beside / "model.safetensors")
        write_atomically(beside / "config.json", signed(about))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(beside, target)
    except OSError as e:
        raise UserError(f"{target} cannot be written ({reason(e)}); make room there") from e
    print(f"{target}: {len(weights)} tensors, {sum(w.numel() for w in weights.values()):,} parameters")
    return 0


def init_from(model: Hope, tokenizer: Tokenizer, folder: Path) -> None:
    """Take over the weights of an export."""
    try:
        about = read_signed(folder / "config.json")
        if file_sha256(folder / "model.safetensors") != about["model_sha256"]:
            raise ValueError("model.safetensors was altered")
        if about["tokenizer_sha256"] != tokenizer.sha256:
            raise ValueError("its tokenizer is another one; take its own, which is the default")
        stored = safetensors.torch.load_file(folder / "model.safetensors")
        ours = dict(model.named_parameters())
        for name in sorted(stored.keys() | ours.keys()):
            shapes = [tuple(t[name].shape) if name in t else None for t in (stored, ours)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{name} has shape {shapes[0]} there and {shapes[1]} here")
    except Exception as e:  # whatever a damaged file leads its reader to
        raise UserError(
            f"--init-from {folder}: it cannot be used ({reason(e)}); give a folder that --export made"
        ) from e
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(stored[name])


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
    act.add_argument("--prepare", action="store_true", help="prepare the data for such a run, and stop")
    act.add_argument("--sample", metavar="DIR", help="print a sample from the newest checkpoint of the run in DIR")
    act.add_argument(
        "--export", metavar="DIR", help="write the weights of the run in DIR to DIR/export, as safetensors"
    )
    act.add_argument(
        "--plan", action="store_true", help="print memory, operations and days that a run takes; starts none"
    )
    act.add_argument("--gpus", type=int, metavar="N", help="plan: how many GPUs (default: %(default)s)")
    act.add_argument("--tokens", type=float, metavar="X", help="plan: tokens to train on; default: those of --steps")
    act.add_argument("--utilisation", type=float, metavar="X", help="plan: part of the GPUs' peak that is reached (default: %(default)s, an assumption)")  # fmt: skip
    act.add_argument("--prompt", metavar="TEXT", help="what the sample starts with (default: '%(default)s')")
    act.add_argument("--max-new-tokens", type=int, metavar="N", help="length of the sample (default: %(default)s)")
    act.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest (default: %(default)s)")
    act.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens only")
    act.add_argument("--top-p", type=float, metavar="X", help="sample among the likeliest tokens that have X of the probability (default: %(default)s)")  # fmt: skip
    parser.set_defaults(**SAMPLING, **PLAN)
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
        if args.export:
            return export(args)
        settings = given(args, TrainConfig)
        model_settings = {**given(args, HopeConfig), **given(args, MemoryConfig)}
        if not args.resume:
            started = settings.get("init_from")
            if started:
                old, base, _ = from_json(Path(started) / "config.json")
                own = Path(started) / "tokenizer.tiktoken"
                settings = {
                    "size": old.size,
                    "arch": old.arch,
                    "tokenizer": str(own) if own.exists() else "bytes",
                } | settings
            config = TrainConfig(**settings)
            if args.prepare:
                corpus = Corpus.open(config)
                print(
                    f"{corpus.train.tokens:,} tokens to train on, {corpus.held_out.tokens:,} held out: {corpus.source}"
                )
                return 0
            if started:
                inner = {name: model_settings.pop(name) for name in given(args, MemoryConfig)}
                model = replace(base, memory=replace(base.memory, **inner), **model_settings)
            else:
                model = HopeConfig.preset(config.size, config.arch, **model_settings)
            if args.plan:
                return plan(config, model, {name: getattr(args, name) for name in PLAN})
            return train(config, model)
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
    code = main()
    if dist.is_initialized() or "RANK" in os.environ:  # gloo's threads sometimes abort a process that ends as usual
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
