"""Hypothesis strategies for every message class, derived from its fields, and for the values in messages."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tallystick.protocol.eip712 import Domain, Message, Signer
from tallystick.protocol.messages import (
    Access,
    Ask,
    AuditReport,
    Bind,
    Claim,
    ClaimRow,
    Connect,
    Inquiry,
    LogHead,
    Order,
    ProbeSeal,
    Receipt,
    Release,
    ReportAck,
    Spec,
    Terms,
)
from tallystick.protocol.types import Address, Amount, Hash, JobId

M = TypeVar("M", bound=Message)

ALL: tuple[type[Message], ...] = (
    Spec,
    Ask,
    Terms,
    Order,
    Receipt,
    ClaimRow,
    Claim,
    Bind,
    Release,
    LogHead,
    Inquiry,
    Connect,
    Access,
    AuditReport,
    ReportAck,
    ProbeSeal,
)
SIGNED = tuple(cls for cls in ALL if cls.SIGNER is not None)

few = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
some = settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
many = settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))

addresses = st.binary(min_size=20, max_size=20).map(lambda raw: Address("0x" + raw.hex()))
hashes = st.binary(min_size=32, max_size=32).map(Hash)
job_ids = st.binary(min_size=16, max_size=16).map(JobId)
secrets = st.integers(1, 2**256 - 2**129).map(lambda number: number.to_bytes(32, "big"))
signers = secrets.map(Signer)
domains = st.builds(Domain, chain_id=st.sampled_from([0, 1, 31_337, 2**53 + 1, 2**64 - 1]), contract=addresses)


def uints(bits: int) -> st.SearchStrategy[int]:
    """Whole numbers of this many bits, which favour the edges of types."""
    top = (1 << bits) - 1
    edges = sorted({0, 1, top, top - 1, *(1 << width for width in range(8, bits, 8))})
    return st.sampled_from(edges) | st.integers(0, top)


def _of(hint: Any) -> st.SearchStrategy[Any]:
    if get_origin(hint) is Annotated:
        base, mark = get_args(hint)
        return uints(mark.bits).map(base)
    if get_origin(hint) is tuple:
        return st.lists(_of(get_args(hint)[0]), max_size=5).map(tuple)
    if isinstance(hint, type) and issubclass(hint, Message):
        return messages(hint)
    known: dict[Any, st.SearchStrategy[Any]] = {
        Address: addresses,
        Hash: hashes,
        JobId: job_ids,
        bytes: st.binary(max_size=80),
        str: st.text(max_size=40),
    }
    return known[hint]


def messages(cls: type[M], **fixed: Any) -> st.SearchStrategy[M]:
    """Random messages of a class; `fixed` sets some of the fields."""
    hints = get_type_hints(cls, include_extras=True)
    drawn = {name: _of(hints[name]) for name in cls.SCHEMA.fields if name not in fixed}
    return st.fixed_dictionaries(drawn).map(lambda values: cls(**values, **fixed))


any_message: st.SearchStrategy[Message] = st.sampled_from(ALL).flatmap(messages)

json_scalars: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["0x", "0x00", "0x" + "00" * 20, "0x" + "ab" * 32, "1", "-1", "", "\ud800", "a" * 5000])
)
json_values: st.SearchStrategy[Any] = st.recursive(
    json_scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


def amounts(top: int = 2**96 - 1) -> st.SearchStrategy[Amount]:
    """Amounts from 0 to `top`."""
    return st.integers(0, top).map(Amount)


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """A JSON tree with one of its nodes replaced, removed or renamed, or a member added."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 9)):
        name = draw(st.sampled_from(sorted(tree)))
        rest = {key: value for key, value in tree.items() if key != name}
        match draw(st.integers(0, 9)):
            case 0:
                return rest
            case 1:
                return {**rest, name + "x": tree[name]}
            case 2:
                return {**tree, draw(st.text(max_size=8)): draw(json_values)}
        return {**tree, name: draw(mutated(tree[name]))}
    if isinstance(tree, list) and tree and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(tree) - 1))
        changed = draw(st.sampled_from([[], [tree[index]] * 2])) if draw(st.booleans()) else [draw(mutated(tree[index]))]
        return [*tree[:index], *changed, *tree[index + 1 :]]
    return draw(json_values)
