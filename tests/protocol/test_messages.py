"""The market's messages: their exact type strings, and their signers."""

from __future__ import annotations

import pytest

from tallystick.protocol import messages as module
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Message
from tallystick.protocol.messages import UNKNOWN, Outcome, Spec
from tests.protocol.strategies import ALL

SPEC = (
    "Spec(string revision,string tokenizer,string template,string precision,string kvPrecision,string engine,"
    "string engineVersion,string region,string tier,string[] features)"
)
CLAIM_ROW = "ClaimRow(address payer,bytes32 orderHash,uint64 seq,uint96 cumulativeCost)"

TYPE_STRINGS = {
    "Spec": SPEC,
    "Ask": (
        "Ask(address provider,string model,uint64 inputPrice,uint64 cachedInputPrice,uint64 outputPrice,uint32 contextTokens,"
        "uint32 maxOutputTokens,string sealingSuite,bytes sealingKey,uint64 validFrom,uint64 validUntil,uint64 seq,Spec spec)"
        + SPEC
    ),
    "Terms": (
        "Terms(string model,bytes32 ask,uint64 inputPrice,uint64 cachedInputPrice,uint64 outputPrice,uint96 maxCost,"
        "uint32 maxOutputTokens,bytes16 job,bytes32 requestCommitment)"
    ),
    "Order": (
        "Order(address payer,address provider,uint96 ceiling,uint96 reserveTarget,uint64 seq,uint64 deadline,uint64 claimBy,"
        "uint16 maxFeeBps,address coordinator,bytes32 termsHash)"
    ),
    "Receipt": (
        "Receipt(address payer,address provider,uint64 seq,uint96 cumulativeCost,bytes32 orderHash,bytes32 resultCommitment,"
        "uint32 inputTokens,uint32 cachedInputTokens,uint32 outputTokens,uint96 cost,uint8 outcome,uint64 finishedAt,"
        "bytes32 evidenceRoot)"
    ),
    "ClaimRow": CLAIM_ROW,
    "Claim": "Claim(address provider,ClaimRow[] rows)" + CLAIM_ROW,
    "Bind": "Bind(address key,address owner)",
    "Release": "Release(address payer,address provider,uint96 floor,uint64 deadline)",
    "LogHead": "LogHead(address coordinator,uint64 size,bytes32 root,uint64 signedAt)",
    "Inquiry": "Inquiry(address payer,address provider,address coordinator,uint64 askedAt)",
    "Connect": "Connect(address provider,address coordinator,bytes32 challenge,string endpoint)",
    "Access": "Access(address account,address coordinator,uint64 issuedAt)",
    "AuditReport": (
        "AuditReport(address payer,address provider,address coordinator,bytes16 job,string model,string precision,uint8 verdict,"
        "bytes32 receiptHash,bytes32 evidenceHash,uint64 reportedAt,bytes32 salt)"
    ),
    "ReportAck": "ReportAck(address coordinator,bytes32 reportHash,uint64 index,bytes32 leafHash,uint64 acceptedAt)",
    "ProbeSeal": "ProbeSeal(address coordinator,bytes32 reportHash)",
}
SIGNERS = {
    "Spec": None,
    "Ask": "provider",
    "Terms": None,
    "Order": "payer",
    "Receipt": "provider",
    "ClaimRow": None,
    "Claim": "provider",
    "Bind": "key",
    "Release": "provider",
    "LogHead": "coordinator",
    "Inquiry": "payer",
    "Connect": "provider",
    "Access": "account",
    "AuditReport": "payer",
    "ReportAck": "coordinator",
    "ProbeSeal": "coordinator",
}


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_type_string_is_this_one(cls: type[Message]) -> None:
    """A changed name, type or order of members would invalidate every signature and differ from the contract."""
    assert cls.SCHEMA.type_string == TYPE_STRINGS[cls.__name__]
    assert cls.SCHEMA.type_hash == keccak(TYPE_STRINGS[cls.__name__].encode())


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_signer_is_this_member(cls: type[Message]) -> None:
    """A message's signer is one of its own addresses, and does not change by accident."""
    assert SIGNERS[cls.__name__] == cls.SIGNER
    if cls.SIGNER is not None:
        assert f"address {cls.SIGNER}" in cls.SCHEMA.type_string


def test_no_message_is_forgotten_here() -> None:
    """The tables of these tests contain every message class of the module."""
    message_classes = {
        v.__name__ for v in vars(module).values() if isinstance(v, type) and issubclass(v, Message) and v is not Message
    }
    assert message_classes == {cls.__name__ for cls in ALL} == set(TYPE_STRINGS) == set(SIGNERS)


def test_no_two_messages_share_a_type_hash() -> None:
    """No two messages have the same type hash, so a signature is valid for one kind of message only."""
    assert len({cls.SCHEMA.type_hash for cls in ALL}) == len(ALL)


def test_messages_are_frozen_and_take_keywords_only() -> None:
    """A message is immutable after its check, and its fields cannot be swapped by position."""
    with pytest.raises(AttributeError):
        Spec().revision = "x"  # type: ignore[misc]  # that is the test
    with pytest.raises(TypeError):
        Spec("x")  # type: ignore[call-arg]  # that is the test


def test_an_empty_spec_is_unknown() -> None:
    """Every unset text of a spec is "unknown"."""
    written = Spec().to_json()
    assert written.pop("features") == []
    assert set(written.values()) == {UNKNOWN}


def test_the_numbers_of_the_outcomes_are_the_wire() -> None:
    """Outcomes are sent and signed as these numbers."""
    assert {outcome.name: outcome.value for outcome in Outcome} == {
        "COMPLETED": 0,
        "LENGTH": 1,
        "CLIENT_CANCELLED": 2,
        "PROVIDER_ERROR": 3,
        "UPSTREAM_ERROR": 4,
        "TIMED_OUT": 5,
        "REFUSED": 6,
    }
