"""Segments of training as CUDA graphs: `python train.py --capture`.

A segment (forward pass, backward pass, writes) launches hundreds of kernels in every layer, however short they are; a
graph launches again, all at once, what was recorded. For every kind of segment that a row has there is one graph: with
clocks (512, 2048, inf) one for those after which the fast level alone is written, one for those after which both are.
A graph knows addresses and no numbers of Python's: tokens, states, loss and gradients have places of their own, and of
time it holds only what is the same in all segments of its kind.

    segments        of what lengths they are, or why graphs cannot hold them
    recorder        records what a function does on the device, to do it again: a CUDA graph
    Captured        goes through rows by such records
    for_training    the same for a run, or why it cannot be

No GPU was there to try it when this was written. Tests go through the same code with a record of PyTorch's operations
in the graph's place; what it does on a GPU, `python tests/bench/gpu.py --measure --groups graphs` measures.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from data import UserError
from hope import Hope, HopeState, map_state, nothing, piece_lengths
from settings import HopeConfig, require

Act = Callable[[], None]
# The backward pass of nn.Embedding for more tokens at once sorts them, and there waits for the device, which a graph
# cannot hold (github.com/pytorch/pytorch/issues/82886).
EMBEDDED_AT_ONCE = 3072


def embed_in_pieces(embed: nn.Embedding, tokens: Tensor) -> Tensor:
    """What `embed` makes of tokens (b, t), with a backward pass that can be captured."""
    pieces = tokens.flatten().split(EMBEDDED_AT_ONCE)
    return torch.cat([nn.Embedding.forward(embed, piece) for piece in pieces]).view(*tokens.shape, -1)


def recorder(device: torch.device) -> Callable[[Act], Act]:
    """What turns an action into one that does the same to the same tensors, without Python. Off CUDA: the action.

    It is done three times before it is recorded: kernels are compiled and libraries get their memory. All graphs share
    theirs, since what they leave behind is in tensors that were there before.
    """
    if device.type != "cuda":
        return lambda act: act
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(act: Act) -> Act:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                act()
        gc.collect()  # a gradient is added on the stream of the first graph of autograd's that is still there
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            act()
        return graph.replay

    return record


def segments(config: HopeConfig, length: int) -> list[int]:
    """How long the segments of rows of so many tokens are.

    ValueError if they differ in more than their graphs tell apart.
    """
    lengths = piece_lengths(0, length, config.clocks)
    layers = [config.layer(i) for i in range(len(config.pattern))]
    fix = f"leave out --capture, or give clocks (--cms) of at least --seq-len, {length}"
    for wrong, why in (
        (any(layer.depth == 0 for layer in layers), "attention sees more keys in every segment than in the one before"),
        (config.n_position or any(layer.rotary for layer in layers), "positions differ from segment to segment"),
    ):
        require(len(lengths) == 1 or not wrong, f"{why}, and a graph repeats one; {fix}")
    return lengths


class Captured:
    """Rows (b, t) of tokens, forward and backward as by `Hope.observe(truncate=True)`, by records of their segments.

    Args:
        rows, length: b and t.
        computing: makes the context, such as autocast, in which the model runs.
        record: see `recorder`.

    A call gives the sum of the losses, and adds the gradients of that sum to those of the parameters, whose places
    `zero_gradients` has to give them before. What it returns is overwritten by the next call. ValueError as
    `segments` raises it.
    """

    def __init__(
        self, model: Hope, rows: int, length: int, computing: Callable[[], AbstractContextManager],
        record: Callable[[Act], Act] | None = None,
    ):  # fmt: skip
        self.lengths = segments(model.config, length)
        self.model, self.rows, self.computing = model, rows, computing
        weight = model.embed.weight
        model.embed.forward = partial(embed_in_pieces, model.embed)
        record = record or recorder(weight.device)
        self.tokens, self.targets = torch.zeros(2, rows, max(self.lengths), dtype=torch.long, device=weight.device)
        self.loss = torch.zeros((), device=weight.device, dtype=weight.dtype)
        self.state = self._places()
        kinds, start = {}, 0
        for n in self.lengths:
            kinds.setdefault(self._kind(start, n), (start, n))
            start += n
        self._begin()
        for p in model.parameters():
            p.grad = None
        for place in kinds.values():
            self._segment(*place)
        self.parameters = [p for p in model.parameters() if p.grad is not None]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.zero_gradients()
        self.begin = record(self._begin)
        self.records = {kind: record(lambda place=place: self._segment(*place)) for kind, place in kinds.items()}

    @torch.no_grad()
    def _places(self) -> HopeState:
        """A state of tensors of its own, where segments find theirs and leave it.

        That of a CMS has its weights at rest with it (see `FastMLP.weights`), and room for the sums of gradients only
        where they go on from one segment to the next.
        """
        config, ends = self.model.config, list(accumulate(self.lengths))[:-1]
        state = map_state(lambda z: z.clone(memory_format=torch.contiguous_format), self.model.init_state(self.rows))
        with self.computing():
            kind, dtype = self.loss.device.type, self.loss.dtype
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        for levels in state.cms:
            for i in config.written:
                if all(end % config.cms[i] == 0 for end in ends):
                    levels[i] = replace(levels[i], total=nothing(levels[i].delta))
                levels[i].at_rest = [torch.empty_like(d, dtype=dtype) for d in levels[i].delta]
        return state

    def _kind(self, start: int, n: int) -> tuple:
        """All that n tokens from `start` on share with others that one graph serves."""
        layers = [self.model.config.layer(i) for i in range(len(self.model.config.pattern))]
        chunks = math.lcm(*(chunk for layer in layers for chunk in (layer.chunk, layer.chunk_proj)))
        return n, start % chunks, *((start + n) % clock == 0 for clock in self.model.config.clocks)

    def zero_gradients(self) -> None:
        """Give the parameters their gradients' places, and these zeros."""
        torch._foreach_zero_(self.gradients)
        for p, gradient in zip(self.parameters, self.gradients):
            p.grad = gradient

    @torch.no_grad()
    def _keep(self, state: HopeState) -> None:
        """Copy a state to where the next segment finds it."""

        def keep(place: Tensor, z: Tensor) -> Tensor:
            there = place.data_ptr() == z.data_ptr() or not any(place.stride())  # as it was, or without a place
            return place if there else place.copy_(z)

        map_state(keep, self.state.memories, state.memories)
        for block, places, levels in zip(self.model.blocks, self.state.cms, state.cms):
            for i in block.cms.written:
                moved = places[i].delta[0].data_ptr() != levels[i].delta[0].data_ptr()
                map_state(keep, places[i], levels[i])
                if moved:
                    for w, d, copy in zip(block.cms.levels[i].matrices, places[i].delta, places[i].at_rest):
                        torch.add(w, d, out=copy)

    @torch.no_grad()
    def _begin(self) -> None:
        self._keep(self.model.init_state(self.rows))
        self.loss.zero_()

    def _segment(self, start: int, n: int) -> None:
        tokens, targets = self.tokens[:, :n], self.targets[:, :n]
        memories = [replace(memory, t=start) for memory in self.state.memories]
        with self.computing():
            state = self.model.restart_graph(replace(self.state, memories=memories, observed=start))
            losses, state = self.model.observe(tokens, targets, state, reduction="none", backward=True, truncate=True)
        self.loss.add_(losses.sum())
        if len(self.lengths) > 1:
            self._keep(state)

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.begin()
        start = 0
        for n, x, y in zip(self.lengths, tokens.split(self.lengths, 1), targets.split(self.lengths, 1)):
            self.tokens[:, :n].copy_(x)
            self.targets[:, :n].copy_(y)
            self.records[self._kind(start, n)]()
            start += n
        return self.loss


def for_training(
    model: Hope, rows: int, share: int, length: int, computing: Callable[[], AbstractContextManager]
) -> Captured:
    """What takes a process's `share` of rows of a step, so many at once; UserError where a run cannot have it."""
    device = model.embed.weight.device
    if device.type != "cuda":
        raise UserError(f"--capture makes CUDA graphs, but this run is on {device}; leave it out")
    if isinstance(model, FSDPModule):
        raise UserError("--capture needs all weights of a process in their places; give --parallel ddp as well")
    if share % rows:
        raise UserError(f"--capture takes {rows} rows at once, and {share} do not come out even; change --micro-batch")
    return Captured(model, rows, length, computing)
