"""What is counted, written for Prometheus, sent elsewhere and reported: by the classes alone."""
import logging
import threading
from types import SimpleNamespace

import pytest
from support import until

import ironcage_proxy as ic

PROXY = ic.PROXY_SCOPE


@pytest.mark.parametrize("event, name", [
    (ic.RouterStarted(1, None), "router_started"),
    (ic.BudgetThresholdReached(50, 1, 2), "budget_threshold_reached")])
def test_an_event_has_the_originals_name(event, name):
    assert name == ic.event_name(event)


@pytest.mark.parametrize("milliseconds, bound", [
    (0, "0.01"), (10, "0.01"), (11, "0.05"), (300_000, "300"), (300_001, "+Inf")])
def test_a_time_is_in_the_bucket_that_it_does_not_pass(milliseconds, bound):
    assert bound == ic.bucket_of(milliseconds)


# Totals and their text.

@pytest.fixture
def totals():
    totals = ic.Totals()
    totals.add(("alice", "openai", "m"), ic.Counts(requests=1, output_tokens=2),
               [("request", "openai", "m", "200"), ("latency", "openai", "0.05")])
    totals.add(("alice", "openai", "m"), ic.Counts(requests=2, cost_microdollars=7),
               [("latency", "openai", "+Inf")])
    totals.add(("bob", "openai", ""), ic.Counts(refused_requests=1))
    totals.observe(("refusal", "rate"))
    return totals


def test_counts_add_up_by_token_provider_and_model(totals):
    everything, of_bob = totals.snapshot(), totals.snapshot("bob")

    assert (3, 1, 2) == (everything["requests"], everything["refused_requests"],
                         everything["tokens"]["output_tokens"])
    assert {"alice": 3, "bob": 0} == {name: counts["requests"]
                                      for name, counts in everything["by_token"].items()}
    assert ["m"] == [*everything["by_model"]]                  # bob's call came to none
    assert (["bob"], 0, 1) == ([*of_bob["by_token"]], of_bob["requests"],
                               of_bob["refused_requests"])


def test_what_is_counted_is_written_and_what_is_not_there_is_left_out(totals):
    budgets = [ic.Budget(PROXY, 10, 7, 1), ic.Budget("alice", None, 7, 0)]
    lines = ic.metrics_text(totals, budgets, {"in_flight": 0}).splitlines()

    for line in ('ironcage_requests_total{provider="openai",model="m",status="200"} 1',
                 'ironcage_refusals_total{reason="rate"} 1',
                 'ironcage_cost_microdollars_total{model="m"} 7',
                 'ironcage_request_seconds_bucket{provider="openai",le="0.01"} 0',
                 'ironcage_request_seconds_bucket{provider="openai",le="0.05"} 1',
                 'ironcage_request_seconds_bucket{provider="openai",le="300"} 1',
                 'ironcage_request_seconds_bucket{provider="openai",le="+Inf"} 2',
                 'ironcage_request_seconds_count{provider="openai"} 2',
                 'ironcage_limit_microdollars{scope="proxy"} 10',
                 'ironcage_spent_microdollars{scope="alice"} 7', "ironcage_in_flight 0"):
        assert line in lines
    for absent in ('limit_microdollars{scope="alice"}', "uptime", "first_byte", "token_refusals"):
        assert not [line for line in lines if absent in line]


# Thresholds.

def test_each_part_of_a_limit_is_reported_once_in_a_period_and_of_a_limit():
    thresholds = ic.Thresholds()
    passed = [(*thresholds.passed(ic.Budget(PROXY, limit, spent, 0, since_s=since_s)),)
              for spent, limit, since_s in (
                  (49, 100, 0), (50, 100, 0), (50, 100, 0), (95, 100, 0), (95, 1_000, 0),
                  (96, 100, 0), (100, 100, 0), (200, 100, 0), (60, 100, 1), (0, 0, 1),
                  (0, None, 1))]

    assert [(), (50,), (), (80, 90), (), (), (100,), (), (50,), (50, 80, 90, 100), ()] == passed


def test_what_a_scope_had_passed_when_it_began_was_reported_before():
    thresholds = ic.Thresholds()
    thresholds.begin([ic.Budget(PROXY, 100, 85, 0)])
    thresholds.begin([ic.Budget(PROXY, 100, 95, 0)])            # it is not new any more

    assert [90] == [*thresholds.passed(ic.Budget(PROXY, 100, 95, 0))]


# What is sent elsewhere.

class Receiver:
    """Takes what an Outbox sends, or refuses it."""

    def __init__(self, *answers, **options):
        self.answers, self.seen, self.told = [*answers], [], threading.Event()
        self.outbox = ic.Outbox("box", self.send, lambda name: None, **{"most": 3, **options})

    def send(self, item, is_first):
        self.seen.append((item, is_first))
        self.told.set()
        return self.answers.pop(0) if self.answers else True

    @property
    def items(self):
        return [item for item, _ in self.seen]


def test_items_are_sent_in_order_as_they_come():
    box = Receiver()
    for item in "ab":
        box.outbox.put(item)
    box.outbox.start()
    until(lambda: "ab" == "".join(box.items))
    box.outbox.put("c")
    box.outbox.stop(0)

    assert ([*"abc"], (0, 0)) == (box.items, box.outbox.counts())


def test_few_wait_until_there_are_enough():
    box = Receiver(at_once=2, every_s=None)
    box.outbox.start()
    box.outbox.put("a")
    assert not box.told.is_set()
    box.outbox.put("b")
    assert box.told.wait(10)
    box.outbox.stop(0)

    assert [*"ab"] == box.items


def test_what_is_refused_is_tried_less_and_less_often_and_not_sooner_for_what_comes():
    box, waits = Receiver(*[False] * 99, at_once=2, every_s=30), []

    def wait_for(is_time, most_s):
        waits.append((is_time(), most_s))
        box.outbox.put("more")
        if len(waits) == 9:
            box.outbox._stop_by_s = ic.time.monotonic() - 1

    box.outbox._changed.wait_for = wait_for
    box.outbox.put("one")
    box.outbox._send_all()

    assert [(False, seconds) for seconds in (30, 1, 2, 4, 8, 16, 32, 60, 60)] == waits


def test_it_is_time_once_enough_wait_or_at_the_end():
    for items, stop_by_s, is_time in (("a", None, False), ("ab", None, True), ("", 1, True)):
        box, seen = Receiver(at_once=2), []

        def wait_for(ready, most_s):
            seen.append(ready())
            box.outbox._stop_by_s = 0

        box.outbox._changed.wait_for = wait_for
        for item in items:
            box.outbox.put(item)
        box.outbox._stop_by_s = stop_by_s
        box.outbox._send_all()
        assert [is_time] == seen


def test_where_there_is_no_more_room_the_oldest_goes_and_is_counted():
    box = Receiver()
    for item in "abcd":
        box.outbox.put(item)

    assert (3, 1) == box.outbox.counts()
    box.outbox.start()
    box.outbox.stop(0)
    assert ([*"bcd"], (0, 1)) == (box.items, box.outbox.counts())


def test_an_item_that_is_dropped_while_it_is_sent_takes_no_other_with_it():
    box = Receiver(most=1)
    box.outbox.put("a")

    def send(item, is_first):
        box.outbox.put("b")                            # there is room for one: "a" is dropped
        return True

    box.outbox._send = send
    box.outbox._is_sent("a", True)

    assert ["b"] == [*box.outbox._waiting]


def test_what_is_not_taken_is_tried_again_and_those_behind_it_wait(monkeypatch):
    monkeypatch.setattr(ic, "RETRY_POLL_S", 0.001)
    box = Receiver(False, False, True)
    for item in "ab":
        box.outbox.put(item)
    box.outbox._stop_by_s = ic.time.monotonic() + 10
    box.outbox._send_all()

    assert [("a", True), ("a", False), ("a", False), ("b", False)] == box.seen


def test_at_the_end_what_is_not_taken_is_tried_until_then_counted_and_logged(caplog):
    box = Receiver(*[False] * 100)
    box.outbox.put("a")
    box.outbox._stop_by_s = ic.time.monotonic() - 1
    box.outbox._send_all()

    assert (1, (0, 1)) == (len(box.seen), box.outbox.counts())
    assert ["box: some were not sent"] == [record.message for record in caplog.records]


@pytest.mark.parametrize("status, is_done, words", [
    (200, True, None), (204, True, None), (302, True, "an alert was refused"),
    (404, True, "an alert was refused"), (408, False, "an alert is not delivered yet"),
    (429, False, "an alert is not delivered yet"), (500, False, "an alert is not delivered yet"),
    (ic.UpstreamUnreachable("the provider cannot be reached"), False,
     "an alert is not delivered yet")])
def test_an_alert_is_done_with_once_it_is_taken_or_refused(monkeypatch, caplog, status, is_done,
                                                           words):
    sent = []

    def posted(opener, url, body):
        sent.append(body)
        if isinstance(status, Exception):
            raise status
        return SimpleNamespace(status=status, close=lambda: None)

    monkeypatch.setattr(ic, "posted", posted)
    secret = "a-secret-of-the-proxy"
    alerts = ic.Alerts("https://chat.example/hook/0123456789", lambda: [None, secret, "short"],
                       lambda name: None)
    alert = {"event": "e", "text": f"it says {secret} and short"}

    assert is_done is alerts._is_done(alert, True)
    assert b"*** and short" in sent[0] and secret.encode() not in sent[0]
    assert [words] * bool(words) == [record.message for record in caplog.records]
    assert "hook" not in "".join(str(record.__dict__) for record in caplog.records)
    alerts._is_done(alert, False)                       # said once, unless it is the end of it
    assert len(caplog.records) == (2 if words == "an alert was refused" else bool(words))


# The reporter.

class Watched:
    """A Reporter, and what it reported."""

    def __init__(self, on_event=None, budgets=()):
        self.alerted, self.told = [], []
        settings = SimpleNamespace(alert_url=None, on_event=on_event, agent_id=None,
                                   provider_id=None)
        accounts = SimpleNamespace(known=lambda scopes: budgets)
        self.reporter = ic.Reporter(settings, ic.Slot(), accounts, list)
        self.reporter.tell_server = self.told.append
        self.reporter.alerts = SimpleNamespace(tell=lambda *alert: self.alerted.append(alert))


def settled(status=200, failure=None, price=object(), first_byte_ms=5, bound=object(), **more):
    call = SimpleNamespace(status=status, model="m", price=price, first_byte_ms=first_byte_ms,
                           bound=bound, has_failed=status != 200 or failure is not None,
                           meter=SimpleNamespace(failure=failure),
                           request=SimpleNamespace(caller=SimpleNamespace(scopes=())))
    row = {"request_id": "r", "token": "alice", "provider": "openai", "price_key": "m",
           "cost_microdollars": 7, "bound_microdollars": 9, "latency_ms": 20, "status": status,
           "estimated": None, "input_tokens": 1, "output_tokens": 2, "cached_input_tokens": None,
           **dict.fromkeys(ic.ATTRIBUTION_HEADERS), **more}
    return call, row


def test_a_settled_call_is_counted_and_reported():
    watched = Watched()
    watched.reporter.settled(*settled())

    [event] = watched.told
    assert ("alice", "openai", 1, 2, 7, False) == (
        event.agent_id, event.provider_id, event.input_tokens, event.output_tokens,
        event.cost_micros, event.is_estimated)
    assert {("request", "openai", "m", "200"): 1, ("latency", "openai", "0.05"): 1,
            ("first_byte", "openai", "0.01"): 1} == watched.reporter.totals.observed()
    assert [] == watched.alerted


@pytest.mark.parametrize("call, code, reason", [
    (dict(status=500), 500, "status 500"), (dict(status=None, first_byte_ms=None), None,
                                            "no answer"),
    (dict(failure="overloaded_error"), 200, "overloaded_error")])
def test_a_failed_call_says_why(call, code, reason):
    watched = Watched()
    watched.reporter.settled(*settled(**call))

    [event] = watched.told
    assert (code, reason) == (event.error_code, event.error_message)
    assert 1 == watched.reporter.totals.snapshot()["failed_requests"]


@pytest.mark.parametrize("cost, bound, is_alerted", [
    (9, object(), False), (10, object(), True), (10, None, False)])
def test_a_call_that_cost_more_than_its_bound_is_an_alert(cost, bound, is_alerted):
    watched = Watched()
    watched.reporter.settled(*settled(cost_microdollars=cost, bound=bound))

    assert ["bound_exceeded"] * is_alerted == [event for event, *_ in watched.alerted]


def test_the_log_says_of_a_call_what_is_known_of_it():
    _, row = settled(estimated="no answer", session="s", price_key=None, input_tokens=None)
    shown = ic.row_shown(row)

    assert ("other", 0, 2, "0.000007", "no answer", "s") == tuple(shown[name] for name in (
        "model", "input_tokens", "output_tokens", "cost_usd", "estimated", "session"))
    exact = ic.row_shown(settled(output_tokens=None)[1])
    assert ("m", 1, 0, False, False) == (exact["model"], exact["input_tokens"],
                                         exact["output_tokens"], "estimated" in exact,
                                         "session" in exact)


@pytest.mark.parametrize("estimated, count", [(None, 0), ("no answer", 1)])
def test_charges_that_are_estimated_are_counted(estimated, count):
    watched = Watched()
    watched.reporter.settled(*settled(estimated=estimated, input_tokens=None, output_tokens=None))

    assert count == watched.reporter.totals.snapshot()["by_token"]["alice"]["estimated_requests"]
    assert (bool(count), 0, 0) == (watched.told[0].is_estimated, watched.told[0].input_tokens,
                                   watched.told[0].output_tokens)


@pytest.mark.parametrize("url", [None, "https://chat.example/hook"])
def test_there_are_alerts_where_there_is_a_url_for_them(url):
    settings = SimpleNamespace(alert_url=url)
    reporter = ic.Reporter(settings, ic.Slot(), None, list)

    assert url == (reporter.alerts and reporter.alerts.url)
    reporter.alert("event", "text", more=1)
    assert url is None or (1, 0) == reporter.alerts.outbox.counts()


def test_a_model_without_a_price_is_not_named_where_a_name_would_be_a_label():
    watched = Watched()
    watched.reporter.settled(*settled(price=None, price_key=None))

    assert "other" == watched.told[0].model
    assert ["other"] == [*watched.reporter.totals.snapshot()["by_model"]]


@pytest.mark.parametrize("scope, is_event", [(PROXY, True), ("alice", False)])
def test_a_threshold_is_an_alert_of_each_scope_and_an_event_of_the_proxys(scope, is_event):
    watched = Watched(budgets=[ic.Budget(scope, 10, 5, 0)])
    watched.reporter.settled(*settled())

    [(event, text, fields)] = watched.alerted
    assert ("budget_threshold", 50, scope) == (event, fields["percent"], fields["scope"])
    assert ("the proxy" if is_event else "the token alice") in text
    assert [ic.BudgetThresholdReached(50, 5, 10)] * is_event == watched.told[:-1]


def test_a_fault_of_who_watches_is_logged_and_ends_nothing(caplog):
    def broken(event):
        raise RuntimeError("theirs")

    watched = Watched(on_event=broken)
    watched.reporter.emit(ic.RouterStarted(1, None))

    assert [logging.ERROR] == [record.levelno for record in caplog.records]
    assert [ic.RouterStarted(1, None)] == watched.told


def test_nothing_is_called_where_nobody_watches(caplog):
    Watched(on_event=None).reporter.emit(ic.RouterStarted(1, None))

    assert [] == caplog.records
