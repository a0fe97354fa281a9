"""Settings of the documentation site; `scripts/docs` builds it strictly."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from tallystick.version import __version__

project = "Tallystick"
author = "The Tallystick authors"
project_copyright = "The Tallystick authors, MIT licence"
version = release = __version__

extensions = ["mermaid", "myst_parser"]
exclude_patterns = ["README.md", "node_modules", "generate", "checks", "_ext", "_static"]
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r".*")]  # signatures of the Python API name types of other libraries

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist", "attrs_block"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 4
default_role = "code"
suppress_warnings = ["misc.highlighting_failure"]  # console blocks hold output, which is no code

smartquotes = False  # it would turn options such as --json into dashes
html_theme = "furo"
html_title = f"Tallystick {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "default"
pygments_dark_style = "github-dark"
