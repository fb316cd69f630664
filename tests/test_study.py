"""experiments/study.py and results.py: every experiment runs, and no run is repeated."""

import json
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_DECODER, TINY_NETWORK

import evaluate
import finetune
import pretrain
import simulate
from experiments import kinds, results, study
from lib import data, familiarity, lenses, plots, residuals, weights
from lib.errors import UserError

TINY = {
    "SCRATCH_EPOCHS": 2, "LABEL_SHARES": (0.2, 1.0), "ROBUSTNESS_PER_CLASS": 8, "UNFAMILIAR_PER_CLASS": 4,
    "MISTAKES_PER_CLASS": 40, "STRENGTH_BINS": 2, "OTHER_PER_CLASS": 100,
    "OTHER_MODELS": {"Model_III": ((), ("--epochs", 1))},
}  # fmt: skip


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """Packed images that no study here trains on."""
    out = tmp_path_factory.mktemp("unseen") / "packed"
    batches = lenses.simulate("Model_II", 20, seed=4, progress=False)
    simulate.write_packed(out, batches, 20, "Model_II", "unseen")
    return out


@pytest.fixture
def tiny_study(packed, tmp_path, monkeypatch, no_pictures):
    for name, value in TINY.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(familiarity, "FEWEST_IMAGES", 10)
    network = " ".join(TINY_NETWORK)

    def main(*arguments):
        study.main([str(a) for a in (
            "--data", packed, "--out", tmp_path / "runs", "--results", tmp_path / "results",
            "--precision", "float32", "--pretraining",
            f"--epochs 1 {network} {' '.join(TINY_DECODER)}", "--finetuning",
            f"--epochs 1 {network}", *arguments)])  # fmt: skip
        return tmp_path / "results"

    return main


def test_every_experiment_leaves_its_rows_its_picture_and_its_table(tiny_study, unseen, folder):
    kept_in = tiny_study("--seeds", 0, "--unseen", unseen, "--cutouts", folder / "cdm")
    tables = (kept_in / "tables.md").read_text()
    for name in study.EXPERIMENTS:
        content = json.loads((kept_in / f"{name}.json").read_text())
        assert content["rows"], name
        assert (kept_in / f"{name}.png").stat().st_size > 5000
        assert f"## {name}" in tables
        assert f"--only {name} --seeds 0" in content["made"][0]["command"]
        for row in content["rows"]:
            for key, value in row.items():
                if "AUC" in key:
                    assert 0 <= value <= 1, (name, key)
                if "%" in key:
                    assert 0 <= value <= 100, (name, key)
            assert row["run"] in tables


def test_the_command_that_is_kept_is_the_whole_command(tiny_study, unseen, packed, tmp_path):
    """It parses to the same study, so a reader can repeat it as it stands."""
    kept = tiny_study("--seeds", 3, 4, "--unseen", unseen, "--only", "without_labels")
    (made,) = json.loads((kept / "without_labels.json").read_text())["made"]
    python, script, *words = shlex.split(made["command"])
    assert (python, script) == ("python", "experiments/study.py")
    args = study.parse_args(words)
    assert (args.data, args.out, args.unseen) == (packed, tmp_path / "runs", unseen)
    assert (args.only, args.seeds) == (["without_labels"], [3, 4])
    assert args.pretraining == f"--epochs 1 {' '.join(TINY_NETWORK)} {' '.join(TINY_DECODER)}"
    assert args.finetuning == f"--epochs 1 {' '.join(TINY_NETWORK)}"
    assert (args.results, args.precision) == (kept, "float32")


def test_runs_on_other_data_are_not_replaced(tiny_study, unseen, tmp_path):
    """They may have taken hours; another data set needs another folder."""
    tiny_study("--seeds", 0, "--only", "without_labels")
    before = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="another data set.*name another --out"):
        tiny_study("--seeds", 0, "--only", "without_labels", "--data", unseen)
    assert {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()} == before
    del before[tmp_path / "runs" / "data.json"]
    (tmp_path / "runs" / "data.json").unlink()
    with pytest.raises(UserError, match="an older version: name another --out"):
        tiny_study("--seeds", 0, "--only", "without_labels", "--data", unseen)
    assert {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()} == before


def test_every_kind_of_images_is_asked_of_both_strategies(tiny_study):
    """Real cutouts only where a folder of them is given."""
    rows = results.read(tiny_study("--seeds", 0, 1, "--only", "unfamiliar") / "unfamiliar.json")["rows"]
    cutouts = {kind for kind in kinds.HELD_BACK if kind not in kinds.KINDS}
    expected = {"clean", *kinds.DEVELOPMENT, *kinds.HELD_BACK} - cutouts
    for strategy in ("full", "residual"):
        for seed in (0, 1):
            own = [row for row in rows if (row["seed"], row["strategy"]) == (seed, strategy)]
            named = {row["run"].removeprefix(f"{strategy}: "): row for row in own}
            assert {name.removesuffix(" (held back)") for name in named} == expected
            for name, row in named.items():
                assert row["held_back"] == name.endswith(" (held back)")
                assert ("AUC familiarity" in row) == (name != "clean")
    assert len(rows) == 4 * len(expected)


def test_weights_from_before_familiarity_are_named(tiny_study, monkeypatch):
    monkeypatch.setattr(weights, "familiarity_in", lambda path, content: None)
    with pytest.raises(UserError, match=r"base.seed0.full.*no familiarity"):
        tiny_study("--seeds", 0, "--only", "unfamiliar")


def test_a_folder_without_cutouts_ends_a_study_before_it_starts(tiny_study, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        tiny_study("--only", "unfamiliar", "--cutouts", tmp_path / "empty")
    assert not (tmp_path / "runs").exists()


def test_runs_that_are_there_are_not_repeated(tiny_study, unseen, tmp_path, monkeypatch):
    both = ("--only", "without_labels", "strategies", "--unseen", unseen)
    kept_in = tiny_study("--seeds", 0, 1, *both)
    files = [kept_in / f"{name}.json" for name in both[1:3]]
    first = [results.read(file)["rows"] for file in files]
    assert [len(rows) for rows in first] == [4, 16]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "fit", None)  # training again would fail, and so would measuring
        patch.setattr(finetune, "fit", None)
        patch.setattr(evaluate, "predict_probabilities", None)
        patch.setattr(residuals, "residual_reader", None)
        tiny_study("--seeds", 0, 1, *both)
    assert [results.read(file)["rows"] for file in files] == first
    weights = tmp_path / "runs" / "base" / "seed0" / "pretrain" / "vit-mae-wt.pth"
    before = weights.read_bytes()
    tiny_study("--seeds", 0, "--only", "without_labels", "--pretraining",
               f"--epochs 2 {' '.join(TINY_NETWORK)}")  # fmt: skip
    assert weights.read_bytes() != before


def test_a_run_of_other_options_defaults_or_source_is_replaced(tmp_path):
    started, script = [], SimpleNamespace(DEFAULTS={"full": {"lr": 1e-3}})
    script.parse_args = lambda argv: SimpleNamespace(argv=argv)

    def main(argv):
        started.append(argv)
        (tmp_path / "run" / "w.pth").touch()

    script.main = main
    for options, lr, source in (
        ([], 1e-3, ""), (["--seed", 1], 1e-3, ""), (["--seed", 1], 2e-3, ""),
        (["--seed", 1], 2e-3, "abc"),
    ):  # fmt: skip
        script.DEFAULTS["full"]["lr"] = lr
        before = len(started)
        for _ in range(2):
            study.trained(script, tmp_path / "run", options, "w.pth", "f", source)
        assert len(started) == before + 1, (options, lr, source)


def test_the_same_study_in_other_words_repeats_no_run(tiny_study, packed, monkeypatch):
    """Names of folders and devices decide no weights."""
    tiny_study("--seeds", 0, "--only", "without_labels")
    monkeypatch.chdir(packed.parent)
    monkeypatch.setattr(pretrain, "fit", None)  # training again would fail
    tiny_study("--seeds", 0, "--only", "without_labels", "--data", packed.name, "--device", "cpu")


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (("--lr", "1", "--depth", "2"), ["--lr", "1"]),
        (("--quiet", "--depth", "2", "--resume"), ["--quiet", "--resume"]),
        (("--depth=2", "--quiet"), ["--quiet"]),
    ],
)
def test_options_of_the_network_are_left_to_the_weights(given, left):
    assert study.without_network(given) == left


@pytest.mark.parametrize("own", ["--data x", "--seed=7", "--overwrite", "--out x"])
def test_what_a_study_sets_itself_is_refused(own, packed, tmp_path):
    """Other images, or the same seed for all, would change the figures without a word."""
    with pytest.raises(UserError, match="--pretraining.*leave it out"):
        study.main(["--data", str(packed), "--out", str(tmp_path / "x"), f"--pretraining={own}"])
    assert not (tmp_path / "x").exists()


def test_an_open_quote_is_named(packed, tmp_path):
    with pytest.raises(UserError, match="--finetuning"):
        study.main(["--data", str(packed), "--out", str(tmp_path), "--finetuning", "--lr '1"])


def test_tables_have_mean_and_deviation_over_seeds():
    rows = [{"run": "a", "seed": s, "PSF 20 %: AUC": v, "accuracy %": 90.0 + s, "kind": "x"}
            for s, v in ((0, 0.98), (1, 0.99), (2, 1.0))]  # fmt: skip
    assert results.table(rows).splitlines() == [
        "| run | PSF 20 %: AUC | accuracy % |",
        "| --- | --- | --- |",
        "| a | 0.99000 ± 0.01000 | 91.00 ± 1.00 |",
    ]
    small = [{"run": "a", "seed": 0, "AUC": 0.0, "reconstruction error": 0.00123}]
    assert results.table(small).splitlines()[2] == "| a | 0.00000 | 1.23e-03 |"


def test_a_figure_of_other_code_or_weights_is_measured_again(tmp_path, monkeypatch):
    calls, dataset = [], SimpleNamespace(fingerprint="f")
    (tmp_path / "w.pth").write_bytes(b"one")

    @study.cached_result
    def figure(lab, path, dataset, whole):
        calls.append(path)
        return {"AUC": len(calls)}

    for _ in range(2):
        assert figure(None, tmp_path / "w.pth", dataset) == {"AUC": 1}
    monkeypatch.setattr(study, "code_digest", lambda: "another")
    assert figure(None, tmp_path / "w.pth", dataset) == {"AUC": 2}
    (tmp_path / "w.pth").write_bytes(b"two")
    assert figure(None, tmp_path / "w.pth", dataset) == {"AUC": 3}


def kept(folder, name, *rows, commit="abc"):
    """Keep `rows` as study.py does."""
    command = f"python experiments/study.py --only {name}"
    made = {"command": command, "commit": commit, "precision": "float32"}
    drawn = study.DRAWN.get(name)
    results.write(folder, name, "What it compares.", [made], list(rows), drawn)
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
    assert [(r["run"], r["seed"]) for r in whole["rows"]] == [
        ("b", 1), ("a", 1), ("b", 2), ("a", 2)
    ]  # fmt: skip
    tables = (out / "tables.md").read_text()
    assert "| a | 0.70000 ± 0.14142 |" in tables
    assert "commit second" in tables
    assert "commit first" in tables
    labels = results.read(out / "labels.json")
    assert len(labels["rows"]) == 2
    assert labels["drawn"] == study.DRAWN["labels"]
    assert (out / "labels.png").stat().st_size > 5000


def test_a_line_of_joined_results_goes_from_few_labels_to_many(tmp_path, monkeypatch):
    shares = {"much": row(2, 0.9, "c"), "little": row(0, 0.5), "some": row(1, 0.7, "b")}
    folders = [
        kept(tmp_path / name, "labels", {**only, "seed": 0}) for name, only in shares.items()
    ]
    drawn = {}
    monkeypatch.setattr(plots, "series", lambda path, series, *_: drawn.update(series))
    results.join(folders, tmp_path / "all")
    assert drawn == {"full": [(10, 50.0, 0.0), (20, 70.0, 0.0), (30, 90.0, 0.0)]}


def test_a_seed_counts_once(tmp_path):
    for name in ("one", "other"):
        kept(tmp_path / name, "scratch", row(0, 0.9))
    with pytest.raises(UserError, match=r"one.*other.*seed 0 of 'a'"):
        results.join([tmp_path / "one", tmp_path / "other"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("made"),
        lambda content: content["made"][0].pop("commit"),
        lambda content: content.update(rows={}),
        lambda content: content["rows"].append("x"),
        lambda content: content["rows"][0].pop("seed"),
        lambda content: content["rows"][0].pop("kind"),
        lambda content: content["rows"][0].update({"labels": "many"}),
        lambda content: content["rows"][0].update({"macro AUC": "high"}),
        lambda content: content.update(drawn="macro AUC"),
        lambda content: content["drawn"].pop("x"),
    ],
)
def test_results_from_elsewhere_are_looked_at_first(tmp_path, damage):
    path = kept(tmp_path / "part", "labels", row(0, 0.9), row(1, 0.8)) / "labels.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"labels\.json"):
        results.join([tmp_path / "part"], tmp_path / "all")


def test_pretraining_on_all_classes_takes_as_many_steps_as_on_one(packed, tmp_path, monkeypatch):
    trained_for = []
    monkeypatch.setattr(pretrain, "FEWEST_STEPS", 12)  # one step an epoch: 80 smooth lenses
    monkeypatch.setattr(study, "chain", lambda lab, *_, pretraining=(), **__: (
        trained_for.append(pretraining[pretraining.index("--epochs") + 1] if pretraining else None),
        {"macro AUC": 1.0})[1])  # fmt: skip
    study.main(["--data", str(packed), "--out", str(tmp_path / "s"), "--results",
                str(tmp_path / "r"), "--seeds", "0", "--only", "pretraining_images",
                "--precision", "float32"])  # fmt: skip
    assert trained_for == [None, 4]  # of a usual 12, on three times as many images


def test_the_ordinary_class_may_have_any_name(tiny_study, packed, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(packed, own)
    description = json.loads((own / "dataset.json").read_text())
    names = ["smooth" if name == "no_sub" else name for name in description["class_names"]]
    (own / "dataset.json").write_text(json.dumps({**description, "class_names": names}))
    options = f"--epochs 1 {' '.join(TINY_NETWORK)} {' '.join(TINY_DECODER)} --classes"
    command = ("--data", own, "--seeds", 0, "--only", "without_labels", "--pretraining")
    kept_in = tiny_study(*command, f"{options} smooth")
    (row,) = json.loads((kept_in / "without_labels.json").read_text())["rows"]
    assert 0 <= row["residual AUC cdm"] <= 1 and "residual AUC smooth" not in row
    with pytest.raises(UserError, match="trained on all: no other classes to compare"):
        tiny_study(*command, f"{options} all")


@pytest.mark.parametrize(("classes", "epochs"), [("no_sub", 4), ("no_sub cdm", 8), ("all", 12)])
def test_all_classes_take_as_many_steps_as_some(classes, epochs, packed):
    lab = SimpleNamespace(
        dataset=data.load(packed), pretraining=("--epochs", "12", "--classes", *classes.split())
    )
    assert study.on_all_classes(lab) == ["--classes", "all", "--epochs", epochs]


def test_an_image_without_subhalos_near_the_ring_has_a_strength(monkeypatch):
    monkeypatch.setattr(study, "MISTAKES_PER_CLASS", 6)
    monkeypatch.setattr(study, "RING_WIDTH", 0.0)
    _, values = study.substructure_strengths()["cdm"]
    assert values.tolist() == [6.0] * 6  # the smallest subhalo has 10⁶ M☉


def test_strengths_belong_to_the_images(monkeypatch):
    monkeypatch.setattr(study, "MISTAKES_PER_CLASS", 6)
    strengths = study.substructure_strengths()
    images = {n: i for n, i, _ in lenses.simulate("Model_II", 6, study.FRESH_SEED + 1)}
    ((_, (source, masses, axion_mass)),) = lenses.draw("axion", 6, study.FRESH_SEED + 1)
    assert np.array_equal(strengths["axion"][1], np.log10(axion_mass))
    again = 2 * lenses.render(source, masses, dtype=torch.float32)
    assert np.allclose(again, images["axion"], rtol=1e-4)
    assert np.isfinite(strengths["cdm"][1]).all()
    assert (strengths["cdm"][1] < 11.5).all()
