"""A span for each request, where OpenTelemetry is installed and a tracer was given; attributes by its semantic
conventions for generative AI. With `--profile` on a GPU a request is also an NVTX range on the profiler's time line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch


class RequestTrace(Protocol):
    """Of one request, from its admission to its end."""

    def event(self, name: str, attributes: Mapping[str, Any]) -> None: ...

    def end(self, attributes: Mapping[str, Any], error: str | None = None) -> None: ...


class Tracing(Protocol):
    """Begins traces. headers: of the request, whose `traceparent` the span goes under."""

    def begin(
        self, operation: str, model: str, headers: Mapping[str, str], attributes: Mapping[str, Any]
    ) -> RequestTrace: ...


class Silence:
    """Traces nothing."""

    def begin(
        self, operation: str, model: str, headers: Mapping[str, str], attributes: Mapping[str, Any]
    ) -> RequestTrace:
        return self

    def event(self, name: str, attributes: Mapping[str, Any]) -> None:
        return None

    def end(self, attributes: Mapping[str, Any], error: str | None = None) -> None:
        return None


class OpenTelemetryTracing:
    """provider: an `opentelemetry.trace.TracerProvider`; None: the process's own."""

    def __init__(self, provider: Any = None) -> None:
        from opentelemetry import trace

        self._tracer = trace.get_tracer("atts_engine.serve", tracer_provider=provider)

    def begin(
        self, operation: str, model: str, headers: Mapping[str, str], attributes: Mapping[str, Any]
    ) -> RequestTrace:
        from opentelemetry import propagate, trace

        span = self._tracer.start_span(
            f"{operation} {model}",
            context=propagate.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "atts",
                "gen_ai.request.model": model,
                **attributes,
            },
        )
        return _OpenTelemetryTrace(span)


class _OpenTelemetryTrace:
    def __init__(self, span: Any) -> None:
        self._span = span

    def event(self, name: str, attributes: Mapping[str, Any]) -> None:
        self._span.add_event(name, dict(attributes))

    def end(self, attributes: Mapping[str, Any], error: str | None = None) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_attributes(dict(attributes))
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class NvtxTracing:
    """Ranges that may overlap, one a request; `also` traces beside it."""

    def __init__(self, also: Tracing) -> None:
        self._also = also

    def begin(
        self, operation: str, model: str, headers: Mapping[str, str], attributes: Mapping[str, Any]
    ) -> RequestTrace:
        return _NvtxTrace(f"request.{operation}", self._also.begin(operation, model, headers, attributes))


class _NvtxTrace:
    def __init__(self, name: str, also: RequestTrace) -> None:
        self._range = torch.cuda.nvtx.range_start(name)
        self._also = also

    def event(self, name: str, attributes: Mapping[str, Any]) -> None:
        torch.cuda.nvtx.mark(name)
        self._also.event(name, attributes)

    def end(self, attributes: Mapping[str, Any], error: str | None = None) -> None:
        torch.cuda.nvtx.range_end(self._range)
        self._also.end(attributes, error)
