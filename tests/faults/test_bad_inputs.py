"""Wrong inputs from one table: each gives one clear sentence and an exit status that is not 0, and harms nothing.

What a reader or a check refuses by itself is tested beside it (tests/test_cli.py, test_distilled.py, test_datasets.py);
here the command lines are called as a user would.
"""

from __future__ import annotations

import re
import runpy
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from common import cli, distilled, doctor
from papers import cells, notebook, runner
from papers.report import REPORTED_COLUMNS
from tests.faults import broken_files as broken

ROOT = Path(__file__).resolve().parents[2]
SAFE = "set.safetensors"
PT = "info res.pt normalisation=none"
CHEAP = "paper=matching scale=smoke device=cpu only=table1/cifar-10/random/convnet/1 seeds=0"
RUN = "runner paper=matching scale=smoke device=cpu seeds=0"
OWN = "dataset=own data=data device=cpu ipc=1"
NAN, DEEP = float("nan"), "[" * 3000


class Case(NamedTuple):
    """A wrong input: what it is, the command, words of the sentence (a regular expression), what is made before."""

    what: str
    command: str  # program and arguments, split at blanks
    words: str
    make: Callable[[Path], object] | None = None
    tables: bool = False  # the run goes on without the cell, and says so in its tables


ARGUMENTS = [
    Case("no paper", "runner scale=smoke", "'paper' must be given"),
    Case("unknown paper", "runner paper=wmd", r"did you mean 'wmdd'.*allowed: "),
    Case("paper as a path", "runner paper=../papers/wmdd", "is not allowed.*allowed: "),
    Case("empty paper", "runner paper=", "allowed: .*wmdd"),
    Case("unknown scale", f"runner {CHEAP.replace('smoke', 'tiny')}", "scale=tiny.*allowed: auto, smoke"),
    Case("unknown cell", "runner paper=matching dry_run=true only=table9",
         "'table9' matches no cell; cells are named"),
    Case("unknown cell to skip", "runner paper=matching dry_run=true skip=x/y", "'x/y' matches no cell"),
    Case("a blank among patterns", "runner paper=matching dry_run=true only=table1,,", "matches no cell"),
    Case("negative seed", "runner paper=matching dry_run=true seeds=-1", "seeds=-1: must be at least 0"),
    Case("seed that is no number", "runner paper=matching dry_run=true seeds=0,x",
         "seeds=0,x: not a comma-separated list"),
    Case("fractional seed", "runner paper=matching dry_run=true seeds=0.5", "seeds=0.5: not"),
    Case("the same seed twice", "runner paper=matching dry_run=true seeds=1,1", "seeds=1,1: .*twice"),
    Case("seed beyond 63 bits", f"runner paper=matching dry_run=true seeds={2**70}", f"seeds={2**70}: .*at most"),
    Case("budget without a unit", "runner paper=matching dry_run=true budget=5", "budget='5' is not a time; allowed"),
    Case("negative budget", "runner paper=matching dry_run=true budget=-2h", "budget='-2h' is not a time"),
    Case("unknown device", "runner paper=matching dry_run=true device=tpu",
         "device='tpu' is unknown; allowed: auto, cpu, cuda"),
    Case("device without a number", "runner paper=matching dry_run=true device=cuda:x", "device='cuda:x'"),
    Case("device that is not there", "runner paper=matching dry_run=true device=cuda:99", "device='cuda:99'"),
    Case("unknown precision", "runner paper=matching dry_run=true precision=fp16",
         "precision=fp16.*allowed: auto, bf16, fp32"),
    Case("unknown engine", "runner paper=matching dry_run=true engine=dask", "engine=dask.*allowed: local, ray"),
    Case("negative workers", "runner paper=matching dry_run=true workers=-1", "workers=-1: must be at least 0"),
    Case("address without ray", "runner paper=matching dry_run=true address=a:1", "address= needs engine=ray"),
    Case("unknown key", "runner paper=matching dry_run=true speed=1", "unknown key 'speed'.*allowed: paper"),
    Case("key in dashes", "runner paper=matching dry_run=true --scale=smoke",
         "unknown key '--scale' .did you mean 'scale'"),
    Case("key without a value", "runner paper=matching dry_run=true scale", "'scale' is not of the form key=value"),
    Case("key given twice", "runner paper=matching dry_run=true seeds=0 seeds=1", "'seeds' is given twice"),
    Case("neither true nor false", "runner paper=matching dry_run=maybe", "dry_run=maybe: not true or false"),
    Case("interpolation", "runner paper=matching dry_run=true out=${store}", r"out=\$\{store\}: not text"),
    Case("notebook, unknown key", "notebook paper=matching kernel=r", "unknown key 'kernel'"),
    Case("notebook, unknown cell", "notebook paper=matching only=none", "'none' matches no cell"),
    Case("images per class 0", "dm ipc=0", "ipc=0: must be at least 1"),
    Case("images per class in words", "dm ipc=ten", "ipc=ten: not a whole number"),
    Case("rate nan", "dm lr=nan", "lr=nan: not a finite number"),
    Case("rate infinite", "dsa lr=inf", "lr=inf: not a finite number"),
    Case("negative iterations", "dm iterations=-5", "iterations=-5: must be at least"),
    Case("unknown first images", "dm init=zeros", "init=zeros: 'zeros' is not allowed.*allowed: real, noise"),
    Case("unknown network", "dm network=convnet99", "network 'convnet99' is unknown; allowed: "),
    Case("unknown protocol", "dm protocol=dm2023", "did you mean 'dm-2023'"),
    Case("no students", "dm students=0", "students=0: must be at least 1"),
    Case("unknown set", "dm dataset=cifar11 data=.", "'cifar11' is not there: looked for "),
    Case("set as a path upwards", "dm dataset=../data/own data=data", r"'\.\./data/own'.*name", broken.data()),
    Case("more images than there are", "dm ipc=999 device=cpu", "999"),
    Case("unknown teacher network", "wmdd network=resnet19", "did you mean 'resnet18'"),
    Case("teacher of no epochs", "wmdd teacher_epochs=0", "teacher_epochs=0: must be at least 1"),
    Case("unknown loss", "wmdd loss=l1", "allowed: "),
    Case("unknown schedule", "sre2l schedule=3", "sre2l|schedule"),
    Case("unknown selector", "coresets method=best", "method=best.*allowed: "),
    Case("unknown trajectory method", "mtt method=tm", "method=tm.*allowed: mtt"),
    Case("unknown pruning", "cad method=ca3d", "method=ca3d.*allowed: cad, ca2d"),
    Case("mixing with no set there", "natural_mixing set=absent.pt device=cpu", "no distilled set at absent.pt"),
    Case("mixing another number of classes", f"natural_mixing set={SAFE} device=cpu", "2 classes, digits 10",
         broken.good_set),
    Case("unknown action", "distilled draw x", "unknown action 'draw'; allowed: info, grid, convert"),
    Case("action without a file", "distilled info", "info needs FILE"),
    Case("convert without a target", f"distilled convert {SAFE}", "convert needs FILE and OUT"),
    Case("file that is not there", "distilled info absent.pt", "no distilled set at absent.pt"),
    Case("unknown layout", f"distilled convert {SAFE} x layout=zip", "layout=zip.*allowed: safetensors, images"),
    Case("unknown constants", f"distilled info {SAFE} normalisation=mnist9", "normalisation=mnist9.*allowed: auto"),
    Case("picture of no columns", f"distilled grid {SAFE} x.png columns=0", "columns=0: must be at least 1"),
    Case("unknown check", "datasets verify digits", "'verify digits' is not understood; allowed: check NAME"),
    Case("check of nothing", "datasets check", "allowed: check NAME"),
    Case("check without a folder", "datasets check imagenette", "needs a root folder: pass data=FOLDER or set DD_DATA"),
    Case("check of an unknown set", "datasets check own data=.", "'own' is not there: looked for"),
    Case("check with a wrong value", "datasets check digits decode=maybe", "decode=maybe: not true or false"),
]  # fmt: skip

PLACES = [
    Case("store is a file", f"runner {CHEAP} store=file", "file", broken.raw("file", b"x"), True),
    Case("store under a file", f"runner {CHEAP} store=file/runs", "cannot write file/runs|file",
         broken.raw("file", b"x"), True),
    Case("tables are a file", f"runner {CHEAP} out=file", "cannot write file", broken.raw("file", b"x"), True),
    Case("store with too long a name", f"runner {CHEAP} store={'x' * 300}", "File name too long", None, True),
    Case("home of nobody", f"runner {CHEAP} out=~no-such-user/x", "home directory"),
    Case("script, store is a file", f"dm {OWN} store=file", "file",
         broken.several(broken.raw("file", b"x"), broken.data())),
    Case("set into a folder", f"distilled convert {SAFE} runs", r"runs must end in \.safetensors", broken.good_set),
    Case("set under a file", f"distilled convert {SAFE} file/x.safetensors", "cannot write file/x",
         broken.several(broken.good_set, broken.raw("file", b"x"))),
    Case("picture into a folder", f"distilled grid {SAFE} runs", r"runs must end in \.png", broken.good_set),
    Case("images over a folder in use", f"distilled convert {SAFE} runs layout=images", "runs is there and not empty",
         broken.good_set),
]  # fmt: skip

YAML = [
    Case("not YAML", RUN, r"paper\.yaml.*line 1", broken.paper(b"title: [unclosed")),
    Case("empty", RUN, r"paper\.yaml must have exactly the keys", broken.paper(b"")),
    Case("a list", RUN, r"paper\.yaml must have exactly the keys", broken.paper(b"- 1\n- 2\n")),
    Case("not text", RUN, r"paper\.yaml", broken.paper(b"\xff\xfe\x00\x01title: x")),
    Case("an object that runs code", RUN, r"paper\.yaml",
         broken.paper(b"title: !!python/object/apply:os.mkdir [MARKER]\n")),
    Case("nested without end", RUN, r"paper\.yaml", broken.paper(DEEP.encode())),
    Case("a missing part", RUN, r"paper\.yaml must have exactly the keys", broken.paper(lambda c: c.pop("tables"))),
    Case("reasons in a list", RUN, "not_run must be a mapping, not", broken.paper(lambda c: c.update(not_run=["a"]))),
    Case("an unknown part", RUN, r"paper\.yaml must have exactly the keys", broken.paper(lambda c: c.update(extra=1))),
    Case("scales as a list", RUN, r"paper\.yaml.*scales", broken.paper(lambda c: c.update(scales=["smoke"]))),
    Case("a missing scale", RUN, "exactly the scales smoke, small, paper",
         broken.paper(lambda c: c["scales"].pop("small"))),
    Case("a scale without seeds", RUN, "smoke.*seeds", broken.smoke(seeds="left out")),
    Case("a scale whose seeds are a number", RUN, "smoke: seeds must be a list.*not 3", broken.smoke(seeds=3)),
    Case("a scale with no seeds", RUN, "smoke: seeds must be a list", broken.smoke(seeds=[])),
    Case("a scale that is empty", RUN, "smoke", broken.paper(lambda c: c["scales"].update(smoke=None))),
    Case("sets of an unknown paper", RUN, "paper='nowhere' is unknown", broken.smoke(sets_of="nowhere")),
    Case("sets of itself", RUN, "sets_of", broken.smoke(sets_of="matching")),
    Case("cells as text", RUN, r"paper\.yaml.*cells", broken.paper(lambda c: c.update(cells="all"))),
    Case("a cell that is text", RUN, r"paper\.yaml.*cell", broken.paper(lambda c: c.update(cells=["table1"]))),
    Case("no cells", RUN, r"paper\.yaml.*cells", broken.paper(lambda c: c.update(cells=[]))),
    Case("a cell listed twice", RUN, "lists table1/.* 2 times", broken.one_cell(cells=[broken.CELL, broken.CELL])),
    Case("a cell with an unknown field", RUN, "optimizer", broken.cell(optimizer="sgd")),
    Case("a cell without a network", RUN, "arch", broken.cell(arch="left out")),
    Case("a cell of an unknown method", RUN, "algorithm.*dmm", broken.cell(algorithm="dmm"), True),
    Case("a cell of an unknown protocol", RUN, "protocol.*dm-1999", broken.cell(protocol="dm-1999"), True),
    Case("a cell of an unknown metric", RUN, "metric.*speed", broken.cell(metric="speed"), True),
    Case("a cell whose setting is a number", RUN, "setting must be text, not 10", broken.cell(setting=10)),
    Case("a cell of words for images", RUN, "ipc.*ten", broken.cell(ipc="ten")),
    Case("a cell of minus one image", RUN, "ipc.*-1", broken.cell(ipc=-1)),
    Case("a cell whose settings are text", RUN, "student", broken.cell(student="short"), True),
    Case("unknown settings of students", RUN, "epoch", broken.smoke(student={"epoch": 3}), True),
    Case("unknown settings of a method", RUN, "iteration", broken.smoke(
        {"method": "DM", "algorithm": "dm"}, methods={"dm": {"distill": {"iteration": 3}}}), True),
    Case("data sets as a list", RUN, "data", broken.smoke(data=["digits"]), True),
    Case("a data set without a name", RUN, "dataset", broken.smoke(data={"CIFAR-10": {"run_on": "digits"}}), True),
    Case("a figure nobody draws", RUN, "figure_none", broken.one_cell(figures={"figure_none": "x"}), True),
    Case("printed numbers of other columns", RUN, r"reported\.csv, line 1",
         broken.one_cell(reported=b"a,b\n1,2\n"), True),
    Case("a printed accuracy of 900", RUN, r"reported\.csv, line 2",
         broken.one_cell(f"{','.join(REPORTED_COLUMNS)}\ntable1,CIFAR-10,DM,,ConvNet,1,accuracy,900,,\n".encode()),
         True),
]  # fmt: skip

DATA = [
    Case("the set is a file", f"dm {OWN}", "'own' is not there", broken.data(broken.as_file)),
    Case("an empty class", f"dm {OWN}", "no images in class folder b",
         broken.data(lambda f: broken.emptied(f / "train/b"))),
    Case("a class too few in the test split", f"dm {OWN}", "missing: b.*half-unpacked",
         broken.data(lambda f: (broken.emptied(f / "test/b"), (f / "test/b").rmdir()))),
    Case("a class too many in the test split", f"dm {OWN}", "only here: c",
         broken.data(lambda f: broken.image(f / "test/c/0.png"))),
    Case("no test split", f"dm {OWN}", "has no test split: looked for test",
         broken.data(lambda f: (f / "test").rename(f / "x"))),
    Case("images outside of classes", f"dm {OWN}", "6 images that no class folder holds",
         broken.data(lambda f: broken.flat(f / "train"))),
    Case("a split that is empty", f"dm {OWN}", "neither class folders nor images",
         broken.data(lambda f: (broken.flat(f / "train"), broken.emptied(f / "train")))),
    Case("a class that is a file", f"dm {OWN}", "differ from those of the training split",
         broken.data(lambda f: broken.as_file(f / "test/b"))),
    Case("text named .png", f"dm {OWN}", r"1 of 6 images cannot be read: .*a/1.png .not an image",
         broken.data(lambda f: (f / "train/a/1.png").write_text("hello"))),
    Case("an image of no bytes", f"dm {OWN}", r"a/1.png .not an image",
         broken.data(lambda f: (f / "train/a/1.png").write_bytes(b""))),
    Case("a truncated JPEG", f"dm {OWN}", r"a/9.jpg .*truncated",
         broken.data(lambda f: broken.truncated_jpeg(f / "train/a/9.jpg"))),
    Case("an image of 3,600 megapixels", f"dm {OWN}", "a/9.png .*decompression bomb",
         broken.data(lambda f: (f / "train/a/9.png").write_bytes(broken.huge_png()))),
    Case("a folder named .png", f"dm {OWN}", r"a/9.png .*directory",
         broken.data(lambda f: (f / "train/a/9.png").mkdir())),
    Case("a link to nowhere", f"dm {OWN}", r"a/9.png",
         broken.data(lambda f: (f / "train/a/9.png").symlink_to("nowhere"))),
    Case("too few images of a class", f"dm {OWN.replace('ipc=1', 'ipc=5')}", "5.*3|3.*5", broken.data()),
    Case("another set under a known name", "dm dataset=imagenette data=data", "has 2 classes and imagenette has 10",
         broken.data(lambda f: f.rename(f.parent / "imagenette"))),
    Case("CIFAR-10 that would run code", "dm dataset=cifar10 data=data", "incomplete or damaged", broken.several(
        broken.data(lambda f: (f.parent / "cifar10/cifar-10-batches-py").mkdir(parents=True)),
        broken.plain_attack("data/cifar10/cifar-10-batches-py/data_batch_1"))),
    Case("SVHN that is text", "dm dataset=svhn data=data", "incomplete or damaged", broken.several(
        broken.data(lambda f: (f.parent / "svhn").mkdir()), broken.raw("data/svhn/train_32x32.mat", b"x" * 100))),
    Case("a dump that is no parquet", f"dm {OWN}", "train.parquet",
         broken.data(lambda f: (f / "train.parquet").write_text("x"))),
    Case("check of an empty class", "datasets check own data=data", "no images in class folder b",
         broken.data(lambda f: broken.emptied(f / "train/b"))),
    Case("check of unreadable images", "datasets check own data=data", r"1 of 6 images cannot be read",
         broken.data(lambda f: (f / "train/a/1.png").write_bytes(b""))),
    Case("check of a set that is a file", "datasets check own data=data", "'own' is not there",
         broken.data(broken.as_file)),
    Case("check upwards", "datasets check ../data/own data=data", r"'\.\./data/own'.*name", broken.data()),
    Case("teacher on an unreadable image", f"wmdd {OWN}", "cannot be read", broken.data(
        lambda f: (f / "train/a/1.png").write_bytes(b""))),
    Case("a paper on half a set", CHEAP.replace("smoke", "small").replace("paper=", "runner data=data paper="),
         "has 2 classes and cifar10 has 10", broken.data(lambda f: f.rename(f.parent / "cifar10")), True),
]  # fmt: skip

FILES = [
    Case("safetensors, truncated", f"info {SAFE}", SAFE, broken.altered_set(lambda b: b[:-7])),
    Case("safetensors, a flipped bit", f"info {SAFE}", f"{SAFE} is damaged: its sha256",
         broken.altered_set(broken.flipped)),
    Case("safetensors, empty", f"info {SAFE}", f"{SAFE} is not a readable", broken.raw(SAFE, b"")),
    Case("safetensors, text", f"info {SAFE}", f"{SAFE} is not a readable", broken.raw(SAFE, b"hello " * 9)),
    Case("safetensors, an endless header", f"info {SAFE}", f"{SAFE} is not a readable", broken.raw(SAFE, b"\xff" * 64)),
    Case("safetensors, a folder", f"info {SAFE}", SAFE, lambda folder: (folder / SAFE).mkdir()),
    Case("safetensors, NaN", f"info {SAFE}", "images hold numbers that are not finite",
         broken.tensor_file(images=torch.full((4, 3, 8, 8), NAN))),
    Case("safetensors, infinite logits", f"info {SAFE}", "soft_labels hold numbers that are not finite",
         broken.tensor_file(soft_labels=torch.full((4, 2), float("inf")))),
    Case("safetensors, images of bytes", f"info {SAFE}", "images must be float32 .*not uint8",
         broken.tensor_file(images=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))),
    Case("safetensors, images in double", f"info {SAFE}", "images must be float32 .*not float64",
         broken.tensor_file(images=torch.zeros(4, 3, 8, 8).double())),
    Case("safetensors, labels as floats", f"info {SAFE}", "labels must be int64",
         broken.tensor_file(labels=torch.zeros(4))),
    Case("safetensors, labels too large", f"info {SAFE}", r"labels lie in 0\.\.7",
         broken.tensor_file(labels=torch.tensor([0, 0, 1, 7]))),
    Case("safetensors, no images", f"info {SAFE}", f"{SAFE}.*images", broken.tensor_file(drop=("images",))),
    Case("safetensors, one tensor more", f"info {SAFE}", f"{SAFE}.*extra", broken.tensor_file(extra=torch.zeros(1))),
    Case("safetensors, facts not JSON", f"info {SAFE}", f"{SAFE}", broken.tensor_file("{not json")),
    Case("safetensors, facts a list", f"info {SAFE}", f"{SAFE}", broken.tensor_file("[1]")),
    Case("safetensors, no classes", f"info {SAFE}", f"{SAFE}.*classes", broken.tensor_file({"classes": "left out"})),
    Case("safetensors, mean in words", f"info {SAFE}", f"{SAFE}", broken.tensor_file({"mean": ["a", "b", "c"]})),
    Case("safetensors, std 0", f"info {SAFE}", "std must be above 0", broken.tensor_file({"std": [0.5, 0.5, 0.0]})),
    Case("safetensors, negative rate", f"info {SAFE}", "student_lr must be a finite number above 0",
         broken.tensor_file({"student_lr": -1.0})),
    Case("safetensors, rate in words", f"info {SAFE}", f"{SAFE}", broken.tensor_file({"student_lr": "fast"})),
    Case("safetensors, classes over two lines", f"convert {SAFE} out/x layout=images", "class",
         broken.tensor_file({"classes": ["a\nb", "c"]})),
    Case("pickle that runs code", PT, "res.pt is refused: it asks for .*mkdir", broken.attack("res.pt")),
    Case("old pickle that runs code", PT, "res.pt is refused: it asks for .*mkdir",
         broken.attack("res.pt", legacy=True)),
    Case("bare pickle that runs code", PT, "res.pt", broken.plain_attack("res.pt")),
    Case("pickle among MTT labels", "info . normalisation=none", "labels_best.pt is refused",
         broken.several(broken.mtt(), broken.attack("labels_best.pt"))),
    Case("a pickled network", PT, "res.pt is refused: it asks for torch.nn",
         broken.pt(lambda folder: torch.nn.Linear(2, 2))),
    Case("zip that climbs", PT, "res.pt is not a readable", broken.climbing_zip("res.pt")),
    Case("tar that climbs", PT, "res.pt", broken.climbing_tar("res.pt")),
    Case("soft labels that climb", "info batch_0.tar", "batch_0.tar is not a known layout",
         broken.climbing_tar("batch_0.tar")),
    Case("npz that runs code", "info set.npz", "set.npz is not a known layout", broken.attack_in_npz("set.npz")),
    Case("pt, constants unknown", "info res.pt", "on the command line normalisation=", broken.dc()),
    Case("pt, text", PT, "res.pt", broken.raw("res.pt", b"hello")),
    Case("pt, empty", PT, "res.pt", broken.raw("res.pt", b"")),
    Case("pt, a list", PT, "res.pt is not in the DC layout", broken.pt([])),
    Case("pt, numbers for tensors", PT, "res.pt holds a int where a tensor", broken.pt({"data": [[1, 2]]})),
    Case("pt, no such experiment", f"{PT} experiment=3", "experiment=3: res.pt holds 1", broken.dc()),
    Case("pt, NaN", PT, "images hold numbers that are not finite", broken.dc(torch.full((4, 3, 8, 8), NAN))),
    Case("pt, one channel", PT, r"images \[4, 1, 8, 8\] do not go with mean", broken.dc(torch.zeros(4, 1, 8, 8))),
    Case("pt, no images", PT, "res.pt|M > 0", broken.dc(torch.zeros(0, 3, 8, 8), torch.zeros(0).long())),
    Case("pt, complex images", PT, "res.pt.*complex", broken.dc(torch.zeros(4, 3, 8, 8, dtype=torch.complex64))),
    Case("pt, sparse images", PT, "res.pt", broken.dc(torch.zeros(4, 3, 8, 8).to_sparse())),
    Case("pt, fewer labels", PT, r"labels must be int64 \[4\]", broken.dc(labels=torch.tensor([0, 1]))),
    Case("pt, negative labels", PT, r"labels lie in -3\.\.1", broken.dc(labels=torch.tensor([0, -3, 1, 1]))),
    Case("pt, labels of NaN", PT, "class numbers or logits", broken.dc(labels=torch.full((4,), NAN))),
    Case("pt, a label of 2^60", PT, "res.pt.*1152921504606846976", broken.dc(labels=torch.tensor([0, 0, 1, 2**60]))),
    Case("pt, logits of no class", PT, "res.pt", broken.dc(labels=torch.zeros(4, 0))),
    Case("mtt, no labels", "info . normalisation=none", "labels_best.pt", broken.mtt(labels=False)),
    Case("mtt, a negative rate", "info . normalisation=none", "student_lr must be", broken.mtt(lr=torch.tensor(-0.1))),
    Case("mtt, two rates", "info . normalisation=none", "lr_best.pt", broken.mtt(lr=torch.tensor([0.1, 0.2]))),
    Case("mtt, labels for images", "info images_best.pt normalisation=none", r"images \[4\] do not go",
         broken.several(broken.mtt(), broken.pt(torch.zeros(4), "images_best.pt"))),
    Case("images, an empty folder", "info set", "set has no images in class folders", lambda f: (f / "set").mkdir()),
    Case("images, none in classes", "info set", "set has no images in class folders", broken.pictures(broken.flat)),
    Case("images, a file", "info set", "set is not a known layout", broken.raw("set", b"x")),
    Case("images, text", "info set", "1.png cannot be read",
         broken.pictures(lambda f: (f / "a/1.png").write_text("x"))),
    Case("images, no bytes", "info set", "1.png cannot be read",
         broken.pictures(lambda f: (f / "a/1.png").write_bytes(b""))),
    Case("images, a truncated JPEG", "info set", "9.jpg cannot be read",
         broken.pictures(lambda f: broken.truncated_jpeg(f / "a/9.jpg"))),
    Case("images, sizes that differ", "info set", "different shapes",
         broken.pictures(lambda f: broken.image(f / "a/9.png", 9))),
    Case("images, grey among colour", "info set", "different shapes",
         broken.pictures(lambda f: broken.image(f / "a/9.png", 8, "L"))),
    Case("images, 3,600 megapixels", "info set", "9.png cannot be read",
         broken.pictures(lambda f: (f / "a/9.png").write_bytes(broken.huge_png()))),
    Case("images, class 10^15", "info set", "10{15}", broken.pictures(names=("0", "1" + "0" * 15))),
    Case("images, too few weights", "info set", "sample_weights.txt must have a line", broken.pictures(
        lambda f: (f / "sample_weights.txt").write_text("1\n"), ("0", "1"))),
    Case("images, weights in words", "info set", "sample_weights.txt.*heavy", broken.pictures(
        lambda f: (f / "sample_weights.txt").write_text("1 1\n1 heavy\n"), ("0", "1"))),
    Case("images, negative weights", "info set", "weights must not be negative", broken.pictures(
        lambda f: (f / "sample_weights.txt").write_text("1 1\n1 -1\n"), ("0", "1"))),
    Case("images, weights of NaN", "info set", "weights hold numbers that are not finite", broken.pictures(
        lambda f: (f / "sample_weights.txt").write_text("1 1\n1 nan\n"), ("0", "1"))),
    Case("images, too few class names", "info set", r"labels lie in 0\.\.1", broken.pictures(
        lambda f: (f / "classes.txt").write_text("one\n"))),
    Case("images, class names not text", "info set", "classes.txt", broken.pictures(
        lambda f: (f / "classes.txt").write_bytes(b"\xff\xfe\n\xff\n"))),
]  # fmt: skip

CASES = [
    *ARGUMENTS,
    *PLACES,
    *(case._replace(what=f"paper.yaml, {case.what}") for case in YAML),
    *DATA,
    *(case._replace(command=f"distilled {case.command}") for case in FILES),
]  # fmt: skip


def call(program: str, argv: list[str]) -> int:
    """The exit status of a command line, run in this process."""
    if program in ("runner", "notebook"):
        return {"runner": runner, "notebook": notebook}[program].main(argv)
    if program in ("distilled", "datasets"):
        return cli.guard({"distilled": distilled.main, "datasets": doctor.main}[program], argv)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [f"methods/{program}.py", *argv])
        patch.setattr(sys, "path", [*sys.path])
        runpy.run_path(str(ROOT / "methods" / f"{program}.py"), run_name="__main__")
    return stop.value.code


@contextmanager
def at_most(seconds: int):
    """A wrong input that is not noticed must not start hours of work."""

    def late(*_):
        raise SystemExit(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, by relative path; None for what is not a file."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder a command runs in: a store with an entry, tables of an earlier run."""
    folder = tmp_path / "here"
    for name, text in (("runs/teacher/0123456789abcdef/meta.json", "{}"), ("out/kept.txt", "kept"),
                       ("tables/matching/smoke/kept.txt", "kept")):  # fmt: skip
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DD_DATA", raising=False)
    monkeypatch.delenv("DD_DEBUG", raising=False)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_one_sentence_and_nothing_harmed(case, place, monkeypatch, capsys):
    if case.make:
        case.make(place)
    if (place / "papers").exists():
        for module in (cells, runner):
            monkeypatch.setattr(module, "ROOT", place / "papers")
    before = content(place.parent)
    program, *argv = case.command.split()
    with warnings.catch_warnings(), at_most(30):
        warnings.simplefilter("ignore")  # of other libraries
        status = call(program, argv)
    said = capsys.readouterr()
    assert status in (1, 2), f"exit status {status}: {said.out}{said.err}"
    assert len(said.err.splitlines()) == 1 and said.err.startswith(("error: ", "failed: ")), said.err
    assert "Traceback" not in said.out + said.err
    text = said.out + said.err if program == "datasets" else said.err  # a check lists what it found
    assert re.search(case.words, text), said.err
    after = content(place.parent)
    assert not any(broken.MARKER in Path(name).name for name in after)
    assert {name: after.get(name, "gone") for name in before} == before
    new = {name for name in after if name not in before and after[name] is not None and not name.endswith(".lock")}
    allowed = ("here/runs/cache/", *(("here/tables/", "here/runs/") if case.tables else ()))
    assert not {name for name in new if not name.startswith(allowed)}
