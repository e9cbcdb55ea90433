"""The whole swarm on one page: is it fast, does it learn, what holds it back."""

from __future__ import annotations

from boards.kit import GREEN, RED, YELLOW, Board, Panel, Query

_RUN = '{run_id=~"$run"}'
_STAGE = '{run_id=~"$run", stage=~"$stage"}'
_BITS = "bps"

BOARD = Board(
    uid="resbm-swarm",
    title="resbm-node: swarm",
    description="One run: its throughput against the bandwidth there is, its loss, and the stage that holds it back.",
    rows=[
        (
            "What the swarm is for",
            [
                Panel(
                    "graph",
                    "Throughput against bandwidth",
                    "Left: tokens trained per second. Right, on a logarithmic axis: what the slowest link between two "
                    "stages was seen to deliver (TCP's own measurement, a lower bound: a link that is never full never "
                    "shows its rate), what the busiest one carries in one direction, and what it would have to carry "
                    "with dense bf16 activations. While the second is far below the links' rate, throughput does not "
                    "depend on them; a dense pipeline would need the third.",
                    [
                        Query(f"run:resbm_node_tokens:rate1m{_RUN}", "{{run}}: tokens/s"),
                        Query(
                            f"8 * run:resbm_node_link_rate_bytes_per_second:min{_RUN}",
                            "slowest link, at least",
                            (_BITS, "link"),
                        ),
                        Query(
                            f"8 * run:resbm_node_wire_bytes:rate1m_max{_RUN}",
                            "busiest link carries",
                            (_BITS, "link"),
                        ),
                        Query(
                            f"8 * run:resbm_node_dense_bytes:rate1m_max{_RUN}",
                            "dense would need",
                            (_BITS, "link"),
                        ),
                    ],
                    unit="short",
                    width=24,
                    height=10,
                    axis="tokens/s",
                    least=0,
                ),
            ],
        ),
        (
            "Now",
            [
                Panel(
                    "stat",
                    "Throughput",
                    "Tokens per second over the last minute, of the stage that is behind.",
                    [Query(f"run:resbm_node_tokens:rate1m{_RUN}", "{{run}}")],
                    unit="short",
                    width=4,
                    height=4,
                ),
                Panel(
                    "stat",
                    "Step",
                    "The newest optimizer step that a stage has committed.",
                    [Query(f"run:resbm_node_step:max{_RUN}", "{{run}}")],
                    unit="none",
                    width=4,
                    height=4,
                ),
                Panel(
                    "stat",
                    "Validation loss",
                    "Nats per token on held-out text, as last measured.",
                    [Query(f"run:resbm_node_validation_loss_nats:avg{_RUN}", "{{run}}")],
                    unit="none",
                    width=4,
                    height=4,
                    decimals=3,
                ),
                Panel(
                    "stat",
                    "Unserved stages",
                    "Stages that nobody serves, by the directory. Training stands still unless this is 0.",
                    [
                        Query(
                            f"count by (run) (run_stage:resbm_node_stage_replicas:min{_RUN} == 0) "
                            f"or 0 * count by (run) (run_stage:resbm_node_stage_replicas:min{_RUN})",
                            "{{run}}",
                        )
                    ],
                    unit="none",
                    width=4,
                    height=4,
                    steps=((None, GREEN), (1, RED)),
                ),
                Panel(
                    "stat",
                    "Wire compression",
                    "Dense bytes divided by wire bytes over the last minute, both directions, all links.",
                    [Query(f"run:resbm_node_wire_compression:ratio1m{_RUN}", "{{run}}")],
                    unit="suffix:x",
                    width=4,
                    height=4,
                    decimals=0,
                    steps=((None, YELLOW), (100, GREEN)),
                ),
                Panel(
                    "stat",
                    "Alerts firing",
                    "Of docker/prometheus/alerts.yml. docs/metrics.md says what to do about each.",
                    [Query('count(ALERTS{alertstate="firing", alertname=~"Resbm.*"}) or vector(0)', "firing")],
                    unit="none",
                    width=4,
                    height=4,
                    steps=((None, GREEN), (1, RED)),
                ),
            ],
        ),
        (
            "Learning and speed",
            [
                Panel(
                    "graph",
                    "Loss",
                    "Nats per token: the newest step's mean over its training microbatches, and the validation loss.",
                    [
                        Query(f"run:resbm_node_loss_nats:avg{_RUN}", "{{run}}: training"),
                        Query(f"run:resbm_node_validation_loss_nats:avg{_RUN}", "{{run}}: validation"),
                    ],
                    unit="none",
                    axis="nats/token",
                    decimals=2,
                ),
                Panel(
                    "graph",
                    "Bottleneck",
                    "Microbatches per second. Bottleneck: the weakest stage's speed, as its peers measured themselves "
                    "when they joined; the swarm cannot be faster. Trained: what it does, at the stage that is behind.",
                    [
                        Query(f"run:resbm_node_bottleneck_microbatches_per_second:min{_RUN}", "{{run}}: bottleneck"),
                        Query(
                            "min by (run) (sum by (run, stage) "
                            '(instance:resbm_node_microbatches:rate1m{run_id=~"$run", result="trained"}))',
                            "{{run}}: trained",
                        ),
                    ],
                    unit="short",
                    axis="microbatches/s",
                    least=0,
                ),
                Panel(
                    "graph",
                    "Stage speeds",
                    "By stage: microbatches per second that all its replicas together measured. The lowest line is the "
                    "bottleneck: a peer is worth most there.",
                    [
                        Query(
                            f"run_stage:resbm_node_stage_microbatches_per_second:min{_STAGE}",
                            "stage {{stage}}",
                        )
                    ],
                    unit="short",
                    axis="microbatches/s",
                    least=0,
                ),
            ],
        ),
        (
            "Stages",
            [
                Panel(
                    "graph",
                    "Replicas per stage",
                    "Peers that serve each stage, by the directory. Below 1 nobody does, and training stands still.",
                    [Query(f"run_stage:resbm_node_stage_replicas:min{_STAGE}", "stage {{stage}}")],
                    unit="none",
                    axis="peers",
                    least=0,
                    decimals=0,
                    steps=((None, RED), (1, GREEN)),
                ),
                Panel(
                    "graph",
                    "Computing",
                    "Share of wall time that each stage computes; the rest it waits for neighbours or for itself. The "
                    "busiest stage's share is the pipeline's efficiency.",
                    [Query(f"instance:resbm_node_compute:share1m{_STAGE}", "stage {{stage}}")],
                    unit="percentunit",
                    axis="share of time",
                    least=0,
                    most=1,
                ),
                Panel(
                    "bars",
                    "Contribution",
                    "Each peer's share of its stage's measured speed. With one replica a stage all are 100 %.",
                    [
                        Query(
                            "resbm_node_contribution_ratio * on (job, instance) group_left (run_id, stage) "
                            f"resbm_node_info{_STAGE}",
                            "stage {{stage}}: {{instance}}",
                        )
                    ],
                    unit="percentunit",
                    least=0,
                    most=1,
                ),
                Panel(
                    "graph",
                    "Wire compression by stage",
                    "Dense bytes divided by wire bytes on the link from each stage to the next, both ways. Control "
                    "frames count too, so a swarm that stands still tends to 0.",
                    [
                        Query(
                            f"sum by (stage) (instance:resbm_node_dense_bytes:rate1m{_STAGE}) "
                            f"/ sum by (stage) (instance:resbm_node_wire_bytes:rate1m{_STAGE})",
                            "stage {{stage}} to the next",
                        )
                    ],
                    unit="suffix:x",
                    axis="dense / wire",
                    least=0,
                ),
                Panel(
                    "graph",
                    "Microbatches",
                    "Per second and by what became of them, all stages together. Replayed: computed again after a "
                    "restart, from what neighbours kept. Refused: came in frames that failed the checks at the door.",
                    [
                        Query(
                            f"sum by (result) (instance:resbm_node_microbatches:rate1m{_STAGE})",
                            "{{result}}",
                        )
                    ],
                    unit="short",
                    axis="microbatches/s",
                    least=0,
                ),
                Panel(
                    "graph",
                    "Time beyond a stage",
                    "Median time from handing a microbatch's latents to the next stage until its gradient is back: the "
                    "way there and back, and all that later stages do in between. The first stage's is the pipe's.",
                    [
                        Query(
                            "histogram_quantile(0.5, sum by (stage, le) (rate(resbm_node_hop_seconds_bucket"
                            "[$__rate_interval]) * on (job, instance) group_left (stage) "
                            f"resbm_node_info{_STAGE}))",
                            "stage {{stage}}",
                        )
                    ],
                    unit="s",
                    least=0,
                ),
            ],
        ),
    ],
)
