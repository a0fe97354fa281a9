"""The router of link frames: passes each frame of a link to the component that handles it."""

from __future__ import annotations

from dataclasses import dataclass

from node.coordinator.match_watch import MatchWatch
from node.coordinator.receipt_sender import ReceiptSender
from node.coordinator.state_recovery import StateRecovery
from node.jobs.runner import JobRunner
from node.ports import Link
from tallystick.protocol.errors import error_from_json
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import CancelReason, Kind, loads


@dataclass(frozen=True, slots=True)
class LinkRouter:
    """Passes link events to the job runner, the receipt sender, state recovery and the match log's watch (link.LinkHandler)."""

    runner: JobRunner
    receipt_sender: ReceiptSender
    state_recovery: StateRecovery
    match_watch: MatchWatch

    def connected(self, link: Link) -> None:
        """See link.LinkHandler."""
        self.match_watch.on_connected(link)
        self.state_recovery.connected(link)
        self.receipt_sender.connected(link)
        if self.state_recovery.is_complete(link.coordinator):
            self.close_unfinished()

    def close_unfinished(self) -> None:
        """Signs receipts for orders that a killed process began, once state recovery is complete."""
        self.runner.close_unfinished(self.receipt_sender.resend_now)

    def frame_received(self, link: Link, kind: Kind, job: JobId, payload: bytes) -> None:
        """See link.LinkHandler."""
        if kind is Kind.DISPATCH:
            self.runner.dispatch(link, job, payload)
        elif kind is Kind.TRACE:
            self.runner.traces.announce(link, job, payload)
        elif kind is Kind.CANCEL:
            self.runner.cancel(link, job, CancelReason.loads(payload))
        elif kind is Kind.CREDIT:
            self.runner.grant_credit(link, job, payload)
        elif kind is Kind.RESUME:
            self.runner.resumable.resume(link, job, payload)
        elif kind is Kind.RECALLED:
            self.state_recovery.page_received(link, payload)
        elif kind is Kind.RECEIPT_REFUSED:
            self.receipt_sender.refused(link, job, error_from_json(loads(payload, "refusal"), 502))
            self.runner.resumable.forget(job)
        else:
            self.receipt_sender.acknowledged(link, job)
            self.runner.resumable.forget(job)

    def disconnected(self, link: Link) -> None:
        """See link.LinkHandler."""
        self.receipt_sender.disconnected(link)
        self.state_recovery.disconnected(link)
        self.runner.link_lost(link)
