from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from prunesweep.models import UserError
from prunesweep.search.config import load_config, load_run_config, parse_config
from prunesweep.search.store.run import Run
from tests.conftest import TINY

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_valid_and_commented_line_by_line(path: Path) -> None:
    load_config(path)
    settings = [line for line in path.read_text().splitlines() if " = " in line and not line.startswith("#")]
    assert settings
    assert [line for line in settings if " # " not in line] == []


def test_resolved_configuration_round_trips(tiny) -> None:
    config = tiny()
    text = config.to_toml()
    assert parse_config(tomllib.loads(text), "again") == config
    assert tomllib.loads(text)["finetune"]["label_smoothing"] == 0.0  # defaults are filled in


def test_overrides(tmp_path: Path, tiny) -> None:
    path = tmp_path / "c.toml"
    path.write_text(tiny().to_toml())
    config = load_config(path, ["search.trials=7", "space.budget=[0.4, 0.5]", "name=other", "resources.cpus=1"])
    assert (config.search.trials, config.space.budget, config.name) == (7, (0.4, 0.5), "other")
    assert config.resources.cpus == 1
    for bad, message in {
        "search.trials": "must be key=value",
        "name.x=1": "name is not a table",
        "search.trails=3": "did you mean 'trials'?",
    }.items():
        with pytest.raises(UserError) as error:
            load_config(path, [bad])
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"search": {"trails": 9}},
            "start_neutral, start_published, start_methods, measure_front, keep_models. did you mean 'trials'?",
        ),
        ({"trials": 9}, "did you mean 'search.trials'?"),
        ({"search": {"eta": 3}}, "search.eta: is called search.reduction_factor now"),
        ({"search": {"trials": "many"}}, "search.trials = 'many': input should be a valid integer"),
        ({"search": {"trials": 0}}, "search.trials = 0: input should be greater than or equal to 1"),
        ({"space": {"budget": [0.9, 0.3]}}, "space: budget = [0.9, 0.3]: low must not exceed high"),
        ({"space": {"budget": [0.5, 1.5]}}, "space: budget = [0.5, 1.5]: must lie in (0, 1], shares"),
        ({"space": {"budget": [0.5, 1.5]}}, "did you mean 1.5M or 1.5G? Divide it by the MACs of the source"),
        ({"space": {"lr": [0.0, 0.1]}}, "space: lr = [0.0, 0.1]: must be above 0"),
        ({"space": {"skip": [-1, 1]}}, "space: skip = [-1, 1]: must be at least 0"),
        ({"space": {"groups": {"mpl": 4}}}, "groups.mpl: unknown kind; known: embed, heads, qk, v, dim, mlp, sr"),
        (
            {"scores": {"method": "nvti"}},
            "scores.method = 'nvti': must be one of nvit, upvit, isomorphic,",
        ),
        ({"source": {"train": None}}, "source: has no weights: set pretrained = true"),
        ({"source": {"train": {"epochs": 1, "distill": [{}]}}}, "the source has no source to learn from"),
        ({"finetune": {"label_smoothing": 1.0}}, "finetune.label_smoothing = 1.0: input should be less than 1"),
        ({"name": "a/b"}, "name = 'a/b'"),
        ({"data": {}}, "data.name: is missing"),
    ],
)
def test_errors_name_the_key_and_what_is_allowed(changes: dict, message: str) -> None:
    data = {**TINY}
    for key, value in changes.items():
        data[key] = {**TINY[key], **value} if isinstance(value, dict) and value else value
    with pytest.raises(UserError) as error:
        parse_config(data, "file.toml")
    assert message in str(error.value)
    assert str(error.value).startswith("file.toml:")


def test_a_run_of_an_earlier_version_is_read_with_its_keys(tmp_path: Path, tiny) -> None:
    config = tiny(search={"reduction_factor": 2.0})
    text = config.to_toml().replace("reduction_factor", "eta")
    assert "eta = 2.0" in text
    (tmp_path / "search.toml").write_text(text)
    assert load_run_config(tmp_path) == config
    assert load_run_config(tmp_path, ["search.trials=9"]).search.trials == 9
    with pytest.raises(UserError, match="is called search.reduction_factor now"):
        load_run_config(tmp_path, ["search.eta=3"])


def test_a_run_from_before_ranking_ranks_by_its_objective(tmp_path: Path, tiny) -> None:
    text = tiny().to_toml()
    assert 'rank_by = "auto"\n' in text
    for kept, expected in ((text, "auto"), (text.replace('rank_by = "auto"\n', ""), "objective")):
        (tmp_path / "search.toml").write_text(kept)
        assert load_run_config(tmp_path).search.rank_by == expected
        assert Run(tmp_path).ranking == load_run_config(tmp_path).search.ranking
    (tmp_path / "search.toml").write_text(text.replace('"auto"', '"luck"', 1))
    with pytest.raises(UserError, match="rank_by is 'luck'"):
        Run(tmp_path).search_table()
    with pytest.raises(UserError, match="rank_by = 'loss': objectives has agreement"):
        tiny(search={"objectives": ["agreement", "macs"], "rank_by": "loss"})


def test_a_run_from_before_the_search_split_is_compared_on_the_validation_split(tmp_path: Path, tiny) -> None:
    text = tiny().to_toml()
    assert "search_split = 0.2\n" in text
    for kept, expected in ((text, 0.2), (text.replace("search_split = 0.2\n", ""), 0.0)):
        (tmp_path / "search.toml").write_text(kept)
        assert load_run_config(tmp_path).data.search_split == Run(tmp_path).search_split == expected


def test_a_run_from_before_recovery_starts_from_cut_models(tmp_path: Path, tiny) -> None:
    config = tiny()
    assert config.search.recover
    text = config.to_toml()
    assert "recover = true\n" in text
    assert "project = true\n" in text
    (tmp_path / "search.toml").write_text(text.replace("recover = true\n", "").replace("project = true\n", ""))
    old = load_run_config(tmp_path).search
    assert (old.recover, old.project) == (False, False)
    (tmp_path / "search.toml").write_text(text)
    assert load_run_config(tmp_path).search == config.search


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("name = \n")
    with pytest.raises(UserError, match=r"bad.toml is not TOML: .*line 1"):
        load_config(tmp_path / "bad.toml")


def test_a_file_of_class_names_is_read_once(tmp_path: Path, tiny) -> None:
    """What a run keeps are the names: the file may change, and nodes of a cluster may not have it."""
    file = tmp_path / "classes.txt"
    file.write_text("b\n\na\n")
    config = tiny(data={"name": "digits", "classes": str(file)})
    assert config.data.options["classes"] == ["b", "a"]
    file.unlink()
    assert parse_config(tomllib.loads(config.to_toml()), "again") == config
    for classes, message in (
        (str(file), "cannot be read: "),
        (["a", "b", "a"], "'a' is there twice"),
        ([], "no names"),
    ):
        with pytest.raises(UserError, match=f"  data.classes = .*: {message}"):
            tiny(data={"name": "digits", "classes": classes})


def test_a_named_recipe_fills_in_finetuning(tmp_path: Path, tiny) -> None:
    tables = tomllib.loads(tiny().to_toml()) | {"finetune": {"recipe": "gentle", "epochs": 4}}
    del tables["space"]["lr"]
    config = parse_config(tables, "here")
    assert (config.finetune.epochs, config.finetune.keep, config.finetune.loss_weight) == (4, "best", 0.5)
    assert parse_config(tomllib.loads(config.to_toml()), "again") == config
    for fields, message in {
        ("finetune", "recipe", "gentel"): "unknown recipe 'gentel'; known: .* did you mean 'gentle'",
        ("space", "lr", (1e-4, 1e-3)): r"finetune: lr_by_share .* there is space.lr = \[0.0001, 0.001\]: drop",
    }.items():
        table, key, value = fields
        with pytest.raises(UserError, match=message):
            parse_config({**tables, table: {**tables[table], key: value}}, "here")
