"""Hope as a model of Hugging Face's transformers, beside its weights in a folder that `train.py --export` wrote.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The other modules are copies of the project's. Instead of a cache of keys and values the model carries a `HopeState`:
its memories are written as it reads. With `memorize=True`, in `forward` and `generate`, its continuum memory system
learns from the prompt as well. `model.hope` is the model itself, with `observe`, `stream` and the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .hope import Hope, HopeConfig, HopeState, token_loss


class HopeModelConfig(PretrainedConfig):
    """`model` holds the fields of hope.HopeConfig; the rest says what it was trained on."""

    model_type = "hope"

    def __init__(self, model: dict[str, Any] | None = None, **others: Any):
        self.model = model or {}
        super().__init__(**others)
        if model:
            self.vocab_size, self.num_hidden_layers = model["vocab_size"], model["n_layer"]
            self.hidden_size, self.num_attention_heads = model["memory"]["d_model"], model["memory"]["n_head"]


@dataclass
class HopeOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None  # (b, t, vocab_size), or (b, 1, vocab_size) of a prompt that was memorised
    state: HopeState | None = None


class HopeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HopeModelConfig
    base_model_prefix = "hope"
    _no_split_modules = ["Block"]
    _is_stateful = True  # what was read cannot be taken back

    def __init__(self, config: HopeModelConfig):
        super().__init__(config)
        self.hope = Hope(HopeConfig.from_dict(config.model))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass  # Hope has set its start values

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.hope.embed

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return self.hope.head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self, input_ids: Tensor, state: HopeState | None = None, labels: Tensor | None = None,
        attention_mask: Tensor | None = None, memorize: bool = False, use_cache: bool | None = None, **others: Any,
    ) -> HopeOutput:  # fmt: skip
        """input_ids: (b, t) tokens that follow `state`; labels as everywhere in transformers, shifted here."""
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("Hope reads no padding; give prompts of one length at a time")
        if memorize and input_ids.shape[1] > 1:
            if labels is not None:
                raise ValueError("memorize=True yields no loss; leave labels out, or call hope.observe")
            _, state = self.hope.observe(input_ids[:, :-1], input_ids[:, 1:], state)
            input_ids = input_ids[:, -1:]
        logits, state = self.hope(input_ids, state)
        loss = None
        if labels is not None:
            loss = token_loss(logits[:, :-1], labels[:, 1:]).sum() / (labels[:, 1:] != -100).sum().clamp(min=1)
        return HopeOutput(loss, logits, None if use_cache is False else state)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: HopeState | None = None, begun: bool = False, memorize: bool = False,
        attention_mask: Tensor | None = None, use_cache: bool | None = None, **others: Any,
    ) -> dict[str, Any]:  # fmt: skip
        new = input_ids[:, -1:] if begun else input_ids
        return dict(input_ids=new, state=state, memorize=memorize, attention_mask=attention_mask, use_cache=use_cache)

    def _update_model_kwargs_for_generation(
        self, outputs: HopeOutput, model_kwargs: dict[str, Any], *others: Any, **more: Any
    ) -> dict[str, Any]:
        if outputs.state is not None:
            model_kwargs |= {"state": outputs.state, "begun": True}
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *others, **more)

    @staticmethod
    def _reorder_cache(state: HopeState, beams: Tensor) -> HopeState:
        return state.select(beams)
