"""Talk to a model that learns from what it reads: the loop behind `train.py --chat RUN`.

One stream is carried from turn to turn in a `hope.HopeState`, and that state is all the history there is. What you
write is observed, so memories and CMS learn from it; what the model says is only read. A model with a chat template,
as instruct models have, is asked in that form; any other goes on with your text. demo.py reads and says as this does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import hope
from hope import Hope, HopeState, MemoryState

with suppress(ImportError):  # on Windows
    import readline  # noqa: F401  with it, input() has editing and a history

HELP = """\
/read FILE    learn from a text file
/forget       start anew: nothing read, nothing said
/save STATE   write what was learnt to a file; it belongs to these weights
/load STATE   go on from such a file
/levels       who learns what and how often, and how far it has moved
/help         this list
Ctrl-C stops an answer, Ctrl-D leaves"""
PIECE = 512  # tokens read at once, between two moves of the progress bar
BAR = partial(tqdm, unit=" tokens", unit_scale=PIECE, leave=False, disable=None, delay=0.5)  # None: on terminals only


@torch.no_grad()
def read(
    model: Hope, tokens: Sequence[int], state: HopeState | None, bar: Callable = BAR, **how: Any
) -> tuple[list[float], HopeState]:
    """Learn from tokens that follow: nats for each, but for the first of a stream, and the state after them."""
    nats: list[float] = []
    for piece in bar(torch.tensor([tokens], device=model.embed.weight.device).split(PIECE, 1), desc="reading"):
        losses, state = model.observe(piece, state=state, reduction="none", **how)
        nats += losses[0].tolist()
    return nats, state


def say(
    model: Hope, tokenizer: Any, tokens: Sequence[int], most: int, state: HopeState | None = None, **how: Any
) -> Iterator[tuple[str, HopeState]]:
    """What a model says after tokens, up to the document's end or `most` tokens: whole letters, and the state there."""
    said, shown, begin = [], 0, torch.tensor([tokens], dtype=torch.long, device=model.embed.weight.device)
    for new, state in islice(model.stream(begin, state=state, stop=[tokenizer.eot], **how), most):
        said += [new.item()] * (new.item() != tokenizer.eot)
        whole = tokenizer.decode(said).rstrip("\ufffd")  # at the end it may be the first bytes of a letter
        yield whole[shown:], state
        shown = len(whole)
    yield tokenizer.decode(said)[shown:], state


def printable(text: str) -> str:
    r"""Control characters, which could play tricks on a terminal, as \x1b; line breaks and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def templated(hf: Any, text: str, first: bool) -> str:
    """A turn in the form of a tokenizer's chat template: up to where the answer begins; of a later turn, what it adds.

    That is found with an earlier question and answer that stand for any, since the state does not keep their text.
    """
    form = lambda messages, answer: hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    question, earlier = {"role": "user", "content": text}, [{"role": "user", "content": "?"}]
    if first:
        return form([question], True)
    both = form([*earlier, {"role": "assistant", "content": "!"}, question], True)
    return both.removeprefix(form(earlier, True)).removeprefix("!")  # the end of that answer, then the question


class Chat:
    """One stream: what was read and said so far is in `state`."""

    def __init__(self, model: Hope, tokenizer: Any, max_new_tokens: int = 300, **drawn: Any):
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.drawn = max_new_tokens, drawn  # temperature, top_k, top_p: see Hope.stream
        self.forget()

    def forget(self) -> str:
        self.state: HopeState | None = None
        self.talking, self.heard = False, {}  # whether a conversation has begun; bits per byte of files, read last
        return "forgotten"

    @property
    def between(self) -> bool:
        """The last token is the one that stands between two documents."""
        return self.state is not None and self.state.pending.item() == self.tokenizer.eot

    def read(self, name: str) -> str:
        """Learn from a file, a document by itself, and say how well it was predicted."""
        path, eot = Path(name).expanduser().resolve(), [self.tokenizer.eot]
        try:
            tokens = self.tokenizer.encode(path.read_text(encoding="utf-8")).tolist()
        except UnicodeDecodeError:
            raise ValueError(f"{name} is not text in UTF-8") from None
        if not tokens:
            raise ValueError(f"{name} is empty")
        tokens = (eot if not self.between else []) + tokens + eot
        nats, self.state = read(self.model, tokens, self.state)
        size = max(1, int(self.tokenizer.lengths[tokens].sum()))
        now, before = sum(nats) / math.log(2) / size, self.heard.get(path)
        self.heard[path] = now
        again = "" if before is None else f"; when it was read last, {before:.2f}"
        return f"read {size:,} bytes, {len(tokens):,} tokens, at {now:.2f} bits per byte{again}"

    def turn(self, text: str) -> list[int]:
        """The tokens by which a turn goes on with the stream."""
        hf, eot = getattr(self.tokenizer, "hf", None), self.tokenizer.eot
        if hf is not None and hf.chat_template:
            text = templated(hf, text, first=not self.talking)
            if self.between:  # the model has ended its answer itself
                text = text.removeprefix(hf.decode([eot]))
            return hf.encode(text, add_special_tokens=False)
        if self.state is not None and not self.between:
            text = "\n" + text
        return ([eot] if self.state is None else []) + self.tokenizer.encode(text).tolist()

    def answer(self, text: str) -> Iterator[str]:
        """Learn from a turn and answer it, piece by piece; the state stands after what was said so far."""
        _, self.state = read(self.model, self.turn(text), self.state)
        self.talking, most = True, self.max_new_tokens
        for piece, self.state in say(self.model, self.tokenizer, [], most, self.state, **self.drawn):
            yield piece

    def save(self, name: str) -> str:
        path = Path(name).expanduser()
        if self.state is None:
            raise ValueError("nothing was read or said yet")
        if path.exists():
            raise ValueError(f"{name} exists; give another name, or delete it")
        self.state.save(path, self.model)
        return f"{name}: what {self.state.observed:,} tokens have taught, {path.stat().st_size / 1e6:.1f} MB"

    def load(self, name: str) -> str:
        state = HopeState.load(Path(name).expanduser(), self.model)
        if state.pending is None or len(state.pending) != 1:
            raise ValueError(f"{name} is not a state of one stream that can go on; give one that /save made")
        self.forget()
        self.state, self.talking = state, True
        return f"{name}: goes on after {state.observed:,} observed tokens"

    def levels(self) -> str:
        """The table of levels, and how far those that are written in context have moved."""
        table, state, model = str(hope.levels(self.model)), self.state, self.model
        if state is None:
            return f"{table}\n\nnothing was read yet"
        moved: dict[str, list[tuple[Tensor, Tensor]]] = {}  # by how much, from where
        for block, memory, start, cms in zip(model.blocks, state.memories, model.init_state(1).memories, state.cms):
            if isinstance(memory, MemoryState):
                steps = [(now - was, was) for now, was in zip(memory.main.now, start.main.now)]
                moved.setdefault("memories", []).extend(steps)
            for i in model.config.written:
                steps = zip(cms[i].delta, block.cms.levels[i].matrices)
                moved.setdefault(f"CMS, C = {model.config.cms[i]:g}", []).extend(steps)
        norm = lambda tensors: torch.cat([z.detach().float().flatten() for z in tensors]).norm().item()
        rows = [f"{name:<16}{norm(d for d, _ in s) / norm(w for _, w in s):.3g}" for name, s in moved.items()]
        head = f"\n{state.observed:,} tokens observed; moved, in parts of the start state's norm:"
        return "\n".join([table, head, *rows])

    def command(self, line: str) -> str:
        """Do what a line that begins with / says; returns what is to be shown."""
        name, _, given = line[1:].partition(" ")
        if name in (without := {"forget": self.forget, "levels": self.levels, "help": lambda: HELP}):
            return without[name]()
        if name not in (with_file := {"read": self.read, "save": self.save, "load": self.load}):
            raise ValueError(f"no command /{name}; /help lists them")
        if not given.strip():
            raise ValueError(f"/{name} what? Give a file, as in: /{name} notes.txt")
        return with_file[name](given.strip())


def talk(model: Hope, tokenizer: Any, title: str, **how: Any) -> None:
    """The loop on a terminal; `how` as for `Chat`."""
    chat = Chat(model, tokenizer, **how)
    print(f"{title}\nIt learns from what you write. /help lists commands; Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            line = input("\n> ")
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("  Ctrl-D leaves", end="")
            continue
        try:
            if line.startswith("/"):
                print(printable(chat.command(line.strip())))
            elif line:
                for piece in chat.answer(line):
                    print(printable(piece), end="", flush=True)
                print()
        except KeyboardInterrupt:
            print("  (stopped)")
        except (OSError, ValueError, SafetensorError) as e:
            why = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.strerror else str(e)
            print(printable(" ".join(why.split())))
