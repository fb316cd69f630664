"""World coordinates (WCS) of a FITS image, and of the part of it that a network sees; plain numbers, no torch.

Only cards that describe two axes of the sky are kept, as numbers and short texts: nothing of a stranger's header
is interpreted here. FITS WCS papers: Greisen & Calabretta 2002 (I), Calabretta & Greisen 2002 (II); SIP: Shupe et
al. 2005.
"""

import math
import re

SKY = ("RA", "DEC", "GLON", "GLAT", "ELON", "ELAT")  # starts of CTYPE
LINEAR = r"CTYPE[12]|CUNIT[12]|CRVAL[12]|CRPIX[12]|CDELT[12]|CROTA[12]|(CD|PC)[12]_[12]"
OTHERS = r"PV[12]_\d{1,2}|LONPOLE|LATPOLE|RADESYS|RADECSYS|EQUINOX|EPOCH"
SIP = r"(A|B|AP|BP)_(\d)_(\d)|(A|B|AP|BP)_ORDER"
KEPT = re.compile(f"(?:{LINEAR}|{OTHERS}|{SIP})")
TEXTS = re.compile(r"CTYPE[12]|CUNIT[12]|RADESYS|RADECSYS")
TABLES = re.compile(r"(CPDIS|CQDIS|D2IMDIS)[12]|D2IM.*")  # distortions in other HDUs


def cards_of(header):
    """The cards {name: number or text} of the sky's coordinates in a header; {} if they cannot be kept.

    header : {name: number or text}. A text where a number belongs, or the reverse, does not count.
    """
    kept = {name: value for name, value in header.items()
            if KEPT.fullmatch(name) and isinstance(value, str) == bool(TEXTS.fullmatch(name))}  # fmt: skip
    starts = [str(kept.get(f"CTYPE{axis}", ""))[:4].strip("-") for axis in (1, 2)]
    has_tables = any(map(TABLES.fullmatch, header)) or any(
        str(kept.get(f"CTYPE{axis}", "")).endswith("-TAB") for axis in (1, 2)
    )
    known = set(starts) <= set(SKY) and all(
        f"{name}{axis}" in kept for name in ("CRVAL", "CRPIX") for axis in (1, 2)
    )
    return {} if has_tables or not known else kept


def moved(cards, shape, size, corner):
    """The cards of an image that was resampled and then cropped.

    cards : see `cards_of`, of the whole image, whose `shape` is (H, W).
    size : width of its pixels, in new pixels, see `images.resampled`, which keeps the centre in its place.
    corner : (top, left), the row and column of the first pixel of the part, in new pixels.
    """
    if not cards:
        return {}
    has_matrix = any(name.startswith("CD") and name[2].isdigit() for name in cards)
    unused = r"(PC\d_\d|CDELT\d|CROTA\d)" if has_matrix else r"$^"  # paper I: a CD matrix replaces them
    new = {name: value for name, value in cards.items() if not re.fullmatch(unused, name)}
    steps = [name for name in new if re.fullmatch(r"CD\d_\d", name)] if has_matrix else ["CDELT1", "CDELT2"]
    new.update({name: cards.get(name, 1.0) / size for name in steps})
    for axis, side, first in ((1, shape[1], corner[1]), (2, shape[0], corner[0])):
        # The edge of the first pixel is at 0.5 in FITS.
        centre = (cards[f"CRPIX{axis}"] - 0.5 - side / 2) * size
        new[f"CRPIX{axis}"] = centre + int(side * size + 1e-6) / 2 - first + 0.5
    for name in cards:
        powers = re.fullmatch(r"(?:A|B|AP|BP)_(\d)_(\d)", name)
        if powers:  # of pixels, to pixels
            new[name] = cards[name] * size ** (1 - int(powers[1]) - int(powers[2]))
    return new


def plain(header):
    """{name: finite number or short text} of a header of astropy; cards that cannot be read are left out."""
    values = {}
    for name in header:
        try:
            value = header[name]
        except Exception:  # astropy raises many kinds for a damaged card
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        if is_number and math.isfinite(value) or isinstance(value, str) and len(value) <= 68 and value.isprintable():
            values[name] = value
    return values
