"""Several processes that find one another, exchange messages and end."""

from __future__ import annotations

import json
import os

import pytest

pytestmark = pytest.mark.slow


def run_job(launcher, world, case, slurm=False, **arguments):
    """[(exit code, stdout, stderr)] of `world` processes."""
    own = [{"case": case, **arguments}] * world
    if slurm:
        step = {"SLURM_JOB_ID": os.getpid(), "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": world}
        ranks = [step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in range(world)]
        environments = [{name: str(value) for name, value in each.items()} for each in ranks]
        children = [launcher.start("children:run", env, **own[0]) for env in environments]
    else:
        children = launcher.start_job("children:run", world, *own)
    return [(child.wait(), child.out, child.err) for child in children]


@pytest.mark.parametrize("slurm", [False, True], ids=["torchrun", "slurm"])
def test_ranks_find_one_another_and_exchange_messages(launcher, slurm):
    ended = run_job(launcher, 2, "exchange", slurm)
    assert [code for code, _, _ in ended] == [0, 0], ended
    for rank, (_, out, _) in enumerate(ended):
        assert json.loads(out) == [rank, rank == 0, [3.0, 1.0], [{"from": 0}, {"from": 1}]]


@pytest.mark.parametrize("failing", [0, 1])
def test_when_one_rank_fails_the_others_do_not_hang_and_only_it_says_why(launcher, failing):
    ended = run_job(launcher, 3, "fail_on_one_rank", failing=failing)
    assert [code for code, _, _ in ended] == [2 if rank == failing else 1 for rank in range(3)], ended
    for rank, (_, _, err) in enumerate(ended):
        said = "error: only here" if rank == failing else "error: another process of this job ended: "
        assert err.splitlines()[-1].startswith(said) and "Traceback" not in err, ended


def test_buffers_are_not_broadcast_and_gradients_are_averaged(launcher):
    zero, one = (json.loads(out) for _, out, _ in run_job(launcher, 2, "one_step"))
    assert zero[0] == pytest.approx(0.1) and one[0] == pytest.approx(0.15) and zero[1:] == one[1:]
