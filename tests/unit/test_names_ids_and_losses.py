"""Names, ids and losses: what was changed comes back as it was, or is said; a wrong shape has a
name."""
import json

import pytest

import ironcage_proxy as ic


# Losses.

def test_a_loss_is_shown_once_by_its_name_alone():
    losses = ic.Losses()
    losses.names = {"cap": "max_tokens"}
    for name in ("top_k", "top_k", "a name with spaces", "cap"):
        losses.drop(name)
    losses.adjust("cap", 7)
    losses.report("thinking", "a b")

    assert [("x-ironcage-dropped-params", "top_k,?,max_tokens"),
            ("x-ironcage-adjusted", "max_tokens=7,thinking=?")] == losses.headers()
    assert [] == ic.Losses().headers()


def test_losses_are_told_in_headers_that_hold_names_only():
    losses = ic.Losses()
    losses.drop("seed"), losses.drop("seed"), losses.drop("a\r\nb: c")
    losses.adjust("max_tokens", 9)

    assert [("x-ironcage-dropped-params", "seed,?"),
            ("x-ironcage-adjusted", "max_tokens=9")] == losses.headers()


def test_the_header_of_losses_has_an_end():
    losses = ic.Losses()
    for number in range(1_000):
        losses.drop(f"field_{number}")

    assert 2048 == len(losses.headers()[0][1])


def test_strict_mode_refuses_what_a_translation_loses_but_not_what_the_budget_changes():
    losses = ic.Losses(strict=True)
    for lose in (lambda: losses.drop("top_k"), lambda: losses.adjust("top_k", 1)):
        with pytest.raises(ic.BadRequest, match="top_k .*strict mode is on") as failure:
            lose()
        assert "top_k" == failure.value.param
    losses.report("max_tokens", 1)

    assert ([], {"max_tokens": "1"}) == (losses.dropped, losses.adjusted)


# Shapes.

@pytest.mark.parametrize("read, good, wrong, words", [
    (ic.text_in, "a", [7, [], {}, True], "a string"),
    (ic.object_in, {"a": 1}, [7, [], ""], "an object"),
    (ic.rows_in, [{}], [7, {}, [7], [{}, "a"]], "a list of objects")])
def test_a_wrong_shape_is_named_and_a_member_that_is_null_is_an_empty_one(read, good, wrong, words):
    assert good == read({"x": good}, "x")
    assert type(good)() == read({}, "x") == read({"x": None}, "x")
    for value in wrong:
        with pytest.raises(ic.BadRequest, match=f"x must be {words}"):
            read({"x": value}, "x")
        with pytest.raises(ic.UpstreamBroke, match=f"x must be {words}"):
            read({"x": value}, "x", ic.IN_ANSWER)


@pytest.mark.parametrize("value, texts", [
    ("a", ["a"]), (["a", "b"], ["a", "b"]), (None, []), ([], [])])
def test_a_text_may_stand_for_a_list_of_them(value, texts):
    assert texts == ic.texts_in({"x": value}, "x")
    for wrong in (7, ["a", 7], {}):
        with pytest.raises(ic.BadRequest, match="x must be a list of strings"):
            ic.texts_in({"x": wrong}, "x")


@pytest.mark.parametrize("usage, count", [({"n": 7}, 7), ({"n": -1}, 0), ({"n": True}, 0),
                                          ({"n": 1.5}, 0), ({}, 0), (None, 0), ("n", 0)])
def test_a_count_that_is_none_is_carried_over_as_0(usage, count):
    assert count == ic.count_or_zero(usage, "n")


def test_a_field_is_read_elsewhere_lost_loudly_or_silently_or_refused():
    rules = {"own": ("own",), "hint": ("hint",), "no": ("refuse", False)}
    fields = {"own": 1, "hint": 2, "no": False, "other": 3, "null": None}

    assert ({"other": 3}, {"hint": 2}) == ic.by_rules(fields, rules)
    with pytest.raises(ic.BadRequest, match="no, as asked for here, cannot be carried over"):
        ic.by_rules({"no": True}, rules)


@pytest.mark.parametrize("asked, taken, effort", [
    ("high", ("low", "high"), "high"), ("xhigh", ("low", "high"), "high"),
    ("medium", ("low", "high"), "low"), ("none", ("low", "high"), "low")])
def test_an_effort_is_lowered_to_what_the_model_takes(asked, taken, effort):
    assert effort == ic.lowered_effort(asked, taken)


# Arguments.

@pytest.mark.parametrize("arguments, wrapped", [
    ("", {}), ("  ", {}), ('{"a": "ü"}', {"a": "ü"}), ("[1]", {"__value": [1]}),
    ("null", {"__value": None}), ("{bad", {"__raw": "{bad"})])
def test_any_arguments_survive_the_way_there_and_back(arguments, wrapped):
    assert wrapped == ic.arguments_to_input(arguments)
    if arguments.strip():
        again = ic.input_to_arguments(ic.arguments_to_input(arguments))
        assert again == arguments or json.loads(again) == json.loads(arguments)


@pytest.mark.parametrize("step", range(1, 9))
@pytest.mark.parametrize("text", ["", "plain", 'a "quoted" \\ line\n', "é日🐤", "x" * 50])
def test_a_text_within_an_object_is_read_as_it_comes(step, text):
    whole = json.dumps({"input": text})
    reader = ic.TextInput()
    pieces = [reader.more(whole[at:at + step]) for at in range(0, len(whole), step)]

    assert text == "".join(pieces) + reader.rest(whole)


@pytest.mark.parametrize("whole, rest", [
    ('{"other": 1}', ""), ("bare", "bare"), ('{"x": 1, "input": "a"}', "a"), ('{"input": 7}', "7")])
def test_an_object_in_another_order_is_read_at_its_end(whole, rest):
    reader = ic.TextInput()

    assert ("", rest) == (reader.more(whole), reader.rest(whole))


# Names.

def test_a_name_that_fits_stays_and_another_one_comes_back_as_it_was():
    names = ic.ToolNames(16)
    told = [names.fitting(*own) for own in (
        ("f",), ("a.b",), ("a_b",), ("f", "space"), ("x" * 17,), ("x" * 18,), ("f",))]

    assert ("f", "a_b", "space__f", "f") == (told[0], told[2], told[3], told[6])
    assert 6 == len({*told}) and all(len(name) <= 16 for name in told)
    assert told[1].startswith("a_b_") and told[4].startswith("x" * 7 + "_")
    assert [("f", ""), ("a.b", ""), ("a_b", ""), ("f", "space"), ("x" * 17, "")] == [
        names.own(name)[:2] for name in told[:5]]
    assert "unknown" == names.own("unknown").name


def test_a_tool_that_is_called_as_another_in_its_namespace_keeps_its_own_name():
    names = ic.ToolNames(64)
    told = [names.fitting("f", "space"), names.fitting("space__f")]

    assert [("f", "space"), ("space__f", "")] == [names.own(name)[:2] for name in told]


# Ids.

def test_an_id_that_comes_again_is_another_and_depends_on_the_clients_alone():
    first, second = ic.CallIds("[a-z]{1,40}[0-9a-f]*", "call"), ic.CallIds(
        "[a-z]{1,40}[0-9a-f]*", "call")
    made = [first.fitting(own) for own in ("abc", "abc", "A:1", "")]

    assert made == [second.fitting(own) for own in ("abc", "abc", "A:1", "")]
    assert "abc" == made[0] and 4 == len({*made}) and made[1].startswith("call")


def test_an_id_of_nine_characters_is_made_where_a_server_takes_no_longer_one():
    assert 9 == len(ic.CallIds("[a-zA-Z0-9]{9}", "toolu_").fitting("call_1"))
    assert "call_1" == ic.CallIds("[A-Z]{3}", "toolu_").fitting("call_1")       # none would fit


@pytest.mark.parametrize("given", ["call_1", "x:1", "icid_x", "ü" * 9, "a b", "call_\ud800"])
def test_an_id_that_was_carried_comes_back(given):
    used = set()
    for _ in range(3):
        used.add(ic.carried_call_id(given, used))

    assert 3 == len(used) and {given} == {ic.own_call_id(carried) for carried in used}


@pytest.mark.parametrize("given", ["", "x" * 65, "é" * 60])
def test_an_id_that_is_too_long_or_none_is_a_new_one(given):
    one, other = ic.carried_call_id(given, ()), ic.carried_call_id(given, ())

    assert one != other and ic.re.fullmatch("icid_[0-9a-f]{24}", one)


@pytest.mark.parametrize("carried", ["icid_!!", "icid", "icid_A", "call_1", "icid_gICA"])
def test_what_was_carried_by_nobody_stays_as_it_is(carried):
    assert carried == ic.own_call_id(carried)


@pytest.mark.parametrize("own, stem", [("msg_1", "1"), ("resp_a.b", "a_b"), ("x-1", "x-1")])
def test_an_answers_id_is_told_in_another_api(own, stem):
    assert stem == ic.id_stem(own)
    assert ic.id_stem("") != ic.id_stem("")


@pytest.mark.parametrize("api, native", [
    ("messages", {"x": 1}), ("messages", {"type": "tool_use"}), ("messages", {"type": ["text"]}),
    ("messages", {"type": "thinking", "content": ["x"]}), ("responses", {"x": 1}),
    ("chat", {"calls": {"0": "x", "9" * 5000: {}}}), ("chat", {"calls": [1]}),
    ("chat", {"calls": {"0": {"id": "other"}}}), ("chat", {"role": "user", "content": "x"})])
def test_a_seal_that_a_client_made_up_changes_nothing_else(api, native):
    seal = ic.sealed(ic.Part("thought", origin=api, native=native))
    fields = {"max_tokens": 9, "model": "x", "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "", "signature": seal},
            {"type": "text", "text": "said"},
            {"type": "tool_use", "id": "own", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "own"}]}]}

    request = ic.Translator("messages", api, fields, ic.Losses(), ic.Target(9)).request

    rows = request.get("messages", request.get("input"))
    said = next(row for row in rows if "said" in json.dumps(row))
    assert "assistant" == said["role"]
    assert (2, 0) == tuple(json.dumps(request).count(call_id) for call_id in ('"own"', '"other"'))


@pytest.mark.parametrize("block", [
    {"type": "text"}, {"type": "text", "text": None}, {"type": "news", "content": ["x"]}])
def test_blocks_of_claude_that_a_client_changed_are_no_fault_of_ours(block):
    fields = {"model": "claude-haiku-4-5", "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "x_anthropic_content": [block]}]}

    request = ic.Translator("chat", "messages", fields, ic.Losses(), ic.Target(9)).request

    assert block["type"] == request["messages"][-1]["content"][-1]["type"]
