"""The folder of a training: who may write into it, what it says, and what a run resumes from."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Calls, assert_refused, pretraining

from lib import datasets, distributed, weights
from lib.errors import UserError
from lib.recipe import Recipe
from lib.run import Run, open_run

DATASET = SimpleNamespace(fingerprint="f" * 64, origin="a test", class_names=("a", "b"), labels=[0, 1])
OTHER_DATA = SimpleNamespace(**{**vars(DATASET), "fingerprint": "0" * 64})
RENAMED = SimpleNamespace(**{**vars(DATASET), "class_names": ("a", "c")})
RECIPE = Recipe(epochs=2, batch_size=8, lr=0.1, beta2=0.999, weight_decay=0.0, augment=("noise",), patch_dropout=0.0,
                layer_decay=1.0, pool=None, validations=2, keep="best", seed=0, precision="float32")  # fmt: skip


def options(out, **changed):
    given = {"out": out, "resume": False, "lr": None, "mask_ratio": 0.5, "data": Path("lenses"),
             "cache_dir": None, "quiet": True, "device": "cpu", "pretrained": "none",
             "overwrite": False, "update": False}  # fmt: skip
    return argparse.Namespace(**given | changed)


def opened(out, dataset=DATASET, recipe=RECIPE, settings=(), **changed):
    """The `Run` into `out`; `changed` are its options."""
    return Run(options(out, **changed), dataset, "w.pth", recipe, **dict(settings))


def with_checkpoint(out, **settings):
    """Leave a checkpoint in `out`."""
    with open_run(options(out), DATASET, "w.pth", RECIPE, **settings) as run:
        run.save_checkpoint({"step": 3, "in_blocks": False})


def resumed(out, **changed):
    """The checkpoint that a run into `out` resumes from."""
    return opened(out, resume=True, **changed).checkpoint


def test_a_second_run_into_the_same_folder_is_refused(packed, tmp_path):
    out = tmp_path / "run"
    with open_run(options(out), DATASET, "w.pth", RECIPE) as run:
        run.write_config()
        before = (out / "config.json").read_text()
        assert_refused("pretrain.py", pretraining(packed, out), out, "choose another --out")
        assert (out / "config.json").read_text() == before
    with open_run(options(out), DATASET, "w.pth", RECIPE):  # free again
        pass


def test_update_resumes_a_run_of_the_same_settings_and_replaces_any_other(tmp_path):
    with_checkpoint(tmp_path)
    same = opened(tmp_path, update=True)
    assert same.checkpoint["step"] == 3 and not same.replaces
    for other in (opened(tmp_path, update=True, recipe=RECIPE._replace(lr=0.2)),
                  opened(tmp_path, update=True, dataset=OTHER_DATA),
                  opened(tmp_path, update=True, settings={"pretrained_sha256": "b"})):  # fmt: skip
        assert other.checkpoint is None and other.replaces and not other.is_finished
    (tmp_path / "checkpoint.pth").write_bytes(b"broken")
    assert opened(tmp_path, update=True).replaces


BROKEN = {"empty": lambda path: path.write_bytes(b""),
          "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
          "text": lambda path: path.write_text("no checkpoint"), "a list": lambda path: torch.save([1], path),
          "no settings": lambda path: torch.save({"step": 1}, path),
          "settings of another kind": lambda path: torch.save({"settings": [1]}, path),
          "hostile": lambda path: torch.save({"settings": Calls(print, "executed")}, path)}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_checkpoint_that_cannot_be_read_is_named_with_the_remedy(how, tmp_path, capsys):
    with_checkpoint(tmp_path)
    path = tmp_path / "checkpoint.pth"
    BROKEN[how](path)
    with pytest.raises(UserError) as error:
        resumed(tmp_path)
    assert str(error.value) == (
        f"{path} is broken or of another version: remove it, or give --overwrite instead of "
        "--resume, to start again"
    )
    assert "executed" not in capsys.readouterr().out


def test_only_the_same_settings_are_resumed_and_others_change_nothing(tmp_path):
    with_checkpoint(tmp_path, pretrained_sha256="abc")
    same = {"settings": {"pretrained_sha256": "abc"}}
    assert resumed(tmp_path, **same)["step"] == 3
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for named, changed in (
        ("lr = 0.1", {"recipe": RECIPE._replace(lr=0.2)}),
        ("augment", {"recipe": RECIPE._replace(augment=())}),
        ("mask_ratio = 0.5", {"mask_ratio": 0.6}),
        ("new_option = None", {"new_option": 1}),
        ("data_fingerprint", {"dataset": OTHER_DATA}),
        ("class_names", {"dataset": RENAMED}),  # the fingerprint knows their order, not their names
        ("pretrained_sha256 = abc", {"settings": {"pretrained_sha256": "def"}}),
        ("pretrained_sha256 = abc", {"settings": {}}),  # a setting that is gone
    ):
        with pytest.raises(UserError, match=f"--resume.* has {named}"):
            resumed(tmp_path, **{**same, **changed})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_options_that_do_not_change_the_weights_may_change(tmp_path):
    with_checkpoint(tmp_path)
    others = {"quiet": False, "device": "auto", "data": Path("elsewhere"), "cache_dir": Path("c"),
              "pretrained": Path("moved.pth")}  # fmt: skip
    assert resumed(tmp_path, **others)["step"] == 3


def test_the_configuration_says_how_to_repeat_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/pretrain.py", "--data", "my lenses"])
    with open_run(options(tmp_path), DATASET, "w.pth", RECIPE) as run:
        run.write_config(model={"depth": 4}, transform={"kind": "log"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["command"] == "python pretrain.py --data 'my lenses'"
    assert config["options"]["data"] == "lenses"
    assert config["recipe"]["augment"] == ["noise"]
    assert config["data"] == {"origin": "a test", "fingerprint": "f" * 64, "class_names": ["a", "b"], "images": 2}
    assert (config["model"], config["transform"]) == ({"depth": 4}, {"kind": "log"})
    assert config["versions"]["torch"] == torch.__version__


def test_the_weights_take_the_place_of_the_checkpoint(tmp_path, monkeypatch):
    with_checkpoint(tmp_path)
    seen = np.array([2**64 - 1, 3, 3], dtype=np.uint64)
    again = options(tmp_path, overwrite=True)
    with open_run(again, DATASET, "w.pth", RECIPE, pretrained_sha256="abc") as run:
        assert run.checkpoint_path.exists()
        run.write_config()
        assert not run.checkpoint_path.exists()  # of the run that is replaced
        run.save_checkpoint({"step": 1})

        def fails(*_):
            raise UserError("is the disk full?")

        with monkeypatch.context() as patch:
            patch.setattr(weights, "save", fails)
            with pytest.raises(UserError, match="full"):
                run.save_weights({}, {}, seen, number_format="float32")
        assert run.checkpoint_path.exists()  # else hours would be lost
        state = {"x": torch.ones(2)}
        run.save_weights(state, {"depth": 4}, seen, number_format="float32")
    assert not run.checkpoint_path.exists()
    content = weights.read(tmp_path / "w.pth").content
    assert set(content["seen"].tolist()) == {3, 2**64 - 1}
    recipe = json.loads(json.dumps(RECIPE._asdict()))
    assert set(content["run"].pop("made")) == {"commit", "date", "versions"}
    assert content["run"] == {**recipe, "mask_ratio": 0.5, "data_fingerprint": "f" * 64, "split": datasets.SPLIT,
                              "class_names": ["a", "b"], "pretrained_sha256": "abc", "number_format": "float32",
                              "data": "lenses", "cache_dir": None}  # fmt: skip


def test_the_main_process_alone_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with open_run(options(tmp_path), DATASET, "w.pth", RECIPE) as run:
        run.write_config()
        run.write_metrics([{"epoch": 1}])
        run.save_checkpoint({"step": 1})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with open_run(options(tmp_path), DATASET, "w.pth", RECIPE) as run:
        run.write_metrics([{"epoch": 1}, {"epoch": 2}])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


@pytest.mark.parametrize("value", [None, False])
@pytest.mark.parametrize("flag", ["resume", "update"])
def test_an_option_that_is_new_and_not_given_changes_no_run(flag, value, tmp_path):
    """A checkpoint from before the option existed differs in nothing: it ended in a traceback."""
    with_checkpoint(tmp_path)
    args = options(tmp_path, new_option=value, **{flag: True})
    assert Run(args, DATASET, "w.pth", RECIPE).checkpoint["step"] == 3
