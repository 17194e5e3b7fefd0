"""JSON schemas alone: what of one a vendor takes and enforces, and what becomes words."""
import json

import pytest

import ironcage_proxy as ic


def test_a_schema_of_doubling_references_is_walked_once():
    """Each definition names the next one twice: 2 to the 2,000th ways, and one walk."""
    schema = {"$ref": "#/$defs/d0", "$defs": {
        f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(2000)}}

    assert not ic._is_recursive(schema)


@pytest.mark.parametrize("pattern, is_kept", [
    ("^[a-z]+(?:-[0-9]{2,4})?$", True), (r"^\d+\.\w*$", True), (r"^(?=.*\d).+$", False),
    (r"(?<!a)b", False), (r"(a)\1", False), (r"\bword\b", False)])
def test_a_pattern_that_claude_does_not_take_becomes_words(pattern, is_kept):
    schema = {"type": "string", "pattern": pattern}

    assert ic.claude_schema(schema) == (schema if is_kept else {
        "type": "string", "description": f"pattern: {json.dumps(pattern)}"})


def test_a_schema_that_wraps_another_is_that_one():
    wrapped = {"title": "T", "description": "d", "allOf": [{"type": "string", "title": "U"}]}
    assert {"title": "U", "description": "d", "type": "string"} == ic.claude_schema(wrapped)
    extended = {"type": "object", "properties": {}, "allOf": [{"title": "U"}]}
    assert [{"title": "U"}] == ic.claude_schema(extended)["allOf"]


def test_what_may_be_anything_stays_so_in_a_schema():
    schema = {"type": "object", "properties": {"a": True, "b": {"type": "array", "items": True}}}

    assert schema["properties"] == ic.claude_schema(schema)["properties"]


@pytest.mark.parametrize("description", [5, {"a": 1}, ["a", 5]])
def test_a_description_in_a_schema_that_is_no_text_is_left_out(description):
    schema = {"type": "integer", "minimum": 3, "description": description}

    assert {"type": "integer", "description": "minimum: 3"} == ic.claude_schema(schema)
