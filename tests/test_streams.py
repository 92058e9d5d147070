"""Long streams and what can be done with a state; precision, sizes, memory of the backward pass."""

import math
import resource
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from conftest import assert_states_equal, cut, flat, random_model, small_config, tokens

import hope

INF = hope.INF


@pytest.fixture(params=["hope", "hope-attention"])
def model(request):
    return random_model(small_config(request.param))


@pytest.mark.parametrize("seen", [0, 9, 12])
def test_a_state_survives_saving(model, tmp_path, seen):
    """Also before the first token, inside a segment, and with a token pending."""
    x = tokens(2, 20)
    whole, end = model.observe(x, reduction="none")
    first, state = model.observe(x[:, :seen], reduction="none")
    state.save(tmp_path / "state", model)
    loaded = hope.HopeState.load(tmp_path / "state", model)
    second, loaded_end = model.observe(x[:, seen:], state=loaded, reduction="none")
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert_states_equal(loaded_end, end)


@pytest.mark.parametrize("how", [{}, {"backward": True}, {"backward": True, "truncate": True}])
def test_observe_returns_the_logits_that_it_scored(model, how):
    """Over writes of the CMS, and in a stream that begins within a segment."""
    x, y = tokens(2, 27), tokens(2, 27, seed=1)
    _, state = model.observe(x[:, :4], y[:, :4])
    losses, end, logits = model.observe(x, y, state, reduction="none", logits=True, **how)
    torch.testing.assert_close(hope.token_loss(logits, y), losses, check_dtype=False)
    expected, expected_end = model.observe(x, y, state, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert_states_equal(end, expected_end)
    assert model.observe(x[:, :1], logits=True)[2].shape == (2, 0, 11)


def test_a_state_is_loaded_by_the_weights_that_made_it_only(model, tmp_path):
    path = tmp_path / "state"
    _, state = model.observe(tokens(2, 9))
    state.save(path, model)
    assert hope.HopeState.load(path).observed == 8
    with torch.no_grad():
        model.norm.weight[0] += 1e-6
    with pytest.raises(ValueError, match=r"is not a state of this model \(it was saved with a model of other"):
        hope.HopeState.load(path, model)
    with pytest.raises(ValueError, match="block 0 of the state has the parts|the state has 2 blocks and the model 1"):
        hope.HopeState.load(path, random_model(small_config("titans", n_layer=1)))


def test_loading_a_state_runs_no_code_and_refuses_what_is_none(tmp_path):
    class Bomb:
        def __reduce__(self):
            return print, ("boom",)

    path, model = tmp_path / "state", random_model(small_config())
    torch.save(Bomb(), path)
    with pytest.raises(ValueError, match="is not a state of this model .*; give a file that HopeState.save made"):
        hope.HopeState.load(path)
    zeros, no_lists = {"0": torch.zeros(1)}, '{"class": "HopeState", "memories": 1, "cms": 2}'
    for described in ("", "7", "[]", '{"class": "Path"}', '{"tensor": "1"}', no_lists):
        safetensors.torch.save_file(zeros, path, {"state": described, "model": ""})
        with pytest.raises(ValueError, match="is not a state of this model"):
            hope.HopeState.load(path, model)


def test_a_state_branches(model):
    x, tails = tokens(1, 8), tokens(3, 7, seed=1)
    _, state = model.observe(x, tokens(1, 8, seed=2))
    branches, _ = model.observe(tails, tails, state.select([0, 0, 0]), reduction="none")
    for b in range(3):
        alone, _ = model.observe(tails[b : b + 1], tails[b : b + 1], state, reduction="none")
        torch.testing.assert_close(branches[b : b + 1], alone)


def test_sequences_shorter_than_a_chunk_are_written_too():
    model = random_model(small_config(chunk=64, chunk_proj=64, cms=(64, INF)))
    _, state = model(tokens(1, 3))
    _, longer = model(tokens(1, 3), state)
    before, now = state.memories[0].main.now[0], longer.memories[0].main.now[0]
    assert (now - before).abs().max() > 1e-6 and state.memories[0].t == 3


def test_a_state_does_not_grow():
    model = random_model(small_config())
    size = lambda s: sum(z.numel() for z in flat(s))
    with torch.no_grad():
        _, state = model.observe(tokens(1, 24), tokens(1, 24))
        before = size(state)
        for _ in range(5):
            _, state = model.observe(tokens(1, 24), tokens(1, 24), state)
    assert size(state) == before


@pytest.mark.slow
def test_a_million_tokens_at_constant_memory_and_speed():
    model = hope.Hope(hope.HopeConfig.preset("tiny", d_model=64, n_head=2, n_layer=1))
    x, state, times = torch.randint(256, (1, 2048)), None, []
    with torch.no_grad():
        for _ in range(1_000_000 // 2048 + 1):
            start = time.process_time()
            _, state = model(x, state)
            times.append(time.process_time() - start)
            if len(times) == 50:
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, last = (sorted(t)[len(t) // 2] for t in (times[10:110], times[-100:]))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / memory
    print(f"time per token, end / start: {last / first:.3f}; peak memory, end / start: {grown:.3f}")
    assert last / first < 1.05 and grown < 1.02
    assert all(z.isfinite().all() for z in flat(state)) and state.memories[0].t > 1_000_000


def test_recomputing_states_changes_nothing():
    x, y, got = tokens(2, 24), tokens(2, 24, seed=1), []
    for remat in (0, 1, 2):
        model = random_model(small_config(remat=remat, chunk=2, chunk_proj=4))
        loss, _ = model.observe(x, y, backward=True)
        got.append([loss, *(p.grad for p in model.parameters())])
    for other in got[1:]:
        for a, b in zip(got[0], other):
            torch.testing.assert_close(a, b)


def test_kept_activations_do_not_grow_with_chunks_times_state():
    """Bytes that autograd holds for one layer: eight times the length, at most 1.3 times eight times the bytes."""

    def held(t, remat):
        torch.manual_seed(0)
        memory = hope.Memory(hope.MemoryConfig(d_model=32, n_head=1, chunk=8, chunk_proj=8, remat=remat))
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda z: seen.setdefault(z.data_ptr(), z.untyped_storage().nbytes()) and z, lambda z: z
        ):
            memory(torch.randn(1, t, 32))
        return sum(seen.values())

    assert held(2048, 16) < 1.3 * 8 * held(256, 16)
    assert held(2048, 16) < 0.5 * held(2048, 0)


@pytest.mark.parametrize("arch", ["hope", "hope-attention", "transformer++"])
def test_bfloat16_autocast_keeps_states_in_float32(arch):
    torch.manual_seed(0)
    model = hope.Hope(small_config(arch))
    torch.nn.init.normal_(model.head.weight)
    x, y = tokens(2, 24), tokens(2, 24, seed=1)
    exact, _ = model.observe(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        loss, state = model.observe(x, y, backward=True)
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.02 * exact
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    if arch == "hope":
        assert all(z.dtype == torch.float32 for m in state.memories for z in flat((m.main, m.proj)))
    for layer in state.cms:
        assert all(z.dtype == torch.float32 for f in layer if f for z in flat(f))


@pytest.mark.parametrize("size, millions", [("60m", 60), ("170m", 170), ("340m", 340), ("760m", 760), ("1.3b", 1300)])
@pytest.mark.parametrize("arch", list(hope.HopeConfig.ARCHS))
def test_sizes_have_the_parameters_of_their_name(size, millions, arch):
    config = hope.HopeConfig.preset(size, arch)
    with torch.device("meta"):
        model = hope.Hope(config)
    assert config.vocab_size == 32000
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.03)


@pytest.mark.parametrize("size", hope.HopeConfig.SIZES)
@pytest.mark.parametrize("arch", hope.HopeConfig.ARCHS)
def test_the_clocks_are_those_of_the_size_unless_the_architecture_or_the_user_says_otherwise(size, arch):
    clocks = (512, 2048, INF) if size in ("340m", "760m", "1.3b") else (64, 256, INF)
    assert hope.HopeConfig.preset(size, arch).cms == (clocks if arch in ("hope", "hope-attention") else (INF,))
    assert hope.HopeConfig.preset(size, arch, cms=(32, INF)).cms == (32, INF)


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: random_model(small_config(n_layer=1)).init_state(2), "the state has 1 blocks and the model 2"),
        (lambda: random_model(small_config(n_layer=3)).init_state(2), "the state has 3 blocks and the model 2"),
        (lambda: random_model(small_config(d_model=12)).init_state(2), "block 0 of the state"),
        (lambda: random_model(small_config(cms=(6, INF))).init_state(2), "block 0 of the state"),
        (lambda: random_model(small_config("hope-attention")).init_state(2), "AttentionState"),
        (lambda: random_model(small_config(conv=0)).init_state(1), "of 1 sequences and the input of 2"),
        (lambda: random_model(small_config(conv=0)).observe(tokens(1, 5), tokens(1, 5))[1], "HopeState.select"),
        (lambda: (0.5, random_model(small_config()).init_state(2)), "the state is a tuple; give a HopeState"),
    ],
)
def test_a_state_of_another_model_or_batch_is_refused(other, message):
    model, x = random_model(small_config()), tokens(2, 4)
    for call in (
        model,
        lambda x, state: model.observe(x, state=state),
        lambda x, state: model.generate(x, 1, state=state),
    ):
        with pytest.raises(ValueError, match=message):
            call(x, other())


def test_a_layer_refuses_a_state_of_another_batch(model):
    layer = model.blocks[0].memory
    with pytest.raises(ValueError, match="of 1 sequences and the input of 2"):
        layer(torch.randn(2, 3, 8, dtype=torch.float64), layer.init_state(1))


def test_what_a_stream_says_is_what_generate_says_and_its_state_goes_on(model):
    """From the state after the last token, reading on gives what reading the whole text at once gives."""
    x, more = tokens(2, 9), tokens(2, 7, seed=1)
    said, states = [], []
    for _, (new, state) in zip(range(5), model.stream(x, temperature=0)):
        said, states = [*said, new], [*states, state]
    assert torch.equal(torch.cat(said, 1), model.generate(x, 5, temperature=0))
    for i, state in enumerate(states):
        assert torch.equal(state.pending, said[i])
        _, by_hand = model.observe(x)  # the prompt is observed, what is said is only read
        _, by_hand = model(torch.cat([by_hand.pending, *said[:i]], 1), replace(by_hand, pending=None))
        assert_states_equal(state, replace(by_hand, pending=said[i]))
    assert_states_equal(
        model.observe(more, state=states[-1])[1], model.observe(more, state=replace(by_hand, pending=said[4]))[1]
    )


def test_a_model_learns_from_its_own_words_as_from_others(model):
    x, calls = tokens(2, 9), []
    run = model._run
    model._run = lambda *args: calls.append(args[0].shape[1]) or run(*args)
    words = [pair for _, pair in zip(range(9), model.stream(x, temperature=0, learn_own=True))]
    model._run = run
    said = torch.cat([new for new, _ in words], 1)
    assert_states_equal(words[-1][1], model.observe(torch.cat([x, said], 1))[1])
    # Every word is read once; what a chunk's write needs is read again when the chunk is full, as by observe.
    assert calls == ([6, 2] if model.config.clocks else [8]) + [1, 1, 1, 1, 6, 1, 1, 1, 1, 1]


def test_a_prompt_that_is_not_memorized_teaches_nothing_later(model):
    for _, (_, state) in zip(range(4), model.stream(tokens(1, 9), memorize=False)):
        pass
    assert state.segment is None and all(
        not f.total[0].any() and not f.delta[0].any() for fasts in state.cms for f in fasts if f
    )


@pytest.mark.parametrize("arch", ["hope", "hope-attention", "titans"])
def test_inference_mode_gives_what_no_grad_gives(arch):
    model, x = random_model(small_config(arch, cms=(3, 6, INF))), tokens(2, 13)
    with torch.no_grad():
        loss, state = model.observe(x)
        logits, _ = model(x)
        new = model.generate(x, 3, temperature=0)
    with torch.inference_mode():
        same_loss, same_state = model.observe(x)
        same_logits, read = model(x)
        same_new = model.generate(x, 3, temperature=0)
        words = [new for _, (new, _) in zip(range(3), model.stream(x, temperature=0, learn_own=True))]
        _, again = model.observe(tokens(2, 8), state=read)
    assert torch.equal(loss, same_loss) and torch.equal(logits, same_logits) and torch.equal(new, same_new)
    assert torch.equal(words[0], new[:, :1])
    assert_states_equal(state, same_state)
    model.observe(tokens(2, 8), state=again, backward=True)  # and its states serve outside of it


def test_what_is_made_under_inference_mode_is_refused():
    with torch.inference_mode():
        model, layer = hope.Hope(small_config()), hope.Memory(d_model=8, n_head=2)
        layer(torch.randn(2, 3, 8))  # a layer alone can be read and written there
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for call in (model, model.observe, lambda x: model.generate(x, 2)):
            with mode(), pytest.raises(ValueError, match="made under torch.inference_mode and .*; make it outside"):
                call(tokens(2, 8))
    with pytest.raises(ValueError, match="make it outside"):
        layer(torch.randn(2, 3, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("arch", list(hope.HopeConfig.ARCHS))
def test_parameters_of_any_floating_type(arch, dtype):
    torch.manual_seed(0)
    model, x = hope.Hope(small_config(arch, cms=(6, 12, INF))), tokens(2, 14)
    torch.nn.init.normal_(model.head.weight)
    exact, start = model.observe(x)
    model.to(dtype)
    loss, state = model.observe(x, backward=True)
    assert loss.dtype == max(dtype, torch.float32, key=lambda d: d.itemsize) and abs(loss - exact) < 0.1 * exact
    assert all(p.grad is None or p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    written = [f for fasts in state.cms for f in fasts if f]
    written += [(m.main, m.proj) for m in state.memories if isinstance(m, hope.MemoryState)]
    assert all(z.dtype == loss.dtype for z in flat(written))
    assert model.observe(x, state=start)[0].isfinite()  # a state of another type is taken as what it is here
    assert model.generate(x, 2).shape == (2, 2)


def test_the_papers_literal_form_in_bfloat16():
    config = small_config(n_head=1, project=False)
    assert hope.Hope(config).bfloat16().observe(tokens(2, 14))[0].isfinite()


def test_stop_tokens_end_a_sequence():
    model, prompt = random_model(small_config()), tokens(3, 9)
    free = model.generate(prompt, 8, temperature=0)
    stop = int(free[0, 2])
    stopped = model.generate(prompt, 8, temperature=0, stop=[stop])
    for a, b in zip(free, stopped):
        at = (a == stop).nonzero().flatten().tolist()
        end = at[0] + 1 if at else 8
        assert torch.equal(a[:end], b[:end]) and (b[end:] == stop).all()


def test_memorize_chooses_what_learns_from_a_prompt():
    model, x = random_model(small_config(cms=(3, 6, INF))), tokens(2, 13)

    def moved(**settings):
        _, state = model.observe(x, **settings)
        return [bool(f.delta[0].abs().sum() > 0) for f in state.cms[0] if f]

    assert moved() == [True, True] and moved(levels=[1]) == [False, True] and moved(levels=[]) == [False, False]
    assert moved(surprise=100.0) == [False, False]
    losses, _ = model.observe(x, reduction="none")
    between = losses[:, :3].mean(1).sort().values.mean().item()  # one sequence is more surprised than the other
    _, state = model.observe(x[:, :4], surprise=between)
    assert (state.cms[0][0].delta[0].abs().sum((1, 2)) > 0).tolist() == (losses[:, :3].mean(1) > between).tolist()
    frozen = model.generate(x, 6, temperature=0, memorize=False)
    by_hand, _ = model(x[:, :-1])
    logits, _ = model(torch.cat([x, frozen], 1)[:, :-1])
    assert torch.equal(logits[:, x.shape[1] - 1 :].argmax(-1), frozen)
    with pytest.raises(ValueError, match="those that do: \\[0, 1\\]"):
        model.observe(x, levels=[2])


def test_nested_levels_restart_where_the_slower_level_left_their_start_state():
    """Eq. 72: at a slow boundary the fast block falls back to its start, moved by the slow chunk's mean gradient."""
    config = small_config(n_layer=1, cms=(3, 6, INF), cms_rate=(0.5, 0.25), wiring="nested", learn_rates=False)
    model, x, y = random_model(config), tokens(1, 6), tokens(1, 6, seed=1)
    _, half = model.observe(x[:, :3], y[:, :3])
    g1 = half.cms[0][0].start_total  # the first chunk's gradient
    torch.testing.assert_close(half.cms[0][0].delta[0], -0.5 / 3 * g1[0])
    _, end = model.observe(x[:, 3:], y[:, 3:], half)
    sequential = hope.Hope(small_config(n_layer=1, cms=(3, 6, INF), cms_rate=(0.5, 0.25), learn_rates=False)).double()
    sequential.load_state_dict(model.state_dict())
    _, plain = sequential.observe(x, y)
    g2 = (half.cms[0][0].delta[0] - plain.cms[0][0].delta[0]) * 3 / 0.5  # the second chunk's gradient
    torch.testing.assert_close(end.cms[0][0].delta[0], -0.25 / 6 * (g1[0] + g2))
    torch.testing.assert_close(end.cms[0][0].start[0], end.cms[0][0].delta[0])
    torch.testing.assert_close(end.cms[0][1].delta[0], plain.cms[0][1].delta[0])


def test_independent_levels_add_their_changes():
    model = random_model(small_config(wiring="independent", n_layer=1))
    cms, x = model.blocks[0].cms, torch.randn(1, 5, 8, dtype=torch.float64)
    want = x + sum(level(x) - x for level in cms.levels)
    torch.testing.assert_close(cms(x, [None] * 3), want)


def test_the_timeline_shows_every_component_at_its_own_times():
    import matplotlib

    matplotlib.use("Agg")
    model = hope.Hope(hope.HopeConfig.preset("tiny"))
    table = hope.levels(model, torch.optim.AdamW(model.parameters()))
    ax = table.plot(step=512)
    assert [t.get_text().rsplit("  ", 1)[0] for t in ax.get_yticklabels()] == [row.component for row in table]
    marks = {row.component: len(lines.get_segments()) for row, lines in zip(table, ax.collections)}
    assert marks["memory M"] == 1024 and marks["CMS, C = 64"] == 16 and marks["parameters, start states"] == 2


@pytest.mark.parametrize("arch", list(hope.HopeConfig.ARCHS))
@pytest.mark.parametrize("optimizer", ["AdamW", "Muon", "SGD"])
def test_levels_are_right_for_every_architecture(arch, optimizer):
    model = hope.Hope(small_config(arch, cms=hope.HopeConfig.ARCHS[arch].get("cms", (6, 12, INF)), chunk=4))
    params = hope.param_groups(model)["matrix"] if optimizer == "Muon" else model.parameters()
    table = hope.levels(model, getattr(torch.optim, optimizer)(params))
    periods = [math.inf if row.period is None else row.period for row in table]
    assert periods == sorted(periods) and [row.level for row in table] == sorted(row.level for row in table)
    names = [row.component for row in table]
    memory = model.config.memory
    hybrid = "attention" in model.config.pattern
    assert ("softmax attention" in names) == (memory.depth == 0 or hybrid)
    assert ("memory M" in names) == (memory.depth > 0)
    assert ("memory M: momentum" in names) == (memory.depth > 0 and memory.momentum)
    assert sum(name.startswith("CMS") for name in names) == len(model.config.clocks)
    assert any(name.startswith(optimizer) for name in names) == (optimizer != "SGD")
    states = sum(row.size for row in table if row.component in ("memory M", "memories k,v,eta,alpha"))
    assert states == sum(w.numel() for n, w in model.named_parameters() if ".start." in n and not n.endswith("scale"))


@pytest.mark.parametrize("arch", ["hope", "hope-attention"])
def test_a_truncated_backward_is_the_sum_over_segments_each_from_a_detached_change_of_the_start_state(arch):
    model = random_model(small_config(arch, learn_rates=False))
    x, y = tokens(2, 23), tokens(2, 23, seed=1)
    y[0, 3:9] = -100
    whole, whole_state = model.observe(x, y)
    loss, state = model.observe(x, y, backward=True, truncate=True)
    torch.testing.assert_close(loss, whole)
    assert_states_equal(state, whole_state)
    assert not any(z.requires_grad for z in (loss, *flat(state)))
    got = {name: p.grad for name, p in model.named_parameters()}

    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    state = None
    for tokens_, targets in zip(cut(x, [6, 12, 18]), cut(y, [6, 12, 18])):
        begin = model.init_state(2)
        if state is not None:
            memories = [
                m if arch == "hope-attention" else hope.map_state(lambda a, b: (a - b).detach() + b, m, start)
                for m, start in zip(state.memories, begin.memories)
            ]
            begin = hope.HopeState(memories, state.cms)
        logits, _ = model(tokens_, begin)
        part = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        grads = torch.autograd.grad(part / (y != -100).sum(), list(model.parameters()), allow_unused=True)
        for total, g in zip(expected.values(), grads):
            total += 0 if g is None else g
        state = model.observe(tokens_, targets, state)[1].detach()
    for name, g in got.items():
        torch.testing.assert_close(torch.zeros_like(expected[name]) if g is None else g, expected[name])


def test_a_truncated_backward_keeps_no_more_for_a_longer_stream():
    model = random_model(small_config(cms=(6, hope.INF)))

    def most_held(t):
        held = most = 0

        class Kept:
            def __init__(self, z):
                nonlocal held, most
                self.z = z
                held += z.numel()
                most = max(most, held)

            def __del__(self):
                nonlocal held
                held -= self.z.numel()

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.z):
            model.observe(tokens(1, t), tokens(1, t), backward=True, truncate=True)
        return most

    assert most_held(60) < 1.1 * most_held(24)


def two_passes(model, x, y, **how):
    """What `truncate` does, by a pass to the deltas and another to the parameters for every segment."""
    learn = hope.Hope._learn

    def apart(self, segment, before, cms, t, lesson):
        plain = replace(lesson, truncate=False)
        found = learn(self, segment, before, cms, t, plain)  # by autograd.grad
        lesson.backward(found[0])  # the losses
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hope.Hope, "_learn", apart)
        return model.observe(x, y, backward=True, truncate=True, **how)


@pytest.mark.parametrize("how", [{}, {"reduction": "mean"}, {"surprise": 2.9}, {"levels": [1]}])
@pytest.mark.parametrize("fields", [{}, {"arch": "hope-attention"}, {"wiring": "nested"}, {"learn_rates": False}])
def test_one_backward_a_segment_gives_what_two_give(fields, how):
    how = {"reduction": "none", **how}
    x, y, got = tokens(2, 27), tokens(2, 27, seed=1), []
    y[0, 3:9] = -100
    for run in (lambda m: m.observe(x, y, backward=True, truncate=True, **how), lambda m: two_passes(m, x, y, **how)):
        model = random_model(small_config(**fields))
        loss, state = run(model)
        got.append((loss, flat(state), [p.grad for p in model.parameters()]))
    exact = how["reduction"] == "none"
    for a, b in zip(*[[loss, *state, *(g for g in grads if g is not None)] for loss, state, grads in got], strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_one_backward_a_segment_is_one(monkeypatch):
    model, calls = random_model(small_config()), []
    grad, backward = torch.autograd.grad, torch.Tensor.backward
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append("grad") or grad(*a, **k))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: calls.append("backward") or backward(*a, **k))
    x = tokens(2, 18)
    model.observe(x, x, backward=True, truncate=True)
    assert calls == ["backward"] * 3
    calls.clear()  # a segment begun by an earlier call has gone back through its losses: there it takes two
    _, state = model.observe(x[:, :4], x[:, :4], backward=True, truncate=True)
    model.observe(x[:, 4:6], x[:, 4:6], state, backward=True, truncate=True)
    assert calls == ["backward", "grad", "backward"]


@pytest.mark.parametrize("cuts", [[2], [6, 7, 13], [4, 8, 20]])
def test_a_truncated_backward_moves_the_cms_alike_however_the_stream_is_cut(cuts):
    x, y = tokens(2, 23), tokens(2, 23, seed=1)
    whole, end = random_model(small_config()).observe(x, y, backward=True, truncate=True, reduction="none")
    model, state, losses = random_model(small_config()), None, []
    for a, b in zip(cut(x, cuts), cut(y, cuts)):
        loss, state = model.observe(a, b, state, backward=True, truncate=True, reduction="none")
        losses.append(loss)
    torch.testing.assert_close(torch.cat(losses, 1), whole)
    assert_states_equal(state, end)


def test_a_truncated_backward_needs_a_backward():
    with pytest.raises(ValueError, match="set backward=True"):
        random_model(small_config()).observe(tokens(1, 7), truncate=True)
