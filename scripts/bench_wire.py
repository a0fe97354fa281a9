"""Measures the parsing and checking of signed frames in CPU time: microseconds, and the ratio to one bare signature recovery, the
floor of each. A submission is read, and the order of one candidate is verified, as the coordinator does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from tallystick.cli.progress import activity
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Domain, Signer, read_signed_bytes
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.signatures import recover
from tallystick.protocol.stored import load_signed, store_signed
from tallystick.protocol.types import ZERO_HASH, Address, Amount, JobId
from tallystick.protocol.wire import Candidate, Submission

DOMAIN = Domain(31_337, Address("0x" + "5f" * 20))
PAYER, PROVIDER = Signer(keccak(b"payer")), Signer(keccak(b"provider"))
JOB = JobId(bytes(range(16)))
ROUNDS = 7


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(prog="scripts/bench wire", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    with activity("measuring signed frames"):
        figures = measure()
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        print(f"{name:32} {value:8.2f}")


def measure() -> dict[str, float]:
    """All figures by name: `..._us` in microseconds of CPU time, `..._ratio` as a multiple of one recovery."""
    one, eight, receipt = _submission(1), _submission(8), _receipt()
    signed = read_signed_bytes(Receipt, receipt)
    digest, signature = signed.message.digest(DOMAIN), signed.signature
    text = store_signed(signed)
    cases: dict[str, Callable[[], object]] = {
        "recovery": lambda: recover(digest, signature),
        "digest": lambda: read_signed_bytes(Receipt, receipt).message.digest(DOMAIN),
        "submission_parse_1": lambda: Submission.loads(one),
        "submission_parse_8": lambda: Submission.loads(eight),
        "submission_1": lambda: Submission.loads(one).candidates[0].order.verify(DOMAIN),
        "submission_8": lambda: Submission.loads(eight).candidates[0].order.verify(DOMAIN),
        "receipt": lambda: read_signed_bytes(Receipt, receipt).verify(DOMAIN),
        "receipt_sign": lambda: PROVIDER.sign(_message(), DOMAIN).to_bytes(),
        "receipt_store": lambda: load_signed(Receipt, text),
    }
    best = {name: min(_cpu_us(case) for _ in range(ROUNDS)) for name, case in cases.items()}
    figures = {f"{name}_us": round(us, 2) for name, us in best.items()}
    figures |= {f"{name}_ratio": round(best[name] / best["recovery"], 3) for name in ("submission_1", "submission_8", "receipt")}
    return figures | {"submission_bytes_1": len(one), "submission_bytes_8": len(eight), "receipt_bytes": len(receipt)}


def _cpu_us(case: Callable[[], object], calls: int = 1_000) -> float:
    began = time.process_time()
    for _ in range(calls):
        case()
    return (time.process_time() - began) / calls * 1e6


def _submission(count: int) -> bytes:
    candidates = []
    for number in range(count):
        terms = Terms(
            model="llama-3.3-70b-instruct",
            ask=ZERO_HASH,
            input_price=100_000,
            cached_input_price=50_000,
            output_price=400_000 + number,
            max_cost=Amount(1_000_000),
            max_output_tokens=1_024,
            job=JOB,
            request_commitment=ZERO_HASH,
        )
        order = Order(
            payer=PAYER.address,
            provider=PROVIDER.address,
            ceiling=Amount(5_000_000),
            reserve_target=Amount(20_000_000),
            seq=7,
            deadline=1_700_000_000,
            claim_by=1_700_100_000,
            max_fee_bps=25,
            coordinator=PROVIDER.address,
            terms_hash=terms.struct_hash(),
        )
        candidates.append(Candidate(PAYER.sign(order, DOMAIN), terms, bytes(80)))
    return Submission(JOB, tuple(candidates), bytes(4_096)).dumps()


def _message() -> Receipt:
    return Receipt(
        payer=PAYER.address,
        provider=PROVIDER.address,
        seq=3,
        cumulative_cost=Amount(1_000),
        order_hash=ZERO_HASH,
        result_commitment=ZERO_HASH,
        input_tokens=100,
        cached_input_tokens=0,
        output_tokens=50,
        cost=Amount(300),
        outcome=0,
        finished_at=1_700_000_000,
        evidence_root=ZERO_HASH,
    )


def _receipt() -> bytes:
    return PROVIDER.sign(_message(), DOMAIN).to_bytes()


if __name__ == "__main__":
    main()
