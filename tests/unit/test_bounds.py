"""Bounds: no call that a provider can bill for a request costs more than the request's bound,
whatever its text, tools, tier, place or cache; the output cap that is derived from an amount is
the largest that fits; and what no bound covers is refused."""
from __future__ import annotations

import contextlib
import functools
import json
import tracemalloc
import unicodedata
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

import adversarial_texts
import ironcage_proxy as ic
from support import SHARED, each_seed, seeds

BOOK = ic.PriceBook.load(str(Path(ic.__file__).resolve().with_name("pricing.json")))
PRICES = [BOOK.price(key) for key in BOOK.keys()]
ROW = {"litellm_provider": "openai", "mode": "chat", "max_input_tokens": 1_000_000,
       "max_output_tokens": 50_000, "input_cost_per_token": Decimal("0.00001"),
       "output_cost_per_token": Decimal("0.00005")}
CLAUDE = {**ROW, "litellm_provider": "anthropic",
          "cache_creation_input_token_cost": Decimal("0.0000125"),
          "cache_creation_input_token_cost_above_1hr": Decimal("0.00002")}


OPENAI = ic.KNOWN_PROVIDERS["openai"]


def openai_in(region: str | None) -> ic.Provider:
    """OpenAI at the host of a region."""
    host = f"{region}.api.openai.com" if region else "api.openai.com"
    return OPENAI._replace(base_url=f"https://{host}/v1")


def price_of(row: dict, key: str = "m") -> ic.Price:
    return ic.PriceBook({key: row}).price(key)


def cap_of(bound, free, **how):
    """The output cap to reserve for while so much is free; None: not now."""
    caps = bound.fitting_caps(free, **how)
    return caps and caps.output_tokens


def body_of(fields: dict) -> ic.JsonBody:
    return ic.parse_json_object(json.dumps(fields).encode())


def bound_of(api: str, fields: dict, row: dict = ROW, **options: object) -> ic.Bound:
    return ic.bound_of_request(api, body_of(fields), price_of(row), **options)


def checked(api: str, fields: dict, row: dict = None, key: str = "m", provider: str = "openai",
            **options) -> list:
    return ic.check_boundable(api, body_of(fields), price_of(row or ROW, key),
                              provider=ic.manners_of(provider), **options)


def chat(**fields: object) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **fields}


def message(**fields: object) -> dict:
    return {"model": "m", "max_tokens": 100, **chat(), **fields}


# Any request, and any bill that a provider can make of it.

SCRIPTS = ("abc deZ 019", "{}[]\":,\\/", "\n\t\x01\x7f", "äöüßéñ", "привет", "שלום", "مرحبا",
           "नमस्ते", "日本語漢字", "한국어", "🐤😀🏳\u200d🌈", "\u2028\u0301\ufffd", "𝔘𝔫𝔦")


def text(rng: Random, most: int = 40) -> str:
    script = rng.choice(SCRIPTS)
    return "".join(rng.choices(script, k=rng.randrange(most)))


def seen_tokens(value: object) -> int:
    """The most tokens that a byte-level tokenizer can make of a JSON value."""
    if isinstance(value, str):
        return len(value.encode("utf-8"))
    if isinstance(value, dict):
        return sum(seen_tokens(name) + seen_tokens(child) for name, child in value.items())
    if isinstance(value, list):
        return sum(map(seen_tokens, value))
    return 1                                        # a token id, a number, true, false or null


def serialised(rng: Random, fields: dict) -> bytes:
    """The fields as one of the JSON texts that clients send; some hide words behind escapes."""
    body = json.dumps(fields, ensure_ascii=rng.random() < 0.5,
                      separators=rng.choice([(",", ":"), (", ", ": ")]),
                      indent=rng.choice([None, None, 1]))
    for word, hidden in (('"1h"', '"\\u0031h"'), ('"cache_control"', '"cache\\u005fcontrol"'),
                         ('"12h"', '"1\\u0032h"')):
        if rng.random() < 0.5:
            body = body.replace(word, hidden)
    return body.encode()


def cached(rng: Random) -> dict:
    """A cache mark, or none."""
    ttl = rng.choice([{}, {"ttl": "5m"}, {"ttl": "1h"}])
    return rng.choice([{}, {"cache_control": {"type": "ephemeral", **ttl}}])


def prompt_of(rng: Random, api: str) -> dict:
    if api == "embeddings":
        return {"input": rng.choice([text(rng), [text(rng), text(rng)], [1, 22, 333],
                                     [[1, 2], [3]]])}
    if api == "completions":
        return {"prompt": rng.choice([text(rng), [text(rng), text(rng), "x"], [1, 22, 333],
                                      [[1, 2], [3]]]),
                **({"best_of": 3} if rng.random() < 0.3 else {})}
    roles = ("user", "assistant")
    turns = []
    for _ in range(rng.randrange(1, 5)):
        part = {"type": "input_text" if api == "responses" else "text", "text": text(rng, 300),
                **(cached(rng) if api == "messages" else {})}
        turns.append({"role": rng.choice(roles), "content": rng.choice([text(rng), [part]])})
    if api == "responses":
        return {"input": rng.choice([text(rng), turns]), "instructions": text(rng)}
    system = {"system": [{"type": "text", "text": text(rng), **cached(rng)}]}
    return {"messages": turns, **(system if api == "messages" else {})}


def request_of(rng: Random, api: str) -> dict:
    fields: dict = {"model": "m", **prompt_of(rng, api)}
    if rng.random() < 0.15 and api in ("chat", "messages"):
        kind = "input_audio" if api == "chat" else "document"
        fields["messages"].append({"role": "user", "content": [{"type": kind, kind: {"x": "y"}}]})
    for name in ic.MAX_TOKENS_FIELDS[api]:
        if rng.random() < 0.7 or api == "messages":
            fields[name] = rng.choice([0, 1, 16, 1_000, 60_000, 300_000])
    if rng.random() < 0.3 and api in ("chat", "responses", "messages"):
        fields["tools"] = [{"type": "function", "name": text(rng)}] if api != "messages" else [
            {"name": "f", "input_schema": {"type": "object", text(rng): {}}, **cached(rng)}]
    if rng.random() < 0.3 and api in ("chat", "completions"):
        fields["n"] = rng.choice([None, 1, 2, 7])
    if rng.random() < 0.4:
        fields["service_tier"] = rng.choice(
            [None, "auto", "standard_only"] if api == "messages" else
            [None, "auto", "default", "flex", "priority", "fast", "ultrafast", "of 2031"])
    if api == "messages":
        fields.update({name: rng.choice(values) for name, values in (
            ("inference_geo", [None, "us", "global"]), ("speed", [None, "standard", "fast"]))
            if rng.random() < 0.6})
    if rng.random() < 0.1 and api in ("chat", "responses"):
        fields["prompt_cache_options"] = {"ttl": "12h"}
    if rng.random() < 0.1 and api == "chat":
        fields["modalities"] = ["text", "audio"]
    if rng.random() < 0.1 and api == "chat":
        fields["prediction"] = {"type": "content", "content": "ab c" * rng.randrange(750)}
    return fields


def choices_of(api: str, fields: dict) -> int:
    prompt = fields.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt[0] != 1 else 1
    return prompts * max(fields.get("n") or 1, fields.get("best_of") or 1)


def part_of(rng: Random, most: int) -> int:
    return rng.choice([0, 0, most, rng.randrange(most + 1)])


def bill_of(rng: Random, api: str, fields: dict, price: ic.Price, cap: int) -> tuple[dict, dict]:
    """(usage, options of cost()) of a call that the provider can have made of the request."""
    said = json.dumps(fields)
    most_input = seen_tokens(fields) + 7 + 2_179 * ("tools" in fields)
    if any(f'"type": "{kind}"' in said for kind in ("input_audio", "document")):
        most_input = price.max_input_tokens
    most_output = cap * choices_of(api, fields) + seen_tokens(fields.get("prediction", ""))
    prompt, output = most_input - part_of(rng, most_input), most_output - part_of(rng, most_output)
    read = part_of(rng, prompt)
    if api == "messages":
        written = part_of(rng, prompt - read) if "cache_control" in said else 0
        hour = part_of(rng, written) if '"1h"' in said else 0
        geo = {None: rng.choice(["us", "global", "not_available"]), "us": "us"}.get(
            fields.get("inference_geo"), "global")
        return {"input_tokens": prompt - read - written, "output_tokens": output,
                "cache_read_input_tokens": read, "cache_creation_input_tokens": written,
                "cache_creation": {"ephemeral_5m_input_tokens": written - hour,
                                   "ephemeral_1h_input_tokens": hour},
                "inference_geo": geo, "service_tier": rng.choice(["standard", "priority"]),
                "speed": rng.choice([fields.get("speed"), "standard"])}, {}
    written = part_of(rng, prompt - read)
    half_day = part_of(rng, written) if '"12h"' in said else 0
    heard = part_of(rng, prompt - read - written) if "input_audio" in said else 0
    spoken = part_of(rng, output) if "modalities" in said else 0
    ins, outs = ("input", "output") if api == "responses" else ("prompt", "completion")
    usage = {f"{ins}_tokens": prompt, f"{ins}_tokens_details": {
                 "cached_tokens": read, "cache_write_tokens": written, "audio_tokens": heard,
                 "cache_write_tokens_details": {"ttl_12h_tokens": half_day}},
             f"{outs}_tokens": output, f"{outs}_tokens_details": {
                 "audio_tokens": spoken, "reasoning_tokens": part_of(rng, output)}}
    asked = fields.get("service_tier")
    served = {"fast": "priority", "auto": "default",
              "of 2031": rng.choice(["priority", "ultrafast", "flex"])}.get(asked, asked)
    return usage, {"service_tier": rng.choice([served, "default", None])}


@functools.lru_cache(maxsize=None)
def sellers(api: str) -> list[ic.Price]:
    if api == "messages":
        return [price for price in PRICES if price.provider == "anthropic"]
    return [price for price in PRICES if price.provider != "anthropic"
            and price.max_input_tokens and not ic._searches(price.key)]


@each_seed(70, 200)
def test_no_bill_that_a_provider_can_make_is_above_the_bound(seed):
    rng = Random(seed)
    for _ in range(10):
        api = rng.choice(["chat", "responses", "messages", "messages", "completions",
                          "embeddings"])
        price = rng.choice(sellers(api))
        fields = request_of(rng, api)
        residency = rng.choice([None, "us", "eu"]) if api != "messages" else None
        body = ic.parse_json_object(serialised(rng, fields))
        bound = ic.bound_of_request(api, body, price, provider=openai_in(residency))
        cap = rng.choice([bound.output_tokens, rng.randrange(bound.output_tokens + 1)])

        usage, options = bill_of(rng, api, fields, price, cap)
        cost = BOOK.cost(price.key, usage, api=api, data_residency=residency, **options)

        assert cost <= bound.microdollars(cap), (api, price.key, body.raw, usage)


@each_seed(100)
def test_a_tier_that_the_project_defaults_to_is_bounded(seed):
    rng = Random(seed)
    price = rng.choice(sellers("chat"))
    usage = {"prompt_tokens": 20, "completion_tokens": 50}
    fields = chat(max_tokens=50, **rng.choice([{}, {"service_tier": "auto"}]))

    bound = ic.bound_of_request("chat", body_of(fields), price,
                                provider=OPENAI._replace(default_service_tier="priority"))
    costs = [BOOK.cost(price.key, usage, api="chat", service_tier=tier)
             for tier in (None, "priority")]

    assert max(costs) <= bound.microdollars(50)


# The bound, in figures.

def test_the_bound_of_text_is_its_bytes_and_its_output_cap():
    fields = chat(max_tokens=1_000)
    body_bytes = len(json.dumps(fields))

    bound = bound_of("chat", fields)

    assert body_bytes + 64 == bound.input_tokens
    assert (body_bytes + 64) * 10 + 1_000 * 50 == bound.microdollars(bound.output_tokens)


def test_text_beyond_ascii_is_counted_in_bytes_and_not_in_characters():
    body = ic.parse_json_object('{"messages":[{"role":"user","content":"日本語"}]}'.encode())

    assert len(body.raw.decode()) + 6 + 64 == ic.input_tokens_bound(body, price_of(ROW))


@pytest.mark.parametrize("fields", [
    {"tools": [{"type": "function"}]}, {"functions": [{"name": "f"}]},
    {"response_format": {"type": "json_schema"}}, {"text": {"format": {"type": "json_schema"}}},
    {"output_config": {"format": {}}}, {"output_format": {"type": "json_schema"}},
    {"prompt_mode": "reasoning"}, {"safe_prompt": True}, {"documents": [{"text": "x"}]},
    {"chat_template_kwargs": {"enable_thinking": False}},
])
def test_tools_and_schemas_bring_system_prompts_that_are_bounded(fields):
    bound = bound_of("chat", chat(**fields))

    assert len(json.dumps(chat(**fields))) + 4_096 == bound.input_tokens


@pytest.mark.parametrize("api, fields, answers", [
    ("chat", chat(n=None), 1), ("chat", chat(n=3), 3),
    ("completions", {"prompt": "a"}, 1), ("completions", {"prompt": ["a", "b"]}, 2),
    ("completions", {"prompt": ["a", "b"], "n": 2}, 4),
    ("completions", {"prompt": ["a", "b"], "n": 2, "best_of": 5}, 10),
    ("completions", {"prompt": [1, 2, 3]}, 1), ("completions", {"prompt": [[1, 2], [3]]}, 2),
    ("completions", {"prompt": []}, 1), ("responses", {"input": "a", "n": 3}, 1),
    ("messages", message(n=3), 1),
])
def test_each_answer_that_is_asked_for_is_bounded(api, fields, answers):
    bound = bound_of(api, fields)

    assert answers * 50 * 1_000_000 == bound.output_picodollars


@pytest.mark.parametrize("api, fields, cap", [
    ("chat", {}, None), ("chat", {"max_tokens": 5}, 5), ("chat", {"max_completion_tokens": 5}, 5),
    ("chat", {"max_tokens": 5, "max_completion_tokens": 7}, 7),
    ("chat", {"max_tokens": 9, "max_completion_tokens": None}, 9),
    ("chat", {"max_tokens": 0}, 0), ("chat", {"max_output_tokens": 5}, None),
    ("responses", {"max_output_tokens": 5}, 5), ("responses", {"max_tokens": 5}, None),
    ("messages", {"max_tokens": 5}, 5), ("completions", {}, 16),
    ("completions", {"max_tokens": 500}, 500), ("embeddings", {"max_tokens": 5}, None),
])
def test_the_largest_cap_that_the_client_set_counts(api, fields, cap):
    assert cap == ic.asked_output_tokens(api, fields)


@pytest.mark.parametrize("bad", [-1, 1.5, "5", True, [], 10 ** 12])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n"])
def test_a_cap_that_is_no_count_is_refused(name, bad):
    with pytest.raises(ic.BadRequest) as caught:
        bound_of("chat", chat(**{name: bad}))

    assert name == caught.value.param


@pytest.mark.parametrize("n", [0, 129])
def test_a_number_of_answers_out_of_range_is_refused(n):
    with pytest.raises(ic.BadRequest, match="n must be a whole number from 1 to 128"):
        bound_of("chat", chat(n=n))


def test_a_cap_above_the_models_own_maximum_counts_as_it_travels():
    """The provider refuses it, unless a beta allows it: then it is what can be billed."""
    bound = bound_of("chat", chat(max_tokens=10 ** 9))

    assert 10 ** 9 == bound.output_tokens
    assert 50_000 == bound_of("chat", chat()).output_tokens


def test_a_model_whose_maximum_is_unknown_is_bounded_by_what_is_asked_or_assumed():
    row = {name: value for name, value in ROW.items() if name != "max_output_tokens"}

    assert 10 ** 6 == bound_of("chat", chat(max_tokens=10 ** 6), row).output_tokens
    assert 128_000 == bound_of("chat", chat(), row).output_tokens


def test_an_embedding_has_no_output():
    bound = bound_of("embeddings", {"input": "text"})

    assert (0, bound.microdollars(0)) == (
        bound.output_tokens, (bound.input_tokens * 10))


def test_a_rejected_prediction_is_bounded_beside_the_cap():
    fields = chat(max_tokens=10, prediction={"type": "content", "content": "x" * 500})
    without = {name: value for name, value in fields.items() if name != "prediction"}

    more = bound_of("chat", fields).microdollars(10) - bound_of("chat", without).microdollars(10)

    assert more >= 500 * 50 + 500 * 10


@pytest.mark.parametrize("geo, factor", [("absent", 11), (None, 11), ("us", 11), ("global", 10)])
@pytest.mark.parametrize("speed, fast", [("absent", 1), (None, 1), ("fast", 6)])
def test_place_and_speed_multiply_the_bound(geo, factor, speed, fast):
    row = {**CLAUDE, "provider_specific_entry": {"us": Decimal("1.1"), "fast": 6}}
    asked = {name: value for name, value in (("inference_geo", geo), ("speed", speed))
             if value != "absent"}

    bound = bound_of("messages", message(**asked), row)

    assert bound.input_tokens * 10 ** 6 * factor * fast == bound.input_picodollars
    assert 5 * 10 ** 6 * factor * fast == bound.output_picodollars


@pytest.mark.parametrize("residency, factor", [(None, 10), ("eu", 12), ("us", 11)])
def test_regional_hosts_multiply_the_bound(residency, factor):
    row = {**ROW, "regional_processing_uplift_multiplier_us": Decimal("1.1"),
           "regional_processing_uplift_multiplier_eu": Decimal("1.2")}

    bound = bound_of("chat", chat(), row, provider=openai_in(residency))

    assert bound.input_tokens * 10 ** 6 * factor == bound.input_picodollars


@pytest.mark.parametrize("raw, rate", [
    ('{"max_tokens":1,"messages":[]}', 10),
    ('{"max_tokens":1,"messages":[],"cache_control":{"type":"ephemeral"}}', 12.5),
    ('{"max_tokens":1,"messages":[],"cache_control":{"type":"ephemeral","ttl":"5m"}}', 12.5),
    ('{"max_tokens":1,"messages":[],"cache_control":{"type":"ephemeral","ttl":"1h"}}', 20),
    ('{"max_tokens":1,"messages":[],"cache_control":{"type":"ephemeral","ttl":"\\u0031h"}}', 20),
    ('{"max_tokens":1,"messages":[],"cache_control":{"type":"ephemeral","ttl":"1\\u0068"}}', 20),
    ('{"max_tokens":1,"messages":[],"cache\\u005fcontrol":{"ttl":"1h"}}', 20),
    ('{"max_tokens":1,"messages":[],"\\u0063ache_control":{"ttl":"\\u0031\\u0068"}}', 20),
])
def test_input_is_bounded_at_the_dearest_cache_write_that_the_request_can_ask_for(raw, rate):
    body = ic.parse_json_object(raw.encode())

    bound = ic.bound_of_request("messages", body, price_of(CLAUDE))

    assert bound.input_tokens * int(rate * 10 ** 6) == bound.input_picodollars


@pytest.mark.parametrize("tier, rate", [
    ("absent", 10), (None, 10), ("auto", 10), ("default", 10), ("flex", 10), ("scale", 10),
    ("priority", 20), ("fast", 20), ("ultrafast", 50), ("of 2031", 50), (7, 50), ([], 50),
])
def test_input_is_bounded_at_the_dearer_of_the_tiers_that_can_serve(tier, rate):
    row = {**ROW, "input_cost_per_token_priority": Decimal("0.00002"),
           "input_cost_per_token_flex": Decimal("0.000005"),
           "input_cost_per_token_ultrafast": Decimal("0.00005")}

    bound = bound_of("chat", chat(**({} if tier == "absent" else {"service_tier": tier})), row)

    assert bound.input_tokens * rate * 10 ** 6 == bound.input_picodollars


@pytest.mark.parametrize("characters, rate", [(900, 10), (1_000, 100)])
def test_the_long_context_price_is_bounded_once_the_prompt_may_reach_it(characters, rate):
    row = {**ROW, "input_cost_per_token_above_1k_tokens": Decimal("0.0001")}
    fields = {"input": "x" * characters}
    assert (len(json.dumps(fields)) + 64 > 1_000) == (rate == 100)

    bound = bound_of("responses", fields, row)

    assert bound.input_tokens * rate * 10 ** 6 == bound.input_picodollars


@pytest.mark.parametrize("fields, rate", [
    ({}, 50), ({"modalities": ["text", "audio"]}, 200), ({"audio": {"voice": "alloy"}}, 200)])
def test_spoken_output_is_bounded_at_its_own_price(fields, rate):
    row = {**ROW, "output_cost_per_audio_token": Decimal("0.0002")}

    assert rate * 10 ** 6 == bound_of("chat", chat(**fields), row).output_picodollars


def test_a_free_model_is_bounded_at_nothing():
    row = {**ROW, "input_cost_per_token": 0, "output_cost_per_token": 0}

    bound = bound_of("chat", chat(), row)

    assert 0 == bound.microdollars(bound.output_tokens)
    assert 50_000 == cap_of(bound, 0, at_last=False)


# Input that the request's bytes do not show.

def content(*parts: dict) -> dict:
    return chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, *parts]}])


UNSEEN = {
    "audio": content({"type": "input_audio", "input_audio": {"data": "AA=="}}),
    "file": content({"type": "file", "file": {"file_id": "file-1"}}),
    "document": content({"type": "document", "source": {"type": "file", "file_id": "x"}}),
    "container upload": content({"type": "container_upload", "file_id": "x"}),
    "a type of tomorrow": content({"type": "hologram"}),
    "no type at all but a list": content({"type": "text", "text": [{"type": "document"}]}),
    "input file": {"input": [{"role": "user", "content": [
        {"type": "input_file", "file_id": "x"}]}]},
    "item reference": {"input": [{"type": "item_reference", "id": "msg_1"}]},
    "instructions that are items": {"instructions": [
        {"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
    "a prediction that is a file": chat(prediction={"type": "content", "content": [
        {"type": "file", "file": {"file_id": "x"}}]}),
    "item reference without a type": {"input": [{"id": "msg_1", "content": None}]},
    "audio without a type": content({"audio_url": {"url": "https://x/y.wav"}}),
    "video of the type null": content({"type": None, "video_url": {"url": "x"}}),
    "file data without a type": content({"file_data": "AA=="}),
    "compaction item without content": {"input": [{"type": "compaction", "id": "cmp_1"}]},
    "compaction item whose content is of another API": {"input": [
        {"type": "compaction", "id": "cmp_1", "content": "x"}]},
    "compaction item with content that is empty": {"input": [
        {"type": "compaction", "id": "cmp_1", "encrypted_content": ""}]},
    "compaction without a summary": content({"type": "compaction", "content": None}),
    "file search item": {"input": [{"type": "file_search_call", "id": "fs_1"}]},
    "document by its URL": content({"type": "document", "source": {"type": "url", "url": "x"}}),
    "PDF that a search fetched": content({"type": "web_fetch_tool_result", "content": {
        "type": "web_fetch_result", "content": {"type": "document", "source": {
            "type": "base64", "media_type": "application/pdf", "data": "AA=="}}}}),
    "screenshot": {"input": [{"type": "computer_call_output", "output": {
        "type": "computer_screenshot", "file_id": "x"}}]},
    "previous response": {"input": "x", "previous_response_id": "resp_1"},
    "conversation": {"input": "x", "conversation": "conv_1"},
    "conversation object": {"input": "x", "conversation": {"id": "conv_1"}},
    "container": message(container="container_1"),
}
IMAGES = {
    "image": content({"type": "image_url", "image_url": {"url": "https://x/y.png"}}),
    "image in messages": content({"type": "image", "source": {"type": "url", "url": "x"}}),
    "image without a type": content({"image_url": "https://x/y.png"}),
    "image by its id": content({"type": "image", "source": {"type": "file", "file_id": "x"}}),
    "image in a tool result": content({"type": "tool_result", "tool_use_id": "x", "content": [
        {"type": "image", "source": {}}]}),
    "image in system": message(system=[{"type": "image", "source": {}}]),
    "input image": {"input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": "x"}]}]},
}
SEEN = {
    "text": content(),
    "a plain string": chat(),
    "an answer without audio": chat(messages=[{"role": "assistant", "content": "x",
                                               "audio": None}]),
    "refusal": content({"type": "refusal", "refusal": "no"}),
    "tool use": content({"type": "tool_use", "id": "x", "name": "f", "input": {"type": "image"}}),
    "tool result": content({"type": "tool_result", "tool_use_id": "x", "content": [
        {"type": "text", "text": "image"}]}),
    "thinking": content({"type": "thinking", "thinking": "x", "signature": "y"}),
    "cache mark": content({"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}),
    "schema": chat(tools=[{"type": "function", "function": {
        "name": "f", "parameters": {"type": "object", "properties": {
            "image": {"type": "image"}}}}}]),
    "function call": {"input": [{"type": "function_call", "call_id": "x", "arguments": "{}"},
                                {"type": "function_call_output", "call_id": "x", "output": "y"}]},
    "null state": {"input": "x", "previous_response_id": None, "conversation": None},
    "compaction item": {"input": [{"type": "compaction", "encrypted_content": "x"}]},
    "compaction with its summary": content({"type": "compaction", "content": "what was said"}),
    "compaction trigger": {"input": [{"type": "compaction_trigger"}]},
    "message of a subagent of Codex": {"input": [{"type": "agent_message", "content": [
        {"type": "input_text", "text": "x"},
        {"type": "encrypted_content", "encrypted_content": "gAAAA"}]}]},
    "fallback boundary": content({"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}}),
    "tools on the way": content({"type": "tool_addition", "tool": {
        "type": "tool_reference", "name": "f"}}, {"type": "tool_removal", "tool": {
            "type": "mcp_tool_reference", "name": "f"}}),
    "additional tools": {"input": [{"type": "additional_tools", "role": "developer", "tools": [
        {"type": "namespace", "name": "functions", "tools": [
            {"type": "custom", "name": "exec", "format": {"type": "grammar"}}]}]}]},
    "a shell that the client ran": {"input": [
        {"type": "shell_call", "call_id": "x", "action": {"commands": ["ls"]},
         "environment": {"type": "local"}},
        {"type": "shell_call_output", "call_id": "x", "output": [
            {"stdout": "a", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}},
            {"stdout": "a", "stderr": "", "outcome": {"type": "timeout"}}]}]},
    "what a browser did": content({"type": "tool_result", "tool_use_id": "x", "content": [
        {"type": "browser_state", "tabs": [], "state_changes": [{"type": "tab_opened"}]}]}),
    "text document": content({"type": "document", "source": {
        "type": "text", "media_type": "text/plain", "data": "five"}}),
    "document of text blocks": content({"type": "document", "source": {
        "type": "content", "content": [{"type": "text", "text": "x"}]}}),
}


@pytest.mark.parametrize("fields", UNSEEN.values(), ids=UNSEEN)
def test_unseen_input_counts_as_the_models_whole_context(fields):
    api = "responses" if "input" in fields else "chat"

    assert 1_000_000 == bound_of(api, fields).input_tokens


@pytest.mark.parametrize("key, tokens", [
    ("gpt-4o-mini", 50_000), ("openai/gpt-4o-mini", 50_000), ("ft:gpt-4o-mini-2024-07-18", 50_000),
    ("gpt-4o", 25_000), ("o4-mini", 25_000)])
def test_an_image_counts_by_the_model_under_every_name_of_its_row(key, tokens):
    body = body_of(IMAGES["image"])

    assert tokens < ic.input_tokens_bound(body, price_of(ROW, key)) < tokens + 1000


@pytest.mark.parametrize("provider, tokens", [("openai", 25_000), ("anthropic", 5_000)])
@pytest.mark.parametrize("fields", IMAGES.values(), ids=IMAGES)
def test_an_image_counts_as_the_most_that_its_provider_makes_of_one(fields, provider, tokens):
    row = {**ROW, "litellm_provider": provider}
    api = "responses" if "input" in fields else "chat"

    assert tokens < bound_of(api, fields, row).input_tokens < tokens + 300


@pytest.mark.parametrize("fields", IMAGES.values(), ids=IMAGES)
def test_an_image_of_another_provider_counts_as_the_models_whole_context(fields):
    row = {**ROW, "litellm_provider": "nobody"}
    api = "responses" if "input" in fields else "chat"

    assert 1_000_000 == bound_of(api, fields, row).input_tokens


@pytest.mark.parametrize("measured", [False, True])
def test_the_bytes_of_an_inline_image_are_not_text(measured):
    """Each image takes out its own data once: the same text beside it stays and counts."""
    data = "data:image/png;base64," + "iVBORw0KGgo" * 5_000
    image = {"type": "image_url", "image_url": {"url": data}}

    def tokens(*parts):
        body = ic.parse_json_object(json.dumps(content(*parts)).encode())
        return ic.input_tokens_bound(body, price_of(ROW), measured=measured)

    one, two = tokens(image), tokens(image, image)
    beside = tokens(image, {"type": "text", "text": data})

    assert 25_000 < one < 25_300 and 50_000 < two < 50_400
    assert beside > one + 15_000


@pytest.mark.parametrize("fields", SEEN.values(), ids=SEEN)
def test_text_counts_by_its_bytes(fields):
    api = "responses" if "input" in fields else "chat"

    assert bound_of(api, fields).input_tokens < 5_000


@pytest.mark.parametrize("fields", SEEN.values(), ids=SEEN)
def test_text_is_never_refused(fields):
    assert [] == checked("responses" if "input" in fields else "messages", fields)


@pytest.mark.parametrize("fields", [
    {"input": [{"type": "configuration_update", "text": {"format": {
        "type": "json_schema", "name": "x", "schema": {"type": "object"}}}}]},
    {"messages": [{"role": "system", "content": "x", "output_config": {"format": {
        "type": "json_schema", "schema": {"type": "object"}}}}]}], ids=repr)
def test_a_format_that_begins_in_the_conversation_brings_its_prompt_too(fields):
    assert [] == checked("responses" if "input" in fields else "messages", fields)
    assert ic.TOOL_PROMPT_TOKENS < ic.input_tokens_bound(body_of(fields), price_of(ROW))


def test_a_mouse_that_the_client_moved_is_content():
    assert [] == checked("responses", {"input": [{"type": "computer_call", "call_id": "x",
                                                  "actions": [{"type": "click"}]}]})


@pytest.mark.parametrize("fields", UNSEEN.values(), ids=UNSEEN)
def test_unseen_input_is_refused_where_the_models_context_is_unknown(fields):
    row = {name: value for name, value in ROW.items() if name != "max_input_tokens"}

    with pytest.raises(ic.UnboundedRequest, match="max_input_tokens for m"):
        bound_of("chat", fields, row)

    free = bound_of("chat", fields, {**row, ic.INPUT_PRICE: 0, ic.OUTPUT_PRICE: 0})
    assert 0 == free.microdollars(free.most_output_tokens)


# What cannot be bounded.

@pytest.mark.parametrize("kind", [
    "web_search_preview", "web_search_20250305", "web_search_20270101", "shell",
    "web_fetch_20250910", "file_search", "code_interpreter", "code_execution_20250825",
    "image_generation", "mcp", "mcp_toolset", "advisor_20260301", "tool_search",
    "tool_search_tool_regex_20251119", "computer_use", "bash_20250124x", "bash_2025", "Function",
    "function ", "", "of tomorrow", "computer_toolset_2026", "browser_toolset_20270101",
])
def test_a_tool_that_the_provider_runs_is_refused(kind):
    with pytest.raises(ic.UnboundedRequest) as caught:
        checked("responses", {"tools": [{"type": "function"}, {"type": kind}]})

    assert (400, "tools", "iron_cage_unbounded_request") == (
        caught.value.status, caught.value.param, caught.value.openai_type)


@pytest.mark.parametrize("tools, fine", [
    ([{"type": "tool_search", "execution": "client"}], True),
    ([{"type": "tool_search", "execution": "server"}], False)])
def test_a_search_for_tools_may_be_the_clients(tools, fine):
    """Codex sends one, which it runs itself."""
    with contextlib.nullcontext() if fine else pytest.raises(ic.UnboundedRequest):
        checked("responses", {"tools": tools})


@pytest.mark.parametrize("environment, fine", [
    ({"type": "local"}, True), ({"type": "container_auto"}, False), (None, False)])
def test_a_shell_may_be_the_clients(environment, fine):
    with contextlib.nullcontext() if fine else pytest.raises(ic.UnboundedRequest):
        checked("responses", {"tools": [{"type": "shell", "environment": environment}]})


BROUGHT = {
    "additional_tools": lambda tool: {"input": [{"type": "additional_tools", "tools": [tool]}]},
    "tool_search_output": lambda tool: {"input": [{"type": "tool_search_output", "tools": [tool]}]},
    "a namespace": lambda tool: {"tools": [{"type": "namespace", "tools": [tool]}]},
    "tool_addition": lambda tool: {"messages": [{"role": "system", "content": [{
        "type": "tool_addition", "tool": {"type": "tool_definition", "definition": tool}}]}]},
}


@pytest.mark.parametrize("tool, fine", [
    ({"type": "function", "name": "f"}, True), ({"type": "custom", "name": "f"}, True),
    ({"type": "code_interpreter"}, False), ({"type": "web_search_preview"}, False),
    ({"type": "namespace", "tools": [{"type": "mcp"}]}, False), ("f", False), (None, False)])
@pytest.mark.parametrize("brought", BROUGHT.values(), ids=BROUGHT)
def test_tools_that_content_brings_are_looked_at_like_others(brought, tool, fine):
    fields = brought(tool)
    api = "messages" if "messages" in fields else "responses"
    with contextlib.nullcontext() if fine else pytest.raises(ic.UnboundedRequest) as caught:
        checked(api, fields)

    assert fine or caught.value.param in fields


@pytest.mark.parametrize("outer", [
    {"type": "namespace", "name": "n"}, {"type": "browser_toolset_20260801"},
    {"type": "custom", "name": "c"}, {"type": "function", "name": "f"}], ids=repr)
@pytest.mark.parametrize("kind", ["web_search_20250305", "web_fetch_20260318",
                                  "tool_search_tool_bm25_20251119"])
def test_a_search_inside_another_tool_is_refused_where_its_uses_are_capped_in_tools(outer, kind):
    for tools in ([{**outer, "tools": [{"type": kind, "name": "s"}]}],
                  [{**outer, "tools": [{**outer, "tools": [{"type": kind, "name": "s"}]}]}]):
        with pytest.raises(ic.UnboundedRequest, match="in tools only, not inside other") as caught:
            checked("messages", message(tools=tools), CLAUDE)

        assert "tools" == caught.value.param


def test_a_search_inside_another_tool_is_bounded_where_one_cap_holds_for_all():
    fields = {"input": "x", "tools": [{"type": "namespace", "tools": [{"type": "web_search"}]}]}

    assert [] == checked("responses", fields)
    assert 5 == bound_of("responses", fields).asked_caps.hosted_uses


@pytest.mark.parametrize("tools", [{"a": {"type": "mcp"}}, "mcp", [None]], ids=repr)
def test_what_is_no_tool_inside_another_is_refused(tools):
    with pytest.raises(ic.UnboundedRequest, match="no type that is known"):
        checked("chat", {"tools": [{"type": "function", "tools": tools}]})


@pytest.mark.parametrize("part", [
    {"Type": "input_audio"}, {"TYPE": "file"}, {" type": "file"}, {"type": None, "Type": "file"},
    {"type": "text", "text": "x", "Image_URL": {"url": "https://x"}}, {"Input_Audio": {}},
    {"type": "text", "\u017fource": {}}, {"type": "tool_result", "Content": [{"type": "audio"}]},
    {"type": "additional_tools", "Tools": [{"type": "mcp"}]}, {"type\t": "file"}], ids=repr)
def test_content_whose_members_are_oddly_written_is_refused(part):
    """Some servers read a member whatever its case is."""
    for fields in ({"messages": [{"role": "user", "content": [part]}]}, {"messages": [part]}):
        with pytest.raises(ic.UnboundedRequest, match="of the type [?] is not known"):
            checked("chat", fields)
    with pytest.raises(ic.UnboundedRequest, match="of the type [?] is not known"):
        checked("responses", {"input": [part]})


def test_members_in_other_letters_that_nobody_looks_at_pass():
    assert [] == checked("chat", chat(messages=[{"role": "user", "content": "x", "toolName": "f",
                                                 "providerOptions": {"aB": 1, "x-y": "z"}}]))


def test_a_tool_addition_without_a_definition_or_a_reference_is_refused():
    with pytest.raises(ic.UnboundedRequest):
        checked("messages", {"messages": [{"role": "system", "content": [
            {"type": "tool_addition", "tool": {"type": "tool_definition"}}]}]})


@pytest.mark.parametrize("hidden", ["tool", "tools"])
def test_content_cannot_hide_where_other_content_has_its_tools(hidden):
    """Only where tools are declared is that member not walked as content."""
    fields = content({"type": "tool_result", "tool_use_id": "x", "content": "y",
                      hidden: [{"type": "hologram"}]})
    with pytest.raises(ic.UnboundedRequest, match="hologram"):
        checked("messages", fields)


@pytest.mark.parametrize("fields, param", [
    ({"input": [{"type": "hologram"}]}, "input"),
    ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "messages"),
    ({"system": [{"type": "hologram"}]}, "system")])
def test_a_refusal_names_the_field_that_it_is_about(fields, param):
    with pytest.raises(ic.UnboundedRequest) as caught:
        checked("responses" if "input" in fields else "messages", fields)

    assert param == caught.value.param


@pytest.mark.parametrize("tool", [
    {"type": 5}, {"type": ["function"]}, "function", None, [], {"Type": "mcp"},
    {"google_search": {}}, {"type": None, "code_execution": {}},
    {"name": "f", "parameters": {}, "google_search": {}}], ids=repr)
def test_what_is_no_tool_is_refused(tool):
    for field in ("tools", "functions"):
        with pytest.raises(ic.UnboundedRequest, match="no type that is known"):
            checked("chat", {field: [tool]})


@pytest.mark.parametrize("tools", [{"type": "mcp"}, "mcp", 5], ids=repr)
def test_tools_that_are_no_list_are_refused(tools):
    with pytest.raises(ic.UnboundedRequest, match="no type that is known"):
        checked("chat", {"tools": tools})


@pytest.mark.parametrize("kind", ["a\nb", "x" * 200, "\x1b[0m", "é"])
def test_a_tool_type_that_is_no_plain_word_is_not_repeated(kind):
    with pytest.raises(ic.UnboundedRequest, match="the tool type \\? runs"):
        checked("chat", {"tools": [{"type": kind}]})


@pytest.mark.parametrize("tool", [
    {"type": "function", "function": {"name": "web_search"}}, {"type": "function", "name": "f"},
    {"name": "f", "input_schema": {}}, {"type": "custom", "name": "f"}, {"type": "local_shell"},
    {"type": "apply_patch"}, {"type": "computer_use_preview"}, {"type": "bash_20250124"},
    {"type": "text_editor_20250728"}, {"type": "memory_20250818"}, {"type": "computer_20251124"},
    {"type": "computer_toolset_20260801"}, {"type": "browser_toolset_20260801"}, {"type": None},
])
def test_a_tool_that_the_client_runs_is_accepted(tool):
    assert [] == checked("chat", {"tools": [tool]})


@pytest.mark.parametrize("api, fields", [
    ("chat", UNSEEN["file"]), ("responses", UNSEEN["input file"]),
    ("responses", {"input": [{"type": "input_file", "file_data": "data:application/pdf;base64,AA"}]}),
    ("responses", UNSEEN["instructions that are items"]), ("chat", UNSEEN["file data without a type"]),
    ("chat", content({"type": "document_url", "document_url": "https://x/y.pdf"}))], ids=repr)
def test_a_file_is_refused_where_the_provider_runs_its_own_tools_over_it(api, fields):
    for provider in ("xai", "openrouter"):
        with pytest.raises(ic.UnboundedRequest, match="worked on by tools.*--allow-content"):
            checked(api, fields, provider=provider)
    assert [] == checked(api, fields, provider="openai")
    hatches = {f"content {kind}" for kind in ("file", "input_file", "document_url")}
    assert checked(api, fields, provider="xai", hatches=hatches)


def test_what_is_no_file_passes_where_the_provider_runs_its_own_tools_over_files():
    for fields in (IMAGES["image"], UNSEEN["audio"], SEEN["text document"]):
        assert [] == checked("chat", fields, provider="xai")


@pytest.mark.parametrize("fields, held", [
    (chat(), ""), (UNSEEN["audio"], "audio image"), (UNSEEN["file"], "audio image"),
    (IMAGES["image"], "image"), (chat(modalities=["text", "audio"]), "out"),
    (chat(audio={"voice": "x"}), "out"), (UNSEEN["previous response"], "audio image"),
    (content({"type": "file", "file": {"file_data": "data:application/pdf;base64,AA"}}), "image"),
    (content({"type": "file", "file": {"file_data": "data:audio/wav;base64,AA",
                                       "x": "data:text/plain,x"}}), "audio image"),
    (content({"type": "input_audio", "x": "data:text/plain,x"}), "audio image"),
    ({**content({"type": "file", "file": {"file_data": "data:application/pdf;base64,AA"}}),
      "previous_response_id": "r"}, "audio image"),
    (content({"type": "video_url", "video_url": {"url": "https://x"}}), "audio image")], ids=repr)
def test_a_request_shows_what_dear_tokens_its_call_may_have(fields, held):
    names = {"audio": "audio_input", "image": "image_input", "out": "audio_output"}

    assert set(map(names.get, held.split())) == ic.kinds_held(body_of(fields))


@pytest.mark.parametrize("provider, row, caps", [
    (None, {}, {}), ("x", {}, {}), ([], {}, {}),
    ({"ignore": ["a"]}, {}, {"prompt": "10.00", "completion": "50.00", "request": "0.00"}),
    ({"zdr": True, "max_price": {"prompt": 1, "completion": "49.99", "request": 0}}, {}, {}),
    ({"max_price": {"prompt": 11, "completion": -1, "request": "x", "image": 1}}, {},
     {"prompt": "10.00", "completion": "50.00", "request": "0.00"}),
    ({"max_price": []}, {"input_cost_per_request": Decimal("0.0123")},
     {"prompt": "10.00", "completion": "50.00", "request": "0.0123"}),
    ({}, {"input_cost_per_token_above_1k_tokens": Decimal("0.00002")},
     {"prompt": "20.00", "completion": "50.00", "request": "0.00"}),
    ({}, {"input_cost_per_token": 0, "output_cost_per_token": 0}, {})], ids=repr)
def test_sellers_that_a_request_chooses_from_may_cost_no_more_than_its_price(provider, row, caps):
    fields = chat(provider=provider)

    changes = ic.Changes("chat", fields)
    changes.cap_sellers(price_of({**ROW, **row}), 5_000)

    assert {f"provider.max_price.{name}": cap for name, cap in caps.items()} == changes.reported
    changes.cap_sellers(price_of({**ROW, **row}), 5_000, are_many=True)
    asks_less = caps == {} and isinstance(provider, dict)
    assert asks_less == (changes.set == {})
    assert caps.items() <= (changes.set["provider"]["max_price"] if caps else caps).items()


SCALARS = [(api, name) for api, rules in ic.FIELD_RULES.items() for name in rules
           if rules[name] is ic._is_scalar]


@pytest.mark.parametrize("api, name", SCALARS)
def test_what_is_text_or_a_number_in_an_api_can_hold_no_content(api, name):
    for value in ([{"type": "input_file", "file_url": "https://x/y.pdf"}], {"type": "image_url"}):
        with pytest.raises(ic.UnboundedRequest, match=f"{name}, as asked for here"):
            checked(api, {name: value})
    assert [] == checked(api, {name: "x"})
    assert {"suffix", "user", "previous_response_id", "prompt_cache_key"} <= {n for _, n in SCALARS}


# Top-level fields: (API, field, a value that is bounded or None, one that is not or None).
GUARDED_FIELDS = [
    ("responses", "background", False, True), ("responses", "background", None, 1),
    ("responses", "multi_agent", {"enabled": False}, {"enabled": True}),
    ("responses", "reasoning", {"effort": "high", "mode": "standard"}, {"mode": "pro"}),
    ("responses", "context_management", [], [{"compact_threshold": 1000}]),
    ("responses", "context_management", None, [{"type": "compaction"}]),
    ("responses", "access_programs", None, {"cyber": "standard"}),
    ("responses", "prompt", "x", {"id": "pmpt_1"}), ("responses", "prompt", None, {}),
    ("responses", "text", {"verbosity": "low"}, {"searches": 5}),
    ("responses", "text", "auto", "twice"), ("messages", "thinking", "", 3),
    ("chat", "stream_options", [], [{"include_usage": True}, 1]),
    ("responses", "moderation", {"model": "omni-moderation-latest"}, {"model": "gpt-5-pro"}),
    ("chat", "web_search_options", None, {}),
    ("chat", "stream_options", {"include_usage": True}, {"fan_out": 3}),
    ("chat", "service_tier", "default", "priority"), ("chat", "service_tier", "auto", "flex"),
    ("messages", "mcp_servers", [], [{"url": "x"}]),
    ("messages", "fallbacks", None, [{"model": "x"}]), ("messages", "fallbacks", [], "default"),
    ("messages", "compaction", None, {"type": "summarize"}),
    ("messages", "speed", "standard", "fast"), ("messages", "inference_geo", "global", "eu"),
    ("responses", "multi_agent", None, "auto"), ("responses", "multi_agent", None, {}),
    ("messages", "context_management", {"edits": [{"type": "clear_thinking_20251015"}]},
     {"edits": [{"type": "compact_20260112"}]}),
    ("messages", "context_management", {"edits": [{"type": "clear_tool_uses_20250919", "keep": {}}]},
     {"edits": [{"keep": 3}]}),
    ("messages", "context_management", {"edits": []}, {"edits": {"type": "clear_thinking_1"}}),
    ("responses", "reasoning", {"effort": "xhigh"}, {"effort": {"level": "high", "samples": 4}}),
    ("chat", "reasoning_effort", "minimal", {"samples": 4}),
    ("messages", "output_config", {"effort": None}, {"effort": ["high", "high"]}),
    ("messages", "thinking", {"type": "enabled", "budget_tokens": 9}, {"parallel": 4}),
    ("messages", "output_config", {"effort": "max", "task_budget": {}}, {"agents": 2}),
]


@pytest.mark.parametrize("api, name, bounded, unbounded", GUARDED_FIELDS)
def test_a_field_is_refused_by_its_name_where_its_value_opens_the_bound(
        api, name, bounded, unbounded):
    assert [] == checked(api, {name: bounded})
    with pytest.raises(ic.UnboundedRequest) as caught:
        checked(api, {name: unbounded})

    assert name == caught.value.param.partition(".")[0]


UNKNOWN_FIELDS = [("chat", "fan_out"), ("responses", "agents"), ("messages", "effort_multiplier"),
                  ("completions", "loops"), ("embeddings", "rerank"), ("chat", "Max_Tokens"),
                  ("chat", "top_k"), ("chat", "plugins"), ("chat", "models"), ("messages", "betas")]


@pytest.mark.parametrize("api, name", UNKNOWN_FIELDS)
def test_a_field_that_is_not_known_is_refused_and_its_hatch_named(api, name):
    with pytest.raises(ic.UnboundedRequest, match=f"{name} is not known.*--allow-field {name}"):
        checked(api, {name: {"enabled": True}})

    assert [] == checked(api, {name: None})
    assert [f"field {name}"] == checked(api, {name: 5},
                                        hatches={f"field {name}"})


@pytest.mark.parametrize("fields", [
    {"a b": 5}, {"x" * 99: 5},
    {"messages": [{"role": "user", "content": [{"type": "a b"}]}]}], ids=range(3))
def test_no_flag_is_named_for_what_it_cannot_name(fields):
    with pytest.raises(ic.UnboundedRequest, match="leave it out$"):
        checked("messages", fields)


@pytest.mark.parametrize("name", ["top_k", "min_p", "chat_template_kwargs", "safe_prompt"])
def test_servers_of_the_format_have_fields_that_openai_has_not(name):
    assert [] == checked("chat", {name: 1}, provider="vllm")
    for api, provider in (("chat", "openai"), ("messages", "minimax")):
        with pytest.raises(ic.UnboundedRequest):
            checked(api, {name if name != "top_k" else "min_p": 1}, provider=provider)


@pytest.mark.parametrize("fields", [
    {"plugins": [{"id": "web"}]}, {"models": ["a", "b"]}, {"search_parameters": {"mode": "on"}},
    {"n_predict": 9}, {"provider": {"order": ["dear"]}}, {"enable_search": True}], ids=repr)
def test_searches_and_dearer_models_of_other_servers_are_refused(fields):
    with pytest.raises(ic.UnboundedRequest, match="--allow-field"):
        checked("chat", fields, provider="openrouter")


@pytest.mark.parametrize("provider", ["gemini", "vertex"])
def test_googles_own_place_for_the_thinking_passes_and_its_neighbours_do_not(provider):
    thinking = {"thinking_config": {"thinking_budget": 100, "include_thoughts": True}}
    assert [] == checked("chat", {"extra_body": {"google": thinking}}, provider=provider)
    for extra in ({"google": {**thinking, "cached_content": "x"}}, {"google": "x"},
                  {"google": thinking, "x": 1}, thinking, [{"google": {"cached_content": "x"}}]):
        with pytest.raises(ic.UnboundedRequest, match="extra_body"):
            checked("chat", {"extra_body": extra}, provider=provider)
    with pytest.raises(ic.UnboundedRequest, match="extra_body"):
        checked("chat", {"extra_body": {"google": thinking}}, provider="groq")


def test_a_field_of_a_provider_may_be_named_whole_beside_one_inside_it():
    provider = ic.manners_of("vllm")._replace(fields=("a", "a.b", "c.d", "c.e"))
    fields = {"a": {"z": 1}, "c": {"d": 1, "e": 2}}
    price = price_of(ROW, "m")

    assert [] == ic.check_boundable("chat", body_of(fields), price, provider=provider)
    with pytest.raises(ic.UnboundedRequest, match="c.f"):
        ic.check_boundable("chat", body_of({"c": {"f": 1}}), price, provider=provider)


def test_models_that_are_free_may_have_fields_that_are_not_known_but_not_those_that_are_refused():
    free = {**ROW, "input_cost_per_token": 0, "output_cost_per_token": 0}

    assert [] == checked("responses", {"fan_out": 9}, row=free)
    for fields in ({"background": True}, {"tools": [{"type": "mcp"}]}):
        with pytest.raises(ic.UnboundedRequest):
            checked("responses", fields, row=free)


def test_content_that_the_operator_lets_through_counts_as_a_whole_context():
    fields = content({"type": "hologram"})

    assert ["content hologram"] == checked(
        "messages", fields, hatches={"content hologram"})
    assert 1_000_000 == bound_of("messages", {"max_tokens": 1, **fields}).input_tokens


FUNCTION = {"type": "function", "function": {"name": "f", "strict": True}}


@pytest.mark.parametrize("tool, member", [
    (FUNCTION, "google_search"), ({"type": "function", "name": "f"}, "retrieval"),
    ({"type": "custom", "custom": {"name": "f"}}, "code_execution"),
    ({"type": "namespace", "name": "n", "tools": []}, "url_context")])
@pytest.mark.parametrize("provider", ["gemini", "vertex", "zai", "somewhere"])
def test_a_tool_that_the_client_runs_hides_none_of_the_provider(provider, tool, member):
    assert [] == checked("chat", {"tools": [{**tool, member: None}]}, provider=provider)
    fields = {"tools": [{**tool, member: {}}]}

    with pytest.raises(ic.UnboundedRequest, match=f"{member} of the tool type .*--allow-field"):
        checked("chat", fields, provider=provider)
    assert [f"field {member}"] == checked(
        "chat", fields, provider=provider, hatches={f"field {member}"})
    assert [] == checked("chat", fields, provider=provider, row={
        **ROW, "input_cost_per_token": 0, "output_cost_per_token": 0})


@pytest.mark.parametrize("tool", [
    {"type": "function", "function": {"name": "$web_search"}},
    {"function": {"name": "$web_search"}}, {"type": "function", "name": "$web_search"}])
def test_a_function_with_the_name_of_a_servers_own_is_refused(tool):
    with pytest.raises(ic.UnboundedRequest, match="no type that is known"):
        checked("chat", {"tools": [tool]}, provider="moonshot")


@pytest.mark.parametrize("key", [
    "gpt-4o-search-preview", "gpt-4o-mini-search-preview-2025-03-11", "gpt-5-search-api",
    "o3-deep-research", "o4-mini-deep-research-2025-06-26", "xai/grok-4.20-multi-agent-0309",
    "groq/compound", "groq/compound-mini", "compound-beta", "openai/gpt-4o:online",
    "openai/gpt-4o:free:Online", "openai/gpt-4o:online@preset/x", "openai/gpt-4o@preset/x",
    "@preset/x"])
@pytest.mark.parametrize("place", ["key", "model"])     # the price may be another's, by price_as
def test_a_model_that_searches_by_itself_is_refused(key, place):
    with pytest.raises(ic.UnboundedRequest) as caught:
        checked("chat", {}, **{place: key})

    assert "model" == caught.value.param


@pytest.mark.parametrize("key", ["openai/gpt-4o:free", "llama3:onliner", "x/preset", "m@preset"])
def test_a_model_whose_name_only_resembles_one_that_searches_passes(key):
    assert [] == checked("chat", {}, key=key, model=key, provider="openrouter")


@pytest.mark.parametrize("api, name, plain, other", [
    ("embeddings", "input", ["a", [1, 2]], [{"image": "https://x/y.png"}]),
    ("embeddings", "input", "a", {"content": [{"type": "text", "text": "x"}]}),
    ("completions", "prompt", [[1], "a"], {"prompt_string": "x", "multimodal_data": ["AA=="]})])
def test_a_prompt_that_is_text_by_its_api_must_be_text(api, name, plain, other):
    assert [] == checked(api, {name: plain}, provider="vllm")
    with pytest.raises(ic.UnboundedRequest) as caught:
        checked(api, {name: other}, provider="vllm")

    assert name == caught.value.param


@pytest.mark.parametrize("api, name", [("chat", "max_tokens"), ("chat", "max_completion_tokens"),
                                       ("responses", "max_output_tokens"),
                                       ("completions", "max_tokens"), ("messages", "max_tokens")])
@pytest.mark.parametrize("provider, fine", [("ollama", False), ("minimax", False),
                                            ("openai", True), ("anthropic", True)])
def test_a_cap_of_nothing_is_a_cap_only_where_that_is_known(api, name, provider, fine):
    with contextlib.nullcontext() if fine else pytest.raises(ic.UnboundedRequest):
        checked(api, {name: 0}, provider=provider)
    assert [] == checked(api, {name: 1}, provider=provider)


@pytest.mark.parametrize("speed", ["ultrafast", "Fast", 2])
def test_a_speed_that_nobody_knows_is_refused_where_another_has_a_price(speed):
    row = {**CLAUDE, "provider_specific_entry": {"fast": 6}}

    assert [] == checked("messages", {"speed": "fast"}, row=row)
    with pytest.raises(ic.UnboundedRequest):
        checked("messages", {"speed": speed}, row=row)


def test_a_model_that_searches_is_refused_also_where_another_price_stands_in_for_its_own():
    with pytest.raises(ic.UnboundedRequest):
        checked("chat", {"model": "an alias"}, model="gpt-9-search-api")


@pytest.mark.parametrize("kind", sorted(ic.HOSTED_RESULT_TYPES))
def test_the_result_of_an_earlier_search_is_text_and_what_it_may_hold_beyond_that(kind):
    fields = content({"type": kind, "id": "x"})
    without = ic.input_tokens_bound(body_of(content({"type": "text", "id": "x"})), price_of(ROW))

    assert [] == checked("messages", fields)
    assert ic.input_tokens_bound(body_of(fields), price_of(ROW)) >= \
        without + ic.HOSTED_RESULT_TOKENS


def test_a_thread_that_goes_on_at_the_provider_is_refused():
    assert [] == checked("messages", {"thread": {"type": "create"}})
    with pytest.raises(ic.ThreadRefused):
        checked("messages", {"thread": {"type": "continue", "id": "x"}})


@pytest.mark.parametrize("api, tool, seller, others", [
    ("messages", {"type": "web_search_20250305", "name": "web_search"}, "anthropic", "bedrock"),
    ("responses", {"type": "web_search"}, "openai", "azure")])
def test_a_search_is_known_only_where_its_own_vendor_runs_it(api, tool, seller, others):
    assert [] == checked(api, {"tools": [tool]}, row={**ROW, "litellm_provider": seller})
    with pytest.raises(ic.UnboundedRequest):
        checked(api, {"tools": [tool]}, row={**ROW, "litellm_provider": others}, provider=others)


def test_an_option_of_a_hosted_tool_that_is_not_known_is_refused_and_its_hatch_named():
    fields = {"tools": [{"type": "web_search", "search_context_size": "low", "agents": 9}]}

    with pytest.raises(ic.UnboundedRequest, match="agents of the tool type web_search .*--allow"):
        checked("responses", fields)
    assert ["field agents"] == checked("responses", fields,
                                       hatches={"field agents"})
    fields["tools"][0]["agents"] = None
    assert [] == checked("responses", fields)


@pytest.mark.parametrize("content", ["Hello", [{"type": "compaction_trigger"}]])
def test_output_beside_the_cap_is_in_the_bound_whatever_else_the_request_holds(content):
    fields = chat(max_tokens=1, messages=[{"role": "user", "content": content}])
    plain, thinking, predicted = (
        bound_of("chat", {**fields, **more}, provider=OPENAI._replace(reasoning_beyond_caps=tokens))
        for more, tokens in (({}, 0), ({}, 7), ({"prediction": {"content": "x"}}, 0)))

    each = plain.microdollars(1) - plain.microdollars(0)
    assert 7 * each == thinking.microdollars(1) - plain.microdollars(1)
    assert predicted.microdollars(1) - plain.microdollars(1) >= len('{"content": "x"}') * each
    assert 0 == bound_of("responses", {"model": "m", "input": "x"},
                         provider=OPENAI._replace(reasoning_beyond_caps=7)).reasoning_tokens


# Caps from amounts.

def random_bound(rng: Random) -> ic.Bound:
    fraction = rng.choice([1, 1, ic.Fraction(11, 10), ic.Fraction(1, 3)])
    return ic.Bound(
        (ic.Level(fees_picodollars=rng.randrange(10 ** rng.randrange(1, 13)) * fraction,
                  rates=(0, rng.randrange(1, 10 ** rng.randrange(1, 9)) * fraction)),),
        unlimited_output_tokens=rng.choice([0, 0, rng.randrange(5_000)]),
        asked_output_tokens=None, most_output_tokens=rng.choice([0, 1, 500, 8_192, 128_000]))


@each_seed(70, 200)
def test_the_affordable_cap_is_the_largest_that_fits(seed):
    rng = Random(seed)
    for _ in range(20):
        bound = random_bound(rng)
        amount = rng.choice([0, 1, rng.randrange(10 ** rng.randrange(1, 10))])

        cap = bound.affordable_output_tokens(amount)

        if cap >= 0:
            assert bound.microdollars(cap) <= amount < bound.microdollars(cap + 1)
        else:
            assert amount < bound.microdollars(0)


def test_any_cap_is_affordable_where_output_is_free_and_input_fits():
    bound = bound_of("chat", chat(), {**ROW, "output_cost_per_token": 0})
    needed = bound.microdollars(0)

    assert 50_000 == bound.affordable_output_tokens(needed)
    assert bound.affordable_output_tokens(needed - 1) < 0


def flat_bound(most_output_tokens: int) -> ic.Bound:
    """Input is free, and an output token costs one microdollar."""
    return ic.Bound((ic.Level(rates=(0, 10 ** 6)),), most_output_tokens=most_output_tokens)


@pytest.mark.parametrize("free, most, cap", [
    (10 ** 9, 50_000, 50_000),          # more than enough: the model's own maximum
    (100_000, 50_000, 50_000), (99_999, 50_000, 49_999), (20_000, 50_000, 10_000),  # half
    (16_384, 50_000, 8_192), (16_385, 50_000, 8_192),                               # still half
    (16_383, 50_000, 16_383), (8_192, 50_000, 8_192), (1_024, 50_000, 1_024),       # the whole
    (1_023, 50_000, None), (0, 50_000, None),                                       # too little
    (8_192, 4_096, 4_096), (8_191, 4_096, 4_096), (4_096, 4_096, 4_096),    # a model that says
    (4_095, 4_096, 4_095), (1_024, 4_096, 1_024), (1_023, 4_096, None),     # less at most
    (400, 200, 200), (200, 200, 200), (199, 200, None),
    (0, 0, 0), (5, 0, 0),
])
def test_a_default_cap_takes_half_while_that_is_comfortable_then_all_that_is_worth_it(
        free, most, cap):
    assert cap == cap_of(flat_bound(most), free, at_last=True)


@each_seed(100)
def test_a_default_cap_always_fits_and_never_passes_the_models_maximum(seed):
    rng = Random(seed)
    for _ in range(20):
        bound, free = random_bound(rng), rng.randrange(10 ** rng.randrange(1, 10))

        cap = cap_of(bound, free, at_last=True)

        if cap is not None:
            assert 0 <= cap <= bound.most_output_tokens
            assert bound.microdollars(cap) <= free
            if cap < min(8_192, bound.most_output_tokens):
                assert free // 2 < bound.microdollars(min(8_192, bound.most_output_tokens))
        else:
            assert free < bound.microdollars(min(1_024, bound.most_output_tokens))


# The measured rule for text.

FORMS = {"text": str, "escaped JSON": json.dumps,
         "JSON": lambda value: json.dumps(value, ensure_ascii=False)}
in_each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
REAL_COUNTS = {"openai": lambda sample: max(sample["o200k"], sample["cl100k"]),
               "anthropic": lambda sample: sample["claude_old"] * 3 / 2}
COUNTED = [(kind, seed, {"openai": openai, "anthropic": claude * 3 / 2})
           for kind, counts in json.loads(adversarial_texts.COUNTS.read_text()).items()
           for seed, (openai, claude) in enumerate(counts)]
MOST_OF_A_DEGENERATE_TEXT = 1.2         # times the bound; see the README


@functools.lru_cache(maxsize=None)
def token_samples(name):
    path = SHARED / "tokens" / name
    if not path.is_file():
        pytest.skip("the texts with real token counts are not beside this checkout")
    lines = path.read_text(encoding="utf-8").split("\n")      # splitlines() knows too many ends
    return [json.loads(line) for line in lines if line]


@pytest.mark.parametrize("provider", REAL_COUNTS)
@in_each_form
def test_no_measured_text_has_more_tokens_than_the_rule_says(provider, form):
    samples, real = token_samples("tokens.jsonl"), REAL_COUNTS[provider]

    ratios = {sample["kind"]: [] for sample in samples}
    for sample in samples:
        bound = ic.input_tokens_upper_bound(form(sample["text"]), provider)
        assert real(sample) <= bound, sample["kind"]
        ratios[sample["kind"]].append(bound / real(sample))
    common = sorted(ratio for kind, values in ratios.items() for ratio in values
                    if kind.split(":")[0] in ("prose", "code"))
    assert common[len(common) // 2] <= (2.3 if form is str else 2.4)


@pytest.mark.parametrize("provider", REAL_COUNTS)
@in_each_form
def test_no_measured_text_that_was_made_to_beat_a_rule_beats_this_one(provider, form):
    real = REAL_COUNTS[provider]

    for sample in token_samples("adversarial.jsonl"):
        most = MOST_OF_A_DEGENERATE_TEXT if sample["kind"].startswith("degenerate") else 1
        bound = ic.input_tokens_upper_bound(form(sample["text"]), provider)
        assert real(sample) <= most * bound, sample["kind"]


@pytest.mark.parametrize("provider", REAL_COUNTS)
@in_each_form
def test_no_text_made_of_random_words_ids_records_or_scripts_beats_the_rule(provider, form):
    for kind, seed, counts in COUNTED:
        text = adversarial_texts.text_of(kind, seed)
        most = MOST_OF_A_DEGENERATE_TEXT if adversarial_texts.is_degenerate(text) else 1
        bound = ic.input_tokens_upper_bound(form(text), provider)
        assert counts[provider] <= most * bound, (kind, seed)


@pytest.mark.parametrize("provider", REAL_COUNTS)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_many_such_texts_in_one_request_do_not_beat_its_bound(provider, is_ascii):
    """Each in a message of its own, in pieces; a piece ends at a line's end, as tokens do there."""
    price = price_of(ROW if provider == "openai" else CLAUDE)
    counted = [(adversarial_texts.text_of(kind, seed), counts[provider])
               for kind, seed, counts in COUNTED]
    counted = [both for both in counted if not adversarial_texts.is_degenerate(both[0])]
    messages = [{"role": "user", "content": [{"type": "text", "text": line}
                                             for line in text.splitlines(True)]}
                for text, _ in counted]
    raw = json.dumps({"model": "m", "messages": messages}, ensure_ascii=is_ascii)
    body = ic.parse_json_object(raw.encode("utf-8", "surrogatepass"))

    assert sum(count for _, count in counted) <= ic.input_tokens_bound(body, price, measured=True)


def test_the_counts_of_such_texts_are_those_of_the_tokenizers():
    try:
        openai, claude = adversarial_texts.real_counters()
    except ImportError as missing:
        pytest.skip(f"no tokenizers to count with: {missing}")

    for kind, seed, counts in COUNTED:
        text = adversarial_texts.text_of(kind, seed)
        assert {"openai": openai(text), "anthropic": claude(text) * 3 / 2} == counts


def test_every_kind_of_such_texts_is_counted_some_plausible_and_some_degenerate():
    degenerate = [adversarial_texts.is_degenerate(adversarial_texts.text_of(kind, seed))
                  for kind, seed, _ in COUNTED]

    assert {kind for kind, _, _ in COUNTED} == set(adversarial_texts.KINDS)
    assert len(degenerate) >= 300 and 30 <= sum(degenerate) <= len(degenerate) // 3


PIECES = ("word", "Hump", "42", "\\n", "\\", "n", " ", "  ", "\n", "é", "漢字", "🐤", "a1B2" * 9,
          "{}();", "\x00", "\ufdfa", "é\u0301")


@pytest.mark.parametrize("provider, most", [("openai", 1), ("anthropic", 1.5)])
@each_seed(100)
def test_the_rule_is_never_above_a_token_a_byte_and_never_falls_when_text_is_added(
        seed, provider, most):
    rng = Random(seed)
    text = "".join(rng.choices(PIECES, k=rng.randrange(60)))
    bound = ic.input_tokens_upper_bound(text, provider)

    assert bound <= len(unicodedata.normalize("NFKC", text).encode()) * most + 9 \
        or bound <= len(text.encode()) * most + 9
    for piece in PIECES[:-2]:
        assert bound <= ic.input_tokens_upper_bound(text + piece, provider)


@pytest.mark.parametrize("seed", seeds(15, 50))
def test_it_does_not_matter_where_a_text_is_cut_into_slices(monkeypatch, seed):
    """But for a run of spaces, which counts once more in each slice that it goes on in."""
    rng = Random(seed)
    text = "".join(rng.choices(PIECES, k=rng.randrange(1, 300)))
    whole = ic.input_tokens_upper_bound(text)
    monkeypatch.setattr(ic, "ESTIMATE_SLICE_BYTES", rng.choice([1, 2, 3, 5, 64, 1000]))
    cuts = len(text.encode()) // ic.ESTIMATE_SLICE_BYTES

    sliced = ic.input_tokens_upper_bound(text)

    assert whole <= sliced <= (whole if "  " not in text else whole + cuts)


def test_prose_and_its_escapes_count_for_less_than_half_of_their_bytes():
    prose = "It was the best of times, it was the worst of times.\\n" * 100

    assert ic.input_tokens_upper_bound(prose) < len(prose) // 2


def test_strings_are_changed_wherever_they_stand_but_names_are_not():
    assert {"a": ["B", {"c": "D"}, 1], "e": None} == ic.mapped_strings(
        {"a": ["b", {"c": "d"}, 1], "e": None}, str.upper)


def test_parts_of_a_text_count_for_no_less_than_the_text():
    texts = [adversarial_texts.text_of(kind, seed) for kind, seed, _ in COUNTED[::7]]
    for at, text in enumerate(texts):
        cut = Random(at).randrange(len(text))
        parts = sum(map(ic.input_tokens_upper_bound, (text[:cut], text[cut:])))

        assert ic.input_tokens_upper_bound(text) <= parts


class RandomText(NamedTuple):
    """About 4,000 random letters, and their tokens by the larger of o200k and cl100k and by Claude
    2; counted with tiktoken 0.14 and Claude 2's published tokenizer."""
    label: str
    alphabet: str
    size: int                   # letters in a word
    separator: str
    openai: int
    claude: int


RANDOM_TEXTS = [
    RandomText('10-digit numbers, one a line', '0123456789', size=10, separator='\n', openai=1999,
        claude=2074),
    RandomText('13-digit numbers with commas', '0123456789', size=13, separator=',', openai=1841,
        claude=1972),
    RandomText('16-digit numbers', '0123456789', size=16, separator=' ', openai=1749, claude=1735),
    RandomText('19-digit numbers', '0123456789', size=19, separator=', ', openai=1888,
        claude=1948),
    RandomText('23-digit numbers', '0123456789', size=23, separator=' ', openai=1556, claude=1698),
    RandomText('one long number', '0123456789', size=4000, separator='', openai=1334, claude=1692),
    RandomText('DNA in blocks', 'ACGT', size=20, separator=' ', openai=2095, claude=1792),
    RandomText('protein in blocks', 'ACDEFGHIKLMNPQRSTVWY', size=10, separator=' ', openai=2329,
        claude=2344),
    RandomText('random words', 'abcdefghijklmnopqrstuvwxyz', size=23, separator=' ', openai=2207,
        claude=2154),
    RandomText('random consonants', 'qxzjvkwbf', size=23, separator=' ', openai=2562, claude=2377),
    RandomText('random capitals', 'QXZJVKWBF', size=23, separator=' ', openai=2846, claude=2588),
    RandomText('licence keys', 'BCDFGHJKMPQRTVWXY', size=5, separator='.', openai=2850,
        claude=3306),
    RandomText('one long word', 'qxzjvkwbf', size=4000, separator='', openai=2530, claude=2316),
    RandomText('ligatures', '\ufdfa', size=3, separator=' ', openai=11997, claude=61317),
]


@pytest.mark.parametrize("label, alphabet, size, separator, openai, claude", RANDOM_TEXTS,
                         ids=[row.label for row in RANDOM_TEXTS])
def test_random_words_and_numbers_do_not_beat_the_rule(label, alphabet, size, separator, openai,
                                                       claude):
    rng = Random(label)
    text = separator.join("".join(rng.choice(alphabet) for _ in range(size))
                          for _ in range(max(1, 4000 // size)))

    assert openai <= ic.input_tokens_upper_bound(text, "openai")
    assert claude <= ic.input_tokens_upper_bound(text, "anthropic")


@pytest.mark.parametrize("kind", [["image"], {"type": "image"}, 7, True], ids=repr)
def test_content_whose_type_is_not_a_word_is_refused(kind):
    with pytest.raises(ic.UnboundedRequest):
        checked("chat", {"messages": [{"role": "user", "content": [{"type": kind}]}]})


@pytest.mark.parametrize("content", ["some words " * 25_000, [{"type": "image_url", "image_url": {
    "url": "data:image/png;base64," + "iVBORw0K" * 75_000}}]], ids=["text", "image"])
def test_a_large_body_is_held_three_times_at_most(content, monkeypatch):
    """As received, as text for the parser, as its fields; the scan takes slices."""
    monkeypatch.setattr(ic, "ESTIMATE_SLICE_BYTES", ic.ESTIMATE_SLICE_BYTES // 8)
    raw = json.dumps({"model": "gpt-x", "messages": [{"role": "user", "content": content}]}).encode()
    row = {**ROW, "litellm_provider": "openai", "max_input_tokens": 10 ** 9}
    ic.bound_of_request("chat", body_of(chat()), price_of(row), measured=True)  # its tables stay
    tracemalloc.start()
    try:
        body = ic.parse_json_object(raw)
        ic.check_boundable("chat", body, price_of(row))
        ic.bound_of_request("chat", body, price_of(row), measured=True)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert most + len(raw) < 3 * len(raw) + 200 * ic.ESTIMATE_SLICE_BYTES
