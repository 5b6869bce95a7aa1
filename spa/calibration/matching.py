"""Made-up images that a model's batch normalisation takes for its training data, found without gradients.

DeepInversion [Yin et al., CVPR 2020] descends on the distance to the stored statistics; a runtime gives no gradients.
Here a random search fits what pictures look like on the whole (normalisation, contrast, spectrum, colours), then
kernel herding [Chen, Welling, Smola, UAI 2010] with swaps picks the pictures whose pooled statistics come closest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.calibration.data import Array, Calibration, assemble, is_float
from spa.calibration.noise import SAMPLES, Maker, rounded
from spa.calibration.statistics import Norm, Taps, deviation, norms, tapped
from spa.calibration.synthetic import Recipe, pictures
from spa.errors import RuntimeFailure, UsageError
from spa.signature import InputSpec, inputs_of

__all__ = ["choose", "load_matched", "matchable"]

POOL = 4
"""Pictures made for each one that is chosen."""
_LEAST = 128
_CHUNK = 64
_VARIETY = 1.5  # how much wider than the search the pool is: the more it offers, the closer a choice can come
# how inputs are usually normalised: what pixels of 0..1 are less, and divided by
_USUAL = (
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    ((0.41, 0.46, 0.48), (1 / 255, 1 / 255, 1 / 255)),
    ((0.5, 0.5, 0.5), (1 / 255, 1 / 255, 1 / 255)),
)
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class _Effort:
    """How long to search."""

    rounds: int
    points: int
    elite: int
    trial: int
    """Pictures that a point is judged by."""


_USUAL_EFFORT, _LARGE_EFFORT = _Effort(6, 12, 4, 32), _Effort(5, 10, 3, 10)
_LARGE = 128 * 128  # pixels: more of them say more about what pictures look like, and cost more


def matchable(model: ir.Model) -> bool:
    """Whether there are an image input and batch normalisation with statistics behind it."""
    return _image_input(model) is not None and bool(norms(model))


def _image_input(model: ir.Model) -> InputSpec | None:
    """The only floating-point input with 4 axes, if it has few channels."""
    images = [s for s in inputs_of(model) if is_float(s.dtype) and s.shape is not None and len(s.shape) == 4]
    if len(images) != 1:
        return None
    shape = images[0].shape or ()
    few = [size for size in (shape[1], shape[3]) if not isinstance(size, int) or size <= 4]
    return images[0] if few else None


def load_matched(model: ir.Model, *, samples: int | None, seed: int, dims: Mapping[str, int] | None) -> Calibration:
    """Images whose statistics at all BatchNormalization nodes come close to the stored ones.

    `note` tells how far N(0, 1) noise and the images are from them (`deviation`).

    Raises:
        UsageError: the model has no image input or no batch normalisation.
        RuntimeFailure: it does not run on made-up inputs.
    """
    spec, found = _image_input(model), norms(model)
    if not found:
        raise UsageError("`bn` needs BatchNormalization nodes with statistics, but this model has none: use `noise`.")
    if spec is None:
        raise UsageError(
            "`bn` needs one image input (4 axes, at most 4 channels), but this model has none: use `noise`."
        )
    maker = Maker(model, seed, dims)
    count = rounded(SAMPLES if samples is None else samples, maker.fixed)
    with tapped(model, found, maker.fixed) as taps:
        studio = _Studio.of(maker, spec, taps, seed)
        noise_count = rounded(min(count, 256), maker.fixed)
        noise = deviation(found, *_pooled(taps, maker.feeds(noise_count), studio.size))
        studio = studio.searched()
        total = rounded(max(POOL * count, _LEAST), maker.fixed)
        chosen = choose(studio.gram(total), count)
        images = studio.images(chosen)
        feeds = {name: images if name == spec.name else array for name, array in maker.feeds(count).items()}
        reached = deviation(found, *_pooled(taps, feeds, studio.size))
    if not np.isfinite(reached):
        raise RuntimeFailure(
            "`bn` fails as the model's activations overflow on made-up images: use `noise`, or give data."
        )
    note = (
        f"distance to the stored statistics of {len(found)} BatchNormalization nodes: {reached:.3g} "
        f"(N(0, 1) noise: {noise:.3g}); {count} of {total} made-up images, no data was used"
    )
    return assemble("bn-matched", "bn", [feeds], None, maker.fixed, note)


def _pooled(taps: Taps, feeds: Mapping[str, Array], size: int) -> tuple[list[Array], list[Array]]:
    moments = taps.moments(feeds, size)
    return [mean.mean(axis=0, dtype=np.float64) for mean, _ in moments], [
        power.mean(axis=0, dtype=np.float64) for _, power in moments
    ]


# ---- making and judging pictures --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Studio:
    """Makes inputs for one model, and looks at them through its norms."""

    maker: Maker
    spec: InputSpec
    taps: Taps
    seed: int
    channels: int
    height: int
    width: int
    last: bool
    """Channels are the last axis."""
    size: int
    """Samples run at a time."""
    point: Vector
    """What pictures look like, see `_read`."""

    @staticmethod
    def of(maker: Maker, spec: InputSpec, taps: Taps, seed: int) -> _Studio:
        shape = maker.feeds(maker.fixed or 1)[spec.name].shape
        last = shape[3] <= 4 and (shape[1] > 4 or (shape[3] in (1, 3) and shape[1] not in (1, 3)))
        channels, height, width = (shape[3], shape[1], shape[2]) if last else shape[1:]
        size = int(np.clip((1 << 16) // max(height * width, 1), 1, 64))
        return _Studio(maker, spec, taps, seed, channels, height, width, last, size, np.zeros(2 * channels + 9))

    def render(self, rng: np.random.Generator, count: int, point: Vector) -> Array:
        """Inputs of the model: pictures, normalised."""
        recipe, mean, std = _read(point, self.channels)
        made: Array = pictures(rng, count, self.height, self.width, self.channels, recipe)
        made = (made - mean[:, None, None].astype(np.float32)) / std[:, None, None].astype(np.float32)
        made = made.transpose(0, 2, 3, 1) if self.last else made
        return np.ascontiguousarray(made).astype(self.spec.dtype)

    @property
    def effort(self) -> _Effort:
        return _LARGE_EFFORT if self.height * self.width > _LARGE else _USUAL_EFFORT

    def feeds(self, images: Array) -> dict[str, Array]:
        if len(self.maker.specs) == 1:
            return {self.spec.name: images}
        return {**self.maker.feeds(len(images)), self.spec.name: images}

    def judged(self, point: Vector, salt: int) -> float:
        """How far pictures like this are from the stored statistics; the same `salt` gives the same chances."""
        count = rounded(self.effort.trial, self.maker.fixed)
        images = self.render(np.random.default_rng([self.seed & 0xFFFFFFFF, 1, salt]), count, point)
        if not np.isfinite(images.astype(np.float32)).all():
            return float("inf")
        value = deviation(self.taps.norms, *_pooled(self.taps, self.feeds(images), self.size))
        return value if np.isfinite(value) else float("inf")

    def searched(self) -> _Studio:
        """With the best point that the cross-entropy method finds, from the best of the usual normalisations."""
        rng = np.random.default_rng([self.seed & 0xFFFFFFFF, 2])
        starts = [_start(self.channels, mean, std) for mean, std in _USUAL]
        best = min(starts, key=lambda point: self.judged(point, 0))
        center, width = best, _widths(self.channels)
        for k in range(1, self.effort.rounds + 1):
            points = [
                center,
                *(center + width * rng.standard_normal(len(center)) for _ in range(self.effort.points - 1)),
            ]
            order = np.argsort([self.judged(point, k) for point in points], kind="stable")
            elite = np.array([points[i] for i in order[: self.effort.elite]])
            center = 0.3 * center + 0.7 * elite.mean(axis=0)
            width = 0.5 * width + 0.5 * elite.std(axis=0)
        return replace(self, point=min((best, center), key=lambda point: self.judged(point, 0)))

    def chunk(self, k: int, count: int) -> Array:
        """Pictures of the pool: always the same for the same `k`. Their looks vary; their normalisation does not."""
        rng = np.random.default_rng([self.seed & 0xFFFFFFFF, 3, k])
        change = _VARIETY * _widths(self.channels) * rng.standard_normal(len(self.point))
        change[: 2 * self.channels] = 0
        return self.render(rng, count, self.point + change)

    def gram(self, total: int) -> NDArray[np.float64]:
        """Inner products of what each picture of the pool adds to the distance, `[total, total]`.

        Near the stored statistics the distance is quadratic in the pooled moments: with `u = (m_i - mu) / sigma` and
        `v = (E_i[(x - mu)^2] / sigma^2 - 1) / 2` of each picture i it is the squared length of their means.
        """
        step = rounded(_CHUNK, self.maker.fixed)
        rows: list[NDArray[np.float32]] = []
        for k, start in enumerate(range(0, total, step)):
            images = self.chunk(k, step)[: total - start]
            rows.append(_features(self.taps.norms, self.taps.moments(self.feeds(images), self.size)))
        features = np.concatenate(rows)
        return (features @ features.T).astype(np.float64)

    def images(self, chosen: NDArray[np.int64]) -> Array:
        """Those pictures of the pool, made again rather than kept."""
        step = rounded(_CHUNK, self.maker.fixed)
        parts = [self.chunk(int(k), step)[chosen[chosen // step == k] % step] for k in np.unique(chosen // step)]
        return np.concatenate(parts)


def _features(found: Sequence[Norm], moments: Sequence[tuple[Array, Array]]) -> NDArray[np.float32]:
    """Row i is what picture i adds: see `_Studio.gram`."""
    parts = []
    for norm, (mean, power) in zip(found, moments, strict=True):
        mean, power = mean.astype(np.float64), power.astype(np.float64)
        u = (mean - norm.mean) / norm.scale
        v = (power - 2 * norm.mean * mean + norm.mean**2 - norm.std**2) / (2 * norm.scale**2)
        parts += [part / np.sqrt(part.shape[1]) for part in (u, v)]
    # a picture on which the model overflows is merely never chosen
    out: NDArray[np.float32] = np.nan_to_num(np.concatenate(parts, axis=1), nan=1e6, posinf=1e6, neginf=-1e6).astype(
        np.float32
    )
    return out


def _start(channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Vector:
    take = [k % 3 if channels >= 3 else 1 for k in range(channels)]
    return np.array([mean[k] for k in take] + [np.log(std[k]) for k in take] + [0.0] * 9)


def _widths(channels: int) -> Vector:
    """How far the search looks around at first."""
    return np.array([0.08] * channels + [0.15] * channels + [0.25, 0.3, 0.3, 0.4, 0.4] + [0.7] * 4)


def _read(point: Vector, channels: int) -> tuple[Recipe, Vector, Vector]:
    """A point of the search: the means and the logarithms of the deviations pictures are normalised with, and the rest
    relative to `Recipe`."""
    mean, std, rest = point[:channels], np.exp(point[channels : 2 * channels]), point[2 * channels :]
    usual = Recipe()
    grow = np.exp(np.clip(rest, -3, 3))
    recipe = Recipe(
        exponent=float(np.clip(usual.exponent + rest[0], 0.3, 2.5)),
        contrast=float(usual.contrast * grow[1]),
        shift=float(usual.shift * grow[2]),
        saturation=float(usual.saturation * grow[3]),
        texture=float(usual.texture * grow[4]),
        mixture=tuple(float(share * g) for share, g in zip(usual.mixture, grow[5:9], strict=True)),  # type: ignore[arg-type]  # four, as before
    )
    return recipe, mean, std


# ---- choosing ---------------------------------------------------------------------------------------------------


def choose(gram: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The `count` rows whose mean is shortest, nearly: greedy herding, then the best swaps; sorted, all different.

    Args:
        gram: inner products of the rows `[n, n]`.
        count: at most n.
    """
    own = np.diag(gram)
    inside = np.zeros(len(gram), dtype=np.bool_)
    towards = np.zeros(len(gram))  # inner product of each row with the sum of those chosen
    for _ in range(count):
        k = int(np.argmin(np.where(inside, np.inf, 2 * towards + own)))
        inside[k] = True
        towards += gram[k]
    for _ in range(2 * count):
        out, into = np.flatnonzero(inside), np.flatnonzero(~inside)
        if not len(into):
            break
        change = (own - 2 * towards)[out][:, None] + (own + 2 * towards)[into][None, :] - 2 * gram[np.ix_(out, into)]
        i, j = np.unravel_index(int(np.argmin(change)), change.shape)
        if change[i, j] >= -1e-9 * float(own.max()):
            break
        leaving, coming = out[i], into[j]
        inside[leaving], inside[coming] = False, True
        towards += gram[coming] - gram[leaving]
    return np.flatnonzero(inside)
