"""The part of OpenAI's chat protocol that is spoken, and the preference that it carries besides."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_MESSAGES, MOST_RESPONSES = 64, 8
MOST_STOPS, LONGEST_STOP = 4, 256


class TextPart(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of the conversation."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if isinstance(content, list):
            return "".join(TextPart.model_validate(part).text for part in content)
        return content


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request for a response; a field that is not known is an error, since it would change nothing."""

    model_config = ConfigDict(extra="forbid")
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    preference: dict[str, float] | None = None
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(1, ge=1, le=MOST_RESPONSES)
    stop: list[str] | str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # said by clients as a matter of course, and of no consequence for the response
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    # what they say where nothing is asked of it
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None
    top_k: Literal[0, -1] | None = None
    min_p: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    modalities: list[Literal["text"]] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, fields: Any) -> Any:
        """Drop fields that say nothing."""
        return (
            {key: value for key, value in fields.items() if value is not None} if isinstance(fields, dict) else fields
        )

    @field_validator("stop", mode="after")
    @classmethod
    def _list(cls, stop: list[str] | str | None) -> list[str]:
        texts = [stop] if isinstance(stop, str) else list(stop or [])
        if any(not text for text in texts):
            raise ValueError("a text that ends the response must not be empty")
        if len(texts) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in texts):
            raise ValueError(f"expected at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters")
        return texts

    @property
    def tokens(self) -> int | None:
        """Of the response at most, where it is said."""
        return self.max_completion_tokens or self.max_tokens
