"""The public names: what an editor sees, what is handed on, and what is documented are the same."""

import ast
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import feste


def seen_by_an_editor() -> dict[str, set[str]]:
    """Module -> names that feste/__init__.py imports for editors."""
    tree = ast.parse(Path(feste.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    return {node.module: {alias.name for alias in node.names} for node in block.body}


def test_editors_see_what_is_handed_on():
    handed_on = {f"feste.{module}": set(names) for module, names in feste._HOME.items()}
    assert seen_by_an_editor() == handed_on
    assert set(feste.__all__) == set().union(*handed_on.values()) and set(feste.__all__) <= set(dir(feste))


@pytest.mark.parametrize("name", feste.__all__)
def test_a_public_name_is_documented(name):
    thing = getattr(feste, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert thing.__module__.startswith("feste.") and thing.__doc__
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(value) and not member.startswith("_") and len(inspect.getsource(value)) > 160:
                assert value.__doc__, f"{name}.{member}"


def test_a_name_that_is_none_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'GPT3'"):
        feste.GPT3  # noqa: B018


def test_importing_feste_loads_no_kernels():
    code = "import sys, feste; print([name for name in sys.modules if '_ops' in name or name == 'numpy'])"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "[]\n", done.stderr


def test_help_on_training_lists_its_dials():
    for name, value in feste.TrainConfig().to_dict().items():
        assert f"- {name}={value!r}: " in pydoc.render_doc(feste.train_gpt2)
