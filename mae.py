"""Masked autoencoder (MAE) and classifier for square images, written from scratch in torch.

The method is that of He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners"
(arXiv:2111.06377): cut an image into patches, hide most of them, encode only the visible ones,
and let a small decoder predict the pixels of the hidden ones. Afterwards the decoder is dropped
and the encoder carries a classifier. Or the whole MAE is kept, and a small convolutional network
classifies what it does not explain of an image.

Reading order: positions -> patches -> one transformer block -> `Encoder` -> `MAE` -> `Classifier`
-> `ResidualClassifier` -> `MassEstimator` -> `Sharpener`, the last two for tasks of their own.
Parameter names and layout are those of the reference implementation (facebookresearch/mae), so
weights travel in both directions. Shapes in comments: B images, C channels, H = W pixels a side,
p pixels a side of a patch, N = (H/p)² patches, D embedding width.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

LAYER_NORM_EPS = 1e-6
ATTENTION_FORMS = ("fused", "plain")
TRANSFORM_KINDS = ("log", "asinh", "sqrt", "linear")
POOLINGS = {"mean": 1, "cls": 1, "both": 2, "stats": 4}  # and their widths, in encoder widths
MAP_SCALE = 0.1  # where residuals, in units of the transformed image, are compressed
MASKS_TOGETHER = 8  # that go through the network in one batch
LARGEST_MASK_RATIO = 0.99  # of residual maps, which need a mask for every part that is visible
MAP_SIDE = 64  # pixels of a residual map; one at least twice as wide is averaged over squares by default
SCORE_GRID = 8  # squares a side that a map is averaged over for its score
MAP_WIDTHS = (24, 48, 96, 96)  # channels of the stages that look at a residual map
MASS_WIDTHS = (32, 64, 96)  # channels of the stages of a `MassNetwork`
LOG_SPREADS = (-8.0, 3.0)  # limits of the natural logarithm of the spread (dex) that a `MassEstimator` gives
REFINEMENT_WIDTH, TOKEN_FEATURES = 32, 8  # channels of the convolutions of a `Sharpener`, and of them from the MAE


def sincos_positions(dim, grid_size):
    """Fixed two-dimensional sine-cosine positions, with a zero row in front for the class token.

    The first half of a row encodes the column of the patch and the second half its row; each half
    is [sin(k·ω), cos(k·ω)] with ω_i = 10000^(-i/(dim/4)) (Vaswani et al. 2017, section 3.5).

    Returns a float32 tensor (1, 1 + grid_size², dim). Raises ValueError unless 4 divides `dim`.
    """
    if dim % 4:
        raise ValueError(
            f"the embedding width must be a multiple of 4 for 2-D positions, got {dim}"
        )
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
    halves = []
    for coordinate in (column, row):
        angle = coordinate.reshape(-1, 1) * omega  # (N, dim/4)
        halves += [angle.sin(), angle.cos()]
    positions = torch.cat(halves, dim=1)  # (N, dim)
    return F.pad(positions, (0, 0, 1, 0)).float().unsqueeze(0)


def patchify(images, patch_size):
    """Cut images (B, C, H, W) into patches (B, N, p²C), row by row, each in the order (p, p, C)."""
    b, c, h, w = images.shape
    p = patch_size
    patches = images.reshape(b, c, h // p, p, w // p, p)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches, patch_size, channels=1):
    """Inverse of `patchify`: patches (B, N, p²C) to images (B, C, H, W)."""
    b, n, _ = patches.shape
    p, side = patch_size, math.isqrt(n)
    images = patches.reshape(b, side, side, p, p, channels)
    return images.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, side * p, side * p)


def mean_and_spread(patches):
    """Mean and standard deviation, each (B, n, 1), of patches (B, n, p²C): for `norm_pix_loss`."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def complementary_masks(num_patches, mask_ratio, rounds, seed=0):
    """Masks that hide a share `mask_ratio` of the patches, and together hide every patch.

    Each round shuffles the patches and cuts their order into windows. A window is the visible set, or
    the hidden set if that is smaller: at 75 % a round is four masks, and a patch is hidden in three of
    them. Windows may be a tenth larger than asked if that saves a mask; otherwise they overlap.

    Returns a list of (visible, hidden), int64 tensors (n,) and (N - n,).
    """
    generator = torch.Generator().manual_seed(seed)
    keep = min(max(1, int(num_patches * (1 - mask_ratio))), num_patches - 1)
    size = max(1, min(keep, num_patches - keep))
    windows = max(2, math.ceil(num_patches / (1.1 * size)))
    starts = [math.ceil(i * num_patches / windows) for i in range(windows + 1)]
    places = torch.arange(num_patches)
    masks = []
    for _ in range(rounds):
        order = torch.randperm(num_patches, generator=generator)
        for start, end in itertools.pairwise(starts):
            inside = (places - start) % num_patches < max(size, end - start)
            window, rest = order[inside], order[~inside]
            masks.append((window, rest) if size == keep else (rest, window))
    return masks


def residual_masks(num_patches, mask_ratio):
    """`complementary_masks` of a network that sees residual maps; ValueError for impossible ones."""
    if not 0 < mask_ratio <= LARGEST_MASK_RATIO:
        raise ValueError(f"no residual maps at mask ratio {mask_ratio}")
    return complementary_masks(num_patches, mask_ratio, rounds=1)


def _groups_of_masks(masks):
    """Lists of up to MASKS_TOGETHER masks with as many visible patches."""
    by_size = {}
    for mask in masks:
        by_size.setdefault(len(mask[0]), []).append(mask)
    for same in by_size.values():
        for start in range(0, len(same), MASKS_TOGETHER):
            yield same[start : start + MASKS_TOGETHER]


def random_masking(noise, keep):
    """Choose which patches stay visible: in every row of `noise` (B, N) the `keep` smallest.

    Returns
    -------
    ids_keep : (B, keep) int64, the visible patches, in order of their noise.
    ids_removed : (B, N - keep) int64, the others, likewise.
    """
    order = noise.argsort(dim=1)
    return order[:, :keep], order[:, keep:]


def gather_patches(tokens, ids):
    """The tokens (B, N, D) that `ids` (B, n) names: (B, n, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def scatter_patches(tokens, ids, new):
    """A copy of tokens (B, N, D) with `new` (B, n, D), or one number, where `ids` (B, n) says."""
    return tokens.scatter(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]), new)


class PatchEmbed(nn.Module):
    """Linear map of each patch to the embedding width.

    The weights are kept as the convolution of the reference implementation (stride = kernel = p);
    applied to patches it is one matrix product, and only visible patches need it.
    """

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches):  # (B, n, p²C) -> (B, n, D)
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, C, p, p) -> (D, p²C)
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention. `form` picks the kernel, not the result: see ATTENTION_FORMS.

    The first `context` tokens serve as keys and values only; they issue no queries.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.form = "fused"

    def forward(self, x, context=0):  # (B, n, D) -> (B, n - context, D)
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, n, D/heads)
        q = q[:, :, context:]
        if self.form == "fused":
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            # (B, heads, n - context, n)
            scores = (q * (d // self.num_heads) ** -0.5) @ k.transpose(-2, -1)
            x = scores.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n - context, d))


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2020, equations 2 and 3).

    The outputs of the first `context` tokens are left out, where they are not needed.
    """

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, context=0):  # (B, n, D) -> (B, n - context, D)
        x = x[:, context:] + self.attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


def set_attention_form(model, form):
    """Let every attention layer of `model` use one kernel: "fused" or "plain" (same result)."""
    if form not in ATTENTION_FORMS:
        raise ValueError(f"attention form must be one of {ATTENTION_FORMS}, got {form!r}")
    for module in model.modules():
        if isinstance(module, Attention):
            module.form = form


def most_tokens(model):
    """The most tokens that an encoder inside `model` sees of an image; 0 without an encoder."""
    return max((m.num_patches + 1 for m in model.modules() if isinstance(m, Encoder)), default=0)


def _init_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PatchEmbed):
        nn.init.xavier_uniform_(module.proj.weight.view(module.proj.out_channels, -1))
        nn.init.zeros_(module.proj.bias)


def _check_geometry(img_size, patch_size, embed_dim, num_heads):
    if img_size % patch_size:
        raise ValueError(f"patch size {patch_size} does not divide the image size {img_size}")
    if embed_dim % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the embedding width {embed_dim}")


class Encoder(nn.Module):
    """Vision Transformer encoder that takes any subset of an image's patches."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio):
        super().__init__()
        _check_geometry(img_size, patch_size, embed_dim, num_heads)
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.num_patches = (img_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(
            sincos_positions(embed_dim, img_size // patch_size), requires_grad=False
        )
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        nn.init.normal_(self.cls_token, std=0.02)

    def check_images(self, images):
        expected = (self.in_chans, self.img_size, self.img_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"expected images {('B', *expected)}, got {tuple(images.shape)}")

    def encode(self, patches, ids_keep=None):
        """Encode patches (B, N, p²C), all of them or those in `ids_keep` (B, n).

        Returns the normalised tokens (B, 1 + n, D), the class token first.
        """
        positions = self.pos_embed[:, 1:]
        if ids_keep is not None:
            patches = gather_patches(patches, ids_keep)
            positions = positions[0][ids_keep]
        x = self.patch_embed(patches) + positions
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MAE(Encoder):
    """Masked autoencoder: encode the visible patches, predict the pixels of the removed ones.

    Parameters
    ----------
    img_size, patch_size, in_chans : geometry of the images (B, in_chans, img_size, img_size).
    embed_dim, depth, num_heads : the encoder.
    decoder_embed_dim, decoder_depth, decoder_num_heads : the decoder.
    mlp_ratio : hidden width of a block's MLP over the block's width, in both.
    norm_pix_loss : compare with each patch's pixels normalised to zero mean and unit variance.
    """

    def __init__(
        self,
        img_size=64,
        patch_size=8,
        in_chans=1,
        embed_dim=128,
        depth=4,
        num_heads=4,
        decoder_embed_dim=96,
        decoder_depth=1,
        decoder_num_heads=4,
        mlp_ratio=4.0,
        norm_pix_loss=False,
    ):
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio)
        _check_geometry(img_size, patch_size, decoder_embed_dim, decoder_num_heads)
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_positions(decoder_embed_dim, img_size // patch_size), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(_init_weights)

    def decode(self, latent, ids_keep, ids_removed):
        """Predict the removed patches from the visible tokens.

        (B, 1 + n, D), (B, n) and (B, N - n) to (B, N - n, p²C), in the order of `ids_removed`.
        """
        latent = self.decoder_embed(latent)
        positions = self.decoder_pos_embed[0, 1:]
        # Attention ignores the order of tokens, so the visible ones stay in front.
        visible = latent[:, 1:] + positions[ids_keep]
        removed = self.mask_token.to(latent.dtype) + positions[ids_removed]
        x = torch.cat([latent[:, :1] + self.decoder_pos_embed[:, :1], visible, removed], dim=1)
        for i, block in enumerate(self.decoder_blocks, start=1):
            # The last block computes the predictions alone.
            x = block(x, context=latent.shape[1] if i == len(self.decoder_blocks) else 0)
        return self.decoder_pred(self.decoder_norm(x[:, -ids_removed.shape[1] :]))

    def forward(self, images, mask_ratio=0.75, noise=None):
        """Mask, reconstruct and compare.

        Parameters
        ----------
        images : (B, C, H, W), already in the intensity scale that the network sees.
        mask_ratio : share of patches to remove, between 0 and 1; at least one patch is removed
            and at least one stays visible.
        noise : (B, N) or None for fresh uniform noise; the patches with the smallest stay visible.

        Returns
        -------
        loss : mean squared error over the removed patches.
        pred : (B, M, p²C) predictions of the removed patches.
        ids_removed : (B, M), which these are.

        Raises ValueError for images of another shape or a mask ratio that is not between 0 and 1.
        """
        self.check_images(images)
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {mask_ratio}")
        patches = patchify(images, self.patch_size)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        keep = int(self.num_patches * (1 - mask_ratio))
        keep = min(max(1, keep), self.num_patches - 1)

        ids_keep, ids_removed = random_masking(noise, keep)
        pred = self.decode(self.encode(patches, ids_keep), ids_keep, ids_removed)

        target = gather_patches(patches, ids_removed)
        if self.norm_pix_loss:
            mean, spread = mean_and_spread(target)
            target = (target - mean) / spread
        return F.mse_loss(pred.float(), target), pred, ids_removed

    def pixels(self, pred, patches):
        """Predictions of patches (B, n, p²C) as pixels: `norm_pix_loss` takes mean and spread."""
        if not self.norm_pix_loss:
            return pred.float()
        mean, spread = mean_and_spread(patches)
        return pred.float() * spread + mean

    def reconstruct(self, images, mask_ratio=0.75, noise=None):
        """Pictures of a reconstruction: (masked, reconstruction), each (B, C, H, W).

        Removed pixels of `masked` are NaN; visible pixels of `reconstruction` are the image's own.
        """
        _, pred, ids_removed = self(images, mask_ratio, noise)
        patches = patchify(images, self.patch_size)
        masked = scatter_patches(patches, ids_removed, math.nan)
        pixels = self.pixels(pred, gather_patches(patches, ids_removed))
        reconstruction = scatter_patches(patches, ids_removed, pixels)
        p, c = self.patch_size, self.in_chans
        return unpatchify(masked, p, c), unpatchify(reconstruction, p, c)

    def residual(self, images, masks):
        """What the rest of an image does not explain of each patch.

        Every patch is predicted wherever one of `masks` (see `complementary_masks`) hides it.

        Returns image minus prediction (B, C, H, W), averaged over the masks that hide the pixel.
        Raises ValueError for images of another shape.
        """
        self.check_images(images)
        patches = patchify(images, self.patch_size)
        b = patches.shape[0]
        total = torch.zeros_like(patches)
        for group in _groups_of_masks(masks):
            visible, hidden = (torch.stack(ids).to(patches.device) for ids in zip(*group, strict=True))
            m = len(group)
            repeated = patches.expand(m, -1, -1, -1).flatten(0, 1)  # (m·B, N, p²C)
            ids_keep, ids_removed = (
                ids.unsqueeze(1).expand(-1, b, -1).flatten(0, 1) for ids in (visible, hidden)
            )
            pred = self.decode(self.encode(repeated, ids_keep), ids_keep, ids_removed)
            target = gather_patches(repeated, ids_removed)
            difference = (target - self.pixels(pred, target)).unflatten(0, (m, b))
            # One mask at a time hides a patch once, so a GPU adds in the same order every time.
            for ids, of_mask in zip(hidden, difference, strict=True):
                total = total.index_add(1, ids, of_mask)
        times_hidden = torch.bincount(torch.cat([hidden for _, hidden in masks])).to(patches)
        p, c = self.patch_size, self.in_chans
        return unpatchify(total / times_hidden.unsqueeze(1), p, c)


def residual_scores(maps):
    """How much is left in residual maps (B, C, H, W): scores (B,).

    The mean square of a map that was averaged over a grid of SCORE_GRID squares a side: averages
    keep what substructure leaves in an arc, and lose noise and the errors of single pixels.
    """
    return F.avg_pool2d(maps, max(1, maps.shape[-1] // SCORE_GRID)).square().mean(dim=(1, 2, 3))


class IntensityTransform(nn.Module):
    """Raw pixels to what the network sees: z = (f((x - offset) / softening) - mean) / std.

    f is log(1 + max(x, 0)), asinh(x), sqrt(max(x, 0)) or x. The four constants come from training
    images and are buffers, so they are part of the weights and of an exported graph: data in other
    units gives the same z.
    """

    def __init__(self, kind="log", offset=0.0, softening=1.0, mean=0.0, std=1.0):
        super().__init__()
        if kind not in TRANSFORM_KINDS:
            raise ValueError(f"transform must be one of {TRANSFORM_KINDS}, got {kind!r}")
        self.kind = kind
        constants = {"offset": offset, "softening": softening, "mean": mean, "std": std}
        for name, value in constants.items():
            self.register_buffer(name, torch.tensor(float(value), dtype=torch.float32))

    def forward(self, images):
        x = (images - self.offset) / self.softening
        if self.kind == "log":
            x = torch.log1p(x.clamp_min(0))
        elif self.kind == "asinh":
            x = torch.asinh(x)
        elif self.kind == "sqrt":
            x = x.clamp_min(0).sqrt()
        return (x - self.mean) / self.std


def brighter_half_right(images):
    """Turn those of the images (B, C, H, W) by half whose left half is the brighter one.

    Lens, shear and source are symmetric under half a turn, so both orientations are the same lens;
    a network that always sees the same one of them has half as much to learn.
    """
    return turned(images, brighter_half_is_left(images))


def brighter_half_is_left(images):
    """Whether the left half of the images (B, C, H, W) is brighter than the right one: (B, 1, 1, 1) bool."""
    half = images.shape[-1] // 2
    left, right = (
        part.sum(dim=(1, 2, 3), keepdim=True) for part in (images[..., :half], images[..., -half:])
    )
    return left > right


def turned(images, which):
    """Images (B, C, H, W), those of `which` (B, 1, 1, 1) turned by half."""
    return torch.where(which, images.flip(2, 3), images)


def new_head(width, num_classes):
    """The classification head, (B, width) -> (B, num_classes)."""
    return nn.Sequential(
        nn.Linear(width, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Linear(64, num_classes),
    )


class Classifier(Encoder):
    """Encoder and classification head over raw images (B, C, H, W): logits (B, num_classes).

    `transform` is a dict of the arguments of `IntensityTransform`. `pool` says what the head sees:
    "mean" of the patch tokens, the "cls" token, "both" side by side, or "stats": mean, standard
    deviation, minimum and maximum of the patch tokens, since substructure dents few patches of
    many. Logits are divided by `temperature`, which is 1 until it is fitted to calibrate the
    probabilities (Guo et al. 2017, arXiv:1706.04599, section 4.2).
    """

    def __init__(
        self,
        img_size=64,
        patch_size=8,
        in_chans=1,
        embed_dim=128,
        depth=4,
        num_heads=4,
        mlp_ratio=4.0,
        num_classes=3,
        pool="mean",
        transform=None,
    ):
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio)
        if pool not in POOLINGS:
            raise ValueError(f"pool must be one of {tuple(POOLINGS)}, got {pool!r}")
        self.pool = pool
        self.transform = IntensityTransform(**(transform or {}))
        self.register_buffer("temperature", torch.ones(()))
        self.fc = new_head(embed_dim * POOLINGS[pool], num_classes)
        self.apply(_init_weights)

    def features(self, images, ids_keep=None):
        """Pooled encoder output of raw images, (B, C, H, W) -> (B, D · POOLINGS[pool]).

        The encoder sees them with the brighter half right. `ids_keep` (B, n) restricts it to some of the patches.
        """
        self.check_images(images)
        seen = brighter_half_right(self.transform(images))
        tokens = self.encode(patchify(seen, self.patch_size), ids_keep)
        if self.pool == "cls":
            return tokens[:, 0]
        if self.pool == "stats":
            patches = tokens[:, 1:].float()
            mean = patches.mean(dim=1)
            # On a CPU this takes half the time of torch.var_mean, amin and amax.
            variance = (patches - mean.unsqueeze(1)).square().mean(dim=1)
            extremes = [patches.min(dim=1).values, patches.max(dim=1).values]
            return torch.cat([mean, (variance + 1e-6).sqrt(), *extremes], dim=1)
        mean = tokens[:, 1:].mean(dim=1)
        return mean if self.pool == "mean" else torch.cat([tokens[:, 0], mean], dim=1)

    def forward(self, images):
        return self.fc(self.features(images)) / self.temperature


def default_map_pool(img_size):
    """Pixels a side of the squares that maps of such images are averaged over: see MAP_SIDE."""
    return max(1, img_size // MAP_SIDE)


class ResidualConvolution(nn.Module):
    """x + ReLU(BatchNorm(convolution of x)), see He et al. 2015 (arXiv:1512.03385)."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


class MapClassifier(nn.Module):
    """Residual maps (B, C, H, W), or maps and images (B, 2C, H, W), to logits (B, num_classes).

    Each stage halves the side before BatchNorm and ReLU, so these process a quarter of the pixels. With images
    a stage has a second convolution, since what to look for differs from image to image.
    """

    def __init__(self, in_chans, num_classes, with_image=False):
        super().__init__()
        self.in_chans = in_chans
        stages, channels = [], in_chans * (2 if with_image else 1)
        for before, after in zip((channels, *MAP_WIDTHS), MAP_WIDTHS, strict=False):
            stages += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
            if with_image:
                stages.append(ResidualConvolution(after))
        # With the channels last in memory, convolutions take half the time on a CPU.
        self.stages = nn.Sequential(*stages).to(memory_format=torch.channels_last)
        self.fc = new_head(MAP_WIDTHS[-1], num_classes)

    def forward(self, seen):
        maps, images = seen.float().split([self.in_chans, seen.shape[1] - self.in_chans], dim=1)
        residual = torch.asinh(maps / MAP_SCALE)  # linear for weak residuals, logarithmic beyond
        return self.fc(self.stages(torch.cat([residual, images], dim=1)).mean(dim=(2, 3)))


class ResidualClassifier(nn.Module):
    """Classify what a frozen MAE of smooth lenses does not explain of raw images (B, C, H, W).

    The MAE predicts every patch from the others, see `MAE.residual`; a `MapClassifier` sees image
    minus prediction, where the substructure is nearly all that is left. Its logits (B, num_classes) are
    the mean over orientations of a map: two, since lens, shear and source are symmetric under half a
    turn, or all eight. They are divided by `temperature`, see `Classifier`.

    Parameters
    ----------
    mae : arguments of the `MAE`, a dict.
    transform : arguments of `IntensityTransform`, a dict.
    mask_ratio : of `complementary_masks`.
    map_pool : maps are averaged over squares of so many pixels a side; None: `default_map_pool`.
    with_image : whether the classifier sees the image beside its map: where the arcs are, another lens in
        every image changes how much substructure would show.
    orientations : 2 or 8, of the mean.

    Raises ValueError for maps of fewer than 16 pixels a side and for impossible masks.
    """

    def __init__(
        self,
        mae,
        transform,
        num_classes=3,
        mask_ratio=0.75,
        map_pool=None,
        with_image=False,
        orientations=2,
    ):
        super().__init__()
        self.mae = MAE(**mae)
        self.img_size = self.mae.img_size
        self.map_pool = default_map_pool(self.img_size) if map_pool is None else map_pool
        if not isinstance(self.map_pool, int) or self.map_pool < 1:
            raise ValueError(f"maps cannot be averaged over {map_pool!r} pixels")
        side = self.img_size // self.map_pool
        if side < 2 ** len(MAP_WIDTHS):
            raise ValueError(f"maps must be at least {2 ** len(MAP_WIDTHS)} pixels wide")
        if orientations not in (2, 8):
            raise ValueError(f"logits are the mean over 2 or 8 orientations, not {orientations!r}")
        self.masks = residual_masks(self.mae.num_patches, mask_ratio)
        self.transform = IntensityTransform(**transform)
        self.with_image, self.orientations = bool(with_image), orientations
        self.map_shape = (self.mae.in_chans * (2 if with_image else 1), side, side)
        self.network = MapClassifier(self.mae.in_chans, num_classes, with_image)
        self.register_buffer("temperature", torch.ones(()))
        self.mae.requires_grad_(False)

    def maps(self, images):
        """What the classifier sees of raw images: maps (B, *map_shape)."""
        images = self.transform(images)
        maps = self.mae.residual(images, self.masks)
        if self.with_image:
            maps = torch.cat([maps, images], dim=1)
        return F.avg_pool2d(maps, self.map_pool) if self.map_pool > 1 else maps

    def logits(self, maps):
        """Logits (B, num_classes) of what `maps` gives, before the temperature."""
        views = [maps, maps.flip(2, 3)]
        if self.orientations == 8:
            views += [maps.flip(2), maps.flip(3)]
            views += [view.mT for view in views]
        return sum(self.network(view) for view in views) / len(views)

    def forward(self, images):
        return self.logits(self.maps(images)) / self.temperature


class MassNetwork(nn.Module):
    """Images and residual maps (B, channels, H, H) to an estimate and the logarithm of its spread (B, 2).

    It keeps where things are: what tells a short vortex are a few pixels at the centre, and an average over
    the image would lose them. They differ by a thousandth, so nothing is normalised over a batch, whose
    other images would disturb that. Raises ValueError for an odd number of pixels a side.
    """

    def __init__(self, channels, img_size):
        super().__init__()
        if img_size % 2:
            raise ValueError(f"images must have an even number of pixels a side, not {img_size}")
        stages, side, before = [nn.PixelUnshuffle(2)], img_size // 2, 4 * channels
        for stage, width in enumerate(MASS_WIDTHS):
            stride = 2 if stage else 1
            stages += [nn.Conv2d(before, width, 3, stride, padding=1), nn.GELU()]
            side, before = -(-side // stride), width
        self.stages = nn.Sequential(*stages).to(memory_format=torch.channels_last)
        layers, before = [], before * side**2
        for _ in range(3):
            layers += [nn.Linear(before, 256), nn.GELU()]
            before = 256
        self.fc = nn.Sequential(*layers, nn.Linear(before, 2))

    def forward(self, x):
        return self.fc(self.stages(x).flatten(1))


class MassEstimator(nn.Module):
    """log10 of the axion's mass in eV from raw images (B, 1, H, H) of vortices, with an interval.

    A `MassNetwork` sees each image, turned so that its brighter half is right, beside what the frozen MAE
    of smooth lenses does not explain of it. Without an MAE it sees the image alone.

    Parameters
    ----------
    transform : arguments of `IntensityTransform`, a dict.
    centre : log10 of a mass in eV that estimates are relative to.
    edges : increasing log10 of masses. Each group of estimates between two of them has a width of its own.
    mae : arguments of the `MAE`, a dict; None for none. Then `img_size` says how large images are.
    mask_ratio : of `complementary_masks`.

    Raises ValueError for images with an odd number of pixels a side and for impossible masks.
    """

    def __init__(self, transform, centre, edges=(), mae=None, img_size=64, mask_ratio=0.75):
        super().__init__()
        self.mae, self.img_size = (MAE(**mae) if mae else None), (mae or {}).get("img_size", img_size)
        self.map_shape = (1, self.img_size, self.img_size)
        if not all(low < high for low, high in zip(edges, edges[1:], strict=False)):
            raise ValueError(f"edges that do not increase: {edges}")
        if mae:
            self.mae.requires_grad_(False)
            self.masks = residual_masks(self.mae.num_patches, mask_ratio)
        self.transform, self.centre = IntensityTransform(**transform), float(centre)
        self.network = MassNetwork(2 if mae else 1, self.img_size)
        self.register_buffer("edges", torch.tensor(edges, dtype=torch.float32), persistent=False)
        self.register_buffer("widths", torch.full((len(edges) + 1,), math.log(20.0)))

    def seen(self, images):
        """What the networks see of raw images."""
        return brighter_half_right(self.transform(images))

    def maps(self, images):
        """Residual maps (B, *map_shape) of raw images, turned as `seen` turns them."""
        return self.mae.residual(self.seen(images), self.masks)

    def estimates(self, images, maps=None):
        """log10 of the mass, and of its spread the natural logarithm, (B, 2), of raw images and their maps."""
        seen = self.seen(images)
        if maps is not None:
            seen = torch.cat([seen, torch.asinh(maps.float() / MAP_SCALE)], dim=1)
        estimate, log_spread = self.network(seen).unbind(1)
        return torch.stack([self.centre + estimate, log_spread.clamp(*LOG_SPREADS)], dim=1)

    def forward(self, images):
        """(log10 of the mass, low, high), each (B,): 90 of 100 intervals hold the true mass.

        An interval reaches `widths` spreads to either side. The widths are log(20), which would be right
        for Laplace's distribution, until they are fitted.
        """
        estimate, log_spread = self.estimates(images, self.maps(images) if self.mae else None).unbind(1)
        group = (estimate.unsqueeze(1) > self.edges).sum(dim=1)
        half = self.widths[group] * log_spread.exp()
        return estimate, estimate - half, estimate + half


def reduction_matrices(side, factor):
    """b (side, factor·side) of the bicubic reduction b·image·bᵀ, see `pairs.reduced`, and g = bᵀ(bbᵀ)⁻¹."""
    columns = torch.eye(factor * side, dtype=torch.float64)[:, None, :, None]  # images of one column
    b = F.interpolate(columns, size=(side, 1), mode="bicubic", antialias=False)[:, 0, :, 0].T
    return b.float().contiguous(), torch.linalg.solve(b @ b.T, b).T.float().contiguous()


def noise_from(shown, variance, b, g):
    """The most probable noise of sharp images (..., fH, fH) whose reduction is `shown` (..., H, H).

    For noise without correlation between pixels it is ΣBᵀ(BΣBᵀ)⁻¹shown, with Σ the `variance`
    (..., fH, fH), at least one, whose ratios count. For white noise this is g·shown·gᵀ =: G shown. The
    answer is x + G(shown - B x) with x = ΣG(shown/BΣ): its reduction is exactly `shown`, and on lenses
    it agrees with the formula to 10⁻⁴ dB.
    """
    x = variance * (g @ (shown / (b @ variance @ b.T).clamp_min(0.5)) @ g.T)
    return x + g @ (shown - b @ x @ b.T) @ g.T


class Sharpener(nn.Module):
    """Sharp images (B, 1, fH, fH) from coarse ones (B, 1, H, H) that show a part of their noise.

    A sharp image is t + n, a noise-free lens and its noise, and the coarse image is B(t + n), where B is the
    bicubic reduction. If t is known, the best estimate of the sharp image is

        t + ΣBᵀ(BΣBᵀ)⁻¹(coarse - B t)

    with the variance Σ of the noise (the mean of a Gaussian under a condition). A network predicts t, and
    `with_noise` adds the rest. The network is the whole MAE, which sees all patches, and convolutions that
    see the coarse image at its full resolution beside what the MAE says.

    Parameters
    ----------
    mae : arguments of the `MAE`, a dict. Its `img_size` is H.
    transform : arguments of `IntensityTransform`, a dict.
    factor : f.
    unit : rms of sharp images minus interpolated coarse ones.
    adds_noise : whether the coarse images are bicubic reductions; otherwise the answer is t.

    Raises ValueError for another factor than 2, 3 or 4.
    """

    def __init__(self, mae, transform, factor=2, unit=1.0, adds_noise=True):
        super().__init__()
        if factor not in (2, 3, 4) or not 0 < unit < math.inf:
            raise ValueError(f"images cannot be made {factor!r} times as sharp, in units of {unit!r}")
        self.mae, self.transform = MAE(**mae), IntensityTransform(**transform)
        self.img_size, self.factor = self.mae.img_size, factor
        self.unit, self.offset, self.adds_noise = float(unit), self.transform.offset.item(), adds_noise
        width, patch_size = REFINEMENT_WIDTH, self.mae.patch_size
        self.features = nn.Linear(self.mae.decoder_pred.in_features, patch_size**2 * TOKEN_FEATURES)
        self.refinement = nn.Sequential(
            nn.Conv2d(1 + TOKEN_FEATURES, width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, factor**2, 3, padding=1), nn.PixelShuffle(factor),
        ).to(memory_format=torch.channels_last)  # fmt: skip
        nn.init.zeros_(self.refinement[-2].weight)
        self.log_photon_noise = nn.Parameter(torch.zeros(()))
        for name, matrix in zip("bg", reduction_matrices(self.img_size, factor), strict=True):
            self.register_buffer(name, matrix, persistent=False)
        self.register_buffer("error_scale", torch.ones(()))

    def clean(self, images):
        """The noise-free sharp images (B, 1, fH, fH) behind raw coarse ones (B, 1, H, H)."""
        self.mae.check_images(images)
        seen = self.transform(images)
        is_turned = brighter_half_is_left(seen)
        seen = turned(seen, is_turned)
        mae, p = self.mae, self.mae.patch_size
        tokens = mae.decoder_embed(mae.encode(patchify(seen, p))) + mae.decoder_pos_embed
        for block in mae.decoder_blocks:
            tokens = block(tokens)
        features = unpatchify(self.features(mae.decoder_norm(tokens[:, 1:])), p, TOKEN_FEATURES)
        both = torch.cat([seen.to(features.dtype), features], dim=1)
        change = self.refinement(both.contiguous(memory_format=torch.channels_last)).float()
        interpolated = F.interpolate(images, scale_factor=self.factor, mode="bilinear", align_corners=False)
        return interpolated + self.unit * turned(change, is_turned)

    def with_noise(self, images, clean):
        """(sharp images (B, 1, fH, fH), estimate of their rms error (B,)) of coarse and clean ones; in float32.

        Only the ratio of variances matters: white noise, and photon noise in proportion to the clean image. What
        the clean images leave of the coarse ones is the noise that these show; the error is in proportion to it.
        """
        shown = images - self.b @ clean @ self.b.T
        error = self.error_scale * shown.square().mean(dim=(1, 2, 3)).sqrt()
        if not self.adds_noise:
            return clean, error
        bright = (clean - self.offset).clamp_min(0) / self.unit
        variance = 1 + self.log_photon_noise.exp() * bright
        return clean + noise_from(shown, variance, self.b, self.g), error

    def forward(self, images):
        return self.with_noise(images, self.clean(images))
