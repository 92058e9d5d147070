"""That a segment of training can be captured in a CUDA graph, and that graphs of segments make a step; without a GPU."""

import re
from contextlib import nullcontext

import pytest
import torch
from conftest import flat, random_model, small_config, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fused
import graphs
import hope
import kernels
import train

INF = hope.INF


class Capturable(TorchDispatchMode):
    """Fails on what a CUDA graph can't hold: what waits for a number, what draws one, and what leaves the device."""

    FORBIDDEN = {
        torch.Tag.data_dependent_output: "the host reads a number",
        torch.Tag.dynamic_output_shape: "the host reads a shape",
        torch.Tag.nondeterministic_seeded: "random numbers are drawn",
    }

    def __init__(self, device: str):
        super().__init__()
        self.device, self.operations = torch.device(device), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tag, why in self.FORBIDDEN.items():
            assert tag not in func.tags, f"{func}: {why}"
        assert func.overloadpacket is not torch.ops.aten.lift_fresh, f"{func}: the host makes a tensor"
        out = func(*args, **(kwargs or {}))
        devices = {str(z.device) for z in tree_leaves((args, kwargs, out)) if isinstance(z, torch.Tensor)}
        assert devices <= {str(self.device)}, f"{func}: tensors on {devices}"
        self.operations += 1
        return out


@pytest.fixture
def on_meta(monkeypatch):
    """Device "meta" as a GPU: no number can be read there, and tensors that the host makes are on another device.

    (Fake tensors on "cuda" have no backward pass where torch is built without CUDA.) There is no autocast for it.
    """
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    none = lambda kind, *how, **more: nullcontext() if kind == "meta" else autocast(kind, *how, **more)
    monkeypatch.setattr(torch, "autocast", none)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and enabled(*kind))
    # Nor is the state of the random numbers asked for, which no operation shows.
    refuse = lambda *args: pytest.fail("the state of the random numbers is read")
    monkeypatch.setattr(torch, "get_rng_state", refuse)


def observe_segments(config: hope.HopeConfig, n: int, recompute: bool = False) -> list[int]:
    """Three segments of n tokens, the last two of which must be capturable: how many operations these are."""
    with torch.device("meta"):
        model = hope.Hope(config)
        x = torch.zeros(2, n, dtype=torch.long)
    model.recompute = recompute
    state, counts = None, []
    for i in range(3):
        with Capturable("meta") if i else nullcontext() as mode:
            _, state = model.observe(x, x, state, reduction="none", backward=True, truncate=True)
        counts += [mode.operations] if i else []
    return counts


@pytest.mark.parametrize("arch", hope.HopeConfig.ARCHS)
def test_a_segment_can_be_captured(arch, on_meta):
    """Forward pass, backward pass and writes; every second one writes a slow level, too."""
    config = small_config(arch, cms=(8, 16, INF) if "hope" in arch else (INF,), n_layer=2 if arch == "samba" else 1)
    slow, fast = observe_segments(config, 8)
    assert min(slow, fast) > 100 and (slow > fast) == ("hope" in arch)


@pytest.mark.parametrize(
    "fields", [{"learn_rates": False}, {"wiring": "nested"}, {"wiring": "independent"}, {"remat": 1}]
)
def test_a_segment_of_any_cms_can_be_captured(fields, on_meta):
    slow, fast = observe_segments(small_config(cms=(8, 16, INF), n_layer=1, **fields), 8)
    assert slow > fast > 100


def test_a_segment_that_is_recomputed_can_be_captured(on_meta):
    config = small_config(cms=(8, 16, INF), n_layer=1)
    assert observe_segments(config, 8, recompute=True)[1] > 1.2 * observe_segments(config, 8)[1]


class Launches:
    """In the place of a Triton kernel: counts."""

    count = 0

    def __getitem__(self, grid):
        def launch(*args, **settings):
            assert all(z.device.type == "meta" for z in args if isinstance(z, torch.Tensor))
            Launches.count += 1

        return launch


def test_a_segment_with_triton_can_be_captured(on_meta, monkeypatch):
    """What the kernels are given is on the device, from the second segment on; they themselves do not run here."""
    for name in ("forward", "backward", "backward_tokens", "backward_gates"):
        monkeypatch.setattr(kernels, f"_chunk_{name}", Launches())
    for module in (kernels, hope):
        monkeypatch.setattr(module, "chunks_by_triton", lambda z: True)
    observe_segments(small_config(cms=(8, 16, INF), n_layer=1), 8)
    assert Launches.count >= 3 * 2 * 2 * 4  # segments, chunks, layers of a memory, kernels


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("inside", [False, True])
def test_a_segment_of_layers_in_one_launch_can_be_captured(keep, inside, on_meta, monkeypatch):
    """As operations of PyTorch's, and with what these do before and after a launch."""
    if inside and kernels.triton is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(fused, "layers_by_triton", lambda z: True)
    calls = []
    for name, python in (("layer_forward", fused._forward_chunks), ("layer_backward", fused._backward_chunks)):
        run = python if inside else getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *args, run=run, name=name: calls.append(name) or run(*args))
    for name in ("_layer_forward", "_layer_backward_chunks"):
        monkeypatch.setattr(fused, name, Launches())
    monkeypatch.setattr(Launches, "count", 0)
    config = small_config(cms=(8, 16, INF), n_layer=1, chunk=4, chunk_proj=4, remat=0 if keep else 1)
    slow, fast = observe_segments(config, 8)
    assert slow > fast > 100
    assert calls == 3 * (["layer_forward"] * (1 if keep else 2) + ["layer_backward"])  # of three segments
    assert Launches.count == inside * len(calls)


@pytest.mark.parametrize(
    "offence",
    [lambda z: z.sum().item(), lambda z: z.nonzero(), torch.randn_like, lambda z: z + torch.ones(3, device="cpu"),
     lambda z: z * torch.tensor(2.0), lambda z: z[torch.tensor([0, 1])], lambda z: z.copy_(torch.ones(3, device="cpu"))],
)  # fmt: skip
def test_what_cannot_be_captured_is_found(offence):
    z = torch.ones(3, device="meta")
    with pytest.raises(AssertionError, match="the host|random|tensors on"), Capturable("meta"):
        offence(z)


class Tape(TorchDispatchMode):
    """PyTorch's operations as they ran, to run again on the same tensors: on a CPU what a CUDA graph is on a GPU.

    Python, which gave the operations, is not asked again. A tensor is known by its place in a storage, since autograd
    makes new ones of it.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    @staticmethod
    def record(act):
        tape = Tape()
        with tape:
            act()
        return tape.replay

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        storages = {}  # of what was made then, and is made now

        def now(z: torch.Tensor) -> torch.Tensor:
            storage = storages.get(z.untyped_storage()._cdata)
            if storage is None:  # it was there before
                return z
            return torch.empty(0, dtype=z.dtype).set_(storage, z.storage_offset(), z.shape, z.stride())

        for func, args, kwargs, out in self.calls:
            args, kwargs = tree_map_only(torch.Tensor, now, (args, kwargs))
            pairs = zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)))
            for then, again in ((a, b) for a, b in pairs if isinstance(a, torch.Tensor)):
                storages.setdefault(then.untyped_storage()._cdata, again.untyped_storage())


def steps(model: hope.Hope, length: int, find, n: int = 3) -> list[torch.Tensor]:
    """Losses, gradients and weights of n steps with new tokens and, after each, other weights."""
    found = []
    for i in range(n):
        x, y = tokens(2, length, seed=2 * i), tokens(2, length, seed=2 * i + 1)
        y[0, : 5 * i] = -100
        found += [find(x, y)]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * (0 if p.grad is None else p.grad / length)
    return found + [p.detach().clone() for p in model.parameters()]


def both_ways(config: hope.HopeConfig, length: int) -> tuple[graphs.Captured, list, list, hope.HopeState]:
    """A model's steps by records of its segments and by `observe`, and the state after the last one."""
    plain, model = (random_model(config) for _ in range(2))
    state = None

    def find(x, y):
        nonlocal state
        for p in plain.parameters():
            p.grad = None
        losses, state = plain.observe(x, y, reduction="none", backward=True, truncate=True)
        return losses.sum()

    captured = graphs.Captured(model, 2, length, nullcontext, Tape.record)

    def find_captured(x, y):
        captured.zero_gradients()
        return captured(x, y).clone()

    return captured, steps(model, length, find_captured), steps(plain, length, find), state


@pytest.mark.parametrize(
    "settings, length, kinds",
    [
        (dict(cms=(16, 64, INF), chunk=8, chunk_proj=16), 160, 2),  # the last 32 tokens end no slow chunk
        (dict(cms=(16, 64, INF), chunk=8, chunk_proj=16), 72, 3),  # the last 8 end none at all
        (dict(cms=(4, 6), chunk=3, chunk_proj=4), 32, 4),  # clocks and chunks that do not divide each other
        (dict(cms=(8, 16, INF), wiring="nested", learn_rates=False), 40, 2),
        (dict(cms=(8, 16), wiring="independent", remat=1), 40, 2),
        (dict(cms=(64, INF)), 24, 1),  # a clock longer than the row
        (dict(arch="titans", cms=(8,), momentum=True), 24, 1),
        (dict(arch="gated-deltanet", cms=(INF,)), 24, 1),
        (dict(arch="retnet", cms=(INF,)), 24, 1),
        (dict(arch="transformer++", cms=(INF,)), 24, 1),
        (dict(arch="hope-attention", cms=(32, INF)), 24, 1),
    ],
)
def test_steps_by_records_of_segments_are_those_of_observe(settings, length, kinds, monkeypatch):
    """In float64: losses, gradients, weights and states, over steps whose tokens and weights differ; tokens are embedded
    in pieces."""
    monkeypatch.setattr(graphs, "EMBEDDED_AT_ONCE", 7)
    captured, found, expected, state = both_ways(small_config(**settings), length)
    assert len(captured.records) == kinds and (kinds < len(captured.lengths) or kinds == 1)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if len(captured.lengths) > 1:
        values = lambda state: flat([state.memories, [[fast and fast.delta for fast in block] for block in state.cms]])
        for a, b in zip(values(captured.state), values(state), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings, why",
    [
        (dict(arch="hope-attention"), "attention sees more keys"),
        (dict(arch="retnet", cms=(8, INF)), "positions differ"),
        (dict(n_position=32), "positions differ"),
    ],
)
def test_segments_that_differ_in_more_than_their_clocks_are_refused(settings, why):
    config = small_config(**settings)
    with pytest.raises(ValueError, match=f"{why}.*; leave out --capture, or give clocks"):
        graphs.Captured(hope.Hope(config), 2, 24, nullcontext)
    assert graphs.segments(config, 6) == [6]


def test_a_run_that_cannot_be_captured_says_why(tmp_path, capsys):
    (tmp_path / "text").write_text("a few words " * 400)
    where = ["--data", str(tmp_path / "text"), "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    for flags, why in (
        ([], "capture takes one segment at a time, and so does truncate; give --truncate as well"),
        (["--truncate", "--compile"], "does not go with compile"),
        (["--truncate", "--optimizer", "dgd"], "does not go with optimizer dgd"),
        (["--truncate", "--device", "cpu", "--steps", "1", "--seq-len", "64"], "this run is on cpu; leave it out"),
    ):
        assert train.main(["--capture", *flags, *where]) == 2
        assert why in capsys.readouterr().err


def test_the_plan_of_a_captured_step_gives_graphs_and_the_same_work(capsys):
    launches = {}
    for flags in ([], ["--capture"]):
        assert train.main(["--plan", "--truncate", "--seq-len", "128", "--cms", "64,128,inf", *flags]) == 0
        out = capsys.readouterr().out
        launches[len(flags)] = re.search(r"^  launches .* s  ([\d,]+) of", out, re.M)[1]
        assert ("in graphs of 2 segments" in out) == bool(flags)
        launches[len(flags), "work"] = re.search(r"^  work +(\S+) s", out, re.M)[1]
    assert (
        launches[1] == "7" and int(launches[0].replace(",", "")) > 1000 and launches[0, "work"] == launches[1, "work"]
    )
