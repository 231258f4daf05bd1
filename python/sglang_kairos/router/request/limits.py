"""How much a router takes on at once: requests in flight, and bytes of request bodies held."""

from __future__ import annotations


class Full(Exception):
    """The router itself is at one of its limits; the text names it."""


class TooLarge(Exception):
    """One body exceeds what is accepted; the text says how much that is."""


class Limits:
    """0 in flight means no limit. Take with `enter` and `hold`, give back with `leave`."""

    def __init__(self, max_in_flight: int, max_body_bytes: int, max_held_bytes: int) -> None:
        self.in_flight = 0
        self.held_bytes = 0
        self._max_in_flight = max_in_flight
        self._max_body_bytes = max_body_bytes
        self._max_held_bytes = max_held_bytes

    def enter(self) -> None:
        """One more request. Full if there is no room for it."""
        if self._max_in_flight and self.in_flight >= self._max_in_flight:
            raise Full(f"{self.in_flight} requests are in flight (--max-concurrent-requests)")
        self.in_flight += 1

    def hold(self, more: int, so_far: int) -> None:
        """`more` bytes of a body of which `so_far` are held. TooLarge or Full."""
        if so_far + more > self._max_body_bytes:
            raise TooLarge(f"a body may have {self._max_body_bytes} bytes (--max-payload-size)")
        if self.held_bytes + more > self._max_held_bytes:
            raise Full(f"{self.held_bytes} bytes of request bodies are held (--max-held-bytes)")
        self.held_bytes += more

    def leave(self, held: int) -> None:
        """A request that held so many bytes is over."""
        self.in_flight -= 1
        self.held_bytes -= held
