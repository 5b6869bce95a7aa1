"""Made-up pictures with the statistics that natural ones share: edges and occlusion, 1/f spectra, correlated colours.

Dead leaves (opaque shapes whose sizes follow a power law) are the simplest model of images that has both occlusion and
scale invariance [Lee, Mumford, Huang: Occlusion models for natural images, IJCV 2001]; networks learn useful features
from them and from coloured noise [Baradad et al.: Learning to see by looking at noise, NeurIPS 2021].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Recipe", "pictures"]

Pictures = NDArray[np.float32]
_LEAVES = 48
# principal axes of the colours of natural images (grey, blue-yellow, green-magenta) and their usual deviations
_COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], np.float64) / np.sqrt([[3], [2], [6]])
_DEVIATIONS = np.array([1.0, 0.25, 0.1])


@dataclass(frozen=True)
class Recipe:
    """What made-up pictures look like on the whole; each picture varies around it."""

    exponent: float = 1.2
    """The amplitude spectrum falls with frequency to this power."""
    contrast: float = 0.22
    """Standard deviation of the pixels of a picture, whose range is 0 to 1."""
    spread: float = 0.4
    """Standard deviation of the logarithm of the contrast over pictures."""
    brightness: float = 0.47
    """Mean of the pixels."""
    shift: float = 0.14
    """Standard deviation of the mean over pictures."""
    saturation: float = 1.0
    """Deviation of colours from grey, relative to natural images."""
    texture: float = 0.35
    """Deviation inside a leaf relative to that between leaves."""
    mixture: tuple[float, float, float, float] = (0.55, 0.2, 0.15, 0.1)
    """Shares of dead leaves, coloured noise, smooth gradients and gratings, up to a factor."""


def pictures(rng: np.random.Generator, count: int, height: int, width: int, channels: int, recipe: Recipe) -> Pictures:
    """Pictures `[count, channels, height, width]` with values in 0..1."""
    mix = _mixing(rng, count, channels, recipe)
    noise = _coloured_noise(rng, count, height, width, channels, recipe.exponent)
    share = np.asarray(recipe.mixture, np.float64)
    kinds = rng.choice(4, size=count, p=share / share.sum())
    layers = np.empty((count, channels, height, width), np.float32)
    for kind in range(4):
        mine = kinds == kind
        if mine.any():
            layers[mine] = _standard(_layer(rng, kind, noise[mine], recipe.texture))
    # some pictures are half one thing and half another, as if something stood in front of a background
    partner = rng.permutation(count)
    window = _standard(_coloured_noise(rng, count, height, width, 1, 1.8))
    both = (rng.random(count) < 0.3)[:, None, None, None]
    front = both & (window > rng.normal(0.3, 0.5, (count, 1, 1, 1)))
    layers = np.where(front, layers[partner], layers)
    layers = _standard(np.einsum("nkc,nchw->nkhw", mix.astype(np.float32), layers))
    contrast = recipe.contrast * np.exp(rng.normal(0, recipe.spread, count) - recipe.spread**2 / 2)
    tint = np.einsum("nkc,nc->nk", mix, rng.normal(0, 1, (count, channels)))
    level = recipe.brightness + recipe.shift * tint / max(float(np.sqrt((tint**2).mean())), 1e-6)
    out = layers * contrast[:, None, None, None].astype(np.float32) + level[:, :, None, None].astype(np.float32)
    clipped: Pictures = np.clip(out, 0, 1)
    return clipped


def _layer(rng: np.random.Generator, kind: int, noise: Pictures, texture: float) -> Pictures:
    """What fills a picture, of one of the kinds of `Recipe.mixture`."""
    if kind == 0:
        return _leaves(rng, noise, texture)
    if kind == 2:
        return _gradients(rng, noise.shape) + np.float32(0.2) * noise
    if kind == 3:
        return _gratings(rng, noise.shape) + np.float32(0.3) * noise
    return noise


def _standard(layers: Pictures) -> Pictures:
    """Each picture with mean 0 per channel and variance 1 overall."""
    layers = layers - layers.mean(axis=(2, 3), keepdims=True)
    deviation = np.sqrt((layers**2).mean(axis=(1, 2, 3), keepdims=True))
    out: Pictures = layers / np.maximum(deviation, np.float32(1e-6))
    return out


def _mixing(rng: np.random.Generator, count: int, channels: int, recipe: Recipe) -> NDArray[np.float64]:
    """For each picture a matrix from independent components to channels."""
    if channels == 1:
        return np.ones((count, 1, 1))
    if channels == 3:
        axes, deviations = _COLOURS, _DEVIATIONS
    else:  # one part that all channels share, and one of their own
        axes = np.eye(channels)
        axes[0] = 1 / np.sqrt(channels)
        deviations = np.array([1.0] + [0.25] * (channels - 1))
    colourful = recipe.saturation * np.exp(rng.normal(0, 0.5, (count, channels)))
    colourful[:, 0] = 1
    out: NDArray[np.float64] = np.einsum("ck,nc->nkc", axes, deviations * colourful)
    return out


def _coloured_noise(
    rng: np.random.Generator, count: int, height: int, width: int, channels: int, exponent: float
) -> Pictures:
    """Gaussian noise whose amplitude spectrum is 1/f to a power that varies from picture to picture."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    frequency = np.sqrt(fy**2 + fx**2)
    frequency[0, 0] = 1
    powers = exponent + rng.normal(0, 0.2, (count, 1, 1, 1))
    spectrum = np.fft.rfft2(rng.standard_normal((count, channels, height, width), dtype=np.float32))
    spectrum *= np.exp(-powers * np.log(frequency))
    spectrum[..., 0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(height, width)).astype(np.float32)
    out: Pictures = field / np.maximum(field.std(axis=(2, 3), keepdims=True), np.float32(1e-6))
    return out


def _grid(height: int, width: int) -> tuple[Pictures, Pictures]:
    """Coordinates in pixels."""
    y, x = np.meshgrid(np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32), indexing="ij")
    return y, x


def _leaves(rng: np.random.Generator, noise: Pictures, texture: float) -> Pictures:
    """Ellipses and rectangles thrown on one another, back to front, with soft edges; `noise` is the texture."""
    count, channels, height, width = (int(size) for size in noise.shape)
    side = float(max(height, width))
    y, x = _grid(height, width)
    out = np.zeros_like(noise) + rng.normal(0, 1, (count, channels, 1, 1)).astype(np.float32)
    rough = np.full((count, 1, height, width), np.float32(texture))
    small, large = 0.04, 0.5
    for k in range(_LEAVES):
        u = rng.random(count)
        # radii with density r^-3 between the bounds; large leaves lie at the back, so that all sizes are seen
        radius = side / np.sqrt(u / small**2 + (1 - u) / large**2) * (1.5 - k / _LEAVES)
        aspect = np.exp(rng.normal(0, 0.4, count))
        angle = rng.uniform(0, np.pi, count)
        c, s = np.cos(angle), np.sin(angle)
        cy, cx = rng.uniform(0, height, count), rng.uniform(0, width, count)
        dy, dx = y - _col(cy), x - _col(cx)
        a = np.abs(_col(c) * dx + _col(s) * dy) * _col(1 / (radius * aspect))
        b = np.abs(_col(c) * dy - _col(s) * dx) * _col(aspect / radius)
        box = (rng.random(count) < 0.4)[:, None, None]
        distance = np.where(box, np.maximum(a, b), np.sqrt(a * a + b * b))
        alpha = np.clip((1 - distance) * _col(radius) + np.float32(0.5), 0, 1)[:, None]
        colour = rng.normal(0, 1, (count, channels, 1, 1)).astype(np.float32)
        out += alpha * (colour - out)
        amount = (texture * np.abs(rng.normal(0, 1, (count, 1, 1, 1)))).astype(np.float32)
        rough += alpha * (amount - rough)
    return out + rough * noise


def _col(values: NDArray[np.float64]) -> Pictures:
    return values.astype(np.float32)[:, None, None]


def _gradients(rng: np.random.Generator, shape: tuple[int, ...]) -> Pictures:
    """Slow waves in random directions, as skies and shaded walls are."""
    count, channels, height, width = shape
    y, x = _grid(height, width)
    out = np.zeros((count, channels, height, width), np.float32)
    for _ in range(2):
        fy, fx = (rng.uniform(-1, 1, (count, 1, 1, 1)).astype(np.float32) for _ in range(2))
        phase = rng.uniform(0, 2 * np.pi, (count, 1, 1, 1)).astype(np.float32)
        wave = np.cos(np.float32(np.pi) * (fy * y / np.float32(height) + fx * x / np.float32(width)) + phase)
        out += rng.normal(0, 1, (count, channels, 1, 1)).astype(np.float32) * wave
    return out


def _gratings(rng: np.random.Generator, shape: tuple[int, ...]) -> Pictures:
    """Stripes and plaids of any scale, sharp or smooth, stronger in one part of the picture."""
    count, channels, height, width = shape
    y, x = _grid(height, width)
    out = np.zeros((count, channels, height, width), np.float32)
    for _ in range(2):
        period = np.exp(rng.uniform(np.log(2.5), np.log(max(height, width, 4)), count))
        angle = rng.uniform(0, np.pi, count)
        along = _col(np.cos(angle) / period) * x + _col(np.sin(angle) / period) * y
        wave = np.sin(np.float32(2 * np.pi) * along + _col(rng.uniform(0, 2 * np.pi, count)))
        sharp = rng.uniform(0.5, 6, count)
        wave = np.tanh(_col(sharp) * wave)
        cy, cx = rng.uniform(0, height, count), rng.uniform(0, width, count)
        reach = rng.uniform(0.3, 1.5, count) * max(height, width)
        envelope = np.exp(-(((y - _col(cy)) / _col(reach)) ** 2 + ((x - _col(cx)) / _col(reach)) ** 2))
        out += rng.normal(0, 1, (count, channels, 1, 1)).astype(np.float32) * (wave * envelope)[:, None]
    return out
