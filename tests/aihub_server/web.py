"""HTTP with routes, and with the faults that a test asks for."""

from __future__ import annotations

import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Response:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What shall go wrong with the next requests of a kind.

    Attributes:
        method, path: of the requests, the path as a regular expression.
        kind: `status` answers with `status` and `body` and does nothing else; `slow` answers after `seconds`; `cut`
            closes the connection in the middle of the body; `lost` does what is asked and closes without an answer.
        times: how often.
    """

    method: str
    path: str
    kind: Literal["status", "slow", "cut", "lost"]
    status: int = 500
    body: str = ""
    seconds: float = 0.0
    times: int = 1

    def hits(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None


Route = tuple[str, str, Callable[..., Response]]


class Site:
    """One port of the server."""

    def __init__(self, routes: list[Route], admit: Callable[[Request], Response | None] = lambda request: None) -> None:
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self._routes = [(method, re.compile(pattern), action) for method, pattern, action in routes]
        self._admit = admit
        self._lock = threading.Lock()
        self._http = _Quiet(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that hits a request, used up by one."""
        with self._lock:
            self.log.append((method, path))
            hit = next((fault for fault in self.faults if fault.hits(method, path)), None)
            if hit is not None:
                hit.times -= 1
            return hit

    def answer(self, request: Request) -> Response:
        refusal = self._admit(request)
        if refusal is not None:
            return refusal
        for method, pattern, action in self._routes:
            match = pattern.fullmatch(request.path)
            if match and method == request.method:
                return action(request, *match.groups())
        return Response(404, b'{"detail": "Not found."}')

    def count(self, method: str, path: str) -> int:
        """How many requests of a kind have come."""
        return sum(logged[0] == method and re.search(path, logged[1]) is not None for logged in self.log)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed, or waited long enough
            super().handle_error(request, client_address)


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            parts = urlsplit(self.path)
            fault = site.fault(self.command, parts.path)
            length = int(self.headers.get("Content-Length") or 0)
            if fault is not None and fault.kind == "cut":
                self.rfile.read(length // 2)
                self._reset()
                return
            body = self.rfile.read(length)
            if fault is not None and fault.kind == "status":
                self._send(Response(fault.status, fault.body.encode()))
                return
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            request = Request(self.command, parts.path, query, dict(self.headers), body)
            response = site.answer(request)
            if fault is not None and fault.kind == "slow":
                time.sleep(fault.seconds)
            if fault is not None and fault.kind == "lost":
                self._reset()
                return
            self._send(response)

        do_GET = do_POST = do_PUT = do_PATCH = _serve  # noqa: N815 - the names that http.server looks for

        def _send(self, response: Response) -> None:
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.body)))
            self.end_headers()
            self.wfile.write(response.body)

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.rfile = self.wfile = _Closed()  # type: ignore[assignment]

        def log_message(self, *args: object) -> None:
            pass

    return Handler


class _Closed:
    """What http.server flushes and closes after a request whose connection is gone."""

    closed = True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
