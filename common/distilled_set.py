"""`DistilledSet`: synthetic images with everything needed to train on them, and its one-file form."""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.store import canonical, digest, storable, write_atomic

FORMAT = "distilled set 1"
TENSORS = ("images", "labels", "soft_labels", "weights")


@dataclass(frozen=True, eq=False)
class DistilledSet:
    """M synthetic images of K classes, checked when made (ValueError says what does not fit).

    images: float32 [M, C, H, W], pixels on the [0, 1] scale, not clipped (optimised images may lie outside).
    labels: int64 [M], positions in `classes`. classes: K names in the order of the labels.
    mean, std: per channel, on the [0, 1] scale; networks are fed (images - mean) / std.
    soft_labels: float [M, K], logits before the softmax. weights: float [M], weight of each image, not negative.
    student_lr: learning rate learned with the images. settings: JSON-able, what made the set.
    whitening: for sets distilled under ZCA, {"zca_eps", "fitted_on"}: networks are fed the images whitened by
    common.augment.ZCA, fitted on the training images with this fingerprint, and not normalised.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    soft_labels: Tensor | None = None
    weights: Tensor | None = None
    student_lr: float | None = None
    whitening: dict | None = None
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        images = self.images
        _require(images.dtype == torch.float32 and images.ndim == 4 and images.numel() > 0,
                 f"images must be float32 [M, C, H, W] with M > 0, not {_described(images)}")
        count, channels, classes = images.shape[0], images.shape[1], len(self.classes)
        for name in ("classes", "mean", "std"):
            _require(isinstance(getattr(self, name), tuple), f"{name} must be a tuple, not {getattr(self, name)!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            _require(len(values) == channels and all(map(math.isfinite, values)),
                     f"{name} must hold {channels} finite numbers, one for each channel, not {values}")
        _require(min(self.std) > 0, f"std must be above 0, not {self.std}")
        _require(self.labels.dtype == torch.int64 and self.labels.shape == (count,),
                 f"labels must be int64 [{count}], not {_described(self.labels)}")
        low, high = int(self.labels.min()), int(self.labels.max())
        _require(low >= 0 and high < classes, f"labels lie in {low}..{high}, not in 0..{classes - 1}")
        for name, shape in (("soft_labels", (count, classes)), ("weights", (count,))):
            values = getattr(self, name)
            if values is not None:
                _require(values.is_floating_point() and values.shape == shape,
                         f"{name} must be floating point {list(shape)}, not {_described(values)}")
        for name in TENSORS:
            values = getattr(self, name)
            _require(values is None or bool(values.isfinite().all()), f"{name} hold numbers that are not finite")
        _require(self.weights is None or float(self.weights.min()) >= 0, "weights must not be negative")
        _require(self.student_lr is None or (math.isfinite(self.student_lr) and self.student_lr > 0),
                 f"student_lr must be a finite number above 0, not {self.student_lr}")
        canonical(self.settings)  # refuses what JSON cannot hold
        canonical(self.whitening)

    def uint8(self) -> Tensor:
        """uint8 [M, C, H, W]: clamped to [0, 1], times 255, truncated (254.9 to 254) as SRe2L, WMDD and RDED do."""
        return to_uint8(self.images)

    def normalised(self) -> Tensor:
        """float32 [M, C, H, W]: (images - mean) / std, what a network is fed.

        ValueError for a whitened set, which takes `ZCA.fit(training images)(images)` instead.
        """
        if self.whitening is not None:
            raise ValueError(
                f"this set was distilled under ZCA ({self.whitening}): feed networks ZCA.fit(training images)(images)"
            )
        return (self.images - self._channels(self.mean)) / self._channels(self.std)

    def fingerprint(self) -> str:
        """sha256 over all that training on the set can see: everything but `settings`."""
        return digest(self._tensors(), self._facts(without=("settings",)))

    def save(self, path: str | Path) -> None:
        """Writes one .safetensors file, whole or not at all; OSError names a path that cannot be written."""
        tensors, facts = self._tensors(), self._facts()
        metadata = {"format": FORMAT, "facts": facts, "sha256": digest(tensors, facts)}
        write_atomic(path, save(tensors, metadata=metadata))

    def _tensors(self) -> dict[str, Tensor]:
        return storable({name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None})

    def _facts(self, without: tuple[str, ...] = ()) -> str:
        names = [item.name for item in fields(self) if item.name not in (*TENSORS, *without)]
        return json.dumps({name: getattr(self, name) for name in names}, sort_keys=True)

    def _channels(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.images.device).view(1, -1, 1, 1)


def read(path: str | Path) -> DistilledSet:
    """Reads what `DistilledSet.save` wrote; ValueError for another or a damaged file, FileNotFoundError for none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no distilled set at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a .safetensors file, but not a distilled set ('{FORMAT}')")
    if metadata.get("sha256") != digest(tensors, metadata.get("facts", "")):
        raise ValueError(f"{path} is damaged: its sha256 is not the one recorded")
    try:
        facts = json.loads(metadata["facts"])
        whole = {**facts, **{name: tuple(facts[name]) for name in ("classes", "mean", "std")}}
        return DistilledSet(**tensors, **whole)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds facts that are not JSON: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path} does not say {error.args[0]!r}, which a distilled set needs") from None
    except TypeError as error:  # a fact or tensor too many or of another type
        raise ValueError(f"{path} holds what a distilled set does not have: {error}") from None


def to_uint8(images: Tensor) -> Tensor:
    """Floats on the [0, 1] scale, of any shape, as uint8: clamped, times 255, truncated."""
    return (images.clamp(0, 1) * 255).to(torch.uint8)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"distilled set: {message}")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
