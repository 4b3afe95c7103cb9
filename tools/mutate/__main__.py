"""Plant faults in the code, one at a time, and count those that a test of that very behaviour catches.

    python -m tools.mutate --output docs/planted_faults.json

A fault is a small change: a comparison flipped, a constant one larger, a condition negated, two arguments exchanged,
a call left out. Which are planted is drawn by --seed from all that there are. Each is tried by the files of tests
that name the module's behaviour (TESTS), until one fails; the one that failed last time, as --output has it, goes
first. Those that no test could notice are listed, with the reason, in tests/equivalent_faults.yaml. Exit code 1
unless 95 % of the others are caught.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import yaml

from runtime.entry_point import run_cli
from tools.command_line import ToolParser
from training.arguments import COUNT, POSITIVE
from utils import UserError, atomic_write, make_directory, say

from .faults import draw
from .report import REQUIRED, as_json, share
from .trials import Trials

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = ROOT / "tests" / "equivalent_faults.yaml"

# The tests that name a module's behaviour, the quickest first.
TESTS = {
    "engine.py": ("engine", "training"),
    "training/agreement.py": ("engine",),
    "training/arguments.py": ("cli",),
    "training/classification.py": ("finetune", "training"),
    "training/classification_flags.py": ("cli",),
    "training/console.py": ("engine", "training"),
    "training/evaluation.py": ("training",),
    "training/losses.py": ("losses",),
    "training/model.py": ("finetune", "training"),
    "training/model_bounds.py": ("untrusted_checkpoints",),
    "training/optimizer.py": ("schedule", "finetune"),
    "training/options.py": ("cli", "training"),
    "training/precision.py": ("training",),
    "training/resume.py": ("training",),
    "training/trainer.py": ("engine", "finetune", "training"),
    "runtime/checkpoints.py": ("checkpoints", "untrusted"),
    "runtime/lineage.py": ("lineage",),
    "inputs/label_maps.py": ("token_labels",),
    "inputs/label_map_crop.py": ("token_labels",),
    "inputs/label_map_trace.py": ("token_labels",),
    "inputs/sampler.py": ("sampler",),
    "models/mixers.py": ("mixers", "models"),
    "models/fourier.py": ("mixers",),
    "models/local.py": ("mixers",),
    "models/spectral_gate.py": ("mixers", "resampling"),
    "models/scattering.py": ("mixers", "wavelet", "models"),
    "models/wavelet.py": ("wavelet", "mixers"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser("mutate", __doc__)
    parser.add_argument("--output", type=Path, help="JSON of the figures and of what survived")
    parser.add_argument("--faults", type=POSITIVE, default=220, metavar="N", help="how many to plant")
    parser.add_argument("--seed", type=COUNT, default=0, metavar="N", help="of the draw")
    parser.add_argument("--modules", nargs="+", default=["*"], metavar="PATTERN", help="try those in these alone")
    args = parser.parse_args(argv)
    last_time: dict[str, str] = {}
    if args.output is not None:
        make_directory(args.output.parent)
        if args.output.exists():
            last_time = json.loads(args.output.read_text(encoding="utf-8"))["caught by"]
    equivalent = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or {}
    drawn = draw(args.faults, args.seed, list(TESTS), ROOT)
    faults = [fault for fault in drawn if any(fnmatch(fault.module, pattern) for pattern in args.modules)]
    if not faults:
        raise UserError(f"--modules {' '.join(args.modules)}: there are {', '.join(TESTS)}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(ROOT, Path(folder))
        for number, fault in enumerate(faults, 1):
            caught = trials.run(TESTS[fault.module], fault, last_time.get(fault.name, ""))
            results.append((fault, caught, "" if caught else equivalent.get(fault.name, "")))
            verdict = f"caught: {caught}" if caught else f"SURVIVED {results[-1][2]}"
            say(f"{number}/{len(faults)} {fault.module}:{fault.line} {fault.where}: {fault.change}: {verdict}")
    figures = as_json(results, args.seed)
    if args.output is not None:
        atomic_write(args.output, figures)
    counts = Counter("caught" if caught else "equivalent" if reason else "survived" for _, caught, reason in results)
    say(
        f"{counts['caught']} of {len(results)} caught, {counts['equivalent']} equivalent, {counts['survived']} survived"
    )
    if share(counts["caught"], counts["survived"]) < REQUIRED:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
