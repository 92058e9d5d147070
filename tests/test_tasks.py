"""The synthetic tasks are what they say: every definition checked against one written down another way."""

import itertools
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import hope
import tasks
import train

SMALL = {
    "mqar": "mqar,pairs=4,length=32,vocab=32",
    "facts": "facts,length=40,facts=4",
    "two-languages": "two-languages,words=4",
    "selective-copying": "selective-copying,length=24,copy=5",
}
EVERY = [SMALL.get(name, name) for name in tasks.TASKS]
FORMAL = ["parity", "aa", "abab", "anbn", "anbncn", "shuffle-2"]


def rows(spec, split="train", n=40, seed=0):
    """The task and its rows as lists of tokens and of (place, target) where something is asked."""
    task = tasks.make(spec)
    tokens, targets = task.rows(split, seed, 0, n)
    asked = [[(t, y) for t, y in enumerate(row) if y != -100] for row in targets.tolist()]
    return task, list(zip(tokens.tolist(), asked))


# ---- What holds for all ----


@pytest.mark.parametrize("spec", EVERY)
def test_rows_are_a_function_of_task_split_seed_and_number(spec):
    task = tasks.make(spec)
    for split in tasks.SPLITS:
        tokens, targets = task.rows(split, 3, 5, 12)
        again = tasks.make(task.spec).rows(split, 3, 9, 4)
        assert torch.equal(tokens[4:8], again[0]) and torch.equal(targets[4:8], again[1])
        assert tokens.dtype == targets.dtype == torch.int64 and tokens.shape == targets.shape
        assert tokens.shape[1] == task.length or (spec in FORMAL and split == "test")
        assert tokens.min() >= 0 and max(tokens.max(), targets.max()) < task.vocab_size
        assert (targets != -100).any(1).all()
    if spec not in FORMAL:  # a^n b^n has few strings
        assert not torch.equal(task.rows("train", 3, 0, 12)[0], task.rows("train", 4, 0, 12)[0])


@pytest.mark.parametrize("spec", EVERY + ["recall,pairs=2,vocab=6,length=8", "passkey,length=58"])
def test_rows_of_different_splits_never_meet(spec):
    """Not even of different seeds, and where there are so few rows that each comes many times."""
    task = tasks.make(spec)
    width = max(task.rows(split, 0, 0, 1)[0].shape[1] for split in tasks.SPLITS)
    seen = {split: set() for split in tasks.SPLITS}
    for split, seed in itertools.product(tasks.SPLITS, (0, 1)):
        for row in task.rows(split, seed, 0, 150)[0].tolist():
            seen[split].add(tuple(row + [0] * (width - len(row))))
    for a, b in itertools.combinations(tasks.SPLITS, 2):
        assert not seen[a] & seen[b]


@pytest.mark.parametrize("spec", EVERY)
def test_scores_are_100_for_right_answers_and_less_for_one_wrong_answer(spec):
    task = tasks.make(spec)
    tokens, targets = task.rows("test", 0, 0, 8)
    logits = torch.nn.functional.one_hot(targets.clamp(min=0), task.vocab_size).float()
    assert set(task.scores(logits, targets, tokens).values()) == {100.0}
    row, place = (targets != -100).nonzero()[-1].tolist()
    logits[row, place] = logits[row, place].roll(1)
    few = task.scores(logits, targets, tokens)
    units = 8 if task.whole else (targets != -100).sum().item()
    assert few["accuracy"] == pytest.approx(100 * (units - 1) / units) and next(iter(few)) == "accuracy"
    answers = logits.argmax(-1)
    parts = [task.counts(answers[half], targets[half]) for half in (slice(0, 3), slice(3, 8))]
    added = {name: tuple(map(sum, zip(*(part[name] for part in parts)))) for name in parts[0]}
    assert tasks.percent(added) == few


@pytest.mark.parametrize("spec", EVERY)
def test_a_row_is_shown_with_what_was_answered(spec):
    task = tasks.make(spec)
    tokens, targets = (z[0] for z in task.rows("test", 0, 0, 1))
    asked = (targets != -100).sum().item()
    right = task.show(tokens, targets, targets)
    assert ", not " not in right and right.count(" [") == asked + (spec == "shuffle-2") * right.count(" [ ")
    assert task.show(tokens, targets, (targets + 1) % task.vocab_size).count(", not ") == asked


# ---- Recall ----


@pytest.mark.parametrize("filler", ["random", "values", "nothing"])
def test_mqar_asks_for_each_key_once_and_fillers_are_what_they_say(filler):
    task, made = rows(f"mqar,filler={filler}", n=200)
    collisions = 0
    for tokens, asked in made:
        shown = dict(zip(tokens[:16:2], tokens[1:16:2]))
        assert len(shown) == len(set(shown.values())) == 8 and max(shown) < 64 <= min(shown.values())
        assert sorted(tokens[t] for t, _ in asked) == sorted(shown)
        assert all(t >= 16 and t % 2 == 0 and y == shown[tokens[t]] for t, y in asked)
        rest = [z for t, z in enumerate(tokens) if t >= 16 and t not in dict(asked)]
        collisions += len(set(rest) & set(shown))
        assert filler != "nothing" or set(rest) == {0}
    assert (collisions > 300) == (filler == "random") and (collisions == 0) == (filler != "random")


def test_mqar_queries_are_near_by_rather_than_far_and_uniform_at_power_1():
    places = {power: np.mean([[t for t, _ in asked] for _, asked in rows(f"mqar,length=256,power={power}")[1]])
              for power in (0.01, 1.0)}  # fmt: skip
    assert places[0.01] < 100 < 125 < places[1.0] < 147


def test_mqar_rows_have_the_distribution_of_zoologys_generator():
    """Its steps, written down again: where a query stands, by how often, over many rows."""
    _, made = rows("mqar,length=40,pairs=4", n=2000)
    found = np.bincount([(t - 8) // 2 for _, asked in made for t, _ in asked], minlength=16) / 2000
    rng, expected = np.random.default_rng(0), np.zeros(16)
    law = 0.01 * np.arange(1, 17) ** (0.01 - 1)
    for _ in range(2000):
        expected[np.random.RandomState(rng.integers(2**31)).choice(16, replace=False, p=law / law.sum(), size=4)] += (
            1 / 2000
        )
    assert np.abs(found - expected).max() < 0.06


def test_recall_asks_at_every_key_after_the_pairs():
    for spec in ("recall", "recall,length=31,pairs=3"):
        task, made = rows(spec)
        for tokens, asked in made:
            begin = 2 * task.pairs
            shown = dict(zip(tokens[:begin:2], tokens[1:begin:2]))
            assert len(shown) == len(set(shown.values())) == task.pairs
            assert [t for t, _ in asked] == list(range(begin, task.length, 2))
            assert all(y == shown[tokens[t]] for t, y in asked)
            assert all(tokens[t + 1] == y for t, y in asked if t + 1 < task.length)


# ---- MAD ----


@pytest.mark.parametrize("spec, noise", [("in-context-recall", 0), ("noisy-recall", 16)])
def test_in_context_recall_asks_where_a_key_was_there_before(spec, noise):
    task, made = rows(spec)
    share = []
    for tokens, asked in made:
        values, expected = {}, []
        assert len(tokens) == 127
        for t in range(0, 127, 2):
            key, value = tokens[t], [*tokens, asked[-1][1]][t + 1]
            if key >= 16:
                assert noise and 16 <= value < 32
            elif key in values:
                expected.append((t, values[key]))
            assert key >= 16 or (key < 8 <= value < 16 and values.setdefault(key, value) == value)
        assert asked == expected and asked[-1][0] == 126
        share.append(sum(key >= 16 for key in tokens[::2]) / 64)
    assert np.mean(share) == pytest.approx(0.2 if noise else 0, abs=0.03)


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_fuzzy_recall_asks_for_values_of_keys_that_were_there_before(split):
    task, made = rows("fuzzy-recall", split)
    sizes = set()
    for tokens, asked in made:
        stream = [*tokens, asked[-1][1]]
        body = list(itertools.dropwhile(lambda z: z == 15, stream))
        runs = [tuple(run) for _, run in itertools.groupby(body, lambda z: z < 7)]
        assert len(runs) % 2 == 0 and all(len(set(run)) == len(run) <= 3 for run in runs)
        values, expected, t = {}, [], len(stream) - len(body)
        for key, value in zip(runs[::2], runs[1::2]):
            sizes.add(len(key))
            t += len(key)
            if key in values:
                assert values[key] == value
                expected += [(t + i - 1, z) for i, z in enumerate(value)]
            values[key] = value
            t += len(value)
        assert asked == expected and runs[-2] in runs[:-2:2]
    assert sizes == ({1, 2, 3} if split == "train" else {3})


def test_selective_copying_asks_for_the_symbols_in_order():
    for tokens, asked in rows("selective-copying")[1]:
        assert tokens.index(15) == 239 and tokens[240:] == [14] * 16
        assert [y for _, y in asked] == [z for z in tokens if z < 14] and [t for t, _ in asked] == list(range(240, 256))


def test_compression_asks_for_every_symbol_at_the_number_of_its_place():
    task, made = rows("compression")
    assert task.length == 63 and task.vocab_size == 16 + 31
    for tokens, asked in made:
        assert tokens[31] == 15 and max(tokens[:31]) < 15
        assert asked == [(t, tokens[tokens[t] - 16]) for t in range(32, 63)] and len(set(tokens[32:])) == 31


def test_memorisation_has_one_map_for_all_seeds_and_splits():
    value_of = {}
    for split, seed in itertools.product(tasks.SPLITS, (0, 1)):
        for tokens, asked in rows("memorisation", split, seed=seed)[1]:
            assert [t for t, _ in asked] == list(range(1, 32, 2)) and set(tokens[1::2]) == {255}
            assert all(value_of.setdefault(tokens[t - 1], y) == y for t, y in asked)
    assert len(value_of) == len(set(value_of.values())) == 127 and max(value_of) < 127 <= min(value_of.values())
    other = [(tokens[t - 1], y) for tokens, asked in rows("memorisation,map=1")[1] for t, y in asked]
    assert any(value_of[key] != y for key, y in other)


def test_mad_trains_on_as_many_rows_as_it_says():
    task = tasks.make("memorisation,examples=3")
    assert torch.equal(task.rows("train", 0, 0, 3)[0], task.rows("train", 0, 3, 3)[0])
    assert not torch.equal(task.rows("test", 0, 0, 3)[0], task.rows("test", 0, 3, 3)[0])
    task = tasks.make("memorisation,examples=0")
    assert not torch.equal(task.rows("train", 0, 0, 256)[0], task.rows("train", 0, 256, 256)[0])


# ---- Formal languages ----


def balanced(string, pair):
    depths = list(itertools.accumulate((z == pair[0]) - (z == pair[1]) for z in string)) or [0]
    return min(depths) >= 0 and depths[-1] == 0


MEMBER = {
    "parity": ("01", lambda w: w.count("1") % 2 == 0),
    "aa": ("a", lambda w: len(w) % 2 == 0),
    "abab": ("ab", lambda w: w == "abab" * (len(w) // 4)),
    "anbn": ("ab", lambda w: w == "a" * (len(w) // 2) + "b" * (len(w) // 2)),
    "anbncn": ("abc", lambda w: w == "".join(z * (len(w) // 3) for z in "abc")),
    "shuffle-2": ("()[]", lambda w: balanced(w, "()") and balanced(w, "[]")),
}
CHECKED = {"parity": 6, "aa": 12, "abab": 12, "anbn": 7, "anbncn": 6, "shuffle-2": 3}  # longest part that is looked up


def letters(task, tokens):
    return "".join(task.word(z) for z in tokens if z)


@pytest.mark.parametrize("name", FORMAL)
def test_sets_are_those_of_the_enumerated_language(name):
    """All strings up to a length are enumerated; what follows a short part of them is what may come next."""
    alphabet, member = MEMBER[name]
    lengths = range(1, 2 * CHECKED[name] + 3)
    if name in ("parity", "shuffle-2"):
        words = ["".join(w) for n in lengths for w in itertools.product(alphabet, repeat=n)]
    else:  # strings are few, and these are among them
        words = [w for n in lengths for w in ("a" * n, "abab" * n, "a" * n + "b" * n, "a" * n + "b" * n + "c" * n)]
    words = [w for w in words if member(w) and set(w) <= set(alphabet)]
    after = {}
    for w in words:
        for n in range(1, len(w) + 1):
            after.setdefault(w[:n], set()).add(w[n] if n < len(w) else "$")
    task = tasks.make(name)
    seen = set()
    for split in tasks.SPLITS:
        tokens, targets = task.rows(split, 0, 0, 300)
        labels = task.allowed(targets)
        assert labels.shape == (*tokens.shape, len(alphabet) + 1) and not labels[targets == -100].any()
        for row, asked, allowed in zip(tokens.tolist(), (targets != -100).tolist(), labels.tolist()):
            string = letters(task, row)
            assert member(string) and asked == [t < len(string) for t in range(len(row))]
            for n in range(1, min(len(string), CHECKED[name]) + 1):
                found = {symbol for symbol, may in zip(alphabet + "$", allowed[n - 1]) if may}
                assert found == after[string[:n]], string[:n]
                seen.add(frozenset(found))
    assert len(seen) == len(task.sets) == task.vocab_size - 1 - len(alphabet)


@pytest.mark.parametrize("name", FORMAL)
def test_training_strings_are_short_and_half_of_the_test_is_longer(name):
    task = tasks.make(name)
    lengths = {
        split: [len(letters(task, row)) for row in task.rows(split, 0, 0, 200)[0].tolist()] for split in tasks.SPLITS
    }
    assert 36 <= max(lengths["train"]) <= 40 >= max(lengths["selection"])
    assert all((n > 40) == (i % 2 == 1) for i, n in enumerate(lengths["test"])) and 76 <= max(lengths["test"]) <= 80
    assert len(set(lengths["train"])) >= 6 and len(set(lengths["test"][::2])) >= 2


def test_a_string_counts_only_if_every_set_is_right_and_by_its_length():
    task = tasks.make("parity")
    tokens, targets = task.rows("test", 0, 0, 20)
    answers = targets.clone()
    answers[3, 60 if targets[3, 60] != -100 else 40] += 1  # a string of over 40
    answers[:, -1] += 1  # where nothing is asked of most
    hit = (targets[:, -1] != -100).sum().item()
    counts = task.counts(answers, targets)
    assert counts["1-40"] == (10, 10) and counts["41-80"][1] == 10 and 10 - counts["41-80"][0] in (1, 1 + hit, hit)
    assert counts["accuracy"] == (10 + counts["41-80"][0], 20)


# ---- Streams ----


def test_the_passkey_is_hidden_in_the_text_and_asked_for_at_its_end():
    for spec, length, digits in (("passkey", 64, 1), ("passkey,length=300,digits=5", 300, 5)):
        task, made = rows(spec, n=30)
        keys, places = set(), set()
        for tokens, asked in made:
            text = bytes(tokens).decode()
            key = text.split("The key is ")[1][:digits]
            assert len(text) == length and key.isdecimal() and text.count("The key is ") == 2
            assert "".join(chr(y) for _, y in asked) == key and [t for t, _ in asked] == list(
                range(length - digits, length)
            )
            assert text.endswith("What is the key? The key is " + key[:-1])
            keys.add(key)
            places.add(text.index("The key is "))
        assert len(keys) > 5 and len(places) > 3
    for depth, place in ((0.0, 0), (0.5, 110), (1.0, 221)):
        for tokens, _ in rows(f"passkey,length=300,digits=5,depth={depth}", n=5)[1]:
            assert abs(bytes(tokens).decode().index("The key is ") - place) < 30


def test_two_languages_share_meanings_and_the_first_is_asked_again():
    task, made = rows("two-languages,words=4,lessons=3")
    assert task.length == 2 * 4 * 7
    for tokens, asked in made:
        lessons = [tokens[i : i + 8] for i in range(0, 56, 8)]
        meaning = dict(zip(lessons[0][::2] + lessons[3][::2], lessons[0][1::2] + lessons[3][1::2]))
        for n, lesson in enumerate(lessons):
            language = n in (3, 4, 5)
            assert sorted(lesson[::2]) == list(range(4 * language, 4 * language + 4))
            assert [meaning[word] for word in lesson[::2]] == lesson[1::2]
        assert sorted(meaning.values()) == sorted([8, 9, 10, 11] * 2)
        expected = [(8 * n + i, lessons[n][i + 1]) for n in (1, 2, 4, 5, 6) for i in (0, 2, 4, 6)]
        assert asked == expected


def test_two_languages_are_scored_apart():
    task = tasks.make("two-languages,words=4,lessons=2")
    tokens, targets = task.rows("test", 0, 0, 5)
    answers = targets.clone()
    answers[:, 32:] = 0  # forgets the first when it has read the second
    expected = {"accuracy": (40, 60), "first": (20, 20), "second": (20, 20), "first after second": (0, 20)}
    assert task.counts(answers, targets) == expected


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("questions", [1, 3])
def test_facts_hold_from_when_they_are_told(hops, questions):
    task, made = rows(f"facts,hops={hops},facts=9,questions={questions},length=100", n=150)
    for tokens, asked in made:
        words = [task.word(z) for z in tokens]
        at, holder, facts, expected = {}, {}, 0, []
        for t, word in enumerate(words):
            if word == "went":
                at[words[t - 1]] = words[t + 1]
            elif word == "took":
                assert words[t + 1] not in holder
                holder[words[t + 1]] = words[t - 1]
            elif word == "where":
                subject = words[t + 1]
                expected.append((t + 1, at[subject if hops == 1 else holder[subject]]))
            facts += word in ("went", "took")
        assert facts == 9 and len(holder) == (3 if hops == 2 else 0)
        assert [(t, task.word(y)) for t, y in asked] == expected and len(expected) == questions
        assert asked[-1][0] == len(tokens) - 1
        assert all(tokens[t + 1] == y for t, y in asked[:-1])
        assert sum(word.startswith("filler") for word in words) == 100 - 27 - 3 * questions + 1


def test_facts_are_made_for_a_million_tokens_with_the_same_vocabulary():
    begin = time.perf_counter()
    task, [(tokens, asked)] = rows("facts,length=1048576", "test", n=1)
    assert time.perf_counter() - begin < 20
    assert len(tokens) == 2**20 and len(asked) == 1 and task.vocab_size == tasks.make("facts").vocab_size
    went = np.flatnonzero(np.array(tokens) == 1)
    assert len(went) == 6 and went.max() - went.min() > 2**16
    assert asked[0][1] == [tokens[t + 1] for t in went if tokens[t - 1] == tokens[-1]][-1]


# ---- Names and options ----


@pytest.mark.parametrize(
    "spec, said",
    [
        ("mqr", "no task is called 'mqr'; did you mean mqar? mqar, recall, "),
        ("", "no task is called ''; give one of those there are: mqar, "),
        ("mqar,pair=8", "task mqar,pair=8: 'pair=8' is no option; mqar has: length=64, pairs=8, vocab=128"),
        ("mqar,8", "'8' is no option; mqar has"),
        ("mqar,pairs=x", "pairs is 'x'; give a whole number, as in pairs=8"),
        ("mqar,pairs=", "pairs is ''; give a whole number"),
        ("mqar,pairs=0", "pairs is 0; here it must be at least 1"),
        ("mqar,pairs=40", "vocab is 128; here it must be at least 82|length is 64; here it must be at least 160"),
        ("mqar,pairs=20", "length is 64; here it must be at least 80"),
        ("mqar,filler=x", "filler is 'x'; allowed: random, values, nothing"),
        ("mqar,power=2", "power is 2.0; allowed: 0 to 1"),
        ("mqar,power=nan", "power is nan; allowed: 0 to 1"),
        ("recall,vocab=4", "vocab is 4; here it must be at least 8"),
        ("noisy-recall,noise_vocab=0", "noise_vocab is 0; here it must be at least 1"),
        ("noisy-recall,noise=-1", "noise is -1.0; allowed: 0 to 1"),
        ("fuzzy-recall,motif=9", "vocab is 16; here it must be at least 19"),
        ("selective-copying,copy=128", "length is 256; here it must be at least 257"),
        ("compression,vocab=2", "vocab is 2; here it must be at least 3"),
        ("parity,longest=4", "longest is 4; here it must be at least 8"),
        ("anbn,longer=41", "longer is 41; here it must be at least 42"),
        ("passkey,length=40", "length is 40; here it must be at least 42"),
        ("two-languages,lessons=1", "lessons is 1; here it must be at least 2"),
        ("facts,hops=3", "hops is 3; allowed: 1, 2"),
        ("facts,length=20", "length is 20; here it must be at least 21"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(spec, said):
    with pytest.raises(ValueError, match="|".join(map(re.escape, said.split("|")))):
        tasks.make(spec)


def test_errors_of_rows():
    with pytest.raises(ValueError, match="recall,length=4,pairs=1,vocab=2 has too few rows for three splits"):
        for split in tasks.SPLITS:
            tasks.make("recall,pairs=1,vocab=2,length=4").rows(split, 0, 0, 1)
    with pytest.raises(ValueError, match="split is 'valid'; allowed: train, selection, test"):
        tasks.make("recall").rows("valid", 0, 0, 1)
    with pytest.raises(ValueError, match="rows 0 to 0; give at least one"):
        tasks.make("recall").rows("test", 0, 0, 0)


def test_a_spec_with_every_option_makes_the_same_task():
    task = tasks.make("mqar,pairs=4,filler=values")
    assert task.spec == "mqar,length=64,pairs=4,vocab=128,filler=values,power=0.01" == tasks.make(task.spec).spec


# ---- train.py --data task:NAME ----

TINY = "--d-model 16 --n-head 2 --n-layer 1 --chunk 8 --chunk-proj 8 --cms 8,16,inf --lr 0.02".split()
EASY = "task:recall,pairs=2,vocab=8,length=16"


@pytest.fixture
def in_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def log_of(run):
    lines = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]


def test_a_run_on_a_task_shows_its_accuracy_and_goes_on_bit_identically(in_a_directory, capsys):
    steps = ["--steps", "12", "--eval-every", "6", "--save-every", "6"]
    assert train.main([*TINY, *steps, "--data", EASY]) == 0
    out = capsys.readouterr().out
    whole = log_of("runs/recall")
    assert whole[-1]["val_accuracy"] == pytest.approx(
        float(re.search(r"validation: ([\d.]+)% right", out)[1]), abs=0.05
    )
    assert "val_bpb" not in whole[-1] and whole[-1]["loss"] < whole[0]["loss"] and whole[-1]["tokens"] == 12 * 32 * 16
    assert len(re.findall(r"\d \[\d(?:, not \d)?\]", out.split("A sample:")[1])) == 6  # of one row, six are asked
    assert {p.name for p in Path("runs/recall").iterdir() if p.name[0] != "."} == {
        "config.json", "log.jsonl", "loss.png", "checkpoints"
    }  # fmt: skip
    shutil.copytree("runs/recall", "cut")
    shutil.rmtree("cut/checkpoints/step-000012")
    assert train.main(["--resume", "cut"]) == 0
    assert log_of("cut") == whole
    [whole], [cut] = (
        list(Path(run, "checkpoints/step-000012").glob("*.safetensors")) for run in ("runs/recall", "cut")
    )
    whole, cut = load_file(whole), load_file(cut)
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)

    capsys.readouterr()
    samples = []
    for seed in ("0", "0", "1"):
        assert train.main(["--sample", "runs/recall", "--seed", seed]) == 0
        samples.append(capsys.readouterr().out)
    assert samples[0] == samples[1] != samples[2] and samples[0] in out
    with pytest.raises(SystemExit):
        train.main(["--data", EASY, "--nonsense"])


def test_validation_counts_what_observing_the_rows_for_selection_gives(in_a_directory, capsys):
    """With the CMS written as the rows go by, in whatever batches, and in parts where the task has some."""
    data = ["--data", "task:two-languages,words=4", "--steps", "5", "--out", "run", "--micro-batch", "16"]
    assert train.main([*TINY, *data]) == 0
    row = log_of("run")[-1]
    config, model, tokenizer, _ = train.trained(Path("run"), None)
    task = tasks.make("two-languages,words=4")
    tokens, targets = task.rows("selection", 0, 0, 128)
    with torch.no_grad():
        loss, _, logits = model.observe(tokens, targets, logits=True)
    found = task.scores(logits, targets, tokens)
    assert tokenizer is None and config.seq_len == task.length == 40
    assert row["val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {"accuracy": row["val_accuracy"], **row["val_parts"]} == pytest.approx(found, abs=1)
    assert list(row["val_parts"]) == ["first", "second", "first after second"]


def test_any_number_of_processes_reads_the_rows_of_the_task():
    config = train.TrainConfig(data=EASY, seq_len=16, batch_size=4, seed=5)
    corpus = train.Corpus.open(config)
    whole = corpus.batch(3, range(4))
    halves = [corpus.batch(3, range(2)), corpus.batch(3, range(2, 4))]
    expected = corpus.task.rows("train", 5, 12, 4)
    for i in (0, 1):
        assert torch.equal(whole[i], torch.cat([half[i] for half in halves])) and torch.equal(whole[i], expected[i])
    one = train.Corpus.open(replace(config, overfit_one_batch=True))
    assert torch.equal(one.batch(3, range(4))[0], one.batch(0, range(4))[0])
    for split in (whole[0], corpus.validation()[0]):
        assert split.shape[1] == 16
    assert len(corpus.validation()[0]) == 128 and len(corpus.validation(most=3)[0]) == 3


def test_processes_add_up_what_each_finds_on_its_share_of_the_rows():
    class Process:
        device, size = torch.device("cpu"), 3

        def __init__(self, rank):
            self.rank = rank

        def share(self, n):
            return range(self.rank * n // 3, (self.rank + 1) * n // 3)

        def sum(self, *values):
            self.values = values
            return values

    config = train.TrainConfig(data="task:two-languages,words=4", seq_len=40, batch_size=48)
    corpus, bar = train.Corpus.open(config), tqdm(disable=True)
    torch.manual_seed(0)
    model = hope.Hope(hope.HopeConfig.preset("tiny", "transformer++", d_model=8, n_head=1, n_layer=1, vocab_size=12))
    alone = train.validate(model, corpus, config, world := train.World(config), bar)
    world.close()
    sums = np.zeros(10)
    for process in map(Process, range(3)):
        train.validate(model, corpus, config, process, bar)
        sums += process.values
    loss, *rights = sums[::2] / sums[1::2]
    assert sums[1::2].tolist() == [128 * n for n in (12, 12, 4, 4, 4)]
    assert loss == pytest.approx(alone["val_loss"], rel=1e-6)
    assert [100 * share for share in rights] == pytest.approx([alone["val_accuracy"], *alone["val_parts"].values()])


def test_a_task_is_planned_exported_and_begun_from(in_a_directory, capsys):
    assert train.main([*TINY, "--data", EASY, "--plan"]) == 0
    assert "32 sequences of 16 tokens" in capsys.readouterr().out and not Path("runs").exists()
    assert train.main([*TINY, "--data", EASY, "--steps", "1"]) == 0
    assert train.main(["--export", "runs/recall"]) == 0
    exported = {p.name for p in Path("runs/recall/export").iterdir()}
    assert exported >= {"config.json", "model.safetensors"} and "tokenizer.json" not in exported
    assert "tokenizer = " not in Path("runs/recall/export/README.md").read_text()
    again = ["--init-from", "runs/recall/export", "--data", EASY, "--steps", "1", "--out", "again"]
    assert train.main(again) == 0
    capsys.readouterr()
    assert train.main(["--sample", "runs/recall/export"]) == 0 and "[" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--data", "task:mqr"], "no task is called 'mqr'; did you mean mqar?"),
        (["--data", "task:mqar,pairs=99"], "vocab is 128; here it must be at least 200"),
        (
            ["--data", "task:mqar", "--seq-len", "32"],
            "rows of task:mqar have 64 tokens; leave it out or give seq_len 64",
        ),
        (["--data", "task:mqar", "--tokenizer", "gpt2"], "tokenizer is gpt2, but task:mqar has tokens of its own"),
    ],
)
def test_tasks_that_cannot_be_trained_are_refused_in_one_line(flags, said, in_a_directory, capsys):
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
