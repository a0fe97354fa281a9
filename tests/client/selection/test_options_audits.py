"""Options of a request, and of a caller's API key, about who may see it because of an audit."""

from __future__ import annotations

import pytest

from tallystick.client.config import ApiKey
from tallystick.client.selection.options import read_options, restrict_to_key
from tallystick.protocol.errors import BadMessage


def test_a_request_says_who_may_see_it() -> None:
    """Yes, no, or that it is private."""
    assert read_options('{"share_prompt": true}')[0] == {"share_prompt": True}
    assert read_options('{"share_prompt": false, "private": true}')[0] == {"share_prompt": False, "private": True}


@pytest.mark.parametrize("header", ['{"share_prompt": "yes"}', '{"share_prompt": null}', '{"private": 1}'])
def test_other_values_are_refused(header: str) -> None:
    """A mistake must not show a prompt."""
    with pytest.raises(BadMessage, match="expected true or false"):
        read_options(header)


@pytest.mark.parametrize(
    ("key", "request_", "expected"),
    [
        (None, None, None),
        (None, True, True),
        (None, False, False),
        (True, None, True),
        (True, False, False),
        (False, True, False),
        (False, None, False),
    ],
)
def test_a_keys_no_stands(key: bool | None, request_: bool | None, expected: bool | None) -> None:
    """A caller cannot allow what its key forbids, and can forbid what its key allows."""
    caller = ApiKey(label="a", secret="s" * 16, share_prompts=key)
    options = restrict_to_key(caller, {} if request_ is None else {"share_prompt": request_})
    assert options.get("share_prompt") == expected
