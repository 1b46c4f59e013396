"""Conversations as token ids and a loss mask. Special tokens mark roles and the end of messages:

    <|system|> Be brief. <|end|> <|user|> 2 + 2? <|end|> <|assistant|> 4 <|end|>
                                                                       ^^^^^^^^^ loss

Special tokens are inserted as ids, never encoded from text, so the content of a message is ordinary text and
can neither end its turn nor start another.

    >>> tokens = with_specials(tokenizers.Tokenizer.byte_level())
    >>> ids, loss_mask = render(tokens, [Message("user", "2+2?"), Message("assistant", "4")])
    >>> tokens.decode(ids), tokens.decode([id for id, has_loss in zip(ids, loss_mask) if has_loss])
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
from llm_basics.data import jsonl

SPECIALS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END = "<|end|>"

ROLES = ("system", "user", "assistant")

# record formats, by their required fields
FORMATS = (("messages",), ("prompt", "completion"), ("instruction", "output"))


@dataclass(frozen=True)
class Message:
    """A message with its role: system, user or assistant. Raises ValueError for another role."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a role must be system, user or assistant, got {self.role!r}")


# --------------------------------------------------------------------------------------------------
# Messages -> token ids


def with_specials(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer with the special tokens of the chat template; missing ones get new ids at the end."""
    specials = [*tokenizer.special_tokens, *(s for s in SPECIALS if s not in tokenizer.special_tokens)]
    return tokenizers.Tokenizer(tokenizer.vocab, tokenizer.merges, specials, tokenizer.pattern)


def is_chat(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the tokenizer has the special tokens of the chat template, as those of chat models."""
    return set(SPECIALS) <= set(tokenizer.special_tokens)


def render(tokenizer: tokenizers.Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and the loss mask: True for assistant content and the `<|end|>` after it.

    Each message is the special token of its role, its content, and `<|end|>`. Role tokens have no loss, since
    the prompt ends with one.
    """
    if not is_chat(tokenizer):
        raise ValueError(
            f"a chat tokenizer must have the special tokens {' '.join(SPECIALS)}, got "
            f"{' '.join(tokenizer.special_tokens) or 'none'}; add them with chat_template.with_specials"
        )
    ids: list[int] = []
    loss_mask: list[bool] = []
    for message in messages:
        content = [*tokenizer.encode_ordinary(message.content), tokenizer.special_id(END)]
        ids += [tokenizer.special_id(f"<|{message.role}|>"), *content]
        loss_mask += [False, *[message.role == "assistant"] * len(content)]
    return ids, loss_mask


def render_prompt(tokenizer: tokenizers.Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation and of `<|assistant|>`: a model completes them up to `<|end|>`."""
    ids, _ = render(tokenizer, messages)
    return [*ids, tokenizer.special_id("<|assistant|>")]


# --------------------------------------------------------------------------------------------------
# Files -> messages


def read_conversations(path: str | os.PathLike[str], on_bad_utf8: str | None = None) -> list[list[Message]]:
    """The conversations of a file of records (`parse_conversation`): a JSON array, or JSON lines.

    Raises ValueError with the file and the line or record of the first that is invalid.
    """
    content = Path(path).read_bytes()
    records: Iterable[tuple[str, Any]]
    if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        array = files.parse_json(files.decode(content, path, on_bad_utf8), path)
        records = ((f"{path}, record {number}", record) for number, record in enumerate(array, start=1))
    else:
        records = jsonl.read(path, io.BytesIO(content), on_bad_utf8)
    conversations = []
    for position, record in records:
        try:
            conversations.append(parse_conversation(record))
        except ValueError as error:
            raise ValueError(f"{position}: {error}") from None
    if not conversations:
        raise ValueError(f"{path} must hold conversations, JSON lines or a JSON array, but is empty")
    return conversations


def parse_conversation(record: Any) -> list[Message]:
    """The messages of a record in one of three formats.

    `{"messages": [{"role": ..., "content": ...}, ...]}`; `{"prompt": ..., "completion": ...}`; or Alpaca's
    `{"instruction": ..., "input": ..., "output": ...}`, where the input, if not empty, follows after a
    blank line. Of a preference pair (`prompt`, `chosen`, `rejected`) the chosen response is read. Raises
    ValueError for other records, and for those without assistant content.

    >>> parse_conversation({"instruction": "Double it.", "input": "4", "output": "8"})
    [Message(role='user', content='Double it.\\n\\n4'), Message(role='assistant', content='8')]
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object with fields, got {json.dumps(record):.60}")
    known = [("prompt", "chosen")] if "chosen" in record else FORMATS
    fields = next((fields for fields in known if record.keys() & set(fields)), None)
    if fields is None:
        raise ValueError(
            "a record must have messages, prompt and completion, or instruction and output, "
            f"got {', '.join(map(str, record)) or 'no field'}"
        )
    if fields == ("messages",):
        messages = _messages(record["messages"])
    else:
        prompt, answer = (_text(record, field) for field in fields)
        if fields[0] == "instruction" and record.get("input") not in (None, ""):
            prompt += "\n\n" + _text(record, "input")
        messages = [Message("user", prompt), Message("assistant", answer)]
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise ValueError("a conversation must have a message of the role assistant, got none")
    if not all(answer.strip() for answer in answers):
        raise ValueError("the content of an assistant message must not be empty")
    return messages


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"messages must be a list, got {json.dumps(value):.60}")
    messages = []
    for number, message in enumerate(value, start=1):
        try:
            if not isinstance(message, dict):
                raise ValueError(f"a message must have role and content, got {json.dumps(message):.60}")
            messages.append(Message(_text(message, "role"), _text(message, "content")))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return messages


def _text(record: dict[str, Any], field: str) -> str:
    if field not in record:
        raise ValueError(f"the field {field} is missing")
    if not isinstance(record[field], str):
        raise ValueError(f"{field} must be a string, got {json.dumps(record[field]):.60}")
    return record[field]
