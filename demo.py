"""A page on which a model reads a text and shows what surprised it: `python evaluation.py RUN --demo`.

    demo.launch(model, tokenizer)   serves it on 127.0.0.1 until Ctrl-C; needs gradio, and no network

Every token is coloured by its surprise, -log2 p in bits. Read the text twice, and the page shows what was learnt;
memory and every level of the CMS can be switched off. Sampling goes on from what was read, and changes nothing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch

import chat
from data import Tokenizer, extra
from hope import Hope, HopeState, Memory

MOST, MEMORY = 20_000, "memory"  # tokens of a text, at most; a switch
TEXT = """The memory reads what the memory wrote. A word that comes once is a surprise.
A word that comes again is less of one: Ozymandias, Ozymandias, Ozymandias.
Whoever reads this twice knows how it ends: with a blue door in Antwerp."""
CSS = """
.tokens { background: #fff; font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap;
          overflow-wrap: anywhere; padding: 1em; border: 1px solid #ddd; max-height: 60vh; overflow-y: auto }
.tokens, .tokens span { color: #111 !important; border-radius: 2px }
.readings { width: 100%; font-size: 14px }
.readings, .readings tr, .readings th, .readings td { border: none !important }
.readings th, .readings td { text-align: left; padding: 4px 9px 4px 0 !important; border-bottom: 1px solid #ccc !important }
.readings td:nth-child(n+4) { font-variant-numeric: tabular-nums; white-space: nowrap }
"""


@dataclass
class Reading:
    start: str  # of the text
    tokens: list[int]
    bits: list[float]  # surprise of each token
    learnt: str  # what was switched on
    per_byte: float


@dataclass
class Session:
    """What one visitor's model has read."""

    state: HopeState | None = None
    readings: list[Reading] = field(default_factory=list)


@contextmanager
def held(model: Hope) -> Iterator[None]:
    """Within, memories stay as they are: gates give a step of 0 and a retention of 1."""
    kept = []
    for layer in model.modules():
        for name, gate in layer.gates.items() if isinstance(layer, Memory) else ():
            kept += [(p, p.detach().clone()) for p in gate.parameters()]
            with torch.no_grad():
                for p in gate.parameters():
                    p.zero_()
                gate.bias.fill_(1e4 if name == "alpha" else -1e4)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def switches(model: Hope) -> list[str]:
    """What can be switched off: memories that have a step size, and the levels of the CMS that are written."""
    layers = [block.memory for block in model.blocks]
    memory = [MEMORY] if all(isinstance(layer, Memory) and "eta" in layer.gates for layer in layers) else []
    return memory + [f"CMS, every {clock} tokens" for clock in model.config.clocks]


def read(model: Hope, tokenizer: Tokenizer, session: Session, text: str, on: list[str], bar: Any = chat.BAR) -> Session:
    """The session after one more reading, in which only what is `on` learns."""
    tokens = tokenizer.encode(text).tolist()
    if not 0 < len(tokens) <= MOST:
        raise ValueError(f"the text has {len(tokens):,} tokens; give 1 to {MOST:,}")
    levels = [i for i in model.config.written if f"CMS, every {int(model.config.cms[i])} tokens" in on]
    with held(model) if MEMORY in {*switches(model)} - {*on} else nullcontext():
        nats, state = chat.read(model, [tokenizer.eot, *tokens], session.state, bar, levels=levels)
    bits = [nat / math.log(2) for nat in nats[-len(tokens) :]]
    per_byte = sum(bits) / max(1, int(tokenizer.lengths[tokens].sum()))
    new = Reading(text.strip()[:40], tokens, bits, " + ".join(on) or "nothing", per_byte)
    return replace(session, state=state, readings=[*session.readings, new])


def earlier(session: Session) -> Reading | None:
    """The last reading of the text that was read last."""
    *before, last = session.readings
    return next((r for r in reversed(before) if r.tokens == last.tokens), None)


def coloured(tokenizer: Tokenizer, session: Session, view: str) -> str:
    """The text that was read last as HTML; `view`: "surprise", or "learnt", against its reading before."""
    if not session.readings:
        return "<div class='tokens'>Nothing was read yet.</div>"
    last, before, most = session.readings[-1], earlier(session), math.log2(tokenizer.vocab_size)
    if view == "learnt" and before is None:
        return "<div class='tokens'>Read the same text once more to see what was learnt from it.</div>"
    spans, letters, shown = [], [], 0.0
    for i, (token, bits) in enumerate(zip(last.tokens, last.bits)):
        letters.append(token)
        shown += bits if view == "surprise" else before.bits[i] - bits
        piece = tokenizer.decode(letters)
        if piece.endswith("\ufffd") and len(letters) < 4:  # the first bytes of a letter
            continue
        strength = min(1.0, abs(shown) / (most if view == "surprise" else most / 2))
        colour = "230,140,0" if view == "surprise" else "42,143,131" if shown > 0 else "155,63,134"
        label = (
            f"{shown:.2f} bits" if view == "surprise" else f"{abs(shown):.2f} bits {'less' if shown > 0 else 'more'}"
        )
        piece = html.escape(piece).replace("\n", "↵\n")
        spans.append(f"<span style='background:rgba({colour},{strength:.2f})' title='{label}'>{piece}</span>")
        letters, shown = [], 0.0
    return f"<div class='tokens'>{''.join(spans)}</div>"


def table(session: Session) -> str:
    """All readings, and in brackets how much harder each was than the one before of the same text."""
    rows = []
    for i, r in enumerate(session.readings):
        before = earlier(Session(readings=session.readings[: i + 1]))
        change = f" ({r.per_byte - before.per_byte:+.3f})" if before else ""
        cells = (str(i + 1), html.escape(r.start) + "…", r.learnt, f"{r.per_byte:.3f}{change}")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("", "text", "what learnt", "bits per byte"))
    return f"<table class='readings'><tr>{head}</tr>{''.join(rows)}</table>" if rows else ""


def go_on(model: Hope, tokenizer: Tokenizer, session: Session, most: int, temperature: float) -> Iterator[str]:
    """What the model says after what it has read, longer at every step."""
    begin = [tokenizer.eot] * (session.state is None)
    said = chat.say(model, tokenizer, begin, most, session.state, temperature=temperature, top_p=0.9)
    yield from accumulate(piece for piece, _ in said)


def launch(model: Hope, tokenizer: Tokenizer, title: str = "Hope", port: int | None = None, wait: bool = True) -> str:
    """Serve the page on 127.0.0.1 and return its address; with `wait`, until Ctrl-C. UserError without gradio."""
    gr = extra("gradio", "--demo")

    def on_read(text: str, on: list[str], view: str, session: Session, progress: Any = gr.Progress()) -> tuple:
        try:
            session = read(model, tokenizer, session, text, on, progress.tqdm)
        except ValueError as e:
            raise gr.Error(str(e)) from e
        return coloured(tokenizer, session, view), table(session), session

    parts, empty = switches(model), coloured(tokenizer, Session(), "surprise")
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        session = gr.State(Session())
        gr.Markdown(f"## {title}\nIt learns from what it reads. Read a text twice, and see what was learnt from it.")
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(TEXT, lines=8, max_lines=16, label="Text")
                on = gr.CheckboxGroup(parts, value=parts, label="What learns while it reads", visible=bool(parts))
                with gr.Row():
                    reads, forgets = gr.Button("Read", variant="primary"), gr.Button("Forget everything")
                most = gr.Slider(10, 1000, 200, step=10, label="Tokens to say")
                temperature = gr.Slider(0, 1.5, 0.8, step=0.1, label="Temperature")
                says = gr.Button("Sample on")
            with gr.Column():
                views = [("surprise: the more orange", "surprise"), ("learnt: green easier, purple harder", "learnt")]
                view = gr.Radio(views, value="surprise", label="Colours")
                tokens, readings = gr.HTML(empty), gr.HTML()
                said = gr.Textbox(label="What the model says next", lines=6, max_lines=16)
        one = dict(concurrency_limit=1, concurrency_id="model")  # one visitor at a time: `held` moves the gates
        reads.click(on_read, [text, on, view, session], [tokens, readings, session], **one)
        view.change(lambda view, session: coloured(tokenizer, session, view), [view, session], tokens)
        forgets.click(lambda: (empty, "", "", Session()), None, [tokens, readings, said, session])
        says.click(partial(go_on, model, tokenizer), [session, most, temperature], said, **one)
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, share=False, ssr_mode=False, theme=theme,
        css=CSS, footer_links=[], quiet=True,
    )  # fmt: skip
    print(f"{address} shows the page; Ctrl-C ends it", flush=True)
    if wait:
        page.block_thread()
    return address
