"""The model's four properties (gradients through every write, no leak, any split, nothing shared), its writes, its levels."""

import json
import math
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from conftest import assert_any_split_agrees, assert_states_equal, cut, flat, random_model, small_config, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import hope
import train

INF = hope.INF


@st.composite
def configs(draw):
    """Small models of every kind: sizes, chunk sizes, CMS chunk sizes, reads, momentum."""
    segment = draw(st.integers(1, 5))
    wiring = draw(st.sampled_from(["sequential", "nested", "independent"]))
    cms = [(INF,), (segment, INF), (segment, 2 * segment, INF), (segment, segment + 2), (2, 3, 6, INF)]
    heads = draw(st.integers(1, 2))
    return small_config(
        draw(st.sampled_from(["hope", "hope", "hope-attention", "titans", "gated-deltanet"])), wiring=wiring,
        pattern=draw(st.sampled_from([("memory",), ("memory", "attention")])), window=draw(st.sampled_from([0, 3])),
        d_model=heads * draw(st.sampled_from([2, 4])), n_head=heads, n_layer=draw(st.integers(1, 2)), cms=draw(st.sampled_from(cms)),
        chunk=draw(st.integers(1, 5)), chunk_proj=draw(st.integers(1, 5)), conv=draw(st.sampled_from([0, 3])),
        momentum=draw(st.booleans()), read=draw(st.sampled_from(["token", "chunk"])), mlp=draw(st.sampled_from(["silu", "swiglu"])),
    )  # fmt: skip


cases = settings(max_examples=20, deadline=None)
lengths = st.integers(1, 13)


@cases
@given(config=configs(), t=lengths, cuts=st.lists(st.integers(0, 13), max_size=3))
def test_any_split_of_a_stream_gives_the_same_result(config, t, cuts):
    model, x, y = random_model(config), tokens(2, t), tokens(2, t, seed=1)
    cuts = [min(c, t) for c in cuts]
    with torch.no_grad():
        assert_any_split_agrees(model, cuts, x)
    assert_any_split_agrees(lambda x, y, state: model.observe(x, y, state, reduction="none"), cuts, x, y)
    assert_any_split_agrees(lambda x, state: model.observe(x, None, state, reduction="none"), cuts, x)


@cases
@given(config=configs(), t=st.integers(2, 13), data=st.data())
def test_future_tokens_do_not_leak(config, t, data):
    model, x, y = random_model(config), tokens(1, t), tokens(1, t, seed=1)
    at = data.draw(st.integers(1, t - 1))
    changed = x.clone()
    changed[:, at] = (x[:, at] + 1) % 11
    with torch.no_grad():
        before, after = model(x)[0], model(changed)[0]
    torch.testing.assert_close(after[:, :at], before[:, :at], rtol=0, atol=1e-12)
    assert (after[:, at] - before[:, at]).abs().max() > 1e-9
    # A target is what the CMS learns from: it must not move the losses before it either.
    other = y.clone()
    other[:, at] = (y[:, at] + 1) % 11
    before, after = (model.observe(a, b, reduction="none")[0] for a, b in ((x, y), (changed, other)))
    torch.testing.assert_close(after[:, :at], before[:, :at], rtol=0, atol=1e-12)


@cases
@given(config=configs(), t=lengths)
def test_sequences_of_a_batch_share_nothing(config, t):
    model, x, y = random_model(config), tokens(3, t), tokens(3, t, seed=1)
    with torch.no_grad():
        together = model(x)[0]
        scored = model.observe(x, y, reduction="none")[0]
        for b in range(3):
            torch.testing.assert_close(together[b : b + 1], model(x[b : b + 1])[0], rtol=1e-8, atol=1e-10)
            alone = model.observe(x[b : b + 1], y[b : b + 1], reduction="none")[0]
            torch.testing.assert_close(scored[b : b + 1], alone, rtol=1e-8, atol=1e-10)


@cases
@given(config=configs(), cuts=st.lists(st.integers(1, 14), max_size=2))
def test_gradients_reach_every_start_state_and_pass_through_every_write(config, cuts):
    # Read "chunk" sees finished chunks only, and a window ends, so there some writes reach nothing yet or any more.
    model, x = random_model(replace(config, memory=replace(config.memory, read="token", window=0))), tokens(1, 15)
    seen = {}

    def keep(module, args, out):
        out.retain_grad()
        seen.setdefault("x", []).append(out)

    model.embed.register_forward_hook(keep)
    state, logits = None, None
    for part in cut(x, set(cuts)):
        logits, state = model(part, state)
    logits[:, -1].square().sum().backward()
    # The last output depends on every token: on those beyond the convolution only through what was written.
    for x in seen["x"]:
        assert (x.grad.abs().sum(-1) > 0).all()
    for name, p in model.named_parameters():
        if "memory" in name:
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def directional(fn, parameters, seed=0, eps=1e-6):
    """(derivative by central differences, derivative by backpropagation) of fn along a random direction."""
    g = torch.Generator().manual_seed(seed)
    along = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]
    exact = sum(
        (d * a).sum() for d, a in zip(torch.autograd.grad(fn(), parameters, allow_unused=True), along) if d is not None
    )
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, a in zip(parameters, along):
                p += sign * eps * a
        values.append(fn().detach())
        with torch.no_grad():
            for p, a in zip(parameters, along):
                p -= sign * eps * a
    return ((values[0] - values[1]) / (2 * eps)).item(), exact.item()


def test_outer_gradient_through_three_chunks_equals_finite_differences():
    model, x, y = random_model(small_config(chunk=4, chunk_proj=4)), tokens(2, 12), tokens(2, 12, seed=1)
    loss = lambda: hope.token_loss(model(x)[0], y).mean()
    starts = {n: p for n, p in model.named_parameters() if ".start." in n}
    assert len(starts) == 12
    for name, p in starts.items():
        measured, exact = directional(loss, [p])
        assert measured == pytest.approx(exact, rel=1e-5, abs=1e-9), name
    measured, exact = directional(loss, list(model.parameters()))
    assert measured == pytest.approx(exact, rel=1e-6)


def test_full_inner_gradients_equal_finite_differences_and_first_order_ones_do_not():
    x, y = tokens(2, 12), tokens(2, 12, seed=1)
    errors = {}
    for kind in ("full", "first-order"):
        model = random_model(small_config(cms=(3, 6, INF), inner_grad=kind))
        measured, exact = directional(lambda: model.observe(x, y)[0], list(model.parameters()))
        errors[kind] = abs(measured - exact) / abs(measured)
    assert errors["full"] < 1e-6 < errors["first-order"]


def test_cms_writes_are_equation_71_replayed_by_hand():
    """Two levels: each moves only at multiples of its C, by the sum of its chunk's gradients over C."""
    config = small_config(n_layer=1, cms=(3, 6, INF), cms_rate=(0.7,))
    model, x, y = random_model(config), tokens(1, 15), tokens(1, 15, seed=1)
    losses, end = model.observe(x, y, reduction="none")
    levels = model.blocks[0].cms.levels
    rates = [r.detach() for r in model.blocks[0].cms.rates()]
    start = [[w.detach().clone() for w in (l.w_in.weight, l.w_out.weight)] for l in levels]
    sums = [[torch.zeros_like(w) for w in pair] for pair in start]
    memories = model.init_state(1).memories
    for s in range(0, 15, 3):
        logits, memories = model._run(x[:, s : s + 3], memories, [[None] * 3])
        loss = hope.token_loss(logits, y[:, s : s + 3])
        torch.testing.assert_close(loss, losses[:, s : s + 3])
        weights = [w for l in levels[:2] for w in (l.w_in.weight, l.w_out.weight)]
        grads = torch.autograd.grad(loss.sum(), weights)
        memories = hope.map_state(torch.Tensor.detach, memories)
        for i, chunk in enumerate((3, 6)):
            sums[i] = [a + g for a, g in zip(sums[i], grads[2 * i : 2 * i + 2])]
            if (s + 3) % chunk == 0:
                with torch.no_grad():
                    for w, a in zip((levels[i].w_in.weight, levels[i].w_out.weight), sums[i]):
                        w -= rates[i] / chunk * a
                sums[i] = [torch.zeros_like(a) for a in sums[i]]
    for level, before, fast in zip(levels, start, end.cms[0]):
        moved = [w - w0 for w, w0 in zip((level.w_in.weight, level.w_out.weight), before)]
        for change, delta in zip(moved, [d[0] for d in fast.delta] if fast else [torch.zeros_like(w) for w in moved]):
            torch.testing.assert_close(change, delta)
    assert end.cms[0][1].total[0].abs().sum() > 0  # the slower level's open chunk is kept
    assert end.cms[0][0].total[0].abs().sum() == 0


def test_inner_step_sizes_learn():
    model, x, y = random_model(small_config()), tokens(2, 12), tokens(2, 12, seed=1)
    model.observe(x, y, backward=True)
    assert model.blocks[0].cms.raw_rates.grad[0].abs() > 0
    fixed = random_model(small_config(learn_rates=False, cms_rate=(0.5, 0.25)))
    assert fixed.blocks[0].cms.raw_rates is None and [float(r) for r in fixed.blocks[0].cms.rates()] == [0.5, 0.25]


@pytest.mark.parametrize("learn", [False, True])
def test_the_rates_a_cms_starts_with_are_what_its_config_says(learn):
    cms = hope.Hope(small_config(cms_rate=(0.5, 0.25), learn_rates=learn)).blocks[0].cms
    assert [float(r) for r in cms.rates()] == [0.5, 0.25]
    if learn:  # and they grow at most twofold
        torch.nn.init.constant_(cms.raw_rates, 100)
        assert [float(r) for r in cms.rates()] == [1.0, 0.5]


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_fresh_model_starts_with(tied):
    model = hope.Hope(small_config(d_model=256, cms_hidden=2.0, n_layer=8, vocab_size=500, tied=tied, mlp_bias=True))
    block, small = model.blocks[3], (2 * 8) ** -0.5  # what 8 blocks add twice grows as one sum does
    for weight, size in (
        (block.memory.to_q.weight, 256**-0.5), (block.memory.to_u.weight, 256**-0.5), (block.cms.levels[0].w_in.weight, 256**-0.5),
        (block.memory.to_y.weight, small * 256**-0.5), (block.cms.levels[1].w_out.weight, small * 512**-0.5),
        (model.embed.weight, 256**-0.5 if tied else 1.0),
    ):  # fmt: skip
        assert weight.std().item() == pytest.approx(size, rel=0.03)
    assert not block.cms.levels[0].w_in.bias.any() and (tied or not model.head.weight.any())


def test_forward_after_observe_keeps_the_open_segment():
    """Reading between two observations banks the gradient of what was observed; nothing is dropped."""
    model, x, y = random_model(small_config(cms=(4, INF))), tokens(1, 4), tokens(1, 4, seed=1)
    _, state = model.observe(x[:, :2], y[:, :2])
    _, state = model(tokens(1, 3, seed=2), state)
    assert state.cms[0][0].total[0].abs().sum() > 0 and state.segment is None
    _, state = model.observe(x[:, 2:], y[:, 2:], state)
    assert state.cms[0][0].delta[0].abs().sum() > 0 and state.observed == 4


def test_fast_weights_are_made_once_for_each_write(monkeypatch):
    """W + delta stands until delta moves, in the precision it is multiplied in, and never outlives a change of W."""
    made = []
    weights = hope.FastMLP.weights

    def counted(fast, matrices, dtype):
        made.append(fast.at_rest is None)
        return weights(fast, matrices, dtype)

    monkeypatch.setattr(hope.FastMLP, "weights", counted)
    model, x = random_model(small_config(n_layer=1, cms=(3, 6, INF))).float(), tokens(2, 12)
    for how in (dict(backward=True, truncate=True), dict(backward=True), {}):
        made.clear()
        _, state = model.observe(x, x, **how)
        assert made == [True, True, True, False, True, True, True, False]  # both levels, four segments
    with torch.autocast("cpu", torch.bfloat16):
        model.observe(x, x, backward=True, truncate=True)
    made.clear()
    for _ in zip(range(4), model.stream(x[:, :4], memorize=False)):
        pass
    assert sum(made) == 4  # by the prompt: twice the fast level, once the slow one, and what is read from there on once
    before = model(x, state)[0]
    with torch.no_grad():
        model.blocks[0].cms.levels[0].w_in.weight.mul_(2)
    after = model(x, state)[0]
    fresh = hope.map_state(torch.clone, state)
    assert not torch.equal(before, after) and torch.equal(after, model(x, fresh)[0])


def test_the_choice_of_levels_holds_however_the_stream_goes_on():
    """What was chosen when a segment was observed is what learns from it, whatever comes before its chunk ends."""
    model, x, y = random_model(small_config()), tokens(2, 5), tokens(2, 5, seed=1)

    def learnt(**chosen):
        _, begun = model.observe(x[:, :4], y[:, :4], **chosen)
        read, anew = model(x[:, 4:], begun)[1], model.restart(begun)
        _, otherwise = model.observe(x[:, 4:], y[:, 4:], begun, levels=[])
        for state in (read, anew, otherwise):
            assert_states_equal([f and f.total for f in state.cms[1]], [f and f.total for f in read.cms[1]])
        return [f.total[0] for f in read.cms[1] if f]

    fast, slow = learnt()
    assert fast.any() and torch.equal(slow, learnt(levels=[1])[1]) and torch.equal(fast, learnt(levels=(0,))[0])
    assert not any(
        z.any() for z in [learnt(levels=[1])[0], learnt(levels=[0])[1], *learnt(levels=[]), *learnt(surprise=9.0)]
    )


def test_ignored_targets_teach_nothing():
    model, x = random_model(small_config()), tokens(2, 6)
    loss, state = model.observe(x, torch.full_like(x, -100))
    assert loss == 0 and all(f.delta[0].abs().sum() == 0 for layer in state.cms for f in layer if f)


def test_observe_with_gradients_equals_observe_without():
    model, x, y = random_model(small_config()), tokens(2, 20), tokens(2, 20, seed=1)
    loss, state = model.observe(x, y)
    with torch.no_grad():
        same, frozen = model.observe(x, y)
    torch.testing.assert_close(loss.detach(), same)
    assert_states_equal(state.detach(), frozen)
    loss.backward()
    by_hand = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.observe(x, y, backward=True)
    for p, g in zip(model.parameters(), by_hand):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize(
    "arch", ["hope", "titans", *(pytest.param(a, marks=pytest.mark.slow) for a in ("ttt", "dla", "gated-deltanet"))]
)
def test_training_at_a_high_rate_stays_finite_and_bounded(arch):
    torch.manual_seed(0)
    cms = (32, 64, INF) if arch == "hope" else (INF,)
    config = small_config(arch, vocab_size=32, d_model=32, n_head=2, cms=cms, chunk=16, chunk_proj=16)
    model = hope.Hope(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(200):
        jumps = torch.randint(0, 32, (4, 129), generator=g) * (torch.rand(4, 129, generator=g) < 0.1)
        x = (1 + jumps).cumsum(1) % 32  # counts, and jumps now and then
        loss, state = model.observe(x[:, :-1], x[:, 1:], backward=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert max(z.abs().max() for z in flat(state.memories)) < 20


def gradient_norm(arch: str, t: int) -> float:
    """Of the mean loss over t bytes of text, for a fresh tiny model whose head is not 0."""
    torch.manual_seed(0)
    model = hope.Hope(hope.HopeConfig.preset("tiny", arch))
    torch.nn.init.normal_(model.head.weight, std=128**-0.5)
    text = torch.tensor(list("".join(topics[name] for name in sorted(topics)).encode()[: t + 1]))[None]
    model.observe(text[:, :-1], text[:, 1:], backward=True)
    return sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt().item()


@pytest.mark.parametrize("t", [2048, pytest.param(8192, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", list(hope.HopeConfig.ARCHS))
def test_gradients_do_not_grow_with_the_stream(arch, t):
    assert gradient_norm(arch, t) < 2 * gradient_norm(arch, 256)


@pytest.mark.parametrize(
    "arch, norm", [*((arch, "rms") for arch in hope.HopeConfig.ARCHS), ("hope", "layer"), ("transformer++", "layer")]
)
def test_tokens_that_are_zero_have_gradients_as_others_have(arch, norm):
    """Where they begin a stream they are 0 in every block: the gains of all norms near 0 do not multiply, to infinity."""
    torch.manual_seed(0)
    model, x = hope.Hope(small_config(arch, d_model=32, n_layer=8, norm=norm)), tokens(2, 17)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    x[:, :8] = 0
    for size in (1e-6, 0.0):
        with torch.no_grad():
            model.embed.weight[0] *= size
        model.zero_grad()
        model.observe(x[:, :-1], x[:, 1:], backward=True)
        assert sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None) < 1e4**2
        assert model.embed.weight.grad[0].any()


@pytest.mark.parametrize("arch", ["hope", "hope-attention", "transformer++"])
def test_generate_continues_what_the_model_predicts(arch):
    model, prompt = random_model(small_config(arch)), tokens(2, 9)
    new = model.generate(prompt, 5, temperature=0)
    assert new.shape == (2, 5)
    _, state = model.observe(prompt)
    stream = torch.cat([state.pending, new], 1)
    logits, _ = model(stream[:, :-1], replace(state, pending=None))
    assert torch.equal(logits.argmax(-1), new)
    torch.manual_seed(3)
    a = model.generate(prompt, 5, temperature=1.0, top_k=3, top_p=0.9)
    torch.manual_seed(3)
    assert torch.equal(a, model.generate(prompt, 5, temperature=1.0, top_k=3, top_p=0.9))
    assert torch.equal(model.generate(prompt, 5, top_k=1), new)


def test_sampling_keeps_to_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, 4)
    count = lambda **k: torch.bincount(
        hope.sample(logits, **{**dict(temperature=1.0, top_k=None, top_p=None), **k})[:, 0], minlength=4
    )
    assert (count() > 0).all()
    assert count(top_k=2)[2:].sum() == 0 and count(top_k=2)[1] > 0
    assert count(top_p=0.75)[2:].sum() == 0 and count(top_p=0.75)[1] > 0
    assert count(top_p=0.4)[0] == 4000


@pytest.mark.parametrize("arch", ["hope", "hope-attention"])
def test_a_copy_of_a_model_answers_the_same_and_is_its_own(arch):
    model = random_model(small_config(arch))
    copy = deepcopy(model)
    x = tokens(1, 9)
    torch.testing.assert_close(copy(x)[0], model(x)[0], rtol=0, atol=0)
    with torch.no_grad():
        copy.embed.weight += 1
    assert not torch.equal(copy(x)[0], model(x)[0])


def test_misuse_is_refused_with_the_fix():
    model = random_model(small_config())
    with pytest.raises(ValueError, match="integers"):
        model(torch.randn(2, 3))
    with pytest.raises(ValueError, match="continue with observe"):
        model(tokens(1, 3), model.observe(tokens(1, 3))[1])
    with pytest.raises(ValueError, match="go on without targets"):
        model.observe(tokens(1, 3), tokens(1, 3), model.observe(tokens(1, 3))[1])
    with pytest.raises(ValueError, match="allowed: mean, none"):
        model.observe(tokens(1, 3), reduction="sum")
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate(tokens(1, 0), 3)
    with pytest.raises(ValueError, match="top_k >= 1"):
        model.generate(tokens(1, 2), 3, top_k=0)
    for fields, message in (
        (dict(cms_hidden=0), "cms_hidden is 0; it must be above 0"),
        (dict(cms_hidden=0.01), "give at least 1 / d_model = 0.125"),
        (dict(cms_hidden=INF), "above 0 and below inf"),
        (dict(cms_rate=(INF,)), "cms_rate is \\(inf,\\); it must be at least 0 and below inf"),
        (dict(cms_rate=(-1.0,)), "it must be at least 0"),
        (dict(cms=64), "cms is 64; give a tuple, such as"),
        (dict(cms=(0,)), "it must be at least 1"),
        (dict(vocab_size=0), "vocab_size is 0; it must be at least 1"),
        (dict(norm_eps=math.nan), "norm_eps is nan"),
        (dict(pattern="memory"), "pattern is 'memory'; give a tuple"),
        (dict(cms=(4, 2.5)), "whole numbers from 1, or inf"),
        (dict(cms_rate=(1.0, 1.0, 1.0)), "one for each of 2 in-context levels"),
        (dict(cms=(12, 6), wiring="nested"), "nested levels go from fast to slow"),
        (dict(pattern=("memory", "conv")), "one or more of: memory, attention"),
        (dict(cms=()), "cms is empty"),
        (dict(n_layer=0), "n_layer is 0"),
        (dict(nothing=1), "unknown setting"),
    ):
        with pytest.raises(ValueError, match=message):
            small_config(**fields)
    with pytest.raises(ValueError, match="choose one of: hope, "):
        hope.HopeConfig.preset("tiny", "rnn")
    with pytest.raises(ValueError, match="choose one of: tiny"):
        hope.HopeConfig.preset("huge")


WRONG_TOKENS = [
    (tokens(1, 3)[0], r"of shape \(3,\); give integers \(batch, time\), as by tokens\[None\]"),
    (tokens(1, 3)[None], r"of shape \(1, 1, 3\); give integers"),
    (tokens(1, 3).bool(), "tokens are torch.bool"),
    (tokens(1, 3) + 20, "allowed: 0 to 10"),
    (tokens(1, 3) - 20, "allowed: 0 to 10"),
]


@pytest.mark.parametrize("x, message", WRONG_TOKENS)
def test_tokens_that_are_none_are_refused(x, message):
    model = random_model(small_config())
    for call in (model, model.observe, lambda x: model.generate(x, 1)):
        with pytest.raises(ValueError, match=message):
            call(x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_tokens_of_any_integer_type(dtype):
    model, x, y = random_model(small_config()), tokens(2, 9), tokens(2, 9, seed=1)
    for call in (lambda x, y: model(x)[0], lambda x, y: model.observe(x)[0], lambda x, y: model.observe(x, y)[0],
                 lambda x, y: model.generate(x, 3, temperature=0)):  # fmt: skip
        assert torch.equal(call(x.to(dtype), y.to(dtype)), call(x, y))


@pytest.mark.parametrize("shape", [(2, 12), (2, 3), (1, 6), (6, 2), (12,)])
def test_targets_are_one_for_each_token(shape):
    model, y = random_model(small_config()), torch.ones(shape, dtype=torch.long)
    with pytest.raises(ValueError, match="targets are torch.int64 of shape"):
        model.observe(tokens(2, 6), y)
    with pytest.raises(ValueError, match=r"logits have shape \(2, 6, 11\) and targets \("):
        hope.token_loss(model(tokens(2, 6))[0], y)
    with pytest.raises(ValueError, match="allowed: 0 to 10, or -100 to leave one out"):
        model.observe(tokens(2, 6), tokens(2, 6) + 11)


def test_sampling_at_any_temperature_and_refuses_what_is_no_distribution():
    logits = torch.randn(3, 7)
    assert torch.equal(hope.sample(logits, 1e-40, None, None), logits.argmax(-1, keepdim=True))
    assert hope.sample(logits, INF, None, None).shape == (3, 1)
    for wrong in (
        dict(temperature=math.nan),
        dict(temperature=-1),
        dict(top_p=math.nan),
        dict(top_p=0),
        dict(top_k=0),
    ):
        with pytest.raises(ValueError, match="allowed: temperature >= 0, top_k >= 1, 0 < top_p <= 1"):
            random_model(small_config()).generate(tokens(1, 3), 2, **wrong)
    for bad in (math.nan, INF):
        for temperature in (0, 1):
            with pytest.raises(ValueError, match="training diverged; take an earlier checkpoint"):
                hope.sample(logits.index_fill(1, torch.tensor([2]), bad), temperature, None, None)


def test_how_many_tokens_are_said():
    model = random_model(small_config())
    assert model.generate(tokens(2, 3), 0).shape == (2, 0)
    with pytest.raises(ValueError, match="max_new_tokens is -1; give a number from 0"):
        model.generate(tokens(2, 3), -1)
    with pytest.raises(ValueError, match=r"tokens are a list; give a tensor \(batch, time\)"):
        model.generate([1, 2, 3], 4)


@pytest.mark.parametrize("fields", [dict(arch="hope-attention"), dict(arch="transformer++", cms=(3, INF)),
                                    dict(pattern=("memory", "attention"), window=4), dict(arch="samba", cms=(3, INF))])  # fmt: skip
def test_full_inner_gradients_pass_through_attention(fields):
    model, x, y = random_model(small_config(**{"inner_grad": "full", **fields})), tokens(2, 12), tokens(2, 12, seed=1)
    for recompute in (False, True):
        model.recompute = recompute
        measured, exact = directional(lambda: model.observe(x, y)[0], list(model.parameters()))
        assert measured == pytest.approx(exact, rel=1e-6)


def test_levels_are_ordered_by_definition_2():
    model = hope.Hope(small_config())
    groups = hope.param_groups(model)
    table = hope.levels(model, [torch.optim.Muon(groups["matrix"]), torch.optim.AdamW(groups["rest"])])
    at = {row.component: row for row in table}
    assert [row.level for row in table] == sorted(row.level for row in table)
    assert at["memory M: momentum"].level < at["memory M"].level < at["memories k,v,eta,alpha"].level
    assert at["CMS, C = 6"].level < at["CMS, C = 12"].level < at["AdamW: first moment"].level
    assert at["AdamW: first moment"].level == at["AdamW: second moment"].level < at["parameters, start states"].level
    assert at["parameters, start states"].size == sum(p.numel() for p in model.parameters())
    assert at["memory M"].size == 2 * 2 * 2 * 4 * 4  # layers, heads, two matrices of 4 x 4
    assert len(str(table).splitlines()) == len(table) + 2
    transformer = hope.Hope(small_config("transformer++", cms=(INF,)))
    assert [r.component for r in hope.levels(transformer)] == ["softmax attention", "parameters, start states"]
    with pytest.raises(ValueError, match="levels are those of a hope.Hope, not of a Linear"):
        hope.levels(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="knows nothing of the optimizer Parameter"):
        hope.levels(model, list(model.parameters()))
    with pytest.raises(ValueError, match="knows nothing of the optimizer Adagrad"):
        hope.levels(model, torch.optim.Adagrad(model.parameters()))


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_a_run_and_its_export_are_loaded(ema, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the memory reads what the memory wrote and forgets the rest of it. " * 60)
    small = "--d-model 16 --n-head 2 --n-layer 1 --chunk 16 --chunk-proj 16 --cms 16,inf --seq-len 32 --data text.txt"
    assert train.main([*small.split(), "--steps", "3", "--ema", ema, "--out", "run"]) == 0
    assert train.main(["--export", "run"]) == 0
    _, expected, *_ = train.trained(Path("run"), "cpu")
    x = torch.arange(24)[None]
    for folder in ("run", Path("run/export")):
        model = hope.load(folder)
        assert model.config == expected.config and not model.training
        assert torch.equal(model(x)[0], expected(x)[0]) and model.observe(x)[0].isfinite()
    with pytest.raises(ValueError, match="neither a run with a checkpoint nor an export"):
        hope.load(tmp_path)


def test_a_config_survives_json():
    for config in (small_config(), small_config("samba", cms=(INF,)), small_config(cms_rate=(0.5, 0.25))):
        plain = json.loads(json.dumps(asdict(config)).replace("Infinity", '"inf"'))
        assert hope.HopeConfig.from_dict(plain) == config


def test_the_baseline_has_the_same_size():
    sizes = {
        arch: sum(p.numel() for p in hope.Hope(hope.HopeConfig.preset("tiny", arch)).parameters())
        for arch in ("hope", "transformer++")
    }
    assert 0.95 < sizes["hope"] / sizes["transformer++"] < 1.05
