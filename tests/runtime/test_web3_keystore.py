"""Keystores of other wallets: opened as the cipher that they name, or refused by its name; never opened to another key."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

import pytest
from Crypto.Protocol import KDF
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from eth_account import Account
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.codecs import keccak
from tallystick.runtime import web3_keystore
from tallystick.runtime.web3_keystore import KeystoreError, WrongPassword, decrypt_keystore, encrypt_keystore

SECRET = keccak(b"a secret")
IV, SALT = bytes(range(16)), b"\7" * 32


def keystore(cipher: str, *, padded: bool = False, password: str = "pass", **changes: Any) -> dict[str, Any]:
    """A keystore whose ciphertext is genuine for its cipher, made here independently of the code under test."""
    derived = hashlib.pbkdf2_hmac("sha256", password.encode(), SALT, 2, 32)
    mode: Any = modes.CBC(IV) if "cbc" in cipher else modes.CTR(IV)
    encryptor = Cipher(algorithms.AES(derived[:16]), mode).encryptor()
    ciphertext = encryptor.update(SECRET + (b"\x10" * 16 if padded else b"")) + encryptor.finalize()
    crypto = {
        "cipher": cipher,
        "cipherparams": {"iv": IV.hex()},
        "ciphertext": ciphertext.hex(),
        "kdf": "pbkdf2",
        "kdfparams": {"c": 2, "dklen": 32, "prf": "hmac-sha256", "salt": SALT.hex()},
        "mac": keccak(derived[16:] + ciphertext).hex(),
    }
    return {"version": 3, "id": "0", "crypto": crypto} | changes


def changed(store: dict[str, Any], **crypto: Any) -> dict[str, Any]:
    """The keystore with other members of `crypto`."""
    return store | {"crypto": store["crypto"] | crypto}


CTR = keystore("aes-128-ctr")
WIKIPEDIA: list[tuple[dict[str, Any], str, str]] = [
    # The two test vectors of the Web3 Secret Storage definition.
    (
        {
            "crypto": {
                "cipher": "aes-128-ctr",
                "cipherparams": {"iv": "6087dab2f9fdbbfaddc31a909735c1e6"},
                "ciphertext": "5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46",
                "kdf": "pbkdf2",
                "kdfparams": {
                    "c": 262144,
                    "dklen": 32,
                    "prf": "hmac-sha256",
                    "salt": "ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd",
                },
                "mac": "517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2",
            },
            "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
            "version": 3,
        },
        "testpassword",
        "7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d",
    ),
    (
        {
            "crypto": {
                "cipher": "aes-128-ctr",
                "cipherparams": {"iv": "83dbcc02d8ccb40e466191a123791e0e"},
                "ciphertext": "d172bf743a674da9cdad04534d56926ef8358534d458fffccd4e6ad2fbde479c",
                "kdf": "scrypt",
                "kdfparams": {
                    "dklen": 32,
                    "n": 262144,
                    "p": 8,
                    "r": 1,
                    "salt": "ab0c7876052600dd703518d6fc3fe8984592145b591fc8fb5c6d43190334ba19",
                },
                "mac": "2103ac29920d71da29f15d75b4a16dbe95cfd7ff8faea1056c33131d846e3097",
            },
            "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
            "version": 3,
        },
        "testpassword",
        "7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d",
    ),
]


@pytest.mark.parametrize(("store", "password", "secret"), WIKIPEDIA, ids=["pbkdf2", "scrypt"])
def test_the_vectors_of_the_definition(store: dict[str, Any], password: str, secret: str) -> None:
    """The test vectors of the format's definition open, and a wrong password is called one."""
    assert decrypt_keystore(store, password).hex() == secret
    with pytest.raises(WrongPassword, match="the password does not open it"):
        decrypt_keystore(store, password + "x")


@pytest.mark.parametrize("padded", [False, True], ids=["32 bytes", "48 bytes"])
@pytest.mark.parametrize("name", ["aes-128-cbc", "AES-128-CBC"])
@pytest.mark.parametrize("address", [{}, {"address": "ab" * 20}, {"address": ""}])
def test_a_genuine_cbc_keystore(name: str, address: dict[str, str], *, padded: bool) -> None:
    """A keystore with aes-128-cbc opens as CBC, padded and not, with and without an address."""
    store = changed(keystore("aes-128-cbc", padded=padded), cipher=name) | address
    assert decrypt_keystore(store, "pass") == SECRET
    with pytest.raises(WrongPassword):
        decrypt_keystore(store, "Pass")


@pytest.mark.parametrize(
    "cipher", ["aes-256-ctr", "aes-128-gcm", "aes-128-cfb", "aes-192-cbc", "chacha20", "AES", "aes-128", "", None, 5, [], {}]
)
def test_any_other_cipher_is_refused_by_name(cipher: object) -> None:
    """A keystore with a cipher that is not supported is refused with the cipher's name before any key is derived."""
    with pytest.raises(KeystoreError, match=r"crypto\.cipher: expected aes-128-ctr or aes-128-cbc, got") as caught:
        decrypt_keystore(changed(CTR, cipher=cipher, kdfparams={}), "pass")
    assert ("nothing" if cipher is None else repr(cipher)) in str(caught.value)


def test_a_cbc_keystore_of_another_length_or_padding() -> None:
    """Ciphertext that cannot be a key in CBC is refused, even if its checksum matches."""
    derived = hashlib.pbkdf2_hmac("sha256", b"pass", SALT, 2, 32)
    padding = b"\x0f" * 16
    encryptor = Cipher(algorithms.AES(derived[:16]), modes.CBC(IV)).encryptor()
    for plain, words in (
        (SECRET + padding, "padding"),
        (SECRET[:16], "32 or 48 bytes"),
        (SECRET + padding * 2, "32 or 48 bytes"),
    ):
        encryptor = Cipher(algorithms.AES(derived[:16]), modes.CBC(IV)).encryptor()
        ciphertext = encryptor.update(plain) + encryptor.finalize()
        store = changed(keystore("aes-128-cbc"), ciphertext=ciphertext.hex(), mac=keccak(derived[16:] + ciphertext).hex())
        with pytest.raises(KeystoreError, match=words):
            decrypt_keystore(store, "pass")
    short = changed(CTR, ciphertext="00", mac=keccak(derived[16:] + b"\0").hex())
    with pytest.raises(KeystoreError, match="a key of 32 bytes, got 1"):
        decrypt_keystore(short, "pass")


@pytest.mark.parametrize(
    "change",
    [
        {"version": "3"},
        {"address": "0x12", "x-ethers": {"client": "ethers.js", "mnemonicCiphertext": "00"}},
        {"address": None},
    ],
    ids=["version as text", "ethers", "privacy"],
)
def test_members_of_other_wallets(change: dict[str, Any]) -> None:
    """A version as text, further members and a missing address do not matter."""
    assert decrypt_keystore(CTR | change, "pass") == SECRET


def test_names_in_upper_case_and_prefixed_hex() -> None:
    """Names are read in any case, and hex with or without its prefix."""
    crypto = {name.upper(): value for name, value in CTR["crypto"].items()} | {"MAC": "0x" + CTR["crypto"]["mac"]}
    assert decrypt_keystore({"Version": 3, "Crypto": crypto}, "pass") == SECRET


@pytest.mark.parametrize("version", [1, "1", 4, None, True, 3.5, "three", []])
def test_other_versions_are_refused(version: object) -> None:
    """Another version of the format, such as that of validator keys, is refused by name."""
    with pytest.raises(KeystoreError, match="version: expected 3"):
        decrypt_keystore(CTR | {"version": version}, "pass")


EXTREME: list[tuple[str, dict[str, Any], str]] = [
    ("scrypt", {"n": 1 << 30, "r": 8, "p": 1}, "too long|MiB"),
    ("scrypt", {"n": 1 << 20, "r": 1 << 20, "p": 1}, "MiB"),
    ("scrypt", {"n": 2, "r": 1, "p": 1 << 28}, "MiB"),
    ("scrypt", {"n": 1 << 20, "r": 8, "p": 64}, "too long"),
    ("scrypt", {"n": 1 << 40, "r": 8, "p": 1}, r"kdfparams\.n: expected a whole number"),
    ("scrypt", {"n": 1_000, "r": 8, "p": 1}, "power of two"),
    ("scrypt", {"n": 0, "r": 8, "p": 1}, r"kdfparams\.n"),
    ("scrypt", {"n": 1, "r": 8, "p": 1}, "power of two"),
    ("scrypt", {"n": 2, "r": 0, "p": 1}, r"kdfparams\.r"),
    ("scrypt", {"n": 2, "r": 8, "p": -1}, r"kdfparams\.p"),
    ("scrypt", {"n": "2", "r": 8, "p": 1}, r"kdfparams\.n"),
    ("scrypt", {"n": 2, "r": 8, "p": 1, "dklen": 16}, r"kdfparams\.dklen"),
    ("scrypt", {"n": 2, "r": 8, "p": 1, "dklen": 1 << 40}, r"kdfparams\.dklen"),
    ("pbkdf2", {"c": 10**12}, r"kdfparams\.c"),
    ("pbkdf2", {"c": 0}, r"kdfparams\.c"),
    ("pbkdf2", {"c": True}, r"kdfparams\.c"),
    ("pbkdf2", {"c": 2, "prf": "hmac-sha512"}, r"prf: expected hmac-sha256, got 'hmac-sha512'"),
    ("argon2id", {}, "kdf: expected scrypt or pbkdf2, got 'argon2id'"),
    ("scrypt", {"n": 2, "r": 8, "p": 1, "salt": "zz"}, "salt: expected bytes in hex"),
    ("scrypt", {"n": 2, "r": 8, "p": 1, "salt": "00" * 2_000}, "salt: expected bytes in hex"),
]


@pytest.mark.parametrize(("kdf", "parameters", "words"), EXTREME, ids=lambda value: str(value)[:30])
def test_the_cost_of_opening_is_bounded(kdf: str, parameters: dict[str, Any], words: str) -> None:
    """Parameters that would take the machine's memory or hours are refused by name before anything is derived."""
    given_parameters = {"dklen": 32, "salt": SALT.hex(), "prf": "hmac-sha256"} | parameters
    with pytest.raises(KeystoreError, match=words):
        decrypt_keystore(changed(CTR, kdf=kdf, kdfparams=given_parameters), "pass")


def test_costly_but_usual_parameters_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard costs of geth, and twice the memory of them twice over, are within the limits."""
    asked: list[tuple[int, ...]] = []

    def scrypt(_password: bytes, _salt: bytes, length: int, *, n: int, r: int, p: int) -> bytes:
        asked.append((length, n, r, p))
        return bytes(length)

    monkeypatch.setattr(web3_keystore, "_scrypt", scrypt)
    for n, r, p in ((1 << 18, 8, 1), (1 << 20, 8, 1), (1 << 18, 1, 8), (8_192, 8, 1), (1 << 12, 8, 6)):
        parameters = {"n": n, "r": r, "p": p, "dklen": 64, "salt": SALT.hex()}
        with pytest.raises(WrongPassword):
            decrypt_keystore(changed(CTR, kdf="scrypt", kdfparams=parameters), "pass")
        assert asked[-1] == (64, n, r, p)


@given(st.text(max_size=40), st.sampled_from(["scrypt", "pbkdf2"]))
def test_it_opens_what_eth_account_writes(password: str, kdf: Any) -> None:
    """What eth-account encrypts opens to the same key."""
    store = Account.encrypt(SECRET, password, kdf=kdf, iterations=2)
    assert decrypt_keystore(store, password) == SECRET


@given(st.text(max_size=40), st.binary(min_size=32, max_size=32), st.sampled_from([2, 1 << 10]))
def test_eth_account_opens_what_it_writes(password: str, seed: bytes, cost: int) -> None:
    """Other wallets open its keystores to the same key, and see the key's address before that."""
    account = Account.from_key(keccak(seed))
    store = encrypt_keystore(bytes(account.key), password, account.address, cost=cost)
    assert bytes(Account.decrypt(store, password)) == decrypt_keystore(store, password) == bytes(account.key)
    assert account.address == f"0x{store['address']}"
    assert (store["version"], store["crypto"]["kdfparams"]["n"], uuid.UUID(store["id"]).version) == (3, cost, 4)


def test_no_two_keystores_share_their_random_bytes() -> None:
    """Salt, start of the counter and id are new in each keystore: with the same ones, two files would show equal passwords."""
    first, second = (encrypt_keystore(SECRET, "pass", "0x00", cost=2) for _ in range(2))
    for members in zip(_random_members(first), _random_members(second), strict=True):
        assert members[0] != members[1]


def _random_members(store: dict[str, Any]) -> tuple[str, str, str, str]:
    crypto = store["crypto"]
    return crypto["kdfparams"]["salt"], crypto["cipherparams"]["iv"], crypto["ciphertext"], store["id"]


@pytest.mark.parametrize(
    "store", [None, [], "text", {}, {"version": 3}, {"version": 3, "crypto": 5}, {"version": 3, "crypto": []}]
)
def test_other_json_is_refused(store: object) -> None:
    """JSON that is no keystore is refused."""
    with pytest.raises(KeystoreError):
        decrypt_keystore(store, "pass")


@pytest.mark.parametrize(
    ("n", "r", "p"), [(2, 1, 1), (1 << 15, 1, 2), (1 << 16, 1, 1), (1 << 17, 1, 3), (2, 5_000, 1), (64, 8, 7)]
)
def test_both_implementations_of_scrypt_agree(n: int, r: int, p: int) -> None:
    """What hashlib computes, and what it leaves to pycryptodome, is the same function, at the boundary too (RFC 7914)."""
    derive: Any = KDF.scrypt  # its type stubs do not know that it takes bytes
    assert web3_keystore._scrypt(b"pass", SALT, 64, n=n, r=r, p=p) == derive(b"pass", SALT, 64, n, r, p)
