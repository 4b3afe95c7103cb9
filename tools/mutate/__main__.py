"""Plant faults in the code, one at a time, and count those that a test of that very behaviour catches.

    python -m tools.mutate --output docs/planted_faults.json

A fault is a small change: a comparison flipped, a constant one larger, a condition negated, two arguments exchanged,
a call left out. Which are planted is drawn by --seed from all that there are. Each is tried by the files of tests
that name the module's behaviour (TESTS), until one fails. Those that no test could notice are listed, with the
reason, in tests/equivalent_faults.yaml. Exit code 1 unless 95 % of the others are caught.

What --output has of an earlier run is taken over, for faults whose module and whose test have not changed since; the
test that caught a fault is the first to try the next time.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import yaml

from runtime.entry_point import run_cli
from tools.command_line import ToolParser
from training.arguments import COUNT, POSITIVE
from utils import UserError, atomic_write, make_directory, say

from .faults import draw
from .report import REQUIRED, Outcome, as_figures, holds, outcome, share
from .trials import Trials

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = ROOT / "tests" / "equivalent_faults.yaml"

# The tests that name a module's behaviour, the quickest first.
TESTS = {
    "engine.py": ("engine", "training"),
    "training/agreement.py": ("engine",),
    "training/arguments.py": ("cli",),
    "training/classification.py": ("finetune", "curves", "training"),
    "training/classification_flags.py": ("cli",),
    "training/console.py": ("engine", "training"),
    "training/evaluation.py": ("training",),
    "training/losses.py": ("losses",),
    "training/model.py": ("finetune", "training"),
    "training/model_bounds.py": ("untrusted_checkpoints",),
    "training/optimizer.py": ("schedule", "finetune"),
    "training/options.py": ("cli", "training"),
    "training/precision.py": ("training",),
    "training/resume.py": ("engine", "training"),
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
    parser.add_argument(
        "--modules", nargs="+", default=["*"], metavar="PATTERN", help="try those in these alone (default: all)"
    )
    args = parser.parse_args(argv)
    equivalent = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or {}
    drawn = draw(args.faults, args.seed, list(TESTS), ROOT)
    wanted = {fault for fault in drawn if any(fnmatch(fault.module, pattern) for pattern in args.modules)}
    if not wanted:
        raise UserError(f"--modules {' '.join(args.modules)}: there are {', '.join(TESTS)}")
    earlier: dict[str, Outcome] = {}
    if args.output is not None:
        make_directory(args.output.parent)
        if args.output.exists():
            earlier = json.loads(args.output.read_text(encoding="utf-8"))["faults"]
    outcomes = {fault: earlier[fault.name] for fault in drawn if holds(fault, earlier.get(fault.name), ROOT)}
    settled = {fault for fault, found in outcomes.items() if found["caught by"] or fault.name in equivalent}
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(ROOT, Path(folder))
        for fault in drawn:
            if fault not in wanted - settled:
                continue
            likely = earlier.get(fault.name, {}).get("caught by", "")
            caught_by = trials.run(TESTS[fault.module], fault, likely)
            outcomes[fault] = outcome(fault, caught_by, trials.root)
            say(f"{len(outcomes)} of {len(drawn)}, line {fault.line} of {fault.name}: {caught_by or 'SURVIVED'}")
            if args.output is not None:
                figures = as_figures(outcomes, equivalent, TESTS, args.seed)
                atomic_write(args.output, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    figures = as_figures(outcomes, equivalent, TESTS, args.seed)
    say(f"{figures['caught']} of {figures['planted']} caught, {figures['equivalent']} equivalent")
    if share(figures) < REQUIRED:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
