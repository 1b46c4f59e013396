"""Sweep files. Alone: uv run pytest tests/test_sweep_spec.py"""

import dataclasses

import pytest

from llm_basics.analysis import sweep_spec
from llm_basics.core import config, presets

PRESETS = sorted(path.stem for path in sweep_spec.SWEEPS.glob("*.yaml"))


def parse(**content):
    return sweep_spec.parse(content, "name", "f.yaml")


def test_a_grid_is_every_combination_with_every_seed():
    sweep = parse(
        base={"train": {"steps": 7}},
        grid={"train.lr": ["1e-3", 0.1], "model.norm": ["rms", "none"]},
        seeds=[3, 4],
    )
    found = [(t.options.train.lr, t.options.model.norm, t.options.train.seed) for t in sweep.trials]
    assert found == [(lr, norm, seed) for lr in (0.001, 0.1) for norm in ("rms", "none") for seed in (3, 4)]
    assert sweep.trials[0].setting == {"train.lr": 0.001, "model.norm": "rms"}
    assert all(trial.options.train.steps == 7 and trial.seed in (3, 4) for trial in sweep.trials)
    assert sweep.trials[0].name == "lr=0.001,norm=rms,seed=3"


def test_options_of_one_key_change_together():
    sweep = parse(grid={"train.batch_size, train.steps": [[4, 100], [16, 25]]})
    assert [(t.options.train.batch_size, t.options.train.steps) for t in sweep.trials] == [(4, 100), (16, 25)]
    assert [t.setting for t in sweep.trials] == [{"train.batch_size": 4}, {"train.batch_size": 16}]
    # if the first option does not identify a row, all do
    sweep = parse(grid={"model.d_model, model.n_layers": [[64, 2], [64, 3]]})
    assert sweep.trials[1].setting == {"model.d_model": 64, "model.n_layers": 3}


def test_each_variant_is_combined_with_the_whole_grid():
    sweep = parse(
        variants={"as it is": {}, "post/../norm": {"model": {"norm_placement": "post"}, "train.lr": 0.5}},
        grid={"model.n_layers": [1, 2]},
    )
    assert [t.options.model.norm_placement for t in sweep.trials] == ["pre", "post", "pre", "post"]
    assert [t.options.train.lr for t in sweep.trials] == [3e-4, 0.5, 3e-4, 0.5]
    assert sweep.trials[1].setting == {"model.n_layers": 1, "variant": "post/../norm"}
    assert sweep.trials[1].name == "n_layers=1,post-..-norm,seed=0"


def test_values_listed_twice_are_trained_once():
    found = parse(grid={"model.n_layers": [1, 2, 1]}, seeds=[0, 1]).trials
    assert [(t.options.model.n_layers, t.seed) for t in found] == [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize("option", sweep_spec.RESERVED)
def test_options_set_by_the_sweep_are_no_variant(option):
    value = {"find_lr": True, "train.seed": 5}.get(option, "tiny")
    with pytest.raises(ValueError, match=f"{option} is set by the sweep"):
        parse(variants={"a": {option: value}})


def test_names_of_run_directories_are_unique():
    names = [t.name for t in parse(variants={"a b": {}, "a/b": {}, "x" * 300: {}, "..": {}}).trials]
    assert len(set(names)) == 4 and names[:2] == ["a-b,seed=0", "a-b,seed=0-2"]
    assert all(0 < len(name) <= 103 and "/" not in name and not name.startswith(".") for name in names)


def test_base_is_a_preset_or_options_over_one(tmp_path):
    one = parse(base="shakespeare", grid={"train.lr": [1.0]}).trials[0].options
    two = parse(base={"config": "shakespeare", "data": "x"}, grid={"train.lr": [1.0]}).trials[0].options
    assert one.model == two.model == presets.load("shakespeare").model and two.data == "x"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_their_files_give_the_same_options(tmp_path, name):
    sweep = sweep_spec.load(name)
    assert 6 <= len(sweep.trials) <= 30
    for trial in sweep.trials:
        path = tmp_path / "options.yaml"
        sweep_spec.write_options(trial.options, path)
        assert dataclasses.replace(presets.load(str(path)), config=trial.options.config) == trial.options


def test_presets_that_must_be_there():
    assert set(PRESETS) >= {"lr", "batch", "ablations", "scaling"}
    tokens = {t.options.train.steps * t.options.train.batch_size for t in sweep_spec.load("batch").trials}
    assert max(tokens) <= 1.02 * min(tokens)
    trains = [trial.options.train for trial in sweep_spec.load("batch").trials]
    assert len({train.batch_size * train.eval_batches for train in trains}) == 1
    by_variant = {
        t.setting["variant"]: t.options.model.n_parameters for t in sweep_spec.load("ablations").trials
    }
    assert by_variant["silu for swiglu"] == by_variant["as it is"] == by_variant["post-norm"]


def test_a_sweep_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("grid: {train.betas: [[0.8, 0.9], [0.9, 0.99]]}")
    sweep = sweep_spec.load(str(path))
    assert sweep.name == "mine" and sweep.trials[0].options.train.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("grids: {}", "unknown key grids ({path}); a sweep has base, grid, variants, seeds"),
        (
            "random: {train.lr: {log: [1, 2]}}",
            "unknown key random ({path}); a sweep has base, grid, variants",
        ),
        ("grid: {train.lrr: [1]}", "unknown option train.lrr ({path}); the closest is train.lr"),
        ("grid: {train.lr: 1}", "grid: train.lr must be a list of values, got 1 ({path})"),
        ("grid: {train.lr: []}", "grid: train.lr must be a list of values, got [] ({path})"),
        ("grid: {train.lr: [fast]}", "train.lr must be float, got 'fast' ({path})"),
        ("grid: {train.lr: [-1]}", "train.lr must be at least 0, got -1"),
        (
            "grid: {'train.lr, train.steps': [[1]]}",
            "train.lr, train.steps must have 2 values in each row, got [1]",
        ),
        ("grid: {run_dir: [a]}", "grid: run_dir is set by the sweep ({path})"),
        ("grid: {train.seed: [1]}", "train.seed is set by the sweep; use seeds"),
        (
            "base: {run_dir: a}\ngrid: {train.lr: [1]}",
            "base: run_dir is set by the sweep; remove it",
        ),
        ("base: {resume: a}\ngrid: {train.lr: [1]}", "base: resume is set by the sweep; remove it"),
        (
            "base: {find_lr: true}\ngrid: {train.lr: [1]}",
            "base: find_lr is set by the sweep; remove it",
        ),
        ("grid: [1]", "grid must map options to values, got [1] ({path})"),
        ("base: tiny", "a sweep must have grid or variants, got none ({path})"),
        ("base: tini\ngrid: {train.lr: [1]}", "--config must be a preset"),
        ("base: 3\ngrid: {train.lr: [1]}", "base must be a preset or a mapping of options, got 3 ({path})"),
        ("variants: {a: 1}", "variants: a must be a mapping of options, got 1 ({path})"),
        (
            "variants: {a: {model.norm: batch}}",
            "model.norm must be rms or layer or none, got 'batch'",
        ),
        ("grid: {train.lr: [1]}\nseeds: 3", "seeds must be a list of distinct integers, got 3 ({path})"),
        ("grid: {train.lr: [1]}\nseeds: [1, 1]", "seeds must be a list of distinct integers, got [1, 1]"),
        ("grid: {train.lr: [1]}\nseeds: [a]", "train.seed must be int, got 'a' ({path})"),
        ("grid: {train.lr: [1]}\nfigure: cake", "figure must be options or scaling, got 'cake' ({path})"),
        ("grid: [", "{path}:1 must be YAML"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        sweep_spec.load(str(path))
    assert message.format(path=path) in str(error.value) and "\n" not in str(error.value)


def test_options_set_by_the_sweep_are_refused_in_a_preset(tmp_path):
    (tmp_path / "mine.yaml").write_text("find_lr: true")
    for base in (str(tmp_path / "mine.yaml"), {"config": str(tmp_path / "mine.yaml")}):
        with pytest.raises(ValueError, match=r"base: find_lr is set by the sweep; .* \(here\)"):
            sweep_spec.parse({"base": base, "grid": {"train.lr": [1]}}, "a", "here")


def test_an_unknown_sweep_is_an_error():
    with pytest.raises(ValueError, match=r"a sweep must be a preset \(ablations, batch, lr, scaling\) or a"):
        sweep_spec.load("learning-rate")


def test_options_have_names_to_set_and_get_them():
    options = sweep_spec.set_options(
        config.Config(), {"train": {"steps": 5}, "train.lr": 1, "data": "x"}, "here"
    )
    assert (options.train.steps, sweep_spec.get_option(options, "train.lr"), options.data) == (5, 1.0, "x")
