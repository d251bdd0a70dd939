"""GPT-2 as transformers has it: GPT2LMHeadModel.

feste's parameters have its names, shapes and layout, so a tensor goes over as it is. What differs is the configuration:
every field of GPT2Config that changes what is computed is either one that feste has, or has the one value that feste
computes, or is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from feste.config import Config
from feste.formats.fields import ModelError, integer, require_computed

MODEL_TYPE, PREFIX, TIED_BY_DEFAULT = "gpt2", "transformer.", True
LAYER_NORM_EPSILON = 1e-5
# Fields that change what is computed, and the values for which it is what feste computes. None stands for a field that
# is not there, whose default in GPT2Config is among them.
COMPUTED = {
    "activation_function": (None, "gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (None, LAYER_NORM_EPSILON),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "reorder_and_upcast_attn": (None, False),  # the same function, but not to the bit; nobody ships it switched on
    "add_cross_attention": (None, False),
}


def config_from(values: Mapping, source: str, tied: bool) -> Config:
    """feste's configuration of a config.json."""
    require_computed(values, COMPUTED, source)
    inner, width = values.get("n_inner"), integer(values, "n_embd", source)
    if inner not in (None, 4 * width):
        raise ModelError(f"{source}: n_inner is {inner!r}; feste computes 4 x n_embd, {4 * width}")
    rates = {name: values.get(name, 0.1) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(rates.values())) > 1:
        raise ModelError(f"{source}: {', '.join(f'{n} is {v}' for n, v in rates.items())}; feste has one rate for all")
    return Config(vocab_size=integer(values, "vocab_size", source), n_embd=width,
                  n_layers=integer(values, "n_layer", source), n_heads=integer(values, "n_head", source),
                  block_size=integer(values, "n_positions", source), dropout=float(rates["embd_pdrop"]),
                  tie_weights=tied)


def config_to(config: Config, end_of_text: int | None) -> dict:
    """The config.json of a configuration."""
    return {"architectures": ["GPT2LMHeadModel"], "model_type": MODEL_TYPE, "vocab_size": config.vocab_size,
            "n_embd": config.n_embd, "n_layer": config.n_layers, "n_head": config.n_heads,
            "n_positions": config.block_size, "n_ctx": config.block_size, "n_inner": None,
            "activation_function": "gelu_new", "layer_norm_epsilon": LAYER_NORM_EPSILON, "initializer_range": 0.02,
            "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "resid_pdrop": config.dropout,
            "scale_attn_weights": True, "use_cache": True, "tie_word_embeddings": config.tie_weights,
            "bos_token_id": end_of_text, "eos_token_id": end_of_text, "torch_dtype": "float32"}


def views(config: Config, params: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The parameters under transformers' names, which are feste's."""
    return params


def is_buffer(name: str) -> bool:
    """The causal mask, which older files hold in every layer."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))
