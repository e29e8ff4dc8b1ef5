"""Checks of what a model declares about itself, without computing with it: its Config, counts, roles, blocks."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields, replace

from trainer.planning import dial
from trainer.testing.subject import SCALE, Check, Skipped, Subject, require

SCALES = (0.5, 1, 2, 4, 8, 16, 32, 64, 148)  # to 3 B parameters
DIAL_VOCAB = 50304
SEVERAL_BLOCKS = 8  # a scale at which every model has more than one


def config_is_documented(subject: Subject) -> None:
    for field in fields(subject.model_class.Config):
        require(field.metadata.get("help"), f"field {field.name} has no help text (metadata['help'])")
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        require(has_default, f"field {field.name} has no default")


def config_goes_through_json(subject: Subject) -> None:
    config = subject.config_at(SCALE)
    again = subject.model_class.Config(**json.loads(json.dumps(asdict(config))))
    require(again == config, f"written to JSON and read back, {config} becomes {again}")


def config_refuses_the_impossible(subject: Subject) -> None:
    config = subject.config_at(SCALE)
    for field in ("vocab_size", "d_model", "n_layers"):
        if not hasattr(config, field):
            continue
        try:
            replace(config, **{field: 0})
        except ValueError as error:
            require(
                field in str(error) and "\n" not in str(error), f"the error of {field} = 0 does not name it: {error}"
            )
        else:
            require(False, f"{field} = 0 is not refused with a ValueError")


def parameters_are_counted(subject: Subject) -> None:
    model = subject.meta_at(SCALE)
    said = subject.model_class.count_parameters(model.config)
    held = sum(parameter.numel() for parameter in model.parameters())
    require(said == held, f"count_parameters says {said:,}, the model has {held:,}")


def parameters_follow_the_dial(subject: Subject) -> None:
    for scale in SCALES:
        target = dial.target_parameters(scale, DIAL_VOCAB)
        try:
            model = subject.meta_at(scale, DIAL_VOCAB)
        except ValueError as error:
            if not subject.choices:
                raise
            raise Skipped(f"the chosen fields allow no shape at scale {scale:g}: {error}") from None
        held = sum(parameter.numel() for parameter in model.parameters())
        said = subject.model_class.count_parameters(model.config)
        require(said == held, f"at scale {scale:g} count_parameters says {said:,}, the model has {held:,}")
        if abs(held / target - 1) > 0.03 and subject.choices:
            raise Skipped(f"the chosen fields lead to {held:,} parameters at scale {scale:g}, the target is {target:,}")
        require(abs(held / target - 1) <= 0.03, f"{held:,} parameters at scale {scale:g}, the target is {target:,}")


def roles_hold_every_parameter_once(subject: Subject) -> None:
    model = subject.meta_at(SCALE)
    groups = model.parameter_groups()
    known = (*model.roles, *model.further_roles)
    require(len(set(known)) == len(known), f"a further role is one of {', '.join(model.roles)} already")
    strange = ", ".join(sorted(set(model.further_roles.values()) - set(model.roles)))
    require(not strange, f"a further role is treated as {strange} (allowed: {', '.join(model.roles)})")
    unknown = ", ".join(sorted(set(groups) - set(known)))
    require(not unknown, f"unknown role {unknown} (allowed: {', '.join(known)})")
    names = [name for group in groups.values() for name in group]
    own = dict(model.named_parameters())
    twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
    require(not twice, f"under several roles: {twice}")
    missing, foreign = ", ".join(sorted(own.keys() - set(names))), ", ".join(sorted(set(names) - own.keys()))
    require(not missing, f"without a role: {missing}")
    require(not foreign, f"not a parameter of the model: {foreign}")
    tied, heads = model.tied_embedding(), model.names_by_role().get("head", [])
    require(tied == (not heads), f"tied_embedding() is {tied}, with {len(heads)} heads")


def fused_matrices_split(subject: Subject) -> None:
    model = subject.meta_at(SCALE)
    splits = model.fused_matrices()
    if not splits:
        raise Skipped("it declares no fused matrices")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, (dim, sizes) in splits.items():
        require(name in shapes, f"{name} is not a parameter of the model")
        shape = tuple(shapes[name])
        require(-len(shape) <= dim < len(shape), f"{name} is {shape}: it has no dimension {dim}")
        fits = len(sizes) > 1 and min(sizes.values()) > 0 and sum(sizes.values()) == shape[dim]
        require(fits, f"{name} is {shape}: its dimension {dim} does not split into {sizes}")


def blocks_hold_most_parameters(subject: Subject) -> None:
    model = subject.meta_at(SEVERAL_BLOCKS)
    blocks = model.blocks()
    if subject.choices and len(blocks) < 2:
        raise Skipped("the chosen fields leave fewer than two blocks")
    require(len(blocks) > 1, f"blocks() returns {len(blocks)} at scale {SEVERAL_BLOCKS}, not several")
    inside = [id(parameter) for block in blocks for parameter in block.parameters()]
    require(len(set(inside)) == len(inside), "blocks share parameters")
    held = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    if subject.choices and held <= 0.9 * total:
        raise Skipped(f"the chosen fields leave the blocks {held:,} of {total:,} parameters")
    require(
        held > 0.9 * total, f"blocks hold {held:,} of {total:,} parameters: those outside are never sharded separately"
    )


CHECKS = [
    Check("config", "every field of Config has a default and a help text", config_is_documented),
    Check("config as JSON", "Config goes through JSON unchanged", config_goes_through_json),
    Check("config refuses", "Config refuses sizes of 0 by name", config_refuses_the_impossible),
    Check("count", "count_parameters is exact", parameters_are_counted),
    Check("dial", "config_for_scale meets its target within 3 %", parameters_follow_the_dial),
    Check("roles", "every parameter has one role", roles_hold_every_parameter_once),
    Check("fused matrices", "fused matrices split as declared", fused_matrices_split),
    Check("blocks", "blocks are distinct and hold most parameters", blocks_hold_most_parameters),
]
