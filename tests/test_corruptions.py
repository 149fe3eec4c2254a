"""Corruptions against closed forms, plain loops, PIL and colorsys; their draws; CIFAR-10-C's own files."""

import colorsys
import io
import os
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import PCG64, Generator
from PIL import Image
from scipy import ndimage

from common import corruptions, corruptions_weather
from common.augment import rng
from common.corruptions import CORRUPTIONS, EXTRA, PROCEDURAL, STANDARD, corrupt

DETERMINISTIC = (
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate",
)  # fmt: skip
# Levels that the published parameters do not order by distance to the clean image: elastic trades a large affine map
# for a rough one, spatter turns from water to mud, saturate from pale to vivid, frost's image share falls; in glass and
# motion blur a wider step or a second pass may cost less than the sharper Gaussian before.
UNORDERED = ("elastic_transform", "frost", "glass_blur", "motion_blur", "saturate", "spatter")


def smooth(n=40, channels=3, size=(32, 32), seed=0):
    """Smooth colour images over the whole range, uint8 [n, C, H, W]."""
    x = np.random.Generator(PCG64(seed)).standard_normal((n, channels, *size))
    x = ndimage.gaussian_filter(x, 2.5, axes=(2, 3), mode="wrap")
    low, high = x.min((1, 2, 3), keepdims=True), x.max((1, 2, 3), keepdims=True)
    return torch.from_numpy(((x - low) / (high - low) * 255).round().astype(np.uint8))


def flat(value, n=40, channels=3):
    return torch.full((n, channels, 32, 32), value, dtype=torch.uint8)


def generators(n):
    return [Generator(PCG64(i)) for i in range(n)]


def as_float(images):
    return images.numpy().astype(np.float32) / 255


def function(name):
    return corruptions._TABLE[name][0]


def parameters(name, severity):
    return corruptions._TABLE[name][1][severity - 1]


# Names, draws and inputs


def test_the_names_are_the_published_nineteen():
    assert (len(STANDARD), len(EXTRA), CORRUPTIONS) == (15, 4, STANDARD + EXTRA)
    assert tuple(corruptions._TABLE) == CORRUPTIONS and set(PROCEDURAL) < set(STANDARD)
    assert all(len(levels) == 5 for _, levels in corruptions._TABLE.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_rows_depend_on_seed_and_number_alone(name, monkeypatch):
    images = smooth(20)
    before, states = images.clone(), (random.getstate(), str(np.random.get_state()), torch.get_rng_state())
    for severity in range(1, 6):
        whole = corrupt(images, name, severity, seed=3)
        assert whole.dtype == torch.uint8 and whole.shape == images.shape and not torch.equal(whole, images)
        assert torch.equal(whole, corrupt(images, name, severity, seed=3))
        rows = torch.tensor([17, 3, 8])
        assert torch.equal(whole[rows], corrupt(images[rows], name, severity, seed=3, indices=rows))
        assert torch.equal(whole[17:18], corrupt(images[17:18], name, severity, seed=3, indices=[17]))
    monkeypatch.setattr(corruptions, "BLOCK", 7)
    assert torch.equal(whole, corrupt(images, name, 5, seed=3))
    other_seed, other_numbers = corrupt(images, name, 5, seed=4), corrupt(images, name, 5, seed=3, indices=range(1, 21))
    for other in (other_seed, other_numbers):
        assert torch.equal(whole, other) == (name in DETERMINISTIC)
    assert torch.equal(images, before)
    assert states[:2] == (random.getstate(), str(np.random.get_state()))
    assert torch.equal(states[2], torch.get_rng_state())


def test_draws_differ_between_names_severities_and_images():
    grey = flat(128, 2)
    noise = {
        (name, severity): corrupt(grey, name, severity).double() - 128
        for name, severity in (("gaussian_noise", 4), ("gaussian_noise", 5), ("speckle_noise", 5))
    }
    drawn = [n[i].flatten() for n in noise.values() for i in (0, 1)]
    assert torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0).abs().max() < 0.1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_other_sizes_and_one_channel(name):
    for images in (smooth(3, 1), smooth(3, 3, (64, 64)), smooth(3, 3, (32, 48)), smooth(3, 1, (9, 8)), smooth(0)):
        for severity in (3, 5):
            made = corrupt(images, name, severity)
            assert made.shape == images.shape and made.dtype == torch.uint8
            unchanged = (name == "saturate" and images.shape[1] == 1) or len(images) == 0
            assert unchanged == torch.equal(made, images)


@pytest.mark.parametrize("name", ["brightness", "contrast", "defocus_blur", "zoom_blur", "pixelate", "motion_blur"])
def test_one_channel_is_the_grey_image(name):
    one = smooth(3, 1)
    assert torch.equal(corrupt(one, name, 4).expand(-1, 3, -1, -1), corrupt(one.repeat(1, 3, 1, 1), name, 4))


@pytest.mark.parametrize("name", ["snow", "frost", "spatter"])
def test_colours_become_grey_with_one_channel(name):
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    one = flat(60, 5, 1)
    colour = corrupt(one.repeat(1, 3, 1, 1), name, 2)
    grey = (colour * weights).sum(1, keepdim=True)
    assert (corrupt(one, name, 2) - grey).abs().max() < 2


def test_bad_inputs_name_what_is_allowed():
    images = flat(1, 2)
    with pytest.raises(ValueError, match=r"'gauss' is unknown; allowed: gaussian_noise, shot_noise.*saturate"):
        corrupt(images, "gauss", 1)
    for severity in (0, 6, 2.0, "3"):
        with pytest.raises(ValueError, match=f"severity={severity!r}; allowed: 1, 2, 3, 4, 5"):
            corrupt(images, "fog", severity)
    for bad in (images.float(), images[0], images[:, :2]):
        with pytest.raises(ValueError, match=r"allowed: uint8 \[N, 1 or 3, H, W\]"):
            corrupt(bad, "fog", 1)
    with pytest.raises(ValueError, match="images of 7 x 32 px; allowed: 8 px"):
        corrupt(images[:, :, :7], "fog", 1)
    for extra in ({"indices": [1]}, {"indices": [0, -1]}, {"seed": -1}):
        with pytest.raises(ValueError, match="allowed one each, none negative"):
            corrupt(images, "fog", 1, **extra)


# Strength


def check_order(images):
    for name in CORRUPTIONS:
        away = [(corrupt(images, name, s).float() - images.float()).abs().mean().item() for s in range(1, 6)]
        assert min(away) > 0.2, name
        if name not in UNORDERED:
            assert all(a < b for a, b in pairwise(away)), (name, away)
        elif name != "elastic_transform":
            assert away[4] > away[0], (name, away)


def test_higher_severity_is_further_from_the_clean_image():
    check_order(smooth(60))


def test_higher_severity_is_further_from_real_images():
    folder = Path(os.environ.get("DD_DATA") or "nowhere").expanduser() / "cifar10" / "test"
    if not folder.is_dir():
        pytest.skip("real images: set DD_DATA to a folder that holds cifar10")
    files = [file for label in sorted(folder.iterdir()) for file in sorted(label.iterdir())[:10]]
    images = torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))
    check_order(images.permute(0, 3, 1, 2).contiguous())


@pytest.mark.parametrize("value", [0, 77, 128, 255])
def test_a_constant_image_stays_constant(value):
    images = flat(value, 4)
    geometric = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur", "elastic_transform")
    for name in (*geometric, "pixelate", "contrast"):
        for severity in (1, 3, 5):
            assert torch.equal(corrupt(images, name, severity), images), (name, severity)


# Noise


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_noise_has_its_mean_and_spread(severity):
    x = 128 / 255
    spreads = {
        "gaussian_noise": parameters("gaussian_noise", severity)[0],
        "speckle_noise": parameters("speckle_noise", severity)[0] * x,
        "shot_noise": (x / parameters("shot_noise", severity)[0]) ** 0.5,  # Poisson(c x) / c
    }
    for name, spread in spreads.items():
        noisy = corrupt(flat(128), name, severity).double() / 255
        assert noisy.mean() == pytest.approx(x - 0.5 / 255, abs=1e-3)  # truncation costs half a level
        assert noisy.std() == pytest.approx((spread**2 + 1 / 255**2 / 12) ** 0.5, rel=0.015)


def test_shot_noise_counts_photons_of_each_pixel():
    images = flat(0, 30)
    images[:, 1] = 51
    noisy = corrupt(images, "shot_noise", 5)
    assert noisy[:, 0].eq(0).all() and noisy[:, 2].eq(0).all()
    counts = torch.arange(51) * 255.0 / 50
    assert set(noisy[:, 1].unique().tolist()) <= set((counts + 1e-3).int().tolist())  # c = 50: multiples of 1/50


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_impulses_are_a_share_of_all_values_half_of_them_white(severity):
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    made = corrupt(flat(128, 100), "impulse_noise", severity)
    hit = made != 128
    assert set(made[hit].tolist()) == {0, 255}
    assert hit.double().mean() == pytest.approx(amount, rel=0.05)
    assert (made[hit] == 255).double().mean() == pytest.approx(0.5, abs=0.03)
    both = (hit[:, 0] & hit[:, 1]).double().mean()
    assert both == pytest.approx(amount**2, rel=0.5)  # each colour alone


# Colours


@pytest.mark.parametrize("name", ["brightness", "saturate"])
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_colours_move_as_in_hsv(name, severity):
    pixels = [(0, 0, 0), (255, 255, 255), (90, 90, 90), (255, 0, 0), (10, 200, 30), (3, 250, 251), (120, 119, 121)]
    images = torch.tensor(pixels, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8).contiguous()
    made = function(name)(as_float(images), None, *parameters(name, severity)).clip(0, 1)[:, :, 0, 0]
    for pixel, got in zip(pixels, made, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(p / 255 for p in pixel))
        if name == "brightness":
            v = min(1, v + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1])
        else:
            factor, offset = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
            s = min(1, s * factor + offset)
        np.testing.assert_allclose(got, colorsys.hsv_to_rgb(h, s, v), atol=1e-6)


def test_contrast_shrinks_the_distance_to_each_colours_mean():
    images = smooth(5)
    made = corrupt(images, "contrast", 4).double()
    x = images.double()
    mean = x.mean((2, 3), keepdim=True)
    assert ((x - mean) * 0.3 + mean - 0.5 - made).abs().max() <= 0.5 + 1e-2


# Blurs and moves


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_defocus_is_the_whole_kernel_of_17_px(severity):
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    place = np.arange(-8, 9)
    disk = np.array([[float(a * a + b * b <= radius**2) for a in place] for b in place])
    weights = np.array([np.exp(-1 / (2 * alias**2)), 1, np.exp(-1 / (2 * alias**2))])
    kernel = np.zeros((17, 17))
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            kernel += np.roll(disk, (i, j), (0, 1)) * weights[i + 1] * weights[j + 1]
    kernel /= kernel.sum()
    x = as_float(smooth(1))
    padded = np.pad(x[0, 0], 8, mode="reflect")  # reflect-101
    wanted = sum(kernel[i, j] * padded[i : i + 32, j : j + 32] for i in range(17) for j in range(17))
    np.testing.assert_allclose(function("defocus_blur")(x, None, radius, alias)[0, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 2])
def test_glass_is_the_loop_that_copies_from_the_last_pixel_on(iterations):
    x = as_float(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=rng("glass")))
    made = function("glass_blur")(x, generators(2), 0.05, iterations)  # so narrow a blur changes nothing
    draws = generators(2)
    for image, g, got in zip(x, draws, made, strict=True):
        y = np.rint(image * 255)
        for _ in range(iterations):
            step = g.integers(-1, 1, (2, 32, 32))
            for h in range(31, 1, -1):
                for w in range(31, 1, -1):
                    y[:, h, w] = y[:, h + step[0, h, w], w + step[1, h, w]]
        np.testing.assert_allclose(got * 255, y, atol=1e-3)


def test_motion_blur_is_one_sided_along_its_angle():
    x = np.zeros((2, 1, 32, 32), np.float32)
    x[:, 0, 16, 16] = 1
    kernel = np.exp(-(np.arange(13) ** 2) / 2 / 4)
    kernel = np.rint(255 * kernel / kernel.sum())
    made = np.rint(255 * corruptions_weather.motion_blur(x, np.radians([0.0, -90.0]), 6, 2))[:, 0]
    np.testing.assert_array_equal(made[0, 16, 16:3:-1], kernel)  # out(x) reads in(x + i)
    np.testing.assert_array_equal(made[1, 16:29, 16], kernel)  # upwards: out(y) reads in(y - i)
    assert np.count_nonzero(made[0]) == np.count_nonzero(made[0, 16, 4:17])


def test_motion_blur_is_the_loop_over_pixels():
    x, theta, radius, sigma = as_float(smooth(1, 1)), np.radians(30.0), 8, 2
    kernel = np.exp(-(np.arange(17) ** 2) / (2 * sigma**2))
    wanted = np.zeros((32, 32))
    for i, weight in enumerate(kernel / kernel.sum()):
        right, down = int(np.ceil(i * np.cos(theta) - 0.5)), int(np.ceil(i * np.sin(theta) - 0.5))
        for h in range(32):
            for w in range(32):
                wanted[h, w] += weight * x[0, 0, min(h + down, 31), min(w + right, 31)]
    made = corruptions_weather.motion_blur(x, np.array([theta]), radius, sigma)[0, 0]
    assert np.abs(made - wanted).max() < 0.6 / 255


@pytest.mark.parametrize("size", [32, 45])
def test_zoom_is_scipys_zoom_of_the_middle(size):
    x = as_float(smooth(1, 1, (size, size)))[0, 0]
    for factor in [1 + i / 100 for i in range(26)] + [1.75, 2.25]:
        crop = int(np.ceil(size / factor))
        top = (size - crop) // 2
        zoomed = ndimage.zoom(x[top : top + crop, top : top + crop].astype(np.float64), factor, order=1)
        trim = (len(zoomed) - size) // 2
        wanted = zoomed[trim : trim + size, trim : trim + size]
        np.testing.assert_allclose(corruptions_weather.clipped_zoom(x, factor), wanted, atol=1e-5)


def test_zoom_blur_averages_the_image_and_zooms_up_to_the_published_bound():
    x = as_float(smooth(2))
    for severity, bound in enumerate((1.06, 1.11, 1.16, 1.21, 1.26), 1):
        factors = np.arange(1, bound, 0.01)
        parts = [x, *(corruptions_weather.clipped_zoom(x, f) for f in factors)]
        made = function("zoom_blur")(x, None, *parameters("zoom_blur", severity))
        np.testing.assert_allclose(made, np.mean(parts, 0), atol=1e-5)


def test_elastic_affine_moves_the_three_corners():
    rows, columns = np.mgrid[:32, :32].astype(np.float32)
    ramps = np.broadcast_to(np.stack([columns, rows, rows + columns]), (4, 3, 32, 32)) / 64
    still = function("elastic_transform")(ramps, generators(4), 0, 0, 0.0)
    np.testing.assert_allclose(still, ramps, atol=1e-6)
    corners = np.array([(26, 26), (26, 6), (6, 6)])  # (x, y)
    made = function("elastic_transform")(ramps, generators(4), 0, 0, 2.56)
    for image, g in zip(made, generators(4), strict=True):
        for (x, y), (to_x, to_y) in zip(corners, corners + g.uniform(-2.56, 2.56, (3, 2)), strict=True):
            moved = ndimage.map_coordinates(image[:2], [[0, 1], [to_y] * 2, [to_x] * 2], order=1) * 64
            np.testing.assert_allclose(moved, (x, y), atol=1e-3)  # the map is affine, so ramps stay exact


@pytest.mark.parametrize("border", ["mirror", "reflect"])
def test_samples_are_scipys_bilinear_ones(border):
    x = as_float(smooth(2, 2))
    rows, columns = np.mgrid[:32, :32][:, None] + Generator(PCG64(0)).uniform(-9, 9, (2, 2, 32, 32))  # [N, H, W] each
    made = corruptions._sample(x, rows, columns, border)
    for i in (0, 1):
        for c in (0, 1):
            wanted = ndimage.map_coordinates(x[i, c], [rows[i], columns[i]], order=1, mode=border)
            np.testing.assert_allclose(made[i, c], wanted, atol=1e-5)


def test_elastic_displacement_is_smooth_and_as_long_as_published():
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32) / 31, (60, 1, 32, 32))
    made = function("elastic_transform")(ramp, generators(60), 3.2, 0.96, 0.0)
    shift = ((made - ramp) * 31)[..., 6:-6, 6:-6]
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 0.96**2))
    weights /= weights.sum()
    wanted = 3.2 * (1 / 3) ** 0.5 * (weights**2).sum()  # spread of U(-1, 1), smoothed both ways
    assert shift.std() == pytest.approx(wanted, rel=0.03)


# Digital


def test_jpeg_is_pils():
    for images in (smooth(3), smooth(3, 1)):
        for severity, quality in enumerate((80, 65, 58, 50, 40), 1):
            for image, made in zip(images, corrupt(images, "jpeg_compression", severity), strict=True):
                file = io.BytesIO()
                array = image.permute(1, 2, 0).numpy().squeeze()
                Image.fromarray(array).save(file, "JPEG", quality=quality)
                np.testing.assert_array_equal(made.permute(1, 2, 0).numpy().squeeze(), np.asarray(Image.open(file)))


def test_pixelate_leaves_a_coarser_grid():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=rng("grid"))
    for severity, grid in enumerate((30, 28, 27, 24, 20), 1):
        made = corrupt(images, "pixelate", severity)
        assert all(image.unique(dim=d).shape[d] == grid for image in made for d in (1, 2))
        row = images[0, 0, :1].double()  # an image of equal rows: columns whose centres lie in a coarse pixel, averaged
        inside = ((torch.arange(32) + 0.5) * grid / 32).floor() == torch.arange(grid)[:, None]
        coarse = (inside * row).sum(1) / inside.sum(1)
        wanted = coarse[((torch.arange(32) + 0.5) * grid / 32).long()]
        striped = corrupt(images[:1, :1, :1].expand(-1, -1, 32, -1), "pixelate", severity)[0, 0]
        assert (striped - wanted).abs().max() <= 1
    larger = corrupt(smooth(1, 3, (64, 64)), "pixelate", 5)[0]
    assert larger.unique(dim=1).shape[1] == 41  # 64 * 0.65


# Weather


def test_plasma_is_the_loop_over_its_points():
    side, decay = 8, 2.5
    g = Generator(PCG64(0))
    field, step, amplitude = np.zeros((side, side)), side, 100.0
    while step >= 2:
        half, cells = step // 2, side // step
        noise = amplitude**2 * g.uniform(-1, 1, (3, cells, cells))
        grid = [(i, j) for i in range(cells) for j in range(cells)]

        def at(y, x, field=field):
            return field[y % side, x % side]

        for i, j in grid:
            y, x = i * step, j * step
            corners = at(y, x) + at(y + step, x) + at(y, x + step) + at(y + step, x + step)
            field[y + half, x + half] = corners / 4 + noise[0, i, j]
        for part, (down, right) in ((1, (0, half)), (2, (half, 0))):
            for i, j in grid:
                y, x = i * step + down, j * step + right
                around = at(y - half, x) + at(y + half, x) + at(y, x - half) + at(y, x + half)
                field[y, x] = around / 4 + noise[part, i, j]
        step, amplitude = half, amplitude / decay
    wanted = (field - field.min()) / (field.max() - field.min())
    made = corruptions_weather.plasma(generators(3), side, decay)
    np.testing.assert_allclose(made[0], wanted, atol=1e-9)
    assert made.min((1, 2)).tolist() == [0] * 3 and made.max((1, 2)).tolist() == [1] * 3


def test_fog_lifts_the_dark_and_keeps_the_brightest():
    assert torch.equal(corrupt(flat(0, 3), "fog", 4), flat(0, 3))  # max(x) = 0: nothing to scale by
    for severity, amount in enumerate((0.2, 0.5, 0.75, 1, 1.5), 1):
        made = corrupt(flat(200, 4), "fog", severity).double()
        x = 200 / 255
        assert made.amax((1, 2, 3)).tolist() == [200] * 4  # where the plasma is 1
        assert (made.amin((1, 2, 3)) - 255 * x * x / (x + amount)).abs().max() <= 1  # where it is 0


def test_snow_falls_twice_on_a_paler_image():
    grey = flat(100, 30)
    for severity in (1, 3, 5):
        made = corrupt(grey, "snow", severity).int()
        assert (made - made.flip(2, 3)).abs().max() <= 1  # flakes and the same flakes turned
        mix, x = (0.95, 0, 0.9, 0, 0.8)[severity - 1], 100 / 255
        pale = 255 * (mix * x + (1 - mix) * (1.5 * x + 0.5))
        assert (made.amin((1, 2, 3)).min() - pale).abs() <= 1
        assert made.double().mean() > pale + 1
    streaks = corrupt(flat(0, 60), "snow", 2).double()
    down, across = ((streaks - streaks.roll(1, dim)).abs().mean() for dim in (2, 3))
    assert down < 0.8 * across  # the wind blows downwards


def test_frost_textures_have_the_colours_and_spreads_of_the_photographs():
    textures = corruptions_weather._frost_textures(128) * 255
    for texture, (colour, spread) in zip(textures, corruptions_weather.FROST, strict=True):
        np.testing.assert_allclose(texture.mean((1, 2)), colour, atol=2)
        crops = texture.reshape(3, 4, 32, 4, 32).std((2, 4)).mean()
        assert crops == pytest.approx(spread, rel=0.15)


def test_frost_adds_a_share_of_a_texture():
    images = flat(120, 200)
    for severity, (keep, share) in enumerate(((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)), 1):
        ice = (corrupt(images, "frost", severity).double() - keep * 120) / share
        wanted = torch.tensor([colour for colour, _ in corruptions_weather.FROST]).double().mean(0)
        assert (ice.mean((0, 2, 3)) - wanted).abs().max() < 12


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_water_is_light_of_its_colour(severity):
    made = corrupt(flat(0, 30), "spatter", severity).double()
    red, green, blue = made.unbind(1)
    assert torch.equal(green, blue)
    assert (red - green * 175 / 238).abs().max() <= 1
    assert green.amax((1, 2)).sub(0.5 * 238).abs().max() <= 1  # the brightest drop of each image has the share `mix`
    assert (green < 5).double().mean() > 0.3  # most of the image stays dry


@pytest.mark.parametrize("severity", [4, 5])
def test_mud_is_opaque(severity):
    white = corrupt(flat(255, 60), "spatter", severity).double()
    muddy = white[:, 0] < 255
    assert 0.01 < muddy.double().mean() < 0.2
    cover = (255 - white) / (255 - torch.tensor([63.0, 42, 20]))[:, None, None]
    assert cover.movedim(1, 3)[muddy].min() > 0.79 and cover.max() <= 1.01


def test_rims_are_cannys():
    def loop(layer, low=50, high=150):
        around = np.pad(layer, 1, mode="edge")
        gx, gy = ndimage.sobel(around, 1)[1:-1, 1:-1], ndimage.sobel(around, 0)[1:-1, 1:-1]
        strength = np.pad(np.abs(gx) + np.abs(gy), 1)
        ridge = np.zeros(layer.shape, bool)
        for h, w in np.ndindex(*layer.shape):
            here = strength[h + 1, w + 1]
            angle = np.degrees(np.arctan2(gy[h, w], gx[h, w])) % 180
            down, right = ((0, 1), (1, 1), (1, 0), (1, -1), (0, 1))[int((angle + 22.5) // 45)]
            before, after = strength[h + 1 - down, w + 1 - right], strength[h + 1 + down, w + 1 + right]
            tie = here == after and 0 in (down, right)  # a plateau counts once
            ridge[h, w] = here > low and here > before and (here > after or tie)
        parts, _ = ndimage.label(ridge, np.ones((3, 3)))
        strong = np.unique(parts[ridge & (strength[1:-1, 1:-1] > high)])
        return np.isin(parts, strong[strong > 0])

    layers = np.rint(as_float(smooth(12, 1))[:, 0] * 120)  # shallow enough for edges of both strengths
    layers[6:] += 100 * (layers[6:] > 70)
    made = corruptions_weather._rims(layers.astype(np.float32))
    wanted = np.stack([loop(layer) for layer in layers])
    np.testing.assert_array_equal(made, wanted)
    assert 0.01 < made.mean() < 0.5


def test_equalised_values_spread_evenly():
    layer = np.array([[7, 7, 9, 9], [12, 12, 20, 20]])
    constant = np.full((2, 4), 13)
    made = corruptions_weather._equalise(np.stack([layer, constant]))
    np.testing.assert_array_equal(made[0], [[0, 0, 85, 85], [170, 170, 255, 255]])
    np.testing.assert_array_equal(made[1], constant)


def test_water_without_rims_is_even():
    assert not corruptions_weather._water(np.zeros((2, 32, 32), np.float32)).any()
    assert (corruptions_weather._water(np.full((2, 32, 32), 200, np.float32)) == 1).all()  # 20 px from any rim


# The released files


def released_file(folder, name, shape, dtype, rows=None):
    """A .npy of zeros, sparse on disk, with some rows filled."""
    folder.mkdir(exist_ok=True)
    array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
    for row, value in (rows or {}).items():
        array[row] = value
    array.flush()


def test_released_files_are_read_by_severity(tmp_path):
    assert corruptions.load_released(tmp_path, "fog") is None and corruptions.released_labels(tmp_path) is None
    folder = tmp_path / "CIFAR-10-C"
    image = smooth(1)[0]
    released_file(folder, "fog", (50_000, 32, 32, 3), np.uint8, {20_007: image.permute(1, 2, 0).numpy()})
    fog = corruptions.load_released(tmp_path, "fog")
    assert fog.shape == (5, 10_000, 3, 32, 32) and fog.dtype == torch.uint8
    assert torch.equal(fog[2, 7], image) and not fog[2, 8].any()
    labels = np.arange(50_000) % 10_000 % 10
    np.save(folder / "labels.npy", labels)
    assert corruptions.released_labels(tmp_path).tolist() == labels[:10_000].tolist()
    for damage in (labels + 1, np.arange(50_000) % 7):
        np.save(folder / "labels.npy", damage)
        with pytest.raises(ValueError, match=r"labels.npy: allowed are five equal parts of classes 0 to 9"):
            corruptions.released_labels(tmp_path)


def test_damaged_released_files_are_named(tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"CIFAR-10-C/snow.npy is missing or damaged"):
        corruptions.load_released(tmp_path, "snow")
    released_file(folder, "snow", (1000, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match=r"snow.npy holds uint8 \[1000, 32, 32, 3\]; allowed: uint8 \[50000, 32"):
        corruptions.load_released(tmp_path, "snow")
    whole = (folder / "snow.npy").read_bytes()
    for damage in (whole[:5000], whole[:5], b"", b"not an array"):
        (folder / "snow.npy").write_bytes(damage)
        with pytest.raises(ValueError, match=r"snow.npy is missing or damaged"):
            corruptions.load_released(tmp_path, "snow")
    with pytest.raises(ValueError, match=r"'snows' is unknown; allowed: gaussian_noise"):
        corruptions.load_released(tmp_path, "snows")
