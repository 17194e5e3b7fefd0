"""Wires of the proxy without a socket, for what stands above them."""
import ironcage_proxy as ic


class ScriptedWire(ic.Wire):
    """A wire on which reads bring what is scripted: bytes, or an exception; b"" at the end."""

    def __init__(self, *reads, takes=True, waits=False):
        self.reads, self.takes, self.waits = [*reads], takes, waits
        self.received, self.sent, self.is_closed, self.timeouts_s = b"", [], False, []
        self.sent_bytes = 0

    def begin(self):
        self.sent_bytes = 0

    def is_readable(self):
        return self.waits

    def send(self, data, stall_s):
        if isinstance(self.takes, Exception):
            raise self.takes
        if not self.takes:
            raise BrokenPipeError
        self.sent.append(data)
        self.sent_bytes += len(data)

    def receive(self, timeout_s, watched=None):
        self.timeouts_s.append(timeout_s)
        if self.received:
            data, self.received = self.received, b""
            return data
        read = self.reads.pop(0) if self.reads else b""
        if isinstance(read, Exception):
            raise read
        return read

    def shut_down(self):
        self.sent.append("shut down")

    def close(self):
        self.is_closed = True
