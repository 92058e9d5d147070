"""Measure a model: the paper's tables, and what it is worth that the model learns from what it reads.

    python evaluation.py runs/60m --tasks paper                  Table 2, with the paper's rows below (needs ".[eval]")
    python evaluation.py runs/mqar --tasks mqar,pairs=16         a task of tasks.py, here harder than in training
    python evaluation.py runs/tiny --tasks position continual    perplexity against position; class after class
    python evaluation.py runs/tiny --checkpoints 50 100 200      the same model at other times: what was forgotten
    python evaluation.py gpt2 --cms 64 --tasks lambada_openai    a pre-trained model, its MLPs as a CMS

Every figure comes twice: with the continuum memory system (CMS) read as it stands, and with what it learns from the
text or the prompt in front of it (`--memorize`). In this file, in this order:

    Options            every setting; each field is a flag
    Subject            what is measured: a run, one of its checkpoints, an export, a pre-trained model
    Reader             reads tokens with or without learning, and answers: likelihoods, continuations
    Results            RUN/evaluation.jsonl, and what an interrupted evaluation has found so far
    run_harness        tasks of lm-evaluation-harness
    run_task           tasks of tasks.py
    run_position       perplexity against position and length
    run_continual      one group of classes after the other
    table, plot        in the paper's layout
    main               the command line
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hope
import report
import tasks
import train
from data import Corpus, Source, UserError, explained, extra, fingerprint, reason
from hope import INF, Hope, HopeState, check_settings, setting
from train import TrainConfig

# ---- Settings ----

# Groups of tasks; what is no task of ours is the harness's.
NEEDLES = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery")
GROUPS = {
    "paper": ["wikitext", "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "social_iqa",
              "boolq", "commonsense_qa", "openbookqa"],
    "recall": ["swde", "fda", "squad_completion", "nq_open", "triviaqa", "drop"],
    "ruler": [f"niah_{name}" for name in NEEDLES],
    "babilong": [f"babilong_qa{i}" for i in range(1, 21)],
    "mad": ["compression", "in-context-recall", "fuzzy-recall", "selective-copying", "memorisation", "noisy-recall"],
    "formal": ["parity", "aa", "abab", "anbn", "anbncn", "shuffle-2"],
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    tasks: tuple[str, ...] = setting(
        ("position",),
        f"groups: {', '.join(GROUPS)}; position or continual, with options as in position,text=FILE,length=4096; a task of "
        "tasks.py, as in mqar,pairs=8 (task:recall for the one that is called like a group); any task of "
        "lm-evaluation-harness",
    )
    memorize: Literal["both", "on", "off"] = setting(
        "both", "whether the CMS learns from what it reads; both: two columns"
    )
    memorize_levels: tuple[int, ...] = setting(
        (), "levels of the CMS that learn, by their place in its chunks; default: all"
    )
    memorize_surprise: float = setting(0.0, "only segments of more nats per token than this teach", least=0, below=INF)
    memorize_steps: int = setting(
        1, "how often a prompt is read; between two times only the CMS keeps what it has learnt", least=1
    )
    memorize_answer: bool = setting(False, "ablation: learn from answers too, each after it has been scored")
    memorize_keep: bool = setting(False, "keep what the CMS has learnt from one sample to the next, in their order")
    limit: int = setting(0, "samples of a task; 0: all, 256 of tasks.py, 16 windows of a text", least=0)
    seeds: tuple[int, ...] = setting(
        (0,), "of the rows of tasks.py, of the order of classes, and of few-shot examples", least=0
    )
    fewshot: int = setting(-1, "examples in front of a question of the harness; -1: as the task says", least=-1)
    lengths: tuple[int, ...] = setting(
        (), "tokens of the contexts of ruler and babilong; default: 4096, and no filler", least=0
    )
    include_path: str = setting("", "folder with harness tasks of your own, as YAML")
    batch_size: int = setting(16, "sequences at once", least=1)
    context: int = setting(
        0, "tokens that the memories see at once, longer text in windows; 0: with attention to everything the length of "
        "training, else no limit", least=0,
    )  # fmt: skip
    checkpoints: tuple[str, ...] = setting(
        (), "measure at these steps of the run, or these runs, as well; shows what was forgotten"
    )
    cms: tuple[float, ...] = setting(
        (64.0,), "pre-trained models: chunk sizes of the CMS that is made of their MLPs", least=1
    )
    cms_rate: tuple[float, ...] = setting((0.01,), "pre-trained models: its inner step sizes", least=0)
    gguf_file: str = setting("", "pre-trained models: a file of the folder in this format")
    fine_tune_lr: float = setting(1e-3, "continual: learning rate of fine-tuning (AdamW)", above=0)
    ewc: float = setting(100.0, "continual: weight of elastic weight consolidation's penalty", least=0)
    plot: bool = setting(False, "draw evaluation-*.png beside the results")
    out: str = setting("", "where results are kept; default: in RUN")
    anew: bool = setting(False, "measure again what has been measured")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Memorize:
    """How the CMS learns from what is read. The memories of the blocks are always written."""

    levels: tuple[int, ...]
    surprise: float
    steps: int
    answer: bool
    keep: bool

    @staticmethod
    def of(options: Options, model: Hope) -> list[Memorize | None]:
        """The columns that are asked for; None reads only."""
        able = model.config.written
        unable = set(options.memorize_levels) - set(able)
        if unable or options.memorize == "on" and not able:
            given = f"--memorize-levels {','.join(map(str, unable))}" if unable else "--memorize on"
            has = (
                f"its levels {', '.join(map(str, able))} do" if able else "none of its levels does: use --memorize off"
            )
            raise UserError(f"{given}: the CMS of this model does not learn that in context; {has}")
        o = options
        levels = o.memorize_levels or tuple(able)
        on = [Memorize(levels, o.memorize_surprise, o.memorize_steps, o.memorize_answer, o.memorize_keep)] * bool(able)
        return {"off": [None], "on": on, "both": [None, *on]}[options.memorize]


# ---- What is measured ----


class HubTokenizer:
    """The tokenizer of a pre-trained model, with the interface of train.py's."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.eot = tokenizer, tokenizer.eos_token_id
        begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] != [None]
        self.start = [tokenizer.bos_token_id] if begins else []

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False).input_ids, np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


@dataclass
class Subject:
    """A model with its tokenizer, the settings it was trained with, and what identifies it."""

    model: Hope
    tokenizer: Any
    config: TrainConfig
    about: dict[str, Any]
    folder: Path  # of the results
    tokenizer_folder: str
    start: list[int]  # what stands in front of every document

    @classmethod
    def load(cls, path: str, options: Options) -> Subject:
        """A run, one of its checkpoints, an export, or a pre-trained model by its folder or name."""
        folder, device = Path(path), train.pick_device(options.device)
        if (
            (folder / "checkpoints").is_dir()
            or folder.parent.name == "checkpoints"
            or (folder / "model.safetensors").exists()
            and "train" in json.loads((folder / "config.json").read_text())
        ):
            config, model, tokenizer, about = train.trained(folder, options.device)
            home = folder.parents[1] if folder.parent.name == "checkpoints" else folder
            about = {
                "name": f"{config.arch} {config.size}",
                "arch": config.arch,
                "data": config.data,
                "step": about.get("step"),
            }
            start, tokenizer_folder = [tokenizer.eot], str(home)
        else:
            about = "give a run or an export of train.py, or the name or folder of a pre-trained model"
            with explained(f"{path} cannot be loaded", about, Exception):
                named = {"gguf_file": options.gguf_file} if options.gguf_file else {}
                model = hope.from_pretrained(path, cms=options.cms, cms_rate=options.cms_rate, **named).to(device)
                import transformers

                tokenizer = HubTokenizer(transformers.AutoTokenizer.from_pretrained(path, **named))
            config = TrainConfig(arch="hope-attention", seq_len=model.config.n_position or 2048)
            about = {"name": folder.name, "arch": "hope-attention", "data": "", "step": None}
            home = folder if folder.is_dir() else Path("runs", path.replace("/", "--"))
            start, tokenizer_folder = tokenizer.start, path
        about["parameters"] = sum(p.numel() for p in model.parameters())
        about["cms"] = [str(c) for c in model.config.cms]
        about["weights"] = fingerprint([p.double().sum().item() for p in model.parameters()])[:16]
        return cls(model.eval(), tokenizer, config, about, Path(options.out or home), tokenizer_folder, start)

    @property
    def context(self) -> int:
        """How many tokens its memories were made for; 0 for any number."""
        layers = [self.model.config.layer(i) for i in range(self.model.config.n_layer)]
        endless = any(layer.depth == 0 and not layer.window for layer in layers)
        return self.model.config.n_position or (self.config.seq_len if endless else 0)


# ---- Reading ----

Pair = tuple[Sequence[int], Sequence[int]]  # a context and what may follow it
Answer = tuple[float, bool]  # log-likelihood in nats, and whether every token of it is the likeliest


class Reader:
    """A model that reads, learns from it or not, and answers. Sequences that are read together share nothing."""

    def __init__(self, subject: Subject, memorize: Memorize | None, context: int, batch_size: int):
        self.model, self.tokenizer, self.memorize = subject.model, subject.tokenizer, memorize
        self.device = self.model.embed.weight.device
        self.context, self.batch_size, self.piece = context, batch_size, 1024
        self.kept: HopeState | None = None  # with memorize.keep, what was learnt from the samples so far
        self.tokens, self.seconds = 0, 0.0  # read, and in how long

    def batches(self, keys: Sequence[Any]) -> Iterator[list[int]]:
        """Places of samples that have the same key, so many at once; one by one where each learns from the last."""
        groups: dict[Any, list[int]] = {}
        for i, key in enumerate(keys):
            groups.setdefault(i if self.keeps else key, []).append(i)
        for _, group in sorted(groups.items()):
            yield from (group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size))

    @property
    def keeps(self) -> bool:
        return self.memorize is not None and self.memorize.keep

    def tensor(self, rows: Iterable[Sequence[int]]) -> Tensor:
        return torch.tensor(np.array([*rows]), dtype=torch.long, device=self.device)

    def timed(self, call: Callable[[], Any], tokens: int) -> Any:
        begun = time.perf_counter()
        result = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds, self.tokens = self.seconds + time.perf_counter() - begun, self.tokens + tokens
        return result

    def begin(self, b: int) -> HopeState:
        """The state in front of a sample."""
        return self.model.init_state(b) if self.kept is None else self.anew(self.kept)

    def anew(self, state: HopeState) -> HopeState:
        """Memories as before the first token; only the CMS keeps what it has learnt."""
        return self.model.restart(state, **self.lesson)

    @property
    def lesson(self) -> dict[str, Any]:
        m = self.memorize
        return {"levels": m.levels, "surprise": m.surprise} if m else {}

    def pieces(self, tokens: Tensor, targets: Tensor | None, state: HopeState) -> Iterator[tuple[Tensor, HopeState]]:
        """Read tokens (b, t); of each piece the logits (b, p, vocab), and the state after it.

        With targets (b, t) the CMS learns. Where the memories have seen `context` tokens they begin anew.
        """
        edges = [self.piece, *([self.context] if self.context else [])]
        lengths = hope.piece_lengths(state.memories[0].t, tokens.shape[1], edges)
        for x, y in zip(tokens.split(lengths, 1), (tokens if targets is None else targets).split(lengths, 1)):
            if self.context and state.memories[0].t >= self.context:
                state = self.anew(state)
            if targets is None:
                state = replace(state, segment=None)  # of an open chunk, which nothing ends any more
                logits, state = self.timed(lambda: self.model(x, state), x.numel())
            else:
                learn = lambda: self.model.observe(x, y, state, logits=True, **self.lesson)
                _, state, logits = self.timed(learn, x.numel())
            yield logits, state

    def read(self, tokens: Tensor, targets: Tensor | None, state: HopeState) -> tuple[Tensor, HopeState]:
        """All logits (b, t, vocab) at once, and the state after the last token."""
        logits = []
        for piece, state in self.pieces(tokens, targets, state):
            logits.append(piece)
        return torch.cat(logits, 1), state

    def prompt(self, tokens: Tensor, room: int) -> HopeState:
        """The state after prompts (b, t), the last token left out, which the answer begins with.

        With a limited context, memories see what leaves `room` for the answer; of the rest only the CMS can learn.
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        t = inputs.shape[1]
        cut = max(0, t - max(1, self.context - room)) if self.context else 0
        lengths = [
            n for n in (cut % max(1, self.context), *[self.context] * (cut // max(1, self.context)), t - cut) if n
        ]
        windows = [*zip(inputs.split(lengths, 1), targets.split(lengths, 1))] if lengths else []
        state = self.begin(len(tokens))
        for _ in range(self.memorize.steps if self.memorize else 1):
            for x, y in windows if self.memorize else windows[-1:]:
                if state.memories[0].t:
                    state = self.anew(state)
                for _, state in self.pieces(x, y if self.memorize else None, state):
                    pass
        return state

    def keep(self, state: HopeState) -> None:
        self.kept = state if self.keeps else None

    def loglikelihoods(self, pairs: Sequence[Pair], start: HopeState | None = None) -> Iterator[tuple[int, Answer]]:
        """How likely continuations are after their contexts, by place in `pairs`. A context is read once.

        start: state of one sequence that has read something else before; contexts are then only read.
        """
        choices: dict[tuple[int, ...], list[int]] = {}
        for i, (context, _) in enumerate(pairs):
            choices.setdefault(tuple(context), []).append(i)
        contexts = [*choices]
        room = [max(len(pairs[i][1]) for i in choices[context]) for context in contexts]
        for batch in self.batches([(len(context), n) for context, n in zip(contexts, room)]):
            tokens = self.tensor(contexts[j] for j in batch)
            if start is None:
                state = self.prompt(tokens, room[batch[0]])
            else:
                state = start.select([0] * len(batch))
                if tokens.shape[1] > 1:
                    _, state = self.read(tokens[:, :-1], None, state)
            asked = [(row, i) for row, j in enumerate(batch) for i in choices[contexts[j]]]
            last = state
            for some in self.batches([len(pairs[i][1]) for _, i in asked]):
                rows, places = zip(*(asked[k] for k in some))
                if not len(pairs[places[0]][1]):
                    yield from ((i, (0.0, True)) for i in places)
                    continue
                answers = self.tensor(pairs[i][1] for i in places)
                inputs = torch.cat([tokens[[*rows], -1:], answers[:, :-1]], 1)
                learns = answers if self.memorize and self.memorize.answer and start is None else None
                logits, last = self.read(inputs, learns, state.select([*rows]))
                likelihood = -hope.token_loss(logits, answers).sum(1)
                greedy = (logits.argmax(-1) == answers).all(1)
                yield from zip(places, zip(likelihood.tolist(), greedy.tolist()))
            # Which of several answers is right is not known here, so that none of them is kept.
            self.keep(last if len(asked) == 1 and self.memorize and self.memorize.answer else state)

    def losses(self, rows: Sequence[Pair]) -> Iterator[tuple[int, Tensor]]:
        """Nats of each token of texts, given as tokens and targets, by place in `rows`; every token is predicted first,
        and then learnt from."""
        # Padded behind to the longest, by a tenth at most; what follows a token changes nothing about it.
        for batch in self.batches([math.ceil(10 * math.log(len(x))) for x, _ in rows]):
            longest = max(len(rows[i][0]) for i in batch)
            pad = lambda z, filler: np.pad(z, (0, longest - len(z)), constant_values=filler)
            tokens = self.tensor(pad(rows[i][0], 0) for i in batch)
            targets = self.tensor(pad(rows[i][1], -100) for i in batch)
            state, found = self.begin(len(batch)), []
            for logits, state in self.pieces(tokens, targets if self.memorize else None, state):
                done = sum(z.shape[1] for z in found)
                found.append(hope.token_loss(logits, targets[:, done : done + logits.shape[1]]).cpu())
            self.keep(state)
            yield from ((i, row[: len(rows[i][0])]) for i, row in zip(batch, torch.cat(found, 1)))

    def answers(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The likeliest token at every place of rows (b, t), for tasks in which some tokens are asked for.

        The CMS learns to predict the row itself; only with `memorize.answer` what is asked for. Passes before the last
        go up to the first question.
        """
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        learns, state = None, self.begin(len(tokens))
        if self.memorize:
            learns = targets if self.memorize.answer else tokens.roll(-1, 1)
            if not self.memorize.answer:
                learns[:, -1] = -100
            first = int((targets != -100).any(0).nonzero()[0]) + 1
            for _ in range(self.memorize.steps - 1):
                for _, state in self.pieces(tokens[:, :first], learns[:, :first], state):
                    pass
                state = self.anew(state)
        found = []
        for logits, state in self.pieces(tokens, learns, state):
            found.append(logits.argmax(-1))
        self.keep(state)
        return torch.cat(found, 1).cpu()

    def continuations(
        self, prompts: Sequence[Sequence[int]], until: Sequence[str], most: int, temperature: float = 0.0
    ) -> Iterator[tuple[int, str]]:
        """What the model says after prompts, up to one of the texts `until`, the document's end or `most` tokens."""
        answer = bool(self.memorize and self.memorize.answer)
        how = {"memorize": [*self.memorize.levels] if answer else False, "learn_own": answer}
        if answer:
            how["surprise"] = self.memorize.surprise
        for batch in self.batches([len(prompt) for prompt in prompts]):
            tokens = self.tensor(prompts[i] for i in batch)
            state = self.prompt(tokens, min(most, self.context // 2))
            said, texts, done = [[] for _ in batch], [""] * len(batch), [False] * len(batch)
            stream, after = (
                self.model.stream(tokens[:, -1:], temperature, state=state, stop=[self.tokenizer.eot], **how),
                state,
            )
            for _ in range(most):
                full = self.context and after.memories[0].t >= self.context
                if full or all(done) or not (found := self.timed(lambda: next(stream, None), len(batch))):
                    break
                new, after = found
                for row, token in enumerate(new[:, 0].tolist()):
                    if not done[row]:
                        said[row] += [token] * (token != self.tokenizer.eot)
                        texts[row] = self.tokenizer.decode(said[row])
                        done[row] = token == self.tokenizer.eot or any(end in texts[row] for end in until)
            self.keep(after if answer else state)
            for i, text in zip(batch, texts):
                yield i, re.split("|".join(map(re.escape, until)), text, maxsplit=1)[0] if until else text


# ---- Results ----


class Figure(NamedTuple):
    """One number that was measured."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int  # samples it is the mean of
    curve: list[float] | None = None


def lines_of(path: Path) -> list[dict]:
    """Rows of a jsonl file, without a last one that was cut off."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            pass
    return rows


class Results:
    """RUN/evaluation.jsonl, a row for every figure; beside it, until a command is done, the answers it has so far."""

    def __init__(self, folder: Path):
        with explained(f"{folder} cannot be written", "give another folder by --out", OSError):
            folder.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = folder / "evaluation.jsonl", folder / "evaluation.partial.jsonl"
        self.rows = lines_of(self.path)
        self.found = {row["key"]: row["answer"] for row in lines_of(self.partial)}

    def of(self, key: str) -> list[dict]:
        return [row for row in self.rows if row["key"] == key]

    def add(self, key: str, rows: list[dict]) -> None:
        rows = [{"key": key} | row for row in rows]
        self.rows = [row for row in self.rows if row["key"] != key] + rows
        with open(self.path, "a") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))

    def ask(self, scope: str, items: Sequence[Any], compute: Callable, title: str, afresh: bool = False) -> list[Any]:
        """Answers to items, which name themselves as JSON.

        `compute` takes the places of those that have none yet, and yields for each its place among them and its answer.
        afresh: of all of them, since each changes the next.
        """
        keys = [fingerprint([scope, item]) for item in items]
        left = [i for i, key in enumerate(keys) if afresh or key not in self.found]
        # A line that a killed process has begun ends here.
        with tqdm(total=len(items), initial=len(items) - len(left), desc=title, disable=None) as bar:
            with open(self.partial, "a") as f:
                f.write("\n")
                for place, answer in compute(left):
                    self.found[keys[left[place]]] = answer
                    f.write(json.dumps({"key": keys[left[place]], "answer": answer}) + "\n")
                    f.flush()
                    bar.update()
        return [self.found[key] for key in keys]


Ask = Callable[[Sequence[Any], Callable], list[Any]]  # `Results.ask` for one task


def spread(values: Sequence[float]) -> float | None:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def settings_of(spec: str, **defaults: Any) -> dict[str, Any]:
    """What a text such as position,length=512 sets."""
    name, *given = spec.split(",")
    found = dict(defaults)
    for part in given:
        option, _, text = part.partition("=")
        if option not in defaults:
            raise UserError(f"{spec}: {part!r} is no option; {name} has: {', '.join(defaults)}")
        try:
            found[option] = type(defaults[option])(text)
        except ValueError:
            raise UserError(f"{spec}: {option} is {text!r}; give a whole number") from None
    return found


# ---- lm-evaluation-harness ----


def harness_model(reader: Reader, start: list[int], ask: Ask) -> Any:
    """A model as the harness wants it: texts to tokens and back, all else is the reader's."""
    from lm_eval.api.model import TemplateLM

    tokenizer = reader.tokenizer

    class HarnessModel(TemplateLM):
        eot_token_id = tokenizer.eot
        prefix_token_id = start[0] if start else tokenizer.eot

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return tokenizer.encode(string).tolist()

        def _context(self, tokens: list[int]) -> list[int]:
            return tokens if tokens[:1] == start else start + tokens

        def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False) -> list[Answer]:
            pairs = [(self._context(context), continuation) for _, context, continuation in requests]
            items = [["loglikelihood", *pair] for pair in pairs]
            return [tuple(a) for a in ask(items, lambda left: reader.loglikelihoods([pairs[i] for i in left]))]

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            texts = [self.tok_encode(request.args[0]) for request in requests]
            rows = [([self.prefix_token_id, *text][:-1], text) for text in texts]

            def compute(left: list[int]) -> Iterator[tuple[int, float]]:
                for i, losses in reader.losses([rows[i] for i in left]):
                    yield i, -losses.double().sum().item()

            return ask([["rolling", text] for text in texts], compute)

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            items = []
            for i, request in enumerate(requests):
                text, how = request.args
                until = [how["until"]] if isinstance(how.get("until"), str) else how.get("until") or []
                temperature = how.get("temperature", 1.0) if how.get("do_sample") else 0.0
                settings = [[u for u in until if u], how.get("max_gen_toks", 256), temperature]
                items.append(["generate", self._context(self.tok_encode(text)), settings])

            def compute(left: list[int]) -> Iterator[tuple[int, str]]:
                kinds: dict[str, list[int]] = {}
                for place, i in enumerate(left):
                    kinds.setdefault(json.dumps(items[i][2]), []).append(place)
                for kind, places in kinds.items():
                    for i, text in reader.continuations([items[left[p]][1] for p in places], *json.loads(kind)):
                        yield places[i], text

            return ask(items, compute)

    return HarnessModel()


def run_harness(spec: str, subject: Subject, reader: Reader, options: Options, ask: Ask) -> list[Figure]:
    """A task or group of the harness; babilong_qa1@4k with contexts of that length."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        install = 'pip install "nested-learning-hope[eval]"'
        raise UserError(f"{spec} is a task of lm-evaluation-harness, which is missing; run: {install}") from None
    for name in ("lm_eval", "datasets", "huggingface_hub", "nltk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    name, _, length = spec.partition("@")
    about = {"tokenizer": subject.tokenizer_folder, "max_seq_lengths": length or [*options.lengths] or [4096]}
    manager = None
    for defaults in (False, True) if options.include_path else (True,):
        manager = TaskManager(include_path=options.include_path or None, include_defaults=defaults, metadata=about)
        if name in manager.all_tasks:
            break
    else:
        ours = ", ".join([*GROUPS, "position", "continual", *tasks.TASKS])
        raise UserError(f"no task is called {name!r}; ours are: {ours}; lm-eval ls tasks lists those of the harness")
    try:
        loaded = manager.load([name])
    except Exception as e:
        wants = re.search(r"'([^']+/[^']+)'", str(e))
        what = f"the data set {wants[1]}" if wants else "its data"
        fix = "run this once with a network, after that the copy that `datasets` keeps will do"
        raise UserError(f"{spec} needs {what}, which cannot be loaded ({reason(e)}); {fix}") from e
    top = loaded.get("groups", {}).get(name)
    found = lm_eval.simple_evaluate(
        harness_model(reader, subject.start, ask), tasks=[top] if top else [*loaded["tasks"].values()],
        task_manager=manager, num_fewshot=None if options.fewshot < 0 else options.fewshot,
        limit=options.limit or None, bootstrap_iters=1000, log_samples=False, fewshot_random_seed=options.seeds[0],
    )  # fmt: skip
    figures = []
    for task, values in found["results"].items():
        n = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for metric, value in values.items():
            metric, _, how = metric.partition(",")
            if isinstance(value, (int, float)) and how and not metric.endswith("_stderr") and value != -1:
                error = values.get(f"{metric}_stderr,{how}")
                named = metric if how == "none" else f"{metric} ({how})"
                label = f"{task}@{length}" if length else task
                figures.append(Figure(label, named, value, error if isinstance(error, float) else None, n))
    return figures


# ---- Tasks of tasks.py ----


def run_task(spec: str, subject: Subject, reader: Reader, options: Options, ask: Ask) -> list[Figure]:
    """Test rows of a task. Without options they are those of the run's own training."""
    own = subject.config.data.removeprefix("task:")
    spec = spec.removeprefix("task:")
    task = tasks.make(own if own.split(",")[0] == spec else spec)
    vocabulary = subject.model.config.vocab_size
    if task.vocab_size > vocabulary:
        fix = f"measure a run that was trained on it: python train.py --data task:{spec}"
        raise UserError(f"{spec} has {task.vocab_size} kinds of tokens and this model {vocabulary}; {fix}")
    n = options.limit or 256
    items = [(seed, begin) for seed in options.seeds for begin in range(0, n, 1 if reader.keeps else reader.batch_size)]
    size = items[1][1] if len(items) > 1 and items[1][1] else n

    def compute(left: list[int]) -> Iterator[tuple[int, dict]]:
        for place, i in enumerate(left):
            seed, begin = items[i]
            tokens, targets = task.rows("test", seed, begin, min(size, n - begin))
            yield place, task.counts(reader.answers(tokens, targets), targets)

    counts: dict[str, dict[int, np.ndarray]] = {}
    for (seed, _), answer in zip(items, ask(items, compute)):
        for name, right_of_asked in answer.items():
            by_seed = counts.setdefault(name, {})
            by_seed[seed] = by_seed.get(seed, 0) + np.array(right_of_asked)
    figures = []
    for name, by_seed in counts.items():
        by_seed = [right_of_asked for right_of_asked in by_seed.values() if right_of_asked[1]]
        if by_seed:
            values = [100 * right / asked for right, asked in by_seed]
            right, asked = map(float, sum(by_seed))
            binomial = 100 * (right / asked * (1 - right / asked) / asked) ** 0.5
            figures.append(Figure(spec, name, float(np.mean(values)), spread(values) or binomial, int(asked)))
    return figures


# ---- Perplexity against position ----


def text_tokens(subject: Subject, text: str, field: str, most: int) -> np.ndarray:
    """The first tokens of a text, documents one after the other: what --data takes, or else the run's held-out part."""
    if not text and subject.about["data"] and not subject.about["data"].startswith("task:"):
        return np.concatenate([tokens for tokens, _ in Corpus.open(subject.config).held_out.parts])
    named = {"pg19": "hf:deepmind/pg19"}.get(text, text or "pydoc")
    split = "test" if text == "pg19" else subject.config.data_split
    config = replace(subject.config, data=named, data_config="", data_split=split, text_field=field)
    found, size = [], 0
    for piece in Source(config):
        if piece.held_out is not False:
            start = subject.start if piece.begins else []
            found.append(np.concatenate([start, subject.tokenizer.encode(piece.text)]).astype(np.int64))
            size += len(found[-1])
        if size > most:
            break
    return np.concatenate(found) if found else np.empty(0, np.int64)


def run_position(spec: str, subject: Subject, reader: Reader, options: Options, ask: Ask) -> list[Figure]:
    """Perplexity of the tokens that have so many others in front of them, and of texts of such lengths (Fig. 10)."""
    o = settings_of(spec, text="", length=4 * subject.config.seq_len, field="text")
    length, most = o["length"], options.limit or 16
    tokens = text_tokens(subject, o["text"], o["field"], length * most)
    n = (len(tokens) - 1) // length
    if n < 1:
        raise UserError(f"{spec}: the text has {len(tokens)} tokens, less than one window of length={length}")
    places = [*range(0, n, math.ceil(n / most))]
    windows = [tokens[i * length : (i + 1) * length + 1].astype(np.int64) for i in places]
    edges = [0, *(edge for edge in (64 * 2**i for i in range(30)) if edge < length), length]

    def compute(left: list[int]) -> Iterator[tuple[int, list[float]]]:
        for place, losses in reader.losses([(windows[i][:-1], windows[i][1:]) for i in left]):
            yield place, [losses[a:b].double().mean().item() for a, b in zip(edges, edges[1:])]

    binned = np.array(ask(places, compute))  # (windows, bins) nats
    width = np.diff(edges)
    upto = (binned * width).cumsum(1) / width.cumsum()

    def figure(metric: str, nats: np.ndarray) -> Figure:
        ppl = math.exp(nats.mean())
        return Figure(spec, metric, ppl, ppl * error if (error := spread(nats)) else None, len(nats))

    bins = [figure(f"perplexity at {a}-{b}", binned[:, i]) for i, (a, b) in enumerate(zip(edges, edges[1:]))]
    return bins + [figure(f"perplexity of {b}", upto[:, i]) for i, b in enumerate(edges[1:])]


# ---- Continual learning ----

# Labelled sets of the hub: name, config, and the fields of text and label.
LABELLED = {
    "clinc150": ("clinc/clinc_oos", "plus", "text", "intent"),
    "banking77": ("PolyAI/banking77", None, "text", "label"),
    "dbpedia": ("fancyzhx/dbpedia_14", None, "content", "label"),
}
Labelled = tuple[str, str]  # a text and its label


class Stage(NamedTuple):
    """Classes, or a domain, that the model meets at one time."""

    train: list[Labelled]
    test: list[Labelled]


def labelled(o: dict[str, Any]) -> dict[str, list[Labelled]]:
    """Examples of a set by class or domain."""
    name, found = o["set"], {}
    if name == "synthetic":  # a class is a word; its examples have a quarter of its letters wrong
        rng = np.random.default_rng(0)
        for label in "ABCDEFGH":
            word, wrong = rng.integers(16, size=12), rng.random((200, 12)) < 0.25
            texts = np.where(wrong, rng.integers(16, size=wrong.shape), word) + ord("a")
            found[label] = [("".join(map(chr, text)), label) for text in texts]
        return found
    if name == "digits":
        sets = extra("sklearn.datasets", "set=digits").load_digits()
        for image, label in zip(sets.data.astype(int) // 2, sets.target):
            found.setdefault(str(label), []).append(("".join(chr(ord("a") + level) for level in image), str(label)))
        return found
    if name.endswith((".jsonl", ".json")):
        with explained(f"set={name} cannot be read", "give a file with one JSON object a line"):
            rows, text, label = lines_of(Path(name)) if Path(name).exists() else open(name), o["text"], o["label"]
    else:
        where, config, text, label = LABELLED.get(name, (name, None, o["text"], o["label"]))
        fix = f"give synthetic, digits, {', '.join(LABELLED)}, a jsonl file, or a name of the hub and a network"
        with explained(f"set={name} must be downloaded once, and that failed", fix, Exception):
            rows = extra("datasets", f"set={name}").load_dataset(where, config, split="train")
            names = getattr(rows.features[label], "names", None)
            rows = [row | {label: names[row[label]]} for row in rows] if names else rows
    group = o["domain"] or label
    for row in rows:
        if missing := {text, label, group} - set(row):
            raise UserError(
                f"set={name} has no field {min(missing)}, there are: {', '.join(row)}; name it, as in text=NAME"
            )
        found.setdefault(str(row[group]), []).append((str(row[text]), str(row[label])))
    return found


def make_stages(o: dict[str, Any], seed: int) -> list[Stage]:
    """The stream: so many classes or domains at a time, in an order of this seed."""
    groups, rng = labelled(o), np.random.default_rng(seed)
    order, stages = rng.permutation(sorted(groups)), []
    for i in range(0, len(order), o["classes"]):
        stage = Stage([], [])
        for name in order[i : i + o["classes"]]:
            examples = [groups[name][j] for j in rng.permutation(len(groups[name]))]
            stage.train.extend(examples[: o["shots"]])
            stage.test.extend(examples[o["shots"] : o["shots"] + o["tests"]])
        stages.append(stage._replace(train=[stage.train[j] for j in rng.permutation(len(stage.train))]))
    if len(stages) < 2 or not all(stage.test for stage in stages):
        raise UserError(
            f"set={o['set']} has {len(groups)} classes or domains; two stages need more, or fewer shots={o['shots']}"
        )
    return stages


class Learner:
    """A model that meets the stages of a stream by one of the methods, and is asked for labels in between."""

    def __init__(self, method: str, subject: Subject, options: Options, longest: int):
        levels = int(method[4]) if method.startswith("CMS ") else 0
        memorize = Memorize(tuple(subject.model.config.written[:levels]), 0.0, 1, False, False) if levels else None
        self.method, self.options, self.start = method, options, subject.start
        self.tuned = method in ("fine-tuning", "EWC")
        subject = replace(subject, model=copy.deepcopy(subject.model)) if self.tuned else subject
        context = options.context or subject.context
        self.reader = Reader(subject, memorize, max(1, context - longest) if context else 0, options.batch_size)
        self.asked = Reader(subject, None, 0, options.batch_size)
        self.model, self.encode = subject.model, lambda text: subject.tokenizer.encode(text).tolist()
        self.state = None if self.tuned else self.model.init_state(1)
        self.anchors: list[tuple[list[Tensor], list[Tensor]]] = []  # EWC: weights after a stage, and their Fisher
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.fine_tune_lr, weight_decay=0.0)

    def prompt(self, text: str) -> list[int]:
        return [*self.start, *self.encode(f"{text} =")]

    def label(self, label: str) -> list[int]:
        return self.encode(f" {label}\n")

    def meet(self, examples: list[Labelled]) -> None:
        """Read or learn the examples, in their order, `memorize_steps` times."""
        for _ in range(self.options.memorize_steps):
            if self.tuned:
                for i in range(0, len(examples), 8):
                    self.step(examples[i : i + 8])
                continue
            stream = [token for text, label in examples for token in self.prompt(text) + self.label(label)]
            tokens = self.reader.tensor([stream])
            targets = tokens.roll(-1, 1).index_fill(1, tokens.new_tensor([tokens.shape[1] - 1]), -100)
            for _, self.state in self.reader.pieces(tokens, targets if self.reader.memorize else None, self.state):
                pass
        if self.method == "EWC":
            self.anchor(examples)

    def loss(self, examples: list[Labelled]) -> Tensor:
        """Nats a label token."""
        losses = []
        for text, label in examples:
            prompt, answer = self.prompt(text), self.label(label)
            tokens = self.reader.tensor([prompt + answer])
            logits, _ = self.model(tokens[:, :-1])
            losses.append(hope.token_loss(logits[:, len(prompt) - 1 :], tokens[:, len(prompt) :])[0])
        return torch.cat(losses).mean()

    @torch.enable_grad()
    def step(self, examples: list[Labelled]) -> None:
        loss = self.loss(examples)
        for weights, fisher in self.anchors:
            apart = (f * (p - w) ** 2 for p, w, f in zip(self.model.parameters(), weights, fisher))
            loss = loss + self.options.ewc / 2 * sum(z.sum() for z in apart)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    @torch.enable_grad()
    def anchor(self, examples: list[Labelled]) -> None:
        """Remember the weights, and how much each of them matters for a stage: the mean square of its gradients."""
        fisher = [torch.zeros_like(p) for p in self.model.parameters()]
        for example in examples:
            gradients = torch.autograd.grad(self.loss([example]), [*self.model.parameters()], allow_unused=True)
            for f, g in zip(fisher, gradients):
                f += 0 if g is None else g**2 / len(examples)
        self.anchors.append(([p.detach().clone() for p in self.model.parameters()], fisher))

    def accuracy(self, examples: list[Labelled], labels: list[str]) -> float:
        """Percent of examples whose likeliest label, of those met so far, is theirs."""
        pairs = [(self.prompt(text), self.label(label)) for text, _ in examples for label in labels]
        scores = torch.zeros(len(pairs))
        for i, (likelihood, _) in self.asked.loglikelihoods(pairs, self.state):
            scores[i] = likelihood
        best = scores.view(len(examples), len(labels)).argmax(1).tolist()
        return 100 * float(np.mean([labels[j] == label for j, (_, label) in zip(best, examples)]))


def run_continual(spec: str, subject: Subject, reader: Reader, options: Options, ask: Ask) -> list[Figure]:
    """Stage after stage: accuracy on all stages met so far, and how much of the best there was has been lost (Fig. 6).

    "in context" carries the memories only, "CMS k levels" also what the first k levels of the CMS learn; both read on
    from stage to stage. Fine-tuning and EWC change the weights and are asked without context.
    """
    o = settings_of(spec, set="synthetic", classes=2, shots=16, tests=16, text="text", label="label", domain="")
    methods = ["in context", *(f"CMS {k + 1} levels" for k in range(len(subject.model.config.written)))]
    items = [(seed, method) for seed in options.seeds for method in [*methods, "fine-tuning", "EWC"]]

    def compute(left: list[int]) -> Iterator[tuple[int, list]]:
        for place, i in enumerate(left):
            seed, method = items[i]
            torch.manual_seed(seed)
            stages, labels, rows = make_stages(o, seed), [], []
            encode = lambda text: len(subject.tokenizer.encode(text))
            longest = max(encode(f"{text} = {label}\n") + 2 for stage in stages for text, label in stage.test)
            learner = Learner(method, subject, options, longest)
            for k, stage in enumerate(stages):
                learner.meet(stage.train)
                labels = sorted({*labels, *(label for _, label in stage.train)})
                rows.append([learner.accuracy(met.test, labels) for met in stages[: k + 1]])
            yield place, rows

    figures, by_method = [], {}
    for (_, method), rows in zip(items, ask(items, compute)):
        so_far = [float(np.mean(row)) for row in rows]
        lost = [max(rows[k][j] for k in range(j, len(rows) - 1)) - rows[-1][j] for j in range(len(rows) - 1)]
        by_method.setdefault(method, []).append((so_far, float(np.mean(lost))))
    for method, found in by_method.items():
        curves, lost = np.array([curve for curve, _ in found]), [z for _, z in found]
        error = spread(curves[:, -1])
        figures.append(
            Figure(spec, f"accuracy, {method}", curves[:, -1].mean(), error, len(found), curves.mean(0).tolist())
        )
        figures.append(Figure(spec, f"forgetting, {method}", float(np.mean(lost)), spread(lost), len(found)))
    return figures


# ---- Command line ----


def jobs_of(options: Options) -> list[tuple[str, Callable]]:
    """Tasks by name, groups one by one, with what measures them."""
    found = []
    for name in options.tasks:
        for spec in GROUPS.get(name, [name]):
            own, lengths = spec.removeprefix("task:").split(",")[0], [""]
            if own in ("position", "continual"):
                run = run_position if own == "position" else run_continual
            elif own in tasks.TASKS and name not in ("recall",):
                run = run_task
            else:
                run = run_harness
                if spec.startswith("babilong"):
                    lengths = [f"@{n // 1000}k" if n < 10**6 else f"@{n // 10**6}M" for n in options.lengths or (0,)]
            found += [(spec + length, run) for length in lengths]
    return found


def versions() -> dict[str, str]:
    found = {"hope": hope.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    for name in ("lm_eval", "transformers", "datasets"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def measure(path: str, options: Options, results: Results | None = None) -> tuple[Results, list[dict], list[str]]:
    """All tasks of one model: where results are, their rows, and what could not be measured and why."""
    subject = Subject.load(path, options)
    results, rows, failures = results or Results(subject.folder), [], []
    for spec, run in jobs_of(options):
        for memorize in [None] if run is run_continual else Memorize.of(options, subject.model):
            how = asdict(memorize) if memorize else None
            free = ("tasks", "plot", "out", "anew", "device", "checkpoints", "batch_size") + tuple(
                name for name in asdict(options) if name.startswith("memorize")
            )
            scope = {name: value for name, value in asdict(options).items() if name not in free}
            scope |= {"steps": options.memorize_steps} if run is run_continual else {}
            key = fingerprint(json.loads(json.dumps([subject.about["weights"], spec, how, scope])))[:16]
            if not results.of(key) or options.anew:
                reader = Reader(subject, memorize, options.context or subject.context, options.batch_size)
                title = f"{spec}{', memorising' if memorize else ''}"
                ask = lambda items, compute: results.ask(key, items, compute, title, reader.keeps)
                try:
                    with torch.no_grad():
                        figures = run(spec, subject, reader, options, ask)
                except UserError as e:
                    failures.append(str(e))
                    break
                speed = reader.tokens / reader.seconds if reader.seconds else None
                about = {
                    "memorize": how,
                    "seeds": options.seeds,
                    "tokens_per_s": speed,
                    "model": subject.about,
                    "settings": scope,
                    "versions": versions(),
                }
                results.add(key, [figure._asdict() | about for figure in figures])
            rows += results.of(key)
    return results, rows, failures


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        print(f"evaluation.py: error: {message} (python evaluation.py --help lists all flags)", file=sys.stderr)
        raise SystemExit(2)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="evaluation.py",
        description=__doc__.split("\n\nEvery")[0],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run or an export of train.py, or a pre-trained model")
    hints = get_type_hints(Options)
    kinds = train.KINDS | {
        tuple[int, ...]: {"type": lambda text: tuple(map(int, text.split(","))), "metavar": "N,N,..."}
    }
    for f in fields(Options):
        kind = kinds.get(hints[f.name]) or {"choices": get_args(hints[f.name])}
        if f.name in ("tasks", "checkpoints"):
            kind = {"nargs": "+", "metavar": "NAME"}
        parser.add_argument(
            "--" + f.name.replace("_", "-"), default=None, help=f.metadata["help"].replace("%", "%%"), **kind
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = vars(make_parser().parse_args(argv))
    path = args.pop("run")
    try:
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in args.items()
            if value is not None
        }
        options = Options(**given)
        results, rows, failures = None, [], []
        for checkpoint in options.checkpoints or [path]:
            if checkpoint.isdecimal():
                checkpoint = f"{path}/checkpoints/step-{int(checkpoint):06d}"
            results, more, failures = measure(checkpoint, options, results)
            rows += more
    except (UserError, ValueError) as e:
        print(f"evaluation.py: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluation.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    if rows:
        print(report.tables(rows))
        print(f"\n{results.path}")
        if options.plot:
            report.plot(rows, results.path.parent)
    for failure in failures:
        print(f"evaluation.py: not measured: {failure}", file=sys.stderr)
    if not failures:
        results.partial.unlink(missing_ok=True)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
