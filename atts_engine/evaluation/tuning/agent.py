"""A language model as a proposer, after AgentTTS (arXiv 2508.00890): insights, proposal, results, better insights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from atts_engine.errors import InputError
from atts_engine.evaluation.tuning import prompts
from atts_engine.evaluation.tuning.chat import ChatEndpoint, ChatMessage, one_line
from atts_engine.evaluation.tuning.cost import Budget, Sizes, Unit
from atts_engine.evaluation.tuning.proposer import Proposal
from atts_engine.evaluation.tuning.space import Configuration, Space
from atts_engine.evaluation.tuning.trial import Trial

MAX_INSIGHTS = 6
MAX_CHARACTERS = 400
"""Of one insight or reason."""
MAX_COMPLAINT = 1000
MAX_ANSWER = 100_000
"""Characters at an answer's end that are looked through for JSON."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Agent:
    """Asks a chat model. Nothing that it says is taken on trust: an answer is one JSON object, a configuration lies in
    the space, and what does not is told back to it once; then the trial is given up as refused and the next one begins.

    All that the model is told comes from the history, so a study can be resumed with it, though not repeated: the model
    may answer otherwise.
    """

    endpoint: ChatEndpoint
    space: Space
    budget: Budget
    sizes: Mapping[str, Sizes]
    unit: Unit

    def propose(self, history: Sequence[Trial]) -> Proposal:
        """Insights from what has been run, and a configuration from the insights."""
        complaints: list[str] = []
        about = prompts.task(self.space, self.budget, self.sizes, self.unit)
        if not history:
            first = self._ask([about, prompts.FIRST], self._opening, complaints)
            if first is None:
                return Proposal(None, complaints=tuple(complaints))
            known, (configuration, reason) = first
            return Proposal(configuration, known, reason, tuple(complaints))
        results = prompts.results(history, self.budget)
        known = history[-1].insights
        summed = self._ask([about, results, prompts.insights(known), prompts.SUM_UP], _insights, complaints)
        known = known if summed is None else summed
        then = self._ask([about, results, prompts.insights(known), prompts.NEXT], self._proposed, complaints)
        if then is None:
            return Proposal(None, known, None, tuple(complaints))
        return Proposal(then[0], known, then[1], tuple(complaints))

    def _ask(self, parts: Sequence[str], read: Callable[[dict[str, Any]], T], complaints: list[str]) -> T | None:
        """What `read` makes of the answer; None when the second answer cannot be used either."""
        messages: list[ChatMessage] = [
            {"role": "system", "content": prompts.SYSTEM},
            {"role": "user", "content": "\n\n".join(parts)},
        ]
        for _ in range(2):
            said = self.endpoint.complete(messages)
            try:
                return read(json_object(said))
            except InputError as error:
                complaint = one_line(str(error), MAX_COMPLAINT)
                complaints.append(complaint)
                messages += [
                    {"role": "assistant", "content": said},
                    {
                        "role": "user",
                        "content": f"This cannot be used: {complaint}. Answer again, with the JSON alone.",
                    },
                ]
        return None

    def _opening(self, found: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Configuration, str | None]]:
        return _insights(found), self._proposed(found)

    def _proposed(self, found: Mapping[str, Any]) -> tuple[Configuration, str | None]:
        values = found.get("configuration")
        if not isinstance(values, dict):
            raise InputError('"configuration" must be an object with every setting')
        reason = found.get("reason")
        return self.space.configuration(values), one_line(reason, MAX_CHARACTERS) if isinstance(reason, str) else None


def json_object(text: str) -> dict[str, Any]:
    """The last JSON object of a text that may hold thoughts and code fences around it. `InputError` without one."""
    text = text[-MAX_ANSWER:].rpartition("</think>")[2]
    decoder = json.JSONDecoder()
    found: dict[str, Any] | None = None
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found = value
        at = text.find("{", end)
    if found is None:
        raise InputError("the answer holds no JSON object")
    return found


def _insights(found: Mapping[str, Any]) -> tuple[str, ...]:
    lines = found.get("insights")
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise InputError('"insights" must be a list of sentences')
    return tuple(one_line(line, MAX_CHARACTERS) for line in lines[:MAX_INSIGHTS])
