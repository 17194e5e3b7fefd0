// A small agent on the SDKs for Node: sdk_agent.mjs PACKAGE MODEL SCENARIO. The packages are
// looked for in the folder that IRONCAGE_NODE_MODULES names.
import { execSync } from "node:child_process";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [packageName, model, scenario] = process.argv.slice(2);
const folder = createRequire(join(process.env.IRONCAGE_NODE_MODULES, "none.js"));
const load = (name) => import(pathToFileURL(folder.resolve(name)).href);
const prompt = `cage-drill: ${scenario}`;
const messages = [{ role: "user", content: prompt }];
const run = ({ command }) => execSync(command, { encoding: "utf-8" });
const parameters = {
  type: "object",
  properties: { command: { type: "string" }, description: { type: "string" } },
  required: ["command"],
  additionalProperties: false,
};
const searches = scenario === "web search";

async function openai() {
  const { default: OpenAI } = await load("openai");
  const client = new OpenAI();
  if (scenario === "compaction") return client.responses.compact({ model, input: messages });
  const tools = [{ type: "function", name: "run", parameters, strict: false }];
  if (searches) tools.push({ type: "web_search" });
  const input = [...messages];
  for (;;) {
    const stream = client.responses.stream({ model, input, tools });
    const answer = await stream.finalResponse();
    const calls = answer.output.filter((item) => item.type === "function_call");
    if (calls.length === 0) return answer.output_text;
    for (const { call_id, name, arguments: text } of calls)
      input.push({ type: "function_call", call_id, name, arguments: text });
    for (const { call_id, arguments: text } of calls)
      input.push({ type: "function_call_output", call_id, output: run(JSON.parse(text)) });
  }
}

async function anthropic() {
  const { default: Anthropic } = await load("@anthropic-ai/sdk");
  const client = new Anthropic();
  const given = { model, max_tokens: 2000, messages };
  if (scenario === "compaction")
    return client.beta.messages.create({
      ...given, compaction: { type: "summarize" }, betas: ["compact-2026-09-04"],
    });
  if (searches)
    return client.messages.stream({
      ...given, tools: [{ type: "web_search_20250305", name: "web_search", max_uses: 3 }],
    }).finalText();
  const tool = {
    name: "run", description: "Run a command of the shell.", input_schema: parameters,
    parse: (input) => input, run,
  };
  const last = await client.beta.messages.toolRunner({ ...given, tools: [tool] }).runUntilDone();
  return last.content.at(-1).text;
}

async function vercel() {
  const { generateText, streamText, tool, jsonSchema, stepCountIs } = await load("ai");
  const made = await load(packageName);
  const provider = {
    "@ai-sdk/openai": () => made.openai,
    "@ai-sdk/anthropic": () => made.anthropic,
    "@ai-sdk/openai-compatible": () => made.createOpenAICompatible({
      name: "cage", baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY,
      includeUsage: true,
    }),
  }[packageName]();
  const tools = searches
    ? { web_search: provider.tools.webSearch_20250305?.({ maxUses: 3 })
        ?? provider.tools.webSearch({}) }
    : { run: tool({ inputSchema: jsonSchema(parameters), execute: run }) };
  const given = { model: provider(model), prompt, tools, stopWhen: stepCountIs(6), maxRetries: 0 };
  if (scenario === "compaction")
    return (await generateText({
      ...given,
      providerOptions: { anthropic: { contextManagement: { edits: [
        { type: "compact_20260112", trigger: { type: "input_tokens", value: 50000 } }] } } },
    })).text;
  const answer = streamText({ ...given, onError: ({ error }) => { throw error; } });
  return answer.text;
}

const agents = { openai, "@anthropic-ai/sdk": anthropic };
console.log(await (agents[packageName] ?? vercel)());
