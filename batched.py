"""What the optimizers of optim.py share: settings, groups, closures, state, shards.

    stack_full, shards    equal tensors as one stack of whole matrices, and back to what their parameters look like
    unit                  tensors of length 1, of any scale
    Batched               the optimizer that moves parameters of one shape together; a subclass says by what

Nothing here is of the paper. Read optim.py first, and this for what an optimizer of your own may rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import in_float32

INF = float("inf")

# Settings of the optimizers below: least and greatest value, or the choices.
ALLOWED = {
    "lr": (0, INF), "weight_decay": (0, INF), "momentum": (0, 1), "delta": (0, INF), "betas": (0, INF), "beta": (0, 1),
    "eps": (0, INF), "alpha": (0, INF), "every": (1, INF), "ns_steps": (1, INF), "inner_lr": (0, INF),
    "hidden": (0, INF), "preconditioner": ("identity", "diagonal", "kronecker"),
    "output": ("linear", "tanh", "orthogonal"),
}  # fmt: skip


def whole(z: Tensor) -> Tensor:
    """z itself, or what the shards of a DTensor (FSDP2) are together."""
    return z.full_tensor() if hasattr(z, "full_tensor") else z


def stack_full(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as matrices (k, o, i), gathered from their shards, in float32 at least.

    A vector is a column; of more dimensions, as a convolution's (o, channels, height, width), all but one are joined.
    """
    return torch.stack([in_float32(whole(t)).reshape(len(t), -1) for t in tensors])


def shards(stacked: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `stack_full`: each of `stacked` (k, o, i) in the shape of `like`, and sharded as that is."""
    parts = stacked.reshape(len(like), *like[0].shape).unbind(0)
    if not hasattr(like[0], "full_tensor"):
        return list(parts)
    from torch.distributed.tensor import DTensor, Replicate

    found = []
    for t, p in zip(parts, like):
        everywhere = DTensor.from_local(t, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
        found.append(everywhere.redistribute(placements=p.placements))
    return found


def unit(z: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """z / |z| and |z|, the norm over `dims`, for z of any scale: no square overflows, and 0 stays 0."""
    tiny = torch.finfo(z.dtype).tiny
    largest = z.abs().amax(dims, keepdim=True).clamp(min=tiny)
    z = z / largest
    size = torch.linalg.vector_norm(z, dim=dims, keepdim=True)
    return z / size.clamp(min=tiny), size * largest


class Batched(torch.optim.Optimizer):
    """An optimizer whose subclass says in `_update` what a batch of parameters of one shape is moved by.

    As with torch's own: closures, parameter groups, decoupled weight decay (W shrinks by lr * weight_decay), sparse
    gradients are refused, and gradients that are not finite reach the parameters. The state is float32 for bfloat16
    parameters, and is loaded as such. Under FSDP2 it is sharded like the parameters: what goes entry by entry works on
    DTensors as it does on tensors, and what needs whole matrices gathers them on every rank.

    Settings are given by name, or in the order of SETTINGS, to the optimizer or to a parameter group.
    """

    SETTINGS: dict[str, Any] = {}  # with their defaults
    DIMS = range(2, 6)  # numbers of dimensions that parameters may have; they are matrices (see `stack_full`)

    def __init__(self, params: Any, *values: Any, **settings: Any):
        given = dict(zip(self.SETTINGS, values)) | settings
        if unknown := sorted(given.keys() - self.SETTINGS.keys()):
            raise TypeError(f"{type(self).__name__} has no {unknown[0]}; it has: {', '.join(self.SETTINGS)}")
        super().__init__(params, self.SETTINGS | given)

    def add_param_group(self, group: dict[str, Any]) -> None:
        super().add_param_group(group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        """ValueError for a setting or a parameter that this optimizer cannot take."""
        kind, dims = type(self).__name__, self._dims(group)
        for name in ALLOWED.keys() & group.keys():
            allowed, given = ALLOWED[name], group[name]
            if isinstance(allowed[0], str):
                fits, text = given in allowed, ", ".join(allowed)
            else:
                low, high = allowed
                fits = all(low <= value <= high for value in (given if isinstance(given, tuple) else [given]))
                text = f"from {low} to {high}" if high < INF else f"{low} or more"
            if not fits:
                raise ValueError(f"{kind}: {name} is {given}; allowed: {text}")
        for p in group["params"]:
            if p.ndim not in dims or not p.is_floating_point():
                raise ValueError(
                    f"{kind} takes real parameters of {dims[0]} to {dims[-1]} dimensions, not {p.dtype} of "
                    f"shape {tuple(p.shape)}; give it hope.param_groups(model)['matrix'] and the rest to AdamW"
                )

    def _dims(self, group: dict[str, Any]) -> range:
        return self.DIMS

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; returns what `closure`, called first with gradients enabled, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            batches: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None or p.numel() == 0:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
                self.state[p].setdefault("step", torch.zeros(()))
                self.state[p]["step"] += 1
                batches.setdefault((p.shape, p.dtype, p.device, *self._kind(p)), []).append(p)
            for params in batches.values():
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, self._update(group, params, [in_float32(p.grad) for p in params]))
        return loss

    def _kind(self, p: Tensor) -> tuple:
        """What besides shape, type and device parameters must share to be updated together."""
        return (self.state[p]["step"].item(),)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """What to add to each of `params`, sharded like that. Their gradients come in float32 at least."""
        raise NotImplementedError

    def _buffers(self, params: list[Tensor], name: str) -> list[Tensor]:
        """State of this name and the shape of the parameters, zeros at first."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(in_float32(p.detach()), memory_format=torch.contiguous_format)
        return [self.state[p][name] for p in params]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch rounds all state to the type of its parameter; take what was stored.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, (p for group in self.param_groups for p in group["params"])):
            for name, value in state_dict["state"].get(i, {}).items():
                if value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.to(self.state[p][name].device)
