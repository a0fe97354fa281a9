"""The router of link frames: passes each frame of a link to the component that handles it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from node.coordinator.match_watch import MatchWatch
from node.coordinator.receipt_sender import ReceiptSender
from node.coordinator.state_recovery import StateRecovery
from node.domain.order_admission import MatchedOrder
from node.jobs.doubtful_receipts import DoubtfulReceipts
from node.jobs.runner import JobRunner
from node.ports import Link
from tallystick.protocol.errors import error_from_json
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import CancelReason, Kind, loads


@dataclass(frozen=True, slots=True)
class LinkRouter:
    """Passes link events to the components of a node that concern them (link.LinkHandler)."""

    runner: JobRunner
    receipt_sender: ReceiptSender
    doubtful_receipts: DoubtfulReceipts
    state_recovery: StateRecovery
    match_watch: MatchWatch

    def connected(self, link: Link) -> None:
        """See link.LinkHandler."""
        self.match_watch.on_connected(link)
        self.state_recovery.connected(link)
        self.receipt_sender.connected(link)
        if self.doubtful_receipts.connected(link):
            self.receipt_sender.resend_soon(link.coordinator)
        if self.state_recovery.is_complete(link.coordinator):
            self.close_unfinished()

    def close_voided(self, orders: Sequence[MatchedOrder]) -> None:
        """Signs receipts at no cost for orders whose receipts were voided."""
        self.runner.reopen(orders)
        self.close_unfinished()

    def close_unfinished(self) -> None:
        """Signs receipts for orders that a killed process began, once all receipts that this key signed are known.

        They wait for doubtful receipts too, which can only be voided while none follows them.
        """
        if self.state_recovery.problem or self.doubtful_receipts.pending:
            return
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
            error = error_from_json(loads(payload, "refusal"), 502)
            if not self.doubtful_receipts.refused(link, job, error):
                self.receipt_sender.refused(link, job, error)
            self.runner.resumable.forget(job)
        else:
            self.receipt_sender.acknowledged(link, job)
            self.doubtful_receipts.acknowledged(link, job)
            self.runner.resumable.forget(job)

    def disconnected(self, link: Link) -> None:
        """See link.LinkHandler."""
        self.receipt_sender.disconnected(link)
        self.state_recovery.disconnected(link)
        self.runner.link_lost(link)
