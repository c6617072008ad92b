"""Figures for Prometheus, in a registry of the app's own. Names that begin with `vllm:` mean what vLLM means by them;
`atts:` are ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from atts_engine.conformal import ExchangeabilityMonitor
from atts_engine.engine import AsyncEngine
from atts_engine.evaluation.lanes import LaneUse, lane_figures
from atts_engine.pipeline import Decision, VerdictEvent
from atts_engine.runtime import Rates
from atts_engine.serve.admission import LANES, Admission
from atts_engine.serve.generation import LEVEL_ONE

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
MARGINS = tuple(i / 10 for i in range(-10, 11))
TOKENS = tuple(float(1 << i) for i in range(18))
M = TypeVar("M", Counter, Gauge, Histogram)
LaneFamily = GaugeMetricFamily | CounterMetricFamily

MAX_TURN_LABEL = 63
"""Turns from here on share a label: requests choose how many there are."""


class ServerMetrics:
    """What requests and verdicts add up to. `text` also reads the lanes and the admission as they stand.

    monitor: looks for drift in the p-values of all verdicts, in the order in which they were given.
    """

    def __init__(self, engine: AsyncEngine, admission: Admission, model: str, alpha: float) -> None:
        self.registry = CollectorRegistry()
        self.monitor = ExchangeabilityMonitor()
        self._model = model
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)

        def named(make: Callable[..., M], name: str, text: str, **more: Any) -> M:
            """One of vLLM's, which its dashboards find by the model's name."""
            return make(name, text, ["model_name"], **more).labels(model)

        self._running = named(gauge, "vllm:num_requests_running", "Requests that have begun to answer")
        self._waiting = named(gauge, "vllm:num_requests_waiting", "Requests admitted, without a token yet")
        self._prompt = named(counter, "vllm:prompt_tokens", "Tokens of prompts")
        self._generated = named(counter, "vllm:generation_tokens", "Tokens of answers, of all chains and both models")
        self._finished = counter(
            "vllm:request_success", "Requests by how they ended", ["model_name", "finished_reason"]
        )
        self._first = named(histogram, "vllm:time_to_first_token_seconds", "Until the first token", buckets=SECONDS)
        self._between = named(histogram, "vllm:inter_token_latency_seconds", "Between tokens", buckets=SECONDS)
        self._whole = named(histogram, "vllm:e2e_request_latency_seconds", "Until the last token", buckets=SECONDS)
        self._prompt_sizes = named(histogram, "vllm:request_prompt_tokens", "Tokens of a prompt", buckets=TOKENS)
        self._sizes = named(histogram, "vllm:request_generation_tokens", "Tokens of an answer", buckets=TOKENS)
        self._refused = counter("atts:requests_refused", "Requests that were not begun", ["reason"])
        self._chains = counter("atts:chains", "Chains of ATTS requests by how they ended", ["finish"])
        self._tokens = counter("atts:generation_tokens", "Tokens by who wrote them", ["author"])
        for author in LANES:
            self._tokens.labels(author)
        self._verdicts = counter("atts:verdicts", "Draft spans judged", ["turn"])
        self._takeovers = counter("atts:takeovers", "Draft spans taken over", ["turn"])
        self._nominal = counter(
            "atts:nominal_takeovers",
            "Sum of the nominal alpha over the verdicts: what takeovers should be",
            ["turn"],
        )
        self._margin = histogram("atts:gate_margin", "Level less p-value: 0 and above is taken over", buckets=MARGINS)
        self._alarms = counter("atts:calibration_drift_alarms", "Alarms of the drift monitor")
        self._alpha = gauge("atts:nominal_alpha", "Of requests that name none")
        self._alpha.set(alpha)
        info = gauge("atts:model_info", "1", ["model_name", "draft", "target"])
        info.labels(model, engine.draft_model.name, engine.target_model.name).set(1)
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(model, reason)
        for reason in ("overloaded", "draining", "too_large"):
            self._refused.labels(reason)
        self.lanes = LaneCollector(engine, admission, self.monitor, model)
        self.registry.register(self.lanes)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def waiting(self, by: int) -> None:
        self._waiting.inc(by)

    def running(self, by: int) -> None:
        self._running.inc(by)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def between_tokens(self, seconds: float) -> None:
        self._between.observe(seconds)

    def prompt(self, tokens: int) -> None:
        """A prompt that has been computed: its first token, or its scores, are there."""
        self._prompt.inc(tokens)

    def written(self, author: str, tokens: int) -> None:
        """As they come: a running server shows its rate."""
        self._generated.inc(tokens)
        self._tokens.labels(author).inc(tokens)

    def finished(self, reason: str, seconds: float, prompt: int, written: int) -> None:
        """reason: stop, length, abort or error. Counts are tokens."""
        self._finished.labels(self._model, reason).inc()
        self._whole.observe(seconds)
        self._prompt_sizes.observe(prompt)
        self._sizes.observe(written)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def chain(self, finish: str) -> None:
        self._chains.labels(finish).inc()

    def verdict(self, event: VerdictEvent, alpha: float) -> None:
        """alpha: that the request asked for."""
        turn = str(event.turn) if event.turn < MAX_TURN_LABEL else f"{MAX_TURN_LABEL}+"
        self._verdicts.labels(turn).inc()
        self._takeovers.labels(turn).inc(event.takeover)
        self._nominal.labels(turn).inc(alpha)
        if event.decision is not None:
            self._margin.observe(event.decision.level / LEVEL_ONE - event.decision.p_value)

    def decision(self, decision: Decision) -> None:
        """Every decision of the engine, in order."""
        if self.monitor.update(min(1.0, max(0.0, decision.p_value))):
            self._alarms.inc()
            self.monitor.reset()


SERVER_COUNTERS = {
    "requests": "Requests to the server of a lane",
    "retries": "Of them, repeated after a failure",
    "breaker_opened": "Times that the server was found to be away",
    "lost_requests": "Requests of which no byte came for ten minutes or more, although the server lives",
    "sent_tokens": "Prompt tokens sent",
    "cached_tokens": "Of them, those that the server said it had",
    "score_sent_tokens": "Prompt tokens sent to have tokens behind them scored",
}
"""Of lanes on servers."""


class LaneCollector(Collector):
    """Reads both lanes when it is asked. rates: of the devices of those in this process; without them T_c, T_m and r
    are left out."""

    def __init__(self, engine: AsyncEngine, admission: Admission, monitor: ExchangeabilityMonitor, model: str) -> None:
        self._engine = engine
        self._model = model
        self._admission = admission
        self._monitor = monitor
        self.rates: Mapping[str, Rates] = {}

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        every, servers = self._engine.stats(), self._engine.servers()
        stats = {name: lane for name, lane in every.items() if name not in servers}
        away = {name: every[name] for name in servers}
        named = ["model_name", "lane"]
        yield self._by_lane(
            GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the KV pool in use, 0 to 1", labels=named),
            {n: s["used_pages"] / (s["used_pages"] + s["free_pages"]) for n, s in stats.items()},
            self._model,
        )
        yield self._by_lane(
            CounterMetricFamily("vllm:num_preemptions", "Sequences that gave up their pages", labels=named),
            {n: s["preemptions"] for n, s in stats.items()},
            self._model,
        )
        for name, key, text in (
            ("atts:steps", "steps", "Steps taken; computed_tokens over it is the mean of a step"),
            ("atts:computed_tokens", "computed_tokens", "Tokens forwarded"),
            ("atts:recomputed_tokens", "recomputed_tokens", "Tokens forwarded again after a preemption"),
        ):
            counter = CounterMetricFamily(name, text, labels=["lane"])
            yield self._by_lane(counter, {n: s[key] for n, s in stats.items()})
        for key, text in SERVER_COUNTERS.items():
            counter = CounterMetricFamily(f"atts:server_{key}", text, labels=["lane"])
            yield self._by_lane(counter, {n: s[key] for n, s in away.items()})
        verified = every["target"]["scored_tokens"]
        yield CounterMetricFamily("atts:verify_tokens", "Tokens scored by the target", value=verified)
        kept = self._engine.prefix_stats()
        for name, key, text in (
            ("vllm:prefix_cache_queries", "queried", "Prefix tokens asked for"),
            ("vllm:prefix_cache_hits", "hit", "Prefix tokens not computed again"),
        ):
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model], kept[key])
            yield counter
        for name, key, text in (
            ("atts:open_sequences", "open_sequences", "Sequences that a lane holds"),
            ("atts:used_pages", "used_pages", "Pages of the KV pool in use"),
        ):
            yield self._by_lane(GaugeMetricFamily(name, text, labels=["lane"]), {n: s[key] for n, s in stats.items()})
        loads = self._admission.loads
        chains = GaugeMetricFamily("atts:admitted_chains", "Chains of open requests", labels=["lane"])
        yield self._by_lane(chains, {n: load.chains for n, load in loads.items()})
        tokens = GaugeMetricFamily("atts:admitted_tokens", "Tokens that open requests may hold", labels=["lane"])
        yield self._by_lane(tokens, {n: load.tokens for n, load in loads.items()})
        yield GaugeMetricFamily(
            "atts:calibration_log10_martingale",
            "Evidence of drift since the last alarm; 2 raises one",
            value=self._monitor.log_value / math.log(10.0),
        )
        yield from self._intensity(stats)

    def _intensity(self, stats: Mapping[str, Mapping[str, float]]) -> Iterable[Metric]:
        if not self.rates:
            return
        nothing = {key: 0.0 for lane in stats.values() for key in lane}
        uses = {n: lane_figures(LaneUse.between(nothing, s, self.rates[n])) for n, s in stats.items()}
        for name, key, text in (
            ("atts:compute_seconds", "T_c", "T_c: operations of the steps at the device's measured rate"),
            ("atts:memory_seconds", "T_m", "T_m: bytes of the steps at the device's measured rate"),
            ("atts:sync_seconds", "T_s", "T_s: the lane idle, with sequences open"),
            ("atts:host_seconds", "T_other", "T_other: scheduling, launching, committing"),
        ):
            counter = CounterMetricFamily(name, text, labels=["lane"])
            yield self._by_lane(counter, {n: use[key] for n, use in uses.items()})
        ratios = {n: use["r"] for n, use in uses.items() if use["r"] is not None}
        yield self._by_lane(
            GaugeMetricFamily("atts:intensity_ratio", "r = T_c / (T_m + T_s) since the start", labels=["lane"]), ratios
        )

    @staticmethod
    def _by_lane(family: LaneFamily, values: Mapping[str, float], *named: str) -> Metric:
        """named: values of the labels before the lane's."""
        for lane, value in values.items():
            family.add_metric([*named, lane], value)
        return family
