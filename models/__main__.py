"""Run a script in whose process these models are timm's: `python -m spectformer_svt train.py --model svt_h_s ...`.

In a clone of this repository the package is called `models`. The script is any file, such as `train.py`, `validate.py`
and `benchmark.py` of timm's repository, which know the models that are registered when they ask for them.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if it were run by itself
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
