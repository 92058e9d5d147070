"""Does writing the CMS in context pay? Trained with `train.train`, measured on streams four times as long as in training.

pytest -m slow tests/test_cms_pays.py -s        about 15 minutes on two cores; prints every figure
"""

import inspect
import math
from pathlib import Path

import pytest
import torch

import hope
import train
from data import pydoc_text

SEEDS, STREAM = (0, 1, 2), 2048


def streams(text: bytes, n: int = 12):
    """n streams of STREAM bytes, evenly spread over a text: tokens and targets (n, STREAM)."""
    starts = [i * (len(text) - STREAM - 1) // (n - 1) for i in range(n)]
    x = torch.stack([torch.tensor(list(text[s : s + STREAM + 1])) for s in starts])
    return x[:, :-1], x[:, 1:]


def bits_per_byte(model: hope.Hope, text: bytes, levels=None) -> float:
    with torch.no_grad():
        return model.observe(*streams(text), levels=levels)[0].item() / math.log(2)


@pytest.mark.slow
def test_cms_writes_pay_on_held_out_text_and_on_text_of_another_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = {
        "held out": pydoc_text()[1].encode(),
        "another kind": "".join(map(inspect.getsource, (__import__("argparse"), __import__("subprocess")))).encode(),
    }
    rows = []
    for seed in SEEDS:
        row = {}
        for writes in (True, False):
            config = train.TrainConfig(seed=seed, out=f"{seed}-{writes}", eval_every=200, save_every=200)
            model_config = hope.HopeConfig.preset("tiny", vocab_size=256, **({} if writes else {"cms_rate": (0.0,)}))
            assert train.train(config, model_config) == 0
            _, model, _, _ = train.trained(Path(config.out), "cpu")
            for name, text in texts.items():
                if writes:
                    row[name, "writes on"] = bits_per_byte(model, text)
                    row[name, "switched off"] = bits_per_byte(model, text, levels=[])
                else:
                    row[name, "never written"] = bits_per_byte(model, text)
        rows.append(row)
        with capsys.disabled():
            print(
                f"\nseed {seed}: " + "; ".join(f"{name}, {kind} {v:.3f}" for (name, kind), v in row.items()), flush=True
            )
    for row in rows:
        for name in texts:
            assert row[name, "writes on"] < row[name, "switched off"] - 0.1, (name, row)
            assert row[name, "writes on"] < row[name, "never written"], (name, row)
