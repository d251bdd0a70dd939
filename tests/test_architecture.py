"""The house as docs/ARCHITECTURE.md draws it: which room may import which, and how large a room may be."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up; a room imports from floors below its own only.
FLOORS = (
    ("version", "errors", "terminal", "machine", "arguments", "run", "run.names", "formats", "reference", "_ops",
     "_bpe", "_cpu", "_unicode", "launcher", "parallel.watch"),
    ("disk", "config", "ops", "run.rows", "run.journal", "text", "shards", "formats.vocabulary",
     "formats.fields", "parallel.team"),
    ("schedule",),
    ("splits",),
    ("run.follow", "params", "progress", "parquet", "data", "formats.hf_gpt2", "formats.hf_arcee", "transformer",
     "speed"),
    ("run.log", "documents", "formats.*", "generation", "evaluation", "leaves", "parallel.buckets"),
    ("tokenizer", "parallel.exchange"),
    ("tokens", "model", "pairs"),
    ("corpus", "optim"),
    ("run.checkpoint", "parallel.updates"),
    ("run.directory", "parallel.apart", "parallel.state"),
    ("plan", "best", "parallel"),
    ("trainer",),
    ("events",),
    ("cli",),
    ("__main__",),
)
TOOLS = ("tools.monitor", "tools.repl", "tools.plot", "tools.compare", "tools.prepare", "tools.bench", "tools.doctor",
         "tools.export", "tools.import_model", "tools.completion")


def modules(folder: str) -> dict[str, Path]:
    """The modules of a folder by their names: feste.run.log -> its file."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules among `known` that a file imports, also within functions; what only an editor reads is left out."""
    tree, package = ast.parse(path.read_text()), path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found & known


FESTE, TOOL = modules("feste"), modules("tools")
KNOWN = {*FESTE, *TOOL, "feste._ops", "feste._bpe", "feste._cpu"} - {"feste", "tools"}


def floor(module: str) -> int:
    name = module.removeprefix("feste.")
    for room in (name, name.rpartition(".")[0] + ".*"):
        for n, rooms in enumerate(FLOORS):
            if room in rooms:
                return n
    raise AssertionError(f"{module} has no floor yet: give it one above, and a place in docs/ARCHITECTURE.md")


@pytest.mark.parametrize("module", sorted(set(FESTE) - {"feste"}))
def test_imports_run_down(module):
    for imported in imports(FESTE[module], KNOWN) - {module}:
        assert imported.startswith("feste."), f"{module} imports {imported}"
        assert floor(imported) < floor(module), f"{module} imports {imported}"


def test_tools_do_not_import_each_other():
    for module, path in TOOL.items():
        own = next((tool for tool in TOOLS if module == tool or module.startswith(tool + ".")), None)
        others = {imported for imported in imports(path, KNOWN) for tool in TOOLS
                  if tool != own and (imported == tool or imported.startswith(tool + "."))}
        assert not others, f"{module} imports {others}"


def reached(module: str) -> set[str]:
    """All modules that are loaded with one."""
    files, seen, rest = FESTE | TOOL, set(), [module]
    while rest:
        name = rest.pop()
        if name not in seen:
            seen.add(name)
            rest += imports(files[name], KNOWN) if name in files else ()
    return seen


def test_the_monitor_knows_a_run_by_its_directory_only():
    loaded = set().union(*(reached(name) for name in TOOL if name.startswith("tools.monitor") and "demo" not in name))
    assert "feste.run.follow" in loaded and not loaded & {"feste.model", "feste.ops", "feste.trainer", "feste._ops"}


def test_model_knows_no_files_and_the_trainer_no_kernels():
    assert not reached("feste.model") & {"feste.disk", "feste.run.checkpoint", "feste.run.directory", "feste.corpus"}
    assert "feste._ops" not in imports(FESTE["feste.trainer"], KNOWN)


def test_below_the_command_line_nothing_speaks_of_flags():
    """An error below states a fact and names parameters; what their flags are called is known to cli alone."""
    for module, path in FESTE.items():
        if module not in ("feste.cli", "feste.arguments", "feste.__main__"):
            strings = [node.value for node in ast.walk(ast.parse(path.read_text()))
                       if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            for text in strings:
                assert not re.search(r"(?<![\w-])--[a-z]", text), f"{module}: {text!r:.120}"


SOURCES = [path for folder in ("feste", "tools", "examples", "tests") for path in (ROOT / folder).rglob("*")
           if path.suffix in (".py", ".pyx", ".pxi", ".h") and "build" not in path.parts]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_held_in_the_head(path):
    lines = path.read_text().count("\n")
    assert lines <= 700, f"{path} has {lines} lines"
    if path.suffix == ".py" and "tests" not in path.parts:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"
