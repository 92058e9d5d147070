"""lm-evaluation-harness: a `Reader` of evaluation.py as a model of its, and its tasks as figures."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from data import UserError, reason, try_hub

for name in ("lm_eval", "datasets", "huggingface_hub", "nltk"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Model(TemplateLM):
    """Texts to tokens and back; all else is the reader's.

    start: tokens that every document begins with. ask(items, compute): `Results.ask` of evaluation.py, which remembers
    answers.
    """

    def __init__(self, reader: Any, start: list[int], ask: Callable):
        super().__init__()
        self.reader, self.start, self.ask = reader, start, ask

    @property
    def eot_token_id(self) -> int:
        return self.reader.tokenizer.eot

    @property
    def prefix_token_id(self) -> int:
        return self.start[0] if self.start else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.reader.tokenizer.encode(string).tolist()

    def document(self, tokens: Sequence[int]) -> list[int]:
        """The tokens, with what a document begins with in front."""
        n = len(self.start)
        return [*(() if [*tokens[:n]] == self.start else self.start), *tokens]

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [(self.document(context), continuation) for _, context, continuation in requests]
        compute = lambda left: self.reader.loglikelihoods([pairs[i] for i in left])
        return [tuple(answer) for answer in self.ask([["loglikelihood", *pair] for pair in pairs], compute)]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(request.args[0]) for request in requests]
        rows = [([self.prefix_token_id, *text][:-1], text) for text in texts]

        def compute(left: list[int]) -> Iterator[tuple[int, float]]:
            for i, losses in self.reader.losses([rows[i] for i in left]):
                yield i, -losses.double().sum().item()

        return self.ask([["rolling", text] for text in texts], compute)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        items = []
        for request in requests:
            text, how = request.args
            until = how.get("until") or []
            until = [end for end in ([until] if isinstance(until, str) else until) if end]
            temperature = how.get("temperature", 1.0) if how.get("do_sample") else 0.0
            settings = [until, how.get("max_gen_toks", 256), temperature]
            items.append(["generate", self.document(self.tok_encode(text)), settings])

        def compute(left: list[int]) -> Iterator[tuple[int, str]]:
            places_of: dict[str, list[int]] = {}
            for place, i in enumerate(left):
                places_of.setdefault(json.dumps(items[i][2]), []).append(place)
            for settings, places in places_of.items():
                prompts = [items[left[place]][1] for place in places]
                for i, text in self.reader.continuations(prompts, *json.loads(settings)):
                    yield places[i], text

        return self.ask(items, compute)


def find(name: str, include_path: str, metadata: dict[str, Any]) -> TaskManager | None:
    """What knows the task or group of this name. Tasks of one's own are looked through first, which takes less time."""
    for defaults in (False, True) if include_path else (True,):
        manager = TaskManager(include_path=include_path or None, include_defaults=defaults, metadata=metadata)
        if name in manager.all_tasks:
            return manager
    return None


def measure(model: Model, manager: TaskManager, name: str, **how: Any) -> list[tuple]:
    """Task, metric, value, standard error and number of samples of each figure; `how`: see lm_eval.simple_evaluate."""
    try_hub()
    try:
        loaded = manager.load([name])
    except Exception as e:  # of its many libraries
        named = re.search(r"'([\w.-]+/[\w.-]+)'", str(e))
        what = f"the data set {named[1]}" if named else "its data or a package"
        fix = "with a network it is downloaded once and then kept; a folder of that name is read instead"
        raise UserError(f"{name} needs {what}, which cannot be loaded ({reason(e)}); {fix}") from e
    group = loaded.get("groups", {}).get(name)
    chosen = [group] if group else [*loaded["tasks"].values()]
    quiet = dict(task_manager=manager, bootstrap_iters=1000, log_samples=False)
    found = lm_eval.simple_evaluate(model, tasks=chosen, **quiet, **how)
    figures = []
    for task, values in found["results"].items():
        n = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for full_name, value in values.items():
            metric, _, rule = full_name.partition(",")
            if isinstance(value, (int, float)) and rule and not metric.endswith("_stderr") and value != -1:
                error = values.get(f"{metric}_stderr,{rule}")
                shown = metric if rule == "none" else f"{metric} ({rule})"
                figures.append((task, shown, value, error if isinstance(error, float) else None, n))
    return figures
