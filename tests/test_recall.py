"""Hope remembers: it finds what a sequence has shown again, for the reasons its defaults are chosen for."""

import importlib.util
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("recall_bench", Path(__file__).parent / "bench/recall.py")
recall = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recall)


@pytest.mark.parametrize("name", recall.TASKS)
def test_rows_are_a_function_of_their_number_and_ask_for_values_that_were_shown(name):
    tokens, targets = recall.rows(name, recall.TRAIN, 0, 5, 20)
    again, _ = recall.rows(name, recall.TRAIN, 0, 15, 10)
    assert torch.equal(tokens[10:], again)
    assert not torch.equal(tokens, recall.rows(name, recall.REPORT, 0, 5, 20)[0])
    n = recall.TASKS[name].pairs
    for row, asked in zip(tokens, targets):
        shown = dict(zip(row[: 2 * n : 2].tolist(), row[1 : 2 * n : 2].tolist()))
        at = (asked != -100).nonzero().flatten()
        assert len(at) >= n and at[0] >= 2 * n
        assert all(shown[row[i].item()] == asked[i] for i in at)


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
    assert recall.train("small", "hope", seed=0, steps=300, stop=85.0).accuracy > 80
