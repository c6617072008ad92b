"""Records of a run: problems in, turns, chains and decisions out.

Field names follow the trace schema (docs/formats.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

COSTS = ("discarded_draft_tokens", "discarded_target_tokens", "judge_tokens", "judge_prompt_tokens")
"""Keys of `Chain.extra`, each there where it is not 0: tokens that either model wrote and that no span on record holds;
tokens that the target wrote to judge; tokens that it read for that alone."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One line of a problem file: `id`, `problem`, optional gold `answer`.

    id: no two problems that run at a time may share one. stream: names the random streams of its chains in the id's
    place, for problems that must come out alike under ids that differ; empty: the id does.
    """

    id: str
    problem: str
    answer: str | None = None
    index: int = 0
    stream: str = ""

    @property
    def stream_name(self) -> str:
        return self.stream or self.id


@dataclass(frozen=True, slots=True)
class ChunkScore:
    """What was known of a draft span when its first `n` tokens were there.

    score: mean negative log-likelihood of these tokens under the target; draft_score: the same under the draft's own
    distribution (temperature 1, nothing filtered away). Nats per token, float32.
    """

    n: int
    score: float
    draft_score: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One draft span, its verdict, and the target span if there is one. Times are seconds since the chain began.

    score_per_byte: the same sum per byte of the scored text in UTF-8, which can be compared where tokens differ.
    chunks: one for each chunk that the draft handed over, the last being the whole span, whose score it repeats to
    the bit; none where a lane does not tell the log-probability of each token, or the lanes' tokens differ.
    early: the verdict was settled before the span was whole. The span ends there, score and p_value are the lowest and
    the highest that it could still have had, and score_per_byte is not known.
    tested: what the gate tested where that is not `score`: the strategy's own scorer's, higher being worse.
    """

    turn: int
    draft: str
    draft_tokens: int
    score: float | None = None
    ppl: float | None = None
    percentile: float | None = None
    p_value: float | None = None
    takeover: bool = False
    target: str | None = None
    target_tokens: int = 0
    t_draft: float = 0.0
    t_verdict: float = 0.0
    t_target: float = 0.0
    chunks: tuple[ChunkScore, ...] = ()
    score_per_byte: float | None = None
    early: bool = False
    tested: float | None = None

    @property
    def judged(self) -> bool:
        """Whether there was a verdict."""
        return self.score is not None or self.tested is not None


@dataclass(frozen=True, slots=True)
class Chain:
    """One finished chain: a line of chains.jsonl. `error` is set where the chain could not go on.

    wait_s: of duration_s, the seconds in which the chain waited for a span or a verdict and was in no running step, and
    those at a barrier; None where a lane does not tell.
    """

    problem_id: str
    problem_index: int
    chain: int
    gold: str | None
    final_answer: str | None
    duration_s: float
    turns: tuple[Turn, ...]
    strategy: str = "atts"
    finish: str = "answer"
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    wait_s: float | None = field(default=None, compare=False)

    @property
    def draft_tokens(self) -> int:
        """All that the draft wrote, what was thrown away too."""
        return sum(t.draft_tokens for t in self.turns) + int(self.extra.get("discarded_draft_tokens", 0))

    @property
    def target_tokens(self) -> int:
        """All that the target wrote, what was thrown away and what it wrote to judge too."""
        written = sum(t.target_tokens for t in self.turns)
        return written + sum(int(self.extra.get(name, 0)) for name in ("discarded_target_tokens", "judge_tokens"))


@dataclass(frozen=True, slots=True)
class Decision:
    """One verdict: a line of decisions.jsonl.

    count = #{calibration >= score}, ties = #{calibration == score}, n = calibration scores at the time; the
    verdict is `takeover` iff (count - ties) * 2**32 + u * (1 + ties) <= level * (n + 1), in integers; k is the
    right-hand side, level = ceil(alpha * 2**32), u in 1 .. 2**32 (u = 2**32: the plain p-value). Decisions of
    one `batch` saw the same store. threshold: of a calibrator that tests the score and not its p-value (takeover iff
    score > threshold); weighted calibrators test p_value itself against level / 2**32. discards: decision_seq of
    earlier verdicts on spans of chains that were cut off: their scores left the calibration before this verdict.
    """

    decision_seq: int
    batch: int
    problem: str
    chain: int
    turn: int
    key: int
    score: float
    n: int
    count: int
    ties: int
    k: int
    level: int
    u: int
    p_value: float
    verdict: str
    threshold: float | None = None
    discards: tuple[int, ...] = ()
