"""What of an engine's words reaches the client."""

from __future__ import annotations

import orjson
import pytest

from node.engines.error_words import MAX_WORDS, REDACTED, Censor, describe_type, error_body, read_document, words_of

CENSOR = Censor.of("https://gpu7.example.org:8000/v1", "my-own-engine-key")


@pytest.mark.parametrize(
    "secret",
    [
        "https://gpu7.example.org:8000/v1",
        "gpu7.example.org",
        "GPU7.example.org:8000",
        "my-own-engine-key",
        "sk-proj-0123456789abcdef",
        "sk-ab***************yz12",
        "hf_abcdefghijklmnop",
        "AIzaSyA1234567890abcdefghijklmno",
        "Bearer abcdefgh12345678",
        "http://127.0.0.1:4000/v1/chat",
        "http://10.1.2.3/v1",
        "10.1.2.3:8000",
        "http://vllm-0:8000/v1",
        "http://vllm.internal/v1",
        "localhost:11434",
        "/home/ann/models/llama.gguf",
        "/root/.ollama/models/blobs/x",
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIx.c2ln",
    ],
)
def test_secrets_of_the_provider_stay(secret: str) -> None:
    """Its engine's address, its keys and the paths of its machine are no business of the client's."""
    cleaned = CENSOR.clean(f"request to {secret} failed")
    assert REDACTED in cleaned
    assert secret not in cleaned
    document = {"error": {"message": f"request to {secret} failed"}, "param": secret}
    assert secret.encode() not in error_body(document, 400, CENSOR, orjson.dumps(document))


@pytest.mark.parametrize(
    "words",
    [
        "see https://platform.openai.com/docs/api-reference",
        "cannot fetch https://example.org/cat.png",
        "messages[0].content: expected text/plain or image/png",
        "the prompt has 5000 tokens, 4096 at most (v1.2.3)",
        "keys must be strings",
    ],
)
def test_other_words_stay_as_they_are(words: str) -> None:
    """What helps the client is not touched."""
    assert CENSOR.clean(words) == words


def test_words_are_bounded_and_printable() -> None:
    """Neither length nor control characters of an engine reach a terminal."""
    assert len(CENSOR.clean("x" * 100_000)) == MAX_WORDS
    assert CENSOR.clean("a\x00b\x1b[31mc\u202ed") == "ab[31mcd"
    assert words_of({"error": {"message": "a\n\n  b"}}, CENSOR) == "a b"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "m"}}', "m"),
        (b'{"error": "m"}', "m"),
        (b'{"error": {"code": 1}, "message": "m"}', "m"),
        (b'[{"error": {"code": 400, "message": "m"}}]', "m"),
        (b'{"detail": "m"}', "m"),
        (b'{"detail": [{"loc": ["body", "n"], "msg": "m"}, {"msg": "o"}]}', "body.n: m; o"),
        (b'{"error_type": "t", "error_message": "m"}', "m"),
        (b'{"object": "error", "message": "m", "code": 400}', "m"),
        (b'{"type": "about:blank", "title": "m", "status": 400}', "m"),
        (b'{"errors": ["m", "o"]}', "m; o"),
        (b'"m"', "m"),
        (b"m", "m"),
        (b"<html><head><title>t</title></head><body><h1>m</h1> <p>o</body></html>", "m o"),
        (b"", ""),
        (b"[]", ""),
        (b"\xff", "\ufffd"),
        (b'{"error": ' * 50 + b'"m"' + b"}" * 50, ""),
    ],
)
def test_every_form_has_its_words(body: bytes, words: str) -> None:
    """Engines and the proxies before them report errors in many forms."""
    assert words_of(read_document(body), CENSOR) == words


def test_the_body_is_kept_if_it_can_be() -> None:
    """An error in OpenAI's form stays byte for byte; others keep their members beside OpenAI's."""
    whole = b'{ "error": {"message": "m", "n_ctx": 4096} }'
    assert error_body(read_document(whole), 400, CENSOR, whole) == whole
    other = orjson.loads(error_body({"detail": "m", "code": "c"}, 400, CENSOR, b""))
    assert other["detail"] == "m"
    assert other["error"] == {"message": "m", "type": "invalid_request_error", "param": None, "code": "c"}


@pytest.mark.parametrize(
    ("content_type", "said"),
    [
        ("text/html", "the content type 'text/html'"),
        ("Application/JSON; charset=sk-secret", "the content type 'application/json'"),
        ("text/what-the-prompt-says", "an unknown content type"),
        ("nonsense", "an unknown content type"),
        ("text/html\x1b[2J", "an unknown content type"),
        ("", "no content type"),
    ],
)
def test_content_types_in_messages(content_type: str, said: str) -> None:
    """Only common content types are named: another one is the engine's own text, which may quote the request."""
    assert describe_type(content_type) == said
