"""Sphinx: the settings of the documentation; from_code.py beside it makes the pages that come from the code."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from compress import __version__

project, author, copyright = "compress", "the compress authors", "the compress authors, Apache-2.0"
release = version = __version__
extensions = ["myst_parser", "from_code"]
exclude_patterns = ["generated/*.part.md"]
html_theme, html_title = "furo", f"compress {__version__}"
# Links to a heading of a page, as in `recipes.md#schemes`.
myst_heading_anchors = 4
