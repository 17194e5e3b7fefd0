"""Texts that make a rule on bytes fail: a kind and a seed give one, the same in every Python.

Run with tiktoken, tokenizers and litellm installed (its wheel holds the three vocabularies), this
writes the real token counts of a few seeds of every kind to token_counts.json beside it:

    python tests/unit/adversarial_texts.py
"""
from __future__ import annotations

import functools
import json
import os
import re
import string
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Callable

COUNTS = Path(__file__).with_name("token_counts.json")
SEEDS_COUNTED = 45
LENGTH = 900

LOWER, UPPER, DIGITS = string.ascii_lowercase, string.ascii_uppercase, string.digits
ALPHABETS = {
    "few consonants": "jqxzkvw", "vowels": "aeiou", "common": "etaoinshr", "home row": "asdfghjkl",
    "DNA": "acgt", "protein": "acdefghiklmnpqrstvwy", "hexadecimal": "abcdef", "liquid": "lrnmt",
    "all": LOWER,
}
SEPARATORS = (" ", "\n", '"', ";", ",", "|", "-", "_", "'", ".", "#", "`", "\t", '","', "\\n",
              "\\t", "\n    ", "()", "0", "\u200b", "é", "\x00", "\\", ": ")
CASES: dict[str, Callable[[str], str]] = {
    "lower": str.lower, "upper": str.upper, "title": str.title,
    "camel": lambda word: word[:len(word) // 2] + word[len(word) // 2:].title(),
    "odd": lambda word: "".join(c.upper() if at % 2 else c for at, c in enumerate(word)),
    "last": lambda word: word[:-1] + word[-1].upper(),
}
WORDS = ("the function returns value error import class model token stream budget provider request "
         "user client when which could people because account number before little between under "
         "namespace identifier configuration theory weather rhythm queue yield xylophone").split()
PREFIXES = sorted({word[:size] for word in WORDS for size in (2, 3, 4)})
SCRIPTS = {"Cyrillic": (0x430, 0x44F), "Greek": (0x3B1, 0x3C9), "Hebrew": (0x5D0, 0x5EA),
           "Thai": (0xE01, 0xE3A), "Tibetan": (0xF40, 0xF6C), "Ogham": (0x1681, 0x169A),
           "Han": (0x4E00, 0x9FA5), "Hangul": (0xAC00, 0xD7A3), "emoji": (0x1F300, 0x1F64F),
           "combining": (0x300, 0x36F), "Latin 1": (0xC0, 0xFF), "boxes": (0x2500, 0x257F),
           "control": (0, 31), "mathematical": (0x1D400, 0x1D433), "zero width": (0x200B, 0x200F)}


def some(rng: Random, alphabet: str, least: int, most: int = 0) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(least, (most or least) + 1)))


def few_letters(rng: Random) -> str:
    """Words of one alphabet, all of one length or of many, joined by one separator."""
    alphabet = ALPHABETS[rng.choice([*ALPHABETS])]
    if rng.randrange(3) == 0:
        alphabet = some(rng, LOWER, 5, 9)
    size, separator = rng.choice([1, 2, 3, 4, 5, 7, 8, 8, 9, 12, 20, 40]), rng.choice(SEPARATORS)
    case, shortest = CASES[rng.choice([*CASES])], rng.choice([1, size, size, size])
    return separator.join(case(some(rng, alphabet, shortest, size))
                          for _ in range(LENGTH // (size + len(separator)) + 1))


def syllables(rng: Random) -> str:
    """Words that can be pronounced, and mean nothing."""
    count, separator = rng.randrange(1, 5), rng.choice(SEPARATORS)
    case, parts = CASES[rng.choice([*CASES])], ("bcdfghjklmnpqrstvwxyz", "aeiou", "nrstlaeiou")
    return separator.join(
        case("".join(rng.choice(part) for _ in range(count) for part in parts))
        for _ in range(LENGTH // (3 * count)))


def cycles(rng: Random) -> str:
    """Words that repeat two to five letters, a few such words after each other."""
    sizes = rng.choice([3, 4, 6, 9, 14, 20]), rng.choice([2, 3, 3, 4, 5])
    words = [(some(rng, LOWER, sizes[1]) * 20)[:sizes[0]] for _ in range(rng.choice([4, 6, 40]))]
    separator, case = rng.choice(SEPARATORS), CASES[rng.choice([*CASES])]
    return separator.join(case(rng.choice(words)) for _ in range(LENGTH // sizes[0]))


def one_word(rng: Random) -> str:
    """Degenerate: one to three words, repeated."""
    words = [some(rng, ALPHABETS[rng.choice([*ALPHABETS])], 1, 12)
             for _ in range(rng.randrange(1, 4))]
    separator, case = rng.choice(SEPARATORS), CASES[rng.choice([*CASES])]
    return separator.join(case(rng.choice(words)) for _ in range(LENGTH // 7))


def broken_words(rng: Random) -> str:
    """English words, cut, glued, misspelt, reversed or without vowels."""
    change = rng.choice([
        lambda word: rng.choice(PREFIXES) + rng.choice(PREFIXES), lambda word: word[::-1],
        lambda word: rng.choice(PREFIXES).title() + rng.choice(PREFIXES).title() + word[:2].title(),
        lambda word: word[0] + "".join(c for c in word[1:] if c not in "aeiou"),
        lambda word: word + some(rng, LOWER, 1, 3), lambda word: some(rng, LOWER, 1, 2) + word,
        lambda word: "".join(chr((ord(c) - 84) % 26 + 97) for c in word), str.upper, str.lower,
        lambda word: word + rng.choice(WORDS).title() + some(rng, UPPER, 1),
        lambda word: word + "_" + some(rng, LOWER, 1, 2), lambda word: word + some(rng, DIGITS, 1)])
    separator = rng.choice(SEPARATORS)
    return separator.join(change(rng.choice(WORDS)) for _ in range(LENGTH // 8))


def identifiers(rng: Random) -> str:
    """Random ids of base 2 to 94, as lists, CSV and the like."""
    alphabet = rng.choice(["01", DIGITS, DIGITS + "abcdef", DIGITS + "ABCDEF", LOWER + "234567",
                           DIGITS + LOWER, DIGITS + UPPER, DIGITS + LOWER + UPPER + "+/",
                           LOWER + UPPER, string.punctuation, string.printable[:94]])
    size, separator = rng.choice([1, 2, 3, 5, 7, 8, 11, 16, 23, 40, 80]), rng.choice(SEPARATORS)
    return separator.join(some(rng, alphabet, size)
                          for _ in range(LENGTH // (size + len(separator)) + 1))


def mixed_scripts(rng: Random) -> str:
    first, second = (SCRIPTS[rng.choice([*SCRIPTS])] for _ in range(2))
    size, separator = rng.choice([1, 2, 3, 5, 8]), rng.choice(SEPARATORS + ("",) * 9)
    return separator.join("".join(chr(rng.randrange(*rng.choice([first, first, second])))
                                  for _ in range(size)) for _ in range(LENGTH // (3 * size)))


RECORDS: dict[str, Callable[[Random], str]] = {
    "CSV of ids": lambda rng: ",".join(some(rng, LOWER, 7) for _ in range(5)),
    "quoted CSV": lambda rng: ",".join(f'"{some(rng, LOWER, 5, 8)}"' for _ in range(5)),
    "CSV of digits": lambda rng: ",".join(some(rng, DIGITS, 1) for _ in range(20)),
    "decimals": lambda rng: ",".join(f"{some(rng, DIGITS, 1, 2)}.{some(rng, DIGITS, 4)}"
                                     for _ in range(6)),
    "GenPept": lambda rng: f"{some(rng, DIGITS, 3):>9} " + " ".join(
        some(rng, ALPHABETS["protein"], 10) for _ in range(6)),
    "GenBank": lambda rng: f"{some(rng, DIGITS, 5):>9} " + " ".join(
        some(rng, "acgt", 10) for _ in range(6)),
    "FASTA": lambda rng: f">sp|{some(rng, UPPER, 5)}\n" + some(rng, "ACDEFGHIKLMNPQRSTVWY", 60),
    "UUID": lambda rng: "-".join(some(rng, DIGITS + "abcdef", size) for size in (8, 4, 4, 4, 12)),
    "dump": lambda rng: " ".join(some(rng, DIGITS + "abcdef", 4) for _ in range(8)),
    "JSON lines": lambda rng: json.dumps({some(rng, LOWER, 3): some(rng, LOWER, 5),
                                          some(rng, LOWER, 1): [some(rng, LOWER, 1)] * 3}),
    "JSON in JSON": lambda rng: json.dumps(json.dumps({some(rng, LOWER, 4): some(rng, LOWER, 4)})),
    "XML": lambda rng: f'<{some(rng, LOWER, 3)} {some(rng, LOWER, 2)}="{some(rng, LOWER, 4)}"/>',
    "colours": lambda rng: f"\x1b[{some(rng, DIGITS, 2)}m{some(rng, LOWER, 4)}\x1b[0m",
    "percent": lambda rng: "".join(f"%{some(rng, DIGITS + 'ABCDEF', 2)}" for _ in range(9)),
    "\\x": lambda rng: "".join(f"\\x{some(rng, DIGITS + 'abcdef', 2)}" for _ in range(9)),
    "\\u": lambda rng: "".join(f"\\u{some(rng, DIGITS + 'abcdef', 4)}" for _ in range(9)),
    "TeX": lambda rng: "\\" + rng.choice(["nabla", "tau", "times", "neq", some(rng, LOWER, 3)]),
    "paths": lambda rng: "C:\\" + "\\".join(some(rng, "ntx" + LOWER, 1, 5) for _ in range(5)),
    "initials": lambda rng: " ".join(some(rng, UPPER, 1) + "." for _ in range(9)),
    "letters": lambda rng: " ".join(some(rng, LOWER, 1) for _ in range(20)),
    "tickers": lambda rng: " ".join(some(rng, UPPER, 1, 4) for _ in range(9)),
    "minified": lambda rng: f"{some(rng, LOWER, 1)}.{some(rng, LOWER, 2)}({some(rng, LOWER, 1)},"
                            f"{some(rng, LOWER + UPPER, 2)})?{some(rng, DIGITS, 1)}:[];",
    "spaces": lambda rng: " " * rng.randrange(9) + some(rng, LOWER, 1, 2),
    "blank": lambda rng: some(rng, " \t\n", 30),
    "marks": lambda rng: some(rng, string.punctuation, 30),
    "brackets": lambda rng: some(rng, "[]()!+", 30),
    "Zalgo": lambda rng: "".join(rng.choice(LOWER) + chr(rng.randrange(0x300, 0x370)) * 2
                                 for _ in range(9)),
}


def records(rng: Random) -> str:
    """Lines of one kind of machine-made record, or of two."""
    kinds = [RECORDS[rng.choice([*RECORDS])] for _ in range(rng.choice([1, 1, 1, 2]))]
    lines = []
    while sum(map(len, lines)) < LENGTH:
        lines.append(rng.choice(kinds)(rng))
    return rng.choice(["\n", "\n", " ", ",", ""]).join(lines)


KINDS: dict[str, Callable[[Random], str]] = {
    maker.__name__: maker for maker in (few_letters, syllables, cycles, one_word, broken_words,
                                        identifiers, mixed_scripts, records)}


@functools.lru_cache(maxsize=None)
def text_of(kind: str, seed: int) -> str:
    return KINDS[kind](Random(f"{kind} {seed}"))


def is_degenerate(text: str) -> bool:
    """Whether it is one to three words repeated, or has fewer than five letters and some."""
    letters = {char for char in text.lower() if char.isalpha()}
    return 0 < len(letters) < 5 or len(set(re.findall(r"[^\W_]+", text))) <= 3


def real_counters() -> tuple[Callable[[str], int], Callable[[str], int]]:
    """(the larger of o200k and cl100k, Claude 2's): tokens of a text. Raises ImportError."""
    import tokenizers
    litellm = find_spec("litellm")
    if litellm is None:
        raise ImportError("litellm, whose wheel holds the vocabularies")
    folder = Path(litellm.origin).parent / "litellm_core_utils" / "tokenizers"
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    import tiktoken
    openai = [tiktoken.get_encoding(name) for name in ("o200k_base", "cl100k_base")]
    claude = tokenizers.Tokenizer.from_file(str(folder / "anthropic_tokenizer.json"))
    return (lambda text: max(len(one.encode(text, disallowed_special=())) for one in openai),
            lambda text: len(claude.encode(text, add_special_tokens=False).ids))


if __name__ == "__main__":
    counters = real_counters()
    COUNTS.write_text("{\n" + ",\n".join(
        f'"{kind}": ' + json.dumps([[count(text_of(kind, seed)) for count in counters]
                                    for seed in range(SEEDS_COUNTED)], separators=(",", ":"))
        for kind in KINDS) + "\n}\n")
