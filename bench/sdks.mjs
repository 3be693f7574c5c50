// The official npm SDKs against a server; bench/npm_sdks.py runs it.
//   node sdks.mjs URL MODEL     in a folder where openai and @anthropic-ai/sdk are installed
import { createRequire } from "node:module";
import assert from "node:assert/strict";

const require = createRequire(process.cwd() + "/");
const OpenAI = require("openai").OpenAI;
const Anthropic = require("@anthropic-ai/sdk").Anthropic;
const [url, model] = process.argv.slice(2);
const gpt = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const claude = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "hi" }];
const schema = { type: "object", properties: { place: { type: "string" } }, required: ["place"] };
const tools = [{ type: "function", function: { name: "get_weather", parameters: schema } }];
const answer = "Good day, three words.";

const checks = {
  async chat() {
    const found = await gpt.chat.completions.create({ model, messages });
    assert.equal(found.choices[0].message.content, answer);
  },
  async "chat, streamed"() {
    const options = { stream: true, stream_options: { include_usage: true } };
    const stream = await gpt.chat.completions.create({ model, messages, ...options });
    let text = "", usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, answer);
    assert.ok(usage.total_tokens > 0);
  },
  async "chat, a streamed call"() {
    const stream = gpt.chat.completions.stream({ model, messages, tools });
    const call = (await stream.finalChatCompletion()).choices[0].message.tool_calls[0];
    assert.equal(JSON.parse(call.function.arguments).days, 3);
  },
  async completions() {
    const found = await gpt.completions.create({ model, prompt: "hi", max_tokens: 50 });
    assert.equal(found.choices[0].text, answer);
  },
  async responses() {
    const found = await gpt.responses.create({ model, input: "hi" });
    assert.equal(found.output_text, answer);
    const next = { model, input: "more", previous_response_id: found.id };
    assert.equal((await gpt.responses.create(next)).output_text, answer);
  },
  async "responses, streamed"() {
    const stream = gpt.responses.stream({ model, input: "hi" });
    assert.equal((await stream.finalResponse()).output_text, answer);
  },
  async messages() {
    const found = await claude.messages.create({ model, max_tokens: 100, messages });
    assert.equal(found.content[0].text, answer);
  },
  async "messages, a streamed call"() {
    const named = [{ name: "get_weather", input_schema: schema }];
    const options = { model, max_tokens: 500, messages, tools: named };
    const found = await claude.messages.stream(options).finalMessage();
    assert.equal(found.content.at(-1).input.days, 3);
  },
  async "count_tokens"() {
    assert.ok((await claude.messages.countTokens({ model, messages })).input_tokens > 0);
  },
  async models() {
    assert.equal((await gpt.models.list()).data[0].id, model);
    assert.equal((await claude.models.list()).data[0].id, model);
  },
  async errors() {
    await assert.rejects(gpt.chat.completions.create({ model, messages: [] }), OpenAI.BadRequestError);
    const empty = { model, max_tokens: 9, messages: [] };
    await assert.rejects(claude.messages.create(empty), Anthropic.BadRequestError);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log("ok", name);
}
