"""A client of OpenAI-compatible chat endpoints, on the standard library alone."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.message import Message
from typing import IO

from atts_engine.errors import InputError

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
MAX_BYTES = 4_000_000
ChatMessage = dict[str, str]


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nothing: a redirect would carry the key to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


class EndpointError(InputError):
    """The endpoint cannot be reached or refuses to answer."""


class _Passing(Exception):
    """A failure that another attempt may not meet."""


@dataclass(frozen=True, slots=True)
class ChatEndpoint:
    """url: up to and with the version, such as http://localhost:8000/v1. key: bearer token, or None. timeout_s: of one
    attempt. backoff_s: pause before the second attempt, doubled before each one after it. sleep: for tests."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    attempts: int = 4
    backoff_s: float = 1.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        if not _is_http(self.url):
            raise InputError(f"the agent's URL must be http://HOST[:PORT]/v1 or https://..., not {self.url!r}")
        if self.key is not None and (not self.key.isascii() or not self.key.isprintable()):
            raise InputError("the agent's key must be printable ASCII on one line")

    def complete(self, messages: Sequence[ChatMessage]) -> str:
        """The text of the model's answer.

        Waits and tries again after a timeout, a broken connection, a busy or failing server. `EndpointError` when all
        attempts failed, and at once where the server refuses the request (wrong key, model or URL).
        """
        failure = ""
        for attempt in range(self.attempts):
            if attempt:
                self.sleep(self.backoff_s * 2 ** (attempt - 1))
            try:
                return self._once(messages)
            except _Passing as error:
                failure = str(error)
        raise EndpointError(
            f"the agent's endpoint {self.url} did not answer in {self.attempts} attempts ({failure}): is the server "
            "running and --agent-url right?"
        )

    def _once(self, messages: Sequence[ChatMessage]) -> str:
        body = json.dumps({"model": self.model, "messages": list(messages)}).encode()
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", body, headers)
        try:
            with urllib.request.build_opener(_Stay).open(request, timeout=self.timeout_s) as reply:
                raw = reply.read(MAX_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                said = f"HTTP {error.code}: {_excerpt(error.read(2000))}"
            if error.code in RETRIED:
                raise _Passing(said) from error
            raise EndpointError(
                f"the agent's endpoint {self.url} refused the request ({said}): check --agent-url, --agent-model and "
                "--agent-key-env"
            ) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise _Passing(str(getattr(error, "reason", None) or error or type(error).__name__)) from error
        return _content(raw)


def _is_http(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        sound = url.isascii() and url.isprintable() and " " not in url and parts.port != 0
    except ValueError:
        return False
    return sound and parts.scheme in ("http", "https") and bool(parts.hostname)


def _content(raw: bytes) -> str:
    try:
        found = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _Passing(f"no chat completion: {_excerpt(raw)}") from error
    if not isinstance(found, str):
        raise _Passing("an answer without text")
    return found


def _excerpt(raw: bytes) -> str:
    return one_line(raw.decode("utf-8", "replace"), 200)


def one_line(text: str, characters: int) -> str:
    """At most so many characters of a foreign text, on one line and without the codes that move a terminal."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:characters]
