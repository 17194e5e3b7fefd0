"""What the vendors refuse with a 400, as far as a translation could get it wrong.

Written from the vendors' API references and reports of their 400s; it knows no translator. The
mock provider applies it to every call, and the tests of the translators to every golden request.
Blocks, items, tools and their fields are those of anthropic 2.14.0 and openai 3.57.0, with what
Claude Code 2.1.332 and Codex 0.171.0 send beside them.
"""
import json
import re

CLAUDE_WITH_PREFILL = re.compile(r"claude-(3|2|instant)|claude-(opus|sonnet|haiku)-4(-[015]|-\d{8}|$)")
# Models that chat completions refuse with a 404 (mode "responses" of the vendors' price lists).
RESPONSES_ONLY = re.compile(r"o\d(-mini)?-(pro|deep-research)|gpt-5[.\d]*-(pro|codex)|codex-")
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
    elif effort is not None and re.match(r"gpt-|chatgpt", model):     # others' servers may know it
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
    for tool in tools:
        if tool["type"] == "function":
            yield from _parameter_faults(tool["function"]["name"],
                                         tool["function"].get("parameters"))
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
# Part of an item's content: its fields beside type, and where it can stand.
PARTS = {
    "input_text": ("text prompt_cache_breakpoint", "input output"),
    "input_image": ("detail file_id image_url prompt_cache_breakpoint", "input output"),
    "input_file": ("detail file_data file_id file_url filename prompt_cache_breakpoint",
                   "input output"),
    "input_audio": ("input_audio", "input"), "encrypted_content": ("encrypted_content", "input"),
    "output_text": ("annotations logprobs text", "assistant"),
    "refusal": ("refusal", "assistant"),
}
# Fields that hold an object: what is known within it.
WITHIN = {
    "reasoning": "context effort generate_summary mode summary", "text": "format verbosity",
    "stream_options": "include_obfuscation", "prompt": "id variables version",
    "prompt_cache_options": "mode ttl comparison_response_id",
}
FORMATS = {"text": "", "json_object": "", "json_schema": "description name schema strict"}
INCLUDABLE = """file_search_call.results web_search_call.results web_search_call.action.sources
    message.input_image.image_url computer_call_output.output.image_url
    code_interpreter_call.outputs reasoning.encrypted_content message.output_text.logprobs"""
ONE_OF = {
    "service_tier": "auto default flex scale priority fast ultrafast",
    "truncation": "auto disabled", "prompt_cache_retention": "in_memory 24h",
    "reasoning.summary": "auto concise detailed", "reasoning.context": "auto current_turn all_turns",
    "text.verbosity": "low medium high",
}
# How an item's id begins, as seen in answers; from 400s ("Expected an ID that begins with 'fc'",
# nodetool 4252, 13 July 2026). Outputs, which the client makes, were not seen to be judged.
ID_BEGINS = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc",
             "web_search_call": "ws", "tool_search_call": "tsc", "compaction": "cmp"}
# Efforts of reasoning in Responses; first match. All models asked one by one on 23 January and
# 10 July 2026 (big-AGI 944, 1159), the models' pages for -pro (opencode 3474) and gpt-6-astra
# (AntSeed 1040); "none" is refused by gpt-6-astra (litellm-docs 1173, 3 September) and newer.
EFFORTS = (
    (r"gpt-5(\.\d+)?-chat", ""), (r"o\d", "low medium high"),
    (r"gpt-5-pro", "high"), (r"gpt-5\.\d+-pro", "medium high xhigh"),
    (r"gpt-5(-codex|-mini|-nano)?(-\d{4}|$)", "minimal low medium high"),
    (r"gpt-5\.1-codex-max|gpt-5\.[2-5]-codex", "low medium high xhigh"),
    (r"gpt-5\.1-codex", "low medium high"), (r"gpt-5\.1(-|$)", "none low medium high"),
    (r"gpt-5\.[2-5](-|$)", "none low medium high xhigh"),
    (r"gpt-5\.([6-9]|\d\d)(-|$)", "none low medium high xhigh max"),
    (r"gpt-6(-sol|-luna|$)", "none low medium high xhigh max"),
    (r"gpt-([6-9]|\d\d)", "low medium high xhigh max"),
)
# What OpenAI's encryption makes: Fernet tokens. One that it did not make "could not be verified"
# (code invalid_encrypted_content; codex 8119, 8145, 16 December 2025).
ENCRYPTED = re.compile(r"gAAAAA[\w-]+=*")
LONGEST = {"call_id": 64, "id": 64}     # aether 829, 16 September 2026


def refused_by_responses(fields):
    """The first rule of OpenAI's /v1/responses that a request breaks, in words, or None."""
    return next(_responses_faults(fields), None)


def efforts_of(model):
    """The efforts of reasoning that Responses takes on a model; (): it does not reason."""
    return next((efforts.split() for pattern, efforts in EFFORTS if re.match(pattern, model)), [])


def _responses_faults(fields):
    items = fields["input"] if isinstance(fields["input"], list) else []
    for name, known in WITHIN.items():
        extra = set(fields.get(name) or ()) - set(known.split())
        if extra:
            yield f"Unknown parameter: '{name}.{sorted(extra)[0]}'."
    for name, values in ONE_OF.items():
        outer, _, inner = name.rpartition(".")
        value = ((fields.get(outer) or {}) if outer else fields).get(inner)
        if value is not None and value not in values.split():
            yield f"Invalid value: '{value}'. Supported values are: {values}."
    for name in fields.get("include") or ():
        if name not in INCLUDABLE.split():
            yield f"Invalid value: '{name}'. Supported values are: {INCLUDABLE}."
    for number, item in enumerate(items):
        yield from _item_faults(number, item)
    yield from _order_faults(fields, items)
    tools = [*(fields.get("tools") or ()), *(
        tool for item in items if item.get("type") in ("additional_tools", "tool_search_output")
        for tool in item["tools"])]
    yield from _responses_tool_faults(tools)
    yield from _namespace_faults(items, tools)
    yield from _tool_choice_faults(fields.get("tool_choice"), tools)
    yield from _responses_text_faults(fields, items)
    yield from _responses_model_faults(fields)
    yield from _responses_limit_faults(fields)


def _item_faults(number, item):
    kind, place = item.get("type", "message"), f"input[{number}]"
    if kind not in ITEMS:
        yield f"Invalid value: '{kind}'. Supported values are: 'message', 'function_call', …"
        return
    extra = set(item) - {"type", "id", *ITEMS[kind].split()}
    if extra:
        yield f"Unknown parameter: '{place}.{sorted(extra)[0]}'."
    for name in REQUIRED_OF_ITEM.get(kind, "").split():
        if item.get(name) is None:
            yield f"Missing required parameter: '{place}.{name}'."
    for name, most in LONGEST.items():
        if item.get(name) is not None and not 1 <= len(item[name]) <= most:
            yield (f"Invalid '{place}.{name}': string too long. Expected a string with maximum "
                   f"length {most}, but got a string with length {len(item[name])} instead.")
    begins = ID_BEGINS.get(kind)
    if item.get("id") and begins and not item["id"].startswith(begins):
        yield f"Invalid '{place}.id': '{item['id']}'. Expected an ID that begins with '{begins}'."
    if kind == "message" and item.get("role") not in ("user", "assistant", "system", "developer"):
        yield f"Invalid value: '{item.get('role')}' in '{place}.role'."
    where = "output" if kind.endswith("_output") else (
        "assistant" if item.get("role") == "assistant" else "input")
    parts = item.get("output" if where == "output" else "content")
    if kind in ("message", "function_call_output", "custom_tool_call_output"):
        for inner, part in enumerate(parts if isinstance(parts, list) else ()):
            yield from _part_faults(f"{place}.{'output' if where == 'output' else 'content'}"
                                    f"[{inner}]", part, where)


# laravel/ai 324, 28 March 2026, for filename; the rest from openai 3.57.0's types.
REQUIRED_OF_ITEM = {
    "message": "content", "function_call": "arguments call_id name", "reasoning": "summary",
    "function_call_output": "call_id output", "custom_tool_call": "call_id input name",
    "custom_tool_call_output": "call_id output", "additional_tools": "role tools"}


def _part_faults(place, part, where):
    known, places = PARTS.get(part.get("type"), ("", ""))
    if where not in places.split():
        yield f"Invalid value: '{part.get('type')}' in '{place}.type'."
        return
    extra = set(part) - {"type", *known.split()}
    if extra:
        yield f"Unknown parameter: '{place}.{sorted(extra)[0]}'."
    for name in ("text", "refusal"):
        if name in known.split() and not isinstance(part.get(name), str):
            yield f"Invalid type for '{place}.{name}': expected a string."
    url = part.get("image_url")
    if part["type"] == "input_image" and not part.get("file_id") \
            and not re.match(r"https?://|data:image/(png|jpeg|webp|gif);base64,\S", str(url)):
        yield f"Invalid '{place}.image_url'. Expected a valid URL, but got a value with an " \
            "invalid format."
    if part.get("file_data") is not None:
        if not re.match(r"data:[\w.+/-]+;base64,\S", part["file_data"]):
            yield f"Invalid '{place}.file_data'. Expected a base64-encoded data URL."
        if not part.get("filename"):
            yield f"Missing required parameter: '{place}.filename'."


SAID_BY_MODEL = re.compile(r".*_call|reasoning|program|image_generation_call|mcp_.*|compaction")


def _order_faults(fields, items):
    """Calls and outputs, reasoning and what follows it, and what is stored nowhere."""
    has_state = fields.get("previous_response_id") or fields.get("conversation")
    asked, answered, seen = {}, set(), set()
    for number, item in enumerate(items):
        kind = item.get("type", "message")
        if item.get("id") in seen:
            yield (f"Duplicate item found with id {item['id']}. Remove duplicate items from your "
                   "input and try again.")                          # pi 5151, 28 May 2026
        seen |= {item["id"]} if item.get("id") else set()
        if kind in ("function_call", "custom_tool_call"):
            asked[item["call_id"]] = f"{kind}_output"
        if kind in ("function_call_output", "custom_tool_call_output"):
            if asked.get(item["call_id"]) != kind and not has_state:
                yield f"No tool call found for function call output with call_id {item['call_id']}."
            answered.add(item["call_id"])
        if kind == "reasoning":
            # A recorded 400 (pydantic-ai, modified history: stored, it must be that very item, by
            # its id), and agents-js 326 of 12 August 2025.
            rest = [other for other in items[number + 1:] if other.get("type") != "reasoning"][:1]
            if not any((SAID_BY_MODEL.fullmatch(other.get("type", "message"))
                        or other.get("role") == "assistant")
                       and (fields.get("store") is False or other.get("id")) for other in rest):
                yield (f"Item '{item.get('id')}' of type 'reasoning' was provided without its "
                       "required following item.")
            sealed = item.get("encrypted_content")
            if sealed is not None and not ENCRYPTED.fullmatch(sealed):
                yield (f"The encrypted content {sealed[:4]}...{sealed[-4:]} could not be verified. "
                       "Reason: Encrypted content could not be decrypted or parsed.")
        if fields.get("store") is False and (kind == "item_reference" or (
                kind == "reasoning" and not item.get("encrypted_content"))):
            # vercel/ai 7543, 25 July 2025; bifrost 5410, 21 July 2026.
            yield (f"Item with id '{item.get('id')}' not found. Items are not persisted when "
                   "`store` is set to false. Try again with `store` set to true, or remove this "
                   "item from your input.")
    for call in set(asked) - answered:
        yield f"No tool output found for function call {call}."


def _namespace_faults(items, tools):
    """A call of a tool that is in a namespace only says so (vercel/ai 15193, 12 May 2026)."""
    plain = {tool["name"] for tool in tools if tool["type"] in ("function", "custom")}
    spaced = {inner["name"] for tool in tools for inner in tool.get("tools") or ()}
    for item in items:
        if item.get("type") in ("function_call", "custom_tool_call") and not item.get("namespace") \
                and item["name"] in spaced - plain:
            yield (f"Missing namespace for function_call '{item['name']}'. It does not exist in the "
                   "default namespace. Round-trip the model's function_call item with its "
                   "namespace field included.")


def _tool_choice_faults(choice, tools):
    """As the API was asked case by case (vllm 40399, 20 April 2026)."""
    if choice in (None, "auto", "none"):
        return
    if not tools:
        kind = choice if isinstance(choice, str) else choice.get("type")
        yield f"Tool choice '{kind}' must be specified with 'tools' parameter."
        return
    if isinstance(choice, str):
        if choice != "required":
            yield f"Invalid value: '{choice}' in 'tool_choice'."
        return
    offered = {(tool["type"], tool.get("name")) for tool in tools}
    offered |= {(inner["type"], inner["name"]) for tool in tools
                for inner in tool.get("tools") or ()}
    kinds = {"function": "name", "custom": "name", "allowed_tools": "mode tools",
             "mcp": "name server_label"}
    extra = set(choice) - {"type", *kinds.get(choice.get("type"), "").split()}
    if extra or choice.get("type") not in {*kinds, *HOSTED_TOOLS}:
        yield f"Unknown parameter: 'tool_choice.{(sorted(extra) or ['type'])[0]}'."
        return
    named = choice["tools"] if choice["type"] == "allowed_tools" else [choice]
    for tool in named:
        if (tool["type"], tool.get("name")) not in offered:
            yield f"Tool choice '{tool['type']}' not found in 'tools' parameter."


def _responses_text_faults(fields, items):
    form = (fields.get("text") or {}).get("format") or {"type": "text"}
    if form["type"] not in FORMATS:
        yield f"Invalid value: '{form['type']}' in 'text.format.type'."
        return
    extra = set(form) - {"type", *FORMATS[form["type"]].split()}
    if extra:
        yield f"Unknown parameter: 'text.format.{sorted(extra)[0]}'."
    if form["type"] == "json_schema":
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", form.get("name") or ""):
            yield "Missing required parameter: 'text.format.name'."
        if not isinstance(form.get("schema"), dict):
            yield "Missing required parameter: 'text.format.schema'."
        elif form.get("strict"):
            yield from _strict_faults(form["schema"])
    said = fields["input"] if isinstance(fields["input"], str) else json.dumps(items)
    if form["type"] == "json_object" and "json" not in said.lower():
        yield ("Response input messages must contain the word 'json' in some form to use "
               "'text.format' of type 'json_object'.")


def _responses_model_faults(fields):
    """What a family does not take. For models that do not reason: litellm 38842 of 2026,
    OpenHands/software-agent-sdk 1208 of November 2025 and concordia 164 of September 2025."""
    model, efforts = fields["model"], efforts_of(fields["model"])
    reasoning = fields.get("reasoning") or {}
    effort = reasoning.get("effort")
    if not efforts:
        for name in ("effort", "summary"):
            if reasoning.get(name) is not None:
                yield f"Unsupported parameter: 'reasoning.{name}' is not supported with this model."
        if "reasoning.encrypted_content" in (fields.get("include") or ()):
            yield "Encrypted content is not supported with this model."
        if (fields.get("text") or {}).get("verbosity") not in (None, "medium"):
            yield (f"Unsupported value: '{fields['text']['verbosity']}' is not supported with the "
                   f"'{model}' model. Supported values are: 'medium'.")
        return
    if effort is not None and effort not in efforts:
        yield (f"Unsupported value: '{effort}' is not supported with the '{model}' model. "
               f"Supported values are: {', '.join(efforts)}.")
    if re.match(r"gpt-5\.[1-4](-mini|-nano|$)", model):     # a recorded 200 (ellmer, tools)
        effort = effort or "none"
    for name in ("temperature", "top_p"):
        if fields.get(name) not in (None, 1) and effort != "none":
            yield f"Unsupported parameter: '{name}' is not supported with this model."


def _responses_limit_faults(fields):
    """Lengths and numbers: pi 6265 of 2 July 2026 for the cap, the types' texts for the rest."""
    cap = fields.get("max_output_tokens")
    if cap is not None and cap < 16:
        yield ("Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, "
               f"but got {cap} instead.")
    for name, most in (("safety_identifier", 128), ("prompt_cache_key", 64)):
        if len(fields.get(name) or "") > most:
            yield f"Invalid '{name}': string too long. Expected a maximum length of {most}."
    metadata = fields.get("metadata") or {}
    if len(metadata) > 16 or any(len(name) > 64 or not isinstance(value, str) or len(value) > 512
                                 for name, value in metadata.items()):
        yield "Invalid 'metadata': at most 16 pairs of strings of 64 and 512 characters."


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
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", tool.get("name") or ""):
            yield f"Invalid 'tools[{number}].name': string does not match pattern."
        if tool["type"] == "function":
            yield from _parameter_faults(tool["name"], tool.get("parameters"))
            if tool.get("strict"):
                yield from _strict_faults(tool["parameters"])
        yield from _responses_tool_faults(tool.get("tools") or [])


def _parameter_faults(name, schema):
    """A function takes an object (openai-node 1353, and many others)."""
    if schema and schema.get("type") != "object":
        yield (f"Invalid schema for function '{name}': schema must be a JSON Schema of "
               f"'type: \"object\"', got 'type: \"{schema.get('type')}\"'.")


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
