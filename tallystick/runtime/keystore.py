"""Keystores: secret keys in encrypted files of mode 0600 (Web3 Secret Storage, version 3).

A password comes from a file, else from an environment variable, else from a prompt.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import parse_address
from tallystick.runtime.config import home

if TYPE_CHECKING:
    from tallystick.protocol.eip712 import Signer

PASSWORD_ENV = "TALLYSTICK_PASSWORD"  # noqa: S105 - the variable's name
PASSWORD_FILE_ENV = "TALLYSTICK_PASSWORD_FILE"  # noqa: S105 - the variable's name
SCRYPT_N = 1 << 17
"""The scrypt cost: half of eth-account's default of 2**18. A keystore opens in about a third of a second."""


def write_private(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Writes a file of mode 0600 atomically and durably. Creates missing folders with mode 0700.

    With `replace` false it raises FileExistsError if the file exists, even if another process creates it at the same moment. A
    device, a pipe or a folder is never replaced.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "expected a file or a new name", str(path))
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
    """Syncs a folder, so that a new name in it survives a power cut, if the system supports that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


PASSWORD_HELP = f"set {PASSWORD_FILE_ENV} or {PASSWORD_ENV}, or give --password-file"
"""The remedy if no password was given and none can be prompted for."""


def find_password(file: Path | None = None, prompt: Callable[[], str] | None = None) -> str:
    """The password from `file`, TALLYSTICK_PASSWORD_FILE, TALLYSTICK_PASSWORD or the prompt. Raises BadMessage."""
    named = file or (Path(os.environ[PASSWORD_FILE_ENV]) if os.environ.get(PASSWORD_FILE_ENV) else None)
    if named is not None:
        try:
            return named.read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            raise BadMessage(f"password file {named}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise BadMessage(f"password file {named}: expected UTF-8 text") from None
    if PASSWORD_ENV in os.environ:
        return os.environ[PASSWORD_ENV]
    if prompt is None:
        raise BadMessage(f"a keystore password is needed: {PASSWORD_HELP}")
    return prompt()


def create_keystore(path: Path, password: str, secret: bytes | None = None, *, cost: int = SCRYPT_N) -> Signer:
    """Writes a keystore with `secret`, or with a new random secret. An existing file is never overwritten.

    `cost` is scrypt's N. Raises BadMessage for an unusable secret, an empty password or an existing file.
    """
    exists = BadMessage(f"{path} exists, and a key is never overwritten: choose another name, or move the file away")
    if path.exists():
        raise exists
    _require_password(password)
    from tallystick.protocol.eip712 import Signer  # noqa: PLC0415 - slow to import, and many commands need no key

    try:
        signer = Signer(secrets.token_bytes(32) if secret is None else secret)
    except ValueError as error:
        raise BadMessage(f"secret: expected a usable private key: {error}") from None
    try:
        write_private(path, _encrypt(signer, password, cost), replace=False)
    except FileExistsError:
        raise exists from None
    return signer


def change_password(path: Path, old: str, new: str, *, cost: int = SCRYPT_N) -> Signer:
    """Encrypts a keystore with a new password. If interrupted, the file still opens with one of the two. Raises BadMessage."""
    _require_password(new)
    signer = open_keystore(path, old)
    write_private(path.resolve(), _encrypt(signer, new, cost))
    return signer


def _require_password(password: str) -> None:
    if not password:
        raise BadMessage("password: expected a text that is not empty")


def _encrypt(signer: Signer, password: str, cost: int) -> bytes:
    from tallystick.runtime.web3_keystore import encrypt_keystore  # noqa: PLC0415 - slow to import, and many commands need no key

    return json.dumps(encrypt_keystore(signer.secret, password, signer.address, cost=cost)).encode()


def open_keystore(path: Path, password: str) -> Signer:
    """The signer in a keystore.

    Raises BadMessage if the file is missing, readable by others or damaged, if the password is wrong, or if the keystore has
    another format, cipher or key derivation than Web3 Secret Storage has.
    """
    if path.exists() and path.stat().st_mode & 0o077:
        raise BadMessage(f"{path} can be read by others; run: chmod 600 {path}")
    return read_keystore(path, password)


def read_keystore(path: Path, password: str) -> Signer:
    """The signer in a keystore that another wallet wrote, whatever the permissions of the file. Raises BadMessage."""
    from tallystick.protocol.eip712 import Signer  # noqa: PLC0415 - see `_encrypt`
    from tallystick.runtime.web3_keystore import KeystoreError, WrongPassword, decrypt_keystore  # noqa: PLC0415 - see `_encrypt`

    try:
        store = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadMessage(f"no keystore at {path}; create one with: tally wallet new") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadMessage(f"{path}: expected a keystore: {error}") from None
    try:
        signer = Signer(decrypt_keystore(store, password))
    except WrongPassword as error:
        raise BadMessage(f"{path}: {error}; try another password, or restore the file from a backup") from None
    except (KeystoreError, OverflowError, MemoryError) as error:
        raise BadMessage(f"{path}: expected a keystore (Web3 Secret Storage, version 3): {error}") from None
    except ValueError:  # a number that is no key, whatever the cipher made of it
        raise BadMessage(f"{path}: damaged: it holds no usable private key") from None
    named = str(store.get("address") or signer.address)
    if _address(named) != signer.address:  # the keystore's checksum does not cover the address
        raise BadMessage(f"{path}: damaged: it holds the key of {signer.address}, not of {named[:42]}")
    return signer


def keystore_path(wallet: str | Path) -> Path:
    """The path of a wallet's keystore. `wallet` is a path if it contains a slash or ends with .json, else a name."""
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
    """The signer of a wallet, given by its name (see `tally wallet new`) or by the path of its keystore.

    Without `password`, `find_password` supplies it from `password_file`, TALLYSTICK_PASSWORD_FILE, TALLYSTICK_PASSWORD, or
    `prompt`, such as `getpass.getpass`. Raises BadMessage.
    """
    path = keystore_path(wallet)
    if not path.exists():
        raise BadMessage(f"no wallet at {path}; create one with: tally wallet new {wallet}")
    return open_keystore(path, find_password(password_file, prompt) if password is None else password)


def keystore_address(path: Path) -> str:
    """The address that a keystore names, read without the password. Raises BadMessage."""
    try:
        store = json.loads(path.read_bytes())
        if isinstance(store, dict) and "version" in store and not store.get("address"):
            raise BadMessage(f"{path}: names no address; make a wallet of it: tally wallet import NAME --keystore {path}")
        return parse_address(_address(store["address"]), f"{path}: address")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadMessage(f"{path}: expected a keystore: {error}") from None


def _address(written: object) -> str:
    return "0x" + str(written).lower().removeprefix("0x")


def load_or_create_secret(path: Path, size: int) -> bytes:
    """The secret in a file of mode 0600, created on first use with `size` random bytes.

    Raises BadMessage if others can read the file, or if it has another size.
    """
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # another process created it first
            write_private(path, secrets.token_bytes(size), replace=False)
    if path.stat().st_mode & 0o077:
        raise BadMessage(f"{path} can be read by others; run: chmod 600 {path}")
    data = path.read_bytes()
    if len(data) != size:
        raise BadMessage(f"{path}: expected {size} bytes, got {len(data)}")
    return data
