"""Hope remembers: it finds what a sequence has shown again, for the reasons its defaults are chosen for."""

import importlib.util
import zlib
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("recall_bench", Path(__file__).parent / "bench/recall.py")
recall = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recall)


@pytest.mark.parametrize("name, begin, digest", [
    ("recall", [10, 23, 2, 18, 8, 16, 0, 30, 2, 18, 0, 30], 4294207680),
    ("mqar", [46, 88, 41, 90, 14, 94, 36, 125, 1, 107, 40, 121], 2094971453),
])  # fmt: skip
def test_rows_of_earlier_figures_are_still_made(name, begin, digest):
    tokens, targets = recall.make(f"old-{name}").rows("test", 1, 7, 1)
    assert tokens[0, :12].tolist() == begin
    assert zlib.crc32(tokens.numpy().tobytes() + targets.numpy().tobytes()) == digest
    others = [recall.make(spec).rows("test", 1, 7, 1)[0] for spec in (name, f"old-{name},length=128")]
    assert not torch.equal(tokens, others[0]) and torch.equal(tokens[0, :16], others[1][0, :16])


def test_the_causes_of_bad_recall_show_in_a_single_memory():
    rows = {}
    for why, run in recall.WHY.items():
        torch.manual_seed(0)
        rows[why] = list(run())
    slow = [row["found"] for row in rows["gates"] if row["eta_bias"] == -2.0]
    assert slow[0] < 0.1 and slow[-1] > 0.4
    hidden = {(row["origin"], row["hidden_rate"]): row for row in rows["hidden"]}
    assert hidden["zero", 1.0]["features_left"] < 0.6 and hidden["start", 1.0]["features_left"] > 0.9
    assert hidden["zero", 1.0]["found"] < 0.6 * hidden["start", 1.0]["found"]
    late = {row["origin"]: row["found"] for row in rows["decay"] if row["tokens_before"] == 256}
    assert late["zero"] < 0.05 and late["start"] > 0.4
    again = {kind: [row["found"] for row in rows["chunk"] if row["objective"] == kind] for kind in ("dot", "l2")}
    assert min(again["dot"]) > 0.7 and again["l2"][1] < 0.5 * again["l2"][0]
    keys = {row["own_input"]: row["cosine_of_key_and_value"] for row in rows["keys"]}
    assert keys[False] > 0.4 and abs(keys[True]) < 0.1


def test_hope_finds_values_by_their_keys_again():
    """Guessing among the four values of a sequence is right in 25 of 100 cases; the model before had 22 after 600 steps."""
    torch.set_flush_denormal(True)
    assert recall.train("recall", "hope", seed=0, steps=300, stop=85.0).accuracy > 80
