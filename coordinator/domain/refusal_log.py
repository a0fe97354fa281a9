"""Why jobs of a payer came to nothing lately, for the payer alone. In memory, of this process, and bounded. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Address, JobId

MAX_PAYERS, MAX_REFUSALS = 10_000, 20
"""Payers that are remembered, those with the newest refusals, and refusals of one payer."""
MAX_TEXT = 500
"""Characters of a reason that are kept."""


@dataclass(frozen=True, slots=True)
class RefusedJob:
    """A job that was refused, or failed without a receipt. `at`: Unix seconds; `code` and `text` are the error's."""

    at: int
    job: JobId
    model: str
    code: str
    text: str


class RefusalLog:
    """See the module's docstring. Only refusals of jobs whose payer signed them may be noted: the name is the payer's."""

    def __init__(self) -> None:
        self._refused: OrderedDict[Address, deque[RefusedJob]] = OrderedDict()

    def note(self, payer: Address, job: JobId, model: str, error: TallyError, at: int) -> None:
        """Notes a refusal."""
        jobs = self._refused.setdefault(payer, deque(maxlen=MAX_REFUSALS))
        jobs.append(RefusedJob(at, job, model, error.code.value, str(error)[:MAX_TEXT]))
        self._refused.move_to_end(payer)
        if len(self._refused) > MAX_PAYERS:
            self._refused.popitem(last=False)

    def of(self, payer: Address) -> Sequence[RefusedJob]:
        """Returns the refusals of a payer, newest first."""
        return [*reversed(self._refused.get(payer, ()))]
