"""Errors in the answers of engines: the forms in which engines report them, also with status 200, and whose fault they are. Pure.

Forms: OpenAI's `error` member; vLLM's {"object": "error"}; Anthropic's {"type": "error"}; FastAPI's {"detail": …}; RFC 9457's
problem details; {"error_type", "error_message"}; {"message", "code"}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

ANSWERED: Final = frozenset({200, 201, 203})
"""Statuses of answers. Some frameworks answer every POST with 201."""
CLIENT_FAULTS: Final = frozenset({400, 405, 406, 411, 413, 414, 415, 422, 431, 451, 501, 505})
"""Statuses that every provider would answer to the same request."""
BUSY: Final = frozenset({408, 409, 425, 429, 503, 529})
"""Statuses of an engine that may answer the same request later."""
FAILED_FINISH: Final = re.compile(
    r"error|abort|cancel|fail|time_?d?_?-?out|overload|interrupt|exception|crash|insufficient|unavailable|disconnect|preempt|killed"
    r"|malformed|unloaded|^load$|^unload$",
    re.IGNORECASE,
)
"""Finish reasons that say that the engine did not finish: an answer that ends so is cut short, and never charged."""
NO_FINISHES: Final = frozenset({"", "null", "none", "nil", "undefined"})
"""Texts that stand for a missing finish reason."""

_RESULTS = frozenset(
    {
        "choices",
        "output",
        "data",
        "results",
        "text",
        "content",
        "delta",
        "response",
        "embedding",
        "embeddings",
        "candidates",
    }
)
"""Members that hold the results of an answer."""
_NAMES = frozenset({"error", "error_type", "error_message", "error_msg", "errorMessage"})
_DESCRIPTIONS = ("detail", "message", "msg", "errors", "title", "error_msg", "errorMessage")
_CODES = ("code", "status", "status_code", "statusCode", "type", "error_code", "errorCode", "param", "name")
_WAITING = frozenset(
    {
        "queued",
        "queue",
        "pending",
        "processing",
        "in_progress",
        "waiting",
        "loading",
        "running",
        "ok",
        "success",
        "ping",
        "progress",
    }
)
_SUBJECTS = (
    r"messages?|prompts?|inputs?|tools?|functions?|roles?|content|images?|audio|video|media|multi-?modal|files?|response_?format|"
    r"json|schemas?|grammars?|templates?|tokens?|temperature|top_[pk]|stop|logprobs?|echo|stream|param\w*|arguments?|fields?|"
    r"request|body|embeddings?|rerank\w*|pooling|context|conversation|system|assistant|logit_bias|penalty|seed|suffix|dimensions|"
    r"encoding_format|reasoning|thinking|modalit\w+|voice|language|value|completions?|placeholders?"
)
"""What a request consists of, or asks for."""
_OBJECTIONS = (
    r"must|should be|(is|are) required|requires?|not (allowed|permitted|implemented|enabled|valid)|not an? \w+ model|"
    r"disabled|invalid|malformed|missing|expect(s|ed)|unexpected|unrecogni[sz]ed|unknown|unprocessable|illegal|"
    r"can(not| not|'?t)? (only )?(use|have|be|parse|determine|unmarshal|decode|process|handle|mix|combine)|"
    r"failed to (parse|decode|process|apply|compile)|"
    r"exceed\w*|overflow\w*|too (long|large|many|big|short|few)|(larger|longer|greater|less) than|at (most|least)|"
    r"out of (range|bounds)|validation errors?|conversion failed|mismatch|duplicate|empty|conflict\w*|exclusive|unmarshal|"
    r"but \d+|found in"
)
"""What is said against it."""
_SUBJECT, _OBJECTION = rf"(?<![a-z])({_SUBJECTS})(?![a-z])", rf"\b({_OBJECTIONS})"
_REQUEST_WORDS = re.compile(
    rf"{_SUBJECT}.{{0,160}}?{_OBJECTION}|{_OBJECTION}.{{0,160}}?{_SUBJECT}|"
    r"(not|n't).{0,3}support|unsupported|not_supported|only\b[^.]{0,80}\bsupported|start it with|\bn must\b|samplers|"
    r"no endpoints found|context.{0,8}(length|window|size)|invalid.?request|bad.?request|content.?(filter|policy|management)|"
    r"validation.?error|json\.exception|must alternate|tool error|jinja|not a multi-?modal|base64|"
    r"(unable to|could not|couldn't|failed to|cannot|can'?t) (load|decode|process|open|read|download|fetch|identify) "
    r"((the|an?) )?(image|audio|video|media|file|url|data)",
    re.IGNORECASE | re.DOTALL,
)
"""Words that blame the request: another provider of the same model would say the same."""
_SERVER_WORDS = re.compile(
    r"unavailable|overload|out of memory|(system|more|enough|insufficient) (memory|storage|resources)|\boom\b|cuda|cublas|nccl|"
    r"\bgpus?\b|vram|crash|\bdied\b|\bdead\b|killed|timed? ?out|deadline|connection|connect to|unreachable|network|socket|"
    r"broken pipe|\bdns\b|no such host|gateway|upstream|proxy|segmentation|core dumped|traceback|assertion|ggml|llama_decode|"
    r"kv.?cache|no space|disk|unexpectedly|terminated|shut(ting)? ?down|not ready|still loading|loading model|"
    r"failed to load (the )?model|(load|loading) failed|worker|backend (error|failed|returned)|operand|subprocess|process exited|"
    r"database|redis|api.?key|authenticat|authori[sz]|permission denied|quota|billing|payment|license|checkpoint|weights|"
    r"nonetype|attributeerror|keyerror|indexerror|runtimeerror|zerodivision|null ?pointer|nil pointer|tensor|dtype|device",
    re.IGNORECASE,
)
"""Words of a failure that another provider need not have. They win over words that blame the request."""
_MAX_JUDGED = 4_000
"""Characters of an error by which it is judged."""
_BUSY_WORDS = re.compile(r"rate.?limit|too many requests|overloaded|queue is full|try again later", re.IGNORECASE)


def has_error(document: Mapping[str, Any]) -> bool:
    """Whether a document of an answer reports an error, in any of the forms above."""
    if "error" in (document.get("object"), document.get("type")):
        return True
    if not _NAMES.isdisjoint(document) and any(document.get(name) for name in _NAMES):
        return True
    if not _RESULTS.isdisjoint(document):
        return False
    if document.get("success") is False or document.get("status") in ("error", "fail", "failed"):
        return True
    if isinstance(document.get("detail"), str | list) or isinstance(document.get("errors"), str | list):
        return bool(document.get("detail") or document.get("errors"))
    states = {str(document[name]).lower() for name in _CODES if document.get(name) is not None}
    described = any(isinstance(document.get(name), str) and document[name] for name in _DESCRIPTIONS)
    return described and bool(states) and not states & _WAITING


def error_status(document: Mapping[str, Any], status: int | None = None) -> int | None:
    """The HTTP status that an engine's error stands for: 400 if it blames the request, 429 or 503 if the engine is busy.

    `status`: the HTTP status that came with it; None for an error in an answer with status 200, whose own code then counts. None
    is returned for a failure of the engine.
    """
    inner = document.get("error")
    error = inner if isinstance(inner, dict) else document
    code = status or next((c for name in _CODES if (c := _read_status(error.get(name))) is not None), None)
    if code in CLIENT_FAULTS:
        return 400 if code in (501, 505) else code
    if code in BUSY:
        return code
    text = " ".join(str(value)[:_MAX_JUDGED] for value in (*error.values(), inner) if isinstance(value, str | list))[:_MAX_JUDGED]
    if _BUSY_WORDS.search(text):
        return 429
    return 400 if _REQUEST_WORDS.search(text) and not _SERVER_WORDS.search(_without_types(error, text)) else None


def _without_types(error: Mapping[str, Any], text: str) -> str:
    """The words of an error without its type, which llama.cpp sets to server_error for errors of the request."""
    return text.replace(str(error.get("type", "")) or "\0", "")


def _read_status(value: object) -> int | None:
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    return int(text) if re.fullmatch(r"[45]\d\d", text) else None
