"""How near a video is to the one that it should be: the measures of MotionStream's tables (appendix E).

Pictures are (B, 3, H, W) in [0, 1]; tracks as in motionstream.py, in pixels. LPIPS needs a trained network and is left
out: the package `lpips` computes it on the same pictures, scaled to [-1, 1].
"""

import torch
import torch.nn.functional as F


def psnr(a, b):
    """Peak signal-to-noise ratio in dB, of all pixels together; infinite for equal pictures."""
    return -10 * (a - b).double().square().mean().log10().item()


def ssim(a, b):
    """Structural similarity: windows of 11x11 pixels, weighted by a Gaussian of standard deviation 1.5, that lie inside
    the picture; the mean over them and over R, G and B."""
    line = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5 ** 2))
    window = (line[:, None] * line / line.sum() ** 2).expand(15, 1, 11, 11)
    a, b = a.double(), b.double()
    means = F.conv2d(torch.cat([a, b, a * a, b * b, a * b], 1), window, groups=15)
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = means.chunk(5, 1)
    var_a, var_b, cov = mean_aa - mean_a ** 2, mean_bb - mean_b ** 2, mean_ab - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    return (luminance * (2 * cov + c2) / (var_a + var_b + c2)).mean().item()


def endpoint_errors(found, known, tracks, visible):
    """Distances (n,) of the tracks found in a video, (B, T, N, 2), from those that it should follow: of all points that
    are visible (B, T, N) in the latter and whose position is known (B, T, N) in the former, up to the shorter end.
    Their mean is the papers' EPE. A point that the tracker takes for hidden counts as well."""
    frames = min(found.shape[1], tracks.shape[1])
    distance = (found[:, :frames] - tracks[:, :frames]).norm(dim=-1)
    return distance[visible[:, :frames] & known[:, :frames]]
