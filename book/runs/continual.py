"""The runs that chapter 16 reads: classes that come one group after the other, and two new languages in turn.

    python book/runs/continual.py classes      about 2 minutes on one core; writes book/runs/continual-classes.json
    python book/runs/continual.py languages    under a minute; writes book/runs/continual-languages.json
    python book/runs/continual.py classes --steps 45    pre-trained features, 4 minutes; continual-classes-trained.json
    python book/runs/continual.py languages --steps 45  under a minute; writes continual-languages-trained.json

Every arm is written to the JSON as soon as it is done, and one that is there is not run again: an interrupted run goes
on. --seeds 0 1 2 sets the seeds, --quick runs everything in seconds, to /tmp.

Seeds: a run's seed sets the model's start and its training streams; the streams of the test are the same for all arms
of a seed. Settings are chosen with the seed TUNING, on other streams than those that results are for.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import hope
import tasks
from data import write_atomically
from hope import INF

HERE = Path(__file__).resolve().parent
TUNING = 100  # a seed for choosing settings
WIDTH, BATCH = 32, 8
STEPS = 0  # of pre-training; see --steps
QUICK = False

# ---- Streams ----

CODES, ASK, LETTERS = 16, 16, 4  # an example: four letters of CODES, the question, the label
LABELS, STAGES, SHOTS, REVIEW = 10, 5, 8, 16  # two classes a stage, so many examples of each; REVIEW of all at the end
TESTS = 4  # of every class, never in a stream


class Stream(NamedTuple):
    """b streams of stages, and what is asked after each of them.

    Reading a stage is reading its row of `tokens`; asking is reading `questions` from the state that then is.
    """

    tokens: Tensor  # (b, stages, t)
    targets: Tensor  # (b, stages, t): the answers, -100 elsewhere; in training the last stage is a review
    questions: Tensor  # (b, groups, n, length): what is asked of a stage, by the stage that teaches it
    answers: Tensor  # (b, groups, n)
    labels: Tensor  # (b, groups, m): the answers that a stage brings in


@cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as four letters: which of 16 typical quadrants each of the four is. (1797, 4), (1797,)"""
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits

    images = load_digits()
    quarters = images.images.reshape(-1, 2, 4, 2, 4).transpose(1, 3, 0, 2, 4).reshape(LETTERS, -1, 16)
    found = [KMeans(CODES, n_init=1, random_state=0).fit(q[:1200]).predict(q) for q in quarters]
    return torch.stack([torch.from_numpy(f).long() for f in found], 1), torch.tensor(images.target)


def examples(kind: str, b: int, n: int, g: torch.Generator, split: str) -> Tensor:
    """n examples of each of ten classes, in b worlds that have nothing in common. (b, LABELS, n, LETTERS)

    words: a class is a word, each letter of which is replaced by a random one with probability 1/4.
    digits: images, in an alphabet of the world's own: which number stands for a typical quadrant is drawn anew.
    """
    if kind == "words":
        shape = (b, LABELS, n, LETTERS)
        word = torch.randint(CODES, (b, LABELS, 1, LETTERS), generator=g)
        wrong = torch.rand(shape, generator=g) < 0.25
        return torch.where(wrong, torch.randint(CODES, shape, generator=g), word)
    letters, number = digits()
    of_split = (torch.arange(len(number)) < 1200) == (split == "train")
    found = []
    for _ in range(b):
        alphabet = torch.rand(LETTERS, CODES, generator=g).argsort(1)
        for c in torch.randperm(LABELS, generator=g):
            having = (of_split & (number == c)).nonzero()[:, 0]
            few = having[torch.randperm(len(having), generator=g)[:n]]
            found.append(alphabet[torch.arange(LETTERS), letters[few]])
    return torch.stack(found).view(b, LABELS, n, LETTERS)


def shuffled(z: Tensor, g: torch.Generator) -> Tensor:
    """z (b, n, ...) with each row in an order of its own."""
    order = torch.rand(z.shape[:2], generator=g).argsort(1)
    return z[torch.arange(len(z))[:, None], order]


def classes(b: int, g: torch.Generator, split: str = "train") -> Stream:
    """Half of the streams with words, half with digits. A stage: two new classes, SHOTS examples of each, mixed."""
    x = torch.cat([examples(kind, b // 2, SHOTS + 2 + TESTS, g, split) for kind in ("words", "digits")])
    label = CODES + 1 + torch.rand(b, LABELS, generator=g).argsort(1)
    ends = [torch.full_like(x[..., :1], ASK), label[:, :, None, None].expand(*x.shape[:3], 1)]
    x = torch.cat([x, *ends], -1)  # (b, LABELS, n, LETTERS + 2)
    stages = [x[:, 2 * s : 2 * s + 2, :SHOTS].flatten(1, 2) for s in range(STAGES)]
    stages.append(shuffled(x[:, :, SHOTS : SHOTS + 2].flatten(1, 2), g)[:, :REVIEW])
    tokens = torch.stack([shuffled(stage, g) for stage in stages], 1)
    targets = torch.full_like(tokens, -100)
    targets[..., LETTERS] = tokens[..., LETTERS + 1]
    tests = x[:, :, SHOTS + 2 :].unflatten(1, (STAGES, 2)).flatten(2, 3)  # (b, STAGES, 2 * TESTS, LETTERS + 2)
    return Stream(tokens.flatten(2), targets.flatten(2), tests[..., :-1], tests[..., -1], label.view(b, STAGES, 2))


LESSONS, WORDS = 2, 16
TWO = tasks.make(f"two-languages,words={WORDS},lessons={LESSONS}")


def languages(b: int, g: torch.Generator, split: str = "train") -> Stream:
    """Rows of the task two-languages: a stage is LESSONS lessons in one language, the last one a lesson of the first.

    The task asks from the second lesson in a language on. Here every meaning is a target, for it is what a level learns.
    """
    begin = int(torch.randint(2**40, (1,), generator=g))
    tokens, _ = TWO.rows(split, 0, begin, b)
    pairs = tokens.view(b, -1, 2)
    n = LESSONS * WORDS
    targets = torch.stack([pairs[..., 1], torch.full_like(pairs[..., 1], -100)], -1).flatten(1)
    cut = lambda z: torch.stack([z[:, : 2 * n], z[:, 2 * n : 4 * n]], 1)
    last = [pairs[:, s : s + WORDS] for s in (0, n)]  # a lesson of each language has all words
    lesson = torch.stack(last, 1)
    review = (tokens[:, 4 * n :], targets[:, 4 * n :])
    if split == "train":  # the review is a stage of its own, shorter than the others: padded by repeating the lesson
        review = [z.repeat(1, LESSONS) for z in review]
        tokens, targets = (torch.cat([cut(z), r[:, None]], 1) for z, r in zip((tokens, targets), review))
    else:
        tokens, targets = cut(tokens), cut(targets)
    meanings = torch.arange(2 * WORDS, 3 * WORDS).expand(b, 2, -1)
    return Stream(tokens, targets, lesson[..., :1], lesson[..., 1], meanings)


# ---- Models ----

WORLDS = {"classes": classes, "languages": languages}
CLOCKS = {"classes": (48, 96, 240), "languages": (16, 32, 64)}
VOCAB = {"classes": CODES + 1 + LABELS, "languages": TWO.vocab_size}


class Arm(NamedTuple):
    """A CMS: how many of four MLPs are written in context, and how they are wired."""

    levels: int
    wiring: str = "sequential"


RATES, SHARPNESS = (2.0, 5.0, 15.0), (5.0, 15.0, 50.0)  # that are tried
HIGHER = 45.0  # and this where models are pre-trained, which are best at the highest of RATES
PATIENT = [(0.0001, 16), (0.0001, 64), (0.0003, 4), (0.0003, 16), (0.0003, 64), (0.001, 16)]  # of fine-tuning
ATTENTION_RATES = (0.003, 0.01, 0.03)  # of training attention


ARMS = {
    "CMS, 3 levels": Arm(3),
    "CMS, 1 level": Arm(1),
    "CMS, 2 levels": Arm(2),
    "CMS, 3 levels, nested": Arm(3, wiring="nested"),
}


def build(world: str, arm: Arm, rate: float, seed: int) -> hope.Hope:
    """One block of width 32: a sequence layer, and four MLPs of which the first `arm.levels` have clocks."""
    torch.manual_seed(seed)
    clocks = CLOCKS[world][: arm.levels] + (INF,) * (4 - arm.levels)
    conv = {"classes": LETTERS + 1, "languages": 0}[world]  # attention sees one token; it joins an example's letters
    config = hope.HopeConfig.preset(
        "tiny", "hope-attention", d_model=WIDTH, n_head=2, n_layer=1, vocab_size=VOCAB[world], cms=clocks, cms_hidden=2.0,
        cms_rate=(rate,), wiring=arm.wiring, conv=conv,
        window=1,
    )  # fmt: skip
    model = hope.Hope(config)
    with torch.no_grad():  # a model that tells examples apart, and that writes can change, from the first step on
        model.head.weight.normal_(std=WIDTH**-0.5)
        memory = model.blocks[0].memory
        if world == "classes":
            model.embed.weight[ASK] = 0
        if conv:
            memory.conv.weight.normal_(std=conv**-0.5)
            memory.to_y.weight.normal_(std=2 * WIDTH**-0.5)
    return model


def train(world: str, arm: Arm, rate: float, seed: int) -> hope.Hope:
    """A model, pre-trained for STEPS steps on streams of other worlds that end with a review."""
    model, g = build(world, arm, rate, seed), torch.Generator().manual_seed(1000 + seed)
    if STEPS == 0:
        return model
    rates = [p for name, p in model.named_parameters() if name.endswith("raw_rates")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("raw_rates")]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 0.01}, {"params": rates, "lr": 0.1}], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.1], total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        stream = WORLDS[world](BATCH, g)
        optimizer.zero_grad()
        model.observe(stream.tokens.flatten(1), stream.targets.flatten(1), backward=True)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        optimizer.step()
        schedule.step()
    return model


# ---- Asking ----


def features(model: hope.Hope, tokens: Tensor) -> Tensor:
    """What goes into the CMS, as a unit vector. (b, t) -> (b, t, d)"""
    block, x = model.blocks[0], model.embed(tokens)
    return F.normalize(x + block.memory(block.norm(x))[0], dim=-1)


def look_up(model: hope.Hope, stream: Stream, k: int, sharpness: Tensor | float, latest: bool = False) -> Tensor:
    """In context only: attention from questions to the examples themselves, of stages 0 to k or of the latest, k.

    Non-parametric: the answer is the mean of the labels seen, weighted by the softmax of sharpness times the cosine
    between features. Nothing is written. Returns probabilities (b, k + 1, n, vocab).
    """
    questions = stream.questions[:, : k + 1]
    b, groups, n, length = questions.shape
    asked = features(model, questions.reshape(-1, length))[:, -1].view(b, groups * n, -1)
    seen = range(k, k + 1) if latest else range(k + 1)
    key = torch.cat([features(model, stream.tokens[:, i]) for i in seen], 1)
    labels = stream.targets[:, list(seen)].flatten(1)
    weights = (sharpness * asked @ key.mT).masked_fill(labels[:, None] < 0, -torch.inf).softmax(-1)
    return (weights @ F.one_hot(labels.clamp(min=0), model.config.vocab_size).float()).view(b, groups, n, -1)


@torch.no_grad()
def attend(model: hope.Hope, stream: Stream, sharpness: float, latest: bool) -> Outcome:
    """`look_up` after every stage."""
    outcome = nothing_known(stream)
    for k in range(stream.answers.shape[1]):
        judge(look_up(model, stream, k, sharpness, latest), stream, k, outcome)
    return outcome


def train_attention(world: str, lr: float, seed: int) -> tuple[hope.Hope, float]:
    """Features and sharpness, trained for `look_up` at the end of streams of other worlds (a matching network)."""
    model, g = build(world, ARMS[BASE], RATES[0], seed), torch.Generator().manual_seed(1000 + seed)
    log_sharpness = torch.nn.Parameter(torch.tensor(SHARPNESS[1]).log())
    weights = [*model.embed.parameters(), *model.blocks[0].memory.parameters(), *model.blocks[0].norm.parameters()]
    optimizer = torch.optim.AdamW([*weights, log_sharpness], lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        stream = WORLDS[world](BATCH, g)
        p = look_up(model, stream, stream.answers.shape[1] - 1, log_sharpness.exp())
        loss = -p.gather(-1, stream.answers[..., None]).clamp(min=1e-6).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model, log_sharpness.exp().item()


def answer(model: hope.Hope, state: hope.HopeState, questions: Tensor) -> Tensor:
    """Logits (b, groups, n, vocab) after questions (b, groups, n, length), each read by itself from the same state."""
    b, groups, n, _ = questions.shape
    rows = torch.arange(b).repeat_interleave(groups * n)
    logits, _ = model(questions.reshape(b * groups * n, -1), state.select(rows))
    return logits[:, -1].view(b, groups, n, -1)


def among(logits: Tensor, allowed: Tensor) -> Tensor:
    """The likeliest of the allowed answers. logits: (..., vocab), allowed: (..., m) -> (...)"""
    return allowed.gather(-1, logits.gather(-1, allowed).argmax(-1, keepdim=True))[..., 0]


class Outcome(NamedTuple):
    """What is known after each stage. Rows: after which stage, columns: of which; NaN where it was not met yet."""

    accuracy: Tensor  # (b, stages, stages), among all labels met so far
    within: Tensor  # (b, stages, stages), among the labels of the question's own stage
    latest: Tensor  # (b, stages, stages): how often the answer is a label of the latest stage


def judge(logits: Tensor, stream: Stream, k: int, outcome: Outcome) -> None:
    """Enter answers after stage k (from 0) to questions on the stages met."""
    right = stream.answers[:, : k + 1]
    n = right.shape[2]
    met = stream.labels[:, : k + 1].flatten(1)[:, None, None].expand(-1, k + 1, n, -1).contiguous()
    own = stream.labels[:, : k + 1, None].expand(-1, -1, n, -1).contiguous()
    said = among(logits, met)
    outcome.accuracy[:, k, : k + 1] = (said == right).float().mean(2)
    outcome.within[:, k, : k + 1] = (among(logits, own) == right).float().mean(2)
    newest = (said[..., None] == stream.labels[:, k, None, None]).any(-1)
    outcome.latest[:, k, : k + 1] = newest.float().mean(2)


def nothing_known(stream: Stream) -> Outcome:
    b, stages = stream.answers.shape[:2]
    return Outcome(*(torch.full((b, stages, stages), math.nan) for _ in range(3)))


@torch.no_grad()
def follow(model: hope.Hope, stream: Stream, levels: list[int] | None = None) -> tuple[Outcome, hope.HopeState]:
    """Read the stages one after the other, writing these levels (None: all), and ask after each."""
    outcome, state = nothing_known(stream), None
    for k in range(stream.answers.shape[1]):
        _, state = model.observe(stream.tokens[:, k], stream.targets[:, k], state, levels=levels)
        judge(answer(model, state, stream.questions[:, : k + 1]), stream, k, outcome)
    return outcome, state


def summary(outcome: Outcome) -> dict:
    """Mean over streams, all and each half of them: what `measures` finds, and where old stages went wrong."""
    half = len(outcome.accuracy) // 2
    a, within, latest = (z.mean(0) for z in outcome)
    found = {"all": measures(a)}
    found["all"] |= {
        "matrix": rounded(a),
        "old": rounded(a[-1, :-1].mean()),
        "old, within": rounded(within[-1, :-1].mean()),
        "old, named as latest": rounded(latest[-1, :-1].mean()),
    }
    found["first half"] = measures(outcome.accuracy[:half].mean(0))
    found["second half"] = measures(outcome.accuracy[half:].mean(0))
    return found


def measures(a: Tensor) -> dict:
    """Of an accuracy matrix: the accuracy on what was met, after each stage and at the end, and forgetting."""
    lost = torch.stack([a[j:-1, j].max() - a[-1, j] for j in range(len(a) - 1)])
    so_far = torch.stack([row[: k + 1].mean() for k, row in enumerate(a)])
    return {"accuracy": rounded(so_far[-1]), "so far": rounded(so_far), "forgetting": rounded(lost.mean())}


def rounded(z: Tensor) -> list | float:
    if z.ndim:
        return [rounded(part) for part in z]
    return None if z.isnan() else round(z.item(), 4)


def score(outcome: Outcome) -> float:
    """What settings are chosen by: accuracy on all stages at the end."""
    return outcome.accuracy[:, -1].mean().item()


def streams(world: str, seed: int) -> Stream:
    """The test of a seed."""
    return WORLDS[world](4 if QUICK else 8, torch.Generator().manual_seed(5000 + seed), "test")


# ---- Weights that are tuned on: fine-tuning and EWC ----


def tune(model: hope.Hope, stream: Stream, lr: float, passes: int, pull: float) -> Outcome:
    """Every stage by AdamW on all weights, 8 examples a step, `passes` times; each stream with weights of its own.

    pull: EWC's lambda, 0 for plain fine-tuning. The squared gradients of single examples of a stage are its Fisher.
    """
    outcomes = []
    for i in range(len(stream.tokens)):
        one = Stream(*(z[i : i + 1] for z in stream))
        outcomes.append(tune_one(copy.deepcopy(model), one, lr, passes, pull))
    return Outcome(*(torch.cat(z) for z in zip(*outcomes)))


def tune_one(model: hope.Hope, stream: Stream, lr: float, passes: int, pull: float) -> Outcome:
    outcome, weights = nothing_known(stream), [p for p in model.parameters() if p.numel() > 4]
    optimizer, anchors, length = torch.optim.AdamW(weights, lr, weight_decay=0.0), [], LETTERS + 2
    for k in range(STAGES):
        rows, right = stream.tokens[0, k].view(-1, length), stream.targets[0, k].view(-1, length)

        def loss_of(batch: slice) -> Tensor:
            return hope.token_loss(model(rows[batch])[0], right[batch]).sum() / len(rows[batch])

        for _ in range(passes):
            for s in range(0, len(rows), 8):
                loss = loss_of(slice(s, s + 8))
                for values, fisher in anchors:
                    terms = (f * (p - v) ** 2 for p, v, f in zip(weights, values, fisher))
                    loss = loss + pull / 2 * sum(z.sum() for z in terms)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if pull:
            fisher = [torch.zeros_like(p) for p in weights]
            for s in range(len(rows)):
                found = torch.autograd.grad(loss_of(slice(s, s + 1)), weights, allow_unused=True)
                fisher = [f if g is None else f + g**2 / len(rows) for f, g in zip(fisher, found)]
            anchors.append(([p.detach().clone() for p in weights], fisher))
        with torch.no_grad():
            judge(answer(model, model.init_state(1), stream.questions[:, : k + 1]), stream, k, outcome)
    return outcome


# ---- Why: what a write does, and what the levels hold ----


@torch.no_grad()
def mechanism(model: hope.Hope, stream: Stream) -> dict:
    """Of a CMS after the last stage: the size of each level's change, and what is known if only some of them are kept.

    Also what it is like if only some levels are written from the start: the first 0, 1, ..., or one alone.
    """
    _, state = follow(model, stream)
    last, fast = stream.answers.shape[1] - 1, state.cms[0]
    sizes = [torch.stack([d.flatten(1).norm(dim=1) for d in f.delta]).norm(dim=0).mean() for f in fast if f]

    def kept(which: list[int]) -> list:
        zeros = [f and replace(f, delta=[torch.zeros_like(d) for d in f.delta]) for f in fast]
        part = replace(state, cms=[[f if i in which else z for i, (f, z) in enumerate(zip(fast, zeros))]])
        outcome = nothing_known(stream)
        judge(answer(model, part, stream.questions), stream, last, outcome)
        return rounded(outcome.accuracy.mean(0)[-1])

    n = len(sizes)
    found = {"size": rounded(torch.stack(sizes)), "rates": rounded(torch.stack(model.blocks[0].cms.rates()))}
    found["kept"] = {"all": kept([*range(n)]), "none": kept([])}
    found["kept"] |= {f"only {i}": kept([i]) for i in range(n)}
    found["kept"] |= {f"without {i}": kept([j for j in range(n) if j != i]) for i in range(n)}
    found["first levels"] = [summary(follow(model, stream, [*range(k)])[0])["all"] for k in range(n + 1)]
    alone = {f"only {i}": follow(model, stream, [i])[0].accuracy.mean(0)[-1] for i in range(n)}
    found["written"] = {name: rounded(z) for name, z in alone.items()}
    return found | {"overlap": overlap(model, stream)}


def overlap(model: hope.Hope, stream: Stream) -> dict:
    """Do writes of two stages meet, each taken from the start? And what does reading stage 2 do to stage 1, in nats?"""
    chunk = model.blocks[0].cms.chunks[0]
    begun = [model.observe(stream.tokens[:, k, :chunk], stream.targets[:, k, :chunk])[1] for k in (0, 1)]
    writes = [torch.cat([d.flatten(1) for d in state.cms[0][0].delta], 1) for state in begun]
    _, first = model.observe(stream.tokens[:, 0], stream.targets[:, 0])
    _, both = model.observe(stream.tokens[:, 1], stream.targets[:, 1], first)

    def nats(state: hope.HopeState) -> list:
        scores = answer(model, state, stream.questions[:, :2]).log_softmax(-1)
        return rounded(-scores.gather(-1, stream.answers[:, :2, :, None]).mean((0, 2, 3)))

    reads = {"before": model.init_state(len(stream.tokens)), "after 1": first, "after 1 and 2": both}
    cosine = rounded(torch.cosine_similarity(*writes, dim=1).mean())
    return {"cosine of writes": cosine, "nats": {name: nats(state) for name, state in reads.items()}}


# ---- All of it ----


class Found:
    """Results by name, stored as they come."""

    def __init__(self, path: Path, command: str):
        self.path, self.command = path, command
        self.all = json.loads(path.read_text()) if path.exists() else {"cpu seconds": 0, "runs": {}}

    def get(self, name: str, compute) -> dict:
        if name not in self.all["runs"]:
            began = time.process_time()
            self.all["runs"][name] = compute()
            self.all["cpu seconds"] = round(self.all["cpu seconds"] + time.process_time() - began, 1)
            self.all["made"] = {
                "command": self.command,
                "steps": STEPS,
                "torch": torch.__version__,
                "python": sys.version.split()[0],
            }
            write_atomically(self.path, json.dumps(self.all) + "\n")
            print(name, str(self.all["runs"][name])[:150], f"{self.all['cpu seconds']} s", flush=True)
        return self.all["runs"][name]


BASE = "CMS, 3 levels"  # the model whose weights are tuned


def run(world: str, seeds: list[int], found: Found) -> None:
    @cache
    def model(name: str, setting: float, seed: int) -> hope.Hope:
        return train(world, ARMS[name], setting, seed)

    def arms(names: list[str]) -> None:
        for name in names:
            found.get(f"tuning, {name}", lambda: tuning(name))
            for seed in seeds:
                found.get(f"{name}, seed {seed}", lambda: one(name, seed))

    def tuning(name: str) -> dict:
        test = streams(world, TUNING)
        tried = (*RATES, HIGHER) if STEPS else RATES
        return {s: round(score(follow(model(name, s, TUNING), test)[0]), 4) for s in tried}

    def best(name: str) -> float:
        scores = found.all["runs"][f"tuning, {name}"]
        return float(max(scores, key=scores.get))

    def one(name: str, seed: int) -> dict:
        trained, test = model(name, best(name), seed), streams(world, seed)
        result = {"setting": best(name)} | summary(follow(trained, test)[0])
        return result | {"why": mechanism(trained, test)}

    def tuned(seed: int, lr: float, passes: int, pull: float, every: int) -> Outcome:
        some = Stream(*(z[::every] for z in streams(world, seed)))  # each has weights of its own, which is dear
        return tune(model(BASE, best(BASE), seed), some, lr, passes, pull)

    def context(seed: int, sharpness: float, latest: bool) -> Outcome:
        return attend(model(BASE, best(BASE), seed), streams(world, seed), sharpness, latest)

    @cache
    def matching(lr: float, seed: int) -> tuple[hope.Hope, float]:
        return train_attention(world, lr, seed)

    def trained_context(seed: int, lr: float, latest: bool) -> Outcome:
        attention, sharpness = matching(lr, seed)
        return attend(attention, streams(world, seed), sharpness, latest)

    arms([BASE])
    for name, latest in (("in context, all", False), ("in context, one stage", True)):
        sharp = found.get(
            f"tuning, {name}", lambda: {s: round(score(context(TUNING, s, latest)), 4) for s in SHARPNESS}
        )
        sharpest = float(max(sharp, key=sharp.get))
        for seed in seeds:
            result = lambda: {"setting": sharpest} | summary(context(seed, sharpest, latest))
            found.get(f"{name}, seed {seed}", result)
    for name, latest in (("in context, trained, all", False), ("in context, trained, one stage", True)):
        if STEPS:
            scores = found.get(
                f"tuning, {name}",
                lambda: {lr: round(score(trained_context(TUNING, lr, latest)), 4) for lr in ATTENTION_RATES},
            )
            lr = float(max(scores, key=scores.get))
            for seed in seeds:
                result = lambda: {"setting": lr} | summary(trained_context(seed, lr, latest))
                found.get(f"{name}, seed {seed}", result)
    if world == "classes":
        grid = [(lr, passes) for lr in (0.001, 0.003, 0.01) for passes in (1, 4)] + PATIENT
        plain = found.get(
            "tuning, fine-tuning",
            lambda: {f"{lr} {n}": round(score(tuned(TUNING, lr, n, 0.0, 4)), 4) for lr, n in grid},
        )
        lr, passes = max(plain, key=plain.get).split()
        once, _ = max((key for key in plain if key.endswith(" 1")), key=plain.get).split()
        lr, passes, once = float(lr), int(passes), float(once)
        ewc = found.get(
            "tuning, EWC",
            lambda: {pull: round(score(tuned(TUNING, lr, passes, pull, 4)), 4) for pull in (1.0, 10.0, 100.0, 1000.0)},
        )
        pull = float(max(ewc, key=ewc.get))
        ways = {"fine-tuning": (lr, passes, 0.0), "fine-tuning, one pass": (once, 1, 0.0), "EWC": (lr, passes, pull)}
        for seed in seeds:
            for name, how in ways.items():
                result = lambda: {"setting": how} | summary(tuned(seed, *how, 2))
                found.get(f"{name}, seed {seed}", result)
    arms([name for name in ARMS if name != BASE])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="of pre-training")
    parser.add_argument("--quick", action="store_true")
    o = parser.parse_args()
    QUICK, STEPS = o.quick, 2 if o.quick else o.steps
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    trained, flag = ("-trained", f" --steps {STEPS}") if STEPS else ("", "")
    where = (Path("/tmp") if QUICK else HERE) / f"continual-{o.world}{trained}.json"
    run(o.world, o.seeds, Found(where, f"python book/runs/continual.py {o.world}{flag}"))
