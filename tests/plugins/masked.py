"""Next-token loss of the targets that are no space: how many those are is known to the device alone."""

from trainer.objectives import Loss, Objective, register_objective


def without_spaces(batch):
    return {**batch, "weights": (batch["targets"] != ord(" ")).float() * batch.get("weights", 1.0)}


@register_objective("masked")
class Masked(Objective):
    def forward(self, model, batch):
        batch = without_spaces(batch)
        hidden = model.hidden(batch["tokens"], documents=batch.get("documents"))
        return Loss(model.nll(hidden, batch["targets"], batch["weights"]).sum(), super().count(batch))

    def count(self, batch):
        return super().count(without_spaces(batch))
