from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

import node
from node.domain.dynamic_pricing import PriceRule
from node.domain.logprob_request import EvidenceSupport, TokenIds
from node.engines.capabilities import Capabilities
from node.service.config import EngineConfig, ModelConfig, NodeConfig, load_config, merge_specs
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.features import BATCH_ONLY
from tallystick.protocol.messages import Spec
from tallystick.protocol.pricing import Prices
from tallystick.protocol.routes import ALWAYS, SCORES, sold_routes
from tallystick.protocol.types import Amount

HERE = Path(node.__file__).parent
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def test_the_example_contains_the_defaults() -> None:
    """The full example loads and equals the defaults, except for its example values."""
    loaded, plain = load_config(HERE / "example.toml", environment={}), NodeConfig()
    for name in (
        "admission",
        "credit",
        "deadlines",
        "claims",
        "link",
        "coordinator",
        "coordinator_address",
        "rpc",
        "metrics_port",
    ):
        assert getattr(loaded, name) == getattr(plain, name), name
    for name in (
        "sealing_suite",
        "ask_validity",
        "engine_check_interval",
        "receipt_resend_interval",
        "job_keep_seconds",
        "shutdown_grace",
        "metrics_host",
        "log_json",
    ):
        assert getattr(loaded, name) == getattr(plain, name), name
    (engine,) = loaded.engines
    (model,) = engine.models
    assert model.prices == Prices(50_000, 20_000, 150_000)
    assert (model.name, model.sold_as) == ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct")
    offer = engine.offer(model, None, Spec(engine="vllm", engine_version="0.11.2"), NOON, 0.0)
    assert (offer.spec.engine, offer.spec.precision, offer.spec.region) == ("vllm", "bf16", "eu-west")
    assert (offer.context_tokens, offer.max_output_tokens) == (131_072, 8_192)
    night = engine.offer(model, None, Spec(), datetime(2026, 11, 20, 23, tzinfo=ZoneInfo("Europe/Berlin")), 0.0)
    assert night.prices == Prices(30_000, 12_000, 90_000)
    assert engine.offer(model, None, Spec(), NOON, 0.9).prices == Prices(75_000, 30_000, 225_000)


def test_the_minimal_example_is_enough() -> None:
    """A coordinator, a deployment and an engine's URL make a config."""
    loaded = load_config(HERE / "minimal.toml", environment={})
    assert loaded.engines == (EngineConfig(url="http://127.0.0.1:8000/v1"),)
    assert loaded.engines[0].label == "127.0.0.1:8000"


def test_the_environment_and_flags_win() -> None:
    """Simple settings can come from the environment, and flags win over both."""
    environment = {"TALLY_NODE_COORDINATOR": "https://a.example", "TALLY_NODE_GRACE": "5"}
    loaded = load_config(HERE / "minimal.toml", {"shutdown_grace": 7.0}, environment)
    assert (loaded.coordinator, loaded.shutdown_grace) == ("https://a.example", 7.0)


def test_prices_have_defaults() -> None:
    """A model without prices has the defaults; cached input costs as much as input by default."""
    assert ModelConfig(name="m").prices == Prices(100_000, 100_000, 400_000)
    assert ModelConfig(name="m", input_price=Amount(7)).prices == Prices(7, 7, 400_000)
    engine = EngineConfig(url="http://e", input_price=Amount(1), output_price=Amount(0))
    assert engine.model_defaults("m").prices == Prices(1, 1, 0)


def test_limits_default_to_the_engines() -> None:
    """The context length is the configured one, else the engine's, else a default; output never exceeds it."""
    engine = EngineConfig(url="http://e:1/v1")
    offer = engine.offer(ModelConfig(name="m"), 2_048, Spec(), NOON, 0.0)
    assert (offer.context_tokens, offer.max_output_tokens, offer.engine) == (2_048, 2_048, "e:1")
    offer = engine.offer(ModelConfig(name="m", context_tokens=100_000), 2_048, Spec(), NOON, 0.0)
    assert (offer.context_tokens, offer.max_output_tokens) == (100_000, 4_096)
    assert engine.offer(ModelConfig(name="m"), None, Spec(), NOON, 0.0).context_tokens == 8_192


SUPPORT = EvidenceSupport(TokenIds.MEMBER, None)


@pytest.mark.parametrize(
    ("streams", "setting", "asked"),
    [
        ("usage", None, True),
        ("unknown", None, True),
        ("no", None, True),
        ("yes", None, False),
        ("yes", True, True),
        ("usage", False, False),
    ],
)
def test_the_probe_fills_in_what_the_settings_leave_open(streams: str, setting: bool | None, asked: bool) -> None:
    """Whether streams are asked for usage, and the member for the output limit, follow the probe unless they are set."""
    found = Capabilities(True, True, streams, ("tools",), "max_completion_tokens")
    engine = EngineConfig(url="http://e", supports_stream_usage=setting)
    offer = engine.offer(ModelConfig(name="m"), None, Spec(), NOON, 0.0, capabilities=found)
    assert (offer.supports_stream_usage, offer.output_limit_field, offer.spec.features) == (
        asked,
        "max_completion_tokens",
        ("tools", "-evidence"),
    )
    set_limit = replace(engine, output_limit_field="max_tokens")
    assert set_limit.offer(ModelConfig(name="m"), None, Spec(), NOON, 0.0, capabilities=found).output_limit_field == "max_tokens"


@pytest.mark.parametrize(
    ("found", "setting", "declared", "stated"),
    [
        (SUPPORT, True, (), "evidence"),
        (SUPPORT, False, (), "-evidence"),
        (None, True, (), "-evidence"),
        (None, True, ("evidence",), "-evidence"),
        (SUPPORT, True, ("-evidence",), "evidence"),
    ],
)
def test_an_ask_says_whether_the_node_commits_to_evidence(
    found: EvidenceSupport | None, setting: bool, declared: tuple[str, ...], stated: str
) -> None:
    """The probe and the setting decide, and not what the config declares; the engine is asked only if the ask says so."""
    engine = EngineConfig(url="http://e", evidence=setting, spec=Spec(features=declared))
    offer = engine.offer(
        ModelConfig(name="m"), None, Spec(), NOON, 0.0, capabilities=Capabilities(True, False, "no", evidence=found)
    )
    features = (stated, "/v1/evidence") if stated == "evidence" else (stated,)
    assert (offer.spec.features, offer.evidence) == (features, SUPPORT if stated == "evidence" else None)


def test_a_model_without_generated_text_says_nothing_of_evidence() -> None:
    """A model of embeddings has no tokens of which evidence could be."""
    found = Capabilities(False, False, "no", ("embeddings",))
    offer = EngineConfig(url="http://e").offer(ModelConfig(name="m"), None, Spec(), NOON, 0.0, capabilities=found)
    assert offer.spec.features == ("embeddings",)


def test_features_and_their_contraries() -> None:
    """A later spec's feature replaces its contrary; others add up."""
    merged = merge_specs(Spec(features=("a", "-b", "c")), Spec(features=("-a", "b")))
    assert merged.features == ("c", "-a", "b")


def test_keys_stay_secret() -> None:
    """An engine's key comes from the config or from a set variable, and appears in no representation."""
    engine = EngineConfig(url="https://user:pw@api.example/v1", api_key="s3cret")
    assert engine.settings({}).api_key == "s3cret"
    assert "s3cret" not in repr(engine)
    assert engine.label == "api.example"
    named = EngineConfig(url="http://e", api_key_env="KEY")
    assert named.settings({"KEY": "k"}).api_key == "k"
    with pytest.raises(BadMessage, match="KEY"):
        named.settings({})


@pytest.mark.parametrize(
    "settings",
    [
        {"coordinator": "ftp://x"},
        {"sealing_suite": "rot13"},
        {"ask_validity": 1},
        {"watts": -1},
        {"gpus": -1},
        {"job_keep_seconds": 86_399},
        {"deadlines": {"total": 0.0}},
        {"credit": {"percent_of_paid": 101}},
        {"credit": {"percent_of_paid": -1}},
        {"link": {"heartbeat_seconds": -1.0}},
        {"engines": [{"url": "file:///etc/passwd"}]},
        {"engines": [{"url": "http://e", "slots": 0}]},
        {"engines": [{"url": "http://e", "queue_depth": -1}]},
        {"engines": [{"url": "http://e", "queue_depth": 1_025}]},
        {"engines": [{"url": "http://e", "output_limit_field": "x"}]},
        {"engines": [{"url": "http://e"}, {"url": "http://e/v1"}]},
        {"engines": [{"url": "http://e", "models": [{"name": ""}]}]},
        {"engines": [{"url": "http://e", "models": [{"name": "m", "price": "1"}]}]},
        {"engines": [{"url": "http://e", "models": [{"name": "m", "input_price": 0.1}]}]},
        {"engines": [{"slots": 1}]},
        {"unheard_of": 1},
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    """A wrong setting is named before anything starts."""
    with pytest.raises(BadMessage):
        load_config(None, settings, {})


def test_no_order_expires_under_the_longest_job() -> None:
    """An order must be claimable for the longest job and its settlement. Settings may require more, never less."""
    plain = NodeConfig()
    phases = [getattr(plain.deadlines, name, 0.0) for name in ("total", "reader", "first_credit")]
    longest = sum(phases) + plain.claims.check_interval + plain.claims.retry_after + 300
    assert longest > 900 + 15 + 120
    long = load_config(None, {"deadlines": {"total": 3_600.0}}, {})
    assert long.claim_margin == longest + 2_700
    assert long.credit_limits == replace(long.credit, claim_margin=long.claim_margin)
    assert long.admission_rules.claim_window == long.claim_margin + 1
    careful = load_config(None, {"credit": {"claim_margin": 9_000}, "admission": {"claim_window": 10_000}}, {})
    assert (careful.credit_limits.claim_margin, careful.admission_rules.claim_window) == (9_000, 10_000)
    later = load_config(None, {"claims": {"check_interval": 15.5, "retry_after": 4_000.0}}, {})
    assert later.claim_margin == longest + 3_880 + 1, "rounded up"


def test_a_skipped_coordinator_must_be_configured() -> None:
    """A URL that is not a coordinator's is refused, since the node would wait for ever."""
    for url in ("http://127.0.0.1:8420", "ws://127.0.0.1:8420/", "http://b.example"):
        load_config(None, {"coordinators": ["http://b.example"], "skip_recovery": [url]}, {})
    with pytest.raises(BadMessage, match="skip_recovery"):
        load_config(None, {"skip_recovery": ["http://b.example"]}, {})


def test_specs_add_up() -> None:
    """More specific known values win, unknown values change nothing, and features are merged."""
    merged = merge_specs(
        Spec(engine="vllm", precision="bf16", features=("a",)), Spec(region="eu"), Spec(precision="fp8", features=("b", "a"))
    )
    assert merged == Spec(engine="vllm", precision="fp8", region="eu", features=("a", "b"))


def test_scoring_may_have_a_price_of_its_own() -> None:
    """A price of scoring makes it an ask of its own, which sells nothing else; the model's own price wins, and rules apply."""
    found = Capabilities(True, True, "usage", ("tools", SCORES))
    when = datetime(2026, 1, 5, tzinfo=UTC)
    engine = EngineConfig(url="http://e", score_price=Amount(50), price_rules=(PriceRule(percent=200),))

    def offers(model: ModelConfig, capabilities: Capabilities = found) -> list[tuple[tuple[str, ...], int]]:
        offer = engine.offer(model, None, Spec(), when, 0.0, capabilities=capabilities)
        sold = engine.priced_offers(offer, model, when, 0.0)
        return [(sold_routes(offer.spec.features), offer.prices.input) for offer in sold]

    assert offers(ModelConfig(name="m", input_price=Amount(7))) == [(ALWAYS, 14), ((SCORES,), 100)]
    assert offers(ModelConfig(name="m", input_price=Amount(7), score_price=Amount(3))) == [(ALWAYS, 14), ((SCORES,), 6)]
    assert offers(ModelConfig(name="m", input_price=Amount(7)), Capabilities(True, True, "usage")) == [(ALWAYS, 14)]
    unpriced = replace(engine, score_price=None)
    offer = unpriced.offer(ModelConfig(name="m"), None, Spec(), when, 0.0, capabilities=found)
    assert unpriced.priced_offers(offer, ModelConfig(name="m"), when, 0.0) == (offer,)


def test_batch_jobs_may_have_a_price_of_their_own() -> None:
    """A discount is an ask of its own, for batch jobs alone, in its hours; the model's setting wins over the engine's."""
    engine = EngineConfig(url="http://e", batch_discount="50%")
    night, day = datetime(2026, 1, 5, 23).astimezone(), datetime(2026, 1, 5, 12).astimezone()

    def sold(model: ModelConfig, when: datetime) -> list[tuple[int, bool]]:
        offer = engine.offer(model, None, Spec(), when, 0.0, capabilities=Capabilities(True, True, "usage"))
        offers = engine.priced_offers(offer, model, when, 0.0)
        return [(offer.prices.output, BATCH_ONLY in offer.spec.features) for offer in offers]

    plain = ModelConfig(name="m", output_price=Amount(9))
    assert sold(plain, day) == sold(plain, night) == [(9, False), (5, True)]
    at_night = replace(plain, batch_discount="90%", batch_hours="22:00-06:00")
    assert sold(at_night, day) == [(9, False)]
    assert sold(at_night, night) == [(9, False), (1, True)]
    assert sold(replace(plain, batch_discount="0%"), day) == [(9, False)]
    with pytest.raises(BadMessage, match="batch_discount"):
        EngineConfig(url="http://e", models=(ModelConfig(name="m", batch_discount="half"),))
