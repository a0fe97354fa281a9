"""The OpenAI Agents SDK with its defaults, which is /v1/responses; the base URL comes from the environment."""

import asyncio
import json

from agents import (  # type: ignore[import-not-found]
    Agent,
    ModelSettings,
    RunConfig,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

called: list[tuple[str, dict[str, str]]] = []


class Person(BaseModel):
    """The output of the agent that answers in JSON."""

    name: str
    age: int


@function_tool  # type: ignore[untyped-decorator]
def weather(city: str) -> str:
    """The weather of a city."""
    called.append(("weather", {"city": city}))
    return "sunny"


async def main() -> None:
    """Asks in each way."""
    set_tracing_disabled(True)
    set_default_openai_client(AsyncOpenAI(), use_for_tracing=False)
    settings = ModelSettings(extra_body={"seed": 7}, include_usage=True)
    plain = Agent(name="plain", instructions="Be kind.", model="bench", model_settings=settings)
    whole = await Runner.run(plain, "hi")
    streamed = Runner.run_streamed(plain, "hi")
    stream = "".join(
        [
            event.data.delta
            async for event in streamed.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
    )
    assert streamed.final_output == stream
    agent = Agent(name="tools", model="bench", tools=[weather])
    after = await Runner.run(agent, "hi")
    assert after.final_output == whole.final_output
    tools = sorted(called, key=lambda call: call[1]["city"])
    called.clear()
    streaming = Runner.run_streamed(agent, "hi")
    async for _ in streaming.stream_events():
        pass
    assert streaming.final_output == whole.final_output
    streamed_tools = sorted(called, key=lambda call: call[1]["city"])
    typed = await Runner.run(Agent(name="typed", model="bench", output_type=Person), "hi", run_config=RunConfig())
    second = await Runner.run(plain, "second question", previous_response_id=whole.last_response_id)
    assert second.final_output == whole.final_output
    replayed = await Runner.run(plain, [*after.to_input_list(), {"role": "user", "content": "third question"}])
    assert replayed.final_output == whole.final_output
    usage = whole.context_wrapper.usage
    output = {
        "text": whole.final_output,
        "stream": stream,
        "tools": tools,
        "streamed_tools": streamed_tools,
        "tokens": usage.input_tokens + usage.output_tokens,
        "json": typed.final_output.model_dump(),
    }
    print(json.dumps(output))  # noqa: T201


asyncio.run(main())
