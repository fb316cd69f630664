"""Options of predict.py that say which files are read, and how; without torch."""

import argparse
import contextlib
import glob
import math
import os
import sys
from pathlib import Path

from lib import options
from lib.errors import UserError
from lib.images import MINMAX, How
from lib.onnxfile import number_in


def add_arguments(parser):
    parser.add_argument(
        "paths", type=word_argument, nargs="+", metavar="PATH",
        help="files, folders, patterns such as 'cutouts/**/*.fits', @FILE with a path a line, or - for such "
        "lines on standard input",
    )  # fmt: skip
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--crop", action="store_true", help="use the centre of images larger than the network's"
    )
    group.add_argument(
        "--centre", type=centre_argument, metavar="X,Y",
        help="crop around this column and row of the file, counted from 0, or (brightest) around the brightest pixel",
    )  # fmt: skip
    group.add_argument(
        "--hdu", metavar="NAME", help="name or number of the HDU to read in FITS files; by default the only one "
        "that shows the sky: no weights, errors, masks or PSF",
    )  # fmt: skip
    group.add_argument(
        "--planes", type=planes_argument, metavar="WHAT",
        help="what several planes of a file are: lenses; bands of one lens, whose mean is used; or the number of "
        "the band to use. By default the planes of a .npy file are lenses, and a FITS cube is refused",
    )  # fmt: skip
    group.add_argument(
        "--scale", type=word_or_number(MINMAX, "a positive number"), metavar="FACTOR",
        help="multiply all pixels by it: for images in another unit than the training images (0.00392 for 1/255); "
        "1 leaves FITS images as they are. Without it their headers say the unit, where they are unambiguous. "
        f"{MINMAX}: scale each image to its own minimum and maximum, as the training images of make many-lenses are",
    )  # fmt: skip
    group.add_argument(
        "--zero-point", type=float, metavar="MAG", help="magnitude of one count per second in the images, which "
        "brings them to the model's unit, in place of --scale",
    )  # fmt: skip
    group.add_argument(
        "--exposure", type=float, default=1.0, metavar="SECONDS", help="of images in counts, beside --zero-point"
    )
    group.add_argument(
        "--pixel-scale", type=word_or_number("wcs", "a number of arcsec"), metavar="ARCSEC",
        help="of the images' pixels, or wcs for what FITS headers say: resamples them to the model's",
    )  # fmt: skip


def refuse_unused(args, argv):
    """UserError for an option that another makes useless."""
    if args.zero_point is None:
        options.refuse_unused(argv, ("exposure",), "there is no --zero-point")
    else:
        options.refuse_unused(argv, ("scale",), "--zero-point says the unit")


def how_to_read(args, session):
    """The `How` of the options; UserError for --pixel-scale if the model does not say its own."""
    wanted = number_in(session, "pixel_scale")
    if args.pixel_scale and not wanted:
        raise UserError(f"--pixel-scale: {args.model} does not say the scale of its own pixels")
    how = How(args.hdu, args.planes, args.crop, args.centre, args.pixel_scale, wanted)
    zero_point = number_in(session, "zero_point")  # of the model's unit
    if args.zero_point is None:
        return how._replace(zero_point=zero_point) if args.scale is None else how._replace(factor=args.scale)
    if not zero_point:
        raise UserError(f"--zero-point: {args.model} does not say the zero point of its own unit: use --scale")
    return how._replace(factor=10 ** (0.4 * (zero_point - args.zero_point)) / args.exposure)


def paths_named(words):
    """The paths that words name: files, folders, patterns, @lists, and - for standard input."""
    for word in words:
        if word == "-" or (word.startswith("@") and not os.path.lexists(word)):
            yield from map(Path, listed(word))
            continue
        path = Path(word).expanduser()
        matches = [] if os.path.lexists(path) else sorted(glob.glob(str(path), recursive=True))
        yield from map(Path, matches) if matches else [path]


def listed(word):
    """The lines of a list of paths, without empty ones; UserError."""
    if word == "-":
        lines = sys.stdin.buffer.read().decode(errors="surrogateescape").splitlines() if sys.stdin else []
    else:
        try:
            lines = Path(word[1:]).read_text(errors="surrogateescape").splitlines()
        except OSError as error:
            raise UserError(f"cannot read the list {word[1:]}: {error.strerror}") from None
    if not any(map(str.strip, lines)):
        raise UserError(f"{word} lists no files")
    return [line for line in lines if line.strip()]


def word_argument(text):
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: is a variable of the shell unset?")
    return text


def centre_argument(text):
    """"brightest", or "x,y" as (x, y)."""
    if text == "brightest":
        return text
    try:
        x, y = map(int, text.split(","))
    except ValueError:
        x, y = -1, -1
    if min(x, y) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither brightest nor a column and row such as 50,49")
    return x, y


def word_or_number(word, number):
    """Function from the text of an argument to the `word` or a positive number, which is called so."""

    def argument(text):
        with contextlib.suppress(ValueError):
            if text == word or 0 < float(text) < math.inf:
                return text if text == word else float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is neither {word} nor {number}")

    return argument


def planes_argument(text):
    """"lenses", "bands" or the number of a band."""
    if text in ("lenses", "bands"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither lenses, bands nor the number of a band")
    return int(text)
