"""What objectives with a teacher share."""

from __future__ import annotations

from torch import Tensor

from models.base import IGNORE, Batch
from trainer.data.dataset import LOSS_MASK
from trainer.objectives.base import Objective, answers_alone
from trainer.objectives.frozen import FrozenSpec

TEACHER = "RUN[@STEP], folder of a Hugging Face model or hf://ORG/NAME"


class Taught(Objective):
    """Its Config has the fields teacher, teacher_weights and teacher_precision. Of chat data only the answers are trained on."""

    def frozen_models(self) -> dict[str, FrozenSpec]:
        c = self.config
        return {"teacher": FrozenSpec(c.teacher, c.teacher_weights, c.teacher_precision)}

    def targets(self, batch: Batch) -> Tensor:
        return answers_alone(batch) if LOSS_MASK in batch else batch["targets"]

    def weights(self, batch: Batch) -> Tensor:
        """[B, T]: how much each target counts."""
        return (self.targets(batch) != IGNORE) * batch.get("weights", 1.0)
