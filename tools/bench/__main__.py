"""The command line of the benchmarks: one function for each discipline."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from feste.arguments import Parser
from feste.cli import guarded
from feste.corpus import shakespeare_text
from feste.errors import FesteError
from feste.ops import get_num_threads, use
from feste.tokenizer import BPETokenizer

from . import report
from .alternation import LIMITS, Figure, alternate, figures, limit_to, ratios
from .documents import VOCAB_SIZES
from .generation import TOKENS
from .inputs import write_inputs
from .learn import Learned, recipes
from .profile import profile
from .ranks import LINKS, Measured, Model, launch, modelled, theory_bytes
from .sizes import SEQUENCES, SIZES, gemm_shapes, model_config

PRECISIONS = ("fp32", "bf16")  # of what is measured, if nothing is said; generation also has int8
GENERATION_PRECISIONS = (*PRECISIONS, "int8")
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # of the losses of the first steps, in nats
DOCUMENT_LENGTHS = [6, 60, 600, 6_000, 60_000, 6_000_000]
ACCUMULATION = {"gpt2": 4}                # as in the presets: mini-batches are what keeps memory small


def quiet(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def peers_of(size: str, peers, folder: str) -> dict[str, dict]:
    """What each form of PyTorch is told of a model: the file of its parameters and its batch, heads and threads."""
    if not peers:
        return {}
    config = model_config(size)
    inputs = write_inputs(Path(folder, f"{size}.npz"), config, SEQUENCES)
    return {name: {"inputs": inputs, "n_heads": config.n_heads, "threads": get_num_threads()} for name in peers}


def steps(args) -> dict:
    """Whole optimizer steps of 8 sequences, beside PyTorch eager and compiled."""
    report.headline("optimizer steps of 8 sequences a second: median (range)")
    rows, tables = [], []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            told = {"feste": {"size": size, "accumulation": ACCUMULATION.get(size, 1)},
                    **peers_of(size, args.peers, folder)}
            measured = {precision: _steps_in(precision, told, args) for precision in args.precisions}
        for precision, (results, missing) in measured.items():
            rows.append(steps_row(size, precision, results, missing))
            tables.append(steps_cells(rows[-1], results))
    report.show(["model", "precision", "feste", "PyTorch eager", "PyTorch compile", "ratio to the best", "of peak"],
                tables)
    for size in args.sizes:
        best = best_of_any_precision([row for row in rows if row["size"] == size])
        if best:
            report.console.print(best, highlight=False)
    if args.plot:
        report.chart(args.plot, rows)
    return {"steps": rows}


def _steps_in(precision: str, told: dict[str, dict], args) -> tuple[dict, dict]:
    """Results of every program in one precision; their losses must agree."""
    programs = {name: arguments | {"precision": precision, "seconds": args.seconds} for name, arguments in told.items()}
    results, missing = alternate("steps", programs, args.rounds, args.peer_python, quiet)
    verify_losses(results, TOLERANCE[precision])
    return results, missing


def verify_losses(results: dict[str, list[dict]], tolerance: float) -> None:
    """All programs start from the same weights and see the same batch, so they must report the same losses."""
    ours = results["feste"][0]["losses"]
    for name, rounds in results.items():
        for theirs in rounds:
            worst = max(abs(a - b) for a, b in zip(ours, theirs["losses"], strict=True))
            if worst > tolerance:
                raise SystemExit(f"{name} computes something else: losses {theirs['losses']} against {ours}")


def steps_row(size: str, precision: str, results: dict, missing: dict) -> dict:
    measured = figures(results, "steps_per_second")
    peers = {name: measured[name] for name in ("eager", "compile") if name in measured}
    best = max(peers, key=lambda name: peers[name].median, default=None)
    ratio = ratios(results, "steps_per_second", "feste", best) if best else None
    return {"size": size, "precision": precision, "best_peer": best, "missing": missing,
            "median": {name: figure.median for name, figure in measured.items()},
            "values": {name: figure.values for name, figure in measured.items()},
            "ratio": ratio.values if ratio else None,
            "share_of_peak": [result["share_of_peak"] for result in results["feste"]]}


def steps_cells(row: dict, results: dict) -> list[str]:
    shown = {name: str(Figure(values)) for name, values in row["values"].items()}
    share = Figure(row["share_of_peak"])
    return [row["size"], row["precision"], shown["feste"], shown.get("eager", "-"), shown.get("compile", "-"),
            str(Figure(row["ratio"])) if row["ratio"] else "-", f"{share.median:.0%}"]


def best_of_any_precision(rows: list[dict]) -> str | None:
    ours = max(row["median"]["feste"] for row in rows)
    theirs = [value for row in rows for name, value in row["median"].items() if name != "feste"]
    if not theirs or len(rows) < 2:
        return None
    return f"{rows[0]['size']}: best feste {ours:.3g} / best PyTorch {max(theirs):.3g} = {ours / max(theirs):.2f}"


def generation(args) -> dict:
    """Tokens a second, beside transformers' generate."""
    report.headline("generated tokens a second, one sample: median (range); limit: the weights are read, no more")
    data, table = {}, []
    for size in args.sizes:
        for precision in (args.precisions if args.precisions != PRECISIONS else GENERATION_PRECISIONS):
            common = {"precision": precision, "seconds": args.seconds}
            programs = {"feste": common | {"size": size}, "transformers": common | {
                "model": model_config(size).to_dict(), "tokens": TOKENS[size], "threads": get_num_threads()}}
            if precision == "int8":
                del programs["transformers"]  # which has no weights of 8 bits for the CPU
            results, _ = alternate("generation", programs, args.rounds, args.peer_python, quiet)
            measured = figures(results, "tokens_per_second")
            ratio = str(ratios(results, "tokens_per_second", "feste", "transformers")) if len(measured) == 2 else "-"
            share = Figure([found["tokens_per_second"] / found["limit"] for found in results["feste"]])
            table.append([size, precision, str(measured["feste"]), f"{share.median:.0%}",
                          str(measured.get("transformers", "-")), ratio])
            data[f"{size} {precision}"] = {name: figure.values for name, figure in measured.items()}
    report.show(["model", "precision", "feste", "of the limit", "transformers", "ratio"], table)
    return {"generation": data}


def by_key(results: dict[str, list[dict]], keys: list[str]) -> dict[str, dict[str, list[float]]]:
    """key -> program -> its values, for the programs that have the key."""
    return {key: {name: [r[key] for r in rounds] for name, rounds in results.items() if key in rounds[0]}
            for key in keys}


def kernels(args) -> dict:
    """Single operations, beside NumPy's BLAS and PyTorch."""
    report.headline("GFLOP/s (ns/element where marked): medians")
    names = ("feste-fp32", "numpy", "torch-fp32", "feste-bf16", "torch-bf16")
    shapes = {}
    for size in args.sizes:
        c = model_config(size)
        shapes[size] = {"gemm": gemm_shapes(size), "attention": (SEQUENCES, c.block_size, c.n_heads, c.head_size)}
    programs = {name: {"seconds": args.seconds / 10, "shapes": shapes, "threads": get_num_threads()}
                for name in names}
    results, _ = alternate("kernels", programs, args.rounds, args.peer_python, quiet)
    keys = list(dict.fromkeys(key for rounds in results.values() for key in rounds[0]))
    data = by_key(results, keys)
    report.show(["operation", *results], [[key, *(f"{Figure(data[key][name]).median:.3g}" if name in data[key] else "-"
                                                   for name in results)] for key in keys])
    return {"kernels": data}


def tokenizer(args) -> dict:
    """Training, encoding and decoding the whole corpus, beside Hugging Face, rustbpe and tiktoken."""
    report.headline("tokenizer on the whole corpus: medians")
    with tempfile.TemporaryDirectory() as folder:
        text, ranks = Path(folder, "corpus.txt"), Path(folder, "ranks.tiktoken")
        text.write_text(shakespeare_text(), encoding="utf-8")
        BPETokenizer.train(shakespeare_text(), VOCAB_SIZES[-1]).export_tiktoken(ranks)
        programs = {name: {"text": str(text), "ranks": str(ranks)}
                    for name in ("feste", "rustbpe", "tiktoken", "huggingface")}
        results, _ = alternate("tokenizer", programs, args.rounds, args.peer_python, quiet)
    require_one({rounds[0]["digest"] for rounds in results.values() if "digest" in rounds[0]})
    keys = [key for key in results["feste"][0] if key != "digest"]
    data = by_key(results, keys)
    report.show(["", *results], [[key, *(str(Figure(data[key][name])) if name in data[key] else "-"
                                         for name in results)] for key in keys])
    return {"tokenizer": data}


def require_one(digests: set) -> None:
    if len(digests) > 1:
        raise SystemExit(f"the programs' token ids differ: {digests}")


def documents(args) -> dict:
    """Many documents: training on an iterable and encode_batch, beside Hugging Face, by the length of a document."""
    report.headline("microseconds a document: medians (range)")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "corpus.txt")
        text.write_text(shakespeare_text(), encoding="utf-8")
        told = {"text": str(text), "lengths": DOCUMENT_LENGTHS, "vocab_size": 2000, "threads": get_num_threads()}
        results, _ = alternate("documents", {"feste": told, "huggingface": told}, args.rounds, args.peer_python, quiet)
    for length in DOCUMENT_LENGTHS:
        require_one({rounds[0][f"digest {length}"] for rounds in results.values()})
    keys = [key for key in results["feste"][0] if not key.startswith("digest")]
    data, table = by_key(results, keys), []
    for key in keys:
        ratio = str(ratios(results, key, "huggingface", "feste")) if len(results) == 2 else "-"
        table.append([key, *(str(Figure(data[key][name])) for name in results), ratio])
    report.show(["characters", *results, "ratio"], table)
    return {"documents": data}


def growth(args) -> dict:
    """Time to encode texts that are hard for an encoder, against their length."""
    report.headline("encoding, ns for each byte, by length in bytes; constant is linear time")
    results, _ = alternate("tokenizer_growth", {"feste": {}}, 1, say=quiet)
    cells = results["feste"][0]
    sizes = sorted({int(key.rpartition(" ")[2]) for key in cells})
    kinds = list(dict.fromkeys(key.rpartition(" ")[0] for key in cells))
    report.show(["text", *map(str, sizes)], [[kind, *(f"{cells[f'{kind} {size}']:.3g}" for size in sizes)]
                                             for kind in kinds])
    if args.plot:
        growth_chart(args.plot, cells, kinds, sizes)
    return {"growth": cells}


def growth_chart(path: str, cells: dict, kinds: list[str], sizes: list[int]) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 4))
    for kind in kinds:
        axes.loglog(sizes, [cells[f"{kind} {size}"] * size / 1e6 for size in sizes], marker="o", label=kind)
    axes.set_xlabel("bytes")
    axes.set_ylabel("milliseconds to encode")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def stream(args) -> dict:
    """Tokenizer training on 500 MB of varied text that is never whole in memory."""
    report.headline("training V = 32,768 on a stream of varied text")
    results, _ = alternate("tokenizer_stream", {"feste": {"megabytes": args.megabytes}}, 1, say=quiet)
    r = results["feste"][0]
    report.console.print(f"{r['megabytes']} MB: {r['seconds']:.1f} s, peak memory beyond the text "
                         f"{r['peak_bytes_beyond_text'] / 1e6:,.0f} MB", highlight=False)
    return {"stream": r}


def memory(args) -> dict:
    """Peak resident memory of training steps of 8 sequences."""
    report.headline("peak resident memory of training steps of 8 sequences, MB")
    data, table = {}, []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            told = {"feste": {"size": size, "accumulation": ACCUMULATION.get(size, 1)},
                    **peers_of(size, ("eager",), folder)}
            for precision in args.precisions:
                programs = {name: arguments | {"precision": precision} for name, arguments in told.items()}
                results, _ = alternate("memory", programs, 1, args.peer_python, quiet)
                found = {name: rounds[0]["peak_bytes"] for name, rounds in results.items()}
                data[f"{size} {precision}"] = found
                table.append([size, precision, *(f"{found.get(name, 0) / 1e6:,.0f}" for name in told)])
    report.show(["model", "precision", "feste", "PyTorch eager"], table)
    return {"memory": data}


def length(args) -> dict:
    """Time and memory of the medium model, one sequence of growing length."""
    report.headline("medium model, one sequence: length scaling")
    lengths, table, data = (256, 512, 1024, 2048, 4096), [], {}
    for T in lengths:
        results, _ = alternate("steps", {"feste": {"size": "medium", "precision": "fp32", "block_size": T,
                                                   "sequences": 1, "seconds": args.seconds}}, args.rounds, say=quiet)
        rate = figures(results, "steps_per_second")["feste"]
        data[T] = {"steps_per_second": rate.values, "peak_bytes": results["feste"][0]["peak_bytes"]}
        table.append([str(T), f"{1e6 / rate.median / T:.1f}", f"{data[T]['peak_bytes'] / 1e6:,.0f}"])
    report.show(["T", "us a token", "peak MB"], table)
    return {"length": data}


def threads(args) -> dict:
    """What each thread brings."""
    report.headline("steps a second by threads: median (range)")
    counts, data, table = list(range(1, get_num_threads() + 1)), {}, []
    for size in args.sizes:
        common = {"program": "feste", "size": size, "precision": "fp32", "seconds": args.seconds,
                  "accumulation": ACCUMULATION.get(size, 1)}
        results, _ = alternate("steps", {str(n): common | {"threads": n} for n in counts}, args.rounds, say=quiet)
        measured = figures(results, "steps_per_second")
        gain = ratios(results, "steps_per_second", str(counts[-1]), "1")
        data[size] = {name: figure.values for name, figure in measured.items()}
        table.append([size, *(str(measured[str(n)]) for n in counts), str(gain)])
    report.show(["model", *map(str, counts), "gain"], table)
    return {"threads": data}


def saves(args) -> dict:
    """How long checkpoints hold a run up."""
    report.headline("the wait for a checkpoint, one at every validation: median (range)")
    data, table = {}, []
    for size in args.sizes:
        arguments = {"size": size, "accumulation": ACCUMULATION.get(size, 1)}
        results, _ = alternate("saves", {"feste": arguments}, args.rounds, say=quiet)
        data[size] = {key: figures(results, key)["feste"].values for key in results["feste"][0]}
        share = Figure([100 * value for value in data[size]["share"]])
        table.append([size, *(str(Figure([1e3 * value for value in data[size][key]]))
                              for key in ("step_seconds", "save_seconds")), f"{share} %"])
    report.show(["model", "step, ms", "wait for a save, ms", "share of the time"], table)
    return {"saves": data}


def long_run(args) -> dict:
    """3,000 steps of the small example: growth of memory, files left open."""
    report.headline("a long run of the small example")
    results, _ = alternate("long_run", {"feste": {"steps": 3000}}, 1, say=quiet)
    r = results["feste"][0]
    report.console.print(f"{r['steps']:,} steps: {r['warm_bytes'] / 1e6:.1f} MB after the warm-up, at most "
                         f"{r['growth_bytes'] / 1e6:.2f} MB more later; {r['files_left_open']} files left open",
                         highlight=False)
    return {"long_run": r}


def where(args) -> dict:
    """Where the time of a step goes."""
    for size in args.sizes:
        for precision in args.precisions:
            print(profile(size, precision, {"tiny": 200, "small": 40, "medium": 8, "gpt2": 1}[size]))
    return {}


def monitor(args) -> dict:
    """How quickly the monitor shows a long run."""
    from .monitor import measure
    report.headline("monitor on a run of a million rows")
    result = measure()
    for name, value in result.items():
        report.console.print(f"{name:40} {value:.3g}", highlight=False)
    return {"monitor": result}


def learn(args) -> dict:
    """What the recipes learn, and what each part of the modern one is worth, on several seeds (tiny and small)."""
    report.headline("held-out loss in nats: median (range)")
    found = {}
    for size in args.sizes if args.sizes != SIZES else ("tiny", "small"):
        learned = [Learned.of(name, preset, args.seeds, args.steps) for name, preset in recipes(size)]
        found[size] = [asdict(one) for one in learned]
        rows = [[one.name, one.final.to(4), one.best.to(4), one.step_milliseconds.to(3)] for one in learned]
        report.show([size, "end of the run", "best validation", "ms a step"], rows)
    return {"learn": found}


def ranks(args) -> dict:
    """What several ranks bring, under --launcher; and a model of more machines than are at hand."""
    report.headline("steps on several ranks, in step with each other")
    data, table, by_size = {}, [], {}
    for size in args.sizes if args.sizes != SIZES else ("medium",):
        for count in args.ranks:
            told = {"size": size, "precision": args.precisions[0], "wire": args.wire, "sequences": args.sequences,
                    "each": args.total // count if args.total else 1, "steps": args.steps or 5, "threads": args.threads}
            quiet(f"  {size} on {count} ranks")
            one = Measured.of(launch(args.launcher, count, **told))
            theory = theory_bytes(size, count, args.wire)
            if count > 1:
                by_size.setdefault(size, []).append(one)
            data[f"{size} {count}"] = asdict(one) | {"theory_bytes": theory}
            table.append([size, str(count), f"{one.step:.3g}", f"{one.compute:.3g}", f"{one.exchange:.3g}",
                          f"{one.exposed:.3g}", f"{one.hidden:.0%}" if count > 1 else "-", f"{one.gather:.3g}",
                          f"{one.sent / 1e6:,.1f} / {theory / 1e6:,.1f}", f"{one.peak_bytes / 1e6:,.0f}",
                          one.sha256[:8]])
    report.show(["model", "ranks", "step, s", "alone", "gradients", "waited", "hidden", "parameters",
                 "MB sent / theory", "peak MB", "bits"], table)
    for size, several in by_size.items():
        if args.link and len(several) > 1:
            model = Model.fitted(several, size, args.link * 1e6, args.compute or several[0].compute)
            report.console.print(f"\na model, no measurement: {size}, machines that compute {model.compute:.3g} s a "
                                 f"step each; {model.used:.0%} of a link's bandwidth, {1e6 * model.latency:.0f} us "
                                 f"there and back and {1e6 * model.message:.0f} us a message are fitted to the above. "
                                 "Efficiency:", highlight=False)
            report.show(["mode", "machines", *LINKS], modelled(model))
            data[f"{size} model"] = asdict(model)
    return {"ranks": data}


DISCIPLINES = {f.__name__: f for f in (steps, generation, kernels, tokenizer, documents, growth, stream, memory, length,
                                       threads, saves, long_run, where, monitor, learn, ranks)}


def short(args) -> dict:
    """The form of `make bench`, under 5 minutes."""
    args.rounds, args.seconds = 3, 1.0
    results = steps(with_sizes(args, "tiny", "small", "medium", peers=("eager",)))
    results |= generation(with_sizes(args, "tiny", "medium"))
    args.rounds = 1
    return results | tokenizer(args)


def long(args) -> dict:
    """Everything, with PyTorch compiled and the GPT-2 size: about an hour."""
    results = {}
    for discipline in DISCIPLINES.values():
        results |= discipline(args)
    return results


def with_sizes(args, *sizes: str, peers: tuple[str, ...] | None = None):
    return argparse.Namespace(**(vars(args) | {"sizes": sizes, "peers": peers or args.peers}))


ALL = DISCIPLINES | {"short": short, "long": long}
PROG = "python -m tools.bench"
EXAMPLES = """
disciplines:
{disciplines}

examples:
  {prog} steps --sizes tiny small --peers        feste alone
  {prog} steps --peer-python ~/torch/bin/python  beside the PyTorch of another environment
  {prog} where --sizes medium --precisions fp32  where the time of a step goes
"""


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:12}{function.__doc__.splitlines()[0]}" for name, function in ALL.items())
    parser = Parser(prog=prog, description="Measure speed and memory.",
                    epilog=EXAMPLES.format(prog=prog, disciplines=listed))
    parser.add_argument("discipline", choices=list(ALL), metavar="DISCIPLINE", help="what to measure, see below")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="models (default: all four)")
    parser.add_argument("--precisions", nargs="+", choices=GENERATION_PRECISIONS, default=PRECISIONS,
                        help="(default: fp32 and bf16; of generation, int8 too)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="alternations (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S",
                        help="time for each measurement of a round (default: 3)")
    parser.add_argument("--megabytes", type=int, default=500, metavar="N",
                        help="text of the stream discipline (default: 500)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each recipe in learn (default: 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="of each run in learn (default: the preset's)")
    parser.add_argument("--isa", choices=LIMITS, help="instruction set of feste and its peers, to measure as on an "
                        "older CPU (default: the best that this one has)")
    several = parser.add_argument_group("ranks")
    several.add_argument("--ranks", nargs="+", type=int, default=(1, 2), metavar="N", help="numbers of ranks")
    several.add_argument("--launcher", default="mpiexec -n {ranks}", metavar="CMD", help="what starts so many "
                         "processes (default: mpiexec -n {ranks})")
    several.add_argument("--total", type=int, metavar="N", help="mini-batches of a step, divided among the ranks "
                         "(default: one for each rank)")
    several.add_argument("--sequences", type=int, default=8, metavar="N", help="of a mini-batch (default: 8)")
    several.add_argument("--threads", type=int, default=0, metavar="N", help="of a rank (default: its share)")
    several.add_argument("--link", type=float, metavar="MBIT", help="the links' bandwidth in Mbit/s, to fit a model")
    several.add_argument("--compute", type=float, metavar="S", help="seconds that a machine of the model computes in a "
                         "step (default: as measured)")
    several.add_argument("--wire", choices=PRECISIONS, default="fp32", help="(default: fp32)")
    peers = parser.add_argument_group("peers")
    peers.add_argument("--peers", nargs="*", choices=("eager", "compile"), default=("eager", "compile"),
                       help="forms of PyTorch to compare the steps with (default: both)")
    peers.add_argument("--peer-python", default=sys.executable, metavar="PYTHON",
                       help="the interpreter of the peers, if PyTorch lives in an environment of its own")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write all values here")
    output.add_argument("--plot", metavar="FILE", help="draw the comparison here (steps, growth)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    args = make_parser(prog).parse_args(argv)

    def measure() -> int:
        if args.isa:
            limit_to(args.isa)
            try:
                use(args.isa)
            except ImportError as error:
                raise FesteError(str(error).replace("FESTE_ISA=", "--isa ")) from None
        results = ALL[args.discipline](args)
        if args.json:
            report.write_json(args.json, results)
        return 0

    return guarded(measure, {})


if __name__ == "__main__":
    sys.exit(main())
