"""Claude Code and the official SDKs through the mock of each known server: a tool loop of three
turns, of which the server refuses nothing, and each turn of which is charged once.

What a client keeps of an answer, and sends back with the next turn, is its own: the servers that
want their reasoning or their signatures back must get them."""
import importlib
import json

import pytest
from hosts import COST, HOSTS, KEY, REASONING, configured, host_reply
from support import PATIENCE_S, TOKEN, Reply, settled_status
from test_claude_code import CLAUDE, claude_code

TOOL = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TASK = "Count to two."


@pytest.fixture
def host(mock, proxy_with):
    """Start a proxy that has the mock as a known server; its answers go into `mock.said`."""
    def start(name, *flags):
        mock.said = []

        def answer(request):
            mock.said.append(host_reply(HOSTS[name], request))
            return mock.said[-1]

        mock.always = answer
        return proxy_with(configured(mock, name), *flags, environ={"HOST_KEY": KEY})
    return start


def refusals(mock):
    return [b"".join(reply.steps) for reply in mock.said if reply.status != 200]


# The SDKs. Each takes a client, a model and whether to stream; each gives its last text, its calls
# and the thoughts that it was shown.

def openai_chat(sdk, model, stream):
    messages, calls = [{"role": "user", "content": TASK}], []
    tools = [{"type": "function", "function": {"name": "count", "parameters": TOOL}}]
    while True:
        asked = {"model": model, "max_tokens": 900, "messages": messages, "tools": tools}
        if stream:
            from openai.lib.streaming.chat import ChatCompletionStreamState
            state = ChatCompletionStreamState()
            for chunk in sdk.chat.completions.create(**asked, stream=True):
                state.handle_chunk(chunk)
            message = state.get_final_completion().choices[0].message
        else:
            message = sdk.chat.completions.create(**asked).choices[0].message
        if not message.tool_calls:
            return message.content, calls, None
        messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
        for call in message.tool_calls:
            calls.append(json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "counted"})


def openai_responses(sdk, model, stream):
    said, calls, thoughts = [{"role": "user", "content": TASK}], [], ""
    tools = [{"type": "function", "name": "count", "parameters": TOOL, "strict": False}]
    while True:
        asked = {"model": model, "max_output_tokens": 900, "input": said, "tools": tools,
                 "store": False, "include": ["reasoning.encrypted_content"]}
        if stream:
            with sdk.responses.stream(**asked) as events:
                response = events.until_done().get_final_response()
        else:
            response = sdk.responses.create(**asked)
        thoughts += "".join(part.text for item in response.output if item.type == "reasoning"
                            for part in [*item.summary, *(item.content or ())])
        new = [item for item in response.output if item.type == "function_call"]
        if not new:
            return response.output_text, calls, thoughts
        said += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"})
                 for item in response.output]
        calls += [json.loads(call.arguments) for call in new]
        said += [{"type": "function_call_output", "call_id": call.call_id, "output": "counted"}
                 for call in new]


def anthropic_messages(sdk, model, stream):
    messages, calls, thoughts = [{"role": "user", "content": TASK}], [], ""
    while True:
        asked = {"model": model, "max_tokens": 2000, "messages": messages,
                 "thinking": {"type": "enabled", "budget_tokens": 1024},
                 "tools": [{"name": "count", "input_schema": TOOL}]}
        if stream:
            with sdk.messages.stream(**asked) as events:
                message = events.get_final_message()
        else:
            message = sdk.messages.create(**asked)
        thoughts += "".join(block.thinking for block in message.content
                            if block.type == "thinking")
        new = [block for block in message.content if block.type == "tool_use"]
        if not new:
            return message.content[-1].text, calls, thoughts
        calls += [block.input for block in new]
        messages += [{"role": "assistant", "content": message.content}, {
            "role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id,
                                         "content": "counted"} for block in new]}]


LOOPS = {"openai, chat completions": openai_chat, "openai, responses": openai_responses,
         "anthropic, messages": anthropic_messages}


@pytest.fixture
def sdk_of(request):
    """Make the SDK that a loop needs."""
    def make(loop, proxy):
        module = importlib.import_module(loop.partition(",")[0])
        kind, base = (module.OpenAI, proxy.url + "/v1") if module.__name__ == "openai" else \
            (module.Anthropic, proxy.url)
        sdk = kind(base_url=base, api_key=TOKEN, max_retries=0, timeout=PATIENCE_S,
                   http_client=module.DefaultHttpxClient(trust_env=False))
        request.addfinalizer(sdk.close)
        return sdk
    return make


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", HOSTS)
def test_an_sdk_has_its_tool_loop(mock, host, sdk_of, name, loop, stream):
    pytest.importorskip(loop.partition(",")[0])
    proxy = host(name, "--budget", "1")

    text, calls, thoughts = LOOPS[loop](sdk_of(loop, proxy), f"{name}/m", stream)

    assert [] == refusals(mock)
    assert ("All done.", [{"n": 0}, {"n": 1}]) == (text, calls)
    assert 3 * COST == settled_status(proxy)["spent_microdollars"]
    if thoughts is not None and HOSTS[name].reasoning:
        assert 3 * REASONING == thoughts


# Claude Code, with the history that it keeps itself.

@pytest.mark.skipif(CLAUDE is None, reason="Claude Code is not installed")
@pytest.mark.parametrize("name", HOSTS)
def test_claude_code_has_its_tool_loop(mock, host, tmp_path, name):
    proxy = host(name, "--budget", "5")

    said = claude_code(proxy, tmp_path, TASK, "--allowedTools", "Bash", model=f"{name}/m")

    assert [] == refusals(mock)
    assert "All done." in said
    results = [message["content"] for message in mock.seen[-1].json["messages"]
               if message["role"] == "tool"]
    assert ["result 0", "result 1"] == results
    assert 3 == len(mock.seen)
    assert 3 * COST == settled_status(proxy)["spent_microdollars"]


@pytest.mark.skipif(CLAUDE is None, reason="Claude Code is not installed")
def test_claude_code_lowers_a_cap_that_does_not_fit_into_what_is_left(mock, host, tmp_path):
    """As musistudio/claude-code-router#1799 has it: 230,462 tokens of prompt, 262,144 in all."""
    def answer(request):
        cap = request.json["max_tokens"]
        return host_reply(HOSTS["together_ai"], request) if cap + 230_462 <= 262_144 else Reply(
            400, steps=(json.dumps({
                "object": "error", "type": "BadRequestError", "code": 400,
                "message": "Requested token count exceeds the model's maximum context length of "
                f"262144 tokens. You requested a total of {cap + 230462} tokens: 230462 tokens "
                f"from the input messages and {cap} tokens for the completion."}).encode(),))

    proxy = host("together_ai", "--budget", "5")
    mock.always = answer

    said = claude_code(proxy, tmp_path, TASK, "--allowedTools", "Bash", model="together_ai/m")

    assert "All done." in said
    first, second = [seen.json["max_tokens"] for seen in mock.seen][:2]
    assert first > 31_682 and second == 262_144 - 230_462 - 1000
