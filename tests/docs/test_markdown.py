"""Reading Markdown files: blocks, spans, links and anchors, with their lines."""

from __future__ import annotations

from pathlib import Path

from docs.checks.markdown import Page, pages

TEXT = """# The title

A `span` and a `longer
span`, [a link](other.md#part).

- a list with a block:

  ```sh run
  echo `this is no span`
  ```

````text
```
a fence inside
```
````

## A part, with signs!
"""


def test_a_page_is_split_into_blocks_and_prose(tmp_path: Path) -> None:
    """Blocks lose their indent, spans may continue on the next line, and code holds no spans."""
    path = tmp_path / "page.md"
    path.write_text(TEXT, encoding="utf-8")
    page = Page(path)
    assert [(block.line, block.info, block.text) for block in page.blocks] == [
        (8, ("sh", "run"), "echo `this is no span`\n"),
        (12, ("text",), "```\na fence inside\n```\n"),
    ]
    assert list(page.spans()) == [(3, "span"), (3, "longer span")]
    assert list(page.links()) == [(4, "other.md#part")]
    assert page.anchors() == {"the-title", "a-part-with-signs"}


def test_every_page_for_readers_is_checked() -> None:
    """Pages of the site and those beside the code are read; those of other projects are not."""
    names = {"/".join(page.path.parts[-2:]) for page in pages()}
    assert {"docs/index.md", "tutorials/buy.md", "contracts/README.md", "examples/README.md"} <= names
    assert not any("node_modules" in page.path.parts for page in pages())
