"""Crops, flips and CutMix against library calls and against their laws."""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import RandomResizedCrop

from common.augment import apply_cutmix, crop_resize, cutmix_box, random_boxes, resample_matrix, rng

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


def test_the_shared_block_is_the_same_in_both_files():
    def function(path: Path) -> str:
        tree = ast.parse(path.read_text())
        return next(ast.dump(n) for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "resample_matrix")

    assert function(ROOT / "common/augment.py") == function(ROOT / "methods/wmdd.py")
