"""Speeds: how fast providers answer and how long answers are, as this coordinator measures them from what it relays. Pure.

A node's own word about its speed counts only until MEASURED jobs were measured. The time to the first token is that from the
dispatch to the second chunk of a streamed response: the first chunk has the response's head, which a node may send at once. A
response that arrives in one piece tells the time of all its tokens. Each figure is a mean that fades by an eighth per job, so
what a provider did once is soon forgotten. A provider that pays itself for jobs can make its figures look better, for as long as
it goes on paying the fee.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from coordinator.domain.listed_ask import Speed
from tallystick.protocol.types import Address

MEASURED = 3
"""Measurements from which a provider's own word no longer counts."""
MAX_REMEMBERED = 100_000
"""Pairs of provider and model; those measured the longest ago are forgotten first."""
MAX_MODELS = 10_000
MAX_NAME = 256
"""Characters of a model's name. A longer one, or one that no terminal shows, is not measured: a database may refuse it."""
_WINDOW, _OUTPUT_WINDOW = 8, 64
"""Jobs over which the figures of a provider, and the mean output of a model, are averaged."""
_STREAMED_CHUNKS = 4
_STREAMED_PART = 0.2
"""A response counts as streamed if it came in several chunks, over this part of its time at least."""
_READER_PART = 0.25
"""A response is no measure of output speed if its reader took more than this part of its time."""

Key = tuple[Address, str]
"""A provider and a model."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When the parts of one response arrived, in seconds of one clock. `body`: the second chunk, which is the first of the body.

    `reader`: seconds that the reader kept the job waiting.
    """

    sent: float
    body: float
    last: float
    chunks: int
    reader: float = 0.0

    @property
    def whole(self) -> float:
        """Seconds from the dispatch to the last chunk."""
        return max(self.last - self.sent, 0.0)

    @property
    def streamed(self) -> bool:
        """Whether the body came while it was made."""
        return self.chunks >= _STREAMED_CHUNKS and self.last - self.body >= _STREAMED_PART * self.whole


@dataclass(frozen=True, slots=True)
class SpeedRecord:
    """The faded means of one provider and model: milliseconds to the first token, microseconds per output token, and output
    tokens per job. `first_tokens` and `outputs` count the measurements of the first two.
    """

    first_token_ms: float = 0.0
    token_us: float = 0.0
    output_tokens: float = 0.0
    first_tokens: int = 0
    outputs: int = 0

    def after(self, timing: Timing, output_tokens: int) -> SpeedRecord:
        """Returns the record with one more complete response."""
        record = self
        if timing.streamed:
            record = record.with_first_token(1_000 * (timing.body - timing.sent))
            generating = timing.last - timing.body
        else:
            if output_tokens <= 1:
                record = record.with_first_token(1_000 * timing.whole)
            known = self.first_token_ms / 1_000 if self.first_tokens else 0.0
            generating = max(timing.whole - known, _STREAMED_PART * timing.whole)
        if output_tokens <= 1 or timing.reader > _READER_PART * timing.whole:
            return record
        return replace(
            record,
            token_us=_faded(record.token_us, 1e6 * generating / output_tokens, record.outputs),
            output_tokens=_faded(record.output_tokens, output_tokens, record.outputs),
            outputs=record.outputs + 1,
        )

    def with_first_token(self, milliseconds: float) -> SpeedRecord:
        """Returns the record with one more time to the first token."""
        faded = _faded(self.first_token_ms, milliseconds, self.first_tokens)
        return replace(self, first_token_ms=faded, first_tokens=self.first_tokens + 1)

    @property
    def speed(self) -> Speed:
        """The speed, with 0 for what was not measured often enough."""
        first_token = max(round(self.first_token_ms), 1) if self.first_tokens >= MEASURED else 0
        return Speed(first_token, max(round(1e6 / max(self.token_us, 1.0)), 1) if self.outputs >= MEASURED else 0)


def _faded(mean: float, value: float, count: int, window: int = _WINDOW) -> float:
    return mean + (value - mean) / min(count + 1, window)


def _is_plain(model: str) -> bool:
    return len(model) <= MAX_NAME and model.isprintable()


UNMEASURED, UNKNOWN_SPEED = SpeedRecord(), Speed()


def _ignore(_provider: Address, _model: str, _speed: Speed) -> None:
    pass


@dataclass(slots=True)
class Speeds:
    """The records of all providers and models, bounded. `on_change` is called with each speed that changed."""

    on_change: Callable[[Address, str, Speed], None] = _ignore
    _records: OrderedDict[Key, SpeedRecord] = field(default_factory=OrderedDict)
    _outputs: OrderedDict[str, tuple[float, int]] = field(default_factory=OrderedDict)
    """The mean output of each model, and how many jobs it is of."""
    _changed: set[Key] = field(default_factory=set)

    def measured(self, provider: Address, model: str) -> Speed | None:
        """Returns the measured speed, with 0 for what is not known yet; None if nothing is."""
        record = self._records.get((provider, model))
        return None if record is None or record.speed == UNKNOWN_SPEED else record.speed

    def mean_output(self, model: str) -> int | None:
        """Returns the mean output of a model's jobs, in tokens; None if there was none."""
        mean = self._outputs.get(model)
        return None if mean is None else round(mean[0])

    def record(self, provider: Address, model: str, timing: Timing, output_tokens: int) -> None:
        """Records a complete response."""
        if not _is_plain(model):
            return
        self._put((provider, model), self._records.get((provider, model), UNMEASURED).after(timing, output_tokens))
        if output_tokens > 0:
            self._add_output(model, output_tokens, 1)

    def record_late(self, provider: Address, model: str, milliseconds: float) -> None:
        """Records that a provider had no output after this time, when another one had. It can only make it look slower."""
        record = self._records.get((provider, model), UNMEASURED)
        if _is_plain(model) and milliseconds > record.first_token_ms:
            self._put((provider, model), record.with_first_token(milliseconds))

    def restore(self, records: Mapping[Key, SpeedRecord]) -> None:
        """Adds the records that a former process stored."""
        for key, record in records.items():
            self._put(key, record)
            if record.outputs:
                self._add_output(key[1], record.output_tokens, min(record.outputs, _WINDOW))
        self._changed.clear()

    def take_changed(self) -> dict[Key, SpeedRecord]:
        """Returns the records that changed since the last call, or that `mark_unsaved` named."""
        changed, self._changed = self._changed, set()
        return {key: self._records[key] for key in changed if key in self._records}

    def mark_unsaved(self, keys: Iterable[Key]) -> None:
        """Notes that these records could not be stored."""
        self._changed.update(keys)

    def _put(self, key: Key, record: SpeedRecord) -> None:
        former, speed = self._records.get(key, UNMEASURED).speed, record.speed
        self._records[key] = record
        self._records.move_to_end(key)
        self._changed.add(key)
        if speed not in (former, UNKNOWN_SPEED):
            self.on_change(*key, speed)
        if len(self._records) > MAX_REMEMBERED:
            self._changed.discard(self._records.popitem(last=False)[0])

    def _add_output(self, model: str, tokens: float, weight: int) -> None:
        mean, count = self._outputs.get(model, (0.0, 0))
        total = count + weight
        self._outputs[model] = mean + (tokens - mean) * weight / total, min(total, _OUTPUT_WINDOW - 1)
        self._outputs.move_to_end(model)
        if len(self._outputs) > MAX_MODELS:
            self._outputs.popitem(last=False)
