"""`atts serve`: OpenAI's interface over a pair of models."""

from __future__ import annotations

import argparse
import asyncio
import gc
import ipaddress
import logging
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

from atts_engine.cli import options
from atts_engine.errors import InputError

if TYPE_CHECKING:
    from atts_engine.cli.job import CalibrationChoice
    from atts_engine.config import ATTSParams
    from atts_engine.conformal import Calibrator
    from atts_engine.engine import AsyncEngine
    from atts_engine.serve import ServerSettings, Tracing


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve` to the commands."""
    text = (
        "Serve the pair over HTTP as OpenAI's API: plain requests by the target alone, requests with `atts` by the "
        "vote of many chains. SIGTERM ends it once open requests are answered."
    )
    parser = subparsers.add_parser("serve", help="serve the pair over HTTP", description=text)
    options.add_models(parser)
    options.add_sampling(parser, strategy=False)
    options.add_calibration(parser, monitor=False)
    _add_server(parser)


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    group.add_argument("--port", type=int, default=8000, help="0 is any that is free (default: %(default)s)")
    group.add_argument("--served-name", metavar="NAME", help="model name of requests (default: the target's)")
    group.add_argument("--api-key-file", metavar="FILE", help="bearer keys, one a line; without it none is asked for")
    group.add_argument(
        "--allowed-origins",
        nargs="+",
        default=(),
        metavar="ORIGIN",
        help="web pages whose scripts may use the server, such as https://chat.example.org, or '*' (default: none)",
    )
    group.add_argument(
        "--max-chains",
        type=int,
        default=256,
        metavar="N",
        help="chains open in a lane at a time (default: %(default)s)",
    )
    group.add_argument(
        "--max-queued-tokens",
        type=int,
        metavar="N",
        help="tokens that open requests may come to hold in a lane (default: four times its KV pool)",
    )
    group.add_argument(
        "--reserve-tokens",
        type=int,
        metavar="N",
        help="tokens counted for an answer whose request names no limit (default: the mean of such answers so far)",
    )
    group.add_argument(
        "--max-choices", type=int, default=64, metavar="N", help="choices of a plain request (default: %(default)s)"
    )
    group.add_argument(
        "--max-body-bytes", type=int, default=4 << 20, metavar="N", help="of a request's body (default: 4 MiB)"
    )
    group.add_argument(
        "--stream-tokens", type=int, default=1, metavar="N", help="tokens in a chunk of a stream (default: %(default)s)"
    )
    group.add_argument("--timeout-s", type=float, metavar="S", help="end a request after S seconds with what there is")
    group.add_argument(
        "--drain-s",
        type=int,
        default=30,
        metavar="S",
        help="after SIGTERM, wait so long for open requests (default: 30)",
    )
    group.add_argument("--otlp", metavar="URL", help="send a trace of every request to this OTLP collector (HTTP)")
    group.add_argument("--log-prompts", action="store_true", help="write prompts into the log, which is off by default")
    group.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal. `InputError` before any model is loaded for anything that cannot be used."""
    try:
        import uvicorn  # noqa: F401

        from atts_engine.serve import ServerSettings, read_keys
    except ImportError as error:
        raise InputError(f"the server needs more ({error}): pip install 'atts-engine[serve]'") from error
    from atts_engine.cli.job import CalibrationChoice

    args.task = None
    options.fill_defaults(args)
    params = options.params(args, "atts")
    options.engine_config(args)
    choice = CalibrationChoice.of(args)
    if args.drain_s < 0:
        raise InputError(f"--drain-s must be 0 or more, not {args.drain_s}")
    settings = ServerSettings(
        model=args.served_name or args.target,
        params=params,
        max_chains=args.max_chains,
        max_queued_tokens=args.max_queued_tokens,
        reserve_tokens=args.reserve_tokens,
        max_choices=args.max_choices,
        max_body_bytes=args.max_body_bytes,
        stream_tokens=args.stream_tokens,
        timeout_s=args.timeout_s,
        key_digests=() if args.api_key_file is None else read_keys(args.api_key_file),
        allowed_origins=tuple(args.allowed_origins),
        log_prompts=args.log_prompts,
    )
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    tracing = _tracing(args)
    with _listen(args.host, args.port) as listener:
        asyncio.run(_serve(args, settings, params, choice, tracing, listener))
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Bound before the models are loaded: a port that is taken should not cost minutes."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be 0 to 65535, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"--host {host}: no such address ({error})") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InputError(f"--host {host} --port {port} cannot be had: {error.strerror}") from error
    return listener


async def _serve(
    args: argparse.Namespace,
    settings: ServerSettings,
    params: ATTSParams,
    choice: CalibrationChoice,
    tracing: Tracing,
    listener: socket.socket,
) -> None:
    import uvicorn

    from atts_engine.engine import AsyncEngine
    from atts_engine.serve import create_app

    async with await AsyncEngine.create(options.engine_config(args)) as engine:
        app = create_app(engine, settings, calibrator=_calibrator(args, choice, engine, params), tracing=tracing)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=args.log_level == "debug",
            server_header=False,
            timeout_graceful_shutdown=args.drain_s,
        )

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                # What is there now stays: looking through all of it for garbage would hold every request up, for a
                # tenth of a second at a time.
                gc.collect()
                gc.freeze()
                _announce(listener, settings)

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                app.state.service.drain()
                super().handle_exit(sig, frame)

        # uvicorn raises the signals that it has heard once more when it has ended: the engine is still to be closed.
        for heard in (signal.SIGINT, signal.SIGTERM):
            signal.signal(heard, lambda number, frame: None)
        await Server(config).serve(sockets=[listener])


def _calibrator(
    args: argparse.Namespace, choice: CalibrationChoice, engine: AsyncEngine, params: ATTSParams
) -> Calibrator | None:
    """None leaves each request's settings a calibration of their own."""
    if choice.file is None and args.calibrator == "adaptive" and choice.cold is None:
        return None
    return choice.make(engine, params)


def _announce(listener: socket.socket, settings: ServerSettings) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {settings.model} at http://{shown}:{port}", flush=True)
    if not settings.key_digests and not ipaddress.ip_address(host).is_loopback:
        logging.getLogger("atts.serve").warning(
            "anybody who can reach %s may use this server: give --api-key-file, or listen on 127.0.0.1", host
        )


def _tracing(args: argparse.Namespace) -> Tracing:
    from atts_engine.serve import NvtxTracing, OpenTelemetryTracing, Silence

    tracing: Tracing = Silence()
    if args.otlp is not None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise InputError(f"--otlp needs more ({error}): pip install 'atts-engine[otel]'") from error
        provider = TracerProvider(resource=Resource.create({"service.name": "atts-serve"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=args.otlp)))
        tracing = OpenTelemetryTracing(provider)
    on_gpu = any(str(device).startswith("cuda") for device in (args.draft_device, args.target_device))
    return NvtxTracing(tracing) if args.profile and on_gpu else tracing
