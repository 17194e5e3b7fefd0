"""Money: amounts are exact whole microdollars, a finished call costs what the price list says
to the microdollar (against figures made elsewhere, and against a computation of this file's own),
and a name or a row that is not surely priced has no price at all."""
from __future__ import annotations

import ast
import json
import os
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
from price_oracle import random_call
from support import SHARED, each, each_seed

import ironcage_proxy as ic

PROGRAM = Path(ic.__file__).resolve()
PRICING = PROGRAM.with_name("pricing.json")
BOOK = ic.PriceBook.load(str(PRICING))
# The same file, read without the product: numbers as exact fractions.
ROWS = json.loads(PRICING.read_text(encoding="utf-8"), parse_float=Fraction)
ORACLE = Path(__file__).with_name("oracle.jsonl")


def book_of(**rows: object) -> ic.PriceBook:
    """A price book of rows whose numbers are read as from a file."""
    return ic.PriceBook(json.loads(json.dumps(rows), parse_float=Decimal))


def cost_in(rows: dict, usage: dict, api: str = "chat", **options: object) -> int:
    return book_of(m=rows).cost("m", usage, api=api, **options)


def ceil_microdollars(usd: Fraction) -> int:
    return -(-(usd * 10 ** 6).numerator // (usd * 10 ** 6).denominator)


# Amounts.

@pytest.mark.parametrize("value, microdollars", [
    ("0", 0), ("0.000001", 1), ("0.0000009", 0), ("0.0000019", 1), ("5", 5_000_000),
    ("5.0", 5_000_000), ("5.", 5_000_000), (".5", 500_000), (" 1.25\n", 1_250_000),
    ("+2", 2_000_000), ("1e-6", 1), ("1E2", 100_000_000), ("007", 7_000_000),
    ("0.1", 100_000), ("0.29", 290_000), ("1.15", 1_150_000), ("4.35", 4_350_000),
    ("9007199254.740993", 9_007_199_254_740_993), ("1000000000000", 10 ** 18),
    ("1e-400", 0), (3, 3_000_000), (0, 0), (0.1, 100_000), (4.35, 4_350_000),
    (1e-06, 1), (Decimal("0.30"), 300_000), (Decimal("0.0000015"), 1),
])
def test_amounts_in_usd_are_read_exactly_and_rounded_down(value, microdollars):
    assert microdollars == ic.parse_usd(value)


@pytest.mark.parametrize("value", [
    "", " ", "nan", "NaN", "sNaN", "inf", "-inf", "Infinity", "-1", "-0.000001", "1e40", "1e13",
    "$5", "5 USD", "5,00", "1 000", "five", "0x10", "1/2", "--5", True, False, None, [], {},
    b"5", float("nan"), float("inf"), float("-inf"), -0.5, -1, 10 ** 40, Decimal("NaN"),
    Decimal("Infinity"), Decimal("-1"), "9" * 5_000,
])
def test_what_is_no_amount_in_usd_is_refused(value):
    with pytest.raises(ValueError, match="is not an amount in USD"):
        ic.parse_usd(value)


@pytest.mark.parametrize("value, shown", [
    ("-1", "'-1'"), ("$5", "'$5'"), ("5,00", "'5,00'"), ("5 USD", "'5 USD'"), ("1e40", "'1e40'"),
    ("sk-canary-0123456789", "this"), ("5 sk-canary-0123456789", "this"), ("s3cret", "this"),
    ({"key": "s3cret"}, "this")])
def test_what_is_refused_as_an_amount_is_shown_only_where_it_looks_like_one(value, shown):
    with pytest.raises(ValueError) as refused:
        ic.parse_usd(value)

    assert f"{shown} is not an amount in USD from 0 up" == str(refused.value)


@pytest.mark.parametrize("microdollars, shown", [
    (0, "$0.00"), (1, "$0.000001"), (10, "$0.00001"), (301, "$0.000301"), (10_000, "$0.01"),
    (100_000, "$0.10"), (120_000, "$0.12"), (123_000, "$0.123"), (999_999, "$0.999999"),
    (1_000_000, "$1.00"), (1_250_000, "$1.25"), (10 ** 18, "$1000000000000.00"),
    (-1, "-$0.000001"), (-1_500_000, "-$1.50"),
])
def test_amounts_are_shown_exactly_with_two_to_six_decimals(microdollars, shown):
    assert shown == ic.format_usd(microdollars)


@each_seed(50)
def test_an_amount_that_is_shown_reads_back_as_itself(seed):
    rng = Random(seed)
    amounts = [rng.randrange(10 ** rng.randrange(1, 18)) for _ in range(100)]

    assert amounts == [ic.parse_usd(ic.format_usd(amount)[1:]) for amount in amounts]
    assert amounts == [ic.parse_usd(Decimal(amount).scaleb(-6)) for amount in amounts]


@each_seed(50)
def test_reading_never_rounds_up_and_never_loses_a_whole_microdollar(seed):
    rng = Random(seed)
    for _ in range(100):
        text = f"{rng.randrange(10 ** 6)}.{rng.randrange(10 ** 12):012d}"

        assert Fraction(text) * 10 ** 6 // 1 == ic.parse_usd(text)


@pytest.mark.parametrize("picodollars, microdollars", [
    (0, 0), (1, 1), (999_999, 1), (10 ** 6, 1), (10 ** 6 + 1, 2), (Fraction(1, 3), 1),
    (Fraction(2 * 10 ** 6), 2), (Fraction(2 * 10 ** 6) + Fraction(1, 10 ** 9), 3),
    (10 ** 30 + 1, 10 ** 24 + 1),
])
def test_money_is_rounded_up_to_whole_microdollars(picodollars, microdollars):
    rounded = ic.microdollars_ceil(picodollars)

    assert (microdollars, int) == (rounded, type(rounded))


# Against figures that were made elsewhere (two programs agree on each: COST_RULES.md).

def oracle_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cost_of_oracle_row(row: dict) -> int:
    return BOOK.cost(row["model"], row["usage"], api=row["api"], provider=row["provider"],
                     service_tier=row.get("service_tier"),
                     data_residency=row.get("data_residency"))


@each("row", oracle_rows(ORACLE))
def test_a_call_costs_what_the_oracle_says(row):
    assert ceil_microdollars(Fraction(row["expected_usd"])) == cost_of_oracle_row(row)


def test_every_call_of_the_whole_oracle_costs_what_it_says():
    path = SHARED / "pricing" / "oracle_shared.jsonl"
    if not path.is_file():
        pytest.skip("the whole oracle is not beside this checkout")
    rows = list(oracle_rows(path))

    wrong = [row for row in rows
             if ceil_microdollars(Fraction(row["expected_usd"])) != cost_of_oracle_row(row)]

    assert [] == wrong
    assert len(rows) > 1_000


# The rules, one by one, on rows with prices that tell the buckets apart.

OPENAI = {
    "litellm_provider": "openai", "mode": "chat",
    "input_cost_per_token": 0.00001, "cache_read_input_token_cost": 0.000001,
    "cache_creation_input_token_cost": 0.0000125,
    "cache_creation_input_token_cost_above_12hr": 0.000025,
    "input_cost_per_audio_token": 0.0001, "output_cost_per_audio_token": 0.0002,
    "output_cost_per_token": 0.00004,
}
CLAUDE = {
    "litellm_provider": "anthropic", "mode": "chat",
    "input_cost_per_token": 0.00001, "cache_read_input_token_cost": 0.000001,
    "cache_creation_input_token_cost": 0.0000125,
    "cache_creation_input_token_cost_above_1hr": 0.00002,
    "output_cost_per_token": 0.00005,
    "provider_specific_entry": {"us": 1.1, "fast": 6.0},
}
PLAIN = {"litellm_provider": "openai", "mode": "chat",
         "input_cost_per_token": 0.00001, "output_cost_per_token": 0.00004}


@pytest.mark.parametrize("usage, microdollars", [
    ({"prompt_tokens": 100, "completion_tokens": 0}, 1_000),
    ({"prompt_tokens": 0, "completion_tokens": 0}, 0),
    ({"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 999}, 36_960),
    ({"prompt_tokens": 100, "completion_tokens": 0,
      "prompt_tokens_details": {"cached_tokens": 60}}, 460),
    ({"prompt_tokens": 100, "completion_tokens": 0,
      "prompt_tokens_details": {"cached_tokens": 100}}, 100),
    ({"prompt_tokens": 100, "completion_tokens": 0, "prompt_tokens_details": {
        "cached_tokens": 60, "cache_write_tokens": 40}}, 560),
    ({"prompt_tokens": 100, "completion_tokens": 0, "prompt_tokens_details": {
        "cache_write_tokens": 40,
        "cache_write_tokens_details": {"ttl_30m_tokens": 30, "ttl_12h_tokens": 10}}}, 1_225),
    ({"prompt_tokens": 100, "completion_tokens": 0,
      "prompt_tokens_details": {"audio_tokens": 10}}, 1_900),
    ({"prompt_tokens": 0, "completion_tokens": 100,
      "completion_tokens_details": {"audio_tokens": 10}}, 5_600),
    ({"prompt_tokens": 0, "completion_tokens": 100, "completion_tokens_details": {
        "reasoning_tokens": 90, "accepted_prediction_tokens": 3,
        "rejected_prediction_tokens": 7}}, 4_000),
    ({"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": None,
      "completion_tokens_details": None}, 1_040),
    ({"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": {
        "cached_tokens": None, "audio_tokens": None}, "completion_tokens_details": {}}, 1_040),
])
def test_cached_written_and_audio_tokens_of_openai_are_inside_the_prompt(usage, microdollars):
    assert microdollars == cost_in(OPENAI, usage)


def test_nonsense_that_takes_more_out_of_a_prompt_than_is_in_it_costs_no_less():
    usage = {"prompt_tokens": 10, "completion_tokens": 0,
             "prompt_tokens_details": {"cached_tokens": 60}}

    assert 60 == cost_in(OPENAI, usage)


def test_the_responses_api_counts_alike_under_other_names():
    usage = {"input_tokens": 100, "output_tokens": 10,
             "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 20,
                                      "cache_write_tokens_details": {"ttl_12h_tokens": 5}},
             "output_tokens_details": {"reasoning_tokens": 8}}

    # plain, read, written for 30 minutes (187.5), for 12 hours, output; rounded up
    assert 200 + 60 + 188 + 125 + 400 == cost_in(OPENAI, usage, "responses")


@pytest.mark.parametrize("usage, microdollars", [
    ({"input_tokens": 100, "output_tokens": 10}, 1_500),
    ({"input_tokens": 100, "output_tokens": 0, "cache_read_input_tokens": 60}, 1_060),
    ({"input_tokens": 0, "output_tokens": 0, "cache_read_input_tokens": 60}, 60),
    ({"input_tokens": 100, "output_tokens": 0, "cache_creation_input_tokens": 80}, 2_000),
    ({"input_tokens": 100, "output_tokens": 0, "cache_creation_input_tokens": 80,
      "cache_creation": None}, 2_000),
    ({"input_tokens": 0, "output_tokens": 0, "cache_creation_input_tokens": 80, "cache_creation": {
        "ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 80}}, 1_600),
    ({"input_tokens": 0, "output_tokens": 0, "cache_creation_input_tokens": 80, "cache_creation": {
        "ephemeral_5m_input_tokens": 40, "ephemeral_1h_input_tokens": 40}}, 1_300),
    ({"input_tokens": 0, "output_tokens": 0, "cache_creation_input_tokens": 80,
      "cache_creation": {"ephemeral_1h_input_tokens": 40}}, 1_300),
    ({"input_tokens": 0, "output_tokens": 0, "cache_creation_input_tokens": 80,
      "cache_creation": {"ephemeral_1h_input_tokens": 40, "ephemeral_5m_input_tokens": 8}}, 1_300),
    ({"input_tokens": 0, "output_tokens": 100, "output_tokens_details": {"thinking_tokens": 90}},
     5_000),
    ({"input_tokens": 1, "output_tokens": 0, "cache_creation_input_tokens": None,
      "cache_read_input_tokens": None, "server_tool_use": None}, 10),
])
def test_cached_and_written_tokens_of_anthropic_are_outside_the_input(usage, microdollars):
    assert microdollars == cost_in(CLAUDE, usage, "messages")


LONG_CLAUDE = {**CLAUDE, "input_cost_per_token_above_100k_tokens": 0.00005,
               "output_cost_per_token_above_100k_tokens": 0.00025}


def test_iterations_are_billed_instead_of_the_top_level():
    usage = {"input_tokens": 10, "output_tokens": 1, "iterations": [
        {"type": "compaction", "input_tokens": 1_000, "output_tokens": 100},
        {"type": "message", "input_tokens": 10, "output_tokens": 1}]}

    assert 10_000 + 5_000 + 100 + 50 == cost_in(CLAUDE, usage, "messages")


def test_an_iteration_of_another_model_has_that_models_price():
    book = book_of(main=CLAUDE, advisor={**CLAUDE, "input_cost_per_token": 0.001})
    usage = {"input_tokens": 10, "output_tokens": 0, "iterations": [
        {"type": "message", "input_tokens": 10, "output_tokens": 0},
        {"type": "advisor_message", "model": "advisor", "input_tokens": 7, "output_tokens": 2}]}

    assert 100 + 7_000 + 100 == book.cost("main", usage, api="messages")


def test_an_iteration_of_an_unpriced_model_has_no_price():
    usage = {"input_tokens": 10, "output_tokens": 0, "iterations": [
        {"model": "unheard-of", "input_tokens": 10, "output_tokens": 0}]}

    with pytest.raises(ic.UnpricedModel, match="unheard-of"):
        cost_in(CLAUDE, usage, "messages")


@pytest.mark.parametrize("first, second, microdollars", [
    (80_000, 80_000, 1_600_000), (100_000, 100_000, 2_000_000), (100_001, 1, 5_000_060),
])
def test_each_iteration_meets_the_long_context_threshold_by_itself(first, second, microdollars):
    usage = {"input_tokens": first + second, "output_tokens": 0, "iterations": [
        {"input_tokens": first, "output_tokens": 0}, {"input_tokens": second, "output_tokens": 0}]}

    assert microdollars == cost_in(LONG_CLAUDE, usage, "messages")


def test_iterations_that_come_to_less_than_the_top_level_are_not_all_of_the_bill():
    for part in ({"input_tokens": 1, "output_tokens": 1}, {"input_tokens": 9_000, "output_tokens": 0}):
        usage = {"input_tokens": 1_000, "output_tokens": 10, "iterations": [part]}

        assert 10_000 + 500 == cost_in(CLAUDE, usage, "messages")


def test_an_empty_list_of_iterations_bills_the_top_level():
    assert 100 == cost_in(CLAUDE, {"input_tokens": 10, "output_tokens": 0, "iterations": []},
                          "messages")


def test_the_threshold_counts_cached_and_written_tokens_and_prices_all_of_the_call():
    below = {"input_tokens": 0, "output_tokens": 10, "cache_read_input_tokens": 60_000,
             "cache_creation_input_tokens": 40_000}
    above = {**below, "input_tokens": 1}

    assert 60_000 + 500_000 + 500 == cost_in(LONG_CLAUDE, below, "messages")
    assert 50 + 60_000 + 500_000 + 2_500 == cost_in(LONG_CLAUDE, above, "messages")


def test_output_never_crosses_the_threshold():
    usage = {"input_tokens": 1, "output_tokens": 500_000}

    assert 10 + 25_000_000 == cost_in(LONG_CLAUDE, usage, "messages")


@pytest.mark.parametrize("provider, prompt_tokens, is_long", [
    ("openai", 199_999, False), ("openai", 200_000, False), ("openai", 200_001, True),
    ("gemini", 200_000, False), ("xai", 199_999, False), ("xai", 200_000, True),
    ("xai", 200_001, True),
])
def test_thresholds_are_passed_but_xais_are_reached(provider, prompt_tokens, is_long):
    row = {**PLAIN, "litellm_provider": provider, "input_cost_per_token_above_200k_tokens": 0.00002}

    cost = cost_in(row, {"prompt_tokens": prompt_tokens, "completion_tokens": 0})

    assert prompt_tokens * (20 if is_long else 10) == cost


def test_the_highest_threshold_that_is_passed_decides():
    row = {**PLAIN, "input_cost_per_token_above_128k_tokens": 0.00002,
           "input_cost_per_token_above_1000k_tokens": 0.00003}

    costs = [cost_in(row, {"prompt_tokens": n}, "embeddings")
             for n in (128_000, 128_001, 1_000_000, 1_000_001)]

    assert [1_280_000, 2_560_020, 20_000_000, 30_000_030] == costs


TIERED = {**PLAIN, "input_cost_per_token_flex": 0.000005, "output_cost_per_token_flex": 0.00002,
          "input_cost_per_token_priority": 0.00002, "output_cost_per_token_priority": 0.00008,
          "input_cost_per_token_ultrafast": 0.00005,
          "input_cost_per_token_above_272k_tokens": 0.0001,
          "input_cost_per_token_above_272k_tokens_flex": 0.00007}


@pytest.mark.parametrize("tier, microdollars", [
    (None, 5_000), ("default", 5_000), ("standard", 5_000), ("auto", 5_000), ("scale", 5_000),
    ("on_demand", 5_000), ("", 5_000), ("flex", 2_500), ("priority", 10_000), ("fast", 10_000),
    # a tier that the row has no price for: the highest of each bucket
    ("ultrafast", 13_000), ("balanced", 13_000), ("unheard-of", 13_000),
])
def test_the_tier_that_served_sets_the_price(tier, microdollars):
    usage = {"prompt_tokens": 100, "completion_tokens": 100}

    assert microdollars == cost_in(TIERED, usage, service_tier=tier)


@pytest.mark.parametrize("tier, picodollars", [
    (None, 100), ("flex", 70), ("priority", 100), ("ultrafast", 100),
])
def test_a_long_prompt_of_a_tier_without_long_prices_has_the_highest(tier, picodollars):
    usage = {"prompt_tokens": 300_000, "completion_tokens": 0}

    assert 300_000 * picodollars == cost_in(TIERED, usage, service_tier=tier)


def test_the_usages_own_tier_wins_over_the_answers_in_messages():
    usage = {"input_tokens": 100, "output_tokens": 0, "service_tier": "batch"}

    assert 500 == cost_in(CLAUDE, usage, "messages", service_tier="standard")


BATCHED = {**OPENAI, "input_cost_per_token_batches": 0.000004,
           "output_cost_per_token_batches": 0.000016}


@pytest.mark.parametrize("details, microdollars", [
    (None, 400), ({"cached_tokens": 100}, 400), ({"cache_write_tokens": 100}, 400),
])
def test_a_batch_price_covers_cached_input_that_has_none_of_its_own(details, microdollars):
    usage = {"prompt_tokens": 100, "completion_tokens": 0, "prompt_tokens_details": details}

    assert microdollars == cost_in(BATCHED, usage, service_tier="batch")


def test_a_row_without_any_batch_price_costs_half():
    usage = {"prompt_tokens": 101, "completion_tokens": 10,
             "prompt_tokens_details": {"cached_tokens": 1}}

    assert 500 + 1 + 200 == cost_in(OPENAI, usage, service_tier="batch")


def test_a_flat_batch_price_covers_long_prompts_that_have_none_of_their_own():
    row = {**BATCHED, "input_cost_per_token_above_200k_tokens": 0.00002,
           "output_cost_per_token_above_200k_tokens_batches": 0.00003}

    usage = {"prompt_tokens": 200_001, "completion_tokens": 10}

    assert 200_001 * 4 + 300 == cost_in(row, usage, service_tier="batch")


def test_all_of_a_batch_at_anthropic_is_half_also_writes_for_an_hour():
    row = {**CLAUDE, "input_cost_per_token_batches": 0.000005,
           "output_cost_per_token_batches": 0.000025,
           "cache_creation_input_token_cost_batches": 0.00000625}
    usage = {"input_tokens": 100, "output_tokens": 10, "cache_read_input_tokens": 100,
             "cache_creation_input_tokens": 200, "service_tier": "batch",
             "cache_creation": {"ephemeral_1h_input_tokens": 100}}

    assert 500 + 250 + 50 + 625 + 1_000 == cost_in(row, usage, "messages")


@pytest.mark.parametrize("geo, speed, microdollars", [
    (None, None, 1_000), ("global", "standard", 1_000), ("not_available", None, 1_000),
    ("us", None, 1_100), (None, "fast", 6_000), ("us", "fast", 6_600),
])
def test_place_and_speed_multiply_all_tokens(geo, speed, microdollars):
    usage = {"input_tokens": 50, "output_tokens": 10, "inference_geo": geo, "speed": speed}

    assert microdollars == cost_in(CLAUDE, usage, "messages")


def test_place_and_speed_do_not_multiply_search_fees():
    usage = {"input_tokens": 100, "output_tokens": 0, "inference_geo": "us", "speed": "fast",
             "server_tool_use": {"web_search_requests": 3, "web_fetch_requests": 9}}

    assert 6_600 + 30_000 == cost_in(CLAUDE, usage, "messages")


@pytest.mark.parametrize("residency, microdollars", [
    (None, 1_000), ("us", 1_100), ("eu", 1_200), ("jp", 1_200)])
def test_regional_hosts_of_openai_cost_more(residency, microdollars):
    row = {**PLAIN, "regional_processing_uplift_multiplier_us": 1.1,
           "regional_processing_uplift_multiplier_eu": 1.2}

    cost = cost_in(row, {"prompt_tokens": 100, "completion_tokens": 0}, data_residency=residency)

    assert microdollars == cost


@pytest.mark.parametrize("calls, microdollars", [
    ({}, 0), ({"message": 9, "function_call": 9}, 0), ({"web_search_call": 2}, 20_000),
    ({"file_search_call": 3}, 7_500), ({"code_interpreter_call": 1}, 30_000),
    ({"code_interpreter_call": 5}, 30_000),
    ({"web_search_call": 1, "file_search_call": 1, "code_interpreter_call": 1}, 42_500),
])
def test_hosted_tools_of_openai_have_fees(calls, microdollars):
    usage = {"input_tokens": 0, "output_tokens": 0}

    assert microdollars == cost_in(PLAIN, usage, "responses", tool_calls=calls)


def test_a_row_can_say_what_its_searches_cost():
    row = {**PLAIN, "search_context_cost_per_query": {"search_context_size_medium": 0.025}}

    assert 25_000 == cost_in(row, {"input_tokens": 0, "output_tokens": 0}, "responses",
                             tool_calls={"web_search_call": 1})


@pytest.mark.parametrize("api, usage", [
    ("chat", {"prompt_tokens": 10, "completion_tokens": 0,
              "prompt_tokens_details": {"cached_tokens": 10}}),
    ("chat", {"prompt_tokens": 10, "completion_tokens": 0,
              "prompt_tokens_details": {"cache_write_tokens": 10}}),
    ("chat", {"prompt_tokens": 10, "completion_tokens": 0,
              "prompt_tokens_details": {"audio_tokens": 10}}),
    ("messages", {"input_tokens": 0, "output_tokens": 0, "cache_read_input_tokens": 10}),
    ("messages", {"input_tokens": 0, "output_tokens": 0, "cache_creation_input_tokens": 10,
                  "cache_creation": {"ephemeral_1h_input_tokens": 10}}),
])
def test_input_without_a_price_of_its_own_costs_what_input_does(api, usage):
    assert 100 == cost_in(PLAIN, usage, api)


def test_a_write_for_an_hour_without_a_price_of_its_own_costs_what_a_write_does():
    row = {**PLAIN, "cache_creation_input_token_cost": 0.0000125}
    usage = {"input_tokens": 0, "output_tokens": 0, "cache_creation_input_tokens": 10,
             "cache_creation": {"ephemeral_1h_input_tokens": 10}}

    assert 125 == cost_in(row, usage, "messages")


def test_reasoning_has_its_own_price_where_the_row_has_one():
    row = {**PLAIN, "output_cost_per_reasoning_token": 0.0001}
    usage = {"prompt_tokens": 0, "completion_tokens": 10,
             "completion_tokens_details": {"reasoning_tokens": 4}}

    assert 6 * 40 + 4 * 100 == cost_in(row, usage)


def test_an_explicit_zero_is_a_price():
    row = {**PLAIN, "cache_read_input_token_cost": 0}
    usage = {"prompt_tokens": 10, "completion_tokens": 0,
             "prompt_tokens_details": {"cached_tokens": 10}}
    free = {"mode": "chat", "input_cost_per_token": 0, "output_cost_per_token": 0.0}

    assert 0 == cost_in(row, usage)
    assert 0 == cost_in(free, {"prompt_tokens": 10 ** 9, "completion_tokens": 10 ** 9})
    assert not any(book_of(m=free).price("m").amounts.values())
    assert any(book_of(m=row).price("m").amounts.values())


def test_a_call_of_less_than_a_microdollar_costs_one():
    row = {"mode": "chat", "input_cost_per_token": 1e-12, "output_cost_per_token": 0}

    assert 1 == cost_in(row, {"prompt_tokens": 1, "completion_tokens": 0})


def test_prices_finer_than_a_picodollar_stay_exact():
    row = {"mode": "chat", "input_cost_per_token": 1.25e-13, "output_cost_per_token": 0}

    assert [1, 2] == [cost_in(row, {"prompt_tokens": tokens, "completion_tokens": 0})
                      for tokens in (8_000_000, 8_000_001)]


# Usage that is not to be trusted.

BAD_COUNTS = (-1, True, False, 1.0, 1.5, "1", "", [], {}, float("nan"))


@each("bad", BAD_COUNTS)
@pytest.mark.parametrize("api, place", [
    ("chat", "prompt_tokens"), ("chat", "completion_tokens"),
    ("chat", "prompt_tokens_details.cached_tokens"),
    ("chat", "prompt_tokens_details.audio_tokens"),
    ("chat", "prompt_tokens_details.cache_write_tokens"),
    ("chat", "prompt_tokens_details.cache_write_tokens_details.ttl_12h_tokens"),
    ("chat", "completion_tokens_details.reasoning_tokens"),
    ("chat", "completion_tokens_details.audio_tokens"),
    ("embeddings", "prompt_tokens"), ("completions", "completion_tokens"),
    ("responses", "input_tokens"), ("responses", "output_tokens"),
    ("responses", "input_tokens_details.cached_tokens"),
    ("responses", "output_tokens_details.reasoning_tokens"),
    ("messages", "input_tokens"), ("messages", "output_tokens"),
    ("messages", "cache_read_input_tokens"), ("messages", "cache_creation_input_tokens"),
    ("messages", "cache_creation.ephemeral_1h_input_tokens"),
    ("messages", "cache_creation.ephemeral_5m_input_tokens"),
    ("messages", "output_tokens_details.thinking_tokens"),
    ("messages", "server_tool_use.web_search_requests"),
])
def test_a_count_that_is_no_count_is_malformed_usage(api, place, bad):
    usage: dict = {"prompt_tokens": 9, "completion_tokens": 9} if api in (
        "chat", "completions", "embeddings") else {"input_tokens": 9, "output_tokens": 9}
    *parents, name = place.split(".")
    holder = usage
    for parent in parents:
        holder = holder.setdefault(parent, {})
    holder[name] = bad

    with pytest.raises(ic.MalformedUsage):
        cost_in(CLAUDE, usage, api)


@pytest.mark.parametrize("api, usage", [
    ("chat", {}), ("chat", {"completion_tokens": 5}),
    ("chat", {"prompt_tokens": None, "completion_tokens": 5}),
    ("chat", {"input_tokens": 5, "output_tokens": 5}),
    ("completions", {"completion_tokens": 5}), ("embeddings", {"total_tokens": 5}),
    ("responses", {"output_tokens": 5}), ("responses", {"prompt_tokens": 5}),
    ("messages", {}), ("messages", {"input_tokens": 5}),
    ("messages", {"input_tokens": 5, "output_tokens": None}),
    ("messages", {"prompt_tokens": 5, "completion_tokens": 5}),
    ("messages", {"input_tokens": 5, "output_tokens": 5, "iterations": [{"input_tokens": 5}]}),
    ("messages", {"input_tokens": 5, "output_tokens": 5, "iterations": [None]}),
    ("messages", {"input_tokens": 5, "output_tokens": 5, "iterations": ["x"]}),
])
def test_usage_without_its_main_count_is_malformed(api, usage):
    with pytest.raises(ic.MalformedUsage):
        cost_in(CLAUDE, usage, api)


def test_an_embedding_has_no_completion_tokens():
    assert 50 == cost_in({"mode": "embedding", "input_cost_per_token": 0.00001},
                         {"prompt_tokens": 5, "total_tokens": 5}, "embeddings")


# Rows that are no price.

BAD_PRICES = {
    "negative": "-0.000001", "negative int": "-1", "NaN": "NaN", "Infinity": "Infinity",
    "-Infinity": "-Infinity", "a string": '"0.000001"', "an empty string": '""', "true": "true",
    "false": "false", "null": "null", "a list": "[]", "an object": "{}",
}


@each("bad", BAD_PRICES.values())
@pytest.mark.parametrize("name", [
    "input_cost_per_token", "output_cost_per_token", "cache_read_input_token_cost",
    "cache_creation_input_token_cost_above_1hr", "input_cost_per_token_above_200k_tokens",
    "output_cost_per_token_flex", "input_cost_per_token_batches", "output_cost_per_audio_token",
    "output_cost_per_reasoning_token", "regional_processing_uplift_multiplier_eu"])
def test_a_row_with_a_bad_price_anywhere_is_unpriced(tmp_path, name, bad):
    row = {**PLAIN, name: "BAD"}
    path = tmp_path / "pricing.json"
    path.write_text(json.dumps({"good": PLAIN, "m": row}).replace('"BAD"', bad), encoding="utf-8")
    book = ic.PriceBook.load(str(path))

    assert book.find("m") is None
    assert book.find("good") is not None
    assert ["good", "ironcage/echo"] == book.keys()


@pytest.mark.parametrize("bad", [-1, True, "2", None, Decimal("NaN"), float("nan")], ids=repr)
@pytest.mark.parametrize("name", ["us", "fast"])
def test_a_row_with_a_bad_multiplier_is_unpriced(name, bad):
    row = {INPUT: Decimal("1e-6"), OUTPUT: Decimal("1e-6"), "provider_specific_entry": {name: bad}}

    assert ic.PriceBook({"m": row}).find("m") is None


INPUT, OUTPUT = "input_cost_per_token", "output_cost_per_token"


@pytest.mark.parametrize("row", [
    None, [], "x", 5, {}, {"mode": "chat"}, {INPUT: 1}, {OUTPUT: 1}, {"mode": "chat", INPUT: 1},
    {"mode": "embedding", OUTPUT: 1}, {"mode": "embedding"}, {"input_cost_per_second": 1},
], ids=repr)
def test_a_row_without_token_prices_is_unpriced(row):
    assert ic.PriceBook({"m": row}).find("m") is None


@pytest.mark.parametrize("limits, expected", [
    ({}, (None, None)), ({"max_input_tokens": 5, "max_output_tokens": 6}, (5, 6)),
    ({"max_tokens": 7}, (None, 7)), ({"max_tokens": 7, "max_output_tokens": 6}, (None, 6)),
    ({"max_input_tokens": "5", "max_output_tokens": -6}, (None, None)),
    ({"max_input_tokens": True, "max_output_tokens": 0}, (None, None)),
    ({"max_output_tokens": 1e3}, (None, 1000)),
])
def test_limits_of_a_row_are_read_where_they_are_numbers(limits, expected):
    price = book_of(m={**PLAIN, **limits}).price("m")

    assert expected == (price.max_input_tokens, price.max_output_tokens)


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"', "{", ""])
def test_a_price_file_that_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "pricing.json"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ValueError):
        ic.PriceBook.load(str(path))


@pytest.mark.parametrize("name, value", [
    ("input_cost_per_second", 0.01), ("input_cost_per_character", 1e-6),
    ("output_cost_per_image", 0.04), ("citation_cost_per_token", 2e-6), ("cost_per_song", 1),
    ("input_cost_per_video_token", 1e-6), ("input_cost_per_token_turbo", 1e-6),
    ("input_cost_per_token_above_128kb_tokens", 1e-6), ("price_of_a_kind", 1), ("session_fee", 2),
    ("regional_endpoint_uplift_multiplier", 1.1), ("some_cost", {"a": 1}), ("some_cost", "1"),
    ("charge_per_request", 0.01), ("image_surcharge", 0.01), ("usd_per_call", 0.01),
    ("rate_per_minute", 0.01), ("session_rates", {"a": 1}),
    ("input_cost_per_token_cache_hit", 0.001), ("explicit_cache_read_input_token_cost", 0.001),
    ("off_peak_pricing", {"input_cost_per_token": 0.001, "windows": []}),
    ("provider_specific_entry", {"eu": 1.1}), ("tiered_pricing", 5),
    ("tiered_pricing", [{"input_cost_per_token": 1e-6}]),
    ("tiered_pricing", [{"range": [0, 9], "input_cost_per_second": 1}]),
    ("search_context_cost_per_query", {"search_context_size_low": -1}),
    ("input_cost_per_request", "0.005"),
])
def test_a_row_with_a_price_that_is_not_read_is_unpriced(name, value):
    assert book_of(m=PLAIN).find("m") is not None
    book = book_of(m={**PLAIN, name: value})

    assert book.find("m") is None
    with pytest.raises(ic.UnpricedModel, match="the price of m cannot be used: "):
        book.price("m")


@pytest.mark.parametrize("name, value", [
    ("input_cost_per_second", 0), ("output_cost_per_image", None), ("some_cost", 0.0),
    ("google_maps_grounding_cost_per_query", 0.025), ("input_cost_per_token_decisions", 1),
    ("input_dbu_cost_per_token", 1e-5), ("fedramp_uplift_multiplier", 1.1), ("source", "a price"),
    ("input_cost_per_token_cache_hit", 1e-7), ("supports_prompt_caching", True),
    ("provider_specific_entry", {"eu": 1, "kind": "x"}), ("off_peak_pricing", {
        "input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6, "windows": [{"hours": 1}]}),
])
def test_what_bills_no_call_leaves_a_price_as_it_is(name, value):
    usage = {"prompt_tokens": 10, "completion_tokens": 10}

    assert 500 == cost_in({**PLAIN, name: value}, usage)


@pytest.mark.parametrize("key", ["azure/model_router", "azure_ai/model-router", "model_router",
                                 "azure_ai/model_router/mine"])
def test_a_router_has_no_price_of_its_own(key):
    assert book_of(**{key: PLAIN}).find(key) is None


@pytest.mark.parametrize("name", ["input_cost_per_request", "input_cost_per_query"])
def test_a_fee_for_each_call_is_in_its_cost_and_in_its_bound(name):
    price = book_of(m={**PLAIN, name: 0.005}).price("m")
    bound = ic.bound_of_request("chat", ic.parse_json_object(b'{"max_tokens": 0}'), price)

    assert 100 + 5_000 == cost_in({**PLAIN, name: 0.005}, {"prompt_tokens": 10,
                                                           "completion_tokens": 0})
    assert bound.microdollars(0) == 5_000 + 10 * bound.input_tokens


@pytest.mark.parametrize("size, microdollars", [
    ("low", 5_000), ("medium", 8_000), ("high", 12_000), (None, 12_000), ("huge", 12_000)])
def test_a_seller_that_searches_for_each_call_charges_it_by_its_size(size, microdollars):
    row = {**PLAIN, "litellm_provider": "perplexity", "search_context_cost_per_query": {
        f"search_context_size_{name}": cost for name, cost in
        (("low", 0.005), ("medium", 0.008), ("high", 0.012))}}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "search_context_size": size}
    price = book_of(m=row).price("m")
    bound = ic.bound_of_request("chat", ic.parse_json_object(b"{}"), price)

    assert microdollars == cost_in(row, usage)
    assert bound.microdollars(0) == 12_000 + 10 * bound.input_tokens


@pytest.mark.parametrize("prompt, microdollars", [
    (1_000, 1_000), (32_768, 32_768), (32_769, 65_538), (256_000, 512_000), (256_001, 768_003)])
def test_prices_by_ranges_are_read(prompt, microdollars):
    row = {"mode": "chat", "tiered_pricing": [
        {"range": [start, end], "input_cost_per_token": price, "output_cost_per_token": 1}
        for start, end, price in ((0, 32_768, 1e-6), (32_768, 256_000.0, 2e-6),
                                  (256_000.0, 1_000_000.0, 3e-6))]}

    assert microdollars == cost_in(row, {"prompt_tokens": prompt, "completion_tokens": 0})


@pytest.mark.parametrize("details, microdollars", [
    ({"image_tokens": 4}, 6 * 40 + 4 * 300), ({"image_tokens": 0}, 400),
    ({}, 3_000), (None, 3_000), ({"reasoning_tokens": 4}, 6 * 300 + 4 * 40)])
def test_output_may_be_images_where_a_row_prices_them_and_nobody_says_otherwise(
        details, microdollars):
    row = {**PLAIN, "output_cost_per_image_token": 0.0003, "output_cost_per_image": 0.04}
    usage = {"prompt_tokens": 0, "completion_tokens": 10, "completion_tokens_details": details}
    bound = ic.bound_of_request("chat", ic.parse_json_object(b"{}"), book_of(m=row).price("m"))

    assert microdollars == cost_in(row, usage)
    assert 300_000_000 == bound.output_picodollars


def test_images_and_sound_in_a_prompt_have_their_prices_cached_or_not():
    row = {**PLAIN, "cache_read_input_token_cost": 0.000001, "input_cost_per_image_token": 0.00002,
           "cache_read_input_image_token_cost": 0.000002, "input_cost_per_audio_token": 0.0001,
           "cache_read_input_audio_token_cost": 0.000003}
    usage = {"prompt_tokens": 100, "completion_tokens": 0, "prompt_tokens_details": {
        "cached_tokens": 60, "audio_tokens": 20, "image_tokens": 30,
        "cached_tokens_details": {"audio_tokens": 15, "image_tokens": 5}}}

    # plain 10, cached 40; images 25 and 5, sound 5 and 15
    assert 100 + 40 + 500 + 10 + 500 + 45 == cost_in(row, usage)


def test_images_that_may_have_been_cached_are_not_counted_twice():
    usage = {"prompt_tokens": 100, "completion_tokens": 0,
             "prompt_tokens_details": {"cached_tokens": 60, "image_tokens": 90}}

    assert 1_000 == cost_in(PLAIN, usage)


DEAR = {**PLAIN, "cache_read_input_token_cost": 0.000001, "output_cost_per_token": 0.00001,
        "input_cost_per_audio_token": 0.0001, "cache_read_input_audio_token_cost": 0.00005,
        "output_cost_per_audio_token": 0.0002, "input_cost_per_image_token": 0.00002}


@pytest.mark.parametrize("held, details, made, microdollars", [
    ((), {}, {}, 5 * 10 + 5 * 1 + 10),
    (("audio_input",), {}, {}, 5 * 100 + 5 * 50 + 10),
    (("audio_input",), {"audio_tokens": None}, {}, 5 * 100 + 5 * 50 + 10),
    (("audio_input",), {"audio_tokens": 0}, {}, 5 * 10 + 5 * 1 + 10),
    (("audio_input",), {"audio_tokens": 2}, {}, 3 * 10 + 2 * 100 + 5 * 1 + 10),
    (("image_input",), {}, {}, 5 * 20 + 5 * 20 + 10),
    (("audio_input", "image_input"), {}, {}, 5 * 100 + 5 * 50 + 10),
    (("image_input", "audio_input"), {"audio_tokens": 0}, {}, 5 * 20 + 5 * 20 + 10),
    (("audio_output",), {}, {}, 5 * 10 + 5 * 1 + 200),
    (("audio_output",), {}, {"audio_tokens": 0}, 5 * 10 + 5 * 1 + 10)])
def test_audio_and_images_that_usage_does_not_break_out_cost_the_dearer_rate(
        held, details, made, microdollars):
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "completion_tokens_details": made,
             "prompt_tokens_details": {"cached_tokens": 5, **details}}
    bill = book_of(m=DEAR).bill("m", usage, api="chat", held=held)

    assert microdollars == bill.microdollars
    rates = book_of(m=DEAR).price("m").every_rate()
    assert all(rate in rates[what] for what, _, rate in bill.lines)


def test_cached_images_cost_what_is_cached_where_images_have_no_price_of_their_own():
    usage = {"input_tokens": 1, "cache_read_input_tokens": 100, "output_tokens": 1}
    plain, held = (book_of(m=CLAUDE).cost("m", usage, api="messages", held=kinds)
                   for kinds in ((), ("image_input", "audio_input")))

    assert plain == held


@pytest.mark.parametrize("provider, cost, microdollars", [
    ("openrouter", 0.00123, 1_230), ("openrouter", 0.00004, 100), ("openrouter", 1e-07, 100),
    ("openrouter", 1, 1_000_000), ("openrouter", -5, 100), ("openrouter", True, 100),
    ("openrouter", None, 100), ("openrouter", float("inf"), 100), ("openrouter", {"x": 1}, 100),
    ("openrouter", 1e300, 100), ("perplexity", {"total_cost": 0.00123}, 1_230),
    ("perplexity", {"total_cost": "x"}, 100), ("perplexity", 5, 100), ("openai", 5, 100),
    ("lab", 5, 100), ("", 5, 100),
])
def test_what_a_provider_says_a_call_cost_is_charged_where_it_is_more(provider, cost, microdollars):
    row = {name: value for name, value in PLAIN.items() if name != "litellm_provider"}
    usage = {"prompt_tokens": 10, "completion_tokens": 0, "cost": cost}

    assert microdollars == cost_in(row, usage, provider=provider)


@pytest.mark.parametrize("ticks, microdollars", [
    (37_756_000, 3_776), (999_999, 100), (2 * 10 ** 12, 200_000_000), (10 ** 22, 100), ("x", 100),
    (True, 100), (-37_756_000, 100)])
def test_xai_says_what_a_call_cost_in_ten_thousand_millionths_of_a_dollar(ticks, microdollars):
    row = {name: value for name, value in PLAIN.items() if name != "litellm_provider"}
    usage = {"prompt_tokens": 10, "completion_tokens": 0, "cost_in_usd_ticks": ticks}

    assert microdollars == cost_in(row, usage, provider="xai")
    assert 100 == cost_in(row, usage, provider="openrouter")


# Tiers that a row has no price for.

@pytest.mark.parametrize("tier, doubt", [
    (None, None), ("default", None), ("on_demand", None), ("flex", "flex"),
    ("priority", "priority"), ("fast", "fast"), ("turbo", "turbo"), ("a b", "?")])
def test_a_tier_without_a_price_is_charged_at_the_highest_and_marked(tier, doubt):
    bill = book_of(m=PLAIN).bill("m", {"prompt_tokens": 10, "completion_tokens": 1}, api="chat",
                                 service_tier=tier)

    assert 140 == bill.microdollars
    assert bill.estimated == (doubt and f"no price is known for the tier {doubt}")


def test_what_a_dear_tier_leaves_out_is_in_proportion_to_what_it_says():
    row = {**PLAIN, "cache_read_input_token_cost": 0.000001,
           "output_cost_per_reasoning_token": 0.00004, "input_cost_per_token_priority": 0.00003,
           "output_cost_per_token_priority": 0.00008, "input_cost_per_token_flex": 0.000005,
           "output_cost_per_token_flex": 0.00002}
    usage = {"prompt_tokens": 10, "completion_tokens": 10,
             "prompt_tokens_details": {"cached_tokens": 10},
             "completion_tokens_details": {"reasoning_tokens": 10}}

    bills = [book_of(m=row).bill("m", usage, api="chat", service_tier=tier)
             for tier in ("priority", "flex")]

    assert [30 + 800, 10 + 400] == [bill.microdollars for bill in bills]
    assert all(bill.estimated is not None for bill in bills)


def test_capacity_that_was_bought_beforehand_is_no_dearer_tier():
    bill = book_of(m=CLAUDE).bill("m", {"input_tokens": 10, "output_tokens": 0,
                                        "service_tier": "priority"}, api="messages")

    assert (100, None) == (bill.microdollars, bill.estimated)


@each_seed(100)
def test_no_bill_of_a_possible_tier_passes_the_dearest_rates(seed):
    """Of a model in pricing.json, whatever the request asks for and whatever serves it of that."""
    rng = Random(seed)
    row = ROWS[rng.choice(PRICED)]
    price = book_of(m={k: float(v) if isinstance(v, Fraction) else v for k, v in row.items()
                       if k not in ("search_context_cost_per_query", "tiered_pricing",
                                    "provider_specific_entry", "off_peak_pricing")}).price("m")
    asked = rng.choice(["auto", None, "flex", "priority", "ultrafast", "turbo", 7, ["x"]])
    default = rng.choice(["default", "flex", "priority", "turbo"])
    tiers = (None, default if asked in ("auto", None) else
             asked if isinstance(asked, str) else ic.UNKNOWN_TIER)
    most = rng.choice([100, 128_001, 272_001, 900_000])

    dearest = price.dearest_rates(tiers, most)

    for tier in {None, asked if isinstance(asked, str) and asked != "auto" else None,
                 default if asked in (None, "auto") else None}:
        for tokens in (0, most // 2, most):
            rates = price.rates(tier, tokens)
            assert all(rates[bucket] <= dearest[bucket] for bucket in rates)


# Names.

NAMES = {name: {**PLAIN, "litellm_provider": seller} for seller, names in {
    "openai": ("gpt-4o", "gpt-5", "gpt-4o-2024-05-13", "o1", "gpt-4", "chat-latest",
               "ft:gpt-4o-2024-08-06"),
    "text-completion-openai": ("ft:davinci-002", "babbage"),
    "anthropic": ("claude-sonnet-4-5", "claude-opus-4"), "azure": ("azure/gpt-4o", "azure/own"),
    "groq": ("groq/llama",), "mistral": ("mistral/small-latest",), "gemini": ("gemini-pro",),
    "deepseek": ("deepseek/chat", "chat"), "vertex_ai-anthropic_models": ("vertex_ai/claude-opus",),
    "cheap": ("gpt-4o-cheap", "cheap/gpt-5"), "openrouter": ("openrouter/deepseek/coder",),
}.items() for name in names}


@pytest.mark.parametrize("model, provider, key", [
    ("gpt-4o", "", "gpt-4o"), ("gpt-4o", "openai", "gpt-4o"),
    ("gpt-4o-2024-05-13", "openai", "gpt-4o-2024-05-13"),
    ("gpt-4o-2029-01-02", "openai", "gpt-4o"), ("gpt-4-0613", "openai", "gpt-4"),
    ("o1-2024-12-17", "openai", "o1"), ("claude-sonnet-4-5-20250929", "anthropic",
                                        "claude-sonnet-4-5"),
    ("claude-opus-4@20250514", "anthropic", "claude-opus-4"),
    ("claude-opus-4@default", "anthropic", "claude-opus-4"),
    ("claude-opus-4-latest", "anthropic", "claude-opus-4"),
    ("chat-latest", "openai", "chat-latest"),
    ("openai/gpt-4o", "openai", "gpt-4o"), ("openai/gpt-4o-2029-01-02", "openai", "gpt-4o"),
    ("models/gemini-pro", "gemini", "gemini-pro"), ("llama", "groq", "groq/llama"),
    ("groq/llama", "groq", "groq/llama"), ("small-latest", "mistral", "mistral/small-latest"),
    ("ft:gpt-4o-2024-08-06", "openai", "ft:gpt-4o-2024-08-06"),
    ("ft:gpt-4o-2024-08-06:org:name:id", "openai", "ft:gpt-4o-2024-08-06"),
    ("ft:gpt-4o-2024-08-06:org::id", "openai", "ft:gpt-4o-2024-08-06"),
    ("ft:davinci-002:org", "openai", "ft:davinci-002"), ("babbage", "openai", "babbage"),
    ("gpt-4o", "azure", "azure/gpt-4o"), ("own", "azure", "azure/own"),
    ("azure/own", "azure", "azure/own"), ("gpt-5", "cheap", "cheap/gpt-5"),
    ("chat", "deepseek", "deepseek/chat"), ("deepseek/coder", "openrouter",
                                            "openrouter/deepseek/coder"),
    ("claude-opus", "vertex", "vertex_ai/claude-opus"),
])
def test_a_name_resolves_to_its_row(model, provider, key):
    assert key == book_of(**NAMES).price(model, provider).key


@pytest.mark.parametrize("model, provider", [
    ("gpt-4o-mini", "openai"), ("gpt-4o-mini-2024-07-18", "openai"), ("gpt-5-pro", "openai"),
    ("gpt-5.4", "openai"), ("gpt-4o-search-preview", "openai"), ("gpt-4o-20240", "openai"),
    ("gpt", "openai"), ("gpt-4o-", "openai"), ("gpt-4o ", "openai"), (" gpt-4o", "openai"),
    ("gpt-4o\n", "openai"), ("gpt-4o\0", "openai"), ("GPT-4o", "openai"), ("", "openai"),
    ("gpt-4o-20", "openai"), ("gpt-4o-2029-01-02-preview", "openai"),
    ("gpt-4o-2029-01-02-latest-x", "openai"), ("gpt-4o-123456789", "openai"),
    ("llama", "openai"), ("llama", ""), ("groq/gpt-4o", "openai"),
    ("anthropic/gpt-4o", "openai"), ("openai/openai/gpt-4o", "openai"),
    ("ft:gpt-4o:org::id", "openai"), ("ft:gpt-4o-2024-05-13:org::id", "openai"),
    ("ft:gpt-5", "openai"), ("ft:", "openai"), ("ft", "openai"), ("sample_spec", "openai"),
    ("claude-opus-4-latest-20250514", "anthropic"), ("claude-opus-6", "anthropic"),
    ("claude-opus-4-latest\n", "anthropic"),
    # rows of another seller, whatever its name for the model
    ("deepseek/chat", "openrouter"), ("deepseek/chat-latest", "openrouter"),
    ("chat", "openrouter"), ("gpt-4o", "lab"), ("gpt-4o-2029-01-02", "lab"), ("gpt-5", "azure"),
    ("gpt-4o-cheap", "openai"), ("openai/gpt-4o", "openrouter"), ("azure/gpt-4o", "openai"),
    ("claude-opus-4@20250514", "openrouter"), ("models/gemini-pro", "openai"),
    ("ft:gpt-4o-2024-08-06:org::id", "azure"), ("ft:davinci-002", "lab"),
    ("vertex_ai/claude-opus", "anthropic"), ("claude-opus", "anthropic"),
    # four digits are another version, with a price of its own
    ("gemini-pro-0827", "gemini"), ("chat-0324", "deepseek"), ("gpt-4o-2407", "openai"),
    ("gpt-4o-1301", "openai"), ("gpt-4o-0806", "openai"), ("own-1106", "azure"),
])
def test_a_name_that_is_no_row_falls_to_no_other(model, provider):
    assert book_of(**NAMES).find(model, provider) is None


@pytest.mark.parametrize("provider", ["openai", "anthropic", "openrouter", "lab"])
def test_a_row_that_names_no_seller_is_about_whoever_serves_the_model(provider):
    row = {name: value for name, value in PLAIN.items() if name != "litellm_provider"}

    price = book_of(mine=row).price("mine", provider)

    assert ("mine", provider) == (price.key, price.provider)


def test_the_sellers_rules_hold_for_a_row_that_names_none():
    row = {name: value for name, value in CLAUDE.items() if name != "litellm_provider"}
    book, usage = book_of(mine={**row, "input_cost_per_token_batches": 0.000004}), {
        "input_tokens": 0, "output_tokens": 10, "service_tier": "batch"}

    assert 250 == book.cost("mine", usage, api="messages", provider="anthropic")    # half
    assert 0 == book.cost("mine", usage, api="messages", provider="openrouter")


def test_a_price_of_another_seller_is_asked_for_under_this_ones_name():
    with pytest.raises(ic.UnpricedModel, match='add the key "openrouter/deepseek/chat" with'):
        book_of(**NAMES).price("deepseek/chat", "openrouter")


def test_an_alias_row_has_the_price_of_the_row_that_it_names():
    book = book_of(**NAMES, **{
        "claude-latest": {"alias_of": "claude-opus-4"}, "loop": {"alias_of": "loop"},
        "lost": {"alias_of": "nobody"}, "list": {"alias_of": ["claude-opus-4"]}})

    assert "claude-opus-4" == book.price("claude-latest", "anthropic").key
    assert [None] * 4 == [book.find(name, provider) for name, provider in (
        ("claude-latest", "openai"), ("loop", ""), ("lost", ""), ("list", ""))]


def test_mini_never_costs_what_its_big_sibling_does():
    rows = {name: row for name, row in ROWS.items() if name != "sample_spec"}
    del rows["gpt-4o-mini"], rows["gpt-4o-mini-2024-07-18"]

    assert ic.PriceBook(rows).find("gpt-4o-mini", "openai") is None
    assert "gpt-4o-mini" == BOOK.price("gpt-4o-mini", "openai").key
    assert "gpt-5.5-pro" == BOOK.price("gpt-5.5-pro", "openai").key


@pytest.mark.parametrize("model, usd", [
    ("gpt-6.2-sol", ("2", "0.10", "10", "2.5", "4", "15")),
    ("gpt-6.2-astra", ("8", "0.40", "40", "10", "16", "60")),
])
def test_the_newest_models_cost_what_their_notes_say_and_name_their_source(model, usd):
    """Input, cached, output, a cache write; input and output beyond 272,000 tokens."""
    price = BOOK.price(model, "openai")
    rates, long = price.rates(None, 0), price.rates(None, 272_001)

    assert [Decimal(amount) * 10 ** 6 for amount in usd] == [
        rates["input"], rates["cache_read"], rates["output"], rates["cache_write"],
        long["input"], long["output"]]
    assert (922_000, 128_000) == (price.max_input_tokens, price.max_output_tokens)
    assert "17 November 2026" in ROWS[model]["source"] and "2026-11-17" == ROWS[model]["as_of"]


def test_an_unknown_model_is_refused_with_the_key_to_add():
    with pytest.raises(ic.UnpricedModel) as caught:
        BOOK.price("gpt-99-turbo", "openai")

    assert (400, "iron_cage_unpriced_model", "model") == (
        caught.value.status, caught.value.openai_type, caught.value.param)
    assert 'add the key "gpt-99-turbo" with input_cost_per_token and output_cost_per_token ' \
        "to pricing.json" in caught.value.message


@pytest.mark.parametrize("model", [
    "x" * 10_000, "x" * 129, "a\nb", "a\rb", "a\x1b[31m", "a\0", "a b", 'a"b', "é", "\u202e",
    "<script>", ""])
def test_a_name_that_is_no_plain_word_is_shown_as_a_question_mark(model):
    with pytest.raises(ic.UnpricedModel) as caught:
        BOOK.price(model, "openai")

    assert caught.value.message.startswith(
        "no price is known for the model ?: add its name as a key with")


@pytest.mark.parametrize("rows", [
    {}, {"ironcage/echo": {INPUT: 0, OUTPUT: 0}}, {"ironcage/echo": None}, {"gpt-4o": PLAIN}],
    ids=["empty", "free there", "unpriced there", "absent there"])
def test_the_echo_model_has_its_price_under_any_table(rows):
    cost = ic.PriceBook(rows).cost(
        "ironcage/echo", {"prompt_tokens": 10, "completion_tokens": 100}, api="chat",
        provider="ironcage")

    assert 10 * 1 + 100 * 2 == cost


# An independent computation, in fractions of dollars, straight from the rows' text.

PRICED = sorted(name for name in ROWS if BOOK.find(name) is not None
                and "alias_of" not in ROWS[name])
LITELLM_ROWS = Path(__file__).with_name("litellm_rows.jsonl")


@each_seed(60, 200)
def test_a_charge_is_the_exact_sum_or_less_than_a_microdollar_above_it(seed):
    rng = Random(seed)
    for _ in range(10):
        model = rng.choice(PRICED)
        usage, options, usd, is_guess = random_call(ROWS[model], rng)

        bill = BOOK.bill(model, usage, **options)

        assert usd * 10 ** 6 <= bill.microdollars < usd * 10 ** 6 + 1, (model, usage, options)
        assert is_guess == (bill.estimated is not None), (model, usage, options)


def test_the_random_calls_reach_most_of_the_price_table():
    assert len(PRICED) > 400
    assert {"openai", "anthropic", "xai", "groq", "mistral", "gemini"} <= {
        ROWS[name]["litellm_provider"] for name in PRICED}


@each("text", LITELLM_ROWS.read_text(encoding="utf-8").splitlines())
def test_rows_of_every_shape_in_litellms_table_cost_what_their_cells_say(text):
    """One row for each set of price cells of version 1.110.2, with figures made from them alone."""
    case = json.loads(text, parse_float=Decimal)
    bill = ic.PriceBook({"m": case["row"]}).bill("m", case["usage"], **case["options"])

    assert ceil_microdollars(Fraction(case["usd"])) == bill.microdollars
    assert case["guessed"] == (bill.estimated is not None)


def test_every_row_of_a_whole_litellm_table_costs_what_its_cells_say():
    """LITELLM_PRICES names the file: from a wheel, model_prices_and_context_window_backup.json."""
    path = os.environ.get("LITELLM_PRICES")
    if path is None:
        pytest.skip("LITELLM_PRICES names no file")
    rows = json.loads(Path(path).read_text(encoding="utf-8"), parse_float=Fraction)
    book, wrong = ic.PriceBook.load(path), []
    names = [name for name in book.keys() if "alias_of" not in rows.get(name, {"alias_of": ""})]
    for name in names:
        usage, options, usd, _ = random_call(rows[name], Random(name))
        if ceil_microdollars(usd) != book.cost(name, usage, **options):
            wrong.append((name, usage, options))

    assert [] == wrong
    assert len(names) > 1_000


# The chapter's own source.

def chapter_source(title: str) -> str:
    source = PROGRAM.read_text(encoding="utf-8")
    found = re.search(rf"^# =+ \d+\. {title} =+$(.*?)(?=^# =+ \d+\. )", source,
                      re.MULTILINE | re.DOTALL)
    return found[1]


def test_no_float_comes_near_money():
    """Neither a float literal, nor the type, nor a true division but of a Fraction."""
    tree = ast.parse(chapter_source("Money"))
    nodes = list(ast.walk(tree))

    floats = [ast.dump(node) for node in nodes
              if isinstance(node, ast.Constant) and isinstance(node.value, (float, complex))
              or isinstance(node, ast.Name) and node.id in ("float", "round")]
    divisions = [ast.unparse(node) for node in nodes
                 if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Div)]

    assert len(nodes) > 1_000
    assert [] == floats
    assert [] == [text for text in divisions if not re.match(r"Fraction\(.*\) / 2", text)]


# Prices as they are kept.

def test_a_kept_price_reads_back_as_it_was():
    price = book_of(m={
        "litellm_provider": "openai", "input_cost_per_token": 1e-6,
        "output_cost_per_token": 2.0000000000005e-6,            # no whole picodollars
        "input_cost_per_token_above_128k_tokens": 3e-6,
        "search_context_cost_per_query": {"search_context_size_low": 0.01}}).price("m")

    assert price == ic.price_from_cells(price.cells())._replace(known_rates=price.known_rates)


def test_rates_are_worked_out_once():
    price = BOOK.price("gpt-5.5")

    assert price.rates(None, 9) is price.rates("default", 10)


@pytest.mark.parametrize("name", ["provider_specific_entry", "search_context_cost_per_query"])
def test_what_should_be_an_object_and_is_none_leaves_a_row_unpriced(name):
    row = {"input_cost_per_token": 1, "output_cost_per_token": 1, name: 5}

    with pytest.raises(ValueError, match=f"{name} must be an object"):
        ic.price_from_row("m", row)
    assert book_of(m=row).find("m") is None


def test_a_row_that_stands_in_for_others_must_have_a_price():
    with pytest.raises(ValueError, match=r"price_as gpt-\*: there is no price for gpt-none"):
        BOOK.with_own({}, providers=(), price_as={"gpt-*": "gpt-none"})


def test_an_own_row_holds_for_its_alias_too_and_the_book_before_keeps_its_own():
    cheap, dear = ({"input_cost_per_token": cost, "output_cost_per_token": cost}
                   for cost in (Decimal("1e-6"), Decimal("9e-6")))
    book = ic.PriceBook({"m": cheap, "latest": {"alias_of": "m"}, "other": cheap})
    before = [book.row(name) for name in ("m", "latest", "other")]

    own = book.with_own({"m": dear}, providers=(), price_as={})

    assert [9_000_000] * 2 + [1_000_000] == [
        own.row(name).amounts["input_cost_per_token"] for name in ("m", "latest", "other")]
    assert before == [book.row(name) for name in ("m", "latest", "other")]
    assert own.row("other") is before[2]                  # it is read once


def test_all_models_of_a_provider_that_is_free_cost_nothing_and_only_those():
    book = BOOK.with_own({}, providers=[ic.manners_of("ollama")], price_as={})

    assert {0} == set(book.price("gpt-5.5", "ollama").amounts.values())
    assert book.find("unheard-of", "lm_studio") is None
    assert 0 < book.price("gpt-5.5", "openai").amounts["input_cost_per_token"]


def test_a_table_calls_a_server_free_only_where_it_is_ones_own():
    rows = {"ollama/m": {**ic.FREE_ROW, "litellm_provider": "ollama"},
            "ollama/dear": {**PLAIN, "litellm_provider": "ollama"}}
    away = ic.provider_from("ollama", {"base_url": "https://ollama.example/v1"})
    book = book_of(**rows).with_own({}, providers=[away], price_as={})
    own = book_of(**rows).with_own(rows, providers=[away], price_as={})

    assert [None, True, True] == [
        book.find("m", "ollama"), book.find("dear", "ollama") is not None,
        own.find("m", "ollama") is not None]


def test_a_price_that_stands_in_says_so_to_the_ledger():
    book = BOOK.with_own({}, providers=(), price_as={"unheard-*": "gpt-5.5"})

    assert book.find("unheard-of").known_rates is not book.find("gpt-5.5").known_rates


@pytest.mark.parametrize("key, provider, free, wins", [
    ("vllm/m", "vllm", None, True), ("m", "vllm", None, True), ("vllm/m", "vllm", True, True),
    ("gemini/m", "gemini", True, True), ("m", "gemini", True, True), ("x", "vllm", None, False)])
def test_an_operators_own_price_wins_where_a_provider_is_free(key, provider, free, wins):
    row = {"input_cost_per_token": 1, "output_cost_per_token": 1}
    served = ic.provider_from(provider, {} if free is None else {"free": free})
    book = BOOK.with_own({key: row}, providers=[served], price_as={})

    assert wins == any(book.price("m", provider).amounts.values())


def test_a_table_that_names_a_free_server_prices_it_but_not_what_its_operator_calls_free():
    row = {"input_cost_per_token": 1, "output_cost_per_token": 1}
    book = ic.PriceBook({"vllm/m": row, "gemini/m": row}).with_own({}, price_as={}, providers=[
        ic.provider_from("vllm", {}), ic.provider_from("gemini", {"free": True})])

    assert any(book.price("m", "vllm").amounts.values())
    assert not any(book.price("m", "gemini").amounts.values())
