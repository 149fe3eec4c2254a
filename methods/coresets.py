"""Coresets: real images chosen from each class by geometry, gradients or how a network learns them.

Compared under the names of DeepCore (Guo, Zhao and Bai, DEXA 2022, arXiv 2204.08499; github.com/PatrickZH/DeepCore) and
as the baselines of Rethinking Dataset Distillation: Hard Truths about Soft Labels (CVPR 2026, arXiv 2604.18811).

    python methods/coresets.py dataset=cifar10 method=kcenter ipc=10 data=~/data    # chosen set, student accuracy

One network is trained on all images (the scoring run); after every epoch it looks once at the clean images, and what
it says of each is kept in a `Bank`, from which every selector below reads.  p = softmax(z), y one-hot, e = p - y, h
what enters the last nn.Linear, and g = [e, e h^T] the loss gradient of that layer, of which only products are needed:

    <g_i, g_j> = <e_i, e_j> (1 + <h_i, h_j>)        |g| = |e| sqrt(1 + |h|^2)        s_ij = (1 + cos(g_i, g_j)) / 2

  random             uniformly, without replacement
  kcenter            farthest-point greedy on h                                        (Sener and Savarese, 2018)
  kmeans             the images nearest to the k-means centres of h                    ("K-centers" in DC-Bench's sets)
  herding            argmin_x |(t+1) mean - sum_S h_s - h_x|                           (Welling, 2009)
  facility_location  greedy on sum_i max_{j in S} s_ij
  graphcut           greedy on sum_{i, j in S} s_ij - sum_{i in S, j in S} s_ij        (Iyer et al., 2021)
  craig              facility location on max d - d_ij, d = |g_i - g_j|, with weights  (Mirzasoleiman et al., 2020)
  glister            largest <g_x, mean g>, or with a step of the model after a pick   (Killamsetty et al., 2021)
  cal                KL between p of an image and of its ten neighbours                (Margatina et al., 2021)
  forgetting(_easy)  how often learned and lost again: most (least) first              (Toneva et al., 2019)
  el2n(_easy)        |e| at an early epoch: largest (smallest) first                   (Paul et al., 2021)
  el2n_best          the window of the EL2N order whose students do best on held-out images
  grand              |g| at that epoch                                                 (Paul et al., 2021; last layer)
  least_confidence, entropy, margin   max p, -sum p log p, gap of the two largest p    (Coleman et al., 2020)
  dyn_unc            mean over windows of J epochs of std(p_y)                         (He et al., 2024)
  dual(_beta)        mean over windows of std(p_y) (1 - mean(p_y)), first epochs only  (Cho et al., 2025)

`beta` leaves out the first share of n - I images of any order by score (EL2N fractions; SelMatch's window); methods
without such an order refuse it.  Ties go to the lower image number.  Every class gives I images, a smaller one all it
has, with a warning.

Where DeepCore or an official code differs, and what is taken here (options have both values):
  herding      DeepCore takes the argmax, which picks outliers; argmin here
  cal          DeepCore keeps the smallest symmetric divergences, the original the largest KL(neighbour | image);
               DeepCore's here, cal=largest is the original's
  glister      DeepCore's update never runs (a misspelt keyword): the first gains rank all; so here, `update` mends it
  craig        DeepCore's weights are one too high; the member counts here, which weigh the loss of students
  least conf.  DeepCore reads the largest logit; the probability here
  forgetting   an image that was never learned counts 0 in DeepCore (easiest); last of the easy ones here
  dyn_unc      the official code leaves out the last window, and has a factor of 10 that changes no ranking: neither
               is an option
  uncertainty  DeepCore's unbalanced choice has the order reversed, most certain first; most uncertain first here
  balance      EL2N, Dyn-Unc, DUAL and GraNd rank all classes together (balanced=false); by class here
  k-means      starts are compared in a random projection, `sketch` dimensions wide; the best is refined in all of them
  network      the sources score with a ResNet-18 at a rate of 0.1; the script with its students' ConvNet, at 0.01
  pretrained   DeepCore has CAL's neighbours and the k-center features of a network pretrained on ImageNet; those of the
               scoring run here, as for all others
Copied alone, as a module, it needs torch; the command line is this repository's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "METHODS", "RUN_FIELDS", "Bank", "Config", "CropFlip", "State", "candidate_windows", "check", "distill",
    "gradient_gram", "published", "score", "select",
]  # fmt: skip

GREEDY = ("kcenter", "kmeans", "herding", "facility_location", "graphcut", "craig", "glister")
# method -> the scoring run its numbers come from, see RUNS
METHODS: dict[str, str] = {
    "random": "none", "kcenter": "features", "kmeans": "features", "herding": "features",
    "facility_location": "gradients", "graphcut": "gradients", "craig": "gradients", "glister": "gradients",
    "cal": "gradients", "forgetting": "dynamics", "forgetting_easy": "dynamics", "dyn_unc": "dynamics", "el2n": "early",
    "el2n_easy": "early", "el2n_best": "early", "grand": "early", "least_confidence": "early", "entropy": "early",
    "margin": "early", "dual": "dual", "dual_beta": "dual",
}  # fmt: skip
LOWEST_FIRST = ("el2n_easy", "forgetting_easy", "least_confidence", "margin")
NO_STUDENT = "method='el2n_best' needs accuracy=(chosen, held out) -> a number, which trains a student"
BETAS = tuple(i / 10 for i in range(10))  # starts that el2n_best tries


def _option(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Config:
    """One selection and its scoring run; the defaults of the run are those of EL2N's code on CIFAR, all 200 epochs."""

    method: str = _option("kmeans", "selector", choices=tuple(METHODS))
    ipc: int = _option(10, "images kept of each class", unit="images", minimum=1)
    balanced: bool = _option(True, "rank each class alone; false: all together, for methods that score each image")
    beta: float = _option(0.0, "share of the n - ipc images of a class left out before the first in the order",
                          minimum=0, maximum=1)  # fmt: skip
    epoch: int = _option(20, "EL2N, GraNd and uncertainty are read after so many epochs", unit="epochs", minimum=1,
                         source="data_diet; 10 on ImageNet")  # fmt: skip
    window: int = _option(10, "J of Dyn-Unc and DUAL", unit="epochs", minimum=2, source="both official codes")
    dual_epochs: int = _option(30, "T, the first epochs that DUAL reads", unit="epochs", minimum=2,
                               source="CIFAR; 60 on ImageNet")  # fmt: skip
    beta_power: float = _option(4.0, "c_D of DUAL's Beta sampling", source="CIFAR; 6 in the ImageNet code")
    first: str = _option("random", "first k-center; medoid: the image nearest to the class mean",
                         choices=("random", "medoid"), source="random: DeepCore")  # fmt: skip
    starts: int = _option(10, "k-means++ starts", minimum=1)
    sketch: int = _option(128, "dimensions in which the starts are compared; 0: all", minimum=0)
    herding: str = _option("nearest", "nearest to the mean, or DeepCore's farthest", choices=("nearest", "farthest"))
    forgetting: str = _option("train", "seen while training (augmented), or in the clean look after each epoch",
                              choices=("train", "clean"))  # fmt: skip
    never: str = _option("hardest", "images never learned: hardest of all, or no event (DeepCore)",
                         choices=("hardest", "zero"))  # fmt: skip
    lc_logit: bool = _option(False, "least confidence by the largest logit (DeepCore)")
    cal: str = _option("smallest", "kept: smallest symmetric KL (DeepCore), or largest KL(neighbour|image) (original)",
                       choices=("smallest", "largest"))  # fmt: skip
    neighbours: int = _option(10, "of CAL", minimum=1, source="both codes")
    glister: str = _option("static", "static: first gains rank all (DeepCore); update: after every pick",
                           choices=("static", "update"))  # fmt: skip
    craig_extra: int = _option(0, "added to CRAIG's weights; 1 in DeepCore", minimum=0)
    # the scoring run
    epochs: int = _option(200, "length of the schedule", unit="epochs", minimum=1)
    stop: int = _option(0, "epochs really trained; 0: all of them", unit="epochs", minimum=0)
    batch: int = _option(128, "images of a step", unit="images", minimum=1)
    lr: float = _option(0.1, "first learning rate; also the step of glister=update", minimum=0)
    momentum: float = _option(0.9, "momentum of SGD", minimum=0)
    nesterov: bool = _option(True, "Nesterov momentum")
    weight_decay: float = _option(5e-4, "on all parameters", minimum=0)
    schedule: str = _option("step", "step: times gamma at the milestones; cosine: to 0, each step",
                            choices=("step", "cosine", "constant"))  # fmt: skip
    milestones: tuple[int, ...] = _option((60, 120, 160), "epochs after which the learning rate falls", unit="epochs",
                                          minimum=1)  # fmt: skip
    gamma: float = _option(0.2, "factor at a milestone", minimum=0)
    precision: str = _option("fp32", "of the network's passes", choices=("fp32", "bf16"))

    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata.get("minimum"), f.metadata.get("maximum", math.inf)
            allowed = f.metadata.get("choices")
            if allowed and value not in allowed:
                raise ValueError(f"{f.name}={value!r} is unknown; allowed: {', '.join(allowed)}")
            for v in value if isinstance(value, tuple) else (value,):
                if low is not None and not low <= v <= high:
                    raise ValueError(f"{f.name}={value!r}: allowed is {low} to {high}")
        if self.stop > self.epochs:
            raise ValueError(f"stop={self.stop} is past the end of the schedule, epochs={self.epochs}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True needs a momentum above 0")
        if not self.balanced and self.method in (*GREEDY, "el2n_best"):
            raise ValueError(f"balanced=False ranks scores of all images together; method={self.method!r} cannot")
        static = self.method == "glister" and self.glister == "static"  # the one of GREEDY with an order by score
        if self.beta and not static and self.method in (*GREEDY, "random", "dual_beta", "el2n_best"):
            raise ValueError(f"beta={self.beta} moves along an order by score; method={self.method!r} has none of its "
                             "own, pass beta=0")  # fmt: skip

    @property
    def trained(self) -> int:
        return self.stop or self.epochs


# The fields that say how the scoring run is made: banks of equal ones are equal.
RUN_FIELDS = (
    "epochs", "stop", "batch", "lr", "momentum", "nesterov", "weight_decay", "schedule", "milestones", "gamma",
    "precision",
)  # fmt: skip
# Scoring runs by (data set or None for the others, kind of METHODS).  The sources train a ResNet-18 at 0.1, for
# "features" the ConvNet at 0.01; `published` gives the rate to the network.
# "augment" is what `score` is to be given: crop-flip, crop, dsa, rrc-flip or none.  Sources: data_diet (early and
# dynamics), behaapyy/dual-pruning (dual), DeepCore (gradients), DC-Bench's evaluator (features); lengths for
# Tiny-ImageNet and ImageNet are ours.
_COSINE = {
    "schedule": "cosine", "weight_decay": 1e-4, "nesterov": False, "epoch": 10, "dual_epochs": 60, "beta_power": 6.0,
}  # fmt: skip
_FEATURES = {"epochs": 100, "lr": 0.01, "nesterov": False, "milestones": (50,), "gamma": 0.1, "batch": 256}
_TINY = {"epochs": 100, "milestones": (30, 60, 80)}
_IMAGENET = {**_COSINE, "epochs": 90, "batch": 256}
_SUBSET = {**_COSINE, "epochs": 200, "batch": 64}
RUNS: dict[tuple[str | None, str], dict] = {
    (None, "dynamics"): {"augment": "crop-flip"},
    (None, "early"): {"augment": "crop-flip", "stop": 20},
    (None, "dual"): {"augment": "crop-flip", "schedule": "cosine", "stop": 30},
    (None, "gradients"): {"augment": "none", "epochs": 10, "schedule": "constant"},
    (None, "features"): {"augment": "dsa", **_FEATURES},
    ("tiny-imagenet", "dynamics"): {"augment": "crop-flip", **_TINY},
    ("tiny-imagenet", "early"): {"augment": "crop-flip", **_TINY, "stop": 20},
    **{(s, kind): {"augment": "rrc-flip", **run, **more}
       for s, run in (("imagenet-1k", _IMAGENET), ("imagenette", _SUBSET), ("imagewoof", _SUBSET))
       for kind, more in (("dynamics", {}), ("early", {"stop": 10}), ("dual", {"stop": 60}), ("features", {}))},
    # Ours: short runs for the scanned digits, where 1,400 images make an epoch of a dozen steps.
    **{("digits", kind): {"augment": augment, "epochs": 20, "lr": 0.01, "schedule": "cosine", "epoch": 5,
                          "dual_epochs": 12, **more}
       for kind, augment, more in (("dynamics", "crop", {}), ("early", "crop", {"stop": 5}),
                                   ("dual", "crop", {"stop": 12}), ("features", "dsa", {}))},
    ("digits", "gradients"): {"augment": "none", "epochs": 10, "lr": 0.01, "schedule": "constant"},
}  # fmt: skip


def published(dataset: str, method: str, network: str = "resnet18") -> dict:
    """Settings of the scoring run of a method on a data set: fields of Config, and "augment" by name.

    network: whom it trains; ResNets at a rate of 0.1, others at 0.01.  Features (of kmeans, kcenter and herding) are
    those of a run at 0.01, but for ImageNet and its subsets.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed: {', '.join(METHODS)}")
    kind = METHODS[method]
    found = dict(RUNS.get((dataset, kind), RUNS.get((None, kind), {"augment": "none"})))
    if dataset in ("svhn", "mnist") and found["augment"] == "crop-flip":  # mirrored digits are other signs
        found["augment"] = "crop"
    if not network.startswith("resnet"):
        found["lr"] = min(found.get("lr", Config.lr), _FEATURES["lr"])
    return found


# ---------------------------------------------------------------- the bank and the scoring run


@dataclass
class Bank:
    """What a scoring run of S epochs leaves of N images; arrays that a run of another kind does not have are None."""

    labels: Tensor  # int64 [N]
    p_true: Tensor | None = None  # float32 [S, N], probability of the label, clean image, after each epoch
    p_true_train: Tensor | None = None  # float32 [S, N], the same in the training pass, augmented
    el2n: Tensor | None = None  # float32 [S, N]
    correct: Tensor | None = None  # bool [S, N]
    margin: Tensor | None = None  # float16 [S, N]
    entropy: Tensor | None = None  # float16 [S, N]
    conf: Tensor | None = None  # float16 [S, N], largest probability
    logit: Tensor | None = None  # float16 [S, N], largest logit
    h_norm: Tensor | None = None  # float16 [S, N]
    forget_train: Tensor | None = None  # int16 [N], events in training, -1 for an image that was never right
    h_final: Tensor | None = None  # float16 [N, D], of the last epoch
    err_final: Tensor | None = None  # float32 [N, K], p - y of the last epoch
    seen: Tensor | None = None  # bool [S], after which epochs the run looked; None: after all

    def need(self, name: str, method: str) -> Tensor:
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"method={method!r} needs the array {name!r}, which this bank does not have")
        return value

    def after(self, epochs: slice, method: str) -> None:
        """ValueError where the scoring run did not look after each of these epochs."""
        if self.seen is not None and not self.seen[epochs].all():
            looked = ", ".join(map(str, (self.seen.nonzero().flatten() + 1).tolist())) or "none"
            raise ValueError(f"method={method!r} reads epochs after which the run did not look; it did: {looked}")

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> Bank:
        return cls(**tensors)


@dataclass
class State:
    """Where a scoring run stands; `tensors()` is all that is needed to continue it bit for bit."""

    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]
    right: Tensor  # bool [S, N], in training
    bank: Bank
    generator: Tensor  # its state, uint8
    step: int = 0  # finished epochs
    loss: float = math.nan  # mean over the last of them

    def tensors(self) -> dict[str, Tensor]:
        parts = {"weights": self.weights, "momentum": self.momentum, "bank": self.bank.tensors()}
        return {
            **{f"{part}.{name}": t.detach().cpu().clone() for part, own in parts.items() for name, t in own.items()},
            "right": self.right.clone(), "generator": self.generator, "at": torch.tensor(self.step),
        }  # fmt: skip

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> State:
        part = lambda name: {k[len(name) + 1 :]: t for k, t in tensors.items() if k.startswith(f"{name}.")}  # noqa: E731
        return cls(part("weights"), part("momentum"), tensors["right"], Bank.restore(part("bank")),
                   tensors["generator"], int(tensors["at"]))  # fmt: skip


def learning_rate(config: Config, epoch: float) -> float:
    """Of the step that begins when `epoch` epochs, a fraction too, are done."""
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    falls = sum(epoch >= m for m in config.milestones) if config.schedule == "step" else 0
    return config.lr * config.gamma**falls


def score(
    images: Tensor | Callable,
    labels: Tensor,
    config: Config,
    *,
    make_network: Callable[[torch.Generator], nn.Module],
    prepare: Callable[[Tensor], Tensor] | None = None,
    augment: Any = None,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    state: State | None = None,
    on_step: Callable[[State], None] | None = None,
    looks: Collection[int] | None = None,
    final: bool = True,
) -> Bank:
    """Train a network on images [N, C, H, W], labels int64 [N], and look at the clean images after each epoch.

    make_network(generator): a fresh network on the CPU whose last nn.Linear gives the logits.  prepare: images, moved
    to the device -> network input; None: they are floats already.  augment: `draw(rows, generator, siamese=False)` and
    `augment(images, draw)`, or None.  `state` continues an earlier run, `on_step` sees the state after each epoch.
    Where they do not fit into memory, `images` is a function that reads them (see `reader`), and augments them itself;
    looks: the epochs, from 1, after which it looks (None: all; methods that read others refuse); final=False keeps no
    features and errors of the last epoch, the largest arrays of a bank.  Raises FloatingPointError for an epoch whose
    loss is not finite.
    """
    if not callable(images):
        _checked(images, labels, prepare)
    device, labels = torch.device(device), labels.cpu()
    net = make_network(generator)
    if not any(isinstance(m, nn.Linear) for m in net.modules()):
        raise ValueError(f"the network {type(net).__name__} has no nn.Linear layer to read features from")
    slow = any(type(m) is nn.GroupNorm for m in net.modules())  # the library's GroupNorm wants plain memory
    run = _Run(net, device, torch.contiguous_format if slow else torch.channels_last, config)
    epochs, count = config.trained, len(labels)
    if state is None:
        state = State({}, {}, torch.zeros(epochs, count, dtype=torch.bool), Bank(labels), generator.get_state())
    else:
        if state.right.shape != (epochs, count):
            raise ValueError(f"the state is of {tuple(state.right.shape)} epochs and images, not {(epochs, count)}")
        run.load(state)
        generator.set_state(state.generator)

    source = reader(images, device)

    def read(rows: Tensor, batch: int, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x if prepare is None else prepare(x), part) for x, part in source(rows, batch, epoch))

    while state.step < epochs:
        state.loss = run.train(read, labels, state, augment, generator)
        if looks is None or state.step + 1 in looks:
            run.look(read, labels, state.bank, state.step, final)
            if looks is not None:
                state.bank.seen = torch.tensor([epoch + 1 in looks for epoch in range(epochs)])
        state.weights, state.momentum = run.net.state_dict(), run.momentum()
        state.generator, state.step = generator.get_state(), state.step + 1
        if state.step == epochs:
            state.bank.forget_train = forgotten(state.right)
        if on_step:
            on_step(state)
    return state.bank


# --- begin shared block: reader (a test keeps its copies equal) ---
def reader(images: Tensor | Callable, device: torch.device) -> Callable:
    """read(rows, batch, epoch): the images of these rows on the device, a batch at a time, with the rows they are of.

    Images that do not fit into memory come from a function of the same arguments instead: it yields pixels and rows
    int64 [B], in epoch None as they are, else the augmented views of that epoch, and may leave out what is unreadable.
    """

    def held(rows: Tensor, batch: int, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images[part.to(images.device)], part) for part in rows.split(batch))

    source = images if callable(images) else held
    return lambda rows, batch, epoch: ((x.to(device), part) for x, part in source(rows, batch, epoch))


# --- end shared block ---


# --- begin shared block: seeded (a test keeps its copies equal) ---
@contextmanager
def seeded(device: torch.device, generator: torch.Generator) -> Iterator[None]:
    """Dropout takes no generator: its draws are seeded for the block, the global state is put back after it."""
    seed, cuda = int(torch.randint(2**62, (), generator=generator)), [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


# --- end shared block ---


class _Run:
    """A network, its optimiser and the hook that reads h."""

    def __init__(self, net: nn.Module, device: torch.device, layout: torch.memory_format, config: Config):
        self.net, self.device, self.layout, self.config = net.to(device, memory_format=layout), device, layout, config
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )  # fmt: skip
        self.classifier = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]

    def momentum(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {n: b for n, p in self.net.named_parameters() if (b := state[p].get("momentum_buffer")) is not None}

    def load(self, state: State) -> None:
        if state.weights:
            self.net.load_state_dict(state.weights)
        for name, parameter in self.net.named_parameters():
            if name in state.momentum:
                buffer = torch.empty_like(parameter).copy_(state.momentum[name])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer

    def logits(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            out = self.net(x.contiguous(memory_format=self.layout))
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def train(self, read, labels: Tensor, state: State, augment: Any, generator: torch.Generator) -> float:
        """One epoch; fills `right` and `p_true_train`, returns the mean loss."""
        self.net.train()
        order, batch = torch.randperm(len(labels), generator=generator), self.config.batch
        steps, total, seen, chosen = math.ceil(len(order) / batch), 0, [], []
        with seeded(self.device, generator):
            for step, (x, rows) in enumerate(read(order, batch, state.step)):
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.config, state.step + step / steps)
                y = labels[rows].to(self.device)
                if augment is not None:
                    x = augment(x, augment.draw(len(rows), generator, siamese=False))
                logits = self.logits(x)
                loss = F.cross_entropy(logits, y)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                total = total + loss.detach() * len(rows)
                p = logits.detach().softmax(1)
                seen.append(torch.stack([p.gather(1, y[:, None])[:, 0], (p.argmax(1) == y).to(p)]))
                chosen.append(rows)
        if not chosen:
            raise ValueError(f"none of the {len(labels)} images could be read")
        rows = torch.cat(chosen)
        mean = float(total) / len(rows)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss of the scoring run is {mean} in epoch {state.step + 1} (lr {self.config.lr:g}); the last "
                "good state is kept; try a smaller lr or precision=fp32"
            )
        p_true, right = torch.zeros(2, len(labels)).index_copy(1, rows, torch.cat(seen, 1).float().cpu())
        _row(state.bank, "p_true_train", state.step, self.config.trained, p_true)
        state.right[state.step] = right.bool()
        return mean

    @torch.no_grad()
    def look(self, read, labels: Tensor, bank: Bank, epoch: int, final: bool) -> None:
        """The clean images in eval mode, into row `epoch` of the bank; with `final` h and e after the last epoch."""
        self.net.eval()
        epochs, entering, chosen, found = self.config.trained, [], [], []
        hook = self.classifier.register_forward_pre_hook(lambda _, given: entering.append(given[0].flatten(1)))
        try:
            for x, rows in read(torch.arange(len(labels)), 512, None):
                entering.clear()
                logits, y = self.logits(x), labels[rows].to(self.device)
                seen = looked(logits, y, entering[-1].to(logits), final and epoch + 1 == epochs)
                found.append({k: v.cpu() for k, v in seen.items()})
                chosen.append(rows)
        finally:
            hook.remove()
        rows = torch.cat(chosen)
        for name in found[0]:
            values = torch.cat([part[name] for part in found])
            values = values.new_zeros(len(labels), *values.shape[1:]).index_copy_(0, rows, values)  # 0: not read
            if name.endswith("_final"):
                setattr(bank, name, values)
            else:
                _row(bank, name, epoch, epochs, values)


def _row(bank: Bank, name: str, epoch: int, epochs: int, values: Tensor) -> None:
    if getattr(bank, name) is None:
        setattr(bank, name, values.new_zeros(epochs, len(values)))
    getattr(bank, name)[epoch] = values


def looked(logits: Tensor, labels: Tensor, features: Tensor, last: bool) -> dict[str, Tensor]:
    """What the bank keeps of logits [B, K] and features [B, D] of a batch."""
    p = logits.softmax(1)
    top = p.topk(min(2, p.shape[1]), 1).values
    error = p - F.one_hot(labels, p.shape[1]).to(p)  # e
    found = {
        "p_true": p.gather(1, labels[:, None])[:, 0].float(), "el2n": error.norm(dim=1).float(),
        "correct": logits.argmax(1) == labels, "margin": (top[:, 0] - top[:, -1]).half(),
        "entropy": torch.special.entr(p).sum(1).half(), "conf": top[:, 0].half(), "logit": logits.amax(1).half(),
        "h_norm": features.norm(dim=1).half(),
    }  # fmt: skip
    return found | ({"h_final": features.half(), "err_final": error.float()} if last else {})


class CropFlip:
    """Crops of the image's own size after reflected padding, and flips: each image its own."""

    def __init__(self, pad: int = 4, flip: bool = True):
        self.pad, self.flip = pad, flip

    def draw(self, rows: int, generator: torch.Generator, *, siamese: bool = False) -> Tensor:
        if siamese:
            raise ValueError("siamese=True: CropFlip draws for each image, not for each class")
        return torch.rand(rows, 3, generator=generator)

    def __call__(self, images: Tensor, draw: Tensor) -> Tensor:
        """images: [B, C, H, W]; draw: [B, 3] in [0, 1) -> [B, C, H, W]."""
        draw = draw.to(images.device)
        shift = (draw[:, :2] * (2 * self.pad + 1)).long()
        rows, columns = (torch.arange(n, device=images.device) + s[:, None] for n, s in
                         zip(images.shape[2:], shift.T, strict=True))  # [B, H], [B, W]  # fmt: skip
        if self.flip:
            columns = torch.where(draw[:, 2:] < 0.5, columns.flip(1), columns)
        padded = F.pad(images, [self.pad] * 4, mode="reflect")
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


# ---------------------------------------------------------------- scores of single images


def forgotten(correct: Tensor) -> Tensor:
    """Falls from right to wrong in bool [S, N] -> int16 [N], -1 for an image that was never right."""
    events = (correct[:-1] & ~correct[1:]).sum(0)
    return torch.where(correct.any(0), events, -1).short()


def windowed(values: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and unbiased std over every `length` epochs in a row of [S, N], as pieces [S - length + 1, n] of the images.

    From running sums, in float64: the difference of two of them keeps the digits of a small std.
    """
    for piece in values.double().split(4096, 1):
        total, squares = (F.pad(v.cumsum(0), (0, 0, 1, 0)) for v in (piece, piece.square()))
        sums, squares = (v[length:] - v[:-length] for v in (total, squares))  # M, Q
        yield sums / length, ((squares - sums.square() / length) / (length - 1)).clamp(min=0).sqrt()


def dyn_unc(p_true: Tensor, window: int) -> Tensor:
    """Mean over windows of std(p): [S, N] -> [N]."""
    return torch.cat([std.mean(0) for _, std in windowed(p_true, window)])


def dual(p_true: Tensor, window: int) -> Tensor:
    """Mean over windows of std(p) (1 - mean(p)): [T, N] -> [N]."""
    return torch.cat([(std * (1 - mean)).mean(0) for mean, std in windowed(p_true, window)])


def cal(features: Tensor, p: Tensor, neighbours: int, one_sided: bool = False) -> Tensor:
    """Mean KL of p [n, K] between an image and its nearest ones in features [n, D] -> [n]; 0 for one image alone.

    Symmetric, KL(a|b) / 2 + KL(b|a) / 2 = <a - b, log a - log b> / 2; one_sided: KL(neighbour|image).
    """
    if len(p) == 1:
        return p.new_zeros(1)
    gram = _gram(features - features.mean(0))
    square = gram.diagonal().clone()
    distance = gram.mul_(-2).add_(square).fill_diagonal_(math.inf)  # up to a constant of the row
    p = p.clamp(min=1e-12)
    near = distance.topk(min(neighbours, len(p) - 1), 1, largest=False).indices
    logs = p.log()
    parts = []
    for i, j in zip(torch.arange(len(p), device=p.device).split(512), near.split(512), strict=True):
        weight = p[j] if one_sided else 0.5 * (p[j] - p[i][:, None])  # [b, neighbours, K]
        parts.append((weight * (logs[j] - logs[i][:, None])).sum(2).mean(1))
    return torch.cat(parts)


def image_score(bank: Bank, config: Config, classes: list[Tensor], device: torch.device | str = "cpu") -> Tensor:
    """The score of each image by its natural sign, float64 [N]; `classes` are their numbers, class by class."""

    def at_epoch(name: str) -> Tensor:
        bank.after(slice(config.epoch - 1, config.epoch), config.method)
        return _first(bank.need(name, config.method), config, "epoch")[-1].double()

    match config.method:
        case "el2n" | "el2n_easy" | "el2n_best":
            return at_epoch("el2n")
        case "grand":
            return at_epoch("el2n") * (1 + at_epoch("h_norm").square()).sqrt()
        case "least_confidence":
            return at_epoch("logit" if config.lc_logit else "conf")
        case "entropy" | "margin":
            return at_epoch(config.method)
        case "dyn_unc":
            p_true = bank.need("p_true", config.method)
            bank.after(slice(None), config.method)
            _first(p_true, config, "window")
            return dyn_unc(p_true, config.window)
        case "dual" | "dual_beta":
            return dual(_first_of_dual(bank, config), config.window)
        case "forgetting" | "forgetting_easy":
            if config.forgetting == "train":
                events = bank.need("forget_train", config.method)
            else:
                bank.after(slice(None), config.method)
                events = forgotten(bank.need("correct", config.method))
            return torch.where(events < 0, math.inf if config.never == "hardest" else 0.0, events.double())
    found = torch.zeros(len(bank.labels), dtype=torch.float64)
    for rows in classes:
        features, error = _entering(bank, rows, config, device), _error(bank, rows, config, device)
        if config.method == "glister":
            own = gains(error, features, error)
        else:
            p = error + F.one_hot(bank.labels[rows], error.shape[1]).to(error)
            own = cal(features, p, config.neighbours, one_sided=config.cal == "largest")
        found[rows] = own.double().cpu()
    return found


def _first(array: Tensor, config: Config, name: str) -> Tensor:
    """The first epochs of an array [S, N], as many as the option `name` says."""
    if len(array) < (epochs := getattr(config, name)):
        raise ValueError(f"{name}={epochs} of method={config.method!r} is longer than the run, {len(array)} epochs")
    return array[:epochs]


def _first_of_dual(bank: Bank, config: Config) -> Tensor:
    p_true = _first(bank.need("p_true_train", config.method), config, "dual_epochs")
    _first(p_true, config, "window")
    return p_true


def _entering(bank: Bank, rows: Tensor, config: Config, device: torch.device | str) -> Tensor:
    features = bank.need("h_final", config.method)[rows].to(device, torch.float32)
    if not features.isfinite().all():
        raise ValueError(f"the features for method={config.method!r} are not finite (float16 in the bank)")
    return features


def _error(bank: Bank, rows: Tensor, config: Config, device: torch.device | str) -> Tensor:
    error = bank.need("err_final", config.method)[rows].to(device, torch.float32)
    if not error.isfinite().all():
        raise ValueError(f"the errors for method={config.method!r} are not finite: the scoring run went astray")
    return error


# ---------------------------------------------------------------- gradients of the last layer


def _gram(x: Tensor, block: int = 1024) -> Tensor:
    """x x^T of [n, D], one triangle computed."""
    out = x.new_empty(len(x), len(x))
    for start in range(0, len(x), block):
        own, below = slice(start, start + block), slice(start + block, None)
        out[start:, own] = x[start:] @ x[own].T
        out[own, below] = out[below, own].T
    return out


def factors(error: Tensor, features: Tensor, unit: bool = False) -> tuple[Tensor, Tensor]:
    """g = e [1, h]^T as e [n, K] and [1, h] [n, 1+D]; unit: as those of g / |g|, 0 where g is."""
    ones = F.pad(features, (1, 0), value=1.0)
    return (F.normalize(error, dim=1), F.normalize(ones, dim=1)) if unit else (error, ones)


def gradient_gram(error: Tensor, features: Tensor, unit: bool = False) -> Tensor:
    """<g_i, g_j> = <e_i, e_j> (1 + <h_i, h_j>), or their cosines: e [n, K], h [n, D] -> [n, n]."""
    e, h = factors(error, features, unit)
    return _gram(h).mul_(_gram(e))


def gradient_distance(error: Tensor, features: Tensor) -> Tensor:
    """|g_i - g_j|: [n, n]."""
    gram = gradient_gram(error, features)
    square = gram.diagonal().clone()
    return gram.mul_(-2).add_(square).add_(square[:, None]).clamp_(min=0).sqrt_().fill_diagonal_(0)


def similarity(error: Tensor, features: Tensor) -> Tensor:
    """s_ij = (1 + cos(g_i, g_j)) / 2: [n, n]; 0 where a gradient is 0, even with itself."""
    alive = (error != 0).any(1)
    return gradient_gram(error, features, unit=True).add_(1).mul_(0.5).mul_(alive).mul_(alive[:, None])


def gains(error: Tensor, features: Tensor, validation: Tensor) -> Tensor:
    """<g_i, mean_j g'_j> of errors [n, K] and those of the validation images, which have the same features: [n]."""
    weight = validation.T @ features / len(features)  # the mean's part of the weights [K, D]; of the biases: mean e
    return (error * (features @ weight.T + validation.mean(0))).sum(1)


# ---------------------------------------------------------------- greedy selectors, each within one class


def kcenter(features: Tensor, count: int, first: int) -> Tensor:
    """Farthest-point greedy from image `first` of features [n, D] -> `count` row numbers."""
    chosen, distance = [first], torch.full((len(features),), math.inf, device=features.device)
    while len(chosen) < count:
        new = features[chosen[-1]][None]
        # Exact differences: the matrix product's rounding would break ties of equal images by chance.
        away = torch.cdist(features, new, compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        distance = torch.minimum(distance, away)
        distance[chosen[-1]] = -1
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen)


def medoid(features: Tensor) -> int:
    """The image with the least sum of squared distances to all: the one nearest to the mean."""
    return int((features - features.mean(0)).square().sum(1).argmin())


def lloyd(x: Tensor, centres: Tensor, most: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """k-means of x [n, D] from centres [k, D] -> centres, the cluster of each row [n], sum of squared distances."""
    of, square = None, x.square().sum(1)
    for _ in range(most):
        distance = centres.square().sum(1) - 2 * (x @ centres.T)  # without |x|^2, which changes no order
        nearest, new = distance.min(1)
        if of is not None and torch.equal(new, of):
            break
        of, size = new, new.bincount(minlength=len(centres))
        means = torch.zeros_like(centres).index_add_(0, of, x) / size.clamp(min=1)[:, None]
        centres = torch.where((size > 0)[:, None], means, centres)  # an empty cluster stays where it is
    return centres, of, (nearest + square).sum()


def plus_plus(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """First centres by k-means++ (Arthur and Vassilvitskii, 2007): each with probability as its squared distance."""
    square, chosen = x.square().sum(1), []
    distance = torch.ones_like(square)
    for u in torch.rand(count, generator=generator, dtype=torch.float64).tolist():
        edges = distance.double().cumsum(0)
        # Never an image of no weight; all have it when there are fewer different images than centres.
        chosen.append(int(torch.searchsorted(edges, u * edges[-1:], right=True).clamp(max=len(x) - 1)))
        away = (square + square[chosen[-1]] - 2 * (x @ x[chosen[-1]])).clamp(min=0)
        distance = away if len(chosen) == 1 else torch.minimum(distance, away)
        distance[chosen[-1]] = 0
    return x[chosen]


def kmeans(features: Tensor, count: int, starts: int, sketch: int, generator: torch.Generator) -> Tensor:
    """Centres [k, D] of the best of `starts`, each ten iterations in a random projection, refined in full."""
    x = features
    if 0 < sketch < x.shape[1]:
        x = x @ torch.randn(x.shape[1], sketch, generator=generator).to(x) / math.sqrt(sketch)
    tries = [lloyd(x, plus_plus(x, count, generator), 10) for _ in range(starts)]
    _, of, _ = lloyd(x, min(tries, key=lambda t: float(t[2]))[0])
    means = torch.zeros(count, features.shape[1]).to(features).index_add_(0, of, features)
    return lloyd(features, means / of.bincount(minlength=count).clamp(min=1)[:, None])[0]


def nearest_images(features: Tensor, centres: Tensor) -> Tensor:
    """One image for each centre, none twice: again and again the nearest pair of what is left -> [k]."""
    distance = torch.cdist(centres, features)  # [k, n]
    chosen = []
    for _ in range(len(centres)):
        centre, row = divmod(int(distance.argmin()), distance.shape[1])
        distance[centre], distance[:, row] = math.inf, math.inf
        chosen.append(row)
    return torch.tensor(chosen)


def herding(features: Tensor, count: int, farthest: bool = False) -> Tensor:
    """argmin_x |(t+1) mean - sum_S h - h_x|, one at a time (`farthest`: argmax): [n, D] -> [k]."""
    mean, square, sign = features.mean(0), features.square().sum(1), -1 if farthest else 1
    chosen, residual = [], torch.zeros_like(mean)
    taken = torch.zeros_like(square, dtype=torch.bool)
    for _ in range(count):
        residual = residual + mean
        cost = sign * (square - 2 * (features @ residual))  # |residual - h|^2 without |residual|^2
        chosen.append(int(cost.masked_fill(taken, math.inf).argmin()))
        taken[chosen[-1]] = True
        residual = residual - features[chosen[-1]]
    return torch.tensor(chosen)


def facility_location(similar: Tensor, count: int) -> Tensor:
    """Greedy maximum of sum_i max_{j in S} s_ij of a symmetric s >= 0 [n, n] -> [k].

    When the best similarity m_i of an image rises by d_i, the gain of x, sum_i max(0, s_ix - m_i), falls by
    sum_i clamp(s_ix - m_i, 0, d_i): only rows whose m_i rose are read, about n log k in all instead of n k.
    """
    covered = torch.zeros_like(similar[0])  # m_i
    gain, chosen = similar.sum(0).double(), []
    for _ in range(count):
        chosen.append(int(gain.argmax()))
        rise = (similar[chosen[-1]] - covered).clamp_(min=0)
        for rows in rise.nonzero().flatten().split(64):  # pieces that stay in a CPU's cache
            above = (similar[rows] - covered[rows, None]).clamp_(min=0)
            gain -= torch.minimum(above, rise[rows, None], out=above).sum(0)
        covered += rise
        gain[chosen[-1]] = -math.inf
    return torch.tensor(chosen)


def graphcut(error: Tensor, features: Tensor, count: int) -> Tensor:
    """Greedy maximum of sum_{i, j in S} s_ij - sum_{i in S, j in S} s_ij on gradients [n, .] -> [k].

    The gain of x is its sum of s over the class, less twice that over S; only the rows of the chosen are computed.
    """
    (e, h), alive = factors(error, features, unit=True), (error != 0).any(1)
    total = ((e @ (e.T @ h)) * h).sum(1)  # sum_i cos(g_x, g_i)
    gain, chosen = 0.5 * (total + alive.sum()) * alive, []
    for _ in range(count):
        chosen.append(x := int(gain.argmax()))
        gain = gain - 2 * 0.5 * (1 + (e @ e[x]) * (h @ h[x])) * alive * alive[x]
        gain[x] = -math.inf
    return torch.tensor(chosen)


def craig(error: Tensor, features: Tensor, count: int, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Facility location on max d - d_ij + 1e-3, and how many images of the class each choice is nearest to."""
    distance = gradient_distance(error, features)
    similar = distance.neg_().sub_(distance.min()).add_(1e-3)
    chosen = facility_location(similar, count)
    nearest = similar[chosen.to(similar.device)].argmax(0)
    return chosen, nearest.bincount(minlength=count).cpu().float() + extra


def glister(error: Tensor, features: Tensor, p: Tensor, count: int, lr: float) -> Tensor:
    """Greedy on <g_x, mean g'>, where g' are the gradients after a step of size lr down g of every choice -> [k].

    A step can make the logits so large that p_y rounds to 1 and every gain to 0: so e'_y = -sum of the other p, in
    float64, and on a scale of its own, which the order of the gains does not see.
    """
    own = p - error > 0.5  # one-hot
    z, now, chosen = p.double().clamp(min=1e-30).log(), error, []
    taken = torch.zeros(len(error), dtype=torch.bool, device=error.device)
    for _ in range(count):
        chosen.append(x := int(gains(error, features, now).masked_fill(taken, -math.inf).argmax()))
        taken[x] = True
        z = z - (lr * (1 + features @ features[x]))[:, None].double() * error[x].double()
        others = z.softmax(1).masked_fill(own, 0)
        now = others - own * others.sum(1, keepdim=True)
        now = (now / now.abs().amax().clamp(min=1e-300)).to(error.dtype)
    return torch.tensor(chosen)


def pick(
    bank: Bank, rows: Tensor, config: Config, generator: torch.Generator, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """The choice of a greedy method among the images `rows` of a class: numbers in it, in order, and their weights."""
    h, count = _entering(bank, rows, config, device), min(config.ipc, len(rows))
    match config.method:
        case "kcenter":
            first = int(torch.randint(len(h), (), generator=generator)) if config.first == "random" else medoid(h)
            return kcenter(h, count, first), None
        case "kmeans":
            h = h - h.mean(0)  # for the digits of squared distances
            return nearest_images(h, kmeans(h, count, config.starts, config.sketch, generator)), None
        case "herding":
            return herding(h, count, config.herding == "farthest"), None
    error = _error(bank, rows, config, device)
    match config.method:
        case "facility_location":
            return facility_location(similarity(error, h), count), None
        case "graphcut":
            return graphcut(error, h, count), None
        case "craig":
            return craig(error, h, count, config.craig_extra)
    p = error + F.one_hot(bank.labels[rows], error.shape[1]).to(error)
    return glister(error, h, p, count, config.lr), None


# ---------------------------------------------------------------- selection


def ordered(score: Tensor, rows: Tensor, count: int, lowest_first: bool, beta: float) -> Tensor:
    """`count` of the image numbers `rows` in the order of their score, after the first beta (n - count) of them."""
    order = score[rows].argsort(descending=not lowest_first, stable=True)
    skip = math.floor(beta * max(0, len(rows) - count) + 1e-9)
    return rows[order[skip : skip + count]]


def beta_sample(
    score: Tensor, mean: Tensor, rows: Tensor, count: int, power: float, generator: torch.Generator
) -> Tensor:
    """DUAL's Beta sampling: `count` of `rows` without replacement, with probability as score times Beta(mean p; a, b).

    mu: mean p of the ten highest scores; b = 15 (1 - mu) (1 - r^power), a = 16 - b, r the share that is dropped.
    """
    score, mean = score[rows], mean[rows]
    mu = mean[score.argsort(descending=True, stable=True)[:10]].mean()
    share = 1 - count / len(rows)
    b = 15 * (1 - mu) * (1 - share**power)
    inside = mean.clamp(1e-6, 1 - 1e-6)
    density = (15 - b) * inside.log() + (b - 1) * (-inside).log1p()  # a - 1 = 15 - b; up to a constant
    noise = -torch.empty(len(rows), dtype=torch.float64).exponential_(generator=generator).log()  # Gumbel: top-k draws
    return rows[(score.log() + density + noise).argsort(descending=True, stable=True)[:count]]


def select(
    bank: Bank | Tensor | Sequence[Bank],
    labels: Tensor,
    config: Config,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    accuracy: Callable[[Tensor, Tensor], float] | None = None,
) -> dict[str, Tensor]:
    """Choose ipc images of each class -> {"indices": int64 [K*I], "labels"}, grouped by class, best first.

    bank: of `score`, or features [N, D], or several banks, whose scores are averaged (the greedy methods take one).
    Also "scores" float32 [N], by their natural sign, for methods that rank by a score; "weights" float32 [K*I] for
    CRAIG; "betas" and "accuracies" [10] for el2n_best, which wants accuracy(chosen, held out) -> a number, see
    `best_window`.  A class of fewer images gives all, with a warning.  ValueError for an array that is not there.
    """
    labels = labels.cpu()
    if labels.is_floating_point() or labels.dim() != 1 or not len(labels) or int(labels.min()) < 0:
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}; allowed: int64 [N], classes from 0 on")
    classes = _classes(labels, config)
    small = [k for k, rows in enumerate(classes) if len(rows) < config.ipc]
    if small:
        warnings.warn(f"ipc={config.ipc}: classes {small} have fewer images and are kept whole", stacklevel=2)
    if isinstance(bank, Tensor):
        if len(bank) != len(labels):
            raise ValueError(f"{len(bank)} features and {len(labels)} labels; needs as many of both")
        bank = Bank(labels, h_final=bank)
    banks = [bank] if isinstance(bank, Bank) else list(bank)
    if not banks:
        raise ValueError("no bank is given; allowed: one of `score`, features, or several banks")
    if any(not torch.equal(own.labels, labels) for own in banks):
        raise ValueError("the bank is of other images: its labels differ from those given")
    if config.method in GREEDY and not (config.method == "glister" and config.glister == "static"):
        if len(banks) != 1:
            raise ValueError(f"method={config.method!r} takes one bank, not {len(banks)}")
        found = [pick(banks[0], rows, config, generator, device) for rows in classes]
        chosen = torch.cat([rows[order] for rows, (order, _) in zip(classes, found, strict=True)])
        weights = {"weights": torch.cat([w for _, w in found])} if config.method == "craig" else {}
        return {"indices": chosen, "labels": labels[chosen], **weights}
    groups = classes if config.balanced else [torch.arange(len(labels))]
    counts = [min(config.ipc, len(rows)) for rows in classes]
    counts = counts if config.balanced else [sum(counts)]
    if config.method == "random":
        chosen = [
            rows[torch.randperm(len(rows), generator=generator)[:n]] for rows, n in zip(groups, counts, strict=True)
        ]
        return _grouped(torch.cat(chosen), labels)
    score = torch.stack([image_score(own, config, classes, device).cpu() for own in banks]).mean(0).float()
    never_learned = config.method.startswith("forgetting") & score.isposinf()  # infinite by design
    if not (score.isfinite() | never_learned).all():
        raise ValueError(f"scores of method={config.method!r} have a NaN or an infinity: the scoring run went astray")
    found, beta = {"scores": score}, config.beta
    if config.method == "el2n_best":
        beta, tried = best_window(score, classes, config, accuracy, generator)
        found |= tried
    if config.method == "dual_beta":
        mean = torch.stack([_first_of_dual(own, config).double().mean(0).cpu() for own in banks]).mean(0)
        draw = lambda rows, n: beta_sample(score.double(), mean, rows, n, config.beta_power, generator)  # noqa: E731
    else:
        low = config.method in LOWEST_FIRST or (config.method == "cal" and config.cal == "smallest")
        draw = lambda rows, n: ordered(score, rows, n, low, beta)  # noqa: E731
    chosen = torch.cat([draw(rows, n) for rows, n in zip(groups, counts, strict=True)])
    return _grouped(chosen, labels) | found


def candidate_windows(score: Tensor, classes: list[Tensor], ipc: int) -> Iterator[tuple[float, Tensor]]:
    """(beta, image numbers) of each window of the order by descending score, within the images `classes`."""
    for beta in BETAS:
        yield beta, torch.cat([ordered(score, rows, min(ipc, len(rows)), False, beta) for rows in classes])


def best_window(
    score: Tensor, classes: list[Tensor], config: Config, accuracy: Callable | None, generator: torch.Generator
) -> tuple[float, dict[str, Tensor]]:
    """The beta whose subset has the best accuracy on a tenth of each class, which no subset draws from meanwhile."""
    if accuracy is None:
        raise ValueError(NO_STUDENT)
    apart = [rows[torch.randperm(len(rows), generator=generator)] for rows in classes]
    held = torch.cat([rows[: max(1, len(rows) // 10)] for rows in apart]).sort().values
    pool = [rows[max(1, len(rows) // 10) :].sort().values for rows in apart]
    tried = [float(accuracy(chosen, held)) for _, chosen in candidate_windows(score, pool, config.ipc)]
    if bad := [beta for beta, found in zip(BETAS, tried, strict=True) if not math.isfinite(found)]:
        raise ValueError(f"the accuracy of the windows at beta={bad} is not a finite number; none can be called best")
    facts = {"betas": torch.tensor(BETAS), "accuracies": torch.tensor(tried)}
    return BETAS[int(facts["accuracies"].argmax())], facts


def distill(
    images: Tensor,
    labels: Tensor,
    config: Config,
    *,
    make_network: Callable[[torch.Generator], nn.Module],
    prepare: Callable[[Tensor], Tensor] | None = None,
    augment: Any = None,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    state: State | None = None,
    on_step: Callable[[State], None] | None = None,
    accuracy: Callable[[Tensor, Tensor], float] | None = None,
) -> dict[str, Tensor]:
    """`score` (but for random), `select` and gather: adds "images" [K*I, C, H, W] as they were given, often uint8."""
    _checked(images, labels, prepare)
    check(config, labels)
    if config.method == "el2n_best" and accuracy is None:
        raise ValueError(NO_STUDENT)
    bank = Bank(labels.cpu())
    if config.method != "random":
        bank = score(images, labels, config, make_network=make_network, prepare=prepare, augment=augment,
                     generator=generator, device=device, state=state, on_step=on_step)  # fmt: skip
    found = select(bank, labels, config, generator=generator, device=device, accuracy=accuracy)
    return {"images": images[found["indices"].to(images.device)].cpu(), **found}


def _grouped(chosen: Tensor, labels: Tensor) -> dict[str, Tensor]:
    chosen = chosen[labels[chosen].argsort(stable=True)]
    return {"indices": chosen, "labels": labels[chosen]}


def check(config: Config, labels: Tensor) -> None:
    """ValueError, before a run, for classes that give nothing or epochs too few for what is read from them."""
    _classes(labels.cpu(), config)
    empty = torch.empty(config.trained, 0)
    if METHODS[config.method] == "early":
        _first(empty, config, "epoch")
    if METHODS[config.method] == "dual":
        _first(_first(empty, config, "dual_epochs"), config, "window")
    if config.method == "dyn_unc":
        _first(empty, config, "window")


def _checked(images: Tensor, labels: Tensor, prepare: Callable | None) -> None:
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; needs as many of both, and at least one")
    if prepare is None and not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; pass network input as floats, or prepare= that makes it")


def _classes(labels: Tensor, config: Config) -> list[Tensor]:
    """The image numbers of each class."""
    counts = labels.bincount()
    if not len(counts) or not counts.min():
        raise ValueError(f"class {int(counts.argmin()) if len(counts) else 0} has no images")
    if config.ipc > counts.max():
        raise ValueError(f"ipc={config.ipc}: the largest class has {int(counts.max())} images, nothing would be chosen")
    return list(labels.argsort(stable=True).split(counts.tolist()))


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from common import cli, script_selection

    sys.exit(cli.guard(lambda a: script_selection.run_selection(a, sys.modules[__name__]), sys.argv[1:]))
