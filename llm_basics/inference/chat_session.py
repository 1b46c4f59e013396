"""The program of `chat`: a conversation with a fine-tuned model, in the terminal or through a pipe."""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics.cli import commands, parse
from llm_basics.core import files, generate, model, tokenizer
from llm_basics.data import chat_template
from llm_basics.inference import detokenizer, engine, selection
from llm_basics.runs import signals

# exit status if a line of a pipe failed
FAILED = 1

HELP = """\
/reset              clear the conversation, but keep the system message
/system TEXT        set the system message; without TEXT: remove it
/temperature X      sampling temperature; 0: always the most likely token
/save FILE.jsonl    append the conversation to a file for sft
/help               list these commands
/quit               quit, as does Ctrl-D; Ctrl-C stops a reply
Start a message with a space to send a leading / as text."""


def main(options: commands.ChatConfig) -> int:
    """Reply to --message, or to standard input line by line. Returns the exit status."""
    with parse.exit_on_error():
        lm, chosen = engine.open_run(options)
        if not chat_template.is_chat(chosen):
            raise ValueError(
                "chat needs a model fine-tuned on conversations, got one whose tokenizer has no <|user|> "
                f"({options.run_dir}); fine-tune it first: uv run python -m llm_basics.sft --help"
            )
        session = ChatSession(lm, chosen, options)
        if options.message is not None:
            session.reply(options.message, _write)
            print()
        elif sys.stdin.isatty():
            with signals.interactive():
                converse(session, is_terminal=True)
        elif converse(session, is_terminal=False):
            return FAILED
    return 0


# --------------------------------------------------------------------------------------------------
# A conversation


class ChatSession:
    """A model and the conversation with it so far."""

    def __init__(
        self, lm: model.TransformerLM, chosen: tokenizer.Tokenizer, options: commands.ChatConfig
    ) -> None:
        self.options = options
        self.turns: list[chat_template.Message] = []
        self._model, self._tokenizer = lm, chosen
        self._generator = torch.Generator().manual_seed(options.seed)
        self._n_dropped = 0
        self._reward = selection.load_reward(options)

    @property
    def messages(self) -> list[chat_template.Message]:
        """The system message, if any, and the turns so far."""
        system = self.options.system
        return [*([chat_template.Message("system", system)] if system else []), *self.turns]

    def change(self, **settings: object) -> None:
        """Replace options for the following replies. Raises ValueError if a value is invalid."""
        self.options = dataclasses.replace(self.options, **settings)  # type: ignore[arg-type]

    def reply(self, message: str, write: Callable[[str], None]) -> None:
        """Append a user message and stream the reply to `write`.

        The part before an interruption is kept. Raises ValueError, with the conversation unchanged, if the
        message does not fit into the context.
        """
        turns = [*self.turns, chat_template.Message("user", message)]
        prompt = self._prompt(turns)
        pieces: list[str] = []
        is_chosen = bool(self.options.n_candidates)
        stream = self._choose(prompt, message) if is_chosen else self._generate(prompt)
        try:
            for piece in stream:
                pieces.append(piece)
                write(piece)
        finally:
            if pieces:
                self.turns = [*turns, chat_template.Message("assistant", "".join(pieces))]

    def _prompt(self, turns: Sequence[chat_template.Message]) -> list[int]:
        """Encode the conversation, without the oldest turns if the context leaves no space for a reply."""
        context_length = self._model.config.context_length
        limit = context_length - min(self.options.max_new_tokens, context_length // 2)
        system = self.messages[: len(self.messages) - len(self.turns)]
        # a user message is dropped together with its reply
        for n_dropped in range(0, len(turns), 2):
            ids = chat_template.render_prompt(self._tokenizer, [*system, *turns[n_dropped:]])
            if len(ids) <= limit:
                break
        else:
            raise ValueError(
                f"a message and the system message must have at most {limit} tokens, got {len(ids)} "
                f"(context of {context_length}); shorten it, or lower --max_new_tokens"
            )
        if n_dropped > self._n_dropped:
            _note(f"(context of {context_length} tokens is full; dropped the {n_dropped} oldest messages)")
        self._n_dropped = n_dropped
        return ids

    def _generate(self, prompt: Sequence[int]) -> Iterator[str]:
        options = self._fitting(prompt)
        ids = generate.generate(
            self._model,
            torch.tensor(prompt, device=self._model.token_embeddings.weight.device),
            options.max_new_tokens,
            options.temperature,
            options.top_k,
            options.top_p,
            stop_id=self._tokenizer.special_id(chat_template.END),
            generator=self._generator,
            adjust=self._reply_logits(prompt),
        )
        return detokenizer.detokenize(self._tokenizer, ids)

    def _choose(self, prompt: Sequence[int], message: str) -> Iterator[str]:
        """A reply selected from several, as one piece, with a note of its score."""
        options, n = self._fitting(prompt), self.options.n_candidates
        candidates = selection.sample(
            self._model,
            self._tokenizer,
            torch.tensor(prompt, device=self._model.token_embeddings.weight.device),
            # different seeds for each reply of a conversation
            selection.seeds_of(options, n, number=len(self.turns) // 2),
            options,
            self._tokenizer.special_id(chat_template.END),
            adjust=self._reply_logits(prompt),
        )
        choice = selection.choose(candidates, options, self._reward, message)
        yield choice.candidate.text
        _note(f"\n({choice})")

    def _fitting(self, prompt: Sequence[int]) -> commands.ChatConfig:
        """The options with a maximum length that fits into the context."""
        limit = self._model.config.context_length - len(prompt)
        return dataclasses.replace(self.options, max_new_tokens=min(self.options.max_new_tokens, limit))

    def _reply_logits(self, prompt: Sequence[int]) -> generate.LogitsFunction:
        """The logits processor of a reply to `prompt`."""
        options, end = self.options, self._tokenizer.special_id(chat_template.END)
        adjust = engine.make_logits_processor(options.temperature, options.min_p, options.repetition_penalty)
        device = self._model.token_embeddings.weight.device
        others = [self._tokenizer.special_id(special) for special in self._tokenizer.special_tokens]
        forbidden = torch.tensor([id for id in others if id != end], device=device)

        def reply_logits(
            ids: Int[Tensor, " seq"], logits: Float[Tensor, " vocab"]
        ) -> Float[Tensor, " vocab"]:
            # no special token in a reply; the repetition penalty does not apply to the prompt
            logits = logits.index_fill(0, forbidden, -torch.inf)
            return logits if adjust is None else adjust(ids[len(prompt) :], logits)

        return reply_logits

    def reset(self) -> None:
        """Clear the conversation."""
        self.turns = []
        self._n_dropped = 0

    def save(self, path: str) -> None:
        """Append the conversation to a JSONL file, in the format of `chat_template.read`."""
        if not self.turns:
            raise ValueError("the conversation must have at least one reply to be saved, got none")
        messages = [dataclasses.asdict(message) for message in self.messages]
        before = Path(path).read_bytes() if os.path.isfile(path) else b""
        files.write(path, before + json.dumps({"messages": messages}).encode() + b"\n")


# --------------------------------------------------------------------------------------------------
# A terminal


def converse(session: ChatSession, is_terminal: bool) -> int:
    """Reply to each line of standard input; returns the number of lines that failed.

    Replies go to standard output, notes and errors to standard error; in a pipe, errors have line numbers.
    """
    n_failed = 0
    if is_terminal:
        _note("/help lists commands; Ctrl-D quits")
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # enables line editing in input()
    for number, line in enumerate(_lines(is_terminal), start=1):
        try:
            if line.startswith("/"):
                if line.strip() == "/quit":
                    break
                run_command(session, line)
            elif line.strip():
                session.reply(line.removeprefix(" "), _write)
                print(flush=True)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            n_failed += 1
            location = "" if is_terminal else f"standard input:{number}: "
            _note(f"error: {location}{parse.message(error)}")
    return n_failed


def run_command(session: ChatSession, line: str) -> None:
    """Run a /command. Raises ValueError for an unknown one."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    match command:
        case "/reset":
            session.reset()
        case "/system":
            session.change(system=rest)
        case "/temperature":
            try:
                temperature = float(rest)
            except ValueError:
                raise ValueError(f"temperature must be a number, got {rest!r}") from None
            session.change(temperature=temperature)
        case "/save":
            if not rest:
                raise ValueError("/save needs a file name, as in /save chat.jsonl")
            session.save(rest)
            _note(f"(saved to {rest})")
        case "/help":
            _note(HELP)
        case _:
            raise ValueError(f"unknown command {command}; /help lists the commands")


def _lines(is_terminal: bool) -> Iterator[str]:
    while True:
        try:
            yield input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            _note("\n(Ctrl-D quits)")


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
