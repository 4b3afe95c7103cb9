"""The interface of a task, such as classification, to the engine."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from runtime.run_directory import Plot
from training.options import TaskFlags
from utils import StopSignals


class Task(ABC):
    """A model with its data, its loss and its evaluation; the engine trains it and makes the run resumable.

    Every process builds the task from its `Run`. The engine moves the model to the run's device and precision, wraps
    it for several processes, and is responsible for updates, checkpoints, logs and signals.
    """

    flags: ClassVar[TaskFlags]
    ranked_by: ClassVar[str]  # the result of `evaluate` that ranks checkpoints; larger is better
    score_format: str  # the format string that prints that result
    shown: ClassVar[Sequence[str]]  # results of `evaluate` that the console shows after each epoch
    plots: ClassVar[Mapping[str, Plot]]  # in the run directory, by file name
    sample_flags: ClassVar[Sequence[str]]  # they determine a run's samples, so they must not change on resume
    fixed_sizes: ClassVar[bool] = True  # whether all images of a run have the same size
    model: nn.Module  # the model to train, with its initial weights
    # `train.epoch(epoch, first micro-step)` yields batches. The length of `train` is the number of micro-steps per
    # epoch; its `skipped` maps the unreadable files found so far to the reasons.
    train: Any
    val: Any  # the loader that `evaluate` reads; its `dataset` is that of all processes. A dry run sets `rounds` to 1.

    def set_mode(self, model: nn.Module) -> None:  # noqa: B027 (most tasks need nothing)
        """Adjust the training or evaluation mode that the engine has set."""

    def prepare(self, batch: Any) -> Any:
        """Prepare the inputs and targets of a micro-batch.

        The random generators have the same seed on all processes here, so all processes draw the same numbers.
        """
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, prepared: Any) -> Tensor:
        """The scalar loss of the output of `prepare`, under autocast; `model` is wrapped for several processes.

        The random generators have a different seed on each process here, so drop path differs between processes.
        """

    @abstractmethod
    def finite_samples(self, model: nn.Module, batch: Any) -> list[tuple[int, bool]]:
        """(index, whether the model's outputs are finite) of each sample; `model` is in evaluation mode."""

    @abstractmethod
    def evaluate(self, model: nn.Module, stop: StopSignals | None) -> dict[str, float]:
        """Evaluate every validation sample of all processes once; returns the same results on every process.

        Raises:
            Interrupted: between two batches, on every process, if any of them received a signal.
        """

    def sample_name(self, index: int) -> str:
        """The file of a training sample, or another name if it has no file."""
        return self.train.dataset.path(index)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The settings that must be equal in a checkpoint and a run that resumes from it; saved in every checkpoint."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Further values that prediction needs; saved in every checkpoint."""

    @abstractmethod
    def describe(self) -> str:
        """A short description of the data, such as ``DIGITS at 32x32, 10 classes``."""
