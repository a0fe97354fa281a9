"""Secret keys from a seed phrase, as MetaMask and hardware wallets derive them (BIP-39, BIP-32, BIP-44)."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from tallystick.protocol.errors import BadMessage

if TYPE_CHECKING:
    from eth_account.hdaccount.mnemonic import Mnemonic

WORD_COUNTS = (12, 15, 18, 21, 24)
DEFAULT_PATH = "m/44'/60'/0'/0/{index}"
"""Where MetaMask, geth's clef, foundry and Trezor put the account number `index`. Ledger Live has m/44'/60'/{index}'/0/0."""
MAX_INDEX = (1 << 31) - 1
_PATH = re.compile(r"m(?:/\d{1,10}['hH]?){1,10}", re.ASCII)


def key_from_phrase(phrase: str, *, index: int = 0, path: str | None = None, passphrase: str = "") -> bytes:
    """The secret key of account `index` of a phrase, or of the derivation path. `passphrase` is BIP-39's optional 25th word.

    Raises BadMessage: a wrong word is named by its place, and no other word is repeated.
    """
    from eth_account.hdaccount import seed_from_mnemonic  # noqa: PLC0415 - slow to import
    from eth_account.hdaccount.deterministic import HDPath  # noqa: PLC0415 - slow to import
    from eth_utils.exceptions import ValidationError  # noqa: PLC0415 - slow to import

    if not 0 <= index <= MAX_INDEX:
        raise BadMessage(f"--index: expected 0 to {MAX_INDEX}, got {index}")
    derivation = (path or DEFAULT_PATH.format(index=index)).strip().replace("\u2019", "'")
    if not _PATH.fullmatch(derivation):
        raise BadMessage(f"--derivation-path: expected a path such as {DEFAULT_PATH.format(index=0)}, got {derivation[:60]!r}")
    checked = check_phrase(phrase)
    try:
        return bytes(HDPath(derivation.replace("h", "'").replace("H", "'")).derive(seed_from_mnemonic(checked, passphrase)))
    except (ValidationError, ValueError) as error:
        raise BadMessage(f"--derivation-path: {derivation}: {error}") from None


def looks_like_phrase(text: str) -> bool:
    """Whether a text is meant as a seed phrase: several words of letters."""
    words = text.split()
    return len(words) > 1 and all(word.isalpha() for word in unicodedata.normalize("NFC", text).split())


def check_phrase(phrase: str) -> str:
    """The phrase in its normal form, after a check of its words and its checksum. Raises BadMessage."""
    from eth_account.hdaccount import mnemonic  # noqa: PLC0415 - slow to import

    words = unicodedata.normalize("NFKD", phrase).lower().split()
    if len(words) not in WORD_COUNTS:
        counts = ", ".join(map(str, WORD_COUNTS[:-1]))
        raise BadMessage(f"seed phrase: expected {counts} or {WORD_COUNTS[-1]} words, got {len(words)}")
    languages = [mnemonic.Mnemonic(language) for language in mnemonic.Mnemonic.list_languages_enum()]
    fitting = [language for language in languages if not _unknown(language, words)]
    if not fitting:
        language = min(languages, key=lambda candidate: (len(_unknown(candidate, words)), candidate.language != "english"))
        places = _unknown(language, words)
        named = ", ".join(f"word {place + 1} ({words[place][:20]!r})" for place in places[:3])
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        raise BadMessage(f"seed phrase: {named}{more}: not in the BIP-39 list of {language.language} words")
    text = " ".join(words)
    if not any(language.is_mnemonic_valid(text) for language in fitting):
        raise BadMessage(
            "seed phrase: its checksum does not match: one of its words is another one, or two are in the wrong order"
        )
    return text


def _unknown(language: Mnemonic, words: list[str]) -> list[int]:
    """The places of the words that are not in a language's list."""
    known = {unicodedata.normalize("NFKD", word) for word in language.wordlist}
    return [place for place, word in enumerate(words) if word not in known]
