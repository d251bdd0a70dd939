"""feste trains GPT-2 style transformers from scratch on an ordinary CPU. These are its public names."""

from importlib import import_module
from typing import TYPE_CHECKING

from feste.version import __version__ as __version__

if TYPE_CHECKING:  # what an editor sees
    from feste.config import PRESETS, Config, TrainConfig
    from feste.corpus import shakespeare_text
    from feste.data import Batches, split_tokens
    from feste.errors import FesteError
    from feste.evaluation import bits_per_byte, held_out_loss, perplexity
    from feste.generation import Sampler
    from feste.model import GPT2
    from feste.optim import AdamW, Muon
    from feste.pairs import Pairs, read_pairs
    from feste.run.checkpoint import Checkpoint
    from feste.run.directory import find_checkpoint
    from feste.run.follow import RunReader, read_info, read_rows
    from feste.schedule import learning_rate_at
    from feste.text import read_text
    from feste.tokenizer import BPETokenizer
    from feste.trainer import TrainResult, train_gpt2

_HOME = {
    "config": ("PRESETS", "Config", "TrainConfig"),
    "corpus": ("shakespeare_text",),
    "data": ("Batches", "split_tokens"),
    "errors": ("FesteError",),
    "evaluation": ("bits_per_byte", "held_out_loss", "perplexity"),
    "generation": ("Sampler",),
    "model": ("GPT2",),
    "optim": ("AdamW", "Muon"),
    "schedule": ("learning_rate_at",),
    "pairs": ("Pairs", "read_pairs"),
    "run.checkpoint": ("Checkpoint",),
    "run.directory": ("find_checkpoint",),
    "run.follow": ("RunReader", "read_info", "read_rows"),
    "text": ("read_text",),
    "tokenizer": ("BPETokenizer",),
    "trainer": ("TrainResult", "train_gpt2"),
}

__all__ = sorted(name for names in _HOME.values() for name in names)


def __getattr__(name: str):
    """Import a public name when it is first used: the monitor needs no kernels, the tokenizer no model."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"feste.{module}"), name)
    raise AttributeError(f"module 'feste' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
