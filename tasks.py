"""The paper's synthetic tasks: rows of tokens with targets, made from their number.

    task = tasks.make("mqar,pairs=8,vocab=128")           a name of TASKS, and options of its class
    tokens, targets = task.rows("train", seed, 0, 32)     (32, length) each; -100 where nothing is asked
    task.scores(logits, targets, tokens)                  {"accuracy": percent, ...}

- A row is a pure function of (task, split, seed, row number). Nothing is stored, and there is no end of rows.
- Rows of different splits never meet, whatever their seeds: what a row holds decides its split (`split_of`), and one
  that is drawn for another split is drawn again. Stop a training by "selection" rows, report "test" rows.
- targets[t] is what should follow tokens[:t + 1], as in a language model; the row itself need not go on with it.
- Formal languages ask for the SET of symbols that may come next. A set is one target, a token of its own, which no
  input holds: so a model with one softmax learns it, and that token is right if every label of the set is.
  `Language.allowed(targets)` gives the labels as booleans.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable
from itertools import islice, product
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from settings import require

SPLITS = ("train", "selection", "test")
NOTHING = -100  # the target where nothing is asked
TASKS: dict[str, type[Task]] = {}

Row = tuple[np.ndarray, np.ndarray]  # tokens and targets (length,)


def empty(length: int) -> Row:
    return np.zeros(length, np.int64), np.full(length, NOTHING)


def asking(stream: np.ndarray, answers: np.ndarray) -> Row:
    """The row in which those tokens of a stream that `answers` marks are asked for, each just before it is shown."""
    return stream[:-1], np.where(answers, stream, NOTHING)[1:]


class Task:
    """A task with its options, which are attributes. Rows of `length` tokens, each one of `vocab_size`."""

    name: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}  # with their defaults; a subclass names its own, and itself, where it begins
    examples = 0  # training goes round in so many rows; 0: all are different
    whole: ClassVar[bool] = False  # a row is right or wrong as a whole: "accuracy" counts rows, not positions

    def __init_subclass__(cls, name: str = "", **options: Any):
        cls.name, cls.options = name, cls.options | options
        if name:
            TASKS[name] = cls

    def __init__(self, **options: Any):
        options = self.options | options
        vars(self).update(options)
        self.spec = ",".join([self.name, *(f"{name}={value}" for name, value in options.items())])
        for name, default in self.options.items():
            if isinstance(default, float):  # a part of a whole
                least = min(default, 0)
                require(least <= options[name] <= 1, f"{name} is {options[name]}; allowed: {least:g} to 1")
            elif isinstance(default, int):
                self.need(**{name: 0 if name == "examples" else min(default, 1)})
        self.vocab_size = sum(self.kinds().values())
        self.length = len(self.row("train", 0, 0)[0])  # a row for trial: where options allow none, `draw` says so

    def need(self, **least: int) -> None:
        """ValueError for options that are less than what others need."""
        for name, n in least.items():
            require(getattr(self, name) >= n, f"{name} is {getattr(self, name)}; here it must be at least {n}")

    def kinds(self) -> dict[str, int]:
        """What tokens are called, in the order of their numbers, and how many of a kind there are."""
        return {"": self.vocab}

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        """A row for this split, or for another one (see `row`). ValueError for options that do not go together."""
        raise NotImplementedError

    def split_of(self, tokens: np.ndarray) -> str:
        """The only split in which a row with these tokens occurs. Selection and test have an eighth of all each."""
        return {0: "test", 1: "selection"}.get(zlib.crc32(tokens.tobytes()) % 8, "train")

    def row(self, split: str, seed: int, i: int) -> Row:
        i = i % self.examples if split == "train" and self.examples else i
        rng = np.random.default_rng((seed, SPLITS.index(split), i))
        for _ in range(1000):
            tokens, targets = self.draw(rng, split, i)
            if self.split_of(tokens) == split:
                return tokens, targets
        raise ValueError(f"{self.spec} has too few rows for three splits; give it more kinds of tokens, or longer rows")

    def rows(self, split: str, seed: int, begin: int, n: int) -> tuple[Tensor, Tensor]:
        """Rows begin to begin + n: tokens and targets (n, length), int64; a language's test rows are `longer` long."""
        require(split in SPLITS, f"split is {split!r}; allowed: {', '.join(SPLITS)}")
        require(n >= 1, f"rows {begin} to {begin + n}; give at least one")
        made = [self.row(split, seed, i) for i in range(begin, begin + n)]
        tokens, targets = (torch.from_numpy(np.stack(part)) for part in zip(*made))
        return tokens, targets

    def parts(self, asked: Tensor) -> dict[str, Tensor]:
        """Places (n, length) whose accuracy is told apart, by name."""
        return {}

    def counts(self, answers: Tensor, targets: Tensor) -> dict[str, tuple[int, int]]:
        """How many of the answers (n, length) are right, and of how many, by name. Counts of batches may be added."""
        asked = targets != NOTHING
        right, parts = asked & (answers == targets), {"accuracy": torch.ones_like(asked)} | self.parts(asked)
        if self.whole:
            right, asked = (right == asked).all(1), asked.any(1)
            parts = {name: part.any(1) for name, part in parts.items()}
        return {name: ((right & part).sum().item(), (asked & part).sum().item()) for name, part in parts.items()}

    def scores(self, logits: Tensor, targets: Tensor, tokens: Tensor) -> dict[str, float]:
        """Percent of the likeliest tokens that are right, by name, "accuracy" first."""
        return percent(self.counts(logits.argmax(-1), targets))

    def word(self, token: int) -> str:
        """A token as people are shown it."""
        names = (kind if count == 1 else f"{kind}{i}" for kind, count in self.kinds().items() for i in range(count))
        return next(islice(names, token, None), "?")  # models may have larger vocabularies

    def show(self, tokens: Tensor, targets: Tensor, answers: Tensor) -> str:
        """A row (length,) as text: in brackets what was answered, and what should have been."""
        shown = []
        for token, target, answer in zip(tokens.tolist(), targets.tolist(), answers.tolist()):
            shown.append(self.word(token))
            if target != NOTHING:
                shown.append(f"[{self.word(answer)}{'' if answer == target else f', not {self.word(target)}'}]")
        return " ".join(shown)


def percent(counts: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Counts as percent, without names under which nothing is asked."""
    return {name: 100 * right / asked for name, (right, asked) in counts.items() if asked}


# ---- Recall in context ----


class MQAR(Task, name="mqar", length=64, pairs=8, vocab=128, filler="random", power=0.01):
    """Multi-query associative recall (Zoology, Arora et al. 2023): pairs, then each key once, near by or far behind.

    The queries' places follow a power law, of exponent `power` - 1. `filler` is what stands between them. Zoology's
    generator, and so the default, takes "random" tokens. Of a small vocabulary many are keys of the row, and what
    follows them is no value of theirs: a memory in which the latest pair wins then fails by the task's definition.
    "values" are tokens that are never keys; "nothing" is token 0.
    """

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        self.need(vocab=2 * self.pairs + 2, length=4 * self.pairs)
        half, begin, room = self.vocab // 2, 2 * self.pairs, self.length // 2 - self.pairs
        fillers = {"random": (0, self.vocab), "values": (half, self.vocab), "nothing": (0, 1)}
        require(self.filler in fillers, f"filler is {self.filler!r}; allowed: {', '.join(fillers)}")
        tokens, targets = empty(self.length)
        keys = rng.choice(np.arange(1, half), self.pairs, replace=False)
        values = half + rng.choice(half, self.pairs, replace=False)
        tokens[0:begin:2], tokens[1:begin:2] = keys, values
        tokens[begin:] = rng.integers(*fillers[self.filler], size=self.length - begin)
        law = np.arange(1, room + 1) ** (self.power - 1)
        at = begin + 2 * rng.choice(room, self.pairs, replace=False, p=law / law.sum())
        tokens[at], targets[at] = keys, values
        return tokens, targets


class Recall(Task, name="recall", length=32, pairs=4, vocab=32):
    """Dense recall: pairs, then random ones of their keys, each followed by its value; every other token asks."""

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        self.need(vocab=2 * self.pairs, length=2 * self.pairs + 1)
        half, n = self.vocab // 2, self.length // 2 + 1
        keys, values = (first + rng.choice(half, self.pairs, replace=False) for first in (0, half))
        shown = np.append(np.arange(self.pairs), rng.integers(self.pairs, size=n - self.pairs))
        stream = np.stack([keys[shown], values[shown]], 1).ravel()[: self.length + 1]
        return asking(stream, (stream >= half) & (np.arange(len(stream)) > 2 * self.pairs))


# ---- MAD (Poli et al. 2024) in its basic settings; training asks what MAD's test asks ----


class InContextRecall(Task, name="in-context-recall", pairs=64, vocab=16, noise=0.0, noise_vocab=0, examples=12800):
    """Key-value pairs, drawn again and again from a map of the row's own; a key that has been there asks for its value.

    In place of a part `noise` of the pairs stand two of the last `noise_vocab` tokens. The last value is not shown.
    """

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        self.need(pairs=2, vocab=self.noise_vocab + 2, noise_vocab=int(self.noise > 0))
        plain = self.vocab - self.noise_vocab
        noisy = rng.random(self.pairs) < self.noise
        noisy[[rng.integers(self.pairs - 1), -1]] = False  # some pair, and the last, which asks for one that was there
        keys = rng.integers(plain // 2, size=self.pairs)
        keys[-1] = rng.choice(keys[:-1][~noisy[:-1]])
        pairs = np.stack([keys, rng.integers(plain // 2, plain, size=plain // 2)[keys]], 1)
        pairs[noisy] = rng.integers(plain, max(self.vocab, plain + 1), size=(noisy.sum(), 2))
        answers = np.stack([0 * noisy, ~noisy], 1)
        answers[np.unique(pairs[:, 0], return_index=True)[1]] = 0  # where a key comes for the first time
        return asking(pairs.ravel(), answers.ravel())


class NoisyRecall(InContextRecall, name="noisy-recall", vocab=32, noise=0.2, noise_vocab=16):
    """In-context recall with noise for a fifth of the pairs."""


class FuzzyRecall(Task, name="fuzzy-recall", length=128, vocab=16, motif=3, examples=12800):
    """In-context recall with keys and values of 1 to `motif` different tokens; outside training all keys have `motif`.

    Every token of a value is asked for, after those before it. The last token of the vocabulary fills up in front.
    """

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        self.need(vocab=2 * self.motif + 1, length=4 * self.motif)
        half, pad = (self.vocab - 1) // 2, self.vocab - 1
        value_of: dict[tuple, tuple] = {}

        def key() -> tuple:
            size, value_size = rng.integers(1, self.motif + 1, size=2)
            found = tuple(rng.permutation(half)[: size if split == "train" else self.motif])
            value_of.setdefault(found, tuple(half + rng.permutation(pad - half)[:value_size]))
            return found

        probe, keys = key(), []  # the probe stands somewhere, and at the end
        left = self.length + 1 - 2 * len(probe + value_of[probe])
        while left >= 2 * self.motif:
            keys.append(key())
            left -= len(keys[-1] + value_of[keys[-1]])
        keys.insert(rng.integers(len(keys) + 1), probe)
        stream, answers, seen = [pad] * left, [False] * left, set()
        for found in [*keys, probe]:
            stream += found + value_of[found]
            answers += [False] * len(found) + [found in seen] * len(value_of[found])
            seen.add(found)
        return asking(np.array(stream), np.array(answers))


class SelectiveCopying(Task, name="selective-copying", length=256, vocab=16, copy=16, examples=12800):
    """Symbols among blanks, a sign to copy, then blanks, at which the symbols are asked for in their order."""

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        self.need(vocab=3, length=2 * self.copy + 1)
        tokens, targets = empty(self.length)
        symbols, sign = rng.integers(self.vocab - 2, size=self.copy), self.length - self.copy - 1
        tokens[:] = self.vocab - 2
        tokens[np.sort(rng.choice(sign, self.copy, replace=False))] = symbols
        tokens[sign], targets[sign + 1 :] = self.vocab - 1, symbols
        return tokens, targets


class Compression(Task, name="compression", symbols=31, vocab=16, examples=12800):
    """Random symbols, a sign, then the numbers of their places: each asks for the symbol that stood there.

    In MAD a network of its own reads every symbol from one vector, the model's output at the sign, and from its place.
    Here the model reads, and its state must hold the symbols: Transformers, whose state is all tokens, have it easier.
    """

    def kinds(self) -> dict[str, int]:
        return {"": self.vocab - 1, "=": 1, "@": self.symbols}

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        self.need(vocab=3)
        symbols = rng.integers(self.vocab - 1, size=self.symbols)
        tokens = np.append(symbols, self.vocab - 1 + np.arange(self.symbols + 1))
        return tokens, np.append(np.full(self.symbols + 1, NOTHING), symbols)


class Memorisation(Task, name="memorisation", length=32, vocab=256, map=0, examples=256):
    """Keys, each followed by a sign that asks for its value in a map that all rows share and none shows.

    Weights must learn it. `map` is its number: training and test need the same one.
    """

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        self.need(vocab=3, length=2)
        sign, half = self.vocab - 1, (self.vocab - 1) // 2
        tokens, targets = empty(self.length)
        value_of = half + np.random.default_rng(self.map).permutation(sign - half)
        tokens[0::2], tokens[1::2] = rng.integers(half, size=(self.length + 1) // 2), sign
        targets[1::2] = value_of[tokens[: self.length - 1 : 2]]
        return tokens, targets


# ---- Formal languages (Bhattamishra et al. 2020) ----


def even_ones(rng: Generator, n: int) -> np.ndarray:
    bits = rng.integers(2, size=n)
    bits[-1] = bits[:-1].sum() % 2
    return bits


def shuffled_brackets(rng: Generator, n: int) -> np.ndarray:
    string, unclosed = [], [0, 0]
    for left in range(2 * n, 0, -1):
        closing = [2 * kind + 1 for kind in (0, 1) if unclosed[kind]]
        string.append(int(rng.choice(closing + [0, 2] * (sum(unclosed) < left))))
        unclosed[string[-1] // 2] += 1 - 2 * (string[-1] % 2)
    return np.array(string)


class Rules(NamedTuple):
    symbols: str
    unit: int  # lengths are its multiples
    string: Callable[[Generator, int], np.ndarray]  # a string of n units, its symbols by number
    after: Callable[..., str]  # which symbols may follow a part with so many of each symbol, "$" if it may end there
    single: bool = True  # all strings of a length are one


LANGUAGES = {
    "parity": Rules("01", 1, even_ones, lambda zeros, ones: "01" + "$" * (ones % 2 == 0), single=False),
    "aa": Rules("a", 2, lambda _, n: np.repeat(0, 2 * n), lambda a: "a" + "$" * (a % 2 == 0)),
    "abab": Rules(
        "ab", 4, lambda _, n: np.tile([0, 1], 2 * n), lambda a, b: "b" if a > b else "a" + "$" * (a % 2 == 0)
    ),
    "anbn": Rules(
        "ab", 2, lambda _, n: np.repeat([0, 1], n), lambda a, b: "ab" if not b else "b" if b < a else "$"
    ),
    "anbncn": Rules(
        "abc", 3, lambda _, n: np.repeat([0, 1, 2], n),
        lambda a, b, c: "ab" if not b else "b" if b < a else "c" if c < b else "$",
    ),
    "shuffle-2": Rules(
        "()[]", 2, shuffled_brackets,
        lambda a, b, c, d: "([" + ")" * (a > b) + "]" * (c > d) + "$" * (a <= b and c <= d), single=False,
    ),
}  # fmt: skip


class Language(Task, longest=40, longer=80):
    """A string of a language. Asked after every symbol: which may come next, and may the string end ("$")?

    Tokens: 0, which fills up behind the string, the symbols, the sets. A string counts only if every set is right.
    Strings have up to `longest` symbols; in every other row of the test more, up to `longer`. Where all strings of a
    length are one, some lengths are kept for selection and test.
    """

    whole = True
    language: ClassVar[Rules]

    def __init__(self, **options: Any):
        symbols, after = self.language.symbols, self.language.after
        self.sets = sorted({after(*counts) for counts in product(range(4), repeat=len(symbols))})
        super().__init__(**options)

    def kinds(self) -> dict[str, int]:
        return dict.fromkeys([".", *self.language.symbols, *(f"{{{found}}}" for found in self.sets)], 1)

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        symbols, unit, make, after, _ = self.language
        self.need(longest=8 * unit, longer=self.longest + unit)
        low, high = (self.longest, self.longer) if split == "test" and i % 2 else (0, self.longest)
        tokens, targets = empty(self.longer if split == "test" else self.longest)
        string = make(rng, rng.integers(low // unit, high // unit) + 1)
        counts = (string[:, None] == np.arange(len(symbols))).cumsum(0)
        tokens[: len(string)] = 1 + string
        targets[: len(string)] = [1 + len(symbols) + self.sets.index(after(*so_far)) for so_far in counts.tolist()]
        return tokens, targets

    def split_of(self, tokens: np.ndarray) -> str:
        string = tokens[tokens > 0]
        if len(string) > self.longest:
            return "test"
        if not self.language.single:
            return super().split_of(string)
        below = (self.longest - len(string)) // self.language.unit  # the longest string, 0 below, is for training
        return "test" if below % 4 == 2 else "selection" if below % 8 == 4 else "train"

    def parts(self, asked: Tensor) -> dict[str, Tensor]:
        long = (asked.sum(1, keepdim=True) > self.longest).expand_as(asked)
        return {f"1-{self.longest}": ~long, f"{self.longest + 1}-{self.longer}": long}

    def allowed(self, targets: Tensor) -> Tensor:
        """Targets (n, length) as labels (n, length, symbols + 1), the last for "may end"; False where none is."""
        symbols = self.language.symbols
        labels = torch.tensor([[symbol in found for symbol in symbols + "$"] for found in (*self.sets, "")])
        return labels[torch.where(targets == NOTHING, 0, targets - len(symbols)) - 1]


for name, rules in LANGUAGES.items():
    type("Language", (Language,), {"language": rules}, name=name)


# ---- A needle, languages and facts in a stream ----

FILLER = b"Rain falls on the hills. The river runs down to the sea. Days come and nights go. "


class Passkey(Task, name="passkey", length=64, digits=1, depth=-1.0):
    """English as bytes that hides a key of some digits and asks for it at the end. All its digits must be right.

    The key stands between two words after a part `depth` of the text; -1: anywhere.
    """

    whole, vocab = True, 256

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        key = b"%0*d" % (self.digits, rng.integers(10**self.digits))
        needle, question = b"The key is %s. " % key, b"What is the key? The key is %s" % key
        self.need(length=len(needle + question) - 1)
        room = self.length + 1 - len(needle + question)  # one more: the last digit is asked for and not shown
        start = rng.integers(len(FILLER))
        filler = (FILLER * (2 + room // len(FILLER)))[start : start + room]
        gaps = np.append(0, 1 + np.flatnonzero(np.frombuffer(filler, np.uint8) == ord(" ")))
        at = rng.choice(gaps) if self.depth < 0 else gaps[np.abs(gaps - self.depth * room).argmin()]
        text = np.frombuffer(filler[:at] + needle + filler[at:] + question, np.uint8).astype(np.int64)
        return asking(text, np.arange(len(text)) >= len(text) - self.digits)

    def word(self, token: int) -> str:
        return chr(token % 256)


class TwoLanguages(Task, name="two-languages", words=8, lessons=2):
    """Two new languages, learnt in context one after the other: is the first still there after the second?

    A language gives each of its `words` a meaning, drawn for the row. A lesson is all words in some order, each
    followed by its meaning; from the second lesson in a language on, words ask for it. There are `lessons` in the first
    language, as many in the second, and another one in the first.
    """

    def kinds(self) -> dict[str, int]:
        return {"a": self.words, "b": self.words, "m": self.words}

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        self.need(lessons=2)
        n, languages = self.words, np.repeat([0, 1, 0], [self.lessons, self.lessons, 1])
        meanings = np.stack([rng.permutation(n), rng.permutation(n)])
        words = np.stack([rng.permutation(n) for _ in languages])  # (lessons, words)
        tokens = np.stack([words + n * languages[:, None], 2 * n + meanings[languages[:, None], words]], -1)
        targets = np.full_like(tokens, NOTHING)
        targets[:, :, 0] = tokens[:, :, 1]
        targets[[0, self.lessons]] = NOTHING
        return tokens.ravel(), targets.ravel()

    def parts(self, asked: Tensor) -> dict[str, Tensor]:
        lesson = torch.arange(self.length, device=asked.device).expand_as(asked) // (2 * self.words)
        asked_in = {"first": self.lessons - 1, "second": 2 * self.lessons - 1, "first after second": 2 * self.lessons}
        return {name: lesson == n for name, n in asked_in.items()}


class Facts(Task, name="facts", length=128, facts=6, questions=1, hops=1, people=6, places=8, things=6, filler=64):
    """Facts in filler, as in BABILong: who went where, in three tokens each; at the end: where is somebody?

    The latest one holds (bAbI's first task). With `hops` 2 up to a third of the facts are who took what, and things are
    asked for: they are where those are who took them (its second task). Questions before the last are answered.
    Rows of a million tokens are made in some tenths of a second, and no length changes the vocabulary.
    """

    def kinds(self) -> dict[str, int]:
        named = {"person": self.people, "place": self.places, "thing": self.things, "filler": self.filler}
        return {"where": 1, "went": 1, "took": 1} | named

    def draw(self, rng: Generator, split: str, i: int) -> Row:
        require(self.hops < 3, f"hops is {self.hops}; allowed: 1, 2")
        self.need(facts=self.hops, length=3 * (self.facts + self.questions))
        where, went, took, people = range(4)
        places = people + self.people
        things = places + self.places
        takes = min(self.things, max(1, self.facts // 3)) if self.hops == 2 else 0
        goers = rng.integers(people, places, self.facts - takes)
        takers, taken = rng.choice(goers, takes), things + rng.choice(self.things, takes, replace=False)
        facts = [(who, went, rng.integers(places, things)) for who in goers]
        facts = rng.permutation(facts + [(who, took, thing) for who, thing in zip(takers, taken)]).tolist()
        place_of = {who: place for who, verb, place in facts if verb == went}  # the latest of each
        place_of |= {thing: place_of[who] for who, verb, thing in facts if verb == took}
        subjects = np.resize(rng.permutation(taken if takes else np.unique(goers)), self.questions)
        questions = np.array([(where, subject, place_of[subject]) for subject in subjects]).ravel()
        room = self.length + 1 - len(questions)  # the last answer is not shown
        stream = np.append(rng.integers(self.vocab_size - self.filler, self.vocab_size, size=room), questions)
        begins = np.sort(rng.choice(room - 2 * self.facts, self.facts, replace=False)) + 2 * np.arange(self.facts)
        stream[begins[:, None] + np.arange(3)] = facts
        return asking(stream, (np.arange(len(stream)) >= room) & (stream >= places) & (stream < things))


# ---- By name ----


def make(spec: str) -> Task:
    """The task that a text such as "mqar,pairs=8,vocab=128" names. ValueError says what is wrong in it, and the fix."""
    name, *given = spec.split(",")
    close = difflib.get_close_matches(name, TASKS, 1)
    hint = f"did you mean {close[0]}?" if close else "give one of those there are:"
    require(name in TASKS, f"no task is called {name!r}; {hint} {', '.join(TASKS)}")
    defaults, options = TASKS[name].options, {}
    listed = ", ".join(f"{option}={default}" for option, default in defaults.items())
    try:
        for part in given:
            option, _, text = part.partition("=")
            require(option in defaults, f"{part!r} is no option; {name} has: {listed}")
            kind = type(defaults[option])
            try:
                options[option] = kind(text)
            except ValueError:
                number = {int: "a whole number", float: "a number"}[kind]
                raise ValueError(f"{option} is {text!r}; give {number}, as in {option}={defaults[option]}") from None
        return TASKS[name](**options)
    except ValueError as e:
        raise ValueError(f"task {spec}: {e}") from None
