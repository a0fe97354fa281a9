// Anthropic's official JavaScript package; the base URL comes from the environment.
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ maxRetries: 0 });
const messages = [{ role: "user", content: "hi" }];
const input_schema = { type: "object", properties: { city: { type: "string" } } };
const tools = [{ name: "weather", input_schema }];
const plain = { model: "bench", max_tokens: 50, messages };

const whole = await client.messages.create({ ...plain, seed: 7 });
let stream = "";
for await (const event of await client.messages.create({ ...plain, stream: true })) {
  if (event.type === "content_block_delta") stream += event.delta.text;
}
const asked = await client.messages.create({ ...plain, tools });
const streamed = await client.messages.stream({ ...plain, tools }).finalMessage();
const named = (message) => message.content.map((block) => [block.name, block.input]);
if (streamed.stop_reason !== "tool_use") throw new Error(streamed.stop_reason);
const counted = await client.messages.countTokens({ model: "bench", messages });
if (!(counted.input_tokens > 0)) throw new Error("no count");
const models = [];
for await (const model of client.models.list({ limit: 1 })) models.push(model.id);
if (!models.includes("bench")) throw new Error(models.join());
let fault = "";
try {
  await client.messages.create({ ...plain, user: "wrong" });
} catch (error) {
  if (!(error instanceof Anthropic.BadRequestError)) throw error;
  fault = error.message;
}
console.log(JSON.stringify({
  text: whole.content[0].text,
  stream,
  tools: named(asked),
  streamed_tools: named(streamed),
  tokens: whole.usage.input_tokens + whole.usage.output_tokens,
  fault,
}));
