"""LiteLLM's SDK."""

import json
import os

import litellm  # type: ignore[import-not-found]

AT = {"model": "openai/bench", "api_base": os.environ["OPENAI_BASE_URL"], "api_key": "unused"}
HI = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}

whole = litellm.completion(**AT, messages=HI, seed=7)
parts = litellm.completion(**AT, messages=HI, stream=True)
text = "".join(part.choices[0].delta.content or "" for part in parts)
tools = litellm.completion(**AT, messages=HI, tools=[TOOL])
calls = [(call.function.name, json.loads(call.function.arguments)) for call in tools.choices[0].message.tool_calls]
vectors = litellm.embedding(**AT, input=["a", "b"], encoding_format="float")
try:
    litellm.completion(**AT, messages=HI, extra_body={"user": "wrong"})
except litellm.BadRequestError as error:
    fault = str(error)
text = whole.choices[0].message.content
print(  # noqa: T201
    json.dumps(
        {
            "text": text,
            "stream": text,
            "tools": calls,
            "tokens": whole.usage.total_tokens,
            "vectors": [entry["embedding"] for entry in vectors.data],
            "fault": fault,
        }
    )
)
