"""Settings that a user gives: fields that know their limits, and errors that say what was given and what is allowed.

    require           ValueError with a message unless something holds
    setting           a field of a config: default, help, limits; train.py makes a flag of each
    check_settings    types, choices and limits of all fields; check_rules, what fields must have in common

`hope.MemoryConfig`, `hope.HopeConfig`, `train.TrainConfig` and evaluation.py's options are made of these.
"""

from __future__ import annotations

import operator
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints


def require(holds: Any, message: str) -> None:
    """ValueError with this message unless it holds."""
    if not holds:
        raise ValueError(message)


def check_preset(kind: str, name: str, table: dict) -> None:
    require(name in table, f"no {kind} called {name!r}; choose one of: {', '.join(table)}")


LIMITS = {"least": ("at least", operator.ge), "above": ("above", operator.gt),
          "most": ("at most", operator.le), "below": ("below", operator.lt)}  # fmt: skip
KINDS = {int: Integral, float: Real}


def setting(default: Any, text: str, **limits: float) -> Any:
    """A config field; `text` is what `train.py --help` says of it. Its value, or each of a tuple, keeps to LIMITS."""
    return field(default=default, metadata={"help": text, "limits": limits})


def check_settings(config: Any) -> None:
    """ValueError for a field of another type than it is annotated with, none of its choices, or beyond its limits."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        hint, value, limits = hints[f.name], getattr(config, f.name), f.metadata.get("limits", {})
        given = f"{f.name} is {value!r}"
        if get_origin(hint) is Literal:
            require(value in get_args(hint), f"{given}; allowed: {', '.join(map(str, get_args(hint)))}")
            continue
        if get_origin(hint) is tuple:
            require(isinstance(value, tuple), f"{given}; give a tuple, such as {f.default}")
            hint = get_args(hint)[0]
        allowed = " and ".join(f"{LIMITS[name][0]} {limit}" for name, limit in limits.items())
        for one in value if isinstance(value, tuple) else (value,):
            require(isinstance(one, KINDS.get(hint, hint)), f"{given}; it must be of type {hint.__name__}")
            fits = all(LIMITS[name][1](one, limit) for name, limit in limits.items())
            require(fits, f"{given}; it must be {allowed}")


def check_rules(config: Any, *rules: tuple[Any, str]) -> None:
    """ValueError with the message of the first rule that does not hold; {name} in it stands for a field."""
    for holds, message in rules:
        require(holds, message.format_map(vars(config)))
