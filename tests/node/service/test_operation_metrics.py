"""What a scrape says of how a node runs."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from node.domain.gas_totals import GasTotals
from node.service.operation_metrics import OperationCollector


def test_slots_jobs_commits_and_gas() -> None:
    """Each is read when it is asked for, so that it is current."""
    gas, running = GasTotals(), [0]
    slots = {"a": {"taken": 2, "of": 4, "queue": 3, "free": 5}}
    collector, registry = OperationCollector(lambda: slots, lambda: running[0], lambda: gas), CollectorRegistry()
    registry.register(collector)
    gas.add(21_000, 10**15)
    gas.add(50_000, 10**15)
    running[0] = 2
    collector.commits.add(0.003)
    text = generate_latest(registry).decode()
    for line in (
        'tallystick_node_slots{engine="a",state="taken"} 2.0',
        'tallystick_node_slots{engine="a",state="of"} 4.0',
        'tallystick_node_slots{engine="a",state="queue"} 3.0',
        'tallystick_node_slots{engine="a",state="free"} 5.0',
        "tallystick_node_jobs_live 2.0",
        'tallystick_node_database_commit_seconds_bucket{le="0.005"} 1.0',
        'tallystick_node_database_commit_seconds_bucket{le="0.0025"} 0.0',
        "tallystick_node_transactions_total 2.0",
        "tallystick_node_transaction_gas_total 71000.0",
        "tallystick_node_transaction_fee_wei_total 2e+15",
    ):
        assert line in text
