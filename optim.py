"""The paper's optimizers: memories of the gradient (Nested Learning, arXiv 2512.24695, secs. 4 and 5).

    DGD                      eqs. 57 to 60: gradient descent that also forgets, along the inputs of every linear layer
    DeltaMomentum            eqs. 48, 49: momentum as a regression that unlearns before it learns
    PreconditionedMomentum   eqs. 46, 47: momentum whose values are preconditioned gradients
    DeepMomentum             eqs. 50 to 52: the momentum is an MLP
    M3                       eq. 75, Algorithm 1: a fast and a slow momentum, orthogonalised
    Accumulate, EMA          bookkeeping in the form of an optimizer, so that what saves optimizers saves it too

They keep the contract of torch.optim: parameter groups, closures, state_dict; and run under FSDP2. All of that is in
batched.py; here each says in `_update` what it adds to parameters of one shape. Everything works on any model;
`hope.param_groups` and `hope.slow_groups` sort the parameters of ours.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batched import Batched, shards, stack_full, unit, whole
from kernels import in_float32, newton_schulz

__all__ = ["DGD", "EMA", "M3", "Accumulate", "DeepMomentum", "DeltaMomentum", "PreconditionedMomentum"]


# ---- Delta gradient descent ----


class Tap(torch.autograd.Function):
    """The identity on a weight that hands the input it is used with to `note` when, and only when, its gradient comes.

    So passes count as often as they reach the weight's gradient: not in evaluation, not when a checkpoint recomputes
    them, and not when a gradient is taken to something else, as the inner gradients of a CMS are.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, x: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.note = note
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.note(ctx.saved_tensors[0])
        return grad, None, None


class Note:
    """Hands the inputs of a layer to an optimizer while that lives: the model keeps none alive, and a copy has none."""

    def __init__(self, optimizer: DGD | None = None, p: Tensor | None = None):
        self.optimizer, self.p = optimizer and weakref.ref(optimizer), p

    def __call__(self, x: Tensor) -> None:
        if self.optimizer and (alive := self.optimizer()):
            alive._note(self.p, x)

    def __reduce__(self) -> tuple:
        return Note, ()

    def tap(self, layer: nn.Linear, args: tuple) -> None:
        """Before a forward pass of the layer: it is to use its weight by a Tap."""
        if self.optimizer and torch.is_grad_enabled() and layer.weight.requires_grad:
            # An attribute hides the parameter of the same name, until the forward pass is over.
            layer.__dict__["weight"] = Tap.apply(layer.weight, args[0].detach(), self)

    def untap(self, layer: nn.Linear, args: tuple, output: Any) -> None:
        layer.__dict__.pop("weight", None)


class DGD(Batched):
    r"""Delta gradient descent: for every `nn.Linear` the exact step of eq. 56, for other parameters plain SGD.

    With x_n the inputs of a layer in a batch, u_n = -grad_{y_n} L_n and L the mean of the L_n,

        W' = argmin_W  mean_n 1/2 |W x_n - u_n|^2 + 1/(2 lr) |W - W_t|^2  =  (W_t - lr grad L) (I + lr C)^-1

    with C the mean of x_n x_n^T; for one input that is W_t (I - lr' x x^T) - lr' grad_y L x^T with
    lr' = lr / (1 + lr |x|^2) (eq. 57). It descends and, along the directions that inputs take, forgets.

    Args:
        model: hooks on its linear layers collect the inputs, of all backward passes since the last `step` or
            `zero_grad`, and of all ranks. `remove_hooks` takes them off: then every parameter is moved by SGD.
        params: parameters or groups to train; all of the model's if left out.
        lr: step size. The loss must be a mean over what the layers see as rows.
        delta: weight of |W x|^2 / 2 in the objective: C is multiplied by it. 1 is eq. 56, 0 plain SGD.
        normalize: divide a layer's inputs by their root mean square norm lambda, the paper's |x| = lambda.

    Weights that are used without a call of their layer are moved by SGD.
    """

    SETTINGS = dict(lr=0.1, delta=1.0, normalize=False, weight_decay=0.0)
    DIMS = range(6)

    def __init__(self, model: nn.Module, params: Any = None, *values: Any, **settings: Any):
        if not isinstance(model, nn.Module):
            raise TypeError(f"DGD takes the model first, not a {type(model).__name__}; write DGD(model, lr=0.1)")
        super().__init__(list(model.parameters() if params is None else params), *values, **settings)
        self._inputs: dict[Tensor, tuple[int, Tensor]] = {}  # of a weight: how many, and the sum of x x^T
        mine = {p for group in self.param_groups for p in group["params"]}
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight in mine and m.weight.numel()]
        self._linear, self._hooks = {layer.weight for layer in layers}, []
        for layer in layers:
            note = Note(self, layer.weight)
            self._hooks.append(layer.register_forward_pre_hook(note.tap))
            self._hooks.append(layer.register_forward_hook(note.untap, always_call=True))

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._inputs.clear()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        self._inputs.clear()
        return loss

    def _note(self, p: Tensor, x: Tensor) -> None:
        """Add inputs x (..., i) of the layer with weight p."""
        x = in_float32(x.reshape(-1, x.shape[-1]))
        n, total = self._inputs.get(p, (0, 0.0))
        self._inputs[p] = n + len(x), total + x.mT @ x

    def _kind(self, p: Tensor) -> tuple:
        if p in self._linear and torch.distributed.is_available() and torch.distributed.is_initialized():
            i = p.shape[1]
            n, total = self._inputs.get(p) or (0, in_float32(torch.zeros(i, i, device=p.device, dtype=p.dtype)))
            n = torch.tensor(n, device=p.device)
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(n)
            self._inputs[p] = n.item(), total
        return (self._count(p),)

    def _count(self, p: Tensor) -> int:
        return self._inputs[p][0] if p in self._inputs else 0

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        lr, n = group["lr"], self._count(params[0])
        if n == 0:
            return torch._foreach_mul(grads, -lr)
        W, G = stack_full(params), stack_full(grads)
        C = torch.stack([self._inputs[p][1] for p in params]).to(W.dtype) / n
        if group["normalize"]:
            square = C.diagonal(dim1=-2, dim2=-1).sum(-1)  # lambda^2
            scale = square.clamp(min=torch.finfo(W.dtype).tiny).rsqrt()[:, None, None]
            G, C = G * scale, C * scale.square()
        A = lr * group["delta"] * C
        A.diagonal(dim1=-2, dim2=-1).add_(1)
        new = torch.cholesky_solve((W - lr * G).mT, torch.linalg.cholesky_ex(A).L).mT
        return shards(new - W, params)


# ---- Momentum ----


class DeltaMomentum(Batched):
    r"""Momentum as an l2 regression of its value on the gradient (eqs. 48 and 49, corrected):

        m' = m (momentum I - c g^T g) - lr g        W' = W + m'        c = delta / (1 + delta |g|^2)

    Beside decaying, m unlearns what it holds along the gradient that comes in. The paper's step on g^T g is the one
    on g; `delta` is a coefficient of its own, and c the exact minimiser of eq. 56 for the input g, which keeps
    c |g|^2 below 1 for gradients of any scale. `bounded=False` takes c = delta, as in eq. 49. A vector is a column.
    """

    SETTINGS = dict(lr=0.01, momentum=0.9, delta=1.0, bounded=True, weight_decay=0.0)
    DIMS = range(1, 6)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        buffers, c = self._buffers(params, "momentum"), group["delta"]
        m, G = stack_full(buffers), stack_full(grads)
        K = G
        if group["bounded"]:
            K, size = unit(G, (-2, -1))
            c = c / (size.pow(-2) + c) if c else 0.0  # |g|^2 times the bounded coefficient
        along = m @ (K.mT @ K) if m.shape[-1] < m.shape[-2] else (m @ K.mT) @ K
        m = group["momentum"] * m - c * along - group["lr"] * G
        new = shards(m, params)
        for buffer, value in zip(buffers, new):
            buffer.copy_(value)
        return new


class PreconditionedMomentum(Batched):
    r"""Momentum whose values are preconditioned gradients (eqs. 46 and 47, with the forget gate the text speaks of):

        m' = momentum m - lr P(g)        W' = W + m'

    Args:
        preconditioner: "identity", P(g) = g, heavy-ball momentum; "diagonal", P(g) = g / (sqrt(v) + eps), v the mean
            square of every entry (Adam's); "kronecker", matrices only, P(g) = L^-1/4 g R^-1/4, L and R the means of
            g g^T and g^T g plus eps times their mean eigenvalue (Shampoo's), its roots taken anew every `every` steps.
        beta: decay of these means, which are corrected for their start at 0.
    """

    SETTINGS = dict(lr=0.01, momentum=0.9, preconditioner="diagonal", beta=0.99, eps=1e-8, every=10, weight_decay=0.0)

    def _dims(self, group: dict[str, Any]) -> range:
        return range(2 if group["preconditioner"] == "kronecker" else 1, 6)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        m, beta, t = self._buffers(params, "momentum"), group["beta"], self.state[params[0]]["step"].item()
        if group["preconditioner"] == "diagonal":
            v = self._buffers(params, "square")
            torch._foreach_mul_(v, beta)
            torch._foreach_addcmul_(v, grads, grads, value=1 - beta)
            below = torch._foreach_sqrt(torch._foreach_div(v, 1 - beta**t))
            grads = torch._foreach_div(grads, torch._foreach_add(below, group["eps"]))
        elif group["preconditioner"] == "kronecker":
            G = stack_full(grads)
            left, right = (
                self._root(group, params, side, square, t) for side, square in (("left", G @ G.mT), ("right", G.mT @ G))
            )
            grads = shards(left @ G @ right, params)
        torch._foreach_mul_(m, group["momentum"])
        torch._foreach_add_(m, grads, alpha=-group["lr"])
        return m

    def _root(self, group: dict[str, Any], params: list[Tensor], side: str, square: Tensor, t: float) -> Tensor:
        """Add `square` (k, n, n) to the means of this side; returns the -1/4 power of the means, (k, n, n)."""
        for p, s in zip(params, square):
            self.state[p].setdefault(side, torch.zeros_like(s)).lerp_(s, 1 - group["beta"])
        if (t - 1) % group["every"] == 0:
            mean = torch.stack([self.state[p][side] for p in params]) / (1 - group["beta"] ** t)
            roots = torch.full_like(mean, math.nan)
            if mean.isfinite().all():  # else eigh would raise; like any other step, this one passes it on
                values, vectors = torch.linalg.eigh(mean)
                floor = group["eps"] * mean.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
                values = (values.clamp(min=0) + floor).clamp(min=torch.finfo(mean.dtype).tiny)
                roots = vectors * values.pow(-0.25)[:, None] @ vectors.mT
            for p, root in zip(params, roots):
                self.state[p][f"{side}_root"] = root.clone()
        return torch.stack([self.state[p][f"{side}_root"] for p in params])


class DeepMomentum(Batched):
    r"""Deep momentum gradient descent (eq. 50): the momentum is an MLP, trained by an inner loss at every step.

        phi' = momentum phi - inner_lr grad_phi 1/2 |m(u; phi) + u|^2        W' = W + lr |g| sigma(m(u; phi'))

    The MLP m(u) = W2 silu(W1 u) is shared by all matrices of a shape. Its inputs u are their gradients' rows (columns
    where these are shorter), each divided by its length |g|, by which the output is multiplied again. With the value 1
    that the paper prints, the output of a linear memory is always parallel to 1; the value here is -u, so that m
    recalls the descent direction in what past gradients had in common, and hardly in what is new. The step of each
    layer is eq. 57's, inner_lr / (1 + inner_lr |x|^2) with |x|^2 the layer's mean square input. W1 starts random, W2
    at 0, so the first steps are small.

    Args:
        hidden: hidden width of the MLP, as a multiple of the row length.
        output: sigma (eq. 52): "linear"; "tanh", of the output in units of its root mean square; "orthogonal",
            `newton_schulz` of the matrix of outputs, in steps like AdamW's (0.2 sqrt(max(m, n)) times it).
    """

    SETTINGS = dict(lr=0.1, momentum=0.999, inner_lr=10.0, hidden=1.0, output="linear", ns_steps=5, weight_decay=0.0)

    def _kind(self, p: Tensor) -> tuple:
        return ()  # one memory for all of a shape

    def _memory(self, group: dict[str, Any], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weights of the MLP, which the first parameter of this shape keeps."""
        same = lambda p: (p.shape, p.dtype, p.device) == (like.shape, like.dtype, like.device)
        state, d = self.state[next(p for p in group["params"] if same(p))], min(len(like), math.prod(like.shape[1:]))
        if "w_in" not in state:
            h = max(1, round(group["hidden"] * d))
            w_in = torch.randn(h, d, generator=torch.Generator().manual_seed(0))  # the same on every rank
            state["w_in"] = w_in.to(like.device, dtype)
            state["w_out"] = torch.zeros(d, h, device=like.device, dtype=dtype)
        return state["w_in"], state["w_out"]

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        G = stack_full(grads)
        by_columns = G.shape[-1] > G.shape[-2]
        G = G.mT if by_columns else G
        u, size = unit(G, (-1,))
        u = u.flatten(0, 1)
        w_in, w_out = self._memory(group, params[0], G.dtype)
        with torch.enable_grad():
            layers = [w_in.clone().requires_grad_(), w_out.clone().requires_grad_()]
            hidden = F.silu(u @ layers[0].mT)
            loss = 0.5 * (hidden @ layers[1].mT + u).square().sum(-1).mean()
            found = torch.autograd.grad(loss, layers)
        for w, grad, x in zip((w_in, w_out), found, (u, hidden.detach())):
            step = group["inner_lr"] / (1 + group["inner_lr"] * x.square().sum(-1).mean())
            w.mul_(group["momentum"]).sub_(step * grad)
        out = (F.silu(u @ w_in.mT) @ w_out.mT).view_as(G) * size
        if group["output"] == "tanh":
            out = torch.tanh(unit(out, (-2, -1))[0] * out[0].numel() ** 0.5)
        elif group["output"] == "orthogonal":
            out = 0.2 * max(out.shape[1:]) ** 0.5 * newton_schulz(out, group["ns_steps"])
        return shards(group["lr"] * (out.mT if by_columns else out), params)


class M3(Batched):
    r"""Multi-scale momentum Muon (Algorithm 1): a fast and a slow momentum, orthogonalised, over a second moment.

        M2' = b3 M2 + (1 - b3) mean of the last `every` gradients, once in `every` steps
        M1' = b1 M1 + (1 - b1) g        V' = b2 V + (1 - b2) g^2        U = (NS(M1') + alpha NS(M2')) / sqrt(V' + eps)
        W' = W - lr 0.2 U / rms(U)

    The scaling to a root mean square of 0.2 gives the step the size of AdamW's, so one learning rate serves both, and
    makes it independent of the gradient's scale. V is corrected for its start at 0. State: five numbers per parameter.

    Args:
        betas: b1, b2, b3, decays; with `literal` the weights of Algorithm 1 instead.
        alpha: weight of the slow momentum.
        every: steps between two moves of the slow momentum. Every gradient enters it once: the sums of eq. 75 overlap
            by a term, and its minus sign would set the two momentums against each other.
        literal: Algorithm 1 as printed, where no buffer ever decays: M1' = M1 + b1 g, V' = V + b2 g^2, M2' = M2 + b3
            sum of the last `every` gradients, W' = W - lr U.
        dtype: what Newton-Schulz computes in, bfloat16 as in torch's Muon; float64 for float64 parameters.
    """

    SETTINGS = dict(
        lr=0.01, betas=(0.95, 0.95, 0.9), alpha=0.5, every=10, eps=1e-10, ns_steps=5, literal=False,
        dtype=torch.bfloat16, weight_decay=0.0,
    )  # fmt: skip

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if len(group["betas"]) != 3 or (not group["literal"] and max(group["betas"]) >= 1):
            raise ValueError(f"M3: betas are {group['betas']}; allowed: three, each below 1 unless literal is True")

    def _orthogonal(self, group: dict[str, Any], buffers: list[Tensor]) -> list[Tensor]:
        G = stack_full(buffers)
        dtype = torch.float64 if G.dtype == torch.float64 else group["dtype"]
        return shards(newton_schulz(G, group["ns_steps"], dtype), buffers)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        (b1, b2, b3), every, literal = group["betas"], group["every"], group["literal"]
        M1, M2, V, total, O2 = (self._buffers(params, n) for n in ("fast", "slow", "square", "sum", "slow_ns"))
        t = self.state[params[0]]["step"].item()
        if t > 1 and (t - 1) % every == 0:
            if not literal:
                torch._foreach_mul_(M2, b3)
            torch._foreach_add_(M2, total, alpha=b3 if literal else (1 - b3) / every)
            torch._foreach_zero_(total)
            for buffer, value in zip(O2, self._orthogonal(group, M2)):
                buffer.copy_(value)
        torch._foreach_add_(total, grads)
        if literal:
            torch._foreach_add_(M1, grads, alpha=b1)
        else:
            torch._foreach_lerp_(M1, grads, 1 - b1)
            torch._foreach_mul_(V, b2)
        torch._foreach_addcmul_(V, grads, grads, value=b2 if literal else 1 - b2)
        U = self._orthogonal(group, M1)
        torch._foreach_add_(U, O2, alpha=group["alpha"])
        below = torch._foreach_div(V, 1.0 if literal else 1 - b2**t)
        torch._foreach_add_(below, group["eps"])
        torch._foreach_sqrt_(below)
        torch._foreach_div_(U, below)
        for u in U:  # to a root mean square of 0.2
            scale = 1.0 if literal else 0.2 * u.numel() ** 0.5 / whole(u.square().sum()).sqrt().clamp(min=1e-30)
            u.mul_(-group["lr"] * scale)
        return U


# ---- Bookkeeping ----


class Accumulate(torch.optim.Optimizer):
    """Adds up gradients of parameters that move once in `period` steps (`hope.slow_groups`).

    Its step comes before that of the optimizers that move them: it takes their gradients away, so that they are passed
    over; at the end of every period the sum takes the gradient's place. ValueError for a period below 1.
    """

    def __init__(self, params: Any, period: int = 1):
        super().__init__(params, {"period": period})
        for group in self.param_groups:
            if group["period"] < 1:
                raise ValueError(f"Accumulate: period is {group['period']}; allowed: 1 or more steps")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["step"], state["sum"] = torch.zeros(()), torch.zeros_like(p)
                state["step"] += 1
                state["sum"] += p.grad
                if state["step"].item() % group["period"]:
                    p.grad = None
                else:
                    p.grad.copy_(state["sum"])
                    state["sum"].zero_()


class EMA(torch.optim.Optimizer):
    """Keeps an exponential moving average of weights, in state["average"]; its step comes after those of the others.

    Early on it averages over fewer steps than `decay` says, else it would remember the random start for long.
    """

    def __init__(self, params: Any, decay: float):
        super().__init__(params, {"decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["average"] = torch.zeros(()), p.detach().clone()
                t = state["step"].add_(1).item()
                state["average"].lerp_(p.detach(), 1 - min(group["decay"], t / (10 + t)))
