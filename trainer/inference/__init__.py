"""What a model can do: write texts, be evaluated. `from trainer.inference import register_metric` is for plug-ins."""

from trainer.inference.metrics import Measured, register_metric

__all__ = ["Measured", "register_metric"]
