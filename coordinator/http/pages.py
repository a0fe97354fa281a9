"""Pages for browsers: what this coordinator is, and its HTTP API. They need no scripts and nothing from the network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

PAGE_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"}
LINKS = {
    "market": ("market", "models, providers and the match log, as pages"),
    "docs": ("docs", "the HTTP API"),
    "openapi": ("openapi.json", "the HTTP API for programs (OpenAPI)"),
    "info": ("v1/info", "chain, contract and fee"),
    "models": ("v1/models", "models on offer"),
    "ready": ("readyz", "state of its dependencies"),
    "metrics": ("metrics", "metrics for Prometheus"),
}
"""Relative addresses of the routes that are worth a look, and what they show."""
ABOUT = (
    "This is a Tallystick coordinator: it matches sealed inference jobs with providers, relays them and settles claims on chain."
)
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{font-family:ui-monospace,monospace;background:#8882;border-radius:4px;padding:.1em .3em}"
    "pre{padding:1em;overflow:auto}h2{border-top:1px solid #8886;padding-top:1rem;font-size:1.1rem}"
    "table{border-collapse:collapse;margin:.7rem 0}body{overflow-wrap:anywhere}"
    "td,th{border:1px solid #8886;padding:.3em .6em;text-align:left;vertical-align:top}"
    "td:first-child{min-width:3.5rem}"
    ":root{color-scheme:light dark}"
)
_CODE = re.compile(r"`([^`]+)`")


def home_page(name: str, version: str) -> str:
    """The page at /."""
    links = "".join(f'<li><a href="{path}">{path}</a>: {escape(text)}' for path, text in LINKS.values())
    return _page(f"Coordinator {name}", f"<p>{escape(ABOUT)}</p><p>Version {escape(version)}</p><ul>{links}</ul>")


def api_page(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as a page: each operation with its parameters, its body and its answers; then the schemas."""
    info = document["info"]
    parts = [_prose(info.get("description", "")), '<p>For programs: <a href="openapi.json">openapi.json</a></p>']
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += _operation(method, path, operation)
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        rows = [(member, _type(about), about.get("description", "")) for member, about in schema.get("properties", {}).items()]
        parts.append(f'<h2 id="{escape(name)}">{escape(name)}</h2>' + _prose(schema.get("description", "")))
        parts.append(_table(("member", "type", "meaning"), rows))
    return _page(f"{info['title']} {info['version']}", "".join(parts))


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>{_prose(operation.get('description', ''))}"
    parameters = operation.get("parameters", ())
    rows = [(entry["name"], _type(entry.get("schema", {})), entry.get("description", "")) for entry in parameters]
    yield _table(("parameter", "type", "meaning"), rows)
    for content_type, about in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Body: <code>{escape(content_type)}</code>, {_type(about.get('schema', {}))}</p>"
    answers = operation.get("responses", {}).items()
    rows = [(status, _content(about.get("content", {})), about.get("description", "")) for status, about in answers]
    yield _table(("status", "body", "meaning"), rows)


def _content(content: Mapping[str, Any]) -> str:
    """The types of an answer's body as HTML."""
    return ", ".join(_type(about["schema"]) if about.get("schema") else escape(name) for name, about in content.items())


def _type(schema: Mapping[str, Any]) -> str:
    """A schema's type as HTML; a reference is a link to the schema on the page."""
    if "$ref" in schema:
        name = escape(str(schema["$ref"]).rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    alternatives = schema.get("anyOf") or schema.get("allOf") or schema.get("oneOf")
    if alternatives:
        return " or ".join(_type(alternative) for alternative in alternatives)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("type", "any")))


def _table(columns: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> str:
    """A table of a name, a type (HTML already) and a meaning; empty without rows."""
    if not rows:
        return ""
    cells = [f"<tr><td><code>{escape(name)}</code><td>{kind}<td>{_inline(meaning)}" for name, kind, meaning in rows]
    return f"<table><tr>{''.join(f'<th>{column}' for column in columns)}{''.join(cells)}</table>"


def _prose(text: str) -> str:
    return "".join(f"<p>{_inline(paragraph)}</p>" for paragraph in text.split("\n\n") if paragraph.strip())


def _inline(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", escape(text))


def _page(title: str, body: str) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</html>'
