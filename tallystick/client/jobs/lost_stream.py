"""What became of a job whose stream was lost, as far as its coordinator says."""

from __future__ import annotations

from typing import NamedTuple

from tallystick.client.coordinator.info import RemoteJob
from tallystick.client.jobs.placed_job import PlacedJob
from tallystick.client.recovery.reconciler import Reconciler
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadReceipt, TallyError
from tallystick.protocol.jobs import TERMINAL
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import format_amount


class LostJob(NamedTuple):
    """A job after its stream was lost. `over`: it has ended, so that a caller may send its request again."""

    remote: RemoteJob | None
    receipt: Verified[Receipt] | None
    over: bool
    report: str

    @property
    def may_run(self) -> bool:
        """Whether it may still run, and end with a receipt."""
        return self.remote is None or (self.receipt is None and self.remote.receipt is None)


async def find_out(placed: PlacedJob, reconciler: Reconciler, *, replicated: bool, may_move: bool) -> LostJob:
    """Records what arrived of a job whose stream was lost, and asks the coordinator what became of the job.

    `replicated`: its coordinator has replicas. `may_move`: another job may take its place. Raises BadReceipt.
    """
    replicated = replicated and not placed.keyed  # others may read a job with an idempotency key: it is not ended here
    response, record = placed.response, placed.record
    received = f"{response.chunks} chunks with {response.body_bytes} bytes of the answer"
    remote: RemoteJob | None = None
    receipt: Verified[Receipt] | None = None
    try:
        deliveries = await placed.left()
        if response.complete:
            await record.whole_answer(deliveries)
        elif replicated:
            await reconciler.end_lost(response.job)
        remote, receipt = await reconciler.reconcile(response.job, deliveries, record.doubt)
        report = f"the coordinator reports the job as {remote.state.value}"
    except BadReceipt:
        raise
    except TallyError as error:
        report = str(error)
    billed = receipt is not None and receipt.message.cost > 0
    if billed or response.complete or not replicated or record.cancelling:
        over = remote is not None and remote.state in TERMINAL
    else:  # at a lost replica it must cost nothing too
        over = await reconciler.await_free_end(response.job, remote, brief=not may_move)
    if receipt is not None:
        report += f", billed {format_amount(receipt.message.cost)} dollars"
    return LostJob(remote, receipt, over, f"{received}; {report}")
