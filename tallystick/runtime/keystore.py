"""Keystores: secrets encrypted at rest (Web3 Secret Storage, version 3), files of mode 0600, never printed.

Passwords come from a file, from an environment variable or from a prompt, in that order of preference.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import parse_address
from tallystick.runtime.config import home

if TYPE_CHECKING:
    from eth_account import Account

PASSWORD_ENV = "TALLYSTICK_PASSWORD"  # noqa: S105 - the variable's name
PASSWORD_FILE_ENV = "TALLYSTICK_PASSWORD_FILE"  # noqa: S105 - the variable's name
SCRYPT_N = 1 << 17
"""eth-account's default cost is 2**18; half of it opens in about a third of a second and stays beyond guessing."""
_DEAREST = {"dklen": 64, "c": 100_000_000, "n": 1 << 20, "r": 32, "p": 32}


def write_private(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Writes a file that only its owner can read, durably, all of it or nothing. Makes missing folders (0700).

    With `replace` false it raises FileExistsError where the file exists, also if another process makes it at that moment.
    """
    for folder in (*reversed(path.parent.parents), path.parent):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            part.replace(path)
        else:
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Makes a new name in a folder survive a power cut, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


PASSWORD_HELP = f"set {PASSWORD_FILE_ENV} or {PASSWORD_ENV}, or give --password-file"
"""What to do where no password can be asked for."""


def find_password(file: Path | None = None, prompt: Callable[[], str] | None = None) -> str:
    """The password from `file`, TALLYSTICK_PASSWORD_FILE, TALLYSTICK_PASSWORD or the prompt. Raises BadMessage."""
    named = file or (Path(os.environ[PASSWORD_FILE_ENV]) if os.environ.get(PASSWORD_FILE_ENV) else None)
    if named is not None:
        try:
            return named.read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            raise BadMessage(f"password file {named}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise BadMessage(f"password file {named}: not text in UTF-8") from None
    if PASSWORD_ENV in os.environ:
        return os.environ[PASSWORD_ENV]
    if prompt is None:
        raise BadMessage(f"a keystore password is needed: {PASSWORD_HELP}")
    return prompt()


def create_keystore(path: Path, password: str, secret: bytes | None = None, *, cost: int = SCRYPT_N) -> Signer:
    """Writes a keystore with a new (or the given) secret. Raises BadMessage for an unusable secret or an empty password, and if
    the file exists: keys are never overwritten.
    """
    exists = BadMessage(f"{path} exists; a key is never overwritten, choose another name or move it away")
    if path.exists():
        raise exists
    _require_password(password)
    try:
        signer = Signer(secrets.token_bytes(32) if secret is None else secret)
    except ValueError as error:
        raise BadMessage(f"not a usable private key: {error}") from None
    try:
        write_private(path, _encrypt(signer, password, cost), replace=False)
    except FileExistsError:
        raise exists from None
    return signer


def change_password(path: Path, old: str, new: str, *, cost: int = SCRYPT_N) -> Signer:
    """Encrypts a keystore anew: whenever it is cut off, the file opens with one of both passwords. Raises BadMessage."""
    _require_password(new)
    signer = open_keystore(path, old)
    write_private(path.resolve(), _encrypt(signer, new, cost))
    return signer


def _require_password(password: str) -> None:
    if not password:
        raise BadMessage("the keystore password is empty; an empty password protects nothing")


def _encrypt(signer: Signer, password: str, cost: int) -> bytes:
    return json.dumps(_account().encrypt(signer.secret, password, kdf="scrypt", iterations=cost)).encode()


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
        _check_cost(store)
        signer = Signer(bytes(_account().decrypt(store, password)))
        named = str(store.get("address") or signer.address)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, NotImplementedError, MemoryError):
        raise BadMessage(f"{path}: the password does not open it, or the file is damaged") from None
    if _address(named) != signer.address:  # what a keystore's checksum covers is not all of it
        raise BadMessage(f"{path}: damaged, it does not hold the key of {named[:42]}")
    return signer


def keystore_path(wallet: str | Path) -> Path:
    """Where a wallet's keystore is: a path if it looks like one, else a name in the home folder."""
    if isinstance(wallet, Path) or "/" in wallet or wallet.endswith(".json"):
        return Path(wallet).expanduser()
    return home() / "keys" / f"{wallet}.json"


def open_wallet(
    wallet: str | Path,
    password: str | None = None,
    *,
    password_file: Path | None = None,
    prompt: Callable[[], str] | None = None,
) -> Signer:
    """The signer of a wallet, named as `tally wallet new` named it, or by its keystore file.

    The password is the one given, else as `find_password` finds it: a file, TALLYSTICK_PASSWORD_FILE, TALLYSTICK_PASSWORD, or a
    prompt such as `getpass.getpass`. Raises BadMessage.
    """
    path = keystore_path(wallet)
    if not path.exists():
        raise BadMessage(f"no wallet at {path}; make one with: tally wallet new {wallet}")
    return open_keystore(path, find_password(password_file, prompt) if password is None else password)


def _check_cost(store: dict[str, Any]) -> None:
    """Keystores come from elsewhere, too: one that would take hours or all memory to open is as good as damaged."""
    crypto = {str(name).lower(): value for name, value in store.items()}["crypto"]
    parameters = {str(name).lower(): value for name, value in crypto.items()}["kdfparams"]
    for name, most in _DEAREST.items():
        if parameters.get(name, 0) > most:
            raise ValueError(f"{name} is too large")


def keystore_address(path: Path) -> str:
    """The address that a keystore says it holds, without opening it. Raises BadMessage."""
    try:
        return parse_address(_address(json.loads(path.read_bytes())["address"]), f"{path}: address")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadMessage(f"{path}: not a readable keystore: {error}") from None


def _address(written: object) -> str:
    return "0x" + str(written).lower().removeprefix("0x")


def load_or_create_secret(path: Path, size: int) -> bytes:
    """The secret bytes kept in a 0600 file, made on first use. Raises BadMessage if others can read it or it has another size."""
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # another process was faster: its secret counts
            write_private(path, secrets.token_bytes(size), replace=False)
    if path.stat().st_mode & 0o077:
        raise BadMessage(f"{path} can be read by others; run: chmod 600 {path}")
    data = path.read_bytes()
    if len(data) != size:
        raise BadMessage(f"{path}: expected {size} bytes, found {len(data)}")
    return data


def _account() -> type[Account]:
    from eth_account import Account  # noqa: PLC0415 - it loads for a third of a second, and most commands open no keystore

    return Account
