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
    _, *words = sys.argv
    if words and words[0] in ("-h", "--help"):
        print(__doc__)
        return
    if not (words and Path(words[0]).is_file()):
        print(f"error: {words[0]}: no such script" if words else __doc__, file=sys.stderr)
        sys.exit(2)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)  # as when running the script directly
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
