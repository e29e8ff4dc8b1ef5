"""The tokenizer of a run as transformers reads it: the same tokenizer.json, and what it says nothing about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trainer.commands.export.source import Source
from trainer.core.files import write_file
from trainer.data.records import MARKERS, TEMPLATES

CLASS = "PreTrainedTokenizerFast"
# Jinja gives all newlines below as they are: transformers trims only those after a block tag.
_CHECK = (
    "{%- for marker in MARKERS %}{% if marker in message['content'] %}{{ raise_exception('a message holds the text ' + marker + "
    "', which the chat template writes between messages') }}{% endif %}{% endfor -%}"
)
_CHAT = (
    "{%- for message in messages -%}"
    + _CHECK
    + "{%- if message['role'] == 'assistant' -%}{{ START['assistant'] + message['content'] + eos_token }}"
    "{%- elif message['role'] not in START -%}{{ raise_exception('the role must be one of ROLES') }}"
    "{%- elif message['role'] != 'system' or message['content'] != '' -%}"
    "{{ START[message['role']] + message['content'] + '\\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ START['assistant'] }}{%- endif -%}"
)
_PLAIN = (
    "{%- for message in messages -%}{%- if message['role'] != ['user', 'assistant'][loop.index0] -%}"
    "{{ raise_exception('the template joins one prompt of the user and one answer') }}{%- endif -%}"
    "{{ message['content'] }}{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
)


def chat_template(name: str) -> str:
    """The template `name` of trainer/data/records.py in Jinja: the same text, and the end of text after an answer."""
    if name == "plain":
        return _PLAIN
    start = "{" + ", ".join(f"'{role}': {_quoted(marker)}" for role, marker in MARKERS.items()) + "}"
    markers = "[" + ", ".join(_quoted(marker.strip()) for marker in MARKERS.values()) + "]"
    text = _CHAT.replace("ROLES", ", ".join(MARKERS))
    return f"{{%- set START = {start} -%}}{{%- set MARKERS = {markers} -%}}" + text


def _quoted(text: str) -> str:
    return "'" + text.replace("\n", "\\n") + "'"


def template_of(source: Source) -> str | None:
    """The name of the chat template that the run's data were written with; None if they were text."""
    name = source.info.arguments.get("chat_template")
    return name if source.info.records != "text" and name in TEMPLATES else None


def write_tokenizer(source: Source, out: Path) -> None:
    """tokenizer.json as the run has it, tokenizer_config.json and special_tokens_map.json."""
    shutil.copy(source.folder / "tokenizer.json", out / "tokenizer.json")
    content = json.loads((source.folder / "tokenizer.json").read_bytes())
    special = {"bos_token": source.end_of_text, "eos_token": source.end_of_text}
    unknown = content["model"].get("unk_token")
    if unknown is not None:
        special["unk_token"] = unknown
    config: dict[str, Any] = {
        "tokenizer_class": CLASS,
        **special,
        "clean_up_tokenization_spaces": False,  # else decoding would change the text
        "model_max_length": source.fields.get("max_context") or 10**30,  # what transformers writes for "any"
    }
    template = template_of(source)
    if template is not None:
        config["chat_template"] = chat_template(template)
    write_file(out / "tokenizer_config.json", json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    write_file(out / "special_tokens_map.json", json.dumps(special, indent=1, ensure_ascii=False) + "\n")
