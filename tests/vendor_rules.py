"""What the vendors refuse with a 400, as far as a translation could get it wrong.

Written from the vendors' API references and reports of their 400s; it knows no translator. The
mock provider applies it to every call, and the tests of the translators to every golden request.
Blocks, items, tools and their fields are those of anthropic 2.14.0 and openai 3.57.0, with what
Claude Code 2.1.332 and Codex 0.171.0 send beside them.
"""
import json
import re

CLAUDE_WITH_PREFILL = re.compile(r"claude-(3|2|instant)|claude-(opus|sonnet|haiku)-4(-[015]|-\d{8}|$)")
GPT_REASONS = re.compile(r"o\d|gpt-5(?!-chat)|gpt-[6-9]")
SCHEMA_WORDS_REFUSED = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
                        "minLength", "maxLength", "maxItems", "uniqueItems", "oneOf", "not", "if",
                        "patternProperties", "propertyNames", "prefixItems", "contains"}

# Block: who may say it, its fields beside type and cache_control, and the beta that it needs.
BLOCKS = {
    "text": ("user assistant system", "text citations", ""),
    "image": ("user", "source transformations", ""),
    "document": ("user", "source title context citations", ""),
    "search_result": ("user", "source title content citations", ""),
    "container_upload": ("user", "file_id", ""),
    "tool_result": ("user", "tool_use_id content is_error toolset_name", ""),
    "thinking": ("assistant", "thinking signature", ""),
    "redacted_thinking": ("assistant", "data", ""),
    "tool_use": ("assistant", "id name input caller toolset_name", ""),
    "server_tool_use": ("assistant", "id name input caller", ""),
    "web_search_tool_result": ("assistant", "tool_use_id content caller", ""),
    "web_fetch_tool_result": ("assistant", "tool_use_id content caller", ""),
    "code_execution_tool_result": ("assistant", "tool_use_id content", ""),
    "bash_code_execution_tool_result": ("assistant", "tool_use_id content", ""),
    "text_editor_code_execution_tool_result": ("assistant", "tool_use_id content", ""),
    "tool_search_tool_result": ("assistant", "tool_use_id content", ""),
    "advisor_tool_result": ("assistant", "tool_use_id content", "advisor-tool-"),
    "mcp_tool_use": ("assistant", "id name input server_name", "mcp-client-"),
    "mcp_tool_result": ("assistant", "tool_use_id content is_error", "mcp-client-"),
    "mcp_tool_listing": ("assistant", "mcp_server_name tools", "mcp-client-"),
    "fallback": ("assistant", "from to trigger", "server-side-fallback-"),
    "compaction": ("user assistant", "content encrypted_content signature tool_changes", "compact-"),
    "tool_addition": ("system", "tool", "mid-conversation-tool-changes-"),
    "tool_removal": ("system", "tool", "mid-conversation-tool-changes-"),
}
# Fields that the vendor knows only where a beta header names them.
BETA_FIELDS = {
    "context_management": "context-management-|compact-2026-01-12", "mcp_servers": "mcp-client-",
    "compaction": "compact-2026-09-04", "thread": "message-threads-",
    "fallbacks": "server-side-fallback-", "fallback_credit_token": "fallback-credit-",
    "billing_policy": "user-profiles-billing-",
}
TOOL_FIELDS = set("""name description input_schema type cache_control strict defer_loading
    allowed_callers eager_input_streaming input_examples""".split())


def refused_by_anthropic(fields, betas=None):
    """The first rule of Anthropic's Messages that a request breaks, in words, or None.

    `betas`: the header anthropic-beta; None: not known, so that all of them pass."""
    return next(_shape_faults(fields, betas), None) or next(_anthropic_faults(fields), None)


def _shape_faults(fields, betas):
    """Blocks, fields and betas: what the vendor's own reading of the body refuses first."""
    def lacks(beta):
        return betas is not None and beta and not re.search(beta, betas)

    for name, beta in BETA_FIELDS.items():
        if fields.get(name) is not None and lacks(beta):
            yield f"{name}: Extra inputs are not permitted"
    for number, message in enumerate(fields["messages"]):
        extra = set(message) - {"role", "content"}
        if extra - {"output_config"} or extra and (message["role"] != "system" or lacks(
                "mid-conversation-output-config-|per-turn-control-")):
            yield f"messages.{number}.{sorted(extra)[0]}: Extra inputs are not permitted"
        for block in _blocks(message):
            roles, known, beta = BLOCKS.get(block["type"], ("", "", ""))
            if not roles or lacks(beta):
                yield (f"messages.{number}.content: Input tag '{block['type']}' found using 'type' "
                       "does not match any of the expected tags")
            elif message["role"] not in roles.split():
                yield (f"messages.{number}: `{block['type']}` blocks can only be in "
                       f"{' or '.join(roles.split())} messages")
            else:
                extra = set(block) - {"type", "cache_control", *known.split()}
                if extra:
                    yield (f"messages.{number}.content.{block['type']}.{sorted(extra)[0]}: "
                           "Extra inputs are not permitted")
    for tool in fields.get("tools") or []:
        extra = set(tool) - TOOL_FIELDS if "input_schema" in tool else ()
        if extra:
            yield f"tools.{sorted(extra)[0]}: Extra inputs are not permitted"


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
            or effort == "none" and re.match(r"gpt-5(-|$)|o\d", model) \
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


# Item of /v1/responses: its fields beside type and id. agent_message is Codex' own.
ITEMS = {
    "message": "content phase role status",
    "additional_tools": "role tools", "agent_message": "author recipient content",
    "function_call": "arguments async call_id caller name namespace status",
    "function_call_output": "call_id caller name namespace output status",
    "custom_tool_call": "async call_id caller input name namespace status",
    "custom_tool_call_output": "call_id caller name output status",
    "reasoning": "content encrypted_content status summary",
    "tool_search_call": "arguments call_id execution status",
    "tool_search_output": "call_id execution status tools",
    "web_search_call": "action status", "file_search_call": "queries results status",
    "computer_call": "action actions call_id pending_safety_checks status",
    "computer_call_output": "acknowledged_safety_checks call_id output status",
    "configuration_update": "reasoning text", "compaction": "encrypted_content",
    "compaction_trigger": "", "item_reference": "",
    "image_generation_call": """action background error output_format quality result
        revised_prompt size status svg_usage""",
    "code_interpreter_call": "code container_id outputs status",
    "local_shell_call": "action call_id status", "local_shell_call_output": "output status",
    "shell_call": "action call_id caller environment status",
    "shell_call_output": "call_id caller max_output_length output status",
    "apply_patch_call": "call_id caller operation status",
    "apply_patch_call_output": "call_id caller output status",
    "mcp_list_tools": "error server_label tools",
    "mcp_approval_request": "arguments name server_label",
    "mcp_approval_response": "approval_request_id approve reason",
    "mcp_call": "approval_request_id arguments error name output server_label status",
    "program": "call_id code fingerprint", "program_output": "call_id result status",
}
HOSTED_TOOLS = set("""file_search computer computer_use_preview web_search web_search_2025_08_26 mcp
    code_interpreter programmatic_tool_calling image_generation local_shell shell tool_search
    web_search_preview web_search_preview_2025_03_11 apply_patch""".split())
CLIENT_TOOLS = {                        # type -> fields beside it
    "function": """name description parameters strict defer_loading allowed_callers async
        output_schema""",
    "custom": "name description format defer_loading allowed_callers async",
    "namespace": "name description tools",
}
SAID_BY_ASSISTANT = {"output_text", "refusal"}
SAID_TO_IT = {"input_text", "input_image", "input_file", "input_audio", "encrypted_content"}


def refused_by_responses(fields):
    """The first rule of OpenAI's /v1/responses that a request breaks, in words, or None."""
    return next(_responses_faults(fields), None)


def _responses_faults(fields):
    items = fields["input"] if isinstance(fields["input"], list) else []
    asked, answered = {}, set()
    for number, item in enumerate(items):
        kind = item.get("type", "message")
        if kind not in ITEMS:
            yield f"Invalid value: '{kind}'. Supported values are: 'message', 'function_call', …"
            continue
        extra = set(item) - {"type", "id", *ITEMS[kind].split()}
        if extra:
            yield f"Unknown parameter: 'input[{number}].{sorted(extra)[0]}'."
        if kind == "message" and isinstance(item["content"], list):
            wrong = {part["type"] for part in item["content"]} - (
                SAID_BY_ASSISTANT if item["role"] == "assistant" else SAID_TO_IT)
            if wrong:
                yield f"Invalid value: '{sorted(wrong)[0]}' in 'input[{number}].content'."
        if kind in ("additional_tools", "tool_search_output"):
            yield from _responses_tool_faults(item["tools"])
        if kind in ("function_call", "custom_tool_call"):
            asked[item["call_id"]] = f"{kind}_output"
        if kind in ("function_call_output", "custom_tool_call_output"):
            if asked.get(item["call_id"]) != kind and not fields.get("previous_response_id") \
                    and not fields.get("conversation"):
                yield f"No tool call found for function call output with call_id {item['call_id']}."
            answered.add(item["call_id"])
    for call in set(asked) - answered:
        yield f"No tool output found for function call {call}."
    yield from _responses_tool_faults(fields.get("tools") or [])
    effort = (fields.get("reasoning") or {}).get("effort")
    for name in ("temperature", "top_p"):
        if fields.get(name) not in (None, 1) and GPT_REASONS.match(fields["model"]) \
                and effort != "none":
            yield f"Unsupported parameter: '{name}' is not supported with this model."


def _responses_tool_faults(tools):
    for number, tool in enumerate(tools):
        known = CLIENT_TOOLS.get(tool["type"])
        if known is None and tool["type"] not in HOSTED_TOOLS:
            yield f"Invalid value: '{tool['type']}' in 'tools[{number}].type'."
        if known is None:
            continue
        extra = set(tool) - {"type", *known.split()}
        if extra:
            yield f"Unknown parameter: 'tools[{number}].{sorted(extra)[0]}'."
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", tool["name"]):
            yield f"Invalid 'tools[{number}].name': string does not match pattern."
        if tool.get("strict") and tool["type"] == "function":
            yield from _strict_faults(tool["parameters"])
        yield from _responses_tool_faults(tool.get("tools") or [])


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
