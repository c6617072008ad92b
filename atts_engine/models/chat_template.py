"""Rendering of a model's Jinja chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from atts_engine.errors import InputError


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what a trainer learns from; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


class ChatTemplate:
    """Compiled once; sandboxed, since it comes with the model file.

    The environment is that of transformers less `strftime_now`: a prompt that holds today's date would give
    other chains tomorrow, and templates that use it carry a fixed date for engines without it.

    tells_tools: whether it has a place for calls of tools that a chat records.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        self._variables = dict(variables)
        self.tells_tools = "tool_calls" in source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"the model's chat template is not valid Jinja: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt up to where the assistant's answer begins."""
        try:
            return self._template.render(
                messages=[dict(m) for m in messages], add_generation_prompt=True, **self._variables
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise InputError(f"the model's chat template refuses these messages: {error}") from error


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
