"""The official OpenAI package with `tally gateway`: only the base URL changes."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8421/v1"), api_key="unused")
model = os.environ.get("TALLYSTICK_MODEL") or client.models.list().data[0].id
# Options beside OpenAI's own: the choice of provider, and the highest cost in dollars.
options = {"X-Tally-Options": '{"sort": "latency", "max_cost": "0.01"}'}
question = "What is a tally stick?"
stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": question}], max_tokens=200, stream=True, extra_headers=options
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
