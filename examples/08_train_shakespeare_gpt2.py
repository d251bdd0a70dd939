"""Train GPT-2 small: 116,989,440 parameters on the whole corpus, 5,000 steps, most of a day.

OpenAI's GPT-2 small has 163,037,184 parameters when its head is not tied to the embedding: a vocabulary of 50,257
and 1,024 positions. This one has 20,534 tokens learned from Shakespeare and 512 positions; blocks and channels are
the same. A step's eight sequences go through the model two at a time, which keeps memory below 3 GB.

    python examples/08_train_shakespeare_gpt2.py --dry-run       what it takes on this machine
    nohup python examples/08_train_shakespeare_gpt2.py --precision bf16 > training.log 2>&1 &
    python examples/08_train_shakespeare_gpt2.py --resume data/shakespeare_gpt2_...   after any interruption
"""

import sys

from feste.cli import run_preset

if __name__ == "__main__":
    sys.exit(run_preset("gpt2"))
