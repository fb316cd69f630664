"""How fast the project is: ratios to its peers and to what the machine could do.

Both sides of a row run in turn, on the same threads and images, and the medians are compared; of
several forms of a peer the fastest counts. Hugging Face's training steps run in a process of their
own, with the C library's default memory management, and in this one. Peers come from
requirements-bench.txt; without a peer its row has no ratio.
Leaves bench.json and bench.md in --out.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lib.errors import UserError, path_argument, run_main, starting

starting(__name__)

import functools
import itertools
import json
import multiprocessing
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import export
import predict
import simulate
from lib import datasets, lenses, listing, optim, options, tables
from lib.cuda_graphs import GraphedStep
from lib.device import choose_precision, resolve_device, seconds_of
from lib.files import make_folder, require_own, write_json, write_text
from lib.loader import batch_reader
from mae import MAE, Classifier, set_attention_form

EXAMPLE = """examples:
  python experiments/bench.py --out runs/bench
  python experiments/bench.py --out runs/bench --rows pretraining finetuning --repeats 9"""

# The network of every row.
SIZE = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
DECODER = {"decoder_embed_dim": 96, "decoder_depth": 2, "decoder_num_heads": 3}
MASK_RATIO = 0.75
BATCHES = (64, 256)  # images a training step
HEAD_IMAGES, HEAD_EPOCHS = 1000, 20
FILES = 30_000  # of the row packing
PER_CLASS = 30_000  # images of the row reproduction
PAUSE = 0.1  # seconds, in which threads fall asleep that would wait actively for more work
WHOLE = "reproduce"  # what the row `reproduction` lets make do


def compare(args, what, against, ours, peers, images, peer_images=None, operations=0):
    """A row: measures of our function and of a peer's {form: function}, {} without the peer.

    `images` are those of a call; of the `operations` an image, the share of the machine's peak is stated.
    """
    seconds = seconds_in_turn({"ours": ours, **peers}, args.repeats, args.device)
    each = seconds.pop("ours") / images
    best = min(seconds, key=seconds.get, default="not installed")
    row = {"what": what, "against": f"{against} {best}".strip(), "images/s": 1 / each}
    row["ratio"] = seconds[best] / (peer_images or images) / each if seconds else None
    if operations:
        row["share of peak"] = operations / each / peak(args.precision.name, args.device)
    return row


def seconds_in_turn(functions, repeats, device):
    """Median seconds of each function, {name: seconds}; all run once to warm up, then in turn."""
    seconds = {name: [] for name in functions}
    for _, (name, function) in itertools.product(range(repeats + 1), functions.items()):
        time.sleep(PAUSE)
        seconds[name].append(seconds_of(function, device))
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


@functools.cache
def peak(precision, device):
    """Floating-point operations a second of large matrix products, the best of many."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, precision)) for _ in range(2))
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(20))


# Training steps: kind is "pretraining" or "finetuning"


def model_and_loss(kind, batch, device):
    """Our network and a function that gives its loss on `batch` images."""
    images = torch.rand(batch, 1, SIZE["img_size"], SIZE["img_size"], device=device)
    if kind == "pretraining":
        model = MAE(**SIZE, **DECODER).to(device)
        return model, lambda: model(images, MASK_RATIO)[0]
    model, labels = Classifier(**SIZE, pool="stats").to(device), torch.arange(batch, device=device) % 3
    return model, lambda: F.cross_entropy(model(images).float(), labels)


def operations_of(kind):
    """Floating-point operations of forward and backward an image."""
    model, loss = model_and_loss(kind, 2, torch.device("cpu"))
    set_attention_form(model, "plain")  # the counter does not see into the fused kernel of CPUs
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops() / 2


def our_step(kind, batch, optimizer, precision, device):
    """A function that makes a step as `loop.fit` does; AdamW gets the matrices too."""
    model, loss_of = model_and_loss(kind, batch, device)
    set_attention_form(model, precision.attention)
    groups = optim.parameter_groups([(n, p) for n, p in model.named_parameters() if p.requires_grad], 0.05)
    groups = [{**group, "matrix": group["matrix"] and optimizer == "Muon"} for group in groups]
    optimizers = optim.new_optimizers(groups, 1e-4, (0.9, 0.95))

    def step(*_):
        with precision.autocast(device):
            loss = loss_of()
        optim.update(loss, optimizers, precision, device)
        return loss.detach()

    if device.type != "cuda":
        return step
    optim.make_capturable(optimizers, device)
    graphed = GraphedStep(step, device)
    return lambda: graphed(np.zeros(1, int), 0.0)


@functools.cache
def hugging_face_step(kind, batch, attention, dtype, device):
    """The same of ViTMAEForPreTraining or ViTForImageClassification, with fused AdamW."""
    import transformers

    sizes = {
        "image_size": SIZE["img_size"], "patch_size": SIZE["patch_size"], "num_channels": 1,
        "hidden_size": SIZE["embed_dim"], "num_hidden_layers": SIZE["depth"],
        "num_attention_heads": SIZE["num_heads"], "intermediate_size": 4 * SIZE["embed_dim"],
        "attn_implementation": attention,
    }  # fmt: skip
    width = DECODER["decoder_embed_dim"]
    inputs = {"pixel_values": torch.rand(batch, 1, SIZE["img_size"], SIZE["img_size"], device=device)}
    if kind == "pretraining":
        model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
            **sizes, mask_ratio=MASK_RATIO, decoder_hidden_size=width, decoder_intermediate_size=4 * width,
            decoder_num_hidden_layers=DECODER["decoder_depth"],
            decoder_num_attention_heads=DECODER["decoder_num_heads"],
        ))  # fmt: skip
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=3))
        inputs["labels"] = torch.arange(batch, device=device) % 3
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_in_worker(form):
    """Make one step of Hugging Face in the process that this is called in."""
    seconds_of(hugging_face_step(*form), form[-1])  # waits until it is done


def steps(kind, title, args):
    """Our step with either optimizer against Hugging Face's in all its forms."""
    dtypes = dict.fromkeys(("float32", args.precision.name)) if find_spec("transformers") else ()
    for batch in BATCHES:
        forms = {f"({attention}, {dtype}, fused AdamW)": (kind, batch, attention, dtype, args.device)
                 for attention, dtype in itertools.product(("sdpa", "eager"), dtypes)}  # fmt: skip
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as worker:
            apart = {n: lambda f=form: worker.submit(step_in_worker, f).result() for n, form in forms.items()}
            here = {name: hugging_face_step(*form) for name, form in forms.items()}
            for optimizer in ("AdamW", "Muon"):
                what = f"{title}, batch {batch}, {args.precision.name}, {optimizer}"
                ours = our_step(kind, batch, optimizer, args.precision, args.device)
                for against, peers in (("Hugging Face, best", apart),
                                       ("the same, freed memory kept as here", here)):  # fmt: skip
                    yield compare(args, what, against, ours, peers, batch, operations=operations_of(kind))


def pretraining(args):
    yield from steps("pretraining", "pre-training step", args)


def finetuning(args):
    yield from steps("finetuning", "full fine-tuning step, all tokens", args)


# Other rows


def inference(args):
    """The exported classifier against PyTorch, and in int8 against itself."""
    model = Classifier(**SIZE, pool="stats").eval()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = torch.get_num_threads(), 4
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "model.onnx"
        export.write_onnx(export.Probabilities(model).eval(), path, {})
        float32 = onnxruntime.InferenceSession(path.read_bytes(), settings)
        export.reduce_precision(path, "int8", np.random.default_rng(0).random((256, 1, 64, 64), "f4"), {})
        int8 = onnxruntime.InferenceSession(path.read_bytes(), settings)
        for batch in (1, 256):
            images = torch.rand(-(-64 // batch), batch, 1, 64, 64)  # as many calls, which are timed together

            def answers(session, images=images.numpy()):
                starts = range(0, batch, predict.BATCH_SIZE)
                parts = [call[i : i + predict.BATCH_SIZE] for call in images for i in starts]
                return lambda: [session.run(None, {"images": part}) for part in parts]

            eager = {"": lambda images=images: [model(call).softmax(dim=1) for call in images]}
            what, count = f"classifier inference, batch {batch}", len(images) * batch
            yield compare(args, what, "PyTorch eager", answers(float32), eager, count)
            yield compare(args, f"{what}, int8", "float32 ONNX", answers(int8), {"": answers(float32)}, count)


def rendering(args):
    """An image of the simulator against lenstronomy's ImageModel, by class."""
    peer = lenstronomy_renderer() if find_spec("lenstronomy") else None
    for class_name, count in {"no_sub": 20, "cdm": 20, "axion": 5}.items():
        sources, masses, _ = lenses.sample(class_name, 500, np.random.default_rng(0))

        def ours(sources=sources, masses=masses):
            lenses.render(sources, masses, dtype=torch.float32)

        def theirs(images=tuple(zip(sources[:count], masses[:count], strict=True))):
            for source, point_masses in images:
                peer(source, point_masses)

        what, peers = f"rendering an image, {class_name}", {"": theirs} if peer else {}
        yield compare(args, what, "lenstronomy", ours, peers, len(sources), count)


def lenstronomy_renderer():
    """Function (source (2,), point masses (P, 3)) -> a Model_II image by today's lenstronomy.

    For its speed alone: what the images must be is checked against lenstronomy 1.9.2, which does
    not install beside today's numpy (see tests/reference/make_lenstronomy.py).
    """
    from lenstronomy.Data.imaging_data import ImageData
    from lenstronomy.Data.psf import PSF
    from lenstronomy.ImSim.image_model import ImageModel
    from lenstronomy.LensModel.lens_model import LensModel
    from lenstronomy.LightModel.light_model import LightModel

    camera = lenses.INSTRUMENTS["Model_II"]
    pixels, scale, factor = camera.pixels, camera.pixel_scale, lenses.deflection_factor()
    corner = -(pixels - 1) / 2 * scale
    frame = ImageData(np.zeros((pixels, pixels)), ra_at_xy_0=corner, dec_at_xy_0=corner,
                      transform_pix2angle=np.eye(2) * scale)  # fmt: skip
    psf = PSF("GAUSSIAN", fwhm=camera.psf_fwhm, pixel_size=scale)
    galaxy = {"theta_E": factor * lenses.einstein_radius(lenses.LENS_MASS),
              **dict(zip(("e1", "e2"), lenses.LENS_ELLIPTICITY, strict=True))}  # fmt: skip
    shear = {"gamma1": factor * lenses.SHEAR[0], "gamma2": factor * lenses.SHEAR[1]}
    light = {"amp": 1.0, "R_sersic": lenses.SOURCE_RADIUS, "n_sersic": 1.0,
             **dict(zip(("e1", "e2"), lenses.SOURCE_ELLIPTICITY, strict=True))}  # fmt: skip

    def render(source, point_masses):
        masses = [{"theta_E": factor**0.5 * theta, "center_x": x, "center_y": y}
                  for theta, x, y in point_masses.tolist()]  # fmt: skip
        lens = LensModel(["SIE", "SHEAR"] + ["POINT_MASS"] * len(masses))
        model = ImageModel(frame, psf, lens, LightModel(["SERSIC_ELLIPSE"]))
        return model.image(
            [galaxy, shear, *masses], [{**light, "center_x": source[0], "center_y": source[1]}]
        )

    return render


def head(args):
    """The head strategy, which encodes once, against encoding in every epoch."""
    images = torch.rand(HEAD_IMAGES, 1, 64, 64, device=args.device).split(64)
    model = Classifier(**SIZE, pool="stats").to(args.device)
    encode = torch.no_grad()(model.features)

    def train_head(features_of):
        groups = optim.parameter_groups(model.fc.named_parameters(), 0.05)
        optimizers = optim.new_optimizers(groups, 1e-3, (0.9, 0.999))
        for _, batch in itertools.product(range(HEAD_EPOCHS), range(len(images))):
            labels = torch.arange(len(images[batch]), device=args.device) % 3
            loss = F.cross_entropy(model.fc(features_of(batch)), labels)
            optim.update(loss, optimizers, choose_precision("float32", args.device), args.device)

    yield compare(
        args, f"head strategy, {HEAD_EPOCHS} epochs", "encoding in every epoch",
        lambda: train_head([encode(batch) for batch in images].__getitem__),
        {"": lambda: train_head(lambda batch: encode(images[batch]))}, HEAD_EPOCHS * HEAD_IMAGES,
    )  # fmt: skip


def packing(args):
    """An epoch over the packed array against one np.load an image, in a DataLoader."""

    def load(paths):
        images = [np.load(path, allow_pickle=True) for path in paths]
        return torch.from_numpy(np.array([i if i.ndim == 2 else i[0] for i in images], "f4"))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "lenses"
        simulate.write_folder(folder, lenses.simulate("Model_II", -(-FILES // 3), 0, progress=False))
        paths = [path for files in listing.list_classes(folder)[0].values() for path in files]
        read = batch_reader(datasets.load(folder, progress=False).images, torch.device("cpu"))
        loader = DataLoader(paths, batch_size=64, shuffle=True, collate_fn=load)

        def packed_epoch():
            order = np.random.default_rng(0).permutation(len(paths))
            for first in range(0, len(paths), 64):
                read(order[first : first + 64])

        what, peers = f"reading {len(paths)} .npy files, second epoch", {"": lambda: [None for _ in loader]}
        yield compare(args, what, "np.load in a DataLoader", packed_epoch, peers, len(paths))


def reproduction(args):
    """The commands of `make reproduce` one after the other; the environment's making is not timed."""
    whole = 0.0
    with tempfile.TemporaryDirectory() as runs:
        make = ["make", "-s", f"PER_CLASS={PER_CLASS}", f"RUNS={runs}"]
        completed([*make, ".venv/ready"])
        for command in completed([*make, "-n", WHOLE]).replace("\\\n", "").splitlines():
            start = time.perf_counter()
            completed(["sh", "-c", command])
            seconds = time.perf_counter() - start
            whole += seconds
            part = re.search(rf"(\w+\.py).* --out {re.escape(runs)}/(\S+)", command)
            if part:
                yield {"what": f"make reproduce: {' '.join(part.groups())}", "seconds": seconds}
    yield {"what": "make reproduce", "seconds": whole}


def completed(command):
    """What a command prints; UserError, with its own, if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


ROWS = {f.__name__: f for f in (reproduction, pretraining, finetuning, inference, rendering, head, packing)}


def table(rows):
    columns = {"ratio": "{:.2f}×", "images/s": "{:.0f}", "share of peak": "{:.0%}", "seconds": "{:.0f}"}
    lines = [[row["what"], row.get("against", ""),
              *(text.format(row[name]) if row.get(name) else "" for name, text in columns.items())]
             for row in rows]  # fmt: skip
    return tables.markdown([["what", "against", *columns], *lines])


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    parser.add_argument("--out", type=path_argument, required=True, help="folder of the results")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="what to time"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of every pair")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of our steps"
    )
    options.add_device_argument(parser)
    return options.parsed(parser, argv)


def main(argv=None):
    args, rows = parse_args(argv), []
    args.device = resolve_device(args.device)
    args.precision = choose_precision(args.precision, args.device)
    torch.manual_seed(0)
    make_folder(args.out)
    require_own(args.out / "bench.json", rb'"matmul GFLOP/s"')
    require_own(args.out / "bench.md", rb"\A\| what ")
    machine = {
        "date": time.strftime("%Y-%m-%d"), "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": str(args.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "matmul GFLOP/s": {p: peak(p, args.device) / 1e9 for p in ("float32", args.precision.name)},
    }  # fmt: skip
    for row in itertools.chain.from_iterable(ROWS[name](args) for name in args.rows):
        rows.append(row)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        write_json(args.out / "bench.json", {**machine, "rows": rows})
        write_text(args.out / "bench.md", table(rows) + "\n\n" + json.dumps(machine) + "\n")


if __name__ == "__main__":
    run_main(main)
