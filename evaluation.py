"""Measure a model: the paper's tables, and what it is worth that the model learns from what it reads.

    python evaluation.py runs/60m --tasks paper                  Table 2, with the paper's rows below (needs ".[eval]")
    python evaluation.py runs/mqar --tasks mqar,pairs=16         a task of tasks.py, here harder than in training
    python evaluation.py runs/tiny --tasks position continual    perplexity against position; class after class
    python evaluation.py runs/tiny --checkpoints 50 100 200      the same model at other times: what was forgotten
    python evaluation.py runs/tiny --demo                        what surprises it, and what it learns (needs ".[demo]")
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
    run_continual      one group of classes after the other, by continual.py
    main               the command line; report.py makes tables and pictures
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
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

import continual
import demo
import hope
import report
import tasks
import train
from data import Corpus, PretrainedTokenizer, Source, UserError, explained, fingerprint, try_hub
from hope import INF, Hope, HopeState
from settings import check_settings, setting
from train import TrainConfig

# ---- Settings ----

# Groups of tasks; what is no task of ours is the harness's.
NEEDLES = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery")
GROUPS = {
    "paper": ["wikitext", "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge",
              "social_iqa", "boolq", "commonsense_qa", "openbookqa"],
    "recall": ["swde", "fda", "squad_completion", "nq_open", "triviaqa", "drop"],
    "ruler": [f"niah_{name}" for name in NEEDLES],
    "babilong": [f"babilong_qa{i}" for i in range(1, 21)],
    "mad": [*report.MAD, "noisy-recall"],
    "formal": [*tasks.LANGUAGES],
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    tasks: tuple[str, ...] = setting(
        ("position",),
        f"groups: {', '.join(GROUPS)}; position or continual, with options as in position,text=FILE,length=4096; a "
        "task of tasks.py, as in mqar,pairs=8 (task:recall for the one that is called like a group); any task of "
        "lm-evaluation-harness",
    )
    memorize: Literal["both", "on", "off"] = setting("both", "whether the CMS learns from what it reads")
    memorize_levels: tuple[int, ...] = setting((), "which of its levels do, by their place in --cms; default: all")
    memorize_surprise: float = setting(0.0, "only segments of more nats per token than this teach", least=0, below=INF)
    memorize_steps: int = setting(1, "how often a prompt is read, each time with memories as at the start", least=1)
    memorize_answer: bool = setting(False, "ablation: learn from answers too, each after it has been scored")
    memorize_keep: bool = setting(False, "keep what the CMS has learnt from one sample to the next, in their order")
    limit: int = setting(0, "samples of a task; 0: all, 256 of tasks.py, 16 windows of a text", least=0)
    seeds: tuple[int, ...] = setting((0,), "of rows of tasks.py, orders of classes, few-shot examples", least=0)
    fewshot: int = setting(-1, "examples in front of a question of the harness; -1: as the task says", least=-1)
    lengths: tuple[int, ...] = setting((), "tokens of ruler's and babilong's contexts; default: 4096, and 0", least=0)
    include_path: str = setting("", "folder with harness tasks of your own, as YAML")
    batch_size: int = setting(16, "sequences at once", least=1)
    context: int = setting(
        0, "tokens that the memories see at once, longer text in windows; 0: with attention to everything the length "
        "of training, else no limit", least=0,
    )  # fmt: skip
    checkpoints: tuple[str, ...] = setting((), "steps of the run, or other runs, to measure: what was forgotten?")
    cms: tuple[float, ...] = setting((64.0,), "pre-trained models: chunk sizes of the CMS made of their MLPs", least=1)
    cms_rate: tuple[float, ...] = setting((0.01,), "pre-trained models: its inner step sizes", least=0)
    gguf_file: str = setting("", "pre-trained models: a file of the folder in this format")
    plot: bool = setting(False, "draw evaluation-*.png beside the results")
    out: str = setting("", "where results are kept; default: in RUN")
    anew: bool = setting(False, "measure again what has been measured")
    demo: bool = setting(False, "instead of measuring, a page on which the model reads and shows what surprised it")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Memorize:
    """How the CMS learns from what is read. The memories of the blocks are always written."""

    levels: tuple[int, ...]
    surprise: float = 0.0
    steps: int = 1
    answer: bool = False
    keep: bool = False

    @staticmethod
    def of(options: Options, model: Hope) -> list[Memorize | None]:
        """The columns that are asked for; None reads only."""
        able, o = model.config.written, options
        if unable := sorted(set(o.memorize_levels) - set(able)):
            has = f"those of this model that do: {able}" if able else "this model has none that does"
            raise UserError(f"--memorize-levels: levels {unable} of the CMS do not learn in context; {has}")
        if o.memorize == "on" and not able:
            raise UserError("--memorize on: no level of this model's CMS learns in context; use --memorize off")
        levels = o.memorize_levels or tuple(able)
        on = [Memorize(levels, o.memorize_surprise, o.memorize_steps, o.memorize_answer, o.memorize_keep)] * bool(able)
        return {"off": [None], "on": on, "both": [None, *on]}[options.memorize]


# ---- What is measured ----


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
        folder = Path(path)
        home = folder.parents[1] if folder.parent.name == "checkpoints" else folder
        config = home / "config.json"
        if config.exists() and "train" in json.loads(config.read_text()):
            config, model, tokenizer, found = train.trained(folder, options.device)
            about = {"name": f"{config.arch} {config.size}", "data": config.data, "step": found.get("step")}
            start, tokenizer_folder = [tokenizer.eot] if tokenizer else [], str(home)
        else:
            fix = "give a run or an export of train.py, or the name or folder of a pre-trained model"
            with explained(f"{path} cannot be loaded", fix, Exception):
                if not folder.is_dir():
                    try_hub()
                named = {"gguf_file": options.gguf_file} if options.gguf_file else {}
                model = hope.from_pretrained(path, cms=options.cms, cms_rate=options.cms_rate, **named)
                import transformers  # without which the line before says how to get it

                tokenizer = PretrainedTokenizer(transformers.AutoTokenizer.from_pretrained(path, **named))
            model = model.to(train.pick_device(options.device))
            config = TrainConfig(arch="hope-attention", seq_len=model.config.n_position or 2048)
            about = {"name": folder.name, "data": "", "step": None}
            home = folder if folder.is_dir() else Path("runs", path.replace("/", "--"))
            first, begin = tokenizer.hf("a").input_ids[:1], [tokenizer.hf.bos_token_id]
            start, tokenizer_folder = begin if first == begin else [], path
        about |= {"parameters": sum(p.numel() for p in model.parameters()), "cms": [*map(str, model.config.cms)]}
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
        self.keeps = memorize is not None and memorize.keep
        self.learns_answers = memorize is not None and memorize.answer
        self.lesson = {"levels": memorize.levels, "surprise": memorize.surprise} if memorize else {}
        self.kept: HopeState | None = None  # what was learnt from the samples so far
        self.tokens, self.seconds = 0, 0.0  # read, and in how long

    def batches(self, keys: Sequence[Any]) -> Iterator[list[int]]:
        """Places of samples that have the same key, so many at once; one by one where each learns from the last."""
        groups: dict[Any, list[int]] = {}
        for i, key in enumerate(keys):
            groups.setdefault(i if self.keeps else key, []).append(i)
        for _, group in sorted(groups.items()):
            yield from (group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size))

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
        return self.model.restart(state)

    def pieces(self, tokens: Tensor, targets: Tensor | None, state: HopeState) -> Iterator[tuple[Tensor, HopeState]]:
        """Read tokens (b, t); of each piece the logits (b, p, vocab), and the state after it.

        With targets (b, t) the CMS learns. Where the memories have seen `context` tokens they begin anew.
        """
        edges = [self.piece, self.context or self.piece]
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
        window = self.context or t + 1
        cut = max(0, t - max(1, window - room)) if self.context else 0
        lengths = [n for n in (*hope.piece_lengths(-cut % window, cut, [window]), t - cut) if n]
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
                learns = answers if self.learns_answers and start is None else None
                logits, last = self.read(inputs, learns, state.select([*rows]))
                likelihood = -hope.token_loss(logits, answers).sum(1)
                greedy = (logits.argmax(-1) == answers).all(1)
                yield from zip(places, zip(likelihood.tolist(), greedy.tolist()))
            # Which of several answers is right is not known here, so that none of them is kept.
            self.keep(last if len(asked) == 1 and self.learns_answers else state)

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
            following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
            learns = targets if self.learns_answers else following
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
        how: dict[str, Any] = {"memorize": False}
        if self.learns_answers:
            how = {"memorize": self.memorize.levels, "surprise": self.memorize.surprise, "learn_own": True}
        for batch in self.batches([len(prompt) for prompt in prompts]):
            tokens = self.tensor(prompts[i] for i in batch)
            state = self.prompt(tokens, min(most, self.context // 2))
            said, texts, done = [[] for _ in batch], [""] * len(batch), [False] * len(batch)
            how |= {"state": state, "stop": [self.tokenizer.eot]}
            stream, after = self.model.stream(tokens[:, -1:], temperature, **how), state
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
            self.keep(after if self.learns_answers else state)
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
    """RUN/evaluation.jsonl, a row for every figure; beside it, until a task is done, the answers to it so far."""

    def __init__(self, folder: Path):
        with explained(f"{folder} cannot be written", "give another folder by --out", OSError):
            folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "evaluation.jsonl"
        self.rows = lines_of(self.path)

    def partial(self, key: str) -> Path:
        """Answers of one task, so that commands that run side by side do not meet."""
        return self.path.with_name(f"evaluation.{key}.jsonl")

    def of(self, key: str) -> list[dict]:
        return [row for row in self.rows if row["key"] == key]

    def add(self, key: str, rows: list[dict]) -> None:
        rows = [{"key": key} | row for row in rows]
        self.rows = [row for row in self.rows if row["key"] != key] + rows
        with open(self.path, "a") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))
        self.partial(key).unlink(missing_ok=True)

    def ask(self, key: str, items: Sequence[Any], compute: Callable, title: str, afresh: bool = False) -> list[Any]:
        """Answers to items, which name themselves as JSON.

        `compute` takes the places of those that have none yet, and yields for each its place among them and its answer.
        afresh: of all of them, since each changes the next.
        """
        found = {row["item"]: row["answer"] for row in lines_of(self.partial(key))}
        names = [fingerprint(item) for item in items]
        left = [i for i, name in enumerate(names) if afresh or name not in found]
        # A line that a killed process has begun ends here.
        with tqdm(total=len(items), initial=len(items) - len(left), desc=title, disable=None) as bar:
            with open(self.partial(key), "a") as f:
                f.write("\n")
                for place, answer in compute(left):
                    found[names[left[place]]] = answer
                    f.write(json.dumps({"item": names[left[place]], "answer": answer}) + "\n")
                    f.flush()
                    bar.update()
        return [found[name] for name in names]


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
            raise UserError(f"{spec}: {option} is {text!r}; give a number") from None
    return found


# ---- lm-evaluation-harness ----


def run_harness(spec: str, subject: Subject, reader: Reader, options: Options, ask: Ask) -> list[Figure]:
    """A task or group of the harness; babilong_qa1@4k with contexts of that length."""
    try:
        import harness
    except ImportError as e:
        install = 'pip install "nested-learning-hope[eval]"'
        raise UserError(
            f"{spec} is a task of lm-evaluation-harness, of which {e.name} is missing; run: {install}"
        ) from e
    name, _, length = spec.partition("@")
    lengths = length or [*options.lengths] or [4096]
    about = {"tokenizer": subject.tokenizer_folder, "max_seq_lengths": lengths}
    manager = harness.find(name, options.include_path, about)
    if manager is None:
        ours = ", ".join([*GROUPS, "position", "continual", *tasks.TASKS])
        raise UserError(f"no task is called {name!r}; ours are: {ours}; `lm-eval ls tasks` lists those of the harness")
    model = harness.Model(reader, subject.start, ask)
    how = {"num_fewshot": None if options.fewshot < 0 else options.fewshot, "limit": options.limit or None}
    return [
        Figure(f"{task}@{length}" if length else task, *numbers)
        for task, *numbers in harness.measure(model, manager, name, fewshot_random_seed=options.seeds[0], **how)
    ]


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
    n, size = options.limit or 256, 1 if reader.keeps else reader.batch_size
    items = [(seed, i, min(size, n - i)) for seed in options.seeds for i in range(0, n, size)]

    def compute(left: list[int]) -> Iterator[tuple[int, dict]]:
        for place, i in enumerate(left):
            tokens, targets = task.rows("test", *items[i])
            yield place, task.counts(reader.answers(tokens, targets), targets)

    counts: dict[str, dict[int, np.ndarray]] = {}
    for (seed, *_), answer in zip(items, ask(items, compute)):
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
    if not text and subject.about["data"]:
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


def run_continual(spec: str, subject: Subject, reader: Reader, options: Options, ask: Ask) -> list[Figure]:
    """Stage after stage: accuracy on all stages met so far, and how much of the best there was is lost (Fig. 6)."""
    o = settings_of(spec, **continual.DEFAULTS)
    written, batch = subject.model.config.written, options.batch_size
    methods = {f"CMS, {k} levels" if k else "in context": tuple(written[:k]) for k in range(len(written) + 1)}
    items = [(seed, method) for seed in options.seeds for method in (*methods, "fine-tuning", "EWC")]

    def compute(left: list[int]) -> Iterator[tuple[int, list]]:
        for place, i in enumerate(left):
            seed, method = items[i]

            def make_reader(model: Hope, context: int) -> Reader:
                levels = methods.get(method)
                learns = Memorize(levels, options.memorize_surprise) if levels else None
                return Reader(replace(subject, model=model), learns, context, batch)

            learner = continual.Learner(method, subject, make_reader, reader.context, o, options.memorize_steps)
            yield place, learner.accuracies(continual.make_stages(o, seed), seed)

    found: dict[str, list[tuple[list[float], float]]] = {}
    for (_, method), rows in zip(items, ask(items, compute)):
        found.setdefault(method, []).append(continual.summary(rows))
    if len(written) < 3:
        print(f"evaluation.py: {spec}: {continual.missing_levels(len(written))}", file=sys.stderr)
    figures = []
    for method, pairs in found.items():
        curves, lost = np.array([curve for curve, _ in pairs]), [z for _, z in pairs]
        last, curve = curves[:, -1], curves.mean(0).tolist()
        figures.append(Figure(spec, f"accuracy {method}", last.mean().item(), spread(last), len(pairs), curve))
        figures.append(Figure(spec, f"forgetting {method}", float(np.mean(lost)), spread(lost), len(pairs)))
    return figures


# ---- Command line ----

FREE = {"tasks", "plot", "out", "anew", "device", "checkpoints", "batch_size"}  # settings that change no figure


def babilong_length(n: int) -> str:
    """What BABILong calls contexts of n tokens: 0k, 4k, 128k, 1M."""
    return f"{n // 10**6}M" if n >= 10**6 else f"{n // 1024 if n % 1024 == 0 else n // 1000}k"


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
                    lengths = [f"@{babilong_length(n)}" for n in options.lengths or (0,)]
            found += [(spec + length, run) for length in lengths]
    return found


def versions() -> dict[str, str]:
    names = ("torch", "lm_eval", "transformers", "datasets")
    installed = {d.name.replace("-", "_"): d.version for d in importlib.metadata.distributions()}
    return {"hope": hope.__version__} | {name: installed[name] for name in names if name in installed}


def measure(path: str, options: Options, results: Results | None = None) -> tuple[Results, list[dict], list[str]]:
    """All tasks of one model: where results are, their rows, and what could not be measured and why."""
    subject = Subject.load(path, options)
    results, rows, failures = results or Results(subject.folder), [], []
    for spec, run in jobs_of(options):
        for memorize in [None] if run is run_continual else Memorize.of(options, subject.model):
            how = asdict(memorize) if memorize else None
            scope = {name: z for name, z in asdict(options).items() if name not in FREE and name[:8] != "memorize"}
            scope |= {"steps": options.memorize_steps} if run is run_continual else {}
            key = fingerprint(json.loads(json.dumps([subject.about["weights"], spec, how, scope])))[:16]
            if not results.of(key) or options.anew:
                if run is not run_task and subject.tokenizer is None:
                    own = subject.config.data
                    failures.append(f"{spec} is about text, which this run has no tokenizer for; measure it on {own}")
                    break
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
                about = {"memorize": how, "seeds": options.seeds, "tokens_per_s": speed}
                about |= {"model": subject.about, "settings": scope, "versions": versions()}
                results.add(key, [figure._asdict() | about for figure in figures])
            rows += results.of(key)
    return results, rows, failures


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        print(f"evaluation.py: error: {message} (python evaluation.py --help lists all flags)", file=sys.stderr)
        raise SystemExit(2)


def make_parser() -> argparse.ArgumentParser:
    look = dict(description=__doc__.split("\n\nEvery")[0], formatter_class=train.Help)
    parser = Parser(prog="evaluation.py", allow_abbrev=False, **look)
    parser.add_argument("run", metavar="RUN", help="a run or an export of train.py, or a pre-trained model")
    hints = get_type_hints(Options)
    whole = {"type": lambda text: tuple(map(int, text.split(","))), "metavar": "N,N,..."}
    kinds = train.KINDS | {tuple[int, ...]: whole}
    for f in fields(Options):
        kind = kinds.get(hints[f.name]) or {"choices": get_args(hints[f.name])}
        if f.name in ("tasks", "checkpoints"):
            kind = {"nargs": "+", "metavar": "NAME"}
        text = f.metadata["help"].replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=text, **kind)
    return parser


def show(path: str, options: Options) -> int:
    """The page of demo.py, until Ctrl-C."""
    subject = Subject.load(path, options)
    if subject.tokenizer is None:
        raise UserError(f"--demo: {path} was trained on {subject.config.data}, and reads no text")
    name, size = subject.about["name"], subject.about["parameters"]
    demo.launch(subject.model, subject.tokenizer, f"{path}: {name}, {size:,} parameters")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = vars(make_parser().parse_args(argv))
    path = args.pop("run")
    try:
        given = {name: tuple(z) if isinstance(z, list) else z for name, z in args.items() if z is not None}
        options = Options(**given)
        if options.demo:
            return show(path, options)
        results, rows, failures = None, [], []
        for checkpoint in options.checkpoints or [path]:
            if checkpoint.isdecimal():
                checkpoint = f"{path}/checkpoints/step-{int(checkpoint):06d}"
            results, more, missing = measure(checkpoint, options, results)
            rows, failures = rows + more, failures + missing
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
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
