"""evaluation.py: likelihoods and continuations with and without learning, the harness on local lines, interruptions."""

import math

import numpy as np
import pytest
import torch

import hope
import train
from evaluation import Memorize, Options, Reader, Subject

SMALL = "--d-model 32 --n-head 2 --cms-hidden 1 --chunk 16 --chunk-proj 16 --cms 16,32,inf --seq-len 64 --batch-size 4"


def make_run(path, *flags):
    assert train.main(["--out", str(path), "--eval-every", "1000", "--device", "cpu", *SMALL.split(), *flags]) == 0
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "hope", "--steps", "6", "--save-every", "3", "--lr", "0.03")


@pytest.fixture(scope="module")
def subject(run):
    return Subject.load(str(run), Options(device="cpu"))


def memorize(levels=(0, 1), surprise=0.0, steps=1, answer=False, keep=False):
    return Memorize(levels, surprise, steps, answer, keep)


def reader(subject, how=None, batch_size=16, context=0):
    return Reader(subject, how, context, batch_size)


def words(n, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(97, 123, size=rng.choice(lengths)).tolist() for _ in range(n)]


PAIRS = [(context, answer) for context, answer in zip(words(12, [20, 40]), words(12, [2, 5], seed=1))]
PAIRS += [(context, answer[::-1]) for context, answer in PAIRS[:6]]  # several answers to one context


def likelihoods(reader, pairs=PAIRS):
    found = dict(reader.loglikelihoods(pairs))
    assert sorted(found) == [*range(len(pairs))]
    return [found[i] for i in range(len(pairs))]


@pytest.mark.parametrize("how", [None, memorize(), memorize(answer=True), memorize(steps=2)])
def test_batches_of_one_and_of_sixteen_agree(subject, how):
    one, sixteen = (reader(subject, how, batch_size=n) for n in (1, 16))
    for a, b in zip(likelihoods(one), likelihoods(sixteen)):
        assert a[0] == pytest.approx(b[0], abs=1e-5) and a[1] == b[1]
    texts = [(text[:-1], text[1:]) for text in words(9, [70, 71, 72])]
    a, b = (dict(r.losses(texts)) for r in (one, sixteen))
    for i, (x, _) in enumerate(texts):
        assert len(a[i]) == len(x)
        torch.testing.assert_close(a[i], b[i], rtol=0, atol=1e-5)
    prompts = words(5, [17, 33])
    a, b = (dict(r.continuations(prompts, ["e"], 12)) for r in (one, sixteen))
    assert a == b and any(a.values())


def test_a_likelihood_is_that_of_one_pass(subject):
    """And whether it is greedy: the likeliest continuation is, any other is not."""
    x = torch.tensor([PAIRS[0][0] + PAIRS[0][1]])
    logits, _ = subject.model(x[:, :-1])
    n = len(PAIRS[0][1])
    expected = torch.log_softmax(logits[0, -n:], -1).gather(1, x[0, -n:, None]).sum().item()
    found, greedy = likelihoods(reader(subject))[0]
    assert found == pytest.approx(expected, abs=1e-5) and not greedy
    best = subject.model.generate(torch.tensor([PAIRS[0][0]]), 4, temperature=0)[0].tolist()
    (_, greedy), (_, other) = likelihoods(reader(subject), [(PAIRS[0][0], best), (PAIRS[0][0], best[:3] + [7])])
    assert greedy and not other


def test_the_state_carries_a_rolling_likelihood(subject):
    """Read in pieces of 10 tokens it is what one pass gives, and what `observe` gives where the CMS learns."""
    text = words(1, [100])[0]
    x, y = torch.tensor([text[:-1]]), torch.tensor([text[1:]])
    whole = hope.token_loss(subject.model(x)[0], y)[0]
    learnt = subject.model.observe(x, y, reduction="none")[0][0]
    assert (whole - learnt).abs().max() > 1e-3
    for how, expected in ((None, whole), (memorize(), learnt)):
        r = reader(subject, how)
        r.piece = 10
        [(_, found)] = r.losses([(text[:-1], text[1:])])
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)
    [(_, windows)] = reader(subject, context=30).losses([(text[:-1], text[1:])])
    alone = hope.token_loss(subject.model(x[:, 30:60])[0], y[:, 30:60])[0]
    torch.testing.assert_close(windows[30:60], alone, rtol=0, atol=1e-5)
    assert (windows[60:] - whole[60:]).abs().max() > 1e-3


def test_every_switch_changes_what_it_should(subject):
    """Each gives other likelihoods than any other; and what should change nothing does not."""
    pairs = [(context, answer) for context, answer in zip(words(3, [50]), words(3, [20], seed=1))]
    hows = {
        "off": None, "on": memorize(), "level 0": memorize((0,)), "level 1": memorize((1,)), "steps": memorize(steps=3),
        "surprise": memorize(surprise=math.log(256) * 0.99), "answer": memorize(answer=True), "keep": memorize(keep=True),
    }  # fmt: skip
    found = {name: [z for z, _ in likelihoods(reader(subject, how), pairs)] for name, how in hows.items()}
    differ = lambda a, b: max(abs(x - y) for x, y in zip(found[a], found[b])) > 1e-4
    names = [name for name in hows if name not in ("surprise",)]
    assert all(differ(a, b) for i, a in enumerate(names) for b in names[:i])
    assert abs(found["keep"][0] - found["on"][0]) < 1e-5  # nothing has been kept in front of the first sample
    found["all"] = [z for z, _ in likelihoods(reader(subject, memorize(surprise=100.0)), pairs)]
    assert not differ("all", "off")
    # Shorter than a chunk, a prompt teaches nothing; read twice, it does.
    short = [(words(1, [10])[0], [101, 102])]
    off, on, twice = (likelihoods(reader(subject, how), short)[0][0] for how in (None, memorize(), memorize(steps=2)))
    assert off == pytest.approx(on, abs=1e-5) and abs(off - twice) > 1e-5
