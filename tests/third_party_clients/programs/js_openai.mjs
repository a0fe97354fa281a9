// The official JavaScript package; the base URL comes from the environment.
import OpenAI from "openai";

const client = new OpenAI();
const messages = [{ role: "user", content: "hi" }];
const parameters = { type: "object", properties: { city: { type: "string" } } };
const tools = [{ type: "function", function: { name: "weather", parameters } }];

const whole = await client.chat.completions.create({ model: "bench", messages, seed: 7 });
let stream = "";
for await (const part of await client.chat.completions.create({ model: "bench", messages, stream: true })) {
  stream += part.choices[0]?.delta?.content ?? "";
}
const helper = client.chat.completions.stream({ model: "bench", messages, tools });
const streamed = (await helper.finalChatCompletion()).choices[0].message.tool_calls;
const asked = await client.chat.completions.create({ model: "bench", messages, tools });
const named = (calls) => calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]);
const vectors = await client.embeddings.create({ model: "bench", input: ["a", "b"], encoding_format: "float" });
let fault = "";
try {
  await client.chat.completions.create({ model: "bench", messages, user: "wrong" });
} catch (error) {
  if (!(error instanceof OpenAI.BadRequestError)) throw error;
  fault = error.message;
}
const { response } = await client.chat.completions.create({ model: "bench", messages }).withResponse();
if (!response.headers.get("x-tally-receipt")) throw new Error("no receipt");
console.log(JSON.stringify({
  text: whole.choices[0].message.content,
  stream,
  tools: named(asked.choices[0].message.tool_calls),
  streamed_tools: named(streamed),
  tokens: whole.usage.total_tokens,
  vectors: vectors.data.map((one) => one.embedding),
  fault,
}));
