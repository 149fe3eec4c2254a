"""A GPU gives what the CPU gives, on which all else is tested: students, labels, and a few steps of each method.

Looser than the other tests: convolutions of a GPU take TF32, and its sums have another order.  Where there is no GPU, a
pretended one shows that nothing is computed across devices.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from common import attacks, cka, matching, networks
from common.augment import rng
from common.datasets import Dataset, load
from common.labels import Fixed, Online, Stored, relabel
from common.train import fit
from common.views import Recipe
from methods import cad, coresets, dc, dm, dsa, mtt, natural_mixing, nrr_dd, rded, sre2l, wmdd
from papers import arguments, objectives, runner
from papers.report import load_cells
from tests.pretend_gpu import pretend_gpu

CPU = torch.device("cpu")
TEACHER, CONVNET = "resnet18-bn-w8", "convnet2-instance-w32"
SIZE = 16

pytestmark = pytest.mark.usefixtures("untrained")


def a_gpu():
    """The context of a GPU, true or pretended, which it yields."""
    return nullcontext(torch.device("cuda")) if torch.cuda.is_available() else pretend_gpu()


def agree(run, others: float = 0.0) -> None:
    """run(device) -> tensors by name; those of the GPU are those of the CPU up to a fiftieth, but for a share."""
    wanted = run(CPU)
    with a_gpu() as gpu:
        found = {name: tensor.cpu().float() for name, tensor in run(gpu).items()}
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        ours = found[name]
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a true GPU raises its own errors")
@pytest.mark.parametrize(
    "wrong",
    [
        lambda here, there: here + there,
        lambda here, there: nn.functional.linear(there, here),
        lambda here, there: here[there.long()],
        lambda here, there: torch.randn(2, device=there.device, generator=rng(0)),
        lambda here, there: there.numpy(),
    ],
)
def test_the_pretended_gpu_refuses_what_a_true_one_does(wrong):
    with pretend_gpu() as gpu, pytest.raises((RuntimeError, TypeError), match=r"device|numpy"):
        wrong(torch.ones(2, 2), torch.ones(2, 2).to(gpu))


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


@pytest.mark.parametrize(
    "options",
    [{"gradient": "exact"}, {"gradient": "unrolled"}, {"labels": "soft", "init": "correct"},
     {"select": "nearest", "ema": 0.9}],
)  # fmt: skip
def test_trajectory_matching(options):
    """Experts too, of which the second is trained with FTD's ascent."""
    experts = mtt.ExpertConfig(experts=1, epochs=2, batch=16, lr=0.1)
    config = mtt.Config(ipc=1, iterations=2, student_steps=2, expert_epochs=1, max_start=1, lr=1, **options)

    def run(device):
        on = task(device)
        facts = {"make_network": on.make_network, "prepare": on.prepare, "device": device}
        data = on.train.images[:400], on.train.labels[:400]
        (one,) = mtt.train_experts(*data, experts, augment=on.augment, generator=rng("experts"), **facts)
        (two,) = mtt.train_experts(*data, replace(experts, rho=0.01), generator=rng("experts"), **facts)
        made = mtt.distill(*data, [one], config, augment=on.augment, generator=rng("distill"), **facts)
        return {**{name: t for name, t in made.items() if t.is_floating_point()}, "ascended": two}

    agree(run)


@pytest.mark.parametrize("options", [{}, {"alpha": "sample", "partner": "any", "optimizer": "sgd", "augment": True}])
def test_mixing(options):
    def run(device):
        on = task(device)
        made, config = matching.random_subset(on, 2, 0), natural_mixing.Config(epochs=3, batch=8, **options)
        return natural_mixing.train(
            made["images"], made["labels"], on.train.images, on.train.labels, config, make_network=on.make_network,
            prepare=on.prepare, augment=on.augment if config.augment else None, generator=rng("student"), device=device,
        )  # fmt: skip

    agree(run)


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


@pytest.mark.parametrize("method", [m for m in coresets.METHODS if m != "el2n_best"])
def test_a_selector(method):
    """From one bank, so that each sees the same scores."""
    on = task(CPU)
    labels = on.train.labels[:200]
    bank = coresets.score(
        on.train.images[:200], labels, coresets.Config(ipc=2, epochs=4, batch=64), make_network=on.make_network,
        prepare=on.prepare, augment=None, generator=rng("score"), device=CPU,
    )  # fmt: skip
    config = coresets.Config(method=method, ipc=2, epochs=4, window=2, epoch=2, dual_epochs=4)

    def run(device):
        made = coresets.select(bank, labels.to(device), config, generator=rng("select"), device=device)
        return {"indices": made["indices"]}

    agree(run)


def test_synthesis_of_crops():
    data = digits()

    def run(device):
        on = task(device)
        config = cad.Config(method="ca2d", ipc=1, student_epochs=60, batch=64, factor=2, pool=8)
        images, labels = on.train.images[:200], on.train.labels[:200]
        made = cad.distill(
            images, labels, config, make_network=on.make_network, teacher=teacher(device), prepare=on.prepare,
            mean=data.mean, std=data.std, generator=rng("distill"), device=device,
        )  # fmt: skip
        return {"images": made["images"]}

    agree(run, others=0.1)


# ---------------------------------------------------------------- what is measured


def test_attacks_similarity_and_objectives():
    def run(device):
        on = task(device)
        net = on.make_network(rng("student")).eval().to(device)
        images, labels = on.test.images[:32], on.test.labels[:32].to(device)
        attacked = attacks.pgd(net, images, labels, 8 / 255, prepare=on.inputs, steps=2, generator=rng("starts"))
        other, colours = on.make_network(rng("other")).to(device), lambda x: x.to(device).expand(-1, 3, -1, -1) / 255
        same, _, _ = cka.similarity(net, other, images, prepare=on.prepare, device=device, batch=16)
        gaps = objectives.bn_gaps(teacher(device), images, chunk=8, prepare=colours)
        real, own = (on.train.images[:200], on.train.labels[:200]), (images, labels)
        facts = {"make_network": on.make_network, "device": device}
        means = objectives.dm_loss(real, [own], seeds=range(2), augment=on.augment, prepare=on.prepare, **facts)
        path = torch.stack([mtt.flatten(on.make_network(rng("expert", epoch))) for epoch in range(3)])
        along = objectives.tm_loss(
            path, on.prepare(images), labels, lr=0.01, starts=(0, 1), steps=2, epochs=1, augment=on.augment,
            generator=rng("steps"), **facts,
        )  # fmt: skip
        return {"attacked": attacked, "similarity": same, "gaps": gaps.mean, "means": means, "along": along}

    agree(run)


# ---------------------------------------------------------------- a paper


@pytest.mark.parametrize(
    ("paper", "only"),
    [("nrr_dd", "table1/cifar-10/nrr-dd/convnet/1/soft"),
     ("natural_mixing", "table1/cifar-10/dm/mixed/convnet/1,robustness/cifar-10/dm/mixed/convnet/1")],
)  # fmt: skip
def test_cells_of_a_paper(paper, only, tmp_path, monkeypatch):
    """Teacher, images, labels, students; mixing, corruptions and attacks: from the command line to the result files."""
    with a_gpu() as gpu:
        for module in (runner, arguments):
            monkeypatch.setattr(module, "resolve_device", lambda _: gpu)
        folders = [f"store={tmp_path / 'runs'}", f"out={tmp_path / 'tables'}"]
        assert runner.main([f"paper={paper}", "scale=smoke", f"only={only}", "seeds=0", *folders]) == 0
    found = load_cells(tmp_path / "tables" / paper / "smoke" / "cells")
    assert len(found) == {"nrr_dd": 1, "natural_mixing": 9}[paper] and all(0 < c["mean"] <= 100 for c in found)
