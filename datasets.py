"""The data of a run: see `inputs.data`.

Hugging Face's package of the same name is reached by ``--data-set hfds/...`` (`inputs.hugging_face`), not by
importing it here.
"""

from inputs.data import Data, build_data, build_eval

__all__ = ["Data", "build_data", "build_eval"]
