"""Sphinx configuration: `make docs`, or `sphinx-build -W docs docs/_build/html`."""

import importlib.metadata

project = "lightning-mtl"
author = "the lightning-mtl authors"
copyright = f"2026, {author}"
try:
    release = importlib.metadata.version("lightning-mtl")
except importlib.metadata.PackageNotFoundError:  # read from a source tree that is not installed
    release = "0.1.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

html_theme = "furo"
html_title = f"lightning-mtl {release}"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
