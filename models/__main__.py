"""Run a script in whose process these models are timm's.

    python -m spectformer_svt train.py --model svt_h_s ...

In a clone of this repository the package is called `models`. The script is any
file, such as `train.py`, `validate.py` and `benchmark.py` of timm's repository,
which know the models that are registered when they ask for them.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    _, *words = sys.argv
    if words and words[0] in ("-h", "--help"):
        print(__doc__)
        return
    if not (words and Path(words[0]).is_file()):
        print(f"error: {words[0]}: no such script" if words else __doc__, file=sys.stderr)
        sys.exit(2)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)  # as if it were run by itself
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
