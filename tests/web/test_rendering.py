"""What templates get to write numbers, times and addresses with, and that they escape."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from tallystick.web.rendering import Pages, age, milliseconds, short_address


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "now"), (0.9, "now"), (1, "1 s"), (59.9, "59 s"), (60, "1 min"), (3_599, "59 min"), (7_200, "2 h"), (200_000, "2 d")],
)
def test_age(seconds: float, text: str) -> None:
    """In the largest unit that is at least one."""
    assert age(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "\N{EN DASH}"), (7, "7 ms"), (1_234, "1,234 ms"), (10_000, "10 s"), (61_500, "62 s")]
)
def test_milliseconds(value: float, text: str) -> None:
    """Unknown times are a dash."""
    assert milliseconds(value) == text


def test_addresses() -> None:
    """Long ones are shortened, short ones are not."""
    assert short_address("0x" + "ab" * 20) == "0xabab…abab"
    assert short_address("0x1234567890") == "0x1234567890"


def test_text_is_escaped_and_names_must_exist(tmp_path: Path) -> None:
    """A template cannot leave a name out silently."""
    (tmp_path / "a.html").write_text("{{ text }} {{ price | dollars }}")
    pages = Pages(tmp_path, product="p", sections={})
    assert bytes(pages.render("a.html", text="<b>'\"&", price=1_250_000).body) == b"&lt;b&gt;&#39;&#34;&amp; 1.25"
    with pytest.raises(jinja2.UndefinedError):
        pages.render("a.html", text="")
