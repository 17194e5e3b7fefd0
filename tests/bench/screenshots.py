"""Bodies as computer-using agents send them at every turn: the conversation so far, with a
screenshot behind each of the model's actions, in the forms of three APIs."""
import base64
import json
import random
import struct
import zlib


def png(size, rng):
    """A valid PNG of about `size` bytes: noise, in grey, which nothing compresses."""
    width = 1024
    height = max(1, size // (width + 1))
    rows = b"".join(b"\0" + rng.randbytes(width) for _ in range(height))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def _turn_of(api, number, data):
    action = {"action": "left_click", "coordinate": [17 * number % 1024, 13 * number % 768]}
    said = f"Step {number} – I see the page, “{number}” is open. ✅ I click on the next row.\n"
    if api == "messages":
        return [
            {"role": "assistant", "content": [
                {"type": "text", "text": said},
                {"type": "tool_use", "id": f"toolu_{number:024}", "name": "computer",
                 "input": action}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": f"toolu_{number:024}", "content": [
                    {"type": "image", "source": {
                        "type": "base64", "media_type": "image/png", "data": data}}]}]}]
    url = "data:image/png;base64," + data
    if api == "chat":
        return [
            {"role": "assistant", "content": said, "tool_calls": [
                {"id": f"call_{number:024}", "type": "function", "function": {
                    "name": "computer", "arguments": json.dumps(action)}}]},
            {"role": "tool", "tool_call_id": f"call_{number:024}", "content": "done"},
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": url, "detail": "high"}}]}]
    return [
        {"role": "assistant", "content": [{"type": "output_text", "text": said}]},
        {"type": "function_call", "call_id": f"call_{number:024}", "name": "computer",
         "arguments": json.dumps(action)},
        {"type": "function_call_output", "call_id": f"call_{number:024}", "output": [
            {"type": "input_image", "image_url": url, "detail": "auto"}]}]


def conversation(api, size, model, one=750_000, seed=7):
    """The fields of a request of about `size` bytes, with screenshots of `one` bytes in base64."""
    rng = random.Random(seed)
    turns = [{"role": "user", "content": "Find the cheapest flight, please. " * 40}]
    data = base64.b64encode(png(one * 3 // 4, rng)).decode()
    for number in range(max(1, size // one)):
        mark = base64.b64encode(rng.randbytes(48)).decode()           # so that no two are equal
        turns += _turn_of(api, number, data[:8_000] + mark + data[8_000 + len(mark):])
    schema = {"type": "object", "properties": {
        "action": {"type": "string"}, "coordinate": {"type": "array", "items": {"type": "integer"}}}}
    if api == "messages":
        return {"model": model, "max_tokens": 72, "messages": turns, "tools": [
            {"name": "computer", "description": "the screen", "input_schema": schema}]}
    if api == "chat":
        return {"model": model, "max_tokens": 72, "messages": turns, "tools": [
            {"type": "function", "function": {"name": "computer", "parameters": schema}}]}
    return {"model": model, "max_output_tokens": 72, "input": turns, "tools": [
        {"type": "function", "name": "computer", "parameters": schema}]}
