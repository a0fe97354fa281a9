"""Whose fault an engine's error is, by its words."""

from __future__ import annotations

from typing import Any

import pytest

from tallystick.protocol.engine_errors import error_status

OF_THE_REQUEST = [
    "image input is not supported",
    "image input is not supported by this server",
    "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj",
    "audio input is not supported - hint: if this is unexpected, you may need to provide the mmproj",
    "This server does not support embeddings. Start it with `--embeddings`",
    "This server does not support reranking. Start it with `--reranking`",
    "This server does not support completions. Start it without `--embeddings`",
    "tools must be an array",
    "tools param requires --jinja flag",
    "tool_choice param requires --jinja flag",
    "'messages' is required",
    "Expected 'messages' to be an array",
    "unsupported content[].type",
    "Failed to parse messages: Missing 'content'",
    "Failed to load image or audio file",
    "Invalid role",
    'Either "json_schema" or "grammar" can be specified, but not both',
    "Cannot use both json_schema and grammar",
    "Cannot use custom grammar constraints with tools.",
    "Only no echo is supported",
    "Unsupported param: tools",
    '"prompt" must be a string, an array of strings or an array of integers',
    "the request exceeds the available context size, try increasing it",
    "request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it",
    "input is too large to process. increase the physical batch size",
    "Failed to parse grammar",
    "Failed to initialize samplers",
    "[json.exception.type_error.302] type must be string, but is null",
    "[json.exception.out_of_range.403] key 'content' not found",
    "[json.exception.parse_error.101] parse error at line 1, column 5: syntax error",
    "Conversation roles must alternate user/assistant/user/assistant/...",
    "System role not supported",
    "Only user and assistant roles are supported!",
    "After the optional system message, conversation roles must alternate",
    'JSON schema conversion failed: Unrecognized schema: {"not":{}}',
    'Unsupported: failed to apply chat template: Failed to parse tools: Missing tool function: {"type":"function"}',
    "2 validation errors for Message content.str",
    '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
    "At most 1 image(s) may be provided in one prompt.",
    "The model does not support Embeddings API",
    "llama is not a multimodal model",
    "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
    "The decoder prompt (length 5000) is longer than the maximum model length of 4096",
    "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
    "Requested token count exceeds the model's maximum context length of 4096 tokens.",
    "registry.ollama.ai/library/gemma:2b does not support tools",
    "this model is missing data required for image input",
    "unable to process image / image: unknown format",
    "Failed to create new sequence: failed to process inputs: image: unknown format",
    "the input length exceeds the context length",
    "json: cannot unmarshal string into Go struct field ChatRequest.tools of type []api.Tool",
    'invalid format: "x"; expected "json" or a valid JSON Schema object',
    "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens",
    "Template error: invalid operation",
    "Tool error: function not found",
    "litellm.BadRequestError: OpenAIException - Invalid value",
    "litellm.UnsupportedParamsError: gemma does not support parameters: ['tools']",
    "litellm.ContextWindowExceededError: prompt is too long",
    "unexpected shape for input 'text_input'",
    "The sum of prompt length (9000) and query length max_tokens (10) should not exceed max_num_tokens (8192)",
    "Trying to keep the first 5000 tokens when context the overflows. The model is loaded with a context of only 4096 tokens",
    "Model does not support images. Please use a model that does.",
    "'response_format.type' must be 'json_schema' or 'text'",
    "Unsupported value: 'temperature' does not support 0.2 with this model.",
    "Unrecognized request argument supplied: foo",
    "The response was filtered due to the prompt triggering content management policy",
    "logprobs is not supported with this engine",
    "guided decoding is not supported",
    "Value for field max_tokens should be less than 4096",
    "top_logprobs must be between 0 and 20",
    "n must be 1",
    "Structured output is not supported by this backend type",
    "Multiple choices (n>1) are not supported",
    "The model does not support function calling",
    "Tool calling is not enabled for this model",
    "stream_options can only be set when stream is true",
    "Internal server error: tools must be an array",
    "internal error: messages[0].role must be one of system, user",
    "Speech synthesis is not supported by this model",
    "No endpoints found that support image input",
    "Invalid base64-encoded string: number of data characters cannot be 1 more than a multiple of 4",
    "cannot identify image file",
    "Could not decode image",
    "video input is not supported",
    "unsupported audio format",
    "'tools' field is not allowed",
    "Mismatch in `image` token count between text and `input_ids`",
    "Prompt contains 1 image placeholders but 2 images were given",
    "No user query found in messages.",
    "Expected content to be a string or list",
]
OF_THE_ENGINE = [
    "Internal Server Error",
    "Internal server error",
    "CUDA out of memory: the batch is not supported",
    "CUDA error: device-side assert triggered",
    "EngineCore encountered an issue. See stack trace (above) for the root cause.",
    "Background loop has errored already.",
    "AsyncEngineDeadError: Background loop is stopped",
    "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error",
    "llama runner process has terminated: exit status 2",
    "unable to load model: /root/.ollama/models/blobs/sha256-x",
    "model requires more system memory (12 GiB) than is available (8 GiB)",
    "Cannot free enough memory. Need 33.02GB, current usage 73.91GB, all loaded models are pinned.",
    "litellm.APIConnectionError: OllamaException - Cannot connect to host localhost:11434",
    "litellm.InternalServerError: Connection error.",
    "connection refused",
    "dial tcp 127.0.0.1:8080: connect: connection refused",
    "upstream connect error or disconnect/reset before headers",
    "502 Bad Gateway nginx",
    "Worker died",
    "'NoneType' object is not subscriptable",
    "Request failed during generation: Server error: CUDA error",
    "list index out of range",
    "Compute error.",
    "Error processing request",
    "An error occurred",
    "unknown error",
    "RuntimeError: expected all tensors to be on the same device",
    "The server had an error while processing your request. Sorry about that!",
    "failed to decode the batch: KV cache is full - try increasing it via the context size",
    "failed to find a memory slot",
    "llama_decode failed",
    "something went wrong",
    "Inference failed",
    "slot is not available",
    "all slots are busy",
    "No healthy deployments available",
    "Incorrect API key provided",
    "token expired",
    "model not found",
    "lost connection to worker",
    "The engine is currently overloaded, please try again later",
    "inference request timed out",
    "failed to restore kv cache",
    "TypeError: unsupported operand type(s) for +: 'NoneType' and 'int'",
    "disk quota exceeded",
]
FORMS = ["openai", "detail", "bare"]


def report(form: str, words: str) -> dict[str, Any]:
    """An error of status 500 in one of the forms that engines use."""
    if form == "openai":
        return {"error": {"code": 500, "message": words, "type": "server_error"}}
    return {"detail": words} if form == "detail" else {"code": 500, "message": words, "type": "internal_error"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("words", OF_THE_REQUEST)
def test_words_that_blame_the_request(words: str, form: str) -> None:
    """What every engine would say to the same request is the request's error, whatever status it came with."""
    assert error_status(report(form, words)) == 400


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("words", OF_THE_ENGINE)
def test_words_that_blame_the_engine(words: str, form: str) -> None:
    """A failure that another provider need not have leaves the job to another provider."""
    assert error_status(report(form, words)) != 400


@pytest.mark.parametrize("words", ["must " * 20_000, "image " * 20_000, "x must image" * 5_000, "a" * 100_000])
def test_long_words_are_judged_by_their_beginning(words: str) -> None:
    """A bounded part of an error decides, so an engine cannot keep its node busy with one."""
    padded = error_status(report("bare", words + " cuda"))
    assert padded == error_status(report("bare", words))
