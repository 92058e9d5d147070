"""Figures of evaluation.py as tables, in the paper's layout, and as pictures.

A row is a line of evaluation.jsonl: task, metric, value, stderr, n, curve; memorize (how the CMS learnt while it read,
or null), model (name, step, ...), tokens_per_s.
"""

from __future__ import annotations

import math
import re
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from tasks import LANGUAGES

MAD = ("compression", "in-context-recall", "fuzzy-recall", "selective-copying", "memorisation")


class Layout(NamedTuple):
    """A table of the paper: tasks and metrics of its columns, what makes ours theirs, and its rows."""

    title: str
    columns: list[tuple[str, str, float]]
    rows: dict[str, str]


LAYOUTS = [
    Layout(
        "Table 1, needles in a haystack (%)",
        [(f"niah_single_{i}", str(length), 100) for i in (1, 2, 3) for length in (4096, 8192, 16384)],
        {
            "Transformer": "88.6 76.4 79.8 100 98.8 94.2 78.0 69.2 40.8",
            "Hope-Attention": "100 100 100 100 98.4 94.4 76.8 68.8 42.4",
            "Titans": "100 100 100 99.6 84.6 75.4 74.2 42.8 21.2",
            "Hope": "100 100 100 99.2 88.4 78.2 73.2 46.2 24.8",
        },
    ),
    Layout(
        "Table 2, language modelling (perplexity) and common sense (%)",
        [("wikitext", "word_perplexity", 1), ("lambada_openai", "perplexity", 1), ("lambada_openai", "acc", 100),
         ("piqa", "acc", 100), ("hellaswag", "acc_norm", 100), ("winogrande", "acc", 100), ("arc_easy", "acc", 100),
         ("arc_challenge", "acc_norm", 100), ("social_iqa", "acc", 100), ("boolq", "acc", 100)],
        {
            "Transformer++ 760M": "24.18 24.27 37.1 67.2 43.8 53.0 65.6 33.4 39.1 61.7",
            "DeltaNet 760M": "24.52 24.38 36.8 67.3 44.5 51.8 64.2 32.7 39.6 60.1",
            "Titans 760M": "20.08 21.52 38.1 69.1 48.5 52.7 66.2 35.7 40.3 62.8",
            "Hope 760M": "18.68 20.07 38.8 69.2 49.1 53.6 66.8 36.1 41.2 63.4",
            "Transformer++ 1.3B": "17.92 17.73 42.6 71.4 52.3 54.1 69.9 36.5 41.8 58.4",
            "DeltaNet 1.3B": "18.62 17.10 41.6 70.1 49.4 52.7 67.6 35.2 39.7 54.8",
            "Titans 1.3B": "15.60 11.41 49.1 73.1 56.3 59.8 72.4 40.8 42.1 61.0",
            "Hope 1.3B": "14.39 10.08 51.0 73.9 57.5 61.2 73.8 42.7 42.8 61.4",
        },
    ),
    Layout(
        "Table 4, MAD (%)",
        [(name, "accuracy", 1) for name in MAD],
        {"Transformer": "49.4 100 47.9 96.2 83.7", "Titans": "49.8 100 50.0 99.4 83.4", "Hope": "51.2 100 52.1 99.7 85.2"},
    ),
    Layout(
        "Table 5, formal languages (% of strings)",
        [(name, length, 1) for name in LANGUAGES for length in ("1-40", "41-80")],
        {"Hope": " ".join(["100"] * 12)},
    ),
]  # fmt: skip


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    line = lambda row: "  ".join([row[0].ljust(widths[0]), *(z.rjust(w) for z, w in zip(row[1:], widths[1:]))]).rstrip()
    return "\n".join(map(line, rows))


def column_of(row: dict) -> str:
    """Under what a figure stands: the model, and how it read."""
    step = f", step {row['model']['step']}" if row["model"]["step"] else ""
    m = row["memorize"]
    how = [f"{name} {m[name]}" for name, usual in (("surprise", 0), ("steps", 1)) if m[name] != usual] if m else []
    how += [name for name in ("answer", "keep") if m and m[name]]
    return row["model"]["name"] + step + ("; memorised" + f" ({', '.join(how)})" * bool(how) if m else "")


def tables(rows: list[dict]) -> str:
    """Every figure with the columns side by side; then what the paper has, in its layout, its rows below ours."""
    columns = [*dict.fromkeys(map(column_of, rows))]
    cells, speeds, metrics = {}, {}, {}
    for row in rows:
        metrics.setdefault(row["task"], {})[row["metric"]] = None  # in their order
        error = "" if row["stderr"] is None else f" ±{row['stderr']:.2g}"
        cells[row["task"], row["metric"], column_of(row)] = row["value"], f"{row['value']:.4g}{error}"
        if row["tokens_per_s"]:
            speeds[row["task"], column_of(row)] = f"{row['tokens_per_s']:,.0f}"
    body = [["", *columns]]
    for task, names in metrics.items():
        speed = [speeds.get((task, c), "") for c in columns]
        lines = [["tokens/s", *speed]] if any(speed) else []
        lines += [[metric, *(cells.get((task, metric, c), ("", ""))[1] for c in columns)] for metric in names]
        body += [[f"{name:<14} {what}", *rest] for name, (what, *rest) in zip(chain([task], repeat("")), lines)]
    parts = [aligned(body)]
    plain = {(task.split(",")[0], metric, c): value for (task, metric, c), (value, _) in cells.items()}
    for title, names, paper in LAYOUTS:
        if not any((*name[:2], c) in plain for name in names for c in columns):
            continue
        body = [[title, *(f"{task}:{metric}" for task, metric, _ in names), "average"]]
        for c in columns:
            values = [plain.get((task, metric, c), math.nan) * factor for task, metric, factor in names]
            body.append([c, *("-" if math.isnan(z) else f"{z:.2f}" for z in values)])
            body[-1].append(average(values, names))
        for name, text in paper.items():
            body.append([f"paper: {name}", *text.split(), average([*map(float, text.split())], names)])
        parts.append(aligned(body))
    return "\n\n".join([*parts, *forgotten(rows)])


def average(values: list[float], names: list) -> str:
    """Of the percents, where none is missing."""
    percents = [z for z, (_, metric, _) in zip(values, names) if "perplexity" not in metric]
    return "-" if any(map(math.isnan, percents)) else f"{np.mean(percents):.2f}"


def lower_is_better(metric: str) -> bool:
    return any(name in metric for name in ("perplexity", "bits", "loss", "forgetting"))


def by_checkpoint(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows of the same figure at different times, if there are several."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["task"], row["metric"], "; memorised" * bool(row["memorize"])), []).append(row)
    return {name: some for name, some in found.items() if len(some) > 1}


def forgotten(rows: list[dict]) -> list[str]:
    """How far the last checkpoint is from the best one before it."""
    body = [["forgetting over checkpoints", "best", "last", "forgotten"]]
    for (task, metric, how), some in by_checkpoint(rows).items():
        values = [row["value"] for row in some]
        best = (min if lower_is_better(metric) else max)(values)
        lost = values[-1] - best if lower_is_better(metric) else best - values[-1]
        body.append([f"{task} {metric}{how}", f"{best:.4g}", f"{values[-1]:.4g}", f"{lost:.4g}"])
    return [aligned(body)] if len(body) > 1 else []


def draw(path: Path, title: str, x: str, y: str, curves: dict[str, tuple[list, list]], log: bool = False) -> None:
    picture = Figure(figsize=(7, 4), layout="constrained")
    ax = picture.subplots()
    for (name, points), marker in zip(curves.items(), "osD^v<>px*" * 9):
        ax.plot(*points, marker=marker, label=name)
    if log:
        ax.set_xscale("log", base=2)
    ax.set(xlabel=x, ylabel=y, title=title)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    picture.savefig(path, dpi=150)
    print(path)


def plot(rows: list[dict], folder: Path) -> None:
    """What has an order is drawn as curves: positions, lengths, stages, checkpoints."""
    ordered: dict[tuple[str, str], dict[str, tuple[list, list]]] = {}
    for row in rows:
        (task, _, how), metric = row["task"].partition(","), row["metric"]
        x, y = [], row["curve"] or [row["value"]]
        if found := re.fullmatch(r"perplexity at \d+-(\d+)", metric):
            kind, what, x = ("position", "tokens in front"), "", [int(found[1])]
        elif metric.isdecimal():
            kind, what, x = ("length", "tokens of context"), task, [int(metric)]
        elif row["curve"]:
            kind, what, x = ("continual", "stages met"), metric.removeprefix("accuracy "), [*range(1, 1 + len(y))]
        else:
            continue
        name = ", ".join(part for part in (what, how, column_of(row)) if part)
        points = ordered.setdefault(kind, {}).setdefault(name, ([], []))
        points[0].extend(x)
        points[1].extend(y)
    names = {"position": "perplexity", "length": "accuracy", "continual": "accuracy on stages met (%)"}
    for (kind, x), curves in ordered.items():
        draw(folder / f"evaluation-{kind}.png", names[kind], x, names[kind], curves, log=kind != "continual")
    several = by_checkpoint([row for row in rows if row["model"]["step"] and " at " not in row["metric"]])
    if several:
        points = {
            f"{task} {metric}{how}": ([r["model"]["step"] for r in some], [r["value"] for r in some])
            for (task, metric, how), some in several.items()
        }
        draw(folder / "evaluation-checkpoints.png", "over the training run", "optimizer step", "value", points)
