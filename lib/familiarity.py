"""How familiar an image is, whatever a network says of it.

`Familiarity` gives a conformal p-value (Vovk et al. 2005): the share of held-out validation images
that are as strange as an image or stranger. Of images like the training images, 1 % have less than
0.01, whatever strangeness is; a good strangeness leaves nothing above that for other images.

Some classes are stranger than others, so each image is compared with the validation images of its
class, and 1 % holds in every class. It is the class that the classifier predicts, for both: nobody
knows the true class of a new image.

It is computed from the image alone. Images of one kind of lens fill a curved surface of few
dimensions, so a polynomial of the first principal components predicts everything else that is
measured of an image: its other components, and statistics of its brightness and roughness. How far
an image is from that prediction depends on its substructure, so a second regression predicts that
distance. What is left of the statistics should be white noise of variance one.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils.extmath import randomized_svd
from torch import nn

from lib.loader import batch_reader, in_batches, read_disturbed
from mae import IntensityTransform

MOST_COMPONENTS = 128
MOST_LEADING, DEGREE = 10, 4  # components that the polynomial takes, and its degree
BAND_EDGES = (8, 24, 56)  # of the other components, whose energies say how strong substructure is
MOST_LEVELS = 4  # of roughness: the image, and averages of 2², 4² and 8² pixels
FEWEST_IMAGES = 100  # of validation: with fewer, none has a familiarity below 1 %; and of training
FIT_IMAGES = 40_000  # training images that are looked at
SCALE_SHARE = 0.2  # of them, which only say how large a strangeness is usual
PCA_PIXELS = 8e7  # in the images that the principal components come from
IMAGES_A_NUMBER = 20  # at least so many images for each number that is fitted from them
RIDGE = 1e-6
LEAST_VARIANCE = 1e-10  # of a logarithm in float32, whose rounding is about 1e-7
TINY = 1e-12
HIGH_QUANTILE = 0.999


class Familiarity(nn.Module):
    """Raw images (B, 1, H, W) and their predicted classes to familiarity (B,), at least 1/(1 + calibration).

    Parameters
    ----------
    transform : arguments of `IntensityTransform`, a dict.
    img_size : side of the images in pixels.
    unit : brightness that raw pixels are divided by.
    components, leading : principal components, and how many of them the polynomial takes.
    calibration : number of images that it was calibrated on.
    any_orientation : whether mirror images and quarter turns are as familiar as the image. Half a
        turn always is: it changes no lens.

    The buffers are filled by `fit`; `class_seen`, the predicted classes (calibration,) of the validation
    images, by who has a classifier. Raises ValueError for a unit that is not positive.
    """

    def __init__(
        self, transform, img_size, unit, components, leading, calibration, any_orientation=False
    ):
        super().__init__()
        if not 0 < unit < math.inf:
            raise ValueError(f"unit must be positive, got {unit}")
        self.transform = IntensityTransform(**transform)
        self.unit, self.leading, self.any_orientation = float(unit), leading, any_orientation
        self.levels = levels_of(img_size)
        self.register_buffer("terms", monomials(leading, DEGREE), persistent=False)
        self.quadratic = len(monomials(leading, 2))  # monomials are sorted by their degree
        others = components - leading
        edges = [0, *(edge for edge in BAND_EDGES if edge < others), others]
        self.bands = list(itertools.pairwise(edges))
        self.register_buffer("energy_terms", monomials(len(self.bands) + 2, 2), persistent=False)
        # Statistics of the raw pixels, and those of their root and transform.
        raw, faint = 5 * (1 + self.levels), 5 * (2 * self.levels - 1)
        self.sizes = (raw, faint)
        spread_terms = len(self.energy_terms) + self.quadratic - 1
        for name, shape in {
            "mean": (img_size**2,),
            "components": (img_size**2, components),
            "component_scale": (leading,),
            "prediction": (len(self.terms), others + raw + faint),
            "energy_mean": (len(self.bands) + 2,),
            "energy_scale": (len(self.bands) + 2,),
            "usual": (2,),
            "above_usual": (2,),
            "strangeness_seen": (calibration,),
        }.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("class_seen", torch.zeros(calibration, dtype=torch.int64))
        for g, size in enumerate(self.sizes):
            self.register_buffer(f"whitening_{g}", torch.zeros(size, size))
            self.register_buffer(f"spread_{g}", torch.zeros(spread_terms, size))
            self.register_buffer(f"second_whitening_{g}", torch.zeros(size, size))

    def forward(self, images, predicted):
        return self.rank(self.strangeness(images), predicted)

    def rank(self, strangeness, predicted):
        """Familiarity (B,) of images of some strangeness (B,) and predicted classes (B,).

        n images of a class give no p-value below 1/(1 + n). So an image that is stranger than all of
        them is compared with all classes, too: then a class of few validation images, too, refuses
        what is strange, though up to 1/(1 + n) of its own images instead of 1 %.
        """
        stranger = self.strangeness_seen >= strangeness.unsqueeze(1)
        of_class = self.class_seen == predicted.unsqueeze(1)
        count = (stranger & of_class).float().sum(dim=1)
        in_class = (1 + count) / (1 + of_class.float().sum(dim=1))
        in_all = (1 + stranger.float().sum(dim=1)) / (1 + len(self.strangeness_seen))
        return torch.where(count > 0, in_class, torch.minimum(in_class, in_all))

    def strangeness(self, images):
        """(B,), growing with the distance from the training images; the least of all orientations."""
        views = [images, images.mT, images.flip(2), images.mT.flip(2)]
        views = views if self.any_orientation else views[:1]
        views += [view.flip(2, 3) for view in views]
        return torch.stack([self.strangeness_of_view(view) for view in views]).amin(dim=0)

    def strangeness_of_view(self, images):
        """(B,) of images in the orientation that they have."""
        distance = self.distances(*self.measure(images)).clamp_min(TINY).log()
        return ((distance - self.usual) / self.above_usual).clamp_max(20).exp().sum(dim=1)

    def measure(self, images):
        """(components and statistics (B, c + s), log energies of what the components miss (B, 2))."""
        x = (images / self.unit).clamp(-1e4, 1e4)
        z = self.transform(x * self.unit)
        centred = z.flatten(1) - self.mean
        c = centred @ self.components
        rest = centred - F.linear(c, self.components)
        energies = torch.stack(
            [rest.square().mean(dim=1) + TINY, rest.abs().amax(dim=1) + 1e-6], dim=1
        ).log()
        return torch.cat([c, self.statistics(x, z)], dim=1), energies

    def statistics(self, x, z):
        """Logarithms (B, s) of brightness and of roughness at several scales."""
        pixels = x.flatten(1)
        squares = pixels.square()
        moments = (pixels.mean(dim=1), squares.mean(dim=1), (squares * pixels).mean(dim=1).abs(),
                   squares.square().mean(dim=1))  # fmt: skip
        brightness = torch.stack([pixels.amax(dim=1), *moments], dim=1).clamp_min(TINY)
        views = torch.cat([x, x.clamp_min(0).sqrt(), z], dim=1)  # (B, 3, H, W)
        roughness = []
        for level in range(self.levels):
            if level:
                views = F.avg_pool2d(views, 2)
            roughness.append(roughness_of(views))  # (B, 3, 5)
        raw, root, transformed = torch.cat(roughness, dim=2).unbind(1)
        root = root[:, : 5 * (self.levels - 1)]  # its coarsest level says nothing new
        return torch.cat([brightness, raw, root, transformed], dim=1).log()

    def inputs(self, measured, energies):
        """What the prediction leaves (B, ·), and the terms (B, ·) that its spread depends on."""
        polynomial = products(self.scaled(measured), self.terms)
        left = measured[:, self.leading :] - polynomial @ self.prediction
        energies = (self.all_energies(left, energies) - self.energy_mean) / self.energy_scale
        terms = products(energies.clamp(-4, 4), self.energy_terms)
        return left, torch.cat([terms, polynomial[:, 1 : self.quadratic]], dim=1)

    def scaled(self, measured):
        """The leading components (B, leading), of standard deviation one."""
        return (measured[:, : self.leading] / self.component_scale).clamp(-6, 6)

    def all_energies(self, left, energies):
        bands = [left[:, i:j].square().mean(dim=1) for i, j in self.bands]
        return torch.cat([(torch.stack(bands, dim=1) + TINY).log(), energies], dim=1)

    def distances(self, measured, energies):
        """Mean squared deviation (B, 2) of the raw pixels' statistics, and of the others."""
        left, terms = self.inputs(measured, energies)
        distances = []
        groups = left[:, -sum(self.sizes) :].split(self.sizes, dim=1)
        for g, own in enumerate(groups):
            whitened = self.without_spread(g, own @ getattr(self, f"whitening_{g}"), terms)
            whitened = whitened @ getattr(self, f"second_whitening_{g}")
            distances.append(whitened.square().mean(dim=1))
        return torch.stack(distances, dim=1)

    def without_spread(self, g, whitened, terms):
        """Whitened statistics over the standard deviation that the terms (B, ·) predict of them."""
        return whitened * (-0.5 * (terms @ getattr(self, f"spread_{g}"))).exp().clamp(1e-2, 1e3)


def levels_of(img_size):
    """Scales of roughness, each with half the pixels a side, that an image has; at least one."""
    return max(1, min(MOST_LEVELS, int(math.log2(img_size / 4)) + 1))


def roughness_of(views):
    """Five statistics (B, C, 5) of the Laplacian of views (B, C, H, W)."""
    inner = 4 * views[:, :, 1:-1, 1:-1]
    neighbours = (views[:, :, :-2, 1:-1] + views[:, :, 2:, 1:-1]
                  + views[:, :, 1:-1, :-2] + views[:, :, 1:-1, 2:])  # fmt: skip
    laplacian = (inner - neighbours).flatten(2)
    squares = laplacian.square()
    return torch.stack(
        [
            squares.mean(dim=2) + 1e-14,
            laplacian.abs().mean(dim=2) + 1e-9,
            laplacian.amax(dim=2).clamp_min(1e-9),
            (-laplacian.amin(dim=2)).clamp_min(1e-9),
            squares.square().mean(dim=2) + 1e-24,
        ],
        dim=2,
    )


def monomials(variables, degree):
    """Every monomial up to a degree, sorted by degree: indices (terms, degree); 0 stands for one."""
    terms = [()]
    for d in range(1, degree + 1):
        terms += itertools.combinations_with_replacement(range(1, variables + 1), d)
    return torch.tensor([(*term, *[0] * (degree - len(term))) for term in terms])


def products(variables, terms):
    """Values (B, terms) of `monomials` of variables (B, n)."""
    values = F.pad(variables, (1, 0), value=1.0)
    result = values[:, terms[:, 0]]
    for k in range(1, terms.shape[1]):
        result = result * values[:, terms[:, k]]
    return result


# Fitting, in float64


@torch.no_grad()
def fit(dataset, rows, validation, transform, augmentations=(), quiet=False):
    """A `Familiarity` of training `rows`, calibrated on `validation` rows, and its arguments.

    None if there are fewer than FEWEST_IMAGES of either. `transform` are the arguments
    of the network's transform. Images are disturbed as the network's `augmentations` do it, and
    those of all orientations count as alike if it learned all (`flips`). Labels play no part: all
    validation images count as of one class.
    """
    if min(len(rows), len(validation)) < FEWEST_IMAGES:
        return None
    read = batch_reader(dataset.images, torch.device("cpu"))

    def images_of(batch):
        return read_disturbed(read, batch, augmentations)

    rows = np.random.default_rng(0).permutation(rows)[:FIT_IMAGES]
    for_scale = rows[: round(SCALE_SHARE * len(rows))]
    rows = rows[len(for_scale) :]
    first = np.sort(rows[: int(PCA_PIXELS / dataset.img_size**2)])
    components, leading = numbers_to_fit(len(rows), len(first), dataset.img_size**2)
    unit = in_batches(lambda batch: images_of(batch).flatten(1).amax(dim=1), first).median().item()
    config = {"transform": transform, "img_size": dataset.img_size, "components": components,
              "unit": max(abs(unit), np.finfo(np.float32).tiny.item()), "leading": leading,
              "calibration": len(validation), "any_orientation": "flips" in augmentations}  # fmt: skip
    model = Familiarity(**config)

    z = in_batches(lambda batch: model.transform(images_of(batch)).flatten(1), first)
    model.mean.copy_(z.mean(dim=0))
    _, _, directions = randomized_svd((z - model.mean).numpy(), components, random_state=0)
    model.components.copy_(torch.from_numpy(directions.T.copy()))

    bar = None if quiet else "familiarity"
    measured, energies = measured_of(model, images_of, rows, bar)
    model.component_scale.copy_(measured[:, :leading].std(dim=0).clamp_min(TINY))
    polynomial = products(model.scaled(measured), model.terms)
    prediction = regression(polynomial, measured[:, leading:])
    model.prediction.copy_(prediction)
    left = measured[:, leading:] - polynomial @ prediction
    all_energies = model.all_energies(left, energies)
    model.energy_mean.copy_(all_energies.mean(dim=0))
    model.energy_scale.copy_(all_energies.std(dim=0).clamp_min(TINY))
    model.double()
    left, terms = model.inputs(measured, energies)
    for g, own in enumerate(left[:, -sum(model.sizes) :].split(model.sizes, dim=1)):
        first_whitening = whitening(own, 1e-7, LEAST_VARIANCE)
        whitened = own @ first_whitening
        spread = regression(terms, (whitened.square() + 1e-3).log())
        getattr(model, f"whitening_{g}").copy_(first_whitening)
        getattr(model, f"spread_{g}").copy_(spread)
        whitened = model.without_spread(g, whitened, terms).clamp(-8, 8)
        getattr(model, f"second_whitening_{g}").copy_(whitening(whitened))
    model.float()

    distance = model.distances(*(t.float() for t in measured_of(model, images_of, for_scale, bar)))
    distance = distance.clamp_min(TINY).log()
    model.usual.copy_(distance.quantile(0.5, dim=0))
    high = distance.quantile(HIGH_QUANTILE, dim=0)
    model.above_usual.copy_((high - model.usual).clamp_min(1e-3))
    model.strangeness_seen.copy_(in_batches(lambda batch: model.strangeness(images_of(batch)), validation))
    return model, config


def numbers_to_fit(images, pca_images, pixels):
    """(components, leading) that so many images can bear."""
    most = max(1, images // IMAGES_A_NUMBER)
    components = max(2, min(MOST_COMPONENTS, most, pca_images - 1, pixels))
    leading = 1
    while (
        leading < min(MOST_LEADING, components - 1) and math.comb(leading + 1 + DEGREE, DEGREE) <= most
    ):
        leading += 1
    return components, leading


def measured_of(model, images_of, rows, bar):
    """What `Familiarity.measure` gives of rows, in float64."""

    def measure(batch):
        return torch.cat(model.measure(images_of(batch)), dim=1)

    together = in_batches(measure, rows, bar=bar).double()
    return together[:, :-2], together[:, -2:]


def regression(inputs, targets):
    """Weights (a, b) with the least squares of targets (n, b) - inputs (n, a) @ weights."""
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * len(inputs))
    return torch.linalg.solve(gram, inputs.T @ targets)


def whitening(values, ridge=0.0, least=TINY):
    """Matrix (k, k) that gives values (n, k) unit covariance about zero.

    A share `ridge` of each variance, and `least`, are added to it.
    """
    covariance = values.T @ values / len(values)
    variances, directions = torch.linalg.eigh(
        covariance + (ridge * covariance.diagonal() + least).diag()
    )
    return directions / variances.clamp_min(least).sqrt()
