"""The contract of a recipe: what it fills in, how it groups the parameters, and what its laws make of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from trainer.optim import Group


class Default(NamedTuple):
    """The value that a recipe gives to a key which the config leaves open, and the rule behind it."""

    value: Any
    rule: str


class PlanEntry(NamedTuple):
    """One number of the plan: its key, its value, and the rule it came from."""

    key: str
    value: Any
    rule: str


class Recipe:
    """How a run is optimised. The planner asks it for defaults, the engine for groups, `plan` for rows.

    config: the RunConfig so far; facts: of the model: `parameters` and `non_embedding` (without embeddings and head), counts.
    """

    # Names of the models that train with this recipe unless the config says otherwise.
    made_for: frozenset[str] = frozenset()
    why = ""  # the reason that `plan` prints for it
    schedules: frozenset[str] = frozenset()  # values of optim.schedule that it can follow

    def batch_defaults(self, config: Any, facts: Any) -> Mapping[str, Default]:
        """By key of `batch`; batch.sequence_length is known."""
        raise NotImplementedError

    def optim_defaults(self, config: Any, facts: Any) -> Mapping[str, Default]:
        """By key of `optim`."""
        raise NotImplementedError

    def embedding_frequency(self, tied: bool) -> Default:
        """Of optim.embedding_frequency. tied: the head shares the embedding's matrix."""
        raise NotImplementedError

    def groups(self, model: Any, shapes: Mapping[str, torch.Size], config: Any) -> list[Group]:
        """Every parameter in one group. shapes: of the whole parameters, by name; config: resolved."""
        raise NotImplementedError

    def schedule(self, name: str, config: Any) -> Callable[[int], float]:
        """Another schedule than optim.schedule, for a role: 0-based step -> multiplier of lr. name: in `schedules`; config: resolved."""
        raise NotImplementedError

    def rows(self, config: Any, tied: bool) -> list[PlanEntry]:
        """What `plan` prints of the groups besides optim.lr and the entries of optim.roles. config: resolved."""
        return []

    def schedule_change(self, config: Any, before: int, step: int) -> str:
        """How a new max_steps changes the learning rate of a run that continues after `step`; "" if it changes nothing.

        config: resolved, with the new max_steps; before: max_steps of the run until now, which differs.
        """
        return ""
