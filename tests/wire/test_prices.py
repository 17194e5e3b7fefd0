"""Prices of the operator's own: rows of --config laid over the table, models that are priced as
another, and files that change, or break, while the proxy serves."""
import http.client
import json
import os
import threading

import pytest
from support import Gate, Reply, call, program, proxy_environment, settled_status, until

CHAT = {"max_completion_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}
IN, OUT = "input_cost_per_token", "output_cost_per_token"
DOLLAR = {IN: 1e-6, OUT: 1e-6}                      # a million tokens, in or out


@pytest.fixture
def files(tmp_path):
    """Paths of a configuration and a price table, and write(path, content)."""
    def write(name, content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.new").write_text(text)
        os.replace(tmp_path / f"{name}.new", tmp_path / name)
        return str(tmp_path / name)
    return write


@pytest.fixture
def proxy_with(mock, proxy_for, files):
    """A proxy under a budget of ten dollars, with a configuration and perhaps a price table."""
    def start(config, table=None, environ=None):
        flags = ["--config", files("cage.json", config), "--budget", "10"]
        flags += [] if table is None else ["--pricing", files("prices.json", table)]
        return proxy_for(*flags, environ={**proxy_environment(mock), **(environ or {})})
    mock.models |= {"gpt-6.9-sol", "my-model"}
    return start


def chat(proxy, model="gpt-6.9-sol", **fields):
    return call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "model": model, **fields})


def tokens_of(answer):
    return answer.json["usage"]["prompt_tokens"] + answer.json["usage"]["completion_tokens"]


def cost_of(answer):
    return int(answer.header("x-ironcage-cost-microdollars"))


def told(logged, words):
    """Wait until the log says something, and return all that it said by then."""
    until(lambda: words in logged(), f"the log says {words!r}")
    return logged()


# Rows of the configuration.

@pytest.mark.parametrize("table", [None, {}, {"gpt-6.9-sol": {IN: 0, OUT: 0}}],
                         ids=["beside pricing.json", "beside an empty table", "over the table's"])
def test_a_row_of_the_configuration_prices_a_model_under_any_table(mock, proxy_with, table):
    proxy = proxy_with({"prices": {"gpt-6.9-sol": DOLLAR}}, table)

    answer = chat(proxy)

    assert (200, tokens_of(answer)) == (answer.status, cost_of(answer))
    assert 400 == chat(proxy, "gpt-6.8-sol").status


def test_a_row_of_the_configuration_replaces_the_tables_whole(mock, proxy_with):
    mock.cached_tokens = 50
    proxy = proxy_with({"prices": {"gpt-4o-mini": DOLLAR}})

    answer = chat(proxy, "gpt-4o-mini")

    assert answer.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 50
    assert tokens_of(answer) == cost_of(answer)     # no cached price of the old row is left


@pytest.mark.parametrize("row, fault", [
    ({IN: 1e-6}, "output_cost_per_token must be a number from 0 up"),
    ({OUT: 1e-6}, "input_cost_per_token must be a number from 0 up"),
    ({**DOLLAR, IN: "1e-6"}, "input_cost_per_token must be a number from 0 up"),
    ({**DOLLAR, OUT: -1}, "output_cost_per_token must be a number from 0 up"),
    ({**DOLLAR, IN: True}, "input_cost_per_token must be a number from 0 up"),
    ({**DOLLAR, "cache_read_input_token_cost": None}, "cache_read_input_token_cost must be"),
    ({**DOLLAR, "input_cost_per_token_flex": []}, "input_cost_per_token_flex must be a number"),
    ({**DOLLAR, "provider_specific_entry": {"us": 0}}, "us must not be 0"),
    ({**DOLLAR, "provider_specific_entry": 5}, "provider_specific_entry must be an object"),
    ([], "must be an object"), (1e-6, "must be an object"),
    *[({**DOLLAR, field: value}, f"{field}: must be a name")
      for field in ("mode", "litellm_provider") for value in (5, True, [], {}, "")],
    *[({**DOLLAR, limit: value}, f"{limit}: must be a whole number of tokens")
      for limit in ("max_input_tokens", "max_output_tokens", "max_tokens")
      for value in ("x", "128000", -1, 1.5, True, [], 10 ** 50)],
])
def test_a_broken_row_names_itself_and_its_field(files, row, fault):
    path = files("cage.json", {"prices": {"good": DOLLAR, "gpt-6.9-sol": row}})

    with pytest.raises(program().Misconfigured) as caught:
        program().load_config(path, {})

    assert f"the price of gpt-6.9-sol in {path}: {fault}" in str(caught.value)


def test_adding_a_token_keeps_the_prices_of_the_configuration(files):
    path = files("cage.json", '{"prices": {"m": {"input_cost_per_token": 2.5e-07,'
                              ' "output_cost_per_token": 0.00000125}}}')

    assert 0 == program().main(["tokens", "add", "alice", "--config", path])

    row = program().load_config(path, {}).prices["m"]
    price = program().price_from_row("m", row)
    assert [250_000, 1_250_000] == [price.amounts[IN], price.amounts[OUT]]


# Priced as another.

def test_a_model_without_a_price_is_priced_as_the_row_that_the_operator_names(mock, proxy_with):
    proxy = proxy_with({"prices": {"mine": DOLLAR}, "price_as": {"gpt-6.9-*": "mine"}})

    answers = [chat(proxy), chat(proxy, "gpt-4o-mini")]

    assert tokens_of(answers[0]) == cost_of(answers[0])
    assert cost_of(answers[1]) < tokens_of(answers[1])          # it has a price of its own
    assert 1 == settled_status(proxy)["priced_as"]
    assert 400 == chat(proxy, "gpt-6.8-sol").status


def test_no_client_can_name_a_price(mock, proxy_with):
    proxy = proxy_with({})

    answer = chat(proxy, price_as={"gpt-6.9-*": "gpt-4o-mini"})

    assert (400, []) == (answer.status, mock.seen)


@pytest.mark.parametrize("pattern, model, provider, found", [
    ("gpt-6.9-*", "gpt-6.9-sol", "openai", True), ("gpt-6.9-*", "gpt-6.9-sol", "lab", True),
    ("lab/*", "anything", "lab", True), ("lab/*", "anything", "openai", False),
    ("openai/*", "openai/gpt-7", "openrouter", False), ("openai/*", "gpt-7", "openai", True),
    ("gpt-6.9-*", "GPT-6.9-sol", "openai", False), ("gpt-6.9-?", "gpt-6.9-sol", "openai", False),
])
def test_a_pattern_with_a_slash_is_about_one_provider(pattern, model, provider, found):
    book = program().PriceBook({"mine": {IN: 1, OUT: 1}}).with_own(
        {}, providers=(), price_as={pattern: "mine"})

    price = book.find(model, provider)

    assert found == (price is not None and price.key == "mine" and price.is_stand_in)


@pytest.mark.parametrize("config, fault", [
    ({"price_as": {"gpt-6.9-*": "gpt-6-astro"}},
     "price_as gpt-6.9-*: there is no price for gpt-6-astro (did you mean gpt-6-astra?)"),
    ({"price_as": {"gpt-6.9-*": 7}}, "price_as in PATH must map names to names"),
    ({"price_as": []}, "price_as in PATH must be an object of price_as"),
    ({"prices": []}, "prices in PATH must be an object of prices"),
    ({"pirces": {}}, "the configuration PATH has an unknown field pirces (did you mean prices?); "
                     "there are tokens, providers, models, prices, price_as"),
    ({"sk-ant-0123456789": 1}, "has an unknown field ?; there are"),
    ({"tokens": [{"name": "a", "token": "ic_0123456789", "bugdet_usd": "1"}]},
     "token 1 in PATH has an unknown field bugdet_usd (did you mean budget_usd?); there are name"),
    ({"providers": {"lab": {"base_uri": "https://x"}}},
     "the provider lab in PATH has an unknown field base_uri (did you mean base_url?)"),
])
def test_a_fault_in_the_configuration_is_named_at_the_start(files, config, fault, capsys):
    path = files("cage.json", config)

    code = program().main(["check", "--config", path, "--port", "0"])

    error = capsys.readouterr().err
    assert (2, 1) == (code, error.count("\n"))
    assert fault.replace("PATH", path) in error


def test_what_is_priced_as_another_is_shown(mock, proxy_with, files, capsys):
    config = {"price_as": {"gpt-6.9-*": "gpt-6-astra"}}
    proxy = proxy_with(config)

    assert "  priced as another:  gpt-6.9-* as gpt-6-astra\n" in program().banner(proxy) + "\n"
    assert 0 == program().main(["check", "gpt-6.9-sol", "gpt-4o", "--port", "0", "--config",
                                files("cage.json", config)])
    out = capsys.readouterr().out
    assert "price_as  gpt-6.9-* as gpt-6-astra\n" in out
    assert "gpt-6.9-sol -> openai/gpt-6.9-sol, input $10.00, output $50.00 for a million tokens, " \
        "as gpt-6-astra (price_as), at " in out
    assert "gpt-4o -> openai/gpt-4o, input $2.50, output $10.00 for a million tokens, at " in out


# Files that change while the proxy serves.

def test_a_new_price_table_is_read_within_a_second_or_so(mock, proxy_with, files):
    proxy = proxy_with({}, {"gpt-6.9-sol": DOLLAR})
    assert 400 == chat(proxy, "my-model").status

    files("prices.json", {"my-model": DOLLAR})
    until(lambda: chat(proxy, "my-model").status == 200, "the new table is read")

    assert 400 == chat(proxy).status


def test_a_price_of_the_configuration_changes_while_serving(mock, proxy_with, files):
    proxy = proxy_with({"prices": {"gpt-6.9-sol": DOLLAR}})
    dear = cost_of(chat(proxy))

    files("cage.json", {"prices": {"gpt-6.9-sol": {IN: 2e-6, OUT: 2e-6}}})
    proxy.reload_asked = True
    until(lambda: cost_of(chat(proxy)) == 2 * dear, "the new price holds")


def test_a_call_in_flight_settles_at_the_prices_it_was_admitted_with(mock, proxy_with, files):
    proxy = proxy_with({"prices": {"gpt-6.9-sol": DOLLAR}})
    gate, answers = Gate(), []
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))
    thread = threading.Thread(target=lambda: answers.append(chat(proxy)))
    thread.start()
    mock.wait_for_requests(1)

    before = proxy.router.prices
    files("cage.json", {"prices": {"gpt-6.9-sol": {IN: 1, OUT: 1}},
                        "providers": {"openai": {"free": True}}})
    proxy.reload_asked = True
    until(lambda: proxy.router.prices is not before, "the configuration is read")
    gate.event.set()
    thread.join()

    assert tokens_of(answers[0]) == cost_of(answers[0])
    assert cost_of(answers[0]) == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("text, reason", [
    ("{", "is not usable"), ("[]", "a price file is a JSON object"), (None, "does not exist"),
    ("{}", "there is no price for mine"),
], ids=["cut off", "no object", "removed", "without the row that stands in"])
def test_a_broken_price_table_leaves_the_old_one(mock, proxy_with, files, logged, text, reason):
    proxy = proxy_with({"price_as": {"gpt-6.9-*": "mine"}}, {"mine": DOLLAR})

    path = files("prices.json", text or "{}")
    if text is None:
        os.unlink(path)
    proxy.reload_asked = True
    told(logged, reason)

    assert tokens_of(chat(proxy)) == cost_of(chat(proxy))


def test_a_broken_price_table_does_not_keep_a_revoked_token_in(mock, proxy_with, files, logged):
    alice = {"name": "alice", "token": "ic_alice_0123456789"}
    proxy = proxy_with({"tokens": [alice]}, {"gpt-6.9-sol": DOLLAR})

    def status():
        return call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "model": "gpt-6.9-sol"},
                    token=alice["token"]).status
    assert 200 == status()

    files("prices.json", "{")
    told(logged, "the price table stays as it was")
    files("cage.json", {"tokens": []})
    until(lambda: status() == 401, "alice's token is revoked")

    assert 200 == chat(proxy).status
    files("prices.json", {"my-model": DOLLAR})
    until(lambda: chat(proxy, "my-model").status == 200, "the mended table is read")


@pytest.mark.parametrize("number", ["1e9999999999999999999", "1e-9999999999999999999", "1e999999",
                                    "1E+40", "9" * 200, "1" + "0" * 5_000, "NaN", "-1", "1e400"])
@pytest.mark.parametrize("config", [
    '{"tokens": [{"name": "a", "token": "ic_0123456789", "budget_usd": N}]}',
    '{"prices": {"gpt-6.9-sol": {"input_cost_per_token": N, "output_cost_per_token": 1}}}',
], ids=["a budget", "a price"])
def test_an_absurd_number_in_the_configuration_leaves_the_old_one(
        mock, proxy_with, files, logged, config, number):
    proxy = proxy_with({"prices": {"gpt-6.9-sol": DOLLAR}})

    files("cage.json", config.replace("N", number))
    proxy.reload_asked = True
    said = told(logged, "the configuration stays as it was")

    assert "a fault of the proxy" not in said
    assert tokens_of(chat(proxy)) == cost_of(chat(proxy))


@pytest.mark.parametrize("failing", ["load_config", "prices_under", "set_scopes"])
@pytest.mark.parametrize("fault", [ArithmeticError, KeyError, MemoryError, RuntimeError])
def test_no_fault_of_a_reload_ends_the_server(mock, proxy_with, files, logged, monkeypatch,
                                              failing, fault):
    def fail(*_, **__):
        raise fault("sk-canary-in-a-fault")
    proxy = proxy_with({"prices": {"gpt-6.9-sol": DOLLAR}})
    if failing == "set_scopes":
        monkeypatch.setattr(proxy.router.controller, "set_scopes", fail)
    else:
        monkeypatch.setattr(program(), failing, fail)

    files("cage.json", {"tokens": [{"name": "a", "token": "ic_0123456789"}]})
    proxy.reload_asked = True
    said = told(logged, "the configuration stays as it was")

    assert f"a fault of the proxy: {fault.__name__} in line " in said
    assert "canary" not in said
    assert tokens_of(chat(proxy)) == cost_of(chat(proxy))
    assert 401 == call(proxy.port, "POST", "/v1/chat/completions", CHAT,
                       token="ic_0123456789").status


@pytest.mark.parametrize("limit", ["1e9999999999999999999", "1e-9999999999999999999"])
def test_an_absurd_limit_is_a_bad_request(mock, proxy_for, limit):
    proxy = proxy_for("--budget", "1", "--admin-token", "ic_admin_0123456789")

    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    connection.request("PUT", "/ironcage/budget", f'{{"limit_usd": {limit}}}', {
        "authorization": "Bearer ic_admin_0123456789", "content-type": "application/json"})
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()

    assert (400, "invalid_request_error") == (answer.status, body["error"]["type"])


# The right price, or none.

@pytest.mark.parametrize("model", [
    "openrouter/deepseek/deepseek-chat", "openrouter/openai/gpt-4o-mini", "lab/gpt-4o-mini",
    "lab/ft:gpt-4o-2024-08-06:a::b"])
def test_another_sellers_price_is_no_price(mock, proxy_with, model):
    proxy = proxy_with({"providers": {name: {"base_url": mock.url, "key_env": "OPENAI_API_KEY"}
                                      for name in ("openrouter", "lab")}})

    answer = chat(proxy, model)

    assert (400, "unpriced_model") == (answer.status, answer.json["error"]["code"])
    assert [] == mock.seen


@pytest.mark.parametrize("more, per_token", [
    ({"prices": {"lab/gpt-4o-mini": DOLLAR}}, 1), ({"prices": {"gpt-4o-mini": DOLLAR}}, 1),
    ({"prices": {"mine": DOLLAR}, "price_as": {"lab/*": "mine"}}, 1), ({"free": True}, 0)],
    ids=["a row of its own", "a row without a seller", "priced as another", "free"])
def test_a_provider_of_ones_own_is_priced_by_its_operator(mock, proxy_with, more, per_token):
    lab = {"base_url": mock.url, "key_env": "OPENAI_API_KEY", "free": more.pop("free", False)}
    proxy = proxy_with({"providers": {"lab": lab}, **more})

    answer = chat(proxy, "lab/gpt-4o-mini")

    assert per_token * tokens_of(answer) == cost_of(answer)


@pytest.mark.parametrize("chosen, sent", [
    ({"zdr": True, "max_price": {"prompt": 0.5, "completion": 9, "image": 1}},
     {"zdr": True, "max_price": {"prompt": 0.5, "completion": "2.00", "image": 1,
                                 "request": "0.00"}}),
    (None, {"max_price": {"prompt": "1.00", "completion": "2.00", "request": "0.00"}})])
def test_a_seller_that_is_chosen_at_a_router_costs_no_more_than_the_price(
        mock, proxy_with, chosen, sent):
    proxy = proxy_with({
        "providers": {"openrouter": {"base_url": mock.url + "/v1", "key_env": "OPENAI_API_KEY"}},
        "prices": {"openrouter/gpt-4o-mini": {IN: 1e-6, OUT: 2e-6}}})

    mock.always = Reply(steps=(b'{"choices": [], "usage": {"prompt_tokens": 1}}',))
    answer = call(proxy.port, "POST", "/v1/chat/completions", {
        **CHAT, "model": "openrouter/gpt-4o-mini", "provider": chosen})

    assert (200, sent) == (answer.status, mock.seen[0].json["provider"])
    told = answer.header("x-ironcage-adjusted") or ""
    assert "provider.max_price.completion=2.00" in told


def test_an_answer_of_a_tier_without_a_price_is_charged_at_the_highest_and_marked(
        mock, proxy_with):
    def served_by_priority(request):
        reply = mock.default_reply(request)
        body = json.loads(reply.body)
        body["service_tier"] = "priority"
        return reply.with_steps([json.dumps(body).encode()])
    proxy = proxy_with({"prices": {"gpt-6.9-sol": {**DOLLAR, f"{IN}_ultrafast": 5e-6,
                                                   f"{OUT}_ultrafast": 5e-6}}})
    mock.script(served_by_priority)

    answer = chat(proxy)

    row = call(proxy.port, "GET", "/ironcage/usage?limit=1").json["rows"][0]
    assert 5 * tokens_of(answer) == cost_of(answer) == row["cost_microdollars"]
    assert "no price is known for the tier priority" == row["estimated"]
    assert (answer.json["usage"]["prompt_tokens"], answer.json["usage"]["completion_tokens"]) == (
        row["input_tokens"], row["output_tokens"])


def test_the_list_of_models_has_those_that_can_be_called_by_their_names(mock, proxy_with):
    proxy = proxy_with(
        {"providers": {"lab": {"base_url": mock.url}, "groq": {"base_url": mock.url}}},
        {"gpt-4o": {**DOLLAR, "litellm_provider": "openai"}, "lab/own": DOLLAR,
         "groq/llama": {**DOLLAR, "litellm_provider": "groq"}, "nobodys": DOLLAR,
         "babbage": {**DOLLAR, "litellm_provider": "text-completion-openai"},
         "xai/grok": {**DOLLAR, "litellm_provider": "xai"}},
        environ={"GROQ_API_KEY": "gsk-0123456789abcdef"})

    listed = {row["id"] for row in call(proxy.port, "GET", "/v1/models").json["data"]}

    assert {"gpt-4o", "lab/own", "groq/llama", "babbage", "ironcage/echo"} == listed


def test_what_another_table_would_change_is_printed(files, capsys):
    old = files("old.json", {"same": DOLLAR, "gone": DOLLAR, "other": {**DOLLAR, "max_tokens": 5},
                             "image": {"output_cost_per_image": 1}})
    new = files("new.json", {"same": {**DOLLAR, "source": "x"}, "fresh": {IN: 2e-6, OUT: 0},
                             "other": {IN: 1e-6, OUT: 3e-6, "cache_read_input_token_cost": 1e-7}})

    code = program().main(["models", "--pricing", old, "--compare", new])

    assert 0 == code
    assert ["+ fresh: input $2.00, output $0.00", "- gone: input $1.00, output $1.00",
            "~ other: cache_read_input_token_cost absent -> 1E-7",
            "~ other: max_tokens 5 -> absent",
            "~ other: output_cost_per_token 0.000001 -> 0.000003",
            "1 models added, 1 removed, 3 cells changed"] == capsys.readouterr().out.splitlines()


def test_a_table_to_compare_with_that_cannot_be_read_is_one_line(tmp_path, capsys):
    code = program().main(["models", "--compare", str(tmp_path / "nowhere.json")])

    assert (2, 1) == (code, capsys.readouterr().err.count("\n"))
