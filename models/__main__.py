"""Run a Python script with these models registered in timm.

    python -m spectformer_svt train.py --model svt_h_s ...

In a clone of this repository, the package is called `models`. The script can be
any Python file that creates timm models, such as `train.py`, `validate.py` and
`benchmark.py` from timm's repository.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    script, *words = sys.argv[1:] or ["--help"]
    if script in ("-h", "--help"):
        print(__doc__)
        return
    if not Path(script).exists():
        print(f"error: {script}: no such script", file=sys.stderr)
        sys.exit(2)
    sys.argv = [script, *words]
    sys.path[0] = str(Path(script).resolve().parent)  # as when running the script directly
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
