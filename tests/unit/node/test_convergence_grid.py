"""Which trainings a grid asks for, and in which order: decided without training anything."""

from __future__ import annotations

import pytest

from node.bench.convergence import read_points, write_points
from node.bench.convergence_grid import Cell, Grid, cells_to_run, config_of, num_cells, parse, shipped
from node.bench.convergence_point import Point
from node.bench.convergence_pool import CellFiles
from node.bench.convergence_results import Result, results_of, seed_noise, summary_of, table_of
from node.errors import ConfigImpossible, ConfigInvalid, ConfigUnreadable

TEXT = """
name = "small"
preset = "tiny"
seeds = [3, 4, 5]
run.plan.steps = 7

[[variants]]
name = "fair"
title = "uncompressed"
role = "fair"
run.bottleneck = { width = 64, projection = "none" }
run.codec = { forward = "none", backward = "none" }

[[variants]]
name = "ours"
title = "ours"
role = "ours_128x"
rates = [0.5, 1.0, 2.0]
"""


def small() -> Grid:
    return parse(TEXT, "here")


def names(cells: list[Cell]) -> list[tuple[str, float, int]]:
    return [(cell.variant, cell.rate, cell.seed) for cell in cells]


def test_other_seeds_wait_for_the_learning_rate() -> None:
    grid = small()
    first = cells_to_run(grid, {})
    assert names(first) == [("fair", 1.0, 3), ("ours", 0.5, 3), ("ours", 1.0, 3), ("ours", 2.0, 3)]
    losses = {cell.key: loss for cell, loss in zip(first, (3.0, 2.5, 2.1, 2.3), strict=True)}
    assert names(cells_to_run(grid, losses)) == [("fair", 1.0, 4), ("fair", 1.0, 5), ("ours", 1.0, 4), ("ours", 1.0, 5)]
    del losses[first[3].key]
    assert names(cells_to_run(grid, losses)) == [("ours", 2.0, 3), ("fair", 1.0, 4), ("fair", 1.0, 5)]
    assert ("ours", 1.0, 4) not in names(cells_to_run(grid, losses)), "the best rate is not known yet"
    assert num_cells(grid) == 3 + 5


def test_only_the_best_rate_counts() -> None:
    grid = small()
    points = [point(cell, loss) for cell, loss in zip(cells_to_run(grid, {}), (3.0, 2.5, 2.9, 2.3), strict=True)]
    torn = point(cells_to_run(grid, {})[2], 0.1).model_copy(update={"step": 3})
    ours = results_of(grid, [*points, torn.model_copy(update={"seed": 4})])[1]
    assert (ours.rate, ours.losses) == (2.0, [2.3]), "a training that has not ended does not count"
    assert ours.tried == {0.5: 2.5, 1.0: 2.9, 2.0: 2.3}


def test_a_cell_is_the_presets_run_with_both_changes() -> None:
    grid = small()
    fair, ours = (config_of(grid, variant, 2.0, 4) for variant in grid.variants)
    assert fair.plan.steps == ours.plan.steps == 7
    assert (fair.codec.forward, ours.codec.forward) == ("none", "int4")
    assert fair.latent_width == 64
    assert ours.optimizer.muon_lr == ours.optimizer.adamw_lr == pytest.approx(0.012)
    assert fair.seed == ours.seed == 4
    assert fair.model == ours.model and fair.data == ours.data


def test_another_config_is_another_cell() -> None:
    """Results of an older grid must never pass for those of a changed one."""
    changed = parse(TEXT.replace("steps = 7", "steps = 8"), "here")
    keys = {cell.key for cell in cells_to_run(small(), {})}
    assert not keys & {cell.key for cell in cells_to_run(changed, {})}


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("name = ", ConfigUnreadable, "not TOML"),
        (TEXT + '[[variants]]\nname = "ours"\ntitle = "again"', ConfigInvalid, "two variants are called ours"),
        (TEXT.replace("rates =", "rate ="), ConfigInvalid, "variants.1.rate"),
        (TEXT.replace("seeds = [3, 4, 5]", "seeds = []"), ConfigInvalid, "seeds"),
        (TEXT.replace("preset =", "extends ="), ConfigInvalid, "there is no grid 'tiny'"),
    ],
)
def test_bad_grids_are_refused(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse(text, "here")


def test_a_bad_variant_is_named() -> None:
    grid = parse(TEXT.replace('role = "ours_128x"', "run.bottleneck.width = 65"), "here")
    with pytest.raises(ConfigImpossible, match="variant ours"):
        cells_to_run(grid, {})


@pytest.mark.parametrize("name", ["quick", "main", "longer", "wider", "deep", "vocabulary-2048"])
def test_shipped_grids_compare_what_the_summary_needs(name: str) -> None:
    roles = {variant.role for variant in shipped(name).variants}
    assert {"uncompressed", "fair", "ours_128x", "control"} <= roles


@pytest.mark.parametrize(
    "name", ["quick", "main", "longer", "wider", "width-192", "preset-demo", "deep", "questions", "vocabulary-2048"]
)
def test_shipped_grids_can_be_run(name: str) -> None:
    grid = shipped(name)
    for cell in cells_to_run(grid, {}):
        assert cell.config.plan.evaluate_every and cell.config.plan.evaluation_microbatches


def test_a_grid_may_change_another_ones_run() -> None:
    text = TEXT.replace('preset = "tiny"', 'extends = "main"').replace("width = 64", "width = 192")
    grid, main = parse(text, "here"), shipped("main")
    ours = cells_to_run(grid, {})[1].config
    assert grid.preset == main.preset
    assert (ours.plan.steps, ours.plan.batch) == (7, 8), "what it says itself, and what it leaves unsaid"
    assert ours.model.hidden_size == main.run["model"]["hidden_size"]
    assert [variant.name for variant in grid.variants] == ["fair", "ours"]
    assert grid.seeds == (3, 4, 5)
    assert parse(text.replace("seeds = [3, 4, 5]", ""), "here").seeds == main.seeds


def test_unknown_grid() -> None:
    with pytest.raises(ConfigInvalid, match="there is no grid 'nought'"):
        shipped("nought")


def point(cell: Cell, val_loss: float, wire_compression: float | None = None) -> Point:
    return Point(
        variant=cell.variant,
        rate=cell.rate,
        seed=cell.seed,
        run_id=cell.config.run_id,
        step=cell.config.plan.steps,
        tokens=1,
        val_loss=val_loss,
        train_loss=None,
        wire_compression=wire_compression,
        wire_bytes_per_token=None,
        parameters=1000,
    )


def test_results_are_told_against_the_fair_control(tmp_path_factory: pytest.TempPathFactory) -> None:
    grid, files = small(), CellFiles(tmp_path_factory.mktemp("cells"))
    losses: dict[str, float] = {}
    while missing := cells_to_run(grid, losses):
        for cell in missing:
            loss = {"fair": 3.0, "ours": 3.2}[cell.variant] + 0.01 * cell.seed + abs(cell.rate - 1.0)
            files.append(cell.key, point(cell, loss, 100.0 * cell.rate))
            losses[cell.key] = loss
    assert files.final_losses(grid) == losses
    kept = tmp_path_factory.mktemp("kept") / "points.jsonl"
    write_points(kept, files.all_points(grid))
    results: list[Result] = results_of(grid, read_points(kept))
    assert [len(result.losses) for result in results] == [3, 3]
    summary = summary_of(results)
    assert summary["gap_128x"] == pytest.approx(0.2)
    assert summary["wire_compression_128x"] == pytest.approx(100.0)
    assert seed_noise(results) == pytest.approx(0.01)
    assert table_of(results).rows[1][-3:] == ["+0.200", "-", "-"]


def test_the_share_of_depth_lies_between_the_control_and_the_fair_one() -> None:
    """What the last stage alone lacks of the fair control is all that a wire can bring."""
    control = '[[variants]]\nname = "alone"\ntitle = "alone"\nrole = "control"\nrun.stages = 1'
    grid = parse(f"{TEXT}\n{control}", "here")

    def results(alone: float) -> list[Result]:
        losses = {"fair": 2.0, "ours": 2.1, "alone": alone}
        cells = [cell for cell in cells_to_run(grid, {}) if cell.rate == 1.0]
        return results_of(grid, [point(c, losses[c.variant], None if c.variant == "alone" else 100.0) for c in cells])

    def shares(alone: float) -> object:
        return summary_of(results(alone)).get("share_of_depth")

    assert shares(2.4) == pytest.approx({"fair": 1.0, "ours": 0.75})
    assert shares(2.05) == pytest.approx({"fair": 1.0, "ours": -1.0})
    assert shares(1.9) is None
    in_the_table = [[row[-2] for row in table_of(results(alone)).rows] for alone in (2.4, 2.05, 1.9)]
    assert in_the_table == [["100 %", "75 %", "-"], ["100 %", "< 0 %", "-"], ["-", "-", "-"]]


def test_what_one_seed_has_done_is_compared_with_the_same_seed() -> None:
    """A second seed of the control alone moves no difference."""
    grid = small()
    first = [cell for cell in cells_to_run(grid, {}) if cell.rate == 1.0]
    second = cells_to_run(grid, {cell.key: 0.0 for cell in cells_to_run(grid, {})})[0]
    assert (second.variant, second.seed) == ("fair", 4)
    points = [point(cell, {"fair": 2.0, "ours": 2.1}[cell.variant], 100.0) for cell in first]
    for further in ([], [point(second, 1.0, 100.0)]):
        results = results_of(grid, [*points, *further])
        assert summary_of(results)["gap_128x"] == pytest.approx(0.1)
        assert table_of(results).rows[1][7] == "+0.100"
    assert summary_of(results)["loss"]["fair"] == 1.5


def test_a_torn_line_is_left_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The machine died in the middle of a write: the point is computed again, the others stand."""
    folder = tmp_path_factory.mktemp("cells")
    files, cell = CellFiles(folder), cells_to_run(small(), {})[0]
    early = point(cell, 4.0).model_copy(update={"step": 3})
    files.append(cell.key, early)
    with (folder / f"{cell.key}.jsonl").open("a") as file:
        file.write('{"event": "eval')
    assert files.points(cell.key) == [early]
    files.append(cell.key, point(cell, 3.0))
    assert [known.step for known in files.points(cell.key)] == [3, 7]
    assert files.is_done(cell)
