"""The unit of a FITS image, as its header states it: the AB magnitude of the pixel value one; without torch.

Nothing is guessed. What can mean two things is refused with a reason, and the user says which it is.
"""

import math
import re

ZERO_POINTS = ("MAGZERO", "MAGZPT", "ZEROPT", "PHOTZPT")
PLAUSIBLE = (10.0, 40.0)  # zero points; the PHOTZPT of HST, -21.1, belongs to another formula
AGREEING = 0.02  # magnitudes
JANSKY = 8.9  # AB magnitude of one jansky: 2.5 log10(3631)
FLUXES = {"Jy": 1.0, "mJy": 1e-3, "uJy": 1e-6, "µJy": 1e-6, "nJy": 1e-9, "maggy": 3631.0, "maggies": 3631.0,
          "nanomaggy": 3631e-9, "nanomaggies": 3631e-9, "nmgy": 3631e-9}  # fmt: skip
STERADIAN = (180 * 3600 / math.pi) ** 2  # square arcsec
COUNT = r"(adu|dn|counts?|ct|electrons?|e-?)"
PER_SECOND = r"(/(s|sec|second)|[ .]?(s|sec)(\^|\*\*)?-1)"


def zero_point_of(cards, pixel_scale):
    """(AB magnitude of the pixel value one, what says so), or (None, why the header does not say it).

    cards : {name: number or text} of a header.
    pixel_scale : arcsec, None if it is unknown.
    Without a unit and a zero point in the header the result is (None, "").
    """
    unit = str(cards.get("BUNIT", "")).strip()
    stated, hst = _stated(cards)
    flux = _flux_of(unit, pixel_scale)
    if "VEGA" in (str(cards.get(name, "")).strip().upper() for name in ("MAGSYS", "PHOTSYS", "MAGSYST")):
        return None, "its magnitudes are Vega's; give --zero-point in AB"
    if flux:
        stated[f"BUNIT {unit}"] = JANSKY - 2.5 * math.log10(flux)
    if not stated:
        return None, f"it has BUNIT {unit} and no zero point that can be used; give --zero-point" if unit else ""
    texts = " and ".join(name if name.startswith("BUNIT") else f"{name} {point:.5g}" for name, point in stated.items())
    if max(stated.values()) - min(stated.values()) > AGREEING:
        return None, f"{texts} contradict each other; give --zero-point"
    zero_point = next(iter(stated.values()))
    if flux:
        return zero_point, texts
    if not PLAUSIBLE[0] < zero_point < PLAUSIBLE[1]:
        return None, f"{texts} is no zero point of pixels; give --zero-point"
    return _with_exposure(zero_point, texts, unit, _number(cards, "EXPTIME"), hst)


def _with_exposure(zero_point, texts, unit, exposure, hst):
    """`zero_point_of` counts or count rates. That of `hst` is always one of a count per second."""
    if re.fullmatch(COUNT + PER_SECOND, unit, re.IGNORECASE) or unit.lower() == "cps":
        return zero_point, f"{texts}, BUNIT {unit}"
    in_counts = re.fullmatch(COUNT, unit, re.IGNORECASE)
    if unit and not in_counts:
        return None, f"{texts} of an unknown BUNIT {unit}; give --zero-point"
    if hst and in_counts and exposure:
        return zero_point + 2.5 * math.log10(exposure), f"{texts}, BUNIT {unit}, EXPTIME {exposure:g}"
    if not hst and exposure in (None, 1):
        return zero_point, f"{texts}, BUNIT {unit}" if unit else texts
    seconds = f"{exposure:g}" if exposure else "SECONDS"
    return None, (
        f"{texts} may be of one pixel value or of one count per second; give --zero-point {zero_point:.5g}, and for "
        f"counts with a zero point of one count per second also --exposure {seconds}"
    )


def _stated(cards):
    """{what states it: zero point}, and whether it is HST's: of STScI's AB formula, see the ACS data handbook."""
    flam, wavelength = _number(cards, "PHOTFLAM"), _number(cards, "PHOTPLAM")
    if flam and wavelength:
        return {"PHOTFLAM's zero point": -2.5 * math.log10(flam) - 5 * math.log10(wavelength) - 2.408}, True
    return {name: float(cards[name]) for name in ZERO_POINTS if isinstance(cards.get(name), int | float)}, False


def _number(cards, name):
    """A positive number, or None."""
    value = cards.get(name)
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _flux_of(unit, pixel_scale):
    """Jansky of the pixel value one, None if `unit` is no flux."""
    bare = re.sub(r" ?/ ?pix(el)?$", "", unit)
    if bare in FLUXES:
        return FLUXES[bare]
    if bare.replace(" ", "") == "MJy/sr" and pixel_scale:
        return 1e6 * pixel_scale**2 / STERADIAN
    return None
