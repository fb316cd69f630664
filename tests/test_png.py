"""PNG pictures: grey ones are read as numbers from 0 to 1, for training and prediction; others are refused by name."""

import struct
import zlib

import numpy as np
import pytest
from conftest import assert_refused, run_code, run_script
from test_images import SIDE, predicted
from test_images import assert_refused as assert_file_refused
from test_predict_inputs import write_classifier

from lib import datasets, png
from lib.images import Said, find_files, read_image, read_images

GREYS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def picture(pixels, colour=0, bits=8, sizes=None, more=b""):
    """Bytes of a PNG: pixels (H, W) or (H, W, planes) of whole numbers, and chunks before its pixels."""
    pixels = np.asarray(pixels).astype(">u2" if bits == 16 else "u1")
    width, height = sizes or (pixels.shape[1], pixels.shape[0])
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return png.BEGINNING + header + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def header(width, height):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def planes(*given):
    return np.stack(np.broadcast_arrays(*given), axis=-1)


GREY = picture(GREYS)
SHADES = np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes()
GOOD = {"8 bits": (GREY, 255), "16 bits": (picture(GREYS * 257 - (GREYS > 99), bits=16), None),
        "equal planes": (picture(planes(GREYS, GREYS, GREYS), colour=2), 255),
        "opaque": (picture(planes(GREYS, GREYS, GREYS, 255), colour=6), 255),
        "grey and opaque": (picture(planes(GREYS, 255), colour=4), 255),
        "texts that unpack to much": (picture(GREYS, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))), 255),
        "grey palette": (picture(GREYS, colour=3, more=chunk(b"PLTE", SHADES)), 255)}  # fmt: skip
BAD = {
    "colours": (picture(planes(GREYS, GREYS, 255 - GREYS), colour=2), "a picture in colours"),
    "transparent": (picture(planes(GREYS, GREYS), colour=4), "transparent pixels"),
    "16 bits of colours": (picture(planes(GREYS, GREYS, GREYS), colour=2, bits=16), "save it as a plain greyscale"),
    "huge": (picture(GREYS, sizes=(2**31 - 1, 2**31 - 1)), "no cutout"),
    "large": (picture(GREYS, sizes=(4097, 4096)), "no cutout"),
    "a row of any length": (picture(GREYS, sizes=(0, 2**31 - 1)), "no cutout"),
    "empty": (picture(GREYS, sizes=(0, 0)), "no cutout"),
    "fewer pixels than announced": (picture(GREYS, sizes=(SIDE, 2 * SIDE)), "does not hold the 8×16 pixels"),
    "more pixels than announced": (picture(np.zeros((2000, 2000)), sizes=(SIDE, SIDE)), "does not hold the 8×8 pixels"),
    "animation": (picture(GREYS, more=chunk(b"acTL", bytes(8))), "animation"),
    "a second header": (picture(GREYS, more=header(30000, 30000)), "two headers"),
    "no chunks": (png.BEGINNING, "not those of a PNG"),
    "text": (b"hello", "a text file"),
    "JPEG": (b"\xff\xd8\xff" + bytes(99), "is a JPEG picture"),
    "a bit": (GREY[:50] + bytes([GREY[50] ^ 1]) + GREY[51:], "checksum"),
    "not square": (picture(GREYS[:4]), "expected"),
}


@pytest.mark.parametrize("name", GOOD)
def test_grey_pictures_are_read_from_0_to_1_with_the_upper_row_first(name, tmp_path):
    content, most = GOOD[name]
    path = tmp_path / "x.PNG"
    path.write_bytes(content)
    expected = (GREYS / most if most else (GREYS * 257 - (GREYS > 99)) / 65535).astype(np.float32)
    assert np.array_equal(read_image(path), expected)
    assert np.array_equal(predicted(path)[0][str(path)], expected)


@pytest.mark.parametrize("name", BAD)
def test_other_pictures_are_refused_by_name(name, tmp_path):
    content, reason = BAD[name]
    (tmp_path / "x.png").write_bytes(content)
    assert_file_refused(tmp_path / "x.png", reason)


def test_truncation_at_any_place_is_refused(tmp_path):
    for length in range(len(GREY)):
        (tmp_path / "x.png").write_bytes(GREY[:length])
        assert_file_refused(tmp_path / "x.png", "PNG")


def test_a_picture_of_another_name_is_named(tmp_path):
    (tmp_path / "x.npy").write_bytes(GREY)
    assert_file_refused(tmp_path / "x.npy", r"is a PNG picture: name it x\.png")


def test_without_matplotlib_a_picture_says_what_to_install_and_other_files_are_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(GREY)
    np.save(tmp_path / "y.npy", GREYS / 255)
    write_classifier(tmp_path / "classifier.onnx")
    code = "import sys, predict; sys.exit(predict.main(sys.argv[1:]))"
    model = ("--model", tmp_path / "classifier.onnx", "--out", tmp_path / "p.csv")
    process = run_code(code, *model, tmp_path / "a", tmp_path / "y.npy", check=False, without=["matplotlib"])
    assert process.returncode == 1
    assert "1 image in" in process.stdout
    assert f"{tmp_path / 'a' / 'x.png'}: PNG pictures need matplotlib: pip install matplotlib" in process.stderr


def test_prediction_says_what_a_picture_hides(tmp_path):
    (tmp_path / "x.png").write_bytes(GREY)
    said = Said([], [], [], [])
    list(read_images([tmp_path / "x.png"], SIDE, said))
    (line,) = said.about_notes()
    assert "x.png" in line and "from 0 to 1" in line and "8 bits hide weak substructure" in line


def write_pictures(root, counts, bits=8):
    """Class folders of different pictures."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            content = picture(rng.integers(0, 2**bits, (SIDE, SIDE)), bits=bits)
            (root / name / f"{i}.png").write_bytes(content)
    return root


@pytest.mark.parametrize("bits", [8, 16])
def test_class_folders_of_pictures_are_packed_and_8_bits_are_named_once(bits, tmp_path):
    root = write_pictures(tmp_path / "d", {"a": 6, "b": 6}, bits)
    said = run_script("data.py", "--data", root)
    assert "12 images of 8×8 pixels" in said.stdout
    assert said.stderr.count("weak substructure") == (bits == 8)
    dataset = datasets.load(root)
    assert all(np.array_equal(read_image(file), image)
               for file, image in zip(datasets.files_of(root, dataset), dataset.images, strict=True))  # fmt: skip


def test_pictures_of_another_size_or_in_colours_are_named(tmp_path):
    root = write_pictures(tmp_path / "d", {"a": 4, "b": 4})
    (root / "b" / "3.png").write_bytes(picture(np.zeros((9, 9))))
    assert_refused("data.py", ["--data", root], root / "b" / "3.png", "one size")
    (root / "b" / "3.png").write_bytes(BAD["colours"][0])
    assert_refused("data.py", ["--data", root], root / "b" / "3.png", "a picture in colours")


def test_pictures_beside_other_images_do_not_count(tmp_path, capsys):
    """They are pictures of them, in another unit."""
    root = write_pictures(tmp_path / "d", {"a": 4, "b": 4})
    for folder in root.iterdir():
        for i in range(5):
            np.save(folder / f"{i}.npy", np.random.default_rng(ord(folder.name) + i).random((SIDE, SIDE)))
    write_pictures(root / "a" / "plots", {"of a": 1})
    assert len(datasets.load(root).images) == 10
    assert "9 other files were not read" in capsys.readouterr().err
    files, others, _ = find_files([root / "b"])
    assert {path.suffix for path in files} == {".npy"} and len(others) == 4


def test_an_earlier_sheet_among_pictures_is_no_image(tmp_path):
    root = write_pictures(tmp_path, {"a": 3}) / "a"
    write_classifier(tmp_path / "classifier.onnx")
    command = ("--model", tmp_path / "classifier.onnx", "--out", root / "p.csv", "--sheet", root / "sheet.png", root)
    for _ in range(2):
        assert "3 images in" in run_script("predict.py", *command).stdout
