"""A terminal in which a test runs a full-screen program, by tmux: its screen as text, and keys."""
import re
import shutil
import subprocess
import threading
import uuid

TMUX = shutil.which("tmux")
SCREEN_PATIENCE_S = 40              # programs of hundreds of megabytes start in it


class Terminal:
    """A program on a screen of its own. Use as a context manager."""

    def __init__(self, command, environ, folder, columns=120, rows=45):
        self._name = f"cage-{uuid.uuid4().hex[:12]}"            # a tmux server of its own
        self._seen = []
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(rows),
                   "-c", str(folder), "env", "-i", "TERM=xterm-256color",
                   *(f"{name}={value}" for name, value in environ.items()), *command)
        self._tmux("set-option", "-g", "remain-on-exit", "on")

    def _tmux(self, *words):
        return subprocess.run([TMUX, "-L", self._name, *words], check=True, capture_output=True,
                              text=True, timeout=10).stdout

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._tmux("kill-server")

    @property
    def screen(self):
        """What is on the screen now, without the spaces at the ends of lines."""
        return "\n".join(line.rstrip() for line in self._tmux("capture-pane", "-p").splitlines())

    def press(self, *keys):
        """Press keys by their tmux names, as Enter."""
        self._tmux("send-keys", *keys)

    def type(self, text, enter=True):
        """Type a text and press Enter."""
        self._tmux("send-keys", "-l", text)
        if enter:
            self.press("Enter")

    def wait_for(self, pattern):
        """The screen once it matches a pattern. Raises AssertionError with what it showed."""
        for _ in range(int(SCREEN_PATIENCE_S / 0.05)):
            screen = self.screen
            if re.search(pattern, screen):
                return screen
            threading.Event().wait(0.05)
        raise AssertionError(f"the screen never showed {pattern!r}:\n{screen}")
