"""The tokenizer `chars`: an id for each character of the training text, sorted, then end of text, then unknown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

UNKNOWN = "<unk>"
CODE_POINTS = 0x110000  # of Unicode
SURROGATES = slice(0xD800, 0xE000)  # halves of surrogate pairs, which are not text


def learn_characters(texts: Iterable[str]) -> list[str]:
    """The different characters of all `texts`, by code point, except lone surrogates: encoding refuses a row that holds one."""
    seen = np.zeros(CODE_POINTS, bool)
    for text in texts:
        seen[code_points(text, "surrogatepass")] = True
    seen[SURROGATES] = False
    return [chr(point) for point in np.flatnonzero(seen)]


def code_points(text: str, errors: str = "strict") -> np.ndarray:
    """uint32 [characters]. Raises UnicodeEncodeError on lone surrogates unless `errors` is "surrogatepass"."""
    return np.frombuffer(text.encode("utf-32-le", errors), "<u4")


def character_json(characters: Iterable[str], eot: str) -> bytes:
    """The tokenizer.json of sorted `characters`: a BPE without merges, so that every reader of that format encodes the same."""
    tokens = [*characters, eot, UNKNOWN]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokens.index(token), "content": token, **special} for token in (eot, UNKNOWN)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [],
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


class CharacterTable:
    """Encodes by one look-up per character."""

    def __init__(self, ids: dict[str, int], unknown: int):
        self._unknown = unknown
        self._ids = np.full(CODE_POINTS, unknown, np.uint32)
        for character, i in ids.items():
            self._ids[ord(character)] = i

    @classmethod
    def of(cls, content: dict[str, Any], eot: str) -> CharacterTable | None:
        """The table of a tokenizer.json as `character_json` writes it; None if it is another kind of tokenizer."""
        model = content["model"]
        odd = ("merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
        steps = (content.get("normalizer"), content.get("pre_tokenizer"))
        if model.get("type") != "BPE" or any(map(model.get, odd)) or any(steps):
            return None
        added = {token["content"] for token in content.get("added_tokens") or []}
        characters = {token: i for token, i in model["vocab"].items() if token not in (eot, UNKNOWN)}
        if added != {eot, UNKNOWN} or model.get("unk_token") != UNKNOWN or len(model["vocab"]) != len(characters) + 2:
            return None
        if len(eot) == 1 or any(len(token) != 1 for token in characters):
            return None
        return cls(characters, model["vocab"][UNKNOWN])

    def __call__(self, text: str) -> tuple[np.ndarray, str]:
        """The ids of `text`, uint32, and its characters that have none, except white space."""
        ids = self._ids[code_points(text)]
        lost = np.flatnonzero(ids == self._unknown)
        return ids, "".join(text[at] for at in lost if not text[at].isspace())
