"""The modern family as transformers has it: ArceeForCausalLM.

There linear weights are [out, in], and query, key and value are three: the tensors are views of feste's parameters. Of
grouped heads, longer rotations and biases, all of which an ArceeConfig may ask for, feste computes none.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from feste.config import Config
from feste.formats.fields import ModelError, integer, require_computed

MODEL_TYPE, PREFIX, TIED_BY_DEFAULT = "arcee", "model.", False
RMS_NORM_EPS, ROPE_THETA = 1e-5, 10_000.0
COMPUTED = {
    "hidden_act": (None, "relu2"),
    "rms_norm_eps": (None, RMS_NORM_EPS),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "rope_scaling": (None,),
    "rope_theta": (None, ROPE_THETA),
}


def config_from(values: Mapping, source: str, tied: bool) -> Config:
    """feste's configuration of a config.json."""
    require_computed(values, COMPUTED, source)
    rope = values.get("rope_parameters") or {}
    require_computed(rope, {"rope_type": (None, "default"), "rope_theta": (None, ROPE_THETA)}, source)
    width, heads = integer(values, "hidden_size", source), integer(values, "num_attention_heads", source)
    follows = {"intermediate_size": 4 * width, "num_key_value_heads": heads, "head_dim": width // heads}
    for name, computed in follows.items():
        if values.get(name, computed) not in (None, computed):
            raise ModelError(f"{source}: {name} is {values[name]!r}; with hidden_size {width} and num_attention_heads "
                             f"{heads} feste computes {computed}")
    return Config(vocab_size=integer(values, "vocab_size", source), n_embd=width,
                  n_layers=integer(values, "num_hidden_layers", source), n_heads=heads,
                  block_size=integer(values, "max_position_embeddings", source),
                  dropout=float(values.get("attention_dropout", 0.0)), tie_weights=tied, arch="modern")


def config_to(config: Config, end_of_text: int | None) -> dict:
    """The config.json of a configuration."""
    return {"architectures": ["ArceeForCausalLM"], "model_type": MODEL_TYPE, "vocab_size": config.vocab_size,
            "hidden_size": config.n_embd, "intermediate_size": 4 * config.n_embd, "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_heads, "head_dim": config.head_size,
            "max_position_embeddings": config.block_size, "hidden_act": "relu2", "rms_norm_eps": RMS_NORM_EPS,
            "rope_theta": ROPE_THETA, "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
            "attention_bias": False, "mlp_bias": False, "attention_dropout": config.dropout, "initializer_range": 0.02,
            "use_cache": True, "tie_word_embeddings": config.tie_weights, "bos_token_id": end_of_text,
            "eos_token_id": end_of_text, "pad_token_id": None, "torch_dtype": "float32"}


def views(config: Config, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters under transformers' names and in its layout: views, to read from or to write into."""
    C = config.n_embd
    found = {"model.embed_tokens.weight": params["transformer.wte.weight"]}
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}", f"transformer.h.{i}"
        qkv = params[f"{ours}.attn.c_attn.weight"].T
        found |= {f"{theirs}.input_layernorm.weight": params[f"{ours}.ln_1.weight"]}
        found |= {f"{theirs}.self_attn.{name}_proj.weight": qkv[part * C:(part + 1) * C]
                  for part, name in enumerate("qkv")}
        found |= {f"{theirs}.self_attn.o_proj.weight": params[f"{ours}.attn.c_proj.weight"].T,
                  f"{theirs}.post_attention_layernorm.weight": params[f"{ours}.ln_2.weight"],
                  f"{theirs}.mlp.up_proj.weight": params[f"{ours}.mlp.c_fc.weight"].T,
                  f"{theirs}.mlp.down_proj.weight": params[f"{ours}.mlp.c_proj.weight"].T}
    found["model.norm.weight"] = params["transformer.ln_f.weight"]
    if not config.tie_weights:
        found["lm_head.weight"] = params["lm_head.weight"]
    return found


def is_buffer(name: str) -> bool:
    """The table of frequencies, which older files of the kind hold."""
    return name.endswith(".rotary_emb.inv_freq")
