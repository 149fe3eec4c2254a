"""How each method with a teacher makes its images, as stages of the store: statistics -> distill, or distill alone."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from common import datasets_decode as decoding
from common import networks, teachers
from common.augment import rng
from common.datasets import Dataset, Stream
from common.distilled import class_grid
from common.networks import forward_flops
from common.resume import passes_done, resumable
from common.store import Product
from common.views import normalise
from methods import nrr_dd, rded, sre2l, wmdd

if TYPE_CHECKING:
    from papers.setups import ImageSetup
    from papers.stages import Lab, Stage

__all__ = [
    "IMAGES", "as_bytes", "checked", "distilled_set", "random", "readable", "real_views", "sizes", "statistics",
    "untrained", "whole", "wmdd_images",
]  # fmt: skip

CHECKED = 200  # real training images that a teacher must not be near chance on
PARTS = 16  # stages that the passes of a recovery are dealt out to
BLOCK = 100  # classes whose statistics are one stage: minutes of ImageNet-1K; and whose barycenters are: seconds
SHOWN_CLASSES = 10  # of which the maps behind the images are kept, for the figures


def random(lab: Lab, setup: ImageSetup, seed: int) -> Stage:
    """Random real images, chosen anew for every seed: the honest baseline."""
    train, ipc = lab.data(setup.dataset, "train"), setup.distill["ipc"]

    def build(work: Path) -> Product:
        check_ipc(train, ipc)
        g = rng(seed, "random")
        rows = [train.class_indices(k) for k in range(len(train.classes))]
        chosen = torch.cat([r[torch.randperm(len(r), generator=g)[:ipc]] for r in rows])
        pixels = real_views(train, chosen, setup).cpu()
        if not isinstance(train, Stream):  # those stay bytes: a hundred of each class of ImageNet-1K are 15 GB
            pixels = pixels.float() / 255
        tensors = {"images": pixels, "labels": train.labels.cpu()[chosen]}
        return distilled_set(tensors, {"method": "random"}, train)

    settings = {"method": "random", "ipc": ipc, "size": setup.size, "shorter": setup.shorter, "seed": seed}
    what = f"random real images, {setup.run_on}, IPC {ipc}, seed {seed}"
    return lab.stage("distill", settings, (train.fingerprint,), build, 0.0, what)


# ---------------------------------------------------------------- WMDD


def statistics(lab: Lab, setup: ImageSetup, layer: int) -> tuple[Stage, ...]:
    """Features and BatchNorm statistics, a stage for each block of classes."""
    teacher, train = lab.teacher(setup), lab.data(setup.dataset, "train")
    classes = len(train.classes)
    settings = {"layer": layer, "size": setup.size, "shorter": setup.shorter}
    if layer:
        settings["module"] = _name_in(untrained(setup.network, classes, setup.size), layer)

    def block(numbers: range) -> Stage:
        def build(work: Path) -> Product:
            batches = functools.partial(lab.class_batches, setup)
            stats = wmdd.statistics(checked(lab, setup, teacher), batches, numbers, layer=layer)
            return Product(stats.tensors(), {"layer": layer})

        part = {} if len(numbers) == classes else {"classes": [numbers.start, numbers.stop]}
        images = len(train) * len(numbers) / classes
        cost = 4 * images * forward_flops(setup.network, setup.size)  # in fp32
        what = f"features and BatchNorm statistics{_of(numbers, classes)}, {setup.run_on}"
        return lab.stage("statistics", settings | part, (teacher, train.fingerprint), build, cost, what, teacher)

    return tuple(map(block, _blocks(classes)))


def _blocks(classes: int) -> list[range]:
    return [range(first, min(first + BLOCK, classes)) for first in range(0, classes, BLOCK)]


def _of(numbers: range, classes: int) -> str:
    return "" if len(numbers) == classes else f" of classes {numbers.start} to {numbers.stop - 1}"


def _moments(lab: Lab, stats: tuple[Stage, ...]) -> dict[str, Tensor]:
    """BatchNorm statistics of all classes, [K, channels] each, without the features, which are gigabytes."""
    found = [lab.entry(stage).tensors("mean", "var") for stage in stats]
    return {name: torch.cat([t[name] for t in found]) for name in ("mean", "var")}


def _name_in(net: torch.nn.Module, layer: int) -> str:
    """What a layer is called in its network, so that no result of one is taken for another's."""
    wanted = wmdd.layer_of(net, layer)
    return next(name for name, module in net.named_modules() if module is wanted)


def barycenters(lab: Lab, setup: ImageSetup, config: wmdd.Config) -> tuple[Stage, ...]:
    """Atoms and weights, a stage for each block of classes."""
    stats, classes = statistics(lab, setup, config.layer), len(lab.data(setup.dataset, "train").classes)

    def block(numbers: range, own: Stage) -> Stage:
        def build(work: Path) -> Product:
            none = dict.fromkeys(("mean", "var"), torch.empty(classes, 0))  # the features are all that is asked for
            real = wmdd.Statistics(**lab.entry(own).tensors("features", "labels"), **none)
            rows = slice(numbers.start, numbers.stop)
            atoms, weights = wmdd.barycenters(real, config, rng(0, "barycenters"), rows)
            return Product({"atoms": atoms, "weights": weights}, {})

        settings = {k: getattr(config, k) for k in ("ipc", "feature", "weights")}
        settings |= {"classes": [numbers.start, numbers.stop], "seed": 0}
        what = f"barycenters{_of(numbers, classes)}, {setup.run_on}, IPC {config.ipc}"
        return lab.stage("barycenters", settings, (own,), build, 0.0, what, own)

    return tuple(map(block, _blocks(classes), stats))


def wmdd_images(lab: Lab, setup: ImageSetup, _: int = 0) -> Stage:
    """One set serves all seeds of students, as in the paper."""
    config = wmdd.Config(**{"precision": lab.precision, **setup.distill})
    train = lab.data(setup.dataset, "train")
    _check(wmdd, config, setup, train)
    teacher, stats, blocks = lab.teacher(setup), statistics(lab, setup, config.layer), barycenters(lab, setup, config)
    rows = [number for number, _ in wmdd.passes(len(train.classes), config)]

    def targets() -> tuple[Tensor, Tensor]:
        found = [lab.entry(block).tensors() for block in blocks]
        return torch.cat([t["atoms"] for t in found]), torch.cat([t["weights"] for t in found])

    def recover(work: Path, part: slice) -> tuple[Tensor, list]:
        none = {"features": torch.empty(0, 0), "labels": torch.empty(0, dtype=torch.int64)}  # the atoms stand for them
        real = wmdd.Statistics(**none, **_moments(lab, stats))
        with resumed(work, wmdd.RecoverState.restore, len(rows[part]), config) as (state, on_step, losses):
            images = wmdd.recover(
                lab.restored(teacher), real, *targets(), config, size=setup.size, mean=train.mean, std=train.std,
                generator=rng(0, "wmdd"), part=part, state=state, on_step=on_step,
            )  # fmt: skip
        return images, losses

    settings = {"method": "wmdd", "config": asdict(config), "size": setup.size, "seed": 0}
    what = f"WMDD, {setup.run_on}, IPC {config.ipc}"
    cost = 3 * len(train.classes) * config.ipc * config.iterations * forward_flops(setup.network, setup.size)
    inputs = (*stats, teacher, *blocks)
    parts, recovered = _in_parts(lab, recover, rows, settings, inputs, cost, what)

    def build(work: Path) -> Product:
        images, losses = recovered(work)
        labels = torch.arange(len(train.classes)).repeat_interleave(config.ipc)
        atoms, weights = targets()
        tensors = {"images": images, "labels": labels, "weights": weights.flatten(), "atoms": atoms}
        return distilled_set(tensors, {"method": "wmdd", "losses": losses}, train)

    rest = 0.0 if parts else cost
    return lab.stage("distill", settings, (*inputs, *parts), build, rest, what, teacher, *stats, *blocks, *parts)


# ---------------------------------------------------------------- long recoveries in parts


def _in_parts(
    lab: Lab, recover: Callable[[Path, slice], tuple[Tensor, list]], rows: list[Tensor], settings: dict,
    inputs: tuple, cost: float, what: str,
) -> tuple[tuple[Stage, ...], Callable[[Path], tuple[Tensor, list]]]:  # fmt: skip
    """The independent passes of a recovery as stages that can run at once, and what gives all images and losses.

    rows: the numbers of the images of each pass; recover(work, part) -> images of the passes of a part by ascending
    number, and losses.  With one pass there are no such stages and the images are made where they are asked for.
    """
    if len(rows) == 1:
        return (), lambda work: recover(work, slice(None))
    numbers, passes = [row.flatten() for row in rows], math.ceil(len(rows) / PARTS)
    total = sum(map(len, numbers))

    def stage(part: slice) -> Stage:
        own = torch.cat(numbers[part]).sort().values

        def build(work: Path) -> Product:
            images, losses = recover(work, part)
            return Product({"images": images, "numbers": own}, {"losses": losses})

        here, share = settings | {"passes": [part.start, part.stop]}, cost * len(own) / total
        named = f"passes {part.start} to {part.stop - 1} of {len(rows)}, {what}"
        return lab.stage("recover", here, inputs, build, share, named, *(i for i in inputs if not isinstance(i, str)))

    parts = tuple(stage(slice(i, min(i + passes, len(rows)))) for i in range(0, len(rows), passes))

    def gathered(work: Path) -> tuple[Tensor, list]:
        entries = [lab.entry(part) for part in parts]
        tensors = [entry.tensors() for entry in entries]
        order = torch.cat([t["numbers"] for t in tensors]).argsort()
        losses = [
            [part.settings["passes"][0] + number, step, loss]
            for part, entry in zip(parts, entries, strict=True) for number, step, loss in entry.meta["losses"]
        ]  # fmt: skip
        return torch.cat([t["images"] for t in tensors])[order], losses

    return parts, gathered


# ---------------------------------------------------------------- SRe2L, RDED, NRR-DD


def sre2l_images(lab: Lab, setup: ImageSetup, _: int = 0) -> Stage:
    config = sre2l.Config(**{"precision": lab.precision, **setup.distill})
    train = lab.data(setup.dataset, "train")
    classes = len(train.classes)
    _check(sre2l, config, setup, train)

    teacher, plan = lab.teacher(setup), sre2l.passes(classes, config)

    def recover(work: Path, part: slice) -> tuple[Tensor, list]:
        start = None
        if config.init == "real":
            rows = sre2l.drawn(train.labels.cpu(), config.ipc, rng(0, "start"))
            start = lambda number: real_views(train, rows[number], setup).cpu().float() / 255  # noqa: E731
        with resumed(work, sre2l.RecoverState.restore, len(plan[part]), config) as (state, on_step, losses):
            images = sre2l.recover(
                checked(lab, setup, teacher), classes, config, size=setup.size, channels=len(train.mean),
                mean=train.mean, std=train.std, generator=rng(0, "sre2l"), start=start, part=part, state=state,
                on_step=on_step,
            )  # fmt: skip
        return images, losses

    settings = {"method": "sre2l", "config": asdict(config), "size": setup.size, "seed": 0}
    what, inputs = f"SRe2L, {setup.run_on}, IPC {config.ipc}", (teacher, train.fingerprint)
    cost = 3 * classes * config.ipc * config.iterations * forward_flops(setup.network, setup.size)
    parts, recovered = _in_parts(lab, recover, plan, settings, inputs, cost, what)

    def build(work: Path) -> Product:
        images, losses = recovered(work)
        tensors = {"images": images, "labels": torch.arange(classes).repeat_interleave(config.ipc)}
        return distilled_set(tensors, {"method": "sre2l", "losses": losses}, train)

    rest = 0.0 if parts else cost
    return lab.stage("distill", settings, (*inputs, *parts), build, rest, what, teacher, *parts)


def rded_images(lab: Lab, setup: ImageSetup, _: int = 0) -> Stage:
    config = rded.resolved(rded.Config(**{"precision": lab.precision, **setup.distill}), setup.size)
    train = lab.data(setup.dataset, "train")
    _check(rded, config, setup, train)

    def make(teacher: torch.nn.Module, **rest) -> dict[str, Tensor]:
        made = rded.distill(
            whole(train), train.labels, teacher, config, size=setup.size, sizes=sizes(train), mean=train.mean,
            std=train.std, generator=rng(0, "rded"), **rest,
        )  # fmt: skip
        return {name: made[name] for name in ("images", "labels")}

    looked = len(train.classes) * config.pool * config.crops
    return _with_teacher(lab, setup, "rded", config, make, rded.State.restore, len(train.classes), looked)


DISCOVERY = (  # what CIDD reads
    "ipc", "pool", "crops", "crop_area", "kept", "cam_score", "cam_relu", "cam_resize", "confidence", "patches",
    "precision",
)  # fmt: skip


def cidd_images(lab: Lab, setup: ImageSetup, _: int = 0) -> Stage:
    """The first stage of NRR-DD alone; every refinement of these images starts from it."""
    config = nrr_dd.Config(
        **{k: v for k, v in {"precision": lab.precision, **setup.distill}.items() if k in DISCOVERY}
    )
    train = lab.data(setup.dataset, "train")
    _check(nrr_dd, config, setup, train)

    def make(teacher: torch.nn.Module, **rest) -> dict[str, Tensor]:
        images = nrr_dd.discover(
            whole(train), train.labels, teacher, config, size=setup.size, sizes=sizes(train), mean=train.mean,
            std=train.std, generator=rng(0, "cidd"), **rest,
        )  # fmt: skip
        return {"images": images, "labels": torch.arange(len(train.classes)).repeat_interleave(config.ipc)}

    looked = len(train.classes) * config.pool * (1 + config.kept)
    return _with_teacher(lab, setup, "cidd", config, make, nrr_dd.Discovery.restore, len(train.classes), looked)


def nrr_dd_images(lab: Lab, setup: ImageSetup, _: int = 0) -> Stage:
    """Keeps, of the first classes, the images before refinement and their masks too."""
    config = nrr_dd.Config(
        **{k: v for k, v in {"precision": lab.precision, **setup.distill}.items() if k not in nrr_dd.TRANSFER}
    )
    train, start = lab.data(setup.dataset, "train"), cidd_images(lab, setup)
    shown = slice(0, SHOWN_CLASSES * config.ipc, config.ipc)

    def make(teacher: torch.nn.Module, state: nrr_dd.State | None, on_step: Callable) -> dict[str, Tensor]:
        found, facts = lab.entry(start).tensors(), {"mean": train.mean, "std": train.std, "generator": rng(0, "nrr_dd")}
        state = state or nrr_dd.begin(teacher, found["images"], found["labels"], config, **facts)
        before, mask = state.before[shown].clone(), state.mask[shown].clone()
        images = nrr_dd.refine(
            teacher, state.before, found["labels"], config, state=state, on_step=on_step, **facts
        )  # fmt: skip
        return {"images": images, "labels": found["labels"], "before": before, "mask": mask}

    forwards = 2 if config.label_refinement else 1
    made = len(train.classes) * config.ipc
    passes, looked = math.ceil(made / config.batch), 3 * forwards * made * config.iterations
    return _with_teacher(lab, setup, "nrr_dd", config, make, nrr_dd.State.restore, passes, looked, start)


def _with_teacher(
    lab: Lab, setup: ImageSetup, name: str, config, make: Callable, restore: Callable, passes: int, looked: int,
    *needs: Stage,
) -> Stage:  # fmt: skip
    """The distill stage of a method that needs a teacher and, at most, the training images.

    make(teacher, state=, on_step=) -> tensors; passes: batches or classes, one after the other; looked: forward passes
    of one image, for the estimate of time; needs: stages that it starts from.
    """
    teacher, train = lab.teacher(setup), lab.data(setup.dataset, "train")

    def build(work: Path) -> Product:
        net = checked(lab, setup, teacher)
        with resumed(work, restore, passes, config) as (state, on_step, losses):
            tensors = make(net, state=state, on_step=on_step)
        return distilled_set(tensors, {"method": name, "losses": losses}, train)

    settings = {"method": name, "config": asdict(config), "size": setup.size, "seed": 0}
    what = f"{name.upper().replace('_', '-')}, {setup.run_on}, IPC {config.ipc}"
    cost = looked * forward_flops(setup.network, setup.size)
    return lab.stage("distill", settings, (teacher, train.fingerprint, *needs), build, cost, what, teacher, *needs)


def checked(lab: Lab, setup: ImageSetup, teacher: Stage) -> torch.nn.Module:
    """The trained teacher; ValueError where it is near chance on real training images."""
    net, train = lab.restored(teacher), lab.data(setup.dataset, "train")
    rows = torch.linspace(0, len(train) - 1, min(CHECKED, len(train))).long()
    pixels, rows = readable(train, rows, setup)
    views = normalise(pixels.to(lab.device), train.mean, train.std)
    teachers.check(net, views, train.labels.cpu()[rows], train.classes)
    return net


def whole(train: Dataset | Stream) -> Tensor | Callable:
    """Pixels as they are stored, or what reads those of some rows."""
    return train.whole if isinstance(train, Stream) else train.images


def sizes(train: Dataset | Stream) -> Tensor | None:
    return None if isinstance(train, Stream) else train.sizes


@functools.cache
def untrained(network: str, classes: int, size: int) -> torch.nn.Module:
    """Without numbers, on the meta device: a plan tries hundreds of cells, and a pass takes no arithmetic there."""
    return networks.make(network, classes=classes, size=size, generator=rng(0)).to("meta")


def _check(method, config, setup: ImageSetup, train: Dataset | Stream) -> None:
    """ValueError for a cell that cannot work, when it is planned: no teacher has to be trained first."""
    _tried(method, config, setup.network, setup.size, train)


@functools.cache  # cells share their images
def _tried(method, config, network: str, size: int, train: Dataset | Stream) -> None:
    side = None if isinstance(train, Stream) else train.short_side
    method.check(config, untrained(network, len(train.classes), size), train.labels, size=size, side=side)


def real_views(train: Dataset | Stream, rows: Tensor, setup: ImageSetup) -> Tensor:
    """Centre views uint8 [B, C, size, size] of some training images; ValueError names those that cannot be read."""
    pixels, found = readable(train, rows, setup)
    if missing := sorted(set(rows.tolist()) - set(found.tolist())):
        names = ", ".join(decoding.name_of(train.item(i), i) for i in missing[:5])
        raise ValueError(
            f"{len(missing)} of the {len(rows)} images asked of {train.name} cannot be read ({names}"
            f"{', ...' if len(missing) > 5 else ''}); repair or remove these files"
        )
    return pixels


def readable(train: Dataset | Stream, rows: Tensor, setup: ImageSetup) -> tuple[Tensor, Tensor]:
    """Centre views uint8 [B, C, size, size] of some training images and which ones these are, int64 [B]: a stream
    leaves out what cannot be read."""
    if isinstance(train, Stream):
        pixels = torch.empty(len(rows), train.channels, setup.size, setup.size, dtype=torch.uint8)
        found = torch.empty(len(rows), dtype=torch.int64)
        count = 0
        for images, _, chosen in train.batches(rows, 256, setup.size, "center", 0, 0):
            here = slice(count, count + len(chosen))
            pixels[here], found[here], count = images, chosen, here.stop
        return pixels[:count], found[:count]
    return train.center(setup.size, rows, shorter=setup.shorter), rows


def resumed(work: Path, restore: Callable, passes: int, config) -> AbstractContextManager[tuple]:
    """`resumable` for so many passes of config.iterations steps, or for classes that are made one by one."""

    def curve(state) -> list | None:
        step = getattr(state, "step", 0)  # states of RDED, CIDD and CA2D count classes alone
        return [state.number, step, state.loss] if step and step % 50 == 0 and math.isfinite(state.loss) else None

    iterations = getattr(config, "iterations", 1)
    return resumable(work, restore, passes * iterations, done=passes_done(iterations), curve=curve)


def distilled_set(tensors: dict[str, Tensor], meta: dict, train: Dataset | Stream) -> Product:
    preview = class_grid(tensors["images"], tensors["labels"])
    meta |= {"classes": list(train.classes), "mean": list(train.mean), "std": list(train.std)}
    meta["bytes"] = tensors["images"].numel()  # stored as uint8
    return Product(tensors, meta, {"preview.png": preview})


def as_bytes(images: Tensor) -> Tensor:
    """Images on the [0, 1] scale -> uint8 by truncation, as the released code stores them; uint8 ones as they are.

    A thousand at a time: a hundred images of each class of ImageNet-1K are 60 GB of floats.
    """
    if images.dtype == torch.uint8:
        return images
    return torch.cat([(part.clamp(0, 1) * 255).to(torch.uint8) for part in images.split(1000)])


def through_jpeg(images: Tensor, quality: int) -> Tensor:
    """uint8 [M, C, S, S] as JPEG files of this quality hold them, colours at half the resolution."""

    def kept(image: Tensor) -> Tensor:
        file = io.BytesIO()
        to_pil_image(image).save(file, "JPEG", quality=quality)
        return pil_to_tensor(Image.open(file))

    return torch.stack([kept(image) for image in images.cpu()]).to(images.device)


def check_ipc(data: Dataset | Stream, ipc: int) -> None:
    """ValueError for a class with fewer real images than `ipc`."""
    counts = torch.bincount(data.labels.cpu(), minlength=len(data.classes))
    if int(counts.min()) < ipc:
        k = int(counts.argmin())
        raise ValueError(
            f"ipc={ipc} is more than the {int(counts[k])} images of class {data.classes[k]!r} of {data.name}"
        )


IMAGES: dict[str, Callable[[Lab, ImageSetup, int], Stage]] = {
    "random": random, "wmdd": wmdd_images, "sre2l": sre2l_images, "cda": sre2l_images, "dwa": sre2l_images,
    "rded": rded_images, "cidd": cidd_images, "nrr_dd": nrr_dd_images,
}  # fmt: skip
