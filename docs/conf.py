"""The documentation site: `make docs` builds it into build/site with Sphinx, MyST and furo."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from feste import __version__
from feste.cli import MODEL_HELP

project = "feste"
author = "the authors of feste"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}


def list_the_dials(app, what, name, thing, options, lines) -> None:
    """Below the docstring of a configuration: each field, its default, and the sentence that --help shows."""
    if what == "class" and dataclasses.is_dataclass(thing) and hasattr(thing, "from_dict"):
        for field in dataclasses.fields(thing):
            sentence = field.metadata.get("help") or MODEL_HELP.get(field.name, "")
            lines += ["", f"``{field.name} = {field.default!r}``: {sentence}"]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", list_the_dials)


html_theme = "furo"
html_title = f"feste {version}"
html_favicon = "favicon.svg"
html_logo = "favicon.svg"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#3f51b5", "color-brand-content": "#3949ab"},
    "dark_css_variables": {"color-brand-primary": "#9fa8da", "color-brand-content": "#9fa8da"},
}
html_show_copyright = html_show_sourcelink = html_show_sphinx = False
