"""Scores of a set that stays on disk, as of the same pixels in memory; coresets, CAD-Prune and CA2D of a stream."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from common import networks
from common.augment import rng
from common.datasets import Dataset, load
from common.store import Store
from common.views import Recipe
from methods import cad, coresets
from papers import image_stages, setups, stream_stages
from papers.cells import load_paper
from papers.stages import Lab
from tests.image_trees import damage, tree

COUNT, CLASSES = 40, 2
LABELS = torch.arange(COUNT) % CLASSES
PIXELS = torch.randint(0, 256, (COUNT, 3, 16, 16), generator=rng("pixels"), dtype=torch.uint8)
PRUNE = cad.Config(ipc=2, student_epochs=60, batch=16, lr=0.02, whole_epochs=5)
RANK = coresets.Config(method="dyn_unc", ipc=2, epochs=4, batch=16, lr=0.02, window=2, milestones=(2,))


class Reader:
    """Reads PIXELS without some rows, and keeps what it was asked for."""

    def __init__(self, lacking=()):
        self.lacking, self.asked = torch.tensor(lacking, dtype=torch.int64), []

    def __call__(self, rows, batch, epoch):
        self.asked.append((len(rows), batch, epoch))
        for part in rows.split(batch):
            found = part[~torch.isin(part, self.lacking)]
            yield PIXELS[found], found


def scored(method, images, config, **more):
    return method.score(
        images, LABELS, config, prepare=lambda x: x / 128 - 1, generator=rng(1),
        make_network=lambda g: networks.make("convnet2-instance-w32", classes=CLASSES, size=16, generator=g), **more,
    )  # fmt: skip


def test_cad_scores_images_that_are_read_as_those_in_memory():
    reader = Reader()
    read, held = scored(cad, reader, PRUNE), scored(cad, PIXELS, PRUNE)
    assert all(torch.equal(read[name], held[name]) for name in ("p_true", "el2n"))
    looks, steps = len(read["p_true"]), cad.schedule(PRUNE, CLASSES, COUNT)[3]
    assert reader.asked == [(40, 16, e // 2 if e % 2 == 0 else None) for e in range(2 * looks)] and steps == 3 * looks


def test_a_stopped_run_reads_the_rest_of_its_epoch():
    whole, saved = scored(cad, PIXELS, PRUNE), []
    scored(cad, Reader(), PRUNE, on_step=lambda state: saved.append(state.tensors()))
    reader = Reader()
    again = scored(cad, reader, PRUNE, state=cad.State.restore(saved[3]))  # the first step of the second epoch is done
    assert reader.asked[0] == (24, 16, 1) and torch.equal(again["p_true"], whole["p_true"])


def test_a_run_shorter_than_an_epoch_reads_no_more_than_its_steps():
    short, reader = replace(PRUNE, student_epochs=5, ipc=1, batch=2, snapshots=3, window=2, windows=1), Reader()
    scored(cad, reader, short)
    assert [asked for asked in reader.asked if asked[2] is not None] == [(10, 2, 0)]


def test_cad_never_keeps_what_it_cannot_read():
    found = scored(cad, Reader(lacking=(3, 8)), PRUNE)["p_true"]
    assert (found[:, [3, 8]] == 0).all() and (found[:, [4, 9]] > 0).all()
    assert not {3, 8} & set(cad.prune(cad.dynamic_score(found, 3, 2), LABELS, 10).tolist())


def test_snapshots_that_no_window_reads_are_left_out():
    config = replace(PRUNE, student_epochs=80, window=3)  # eight snapshots, the windows read the fourth to the seventh
    reader, whole = Reader(), scored(cad, PIXELS, config)["p_true"]
    found = scored(cad, reader, config, every=False)["p_true"]
    assert [row.any().item() for row in found] == [False] * 3 + [True] * 4 + [False]
    assert sum(epoch is None for *_, epoch in reader.asked) == 4
    assert torch.equal(cad.dynamic_score(found, 3, 2), cad.dynamic_score(whole, 3, 2))


def test_a_bank_looks_after_the_epochs_asked_for():
    reader, whole = Reader(), scored(coresets, PIXELS, RANK)
    found = scored(coresets, reader, RANK, looks=(2,))
    assert sum(epoch is None for *_, epoch in reader.asked) == 1 and torch.equal(found.el2n[1], whole.el2n[1])
    assert torch.equal(found.p_true_train, whole.p_true_train) and not found.el2n[[0, 2, 3]].any()
    assert scored(coresets, PIXELS, RANK, looks=()).p_true is None

    def chosen(bank, **options):
        return coresets.select(bank, LABELS, replace(RANK, **options), generator=rng(0))["indices"]

    assert torch.equal(*(chosen(bank, method="el2n", epoch=2) for bank in (found, whole)))
    clean = {"method": "forgetting", "forgetting": "clean"}
    for options in ({"method": "el2n", "epoch": 3}, {"method": "dyn_unc"}, clean):
        with pytest.raises(ValueError, match=r"reads epochs after which the run did not look; it did: 2$"):
            chosen(found, **options)


def test_a_reader_that_gives_nothing_is_named():
    with pytest.raises(ValueError, match="none of the 40 images left of epoch 0 could be read"):
        scored(cad, lambda *_: iter(()), PRUNE)
    with pytest.raises(ValueError, match="none of the 40 images could be read"):
        scored(coresets, lambda *_: iter(()), RANK)


@pytest.mark.parametrize("method", stream_stages.RANKS)
def test_every_method_of_a_stream_ranks_unread_images_last(method):
    config = replace(RANK, method=method, ipc=19, epoch=2, dual_epochs=3)
    bank = scored(coresets, Reader(lacking=(3, 8)), config, final=False)
    if method == "el2n_best":  # its windows leave some of the hardest out, and end before the last
        score = coresets.image_score(bank, config, [], "cpu")
        assert score[[3, 8]].max() == 0 < score[[4, 9]].min()
    else:
        found = coresets.select(bank, LABELS, config, generator=rng(0))["indices"].tolist()
        assert not {3, 8} & set(found) and len(found) == 38


def test_a_bank_of_images_that_are_read_is_that_of_images_in_memory():
    read, held = (scored(coresets, images, RANK).tensors() for images in (Reader(), PIXELS))
    assert read.keys() == held.keys() and all(torch.equal(read[name], held[name]) for name in held)
    short = scored(coresets, Reader(lacking=(3,)), RANK, final=False)
    assert short.h_final is None and short.err_final is None
    assert (short.p_true[:, 3] == 0).all() and (short.p_true[:, 4] > 0).all() and (short.p_true_train[:, 3] == 0).all()


def test_crops_of_images_that_are_read_are_those_of_images_in_memory():
    class Bright(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x.mean((2, 3))[:, :CLASSES] * self.scale

    config, score = cad.Config(method="ca2d", ipc=2, factor=2, crops=3, pool=9), torch.rand(COUNT, generator=rng("s"))
    sides = torch.tensor([[16, 12]]).expand(COUNT, 2)
    facts = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "size": 16}
    held = cad.synthesise(Bright(), PIXELS, LABELS, score, config, sizes=sides, generator=rng(2), **facts)
    read = cad.synthesise(Bright(), lambda rows: (PIXELS[rows], sides[rows]), LABELS, score, config, generator=rng(2),
                          **facts)  # fmt: skip
    assert torch.equal(held[0], read[0]) and torch.equal(held[1], read[1])


# ---------------------------------------------------------------- the papers


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Lab:
    """A lab whose set is a stream of 24 images in two classes."""
    tree(tmp_path, sizes=((40, 40), (60, 50)), count=12)
    found = {s: load("own", tmp_path, split=s, resident_bytes=0, bad_share=0.2) for s in ("train", "test")}
    monkeypatch.setattr(Lab, "data", lambda self, name, split: found[split])
    monkeypatch.setattr(image_stages.teachers, "check", lambda *_: None)  # no teacher is better than chance on noise
    return Lab(Store(tmp_path / "runs"), None, torch.device("cpu"), "fp32")


@pytest.fixture
def memory(lab, tmp_path, monkeypatch) -> Lab:
    """The same lab with the set in memory."""
    found = {s: load("own", tmp_path, split=s, bad_share=0.2) for s in ("train", "test")}
    assert all(isinstance(data, Dataset) for data in found.values())
    monkeypatch.setattr(Lab, "data", lambda self, name, split: found[split])
    return lab


def cell(name: str, student_epochs: int = 2, **distill) -> tuple:
    """The setup of a cell of ImageNet-1K, on the stream; and its algorithm."""
    loaded = load_paper("hard_truths")
    (found,) = (c for c in loaded.cells_at("paper") if c.id == f"{name}/own")
    published = setups.setup_of(loaded.scales["paper"], found)
    run = {"ipc": 2, "batch": 8, "lr": 0.02, **distill}
    small = replace(
        published, dataset="own", size=32, network="resnet18-bn-w8", student_network="resnet18-bn-w8",
        distill={**published.distill, **run}, student=replace(published.student, epochs=student_epochs, batch=4),
        teacher=Recipe(name="tiny", epochs=1, batch=8, labels="hard", cutmix=False),
    )  # fmt: skip
    return published, small, found.algorithm


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("table7/imagenet-1k/cad-prune/hl/resnet-18/10", {"student_epochs": 18}),
        ("table7/imagenet-1k/dual/hl/resnet-18/50", {"epochs": 4, "stop": 4, "window": 2, "dual_epochs": 3}),
        ("table11/imagenet-1k/el2n-best/hl/resnet-18/50", {"epochs": 4, "stop": 4, "epoch": 2}),
    ],
)
def test_real_images_are_chosen_from_a_stream(lab, name, short):
    published, small, algorithm = cell(name, **short)
    assert published.student.name == "hard-truths-large-hard" and published.network == "resnet18"
    assert published.distill.get("lr", coresets.Config.lr) == (0.5 if algorithm == "cad" else 0.1)  # of a ResNet-18
    made = lab.entry(lab.images(small, algorithm, 0))
    tensors, train = made.tensors(), lab.data("own", "train")
    assert tensors["labels"].tolist() == [0, 0, 1, 1] == train.labels[tensors["indices"]].tolist()
    assert torch.equal(tensors["images"], image_stages.real_views(train, tensors["indices"], small))
    assert len(made.meta.get("accuracies", ())) == (10 if "el2n" in name else 0)
    (top1,) = lab.entry(lab.student(small, lab.images(small, algorithm, 0), 0)).meta["accuracies"]
    assert 0 <= top1 <= 100


def test_crops_are_cut_from_a_stream(lab):
    published, small, algorithm = cell("table7/imagenet-1k/ca2d/hl/resnet-18/10", student_epochs=18, pool=9, factor=2)
    assert published.distill["window"] == 6
    tensors = lab.entry(lab.images(small, algorithm, 0)).tensors()
    assert tensors["images"].shape == (4, 3, 32, 32) and tensors["images"].dtype == torch.uint8


def test_what_a_stream_cannot_give_is_named_when_it_is_planned(lab):
    _, small, _ = cell("table7/imagenet-1k/dual/hl/resnet-18/50")
    for changes, words in (
        ({"method": "kmeans"}, "method='kmeans' compares images with each other.*allowed: dyn_unc, dual"),
        ({"method": "margin"}, "method='margin'.*takes one that cannot be read for good; own is streamed"),
        ({"augment": "dsa"}, "augment='dsa': a scoring run at ImageNet scale sees rrc-flip alone"),
        ({"ipc": 13}, "ipc=13: the largest class has 12 images"),
        ({"method": "craig"}, "method='craig'"),
    ):
        with pytest.raises(ValueError, match=words):
            lab.images(replace(small, distill={**small.distill, **changes}), "coreset", 0)


def test_the_budget_that_cad_matches_is_that_of_the_students(lab):
    _, small, algorithm = cell("table7/imagenet-1k/cad-prune/hl/resnet-18/10", 18)
    assert small.distill["student_epochs"] == 200  # as published
    assert lab.images(small, algorithm, 0).settings["config"]["student_epochs"] == 18


def test_el2n_best_is_one_set_under_all_labels(lab):
    _, small, algorithm = cell("table11/imagenet-1k/el2n-best/hl/resnet-18/50", epochs=4, stop=4, epoch=2)
    regimes = [replace(small, student=replace(small.student, batch=50))]  # that of Table 1 for hard labels
    regimes += [replace(small, student=replace(small.student, batch=b, labels="soft")) for b in (4, 6)]
    assert len({lab.key(lab.images(one, algorithm, 0)) for one in regimes}) == 1


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_unreadable_images_are_not_chosen(lab, tmp_path):
    damage(tmp_path / "own" / "train")
    _, small, _ = cell("table7/imagenet-1k/dual/hl/resnet-18/50", epochs=4, stop=4, window=2, dual_epochs=3, ipc=11)
    rows = lab.entry(lab.images(small, "coreset", 0)).tensors()["indices"].tolist()
    items = lab.data("own", "train").items
    assert len(rows) == 22 and not any(items[i].endswith((b"a/1.png", b"b/2.png")) for i in rows)


# ---------------------------------------------------------------- sets of that size in memory


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("cad-prune", {"student_epochs": 18}),
        ("k-centers", {"epochs": 3, "milestones": (), "schedule": "constant"}),
        ("ca2d", {"student_epochs": 18, "pool": 9, "factor": 2}),
    ],
)
def test_a_set_in_memory_is_chosen_from_as_a_stream_is(memory, name, short):
    published, small, algorithm = cell(f"regimes-large/imagenette/{name}/hl/resnet-18/10", **short)
    assert (published.size, published.network, published.student.name) == (224, "resnet18", "hard-truths-large-hard")
    made = memory.images(small, algorithm, 0)
    tensors, train = memory.entry(made).tensors(), memory.data("own", "train")
    assert tensors["labels"].tolist() == [0, 0, 1, 1] and tensors["images"].shape == (4, 3, 32, 32)
    if name != "ca2d":
        assert torch.equal(tensors["images"], train.center(32, tensors["indices"]))
        assert torch.equal(tensors["labels"], train.labels[tensors["indices"]])
    (top1,) = memory.entry(memory.student(small, made, 0)).meta["accuracies"]
    assert 0 <= top1 <= 100


def test_weighted_images_are_refused_where_students_do_not_weigh_them(memory):
    _, small, _ = cell("regimes-large/imagenette/k-centers/hl/resnet-18/10", method="craig")
    with pytest.raises(ValueError, match="method='craig' weighs its images, and students at ImageNet scale do not"):
        memory.images(small, "coreset", 0)


def test_a_scoring_run_sees_the_same_crops_of_a_batch_again_and_others_in_the_next_epoch(memory):
    _, small, _ = cell("regimes-large/imagenette/k-centers/hl/resnet-18/10")
    read, rows = stream_stages.seen(memory, small).images, torch.arange(12)
    asked = ((rows, 0), (rows[4:], 0), (rows, 1), (rows, None))
    whole, again, later, clean = (torch.cat([x for x, _ in read(part, 4, epoch)]) for part, epoch in asked)
    assert torch.equal(whole[4:], again) and not torch.equal(whole, later)
    assert torch.equal(clean, memory.data("own", "train").center(32, rows))
