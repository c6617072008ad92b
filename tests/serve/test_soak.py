"""Load and malformed input: every request ends as an answer, a refusal or its client's leaving; nothing is left over;
nothing that a client can send is a 5xx. Seconds here, minutes with `make test-long`."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from bench import serve_load
from tests.serve.running import CONFIG, MODEL, Running, serving, until

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_a_short_soak_leaves_nothing_behind() -> None:
    small = replace(CONFIG, kv_tokens=800)
    with serving(config=small, max_chains=16, max_queued_tokens=20_000) as running:
        idle = running.tasks()
        tally = asyncio.run(serve_load.drive(running.url, MODEL, 12, 0, lambda done: done >= 4))
        assert tally.failures == []
        assert {end for _, end in tally.ended} == {"answered", "refused", "left"}
        assert {kind for kind, end in tally.ended if end == "answered"} == set(serve_load.KINDS)
        assert sum(n for (_, end), n in tally.ended.items() if end != "refused") == 12 * 4
        assert until(lambda: running.service.admission.requests == 0)
        running.call(running.engine.forget_prefixes())
        assert until(lambda: not any(running.open_sequences().values())), running.open_sequences()
        assert until(lambda: not any(running.used_pages().values())), running.used_pages()
        assert until(lambda: running.tasks() <= idle), f"{running.tasks()} tasks, {idle} before"
        assert sum(lane["preemptions"] for lane in running.engine.stats().values()) > 0


def attack(server: Running, examples: int) -> int:
    """Send requests that our own description allows, and such as it does not, to every operation; returns how many."""
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    sent = 0
    once = settings(
        max_examples=examples, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    for operation in (found.ok() for found in description.get_all_operations()):
        modes = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
        for strategy in (operation.as_strategy(generation_mode=mode) for mode in modes):

            @once
            @given(case=strategy)
            def test(case: Any) -> None:
                nonlocal sent
                sent += 1
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    # The name is no secret; without it every request would end as 404.
                    case.body["model"] = MODEL
                case.call_and_validate(checks=CHECKS, timeout=60.0)

            with suppress(Unsatisfiable):
                test()
    return sent


def test_malformed_requests_are_never_the_servers_fault(server: Running) -> None:
    assert attack(server, 6) > 60


@pytest.mark.long
def test_malformed_requests_by_the_thousand(server: Running) -> None:
    assert attack(server, 1000) > 5000


@pytest.mark.long
def test_ten_minutes_of_load(tmp_path: Path) -> None:
    args = serve_load.parser().parse_args(["--minutes", "10", "--clients", "64"])
    found = serve_load.run(args)
    assert serve_load.sound(found), (found["failures"], found["left_over"])
    # What the process came to hold in its first minute is all that it needs.
    memory = found["resident_mib"]["each_part"]
    assert memory[-1] - memory[0] < 32, memory
