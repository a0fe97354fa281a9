"""Routes of the match log: the newest head, proofs, and the leaves themselves. Everybody may read them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query

from coordinator.domain.resource_bounds import MAX_LOG_ENTRIES
from coordinator.jobs.match_log import MatchLog
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.log_monitor import MAX_ASKED, MAX_SPAN

_Number = Annotated[int, Query(ge=0, lt=1 << 63)]
_Numbers = Annotated[list[_Number], Query(max_length=MAX_ASKED)]
_Limit = Annotated[int, Query(ge=1, le=MAX_LOG_ENTRIES, description="Maximum number of leaves in the page.")]


def add_log_routes(api: FastAPI, match_log: MatchLog) -> None:
    """Adds the routes below /v1/log."""

    @api.get("/v1/log/head")
    async def head() -> dict[str, Any]:
        """Returns the newest signed head of the match log: its size, its root, and when it was signed.

        A new head is signed every second while there are new matches. There is one head for each size.
        """
        answer: dict[str, Any] = (await match_log.proof((), ()))["head"]
        return answer

    @api.get("/v1/log/inclusion")
    async def inclusion(index: _Number, size: _Number | None = None) -> dict[str, Any]:
        """Returns the hash, the contents and the inclusion proof (`path`, RFC 9162 2.1.3) of the leaf with this number.

        The proof is for the log of `size` leaves, by default that of the newest head.
        """
        answer = await match_log.proof((), (index,), size)
        if str(index) not in answer["inclusion"]:
            raise Refusal(Code.UNKNOWN_LEAF, f"index: expected a leaf below {answer['size']}, got {index}")
        proven: dict[str, Any] = answer["inclusion"][str(index)]
        return proven | {"index": index, "size": answer["size"], "head": answer["head"]}

    @api.get("/v1/log/consistency")
    async def consistency(first: _Number, second: _Number | None = None) -> dict[str, Any]:
        """Returns the proof (RFC 9162 2.1.4) that the log of `second` leaves begins with that of `first` leaves.

        `second` is by default the size of the newest head.
        """
        answer = await match_log.proof((first,), (), second)
        if str(first) not in answer["consistency"]:
            raise Refusal(Code.UNKNOWN_LEAF, f"first: expected a size up to {answer['size']}, got {first}")
        return {"path": answer["consistency"][str(first)], "first": first, "second": answer["size"], "head": answer["head"]}

    @api.get("/v1/log/proof")
    async def proof(
        since: _Numbers = [],  # noqa: B006 - FastAPI makes a new list each time
        index: _Numbers = [],  # noqa: B006
        start: _Number | None = None,
        end: _Number | None = None,
    ) -> dict[str, Any]:
        """Returns the newest head with several proofs at once, as clients and nodes ask for them in the background.

        `consistency` has a proof for each size in `since`, `inclusion` an entry for each leaf in `index`. What the head does not
        cover is left out. `span` has the hashes of the leaves from `start` to before `end`, in hex without gaps, and one `path`
        for all: the hashes of what lies beside them, from left to right. It is null if they are too many, or if the head does
        not cover them. `epoch` is the number of the leaf with which this process of the coordinator began.
        """
        span = None if start is None or end is None or end - start > MAX_SPAN else (start, end)
        return await match_log.proof(since, index, span=span)

    @api.get("/v1/log/entries")
    async def entries(start: _Number = 0, limit: _Limit = MAX_LOG_ENTRIES) -> dict[str, Any]:
        """Lists leaves from number `start` on, as far as the newest head covers them.

        `leaf` has the contents in hex, or null once they were deleted; `hash` stays. `next` is the `start` of the next page, or
        null on the last page.
        """
        return await match_log.entries(start, limit)
