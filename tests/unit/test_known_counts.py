"""What a provider has counted is not guessed again: bounds from learned counts.

The provider of these tests counts by an additive rule of its own: every message, system part and
tool costs a third of its bytes and some framing; deferred tools cost nothing until a message
refers to them.
"""
import json
from random import Random

import pytest
from support import each_seed, program

ic = program()
SCOPE = ("default", "anthropic", "claude-opus-5-5", "", "")
ROWS = {"messages": {"litellm_provider": "anthropic"}, "responses": {"litellm_provider": "openai"},
        "chat": {"litellm_provider": "openai"}}
WORDS = "the proxy reads each answer and keeps what it costs in a ledger of its own".split()


def price(api, key="m"):
    return ic.price_from_row(key, {"input_cost_per_token": 1, "output_cost_per_token": 1,
                                   "max_input_tokens": 1_000_000, "max_output_tokens": 64_000,
                                   **ROWS[api]})


def body_of(fields):
    return ic.parse_json_object(json.dumps(fields).encode())


def billed(fields):
    """Tokens, by the provider's own rule."""
    def unmarked(part):
        return [*map(unmarked, part)] if isinstance(part, list) else part if not isinstance(
            part, dict) else {name: unmarked(child) if name == "content" else child
                              for name, child in part.items() if name != "cache_control"}

    def tokens(part):
        return -(-len(json.dumps(unmarked(part))) // 4) + 3

    messages = fields.get("messages", fields.get("input"))
    tools = fields.get("tools") or []
    loaded = json.dumps(messages)
    system = fields.get("system") or []
    return sum(map(tokens, messages)) + sum(map(tokens, system)) + sum(
        tokens(tool) for tool in tools
        if not tool.get("defer_loading") or f'"tool_name": "{tool["name"]}"' in loaded) \
        + 400 * bool(tools)


class Session:
    """Requests that grow, and what was learned of them."""

    def __init__(self, api="messages", scope=SCOPE):
        self.api, self.scope, self.known = api, scope, {}

    def prompt(self, fields):
        return ic.prompt_of(self.api, body_of(fields), self.scope)

    def bound(self, fields):
        """From learned counts; None where the whole has to be measured."""
        prompt = self.prompt(fields)
        return ic.known_input_tokens(
            self.api, body_of(fields), price(self.api),
            lambda chain: [self.known.get(digest) for digest in chain], lambda: prompt)

    def learn(self, fields):
        prompt = self.prompt(fields)
        if prompt is not None and prompt.is_stable:
            self.known[prompt.chain[-1]] = ic.Counted(billed(fields), frozenset(prompt.parts),
                                                      prompt.has_tools)


def text(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def tool(name, **more):
    return {"name": name, "description": f"does {name} " * 20, "input_schema": {}, **more}


def message(rng, role, words=60):
    return {"role": role, "content": [{"type": "text", "text": text(rng, words)}]}


def request(rng, turns=2, **more):
    return {"model": "m", "max_tokens": 1000, "system": [{"type": "text", "text": text(rng, 200)}],
            "tools": [tool("read"), tool("write")],
            "messages": [message(rng, role) for role in ("user", "assistant") * turns], **more}


def longer(rng, fields, turns=1, **more):
    return {**fields, "messages": fields["messages"] + [
        message(rng, role) for role in ("user", "assistant") * turns], **more}


def goes_on(fields, known, **more):
    """The bound of what goes on from a stored response of known size."""
    return ic.known_input_tokens("responses", body_of({"previous_response_id": "r", **fields}),
                                 price("responses"), lambda digests: [known], None, **more)


def measured(fields, api="messages"):
    return ic.input_tokens_bound(body_of(fields), price(api), measured=True)


@each_seed(30, 120)
def test_a_learned_bound_is_never_below_the_bill(seed):
    """Whatever grows, moves or is added between calls: messages, cache marks, tools, system."""
    rng, session = Random(seed), Session()
    fields, learned = request(rng), 0
    for _ in range(12):
        bound = session.bound(fields)
        assert bound is None or bound >= billed(fields)
        learned += bound is not None
        session.learn(fields)
        fields = longer(rng, fields)
        change = rng.randrange(6)
        if change == 0:
            fields["tools"] = [*fields["tools"], tool(f"t{rng.random()}")]
        elif change == 1:
            fields["system"] = [{"type": "text", "text": text(rng, 300)}]
        elif change == 2:
            fields["messages"][-2]["content"][0]["cache_control"] = {"type": "ephemeral"}
        elif change == 3:
            fields = {**fields, "messages": fields["messages"][:rng.randrange(
                2, len(fields["messages"]))]}
        elif change == 4:
            fields["tools"] = [*fields["tools"], tool("later", defer_loading=True)]
        elif any(t["name"] == "later" for t in fields["tools"]):
            fields["messages"][-1]["content"].append(
                {"type": "tool_reference", "tool_name": "later"})

    assert learned > 5


def test_what_is_known_costs_its_count_and_only_the_rest_is_guessed():
    rng, session = Random(1), Session()
    first = request(rng, turns=30)
    session.learn(first)
    second = longer(rng, first)

    bound = session.bound(second)
    assert billed(second) <= bound < billed(second) + 700 + 700 < measured(second)


def test_an_edit_in_the_middle_falls_back_to_what_stands_before_it():
    rng, session = Random(2), Session()
    first = request(rng, turns=2)
    session.learn(first)
    second = longer(rng, first, turns=20)
    session.learn(second)
    edited = {**second, "messages": [*second["messages"][:10], message(rng, "user"),
                                     *second["messages"][11:]]}

    assert billed(edited) <= session.bound(edited) < measured(edited) + 700
    assert session.bound(edited) > session.bound(longer(rng, second))
    assert session.bound({**edited, "messages": edited["messages"][1:]}) is None


def test_cache_marks_may_move():
    rng, session = Random(3), Session()
    first = request(rng, turns=20)
    first["messages"][-1]["content"][0]["cache_control"] = {"type": "ephemeral"}
    session.learn(first)
    second = longer(rng, json.loads(json.dumps(first)))
    del second["messages"][-3]["content"][0]["cache_control"]
    second["messages"][-1]["content"][0]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
    second["system"][0]["cache_control"] = {"type": "ephemeral"}

    assert session.bound(second) < measured(second) / 2


def test_text_may_become_a_block_which_carries_the_mark():
    rng, session = Random(13), Session()
    first = request(rng)
    first["messages"].append({"role": "user", "content": "hello"})
    session.learn(first)
    second = longer(rng, json.loads(json.dumps(first)))
    second["messages"][4]["content"] = [{"type": "text", "text": "hello",
                                         "cache_control": {"type": "ephemeral"}}]

    assert session.bound(second) is not None


# What changes no count, and what makes a count unusable: (of the first request, of the second).
KEEPS = {
    "caps": ({}, {"max_tokens": 9}), "metadata": ({}, {"metadata": {"user_id": "x"}}),
    "sampling": ({}, {"temperature": 0.5, "stop_sequences": ["x"]}),
    "thinking budget": ({"thinking": {"type": "enabled", "budget_tokens": 9000}},
                        {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    "Claude Code's clear_thinking": tuple([{"context_management": {"edits": [
        {"type": "clear_thinking_20251015", "keep": "all"}]}}] * 2),
    "null": ({"thinking": None}, {}),
    "streaming": ({}, {"stream": True}),
}
SPOILS = {
    "thinking switched on": ({}, {"thinking": {"type": "adaptive"}}),
    "an edit of context": tuple([{"context_management": {"edits": [
        {"type": "clear_tool_uses_20250919"}]}}] * 2),
    "thinking cleared": tuple([{"context_management": {"edits": [
        {"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns", "value": 1}}]}}] * 2),
    "tool choice none": tuple([{"tool_choice": {"type": "none"}}] * 2),
    "another format": ({}, {"output_config": {"format": {"type": "json_schema", "schema": {}}}}),
    "another effort": ({}, {"output_config": {"effort": "high"}}),
    "a field of tomorrow": ({}, {"fan_out": 2}),
}


@pytest.mark.parametrize("first, second", KEEPS.values(), ids=KEEPS)
def test_a_count_stays_known_where_nothing_that_counts_has_changed(first, second):
    rng, session = Random(4), Session()
    known = request(rng, **first)
    session.learn(known)

    assert session.bound(longer(rng, {**known, **second})) is not None


@pytest.mark.parametrize("first, second", SPOILS.values(), ids=SPOILS)
def test_a_count_is_not_used_where_something_else_has_changed(first, second):
    rng, session = Random(5), Session()
    known = request(rng, **first)
    session.learn(known)

    assert session.bound(longer(rng, {**known, **second})) is None


@pytest.mark.parametrize("part", [
    {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
    {"type": "image", "source": {"type": "file", "file_id": "f"}},
    {"type": "document", "source": {"type": "url", "url": "https://x/y.pdf"}},
    {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
    {"type": "input_image", "image_url": "https://x/y.png"}, {"type": "input_file", "file_url": "u"},
    {"type": "video_url", "video_url": {"url": "https://x/y.mp4"}},
    {"type": "input_audio", "input_audio": {"data": "gs://x/y.wav", "format": "wav"}},
    {"image_url": "http://x/y.png"},
    {"type": "container_upload", "file_id": "f"}], ids=repr)
def test_what_can_change_behind_its_name_is_not_learned(part):
    """The image behind a URL may be another one at the next call."""
    rng, session = Random(6), Session()
    fields = request(rng)
    fields["messages"][0]["content"].append(part)
    session.learn(fields)

    assert {} == session.known


def test_an_image_in_the_request_itself_is_counted_once():
    rng, session = Random(7), Session()
    fields = request(rng)
    fields["messages"][0]["content"].append({"type": "image", "source": {
        "type": "base64", "media_type": "image/png", "data": "A" * 9_000}})
    session.learn(fields)
    again = longer(rng, fields)

    assert session.bound(again) < measured(again)


@pytest.mark.parametrize("index, other", [(0, "another token"), (1, "bedrock"), (2, "claude-x"),
                                          (3, "context-1m-2025-08-07"), (4, "responses=v2")])
def test_a_count_belongs_to_one_token_provider_model_and_set_of_betas(index, other):
    rng, session = Random(8), Session()
    fields = request(rng)
    session.learn(fields)
    session.scope = (*SCOPE[:index], other, *SCOPE[index + 1:])

    assert session.bound(longer(rng, fields)) is None


@pytest.mark.parametrize("model", ["openrouter/auto", "auto", "azure-model-router", "model_router",
                                   "chatgpt-4o-latest"])
def test_routers_and_names_that_move_are_not_learned(model):
    session = Session(scope=("default", "p", model, "", ""))

    assert session.prompt(request(Random(9))) is None


@pytest.mark.parametrize("more", [{"previous_response_id": "r"}, {"conversation": "c"},
                                  {"container": "c"}])
def test_state_that_is_kept_at_the_provider_has_no_known_beginning(more):
    fields = {"input": [message(Random(10), "user")], **more}

    assert Session("responses").prompt(fields) is None


def test_all_deferred_tools_count_in_full_since_a_reference_may_load_them():
    rng, session = Random(11), Session()
    fields = request(rng)
    fields["tools"] += [tool(f"t{n}", defer_loading=True) for n in range(9)]
    session.learn(fields)
    loading = longer(rng, fields)
    loading["messages"][-1]["content"] += [
        {"type": "tool_reference", "tool_name": f"t{n}"} for n in range(9)]

    assert session.bound(loading) >= billed(loading)


def test_tools_where_there_were_none_bring_their_prompt():
    rng, session = Random(12), Session()
    fields = request(rng, tools=None)
    session.learn(fields)
    with_tools = longer(rng, fields, tools=[tool("read")])

    assert session.bound(with_tools) >= billed(with_tools) + ic.TOOL_PROMPT_TOKENS - 400


@pytest.mark.parametrize("name", ["system", "tools"])
def test_the_same_part_again_counts_again(name):
    rng, session = Random(13), Session()
    part = {"system": {"type": "text", "text": text(rng, 500)}, "tools": tool("read")}[name]
    fields = request(rng, **{name: [part]})
    session.learn(fields)
    repeated = longer(rng, fields, **{name: [part] * 90})

    assert session.bound(repeated) >= billed(repeated)
    session.learn(repeated)
    assert session.bound(longer(rng, repeated)) < measured(repeated)


NAMED_LIKE_A_MARK = {
    "the input of a tool": lambda value: {"messages": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "t", "name": "read", "input": {"cache_control": value}}]}]},
    "a text that it holds": lambda value: {"messages": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "t", "name": "read", "input": {
            "content": {"cache_control": value}}}]}]},
    "the schema of a tool": lambda value: {"tools": [{
        "name": "read", "input_schema": {"properties": {"cache_control": value}}}]},
}


@pytest.mark.parametrize("fields_with", NAMED_LIKE_A_MARK.values(), ids=NAMED_LIKE_A_MARK)
def test_only_a_cache_mark_is_left_out_and_not_what_is_named_like_one(fields_with):
    rng, session = Random(14), Session()
    session.learn(request(rng, **fields_with("")))
    other = request(Random(14), **fields_with({"description": text(rng, 5_000)}))

    bound = session.bound(other)
    assert bound is None or bound >= billed(other)


@pytest.mark.parametrize("kind, prompt_tokens", [
    ("memory_20250818", ic.TOOL_PROMPT_TOKENS), ("bash_20250124", ic.TOOL_PROMPT_TOKENS),
    ("computer_toolset_20260801", ic.TOOLSET_PROMPT_TOKENS)])
def test_a_tool_whose_schema_the_provider_has_brings_it_to_a_known_prompt(kind, prompt_tokens):
    rng, session = Random(15), Session()
    fields = request(rng, tools=[tool("read")])
    session.learn(fields)
    known = session.bound(longer(Random(16), fields))
    more = session.bound(longer(Random(16), fields, tools=[tool("read"), {"type": kind}]))

    assert more >= known + prompt_tokens


def test_a_file_in_a_new_system_part_counts_as_a_whole_context():
    rng, session = Random(17), Session()
    fields = request(rng)
    session.learn(fields)

    assert 1_000_000 == session.bound(longer(rng, fields, system=[
        {"type": "document", "source": {"type": "file", "file_id": "f"}}]))


@pytest.mark.parametrize("block", [
    {"type": "tool_reference", "tool_name": "large"},
    {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "large"}}], ids=repr)
@pytest.mark.parametrize("is_deferred", [True, False])
def test_a_definition_that_content_loads_again_counts_again(block, is_deferred):
    rng, session = Random(18), Session()
    large = tool("large", description=text(rng, 4_000), defer_loading=is_deferred)
    fields = request(rng, tools=[tool("read"), large])
    session.learn(fields)
    loading = longer(rng, fields)
    loading["messages"][-1]["content"] += [block] * 5

    added = 4 * len(large["description"])
    assert session.bound(loading) >= billed(fields) + added
    assert measured(loading) >= added
    assert measured(fields) < added


def test_what_reconfigures_the_conversation_is_measured_with_all_before_it():
    rng, session = Random(19), Session("responses", ("default", "openai", "gpt-5.5", "", ""))
    items = [message(rng, "user"), message(rng, "assistant")]
    session.learn({"input": items})
    update = {"type": "configuration_update", "reasoning": {"effort": "high"}}

    assert session.bound({"input": [*items, message(rng, "user")]}) is not None
    assert session.bound({"input": [*items, update]}) is None
    assert goes_on({"input": [update]}, ic.Counted(9)) is None


def test_the_bound_is_what_was_counted_the_slack_and_the_rest_by_the_rule():
    rng, session = Random(20), Session()
    fields = request(rng, tools=None)
    session.learn(fields)
    added = message(rng, "user")
    rest = {"messages": [added], "added": [], "system": []}
    whole = {**fields, "messages": [*fields["messages"], added]}

    assert session.bound(whole) == billed(fields) + 700 + ic.input_tokens_bound(
        ic.JsonBody(ic.json_bytes(rest), rest), price("messages"), measured=True)


def test_a_large_deferred_definition_counts_before_it_is_loaded():
    rng, session = Random(21), Session()
    fields = request(rng)
    fields["tools"] += [tool("large", description=text(rng, 5_000), defer_loading=True)]
    session.learn(fields)
    loading = longer(rng, fields)
    loading["messages"][-1]["content"] += [{"type": "tool_reference", "tool_name": "large"}]

    assert session.bound(loading) >= billed(loading)


def test_a_namespace_is_deferred_where_a_tool_in_it_is():
    rng, session = Random(22), Session()
    space = {"type": "namespace", "name": "n", "tools": [tool("a"), tool("b", defer_loading=True)]}

    assert (({"tools": space}),) == tuple(
        {field: part} for field, part in session.prompt(request(rng, tools=[space])).uncounted)


def test_a_file_in_the_rest_counts_as_the_context_window_that_was_asked_for():
    rng, session = Random(23), Session()
    fields = request(rng)
    session.learn(fields)
    longer_one = longer(rng, fields)
    longer_one["messages"][-1]["content"].append(
        {"type": "document", "source": {"type": "file", "file_id": "f"}})

    assert 2_000_000 == ic.known_input_tokens(
        "messages", body_of(longer_one), price("messages"),
        lambda chain: [session.known.get(digest) for digest in chain],
        lambda: session.prompt(longer_one), window=2_000_000)


@pytest.mark.parametrize("item, window, bound", [
    ({"type": "input_file", "file_id": "f"}, 0, 1_000_000),
    ({"type": "input_file", "file_id": "f"}, 2_000_000, 2_000_000)])
def test_a_file_that_goes_on_from_a_response_counts_as_a_whole_context(item, window, bound):
    fields = {"input": [{"role": "user", "content": [item]}]}

    assert bound == goes_on(fields, ic.Counted(9), window=window)


def test_a_response_that_goes_on_is_bounded_by_its_total_the_slack_and_what_is_new():
    new = {"input": "hello"}

    assert 5_000 + 700 + ic.input_tokens_bound(
        ic.JsonBody(ic.json_bytes(new), new), price("responses"), measured=True) \
        == goes_on(new, ic.Counted(5_000))


def test_items_named_by_their_ids_are_bounded_by_what_their_responses_made():
    made = {ic._digest("item", name): ic.Counted(5_000, frozenset({"response 1"}))
            for name in ("rs_1", "rs_2")}
    one, two = ({"type": "item_reference", "id": name} for name in ("rs_1", "rs_2"))

    def bound(*items):
        body = body_of({"input": [*items]})
        return ic.known_input_tokens(
            "responses", body, price("responses"),
            lambda digests: [made.get(digest) for digest in digests],
            lambda: ic.prompt_of("responses", body, SCOPE))

    assert 5_000 < bound(one, two) < 6_000 < 10_000 < bound(one, one)
    assert [None] * 3 == [bound({"role": "user", "content": "hi"}),
                          bound(one, {"type": "item_reference", "id": "rs_3"}),
                          bound(one, {"type": "message", "id": "rs_2", "content": "x"},
                                {"type": "message", "id": "rs_1", "content": "x"})]


def test_a_field_of_null_is_one_that_is_not_there():
    rng, session = Random(24), Session()
    fields = request(rng)
    session.learn({**fields, "thinking": None})

    assert session.bound(longer(rng, fields)) is not None


def test_a_prompt_that_may_be_truncated_is_not_learned():
    session = Session("responses")

    assert session.prompt({"input": [message(Random(25), "user")]}).is_stable
    assert not session.prompt({"input": [message(Random(25), "user")],
                               "truncation": "auto"}).is_stable


RESPONSES = {
    "all of it": ({}, {}, True), "the default, by its name": (
        {}, {"reasoning": {"context": "auto", "summary": "auto"}}, True),
    "of all turns, after less": ({"reasoning": {"context": "current_turn"}},
                                 {"reasoning": {"context": "all_turns"}}, False),
    "switched on": ({"reasoning": {"effort": "none"}}, {"reasoning": {"effort": "high"}}, False),
    "another effort": ({"reasoning": {"effort": "low"}}, {"reasoning": {"effort": "high"}}, True),
}


@pytest.mark.parametrize("first, second, is_known", RESPONSES.values(), ids=RESPONSES)
def test_a_stored_response_is_known_where_the_same_reasoning_is_read_again(first, second, is_known):
    assert is_known == (ic.response_digest("r", first) == ic.response_digest("r", second))


# The memory.

def row(digest=b"d", tokens=5, model="m-2026", scope="s", at=100):
    return ic.CountRow(scope, digest, ic.Counted(tokens), model, at)


def test_a_model_that_answers_under_another_name_is_not_known_again():
    counts = ic.KnownCounts(clock=lambda: 100)
    counts.learn(row())
    known = counts.find("s", [b"d"])
    counts.learn(row(b"e", model="m-2027"))
    counts.learn(row(b"f", model="m-2027"))

    assert ([ic.Counted(5)], [None] * 3) == (known, counts.find("s", [b"d", b"e", b"f"]))


def test_counts_are_kept_for_a_day():
    now = [100]
    counts = ic.KnownCounts(clock=lambda: now[0])
    counts.learn(row())
    now[0] += ic.COUNTS_KEPT_S
    last = counts.find("s", [b"d"])
    now[0] += 1

    assert ([ic.Counted(5)], [None]) == (last, counts.find("s", [b"d"]))


def test_the_oldest_counts_go_first():
    counts = ic.KnownCounts(clock=lambda: 100)
    for number in range(ic.MOST_COUNTS + 1):
        counts.learn(row(b"%d" % number))

    assert [None, ic.Counted(5)] == counts.find("s", [b"0", b"1"])


def test_a_ledger_keeps_counts_over_a_restart(tmp_path):
    path, counted = str(tmp_path / "cage.db"), ic.Counted(7, frozenset({b"a" * 16, b"b" * 16}), True)
    now_s = int(ic.time.time())
    first = ic.SqliteLedger(path)
    first.keep_count(ic.CountRow("s", b"d" * 16, counted, "m", now_s))
    first.keep_count(ic.CountRow("s", b"e" * 16, counted, "m", now_s - ic.COUNTS_KEPT_S - 9))
    first.close()
    again = ic.SqliteLedger(path)

    assert [ic.CountRow("s", b"d" * 16, counted, "m", now_s)] == again.counts()
    again.close()
