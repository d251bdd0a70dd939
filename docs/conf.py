"""The documentation site: `make docs` builds it into build/site with Sphinx, MyST and furo."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from feste import __version__

project = "feste"
author = "the authors of feste"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "undoc-members": False}

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
