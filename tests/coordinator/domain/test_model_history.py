"""The history of models: a day of samples, of a bounded number of models."""

from __future__ import annotations

from coordinator.domain.model_history import MAX_MODELS, MAX_SAMPLES, SAMPLE_SECONDS, ModelHistory, Sample


def _sample(at: float, price: int = 1) -> Sample:
    return Sample(int(at), price, 2, 3)


def test_a_day_is_kept() -> None:
    """A sample each five minutes; the oldest go."""
    history = ModelHistory()
    for number in range(MAX_SAMPLES + 10):
        tick = number * SAMPLE_SECONDS
        assert history.is_due(tick)
        history.add([("m", 1, _sample(tick, number))], tick)
        assert not history.is_due(tick + SAMPLE_SECONDS - 1)
    assert [sample.output_price for sample in history.of("m")] == list(range(10, MAX_SAMPLES + 10))
    assert history.of("other") == ()


def test_a_model_that_is_gone_is_forgotten_after_a_day() -> None:
    """Its last samples stay for a day, so that its page can still be read."""
    history = ModelHistory()
    history.add([("gone", 1, _sample(0)), ("m", 1, _sample(0))], 0)
    day = SAMPLE_SECONDS * MAX_SAMPLES
    history.add([("m", 1, _sample(day))], day)
    assert history.of("gone")
    history.add([("m", 1, _sample(day + 1))], day + 1)
    assert not history.of("gone")


def test_the_number_of_models_is_bounded() -> None:
    """Those with the most asks have a history, whoever else offers models of one ask."""
    history = ModelHistory()
    history.add([(f"junk {number}", 1, _sample(0)) for number in range(2 * MAX_MODELS)] + [("popular", 9, _sample(0))], 0)
    assert history.of("popular")
    for turn in range(1, 4):
        names = [(f"junk {turn} {number}", 1, _sample(turn)) for number in range(2 * MAX_MODELS)]
        history.add([*names, ("popular", 9, _sample(turn))], turn)
        assert len(history._samples) <= MAX_MODELS
    assert len(history.of("popular")) == 4
