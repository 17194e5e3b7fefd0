"""Server, what of it needs no socket: hosts, refusals as they are kept, probes, prices."""
import pytest
from support import TOKEN

import ironcage_proxy as ic


@pytest.mark.parametrize("authority, host", [
    ("a.example", "a.example"), ("A.Example:8787", "a.example"), ("[::1]", "::1"),
    ("[::1]:8787", "::1"), ("::1", "?"), ("a:b", "?"), ("a:123456", "?"), ("", "?"), (":80", "?"),
    ("[x]", "?"), ("[::1", "?")])
def test_a_host_is_read_from_an_authority(authority, host):
    assert host == ic.host_name(authority)


def test_a_refusal_is_kept_as_text_that_can_be_stored_of_bounded_length():
    error = ic.BadRequest("é\ud800\n" * 999)
    error.model = "m\x00" * 999
    head = ic.RequestHead("POST", "/p" * 999, None, 1, ic.Headers([("session-id", "s")]))

    row = ic.refusal_row(error, "r", "alice", head)

    texts = [value for value in row.values() if isinstance(value, str)]
    assert all(text.isascii() and text.isprintable() for text in texts)
    assert row["path"] == ("/p" * 999)[:ic.MOST_REFUSAL_CHARS]
    assert ("s", 400, "alice", None) == (row["session"], row["status"], row["token"],
                                         row["needed_microdollars"])


def test_a_refusal_before_the_head_was_read_names_no_path_and_no_model():
    row = ic.refusal_row(ic.Unauthorized("no"), "r", "", None)

    assert (None, None, 401, "no") == (row["path"], row["model"], row["status"], row["message"])


def test_a_probe_is_answered_and_says_why_not():
    assert (200, b"ok\n") == (ic.probe_answer(None).status, ic.probe_answer(None).body)
    assert (503, b"why\n") == (ic.probe_answer("why").status, ic.probe_answer("why").body)


@pytest.mark.parametrize("flags, is_refused", [
    ([], False), (["--budget", "1"], True), (["--pricing", "gone.json"], True)])
def test_without_a_price_table_only_a_proxy_without_a_budget_serves(monkeypatch, caplog, flags,
                                                                    is_refused):
    settings = ic.settings_from(["--token", TOKEN, *flags], {})
    monkeypatch.setattr(ic, "prices_path", lambda settings: settings.pricing_path or "gone.json")
    try:
        book = ic.load_prices(settings)
    except ic.Misconfigured as err:
        assert is_refused and "gone.json" in str(err)
    else:
        assert not is_refused and [ic.ECHO_MODEL] == [*book.keys()]
        assert ["there is no pricing.json beside the program: nothing is priced"] == [
            record.message for record in caplog.records]
