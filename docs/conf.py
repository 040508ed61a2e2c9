"""Sphinx configuration: `make docs` builds these pages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import generated

import mpd_gym

project = "mpd_gym"
copyright = "the mpd_gym authors, MIT licence"
release = version = mpd_gym.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["results/*.*.md"]  # what was found, which the pages beside them hold
default_role = "py:obj"

myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # docstrings of environments and commands begin at their level

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_type_aliases = {"Array": "Array"}
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"mpd_gym {release}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_sphinx = False


def readable(*event: Any) -> tuple[str | None, str | None]:
    """Write the default of a field that a factory makes so that Sphinx can parse the signature."""
    *_, signature, returned = event
    return signature and signature.replace("<factory>", "..."), returned


def setup(app: Any) -> None:
    """Fill in what is generated."""
    app.connect("source-read", generated.fill_in)
    app.connect("autodoc-process-signature", readable)
