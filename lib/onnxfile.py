"""Open the ONNX files that export.py writes; onnxruntime and numpy alone."""

import json
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

try:
    import onnxruntime
except ImportError as error:  # --help needs no package
    onnxruntime, MISSING = None, error

from lib import known_answers
from lib.errors import UserError, about_missing, named_errors, reason_of
from lib.names import check_class_names

WHAT = "model of export.py"  # a file is, where errors name it
# By --what of export.py: what a file calls its answers. A classifier of few images gives no familiarity.
OUTPUTS = {"classifier": ("probabilities", "familiarity"), "reconstruction": ("residual", "score"),
           "mass": ("log10_mass", "low", "high"), "sharpen": ("sharpened", "rms_error")}  # fmt: skip


def open_session(path, device="auto"):
    """onnxruntime session and image size of an exported file.

    Raises UserError if it is missing, not an ONNX file, takes another input than raw images, or gives
    other answers here than PyTorch gave, see `known_answers`.
    """
    if onnxruntime is None:
        raise UserError(about_missing(MISSING))
    if not path.is_file():
        raise UserError(f"no model at {path}: export one with export.py")
    providers = ["CPUExecutionProvider"]
    if device != "cpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        # TF32 would keep 11 bits of each factor, and change the familiarity of most images.
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
    elif device == "cuda":
        raise UserError("--device cuda: this onnxruntime has no CUDA; use cpu, or install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with named_errors(path, WHAT):
        # From bytes, so that a model cannot refer to weights in other files.
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=providers)
        if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
            raise UserError("--device cuda: onnxruntime cannot start CUDA here; use cpu")  # it would take the CPU
        (model_input,) = session.get_inputs()
        _, channels, height, width = model_input.shape
        if model_input.type != "tensor(float)" or channels != 1 or height != width:
            raise ValueError("another input than raw images (batch, 1, H, H)")
        if not isinstance(height, int):
            raise ValueError("no fixed image size")
    require_known_answers(session, path, height)
    return session, height


def require_known_answers(session, path, img_size):
    """UserError if the session's answers to the stored images are not those of PyTorch.

    Files of older versions store none.
    """
    with named_errors(path, WHAT):
        metadata = metadata_of(session)
        if known_answers.KEY not in metadata:
            return
        images, answers = known_answers.read(metadata[known_answers.KEY], img_size)
        allowed = known_answers.TOLERANCES[metadata["precision"]]
        outputs = dict(zip(names_of_outputs(session), run_model(session, images, path), strict=True))
        outputs = known_answers.thinned(outputs)
        differences = known_answers.differences(answers, outputs)
        wrong = [name for name, difference in differences.items() if not difference <= allowed[name]]
    if wrong:
        name, again = wrong[0], "" if metadata["precision"] == "float32" else " in float32"
        raise UserError(
            f"{path}: its {name} of the images stored in it is {differences[name]:.2g} from PyTorch's, more "
            f"than {allowed[name]:g}: use --device cpu or another onnxruntime, or export it again{again}"
        )


def open_classifier(path, device="auto"):
    """Returns (onnxruntime session, class names, image size) of an exported classifier.

    Its outputs are probabilities and, unless the file is an old one, familiarity. Raises UserError
    as `open_session` does, and for a file that holds no classifier.
    """
    session, img_size = open_session(path, device)
    with named_errors(path, WHAT):
        class_names = json.loads(metadata_of(session)["class_names"])
        outputs = session.get_outputs()
        if any(output.type != "tensor(float)" for output in outputs):
            raise ValueError("outputs of another kind than numbers")
        if names_of_outputs(session) not in (OUTPUTS["classifier"], OUTPUTS["classifier"][:1]):
            raise ValueError("other outputs than probabilities and familiarity")
        if not all(isinstance(name, str) for name in class_names):
            raise ValueError("metadata of another kind")
        check_class_names(class_names, path, "rename its folder, train and export again")
        if outputs[0].shape[1] != len(class_names):
            raise ValueError("another number of outputs than class names")
        if any(len(output.shape) != 1 for output in outputs[1:]):
            raise ValueError("another familiarity than one number an image")
    return session, class_names, img_size


def classify(session, images, path):
    """(probabilities (b, classes), familiarity (b,) or None) of images (b, 1, H, H); UserError."""
    probabilities, *familiarity = run_model(session, images, path)
    return probabilities, familiarity[0] if familiarity else None


class Beside(NamedTuple):
    """An exported file that stands beside a classifier: an MAE, or what estimates masses.

    of : function from images (b, 1, H, H) to (residual maps (b, 1, H, H), scores (b,)) of an MAE, or (log10
        of the axion's mass in eV, low, high), each (b,).
    doubt : a line if it was not trained on the same data as the classifier, else None.
    sigma : of an MAE, the rms of its residuals of smooth lenses, None if the file does not say.
    classes : names of the classes whose images have a mass.
    """

    of: Callable
    doubt: str | None
    sigma: float | None = None
    classes: list = []  # noqa: RUF012


def names_of_outputs(session):
    return tuple(output.name for output in session.get_outputs())


def metadata_of(session):
    return session.get_modelmeta().custom_metadata_map


def number_in(session, key):
    """The positive number that a file's metadata has under `key`, None if there is none."""
    try:
        number = float(metadata_of(session)[key])
    except (KeyError, ValueError):
        return None
    return number if 0 < number < math.inf else None


def open_sharpener(path, device="auto"):
    """(session, pixels of a coarse image) of a file of `export.py --what sharpen`; UserError as `open_session`."""
    session, img_size = open_session(path, device)
    if names_of_outputs(session) != OUTPUTS["sharpen"]:
        raise UserError(f"--model {path}: it sharpens no images; export one with --what sharpen")
    return session, img_size


# By option: how export.py calls its file, and what a user reads of it.
BESIDE = {"--maps": ("reconstruction", "residuals and maps"), "--mass": ("mass", "masses")}


def open_beside(flag, path, classifier, img_size, device="auto"):
    """The file `Beside` a classifier that an option of BESIDE names, None without a `path`.

    `classifier` is a session of one for images of `img_size`. Raises UserError for another file than
    export.py writes for this option, or one for images of another size.
    """
    if path is None:
        return None
    what, answers = BESIDE[flag]
    session, side = open_session(path, device)
    if names_of_outputs(session) != OUTPUTS[what]:
        raise UserError(f"{flag} {path}: export it with --what {what}")
    if side != img_size:
        raise UserError(f"{flag} {path} is for images of {side} pixels, not {img_size}")
    fingerprints = [metadata_of(each).get("data_fingerprint", "None") for each in (session, classifier)]
    doubt, classes = None, []
    if fingerprints[0] == "None" or fingerprints[0] != fingerprints[1]:
        doubt = (f"{flag} {path} was trained on other data than the classifier, or one of them does not say "
                 f"on which: {answers} may mean nothing")  # fmt: skip
    if flag == "--mass":
        with named_errors(path, WHAT):
            classes = json.loads(metadata_of(session)["mass_classes"])
            if not isinstance(classes, list):
                raise ValueError("no classes that have a mass")
    return Beside(
        lambda images: run_model(session, images, path), doubt, number_in(session, "smooth_rms"), classes
    )


def run_model(session, images, path):
    """All outputs for images (b, 1, H, H), each (b, ...); UserError if the model fails on them."""
    try:
        outputs = session.run(None, {session.get_inputs()[0].name: images})
    except Exception as error:  # onnxruntime raises many kinds
        raise UserError(
            f"{path} fails on {len(images)} images; a smaller --batch-size may help: {reason_of(error)}"
        ) from None
    if any(np.shape(output)[:1] != (len(images),) for output in outputs):
        raise UserError(f"{path}: not a usable {WHAT}: it gives no row for each image")
    return outputs
