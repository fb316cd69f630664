"""The options of a network that starts from random weights, and its checked construction."""

from lib.errors import UserError
from lib.options import flag_of
from lib.weights import LARGEST, MOST_PATCHES_A_SIDE
from mae import TRANSFORM_KINDS

# Also what weights have that do not say it. A new network has another patch size, see PATCHES_A_SIDE.
DEFAULTS = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "transform": "log"}
PATCHES_A_SIDE = 4  # of a new network
OF_THE_DATA = {"img_size": "pixels of a side of the images", "num_classes": "classes"}  # limits that no option sets


def add_arguments(parser):
    """The geometry of the network and the intensity scale that it sees."""
    group = parser.add_argument_group("network")

    def add(name, text, **more):
        default = f"1/{PATCHES_A_SIDE} of the image's side" if name == "patch_size" else DEFAULTS[name]
        group.add_argument(flag_of(name), default=None, help=f"{text} (default: {default})", **more)

    add("patch_size", "side of a patch in pixels", type=int)
    add("embed_dim", "width of the encoder", type=int)
    add("depth", "blocks of the encoder", type=int)
    add("num_heads", "attention heads of the encoder", type=int)
    add("transform", "intensity scale that the network sees", choices=TRANSFORM_KINDS)


def options_of(args, img_size, start=None):
    """{option: value} of the network: that of the weights `start` or, without them, of the options.

    `img_size` is the side of the images, `start` an opened `Weights` or None. Raises UserError, naming the
    flag, if an option says something else than the weights.
    """
    given = {name: getattr(args, name) for name in DEFAULTS}
    if start is None:
        usual = DEFAULTS | {"patch_size": max(1, img_size // PATCHES_A_SIDE)}
        return {name: usual[name] if value is None else value for name, value in given.items()}
    config = start.content["config"]
    sizes = config.get("mae", config)
    kind = config.get("transform", {}).get("kind", given["transform"] or DEFAULTS["transform"])
    network = {name: sizes.get(name, DEFAULTS[name]) for name in DEFAULTS} | {"transform": kind}
    for name, value in given.items():
        if value not in (None, network[name]):
            raise UserError(f"{flag_of(name)} {value}: the network of {start.path} has {network[name]}; "
                            "leave the option out")  # fmt: skip
    return network


def build(model_class, config):
    """`model_class(**config)`, an `MAE` or `Classifier`; UserError, naming the flag, if that is invalid."""
    for name, limit in LARGEST.items():
        if config.get(name, 0) > limit:
            what = OF_THE_DATA.get(name, flag_of(name))
            raise UserError(f"{what} must be at most {limit}, got {config[name]}")
    patch_size, img_size = config["patch_size"], config["img_size"]
    if img_size % patch_size:
        raise UserError(
            f"--patch-size {patch_size} does not divide the image size {img_size}: {sizes_for(img_size)}"
        )
    if img_size // patch_size > MOST_PATCHES_A_SIDE:
        raise UserError(f"--patch-size {patch_size} cuts images of {img_size} pixels into more than "
                        f"{MOST_PATCHES_A_SIDE}×{MOST_PATCHES_A_SIDE} patches: choose a larger one")  # fmt: skip
    for name in ("embed_dim", "decoder_embed_dim"):
        if int(config.get(name, 1) * config.get("mlp_ratio", 4.0)) < 1:
            raise UserError(f"--mlp-ratio {config['mlp_ratio']} leaves no width: choose a larger one")
    try:
        return model_class(**config)
    except ValueError as error:
        raise UserError(f"these network options do not fit together: {error}") from None


def sizes_for(img_size):
    """What to do where a patch size does not divide `img_size`: the sizes that do, or to crop."""
    sizes = [n for n in range(2, min(img_size // 2, LARGEST["patch_size"]) + 1)
             if img_size % n == 0 and img_size // n <= MOST_PATCHES_A_SIDE]  # fmt: skip
    if sizes:
        return f"choose one that does ({', '.join(map(str, sizes))}), or crop the images"
    return f"no patch size does; crop the images, for example to a side that is a multiple of {PATCHES_A_SIDE}"
