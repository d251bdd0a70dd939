"""A model as a directory of Hugging Face's transformers: config.json and safetensors, in and out.

How each family's configuration and tensors look there is in a module of its own: `hf_gpt2`, `hf_arcee`.
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
from feste.formats import hf_arcee, hf_gpt2
from feste.formats.fields import ModelError

CONFIG, WEIGHTS, INDEX, PICKLE = ("config.json", "model.safetensors", "model.safetensors.index.json",
                                  "pytorch_model.bin")
TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, CARD = ("tokenizer.json", "tokenizer_config.json",
                                                        "generation_config.json", "README.md")
HEAD = "lm_head.weight"
LAYOUTS = {"gpt2": hf_gpt2, "modern": hf_arcee}  # by Config.arch
DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
# ---- reading -----------------------------------------------------------------------------------------------


def is_model(path: Path) -> bool:
    """Whether a path looks like a directory of transformers."""
    return (path / CONFIG).is_file()


def read_config(directory: str | os.PathLike) -> tuple[Config, list[Path]]:
    """The configuration of a directory, and the files of its tensors. ModelError if feste cannot compute it."""
    directory = Path(directory)
    values = _read_json(directory / CONFIG)
    layout = next((layout for layout in LAYOUTS.values() if values.get("model_type") == layout.MODEL_TYPE), None)
    if layout is None:
        known = " or ".join(repr(layout.MODEL_TYPE) for layout in LAYOUTS.values())
        raise ModelError(f"{directory / CONFIG}: model_type is {values.get('model_type')!r}; feste computes {known}")
    files = _weight_files(directory)
    headless = HEAD not in {name for file in files for name in _names(file)}
    tied = headless or values.get("tie_word_embeddings", layout.TIED_BY_DEFAULT) is True
    return layout.config_from(values, str(directory / CONFIG), tied), files


def read_tensors(files: list[Path], config: Config, params: Mapping[str, np.ndarray]) -> None:
    """Fill a model's parameters from the files of a model. ModelError for tensors that lack, are too many, or have
    another shape."""
    layout = LAYOUTS[config.arch]
    into = layout.views(config, params)
    missing = set(into)
    for file in files:
        for name, tensor in _tensors(file):
            ours = name if name.startswith((layout.PREFIX, HEAD)) else layout.PREFIX + name  # some leave it out
            if layout.is_buffer(ours) or (ours == HEAD and HEAD not in into):
                continue  # a mask; or the token embedding once more
            if ours not in missing:
                raise ModelError(f"{file} has a tensor {name!r} that a model of this configuration lacks")
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
    layout = LAYOUTS[config.arch]
    save_file({name: np.ascontiguousarray(value) for name, value in layout.views(config, params).items()},
              directory / WEIGHTS, metadata={"format": "pt"})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False, "add_prefix_space": False, "bos_token": end_of_text_token,
        "eos_token": end_of_text_token, "unk_token": end_of_text_token}
    generation_config = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "do_sample": True,
                         "temperature": 0.8}
    texts = {CONFIG: json.dumps(layout.config_to(config, end_of_text), indent=2), TOKENIZER: tokenizer_json,
             TOKENIZER_CONFIG: json.dumps(tokenizer_config, indent=2),
             GENERATION_CONFIG: json.dumps(generation_config, indent=2), CARD: card}
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
