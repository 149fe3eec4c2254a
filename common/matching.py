"""What the matching methods (DC, DSA, DM, MTT, DATM) run on, for their scripts and for the papers.

A `Task` is a data set as network input, a network and the augmentation; `distil`, `experts` and `students` are the
stages on it: each works in a folder, resumes from the checkpoint there, and returns what the store keeps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import networks
from common.augment import STRATEGY, ZCA, DiffAugment, rng
from common.datasets import Dataset, Stream, info, load
from common.datasets_table import NORMALISATION
from common.distilled import DistilledSet, class_grid
from common.protocols import PROTOCOLS, Protocol
from common.resume import resumable
from common.store import Checkpoint, Product, Store
from common.students import train_students

__all__ = [
    "Task", "default_network", "distil", "experts", "facts", "preview", "random_subset", "size_of", "students",
    "task", "tested_images",
]  # fmt: skip

NO_FLIP = ("digits", "mnist", "svhn")  # mirrored digits are other signs: DSA's strategy for them leaves the flip out
ZCA_EPS = 0.1  # added to the variances, in MTT and all that came after


@dataclass(frozen=True, eq=False)
class Task:
    """A data set as network input, a network by name, and the augmentation of the data set."""

    train: Dataset
    test: Dataset
    size: int
    network: str
    device: torch.device
    whitened: bool = False
    store: Store | None = None

    @functools.cached_property
    @torch.inference_mode(False)
    def zca(self) -> ZCA | None:
        """The whitening, fitted on the training images at first use and kept in the store."""
        if not self.whitened:
            return None
        fit = lambda: ZCA.fit(self.train.images, ZCA_EPS)  # noqa: E731
        if self.store is None:
            return fit().to(self.device)
        settings, build = {"eps": ZCA_EPS, "size": self.size}, lambda _: Product(fit().to("cpu").tensors(), {})
        entry = self.store.make("zca", settings, (self.train.fingerprint,), build)
        return ZCA(**entry.tensors()).to(self.device)

    def make_network(self, generator: torch.Generator) -> nn.Module:
        return networks.make(
            self.network, classes=len(self.train.classes), size=self.size, channels=self.train.images.shape[1],
            generator=generator,
        )  # fmt: skip

    @functools.cached_property
    def augment(self) -> DiffAugment:
        """What matching and experts see: DSA's strategy."""
        return self.augmentation(STRATEGY)

    def augmentation(self, strategy: str) -> DiffAugment | None:
        """A strategy without what changes the class of these images; None where nothing is left."""
        if self.train.name in NO_FLIP:
            strategy = "_".join(name for name in strategy.split("_") if name != "flip")
        return DiffAugment(strategy) if strategy else None

    @property
    def flops(self) -> float:
        """Floating-point operations of one image's forward pass."""
        channels = self.train.images.shape[1]
        return networks.forward_flops(self.network, self.size, classes=len(self.train.classes), channels=channels)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> network input: normalised, or whitened."""
        return self.inputs(images.to(self.device).float() / 255)

    def inputs(self, pixels: Tensor) -> Tensor:
        """Pixels on the [0, 1] scale -> network input; differentiable."""
        if self.zca is not None:
            return self.zca(pixels)
        mean, std = self._normalisation
        return (pixels - mean) / std

    def pixels(self, inputs: Tensor) -> Tensor:
        """The inverse of `inputs`, not clipped."""
        if self.zca is not None:
            return self.zca.inverse(inputs)
        mean, std = (v.to(inputs.device) for v in self._normalisation)
        return inputs * std + mean

    @functools.cached_property
    @torch.inference_mode(False)  # first asked for by a test of a student, they are differentiated through later
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and std, each [C, 1, 1], on the device: copied there once, since every copy makes a GPU wait."""
        mean, std = (torch.tensor(v, device=self.device).view(-1, 1, 1) for v in (self.train.mean, self.train.std))
        return mean, std

    def distilled(self, tensors: dict[str, Tensor], settings: dict) -> DistilledSet:
        """A set in network-input space as one that can be kept: pixels and how they become network input."""
        facts = {"zca_eps": ZCA_EPS, "size": self.size, "fitted_on": self.train.fingerprint}
        whitening = None if self.zca is None else facts
        return DistilledSet(
            self.pixels(tested_images(tensors)).contiguous(), tensors["labels"], self.train.classes, self.train.mean,
            self.train.std, soft_labels=tensors.get("soft_labels"),
            student_lr=float(tensors["lr"]) if "lr" in tensors else None, weights=tensors.get("weights"),
            whitening=whitening, settings=settings,
        )  # fmt: skip


def default_network(size: int) -> str:
    """The ConvNet of the matching papers for images of this side: depth 3 at 32 px, 4 at 64, 5 at 128."""
    return f"convnet{max(3, math.ceil(math.log2(size)) - 2)}-instance"


def task(
    dataset: str, root: str | None, *, device: torch.device, size: int = 0, network: str = "", zca: bool = False,
    store: Store | None = None, channels: int = 0,
) -> Task:  # fmt: skip
    """Load a data set in its own channels and constants.  ValueError for one that does not fit into memory.

    store: keeps decoded images and the whitening.  channels: 1 or 3; 0: the set's own.
    """
    cache = None if store is None else store.root / "cache"
    try:
        own, native = info(dataset).channels, info(dataset).size
    except ValueError:
        own, native = 3, None
    channels = channels or own
    # The matching papers feed Tiny-ImageNet with ImageNet's constants; the row of its own name is SRe2L's.
    known = dataset in NORMALISATION and dataset != "tiny-imagenet"
    normalisation = dataset if known else "imagenet"
    train, test = (
        load(dataset, root, split=split, channels=channels, normalisation=normalisation, cache=cache)
        for split in ("train", "test")
    )
    if isinstance(train, Stream) or isinstance(test, Stream):
        raise ValueError(f"dataset={dataset} does not fit into memory; the matching methods want a set that does")
    size = size or native or min(128, train.short_side)
    train, test = (replace(d, images=d.center(size).to(device), sizes=None) for d in (train, test))
    found = Task(train, test, size, network or default_network(size), device, zca, store)
    found.make_network(rng(0))  # a wrong name or size shows now
    return found


def facts(on: Task, seed: int) -> dict:
    """What every stage on a task depends on besides the data; names its store entry."""
    return {"dataset": on.train.name, "size": on.size, "network": on.network, "zca": on.whitened, "seed": seed}


def random_subset(on: Task, ipc: int | Sequence[int], seed: int) -> dict[str, Tensor]:
    """Random real images as a set in network-input space, the baseline of every method.

    ipc: how many of each class, one number or one for each.
    """
    labels, generator = on.train.labels.cpu(), rng(seed, "random subset")
    counts = labels.bincount(minlength=len(on.train.classes))
    if isinstance(ipc, int):
        few = int(counts.min())
        if not 1 <= ipc <= few:
            raise ValueError(f"ipc={ipc}: the smallest class of {on.train.name} has {few} images; allowed: 1 to {few}")
        ipc = [ipc] * len(counts)
    for k, (wanted, there) in enumerate(zip(ipc, counts.tolist(), strict=True)):
        if wanted > there:
            raise ValueError(f"{wanted} images of class {k} of {on.train.name} are asked for, which has {there}")
    rows = [on.train.class_indices(k) for k in range(len(counts))]
    drawn = [torch.randperm(len(own), generator=generator) for own in rows]
    chosen = torch.cat([own[order[:n]] for own, order, n in zip(rows, drawn, ipc, strict=True)])
    return {"images": on.prepare(on.train.images[chosen]).cpu().contiguous(), "labels": labels[chosen]}


def distil(
    work: Path, on: Task, config, distill: Callable, restore: Callable, seed: int, *arguments, augmented: bool = True
) -> Product:
    """Run `distill` resumably: tensors in network-input space, a picture of the first classes, the losses."""
    every = max(1, config.iterations // 100)
    curve = lambda state: None if state.step % every else [state.step, float(state.loss)]  # noqa: E731
    with resumable(work, restore, config.iterations, curve=curve) as (state, on_step, losses):
        tensors = distill(
            on.train.images, on.train.labels, *arguments, config, make_network=on.make_network, prepare=on.prepare,
            augment=on.augment if augmented else None, generator=rng(seed, "distill"), device=on.device,
            state=state, on_step=on_step,
        )  # fmt: skip
    return Product(tensors, {"losses": losses, **size_of(tensors)}, {"preview.png": preview(on, tensors)})


def preview(on: Task, tensors: dict[str, Tensor]) -> bytes:
    """A PNG of a set in network-input space: `class_grid` of its pixels."""
    labels = tensors["labels"].cpu()
    few = (labels < 10).nonzero().flatten()
    return class_grid(on.pixels(tested_images(tensors)[few]), labels[few])


def tested_images(tensors: dict[str, Tensor]) -> Tensor:
    """The images that students train on: the averaged ones where a method keeps an average (FTD, ATT)."""
    return tensors.get("ema_images", tensors["images"])


def size_of(tensors: dict[str, Tensor]) -> dict:
    soft = tensors.get("soft_labels")
    return {"bytes": tensors["images"].numel() * 4, "label_bytes": 0 if soft is None else soft.numel() * 4}


def experts(
    work: Path, on: Task, config, train_experts: Callable, restore: Callable, seed: int, only: range | None = None
) -> Product:
    """Train expert trajectories resumably, all of config.experts or those of some numbers: one tensor [S+1, P] each."""
    numbers = range(config.experts) if only is None else only
    epochs = len(numbers) * config.epochs
    with resumable(work, restore, epochs, name="experts", unit="epoch") as (state, on_step, _):
        found = train_experts(
            on.train.images, on.train.labels, config, make_network=on.make_network, prepare=on.prepare,
            augment=on.augment, generator=rng(seed, "experts"), device=on.device, only=numbers,
            side_by_side=side_by_side(on.device, on.size), state=state, on_step=on_step,
        )  # fmt: skip
    return Product({f"expert{e:03d}": trajectory for e, trajectory in zip(numbers, found, strict=True)}, {})


def side_by_side(device: torch.device | str, size: int) -> int:
    """Experts or students that train together, stacked: small batches of up to 64 px leave a GPU idle, not a CPU."""
    return max(1, min(10, 10 * 64**2 // size**2)) if torch.device(device).type == "cuda" else 1


def students(
    work: Path, on: Task, tensors: dict[str, Tensor], protocol: str | Protocol, seeds: Sequence[int],
    dtype: torch.dtype = torch.float32, **options,
) -> Product:  # fmt: skip
    """Train and test students on a set in network-input space by a named protocol; accuracies in percent in meta.

    options: those of `train_students`; with keep=True the tensors are the students' own, named <place>/<parameter>.
    """
    protocol = PROTOCOLS[protocol] if isinstance(protocol, str) else protocol
    with tqdm(desc=f"students, {protocol.name}", unit="epoch", leave=False, disable=None) as bar:

        def on_epoch(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = train_students(
            tested_images(tensors), tensors["labels"], on.test.images, on.test.labels, make_network=on.make_network,
            protocol=protocol, seeds=seeds, prepare=on.prepare, augment=on.augmentation(protocol.augment),
            side_by_side=side_by_side(on.device, on.size),
            lr=float(tensors["lr"]) if "lr" in tensors else None, soft_labels=tensors.get("soft_labels"),
            weights=tensors.get("weights"), device=on.device, dtype=dtype,
            checkpoint=Checkpoint(work / "students.safetensors"), on_epoch=on_epoch, **options,
        )  # fmt: skip
    kept = {f"{place}/{name}": v for place, state in enumerate(found.networks) for name, v in state.items()}
    curves = {"curves": found.curves} if found.curves else {}
    return Product(kept, {"accuracies": list(found.accuracies), "best": found.best, "seeds": list(seeds), **curves})
