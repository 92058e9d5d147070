"""The runs that chapter 13 reads: additions to a delta memory, each on four small tasks, and parity.

    python runs/titans.py additions     in the folder book/; about 8 minutes on one core; writes runs/titans-additions.json
    python runs/titans.py parity        about 4 minutes; writes runs/titans-parity.json

Seeds: a run's seed sets the model's start and its training sequences. Learning rates are tuned with seeds of their own,
TUNING, by other sequences than those that results are for, which have the seeds 0 to 2.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hope

HERE = Path(__file__).resolve().parent
SEEDS, TUNING = (0, 1, 2), (100, 101)

# ---- Tasks: a token is three symbols, and 0 says nothing. Keys are 1 to 8, values 1 to 8 of their own, ASKED asks ----

N, PAIRS, ASKED = 8, 4, 9


def draw(b: int, n: int, g: torch.Generator) -> Tensor:
    """n different numbers of 1 to N in every row. (b, n)"""
    return torch.rand(b, N, generator=g).argsort(1)[:, :n] + 1


def pick(z: Tensor, i: Tensor) -> Tensor:
    return z.gather(1, i)


def sequence(*parts: tuple[Tensor, Tensor, Tensor], asked: tuple[Tensor, Tensor], key2: Tensor | None = None):
    """Tokens (b, t, 3) of the parts [key, second key, value], then the questions; targets (b, t), -100 where none."""
    first, answer = asked
    key2 = torch.zeros_like(first) if key2 is None else key2
    tokens = torch.cat([*(torch.stack(p, -1) for p in parts), torch.stack([first, key2, first * 0 + ASKED], -1)], 1)
    targets = torch.full(tokens.shape[:2], -100)
    targets[:, -first.shape[1] :] = answer - 1
    return tokens, targets


def rewriting(b: int, g: torch.Generator):
    """Four keys are given values three times anew; asked is the last one."""
    k = draw(b, PAIRS, g)
    parts = []
    for _ in range(3):
        i = torch.rand(b, PAIRS, generator=g).argsort(1)
        v = draw(b, PAIRS, g)
        parts.append((pick(k, i), 0 * k, pick(v, i)))
    i = torch.rand(b, PAIRS, generator=g).argsort(1)
    return sequence(*parts, asked=(pick(k, i), pick(v, i)))


def noise(b: int, g: torch.Generator):
    """Two keys, six times each, with their value in two of three cases and any other in the third."""
    k, v = draw(b, 2, g), draw(b, 2, g)
    i = torch.rand(b, 12, generator=g).argsort(1) % 2
    any_value = torch.randint(1, N + 1, (b, 12), generator=g)
    shown = torch.where(torch.rand(b, 12, generator=g) < 2 / 3, pick(v, i), any_value)
    return sequence((pick(k, i), 0 * i, shown), asked=(k, v))


def conjunctions(b: int, g: torch.Generator):
    """Keys of two symbols, each of three, in all nine ways, each with a value of its own."""
    a, c, v = draw(b, 3, g), draw(b, 3, g), torch.randint(1, N + 1, (b, 9), generator=g)
    i, j = torch.arange(3).repeat_interleave(3), torch.arange(3).repeat(3)
    first, second = a[:, i], c[:, j]
    shown, ask = (torch.rand(b, 9, generator=g).argsort(1) for _ in range(2))
    pairs = (pick(first, shown), pick(second, shown), pick(v, shown))
    return sequence(pairs, asked=(pick(first, ask), pick(v, ask)), key2=pick(second, ask))


def aliases(b: int, g: torch.Generator):
    """Four keys are named by others; values are then given to the others, and asked for by the first."""
    k = draw(b, N, g)
    k, other, v = k[:, :4], k[:, 4:], draw(b, PAIRS, g)
    i, j, l = (torch.rand(b, PAIRS, generator=g).argsort(1) for _ in "ijl")
    names = (pick(other, i), pick(k, i), 0 * i)
    return sequence(names, (pick(other, j), 0 * j, pick(v, j)), asked=(pick(k, l), pick(v, l)))


TASKS = dict(rewriting=rewriting, noise=noise, conjunctions=conjunctions, aliases=aliases)

# ---- Arms: one addition at a time to a linear memory ----

BASE = dict(
    depth=1, rule="dgd", objective="dot", momentum=False, adaptive=(), self_values=False, chunk=4, chunk_proj=4,
    conv=0, n_head=1, d_model=32,
)  # fmt: skip
ALL = ("k", "v", "eta", "alpha")
ARMS = {
    "no delta term": dict(rule="gd"),
    "delta memory": {},
    "+ momentum": dict(momentum=True),
    "+ MLP": dict(depth=2),
    "+ adaptive k": dict(adaptive=("k",)),
    "+ adaptive k, own values": dict(adaptive=("k",), self_values=True),
    "+ all adaptive": dict(adaptive=ALL),
    "everything": dict(adaptive=ALL, self_values=True, momentum=True, depth=2),
}


TRIED = {  # each addition where it could pay, and what else it does where old values are to be replaced
    "rewriting": ("no delta term", "delta memory", "+ momentum", "+ MLP", "+ adaptive k", "everything"),
    "noise": ("delta memory", "+ momentum", "everything"),
    "conjunctions": ("delta memory", "+ MLP", "everything"),
    "aliases": ("delta memory", "+ adaptive k", "+ adaptive k, own values", "+ all adaptive", "everything"),
}


class Reader(nn.Module):
    """A memory between an embedding and a head, and nothing else."""

    def __init__(self, **settings):
        super().__init__()
        self.layer = hope.Memory(**{**BASE, **settings})
        d = self.layer.config.d_model
        self.embed = nn.ModuleList([nn.Embedding(n, d) for n in (N + 1, N + 1, N + 2)])
        self.head = nn.Linear(d, N)
        if self.layer.config.depth == 1 and self.layer.adaptive:  # adaptive projections begin as projections
            for part in self.layer.parts:
                start = self.layer.start[f"{part}_0"]
                nn.init.normal_(start, std=start.shape[-1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(sum(e(z) for e, z in zip(self.embed, tokens.unbind(-1))))[0])


def learn(task: str, seed: int, lr: float, **settings) -> tuple[float, Reader]:
    """Accuracy in percent on 1024 sequences after training, and the model."""
    steps = 600 if task == "aliases" else 300
    torch.manual_seed(seed)
    model = Reader(**settings)
    g = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        tokens, targets = TASKS[task](32, g)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    tokens, targets = TASKS[task](1024, torch.Generator().manual_seed(7 if seed in TUNING else 8))
    with torch.no_grad():
        hits = model(tokens).argmax(-1)[targets != -100] == targets[targets != -100]
    return 100 * hits.float().mean().item(), model


# ---- Parity: is the number of ones so far odd? ----

FACTORS = {  # what a token multiplies the memory's answer at its key by
    "alpha - s, s < 1: eq. 88": dict(decay="gate"),
    "1 - s, s < 1: no decay": {},
    "1 - 2 s, s < 1: no decay, l2": dict(beta=2.0),  # equal to objective="l2" at chunk 1 with half the value; quicker
    "alpha (1 - s), s < 1: gated DeltaNet": dict(preset="gated-deltanet"),
    "alpha (1 - s), s < 2: gated DeltaNet": dict(preset="gated-deltanet", beta=2.0),
}
TRAINED, LENGTH = 40, 80


def bits(b: int, t: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randint(2, (b, t), generator=g)
    return x, x.cumsum(1) % 2


def count(seed: int, lr: float, preset: str = "deltanet", steps: int = 400, **settings) -> dict:
    """Train a one-block model on 40 bits; accuracy in percent at every position of 80, and every head's factors."""
    torch.manual_seed(seed)
    config = hope.HopeConfig.preset(
        "tiny", preset, d_model=32, n_head=2, n_layer=1, vocab_size=2, cms_hidden=2.0, conv=0, **settings
    )
    model, g = hope.Hope(config), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x, y = bits(32, TRAINED, g)
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x, y = bits(512, LENGTH, torch.Generator().manual_seed(7 if seed in TUNING else 8))
    memory, seen = model.blocks[0].memory, []
    with torch.no_grad():
        hits = (model(x)[0].argmax(-1) == y).float().mean(0)
        with memory.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            model(torch.tensor([[0, 1]]))
        gate = {name: hope.GATES[name](g(seen[0]))[0] for name, g in memory.gates.items()}  # (heads, 2)
        c = memory.config
        s, alpha = c.beta * gate["eta"] / (1 + gate["eta"]), gate.get("alpha", torch.ones(()))
        factor = alpha * (1 - s) if c.decay_first else alpha - s
    percent = [round(100 * h, 1) for h in hits.tolist()]
    return dict(
        trained=round(sum(percent[:TRAINED]) / TRAINED, 1), longer=round(sum(percent[TRAINED:]) / TRAINED, 1),
        every=percent[::4], factors=[[round(f, 2) for f in head] for head in factor.tolist()],
    )  # fmt: skip


# ---- What is stored ----


def additions() -> dict:
    results = {}
    for task, arms in TRIED.items():
        for arm in arms:
            settings = ARMS[arm]
            lr, tuned = tune((0.003, 0.01, 0.03), lambda seed, lr: learn(task, seed, lr, **settings)[0], TUNING[:1])
            got = [round(learn(task, seed, lr, **settings)[0], 1) for seed in SEEDS]
            results[f"{task}, {arm}"] = dict(lr=lr, tuned=tuned, accuracy=got)
            print(task, arm, results[f"{task}, {arm}"], flush=True)
    return results


def parity() -> dict:
    results = {}
    for arm, settings in FACTORS.items():
        score = lambda seed, lr: count(seed, lr, **settings)["longer"]
        lr, tuned = tune((0.03, 0.1, 0.2), score, TUNING)
        results[arm] = dict(lr=lr, tuned=tuned, seeds=[count(seed, lr, **settings) for seed in SEEDS])
        print(arm, results[arm], flush=True)
    return results


def tune(rates, score, seeds) -> tuple[float, dict[str, float]]:
    """The rate with the best mean score, of equals the smallest; and all scores."""
    tuned = {lr: round(sum(score(seed, lr) for seed in seeds) / len(seeds), 1) for lr in rates}
    return max(tuned, key=tuned.get), {str(lr): a for lr, a in tuned.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    part = dict(additions=additions, parity=parity)[sys.argv[1]]
    begin = time.process_time()
    results = part()
    made = dict(
        command=f"python runs/titans.py {sys.argv[1]}", torch=torch.__version__, hope=hope.__version__, seeds=SEEDS,
        **{"cpu seconds": round(time.process_time() - begin)},
    )  # fmt: skip
    (HERE / f"titans-{sys.argv[1]}.json").write_text(json.dumps(dict(made=made, results=results), indent=1) + "\n")


if __name__ == "__main__":
    main()
