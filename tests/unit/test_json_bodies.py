"""JSON bodies: a request body is read in one way only, or refused with a 400; and a body in which
the budget sets a field keeps every other byte that the client sent."""
from __future__ import annotations

import json
from random import Random

import pytest

import ironcage_proxy as ic
from support import each_seed

SPACES = ("", "", "", " ", "  ", "\n", "\t", "\r\n", " \n\t ")
ALPHABET = "ab Z09_-./{}[]:,\"\\\n\té߀😀\u2028\u0000"


def nested_lists(depth: int) -> bytes:
    """An object that is `depth` levels deep, itself included."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def nested_objects(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def refusal_of(raw: bytes) -> ic.BadRequest:
    with pytest.raises(ic.BadRequest) as caught:
        ic.parse_json_object(raw)
    return caught.value


# What is refused.

NOT_JSON = {
    "nothing": b"",
    "only space": b" \n",
    "cut after the brace": b"{",
    "cut in a name": b'{"a',
    "cut after a name": b'{"a"',
    "cut after the colon": b'{"a":',
    "cut in a value": b'{"a":[1',
    "cut after a value": b'{"a":1',
    "cut after a comma": b'{"a":1,',
    "trailing comma": b'{"a":1,}',
    "leading comma": b'{,"a":1}',
    "two commas": b'{"a":1,,"b":2}',
    "no comma": b'{"a":1 "b":2}',
    "no colon": b'{"a" 1}',
    "two colons": b'{"a"::1}',
    "name without quotes": b"{a:1}",
    "name in single quotes": b"{'a':1}",
    "a number as a name": b"{1:1}",
    "a comment": b'{"a":1 /* one */}',
    "a value behind it": b'{"a":1} 2',
    "an object behind it": b'{"a":1}{"b":2}',
    "a NUL behind it": b'{"a":1}\x00',
    "a form feed as space": b'{\x0c"a":1}',
    "a no-break space as space": '{\u00a0"a":1}'.encode(),
    "a number with a leading zero": b'{"a":01}',
    "a number with a plus": b'{"a":+1}',
    "a number in hexadecimal": b'{"a":0x10}',
    "a number ending in a point": b'{"a":1.}',
    "True as Python has it": b'{"a":True}',
    "a raw newline in a string": b'{"a":"x\ny"}',
    "an unknown escape": b'{"a":"\\x41"}',
    "half an escape": b'{"a":"\\u00"}',
    "a list that is broken": b"[1,",
    "a byte-order mark": b'\xef\xbb\xbf{"a":1}',
}
NOT_AN_OBJECT = {
    "a list": b"[]",
    "a list of an object": b'[{"model":"m"}]',
    "a string": b'"model"',
    "a number": b"1",
    "true": b"true",
    "null": b" null ",
}
NOT_UTF_8 = {
    "latin-1": '{"a":"é"}'.encode("latin-1"),
    "UTF-16 with a mark": '{"a":1}'.encode("utf-16"),
    "a byte that never occurs": b'{"a":"\xff"}',
    "a character that is cut": b'{"a":"\xe2\x82"}',
    "an overlong slash": b'{"a":"\xc0\xaf"}',
    "a surrogate": b'{"a":"\xed\xa0\x80"}',
    "beyond Unicode": b'{"a":"\xf4\x90\x80\x80"}',
}
DUPLICATE_KEYS = {
    "at the top": b'{"model":"a","model":"b"}',
    "at the top, apart": b'{"model":"a","x":[{}],"model":"b"}',
    "at the top, with one value": b'{"a":1,"a":1}',
    "at the top, one by an escape": b'{"model":"a","m\\u006fdel":"b"}',
    "at the top, empty names": b'{"":1,"":2}',
    "at depth": b'{"a":{"b":1,"b":2}}',
    "at depth, in a list": b'{"a":[[{"b":1,"c":0,"b":2}]]}',
    "at depth, one by an escape": b'{"a":{"b":1,"\\u0062":2}}',
}


@pytest.mark.parametrize("raw", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_refused(raw):
    error = refusal_of(raw)

    assert 400 == error.status
    assert "not JSON" in error.message


@pytest.mark.parametrize("raw", NOT_AN_OBJECT.values(), ids=NOT_AN_OBJECT)
def test_json_that_is_not_an_object_is_refused(raw):
    assert "the request body must be a JSON object" == refusal_of(raw).message


@pytest.mark.parametrize("raw", NOT_UTF_8.values(), ids=NOT_UTF_8)
def test_what_is_not_utf_8_is_refused(raw):
    assert "not UTF-8" in refusal_of(raw).message


def test_utf_16_without_a_mark_is_refused():
    assert 400 == refusal_of('{"a":1}'.encode("utf-16-le")).status


@pytest.mark.parametrize("raw", DUPLICATE_KEYS.values(), ids=DUPLICATE_KEYS)
def test_duplicate_keys_are_refused_at_any_depth(raw):
    assert "the same key twice" in refusal_of(raw).message


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("body", ['{"a":%s}', '{"a":[{"b":%s}]}'])
def test_numbers_that_are_not_finite_are_refused(name, body):
    assert f"the request body contains {name}, which is not JSON" == \
        refusal_of((body % name).encode()).message


@pytest.mark.parametrize("body", ['{"a":%s}', '{"a":[{"b":%s}]}'])
@pytest.mark.parametrize("sign", ["", "-"])
def test_integers_of_4300_digits_are_taken_and_of_more_are_refused(body, sign):
    taken = ic.parse_json_object((body % (sign + "9" * 4300)).encode())

    assert (body % (sign + "9" * 4300)) == taken.raw.decode()
    assert json.loads(ic.json_bytes(taken.fields)) == json.loads(taken.raw)
    assert "more than 4300 digits" in refusal_of((body % (sign + "1" + "0" * 4300)).encode()).message


def test_an_integer_of_a_million_digits_is_refused():
    assert 400 == refusal_of(b'{"a":' + b"7" * 1_000_000 + b"}").status


@pytest.mark.parametrize("nested", [nested_lists, nested_objects])
def test_nesting_is_taken_to_200_levels(nested):
    body = ic.parse_json_object(nested(200))

    assert ["a"] == list(body.fields)


@pytest.mark.parametrize("nested", [nested_lists, nested_objects])
@pytest.mark.parametrize("depth", [201, 202, 900, 5_000, 100_000])
def test_deeper_nesting_is_a_refusal_and_not_a_crash(nested, depth):
    error = refusal_of(nested(depth))

    assert 400 == error.status
    assert "the request body is nested deeper than 200" == error.message


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a":' * 100_000, b'[{"a":' * 50_000],
                         ids=["lists", "objects", "both"])
def test_deep_nesting_that_is_never_closed_is_a_refusal(raw):
    assert 400 == refusal_of(raw).status


def test_many_members_side_by_side_are_not_nesting():
    fields = {f"k{number}": [[], {}] for number in range(2_000)}

    assert fields == ic.parse_json_object(json.dumps(fields).encode()).fields


def test_a_refusal_does_not_repeat_the_body():
    assert "SECRET" not in refusal_of(b'{"a":"SECRET",}').message


# What is taken.

@pytest.mark.parametrize("raw, expected", [
    (b"{}", {}),
    (b" \t\r\n{ \n} \r\n", {}),
    (b'{"":0}', {"": 0}),
    (b'{"a":1}\n', {"a": 1}),
    (b'{"a":-0}', {"a": 0}),
    (b'{"a":1.5e-3,"b":[true,false,null]}', {"a": 0.0015, "b": [True, False, None]}),
    ('{"ключ":"😀"}'.encode(), {"ключ": "😀"}),
    (b'{"a":"\\ud83d\\ude00\\n\\/"}', {"a": "😀\n/"}),
    (b'{"a":"NaN","b":"\\"a\\":1"}', {"a": "NaN", "b": '"a":1'}),
    (b'{"a":{"b":1},"b":{"b":1}}', {"a": {"b": 1}, "b": {"b": 1}}),
])
def test_plain_objects_are_read(raw, expected):
    body = ic.parse_json_object(raw)

    assert expected == body.fields
    assert raw is body.raw is body.text          # no copy is made of what has no long data


# Setting fields.

def changed(body: ic.JsonBody, changes: dict, without: frozenset = frozenset()) -> bytes:
    return b"".join(body.spliced(changes, without))


@pytest.mark.parametrize("raw, changes, expected", [
    (b'{"a":1}', {}, b'{"a":1}'),
    (b'{"a":1}', {"a": 2}, b'{"a":2}'),
    (b'{ "a" : null , "b":2 }', {"a": 5}, b'{ "a" : 5 , "b":2 }'),
    (b'{"a":null}', {"a": None}, b'{"a":null}'),
    (b'{"b":{"a":1},"a":1,"c":"\\"a\\":1"}', {"a": 9}, b'{"b":{"a":1},"a":9,"c":"\\"a\\":1"}'),
    (b'{"\\u0061":1}', {"a": 2}, b'{"\\u0061":2}'),
    (b'{"a":{"x": [ ]}}', {"a": {"y": True}}, b'{"a":{"y": true}}'),
    (b'{"a":12345,"b":1}', {"a": 1, "b": 12345}, b'{"a":1,"b":12345}'),
])
def test_a_field_that_is_present_is_replaced_in_its_place(raw, changes, expected):
    assert expected == changed(ic.parse_json_object(raw), changes)


@pytest.mark.parametrize("raw, expected", [
    (b"{}", {"n": 1}),
    (b" { } \n", {"n": 1}),
    (b'{"a":1}', {"n": 1, "a": 1}),
    (b'\n{\n  "a":1\n}\n', {"n": 1, "a": 1}),
    (b'{"n2":"{"}', {"n": 1, "n2": "{"}),
])
def test_a_field_that_is_absent_is_added_behind_the_brace(raw, expected):
    before, brace, after = raw.partition(b"{")

    set_to = changed(ic.parse_json_object(raw), {"n": 1})

    assert expected == json.loads(set_to)
    assert set_to.startswith(before + brace)
    assert set_to.endswith(after)


def test_absent_and_present_fields_can_be_set_at_once():
    raw = b'{"b": 1, "stream_options": null}'

    set_to = changed(ic.parse_json_object(raw), {
        "max_tokens": 7, "stream_options": {"include_usage": True}, "b": 2})

    assert {"max_tokens": 7, "b": 2, "stream_options": {"include_usage": True}} == \
        json.loads(set_to)
    assert set_to.endswith(b'"b": 2, "stream_options": {"include_usage": true}}')


def test_setting_fields_leaves_the_body_as_it_was():
    body = ic.parse_json_object(b'{"a":1}')

    changed(body, {"a": 2, "b": 3})

    assert ('{"a":1}', {"a": 1}) == (body.raw.decode(), body.fields)


def test_what_stays_is_not_copied():
    pieces = ic.parse_json_object(b'{"a":"words","b":2}').spliced({"b": 3, "n": 1})

    assert b'"n": 1,3' == b"".join(piece for piece in pieces if not isinstance(piece, memoryview))


def random_string(rng: Random) -> str:
    """A JSON string, each character plain or escaped as the dice fall."""
    shown = []
    for character in rng.choices(ALPHABET, k=rng.randrange(8)):
        if character in '"\\' or character < " " or rng.random() < 0.2:
            units = character.encode("utf-16-be")
            shown += [f"\\u{units[i]:02x}{units[i + 1]:02X}" for i in range(0, len(units), 2)]
        else:
            shown.append(character)
    return f'"{"".join(shown)}"'


def random_value(rng: Random, depth: int) -> str:
    space = rng.choice(SPACES)
    if depth and rng.random() < 0.4:
        items = [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
        if rng.random() < 0.5:
            return "[" + space + f"{space},".join(items) + space + "]"
        names = [f'"k{number}"{space}' for number in range(len(items))]
        return "{" + space + ",".join(map(":".join, zip(names, items))) + space + "}"
    return rng.choice([random_string(rng), "true", "false", "null", "0", "-1", "1e5", "-0.25E-2",
                       str(rng.randrange(10 ** 18))])


def random_members(rng: Random) -> list[tuple[str, str]]:
    """(name, value) of an object's members as JSON text, under names that differ."""
    members = {}
    for _ in range(rng.randrange(7)):
        name = random_string(rng)
        members.setdefault(json.loads(name), (name, random_value(rng, 3)))
    return list(members.values())


@each_seed(400)
def test_setting_fields_keeps_every_other_byte_of_random_objects(seed):
    rng = Random(seed)
    members = random_members(rng)
    spaces = [[rng.choice(SPACES) for _ in range(4)] for _ in members]
    changed_names = {name for name, _ in members if rng.random() < 0.3}
    changes = {json.loads(name): rng.choice([rng.randrange(10 ** 6), None, {"a": ["é", "\n"]}])
               for name in changed_names}

    def text(values: list[str]) -> bytes:
        inside = ",".join(s[0] + name + s[1] + ":" + s[2] + value + s[3]
                          for s, (name, _), value in zip(spaces, members, values))
        return f" {{\n{inside}}}\t".encode()

    raw = text([value for _, value in members])
    expected = text([json.dumps(changes[json.loads(name)]) if name in changed_names else value
                     for name, value in members])
    body = ic.parse_json_object(raw)

    extended = changed(body, {**changes, "added by the proxy": [seed], "and": "ü"})

    assert json.loads(raw) == body.fields
    assert expected == changed(body, changes)
    assert {**json.loads(raw), **changes, "added by the proxy": [seed], "and": "ü"} == \
        json.loads(extended)
    assert extended.startswith(b" {")
    assert extended.endswith(expected[2:])


@pytest.mark.parametrize("raw, without, expected", [
    (b'{ "a" : 1 }', "a", b'{ }'),
    (b'{"a":1, "b":2,"c":3}', "a", b'{"b":2,"c":3}'),
    (b'{"a":1, "b":2,"c":3}', "b", b'{"a":1,"c":3}'),
    (b'{"a":1, "b":2,"c":3 }', "c", b'{"a":1, "b":2 }'),
    (b'{"a":1, "b":2,"c":3}', "ac", b'{"b":2}'),
    (b'{"\\u0061":1,"b":"a"}', "a", b'{"b":"a"}'),
])
def test_a_field_is_left_out_with_its_comma(raw, without, expected):
    body, names = ic.parse_json_object(raw), frozenset(without)

    set_to = changed(body, {"n": 1}, names)

    assert expected == changed(body, {}, names)
    assert {"n": 1, **json.loads(expected)} == json.loads(set_to)


@each_seed(50)
def test_long_strings_of_data_stay_as_they_were(seed):
    rng = Random(seed)
    fields = {name: rng.choice(["ü", 1, "A" * ic.LEAST_DATA_BYTES, {"deep": [
        {"data": "data:image/png;base64," + "QUJD" * ic.LEAST_DATA_BYTES}]}]) for name in "abcdef"}
    raw = json.dumps(fields, ensure_ascii=False).encode()
    body, without = ic.parse_json_object(raw), frozenset(rng.sample("abcdef", 2))

    assert fields == body.fields
    assert raw == changed(body, {})
    assert {"n": 1, **{name: value for name, value in fields.items() if name not in without}} == \
        json.loads(changed(body, {"n": 1}, without))


# Numbers and flags among the fields.

@pytest.mark.parametrize("fields, expected", [
    ({}, None), ({"n": None}, None), ({"n": 0}, 0), ({"n": 1}, 1), ({"n": 10 ** 9}, 10 ** 9),
    ({"N": 5}, None),
])
def test_a_count_is_read(fields, expected):
    assert expected == ic.optional_count(fields, "n")


@pytest.mark.parametrize("value", [
    True, False, -1, 1.0, 1.5, float("inf"), "1", "", [], [1], {}, 10 ** 9 + 1, 10 ** 18,
])
def test_what_is_no_count_is_refused_by_the_name_of_its_field(value):
    with pytest.raises(ic.BadRequest) as caught:
        ic.optional_count({"n": value}, "n")

    assert "n" == caught.value.param
    assert "n must be a whole number from 0 to 1000000000" == caught.value.message


@pytest.mark.parametrize("value, is_taken", [(0, False), (1, True), (128, True), (129, False)])
def test_a_count_keeps_within_its_limits(value, is_taken):
    taken = []
    try:
        taken.append(ic.optional_count({"n": value}, "n", least=1, most=128))
    except ic.BadRequest:
        pass

    assert ([value] if is_taken else []) == taken


@pytest.mark.parametrize("fields, expected", [
    ({}, False), ({"stream": None}, False), ({"stream": False}, False), ({"stream": True}, True),
])
def test_a_flag_is_read(fields, expected):
    assert expected is ic.optional_flag(fields, "stream")


@pytest.mark.parametrize("value", [0, 1, "true", "false", "", [], {}, 1.0])
def test_what_is_no_flag_is_refused_by_the_name_of_its_field(value):
    with pytest.raises(ic.BadRequest) as caught:
        ic.optional_flag({"stream": value}, "stream")

    assert ("stream", "stream must be true or false") == \
        (caught.value.param, caught.value.message)


@pytest.mark.parametrize("value", [{}, {"a": [1, "é😀\u2028\n"]}, [], "x", None])
def test_json_that_we_send_is_compact_ascii_and_reads_back(value):
    sent = ic.json_bytes(value)

    assert value == json.loads(sent.decode("ascii"))
    assert b"\n" not in sent


@pytest.mark.parametrize("value", [b"[]", b"{}", b"0"])
def test_more_values_than_memory_is_meant_for_are_refused_before_they_are_read(value, monkeypatch):
    monkeypatch.setattr(ic, "MAX_JSON_VALUES", 1_000)
    monkeypatch.setattr(ic, "_STRICT_JSON", None)             # it would not be read

    error = refusal_of(b'{"a": [' + b",".join([value] * 1_001) + b"]}")

    assert "more than 1000 values" in error.message


def test_as_many_values_as_are_allowed_are_read(monkeypatch):
    monkeypatch.setattr(ic, "MAX_JSON_VALUES", 1_000)
    body = ic.parse_json_object(b'{"a": [' + b",".join([b"0"] * 999) + b"]}")
    assert 999 == len(body.fields["a"])
