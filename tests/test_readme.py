"""What README and guide show: their code runs, their numbers are those of the presets, their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from feste import PRESETS, read_info, shakespeare_text
from feste.params import ParameterTable

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code.splitlines()[-1][:40])
def test_the_code_of_the_readme_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_text.txt").write_text(shakespeare_text()[:100_000], encoding="utf-8")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    if "run_dir" in code:
        assert read_info("data/mine")["state"] == "finished" and "Once" in capsys.readouterr().out
    else:
        assert names["loss"] < 4.5  # 6.24 is a guess


@pytest.mark.parametrize("name", ["tiny", "small", "medium", "gpt2"])
def test_the_tables_have_the_numbers_of_the_presets(name):
    preset = PRESETS[name]
    size, steps = f"{ParameterTable(preset.model).size:,}", f"{preset.train.num_steps:,}"
    [row] = [line for line in README.splitlines() if line.startswith(f"| `make {name}` |")]
    assert row.startswith(f"| `make {name}` | {size} | {steps} |")
    [row] = [line for line in (ROOT / "docs" / "TRAINING.md").read_text().splitlines() if f"_{name}.py`" in line
             and line.startswith("|")]
    m = preset.model
    assert [cell.strip() for cell in row.split("|")][3:11] == [
        size, f"{m.vocab_size:,}", str(m.n_embd), str(m.n_layers), str(m.n_heads), str(m.block_size), steps,
        f"{preset.train.learning_rate:g}"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_files_and_modules_that_exist(page):
    for line in re.findall(r"^(?:nohup |\.venv/bin/)?python (.+)$", page.read_text(), re.MULTILINE):
        words = shlex.split(line.split("#")[0])
        path = ROOT / (words[1].replace(".", "/") if words[0] == "-m" else words[0])
        assert path.exists() or path.with_suffix(".py").exists(), line
