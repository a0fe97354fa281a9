"""LangChain's ChatOpenAI and OpenAIEmbeddings; the base URL comes from the environment."""

import json

import openai
from langchain_openai import ChatOpenAI, OpenAIEmbeddings  # type: ignore[import-not-found]
from pydantic import BaseModel


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


def weather(city: str) -> str:
    """The weather of a city."""
    return city


model = ChatOpenAI(model="bench", seed=7)
whole = model.invoke("hi")
stream = "".join(part.content for part in model.stream("hi"))
calls = model.bind_tools([weather]).invoke("hi").tool_calls
first, *rest = model.bind_tools([weather]).stream("hi")
streamed_calls = sum(rest, start=first).tool_calls
person = model.with_structured_output(Person).invoke("who")
vectors = OpenAIEmbeddings(model="bench", check_embedding_ctx_length=False).embed_documents(["a", "b"])
try:
    ChatOpenAI(model="bench", model_kwargs={"user": "wrong"}).invoke("hi")
except openai.BadRequestError as error:
    fault = str(error)
output = {
    "text": whole.content,
    "stream": stream,
    "tools": [(call["name"], call["args"]) for call in calls],
    "streamed_tools": [(call["name"], call["args"]) for call in streamed_calls],
    "tokens": whole.usage_metadata["total_tokens"],
    "json": person.model_dump(),
    "vectors": vectors,
    "fault": fault,
}
print(json.dumps(output))  # noqa: T201
