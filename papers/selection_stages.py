"""The sets of Hard Truths that no matching method makes: coresets, CAD-Prune, CA2D, and sets of the other papers."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common import matching
from common.augment import rng
from common.hardware import precision_name
from common.protocols import PROTOCOLS
from common.resume import passes_done, resumable
from common.selection import Scored, augment_of, scored, trial
from common.store import Product
from methods import cad, coresets
from papers import committed, image_stages
from papers.cells import load_paper

if TYPE_CHECKING:
    from papers.matching_stages import MatchingSetup
    from papers.stages import Lab, Stage

__all__ = ["SELECTIONS", "doubled", "images"]

HARD = "hard-truths-hard"  # the protocol of students that EL2N-Best is chosen by
TWICE = "twice"  # distill: {twice: true} takes the first half of a selection, each image twice
BORROWED = "image-set"  # a set that a paper with trained teachers made, found by its cell
SELECTIONS = {"coreset": coresets, "cad": cad, BORROWED: None}
SELECTS = (  # fields of a config of cad.py that the scoring run does not depend on
    "method", "score", "window", "windows", "include_last", "factor", "crops", "crop", "pool")


def images(lab: Lab, setup: MatchingSetup, on: matching.Task, algorithm: str, seed: int) -> Stage:
    """The distill stage: a set in network-input space, and which training images it is made of where it is."""
    make = {"coreset": _coreset, "cad": _cad, BORROWED: _borrowed}[algorithm]
    return make(lab, setup, on, seed)


def _set(on: matching.Task, tensors: dict[str, Tensor], **meta) -> Product:
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    preview = {"preview.png": matching.preview(on, tensors)}
    return Product(tensors, {**meta, **matching.size_of(tensors)}, preview)


def _seen(on: matching.Task, compile: bool) -> Scored:
    """What a scoring run sees; compile: its networks compiled up to the last layer, whose input the run reads."""

    def make_network(generator: torch.Generator) -> nn.Module:
        net = on.make_network(generator)
        if compile and hasattr(net, "features"):
            torch.compiler.reset()  # as in common/students.py
            net.features.compile(dynamic=False)
        return net

    return replace(Scored.of(on), make_network=make_network)


# ---------------------------------------------------------------- coresets


def _coreset(lab: Lab, setup: MatchingSetup, on: matching.Task, seed: int) -> Stage:
    beside = ("augment", TWICE)  # no settings of the method
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in setup.distill.items() if k not in beside}
    config, ipc, twice = coresets.Config(**options), setup.distill["ipc"], bool(setup.distill.get(TWICE))
    coresets.check(config, on.train.labels)
    needs = (_bank(lab, setup, on, config),) if coresets.METHODS[config.method] != "none" else ()
    # The same set under every label regime: EL2N-Best chooses by students under hard labels.
    tested = replace(PROTOCOLS[HARD], epochs=setup.protocol.epochs, batch=setup.protocol.batch)
    tries = len(coresets.BETAS) if config.method == "el2n_best" else 0

    def build(work: Path) -> Product:
        bank = coresets.Bank.restore(lab.entry(needs[0]).tensors()) if needs else coresets.Bank(on.train.labels.cpu())
        found = coresets.select(
            bank, on.train.labels, config, generator=rng(seed, "selection"), device=on.device,
            accuracy=trial(work, on, tested, seed),
        )  # fmt: skip
        if twice:
            found = doubled(found)
        rows = found["indices"]
        chosen = {"images": on.prepare(on.train.images[rows.to(on.train.images.device)])}
        chosen |= {name: found[name] for name in ("labels", "weights") if name in found}  # weights: of CRAIG
        tried = {"betas": coresets.BETAS, "accuracies": found["accuracies"].tolist()} if tries else {}
        return _set(on, {**chosen, "indices": rows}, **tried)

    settings = {**matching.facts(on, seed), "method": "coresets", "config": asdict(config)}
    settings["config"] |= {"precision": needs[0].settings["run"]["precision"]} if needs else {}
    settings |= {"protocol": tested.settings()} if tries else {}
    settings |= {"weighted": True} if config.method == "craig" else {}  # its weights are part of the set
    settings |= {TWICE: True} if twice else {}
    views, held = 3 * tested.passes * ipc * len(on.train.classes), len(on.train) / 10
    cost = tries * (views + held) * on.flops
    what = f"{config.method} images{', half of them twice' * twice}, {setup.run_on}, IPC {ipc}"
    return lab.stage("distill", settings, (on.train.fingerprint, *needs), build, cost, what, *needs)


def doubled(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A degenerate selection of the same size: the better half of each class, every image twice.

    found: indices and labels, int64 [M], each class from its best image on.  ValueError for a class of an odd number.
    """
    labels = found["labels"]
    counts = labels.bincount()
    if (counts % 2).any():
        odd = int((counts % 2).nonzero()[0])
        raise ValueError(f"class {odd} has {int(counts[odd])} images; half of them, twice, needs an even number")
    own = [(labels == k).nonzero().flatten() for k in range(len(counts))]
    rows = torch.cat([places[: len(places) // 2].repeat_interleave(2) for places in own])
    return {name: found[name][rows] for name in ("indices", "labels", "weights") if name in found}


def _bank(lab: Lab, setup: MatchingSetup, on: matching.Task, config: coresets.Config) -> Stage:
    """One scoring run serves every selector that wants a run like it."""
    kind = setup.distill.get("augment", "none")
    cost = config.trained * 4.0 * len(on.train) * on.flops  # a step, and a look at every image
    arithmetic = lab.arithmetic(cost)
    config = replace(config, precision=precision_name(arithmetic["dtype"]))

    def build(work: Path) -> Product:
        seen = _seen(on, arithmetic["compile"])
        bank = scored(work, seen, coresets, config, augment_of(kind, on, coresets), 0, config.trained)
        return Product(bank.tensors(), {})

    run = {name: value for name, value in asdict(config).items() if name in coresets.RUN_FIELDS}
    settings = {**matching.facts(on, 0), "run": run, "augment": kind}
    what = f"scores of {setup.run_on}, {config.trained} epochs"
    return lab.stage("bank", settings, (on.train.fingerprint,), build, cost, what)


# ---------------------------------------------------------------- CAD-Prune and CA2D


def _cad(lab: Lab, setup: MatchingSetup, on: matching.Task, seed: int) -> Stage:
    ipc = setup.distill["ipc"]
    config = cad.Config(**{**setup.distill, "student_epochs": setup.protocol.epochs})  # the budget that is matched
    run, train = _trajectory(lab, setup, on, config), on.train
    cad.check(config, train.images, train.labels, on.make_network(rng(0)))
    teacher = (lab.teacher(setup.taught_by(on)),) if config.method == "ca2d" else ()

    def build(work: Path) -> Product:
        scores = lab.entry(run).tensors()["p_true" if config.score == "prob" else "el2n"]
        _, window, windows, _ = cad.schedule(config, len(train.classes), len(train))
        score = cad.dynamic_score(scores, window, windows, config.include_last)
        if not teacher:
            rows = cad.prune(score, train.labels.cpu(), ipc)
            chosen = on.prepare(train.images[rows.to(train.images.device)])
            return _set(on, {"images": chosen, "labels": train.labels.cpu()[rows], "indices": rows})
        data = lab.data(setup.dataset, "train")  # the teacher's own normalisation
        with resumable(work, cad.Synthesis.restore, len(train.classes), done=passes_done()) as (state, on_step, _):
            made, labels = cad.synthesise(
                lab.restored(teacher[0]), train.images, train.labels, score, config, mean=data.mean, std=data.std,
                generator=rng(seed, "crops"), state=state, on_step=on_step,
            )  # fmt: skip
        return _set(on, {"images": on.inputs(made.to(on.device) / 255), "labels": labels})

    settings = {**matching.facts(on, seed), "method": "cad", "config": _named(config)}
    what = f"{'CAD-Prune' if config.method == 'cad' else 'CA2D'}, {setup.run_on}, IPC {ipc}"
    needs = (run, *teacher)
    return lab.stage("distill", settings, (train.fingerprint, *needs), build, 0.0, what, *needs)


def _named(config: cad.Config) -> dict:
    """What names the store entries of a config; full_epochs came later and counts where it is used."""
    return {name: value for name, value in asdict(config).items() if name != "full_epochs" or value}


def _trajectory(lab: Lab, setup: MatchingSetup, on: matching.Task, config: cad.Config) -> Stage:
    kind = cad.augmentation(setup.dataset)
    looks, _, _, steps = cad.schedule(config, len(on.train.classes), len(on.train))
    cost = (3.0 * steps * config.batch + len(looks) * len(on.train)) * on.flops
    arithmetic = lab.arithmetic(cost)
    config = replace(config, precision=precision_name(arithmetic["dtype"]))

    def build(work: Path) -> Product:
        seen = _seen(on, arithmetic["compile"])
        return Product(scored(work, seen, cad, config, augment_of(kind, on, cad), 0, steps), {})

    run = {name: value for name, value in _named(config).items() if name not in SELECTS}
    run |= {} if kind == "dsa" else {"augment": kind}  # named only where it is another one, as full_epochs is
    settings, what = {**matching.facts(on, 0), "run": run}, f"compute-matched scores, {setup.run_on}, {steps} steps"
    return lab.stage("trajectory", settings, (on.train.fingerprint,), build, cost, what)


# ---------------------------------------------------------------- sets of other papers


def _borrowed(lab: Lab, setup: MatchingSetup, on: matching.Task, seed: int) -> Stage:
    """A set in pixels that another paper's cell stands on: distill: {paper, scale, cell}."""
    from papers.setups import setup_of  # the other way round it imports the matching stages

    paper, scale, name = (setup.distill[k] for k in ("paper", "scale", "cell"))
    cell = next((c for c in load_paper(paper).cells_at(scale) if c.id == name), None)
    theirs = cell and setup_of(load_paper(paper).scales[scale], cell)
    if theirs is None or theirs.size != on.size or theirs.dataset != setup.dataset:
        raise ValueError(f"{name!r} of paper={paper} scale={scale} is no set of {setup.dataset} at {on.size} px")
    made = image_stages.IMAGES[cell.algorithm](lab, theirs, seed)
    if lab.committed and (known := committed.found(setup.read_from, on, committed.named(made), pixels=True)):
        path, own = known
        pixels = image_stages.as_bytes(own.images) / 255  # as its own students see it
        return committed.stage(lab, path, replace(own, images=pixels), on, made.what)

    def build(work: Path) -> Product:
        tensors = lab.entry(made).tensors()
        pixels = image_stages.as_bytes(tensors["images"])  # as its own students see it
        return _set(on, {"images": on.prepare(pixels), "labels": tensors["labels"]})

    return lab.stage("distill", {**matching.facts(on, 0), "borrowed": True}, (made,), build, 0.0, made.what, made)
