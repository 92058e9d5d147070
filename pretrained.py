"""Models from folders, and level stacking (sec. 7.3): a pre-trained Transformer as Hope-Attention.

    load               the model of a run of train.py, or of an export
    from_pretrained    a Llama, Mistral, Qwen2 or GPT-2 model of transformers, its MLPs the first level of every CMS
    pretrained_config, take_over    its two halves: the config without the weights, then the weights
    of_transformers, init_from      the same for `train.py --init-from`, which takes exports as well

`hope.load` and `hope.from_pretrained` are these. The model is in hope.py, what trains it in train.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from data import Tokenizer, UserError, explained, extra, file_sha256, read_signed
from hope import Hope, HopeConfig, MemoryConfig
from settings import require


def load(folder: str | Path) -> Hope:
    """The model of a run of train.py, by its newest checkpoint, or of an export; on the CPU, to read with or to go on.

    Where the run keeps averaged weights (`--ema`) they are those of the model. ValueError for any other folder.
    Nothing is unpickled. Whether files were altered is for `train.py --resume` to check.
    """
    folder = Path(folder)
    exported, checkpoints = folder / "model.safetensors", sorted((folder / "checkpoints").glob("step-*"))
    given = f"{folder} is neither a run with a checkpoint nor an export"
    found = (folder / "config.json").exists() and (exported.exists() or checkpoints)
    require(found, f"{given}; give one that train.py made, such as runs/tiny")
    model = Hope(HopeConfig.from_dict(json.loads((folder / "config.json").read_text())["model"])).eval()
    if exported.exists():
        model.load_state_dict(load_file(exported))
        return model
    from torch.distributed.checkpoint import HuggingFaceStorageReader  # takes a second
    from torch.distributed.checkpoint import load as load_checkpoint

    reader, weights = HuggingFaceStorageReader(str(checkpoints[-1])), {}
    stored = reader.read_metadata().state_dict_metadata
    for name, p in model.named_parameters():
        average = f"EMA.{name}.average"
        weights[average if average in stored else f"model.{name}"] = p.detach()
    load_checkpoint(weights, storage_reader=reader, no_dist=True)  # in place
    return model


@dataclass(frozen=True)
class Family:
    """How one kind of pre-trained model maps to Hope-Attention."""

    settings: dict[str, Any]
    norm_eps: str  # what its config calls it
    requires: dict[str, tuple]  # options of its config, and the values that Hope-Attention can stand for
    column: int  # of OUTER and INNER
    layers: str  # where its blocks are


# Modules of Hope, of Llama's family and of GPT-2's; of several in one place, each is a slice of the rows.
OUTER = {
    "embed": ("model.embed_tokens", "transformer.wte"),
    "embed_position": ("", "transformer.wpe"),
    "norm": ("model.norm", "transformer.ln_f"),
    "head": ("lm_head", "lm_head"),
}
INNER = {
    "norm": ("input_layernorm", "ln_1"),
    "memory.to_q memory.to_k memory.to_v": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn.c_attn"),
    "memory.to_y": ("self_attn.o_proj", "attn.c_proj"),
    "cms.levels.0.norm": ("post_attention_layernorm", "ln_2"),
    "cms.levels.0.w_in": ("mlp.gate_proj mlp.up_proj", "mlp.c_fc"),
    "cms.levels.0.w_out": ("mlp.down_proj", "mlp.c_proj"),
}
LLAMA = Family(
    dict(norm="rms", mlp="swiglu", rotary=True), "rms_norm_eps",
    {"hidden_act": ("silu",), "use_sliding_window": (False,)}, 0, "model.layers",
)  # fmt: skip
GPT2 = Family(
    dict(norm="layer", mlp="gelu", rotary=False), "layer_norm_epsilon",
    {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
     "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}, 1, "transformer.h",
)  # fmt: skip
FAMILIES = {"LlamaForCausalLM": LLAMA, "MistralForCausalLM": LLAMA, "Qwen2ForCausalLM": LLAMA, "GPT2LMHeadModel": GPT2}


def from_pretrained(
    model_or_path: Any, *, cms: Sequence[float] = (64,), cms_rate: Sequence[float] = (0.01,), **overrides: Any
) -> Hope:
    """A pre-trained Transformer as Hope-Attention, its MLPs the start states of a CMS (sec. 7.3).

    The first level of every CMS is the pre-trained MLP. Further levels have the same shape and start with w_out = 0:
    they add nothing until they are written. So with rates 0 the logits are the original's, and with `cms=(inf, 64)`
    the pre-trained MLPs stay as they are and only what is stacked on them is written.

    Args:
        model_or_path: a Llama, Mistral, Qwen2 or GPT-2 language model of transformers, or what its
            `AutoModelForCausalLM.from_pretrained` takes: a name or a folder. The weights are copied, as float32.
        cms, cms_rate: chunk size of every level and inner step sizes, as in HopeConfig. Pre-trained weights bear small
            steps only: SmolLM2-135M gains at 0.01 with chunks of 64, and is badly hurt at 0.1 with chunks of 256.
        overrides: fields of HopeConfig or MemoryConfig that the checkpoint does not fix, such as `wiring`; with a name
            or a folder, anything else is passed on to transformers, such as `gguf_file`.

    Raises ImportError without transformers, and ValueError for a kind of model or an option of its that Hope-Attention
    cannot stand for, or for an override of what the checkpoint fixes.
    """
    known = {f.name for config in (HopeConfig, MemoryConfig) for f in fields(config)}
    others = {name: overrides.pop(name) for name in set(overrides) - known}
    if isinstance(model_or_path, nn.Module):
        require(not others, f"unknown setting {sorted(others)}; see HopeConfig and MemoryConfig for the names")
        model = model_or_path
    else:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise ImportError('transformers is missing; run: pip install "nested-learning-hope[pretrained]"') from None
        model = AutoModelForCausalLM.from_pretrained(model_or_path, **others)
    return take_over(Hope(pretrained_config(model, cms, cms_rate, **overrides)), model)


def pretrained_config(
    model: nn.Module, cms: Sequence[float] = (64,), cms_rate: Sequence[float] = (0.01,), **overrides: Any
) -> HopeConfig:
    """Of what `from_pretrained` makes of a model of transformers, which may be on the meta device."""
    kind = type(model).__name__
    require(kind in FAMILIES, f"cannot take over a {kind}; allowed: {', '.join(FAMILIES)}")
    settings = pretrained_settings(model, FAMILIES[kind])
    fixed = set(overrides) & set(settings)
    require(not fixed, f"the checkpoint fixes {', '.join(sorted(fixed))}; leave out what is fixed")
    return HopeConfig.preset(cms=tuple(cms), cms_rate=tuple(cms_rate), **settings, **overrides)


@torch.no_grad()
def take_over(new: Hope, model: nn.Module) -> Hope:
    """`new`, which has the config of `model`, with its weights."""
    family = FAMILIES[type(model).__name__]
    blocks = [(block, model.get_submodule(family.layers)[i], INNER) for i, block in enumerate(new.blocks)]
    for ours, theirs, names in [(new, model, OUTER), *blocks]:
        for name, columns in names.items():
            if columns[family.column] and (name != "head" or not new.config.tied):
                copy_modules(modules_of(ours, name), modules_of(theirs, columns[family.column]))
    for block in new.blocks:
        for level in block.cms.levels[1:]:
            level.w_out.weight.zero_()
    return new


def pretrained_settings(model: nn.Module, family: Family) -> dict[str, Any]:
    """Fields of HopeConfig and MemoryConfig with which Hope computes what `model` does. ValueError if none do."""
    c, embed = model.config, model.get_input_embeddings().weight
    d_model = c.hidden_size
    # transformers 4 has rope_theta and, for other kinds than the default, rope_scaling; 5 has rope_parameters.
    rope = {"rope_theta": getattr(c, "rope_theta", 10000.0)}
    rope |= (getattr(c, "rope_scaling", None) or {}) | (getattr(c, "rope_parameters", None) or {})
    found = {name: (getattr(c, name, allowed[0]), allowed) for name, allowed in family.requires.items()}
    found["rope_type"] = rope.get("rope_type", rope.get("type", "default")), ("default",)
    found["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0), (1.0,)
    found["head_dim"] = getattr(c, "head_dim", None), (None, d_model / c.num_attention_heads)
    for name, (value, allowed) in found.items():
        require(value in allowed, f"this checkpoint has {name} {value!r}; allowed: {', '.join(map(str, allowed))}")
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    [w_out] = modules_of(model.get_submodule(family.layers)[0], INNER["cms.levels.0.w_out"][family.column])
    return family.settings | dict(
        memory="attention", depth=0, pattern=("memory",), project=True, conv=0, qk_norm=False, y_norm=False,
        vocab_size=len(embed), d_model=d_model, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
        n_kv_head=getattr(c, "num_key_value_heads", None) or 0, window=getattr(c, "sliding_window", None) or 0,
        rope_theta=rope["rope_theta"], n_position=0 if family.settings["rotary"] else c.max_position_embeddings,
        norm_eps=getattr(c, family.norm_eps), bias=any("attn." in name for name in biases),
        mlp_bias=any("mlp." in name for name in biases), cms_hidden=w_out.weight.numel() / d_model**2,
        tied=model.get_output_embeddings().weight is embed,
    )  # fmt: skip


def modules_of(model: nn.Module, names: str) -> list[nn.Module]:
    return [model.get_submodule(name) for name in names.split()]


def copy_modules(ours: list[nn.Module], theirs: list[nn.Module]) -> None:
    """Copy weights and biases; of several modules on one side, the rows are joined and split."""
    for kind in ("weight", "bias"):
        if getattr(theirs[0], kind, None) is None:  # a bias that only we have stays 0
            continue
        turned = kind == "weight" and type(theirs[0]).__name__ == "Conv1D"
        rows = torch.cat([getattr(m, kind).T if turned else getattr(m, kind) for m in theirs])
        targets = [getattr(m, kind) for m in ours]
        for target, part in zip(targets, rows.split([len(t) for t in targets])):
            target.copy_(part)


# ---- For train.py ----


def of_transformers(folder: Path) -> Callable[..., nn.Module] | None:
    """For a folder with a pre-trained model of transformers, what makes that model, on the meta device without weights."""
    path = folder / "config.json"
    with explained(f"{path} cannot be used", "give a folder that --export made, or one of a pre-trained model"):
        about = json.loads(path.read_text()) if path.exists() else {}
        if about.get("model_type", "hope") == "hope":
            return None

    def make(weights: bool = False) -> nn.Module:
        transformers = extra("transformers", f"the model in {folder}")
        with explained(f"{folder} cannot be used", "give a folder that AutoModelForCausalLM loads", Exception):
            auto = transformers.AutoModelForCausalLM
            if weights:
                return auto.from_pretrained(str(folder), local_files_only=True)
            with torch.device("meta"):
                return auto.from_config(transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True))

    return make


def init_from(model: Hope, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Take over the weights of an export, or of a pre-trained model of transformers."""
    if theirs := of_transformers(folder):
        other, size = theirs(weights=True), model.config.vocab_size
        if (rows := len(other.get_input_embeddings().weight)) != size:
            what = f"{folder} has embeddings for {rows:,} kinds of tokens, and the data has {size:,}"
            raise UserError(f"{what}; leave --tokenizer out, so that its own is taken")
        take_over(model, other)
        return
    fix = "give a folder that --export made"
    with explained(f"{folder} cannot be used", fix, Exception):
        about = read_signed(folder / "config.json", fix)
        if file_sha256(folder / "model.safetensors") != about["model_sha256"]:
            raise ValueError("model.safetensors was altered")
        if about["tokenizer_sha256"] != (tokenizer and tokenizer.sha256):
            raise ValueError("its tokenizer is another one; take its own, which is the default")
        model.load_state_dict(load_file(folder / "model.safetensors"))
