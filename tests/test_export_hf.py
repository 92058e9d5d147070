"""A run's export as transformers reads it, in a process that knows the folder and no file of this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hope
import train

pytest.importorskip("transformers", reason='needs: pip install "nested-learning-hope[pretrained]"')
SMALL = "--d-model 16 --n-head 2 --n-layer 2 --chunk 8 --chunk-proj 8 --cms-hidden 1 --cms 8,16,inf --seq-len 64 --steps 2 --data my/text.txt".split()  # fmt: skip


@pytest.fixture(scope="module", params=["hope", "hope-attention"])
def exported(request, tmp_path_factory):
    """The export of a short run, moved to where the run is not."""
    folder = tmp_path_factory.mktemp("somewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("my").mkdir()
        Path("my/text.txt").write_text("the memory reads what the memory wrote\n" * 200)
        assert train.main([*SMALL, "--arch", request.param, "--out", "runs/small"]) == 0
        assert train.main(["--export", "runs/small"]) == 0
        Path("runs/small/export").rename("elsewhere")
    return folder / "elsewhere"


def by_transformers(folder: Path, code: str) -> dict:
    """What `code` puts into `found`, run on the model of a folder."""
    before = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
x = torch.arange(60).reshape(2, 30) % 97 + 1
found = {}
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", f"{before}\n{code}\nprint(json.dumps(found))", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_transformers_reads_says_and_learns_what_the_model_does(exported):
    code = """
import hope as other  # transformers took the copy beside the weights, whatever is installed
found["own"] = type(model.hope).__module__ != other.__name__
with torch.no_grad():
    found["logits"] = model(x).logits.tolist()
    first = model(x[:, :11])
    found["rest"] = model(x[:, 11:], state=first.state).logits.tolist()
    found["loss"] = model(x, labels=x).loss.item()
how = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
found["cached"] = model.generate(x, **how).tolist()
found["uncached"] = model.generate(x, use_cache=False, **how).tolist()
found["memorized"] = model.generate(x, memorize=True, **how).tolist()
found["beams"] = model.generate(x, num_beams=3, **how).tolist()
found["beams uncached"] = model.generate(x, num_beams=3, use_cache=False, **how).tolist()
set_seed(0)
found["drawn"] = len(set(map(tuple, model.generate(x[:1], max_new_tokens=20, do_sample=True, num_return_sequences=4).tolist())))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
found["text"] = tokenizer.decode(tokenizer("naïve memory")["input_ids"])
"""
    found = by_transformers(exported, code)
    model = hope.load(exported)
    x = torch.arange(60).reshape(2, 30) % 97 + 1
    with torch.no_grad():
        logits = model(x)[0]
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found["rest"]), logits[:, 11:], rtol=0, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert abs(found["loss"] - expected) < 1e-5
    assert found["cached"] == found["uncached"] and found["beams"] == found["beams uncached"]
    for name, memorize in (("cached", False), ("memorized", True)):
        said = model.generate(x, 20, temperature=0, memorize=memorize)
        assert found[name] == torch.cat([x, said], 1).tolist()
    assert found["own"] and found["drawn"] > 1 and found["text"] == "naïve memory"


def test_what_is_not_supported_is_refused_in_words(exported):
    code = """
padded = torch.ones_like(x); padded[0, :3] = 0
for name, how in (("padding", dict(attention_mask=padded)), ("labels", dict(labels=x, memorize=True))):
    try:
        model(x, **how)
    except ValueError as e:
        found[name] = str(e)
"""
    found = by_transformers(exported, code)
    assert "reads no padding; give prompts of one length" in found["padding"]
    assert "leave labels out" in found["labels"]


def test_the_folder_says_what_the_run_was_and_not_where(exported):
    card, row = (exported / "README.md").read_text(), json.loads((exported / "config.json").read_text())
    log = (exported.parent / "runs/small/log.jsonl").read_text().splitlines()
    bits = next(r["val_bpb"] for r in map(json.loads, reversed(log)) if "val_bpb" in r)
    assert f"{bits:.4f} bits per byte, at step 2" in card and "| data | files, 256 tokens |" in card
    assert row["train"]["data"] == "files" and row["auto_map"]["AutoConfig"] == "modeling_hope.HopeModelConfig"
    for path in exported.iterdir():
        raw = path.read_bytes()
        assert not [
            word for word in (b"my/text", b"runs/small", str(exported.parent).encode(), b"/work/") if word in raw
        ]


def test_an_export_is_still_what_a_run_starts_from(exported, monkeypatch):
    monkeypatch.chdir(exported.parent)
    start = [
        "--init-from",
        str(exported),
        "--data",
        "my/text.txt",
        "--seq-len",
        "64",
        "--steps",
        "1",
        "--out",
        "runs/on",
    ]
    assert train.main(start) == 0 and train.main(["--sample", "runs/on", "--max-new-tokens", "3"]) == 0
