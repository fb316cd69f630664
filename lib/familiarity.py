"""How familiar an image is, whatever a network says of it.

The familiarity is a conformal p-value (Vovk et al. 2005): the share of held-out validation images that are as
strange as an image or stranger. Of images like the training images 1 % have less than 0.01, whatever
strangeness is; a good strangeness leaves nothing above that for other images. Some classes are stranger than
others, so an image is compared with the validation images of its class, and 1 % holds in every class. It is
the class that the classifier predicts, for both: nobody knows the true class of a new image.

The strangeness comes from the image alone, in four steps, which are methods of `Familiarity`:

    measure    principal components of the image, and statistics of its brightness and roughness
    unexplain  images of one kind of lens fill a curved surface of few dimensions, so a polynomial of the
               first components predicts all other measurements: what it does not predict goes on
    whiten     how much that is depends on the substructure of the image, so a second regression predicts its
               spread. What is left of the statistics should be white noise of variance one
    distances  the mean squares of that noise, which are compared with usual ones

`fit` makes the same steps on the training images, and fits what each needs.
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
SCALE_SHARE = 0.2  # of them, which only say how large a distance is usual
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

    def __init__(self, transform, img_size, unit, components, leading, calibration, any_orientation=False):
        super().__init__()
        if not 0 < unit < math.inf:
            raise ValueError(f"unit must be positive, got {unit}")
        self.transform = IntensityTransform(**transform)
        self.unit, self.leading, self.any_orientation = float(unit), leading, any_orientation
        # Scales of roughness, each with half the pixels a side.
        self.levels = max(1, min(MOST_LEVELS, int(math.log2(img_size / 4)) + 1))
        others = components - leading
        self.bands = list(itertools.pairwise([0, *(edge for edge in BAND_EDGES if edge < others), others]))
        energies = len(self.bands) + 2
        self.register_buffer("terms", monomials(leading, DEGREE), persistent=False)
        self.register_buffer("energy_terms", monomials(energies, 2), persistent=False)
        self.quadratic = len(monomials(leading, 2))  # monomials are sorted by their degree
        spread_terms = len(self.energy_terms) + self.quadratic - 1
        # Two groups of statistics: of the raw pixels, and of their root and transform.
        self.sizes = (5 * (1 + self.levels), 5 * (2 * self.levels - 1))
        shapes = {
            "mean": (img_size**2,),
            "components": (img_size**2, components),
            "component_scale": (leading,),
            "prediction": (len(self.terms), others + sum(self.sizes)),
            "energy_mean": (energies,),
            "energy_scale": (energies,),
            "usual": (2,),
            "above_usual": (2,),
            "strangeness_seen": (calibration,),
        }
        for group, size in enumerate(self.sizes):
            shapes |= {f"whitening_{group}": (size, size), f"spread_{group}": (spread_terms, size),
                       f"second_whitening_{group}": (size, size)}  # fmt: skip
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("class_seen", torch.zeros(calibration, dtype=torch.int64))

    def forward(self, images, predicted):
        return self.rank(self.strangeness(images), predicted)

    def strangeness(self, images):
        """(B,), growing with the distance from the training images; the least of all orientations."""
        views = [images]
        if self.any_orientation:
            views += [images.mT, images.flip(2), images.mT.flip(2)]
        # A view goes together with its half turn, so that an exported graph is half as large.
        least = [self.strangeness_of(torch.cat([view, view.flip(2, 3)])).unflatten(0, (2, -1)).amin(dim=0)
                 for view in views]  # fmt: skip
        return torch.stack(least).amin(dim=0)

    def strangeness_of(self, views):
        """(B,) of views (B, C, H, W) as they are."""
        distances = self.distances(*self.measure(views)).clamp_min(TINY).log()
        above = ((distances - self.usual) / self.above_usual).clamp_max(20)
        return above.exp().sum(dim=1)

    def measure(self, images):
        """(components and statistics (B, c + s), log energies (B, 2) of what the components miss)."""
        x = (images / self.unit).clamp(-1e4, 1e4)
        z = self.transform(x * self.unit)
        centred = z.flatten(1) - self.mean
        components = centred @ self.components
        missed = centred - F.linear(components, self.components)
        energies = [missed.square().mean(dim=1) + TINY, missed.abs().amax(dim=1) + 1e-6]
        return torch.cat([components, self.statistics(x, z)], dim=1), torch.stack(energies, dim=1).log()

    def statistics(self, x, z):
        """Logarithms (B, s) of brightness and of roughness at several scales."""
        pixels = x.flatten(1)
        squares = pixels.square()
        moments = (pixels.mean(dim=1), squares.mean(dim=1), (squares * pixels).mean(dim=1).abs(),
                   squares.square().mean(dim=1))  # fmt: skip
        brightness = torch.stack([pixels.amax(dim=1), *moments], dim=1).clamp_min(TINY)
        scaled = torch.cat([x, x.clamp_min(0).sqrt(), z], dim=1)  # (B, 3, H, W)
        roughness = [roughness_of(scaled)]  # of each level (B, 3, 5)
        for _ in range(1, self.levels):
            scaled = F.avg_pool2d(scaled, 2)
            roughness.append(roughness_of(scaled))
        raw, root, transformed = torch.cat(roughness, dim=2).unbind(1)
        root = root[..., : 5 * (self.levels - 1)]  # its coarsest level says nothing new
        return torch.cat([brightness, raw, root, transformed], dim=1).log()

    def polynomial(self, measured):
        """Monomials (B, terms) of the leading components, which have a standard deviation of one."""
        leading = measured[..., : self.leading] / self.component_scale
        return products(leading.clamp(-6, 6), self.terms)

    def energies_of(self, unexplained, energies):
        """Log energies (B, bands + 2) of bands of unexplained components, and of what components miss."""
        bands = [unexplained[..., i:j].square().mean(dim=1) for i, j in self.bands]
        return torch.cat([(torch.stack(bands, dim=1) + TINY).log(), energies], dim=1)

    def unexplain(self, measured, energies):
        """(what the polynomial does not predict of each group (B, size), the terms (B, ·) of its spread)."""
        polynomial = self.polynomial(measured)
        unexplained = measured[..., self.leading :] - polynomial @ self.prediction
        energies = (self.energies_of(unexplained, energies) - self.energy_mean) / self.energy_scale
        terms = products(energies.clamp(-4, 4), self.energy_terms)
        groups = unexplained[..., -sum(self.sizes) :].split(self.sizes, dim=1)
        return groups, torch.cat([terms, polynomial[..., 1 : self.quadratic]], dim=1)

    def whiten(self, group, unexplained, terms):
        """Statistics (B, size) of a group, whitened, over the standard deviation that the terms predict."""
        whitened = unexplained @ getattr(self, f"whitening_{group}")
        return whitened * (-0.5 * (terms @ getattr(self, f"spread_{group}"))).exp().clamp(1e-2, 1e3)

    def distances(self, measured, energies):
        """Mean squared deviation (B, 2) of each group of statistics."""
        groups, terms = self.unexplain(measured, energies)
        noises = [self.whiten(group, unexplained, terms) @ getattr(self, f"second_whitening_{group}")
                  for group, unexplained in enumerate(groups)]  # fmt: skip
        return torch.stack([noise.square().mean(dim=1) for noise in noises], dim=1)

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


def roughness_of(views):
    """Five statistics (B, C, 5) of the Laplacian of views (B, C, H, W)."""
    columns, rows = views[..., 1:-1], views[..., 1:-1, :]
    neighbours = columns[..., :-2, :] + columns[..., 2:, :] + rows[..., :-2] + rows[..., 2:]
    laplacian = (4 * rows[..., 1:-1] - neighbours).flatten(2)
    squares = laplacian.square()
    statistics = [squares.mean(dim=2) + 1e-14, laplacian.abs().mean(dim=2) + 1e-9,
                  laplacian.amax(dim=2).clamp_min(1e-9), (-laplacian.amin(dim=2)).clamp_min(1e-9),
                  squares.square().mean(dim=2) + 1e-24]  # fmt: skip
    return torch.stack(statistics, dim=2)


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
    for_scale, rows = np.split(rows, [round(SCALE_SHARE * len(rows))])
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
    fit_prediction(model, measured, energies)
    fit_spread(model.double(), measured, energies)
    model.float()

    distances = model.distances(*(each.float() for each in measured_of(model, images_of, for_scale, bar)))
    distances = distances.clamp_min(TINY).log()
    model.usual.copy_(distances.quantile(0.5, dim=0))
    model.above_usual.copy_((distances.quantile(HIGH_QUANTILE, dim=0) - model.usual).clamp_min(1e-3))
    model.strangeness_seen.copy_(in_batches(lambda batch: model.strangeness(images_of(batch)), validation))
    return model, config


def numbers_to_fit(images, pca_images, pixels):
    """(components, leading) that so many images can bear."""
    most = max(1, images // IMAGES_A_NUMBER)
    components = max(2, min(MOST_COMPONENTS, most, pca_images - 1, pixels))
    leading = 1
    while leading < min(MOST_LEADING, components - 1) and math.comb(leading + 1 + DEGREE, DEGREE) <= most:
        leading += 1
    return components, leading


def measured_of(model, images_of, rows, bar):
    """What `Familiarity.measure` gives of rows, in float64."""
    measured = in_batches(
        lambda batch: torch.cat(model.measure(images_of(batch)), dim=1), rows, bar=bar
    ).double()
    return measured[:, :-2], measured[:, -2:]


def fit_prediction(model, measured, energies):
    """Fit the polynomial that predicts measurements, and the usual energies of what it does not predict."""
    model.component_scale.copy_(measured[:, : model.leading].std(dim=0).clamp_min(TINY))
    polynomial = model.polynomial(measured)
    prediction = regression(polynomial, measured[:, model.leading :])
    model.prediction.copy_(prediction)
    energies = model.energies_of(measured[:, model.leading :] - polynomial @ prediction, energies)
    model.energy_mean.copy_(energies.mean(dim=0))
    model.energy_scale.copy_(energies.std(dim=0).clamp_min(TINY))


def fit_spread(model, measured, energies):
    """Fit what makes white noise of the statistics that the polynomial does not predict."""
    groups, terms = model.unexplain(measured, energies)
    for group, unexplained in enumerate(groups):
        first = whitening(unexplained, 1e-7, LEAST_VARIANCE)
        getattr(model, f"whitening_{group}").copy_(first)
        spread = regression(terms, ((unexplained @ first).square() + 1e-3).log())
        getattr(model, f"spread_{group}").copy_(spread)
        noise = model.whiten(group, unexplained, terms).clamp(-8, 8)
        getattr(model, f"second_whitening_{group}").copy_(whitening(noise))


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
    variances, directions = torch.linalg.eigh(covariance + (ridge * covariance.diagonal() + least).diag())
    return directions / variances.clamp_min(least).sqrt()
