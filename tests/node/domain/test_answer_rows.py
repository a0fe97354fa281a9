"""Which rows may stand for an answer."""

from __future__ import annotations

import pytest

from node.domain.answer_rows import NO_ROWS, AnswerRows, TokenReport
from tallystick.protocol.token_evidence import EvidenceRow, evidence_root, pack_evidence


def report(token: int, text: bytes | None, *logprobs: float) -> TokenReport:
    """A token with as many best ones."""
    return TokenReport(token, [(token + n, logprob) for n, logprob in enumerate(logprobs or (-0.5, -1.0))], text)


def rows_of(*parts: tuple[list[TokenReport], bytes], marks: bool = False) -> AnswerRows:
    """The rows after these parts."""
    rows = AnswerRows()
    for reports, text in parts:
        rows.add(reports, text, marks=marks)
    return rows


WORDS = (([report(1, b"He")], b"He"), ([report(2, b"llo"), report(3, b"!")], b"llo!"))


@pytest.mark.parametrize(
    ("counted", "truncated", "kept"),
    [(3, True, 3), (3, False, 3), (4, False, 3), (4, True, 0), (5, False, 0), (2, False, 0), (0, False, 0), (None, False, 3)],
)
def test_rows_must_be_as_many_as_the_engine_counted(counted: int | None, truncated: bool, kept: int) -> None:
    """One may be missing at the end of an answer that ended by itself: its end token. A cancelled answer has no count."""
    committed = rows_of(*WORDS).commit(counted, truncated=truncated)
    assert committed.tokens == kept
    rows = [EvidenceRow.of(token, [(token, -0.5), (token + 1, -1.0)]) for token in (1, 2, 3)]
    assert committed == (NO_ROWS if not kept else (pack_evidence(rows), evidence_root(rows), 3))


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        (((([report(1, b"a")]), b"a"), ([report(2, b"\x98\x80")], "😀".encode()), ([report(3, b"b")], b"b")), 1),
        ((([report(1, b"a")], b"a"), ([], b"text without a row"), ([report(3, b"b")], b"b")), 1),
        ((([report(1, b"a"), report(2, b"\x80"), report(3, b"b")], "a😀b".encode()),), 1),
        ((([report(1, b"\x80")], "😀".encode()),), 0),
    ],
)
def test_rows_end_before_the_first_text_without_a_row(parts: tuple[tuple[list[TokenReport], bytes], ...], kept: int) -> None:
    """Half of a character has no row with llama.cpp. The rows before it are still those of the answer's first tokens."""
    assert rows_of(*parts).commit(99, truncated=False).tokens == kept


def test_text_that_an_engine_withholds_is_no_gap() -> None:
    """A stop sequence, an end token or a blank may be in the rows and not in the text."""
    assert (
        rows_of(([report(1, b"a"), report(2, b" STOP")], b"a"), ([report(3, b"</s>")], b"")).commit(3, truncated=False).tokens
        == 3
    )


def test_an_engine_that_does_not_tell_the_texts() -> None:
    """Ids instead of texts are what vLLM names, so only the count is checked."""
    assert rows_of(([report(1, None)], b"a long text")).commit(1, truncated=True).tokens == 1
    assert rows_of(([report(1, None)], b"a long text")).commit(3, truncated=False) == NO_ROWS


@pytest.mark.parametrize(("counted", "kept"), [(3, 3), (4, 3), (5, 0), (None, 0)])
def test_marks_of_reasoning_and_tools_have_no_text(counted: int | None, kept: int) -> None:
    """Parsers take the marks out of the text and may drop their rows, which only the engine's count shows."""
    assert rows_of(*WORDS, marks=True).commit(counted, truncated=False).tokens == kept


@pytest.mark.parametrize("logprob", [0.5, float("nan"), float("inf")])
def test_numbers_that_are_no_log_probabilities_give_no_rows(logprob: float) -> None:
    """An engine's nonsense is not committed to, and fails no job."""
    rows = rows_of(*WORDS, ([report(9, b"x", logprob)], b"x"))
    assert rows.commit(4, truncated=True) == NO_ROWS


def test_an_answer_without_rows_commits_to_nothing() -> None:
    """An engine that ignored the request, and one whose form nobody can read."""
    assert AnswerRows().commit(3, truncated=False) == NO_ROWS
    rows = rows_of(*WORDS)
    rows.give_up()
    rows.add([report(4, b"x")], b"x", marks=False)
    assert rows.commit(3, truncated=False) == NO_ROWS
