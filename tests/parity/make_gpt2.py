"""Make tests/parity/gpt2: a small GPT-2 as transformers writes it, with logits and greedy tokens that it computes.

    pip install '.[parity]' && python tests/parity/make_gpt2.py

Nothing here uses feste.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HOME = Path(__file__).parent / "gpt2"
TEXT = ["To be, or not to be, that is the question:", "Whether 'tis nobler in the mind to suffer",
        "The slings and arrows of outrageous fortune,", "Or to take arms against a sea of troubles"]


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(HOME)

    torch.manual_seed(5)
    config = GPT2Config(vocab_size=tokenizer.get_vocab_size(), n_embd=16, n_layer=2, n_head=2, n_positions=24,
                        bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that no bias is zero and no norm is one
    model.save_pretrained(HOME)
    prompt = torch.tensor([tokenizer.encode(TEXT[0]).ids[:10]])
    with torch.no_grad():
        greedy = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        logits = model(prompt).logits
    np.savez(HOME / "expected.npz", prompt=prompt.numpy(), logits=logits.numpy(), greedy=greedy.numpy())


if __name__ == "__main__":
    main()
