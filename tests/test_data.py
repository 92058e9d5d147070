"""What a run reads: tokenizers, preparation of shards, and which tokens a step gets."""

import gzip
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from data import (
    FILES,
    PIECE,
    SPLIT,
    Corpus,
    Source,
    Tokenizer,
    UserError,
    batches,
    cut_runs,
    make_tokenizer,
    place_in_mixture,
    prepare,
    read_signed,
    scramble,
    shuffled,
    signed,
    write_atomically,
)  # fmt: skip
from train import TrainConfig

WORDS = "the memory reads what a memory wrote and forgets all the rest of it at once, été 深い 🙂".split()


def documents(n, seed=0):
    """n documents of 20 to 60 words, each with a number of its own."""
    g = random.Random(seed)
    return [f"Document {i}: " + " ".join(g.choices(WORDS, k=g.randint(20, 60))) + "\n" for i in range(n)]


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def jsonl():
    """docs.jsonl with 300 documents."""
    texts = documents(300)
    Path("docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return texts


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("data.PIECE", 1000)
    monkeypatch.setattr("data.BATCH", 3000)


def config(data="docs.jsonl", **settings):
    return TrainConfig(data=data, **{"seq_len": 32, "batch_size": 4, **settings})


def texts_of(corpus, split):
    """Everything in a split, document by document."""
    found = []
    for tokens, starts in getattr(corpus, split).parts:
        assert starts.tolist() == [i for i, t in enumerate(tokens.tolist()) if t == corpus.tokenizer.eot]
        edges = (
            [*starts.tolist(), len(tokens)] if len(starts) and starts[0] == 0 else [0, *starts.tolist(), len(tokens)]
        )
        found += [corpus.tokenizer.decode(tokens[a:b].tolist()).lstrip("\0") for a, b in zip(edges, edges[1:])]
    return found


# Tokenizers


TRAINED = Tokenizer.learn(320, documents(50))


@given(st.text())
@pytest.mark.parametrize("tokenizer", [Tokenizer(), TRAINED], ids=["bytes", "trained"])
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens.tolist()) == text
    assert tokens.dtype == tokenizer.dtype and (tokens < tokenizer.vocab_size).all()
    assert tokenizer.lengths[tokens].sum() == len(text.encode()) - text.count("\0") * (tokenizer.ranks is None)
    assert tokenizer.eot not in tokens or "\0" in text


@pytest.mark.parametrize("text", ["<|endoftext|><|eot|>", "a" * 200_000, " " * 200_000, "\n\0" * 50_000], ids=repr)
def test_text_that_looks_special_or_never_ends_is_only_text(text):
    start = time.process_time()
    tokens = TRAINED.encode(text)
    assert TRAINED.decode(tokens.tolist()) == text and TRAINED.eot not in tokens
    assert time.process_time() - start < 5


@pytest.mark.parametrize("run", [" ", "\t", "\u3000", " \n", "a"], ids=repr)
@pytest.mark.parametrize(
    "pattern", [SPLIT, r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"]
)
def test_a_million_spaces_are_text_and_leave_the_tokens_around_them_alone(run, pattern):
    tokenizer, run = Tokenizer(TRAINED.ranks, pattern), run * (1_000_000 // len(run))
    tokens = tokenizer.encode(f"memory reads{run} memory").tolist()
    assert tokenizer.decode(tokens) == f"memory reads{run} memory"
    begin, end = tokenizer.encode("memory reads").tolist(), tokenizer.encode(" memory").tolist()
    assert run[0] == "a" or (tokens[: len(begin)], tokens[-len(end) :]) == (begin, end)
    assert Tokenizer.learn(258, [f"memory{run} reads"]).vocab_size <= 258


def test_only_white_space_beyond_a_thousand_is_cut():
    for text in ("\n" * 1000 + "a", "word " * 9999, "x" * 10**6):
        assert cut_runs(text) == [text]
    assert cut_runs("a" + " " * 2500 + "b") == ["a" + " " * 1000, " " * 1000, " " * 500 + "b"]


@pytest.mark.parametrize("tokenizer", [Tokenizer(), TRAINED], ids=["bytes", "trained"])
def test_transformers_reads_a_folder_to_equal_tokens(tokenizer):
    transformers = pytest.importorskip("transformers")
    Path("config.json").write_text('{"train": {}, "model": {}}')  # a run's is not one of transformers
    tokenizer.save(Path())
    theirs = transformers.AutoTokenizer.from_pretrained(".")
    odd = "it's 1234567 tests  \n\n  of  été 深い 🙂\r\n\tx\u00a0 y\u3000\u3000z DON'T \u017f a\u0085b \x1c\x1c  w !!\n /  "
    for text in [*documents(5), odd, odd[::-1], " " * 99 + "\n" * 99, "", "a" * 999]:
        tokens = tokenizer.encode(text).tolist()
        assert theirs(text, add_special_tokens=False).input_ids == tokens
        assert theirs.decode(tokens, clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id == tokenizer.eot and len(theirs) == tokenizer.vocab_size
    split = Tokenizer(TRAINED.ranks, r"\S+|\s+")
    split.save(Path())
    assert Tokenizer.load(Path("tokenizer.tiktoken")).sha256 == split.sha256  # pattern and all


def test_half_a_surrogate_pair_becomes_a_question_mark():
    assert [t.decode(t.encode("a\ud800b").tolist()) for t in (Tokenizer(), TRAINED)] == ["a?b", "a?b"]


def test_a_trained_vocabulary_has_the_asked_size_and_is_always_the_same():
    code = "import data, test_data; print(data.Tokenizer.learn(320, test_data.documents(50)).sha256)"
    path = os.pathsep.join([str(Path(train.__file__).parent), str(Path(__file__).parent)])
    env = os.environ | {"RAYON_NUM_THREADS": "3", "PYTHONPATH": path, "PYTHONHASHSEED": "3"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).split()[-1] == TRAINED.sha256
    assert TRAINED.vocab_size == 320 and TRAINED.eot == 319 and max(TRAINED.ranks.values()) == 318


def test_a_text_too_small_for_the_asked_vocabulary_gives_a_smaller_one(capsys):
    assert Tokenizer.learn(32000, ["aaaa"] * 9).vocab_size == 259  # bytes, aa, aaaa, eot
    assert "the text yields 259 tokens, not 32,000" in capsys.readouterr().out


def test_a_tokenizer_file_is_what_it_was_saved_from_and_tiktoken_reads_it():
    TRAINED.save(Path())
    assert Tokenizer.load(Path("tokenizer.tiktoken")).sha256 == TRAINED.sha256
    from tiktoken.load import load_tiktoken_bpe

    assert load_tiktoken_bpe(str(Path("tokenizer.tiktoken").absolute())) == TRAINED.ranks


def test_a_named_encoding_is_taken_from_tiktoken(monkeypatch):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 257}  # 256 is free, as 50256 is in p50k_base
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiktoken.Encoding(
        name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}))  # fmt: skip
    tokenizer = make_tokenizer("p50k_base", list)
    assert (tokenizer.eot, tokenizer.vocab_size, tokenizer.encode("ab").tolist()) == (256, 258, [257])


def test_a_tokenizer_that_cannot_be_had_is_named_with_what_can_be(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    Path("no.tiktoken").write_text("no base64\n")
    Path("few.tiktoken").write_text("YQ== 0\n")
    for name, message in (
        (
            "gpt2",
            "must be downloaded once, and that failed (ConnectionError: no network); connect to the network, or use bytes",
        ),
        ("gpt5", "no such tokenizer; allowed: bytes, train:N, a .tiktoken file, a folder with a tokenizer.json, gpt2"),
        ("train:many", "a number of tokens from 257, as in train:32000"),
        ("train:256", "a number of tokens from 257"),
        ("nowhere.tiktoken", "cannot be used (No such file"),
        ("no.tiktoken", "cannot be used"),
        ("few.tiktoken", "must hold all 256 bytes"),
    ):
        with pytest.raises(UserError) as e:
            make_tokenizer(name, list)
        assert message in str(e.value) and name in str(e.value), e.value


@pytest.mark.parametrize("tokenizer", ["bytes", "train:600"])
def test_bits_per_byte_count_the_bytes_of_the_scored_tokens(jsonl, tokenizer):
    for reset in (False, True):
        corpus = Corpus.open(config(tokenizer=tokenizer, reset_at_documents=reset))
        scored = [t for t in corpus.validation()[1].flatten().tolist() if t >= 0]
        size = len(b"".join(bytes([t]) if corpus.tokenizer.ranks is None else corpus.tokenizer.encoding.decode_bytes([t])
                            for t in scored if t != corpus.tokenizer.eot))  # fmt: skip
        assert corpus.tokens_per_byte == len(scored) / size


# Sources


def test_every_kind_of_file_gives_the_same_documents(jsonl):
    import pyarrow
    import pyarrow.parquet

    raw = Path("docs.jsonl").read_bytes()
    Path("docs.jsonl.gz").write_bytes(gzip.compress(raw))
    frames = [pyarrow.compress(part, "zstd", asbytes=True) for part in (raw[:999], raw[999:])]
    Path("docs.jsonl.zst").write_bytes(b"".join(frames))
    pyarrow.parquet.write_table(pyarrow.table({"id": range(300), "body": jsonl}), "docs.parquet")
    os.makedirs("train")  # a folder stands for a data set of the hub: the same code reads it
    os.link("docs.parquet", "train/train.parquet")
    os.makedirs("texts/more")
    for i, text in enumerate(jsonl):
        path = f"texts/{'more/' * (i >= 200)}{i:03d}.txt"
        (gzip.open if i % 3 == 0 else open)(path + ".gz" * (i % 3 == 0), "wb").write(text.encode())
    one = Corpus.open(config())
    assert sorted(texts_of(one, "training") + texts_of(one, "held_out")) == sorted(jsonl)
    for data, field in (
        ("docs.jsonl.gz", "text"),
        ("docs.jsonl.zst", "text"),
        ("docs.parquet", "body"),
        ("texts/*.txt,texts/*.gz,texts/**/*.txt*", "text"),
        (f"hf:{Path().absolute()}/train", "body"),
    ):
        corpus = Corpus.open(config(data, text_field=field))
        assert corpus.sha256 == one.sha256, data
        assert all(torch.equal(a, b) for a, b in zip(corpus.batch(9, range(4)), one.batch(9, range(4))))


def test_files_are_found_by_name_folder_and_pattern_each_once(jsonl):
    rows = [json.dumps({"text": t}) for t in jsonl]
    os.makedirs("folder/deep/.hidden")
    Path("folder/a[1]?.JSONL").write_text("\n".join(rows[:100]))
    Path("folder/deep/b*.ndjson").write_bytes(b"\xef\xbb\xbf" + "\n".join(rows[100:200]).encode())
    Path("folder/deep/c.json").write_text(f"\n[{', '.join(rows[200:])}]")
    Path("folder/deep/.hidden/d.txt").write_text("not read")
    one = Corpus.open(config())
    for data in (
        "folder",
        "folder/a[1]?.JSONL,folder/deep",
        "folder/*,./folder/deep/b*.ndjson,folder/deep/*.json",
    ):
        found = Corpus.open(config(data))
        assert sorted(texts_of(found, "training") + texts_of(found, "held_out")) == sorted(jsonl), data
        assert found.sha256 == one.sha256
    assert [p.name for p in Source(config("docs.jsonl,./docs.jsonl,*.jsonl")).files] == ["docs.jsonl"]
    assert Path(one.name).name.startswith("docs.jsonl-bytes-")


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "hf:"])
def test_zero_bytes_are_replaced_and_counted_and_a_bom_is_dropped(kind, tokenizer, capsys):
    import pyarrow.parquet

    text = "".join(documents(40)).replace("memory", "mem\0ry")
    data = f"one.{kind}"
    if kind == "txt":
        Path(data).write_bytes(b"\xef\xbb\xbf" + text.encode())
    elif kind == "jsonl":
        Path(data).write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": text}).encode())
    else:
        os.makedirs("set")
        data = "set/train.parquet" if kind == "parquet" else f"hf:{Path('set').absolute()}"
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), "set/train.parquet")
    corpus = Corpus.open(config(data, tokenizer=tokenizer))
    tokens = np.concatenate([t for split in ("training", "held_out") for t, _ in getattr(corpus, split).parts])
    assert (tokens == corpus.tokenizer.eot).sum() == 1  # one document
    assert corpus.tokenizer.decode(tokens[1:].tolist()) == text.replace("\0", "\ufffd")
    assert f"{text.count(chr(0)):,} zero bytes (U+0000) were replaced" in capsys.readouterr().out


def test_a_data_set_of_lines_becomes_articles(monkeypatch):
    import datasets

    lines = ["", " = One = \n", "", " first \n", " = = Part = = \n", " second \n", " = Two = \n", " third \n"] * 2
    made = []

    def load(*args, **kwargs):
        made.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": lines}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source(config("wikitext-103"))
    assert [piece.text for piece in source if piece.begins] == [" = One = \n", " = Two = \n"] * 2
    assert made == [(("Salesforce/wikitext", "wikitext-103-raw-v1"), {"split": "train", "streaming": True})]
    assert source.held_out == 0.01 and Source(config("wikitext-103", held_out=0.2)).held_out == 0.2
    pieces = next(batches(Source(config("wikitext-103"))))[0]
    assert "".join(p.text for p in pieces) == "".join(lines) and [p.begins for p in pieces].count(True) == 4


def test_data_that_cannot_be_used_is_named_with_the_reason(monkeypatch):
    import pyarrow.parquet

    Path("bad.jsonl").write_text('{"text": "fine"}\n\n{"text": 3}\n')
    Path("cut.jsonl").write_text('{"text": "fine"}\n{"text": "fi\n')
    Path("fields.jsonl").write_text('{"title": "a", "body": "b"}\n')
    Path("cut.txt.gz").write_bytes(gzip.compress(b"text" + random.Random(0).randbytes(9000).hex().encode())[:5000])
    Path("cut.txt.zst").write_bytes(
        pyarrow.compress(b"text" + random.Random(0).randbytes(9000).hex().encode(), "zstd", asbytes=True)[:5000]
    )
    Path("bad.parquet").write_bytes(b"PAR1 no")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fine"] * 69 + [None]}), "null.parquet")
    Path("list.json").write_text('[{"text": "fine"}, {"text": []}]')
    Path("empty").mkdir()
    Path("late.txt").write_bytes(("é" * PIECE).encode() + b"\xff")
    Path("blank.txt").write_text(" \n" * 99)
    for data, message in (
        (
            "bad.jsonl",
            "--data bad.jsonl, line 3 cannot be read (field 'text' holds a number, not text; mend it, or name another by",
        ),
        ("cut.jsonl", "--data cut.jsonl, line 2 cannot be read (JSONDecodeError"),
        (
            "fields.jsonl",
            "line 1 cannot be read (no text in field 'text', there is: title, body; name it by --text-field)",
        ),
        ("null.parquet", "--data null.parquet, row 70 cannot be read (field 'text' holds null, not text"),
        ("list.json", "--data list.json, row 2 cannot be read (field 'text' holds a list, not text"),
        ("empty", "--data empty: no file in this folder; give files, folders or patterns"),
        ("cut.txt.gz", "--data cut.txt.gz"),
        ("cut.txt.zst", "--data cut.txt.zst"),
        ("bad.parquet", "--data bad.parquet cannot be read (ArrowInvalid"),
        ("late.txt", "--data late.txt cannot be read (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff"),
        ("blank.txt", "there is no text in it"),
        ("late.txt,nowhere*.txt", "--data nowhere*.txt: no such file"),
        (f"hf:{Path().absolute()}/nowhere", "cannot be read"),
    ):
        with pytest.raises(UserError) as e:
            Corpus.open(config(data))
        assert message in str(e.value) and "\n" not in str(e.value), e.value
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r'needs datasets, which is missing; run: pip install "nested-learning-hope\[data\]"'
    ):
        Corpus.open(config("tinystories"))


# Held-out text


def test_held_out_documents_are_whole_and_never_in_the_training_text(jsonl):
    Path("docs.jsonl").write_text(Path("docs.jsonl").read_text() * 2)  # every document twice
    corpus = Corpus.open(config())
    training, held_out = texts_of(corpus, "training"), texts_of(corpus, "held_out")
    assert sorted(training + held_out) == sorted(jsonl * 2)
    assert not set(training) & set(held_out) and 0.05 < len(held_out) / 600 < 0.15


def test_of_few_documents_the_end_is_held_out():
    text = "".join(documents(100))
    Path("one.txt").write_text(text)
    corpus = Corpus.open(config("one.txt"))
    (training,) = texts_of(corpus, "training")
    assert text.startswith(training) and len(training.encode()) == pytest.approx(0.9 * len(text.encode()), abs=4)
    tail = b"".join(bytes(tokens.tolist()) for tokens, _ in corpus.held_out.parts)
    assert training.encode() + tail == text.encode()


# Prepared data


def test_documents_longer_than_a_batch_lose_nothing(small):
    text = "".join(documents(200))
    Path("one.txt").write_text(text)
    corpus = Corpus.open(config("one.txt"))
    assert "".join(texts_of(corpus, "training") + texts_of(corpus, "held_out")) == text


@pytest.mark.parametrize("filters", [{}, dict(min_chars=150, deduplicate=True)], ids=["all", "filtered"])
@pytest.mark.parametrize("data", ["docs.jsonl", "texts/*.txt", "hf:", "pydoc"])
def test_preparation_that_stops_anywhere_goes_on_to_the_same_tokens(jsonl, small, monkeypatch, data, filters):
    os.makedirs("texts")
    if filters:  # every document twice
        Path("docs.jsonl").write_text(Path("docs.jsonl").read_text() * 2)
    for i in range(5):
        Path(f"texts/{i}.txt").write_text("".join(jsonl[60 * i : 60 * i + 60]))
    if data == "hf:":
        os.makedirs("set")
        for i in range(3):
            Path(f"set/train-{i}.jsonl").write_text("".join(Path("docs.jsonl").read_text().splitlines(True)[i::3]))
        data = f"hf:{Path('set').absolute()}"
    if data == "pydoc":
        monkeypatch.setattr("data.BATCH", 20000)
    tokenizer = "train:400"
    whole, manifest, _ = prepare(config(data, data_dir="whole", tokenizer=tokenizer, **filters))
    write, stops = write_atomically, iter(range(999))

    def stopping(path, content):
        stop = next(stops) % 3 if path.name == "manifest.json" else None
        if stop == 1:  # between tokens and the manifest that knows of them
            raise KeyboardInterrupt
        write(path, content)
        if stop == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("data.write_atomically", stopping)
    for _ in range(999):
        try:
            cut, again, _ = prepare(config(data, data_dir="cut", tokenizer=tokenizer, **filters))
            break
        except KeyboardInterrupt:
            pass
    assert next(stops) >= 10 and again["sha256s"] == manifest["sha256s"] and again["left_out"] == manifest["left_out"]
    assert all((cut / file).read_bytes() == (whole / file).read_bytes() for file in FILES)


def test_filters_leave_documents_out_and_say_how_many(jsonl, small, capsys):
    texts = [*jsonl, *jsonl[:7], *jsonl[:3], "short", "long " * 300]
    Path("docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    filters = dict(min_chars=10, max_chars=1000, deduplicate=True)
    folder, manifest, _ = prepare(config(**filters))
    assert manifest["left_out"] == {"min_chars": 1, "max_chars": 1, "deduplicate": 10}
    said = capsys.readouterr().out
    assert "10 documents were left out as seen before (--deduplicate)" in said
    assert "1 documents were left out as too short (--min-chars)" in said
    found = [text for split in ("training", "held_out") for text in texts_of(Corpus.open(config(**filters)), split)]
    assert sorted(found) == sorted(jsonl)
    assert sorted(path.name for path in folder.iterdir() if "hashes" in path.name) == []
    assert prepare(config())[0] != folder  # which has all of them
    assert prepare(config(str(folder), **filters))[0] == prepare(config(str(folder)))[0] == folder
    with pytest.raises(UserError, match="prepared with other filters; leave out min_chars"):
        prepare(config(str(folder), min_chars=20))
    with pytest.raises(ValueError, match="max_chars is 5; it must be at least min_chars, 10"):
        config(min_chars=10, max_chars=5)


def test_a_filter_sees_whole_documents(small):
    """A text file comes in pieces of a thousand characters."""
    for name, size in (("a", 2500), ("b", 2500), ("c", 3500), ("d", 900)):
        Path(f"{name}.txt").write_text("".join(documents(90, seed=1))[:size])
    pieces = [*Source(config("*.txt", min_chars=1000, max_chars=3000, deduplicate=True))]
    assert [len(piece.text) for piece in pieces] == [2500] and pieces[0].begins


SHARES = [[8, 2], [1, 1], [999, 1], [6, 3, 1], [1, 1, 1], [5, 4, 3, 2, 1]]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_a_mixture_has_its_shares_from_the_first_row_on(shares):
    parts = [Fraction(share, sum(shares)) for share in shares]
    counts = [0] * len(shares)
    for i in range(3000):
        source, place = place_in_mixture(i, parts)
        assert place == counts[source]  # every row of a source once, in turn
        counts[source] += 1
        off = max(abs(n - (i + 1) * share) for n, share in zip(counts, parts))
        assert off < 1 if len(shares) == 2 else off < 2


@pytest.fixture
def two_sources():
    """a.txt holds capitals only, b.txt small letters."""
    g = random.Random(0)
    for name, letters in (("a.txt", "ABCDEFGH"), ("b.txt", "abcdefgh")):
        Path(name).write_text("".join(g.choices(letters, k=6000)))


def test_a_mixture_reads_its_sources_by_share_whoever_asks(two_sources):
    mixed = Corpus.open(config("a.txt@0.75,b.txt@0.25", batch_size=8))
    kinds = []
    for step in range(40):
        x, y = mixed.batch(step, range(8))
        assert (x[:, 1:] == y[:, :-1]).all()
        halves = [mixed.batch(step, range(i, i + 4))[0] for i in (0, 4)]  # of two processes
        assert torch.equal(torch.cat(halves), x)
        kinds += [bytes(row.tolist()).replace(b"\0", b"").isupper() for row in x]
    assert abs(sum(kinds) - 0.75 * len(kinds)) < 1
    assert all(bytes(row.tolist()).replace(b"\0", b"").isalpha() for row in x)
    # Each source in the order that it has alone, none twice before all were read.
    alone = Corpus.open(config("a.txt", batch_size=1))
    rows = [row for step in range(40) for row in mixed.batch(step, range(8))[0]]
    capitals = [row for row, kind in zip(rows, kinds) if kind]
    assert all(torch.equal(row, alone.batch(i, range(1))[0][0]) for i, row in enumerate(capitals))
    x, _ = mixed.validation()
    upper = sum(bytes(row.tolist()).replace(b"\0", b"").isupper() for row in x)
    assert 0 < len(x) - upper < upper
    assert "0.75 of the rows: " in str(mixed) and "0.25 of the rows: " in str(mixed)
    assert mixed.sha256 != Corpus.open(config("a.txt@0.5,b.txt@0.5")).sha256


def test_a_run_on_a_mixture_goes_on_as_if_it_had_not_stopped(two_sources):
    command = (
        "--data a.txt@3/4,b.txt@1/4 --seq-len 32 --batch-size 4 --arch transformer++ --d-model 16 --n-head 2".split()
    )
    command += "--eval-every 4 --save-every 2 --schedule wsd --warmup 0 --decay-part 0".split()
    assert train.main([*command, "--out", "whole", "--steps", "4"]) == 0
    assert train.main([*command, "--out", "cut", "--steps", "2"]) == 0
    assert train.main(["--resume", "cut", "--steps", "4"]) == 0
    losses = [[json.loads(line)["loss"] for line in Path(run, "log.jsonl").open()] for run in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_what_one_source_of_a_mixture_has_learnt_serves_all():
    for name in ("a", "b"):
        Path(f"{name}.txt").write_text("".join(documents(60, seed=ord(name))))
    mixed = Corpus.open(config("b.txt@0.3,a.txt@0.7", tokenizer="train:300"))
    alone = Corpus.open(config("a.txt", tokenizer="train:300"))
    assert mixed.tokenizer.sha256 == alone.tokenizer.sha256  # of the larger share
    folders = ",".join(f"{source.name}@{share}" for source, share in zip(mixed.sources, mixed.shares))
    assert torch.equal(Corpus.open(config(folders)).batch(3, range(4))[0], mixed.batch(3, range(4))[0])
    other = prepare(config("b.txt"))[0]
    with pytest.raises(UserError, match="prepared with different tokenizers; prepare them with one"):
        Corpus.open(config(f"{mixed.sources[0].name}@0.5,{other}@0.5"))


@pytest.mark.parametrize(
    "data, message",
    [
        ("a.txt@0.8,b.txt@0.3", "the shares are 0.8 + 0.3; give every source a share, together 1"),
        ("a.txt@1.2,b.txt@-0.2", "the shares are 1.2 + -0.2; give"),
        ("a.txt@1,b.txt@0", r"the shares are 1 \+ 0; give"),
        ("a.txt@0.8,b.txt", "b.txt has no share; give every source a share"),
        ("a.txt@0.5,a.txt@0.5", "a source is named twice"),
        ("a.txt@0.5,b.txt@1/0", "a share is no number"),
        ("a.txt@0.5,c.txt@0.5", "--data c.txt: no such file"),
    ],
)
def test_shares_that_cannot_be_are_refused(two_sources, data, message):
    with pytest.raises(UserError, match=message.replace(" + ", r" \+ ")):
        Corpus.open(config(data))


def test_a_name_with_an_at_sign_is_a_name():
    Path("me@home.txt").write_text("some text " * 99)
    assert len(Corpus.open(config("me@home.txt")).training) > 0


def test_what_the_hubs_libraries_retry_is_no_news(caplog):
    os.makedirs("set")
    Path("set/train.jsonl").write_text('{"text": "some text"}\n')
    libraries = [
        logging.getLogger(name)
        for name in ("datasets.load", "fsspec", "huggingface_hub.utils", "urllib3.connectionpool")
    ]
    for library in libraries:
        library.setLevel(logging.NOTSET)
    [piece] = Source(config(f"hf:{Path('set').absolute()}"))
    assert piece.text == "some text"
    for library in libraries:
        library.warning("Retrying in 1s")
        library.error("It cannot be had")
    assert [record.message for record in caplog.records] == ["It cannot be had"] * len(libraries)


def test_preparation_that_is_killed_goes_on_where_it_stopped():
    Path("docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(20_000)))
    code = "import data, train; data.BATCH = 20000; train.main(['--prepare', '--data', 'docs.jsonl'])"
    env = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL)
    known = lambda: [p for p in Path("data").glob("*.part/manifest.json") if json.loads(p.read_text())["position"]]
    while not known() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (manifest,) = known()
    before = json.loads(manifest.read_text())
    assert "sha256s" not in before
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert f"going on after {sum(before['sizes'].values()):,} bytes" in done.stdout, done
    corpus = Corpus.open(config(verify_data=True))
    assert sorted(texts_of(corpus, "training") + texts_of(corpus, "held_out")) == sorted(documents(20_000))


def test_preparation_takes_no_more_memory_for_more_text():
    text = "".join(documents(20_000))
    with open("big.txt", "w") as f:
        for _ in range(50):
            f.write(text)
    size = Path("big.txt").stat().st_size
    code = """
import resource, train
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 120 * 2**20,) * 2)
assert train.main(["--prepare", "--data", "big.txt"]) == 0
"""
    env = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert size > 1.5 * 120 * 2**20


def test_processes_that_start_together_prepare_once(jsonl):
    code = "import data, train; data.BATCH = 8000; train.main(['--prepare', '--data', 'docs.jsonl', '--seq-len', '32'])"
    env = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    start = lambda: subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    outputs = {p.communicate()[0] for p in [start(), start()]}
    assert len(outputs) == 1 and "tokens to train on" in outputs.pop()
    assert len([p for p in Path("data").iterdir() if p.is_dir()]) == 1


def test_prepared_data_that_is_missing_short_or_altered_is_named(jsonl):
    folder, _, _ = prepare(config())
    path = folder / "train.tokens"
    good = path.read_bytes()
    fix = f"restore it, or delete {folder} to prepare it anew"
    for damage, verify, message in (
        (lambda: path.write_bytes(good[:-1]), False, f"{path} has {len(good) - 1} bytes, not {len(good)}; {fix}"),
        (lambda: path.write_bytes(good[:-9] + b"x" + good[-8:]), True, f"{path} was altered; {fix}"),
        (lambda: path.unlink(), False, f"{path} is missing; {fix}"),
    ):
        damage()
        with pytest.raises(UserError) as e:
            Corpus.open(config(verify_data=verify))
        assert str(e.value) == message
    path.write_bytes(good)
    Corpus.open(config(verify_data=True))


def test_a_prepared_folder_can_be_copied_and_needs_its_source_no_more(jsonl):
    one = Corpus.open(config(tokenizer="train:400"))
    shutil.copytree(one.name, "elsewhere", copy_function=shutil.copy)  # with new times of change
    Path("docs.jsonl").unlink()
    before = sorted((p, p.stat().st_mtime_ns) for p in Path("elsewhere").iterdir())
    assert Corpus.open(config("elsewhere")).sha256 == one.sha256
    assert Corpus.open(config("elsewhere", size="60m", verify_data=True)).sha256 == one.sha256
    assert sorted((p, p.stat().st_mtime_ns) for p in Path("elsewhere").iterdir()) == before  # it may be read-only
    with pytest.raises(UserError, match="elsewhere was prepared with --tokenizer train:400; leave --tokenizer out"):
        Corpus.open(config("elsewhere", tokenizer="bytes"))
    manifest = read_signed(Path("elsewhere/manifest.json"))
    del manifest["sha256s"]
    Path("elsewhere/manifest.json").write_text(signed(manifest))
    with pytest.raises(UserError, match="its preparation was not finished"):
        Corpus.open(config("elsewhere"))


def test_an_altered_manifest_or_tokenizer_is_refused(jsonl):
    folder, _, _ = prepare(config(tokenizer="train:500"))
    path = folder / "manifest.json"
    good = path.read_text()
    for bad in (good[:100], good.replace('"held_out": ', '"held_out": 1'), "[]", "{}"):
        path.write_text(bad)
        with pytest.raises(UserError, match="manifest.json cannot be used"):
            Corpus.open(config(tokenizer="train:500"))
    path.write_text(good)
    path = folder / "tokenizer.tiktoken"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match="tokenizer.tiktoken is missing or was altered"):
        Corpus.open(config(tokenizer="train:500"))


def test_changed_files_are_prepared_anew(jsonl):
    one = Corpus.open(config())
    Path("docs.jsonl").write_text(Path("docs.jsonl").read_text() + json.dumps({"text": "one more"}) + "\n")
    assert Corpus.open(config()).sha256 != one.sha256


def test_a_folder_that_cannot_be_written_is_named(jsonl, monkeypatch):
    Path("file").write_text("")
    with pytest.raises(UserError, match="cannot be written .*use another --data-dir"):
        Corpus.open(config(data_dir="file"))

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.write_atomically", full)
    with pytest.raises(UserError, match="No space left on device.*goes on where this one stopped"):
        Corpus.open(config())


# The rows of a step


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_shuffled_is_a_permutation(n, key):
    assert sorted(shuffled(i, n, key) for i in range(n)) == list(range(n))


def test_shuffled_permutations_are_as_random_as_they_should_be():
    n, keys = 7, 1000
    count = torch.zeros(n, n)
    for key in range(keys):
        for i in range(n):
            count[i, shuffled(i, n, scramble(0, key))] += 1
    chi2 = ((count - keys / n) ** 2 / (keys / n)).sum()
    assert chi2 < 70  # 36 degrees of freedom: less than 1 in 1,000 by chance
    far = [shuffled(i, 10**12, 3) for i in range(1000)]
    assert len(set(far)) == 1000 and min(far) < 10**10 and max(far) > 10**12 - 10**10


def test_the_tokens_of_a_step_depend_on_seed_and_step_alone(jsonl):
    corpus = Corpus.open(config(seed=7))
    x, y = corpus.batch(5, range(4))
    assert x.shape == y.shape == (4, 32) and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, Corpus.open(config(seed=7)).batch(5, range(4))[0])
    assert not torch.equal(x, Corpus.open(config(seed=8)).batch(5, range(4))[0])
    assert not torch.equal(x, corpus.batch(6, range(4))[0])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("reset", [False, True])
def test_ranks_and_micro_batches_read_the_rows_of_one_global_batch(jsonl, ranks, reset):
    corpus = Corpus.open(config(reset_at_documents=reset))
    parts = [corpus.batch(3, range(r * 4 // ranks, (r + 1) * 4 // ranks)) for r in range(ranks)]
    assert all(torch.equal(torch.cat(part), one) for part, one in zip(zip(*parts), corpus.batch(3, range(4))))


def numbered(**settings):
    """A corpus of three parts in which every token is its own place, with documents of 1 to 100 tokens."""
    g, parts = random.Random(0), []
    for i in range(3):
        ends = np.cumsum([g.randint(1, 100) for _ in range(60)])
        parts.append((10_000 * i + np.arange(ends[-1]), np.array([0, *ends[:-1]])))
    tokenizer = Tokenizer()
    tokenizer.lengths = np.ones(30_000)
    held_out = [(np.arange(70), np.array([0]))]
    return Corpus(config(**settings), tokenizer, {"train": parts, "held_out": held_out}, "numbers", ""), parts


def test_an_epoch_reads_every_token_once():
    corpus, parts = numbered(batch_size=1)
    n, orders = len(corpus.training), []
    for epoch in range(3):
        rows = [tuple(corpus.batch(epoch * n + i, range(1))[0][0].tolist()) for i in range(n)]
        assert all(row == tuple(range(row[0], row[0] + 32)) for row in rows)
        read = sorted(token for row in rows for token in row)
        assert len(read) == len(set(read)) == 32 * n
        for i, (tokens, _) in enumerate(parts):  # all but the ends, side by side
            here = [t - 10_000 * i for t in read if t // 10_000 == i]
            assert here == list(range(here[0], here[-1] + 1)) and here[0] < 32 and here[-1] > len(tokens) - 64
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]


def test_rows_reset_at_documents_hold_pieces_of_one_and_an_epoch_reads_all_of_them():
    corpus, parts = numbered(batch_size=1, reset_at_documents=True)
    begins = [10_000 * i + int(s) for i, (_, starts) in enumerate(parts) for s in starts]
    read = []
    for i in range(len(corpus.training)):
        x, y = (z[0].tolist() for z in corpus.batch(i, range(1)))
        scored = [t for t in y if t >= 0]
        assert y == scored + [-100] * (32 - len(scored)) and x == [*range(scored[0] - 1, scored[-1])] + [0] * (
            32 - len(scored)
        )
        assert not set(begins) & set(x[1 : len(scored)])  # but for its first token, which may begin one
        read += scored
    assert sorted(read) == [t for tokens, _ in parts for t in tokens[1:].tolist()]


def test_a_step_of_a_hundred_billion_tokens_is_found_at_once():
    """Of tokens that compute what is asked of them: no list of rows, no permutation is made."""

    class Numbers:
        def __init__(self, n):
            self.n = n

        def __len__(self):
            return self.n

        def __getitem__(self, s):
            return np.arange(s.start, s.stop)

    start = time.process_time()
    tokenizer = Tokenizer()
    tokenizer.lengths = type("Ones", (), {"__getitem__": lambda self, tokens: np.ones(len(tokens))})()
    none = np.empty(0, np.int64)
    parts = {"train": [(Numbers(3000 * 2**25), none)], "held_out": [(Numbers(2049), none)]}
    corpus = Corpus(config(seq_len=2048, batch_size=256), tokenizer, parts, "numbers", "")
    x, _ = corpus.batch(190_000, range(256))
    assert corpus.training.tokens > 10**11 and len(x.unique()) == x.numel()
    assert x.min() < 10**10 and x.max() > 9 * 10**10
    assert time.process_time() - start < 5


# Through the command line


def test_a_run_keeps_its_tokenizer_and_samples_with_it(jsonl, capsys):
    small = "--d-model 16 --n-head 2 --n-layer 1 --chunk 16 --chunk-proj 16 --cms 16,inf --seq-len 64".split()
    command = [*small, "--data", "docs.jsonl", "--tokenizer", "train:400", "--steps", "2", "--out", "mine"]
    assert train.main(command) == 0
    out = capsys.readouterr().out
    assert (
        "400 kinds of tokens" in out and json.loads(Path("mine/config.json").read_text())["model"]["vocab_size"] == 400
    )
    row = json.loads(Path("mine/log.jsonl").read_text().splitlines()[-1])
    ratio = Corpus.open(config(tokenizer="train:400", seq_len=64)).tokens_per_byte
    assert row["val_bpb"] == pytest.approx(row["val_loss"] / np.log(2) * ratio) and ratio < 0.6
    os.rename("data", "gone")  # the run has all that sampling needs
    assert train.main(["--sample", "mine", "--prompt", "Document", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("Document")
    other = Tokenizer.learn(400, ["abracadabra " * 9, *(chr(i) * 99 for i in range(0x100, 0x200))])
    assert other.vocab_size == 400  # as many tokens as the run's, of another text
    for damage in (lambda: Path("mine/tokenizer.tiktoken").unlink(), lambda: other.save(Path("mine"))):
        damage()
        assert train.main(["--sample", "mine"]) == 2
        assert "mine/tokenizer.tiktoken is missing or was altered" in capsys.readouterr().err
    assert train.main(["--resume", "mine"]) == 0 and Path("mine/tokenizer.tiktoken").exists()  # from docs.jsonl, anew
