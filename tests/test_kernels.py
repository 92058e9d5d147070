"""`dgd_chunk` is its token loop: values and gradients, at every legal gate, on repeated keys and ragged tails."""

import itertools
import os

import pytest
import torch

from kernels import dgd_chunk, dgd_loop, newton_schulz, using


def inputs(c, o=5, i=4, momentum=True, lead=(3,), dtype=torch.float64, gate=None, repeated=False):
    """Random arguments of dgd_chunk; `gate` fixes alpha and theta to a number or "mixed" (0, 1 and random)."""
    rand = lambda *shape: torch.randn(*lead, *shape, dtype=dtype)

    def gates():
        g = torch.rand(*lead, c, dtype=dtype)
        if gate == "mixed":
            choice = torch.randint(3, g.shape)
            return torch.where(choice == 0, 0.0, torch.where(choice == 1, 1.0, g))
        return g if gate is None else torch.full_like(g, gate)

    X = torch.nn.functional.normalize(rand(c, i), dim=-1)
    if repeated:
        X = X[..., :1, :].expand_as(X).clone()
    args = dict(M=rand(o, i), X=X, D=rand(c, o), eta=torch.rand(*lead, c, dtype=dtype), alpha=gates(), Q=rand(c, i))
    if momentum:
        args |= dict(m=rand(o, i), theta=gates())
    return {k: v.requires_grad_() for k, v in args.items()}


def outputs_and_gradients(fn, args, **flags):
    out = [z for z in fn(**args, **flags) if z is not None]
    g = torch.Generator().manual_seed(1)
    loss = sum((z * torch.randn(z.shape, generator=g, dtype=z.dtype)).sum() for z in out)
    return out + list(torch.autograd.grad(loss, list(args.values())))


def assert_equal(args, **flags):
    for a, b in zip(outputs_and_gradients(dgd_chunk, args, **flags), outputs_and_gradients(dgd_loop, args, **flags)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("momentum, delta, inclusive", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("c", [1, 2, 7, 16])
def test_chunk_equals_token_loop(c, momentum, delta, inclusive):
    assert_equal(inputs(c, momentum=momentum), delta=delta, inclusive=inclusive)


@pytest.mark.parametrize("gate", [0.0, 1.0, "mixed"])
@pytest.mark.parametrize("momentum", [False, True])
def test_gates_of_exactly_zero_and_one(gate, momentum):
    assert_equal(inputs(6, momentum=momentum, gate=gate))


def test_repeated_keys():
    assert_equal(inputs(16, repeated=True))


def test_repeated_keys_in_float32_keep_their_accuracy():
    """A solve by repeated squaring loses everything here: powers of the matrix grow like binomials."""
    exact = inputs(64, i=16, repeated=True, gate=1.0, momentum=False)
    with torch.no_grad():
        exact["eta"].fill_(0.9)
        want, _, reads = dgd_chunk(**exact)
        got, _, reads32 = dgd_chunk(**{k: v.float() for k, v in exact.items()})
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reads32.double(), reads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("momentum", [False, True])
def test_a_ragged_tail_continues_the_chunk(momentum):
    args = inputs(11, momentum=momentum)
    whole_M, whole_m, whole_R = dgd_chunk(**args)
    M, m, reads = args.pop("M"), args.pop("m", None), []
    for part in (slice(0, 5), slice(5, 6), slice(6, 11)):
        sliced = {k: v[..., part] if k in ("eta", "alpha", "theta") else v[..., part, :] for k, v in args.items()}
        M, m, R = dgd_chunk(M, m=m, **sliced)
        reads.append(R)
    torch.testing.assert_close(M, whole_M)
    torch.testing.assert_close(torch.cat(reads, -2), whole_R)
    if momentum:
        torch.testing.assert_close(m, whole_m)


def test_leading_dimensions_broadcast():
    args = inputs(5, lead=(2, 1))
    args["M"], args["D"] = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 3, 5, 5).double()
    args.pop("m")
    together = dgd_chunk(**args)[0]
    for n in range(3):
        alone = {k: v[:, n] if k in ("M", "D") else v[:, 0] for k, v in args.items()}
        torch.testing.assert_close(together[:, n], dgd_chunk(**alone)[0])


@pytest.mark.parametrize("readers", [None, 2])
@pytest.mark.parametrize("momentum", [False, True])
def test_memories_that_share_their_inputs_are_as_good_as_each_with_its_own(momentum, readers):
    """One that has the rows of all computes them, unless inputs, steps or gates are a memory's own."""
    shared, own = inputs(5, lead=(2, 1), momentum=momentum), inputs(5, lead=(2, 3), momentum=momentum)
    few = {k: (own if k in ("M", "m", "D") else shared)[k] for k in shared}
    whole = {k: v.expand(2, 3, *v.shape[2:]).detach().clone().requires_grad_() for k, v in few.items()}
    for name in ("X", "alpha", None):  # of which each has its own, though they are alike
        args = few if name is None else {**few, name: whole[name]}
        known = lambda **args: dgd_chunk(**args, MX=args["X"] @ args["M"].mT)
        want = outputs_and_gradients(dgd_loop, args, readers=readers)
        for got in (outputs_and_gradients(fn, args, readers=readers) for fn in (dgd_chunk, known)):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("inclusive", [False, True])
def test_one_token_without_gradients_is_what_it_is_with_them(momentum, inclusive):
    args = inputs(1, lead=(2, 3), momentum=momentum)
    args["Q"] = args["Q"][:, 1:]
    flags = dict(inclusive=inclusive, readers=2, ema=True)
    with torch.no_grad():
        alone = dgd_chunk(**args, **flags)
    for a, b in zip(alone, dgd_chunk(**args, **flags), strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_half_precision_is_computed_in_float32():
    args = {k: v.detach().float() for k, v in inputs(8).items()}
    half = {k: v.bfloat16() for k, v in args.items()}
    M, m, R = dgd_chunk(**half)
    want = dgd_chunk(**{k: v.float() for k, v in half.items()})
    assert M.dtype == m.dtype == R.dtype == torch.float32
    for got, ref in zip((M, m, R), want):
        torch.testing.assert_close(got, ref)


@pytest.mark.parametrize("states", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floating_types_mix_in_the_widest_of_them_and_gradients_keep_their_own(states, tokens):
    args = {k: v.detach().to(states if k in "Mm" else tokens).requires_grad_() for k, v in inputs(6).items()}
    got, want = dgd_chunk(**args), dgd_loop(**{k: v.double() for k, v in args.items()})
    widest = torch.promote_types(torch.promote_types(states, tokens), torch.float32)
    for z, ref in zip(got, want):
        assert z.dtype == widest
        torch.testing.assert_close(z.double(), ref, rtol=1e-5, atol=1e-5)
    sum(z.sum() for z in got).backward()
    assert all(z.grad.dtype == z.dtype for z in args.values())


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("lead, c, o, i", [((2,), 0, 5, 4), ((0,), 3, 5, 4), ((2,), 3, 0, 4), ((2,), 3, 5, 0)])
def test_sizes_of_zero(lead, c, o, i, momentum):
    args = inputs(c, o, i, momentum, lead)
    M, m, R = dgd_chunk(**args)
    want = dgd_loop(**args)
    assert torch.equal(M, want[0]) and R.shape == (*lead, c, o) and (m is None or torch.equal(m, want[1]))
    sum(z.sum() for z in (M, m, R) if z is not None).backward()
    assert all(z.grad is None or z.grad.isfinite().all() for z in args.values())
    for shape in ((*lead, o, i), (0, 3), (2, 3, 0)):
        assert newton_schulz(torch.ones(shape)).shape == shape


def test_what_does_not_fit_is_refused():
    args = inputs(4, momentum=False)
    with pytest.raises(ValueError, match=r"alpha is \(3, 3\); it needs to end in \(4,\)"):
        dgd_chunk(**{**args, "alpha": args["alpha"][..., :3]})
    with pytest.raises(ValueError, match=r"D is \(3, 4, 3\); it needs to end in \(4, 5\)"):
        dgd_chunk(**{**args, "D": args["D"][..., :3]})
    with pytest.raises(ValueError, match="m was given without theta"):
        dgd_chunk(**args, m=args["M"])
    with pytest.raises(ValueError, match=r"Q is \(3, 4, 3\); it needs to end in \(4, 4\)"):
        dgd_chunk(**{**args, "Q": args["Q"][..., :3]})
    with pytest.raises(ValueError, match=r"X is torch.int64; .* X.float\(\)"):
        dgd_chunk(**{**args, "X": args["X"].long()})
    with pytest.raises(ValueError, match=r"G is torch.int64; .* G.float\(\)"):
        newton_schulz(torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("momentum", [False, True])
def test_only_the_last_memories_may_be_read(momentum):
    args = inputs(5, lead=(2, 3), momentum=momentum)
    everything = outputs_and_gradients(dgd_chunk, args)
    some = {**args, "Q": args["Q"][:, 1:], "MX": args["X"] @ args["M"].mT}
    got = dgd_chunk(**some, readers=2)
    for a, b in zip(got, (*dgd_chunk(**args)[:2], everything[2 if momentum else 1][:, 1:])):
        assert a is b is None or torch.allclose(a, b, rtol=1e-10, atol=1e-11)
    grads = [
        torch.autograd.grad(out[2][:, -2:].sum(), [args[k] for k in ("M", "D", "eta")])
        for out in (got, dgd_loop(**args))
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("momentum", [False, True])
def test_second_derivatives_equal_those_of_the_token_loop(momentum):
    args, grads = inputs(4, momentum=momentum), []
    for fn in (dgd_chunk, dgd_loop):
        first = torch.autograd.grad(fn(**args)[2].square().sum(), list(args.values()), create_graph=True)
        grads.append(torch.autograd.grad(sum(z.square().sum() for z in first), list(args.values())))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("before", [None, "auto"])
def test_a_choice_of_kernels_lasts_as_long_as_its_block(monkeypatch, before):
    if before is None:
        monkeypatch.delenv("HOPE_KERNELS", raising=False)
    else:
        monkeypatch.setenv("HOPE_KERNELS", before)
    with pytest.raises(KeyError), using("reference"):
        assert os.environ["HOPE_KERNELS"] == "reference"
        raise KeyError
    assert os.environ.get("HOPE_KERNELS") == before
    with pytest.raises(ValueError, match="'fast'.*auto, reference, triton"), using("fast"):
        pass
