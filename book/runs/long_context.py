"""The long runs of chapter 17: needles beyond the training length, levels of the CMS, a million tokens, position.

    python book/runs/long_context.py needles      accuracy against length, gates, what survives; about 18 minutes of one core
    python book/runs/long_context.py levels       more levels and slower ones (Fig. 7); 5 minutes
    python book/runs/long_context.py million      Hope reads a million tokens of filler (Fig. 9); 5 minutes
    python book/runs/long_context.py position     bits per byte against position; 3 minutes

Each writes long_context-PART.json beside this file, after every training, so that an interrupted run goes on where it
stopped. --seeds 0,1 shows other seeds than 0, 1, 2; --quick tries everything in small and stores nothing. Learning rates
of needles are chosen from three on selection rows with a seed that is not shown; what is shown are test rows. Models of
text have the rates of chapter 15.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import hope
import tasks
from data import write_atomically
from hope import INF
from train import TrainConfig, clip_gradients, learning_rate, make_optimizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs import parts  # noqa: E402
from runs.fit import fit  # noqa: E402

SEEDS, TUNING = (0, 1, 2), 9  # shown; for the choice of a rate
RATES = (0.006, 0.012, 0.024)
SIZE = dict(d_model=32, n_head=2, n_layer=2)


def result(part: str) -> Path:
    return Path(__file__).with_name(f"long_context-{part}.json")


def stored(part: str) -> dict:
    return json.loads(result(part).read_text()) if result(part).exists() else {"rows": {}}


def keep(part: str, name: str, row: dict) -> None:
    found = {"command": f"python book/runs/long_context.py {part}", "seeds": SEEDS}
    found |= {"rates": RATES} if part == "needles" else {}
    found |= {"versions": {"torch": torch.__version__, "python": platform.python_version(), "hope": hope.__version__}}
    found |= {"rows": stored(part)["rows"] | {name: row}}
    write_atomically(result(part), json.dumps(found).replace('}, "', '},\n"') + "\n")


# ---- Needles ----

NAMES = "people=4,places=8,filler=16"
SHORT, LENGTHS, STEPS, BATCH = 64, (64, 128, 256, 512, 1024), 500, 32
HAYSTACKS = ("repeated", "varied")
CHUNKS = dict(chunk=16, chunk_proj=16)
ARMS = {
    "Transformer++": ("transformer++", {}),
    "no positions": ("transformer++", dict(rotary=False)),
    "Hope-Attention": ("hope-attention", {}),
    "DeltaNet": ("deltanet", {}),
    "Titans": ("titans", {}),
    "Hope": ("hope", CHUNKS),
    "DeltaNet, with decay": ("gated-deltanet", {}),
}


def task_of(facts: int, questions: int, length: int) -> tasks.Task:
    return tasks.make(f"facts,facts={facts},questions={questions},length={length},{NAMES}")


def haystack(task: tasks.Task, tokens: Tensor, kind: str) -> Tensor:
    """Rows with their filler as it is, varied, or in each row one token again and again: the row's first filler."""
    if kind == "varied":
        return tokens
    filler = tokens >= task.vocab_size - task.filler
    first = tokens.gather(1, filler.int().argmax(1, keepdim=True))
    return torch.where(filler, first, tokens)


def rows(task: tasks.Task, kind: str, split: str, seed: int, begin: int, n: int) -> tuple[Tensor, Tensor]:
    tokens, targets = task.rows(split, seed, begin, n)
    return haystack(task, tokens, kind), targets


def mixed(split: str, seed: int, i: int, n: int) -> tuple[Tensor, Tensor]:
    """Short rows with four facts and eight questions, half of them in each haystack."""
    made = [rows(task_of(4, 8, SHORT), kind, split, seed, i * n // 2, n // 2) for kind in HAYSTACKS]
    return torch.cat([tokens for tokens, _ in made]), torch.cat([targets for _, targets in made])


@torch.no_grad()
def accuracy(model: hope.Hope, tokens: Tensor, targets: Tensor) -> float:
    """Percent of answers that are right."""
    asked = targets != tasks.NOTHING
    return round(100 * (model(tokens)[0].argmax(-1) == targets)[asked].float().mean().item(), 2)


def trained(arm: str, lr: float, seed: int, steps: int) -> tuple[hope.Hope, int, float]:
    """Until 99.5% of answers to selection rows are right, asked every 50 steps. Steps taken, and those answers."""
    torch.manual_seed(seed)
    arch, settings = ARMS[arm]
    vocab_size = task_of(4, 8, SHORT).vocab_size
    config = hope.HopeConfig.preset("tiny", arch, vocab_size=vocab_size, cms_hidden=2.0, **SIZE, **settings)
    model = hope.Hope(config)

    def loss(n: int) -> Tensor:
        tokens, targets = mixed("train", seed, n - 1, BATCH)
        return F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())

    held = mixed("selection", 0, 0, 256)
    for n in fit(model, lr, steps, loss):
        if n % 50 == 0 and (reached := accuracy(model, *held)) >= 99.5:
            return model, n, reached
    return model, steps, accuracy(model, *held)


@torch.no_grad()
def gates(model: hope.Hope) -> list[dict]:
    """Of every block the median retention alpha and step eta of each head, on filler and on facts, in short rows."""
    task, seen = task_of(4, 8, SHORT), []
    tokens, _ = rows(task, "varied", "test", 0, 0, 32)
    filler = tokens >= task.vocab_size - task.filler

    def watch(layer: hope.Memory, given: tuple, returned: tuple) -> None:
        x, state = given
        streams = layer._streams(hope.causal_conv(layer.conv, x, state.tail)[0], state.t)
        if layer.adaptive:
            streams |= layer._adaptive_reads(streams["u"], (state.proj or state.main).now)
        seen.append((layer, streams["eta"], streams["alpha"]))

    hooks = [block.memory.register_forward_hook(watch) for block in model.blocks]
    state = model.init_state(len(tokens))
    for piece in tokens.split(model.config.memory.chunk_proj, 1):  # adaptive gates are read at a chunk's first state
        _, state = model(piece, state)
    for hook in hooks:
        hook.remove()
    found = []
    for block in model.blocks:
        eta, alpha = (torch.cat([s[i] for s in seen if s[0] is block.memory], 2) for i in (1, 2))  # (b, h, t)
        parts_of = {"filler": filler, "facts": (tokens < 15) & (torch.arange(tokens.shape[1]) < 40)}
        found.append(
            {
                f"{name} on {where}": [round(gate[:, h][mask].median().item(), 5) for h in range(gate.shape[1])]
                for name, gate in (("eta", eta), ("alpha", alpha))
                for where, mask in parts_of.items()
            }
        )
    return found


SURVIVES = (0, 4, 16, 64, 256, 1024)


@torch.no_grad()
def survival(model: hope.Hope, kind: str, n: int = 32) -> list[list[float]]:
    """How far apart main memories are that have read streams with one place told differently, after so many fillers.

    Of every block, the output layer's difference as a part of what it was at first (4 tokens after the fact, when the
    convolution has forgotten it too); median over streams.
    """
    task, g = task_of(4, 8, SHORT), torch.Generator().manual_seed(0)
    first = task.vocab_size - task.filler
    filler = torch.randint(first, task.vocab_size, (n, 16 + 4 + SURVIVES[-1]), generator=g)
    who = torch.randint(3, 3 + task.people, (n, 1), generator=g)
    places = 3 + task.people + torch.stack([torch.randperm(task.places, generator=g)[:2] for _ in range(n)])
    went = torch.ones_like(who)
    filler = filler[:, :1].expand_as(filler) if kind == "repeated" else filler
    states = []
    for place in places.T:
        opening = torch.cat([filler[:, :16], who, went, place[:, None], filler[:, 16:20]], 1)
        states.append(model(opening)[1])
    found, at = [], 0
    for distance in SURVIVES:
        piece = filler[:, 20 + at : 20 + distance]
        states, at = [model(piece, state)[1] for state in states], distance
        ends = [[m.main.now[-1][:, :, -1] for m in state.memories] for state in states]
        found.append([(a - b).flatten(1).norm(dim=1) for a, b in zip(*ends)])
    return [[round((z[i] / found[0][i]).median().item(), 5) for z in found] for i in range(len(found[0]))]


DISTANCES = (64, 256, 1024, 4096, 16384)


@torch.no_grad()
def retention(model: hope.Hope, distances: tuple[int, ...] = DISTANCES, n: int = 32) -> dict[str, list[float]]:
    """Accuracy on four facts that so many varied fillers ago were told, and on new ones that follow them at once."""
    task, g = task_of(4, 1, 40), torch.Generator().manual_seed(1)
    tokens, targets = task.rows("test", 1, 0, n)
    fresh = rows(task_of(4, 1, SHORT), "varied", "test", 2, 0, n)
    _, state = model(tokens[:, :-2])
    found, at = {"old": [], "new": []}, 0
    for distance in distances:
        while at < distance:
            piece = min(1024, distance - at)
            _, state = model(
                torch.randint(task.vocab_size - task.filler, task.vocab_size, (n, piece), generator=g), state
            )
            at += piece
        answers = model(tokens[:, -2:], state)[0][:, -1].argmax(-1)
        found["old"].append(round(100 * (answers == targets[:, -1]).float().mean().item(), 2))
        answers = model(fresh[0], state)[0][:, -1].argmax(-1)
        found["new"].append(round(100 * (answers == fresh[1][:, -1]).float().mean().item(), 2))
    return found


def needles(arm: str, lr: float, seed: int, quick: bool = False) -> dict:
    begun = time.process_time()
    model, steps, reached = trained(arm, lr, seed, 50 if quick else STEPS)
    found = {"selection": reached, "steps": steps, "seconds": round(time.process_time() - begun, 1)}
    found["parameters"] = sum(p.numel() for p in model.parameters())
    if seed == TUNING:
        return found
    for name, facts in (("one needle", 1), ("four facts", 4)):
        for kind in HAYSTACKS:
            tests = [rows(task_of(facts, 1, length), kind, "test", 0, 0, 96) for length in LENGTHS]
            found[f"{name}, {kind}"] = [accuracy(model, *test) for test in tests]
    if isinstance(model.blocks[0].memory, hope.Memory):
        found["gates"] = gates(model)
        found["survival"] = {kind: survival(model, kind) for kind in HAYSTACKS}
        found["retention"] = retention(model)
    if "decay" in arm:  # switched off in the trained model
        with torch.no_grad():
            for block in model.blocks:
                block.memory.gates["alpha"].weight.zero_()
                block.memory.gates["alpha"].bias.fill_(50.0)
        tests = [rows(task_of(4, 1, length), "varied", "test", 0, 0, 96) for length in LENGTHS]
        found["four facts, varied, alpha 1"] = [accuracy(model, *test) for test in tests]
    return found


# ---- Levels of the CMS (Fig. 7) ----

CLOCKS = {
    "no level": (),
    "32": (32,),
    "64": (64,),
    "128": (128,),
    "32, 128": (32, 128),
    "32, 64, 128": (32, 64, 128),
}
PEOPLE, HAYSTACK, HAYSTACKS_READ = ("Anna", "Boris", "Clara", "David"), (512, 2048), 16


def reader(arch: str, seed: int, lr: float, steps: int, seq_len: int, **settings) -> hope.Hope:
    """A small language model of chapter 15's text and size, trained as there but for the length of windows."""
    torch.manual_seed(seed)
    model = hope.Hope(hope.HopeConfig.preset("tiny", arch, **parts.SIZE, **settings))
    config, g = TrainConfig(lr=lr, steps=steps, seq_len=seq_len), torch.Generator().manual_seed(seed)
    optimizers = make_optimizers(model, config)
    for i in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(i, config) * group.get("lr_scale", 1.0)
        x = parts.windows(parts.texts()["training"], 1024 // seq_len, seq_len, g)
        model.observe(x[:, :-1], x[:, 1:], backward=True)
        clip_gradients(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
    return model


def letters(g: torch.Generator, n: int = 4) -> bytes:
    return bytes((97 + torch.randint(26, (n,), generator=g)).tolist())


@torch.no_grad()
def many_keys(model: hope.Hope, length: int) -> dict[str, float]:
    """Four codes of four people, told in text at equal distances, then asked for.

    A question is answered by the one of the four codes that the model finds likeliest: percent of right answers, and
    bits that a right code costs less than in a model which was told other codes.
    """
    g, begun = torch.Generator().manual_seed(5), parts.windows(parts.texts()["held out"], HAYSTACKS_READ, length)
    say = lambda who, code: f" The code of {who} is ".encode() + code
    told = [[[letters(g) for _ in PEOPLE] for _ in begun] for _ in range(2)]  # and others, for comparison
    states = []
    for codes in told:
        rows_read = []
        for text, row in zip(begun.tolist(), codes):
            cut, stream = length // len(PEOPLE), b""
            for i, (who, code) in enumerate(zip(PEOPLE, row)):
                stream += bytes(text[i * cut : (i + 1) * cut]) + say(who, code) + b"."
            rows_read.append(list(stream))
        x = torch.tensor(rows_read)
        states.append(model.observe(x[:, :-1], x[:, 1:])[1])

    def bits(state: hope.HopeState, who: str, codes: list[bytes]) -> Tensor:
        x = torch.tensor([list(b"." + say(who, code)) for code in codes])
        losses = model.observe(x[:, :-1], x[:, 1:], state, reduction="none")[0]
        return losses[:, -len(codes[0]) :].sum(1) / math.log(2)

    right, saved = [], []
    for i, who in enumerate(PEOPLE):
        each = torch.stack([bits(states[0], who, [row[j] for row in told[0]]) for j in range(len(PEOPLE))], 1)
        right.append((each.argmin(1) == i).float())
        saved.append(bits(states[1], who, [row[i] for row in told[0]]) - each[:, i])
    right_, saved_ = torch.cat(right), torch.cat(saved)
    return {"right": round(100 * right_.mean().item(), 2), "saved": round(saved_.mean().item(), 3)}


def levels(arm: str, lr: float, seed: int, quick: bool = False) -> dict:
    begun = time.process_time()
    clocks = (*map(float, CLOCKS[arm]), INF)
    model = reader("hope-attention", seed, lr, 10 if quick else 100, 256, cms=clocks)
    found = {"seconds": round(time.process_time() - begun, 1), "parameters": sum(p.numel() for p in model.parameters())}
    found["held out"] = parts.bits(model, "held out")
    return found | {f"keys in {length}": many_keys(model, length) for length in HAYSTACK}


# ---- A million tokens (Fig. 9) ----

CHECKPOINTS = (1_000, 10_000, 100_000, 1_000_000)


@torch.no_grad()
def million(arm: str, lr: float, seed: int, quick: bool = False) -> dict:
    """One stream: four facts, then filler. At every checkpoint bytes of the state, time, and answers of branches.

    Old facts are asked for one by one; new ones are told and asked for, in 96 branches.
    """
    with torch.enable_grad():
        model, _, _ = trained(arm, lr, seed, 50 if quick else STEPS)
    task, g = task_of(4, 1, 40), torch.Generator().manual_seed(3)
    tokens, _ = task.rows("test", 3, 0, 1)
    fresh = rows(task_of(4, 1, SHORT), "varied", "test", 4, 0, 96)
    _, state = model(tokens[:, :-2])
    found, at = {}, tokens.shape[1] - 2
    for checkpoint in CHECKPOINTS[: 2 if quick else None]:
        begun, before = time.process_time(), at
        while at < checkpoint:
            piece = min(1024, checkpoint - at)
            _, state = model(
                torch.randint(task.vocab_size - task.filler, task.vocab_size, (1, piece), generator=g), state
            )
            at += piece
        spent, sizes, largest = time.process_time() - begun, [], []
        hope.map_state(
            lambda z: sizes.append(z.numel() * z.element_size()) or largest.append(z.abs().max()) or z, state
        )
        answers = model(fresh[0], state.select([0] * len(fresh[0])))[0][:, -1].argmax(-1)
        found[str(checkpoint)] = {
            "bytes": sum(sizes),
            "ms a token": round(1000 * spent / (at - before), 4),
            "new": round(100 * (answers == fresh[1][:, -1]).float().mean().item(), 2),
            "largest": round(max(largest).item(), 3),
        }
        print(arm, checkpoint, found[str(checkpoint)], flush=True)
    return found


# ---- Position ----

READERS = {
    "Hope": ("hope", dict(cms=parts.CLOCKS)),
    "Transformer++": ("transformer++", {}),
    "no positions": ("transformer++", dict(rotary=False)),
}
EDGES = (0, 128, 256, 512, 1024, 2048, 4096)


def position(arm: str, lr: float, seed: int, quick: bool = False) -> dict:
    """Bits per byte at places of held-out text, for a model trained on windows of 512 bytes."""
    begun, (arch, settings), text = time.process_time(), READERS[arm], parts.texts()
    model = reader(arch, seed, lr, 10 if quick else 60, 512, **settings)
    found = {"seconds": round(time.process_time() - begun, 1), "parameters": sum(p.numel() for p in model.parameters())}

    @torch.no_grad()
    def binned(which: str, n: int, t: int, levels: tuple | None = None) -> list[float]:
        x = parts.windows(text[which], n, t)
        losses = model.observe(x[:, :-1], x[:, 1:], reduction="none", levels=levels)[0] / math.log(2)
        return [round(losses[:, a:b].mean().item(), 4) for a, b in zip(EDGES, EDGES[1:]) if b <= t]

    found["held out"] = binned("held out", 4, EDGES[-1])
    if arm == "Hope":
        found["held out, no level writes"] = binned("held out", 4, EDGES[-1], levels=())
    return found


# ---- Which trainings there are ----

PARTS = {
    "needles": (needles, ARMS),
    "levels": (levels, CLOCKS),
    "position": (position, READERS),
    "million": (million, ["Hope"]),
}


OF_TEXT = ("levels", "position")  # on chapter 15's text, whose learning rates were the best of five


def name_of(arm: str, lr: float, seed: int) -> str:
    return f"{arm}; {lr}; {seed}"


def tuned_as(arm: str) -> str:
    """Whose learning rate an arm of the needles has: a variant has that of what it varies."""
    return arm.split(",")[0]


def best_rate(part: str, arm: str) -> float:
    """Of three, by selection rows; of equally good ones that which needs fewest steps."""
    if part in OF_TEXT:
        arch = "hope-attention" if part == "levels" else "Hope" if arm == "Hope" else "transformer++"
        return parts.best_rate(parts.stored()["rows"], arch)
    found = stored("needles")["rows"]
    of = lambda lr: found[name_of(tuned_as(arm), lr, TUNING)]
    return max(RATES, key=lambda lr: (of(lr)["selection"], -of(lr)["steps"]))


def missing(part: str, seeds: tuple[int, ...]) -> list[tuple[str, float, int]]:
    """The next trainings to do; an arm's seeds are known once its rate is."""
    found, left = stored(part)["rows"], []
    for arm in PARTS[part][1]:
        rates = [(tuned_as(arm), lr, TUNING) for lr in RATES] if part == "needles" else []
        todo = [key for key in rates if name_of(*key) not in found]
        shown = [] if todo else [(arm, best_rate(part, arm), seed) for seed in seeds]
        left += [key for key in todo + shown[: 1 if part == "million" else None] if name_of(*key) not in found]
    return list(dict.fromkeys(left))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", default=list(PARTS), help="needles, levels, position, million; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--most", type=int, default=99, help="how many trainings before stopping")
    parser.add_argument("--backwards", action="store_true", help="begin with the last, beside a run that does not")
    parser.add_argument("--quick", action="store_true", help="a few steps of every arm, stored nowhere")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for part in given.part:
        run, arms = PARTS[part]
        if given.quick:
            for arm in arms:
                print(part, arm, run(arm, RATES[1], 0, quick=True), flush=True)
            continue
        for _ in range(given.most):
            if not (todo := missing(part, tuple(map(int, given.seeds.split(","))))):
                break
            key = todo[-1 if given.backwards else 0]
            found = run(*key)
            keep(part, name_of(*key), found)
            print(f"{part}, {len(todo) - 1} to go:", *key, found, flush=True)


if __name__ == "__main__":
    main()
