"""Errors a user can mend. Each message is one line that names the thing and the mend."""

from __future__ import annotations


class AttsError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(AttsError, ValueError):
    """Bad input: a file, setting, shape, dtype, prompt or model that cannot be used as given."""


class ChainError(AttsError):
    """One chain cannot go on (a NaN score, a sequence too long); other chains are not affected."""


class QueueFull(AttsError):
    """The engine has as many sequences open as it may; the request was not begun and can be made again later."""


class LaneError(AttsError):
    """A lane as a whole has failed; every sequence on it ends with this error."""


class Refused(ChainError):
    """A server will not do what it was asked, however often; its message says why."""


class ContextFull(ChainError):
    """A chain has reached the end of a model's context; what it has written stands."""


class Unreachable(LaneError):
    """A server cannot be asked now; the same request may be made again. retry_after: seconds until then, as far as
    anybody knows."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
