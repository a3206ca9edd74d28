"""The steps of a run: how many there are, what each sees, and the settings that change from one to the next."""

from cim_models.errors import ConfigError
from cim_models.pretraining import schedules
from cim_models.pretraining.checkpoint import Order
from cim_models.pretraining.config import PretrainConfig
from cim_models.pretraining.data import GlobalBatches


class Plan:
    """What follows from a configuration for so many images in so many processes.

    Args:
        config: The run; `optimiser.batch_size` is a number.
        images: That it is trained on.
        processes: That share each step.

    Raises:
        ConfigError: If there is no whole step in it, or the warm-up is longer than the run.
    """

    def __init__(self, config: PretrainConfig, images: int, processes: int) -> None:
        self.config, self.images, self.processes = config, images, processes
        optim = config.optimiser
        passes_per_epoch = self.batches().steps_per_epoch
        self.pass_images = int(optim.batch_size) * processes
        """Of a backward pass of all processes."""
        self.global_batch = self.pass_images * optim.accumulation
        """Images of a step."""
        self.order = Order(self.global_batch, passes_per_epoch * self.pass_images)
        self.steps_per_epoch = passes_per_epoch / optim.accumulation
        self.steps = round(optim.epochs * self.steps_per_epoch)
        self.warmup = round(optim.warmup_epochs * self.steps_per_epoch)
        if self.steps_per_epoch < 1 or self.steps < 1:
            raise ConfigError(
                f"a step takes {self.global_batch} images (batch_size × accumulation × processes), too many for "
                f"{optim.epochs} epochs of {images}; lower optimiser.accumulation or raise optimiser.epochs"
            )
        if self.warmup > self.steps:
            raise ConfigError(
                f"optimiser.warmup_epochs is {optim.warmup_epochs}, more than optimiser.epochs {optim.epochs}: the "
                "learning rate would never reach its peak; lower the one or raise the other"
            )

    def batches(self, rank: int = 0, start: int = 0, stop: int = 0) -> GlobalBatches:
        """What one process reads from one step to another."""
        config, passes = self.config, self.config.optimiser.accumulation
        return GlobalBatches(
            self.images, int(config.optimiser.batch_size), config.seed, rank, self.processes, start * passes,
            total_steps=stop * passes,
        )  # fmt: skip

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        optim, scale = self.config.optimiser, self.global_batch / 256
        return schedules.learning_rate(step, self.steps, self.warmup, optim.lr * scale, optim.min_lr * scale)

    def momentum(self, step: int) -> float:
        """The target encoder's momentum of a step, counted from 0."""
        return schedules.momentum(step, self.steps, self.config.optimiser.momentum)

    def seed(self, step: int, rank: int) -> int:
        """Of what is random in the model in a step, other than the pictures."""
        return self.config.seed + (step * self.processes + rank) * 1_000_003

    def position(self, done: int) -> dict[str, float]:
        """How far the run is after so many steps, in the words of its log."""
        return {
            "step": done,
            "steps": self.steps,
            "epoch": round(done / self.steps_per_epoch, 4),
            "images_seen": done * self.global_batch,
        }
