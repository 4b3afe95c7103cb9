"""What a run trains: all that the engine asks of a task, such as classification."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from runtime.curves import Plot
from training.options import TaskFlags
from utils import StopSignals


class Task(ABC):
    """A model with its data, its loss and its evaluation; the engine trains it and makes the run resumable.

    A task is built from an open run, on every process. The engine moves the model to the device and into the run's
    precision, wraps it for several processes, and owns updates, checkpoints, logs and signals.

    Attributes:
        flags: the task's part of the command line.
        ranked_by: the result of `evaluate` by which checkpoints are ranked; the larger the better.
        score_format: how a value of `ranked_by` is printed.
        shown: results of `evaluate` in an epoch's line on the console.
        plots: the pictures of the log in the run directory, by file.
        sample_flags: what decides, beside the seed, which samples a run has; a run that resumes must have the same.
        fixed_sizes: whether all images of a run have one size.
        model: what is trained, with the weights it begins from.
        train: batches, by ``train.epoch(epoch, first micro-step)``; its length is the micro-steps of an epoch, its
            `skipped` the unreadable files met so far, path to reason.
        val: the batches that `evaluate` reads, of a `dataset` of all processes; a dry run sets its `rounds` to 1.
    """

    flags: ClassVar[TaskFlags]
    ranked_by: ClassVar[str]
    score_format: str
    shown: ClassVar[Sequence[str]]
    plots: ClassVar[Mapping[str, Plot]]
    sample_flags: ClassVar[Sequence[str]]
    fixed_sizes: ClassVar[bool] = True
    model: nn.Module
    train: Any
    val: Any

    @staticmethod
    def batch_multiple(args: Any) -> int:
        """What a process's batch size has to be a multiple of."""
        return 1

    def set_mode(self, model: nn.Module) -> None:  # noqa: B027 (most tasks need nothing)
        """What training needs beyond the engine's own choice of training or evaluation mode."""

    def prepare(self, batch: Any) -> Any:
        """The inputs and targets of a micro-batch.

        The random generators are seeded alike on all processes: what is drawn here is drawn for all of them.
        """
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, prepared: Any) -> Tensor:
        """The scalar loss of what `prepare` gave, under autocast; `model` is wrapped for several processes.

        The generators are seeded differently on every process: what the model draws (drop path) differs.
        """

    @abstractmethod
    def finite_samples(self, model: nn.Module, batch: Any) -> list[tuple[int, bool]]:
        """Each sample's index, and whether the model's outputs for it alone are finite; `model` is evaluating."""

    @abstractmethod
    def evaluate(self, model: nn.Module, stop: StopSignals | None) -> dict[str, float]:
        """Evaluate every validation sample of all processes once; the same results on all of them.

        Raises:
            Interrupted: between two batches, on every process, when one of them was signalled.
        """

    def sample_name(self, index: int) -> str:
        """The file of a training sample, or what names it best."""
        return self.train.dataset.path(index)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes from it must have in common; part of every checkpoint."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What else prediction needs from a checkpoint."""

    @abstractmethod
    def describe(self) -> str:
        """The data in a few words: ``DIGITS at 32x32, 10 classes``."""
