"""The examples read every .npy file that predict.py reads, as the same numbers, and no other."""

import json
import pickle
import re
import shutil
import struct
import subprocess

import numpy as np
import pytest
from conftest import HUNG, ROOT
from test_examples import EXAMPLE_COMMANDS
from test_predict_inputs import FEW, FEW_AND_BOUNDS, GUARD, image_of, write_classifier, write_models
from test_images import BROKEN, HOSTILE, MIXED, ONE_IMAGE, STACKS, UNFIT, npy, objects

from lib.images import Said, read_images

EXAMPLES = ROOT / "examples"
SIDE = 8
IMAGE = np.random.default_rng(0).random((SIDE, SIDE))
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")

KINDS = ("?", "i1", "u1", *(order + kind for order in "<>" for kind in
         ("f2", "f4", "f8", "i2", "i4", "i8", "u2", "u4", "u8")))  # fmt: skip
GOOD = {**STACKS, **ONE_IMAGE, **{f"kind {kind}": (IMAGE * 100).astype(kind) for kind in KINDS},
        **{f"pickled {kind}": objects((IMAGE * 100).astype(kind), 1) for kind in KINDS},
        "small halves": (IMAGE * 1e-7).astype("<f2"), "negative": (-100 * IMAGE).astype("<i2")}  # fmt: skip
BAD = {**MIXED, **UNFIT, "other size": IMAGE[:4, :4]}
BAD_BYTES = {**BROKEN, **{name: npy(content) for name, content in HOSTILE.items()}, "no line": npy(b"\x80\x04cnumpy"),
             "no mark": npy(b"\x80\x04te."),
             "a type's attributes": npy(b"\x80\x04c__proto__\nconstructor\n)R.")}  # fmt: skip


def write_files(folder, contents):
    """Write arrays or bytes as 0.npy, 1.npy, ...; returns the paths."""
    paths = [folder / f"{i}.npy" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content, allow_pickle=True)
    return paths


def read_in_python(path):
    """The images of a file as predict.py reads them (n, SIDE, SIDE), or None if it refuses any."""
    errors = []
    images = [image for _, image in read_images([path], SIDE, Said(errors, [], [], []))]
    return None if errors else np.array(images)


def read_in_javascript(paths):
    """The same by formats.mjs, for many files."""
    code = f"""
        import {{ readFileSync, writeSync }} from 'node:fs';
        import {{ checkFinite, readImages }} from {json.dumps((EXAMPLES / "formats.mjs").as_uri())};
        for (const path of {json.dumps([str(path) for path in paths])}) {{
          let result;
          try {{
            result = readImages(new Uint8Array(readFileSync(path)).buffer, {SIDE});
            result.forEach((image) => checkFinite(image));
            result = result.map((image) => Array.from(image));
          }} catch (error) {{
            result = String(error);
          }}
          console.log(JSON.stringify(result));
        }}"""
    script = paths[0].parent / "read.mjs"
    script.write_text(code)
    output = subprocess.check_output(["node", script], text=True, timeout=HUNG)
    results = [json.loads(line) for line in output.splitlines()]
    assert len(results) == len(paths)
    return results


def as_images(numbers):
    return np.array(numbers, dtype=np.float32).reshape(-1, SIDE, SIDE)


@needs_node
def test_javascript_reads_the_same_numbers(tmp_path):
    paths = write_files(tmp_path, list(GOOD.values()))
    for name, path, got in zip(GOOD, paths, read_in_javascript(paths), strict=True):
        assert not isinstance(got, str), f"{name}: {got}"
        expected = read_in_python(path)
        assert np.array_equal(as_images(got), expected), name


@needs_node
@pytest.mark.parametrize("protocol", [3, 4])
def test_javascript_reads_what_any_numpy_pickles(protocol, tmp_path):
    content = objects(IMAGE, np.float64(-3e-23), 2**20, -5, 2**40, -(2**40), True)
    new = pickle.dumps(content, protocol=protocol)
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")  # before numpy 2
    if protocol == 4:  # a name's and the frame's length stand before them
        old = old.replace(b"\x8c\x16numpy.core", b"\x8c\x15numpy.core")
        old = old[:3] + struct.pack("<Q", len(old) - 11) + old[11:]
    paths = write_files(tmp_path, [npy(new), npy(old)])
    for path, got in zip(paths, read_in_javascript(paths), strict=True):
        assert np.array_equal(as_images(got), IMAGE.astype(np.float32)[None])
        assert np.array_equal(read_in_python(path), as_images(got))


@needs_node
def test_javascript_refuses_what_python_refuses_in_one_line(tmp_path):
    contents = {**BAD, **BAD_BYTES}
    paths = write_files(tmp_path, list(contents.values()))
    for name, path, got in zip(contents, paths, read_in_javascript(paths), strict=True):
        assert read_in_python(path) is None, name
        assert isinstance(got, str), name
        assert re.fullmatch(r"Error: (not|NaN) ?.*", got), f"{name}: {got}"


@needs_node
def test_damaged_files_are_refused_or_read_alike(tmp_path):
    rng = np.random.default_rng(0)
    originals = write_files(tmp_path, [IMAGE, objects(IMAGE, 1e-23), objects(IMAGE, IMAGE + 1)])
    damaged = []
    for i in range(600):
        content = bytearray(originals[i % 3].read_bytes())
        for position in rng.integers(0, len(content), rng.integers(1, 4)):
            content[position] = rng.integers(256)
        damaged.append(bytes(content[: rng.integers(len(content))] if i % 5 == 0 else content))
    paths = write_files(tmp_path, damaged)
    read = 0
    for path, got in zip(paths, read_in_javascript(paths), strict=True):
        if not isinstance(got, str):
            expected = read_in_python(path)
            assert expected is not None, path
            assert np.array_equal(as_images(got), expected)
            read += 1
    assert 100 < read < 500


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Models, and files that are and are no images."""
    web = tmp_path_factory.mktemp("examples")
    write_models(web)
    stack = np.stack([IMAGE, 0 * IMAGE, np.full_like(IMAGE, np.nan)])
    for name, array in {"axion": objects(IMAGE, 1e-23), "stack": stack, "text": np.array(["a"]),
                        "evil": objects(IMAGE, print), "small": IMAGE[:4]}.items():  # fmt: skip
        np.save(web / f"{name}.npy", array, allow_pickle=True)
    return web


def run_example(command, model, files, folder):
    return subprocess.run([*command, model, *files], cwd=folder, capture_output=True, text=True, timeout=HUNG)


READ = {"axion.npy", "stack.npy[0]", "stack.npy[1]"}
REFUSED = {"stack.npy[2]", "text.npy", "evil.npy", "small.npy", "gone.npy"}


@pytest.mark.parametrize("command", EXAMPLE_COMMANDS)
def test_examples_classify_what_is_an_image_and_name_what_is_none(command, site):
    files = ["axion.npy", "stack.npy", "text.npy", "evil.npy", "small.npy", "gone.npy"]
    process = run_example(command, "classifier.onnx", files, site)
    assert process.returncode == 1
    assert {line.split()[0] for line in process.stdout.splitlines()} == READ
    lines = [line for line in process.stderr.splitlines() if "--planes" not in line]
    assert len(lines) == len(REFUSED), process.stderr
    for name in REFUSED:
        assert any(name in line for line in lines), name
    (line,) = (line for line in lines if "stack.npy[2]" in line)
    assert "NaN or infinite pixels" in line


@pytest.mark.parametrize("command", EXAMPLE_COMMANDS)
@pytest.mark.parametrize("model", ["gone.onnx", "axion.npy"])
def test_examples_name_a_model_that_is_none(command, model, site):
    process = run_example(command, model, ["axion.npy"], site)
    assert process.returncode != 0
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert model in line


# Images unlike the training images


@pytest.mark.parametrize("command", EXAMPLE_COMMANDS)
def test_examples_refuse_below_the_limit_and_not_at_it(command, tmp_path):
    write_models(tmp_path)
    means = {"usual": 0.5, "limit": 0.01, "strange": 0.0099, "negative": -1, "blank": 0}
    for name, mean in means.items():
        np.save(tmp_path / f"{name}.npy", image_of(mean))
    process = run_example(command, "classifier.onnx", [f"{name}.npy" for name in means], tmp_path)
    assert process.returncode == 0
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    for line, (name, mean) in zip(lines, means.items(), strict=True):
        bright = 1 / (1 + np.exp(-2 * mean))
        prediction = "bright" if mean >= 0.01 else "unfamiliar"
        assert line == (f"{name}.npy {prediction} bright={bright:.6f} dark={1 - bright:.6f} " f"familiarity={mean:.6f}")


@pytest.mark.parametrize("command", EXAMPLE_COMMANDS)
@pytest.mark.parametrize(("case", "bounds"), FEW_AND_BOUNDS)
def test_examples_say_what_guards_a_file_that_cannot_refuse(command, case, bounds, tmp_path):
    write_classifier(tmp_path / "m.onnx", pixel_range=bounds, **FEW[case])
    low = image_of(0.5)
    low[1, 1] = -99
    images = {"usual.npy": image_of(0.5), "blank.npy": image_of(0), "bright.npy": image_of(1), "low.npy": low}
    for name, image in images.items():
        np.save(tmp_path / name, image)
    process = run_example(command, "m.onnx", images, tmp_path)
    reason = "was calibrated on too few images to refuse any below 0.01"
    if case == "old":
        reason = "gives no familiarity (fewer than 100 validation images, or an old file)"
    guard = "only the range of pixels" if bounds else "nothing"
    line, *errors = process.stderr.splitlines()
    assert line == f"m.onnx {reason}: {guard} {GUARD}"
    assert "unfamiliar" not in process.stdout
    assert ("familiarity" in process.stdout) == (case != "old")
    read = [line.split()[0] for line in process.stdout.splitlines()]
    assert read == (["usual.npy"] if bounds else list(images))
    assert process.returncode == (1 if bounds else 0)
    assert len(errors) == (3 if bounds else 0)
    for error, pixels in zip(errors, ("0 to 0", "0 to 64", "-99 to 32"), strict=False):
        assert f"pixels from {pixels}, far outside those of the training images (accepted: from -1 to 40, " in error
