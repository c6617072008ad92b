"""What requests may say. Strict: a wrong type, an unknown field or a value out of range is refused by name.

Null is a field left out. A field of OpenAI's or vLLM's that the engine has no way to honour is allowed at the value
that changes nothing, since clients send those unasked; hints, and fields that could not change an answer, are accepted
and not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from atts_engine.pipeline import VOTES
from atts_engine.pipeline.params import POLICIES

MAX_TOKENS = 1 << 20
MAX_TEXT = 1 << 22
MAX_PROMPTS = 64
MAX_STOPS = 16

CANNOT = "this server cannot do that; leave the field out"
TEXT_ALONE = "text is all that is read here, no images, sound or files; leave the part out"


def _or(message: str) -> WrapValidator:
    """Whatever is wrong with a value, say this."""

    def validated(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            raise PydanticCustomError("unsupported", message) from error

    return WrapValidator(validated)


T = TypeVar("T")
Neutral = Annotated[T | None, _or(CANNOT)]
"""Taken at the value that changes nothing."""
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Zero = Annotated[float, Field(ge=0.0, le=0.0)]
One = Annotated[float, Field(ge=1.0, le=1.0)]
Nothing = Annotated[list[Any], Field(max_length=0)]
Label = Annotated[str, Field(max_length=1024)]
TimeoutS = Annotated[float | None, Field(gt=0.0, le=86400.0, description="of the request, from its admission")]


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
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = Field(None, description="accepted and not used: nothing is padded")


class TextFormat(Strict):
    type: Literal["text"] = "text"


class Sampling(Strict):
    """What chat and text completions have in common. prompt_name, limit_name: the fields that say what is gone on from,
    and for how long."""

    prompt_name: ClassVar[str] = "prompt"

    model: str | None = Field(None, max_length=1024)
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
    ignore_eos: bool | None = None
    priority: int | None = Field(
        None, ge=0, le=1000, description="those with a higher number are served after those of 0"
    )
    timeout_s: TimeoutS = None

    # At the value that changes nothing.
    presence_penalty: Neutral[Zero] = None
    frequency_penalty: Neutral[Zero] = None
    repetition_penalty: Neutral[One] = None
    logit_bias: Neutral[Annotated[dict[str, float], Field(max_length=0)]] = None
    min_tokens: Neutral[Annotated[int, Field(ge=0, le=0)]] = None
    length_penalty: Neutral[One] = None
    skip_special_tokens: Neutral[Literal[True]] = None
    spaces_between_special_tokens: Neutral[Literal[True]] = None
    include_stop_str_in_output: Neutral[Literal[False]] = None
    use_beam_search: Neutral[Literal[False]] = None
    return_token_ids: Neutral[Literal[False]] = None
    return_tokens_as_token_ids: Neutral[Literal[False]] = None
    bad_words: Neutral[Nothing] = None
    allowed_token_ids: None = None
    truncate_prompt_tokens: None = None
    prompt_logprobs: None = None
    structured_outputs: None = None
    echo: Neutral[Literal[False]] = None

    # Without an effect on the answer.
    user: Text | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    cache_salt: Label | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit_name(self) -> str:
        return "max_tokens"

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class TextPart(Strict):
    type: Annotated[Literal["text"], _or(TEXT_ALONE)]
    text: Text


class CalledFunction(Strict):
    name: Label
    arguments: Text


class ToolCall(Strict):
    """That an earlier answer of another server made."""

    id: Label
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """Templates spell arguments out themselves: they want them as an object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Message(Strict):
    """Of a tool's part in a chat its record alone can be told: the template must have a place for it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Label | None = None
    # What clients hand back of an answer.
    refusal: None = None
    function_call: None = None
    audio: None = None
    annotations: Nothing | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to messages of the assistant")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("tool_call_id belongs to messages of role tool, and each of them needs one")
        if not self.content and self.content != "" and self.role != "assistant":
            raise ValueError("content is missing: the assistant's alone may be left out")
        return self

    def plain(self) -> dict[str, Any]:
        """As a chat template wants it."""
        parts = self.content if isinstance(self.content, list) else ()
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        made: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            made["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            made["tool_call_id"] = self.tool_call_id
        return made


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class ChatRequest(Sampling):
    """`/v1/chat/completions`"""

    prompt_name: ClassVar[str] = "messages"

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="likeliest tokens told at each place")
    tools: Neutral[Nothing] = None
    tool_choice: Neutral[Literal["none", "auto"]] = None
    functions: Neutral[Nothing] = None
    function_call: Neutral[Literal["none", "auto"]] = None
    response_format: Neutral[TextFormat] = None
    add_generation_prompt: Neutral[Literal[True]] = None
    continue_final_message: Neutral[Literal[False]] = None
    add_special_tokens: Neutral[Literal[False]] = None
    documents: Neutral[Nothing] = None
    chat_template: None = None
    chat_template_kwargs: Neutral[Annotated[dict[str, Any], Field(max_length=0)]] = None
    thinking_token_budget: None = None
    modalities: Neutral[list[Literal["text"]]] = None
    audio: None = None
    web_search_options: None = None
    store: Neutral[Literal[False]] = None

    # Hints, and what has no effect on the answer.
    parallel_tool_calls: bool | None = None
    reasoning_effort: Label | None = None
    include_reasoning: bool | None = None
    verbosity: Label | None = None
    prediction: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Label | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def limit_name(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"

    @property
    def alternatives(self) -> int | None:
        """Likeliest tokens told beside each log-probability; None where none is told."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """`/v1/completions`"""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=5, description="likeliest tokens told beside each that was sampled")
    best_of: int | None = Field(None, ge=1, le=4096, description="as `n`")
    suffix: Neutral[Literal[""]] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]


class ScoreRequest(Strict):
    """`/v1/score`: how likely the target finds each span after the prefix, which is a text, token ids, or a chat up to
    where its answer begins. Prefix and spans are turned into tokens apart."""

    model: str | None = Field(None, max_length=1024)
    prompt: Text | TokenIds | None = None
    messages: Messages | None = None
    spans: Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    logprobs: bool = Field(False, description="tell the log-probability of every token")
    timeout_s: TimeoutS = None


class TokenizeRequest(Strict):
    """`/tokenize`: tokens of a text, or of a chat up to where its answer begins."""

    model: str | None = Field(None, max_length=1024)
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="accepted and not used: nothing is added around a text")
    add_generation_prompt: Neutral[Literal[True]] = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """`/detokenize`: text of token ids, special tokens included."""

    model: str | None = Field(None, max_length=1024)
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


FIELDS = frozenset(name for model in (AttsOptions, ChatRequest, CompletionRequest) for name in model.model_fields)
"""What a field that is not known may have been meant for."""
