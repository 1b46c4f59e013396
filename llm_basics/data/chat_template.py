"""Conversations as token ids: who speaks is said by special tokens, and which ids a model learns to write.

    <|system|> Be brief. <|end|> <|user|> 2 + 2? <|end|> <|assistant|> 4 <|end|>
                                                                       ^^^^^^^^^ learned

Special tokens are put between ids, never into a text that is then encoded: whatever somebody writes, it is
ordinary text, and can neither end their turn nor begin another's.

    >>> tokens = with_specials(tokenizers.Tokenizer.byte_level())
    >>> ids, learned = render(tokens, [Message("user", "2+2?"), Message("assistant", "4")])
    >>> tokens.decode(ids), tokens.decode([id for id, is_learned in zip(ids, learned) if is_learned])
    ('<|user|>2+2?<|end|><|assistant|>4<|end|>', '4<|end|>')
"""

import codecs
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_basics.core import files
from llm_basics.core import tokenizer as tokenizers

SPECIALS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END = "<|end|>"

ROLES = ("system", "user", "assistant")

# the forms of a record, by the fields that it must have
FORMS = (("messages",), ("prompt", "completion"), ("instruction", "output"))


@dataclass(frozen=True)
class Message:
    """What somebody says: `role` is system, user or assistant. Raises ValueError for another role."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a role must be system, user or assistant, got {self.role!r}")


# --------------------------------------------------------------------------------------------------
# Messages -> token ids


def with_specials(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer with the special tokens of a chat; those that it lacks get the ids behind its last."""
    specials = [*tokenizer.special_tokens, *(s for s in SPECIALS if s not in tokenizer.special_tokens)]
    return tokenizers.Tokenizer(tokenizer.vocab, tokenizer.merges, specials, tokenizer.pattern)


def is_chat(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer has the special tokens of a chat, and so its model was made to answer."""
    return set(SPECIALS) <= set(tokenizer.special_tokens)


def render(tokenizer: tokenizers.Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them are learned: what the assistant says, and its end.

    Each message is the special token of its role, its content, and the special token of its end. The role is
    not learned: whose turn it is, is said by whoever asks.
    """
    if not is_chat(tokenizer):
        raise ValueError("a chat needs a tokenizer with its special tokens; chat.with_specials adds them")
    ids: list[int] = []
    learned: list[bool] = []
    for message in messages:
        content = [*tokenizer.encode_ordinary(message.content), tokenizer.special_id(END)]
        ids += [tokenizer.special_id(f"<|{message.role}|>"), *content]
        learned += [False, *[message.role == "assistant"] * len(content)]
    return ids, learned


def open_reply(tokenizer: tokenizers.Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation for a model to go on from: it is the assistant's turn, up to `<|end|>`."""
    ids, _ = render(tokenizer, messages)
    return [*ids, tokenizer.special_id("<|assistant|>")]


# --------------------------------------------------------------------------------------------------
# Files -> messages


def read(path: str | os.PathLike[str], on_bad_utf8: str | None = None) -> list[list[Message]]:
    """The conversations of a file, one record each: a JSON array, or JSON lines.

    Raises ValueError, with file, line or record, and the reason, for the first that is none.
    """
    content = Path(path).read_bytes()
    records: Iterable[tuple[str, Any]]
    if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        array = files.parse_json(files.decode(content, path, on_bad_utf8), path)
        records = ((f"{path}, record {number}", record) for number, record in enumerate(array, start=1))
    else:
        records = files.json_lines(path, io.BytesIO(content), on_bad_utf8)
    conversations = []
    for place, record in records:
        try:
            conversations.append(conversation(record))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not conversations:
        raise ValueError(f"{path} must hold conversations, JSON lines or a JSON array, but is empty")
    return conversations


def conversation(record: Any) -> list[Message]:
    """The messages of a record of one of three forms, all of them texts.

    `{"messages": [{"role": ..., "content": ...}, ...]}`; `{"prompt": ..., "completion": ...}`; or Alpaca's
    `{"instruction": ..., "input": ..., "output": ...}`, where the input, if there is one, follows the
    instruction after a blank line. Raises ValueError for what is none, or has nothing to learn from.

    >>> conversation({"instruction": "Double it.", "input": "4", "output": "8"})
    [Message(role='user', content='Double it.\\n\\n4'), Message(role='assistant', content='8')]
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object with fields, got {_shown(record)}")
    form = next((form for form in FORMS if record.keys() & set(form)), None)
    if form is None:
        raise ValueError(
            "a record must have messages, prompt and completion, or instruction and output, "
            f"got {', '.join(map(str, record)) or 'no field'}"
        )
    if form == ("messages",):
        messages = _messages(record["messages"])
    else:
        asked, answer = (_text(record, field) for field in form)
        if form[0] == "instruction" and record.get("input") not in (None, ""):
            asked += "\n\n" + _text(record, "input")
        messages = [Message("user", asked), Message("assistant", answer)]
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise ValueError("a conversation must have a message of the assistant, got none")
    if not all(answer.strip() for answer in answers):
        raise ValueError("an answer must not be empty")
    return messages


def _messages(given: Any) -> list[Message]:
    if not isinstance(given, list):
        raise ValueError(f"messages must be a list, got {_shown(given)}")
    messages = []
    for number, message in enumerate(given, start=1):
        try:
            if not isinstance(message, dict):
                raise ValueError(f"a message must have role and content, got {_shown(message)}")
            messages.append(Message(_text(message, "role"), _text(message, "content")))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return messages


def _text(record: dict[str, Any], field: str) -> str:
    if field not in record:
        raise ValueError(f"the field {field} is missing")
    if not isinstance(record[field], str):
        raise ValueError(f"{field} must be a text, got {_shown(record[field])}")
    return record[field]


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
