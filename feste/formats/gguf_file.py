"""GGUF, the file of llama.cpp and ollama: written through the `gguf` package, which defines it.

llama.cpp keeps linear weights as [out, in], so ours are transposed; embeddings and the head are as they are. The head
is always written, also when it is the token embedding. The modern family is its `arcee`, whose rotations pair channels
that are neighbours: queries and keys are written in that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from feste.config import Config
from feste.errors import FesteError
from feste.formats import hf_arcee, hf_gpt2
from feste.formats.vocabulary import Parts, visible

QUANTIZATIONS = ("f32", "f16", "q8_0")
BLOCK = 32  # elements of q8_0 that share a scale
NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens in llama.cpp
LAYER = {"ln_1.weight": "attn_norm.weight", "ln_1.bias": "attn_norm.bias",
         "attn.c_attn.weight": "attn_qkv.weight", "attn.c_attn.bias": "attn_qkv.bias",
         "attn.c_proj.weight": "attn_output.weight", "attn.c_proj.bias": "attn_output.bias",
         "ln_2.weight": "ffn_norm.weight", "ln_2.bias": "ffn_norm.bias",
         "mlp.c_fc.weight": "ffn_up.weight", "mlp.c_fc.bias": "ffn_up.bias",
         "mlp.c_proj.weight": "ffn_down.weight", "mlp.c_proj.bias": "ffn_down.bias"}
TRUNK = {"transformer.wte.weight": "token_embd.weight", "transformer.wpe.weight": "position_embd.weight",
         "transformer.ln_f.weight": "output_norm.weight", "transformer.ln_f.bias": "output_norm.bias",
         "lm_head.weight": "output.weight"}


def require(config: Config, quantization: str):
    """The `gguf` package. FesteError if it is missing, or the shapes do not fit the quantization."""
    try:
        import gguf
    except ImportError as error:
        raise FesteError(f"GGUF needs the gguf package ({error}); install it with: pip install gguf",
                         "format") from None
    if quantization == "q8_0" and config.n_embd % BLOCK:
        raise FesteError(f"q8_0 shares a scale among {BLOCK} elements, and n_embd is {config.n_embd}; use f16",
                         "quantize")
    return gguf


def write(path: Path, name: str, config: Config, params: Mapping[str, np.ndarray], tokenizer: Parts,
          end_of_text: int | None, quantization: str = "f32") -> None:
    """The model and its tokenizer in one file. FesteError as in `require`."""
    gguf = require(config, quantization)
    kinds = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
             "q8_0": gguf.GGMLQuantizationType.Q8_0}
    files = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
             "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer = gguf.GGUFWriter(path, "arcee" if config.architecture.rotary else "gpt2")
    writer.add_name(name)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_heads)
    if config.architecture.rotary:
        writer.add_head_count_kv(config.n_heads)
        writer.add_layer_norm_rms_eps(hf_arcee.RMS_NORM_EPS)
        writer.add_rope_dimension_count(config.head_size)
        writer.add_rope_freq_base(hf_arcee.ROPE_THETA)
        writer.add_vocab_size(config.vocab_size)
    else:
        writer.add_layer_norm_eps(hf_gpt2.LAYER_NORM_EPSILON)
    writer.add_file_type(files[quantization])
    _add_tokenizer(writer, tokenizer, config.vocab_size, end_of_text)
    for tensor_name, tensor in tensors(config, params):
        # Vectors and positions stay float32, as llama.cpp's own converter leaves them: they are small.
        kind = kinds[quantization] if tensor.ndim == 2 and not tensor_name.startswith("position") else kinds["f32"]
        writer.add_tensor(tensor_name, gguf.quants.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(config: Config, params: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors by llama.cpp's names, linear weights as [out, in]."""
    for name, value in params.items():
        layer, _, part = name.removeprefix("transformer.h.").partition(".")
        if name in TRUNK:
            yield TRUNK[name], value
        elif part == "attn.c_attn.weight" and config.architecture.rotary:
            q, k, v = np.split(value.T, 3)
            for kind, tensor in (("q", _neighbours(config, q)), ("k", _neighbours(config, k)), ("v", v)):
                yield f"blk.{layer}.attn_{kind}.weight", tensor
        else:
            yield f"blk.{layer}.{LAYER[part]}", value.T if value.ndim == 2 else value
    if config.tie_weights:
        yield "output.weight", params["transformer.wte.weight"]


def _neighbours(config: Config, weight: np.ndarray) -> np.ndarray:
    """A weight [out, in] of queries or keys with channels j and j + D / 2 of each head side by side."""
    halves = weight.reshape(config.n_heads, 2, config.head_size // 2, config.n_embd)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_tokenizer(writer, tokenizer: Parts, vocab_size: int, end_of_text: int | None) -> None:
    special = {i: text for text, i in tokenizer.special_tokens.items()}
    names = [special.get(i) or visible(token) for i, token in enumerate(tokenizer.tokens)]
    kinds = [CONTROL if i in special else NORMAL for i in range(len(names))]
    unused = range(len(names), vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*names, *(f"[UNUSED{i}]" for i in unused)])
    writer.add_token_types([*kinds, *(UNUSED for _ in unused)])
    writer.add_token_merges([f"{names[a]} {names[b]}" for a, b in tokenizer.merges.tolist()])
    writer.add_add_bos_token(False)
    # llama.cpp takes token 11 for the end of a text if it is not told. Without one we name a byte that no UTF-8 has.
    end = tokenizer.tokens.index(b"\xff") if end_of_text is None else end_of_text
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
