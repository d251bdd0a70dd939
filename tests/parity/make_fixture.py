"""Make tests/parity/trajectory.npz, training trajectories computed by PyTorch and logits by transformers, and
masked.npz, a trajectory of a loss that leaves targets of -100 out.

    pip install '.[parity]' && python tests/parity/make_fixture.py

A small GPT-2 in plain PyTorch, with autograd, torch.optim.AdamW, clip_grad_norm_ and a schedule of its own:
nothing here uses feste but the names of the parameters.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

V, C, L, H, T, B, STEPS = 61, 16, 2, 2, 12, 4, 20
PEAK, WARMUP, CLIP, DECAY = 1e-2, 4, 1.0, 0.1


def initial_parameters(tied: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7 + tied)

    def normal(*shape):
        return 0.1 * torch.randn(shape, generator=generator)

    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}
    for i in range(L):
        p = f"transformer.h.{i}."
        shapes |= {p + "ln_1.weight": (C,), p + "ln_1.bias": (C,), p + "attn.c_attn.weight": (C, 3 * C),
                   p + "attn.c_attn.bias": (3 * C,), p + "attn.c_proj.weight": (C, C), p + "attn.c_proj.bias": (C,),
                   p + "ln_2.weight": (C,), p + "ln_2.bias": (C,), p + "mlp.c_fc.weight": (C, 4 * C),
                   p + "mlp.c_fc.bias": (4 * C,), p + "mlp.c_proj.weight": (4 * C, C), p + "mlp.c_proj.bias": (C,)}
    shapes |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    if not tied:
        shapes["lm_head.weight"] = (V, C)
    return {name: normal(*shape) + (1.0 if "ln_" in name and name.endswith("weight") else 0.0)
            for name, shape in shapes.items()}


def logits_of(p: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    b, t = ids.shape
    x = p["transformer.wte.weight"][ids] + p["transformer.wpe.weight"][:t]
    for i in range(L):
        w = {name.split(f"h.{i}.")[1]: value for name, value in p.items() if f".h.{i}." in name}
        h = F.layer_norm(x, (C,), w["ln_1.weight"], w["ln_1.bias"])
        q, k, v = (z.view(b, t, H, C // H).transpose(1, 2)
                   for z in (h @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]).split(C, dim=2))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, C)
        x = x + a @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
        h = F.layer_norm(x, (C,), w["ln_2.weight"], w["ln_2.bias"])
        h = F.gelu(h @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"], approximate="tanh")
        x = x + h @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]
    x = F.layer_norm(x, (C,), p["transformer.ln_f.weight"], p["transformer.ln_f.bias"])
    return x @ p.get("lm_head.weight", p["transformer.wte.weight"]).T


def rate(step: int) -> float:
    if step <= WARMUP:
        return PEAK * step / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
    return PEAK * (0.1 + 0.9 * cosine)


def train(tied: bool, masked: bool = False) -> dict[str, np.ndarray]:
    """Arrays of a trajectory; masked: two thirds of the targets are -100, the ignore_index of cross_entropy."""
    p = {name: value.clone().requires_grad_() for name, value in initial_parameters(tied).items()}
    matrices = [value for value in p.values() if value.dim() > 1]
    vectors = [value for value in p.values() if value.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0}],
                                  lr=PEAK, betas=(0.9, 0.95), eps=1e-8)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(V, (STEPS, B, T + 1), generator=generator)
    targets = ids[..., 1:].clone()
    if masked:
        targets[torch.rand(targets.shape, generator=generator) < 2 / 3] = -100
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        batch = ids[step - 1]
        loss = F.cross_entropy(logits_of(p, batch[:, :-1]).reshape(-1, V), targets[step - 1].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(p.values(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        losses.append(loss.item())
    tag = "masked" if masked else "tied" if tied else "untied"
    return {f"{tag}/ids": ids.numpy().astype(np.int32), f"{tag}/targets": targets.numpy().astype(np.int32),
            f"{tag}/losses": np.array(losses), f"{tag}/norms": np.array(norms),
            **{f"{tag}/initial/{name}": value.numpy() for name, value in initial_parameters(tied).items()},
            **{f"{tag}/final/{name}": value.detach().numpy() for name, value in p.items()}}


def transformers_logits(tied: bool) -> dict[str, np.ndarray]:
    config = GPT2Config(vocab_size=V, n_embd=C, n_layer=L, n_head=H, n_positions=T, tie_word_embeddings=tied,
                        activation_function="gelu_new", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = GPT2LMHeadModel(config).eval()
    parameters = initial_parameters(tied)
    missing, unexpected = model.load_state_dict(parameters, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    if tied:
        model.tie_weights()
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(ids).logits
    tag = "tied" if tied else "untied"
    return {f"{tag}/hf_ids": ids.numpy().astype(np.int32), f"{tag}/hf_logits": logits.numpy()}


if __name__ == "__main__":
    arrays = {}
    for tied in (False, True):
        arrays |= train(tied) | transformers_logits(tied)
    for name, values in {"trajectory.npz": arrays, "masked.npz": train(False, masked=True)}.items():
        target = Path(__file__).with_name(name)
        np.savez_compressed(target, **values)
        print(f"{target}: {target.stat().st_size:,} bytes")
