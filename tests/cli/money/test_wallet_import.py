"""`tally wallet import`: every form in which other wallets export a key, and no secret in arguments, output or errors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account

from tallystick.protocol.eip712 import Signer
from tallystick.protocol.signatures import checksum
from tallystick.runtime.keystore import open_keystore
from tests.chain.harness import person
from tests.cli.conftest import PASSWORD, Tally

SIGNER = person("imported")
HEX = SIGNER.secret.hex()
PHRASE = "test test test test test test test test test test test junk"
FIRST, SECOND = "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266", "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder of the user."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr(Path, "home", lambda: folder)
    return folder


def _file(tmp_path: Path, text: str, name: str = "secret") -> str:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def _store(password: str = PASSWORD, **changes: Any) -> str:
    encrypted = Account.encrypt(SIGNER.secret, password, kdf="scrypt", iterations=2) | changes
    return json.dumps({name: value for name, value in encrypted.items() if value is not None})


class _Terminal(io.StringIO):
    """Standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "written", [HEX, f"0x{HEX}", f"0X{HEX.upper()}\n", f"  {HEX}  \r\n", f'"0x{HEX}"', f"\ufeff{HEX}"], ids=range(6)
)
def test_a_private_key_in_any_form(tally: Tally, tmp_path: Path, written: str) -> None:
    """A private key as MetaMask shows it, with and without 0x, becomes a keystore of mode 0600 that does not contain it."""
    imported = tally("wallet", "import", "mine", "--key-file", _file(tmp_path, written))
    assert imported["address"] == checksum(SIGNER.address)
    path = Path(imported["keystore"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert HEX not in path.read_text()
    assert open_keystore(path, PASSWORD).secret == SIGNER.secret


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ((), FIRST),
        (("--index", "0"), FIRST),
        (("--index", "1"), SECOND),
        (("--derivation-path", "m/44'/60'/0'/0/1"), SECOND),
    ],
)
def test_a_seed_phrase(tally: Tally, tmp_path: Path, options: tuple[str, ...], address: str) -> None:
    """A seed phrase gives the account that MetaMask shows under the number, or the one at a path."""
    file = _file(tmp_path, PHRASE + "\n")
    assert tally("wallet", "import", "mine", "--key-file", file, *options)["address"] == address


def test_a_passphrase_of_a_seed_phrase(tally: Tally, tmp_path: Path) -> None:
    """A passphrase from a file gives the account that eth-account derives with it."""
    Account.enable_unaudited_hdwallet_features()
    phrase, passphrase = _file(tmp_path, PHRASE), _file(tmp_path, "my passphrase\n", "passphrase")
    imported = tally("wallet", "import", "mine", "--key-file", phrase, "--passphrase-file", passphrase)
    assert imported["address"] == Account.from_mnemonic(PHRASE, passphrase="my passphrase").address


def test_a_secret_from_standard_input(tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--key-file -` reads a key or a phrase from standard input."""
    for name, text, address in (("a", HEX, checksum(SIGNER.address)), ("b", PHRASE, FIRST)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert tally("wallet", "import", name, "--key-file", "-")["address"] == address


def test_a_secret_from_a_prompt(tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal the secret is asked for without being shown, the address is shown, and a no imports nothing."""
    hidden: list[str] = []

    def prompt(label: str, *, hide_input: bool = False, **_: Any) -> str:
        assert hide_input
        hidden.append(label)
        return PHRASE

    monkeypatch.setattr("typer.prompt", prompt)
    monkeypatch.setattr("sys.stdin", _Terminal("n\n"))
    refused = tally.says("wallet", "import", "mine", code=1)
    assert FIRST in refused
    assert "junk" not in refused
    assert not (tally.home / "keys" / "mine.json").exists()
    monkeypatch.setattr("sys.stdin", _Terminal("y\n"))
    assert FIRST in tally.says("wallet", "import", "mine")
    assert hidden == ["Private key or seed phrase (not shown)"] * 2
    assert FIRST in tally.says("wallet", "import", "other", "--yes")


def test_an_account_that_foundry_keeps(tally: Tally, home: Path) -> None:
    """The name of an account of `cast wallet` is found in foundry's folder; its keystore has no address."""
    _file(home / ".foundry" / "keystores", _store(address=None), "deployer")
    assert tally("wallet", "import", "mine", "--keystore", "deployer")["address"] == checksum(SIGNER.address)


@pytest.mark.parametrize("folder", [".ethereum/keystore", "Library/Ethereum/keystore"])
@pytest.mark.parametrize("form", [str, str.upper, checksum], ids=["lower", "upper", "checksum"])
def test_an_account_that_geth_keeps(tally: Tally, home: Path, folder: str, form: Any) -> None:
    """An address is found among geth's files, whose names end with it."""
    _file(home / folder, _store(), f"UTC--2026-01-02T03-04-05.678901234Z--{SIGNER.address[2:]}")
    address = form(SIGNER.address).replace("0X", "0x")
    assert tally("wallet", "import", "mine", "--keystore", address)["address"] == checksum(SIGNER.address)


def test_keystores_of_other_wallets(tally: Tally, tmp_path: Path) -> None:
    """A keystore by its path, as ethers exports it, opens with its own password, which differs from the new one."""
    store = json.loads(_store("other"))
    ethers = {"version": 3, "Crypto": store["crypto"], "address": store["address"], "x-ethers": {"client": "ethers.js"}}
    file, password = _file(tmp_path, json.dumps(ethers)), _file(tmp_path, "other\n", "password")
    Path(file).chmod(0o644)
    assert "does not open" in tally("wallet", "import", "mine", "--keystore", file, fails=True)["message"]
    imported = tally("wallet", "import", "mine", "--keystore", file, "--keystore-password-file", password)
    assert imported["address"] == checksum(SIGNER.address)
    assert open_keystore(Path(imported["keystore"]), PASSWORD).secret == SIGNER.secret


def test_the_expected_address(tally: Tally, tmp_path: Path) -> None:
    """With --expect-address a key of another account is not imported."""
    file = _file(tmp_path, PHRASE)
    arguments = ("wallet", "import", "mine", "--key-file", file, "--expect-address")
    error = tally(*arguments, SECOND, fails=True)
    assert FIRST.lower() in error["message"]
    assert not (tally.home / "keys" / "mine.json").exists()
    assert tally(*arguments, FIRST)["address"] == FIRST


def test_an_import_never_overwrites(payer: Tally, tmp_path: Path) -> None:
    """A wallet that exists is not replaced, and no secret is asked for."""
    before = (payer.home / "keys" / "default.json").read_bytes()
    assert "never overwritten" in payer("wallet", "import", "default", "--key-file", _file(tmp_path, HEX), fails=True)["message"]
    assert "never overwritten" in payer("wallet", "import", "default", fails=True)["message"]
    assert (payer.home / "keys" / "default.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PHRASE.replace("junk", "jnk"), "word 12 ('jnk')"),
        (PHRASE.replace("junk", "test"), "checksum does not match"),
        ("test test test", "expected 12, 15, 18, 21 or 24 words, got 3"),
        (HEX[:-1], "64 hex digits, or a seed phrase, got 63 characters"),
        (HEX + "0", "got 65 characters"),
        ("z" * 64, "64 hex digits"),
        ("", "got 0 characters"),
        ("0" * 64, "expected a usable private key"),
        ("f" * 64, "expected a usable private key"),
        (_store(), "imported with --keystore"),
        ("ab" * 40_000, "at most 65536 bytes"),
    ],
    ids=lambda value: value[:20],
)
def test_a_wrong_secret_is_named_and_not_repeated(tally: Tally, tmp_path: Path, text: str, words: str) -> None:
    """What is wrong is said without the secret."""
    message = tally("wallet", "import", "mine", "--key-file", _file(tmp_path, text), fails=True)["message"]
    assert words in message
    assert HEX[:16] not in message
    assert "test test" not in message
    assert not (tally.home / "keys" / "mine.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("0x" + HEX,),
        (HEX,),
        (PHRASE,),
        ("mine", "--key-file", HEX),
        ("mine", "--key-file", PHRASE),
        ("mine", "--keystore", "0x" + HEX),
    ],
    ids=range(6),
)
def test_a_secret_in_the_arguments_is_refused(tally: Tally, arguments: tuple[str, ...]) -> None:
    """A secret on the command line is refused with the reason, and is not printed again."""
    printed = tally.says("wallet", "import", *arguments, code=1)
    assert "visible to other users" in printed
    assert HEX not in printed
    assert "junk" not in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--key-file - reads a secret from standard input"),
        (("--key-file", "a", "--keystore", "b"), "at most one of"),
        (("--dev-account", "0", "--index", "1"), "for seed phrases only"),
        (("--keystore", "nobody"), "no account 'nobody' in ~/.foundry/keystores"),
        (("--keystore", "/"), "is a folder"),
        (("--key-file", "/nowhere"), "No such file"),
        (("--dev-account", "99"), "expected 0 to 9"),
        (("--key-file", "x", "--expect-address", "0x12"), "--expect-address"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_use(tally: Tally, home: Path, arguments: tuple[str, ...], words: str) -> None:
    """Each wrong use is refused with what to do, and makes no wallet."""
    assert home.is_dir()
    assert words in tally("wallet", "import", "mine", *arguments, fails=True)["message"]
    assert not (tally.home / "keys").exists()


def test_options_of_a_phrase_with_a_key(tally: Tally, tmp_path: Path) -> None:
    """An account number with a private key is a mistake, and not ignored."""
    message = tally("wallet", "import", "mine", "--key-file", _file(tmp_path, HEX), "--index", "1", fails=True)["message"]
    assert "are for seed phrases" in message


def test_the_file_with_the_secret_is_pointed_out(tally: Tally, tmp_path: Path) -> None:
    """After an import the user is told that the file still holds the secret."""
    file = _file(tmp_path, HEX)
    assert f"{file} still holds the secret unencrypted" in tally.says("wallet", "import", "mine", "--key-file", file)
    assert Signer(SIGNER.secret).address in tally.says("wallet", "list").lower()


def test_a_keystore_without_an_address_does_not_hide_the_others(payer: Tally) -> None:
    """A keystore that names no address, as foundry writes it, is listed without one, with the command that imports it."""
    copied = payer.home / "keys" / "copied.json"
    _file(copied.parent, _store(address=None), copied.name)
    assert payer("wallet", "list") == {"copied": None, "default": checksum(person("wallet default").address)}
    shown = payer.says("wallet", "list")
    assert f"tally wallet import NAME --keystore {copied}" in shown
    assert "unknown" in shown
    assert payer("wallet", "import", "proper", "--keystore", str(copied))["address"] == checksum(SIGNER.address)
