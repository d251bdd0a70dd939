"""The peer: GPT-2 in PyTorch as its users would write it, with fused attention, fused AdamW and torch.compile."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, C: int, H: int) -> None:
        super().__init__()
        self.H = H
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn, self.attn_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_fc, self.mlp_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.H, C // self.H).transpose(1, 2) for part in (q, k, v))
        att = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(att.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class TorchGPT2(nn.Module):
    """parameters: Hugging Face's names -> arrays, as feste has them: linear weights are stored [in, out]."""

    def __init__(self, parameters: Mapping[str, np.ndarray], n_heads: int) -> None:
        super().__init__()
        (V, C), (T, _) = (parameters[f"transformer.{name}.weight"].shape for name in ("wte", "wpe"))
        n_layers = sum(name.endswith(".mlp.c_fc.weight") for name in parameters)
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(Block(C, n_heads) for _ in range(n_layers))
        self.ln_f, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        self.register_buffer("positions", torch.arange(T), persistent=False)
        self._load(parameters)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(self.positions[:ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1))

    def _load(self, parameters: Mapping[str, np.ndarray]) -> None:
        short = {"attn.c_attn": "c_attn", "attn.c_proj": "attn_proj", "mlp.c_fc": "c_fc", "mlp.c_proj": "mlp_proj"}
        state = {}
        for name, array in parameters.items():
            own = name.removeprefix("transformer.").replace("lm_head", "head")
            own = own.replace("h.", "blocks.", 1) if ".h." in name else own
            for key, value in short.items():
                own = own.replace(f".{key}.", f".{value}.")
            is_linear = array.ndim == 2 and ".h." in name
            state[own] = torch.from_numpy(array.T.copy() if is_linear else array)
        self.load_state_dict(state)


def trainer(parameters: Mapping[str, np.ndarray], n_heads: int, compiled: bool, bf16: bool, accumulation: int):
    """step(ids, targets) -> loss; ids and targets of the whole step, divided into mini-batches here."""
    model = TorchGPT2(parameters, n_heads)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
    run = torch.compile(model) if compiled else model

    def step(ids: torch.Tensor, targets: torch.Tensor) -> float:
        total = 0.0
        for x, y in zip(ids.chunk(accumulation), targets.chunk(accumulation), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = run(x, y) / accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total
    return step
