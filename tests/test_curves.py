"""Pictures of a run: every column of the log that is to be drawn is drawn, and readable."""

import pytest
from tiny_runs import rows, train

from runtime.curves import EMA, draw_curves
from training.classification import Classification

LOSS = {"Loss (nats)": {"train_loss": "training", "test_loss": "test"}}
TWO = {"Top-1 (%)": {"test_acc1": "top-1"}, "Top-5 (%)": {"test_acc5": "top-5"}}


def row(epoch):
    return {"epoch": epoch, "train_loss": 2.0, "test_loss": 1.5, "test_loss_ema": 1.4, "test_acc1": 60.0 + epoch}


@pytest.mark.parametrize("epochs", [1, 2, 320])
def test_curves_have_integer_epochs_labels_and_every_column(epochs):
    (axes,) = draw_curves([row(epoch) for epoch in range(epochs)], LOSS).axes
    assert axes.get_xlabel() == "Epoch" and axes.get_ylabel() == "Loss (nats)"
    assert [text.get_text() for text in axes.get_legend().texts] == ["training", "test", "test, EMA"]
    assert all(len(line.get_xdata()) == epochs for line in axes.lines)
    assert all(tick == int(tick) for tick in axes.get_xticks())
    assert epochs > 1 or axes.lines[0].get_marker() == "."  # a single point must be visible


def test_a_column_without_values_is_left_out():
    figure = draw_curves([{"epoch": 0, "test_acc1": 50.0}, {"epoch": 1, "test_acc1": float("inf")}], TWO)
    assert [len(axes.lines) for axes in figure.axes] == [1, 0]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0] and figure.axes[1].get_legend() is None


def test_each_panel_marks_the_best_epoch():
    for axes in draw_curves([row(epoch) for epoch in range(5)], TWO, best_epoch=3).axes:
        mark = axes.lines[-1]
        assert mark.get_label() == "best: epoch 3" and set(mark.get_xdata()) == {3}


def test_a_title_is_not_taken_for_mathematics():
    figure = draw_curves([row(0)], LOSS, title="of $run")
    assert figure.get_suptitle() == "of $run"
    figure.draw_without_rendering()


@pytest.mark.slow
def test_what_a_run_logs_is_what_its_pictures_draw(tmp_path):
    """The names of the columns stand in one table: a run with averaged weights has them all, twins included."""
    train(tmp_path, "--epochs", "1", "--model-ema")
    columns = [column for plot in Classification.plots.values() for panel in plot.values() for column in panel]
    twins = [column + EMA for column in columns if column.startswith("test_")]
    (logged,) = rows(tmp_path)
    assert {*columns, *twins} <= logged.keys()
    drawn = [len(axes.lines) for plot in Classification.plots.values() for axes in draw_curves([logged], plot).axes]
    assert sum(drawn) == len(columns) + len(twins)
    assert set(Classification.plots) <= {path.name for path in tmp_path.iterdir()}
