// A chat with a model through the gateway's own API. Answers are text: they are never parsed as HTML.

const [form, model, prompt, send, stop] = ["chat", "model", "prompt", "send", "stop"].map((id) => document.getElementById(id));
const conversation = document.getElementById("conversation");
const state = document.getElementById("state");
const messages = [];
let running = null;

function add(who, text) {
  const entry = document.createElement("div");
  const [name, body] = [document.createElement("strong"), document.createElement("div")];
  entry.className = `message ${who}`;
  name.textContent = who === "user" ? "You" : model.value;
  body.className = "text";
  body.textContent = text;
  entry.append(name, body);
  conversation.append(entry);
  return entry;
}

/** The events of a stream of server-sent events, as parsed JSON, until [DONE]. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(":")) state.textContent = line.slice(1).trim();
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function showCost(job, entry) {
  for (let attempt = 0; attempt < 20; attempt += 1) {
    const answer = await fetch(`/tally/jobs/${job}`);
    const known = answer.ok ? await answer.json() : {};
    if (known.cost !== null && known.cost !== undefined) {
      const note = document.createElement("small");
      const link = document.createElement("a");
      note.className = "note";
      link.href = `/tally/pages/jobs/${job}`;
      link.textContent = `${known.costDollars} dollars`;
      note.append(link, `, ${known.usage.inputTokens} + ${known.usage.outputTokens} tokens, ${known.provider}`);
      entry.append(note);
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  add("user", text);
  running = new AbortController();
  const [entry, began] = [add("assistant", ""), performance.now()];
  const body = entry.querySelector(".text");
  let job = null;
  try {
    const request = { model: model.value, messages, stream: true };
    const headers = { "content-type": "application/json" };
    const answer = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(request), signal: running.signal });
    job = answer.headers.get("x-tally-job");
    if (!answer.ok) throw new Error((await answer.json()).error?.message ?? `status ${answer.status}`);
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices?.[0]?.delta ?? {};
      body.append(delta.content ?? delta.reasoning_content ?? "");
    }
    state.textContent = `Answered in ${((performance.now() - began) / 1000).toFixed(1)} s.`;
  } catch (error) {
    state.textContent = error.name === "AbortError" ? "Stopped; what was delivered is charged." : `Failed: ${error.message}`;
    if (!body.textContent) entry.remove();
  }
  if (body.textContent) messages.push({ role: "assistant", content: body.textContent });
  else messages.pop();
  if (job) await showCost(job, entry);
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || running) return;
  prompt.value = "";
  [send.disabled, stop.disabled] = [true, false];
  state.textContent = "Waiting for the first token";
  await ask(text);
  running = null;
  [send.disabled, stop.disabled] = [false, true];
  prompt.focus();
});
stop?.addEventListener("click", () => running?.abort());
prompt?.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
