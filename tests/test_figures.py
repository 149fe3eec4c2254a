"""The figures of WMDD and its notebook: geometry of the toy, what is drawn, what the notebook checks."""

import dataclasses
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from common.store import Product, Store
from papers import planning, runner
from papers.cells import ROOT, load_paper
from papers.show import Shown
from papers.stages import Lab
from papers.wmdd import figures, toy
from tests.notebook_cells import code_cells, load_notebook, tagged

# Figure 2


@pytest.fixture(scope="module", params=sorted(toy.SHAPES))
def barycenters(request):
    """A kind of outline with its clouds and its barycenters under MMD and Wasserstein."""
    generator = torch.Generator().manual_seed(1)
    clouds = toy.clouds(request.param, 80, generator)
    start = 0.5 * torch.randn(80, 2, generator=generator, dtype=torch.float64)
    return request.param, clouds, toy.mmd_barycenter(clouds, start), toy.wasserstein_barycenter(clouds, start)


def test_clouds_lie_on_their_outlines(barycenters):
    kind, clouds, _, _ = barycenters
    for cloud, shape in zip(clouds, toy.SHAPES[kind], strict=True):
        shape = torch.tensor(shape, dtype=torch.float64)
        assert toy.outline_distance(kind, cloud, shape).max() < 5 * toy.WIDTH
        assert (cloud.mean(0) - shape[:2]).norm() < 0.02
        assert (cloud - shape[:2]).abs().max() > 0.9 * shape[2]


def test_wasserstein_atoms_lie_on_the_shape_of_mean_place_and_size_and_mmd_atoms_do_not(barycenters):
    kind, _, mmd, wasserstein = barycenters
    mean = toy.mean_shape(kind)  # the closed form for shapes that differ by shift and scale
    assert toy.outline_distance(kind, wasserstein, mean).mean() < 0.02
    assert toy.outline_distance(kind, mmd, mean).mean() > 0.15
    reach = (wasserstein - mean[:2]).abs().max(0).values  # the atoms cover the shape, not a part of it
    assert (reach > 0.9 * mean[2]).all()


def test_mmd_atoms_spread_over_all_inputs(barycenters):
    kind, _, mmd, _ = barycenters
    shapes = torch.tensor(toy.SHAPES[kind], dtype=torch.float64)
    distance = torch.stack([toy.outline_distance(kind, mmd, shape) for shape in shapes])  # [shapes, m]
    assert distance.min(0).values.mean() < 0.1
    share = torch.bincount(distance.argmin(0), minlength=len(shapes)) / len(mmd)
    assert (share > 0.1).all()


def test_mmd_barycenter_is_nearer_in_mmd_and_wasserstein_in_transport(barycenters):
    ot = pytest.importorskip("ot")
    _, clouds, mmd, wasserstein = barycenters

    def squared_mmd(atoms):
        def kernel(a, b):
            return torch.exp(-torch.cdist(a, b).square() / (2 * 0.15**2)).mean()

        return sum(kernel(atoms, atoms) + kernel(c, c) - 2 * kernel(atoms, c) for c in clouds)

    def transport(atoms):
        return sum(ot.emd2([], [], torch.cdist(atoms, c).square().numpy()) for c in clouds)

    assert squared_mmd(mmd) < squared_mmd(wasserstein)
    assert transport(wasserstein) < transport(mmd)


def test_kl_barycenter_is_the_mixture_and_nothing_has_a_lower_divergence():
    generator = torch.Generator().manual_seed(2)
    places = toy.grid(20)
    densities = torch.stack([toy.density(c, places, 0.3) for c in toy.clouds("circle", 50, generator)])
    assert torch.allclose(densities.sum(1), torch.ones(4, dtype=torch.float64))
    found = toy.kl_barycenter(densities)
    assert torch.allclose(found, sum(densities) / 4)

    def divergence(q):
        return (densities * (densities / q).log()).sum()

    for _ in range(5):
        other = found * torch.exp(0.1 * torch.randn(len(found), generator=generator, dtype=torch.float64))
        assert divergence(other / other.sum()) > divergence(found)
    geometric = densities.log().mean(0).exp()
    assert divergence(geometric / geometric.sum()) > divergence(found)


def test_figure2_is_the_same_each_time_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = (figures.figure2(None, points=20, side=10) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    panels = [[ax.collections[-1].get_offsets() for ax in f.axes if ax.collections] for f in (first, second)]
    assert len(panels[0]) == 6
    assert all((a == b).all() for a, b in zip(*panels, strict=True))
    assert [ax.get_title() for ax in first.axes[:4]] == [
        "(a) inputs", "(b) KL divergence", "(c) MMD", "(d) Wasserstein",
    ]  # fmt: skip


# Figures of a run


@pytest.fixture
def smoke(tmp_path):
    """A smoke run of Table 1 and the figures whose store and results are empty."""
    args = runner.parse(["paper=wmdd", "scale=smoke", "device=cpu", "skip=table2,table3,table4,table5"])
    paper, lab = load_paper("wmdd"), Lab(Store(tmp_path / "store"), None, torch.device("cpu"), "auto")
    return runner.Run(args, paper, lab, planning.make_plan(args, paper, lab), tmp_path / "out", {})


def planned_of(run, table, **wanted):
    return [p for p in run.planned if p.cell.table == table and wanted.items() <= vars(p.cell).items()]


def fill(run, table):
    """Give every cell of a table or figure a result of two seeds that rises with IPC."""
    for p in planned_of(run, table):
        values = [20.0 + p.cell.ipc / 2 + seed for seed in (0, 1)]
        run.results[p.cell.id] = {
            "cell": p.cell.id, **p.cell.key(), "label_regime": p.cell.label_regime, "values": values, "seeds": [0, 1],
            "mean": sum(values) / 2, "std": 0.7, "run_on": p.setup.run_on, "teacher_accuracy": 99.0,
            "settings": {"distill": dict(p.setup.distill)},
        }  # fmt: skip


def captions(figure):
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def test_every_figure_of_the_paper_has_a_function_and_the_other_way_round():
    assert set(load_paper("wmdd").figures) == set(figures.__all__)


def test_figures_without_results_are_none(smoke):
    for name in set(figures.__all__) - {"figure2"}:
        assert getattr(figures, name)(smoke) is None, name


def test_only_what_is_there_is_drawn_and_saved(smoke, monkeypatch):
    fill(smoke, "figure4")
    monkeypatch.setattr(figures, "figure2", partial(figures.figure2, points=10, side=8))
    assert runner.draw_figures(smoke) == ["figure2", "figure4"]
    assert {f.name for f in smoke.folder.iterdir()} == {f"figure{n}.{kind}" for n in (2, 4) for kind in ("png", "pdf")}


def test_figures_of_another_paper_are_looked_for_in_its_own_folder(smoke, capsys):
    smoke.paper = dataclasses.replace(smoke.paper, name="unheard-of")
    assert runner.draw_figures(smoke) == []
    assert "unheard-of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "table", "lines"), [("figure4", "figure4", 2), ("figure5a", "figure5a", 1), ("figure_labels", "table1", 6)]
)
def test_curves_show_means_and_deviations_and_say_what_they_were_run_on(smoke, name, table, lines):
    fill(smoke, table)
    figure = getattr(figures, name)(smoke)
    assert isinstance(figure, Figure)
    ax = figure.axes[0]
    assert len(ax.containers) == lines
    middle, _, (bars,) = ax.containers[0]
    ipcs = {"figure4": [1, 10, 50], "figure5a": [10] * 5, "figure_labels": [1, 10, 20, 50, 100]}[name]
    assert list(middle.get_ydata()) == pytest.approx([20.5 + ipc / 2 for ipc in ipcs])
    if name != "figure5a":
        aside = 0.2 if name == "figure_labels" else 0  # its lines are moved a little
        assert list(middle.get_xdata()) == pytest.approx(ipcs, rel=aside)
    (_, low), (_, high) = bars.get_segments()[0]
    assert high - low == pytest.approx(2 * 0.5**0.5)  # one standard deviation of two seeds, up and down
    assert "(%)" in ax.get_ylabel() and ax.get_xscale() == "log"
    assert "Error bars: mean ± standard deviation over 2 students." in captions(figure)
    assert "Scale smoke: not comparable with print" in captions(figure)
    assert "digits, 16 px" in captions(figure) + ax.get_title()


def test_lambda_axis_holds_the_weights_that_were_run(smoke):
    fill(smoke, "figure5a")
    line = figures.figure5a(smoke).axes[0].lines[0]
    assert line.get_xdata().tolist() == [0.1, 1, 10, 100, 1000]


def test_comparable_scales_do_not_call_themselves_incomparable(smoke):
    fill(smoke, "figure4")
    smoke.paper.scales["smoke"]["comparable"] = True
    assert "not comparable" not in captions(figures.figure4(smoke))


def keep(run, planned, stage, tensors, **meta):
    """Put a finished stage of a cell into the store of the run."""
    found = next(s for s in planned.stages[0].all() if s.name == stage)
    run.lab.store.make(found.name, found.settings, found.inputs, lambda _: Product(tensors, meta))


def test_figure1_puts_under_each_image_the_real_one_nearest_to_its_atom(smoke):
    (planned,) = planned_of(smoke, "table1", dataset="ImageNette", method="WMDD", ipc=10, label_regime="soft")
    train = smoke.lab.data("digits", "train")
    order = torch.cat([train.class_indices(k) for k in range(10)])
    features = torch.randn(len(order), 6, generator=torch.Generator().manual_seed(3))
    rows = torch.stack([torch.arange(10) + (train.labels[order] < k).sum() + k for k in range(10)])  # [K, I]
    images = torch.rand(100, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    keep(smoke, planned, "statistics", {"features": features, "labels": train.labels[order]})
    assert figures.figure1(smoke) is None
    keep(smoke, planned, "distill", {"images": images, "atoms": features[rows] + 0.01}, classes=list(train.classes))
    figure = figures.figure1(smoke, per_class=2)
    shown = [torch.tensor(ax.images[0].get_array()).permute(2, 0, 1) for ax in figure.axes]
    for k in range(10):
        for j in range(2):
            assert torch.equal(shown[20 * j + k], images[10 * k + j])
            real = train.center(16, order[rows[k, j]].view(1))[0] / 255
            assert torch.equal(shown[20 * j + 10 + k], real)
    assert [ax.get_ylabel() for ax in figure.axes[::10]] == ["synthetic", "real"] * 2
    assert "digits, 16 px, slim networks, IPC 10" in captions(figure)


def test_figure5b_has_a_column_a_weight_and_a_row_a_class(smoke):
    names, made = [str(k) for k in range(10)], {}
    for planned in planned_of(smoke, "figure5a"):
        weight = planned.cell.distill["bn_weight"]
        made[weight] = torch.full((100, 3, 8, 8), 0.1 * (1 + len(made)))
        keep(smoke, planned, "distill", {"images": made[weight]}, classes=names)
    figure = figures.figure5b(smoke)
    assert [ax.get_title() for ax in figure.axes[:5]] == [f"λ = {w}" for w in ("0.1", "1", "10", "100", "1000")]
    assert [ax.get_ylabel() for ax in figure.axes[::5]] == ["0", "5"]
    assert [float(ax.images[0].get_array()[0, 0, 0]) for ax in figure.axes[5:]] == [
        pytest.approx(float(made[w][0, 0, 0, 0])) for w in sorted(made)
    ]


# Notebook


@pytest.fixture
def notebook():
    return load_notebook("wmdd")


def test_notebook_shows_what_stands_beside_each_table(notebook):
    code = "\n".join(code_cells(notebook))
    assert not [name for name in load_paper("wmdd").tables if f'table("{name}_extras")' not in code]


@pytest.fixture
def checks(notebook, smoke):
    """Runs the last cell of the notebook on results of Table 1 after a change to them."""
    fill(smoke, "table1")

    def run(change=lambda results: None):
        change(smoke.results)
        for result in smoke.results.values():
            result["mean"], result["std"] = sum(result["values"]) / 2, 0.7
        teachers = {("ImageNette", "digits, 32 px"): smoke.results[next(iter(smoke.results))]["teacher_accuracy"]}
        names = {"finished": smoke, "teachers": teachers, "accuracies": Shown(smoke).accuracies, "pairwise": pairwise}
        exec(tagged(notebook, "checks"), names)

    return run


def test_notebook_checks_pass_on_plausible_results(checks, capsys):
    checks()
    assert "checks hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ipc", "field", "value", "words"),
    [(100, "values", [30.0, 31.0], "falls from"), (10, "values", [11.0, 12.0], "reaches 11.5 %"),
     (None, "teacher_accuracy", 80.0, "teacher of digits")],
)  # fmt: skip
def test_notebook_checks_fail_on_implausible_results(checks, ipc, field, value, words):
    def change(results):
        for result in results.values():
            if ipc in (None, result["ipc"]):
                result[field] = value

    with pytest.raises(RuntimeError, match=words):
        checks(change)


def test_notebook_fails_when_a_cell_failed(checks, smoke):
    smoke.planned[0].why = "failed: the loss is not finite"
    with pytest.raises(RuntimeError, match="loss is not finite"):
        checks()


def test_quirks_have_no_long_lines_and_no_sign_of_a_machine():
    text = Path(ROOT, "wmdd", "quirks.md").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    assert "/tmp" not in text and "/home" not in text
