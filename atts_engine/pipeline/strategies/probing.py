"""Answer probing: a chain ends when it has boxed the same answer several times whenever it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from atts_engine.errors import ContextFull
from atts_engine.pipeline.events import Solution
from atts_engine.pipeline.settings.sampling import Probing
from atts_engine.pipeline.single import Solo
from atts_engine.pipeline.strategies.rounds import all_at_once, in_rounds, why
from atts_engine.pipeline.strategies.wording import spelling
from atts_engine.pipeline.strategies.work import Work
from atts_engine.pipeline.streams import stream_key
from atts_engine.runtime.records import SamplingParams

WORDS = "... Oh, I suddenly got the answer to the whole problem, **Final Answer**\n\n\\[ \\boxed{"
SMALL_WORDS = "\n\n\\boxed{"
"""The same for the 48 tokens of the built-in pair."""
DOUBTS = ("wait", "hold", "but", "okay", "no", "hmm")
"""Of Dynasor's `cot.py`. They are looked for anywhere in a probe, within words too."""
TEMPERATURE, TOP_P = 0.6, 0.95
PROBES = "probes"
"""Key of `Chain.extra`: how often the chain was asked; beside it `probe_tokens`, what was written for that, and
`settled`, whether it ended so."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What the author wrote behind the words that open a box."""

    tokens: tuple[int, ...]
    text: str

    @property
    def answer(self) -> str:
        return boxed(self.text) or ""


async def until_settled(work: Work, settings: Probing) -> Solution:
    own = work.pair.tongues.draft if settings.author == "draft" else work.pair.tongues.target
    choices = [(settings.probe,)] if settings.probe else [(WORDS,), (SMALL_WORDS,)]
    (opening,) = spelling(own, choices, "the option probe")

    async def body(solo: Solo) -> str:
        probes: list[Probe] = []
        finish = "length"
        solo.extra |= {PROBES: 0, "probe_tokens": 0, "settled": False}
        while solo.room > 0:
            leg = min(settings.every, solo.room)
            finish = await solo.write(leg, solo.sampling())
            if finish == "stop" or solo.room <= 0:
                break
            probes.append(await _ask(solo, opening, settings, len(probes)))
            _count(solo, probes)
            if settled(probes, settings.agree, work.task.equal):
                _close(solo, opening, probes[-1])
                return "stop"
        return finish

    chains = await in_rounds(work, settings.author, all_at_once(work), body)
    return work.solution(chains, stopped=why(work, chains, None))


def settled(probes: Sequence[Probe], agree: int, same: Callable[[str, str], bool]) -> bool:
    """Whether the last `agree` probes give one answer without a doubt."""
    last = probes[-agree:]
    if len(last) < agree or any(not probe.answer for probe in last):
        return False
    if any(doubt in probe.text.lower() for probe in last for doubt in DOUBTS):
        return False
    return all(same(last[0].answer, probe.answer) for probe in last)


def boxed(text: str) -> str | None:
    """What stands before the brace that closes a box opened before the text; None where it is not closed."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return text[:i].strip()
    return None


async def _ask(solo: Solo, opening: Sequence[int], settings: Probing, index: int) -> Probe:
    """Box an answer on a sequence of its own, which is closed again. A context that is full gives an empty one."""
    spec, tokens = solo.spec, list[int]()
    key = stream_key(spec.params.seed, spec.problem.stream_name, spec.chain, f"probe-{solo.author}", index)
    sampling = SamplingParams(TEMPERATURE if spec.params.temperature else 0.0, top_p=TOP_P, seed=key)
    (fork,) = await solo.lane.fork(solo.seq, 1)
    try:
        await solo.lane.append(fork, opening)
        async with aclosing(solo.lane.decode(fork, settings.probe_tokens, sampling)) as chunks:
            async for chunk in chunks:
                tokens += chunk.tokens
    except ContextFull:
        tokens.clear()
    finally:
        await solo.lane.close(fork)
    return Probe(tuple(tokens), solo.words.codec.decode(tokens))


def _count(solo: Solo, probes: Sequence[Probe]) -> None:
    solo.aside = sum(len(probe.tokens) for probe in probes)
    solo.extra |= {PROBES: len(probes), "probe_tokens": solo.aside}


def _close(solo: Solo, opening: Sequence[int], probe: Probe) -> None:
    """Let the chain end with the answer of the probe, in the author's own tokens as far as the brace."""
    decode = solo.words.codec.decode
    n = next(n for n in range(1, len(probe.tokens) + 1) if boxed(decode(probe.tokens[:n])) is not None)
    solo.add([*opening, *probe.tokens[:n]])
    # Already counted as the probe's; the opening is nobody's writing.
    solo.aside -= n + len(opening)
    solo.extra["settled"] = True
