"""Errors: each has its status and its names in both dialects, and says one sentence without what
came from outside unseen; what fails by a fault of ours is reported, and ends nothing unseen."""
import pytest

import ironcage_proxy as ic

SENTENCE = "it cannot be done: do something else"
# What is about HTTP itself, of which the request's end is not known: the connection is closed.
CLOSING = {400, 401, 403, 405, 408, 411, 413, 415, 426, 429, 500, 503}


def classes(base=ic.IroncageError):
    """All kinds that differ by their names alone."""
    below = [each for one in base.__subclasses__() for each in classes(one)]
    return [base, *below] if base.__init__ is ic.IroncageError.__init__ else below


EACH_CLASS = pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)


@EACH_CLASS
def test_an_error_has_the_status_of_one_and_its_sentence(kind):
    error = kind(SENTENCE)

    assert 400 <= error.status <= 599
    assert SENTENCE == str(error) == error.message
    assert not error.must_close or error.status in CLOSING


@EACH_CLASS
def test_an_error_for_openais_sdk_has_its_four_members(kind):
    error = kind(SENTENCE, param="model", details={"left": 1})

    assert {"error": {"message": SENTENCE, "type": error.openai_type, "param": "model",
                      "code": error.openai_code, "ironcage": {"left": 1}}} \
        == ic.error_object(error, "openai", "req_1")


@EACH_CLASS
def test_an_error_for_anthropics_sdk_says_our_type_as_its_code(kind):
    error = kind(SENTENCE)
    shown = ic.error_object(error, "anthropic", "req_1")

    assert ("error", "req_1") == (shown["type"], shown["request_id"])
    assert (error.anthropic_type, SENTENCE) == (shown["error"]["type"], shown["error"]["message"])
    assert ("code" in shown["error"]) == error.openai_type.startswith("iron_cage_")
    assert ("details" in shown["error"]) == (error.anthropic_details is not None)


def test_no_two_kinds_of_our_own_have_one_type():
    types = [kind.openai_type for kind in classes() if kind.openai_type.startswith("iron_cage_")]

    assert 9 <= len(types) == len(set(types))


@pytest.mark.parametrize("path, dialect", [
    ("/v1/messages", "anthropic"), ("/v1/messages/count_tokens", "anthropic"),
    ("/anthropic/v1/messages", "anthropic"), ("/v1/v1/messages", "anthropic"),
    ("/v1/chat/completions", "openai"), ("/v1/models", "openai"), ("/v1/messages2", "openai"),
    ("/", "openai"), ("", "openai")])
def test_an_error_is_written_for_the_client_of_its_path(path, dialect):
    assert dialect == ic.dialect_of(path)


@pytest.mark.parametrize("path, dialect", [
    ("/v1/models", "anthropic"), ("/v1/models/nope", "anthropic"), ("/models/nope", "anthropic"),
    ("/anthropic/v1/files/x", "anthropic"), ("/v1/chat/completions", "openai"),
    ("/v1/models2", "openai")])
def test_on_routes_of_both_vendors_a_header_of_anthropics_says_whose_client_asks(path, dialect):
    assert dialect == ic.dialect_of(path, {"anthropic-version": "2023-06-01"})


@pytest.mark.parametrize("path, provider, rest", [
    ("/v1/chat/completions", "", "/v1/chat/completions"),
    ("/chat/completions", "", "/v1/chat/completions"),
    ("/v1/v1/messages", "", "/v1/messages"),
    ("/groq/v1/chat/completions", "groq", "/v1/chat/completions"),
    ("/groq/chat/completions", "groq", "/v1/chat/completions"),
    ("/groq/v1/files", "groq", "/v1/files"), ("/v1/files", "", "/v1/files"),
    ("/ironcage/status", "", "/ironcage/status")])
def test_a_route_of_ours_is_found_however_a_client_spells_it(path, provider, rest):
    assert (provider, rest) == ic.split_path(path)


@pytest.mark.parametrize("name, shown", [
    ("gpt-4o", "gpt-4o"), ("", "?"), ("a\nb", "?"), ("x" * 10_000, "?"), ("\x1b[31m", "?")])
def test_a_name_from_outside_is_shown_where_it_is_one(name, shown):
    assert shown == ic.shown_name(name)


def test_the_nearest_name_is_offered_and_none_that_is_far():
    assert " (did you mean gpt-4o?)" == ic.did_you_mean("gpt-4p", ["claude", "gpt-4o"])
    assert "" == ic.did_you_mean("zzz", ["claude", "gpt-4o"])


def test_a_name_that_is_none_is_not_compared_whatever_its_length(monkeypatch):
    monkeypatch.setattr("difflib.get_close_matches", lambda *_: pytest.fail("it took seconds"))

    assert "" == ic.did_you_mean("gpt-4o" * 1_000_000, ["gpt-4o"])


def test_what_a_check_refuses_is_one_line_that_says_what_it_is_about():
    with pytest.raises(ic.Misconfigured, match="^--port: 7 is none$"), ic.checking("--port:"):
        raise ValueError("7 is none")


@pytest.mark.parametrize("fault", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_thread_that_serving_needs_reports_whatever_ends_it(fault):
    reported = []

    def work():
        raise fault

    thread = ic.Housekeeper("a thread", work, reported.append)
    thread.start()
    thread.join()
    assert ["a thread"] == reported


@pytest.mark.parametrize("failure, words", [
    (OSError(111, "Connection refused"), "Connection refused"), (OSError("no route"), "no route"),
    (ValueError("not a name"), "not a name"), (TimeoutError(), "TimeoutError")])
def test_why_a_connection_failed_is_said_in_words(failure, words):
    assert words == ic._reason(failure)
