"""The run file: what is read equals what was written, and every mistake is named by its key."""

from __future__ import annotations

import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import config as run_config
from node.config import RunConfig, dump_toml, load, load_toml, preset, preset_names
from node.errors import ConfigImpossible, ConfigInvalid, ConfigUnreadable

ALL_PRESETS = ["demo", "h4096", "h4096-narrow", "narrow", "qwen3-tiny", "tiny", "wide"]


def num_parameters(config: RunConfig) -> int:
    """Of a Llama with an anchor per later stage, by arithmetic; boundaries and norms are left out."""
    model = config.model
    head = model.hidden_size // model.num_attention_heads
    attention = 2 * model.hidden_size**2 + 2 * model.hidden_size * head * model.num_key_value_heads
    layer = attention + 3 * model.hidden_size * model.intermediate_size
    return model.num_hidden_layers * layer + (1 + config.stages) * model.vocab_size * model.hidden_size


def test_presets_are_these() -> None:
    assert preset_names() == ALL_PRESETS


@pytest.mark.parametrize("name", ALL_PRESETS)
def test_a_preset_is_named_as_its_file_and_survives_writing(name: str) -> None:
    config = preset(name)
    assert config.name == name
    assert load_toml(dump_toml(config)) == config


def test_the_demo_is_as_large_and_as_short_as_promised() -> None:
    config = preset("demo")
    plan = config.plan
    assert 10e6 < num_parameters(config) < 15e6
    assert plan.steps * plan.microbatches_per_step * plan.batch * plan.tokens < 650_000


def test_latent_widths_of_the_wire_measurements() -> None:
    assert [preset(name).latent_width for name in ("demo", "narrow", "h4096", "h4096-narrow")] == [10, 2, 120, 28]


def test_written_file_explains_every_key() -> None:
    lines = dump_toml(preset("demo")).splitlines()
    for before, line in pairwise(lines):
        if "=" in line and not line.startswith("#"):
            assert "  # " in line or before.startswith("# "), line


def test_written_file_shows_what_is_allowed() -> None:
    text = dump_toml(preset("demo"))
    assert 'backward = "int4"  # "none" | "bf16" | "int8" | "int4" | "int2": latent gradients' in text
    assert 'anchor = "embedding"  # "none" | "embedding" | "independent"' in text


json_values = st.recursive(
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    extra=st.dictionaries(st.text(min_size=1, max_size=9), json_values, max_size=3),
    paths=st.lists(st.text(), min_size=1, max_size=3),
    lr=st.floats(1e-12, 1e3),
    width=st.sampled_from(["default", "narrow"]) | st.integers(1, 384),
)
def test_any_run_survives_writing(extra: dict[str, object], paths: list[str], lr: float, width: int | str) -> None:
    values = {
        "model": {"extra": extra},
        "optimizer": {"muon_lr": lr},
        "bottleneck": {"width": width},
        "data": {"source": "files", "paths": paths},
    }
    config = run_config.validated(values, "test")
    again = load_toml(dump_toml(config))
    assert again == config
    assert again.run_id == config.run_id


def test_run_id_is_stable_and_depends_on_every_kind_of_field() -> None:
    base = load_toml("")
    assert len(base.run_id) == 16
    assert int(base.run_id, 16) >= 0
    assert load_toml("stages = 4\nseed = 0").run_id == base.run_id
    assert load_toml("[optimizer]\nweight_decay = 0").run_id == load_toml("[optimizer]\nweight_decay = 0.0").run_id
    others = {
        load_toml(text).run_id for text in ("seed = 1", 'name = "x"', "[plan]\nsteps = 3", "[model]\nextra.a = 1")
    }
    assert len(others | {base.run_id}) == 5


def test_run_id_never_changes_for_a_given_file() -> None:
    """A changed default or form would cut peers of different versions apart without a word; then change this number."""
    assert preset("tiny").run_id == "7112c1b103af6fb8"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stagse = 3", "unknown key stagse, did you mean stages?"),
        ("[model]\nhiden_size = 3", "unknown key model.hiden_size, did you mean hidden_size?"),
        ("[modle]\nhidden_size = 3", "unknown key modle, did you mean model?"),
        ("zzz = 1", "unknown key zzz"),
        ("[plan]\nsteps = 0", "plan.steps = 0 should be greater than or equal to 1"),
        ('[plan]\nsteps = "many"', "plan.steps = 'many' should be a valid integer"),
        ("[plan]\nsteps = 1.5", "plan.steps = 1.5 should be a valid integer"),
        (
            '[codec]\nforward = "int5"',
            "codec.forward = 'int5' should be 'none', 'bf16', 'int8', 'int4', 'int2' or 'int4_token'",
        ),
        ('[bottleneck]\nwidth = "wide"', "bottleneck.width = 'wide' should be 'default' or 'narrow'"),
        ("[optimizer]\nadamw_betas = [0.9, 2]", "optimizer.adamw_betas = 2 should be less than or equal to 1"),
        ("[optimizer]\nmuon_lr = nan", "optimizer.muon_lr = nan should be a finite number"),
        ("model = 3", "model = 3 should be a table"),
        ("seed = -1", "seed = -1 should be greater than or equal to 0"),
        ('name = "a b"', "name = 'a b' should be text of the form"),
        ('[replicas]\naveraging = "dilco"', "replicas.averaging = 'dilco' should be 'none', 'sync' or 'diloco'"),
        ("[replicas.diloco]\ninner_steps = 0", "replicas.diloco.inner_steps = 0 should be greater than or equal to 1"),
        ("[replicas.diloco]\nouter_lr = 0", "replicas.diloco.outer_lr = 0 should be greater than 0"),
        ("[replicas.diloco]\nouter_momentum = 1", "replicas.diloco.outer_momentum = 1 should be less than 1"),
        ('[replicas.diloco]\nwire = "int8"', "replicas.diloco.wire = 'int8' should be 'fp16' or 'fp32'"),
        ("[replicas.diloco]\nouter = 1", "unknown key replicas.diloco.outer, did you mean outer_lr?"),
        ("[model.extra]\nrope = inf", "model.extra holds a value that JSON cannot"),
        ("[model.extra]\nday = 1979-05-27", "model.extra holds a value that JSON cannot"),
    ],
)
def test_wrong_values_are_named(text: str, words: str) -> None:
    with pytest.raises(ConfigInvalid) as refusal:
        load_toml(text, "my.toml")
    assert refusal.value.cause.startswith("my.toml: ")
    assert words in refusal.value.cause
    assert int(refusal.value.code) == 102


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(ConfigInvalid, match=r"plan\.steps = 0 .*; unknown key plan\.token, did you mean tokens\?"):
        load_toml("[plan]\nsteps = 0\ntoken = 3")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages = 9", "stages = 9 is more than model.num_hidden_layers = 4"),
        ("[bottleneck]\nwidth = 385", "bottleneck.width = 385 is wider than hidden_size = 384"),
        ("[model]\nnum_attention_heads = 7", "num_attention_heads = 7 is not a multiple of num_key_value_heads = 6"),
        ("[model]\nhidden_size = 100", "hidden_size = 100 is not a multiple of num_attention_heads = 6"),
        ("[model]\nvocab_size = 256", "model.vocab_size = 256 is less than 257"),
        ("[model]\ntie_word_embeddings = true", "tie_word_embeddings = true"),
        ("[plan]\ntokens = 4096", "plan.tokens = 4096 is more than max_position_embeddings = 2048"),
        ("[bottleneck]\nnorm = false", "codec.forward = int4 has a fixed grid and needs bottleneck.norm = true"),
        ('[data]\nsource = "files"', "needs at least one entry in data.paths"),
        ('[data]\npaths = ["a"]', 'set source = "files"'),
        ("[data]\nvalidation_fraction = 0", "leaves no text"),
        (
            '[plan]\nsteps = 30\n[replicas]\naveraging = "diloco"',
            "replicas.diloco.inner_steps = 50 is more than plan.steps = 30",
        ),
    ],
)
def test_numbers_that_contradict_each_other(text: str, words: str) -> None:
    with pytest.raises(ConfigImpossible) as refusal:
        load_toml(text)
    assert words in refusal.value.cause
    assert int(refusal.value.code) == 103


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary, broken = tmp_path / "binary.toml", tmp_path / "broken.toml"
    binary.write_bytes(b"\xff\xfe")
    broken.write_text("stages = 4\nmodel = [")
    for path, words in (
        (tmp_path / "none.toml", "No such file"),
        (tmp_path, "directory"),
        (binary, "not UTF-8"),
        (broken, "is not TOML"),
    ):
        with pytest.raises(ConfigUnreadable, match=words) as refusal:
            load(path)
        assert str(path) in refusal.value.cause


def test_load_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(dump_toml(preset("wide")))
    assert load(path) == preset("wide")


def test_unknown_preset_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigInvalid, match="did you mean demo") as refusal:
        preset("dmeo")
    assert "qwen3-tiny" in refusal.value.remedy


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    base = preset("demo")
    assert base.with_overrides() == base
    changed = base.with_overrides(stages=2, steps=3, microbatches=5, codec="int8", seed=7)
    expected = tomllib.loads(dump_toml(base))
    expected |= {"stages": 2, "seed": 7}
    expected["plan"] |= {"steps": 3, "microbatches_per_step": 5}
    expected["codec"] |= {"forward": "int8", "backward": "int8"}
    assert changed == RunConfig.model_validate(expected)


def test_overrides_are_checked_as_a_file_is() -> None:
    with pytest.raises(ConfigImpossible, match="stages = 5"):
        preset("demo").with_overrides(stages=5)
    with pytest.raises(ConfigInvalid, match=r"command line: codec\.forward = 'int5'"):
        preset("demo").with_overrides(codec="int5")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        preset("demo").seed = 1  # type: ignore[misc]
