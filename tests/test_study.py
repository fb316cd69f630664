"""experiments/study.py and results.py: every experiment runs, no run is repeated, figures are joined."""

import json
from types import SimpleNamespace

import pytest
from conftest import PRETRAINED, TINY_DECODER, TINY_NETWORK, replacing

import finetune
import pretrain
from experiments import results, study
from lib import class_evaluation, datasets, familiarity, weights
from lib.errors import UserError

TINY = {"SCRATCH_EPOCHS": 2, "LABEL_SHARES": (0.2, 1.0), "UNFAMILIAR_PER_CLASS": 4, "MISTAKES_PER_CLASS": 40,
        "STRENGTH_BINS": 2, "OTHER_PER_CLASS": 100, "OTHER_MODELS": {"Model_III": ((), ("--epochs", 1))}}  # fmt: skip
NETWORK = f"--epochs 1 {' '.join(TINY_NETWORK)}"


@pytest.fixture
def tiny_study(packed, tmp_path, monkeypatch, no_pictures):
    """Function from options to the folder of results of a study in the folder runs."""
    for name, value in TINY.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(familiarity, "FEWEST_IMAGES", 10)

    def main(*arguments):
        defaults = ("--data", packed, "--out", tmp_path / "runs", "--pretraining",
                    f"{NETWORK} {' '.join(TINY_DECODER)}", "--finetuning", NETWORK)  # fmt: skip
        study.main(replacing(defaults, arguments))
        return tmp_path / "runs" / "results"

    return main


def test_every_experiment_leaves_its_rows_its_picture_and_its_table(tiny_study, unseen, folder):
    """With the columns that docs/results/ has."""
    kept_in = tiny_study("--seeds", 0, "--unseen", unseen, "--cutouts", folder / "cdm")
    tables = (kept_in / "tables.md").read_text()
    published = study.Path(study.__file__).parents[1] / "docs" / "results"
    for name in study.EXPERIMENTS:
        content = json.loads((kept_in / f"{name}.json").read_text())
        assert (kept_in / f"{name}.png").stat().st_size > 5000
        assert f"## {name}" in tables
        assert "experiments/study.py --data" in content["made"][0]["command"]
        assert content["rows"], name
        if (published / f"{name}.json").exists():
            expected = {key for row in results.read(published / f"{name}.json")["rows"] for key in row}
            assert {key for row in content["rows"] for key in row} == expected
        for row in content["rows"]:
            assert row["run"] in tables
            for key, value in row.items():
                if "AUC" in key:
                    assert 0 <= value <= 1, (name, key)
                if "%" in key:
                    assert 0 <= value <= 100, (name, key)


def test_runs_that_are_there_are_not_repeated(tiny_study, unseen, tmp_path, packed, monkeypatch):
    """Whatever words name the data; a run of other options is replaced."""
    both = ("--only", "scratch", "strategies", "--unseen", unseen, "--seeds", 0)
    kept_in = tiny_study(*both)
    rows = {name: results.read(kept_in / f"{name}.json")["rows"] for name in both[1:3]}
    assert [len(r) for r in rows.values()] == [6, 8]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "fit", None)  # training again would fail, and so would measuring
        patch.setattr(finetune, "fit", None)
        patch.setattr(class_evaluation, "predict_probabilities", None)
        patch.chdir(packed.parent)
        tiny_study(*both, "--data", packed.name, "--device", "cpu")
    assert {name: results.read(kept_in / f"{name}.json")["rows"] for name in rows} == rows
    path = tmp_path / "runs" / "base" / "seed0" / "pretrain" / PRETRAINED
    before = path.read_bytes()
    tiny_study("--seeds", 0, "--only", "without_labels", "--pretraining", NETWORK.replace("1", "2", 1))
    assert path.read_bytes() != before


def test_runs_on_other_data_are_not_replaced(tiny_study, tmp_path):
    """They may have taken hours; another data set needs another folder."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "data.json").write_text('{"fingerprint": "of others"}')
    with pytest.raises(UserError, match="another data set: name another --out"):
        tiny_study("--only", "scratch")
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["data.json"]


def test_weights_without_a_familiarity_are_named(tiny_study, monkeypatch):
    monkeypatch.setattr(weights, "familiarity_in", lambda opened: None)
    with pytest.raises(UserError, match=r"base.seed0.full.*no familiarity"):
        tiny_study("--seeds", 0, "--only", "unfamiliar")


@pytest.mark.parametrize(
    ("option", "text", "named"),
    [("--cutouts", "empty", "empty"), ("--finetuning", "--lr '1", "--lr '1"),
     ("--finetuning", "lr 1", "lr is no option"), ("--finetuning", "--lr 1 --lr 2", "--lr is given twice")],
)  # fmt: skip
def test_a_wrong_option_ends_a_study_before_it_starts(option, text, named, tiny_study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=named):
        tiny_study("--only", "unfamiliar", option, text)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("classes", "epochs"), [("no_sub", 4), ("no_sub cdm", 8), ("all", 12)])
def test_pretraining_on_all_classes_takes_as_many_steps_as_on_some(classes, epochs, packed):
    args = SimpleNamespace(pretraining=f"--epochs 12 --classes {classes}")
    lab = SimpleNamespace(own=study.Images(packed, datasets.load(packed)), args=args)
    assert study.on_all_classes(lab) == ("--classes", "all", "--epochs", epochs)


@pytest.mark.parametrize("own", ["--data x", "--seed=7", "--update", "--labels 0.5"])
def test_what_a_study_sets_itself_is_refused(own, tiny_study):
    """Other images, or the same seed for all, would change the figures without a word."""
    with pytest.raises(UserError, match=f"{own.split('=')[0].split()[0]}.*leave it out"):
        tiny_study("--only", "scratch", "--seeds", 0, f"--finetuning={own}")


# results.py


def kept(folder, name, *rows, commit="abc"):
    """Keep `rows` as study.py does."""
    made = {"command": "python experiments/study.py", "commit": commit, "precision": "float32"}
    results.write(folder, name, "What it compares.", [made], list(rows), study.DRAWN.get(name))
    return folder


def row(seed, auc, run="a"):
    return {"run": run, "seed": seed, "kind": "full", "labels": 10 * (1 + seed), "macro AUC": auc,
            "accuracy %": 100 * auc}  # fmt: skip


def test_seeds_that_ran_apart_are_put_together(tmp_path):
    """Mean and deviation are those of all, and every command that made a part is named."""
    kept(tmp_path / "2", "scratch", row(2, 0.9, "b"), row(2, 0.8), commit="second")
    kept(tmp_path / "1", "scratch", row(1, 0.6), row(1, 0.5, "b"), commit="first")
    kept(tmp_path / "1", "labels", row(0, 0.6), row(1, 0.7))
    out = tmp_path / "all"
    results.main([str(tmp_path / "2"), str(tmp_path / "1"), "--out", str(out)])
    whole = results.read(out / "scratch.json")
    assert [m["commit"] for m in whole["made"]] == ["second", "first"]
    assert [(r["run"], r["seed"]) for r in whole["rows"]] == [("b", 1), ("a", 1), ("b", 2), ("a", 2)]
    tables = (out / "tables.md").read_text()
    assert "| a | 0.70000 ± 0.14142 |" in tables
    assert "commit second" in tables and "commit first" in tables
    labels = results.read(out / "labels.json")
    assert len(labels["rows"]) == 2
    assert labels["drawn"] == study.DRAWN["labels"]
    assert (out / "labels.png").stat().st_size > 5000


def test_published_results_are_read_and_written_as_they_are(tmp_path):
    published = study.Path(study.__file__).parents[1] / "docs" / "results"
    results.join([published], tmp_path)
    for path in (*published.glob("*.json"), published / "tables.md"):
        assert (tmp_path / path.name).read_text() == path.read_text(), path.name


def test_a_seed_counts_once(tmp_path):
    for name in ("one", "other"):
        kept(tmp_path / name, "scratch", row(0, 0.9))
    with pytest.raises(UserError, match=r"one.*other.*seed 0 of 'a'"):
        results.join([tmp_path / "one", tmp_path / "other"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["made"][0].pop("commit"),
        lambda content: content.update(rows={}),
        lambda content: content["rows"].append("x"),
        lambda content: content["rows"][0].pop("seed"),
        lambda content: content["rows"][0].pop("kind"),
        lambda content: content["rows"][0].update({"labels": "many"}),
        lambda content: content["rows"][0].update({"macro AUC": "high"}),
        lambda content: content.update(drawn="macro AUC"),
        lambda content: content["drawn"].pop("label"),
    ],
)
def test_results_from_elsewhere_are_looked_at_first(tmp_path, damage):
    path = kept(tmp_path / "part", "labels", row(0, 0.9), row(1, 0.8)) / "labels.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"labels\.json"):
        results.join([tmp_path / "part"], tmp_path / "all")
