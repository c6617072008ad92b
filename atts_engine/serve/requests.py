"""What requests may say. Strict: a wrong type, an unknown field or a value out of range is refused by name.

A field of OpenAI's that the engine has no way to honour is allowed at the value that changes nothing, since clients
send those unasked; fields that could not change an answer are accepted and not used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from atts_engine.pipeline import VOTES
from atts_engine.pipeline.params import POLICIES

MAX_TOKENS = 1 << 20
MAX_TEXT = 1 << 22
MAX_PROMPTS = 64
MAX_STOPS = 16

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Zero = Annotated[float, Field(ge=0.0, le=0.0)]
One = Annotated[float, Field(ge=1.0, le=1.0)]
Nothing = Annotated[list[Any], Field(max_length=0)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class AttsOptions(Strict):
    """Makes a request one of ATTS: the draft writes chains, the target scores and takes over, chains vote. What is
    left out is as the server was started."""

    chains: int | None = Field(None, ge=1, le=4096, description="chains written for the request")
    turns: int | None = Field(None, ge=1, le=1024, description="turns of a chain at most")
    draft_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="tokens of a draft span at most")
    target_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="tokens of a target span at most")
    alpha: float | None = Field(None, gt=0.0, lt=1.0, description="nominal share of spans that are taken over")
    policy: Literal[POLICIES] | None = Field(None, description="how many takeovers a turn may have")  # type: ignore[valid-type]
    vote: Literal[VOTES] | None = Field(None, description="how chains become an answer")  # type: ignore[valid-type]
    verdicts: bool = Field(False, description="tell the verdict on every span of every chain")


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class TextFormat(Strict):
    type: Literal["text"] = "text"


class Sampling(Strict):
    """What chat and text completions have in common."""

    model: str = Field(max_length=1024)
    atts: AttsOptions | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    n: int | None = Field(None, ge=1, le=4096)
    temperature: float | None = Field(None, ge=0.0, le=100.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS, description="-1 and 0: off")
    min_p: float | None = Field(None, ge=0.0, lt=1.0)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool = False
    priority: int = Field(0, ge=0, le=1000, description="requests with a higher number are served after those of 0")
    timeout_s: float | None = Field(None, gt=0.0, le=86400.0, description="ends with what there is by then")

    # At the value that changes nothing.
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    repetition_penalty: One | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    min_tokens: int | None = Field(None, ge=0, le=0)
    skip_special_tokens: Literal[True] | None = None
    use_beam_search: Literal[False] | None = None

    # Without an effect on the answer.
    user: Text | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    name: Text | None = None
    # What clients hand back of an answer.
    refusal: None = None
    tool_calls: Nothing | None = None
    function_call: None = None
    audio: None = None
    annotations: Nothing | None = None

    def plain(self) -> dict[str, str]:
        """As a chat template wants it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class ChatRequest(Sampling):
    """`/v1/chat/completions`"""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=0, description="alternatives are not told")
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(Sampling):
    """`/v1/completions`"""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=1, description="0 or 1: of each token that was sampled")
    best_of: int | None = Field(None, ge=1, le=4096, description="as `n`")
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]


class ScoreRequest(Strict):
    """`/v1/score`: how likely the target finds each span after the prefix, which is a text, token ids, or a chat up to
    where its answer begins. Prefix and spans are turned into tokens apart."""

    model: str = Field(max_length=1024)
    prompt: Text | TokenIds | None = None
    messages: Messages | None = None
    spans: Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    logprobs: bool = Field(False, description="tell the log-probability of every token")


class TokenizeRequest(Strict):
    """`/tokenize`: tokens of a text, or of a chat up to where its answer begins."""

    model: str | None = Field(None, max_length=1024)
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="accepted and not used: nothing is added around a text")
    add_generation_prompt: Literal[True] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """`/detokenize`: text of token ids, special tokens included."""

    model: str | None = Field(None, max_length=1024)
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]
