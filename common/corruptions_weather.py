"""Weather for common.corruptions: snow, frost, fog and spatter, and the pixel moves they share with the blurs.

Functions take images x float32 [N, C, H, W] in 0..1, one generator an image and the parameters of a severity; they
return float images that are not clipped yet.  Every row depends on its own image and generator alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.random import PCG64, Generator
from scipy import ndimage

__all__ = ["clipped_zoom", "each", "fog", "frost", "gather", "motion_blur", "plasma", "snow", "spatter", "zoom_matrix"]

Generators = list[Generator]


def each(generators: Generators, draw: Callable[[Generator], np.ndarray]) -> np.ndarray:
    """One draw an image, stacked: [N, ...]."""
    return np.stack([draw(g) for g in generators])


def gather(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Pixels (rows, columns), each broadcasting to [N, H, W], of images x [N, C, H, W], the same in every channel."""
    n, channels = x.shape[:2]
    return x[np.arange(n)[:, None, None, None], np.arange(channels)[:, None, None], rows[:, None], columns[:, None]]


def motion_blur(x: np.ndarray, theta: np.ndarray, radius: float, sigma: float) -> np.ndarray:
    """Half a Gaussian along the angle theta [N] (radians) as in ImageMagick: 8 bit in, 8 bit out, borders repeated.

    out(x, y) = sum_i k_i in(x + dx_i, y + dy_i), k_i ~ exp(-i^2 / (2 sigma^2)), i = 0..2 ceil(radius).
    """
    taps = np.arange(2 * int(np.ceil(radius)) + 1)
    kernel = np.exp(-(taps**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).astype(np.float32)
    step_x = np.ceil(np.cos(theta)[:, None] * taps - 0.5).astype(int)  # [N, taps]
    step_y = np.ceil(np.sin(theta)[:, None] * taps - 0.5).astype(int)
    height, width = x.shape[2:]
    out = np.zeros_like(x)
    for i in taps[kernel > 1e-5]:  # the rest is far below one grey level
        rows = (np.arange(height) + step_y[:, i, None]).clip(0, height - 1)
        columns = (np.arange(width) + step_x[:, i, None]).clip(0, width - 1)
        out += kernel[i] * gather(x, rows[:, :, None], columns[:, None, :])
    return np.rint(out * 255) / 255


@lru_cache(maxsize=256)
def zoom_matrix(size: int, factor: float) -> np.ndarray:
    """[size, size]: the central ceil(size / factor) pixels, stretched linearly from end to end, the middle kept."""
    crop = int(np.ceil(size / factor))
    stretched = round(crop * factor)
    first = (stretched - size) // 2
    place = np.arange(first, first + size) * (crop - 1) / (stretched - 1) + (size - crop) // 2
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(size))).astype(np.float32)


def clipped_zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """Zoom into the middle of images [..., H, W] by `factor`, keeping their size."""
    height, width = x.shape[-2:]
    return zoom_matrix(height, factor) @ x @ zoom_matrix(width, factor).T


def _colour(rgb: tuple[float, ...], channels: int) -> np.ndarray:
    """A colour 0..255 as [C, 1, 1] in 0..1; its grey value where images have one channel."""
    colour = np.array(rgb, np.float32)[:, None, None] / 255
    return colour if channels == 3 else _grey(colour[None])[0]


def _grey(x: np.ndarray) -> np.ndarray:
    """[N, C, H, W] -> [N, 1, H, W]."""
    if x.shape[1] == 1:
        return x
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def snow(x, generators, loc, scale, zoom, threshold, radius, sigma, mix):
    """A paler image plus flakes, twice (once upside down): noise, zoomed, cut at a threshold and blurred downwards."""
    shape = (1, *x.shape[2:])
    flakes = loc + scale * each(generators, lambda g: g.standard_normal(shape, dtype=np.float32))
    theta = np.radians(each(generators, lambda g: g.uniform(-135, -45)))
    flakes = clipped_zoom(flakes, zoom)
    flakes[flakes < threshold] = 0
    flakes = np.floor(flakes.clip(0, 1) * 255) / 255
    flakes = motion_blur(flakes.astype(np.float32), theta, radius, sigma)
    pale = np.maximum(x, 1.5 * _grey(x) + 0.5)
    return mix * x + (1 - mix) * pale + flakes + flakes[:, :, ::-1, ::-1]


# Mean colour (R, G, B) and spread within a 32 px crop of the five photographs that the released set draws from.
FROST = (
    ((78, 149, 166), 40), ((201, 205, 215), 15), ((201, 205, 215), 15), ((138, 153, 165), 19), ((112, 123, 135), 28),
)  # fmt: skip


@lru_cache(maxsize=8)
def _frost_textures(side: int) -> np.ndarray:
    """Stand-ins for those photographs, float32 [5, 3, side, side] in 0..1: crystal needles on slow blotches."""
    textures = []
    for number, (colour, spread) in enumerate(FROST):
        g = Generator(PCG64(number))
        theta = g.uniform(0, 2 * np.pi, 12)
        needles = motion_blur(g.random((12, 1, side, side), dtype=np.float32) ** 4, theta, 6, 3).max((0, 1))
        blotches = plasma([g], side, 2.0)[0]
        pattern = needles / needles.std() + blotches / blotches.std()
        crops = pattern.reshape(side // 32, 32, side // 32, 32).std((1, 3))
        pattern = (pattern - pattern.mean()) * spread / crops.mean()
        textures.append((np.array(colour)[:, None, None] + pattern).clip(0, 255) / 255)
    return np.stack(textures).astype(np.float32)


def frost(x, generators, keep, share):
    """A weighted sum of the image and a random crop of one of five textures; the textures are made here."""
    height, width = x.shape[2:]
    side = max(128, 2 * _power_of_two(max(height, width)))
    textures = _frost_textures(side)
    if x.shape[1] == 1:
        textures = _grey(textures)
    ice = np.empty_like(x)
    for i, g in enumerate(generators):
        number, top, left = g.integers((len(textures), side - height, side - width))
        ice[i] = textures[number, :, top : top + height, left : left + width]
    return keep * x + share * ice


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def plasma(generators: Generators, side: int, decay: float) -> np.ndarray:
    """Diamond-square noise in 0..1, float64 [N, side, side], side a power of two; opposite borders meet."""
    field = np.zeros((len(generators), side, side))
    step, amplitude = side, 100.0
    while step >= 2:
        half, cells = step // 2, side // step
        # The amplitude enters squared: it scales a draw that lies within plus and minus itself.
        noise = amplitude**2 * each(generators, lambda g, k=cells: g.uniform(-1, 1, (3, k, k)))
        corners = field[:, ::step, ::step]  # [N, cells, cells], as are the new points below
        right, below = np.roll(corners, -1, 2), np.roll(corners, -1, 1)
        centres = (corners + right + below + np.roll(right, -1, 1)) / 4 + noise[:, 0]
        field[:, half::step, half::step] = centres
        field[:, ::step, half::step] = (corners + right + centres + np.roll(centres, 1, 1)) / 4 + noise[:, 1]
        field[:, half::step, ::step] = (corners + below + centres + np.roll(centres, 1, 2)) / 4 + noise[:, 2]
        step, amplitude = half, amplitude / decay
    field -= field.min((1, 2), keepdims=True)
    return field / field.max((1, 2), keepdims=True)


def fog(x, generators, amount, decay):
    """Plasma added, and the sum scaled back by max / (max + amount), max that of the clean image."""
    height, width = x.shape[2:]
    haze = plasma(generators, _power_of_two(max(height, width)), decay)[:, None, :height, :width].astype(np.float32)
    brightest = x.max((1, 2, 3), keepdims=True)
    return (x + amount * haze) * brightest / (brightest + amount)


def spatter(x, generators, loc, scale, sigma, threshold, mix, mud):
    """Splashes of water (pale turquoise light, bent at their rims) or of mud (brown, opaque)."""
    shape, channels = x.shape[2:], x.shape[1]
    layer = loc + scale * each(generators, lambda g: g.standard_normal(shape, dtype=np.float32))  # [N, H, W]
    layer = ndimage.gaussian_filter(layer, sigma, axes=(1, 2), mode="nearest")
    layer[layer < threshold] = 0
    if mud:
        cover = ndimage.gaussian_filter((layer > threshold).astype(np.float32), mix, axes=(1, 2), mode="nearest")
        cover = np.where(cover < 0.8, 0, cover)[:, None]
        return x * (1 - cover) + _colour((63, 42, 20), channels) * cover
    water = _water(np.floor(layer.clip(0, 1) * 255))[:, None]
    return x + mix * water * _colour((175, 238, 238), channels)


def _water(layer: np.ndarray) -> np.ndarray:
    """Light on drops, 0..1: whole grey values float32 [N, H, W] -> float32 [N, H, W].

    In the steps of the released set, 8 bit each: distance to the drops' rims, equalised, filtered for light from one
    corner, times the layer.  The distance here is exact, where the original's is that of a 5 x 5 mask.
    """
    # One transform for all images: neighbours lie 1000 px away, beyond the cut at 20 px; the last one is all rim, so
    # that a set without any rim has a distance too.
    free = np.concatenate([~_rims(layer), np.zeros((1, *layer.shape[1:]), bool)])
    distance = ndimage.distance_transform_edt(free, sampling=(1000, 1, 1))[:-1]
    distance = np.floor(_filter(np.minimum(distance, 20), np.ones((3, 3))) / 9)
    light = _filter(_equalise(distance.astype(int)), np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])).clip(0, 255)
    light = layer * np.rint(_filter(light, np.ones((3, 3))) / 9)
    brightest = light.max((1, 2), keepdims=True)
    return (light / np.where(brightest > 0, brightest, 1)).astype(np.float32)


def _filter(layers: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return ndimage.correlate(layers.astype(np.float64), kernel[None].astype(np.float64), mode="mirror")


def _equalise(layers: np.ndarray) -> np.ndarray:
    """Histogram equalisation of int [N, H, W] to 0..255; the least value goes to 0, an image of one value stays."""
    values = np.arange(layers.max() + 1)
    below = (layers[..., None] <= values).sum((1, 2))  # [N, values], cumulative counts
    total, least = below[:, -1:], np.take_along_axis(below, layers.min((1, 2))[:, None], 1)
    scale = np.float32(255) / np.maximum(total - least, 1).astype(np.float32)
    spread = np.rint((below - least).clip(0).astype(np.float32) * scale)
    table = np.where(total > least, spread, values).astype(int)
    return table[np.arange(len(layers))[:, None, None], layers]


def _rims(layer: np.ndarray, low: float = 50, high: float = 150) -> np.ndarray:
    """Canny edges without smoothing, bool [N, H, W]: ridges of |gx| + |gy| above `low` that touch one above `high`."""
    gx = ndimage.correlate(layer, np.array([[[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]], layer.dtype), mode="nearest")
    gy = ndimage.correlate(layer, np.array([[[-1, -2, -1], [0, 0, 0], [1, 2, 1]]], layer.dtype), mode="nearest")
    strength = np.abs(gx) + np.abs(gy)
    height, width = layer.shape[1:]
    around = np.pad(strength, ((0, 0), (1, 1), (1, 1)))

    def moved(down: int, right: int) -> np.ndarray:
        return around[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    across = np.abs(gy) < np.tan(np.pi / 8) * np.abs(gx)  # the gradient lies within 22.5 degrees of the x axis
    along = np.abs(gy) > np.tan(3 * np.pi / 8) * np.abs(gx)  # or of the y axis, or else of a diagonal
    ridge = np.select(
        [across, along, gx * gy < 0],
        [
            (strength > moved(0, -1)) & (strength >= moved(0, 1)),
            (strength > moved(-1, 0)) & (strength >= moved(1, 0)),
            (strength > moved(-1, 1)) & (strength > moved(1, -1)),
        ],
        (strength > moved(-1, -1)) & (strength > moved(1, 1)),
    )
    ridge &= strength > low
    neighbours = np.zeros((3, 3, 3), bool)
    neighbours[1] = True  # within an image, diagonals too
    return ndimage.binary_propagation(ridge & (strength > high), structure=neighbours, mask=ridge)
