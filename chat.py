"""Talk to a model that learns from what it reads: the loop behind `train.py --chat RUN`.

One stream of tokens is carried from turn to turn in a `hope.HopeState`, and that state is all the history there is. What
you write is observed, so memories and CMS learn from it; what the model says is only read. A model with a chat template,
as instruct models have, is asked in that form; any other goes on with your text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import hope
from hope import Hope, HopeState, MemoryState

try:
    import readline  # noqa: F401  with it, input() has editing and a history
except ImportError:  # on Windows
    pass

HELP = """\
/read FILE    learn from a text file
/forget       start anew: nothing read, nothing said
/save STATE   write what was learnt to a file; it belongs to these weights
/load STATE   go on from such a file
/levels       who learns what and how often, and how far it has moved
/help         this list
Ctrl-C stops an answer, Ctrl-D leaves"""
PIECE = 512  # tokens between two moves of the progress bar


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
        self.talking = False  # a conversation has begun
        self.heard: dict[Path, float] = {}  # bits per byte of files when they were read last
        return "forgotten"

    def observe(self, tokens: list[int], bar: Any = None) -> list[float]:
        """Learn from tokens that follow; returns nats for each, but for the first of a stream."""
        nats: list[float] = []
        with torch.no_grad():
            for piece in self._batch(tokens).split(PIECE, 1):
                losses, self.state = self.model.observe(piece, state=self.state, reduction="none")
                nats += losses[0].tolist()
                if bar is not None:
                    bar.update(piece.shape[1])
        return nats

    def _batch(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], dtype=torch.long, device=self.model.embed.weight.device)

    @property
    def between(self) -> bool:
        """The last token is the one that stands between two documents."""
        return self.state is not None and self.state.pending.item() == self.tokenizer.eot

    def read(self, name: str) -> str:
        """Learn from a file, a document by itself, and say how well it was predicted."""
        path, eot = Path(name).expanduser().resolve(), [self.tokenizer.eot]
        tokens = self.tokenizer.encode(path.read_text(encoding="utf-8")).tolist()
        if not tokens:
            raise ValueError(f"{name} is empty")
        tokens = (eot if not self.between else []) + tokens + eot
        with tqdm(total=len(tokens), desc="reading", unit=" tokens", leave=False, disable=None) as bar:
            nats = self.observe(tokens, bar)
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
        self.observe(self.turn(text))
        self.talking, said, shown = True, [], 0
        stream = self.model.stream(self._batch([]), state=self.state, stop=[self.tokenizer.eot], **self.drawn)
        for new, self.state in islice(stream, self.max_new_tokens):
            if self.between:
                break
            said.append(new.item())
            whole = self.tokenizer.decode(said).rstrip("\ufffd")  # at the end it may be the first bytes of a letter
            yield whole[shown:]
            shown = len(whole)
        yield self.tokenizer.decode(said)[shown:]

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
        lines, state = [str(hope.levels(self.model))], self.state
        if state is None:
            return "\n".join([*lines, "nothing was read yet"])
        lines.append(f"\n{state.observed:,} tokens observed; moved since, as a part of the start state's norm:")
        start = self.model.init_state(1)
        memories = [
            (s.main.now, t.main.now) for s, t in zip(state.memories, start.memories) if isinstance(s, MemoryState)
        ]
        if memories:
            lines.append(f"memories  {moved(memories):.3f}")
        for i in self.model.config.written:
            weights = [block.cms.levels[i].matrices for block in self.model.blocks]
            deltas = [[w + d[0] for w, d in zip(ws, fast[i].delta)] for ws, fast in zip(weights, state.cms)]
            lines.append(f"CMS, C = {self.model.config.cms[i]:g}  {moved([*zip(deltas, weights)]):.3f}")
        return "\n".join(lines)

    def command(self, line: str) -> str:
        """Do what a line that begins with / says; returns what is to be shown."""
        name, _, given = line[1:].partition(" ")
        with_file = {"read": self.read, "save": self.save, "load": self.load}
        without = {"forget": self.forget, "levels": self.levels, "help": lambda: HELP}
        if name in with_file and not given.strip():
            raise ValueError(f"/{name} what? Give a file, as in: /{name} notes.txt")
        if name not in with_file | without:
            raise ValueError(f"no command /{name}; /help lists them")
        return with_file[name](given.strip()) if name in with_file else without[name]()


def moved(pairs: list[tuple[list[Tensor], list[Tensor]]]) -> float:
    """|now - start| / |start| over all tensors of (now, start)."""
    square = lambda tensors: sum(z.detach().float().square().sum().item() for z in tensors)
    differences = [a - b for now, start in pairs for a, b in zip(now, start)]
    return math.sqrt(square(differences) / max(1e-30, square(b for _, start in pairs for b in start)))


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
            print(printable(" ".join(str(e).split())))
