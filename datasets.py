"""The data of a run, see `inputs.data`.

This is not Hugging Face's package of the same name; use ``--data-set hfds/...`` for its data sets
(`inputs.hugging_face`).
"""

from inputs.data import build_data, eval_loader

__all__ = ["build_data", "eval_loader"]
