"""The router of link frames: passes what a link brings to the part that deals with it."""

from __future__ import annotations

from dataclasses import dataclass

from node.coordinator.receipt_sender import Courier
from node.coordinator.state_recovery import Recall
from node.jobs.runner import Runner
from node.ports import Link
from tallystick.protocol.errors import error_from_json
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import CancelReason, Kind, loads


@dataclass(frozen=True, slots=True)
class LinkRouter:
    """Passes what the link brings to who deals with it (link.Handler)."""

    runner: Runner
    courier: Courier
    recall: Recall

    def welcomed(self, link: Link) -> None:
        """See link.Handler."""
        self.recall.welcomed(link)
        self.courier.welcomed(link)
        if self.recall.done(link.coordinator):
            self.close_unfinished()

    def close_unfinished(self) -> None:
        """It is known which receipts were signed before: orders that a killed process had begun get theirs."""
        self.runner.close_unfinished(self.courier.hurry)

    def frame(self, link: Link, kind: Kind, job: JobId, payload: bytes) -> None:
        """See link.Handler."""
        if kind is Kind.DISPATCH:
            self.runner.dispatch(link, job, payload)
        elif kind is Kind.CANCEL:
            self.runner.cancel(link, job, CancelReason.loads(payload))
        elif kind is Kind.CREDIT:
            self.runner.credit(link, job, payload)
        elif kind is Kind.RECALLED:
            self.recall.recalled(link, payload)
        elif kind is Kind.RECEIPT_REFUSED:
            self.courier.refused(link, job, error_from_json(loads(payload, "refusal"), 502))
        else:
            self.courier.acknowledged(link, job)

    def lost(self, link: Link) -> None:
        """See link.Handler."""
        self.courier.lost(link)
        self.runner.lost(link)
