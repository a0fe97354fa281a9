"""Pages of models: what is read of all asks, and how often."""

from __future__ import annotations

from coordinator.domain.ask_book import AskBook
from coordinator.domain.ask_pages import ModelEntries, asks_page, models_page, rating_entry
from coordinator.domain.search import perfect_score
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Spec
from tests.coordinator.harness import MODEL, make_ask, person


def test_the_entry_of_a_model_with_many_asks_is_used_again() -> None:
    """The more asks a model has, the longer its entry lives: reading all asks at each request would take all of the time."""
    book, entries, waiting = AskBook(), ModelEntries(), 0
    for number in range(10):
        key = person(f"provider {number}")
        book.replace(key.address, [make_ask(key)], Capacity(1, 1))

    def live(tick: float) -> tuple[int, int]:
        (entry,), following = models_page(book, entries, lambda _model: waiting, "", 10, score=perfect_score, tick=tick)
        assert following is None
        return entry["live"], entry["waiting"]

    assert live(5.0) == (10, 0)
    book.set_capacity(person("provider 0").address, Capacity(0, 1))
    waiting = 3
    assert live(5.0009) == (10, 3), "the jobs that wait are counted at each request"
    assert live(5.0011) == (9, 3)
    book.drop(person("provider 1").address)
    assert live(5.003) == (8, 3)


def test_entries_are_bounded() -> None:
    """A stranger who sells thousands of models leaves no more entries than some; models that are gone are not listed."""
    book, entries, key = AskBook(), ModelEntries(), person("stranger")
    asks = [make_ask(key, model=f"model {number}") for number in range(2)]
    book.replace(key.address, asks, Capacity(1, 1))
    for number in range(2_000):
        entries.entry(f"model {number}", book.of_model("model 0"), perfect_score, 0.0)
    assert len(entries._known) == 1_000
    book.replace(key.address, asks[:1], Capacity(1, 1))
    page, _ = models_page(book, entries, lambda _model: 0, "", 10, score=perfect_score, tick=0.0)
    assert [entry["id"] for entry in page] == ["model 0"]
    assert MODEL not in entries._known


def test_ratings_are_apart() -> None:
    """Integrity with its audits, availability and speed are told each by itself, of an ask, of a provider, and of a model."""
    book, ann, bob = AskBook(), person("ann"), person("bob")
    standings = {ann.address: (500, 12), bob.address: (17, 0)}
    book.standing = lambda ask: standings[ask.provider]
    for key in (ann, bob):
        book.replace(key.address, [make_ask(key, spec=Spec(precision="FP8"))], Capacity(1, 1, 30, 400))
    page, _ = asks_page(book, MODEL, "", 10, lambda provider: 0.93 if provider == ann.address else 0.5)
    ratings = {entry["ask"]["message"]["provider"]: entry for entry in page}
    expected = {"integrity": 50.0, "audits": 12, "availability": 93}
    assert expected.items() <= ratings[ann.address].items()
    assert (ratings[bob.address]["integrity"], ratings[bob.address]["audits"]) == (1.7, 0)
    rating = rating_entry(book.of_provider(ann.address)[0])
    members = {"precision": "fp8", "integrity": 50.0, "audits": 12, "tokensPerSecond": 30, "firstTokenMs": 400}
    assert members.items() <= rating.items()
    (model,), _ = models_page(book, ModelEntries(), lambda _model: 0, "", 10, score=lambda _provider: 0.5, tick=0.0)
    assert (model["integrity"], model["audits"], model["availability"]) == (50.0, 12, 50)
