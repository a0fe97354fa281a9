"""LlamaIndex's OpenAILike; the base URL comes from the environment."""

import json
import os

import openai
from llama_index.core.llms import ChatMessage  # type: ignore[import-not-found]
from llama_index.core.tools import FunctionTool  # type: ignore[import-not-found]
from llama_index.llms.openai_like import OpenAILike  # type: ignore[import-not-found]


def weather(city: str) -> str:
    """The weather of a city."""
    return city


common = {"model": "bench", "api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
model = OpenAILike(**common, is_chat_model=True, is_function_calling_model=True, additional_kwargs={"seed": 7})
prompts = [ChatMessage(role="user", content="hi")]
tools = [FunctionTool.from_defaults(weather)]
whole = model.chat(prompts)
stream = "".join(part.delta for part in model.stream_chat(prompts))
calls = model.get_tool_calls_from_response(model.chat_with_tools(tools, user_msg="hi", allow_parallel_tool_calls=True))
*_, last = model.stream_chat_with_tools(tools, user_msg="hi", allow_parallel_tool_calls=True)
streamed_calls = model.get_tool_calls_from_response(last)
try:
    OpenAILike(**common, is_chat_model=True, additional_kwargs={"user": "wrong"}).chat(prompts)
except openai.BadRequestError as error:
    fault = str(error)
output = {
    "text": whole.message.content,
    "stream": stream,
    "tools": [(call.tool_name, call.tool_kwargs) for call in calls],
    "streamed_tools": [(call.tool_name, call.tool_kwargs) for call in streamed_calls],
    "tokens": whole.raw.usage.total_tokens,
    "fault": fault,
}
print(json.dumps(output))  # noqa: T201
