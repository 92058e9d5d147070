"""`hope.Memory` is the equations it claims to be, token by token, whatever the configuration."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import hope


def random_memory(**fields):
    torch.manual_seed(0)
    memory = hope.Memory(hope.MemoryConfig(**{**dict(d_model=6, n_head=2, chunk=3, chunk_proj=3), **fields})).double()
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
        unit = lambda z: z / z.norm() if c.qk_norm else z
        now = {b: [memory.start[f"proj_{l}"][h, i] for l in depth] for i, b in enumerate(memory.adaptive)}
        scale = {b: memory.start["proj_scale"][h, i] for i, b in enumerate(memory.adaptive)} if c.self_values and now else {}
        now["main"] = [memory.start[f"main_{l}"][h, 0] for l in depth]
        if c.self_values:
            scale["main"] = memory.start["main_scale"][h, 0]
        momentum = {b: [torch.zeros_like(w) for w in ws] for b, ws in now.items()}
        anchor = dict(now)

        def run(ws, z):
            return ws[0] @ z if c.depth == 1 else z + ws[1] @ F.silu(ws[0] @ z)

        for t in range(len(x)):
            for b in now:
                if t % (c.chunk if b == "main" else c.chunk_proj) == 0:
                    anchor[b] = now[b]
            read = {b: run(anchor[b], unit(static(memory.to_u)[t])) for b in memory.adaptive}
            for b in ("k", "v", "q"):
                if b not in read:
                    read[b] = static(getattr(memory, f"to_{b}"))[t]
            k, v, q = unit(read["k"]), read["v"], unit(read["q"])

            def gate(name):
                g = memory.gates[name]
                if name in memory.adaptive:
                    return (read[name] * g.read[h, 0]).sum() + g.bias[h, 0]
                return x[t] @ g.weight[h] + g.bias[h]

            eta = F.softplus(gate("eta")) if c.step == "exact" else torch.ones(()).double()
            alpha = torch.sigmoid(gate("alpha")) if c.decay else 1.0
            theta = torch.sigmoid(gate("theta")) if c.momentum else None
            before = now["main"]
            for b in list(now):
                target = v
                if c.self_values:
                    target = (scale[b] * F.normalize(run(anchor[b], v), dim=0)).squeeze()
                start = [w.detach().requires_grad_() for w in anchor[b]]
                out = run(start, k)
                loss = 0.5 * (out - target.detach()).square().sum() if c.objective == "l2" else -(out @ target.detach())
                grads = torch.autograd.grad(loss, start)
                layer_inputs = [k] if c.depth == 1 else [k, F.silu(anchor[b][0] @ k)]
                new = []
                for l in depth:
                    w, z = now[b][l], layer_inputs[l]
                    step = eta / (1 + eta * z @ z) if c.step == "exact" else eta
                    write = -step * grads[l]
                    if c.momentum:
                        momentum[b][l] = theta * momentum[b][l] + (1 - theta) * write
                        write = momentum[b][l]
                    w_new = alpha * w + write
                    if c.rule == "dgd":
                        w_new = w_new - step * torch.outer(w @ z, z)
                    new.append(w_new)
                now[b] = new
            outputs.append(run({"token": before, "after": now["main"], "chunk": anchor["main"]}[c.read], q))
    y = torch.stack(outputs).view(c.n_head, len(x), e).transpose(0, 1)
    if memory.to_y is None:
        return y.flatten(1)
    return (F.rms_norm(y, (e,)) * memory.y_norm.squeeze(1)).flatten(1) @ memory.to_y.weight.T


subsets = st.sets(st.sampled_from(["k", "v", "q", "eta", "alpha"])).map(lambda s: tuple(sorted(s)))


@settings(max_examples=60, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        dict(
            depth=st.sampled_from([1, 2]), objective=st.sampled_from(["dot", "l2"]), rule=st.sampled_from(["gd", "dgd"]),
            momentum=st.booleans(), self_values=st.booleans(), adaptive=subsets, chunk=st.integers(1, 6),
            chunk_proj=st.integers(1, 6), read=st.sampled_from(["token", "after", "chunk"]), conv=st.sampled_from([0, 2, 4]),
            qk_norm=st.booleans(),
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


def test_no_decay_and_unit_steps_equal_the_specification():
    for decay, step in itertools.product([False, True], ["exact", "one"]):
        adaptive = ("k", "v") + (("alpha",) if decay else ()) + (("eta",) if step == "exact" else ())
        memory = random_memory(decay=decay, step=step, adaptive=adaptive)
        x = torch.randn(1, 5, 6, dtype=torch.float64)
        torch.testing.assert_close(memory(x)[0][0], specification(memory, x[0]), rtol=1e-8, atol=1e-9)


def test_the_papers_literal_form():
    """One head, no projections but W_q, chunk of one: eqs. 86-88 followed line by line, without the options."""
    memory = random_memory(n_head=1, d_model=4, chunk=1, chunk_proj=1, project=False, conv=0, momentum=False)
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    names = ["k", "v", "eta", "alpha"]
    M = {b: (memory.start["proj_0"][0, i], memory.start["proj_1"][0, i]) for i, b in enumerate(names)}
    M["mem"] = (memory.start["main_0"][0, 0], memory.start["main_1"][0, 0])
    scale = {b: memory.start["proj_scale"][0, i, 0, 0] for i, b in enumerate(names)}
    scale["mem"] = memory.start["main_scale"][0, 0, 0, 0]
    run = lambda W, z: z + W[1] @ F.silu(W[0] @ z)
    for t in range(6):
        x_t = F.normalize(x[0, t], dim=0)
        q = F.normalize(memory.to_q.weight @ x[0, t], dim=0)
        y = run(M["mem"], q)  # eq. 86
        torch.testing.assert_close(memory(x)[0][0, t], y)
        k, v = F.normalize(run(M["k"], x_t), dim=0), run(M["v"], x_t)
        eta = F.softplus(memory.gates["eta"].read[0, 0] @ run(M["eta"], x_t) + memory.gates["eta"].bias[0, 0])
        alpha = torch.sigmoid(memory.gates["alpha"].read[0, 0] @ run(M["alpha"], x_t) + memory.gates["alpha"].bias[0, 0])
        new = {}
        for b, W in M.items():
            target = scale[b] * F.normalize(run(W, v), dim=0)  # eq. 84
            leaves = [w.detach().requires_grad_() for w in W]
            grads = torch.autograd.grad(0.5 * (run(leaves, k) - target.detach()).square().sum(), leaves)
            z = [k, F.silu(W[0] @ k)]
            steps = [eta / (1 + eta * u @ u) for u in z]  # eq. 56's minimiser
            new[b] = tuple(w @ (alpha * torch.eye(4) - s * torch.outer(u, u)) - s * g for w, s, u, g in zip(W, steps, z, grads))
        M = new  # eq. 88


def test_linear_presets_do_not_depend_on_the_chunk():
    x = torch.randn(2, 13, 6, dtype=torch.float64)
    for name in ("linear-attention", "deltanet"):
        ys = []
        for chunk in (1, 4, 13):
            torch.manual_seed(1)
            config = hope.MemoryConfig.preset(name, d_model=6, n_head=2, chunk=chunk, chunk_proj=7)
            ys.append(hope.Memory(config).double()(x)[0])
        torch.testing.assert_close(ys[1], ys[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ys[2], ys[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_attention_is_kernel_regression_over_its_window(window):
    """Eqs. 62 and 63: y_t minimises sum_i s(k_i, q_t) |v_i - y|^2 over the tokens it sees."""
    torch.manual_seed(0)
    memory = hope.Memory(hope.MemoryConfig.preset("attention", d_model=4, n_head=1, conv=0, window=window)).double()
    assert isinstance(memory, hope.Attention)
    memory.to_y = None  # the read itself
    x = torch.randn(1, 7, 4, dtype=torch.float64)
    unit = lambda z: F.normalize(z, dim=-1)
    q = memory._rotate(unit(memory.to_q(x)) * memory.scale[0], 0)[0]
    k, v = memory._rotate(unit(memory.to_k(x)), 0)[0], memory.to_v(x)[0]
    for t, y in enumerate(memory(x)[0][0]):
        first = max(0, t + 1 - window) if window else 0
        s = torch.exp(k[first : t + 1] @ q[t])
        torch.testing.assert_close(y, (s[:, None] * v[first : t + 1]).sum(0) / s.sum())


def test_bad_configurations_say_what_is_allowed():
    for fields, message in (
        (dict(rule="sgd"), "rule is 'sgd'; allowed: gd, dgd"),
        (dict(d_model=10, n_head=4), "not a multiple of n_head 4"),
        (dict(adaptive=("k", "w")), "allowed: k, v, q, eta, alpha"),
        (dict(chunk=0), "chunk is 0; it must be at least 1"),
        (dict(decay=False), "adaptive names alpha"),
        (dict(project=False), "set n_head=1"),
        (dict(conv=-1), "neither can be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            hope.MemoryConfig(**fields)
    with pytest.raises(ValueError, match="no memory preset called 'hopee'; choose one of: hope"):
        hope.MemoryConfig.preset("hopee")
