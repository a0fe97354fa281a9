"""The sources of `tally wallet import`: private keys, seed phrases, and the keystores of geth, foundry and other wallets.

A secret is read from a prompt without echo, from standard input or from a file, never from the command line, which other users of
the machine and the shell's history can see.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import typer

from tallystick.cli.options import prompt_password
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage
from tallystick.runtime.keystore import find_password, read_keystore
from tallystick.runtime.seed_phrase import key_from_phrase, looks_like_phrase

STDIN = Path("-")
MAX_SECRET_BYTES = 64 * 1024
_KEY = re.compile(r"(?:0[xX])?[0-9a-fA-F]{64}")
_GETH_FOLDERS = (".ethereum/keystore", "Library/Ethereum/keystore", "AppData/Local/Ethereum/keystore")
_FOUNDRY_FOLDER = ".foundry/keystores"


@dataclass(frozen=True, slots=True)
class Derivation:
    """Where in a seed phrase the account is. `path` replaces `index`; the passphrase is asked for, or read from a file."""

    index: int | None = None
    path: str | None = None
    passphrase_file: Path | None = None
    ask_passphrase: bool = False

    @property
    def is_given(self) -> bool:
        """Whether any option of a seed phrase was given."""
        return self != Derivation()

    def passphrase(self) -> str:
        """BIP-39's optional passphrase. Raises BadMessage."""
        if self.passphrase_file is not None:
            return find_password(self.passphrase_file)
        return ask_secret("Passphrase of the seed phrase") if self.ask_passphrase else ""


def refuse_secret_argument(text: str, field: str) -> None:
    """Raises BadMessage if an argument looks like a private key or a seed phrase. The message does not repeat it."""
    if _KEY.fullmatch(text.strip()) or len(text.split()) > 3:
        raise BadMessage(
            f"{field}: this looks like a secret. The command line is visible to other users and kept in the shell's history, so "
            "consider that key known to others; give a secret at the prompt, in a file, or on standard input (--key-file -)"
        )


def ask_secret(label: str) -> str:
    """Asks for a secret without echo. Raises BadMessage if standard input is no terminal."""
    if not sys.stdin.isatty():
        raise BadMessage("expected --key-file, --keystore or --dev-account; --key-file - reads a secret from standard input")
    return str(typer.prompt(f"{label} (not shown)", hide_input=True, err=True))


def key_of_text(text: str, derivation: Derivation, source: str) -> bytes:
    """The secret key that a text is: a private key in hex, or a seed phrase. Raises BadMessage, which does not repeat it."""
    cleaned = text.strip().strip("\"'").strip()
    if looks_like_phrase(cleaned):
        index = 0 if derivation.index is None else derivation.index
        return key_from_phrase(cleaned, index=index, path=derivation.path, passphrase=derivation.passphrase())
    if derivation.is_given:
        raise BadMessage(f"{source}: --index, --derivation-path and a passphrase are for seed phrases, and this is none")
    if not _KEY.fullmatch(cleaned):
        raise BadMessage(
            f"{source}: expected a private key as 64 hex digits, or a seed phrase, got {len(cleaned)} characters; a keystore "
            "file is imported with --keystore"
        )
    return bytes.fromhex(cleaned[-64:])


def read_secret(path: Path) -> str:
    """The text of a key file, or of standard input for `-`. Raises BadMessage."""
    try:
        raw = sys.stdin.buffer.read(MAX_SECRET_BYTES + 1) if path == STDIN else path.expanduser().read_bytes()
        if len(raw) > MAX_SECRET_BYTES:
            raise BadMessage(f"--key-file: {path}: expected at most {MAX_SECRET_BYTES} bytes")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise BadMessage(f"--key-file: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadMessage(f"--key-file: {path}: expected text in UTF-8") from None


def find_keystore(name: str) -> Path:
    """The keystore that a user means: a file, an account that foundry keeps, or an address whose file geth keeps.

    Raises BadMessage.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise BadMessage(f"--keystore: {path} is a folder; name one of its files")
    foundry = Path.home() / _FOUNDRY_FOLDER / name
    if "/" not in name and foundry.is_file():
        return foundry
    digits = name.lower().removeprefix("0x")
    if re.fullmatch(r"[0-9a-f]{40}", digits):
        for folder in _GETH_FOLDERS:
            files = sorted((Path.home() / folder).glob(f"UTC--*--{digits}*"))
            if files:
                return files[-1]
    raise BadMessage(
        f"--keystore: no file {path}, no account {name[:80]!r} in ~/{_FOUNDRY_FOLDER}, and no file of that address in "
        f"~/{_GETH_FOLDERS[0]}"
    )


def key_of_keystore(name: str, password_file: Path | None) -> bytes:
    """The secret key in a keystore. Its password comes from the file, the environment, or a prompt. Raises BadMessage."""
    path = find_keystore(name)
    return read_keystore(path, find_password(password_file, lambda: prompt_password(path.name))).secret


def usable_signer(secret: bytes) -> Signer:
    """The signer of a secret key. Raises BadMessage for a number that is no key."""
    try:
        return Signer(secret)
    except ValueError as error:
        raise BadMessage(f"expected a usable private key: {error}") from None


def confirm_account(signer: Signer, address: str, expected: str | None, *, ask: bool) -> None:
    """Checks the account against the address that the user expects, or asks whether it is the right one. Raises BadMessage."""
    if expected is not None and expected != signer.address:
        raise BadMessage(f"--expect-address: expected {expected}, but the key is that of {signer.address}; nothing was imported")
    if expected is None and ask and sys.stdin.isatty():
        typer.confirm(f"The address is {address}. Import it?", default=True, abort=True, err=True)
