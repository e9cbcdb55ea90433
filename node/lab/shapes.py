"""What a link is like, and what has crossed it."""

from __future__ import annotations

from pydantic import Field

from stage_server.config import Fraction, Frozen


class LinkShape(Frozen):
    """One peer's access link. Nothing set: as fast as the machine."""

    rate_mbit: float | None = Field(
        None, ge=0.01, le=100_000, description="Mbit/s of the up-link and of the down-link, each; None: not limited"
    )
    delay_ms: float = Field(
        0.0,
        ge=0,
        le=10_000,
        description="milliseconds, one way, of what enters this peer: a round trip between two peers takes both delays",
    )
    loss: Fraction = Field(0.0, lt=1, description="share of the packets that enter this peer and are dropped")

    @classmethod
    def of_round_trip(cls, rate_mbit: float | None, round_trip_ms: float, loss: float = 0.0) -> LinkShape:
        """The shape of each of two alike peers that are `round_trip_ms` apart."""
        return cls(rate_mbit=rate_mbit, delay_ms=round_trip_ms / 2, loss=loss)

    def __str__(self) -> str:
        rate = "any rate" if self.rate_mbit is None else f"{self.rate_mbit:g} Mbit/s"
        loss = f", {100 * self.loss:g} % loss" if self.loss else ""
        return f"{rate}, {self.delay_ms:g} ms one way{loss}"


UNSHAPED = LinkShape()


class InterfaceCounters(Frozen):
    """The kernel's counters of a peer's interface: IP packets with their Ethernet headers.

    TCP hands the interface batches of segments (GSO), and a batch counts as one packet with one set of headers.
    """

    rx_bytes: int = Field(ge=0)
    tx_bytes: int = Field(ge=0)
    rx_packets: int = Field(ge=0)
    tx_packets: int = Field(ge=0)

    def since(self, earlier: InterfaceCounters) -> InterfaceCounters:
        """What was counted after `earlier`."""
        return InterfaceCounters(
            rx_bytes=self.rx_bytes - earlier.rx_bytes,
            tx_bytes=self.tx_bytes - earlier.tx_bytes,
            rx_packets=self.rx_packets - earlier.rx_packets,
            tx_packets=self.tx_packets - earlier.tx_packets,
        )
