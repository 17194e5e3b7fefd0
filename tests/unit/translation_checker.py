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
