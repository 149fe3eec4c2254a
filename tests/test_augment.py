"""Crops, flips, CutMix, DiffAugment and ZCA against library calls, plain loops and their laws."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from benchmarks import plain_augment
from common.augment import (
    OPERATIONS,
    ZCA,
    DiffAugment,
    Draw,
    apply_cutmix,
    crop_resize,
    cutmix_box,
    random_boxes,
    resample_matrix,
    rng,
)

ROOT = Path(__file__).resolve().parent.parent


def test_rng_depends_on_its_path_alone():
    assert torch.equal(torch.rand(5, generator=rng(1, "a", 2)), torch.rand(5, generator=rng(1, "a", 2)))
    assert not torch.equal(torch.rand(5, generator=rng(1, "a", 2)), torch.rand(5, generator=rng(1, "a", 3)))


@pytest.mark.parametrize(("length", "out"), [(13, 40), (40, 13), (40, 40), (1, 7)])
def test_resample_matrix_is_the_library_resize_of_a_crop(length, out):
    image = torch.rand(1, 1, 50, 60, generator=rng(length))
    top, left = 5, 11
    rows = resample_matrix(torch.tensor([top]), torch.tensor([length]), out, 50)
    cols = resample_matrix(torch.tensor([left]), torch.tensor([length]), out, 60)
    crop = image[:, :, top : top + length, left : left + length]
    wanted = F.interpolate(crop, (out, out), mode="bilinear", antialias=True)
    torch.testing.assert_close(rows @ image[0, 0] @ cols.transpose(1, 2), wanted[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, out))


def test_crop_resize_by_matrices_equals_the_loop_of_the_cpu():
    g = rng("crops")
    images = torch.randint(0, 256, (6, 3, 33, 47), dtype=torch.uint8, generator=g)
    boxes = random_boxes(torch.tensor([[33, 47]]).expand(6, 2), g)
    flip = torch.tensor([True, False] * 3)
    rows = resample_matrix(boxes[:, 0], boxes[:, 2], 24, 33)
    cols = resample_matrix(boxes[:, 1], boxes[:, 3], 24, 47)
    cols = torch.where(flip[:, None, None], cols.flip(1), cols)
    by_matrices = rows[:, None] @ images.float() @ cols[:, None].transpose(-1, -2)  # what a GPU does
    torch.testing.assert_close(crop_resize(images, boxes, flip, 24), by_matrices, atol=1e-3, rtol=0)


def test_random_boxes_follow_torchvisions_law():
    size, n = (40, 64), 4000
    ours = random_boxes(torch.tensor([size]).expand(n, 2), rng("law"))
    top, left, height, width = ours.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 40).all() and (left + width <= 64).all()
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        image = torch.zeros(1, *size)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])
    for ours_, theirs_ in zip(ours.double().unbind(1), theirs.double().unbind(1), strict=True):
        error = (ours_.var() / n + theirs_.var() / n).sqrt()
        assert (ours_.mean() - theirs_.mean()).abs() < 4 * error
        assert ours_.std() == pytest.approx(theirs_.std().item(), rel=0.08)


def test_boxes_that_cannot_fit_fall_back_to_the_centre():
    (box,) = random_boxes(torch.tensor([[100, 4]]), rng(0), scale=(0.9, 1.0)).tolist()
    assert box[2:] == [round(4 / 0.75), 4] and box[1] == 0 and abs(box[0] - 47) <= 1


def test_cutmix_takes_the_box_from_the_partner_and_the_rest_from_the_image():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16)
    permutation = torch.tensor([2, 0, 3, 1])
    top, bottom, left, right = cutmix_box(16, rng(3))
    mixed = apply_cutmix(images, permutation, (top, bottom, left, right))
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    for i in range(4):
        assert (mixed[i][:, inside] == permutation[i]).all() and (mixed[i][:, ~inside] == i).all()


def test_cutmix_boxes_have_the_side_of_a_uniform_lambda():
    """Side int(S sqrt(1 - lambda)) in whole pixels, lambda uniform; boxes at the border are cut."""
    boxes = torch.tensor([cutmix_box(64, rng(i)) for i in range(3000)])
    unclipped = boxes[(boxes[:, 0] > 0) & (boxes[:, 1] < 64) & (boxes[:, 2] > 0) & (boxes[:, 3] < 64)]
    assert ((unclipped[:, 1] - unclipped[:, 0]) == (unclipped[:, 3] - unclipped[:, 2])).all()
    area = ((boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])).double()
    centre, wanted = torch.arange(64.0), []
    for share in (torch.arange(500) + 0.5) / 500:  # 1 - lambda
        half = int(64 * share.sqrt()) // 2
        side = ((centre + half).clamp(max=64) - (centre - half).clamp(min=0)).mean()
        wanted.append(side**2)  # the centre's row and column are independent
    assert (area.mean() - torch.stack(wanted).mean()).abs() < 4 * area.std() / 3000**0.5


# ---------------------------------------------------------------- DiffAugment

FULL = "color_crop_cutout_flip_scale_rotate"


def pictures(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=rng("pictures", seed), dtype=torch.float64).to(dtype)


def with_gradient(apply, images):
    """What `apply` makes of the images, and the gradient of a weighted sum of it."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    out = apply(images)
    weights = pictures(*out.shape, dtype=out.dtype, seed=1)
    return out.detach(), torch.autograd.grad((weights * out * out).sum(), images)[0]


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 28, 28), (3, 13, 22)])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_operation_is_the_plain_one(name, shape):
    images, augment = pictures(40, *shape), DiffAugment(name)
    for rows, siamese in ((40, False), (8, True), (1, True)):
        draw = augment.draw(rows, rng(name, rows), siamese=siamese)
        ours = with_gradient(lambda x, draw=draw: augment(x, draw), images)
        plain = with_gradient(lambda x, draw=draw: plain_augment.augment(x, draw, name), images)
        torch.testing.assert_close(ours, plain, atol=1e-9, rtol=0)
        assert (ours[0] - images).abs().amax() > 0.1


@pytest.mark.parametrize("strategy", [FULL, FULL.replace("_flip", ""), "rotate_color"])
@pytest.mark.parametrize("siamese", [True, False])
def test_strategies_are_the_plain_ones(strategy, siamese):
    augment, g = DiffAugment(strategy), rng(strategy)
    for _ in range(8):
        draw = augment.draw(12, g, siamese=siamese)
        ours = with_gradient(lambda x, draw=draw: augment(x, draw), pictures(36, 3, 12, 12))
        plain = with_gradient(lambda x, draw=draw: plain_augment.augment(x, draw, strategy), pictures(36, 3, 12, 12))
        torch.testing.assert_close(ours, plain, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_row_gives_the_same_bits_in_small_and_large_batches(name):
    """Real and synthetic batches of a class differ in size; the same image must come out the same."""
    augment, few = DiffAugment(name), pictures(8, 3, 32, 32, dtype=torch.float32)
    many = torch.cat([few, pictures(248, 3, 32, 32, dtype=torch.float32, seed=2)])
    one = augment.draw(1, rng(3), siamese=True)
    assert torch.equal(augment(few, one), augment(many, one)[:8])
    two = augment.draw(2, rng(4), siamese=True)
    small, large = augment(few, two), augment(many[[*range(4), *range(8, 132), *range(4, 8), *range(132, 256)]], two)
    assert torch.equal(small, large[[0, 1, 2, 3, 128, 129, 130, 131]])


def test_a_draw_without_effect_gives_the_image_back():
    """Colour at u = 1/2, crop shifted by none of -2 .. 2, no flip, scale 1 and angle 0."""
    images, low = pictures(6, 3, 16, 16), 1 / 1.2
    for name, u in {"color": 0.5, "crop": 0.5, "flip": 0.5, "rotate": 0.5, "scale": (1 - low) / (1.2 - low)}.items():
        draw = Draw(torch.zeros(6, dtype=torch.long), torch.full((6, 3), u, dtype=torch.float64))
        torch.testing.assert_close(DiffAugment(name)(images, draw), images, atol=1e-12, rtol=0)


def test_directions_and_sizes_of_the_operations():
    """What a strategy's names promise, on a picture of one bright pixel (and of ones for the mask)."""

    def applied(name, u, images):
        return DiffAugment(name)(images, Draw(torch.tensor([0]), torch.tensor([u])))[0, 0]

    dot = torch.zeros(1, 1, 17, 33, dtype=torch.float64)
    dot[0, 0, 4, 20] = 1
    assert applied("crop", [0.0, 0.999, 0.0], dot)[4 + 2, 20 - 4] == 1  # int(17 / 8 + 0.5) down, int(33 / 8 + 0.5) left
    assert applied("flip", [0.49, 0, 0], dot)[4, 32 - 20] == 1
    ones = torch.ones_like(dot)
    hidden = applied("cutout", [0.5, 0.5, 0], ones) == 0  # odd side 17 // 2 + 1 = 9 about row 8, 17 about column 16
    assert hidden.sum() == 9 * 17 and hidden[4:13, 8:25].all()
    assert applied("cutout", [0.0, 0.0, 0], ones)[:5, :9].sum() == 0  # a centre in the corner: a quarter is left
    hidden = applied("cutout", [0.999, 0.5, 0], torch.ones(1, 1, 16, 16)) == 0  # even side: the centre is in 0 .. 16
    assert hidden.nonzero().amin(0).tolist() == [12, 4] and hidden.sum() == 4 * 8
    # Columns are looked up at 1/1.2 of their distance from the middle: the picture grows 1.2 times in width alone.
    line = torch.arange(33.0, dtype=torch.float64).expand(1, 1, 17, 33)
    u = (1 - 1 / 1.2) / (1.2 - 1 / 1.2)
    grown = applied("scale", [0.0, u, 0.0], line)
    torch.testing.assert_close(grown[8], 16 + (torch.arange(33.0, dtype=torch.float64) - 16) / 1.2)
    # u = 0 is -15 degrees: the pixel to the right of the centre is looked up above its place.
    slope = torch.arange(17.0, dtype=torch.float64)[:, None].expand(1, 1, 17, 17)
    turned = applied("rotate", [0.0, 0, 0], slope)
    assert turned[8, 12].item() == pytest.approx(8 - 4 * torch.tensor(15.0).deg2rad().sin().item(), abs=1e-6)


def test_draws_are_uniform_and_belong_to_their_generator():
    augment, n = DiffAugment(FULL), 6000
    siamese = augment.draw(n, rng(0), siamese=True)
    assert (siamese.operation.bincount(minlength=6) - n / 6).abs().max() < 4 * (n * 5 / 36) ** 0.5
    assert (siamese.values.mean(0) - 0.5).abs().max() < 4 / (12 * n) ** 0.5
    g, before = rng(1), torch.get_rng_state()
    single = [augment.draw(3, g, siamese=False) for _ in range(n)]
    assert all(len(set(d.operation.tolist())) == 1 for d in single[:100])
    counts = torch.stack([d.operation[0] for d in single]).bincount(minlength=6)
    assert (counts - n / 6).abs().max() < 4 * (n * 5 / 36) ** 0.5
    assert len(single[0].values.unique()) == 9 and torch.equal(before, torch.get_rng_state())
    again = augment.draw(n, rng(0), siamese=True)
    assert all(torch.equal(again.tensors()[k], v) for k, v in siamese.tensors().items())
    part = siamese[torch.tensor([5, 2])]
    assert torch.equal(part.values, siamese.values[[5, 2]]) and torch.equal(siamese[2:3].operation, part.operation[1:])
    assert torch.equal(Draw(**siamese.tensors())[:4].values, siamese.values[:4])


@pytest.mark.parametrize("name", [*OPERATIONS, FULL])
def test_type_and_layout_are_kept(name):
    augment = DiffAugment(name)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        images = pictures(8, 3, 10, 10, dtype=dtype)
        draw = augment.draw(8, rng(5), siamese=True)
        plain, last = augment(images, draw), augment(images.contiguous(memory_format=torch.channels_last), draw)
        assert plain.dtype == last.dtype == dtype and plain.is_contiguous()
        assert last.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(plain, last)


@pytest.mark.parametrize("name", [*OPERATIONS, FULL])
def test_derivatives_that_the_methods_take_pass_through(name):
    """A gradient to the images through a gradient to the parameters (DSA, MTT), and vmap of grad over parameters."""
    augment, images = DiffAugment(name), pictures(6, 2, 6, 6)
    draw, weights = augment.draw(6, rng(6), siamese=True), pictures(3, 6, 2, 6, 6, seed=3)

    def through(apply):
        x, w = images.clone().requires_grad_(), weights[0].clone().requires_grad_()
        inner = torch.autograd.grad((apply(x) * w).square().sum(), w, create_graph=True)[0]
        return torch.autograd.grad(inner.square().sum(), x)[0]

    plain = through(lambda x: plain_augment.augment(x, draw, augment.strategy))
    torch.testing.assert_close(through(lambda x: augment(x, draw)), plain, atol=1e-9, rtol=0)
    gradient = torch.func.grad(lambda x, w: (augment(x, draw) * w).square().sum())
    rows = torch.vmap(gradient, (None, 0))(images, weights)
    torch.testing.assert_close(rows, torch.stack([gradient(images, w) for w in weights]))


@pytest.mark.parametrize(
    ("strategy", "images", "rows", "words"),
    [
        ("color_blur", 4, 4, "'blur' is unknown; allowed: color, crop, cutout, flip, scale, rotate"),
        ("", 4, 4, "'' is unknown"),
        ("flip", 10, 4, "10 images cannot be shared evenly among 4 rows"),
        ("flip", 10, 0, "among 0 rows"),
    ],
)
def test_wrong_augmentations_are_named(strategy, images, rows, words):
    with pytest.raises(ValueError, match=words):
        augment = DiffAugment(strategy)
        augment(torch.zeros(images, 3, 8, 8), augment.draw(rows, rng(0), siamese=False))


# ---------------------------------------------------------------- ZCA


def coloured(n=500, seed=0):
    """uint8 images [n, 3, 5, 4] whose pixels depend on each other."""
    g = rng("zca", seed)
    mixing = torch.randn(60, 60, generator=g) * torch.linspace(0.1, 8, 60)
    return (128 + torch.randn(n, 60, generator=g) @ mixing).clamp(0, 255).to(torch.uint8).view(n, 3, 5, 4)


def assert_whitened(zca, images, tolerance):
    """Whitened covariance has the eigenvectors of the real one and eigenvalues s / (s + 0.1); inverse goes back."""
    pixels = images.double().div(255)
    white = zca(images)
    s, axes = torch.linalg.eigh(torch.cov(pixels.flatten(1).T))
    diagonal = axes.T @ torch.cov(white.double().flatten(1).T) @ axes
    torch.testing.assert_close(diagonal, torch.diag(s / (s + 0.1)), atol=tolerance, rtol=0)
    torch.testing.assert_close(white.double().mean(0), torch.zeros_like(pixels[0]), atol=tolerance, rtol=0)
    torch.testing.assert_close(zca.inverse(white), pixels.float(), atol=tolerance, rtol=0)


def test_zca_whitens_its_training_images_and_inverts():
    images = coloured()
    zca = ZCA.fit(images, chunk=64)
    assert_whitened(zca, images, 1e-5)
    torch.testing.assert_close(zca.whiten, zca.whiten.T)  # zero phase: the symmetric root, not a rotation of it
    assert all(t.dtype == torch.float32 for t in zca.tensors().values())
    of_floats = ZCA.fit(images.double() / 255)
    torch.testing.assert_close(of_floats.tensors(), zca.tensors())
    test = coloured(20, seed=1)
    centred = test.double().flatten(1) / 255 - images.double().flatten(1).mean(0) / 255  # training mean and axes
    torch.testing.assert_close(zca(test).double().flatten(1), centred @ zca.whiten.double(), atol=1e-5, rtol=0)
    again = ZCA(**zca.tensors()).to("cpu")
    assert torch.equal(again(test), zca(test)) and zca(test.double() / 255).dtype == torch.float64


def test_zca_of_one_image_is_refused():
    with pytest.raises(ValueError, match="at least two images, got 1"):
        ZCA.fit(coloured(1))


def test_zca_of_cifar10_at_half_size():
    """2,000 real images, averaged to 16 px: the eigenvectors of 3,072 pixels take a minute."""
    folder = Path(os.environ.get("DD_DATA", "nowhere")).expanduser() / "cifar10" / "train"
    files = [path for one in sorted(folder.glob("*")) for path in sorted(one.iterdir())[:200]]
    if len(files) < 2000:
        pytest.skip("needs DD_DATA with cifar10/train/<class>/")
    images = torch.stack([pil_to_tensor(Image.open(path).convert("RGB")) for path in files])
    images = F.avg_pool2d(images.float(), 2).round().to(torch.uint8)
    assert_whitened(ZCA.fit(images), images, 1e-4)
