"""predict.py counts every image once, names what it does not read, and never loses a result."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from conftest import HUNG, ROOT, assert_user_error, read_csv, run_script, with_defaults
from test_images import IMAGES, SIDE, relative

def write_model(path, outputs, nodes, **metadata):
    """An ONNX file that takes raw images; its nodes make the outputs {name: shape}."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    model_input = helper.make_tensor_value_info("images", kind, ["n", 1, SIDE, SIDE])
    output_infos = [helper.make_tensor_value_info(n, kind, s) for n, s in outputs.items()]
    constants = [helper.make_tensor("weights", kind, [1, 2], [1.0, -1.0]),
                 helper.make_tensor("one_axis", onnx.TensorProto.INT64, [2], [-1, 1]),
                 helper.make_tensor("pairs", onnx.TensorProto.INT64, [2], [-1, 2]),
                 helper.make_tensor("flat", onnx.TensorProto.INT64, [1], [-1])]  # fmt: skip
    used = {name for _, inputs, _ in nodes for name in inputs}
    constants = [constant for constant in constants if constant.name in used]
    nodes = [helper.make_node(*node) for node in nodes]
    graph = helper.make_graph(nodes, "g", [model_input], output_infos, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(model, path)


MEAN = ("GlobalAveragePool", ["images"], ["mean"])


def write_classifier(path, familiarity=True, **metadata):
    """A classifier of the mean brightness, which it also gives as familiarity."""
    outputs = {"probabilities": ["n", 2]}
    nodes = [MEAN, ("Reshape", ["mean", "one_axis"], ["row"]), ("MatMul", ["row", "weights"], ["logits"]),
             ("Softmax", ["logits"], ["probabilities"])]  # fmt: skip
    if familiarity:
        outputs["familiarity"] = ["n"]
        nodes.append(("Reshape", ["mean", "flat"], ["familiarity"]))
    write_model(path, outputs, nodes, class_names=["bright", "dark"], **metadata)


def write_reconstruction(path, **metadata):
    """A reconstruction that leaves the whole image."""
    nodes = [("Identity", ["images"], ["residual"]), MEAN, ("Reshape", ["mean", "flat"], ["score"])]
    write_model(path, {"residual": ["n", 1, SIDE, SIDE], "score": ["n"]}, nodes, **metadata)


def write_models(folder):
    """A classifier that can refuse images, and a reconstruction that leaves everything."""
    write_classifier(folder / "classifier.onnx", familiarity_images=1000)
    write_reconstruction(folder / "reconstruction.onnx")


def image_of(mean):
    """An image of this mean, exactly as a float32."""
    image = np.zeros((SIDE, SIDE), np.float32)
    image[0, 0] = np.float32(mean) * SIDE**2
    return image


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture
def predict(models, tmp_path):
    """Function that predicts paths; the process gets `rows`, the file column, and `errors`."""

    def start(*arguments, check=True):
        out = tmp_path / "out" / "p.csv"
        defaults = ("--model", models / "classifier.onnx", "--out", out)
        process = run_script("predict.py", *with_defaults(arguments, defaults), check=False)
        process.rows = read_column(out) if out.exists() else []
        errors = out.with_name("p.csv.errors.csv")
        process.errors = read_column(errors) if errors.exists() else []
        if check:
            assert process.returncode == 0, process.stdout + process.stderr
        return process

    return start


def read_column(path):
    return [row["file"] for row in read_csv(path)]


# What counts


def test_what_is_not_read_is_counted_and_named(predict, tmp_path):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    np.save(images / "a.npy", IMAGES[0])
    (images / "deep" / "notes.txt").write_text("text")
    process = predict(images)
    expected = f"1 other file was not read: {images}/deep/notes.txt"
    assert process.stderr.splitlines() == [expected]
    for i in range(7):
        (images / f"{i}.jpg").touch()
    os.mkfifo(images / "pipe.npy")
    (line,) = predict(images).stderr.splitlines()
    assert line.startswith(f"9 other files were not read: {images}/0.jpg, ")
    assert line.endswith(", ...")


def test_the_calls_own_files_are_not_named(predict, models, tmp_path):
    np.save(tmp_path / "a.npy", IMAGES[0])
    shutil.copy(models / "classifier.onnx", tmp_path)
    for _ in range(2):
        process = predict(tmp_path, "--model", tmp_path / "classifier.onnx", "--sheet", tmp_path / "s.png")
        assert process.stderr == ""


def test_what_cannot_be_opened_is_an_error(predict, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    np.save(images / "a.npy", IMAGES[0])
    (images / "gone.npy").symlink_to(images / "nothing")
    np.save(images / "none.npy", IMAGES[:0])
    (images / "text.dat").write_text("no image")
    process = predict(images, images / "text.dat", check=False)
    assert process.returncode == 1
    assert relative(process.rows, images) == ["a.npy"]
    assert relative(process.errors, images) == ["gone.npy", "none.npy", "text.dat"]
    assert "other file" not in process.stderr


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_that_fails_on_the_images_is_named(count, predict, tmp_path):
    pairs = [
        ("GlobalAveragePool", ["images"], ["mean"]),
        ("Reshape", ["mean", "pairs"], ["probabilities"]),  # fails for one, mixes two images
    ]
    names = ["a", "b"]
    write_model(tmp_path / "odd.onnx", {"probabilities": ["n", 2]}, pairs, class_names=names)
    np.save(tmp_path / "x.npy", IMAGES[:count])
    process = predict(tmp_path / "x.npy", "--model", tmp_path / "odd.onnx", check=False)
    assert_user_error(process, "odd.onnx")
    assert process.rows == []


# Outputs


def outputs_that_are_inputs(folder, models):
    image, linked = folder / "in" / "a.npy", folder / "linked" / "a.npy"
    return {
        "image": ["--out", image, image],
        "image found in a folder": ["--out", linked, folder / "in"],
        "sheet": ["--out", folder / "p.csv", "--sheet", folder / "in" / "b.png",
                  folder / "linked" / "b.png", image],
        "errors file": ["--out", folder / "in" / "e", folder / "in" / "e.errors.csv"],
        "model": ["--out", models / "classifier.onnx", image],
        "maps": ["--out", folder / "p.csv", "--maps", models / "reconstruction.onnx", "--sheet",
                 models / "reconstruction.onnx", image],
        "each other": ["--out", folder / "p.png", "--sheet", folder / "linked" / ".." / "p.png",
                       image],
        "sheet and errors file": ["--out", folder / "p", "--sheet", folder / "p.errors.csv", image],
        "folder": ["--out", folder / "in", image],
        "device": ["--out", folder / "fifo", image],
        "sheet is a folder": ["--out", folder / "p.csv", "--sheet", folder / "f.png", image],
    }  # fmt: skip


CASES = tuple(outputs_that_are_inputs(ROOT, ROOT))


@pytest.mark.parametrize("case", CASES)
def test_an_output_is_no_input_and_no_other_output(case, models, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "f.png").mkdir()
    os.mkfifo(tmp_path / "fifo")
    models = shutil.copytree(models, tmp_path / "models")
    (tmp_path / "linked").symlink_to(tmp_path / "in")
    np.save(tmp_path / "in" / "a.npy", IMAGES[0])
    for name in ("b.png", "e.errors.csv"):
        shutil.copy(tmp_path / "in" / "a.npy", tmp_path / "in" / name)
    before = contents(tmp_path)
    arguments = outputs_that_are_inputs(tmp_path, models)[case]
    command = ("predict.py", "--model", models / "classifier.onnx")
    process = run_script(*command, *arguments, check=False)
    assert contents(tmp_path) == before
    assert_user_error(process)


def contents(folder):
    """{path: content, or None of what is no file} of all that is in a folder."""
    return {f: f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


@pytest.mark.parametrize("name", ["sheet", "sheet.", "sheet.txt", "sheet.npy"])
def test_a_sheet_without_the_suffix_of_a_picture_is_refused_first(name, predict, tmp_path):
    np.save(tmp_path / "a.npy", IMAGES[0])
    process = predict(tmp_path / "a.npy", "--sheet", tmp_path / name, check=False)
    assert_user_error(process, "--sheet", name)
    assert process.rows == []


def test_a_sheet_that_cannot_be_drawn_costs_no_result(predict, tmp_path, monkeypatch):
    from lib import plots

    def fail(*_):
        raise ValueError("no picture\nof this")

    monkeypatch.setattr(plots, "contact_sheet", fail)
    np.save(tmp_path / "a.npy", IMAGES[0])
    np.save(tmp_path / "small.npy", IMAGES[0][:4])
    process = predict(tmp_path, "--sheet", tmp_path / "sheet.png", check=False)
    assert_user_error(process, "sheet.png: cannot be drawn: no picture", "p.csv")
    assert len(process.rows) == 1
    assert len(process.errors) == 1
    assert process.stdout.startswith("1 image in")


@pytest.mark.parametrize(("batch", "sheet"), [(1, 1), (2, 10**9), (10**9, 1)])
def test_numbers_at_the_edge(batch, sheet, predict, models, tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    process = predict(tmp_path / "a.npy", "--batch-size", batch, "--sheet", tmp_path / "sheet.PNG",
                      "--sheet-images", sheet, "--maps", models / "reconstruction.onnx")  # fmt: skip
    assert len(process.rows) == 3
    assert f"{min(sheet, 3)} of them in" in process.stdout


# Names

NAMES = {"newline": b"a\nb.npy", "return": b"a\rb.npy", "quotes": b"a\"b',c;.npy", "formula": b"=1+1.npy",
         "no UTF-8": b"a\xff.npy", "UTF-8": "é漢.npy".encode(), "mathematics": b"a$\\frac{$b$.npy",
         "escape codes": b"\x1b[31mred.npy"}  # fmt: skip
LOCALES = {"C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
           "ascii, strict": {"PYTHONIOENCODING": "ascii:strict"}, "usual": {}}  # fmt: skip


@pytest.mark.parametrize("locale", LOCALES)
def test_no_name_and_no_terminal_costs_a_result(locale, models, tmp_path):
    images = os.fsencode(tmp_path) + b"/images"
    os.mkdir(images)
    for i, name in enumerate(NAMES.values()):
        with open(images + b"/" + name, "wb") as file:
            np.save(file, IMAGES[i % 3])
    for name in (b"bad\xff\n.npy", "größe×.txt".encode()):
        with open(images + b"/" + name, "wb") as file:
            file.write(b"no image")
    out = tmp_path / "p.csv"
    # A process of its own has its own locale.
    command = [sys.executable, "predict.py", "--model", models / "classifier.onnx", "--out", out, "--sheet",
               tmp_path / "s.png", images]  # fmt: skip
    process = subprocess.run(command, cwd=ROOT, timeout=HUNG, env={**os.environ, **LOCALES[locale]},
                             capture_output=True)  # fmt: skip
    assert process.returncode == 1, process.stderr
    assert b"Traceback" not in process.stderr
    assert b"\x1b" not in process.stderr
    expected = [name.decode("utf-8", "backslashreplace") for name in NAMES.values()]
    assert relative(read_column(out), os.fsdecode(images)) == sorted(expected)
    (error,) = read_column(tmp_path / "p.csv.errors.csv")
    assert os.path.basename(error) == "bad\\xff\n.npy"
    assert (tmp_path / "s.png").exists()
    assert len(process.stdout.splitlines()) == 2
    assert [line.split()[0] for line in process.stderr.splitlines()] == [b"1", b"1"]


@pytest.mark.parametrize(("buffered", "redirection"), [
    ("1", "| true"), *(("", each) for each in ("| true", ">&- 2>&-", ">/dev/full", ">/dev/full 2>/dev/full")),
])  # fmt: skip
def test_outputs_that_nobody_reads_or_that_are_closed_or_full_cost_no_result(redirection, buffered, models, tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    np.save(tmp_path / "small.npy", IMAGES[0][:4])
    out = tmp_path / "p.csv"
    command = f"{sys.executable} predict.py --model {models}/classifier.onnx --out {out} --sheet {tmp_path}/s.png"
    process = subprocess.run(["sh", "-c", f"{command} {tmp_path} {redirection}"], cwd=ROOT, timeout=HUNG, text=True,
                             stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": buffered})  # fmt: skip
    assert len(read_column(out)) == 3
    assert len(read_column(tmp_path / "p.csv.errors.csv")) == 1
    assert (tmp_path / "s.png").exists()
    assert "Traceback" not in process.stderr and "Broken" not in process.stderr


# Images unlike the training images

GUARD = "guards against images unlike the training images"


def predictions(path):
    return {os.path.basename(row["file"]): row for row in read_csv(path)}


def test_an_image_unlike_the_training_images_is_unfamiliar(predict, tmp_path):
    means = {"usual": 0.5, "limit": 0.01, "strange": 0.0099}
    for name, mean in means.items():
        np.save(tmp_path / f"{name}.npy", image_of(mean))
    process = predict(tmp_path)
    out = tmp_path / "out" / "p.csv"
    rows = predictions(out)
    assert list(rows["usual.npy"]) == ["file", "bright", "dark", "prediction", "familiarity"]
    assert {name: row["prediction"] for name, row in rows.items()} == {
        "usual.npy": "bright", "limit.npy": "bright", "strange.npy": "unfamiliar",
    }  # fmt: skip
    for name, mean in means.items():
        assert float(rows[f"{name}.npy"]["familiarity"]) == pytest.approx(mean, abs=1e-6)
    assert process.stdout == f"3 images in {out}: 2 bright, 0 dark, 1 unfamiliar\n"
    (line,) = process.stderr.splitlines()
    assert line.startswith("1 of 3 images is unlike the training images: the probabilities mean n")
    assert "--scale" in line
    assert "--augment" in line
    assert "Of images like" not in line
    assert process.errors == []


@pytest.mark.parametrize(("count", "usual"), [(2, True), (4, False)])
def test_the_line_says_how_many_unfamiliar_images_are_usual(count, usual, predict, tmp_path):
    means = [0.5] * (100 - count) + [0.001] * count
    np.save(tmp_path / "x.npy", np.stack([image_of(mean) for mean in means]))
    (line,) = predict(tmp_path).stderr.splitlines()
    assert line.startswith(f"{count} of 100 images are unlike")
    remark = " Of images like the training images, 1 % count as unlike them, too."
    assert (remark in line) == usual


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_scale_multiplies_the_pixels(predict, models, tmp_path):
    np.save(tmp_path / "x.npy", image_of(0.5) / 255)
    arguments = (tmp_path / "x.npy", "--maps", models / "reconstruction.onnx")
    out = tmp_path / "out" / "p.csv"
    assert "1 unfamiliar" in predict(*arguments).stdout
    assert "0 unfamiliar" in predict(*arguments, "--scale", 255).stdout
    row = predictions(out)["x.npy"]
    assert (row["familiarity"], row["residual"]) == ("0.500000", "0.5")
    assert float(row["bright"]) == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-5)

    process = predict(tmp_path / "x.npy", "--scale", 1e300, check=False)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert "no finite probabilities" in line


def test_least_familiarity_moves_the_limit_and_0_removes_it(predict, tmp_path):
    np.save(tmp_path / "x.npy", np.stack([image_of(0.5), image_of(0.02), image_of(0.0)]))
    assert "1 unfamiliar" in predict(tmp_path).stdout
    assert "2 unfamiliar" in predict(tmp_path, "--least-familiarity", 0.05).stdout
    process = predict(tmp_path, "--least-familiarity", 0, "--planes", "lenses")
    assert process.stdout.endswith(": 3 bright, 0 dark\n")
    assert process.stderr == f"--least-familiarity 0: nothing {GUARD}\n"
    assert predictions(tmp_path / "out" / "p.csv")["x.npy[2]"]["familiarity"] == "0.000000"


FEW = {"too few": {"familiarity_images": 99}, "unstated": {}, "none": {"familiarity_images": 0},
       "negative": {"familiarity_images": -3}, "text": {"familiarity_images": "many"},
       "old": {"familiarity": False, "familiarity_images": 1000}}  # fmt: skip
FEW_AND_BOUNDS = [*((case, None) for case in FEW), ("old", (-1, 40, 0.1)), ("too few", (-1, 40, 0.1))]


@pytest.mark.parametrize(("case", "bounds"), FEW_AND_BOUNDS)
def test_a_file_that_cannot_refuse_says_so_and_uses_its_range(case, bounds, predict, tmp_path):
    model = tmp_path / "m.onnx"
    write_classifier(model, pixel_range=bounds, **FEW[case])
    means = {"usual": 0.5, "blank": 0.0, "bright": 1.0}
    for name, mean in means.items():
        np.save(tmp_path / f"{name}.npy", image_of(mean))
    process = predict(tmp_path, "--model", model, check=False)
    reason = "was calibrated on too few images to refuse any below 0.01"
    if case == "old":
        reason = "gives no familiarity (fewer than 100 validation images, or an old file)"
    guard = "only the range of pixels" if bounds else "nothing"
    assert process.stderr.splitlines()[0] == f"{model} {reason}: {guard} {GUARD}"
    assert "unfamiliar" not in process.stdout
    rows = predictions(tmp_path / "out" / "p.csv")
    assert ("familiarity" in rows["usual.npy"]) == (case != "old")
    assert relative(process.rows, tmp_path) == (["usual.npy"] if bounds else ["blank.npy", "bright.npy", "usual.npy"])
    assert process.returncode == (1 if bounds else 0)
    assert len(process.errors) == (2 if bounds else 0)


def test_a_model_of_another_familiarity_is_refused(predict, tmp_path):
    np.save(tmp_path / "x.npy", IMAGES[0])
    model = tmp_path / "m.onnx"
    two = {"probabilities": ["n", 2], "familiarity": ["n", 2]}
    pairs = [MEAN, *((("Reshape"), ["mean", "pairs"], [name]) for name in two)]
    write_model(model, two, pairs, class_names=["a", "b"], familiarity_images=1000)
    process = predict(tmp_path, "--model", model, check=False)
    assert_user_error(process, model, "familiarity")


def test_images_in_another_unit_or_with_sentinels_are_refused(runs, lens_image, tmp_path):
    bordered = lens_image.copy()
    bordered[:6] = -99
    images = {"good": lens_image, "counts": 255 * lens_image, "border": bordered,
              "faint": lens_image / 255, "blank": 0 * lens_image}  # fmt: skip
    for name, image in images.items():
        np.save(tmp_path / f"{name}.npy", image)
    process = run_script("predict.py", "--model", runs / "classifier.onnx", "--out",
                         tmp_path / "p.csv", tmp_path, check=False)  # fmt: skip
    assert process.returncode == 1
    assert (tmp_path / "p.csv").read_text().count(".npy") == 1
    errors = (tmp_path / "p.csv.errors.csv").read_text()
    assert errors.count("far outside those of the training images") == 4
    assert "border.npy: pixels from -99" in errors
