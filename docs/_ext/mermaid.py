"""Renders ```mermaid blocks to inline SVG while the site is built, so pages need no script and no network.

Colours are CSS variables of `_static/site.css`, which follow the reader's light or dark theme.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parent.parent
FITS_PHONES = 640
"""Pixels. Diagrams that are wider are not shrunk to a phone's width; they scroll."""
RENDERER = DOCS / "_ext" / "render_mermaid.mjs"
_WEB_FONT = re.compile(r"\s*@import url\([^)]*\);")
_logger = getLogger(__name__)


class Mermaid(SphinxDirective):
    """A Mermaid diagram. The first line may be a comment, `%% …`, which becomes the accessible title."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Returns one placeholder node, which `render` fills for all diagrams of a page at once."""
        node = nodes.container(classes=["diagram"], mermaid="\n".join(self.content))
        self.set_source_info(node)
        return [node]


def render(_app: Sphinx, tree: nodes.document) -> None:
    """Replaces the diagrams of a page by SVG. A diagram that does not parse is a warning, which fails a strict build."""
    diagrams = [node for node in tree.findall(nodes.container) if "mermaid" in node]
    if not diagrams:
        return
    sources: list[str] = [node["mermaid"] for node in diagrams]
    for node, source, result in zip(diagrams, sources, _rendered(sources), strict=True):
        del node["mermaid"]
        if "error" in result:
            _logger.warning("Mermaid: %s", result["error"], location=node)
            continue
        for label in _missing_labels(source, result["svg"]):
            _logger.warning("Mermaid: the renderer dropped %r", label, location=node)
        node.append(nodes.raw("", _with_title(result["svg"], source), format="html"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("mermaid", Mermaid)
    app.connect("doctree-read", render)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _rendered(sources: list[str]) -> list[dict[str, str]]:
    drawn = [re.sub(r"^\s*%%.*\n", "", source, flags=re.MULTILINE) for source in sources]
    run = subprocess.run(["node", RENDERER], input=json.dumps(drawn), capture_output=True, text=True, check=False)
    if run.returncode:
        raise ExtensionError(f"Mermaid: node failed (run scripts/docs, which installs the renderer): {run.stderr[-2000:]}")
    results: list[dict[str, str]] = json.loads(run.stdout)
    return results


def _with_title(svg: str, source: str) -> str:
    title = source.partition("\n")[0].removeprefix("%%").strip() if source.startswith("%%") else "Diagram"
    head, _, rest = _WEB_FONT.sub("", svg).partition(">")
    escaped = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    width = re.search(r'\bwidth="([0-9.]+)"', head)
    phone = "0" if width and float(width[1]) <= FITS_PHONES else "34rem"
    head = head.replace('style="', f'style="--phone-width:{phone};', 1)
    return f'{head} role="img" aria-label="{escaped}">{rest}'


def _missing_labels(source: str, svg: str) -> list[str]:
    """Words of the source's labels that are not in the drawing: the renderer skips lines that it cannot parse."""
    text = " ".join(re.findall(r">([^<>]+)<", svg))
    words = {word for line in source.splitlines() for word in _label_words(line)}
    return sorted(word for word in words if word not in text)


def _label_words(line: str) -> list[str]:
    if line.lstrip().startswith("%%"):
        return []
    quoted = re.findall(r'"([^"]*)"', line)
    message = re.findall(r":\s(.*)$", line)
    text = re.sub(r"<br\s*/?>", " ", " ".join(quoted + message))
    return re.findall(r"[A-Za-z]{3,}", text)
