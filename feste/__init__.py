"""feste trains GPT-2 style transformers from scratch on an ordinary CPU. These are its public names."""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "Config": "config", "TrainConfig": "config", "PRESETS": "config",
    "GPT2": "model",
    "BPETokenizer": "tokenizer",
    "AdamW": "optim",
    "Checkpoint": "checkpoint",
    "train_gpt2": "trainer",
}

__all__ = ["GPT2", "PRESETS", "AdamW", "BPETokenizer", "Checkpoint", "Config", "TrainConfig", "train_gpt2"]


def __getattr__(name: str):
    """Import a public name when it is first used: the monitor needs no kernels, the tokenizer no model."""
    if name not in _HOME:
        raise AttributeError(f"module 'feste' has no attribute {name!r}")
    return getattr(import_module(f"feste.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
