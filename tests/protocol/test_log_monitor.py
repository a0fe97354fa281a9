"""The monitor of a match log: honest logs pass; a split, a rollback, a lost or changed leaf and a withheld head are evidence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tallystick.protocol import merkle
from tallystick.protocol.eip712 import Domain, Signed, Signer
from tallystick.protocol.errors import BadMessage, BadSignature
from tallystick.protocol.log_evidence import Fraud, LogEvidence, judge
from tallystick.protocol.log_leaves import RestartLeaf
from tallystick.protocol.log_monitor import (
    MAX_ASKED,
    MAX_FOREIGN,
    MAX_PENDING,
    MAX_SPAN,
    MIN_SHARE,
    SETTLE_SECONDS,
    LogMonitor,
    LogQuestion,
)
from tallystick.protocol.match_log import MERGE_SECONDS, Match, pack_head, unpack_head
from tallystick.protocol.merkle import HASH_SIZE, Edge, leaf_hash
from tallystick.protocol.messages import LogHead
from tallystick.protocol.types import Address, JobId
from tests.builders import build_match, build_order, build_terms

DOMAIN = Domain(31_337, Address("0x" + "5f" * 20))
COORDINATOR, PAYER, PROVIDER = (Signer(bytes([number]) * 32) for number in (1, 2, 3))
NOW = 1_700_000_000
LATE = NOW + MERGE_SECONDS


def matched(index: int, epoch: int = 0, at: int = NOW) -> tuple[Match, Signed[Any]]:
    """A match with this index, and its order."""
    terms = build_terms(job=JobId(index.to_bytes(16, "big")))
    order = build_order(PAYER.address, PROVIDER.address, 1, coordinator=COORDINATOR.address, terms_hash=terms.struct_hash())
    signed = PAYER.sign(order, DOMAIN)
    return build_match(signed, terms, index, epoch=epoch, at=at), Signed(signed.message, signed.signature)


@dataclass
class Coordinator:
    """A coordinator's log. A test changes it as a dishonest one would."""

    leaves: list[bytes] = field(default_factory=lambda: [RestartLeaf(NOW).dumps()])
    epoch: int = 0
    signed_at: int = NOW

    def head(self, size: int | None = None, **changes: Any) -> Signed[LogHead]:
        """A signed head of the first `size` leaves."""
        edge = Edge()
        for leaf in self.leaves[:size]:
            edge.append(leaf_hash(leaf))
        values: dict[str, Any] = {
            "coordinator": COORDINATOR.address,
            "size": edge.size,
            "root": edge.root(),
            "signed_at": self.signed_at,
        }
        signed = COORDINATOR.sign(LogHead(**(values | changes)), DOMAIN)
        return Signed(signed.message, signed.signature)

    def answer(self, question: LogQuestion, size: int | None = None) -> dict[str, Any]:
        """The answer to a question, as GET /v1/log/proof gives it."""
        edge, rows = Edge(), list[bytes]()
        size = len(self.leaves) if size is None else size
        for leaf in self.leaves[:size]:
            rows.append(b"".join(edge.append(leaf_hash(leaf))))

        def hashes(ranges: list[merkle.Range]) -> list[str]:
            return [
                merkle.range_hash(span, lambda row, level: rows[row][HASH_SIZE * level : HASH_SIZE * (level + 1)]).hex()
                for span in ranges
            ]

        earlier = [known for known in question.since if known <= size]
        return {
            "head": self.head(size).to_json(),
            "epoch": self.epoch,
            "consistency": {str(known): hashes(merkle.consistency_ranges(known, size)) for known in earlier},
            "inclusion": {
                str(index): {
                    "hash": leaf_hash(self.leaves[index]).hex(),
                    "leaf": self.leaves[index].hex(),
                    "path": hashes(merkle.inclusion_ranges(index, size)),
                }
                for index in question.indexes
                if index < size
            },
            "span": None
            if question.span is None or question.span[1] > size
            else {
                "hashes": b"".join(leaf_hash(leaf) for leaf in self.leaves[slice(*question.span)]).hex(),
                "path": hashes(merkle.span_ranges(question.span, size)),
            },
        }


def monitor(chance: float = 0.5) -> LogMonitor:
    """A monitor that has seen nothing."""
    return LogMonitor(DOMAIN, COORDINATOR.address, lambda: chance)


def ask(watch: LogMonitor, coordinator: Coordinator, now: int, size: int | None = None) -> list[LogEvidence]:
    """Asks once and passes on the answer."""
    question = watch.question(now)
    assert question is not None
    return watch.answer(question, coordinator.answer(question, size), now)


def reread(evidence: LogEvidence) -> LogEvidence:
    """The evidence as it is read from its file."""
    read = LogEvidence.loads(evidence.dumps())
    assert read == evidence
    return read


def test_honest_matches_are_checked_off() -> None:
    """A match is asked for after a few seconds, found under a signed head, and forgotten."""
    watch, coordinator = monitor(), Coordinator()
    for index in (1, 2):
        match, order = matched(index)
        watch.add_match(match, order, NOW)
        watch.add_match(match, order, NOW)
        coordinator.leaves.append(match.leaf)
    assert watch.question(NOW + SETTLE_SECONDS - 1) is None
    assert watch.question(NOW + SETTLE_SECONDS) == LogQuestion((), (1, 2))
    assert ask(watch, coordinator, NOW + SETTLE_SECONDS) == []
    assert (watch.checked, watch.lost, watch.pending) == (2, 0, [])
    assert watch.head is not None
    assert watch.head.message.size == 3
    assert watch.question(LATE) is None
    match, order = matched(3)
    watch.add_match(match, order, NOW)
    coordinator.leaves.append(match.leaf)
    assert watch.question(LATE) == LogQuestion((3,), (3,))
    assert ask(watch, coordinator, LATE) == []


def test_a_match_that_was_not_logged_is_evidence() -> None:
    """A match whose number has another leaf, or none although it was due, is evidence, which names what it rests on."""
    for size in (1, 2):
        watch, coordinator = monitor(), Coordinator(signed_at=LATE)
        match, order = matched(1)
        watch.add_match(match, order, NOW)
        coordinator.leaves.append(matched(9)[0].leaf)
        assert ask(watch, coordinator, LATE - 1, 1) == []
        (evidence,) = ask(watch, coordinator, LATE, size)
        assert evidence.fraud is Fraud.MISSING
        judgement = judge(reread(evidence))
        assert not judgement.proven
        assert "the reporter's word" in judgement.text
        assert watch.pending == []


@pytest.mark.parametrize("jump", [MERGE_SECONDS, 300, 10**6])
def test_a_clock_that_jumped_accuses_nobody(jump: int) -> None:
    """A match that is due by the clock here alone is waited for, as long as the coordinator's own heads are early too."""
    watch, coordinator = monitor(), Coordinator(signed_at=LATE - 1)
    match, order = matched(1)
    watch.add_match(match, order, NOW)
    for now in (NOW + jump, NOW + jump + 1, NOW + jump + MERGE_SECONDS - 1, NOW + SETTLE_SECONDS):
        assert ask(watch, coordinator, now) == []
    coordinator.leaves.append(match.leaf)
    assert ask(watch, coordinator, NOW + jump + 2) == []
    assert (watch.checked, watch.pending) == (1, [])


def test_a_head_that_stays_early_excuses_for_a_minute_only() -> None:
    """A coordinator that signs no later head hides no match for ever: a minute by the clock here is enough to say so."""
    watch, coordinator = monitor(), Coordinator(signed_at=LATE - 1)
    match, order = matched(1)
    watch.add_match(match, order, NOW)
    assert ask(watch, coordinator, LATE) == []
    assert ask(watch, coordinator, LATE + MERGE_SECONDS - 1) == []
    (evidence,) = ask(watch, coordinator, LATE + MERGE_SECONDS)
    assert (evidence.fraud, evidence.received_at) == (Fraud.MISSING, NOW)
    with pytest.raises(BadMessage, match="signed before the match was due"):
        judge(evidence)


def test_a_match_that_is_late_by_both_clocks_is_not_waited_for() -> None:
    """The second minute is only for heads that are early: any other head is evidence at once."""
    watch, coordinator = monitor(), Coordinator(signed_at=LATE)
    match, order = matched(1)
    watch.add_match(match, order, NOW)
    (evidence,) = ask(watch, coordinator, LATE)
    assert not judge(reread(evidence)).proven


def test_two_matches_of_one_number_do_not_hide_each_other() -> None:
    """A coordinator that gives one number to two matches has one of them not in its log."""
    watch, coordinator = monitor(), Coordinator(signed_at=LATE)
    (match, order), (other, other_order) = matched(1), matched(1, at=NOW + 1)
    watch.add_match(match, order, NOW)
    watch.add_match(other, other_order, NOW)
    coordinator.leaves.append(other.leaf)
    (evidence,) = ask(watch, coordinator, LATE)
    assert (evidence.match, watch.checked) == (match, 1)


def test_a_restart_excuses_what_its_leaf_admits() -> None:
    """Matches that were not on disk when the coordinator was killed are lost, as the log itself says; later ones are not."""
    for other in (True, False):
        watch, coordinator = monitor(), Coordinator(signed_at=LATE)
        match, order = matched(4)
        watch.add_match(match, order, NOW)
        coordinator.leaves += [matched(1)[0].leaf, RestartLeaf(NOW + 5).dumps()]
        coordinator.epoch = 2
        if other:
            coordinator.leaves += [matched(3, epoch=2)[0].leaf, matched(4, epoch=2)[0].leaf]
        assert ask(watch, coordinator, LATE) == []
        question = watch.question(LATE)
        assert question is not None
        assert question.indexes == (4, 2)
        assert ask(watch, coordinator, LATE) == []
        assert (watch.lost, watch.pending) == (1, [])


@pytest.mark.parametrize("leaf", [RestartLeaf(NOW - 1).dumps(), matched(2)[0].leaf])
def test_an_invented_restart_excuses_nothing(leaf: bytes) -> None:
    """What is named as a restart must be one, and after the match."""
    watch, coordinator = monitor(), Coordinator(signed_at=LATE, epoch=2)
    match, order = matched(3)
    watch.add_match(match, order, NOW)
    coordinator.leaves += [matched(1)[0].leaf, leaf]
    assert ask(watch, coordinator, LATE) == []
    (evidence,) = ask(watch, coordinator, LATE)
    assert evidence.fraud is Fraud.MISSING


def test_two_roots_for_one_size_are_proven() -> None:
    """A head that another party saw, of the same size with another root, convinces anyone without a network."""
    watch, coordinator, other = monitor(), Coordinator(), Coordinator()
    match, order = matched(1)
    watch.add_match(match, order, NOW)
    coordinator.leaves.append(match.leaf)
    other.leaves.append(matched(2)[0].leaf)
    assert ask(watch, coordinator, LATE) == []
    evidence = watch.add_head(unpack_head(pack_head(other.head()), COORDINATOR.address), LATE)
    assert evidence is not None
    assert evidence.fraud is Fraud.SPLIT
    assert judge(reread(evidence)).proven
    assert watch.add_head(coordinator.head(), LATE) is None


def test_a_log_that_took_leaves_back_is_proven() -> None:
    """A later head with fewer leaves, in an answer or from another party, convinces anyone."""
    watch, coordinator = monitor(), Coordinator()
    coordinator.leaves += [matched(1)[0].leaf, matched(2)[0].leaf]
    watch.add_head(coordinator.head(), NOW)
    assert ask(watch, coordinator, NOW) == []
    evidence = watch.add_head(coordinator.head(2, signed_at=NOW + 9), NOW)
    assert evidence is not None
    assert evidence.fraud is Fraud.OUT_OF_ORDER
    assert judge(reread(evidence)).proven
    watch.add_match(*matched(1), NOW)
    coordinator.signed_at = NOW + 9
    (evidence,) = ask(watch, coordinator, LATE, 2)
    assert evidence.fraud is Fraud.OUT_OF_ORDER


def test_an_older_answer_is_no_answer() -> None:
    """A head from before the newest one that is known proves nothing and changes nothing."""
    watch, coordinator = monitor(), Coordinator()
    coordinator.leaves += [matched(1)[0].leaf]
    watch.add_head(coordinator.head(), NOW)
    assert ask(watch, coordinator, NOW) == []
    watch.add_match(*matched(2), NOW)
    with pytest.raises(BadMessage, match="expected at least 2, got 1"):
        ask(watch, coordinator, LATE, 1)
    assert len(watch.pending) == 1


def test_a_changed_old_leaf_is_found() -> None:
    """A log that was rewritten cannot prove that it begins with the earlier one."""
    watch, coordinator = monitor(), Coordinator()
    match, order = matched(1)
    watch.add_match(match, order, NOW)
    coordinator.leaves.append(match.leaf)
    assert ask(watch, coordinator, LATE) == []
    coordinator.leaves[1] = matched(7)[0].leaf
    coordinator.leaves.append(matched(2)[0].leaf)
    watch.add_match(*matched(2), NOW)
    (evidence,) = ask(watch, coordinator, LATE)
    assert evidence.fraud is Fraud.INCONSISTENT
    judgement = judge(reread(evidence))
    assert not judgement.proven
    assert "Anyone can ask it" in judgement.text
    assert watch.head is not None
    assert watch.head.message.size == 2


def test_a_head_that_the_coordinator_withholds_is_found() -> None:
    """A larger head that another party saw must be continued by the coordinator's own answers before long."""
    watch, coordinator, other = monitor(), Coordinator(), Coordinator()
    other.leaves += [matched(1)[0].leaf, matched(2)[0].leaf]
    assert watch.add_head(other.head(), NOW) is None
    assert ask(watch, coordinator, LATE - 1) == []
    (evidence,) = ask(watch, coordinator, LATE)
    assert evidence.fraud is Fraud.INCONSISTENT
    assert ask_nothing(watch)
    assert watch.add_head(other.head(), NOW) is None


def ask_nothing(watch: LogMonitor) -> bool:
    """Whether nothing is to be asked."""
    return watch.question(LATE) is None


def test_a_foreign_head_of_the_same_log_passes() -> None:
    """Smaller and larger heads of one log are consistent, and are asked about once."""
    watch, coordinator = monitor(), Coordinator()
    coordinator.leaves += [matched(index)[0].leaf for index in range(1, 6)]
    for size in (2, 5):
        assert watch.add_head(coordinator.head(size), NOW) is None
        assert watch.question(NOW) == LogQuestion((size,) if size == 2 else (6, 5), ())
        assert ask(watch, coordinator, NOW) == []
    assert watch.question(NOW) is None


def test_heads_of_others_are_refused_and_bounded() -> None:
    """A head of another coordinator or a forged one is refused; only a few wait for their check."""
    watch, coordinator = monitor(), Coordinator()
    head = coordinator.head()
    with pytest.raises(BadMessage, match="coordinator"):
        watch.add_head(Signed(replace(head.message, coordinator=PAYER.address), head.signature), NOW)
    with pytest.raises(BadSignature):
        watch.add_head(Signed(replace(head.message, size=9), head.signature), NOW)
    for size in range(2, 30):
        coordinator.leaves.append(matched(size)[0].leaf)
        watch.add_head(coordinator.head(), NOW)
    question = watch.question(NOW)
    assert question is not None
    assert len(question.since) == MAX_FOREIGN


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: None,
        lambda answer: {},
        lambda answer: answer | {"head": {}},
        lambda answer: answer | {"epoch": -1},
        lambda answer: answer | {"consistency": []},
        lambda answer: answer | {"inclusion": {"x": {}}},
        lambda answer: answer | {"inclusion": {"1": {"hash": "00", "leaf": None, "path": []}}},
        lambda answer: answer | {"inclusion": {"1": {"hash": "00" * 32, "leaf": "00", "path": []}}},
        lambda answer: answer | {"inclusion": {str(number): {} for number in range(17)}},
        lambda answer: answer | {"consistency": {"1": ["00" * 32] * 65}},
    ],
)
def test_a_malformed_answer_is_no_evidence(change: Any) -> None:
    """Nothing is concluded from an answer that is none, and the match waits on."""
    watch, coordinator = monitor(), Coordinator()
    match, order = matched(1)
    watch.add_match(match, order, NOW)
    coordinator.leaves.append(match.leaf)
    question = watch.question(LATE)
    assert question is not None
    with pytest.raises((BadMessage, BadSignature)):
        watch.answer(question, change(coordinator.answer(question)), LATE)
    assert len(watch.pending) == 1
    assert ask(watch, coordinator, LATE) == []


@pytest.mark.parametrize(("chance", "kept"), [(0.0, False), (1.0, True)])
def test_what_waits_is_bounded_and_replaced_at_random(chance: float, kept: bool) -> None:
    """Beyond MAX_PENDING, a match replaces another one that chance picks, or is skipped; the coordinator cannot foresee which."""
    watch = monitor(chance)
    first, order = matched(1)
    for index in range(1, MAX_PENDING + 2):
        watch.add_match(replace(first, index=index, leaf=b"%d" % index), order, NOW)
    assert (len(watch.pending), watch.skipped) == (MAX_PENDING, 1)
    assert (watch.pending[0].match.index == 1) is kept


def test_evidence_that_shows_nothing_is_refused() -> None:
    """A file whose heads agree, whose match is in the log, or whose parts do not belong together is no evidence."""
    watch, coordinator = monitor(), Coordinator(signed_at=LATE)
    match, order = matched(1)
    watch.add_match(match, order, NOW)
    coordinator.leaves.append(matched(9)[0].leaf)
    (evidence,) = ask(watch, coordinator, LATE)
    honest = Coordinator(signed_at=LATE)
    honest.leaves.append(match.leaf)
    answer = honest.answer(LogQuestion((), (1,)))
    entry = answer["inclusion"]["1"]
    assert evidence.entry is not None
    good = replace(evidence.entry, hash=match.leaf_hash, leaf=match.leaf, path=tuple(map(bytes.fromhex, entry["path"])))
    early = Coordinator()
    for wrong, text in (
        (replace(evidence, heads=(honest.head(),), entry=good), "the match is in the log"),
        (replace(evidence, order=None), "expected a match, its order and a head"),
        (replace(evidence, heads=()), "expected a match, its order and a head"),
        (replace(evidence, heads=(early.head(1),)), "before the match was due"),
        (replace(evidence, order=matched(2)[1]), "match"),
        (replace(evidence, fraud=Fraud.SPLIT), "expected two"),
        (replace(evidence, fraud=Fraud.SPLIT, heads=(honest.head(), honest.head())), ""),
    ):
        if text:
            with pytest.raises(BadMessage, match=text):
                judge(wrong)
    same = replace(evidence, fraud=Fraud.INCONSISTENT, heads=(honest.head(), honest.head()), proof=())
    with pytest.raises(BadMessage, match="both heads are of one log"):
        judge(same)
    with pytest.raises(BadSignature, match="expected heads of"):
        judge(replace(evidence, coordinator=PAYER.address))
    unproven = judge(replace(evidence, entry=None))
    assert (unproven.proven, "did not prove" in unproven.text) == (False, True)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"x" * 70_000])
def test_a_file_that_is_no_evidence_is_refused(data: bytes) -> None:
    """Files that are something else get an error that says so."""
    with pytest.raises(BadMessage):
        LogEvidence.loads(data)


def test_a_packed_head_has_one_form() -> None:
    """A packed head is read as it was, and nothing of another length is."""
    head = Coordinator().head()
    packed = pack_head(head)
    assert (len(packed), unpack_head(packed, COORDINATOR.address)) == (113, head)
    for wrong in (b"", packed[:-1], packed + b"\0"):
        with pytest.raises(BadMessage, match="113 bytes"):
            unpack_head(wrong, COORDINATOR.address)


def many(watch: LogMonitor, coordinator: Coordinator, count: int, *, every: int = 1, missing: int = 0) -> None:
    """Adds `count` matches, of which each has `every` leaves in the log, and number `missing` has another leaf."""
    for number in range(1, count + 1):
        match, order = matched(len(coordinator.leaves))
        watch.add_match(match, order, NOW)
        coordinator.leaves.append(match.leaf if number != missing else matched(5_000)[0].leaf)
        coordinator.leaves += [matched(10_000 + number * every + other)[0].leaf for other in range(every - 1)]


@pytest.mark.parametrize("every", [1, 5, MIN_SHARE])
def test_many_matches_are_checked_with_one_question(every: int) -> None:
    """Leaves in a row are one proof for all matches among them."""
    watch, coordinator = monitor(), Coordinator()
    many(watch, coordinator, 60, every=every)
    question = watch.question(NOW + SETTLE_SECONDS)
    assert question == LogQuestion((), (), (1, 60 * every - every + 2))
    assert dict(question.query) == {"start": "1", "end": str(60 * every - every + 2)}
    assert ask(watch, coordinator, NOW + SETTLE_SECONDS) == []
    assert (watch.checked, watch.pending) == (60, [])


def test_matches_far_apart_are_asked_for_one_by_one() -> None:
    """Where most leaves are of others, a proof for each of a few costs less than all leaves between them."""
    watch, coordinator = monitor(), Coordinator()
    many(watch, coordinator, 20, every=MIN_SHARE + 2)
    question = watch.question(NOW + SETTLE_SECONDS)
    assert question is not None
    assert (question.span, len(question.indexes)) == (None, MAX_ASKED // 2)


def test_one_question_asks_for_a_bounded_number_of_leaves() -> None:
    """What lies further on is asked for next time."""
    watch, coordinator = monitor(), Coordinator()
    watch.add_match(*matched(MAX_SPAN + 1), NOW)
    many(watch, coordinator, 20)
    question = watch.question(NOW + SETTLE_SECONDS)
    assert question == LogQuestion((), (), (1, 21))
    ask(watch, coordinator, NOW + SETTLE_SECONDS)
    assert [pending.match.index for pending in watch.pending] == [MAX_SPAN + 1]


def test_a_match_that_is_not_among_its_neighbours_is_asked_for_alone() -> None:
    """Leaves in a row prove what is there. What is not becomes evidence as ever, once it is due."""
    watch, coordinator = monitor(), Coordinator()
    many(watch, coordinator, 30, missing=7)
    assert ask(watch, coordinator, NOW + SETTLE_SECONDS) == []
    assert (watch.checked, [pending.match.index for pending in watch.pending]) == (29, [7])
    assert watch.question(NOW + SETTLE_SECONDS) == LogQuestion((31,), (7,))
    coordinator.signed_at = LATE
    (evidence,) = ask(watch, coordinator, LATE)
    assert reread(evidence).fraud is Fraud.MISSING


@pytest.mark.parametrize("lie", ["hash", "short", "path", "none"])
def test_a_false_proof_of_leaves_in_a_row_checks_nothing_off(lie: str) -> None:
    """Whatever is wrong with it, or if there is none: each match is then asked for by its number."""
    watch, coordinator = monitor(), Coordinator()
    many(watch, coordinator, 30)
    question = watch.question(NOW + SETTLE_SECONDS)
    assert question is not None
    answer = coordinator.answer(question)
    if lie == "hash":  # a foreign leaf, beside the own ones
        answer["span"]["hashes"] = "00" * HASH_SIZE + answer["span"]["hashes"][2 * HASH_SIZE :]
    elif lie == "short":
        answer["span"]["hashes"] = answer["span"]["hashes"][: -2 * HASH_SIZE]
    elif lie == "path":
        answer["span"]["path"] = []
    else:
        answer["span"] = None
    assert watch.answer(question, answer, NOW + SETTLE_SECONDS) == []
    assert (watch.checked, len(watch.pending)) == (0, 30)
    later = watch.question(NOW + MERGE_SECONDS)
    assert later is not None
    assert (later.span, len(later.indexes)) == (None, MAX_ASKED // 2)


@pytest.mark.parametrize(
    "span",
    [
        7,
        {"hashes": ""},
        {"hashes": "0g", "path": []},
        {"hashes": "00", "path": []},
        {"hashes": "00" * 32 * (MAX_SPAN + 1), "path": []},
    ],
)
def test_a_malformed_span_is_no_answer(span: object) -> None:
    """It names what is wrong, and nothing is concluded from it."""
    watch, coordinator = monitor(), Coordinator()
    many(watch, coordinator, 30)
    question = watch.question(NOW + SETTLE_SECONDS)
    assert question is not None
    with pytest.raises(BadMessage, match=r"proof\.span"):
        watch.answer(question, coordinator.answer(question) | {"span": span}, NOW + SETTLE_SECONDS)
    assert len(watch.pending) == 30
