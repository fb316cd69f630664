"""predict.py --save-maps: every map in sigma of smooth lenses, at its place on the sky, and nobody else's files."""

import os

import numpy as np
import pytest
from conftest import assert_user_error, read_csv, run_script
from test_predict_inputs import IMAGES, SIDE, write_classifier, write_reconstruction

from lib import maps, wcs
from lib.images import How, Said, read_placed_images

SIGMA = 0.25
SCALE = 0.1 / 3600  # degrees of the network's pixels


@pytest.fixture
def save(tmp_path):
    """Function that saves the maps of paths in the folder maps; the reconstruction leaves the whole image."""
    write_classifier(tmp_path / "m.onnx", familiarity_images=1000, pixel_scale=0.1)
    write_reconstruction(tmp_path / "r.onnx", smooth_rms=SIGMA)
    options = ("--model", tmp_path / "m.onnx", "--maps", tmp_path / "r.onnx", "--out", tmp_path / "p.csv")

    def run(*paths, check=True):
        return run_script("predict.py", *options, "--save-maps", tmp_path / "maps", *paths, check=check)

    return run


def index_of(folder):
    return {row["file"]: row["map"] for row in read_csv(folder / "maps.csv")}


def test_every_image_has_a_map_in_sigma_under_a_name_of_its_own(save, tmp_path):
    (tmp_path / "deep").mkdir()
    np.save(tmp_path / "deep" / "a.npy", IMAGES)
    np.save(tmp_path / "A.npy", IMAGES[1])
    np.save(tmp_path / "a_0.npy", IMAGES[2])
    np.save(tmp_path / "=é.npy", IMAGES[2])
    process = save(*(tmp_path / name for name in ("a_0.npy", "A.npy", "deep/a.npy", "=é.npy")))
    assert f"6 substructure maps in {tmp_path}/maps, 0 of them with a WCS" in process.stdout.splitlines()
    index = index_of(tmp_path / "maps")
    assert {*index.values(), "maps.csv"} == set(os.listdir(tmp_path / "maps"))
    assert len({name.lower() for name in index.values()}) == len(index) == 6
    for i in range(3):
        found = np.load(tmp_path / "maps" / index[f"{tmp_path}/deep/a.npy[{i}]"])
        assert found.dtype == np.float32 and np.allclose(found, IMAGES[i] / SIGMA)
    assert index[f"{tmp_path}/A.npy"] == "A.map.npy"


def test_an_earlier_folder_of_maps_is_replaced_and_no_other(save, tmp_path):
    np.save(tmp_path / "a.npy", IMAGES[0])
    np.save(tmp_path / "b.npy", IMAGES[1])
    save(tmp_path / "a.npy")
    save(tmp_path / "b.npy")
    assert sorted(os.listdir(tmp_path / "maps")) == ["b.map.npy", "maps.csv"]
    (tmp_path / "maps" / "theirs.txt").write_text("x")
    assert_user_error(save(tmp_path / "a.npy", check=False), "theirs.txt")
    assert sorted(os.listdir(tmp_path / "maps")) == ["b.map.npy", "maps.csv", "theirs.txt"]
    (tmp_path / "maps" / "theirs.txt").unlink()
    assert_user_error(save(tmp_path / "maps" / "b.map.npy", check=False), "--save-maps", "is in it")
    (tmp_path / "maps" / "maps.csv").write_text("mine\n")
    assert_user_error(save(tmp_path / "a.npy", check=False), "maps.csv")
    assert (tmp_path / "maps" / "maps.csv").read_text() == "mine\n"


def test_a_call_that_fails_leaves_the_earlier_maps(save, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", IMAGES[0])
    save(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", IMAGES[1])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(maps.np, "save", fail)
    assert_user_error(save(tmp_path / "b.npy", check=False), "maps", "No space left")
    assert sorted(os.listdir(tmp_path / "maps")) == ["a.map.npy", "maps.csv"]
    assert not list(tmp_path.glob(".maps*"))


def test_maps_need_an_mae_that_says_what_smooth_lenses_leave(save, tmp_path):
    np.save(tmp_path / "a.npy", IMAGES[0])
    arguments = ("--model", tmp_path / "m.onnx", "--out", tmp_path / "p.csv", "--save-maps", tmp_path / "x",
                 tmp_path / "a.npy")  # fmt: skip
    assert_user_error(run_script("predict.py", *arguments, check=False), "--save-maps needs --maps")
    write_reconstruction(tmp_path / "old.onnx")
    process = run_script("predict.py", *arguments, "--maps", tmp_path / "old.onnx", check=False)
    assert_user_error(process, "--save-maps", "export it again")
    assert not (tmp_path / "x").exists()


# Places on the sky

HEADERS = {
    "CD": {"CD1_1": -0.8 * SCALE / 2, "CD1_2": 0.6 * SCALE / 2, "CD2_1": 0.6 * SCALE / 2, "CD2_2": 0.8 * SCALE / 2,
           "CDELT1": 1.0, "CDELT2": 1.0},
    "CDELT": {"CDELT1": -SCALE / 2, "CDELT2": SCALE / 2},
    "CROTA": {"CDELT1": -SCALE / 2, "CDELT2": SCALE / 2, "CROTA2": 30.0},
    "PC": {"PC1_1": -0.8 * SCALE / 2, "PC1_2": 0.6 * SCALE / 2, "PC2_1": 0.6 * SCALE / 2, "PC2_2": 0.8 * SCALE / 2},
    "SIP": {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "CD1_1": -SCALE / 2, "CD1_2": 0.0, "CD2_1": 0.0,
            "CD2_2": SCALE / 2, "A_ORDER": 3, "B_ORDER": 2, "A_0_2": 1e-3, "A_2_1": 2e-5, "B_1_1": -2e-3},
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize(("options", "size"), [(("--crop",), 1), (("--centre", "11,8"), 1),
                                               (("--crop", "--pixel-scale", "wcs"), 0.5),
                                               (("--centre", "11,12", "--pixel-scale", "wcs"), 0.5)])  # fmt: skip
@pytest.mark.parametrize("shape", [(20, 23), (1, 20, 23)])
def test_a_source_keeps_its_place_on_the_sky(kind, options, size, shape, save, tmp_path):
    """The brightest pixel of the map is at the position of the two by two pixels of the source."""
    fits, astropy_wcs = pytest.importorskip("astropy.io.fits"), pytest.importorskip("astropy.wcs")
    cards = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.1, "CRVAL2": 2.2, "CRPIX1": 300.25,
             "CRPIX2": -40.5, "CUNIT1": "deg", "CUNIT2": "deg", "RADESYS": "ICRS", **HEADERS[kind]}  # fmt: skip
    image = np.zeros(shape[-2:], np.float32)
    image[10:12, 11:13] = 1  # of the 23 columns, half of one is lost at each side
    header = fits.Header(cards)
    fits.PrimaryHDU(image.reshape(shape), header).writeto(tmp_path / "x.fits")
    process = save(*options, tmp_path / "x.fits")
    assert "1 of them with a WCS" in process.stdout
    with fits.open(tmp_path / "maps" / "x.map.fits") as units:
        found, after = units[0].data, astropy_wcs.WCS(units[0].header)
    rows, columns = np.indices(found.shape)
    centre = (columns * found).sum() / found.sum(), (rows * found).sum() / found.sum()
    before = astropy_wcs.WCS(header, naxis=2).pixel_to_world(11.5, 10.5)
    assert found.shape == (SIDE, SIDE) and found.max() > 0
    assert before.separation(after.pixel_to_world(*centre)).arcsec < 1e-5
    assert after.proj_plane_pixel_scales()[0].to_value("arcsec") == pytest.approx(0.05 / size, rel=1e-6)


def test_a_file_without_usable_coordinates_has_a_map_without_them(save, tmp_path):
    fits = pytest.importorskip("astropy.io.fits")
    sky = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 1.0, "CRVAL2": 2.0, "CRPIX1": 3.0, "CRPIX2": 4.0}
    changes = {"none": dict.fromkeys(sky), "wave": {"CTYPE1": "WAVE"}, "text": {"CRPIX1": "x"},
               "table": {"CPDIS1": "LOOKUP"}}  # fmt: skip
    for name, changed in changes.items():
        cards = {key: value for key, value in {**sky, **changed}.items() if value is not None}
        fits.PrimaryHDU(IMAGES[0], fits.Header(cards)).writeto(tmp_path / f"{name}.fits")
    process = save(*(tmp_path / f"{name}.fits" for name in changes))
    assert "4 substructure maps" in process.stdout and "0 of them with a WCS" in process.stdout
    for name in changes:
        assert "CRPIX1" not in fits.getheader(tmp_path / "maps" / f"{name}.map.fits")


def test_bands_in_the_last_axis_have_no_place_on_the_sky(tmp_path):
    fits = pytest.importorskip("astropy.io.fits")
    sky = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 1.0, "CRVAL2": 2.0, "CRPIX1": 3.0, "CRPIX2": 4.0}
    for name, shape, placed in (("first", (3, SIDE, SIDE), True), ("last", (SIDE, SIDE, 3), False)):
        fits.PrimaryHDU(np.ones(shape), fits.Header(sky)).writeto(tmp_path / f"{name}.fits")
        how = How(planes="bands")
        ((_, _, cards),) = read_placed_images([tmp_path / f"{name}.fits"], SIDE, Said([], [], [], []), how)
        assert bool(cards) == placed
    assert wcs.moved({}, (SIDE, SIDE), 1, (0, 0)) == {}
