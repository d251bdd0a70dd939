"""Many ranks, the same bits: the tree, the division of the buffers, and jobs of 1, 2 and 4 processes under mpiexec."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feste import GPT2, AdamW, Config, FesteError, launcher, ops
from feste.config import PRESETS, TrainConfig
from feste.leaves import Leaves, depth, tree_sum
from feste.optim import Muon
from feste.parallel import Alone, require_shares
from feste.parallel.apart import Apart
from feste.parallel.buckets import Buckets
from feste.parallel.exchange import from_bf16, tiles_of, to_bf16
from feste.parallel.team import Peer, Team
from feste.run.follow import read_info
from feste.run.names import FINAL
from tests.torture import ROOT, arguments, differences, history
from tests.torture.ranks import MISSING, MPI_ENVIRONMENT, MPIEXEC, mpiexec, rank_kills, run_ranks
from tools.bench import ranks

needs_mpi = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
CHILD = str(ROOT / "tests" / "torture" / "rank_child.py")
FOUR = {"accumulation": 4, "batch_size": 1}


# ---- the tree ----------------------------------------------------------------------------------------------


def by_pairs(parts):
    """The tree by its definition: level for level."""
    while len(parts) > 1:
        parts = [np.add(*parts[i:i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 4), st.integers(0, 1 << 30))
def test_every_division_comes_to_the_same_sum(ranks, level, seed):
    """Ranks that hold 2^level leaves each: the tree of their sums is the tree of all leaves."""
    each = 1 << level
    leaves = list(np.random.default_rng(seed).standard_normal((ranks * each, 3)).astype(np.float32))
    expected = by_pairs(leaves)
    of_ranks = [tree_sum([leaf.copy() for leaf in leaves[i:i + each]]) for i in range(0, len(leaves), each)]
    assert np.array_equal(tree_sum(of_ranks), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_leaves_are_added_in_the_tree(count):
    model, rng = GPT2(Config(50, 8, 2, 2, 8)), np.random.default_rng(1)
    batches = [(ids[:, :-1], ids[:, 1:]) for ids in rng.integers(0, 50, (count, 2, 9))]
    leaves, alone = [], []
    for key, batch in enumerate(batches):
        model.zero_grad()
        alone.append(model.forward_backward(*batch, 1.0 / count, key))
        leaves.append(model.flat_grads.copy())
    model.zero_grad()
    under_test = Leaves(model, count)
    assert len(under_test.stack) == depth(count)
    assert under_test.compute(batches, [1.0 / count] * count, 0) == alone
    assert np.array_equal(model.flat_grads, by_pairs(leaves))
    assert not any(gradients.flat.any() for gradients in under_test.stack[1:])


# ---- who owns what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [AdamW, Muon])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("name", ["tiny", "small-modern", "medium"])
def test_every_parameter_and_every_tile_has_one_owner(name, ranks, optimizer):
    config = PRESETS[name].model
    buckets = Buckets(config, ranks, optimizer.whole)
    pieces = sorted((piece.start, piece.stop) for rank in range(ranks) for piece in buckets.of(rank))
    assert pieces[0][0] == 0 and pieces[-1][1] == buckets.size
    assert all(one[1] == two[0] for one, two in pairwise(pieces))
    tiles = sorted(tile for piece in pieces for tile in range(*tiles_of(slice(*piece))))
    assert tiles == list(range(-(-buckets.size // ops.SUM_TILE)))
    for p in buckets.table:  # Muon's matrices are whole
        if optimizer.whole(p):
            assert any(begin <= p.offset and p.offset + p.size <= end for begin, end in pieces)


def test_a_bucket_is_sent_when_it_is_whole():
    """Behind each stage of a real backward pass, the gradients of its buckets do not change any more."""
    config = Config(600, 64, 3, 2, 16)
    model, rng = GPT2(config), np.random.default_rng(0)
    buckets, seen = Buckets(config, 2, Muon.whole), {}

    def after(stage):
        for bucket in buckets:
            if bucket.stage == stage:
                pieces = [buckets.covered(bucket.piece(rank)) for rank in range(2)]
                seen.update({(piece.start, piece.stop): model.flat_grads[piece].copy() for piece in pieces})

    ids = rng.integers(0, 600, (2, 17))
    model.forward_backward(ids[:, :-1], ids[:, 1:], hooks=SimpleNamespace(before=lambda stage: None, after=after))
    assert len(seen) >= len(buckets)
    for (begin, end), values in seen.items():
        assert np.array_equal(values, model.flat_grads[begin:end])


@pytest.mark.parametrize("optimizer", [AdamW, Muon])
def test_owners_together_make_the_update_of_one(optimizer):
    config = Config(600, 64, 2, 2, 16)
    whole = optimizer(GPT2(config))
    ranks = [optimizer(GPT2(config)) for _ in range(3)]
    buckets, rng = Buckets(config, 3, optimizer.whole), np.random.default_rng(2)
    m, v = whole.m.copy(), whole.v.copy()
    for rank, one in enumerate(ranks):
        one.own(buckets.of(rank))
    for _ in range(3):
        gradient = rng.standard_normal(whole.model.table.size).astype(np.float32)
        for one in (whole, *ranks):
            one.model.flat_grads = gradient
        norm = whole.step(1e-2, 1.0)
        for one in ranks:
            one.update(norm, 1e-2, 1.0, zero_grad=True)
    for rank, one in enumerate(ranks):
        for piece in buckets.of(rank):
            assert np.array_equal(one.model.flat_params[piece], whole.model.flat_params[piece])
        whole.put(m, v, one.ranges, one.m, one.v)
    assert np.array_equal(m, whole.m) and np.array_equal(v, whole.v)
    assert sum(one.m.size for one in ranks) == whole.m.size
    again = optimizer(GPT2(config))
    again.m, again.v = m, v
    again.own(buckets.of(1))
    assert np.array_equal(again.m, ranks[1].m) and np.array_equal(again.v, ranks[1].v)


def test_bf16_on_the_wire_is_rounded_as_the_kernels_round():
    x = (np.random.default_rng(3).standard_normal(4096) * 10.0 ** np.arange(-30, 34).repeat(64)).astype(np.float32)
    rounded = np.empty_like(x)
    ops.round_bf16(rounded, x, x.size)
    assert np.array_equal(from_bf16(to_bf16(x)), rounded)
    odd = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38], np.float32)
    assert np.array_equal(from_bf16(to_bf16(odd))[[0, 1, 3, 4]], odd[[0, 1, 3, 4]])
    assert np.isnan(from_bf16(to_bf16(odd))[2])


# ---- ranks and what they may share -------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "ranks", "sync_every", "fits"), [
    (8, 1, 0, True), (8, 2, 0, True), (8, 8, 0, True), (6, 3, 0, True), (3, 1, 0, True), (6, 2, 0, False),
    (8, 3, 0, False), (1, 2, 0, False), (6, 2, 10, True), (7, 2, 10, False)])
def test_which_ranks_can_share_a_step(count, ranks, sync_every, fits):
    config = TrainConfig(accumulation=count, sync_every=sync_every)
    if fits:
        require_shares(config, ranks)
    else:
        with pytest.raises(FesteError, match=f"{ranks} ranks cannot share accumulation={count}") as raised:
            require_shares(config, ranks)
        assert raised.value.names[0] == "accumulation"


def team_of(*peers: Peer) -> Team:
    team = object.__new__(Team)
    team.rank, team.peers = 0, list(peers)
    return team


def test_ranks_of_a_host_share_its_cores():
    cores = frozenset(range(8))
    here, there = (Peer(0, "a", 1, cores, 8), Peer(1, "a", 2, cores, 8)), Peer(2, "b", 3, cores, 8)
    assert team_of(*here, there).threads() == 4
    assert team_of(Peer(0, "a", 1, frozenset({0, 1}), 8), Peer(1, "a", 2, frozenset({2, 3}), 8)).threads() == 2  # bound
    assert team_of(Peer(0, "a", 1, cores, 2), Peer(1, "a", 2, cores, 2)).threads() == 1  # a container with two cores
    assert Alone().threads() == 0


def test_another_version_or_instruction_set_is_refused_by_name():
    team = team_of(Peer(0, "a", 1, frozenset(), 1), Peer(1, "b", 2, frozenset(), 1))
    team.gather = lambda facts: [facts, facts | {"instruction set": "avx2"}]
    with pytest.raises(FesteError, match="rank 1 on b has another instruction set than rank 0 on a: avx2, not generic"):
        team.require_alike({"version of feste": "1", "instruction set": "generic"})


def test_a_rank_that_trains_apart_alone_is_sgd_with_momentum_on_what_it_learned():
    """One rank, by the formulas: it goes on from start - rate (d + momentum u) every second step."""
    config = TrainConfig(6, 1e-2, 8, sync_every=2, outer_rate=0.5, outer_momentum=0.8)
    model, rng = GPT2(Config(50, 8, 1, 2, 8)), np.random.default_rng(0)
    twin = GPT2(Config(50, 8, 1, 2, 8))
    update, optimizer = Apart(Alone(), model, AdamW(model), config), AdamW(twin)
    start, u = twin.flat_params.astype(np.float64), 0.0
    for step in range(1, 5):
        ids = rng.integers(0, 50, (2, 9))
        batch = ids[:, :-1], ids[:, 1:]
        update.compute([batch], np.array([16]), step - 1, None)
        update.step(step, 1e-2, 1.0)
        twin.forward_backward(*batch)
        optimizer.step(1e-2, 1.0, zero_grad=True)
        if step % 2 == 0:
            d = start - twin.flat_params
            u = 0.8 * u + d
            start = start - 0.5 * (d + 0.8 * u)
            twin.flat_params = start
            assert np.abs(model.flat_params - start).max() < 1e-6
            np.copyto(twin.flat_params, model.flat_params)
            start = twin.flat_params.astype(np.float64)


# ---- jobs --------------------------------------------------------------------------------------------------


def job(folder, name, ranks, **settings):
    """A run on so many ranks that must succeed; its directory."""
    code, out, err = run_ranks(ranks, arguments(folder, folder / name, **settings))
    assert code == 0, err or out
    return folder / name


@contextmanager
def started(ranks, argv):
    """A job whose first step has been made."""
    with subprocess.Popen(mpiexec(ranks, argv), env=MPI_ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        while not process.stdout.readline().startswith("step 1 "):
            pass
        yield process


def assert_same_run(one, two):
    assert differences(one / FINAL, two / FINAL) == []
    assert history(one) == history(two)


@needs_mpi
@pytest.mark.parametrize("settings", [
    FOUR, FOUR | {"precision": "bf16"}, {"accumulation": 2, "arch": "modern", "optimizer": "muon", "schedule": "wsd"}])
def test_ranks_make_the_run_of_one_process(tmp_path, settings):
    one = job(tmp_path, "one", 1, **settings)
    for count in {2, settings["accumulation"]}:
        many = job(tmp_path, f"many{count}", count, **settings)
        assert_same_run(one, many)
        assert [rank["threads"] for rank in read_info(many)["ranks"]] == [1] * count
        assert 0.0 <= read_info(many)["waiting"] <= 1.0


@needs_mpi
def test_a_run_goes_on_with_other_numbers_of_ranks(tmp_path):
    first = job(tmp_path, "first", 4, **FOUR, keep_last=9)
    second, third = tmp_path / "second", tmp_path / "third"
    for count, begin, step, run in ((1, first, 10, second), (2, second, 20, third)):
        code, _, err = run_ranks(count, ["--resume", str(begin / f"checkpoint_step_{step}.bin"), "--run-dir", str(run)])
        assert code == 0, err
        assert_same_run(first, run)


@needs_mpi
def test_a_signal_to_mpiexec_saves_first(tmp_path):
    stopped = tmp_path / "stopped"
    with started(4, arguments(tmp_path, stopped, **FOUR, num_steps=3000)) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted at step" in out and "continue with: mpiexec -n 4" in out
    assert err.count("stops and saves after this step") == 1
    assert (stopped / f"checkpoint_step_{read_info(stopped)['step']}.bin").exists()


@needs_mpi
def test_apart_the_same_ranks_come_to_the_same_numbers_and_go_on_to_the_bit(tmp_path):
    settings = FOUR | {"sync_every": 5, "checkpoint_interval": 15}
    one, two = (job(tmp_path, name, 2, **settings) for name in ("one", "two"))
    assert_same_run(one, two)
    code, out, err = run_ranks(2, ["--resume", str(one / "checkpoint_step_15.bin"), "--run-dir",
                                   str(tmp_path / "again")])
    assert code == 0, err or out
    assert_same_run(one, tmp_path / "again")


@needs_mpi
@pytest.mark.skipif(len(ops.available_isas) < 2, reason="one instruction set was built")
def test_ranks_with_other_kernels_are_refused_and_a_flag_gives_them_the_same(tmp_path):
    best, other = ops.available_isas[:2]
    flags = [*arguments(tmp_path, tmp_path / "run", **FOUR), "--isa"]
    python = [sys.executable, "-m", "feste", "train"]
    job_of_two = [MPIEXEC, "-n", "1", *python, *flags, best, ":", "-n", "1", *python, *flags, other]
    done = subprocess.run(job_of_two, capture_output=True, text=True, env=MPI_ENVIRONMENT, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "another instruction set than rank 0 on" in done.stderr
    assert f": {other}, not {best}; set a common one with --isa NAME" in done.stderr
    job_of_two[job_of_two.index(best)] = other
    subprocess.run(job_of_two, capture_output=True, check=True, env=MPI_ENVIRONMENT, cwd=ROOT, timeout=60)
    assert read_info(tmp_path / "run")["isa"] == other


@needs_mpi
def test_bf16_on_the_wire_learns_the_same_and_says_that_its_bits_are_its_own(tmp_path):
    exact, rounded = job(tmp_path, "exact", 2, **FOUR), job(tmp_path, "rounded", 2, **FOUR, wire="bf16")
    last = [float(history(run)[-1][2]) for run in (exact, rounded)]
    assert last[0] == pytest.approx(last[1], abs=0.01) and last[0] != last[1]


@needs_mpi
@pytest.mark.parametrize(("flags", "said"), [
    ({"accumulation": 3}, "2 ranks cannot share --accumulation=3"),
    ({"accumulation": 2, "data": "/nowhere"}, "cannot read /nowhere"),
    ({"accumulation": 2, "n_heads": 7}, "--n-embd must be divisible")])
def test_what_every_rank_refuses_is_said_once(tmp_path, flags, said):
    begun = time.monotonic()
    code, _, err = run_ranks(2, arguments(tmp_path, tmp_path / "run", **flags))
    assert code == 2 and err.count("error:") == 1 and said in err and len(err.splitlines()) == 1, err
    assert time.monotonic() - begun < 10 and not (tmp_path / "run").exists()


@needs_mpi
@pytest.mark.parametrize(("fault", "said"), [
    ("nan", "training diverged at step 3: the loss is nan, on rank 1 on "),
    ("memory", "not enough memory"), ("defect", "RuntimeError: a defect"), ("disk", "No space left on device")])
def test_a_rank_that_fails_ends_the_job_and_is_named(tmp_path, fault, said):
    begun = time.monotonic()
    code, _, err = run_ranks(2, [fault, *arguments(tmp_path, tmp_path / "run", **FOUR)], CHILD)
    assert code != 0 and time.monotonic() - begun < 15, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0] and ("rank 1 on" in lines[0] or fault == "disk"), err
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["state"] == "failed" and said.split(":")[-1].strip() in info["reason"]


@needs_mpi
def test_a_rank_that_is_killed_ends_the_job_and_nothing_is_lost(tmp_path):
    tally = rank_kills(tmp_path, 2)
    assert tally.lost == 0 and tally.survived == 2, tally.note


@needs_mpi
@pytest.mark.long
def test_a_rank_that_is_heard_of_no_more_ends_the_job(tmp_path):
    run = tmp_path / "run"
    with started(2, arguments(tmp_path, run, **FOUR, num_steps=100_000)) as process:
        os.kill(read_info(run)["ranks"][1]["pid"], signal.SIGSTOP)
        begun = time.monotonic()
        _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 12 and "rank 1 on" in err and "has not been heard of" in err


@pytest.mark.parametrize(("told", "several"), [
    ({}, False), ({"PMI_SIZE": "1", "PMI_RANK": "0"}, False), ({"PMI_SIZE": "4"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True), ({"PMIX_RANK": "0"}, True),
    ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, False), ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "8"}, True),
    ({"SLURM_NTASKS": "8"}, False)])
def test_what_launchers_tell(monkeypatch, told, several):
    monkeypatch.setattr(os, "environ", told)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    assert launcher.launched() is several


def test_an_optimizer_of_one_rank_cannot_become_that_of_another():
    optimizer = AdamW(GPT2(Config(600, 64, 2, 2, 16)))
    buckets = Buckets(optimizer.model.config, 2)
    optimizer.own(buckets.of(0))
    optimizer.own(buckets.of(0))
    with pytest.raises(FesteError, match="one rank among others"):
        optimizer.own(buckets.of(1))


def test_without_mpi_nothing_of_it_is_imported():
    code = ("import sys, feste.cli; from feste import parallel; parallel.world(); "
            "assert not [name for name in sys.modules if name.startswith('mpi4py')]")
    environment = {name: value for name, value in MPI_ENVIRONMENT.items() if not name.startswith(("PMI", "OMPI_COMM"))}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)


def test_a_launcher_without_mpi4py_is_told_what_is_missing(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no mpi4py')")
    environment = MPI_ENVIRONMENT | {"PMI_SIZE": "2", "PMI_RANK": "0", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-m", "feste", "train", "--steps", "1", "--run-dir", str(tmp_path / "run")],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'feste[mpi]'" in done.stderr
    done = subprocess.run([sys.executable, "-m", "feste", "train", "--steps", "1"], env=environment | {"PMI_RANK": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == ""


# ---- the benchmark -----------------------------------------------------------------------------------------


@needs_mpi
def test_the_benchmark_finds_the_same_bits_and_the_bytes_of_the_theory(monkeypatch):
    monkeypatch.setattr(os, "environ", MPI_ENVIRONMENT)
    told = {"size": "tiny", "precision": "fp32", "wire": "fp32", "sequences": 1, "steps": 2, "threads": 1}
    one, two = (ranks.Measured.of(ranks.launch(f"{MPIEXEC} -n {{ranks}}", count, each=2 // count, **told))
                for count in (1, 2))
    assert one.sha256 == two.sha256 and two.exchange > 0.0 and 0.0 <= two.hidden <= 1.0
    assert ranks.theory_bytes("tiny", 2, "fp32") == 4 * 169_728 == 2 * ranks.theory_bytes("tiny", 2, "bf16")


def test_the_model_of_other_machines_behaves():
    model = ranks.Model(10**8, buckets=16, compute=3.0, used=0.9, latency=1e-4, message=1e-5, last=0.15)
    efficiency = [model.efficiency(8, bits) for bits in ranks.LINKS.values()]
    assert efficiency == sorted(efficiency) and 0.0 < efficiency[0] < 0.2 and 0.97 < efficiency[-1] < 1.0
    assert model.efficiency(256, 1e9) < model.efficiency(8, 1e9) < model.efficiency(8, 1e9, wire="bf16")
    assert model.efficiency(8, 1e8, sync_every=100) > 0.8
    assert len(ranks.modelled(model)) == len(ranks.MODES) * len(ranks.MACHINES)
