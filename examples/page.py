"""Put the web page, the models and what runs them into one folder for any static host.

The models are those of the first FOLDER that has both, with a few of its examples.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(EXAMPLES.parent))

from lib.errors import UserError, run_main
from lib.files import atomic_directory, is_hidden

PAGE = [EXAMPLES / "web" / "index.html", *sorted((EXAMPLES / "web").glob("*.mjs")), EXAMPLES / "formats.mjs", EXAMPLES / "fits.mjs"]
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
MODELS = ("classifier.onnx", "reconstruction.onnx")
LAST = "examples.json"  # a folder that has it is complete
OWN = "|".join([*(path.name for path in PAGE), *RUNTIME, *MODELS, LAST, "examples(/.*)?"])
EXAMPLES_OF_A_FOLDER = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="may hold the models")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to replace if it is a page")
    args = parser.parse_args()
    models = folder_with_models(args.folders)
    runtime = EXAMPLES / "node_modules" / "onnxruntime-web" / "dist"
    if not runtime.is_dir():
        raise UserError("onnxruntime-web is not installed: npm ci --prefix examples --ignore-scripts")
    with atomic_directory(args.out, replaced=LAST, pattern=OWN) as page:
        for path in PAGE:
            (page / path.name).write_text(beside(path.read_text()))
        for path in (*(runtime / name for name in RUNTIME), *(models / name for name in MODELS)):
            shutil.copyfile(path, page / path.name)
        names = []
        for root, path in examples_in(models):
            names.append(path.relative_to(root).as_posix())
            target = page / "examples" / names[-1]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        (page / LAST).write_text(json.dumps(names, indent=2) + "\n")
    print(f"{args.out}: the page with the models of {models} and {len(names)} examples")


def beside(text):
    """A source of the page whose imports of other folders, such as '../formats.mjs', lie beside it."""
    return re.sub(r"'\.\./(?:[\w-]+/)*", "'./", text)


def folder_with_models(folders):
    """The first folder with both models; UserError that says what each lacks."""
    lacks = []
    for folder in folders:
        missing = [name for name in MODELS if not (folder / name).is_file()]
        if not missing:
            return folder
        lacks.append(f"{folder} has no {' and no '.join(missing)}")
    raise UserError(f"{'; '.join(lacks)}: make reproduce makes both")


def examples_in(models):
    """(folder of examples beside the models, path) of the first .npy files in each folder below it."""
    for root in (models / "examples", models / "samples"):
        for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
            files = [path for path in sorted(folder.glob("*.npy")) if not is_hidden(path.name)]
            yield from ((root, path) for path in files[:EXAMPLES_OF_A_FOLDER])


if __name__ == "__main__":
    run_main(main)
