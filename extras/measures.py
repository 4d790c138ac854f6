"""How near a video is to the true one: functions of tensors, which know no model and no world.

Videos are (B, 3, T, H, W) in [-1, 1], masks (B, T, H, W) of 0 and 1.
"""

import math

import torch
import torch.nn.functional as F

from motionstream import UserError


def psnr(video, truth, mask=None):
    """Decibels between two tensors in [-1, 1]; with a mask, of videos, of the pixels inside alone.
    NaN if the mask is empty."""
    error = (video - truth).square()
    if mask is None:
        mean = error.mean()
    else:
        inside = mask.float().sum()
        mean = (error.mean(1) * mask).sum() / inside
    return -10 * math.log10(mean.item() / 4 + 1e-10)


def ssim(a, b):
    """Structural similarity (B,) of pictures (B, 3, H, W) in [-1, 1], by Gaussian windows of 11x11
    pixels, sigma 1.5 (Wang et al. 2004)."""
    place = torch.arange(-5, 6).double()
    bell = torch.exp(-place ** 2 / 4.5)
    bell = bell / bell.sum()
    row = bell.expand(3, 1, 1, 11)

    def blur(x):
        across = F.conv2d(x, row, groups=3)
        return F.conv2d(across, row.mT, groups=3)

    a = a.double() / 2 + 0.5
    b = b.double() / 2 + 0.5
    mean_a = blur(a)
    mean_b = blur(b)
    variance_a = blur(a * a) - mean_a ** 2
    variance_b = blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    brightness = mean_a ** 2 + mean_b ** 2
    contrast = variance_a + variance_b
    near = (2 * mean_a * mean_b + 0.01 ** 2) / (brightness + 0.01 ** 2)
    alike = (2 * covariance + 0.03 ** 2) / (contrast + 0.03 ** 2)
    return (near * alike).mean((1, 2, 3))


def every_fourth(video, start=0):
    """Frames of a video as pictures (B T / 4, 3, H, W)."""
    frames = video[:, :, start % 4::4]
    return frames.transpose(1, 2).flatten(0, 1)


def video_ssim(video, truth):
    """The mean ssim of every fourth frame."""
    return ssim(every_fourth(video), every_fourth(truth)).mean().item()


def sharpness(video, truth):
    """How strong edges are, as a share of the truth's: sums of neighbours' absolute differences."""
    edges = 0
    true_edges = 0
    for axis in (3, 4):
        edges += video.diff(dim=axis).abs().mean()
        true_edges += truth.diff(dim=axis).abs().mean()
    return (edges / true_edges).item()


def edge_correlation(video, truth):
    """Whether edges are where they should be: the correlation of the differences of neighbouring
    pixels, 1 at best. Sharpness without it is noise."""
    product = 0
    energy = 0
    true_energy = 0
    for axis in (3, 4):
        edges = video.diff(dim=axis)
        true_edges = truth.diff(dim=axis)
        product += (edges * true_edges).sum()
        energy += edges.square().sum()
        true_energy += true_edges.square().sum()
    both = (energy * true_energy).sqrt()
    return (product / both.clamp(min=1e-6)).item()


def colourfulness(video, truth, mask):
    """How colourful the pixels inside a mask are, as a share of the truth's."""
    def total(v):
        chroma = v - v.mean(1, keepdim=True)
        strength = chroma.square().sum(1).sqrt()
        return (strength * mask).sum()

    return (total(video) / total(truth)).item()


def colour_mass(video, colours):
    """How much of each colour (B, K, 3), in [0, 1], is in a video, and where: mass (B, T, K) and
    centroid (B, T, K, 2) in pixels. A pixel counts for the colour nearest to it in hue, by how
    colourful it is; greyish ones do not count."""
    rgb = video.transpose(1, 2) / 2 + 0.5                               # (B, T, 3, H, W)
    chroma = rgb - rgb.mean(2, keepdim=True)
    strength = chroma.square().sum(2, keepdim=True).sqrt()      # norm(dim=2): 100 times as long
    hues = colours - colours.mean(2, keepdim=True)
    hues = F.normalize(hues, dim=2)                                     # (B, K, 3)
    hue = chroma / strength.clamp(min=1e-12)
    match = torch.einsum("btchw,bkc->btkhw", hue, hues)
    best = match.amax(2, keepdim=True)
    nearest = (match == best) & (match > 0.8)
    weight = nearest * (strength - 0.15).clamp(min=0)                   # (B, T, K, H, W)
    return weight.sum((3, 4)), centroid(weight)


def centroid(weight):
    """The centre of gravity (…, 2), x and y in pixels, of weights (…, H, W)."""
    height, width = weight.shape[-2:]
    columns = torch.arange(width) + 0.5
    rows = torch.arange(height) + 0.5
    x = (weight.sum(-2) * columns).sum(-1)
    y = (weight.sum(-1) * rows).sum(-1)
    total = weight.sum((-2, -1)).clamp(min=1e-6)
    return torch.stack([x, y], -1) / total[..., None]


# --------------------------------------------------------------------------------------------------
# Best whole shifts. correlate(a, b)[dy, dx] is the sum of a(y, x) b(y + dy, x + dx): by FFT, for
# all shifts at once.

def spectrum(x, reach):
    """FFT of pictures (…, H, W), zero-padded so that shifts up to `reach` do not wrap round."""
    height, width = x.shape[-2:]
    return torch.fft.rfft2(x, (height + reach, width + reach))


def correlate(a, b, size, reach):
    """From two spectra of pictures of `size` (H, W): correlations (…, 2 reach + 1, 2 reach + 1),
    the middle is no shift."""
    height, width = size
    padded = (height + reach, width + reach)
    full = torch.fft.irfft2(a.conj() * b, padded)
    full = full.roll((reach, reach), (-2, -1))
    side = 2 * reach + 1
    return full[..., :side, :side]


def shift_of(index, reach):
    """Flat indices into correlations to (…, 2), x and y in pixels."""
    side = 2 * reach + 1
    x = index % side - reach
    y = index // side - reach
    return torch.stack([x, y], -1)


def best_shift(pictures, truth, mask, reach):
    """Where the masked part of each true picture is found in another: the whole shift (n, 2), x and
    y, of at most `reach` pixels with the least squared error, and that error (n,), the mean of a
    masked pixel's three channels. pictures, truth (n, 3, H, W); mask (n, H, W). At least half of
    the part has to be inside the picture."""
    size = mask.shape[-2:]
    mask = mask.float()
    seen = spectrum(mask, reach)
    square = spectrum(pictures.square().sum(1), reach)
    inside = spectrum(torch.ones_like(mask[:1]), reach)
    true_square = spectrum(truth.square().sum(1) * mask, reach)
    part = spectrum(truth * mask[:, None], reach)
    whole = spectrum(pictures, reach)
    product = correlate(part, whole, size, reach).sum(1)                # (n, side, side)
    error = correlate(seen, square, size, reach)
    error = error + correlate(true_square, inside, size, reach)
    error = error - 2 * product
    count = correlate(seen, inside, size, reach)
    area = mask.sum((1, 2), keepdim=True)
    error = error / count.clamp(min=1) / 3
    error = error.masked_fill(count <= 0.5 * area, math.inf)
    least, index = error.flatten(1).min(1)
    return shift_of(index, reach), least.clamp(min=0)


def best_overlap(found, outline, reach=16, near=6):
    """How well outlines agree wherever they are: the intersection over union (n,) of what was found
    (n, H, W) and the true outline (n, H, W), both of 0 and 1, moved by the whole shift of at most
    `reach` pixels that is best for it. What was found farther than `near` pixels from the outline
    is not this object and does not count."""
    size = outline.shape[-2:]
    outline = outline.float()
    found = found.float()
    side = 2 * near + 1
    around = F.max_pool2d(outline, side, 1, near)
    seen = spectrum(found, reach)
    both = correlate(spectrum(outline, reach), seen, size, reach)
    nearby = correlate(spectrum(around, reach), seen, size, reach)
    area = outline.sum((1, 2), keepdim=True)
    either = area + nearby - both
    overlap = both / either.clamp(min=1)                                # (n, side, side)
    return overlap.flatten(1).amax(1)


def object_pixels(video, truth, ground, mask):
    """Which pixels (B, T, H, W) of a video show an object of one colour, and not the ground behind
    it: those beyond the middle between the two colours. The object's is the mean of the true one
    inside its mask, frame by frame; ground is the true video without objects. Pixels whose ground
    has the object's colour never count."""
    mask = mask[:, None]                                                # (B, 1, T, H, W)
    count = mask.sum((3, 4), keepdim=True)
    total = (truth * mask).sum((3, 4), keepdim=True)
    colour = total / count.clamp(min=1)                                 # (B, 3, T, 1, 1)
    way = colour - ground
    length = way.square().sum(1)
    along = ((video - ground) * way).sum(1)
    return (along > 0.5 * length) & (length > 0.04)


# --------------------------------------------------------------------------------------------------
# LPIPS, by its package.

def lpips_network(net):
    """How different images (B, 3, H, W) in [-1, 1] look (Zhang et al. 2018, arXiv 1801.03924), by
    the package lpips: a function of two of them. net: "alex" or "vgg"."""
    try:
        from lpips import LPIPS
    except (ImportError, RuntimeError) as e:        # of torchvision, not made for this torch
        raise UserError(f"LPIPS: {str(e).splitlines()[0]}; pip install lpips") from None
    return LPIPS(net=net, verbose=False).eval().requires_grad_(False)


def open_lpips(net, device):
    """The mean LPIPS of two videos (B, 3, T, H, W), of every fourth frame, from another one each
    micro-step; None: 0."""
    if net is None:
        return lambda video, truth, step: 0.0
    network = lpips_network(net).to(device)

    def distance(video, truth, step):
        frames = every_fourth(video, step)
        true_frames = every_fourth(truth, step)
        return network(frames, true_frames).mean()
    return distance
