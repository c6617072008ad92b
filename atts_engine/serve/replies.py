"""What the server answers: OpenAI's shapes, and ours beside them under names that ordinary clients do not read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def left_out() -> Any:
    """A field that is not there when it is None, where others are null."""
    return Field(default=None, exclude_if=lambda value: value is None)


class Reply(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    def json_bytes(self) -> bytes:
        return self.model_dump_json().encode()


class ErrorBody(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    error: ErrorBody


class CompletionTokensDetails(Reply):
    """Of an ATTS request: who wrote the tokens."""

    draft_tokens: int
    target_tokens: int


class Usage(Reply):
    """completion_tokens: of all choices, or of all chains by both models; total_tokens: with the prompts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails | None = left_out()


class Verdict(Reply):
    """On one draft span. score: mean negative log-likelihood, nats per token; level: what the p-value was tested
    against."""

    chain: int
    turn: int
    score: float
    p_value: float | None
    level: float | None
    takeover: bool


class ChainSummary(Reply):
    chain: int
    answer: str | None
    finish: str
    error: str | None
    turns: int
    takeovers: int
    draft_tokens: int
    target_tokens: int


class Vote(Reply):
    """answer: the heaviest one, null where no chain gave any; votes: weight of each; chain: the one whose text stands
    for it; text: that chain's text where another one was streamed."""

    answer: str | None
    votes: dict[str, float]
    chain: int
    text: str | None = left_out()
    chains: list[ChainSummary]
    verdicts: list[Verdict] | None = left_out()


class Piece(Reply):
    """Who wrote the text of a chunk."""

    chain: int
    turn: int
    author: Literal["draft", "target", "vote"]


class AttsChunk(Reply):
    """Beside a chunk of a stream: whose text it holds, a verdict, or the vote."""

    piece: Piece | None = left_out()
    verdict: Verdict | None = left_out()
    vote: Vote | None = left_out()


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprob]


class ChatMessage(Reply):
    role: Literal["assistant"]
    content: str


class ChatChoice(Reply):
    """stop_reason: the stop string that was met, or what ended the choice where `finish_reason` has no word for it."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = left_out()
    finish_reason: str
    stop_reason: str | None = left_out()


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    atts: Vote | None = left_out()


class ChatDelta(Reply):
    role: Literal["assistant"] | None = left_out()
    content: str | None = left_out()


class ChatChunkChoice(Reply):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = left_out()
    finish_reason: str | None
    stop_reason: str | None = left_out()


class ChatChunk(Reply):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = left_out()
    atts: AttsChunk | None = left_out()


class CompletionLogprobs(Reply):
    """top_logprobs: at each place, text and log-probability of the token itself and of the likeliest ones; null where
    none of these were asked for."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = left_out()
    finish_reason: str | None
    stop_reason: str | None = left_out()


class CompletionReply(Reply):
    """A whole answer, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = left_out()
    atts: Vote | AttsChunk | None = left_out()


class SpanReply(Reply):
    """mean_logprob: nats per token; cached_tokens: of the prefix, those that were not computed for this span."""

    index: int
    mean_logprob: float
    sum_logprob: float
    n_tokens: int
    cached_tokens: int
    logprobs: list[float] | None = left_out()


class ScoreReply(Reply):
    id: str
    object: Literal["score"]
    model: str
    data: list[SpanReply]
    usage: Usage


class ModelCard(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    draft: str


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeReply(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = left_out()


class DetokenizeReply(Reply):
    prompt: str


class LaneHealth(Reply):
    """seconds: that the lane took for a token; null where it gave none."""

    ok: bool
    seconds: float | None = left_out()
    error: str | None = left_out()


class Health(Reply):
    status: Literal["ok", "draining", "failed"]
    lanes: dict[str, LaneHealth] = Field(default_factory=dict)


class Version(Reply):
    version: str
