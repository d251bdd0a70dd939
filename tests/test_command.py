"""The command `feste`, from a checkout: help, completion, the doctor, and what goes wrong before anything begins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import feste
from feste import machine
from feste.__main__ import COMMANDS, main
from tools import doctor

ROOT = Path(__file__).resolve().parent.parent
TOOLS = [name for name in COMMANDS if name != "train"]
IN_CHECKOUT = {name: command.module.removeprefix("feste.").removesuffix(".__main__")
               for name, command in COMMANDS.items()}
WITH_KERNELS = [name for name in TOOLS if name not in ("monitor", "doctor", "completion")]


def run(*words: str, home: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """A Python program in a process of its own, which finds feste in a folder."""
    env = os.environ | {"PYTHONPATH": str(home)} | environment
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, cwd=home)


def test_the_help_fits_on_a_screen(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert [line.split()[:2] for line in lines if line.startswith("  feste")] == [
        ["feste", "train"], ["feste", "monitor"], ["feste", "repl"]]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    said = capsys.readouterr().out
    assert f"usage: feste {name}" in said
    assert name in ("doctor", "completion") or f"\nexamples:\n  feste {name} " in said


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_is_the_same_from_a_checkout(name):
    one, other = run("-m", IN_CHECKOUT[name], "--help"), run("-m", "feste", name, "--help")
    assert one.returncode == other.returncode == 0, one.stderr + other.stderr
    installed = other.stdout.replace(f"feste {name}", "")
    assert one.stdout.replace(f"python -m {IN_CHECKOUT[name]}", "").split() == installed.split()


def test_a_wrong_command_is_one_line(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: feste has no command 'trian'; did you mean train?\n"
    assert main(["qqq"]) == 2
    assert "train, monitor" in capsys.readouterr().err


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"feste {feste.__version__}\n"


def test_a_shell_completes(tmp_path):
    script = tmp_path / "completion.bash"
    done = run("-m", "feste", "completion", "bash")
    assert done.returncode == 0, done.stderr
    script.write_text(done.stdout)
    ask = f"""source {script}
    function complete_line {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_feste; echo "${{COMPREPLY[@]}}"; }}
    complete_line feste tr; complete_line feste train --lear; complete_line feste train --preset ti"""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert done.stdout.split() == ["train", "--learning-rate", "tiny", "tiny-modern"], done.stderr
    for shell in ("zsh", "tcsh"):
        assert "learning-rate" in run("-m", "feste", "completion", shell).stdout


# ---- kernels that cannot be loaded -------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["examples/05_train_shakespeare_tiny.py"], ["examples/train.py"],
                                   *(["-m", "feste", name, "x"] for name in ["train", *WITH_KERNELS]),
                                   *(["-m", IN_CHECKOUT[name], "x"] for name in WITH_KERNELS)],
                         ids=" ".join)
def test_an_unknown_instruction_set_is_one_line(words):
    done = run(*words, FESTE_ISA="nonsense")
    assert done.returncode == 2
    assert done.stderr == "error: FESTE_ISA=nonsense is unknown; choose one of avx512, avx2, neon, generic\n"


def test_a_package_that_is_not_built_is_one_line():
    code = "import sys; sys.modules['feste._cpu'] = None; from feste.__main__ import main; sys.exit(main(sys.argv[1:]))"
    for name in ("train", "export"):
        done = run("-c", code, name, "x")
        assert done.returncode == 2
        assert done.stderr.startswith("error: feste's kernels are not compiled; run `make`")
        assert done.stderr.count("\n") == 1
    assert run("-c", code, "monitor", "--demo", "--once").returncode == 0
    assert "kernels      none: feste's kernels are not compiled" in run("-c", code, "doctor").stdout


def test_without_its_own_variant_a_cpu_takes_the_next_and_says_so(tmp_path):
    code = ("from feste import _cpu\n_cpu.supported = lambda: ['avx512_of_the_future', *{isas}]\n"
            "from feste import ops\nprint(ops.isa, ops.isa_reason)")
    built = [path.name.split(".")[0].removeprefix("_ops_") for path in (ROOT / "feste").glob("_ops_*.so")]
    done = run("-c", code.format(isas=built[-1:]))
    reason = "the best that was built; this CPU also supports avx512_of_the_future"
    assert done.stdout == f"{built[-1]} {reason}\n", done.stderr


# ---- the doctor --------------------------------------------------------------------------------------------


def test_the_doctor_tells(capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["software"]["feste"].startswith(feste.__version__)
    assert "5,057,240 characters" in found["machine"]["corpus"]
    assert "GFLOP/s" in found["speed"]["one thread"]
    assert doctor.main([]) == 0
    assert "\nmachine\n  CPU " in capsys.readouterr().out


def test_the_doctor_remarks_on_what_is_slow(monkeypatch):
    from feste import _cpu, ops
    monkeypatch.setattr(_cpu, "clock_hertz", lambda: 3e9, raising=False)
    monkeypatch.setattr(ops, "get_num_threads", lambda: 2)
    monkeypatch.setattr(doctor, "step_seconds", lambda: 1e-3)
    full = 3e9 * doctor.PER_CYCLE[ops.isa]
    monkeypatch.setattr(doctor, "tile_rate", lambda threads: full * threads)
    assert doctor.speed()[1] == []
    monkeypatch.setattr(doctor, "tile_rate", lambda threads: full / 2)
    slow, crowded = doctor.speed()[1]
    assert "50% of the operations" in slow and "2 threads are only 1.00 times" in crowded


def test_the_clock_of_a_cpu_is_one():
    from feste._cpu import clock_hertz
    clock = clock_hertz()
    assert clock is None or 2e8 < clock < 1e10


def test_a_container_limits_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.cpu_quota() is None and machine.useful_threads() == machine.visible_cores()
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota() is None
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.cpu_quota() == 0.5 and machine.useful_threads() == 1
    code = (f"from pathlib import Path\nfrom feste import machine\nmachine.CGROUP = Path({str(tmp_path)!r})\n"
            "from feste import ops\nprint(ops.get_num_threads())")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout == "1\n", done.stderr
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert machine.memory() == (1_000_000, 600_000)
