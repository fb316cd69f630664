"""lib/provenance.py and --update: the same result is made once, and another one is replaced."""

import os
import shutil

import pytest
from conftest import CLASSIFIER, PRETRAINED, assert_user_error, replacing, run_script

import evaluate
import export
import reconstruct
import simulate
from lib import pairs, provenance, simulated

SCRIPTS = ("simulate", "simulate a folder", "evaluate", "reconstruct", "export")


@pytest.fixture
def call(request, runs, folder, tmp_path):
    """(function that calls a script with more options, its --out, options that change the result)."""
    images = ("--data", folder, "--cache-dir", runs / "cache")
    classifier, mae = runs / "full" / CLASSIFIER, runs / "pretrain" / PRETRAINED
    out = tmp_path / "out.onnx"
    script, arguments, other = {
        "simulate": (simulate, ("--per-class", 4), ("--seed", 1)),
        "simulate a folder": (simulate, ("--per-class", 2, "--layout", "folder"), ("--per-class", 1)),
        "evaluate": (evaluate, (*images, "--resamples", 5, "--weights", classifier), ("--seed", 1)),
        "reconstruct": (reconstruct, (*images, "--resamples", 5, "--weights", mae), ("--rounds", 1)),
        "export": (export, (*images, "--weights", classifier), ("--seed", 1)),
    }[request.param]  # fmt: skip
    return (lambda *more: script.main(replacing((*arguments, "--out", out), more))), out, other


def content(out):
    files = [out] if out.is_file() else sorted(p for p in out.rglob("*") if p.is_file())
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("time", [1, 4e9], ids=["old", "from a clock ahead"])
@pytest.mark.parametrize("call", SCRIPTS, indirect=True)
def test_a_result_is_made_once_and_replaced_by_that_of_other_options_or_code(call, time, capsys, monkeypatch):
    """Whenever its files were written."""
    call, out, other = call

    def update(*options):
        """Whether anything was made."""
        before = content(out)
        for path in before:
            os.utime(path, (time, time))
        call("--update", *options)
        if f"already up to date: {out}" in capsys.readouterr().out:
            assert content(out) == before
            return False
        assert content(out) != before
        return True

    assert update() and not update()
    assert update(*other) and not update(*other)
    assert update()
    whole = provenance.sha256_of
    monkeypatch.setattr(provenance, "sha256_of", lambda path: f"{whole(path)}, edited")
    assert update() and not update()


def test_pixels_of_another_origin_are_exported_again(runs, folder, tmp_path):
    """The origin says the pixel scale and the zero point, which the file carries."""
    args = export.parse_args(list(map(str, (
        "--data", folder, "--cache-dir", runs / "cache", "--weights", runs / "full" / CLASSIFIER,
        "--out", tmp_path / "o",
    ))))  # fmt: skip
    model, opened = export.load_model(args)
    dataset, parts = export.load_images(args, opened.content, model.img_size)
    made = [export.metadata_of(args, model, opened, each, parts["train"])["made_from"]
            for each in (dataset, dataset, dataset._replace(origin="another telescope"))]  # fmt: skip
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("call", ["evaluate", "reconstruct"], indirect=True)
def test_what_was_interrupted_never_looks_finished(call, monkeypatch):
    """Stopped before any of its files is there, a call with other options leaves no old result."""
    call, out, other = call
    call("--update")
    whole = content(out)
    replace = os.replace
    for left in (0, 1, 2, 4, 100):
        countdown = iter(range(left))

        def stopping(*paths, countdown=countdown):
            if next(countdown, None) is None:
                raise KeyboardInterrupt
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping)
            try:
                call("--update", *other)
                assert left == 100
            except KeyboardInterrupt:
                assert left < 100
        call("--update")
        assert content(out) == whole, left


def test_images_that_were_not_simulated_are_never_replaced(packed, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(packed)
    arguments = ("--per-class", 3, "--update")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "dataset.json").write_text('{"origin": "a survey"}')
    for out in (foreign, tmp_path / "link", folder):
        before = content(out)
        process = run_script("simulate.py", "--out", out, *arguments, check=False)
        assert_user_error(process, out, "remove it or choose another")
        assert content(out) == before
    run_script("simulate.py", "--out", tmp_path / "empty", *arguments)


@pytest.mark.parametrize("layout", ["packed", "folder"])
def test_files_of_a_user_among_simulated_images_are_never_removed(layout, tmp_path):
    out = tmp_path / "images"
    run_script("simulate.py", "--out", out, "--per-class", 2, "--layout", layout)
    (out / "mine").mkdir()
    (out / "mine" / "years.npy").write_bytes(b"of work")
    before = content(out)
    process = run_script("simulate.py", "--out", out, "--per-class", 3, "--layout", layout, "--update", check=False)
    assert_user_error(process, out, "mine")
    assert content(out) == before


def test_half_a_replaced_data_set_does_not_look_complete(tmp_path, monkeypatch):
    out = tmp_path / "images"
    simulate.main(["--per-class", "4", "--out", str(out)])
    remove = shutil.rmtree

    def stopping(path, **options):
        if path == out:
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", stopping)
        simulate.main(["--per-class", "5", "--out", str(out), "--update"])
    assert not (out / "dataset.json").exists()


def test_data_that_simulate_made_says_its_pixel_scale_and_unit():
    told = simulated.pixels_of(simulated.origin_of("Model_II", 10, 0, noise=False))
    assert told.pop("zero_point") == pytest.approx(24.7526, abs=1e-4)
    assert told == {"pixel_scale": 0.101, "unit": "2 × counts per second, zero point 24.0"}
    counts = simulated.origin_of("Model_I", 10, 0, noise=False)
    assert simulated.pixels_of(counts) == {"pixel_scale": 0.05, "unit": "counts"}
    assert "2 ×" not in simulated.pixels_of(simulated.origin_of("Model_III", 10, 0, noise=True))["unit"]
    made = simulated.origin_of("Model_II", 10, 0, noise=False)
    for origin in ("folder lenses", f"8-bit pictures of {made}", f"pictures of any kind, seed 0, of {made}", ""):
        assert simulated.pixels_of(origin) == {}
    assert simulated.pixels_of(f"{pairs.COARSE}{made}") == {"pixel_scale": 0.202}
