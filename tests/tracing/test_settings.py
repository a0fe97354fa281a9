from __future__ import annotations

from pathlib import Path

import pytest

from tallystick.protocol.errors import BadMessage
from tallystick.tracing.settings import TracingSettings, check_environment, is_on, read_headers

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
ON = TracingSettings(endpoint="https://otel.example")


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "otel.example",
        "ftp://otel.example",
        "http://",
        "http://otel.example?key=s3cret",
        "http://a:s3cret@otel.example",
        "http://x:99999",
        "http://[::1",
    ],
)
def test_an_endpoint_that_cannot_be_used_is_refused_without_quoting_it(endpoint: str) -> None:
    """The error names the setting; the URL may contain a key."""
    with pytest.raises(BadMessage, match=r"^config: tracing\.endpoint: expected") as caught:
        TracingSettings(endpoint=endpoint)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:4318", "https://langfuse.example/api/public/otel", "http://[::1]:4318/"])
def test_base_urls_are_accepted(endpoint: str) -> None:
    """With and without a path."""
    assert TracingSettings(endpoint=endpoint).endpoint == endpoint


@pytest.mark.parametrize(
    "changes", [{"sample_ratio": -0.1}, {"sample_ratio": 1.1}, {"flush_seconds": -1.0}, {"flush_seconds": 61.0}]
)
def test_impossible_numbers_are_refused(changes: dict[str, float]) -> None:
    """The error names the member."""
    (name,) = changes
    with pytest.raises(BadMessage, match=rf"^config: tracing\.{name}: expected"):
        TracingSettings(**changes)  # type: ignore[arg-type]


def test_it_is_on_with_an_endpoint_alone() -> None:
    """An endpoint of the config or of the environment; the standard switches win."""
    assert not is_on(TracingSettings(), {})
    assert is_on(ON, {})
    assert is_on(TracingSettings(), {ENDPOINT: "http://otel.example"})
    assert is_on(TracingSettings(), {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://otel.example"})
    assert not is_on(TracingSettings(), {ENDPOINT: ""})
    assert not is_on(ON, {"OTEL_SDK_DISABLED": "TRUE"})
    assert not is_on(ON, {"OTEL_TRACES_EXPORTER": "none"})
    assert is_on(ON, {"OTEL_SDK_DISABLED": "false", "OTEL_TRACES_EXPORTER": "otlp"})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "expected http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "expected http/protobuf"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "expected otlp or none"),
        ({ENDPOINT: "otel.example:4317"}, "expected an http:// or https:// URL"),
    ],
)
def test_variables_that_ask_for_something_else_are_refused(environment: dict[str, str], expected: str) -> None:
    """Instead of traces that go nowhere. The error names the variable."""
    (name,) = environment
    with pytest.raises(BadMessage, match=f"^environment variable {name}: {expected}"):
        check_environment(environment)


def test_usual_variables_are_accepted() -> None:
    """Those of a container beside a collector."""
    check_environment({})
    check_environment({ENDPOINT: "http://otel.example:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"})


def _headers_file(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "headers"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def test_headers_are_read_line_by_line(tmp_path: Path) -> None:
    """Names without case; empty lines and comments are left out."""
    path = _headers_file(tmp_path, "# of Langfuse\nAuthorization: Basic cGs6c2s=\n\nx-langfuse-ingestion-version:4\n")
    assert read_headers(path) == {"authorization": "Basic cGs6c2s=", "x-langfuse-ingestion-version": "4"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "at least one line"),
        ("# nothing\n", "at least one line"),
        ("Authorization Basic s3cret", "line 1: expected NAME: VALUE"),
        ("x y: s3cret", "line 1: expected NAME: VALUE"),
        ("Authorization: ", "line 1: Authorization: expected a value"),
        ("Authorization: s3cret\x07", "line 1: Authorization: expected a value"),
        ("x: ü s3cret", "line 1: x: expected a value"),
        (b"x: \xff s3cret", "not a text"),
        ("x: " + "s3cret" * 3_000, "at most"),
    ],
)
def test_a_bad_file_of_headers_is_refused_without_its_values(tmp_path: Path, text: str | bytes, expected: str) -> None:
    """The error names the file and the line. No value is in it."""
    path = _headers_file(tmp_path, text)
    with pytest.raises(BadMessage, match=expected) as caught:
        read_headers(path)
    assert "s3cret" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """The error has the command that mends it; a missing file is named too."""
    path = _headers_file(tmp_path, "x: y", 0o640)
    with pytest.raises(BadMessage, match=f"chmod 600 {path}"):
        read_headers(path)
    with pytest.raises(BadMessage, match="No such file"):
        read_headers(tmp_path / "none")
