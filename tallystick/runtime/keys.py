"""Keystores: secrets encrypted at rest (Web3 Secret Storage, version 3), files of mode 0600, never printed.

Passwords come from a file, from an environment variable or from a prompt, in that order of preference.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from eth_account import Account

from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage

PASSWORD_ENV = "TALLYSTICK_PASSWORD"  # noqa: S105 - the variable's name
PASSWORD_FILE_ENV = "TALLYSTICK_PASSWORD_FILE"  # noqa: S105 - the variable's name
SCRYPT_N = 1 << 17
"""eth-account's default cost is 2**18; half of it opens in about a third of a second and stays beyond guessing."""


def write_private(path: Path, data: bytes) -> None:
    """Writes a file that only its owner can read, all of it or nothing. Makes missing folders (0700)."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def find_password(file: Path | None = None, prompt: Callable[[], str] | None = None) -> str:
    """The password from `file`, TALLYSTICK_PASSWORD_FILE, TALLYSTICK_PASSWORD or the prompt. Raises BadMessage."""
    named = file or (Path(os.environ[PASSWORD_FILE_ENV]) if PASSWORD_FILE_ENV in os.environ else None)
    if named is not None:
        try:
            return named.read_text().rstrip("\r\n")
        except OSError as error:
            raise BadMessage(f"password file {named}: {error.strerror}") from None
    if PASSWORD_ENV in os.environ:
        return os.environ[PASSWORD_ENV]
    if prompt is None:
        raise BadMessage(f"a keystore password is needed: set {PASSWORD_FILE_ENV} or {PASSWORD_ENV}, or give --password-file")
    return prompt()


def create_keystore(path: Path, password: str, secret: bytes | None = None, *, cost: int = SCRYPT_N) -> Signer:
    """Writes a keystore with a new (or the given) secret. Raises BadMessage if the file exists: keys are never overwritten."""
    if path.exists():
        raise BadMessage(f"{path} exists; a key is never overwritten, choose another name or move it away")
    signer = Signer(secret or secrets.token_bytes(32))
    store = Account.encrypt(signer.secret, password, kdf="scrypt", iterations=cost)
    write_private(path, json.dumps(store).encode())
    return signer


def open_keystore(path: Path, password: str) -> Signer:
    """The signer in a keystore. Raises BadMessage if it is missing, readable by others, damaged, or the password is wrong."""
    try:
        if path.stat().st_mode & 0o077:
            raise BadMessage(f"{path} can be read by others; run: chmod 600 {path}")
        store = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadMessage(f"no keystore at {path}; `tally wallet new` makes one") from None
    except (OSError, ValueError) as error:
        raise BadMessage(f"{path}: not a readable keystore: {error}") from None
    try:
        return Signer(bytes(Account.decrypt(store, password)))
    except (ValueError, KeyError, TypeError):
        raise BadMessage(f"{path}: the password does not open it, or the file is damaged") from None


def keystore_address(path: Path) -> str:
    """The address that a keystore says it holds, without opening it. Raises BadMessage."""
    try:
        return "0x" + str(json.loads(path.read_bytes())["address"]).lower().removeprefix("0x")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadMessage(f"{path}: not a readable keystore: {error}") from None


def random_secret_file(path: Path, size: int) -> bytes:
    """The secret bytes kept in a 0600 file, made on first use. Raises BadMessage if others can read it or it has another size."""
    if not path.exists():
        write_private(path, secrets.token_bytes(size))
    if path.stat().st_mode & 0o077:
        raise BadMessage(f"{path} can be read by others; run: chmod 600 {path}")
    data = path.read_bytes()
    if len(data) != size:
        raise BadMessage(f"{path}: expected {size} bytes, found {len(data)}")
    return data
