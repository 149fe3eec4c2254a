"""Two processes that train together take the steps of one: losses, parameters, batch norm, streams, resuming, entry."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import distributed, networks
from common.augment import rng
from common.datasets import load
from common.store import Checkpoint, Product, Store
from common.train import fit
from common.views import Recipe, views
from papers import planning, runner, teacher
from tests.image_trees import damage, tree

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
HARD = Recipe(name="test", epochs=4, batch=25, optimizer="sgd", lr=0.05, labels="hard", cutmix=False)
STOP = 5  # steps, in the middle of an epoch


# What is run in one process, and in two. Losses, and tensors that are the same on all.


def digits():
    """57 images: batches of 25, 25 and 7, which two processes cannot halve."""
    data = load("digits", None, split="train")
    return replace(data, images=data.images[:57], labels=data.labels[:57])


def stream(place):
    """16 images on disk, two of them unreadable."""
    return load("own", place, resident_bytes=0, bad_share=0.5)


class Double(nn.Module):
    """A network in double precision: in single, 1e-7 in the weights of a ResNet is 0.01 of loss after three steps."""

    def __init__(self, net):
        super().__init__()
        self.net = net.double()

    def forward(self, images):
        return self.net(images.double())


def exact_loss(logits, y, partner, share):
    """`hard_loss`, which is in single precision."""
    return (1 - share) * F.cross_entropy(logits, y) + share * F.cross_entropy(logits, partner)


def train(data, network, recipe=HARD, double=True, **more):
    net = networks.make(network, classes=len(data.classes), size=32, generator=rng(0))
    history: list = []
    with mock.patch("common.train.hard_loss", exact_loss) if double else nullcontext():
        net = Double(net) if double else net
        fit(net, data, recipe, size=32, seed=3, device=CPU, dtype=torch.float32, history=history, **more)
    return torch.tensor([loss for _, loss, _ in history], dtype=torch.float64), net.state_dict()


class Killed(Exception):
    pass


def killed_views(*arguments):
    yield from islice(views(*arguments), STOP)
    raise Killed


def resumed(place):
    """Killed after a checkpoint and continued; only the first process has the file."""
    checkpoint = Checkpoint(place / f"state-{distributed.rank()}-of-{distributed.world()}", every_steps=STOP - 1)
    with mock.patch("common.train.views", killed_views), pytest.raises(Killed):
        train(digits(), "resnet18-bn-w8", checkpoint=checkpoint)
    assert checkpoint.path.exists() == distributed.is_first()
    return train(digits(), "resnet18-bn-w8", checkpoint=checkpoint)


def norm(_):
    """One batch norm on 5 images far from 0: its loss, gradients of the parameters, moments."""
    images, target = (torch.randn(5, 4, 6, 6, generator=rng(seed)) for seed in (1, 2))
    net = nn.BatchNorm2d(4, momentum=0.3)
    with torch.no_grad():
        net.weight.uniform_(generator=rng(3))
    own = (100 + 2 * images)[distributed.rows()].requires_grad_()
    model = distributed.parallel(net, CPU)
    error = (model(own) - target[distributed.rows()]).square().mean()
    value = error * distributed.weight(len(own), CPU)
    value.backward()
    every = torch.zeros(5, 4, 6, 6)
    every[distributed.rows()] = own.grad
    gradients = {f"gradient of {name}": p.grad for name, p in net.named_parameters()}
    gradients["gradient of images"] = distributed.mean(every)
    return distributed.mean(value.detach())[None].double(), net.state_dict() | gradients


CASES = {
    "resnet": lambda _: train(digits(), "resnet18-bn-w8"),
    "instance norm": lambda _: train(digits(), "convnet3-w32-instance"),
    "cutmix": lambda _: train(digits(), "convnet3-w32", replace(HARD, cutmix=True, optimizer="adamw", lr=0.001)),
    "resumed": resumed,
    "fp32": lambda _: train(digits(), "convnet3-w32-instance", replace(HARD, lr=0.005), double=False),
    "stream fp32": lambda place: train(stream(place), "convnet3-w32", replace(HARD, epochs=2, batch=8), double=False),
    "norm fp32": norm,
}


def member(rank, place):
    """One of two processes, which meet in a file: no port can be taken."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    for name, case in CASES.items():
        torch.save(case(place), place / f"{name} {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where two processes left what came of every case."""
    place = tmp_path_factory.mktemp("together")
    damage(tree(place, sizes=((40, 50), (60, 30)), count=8) / "own" / "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        if sys.platform == "linux":
            patch.setenv("GLOO_SOCKET_IFNAME", "lo")  # not what the name of the machine leads to
        torch.multiprocessing.spawn(member, (place,), nprocs=2)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(place, name):
    losses, state = CASES[name](place)
    for rank in range(2):
        ours, own = torch.load(place / f"{name} {rank}.pt")
        assert list(own) == list(state)
        close = 1e-5 if "fp32" in name else 1e-8
        torch.testing.assert_close(ours, losses, atol=close, rtol=close)
        torch.testing.assert_close(own, state, atol=close, rtol=close)


@pytest.mark.slow
def test_both_have_the_same_bits_also_when_resumed(place):
    for name in CASES:
        (losses, state), (others, other) = (torch.load(place / f"{name} {rank}.pt") for rank in range(2))
        assert torch.equal(losses, others) and all(torch.equal(state[k], other[k]) for k in state)
    whole, continued = (torch.load(place / f"{name} 0.pt") for name in ("resnet", "resumed"))
    assert torch.equal(whole[0], continued[0]) and all(torch.equal(whole[1][k], continued[1][k]) for k in whole[1])


# One process


def test_a_stream_decodes_only_the_rows_asked_for(tmp_path):
    tree(tmp_path, sizes=((40, 50), (60, 30)), count=8)
    recipe, data = replace(HARD, batch=7), stream(tmp_path)
    whole = list(views(data, recipe, 32, 3))
    for rank in range(2):
        part = list(views(data, recipe, 32, 3, rows=slice(rank, None, 2)))
        assert [view.step for view in part] == [view.step for view in whole] == list(range(12))
        for ours, all_ in zip(part, whole, strict=True):
            assert torch.equal(ours.indices, all_.indices[rank::2]) and torch.equal(ours.pixels, all_.pixels[rank::2])
    damage(tmp_path / "own" / "train")
    with pytest.raises(ValueError, match=r"no image of this process's part of a batch can be read: .*/(1|2)\.png"):
        list(views(stream(tmp_path), replace(HARD, batch=2), 32, 3, rows=slice(1, None, 2)))


def test_what_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    tree(tmp_path, count=8)
    monkeypatch.setattr(distributed, "world", lambda: 8)
    monkeypatch.setattr(distributed, "beside", lambda: 8)
    monkeypatch.setattr(distributed, "resolve_device", lambda device: torch.device(device))
    for make, words in (
        (lambda: train(digits(), "convnet3", Recipe(), soft=lambda *_: None), "labels='soft'; allowed on 8 .* 'hard'"),
        (lambda: train(stream(tmp_path), "convnet3", Recipe(labels="hard")), "cutmix=True; .* of a stream: False"),
        (lambda: train(digits(), "convnet3"), r"a batch of 7 images \(batch=25, 57 in all\): .* at most 7"),
        (lambda: train(digits(), "convnet3", replace(HARD, batch=4)), "a batch of 4 images"),
        (lambda: distributed.parallel(nn.Sequential(nn.BatchNorm1d(3)), CPU), "0 is a BatchNorm1d; .* BatchNorm2d"),
        (lambda: distributed.own_device("cuda:1"), "device=cuda:1 .* allowed: auto, cpu, cuda"),
        (lambda: distributed.own_device("cuda"), "8 processes, but 0 GPUs here"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


# The entry

CELL = "only=table1/cifar-10/random/convnet/1"


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    env = os.environ | {"TQDM_DISABLE": "1"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    return subprocess.run([*command, "papers.teacher", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def given(place):
    return ["paper=nrr_dd", "scale=smoke", "device=cpu", "precision=fp32", f"store={place}", CELL]


@pytest.mark.slow
def test_an_ordinary_run_finds_the_teacher(tmp_path, capfd):
    arguments = given(tmp_path / "two")
    done = torchrun(*arguments)
    assert done.returncode == 0, done.stderr
    assert "training, processes: 2" in done.stdout and done.stdout.count("%, ") == 1
    args = runner.parse([*arguments, "seeds=0"])
    lab = runner.lab_of(args)
    stages = [s for p in planning.make_plan(args, runner.load_paper("nrr_dd"), lab) for s in p.stages]
    (ours,) = {lab.key(s): s for top in stages for s in top.all() if s.name == "teacher"}.values()
    entry = lab.store.get("teacher", lab.key(ours))
    assert entry is not None and entry.meta["processes"] == 2 and not list(entry.path.parent.glob("*.work"))
    assert teacher.main(arguments) == 0
    assert re.search(rf"already there, \d+\.\d\d %, {entry.path}\n", capfd.readouterr().out)
    assert teacher.main(given(tmp_path / "one")) == 0
    alone = Store(tmp_path / "one").get("teacher", entry.key)
    losses = [[loss for _, loss in e.meta["losses"]] for e in (alone, entry)]
    assert losses[1] == pytest.approx(losses[0], abs=0.1) and lab.restored(ours)
    assert entry.meta["accuracy"] == pytest.approx(alone.meta["accuracy"], abs=3)


def test_weights_that_are_fetched_are_not_trained_together(tmp_path, monkeypatch):
    """The others are not called to a training that does not take place."""
    args, called = given(tmp_path), []
    (stage,) = teacher.teacher_stages(teacher.parse(args)).values()
    fetched = {**stage.settings, "recipe": {**stage.settings["recipe"], "name": "torchvision"}}
    stage = replace(stage, settings=fetched, build=lambda work: Product({}, {"accuracy": 69.8}))
    monkeypatch.setattr(teacher, "teacher_stages", lambda _: {"key": stage})
    monkeypatch.setattr(distributed, "from_first", called.append)
    teacher.lead(args)
    assert called == [None]  # no more to do


@pytest.mark.slow
def test_errors_are_one_sentence_of_the_first_process(tmp_path):
    done = torchrun("paper=nrr_dd", "scale=smoke", "epochs=3")
    assert done.returncode == 1 and done.stderr.count("error: unknown key 'epochs'") == 1
    assert "Connection closed" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["help"], 0, "torchrun --nproc-per-node=N -m papers.teacher"),
        (["paper=wmdd", "engine=ray"], 2, "unknown key 'engine'"),
        (["paper=wmdd", "scale=smoke", "device=gpu"], 2, "allowed: auto, cpu, cuda"),
        (["paper=wmdd", "scale=small", "data=/nowhere", "store=/nowhere"], 2, "data=/nowhere is no folder"),
        (["paper=wmdd", "scale=small", "data=/", "store=/nowhere"], 1, "no teacher to train: missing data"),
        (["paper=matching", "scale=smoke", "only=table1/random"], 1, "the cells asked for have none"),
    ],
)
def test_wrong_arguments_are_named(arguments, status, words, capsys):
    assert teacher.main(arguments) == status
    said = capsys.readouterr()
    assert words in said.out + said.err
