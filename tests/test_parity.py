"""Against PyTorch and transformers, through a committed fixture: see parity/make_fixture.py."""

from pathlib import Path

import numpy as np
import pytest

from feste import GPT2, AdamW, Config, TrainConfig
from feste.schedule import learning_rate_at

FOLDER = Path(__file__).parent / "parity"
FIXTURE = {**np.load(FOLDER / "trajectory.npz"), **np.load(FOLDER / "masked.npz")}
CONFIG = {"vocab_size": 61, "n_embd": 16, "n_layers": 2, "n_heads": 2, "block_size": 12}
SCHEDULE = TrainConfig(num_steps=20, learning_rate=1e-2, seq_len=12, batch_size=4, warmup_fraction=0.2)


def model_of(tag: str, precision: str = "fp32") -> GPT2:
    model = GPT2(Config(**CONFIG, tie_weights=tag == "tied"), seed=None, precision=precision)
    for name, view in model.params.items():
        view[:] = FIXTURE[f"{tag}/initial/{name}"]
    return model


@pytest.mark.parametrize("tag", ["untied", "tied", "masked"])
def test_twenty_steps_follow_pytorch(tag):
    """masked: targets of -100, which cross_entropy leaves out."""
    model = model_of(tag)
    optimizer = AdamW(model)
    for step, (batch, targets) in enumerate(zip(FIXTURE[f"{tag}/ids"], FIXTURE[f"{tag}/targets"], strict=True), 1):
        loss = model.forward_backward(batch[:, :-1], targets)
        norm = optimizer.step(learning_rate_at(step, SCHEDULE), clip_norm=1.0, zero_grad=True)
        assert loss == pytest.approx(FIXTURE[f"{tag}/losses"][step - 1], abs=1e-4)
        assert norm == pytest.approx(FIXTURE[f"{tag}/norms"][step - 1], rel=1e-3)
    C = CONFIG["n_embd"]
    for name, view in model.params.items():
        if name.endswith("c_attn.bias"):
            # A key's bias adds the same to every score of a query, so its gradient is zero but for rounding, and
            # AdamW makes steps of full size of that. It changes nothing that the model computes.
            view[C:2 * C] = FIXTURE[f"{tag}/final/{name}"][C:2 * C]
        np.testing.assert_allclose(view, FIXTURE[f"{tag}/final/{name}"], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("tag", ["untied", "tied"])
def test_bf16_stays_near_pytorch(tag):
    """Inputs of products carry 8 bits, so losses move by about 2^-8 of their size, not more."""
    model = model_of(tag, "bf16")
    batch = FIXTURE[f"{tag}/ids"][0]
    assert model.loss(batch[:, :-1], batch[:, 1:]) == pytest.approx(FIXTURE[f"{tag}/losses"][0], rel=2**-8)


@pytest.mark.parametrize("tag", ["untied", "tied"])
def test_logits_are_those_of_transformers(tag):
    logits = model_of(tag).forward(FIXTURE[f"{tag}/hf_ids"])
    np.testing.assert_allclose(logits, FIXTURE[f"{tag}/hf_logits"], atol=2e-5)
