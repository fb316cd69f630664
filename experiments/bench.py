"""How fast the project is: ratios to its peers and to what the machine could do.

Both sides of a row run in turn, on the same threads and images, and the medians are compared. They
share this process. On a CPU, Hugging Face's training steps also have a process of their own, with
the C library's default memory management. Peers come from requirements-bench.txt; without a peer its
row stays empty.
Leaves bench.json and bench.md in --out.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate
import export
import finetune
import predict
import simulate
from lib import data, lenses, metrics, optim, options, tables, weights
from lib.device import Precision, bfloat16_is_fast, resolve_device, seconds_of
from lib.errors import UserError, path_argument, run
from lib.files import make_folder, write_json, write_text
from lib.cuda_graphs import GraphedStep
from lib.loader import batch_reader, fit_transform, in_batches
from mae import MAE, Classifier, IntensityTransform, set_attention_form

EXAMPLE = """examples:
  python experiments/bench.py --out runs/bench
  python experiments/bench.py --out runs/bench --rows pretraining finetuning --repeats 9"""

# The network of every row.
SIZE = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
DECODER = {"decoder_embed_dim": 96, "decoder_depth": 2, "decoder_num_heads": 3}
DEFAULT_SIZE = {k: v for k, v in options.NETWORK.items() if k != "transform"}
MASK_RATIO = 0.75
BATCHES = (64, 256)
GPU_BATCHES, GPU_STEPS = (64, 256, 1024), 20  # images a step; steps that are timed together
COMPILED = ("default", "reduce-overhead")  # modes of torch.compile
HEAD_IMAGES, HEAD_EPOCHS = 1000, 20
RENDERED = {"no_sub": 20, "cdm": 20, "axion": 5}  # images that lenstronomy renders a repeat
WANTED_AUC = 0.99
AUC_PER_CLASS = 10_000
AUC_CHECKED_EVERY = 50  # steps of the peer
AUC_PATIENCE = 5  # times our seconds, after which the peer is stopped
OUR_RECIPE = ("--epochs", "1", "--validations", "1")
# Parts of `make reproduce`, in its order, and the last file that each of them leaves in RUNS.
PARTS = (
    ("images", "dataset.json"),
    ("pre-training", "pretrain/vit-mae-wt.pth"),
    *((name, f"{name}/vit-mae-classifier-wt.pth") for name in finetune.STRATEGIES),
    ("evaluation", "evaluation/metrics.json"),
    ("residuals and kinds", "residuals/.done"),
    ("ONNX files and predictions", "predictions.csv"),
)


# Timing


def seconds_in_turn(functions, repeats, device=None, pause=0.0):
    """Median seconds of each function, {name: seconds}; all run once to warm up, then in turn.

    A `pause` before each lets threads fall asleep that would otherwise wait actively for work.
    """
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            time.sleep(pause)
            took = seconds_of(function, device or torch.device("cpu"))
            if repeat:
                seconds[name].append(took)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def repeated(function, times):
    def again():
        for _ in range(times):
            function()

    return again


def matmul_peak(dtype, device):
    """Floating-point operations a second of large matrix products, the best of many."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = min(seconds_of(lambda: a @ b, device) for _ in range(20))
    return 2 * n**3 / best


def block_operations(tokens, width, context=0):
    """Multiplications and additions of a transformer block on `tokens` tokens of one image; the
    first `context` serve as keys and values only."""
    queries = tokens - context
    return 2 * ((3 * tokens + 9 * queries) * width**2 + 2 * queries * tokens * width)


def step_operations(kept):
    """Operations of a step an image: pre-training if `kept` patches are visible, else (None) of a
    classifier that sees all; backward counts twice as much as forward."""
    patches, pixels = (SIZE["img_size"] // SIZE["patch_size"]) ** 2, SIZE["patch_size"] ** 2
    visible, width = patches if kept is None else kept, SIZE["embed_dim"]
    forward = 2 * visible * pixels * width + SIZE["depth"] * block_operations(visible + 1, width)
    if kept is not None:
        narrow = DECODER["decoder_embed_dim"]
        forward += 2 * (visible + 1) * width * narrow + 2 * (patches - visible) * narrow * pixels
        forward += (DECODER["decoder_depth"] - 1) * block_operations(patches + 1, narrow)
        forward += block_operations(patches + 1, narrow, context=visible + 1)
    return 3 * forward


# Steps: functions without arguments, a whole training step each


def our_step(model, loss_of, precision, device, muon):
    """A step as `loop.fit` makes it; without `muon` AdamW has the matrices too."""
    set_attention_form(model, precision.attention)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = optim.parameter_groups(named, 0.05)
    if not muon:
        groups = [{**group, "matrix": False} for group in groups]
    optimizers = optim.new_optimizers(groups, 1e-4, (0.9, 0.95))

    def step():
        with precision.autocast(device):
            loss = loss_of()
        optim.update(loss, optimizers, precision, device)
        return loss.detach()

    if device.type != "cuda":
        return step
    optim.make_capturable(optimizers, device)
    graphed = GraphedStep(lambda rows, progress: step(), device)
    return lambda: graphed(np.zeros(1, int), 0.0)


def peer_step(model, loss_of, dtype, device, fused):
    """A step of a model of somebody else's with AdamW, plainly written."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=fused or None)

    def step():
        enabled = dtype == torch.bfloat16
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(kind, batch, precision, device, muon=True):
    """Our step on `batch` images; `kind` is "pretraining" or "finetuning"."""
    images = torch.rand(batch, 1, SIZE["img_size"], SIZE["img_size"], device=device)
    if kind == "pretraining":
        model = MAE(**SIZE, **DECODER).to(device)
        return our_step(model, lambda: model(images, MASK_RATIO)[0], precision, device, muon)
    model = Classifier(**SIZE, pool="stats").to(device)
    labels = torch.arange(batch, device=device) % 3
    loss = functools.partial(F.cross_entropy, target=labels)
    return our_step(model, lambda: loss(model(images).float()), precision, device, muon)


def hugging_face_options(size):
    """What Hugging Face calls the geometry of an encoder, such as SIZE."""
    return {
        "image_size": size["img_size"], "patch_size": size["patch_size"], "num_channels": 1,
        "hidden_size": size["embed_dim"], "num_hidden_layers": size["depth"],
        "num_attention_heads": size["num_heads"], "intermediate_size": 4 * size["embed_dim"],
    }  # fmt: skip


def hugging_face(kind, batch, attention, dtype, fused, device, compiled=None):
    """The same step of Hugging Face's ViTMAEForPreTraining or ViTForImageClassification.

    `compiled` is a mode of torch.compile.
    """
    import transformers

    encoder = hugging_face_options(SIZE)
    images = torch.rand(batch, 1, SIZE["img_size"], SIZE["img_size"], device=device)
    if kind == "pretraining":
        config = transformers.ViTMAEConfig(
            **encoder, mask_ratio=MASK_RATIO, decoder_hidden_size=DECODER["decoder_embed_dim"],
            decoder_num_hidden_layers=DECODER["decoder_depth"],
            decoder_num_attention_heads=DECODER["decoder_num_heads"],
            decoder_intermediate_size=4 * DECODER["decoder_embed_dim"],
        )  # fmt: skip
        kind_of_model, more = transformers.ViTMAEForPreTraining, {}
    else:
        config = transformers.ViTConfig(**encoder, num_labels=3)
        kind_of_model = transformers.ViTForImageClassification
        more = {"labels": torch.arange(batch, device=device) % 3}
    config._attn_implementation = attention
    model = kind_of_model(config).to(device).train()
    if compiled:
        model = torch.compile(model, mode=compiled)
    return peer_step(model, lambda: model(images, **more).loss, dtype, device, fused)


peer_made_once = functools.cache(hugging_face)


def peer_in_worker(*arguments):
    """Make a step of `hugging_face(*arguments)`, in the process that this is called in."""
    seconds_of(peer_made_once(*arguments), arguments[-1])  # waits until it is done


# Rows: each yields (what, against what, {"ratio", and what else there is to say})


def row(what, against, ours_seconds=None, peer_seconds=None, **more):
    ratio = peer_seconds / ours_seconds if ours_seconds and peer_seconds else None
    return {"what": what, "against": against, "ratio": ratio, **more}


def absent(what, against, package):
    return {"what": what, "against": against, "ratio": None, "note": f"{package} is not installed"}


def installed(package):
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def precisions(device):
    """What our steps may be computed in here, the formats that `device.choose_precision` chooses from, with both kernels."""
    names = ["float32", "bfloat16"] if bfloat16_is_fast(device) else ["float32"]
    return [Precision(n, form) for n in names for form in ("fused", "plain")]


def steps(bench, kind, title):
    """Our fastest step against Hugging Face's at its defaults and at its best."""
    if bench.device.type == "cuda":
        yield from steps_on_gpu(bench, kind, title)
        return
    device, kept = bench.device, kept_patches(kind)
    own = precisions(device)
    dtypes = dict.fromkeys(getattr(torch, p.name) for p in own)
    forms = list(itertools.product(("sdpa", "eager"), dtypes)) if installed("transformers") else []
    for batch in BATCHES:
        functions = {p: ours(kind, batch, p, device) for p in own}
        functions |= {("AdamW", p): ours(kind, batch, p, device, muon=False) for p in own}
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as worker:

            def elsewhere(*arguments, worker=worker):
                return lambda: worker.submit(peer_in_worker, *arguments).result()

            for form in forms:
                functions[form] = elsewhere(kind, batch, *form, True, device)
                functions["kept", form] = hugging_face(kind, batch, *form, True, device)
            if forms:
                functions["default"] = elsewhere(kind, batch, "sdpa", torch.float32, False, device)
            seconds = seconds_in_turn(functions, bench.repeats, device)
        fastest = min(own, key=seconds.get)
        what = f"{title}, batch {batch}"
        peak = bench.peak(getattr(torch, fastest.name))
        muon, adamw = (
            {
                "images/s": batch / seconds[key],
                "share of peak": batch * step_operations(kept) / seconds[key] / peak,
                "note": f"{fastest.name}, {optimizer}",
            }
            for key, optimizer in ((fastest, "Muon"), (("AdamW", fastest), "AdamW"))
        )
        if not forms:
            yield absent(what, "Hugging Face", "transformers") | muon
            yield absent(what, "Hugging Face", "transformers") | adamw
            continue
        best = min(forms, key=seconds.get)
        described = f"{best[0]}, {str(best[1]).removeprefix('torch.')}, fused AdamW"
        for against, peer in (
            ("Hugging Face, defaults", "default"),
            (f"Hugging Face, best ({described})", best),
            ("the same, freed memory kept as here", ("kept", best)),
        ):
            yield row(what, against, seconds[fastest], seconds[peer], **muon)
            yield row(what, against, seconds["AdamW", fastest], seconds[peer], **adamw)


def steps_on_gpu(bench, kind, title):
    """Our step in bfloat16, a CUDA graph, against Hugging Face's as it is and compiled."""
    device, kept = bench.device, kept_patches(kind)
    precision = Precision("bfloat16", "fused")
    peak = bench.peak(torch.bfloat16)
    for batch in GPU_BATCHES:
        functions = {o: ours(kind, batch, precision, device, o == "Muon") for o in ("Muon", "AdamW")}
        if installed("transformers"):
            for mode in (None, *COMPILED):
                functions[mode] = hugging_face(
                    kind, batch, "sdpa", torch.bfloat16, True, device, compiled=mode
                )
        steps = {name: repeated(function, GPU_STEPS) for name, function in functions.items()}
        seconds = seconds_in_turn(steps, bench.repeats, device)
        seconds = {name: value / GPU_STEPS for name, value in seconds.items()}
        best = min((None, *COMPILED), key=lambda mode: seconds.get(mode, math.inf))
        how = f"torch.compile {best}" if best else "not compiled"
        for optimizer in ("Muon", "AdamW"):
            speed = batch / seconds[optimizer]
            yield row(
                f"{title}, batch {batch}", f"Hugging Face, best (sdpa, bfloat16, fused AdamW, {how})",
                seconds[optimizer], seconds.get(best), note=f"bfloat16, {optimizer}",
                **{"images/s": speed, "share of peak": speed * step_operations(kept) / peak},
            )  # fmt: skip


def kept_patches(kind):
    """Patches that a step of pre-training leaves visible; None of a classifier, which sees all."""
    patches = (SIZE["img_size"] // SIZE["patch_size"]) ** 2
    return int(patches * (1 - MASK_RATIO)) if kind == "pretraining" else None


def pretraining(bench):
    yield from steps(bench, "pretraining", "pre-training step")


def finetuning(bench):
    yield from steps(bench, "finetuning", "full fine-tuning step, all tokens")


def inference(bench):
    """The exported classifier against PyTorch, and its smaller versions against it."""
    model = Classifier(**SIZE, pool="stats").eval()
    images = {b: np.random.default_rng(0).random((b, 1, 64, 64), np.float32) for b in (1, 256)}
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    session_options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "float32.onnx"
        export.write_onnx(export.Probabilities(model).eval(), path, {})
        sessions = {}
        for precision in ("float32", "int8", "float16"):
            copy = Path(folder) / f"{precision}.onnx"
            copy.write_bytes(path.read_bytes())
            if precision != "float32":
                export.reduce_precision(copy, precision, images[256], {})
            sessions[precision] = onnxruntime.InferenceSession(copy.read_bytes(), session_options)
        for batch, array in images.items():
            tensor, calls = torch.from_numpy(array), -(-64 // batch)
            functions = {"torch": lambda t=tensor: model(t).softmax(dim=1)}
            for precision, session in sessions.items():
                functions[precision] = functools.partial(probabilities_of, session, array)
            seconds = seconds_in_turn(
                {name: repeated(f, calls) for name, f in functions.items()}, bench.repeats,
                pause=0.1,
            )  # fmt: skip
            seconds = {name: value / calls for name, value in seconds.items()}
            what = f"classifier inference, batch {batch}"
            note = f"ours {min(batch, predict.BATCH_SIZE)} at once"
            yield row(what, "PyTorch eager", seconds["float32"], seconds["torch"],
                      note=note, **{"images/s": batch / seconds["float32"]})  # fmt: skip
            for precision in ("int8", "float16"):
                yield row(f"{what}, {precision}", "float32 ONNX", seconds[precision],
                          seconds["float32"],
                          note=note, **{"images/s": batch / seconds[precision]})  # fmt: skip


def probabilities_of(session, images):
    """Probabilities of all `images` by an exported classifier, as many at once as in predict.py."""
    parts = range(0, len(images), predict.BATCH_SIZE)
    return [session.run(None, {"images": images[i : i + predict.BATCH_SIZE]}) for i in parts]


def rendering(bench):
    """An image of the simulator against lenstronomy's ImageModel, by class."""
    peer = lenstronomy_renderer() if installed("lenstronomy") else None
    for class_name, peer_images in RENDERED.items():
        what, against = f"rendering an image, {class_name}", "lenstronomy"
        count = 500
        source, masses, _ = lenses.sample(class_name, count, np.random.default_rng(0))
        functions = {"ours": lambda s=source, m=masses: lenses.render(s, m, dtype=torch.float32)}
        if peer:

            def peer_renders(source=source, masses=masses, images=peer_images):
                for i in range(images):
                    peer(source[i], masses[i])

            functions["peer"] = peer_renders
        seconds = seconds_in_turn(functions, bench.repeats)
        own = {"images/s": count / seconds["ours"]}
        if peer:
            each = seconds["ours"] / count
            yield row(what, against, each, seconds["peer"] / peer_images, **own)
        else:
            yield absent(what, against, "lenstronomy") | own


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
    frame = ImageData(
        np.zeros((pixels, pixels)), ra_at_xy_0=corner, dec_at_xy_0=corner,
        transform_pix2angle=np.eye(2) * scale,
    )  # fmt: skip
    psf = PSF("GAUSSIAN", fwhm=camera.psf_fwhm, pixel_size=scale)
    e1, e2 = lenses.LENS_ELLIPTICITY
    galaxy = {"theta_E": factor * lenses.einstein_radius(lenses.LENS_MASS), "e1": e1, "e2": e2}
    shear = {"gamma1": factor * lenses.SHEAR[0], "gamma2": factor * lenses.SHEAR[1]}
    e1, e2 = lenses.SOURCE_ELLIPTICITY
    light = {"amp": 1.0, "R_sersic": lenses.SOURCE_RADIUS, "n_sersic": 1.0, "e1": e1, "e2": e2}

    def render(source, point_masses):
        masses = [
            {"theta_E": factor**0.5 * theta, "center_x": x, "center_y": y}
            for theta, x, y in point_masses.tolist()
        ]
        lens = LensModel(["SIE", "SHEAR"] + ["POINT_MASS"] * len(masses))
        model = ImageModel(frame, psf, lens, LightModel(["SERSIC_ELLIPSE"]))
        place = {"center_x": source[0], "center_y": source[1]}
        return model.image([galaxy, shear, *masses], [{**light, **place}])

    return render


def head(bench):
    """The head strategy, which encodes once, against encoding in every epoch."""
    images = torch.rand(HEAD_IMAGES, 1, 64, 64, device=bench.device)
    labels = torch.arange(HEAD_IMAGES, device=bench.device) % 3
    model = Classifier(**SIZE, pool="stats").to(bench.device)
    precision = Precision("float32", "fused")

    def train_head(features_of):
        optimizers = optim.new_optimizers(
            optim.parameter_groups(model.fc.named_parameters(), 0.05), 1e-3, (0.9, 0.999)
        )
        for _ in range(HEAD_EPOCHS):
            for start in range(0, HEAD_IMAGES, 64):
                loss = F.cross_entropy(model.fc(features_of(start)), labels[start : start + 64])
                optim.update(loss, optimizers, precision, bench.device)

    @torch.no_grad()
    def encoded(start):
        return model.features(images[start : start + 64])

    def once():
        features = torch.cat([encoded(start) for start in range(0, HEAD_IMAGES, 64)])
        train_head(lambda start: features[start : start + 64])

    seconds = seconds_in_turn(
        {"once": once, "always": lambda: train_head(encoded)}, min(bench.repeats, 5), bench.device
    )
    yield row(f"head strategy, {HEAD_EPOCHS} epochs", "encoding in every epoch", seconds["once"],
              seconds["always"])  # fmt: skip


def packing(bench):
    """An epoch over the packed array against one np.load an image, in a DataLoader."""
    per_class = max(1, bench.files // 3)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "lenses"
        simulate.write_folder(folder, lenses.simulate("Model_II", per_class, 0, progress=False))
        paths = [path for files in data.list_classes(folder)[0].values() for path in files]
        start = time.perf_counter()
        dataset = data.load(folder, progress=False)
        packed_in = time.perf_counter() - start
        read = batch_reader(dataset.images, torch.device("cpu"))

        class Files(torch.utils.data.Dataset):
            def __len__(self):
                return len(paths)

            def __getitem__(self, i):
                image = np.load(paths[i], allow_pickle=True)
                return torch.from_numpy(np.array(image if image.ndim == 2 else image[0], "f4"))

        loader = DataLoader(Files(), batch_size=64, shuffle=True)

        def packed_epoch():
            order = np.random.default_rng(0).permutation(len(paths))
            for first in range(0, len(paths), 64):
                read(order[first : first + 64])

        def loader_epoch():
            for _ in loader:
                pass

        functions = {"ours": packed_epoch, "peer": loader_epoch}
        seconds = seconds_in_turn(functions, min(bench.repeats, 3))
    yield row(
        f"reading {len(paths)} .npy files, second epoch", "np.load in a DataLoader",
        seconds["ours"], seconds["peer"],
        **{"images/s": len(paths) / seconds["ours"], "note": f"packed once in {packed_in:.0f} s"},
    )  # fmt: skip


def time_to_auc(bench):
    """Training time until the macro AUC on test reaches WANTED_AUC, data made beforehand."""
    what = f"time to macro AUC {WANTED_AUC}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "lenses"
        batches = lenses.simulate("Model_II", bench.auc_per_class, 0, progress=False)
        simulate.write_packed(folder, batches, bench.auc_per_class, "Model_II", "bench")
        dataset = data.load(folder)
        test = data.split(dataset)["test"]

        out = Path(temporary) / "run"
        start = time.perf_counter()
        finetune.main([
            "--data", str(folder), "--pretrained", "none", "--strategy", "full", "--out", str(out),
            "--quiet", *OUR_RECIPE,
        ])  # fmt: skip
        own_seconds = time.perf_counter() - start
        model, _ = weights.load_classifier(out / "vit-mae-classifier-wt.pth")
        probabilities = evaluate.predict_probabilities(model, dataset.images, test, bench.device)
        auc = float(np.mean(metrics.auc_by_class(probabilities, dataset.labels[test])))
        note = f"{own_seconds:.0f} s to {auc:.4f}, whole run included"
        if not installed("transformers"):
            yield absent(what, "Hugging Face in a DataLoader loop", "transformers") | {"note": note}
            return
        reached, limit = {}, AUC_PATIENCE * own_seconds
        for batch in BATCHES:
            reached[batch] = peer_seconds_to_auc(dataset, test, batch, bench, limit)
            limit = min(limit, reached[batch])
        batch = min(reached, key=reached.get)
        in_time = math.isfinite(reached[batch])
        told = f"peer {reached[batch]:.0f} s, batch {batch}" if in_time else "peer given up"
        enough = own_seconds if auc >= WANTED_AUC else None
        yield row(what, "Hugging Face in a DataLoader loop", enough, limit,
                  note=f"{note}; {told}", at_least=not in_time)  # fmt: skip


def peer_seconds_to_auc(dataset, test, batch, bench, limit):
    """Seconds that Hugging Face's ViT trains for until it is as good; the time for evaluation is not counted.

    Infinite if that would be `limit` or more. It is as large as our default network and sees the
    same log-scaled images.
    """
    import transformers

    device, rows = bench.device, data.split(dataset)["train"]
    transform = IntensityTransform(**fit_transform(dataset.images, rows, "log"))
    transform.to(device)
    torch.manual_seed(0)
    size = {"img_size": dataset.img_size, **DEFAULT_SIZE}
    config = transformers.ViTConfig(**hugging_face_options(size), num_labels=3)
    model = transformers.ViTForImageClassification(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3 if batch > 64 else 5e-4)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, i):
            image = torch.from_numpy(np.array(dataset.images[rows[i]]))[None]
            return image, int(dataset.labels[rows[i]])

    def logits_of(batch_rows):
        images = torch.from_numpy(np.array(dataset.images[batch_rows]))[:, None].to(device)
        return model(transform(images)).logits

    seconds = 0.0
    loader = DataLoader(Rows(), batch_size=batch, shuffle=True)
    begun = time.perf_counter()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for count, (images, labels) in enumerate(batches, start=1):
        loss = F.cross_entropy(model(transform(images.to(device))).logits, labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if count % AUC_CHECKED_EVERY == 0:
            seconds += time.perf_counter() - begun
            model.eval()
            probabilities = in_batches(logits_of, test).softmax(dim=1).numpy()
            model.train()
            auc = np.mean(metrics.auc_by_class(probabilities, dataset.labels[test]))
            if auc >= WANTED_AUC:
                return seconds
            if seconds >= limit:
                return math.inf
            begun = time.perf_counter()


def reproduction(bench):
    """The parts of `make reproduce` one after the other; the environment's making is not timed."""
    run_make(".venv/ready")
    with tempfile.TemporaryDirectory() as temporary:
        whole = 0.0
        for part, file in PARTS:
            start = time.perf_counter()
            run_make(file, f"PER_CLASS={bench.per_class}", runs=temporary)
            seconds = time.perf_counter() - start
            whole += seconds
            yield row(f"make reproduce: {part}", "", note=f"{seconds:.0f} s", seconds=seconds)
        yield row("make reproduce", "", note=f"{whole:.0f} s", seconds=whole)


def run_make(target, *options, runs=None):
    """Make a target, one in the folder `runs` if it is given; UserError, with make's own, if that fails."""
    inside = [f"RUNS={runs}", f"{runs}/{target}"] if runs else [target]
    command = ["make", "-s", *options, *inside]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"make {target} failed: {done.stderr.strip() or done.stdout.strip()}")


ROWS = {
    "reproduction": reproduction,
    "pretraining": pretraining,
    "finetuning": finetuning,
    "inference": inference,
    "rendering": rendering,
    "head": head,
    "packing": packing,
    "time_to_auc": time_to_auc,
}


class Bench:
    """What the rows have in common; the matmul peaks are measured once."""

    def __init__(self, args):
        self.device, self.repeats = resolve_device(args.device), args.repeats
        self.files, self.auc_per_class = args.files, args.auc_per_class
        self.per_class = args.per_class
        self.peaks = {}

    def peak(self, dtype):
        if dtype not in self.peaks:
            self.peaks[dtype] = matmul_peak(dtype, self.device)
        return self.peaks[dtype]


# The table


def cpu_features():
    """Names of the vector units that matter here, from /proc/cpuinfo; "unknown" elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    found = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return ", ".join(found) or platform.machine()


def table(rows):
    lines = [["what", "against", "ratio", "images/s", "share of peak", ""]]
    for r in rows:
        sign = "≥ " if r.get("at_least") else ""
        ratio = f"{sign}{r['ratio']:.2f}×" if r["ratio"] else ""
        speed = f"{r['images/s']:.0f}" if "images/s" in r else ""
        share = f"{100 * r['share of peak']:.0f} %" if "share of peak" in r else ""
        lines.append([r["what"], r["against"], ratio, speed, share, r.get("note", "")])
    return tables.markdown(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=options.HelpFormatter
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder of the results")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to time")
    parser.add_argument("--repeats", type=int, default=5, help="of every pair; fewer of slow rows")
    parser.add_argument("--files", type=int, default=30_000, help="files of the row packing")
    parser.add_argument(
        "--auc-per-class", type=int, default=AUC_PER_CLASS, help="images of the row time_to_auc"
    )
    parser.add_argument(
        "--per-class", type=int, default=30_000, help="images of the row reproduction"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    options.add_device_argument(parser)
    args = parser.parse_args(argv)
    options.check_numbers(args)
    return args


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    bench, rows = Bench(args), []
    make_folder(args.out)
    machine = {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu_features(), "device": str(bench.device),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    for name in args.rows:
        for result in ROWS[name](bench):
            rows.append(result)
            print(table([result]).splitlines()[-1], flush=True)
        peaks = {str(dtype): peak / 1e9 for dtype, peak in bench.peaks.items()}
        machine["matmul GFLOP/s"] = peaks
        write_json(args.out / "bench.json", {**machine, "rows": rows})
        write_text(args.out / "bench.md", table(rows) + "\n\n" + json.dumps(machine) + "\n")


if __name__ == "__main__":
    run(main)
