"""Protocols: how the matching papers and their successors train students on a distilled set, by name.

    PROTOCOLS["dm-2023"], replace(PROTOCOLS["dm-2023"], epochs=100)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields

from common.augment import STRATEGY

__all__ = ["LARGE_SCALE", "PROTOCOLS", "Protocol", "large_scale"]


def _option(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Protocol:
    """How students are trained; the defaults are those of DC's released code, which its successors kept.

    schedule "step-half": E + 1 passes; after pass E // 2 + 1, counted from 0, a tenth of lr and a new optimiser, which
    forgets the momentum.  "constant" and "cosine" (to 0, one step a pass): E passes.
    """

    name: str
    epochs: int = _option(1000, "E, which schedule makes passes of", unit="epochs", minimum=1)
    batch: int = _option(256, "images of a step; the last one of a pass may have fewer", unit="images", minimum=1)
    optimizer: str = _option("sgd", "optimiser", choices=("sgd", "adam", "adamw"))
    lr: float | None = _option(0.01, "first learning rate; None: the step size that was learned with the images")
    momentum: float = _option(0.9, "momentum of SGD", minimum=0)
    weight_decay: float = _option(5e-4, "weight decay, on all parameters", minimum=0)
    schedule: str = _option("step-half", "course of the learning rate", choices=("step-half", "constant", "cosine"))
    augment: str = _option("", "strategy of DiffAugment: an operation a batch, values of its own for each image")
    labels: str = _option("hard", "class numbers; cross-entropy with softmax(logits); KL of logits at a temperature, "
                          "one a image or (online) the teacher's of every augmented view",
                          choices=("hard", "soft", "kl", "online"))  # fmt: skip
    temperature: float = _option(1.0, "of labels=kl and labels=online")
    t_squared: bool = _option(False, "the loss of labels=kl and labels=online times the squared temperature")
    source: str = _option("", "where the settings come from")

    def __post_init__(self):
        for f in fields(self):
            value, low, allowed = getattr(self, f.name), f.metadata.get("minimum"), f.metadata.get("choices")
            if allowed and value not in allowed:
                raise ValueError(f"protocol.{f.name}={value!r} is unknown; allowed: {', '.join(allowed)}")
            if low is not None and not value >= low:
                raise ValueError(f"protocol.{f.name}={value!r} is too small; the least is {low}")
        if not self.temperature > 0 or not (self.lr is None or self.lr > 0):
            raise ValueError(f"protocol.lr={self.lr} and protocol.temperature={self.temperature} must be above 0")

    def settings(self) -> dict:
        """What decides results: all but the source, and a factor where there is one."""
        left_out = ("source",) if self.t_squared else ("source", "t_squared")
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @property
    def passes(self) -> int:
        return self.epochs + (self.schedule == "step-half")

    def restarts(self, epoch: int) -> bool:
        """Whether pass `epoch`, counted from 0, begins with a new optimiser."""
        return epoch == 0 or (self.schedule == "step-half" and epoch == self.epochs // 2 + 2)

    def rate(self, lr: float, epoch: int) -> float:
        """Learning rate of pass `epoch`, counted from 0."""
        if self.schedule == "cosine":
            return lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return lr * (0.1 if self.schedule == "step-half" and epoch > self.epochs // 2 + 1 else 1.0)


DSA = STRATEGY  # for sets of digits pass an augmentation of your own
_DC, _HARD_TRUTHS = "VICO-UoE/DatasetCondensation", "Rethinking Dataset Distillation (CVPR 2026), supplement, table 1"
PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        # DC also has an older augmentation, for MNIST and for BatchNorm students only (with E = 1000): not here.
        Protocol("dc-2021", epochs=300, source=f"{_DC}, main.py and utils.py"),
        Protocol("dsa-2021", augment=DSA, source=f"{_DC}, main.py --method DSA"),
        Protocol("dm-2023", augment=DSA, source=f"{_DC}, main_DM.py"),
        # FTD and ATT test their sets the same way.
        Protocol("mtt-2022", lr=None, augment=DSA, source="GeorgeCazenavette/mtt-distillation, distill.py, utils.py"),
        Protocol(
            "datm-2024", batch=128, lr=None, augment=DSA, labels="soft",
            source="NUS-HPC-AI-Lab/DATM, distill/evaluation.py, utils/utils_baseline.py",
        ),
        # One learning rate for every method, never whitened; -plain is the script's default, the other one its --dsa.
        Protocol("dcbench-2022", augment=DSA, source="justincui03/dc_benchmark, evaluator.py --dsa"),
        Protocol("dcbench-2022-plain", epochs=300, source="justincui03/dc_benchmark, evaluator.py"),
        Protocol(
            "mixing-2025", epochs=300, optimizer="adam", lr=1e-3, momentum=0.0, weight_decay=0.0, schedule="constant",
            source="IanPons/Enhancing-Distilled-Datasets, load_train_compare.py",
        ),
        Protocol(
            "mixing-2025-dsa", epochs=300, optimizer="adam", lr=1e-3, momentum=0.0, weight_decay=0.0,
            schedule="constant", augment=DSA, source="the same with the augmentation of DSA: not of the paper",
        ),
        Protocol("hard-truths-hard", epochs=300, augment=DSA, source=f"{_HARD_TRUTHS}, small scale, HL"),
        # Weight decay is not stated, 0.01 is AdamW's default; nor is a factor T^2: left out, as AdamW sees a constant
        # factor only through its epsilon.
        Protocol(
            "hard-truths-soft", epochs=300, optimizer="adamw", lr=1e-3, momentum=0.0, weight_decay=0.01,
            schedule="cosine", augment=DSA, labels="kl", temperature=20.0, source=f"{_HARD_TRUTHS}, small scale, SL",
        ),
        # The supplement gives SL+KD for ImageNet-1K only; here it is SL with a teacher that sees each view.
        Protocol(
            "hard-truths-online", epochs=300, optimizer="adamw", lr=1e-3, momentum=0.0, weight_decay=0.01,
            schedule="cosine", augment=DSA, labels="online", temperature=20.0, source="SL with the teacher online",
        ),
    )
}  # fmt: skip


# ---------------------------------------------------------------- Hard Truths at ImageNet scale

# Fields of a `common.views.Recipe`.  Table 1 gives epochs, loss, optimiser, rate, schedule, batch, augmentation and the
# length of the warm-up; momentum, decay and the crop of soft labels are the usual ones and EDC's.  The -soft regime has
# one label an image, that of the image as it is; -online has those of every view.
_SOFT = {
    "epochs": 200, "batch": 128, "optimizer": "adamw", "lr": 1e-3, "warmup": 5, "weight_decay": 0.01, "labels": "soft",
    "temperature": 20.0, "crop": 0.5,
}  # fmt: skip
LARGE_SCALE: dict[str, dict] = {
    "hard-truths-large-hard": {
        "epochs": 200, "optimizer": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 1e-4, "decay_all": True,
        "labels": "hard", "crop": 0.08, "cutmix": False,
    },
    "hard-truths-large-soft": {**_SOFT, "cutmix": False},
    "hard-truths-large-online": {**_SOFT, "cutmix": True},
}  # fmt: skip


def large_scale(name: str, ipc: int, classes: int) -> dict:
    """The recipe of a student of `ipc` images a class: table 1 of the supplement, columns of ImageNet-1K.

    Hard labels have batches of 50, 128 and 200 at IPC 10, 50 and 100; between and beyond, those of the next one listed.
    Sets of few classes, which the paper has not, take RDED's batch of 10, 50 or 100 and a smaller rate.
    """
    if name not in LARGE_SCALE:
        raise ValueError(f"protocol {name!r} is unknown at ImageNet scale; allowed: {', '.join(LARGE_SCALE)}")
    recipe, hard = {"name": name, **LARGE_SCALE[name]}, name.endswith("-hard")
    if classes <= 20:
        return recipe | {"batch": 10 if ipc <= 1 else 50 if ipc <= 10 else 100} | ({"lr": 0.1} if hard else {})
    return recipe | ({"batch": 50 if ipc <= 10 else 128 if ipc <= 50 else 200} if hard else {})
