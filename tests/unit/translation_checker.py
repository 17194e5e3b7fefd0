"""Protocol checkers of translated streams, written from the APIs' references: they know nothing of
the translators. Each folds the stream into a whole answer on its way."""
import json


def check_message_stream(events):
    """Anthropic's stream: one message_start, blocks opened and closed in order with dense indices,
    one at a time, deltas of the block's own kind, no empty text block, one message_stop at the end.
    Returns the message that an accumulator would build."""
    events = [event for event in events if event["type"] != "ping"]
    assert "message_start" == events[0]["type"], events[:1]
    assert "message_stop" == events[-1]["type"], events[-1:]
    message = json.loads(json.dumps(events[0]["message"]))
    assert [] == message["content"] and message["stop_reason"] is None
    is_open, deltas_seen = False, 0
    kinds = {"text": {"text_delta"}, "thinking": {"thinking_delta", "signature_delta"},
             "tool_use": {"input_json_delta"}}
    for event in events[1:-1]:
        kind = event["type"]
        if kind == "content_block_start":
            assert not is_open and event["index"] == len(message["content"])
            message["content"].append({**event["content_block"], "_json": ""})
            is_open, deltas_seen = True, 0
        elif kind == "content_block_delta":
            block = message["content"][-1]
            assert is_open and event["index"] == len(message["content"]) - 1
            delta = event["delta"]
            assert delta["type"] in kinds[block["type"]]
            deltas_seen += 1
            if delta["type"] == "text_delta":
                assert delta["text"]
                block["text"] += delta["text"]
            elif delta["type"] == "thinking_delta":
                block["thinking"] += delta["thinking"]
            elif delta["type"] == "signature_delta":
                block["signature"] += delta["signature"]
            else:
                block["_json"] += delta["partial_json"]
        elif kind == "content_block_stop":
            block = message["content"][-1]
            assert is_open and event["index"] == len(message["content"]) - 1
            if block["type"] == "text":
                assert block["text"], "an empty text block"
            if block["type"] == "tool_use":
                block["input"] = json.loads(block["_json"])
                assert isinstance(block["input"], dict) and block["id"] and block["name"]
            if block["type"] == "thinking":
                assert block["signature"]
            is_open = False
        elif kind == "message_delta":
            assert not is_open and message["stop_reason"] is None
            assert event["delta"]["stop_reason"] is not None
            message.update(event["delta"])
            message["usage"] = {**message["usage"], **event["usage"]}
        else:
            raise AssertionError(f"an event of the type {kind}")
    assert message["stop_reason"] is not None, "no message_delta"
    for block in message["content"]:
        del block["_json"]
    return message


def check_chat_stream(chunks, asks_usage=False):
    """A chat stream: one id and model, the role first and once, tool indices dense and in order,
    an id and a name in a call's first delta, one finish_reason, after which there is nothing but the
    usage chunk, and that only if asked; pings anywhere. Returns the message, its finish reason and
    the usage."""
    chunks = [chunk for chunk in chunks if chunk != {"type": "ping"}]
    assert 1 == len({(chunk["id"], chunk["model"], chunk["created"]) for chunk in chunks})
    message, calls, finish, usage = {"content": ""}, [], None, None
    for number, chunk in enumerate(chunks):
        assert "chat.completion.chunk" == chunk["object"]
        assert asks_usage == ("usage" in chunk)
        if not chunk["choices"]:
            assert asks_usage and finish is not None and chunk is chunks[-1]
            usage = chunk["usage"]
            continue
        assert finish is None, "a delta after the finish"
        [choice] = chunk["choices"]
        delta = choice["delta"]
        assert 0 == choice["index"] and ("role" in delta) == (number == 0)
        message["content"] += delta.get("content") or ""
        for name in ("reasoning_content", "refusal"):
            if delta.get(name):
                message[name] = message.get(name, "") + delta[name]
        for block in delta.get("thinking_blocks", ()):
            assert isinstance(block["index"], int)
            message.setdefault("thinking_blocks", []).append(block)
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["id"] and call["type"] and call[call["type"]]["name"]
                calls.append(json.loads(json.dumps(call)))
            else:
                assert 0 <= call["index"] < len(calls) and "id" not in call
                whole = calls[call["index"]]
                inner = whole[whole["type"]]
                for name, more in call[whole["type"]].items():
                    inner[name] += more
        finish = choice["finish_reason"]
    assert finish is not None, "no finish_reason"
    assert asks_usage == (usage is not None)
    if calls:
        message["tool_calls"] = calls
    return message, finish, usage


# Responses: field of an item that events fill, and the events' names; from openai 3.57.0's types
# and recorded streams of 2025 and 2026.
FILLED = {"function_call": ("arguments", "function_call_arguments"),
          "custom_tool_call": ("input", "custom_tool_call_input"),
          "mcp_call": ("arguments", "mcp_call_arguments"),
          "code_interpreter_call": ("code", "code_interpreter_call_code")}
# Kinds of parts: where they stand in an item, the index and the text's name, and the events' names.
PART_TEXTS = {"output_text": ("content", "content_index", "text", "output_text"),
              "refusal": ("content", "content_index", "refusal", "refusal"),
              "reasoning_text": ("content", "content_index", "text", "reasoning_text"),
              "summary_text": ("summary", "summary_index", "text", "reasoning_summary_text")}
ENDS = {"response.completed": "completed", "response.incomplete": "incomplete",
        "response.failed": "failed"}
ITEM_FIELDS = {                         # what an item of an answer has beside its id and type
    "message": ("role", "content"), "reasoning": ("summary",),
    "function_call": ("call_id", "name", "arguments"),
    "custom_tool_call": ("call_id", "name", "input"), "web_search_call": ("status",)}


def check_response_stream(events):
    """OpenAI's stream of Responses: numbered from 0 without a gap; created first; items and parts
    opened in order with dense indexes, filled by deltas, ended by the text that their deltas make,
    and all closed before one end, whose response is what the stream has made; nothing after it.
    Returns that response."""
    assert [*range(len(events))] == [event["sequence_number"] for event in events]
    kinds = [event["type"] for event in events]
    assert "response.created" == kinds[0] and kinds[-1] in ENDS, (kinds[:1], kinds[-1:])
    assert 1 == sum(kind in ENDS for kind in kinds) == kinds.count("response.created")
    final = events[-1]["response"]
    items, state = [], "queued"
    for event in events[:-1]:
        kind = event["type"]
        if kind in ("response.created", "response.queued", "response.in_progress"):
            opened = event["response"]
            state = opened["status"]
            assert not items and state in ("queued", "in_progress"), kind
            assert (final["id"], [], None, None) == (
                opened["id"], opened["output"], opened["usage"], opened["error"]), kind
        elif kind == "error":
            assert "response.failed" == kinds[-1] == kinds[kinds.index("error") + 1]
        else:
            assert "in_progress" == state, f"{kind} before response.in_progress"
            _item_event(kind.partition(".")[2], event, items)
    assert ENDS[kinds[-1]] == final["status"]
    done = [item["done"] for item in items]
    assert "failed" == final["status"] or None not in done, "an item was left open"
    assert _lasting([item for item in done if item]) == _lasting(final["output"])
    assert len({item["id"] for item in final["output"]}) == len(final["output"])
    return check_response(final)


def _lasting(value):
    """A value without what differs from event to event: what is encrypted anew, and logprobs."""
    if isinstance(value, list):
        return [_lasting(child) for child in value]
    if isinstance(value, dict):
        return {name: _lasting(child) for name, child in value.items()
                if name not in ("encrypted_content", "logprobs")}
    return value


def _item_event(name, event, items):
    """One event within an item; items: {"item", "parts", "done"} in order of their indexes."""
    if name == "output_item.added":
        item = json.loads(json.dumps(event["item"]))
        assert len(items) == event["output_index"] and item["id"] and item["type"]
        assert item.get("status") in (None, "in_progress")
        assert not item.get("content") and not item.get("summary"), "an item opens empty"
        filled = FILLED.get(item["type"], (None,))[0]
        assert not item.get(filled), "an item opens empty"
        items.append({"item": item, "parts": {}, "done": None, "ended": False})
        return
    held = items[event["output_index"]]
    assert held["done"] is None, f"{name} after the item's end"
    if name == "output_item.done":
        held["done"] = _closed_item(held, event["item"])
        return
    assert held["item"]["id"] == event["item_id"], name
    family, _, step = name.rpartition(".")
    if family in ("content_part", "reasoning_summary_part"):
        _part_event(step, event, held)
    elif name == "output_text.annotation.added":
        part = held["parts"]["content", event["content_index"]]
        assert len(part["part"]["annotations"]) == event["annotation_index"]
        part["part"]["annotations"].append(event["annotation"])
    elif family in {texts[3] for texts in PART_TEXTS.values()}:
        _text_event(family, step, event, held)
    elif step in ("delta", "done") and held["item"]["type"] in FILLED:
        field, owner = FILLED[held["item"]["type"]]
        assert owner == family and not held["ended"], name
        if step == "delta":
            held["item"][field] = (held["item"].get(field) or "") + event["delta"]
        else:
            assert (held["item"].get(field) or "") == event[field], "what is done is not the deltas"
            held["ended"] = True
    else:                                          # a tool of the provider's: states in order
        assert family == held["item"]["type"], f"{name} in an item of {held['item']['type']}"


def _part_event(step, event, held):
    place, index, text, _ = PART_TEXTS[event["part"]["type"]]
    key, parts = (place, event[index]), held["parts"]
    if step == "added":
        assert event[index] == sum(place == other for other, _ in parts), "indexes are dense"
        assert all(part["is_done"] for part in parts.values()), "one part is open at a time"
        assert "" == event["part"][text], "a part opens empty"
        parts[key] = {"part": json.loads(json.dumps(event["part"])), "is_said": False,
                      "is_done": False}
    else:
        part = parts[key]
        assert part["is_said"] and not part["is_done"]
        assert _lasting(part["part"]) == _lasting(event["part"]), "a part is what its deltas made"
        part["is_done"] = True


def _text_event(family, step, event, held):
    place, index, text = next(texts[:3] for texts in PART_TEXTS.values() if texts[3] == family)
    part = held["parts"][place, event[index]]
    assert not part["is_said"], f"{family}.{step} after the text's end"
    assert PART_TEXTS[part["part"]["type"]][3] == family
    if step == "delta":
        assert event["delta"], "an empty delta"
        part["part"][text] += event["delta"]
    else:
        assert part["part"][text] == event[text], "what is done is not the deltas"
        part["is_said"] = True


def _closed_item(held, done):
    """The item as it ended: what its events made of the one that was opened."""
    opened = held["item"]
    assert all(part["is_done"] for part in held["parts"].values()), "a part was left open"
    for name in ("id", "type", "call_id", "name", "namespace", "role"):
        assert opened.get(name) == done.get(name), f"the item's {name} changed"
    for place in ("content", "summary"):
        made = [part["part"] for (other, _), part in held["parts"].items() if other == place]
        assert _lasting(made) == _lasting(done.get(place) or []), f"{place} is not what was streamed"
    if done["type"] in ("function_call", "custom_tool_call"):
        assert held["ended"], "arguments that were never done"
    field = FILLED.get(done["type"], ("id",))[0]
    assert (opened.get(field) or "") == (done.get(field) or ""), f"{field} is not what was streamed"
    assert done.get("status") in (None, "completed", "incomplete")
    return done


def check_response(response):
    """A whole Response: the fields that its type requires, items whole and of their own ids, and
    usage that adds up; by the SDK's types too, where it is installed. Returns it."""
    for name in ("id", "created_at", "model", "output", "parallel_tool_calls", "tool_choice",
                 "tools", "error", "incomplete_details", "instructions", "metadata", "usage"):
        assert name in response, f"a response without {name}"
    assert "response" == response["object"] and response["id"].startswith("resp_")
    status, reason = response["status"], (response["incomplete_details"] or {}).get("reason")
    assert status in ENDS.values()
    assert ("incomplete" == status) == (reason is not None), response["incomplete_details"]
    assert ("failed" == status) == (response["error"] is not None), response["error"]
    assert len({item["id"] for item in response["output"]}) == len(response["output"])
    for item in response["output"]:
        for name in ITEM_FIELDS.get(item["type"], ()):
            assert name in item, f"an item of type {item['type']} without {name}"
    calls = [item["call_id"] for item in response["output"] if item["type"] in FILLED
             and "call_id" in item]
    assert len(set(calls)) == len(calls), "calls share an id"
    usage = response["usage"]
    assert usage is not None or "failed" == status
    if usage is not None:
        assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
        assert usage["input_tokens_details"]["cached_tokens"] <= usage["input_tokens"]
        assert usage["output_tokens_details"]["reasoning_tokens"] <= usage["output_tokens"]
    return response
