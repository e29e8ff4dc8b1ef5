"""Rows of conversations and of preferences: what they must hold, and how a chat template writes them as text.

A conversation becomes segments of text. Each is tokenised on its own, so that the place where an answer begins is always a boundary of
tokens, as it is when a model continues a prompt. What an answer consists of, its end-of-text id too, counts in the loss of fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer.core.config import CorpusConfig
from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.data.dataset import DatasetInfo
from trainer.data.folders import kind_of
from trainer.data.readers import BadRow, parsed_row

FIELDS = ("messages", "prompt", "completion", "chosen", "rejected")
ROLES = ("system", "user", "assistant")
# Before a message of each role. The markers are text, so every tokenizer can encode them.
MARKERS = {role: f"<|{role}|>\n" for role in ROLES}
TEMPLATES = ("chat", "plain")


class Message(NamedTuple):
    """What one side of a conversation says. role: of ROLES."""

    role: str
    content: str


class Segment(NamedTuple):
    """A part of a document that is tokenised on its own.

    answer: whether it counts in the loss. closed: whether an end-of-text id follows. last: whether the document ends with it.
    """

    text: str
    answer: bool = False
    closed: bool = False
    last: bool = False


@dataclass(frozen=True)
class Conversations:
    """How the rows of a source are read. records: "chat" or "preference"; template: of TEMPLATES.

    chat writes the marker of its role before each message, and ends each answer with the end-of-text id; plain joins a prompt
    and its completion as they are.
    """

    records: str
    template: str

    def documents(self, line: bytes, where: str) -> list[list[Segment]]:
        """The documents of one raw row of JSON: one of chat data, two of preference data, the better one first. where: file:line.

        Raises BadRow."""
        row = parsed_row(line, where)
        conversations = _pair(row, where) if self.records == "preference" else [_conversation(row, where)]
        return [self._segments(messages, answered, where) for messages, answered in conversations]

    def text(self, line: bytes, where: str) -> str:
        """All text of a row, as a tokenizer learns it. Raises BadRow."""
        return "".join(segment.text for document in self.documents(line, where) for segment in document)

    def prompt(self, text: str) -> str:
        """What a model continues to answer the message `text` of a user."""
        return self._opening(Message("user", text)) + (MARKERS["assistant"] if self.template == "chat" else "")

    def unanswered(self, messages: Any, where: str) -> list[Segment]:
        """What a model continues to answer a conversation: rows of role and content, the last of them a message of the user.

        Raises BadRow."""
        asked = _messages(messages, "messages", where)
        roles = [message.role for message in asked]
        spoken = roles[1:] if roles[:1] == ["system"] else roles
        if spoken != [*["user", "assistant"] * (len(spoken) // 2), "user"]:
            raise BadRow(
                f"{where}: the roles are {', '.join(roles[:6]) or 'none'}{', ...' * (len(roles) > 6)}; after a system message, if any, "
                "user and assistant must alternate, and the last message must be of the user"
            )
        return self._segments([*asked, Message("assistant", "")], len(asked), where)[:-1]

    def _segments(self, messages: list[Message], answered: int, where: str) -> list[Segment]:
        """answered: messages before this one are the prompt, whatever their role."""
        if self.template == "plain" and [message.role for message in messages] != ["user", "assistant"]:
            raise BadRow(
                f"{where}: chat_template plain joins one prompt and one answer, but the row has other messages; use chat"
            )
        segments: list[Segment] = []
        opening = ""
        for number, message in enumerate(messages):
            self._refuse_markers(message, where)
            if message.role != "assistant":
                opening += self._opening(message)
                continue
            segments.append(Segment(opening + MARKERS["assistant"] * (self.template == "chat")))
            segments.append(Segment(message.content, number >= answered, True, number == len(messages) - 1))
            opening = ""
        return segments

    def _opening(self, message: Message) -> str:
        return message.content if self.template == "plain" else f"{MARKERS[message.role]}{message.content}\n"

    def _refuse_markers(self, message: Message, where: str) -> None:
        """A message that spells a marker would look like several messages."""
        spelled = [marker.strip() for marker in MARKERS.values() if marker.strip() in message.content]
        if self.template == "chat" and spelled:
            raise BadRow(
                f"{where}: a message of the {message.role} holds the text {spelled[0]}, which the chat template writes between "
                "messages; change it"
            )


def open_conversations(config: CorpusConfig, files: list[Path]) -> Conversations | None:
    """How the rows of `files` are read; None if they hold text. Raises UserError if a file has no rows of messages."""
    if config.records == "text":
        return None
    without = next((path for path in files if kind_of(path) not in ("rows", "parquet")), None)
    if without is not None:
        raise UserError(
            f"records: {config.records} needs rows of JSON, .parquet or hf://, but {printable(without)} is none of them; name only "
            "such files, or prepare it with --records text"
        )
    if config.document_start is not None:
        raise UserError(f"document_start: with records {config.records} each row is a document; leave it out")
    return Conversations(config.records, config.chat_template)


def conversations_of(info: DatasetInfo, where: str) -> Conversations:
    """How the rows of a prepared dataset were read. where: for the error line. UserError if they were text."""
    template = info.arguments.get("chat_template")
    if info.records == "text" or template not in TEMPLATES:
        raise UserError(
            f"{where}: its data are {info.records} without a chat template; prepare rows of messages with --records chat, and train "
            "on them"
        )
    return Conversations(info.records, template)


def _conversation(row: Any, where: str) -> tuple[list[Message], int]:
    """The messages of a row of chat data, and how many of them come before the first that may be an answer."""
    row = _checked(row, where)
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages", where)
    else:
        if row.get("prompt") is None:
            raise BadRow(
                f"{where}: has neither messages nor a prompt; a row of chat data holds messages, or prompt and completion"
            )
        messages = _prompt(row["prompt"], where) + _answer(row.get("completion"), "completion", where)
    return _in_order(messages, "messages", where), 0


def _pair(row: Any, where: str) -> list[tuple[list[Message], int]]:
    """The same of both answers of a row of preference data."""
    row = _checked(row, where)
    pair: list[list[Message]] = []
    for key in ("chosen", "rejected"):
        messages = _answer(row.get(key), key, where)
        if messages[0].role == "assistant":  # else the list holds the prompt too
            if row.get("prompt") is None:
                raise BadRow(
                    f"{where}: has no prompt for its field {key!r}; preference data hold prompt, chosen and rejected"
                )
            messages = _prompt(row["prompt"], where) + messages
        pair.append(_in_order(messages, key, where))
    if pair[0] == pair[1]:
        raise BadRow(f"{where}: chosen and rejected are the same; a pair must differ")
    shared = next((i for i, both in enumerate(zip(*pair)) if both[0] != both[1]), None)  # noqa: B905  # one may be longer
    if shared is None or any(messages[shared].role != "assistant" for messages in pair):
        raise BadRow(f"{where}: chosen and rejected do not part at an answer; both must answer the same prompt")
    return [(messages, shared) for messages in pair]


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadRow(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _prompt(value: Any, where: str) -> list[Message]:
    return (
        _messages(value, "prompt", where)
        if isinstance(value, list)
        else [Message("user", _content(value, "prompt", where))]
    )


def _answer(value: Any, key: str, where: str) -> list[Message]:
    return (
        _messages(value, key, where) if isinstance(value, list) else [Message("assistant", _content(value, key, where))]
    )


def _messages(value: Any, key: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{where}: field {key!r} is not a list of messages, each with role and content")
    messages = []
    for number, message in enumerate(value, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise BadRow(f"{where}: message {number} of {key!r} has not one of the roles {', '.join(ROLES)}")
        if role != "system" or message.get("content") != "":  # an empty system message says nothing
            messages.append(Message(role, _content(message.get("content"), f"{key}[{number}].content", where)))
    return messages


def _content(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        found = "is empty" if value == "" else "is missing" if value is None else f"holds {type(value).__name__}"
        raise BadRow(f"{where}: field {key!r} {found}; it must hold text")
    return value


def _in_order(messages: list[Message], key: str, where: str) -> list[Message]:
    """Raises BadRow unless user and assistant speak in turn, from the user to the assistant, after a system message if there is one."""
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadRow(
            f"{where}: the roles in {key!r} are {', '.join(roles[:6]) or 'none'}{', ...' * (len(roles) > 6)}; after a system message, "
            "if any, user and assistant must alternate, and the assistant must be the last"
        )
    return messages
