"""What /metrics says is what happened; spans carry it under OpenTelemetry's names; the dashboard asks for what there
is."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from atts_engine.serve import OpenTelemetryTracing
from tests.serve.running import MODEL, PARAMS, QUESTION, Running, serving, until
from tests.test_engine import frozen_calibrator

ROOT = Path(__file__).resolve().parent.parent.parent
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def figures(url: str) -> Figures:
    response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [s for family in text_string_to_metric_families(response.text) for s in family.samples]
    for sample in samples:
        # As in vLLM, whose dashboards choose by it.
        assert sample.labels.get("model_name") == MODEL or not sample.name.startswith("vllm:")
    return {(s.name, tuple(sorted((k, v) for k, v in s.labels.items() if k != "model_name"))): s.value for s in samples}


def value(found: Figures, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_counters_are_the_sums_of_the_answers() -> None:
    with (
        serving(calibrator=frozen_calibrator, measure_rates=True) as running,
        httpx.Client(base_url=running.url, timeout=60.0) as http,
    ):
        plain = [http.post("/v1/chat/completions", json=CHAT | {"max_tokens": n}).json() for n in (3, 100)]
        atts = http.post("/v1/chat/completions", json=CHAT | {"temperature": 0.8, "atts": {"verdicts": True}}).json()
        http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "n": 65})
        http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "atts": {"chains": 257}})
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=CHAT | {
            "max_tokens": 400, "ignore_eos": True, "stream": True}) as stream:  # fmt: skip
            next(stream.iter_lines())
        assert until(lambda: running.service.admission.requests == 0)
        found = figures(running.url)
        verdicts = atts["atts"]["verdicts"]
        for turn in {v["turn"] for v in verdicts}:
            here = [v for v in verdicts if v["turn"] == turn]
            assert value(found, "atts:verdicts_total", turn=str(turn)) == len(here)
            assert value(found, "atts:takeovers_total", turn=str(turn)) == sum(v["takeover"] for v in here)
            assert value(found, "atts:nominal_takeovers_total", turn=str(turn)) == pytest.approx(0.4 * len(here))
        assert value(found, "atts:gate_margin_count") == len(verdicts)
        margins = [v["level"] - v["p_value"] for v in verdicts]
        for bound in ("-0.5", "-0.1", "0.0", "0.3"):
            below = sum(margin <= float(bound) for margin in margins)
            assert value(found, "atts:gate_margin_bucket", le=bound) == below
        finishes = {"stop": 2.0, "length": 1.0, "abort": 1.0, "error": 0.0}
        for reason, count in finishes.items():
            assert value(found, "vllm:request_success_total", finished_reason=reason) == count
        assert value(found, "atts:requests_refused_total", reason="too_large") == 1
        aborted = value(found, "vllm:generation_tokens_total") - sum(
            r["usage"]["completion_tokens"] for r in (*plain, atts)
        )
        assert 0 < aborted < 400
        details = atts["usage"]["completion_tokens_details"]
        assert value(found, "atts:generation_tokens_total", author="draft") == details["draft_tokens"]
        assert value(found, "vllm:prompt_tokens_total") == 4 * plain[0]["usage"]["prompt_tokens"]
        assert value(found, "vllm:time_to_first_token_seconds_count") == 4
        assert value(found, "vllm:e2e_request_latency_seconds_count") == 4
        assert value(found, "vllm:num_requests_running") == value(found, "vllm:num_requests_waiting") == 0
        chains = {c["finish"] for c in atts["atts"]["chains"]}
        assert sum(value(found, "atts:chains_total", finish=f) for f in chains) == PARAMS.chains
        stats = running.engine.stats()
        assert value(found, "atts:verify_tokens_total") == stats["target"]["scored_tokens"] > 0
        for lane in ("draft", "target"):
            assert value(found, "vllm:kv_cache_usage_perc", lane=lane) == 0.0
            assert value(found, "atts:open_sequences", lane=lane) == 0
            assert value(found, "atts:intensity_ratio", lane=lane) > 0
            for name in ("compute", "memory", "sync", "host"):
                assert value(found, f"atts:{name}_seconds_total", lane=lane) >= 0


def test_token_counters_rise_while_a_request_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, launched = threading.Event(), []
    with serving() as running:
        core = running.engine._lanes[1].core
        launch = core._runner.launch

        def held(*args: Any) -> Any:
            launched.append(args)
            if len(launched) == 40:
                go_on.wait(60)
            return launch(*args)

        def told(name: str, **labels: str) -> float:
            return value(figures(running.url), name, **labels)

        monkeypatch.setattr(core._runner, "launch", held)
        body = CHAT | {"max_tokens": 100, "ignore_eos": True, "stream": True}
        try:
            with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=60.0) as stream:
                lines = stream.iter_lines()
                next(lines)
                assert until(lambda: told("vllm:generation_tokens_total") > 30)
                assert told("vllm:generation_tokens_total") < 40
                assert told("vllm:prompt_tokens_total") > 0 and told("vllm:num_requests_running") == 1
                assert 30 < told("atts:steps_total", lane="target") < 40
                go_on.set()
                assert [line for line in lines if line][-1] == "data: [DONE]"
        finally:
            go_on.set()
        assert told("vllm:generation_tokens_total") == told("atts:generation_tokens_total", author="target") == 100


def test_the_drift_monitor_hears_every_decision(server: Running, http: httpx.Client) -> None:
    before = server.service.metrics.monitor.steps
    reply = http.post("/v1/chat/completions", json=CHAT | {"temperature": 0.8, "atts": {"verdicts": True}}).json()
    assert server.service.metrics.monitor.steps - before == len(reply["atts"]["verdicts"])
    decision = running_decision(server)
    for _ in range(60):
        server.service.metrics.decision(decision)
    found = figures(server.url)
    assert value(found, "atts:calibration_drift_alarms_total") >= 1
    assert value(found, "atts:calibration_log10_martingale") < 2


def running_decision(server: Running) -> Any:
    """A real one, as drift would bring again and again: hardly any score was as high."""
    heard: list[Any] = []
    forget = server.engine.add_decision_listener(heard.append)
    server.call(server.engine.solve("a = 3; a?", replace(PARAMS, chains=1)))
    forget()
    return replace(heard[0], p_value=0.01)


def test_every_request_is_a_span() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(tracing=OpenTelemetryTracing(provider)) as running:
        reply = httpx.post(
            f"{running.url}/v1/chat/completions",
            json=CHAT | {"temperature": 0.5, "seed": 3, "atts": {"chains": 2, "verdicts": True}},
            headers={"traceparent": parent},
            timeout=60.0,
        ).json()
        httpx.post(f"{running.url}/v1/completions", json={"model": MODEL, "prompt": [5] * 500, "max_tokens": 50})
    (span,) = exporter.get_finished_spans()
    assert span.name == f"chat {MODEL}"
    assert span.context is not None and format(span.context.trace_id, "032x") == parent.split("-")[1]
    told = dict(span.attributes or {})
    assert told["gen_ai.operation.name"] == "chat" and told["gen_ai.request.model"] == MODEL
    assert told["gen_ai.usage.input_tokens"] == reply["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == reply["usage"]["completion_tokens"]
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.seed"], told["atts.chains"]) == (0.5, 3, 2)
    assert [e.name for e in span.events].count("atts.verdict") == len(reply["atts"]["verdicts"])


def test_the_dashboard_asks_for_figures_that_there_are(server: Running, http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json=CHAT | {"temperature": 0.8, "atts": {}})
    there = {name for name, _ in figures(server.url)}
    # Left out where no rates were measured.
    there |= {f"atts:{name}_seconds_total" for name in ("compute", "memory", "sync", "host")} | {"atts:intensity_ratio"}
    board = json.loads((ROOT / "docs" / "grafana-atts.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    names = {name for expr in asked for name in re.findall(r"(?:vllm|atts):\w+", expr)}
    assert len(asked) > 15 and names - there == set()
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(places) == len(set(places)) and len({p["id"] for p in board["panels"]}) == len(places)
