"""Lion (arXiv 2302.06675) as an example of a plug-in: the sign of momentum, with decoupled weight decay."""

from dataclasses import dataclass

from trainer.optim import OptimizerRule, register_optimizer


@register_optimizer("my-lion")
class Lion(OptimizerRule):
    @dataclass
    class Config:
        beta1: float = 0.9
        beta2: float = 0.99

    def state(self, shape, dtype):
        return {"momentum": (shape, dtype)}

    def update(self, group, parameters, gradients, states, finite):
        lr = group.lr * finite
        for p, g, m in zip(parameters, gradients, (state["momentum"] for state in states), strict=True):
            g = g.where(finite > 0, m)
            p.mul_(1 - lr * group.weight_decay).sub_(lr * m.lerp(g, 1 - group.config.beta1).sign())
            m.lerp_(g, 1 - group.config.beta2)
