"""The Triton kernels compute what the reference does: on a GPU (`pytest -m gpu`), and here in Triton's interpreter.

Tests marked `gpu` run on a GPU, or with TRITON_INTERPRET=1 on the CPU; `test_in_the_interpreter` runs them so, in a
process of its own because Triton decides at import. The interpreter multiplies in float32 whatever the input precision:
what TF32 loses there is put in by hand. bfloat16 it gets wrong in products and in rounding: both are mended where a kernel
needs them, which only Newton-Schulz does. Threads it does not have: races.py looks in every launch for what would be a race
between them. Compilation for GPUs that are not here is tested in another process.
"""

import copy
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import backend
import fused
import hope
import kernels
import scan
from backend import jit, tl
from kernels import dgd_chunk, dgd_loop, newton_schulz

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")


def watched():
    """`races.watched`, which needs the interpreter."""
    if not INTERPRETED:
        return nullcontext([])
    import races

    return races.watched()


@pytest.fixture
def triton_kernels(monkeypatch):
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("no GPU; in the interpreter test_in_the_interpreter runs this")
    monkeypatch.setenv("HOPE_KERNELS", "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # falling back is a failure
        with watched() as found:
            yield
        assert found == []


gpu = lambda fn: pytest.mark.gpu(pytest.mark.usefixtures("triton_kernels")(fn))


def inputs(c, o=20, i=18, momentum=True, lead=(1,), gate=None, scale=1.0, repeated=False):
    """Arguments of dgd_chunk in float32; `gate` fixes alpha and theta to a number or "mixed" (0, 1 and random)."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*lead, *shape, generator=g)

    def gates():
        a = torch.rand(*lead, c, generator=g)
        if gate == "mixed":
            choice = torch.randint(3, a.shape, generator=g)
            return torch.where(choice == 0, 0.0, torch.where(choice == 1, 1.0, a))
        return a if gate is None else torch.full_like(a, gate)

    X = torch.nn.functional.normalize(rand(c, i), dim=-1)
    X = X[..., :1, :].expand_as(X).clone() if repeated else X
    eta = torch.rand(*lead, c, generator=g)
    args = dict(M=scale * rand(o, i), X=X, D=scale * rand(c, o), eta=eta, alpha=gates(), Q=rand(c, i))
    if momentum:
        args |= dict(m=scale * rand(o, i), theta=gates())
    return {k: v.to(DEVICE) for k, v in args.items()}


def with_gradients(fn, args, dtype, read=("M", "m", "R"), **flags):
    """Outputs of fn, and the gradients of a random combination of those in `read`, all in float64 on the CPU."""
    args = {k: v.to(dtype).requires_grad_() for k, v in args.items()}
    out = {k: z for k, z in zip(("M", "m", "R"), fn(**args, **flags)) if z is not None}
    g = torch.Generator().manual_seed(1)
    seeds = {k: torch.randn(z.shape, generator=g).to(z) for k, z in out.items()}
    loss = sum((out[k] * seeds[k]).sum() for k in read if k in out)
    grads = torch.autograd.grad(loss, list(args.values()), allow_unused=True)
    out |= {f"d{k}": z for k, z in zip(args, grads) if z is not None}
    return {k: z.detach().double().cpu() for k, z in out.items()}


def assert_agree(args, rtol=1e-4, read=("M", "m", "R"), **flags):
    """The kernels' values and gradients against the token loop's in float64, relative to the largest entry of each."""
    got = with_gradients(dgd_chunk, args, torch.float32, read, **flags)
    want = with_gradients(dgd_loop, args, torch.float64, read, **flags)
    for k in want.keys() | got.keys():
        a, b = got.get(k, torch.zeros(1)), want.get(k, torch.zeros(1))
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-6)
        assert error < rtol, f"{k}: {error:.1e}"


@jit
def _accesses(X, CASE: "tl.constexpr", WAIT: "tl.constexpr"):
    """Two accesses to 16 numbers of X, or more, and in between a barrier if WAIT."""
    t = tl.arange(0, 16)
    there, back = X + t, X + 15 - t
    if CASE == "load after store":
        tl.store(there, 1.0)
        if WAIT:
            tl.debug_barrier()
        tl.load(back)
    if CASE == "store after load":
        x = tl.load(back)
        if WAIT:
            tl.debug_barrier()
        tl.store(there, x)
    if CASE == "store after store":
        tl.store(there, 1.0, mask=t < 9)
        if WAIT:
            tl.debug_barrier()
        tl.store(there, 2.0, mask=t >= 8)
    if CASE == "next iteration":
        for _ in range(2):
            tl.store(there, 1.0)
            if WAIT:
                tl.debug_barrier()
    if CASE == "other statement":
        x = tl.load(there)
        if WAIT:
            tl.debug_barrier()
        tl.store(there, x)
    if CASE == "other program":
        tl.store(there + tl.program_id(0) * (16 if WAIT else 15), 1.0)
    if CASE == "no race":
        tl.store(there, tl.load(there) + 1.0)
        if WAIT:
            tl.debug_barrier()
        tl.load(there, mask=t < 8)
        tl.store(there, 1.0, mask=t >= 8)


RACES = {
    "load after store": "no barrier between store at HERE and load at HERE",
    "store after load": "no barrier between load at HERE and store at HERE",
    "store after store": "no barrier between store at HERE and store at HERE",
    "next iteration": "no barrier between store at HERE and store at HERE",
    "other statement": "no barrier between load at HERE and store at HERE",
    "other program": "program (1, 0, 0) stores to what program (0, 0, 0) touches: store at HERE",
}


@gpu
@pytest.mark.skipif(not INTERPRETED, reason="a GPU's threads leave no trace")
@pytest.mark.parametrize("case", RACES)
def test_a_race_is_found_and_none_where_there_is_a_barrier(case):
    programs = 2 if case == "other program" else 1
    for wait in (False, True):
        with watched() as found:
            _accesses[(programs,)](torch.zeros(32), case, wait)
        found = [re.sub(r"test_triton.py:\d+ _accesses", "HERE", race) for race in found]
        assert found[:1] == ([] if wait else [RACES[case]])


@gpu
@pytest.mark.skipif(not INTERPRETED, reason="a GPU's threads leave no trace")
def test_to_change_a_number_and_to_touch_others_is_no_race():
    x = torch.zeros(16)
    with watched() as found:
        _accesses[(1,)](x, "no race", True)
    assert found == [] and (x == 1).all()


@pytest.mark.parametrize("triton_us, faster", [(900.0, True), (1100.0, False)])
def test_a_gpu_takes_for_chunks_what_was_faster_when_it_was_measured(tmp_path, monkeypatch, triton_us, faster):
    times = {("triton", 2): 10.0, ("reference", 2): 20.0, ("triton", 8): triton_us, ("reference", 8): 1000.0}
    rows = [dict(how=how, batch=b, forward_us=us, backward_us=us) for (how, b), us in times.items()]
    path = tmp_path / "tests/bench/gpu.json"
    path.parent.mkdir(parents=True)
    failed = dict(how="triton", batch=16, failed="out of memory")
    path.write_text(json.dumps({"device": {"name": "This GPU"}, "rows": {"chunk": [*rows, failed]}}))
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "backend.py"))
    monkeypatch.setattr(backend, "uses_triton", lambda z: True)
    on_gpu = lambda name: monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    z = SimpleNamespace(is_cuda=True, device="cuda")
    backend.slow_at.cache_clear()
    for name, choice, expected in (("This GPU", "", faster), ("Another", "", True), ("This GPU", "triton", True)):
        on_gpu(name)
        monkeypatch.setenv("HOPE_KERNELS", choice)
        assert backend.chunks_by_triton(z) == expected
    backend.slow_at.cache_clear()


# c = 19 and 20 x 18 memories: two blocks of tokens, of rows and tiles of the width, and all of them ragged.
@gpu
@pytest.mark.parametrize("momentum, delta, inclusive", list(itertools.product([False, True], repeat=3)))
def test_kernels_agree_with_the_token_loop(momentum, delta, inclusive):
    assert_agree(inputs(19, momentum=momentum), delta=delta, inclusive=inclusive)


@gpu
@pytest.mark.parametrize("gate", [0.0, 1.0, "mixed"])
def test_gates_of_exactly_zero_and_one(gate):
    assert_agree(inputs(18, 16, 16, gate=gate), ema=gate == "mixed", inclusive=gate == "mixed")


@gpu
@pytest.mark.parametrize("flags", [dict(ema=True), dict(ema=True, inclusive=True), dict(delta=False, ema=True)])
def test_averaging_momentum(flags):
    assert_agree(inputs(17, 16, 16), **flags)


@gpu
@pytest.mark.parametrize("c", [1, 2, 16])
def test_short_chunks(c):
    assert_agree(inputs(c, 5, 7))
    assert_agree(inputs(c, 5, 7, momentum=False), inclusive=True)


@gpu
@pytest.mark.parametrize("read", [("M",), ("m",), ("R",), ("M", "R")])
def test_gradients_of_some_outputs_only(read):
    assert_agree(inputs(17, 5, 7), read=read, inclusive=True)


@gpu
def test_no_queries_and_no_start_momentum():
    args = inputs(17, 5, 7)
    assert_agree({k: v for k, v in args.items() if k != "Q"}, inclusive=True)
    assert_agree({k: v for k, v in args.items() if k != "m"})


@gpu
def test_repeated_keys_over_a_whole_chunk():
    args = inputs(64, 16, 16, momentum=False, gate=1.0, repeated=True)
    assert_agree({**args, "eta": torch.full_like(args["eta"], 0.9)})


@gpu
@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_large_and_small_magnitudes(scale):
    assert_agree(inputs(17, 16, 16, scale=scale))


@gpu
@pytest.mark.parametrize("c, width", [(128, 16), (17, 128)])
def test_chunks_and_widths_up_to_128(c, width):
    args = inputs(c, width, width, momentum=width < 128)
    with torch.no_grad():
        got = dgd_chunk(**args, ema=True)
        want = dgd_loop(**{k: v.double() for k, v in args.items()}, ema=True)
    for a, b in ((a, b) for a, b in zip(got, want) if b is not None):
        assert (a.double() - b).abs().max() < 1e-4 * b.abs().max()


@gpu
@pytest.mark.parametrize("queries", [1, 2])
def test_memories_that_share_inputs_and_of_which_some_are_read(queries):
    args = inputs(17, 5, 7, lead=(1, 1))
    M, D, m = (torch.randn(1, 3, *z.shape[2:]).to(DEVICE) for z in (args["M"], args["D"], args["m"]))
    M, X = M[:, :1].expand(-1, 3, -1, -1), args["X"].transpose(-1, -2).contiguous().transpose(-1, -2)
    args |= dict(M=M, D=D, m=m, X=X, Q=torch.randn(1, queries, 17, 7).to(DEVICE))

    def loop(Q, **rest):
        last = {k: z[:, -2:] if z.shape[1] == 3 else z for k, z in rest.items()}
        return *dgd_loop(**rest, inclusive=True)[:2], dgd_loop(**last, Q=Q, inclusive=True)[2]

    got = with_gradients(lambda **z: dgd_chunk(**z, readers=2, inclusive=True), args, torch.float32)
    for k, want in with_gradients(loop, args, torch.float64).items():
        assert got[k].shape == want.shape and (got[k] - want).abs().max() < 1e-4 * want.abs().max(), k


@gpu
@pytest.mark.skipif(not INTERPRETED, reason="a GPU's programs leave no trace")
def test_memories_that_are_not_read_multiply_no_queries(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    count, plain = [0], InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda *args: count.__setitem__(0, count[0] + 1) or plain(*args)
    )
    args, products = inputs(16, 16, 16, lead=(4,)), {}
    for readers in (None, 1, 4):
        count[0] = 0
        dgd_chunk(**args | dict(Q=args["Q"][: readers or 4]), readers=readers)
        products[readers] = count[0]
    assert products[4] == products[None] > products[1]


@gpu
def test_bfloat16_inputs_are_computed_in_float32():
    half = {k: v.bfloat16() for k, v in inputs(17, 5, 7).items()}
    for got, want in zip(dgd_chunk(**half), dgd_loop(**{k: v.double() for k, v in half.items()})):
        assert got.dtype == torch.float32
        assert (got.double() - want).abs().max() < 1e-4 * want.abs().max()


def patched_products(monkeypatch, of_factors):
    """Triton's interpreter with its products' factors changed."""
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot
    change = lambda z: interpreter.TensorHandle(*of_factors(z))
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, change(a), change(b), *rest)
    )


@gpu
@pytest.mark.skipif(not INTERPRETED, reason="a GPU rounds by itself")
@pytest.mark.parametrize("precision, low, high", [("highest", 0.0, 1e-5), ("high", 1e-5, 1e-2)])
def test_three_passes_make_up_for_what_tf32_loses(monkeypatch, precision, low, high):
    """Products whose factors are cut to TF32's 11 bits; "highest" takes three of them, "high" one."""
    patched_products(monkeypatch, lambda z: ((z.data.view("int32") & -8192).view("float32"), z.dtype))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    args = inputs(48, 16, 32, momentum=False)
    got, want = dgd_chunk(**args)[2], dgd_loop(**{k: v.double() for k, v in args.items()})[2]
    assert low <= (got.double() - want).abs().max() / want.abs().max() < high


@gpu
@pytest.mark.parametrize("shape", [(5, 7), (70, 90)])
def test_newton_schulz_in_bfloat16(shape, monkeypatch):
    """As far from the orthogonal factor as the reference in bfloat16 is. In the interpreter factors are bits that are
    taken for integers and results are cut off, not rounded: here factors become numbers first, and results are rounded."""
    if INTERPRETED:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def rounded(self, src, dst):
            if (src.dtype.scalar, dst.scalar) == (tl.float32, tl.bfloat16):
                z = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16)
                return TensorHandle(z.numpy(), tl.bfloat16)
            return cast(self, src, dst)

        cast = InterpreterBuilder.cast_impl
        monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
        number = lambda z: ((z.data.astype("uint32") << 16).view("float32"), tl.float32)
        patched_products(monkeypatch, lambda z: number(z) if z.dtype.scalar == tl.bfloat16 else (z.data, z.dtype))
    G = torch.randn(*shape, device=DEVICE)
    got = newton_schulz(G, dtype=torch.bfloat16)
    monkeypatch.setenv("HOPE_KERNELS", "reference")
    exact, plain = newton_schulz(G.double()), newton_schulz(G, dtype=torch.bfloat16)
    error = lambda z: (z.double() - exact).norm() / exact.norm()
    assert 1e-4 < error(got) < 1.5 * error(plain) < 0.1, (error(got), error(plain))


def memory(preset, **change):
    """A layer whose every parameter is away from its start value."""
    layer = hope.Memory(
        hope.MemoryConfig.preset(preset, **{**dict(d_model=10, n_head=1, chunk=8, chunk_proj=8), **change})
    )
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p) / max(1, p.shape[-1]) ** 0.5
    return layer.to(DEVICE)


# Every preset, and what no preset has: two clocks, all of k, v, q, eta, alpha adaptive, values that are not normalised.
# Cuts: a stream that begins in the middle of a chunk, tokens one by one, and a ragged end.
@gpu
@pytest.mark.parametrize(
    "preset, change, cuts",
    [
        ("hope", dict(n_head=2), ()),
        ("hope", dict(chunk_proj=4, read="after"), (3, 4)),
        ("hope", dict(adaptive=("k", "v", "q", "eta", "alpha"), read="chunk", objective="l2"), (9,)),
        ("hope", dict(origin="zero", own_input=False), (5,)),
        ("hope", dict(depth=1, adaptive=("q", "alpha"), value_norm=False), (5,)),
        ("hope", dict(self_values=False, adaptive=(), expand=2), ()),
        ("titans", dict(n_head=2), (2,)),
        ("ttt", dict(expand=14), ()),
        *((preset, {}, (9,)) for preset in ("dla", "deltanet", "linear-attention")),
        ("gated-deltanet", dict(decay_first=False), (9,)),  # with it there is no single launch
        ("retnet", {}, ()),
    ],
)
def test_a_whole_layer_in_one_launch_is_its_chunks(preset, change, cuts, monkeypatch):
    layer, x = memory(preset, **change), torch.randn(2 if "n_head" in change else 1, 11, 10, device=DEVICE)
    x[:, 3:9] *= 0.01  # with keys and values too short for `hope.unit` to bring them to length 1
    launches, run = [], scan.memory_scan
    monkeypatch.setattr(hope, "memory_scan", lambda *args, **named: launches.append(1) or run(*args, **named))

    def stream():
        state, ys, found = None, [], []
        with torch.no_grad():
            for piece in x.tensor_split(cuts, 1):
                y, state = layer(piece, state)
                ys.append(y)
        hope.map_state(lambda z: found.append(z) or z, state)
        return [torch.cat(ys, 1), *found]

    got = stream()
    assert len(launches) == len(cuts) + 1
    monkeypatch.setenv("HOPE_KERNELS", "reference")
    for a, b in zip(got, stream(), strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-3)
    assert len(launches) == len(cuts) + 1


def layer_and_gradients(layer, x, cuts=()):
    """Of a layer over x (b, t, d), cut in pieces: outputs, the last states and momenta, and the gradients that random
    cotangents of all these give x and every parameter; in float64 on the CPU."""
    x, state, ys = x.detach().requires_grad_(), None, []
    for piece in x.tensor_split(cuts, 1):
        y, state = layer(piece, state)
        ys.append(y)
    ends = {f"{name}{i}": z for name in ("now", "momentum") for i, z in enumerate(getattr(state.main, name))}
    out, g = {"y": torch.cat(ys, 1), **ends}, torch.Generator().manual_seed(1)
    loss = sum((z * torch.randn(z.shape, generator=g).to(z)).sum() for z in out.values())
    of = {"x": x, **dict(layer.named_parameters())}
    out |= {f"d_{name}": z for name, z in zip(of, torch.autograd.grad(loss, list(of.values())))}
    return {name: z.detach().double().cpu() for name, z in out.items()}


@pytest.fixture
def launches(monkeypatch):
    """Grows with every call of `fused.memory_layer`."""
    found, run = [], hope.memory_layer
    monkeypatch.setattr(hope, "memory_layer", lambda *args, **named: found.append(1) or run(*args, **named))
    return found


# Tiles that are full and that are not, every flag of the kernels, adaptive memories with k, q or neither of them. Cuts: pieces
# that begin and end inside a chunk, and states that come from a call before.
WHOLE_LAYERS = {
    "the preset, two heads": (dict(d_model=32, n_head=2, chunk=16), 32, ()),
    "all adaptive, cut inside a chunk": (dict(adaptive=("k", "v", "q", "eta", "alpha")), 27, (11,)),
    "chunks of 24 and wide hidden layers": (dict(chunk=24, expand=2, objective="l2", remat=0), 48, ()),
    "chunks of 64": (dict(d_model=16, chunk=64, adaptive=("eta", "alpha"), remat=0), 128, ()),
    "from zero, one input for all": (dict(adaptive=("q", "alpha"), own_input=False, origin="zero"), 16, ()),
    "given values and retention": (dict(d_model=24, adaptive=("v", "eta"), self_values=False, decay="fixed"), 16, ()),
    "long keys, all retained": (dict(adaptive=("k", "eta"), qk_norm=False, decay="none"), 16, ()),
    "nothing adaptive": (dict(adaptive=(), objective="l2"), 16, ()),
}


@gpu
@pytest.mark.parametrize("name", WHOLE_LAYERS)
def test_a_whole_layer_with_gradients_is_its_chunks(name, launches):
    assert_layer_agrees(*WHOLE_LAYERS[name], launches)


def assert_layer_agrees(change, length, cuts, launches, layer=None, x=None):
    """Values and gradients by the layer's launches against the plain form's in float64, relative to the largest entry."""
    torch.manual_seed(0)
    change = {"chunk_proj": change.get("chunk", 8), **change}
    layer = memory("hope", **change) if layer is None else layer
    x = torch.randn(1, length, layer.config.d_model, device=DEVICE) if x is None else x
    got = layer_and_gradients(layer, x, cuts)
    assert len(launches) == len(cuts) + 1
    with kernels.using("reference"):
        want = layer_and_gradients(copy.deepcopy(layer).double(), x.double(), cuts)
    worst = {k: ((got[k] - z).abs().max() / z.abs().max().clamp(min=1e-6)).item() for k, z in want.items()}
    assert max(worst.values()) < 1e-4, {k: f"{error:.0e}" for k, error in worst.items() if error >= 1e-4}


@gpu
def test_a_whole_layer_with_gates_of_exactly_zero_and_one(launches, monkeypatch):
    for name in ("alpha", "theta"):
        monkeypatch.setitem(hope.GATES, name, lambda z: (z + 0.5).clamp(0, 1))
    layer = memory("hope", adaptive=("k", "eta"))
    with torch.no_grad():
        layer.gates["alpha"].bias.zero_()
    x = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for name in ("alpha", "theta"):
        gate = layer._streams(x, 0)[name]
        assert (gate == 0).any() and (gate == 1).any() and ((gate > 0) & (gate < 1)).any()
    assert_layer_agrees({}, 16, (), launches, layer, x)


@gpu
def test_a_whole_layer_whose_every_key_is_the_same(launches):
    """With large steps: S has entries near 1, so that powers of `between S`, 64 x 64, would grow to 1e18."""
    layer = memory("hope", d_model=16, chunk=64, chunk_proj=64, adaptive=("v",), conv=0)
    with torch.no_grad():
        layer.gates["eta"].bias.fill_(6.0)
    assert_layer_agrees({}, 64, (), launches, layer, torch.randn(1, 1, 16, device=DEVICE).expand(1, 64, 16))


@gpu
def test_a_whole_layer_leaks_nothing_from_later_tokens_and_other_sequences(launches):
    layer, x = memory("hope", adaptive=("k", "alpha")), torch.randn(2, 16, 10, device=DEVICE, requires_grad=True)
    y = layer(x)[0]
    other = x.detach().clone()
    other[0, 13:] += 1.0
    other[1] += 1.0
    changed = layer(other)[0]
    assert torch.equal(changed[0, :13], y[0, :13])
    assert not torch.equal(changed[0, 13:], y[0, 13:]) and not torch.equal(changed[1], y[1])
    (dx,) = torch.autograd.grad(y[0, :13].square().sum(), x)
    assert len(launches) == 2 and (dx[0, 13:] == 0).all() and (dx[1] == 0).all() and (dx[0, :13] != 0).any(-1).all()


@gpu
def test_a_whole_layer_gives_the_same_bits_again_whatever_was_in_its_memory(launches, monkeypatch):
    layer, x = memory("hope", chunk=16, chunk_proj=16, adaptive=("q", "alpha")), torch.randn(1, 32, 10, device=DEVICE)
    got = layer_and_gradients(layer, x)
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, plain=plain, **named: filled(plain(*args, **named)))
    again = layer_and_gradients(layer, x)
    assert len(launches) == 2 and all(torch.equal(z, again[k]) for k, z in got.items())


def filled(z):
    return z.fill_(torch.nan) if z.is_floating_point() else z


@gpu
def test_a_whole_layer_in_one_launch_says_that_it_has_no_second_derivative(launches):
    layer, x = memory("hope", adaptive=("alpha",)), torch.randn(1, 8, 10, device=DEVICE, requires_grad=True)
    for one_launch in (True, False):
        layer.one_launch = one_launch
        (dx,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=not one_launch)
        assert len(launches) == 1
    assert torch.autograd.grad(dx.square().sum(), x)[0].abs().max() > 0
    layer.one_launch = True
    with pytest.raises(RuntimeError, match="no second derivative; set one_launch = False"):
        torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)


@gpu
@pytest.mark.parametrize("inner_grad", ["first-order", "full"])
def test_a_model_with_full_inner_gradients_has_no_layer_in_one_launch(inner_grad, launches):
    small = dict(d_model=16, n_head=1, n_layer=1, vocab_size=11, chunk=4, chunk_proj=4, cms=(hope.INF,), cms_hidden=1)
    model = hope.Hope(hope.HopeConfig.preset("tiny", **small, inner_grad=inner_grad)).to(DEVICE)
    model(torch.arange(4, device=DEVICE)[None])
    assert len(launches) == (inner_grad == "first-order")


@gpu
def test_which_layers_run_in_one_launch():
    x = torch.zeros(1, device=DEVICE)
    fits = lambda name="hope", **change: fused.layer_fits(hope.MemoryConfig.preset(name, **change), x)
    assert [name for name in hope.MemoryConfig.PRESETS if fits(name)] == ["hope"]
    assert fits(d_model=128, n_head=2, expand=2) and fits(chunk=8, chunk_proj=8)
    assert not fits(d_model=130, n_head=2) and not fits(d_model=128, n_head=2, expand=3)
    assert not fits(chunk_proj=8, chunk=16) and not fits(chunk=65, chunk_proj=65) and not fits(value_norm=False)
    assert not fused.layer_fits(hope.MemoryConfig(), x.double())
    with torch.no_grad():
        assert not fits()


@gpu
def test_a_model_generates_the_same_tokens_by_either(monkeypatch):
    """With MLPs that are not written in context: to write them, a prompt is read with gradients, chunk by chunk."""
    small = dict(d_model=16, n_head=1, n_layer=1, vocab_size=11, chunk=8, chunk_proj=8, cms=(hope.INF,), cms_hidden=1)
    model, prompt = hope.Hope(hope.HopeConfig.preset("tiny", **small)).to(DEVICE), torch.arange(9, device=DEVICE)[None]
    got = model.generate(prompt, 3, temperature=0)
    monkeypatch.setenv("HOPE_KERNELS", "reference")
    assert torch.equal(got, model.generate(prompt, 3, temperature=0))


@gpu
@pytest.mark.parametrize("shape", [(5, 7), (33, 20), (2, 70, 90), (1, 1)])
def test_newton_schulz_agrees_with_its_reference(shape, monkeypatch):
    G = torch.randn(*shape, device=DEVICE)
    got = newton_schulz(G, dtype=torch.float32)
    monkeypatch.setenv("HOPE_KERNELS", "reference")
    torch.testing.assert_close(got, newton_schulz(G, dtype=torch.float32), rtol=1e-4, atol=1e-4)


@gpu
@pytest.mark.parametrize("preset, change", [("hope", dict(adaptive=("k", "alpha"))), ("deltanet", {})])
def test_a_layer_has_the_same_gradients_by_either(preset, change, monkeypatch):
    layer = memory(preset, chunk=16, chunk_proj=16, **change)
    layer.one_launch = False
    x = torch.randn(1, 18, 10, device=DEVICE)

    def run():
        layer.zero_grad()
        y, state = layer(x)
        y.square().sum().backward()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        return [y.detach(), *state.main.now, *state.main.anchor, *grads]

    got = run()
    monkeypatch.setenv("HOPE_KERNELS", "reference")
    for a, b in zip(got, run(), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-3)


@gpu
def test_second_derivatives_are_the_reference_s():
    args = {k: v.requires_grad_() for k, v in inputs(4, 5, 7).items()}
    grads = []
    for fn in (dgd_chunk, dgd_loop):
        first = torch.autograd.grad(fn(**args)[2].square().sum(), args["X"], create_graph=True)[0]
        grads.append(torch.autograd.grad(first.square().sum(), args["eta"])[0])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@gpu
@pytest.mark.parametrize("change, why", [(dict(dtype=torch.float64), "float64"), (dict(width=300), "wider than 256")])
def test_what_kernels_cannot_do_falls_back_with_one_warning(change, why):
    backend.fall_back.cache_clear()
    args = {k: v.to(change.get("dtype", torch.float32)) for k, v in inputs(3, i=change.get("width", 4)).items()}
    with pytest.warns(UserWarning, match=why) as caught:
        for _ in range(2):
            torch.testing.assert_close(dgd_chunk(**args)[0], dgd_loop(**args)[0])
    assert len(caught) == 1


@gpu
def test_heads_too_wide_for_one_launch_go_chunk_by_chunk_with_one_warning():
    backend.fall_back.cache_clear()
    with torch.no_grad(), pytest.warns(UserWarning, match="heads of 130 are wider than 128") as caught:
        assert [kernels.scans(torch.zeros(1, device=DEVICE), width) for width in (130, 128, 130)] == [
            False,
            True,
            False,
        ]
    assert len(caught) == 1


@needs_triton
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-rf", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and "failed" not in run.stdout, run.stdout[-6000:]
    assert int(run.stdout.rsplit(" passed", 1)[0].split()[-1]) >= 40, run.stdout[-500:]  # not skipped


def compiled(out: Path, **options: str) -> dict:
    """The tables of tests/bench/gpu.py."""
    command = [sys.executable, str(ROOT / "tests/bench/gpu.py"), "--out", str(out)]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((out / "kernels.json").read_text())


SIZES = set(hope.HopeConfig.SIZES)
KERNELS = {f"chunk_{name}" for name in ("forward", "states", "backward", "backward_tokens", "backward_gates")}
KERNELS |= {"memory_scan", "symmetric fp32", "symmetric bf16"}
LAYER = {"layer_forward", "layer_backward"}


def assert_compiled(rows: list[dict], targets: str, names: set[str]) -> None:
    for target, kernel in itertools.product(targets.split(","), names):
        of = [row for row in rows if (row["target"], row["kernel"]) == (target, kernel)]
        assert {size for row in of for size in row["sizes"]} == SIZES
        assert all(row["registers"] > 0 and row["occupancy"] > 0 for row in of)


@needs_triton
def test_nothing_spills_on_sm_80_and_sm_90_at_any_size(tmp_path):
    """To machine code, by the compiler and tools that Triton brings. One binary serves all sizes: their memories of 32^2
    and 64^2 differ in numbers that kernels are given."""
    tables = compiled(tmp_path, targets="sm_80,sm_90", kernels="chunk,memory,symmetric")
    assert_compiled(tables["occupation"], "sm_80,sm_90", KERNELS)
    assert [row for row in tables["occupation"] if row["spilled"]] == []
    names = KERNELS | LAYER
    assert {(row["kernel"], row["size"]) for row in tables["floors"]} == set(itertools.product(names, SIZES))
    assert all(row["A100 80GB us"] > row["H100 us"] > 0 and row["intensity"] > 0 for row in tables["floors"])


@needs_triton
@pytest.mark.parametrize("target", ["sm_75", "sm_100", "gfx942"])
def test_every_kernel_compiles_for_the_other_targets_too(target, tmp_path):
    """With 8 spilled bytes at most, but for sm_75, where `auto` takes the reference."""
    rows = compiled(tmp_path, targets=target, kernels="chunk,memory,symmetric")["occupation"]
    assert_compiled(rows, target, KERNELS)
    assert target == "sm_75" or max(row["spilled"] for row in rows) <= 8


# It takes minutes to compile the backward pass.
SPILLS = [pytest.param("sm_90", "layer_forward", 3072)]
SPILLS += [pytest.param(target, "layer", most, marks=pytest.mark.slow)
           for target, most in (("sm_90", 3072), ("sm_80", 8192), ("sm_100", 8192), ("gfx942", 8192))]  # fmt: skip


@needs_triton
@pytest.mark.parametrize("target, kernels, most", SPILLS)
def test_a_layer_in_one_launch_spills_little(target, kernels, most, tmp_path):
    """Addresses, of the many places that a chunk's tiles have in memory: on an H100 6% of all instructions move them."""
    rows = compiled(tmp_path, targets=target, kernels=kernels)["occupation"]
    assert_compiled(rows, target, {kernel for kernel in LAYER if kernel.startswith(kernels)})
    assert max(row["spilled"] for row in rows) <= most, rows


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "arch", [a for a, row in hope.HopeConfig.ARCHS.items() if row.get("memory", a) not in ("hope", "attention")]
)
def test_no_other_architecture_spills_either(arch, tmp_path):
    rows = compiled(tmp_path, targets="sm_80,sm_90", arch=arch)["occupation"]
    assert_compiled(rows, "sm_80,sm_90", KERNELS)
    assert [row for row in rows if row["spilled"]] == []


@gpu
def test_kernels_are_faster_than_the_reference_on_a_gpu():
    """In the interpreter only that the benchmark runs."""
    spec = importlib.util.spec_from_file_location("gpu_bench", ROOT / "tests/bench/gpu.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    if DEVICE == "cpu":
        small = {"small": hope.MemoryConfig(d_model=4, n_head=1, chunk=4, chunk_proj=4, adaptive=("k",))}
        fast, plain = bench.timings(small, 1, 5, DEVICE, lambda run: (run(), 1.0)[1])
    else:
        fast, plain = bench.timings({"760m": hope.HopeConfig.preset("760m").memory})
    assert (fast["kernels"], plain["kernels"]) == ("triton", "reference")
    for part in ("forward_ms", "backward_ms", "layer_ms"):
        assert fast[part] < plain[part] or DEVICE == "cpu", (part, fast, plain)


def test_the_environment_picks_the_kernels(monkeypatch):
    x = torch.zeros(1)
    for choice in (None, "auto", "reference"):
        monkeypatch.delenv("HOPE_KERNELS", raising=False) if choice is None else monkeypatch.setenv(
            "HOPE_KERNELS", choice
        )
        assert not kernels.uses_triton(x)
    monkeypatch.setenv("HOPE_KERNELS", "fast")
    with pytest.raises(ValueError, match="HOPE_KERNELS is 'fast'; allowed: auto, reference, triton"):
        kernels.uses_triton(x)


@needs_triton
def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("HOPE_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs a GPU, but tensors are on cpu"):
        dgd_chunk(**{k: v.cpu() for k, v in inputs(2, 3, 4).items()})


def test_without_triton_everything_works():
    code = """
import sys, os
sys.modules["triton"] = None  # as if it were not installed
import torch, hope, kernels
assert kernels.triton is None
y, _ = hope.Memory(hope.MemoryConfig(d_model=8, n_head=2, chunk=4, chunk_proj=4))(torch.randn(1, 6, 8))
y.sum().backward()
os.environ["HOPE_KERNELS"] = "triton"
try:
    kernels.uses_triton(torch.eye(3))
except RuntimeError as error:
    assert "not installed" in str(error)
else:
    raise AssertionError
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
