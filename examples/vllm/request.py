"""What a request asks of the gate, read from the extra arguments that vLLM passes on (`extra_args`, over HTTP
`vllm_xargs`: a flat object of strings and numbers)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from atts_engine.conformal import level_of
from atts_engine.errors import InputError

if TYPE_CHECKING:
    from vllm import SamplingParams


@dataclass(frozen=True, slots=True)
class GatedRequest:
    """turn: of the chain's next span, from 0: a chain that comes back from a takeover goes on counting; mark: the token
    that ends the request on a takeover, one of its stop_token_ids; level: alpha in units of 2**-32, None for the
    calibration's; problem, chain: names for the decision log."""

    turn: int
    mark: int
    level: int | None = None
    problem: str = ""
    chain: int = 0

    @classmethod
    def of(cls, params: SamplingParams) -> Self | None:
        """The request's, or None where it names none of the arguments `atts_turn`, `atts_mark`, `atts_alpha`,
        `atts_problem`, `atts_chain`. InputError, a ValueError, for those that cannot be: vLLM answers 400 with it."""
        given = {name: value for name, value in (params.extra_args or {}).items() if name.startswith("atts_")}
        if not given:
            return None
        unknown = sorted(given.keys() - {"atts_turn", "atts_mark", "atts_alpha", "atts_problem", "atts_chain"})
        if unknown:
            raise InputError(f"no extra argument {unknown[0]}; there are atts_turn, _mark, _alpha, _problem, _chain")
        mark = _count(given, "atts_mark")
        if mark not in (params.stop_token_ids or ()):
            raise InputError(f"atts_mark {mark} must be one of stop_token_ids, or nothing ends the request")
        if params.min_tokens:
            raise InputError("a gated request may end at any span: leave min_tokens out")
        if params.structured_outputs is not None:
            raise InputError("a grammar does not know atts_mark: gate requests without structured_outputs")
        alpha, problem = given.get("atts_alpha"), given.get("atts_problem", "")
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
            raise InputError(f"atts_alpha must be a number, not {alpha!r}")
        if not isinstance(problem, str):
            raise InputError(f"atts_problem must be a string, not {problem!r}")
        level = None if alpha is None else level_of(alpha)
        return cls(_count(given, "atts_turn"), mark, level, problem, _count(given, "atts_chain", 0))


def _count(given: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{name} must be given as an integer of 0 or more, not {value!r}")
    return value
