"""Config: TOML, then environment, then flags; every type; errors with their source."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount
from tallystick.runtime.config import home, load


@dataclass(frozen=True)
class Engine:
    """A nested table."""

    url: str
    weight: float = 1.0


@dataclass(frozen=True)
class Settings:
    """One field of every type that the config supports."""

    name: str
    port: int = 1
    rate: float = 0.5
    fast: bool = False
    folder: Path = Path("x")
    cap: Amount = Amount(5)
    owner: Address = ZERO_ADDRESS
    maybe: str | None = None
    limit: Amount | None = Amount(7)
    heir: Address | None = None
    tags: tuple[str, ...] = ("a",)
    numbers: tuple[int, ...] = ()
    peers: tuple[Address, ...] = ()
    engines: tuple[Engine, ...] = ()
    main: Engine | None = None
    extra: tuple[str, ...] = field(default_factory=tuple)


ADDRESS = "0x" + "Ab" * 20
TOML = f"""
name = "toml"
port = 9000
rate = 2
fast = true
folder = "~/state"
cap = "1.25"
owner = "{ADDRESS}"
maybe = "yes"
limit = ""
heir = "{ADDRESS}"
tags = ["b", "c"]
numbers = [1, 2]
peers = ["{ADDRESS}"]
[[engines]]
url = "http://one"
[[engines]]
url = "http://two"
weight = 0.5
[main]
url = "http://main"
"""


def loaded(tmp_path: Path, text: str, **more: Any) -> Settings:
    """Loads the settings from this TOML."""
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    return load(Settings, path, **({"environment": {}} | more))


def test_every_type_is_read_from_toml(tmp_path: Path) -> None:
    """Each field gets a value of its declared type."""
    assert loaded(tmp_path, TOML) == Settings(
        name="toml",
        port=9000,
        rate=2.0,
        fast=True,
        folder=Path("~/state").expanduser(),
        cap=Amount(1_250_000),
        owner=Address(ADDRESS.lower()),
        maybe="yes",
        limit=None,
        heir=Address(ADDRESS.lower()),
        tags=("b", "c"),
        numbers=(1, 2),
        peers=(Address(ADDRESS.lower()),),
        engines=(Engine("http://one"), Engine("http://two", 0.5)),
        main=Engine("http://main"),
    )
    assert isinstance(loaded(tmp_path, TOML).rate, float)
    assert isinstance(loaded(tmp_path, TOML).cap, Amount)


def test_every_flat_type_is_read_from_the_environment() -> None:
    """Variables are texts, from which numbers, booleans, amounts, addresses, paths and comma-separated lists are parsed."""
    texts = {
        "name": "env",
        "port": "9001",
        "rate": "1.5",
        "fast": "yes",
        "folder": "/tmp/x",
        "cap": "2",
        "owner": ADDRESS,
        "maybe": "",
        "limit": "0.5",
        "tags": "b, c",
        "numbers": "1,2, 3",
        "peers": ADDRESS,
        "extra": "",
    }
    made = load(Settings, prefix="T_", environment={f"T_{name.upper()}": text for name, text in texts.items()} | {"OTHER": "x"})
    assert made == Settings(
        name="env",
        port=9001,
        rate=1.5,
        fast=True,
        folder=Path("/tmp/x"),
        cap=Amount(2_000_000),
        owner=Address(ADDRESS.lower()),
        maybe=None,
        limit=Amount(500_000),
        tags=("b", "c"),
        numbers=(1, 2, 3),
        peers=(Address(ADDRESS.lower()),),
        extra=(),
    )


def test_flags_beat_the_environment_beats_toml(tmp_path: Path) -> None:
    """Each source overrides the previous one for each setting; a flag that was not given (None) overrides nothing."""
    environment = {"T_PORT": "2", "T_RATE": "2", "PORT": "99"}
    made = loaded(
        tmp_path,
        'name = "toml"\nport = 1\nrate = 1.0\nfast = true',
        prefix="T_",
        environment=environment,
        flags={"port": 3, "fast": None, "maybe": None, "tags": ("x",)},
    )
    assert (made.name, made.port, made.rate, made.fast, made.tags) == ("toml", 3, 2.0, True, ("x",))


def test_the_environment_counts_only_with_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a prefix no variable is read; with a prefix the process's variables are read."""
    monkeypatch.setenv("NAME", "shell")
    monkeypatch.setenv("T_NAME", "ours")
    assert loaded(tmp_path, 'name = "toml"', environment=None).name == "toml"
    assert loaded(tmp_path, 'name = "toml"', prefix="T_", environment=None).name == "ours"


def test_values_that_are_made_already_pass(tmp_path: Path) -> None:
    """Flags may have values of the field's own type."""
    flags = {"cap": Amount(3), "folder": Path("y"), "engines": [Engine("u")], "main": Engine("v")}
    made = loaded(tmp_path, 'name = "n"', flags=flags)
    assert (made.cap, made.folder, made.engines, made.main) == (Amount(3), Path("y"), (Engine("u"),), Engine("v"))


WRONG: list[tuple[str, str, str]] = [
    ("port", '"x"', "expected int"),
    ("port", "1.5", "expected int"),
    ("port", "true", "expected int"),
    ("port", "[1]", "expected int"),
    ("rate", '"fast"', "expected float"),
    ("rate", "false", "expected float"),
    ("fast", '"maybe"', "expected bool"),
    ("fast", "2", "expected bool"),
    ("name", "5", "expected str"),
    ("folder", "5", "expected Path"),
    ("cap", "5", "dollars in quotes"),
    ("cap", "0.5", "dollars in quotes"),
    ("cap", '"half"', "expected a decimal number"),
    ("cap", '"0.0000001"', "at most 6 places"),
    ("limit", '"-1"', "expected a decimal number"),
    ("owner", '"0x12"', "expected a 20-byte address"),
    ("owner", "5", "expected a 20-byte address"),
    ("maybe", "5", "expected str"),
    ("heir", '"0x"', "expected a 20-byte address"),
    ("tags", "5", "expected a list"),
    ("tags", "{a = 1}", "expected a list"),
    ("engines", '["http://one"]', "expected a table"),
    ("main", '"http://one"', "expected a table"),
    ("main", "[]", "expected a table"),
]


@pytest.mark.parametrize(("name", "value", "reason"), WRONG)
def test_a_wrong_value_is_named_with_its_file(tmp_path: Path, name: str, value: str, reason: str) -> None:
    """The error names the file, the setting and what was expected."""
    text = f"{name} = {value}" if name == "name" else f'name = "n"\n{name} = {value}'
    with pytest.raises(BadMessage) as caught:
        loaded(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/c.toml: {name}")
    assert reason in message


def test_values_inside_lists_and_tables_are_named_by_their_path(tmp_path: Path) -> None:
    """An error inside a list or a nested table names the item and the member."""
    with pytest.raises(BadMessage, match=r"c\.toml: numbers\[1\]: expected int"):
        loaded(tmp_path, 'name = "n"\nnumbers = [1, "x"]')
    with pytest.raises(BadMessage, match=r"c\.toml: engines\[0\]: weight: expected float"):
        loaded(tmp_path, 'name = "n"\n[[engines]]\nurl = "u"\nweight = "heavy"')
    with pytest.raises(BadMessage, match=r"c\.toml: engines\[0\]: missing setting url"):
        loaded(tmp_path, 'name = "n"\n[[engines]]')
    with pytest.raises(BadMessage, match=r"c\.toml: main: unknown setting ulr; did you mean url"):
        loaded(tmp_path, 'name = "n"\n[main]\nulr = "u"')


def test_an_error_names_the_source_that_it_came_from(tmp_path: Path) -> None:
    """An error in a variable or a flag names its own source, not the file."""
    with pytest.raises(BadMessage, match=r"^environment variable T_PORT: expected int, got 'x'$"):
        loaded(tmp_path, 'name = "n"', prefix="T_", environment={"T_PORT": "x"})
    with pytest.raises(BadMessage, match=r"^flag cap: expected a decimal number"):
        loaded(tmp_path, 'name = "n"', flags={"cap": "x"})
    with pytest.raises(BadMessage, match=r"^environment variable T_NUMBERS\[1\]: expected int"):
        loaded(tmp_path, 'name = "n"', prefix="T_", environment={"T_NUMBERS": "1,x"})


def test_a_text_that_may_be_a_secret_is_not_repeated(tmp_path: Path) -> None:
    """An API key that was written as a number is refused without being printed."""
    with pytest.raises(BadMessage, match="maybe: expected str, got int") as caught:
        loaded(tmp_path, 'name = "n"\nmaybe = 123456789')
    assert "123456789" not in str(caught.value)


def test_unknown_and_missing_settings_are_named(tmp_path: Path) -> None:
    """An unknown setting gives an error that lists the known ones; a missing setting gives an error that says to set it."""
    with pytest.raises(BadMessage, match=r"c\.toml: unknown setting prot; did you mean port"):
        loaded(tmp_path, 'name = "n"\nprot = 1')
    with pytest.raises(BadMessage, match=r"^config: unknown setting prot"):
        load(Settings, flags={"prot": 1}, environment={})
    with pytest.raises(BadMessage, match=r"^config: missing setting name$"):
        load(Settings, environment={})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing files, folders, invalid TOML and other encodings give errors of this project that name the path."""
    with pytest.raises(BadMessage, match=r"config .*/none\.toml: No such file"):
        load(Settings, tmp_path / "none.toml")
    with pytest.raises(BadMessage, match="Is a directory"):
        load(Settings, tmp_path)
    with pytest.raises(BadMessage, match=r"config .*/c\.toml: .*line 2"):
        loaded(tmp_path, 'name = "n"\nport = = 1')
    (tmp_path / "latin.toml").write_bytes('name = "caf\u00e9"'.encode("latin-1"))
    with pytest.raises(BadMessage, match=r"config .*/latin\.toml: .*utf-8"):
        load(Settings, tmp_path / "latin.toml")


def test_toml_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    """Names with characters outside ASCII are read correctly."""
    assert loaded(tmp_path, 'name = "caf\u00e9 \u20ac"').name == "caf\u00e9 \u20ac"


def test_home_is_the_variable_or_a_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TALLYSTICK_HOME is used unless it is empty; ~ is expanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in (("/srv/t", Path("/srv/t")), ("~/t", tmp_path / "t"), ("", tmp_path / ".tallystick")):
        monkeypatch.setenv("TALLYSTICK_HOME", value)
        assert home() == expected
    monkeypatch.delenv("TALLYSTICK_HOME")
    assert home() == tmp_path / ".tallystick"


@dataclass(frozen=True)
class Numbers:
    whole: int = 1
    real: float = 1.0


BAD_NUMBERS = [
    "9" * 400,
    "9" * 5_000,
    "1e400",
    "inf",
    "-inf",
    "nan",
    "\u0663",
    "1_000",
    "0x10",
    "1e",
    "--1",
    "9223372036854775808",
    "",
    " ",
]


@pytest.mark.parametrize("text", BAD_NUMBERS, ids=range(len(BAD_NUMBERS)))
@pytest.mark.parametrize("name", ["whole", "real"])
def test_a_number_that_no_machine_holds_does_not_crash_the_start(name: str, text: str) -> None:
    """A number with hundreds of digits, an infinite one, or one in other digits than ASCII's is refused with the setting's
    name.
    """
    with pytest.raises(BadMessage, match=name.upper()):
        load(Numbers, prefix="T_", environment={f"T_{name.upper()}": text})


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5_000, "1e400", "inf", "nan", "-9223372036854775809"], ids=range(6))
@pytest.mark.parametrize("name", ["whole", "real"])
def test_a_number_in_a_file_does_not_crash_the_start_either(tmp_path: Path, name: str, text: str) -> None:
    """The same holds for a TOML file, in which numbers can be too large in other ways."""
    (tmp_path / "c.toml").write_text(f"{name} = {text}\n")
    with pytest.raises(BadMessage, match=r"c\.toml"):
        load(Numbers, tmp_path / "c.toml")


def test_plain_numbers_are_read() -> None:
    """Whole numbers, fractions and exponents are read as their values."""
    environment = {"T_WHOLE": " 7 ", "T_REAL": "2.5e1"}
    assert load(Numbers, prefix="T_", environment=environment) == Numbers(7, 25.0)
    assert load(Numbers, flags={"whole": -3, "real": 2}) == Numbers(-3, 2.0)


@dataclass(frozen=True)
class _Table:
    ratio: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class _WithTable:
    table: _Table = field(default_factory=_Table)
    table_name: str = ""


def test_a_variable_sets_a_member_of_a_table(tmp_path: Path) -> None:
    """It wins over the file, and leaves the other members. A setting of the same name goes first."""
    file = tmp_path / "c.toml"
    file.write_text('[table]\nratio = 0.5\nname = "x"\n')
    loaded = load(_WithTable, file, prefix="T_", environment={"T_TABLE_RATIO": "0.25", "T_TABLE_NAME": "y"})
    assert loaded == _WithTable(_Table(0.25, "x"), "y")
    assert load(_WithTable, prefix="T_", environment={"T_TABLE_RATIO": "0.25"}).table == _Table(0.25)
    with pytest.raises(BadMessage, match=r"^environment variable T_TABLE_RATIO: expected float"):
        load(_WithTable, file, prefix="T_", environment={"T_TABLE_RATIO": "half"})
    with pytest.raises(BadMessage, match="T_TABLE: expected a table"):
        load(_WithTable, prefix="T_", environment={"T_TABLE": "x", "T_TABLE_RATIO": "1"})
