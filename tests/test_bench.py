"""The benchmarks' own arithmetic, and that a worker measures what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import feste.model
from feste import GPT2, ops
from tools.bench.alternation import LIMITS, Figure, Unavailable, alternate, figures, limit_to, ratios, run_worker
from tools.bench.inputs import write_inputs
from tools.bench.profile import profile
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


def test_programs_that_cannot_run_are_named_and_left_out():
    common = {"size": "tiny", "precision": "fp32", "seconds": 0.01}
    programs = {"feste": common, "no such thing": {"size": "nowhere"}}
    results, missing = alternate("steps", programs, 2, say=lambda line: None)
    assert list(results) == ["feste"] and len(results["feste"]) == 2 and list(missing) == ["no such thing"]
    with pytest.raises(Unavailable):
        run_worker("steps", size="nowhere")


def test_a_worker_reports_losses_speed_and_share_of_peak():
    result = run_worker("steps", size="tiny", precision="fp32", seconds=0.05)
    assert result["losses"][0] == pytest.approx(6.24, abs=0.1) and len(result["losses"]) == 3
    assert result["steps_per_second"] > 0 and 0 < result["share_of_peak"] < 1.5


def test_the_instruction_set_of_a_measurement(tmp_path):
    path, built = tmp_path / "results.json", [isa for isa in LIMITS if ops._is_built(isa)]
    isa = built[-1] if built else pytest.skip("no instruction set of x86-64 was built")
    command = ["kernels", "--isa", isa, "--sizes", "tiny", "--rounds", "1", "--seconds", "0.02"]
    subprocess.run([sys.executable, "-m", "tools.bench", *command, "--peers", "--json", str(path)], check=True,
                   cwd=ROOT, capture_output=True)
    assert json.loads(path.read_text())["machine"]["isa"] == isa


def test_limited_peers_have_a_cache_of_their_own(monkeypatch):
    """What PyTorch has compiled for a newer instruction set must not be found."""
    for name in ("FESTE_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
                 "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "what the user has")
    caches = []
    for isa in ("avx2", "avx2"):
        limit_to(isa)
        caches.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert os.environ["FESTE_ISA"] == "avx2" and os.environ["ATEN_CPU_CAPABILITY"] == "avx2"
    assert len(set(caches)) == 2 and all(os.listdir(cache) == [] for cache in caches)


def test_a_profile_names_every_kernel_of_a_step():
    table = profile("tiny", "fp32", 1)
    assert " ms a step, " in table and "between the kernels" in table
    for line in ("linear_forward 512x64x192 .* 2 calls", "attention_backward .* 2 calls",
                 "cross_entropy_backward .* 1 calls", "gelu_forward .* 2 calls", "adamw_update .* [12] calls"):
        assert re.search(line, table), f"{line} is not in\n{table}"
    assert feste.model.ops is ops and feste.transformer.ops is ops


def test_a_profile_can_be_taken_of_another_instruction_set():
    command = ["where", "--isa", ops.available_isas[-1], "--sizes", "tiny", "--precisions", "fp32"]
    done = subprocess.run([sys.executable, "-m", "tools.bench", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "attention_backward" in done.stdout, done.stderr


def test_results_as_json(tmp_path):
    path = tmp_path / "results.json"
    done = subprocess.run([sys.executable, "-m", "tools.bench", "steps", "--sizes", "tiny", "--rounds", "1", "--peers",
                           "--seconds", "0.05", "--json", str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())
    assert {row["precision"] for row in results["steps"]} == {"fp32", "bf16"}
    assert results["machine"]["isa"] and results["steps"][0]["median"]["feste"] > 0


# ---- peers -------------------------------------------------------------------------------------------------

LOADED = """
import json, sys
import feste.ops if {feste} else json
from tools.bench.peers.worker import loaded_of_feste, measure, openmp_runtimes
measure(sys.argv[1], json.loads(sys.argv[2]))
print(json.dumps([loaded_of_feste(), openmp_runtimes()]))
"""


def loaded_after(task: str, feste: bool = False, **arguments) -> tuple[list[str], list[str]]:
    """What of feste, and which OpenMP runtimes, a process has loaded that has measured a peer."""
    code = LOADED.replace("import feste.ops if {feste} else json\n", "import feste.ops\n" if feste else "")
    done = subprocess.run([sys.executable, "-c", code, task, json.dumps(arguments)], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SHAPES = {"tiny": {"gemm": [["c_attn", 64, 48, 16]], "attention": [1, 8, 1, 16]}}


def documents_of(tmp_path) -> dict:
    (tmp_path / "text.txt").write_text("to be or not to be " * 400)
    return {"text": str(tmp_path / "text.txt"), "lengths": [50], "vocab_size": 300, "threads": 1}


def test_peers_load_nothing_of_feste(tmp_path):
    """Neither its modules nor its kernels, whose OpenMP runtime and its settings would be theirs too."""
    numpy = {"program": "numpy", "seconds": 0.001, "shapes": SHAPES, "threads": 1}
    assert loaded_after("kernels", **numpy)[0] == []
    assert loaded_after("documents", program="huggingface", **documents_of(tmp_path))[0] == []
    found, runtimes = loaded_after("kernels", feste=True, **numpy)  # that the test can fail
    assert "feste.ops" in found and any("_ops_" in name for name in found) and any("gomp" in name for name in runtimes)


def test_pytorch_has_its_own_openmp_runtime_only(tmp_path):
    pytest.importorskip("torch")
    told = {"inputs": write_inputs(tmp_path / "tiny.npz", model_config("tiny"), 2), "n_heads": 1, "precision": "fp32",
            "seconds": 0.01, "threads": 1}
    found, runtimes = loaded_after("steps", program="eager", **told)
    assert found == [] and len(runtimes) == 1


def test_the_inputs_of_a_peer_are_what_feste_begins_with(tmp_path):
    config = model_config("tiny")
    arrays = dict(np.load(write_inputs(tmp_path / "tiny.npz", config, 8)))
    model = GPT2(config, seed=0)
    assert all(np.array_equal(arrays[name], view) for name, view in model.params.items())
    loss = run_worker("steps", size="tiny", precision="fp32", seconds=0.01)["losses"][0]
    assert model.loss(arrays["ids"], arrays["targets"]) == pytest.approx(loss, rel=1e-6)


def test_a_peer_that_has_loaded_feste_is_refused(monkeypatch, tmp_path):
    done = subprocess.CompletedProcess([], 0, json.dumps({"loaded": {"feste": ["feste.ops"], "openmp": []}}), "")
    monkeypatch.setattr("tools.bench.alternation.subprocess.run", lambda *args, **kwargs: done)
    with pytest.raises(SystemExit, match="has loaded feste"):
        run_worker("steps", program="eager")


def test_documents_are_measured_beside_hugging_face(tmp_path):
    told = documents_of(tmp_path)
    results, missing = alternate("documents", {"feste": told, "huggingface": told}, 1, say=lambda line: None)
    assert not missing and results["feste"][0]["digest 50"] == results["huggingface"][0]["digest 50"]
    assert results["feste"][0]["train 50"] > 0 and results["huggingface"][0]["encode_batch 50"] > 0
