from __future__ import annotations

import pytest

from tallystick.chain.codec import load_abi, snake_case
from tallystick.chain.events import Event


def test_every_event_of_the_contract_is_a_class() -> None:
    """Names and fields of the event classes are those of the contract's events."""
    classes = {cls.__name__: cls for cls in Event.__subclasses__()}
    events = {
        e.name: [snake_case(n) for n in e.names] for e in load_abi("Escrow").events.values() if e.name != "EIP712DomainChanged"
    }
    assert events.pop("RowsSettled") == ["provider", "results"]  # contains these two events in packed form
    assert classes.keys() - events.keys() == {"Settled", "RowSkipped"}
    for name, fields in events.items():
        assert list(classes[name].__annotations__) == fields


@pytest.mark.parametrize("name", ["Escrow", "TestUSD"])
def test_abis_are_loaded_once(name: str) -> None:
    """The ABI is loaded once and not for each call."""
    assert load_abi(name) is load_abi(name)
