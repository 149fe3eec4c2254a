"""RDED against an image-by-image walk written from its formula, closed forms, resume, determinism and the copy rule."""

import os
import shutil
from collections import Counter
from dataclasses import fields, replace
from itertools import accumulate, pairwise, permutations
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from benchmarks import plain_rded
from common import networks
from common.augment import rng
from methods import rded
from methods.rded import Config, State
from tests.copied_file import killed_state, said_alone

pytestmark = pytest.mark.usefixtures("untrained")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Small(nn.Module):
    """A user's own network for images of any size; keeps what entered it last."""

    def __init__(self, classes=4):
        super().__init__()
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(5)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
                nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            )  # fmt: skip
            self.head = nn.Linear(48, classes)
            nn.init.normal_(self.head.weight, std=3)  # scores that differ
            nn.init.uniform_(self.body[1].running_mean, -0.5, 0.5)

    def forward(self, x):
        self.seen = x
        return self.head(self.body(x))


class Brightness(nn.Module):
    """Sees class 0 in bright images and class 1 in dark ones."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        light = x.mean((1, 2, 3)) * self.scale
        return torch.stack([light, -light], 1)


class Untouchable(nn.Linear):
    """A teacher that must not be asked."""

    def forward(self, x):
        raise AssertionError("the teacher was asked before the settings were checked")


@pytest.fixture
def teacher():
    return Small().eval()


@pytest.fixture
def real():
    """Four classes of 12 images with some structure."""
    noise = torch.randn(48, 3, 4, 4, generator=rng("real"))
    images = nn.functional.interpolate(noise, (32, 32), mode="bicubic") * 60 + 128
    return images.clamp(0, 255).to(torch.uint8), torch.arange(4).repeat_interleave(12)


def distill(teacher, real, config, seed=1, **more):
    return rded.distill(*real, teacher, config, mean=MEAN, std=STD, generator=rng(seed), **more)


def pixels_of(normalised):
    return 255 * (normalised * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])


QUICK = Config(ipc=2, factor=2, crops=3, pool=10, batch=9)


# ---------------------------------------------------------------- scoring and selection


def both_forms(teacher, images, sizes, label, config, size):
    """(patches, scores) of ours and of the plain form, with the same boxes."""
    own = [tuple(images.shape[2:])] * len(images) if sizes is None else [tuple(s) for s in sizes.tolist()]
    ours = rded.select(teacher, images, sizes, label, config, size=size, mean=MEAN, std=STD, generator=rng(3))
    boxes = rded.random_boxes(torch.tensor(own).repeat_interleave(config.crops, 0), rng(3), ratio=(1.0, 1.0))
    walk = plain_rded.score(
        teacher, [x[:, :h, :w] for x, (h, w) in zip(images, own, strict=True)],
        boxes.unflatten(0, (-1, config.crops)).tolist(), label, factor=config.factor, size=size, mean=MEAN, std=STD,
    )  # fmt: skip
    crops, scores = plain_rded.select(walk, config.ipc * config.factor**2)
    return ours, (pixels_of(crops), torch.tensor(scores))


@pytest.mark.parametrize(("size", "factor"), [(32, 1), (32, 2), (29, 2), (20, 3)])  # 29: uneven border and tiles
@pytest.mark.parametrize("canvas", [False, True])
def test_scores_and_patches_are_those_of_the_plain_form(teacher, real, size, factor, canvas):
    images = real[0][:20]
    sizes = torch.randint(20, 33, (20, 2), generator=rng("sizes")) if canvas else None
    config = Config(ipc=2, factor=factor, crops=5, pool=20, batch=35)
    (patches, scores), (plain_patches, plain_scores) = both_forms(teacher, images, sizes, 2, config, size)
    assert patches.shape == (2 * factor**2, 3, size // factor, size // factor)
    assert (scores.diff() >= 0).all() and scores[-1] > scores[0]
    torch.testing.assert_close(scores, plain_scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(patches, plain_patches, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_real_images_are_scored_as_the_plain_form_does(name):
    folder = Path(os.environ.get("DD_DATA", "nowhere")).expanduser() / name / "train"
    files = sorted(path for one in sorted(folder.glob("*"))[:1] for path in one.iterdir())[:8]
    if len(files) < 8:
        pytest.skip(f"needs DD_DATA with {name}/train/<class>/")
    pictures = [pil_to_tensor(Image.open(path).convert("RGB")) for path in files]
    sizes = torch.tensor([x.shape[1:] for x in pictures])
    images = torch.zeros(8, 3, *sizes.amax(0).tolist(), dtype=torch.uint8)
    for canvas, x in zip(images, pictures, strict=True):
        canvas[:, : x.shape[1], : x.shape[2]] = x
    net = networks.make("resnet18-mod", classes=10, size=32, generator=rng(0)).eval()
    config = Config(ipc=1, factor=2, crops=3, pool=8)
    (patches, scores), (plain_patches, plain_scores) = both_forms(net, images, sizes, 4, config, 32)
    torch.testing.assert_close(scores, plain_scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(patches, plain_patches, atol=2e-3, rtol=0)


def test_the_most_confident_crop_of_each_image_and_the_most_confident_images_are_kept():
    """Bright is class 0: the brightest images, best first; of an image with a bright spot, the brightest crop."""
    level = torch.randperm(30, generator=rng(0)) * 8
    images = level.to(torch.uint8)[:, None, None, None].expand(30, 3, 16, 16).contiguous()
    config = Config(ipc=2, factor=2, crops=4, pool=30)
    for label, wanted in ((0, range(232, 168, -8)), (1, range(0, 64, 8))):
        patches, scores = rded.select(
            Brightness(), images, None, label, config, size=16, mean=MEAN, std=STD, generator=rng(1)
        )
        assert patches.mean((1, 2, 3)).round().tolist() == list(wanted)
        assert (scores.diff() > 0).all()
    images[:, :, 4:8, 4:8] = 255
    patches, _ = rded.select(
        Brightness(), images, None, 0, replace(config, crops=40, ipc=7), size=16, mean=MEAN, std=STD, generator=rng(1)
    )
    wide, _ = rded.select(
        Brightness(), images, None, 0, replace(config, crops=1, ipc=7), size=16, mean=MEAN, std=STD, generator=rng(1)
    )
    assert patches.mean() > wide.mean() + 20


def test_crops_are_squares_of_a_uniform_share_of_the_image(teacher, monkeypatch):
    """Side sqrt(U(0.08, 1)) S of square images; inside each image of a canvas; the centre where no square fits."""
    seen = []
    monkeypatch.setattr(rded, "score", lambda t, x, boxes, *_, **__: seen.append(boxes) or torch.zeros(boxes.shape[:2]))
    images, config = torch.zeros(1000, 3, 64, 64, dtype=torch.uint8), Config(ipc=1, factor=2, crops=5, pool=1000)
    rded.select(teacher, images, None, 0, config, size=32, mean=MEAN, std=STD, generator=rng(0))
    top, left, height, width = seen[0].flatten(0, 1).double().unbind(1)
    assert torch.equal(height, width)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(torch.zeros(1, 64, 64), (0.08, 1.0), (1.0, 1.0)) for _ in range(5000)]
    for have, want in zip((top, left, height), torch.tensor(theirs).double().unbind(1), strict=False):
        assert (have.mean() - want.mean()).abs() < 4 * (2 * want.var() / 5000).sqrt()
        assert have.std() == pytest.approx(want.std().item(), rel=0.05)

    sizes = torch.tensor([[64, 20], [24, 60]]).repeat(500, 1)
    rded.select(teacher, images, sizes, 0, config, size=32, mean=MEAN, std=STD, generator=rng(0))
    top, left, height, width = seen[1].unbind(2)
    assert torch.equal(height, width)
    assert (top + height <= sizes[:, :1]).all() and (left + width <= sizes[:, 1:]).all()
    (box,) = rded.random_boxes(torch.tensor([[100, 4]]), rng(0), ratio=(1.0, 1.0)).tolist()
    assert box == [48, 0, 4, 4]


@pytest.mark.parametrize(("size", "before", "patch"), [(32, 8, 16), (33, 8, 16), (35, 9, 17)])
def test_the_border_has_the_mean_colour(teacher, real, size, before, patch):
    distill(teacher, real, QUICK, size=size)
    outside = torch.ones(size, size, dtype=torch.bool)
    outside[before : before + patch, before : before + patch] = False
    assert teacher.seen.shape[2:] == (size, size)
    assert (teacher.seen[:, :, outside] == 0).all() and (teacher.seen[:, :, ~outside] != 0).all()


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_batch_changes_nothing(teacher, real, batch):
    one, two = distill(teacher, real, QUICK), distill(teacher, real, replace(QUICK, batch=batch))
    torch.testing.assert_close(one["scores"], two["scores"], atol=1e-5, rtol=1e-5)
    assert (one["images"] - two["images"]).abs().max() <= 1.01 / 255


def test_bf16_scores_stay_close(teacher, real):
    boxes = rded.random_boxes(torch.full((36, 2), 32), rng(3), ratio=(1.0, 1.0)).view(12, 3, 4)
    exact, fast = (
        rded.score(teacher, real[0][:12], boxes, 1, replace(QUICK, precision=p), size=32, mean=MEAN, std=STD)
        for p in ("fp32", "bf16")
    )
    assert not torch.equal(exact, fast)
    assert (exact - fast).abs().max() < 0.05 * exact.std() + 0.05
    ranks = torch.stack([x.flatten().argsort().argsort().double() for x in (exact, fast)])
    assert torch.corrcoef(ranks)[0, 1] > 0.98


@pytest.mark.slow
def test_a_compiled_teacher_scores_alike(teacher, real):
    if shutil.which("c++") is None:
        pytest.skip("compiling needs a C++ compiler")
    one, two = distill(teacher, real, QUICK), distill(teacher, real, replace(QUICK, compile=True))
    torch.testing.assert_close(one["scores"], two["scores"], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- stitching


def test_tiles_are_dealt_out_by_rank():
    """Patches that show their rank: image i is made of i, I + i, 2 I + i, 3 I + i, row by row."""
    ranks = torch.arange(12.0)[:, None, None, None].expand(12, 3, 4, 4)
    images = rded.stitch(ranks, 2, 8)
    assert images.shape == (3, 3, 8, 8)
    for i in range(3):
        tiles = [images[i, :, r : r + 4, c : c + 4].unique().tolist() for r in (0, 4) for c in (0, 4)]
        assert tiles == [[i], [3 + i], [6 + i], [9 + i]]


@pytest.mark.parametrize(("size", "factor"), [(8, 1), (8, 2), (9, 2), (10, 3), (11, 3)])
def test_stitching_is_that_of_the_plain_form(size, factor):
    patches = torch.rand(4 * factor**2, 3, size // factor, size // factor, generator=rng(0))
    assert torch.equal(rded.stitch(patches, factor, size), plain_rded.stitch(patches, factor, size))


# ---------------------------------------------------------------- the whole method


def numbered(per_class=12, classes=4, side=16):
    """Images of one level each: what a tile shows is where it came from."""
    number = torch.arange(per_class * classes)
    labels = number % classes
    return (3 * number).to(torch.uint8)[:, None, None, None].expand(-1, 3, side, side).contiguous(), labels


def test_every_tile_comes_from_another_image_of_its_class():
    images, labels = numbered()
    out = rded.distill(
        images, labels, Small().eval(), QUICK, size=24, mean=MEAN, std=STD, generator=rng(1),
    )  # fmt: skip
    assert out["images"].shape == (8, 3, 24, 24) and out["images"].dtype == torch.float32
    assert out["labels"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    levels = 255 * out["images"]
    assert (levels - levels.round()).abs().max() < 1e-4  # eight bits
    tiles = levels.round().unfold(2, 12, 12).unfold(3, 12, 12).flatten(4)  # [8, 3, 2, 2, 144]
    assert (tiles == tiles[..., :1]).all()
    source = (tiles[:, 0, :, :, 0] / 3).long()
    assert torch.equal(source % 4, out["labels"][:, None, None].expand(-1, 2, 2))
    assert all(len(source[2 * k : 2 * k + 2].unique()) == 8 for k in range(4))
    assert (out["scores"].view(4, 8).diff() >= 0).all() and (out["scores"].view(4, 8).amax(1) > 0).all()


def test_pixels_are_truncated(monkeypatch):
    images, labels = numbered()
    patches = torch.full((8, 3, 8, 8), 254.9)
    patches[4:] = 199.99999  # 200 but for rounding
    monkeypatch.setattr(rded, "select", lambda *_, **__: (patches, torch.zeros(8)))
    out = rded.distill(images, labels, Small(), QUICK, mean=MEAN, std=STD, generator=rng(0))
    assert (255 * out["images"]).round().unique().tolist() == [200, 254]


def test_the_pool_is_drawn_from_the_class_without_repeats():
    labels = torch.arange(200) % 4
    pool = rded.pool_of(labels, 3, Config(ipc=1, pool=20), rng(0))
    assert len(pool.unique()) == 20 and (labels[pool] == 3).all()
    counts = Counter(i for s in range(300) for i in rded.pool_of(labels, 3, Config(ipc=1, pool=20), rng(s)).tolist())
    assert len(counts) == 50 and max(counts.values()) < 165 and min(counts.values()) > 80  # 120 expected
    assert rded.pool_of(labels, 3, Config(ipc=1, pool=50), rng(0)).sort().values.tolist() == list(range(3, 200, 4))


def test_two_seeded_runs_are_equal_and_seeds_differ(teacher, real):
    before = torch.get_rng_state()
    one, two, other = (distill(teacher, real, QUICK, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["images"], other["images"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_run_continues_bit_for_bit(teacher, real, stop):
    whole, kept = distill(teacher, real, QUICK), killed_state(stop, distill, teacher, real, QUICK)
    numbers, state = [], State.restore(kept)
    resumed = distill(teacher, real, QUICK, seed=9, state=state, on_step=lambda s: numbers.append(s.number))
    assert numbers == list(range(stop + 1, 5))
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_the_factor_is_decided_by_the_size(teacher, real):
    auto = replace(QUICK, factor=0)
    assert [rded.resolved(auto, size).factor for size in (32, 64, 127, 128, 224)] == [1, 1, 1, 2, 2]
    assert rded.resolved(QUICK, 32).factor == 2
    assert distill(teacher, real, auto)["scores"].shape == (8,)


def test_published_settings_are_settings():
    names = {f.name for f in fields(Config)}
    for (dataset, _), row in rded.PUBLISHED.items():
        assert set(row) <= names and Config(**row)
        assert row.get("factor", 0) == {"imagenette": 2, "imagewoof": 2, "digits": 0, "imagenet-1k": 0}.get(dataset, 1)
    assert rded.PUBLISHED["tiny-imagenet", None]["factor"] == 1 and rded.PUBLISHED["imagenette", None]["factor"] == 2


# ---------------------------------------------------------------- the student's recipe


@pytest.mark.parametrize("size", [32, 64, 128, 224])
def test_a_crop_of_the_whole_area_is_the_whole_image(size):
    """The student's crop at factor 1, share (1, 1): always the identity."""
    boxes = rded.random_boxes(torch.full((1000, 2), size), rng(size), (1.0, 1.0))
    assert torch.equal(boxes, torch.tensor([[0, 0, size, size]]).expand(1000, 4))
    image = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=rng(0))
    assert torch.equal(rded.crop_resize(image, boxes[:2], torch.zeros(2, dtype=torch.bool), size), image.float())


def test_the_table_of_batch_sizes():
    published = {
        ("cifar10", 10): (10, 50, 100), ("imagenette", 10): (10, 50, 100), ("imagewoof", 10): (10, 50, 100),
        ("cifar100", 100): (20, 100, 200), ("imagenet-1k", 1000): (20, 100, 200), ("tiny-imagenet", 200): (100,) * 3,
    }  # fmt: skip
    for (dataset, classes), row in published.items():
        assert tuple(rded.batch_size(classes, ipc, dataset) for ipc in (1, 10, 50)) == row
    for classes, ipc in ((10, 20), (37, 10), (200, 10)):
        with pytest.raises(ValueError, match=f"classes={classes} and ipc={ipc} .*set it by hand"):
            rded.batch_size(classes, ipc)


def test_learning_rates_by_student():
    rates = {
        "convnet3": 1e-3, "resnet18-mod": 1e-3, "resnet101": 1e-3, "mobilenet_v2": 2.5e-3, "efficientnet_b0": 2e-3,
        "vgg11-bn": 5e-4, "alexnet": 1e-4,
    }  # fmt: skip
    assert all(rded.learning_rate(student) == rate for student, rate in rates.items())
    assert rded.CIFAR100_CONVNET3 == {"batch": 25, "lr": 2e-3}
    with pytest.raises(ValueError, match="student='mlp'; known: convnet3"):
        rded.learning_rate("mlp")


@pytest.mark.parametrize(("size", "factor"), [(8, 2), (9, 2), (12, 3), (11, 3)])
def test_patches_are_shuffled_by_columns_then_rows(size, factor):
    images = torch.randint(0, 256, (300, 2, size, size), dtype=torch.uint8, generator=rng(1))
    shuffled = rded.shuffle_patches(images, factor, rng(2))
    ends = [0, *accumulate(size // factor + (i < size % factor) for i in range(factor))]
    cuts = list(pairwise(ends))  # the first strips are a pixel wider
    orders, used = list(permutations(range(factor))), Counter()
    for old, new in zip(images, shuffled, strict=True):
        found = []
        for columns in orders:
            moved = torch.cat([old[:, :, slice(*cuts[c])] for c in columns], 2)
            found += [
                (rows, columns)
                for rows in orders
                if torch.equal(torch.cat([moved[:, slice(*cuts[r])] for r in rows], 1), new)
            ]
        assert len(found) == 1
        used[found[0]] += 1
    assert len(used) == len(orders) ** 2  # 4 for factor 2, not 24; every image has its own draw
    expected = 300 / len(used)
    assert all(abs(n - expected) < 4.5 * expected**0.5 for n in used.values())


def test_one_tile_is_not_shuffled():
    images = torch.rand(3, 3, 8, 8, generator=rng(0))
    assert torch.equal(rded.shuffle_patches(images, 1, rng(1)), images)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ipc": 0}, "ipc=0"),
        ({"factor": -1}, "factor=-1"),
        ({"crops": 0}, "crops=0"),
        ({"precision": "fp16"}, "bf16, fp32"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        ({"pool": 300}, {}, "pool=300 is more than the 12 images of class 0; pass pool=12"),
        ({"ipc": 3}, {}, "ipc=3 with factor=2 takes 12 patches of class 0, one an image, more than pool=10"),
        ({}, {"size": 80}, "patches of 40 px .* shorter side is 32 px .median.; pass a size from 2 to 64"),
        ({"ipc": 1, "factor": 3}, {"size": 2}, "patches of 0 px"),
        ({}, {"size": 50, "sizes": torch.tensor([[32, 20]]).expand(48, 2)}, "shorter side is 20 px"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_forward(real, settings, more, words):
    with pytest.raises(ValueError, match=words):
        distill(Untouchable(2, 2), real, replace(QUICK, **settings), **more)


def test_a_missing_class_is_named(real):
    images, labels = real
    with pytest.raises(ValueError, match="0 images of class 2"):
        distill(Untouchable(2, 2), (images[labels != 2], labels[labels != 2]), QUICK)


def test_select_and_pool_say_it_too(real):
    with pytest.raises(ValueError, match="pool=13 is more than the 12 images of class 1"):
        rded.pool_of(real[1], 1, replace(QUICK, pool=13), rng(0))
    with pytest.raises(ValueError, match="takes 8 patches of class 1, one an image, more than pool=7"):
        rded.select(
            Untouchable(2, 2), real[0][:7], None, 1, QUICK, size=32, mean=MEAN, std=STD, generator=rng(0)
        )  # fmt: skip


def test_nothing_is_cut_from_the_rest_of_a_canvas(teacher):
    images, labels = numbered()
    sizes = torch.randint(8, 17, (48, 2), generator=rng("sizes"))
    for canvas, (height, width) in zip(images, sizes.tolist(), strict=True):
        canvas[:, height:], canvas[:, :, width:] = 255, 255
    out = distill(teacher, (images, labels), QUICK, sizes=sizes)
    assert (255 * out["images"]).max() < 145  # the images themselves end at 141


def test_a_few_small_images_are_enlarged(teacher, real):
    sizes = torch.tensor([[32, 32]]).repeat(48, 1)
    sizes[::6] = 5
    assert distill(teacher, real, QUICK, sizes=sizes)["images"].isfinite().all()


def test_a_class_that_the_teacher_lacks_is_named(real):
    with pytest.raises(ValueError, match="tells 3 classes apart, the images have 4"):
        distill(Small(classes=3), real, QUICK)


def test_scores_that_are_not_finite_stop_the_run(teacher, real):
    nn.init.constant_(teacher.head.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="30 of 30 scores of class 0 are not finite"):
        distill(teacher, real, QUICK)


# ---------------------------------------------------------------- the copy rule

ALONE = """
import torch, torchvision, rded
rded.recognises = lambda *_: None  # the teachers are untrained
images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
config = rded.Config(ipc=2, crops=2, pool=8)
own = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                          torch.nn.Linear(8, 3))
for teacher in (torchvision.models.resnet18(num_classes=3), own):
    out = rded.distill(images, torch.arange(30) % 3, teacher, config, mean=(0.5,) * 3, std=(0.2,) * 3,
                       generator=torch.Generator().manual_seed(0))
    assert out["images"].shape == (6, 3, 32, 32) and out["images"].isfinite().all()
print("alone")
"""


def test_the_file_runs_alone(tmp_path):
    assert said_alone("rded", ALONE, tmp_path) == "alone\n"


def test_the_students_recipe_is_the_released_one():
    recipe = rded.student_recipe("imagenette", 10, "resnet18", 2, 10)
    assert recipe["batch"] == 50 and recipe["lr"] == 1e-3 and recipe["shuffle"] == 2 and recipe["crop"] == 0.5
    assert (recipe["epochs"], recipe["schedule"], recipe["bn_momentum"]) == (300, "half-cosine", 0.19)
    small = rded.student_recipe("cifar10", 10, "convnet3", 1, 50)
    assert (small["batch"], small["shuffle"], small["crop"]) == (100, 1, 1.0)
    assert rded.student_recipe("cifar100", 100, "convnet3", 1, 1)["batch"] == 25
    assert rded.student_recipe("cifar100", 100, "resnet18-mod", 1, 1)["batch"] == 20
    assert rded.student_recipe("mine", 7, "resnet18", 1, 5)["batch"] == 35  # nearest: 10 classes, IPC 10


def test_images_may_be_read_class_by_class(teacher, real):
    images, labels = real
    asked = []

    def read(rows):
        asked.append(len(rows))
        return images[rows], torch.tensor(images.shape[2:]).expand(len(rows), 2)

    lazy, whole = distill(teacher, (read, labels), QUICK, size=32), distill(teacher, real, QUICK)
    assert torch.equal(lazy["images"], whole["images"]) and asked == [QUICK.pool] * 4
