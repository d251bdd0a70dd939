"""The benchmarks' own arithmetic, and that a worker measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.contest import Figure, Unavailable, alternate, figures, ratios, run_worker
from tools.bench.sizes import SIZES, gemm_shapes, model_config, step_flops

ROOT = Path(__file__).parent.parent


def test_useful_operations_of_a_step():
    # tiny: 12 L C^2 + V C = 131,072 weights in products, 6 operations each and token, 512 tokens; attention:
    # 3 passes x 4 operations x C = 64 channels x 2 layers x 32.5 keys on average x 512 tokens
    assert step_flops(model_config("tiny")) == 6 * 131_072 * 512 + 12 * 64 * 2 * 32.5 * 512


def test_shapes_are_those_of_the_models():
    assert gemm_shapes("medium") == [("c_attn", 2048, 768, 256), ("attn.c_proj", 2048, 256, 256),
                                     ("c_fc", 2048, 1024, 256), ("mlp.c_proj", 2048, 256, 1024),
                                     ("lm_head", 512, 1536, 256)]
    assert set(SIZES) == {"tiny", "small", "medium", "gpt2"}


def test_medians_and_ratios_go_round_by_round():
    results = {"a": [{"x": 2.0}, {"x": 9.0}, {"x": 4.0}], "b": [{"x": 1.0}, {"x": 3.0}, {"x": 4.0}]}
    assert figures(results, "x")["a"].median == 4.0 and figures(results, "x")["a"].range == (2.0, 9.0)
    assert ratios(results, "x", "a", "b").values == [2.0, 3.0, 1.0]
    assert str(Figure([1.0, 3.0, 2.0])) == "2 (1 - 3)"


def test_contenders_that_cannot_run_are_named_and_left_out():
    common = {"size": "tiny", "precision": "fp32", "seconds": 0.01}
    contenders = {"feste": common | {"contender": "feste"}, "no such thing": {"size": "nowhere"}}
    results, missing = alternate("steps", contenders, 2, say=lambda line: None)
    assert list(results) == ["feste"] and len(results["feste"]) == 2 and list(missing) == ["no such thing"]
    with pytest.raises(Unavailable):
        run_worker("steps", size="nowhere")


def test_a_worker_reports_losses_speed_and_share_of_peak():
    result = run_worker("steps", size="tiny", contender="feste", precision="fp32", seconds=0.05)
    assert result["losses"][0] == pytest.approx(6.24, abs=0.1) and len(result["losses"]) == 3
    assert result["steps_per_second"] > 0 and 0 < result["share_of_peak"] < 1.5


def test_results_as_json(tmp_path):
    path = tmp_path / "results.json"
    done = subprocess.run([sys.executable, "-m", "tools.bench", "steps", "--sizes", "tiny", "--rounds", "1", "--peers",
                           "--seconds", "0.05", "--json", str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())
    assert {row["precision"] for row in results["steps"]} == {"fp32", "bf16"}
    assert results["machine"]["isa"] and results["steps"][0]["median"]["feste"] > 0
