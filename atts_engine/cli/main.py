"""The `atts` command: parses the line, runs one command, and turns every failure into one line and an exit code.

Exit codes: 0 done; 1 an unexpected failure; 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

from atts_engine.cli.interrupt import Interrupted
from atts_engine.errors import AttsError, InputError

# One module a command; each has add_parser(subparsers) and run(args) -> int, and imports torch only inside run.
COMMANDS = ("run", "calibrate", "eval", "serve", "replay", "simulate", "tune", "bench", "doctor")
MODULES = {"eval": "evaluate"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `InputError`s, so that they end as one line like every other."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")


def version() -> str:
    """The installed version, or "unknown" for a source tree that was never installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("atts-engine")
    except PackageNotFoundError:
        return "unknown (not installed)"


def build_parser() -> argparse.ArgumentParser:
    """The parser of `atts` with all of its commands."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--traceback",
        action="store_true",
        default=argparse.SUPPRESS,
        help="on a failure show the whole Python traceback",
    )
    parser = Parser(
        prog="atts",
        parents=[common],
        description="Asynchronous test-time scaling: a draft model writes, a target model scores and takes over.",
    )
    parser.add_argument("--version", action="version", version=f"atts-engine {version()}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        module = importlib.import_module(f"atts_engine.cli.{MODULES.get(command, command)}")
        module.add_parser(subparsers)
        subparser = subparsers.choices[command]
        subparser.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help="on a failure show the whole traceback"
        )
        subparser.set_defaults(handler=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `atts` with `argv` (the process's own arguments when None) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    try:
        args, unknown = build_parser().parse_known_args(words)
        if unknown:
            raise InputError(f"unrecognized arguments: {' '.join(unknown)} (see `atts {args.command} --help`)")
        args.command_line = words
        code = int(args.handler(args))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as stop:
        early = "nothing was added to what is saved" if "--resume" in words else "nothing was saved"
        return _fail(stop.message if isinstance(stop, Interrupted) else f"interrupted; {early}", 130)
    except BrokenPipeError:
        # The reader of a pipe went away (`| head`); what is left in stdout's buffer must not be flushed at exit.
        _abandon(sys.stdout)
        return 1
    except Exception as error:
        if isinstance(error, OSError):
            _settle_stdout()
        if traceback:
            raise
        return _report(error)


def _report(error: Exception) -> int:
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, InputError) or _of_calibration(error):
        return _fail(f"error: {error}", 2)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"error: {where}{error.strerror or error}{notes}", 2)
    if isinstance(error, AttsError):
        return _fail(f"error: {error}{notes}", 1)
    return _fail(f"unexpected error: {type(error).__name__}: {error} (add --traceback to see where)", 1)


def _of_calibration(error: Exception) -> bool:
    # conformal/ stands apart and raises ValueErrors of its own; asking by module keeps numpy out of `atts --help`.
    return isinstance(error, ValueError) and type(error).__module__.startswith("atts_engine.conformal")


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    try:
        sys.stderr.write(f"atts: {line}\n")
        sys.stderr.flush()
    except OSError:
        # Nobody can be told: the log is on the full disk too, say. The exit code still stands.
        _abandon(sys.stderr)
    return code


def _settle_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _abandon(sys.stdout)


def _abandon(stream: TextIO) -> None:
    """Let what is left in the buffer of `stream` go nowhere at exit, in place of failing there once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
