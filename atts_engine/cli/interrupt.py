"""Ctrl-C with something to say."""

from __future__ import annotations


class Interrupted(KeyboardInterrupt):
    """The user stopped a command; `message` is one line that says what was saved and how to go on."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
