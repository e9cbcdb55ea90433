"""How much of a peer's upload its stage's state may take, so that training is not starved. Without clocks or I/O."""

from __future__ import annotations


class TokenBucket:
    """A rate shared by all who send: each says how much, and is told how long to wait first.

    Args:
        bytes_per_second: mean rate, more than 0.
        burst_bytes: what may go at once after a pause.
    """

    def __init__(self, bytes_per_second: float, burst_bytes: int) -> None:
        self._rate, self._burst = bytes_per_second, float(burst_bytes)
        self._level, self._at = float(burst_bytes), float("-inf")

    def wait_seconds(self, num_bytes: int, now: float) -> float:
        """Takes `num_bytes`, on credit if need be; the seconds until they may be sent."""
        self._level = min(self._burst, self._level + (now - self._at) * self._rate) - num_bytes
        self._at = now
        return max(0.0, -self._level / self._rate)


class DownloadSlots:
    """Who may download at the same time. A downloader keeps its place for a while after its last call.

    Args:
        max_downloads: places.
        max_calls: open calls of one downloader.
        keep_seconds: how long a place is kept for one who has no call open.
    """

    def __init__(self, max_downloads: int, max_calls: int, keep_seconds: float) -> None:
        self._max_downloads, self._max_calls, self._keep = max_downloads, max_calls, keep_seconds
        self._calls: dict[str, int] = {}
        self._last: dict[str, float] = {}

    def enter(self, downloader: str, now: float) -> bool:
        """A call begins; False: it may not."""
        for name in [name for name, at in self._last.items() if not self._calls.get(name) and now - at >= self._keep]:
            del self._last[name]
        if downloader not in self._last and len(self._last) >= self._max_downloads:
            return False
        if self._calls.get(downloader, 0) >= self._max_calls:
            return False
        self._calls[downloader] = self._calls.get(downloader, 0) + 1
        self._last[downloader] = now
        return True

    def leave(self, downloader: str, now: float) -> None:
        """A call that was let in is over."""
        self._last[downloader] = now
        self._calls[downloader] -= 1
        if not self._calls[downloader]:
            del self._calls[downloader]
