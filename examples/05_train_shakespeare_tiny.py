"""Train the tiny model on Shakespeare: a few seconds, with the whole of training in the loop below.

The loss starts at the logarithm of the vocabulary, a guess among 512 tokens, and ends near 3.6: from noise to words
and names. Try `--learning-rate 0.03` to see it diverge, or `--accumulation 8 --batch-size 1` for the same steps made
of eight small batches. `--help` lists every dial; `--resume RUN` goes on with a run that was stopped.

Around the loop, `run_preset` reads the flags, learns a tokenizer, cuts the text into tokens and makes the model; the
run keeps a log and checkpoints of what the loop reports. Other examples use feste's own loop, which is this one.
"""

import math
import sys

from feste.cli import run_preset
from feste.evaluation import mean_loss
from feste.schedule import learning_rate_at


def training_loop(run):
    model, optimizer, config = run.model, run.optimizer, run.config  # a GPT2, an AdamW on its parameters, all dials

    for step in run.steps():  # 1, 2, ... config.num_steps
        loss = 0.0
        for i, (ids, targets) in enumerate(run.batches.batch(step, config.batch_size, config.accumulation)):
            # ids (B, T): windows of the text; targets (B, T): the same tokens one further on. Forward, a probability
            # for every next token and the mean of -log p(target); backward, its gradient for every parameter.
            key = (step - 1) * config.accumulation + i  # each mini-batch has dropout masks of its own
            loss += model.forward_backward(ids, targets, 1 / config.accumulation, key) / config.accumulation

        # Gradients are scaled down to norm 1 if they are larger; then AdamW moves the parameters, and they are zero.
        learning_rate = learning_rate_at(step, config)  # rises linearly, then falls as a cosine
        finite = math.isfinite(loss)
        grad_norm = optimizer.step(learning_rate, config.clip_norm, zero_grad=True) if finite else math.nan
        record = run.record(learning_rate, loss, grad_norm)

        if run.due(config.val_interval):  # the loss on text that the model does not learn from
            record["val_loss"] = mean_loss(model, run.validation())
        if run.due(config.sample_interval):
            ids = model.generate(run.prompt, config.sample_tokens, temperature=0.8, seed=config.seed + step)
            record["sample"] = run.tokenizer.decode(ids)
        run.keep(record)  # a row of the log, and a checkpoint when one is due


if __name__ == "__main__":
    sys.exit(run_preset("tiny", loop=training_loop))
