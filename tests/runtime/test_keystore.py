"""Keystores and other secrets on disk."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage
from tallystick.runtime import keystore, web3_keystore
from tallystick.runtime.keystore import (
    create_keystore,
    find_password,
    keystore_address,
    load_or_create_secret,
    open_keystore,
    open_wallet,
    write_private,
)
from tests.protocol.strategies import few

CHEAP = 2
SECRET = keccak(b"a secret")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the shell's password variables for these tests."""
    monkeypatch.delenv(keystore.PASSWORD_ENV, raising=False)
    monkeypatch.delenv(keystore.PASSWORD_FILE_ENV, raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A keystore that holds SECRET under the password "right"."""
    path = tmp_path / "key.json"
    create_keystore(path, "right", SECRET, cost=CHEAP)
    return path


def mode(path: Path) -> int:
    """Returns a file's permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


# Keystores


def test_a_keystore_gives_its_key_back(tmp_path: Path) -> None:
    """A new keystore opens with its password and holds the same key; each keystore file is different."""
    made = create_keystore(tmp_path / "a.json", "pass", cost=CHEAP)
    assert open_keystore(tmp_path / "a.json", "pass").secret == made.secret
    assert keystore_address(tmp_path / "a.json") == made.address
    assert create_keystore(tmp_path / "b.json", "pass", cost=CHEAP).secret != made.secret
    assert create_keystore(tmp_path / "c.json", "pass", SECRET, cost=CHEAP).secret == SECRET


def test_a_wallet_opens_by_name_or_by_file(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is looked up in the home folder; the password is the given one, else the environment's, else the prompt's."""
    monkeypatch.setenv("TALLYSTICK_HOME", str(tmp_path))
    create_keystore(tmp_path / "keys" / "mine.json", "right", SECRET, cost=CHEAP)
    assert open_wallet("mine", "right").secret == SECRET
    assert open_wallet(store, prompt=lambda: "right").secret == SECRET
    monkeypatch.setenv(keystore.PASSWORD_ENV, "right")
    assert open_wallet(str(store)).secret == SECRET
    with pytest.raises(BadMessage, match="tally wallet new other"):
        open_wallet("other")


@pytest.mark.parametrize("password", ["\u20ac\u00fc \u2603", " ", "a" * 10_000, "tab\tand\nline"])
def test_any_password_works(tmp_path: Path, password: str) -> None:
    """Passwords with spaces, in other alphabets and long ones work; one different character does not open the keystore."""
    create_keystore(tmp_path / "k.json", password, SECRET, cost=CHEAP)
    assert open_keystore(tmp_path / "k.json", password).secret == SECRET
    with pytest.raises(BadMessage, match="the password does not open it"):
        open_keystore(tmp_path / "k.json", password + "x")


def test_a_keystore_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    """The file has mode 0600 and every created folder 0700 with any umask; the file does not contain the secret."""
    former = os.umask(0)
    try:
        create_keystore(tmp_path / "x" / "y" / "k.json", "pass", SECRET, cost=CHEAP)
    finally:
        os.umask(former)
    assert mode(tmp_path / "x" / "y" / "k.json") == 0o600
    assert mode(tmp_path / "x") == mode(tmp_path / "x" / "y") == 0o700
    assert SECRET.hex() not in (tmp_path / "x" / "y" / "k.json").read_text()
    assert [file.name for file in (tmp_path / "x" / "y").iterdir()] == ["k.json"], "and nothing else is left"


def test_an_existing_key_is_never_overwritten(store: Path) -> None:
    """Creating a keystore in place of a file fails and leaves the file unchanged."""
    before = store.read_bytes()
    with pytest.raises(BadMessage, match="exists, and a key is never overwritten"):
        create_keystore(store, "other", cost=CHEAP)
    assert store.read_bytes() == before


def test_of_two_that_make_one_keystore_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If two processes create one keystore at once, the second is refused and the first one's key is kept."""
    path = tmp_path / "k.json"
    encrypt = web3_keystore.encrypt_keystore

    def slow(*arguments: Any, **more: Any) -> Any:
        if not path.exists():
            monkeypatch.setattr(web3_keystore, "encrypt_keystore", encrypt)
            winner.append(create_keystore(path, "first", cost=CHEAP))
        return encrypt(*arguments, **more)

    winner: list[Signer] = []
    monkeypatch.setattr(web3_keystore, "encrypt_keystore", slow)
    with pytest.raises(BadMessage, match="exists, and a key is never overwritten"):
        create_keystore(path, "second", cost=CHEAP)
    assert open_keystore(path, "first").secret == winner[0].secret
    assert [file.name for file in tmp_path.iterdir()] == ["k.json"]


@pytest.mark.parametrize("secret", [b"", b"\1", bytes(32), b"\xff" * 32, b"\1" * 33])
def test_an_unusable_secret_is_refused(tmp_path: Path, secret: bytes) -> None:
    """An invalid key gives an error of this project and leaves no file; an empty key does not mean a new key."""
    with pytest.raises(BadMessage, match="expected a usable private key"):
        create_keystore(tmp_path / "k.json", "pass", secret, cost=CHEAP)
    assert not (tmp_path / "k.json").exists()


def test_an_empty_password_is_refused(tmp_path: Path) -> None:
    """An unset variable or an empty password file never leads to a keystore without a password."""
    with pytest.raises(BadMessage, match="password: expected a text"):
        create_keystore(tmp_path / "k.json", "", cost=CHEAP)


def test_the_secret_appears_in_no_error(store: Path) -> None:
    """Neither a wrong password nor the key is printed."""
    with pytest.raises(BadMessage) as caught:
        open_keystore(store, "hunter2")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o610, 0o666, 0o755])
def test_a_keystore_that_others_can_touch_is_refused(store: Path, bits: int) -> None:
    """A keystore with permissions for group or others is refused, and the error says how to change them."""
    store.chmod(bits)
    with pytest.raises(BadMessage, match=rf"can be read by others; run: chmod 600 {store}"):
        open_keystore(store, "right")
    store.chmod(0o400)
    assert open_keystore(store, "right").secret == SECRET


def test_a_missing_keystore_says_how_to_make_one(tmp_path: Path) -> None:
    """The error names the path and the command that creates a keystore."""
    with pytest.raises(BadMessage, match=rf"no keystore at {tmp_path}/k\.json; create one with: tally wallet new"):
        open_keystore(tmp_path / "k.json", "pass")
    with pytest.raises(BadMessage, match="expected a keystore"):
        keystore_address(tmp_path / "k.json")


DAMAGED: list[Any] = [
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b"[]",
    b"5",
    b'"text"',
    b"{}",
    b'{"version": 3}',
    b'{"version": 7, "crypto": {}}',
    b'{"version": 3, "crypto": 5}',
    b'{"version": 3, "crypto": {"kdf": "rot13"}}',
    b'{"version": 3, "crypto": {"kdf": "scrypt", "kdfparams": {}}}',
    b'{"version": 4, "crypto": {}}',
]


@pytest.mark.parametrize("data", DAMAGED)
def test_a_file_that_is_no_keystore_is_refused(store: Path, data: bytes) -> None:
    """Any other file raises BadMessage that names it, when it is opened and when its address is read."""
    store.write_bytes(data)
    with pytest.raises(BadMessage, match=r"key\.json"):
        open_keystore(store, "right")
    with pytest.raises(BadMessage, match=r"key\.json"):
        keystore_address(store)


@cache
def _tree() -> dict[str, Any]:
    tree: dict[str, Any] = Account.encrypt(SECRET, "right", kdf="scrypt", iterations=CHEAP)
    return tree


def _paths(tree: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(tree, dict):
        return [at]
    return [path for key, value in tree.items() for path in _paths(value, (*at, key))]


def _replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    return value if not path else {**tree, path[0]: _replaced(tree[path[0]], path[1:], value)}


ODD: list[Any] = [None, "", "zz", "00", -1, 0, 3, 2**70, 1.5, True, [], {}, "0" * 64]


def test_any_damaged_member_is_refused_or_harmless(store: Path) -> None:
    """With odd values in any member, a keystore opens to the right key or raises BadMessage, and never gives another key."""
    right = json.loads(store.read_text())
    for path in _paths(right):
        for value in ODD:
            store.write_text(json.dumps(_replaced(right, path, value)))
            try:
                assert open_keystore(store, "right").secret == SECRET
            except BadMessage as error:
                assert "key.json" in str(error)  # noqa: PT017 - either end is right
            else:
                assert path[-1] in {"id", "address", "cipher", "version", "prf", "dklen", "p"}, (path, value)


@given(data=st.data())
@few
def test_a_flipped_digit_never_opens_another_key(store: Path, data: st.DataObject) -> None:
    """A keystore's checksum does not cover its IV or its address, so the key is compared with the address."""
    tree = _tree()
    crypto = tree["crypto"]
    where = data.draw(
        st.sampled_from([("address",), ("crypto", "ciphertext"), ("crypto", "mac"), ("crypto", "cipherparams", "iv")])
    )
    text = {
        "address": tree["address"],
        "ciphertext": crypto["ciphertext"],
        "mac": crypto["mac"],
        "iv": crypto["cipherparams"]["iv"],
    }
    right = text[where[-1]]
    at = data.draw(st.integers(0, len(right) - 1))
    digit = data.draw(st.sampled_from("0123456789abcdef").filter(lambda d: d != right[at].lower()))
    store.write_text(json.dumps(_replaced(tree, where, right[:at] + digit + right[at + 1 :])))
    with pytest.raises(BadMessage, match="damaged"):
        open_keystore(store, "right")


def test_a_keystore_of_another_wallet_opens(store: Path) -> None:
    """Keystores of other tools open: with pbkdf2, without an address, and with 0x and mixed case in the address."""
    foreign = Account.encrypt(SECRET, "right", kdf="pbkdf2", iterations=1)
    for address in (None, foreign["address"], "0x" + foreign["address"].upper(), Signer(SECRET).address):
        tree = {k: v for k, v in foreign.items() if k != "address"} | ({} if address is None else {"address": address})
        store.write_text(json.dumps(tree))
        assert open_keystore(store, "right").secret == SECRET
        if address is not None:
            assert keystore_address(store) == Signer(SECRET).address


# Passwords


def test_the_sources_of_a_password_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named file precedes the variable that names one, which precedes the password variable, which precedes the prompt."""
    for name in ("named", "pointed"):
        (tmp_path / name).write_text(f"from {name}\n")
    assert find_password(prompt=lambda: "from prompt") == "from prompt"
    monkeypatch.setenv(keystore.PASSWORD_ENV, "from variable")
    assert find_password(prompt=lambda: "from prompt") == "from variable"
    monkeypatch.setenv(keystore.PASSWORD_FILE_ENV, str(tmp_path / "pointed"))
    assert find_password(prompt=lambda: "from prompt") == "from pointed"
    assert find_password(tmp_path / "named", lambda: "from prompt") == "from named"


def test_without_any_source_the_error_names_them() -> None:
    """A service without a terminal gets an error that says what to set."""
    with pytest.raises(BadMessage, match="set TALLYSTICK_PASSWORD_FILE or TALLYSTICK_PASSWORD, or give --password-file"):
        find_password()


def test_an_empty_file_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable, as a compose file leaves it, does not mean the current folder."""
    monkeypatch.setenv(keystore.PASSWORD_FILE_ENV, "")
    assert find_password(prompt=lambda: "from prompt") == "from prompt"


@pytest.mark.parametrize(("written", "password"), [(b"a\n", "a"), (b"a\r\n", "a"), (b" a ", " a "), (b"a\nb", "a\nb"), (b"", "")])
def test_only_line_ends_are_cut_from_a_password_file(tmp_path: Path, written: bytes, password: str) -> None:
    """One line end, which editors add, is removed; everything else is the password."""
    (tmp_path / "p").write_bytes(written)
    assert find_password(tmp_path / "p") == password


def test_a_password_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file, a folder and a binary file give an error of this project with the path and without the contents."""
    (tmp_path / "binary").write_bytes(b"\xff\xfesecret")
    for path, reason in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary", "expected UTF-8"),
    ):
        with pytest.raises(BadMessage, match=f"password file {path}: {reason}") as caught:
            find_password(path)
        assert "secret" not in str(caught.value)


# Private files


def test_a_private_file_is_replaced_whole(tmp_path: Path) -> None:
    """Writing again replaces the contents and restricts the permissions."""
    path = tmp_path / "f"
    path.write_bytes(b"old and long")
    path.chmod(0o666)
    write_private(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", 0o600)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """If the disk becomes full during a write, the old file stays, and no partial secret remains beside it."""

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "f"
    write_private(path, b"old")
    monkeypatch.setattr(*((os, "fsync", fail) if broken == "fsync" else (Path, "replace", fail)))
    with pytest.raises(OSError, match="No space left"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_a_private_file_and_its_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contents are synced before the name, and the name before the call returns; a folder that cannot sync is tolerated."""
    synced: list[str] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        synced.append(
            f"{kind}, name there: {(tmp_path / 'f').exists()}, bytes: {os.fstat(descriptor).st_size if kind == 'file' else 0}"
        )
        fsync(descriptor)
        if kind == "folder":
            raise OSError(errno.EINVAL, "no syncing of folders here")

    monkeypatch.setattr(os, "fsync", spy)
    write_private(tmp_path / "f", b"data")
    assert synced == ["file, name there: False, bytes: 4", "folder, name there: True, bytes: 0"]


def test_a_private_file_replaces_no_device(tmp_path: Path) -> None:
    """A pipe stays one, as /dev/stdout would; so does a folder."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(FileExistsError):
            write_private(path, b"data")
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_private_file_can_insist_on_being_new(tmp_path: Path) -> None:
    """Without `replace`, an existing file is not changed."""
    write_private(tmp_path / "f", b"old", replace=False)
    with pytest.raises(FileExistsError):
        write_private(tmp_path / "f", b"new", replace=False)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_a_secret_file_is_made_once(tmp_path: Path) -> None:
    """The first use creates random bytes of the size, with mode 0600; later uses read the same bytes."""
    path = tmp_path / "deep" / "secret"
    made = load_or_create_secret(path, 96)
    assert len(made) == 96
    assert mode(path) == 0o600
    assert load_or_create_secret(path, 96) == made
    assert load_or_create_secret(tmp_path / "other", 96) != made


def test_all_that_make_a_secret_file_at_once_get_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes that start together, all use the secret on disk."""
    path = tmp_path / "secret"
    exists: Callable[[Path], bool] = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: False if self == path else exists(self))
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda _n: load_or_create_secret(path, 32), range(32)))
    assert set(got) == {path.read_bytes()}


def test_a_secret_file_of_another_size_or_readable_by_others_is_refused(tmp_path: Path) -> None:
    """A secret file of another size, or readable by others, is neither cut nor used."""
    path = tmp_path / "secret"
    load_or_create_secret(path, 32)
    with pytest.raises(BadMessage, match="expected 96 bytes, got 32"):
        load_or_create_secret(path, 96)
    path.chmod(0o644)
    with pytest.raises(BadMessage, match="can be read by others"):
        load_or_create_secret(path, 32)
