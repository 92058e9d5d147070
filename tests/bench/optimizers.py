"""What the optimizers do on real problems: tables, with seeds and spread.

    python tests/bench/optimizers.py [step] [landscape] [tasks] [text] [--seeds N] [--arch NAME] [--optimizers NAME,NAME,...]

step        time of M3's step as a ratio to torch's Muon, 8 matrices of 1024 x 1024, timed in turns in one run
landscape   eq. 53 and five other landscapes: steps to the optimum for momentum and delta momentum, both tuned
tasks       two tasks one after the other: what learning the second does to the loss on the first
text        a tiny model on the text that ships with Python: held-out bits per byte, every optimizer tuned
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from torch import nn

import hope
import optim
import train
from data import Corpus


def mean_and_spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


# ----------------------------------------------------------------------------------------------------------------------
# Step time


def step_time(turns: int = 6) -> None:
    def optimizer(make):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(1024, 1024)) for _ in range(8)]
        for p in params:
            p.grad = torch.randn_like(p)
        return make(params)

    kinds = {
        "AdamW": optimizer(torch.optim.AdamW),
        "Muon": optimizer(torch.optim.Muon),
        "M3": optimizer(optim.M3),
        "M3 literal": optimizer(lambda p: optim.M3(p, literal=True)),
    }
    spent = {name: [] for name in kinds}
    for _ in range(turns):
        for name, o in kinds.items():
            start = time.process_time()
            for _ in range(o.param_groups[0].get("every", 1) if name.startswith("M3") else 2):
                o.step()
            count = o.param_groups[0].get("every", 1) if name.startswith("M3") else 2
            spent[name].append((time.process_time() - start) / count)
    muon = min(spent["Muon"][1:])
    print(f"{torch.get_num_threads()} threads; CPU time of a step, fastest of {turns - 1} turns, in parts of Muon's")
    for name, times in spent.items():  # of M3 a turn is a whole period, so the slow momentum's move is in it
        print(f"{name:>12} {min(times[1:]) / muon:6.2f}")


# ----------------------------------------------------------------------------------------------------------------------
# Landscapes (eq. 53)


def psi(k, a, w):
    """psi(r, th) = r^2 + k (r - th + a sin(w r))^2"""
    return lambda z: z[0] ** 2 + k * (z[0] - z[1] + a * torch.sin(w * z[0])) ** 2


LANDSCAPES = {
    "psi, k 10, a 0.5, w 5": psi(10, 0.5, 5),
    "psi, k 1, a 1, w 3": psi(1, 1, 3),
    "psi, k 100, a 0.2, w 8": psi(100, 0.2, 8),
    "Rosenbrock": lambda z: (1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2,
    "quadratic, condition 100": lambda z: 0.5 * (z[0] ** 2 + 100 * z[1] ** 2),
    "Beale": lambda z: (1.5 - z[0] + z[0] * z[1]) ** 2 + (2.25 - z[0] + z[0] * z[1] ** 2) ** 2 + (2.625 - z[0] + z[0] * z[1] ** 3) ** 2,
}  # fmt: skip


def steps_to_optimum(landscape, lr, momentum, delta, scale, most=1000, target=1e-4):
    """Steps until the value stays below target for 10 steps; all settings (n,) are run at once. inf where never."""
    n = len(lr)
    z = torch.tensor([-3.5, 2.0], dtype=torch.float64)[:, None].repeat(1, n)
    m, below, when = torch.zeros_like(z), torch.zeros(n), torch.full((n,), math.inf)
    for step in range(1, most + 1):
        z.requires_grad_()
        [g] = torch.autograd.grad(landscape(z).sum(), z)
        square = g.square().sum(0)
        m = m * (momentum - delta * square / (1 + scale * delta * square)) - lr * g
        z = (z + m).detach()
        below = torch.where(landscape(z) < target, below + 1, 0.0)
        when = torch.where((below >= 10) & when.isinf(), step - 9.0, when)
    return when


def steps_of(optimizer_of, landscape, most=1000, target=1e-4) -> float:
    """The same for one optimizer, by its own step."""
    z, below = nn.Parameter(torch.tensor([-3.5, 2.0], dtype=torch.float64)), 0
    optimizer = optimizer_of(z)
    for step in range(1, most + 1):
        optimizer.zero_grad()
        landscape(z).backward()
        optimizer.step()
        below = below + 1 if landscape(z.detach()) < target else 0
        if below == 10:
            return step - 9
    return math.inf


def landscapes() -> None:
    """Every rule gets the same number of settings. `DeltaMomentum` takes the best one's steps, which is checked."""
    rates = lambda n: torch.logspace(-5, 0, n, dtype=torch.float64)
    momenta = torch.tensor([0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999])
    deltas = torch.logspace(-6, 0, 16, dtype=torch.float64)
    lr, momentum = torch.cartesian_prod(rates(161), momenta.double()).unbind(1)
    lr3, momentum3, delta3 = torch.cartesian_prod(rates(23), momenta[1::2].double()[:7], deltas).unbind(1)
    none, one = torch.zeros_like(lr), torch.ones_like(lr)
    rules = {
        "momentum": (lr, momentum, none, 0),
        "printed": (lr, momentum, one, 0),  # no step size on g^T g
        "one rate": (lr, momentum, lr, 0),
        "two rates": (lr3, momentum3, delta3, 0),
        "bounded": (lr3, momentum3, delta3, 1),
    }
    print(f"{len(lr)} settings of rules with one rate, {len(lr3)} of those with two")
    print(f"{'steps to 1e-4 from (-3.5, 2)':<28}" + "".join(f"{rule:>11}" for rule in rules))
    results = {rule: [] for rule in rules}
    for name, landscape in LANDSCAPES.items():
        best = {}
        for rule, (*settings, scale) in rules.items():
            when, at = steps_to_optimum(landscape, *settings, scale).min(0)
            best[rule] = when.item()
            if rule == "bounded":  # the others bounce about so wildly at their best that rounding decides
                values = dict(zip(("lr", "momentum", "delta"), (z[at].item() for z in settings)))
                ours = steps_of(lambda z: optim.DeltaMomentum([z], bounded=bool(scale), **values), landscape)
                assert ours == best[rule], (name, rule, ours, best[rule])
            sign = (best[rule] > best["momentum"]) - (best[rule] < best["momentum"])
            results[rule].append({-1: "wins", 0: "ties", 1: "loses"}[sign])
        print(f"{name:<28}" + "".join(f"{steps:>11.0f}" for steps in best.values()), flush=True)
    for rule in ("printed", "one rate", "two rates", "bounded"):
        print(
            f"{rule} against momentum: " + ", ".join(f"{r} {results[rule].count(r)}" for r in ("wins", "ties", "loses"))
        )


# ----------------------------------------------------------------------------------------------------------------------
# Two tasks


def two_tasks(make, seed: int, overlap: float, first: int, second: int = 200) -> tuple[float, float, float]:
    """Two linear regressions one after the other, eq. 45's setting: the inputs of each span 8 of 32 dimensions.

    The principal angles between the two spans have cosine `overlap`; one matrix solves both. Gradients are of 4 samples.
    Returns, in parts of the loss at the start: the first task's loss when it is left after `first` steps and after
    `second` steps on the second task, and the second's then.
    """
    torch.manual_seed(seed)
    U = torch.linalg.qr(torch.randn(32, 32))[0]
    spans = U[:, :8], overlap * U[:, :8] + (1 - overlap**2) ** 0.5 * U[:, 8:16]
    target, W = torch.randn(8, 32), nn.Parameter(torch.zeros(8, 32))
    optimizer = make(W)

    def loss(task, x=None):
        error = (W - target) @ spans[task]
        return (error if x is None else error @ x / len(x.T) ** 0.5).square().sum() / 2

    start, left = [loss(t).item() for t in (0, 1)], None
    for task, steps in ((0, first), (1, second)):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(task, torch.randn(8, 4)).backward()
            optimizer.step()
        left = loss(0).item() / start[0] if left is None else left
    return left, loss(0).item() / start[0], loss(1).item() / start[1]


def tasks(seeds: int) -> None:
    """Decay 0.9 for all; rate and, where there is one, delta or alpha tuned on other seeds for the least final loss on both."""
    rates = [10**e for e in (-2.5, -2, -1.75, -1.5, -1.25, -1, -0.5)]
    kinds = {
        "momentum": [lambda W, lr=lr: torch.optim.SGD([W], lr=lr, momentum=0.9) for lr in rates],
        "delta momentum": [lambda W, lr=lr, d=d: optim.DeltaMomentum([W], lr=lr, delta=d) for lr in rates for d in (0.01, 0.1, 1.0)],
        "M3": [lambda W, lr=lr, a=a: optim.M3([W], lr=10 * lr, alpha=a, dtype=torch.float32, betas=(0.9, 0.95, 0.9)) for lr in rates for a in (0.0, 0.5)],
    }  # fmt: skip
    print(f"losses in parts of those at the start, {seeds} seeds")
    for title, overlap, first in (
        ("orthogonal tasks, the first left when learnt, after 200 steps", 0.0, 200),
        ("orthogonal tasks, the first left after 10 steps", 0.0, 10),
        ("tasks that overlap by 0.5, the first left when learnt, after 200 steps", 0.5, 200),
    ):
        print(title)
        plain = None
        for name, settings in kinds.items():
            cost = lambda make: sum(sum(two_tasks(make, seed, overlap, first)[1:]) for seed in (1000, 1001))
            make = min(settings, key=lambda make: c if (c := cost(make)) == c else math.inf)
            left, end, other = zip(*(two_tasks(make, seed, overlap, first) for seed in range(seeds)))
            rows = {"left at": left, "ends at": end, "forgotten": [e - b for e, b in zip(end, left)], "second": other}
            plain = plain or end
            less = f"  below momentum in {sum(e < p for e, p in zip(end, plain))}" if name != "momentum" else ""
            print(f"{name:>16}  " + "  ".join(f"{k} {mean_and_spread(v)}" for k, v in rows.items()) + less, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Text

SCALES = {
    "muon": (0.3, 1.0, 3.0, 10.0),
    "adamw": (0.1, 0.3, 1.0, 3.0),
    "m3": (0.3, 1.0, 3.0, 10.0),
    "dgd": (10.0, 30.0, 100.0, 300.0),
    "delta-momentum": (3.0, 10.0, 30.0, 100.0),
    "deep-momentum": (10.0, 30.0, 100.0, 300.0),
}


def bits_per_byte(optimizer: str, scale: float, seed: int, arch: str, steps: int = 100) -> float:
    """Held-out bits per byte of a tiny model after `steps` steps of 2 x 256 bytes; inf if it diverged."""
    torch.manual_seed(seed)
    config = train.TrainConfig(optimizer=optimizer, steps=steps, seq_len=256, seed=seed)
    corpus = Corpus.open(config)
    model = hope.Hope(hope.HopeConfig.preset("tiny", arch, vocab_size=corpus.tokenizer.vocab_size))
    train.MATRIX_LR[optimizer] = scale
    optimizers = train.make_optimizers(model, config)
    for step in range(steps):
        lr = train.learning_rate(step, config)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            o.zero_grad()
        x, y = corpus.batch(step, range(config.batch_size))
        model.observe(x, y, backward=True)
        if not nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).isfinite():
            return math.inf
        for o in optimizers:
            o.step()
    with torch.no_grad():
        loss = model.observe(*corpus.validation(10))[0].item() * corpus.tokens_per_byte / math.log(2)
    return loss if math.isfinite(loss) else math.inf


def text(optimizers: list[str], seeds: int, arch: str) -> None:
    print(f"held-out bits per byte, {arch}, size tiny, 100 steps of 2 x 256 bytes; AdamW at 0.01 for what is no matrix")
    for name in optimizers:
        first = {}
        for scale in SCALES[name]:
            first[scale] = bits_per_byte(name, scale, 0, arch)
            print(f"{name:>16}  matrix learning rate {0.01 * scale:<6g} {first[scale]:.3f}", flush=True)
        best = min(first, key=first.get)
        values = [first[best], *(bits_per_byte(name, best, seed, arch) for seed in range(1, seeds))]
        print(f"{name:>16}  best {0.01 * best:g}: {mean_and_spread(values)} over seeds 0 to {seeds - 1}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("step", "landscape", "tasks", "text")
    parser.add_argument("parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arch", default="hope", choices=hope.HopeConfig.ARCHS)
    parser.add_argument("--optimizers", default=",".join(SCALES))
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if "step" in args.parts:
        step_time()
    if "landscape" in args.parts:
        landscapes()
    if "tasks" in args.parts:
        tasks(max(5, args.seeds))
    if "text" in args.parts:
        text(args.optimizers.split(","), args.seeds, args.arch)


if __name__ == "__main__":
    main()
