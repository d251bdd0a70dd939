"""Train the medium model: 4,011,520 parameters, 8,000 steps.

The first with several attention heads: four heads of 64 channels look for four things at once, over 256 tokens.
Watch the gap between training and validation loss; the run stops early when the validation loss has not improved
for 3,000 steps, and `checkpoint_best.bin` is the model at its best, before it began to memorise.

In the background, with the monitor beside it:

    nohup python examples/07_train_shakespeare_medium.py > training.log 2>&1 &
    python -m tools.monitor data/shakespeare_medium_*
"""

import sys

from feste.cli import run_preset

if __name__ == "__main__":
    sys.exit(run_preset("medium"))
