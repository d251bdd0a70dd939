"""Train the tiny model: 169,728 parameters, 500 steps, a few seconds.

The fastest way to see a language model learn. One step, 500 times:

1. take 8 windows of 64 tokens; the targets are the same tokens one further on;
2. forward: a probability for every next token, and the mean loss, -log p(target), in nats;
3. backward: the gradient of that loss for all 169,728 parameters;
4. clip the gradient to norm 1, and update with AdamW at the learning rate of the schedule.

The loss starts at ln(512) = 6.24, a guess among 512 tokens, and ends near 3.6: from noise to words and names.
Try `--learning-rate 0.03` to see it diverge, or `--accumulation 8 --batch-size 1` for the same steps made of eight
small batches. `--help` lists every dial.
"""

import sys

from feste.cli import run_preset

if __name__ == "__main__":
    sys.exit(run_preset("tiny"))
