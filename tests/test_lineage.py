"""Going back to an earlier checkpoint begins a branch: no work is lost, and `auto` goes on with the newest."""

import json
import os
import shutil

import pytest
import torch

from runtime.checkpoints import load, read_label, save
from runtime.lineage import lineage_of, newest_valid
from runtime.processes import Distributed
from runtime.run_directory import RunDirectory
from utils import UserError


def state(epoch, step=0, who=0.0):
    return {"model": {"who": torch.tensor(who)}, "epoch": epoch, "step": step}


def opened(path):
    return RunDirectory(path, Distributed(), "acc1", ())


def train(path, start, last, who):
    """A run from a checkpoint (None: from nothing) that is stopped at `last` (epoch, step), leaving its files."""
    with opened(path) as run:
        run.go_on_from(start)
        for epoch in range(0 if start is None else start["epoch"], last[0]):
            run.log_row({"epoch": epoch, "who": who})
            run.keep_best(state(epoch + 1, who=who), 10.0 * epoch)
            run.save_checkpoint(f"checkpoint_{epoch + 1:04d}.pth", state(epoch + 1, who=who))
            run.save_checkpoint("checkpoint_last.pth", state(epoch + 1, who=who))
        if last[1]:
            run.save_checkpoint("checkpoint_last.pth", state(*last, who=who))


def files(path):
    """{name: who wrote it} of the checkpoints of a directory."""
    return {found.name: load(found)["model"]["who"].item() for found in path.glob("checkpoint*.pth")}


def auto(path):
    found, content = newest_valid(path)
    return found.name, content


def logged(path):
    return [(row["epoch"], row["who"]) for row in map(json.loads, (path / "log.txt").read_text().splitlines())]


@pytest.fixture
def finished(tmp_path):
    """A run of four epochs."""
    train(tmp_path / "run", None, (4, 0), 1.0)
    return tmp_path / "run"


def test_auto_goes_on_with_the_branch_written_last(finished):
    train(finished, load(finished / "checkpoint_0001.pth"), (2, 5), 2.0)
    name, content = auto(finished)
    assert (name, content["epoch"], content["step"], content["model"]["who"]) == ("checkpoint_last.pth", 2, 5, 2.0)
    assert files(finished) == {
        "checkpoint_0001.pth": 1.0,
        "checkpoint_0002.pth": 2.0,
        "checkpoint_best.pth": 2.0,
        "checkpoint_last.pth": 2.0,
    }
    assert files(finished / "abandoned_01") == {
        f"checkpoint_{name}.pth": 1.0 for name in ("0002", "0003", "0004", "best", "last")
    }
    assert logged(finished) == [(0, 1.0), (1, 2.0)]
    assert logged(finished / "abandoned_01") == [(epoch, 1.0) for epoch in range(4)]


def test_the_best_of_the_common_past_is_kept_for_both_branches(tmp_path):
    train(tmp_path, None, (2, 0), 1.0)
    train(tmp_path, load(tmp_path / "checkpoint_last.pth"), (2, 7), 1.0)  # not better than the best, of epoch 2
    train(tmp_path, load(tmp_path / "checkpoint_0002.pth"), (3, 0), 2.0)
    assert files(tmp_path)["checkpoint_best.pth"] == 2.0
    assert files(tmp_path / "abandoned_01") == {"checkpoint_best.pth": 1.0, "checkpoint_last.pth": 1.0}


def test_the_files_to_go_on_from_stay_as_they_are(finished):
    before = {path.name: path.read_bytes() for path in finished.glob("checkpoint*.pth")}
    start = load(finished / "checkpoint_last.pth")
    with opened(finished) as run:
        run.go_on_from(start)
        for name in ("checkpoint_0004.pth", "checkpoint_last.pth"):  # as at the end of its epoch, with other flags
            run.save_checkpoint(name, start | {"model": {"who": torch.tensor(2.0)}})
        run.keep_best(start, 30.0)
    assert before == {path.name: path.read_bytes() for path in finished.glob("checkpoint*.pth")}


def test_a_branch_that_was_stopped_at_its_beginning_leaves_the_files_that_it_began_from(finished):
    first = finished / "checkpoint_0001.pth"
    before = first.read_bytes()
    for start in (first, finished / "checkpoint_last.pth"):
        told = load(start)
        with opened(finished) as run:
            run.go_on_from(told)
            run.save_checkpoint("checkpoint_0001.pth", told)
            run.save_checkpoint("checkpoint_last.pth", told)
    assert first.read_bytes() == before
    assert len(load(finished / "checkpoint_last.pth")["lineage"]) == 2


def test_going_on_from_the_last_checkpoint_begins_no_branch(finished, capsys):
    before = read_label(finished / "checkpoint_last.pth")["branch"]
    train(finished, auto(finished)[1], (5, 3), 1.0)
    train(finished, auto(finished)[1], (6, 0), 1.0)
    content = load(finished / "checkpoint_last.pth")
    assert [began.branch for began in lineage_of(content)] == [before]
    assert not list(finished.glob("abandoned*")) and capsys.readouterr().err == ""


def test_each_branch_records_where_it_comes_from(finished):
    train(finished, load(finished / "checkpoint_0002.pth"), (4, 0), 2.0)
    train(finished, load(finished / "checkpoint_0003.pth"), (4, 2), 3.0)
    first, second, third = lineage_of(auto(finished)[1])
    assert (first[1:], second[1:], third[1:]) == ((0, 0), (2, 0), (3, 0))
    assert first.branch < second.branch < third.branch == read_label(finished / "checkpoint_last.pth")["branch"]
    assert files(finished)["checkpoint_0002.pth"] == 1.0 and files(finished)["checkpoint_0003.pth"] == 2.0


def test_one_may_go_back_to_an_abandoned_branch_and_finds_its_log(finished):
    train(finished, load(finished / "checkpoint_0001.pth"), (3, 0), 2.0)
    train(finished, load(finished / "abandoned_01" / "checkpoint_last.pth"), (5, 0), 3.0)
    assert files(finished) == {
        "checkpoint_0001.pth": 1.0,
        "checkpoint_0005.pth": 3.0,
        "checkpoint_best.pth": 3.0,
        "checkpoint_last.pth": 3.0,
    }
    assert set(files(finished / "abandoned_02").values()) == {2.0}
    assert logged(finished) == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 3.0)]


def test_another_directorys_checkpoint_begins_a_branch(finished, tmp_path):
    train(tmp_path / "other", None, (3, 0), 5.0)
    train(tmp_path / "other", load(finished / "checkpoint_0002.pth"), (3, 0), 6.0)
    assert set(files(tmp_path / "other").values()) == {6.0}
    assert set(files(tmp_path / "other" / "abandoned_01").values()) == {5.0}
    train(tmp_path / "new", load(finished / "checkpoint_0002.pth"), (3, 0), 7.0)
    assert len(lineage_of(load(tmp_path / "new" / "checkpoint_last.pth"))) == 2


def test_a_run_from_nothing_takes_no_file_that_was_there_for_its_own(finished):
    train(finished, None, (1, 0), 2.0)
    assert set(files(finished).values()) == {2.0} and len(files(finished / "abandoned_01")) == 6


def test_files_without_a_lineage_are_one_branch(tmp_path):
    for epoch in (1, 2, 3):
        save(tmp_path / f"checkpoint_{epoch:04d}.pth", state(epoch, who=1.0))
    torch.save(state(3, 7, who=1.0), tmp_path / "checkpoint_last.pth")
    train(tmp_path, auto(tmp_path)[1], (4, 0), 1.0)
    assert len(files(tmp_path)) == 6 and not list(tmp_path.glob("abandoned*"))
    train(tmp_path, load(tmp_path / "checkpoint_0002.pth"), (3, 1), 2.0)
    assert auto(tmp_path)[1]["model"]["who"] == 2.0
    assert set(files(tmp_path / "abandoned_01")) == {
        f"checkpoint_{name}.pth" for name in ("0003", "0004", "best", "last")
    }


def test_a_damaged_end_of_a_branch_is_set_aside_with_the_rest(finished, capsys):
    path = finished / "checkpoint_last.pth"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    for name in ("checkpoint_0004.pth", "checkpoint_best.pth"):
        (finished / name).unlink()
    name, start = auto(finished)
    assert name == "checkpoint_0003.pth" and "passing over" in capsys.readouterr().err
    train(finished, start, (3, 2), 2.0)
    assert (finished / "abandoned_01" / path.name).read_bytes() == content
    assert auto(finished)[1]["model"]["who"] == 2.0


def test_off_the_main_rank_nothing_is_moved(finished):
    before = files(finished)
    with RunDirectory(finished, Distributed(rank=1, world_size=2), "acc1", ()) as run:
        run.go_on_from(load(finished / "checkpoint_0001.pth"))
    assert files(finished) == before


# ------------------------------------------------------------------------------------------- kill -9 anywhere
CALLS = ("mkdir", "open", "fsync", "replace", "rename", "unlink")


def killed_going_back(path, before):
    """Go back to epoch 1, and be killed before the system call number `before`; whether it came to that."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    count = 0

    def counted(real):
        def call(*args, **how):
            nonlocal count
            count += 1
            if count == before:
                os._exit(9)
            return real(*args, **how)

        return call

    try:
        with opened(path) as run:
            start = load(path / "checkpoint_0001.pth")
            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            run.go_on_from(start)
            os._exit(0)
    finally:
        os._exit(99)


def test_a_run_killed_while_it_goes_back_leaves_the_old_branch_or_the_point_to_go_on_from(finished, tmp_path, capsys):
    ends = []
    for before in range(1, 1000):
        copy = tmp_path / str(before)
        shutil.copytree(finished, copy)
        if not killed_going_back(copy, before):
            break
        with opened(copy):  # what every run does first
            name, content = auto(copy)
        ends.append(content["epoch"])
        kept = [*files(copy), *(name for folder in copy.glob("abandoned*") for name in files(folder))]
        assert sorted(kept) == sorted(files(finished))
        if content["epoch"] == 4:
            assert files(copy) == files(finished)
        assert logged(copy)[: content["epoch"]] == logged(finished)[: content["epoch"]]
        train(copy, content, (content["epoch"], 3), 2.0)
        assert auto(copy)[1]["model"]["who"] == 2.0
        assert not list(copy.glob("abandoned*/moves.json"))
        train(copy, auto(copy)[1], (5, 0), 2.0)
        if content["epoch"] == 1:  # a branch of its own though nothing of it was written before the kill
            train(copy, load(copy / "abandoned_01" / "checkpoint_0004.pth"), (5, 0), 3.0)
            assert 2.0 not in files(copy).values()
    assert len(ends) > 15 and ends == sorted(ends, reverse=True) and set(ends) == {4, 1}


def test_a_note_of_moves_that_no_run_wrote_moves_nothing(finished):
    (finished / "abandoned_01").mkdir()
    for content in ('["checkpoint/../run/checkpoint_last.pth"]', '["log.txt"]', "[3]", "{", '"checkpoint_last.pth"'):
        (finished / "abandoned_01" / "moves.json").write_text(content)
        with pytest.raises(UserError, match="moves.json: it is not the list"):
            opened(finished)
    assert len(files(finished)) == 6
