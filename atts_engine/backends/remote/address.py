"""Where a model on a server is named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from atts_engine.errors import InputError

_PORTS = {"vllm": 8000, "sglang": 30000}
_FORM = re.compile(
    r"(?P<kind>vllm|sglang)(?P<tls>\+https)?://(?P<host>[^/:@?#\[\]\s]+|\[[0-9a-fA-F:.]+\])(?::(?P<port>\d{1,5}))?/(?P<name>\S+)"
)


@dataclass(frozen=True, slots=True)
class Address:
    """kind: the engine that runs there, "vllm" or "sglang"; base_url: of its HTTP interface; name: of the model."""

    kind: str
    base_url: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`vllm://HOST[:PORT]/NAME`, `sglang://HOST[:PORT]/NAME`, with `+https` behind the engine for TLS. NAME may
        hold slashes. `InputError` for anything else."""
        found = _FORM.fullmatch(text)
        if found is None or not 0 < int(found["port"] or 1) < 65536:
            # What stands before an @ is a secret.
            shown = re.sub(r"(?<=://)[^/@]*@", "...@", text)
            raise InputError(
                f"{shown}: a server's model is named vllm://HOST:PORT/NAME or sglang://HOST:PORT/NAME "
                "(vllm+https:// and sglang+https:// for TLS)"
            )
        port = found["port"] or _PORTS[found["kind"]]
        scheme = "https" if found["tls"] else "http"
        return cls(found["kind"], f"{scheme}://{found['host']}:{port}", found["name"])


def is_address(name: str) -> bool:
    """Whether a model's name says that it is on a server."""
    return name.partition("://")[0].partition("+")[0] in _PORTS and "://" in name
