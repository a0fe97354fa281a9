from __future__ import annotations

import pytest
from eth_account import Account
from eth_account.hdaccount.mnemonic import Mnemonic
from eth_account.types import Language

from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage
from tallystick.runtime.seed_phrase import WORD_COUNTS, check_phrase, key_from_phrase, looks_like_phrase

TEST = "test test test test test test test test test test test junk"
ABANDON = "abandon " * 11 + "about"


def _address(phrase: str, **options: object) -> str:
    return Signer(key_from_phrase(phrase, **options)).address  # type: ignore[arg-type]


def test_the_accounts_of_well_known_phrases() -> None:
    """The addresses are those that MetaMask, foundry and Ledger Live show for these public test phrases."""
    assert _address(TEST) == "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266"
    assert _address(TEST, index=1) == "0x70997970c51812dc3a010c7d01b50e0d17dc79c8"
    assert _address(TEST, index=9) == "0xa0ee7a142d267c1f36714e4a8f75612f20a79720"
    assert _address(ABANDON) == "0x9858effd232b4033e47d90003d41ec34ecaeda94"
    assert _address(TEST, path="m/44'/60'/0'/0/1") == _address(TEST, index=1)
    assert _address(TEST, path="m/44h/60H/0\u2019/0/1") == _address(TEST, index=1), "other marks of hardened steps"
    assert _address(TEST, path="m/44'/60'/1'/0/0") != _address(TEST, index=1)


def test_a_passphrase_gives_another_account() -> None:
    """BIP-39's passphrase is part of the seed: each gives another account, and none is wrong."""
    assert _address(TEST, passphrase="TREZOR") not in {_address(TEST), _address(TEST, passphrase="trezor")}


@pytest.mark.parametrize("written", [TEST.upper(), f"  {TEST}\n", TEST.replace(" ", "\n"), TEST.replace(" ", "   "), f"\t{TEST}"])
def test_spaces_and_case_do_not_matter(written: str) -> None:
    """A phrase in capitals, in lines or with several spaces is the same phrase."""
    assert looks_like_phrase(written)
    assert _address(written) == _address(TEST)


@pytest.mark.parametrize("language", Mnemonic.list_languages_enum(), ids=lambda language: language.value)
@pytest.mark.parametrize("count", WORD_COUNTS)
def test_every_length_and_language(language: Language, count: int) -> None:
    """Phrases of 12 to 24 words in every language of BIP-39 give the key that eth-account derives."""
    Account.enable_unaudited_hdwallet_features()
    phrase = Mnemonic(language).generate(count)
    assert looks_like_phrase(phrase)
    assert key_from_phrase(phrase) == Account.from_mnemonic(phrase).key


def test_a_wrong_word_is_named_by_its_place() -> None:
    """A misspelt word is named with its place, and no right word is repeated."""
    words = ABANDON.split()
    with pytest.raises(BadMessage, match=r"word 12 \('abuot'\): not in the BIP-39 list of english words") as caught:
        key_from_phrase(" ".join([*words[:11], "abuot"]))
    assert "abandon" not in str(caught.value)
    with pytest.raises(BadMessage, match=r"word 1 \('xx'\), word 2 \('yy'\), word 3 \('zz'\) and 1 more"):
        key_from_phrase(" ".join(["xx", "yy", "zz", "ww", *words[4:]]))


def test_a_wrong_checksum_is_not_a_key() -> None:
    """Valid words in a wrong order, or one valid word for another, do not give the key of another account."""
    for phrase in (TEST.replace("junk", "test"), "about " + "abandon " * 11, ABANDON.replace("about", "above")):
        with pytest.raises(BadMessage, match="its checksum does not match"):
            check_phrase(phrase)


@pytest.mark.parametrize("count", [1, 2, 11, 13, 23, 25])
def test_a_wrong_number_of_words(count: int) -> None:
    """Missing or extra words are told by their number."""
    with pytest.raises(BadMessage, match=f"expected 12, 15, 18, 21 or 24 words, got {count}"):
        check_phrase("test " * count)


@pytest.mark.parametrize("path", ["", "m", "44'/60'", "m/x", "m/44'/60'/0'/0/0/", "m/4294967296", "m/" + "/".join("0" * 11)])
def test_a_malformed_path_is_refused(path: str) -> None:
    """A path that is none is refused with an example; an empty one is the default."""
    if not path:
        assert _address(TEST, path=path) == _address(TEST)
        return
    with pytest.raises(BadMessage, match="--derivation-path"):
        key_from_phrase(TEST, path=path)


@pytest.mark.parametrize("index", [-1, 1 << 31])
def test_an_impossible_index(index: int) -> None:
    """The number of an account is one that the path can have."""
    with pytest.raises(BadMessage, match="--index: expected 0 to 2147483647"):
        key_from_phrase(TEST, index=index)


@pytest.mark.parametrize("text", ["", "0x12", "ab" * 32, "word", "one 2", '{"version": 3}'])
def test_other_texts_are_no_phrase(text: str) -> None:
    """Hex digits, single words and JSON are not taken for a phrase."""
    assert not looks_like_phrase(text)
