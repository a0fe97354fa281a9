"""Multipart forms of uploads, in the forms that clients send and in broken ones."""

from __future__ import annotations

import random

import pytest

from tallystick.client.batches.upload_form import MAX_FIELD_BYTES, MAX_FIELDS, UploadForm
from tallystick.protocol.errors import BadMessage

TYPE = "multipart/form-data; boundary=b"
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
END = b"--b--\r\n"


def file_part(content: bytes = b"x\n", disposition: bytes = b'name="file"; filename="a.jsonl"', more: bytes = b"") -> bytes:
    """A part with a file."""
    return b"--b\r\nContent-Disposition: form-data; " + disposition + b"\r\n" + more + b"\r\n" + content + b"\r\n"


def parse(body: bytes, pieces: int = 5, content_type: str = TYPE) -> tuple[UploadForm, bytes]:
    """Parses a form that comes in pieces."""
    content = bytearray()
    form = UploadForm(content_type, content.extend)
    for at in range(0, len(body), pieces):
        form.feed(body[at : at + pieces])
    form.finish()
    return form, bytes(content)


@pytest.mark.parametrize("pieces", [1, 3, 17, 10_000])
@pytest.mark.parametrize("content", [b"", b"x", b"\r\n--b\r", b"\r\n--", b"--b", b"a\r\n\r\nb\n", bytes(range(256)) * 10])
def test_content_is_unchanged(content: bytes, pieces: int) -> None:
    """The file's bytes come out as they went in, also if they look like a boundary, whatever the order of the parts."""
    for body in (PURPOSE + file_part(content) + END, file_part(content) + PURPOSE + END):
        form, stored = parse(body, pieces)
        assert stored == content
        assert (form.fields, form.filename) == ({"purpose": "batch"}, "a.jsonl")


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b'name="file"; filename="a b.jsonl"', "a b.jsonl"),
        (b"name=file; filename=a.jsonl", "a.jsonl"),
        (b'filename="a.jsonl"; name="file"', "a.jsonl"),
        (b'name="file"; filename="../../etc/passwd"', "passwd"),
        (b'name="file"; filename="C:\\\\dir\\\\a.jsonl"', "a.jsonl"),
        ('name="file"; filename="é.jsonl"'.encode(), "é.jsonl"),
        (b"name=\"file\"; filename*=UTF-8''%C3%A9.jsonl", "é.jsonl"),
        (b'name="file"; filename="x"; filename*=UTF-8\'\'%E2%82%AC.jsonl', "€.jsonl"),
        (b'name="file"; filename=""', "upload"),
        (b'name="file"', "upload"),
        (b'name="file"; filename="\x01"', "upload"),
    ],
)
def test_names(disposition: bytes, name: str) -> None:
    """Names are read in all their forms; folders and what cannot be printed are left out."""
    form, content = parse(PURPOSE + file_part(disposition=disposition) + END)
    assert (form.filename, content) == (name, b"x\n")


def test_headers_of_parts() -> None:
    """Other headers of a part are read over; a content that is encoded otherwise is refused."""
    more = b"Content-Type: application/jsonl\r\nContent-Length: 2\r\nContent-Transfer-Encoding: binary\r\n"
    assert parse(PURPOSE + file_part(more=more) + END)[1] == b"x\n"
    with pytest.raises(BadMessage, match="content-transfer-encoding"):
        parse(PURPOSE + file_part(more=b"content-transfer-encoding: BASE64\r\n") + END)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (PURPOSE + END, "file: expected a file"),
        (PURPOSE + file_part(), "cut off"),
        (b"", "cut off"),
        (file_part() + file_part() + END, "expected one file"),
        (PURPOSE + PURPOSE + file_part() + END, "purpose: expected one field"),
        (b"no form at all", "multipart"),
        (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n\xff\r\n' + file_part() + END, "UTF-8"),
        (b'--b\r\nContent-Disposition: form-data; name="p"\r\n\r\n' + b"x" * (MAX_FIELD_BYTES + 1) + b"\r\n" + END, "at most"),
        (
            b"".join(b'--b\r\nContent-Disposition: form-data; name="%d"\r\n\r\n\r\n' % n for n in range(MAX_FIELDS + 1)) + END,
            "parts",
        ),
        (b"--b\r\n" + b"X: y\r\n" * 100 + b"\r\n", "multipart"),
        (b"--b\r\nX: " + b"y" * 10_000 + b"\r\n\r\n", "multipart"),
    ],
)
def test_broken_forms(body: bytes, reason: str) -> None:
    """Each is refused with what is wrong with it, wherever its pieces end."""
    for pieces in (1, 50, 100_000):
        with pytest.raises(BadMessage, match=reason):
            parse(body, pieces)


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "multipart/form-data", f"multipart/form-data; boundary={'b' * 300}"]
)
def test_content_types(content_type: str) -> None:
    """Only a form with a boundary is one."""
    with pytest.raises(BadMessage, match="content-type: expected multipart/form-data with a boundary"):
        UploadForm(content_type, lambda _: None)


def test_any_bytes_are_read_without_a_crash() -> None:
    """Random changes of a form give a file or BadMessage, and nothing else."""
    chance, base = random.Random(1), PURPOSE + file_part(b"x" * 50) + END
    for _ in range(3_000):
        body = bytearray(base)
        for _ in range(chance.randint(1, 5)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        try:
            form, _ = parse(bytes(body), chance.randint(1, 80))
        except BadMessage:
            continue
        assert form.filename is not None
