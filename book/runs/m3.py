"""The long run of chapter 11: AdamW, Muon and M3 on a small vision Transformer and on two small language models.

    python book/runs/m3.py                      digits, permuted and text, about 12 minutes of one core; writes m3.json
    python book/runs/m3.py hope                 one task: digits, permuted, text or hope
    python book/runs/m3.py digits Muon M3       some of its optimizers

Only the optimizer of the *matrices* differs. Embeddings, norms and the output head get AdamW at one fixed rate in every
run. Every optimizer's rate is tuned on validation data and on seeds that are not shown again; the chosen rate is then
run on three new seeds and scored on test data. Results replace those of the same task and optimizer in the JSON file.

digits      a ViT on scikit-learn's 1,797 handwritten digits: 1,000 to train, 297 to tune, 500 to test
permuted    the same ViT on the digits, then on digits with their pixels in another order: what the second costs the first
text        Transformer++ on the help pages that ship with Python, in bytes
hope        Hope on the same; takes longer, and the chapter does without
"""

from __future__ import annotations

import json
import math
import platform
import re
import sys
import time
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hope
import optim
from data import write_atomically

RESULTS = Path(__file__).with_suffix(".json")
SEEDS, TUNING = (0, 1, 2), (100, 101)
REST = 0.01  # AdamW's rate for what is no matrix

# What moves the matrices, from a rate. Muon's and M3's steps have the root mean square 0.2 of AdamW's; the literal M3's do not.
OPTIMIZERS = {
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    "Muon": lambda params, lr: torch.optim.Muon(params, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    "M3": lambda params, lr: optim.M3(params, lr=lr),
    "M3, no slow memory": lambda params, lr: optim.M3(params, lr=lr, alpha=0.0),
    "M3 as printed": lambda params, lr: optim.M3(params, lr=lr, literal=True),
}
RATES = {
    "AdamW": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "Muon": (0.001, 0.003, 0.01, 0.03, 0.1),
    "M3": (0.001, 0.003, 0.01, 0.03, 0.1),
    "M3, no slow memory": (0.001, 0.003, 0.01, 0.03, 0.1),
    "M3 as printed": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
}


# ----------------------------------------------------------------------------------------------------------------------
# Tasks: a model, the optimizer's view of its parameters, batches, and a score


class ViT(nn.Module):
    """A vision Transformer: an image (b, 8, 8) in 16 patches of 2 x 2 and a class token -> logits (b, 10)."""

    def __init__(self, d: int = 48, n_layer: int = 2, n_head: int = 4):
        super().__init__()
        self.n_head = n_head
        self.embed = nn.Linear(4, d)
        self.position = nn.Parameter(0.02 * torch.randn(17, d))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_in": nn.LayerNorm(d),
                    "q": nn.Linear(d, d, bias=False),
                    "k": nn.Linear(d, d, bias=False),
                    "v": nn.Linear(d, d, bias=False),
                    "out": nn.Linear(d, d, bias=False),
                    "norm_mlp": nn.LayerNorm(d),
                    "up": nn.Linear(d, 4 * d),
                    "down": nn.Linear(4 * d, d),
                }
            )
            for _ in range(n_layer)
        )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), 16, 4)
        x = F.pad(self.embed(patches), (0, 0, 1, 0)) + self.position
        heads = lambda z: z.unflatten(2, (self.n_head, -1)).transpose(1, 2)
        for f in self.layers:
            z = f["norm_in"](x)
            y = F.scaled_dot_product_attention(*(heads(f[name](z)) for name in ("q", "k", "v")))
            x = x + f["out"](y.transpose(1, 2).flatten(2))
            x = x + f["down"](F.gelu(f["up"](f["norm_mlp"](x))))
        return self.head(self.norm(x[:, 0]))


@cache
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images (n, 8, 8) from 0 to 1 and labels (n,): train, validation, test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.images).float()[order] / 16, torch.tensor(data.target)[order]
    return {name: (x[s], y[s]) for name, s in (("train", slice(1000)), ("validation", slice(1000, 1297)), ("test", slice(1297, None)))}  # fmt: skip


def plain(images: Tensor) -> Tensor:
    return images


def shuffled(images: Tensor) -> Tensor:
    """The same images with their 64 pixels in one other order."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    return images.flatten(1)[:, order].view_as(images)


@torch.no_grad()
def image_score(model: ViT, part: str, view=plain) -> tuple[float, float]:
    """Mean loss in nats, and accuracy."""
    x, y = digits()[part]
    logits = model(view(x))
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


@cache
def text() -> dict[str, Tensor]:
    """Bytes of Python's help pages: train, validation, test."""
    data = torch.tensor(list("".join(topics[name] for name in sorted(topics)).encode()))
    a, b = len(data) - 60_000, len(data) - 30_000
    return {"train": data[:a], "validation": data[a:b], "test": data[b:]}


def language_model(arch: str) -> hope.Hope:
    more = {"cms": (64, math.inf)} if arch == "hope" else {}
    return hope.Hope(hope.HopeConfig.preset("tiny", arch, vocab_size=256, d_model=64, n_head=2, **more))


@torch.no_grad()
def text_score(model: hope.Hope, part: str, length: int = 128) -> float:
    """Mean loss in nats over 48 windows spread over the part. The CMS writes as it does in training."""
    data = text()[part]
    starts = torch.linspace(0, len(data) - length - 1, 48).long()
    windows = torch.stack([data[i : i + length + 1] for i in starts])
    return model.observe(windows[:, :-1], windows[:, 1:])[0].item()


# ----------------------------------------------------------------------------------------------------------------------
# One run


def optimizers_for(model: nn.Module, name: str, lr: float) -> list[torch.optim.Optimizer]:
    groups = hope.param_groups(model)
    return [OPTIMIZERS[name](groups["matrix"], lr), OPTIMIZERS["AdamW"](groups["rest"], REST)]


def train(loss_of, optimizers: list[torch.optim.Optimizer], steps: int) -> list[float]:
    """Steps with rates that rise over a twentieth of the run and fall to 0; the training losses. `loss_of(step)` leaves
    gradients behind and returns the loss."""
    rates, losses = [[g["lr"] for g in o.param_groups] for o in optimizers], []
    for step in range(steps):
        scale = min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))
        for o, lrs in zip(optimizers, rates):
            o.zero_grad()
            for group, lr in zip(o.param_groups, lrs):
                group["lr"] = lr * scale
        losses.append(loss_of(step))
        nn.utils.clip_grad_norm_([p for o in optimizers for g in o.param_groups for p in g["params"]], 1.0)
        for o in optimizers:
            o.step()
    return losses


def curve(losses: list[float], points: int = 20) -> list[float]:
    """Means over equal parts of the run."""
    size = len(losses) // points
    return [round(sum(losses[i * size : (i + 1) * size]) / size, 3) for i in range(points)]


def image_losses(model: ViT, seed: int, view=plain, batch: int = 64):
    g = torch.Generator().manual_seed(seed)
    x, y = digits()["train"]
    x = view(x)

    def loss_of(step: int) -> float:
        rows = torch.randint(len(x), (batch,), generator=g)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        return loss.item()

    return loss_of


def run_digits(name: str, lr: float, seed: int, part: str, steps: int = 200) -> dict:
    torch.manual_seed(seed)
    model = ViT()
    losses = train(image_losses(model, seed), optimizers_for(model, name, lr), steps)
    loss, accuracy = image_score(model, part)
    return {"train": curve(losses), "loss": round(loss, 4), "accuracy": round(accuracy, 4)}


def run_permuted(name: str, lr: float, seed: int, steps: int = 120) -> dict[str, float]:
    """Test losses of two tasks learnt one after the other by one optimizer that keeps its memories, the rate rising and
    falling for each: the first when it is left, the first at the end, the second at the end."""
    torch.manual_seed(seed)
    model, losses = ViT(), []
    optimizers = optimizers_for(model, name, lr)
    start = [[g["lr"] for g in o.param_groups] for o in optimizers]
    for draw, view in ((seed, plain), (seed + 1000, shuffled)):
        for o, lrs in zip(optimizers, start):
            for group, rate in zip(o.param_groups, lrs):
                group["lr"] = rate
        train(image_losses(model, draw, view), optimizers, steps)
        losses += [image_score(model, "test", plain)[0]]
    return {"left": losses[0], "first": losses[1], "second": image_score(model, "test", shuffled)[0]}


def run_text(name: str, lr: float, seed: int, part: str, arch: str = "transformer++", steps: int = 300) -> dict:
    torch.manual_seed(seed)
    model, g, data = language_model(arch), torch.Generator().manual_seed(seed), text()["train"]

    def loss_of(step: int) -> float:
        starts = torch.randint(len(data) - 129, (4,), generator=g)
        x = torch.stack([data[i : i + 129] for i in starts])
        return model.observe(x[:, :-1], x[:, 1:], backward=True)[0].item()

    losses = train(loss_of, optimizers_for(model, name, lr), steps)
    return {"train": curve(losses), "loss": round(text_score(model, part), 4)}


TASKS = {
    "digits": run_digits,
    "permuted": run_permuted,
    "text": run_text,
    "hope": partial(run_text, arch="hope", steps=80),
}
SKIPPED = {(task, "M3 as printed") for task in ("permuted", "text", "hope")}


def sweep(name: str) -> dict:
    """`permuted` at every rate and shown seed: one number would hide that who learns the second task less forgets less."""
    runs = {lr: [run_permuted(name, lr, seed) for seed in SEEDS] for lr in RATES[name]}
    return {str(lr): {k: [round(r[k], 3) for r in rs] for k in rs[0]} for lr, rs in runs.items()}


def tuned(task: str, name: str) -> dict:
    """The validation loss at every rate, and three runs at the best one."""
    run, tuning = TASKS[task], {}
    seeds = TUNING if task == "digits" else TUNING[:1]  # 297 images differ more than 48 windows of text
    for lr in RATES[name]:
        tuning[lr] = round(sum(run(name, lr, seed, "validation")["loss"] for seed in seeds) / len(seeds), 4)
    best = min(tuning, key=lambda lr: tuning[lr] if math.isfinite(tuning[lr]) else math.inf)
    return {"tuning": tuning, "rate": best, "runs": [run(name, best, seed, "test") for seed in SEEDS]}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if unknown := set(sys.argv[1:]) - {*TASKS, *OPTIMIZERS}:
        sys.exit(f"m3.py knows no {', '.join(sorted(unknown))}; allowed: {', '.join([*TASKS, *OPTIMIZERS])}")
    for task in [a for a in sys.argv[1:] if a in TASKS] or ("digits", "permuted", "text"):
        for name in [a for a in sys.argv[1:] if a in OPTIMIZERS] or OPTIMIZERS:
            if (task, name) in SKIPPED:
                continue
            start = time.process_time()
            found = sweep(name) if task == "permuted" else tuned(task, name)
            stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            stored["command"] = "python book/runs/m3.py"
            stored["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
            stored["seeds"] = {"tuning": TUNING, "shown": SEEDS}
            stored.setdefault(task, {})[name] = found
            stored.setdefault("cpu seconds", {})[f"{task}, {name}"] = round(time.process_time() - start)
            text = re.sub(r"\[[^][{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]), json.dumps(stored, indent=1))
            write_atomically(RESULTS, text + "\n")
            print(task, name, found, flush=True)


if __name__ == "__main__":
    main()
