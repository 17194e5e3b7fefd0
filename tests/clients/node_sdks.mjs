// One call of an official Node SDK through a proxy: node node_sdks.mjs CALL PROXY_URL TOKEN MODEL
// Prints {text, usage, requests} of the answer, or {error, requests} of the exception, as JSON.
// The SDKs are resolved from the folder that IRONCAGE_NODE_MODULES names.
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.env.IRONCAGE_NODE_MODULES, "resolve-from-here.js"));
const OpenAI = require("openai").default;
const Anthropic = require("@anthropic-ai/sdk").default;
const [call, url, token, model] = process.argv.slice(2);
const messages = [{ role: "user", content: "Count the canaries in the cave." }];

let requests = 0;
const counted = (...args) => { requests += 1; return fetch(...args); };
const openai = () => new OpenAI({ baseURL: url + "/v1", apiKey: token, fetch: counted });
const anthropic = () => new Anthropic({ baseURL: url, apiKey: token, fetch: counted });

const CALLS = {
  async "resolve"() {
    return {};
  },
  async "chat"() {
    const answer = await openai().chat.completions.create({ model, messages });
    return { text: answer.choices[0].message.content, usage: answer.usage };
  },
  async "chat stream"() {
    let text = "", usage = null;
    for await (const chunk of await openai().chat.completions.create(
      { model, messages, stream: true })) {
      text += chunk.choices[0].delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    return { text, usage };
  },
  async "responses stream"() {
    const stream = openai().responses.stream({ model, input: messages });
    let text = "";
    stream.on("response.output_text.delta", (event) => { text += event.delta; });
    const answer = await stream.finalResponse();
    return { text, final: answer.output_text, usage: answer.usage };
  },
  async "message"() {
    const answer = await anthropic().messages.create({ model, messages, max_tokens: 1000 });
    return { text: answer.content[0].text, usage: answer.usage };
  },
  async "message stream"() {
    const stream = anthropic().messages.stream({ model, messages, max_tokens: 1000 });
    let text = "";
    stream.on("text", (piece) => { text += piece; });
    const answer = await stream.finalMessage();
    return { text, final: answer.content[0].text, usage: answer.usage };
  },
};

let result;
try {
  result = await CALLS[call]();
} catch (error) {
  const body = error.error?.error ?? error.error;       // the two SDKs nest it differently
  result = { error: { name: error.constructor.name, status: error.status,
                      message: body?.message, type: body?.type, requestID: error.requestID } };
}
console.log(JSON.stringify({ ...result, requests }));
