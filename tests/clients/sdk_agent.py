"""A small agent on the official Python SDKs: sdk_agent.py openai|anthropic MODEL SCENARIO."""
import json
import subprocess
import sys

PACKAGE, MODEL, SCENARIO = sys.argv[1:]
PROMPT = f"cage-drill: {SCENARIO}"
PARAMETERS = {"type": "object", "properties": {"command": {"type": "string"},
                                               "description": {"type": "string"}},
              "required": ["command"], "additionalProperties": False}


def run(command, description=""):
    return subprocess.run(command, shell=True, capture_output=True, text=True).stdout


def openai_agent():
    """Calls of /v1/responses, streamed, until no tool is asked for."""
    import openai
    client = openai.OpenAI()
    messages = [{"role": "user", "content": PROMPT}]
    if SCENARIO == "compaction":
        return client.responses.compact(model=MODEL, input=messages).output
    tools = [{"type": "function", "name": "run", "parameters": PARAMETERS, "strict": False},
             *([{"type": "web_search"}] if SCENARIO == "web search" else [])]
    while True:
        with client.responses.stream(model=MODEL, input=messages, tools=tools) as stream:
            answer = stream.get_final_response()
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            return answer.output_text
        messages += [{"type": "function_call", "call_id": call.call_id, "name": call.name,
                      "arguments": call.arguments} for call in calls]
        messages += [{"type": "function_call_output", "call_id": call.call_id,
                      "output": run(**json.loads(call.arguments))} for call in calls]


def anthropic_agent():
    """The SDK's own loop, with a tool that it runs."""
    import anthropic
    client = anthropic.Anthropic()
    given = {"model": MODEL, "max_tokens": 2_000,
             "messages": [{"role": "user", "content": PROMPT}]}
    if SCENARIO == "compaction":
        return client.beta.messages.create(
            **given, compaction={"type": "summarize"}, betas=["compact-2026-09-04"]).content
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    if SCENARIO == "web search":
        with client.messages.stream(**given, tools=[search]) as stream:
            return stream.get_final_text()

    @anthropic.beta_tool(name="run")
    def tool(command: str, description: str = "") -> str:
        """Run a command of the shell."""
        return run(command)

    return client.beta.messages.tool_runner(**given, tools=[tool]).until_done().content[-1].text


print({"openai": openai_agent, "anthropic": anthropic_agent}[PACKAGE]())
