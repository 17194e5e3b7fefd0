"""Ways past the money that a hostile reviewer found, each closed."""
import json

import pytest
from support import RawClient, Reply, call, program, settled_status, sse

TEXT = "some words " * 200_000
CHAT = {"model": "gpt-4o-mini", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
MESSAGE = {**CHAT, "model": "claude-haiku-4-5"}


def whole(usage, **more):
    return Reply(steps=(json.dumps({"id": "x", "content": [], "choices": [{"message": {
        "content": "x"}, "finish_reason": "stop"}], "usage": usage, **more}).encode(),))


@pytest.mark.parametrize("kind", ["image", "image_url", "input_image"])
@pytest.mark.parametrize("path, fields", [
    ("/v1/chat/completions", CHAT), ("/v1/messages", MESSAGE)])
def test_a_message_that_calls_itself_an_image_hides_no_text(mock, proxy_for, path, fields, kind):
    message = {"role": "user", "type": kind, "content": TEXT}

    answer = call(proxy_for("--budget", "0.01").port, "POST", path,
                  {**fields, "messages": [message]})

    assert (402, []) == (answer.status, mock.seen)


@pytest.mark.parametrize("part", [
    {"type": "image", "source": {"type": "content", "content": [{"type": "file"}]}},
    {"type": "image_url", "image_url": {"url": "https://x/y.png"}, "more": [{"type": "file"}]}])
def test_what_stands_below_an_image_is_looked_at(part):
    module = program()
    fields = {"messages": [{"role": "user", "content": [part]}]}

    assert module.contents_of(module.parse_json_object(json.dumps(fields).encode())).is_unseen


@pytest.mark.parametrize("part, taken", [
    ({"image_url": {"url": "data:image/png;base64," + "A" * 300}}, 322),
    ({"source": {"type": "base64", "data": "A" * 300}}, 300), ({"image_url": "A" * 300}, 300),
    ({"source": {"type": "base64", "data": TEXT + "."}}, 0), ({"caption": "A" * 300}, 0)])
def test_only_an_images_own_data_is_no_text(part, taken):
    body = program().parse_json_object(b"{}")

    assert taken == sum(map(len, program()._inline_data(body, [part])))


def test_reasoning_that_only_the_total_counts_is_charged(mock, proxy):
    """xAI leaves it out of completion_tokens."""
    mock.script(whole({"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 5_110}))

    call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "max_tokens": 6_000})

    assert -(-(100 * 15 + 5_010 * 60) // 100) == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("asked", [{}, {"service_tier": "auto"}, {"service_tier": None}])
@pytest.mark.parametrize("told", [{}, {"service_tier": "auto"}])
def test_a_tier_that_nobody_tells_is_the_providers_default(mock, proxy_with, asked, told):
    proxy = proxy_with({"providers": {"openai": {
        "base_url": mock.url, "default_service_tier": "priority"}}}, "--budget", "1")
    mock.script(whole({"prompt_tokens": 100_000, "completion_tokens": 0}, **told))

    call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, **asked})

    assert 25_000 == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("asked", [{"speed": "fast"}, {"inference_geo": "us"}])
def test_a_null_in_usage_tells_nothing(mock, proxy, asked):
    fields = {**MESSAGE, "model": "claude-opus-4-8", **asked}
    mock.models.add("claude-opus-4-8")
    spent = []
    for more in ({}, dict.fromkeys(asked)):
        mock.script(whole({"input_tokens": 1_000, "output_tokens": 1, **more}))
        call(proxy.port, "POST", "/v1/messages", fields)
        spent.append(settled_status(proxy)["spent_microdollars"])

    assert 2 * spent[0] == spent[1] > 0


@pytest.mark.parametrize("more", [
    {"plugins": [{"id": "web"}]}, {"models": ["gpt-5.5"]}, {"search_parameters": {}},
    {"max_token\u017f": 9}, {"tools": [{"Type": "web_search"}]}, {"extra_body": {"x": 1}},
    {"enable_search": True}])
def test_fields_of_other_providers_that_cost_unseen_are_refused(mock, proxy, more):
    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, **more})

    assert (400, []) == (answer.status, mock.seen)


def test_a_client_that_leaves_pays_for_the_output_in_spite_of_old_iterations(mock, proxy):
    usage = {"input_tokens": 100, "output_tokens": 1,
             "iterations": [{"type": "message", "input_tokens": 100, "output_tokens": 1}]}
    start = sse({"type": "message_start", "message": {
        "id": "m", "type": "message", "role": "assistant", "model": "claude-haiku-4-5",
        "content": [], "usage": usage}}, "message_start")
    text = sse({"type": "content_block_delta", "index": 0, "delta": {
        "type": "text_delta", "text": "x" * 3_000}}, "content_block_delta")
    from support import Hang
    mock.script(Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                      steps=(start, text, Hang())))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/messages", json.dumps(
            {**MESSAGE, "max_tokens": 4_000, "stream": True}).encode())
        client.read_head()
        client.read_chunk()
        client.read_chunk()
        client.leave()
        mock.wait_for_hang_ups()

    assert settled_status(proxy)["spent_microdollars"] >= 3_000 * 5


def test_an_unreadable_stream_whose_client_leaves_costs_a_token_for_each_of_its_bytes(
        mock, proxy_with):
    """Of a provider without a key: under a key a coding that cannot be read is refused."""
    from support import Hang
    proxy = proxy_with({"providers": {"lab": {"base_url": mock.url}}, "prices": {
        "lab/m": {"input_cost_per_token": 1.5e-7, "output_cost_per_token": 6e-7}}}, "--budget", "1")
    mock.script(Reply(headers=(("content-type", "text/event-stream"), ("content-encoding", "br")),
                      framing="chunked", steps=(b"\x01" * 8_000, Hang())))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(
            {**CHAT, "model": "lab/m", "max_tokens": 20_000, "stream": True}).encode())
        client.read_head()
        client.read_chunk()
        reserved = call(proxy.port, "GET", "/ironcage/status").json["reserved_microdollars"]
        client.leave()
        mock.wait_for_hang_ups()

    assert 8_000 * 0.6 <= settled_status(proxy)["spent_microdollars"] < reserved


def test_a_flood_of_iterations_is_malformed_and_blocks_nothing(mock, proxy_for, tmp_path):
    proxy = proxy_for("--budget", "1", "--ledger", str(tmp_path / "cage.db"))
    mock.script(whole({"input_tokens": 1, "output_tokens": 1, "iterations": [
        {"input_tokens": 10 ** 12 - 1, "output_tokens": 10 ** 12 - 1}] * 1_001}))
    call(proxy.port, "POST", "/v1/messages", MESSAGE)

    row = call(proxy.port, "GET", "/ironcage/usage").json["rows"][0]
    assert "malformed usage" in row["estimated"]
    assert 200 == call(proxy.port, "POST", "/v1/messages", MESSAGE).status


def test_a_change_of_period_keeps_calls_in_flight():
    """The account stays; what the ledger has of them at their bound is not counted twice."""
    module = program()
    controller = module.CostController(None)
    controller.set_scopes([program().Scope("a", 10_000, "day", None,
                                           lambda since_s: 0 if since_s else 250)])
    claim = controller.admit(module.fixed_bound(600), ("a",), wait_s=0, has_left=lambda: False)
    controller.set_scopes([program().Scope("a", 1_000, "total", None,
                                           lambda since_s: 250 + 600)])      # 600 is in flight
    between = controller.budget("a")
    controller.commit(claim, 8)
    after = controller.budget("a")

    assert (250, 600, 1_000) == (between.spent, between.reserved, between.limit)
    assert (258, 0) == (after.spent, after.reserved)


@pytest.mark.parametrize("geo, factor", [(None, 1.1), ("us", 1.1), ("US", 1.1), ("global", 1)])
def test_only_a_global_place_is_bounded_without_the_premium(geo, factor):
    module = program()
    book = module.PriceBook.load(str(module.os.path.join(
        module.os.path.dirname(module.__file__), "pricing.json")))
    price = book.price("claude-opus-4-8")
    body = module.parse_json_object(json.dumps({**MESSAGE, "inference_geo": geo}).encode())
    plain = module.parse_json_object(json.dumps({**MESSAGE, "inference_geo": "global"}).encode())

    ratio = module.bound_of_request("messages", body, price).output_picodollars \
        / module.bound_of_request("messages", plain, price).output_picodollars
    assert factor == pytest.approx(float(ratio))


def test_an_alias_with_a_price_that_stands_in_hides_no_model_that_searches(mock, proxy_with):
    proxy = proxy_with({"models": {"quick": "gpt-9-search-api"},
                        "price_as": {"gpt-9-*": "gpt-4o-mini"}}, "--budget", "1")

    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "model": "quick"})

    assert (400, []) == (answer.status, mock.seen)
    assert "searches by itself" in answer.json["error"]["message"]
