"""What the error matrices of both official SDKs share: a row, what a situation sets up, and those
situations that are alike for both vendors."""
import threading
from dataclasses import dataclass

from support import PATIENCE_S, Close, Cut, Hang, Reply, status_of

BUDGET = ("--budget", "10.00")


@dataclass(frozen=True)
class Row:
    """What a situation comes to: for whole answers, for streams, at the provider, in money."""
    whole: str                      # the exception's exact class, and its HTTP status
    streamed: str
    attempts: int                   # requests that the provider sees
    charged: str                    # "nothing", or "at most": by the rule of chapter 21
    code: object                    # error.code, or error.type in Anthropic's body
    words: str                      # in the exception's message


class Stage:
    """What a situation sets up before the call."""

    def __init__(self, mock, fields=None):
        self.mock, self.fields = mock, fields or {}
        self.argv, self.environ, self.timeouts = BUDGET, None, None
        self.client_options = {}
        self.is_over = threading.Event()

    def breaks_with(self, *steps):
        """The provider answers as it does, but for the steps with which it breaks off midway."""
        def reply(request):
            whole = self.mock.default_reply(request)
            parts = whole.steps if len(whole.steps) > 1 else (whole.body[:40], whole.body[40:])
            half = len(parts) // 2
            return whole.with_steps([*parts[:half], *steps, *parts[half:]])
        self.mock.always = reply

    def never_answers(self):
        def reply(_):
            self.is_over.wait(PATIENCE_S)
            return Reply(answers=False)
        self.mock.always = reply


def provider_never_answers(stage):
    stage.timeouts = {"first_byte_s": 0.2}
    stage.never_answers()


def answer_stalls(stage):
    stage.timeouts = {"between_bytes_s": 0.2}
    stage.breaks_with(Hang())


SITUATIONS = {
    "token is wrong": lambda stage: stage.client_options.update(api_key="ic_wrong"),
    "nothing is left": lambda stage: setattr(stage, "argv", ("--budget", "0")),
    "provider is unreachable": lambda stage: stage.mock.refuse_connections(),
    "provider closes without an answer": lambda stage: setattr(
        stage.mock, "always", Reply(answers=False)),
    "provider never answers": provider_never_answers,
    "answer is reset in its middle": lambda stage: stage.breaks_with(Cut()),
    "answer ends in its middle": lambda stage: stage.breaks_with(Close()),
    "answer stalls in its middle": answer_stalls,
}


def noting_reservations(mock, proxy):
    """Let the mock note what is reserved whenever a request reaches it; the list of notes."""
    notes, behaviour = [], mock.always or mock.default_reply

    def reply(request):
        notes.append(status_of(proxy)["reserved_microdollars"])
        return behaviour(request) if callable(behaviour) else behaviour

    mock.always = reply
    return notes


def described(error):
    """The exact class of an exception, and the HTTP status that it carries."""
    return f"{type(error).__name__} {getattr(error, 'status_code', 'in stream')}"
