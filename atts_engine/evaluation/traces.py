"""Problem files and trace files (docs/formats.md): one JSON object a line, `.jsonl` or `.jsonl.gz`."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from atts_engine.errors import InputError
from atts_engine.evaluation.jsonl import Line, read_lines
from atts_engine.pipeline.records import Chain, ChunkScore, Problem, Turn

_CHAIN_FIELDS = frozenset(
    "problem_id problem_index chain gold final_answer duration_s turns strategy finish error wait_s".split()
)
TOKENS_RECORDED = "tokens_recorded"
"""Key of `Chain.extra` that is False for a trace without token counts (the published recordings hold texts
only)."""


def read_problems(path: str | os.PathLike[str], limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a file, `index` counting from 0.

    `InputError` for a malformed line (with its number), an id seen before, an empty problem, an empty file,
    limit < 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit on problems must be 1 or more, not {limit}")
    problems: list[Problem] = []
    seen: set[str] = set()
    for line in read_lines(path):
        problem = Problem(line.text("id"), line.text("problem"), line.optional_text("answer"), len(problems))
        if not problem.problem.strip():
            raise line.error("field 'problem' is empty")
        if problem.id in seen:
            raise line.error(f"id {problem.id!r} was used by an earlier line")
        seen.add(problem.id)
        problems.append(problem)
        if len(problems) == limit:
            break
    if not problems:
        raise InputError(f"{path} holds no problems")
    return problems


def read_chains(path: str | os.PathLike[str], *, allow_torn_tail: bool = False) -> list[Chain]:
    """The chains of a trace file, in the file's order. `InputError` for a malformed line (with its number)
    and an empty file, unless `allow_torn_tail`, which also drops a half-written last line, as for
    `--resume`."""
    chains = [chain_from_line(line) for line in read_lines(path, allow_torn_tail=allow_torn_tail)]
    if not chains and not allow_torn_tail:
        raise InputError(f"{path} holds no chains")
    return chains


def chain_from_line(line: Line) -> Chain:
    """One line of a trace file. Fields that the schema does not name are kept in `extra`.

    A turn without `score` takes it from `ppl` (score = log ppl, as float32); a turn whose `ppl` is null was
    not scored. Texts left out (`draft_chars` in place of `draft`) are read as empty.
    """
    turns = line.objects("turns")
    extra = {name: value for name, value in line.fields.items() if name not in _CHAIN_FIELDS}
    if any("draft_tokens" not in turn.fields for turn in turns):
        extra[TOKENS_RECORDED] = False
    return Chain(
        problem_id=line.text("problem_id"),
        problem_index=line.integer("problem_index"),
        chain=line.integer("chain"),
        gold=line.optional_text("gold"),
        final_answer=line.optional_text("final_answer"),
        duration_s=line.number("duration_s"),
        turns=tuple(_turn_from_line(turn) for turn in turns),
        strategy=line.optional_text("strategy") or "atts",
        finish=line.optional_text("finish") or "answer",
        error=line.optional_text("error"),
        wait_s=line.optional_number("wait_s"),
        extra=extra,
    )


def _turn_from_line(line: Line) -> Turn:
    ppl = line.optional_number("ppl")
    if ppl is not None and ppl <= 0.0:
        raise line.error(f"field 'ppl' must be above 0, not {ppl}")
    score = line.optional_number("score")
    if score is None and ppl is not None:
        score = float(np.float32(math.log(ppl)))
    takeover = line.flag("takeover")
    if "draft" not in line.fields:
        line.integer("draft_chars")
    return Turn(
        turn=line.integer("turn"),
        draft=line.optional_text("draft") or "",
        draft_tokens=line.integer("draft_tokens", 0),
        score=score,
        ppl=ppl,
        percentile=line.optional_number("percentile"),
        p_value=line.optional_number("p_value"),
        score_per_byte=line.optional_number("score_per_byte"),
        takeover=takeover,
        target=line.optional_text("target"),
        target_tokens=line.integer("target_tokens", 0),
        t_draft=line.number("t_draft", 0.0),
        t_verdict=line.number("t_verdict", 0.0),
        t_target=line.number("t_target", 0.0),
        chunks=_chunks_from_line(line),
        early=line.flag("early", False),
        tested=line.optional_number("tested"),
    )


def _chunks_from_line(line: Line) -> tuple[ChunkScore, ...]:
    if line.fields.get("chunks") is None:
        return ()
    chunks = tuple(
        ChunkScore(chunk.integer("n"), chunk.number("score"), chunk.number("draft_score"))
        for chunk in line.objects("chunks")
    )
    ends = [0, *(chunk.n for chunk in chunks)]
    if any(later <= earlier for earlier, later in pairwise(ends)):
        raise line.error(f"field 'chunks' must have rising 'n' from 1 on, not {ends[1:]}")
    return chunks


def chain_to_json(chain: Chain, *, texts: bool = True) -> dict[str, Any]:
    """The chain as a line of a trace file. texts=False writes `draft_chars` and `target_chars` in place of
    the texts.

    ppl = exp(score) where only the score is known.
    """
    extra = {name: value for name, value in chain.extra.items() if name != TOKENS_RECORDED}
    return {
        "problem_id": chain.problem_id,
        "problem_index": chain.problem_index,
        "chain": chain.chain,
        "gold": chain.gold,
        "final_answer": chain.final_answer,
        "duration_s": chain.duration_s,
        "strategy": chain.strategy,
        "finish": chain.finish,
        "error": chain.error,
        "wait_s": chain.wait_s,
        **extra,
        "turns": [_turn_to_json(turn, texts, has_tokens(chain)) for turn in chain.turns],
    }


def _turn_to_json(turn: Turn, texts: bool, tokens: bool) -> dict[str, Any]:
    ppl = turn.ppl if turn.ppl is not None or turn.score is None else math.exp(turn.score)
    record: dict[str, Any] = {"turn": turn.turn}
    if texts:
        record["draft"] = turn.draft
    else:
        record["draft_chars"] = len(turn.draft)
    record |= {
        "ppl": ppl,
        "percentile": turn.percentile,
        "takeover": turn.takeover,
    }
    if texts:
        record["target"] = turn.target
    else:
        record["target_chars"] = len(turn.target or "")
    record |= {"score": turn.score, "score_per_byte": turn.score_per_byte, "p_value": turn.p_value}
    if tokens:
        record |= {"draft_tokens": turn.draft_tokens, "target_tokens": turn.target_tokens}
    record |= {"t_draft": turn.t_draft, "t_verdict": turn.t_verdict, "t_target": turn.t_target}
    if turn.tested is not None:
        record["tested"] = turn.tested
    if turn.early:
        record["early"] = True
    if turn.chunks:
        record["chunks"] = [asdict(chunk) for chunk in turn.chunks]
    return record


def has_tokens(chain: Chain) -> bool:
    """Whether the chain's token counts are known."""
    return chain.extra.get(TOKENS_RECORDED) is not False
