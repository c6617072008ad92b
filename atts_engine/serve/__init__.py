"""The HTTP server: OpenAI's interface over the engine. Needs the extra `serve`."""

from atts_engine.serve.app import create_app
from atts_engine.serve.settings import ServerSettings, read_keys
from atts_engine.serve.tracing import NvtxTracing, OpenTelemetryTracing, Silence, Tracing

__all__ = ["NvtxTracing", "OpenTelemetryTracing", "ServerSettings", "Silence", "Tracing", "create_app", "read_keys"]
