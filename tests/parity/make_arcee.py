"""Make tests/parity/arcee: a small Arcee model as transformers writes it, with what it computes and how it learns.

    pip install '.[parity]' && python tests/parity/make_arcee.py

Nothing here uses feste.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import ArceeConfig, ArceeForCausalLM

HOME = Path(__file__).parent / "arcee"
STEPS, RATE, BETAS, EPS, DECAY, CLIP = 20, 1e-2, (0.9, 0.95), 1e-8, 0.1, 1.0


def main() -> None:
    torch.manual_seed(6)
    config = ArceeConfig(vocab_size=61, hidden_size=24, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=3, num_key_value_heads=3, head_dim=8, max_position_embeddings=20,
                         rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0)
    model = ArceeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that no norm is one
    model.save_pretrained(HOME)
    ids = torch.randint(0, 61, (STEPS, 3, 21))
    with torch.no_grad():
        greedy = model.generate(ids[0, :1, :8], max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        logits = model(ids[0, :, :20]).logits
    np.savez(HOME / "expected.npz", ids=ids.numpy(), logits=logits.numpy(), greedy=greedy.numpy(),
             losses=learn(model, ids))


def learn(model: ArceeForCausalLM, ids: torch.Tensor) -> np.ndarray:
    """The losses of some steps of AdamW, matrices decayed, gradients clipped."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0}],
                                  lr=RATE, betas=BETAS, eps=EPS)
    losses = []
    for batch in ids:
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


if __name__ == "__main__":
    main()
