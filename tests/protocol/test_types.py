"""Money, addresses, job ids."""

from __future__ import annotations

import copy
import json
import operator
import pickle
import uuid
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Amount, format_amount, new_job_id, parse_address, parse_amount, parse_job_id
from tests.protocol.strategies import amounts, many, some

whole = st.integers(-(2**100), 2**100)
money = whole.map(Amount)


@given(money, whole)
@many
def test_sums_differences_and_products_are_exact_amounts(amount: Amount, number: int) -> None:
    """Sums, differences and products with whole numbers, from either side, are exact amounts."""
    plain = int(amount)
    for other in (number, Amount(number)):
        for result, expected in (
            (amount + other, plain + number),
            (other + amount, plain + number),
            (amount - other, plain - number),
            (other - amount, number - plain),
            (amount * number, plain * number),
            (number * amount, plain * number),
            (-amount, -plain),
        ):
            assert result == expected
            assert type(result) is Amount
    assert sum([amount, Amount(number)]) == plain + number


@given(money, whole.filter(bool))
@some
def test_whole_division_is_a_plain_number(amount: Amount, number: int) -> None:
    """Whole division and remainder are Python's own, and the result is a plain number."""
    assert (amount // number, amount % number) == divmod(int(amount), number) == divmod(amount, number)
    assert type(amount // number) is int


MIXES: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("+", operator.add),
    ("-", operator.sub),
    ("*", operator.mul),
    ("/", operator.truediv),
    ("//", operator.floordiv),
    ("%", operator.mod),
    ("**", operator.pow),
    ("divmod", divmod),
]


@pytest.mark.parametrize(("name", "mix"), MIXES, ids=[name for name, _ in MIXES])
@pytest.mark.parametrize("other", [2.0, 0.1, float("nan"), float("inf"), True, False, Fraction(1, 2), "2", None])
def test_money_meets_no_float_and_no_boolean(name: str, mix: Callable[[Any, Any], Any], other: Any) -> None:
    """A float, a boolean or any other operand that is not a whole number raises TypeError."""
    with pytest.raises(TypeError):
        mix(Amount(5), other)


@pytest.mark.parametrize("value", [1.0, 0.5, True, False, "1", None, b"1", Fraction(1), float("nan")])
def test_an_amount_is_made_of_whole_numbers_only(value: Any) -> None:
    """Floats, booleans and texts cannot become amounts, nor can the result of a float operation."""
    with pytest.raises(TypeError, match="expected an integer"):
        Amount(value)
    with pytest.raises(TypeError, match="expected an integer"):
        Amount(1.5 + Amount(1))  # type: ignore[arg-type]  # the type checker sees it too


@pytest.mark.parametrize(
    "render", [float, complex, "{:.2f}".format, "%f".__mod__, lambda a: a / 2, lambda a: 2 / a, lambda a: a**2]
)
def test_money_is_never_rendered_or_divided_as_a_float(render: Callable[[Amount], Any]) -> None:
    """An amount cannot become a float, a ratio or a power."""
    with pytest.raises(TypeError):
        render(Amount(3))


@given(money)
@some
def test_money_travels_through_copies_and_json(amount: Amount) -> None:
    """Pickled and copied amounts stay amounts; JSON contains their digits."""
    for again in (pickle.loads(pickle.dumps(amount)), copy.copy(amount), copy.deepcopy(amount)):
        assert again == amount
        assert type(again) is Amount
    assert json.loads(json.dumps(amount)) == amount
    if abs(amount) < 2**63:
        assert orjson.loads(orjson.dumps(amount)) == amount
    assert hash(amount) == hash(int(amount))
    assert repr(amount) == str(int(amount))


@given(amounts(), st.integers(0, 18))
@many
def test_formatted_amounts_parse_back(amount: Amount, decimals: int) -> None:
    """`format_amount` is exact: its text parses to the same amount, without an exponent or trailing zeros."""
    shown = format_amount(amount, decimals)
    assert parse_amount(shown, decimals) == amount
    assert type(parse_amount(shown, decimals)) is Amount
    assert Fraction(shown) == Fraction(int(amount), 10**decimals)
    assert set(shown) <= set("0123456789.")
    assert not ("." in shown and shown.endswith(("0", ".")))


@pytest.mark.parametrize(
    ("amount", "shown"),
    [(0, "0"), (1, "0.000001"), (10, "0.00001"), (1_000_000, "1"), (1_250_000, "1.25"), (100_000_000, "100"), (-1, "-0.000001")],
)
def test_amounts_for_people(amount: int, shown: str) -> None:
    """Some amounts as they are shown to people."""
    assert format_amount(amount) == shown


@pytest.mark.parametrize(
    ("text", "amount"), [("0", 0), ("1.25", 1_250_000), (" 7 ", 7_000_000), ("007.10", 7_100_000), ("0.000001", 1)]
)
def test_amounts_as_people_write_them(text: str, amount: int) -> None:
    """Some texts and the amounts that they mean."""
    assert parse_amount(text) == amount


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "1.",
        ".5",
        "-1",
        "+1",
        "1e6",
        "1,25",
        "1_000",
        "0x10",
        "1.0000000",
        "nan",
        "inf",
        "1 2",
        "१",
        "1.२",
        "9" * 31,
        "1\n2",
    ],
)
def test_malformed_amounts_are_refused(text: str) -> None:
    """Signs, exponents, foreign digits, too many decimals and other texts are refused with the offending text."""
    with pytest.raises(BadMessage, match="amount: expected a decimal number with at most 6 places"):
        parse_amount(text)


def test_the_refusal_of_an_amount_is_short_and_names_its_field() -> None:
    """A long text is shortened in the error, and the caller may name the field."""
    with pytest.raises(BadMessage, match=r"^max_cost: expected") as caught:
        parse_amount("x" * 1_000_000, field="max_cost")
    assert len(str(caught.value)) < 300


@given(st.binary(min_size=20, max_size=20))
@some
def test_an_address_has_one_canonical_form(raw: bytes) -> None:
    """Any case of the same 40 digits gives the same lower-case address."""
    expected = "0x" + raw.hex()
    assert parse_address(expected) == parse_address("0x" + raw.hex().upper()) == expected


@pytest.mark.parametrize(
    "value",
    ["", "0x", "0x" + "0" * 39, "0x" + "0" * 41, "0" * 40, "0X" + "0" * 40, "0x" + "g" * 40, " 0x" + "0" * 40, None, 5, b"", []],
)
def test_malformed_addresses_are_refused_by_name(value: object) -> None:
    """The error names the field of the invalid address."""
    with pytest.raises(BadMessage, match=r"^purse\.owner: expected a 20-byte address"):
        parse_address(value, "purse.owner")


@pytest.mark.parametrize(
    ("value", "shown"), [("0x12", "'0x12'"), (5, "int"), ("0x" + "1" * 64, "66 characters"), ("\x1b[2J", r"'\x1b[2J'")]
)
def test_errors_say_what_came(value: object, shown: str) -> None:
    """Errors quote a short value. A long one may be a private key, so only its length is shown."""
    with pytest.raises(BadMessage) as caught:
        parse_address(value)
    assert str(caught.value) == f"address: expected a 20-byte address as 0x and 40 hex digits, got {shown}"
    if isinstance(value, str):
        with pytest.raises(BadMessage) as caught:
            parse_job_id(value, "ID")
        assert str(caught.value) == f"ID: expected 32 hex digits, got {shown}"


@given(st.binary(min_size=16, max_size=16))
@some
def test_a_job_id_is_read_from_its_digits(raw: bytes) -> None:
    """A job id is 32 hex digits of either case, with or without 0x."""
    for text in (raw.hex(), raw.hex().upper(), "0x" + raw.hex()):
        assert parse_job_id(text) == raw


@given(st.text(max_size=40))
@some
def test_malformed_job_ids_are_refused(text: str) -> None:
    """Any other text raises BadMessage."""
    with pytest.raises(BadMessage, match=r"^job: expected 32 hex digits"):
        parse_job_id(text)


@given(st.integers(0, (1 << 48) * 1_000_000 - 1), st.binary(min_size=10, max_size=10))
def test_a_new_job_id_is_a_uuid_of_version_7(now_ns: int, random: bytes) -> None:
    """The standard library reads its time, version and variant; the other 74 bits come from the random bytes."""
    read = uuid.UUID(bytes=bytes(new_job_id(now_ns, lambda size: random[:size])))
    assert (read.version, read.variant) == (7, uuid.RFC_4122)
    assert read.int >> 80 == now_ns // 1_000_000
    drawn = int.from_bytes(random, "big")
    assert (read.int >> 64 & 0xFFF, read.int & (1 << 62) - 1) == (drawn >> 68, drawn & (1 << 62) - 1)


def test_job_ids_grow_with_time() -> None:
    """A later id sorts after an earlier one, whatever the random bits are."""
    first, second = new_job_id(1_000_000, lambda size: b"\xff" * size), new_job_id(2_000_000, bytes)
    assert first < second
