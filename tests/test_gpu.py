"""A GPU gives what the CPU gives, on which all else is tested: students, labels, and a few steps of each method.

Looser than the other tests: convolutions of a GPU take TF32, and its sums have another order.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from common import matching, networks
from common.augment import rng
from common.datasets import Dataset, load
from common.labels import Fixed, Online, Stored, relabel
from common.train import fit
from common.views import Recipe
from methods import cad, coresets, dc, dm, dsa, nrr_dd, rded, sre2l, wmdd

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TEACHER, CONVNET = "resnet18-bn-w8", "convnet2-instance-w32"
SIZE = 16

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("untrained"),
]


def agree(run, others: float = 0.0) -> None:
    """run(device) -> tensors by name; those of the GPU are those of the CPU up to a fiftieth, but for a share."""
    wanted, found = (run(device) for device in (CPU, GPU))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        ours = found[name].cpu().float()
        off = ~torch.isclose(ours, tensor.float(), atol=0.02, rtol=0.02)
        assert ours.isfinite().all() and off.float().mean() <= others, name


def digits() -> Dataset:
    data = load("digits", None, split="train")
    images = data.center(SIZE, torch.arange(200))
    return replace(data, images=images, labels=data.labels[:200])


def teacher(device: torch.device) -> nn.Module:
    return networks.make(TEACHER, classes=10, size=SIZE, generator=rng("teacher")).eval().to(device)


def task(device: torch.device) -> matching.Task:
    return matching.task("digits", None, device=device, size=SIZE, network=CONVNET)


# ---------------------------------------------------------------- students and labels


@pytest.mark.parametrize("labels", ["hard", "stored", "online", "fixed"])
@pytest.mark.parametrize("resident", [True, False])
def test_students_by_a_recipe(labels, resident):
    """Also on images that stay on the CPU, as sets do that take more than half of a GPU."""
    recipe = Recipe(epochs=1, batch=50, labels="hard" if labels == "hard" else "soft", crop=0.5)

    def run(device):
        data = digits().to(device) if resident else digits()
        facts = {"size": SIZE, "seed": 0, "device": device, "dtype": torch.float32}
        sources = {
            "hard": lambda: None, "online": lambda: Online(teacher(device), torch.float32),
            "stored": lambda: Stored(relabel(teacher(device), data, recipe, **facts)),
            "fixed": lambda: Fixed(teacher(device), data, SIZE, torch.float32),
        }  # fmt: skip
        weights = None if labels == "hard" else torch.linspace(0.5, 1.5, 200)
        net = networks.make(CONVNET, classes=10, size=SIZE, generator=rng("student"))
        return fit(net, data, recipe, soft=sources[labels](), weights=weights, **facts).state_dict()

    agree(run)


def test_the_labels_of_all_views():
    recipe, facts = Recipe(epochs=2, batch=64), {"size": SIZE, "seed": 0, "dtype": torch.float32}
    agree(lambda device: {"logits": relabel(teacher(device), digits().to(device), recipe, device=device, **facts)})


def test_students_side_by_side_by_a_protocol(tmp_path):
    """Stacked on the GPU, one after the other on the CPU."""
    protocol = replace(matching.PROTOCOLS["dsa-2021"], epochs=3)

    def run(device):
        on = task(device)
        made = matching.students(tmp_path / device.type, on, matching.random_subset(on, 3, 0), protocol, range(3),
                                 keep=True)  # fmt: skip
        return made.tensors

    agree(run)


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (dc, {"iterations": 1, "outer": 2, "inner": 1, "batch_real": 16}),
        (dsa, {"iterations": 1, "outer": 2, "inner": 1, "batch_real": 16}),
        (dm, {"iterations": 2, "batch_real": 16}),
    ],
)
def test_matching(method, options):
    def run(device):
        on = task(device)
        made = method.distill(
            on.train.images, on.train.labels, method.Config(ipc=2, **options), make_network=on.make_network,
            prepare=on.prepare, augment=None if method is dc else on.augment, generator=rng("distill"), device=device,
        )  # fmt: skip
        return {"images": made["images"]}

    agree(run)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (wmdd, {"iterations": 3}),
        (sre2l, {"iterations": 3}),
        (rded, {"pool": 8}),
        (nrr_dd, {"pool": 8, "iterations": 3}),
    ],
)
def test_methods_with_a_teacher(method, options):
    """Adam moves a pixel by its step size either way where its gradient is near 0, and a close score picks a crop."""
    data = digits()

    def run(device) -> dict[str, Tensor]:
        made = method.distill(
            data.images, data.labels, teacher(device), method.Config(ipc=1, **options), mean=data.mean, std=data.std,
            generator=rng("distill"),
        )  # fmt: skip
        return {"images": made["images"]}

    agree(run, others=0.1)


@pytest.mark.parametrize("method", [coresets, cad])
def test_a_scoring_run(method):
    """The scores, not the images: these can change places where two scores are close."""
    options = {"ipc": 2, "student_epochs": 60, "batch": 32} if method is cad else {"ipc": 2, "epochs": 2, "batch": 64}

    def run(device):
        on = task(device)
        found = method.score(
            on.train.images[:200], on.train.labels[:200], method.Config(**options), make_network=on.make_network,
            prepare=on.prepare, augment=None, generator=rng("score"), device=device,
        )  # fmt: skip
        found = found if isinstance(found, dict) else found.tensors()
        return {name: t for name, t in found.items() if t.is_floating_point()}

    agree(run)
