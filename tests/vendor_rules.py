"""What the vendors refuse with a 400, as far as a translation could get it wrong.

Written from the vendors' API references and reports of their 400s; it knows no translator. The
mock provider applies it to every call, and the tests of the translators to every golden request.
"""
import json
import re

CLAUDE_WITH_PREFILL = re.compile(r"claude-(3|2|instant)|claude-(opus|sonnet|haiku)-4(-[015]|-\d{8}|$)")
GPT_REASONS = re.compile(r"o\d|gpt-5(?!-chat)|gpt-[6-9]")
SCHEMA_WORDS_REFUSED = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
                        "minLength", "maxLength", "maxItems", "uniqueItems", "oneOf", "not", "if",
                        "patternProperties", "propertyNames", "prefixItems", "contains"}


def refused_by_anthropic(fields):
    """The first rule of Anthropic's Messages that a request breaks, in words, or None."""
    return next(_anthropic_faults(fields), None)


def _blocks(message):
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _anthropic_faults(fields):
    messages, model = fields["messages"], fields["model"].rpartition("/")[2]
    tools = fields.get("tools") or []
    thinking = fields.get("thinking") or {}
    choice = fields.get("tool_choice") or {}
    everything = [block for message in messages for block in _blocks(message)]
    if not messages or messages[0]["role"] != "user":
        yield "messages: first message must use the user role"
    yield from _message_faults(messages)
    for block in everything + [b for b in fields.get("system") or [] if isinstance(b, dict)]:
        if block["type"] == "text" and not block["text"].strip():
            yield "messages: text content blocks must contain non-whitespace text"
    if not tools and any(block["type"] in ("tool_use", "tool_result") for block in everything):
        yield "tools: Field required where messages have tool blocks"
    last = messages[-1]
    if last["role"] == "assistant":
        if not CLAUDE_WITH_PREFILL.match(model) or thinking.get("type") in ("enabled", "adaptive"):
            yield "This model does not support assistant message prefill."
        end = _blocks(last)[-1]
        if end["type"] == "text" and end["text"] != end["text"].rstrip():
            yield "messages: final assistant content cannot end with trailing whitespace"
    if json.dumps(fields).count('"cache_control"') > 4:
        yield "A maximum of 4 blocks with cache_control may be provided."
    if any(not stop.strip() for stop in fields.get("stop_sequences") or []):
        yield "stop_sequences: each stop sequence must contain non-whitespace"
    if len((fields.get("metadata") or {}).get("user_id") or "") > 256:
        yield "metadata.user_id: String should have at most 256 characters"
    yield from _anthropic_tool_faults(tools, choice)
    yield from _thinking_faults(fields, messages, thinking, choice, model)
    schema = ((fields.get("output_config") or {}).get("format") or {}).get("schema")
    for enforced in [schema] + [tool["input_schema"] for tool in tools if tool.get("strict")]:
        yield from _enforced_faults(enforced)


def _message_faults(messages):
    asked = []                                     # ids that the next message must answer
    for number, message in enumerate(messages):
        role, blocks = message["role"], _blocks(message)
        if not blocks:
            yield f"messages.{number}: all messages must have non-empty content"
        if role == "system":
            follows = messages[number - 1]["role"] if number else None
            then = messages[number + 1]["role"] if number + 1 < len(messages) else "assistant"
            if (follows, then) != ("user", "assistant") or asked:
                yield f"messages.{number}: a system message must follow a user's turn and end it"
            continue
        results = [b["tool_use_id"] for b in blocks if b["type"] == "tool_result"]
        if set(asked) - set(results):
            yield f"messages.{number}: tool_use ids were found without tool_result blocks"
        if set(results) - set(asked) or len(set(results)) < len(results):
            yield f"messages.{number}: unexpected tool_use_id found in tool_result blocks"
        if [b["type"] for b in blocks[:len(results)]] != ["tool_result"] * len(results):
            yield f"messages.{number}: tool_result blocks must come first"
        asked = [b["id"] for b in blocks if b["type"] == "tool_use"]
        for block in blocks:
            if block["type"] == "tool_use" and (
                    not re.fullmatch(r"[A-Za-z0-9_-]+", block["id"])
                    or not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", block["name"])
                    or not isinstance(block["input"], dict)):
                yield f"messages.{number}: a tool_use is malformed"
        if len(set(asked)) < len(asked):
            yield "messages: tool_use ids must be unique"
    if asked:
        yield "messages: tool_use ids were found without tool_result blocks"


def _anthropic_tool_faults(tools, choice):
    names = [tool["name"] for tool in tools]
    if len(set(names)) < len(names):
        yield "tools: Tool names must be unique."
    for tool in tools:
        if "input_schema" not in tool:
            continue
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", tool["name"]):
            yield "tools: String should match pattern '^[a-zA-Z0-9_-]{1,128}$'"
        if tool["input_schema"].get("type") != "object":
            yield "tools: input_schema.type: Field required"
        if {"oneOf", "anyOf", "allOf"} & set(tool["input_schema"]):
            yield "tools: input_schema does not support oneOf, allOf, or anyOf at the top level"
    if choice and not tools:
        yield "tool_choice may only be specified while providing tools."
    if choice.get("type") == "tool" and choice["name"] not in names:
        yield f"Tool '{choice['name']}' not found in provided tools"
    if choice.get("type") == "none" and "disable_parallel_tool_use" in choice:
        yield "tool_choice.none.disable_parallel_tool_use: Extra inputs are not permitted"


def _thinking_faults(fields, messages, thinking, choice, model):
    has_old_thinking = CLAUDE_WITH_PREFILL.match(model)
    thinks = thinking.get("type") in ("enabled", "adaptive")
    if thinking.get("type") == "enabled":
        if not 1024 <= thinking["budget_tokens"] < fields["max_tokens"]:
            yield "max_tokens must be greater than thinking.budget_tokens"
        if choice.get("type") in ("any", "tool"):
            yield "Thinking may not be enabled when tool_choice forces tool use."
        said = [_blocks(message) for message in messages if message["role"] == "assistant"][-1:]
        for blocks in said:
            if any(b["type"] == "tool_use" for b in blocks) \
                    and blocks[0]["type"] not in ("thinking", "redacted_thinking"):
                yield "Expected `thinking` or `redacted_thinking`, but found `tool_use`"
        if not has_old_thinking and "4-6" not in model:
            yield "thinking.type.enabled is not supported for this model"
    if thinking.get("type") == "adaptive" and has_old_thinking:
        yield "adaptive thinking is not supported on this model"
    sampling = [name for name in ("temperature", "top_p", "top_k") if name in fields]
    if thinks and any(fields[name] != 1 for name in sampling):
        yield "temperature may only be set to 1 when thinking is enabled"
    if {"temperature", "top_p"} <= set(sampling):
        yield "temperature and top_p cannot both be specified for this model"
    if sampling and not has_old_thinking and "4-6" not in model:
        yield f"{sampling[0]} is deprecated for this model."


def _enforced_faults(schema):
    if isinstance(schema, list):
        for child in schema:
            yield from _enforced_faults(child)
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        yield "For 'object' type, 'additionalProperties' must be explicitly set to false"
    refused = SCHEMA_WORDS_REFUSED & set(schema)
    if refused:
        yield f"For this type, property '{sorted(refused)[0]}' is not supported"
    if any(isinstance(value, (dict, list)) for value in schema.get("enum", ())):
        yield "Enum values must be strings, numbers, booleans or nulls"
    if any("$ref" in branch for branch in schema.get("allOf", ()) if branch is not True):
        yield "allOf with $ref is not supported"
    if re.search(r"\(\?[=!<]", schema.get("pattern", "")):
        yield "look-around is not supported in a pattern"
    for name, child in schema.items():
        if name not in ("enum", "const", "default"):
            yield from _enforced_faults(list(child.values()) if name in (
                "properties", "$defs", "definitions") else child)


def refused_by_openai(fields):
    """The first rule of OpenAI's chat completions that a request breaks, in words, or None."""
    return next(_openai_faults(fields), None)


def _openai_faults(fields):
    model, tools = fields["model"], fields.get("tools") or []
    effort = fields.get("reasoning_effort")
    names = [tool[tool["type"]]["name"] for tool in tools]
    if GPT_REASONS.match(model):
        if fields.get("max_tokens") is not None:
            yield "Unsupported parameter: 'max_tokens' is not supported with this model."
        if fields.get("temperature") not in (None, 1) and effort != "none":
            yield "Unsupported value: 'temperature' does not support this value with this model."
        if fields.get("stop"):
            yield "Unsupported parameter: 'stop' is not supported with this model."
    elif effort is not None:
        yield "Unrecognized request argument supplied: reasoning_effort"
    if tools and effort is not None and re.match(r"gpt-5\.[2-5]", model):
        yield (f"Function tools with reasoning_effort are not supported for {model} in "
               "/v1/chat/completions. Please use /v1/responses instead.")
    if tools and effort != "none" and re.match(r"gpt-5\.[6-9]|gpt-[6-9]", model):
        yield (f"Function tools with reasoning_effort are not supported for {model} in "
               "/v1/chat/completions. To use function tools, use /v1/responses or set "
               "reasoning_effort to 'none'.")
    if effort == "minimal" and re.match(r"gpt-5\.|o\d", model) \
            or effort == "none" and re.match(r"gpt-5(-|$)|gpt-6[.\d]*-astra|gpt-6\.1|o\d", model) \
            or effort == "xhigh" and re.match(r"gpt-5(-|$)|gpt-5\.1(-|$)|o\d", model) \
            or effort == "max":
        yield f"Unsupported value: 'reasoning_effort' does not support '{effort}' with this model."
    if len(fields.get("stop") or []) > 4 and isinstance(fields["stop"], list):
        yield "Invalid 'stop': array too long. Expected an array with maximum length 4."
    if not tools:
        for name in ("tool_choice", "parallel_tool_calls"):
            if fields.get(name) is not None:
                yield f"'{name}' is only allowed when 'tools' are specified."
    choice = fields.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function" \
            and choice["function"]["name"] not in names:
        yield "Invalid value: 'tool_choice' names a function that is not in 'tools'."
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            yield "Invalid 'tools[0].function.name': string does not match pattern."
    holders = [tool["function"] for tool in tools if tool["type"] == "function"]
    if (fields.get("response_format") or {}).get("type") == "json_schema":
        holders.append(fields["response_format"]["json_schema"])
    for holder in holders:
        if holder.get("strict"):
            yield from _strict_faults(holder.get("parameters", holder.get("schema")))
    yield from _openai_message_faults(fields["messages"])


def _strict_faults(schema):
    """What strict mode refuses in a schema: a dict, wherever a schema can stand."""
    if not {"type", "$ref", "anyOf", "enum", "const"} & set(schema):
        yield "Invalid schema: schema must have a 'type' key."
    for name in ("oneOf", "allOf", "not", "if", "default", "uniqueItems", "patternProperties"):
        if name in schema:
            yield f"Invalid schema: '{name}' is not permitted."
    properties = schema.get("properties", {})
    if "properties" in schema or "object" in schema.get("type", ()):
        if schema.get("additionalProperties") is not False:
            yield "Invalid schema: 'additionalProperties' is required to be false."
        if set(schema.get("required", ())) != set(properties):
            yield "Invalid schema: 'required' is required to be supplied and to be an array " \
                "including every key in properties."
    inner = [*properties.values(), *schema.get("$defs", {}).values(), *schema.get("anyOf", ())]
    for child in [*inner, *([schema["items"]] if "items" in schema else [])]:
        yield from _strict_faults(child)


def _openai_message_faults(messages):
    asked = set()                                  # tool_call_ids that are yet to be answered
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            if message["tool_call_id"] not in asked:
                yield ("Invalid parameter: messages with role 'tool' must be a response to a "
                       "preceeding message with 'tool_calls'.")
            asked.discard(message["tool_call_id"])
            continue
        if asked:
            yield ("An assistant message with 'tool_calls' must be followed by tool messages "
                   "responding to each 'tool_call_id'.")
        calls = message.get("tool_calls") or []
        asked = {call["id"] for call in calls}
        for call in calls:
            if len(call["id"]) > 40:
                yield f"Invalid 'messages[{number}].tool_calls[0].id': string too long."
        if role == "assistant" and not calls and not message.get("content") \
                and not message.get("function_call") and not message.get("refusal"):
            yield f"Invalid value for 'content' of messages[{number}]: expected a string, got null."
        if role != "assistant" and message.get("content") in (None, []):
            yield f"Invalid value for 'content' of messages[{number}]."
    if asked:
        yield ("An assistant message with 'tool_calls' must be followed by tool messages "
               "responding to each 'tool_call_id'.")
