"""The data of a run, see `inputs.data`. Hugging Face's package of this name is for ``--data-set hfds/...`` alone."""

from inputs.data import build_data, eval_loader

__all__ = ["build_data", "eval_loader"]
