"""A Pydantic AI agent that calls tools and goes on with what they returned; the base URL comes from the environment."""

import asyncio
import json

from pydantic_ai import Agent  # type: ignore[import-not-found]
from pydantic_ai.models.openai import OpenAIChatModel  # type: ignore[import-not-found]

called: list[tuple[str, dict[str, str]]] = []
plain = Agent(OpenAIChatModel("bench"), model_settings={"seed": 7})
agent = Agent(OpenAIChatModel("bench"))


@agent.tool_plain  # type: ignore[untyped-decorator]
def weather(city: str) -> str:
    """The weather of a city."""
    called.append(("weather", {"city": city}))
    return "sunny"


async def main() -> None:
    """Asks in each way."""
    whole = await plain.run("hi")
    async with plain.run_stream("hi") as streamed:
        stream = "".join([part async for part in streamed.stream_text(delta=True)])
    after = await agent.run("hi")
    assert after.output == whole.output
    usage = whole.usage() if callable(whole.usage) else whole.usage
    called.sort(key=lambda call: call[1]["city"])
    output = {"text": whole.output, "stream": stream, "tools": called, "tokens": usage.input_tokens + usage.output_tokens}
    print(json.dumps(output))  # noqa: T201


asyncio.run(main())
