"""One peer from within: what it does with its time, memory and disk."""

from __future__ import annotations

from boards.kit import BLUE, GREEN, RED, YELLOW, Board, Panel, Query

_ME = 'instance=~"$instance"'
_INTERVAL = "[$__rate_interval]"
_NAME = "{{instance}}"


def _hop(quantile: float, name: str) -> Query:
    rate = f"rate(resbm_node_hop_seconds_bucket{{{_ME}}}{_INTERVAL})"
    return Query(f"histogram_quantile({quantile}, sum by (instance, le) ({rate}))", f"{_NAME}: {name}")


BOARD = Board(
    uid="resbm-node",
    title="resbm-node: node",
    description="Chosen peers from within: state, progress, time, queues, the codec's error, memory and disk.",
    rows=[
        (
            "State",
            [
                Panel(
                    "timeline",
                    "State",
                    "What each peer was doing. Joining: it builds its weights. Draining: it was asked to leave.",
                    [
                        Query(
                            f'resbm_node_state{{{_ME}, state="joining"}} '
                            f'+ ignoring (state) 2 * resbm_node_state{{{_ME}, state="serving"}} '
                            f'+ ignoring (state) 3 * resbm_node_state{{{_ME}, state="draining"}} '
                            f'+ ignoring (state) 4 * resbm_node_state{{{_ME}, state="complete"}}',
                            _NAME,
                        )
                    ],
                    unit="none",
                    width=12,
                    height=6,
                    names={
                        "1": ("joining", YELLOW),
                        "2": ("serving", GREEN),
                        "3": ("draining", YELLOW),
                        "4": ("complete", BLUE),
                    },
                ),
                Panel(
                    "bars",
                    "Stage",
                    "Stage that each peer serves; 0 has the embedding.",
                    [Query(f"resbm_node_stage{{{_ME}}}", _NAME)],
                    unit="none",
                    width=6,
                    height=6,
                    least=0,
                ),
                Panel(
                    "bars",
                    "Progress",
                    "Steps committed, as a share of the run's.",
                    [Query(f"resbm_node_step{{{_ME}}} / resbm_node_planned_steps{{{_ME}}}", _NAME)],
                    unit="percentunit",
                    width=6,
                    height=6,
                    least=0,
                    most=1,
                ),
            ],
        ),
        (
            "Work",
            [
                Panel(
                    "graph",
                    "Time",
                    "Where wall time goes, as shares that add up to 1 for one peer (choose one). Waiting is for "
                    "neighbours; idle is what is left: writing, sending, the event loop. Told at commits.",
                    [
                        Query(
                            f"sum by (instance) (rate(resbm_node_{kind}_seconds_total{{{_ME}}}{_INTERVAL}))",
                            f"{_NAME}: {kind}",
                        )
                        for kind in ("compute", "wait", "idle")
                    ],
                    unit="percentunit",
                    axis="share of time",
                    least=0,
                ),
                Panel(
                    "graph",
                    "Queue, in flight and window",
                    "Microbatches. Queue: input is here, waiting to be computed. In flight: forwarded and not done "
                    "yet. Window: the most that the first stage lets be in flight; it follows the round trip.",
                    [
                        Query(f"resbm_node_queue_microbatches{{{_ME}}}", f"{_NAME}: queue"),
                        Query(f"resbm_node_in_flight_microbatches{{{_ME}}}", f"{_NAME}: in flight"),
                        Query(f"resbm_node_window_microbatches{{{_ME}}}", f"{_NAME}: window"),
                    ],
                    unit="none",
                    axis="microbatches",
                    least=0,
                ),
                Panel(
                    "graph",
                    "Time beyond this stage",
                    "From handing a microbatch's latents to the downstream link until its gradient is back. The last "
                    "stage has none.",
                    [_hop(0.5, "median"), _hop(0.95, "95 %")],
                    unit="s",
                    least=0,
                ),
                Panel(
                    "graph",
                    "Microbatches",
                    "Per second, by what became of them here.",
                    [
                        Query(
                            f"sum by (instance, result) (rate(resbm_node_microbatches_total{{{_ME}}}{_INTERVAL}))",
                            f"{_NAME}: {{{{result}}}}",
                        )
                    ],
                    unit="short",
                    axis="microbatches/s",
                    least=0,
                ),
                Panel(
                    "graph",
                    "Codec error",
                    "Relative error that writing adds, of one microbatch a step: latents forward, gradients backward. "
                    "4 bits on unit-RMS latents cost about 0.1.",
                    [Query(f"resbm_node_codec_error_ratio{{{_ME}}}", f"{_NAME}: {{{{direction}}}}")],
                    unit="percentunit",
                    axis="of the norm",
                    least=0,
                    steps=((None, GREEN), (0.3, RED)),
                ),
                Panel(
                    "graph",
                    "Gradient norm",
                    "Of this stage's gradient, before clipping.",
                    [Query(f"resbm_node_gradient_norm{{{_ME}}}", _NAME)],
                    unit="none",
                    least=0,
                ),
            ],
        ),
        (
            "Machine",
            [
                Panel(
                    "graph",
                    "Memory",
                    "Resident memory of the worker process. Its directory process and supervisor are not in it.",
                    [Query(f"process_resident_memory_bytes{{{_ME}}}", _NAME)],
                    unit="bytes",
                    width=6,
                    least=0,
                ),
                Panel(
                    "graph",
                    "Processor",
                    "Cores that the worker process keeps busy.",
                    [Query(f"rate(process_cpu_seconds_total{{{_ME}}}{_INTERVAL})", _NAME)],
                    unit="none",
                    axis="cores",
                    width=6,
                    least=0,
                ),
                Panel(
                    "graph",
                    "Checkpoint time",
                    "Mean time to write a checkpoint.",
                    [
                        Query(
                            f"rate(resbm_node_checkpoint_seconds_sum{{{_ME}}}{_INTERVAL}) "
                            f"/ (rate(resbm_node_checkpoint_seconds_count{{{_ME}}}{_INTERVAL}) > 0)",
                            _NAME,
                        )
                    ],
                    unit="s",
                    width=6,
                    least=0,
                ),
                Panel(
                    "graph",
                    "Disk",
                    "Free space where checkpoints are written, and the newest checkpoint's size.",
                    [
                        Query(f"resbm_node_state_folder_free_bytes{{{_ME}}}", f"{_NAME}: free"),
                        Query(f"resbm_node_checkpoint_size_bytes{{{_ME}}}", f"{_NAME}: checkpoint"),
                    ],
                    unit="bytes",
                    width=6,
                    log_scale=True,
                ),
            ],
        ),
    ],
)
