"""SHA-256 of everything that small trainings leave, to compare before and after a change of the code.

    OMP_NUM_THREADS=1 python tests/digests.py FOLDER

trains every strategy from every start (an MAE, a classifier, random weights) and every task on many
images and on few, in float32 with the default recipes, then evaluates, reconstructs, exports and predicts. It
writes FOLDER/digests.json: of the tensors of every weights file, of metrics.json and scores.csv, of
what the ONNX files answer, and of the CSV of predictions. The digests are those of one machine and
one version of torch: run it in two checkouts on the same machine, and compare.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.packing import PackedWriter

CLASS_NAMES = ("line", "points", "smooth")
SIDE = 16
PER_CLASS = {"many": 16_400, "few": 400}  # training images above and below all thresholds
NETWORK = ["--patch-size", 4, "--embed-dim", 32, "--depth", 2, "--num-heads", 2]
DECODER = ["--decoder-embed-dim", 16, "--decoder-num-heads", 2, "--classes", "smooth"]
STRATEGIES = ("head", "layernorm", "full", "residual")
WEIGHTS = "vit-mae-classifier-wt.pth"
# What else is trained: {name: (the MAE that it starts from, weights file, options)}.
OTHERS = {
    "with-image": ("mae", WEIGHTS, ("--strategy", "residual", "--with-image", "--augment", "flips")),
    "mass": ("mae", "vit-mae-mass-wt.pth", ("--task", "mass", "--strategy", "residual", "--epochs", 1)),
    "sharpen": ("coarse", "vit-mae-sharpen-wt.pth",
                ("--task", "sharpen", "--strategy", "full", "--epochs", 1, "--labels", 0.1)),
}  # fmt: skip


def images_of(class_name, count, seed):
    """Images (count, SIDE, SIDE) of a blob, dented by points or a line unless it is smooth."""
    rng = np.random.default_rng([seed, CLASS_NAMES.index(class_name)])
    y, x = np.mgrid[:SIDE, :SIDE][:, None] - (SIDE - 1) / 2
    cx, cy, px, py, angle = rng.uniform(-1, 1, (5, count, 1, 1))
    images = np.exp(-((x - 2 * cx) ** 2 + (y - 2 * cy) ** 2) / 18)
    if class_name == "points":
        images -= 0.3 * np.exp(-((x - 4 * px) ** 2 + (y - 4 * py) ** 2)) * images
    if class_name == "line":
        images -= 0.2 * np.exp(-((np.cos(3 * angle) * x + np.sin(3 * angle) * y) ** 2)) * images
    return (images + rng.normal(0, 0.03, images.shape)).astype(np.float32)


def write_data(folder, per_class, seed):
    folder.mkdir(parents=True)
    shape = (len(CLASS_NAMES) * per_class, SIDE, SIDE)
    writer = PackedWriter(folder, shape, CLASS_NAMES, "blobs")
    for label, class_name in enumerate(CLASS_NAMES):
        masses = np.geomspace(1e-24, 1e-22, per_class) if class_name == "line" else np.nan
        writer.append(images_of(class_name, per_class, seed), label, masses=masses)
    writer.close()


def call(script, *arguments):
    command = [sys.executable, ROOT / script, *arguments]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def digest_of_tensors(path):
    state = torch.load(path, weights_only=True)["model"]
    temperature = state.pop("temperature", torch.zeros(())).item()
    tensors = digest(b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state)))
    return f"{tensors}, temperature {temperature:.9g}"


def digest_of_json(path, without=()):
    """Of a JSON file without the keys that name files."""
    content = json.loads(path.read_text())
    return digest(json.dumps({k: v for k, v in content.items() if k not in without}).encode())


def digest_of_answers(path, images):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return digest(b"".join(o.tobytes() for o in session.run(None, {"images": images})))


def main():
    out = Path(sys.argv[1])
    found = {}
    for size, per_class in PER_CLASS.items():
        data, runs = out / size / "data", out / size
        write_data(data, per_class, seed=per_class)
        common = ["--data", data, "--precision", "float32", "--quiet"]

        call("pretrain.py", *common, "--out", runs / "mae", *NETWORK, *DECODER)
        mae = runs / "mae" / "vit-mae-wt.pth"
        found[f"{size} mae"] = digest_of_tensors(mae)
        starts = [("mae", s, mae) for s in STRATEGIES]
        starts += [("classifier", s, runs / f"mae-{s}" / WEIGHTS) for s in STRATEGIES]
        starts += [("none", "full", "none")]
        for start, strategy, path in starts:
            name = f"{start}-{strategy}"
            network = NETWORK if start == "none" else []
            call("finetune.py", *common, "--out", runs / name, "--pretrained", path, "--strategy", strategy,
                 *network)  # fmt: skip
            found[f"{size} {name}"] = digest_of_tensors(runs / name / WEIGHTS)
        call("pretrain.py", *common, "--coarse", "--out", runs / "coarse", *NETWORK, *DECODER)
        for name, (start, file, options) in OTHERS.items():
            given = ("--out", runs / name, "--pretrained", runs / start / "vit-mae-wt.pth")
            call("finetune.py", *common, *given, *options)
            found[f"{size} {name}"] = digest_of_tensors(runs / name / file)

        classifiers = [runs / f"{start}-{strategy}" / WEIGHTS for start, strategy, _ in starts]
        call("evaluate.py", "--data", data, "--weights", *classifiers, "--out", runs / "evaluation",
             "--resamples", 100)  # fmt: skip
        found[f"{size} evaluation"] = digest_of_json(runs / "evaluation" / "metrics.json", ["weights", "made_from"])
        call("reconstruct.py", "--data", data, "--weights", mae, "--out", runs / "residuals",
             "--resamples", 100, "--clusters", 3)  # fmt: skip
        found[f"{size} residuals"] = digest_of_json(runs / "residuals" / "metrics.json", ["weights", "made_from"])
        found[f"{size} scores"] = digest((runs / "residuals" / "scores.csv").read_bytes())
        maps = runs / "maps.onnx"
        call("export.py", "--data", data, "--what", "reconstruction", "--weights", mae, "--out", maps)
        images = np.stack([images_of(name, 50, seed=1) for name in CLASS_NAMES]).reshape(-1, 1, SIDE, SIDE)
        found[f"{size} maps.onnx"] = digest_of_answers(maps, images)
        np.save(runs / "new.npy", images[:, 0])
        for path in classifiers:
            model = runs / f"{path.parent.name}.onnx"
            call("export.py", "--data", data, "--weights", path, "--out", model)
            found[f"{size} {model.name}"] = digest_of_answers(model, images)
            csv = model.with_suffix(".csv")
            call("predict.py", "--model", model, "--maps", maps, "--device", "cpu", "--out", csv,
                 "--least-familiarity", 0, runs / "new.npy")  # fmt: skip
            without_names = "\n".join(line.partition(",")[2] for line in csv.read_text().splitlines())
            found[f"{size} {csv.name}"] = digest(without_names.encode())
        (out / "digests.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
