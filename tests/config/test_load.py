"""The experiment file: cell-load's files as they stand, ours on top; every problem at once, with its place."""

import json
from pathlib import Path

import pytest

from pertcast.config import Experiment, load_experiment, rebuild_experiment
from pertcast.errors import ConfigError

STARTER = """
# Dataset paths - maps dataset names to their directories
[datasets]
replogle = "data/{train,k562,rpe1}.h5"
jurkat = "data/jurkat/"

[training]
replogle = "train"
jurkat = "train"

[zeroshot]
"replogle.hepg2" = "test"
"jurkat.rpe1" = "val"

[fewshot]

[fewshot."replogle.rpe1"]
val = ["AARS"]
test = ["AARS", "NUP107", "RPUSD4"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


def test_a_starter_file_is_an_experiment_as_it_stands(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, STARTER))
    assert experiment.training == {"replogle": "train", "jurkat": "train"}
    assert experiment.zeroshot == {"replogle.hepg2": "test", "jurkat.rpe1": "val"}
    assert experiment.fewshot["replogle.rpe1"].test == ("AARS", "NUP107", "RPUSD4")
    assert experiment.datasets["replogle"] == str(tmp_path / "data/{train,k562,rpe1}.h5")
    assert (experiment.columns.pert, experiment.columns.control) == ("target_gene", "non-targeting")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "genes.csv").write_text("A\n")
    path = write(tmp_path, STARTER + '[submission]\ngenes = "genes.csv"\n')
    assert load_experiment(path).submission.genes == tmp_path / "genes.csv"


def test_paths_are_relative_to_the_file_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "genes.csv").write_text("A\n")
    path = write(tmp_path / "there", STARTER + '[submission]\ngenes = "genes.csv"\n')
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    assert load_experiment(link).submission.genes == tmp_path / "there" / "genes.csv"


def test_set_wins_over_the_file_and_takes_toml_values_or_words(tmp_path: Path) -> None:
    path = write(tmp_path, STARTER + "[train]\nsteps = 7\n")
    experiment = load_experiment(
        path, ["train.steps=9", "train.learning_rate=1e-3", "train.match=context", 'columns.batch="gem_group"']
    )
    assert (experiment.train.steps, experiment.train.learning_rate) == (9, 1e-3)
    assert (experiment.train.match, experiment.columns.batch) == ("context", "gem_group")


def test_set_reaches_names_with_a_dot_in_quotes(tmp_path: Path) -> None:
    path = write(tmp_path, STARTER)
    experiment = load_experiment(path, ['fewshot."replogle.rpe1".test=["X"]', 'zeroshot."jurkat.rpe1"=test'])
    assert experiment.fewshot["replogle.rpe1"].test == ("X",)
    assert experiment.zeroshot["jurkat.rpe1"] == "test"


def test_the_resolved_experiment_goes_through_json_and_back(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, STARTER))
    stored = json.loads(json.dumps(experiment.as_json()))
    assert rebuild_experiment(stored, place=tmp_path / "run.json") == experiment
    changed = rebuild_experiment(stored, ["train.steps=3"], place=tmp_path / "run.json")
    assert changed.train.steps == 3
    assert stored["train"]["steps"] == experiment.train.steps


def test_all_problems_come_at_once_with_their_places(tmp_path: Path) -> None:
    text = """[datasets]
a = "a.h5ad"
[training]
b = "train"
[zeroshot]
"c.k562" = "test"
[fewshot."a.rpe1"]
vals = ["X"]
[train]
step = 5
steps = "many"
[model]
input = "pca"
[featurs]
kind = "onehot"
"""
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, text))
    found = {problem.place.rpartition(", ")[2]: problem for problem in caught.value.problems}
    assert found["[train] step"].remedy == "did you mean 'steps'?"
    assert ":10," in found["[train] step"].place
    assert "got 'many'" in found["[train] steps"].message
    assert found["[featurs]"].remedy == "did you mean 'features'?"
    assert "obsm:NAME" in found["[model] input"].message
    assert found["[fewshot] a.rpe1.vals"].remedy == "did you mean 'val'?"
    assert len(found) == 5


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ('[training]\nb = "train"', "no such dataset; \\[datasets\\] has a"),
        ('[zeroshot]\n"k562" = "test"', 'expected "dataset.cell_type"'),
        ('[zeroshot]\n"a.k" = "test"\n[fewshot."a.k"]\nval = ["X"]', "in both \\[zeroshot\\] and \\[fewshot\\]"),
        ('[fewshot."a.k"]\nval = ["non-targeting"]', "control label 'non-targeting' cannot be held out"),
        ('[features]\nkind = "file"', "`path` goes with"),
        ('[features]\npath = "x.pt"\nkind = "file"', "no such file: .*x.pt"),
        ('[submission]\ntargets = "x.csv"', "no such file: .*x.csv"),
        ('[submission]\nseason = "vcc2024"', "one of vcc2025, vcc2026"),
        ("[submission.rules]\nnum_gene = 3", "did you mean 'num_genes'"),
        ("[prepare]\nval_controls = 1.5", "less than 1"),
        ("[prepare]\ntarget_sum = nan", "not valid|finite|number"),
        ("[train]\nsteps = 0", "greater than 0"),
        ("[train]\nsteps = 2.5", "integer"),
        ("[train", "not valid TOML"),
    ],
)
def test_a_wrong_section_says_what_is_wrong(tmp_path: Path, section: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_experiment(write(tmp_path, f'[datasets]\na = "a.h5ad"\n{section}\n'))


@pytest.mark.parametrize("assignment", ["train", "=3", "train..steps=3", "datasets.a.b=3"])
def test_a_wrong_set_is_refused(tmp_path: Path, assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_experiment(write(tmp_path, '[datasets]\na = "a.h5ad"\n'), [assignment])


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such experiment file"):
        load_experiment(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="expected a TOML text file"):
        load_experiment(tmp_path)


def test_an_experiment_without_datasets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="datasets"):
        load_experiment(write(tmp_path, "[training]\n"))


def test_an_experiment_is_frozen(tmp_path: Path) -> None:
    experiment: Experiment = load_experiment(write(tmp_path, STARTER))
    with pytest.raises(ValueError, match="frozen"):
        experiment.train = experiment.train  # type: ignore[misc]
