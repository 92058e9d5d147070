"""The long run of chapter 15: Hope without one part at a time, its relatives, and a stream of a million bytes.

    python book/runs/parts.py                what is missing of both; about 20 minutes of one core; writes parts.json
    python book/runs/parts.py --most 5       only so many trainings more
    python book/runs/parts.py --stream       only the stream

Every arm has about as many parameters: what a missing part leaves goes into the MLPs. Training: 100 steps of 4 windows of
256 bytes of the text that ships with Python, by train.py's optimizers and schedule; a seed sets the start weights and the
windows, which are the same for all arms. Hope's learning rate and those of its relatives are the best of five, by seed 0
on a text for tuning (of equally good ones the least); Hope without a part has Hope's. What is shown are seeds 0 to 2 at
that rate on two other texts, in 8 windows of 1,024 bytes, read with `Hope.observe`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import platform
import time
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

import hope
import train
from data import pydoc_text, write_atomically
from hope import INF

RESULT = Path(__file__).with_suffix(".json")
SEEDS, RATES, STEPS = (0, 1, 2), (0.005, 0.01, 0.02, 0.04, 0.08), 100
FLAT = 0.05  # bits per byte between learning rates that count as equally good
SIZE = dict(d_model=64, n_head=2, n_layer=2)
CLOCKS = (32.0, 128.0, INF)

# What is changed of the preset, and what kind of an arm it is.
PARTS = {
    "Hope": {},
    "CMS never written": dict(cms=(INF, INF, INF)),
    "static projections": dict(adaptive=()),
    "shared values": dict(self_values=False),
    "linear memories": dict(depth=1),
    "no momentum": dict(momentum=False),
    "no decay": dict(decay="none", adaptive=("k", "v", "eta")),
    "no convolution": dict(conv=0),
    "no residual": {},  # around the memory, as (97) is printed; see `literal`
}
RELATIVES = ("hope-attention", "titans", "deltanet", "transformer++")
ARMS = (*PARTS, *RELATIVES)


def literal(block: hope.Block, x: Tensor, memory, cms: list) -> tuple[Tensor, object]:
    """A block's forward pass without the residual around its memory."""
    y, memory = block.memory(block.norm(x), memory)
    return block.cms(y, cms), memory


def build(arm: str, seed: int) -> hope.Hope:
    torch.manual_seed(seed)
    changes = PARTS.get(arm, {})
    clocks = {} if arm in RELATIVES[1:] else {"cms": CLOCKS}
    model = hope.Hope(
        hope.HopeConfig.preset("tiny", arm if arm in RELATIVES else "hope", **{**SIZE, **clocks, **changes})
    )
    if arm == "no residual":
        for block in model.blocks:
            block.forward = partial(literal, block)
    return model


@cache
def texts() -> dict[str, bytes]:
    training, held_out = (part.encode() for part in pydoc_text())
    half = len(held_out) // 2
    code = "".join(inspect.getsource(__import__(name)) for name in ("argparse", "subprocess")).encode()
    return {"training": training, "tuning": held_out[:half], "held out": held_out[half:], "program code": code}


def windows(text: bytes, n: int, t: int, g: torch.Generator | None = None) -> Tensor:
    """n windows of t + 1 bytes, at random or evenly spread."""
    last = len(text) - t - 1
    starts = torch.linspace(0, last, n).long() if g is None else torch.randint(last, (n,), generator=g)
    return torch.stack([torch.tensor(list(text[s : s + t + 1])) for s in starts.tolist()])


def learn(model: hope.Hope, lr: float, seed: int) -> None:
    """The training loop of train.py, in short."""
    config, g = train.TrainConfig(lr=lr, steps=STEPS, seq_len=256), torch.Generator().manual_seed(seed)
    optimizers = train.make_optimizers(model, config)
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, config) * group.get("lr_scale", 1.0)
        x = windows(texts()["training"], 4, 256, g)
        model.observe(x[:, :-1], x[:, 1:], backward=True)
        train.clip_gradients(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()


@torch.no_grad()
def bits(model: hope.Hope, text: str, levels: tuple | None = None) -> float | None:
    """Bits per byte, or None where the model has diverged."""
    x = windows(texts()[text], 8, 1024)
    found = model.observe(x[:, :-1], x[:, 1:], levels=levels)[0].item() / math.log(2)
    return round(found, 4) if math.isfinite(found) else None


BETWEEN = (0, 256, 512, 1024)  # bytes of other text


@torch.no_grad()
def again(model: hope.Hope, text: bytes, n: int = 12, t: int = 256) -> dict[str, list[float]]:
    """Bits per byte of n passages of t bytes when they are read again, after so much other text in between.

    Of each distance two numbers: after a first reading, and after other text in its place. Passages and the text between
    them are windows of `text` that lie apart from each other.
    """
    x = windows(text, 2 * n, t)
    passages, others = x[::2], x[1::2]
    between = torch.cat([others.roll(i, 0)[:, :-1] for i in range(1, max(BETWEEN) // t + 1)], 1)
    found: dict[str, list[float]] = {str(length): [] for length in BETWEEN}
    for first in (passages, others):
        _, state = model.observe(first[:, :-1], first[:, 1:])
        read = 0
        for length in BETWEEN:
            piece = between[:, read : length + 1]
            if length:
                _, state = model.observe(piece[:, :-1], piece[:, 1:], state)
            read = length
            loss, _ = model.observe(passages[:, :-1], passages[:, 1:], state)
            found[str(length)].append(round(loss.item() / math.log(2), 4))
    return found


def row(arm: str, lr: float, seed: int) -> dict:
    model, begun = build(arm, seed), time.process_time()
    learn(model, lr, seed)
    spent = time.process_time() - begun
    found = {text: bits(model, text) for text in ("tuning", "held out", "program code")}
    if arm == "Hope":
        for name, levels in (("no level writes", ()), ("only the fast one", (0,)), ("only the slow one", (1,))):
            found[f"held out, {name}"] = bits(model, "held out", levels)
    if arm in ("Hope", "CMS never written", "transformer++"):
        found["again"] = again(model, texts()["held out"])
    size = sum(p.numel() for p in model.parameters())
    return found | {"parameters": size, "ms per step": round(1000 * spent / STEPS)}


def best_rate(rows: dict, arm: str) -> float:
    """The least of five that comes within FLAT of the best, for Hope and its relatives; Hope without a part has Hope's."""
    arm = arm if arm in RELATIVES else "Hope"
    bits = {lr: rows[name_of(arm, lr, 0)]["tuning"] or INF for lr in RATES}
    return min(lr for lr in RATES if bits[lr] < min(bits.values()) + FLAT)


def missing(rows: dict) -> list[tuple[str, float, int]]:
    """The next trainings to do: of Hope and its relatives the five rates, then the other seeds at the best."""
    tuning = [(arm, lr, 0) for arm in ("Hope", *RELATIVES) for lr in RATES]
    if todo := [key for key in tuning if name_of(*key) not in rows]:
        return todo
    shown = [(arm, best_rate(rows, arm), seed) for arm in ARMS for seed in SEEDS]
    return [key for key in shown if name_of(*key) not in rows]


def name_of(arm: str, lr: float, seed: int) -> str:
    return f"{arm}, {lr}, {seed}"


# ----------------------------------------------------------------------------------------------------------------------
# A long stream

STREAM = {"Hope": (2**20, 2**16), "transformer++": (2**15, 2**12)}  # bytes in all, and of a stretch
BLOCK = 1024


def stream(lr: float) -> dict:
    """A trained Hope reads program code: bits per byte, CPU time and state of each stretch.

    Beside it Transformer++, whose keys and values grow, on the first of them.
    """
    folder, code = Path(inspect.getfile(argparse)).parent, b""
    for file in sorted(folder.glob("*.py")):
        if len(code) <= STREAM["Hope"][0]:
            code += file.read_bytes()
    tokens, found = torch.tensor(list(code))[None], {}
    for arm, (length, stretch) in STREAM.items():
        model, state, found[arm] = build(arm, 0), None, []
        learn(model, lr, 0)
        for start in range(0, length, stretch):
            total, begun = 0.0, time.process_time()
            for s in range(start, start + stretch, BLOCK):
                with torch.no_grad():
                    x, y = tokens[:, s : s + BLOCK], tokens[:, s + 1 : s + BLOCK + 1]
                    loss, state = model.observe(x, y, state)
                total += loss.item() * BLOCK / stretch
            spent = 1000 * (time.process_time() - begun) / stretch
            numbers: list[int] = []
            hope.map_state(lambda z: numbers.append(z.numel()) or z, state)
            found[arm].append({"bits": round(total / math.log(2), 4), "ms": round(spent, 4), "numbers": sum(numbers)})
            print(arm, start, found[arm][-1], flush=True)
    return found


# ----------------------------------------------------------------------------------------------------------------------


def stored() -> dict:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}, "stream": {}}


def keep(name: str, found: dict) -> None:
    made = {
        "command": "python book/runs/parts.py",
        "seeds": SEEDS,
        "rates": RATES,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "hope": hope.__version__},
    }
    rows = stored() | {name: found, "made": made}
    write_atomically(RESULT, json.dumps(rows).replace('}, "', '},\n"') + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=len(ARMS) * 5, help="how many trainings before stopping")
    parser.add_argument("--backwards", action="store_true", help="begin with the last, beside a run that does not")
    parser.add_argument("--stream", action="store_true", help="only the stream")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for _ in range(0 if given.stream else given.most):
        if not (todo := missing(stored()["rows"])):
            break
        arm, lr, seed = todo[-1 if given.backwards else 0]
        found = row(arm, lr, seed)
        keep("rows", stored()["rows"] | {name_of(arm, lr, seed): found})
        print(arm, lr, seed, found, flush=True)
    rows = stored()["rows"]
    if given.stream or not (missing(rows) or stored()["stream"]):
        keep("stream", stream(best_rate(rows, "Hope")))


if __name__ == "__main__":
    main()
