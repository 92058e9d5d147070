"""`hope.Memory` is the equations it claims to be, token by token, whatever the configuration."""

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import hope
from kernels import EPS


def unit(z):
    """z of length 1 along its last dimension, or 1 / EPS times z where that is less."""
    return z / z.norm(dim=-1, keepdim=True).clamp(min=EPS)


def random_memory(**fields):
    torch.manual_seed(0)
    memory = hope.Memory(**{**dict(d_model=6, n_head=2, chunk=3, chunk_proj=3), **fields}).double()
    with torch.no_grad():
        for p in memory.parameters():
            p += 0.3 * torch.randn_like(p)
    return memory


def specification(memory, x):
    """Eqs. 83-88 and 90-91 as loops over sequences, heads and tokens; inner gradients by autograd. x: (t, d) -> (t, d)."""
    c, e = memory.config, memory.config.d_head
    if memory.conv is not None:
        padded = F.pad(x, (0, 0, c.conv - 1, 0))
        x = torch.stack([(padded[t : t + c.conv] * memory.conv.weight[:, 0].T).sum(0) for t in range(len(x))])
    depth = range(c.depth)
    outputs = []
    for h in range(c.n_head):
        cut = slice(h * e, (h + 1) * e)
        static = lambda to: x if to is None else (x @ to.weight.T)[:, cut]
        key = lambda z: unit(z) if c.qk_norm else z
        now = {b: [memory.start[f"proj_{l}"][h, i] for l in depth] for i, b in enumerate(memory.adaptive)}
        rescaled = c.self_values and c.value_norm
        scale = {b: memory.start["proj_scale"][h, i] for i, b in enumerate(memory.adaptive)} if rescaled else {}
        now["main"] = [memory.start[f"main_{l}"][h, 0] for l in depth]
        if rescaled:
            scale["main"] = memory.start["main_scale"][h, 0]
        momentum = {b: [torch.zeros_like(w) for w in ws] for b, ws in now.items()}
        anchor, first = dict(now), dict(now)

        def run(ws, z):
            if c.depth == 1:
                return ws[0] @ z
            y = ws[1] @ F.silu(ws[0] @ z)
            return z + (F.layer_norm(y, y.shape, eps=EPS**2) if c.memory_norm else y)

        for t in range(len(x)):
            for b in now:
                if t % (c.chunk if b == "main" else c.chunk_proj) == 0:
                    anchor[b] = now[b]
            u = x if memory.to_u is None else x @ memory.to_u.weight.T
            u = u.view(len(x), c.n_head, -1, e)[t, h].expand(len(memory.adaptive), e)
            read = {b: run(anchor[b], key(u[i])) for i, b in enumerate(memory.adaptive)}
            for b in ("k", "v", "q"):
                if b not in read:
                    read[b] = static(getattr(memory, f"to_{b}"))[t]
            k, v, q = key(read["k"]), read["v"], key(read["q"])

            def gate(name):
                g = memory.gates[name]
                if name in memory.adaptive:
                    return (read[name] * g.read[h, 0]).sum() + g.bias[h, 0]
                return x[t] @ g.weight[h] + g.bias[h]

            eta = torch.ones(()).double() if c.step == "one" else F.softplus(gate("eta"))
            alpha = {
                "gate": lambda: torch.sigmoid(gate("alpha")),
                "fixed": lambda: 1 - 2.0 ** (-5 - h),
                "none": lambda: 1.0,
            }
            alpha = alpha[c.decay]()
            theta = torch.sigmoid(gate("theta")) if c.momentum else None
            before = now["main"]
            for b in list(now):
                target = v
                if c.self_values:
                    target = run(anchor[b], v)
                    target = (scale[b] * unit(target)).squeeze() if rescaled else target
                start = [w.detach().requires_grad_() for w in anchor[b]]
                out = run(start, k)
                loss = 0.5 * (out - target.detach()).square().sum() if c.objective == "l2" else -(out @ target.detach())
                grads = torch.autograd.grad(loss, start)
                layer_inputs = [k] if c.depth == 1 else [k, F.silu(anchor[b][0] @ k)]
                new = []
                for l in depth:
                    w, z = now[b][l], layer_inputs[l]
                    hidden = l + 1 < c.depth
                    rate = eta * c.hidden_rate if hidden else eta
                    exact = c.beta * rate / (1 + rate * z @ z)
                    step = {"exact": exact, "mean": exact / c.chunk, "one": rate}[c.step]
                    write = -step * grads[l]
                    if c.momentum:
                        momentum[b][l] = theta * momentum[b][l] + (1 - theta) * write
                        write = momentum[b][l]
                    origin = first[b][l] if hidden and c.origin == "start" else torch.zeros_like(w)
                    change = alpha * (w - origin) + write
                    if c.rule == "dgd":
                        erased = (alpha if c.decay_first else 1) * (w - origin)
                        change = change - step * torch.outer(erased @ z, z)
                    new.append(origin + change)
                now[b] = new
            outputs.append(run({"token": before, "after": now["main"], "chunk": anchor["main"]}[c.read], q))
    y = torch.stack(outputs).view(c.n_head, len(x), e).transpose(0, 1)
    if memory.to_y is None:
        return y.flatten(1)
    return (e**0.5 * unit(y) * memory.y_norm.squeeze(1)).flatten(1) @ memory.to_y.weight.T


subsets = st.sets(st.sampled_from(["k", "v", "q", "eta", "alpha"])).map(lambda s: tuple(sorted(s)))


@settings(max_examples=60, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        dict(
            depth=st.sampled_from([1, 2]), objective=st.sampled_from(["dot", "l2"]), rule=st.sampled_from(["gd", "dgd"]),
            momentum=st.booleans(), self_values=st.booleans(), adaptive=subsets, chunk=st.integers(1, 6),
            chunk_proj=st.integers(1, 6), read=st.sampled_from(["token", "after", "chunk"]), conv=st.sampled_from([0, 2, 4]),
            qk_norm=st.booleans(), decay_first=st.booleans(), beta=st.sampled_from([0.5, 1.0, 2.0]), own_input=st.booleans(),
            origin=st.sampled_from(["start", "zero"]), hidden_rate=st.sampled_from([0.0, 0.1, 1.0]),
        )
    ),
    t=st.integers(1, 9),
)  # fmt: skip
def test_memory_equals_its_specification(fields, t):
    memory = random_memory(**fields)
    x = torch.randn(2, t, 6, dtype=torch.float64)
    y, _ = memory(x)
    for b in range(2):
        torch.testing.assert_close(y[b], specification(memory, x[b]), rtol=1e-8, atol=1e-9)


def test_kinds_of_decay_step_and_norm_equal_the_specification():
    kinds = (["gate", "fixed", "none"], ["exact", "mean", "one"], [False, True], [1, 3])
    for decay, step, flag, expand in itertools.product(*kinds):
        adaptive = ("k", "v") + (("alpha",) if decay == "gate" else ()) + (() if step == "one" else ("eta",))
        memory = random_memory(
            decay=decay, step=step, adaptive=adaptive, memory_norm=flag, value_norm=not flag, expand=expand
        )
        x = torch.randn(1, 5, 6, dtype=torch.float64)
        torch.testing.assert_close(memory(x)[0][0], specification(memory, x[0]), rtol=1e-8, atol=1e-9)


def test_the_papers_literal_form():
    """One head, no projections but W_q, chunk of one: eqs. 86-88 followed line by line, without the options."""
    literal = dict(objective="l2", origin="zero", hidden_rate=1.0, momentum=False, conv=0, project=False)
    memory = random_memory(n_head=1, d_model=4, chunk=1, chunk_proj=1, **literal)
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    names = ["k", "v", "eta", "alpha"]
    M = {b: (memory.start["proj_0"][0, i], memory.start["proj_1"][0, i]) for i, b in enumerate(names)}
    M["mem"] = (memory.start["main_0"][0, 0], memory.start["main_1"][0, 0])
    scale = {b: memory.start["proj_scale"][0, i, 0, 0] for i, b in enumerate(names)}
    scale["mem"] = memory.start["main_scale"][0, 0, 0, 0]
    run = lambda W, z: z + W[1] @ F.silu(W[0] @ z)
    for t in range(6):
        x_t, q = unit(x[0, t]), unit(memory.to_q.weight @ x[0, t])
        y = run(M["mem"], q)  # eq. 86
        torch.testing.assert_close(memory(x)[0][0, t], y)
        k, v = unit(run(M["k"], x_t)), run(M["v"], x_t)
        eta = F.softplus(memory.gates["eta"].read[0, 0] @ run(M["eta"], x_t) + memory.gates["eta"].bias[0, 0])
        alpha = torch.sigmoid(
            memory.gates["alpha"].read[0, 0] @ run(M["alpha"], x_t) + memory.gates["alpha"].bias[0, 0]
        )
        new = {}
        for b, W in M.items():
            target = scale[b] * unit(run(W, v))  # eq. 84
            leaves = [w.detach().requires_grad_() for w in W]
            grads = torch.autograd.grad(0.5 * (run(leaves, k) - target.detach()).square().sum(), leaves)
            z = [k, F.silu(W[0] @ k)]
            steps = [eta / (1 + eta * u @ u) for u in z]  # eq. 56's minimiser
            new[b] = tuple(
                w @ (alpha * torch.eye(4) - s * torch.outer(u, u)) - s * g for w, s, u, g in zip(W, steps, z, grads)
            )
        M = new  # eq. 88


LINEAR = ("linear-attention", "retnet", "deltanet", "gated-deltanet")


def literature(name, memory, x, chunk):
    """Each preset's own recurrence, from its own paper, one head and one token at a time. x: (t, d) -> reads (t, d)."""
    c, e = memory.config, memory.config.d_head
    heads = []
    for h in range(c.n_head):
        cut = slice(h * e, (h + 1) * e)
        q, k, v = ((x @ getattr(memory, f"to_{b}").weight.T)[:, cut] for b in "qkv")
        q, k = unit(q), unit(k)
        gate = lambda g: x @ memory.gates[g].weight[h] + memory.gates[g].bias[h]
        reads = []
        if name == "linear-attention":  # Katharopoulos et al. 2020, without the normaliser: sum_s (q_t . k_s) v_s
            reads = [(q[t] @ k[: t + 1].T) @ v[: t + 1] for t in range(len(x))]
        elif name == "retnet":  # Sun et al. 2023, parallel form: (Q K^T * D) V, D_ts = gamma^(t-s), rotated q and k
            q, k = hope.rotate(q[None, None], 0)[0, 0], hope.rotate(k[None, None], 0)[0, 0]
            gamma = 1 - 2.0 ** (-5 - h)
            reads = [sum(gamma ** (t - s) * (q[t] @ k[s]) * v[s] for s in range(t + 1)) for t in range(len(x))]
        elif name in ("deltanet", "gated-deltanet"):
            # Yang et al. 2024, 2025: S = alpha S (I - beta k k^T) + beta v k^T. Their beta is a sigmoid of a projection, and
            # so is ours for unit keys, eta / (1 + eta) = sigmoid(log eta), with another curve from projection to log eta.
            S, eta = torch.zeros(e, e, dtype=x.dtype), F.softplus(gate("eta"))
            alpha = torch.sigmoid(gate("alpha")) if name == "gated-deltanet" else torch.ones(len(x), dtype=x.dtype)
            for t in range(len(x)):
                beta = eta[t] / (1 + eta[t] * k[t] @ k[t])
                S = alpha[t] * S @ (torch.eye(e) - beta * torch.outer(k[t], k[t])) + beta * torch.outer(v[t], k[t])
                reads.append(S @ q[t])
        else:  # an MLP memory f(W; x) = x + W1 silu(W2 x), TTT's with a layer norm; gradients at the chunk's start
            norm = (lambda y: F.layer_norm(y, (e,), eps=EPS**2)) if name == "ttt" else lambda y: y
            now = [memory.start["main_0"][h, 0], memory.start["main_1"][h, 0]]
            f = lambda W, z: z + norm(W[1] @ F.silu(W[0] @ z))
            S = [torch.zeros_like(w) for w in now]
            eta = F.softplus(gate("eta"))
            for t in range(len(x)):
                if t % chunk == 0:
                    W0 = [w.detach().requires_grad_() for w in now]
                before = now
                out = f(W0, k[t])
                loss = -(out @ v[t]) if name == "dla" else 0.5 * (out - v[t]).square().sum()
                grads = torch.autograd.grad(loss, W0)
                # An average over the chunk of steps that end at the target if a layer's input is all that is written.
                inputs = [k[t], F.silu(W0[0] @ k[t])]
                grads = [eta[t] / (1 + eta[t] * z @ z) / chunk * g for z, g in zip(inputs, grads)]
                if name == "ttt":  # Sun et al. 2024, mini-batch gradient descent, read after the step
                    now = [w - g for w, g in zip(now, grads)]
                    before = now
                elif name == "titans":  # Behrouz et al. 2025: momentum on the surprise, weight decay
                    theta, alpha = torch.sigmoid(gate("theta")[t]), torch.sigmoid(gate("alpha")[t])
                    S = [theta * s - (1 - theta) * g for s, g in zip(S, grads)]
                    now = [alpha * w + s for w, s in zip(now, S)]
                else:  # deep linear attention: dot-product objective, weight decay
                    now = [torch.sigmoid(gate("alpha")[t]) * w - g for w, g in zip(now, grads)]
                reads.append(f(before, q[t]))
        heads.append(torch.stack(reads))
    return torch.cat(heads, -1)


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("name", [*LINEAR, "ttt", "titans", "dla"])
def test_presets_equal_the_recurrences_of_their_papers(name, chunk):
    torch.manual_seed(0)
    config = hope.MemoryConfig.preset(name, d_model=8, n_head=2, conv=0, chunk=chunk, chunk_proj=chunk)
    memory = hope.Memory(config).double()
    memory.to_y = None  # compare the reads, before they are projected out
    x = torch.randn(1, 11, 8, dtype=torch.float64)
    torch.testing.assert_close(memory(x)[0][0], literature(name, memory, x[0], chunk), rtol=1e-9, atol=1e-9)


def test_linear_presets_do_not_depend_on_the_chunk():
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    for name in LINEAR:
        ys = []
        for chunk in (1, 4, 13):
            torch.manual_seed(1)
            config = hope.MemoryConfig.preset(name, d_model=8, n_head=2, chunk=chunk, chunk_proj=7)
            ys.append(hope.Memory(config).double()(x)[0])
        torch.testing.assert_close(ys[1], ys[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ys[2], ys[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "change, lowest, negative",
    [({}, 0.0, False), (dict(beta=2.0), -0.9, True), (dict(decay_first=False), -0.9, True)],
)
def test_gated_deltanet_keeps_the_sign_of_what_it_holds_unless_told_otherwise(change, lowest, negative):
    """A token multiplies what the state answers at its key by alpha (1 - beta): in (0, 1) as published, which no parity
    can be counted with; down to -1 with beta up to 2, or where alpha leaves the delta term alone. At gates of 0 and 1 too."""
    memory = hope.Memory(hope.MemoryConfig.preset("gated-deltanet", d_model=4, n_head=1, conv=0, **change)).double()
    x, factors = torch.randn(1, 1, 4, dtype=torch.float64), []
    with torch.no_grad():
        memory.to_v.weight.zero_()  # nothing is written
        memory.start["main_0"].normal_()
        k = unit(memory.to_k(x))[0, 0]
        for eta, alpha in itertools.product((-20.0, 0.0, 4.0, 20.0), (-1000.0, -4.0, 0.0, 4.0, 20.0)):
            memory.gates["eta"].bias.fill_(eta)
            memory.gates["alpha"].bias.fill_(alpha)
            _, state = memory(x)
            before, after = memory.start["main_0"][0, 0] @ k, state.main.now[0][0, 0, 0] @ k
            factors.append(((after @ before) / (before @ before)).item())
    assert -1 <= min(factors) and max(factors) <= 1 and max(factors) > 0.99
    assert min(factors) < lowest if negative else min(factors) >= lowest


@pytest.mark.parametrize("window", [0, 1, 3])
def test_attention_is_kernel_regression_over_its_window(window):
    """Eqs. 62 and 63: y_t minimises sum_i s(k_i, q_t) |v_i - y|^2 over the tokens it sees."""
    torch.manual_seed(0)
    memory = hope.Memory.preset("attention", d_model=4, n_head=1, conv=0, window=window).double()
    assert isinstance(memory, hope.Attention)
    memory.to_y = None  # the read itself
    x = torch.randn(1, 7, 4, dtype=torch.float64)
    q = hope.rotate(unit(memory.to_q(x)) * memory.scale[0], 0)[0]
    k, v = hope.rotate(unit(memory.to_k(x)), 0)[0], memory.to_v(x)[0]
    for t, y in enumerate(memory(x)[0][0]):
        first = max(0, t + 1 - window) if window else 0
        s = torch.exp(k[first : t + 1] @ q[t])
        torch.testing.assert_close(y, (s[:, None] * v[first : t + 1]).sum(0) / s.sum())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_chunks_equal_the_others():
    fields = dict(d_model=8, chunk=4, chunk_proj=4)
    plain, compiled = random_memory(**fields), random_memory(**fields)
    hope.compile_parts(compiled)
    x = torch.randn(2, 11, 8, dtype=torch.float64)  # two chunks and a ragged one
    ys = [memory(x)[0] for memory in (plain, compiled)]
    assert hope.compiled_step.cache_info().currsize == 1
    torch.testing.assert_close(*ys)
    for y in ys:
        y.square().sum().backward()
    for p, q in zip(plain.parameters(), compiled.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_layer_takes_one_line():
    by_keyword = hope.Memory(d_model=16, n_head=2, chunk=8)
    assert by_keyword.config == hope.MemoryConfig(d_model=16, n_head=2, chunk=8)
    assert hope.Memory(by_keyword.config, chunk=4).config == hope.MemoryConfig(d_model=16, n_head=2, chunk=4)
    for name in hope.MemoryConfig.PRESETS:
        torch.manual_seed(0)
        layer = hope.Memory.preset(name, d_model=16, n_head=2)
        torch.manual_seed(0)
        same = hope.make_layer(hope.MemoryConfig.preset(name, d_model=16, n_head=2))
        assert type(layer) is type(same) is (hope.Attention if name == "attention" else hope.Memory)
        x = torch.randn(1, 5, 16)
        assert layer(x)[0].shape == (1, 5, 16) and torch.equal(layer(x)[0], same(x)[0])
    with pytest.raises(ValueError, match="use hope.make_layer or Memory.preset"):
        hope.Memory(depth=0, adaptive=())


@pytest.mark.parametrize("preset", list(hope.MemoryConfig.PRESETS))
def test_tokens_that_are_0_do_not_blow_up_gradients(preset):
    """A vector of 0 has no direction: what makes lengths or spreads 1 must not divide gradients by next to nothing."""
    memory = hope.Memory.preset(preset, d_model=64, n_head=2, conv=0)
    x, g, norms = torch.randn(1, 48, 64), torch.randn(1, 48, 64), []
    for silent in (slice(0, 0), slice(0, None, 3), slice(0, None)):
        z = x.clone()
        z[:, silent] = 0
        z.requires_grad_()
        (memory(z)[0] * g).sum().backward()
        norms.append(z.grad.norm())
    assert max(norms) < 5e3 * norms[0]


def test_retention_of_0_before_the_delta_term_is_legal():
    memory = hope.Memory.preset("gated-deltanet", d_model=4, n_head=1, conv=0)
    with torch.no_grad():
        memory.gates["alpha"].bias.fill_(-1000.0)
    y, state = memory(torch.randn(1, 5, 4))
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in memory.parameters() if p.grad is not None)
    assert 1e-3 < state.main.now[0].abs().max() < 10


def test_bad_configurations_say_what_is_allowed():
    for fields, message in (
        (dict(rule="sgd"), "rule is 'sgd'; allowed: gd, dgd"),
        (dict(d_model=10, n_head=4), "not a multiple of n_head 4"),
        (dict(adaptive=("k", "w")), "allowed: k, v, q, eta, alpha"),
        (dict(chunk=0), "chunk is 0; it must be at least 1"),
        (dict(decay="none"), "adaptive names alpha"),
        (dict(project=False), "set n_head=1"),
        (dict(conv=-1), "neither can be negative"),
        (dict(beta=3.0), "beta is 3.0; allowed: above 0, up to 2"),
        (dict(spread=-1.0), "spread is -1.0, hidden_rate is 0.1; neither can be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            hope.MemoryConfig(**fields)
    with pytest.raises(ValueError, match="no memory preset called 'hopee'; choose one of: hope"):
        hope.MemoryConfig.preset("hopee")
