"""A chat endpoint on this machine that plays a model: one scripted reply after another."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG = object()
"""A reply that never comes."""


class Model:
    """replies: a text is an answer, a number an HTTP status, bytes a raw body, `HANG` no reply while the server lives.
    requests: (path, headers, body) of every call."""

    def __init__(self, replies: Sequence[object]) -> None:
        self.url = ""
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.replies = list(replies)
        self.over = threading.Event()

    def said(self, number: int) -> str:
        """All that call `number` told the model."""
        return "\n".join(message["content"] for message in self.requests[number][2]["messages"])


@contextmanager
def serving(*replies: object) -> Iterator[Model]:
    """A server that gives these replies; a call beyond them gets status 400."""
    model = Model(replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            model.requests.append((self.path, dict(self.headers), body))
            reply = model.replies.pop(0) if model.replies else 400
            if reply is HANG:
                model.over.wait(30)
                return
            status = reply if isinstance(reply, int) else 200
            self.send_response(status)
            if status in (301, 302, 307, 308):
                self.send_header("Location", model.url + "/elsewhere")
            self.end_headers()
            if isinstance(reply, bytes):
                self.wfile.write(reply)
            elif isinstance(reply, str):
                self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())
            else:
                self.wfile.write(b'{"error": "says the server"}')

        def log_message(self, format: str, *args: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    model.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield model
    finally:
        model.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
