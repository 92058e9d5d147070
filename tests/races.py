"""Races between the threads of a Triton program, and between programs, found in Triton's interpreter, which has neither.

    with races.watched() as found:
        ...  # launches
    assert found == []

A kernel's threads see what others of their program have written to global memory only after a `tl.debug_barrier`, and
no other program sees any of it. The barriers that the compiler puts into products, sums and changes of layout count for
nothing here: where they stand is its affair. Nor is an iteration of a loop one. So between two barriers no store may
touch an address that another load or store touches, and in a launch none that another program touches.

One thing is allowed: a statement that stores to exactly the addresses, in the same order, that it loads, as in
`tl.store(p, tl.load(p) + 1.0)`. Both then have the same layout, so that a thread stores what it has loaded; where several
threads hold the same number one of them stores, and what the others load, before that or after, goes nowhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, interpreter_builder

LAUNCH = GridExecutor.__call__.__code__
TRITON = str(Path(LAUNCH.co_filename).parents[1])


class Access(NamedTuple):
    stores: bool
    addresses: np.ndarray  # in the order of the pointers, without those that are masked
    first: int
    last: int
    where: str

    def meets(self, other: Access) -> bool:
        if not (self.stores or other.stores) or self.last < other.first or other.last < self.first:
            return False
        return bool(np.isin(self.addresses, other.addresses).any())

    def changes(self, loaded: Access) -> bool:
        """Whether this is the store of a statement, and `loaded` what it loads from the same addresses."""
        one_statement = self.stores and not loaded.stores and self.where == loaded.where
        return one_statement and np.array_equal(self.addresses, loaded.addresses)

    def __str__(self) -> str:
        return f"{'store' if self.stores else 'load'} at {self.where}"


def accessed(stores: bool, addresses: np.ndarray, where: str) -> Access:
    first, last = (int(addresses.min()), int(addresses.max())) if addresses.size else (0, -1)
    return Access(stores, addresses, first, last, where)


def source_lines() -> str:
    """Where the interpreter is in a kernel: the line of the access, that which called its function, and so on."""
    frame, lines = sys._getframe(1), []
    while frame is not None and frame.f_code is not LAUNCH:
        code = frame.f_code
        if not code.co_filename.startswith(TRITON) and code.co_filename != __file__:
            lines.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(lines)


class Program:
    """What a program of a launch has touched."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.accesses: list[Access] = []
        self.since_barrier = 0

    def races_of(self, new: Access) -> Iterator[str]:
        for old in self.accesses[self.since_barrier :]:
            if new.meets(old) and not new.changes(old):
                yield f"no barrier between {old} and {new}"

    def end(self) -> None:
        self.stored = together([a for a in self.accesses if a.stores], f"program {self.name}")
        self.touched = together(self.accesses, f"program {self.name}")

    def races_with(self, other: Program) -> Iterator[str]:
        for one, two in ((self, other), (other, self)):
            if one.stored.meets(two.touched):
                shared = next(a for a in two.accesses if one.stored.meets(a))
                yield f"{one.stored.where} stores to what {two.stored.where} touches: {shared}"


def together(accesses: list[Access], where: str) -> Access:
    different = {a.addresses.tobytes(): a.addresses for a in accesses}
    return accessed(True, np.unique(np.concatenate([np.zeros(0, int), *different.values()])), where)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Gives the list of races, each once, that the launches inside it have; it is complete at the end."""
    found: list[str] = []
    programs: list[Program] = []  # of a launch; the last one runs

    def note(races: Iterator[str]) -> None:
        found.extend(race for race in races if race not in found)

    def note_access(stores: bool, pointers, mask) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        new = accessed(stores, addresses, source_lines())
        note(programs[-1].races_of(new))
        programs[-1].accesses.append(new)

    def end_of_program() -> None:
        if programs:
            programs[-1].end()
        for other in programs[:-1]:
            note(programs[-1].races_with(other))

    class Watching(InterpreterBuilder):
        def set_grid_dim(self, *sizes):
            end_of_program()
            programs.clear()
            super().set_grid_dim(*sizes)

        def set_grid_idx(self, *place):
            end_of_program()
            programs.append(Program(str(place)))
            super().set_grid_idx(*place)

        def create_masked_load(self, pointers, mask, *rest, **named):
            note_access(False, pointers, mask)
            return super().create_masked_load(pointers, mask, *rest, **named)

        def create_masked_store(self, pointers, value, mask, *rest, **named):
            note_access(True, pointers, mask)
            return super().create_masked_store(pointers, value, mask, *rest, **named)

        def create_barrier(self):
            programs[-1].since_barrier = len(programs[-1].accesses)

    def call(function, *args, **named):
        """Of a function from a kernel. Triton makes the language that its module sees the interpreter's at every call,
        which takes a third of the time; after once it stays so."""
        module = function.fn.__globals__["__name__"]
        if module not in seen:
            seen.add(module)
            return plain_call(function, *args, **named)
        return function.rewrite()(*args, **named)

    seen, plain_call = set(), InterpretedFunction.__call__
    before, interpreter_builder.__class__ = interpreter_builder.__class__, Watching
    try:
        with patch.object(InterpretedFunction, "__call__", call):
            yield found
    finally:
        interpreter_builder.__class__ = before
    end_of_program()
