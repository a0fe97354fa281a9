"""A client's requirements of an ask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.requirements import NO_REQUIREMENTS, Requirements
from tests.coordinator.harness import make_ask, person

SPEC = Spec(region="eu-west", tier="Edge", precision="bf16", engine="vllm", features=("tools", "Logprobs", "/v1/rerank"))
ASK = replace(make_ask(person("ann")).message, spec=SPEC)


@pytest.mark.parametrize(
    ("required", "lacks"),
    [
        ({}, None),
        ({"region": ("EU-WEST",)}, None),
        ({"region": ("us", "eu-west")}, None),
        ({"region": ("eu",)}, "region"),
        ({"tier": ("edge",), "precision": ("fp8",)}, "precision"),
        ({"tier": ("cloud",), "precision": ("fp8",)}, "tier"),
        ({"precision": ("bfloat16",)}, None),
        ({"precision": ("fp8", "torch.bfloat16")}, None),
        ({"precision": ("fp16",)}, "precision"),
        ({"precision": ("unknown",)}, "precision"),
        ({"engine": ("sglang",)}, "engine"),
        ({"features": ("tools", "logprobs")}, None),
        ({"features": ("tools", "vision")}, "features"),
        ({"context_tokens": 8_192}, None),
        ({"context_tokens": 8_193}, "context_tokens"),
    ],
)
def test_unmet_requirements(required: dict[str, Any], lacks: str | None) -> None:
    """An ask needs one of the names of each kind, all features, and at least the context; case does not matter."""
    assert Requirements(**required).first_unmet(ASK) == lacks


def test_unknown_meets_nothing() -> None:
    """A provider without a stated region does not meet a required region."""
    silent = replace(ASK, spec=Spec())
    for name in ("region", "tier", "precision", "engine"):
        assert Requirements.from_json({name: ["eu"]}).first_unmet(silent) == name
    assert NO_REQUIREMENTS.first_unmet(silent) is None


def test_a_precision_is_required_in_any_spelling() -> None:
    """Of the ask and of the client. One that is no class, such as an overlong one, is met by nothing, not by the unknown one."""
    for declared, required in (("Q4_K_M", "q4_k - medium"), ("F8_E4M3", "FP8"), ("half", "torch.float16"), ("4bit", "int4")):
        ask = replace(ASK, spec=Spec(precision=declared))
        assert Requirements(precision=(required,)).first_unmet(ask) is None
        assert Requirements(precision=("q8_0",)).first_unmet(ask) == "precision"
    silent = replace(ASK, spec=Spec())
    assert Requirements(precision=("x" * 40,)).first_unmet(silent) == "precision"
    assert Requirements(precision=("",)).first_unmet(silent) == "precision"
    assert Requirements(precision=("fp8", "Unknown")).first_unmet(silent) is None
    assert Requirements(precision=("fp8", "unknown")).first_unmet(ASK) == "precision"


def test_narrowing_compares_classes_of_precisions() -> None:
    """A key that allows bf16 allows a request for bfloat16, and none for another class."""
    allowed = Requirements(precision=("bf16", "fp8"))
    assert allowed.intersection(Requirements(precision=("int4", "bfloat16"))).precision == ("bfloat16",)
    with pytest.raises(Refusal, match=r"require\.precision"):
        allowed.intersection(Requirements(precision=("q8_0",)))


def test_narrowing() -> None:
    """The intersection requires what both require; neither widens the other."""
    config_requirements = Requirements(region=("eu-west", "eu-north"), features=("tools",), context_tokens=100)
    asked = Requirements(region=("US", "EU-north"), features=("logprobs",), precision=("fp8",), context_tokens=50)
    both = config_requirements.intersection(asked)
    assert both == Requirements(region=("EU-north",), precision=("fp8",), features=("tools", "logprobs"), context_tokens=100)
    assert (
        config_requirements.intersection(NO_REQUIREMENTS)
        == NO_REQUIREMENTS.intersection(config_requirements)
        == config_requirements
    )
    with pytest.raises(Refusal, match=r"require.region: expected one of eu-west, eu-north, got us") as caught:
        config_requirements.intersection(Requirements(region=("us",)))
    assert caught.value.code is Code.NO_PROVIDER


NAMES = st.lists(st.sampled_from(["eu", "EU", "us", "asia"]), max_size=3).map(tuple)
ANY = st.builds(Requirements, region=NAMES, tier=NAMES, features=NAMES, context_tokens=st.integers(0, 10_000))
SPECS = st.builds(Spec, region=st.sampled_from(["eu", "us", "unknown"]), tier=st.sampled_from(["eu", "us"]), features=NAMES)


@given(ANY, ANY, SPECS)
def test_narrowed_is_both(first: Requirements, second: Requirements, spec: Spec) -> None:
    """An ask meets an intersection exactly if it meets both requirements."""
    ask: Ask = replace(ASK, spec=spec)
    both = first.first_unmet(ask) is None and second.first_unmet(ask) is None
    try:
        narrowed = first.intersection(second)
    except Refusal:
        assert not both
    else:
        assert (narrowed.first_unmet(ask) is None) is both


@given(ANY)
def test_the_wire_form(required: Requirements) -> None:
    """Requirements survive JSON; members without a restriction are not written."""
    assert Requirements.from_json(required.to_json()) == required
    assert all(required.to_json().values())


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ([], "expected a JSON object"),
        ({"mood": "good"}, "unknown members: mood"),
        ({"region": 5}, r"require\.region: expected a list"),
        ({"region": [5]}, r"require\.region: expected a string"),
        ({"region": ["x"] * 65}, "at most 64"),
        ({"contextTokens": "many"}, r"require\.contextTokens"),
    ],
)
def test_invalid_requirements(raw: object, says: str) -> None:
    """An invalid member is refused by name."""
    with pytest.raises(BadMessage, match=says):
        Requirements.from_json(raw)
    assert Requirements.from_json({"region": "eu"}) == Requirements(region=("eu",))
