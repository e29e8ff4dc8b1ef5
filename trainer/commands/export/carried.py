"""The code of a model, as files that transformers runs with trust_remote_code=True on machines without this package.

transformers copies the file that config.json names, and the files that this one imports with `from .NAME import`: from one folder,
without subfolders. So every module of ours that the model needs becomes one file in that folder, with its imports rewritten. Before
it runs a file, transformers requires every package that the file imports, unless the import is in a `try`: the optional ones are.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from models.bitnet import BitModel
from trainer.commands.plugins import imported_plugins
from trainer.core.errors import UserError

OWN = "models"  # this package's models; its other packages are never carried
FORBIDDEN = "trainer"

CONFIGURATION = '''"""Configuration of a model that Crescendo {version} trained."""

from transformers import PretrainedConfig


class CrescendoConfig(PretrainedConfig):
    """crescendo_model: name of the architecture; crescendo_config: the fields of its own Config."""

    model_type = "crescendo"

    def __init__(self, crescendo_model=None, crescendo_config=None, **kwargs):
        self.crescendo_model = crescendo_model
        self.crescendo_config = dict(crescendo_config or {{}})
        super().__init__(**kwargs)
'''

MODELING = '''"""A model that Crescendo {version} trained, as a model of transformers. The other files beside this one are its code.

generate() computes the whole context for each token: it gives the right tokens, but takes longer for long texts.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import transformers
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_crescendo import CrescendoConfig
from .crescendo_base import get_model
from .crescendo_materialise import ties
{registering}

if TYPE_CHECKING:  # transformers copies the files that are named so; the others are imported by these
{copied}

NEW = int(transformers.__version__.split(".")[0]) >= 5


class CrescendoForCausalLM(PreTrainedModel, GenerationMixin):
    """input_ids [B, T] -> logits [B, T, V]."""

    config_class = CrescendoConfig
    base_model_prefix = "network"
    accepts_loss_kwargs = False  # the loss is the mean over the labels of each call
    _supports_sdpa = True  # the model chooses its own kernel

    def __init__(self, config):
        super().__init__(config)
        network = {network}
        self.network = network(network.Config(**config.crescendo_config))
        for module in self.network.modules():  # the files hold every buffer, so none has to be computed
            module._non_persistent_buffers_set.clear()
        self._ties = {{"network." + name: "network." + first for name, first in ties(self.network).items()}}
        if self._ties:
            self._tied_weights_keys = self._ties if NEW else list(self._ties)
        self.post_init()

    def init_weights(self):
        """The network's own initial weights. While transformers loads a file, the weights have no storage yet."""
        if not any(parameter.is_meta for parameter in self.parameters()):
            self.network.init_weights()
        self.tie_weights()

    def _init_weights(self, module):
        """init_weights sets all of them."""

    def tie_weights(self, *args, **kwargs):
        """Make each tied parameter one tensor again, after it was loaded."""
        for name, first in self._ties.items():
            owner, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(owner), attribute, self.get_parameter(first))

    def get_input_embeddings(self):
        return self.network.token_embedding()

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=None, **ignored):
        """labels: the tokens themselves, -100 where one does not count; the loss predicts each from those before it."""
        if attention_mask is not None and attention_mask.dim() == 2:
            seen = attention_mask.bool()
            if (seen[:, 1:] & ~seen[:, :-1]).any():
                raise ValueError("this model has no attention mask: pad on the right, or not at all")
        logits = self.network(input_ids).logits
        loss = None
        if labels is not None:
            predicted = logits[:, :-1].float().flatten(0, 1)
            loss = F.cross_entropy(predicted, labels[:, 1:].flatten().to(logits.device), ignore_index=-100)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **ignored):
        return {{"input_ids": input_ids, "attention_mask": attention_mask}}
'''


def code_files(model_class: Any, version: str) -> dict[str, str]:
    """File name -> text: the wrapper, and all modules of ours that the model needs.

    The modules of plug-ins that were given on the command line are among them, because they may register parts of the model.
    UserError if a module that the model needs cannot be carried.
    """
    roots = {cls.__module__ for cls in model_class.__mro__ if _is_ours(cls.__module__, model_class)}
    registering = [model_class.__module__]
    for module in imported_plugins():
        if module.__name__ in roots or not _names_forbidden(module):
            roots.add(module.__name__)
            registering.append(module.__name__)
    roots |= {f"{OWN}.base", f"{OWN}.materialise"}
    carried = closure(sorted(roots), {name.partition(".")[0] for name in roots})
    files = {f"{flat(name)}.py": rewritten(name, carried, version) for name in sorted(carried)}
    names = "\n".join(f"    from .{name.removesuffix('.py')} import __doc__ as _  # noqa" for name in files)
    begin = "\n".join(f"from . import {flat(name)}  # noqa: F401" for name in dict.fromkeys(registering))
    network = "get_model(config.crescendo_model)"
    if issubclass(model_class, BitModel):
        begin += f"\nfrom .{flat(BitModel.__module__)} import with_linear"
        network = f"with_linear({network})"
    return {
        "configuration_crescendo.py": CONFIGURATION.format(version=version),
        "modeling_crescendo.py": MODELING.format(version=version, registering=begin, copied=names, network=network),
        **files,
    }


def _is_ours(module: str, model_class: type) -> bool:
    """Whether a class of this module is carried: not those of torch and of Python."""
    top = module.partition(".")[0]
    return top in (OWN, model_class.__module__.partition(".")[0])


def _names_forbidden(module: ModuleType) -> bool:
    return any(name.partition(".")[0] == FORBIDDEN for node in _imports(_text(module)) for name in _named(node, module))


def flat(module: str) -> str:
    """The name of the file that holds a module."""
    top, _, rest = module.partition(".")
    return "crescendo_" + (rest if top == OWN else f"plugin_{module}").replace(".", "_")


def closure(names: Iterable[str], tops: set[str]) -> dict[str, ModuleType]:
    """Name -> module of `names` and of everything of ours that they import. tops: packages, and modules beside a plug-in, that
    are carried. UserError if one imports the trainer."""
    carried: dict[str, ModuleType] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in carried or name == OWN:
            continue
        module = sys.modules.get(name) or importlib.import_module(name)
        carried[name] = module
        folder = Path(str(module.__file__)).parent
        for node in _imports(_text(module)):
            for found in _named(node, module):
                if found.partition(".")[0] == FORBIDDEN:
                    raise UserError(
                        f"format: the model needs {module.__file__}, which imports {found} (line {node.lineno}); a model that others "
                        "load may import only torch and models: move it to a file of its own"
                    )
                if _is_carried(found, tops, folder):
                    waiting.append(found)
    return carried


def _is_carried(name: str, tops: set[str], folder: Path) -> bool:
    """Whether `name` is a module of ours: of the packages `tops`, or a file beside the one that imports it."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    top = name.partition(".")[0]
    if module is None and top == OWN:
        try:
            return importlib.util.find_spec(name) is not None  # imported inside a function that has not run
        except ModuleNotFoundError:  # a class or function, not a module
            return False
    if file is None or top in sys.stdlib_module_names:
        return False
    beside = Path(file).parent == folder and "site-packages" not in folder.parts
    return top in tops or beside


def _text(module: ModuleType) -> str:
    """The source. UserError if there is none."""
    try:
        return Path(str(module.__file__)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"format: the source of {module.__name__}, which the model needs, cannot be read") from None


def _imports(text: str) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def _named(node: ast.Import | ast.ImportFrom, module: ModuleType) -> list[str]:
    """Modules that an import may name: `from a import b` names a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = _base(node, module)
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def _base(node: ast.ImportFrom, module: ModuleType) -> str:
    """The absolute name of the module that `from X import` names."""
    if not node.level:
        return node.module or ""
    package = module.__name__ if hasattr(module, "__path__") else module.__name__.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def rewritten(name: str, carried: dict[str, ModuleType], version: str) -> str:
    """The source of a module with imports of the files in `carried`, and a line that says where it comes from."""
    module = carried[name]
    lines = _text(module).split("\n")
    nodes = sorted(_imports(_text(module)), key=lambda node: node.lineno, reverse=True)
    for node in nodes:
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before, after = lines[first][: node.col_offset], lines[last].encode()[node.end_col_offset :].decode()
        statement = "\n".join(lines[first : last + 1])[len(before) :]
        statement = statement[: len(statement) - len(after)]
        new = _statement(node, module, carried)
        if new is None and _is_optional(node, module) and not before.strip() and not after.strip().strip(";"):
            new = f"try:\n{before}    {statement.strip()}\n{before}except ImportError:\n{before}    raise"
        if new is not None:
            lines[first : last + 1] = (before + new + after).split("\n")
    source = f"{OWN}/" if name.partition(".")[0] == OWN else ""
    origin = (
        f"# {source}{Path(str(module.__file__)).name} as Crescendo {version} had it (Apache-2.0), with other imports.\n"
    )
    return (origin if source else "") + "\n".join(lines)


def _is_optional(node: ast.Import | ast.ImportFrom, module: ModuleType) -> bool:
    """Whether a module of ours imports a package that not every machine has: a kernel."""
    tops = {name.partition(".")[0] for name in _named(node, module)[:1]}
    return module.__name__.partition(".")[0] == OWN and not tops <= {"torch", *sys.stdlib_module_names}


def _statement(node: ast.Import | ast.ImportFrom, module: ModuleType, carried: dict[str, ModuleType]) -> str | None:
    """The import of files in one folder that replaces `node`; None if it stays."""
    if isinstance(node, ast.Import):
        ours = [alias for alias in node.names if alias.name in carried]
        if not ours:
            return None
        if any("." in alias.name and alias.asname is None for alias in ours):
            raise UserError(
                f"format: {module.__file__}, line {node.lineno}: write `from ... import`, so that the module can be carried to "
                "another place"
            )
        kept = [alias for alias in node.names if alias.name not in carried]
        new = [f"from . import {flat(alias.name)} as {alias.asname or alias.name}" for alias in ours]
        return "; ".join([*(f"import {_as(alias)}" for alias in kept), *new])
    base = _base(node, module)
    modules = [alias for alias in node.names if f"{base}.{alias.name}" in carried]
    names = [alias for alias in node.names if alias not in modules]
    if not modules and base not in carried:
        return None
    new = [f"from .{flat(base)} import {', '.join(map(_as, names))}"] if names else []
    new += [f"from . import {flat(f'{base}.{alias.name}')} as {alias.asname or alias.name}" for alias in modules]
    return "; ".join(new)


def _as(alias: ast.alias) -> str:
    return alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
