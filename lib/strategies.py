"""The strategies of fine-tuning. All that is true of one stands in its class.

A `Strategy` says what a training takes by default, which options make no sense for it, which network
it builds from the weights that it starts from, what of it learns, and how outputs come about. A new
one is one more class, and an object of it in STRATEGIES.
"""

import numpy as np
import torch
from torch import nn

from lib import compatibility, distributed, network, options, weights
from lib.augment import KINDS, SYMMETRIES, augment
from lib.errors import UserError
from lib.intensity import fit_transform
from lib.loader import EVALUATION_BATCH, are_on_device, batch_reader, in_batches, read_disturbed
from lib.loop import Learner, learner_of
from lib.recipe import Defaults
from lib.residuals import mask_ratio_of, stored_maps
from mae import (
    MAE, MAP_WIDTHS, Classifier, MassEstimator, ResidualClassifier, Sharpener, default_map_pool, random_masking,
)  # fmt: skip

ALL_PATCHES_FROM = 0.5  # of the steps: patch dropout ends here
BATCHNORM_IMAGES = 2048  # training images that BatchNorm's statistics are computed from
DEFAULT_POOL = "stats"
# By option: its neutral value, why a strategy cannot use any other, and a remedy.
USELESS = {
    "patch_dropout": (0, "all patches are needed", "use --strategy layernorm or full"),
    "pool": (None, "there are no patch tokens to pool", "use --strategy full"),
    "layer_decay": (1, "all that learns has one learning rate", "use --strategy full"),
    "map_pool": (None, "only a classifier on residual maps averages them", "use --strategy residual"),
    "with_image": (False, "only a classifier on residual maps can be shown the image, too", "use --strategy residual"),
}
OTHER_SIZE = ": pre-train on images of this size"


class Strategy:
    """A head on the pre-trained encoder, a `Classifier`; base of all strategies.

    network : the class of what it trains.
    defaults : of its recipe when it starts from an MAE.
    from_scratch : what differs for random weights; None: it needs weights to start from.
    continuing : what differs when it continues from a classifier, whose head is already trained.
    augmentations : the kinds of `augment.KINDS` that it can use.
    uses : the options of USELESS that mean something to it.
    classifies : whether it trains a classifier, whose weights hold a familiarity, and may continue one.
    """

    name, network = None, Classifier
    defaults = None
    from_scratch, continuing = None, {}
    augmentations, no_augmentation = KINDS, ""
    uses = frozenset({"patch_dropout", "pool"})
    classifies = True

    # Options

    def check(self, args):
        """UserError, naming the flag, for options that this strategy has no use for."""
        if args.pretrained == "none" and self.from_scratch is None:
            raise UserError(
                f"--pretrained none: --strategy {self.name} needs pre-trained weights; use --strategy full"
            )
        if args.batch_size == 1 and self.classifies:
            raise UserError("--batch-size must be at least 2: BatchNorm needs several images a step")
        if set(args.augment or ()) - set(self.augmentations):
            remedy = "use --strategy full" if self.classifies else "leave it out"
            raise UserError(f"--augment: {self.no_augmentation}; {remedy}")
        for name, (neutral, reason, remedy) in USELESS.items():
            if name not in self.uses and getattr(args, name) not in (None, neutral):
                remedy = remedy if self.classifies else "leave it out"
                raise UserError(f"{options.flag_of(name)}: {reason}; {remedy}")
        if args.layer_decay not in (None, 1) and args.pretrained == "none":
            raise UserError("--layer-decay: random weights have no learned blocks to keep; leave it out")

    def defaults_from(self, start):
        """`Defaults` of a training that starts from opened `Weights`, or from None."""
        if start is None:
            return self.defaults._replace(**self.from_scratch)
        return self.defaults._replace(**self.continuing) if start.is_classifier else self.defaults

    def recipe(self, args, start, images):
        """The `Recipe` of parsed options for a number of training images; UserError for weights of no use."""
        if not self.classifies and start is not None and start.kind != "mae":
            raise UserError(f"--pretrained {start.path}: --task {args.task} starts from an MAE of pretrain.py, or none")
        kept = start.content["config"].get("pool") if start else None  # of a classifier
        pool = args.pool or kept or DEFAULT_POOL
        return self.defaults_from(start).recipe(args, images, pool if "pool" in self.uses else None)

    # Network

    def build(self, args, start, recipe, task, rows):
        """The network that training starts from, and the arguments of its constructor.

        `start` is None, see `with_random_weights`; an opened MAE, of which `around` takes what it needs; or
        an opened classifier, see `continued`. Raises UserError where options, data, weights and strategy do
        not fit. `rows` are the training images.
        """
        dataset = task.inputs
        asked = network.options_of(args, dataset.img_size, start)

        def new_transform():
            return fit_transform(dataset.images, rows, asked["transform"], recipe.augment)

        if start is None:
            sizes = {name: value for name, value in asked.items() if name != "transform"}
            more = {**task.config, "transform": new_transform()}
            return self.with_random_weights({"img_size": dataset.img_size, **sizes}, recipe, more)
        compatibility.check_unit(dataset, rows, start.content["run"])
        if start.is_classifier:
            return self.continued(args, start, recipe, dataset), start.content["config"]
        pretrained, transform = weights.encoder_of(start)
        compatibility.check_size(start.path, pretrained, dataset, OTHER_SIZE)
        if transform is None:  # a checkpoint from elsewhere
            constants = new_transform()
        else:
            compatibility.check_split(start.content["run"])
            constants = start.content["config"]["transform"]
        return self.around(args, start, pretrained, recipe, {**task.config, "transform": constants})

    def with_random_weights(self, sizes, recipe, more):
        """A network of random weights, whose encoder has these `sizes`, and its arguments; `more` are given."""
        config = {**sizes, **more, "pool": recipe.pool}
        return network.build(self.network, config), config

    def continued(self, args, start, recipe, dataset):
        """The classifier of opened `Weights`, taken whole to be trained further; UserError if it does not fit."""
        content = start.content
        model = weights.classifier_of(start)
        compatibility.check_split(content["run"])
        compatibility.check_size(start.path, model, dataset, OTHER_SIZE)
        if not isinstance(model, self.network):
            *others, last = (name for name, s in STRATEGIES.items() if isinstance(model, s.network))
            names = f"{', '.join(others)} or {last}" if others else last
            raise UserError(f"{start.path} is a classifier of --strategy {names}: continue with that")
        if content["class_names"] != list(dataset.class_names):
            raise UserError(f"{start.path} tells {', '.join(content['class_names'])} apart; start from an "
                            "MAE for other classes")  # fmt: skip
        if "pool" in self.uses and model.pool != recipe.pool:
            raise UserError(f"{start.path} has --pool {model.pool}; start from an MAE for another --pool")
        return model

    def around(self, args, start, pretrained, recipe, more):
        """A network with the `pretrained` encoder, and its arguments; `more` of them are given."""
        sizes = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
        known = start.content["config"]
        config = {name: known[name] for name in sizes if name in known} | {"pool": recipe.pool, **more}
        model = self.network(**config)
        encoder = {k: v for k, v in pretrained.state_dict().items() if k in model.state_dict()}
        model.load_state_dict({**model.state_dict(), **encoder})
        return model, config

    # Training

    def learning(self, model):
        """The parameters that are trained, (name, parameter) pairs."""
        raise NotImplementedError

    def learner(self, model, dataset, rows, run, device):
        """What of a network is trained, and how it computes, for a training that reads `rows` of a data set.

        Returns (`loop.Learner`, function from rows (b,) and the fraction of the steps done to the outputs
        (b, width) of a step, function from rows (b,) to outputs (b, width) as the finished network gives
        them, not calibrated).
        """
        read, recipe = batch_reader(dataset.images, device), run.recipe

        def training_outputs(batch, progress):
            part = distributed.local_slice(len(batch))
            ids_keep = patches_to_keep(model, len(batch), recipe.patch_dropout, progress, device)
            images = augment(read(batch[part]), recipe.augment, len(batch), part)
            features = model.features(images, None if ids_keep is None else ids_keep[part])
            return model.fc(distributed.gather(features))

        def outputs(batch):
            return model.fc(model.features(read_disturbed(read, batch, recipe.augment)))

        learner = learner_of(model, self.learning(model), dataset, read)._replace(
            changes_at=(ALL_PATCHES_FROM,) if recipe.patch_dropout else (),
            lr_scale=layer_scale(recipe.layer_decay, len(model.blocks)),
        )
        return learner, training_outputs, outputs


class Head(Strategy):
    """Train the head alone; the frozen encoder's output is computed once, not every epoch."""

    name = "head"
    defaults = Defaults(epochs=100, fewest_steps=1000, batch_size=1024, lr=8e-3, augment=())
    continuing = {"lr": 8e-4, "epochs": 20, "fewest_steps": 300}
    augmentations, no_augmentation = (), "the head learns from stored features"
    uses = frozenset({"pool"})

    def learning(self, model):
        return [(f"fc.{name}", parameter) for name, parameter in model.fc.named_parameters()]

    def learner(self, model, dataset, rows, run, device):
        read = batch_reader(dataset.images, device)
        stored = stored_features(model, read, rows, len(dataset.labels))

        def outputs(batch, progress=None):
            return model.fc(stored[batch])

        return Learner(model.fc, self.learning(model), on_device=True), outputs, outputs


class LayerNorm(Strategy):
    """Train every LayerNorm and the head."""

    name = "layernorm"
    defaults = Defaults(epochs=2, fewest_steps=1000, batch_size=64, lr=1e-2, augment=(), patch_dropout=0.5)
    continuing = {"lr": 3e-4, "batch_size": 128, "epochs": 1, "fewest_steps": 300, "patch_dropout": 0.0}

    def learning(self, model):
        norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
        inside = [(f"{n}.{k}", p) for n, m in norms for k, p in m.named_parameters()]
        return inside + Head().learning(model)


class Full(Strategy):
    """Train the whole network, from pre-trained or from random weights."""

    name, uses = "full", Strategy.uses | {"layer_decay"}
    defaults = Defaults(
        epochs=6, fewest_steps=1000, batch_size=128, lr=3e-3, augment=(), patch_dropout=0.5, layer_decay=0.75,
        few={"augment": ("flips",), "patch_dropout": 0.0, "layer_decay": 1.0},
    )  # fmt: skip
    # With all patches random weights overfit few images.
    from_scratch = {"layer_decay": 1.0, "few": {"augment": ("flips",)}}
    continuing = {"lr": 2e-4, "epochs": 1, "fewest_steps": 300, "patch_dropout": 0.0, "few": {}}

    def learning(self, model):
        return [(name, p) for name, p in model.named_parameters() if name != "pos_embed"]


class Residual(Strategy):
    """Train a small network on the frozen MAE's residual maps, which are computed once.

    The maps are kept in --out until the run is finished. Of several processes each takes the whole
    step, as it does for the head: it is short.
    """

    name, network = "residual", ResidualClassifier
    # The last weights are kept: the AUC of validation soon reaches 1 and says no more.
    defaults = Defaults(epochs=3, fewest_steps=1000, batch_size=64, lr=3e-3, keep="last", most_validations=3)
    continuing = {"lr": 3e-4, "epochs": 1, "fewest_steps": 300, "keep": "best"}
    augmentations = SYMMETRIES
    no_augmentation = f"residual maps are computed once, so only {', '.join(SYMMETRIES)} or none is possible"
    uses = frozenset({"map_pool", "with_image"})

    def around(self, args, start, pretrained, recipe, more):
        pool = default_map_pool(pretrained.img_size) if args.map_pool is None else args.map_pool
        if args.map_pool and pretrained.img_size // pool < 2 ** len(MAP_WIDTHS):
            raise UserError(f"--map-pool {pool} leaves maps of {pretrained.img_size // pool} pixels a side, fewer than "
                            f"{2 ** len(MAP_WIDTHS)}: give a smaller one")  # fmt: skip
        more = {
            "mask_ratio": mask_ratio_of(start.content), "map_pool": pool,
            "with_image": args.with_image, "orientations": 8 if "flips" in recipe.augment else 2, **more,
        }  # fmt: skip
        return on_mae(self.network, start, pretrained, more, "--strategy residual", "; use another strategy")

    def continued(self, args, start, recipe, dataset):
        model = super().continued(args, start, recipe, dataset)
        if args.with_image and not model.with_image:
            raise UserError(f"{start.path} sees no image beside its map: leave --with-image out, or start from an MAE")
        if args.map_pool not in (None, model.map_pool):
            raise UserError(f"{start.path} has --map-pool {model.map_pool}; start from an MAE for another --map-pool")
        return model

    def learning(self, model):
        return list(model.network.named_parameters())

    def reader_of_maps(self, model, read, rows, run, device):
        """(function from some of the `rows` to maps (b, *model.map_shape), the `batch_reader` that it uses).

        The maps are computed by the `model` from what `read` gives, and stored.
        """
        model.eval()
        maps = stored_maps(lambda batch: model.maps(read(batch)), rows, run.maps_path, model.map_shape, run.quiet)
        read_maps = batch_reader(maps, device)
        place = np.full(rows.max() + 1, -1)
        place[rows] = np.arange(len(rows))
        if are_on_device(read_maps):
            place = torch.from_numpy(place).to(device)
        return lambda batch: read_maps(place[batch]).view(-1, *model.map_shape), read_maps

    def learner(self, model, dataset, rows, run, device):
        read = batch_reader(dataset.images, device)
        maps, read_maps = self.reader_of_maps(model, read, rows, run, device)

        def training_outputs(batch, progress):
            return model.network(augment(maps(batch), run.recipe.augment))

        def outputs(batch):
            return model.logits(maps(batch))

        return learner_of(model.network, self.learning(model), dataset, read_maps), training_outputs, outputs


class Mass(Residual):
    """Train a network on images beside the frozen MAE's residual maps, or on images alone, see `MassEstimator`.

    It computes in float32 by default: short vortices differ by a thousandth.
    """

    network, classifies = MassEstimator, False
    defaults = Defaults(epochs=10, fewest_steps=2000, batch_size=64, lr=3e-3, augment=(), keep="last")
    from_scratch = {}
    augmentations, no_augmentation = (), "the mass is learned from images as they are"
    uses = frozenset()  # it always sees the image

    def recipe(self, args, start, images):
        recipe = super().recipe(args, start, images)
        return recipe._replace(precision="float32") if args.precision == "auto" else recipe

    def with_random_weights(self, sizes, recipe, more):
        config = {"img_size": sizes["img_size"], **more}
        return constructed(self.network, config, "--task mass"), config

    def around(self, args, start, pretrained, recipe, more):
        more = {"mask_ratio": mask_ratio_of(start.content), **more}
        return on_mae(self.network, start, pretrained, more, "--task mass")

    def learner(self, model, dataset, rows, run, device):
        read = batch_reader(dataset.images, device)
        maps, readers = None, [read]
        if model.mae is not None:
            maps, read_maps = self.reader_of_maps(model, read, rows, run, device)
            readers.append(read_maps)

        def outputs(batch, progress=None):
            return model.estimates(read(batch), maps and maps(batch))

        return learner_of(model.network, self.learning(model), dataset, *readers), outputs, outputs


class Sharpen(Strategy):
    """Train the whole MAE, decoder included, and convolutions to sharpen images, see `Sharpener`.

    Data sets are those of the coarse images. Of several processes each takes the whole step.
    """

    name, network, classifies = "full", Sharpener, False
    defaults = Defaults(epochs=5, fewest_steps=800, batch_size=16, lr=3e-3, beta2=0.95, augment=())
    from_scratch = {}
    augmentations, no_augmentation = (), "coarse and sharp images belong together as they are"
    uses = frozenset()

    def with_random_weights(self, sizes, recipe, more):
        network.build(MAE, sizes)  # names the flag of a size that does not fit
        config = {"mae": sizes, **more}
        return self.network(**config), config

    def around(self, args, start, pretrained, recipe, more):
        return on_mae(self.network, start, pretrained, more, "--task sharpen")

    def learning(self, model):
        unused = ("mae.mask_token", "mae.decoder_pred", "mae.pos_embed", "mae.decoder_pos_embed")
        return [(name, p) for name, p in model.named_parameters() if not name.startswith(unused)]

    def learner(self, model, dataset, rows, run, device):
        read = batch_reader(dataset.images, device)

        def outputs(batch, progress=None):
            images = read(batch)
            clean = model.clean(images)
            with torch.autocast(device.type, enabled=False):
                sharp, error = model.with_noise(images, clean)
            return torch.cat([sharp.flatten(1), error.unsqueeze(1)], dim=1)

        return learner_of(model, self.learning(model), dataset, read), outputs, outputs


STRATEGIES = {strategy.name: strategy for strategy in (Head(), LayerNorm(), Full(), Residual())}
TASK_STRATEGIES = {"mass": Mass(), "sharpen": Sharpen()}  # by --task


def strategy_of(args):
    """The `Strategy` that parsed options name; UserError if the task has another one."""
    strategy = TASK_STRATEGIES.get(args.task) or STRATEGIES[args.strategy]
    if args.strategy != strategy.name:
        raise UserError(f"--task {args.task}: --strategy {args.strategy} learns something else; use "
                        f"--strategy {strategy.name}")  # fmt: skip
    return strategy


# Parts of a training


def on_mae(model_class, start, pretrained, more, what, remedy=""):
    """A `model_class` that holds the MAE of opened `Weights`, and its arguments; `more` of them are given.

    Raises UserError, naming `what` the options ask for, for an MAE without decoder or arguments that do not fit.
    """
    if not isinstance(pretrained, MAE):
        raise UserError(
            f"{start.path} is from elsewhere: {what} needs the decoder of an MAE of pretrain.py{remedy}"
        )
    config = {"mae": {k: v for k, v in start.content["config"].items() if k != "transform"}, **more}
    model = constructed(model_class, config, what, remedy)
    model.mae.load_state_dict(pretrained.state_dict())
    return model, config


def constructed(model_class, config, what, remedy=""):
    """`model_class(**config)`; UserError if its arguments do not fit."""
    try:
        return model_class(**config)
    except ValueError as error:
        raise UserError(f"{what}: {error}{remedy}") from None


def freeze_others(model, learning):
    """Let only the parameters of `learning`, (name, parameter) pairs, have gradients."""
    model.requires_grad_(False)
    for _, parameter in learning:
        parameter.requires_grad_(True)


def layer_scale(layer_decay, depth):
    """Function from a parameter's name to the factor of its learning rate.

    The rate of a block is `layer_decay` times that of the next one; the head's factor is 1.
    """

    def scale(name):
        layer = depth + 1  # of the head; 0 of the embedding
        if name.startswith(("patch_embed", "cls_token")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        return layer_decay ** (depth + 1 - layer)

    return scale


def stored_features(model, read, rows, count):
    """Pooled encoder outputs (count, d) on the device; only `rows` are computed."""
    model.eval()
    computed = in_batches(lambda batch: model.features(read(batch)), rows)
    device = model.cls_token.device
    features = torch.zeros(count, computed.shape[1], device=device)
    features[rows] = computed.to(device)
    return features


def patches_to_keep(model, images, dropout, progress, device):
    """Random patches (images, n) that a training step sees; None for all of them.

    `progress` is the fraction of the steps done: from ALL_PATCHES_FROM on no patch is dropped.
    """
    if not dropout or progress >= ALL_PATCHES_FROM:
        return None
    keep = max(1, round(model.num_patches * (1 - dropout)))
    ids_keep, _ = random_masking(torch.rand(images, model.num_patches, device=device), keep)
    return ids_keep


@torch.no_grad()
def reestimate_batchnorm(model, forward, rows):
    """Recompute BatchNorm's running statistics from training rows, with dropout off.

    The bias in front of a BatchNorm has no gradient, so Adam lets it drift, and running means lag
    behind it: without this, validation may look like chance while training goes well.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # an average over all batches
        norm.train()
    # Rows may be sorted by class: every batch must hold all classes, or variances are too small.
    chosen = np.random.default_rng(0).permutation(rows)[:BATCHNORM_IMAGES]
    batch = min(EVALUATION_BATCH, len(chosen))
    for start in range(0, len(chosen) - batch + 1, batch):
        forward(chosen[start : start + batch])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
