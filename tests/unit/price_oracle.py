"""What a call costs by a row of LiteLLM's table, in exact fractions of a dollar, straight from the
row's cells. It shares no code with the product, and takes the row, not a name.

    python tests/unit/price_oracle.py FILE [seed]    # writes litellm_rows.jsonl beside this file

makes one random call for a row of each shape (the set of its price cells) in LiteLLM's FILE, with
what it costs, so that the figures gate where that file is not.
"""
from __future__ import annotations

import json
import re
import sys
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Optional

SUFFIX = {"flex": "_flex", "priority": "_priority", "fast": "_priority", "batch": "_batches",
          "ultrafast": "_ultrafast", "balanced": "_balanced"}
STANDARD = (None, "default", "standard", "auto", "on_demand")
# bucket -> (its cell, the bucket whose rate it has where there is no such cell)
CELLS = {
    "plain": ("input_cost_per_token", None),
    "read": ("cache_read_input_token_cost", "plain"),
    "write": ("cache_creation_input_token_cost", "plain"),
    "write_1h": ("cache_creation_input_token_cost_above_1hr", "write"),
    "write_12h": ("cache_creation_input_token_cost_above_12hr", "write"),
    "heard": ("input_cost_per_audio_token", "plain"),
    "heard_again": ("cache_read_input_audio_token_cost", "heard"),
    "seen": ("input_cost_per_image_token", "plain"),
    "seen_again": ("cache_read_input_image_token_cost", "seen"),
    "out": ("output_cost_per_token", None),
    "thought": ("output_cost_per_reasoning_token", "out"),
    "spoken": ("output_cost_per_audio_token", "out"),
    "drawn": ("output_cost_per_image_token", "out"),
}


def steps(row: dict) -> list[int]:
    """Prompt sizes beyond which other prices hold."""
    found = {int(k) * 1000 for name in row for k in re.findall(r"_above_(\d+)k_tokens", name)}
    found |= {int(tier["range"][0]) for tier in row.get("tiered_pricing", ())}
    return sorted(found - {0})


def price_at(row: dict, cell: str, suffix: str, step: int):
    """One cell: flat (step 0) or beyond a step, also where a range says it."""
    if not suffix:
        for tier in row.get("tiered_pricing", ()):
            if int(tier["range"][0]) == step and cell in tier:
                return tier[cell]
    return row.get(cell + (f"_above_{step // 1000}k_tokens" if step else "") + suffix) \
        if step % 1000 == 0 else None


def passed(row: dict, prompt: int) -> list[int]:
    inclusive = row.get("litellm_provider") == "xai"
    return [0] + [step for step in steps(row) if prompt > step or (inclusive and prompt == step)]


def cell_price(row: dict, cell: str, suffix: str, prompt: int):
    """(price, whether it is the tier's own) after every step that the prompt has passed."""
    price, own = None, True
    for step in passed(row, prompt):
        special, usual = price_at(row, cell, suffix, step), price_at(row, cell, "", step)
        if special is not None:
            price, own = special, True
        elif usual is not None and suffix != "_batches":
            price, own = usual, False
    return price, own


def rates_of(row: dict, tier: Optional[str], prompt: int) -> tuple[dict, set]:
    """USD for a token of each bucket, and the buckets that are guessed from above."""
    prepaid = row.get("litellm_provider") == "anthropic" and tier == "priority"
    suffix = "" if tier in STANDARD or prepaid else SUFFIX.get(tier, "_nobody_knows")
    usual = rates_of(row, None, prompt)[0] if suffix else {}
    halves = suffix == "_batches" and (row.get("litellm_provider") == "anthropic" or not any(
        name.endswith("_batches") for name in row))
    rates: dict = {}
    guessed = set()
    for bucket, (cell, other) in CELLS.items():
        price, own = cell_price(row, cell, suffix, prompt)
        if price is not None and own:
            rates[bucket] = Fraction(price)
        elif halves:
            rates[bucket] = usual[bucket] / 2
        elif price is None:
            rates[bucket] = rates[other] if other else Fraction(0)
        else:
            guessed.add(bucket)
            every = [price_at(row, cell, s, step) for s in {"", *SUFFIX.values()}
                     for step in passed(row, prompt)]
            share = usual[bucket] * rates[other] / usual[other] if other and usual[other] \
                else usual[bucket]
            rates[bucket] = usual[bucket] if suffix == "_flex" else max(
                [share, *[Fraction(price) for price in every if price is not None]])
    return rates, guessed


def cost_of(row: dict, buckets: dict, *, tier=None, residency=None, geo=None, speed=None,
            search_size=None, searches: int = 0) -> tuple[Fraction, bool]:
    """(exact USD of a call, whether a rate was guessed)."""
    prompt = sum(n for bucket, n in buckets.items()
                 if bucket not in ("out", "thought", "spoken", "drawn"))
    rates, guessed = rates_of(row, tier, prompt)
    if "drawn" not in buckets:                     # nobody said that no image was made
        rates["out"] = max(rates["out"], rates["drawn"])
    usd = sum((n * rates[bucket] for bucket, n in buckets.items()), Fraction(0))
    uplift = {name[-2:]: value for name, value in row.items()
              if name.startswith("regional_processing_uplift_multiplier_")}
    if residency is not None and uplift:
        usd *= Fraction(uplift.get(residency, max(uplift.values())))
    extra = row.get("provider_specific_entry", {})
    usd *= Fraction(extra.get("us", 1)) if geo == "us" else 1
    usd *= Fraction(extra.get("fast", 1)) if speed == "fast" else 1
    usd += Fraction(row.get("input_cost_per_request", 0)) \
        + Fraction(row.get("input_cost_per_query", 0))
    sizes = row.get("search_context_cost_per_query", {})
    if row.get("litellm_provider") == "perplexity" and sizes:
        usd += Fraction(sizes.get(f"search_context_size_{search_size}", max(sizes.values())))
    usd += searches * Fraction(max(sizes.values()) if sizes else Fraction(1, 100))
    is_free = not any(Fraction(v) for name, v in row.items() if "cost_per_" in name
                      and "token" in name) and "tiered_pricing" not in row
    return usd, bool(guessed & {bucket for bucket, n in buckets.items() if n}) and not is_free


def random_call(row: dict, rng: Random) -> tuple[dict, dict, Fraction, bool]:
    """(usage, options of PriceBook.cost(), exact USD, whether guessed) of a call by a row."""
    def some() -> int:
        edges = steps(row) or [100_000]
        return rng.choice([0, 1, rng.randrange(100), rng.randrange(10_000), rng.randrange(400_000),
                           rng.choice(edges) + rng.randrange(-1, 2)])

    def part(whole: int) -> int:
        return rng.randrange(whole + 1) * rng.randrange(2)

    if row.get("litellm_provider") == "anthropic":
        tier = rng.choice(["standard", "standard", "priority", "batch", None])
        geo, speed = rng.choice([None, "us", "global"]), rng.choice([None, "standard", "fast"])
        plain, out, (read, write) = some(), some(), [some() * rng.randrange(2) for _ in range(2)]
        hour, thought, searches = part(write), part(out), rng.randrange(3) * rng.randrange(2)
        usage = {"input_tokens": plain, "cache_read_input_tokens": read, "output_tokens": out,
                 "cache_creation_input_tokens": write, "service_tier": tier, "inference_geo": geo,
                 "speed": speed, "cache_creation": {"ephemeral_1h_input_tokens": hour},
                 "output_tokens_details": {"thinking_tokens": thought},
                 "server_tool_use": {"web_search_requests": searches}}
        buckets = {"plain": plain, "read": read, "write": write - hour, "write_1h": hour,
                   "out": out - thought, "thought": thought}
        usd, guessed = cost_of(row, buckets, tier=tier, geo=geo, speed=speed, searches=searches)
        return usage, {"api": "messages"}, usd, guessed
    api = "embeddings" if row.get("mode") == "embedding" else rng.choice(["chat", "responses"])
    tier = rng.choice([None, None, "default", "flex", "priority", "fast", "ultrafast", "batch",
                       "balanced", "turbo"])
    place, size = rng.choice([None, "us", "eu", "jp"]), rng.choice([None, "low", "medium"])
    prompt, out = some(), 0 if api == "embeddings" else some()
    read = part(prompt)
    heard_again = part(read)
    seen_again = part(read - heard_again)
    write = part(prompt - read)
    long = part(write)
    heard = part(prompt - read - write)
    seen = part(prompt - read - write - heard)
    spoken = part(out)
    drawn = part(out - spoken)
    thought = part(out - spoken - drawn)
    draws = rng.randrange(2)
    ins, outs = ("input", "output") if api == "responses" else ("prompt", "completion")
    usage = {f"{ins}_tokens": prompt, f"{outs}_tokens": out, "search_context_size": size,
             f"{ins}_tokens_details": {
                 "cached_tokens": read, "audio_tokens": heard + heard_again,
                 "image_tokens": seen + seen_again,
                 "cached_tokens_details": {"audio_tokens": heard_again, "image_tokens": seen_again},
                 "cache_write_tokens": write,
                 "cache_write_tokens_details": {"ttl_12h_tokens": long}},
             f"{outs}_tokens_details": {
                 "reasoning_tokens": thought, "audio_tokens": spoken,
                 **({"image_tokens": drawn} if draws else {})}}
    buckets = {"plain": prompt - read - write - heard - seen,
               "read": read - heard_again - seen_again, "write": write - long, "write_12h": long,
               "heard": heard,
               "heard_again": heard_again, "seen": seen, "seen_again": seen_again,
               "spoken": spoken, "thought": thought, **({"drawn": drawn} if draws else {})}
    buckets["out"] = out - spoken - thought - (drawn if draws else 0)
    usd, guessed = cost_of(row, buckets, tier=tier, residency=place, search_size=size)
    return usage, {"api": api, "service_tier": tier, "data_residency": place}, usd, guessed


PRICE_CELL = re.compile(r"cost|pric(e|ing)|multiplier|provider_specific_entry")
OTHER_CELLS = ("litellm_provider", "mode")


def main() -> None:
    """Write one call for a row of each shape."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import ironcage_proxy as ic                        # asked only which rows it prices
    text, rng = Path(sys.argv[1]).read_text(encoding="utf-8"), Random(int((sys.argv + ["6"])[2]))
    rows, book = json.loads(text), ic.PriceBook.load(sys.argv[1])
    shapes = set()
    lines = []
    for name in book.keys():
        row = rows.get(name, {"alias_of": ""})
        shape = (row.get("litellm_provider") in ("anthropic", "xai", "perplexity")
                 and row["litellm_provider"], frozenset(filter(PRICE_CELL.search, row)))
        if "alias_of" in row or shape in shapes:
            continue
        shapes.add(shape)
        kept = {cell: value for cell, value in row.items()
                if PRICE_CELL.search(cell) or cell in OTHER_CELLS}
        usage, options, usd, guessed = random_call(
            json.loads(json.dumps(kept), parse_float=Fraction), rng)
        lines.append(json.dumps({"model": name, "row": kept, "usage": usage, "options": options,
                                 "usd": str(usd), "guessed": guessed}))
    out = Path(__file__).with_name("litellm_rows.jsonl")
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(len(lines), "rows,", out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
