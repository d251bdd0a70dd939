"""A model as a directory of Hugging Face's transformers: config.json and safetensors, in and out.

feste's parameters have the names, shapes and layout of transformers' GPT-2, so a tensor goes over as it is. What
differs is the configuration: every field of GPT2Config that changes what is computed is either one that feste has, or
has the one value that feste computes, or is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from feste.config import Config
from feste.errors import FesteError

CONFIG, WEIGHTS, INDEX, PICKLE = ("config.json", "model.safetensors", "model.safetensors.index.json",
                                  "pytorch_model.bin")
TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, CARD = ("tokenizer.json", "tokenizer_config.json",
                                                        "generation_config.json", "README.md")
PREFIX = "transformer."
HEAD = "lm_head.weight"
DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
LAYER_NORM_EPSILON = 1e-5
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")
# Fields that change what is computed, and the values for which it is what feste computes. None stands for a field that
# is not there, whose default in GPT2Config is among them.
COMPUTED = {
    "model_type": ("gpt2",),
    "activation_function": (None, *GELU_TANH),
    "layer_norm_epsilon": (None, LAYER_NORM_EPSILON),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "reorder_and_upcast_attn": (None, False),  # the same function, but not to the bit; nobody ships it switched on
    "add_cross_attention": (None, False),
}


class ModelError(FesteError):
    """A directory that is no model feste can read or write: names it and the reason."""


# ---- the configuration -------------------------------------------------------------------------------------


def config_from(values: Mapping, source: str, tied: bool) -> Config:
    """feste's configuration of a config.json."""
    for name, allowed in COMPUTED.items():
        if values.get(name) not in allowed:
            known = " or ".join(repr(value) for value in allowed if value is not None)
            raise ModelError(f"{source}: {name} is {values.get(name)!r}; feste computes {known}")
    inner, width = values.get("n_inner"), _integer(values, "n_embd", source)
    if inner not in (None, 4 * width):
        raise ModelError(f"{source}: n_inner is {inner!r}; feste computes 4 x n_embd, {4 * width}")
    rates = {name: values.get(name, 0.1) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(rates.values())) > 1:
        raise ModelError(f"{source}: {', '.join(f'{n} is {v}' for n, v in rates.items())}; feste has one rate for all")
    return Config(vocab_size=_integer(values, "vocab_size", source), n_embd=width,
                  n_layers=_integer(values, "n_layer", source), n_heads=_integer(values, "n_head", source),
                  block_size=_integer(values, "n_positions", source), dropout=float(rates["embd_pdrop"]),
                  tie_weights=tied)


def config_to(config: Config, end_of_text: int | None) -> dict:
    """The config.json of a configuration."""
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
            "n_embd": config.n_embd, "n_layer": config.n_layers, "n_head": config.n_heads,
            "n_positions": config.block_size, "n_ctx": config.block_size, "n_inner": None,
            "activation_function": "gelu_new", "layer_norm_epsilon": LAYER_NORM_EPSILON, "initializer_range": 0.02,
            "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "resid_pdrop": config.dropout,
            "scale_attn_weights": True, "use_cache": True, "tie_word_embeddings": config.tie_weights,
            "bos_token_id": end_of_text, "eos_token_id": end_of_text, "torch_dtype": "float32"}


def _integer(values: Mapping, name: str, source: str) -> int:
    value = values.get(name)
    if type(value) is not int or value < 1:
        raise ModelError(f"{source}: {name} is {value!r}, and should be a positive whole number")
    return value


# ---- reading -----------------------------------------------------------------------------------------------


def is_model(path: Path) -> bool:
    """Whether a path looks like a directory of transformers."""
    return (path / CONFIG).is_file()


def read_config(directory: str | os.PathLike) -> tuple[Config, list[Path]]:
    """The configuration of a directory, and the files of its tensors. ModelError if feste cannot compute it."""
    directory = Path(directory)
    values = _read_json(directory / CONFIG)
    files = _weight_files(directory)
    names = {_our_name(name) for file in files for name in _names(file)}
    tied = HEAD not in names or values.get("tie_word_embeddings", True) is True
    return config_from(values, str(directory / CONFIG), tied), files


def read_tensors(files: list[Path], into: Mapping[str, np.ndarray]) -> None:
    """Fill arrays by feste's names from the files of a model. ModelError for tensors that lack, are too many, or have
    another shape."""
    missing = set(into)
    for file in files:
        for name, tensor in _tensors(file):
            ours = _our_name(name)
            if _is_buffer(ours) or (ours == HEAD and HEAD not in into):
                continue  # a mask; or the token embedding once more
            if ours not in missing:
                raise ModelError(f"{file} has a tensor {name!r} that a GPT-2 of this configuration lacks")
            if into[ours].shape != tensor.shape:
                raise ModelError(f"{file}: {name} has the shape {tensor.shape}, and should have {into[ours].shape}")
            into[ours][...] = tensor
            missing.remove(ours)
    if missing:
        raise ModelError(f"{files[0].parent} lacks {len(missing)} tensors, among them {min(missing)}")


def _weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if (directory / INDEX).exists():
        shards = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{directory / INDEX} has no weight_map")
        names = sorted(set(map(str, shards.values())))
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{directory / INDEX} names files outside of its directory")
        return [directory / name for name in names]
    if (directory / PICKLE).exists():
        raise ModelError(f"{directory} has its weights in {PICKLE}, a pickle, which may run any code when it is read; "
                         "convert it to safetensors: load it with transformers and call save_pretrained")
    raise ModelError(f"{directory} has neither {WEIGHTS} nor {INDEX}")


def _our_name(name: str) -> str:
    """Some files leave out the prefix of the trunk."""
    return name if name.startswith((PREFIX, "lm_head.")) else PREFIX + name


def _is_buffer(name: str) -> bool:
    """The causal mask, which older files hold in every layer."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def _names(file: Path) -> list[str]:
    with _opened(file) as tensors:
        return list(tensors.keys())


def _tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file as float32, one at a time where their type is one that NumPy knows."""
    with _opened(file) as tensors:
        kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        unknown = {kind for kind in kinds.values() if kind not in (*DTYPES, "BF16")} - {"U8", "BOOL"}
        if unknown:
            raise ModelError(f"{file} holds tensors of type {', '.join(sorted(unknown))}; feste reads F32, F16, BF16")
        if "BF16" not in kinds.values():
            for name, kind in kinds.items():
                if kind in DTYPES:
                    yield name, tensors.get_tensor(name).astype(np.float32, copy=False)
            return
    for name, tensor in deserialize(file.read_bytes()):  # NumPy has no bfloat16: the upper half of a float32
        if tensor["dtype"] == "BF16":
            halves = np.frombuffer(tensor["data"], "<u2").astype(np.uint32)
            yield name, (halves << 16).view(np.float32).reshape(tensor["shape"])
        elif tensor["dtype"] in DTYPES:
            yield name, np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])


def _opened(file: Path):
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds no JSON object")
    return values


# ---- writing -----------------------------------------------------------------------------------------------


def write(directory: Path, config: Config, params: Mapping[str, np.ndarray], tokenizer_json: str,
          end_of_text: int | None, end_of_text_token: str | None, card: str) -> None:
    """A directory that AutoModelForCausalLM.from_pretrained and AutoTokenizer take as it is."""
    save_file({name: np.ascontiguousarray(value) for name, value in params.items()}, directory / WEIGHTS,
              metadata={"format": "pt"})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False, "add_prefix_space": False, "bos_token": end_of_text_token,
        "eos_token": end_of_text_token, "unk_token": end_of_text_token}
    generation_config = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "do_sample": True,
                         "temperature": 0.8}
    texts = {CONFIG: json.dumps(config_to(config, end_of_text), indent=2), TOKENIZER: tokenizer_json,
             TOKENIZER_CONFIG: json.dumps(tokenizer_config, indent=2),
             GENERATION_CONFIG: json.dumps(generation_config, indent=2), CARD: card}
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
