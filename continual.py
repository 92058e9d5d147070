"""One group of classes, or one domain, after the other: what a model still knows of the first (the paper's Fig. 6).

    labelled, make_stages   a set of labelled texts as a stream of stages
    Learner                 a model that meets them by one of the methods, and is asked for labels in between

Methods: "in context" carries the memories only, "CMS, k levels" also what the first k levels of the CMS learn; both read
on from stage to stage. "fine-tuning" and "EWC" change the weights and are asked without context. All meet the same
examples in the same order, and equally often.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import hope
from data import UserError, explained, extra, try_hub

DEFAULTS = dict(
    set="synthetic", classes=2, shots=16, tests=16, text="", label="", domain="", lr=1e-3, ewc=100.0,
)  # fmt: skip
# Labelled sets of the hub: name, config, and the fields of text and label unless others are given. DBpedia has 9 classes
# as l1, the paper's 70 as l2, 219 as l3.
HUB = {
    "clinc150": ("clinc/clinc_oos", "plus", "text", "intent"),
    "banking77": ("mteb/banking77", None, "text", "label_text"),
    "dbpedia": ("DeveloperOats/DBPedia_Classes", None, "text", "l2"),
}
Labelled = tuple[str, str]  # a text and its label


class Stage(NamedTuple):
    """What the model meets at one time."""

    train: list[Labelled]
    test: list[Labelled]


def synthetic() -> dict[str, list[Labelled]]:
    """A class is a word; its examples have a quarter of its letters replaced by random ones."""
    rng, found = np.random.default_rng(0), {}
    for label in "ABCDEFGH":
        word, wrong = rng.integers(16, size=12), rng.random((200, 12)) < 0.25
        texts = np.where(wrong, rng.integers(16, size=wrong.shape), word) + ord("a")
        found[label] = [("".join(map(chr, text)), label) for text in texts]
    return found


def digits() -> dict[str, list[Labelled]]:
    """scikit-learn's handwritten digits: 64 letters, a to i for the ink in a pixel."""
    found: dict[str, list[Labelled]] = {}
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('set=digits needs scikit-learn; run: pip install "nested-learning-hope[eval]"') from None
    images = load_digits()
    for image, label in zip(images.data.astype(int) // 2, images.target):
        found.setdefault(str(label), []).append(("".join(chr(ord("a") + level) for level in image), str(label)))
    return found


def labelled(o: dict[str, Any]) -> dict[str, list[Labelled]]:
    """Examples of a set, by class or, where a field is named for it, by domain."""
    if o["set"] in ("synthetic", "digits"):
        return {"synthetic": synthetic, "digits": digits}[o["set"]]()
    name = o["set"]
    where, config, *fields = HUB.get(name, (name, None, "text", "label"))
    text, label = o["text"] or fields[0], o["label"] or fields[1]
    if name.endswith((".jsonl", ".json")):
        with explained(f"set={name} cannot be read", "give a file with a JSON object in every line"), open(name) as f:
            rows = [json.loads(line) for line in f if line.strip()]
    else:
        fix = f"give synthetic, digits, {', '.join(HUB)}, a jsonl file, or a name of the hub and a network"
        with explained(f"set={name} must be downloaded once, and that failed", fix, Exception):
            datasets = extra("datasets", f"set={name}")
            try_hub()
            rows = datasets.load_dataset(where, config, split="train")
            names = getattr(rows.features.get(label), "names", None)
            rows = [row | {label: names[row[label]]} for row in rows] if names else rows
    group, found = o["domain"] or label, {}
    for row in rows:
        if missing := {text, label, group} - set(row):
            fix = f"there are: {', '.join(row)}; name it, as in text=NAME"
            raise UserError(f"set={name} has a row without the field {min(missing)}, {fix}")
        found.setdefault(str(row[group]), []).append((str(row[text]), str(row[label])))
    return found


def make_stages(o: dict[str, Any], seed: int) -> list[Stage]:
    """The stream: `classes` of them at a time, in an order of this seed; of each `shots` examples to meet."""
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
        given = (
            f"set={o['set']} has {len(groups)} classes or domains of {min(map(len, groups.values()))} or more examples"
        )
        raise UserError(f"{given}, too few for two stages and their tests; give fewer classes= at a time, fewer shots=")
    return stages


def summary(rows: list[list[float]]) -> tuple[list[float], float]:
    """Of the accuracies on all stages met so far, after each: their means; and how much of the best there was is lost."""
    lost = [max(row[j] for row in rows[j:-1]) - rows[-1][j] for j in range(len(rows) - 1)]
    return [float(np.mean(row)) for row in rows], float(np.mean(lost))


def missing_levels(n: int) -> str:
    has = f"this model's CMS learns in context at {n} of the paper's 3 levels, and no more are measured"
    return f"{has}; train one with three finite clocks, --cms 16,64,256,inf"


class Learner:
    """A model that meets stages by `method`, each example `steps` times.

    make_reader(model, context) is an evaluation.Reader that learns as the method says.
    """

    def __init__(
        self, method: str, subject: Any, make_reader: Callable, context: int, o: dict[str, Any], steps: int
    ):  # fmt: skip
        self.method, self.o, self.steps, self.context = method, o, steps, context
        self.tuned = method in ("fine-tuning", "EWC")
        self.model = copy.deepcopy(subject.model) if self.tuned else subject.model
        self.make_reader, self.start, self.tokenizer = make_reader, subject.start, subject.tokenizer
        self.asked = make_reader(self.model, 0)
        self.state = None if self.tuned else self.model.init_state(1)
        self.anchors: list[tuple[list[Tensor], list[Tensor]]] = []  # EWC: weights after a stage, and their Fisher
        self.optimizer = torch.optim.AdamW(self.model.parameters(), o["lr"], weight_decay=0.0)

    def tokens(self, text: str, label: str) -> tuple[list[int], list[int]]:
        """A question and its answer."""
        question, answer = (self.tokenizer.encode(part).tolist() for part in (f"{text} =", f" {label}\n"))
        return [*self.start, *question], answer

    def accuracies(self, stages: list[Stage], seed: int) -> list[list[float]]:
        """After each stage the accuracy (%) on those met so far, in their order."""
        torch.manual_seed(seed)
        room = max(len(part) for stage in stages for example in stage.test for part in self.tokens(*example))
        reader = self.make_reader(self.model, max(1, self.context - 2 * room) if self.context else 0)
        labels, rows = [], []
        for k, stage in enumerate(stages):
            self.meet(stage.train, reader)
            labels = sorted({*labels, *(label for _, label in stage.train)})
            rows.append([self.accuracy(met.test, labels) for met in stages[: k + 1]])
        return rows

    def meet(self, examples: list[Labelled], reader: Any) -> None:
        for _ in range(self.steps):
            if self.tuned:
                for i in range(0, len(examples), 8):
                    self.step(examples[i : i + 8])
                continue
            parts = [part for example in examples for part in self.tokens(*example)]
            tokens = reader.tensor([sum(parts, [])])
            targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
            for _, self.state in reader.pieces(tokens, targets if reader.memorize else None, self.state):
                pass
        if self.method == "EWC":
            self.anchor(examples)

    def loss(self, examples: list[Labelled]) -> Tensor:
        """Nats a token of the answers."""
        pairs = [self.tokens(*example) for example in examples]
        longest = max(len(question) + len(answer) for question, answer in pairs)
        tokens, targets = np.zeros((len(pairs), longest - 1), np.int64), np.full((len(pairs), longest - 1), -100)
        for row, (question, answer) in enumerate(pairs):
            tokens[row, : len(question) + len(answer) - 1] = [*question, *answer[:-1]]
            targets[row, len(question) - 1 : len(question) + len(answer) - 1] = answer
        tokens, targets = self.asked.tensor(tokens), self.asked.tensor(targets)
        return hope.token_loss(self.model(tokens)[0], targets).sum() / (targets != -100).sum()

    @torch.enable_grad()
    def step(self, examples: list[Labelled]) -> None:
        loss = self.loss(examples)
        for weights, fisher in self.anchors:
            apart = (f * (p - w) ** 2 for p, w, f in zip(self.model.parameters(), weights, fisher))
            loss = loss + self.o["ewc"] / 2 * sum(z.sum() for z in apart)
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
        pairs = [self.tokens(text, label) for text, _ in examples for label in labels]
        scores = torch.zeros(len(pairs))
        for i, (likelihood, _) in self.asked.loglikelihoods(pairs, self.state or self.model.init_state(1)):
            scores[i] = likelihood
        best = scores.view(len(examples), len(labels)).argmax(1).tolist()
        return 100 * float(np.mean([labels[j] == label for j, (_, label) in zip(best, examples)]))
