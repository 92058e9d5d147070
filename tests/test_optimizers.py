"""Optimizers against their equations, and the contracts that torch's own keep.

As a program, launched by torchrun, it trains by every optimizer under DDP and FSDP2: see the last test.
"""

import gc
import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import hope
import optim
import train
from kernels import newton_schulz

OPTIMIZERS = {
    "dgd": lambda model, params, **kw: optim.DGD(model, params, **{"lr": 0.1, **kw}),
    "delta": lambda model, params, **kw: optim.DeltaMomentum(params, **{"lr": 0.1, "delta": 5.0, **kw}),
    "identity": lambda model, params, **kw: optim.PreconditionedMomentum(params, preconditioner="identity", **kw),
    "diagonal": lambda model, params, **kw: optim.PreconditionedMomentum(params, **kw),
    "kronecker": lambda model, params, **kw: optim.PreconditionedMomentum(params, preconditioner="kronecker", every=2, eps=1e-3, **kw),
    "deep": lambda model, params, **kw: optim.DeepMomentum(params, **kw),
    "deep-tanh": lambda model, params, **kw: optim.DeepMomentum(params, output="tanh", **{"lr": 0.01, **kw}),
    "m3": lambda model, params, **kw: optim.M3(params, every=2, dtype=torch.float32, **kw),
    "m3-literal": lambda model, params, **kw: optim.M3(params, every=2, dtype=torch.float32, literal=True, eps=1.0, **kw),
}  # fmt: skip
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make_model(dtype=torch.float64, seed=0) -> nn.Sequential:
    """Layers of which two share a shape, one is wide and one is tall."""
    torch.manual_seed(seed)
    widths = (6, 5, 5, 5, 4, 9)
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]


def batch(step, n=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(100 + step)
    return torch.randn(n, 6, generator=g, dtype=torch.float64).to(dtype), torch.randn(
        n, 9, generator=g, dtype=torch.float64
    ).to(dtype)


def loss_of(model, step, **kw):
    x, y = batch(step, **kw)
    return F.mse_loss(model(x), y)


def steps(model, optimizer, start, stop, **kw):
    for step in range(start, stop):
        optimizer.zero_grad()
        loss_of(model, step, **kw).backward()
        optimizer.step()


def run(name, count=5, dtype=torch.float64, **kw):
    model = make_model(dtype)
    optimizer = OPTIMIZERS[name](model, matrices(model), **kw)
    steps(model, optimizer, 0, count, dtype=dtype)
    return model, optimizer


def assert_same_model(a, b, **tolerance):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


def with_singular_values(s: torch.Tensor, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, V with orthonormal columns; U diag(s) V^T has the singular values s."""
    rand = lambda rows: torch.linalg.qr(torch.randn(rows, len(s), dtype=torch.float64))[0]
    return rand(m), rand(n)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-25, 1, 1e25])
@pytest.mark.parametrize("decades", [0, 2, 8])
def test_newton_schulz_brings_singular_values_to_where_it_says(shape, dtype, scale, decades):
    """Condition numbers up to 1e8: those of at least |G| / 570 land in [0.7, 1.2], the smaller ones below."""
    s = torch.logspace(0, -decades, 32, dtype=torch.float64)
    U, V = with_singular_values(s, *shape)
    G = (scale * (U * s) @ V.mT).to(torch.float64 if dtype == torch.float64 else torch.float32)
    O = newton_schulz(G, dtype=dtype)
    assert O.dtype == G.dtype and O.shape == G.shape
    along, reached = (U.mT @ O.double() @ V).diagonal(), s >= s.norm() / 570
    assert 0.7 < along[reached].min() and torch.linalg.matrix_norm(O.double(), 2) < 1.2
    assert reached.sum() == {0: 32, 2: 32, 8: 11}[decades]
    if dtype != torch.bfloat16 and decades == 8:
        assert 0 < along[~reached].min() < 0.01  # the direction is right, the size is not
    if dtype == torch.float64:  # more steps reach further
        assert (U.mT @ newton_schulz(G, 20) @ V).diagonal().min() > 0.7


def test_newton_schulz_of_a_stack_is_that_of_each_and_zero_gives_zero():
    G = torch.randn(2, 3, 7, 4)
    torch.testing.assert_close(newton_schulz(G), torch.stack([torch.stack([newton_schulz(g) for g in h]) for h in G]))
    assert newton_schulz(torch.zeros(3, 4)).abs().max() == 0 and newton_schulz(torch.randn(0, 3, 4)).shape == (0, 3, 4)
    assert newton_schulz(torch.tensor([[1.0, float("nan")]])).isnan().any()
    for bad in ({"G": torch.randn(3)}, {"G": torch.randn(3, 3), "steps": 0}):
        with pytest.raises(ValueError, match="needs .*1 or more"):
            newton_schulz(**bad)


# ----------------------------------------------------------------------------------------------------------------------
# Equations


def argmin(objective, start):
    """Numerically, by L-BFGS from another point than `start`."""
    W = (start + torch.randn_like(start)).requires_grad_()
    solver = torch.optim.LBFGS(
        [W], lr=1, max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        value = objective(W)
        value.backward()
        return value

    solver.step(closure)
    return W.detach()


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("delta", [1.0, 0.3])
def test_dgd_takes_the_exact_step_of_equation_56(n, normalize, delta):
    lr, layer = 0.7, nn.Linear(6, 5).double()
    x, y = 2 * torch.randn(n, 6, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)
    optimizer = optim.DGD(layer, lr=lr, delta=delta, normalize=normalize)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    out = layer(x)
    out.retain_grad()
    loss = (out - y).square().sum(-1).mean()
    loss.backward()
    optimizer.step()
    u = -n * out.grad  # of every row's own loss
    key = x / x.square().sum(-1).mean().sqrt() if normalize else x
    objective = lambda V: (
        (delta * 0.5 * (V @ key.mT).square().sum(0) - (V @ key.mT * u.mT).sum(0)).mean()
        + (V - W).square().sum() / (2 * lr)
    )
    torch.testing.assert_close(layer.weight.detach(), argmin(objective, W), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.bias.detach(), b - lr * layer.bias.grad)  # plain SGD
    if n == 1:  # the closed form, with the norm in the step that the paper prints without it
        step = lr / (1 + delta * lr * key.square().sum())
        by_hand = W - step * delta * W @ key.mT @ key + step * u.mT @ key
        torch.testing.assert_close(layer.weight.detach(), by_hand, rtol=1e-9, atol=1e-12)


def test_dgd_with_delta_0_is_sgd():
    model, _ = run("dgd", delta=0.0)
    other = make_model()
    steps(other, torch.optim.SGD(matrices(other), lr=0.1), 0, 5)
    assert_same_model(model, other)


class TwoUses(nn.Module):
    """A layer that is used twice, checkpointed or not."""

    def __init__(self, use_checkpoint):
        super().__init__()
        self.layer, self.use_checkpoint = nn.Linear(6, 6).double(), use_checkpoint

    def forward(self, x):
        body = lambda x: torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return checkpoint(body, x, use_reentrant=False) if self.use_checkpoint else body(x)


def test_dgd_counts_exactly_the_inputs_whose_gradient_arrives():
    """Accumulated passes and repeated uses count; evaluation, recomputation and inner gradients do not."""
    x = batch(0)[0]
    seen = {}
    for kind in ("plain", "checkpointed", "accumulated", "disturbed"):
        torch.manual_seed(0)
        model = TwoUses(kind == "checkpointed")
        optimizer = optim.DGD(model, lr=0.3)
        if kind == "disturbed":
            with torch.no_grad():
                model(x)
            other = x.clone().requires_grad_()
            torch.autograd.grad(model(other).sum(), other)
            model(x)  # a graph that is never used
            inner = x.clone().requires_grad_()
            loss = model(inner).square().mean()
            torch.autograd.grad(loss, inner, retain_graph=True, create_graph=True)
            loss.backward()
        elif kind == "accumulated":
            for part in x.split(4):
                (0.5 * model(part).square().mean()).backward()
        else:
            model(x).square().mean().backward()
        n, gram = optimizer._inputs[model.layer.weight]
        assert n == 16
        inputs = torch.cat([x, torch.tanh(model.layer(x))]).detach()
        torch.testing.assert_close(gram, inputs.mT @ inputs)
        optimizer.step()
        assert not optimizer._inputs
        seen[kind] = model.layer.weight.detach()
    for weight in seen.values():
        torch.testing.assert_close(weight, seen["plain"])


def test_dgd_trains_hope_as_it_observes_however_its_backward_pass_is_cut():
    """Every token counts once in every linear layer, though it is read in segments, and inner gradients come first."""
    ends = []
    for remat, truncate in ((0, False), (1, False), (1, True)):
        torch.manual_seed(0)
        config = hope.HopeConfig.preset("tiny", vocab_size=11, n_layer=2, d_model=8, n_head=2, cms_hidden=1.0, chunk=4, chunk_proj=4, cms=(6, 12, hope.INF), remat=remat)  # fmt: skip
        model = hope.Hope(config).double()
        optimizer = optim.DGD(model, lr=0.1)
        tokens = torch.randint(0, 11, (2, 25), generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            optimizer.zero_grad()
            model.observe(tokens[:, :-1], tokens[:, 1:], backward=True, truncate=truncate)
            with torch.no_grad():
                model.observe(tokens[:, :-1], tokens[:, 1:])
            counts = {name: optimizer._inputs[p][0] for name, p in model.named_parameters() if p in optimizer._inputs}
            optimizer.step()
        assert set(counts.values()) == {48}
        assert {name for name, p in model.named_parameters() if p in optimizer._linear} == set(counts)
        ends.append(model)
    assert_same_model(*ends[:2])


def test_dgd_leaves_nothing_behind():
    model, x = make_model(), batch(0)[0]
    optimizer = optim.DGD(model)
    for _ in range(50):
        model(x).square().mean().backward()
    assert all(seen.numel() <= 36 for _, seen in optimizer._inputs.values())
    optimizer.zero_grad()
    assert not optimizer._inputs
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 7))
    assert all(isinstance(m.weight, nn.Parameter) for m in model if isinstance(m, nn.Linear))
    optimizer.remove_hooks()
    model(x).mean().backward()
    assert not optimizer._inputs and not any(m._forward_hooks or m._forward_pre_hooks for m in model)
    alive = weakref.ref(optimizer)
    model(x).mean().backward()
    del optimizer
    gc.collect()
    assert alive() is None
    forgotten = weakref.ref(optim.DGD(model))  # its hooks still there
    gc.collect()
    assert forgotten() is None
    model(x).mean().backward()


def random_steps(optimizer, params, count=7):
    """Set random gradients and step; yields the gradients after every step."""
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        grads = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in params]
        for p, grad in zip(params, grads):
            p.grad = grad.clone()
        optimizer.step()
        yield grads


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5,)])
def test_delta_momentum_is_gradient_descent_on_its_regression(shape):
    """Corrected eq. 49: GD on 1/2 |m g^T + I|^2 with a step for each of its two gradients, and a decay."""
    lr, alpha, delta = 0.1, 0.9, 0.05
    W = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start, m = W.detach().clone(), torch.zeros(shape, dtype=torch.float64).reshape(shape[0], -1)
    optimizer = optim.DeltaMomentum([W], lr=lr, momentum=alpha, delta=delta, bounded=False)
    total = 0
    for [g] in random_steps(optimizer, [W]):
        g = g.reshape(shape[0], -1)
        leaf = m.clone().requires_grad_()
        quadratic, linear = 0.5 * (leaf @ g.mT).square().sum(), (leaf @ g.mT).trace()
        [by_norm], [by_value] = torch.autograd.grad(quadratic, leaf), torch.autograd.grad(linear, leaf)
        m = alpha * m - delta * by_norm - lr * by_value
        total = total + m
    torch.testing.assert_close(W.detach(), start + total.reshape(shape), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3, 1e30])
def test_bounded_delta_momentum_takes_gradients_of_any_scale(scale):
    """Its coefficient is the exact minimiser's, so that nothing grows; for small gradients it is delta itself."""
    W = nn.Parameter(torch.randn(4, 6))
    optimizer = optim.DeltaMomentum([W], lr=1e-3 / scale, momentum=0.9, delta=10.0)
    m = torch.zeros(4, 6, dtype=torch.float64)
    g = torch.randn(4, 6, dtype=torch.float64)
    for _ in range(100):
        W.grad = (scale * g).float()
        optimizer.step()
        c = 10 * scale**2 / (1 + 10 * scale**2 * g.square().sum())
        m = 0.9 * m - c * m @ g.mT @ g - 1e-3 * g
    torch.testing.assert_close(optimizer.state[W]["momentum"].double(), m, rtol=1e-4, atol=1e-7)
    assert m.norm() < 0.01 * g.norm() + 1e-9


def test_momentum_preconditioned_by_the_identity_is_torchs_and_by_the_diagonal_adams():
    for name, other, fields in (
        ("identity", torch.optim.SGD, dict(momentum=0.9, weight_decay=0.0)),
        ("diagonal", torch.optim.Adam, dict(betas=(0.0, 0.99))),
    ):
        ours, optimizer = run(name, lr=0.01, momentum=0.9 if name == "identity" else 0.0)
        theirs = make_model()
        steps(theirs, other(matrices(theirs), lr=0.01, **fields), 0, 5)
        assert_same_model(ours, theirs, rtol=1e-9, atol=1e-11)


def test_kronecker_preconditioning_whitens():
    """Of a single gradient it makes the orthogonal factor; of many, what an explicit loop makes with roots by SVD."""
    W = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
    optimizer = optim.PreconditionedMomentum([W], lr=1.0, momentum=0.0, preconditioner="kronecker", eps=0.0)
    [[g]] = random_steps(optimizer, [W], 1)
    U, _, V = torch.linalg.svd(g)
    torch.testing.assert_close(W.detach(), -U @ V)
    W = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = optim.PreconditionedMomentum([W], lr=0.1, preconditioner="kronecker", beta=0.8, eps=0.01, every=1)
    total, m, L, R = 0, 0, 0, 0
    for t, [g] in enumerate(random_steps(optimizer, [W]), 1):
        L, R = 0.8 * L + 0.2 * g @ g.mT, 0.8 * R + 0.2 * g.mT @ g
        roots = []
        for mean in (L / (1 - 0.8**t), R / (1 - 0.8**t)):
            U, s, V = torch.linalg.svd(mean + 0.01 * mean.trace() / len(mean) * torch.eye(len(mean)))
            roots.append(U @ torch.diag(s**-0.25) @ U.mT)
        m = 0.9 * m - 0.1 * roots[0] @ g @ roots[1]
        total = total + m
    torch.testing.assert_close(W.detach(), total, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
@pytest.mark.parametrize("output", ["linear", "tanh", "orthogonal"])
def test_deep_momentum_trains_one_memory_for_all_matrices_of_a_shape(shape, output):
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(3)]
    optimizer = optim.DeepMomentum(params, lr=0.1, momentum=0.9, inner_lr=3.0, hidden=2.0, output=output)
    memory = nn.Sequential(nn.Linear(4, 8, bias=False), nn.SiLU(), nn.Linear(8, 4, bias=False)).double()
    nn.init.zeros_(memory[2].weight)
    total = [0, 0, 0]
    for t, grads in enumerate(random_steps(optimizer, params)):
        if t == 0:
            memory[0].weight.data = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double()
        rows = torch.cat([g if shape[1] == 4 else g.mT for g in grads])
        u = rows / rows.norm(dim=-1, keepdim=True)
        hidden = memory[:2](u)
        loss = 0.5 * F.mse_loss(memory(u), -u, reduction="none").sum(-1).mean()
        for w, grad, x in zip(memory.parameters(), torch.autograd.grad(loss, memory.parameters()), (u, hidden)):
            w.data = 0.9 * w - 3 / (1 + 3 * x.square().sum(-1).mean().item()) * grad
        out = memory(u).detach() * rows.norm(dim=-1, keepdim=True)
        for i, o in enumerate(out.chunk(3)):
            o = torch.tanh(o / o.square().mean().sqrt().clamp(min=1e-300)) if output == "tanh" else o
            o = 0.2 * 6**0.5 * newton_schulz(o) if output == "orthogonal" else o
            total[i] = total[i] + 0.1 * (o if shape[1] == 4 else o.mT)
    for p, expected in zip(params, total):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-7, atol=1e-9)
    assert [k for k in optimizer.state[params[0]]] == ["step", "w_in", "w_out"] and len(optimizer.state[params[1]]) == 1


def test_deep_momentum_recalls_the_directions_that_past_gradients_took():
    """Where all gradients lie in few directions, one in these comes through and one in others hardly."""
    W = nn.Parameter(torch.zeros(32, 64))
    optimizer = optim.DeepMomentum([W], lr=1.0)
    U = torch.linalg.qr(torch.randn(32, 32))[0]
    through = {}
    for step in range(301):
        for kind, basis in (("usual", U[:, :4]), ("new", U[:, 4:])):
            if kind == "usual" or step == 300:
                before = W.detach().clone()
                W.grad = basis @ torch.randn(basis.shape[1], 64)
                optimizer.step()
                through[kind] = -((W.detach() - before) * W.grad).sum().item() / W.grad.square().sum().item()
    assert through["usual"] > 0.7 and abs(through["new"]) < 0.3


@pytest.mark.parametrize("literal", [True, False])
@pytest.mark.parametrize("every", [1, 3])
def test_m3_is_algorithm_1(literal, every):
    W = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    expected, (b1, b2, b3), alpha, lr, eps = W.detach().clone(), (0.9, 0.8, 0.7), 0.5, 0.01, 1e-3
    optimizer = optim.M3([W], lr=lr, betas=(b1, b2, b3), alpha=alpha, every=every, eps=eps, literal=literal)
    M1 = M2 = V = O2 = torch.zeros(4, 6, dtype=torch.float64)
    past = []
    for t, [g] in enumerate(random_steps(optimizer, [W]), 1):
        if past and len(past) % every == 0:
            chunk = sum(past[-every:])
            M2 = M2 + b3 * chunk if literal else b3 * M2 + (1 - b3) * chunk / every
            O2 = newton_schulz(M2)
        past.append(g)
        M1 = M1 + b1 * g if literal else b1 * M1 + (1 - b1) * g
        V = V + b2 * g**2 if literal else b2 * V + (1 - b2) * g**2
        U = (newton_schulz(M1) + alpha * O2) / (V / (1 if literal else 1 - b2**t) + eps).sqrt()
        expected = expected - lr * (U if literal else 0.2 * U / U.square().mean().sqrt())
    torch.testing.assert_close(W.detach(), expected, rtol=1e-9, atol=1e-11)


def test_the_two_momentums_of_m3_agree_on_a_constant_gradient():
    """Row by row of eq. 75 with its minus sign they would point in opposite directions (cosine -1)."""
    W = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer, g = optim.M3([W], every=2, literal=True), torch.randn(4, 6, dtype=torch.float64)
    for _ in range(5):
        W.grad = g.clone()
        optimizer.step()
    fast, slow = (optimizer.state[W][name].flatten() for name in ("fast", "slow"))
    assert F.cosine_similarity(fast, slow, dim=0) > 0.999
    torch.testing.assert_close(slow.view(4, 6), 0.9 * 4 * g)  # every gradient once


def test_m3_orthogonalises_the_slow_memory_only_when_it_moves(monkeypatch):
    calls = []
    monkeypatch.setattr(optim, "newton_schulz", lambda G, *a: calls.append(len(G)) or newton_schulz(G, *a))
    model = make_model()
    steps(model, optim.M3([p for p in matrices(model) if p.shape == (5, 5)], every=4), 0, 10)
    assert calls == [2] * 4 + [2, 2] + [2] * 3 + [2, 2] + [2]


def test_what_optimizers_do_if_only_a_learning_rate_is_given():
    """By their states: deep momentum keeps .999 with an inner rate of 10, delta momentum .9 with a delta of 1, and M3's
    slow momentum takes a tenth of the mean of ten gradients."""
    g = torch.randn(4, 6, dtype=torch.float64)

    def moved(make, count):
        W = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
        optimizer = make([W])
        for _ in range(count):
            W.grad = g.clone()
            optimizer.step()
        return optimizer.state[W]

    # In the first step w_out is 0, so that w_in only decays, and w_out moves by its own gradient, which is known.
    deep, w_in = moved(optim.DeepMomentum, 1), torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(deep["w_in"], 0.999 * w_in)
    u = (g / g.norm(dim=0)).mT
    hidden = F.silu(u @ w_in.mT)
    step = 10 / (1 + 10 * hidden.square().sum(-1).mean())
    torch.testing.assert_close(deep["w_out"], -step * u.mT @ hidden / 6)

    G, m = g.mT @ g, -0.01 * g
    m = 0.9 * m - 1 / (1 + g.square().sum()) * m @ G - 0.01 * g
    torch.testing.assert_close(moved(lambda p: optim.DeltaMomentum(p, lr=0.01), 2)["momentum"], m)

    ten, eleven = (moved(lambda p: optim.M3(p, lr=0.01), count) for count in (10, 11))
    assert not ten["slow"].any()
    torch.testing.assert_close(eleven["slow"], 0.1 * g)
    torch.testing.assert_close(eleven["fast"], (1 - 0.95**11) * g)
    torch.testing.assert_close(eleven["square"], (1 - 0.95**11) * g**2)


# ----------------------------------------------------------------------------------------------------------------------
# Contracts


@pytest.mark.parametrize(
    "name, lr",
    [("dgd", 0.3), ("delta", 0.1), ("identity", 0.1), ("diagonal", 0.01), ("kronecker", 0.01), ("deep", 1.0),
     ("deep-tanh", 0.01), ("m3", 0.1), ("m3-literal", 0.03)],
)  # fmt: skip
def test_the_loss_falls(name, lr):
    model = make_model()
    optimizer = OPTIMIZERS[name](model, matrices(model), lr=lr, **({"delta": 0.01} if name == "dgd" else {}))
    x = batch(0, 64)[0]
    y = torch.sin(x @ torch.randn(6, 9, dtype=torch.float64))
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_dict_round_trip_in_mid_run_gives_the_identical_trajectory(name, dtype, tmp_path):
    whole, _ = run(name, 7, dtype)
    model, optimizer = run(name, 4, dtype)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    new = make_model(dtype, seed=1)
    again = OPTIMIZERS[name](new, matrices(new), lr=77.0)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    new.load_state_dict(weights)
    again.load_state_dict(state)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 77.0
    steps(new, again, 4, 7, dtype=dtype)
    for (a, p), q in zip(whole.named_parameters(), new.parameters()):
        if a.endswith("weight"):
            assert torch.equal(p, q)
    tensors = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    assert all(type(v) is torch.Tensor for v in tensors)
    assert {v.dtype for v in tensors} <= {torch.float32, torch.float64}  # never rounded to bfloat16


@every_optimizer
def test_equal_shapes_together_are_each_by_itself(name):
    if name.startswith("deep"):
        pytest.skip("these share a memory on purpose")
    together, _ = run(name, 6)
    model = make_model()
    each = [OPTIMIZERS[name](model, [p]) for p in matrices(model)]
    for step in range(6):
        model.zero_grad()
        loss_of(model, step).backward()
        for optimizer in each:
            optimizer.step()
    assert_same_model(together, model, rtol=1e-8, atol=1e-10)


@every_optimizer
def test_a_parameter_without_a_gradient_stays_and_starts_later(name):
    model = make_model()
    optimizer = OPTIMIZERS[name](model, matrices(model))
    first = model[0].weight
    before = first.detach().clone()
    first.requires_grad_(False)
    steps(model, optimizer, 0, 2)
    assert torch.equal(first, before) and first not in optimizer.state
    first.requires_grad_(True)
    steps(model, optimizer, 2, 5)
    assert optimizer.state[first]["step"] == 3 and not torch.equal(first, before) and first.isfinite().all()


@every_optimizer
def test_groups_have_settings_of_their_own_and_can_be_added(name):
    model = make_model()
    first, *rest = matrices(model)
    optimizer = OPTIMIZERS[name](model, [{"params": [first], "lr": 0.0}, {"params": rest[:-1]}])
    optimizer.add_param_group({"params": rest[-1:], "lr": 0.0, "weight_decay": 0.5})
    before = [p.detach().clone() for p in matrices(model)]
    steps(model, optimizer, 0, 2)
    moved = [not torch.equal(p, q) for p, q in zip(matrices(model), before)]
    assert moved == [False, *[True] * (len(rest) - 1), False]
    optimizer.param_groups[0].update(lr=1e-30, weight_decay=1e29)  # only decay is left
    steps(model, optimizer, 2, 3)
    torch.testing.assert_close(first.detach(), 0.9 * before[0])


@every_optimizer
def test_a_closure_is_called_once_with_gradients_and_its_loss_returned(name):
    model, other = make_model(), make_model()
    optimizer, calls = OPTIMIZERS[name](model, matrices(model)), []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0] and len(calls) == 1
    steps(other, OPTIMIZERS[name](other, matrices(other)), 0, 1)
    assert_same_model(model, other, rtol=0, atol=0)


@every_optimizer
def test_weight_decay_is_decoupled(name):
    plain, _ = run(name, 1, lr=0.01)
    decayed, _ = run(name, 1, lr=0.01, weight_decay=0.5)
    start = make_model()
    if name == "dgd":  # moves the decayed weight
        plain = make_model()
        for p in matrices(plain):
            p.data *= 0.995
        assert not torch.equal(decayed[0].weight, make_model()[0].weight)
        return
    for p, q, s in zip(matrices(plain), matrices(decayed), matrices(start)):
        torch.testing.assert_close(q, p - 0.005 * s, rtol=1e-9, atol=1e-12)


@every_optimizer
def test_bfloat16_parameters_follow_float32_ones(name):
    """The start, and so the path, differs by the rounding only."""
    lr = {"lr": 0.01}
    rough, optimizer = run(name, 5, torch.bfloat16, **lr)
    fine, _ = run(name, 5, torch.float32, **lr)
    start = make_model(torch.float32)
    for p, q, s in zip(matrices(rough), matrices(fine), matrices(start)):
        assert p.dtype == torch.bfloat16 and p.isfinite().all()
        assert (p.float() - q).norm() < 0.02 * q.norm() + 0.3 * (q - s).norm()


@every_optimizer
def test_sparse_gradients_and_wrong_shapes_are_refused(name):
    model = nn.Sequential(nn.Embedding(7, 6, sparse=True), nn.Linear(6, 5))
    optimizer = OPTIMIZERS[name](model, matrices(model))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    cube = [nn.Parameter(torch.zeros((2,) * 6))]
    with pytest.raises(
        ValueError, match=r"takes real parameters of .* dimensions, not torch.float32 of shape \(2, 2, 2"
    ):
        OPTIMIZERS[name](model, cube)
    with pytest.raises(ValueError, match="takes real parameters"):
        OPTIMIZERS[name](model, [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])


@every_optimizer
def test_gradients_that_are_not_finite_reach_the_parameters_as_with_torchs_own(name):
    model = make_model()
    optimizer = OPTIMIZERS[name](model, matrices(model))
    loss_of(model, 0).backward()
    model[0].weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert model[0].weight.isnan().any() and model[-1].weight.isfinite().all()


@every_optimizer
def test_a_convolution_is_the_matrix_of_its_output_channels(name):
    if name == "dgd":
        pytest.skip("moves convolutions by plain SGD")
    weights = torch.randn(4, 2, 3, 3)
    matrix, conv = (nn.Parameter(w.clone()) for w in (weights.flatten(1), weights))
    made = [OPTIMIZERS[name](None, [p]) for p in (matrix, conv)]
    for step in range(3):
        grad = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(step))
        matrix.grad, conv.grad = grad.flatten(1), grad
        for optimizer in made:
            optimizer.step()
    torch.testing.assert_close(conv.flatten(1), matrix)
    assert not torch.equal(conv, weights)
    model = hope.Hope(hope.HopeConfig.preset("tiny", d_model=8, n_head=2))
    assert [row.size for row in hope.levels(model, made[0])[:-1]] == [
        row.size for row in hope.levels(model, made[1])[:-1]
    ]


@every_optimizer
def test_empty_matrices_are_passed_over(name):
    model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 3), nn.Linear(3, 3))
    optimizer = OPTIMIZERS[name](model, matrices(model))
    for _ in range(3):
        model(torch.randn(2, 3)).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters()) and model[0].weight not in optimizer.state


def test_a_model_can_be_copied_and_pickled_while_dgd_watches_it():
    model = make_model()
    optimizer = optim.DGD(model)
    path = io.BytesIO()
    torch.save(model, path)
    path.seek(0)
    for copy in (deepcopy(model), torch.load(path, weights_only=False)):
        assert_same_model(copy, model, rtol=0, atol=0)
        loss_of(copy, 0).backward()  # the copy is watched by nobody
        assert not optimizer._inputs and copy[0].weight.grad is not None
    loss_of(model, 0).backward()
    assert len(optimizer._inputs) == len(matrices(model))
    again = optim.DGD(copy)  # and can be by another
    copy.zero_grad()
    loss_of(copy, 0).backward()
    assert len(again._inputs) == len(matrices(model))
    optimizer.step()
    again.step()
    assert_same_model(copy, model)


def test_dgd_takes_the_model_first():
    with pytest.raises(TypeError, match=r"DGD takes the model first, not a generator; write DGD\(model, lr=0.1\)"):
        optim.DGD(make_model().parameters(), lr=0.1)


@every_optimizer
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_settings_out_of_range_are_refused(name, value):
    model = make_model()
    with pytest.raises(ValueError, match=f"lr is {value}; allowed: 0 or more"):
        OPTIMIZERS[name](model, matrices(model), lr=value)


def test_other_settings_are_refused_by_name():
    params = matrices(make_model())
    for make, message in (
        (lambda: optim.DeltaMomentum(params, momentum=1.5), "momentum is 1.5; allowed: from 0 to 1"),
        (
            lambda: optim.PreconditionedMomentum(params, preconditioner="full"),
            "preconditioner is full; allowed: identity, diagonal",
        ),
        (
            lambda: optim.PreconditionedMomentum([nn.Parameter(torch.zeros(3))], preconditioner="kronecker"),
            "of 2 to 5 dimen",
        ),
        (lambda: optim.DeepMomentum(params, output="sign"), "output is sign; allowed: linear, tanh, orthogonal"),
        (lambda: optim.M3(params, betas=(0.9, 0.9)), "allowed: three"),
        (lambda: optim.M3(params, betas=(0.9, 1.0, 0.9)), "below 1 unless literal"),
        (lambda: optim.M3(params, every=0), "every is 0; allowed: 1 or more"),
        (lambda: optim.M3([nn.Parameter(torch.zeros(3))]), "the rest to AdamW"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="M3 has no nesterov; it has: lr, betas"):
        optim.M3(params, nesterov=True)
    assert optim.M3(params, 0.5, (0.9, 0.8, 0.7)).param_groups[0]["betas"] == (
        0.9,
        0.8,
        0.7,
    )  # in order, as with torch's
    optimizer = optim.M3(params[:1])
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": params[1:], "every": 0})
    assert len(optimizer.param_groups) == 1  # nothing of it was taken


@pytest.mark.parametrize("optimizer", ["m3", "dgd", "delta-momentum", "deep-momentum"])
def test_a_training_run_resumes_to_the_same_end(optimizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the memory reads what the memory wrote and forgets the rest of it. " * 60)
    small = "--d-model 16 --n-head 2 --n-layer 1 --chunk 16 --chunk-proj 16 --cms 16,inf --seq-len 32 --data text.txt"
    command = [*small.split(), "--steps", "6", "--eval-every", "3", "--save-every", "3", "--optimizer", optimizer]
    assert train.main(command) == 0
    log = lambda: [json.loads(line)["loss"] for line in Path("runs/tiny/log.jsonl").read_text().splitlines()]
    whole = log()
    assert whole[-1] < whole[0]
    shutil.rmtree("runs/tiny/checkpoints/step-000006")
    assert train.main(["--resume", "runs/tiny"]) == 0 and log() == whole


@every_optimizer
def test_levels_know_the_memories_of_every_optimizer(name):
    torch.manual_seed(0)
    model = hope.Hope(hope.HopeConfig.preset("tiny", vocab_size=11, d_model=8, n_head=2, cms_hidden=1.0))
    optimizer = OPTIMIZERS[name](model, hope.param_groups(model)["matrix"])
    table = hope.levels(model, optimizer)
    kind = type(optimizer).__name__
    rows = {row.component for row in table if row.component.startswith(kind)}
    assert len(rows) == {"DGD": 0, "PreconditionedMomentum": 1 if name == "identity" else 2, "M3": 3}.get(kind, 1)
    if kind == "M3":
        assert table[-1].component == "M3: slow momentum" and table[-1].every == "2 outer steps"


def test_an_average_of_weights_begins_with_few_of_them():
    p = nn.Parameter(torch.zeros(1))
    ema, expected = optim.EMA([p], decay=0.9), torch.zeros(1)
    for t in range(1, 200):
        p.data.fill_(t)
        ema.step()
        kept = 0.0 if t == 1 else min(0.9, t / (10 + t))  # the first is what it starts from
        expected = kept * expected + (1 - kept) * t
        torch.testing.assert_close(ema.state[p]["average"], expected)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks slower than a training sequence


def test_a_block_whose_chunk_is_longer_than_a_sequence_moves_once_per_chunk_by_the_sum_of_its_gradients():
    torch.manual_seed(0)
    config = hope.HopeConfig.preset(
        "tiny", vocab_size=11, d_model=8, n_head=2, cms_hidden=1.0, cms=(4, 20, 41, hope.INF)
    )
    model = hope.Hope(config).double()
    assert [g["period"] for g in hope.slow_groups(model, 8)] == [3, 6]  # 20 and 41 tokens of sequences of 8, rounded up
    assert hope.slow_groups(model, 41) == []
    optimizers = [optim.Accumulate(hope.slow_groups(model, 8)), torch.optim.SGD(model.parameters(), lr=0.1)]
    period = {p: g["period"] for g in hope.slow_groups(model, 8) for p in g["params"]}
    sums = {p: torch.zeros_like(p) for p in model.parameters()}
    for step in range(1, 8):
        x = torch.randint(11, (2, 9))
        model.zero_grad()
        model.observe(x[:, :-1], x[:, 1:], backward=True)
        before = {p: p.detach().clone() for p in model.parameters()}
        for p in model.parameters():
            sums[p] += 0 if p.grad is None else p.grad
        for optimizer in optimizers:
            optimizer.step()
        for p, total in sums.items():
            moves = step % period.get(p, 1) == 0
            torch.testing.assert_close(p.detach(), before[p] - 0.1 * total if moves else before[p])
            if moves:
                total.zero_()
    with pytest.raises(ValueError, match="period is 0; allowed: 1 or more"):
        optim.Accumulate([{"params": [torch.nn.Parameter(torch.zeros(2))], "period": 0}])


def test_levels_list_slow_blocks_after_what_moves_at_every_step():
    model = hope.Hope(hope.HopeConfig.preset("tiny", d_model=8, n_head=2, cms_hidden=1.0, cms=(4, 20, hope.INF)))
    slow = hope.slow_groups(model, 8)
    table = hope.levels(model, [optim.Accumulate(slow), torch.optim.AdamW(model.parameters())])
    *_, parameters, last = table
    assert (last.component, last.every, last.rule) == ("CMS, C = 20: start state", "3 outer steps", "AdamW")
    assert last.level == parameters.level + 1 and parameters.every == "outer step"
    assert last.size == sum(p.numel() for p in slow[0]["params"])
    assert parameters.size + last.size == sum(p.numel() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Distribution

COUNT = 4


def train_on_ranks(out: Path) -> None:
    """Under torchrun: train by every optimizer, on half of every batch a rank, and write the weights."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for kind in ("ddp", "fsdp"):
        for name in OPTIMIZERS:
            model = make_model(torch.float32)
            if kind == "fsdp":
                for layer in model:
                    if isinstance(layer, nn.Linear) and layer.in_features == 5:
                        fully_shard(layer)
                fully_shard(model)
            optimizer = OPTIMIZERS[name](model, matrices(model))
            wrapped = DistributedDataParallel(model) if kind == "ddp" else model
            for step in range(COUNT):
                optimizer.zero_grad()
                x, y = batch(step, dtype=torch.float32)
                F.mse_loss(wrapped(x[rank::2]), y[rank::2]).backward()
                optimizer.step()
            if kind == "fsdp":
                placed = {type(v).__name__ for s in optimizer.state.values() for v in s.values() if v.shape == (5, 6)}
                assert placed <= {"DTensor"}, (name, placed)
            whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
            found[f"{kind} {name}"] = [whole(p.detach()).tolist() for p in matrices(model)]
    if rank == 0:
        beside = out.with_suffix(".new")
        beside.write_text(json.dumps(found))
        os.replace(beside, out)
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts at its end, after all is done


def test_two_ranks_under_ddp_and_fsdp2_take_the_steps_of_one_process(tmp_path):
    out = tmp_path / "weights.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        __file__,
        str(out),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [Path(hope.__file__).parent, *sys.path])),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert out.exists(), done.stderr[-3000:]
    found = json.loads(out.read_text())
    for name in OPTIMIZERS:
        expected, _ = run(name, COUNT, torch.float32)
        for kind in ("ddp", "fsdp"):
            for p, q in zip(matrices(expected), found[f"{kind} {name}"], strict=True):
                torch.testing.assert_close(
                    torch.tensor(q), p.detach(), rtol=1e-5, atol=1e-5, msg=lambda m: f"{kind} {name}: {m}"
                )


if __name__ == "__main__":
    train_on_ranks(Path(sys.argv[1]))
