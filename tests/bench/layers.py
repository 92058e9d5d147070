"""Speed of one memory layer against softmax attention and other implementations, as ratios measured in one run.

    python tests/bench/layers.py [--lengths 1024,4096,16384] [--profile]

Forward and backward of one layer, batch 2, width 256, 4 heads, float32. Yardsticks are timed in the same run, in turns
with what they are compared to, so that a busy machine slows both; the fastest of the turns counts.
"""

from __future__ import annotations

import argparse
import time

import torch

import hope

BATCH, WIDTH, HEADS = 2, 256, 4


def layer(preset: str, **fields) -> torch.nn.Module:
    torch.manual_seed(0)
    return hope.Memory.preset(preset, d_model=WIDTH, n_head=HEADS, **fields)


def neural_memory() -> torch.nn.Module | None:
    """titans-pytorch's layer with weights that advance from chunk to chunk, if that package is installed."""
    try:
        from titans_pytorch import NeuralMemory
    except ImportError:
        return None

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = NeuralMemory(dim=WIDTH, dim_head=WIDTH // HEADS, heads=HEADS, chunk_size=64, batch_size=64)

        def forward(self, x):
            return self.memory(x)

    return Layer()


def once(module: torch.nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    y = module(x)[0]
    y.square().mean().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print where the hope layer's time goes at length 1024")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    layers = {
        "attention": layer("attention"),
        "hope": layer("hope"),
        "attention, compiled": layer("attention"),
        "hope, compiled": layer("hope"),
        "titans": layer("titans"),
        "deltanet": layer("deltanet"),
    }
    layers["attention, compiled"].compile()
    hope.compile_parts(layers["hope, compiled"])
    if other := neural_memory():
        layers["titans-pytorch"] = other
    print(f"{torch.get_num_threads()} threads; tokens/s of forward + backward, in parts of attention's")
    print(f"{'length':>8}" + "".join(f"{name:>21}" for name in layers))
    for length in map(int, args.lengths.split(",")):
        x, best = torch.randn(BATCH, length, WIDTH), {name: float("inf") for name in layers}
        for turn in range(args.turns + 1):  # the first turn warms up
            for name, module in layers.items():
                seconds = once(module, x)
                best[name] = min(best[name], seconds) if turn else float("inf")
        print(f"{length:>8}" + "".join(f"{best['attention'] / best[name]:>21.3f}" for name in layers), flush=True)
    if args.profile:
        x = torch.randn(BATCH, 1024, WIDTH)
        with torch.profiler.profile() as profile:
            once(layers["hope"], x)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


if __name__ == "__main__":
    main()
