"""What the servers of remote lanes were asked in a job, and what scoring cost there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COUNTED = (
    "requests",
    "decode_requests",
    "score_requests",
    "retries",
    "failures",
    "breaker_opened",
    "resumed_spans",
    "lost_requests",
    "sent_tokens",
    "told_tokens",
    "cached_tokens",
    "score_sent_tokens",
    "score_cached_tokens",
    "scored_tokens",
    "sampled_tokens",
)
TIMED = ("busy_s", "waiting_s")

COLUMNS = (
    "server",
    "requests",
    "again",
    "written",
    "sent",
    "cached",
    "scored",
    "sent to score",
    "a scored token",
    "away",
)
NOTE = (
    "written, sent, scored: tokens. sent: of prompts; cached: share of them that the server found in its prefix cache, "
    "- where it does not tell. a scored token: prompt tokens sent to have it scored, which a server that scores past "
    "its cache computes all again; a lane in this process computes 1. again: requests repeated after a failure; away: "
    "time in which requests waited for the server to come back. T_c, T_m, T_s and r of a server are its own."
)


@dataclass(frozen=True, slots=True)
class ServerUse:
    """One server in one job. counters: by how much each of `RemoteLane.stats` rose; about: `AsyncEngine.servers`."""

    counters: Mapping[str, float]
    about: Mapping[str, Any]

    @classmethod
    def between(cls, before: Mapping[str, float], after: Mapping[str, float], about: Mapping[str, Any]) -> ServerUse:
        return cls({name: after[name] - before[name] for name in (*COUNTED, *TIMED)}, about)


def server_figures(use: ServerUse) -> dict[str, Any]:
    """JSON of one server: what it is, its counters, and
    cached_share: of the prompt tokens that it told about, those in its prefix cache, None where it does not tell;
    sent_per_scored: prompt tokens sent to score over tokens scored, None where nothing was."""
    c = use.counters
    return {
        **use.about,
        **{name: int(c[name]) for name in COUNTED},
        **{name: c[name] for name in TIMED},
        "cached_share": c["cached_tokens"] / c["told_tokens"] if c["told_tokens"] else None,
        "sent_per_scored": c["score_sent_tokens"] / c["scored_tokens"] if c["scored_tokens"] else None,
    }


def server_notes(servers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a user should know of these servers beside their figures."""
    return [
        f"{name}: this server draws from noise of its own, whatever the seed (docs/remote-sglang.md)"
        for name, server in servers.items()
        if server["requests"] and not server["seeded"]
    ]


def server_rows(servers: Mapping[str, Mapping[str, Any]], prefix: str = "") -> list[tuple[str, ...]]:
    """Rows of a table with the columns `COLUMNS`, of the servers that were asked something. servers: {name of the lane:
    `server_figures`}."""
    return [_row(prefix + name, server) for name, server in servers.items() if server["requests"]]


def _row(name: str, server: Mapping[str, Any]) -> tuple[str, ...]:
    cached, cost = server["cached_share"], server["sent_per_scored"]
    return (
        name,
        f"{server['requests']:,}",
        f"{server['retries']:,}",
        f"{server['sampled_tokens']:,}",
        f"{server['sent_tokens']:,}",
        "-" if cached is None else f"{100 * cached:.0f}%",
        f"{server['scored_tokens']:,}",
        f"{server['score_sent_tokens']:,}",
        "-" if cost is None else f"{cost:.3g}",
        f"{server['waiting_s']:.3g} s",
    )
