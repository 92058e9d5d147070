"""From text to the rows of tokens that a training step reads.

In this file, in this order:

    UserError, ...     errors in one line, and files that are whole or not there; train.py uses these too
    Tokenizer          text to tokens and back
    Source             the text that --data names, piece by piece
    prepare            that text as files of tokens, made once
    Rows, Corpus       the rows of a step: a pure function of (seed, step, row)
    Mixture            the same, of several sources by share
    TaskCorpus         the same, of a synthetic task of tasks.py

train.py declares the settings (`TrainConfig`) and trains on what comes out of `Corpus.open`. Nothing here knows the model.
"""

from __future__ import annotations

import base64
import codecs
import glob
import gzip
import hashlib
import importlib
import io
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import cache, cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

import tasks

if TYPE_CHECKING:  # for annotations: the settings of a run, some of which are those of its data
    from train import TrainConfig


# ---- Errors and files ----


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


def reason(e: BaseException) -> str:
    """An exception in one line, with its type unless that says nothing."""
    while getattr(e, "failures", None):  # a CheckpointException gathers those of all processes
        e = next(iter(e.failures.values()))[0]
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    text = " ".join(str(e).split())[:250]
    return text if text and type(e) in (ValueError, UserError) else f"{type(e).__name__}: {text}".removesuffix(": ")


DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what a damaged file leads to


@contextmanager
def explained(what: str, fix: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Within, errors of these kinds become UserErrors: what happened, why, and what to do about it."""
    try:
        yield
    except UserError:
        raise
    except kinds or DAMAGE as e:
        raise UserError(f"{what} ({reason(e)}); {fix}") from e


def extra(module: str, what: str) -> Any:
    """Import a package that the default run does without."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        name = module.split(".")[0]
        ours = {"gradio": "demo", "transformers": "pretrained"}.get(name, "data")
        install = name if name in ("trackio", "wandb") else f'"nested-learning-hope[{ours}]"'
        raise UserError(f"{what} needs {name}, which is missing; run: pip install {install}") from e


@cache
def try_hub() -> None:
    """Before something is asked of the hub: if it cannot be reached, its libraries take what was kept, or fail at once.

    Otherwise they go on asking, for half a minute.
    """
    try:
        import huggingface_hub as hub
    except ImportError:  # what needs it says so
        return
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=3)
    except Exception:  # its client has errors of its own
        hub.constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def sync(path: Path) -> None:
    """Until a file's content, or the names in a folder, would outlast a power failure."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside, then rename: a reader sees all of it or what was there before."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(beside)
    os.replace(beside, path)


def put_in_place(beside: Path, target: Path) -> None:
    """The same for a folder that was written beside."""
    sync(beside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(beside, target)
    sync(target.parent)


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def signed(value: dict) -> str:
    """As JSON, with a fingerprint that tells when it was altered."""
    return json.dumps(value | {"sha256": fingerprint(value)}, indent=1) + "\n"


def read_signed(path: Path, fix: str = "restore it") -> dict:
    with explained(f"{path} cannot be used", fix):
        value = json.loads(path.read_text())
        if not isinstance(value, dict) or value.pop("sha256", None) != fingerprint(value):
            raise ValueError("it was altered")
        return value


# ---- Tokenizers ----

# How text is split before byte pairs are merged: GPT-4's pattern, as tiktoken has it for cl100k_base.
SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"


# Patterns look ahead after white space, and their engine gives up on a run of a million; so longer ones are cut here. What
# follows a run keeps the white space in front of it, which belongs to its first token.
LONG_RUN = re.compile(r"\s{1000}(?=\s)")


def cut_runs(text: str) -> list[str]:
    """The text in parts, one unless it holds very long runs of white space."""
    edges = [0, *(run.end() for run in LONG_RUN.finditer(text)), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


class Tokenizer:
    """Text as bytes, or as byte pairs merged by rank: what a `.tiktoken` file holds, together with a split pattern.

    One token, `eot`, stands in front of every document. Among bytes it is the zero byte, which text does without;
    otherwise the first number that `ranks` leaves free. decode(encode(text)) == text for any text; half a surrogate
    pair, which is no text, becomes a question mark.
    """

    def __init__(self, ranks: dict[bytes, int] | None = None, pattern: str = SPLIT):
        self.ranks, self.pattern = ranks, pattern
        used = {0: b""} | {i: bytes([i]) for i in range(1, 256)} if ranks is None else {i: t for t, i in ranks.items()}
        self.eot = 0 if ranks is None else min(set(range(len(used) + 1)) - set(used))
        self.vocab_size = max(*used, self.eot) + 1
        # Bytes of text that every token stands for; bits per byte are counted with it.
        self.lengths = np.array([len(used.get(i, b"")) for i in range(self.vocab_size)])
        self.dtype = np.uint8 if ranks is None else np.uint16 if self.vocab_size <= 2**16 else np.uint32
        if ranks is not None:
            special = {"<|eot|>": self.eot}
            make = extra("tiktoken", "--tokenizer").Encoding
            self.encoding = make("", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    @cached_property
    def sha256(self) -> str:
        return fingerprint([self.pattern, sorted((i, t.hex()) for t, i in self.ranks.items())] if self.ranks else None)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """The tokens of each text, on all cores."""
        raw = [text.encode(errors="replace") for text in texts]
        if self.ranks is None:
            return [np.frombuffer(text, np.uint8) for text in raw]
        parts = [cut_runs(text.decode()) for text in raw]
        found = self.encoding.encode_ordinary_batch([*chain(*parts)], num_threads=os.cpu_count() or 1)
        rest = iter(found)
        return [np.array([*chain(*islice(rest, len(cut)))], self.dtype) for cut in parts]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is not UTF-8 is shown as U+FFFD."""
        if self.ranks is not None:
            tokens = self.encoding.decode_bytes([t for t in tokens if self.lengths[t]])
        return bytes(tokens).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write tokenizer.tiktoken, which bytes do without, and what transformers' AutoTokenizer reads (same tokens)."""
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot|>", "pattern": self.pattern}
        write_atomically(folder / "tokenizer.json", json.dumps(self.as_json()) + "\n")
        write_atomically(folder / "tokenizer_config.json", json.dumps(settings) + "\n")
        if self.ranks is not None:
            lines = (f"{base64.b64encode(t).decode()} {i}\n" for t, i in sorted(self.ranks.items(), key=lambda r: r[1]))
            write_atomically(folder / "tokenizer.tiktoken", "".join(lines))

    def as_json(self) -> dict:
        """In the format of Hugging Face's tokenizers: bytes are written as letters, byte pairs as merges in order."""
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
        letter = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*shown}))}
        spell = lambda token: "".join(letter[b] for b in token)
        ranks = self.ranks or {bytes([i]): i for i in range(1, 256)}
        merges = [pair for token in sorted(ranks, key=ranks.get) if len(pair := self.parts(token)) == 2]
        split = {"type": "Split", "pattern": {"Regex": self.pattern.replace("{1,3}+", "{1,3}")}}  # that + repeats there
        split |= {"behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        eot = {"id": self.eot, "content": "<|eot|>", "special": True, "normalized": False}
        return {
            "version": "1.0",
            "added_tokens": [eot | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level] if self.ranks else [level]},
            "decoder": level,
            "model": {
                "type": "BPE",
                "vocab": {"<|eot|>": self.eot} | {spell(token): i for token, i in ranks.items()},
                "merges": [[spell(part) for part in pair] for pair in merges],
                "ignore_merges": True,  # a piece that is a token is that token, as in tiktoken
            },
        }

    def parts(self, token: bytes) -> list[bytes]:
        """What byte pairs are merged into before the last merge makes this token of them."""
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            merged = [self.ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
            if min(merged) >= self.ranks[token]:
                break
            i = merged.index(min(merged))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Read a `.tiktoken` file, with the pattern from the _config.json beside it, or GPT-4's if there is none."""
        with explained(f"tokenizer {path} cannot be used", "give a file in tiktoken's format"):
            lines = (line.split() for line in path.read_text().splitlines() if line)
            ranks = {base64.b64decode(token, validate=True): int(i) for token, i in lines}
            if not {bytes([i]) for i in range(256)} <= set(ranks) or len(set(ranks.values())) < len(ranks):
                raise ValueError("it must hold all 256 bytes and no number twice")
            if min(ranks.values()) < 0 or max(ranks.values()) > 2 * len(ranks):
                raise ValueError(f"it must number its {len(ranks)} tokens from 0 on")
            beside = path.with_name(f"{path.stem}_config.json")
            return Tokenizer(ranks, json.loads(beside.read_text())["pattern"] if beside.exists() else SPLIT)

    @staticmethod
    def of(folder: Path, sha256: str | None, fix: str) -> Tokenizer:
        """The tokenizer that was saved in a folder, and has this hash; `fix` says what to do if it is another one."""
        tokenizer = make_tokenizer(tokenizer_in(folder), tuple)
        if tokenizer.sha256 != sha256:
            raise UserError(f"{folder / 'tokenizer.tiktoken'} is missing or was altered; {fix}")
        return tokenizer

    @staticmethod
    def learn(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
        """Byte-pair encoding learnt from texts, at most 1 GB of them. Text too small for so many tokens gives fewer."""

        def first_gigabyte() -> Iterator[str]:
            left = 2**30
            for text in texts:
                yield from cut_runs(text)
                left -= len(text)
                if left <= 0:
                    return

        learner = extra("rustbpe", "--tokenizer train:N").Tokenizer()
        learner.train_from_iterator(first_gigabyte(), vocab_size=vocab_size - 1, pattern=SPLIT)  # one is for eot
        tokenizer = Tokenizer({bytes(token): i for token, i in learner.get_mergeable_ranks()})
        if tokenizer.vocab_size < vocab_size:
            print(f"the text yields {tokenizer.vocab_size:,} tokens, not {vocab_size:,}: the vocabulary is that small")
        return tokenizer


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of transformers, `hf`. Its end of text is `eot`; it may have a chat template."""

    def __init__(self, hf: Any):
        backend, self.hf = json.loads(hf.backend_tokenizer.to_str()), hf
        if hf.eos_token_id is None:
            raise ValueError("it has no token for the end of a text")
        self.ranks, self.eot, self.vocab_size = {}, self.hf.eos_token_id, len(self.hf)
        self.identity = [backend["model"], backend["pre_tokenizer"], self.hf.chat_template]
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        names = self.hf.convert_ids_to_tokens(range(self.vocab_size))
        if "ByteLevel" not in json.dumps(backend["decoder"]):  # else a letter stands for a byte
            names = ["." if re.fullmatch("<0x..>", n) else n.replace("\u2581", " ").encode() for n in names]
        self.lengths = np.array([0 if i in self.hf.all_special_ids else len(n) for i, n in enumerate(names)])

    @cached_property
    def sha256(self) -> str:
        return fingerprint(self.identity)

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        whole = [text.encode(errors="replace").decode() for text in texts]
        found = self.hf.backend_tokenizer.encode_batch(whole, add_special_tokens=False)
        return [np.array(one.ids, self.dtype) for one in found]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.hf.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> None:
        self.hf.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        write_atomically(path, json.dumps(json.loads(path.read_text()) | {"name_or_path": ""}) + "\n")

    @staticmethod
    def load(path: Path) -> PretrainedTokenizer:
        """From a folder; no code in it is run."""
        transformers = extra("transformers", f"the tokenizer in {path}")
        transformers.logging.set_verbosity_error()  # of a config.json that it does not know, such as a run's
        with explained(f"the tokenizer in {path} cannot be used", "give a folder that AutoTokenizer loads", Exception):
            how = dict(local_files_only=True, trust_remote_code=False)
            return PretrainedTokenizer(transformers.AutoTokenizer.from_pretrained(str(path), **how))


def tokenizer_in(folder: Path) -> str:
    """What --tokenizer is to be for the tokenizer that was saved in a folder."""
    own, settings = folder / "tokenizer.tiktoken", folder / "tokenizer_config.json"
    if own.exists():
        return str(own)
    if not settings.exists():
        return "bytes"
    with explained(f"{settings} cannot be used", "restore it"):
        return "bytes" if "pattern" in json.loads(settings.read_text()) else str(folder)


def make_tokenizer(name: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that --tokenizer names; `texts` are what train:N learns from."""
    if name == "bytes":
        return Tokenizer()
    if name.startswith("train:"):
        return Tokenizer.learn(asked_size(name), texts())
    if name.endswith(".tiktoken"):
        return Tokenizer.load(Path(name))
    if Path(name).is_dir():
        return PretrainedTokenizer.load(Path(name))
    tiktoken = extra("tiktoken", f"--tokenizer {name}")
    if name not in (known := tiktoken.list_encoding_names()):
        allowed = f"bytes, train:N, a .tiktoken file, a folder with a tokenizer.json, {', '.join(known)}"
        raise UserError(f"--tokenizer {name}: no such tokenizer; allowed: {allowed}")
    fix = "connect to the network, or use bytes, train:N or a .tiktoken file"
    with explained(f"--tokenizer {name} must be downloaded once, and that failed", fix, OSError):
        named = tiktoken.get_encoding(name)
    return Tokenizer(named._mergeable_ranks, named._pat_str)  # the way tiktoken's own README extends an encoding


def asked_size(name: str) -> int:
    """The N of train:N."""
    if not name[6:].isdecimal() or not 257 <= int(name[6:]) <= 2**24:
        raise UserError(f"--tokenizer {name}: the vocabulary is a number of tokens from 257, as in train:32000")
    return int(name[6:])


# ---- Data: documents -> files of tokens -> the rows of a step ----


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
        fresh = {p.strip() for p in paragraphs if len(p) >= 80}
        seen |= fresh
        if fresh:
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
    "pg19": ("emozilla/pg19", None, 0.005),  # whole books
}
WIKITEXT_TITLE = re.compile(r" = [^=].* = \n")
PIECE = 2**18  # characters of a text file that are read at once
BATCH = 2**22  # characters that are tokenised at once, and that an interrupted preparation may have to do again


class Piece(NamedTuple):
    """Some text; `begins` if a document begins with it, else it goes on with the one before."""

    text: str
    begins: bool
    held_out: bool | None = None  # None: to be decided


class Source:
    """The text that --data names, piece by piece, always in the same order.

    A text file is one document and comes in pieces; a row of a jsonl or parquet file or of a data set is one. `tell()`
    is the position after the last piece; iteration begins at the position `start`. With a filter a document comes
    whole, and some do not: too short ones, too long ones, and those whose text was `seen` before.
    """

    def __init__(self, config: TrainConfig):
        self.data, self.field, self.where, self.start = config.data, config.text_field, config.data, None
        self.files, self.held_out, self.fix = [], config.held_out or 0.1, "restore it, or leave it out"
        if self.data == "pydoc":
            self.pieces, self.held_out = self._pydoc, 0.0  # it is decided already
            self.identity = {"pydoc": fingerprint(pydoc_documents())}
        elif self.data in HUB or self.data.startswith("hf:"):
            name, preset, part = HUB.get(self.data, (self.data[3:], None, 0.1))
            self.pieces, self.held_out = self._hub, config.held_out or part
            self.identity = {"hub": (name, config.data_config or preset, config.data_split)}
            self.fix = "check --data-config, --data-split and the network; the same command goes on from there"
        else:
            self.pieces, self.files = self._files, self._find()
            self.identity = {"files": [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]}
        self.identity |= {"field": self.field, "held_out": self.held_out}
        self.filters = {k: v for k in FILTERS if (v := getattr(config, k))}
        self.identity |= {"filters": self.filters} if self.filters else {}
        self.seen: set[bytes] = set()  # hashes of documents, and those that came since they were last written down
        self.new: list[bytes] = []
        self.left_out = dict.fromkeys(self.filters, 0)
        self.place: Any = None
        self.zeros = 0  # zero bytes that were replaced
        self.tell: Callable[[], Any] = lambda: self.place

    def __iter__(self) -> Iterator[Piece]:
        try:
            yield from self._kept() if self.filters else self.pieces()
        except UserError:
            raise
        except Exception as e:  # damaged archives, data sets and networks raise whatever their library likes
            raise UserError(f"--data {self.where} cannot be read ({reason(e)}); {self.fix}") from e

    def _kept(self) -> Iterator[Piece]:
        """Every document that no filter leaves out, in one piece; the others are counted."""
        if self.start is None:
            self.seen, self.new, self.left_out = set(), [], dict.fromkeys(self.filters, 0)
        parts, tell, after = [], self.tell, None
        for piece in chain(self.pieces(), [None]):
            if parts and (piece is None or piece.begins):
                text = "".join(part.text for part in parts)
                self.tell = lambda: after
                if why := self._why_not(text):
                    self.left_out[why] += 1
                else:
                    yield Piece(text, True, parts[0].held_out)
                self.tell, parts = tell, []
            tell = self.tell  # of a data set of the hub it is another since the first piece
            after = tell()
            parts += [piece] if piece else []

    def _why_not(self, text: str) -> str | None:
        """The filter that leaves this document out."""
        if len(text) < self.filters.get("min_chars", 0):
            return "min_chars"
        if len(text) > self.filters.get("max_chars", math.inf):
            return "max_chars"
        if self.filters.get("deduplicate"):
            digest = hashlib.sha256(text.encode(errors="replace")).digest()[:16]
            if digest in self.seen:
                return "deduplicate"
            self.seen.add(digest)
            self.new.append(digest)
        return None

    def _find(self) -> list[Path]:
        """Every file once: those that exist under a name, those below a folder, those that match a pattern."""
        found: dict[str, Path] = {}
        for name in [self.data] if os.path.exists(self.data) else self.data.split(","):
            path = Path(name)
            below = (p for p in path.rglob("*") if not any(part[0] == "." for part in p.relative_to(path).parts))
            files = [path] if path.is_file() else below if path.is_dir() else map(Path, glob.glob(name, recursive=True))
            if not (files := {os.path.realpath(p): p for p in files if p.is_file()}):
                missing = "no file in this folder" if path.is_dir() else "no such file"
                allowed = "files, folders or patterns separated by commas, hf:NAME for a data set of the hub"
                raise UserError(f"--data {name}: {missing}; give {allowed}, or one of: pydoc, {', '.join(HUB)}")
            found = files | found
        return sorted(found.values())

    def _row(self, row: Any, where: str) -> str:
        """The text of a row that was found there."""
        self.where = where
        if isinstance(row, dict) and isinstance(text := row.get(self.field), str):
            return text
        if isinstance(row, dict) and self.field in row:
            kind = {"NoneType": "null", "list": "a list", "dict": "an object", "bool": "true or false"}
            held = kind.get(type(text).__name__, "a number")
            raise ValueError(f"field {self.field!r} holds {held}, not text; mend it, or name another by --text-field")
        found = ", ".join(row) if isinstance(row, dict) else "no JSON object"
        raise ValueError(f"no text in field {self.field!r}, there is: {found}; name it by --text-field")

    def _pydoc(self) -> Iterator[Piece]:
        first = self.start or 0
        for self.place, (text, held_out) in enumerate(pydoc_documents()[first:], first + 1):
            yield Piece(text, True, held_out)

    def _hub(self) -> Iterator[Piece]:
        datasets, (name, config, split) = extra("datasets", f"--data {self.data}"), self.identity["hub"]
        for library in ("datasets", "fsspec", "huggingface_hub", "urllib3"):  # what they retry is no news
            logging.getLogger(library).setLevel(logging.ERROR)  # after their import, which sets a level of its own
        try_hub()
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        if self.start:
            rows.load_state_dict(self.start)
        self.tell = rows.state_dict
        for n, row in enumerate(rows, 1):
            text = self._row(row, f"{self.data}, row {n}" + " after the last batch" * bool(self.start))
            yield Piece(text, self.data != "wikitext-103" or WIKITEXT_TITLE.fullmatch(text) is not None)

    def _files(self) -> Iterator[Piece]:
        first, done = self.start or (0, 0)
        for i, path in enumerate(self.files[first:], first):
            for n, piece in enumerate(self._file(path), 1):
                if n > done:
                    self.place = (i, n)
                    yield piece
            done = 0

    def _file(self, path: Path) -> Iterator[Piece]:
        """By hand: `datasets` holds a text file as a whole, changes its line ends, and names no row in its errors."""
        kind, self.where = [s.lower() for s in path.suffixes if s.lower() not in (".gz", ".zst")][-1:], str(path)
        if kind == [".parquet"]:
            parquet, n = extra("pyarrow.parquet", f"--data {path}").ParquetFile(path), 0
            columns = [self.field] if self.field in parquet.schema_arrow.names else None
            for group in parquet.iter_batches(64, columns=columns):
                for n, row in enumerate(group.to_pylist(), n + 1):
                    yield Piece(self._row(row, f"{path}, row {n}"), True)
            return
        if path.suffix.lower() == ".zst":  # by pyarrow: the zstandard package takes a file that was cut for a whole one
            file = io.BufferedReader(extra("pyarrow", f"--data {path}").input_stream(str(path), compression="zstd"))
        else:
            file = (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb")
        with file:
            if kind == [".json"] and file.peek(99).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
                yield from (Piece(self._row(row, f"{path}, row {n}"), True) for n, row in enumerate(json.load(file), 1))
            elif kind in ([".jsonl"], [".ndjson"], [".json"]):
                for n, line in enumerate(file, 1):
                    self.where = f"{path}, line {n}"
                    if line.strip():
                        yield Piece(self._row(json.loads(line), self.where), True)
            else:
                text, begins = io.TextIOWrapper(file, "utf-8-sig", newline=""), True
                while block := text.read(PIECE):
                    yield Piece(block, begins)
                    begins = False


def batches(source: Source, held_out: bool | None = None) -> Iterator[tuple[list[Piece], dict]]:
    """Gather pieces to tokenise at once, with the position after them.

    A document is held out by the hash of its first piece, so that copies of it are on the same side. The argument is
    the side of the document in which the position lies. Documents without text are left out.
    """
    batch, size, begins = [], 0, held_out is None
    for text, new, side in source:
        begins |= new
        source.zeros += text.count("\0")
        text = text.replace("\0", "\ufffd")  # among bytes, a zero stands between documents
        if begins and not text.strip():
            continue
        if begins:
            digest = int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big")
            held_out = digest < source.held_out * 2**64 if side is None else side
        batch.append(Piece(text, begins, held_out))
        size, begins = size + len(text), False
        if size >= BATCH:
            yield batch, {"position": source.tell(), "side": held_out}
            batch, size = [], 0
    if batch:
        yield batch, {"position": source.tell(), "side": held_out}


# What prepared data is: tokens for training and held out, and where in them documents start (an eot each), as numbers.
SPLITS = ("train", "held_out")
FILES = [f"{split}.{what}" for split in SPLITS for what in ("tokens", "starts")]
SEEN = "seen.hashes"  # 16 bytes for every document, while preparing with --deduplicate
# The settings that leave documents out, and what they say of those.
FILTERS = {"min_chars": "too short", "max_chars": "too long", "deduplicate": "seen before"}


def prepare(config: TrainConfig) -> tuple[Path, dict, Tokenizer]:
    """Tokens of the data that `config` names, made by the first process that asks: folder, manifest, tokenizer.

    A folder is named by a hash of what it is made from, and gets its name when it is complete. `data` may also be such a
    folder, prepared elsewhere.
    """
    folder = Path(config.data)
    if not (folder / "manifest.json").is_file():
        source, name = Source(config), config.tokenizer_name
        identity = source.identity | {"tokenizer": name}
        if name.endswith(".tiktoken") or Path(name).is_dir():
            identity["tokenizer_file"] = make_tokenizer(name, tuple).sha256
        label = "-".join(Path(part).name for part in (*config.data.split(","), name))
        label = "-".join(re.findall(r"[\w.]+", label))[:60].strip(".")
        folder = Path(config.data_dir) / f"{label}-{fingerprint(identity)[:8]}"
        fix = "make room or use another --data-dir; the same command goes on where this one stopped"
        with explained(f"{folder} cannot be written", fix, OSError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not folder.exists():
                with FileLock(f"{folder}.lock"):
                    if not folder.exists():  # another process may have made it meanwhile
                        part = folder.with_name(f"{folder.name}.part")
                        write_tokens(part, source, name)
                        put_in_place(part, folder)
    fix = f"restore it, or delete {folder} to prepare it anew"
    manifest = read_signed(folder / "manifest.json", fix)
    if "sha256s" not in manifest:
        raise UserError(f"--data {folder}: its preparation was not finished; finish it where it was begun")
    if config.tokenizer not in ("", used := manifest["tokenizer"]):
        raise UserError(f"--data {folder} was prepared with --tokenizer {used}; leave --tokenizer out")
    filters = {k: v for k in FILTERS if (v := getattr(config, k))}
    if Path(config.data) == folder and filters and filters != manifest.get("filters"):
        raise UserError(f"--data {folder} was prepared with other filters; leave out {', '.join(filters)}")
    for file in FILES:
        path, size = folder / file, manifest["sizes"][file]
        found = path.stat().st_size if path.exists() else None
        if found != size:
            raise UserError(f"{path} {'is missing' if found is None else f'has {found} bytes, not {size}'}; {fix}")
        thorough = config.verify_data and os.environ.get("LOCAL_RANK", "0") == "0"
        if thorough and file_sha256(path) != manifest["sha256s"][file]:
            raise UserError(f"{path} was altered; {fix}")
    return folder, manifest, Tokenizer.of(folder, manifest["tokenizer_sha256"], fix)


def write_tokens(folder: Path, source: Source, tokenizer_name: str) -> None:
    """Fill a folder with FILES and a manifest. Whatever stops it, it goes on after the last batch that the manifest has."""
    path, fix = folder / "manifest.json", f"delete {folder} to prepare it anew"
    if path.exists():
        manifest = read_signed(path, fix)
        manifest |= {"left_out": manifest.get("left_out", {}), "sizes": {SEEN: 0} | manifest["sizes"]}
        print(f"{folder}: going on after {sum(manifest['sizes'].values()):,} bytes")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        texts = lambda: (p.text for pieces, _ in batches(source) for p in pieces if not p.held_out)
        tokenizer = make_tokenizer(tokenizer_name, texts)
        tokenizer.save(folder)
        manifest = {"data": source.data, "tokenizer": tokenizer_name, "tokenizer_sha256": tokenizer.sha256}
        manifest |= {"held_out": source.held_out, "position": None, "side": None, "zeros": 0}
        manifest |= {"sizes": dict.fromkeys([*FILES, SEEN], 0), "filters": source.filters, "left_out": source.left_out}
    tokenizer = Tokenizer.of(folder, manifest["tokenizer_sha256"], fix)
    source.start, source.zeros, files = manifest["position"], manifest["zeros"], {}
    source.left_out = dict(manifest["left_out"])
    if (size := manifest["sizes"][SEEN]) and len(hashes := (folder / SEEN).read_bytes()) >= size:
        source.seen = {hashes[i : i + 16] for i in range(0, size, 16)}
    with ExitStack() as stack, tqdm(desc=f"preparing {folder}", unit="B", unit_scale=True, disable=None) as bar:
        for file in manifest["sizes"]:
            files[file] = stack.enter_context(open(folder / file, "ab"))
            files[file].truncate(manifest["sizes"][file])
            files[file].seek(0, os.SEEK_END)
        for pieces, position in batches(source, manifest["side"]):
            for piece, tokens in zip(pieces, tokenizer.encode_batch(piece.text for piece in pieces)):
                out, starts = (files[f"{SPLITS[piece.held_out]}.{what}"] for what in ("tokens", "starts"))
                if piece.begins:
                    starts.write(np.int64(out.tell() // tokens.itemsize).tobytes())
                    tokens = np.insert(tokens, 0, tokenizer.eot)
                out.write(tokens.tobytes())
                bar.update(len(piece.text))
            files[SEEN].write(b"".join(source.new))
            source.new = []
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            sizes = {name: file.tell() for name, file in files.items()}
            manifest |= position | {"sizes": sizes, "zeros": source.zeros, "left_out": source.left_out}
            write_atomically(path, signed(manifest))
    if source.zeros:
        print(f"{folder}: {source.zeros:,} zero bytes (U+0000) were replaced by U+FFFD")
    for name, n in ((name, n) for name, n in source.left_out.items() if n):
        print(f"{folder}: {n:,} documents were left out as {FILTERS[name]} (--{name.replace('_', '-')})")
    sizes, sha256s = (
        {file: of(file) for file in FILES} for of in (manifest["sizes"].get, lambda f: file_sha256(folder / f))
    )
    write_atomically(path, signed(manifest | {"left_out": source.left_out, "sizes": sizes, "sha256s": sha256s}))
    (folder / SEEN).unlink(missing_ok=True)


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

    `parts` are stretches of tokens, each with the places where documents start in it; no row reaches over two. Packed, a
    row is any window, and `slack` tokens of every part are left over, so that all rows can be moved by as many; with
    `reset` it is a piece of one document, and short ones are filled up with targets -100.
    """

    def __init__(self, parts: list[tuple[np.ndarray, np.ndarray]], seq_len: int, reset: bool, slack: int = 0):
        self.parts, self.seq_len, self.reset = parts, seq_len, reset
        self.tokens = sum(len(tokens) for tokens, _ in parts)
        self.ends = [0]  # how many rows there are before every part, and in all
        self.bounds, self.before = (
            [],
            [],
        )  # where a part's documents begin, and how many of its rows there are before each
        for tokens, starts in parts:
            last = len(tokens) - 1
            if reset:
                self.bounds.append(np.concatenate([[0], starts[(starts > 0) & (starts < last)], [last]]))
                of_documents = -(-np.diff(self.bounds[-1]) // seq_len)  # rounded up
                self.before.append(np.concatenate([[0], np.cumsum(of_documents)]))
            rows = int(self.before[-1][-1]) if reset else max(0, (last - slack) // seq_len)
            self.ends.append(self.ends[-1] + rows)

    def __len__(self) -> int:
        return self.ends[-1]

    def row(self, i: int, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets (seq_len,) of row i; packed, `offset` tokens after the beginning of its part."""
        part = int(np.searchsorted(self.ends, i, "right")) - 1
        i -= self.ends[part]
        start = offset + i * self.seq_len
        stop = start + self.seq_len + 1
        if self.reset:
            bounds, before = self.bounds[part], self.before[part]
            document = int(np.searchsorted(before, i, "right")) - 1
            start = int(bounds[document] + (i - before[document]) * self.seq_len)
            stop = min(int(bounds[document + 1]), start + self.seq_len) + 1
        tokens = self.parts[part][0][start:stop].astype(np.int64)
        missing = (0, self.seq_len + 1 - len(tokens))
        return np.pad(tokens[:-1], missing), np.pad(tokens[1:], missing, constant_values=-100)


def stacked(rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    x, y = (torch.from_numpy(np.stack(z)) for z in zip(*rows))
    return x, y


class Corpus:
    """Tokens to train on and tokens held out, and which of them every step reads."""

    unit = "byte"  # what bits are counted by
    task: tasks.Task | None = None

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, parts: dict[str, list], name: str, sha256: str):
        self.config, self.tokenizer, self.name, self.sha256 = config, tokenizer, name, sha256
        self.vocab_size = tokenizer.vocab_size
        seq_len, reset = config.seq_len, config.reset_at_documents
        # An epoch starts at an offset of its own, below seq_len.
        self.training = Rows(parts["train"], seq_len, reset, slack=seq_len - 1)
        self.held_out = Rows(parts["held_out"], seq_len, reset)
        for rows, what in ((self.training, "training"), (self.held_out, "held-out")):
            if not len(rows):
                few = f"its {what} part has {rows.tokens} tokens, too few for --seq-len {seq_len}"
                raise UserError(f"--data {config.data}: {few}; give more text or a shorter --seq-len")
        self._count_bytes()

    def _count_bytes(self) -> None:
        scored = self.validation()[1].numpy()
        scored = scored[scored >= 0]
        # Exact on what is scored, so that bits per byte compare between tokenizers.
        self.tokens_per_byte = len(scored) / self.tokenizer.lengths[scored].sum()
        self.bits = self.tokens_per_byte / math.log(2)  # of nats per token, in bits per byte

    @classmethod
    def open(cls, config: TrainConfig) -> Corpus:
        """The corpus of a run, prepared if it is not yet. UserError for data that cannot be had or was damaged.

        Documents are held out whole, by a hash of their text. Where there are so few that chance would decide how much
        that is, it is the end of the text instead, be it in the middle of a document.
        """
        if task_of(config.data):
            return TaskCorpus(config)
        if shares := shares_of(config.data):
            return Mixture(config, shares)
        folder, manifest, tokenizer = prepare(config)
        arrays = {}
        for file, size in manifest["sizes"].items():
            kind = np.int64 if file.endswith("starts") else tokenizer.dtype
            arrays[file] = np.memmap(folder / file, kind, "r") if size else np.empty(0, kind)
        parts = {split: [(arrays[f"{split}.tokens"], arrays[f"{split}.starts"])] for split in SPLITS}
        documents = sum(len(starts) for [(_, starts)] in parts.values())
        if not documents:
            raise UserError(f"--data {config.data}: there is no text in it; give some")
        if manifest["held_out"] and documents * manifest["held_out"] < 10:
            whole = parts["train"] + parts["held_out"]
            total = sum(len(tokens) for tokens, _ in whole)
            left, parts = total - int(total * manifest["held_out"]), {split: [] for split in SPLITS}
            for tokens, starts in whole:
                cut = min(left, len(tokens))
                left, n = left - cut, np.searchsorted(starts, cut)
                parts["train"].append((tokens[:cut], starts[:n]))
                parts["held_out"].append((tokens[cut:], starts[n:] - cut))
        parts = {split: [part for part in found if len(part[0])] for split, found in parts.items()}
        sha256 = fingerprint([manifest["sha256s"], manifest["held_out"], tokenizer.sha256])
        return cls(config, tokenizer, parts, str(folder), sha256)

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        """Tokens and targets (len(rows), seq_len) of these rows of the batch of `batch_size` rows that a step reads.

        A pure function of (seed, step, row): it is the same for any number of ranks and any micro-batches, of which
        each takes rows of its own. An epoch visits every row of the corpus once, in an order of its own.
        """
        first = 0 if self.config.overfit_one_batch else step * self.config.batch_size
        return stacked(self.row(first + row) for row in rows)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The i-th row that training reads."""
        n = len(self.training)
        epoch = scramble(self.config.seed, i // n)
        return self.training.row(shuffled(i % n, n, epoch), epoch % self.config.seq_len)

    def validation(self, most: int = 40) -> tuple[Tensor, Tensor]:
        """At most `most` rows of held-out text, evenly spread: tokens and targets (n, t)."""
        n = len(self.held_out)
        return stacked(self.held_out.row(i) for i in range(0, n, math.ceil(n / most)))

    def __str__(self) -> str:
        tokens = f"{self.training.tokens:,} tokens to train on, {self.held_out.tokens:,} held out ({self.name})"
        return f"{tokens}, {self.tokenizer.vocab_size:,} kinds of tokens, {1 / self.tokens_per_byte:.2f} bytes each"


def shares_of(data: str) -> dict[str, Fraction]:
    """The sources that --data NAME@SHARE,NAME@SHARE,... names, largest share first; none if it mixes nothing."""
    if "@" not in data or os.path.exists(data):
        return {}
    parts = {part: re.fullmatch(r"(.+)@([-+\d./e]+)", part) for part in data.split(",")}
    if not any(parts.values()):
        return {}
    allowed = "give every source a share, together 1, as in fineweb-edu@0.8,pg19@0.2"
    if bare := [part for part, match in parts.items() if not match]:
        raise UserError(f"--data {data}: {bare[0]} has no share; {allowed}")
    with explained(f"--data {data}: a share is no number", allowed, ValueError, ZeroDivisionError):
        shares = {match[1]: Fraction(match[2]) for match in parts.values()}
    if min(shares.values()) <= 0 or sum(shares.values()) != 1 or len(shares) < data.count(",") + 1:
        given = " + ".join(f"{float(share):g}" for share in shares.values())
        twice = "a source is named twice" if len(shares) < data.count(",") + 1 else f"the shares are {given}"
        raise UserError(f"--data {data}: {twice}; {allowed}")
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def place_in_mixture(i: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """Which source the i-th row is of, and the how many-th of that source.

    Of any first n rows, the first source has its share of n, rounded down; what is left is shared among the others in
    the same way. So two sources never are a row from their shares, and more of them less than two.
    """
    left = sum(shares)
    for source, share in enumerate(shares):
        before, after = (n * share // left for n in (i, i + 1))
        if after > before:
            return source, before
        i, left = i - before, left - share
    raise ValueError("shares are positive")


class Mixture(Corpus):
    """Rows of several corpora by their shares, each in an order of its own.

    Rows are equally long, so that tokens are shared as rows are; not where documents are apart and short ones filled up.
    """

    def __init__(self, config: TrainConfig, shares: dict[str, Fraction]):
        self.config, self.shares, self.sources = config, list(shares.values()), []
        tokenizer = config.tokenizer
        for name in shares:
            prepared = (Path(name) / "manifest.json").is_file()
            self.sources.append(Corpus.open(replace(config, data=name, tokenizer="" if prepared else tokenizer)))
            folder = Path(self.sources[0].name)
            if prepared or config.tokenizer_name.startswith("train:"):  # what the first has learnt serves all
                tokenizer = tokenizer_in(folder)
        self.tokenizer = self.sources[0].tokenizer
        if len({source.tokenizer.sha256 for source in self.sources}) > 1:
            raise UserError(
                f"--data {config.data}: these were prepared with different tokenizers; prepare them with one"
            )
        self.name, self.vocab_size = ", ".join(source.name for source in self.sources), self.tokenizer.vocab_size
        self.sha256 = fingerprint([[source.sha256, str(share)] for source, share in zip(self.sources, self.shares)])
        self.held_out = Rows(
            [part for source in self.sources for part in source.held_out.parts],
            config.seq_len,
            config.reset_at_documents,
        )
        self._count_bytes()

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        source, of_source = place_in_mixture(i, self.shares)
        return self.sources[source].row(of_source)

    def validation(self, most: int = 40) -> tuple[Tensor, Tensor]:
        """At most about `most` rows of held-out text, of every source by its share, but one at least."""
        of_each = (source.validation(max(1, round(most * share))) for source, share in zip(self.sources, self.shares))
        return tuple(map(torch.cat, zip(*of_each)))

    def __str__(self) -> str:
        return "\n".join(
            f"{float(share):.3g} of the rows: {source}" for source, share in zip(self.sources, self.shares)
        )


def task_of(data: str) -> tasks.Task | None:
    """The task that --data task:NAME,OPTION=VALUE,... names. ValueError for one that there is not."""
    return tasks.make(data[5:]) if data.startswith("task:") else None


class TaskCorpus(Corpus):
    """The rows of a task: there is no text, no tokenizer and nothing to prepare."""

    unit, bits, tokenizer = "answer", 1 / math.log(2), None

    def __init__(self, config: TrainConfig):
        self.config, self.task = config, task_of(config.data)
        self.vocab_size, self.sha256 = self.task.vocab_size, fingerprint(self.task.spec)

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        first = 0 if self.config.overfit_one_batch else step * self.config.batch_size
        return self.task.rows("train", self.config.seed, first + rows.start, len(rows))

    @cached_property
    def selection(self) -> tuple[Tensor, Tensor]:
        return self.task.rows("selection", 0, 0, max(4, min(128, 2**18 // self.task.length)))

    def validation(self, most: int = 128) -> tuple[Tensor, Tensor]:
        """At most `most` rows for selection, the same for every seed."""
        return self.selection[0][:most], self.selection[1][:most]

    def __str__(self) -> str:
        return f"task {self.task.spec}: rows of {self.task.length} tokens, {self.vocab_size:,} kinds of tokens"
