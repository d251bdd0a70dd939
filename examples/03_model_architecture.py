"""The architecture of the four models: where their parameters live, and one forward pass.

A GPT-2 block reads the residual stream x twice and adds to it twice:

    x = x + c_proj(attention(c_attn(ln_1(x))))       tokens exchange information
    x = x + c_proj(gelu(c_fc(ln_2(x))))              each token thinks for itself

so a block has 12 C^2 weights: 3 C^2 for queries, keys and values, C^2 for their projection, 8 C^2 for the two
layers of the MLP. Embedding and head have V C each, which is most of a small model.
"""

import time
from collections import Counter

import numpy as np

from feste import GPT2, PRESETS
from feste.params import ParameterTable

PARTS = {"wte": "token embedding", "wpe": "position embedding", "attn": "attention", "mlp": "MLP", "ln_": "layernorms",
         "lm_head": "head"}
CLAIMED = {"tiny": "~50K", "small": "~200K", "medium": "~4M", "gpt2": "~163M"}


def part_of(name: str) -> str:
    return next(title for key, title in PARTS.items() if key in name)


def describe(preset) -> None:
    c, table = preset.model, ParameterTable(preset.model)
    print(f"{preset.name}: {preset.summary}")
    print(f"  V{c.vocab_size} C{c.n_embd} L{c.n_layers} H{c.n_heads} (heads of {c.head_size}) T{c.block_size}")
    counts = Counter()
    for p in table:
        counts[part_of(p.name)] += p.size
    for title, count in counts.most_common():
        print(f"  {title:18} {count:>12,}  {count / table.size:6.1%}")
    print(f"  {'total':18} {table.size:>12,}  (the ancestor's guide said {CLAIMED[preset.name]})")


def time_forward(preset) -> None:
    c = preset.model
    model, ids = GPT2(c), np.zeros((1, c.block_size), np.int32)
    model.forward(ids)  # takes the memory
    begun = time.perf_counter()
    logits = model.forward(ids)
    milliseconds = 1000 * (time.perf_counter() - begun)
    print(f"  one forward pass over {c.block_size} tokens: {milliseconds:.2f} ms -> logits {logits.shape}\n")


if __name__ == "__main__":
    for name in CLAIMED:
        describe(PRESETS[name])
        time_forward(PRESETS[name])
