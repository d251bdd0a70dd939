"""Tokens a second of transformers' generate, on its cache of keys and values."""

from __future__ import annotations

from ..clock import median_seconds


def measure(program: str, model: dict, precision: str, seconds: float, tokens: int, threads: int) -> dict:
    """Tokens a second over whole calls of generate; median of the calls. model: the fields of feste's Config."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.set_num_threads(threads)
    config = GPT2Config(vocab_size=model["vocab_size"], n_embd=model["n_embd"], n_layer=model["n_layers"],
                        n_head=model["n_heads"], n_positions=model["block_size"], tie_word_embeddings=False,
                        bos_token_id=0, eos_token_id=None)
    peer = GPT2LMHeadModel(config).eval()
    if precision == "bf16":
        peer = peer.to(torch.bfloat16)
    prompt = torch.ones((1, 1), dtype=torch.long)

    def generate():
        with torch.no_grad():
            peer.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0,
                          attention_mask=torch.ones_like(prompt), pad_token_id=0)
    generate()
    return {"tokens_per_second": tokens / median_seconds(generate, seconds, least=3)}
