"""The echo model alone: what it says, counts and streams in each API, and the list of models."""
import base64
import json
import struct

import pytest

import ironcage_proxy as ic

USER = {"role": "user", "content": "one two three"}
CHAT = {"messages": [{"role": "user", "content": "before"}, USER]}


def said(api, **fields):
    fields = {"model": ic.ECHO_MODEL, **fields}
    return ic.echo_whole(api, ic.echo(api, fields, answer_id="a" * 24, created_at=7))


@pytest.mark.parametrize("api, fields, text", [
    ("chat", CHAT, "one two three"), ("completions", {"prompt": "a b"}, "a b"),
    ("completions", {"prompt": ["a b"]}, "a b"), ("completions", {}, ic.ECHO_GREETING),
    ("chat", {"messages": []}, ic.ECHO_GREETING),
    ("chat", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "x"}}]}]}, ic.ECHO_GREETING),
    ("chat", {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}]}, "a b"),
    ("responses", {"input": "a b"}, "a b"),
    ("responses", {"input": [{"type": "function_call_output", "output": "done"}]}, "done"),
])
def test_the_last_text_of_a_request_comes_back(api, fields, text):
    assert text == ic.echo(api, fields, answer_id="a", created_at=7).text


@pytest.mark.parametrize("cap, text, finish", [
    (2, "one two", "length"), (3, "one two three", "stop"), (4, "one two three", "stop")])
def test_an_answer_ends_at_its_cap(cap, text, finish):
    [choice] = said("chat", **CHAT, max_tokens=cap)["choices"]

    assert (text, finish) == (choice["message"]["content"], choice["finish_reason"])


def test_a_token_is_a_word_and_all_that_is_read_counts():
    usage = said("chat", **CHAT)["usage"]

    assert (4, 3) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert 3 == ic.echo_input_tokens({"system": "a", "messages": [{"content": "b c"}], "user": "d"})
    assert 2 == ic.echo_input_tokens({"input": "a "})            # a space at the end is one too


def test_more_than_one_choice_is_refused():
    for api, fields in (("chat", {**CHAT, "n": 2}), ("completions", {"prompt": "a", "n": 2})):
        with pytest.raises(ic.BadRequest, match="one answer to one prompt"):
            ic.echo(api, fields, answer_id="a", created_at=7)


@pytest.mark.parametrize("options, has_usage", [
    ({}, False), ({"stream_options": {"include_usage": True}}, True),
    ({"stream_options": {"include_usage": False}}, False)])
def test_a_streamed_completion_joins_to_the_whole_one(options, has_usage):
    fields = {"prompt": "one two", "max_tokens": 9, **options}
    whole = said("completions", **fields)
    *events, done = ic.echo_stream("completions", ic.echo(
        "completions", {"model": ic.ECHO_MODEL, **fields}, answer_id="a" * 24, created_at=7))
    chunks = [json.loads(event.partition(b": ")[2]) for event in events]
    with_choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]

    assert b"data: [DONE]\n\n" == done
    assert whole["choices"][0]["text"] == "".join(choice["text"] for choice in with_choices)
    assert [None, None, "stop"] == [choice["finish_reason"] for choice in with_choices]
    assert ([whole["usage"]] if has_usage else []) == [
        chunk["usage"] for chunk in chunks if chunk.get("usage")]


@pytest.mark.parametrize("source, count", [
    ("a", 1), (["a", "b"], 2), ([1, 2], 1), ([[1, 2], [3]], 2), ([], 0)])
def test_each_input_has_its_embedding(source, count):
    rows = said("embeddings", input=source)["data"]

    assert [*range(count)] == [row["index"] for row in rows]
    for row in rows:
        assert ic.ECHO_DIMENSIONS == len(row["embedding"])
        assert 1 == pytest.approx(sum(x * x for x in row["embedding"]))


def test_an_embedding_depends_on_its_text_alone_in_either_encoding():
    one, again, other = (said("embeddings", input=text, dimensions=5)["data"][0]["embedding"]
                         for text in ("a", "a", "b"))
    packed = said("embeddings", input="a", dimensions=5, encoding_format="base64")["data"][0]

    assert one == again != other and 5 == len(one)
    assert one == pytest.approx(struct.unpack("<5f", base64.b64decode(packed["embedding"])))


# The list of models.

PRICE = ic.PriceBook({"m": {
    "litellm_provider": "openai", "input_cost_per_token": 0, "output_cost_per_token": 0,
    "max_input_tokens": 9, "max_output_tokens": 3}}).price("m", "openai")
MODELS = {"m": ("openai", PRICE), "lab/n": ("lab", PRICE)}


@pytest.mark.parametrize("path, name", [
    ("/v1/models/m", "m"), ("/v1/models/lab/n", "lab/n"), ("/v1/models/lab%2Fn", "lab/n"),
    ("/v1/models/m[1m]", "m"), ("/v1/models/m/", "m")])
def test_a_model_is_found_by_its_name(path, name):
    assert name == ic.models_answer(path, "openai", MODELS)["id"]
    assert 9 == ic.models_answer(path, "anthropic", MODELS)["max_input_tokens"]


def test_a_model_that_is_not_known_is_a_404():
    with pytest.raises(ic.NotFound, match="no such model"):
        ic.models_answer("/v1/models/x", "openai", MODELS)


@pytest.mark.parametrize("models, ends", [(MODELS, ("m", "lab/n")), ({}, (None, None))])
def test_a_list_of_models_may_be_empty(models, ends):
    told = ic.models_answer("/v1/models", "anthropic", models)

    assert [*models] == [row["id"] for row in told["data"]]
    assert ends == (told["first_id"], told["last_id"])
    assert [*models] == [row["id"] for row in ic.models_answer(
        "/v1/models", "openai", models)["data"]]
