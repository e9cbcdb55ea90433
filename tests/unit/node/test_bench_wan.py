"""The pure parts of `bench wan`: what is measured, what physics allows, and what the tables make of it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from node.bench.wan import plan
from node.bench.wan.limits import PAPER_DENSE_RATIO, is_equivalent, link_limit, next_rate
from node.bench.wan.measurement import Cut, Measurement, TransportCost, between, received_per_token
from node.bench.wan.plan import CALM, Point, System
from node.bench.wan.run import Findings, config_of
from node.bench.wan.tables import summary_of, tables_of
from node.config import preset
from node.errors import ConfigInvalid
from node.lab.shapes import InterfaceCounters
from node.progress import StageTotals

# -- the plan ---------------------------------------------------------------------------------------------------


def full_sweep() -> tuple[Point, ...]:
    return plan.sweep(plan.rates_of(plan.BANDWIDTHS), plan.ROUND_TRIPS_MS, (0.0, 0.01)).points


def test_the_full_sweep_varies_one_thing_at_a_time() -> None:
    points = full_sweep()
    rates = set(plan.rates_of(plan.BANDWIDTHS))
    for delay in (0.0, 100.0):
        assert {p.rate_mbit for p in points if p.round_trip_ms == delay and not p.loss} == rates
    assert {p.round_trip_ms for p in points if p.rate_mbit == 80.0 and not p.loss} == set(plan.ROUND_TRIPS_MS)
    assert {(p.rate_mbit, p.round_trip_ms) for p in points if p.loss} == {(80.0, 0.0), (80.0, 100.0)}
    assert len(points) == len(set(points)) == 24


def test_a_sweep_starts_unshaped_and_changes_delays_as_seldom_as_can_be() -> None:
    points = full_sweep()
    assert points[0] == CALM
    changes = sum(a.round_trip_ms != b.round_trip_ms for a, b in itertools.pairwise(points))
    assert changes == len(plan.ROUND_TRIPS_MS) - 1


@given(
    rates=st.lists(st.none() | st.floats(0.1, 1000), min_size=1, max_size=5),
    delays=st.lists(st.sampled_from([0.0, 30.0, 100.0, 200.0]), min_size=1, max_size=3),
    losses=st.lists(st.sampled_from([0.0, 0.01]), min_size=1, max_size=2),
)
def test_every_narrowed_sweep_has_its_reference_and_no_point_twice(
    rates: list[float | None], delays: list[float], losses: list[float]
) -> None:
    points = plan.sweep(rates, delays, losses).points
    assert CALM in points and len(points) == len(set(points))
    assert {point.round_trip_ms for point in points} == {0.0, *delays}


def test_a_round_trip_is_the_sum_of_both_peers_delays() -> None:
    shape = Point(80.0, 100.0, 0.01).shape
    assert (shape.rate_mbit, shape.delay_ms, shape.loss) == (80.0, 50.0, 0.01)


@pytest.mark.parametrize("text", ["fast", "-1", "0", "nan", "inf", "1e9", ""])
def test_a_bad_bandwidth_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigInvalid, match="--bandwidth"):
        plan.rates_of([text])


def test_other_bad_options_are_refused_by_name() -> None:
    with pytest.raises(ConfigInvalid, match="'deepspeed'"):
        plan.systems_of(["ours", "deepspeed"])
    with pytest.raises(ConfigInvalid, match="--round-trip"):
        plan.require_round_trips([-5.0])
    with pytest.raises(ConfigInvalid, match="--loss"):
        plan.losses_of([100.0])


def test_dense_runs_first_since_it_decides_on_the_equivalent_bandwidth() -> None:
    assert plan.systems_of(["torch", "ours", "dense"])[0] is System.DENSE


def test_the_flush_is_measured_at_four_sizes_and_not_in_a_quick_run() -> None:
    assert sorted([*plan.flush_plans(8, quick=False), 8]) == [4, 8, 16, 32]
    assert not list(plan.flush_plans(8, quick=True))


def test_systems_differ_in_what_crosses_and_in_nothing_else() -> None:
    run = preset("tiny")
    ours, dense, torch = (config_of(system, run) for system in (System.OURS, System.DENSE, System.TORCH))
    assert dense == torch
    assert not dense.bottleneck.enabled and dense.codec.forward == dense.codec.backward == "bf16"
    assert dense.latent_width == run.model.hidden_size and ours.bottleneck == run.bottleneck
    assert (dense.model, dense.plan, dense.optimizer) == (ours.model, ours.plan, ours.optimizer)


# -- limits -----------------------------------------------------------------------------------------------------


def test_a_link_carries_its_rate_divided_by_the_bytes_of_a_token() -> None:
    assert link_limit(8.0, 1000.0) == 1000.0
    assert link_limit(None, 1000.0) == math.inf


@given(full_at=st.floats(0.5, 500), speed_of_light=st.floats(0.3, 1.0))
def test_the_equivalent_bandwidth_is_found_on_a_link_bound_curve(full_at: float, speed_of_light: float) -> None:
    """ratio = min(1, rate / full_at), softened: three measurements beside the sweep's find the paper's ratio."""

    def measured(rate: float) -> float:
        return 1 / (1 + (full_at / rate / speed_of_light) ** 3) ** (1 / 3)

    ratios = {rate: measured(rate) for rate in (1000.0, 80.0, 20.0, 5.0, 1.0)}
    for _ in range(3):
        rate = next_rate(ratios)
        ratios[rate] = measured(rate)
        if is_equivalent(ratios[rate]):
            break
    assert is_equivalent(ratios[rate])


@given(ratios=st.dictionaries(st.floats(0.1, 1e4), st.floats(1e-3, 1.5), min_size=1, max_size=8))
def test_the_next_bandwidth_is_always_a_positive_number(ratios: dict[float, float]) -> None:
    assume(len({round(math.log(rate), 6) for rate in ratios}) == len(ratios))
    assert 0 < next_rate(ratios) < 1e9


def test_a_measured_hit_is_taken_as_it_is() -> None:
    assert next_rate({2.0: PAPER_DENSE_RATIO}) == 2.0
    with pytest.raises(ValueError):
        next_rate({})


# -- measurements -----------------------------------------------------------------------------------------------


def cut(at: float, steps: int, *, mbytes: float) -> Cut:
    """Two stages; all that grows is proportional to the steps, `mbytes` cross per step and direction."""
    wire = int(mbytes * 1e6 * steps)
    totals = StageTotals(
        seconds=at,
        steady_seconds=0.5 * steps,
        steady_microbatches=5 * steps,
        compute_seconds=0.5 * steps,
        wire_bytes_forward=wire,
        wire_bytes_backward=2 * wire,
    )
    first = InterfaceCounters(tx_bytes=int(1.1 * wire), rx_bytes=int(2.2 * wire), tx_packets=steps, rx_packets=steps)
    last = InterfaceCounters(tx_bytes=int(2.2 * wire), rx_bytes=int(1.1 * wire), tx_packets=steps, rx_packets=steps)
    return Cut(at, steps, [totals, StageTotals(seconds=at, compute_seconds=0.25 * steps)], [first, last])


def measured(system: System = System.OURS, point: Point = CALM, step_seconds: float = 1.0) -> Measurement:
    before, after = cut(10.0, 10, mbytes=1.0), cut(10.0 + 4 * step_seconds, 14, mbytes=1.0)
    return between(system, point, before, after, tokens_per_step=800, microbatches=8, shaping="htb")


def test_rates_and_shares_are_those_of_whole_steps() -> None:
    m = measured(point=Point(80.0))
    assert m.tokens_per_second == 800
    assert m.steady_tokens_per_second == pytest.approx(100 * 5 / 0.5)
    assert m.step_seconds == 1.0
    assert m.efficiency == 0.5
    assert m.stages[0].up_bytes == m.stages[1].down_bytes == 4_000_000
    assert m.counted_bytes == 12_000_000 and m.interface_bytes == pytest.approx(13_200_000)
    assert m.busiest_bytes == pytest.approx(8_800_000)
    assert m.utilisation == pytest.approx(0.22)
    assert measured().utilisation is None


def test_no_step_no_measurement() -> None:
    same = cut(1.0, 3, mbytes=1.0)
    with pytest.raises(ValueError):
        between(System.OURS, CALM, same, replace(same, at=9.0), tokens_per_step=1, microbatches=8, shaping="")


# -- tables -----------------------------------------------------------------------------------------------------


def findings() -> Findings:
    at = Point(4.0)
    found = Findings(equivalent_mbit=4.0)
    found.measurements = [
        measured(System.DENSE),
        measured(System.DENSE, at, step_seconds=12.5),
        measured(System.OURS),
        measured(System.OURS, Point(80.0)),
        measured(System.OURS, Point(80.0, 100.0), step_seconds=1.25),
        measured(System.OURS, at, step_seconds=1.0),
    ]
    found.pairs = [(measured(System.OURS), measured(System.OURS, at, step_seconds=1.01))]
    crawl = between(
        System.DENSE,
        Point(1.0),
        cut(10.0, 10, mbytes=1.0),
        replace(cut(34.0, 11, mbytes=1.0), steps=10),
        tokens_per_step=800,
        microbatches=8,
        shaping="htb",
        bytes_per_token=received_per_token(measured(System.DENSE)),
    )
    found.measurements.append(crawl)
    return found


def test_the_summary_holds_what_is_promised() -> None:
    summary = summary_of(findings())
    assert summary["equivalent_mbit"] == 4.0
    assert summary["dense_over_unshaped"] == pytest.approx(0.08)
    assert summary["shaped_over_unshaped"] == pytest.approx(1 / 1.01)
    assert summary["ours_over_dense"] == pytest.approx(12.5 / 1.01)  # of the pairs, all together
    assert summary["ours_over_torch"] is None
    assert summary["latency_100ms_ratio"] == pytest.approx(1.0)  # the steady seconds are the same
    assert summary["latency_100ms_step_ratio"] == pytest.approx(0.8)


def test_the_pace_inside_steps_is_that_of_the_longest_which_have_an_inside() -> None:
    def of(microbatches: int, steady_seconds: float) -> Measurement:
        return replace(measured(), microbatches_per_step=microbatches, steady_seconds=steady_seconds)

    found = findings()
    found.flushes = [(of(16, 1.0), of(16, 2.0)), (of(32, 1.0), of(32, 1.25)), (of(4, 1.0), of(4, 4.0))]
    assert summary_of(found)["latency_100ms_ratio"] == pytest.approx(0.8)
    short = replace(of(32, 1.0), steady_microbatches=0)
    found.flushes[1] = (short, short)
    assert summary_of(found)["latency_100ms_ratio"] == pytest.approx(0.5)


def test_ratios_are_of_whole_steps_where_there_are_any() -> None:
    """What bytes tell is too much: it sent the search for the equivalent bandwidth astray."""
    found = findings()
    assert found.ratios(System.DENSE) == {4.0: pytest.approx(0.08)}
    found.measurements = [m for m in found.measurements if m.point != Point(4.0)]
    assert found.ratios(System.DENSE) == {1.0: pytest.approx(0.042, abs=0.001)}


def test_the_result_file_has_what_follows_from_what_was_measured() -> None:
    calm, *_, crawl = [m for m in findings().told()["measurements"] if m["system"] == "dense"]
    assert calm["tokens_per_second"] == 800 and calm["efficiency"] == 0.5 and calm["counted_bytes"] == 12_000_000
    assert crawl["estimated"] and crawl["efficiency"] is None and crawl["utilisation"] > 0
    assert json.loads(json.dumps(findings().told()))["pairs"][0][1]["point"]["rate_mbit"] == 4.0


def test_tables_tell_what_was_told_from_bytes() -> None:
    tables = tables_of(findings(), preset("demo"))
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    speed = {tuple(row[:2]): row for row in tables[0].rows}
    assert speed["1 Mbit/s", "0 ms"][4] == "≈ 33 (0.042)"
    assert speed["4 Mbit/s", "0 ms"][3] == "800 (1.000)"
    assert all("None" not in cell and "nan" not in cell for table in tables for row in table.rows for cell in row)


def test_bytes_cost_what_the_dense_pipeline_takes_more() -> None:
    found = Findings(transport=[TransportCost(System.DENSE, 0.14, 122.0), TransportCost(System.OURS, 0.09, 2.0)])
    assert summary_of(found)["core_per_100_mbit"] == pytest.approx(0.14 / 1.22)
    assert summary_of(found)["core_per_100_mbit_bytes_alone"] == pytest.approx(0.05 / 1.2)
    assert tables_of(found, preset("demo"))[-1].rows[-1][-1] == "4.2 %"


def test_nothing_measured_is_no_table() -> None:
    assert tables_of(Findings(), preset("demo")) == []
    assert set(summary_of(Findings()).values()) == {None}
