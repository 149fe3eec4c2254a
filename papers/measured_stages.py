"""What is measured besides clean accuracy: gains, corruptions, attacks, similarity of layers, objectives, scaling laws.

A measurement is a stage of its own on the students of `matching_stages` that were kept, or on the images themselves;
its result has one value a student under the name of the metric.
"""

from __future__ import annotations

import functools
import os
import re
import statistics as stats
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common import matching
from common.attacks import robust_accuracy
from common.augment import rng
from common.cka import similarity
from common.corruptions import CORRUPTIONS, PROCEDURAL, STANDARD, corrupt, load_released, released_labels
from common.hardware import autocast
from common.scaling import LEAST_EPOCHS, fit_scaling_law, fitted_epochs
from common.store import Product
from common.views import normalise
from methods import mtt
from papers import matching_stages
from papers.cells import Cell
from papers.objectives import bn_gaps, bn_loss, dm_loss, dwa_loss, tm_loss

if TYPE_CHECKING:
    from papers.matching_stages import MatchingSetup
    from papers.stages import Lab, Stage

__all__ = ["details", "measured"]

ATTACK = re.compile(r"(fgsm|pgd)-(\d+) accuracy")  # e.g. "pgd-8 accuracy": eps is 8/255
STATISTICS = {"BN loss": bn_loss, "DWA loss": dwa_loss}  # of a teacher's BatchNorm layers
OBJECTIVES = (*STATISTICS, "DM loss")  # how far images are from the training set, without any student
TRAJECTORY = "TM loss"  # the same of MTT
LAW = ("b", "tau")  # of the scaling law
GRID = "paper"  # where they are looked for
LIKELIHOOD = 0.147  # of the ranges that are told: 95 % of one parameter
REFERENCE_SEED = 1000  # that of no student, which would start from the same weights
CLEAN = "sample accuracy"  # of the test images that are corrupted and attacked, as they are
CORRUPTED = {"corruption accuracy": STANDARD, "corruption-19 accuracy": CORRUPTIONS, "frost accuracy": PROCEDURAL}


def measured(lab: Lab, cell: Cell, setup: MatchingSetup, seeds: tuple[int, ...]) -> list[Stage]:
    """The stages behind a number that is no accuracy on clean images; ValueError for an unknown metric."""
    if cell.metric in OBJECTIVES:
        return [_objective(lab, cell, setup)]
    if cell.metric == TRAJECTORY:
        return [_trajectory(lab, cell, setup)]
    train = functools.partial(matching_stages.students, lab, cell, seeds=seeds)
    if cell.metric in LAW:
        return [_law(lab, setup, train(replace(setup, looks=True)))]
    if cell.metric == "gain":
        pairs = zip(train(replace(setup, mix={})), train(setup), strict=True)
        return [_gain(lab, *pair) for pair in pairs]
    if cell.metric in (CLEAN, *CORRUPTED):
        return [_corrupted(lab, setup, trained) for trained in train(setup)]
    if ATTACK.fullmatch(cell.metric):
        return [_attacked(lab, setup, trained, cell.metric) for trained in train(setup)]
    if cell.metric == "CKA":
        reference = matching_stages.full_data(lab, replace(setup, mix={}), (REFERENCE_SEED,))
        return [_similar(lab, setup, trained, reference) for trained in train(setup)]
    attacked = ("fgsm-N accuracy", "pgd-N accuracy")
    known = ("accuracy", "gain", CLEAN, *CORRUPTED, *OBJECTIVES, TRAJECTORY, *LAW, *attacked, "CKA")
    raise ValueError(f"metric {cell.metric!r} is unknown; allowed: {', '.join(known)}")


def networks_of(lab: Lab, setup: MatchingSetup, trained: Stage) -> list[nn.Module]:
    """The students that a stage kept, in the order of their seeds."""
    on, found = matching_stages.tested_on(lab, setup), []
    tensors, meta = lab.entry(trained).tensors(), lab.entry(trained).meta
    for place in range(len(meta["seeds"])):
        net = on.make_network(rng(0))
        net.load_state_dict({n.split("/", 1)[1]: v for n, v in tensors.items() if n.startswith(f"{place}/")})
        found.append(net.to(on.device).eval())
    return found


def test_sample(lab: Lab, setup: MatchingSetup) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, labels and places of the test images that are measured on: all, or as many at random of each class."""
    on = matching_stages.task_of(lab, setup)
    return _sample(on, min(setup.measure.get("images") or len(on.test), len(on.test)))


@functools.cache
def _sample(on: matching.Task, count: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = on.test.labels.cpu()
    order = torch.randperm(len(labels), generator=rng(0, "test sample"))
    turn = torch.empty_like(order)  # of an image among those of its class
    for k in labels.unique():
        own = labels[order] == k
        turn[own] = torch.arange(int(own.sum()))
    rows = order[turn.argsort(stable=True)][:count].sort().values
    return on.test.images[rows].cpu(), labels[rows], rows


def _logits(net: nn.Module, on: matching.Task, dtype: torch.dtype, compile: bool) -> Callable[[Tensor], Tensor]:
    """Of pixels, in the arithmetic in which long students train."""
    layout = torch.channels_last if compile else torch.contiguous_format
    if compile:
        torch.compiler.reset()  # as in common/students.py
        net = torch.compile(net.to(memory_format=layout), dynamic=False)

    def logits(pixels: Tensor) -> Tensor:
        with torch.no_grad(), autocast(on.device, dtype):
            return net(on.prepare(pixels).contiguous(memory_format=layout))

    return logits


def _accuracy(net: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor) -> float:
    right = sum(
        int((net(x).argmax(1).cpu() == y).sum()) for x, y in zip(pixels.split(500), labels.split(500), strict=True)
    )
    return 100 * right / len(labels)


def _gain(lab: Lab, plain: Stage, mixed: Stage) -> Stage:
    def build(work: Path) -> Product:
        before, after = (lab.entry(stage).meta for stage in (plain, mixed))
        gains = [b - a for a, b in zip(before["accuracies"], after["accuracies"], strict=True)]
        return Product({}, {"gain": gains, "seeds": before["seeds"]})

    return lab.stage("gain", {}, (plain, mixed), build, 0.0, f"gain of {mixed.what}", plain, mixed)


def _severities(setup: MatchingSetup) -> list[int]:
    return list(setup.measure.get("severities", range(1, 6)))


def corrupted_images(lab: Lab, setup: MatchingSetup) -> tuple[Stage, ...]:
    """The test images under every corruption, made once for all networks: uint8 [severities, N, C, H, W] each, labels.

    Where the released files of CIFAR-10-C lie beside the data, these first, then those made here. They are in the order
    of CIFAR-10's own test file: with a tree of images a sample of theirs is of other images than one of ours.
    """
    on, severities = matching_stages.task_of(lab, setup), _severities(setup)
    pixels, labels, rows = test_sample(lab, setup)
    root = lab.root or os.environ.get("DD_DATA", "")
    theirs = released_labels(root) if setup.dataset == "cifar10" and root else None

    def read(work: Path) -> Product:
        levels = [s - 1 for s in severities]
        made = {name: load_released(root, name)[levels][:, rows] for name in CORRUPTIONS}
        return Product({**made, "labels": theirs[rows]}, {"severities": severities})

    def make(work: Path) -> Product:
        made = {n: torch.stack([corrupt(pixels, n, s, indices=rows) for s in severities]) for n in CORRUPTIONS}
        return Product({**made, "labels": labels}, {"severities": severities})

    def stage(released: bool) -> Stage:
        settings = {"size": on.size, "sample": len(rows), "severities": severities, "released": released}
        what = f"corrupted test images, {setup.run_on}"
        return lab.stage("corruptions", settings, (on.test.fingerprint,), read if released else make, 0.0, what)

    return tuple(stage(released) for released in ((False,) if theirs is None else (True, False)))


def _means(table: Tensor, apart: Sequence[str]) -> dict[str, list[float]]:
    """Of accuracies [students, 19, severities]: each student's means over groups of corruptions, some left out."""
    means = {}
    for metric, names in CORRUPTED.items():
        kept = [CORRUPTIONS.index(n) for n in names if n not in apart or names == PROCEDURAL]
        means[metric] = table[:, kept].mean((1, 2)).tolist()
    return means


def _corrupted(lab: Lab, setup: MatchingSetup, trained: Stage) -> Stage:
    """Accuracy [students, corruptions, severities], its means over the 15 standard and all 19, and that without any.

    A procedural frost is not the published one: it is left out of the means, which are then over 14 and 18. With the
    released files the means are of these, and `compared` has those of both kinds of images over the 14 and 18.
    """
    on, made = matching_stages.task_of(lab, setup), corrupted_images(lab, setup)
    pixels, labels, _ = test_sample(lab, setup)
    cost = (1 + len(made) * len(CORRUPTIONS) * len(_severities(setup))) * len(labels) * on.flops
    arithmetic = lab.arithmetic(cost)

    def build(work: Path) -> Product:
        networks = [_logits(net, on, **arithmetic) for net in networks_of(lab, setup, trained)]

        def accuracies(images: dict[str, Tensor]) -> Tensor:  # [students, 19, severities]
            return torch.tensor([
                [[_accuracy(net, level, images["labels"]) for level in images[name]] for name in CORRUPTIONS]
                for net in networks
            ])

        tables, apart = [accuracies(lab.entry(stage).tensors()) for stage in made], PROCEDURAL
        clean = [_accuracy(net, pixels, labels) for net in networks]
        tensors, meta = {"accuracy": tables[0]}, {CLEAN: clean, "seeds": lab.entry(trained).meta["seeds"]}
        meta["by_corruption"] = dict(zip(CORRUPTIONS, tables[0].mean(2).T.tolist(), strict=True))
        if len(tables) > 1:
            tensors["generated"], apart = tables[1], ()
            meta["compared"] = {"released": _means(tables[0], PROCEDURAL), "generated": _means(tables[1], PROCEDURAL)}
        return Product(tensors, {**_means(tables[0], apart), "left_out": list(apart), **meta})

    settings = {"precision": "bf16"} if arithmetic["compile"] else {}
    inputs, what = (trained, *made), f"{trained.what}, corrupted images"
    return lab.stage("corrupted", settings, inputs, build, cost, what, *inputs)


def details(metas: Sequence[Mapping], metric: str) -> dict:
    """For a result file, what a mean is over: accuracies by corruption, similarity by layer, a value a student each.

    interval: of b or tau of a scaling law, 95 %; fit: the rest of the law.
    compared: students on released images and on those made here, over the same corruptions, and how much more they have
    on the latter; nothing where no released files were at hand.
    """
    name = {"corruption-19 accuracy": "by_corruption", "CKA": "by_layer"}.get(metric)
    found = {}
    if name and all(name in meta for meta in metas):
        found[name] = {part: [v for meta in metas for v in meta[name][part]] for part in metas[0][name]}
    if metric in LAW:
        (meta,) = metas
        found |= {"interval": list(meta[f"{metric}_range"]), "fit": {name: meta[name] for name in ("a", "d", "r2")}}
    if metric in CORRUPTED and all("compared" in meta for meta in metas):
        both = {kind: [v for m in metas for v in m["compared"][kind][metric]] for kind in ("released", "generated")}
        both["difference"] = stats.fmean(both["generated"]) - stats.fmean(both["released"])
        found["compared"] = both
    return found


def _attacked(lab: Lab, setup: MatchingSetup, trained: Stage, metric: str) -> Stage:
    """Accuracy under attack; `measure: pgd` holds options of `common.attacks.pgd` that are not its defaults."""
    on = matching_stages.task_of(lab, setup)
    attack, eps = ATTACK.fullmatch(metric).groups()
    options = dict(setup.measure.get("pgd", {})) if attack == "pgd" else {}
    pixels, labels, rows = test_sample(lab, setup)

    def build(work: Path) -> Product:
        found = [
            robust_accuracy(
                net, pixels, labels, attack=attack, eps=int(eps) / 255, prepare=on.inputs, seed=0, device=on.device,
                **options,
            )
            for net in networks_of(lab, setup, trained)
        ]  # fmt: skip
        return Product({}, {metric: found, "seeds": lab.entry(trained).meta["seeds"]})

    settings = {"attack": attack, "eps255": int(eps), "sample": len(rows), **options}
    if attack == "pgd":
        settings["stop"] = "at the first miss"  # part of the accuracy's meaning: see common/attacks.py
    steps = options.get("steps", 10) * options.get("restarts", 1) if attack == "pgd" else 1
    cost = len(rows) * 3 * steps * on.flops
    return lab.stage("attacked", settings, (trained,), build, cost, f"{trained.what}, {attack} {eps}/255", trained)


def _objective(lab: Lab, cell: Cell, setup: MatchingSetup) -> Stage:
    """What SRe2L (BN loss), DWA or DM would say of a set: their loss at its images."""
    on, train = matching_stages.task_of(lab, setup), lab.data(setup.dataset, "train")
    made = matching_stages.images(lab, setup, cell.algorithm, 0)
    teacher = (lab.teacher(setup.taught_by(on)),) if cell.metric in STATISTICS else ()
    per_class = setup.measure.get("per_class", 500)

    def build(work: Path) -> Product:
        tensors = lab.entry(made).tensors()
        images, labels = matching.tested_images(tensors), tensors["labels"]
        if teacher:
            view = lambda x: normalise(on.pixels(x) * 255, train.mean, train.std)  # noqa: E731
            value = STATISTICS[cell.metric](bn_gaps(lab.restored(teacher[0]), images, prepare=view))
        else:
            see = lambda x: on.prepare(x) if x.dtype == torch.uint8 else x  # noqa: E731 (real images, or the set)
            real, few = (on.train.images, on.train.labels), int(on.train.labels.bincount().min())
            options = {"make_network": on.make_network, "prepare": see, "device": on.device}
            value = float(dm_loss(real, [(images, labels)], per_class=min(per_class, few), **options)[0])
        return Product({}, {cell.metric: [value], "seeds": [0]})

    settings = {"objective": cell.metric, "per_class": 0 if teacher else per_class}
    cost = (0 if teacher else 5 * per_class * len(on.train.classes)) * on.flops
    needs = (made, *teacher)
    inputs = needs if teacher else (made, on.train.fingerprint)
    return lab.stage("objective", settings, inputs, build, cost, f"{cell.metric} of {made.what}", *needs)


def _trajectory(lab: Lab, cell: Cell, setup: MatchingSetup) -> Stage:
    """MTT's loss of a set at each start epoch of an expert, as the scale's `measure: trajectory` says, and its mean.

    The expert is of the cell's architecture, whatever network the set was made with.
    """
    own, made = matching_stages.task_of(lab, setup), matching_stages.images(lab, setup, cell.algorithm, 0)
    plain = replace(setup, distill={**setup.distill, "zca": False})  # one expert for all sets, also whitened ones
    whitened, measure = setup.distill.get("zca", False), dict(setup.measure["trajectory"])
    on = matching_stages.tested_on(lab, plain)
    chosen = mtt.ExpertConfig(experts=1, epochs=measure.pop("train_epochs"))
    (expert,) = matching_stages.experts(lab, plain, on, chosen, 0)

    def build(work: Path) -> Product:
        tensors, (trajectory,) = lab.entry(made).tensors(), lab.entry(expert).tensors().values()
        images = matching.tested_images(tensors)
        if whitened:
            images = on.inputs(own.pixels(images.to(on.device)))
        losses = tm_loss(
            trajectory, images, tensors.get("soft_labels", tensors["labels"]),
            make_network=on.make_network, generator=rng(0, "trajectory"), device=on.device, **measure,
        )  # fmt: skip
        return Product({"losses": losses}, {TRAJECTORY: [float(losses.mean())], "seeds": [0]})

    images = setup.distill["ipc"] * len(on.train.classes)
    cost = len(measure["starts"]) * measure["steps"] * 3.0 * images * on.flops
    settings, needs = {"objective": TRAJECTORY, **measure}, (made, expert)
    return lab.stage("objective", settings, needs, build, cost, f"{TRAJECTORY} of {made.what}", *needs)


def _law(lab: Lab, setup: MatchingSetup, trained: list[Stage]) -> Stage:
    """The scaling law (Eqs 7 and 8 of Hard Truths) of the mean error of students over their epochs."""
    on = matching_stages.task_of(lab, setup)
    count = setup.distill["ipc"] * len(on.train.classes)
    passes = setup.trained_by(count, len(on.train)).passes
    epochs = sorted({*fitted_epochs(passes), passes})
    if len(epochs) < LEAST_EPOCHS:
        raise ValueError(
            f"the scaling law needs the errors after at least {LEAST_EPOCHS} epochs; these students train for {passes}"
        )

    def build(work: Path) -> Product:
        curves = torch.tensor([curve for stage in trained for curve in lab.entry(stage).meta["curves"]])
        errors = (1 - curves.mean(0) / 100).tolist()
        law = fit_scaling_law(count, errors, epochs, GRID, likelihood=LIKELIHOOD)
        facts = {"a": law.a, "d": law.d, "r2": law.r2, "b_range": law.b_range, "tau_range": law.tau_range}
        made = {"errors": torch.tensor(errors), "law": torch.tensor(law.curve), "epochs": torch.tensor(epochs)}
        return Product(made, {"b": [law.b], "tau": [law.tau], **facts, "seeds": [0]})

    settings = {"images": count, "epochs": epochs, "grid": GRID, "likelihood": LIKELIHOOD}
    return lab.stage("law", settings, trained, build, 0.0, f"scaling law of {len(trained)} students", *trained)


def _similar(lab: Lab, setup: MatchingSetup, trained: Stage, reference: Stage) -> Stage:
    """CKA of each layer of the full-data network with each of a student's; the number is the mean of the diagonal."""
    on = matching_stages.task_of(lab, setup)
    pixels, _, rows = test_sample(lab, setup)
    pixels = pixels[torch.randperm(len(rows), generator=rng(0, "CKA order"))]  # a batch has images of every class

    def build(work: Path) -> Product:
        (theirs,), matrices = networks_of(lab, setup, reference), []
        for net in networks_of(lab, setup, trained):
            matrix, names, _ = similarity(
                theirs, net, pixels, prepare=on.prepare, device=on.device, batch=min(256, len(pixels))
            )
            matrices.append(matrix)
        found = torch.stack(matrices)  # [students, L, L]
        own = found.diagonal(dim1=1, dim2=2)
        meta = {"CKA": own.mean(1).tolist(), "by_layer": dict(zip(names, own.T.tolist(), strict=True))}
        return Product({"similarity": found}, {**meta, "layers": names, "seeds": lab.entry(trained).meta["seeds"]})

    cost = len(rows) * 8.0 * on.flops  # two networks, and three times that for the products of their layers
    settings, inputs = {"sample": len(rows), "order": "shuffled"}, (trained, reference)
    return lab.stage("similarity", settings, inputs, build, cost, f"layers of {trained.what}", *inputs)
