"""The fields of requests, with their types and ranges; what is wrong is told by field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hmf_jax.serving.errors import ApiError, invalid
from hmf_jax.text import api_messages
from hmf_jax.text.messages import shown

# Fields that say nothing about the answer: accepted, and without effect.
SILENT = {"metadata", "prompt_cache_key", "service_tier", "store", "user"}
MOST_PROMPTS, MOST_IDS, MOST_STOPS, LONGEST_STOP = 512, 1 << 21, 16, 256


def _stops(value: Any) -> Any:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(stop, str) for stop in values):
        raise ValueError("must be a string, or a list of strings")
    if len(values) > MOST_STOPS or not all(1 <= len(stop) <= LONGEST_STOP for stop in values):
        raise ValueError(f"at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters")
    return values


def _prompts(value: Any) -> Any:
    """One prompt or several, each a text or token ids, as a list of them."""

    def ids(prompt: Any) -> bool:
        if isinstance(prompt, list) and len(prompt) > MOST_IDS:
            raise ValueError(f"at most {MOST_IDS:,} token ids, not {len(prompt):,}")
        return isinstance(prompt, list) and bool(prompt) and all(type(i) is int for i in prompt)

    prompts = [value] if isinstance(value, str) or ids(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("must be a text, token ids, or a list of one of them; not empty")
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(f"at most {MOST_PROMPTS} prompts, not {len(prompts)}")
    if not (all(isinstance(p, str) for p in prompts) or all(ids(p) for p in prompts)):
        raise ValueError("must be all texts, or all non-empty lists of token ids")
    return prompts


def _biases(value: dict[str, float]) -> dict[str, float]:
    if len(value) > 1024 or not all(key.isascii() and key.isdigit() for key in value):
        raise ValueError("must be {token id: bias}, of at most 1024 tokens")
    return value


def _schema(value: Any) -> Any:
    if not isinstance(value, dict | bool):
        raise ValueError(f"must be a JSON schema, not {shown(value)}")
    return value


Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, le=20)]  # of most likely tokens
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[str, Bias], AfterValidator(_biases)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Fields(BaseModel):
    """Types are what JSON has: no text is taken for a number, no number for a truth value."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Fields):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[Any, BeforeValidator(_schema)] = Field(None, alias="schema")


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Fields):
    json_: Annotated[Any, BeforeValidator(_schema)] = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Generation(Fields):
    """What both routes have."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    logit_bias: Biases | None = None
    allowed_token_ids: Ids | None = None
    bad_words: list[Name] | None = None
    seed: Int64 | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    include_stop_str_in_output: bool = False
    stop_token_ids: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MOST_STOPS)
    ] = []
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    priority: Int64 = 0
    request_id: Name | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    num_iter: Annotated[int, Field(ge=0, le=1000)] | None = None
    vllm_xargs: dict[str, Any] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Refused, unless they say what holds anyway.
    use_beam_search: bool = False
    logits_processors: Any = None
    prompt_embeds: Any = None
    truncation_side: str = "left"
    suffix: str = ""


class Completion(Generation):
    """POST /v1/completions"""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool = False
    logprobs: Count | None = None
    prompt_logprobs: Count | None = None
    add_special_tokens: bool = True


class Declaration(Fields):
    """A tool's function; whatever else it says is for the chat template."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Fields):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())
    type: Literal["function"] = "function"
    function: Declaration


class NamedFunction(Fields):
    name: Name


class NamedTool(Fields):
    type: Literal["function"] = "function"
    function: NamedFunction


def _tool_choice(value: Any) -> Any:
    if isinstance(value, dict):
        return NamedTool.model_validate(value).function
    if value not in ("none", "auto", "required"):
        raise ValueError('must be "none", "auto", "required", or a function by name')
    return value


Messages = Annotated[list[dict[str, Any]], BeforeValidator(api_messages)]
Tools = Annotated[list[Tool], Field(min_length=1, max_length=1024)]


class Conversation(Fields):
    """Messages, and what a chat template is told besides."""

    messages: Messages
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = False


class Chat(Generation, Conversation):
    """POST /v1/chat/completions"""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tool_choice: Annotated[Any, BeforeValidator(_tool_choice)] = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: Count | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True


class TokenizeText(Fields):
    """POST /tokenize, of a text"""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Conversation):
    """POST /tokenize, of a conversation"""

    model: str | None = None
    return_token_strs: bool = False


class Detokenize(Fields):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class Abort(Fields):
    """POST /abort_request"""

    request_id: str | None = None
    abort_all: bool = False


def read[Kind: Fields](kind: type[Kind], body: Mapping[str, Any]) -> tuple[Kind, list[str]]:
    """The fields of a request, and the names of those that mean nothing here.

    A field that is null counts as absent.

    Raises:
      ApiError: names the field that is wrong.
    """
    given = {name: value for name, value in body.items() if value is not None}
    try:
        fields = kind.model_validate(given)
    except ValidationError as e:
        raise _told(e.errors(include_url=False)[0]) from None
    known = {field.alias or name for name, field in kind.model_fields.items()}
    return fields, sorted(set(given) - known - SILENT)


def _told(error: Mapping[str, Any]) -> ApiError:
    """What pydantic found, in one line that names the field."""
    path = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in error["loc"])
    path = path.removeprefix(".")
    said = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        said = "is required"
    elif said.startswith("Input should be "):
        said = f"must be {said.removeprefix('Input should be ')}, not {shown(error['input'])}"
    elif said.startswith(path):  # names the place itself
        return invalid(said, re.split(r"[ :=]", said)[0])
    elif error["type"] != "value_error":
        said = f"{said[0].lower()}{said[1:]}".replace(" after validation", "")
    return invalid(f"{path}: {said}", path)
