"""The physics of the simulator: a lens, a shear and point masses bend the light of a Sérsic source.

Every image may have a lens, source and PSF of its own. Angles are in arcsec; x runs along columns and y
along rows, both zero at the image's centre.
"""

from typing import NamedTuple

import numpy as np
import torch

# Flat ΛCDM, and CODATA / IAU constants in SI units (G·M☉ as astropy has it).
HUBBLE_KM_S_MPC, OMEGA_MATTER = 70.0, 0.3
G, C, SOLAR_MASS, MEGAPARSEC = 6.6743e-11, 299_792_458.0, 1.98840987e30, 3.0856775814913673e22
ARCSEC_PER_RADIAN = 206265  # quirk: as rounded in DeepLenseSim's mass_to_radius
SMALLEST_RADIUS = 0.001  # arcsec; quirk: lenstronomy's LightModel flattens a profile inside it
SMALLEST_ECCENTRICITY = 1e-8  # below it, an ellipsoid is a sphere to 1e-16, and nothing divides by zero
CHUNK = 32  # images rendered at once: few enough that the temporaries stay in the CPU's cache


class Scene(NamedTuple):
    """What is in front of the camera, of B images.

    Each field but point_masses is (B,), or a number that all images share. The ellipticities
    (e1, e2) and (source_e1, source_e2) are those of `axis_ratio_and_angle`.
    """

    x: torch.Tensor  # (B,), centre of the source
    y: torch.Tensor  # (B,)
    point_masses: torch.Tensor  # (B, P, 3): Einstein radius, x, y; P may be 0, and so may the radii
    theta_e: float  # Einstein radius of the singular isothermal ellipsoid, whose centre is (0, 0)
    e1: float
    e2: float
    gamma1: float  # external shear
    gamma2: float
    radius: float  # of the source, where half of its light is inside
    index: float  # of its Sérsic profile
    source_e1: float
    source_e2: float
    amplitude: float  # per pixel, at that radius
    factor: float = 1.0  # which multiplies every deflection


class Camera(NamedTuple):
    pixels: int  # a side
    pixel_scale: float  # arcsec
    psf_sigma: float  # arcsec, of the Gaussian PSF
    psf_radius: int  # pixels, where the PSF is cut


def comoving_distance(z, omega_matter=OMEGA_MATTER):
    """Comoving distance to redshift z in Mpc, flat ΛCDM, by Gauss-Legendre quadrature of 1/E(z)."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    grid = 0.5 * np.asarray(z)[..., None] * (nodes + 1)
    inverse_e = 1 / np.sqrt(omega_matter * (1 + grid) ** 3 + 1 - omega_matter)
    return C / 1000 / HUBBLE_KM_S_MPC * 0.5 * z * (inverse_e @ weights)


def einstein_radius(mass, z_lens, z_source):
    """Nominal Einstein radius in arcsec of a point mass in M☉ (numbers or arrays).

    Quirk: DeepLenseSim's mass_to_radius puts luminosity distances where angular-diameter distances
    belong, and their difference for the distance from lens to source.
    """
    d_lens, d_source = ((1 + z) * comoving_distance(z) for z in (z_lens, z_source))
    distance = (d_source - d_lens) / (d_lens * d_source) / MEGAPARSEC
    return np.sqrt(4 * G * SOLAR_MASS / C**2 * distance * mass) * ARCSEC_PER_RADIAN


def axis_ratio_and_angle(e1, e2):
    """Axis ratio and position angle (radian) of ellipticities (e1, e2), float64 tensors."""
    c = torch.hypot(e1, e2)
    return (1 - c) / (1 + c), torch.atan2(e2, e1) / 2


def rotate(x, y, angle):
    """Coordinates (x, y) in axes turned by `angle`."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    return cos * x + sin * y, -sin * x + cos * y


def pixel_axis(camera):
    """Pixel centres along one axis, arcsec, float64 (pixels,)."""
    half = (camera.pixels - 1) / 2
    return (torch.arange(camera.pixels, dtype=torch.float64) - half) * camera.pixel_scale


def smooth_rays(x, y, scene):
    """Where the rays at (x, y) come from behind the ellipsoid (Kormann et al. 1994) and the shear."""
    q, angle = axis_ratio_and_angle(scene.e1, scene.e2)
    b = scene.theta_e / torch.sqrt((1 + q**2) / (2 * q)) * torch.sqrt((1 + q**2) / 2)
    f = torch.sqrt(1 - q**2).clamp_min(SMALLEST_ECCENTRICITY)
    x_rot, y_rot = rotate(x, y, angle)
    psi = torch.sqrt(q**2 * x_rot**2 + y_rot**2).clamp_min(1e-12)
    alpha_x = b / f * torch.atan(f * x_rot / psi)
    alpha_y = b / f * torch.atanh(f * y_rot / psi)
    alpha_x, alpha_y = rotate(alpha_x, alpha_y, -angle)
    alpha_x, alpha_y = (
        alpha_x + scene.gamma1 * x + scene.gamma2 * y, alpha_y + scene.gamma2 * x - scene.gamma1 * y
    )  # fmt: skip
    return x - scene.factor * alpha_x, y - scene.factor * alpha_y


def subtract_point_masses(beta_x, beta_y, point_masses, axis, factor):
    """Take `factor` × the deflection of point masses (B, P, 3) off β (B, H, W), in place.

    A point mass at p deflects by θ²·(x - p)/|x - p|². On the pixel of its own centre the direction
    is undefined: a tiny softening makes the deflection zero there instead of dividing by zero.
    """
    squared_radius = factor.to(axis.dtype) * point_masses[..., :1].square()  # (B, P, 1)
    dx = axis - point_masses[..., 1, None]  # (B, P, W)
    dy = axis - point_masses[..., 2, None]  # (B, P, H)
    dx_squared, dy_squared = dx.square(), dy.square() + 1e-12
    strength_x, strength_y = squared_radius * dx, squared_radius * dy
    distance = torch.empty_like(beta_x)
    for p in range(point_masses.shape[1]):
        torch.add(dy_squared[:, p, :, None], dx_squared[:, p, None, :], out=distance)
        beta_x.addcdiv_(strength_x[:, p, None, :], distance, value=-1)
        beta_y.addcdiv_(strength_y[:, p, :, None], distance, value=-1)


def sersic_b(index):
    """b_n of a Sérsic profile (Graham & Driver 2005, eq. 6)."""
    return 1.9992 * index - 0.3271


def sersic(beta_x, beta_y, scene):
    """Brightness (B, H, W) of the source of a `Scene` at β (B, H, W), relative to its centre."""
    q, angle = axis_ratio_and_angle(scene.source_e1, scene.source_e2)
    numbers = (torch.cos(angle), torch.sin(angle), q, 1 / q, scene.radius, 1 / scene.index,
               -sersic_b(scene.index), scene.amplitude)  # fmt: skip
    cos, sin, q, inverse_q, half_light, exponent, steepness, amplitude = (
        number.to(beta_x.dtype) for number in numbers
    )
    major, minor = cos * beta_x + sin * beta_y, -sin * beta_x + cos * beta_y
    radius = (major.square().mul_(q) + minor.square().mul_(inverse_q)).sqrt_()
    radius.clamp_min_(SMALLEST_RADIUS).div_(half_light)
    if (exponent != 1).any():
        radius.pow_(exponent)
    return radius.sub_(1).mul_(steepness).exp_().mul_(amplitude)


def psf_matrix(camera):
    """Banded matrix (pixels, pixels) that convolves one axis with the PSF.

    The edge pixel continues outside, as in scipy.ndimage.gaussian_filter (mode "nearest").
    """
    sigma = camera.psf_sigma / camera.pixel_scale
    offsets = torch.arange(-camera.psf_radius, camera.psf_radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    matrix = torch.zeros(camera.pixels, camera.pixels, dtype=torch.float64)
    rows = torch.arange(camera.pixels)
    for offset, share in zip(offsets.int().tolist(), kernel, strict=True):
        matrix[rows, (rows + offset).clamp(0, camera.pixels - 1)] += share
    return matrix


def render(scene, camera, dtype=torch.float64):
    """Noise-free images (B, H, W) of a `Scene`, in the unit of its amplitude.

    They are computed in `dtype` where `scene.x` is; the rays behind the ellipsoid always in float64.
    """
    device, b = torch.as_tensor(scene.x).device, len(scene.x)
    scene = Scene(*(torch.as_tensor(field, dtype=torch.float64, device=device) for field in scene))
    scene = Scene(*(field[:, None, None] if field.dim() == 1 else field for field in scene))
    point_masses = scene.point_masses.to(dtype)
    axis = pixel_axis(camera).to(device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    axis, blur = axis.to(dtype), psf_matrix(camera).to(device, dtype)
    one_lens = scene.theta_e, scene.e1, scene.e2, scene.gamma1, scene.gamma2, scene.factor
    rays = None
    if all(field.dim() == 0 for field in one_lens):
        rays = [ray.to(dtype) for ray in smooth_rays(x, y, scene)]

    images = torch.empty(b, camera.pixels, camera.pixels, dtype=dtype, device=device)
    for start in range(0, b, CHUNK):
        part = slice(start, start + CHUNK)
        lens = part_of(scene, part)
        ray_x, ray_y = rays or (ray.to(dtype) for ray in smooth_rays(x, y, lens))
        beta_x, beta_y = ray_x - lens.x.to(dtype), ray_y - lens.y.to(dtype)  # (chunk, H, W)
        subtract_point_masses(beta_x, beta_y, point_masses[part], axis, lens.factor)
        torch.matmul(blur @ sersic(beta_x, beta_y, lens), blur.mT, out=images[part])
    return images


def part_of(scene, rows):
    """The `Scene` of some of the images: a slice, or an array of their places."""
    return Scene(*(field[rows] if np.ndim(field) else field for field in scene))
