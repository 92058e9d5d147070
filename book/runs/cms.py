"""The runs that chapter 10 reads: wirings and learnt rates on a small world, and text with writes on, off and never.

    python runs/cms.py wirings      in the folder book/; about 7 minutes on one core; writes runs/cms-wirings.json
    python runs/cms.py writes       about 1 minute; writes runs/cms-writes.json

Seeds: a run's seed sets the model's start and its training streams. Settings are tuned with seed 0 on streams of their
own; results are for seeds 0 to 2 and on other streams.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import VOCAB, language_and_topics, table

import hope
from data import pydoc_text

SEEDS = (0, 1, 2)
STAY, LENGTH = 64, 256  # tokens that a topic stays, and of a training stream


def reader(
    wiring: str = "sequential", cms: tuple = (16, 64), rate: float = 2.0, seed: int = 0, **settings
) -> hope.Hope:
    """A model with nothing but a CMS between embedding and head: its sequence layer is silent and not trained."""
    torch.manual_seed(seed)
    settings = {"d_model": 32, "cms_hidden": 2.0, **settings}
    config = hope.HopeConfig.preset(
        "tiny", "hope-attention", n_head=1, n_layer=1, vocab_size=VOCAB, conv=0, window=1,
        cms=cms, cms_rate=(rate,), wiring=wiring, **settings,
    )  # fmt: skip
    model = hope.Hope(config)
    memory = model.blocks[0].memory.requires_grad_(False)
    memory.to_y.weight.zero_()
    return model


def world(b: int, t: int, g: torch.Generator, shift: int = 0) -> torch.Tensor:
    """b streams of t tokens, each with a language of its own and new topics, the first of which is cut by `shift`."""
    language, n = table(b, g), -(-(t + shift) // STAY)
    topics = table(b * n, g).view(b, n, VOCAB)
    return language_and_topics(language, topics, STAY, t + shift, g)[:, shift:]


def learn(model: hope.Hope, seed: int, steps: int = 80, fits: bool = True, lr: float = 0.01) -> list[list[float]]:
    """Train on the world by AdamW; the learnt rates after every tenth step. `fits`: topics begin where slow chunks do."""
    g = torch.Generator().manual_seed(1000 + seed)
    rates, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (rates if name.endswith("raw_rates") else rest).append(p)
    groups = [{"params": rest, "lr": lr}, {"params": rates, "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, 0.1], total_steps=steps, pct_start=0.1)
    course = []
    for step in range(steps + 1):
        if step % 10 == 0:
            course.append([round(r.item(), 3) for r in model.blocks[0].cms.rates()])
        if step == steps:
            break
        shift = 0 if fits else int(torch.randint(STAY, (1,), generator=g))
        x = world(12, LENGTH, g, shift)
        optimizer.zero_grad()
        model.observe(x[:, :-1], x[:, 1:], backward=True)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        optimizer.step()
        schedule.step()
    return course


@torch.no_grad()
def score(model: hope.Hope, seed: int, fits: bool = True, b: int = 64) -> torch.Tensor:
    """Nats per token by place in the topic, four quarters of 16 tokens, in the last seven topics of new streams. (4,)"""
    shift = 0 if fits else STAY // 2
    x = world(b, 8 * STAY + STAY - shift, torch.Generator().manual_seed(seed), shift)
    loss, _ = model.observe(x[:, :-1], x[:, 1:], reduction="none")
    return loss[:, STAY - shift :].view(b, 8, 4, STAY // 4)[:, 1:].mean((0, 1, 3))


def rounded(z: torch.Tensor) -> list:
    return [round(v, 4) for v in z.tolist()]


def sweep(model: hope.Hope, seed: int) -> list[list[float]]:
    """Mean loss with the rate of one level multiplied by FACTORS, the others as learnt; a row for each level."""
    learnt = [r.item() for r in model.blocks[0].cms.rates()]
    rows = []
    for level in range(len(learnt)):
        row = []
        for factor in FACTORS:
            rates = tuple(r * (factor if i == level else 1.0) for i, r in enumerate(learnt))
            other = hope.Hope(replace(model.config, cms_rate=rates, learn_rates=False))
            other.load_state_dict(model.state_dict(), strict=False)
            row.append(score(other, seed).mean())
        rows.append(rounded(torch.stack(row)))
    return rows


FACTORS = (0.125, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)


def wirings() -> dict:
    arms = {
        "sequential": dict(wiring="sequential"),
        "nested": dict(wiring="nested"),
        "independent": dict(wiring="independent"),
        "one level": dict(cms=(16,), cms_hidden=4.0),  # as many numbers, one clock
    }
    found: dict = {"factors": FACTORS, "runs": {}, "sweeps": {}}
    for fits in (True, False):
        for name, arm in arms.items():
            key, tuning, models = f"{name}, clocks {'fit' if fits else 'do not fit'}", {}, {}
            for rate in (0.5, 1.0, 2.0, 4.0, 8.0):
                models[rate] = reader(rate=rate, **arm)
                course = learn(models[rate], 0, fits=fits)
                tuning[rate] = {"loss": round(score(models[rate], 7, fits).mean().item(), 4), "rates": course}
            best = min(tuning, key=lambda rate: tuning[rate]["loss"])
            runs = []
            for seed in SEEDS:
                model = models[best] if seed == 0 else reader(rate=best, seed=seed, **arm)
                course = learn(model, seed, fits=fits) if seed else tuning[best]["rates"]
                runs.append({"quarters": rounded(score(model, 8, fits)), "rates": course[-1]})
                if fits and name in ("sequential", "nested"):
                    found["sweeps"].setdefault(name, []).append(sweep(model, 9))
            if not (fits and name in ("sequential", "nested")):  # where the rates went is drawn for these only
                tuning = {rate: {"loss": t["loss"], "rates": t["rates"][-1:]} for rate, t in tuning.items()}
            found["runs"][key] = {"tuning": tuning, "best": best, "seeds": runs}
            print(key, best, [r["quarters"] for r in runs], [r["rates"] for r in runs], flush=True)
    best, runs = found["runs"]["sequential, clocks fit"]["best"], []
    for seed in SEEDS:
        model = reader(rate=best, seed=seed, inner_grad="full")
        course = learn(model, seed)
        runs.append({"quarters": rounded(score(model, 8)), "rates": course[-1]})
    found["runs"]["sequential, full inner gradient"] = {"best": best, "seeds": runs}
    print(found["runs"]["sequential, full inner gradient"], flush=True)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Text

RATES, SWITCHED = (0.01, 0.02, 0.04), (0.3, 1.0, 3.0)  # outer learning rates; inner ones of writes switched on at test


def writer(seed: int, rate: float, learn_rates: bool = True) -> hope.Hope:
    torch.manual_seed(seed)
    return hope.Hope(
        hope.HopeConfig.preset(
            "tiny", "hope-attention", d_model=64, n_head=2, n_layer=1, cms=(32, 128, hope.INF), cms_hidden=2.0,
            cms_rate=(rate,), learn_rates=learn_rates,
        )
    )  # fmt: skip


def windows(text: bytes, n: int, t: int, g: torch.Generator | None = None) -> torch.Tensor:
    """n windows of t + 1 bytes, at random or evenly spread."""
    last = len(text) - t - 1
    starts = torch.linspace(0, last, n).long() if g is None else torch.randint(last, (n,), generator=g)
    return torch.stack([torch.tensor(list(text[s : s + t + 1])) for s in starts.tolist()])


def bits(model: hope.Hope, text: bytes, levels: tuple | None = None) -> float:
    x = windows(text, 16, 1024)
    with torch.no_grad():
        return round(model.observe(x[:, :-1], x[:, 1:], levels=levels)[0].item() / math.log(2), 4)


def writes() -> dict:
    training, held_out = (part.encode() for part in pydoc_text())
    half = len(held_out) // 2
    code = "".join(inspect.getsource(__import__(name)) for name in ("argparse", "subprocess")).encode()
    tuning, shown = held_out[:half], {"held-out text": held_out[half:], "program code": code}

    def trained(seed: int, rate: float, lr: float, steps: int = 150) -> hope.Hope:
        model, g = writer(seed, rate), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            x = windows(training, 6, 256, g)
            optimizer.zero_grad()
            model.observe(x[:, :-1], x[:, 1:], backward=True)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return model

    def switched_on(model: hope.Hope, rate: float) -> hope.Hope:
        other = writer(0, rate, learn_rates=False)
        other.load_state_dict(model.state_dict(), strict=False)
        return other

    found: dict = {"tuning": {}, "best": {}, "bits per byte": {}}
    models = {}
    for name, rate in (("writes", 1.0), ("never", 0.0)):
        for lr in RATES:
            models[name, lr] = trained(0, rate, lr)
            found["tuning"][f"{name}, lr {lr}"] = bits(models[name, lr], tuning)
        best = found["best"][name] = min(RATES, key=lambda lr: found["tuning"][f"{name}, lr {lr}"])
        models |= {(name, seed): trained(seed, rate, best) if seed else models[name, best] for seed in SEEDS}
        print(found, flush=True)
    for rate in SWITCHED:
        found["tuning"][f"switched on at test, rate {rate}"] = bits(switched_on(models["never", 0], rate), tuning)
    best = found["best"]["switched on at test"] = min(
        SWITCHED, key=lambda rate: found["tuning"][f"switched on at test, rate {rate}"]
    )
    for text, its in shown.items():
        found["bits per byte"][text] = {
            "on": [bits(models["writes", s], its) for s in SEEDS],
            "off at test": [bits(models["writes", s], its, ()) for s in SEEDS],
            "never": [bits(models["never", s], its) for s in SEEDS],
            "on at test only": [bits(switched_on(models["never", s], best), its) for s in SEEDS],
        }
    found["learnt rates"] = [rounded(torch.stack(models["writes", s].blocks[0].cms.rates())) for s in SEEDS]
    return found


if __name__ == "__main__":
    parts = {"wirings": wirings, "writes": writes}
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        raise SystemExit(f"give one of: {', '.join(parts)}")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    began = time.process_time()
    result = parts[sys.argv[1]]()
    made = {
        "command": f"python runs/cms.py {sys.argv[1]}",
        "seeds": SEEDS,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "cpu seconds": round(time.process_time() - began),
    }
    (HERE / f"cms-{sys.argv[1]}.json").write_text(json.dumps({"made": made, **result}) + "\n")
    print(made)
