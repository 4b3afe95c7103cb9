"""What a run promises: one entry a row of the table in docs/reliability.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """``figure`` is the figure to reach; ``total``: how many cases a full run has to try for it."""

    text: str
    figure: str
    total: int


PROMISES = {
    1: Promise("`kill -9` anywhere, resume: the same result", "50/50 kill points", 50),
    2: Promise("resuming in an epoch reads no sample twice", "0 read twice", 1),
    3: Promise("the data order does not depend on workers or processes", "same trace; weights <= 1e-10", 16),
    4: Promise("lr, weight decay, EMA and best accuracy continue", "0 differences", 1),
    5: Promise("SIGTERM, SIGINT, SIGUSR1 save and leave", "20/20 saved, exit 143/130/138, 0 hangs", 20),
    6: Promise("full disk, read-only directory", "40/40 previous file unchanged, no temporary, one line, exit 3", 40),
    7: Promise("written means written", "0 violations; 1000/1000 valid reads", 1000),
    8: Promise("damage is noticed", "100 % of 2000 bit flips, 500 truncations, 500 zeroed runs", 3000),
    9: Promise("bad files and flags get one line", "2500/2500: exit 2, file and reason, 0 tracebacks", 2500),
    10: Promise("a hostile checkpoint runs nothing", "0 of 30 or more executed", 30),
    11: Promise("evaluation counts every image once", "sizes 1-67 x 1-4 processes x batches 1, 3, 8, 16: equal", 1072),
    12: Promise("a non-finite loss changes nothing", "10/10: 0 parameters changed, all ranks exit 4 in 10 s", 10),
    13: Promise("bad images are named, or skipped on request", "0 substitutions", 1),
    14: Promise("a dead worker or rank ends the run", "10/10 non-zero in 10 s, 0 orphans", 10),
    15: Promise("mismatches are told", "20/20 exit 2 with the keys", 20),
    16: Promise("old files load", "100 %", 1),
    17: Promise("two runs, one directory", "10/10 refused; a stale lock clears", 10),
    18: Promise("branches: auto goes on with the one written last", "20/20, killed anywhere while it goes back", 20),
    19: Promise("output that nobody takes ends nothing", "12/12: the same files, exit 0", 12),
    20: Promise("the same arguments everywhere", "16/16: all processes exit 2 in one line", 16),
    21: Promise("bounded input", "12,000/12,000 wrong inputs: one line, 1 GiB and 10 s at most", 12000),
    22: Promise("no request, no foreign file", "0 of 100 or more checkpoints and flags open one", 100),
}
