"""What a run reads: which tokens a step gets."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Makes a corpus of 4 rows a step, 8 tokens a row, over text in which no window occurs twice."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"{i:03d}" for i in range(250)))
    return lambda **settings: train.Corpus("text.txt", **{"seq_len": 8, "batch_size": 4, "seed": 7, **settings})


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_shuffled_is_a_permutation(n, key):
    assert sorted(train.shuffled(i, n, key) for i in range(n)) == list(range(n))


def test_shuffled_permutations_are_as_random_as_they_should_be():
    n, keys = 7, 4000
    count = torch.zeros(n, n)
    for key in range(keys):
        for i in range(n):
            count[i, train.shuffled(i, n, train.scramble(0, key))] += 1
    chi2 = ((count - keys / n) ** 2 / (keys / n)).sum()
    assert chi2 < 70  # 36 degrees of freedom: less than 1 in 1,000 by chance
    far = [train.shuffled(i, 10**12, 3) for i in range(1000)]
    assert len(set(far)) == 1000 and min(far) < 10**10 and max(far) > 10**12 - 10**10


def test_the_tokens_of_a_step_depend_on_seed_and_step_alone(corpus):
    c = corpus()
    x, y = c.batch(5, range(4))
    assert x.shape == y.shape == (4, 8) and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, corpus().batch(5, range(4))[0])
    assert not torch.equal(x, corpus(seed=8).batch(5, range(4))[0])
    assert not torch.equal(x, c.batch(6, range(4))[0])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_micro_batches_read_the_rows_of_one_global_batch(corpus, ranks):
    whole = corpus().batch(3, range(4))
    parts = [corpus().batch(3, range(r * 4 // ranks, (r + 1) * 4 // ranks)) for r in range(ranks)]
    assert all(torch.equal(torch.cat(part), one) for part, one in zip(zip(*parts), whole))


def test_an_epoch_reads_every_window_once(corpus):
    c = corpus(batch_size=1)
    n = len(c.train) // 8 - 1
    epochs = [[tuple(c.batch(s, range(1))[0][0].tolist()) for s in range(e * n, (e + 1) * n)] for e in range(3)]
    text = bytes(c.train.tolist())
    for rows in epochs:
        starts = sorted(text.index(bytes(row)) for row in rows)
        assert [s - starts[0] for s in starts] == list(range(0, 8 * n, 8))  # side by side, so none twice
        assert starts[0] < 8 and starts[-1] + 16 >= len(text) - 8  # and all but the ends is read
    assert len({tuple(rows) for rows in epochs}) == 3  # each epoch in an order of its own
