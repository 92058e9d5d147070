"""Weights for others: an export, the folder that `train.py --init-from`, `hope.load` and transformers read.

    model.safetensors, config.json   weights and settings; config.json is signed, so that --init-from sees alterations
    tokenizer.json, ...              what AutoTokenizer reads
    modeling_hope.py, hope.py, ...   the code that transformers runs with trust_remote_code=True
    README.md                        model card, with the figures of the run

Nothing in it tells where on a machine the run was, or what files it read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch

from data import HUB, file_sha256, signed, write_atomically
from hope import Hope

CODE = Path(__file__).parent
MODULES = "hope", "settings", "inner", "kernels", "backend"  # that the model needs
CLASSES = {"AutoConfig": "HopeModelConfig", "AutoModelForCausalLM": "HopeForCausalLM"}
LOCAL = {"out": "", "data_dir": "data", "tokenizer": "", "init_from": "", "device": "auto"}  # settings that hold paths
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [hope, nested-learning]
---
# {arch}, {size:,} parameters

A model of *Nested Learning* ([arXiv 2512.24695](https://arxiv.org/abs/2512.24695)): its memories, and the levels of its
continuum memory system, are written while it reads.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
{prompt}
said = model.generate(prompt, max_new_tokens=100)                 # its state takes the place of a cache
said = model.generate(prompt, max_new_tokens=100, memorize=True)  # the levels also learn from the prompt
loss, state = model.hope.observe(prompt)                          # and from any text, before it goes on
```

It needs torch, einops and safetensors. Prompts of a batch are of one length: there is no padding.
"""

TEXT = """tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
prompt = tokenizer("The ", return_tensors="pt").input_ids"""
TOKENS = """prompt, targets = tasks.make("{task}").rows("test", 0, 0, 4)  # its tokens are numbers; tasks.py of the project"""


def card(model: Hope, about: dict[str, Any], figures: dict[str, Any]) -> str:
    """README.md; `figures` is the run's last row of log.jsonl that has a validation."""
    run, size = about["train"], sum(p.numel() for p in model.parameters())
    rows = {
        "architecture": f"{run['arch']}, {model.config.n_layer} blocks {model.config.memory.d_model} wide",
        "levels that learn in context": ", ".join(f"every {c} tokens" for c in model.config.clocks)
        or "none in its MLPs",
        "data": f"{run['data']}, {about['step'] * run['batch_size'] * run['seq_len']:,} tokens",
        "training": f"{about['step']:,} steps of {run['batch_size']} sequences of {run['seq_len']:,} tokens",
        "optimizer": f"{run['optimizer']}, learning rate up to {run['lr']:g}, {run['schedule']}, seed {run['seed']}",
    }
    units = {"val_loss": "nats per token", "val_bpb": "bits per byte", "val_accuracy": "percent right"}
    held_out = [f"{figures[name]:.4f} {unit}" for name, unit in units.items() if figures.get(name) is not None]
    if held_out:
        rows["held out"] = ", ".join([*held_out, f"at step {figures['step']:,}"])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    prompt = TEXT if not run["data"].startswith("task:") else TOKENS.format(task=run["data"].removeprefix("task:"))
    return CARD.format(arch=run["arch"], size=size, table=table, prompt=prompt)


def write_folder(folder: Path, model: Hope, tokenizer: Any, about: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write an export; `about` is what a run's config.json holds, and its step."""
    named = about["train"]["data"] in ("pydoc", *HUB) or about["train"]["data"].startswith(("hf:", "task:"))
    public = LOCAL | ({} if named else {"data": "files"})
    about = about | {"train": about["train"] | public}
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
    if tokenizer:  # a task has none
        tokenizer.save(folder)
        ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot}
        write_atomically(folder / "generation_config.json", json.dumps(ids | {"do_sample": True}) + "\n")
    imports = rf"^( *from )({'|'.join(MODULES)}) import"  # of each other, as parts of one package
    for name in (*MODULES, "modeling_hope"):
        code = re.sub(imports, r"\1.\2 import", (CODE / f"{name}.py").read_text(), flags=re.M)
        write_atomically(folder / f"{name}.py", code)
    write_atomically(folder / "README.md", card(model, about, figures))
    for_transformers = {
        "model_type": "hope", "architectures": ["HopeForCausalLM"], "dtype": "float32",
        "auto_map": {auto: f"modeling_hope.{name}" for auto, name in CLASSES.items()},
    }  # fmt: skip
    about |= for_transformers | {"model_sha256": file_sha256(folder / "model.safetensors")}
    write_atomically(folder / "config.json", signed(about))
