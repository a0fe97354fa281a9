"""Leaves of the match log beside those of matches: restarts of the coordinator, and reports of audits. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address, Hash

VERSION = 1
LEAF_HEAD = struct.Struct(">BBQ")
"""Version, kind, and time in Unix seconds."""
RESTART, FORMER_MATCH, REPORT, MATCH = range(4)
"""Kinds of leaves. A former match says nothing of integrity."""
WEIGHT_ONE = 10_000
"""The weight of a verdict that counts in full."""
_REPORT = struct.Struct(">Q16s20sBBH32sHB")


@dataclass(frozen=True, slots=True)
class RestartLeaf:
    """The first leaf of each process of the coordinator. Matches that were not on disk before it are lost. `at`: Unix seconds."""

    at: int

    def dumps(self) -> bytes:
        """The bytes of the leaf."""
        return LEAF_HEAD.pack(VERSION, RESTART, self.at)

    def epoch_at(self, index: int) -> int:
        """The number of the last restart at this leaf, given the leaf's own number."""
        return index

    def to_json(self) -> dict[str, Any]:
        """The leaf as people read it."""
        return {"kind": "restart", "at": self.at}


@dataclass(frozen=True, slots=True)
class ReportLeaf:
    """A report of an audit, as it counts from this leaf on. It names neither the payer nor the prompt nor the job.

    `job_alias`: 16 bytes that stand for the job, the same for each report on it. Only the coordinator can tell the job from them.
    `verdict`: the number of an `AuditVerdict`; `is_probe`: whether the coordinator itself audited; `weight`: how much the verdict
    counts, of WEIGHT_ONE; `report_hash`: the digest of the signed report. `epoch`: the number of the last RestartLeaf before it.
    """

    at: int
    epoch: int
    job_alias: bytes
    provider: Address
    model: str
    precision: str
    verdict: int
    is_probe: bool
    weight: int
    report_hash: Hash

    def dumps(self) -> bytes:
        """The bytes of the leaf."""
        model, precision = self.model.encode(), self.precision.encode()
        body = _REPORT.pack(
            self.epoch,
            self.job_alias,
            bytes.fromhex(self.provider[2:]),
            self.verdict,
            self.is_probe,
            self.weight,
            self.report_hash,
            len(model),
            len(precision),
        )
        return LEAF_HEAD.pack(VERSION, REPORT, self.at) + body + model + precision

    def epoch_at(self, index: int) -> int:  # noqa: ARG002 - as RestartLeaf has it
        """The number of the last restart at this leaf."""
        return self.epoch

    @classmethod
    def loads(cls, at: int, data: bytes) -> ReportLeaf:
        """Reads a leaf after its head. Raises BadMessage, struct.error, UnicodeDecodeError."""
        fields = _REPORT.unpack_from(data, LEAF_HEAD.size)
        epoch, job_alias, provider, verdict, is_probe, weight, report_hash, length, rest = fields
        place = LEAF_HEAD.size + _REPORT.size
        model, precision = data[place : place + length].decode(), data[place + length : place + length + rest].decode()
        if weight > WEIGHT_ONE or is_probe > 1:
            raise BadMessage(f"leaf.weight: expected at most {WEIGHT_ONE}, and a probe or none, got {weight} and {is_probe}")
        address = Address("0x" + provider.hex())
        return cls(at, epoch, job_alias, address, model, precision, verdict, bool(is_probe), weight, Hash(report_hash))

    def to_json(self) -> dict[str, Any]:
        """The leaf as people read it. `weight` is a share."""
        return {
            "kind": "report",
            "at": self.at,
            "epoch": self.epoch,
            "jobAlias": self.job_alias.hex(),
            "provider": self.provider,
            "model": self.model,
            "precision": self.precision,
            "verdict": self.verdict,
            "probe": self.is_probe,
            "weight": self.weight / WEIGHT_ONE,
            "report": self.report_hash.hex(),
        }
