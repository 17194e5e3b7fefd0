"""Searches that a provider runs: what they can cost at most, and how their number is capped.

The oracle adds up the samplings one by one, as the providers were seen to bill them.
"""
import json
import re
from random import Random
from typing import NamedTuple

import pytest
from support import each_seed, program

ic = program()
CLAUDE = {"litellm_provider": "anthropic", "input_cost_per_token": 5e-6,
          "output_cost_per_token": 25e-6, "max_input_tokens": 200_000, "max_output_tokens": 64_000}
GPT = {"litellm_provider": "openai", "input_cost_per_token": 2e-6, "output_cost_per_token": 10e-6,
       "max_input_tokens": 272_000, "max_output_tokens": 128_000}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
FETCH = {"type": "web_fetch_20250910", "name": "web_fetch"}
FUNCTION = {"name": "f", "input_schema": {"type": "object"}}
TOOL_SEARCH = {"type": "tool_search_tool_bm25_20251119", "name": "tool_search_tool_bm25"}


def price(row, key):
    return ic.price_from_row(key, {name: ic.Decimal(str(value)) if isinstance(value, float)
                                   else value for name, value in row.items()})


def bound_of(tools, *, key="claude-opus-5-5", row=None, **more):
    api = "messages" if key.startswith("claude") else "responses"
    fields = {"model": key, "tools": tools, **({"max_tokens": 1000, "messages": []}
                                               if api == "messages" else {"input": "hi"}), **more}
    body = ic.parse_json_object(json.dumps(fields).encode())
    row = row or (CLAUDE if api == "messages" else GPT)
    return ic.bound_of_request(api, body, price(row, key))


def oracle_microdollars(visible, samplings, results, output, context, usd_in, usd_out, fees):
    """Sampling by sampling: what is visible; later all results and all that was written too."""
    tokens = min(visible, context) + sum(
        min(visible + results + output, context) for _ in range(samplings - 1))
    usd = tokens * ic.Fraction(str(usd_in)) + output * ic.Fraction(str(usd_out)) \
        + fees * ic.Fraction("0.01")
    return -(-(usd * 10 ** 6).numerator // (usd * 10 ** 6).denominator)


# (tools, uses of each, samplings, tokens of results, fees)
CLAUDE_CASES = [
    ([SEARCH], 5, 7, 80_000, 5), ([SEARCH], 1, 3, 16_000, 1), ([SEARCH], 0, 1, 0, 0),
    ([{**SEARCH, "max_uses": 8}], 8, 10, 128_000, 8), ([{**SEARCH, "max_uses": 30}], 30, 11, 480_000,
                                                       30),
    ([FETCH], 2, 4, 55_000, 0), ([{**FETCH, "max_content_tokens": 1000}], 2, 4, 2_200, 0),
    ([{**FETCH, "max_content_tokens": 0}], 2, 4, 55_000, 0),
    ([{**FETCH, "citations": {"enabled": True}}], 2, 4, 110_000, 0),
    ([SEARCH, FETCH], 2, 6, 87_000, 2), ([SEARCH, FETCH, FUNCTION], 0, 1, 0, 0),
    ([{**SEARCH, "type": "web_search_20260318"}], 1, 11, 16_000, 1),
    ([TOOL_SEARCH, FUNCTION], 0, 11, 0, 0), ([TOOL_SEARCH, SEARCH], 1, 11, 16_000, 1),
]


@pytest.mark.parametrize("output", [1, 1000, 60_000])
@pytest.mark.parametrize("tools, uses, samplings, results, fees", CLAUDE_CASES)
def test_claudes_searches_are_bounded_sampling_by_sampling(tools, uses, samplings, results, fees,
                                                           output):
    bound = bound_of(tools)
    visible = bound.input_tokens + 4096 * sum(tool is not FUNCTION for tool in tools)

    expected = oracle_microdollars(visible, samplings, results, output, 200_000, 5e-6, 25e-6, fees)
    assert expected == bound.microdollars(output, uses)


@pytest.mark.parametrize("key, each", [("gpt-5.5", 5_000), ("gpt-6.1-sol", 5_000),
                                       ("gpt-4.1", 17_000), ("o3", 17_000)])
@pytest.mark.parametrize("asked, uses", [(None, 5), (2, 2), (0, 0), (9, 4)])
def test_openais_searches_are_bounded_sampling_by_sampling(key, each, asked, uses):
    bound = bound_of([{"type": "web_search"}], key=key,
                     **({} if asked is None else {"max_tool_calls": asked}))

    expected = oracle_microdollars(bound.input_tokens + 5000, uses + 1, uses * each, 1000, 272_000,
                                   2e-6, 10e-6, uses)
    assert expected == bound.microdollars(1000, uses)
    assert (5 if asked is None else asked) == bound.asked_caps.hosted_uses


def test_a_compaction_reads_the_prompt_twice():
    plain = bound_of([], key="gpt-5.5", input=[{"role": "user", "content": "x" * 9000}])
    compacting = bound_of([], key="gpt-5.5", input=[{"role": "user", "content": "x" * 9000},
                                                    {"type": "compaction_trigger"}])

    assert 2 * plain.microdollars(0) < compacting.microdollars(0)
    assert compacting.admitted(ic.Caps(100)).loops


@pytest.mark.parametrize("tools, advice", [
    ([], "Its input alone can cost .*send less input, or raise"),
    ([SEARCH], "Its input and what tools at the provider add to it alone can cost .*fewer uses")])
def test_a_refusal_says_that_tools_make_the_input_dear(tools, advice):
    refusal = ic.insufficient_budget(ic.Budget("proxy", 1, 0, 0), bound_of(tools))

    assert re.search(advice, refusal.message)


@pytest.mark.parametrize("api", ["chat", "messages"])
def test_content_that_compacts_is_bounded_in_any_api(api):
    body = ic.parse_json_object(json.dumps({"model": "m", "max_tokens": 9, "messages": [
        {"role": "user", "content": [{"type": "compaction_trigger"}]}]}).encode())

    assert ic.bound_of_request(api, body, price(GPT, "gpt-5.5")).admitted(ic.Caps(9)).loops


def test_the_prompt_of_a_tool_without_a_use_can_reach_the_long_context_price():
    body = ic.parse_json_object(json.dumps({"model": "gpt-5.4", "input": "x", "max_tool_calls": 0,
                                            "tools": [{"type": "web_search"}]}).encode())
    dear = price({**GPT, "max_input_tokens": 1_000_000,
                  "input_cost_per_token_above_272k_tokens": 4e-6}, "gpt-5.4")
    bound = ic.bound_of_request("responses", body, dear, input_tokens=272_000)

    assert dear.rates(None, 272_001)["input"] == bound.levels[0].rates[0]


def random_bound(rng):
    tools = rng.sample([{**SEARCH, "max_uses": rng.randrange(1, 12)}, SEARCH, FETCH, TOOL_SEARCH,
                        FUNCTION], rng.randrange(1, 4))
    more = {} if rng.random() < .5 else {"tool_choice": {"type": "any"}}
    return bound_of(tools, max_tokens=rng.choice([10, 900, 8_000, 64_000]),
                    messages=[{"role": "user", "content": "word " * rng.randrange(20_000)}], **more)


@each_seed(150)
def test_the_largest_affordable_output_fits_and_a_token_more_does_not(seed):
    rng = Random(seed)
    bound = random_bound(rng)
    uses, amount = min(rng.randrange(0, 6), bound.asked_caps.hosted_uses), rng.randrange(1, 6_000_000)
    cap = bound.affordable_output_tokens(amount, uses)

    assert bound.microdollars(0, uses) > amount if cap < 0 else \
        bound.microdollars(cap, uses) <= amount < bound.microdollars(cap + 1, uses)


@each_seed(150)
def test_uses_fall_first_to_one_then_the_output_then_the_uses_to_none(seed):
    rng = Random(1000 + seed)
    bound = random_bound(rng)
    asked, free = bound.asked_caps, rng.randrange(1, 8_000_000)
    caps = bound.fitting_caps(free, at_last=True)
    if caps is None:
        assert bound.microdollars(bound.worthwhile_output_tokens, bound.least_uses) > free
        return

    assert bound.microdollars(*caps) <= free
    assert caps.output_tokens <= asked.output_tokens and caps.hosted_uses <= asked.hosted_uses
    assert caps.hosted_uses >= bound.least_uses
    if caps.hosted_uses > 1:                       # the output is whole while uses fall
        assert caps.output_tokens == asked.output_tokens
    if 1 <= caps.hosted_uses < asked.hosted_uses:
        assert bound.microdollars(asked.output_tokens, caps.hosted_uses + 1) > free // 2
    if caps.hosted_uses == 0 < asked.hosted_uses:  # one use leaves no answer worth sending for
        assert bound.microdollars(bound.worthwhile_output_tokens, 1) > free


@each_seed(60)
def test_what_is_admitted_for_fewer_scopes_never_costs_more_than_any_of_them_has(seed):
    """A request in two scopes gets the lesser of both in each cap."""
    rng = Random(seed)
    bound = random_bound(rng)
    amounts = [rng.randrange(1, 6_000_000) for _ in range(2)]
    fitting = [bound.fitting_caps(amount, at_last=True) for amount in amounts]
    if None not in fitting:
        caps = ic.Caps(*map(min, *fitting))

        assert all(bound.microdollars(*caps) <= amount for amount in amounts)


def test_a_request_about_nothing_but_a_search_waits_rather_than_lose_it():
    alone, beside = bound_of([SEARCH]), bound_of([SEARCH, FUNCTION])
    little = alone.microdollars(1000, 1) - 1

    assert (None, 0) == (alone.fitting_caps(little, at_last=False),
                         beside.fitting_caps(little, at_last=False).hosted_uses)
    assert 0 == alone.fitting_caps(little, at_last=True).hosted_uses


@pytest.mark.parametrize("uses", [1, 3])
def test_what_the_client_asked_for_is_not_lowered_where_that_is_not_wanted(uses):
    asked = bound_of([{**SEARCH, "max_uses": uses}])._replace(may_be_lowered=False)
    needed = asked.microdollars(*asked.asked_caps)

    assert asked.asked_caps == asked.fitting_caps(needed, at_last=True)
    assert asked.fitting_caps(needed - 1, at_last=True) is None


def test_a_request_without_hosted_tools_is_bounded_alike_once_it_is_admitted():
    bound = bound_of([FUNCTION])

    assert bound == bound.admitted(ic.Caps(9))


@pytest.mark.parametrize("choice, least", [
    (None, 0), ({"type": "auto"}, 0), ({"type": "none"}, 0), ({"type": "any"}, 1),
    ({"type": "tool", "name": "f"}, 0), ({"type": "tool", "name": "web_search"}, 1)])
def test_a_search_that_is_forced_is_not_taken_away(choice, least):
    assert least == bound_of([SEARCH, FUNCTION], tool_choice=choice).least_uses


@pytest.mark.parametrize("choice, least", [
    ("auto", 0), ("none", 0), ("required", 1), ({"type": "function", "name": "f"}, 0),
    ({"type": "web_search"}, 1), ({"type": "allowed_tools", "mode": "required"}, 1)])
def test_likewise_at_openai(choice, least):
    assert least == bound_of([{"type": "web_search"}], key="gpt-5.5",
                             tool_choice=choice).least_uses


@pytest.mark.parametrize("count", [-1, True, "5", 1.5])
def test_a_number_of_uses_that_is_none_is_refused(count):
    with pytest.raises(ic.BadRequest, match="max_uses must be a whole number"):
        bound_of([{**SEARCH, "max_uses": count}])
    with pytest.raises(ic.BadRequest, match="max_tool_calls must be a whole number"):
        bound_of([{"type": "web_search"}], key="gpt-5.5", max_tool_calls=count)


class Change(NamedTuple):
    """What goes upstream: the fields that are set and left out, and what is reported of it."""
    api: str
    fields: dict
    uses: int
    changed: dict = {}
    without: set = frozenset()
    reported: dict = {}


CHANGES = [
    Change("responses", {"tools": [{"type": "web_search"}]}, uses=5, changed={"max_tool_calls": 5},
        reported={"max_tool_calls": 5}),
    Change("responses", {"max_tool_calls": 3}, uses=3),
    Change("responses", {"max_tool_calls": 3}, uses=0, changed={"max_tool_calls": 0},
        reported={"max_tool_calls": 0}),
    Change("messages", {"tools": [FUNCTION, SEARCH]}, uses=5,
        changed={"tools": [FUNCTION, {**SEARCH, "max_uses": 5}]},
        reported={"tools.web_search.max_uses": 5}),
    Change("messages", {"tools": [{**SEARCH, "max_uses": 2}]}, uses=5),
    Change("messages", {"tools": [{**SEARCH, "max_uses": 8}]}, uses=1,
        changed={"tools": [{**SEARCH, "max_uses": 1}]}, reported={"tools.web_search.max_uses": 1}),
    Change("messages", {"tools": [{**FETCH, "max_uses": 1}]}, uses=1,
        changed={"tools": [{**FETCH, "max_uses": 1, "max_content_tokens": 25_000}]},
        reported={"tools.web_fetch.max_content_tokens": 25_000}),
    Change("messages", {"tools": [FUNCTION, SEARCH]}, uses=0, changed={"tools": [FUNCTION]},
        reported={"tools.web_search": "removed"}),
    Change("messages", {"tools": [SEARCH, FETCH]}, uses=0, without={"tools", "tool_choice"},
        reported={"tools.web_search": "removed", "tools.web_fetch": "removed"}),
    Change("messages", {"tools": [{**SEARCH, "max_uses": 0}]}, uses=0),
    Change("messages", {"tools": [TOOL_SEARCH, FUNCTION]}, uses=0),
]


@pytest.mark.parametrize("api, fields, uses, changed, without, reported", CHANGES)
def test_the_number_of_uses_travels_upstream(api, fields, uses, changed, without, reported):
    changes = ic.Changes(api, fields)
    changes.cap_uses(uses)

    assert (changed, without, reported) == (changes.set, changes.left_out, changes.reported)


@pytest.mark.parametrize("api", ["messages", "chat"])
def test_content_of_another_api_breaks_nothing(api):
    """Only Responses has compaction triggers."""
    changes = ic.Changes(api, {"messages": []})
    changes.cap_uses(0)

    assert ({}, set(), {}) == (changes.set, changes.left_out, changes.reported)


def test_more_uses_than_any_answer_has_are_lowered_to_the_most():
    bound = bound_of([{**SEARCH, "max_uses": 100}])

    assert (32, False) == (bound.asked_caps.hosted_uses, bound.uses_are_asked)
    assert bound_of([{**SEARCH, "max_uses": 32}]).uses_are_asked


def test_no_sampling_reads_more_than_the_window_that_was_asked_for():
    fields = {"model": "claude-opus-5-5", "max_tokens": 9, "messages": [], "tools": [SEARCH]}
    body = ic.parse_json_object(json.dumps(fields).encode())

    for window, most in ((0, 200_000), (1_000_000, 1_000_000)):
        none, *_, five = ic.bound_of_request("messages", body, price(CLAUDE, "claude-opus-5-5"),
                                             window=window).levels

        assert (none.input_lines[1][0] + 6 * most, 0) == five.input_lines[1]


def test_the_sum_of_several_samplings_is_bounded_at_the_price_of_a_long_context():
    long = {**CLAUDE, "input_cost_per_token_above_200k_tokens": 10e-6,
            "output_cost_per_token_above_200k_tokens": 50e-6}
    bound = bound_of([SEARCH], row=long)

    assert [(5 * 10 ** 6, 25 * 10 ** 6), (10 ** 7, 5 * 10 ** 7)] == [
        bound.levels[0].rates, bound.levels[1].rates]


@pytest.mark.parametrize("provider, fields, cap, changed, without", [
    ("deepseek", {"max_completion_tokens": 5}, None, {"max_tokens": 5}, {"max_completion_tokens"}),
    ("deepseek", {"max_completion_tokens": 5, "max_tokens": None}, 3, {"max_tokens": 3},
     {"max_completion_tokens"}),
    ("openai", {"max_tokens": 9, "max_completion_tokens": 5}, 7, {"max_tokens": 7}, set()),
    ("openai", {}, None, {}, set())])
def test_a_cap_stands_where_the_provider_heeds_it(provider, fields, cap, changed, without):
    changes = ic.Changes("chat", fields)
    changes.cap_output(ic.manners_of(provider), cap)

    assert (changed, without) == (changes.set, changes.left_out)
