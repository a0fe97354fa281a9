// The Vercel AI SDK: its OpenAI provider uses /v1/responses by default, the compatible one /v1/chat/completions.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.env.OPENAI_BASE_URL;
const openai = createOpenAI({ baseURL });
const compatible = createOpenAICompatible({ name: "market", baseURL, includeUsage: true });
const models = { responses: openai("bench"), chat: openai.chat("bench"), compatible: compatible("bench") };
const outputs = {};

for (const [name, model] of Object.entries(models)) {
  let called = [];
  const tools = {
    weather: tool({
      description: "The weather of a city.",
      inputSchema: z.object({ city: z.string() }),
      execute: async ({ city }) => {
        called.push(["weather", { city }]);
        return "sunny";
      },
    }),
  };
  const whole = await generateText({ model, prompt: "hi", system: "Be kind.", maxRetries: 0 });
  let stream = "";
  const streaming = streamText({ model, prompt: "hi", maxRetries: 0, onError: ({ error }) => { throw error; } });
  for await (const part of streaming.textStream) stream += part;
  const looped = await generateText({ model, prompt: "hi", tools, stopWhen: stepCountIs(3), maxRetries: 0 });
  const asked = called;
  called = [];
  const streamed = streamText({ model, prompt: "hi", tools, stopWhen: stepCountIs(3), maxRetries: 0 });
  await streamed.consumeStream();
  const typed = await generateText({
    model,
    prompt: "hi",
    output: Output.object({ schema: z.object({ name: z.string(), age: z.number() }) }),
    maxRetries: 0,
  });
  // The second turn sends what the first one returned: the OpenAI provider sends references to items.
  const messages = [
    { role: "user", content: "hi" },
    ...whole.response.messages,
    { role: "user", content: "and again?" },
  ];
  const second = await generateText({ model, messages, maxRetries: 0 });
  const after = await generateText({
    model,
    messages: [{ role: "user", content: "hi" }, ...looped.response.messages, { role: "user", content: "thanks" }],
    maxRetries: 0,
  });
  if ([looped.text, await streamed.text, second.text, after.text].some((text) => text !== whole.text)) {
    throw new Error(`${name}: ${JSON.stringify([looped.text, await streamed.text, second.text, after.text])}`);
  }
  if ((await streaming.usage).outputTokens !== whole.usage.outputTokens) throw new Error(`${name}: usage of the stream`);
  outputs[name] = {
    text: whole.text,
    stream,
    tools: asked,
    streamed_tools: called,
    tokens: whole.usage.inputTokens + whole.usage.outputTokens,
    json: typed.output,
  };
}
const first = await generateText({ model: models.responses, prompt: "hi" });
const previousResponseId = first.providerMetadata.openai.responseId;
const next = await generateText({
  model: models.responses,
  prompt: "by its id",
  providerOptions: { openai: { previousResponseId } },
});
if (next.text !== first.text) throw new Error(next.text);
const { embeddings } = await embedMany({ model: openai.embedding("bench"), values: ["a", "b"] });
outputs.responses.vectors = embeddings;
console.log(JSON.stringify(outputs));
