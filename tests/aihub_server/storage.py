"""The storage service: files by key, uploaded in parts or as a form, downloaded whole."""

from __future__ import annotations

import hashlib
from email.message import Message
from email.parser import BytesParser

from aihub_server.web import Request, Response, Site


class Storage:
    """Files in memory on a port of their own."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.site = Site([("PUT", "/(.+)", self._put), ("POST", "/(.+)", self._post), ("GET", "/(.+)", self._get)])

    def url(self, key: str) -> str:
        return f"{self.site.url}/{key}"

    def _put(self, request: Request, key: str) -> Response:
        self.files[key] = request.body
        return Response(200, headers={"ETag": etag(request.body)})

    def _post(self, request: Request, key: str) -> Response:
        self.files[key] = _file_of_form(request)
        return Response(204)

    def _get(self, request: Request, key: str) -> Response:
        if key not in self.files:
            return Response(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>")
        return Response(200, self.files[key], {"Content-Type": "application/octet-stream"})


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def _file_of_form(request: Request) -> bytes:
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    form: Message = BytesParser().parsebytes(head + request.body)
    for part in form.walk():
        if part.get_filename() is not None:
            content = part.get_payload(decode=True)
            assert isinstance(content, bytes)
            return content
    raise AssertionError("the form holds no file")
