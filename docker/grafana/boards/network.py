"""Links and the directory: what crosses them, how far apart peers are, what goes wrong."""

from __future__ import annotations

from boards.kit import GREEN, RED, Board, Panel, Query

_ME = 'instance=~"$instance"'
_INTERVAL = "[$__rate_interval]"
_SIDE = "{{instance}} {{side}}"


def _dht(quantile: float, name: str) -> Query:
    rate = f"rate(resbm_node_dht_request_seconds_bucket{{{_ME}}}{_INTERVAL})"
    return Query(f"histogram_quantile({quantile}, sum by (kind, le) ({rate}))", f"{{{{kind}}}}: {name}")


BOARD = Board(
    uid="resbm-network",
    title="resbm-node: network",
    description="Links between stages as both ends see them, and requests to the directory.",
    rows=[
        (
            "Links",
            [
                Panel(
                    "timeline",
                    "Links",
                    "Each peer's link to its upstream and to its downstream neighbour.",
                    [Query(f"resbm_node_link_up{{{_ME}}}", _SIDE)],
                    unit="none",
                    width=12,
                    names={"0": ("away", RED), "1": ("open", GREEN)},
                ),
                Panel(
                    "graph",
                    "Links lost",
                    "Links that ended in the last five minutes. What was in flight is sent again.",
                    [Query(f"increase(resbm_node_links_lost_total{{{_ME}}}[5m])", _SIDE)],
                    unit="none",
                    width=12,
                    least=0,
                    steps=((None, GREEN), (3, RED)),
                ),
                Panel(
                    "graph",
                    "Round trip",
                    "TCP's smoothed round trip to each neighbour. What queues on the way is in it.",
                    [Query(f"resbm_node_link_round_trip_seconds{{{_ME}}}", _SIDE)],
                    unit="s",
                    least=0,
                ),
                Panel(
                    "graph",
                    "Least round trip",
                    "The shortest in the last minutes, when queues were empty: the distance between the peers.",
                    [Query(f"resbm_node_link_least_round_trip_seconds{{{_ME}}}", _SIDE)],
                    unit="s",
                    least=0,
                ),
                Panel(
                    "graph",
                    "Segments sent again",
                    "TCP segments per second that were lost on the way, or taken for lost.",
                    [Query(f"rate(resbm_node_link_retransmits_total{{{_ME}}}{_INTERVAL})", _SIDE)],
                    unit="short",
                    axis="segments/s",
                    least=0,
                ),
            ],
        ),
        (
            "Bandwidth",
            [
                Panel(
                    "graph",
                    "Link rate",
                    "Rate at which TCP delivered what was sent to that neighbour. A lower bound: where frames are few "
                    "and small it is one burst over one round trip, far below what the link could carry. Only a link "
                    "that was full shows its rate.",
                    [Query(f"8 * resbm_node_link_rate_bytes_per_second{{{_ME}}}", _SIDE)],
                    unit="bps",
                    log_scale=True,
                ),
                Panel(
                    "graph",
                    "Traffic",
                    "Serialised frames on the link to the next stage: latents forward, gradients backward, control "
                    "frames and token ids included.",
                    [
                        Query(
                            f'8 * rate(resbm_node_wire_bytes_total{{{_ME}, side="downstream"}}{_INTERVAL})',
                            "{{instance}} {{direction}}",
                        )
                    ],
                    unit="bps",
                    least=0,
                ),
                Panel(
                    "graph",
                    "Busy",
                    "Share of time in which bytes for that neighbour were under way. Near 1 the link, or its distance, "
                    "is what the swarm waits for.",
                    [Query(f"rate(resbm_node_link_busy_seconds_total{{{_ME}}}{_INTERVAL})", _SIDE)],
                    unit="percentunit",
                    axis="share of time",
                    least=0,
                ),
                Panel(
                    "graph",
                    "Dense and wire bytes",
                    "What bf16 activations and gradients would have cost on all chosen links, and what crossed them.",
                    [
                        Query(
                            f"sum by (direction) (rate(resbm_node_dense_bytes_total{{{_ME}}}{_INTERVAL}))",
                            "dense {{direction}}",
                        ),
                        Query(
                            "sum by (direction) (rate(resbm_node_wire_bytes_total"
                            f'{{{_ME}, side="downstream"}}{_INTERVAL}))',
                            "wire {{direction}}",
                        ),
                    ],
                    unit="Bps",
                    width=12,
                    log_scale=True,
                ),
                Panel(
                    "graph",
                    "Compression by direction",
                    "Dense bytes divided by wire bytes on all chosen links.",
                    [
                        Query(
                            f"sum by (direction) (rate(resbm_node_dense_bytes_total{{{_ME}}}{_INTERVAL})) "
                            "/ sum by (direction) (rate(resbm_node_wire_bytes_total"
                            f'{{{_ME}, side="downstream"}}{_INTERVAL}))',
                            "{{direction}}",
                        )
                    ],
                    unit="suffix:x",
                    axis="dense / wire",
                    width=12,
                    least=0,
                ),
            ],
        ),
        (
            "Directory and door",
            [
                Panel(
                    "graph",
                    "Directory requests",
                    "Time of requests to the directory (DHT): store renews this peer's entry every 10 s, get looks for "
                    "the others. An entry lives for 30 s.",
                    [_dht(0.5, "median"), _dht(0.9, "90 %")],
                    unit="s",
                    least=0,
                    steps=((None, GREEN), (2.5, RED)),
                ),
                Panel(
                    "graph",
                    "Directory failures",
                    "Requests to the directory that failed in the last five minutes.",
                    [
                        Query(
                            f"sum by (instance, kind) (increase(resbm_node_dht_failures_total{{{_ME}}}[5m]))",
                            "{{instance}} {{kind}}",
                        )
                    ],
                    unit="none",
                    least=0,
                    steps=((None, GREEN), (3, RED)),
                ),
                Panel(
                    "graph",
                    "Refused microbatches",
                    "That came in the last five minutes in frames which failed the checks at the door.",
                    [
                        Query(
                            f'increase(resbm_node_microbatches_total{{{_ME}, result="refused"}}[5m])',
                            "{{instance}}",
                        )
                    ],
                    unit="none",
                    least=0,
                    steps=((None, GREEN), (1, RED)),
                ),
            ],
        ),
    ],
)
