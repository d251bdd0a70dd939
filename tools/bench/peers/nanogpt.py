"""nanoGPT's recipe for a CPU, in PyTorch: `python tools/bench/peers/nanogpt.py TEXT`. It loads nothing of feste.

From the facts of its README and config (karpathy/nanoGPT, train_shakespeare_char with the flags for a CPU): characters,
4 layers of 4 heads and 128 channels, 64 characters of context, 12 sequences a step, 2,000 steps, AdamW with betas 0.9
and 0.99 and decay 0.1 of matrices, 1e-3 after 100 steps of warm-up and by a cosine to 1e-4, clipping at 1, no dropout,
no biases, the head tied to the embedding. The first nine tenths are for training; the loss is that of all the rest.
"""

from __future__ import annotations

import math
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

LAYERS, HEADS, CHANNELS, CONTEXT, BATCH, STEPS = 4, 4, 128, 64, 12, 2000
RATE, LEAST_RATE, WARMUP, BETAS, DECAY, CLIP = 1e-3, 1e-4, 100, (0.9, 0.99), 0.1, 1.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(CHANNELS, bias=False), nn.LayerNorm(CHANNELS, bias=False)
        self.c_attn = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False)
        self.attn_proj = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.c_fc = nn.Linear(CHANNELS, 4 * CHANNELS, bias=False)
        self.mlp_proj = nn.Linear(4 * CHANNELS, CHANNELS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(B, T, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(attended.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Model(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, CHANNELS), nn.Embedding(CONTEXT, CHANNELS)
        self.blocks, self.ln_f = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(CHANNELS, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, 0.0, 0.02 / (math.sqrt(2 * LAYERS) if "proj" in name else 1.0))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe.weight[:ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy((self.ln_f(x) @ self.wte.weight.T).flatten(0, 1), targets.flatten())


def rate_at(step: int) -> float:
    if step < WARMUP:
        return RATE * (step + 1) / (WARMUP + 1)
    return LEAST_RATE + (RATE - LEAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def main() -> None:
    text = open(sys.argv[1], encoding="utf-8").read()  # noqa: SIM115
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text])
    train, held_out = data[:int(0.9 * len(data))], data[int(0.9 * len(data)):]
    torch.manual_seed(1337)
    model = Model(len(characters))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
    begun = time.perf_counter()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        places = torch.randint(len(train) - CONTEXT, (BATCH, 1)) + torch.arange(CONTEXT + 1)
        windows = train[places]
        optimizer.zero_grad(set_to_none=True)
        model(windows[:, :-1], windows[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    seconds = time.perf_counter() - begun
    windows = held_out[:(len(held_out) - 1) // CONTEXT * CONTEXT + 1]
    ids, targets = windows[:-1].view(-1, CONTEXT), windows[1:].view(-1, CONTEXT)
    with torch.no_grad():
        nats = sum(model(a, b).item() * len(a) for a, b in zip(ids.split(64), targets.split(64), strict=True))
    loss = nats / len(ids)
    print(f"{STEPS} steps in {seconds:.0f} s; {loss:.4f} nats, {loss / math.log(2):.3f} bits a character of the "
          f"{len(held_out):,} held out")


if __name__ == "__main__":
    main()
