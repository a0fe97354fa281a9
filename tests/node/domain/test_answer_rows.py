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


OWL = "🦉".encode()
WHOLE_CHARACTER = (([report(1, b"a")], b"a"), ([report(4, OWL)], OWL), ([report(5, b"b")], b"b"))


@pytest.mark.parametrize("end_row", [False, True])
@pytest.mark.parametrize(
    ("missing", "truncated", "kept"),
    [(0, True, 3), (0, False, 3), (1, True, 1), (2, True, 1), (2, False, 1), (3, False, 1), (-1, False, 0)],
)
def test_the_row_of_a_part_may_have_the_whole_character(missing: int, truncated: bool, kept: int, end_row: bool) -> None:
    """As with llama.cpp, which leaves out the rows of the other parts: every later row would be one of another position.

    The count alone shows it, so the rows before the first such character are all that is sure.
    """
    end = [([report(2, b"")], b"")] if end_row else []
    rows = rows_of(*WHOLE_CHARACTER, *end)
    committed = rows.commit(3 + end_row + missing, truncated=truncated)
    assert committed.tokens == (4 if kept == 3 and end_row else kept)
    if kept == 1:
        first = [EvidenceRow.of(1, [(1, -0.5), (2, -1.0)])]
        assert committed == (pack_evidence(first), evidence_root(first), 1)


@pytest.mark.parametrize(("end", "kept"), [(b"", 1), (b"</s>", 1), (None, 4), (b"b", 4)])
def test_an_end_that_has_its_row_explains_no_missing_one(end: bytes | None, kept: int) -> None:
    """A single missing row is then that of a part of a character. Without a row of the end, it is the end's."""
    rows = rows_of(*WHOLE_CHARACTER, ([report(2, end)], b"b" if end == b"b" else b""))
    assert rows.commit(5, truncated=False).tokens == kept
    assert rows.commit(4, truncated=False).tokens == 4


def test_a_character_at_the_beginning_leaves_no_sure_rows() -> None:
    """Nor do marks, whose rows may be missing anywhere."""
    assert rows_of(*WHOLE_CHARACTER[1:]).commit(9, truncated=False) == NO_ROWS
    assert rows_of(*WHOLE_CHARACTER, marks=True).commit(9, truncated=False) == NO_ROWS


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
