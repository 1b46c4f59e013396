"""The program of `chat`: a conversation with a model that was fine-tuned for it, in the terminal or a pipe.

uv run python -m llm_basics.chat runs/NAME
uv run python -m llm_basics.chat runs/NAME --message "Name a color."
"""

import contextlib
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics.cli import commands, parse
from llm_basics.core import generate, model, tokenizer
from llm_basics.data import chat_template
from llm_basics.inference import detokenizer, engine

# exit status where a line of a pipe was no message, or none that could be answered
MISTAKE = 1

HELP = """\
/reset              forget what was said, but not the system message
/system TEXT        tell the model something before all else; without TEXT: nothing
/temperature X      0: always the likeliest token; 1: as the model has learned
/save FILE.jsonl    append the conversation to a file that sft reads
/help               this
/quit               end, as does Ctrl-D; Ctrl-C ends an answer
What begins with a space is said as it is, /commands too."""


def main(options: commands.ChatConfig) -> int:
    """Talk as `options` say. Returns the exit status."""
    try:
        with parse.exit_on_error():
            lm, chosen = engine.open_run(options)
            if not chat_template.is_chat(chosen):
                raise ValueError(
                    f"a model must be fine-tuned to be talked to, but {options.run_dir} was not (its "
                    "tokenizer has no <|user|>); uv run python -m llm_basics.sft --help says how"
                )
            talk = Talk(lm, chosen, options)
            if options.message is None:
                is_terminal = sys.stdin.isatty()
                return MISTAKE if converse(talk, is_terminal) and not is_terminal else 0
            else:
                talk.reply(options.message, _show)
                print()
    except KeyboardInterrupt:
        print()
        return 130
    return 0


# --------------------------------------------------------------------------------------------------
# A conversation


class Talk:
    """A conversation: what was said so far, and a model that answers."""

    def __init__(
        self, lm: model.TransformerLM, chosen: tokenizer.Tokenizer, options: commands.ChatConfig
    ) -> None:
        self.options = options
        self.turns: list[chat_template.Message] = []
        self._model, self._tokenizer = lm, chosen
        self._generator = torch.Generator().manual_seed(options.seed)
        self._n_forgotten = 0

    @property
    def messages(self) -> list[chat_template.Message]:
        """The system message, if there is one, and all that was said."""
        system = self.options.system
        return [*([chat_template.Message("system", system)] if system else []), *self.turns]

    def change(self, **settings: object) -> None:
        """Go on with other options. Raises ValueError for some that make no sense."""
        self.options = dataclasses.replace(self.options, **settings)  # type: ignore[arg-type]

    def reply(self, said: str, show: Callable[[str], None]) -> None:
        """Say something and give the answer to `show`, piece by piece.

        An answer that is interrupted is kept as far as it came. Raises ValueError, with nothing said, if the
        context has no room for it.
        """
        turns = [*self.turns, chat_template.Message("user", said)]
        prompt = self._prompt(turns)
        pieces: list[str] = []
        try:
            for piece in detokenizer.detokenize(self._tokenizer, self._ids(prompt)):
                pieces.append(piece)
                show(piece)
        finally:
            if pieces:
                self.turns = [*turns, chat_template.Message("assistant", "".join(pieces))]

    def _prompt(self, turns: Sequence[chat_template.Message]) -> list[int]:
        """The ids to go on from: of the oldest turns as many are left out as leave room for an answer."""
        context_length = self._model.config.context_length
        room = context_length - min(self.options.max_new_tokens, context_length // 2)
        system = self.messages[: len(self.messages) - len(self.turns)]
        # what is asked and what is answered go together
        for n_forgotten in range(0, len(turns), 2):
            ids = chat_template.open_reply(self._tokenizer, [*system, *turns[n_forgotten:]])
            if len(ids) <= room:
                break
        else:
            raise ValueError(
                f"a message, with the system message, must have at most {room} tokens, got {len(ids)} "
                f"(context of {context_length}); shorten it, or lower --max_new_tokens"
            )
        if n_forgotten > self._n_forgotten:
            _note(f"(the context of {context_length} tokens is full: {n_forgotten} oldest messages left out)")
        self._n_forgotten = n_forgotten
        return ids

    def _ids(self, prompt: Sequence[int]) -> Iterator[int]:
        options, end = self.options, self._tokenizer.special_id(chat_template.END)
        adjust = generate.make_logits_processor(
            options.temperature, options.min_p, options.repetition_penalty
        )
        place = self._model.lm_head.weight.device
        others = [self._tokenizer.special_id(special) for special in self._tokenizer.special_tokens]
        forbidden = torch.tensor([id for id in others if id != end], device=place)

        def answer_only(ids: Int[Tensor, " seq"], logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
            # an answer holds no special token; and what was said before it may be said again
            logits = logits.index_fill(0, forbidden, -torch.inf)
            return logits if adjust is None else adjust(ids[len(prompt) :], logits)

        return generate.generate(
            self._model,
            torch.tensor(prompt, device=place),
            min(options.max_new_tokens, self._model.config.context_length - len(prompt)),
            options.temperature,
            options.top_k,
            options.top_p,
            stop_id=end,
            generator=self._generator,
            adjust=answer_only,
        )

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []
        self._n_forgotten = 0

    def save(self, path: str) -> None:
        """Append the conversation to a JSONL file, as `chat.read` reads it."""
        if not self.turns:
            raise ValueError("there must be something to save, but nothing was said and answered yet")
        messages = [dataclasses.asdict(message) for message in self.messages]
        with open(path, "ab") as file:
            file.write(json.dumps({"messages": messages}).encode() + b"\n")


# --------------------------------------------------------------------------------------------------
# A terminal


def converse(talk: Talk, is_terminal: bool) -> int:
    """Answer line after line until there are no more, and return how many could not be.

    Notes and mistakes go beside the answers; of a pipe, mistakes are told with their line.
    """
    n_mistakes = 0
    if is_terminal:
        _note("/help says what else can be done; Ctrl-D ends")
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # makes input() able to edit lines
    for number, line in enumerate(_lines(is_terminal), start=1):
        try:
            if line.startswith("/"):
                if line.strip() == "/quit":
                    break
                obey(talk, line)
            elif line.strip():
                talk.reply(line.removeprefix(" "), _show)
                print(flush=True)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            n_mistakes += 1
            _note(f"error: {error}" if is_terminal else f"error: standard input:{number}: {error}")
    return n_mistakes


def obey(talk: Talk, line: str) -> None:
    """Do what a line that begins with a slash says. Raises ValueError if nobody knows what that is."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    match command:
        case "/reset":
            talk.reset()
        case "/system":
            talk.change(system=rest)
        case "/temperature":
            try:
                temperature = float(rest)
            except ValueError:
                raise ValueError(f"temperature must be a number, got {rest!r}") from None
            talk.change(temperature=temperature)
        case "/save":
            if not rest:
                raise ValueError("/save must be followed by the name of a file")
            talk.save(rest)
            _note(f"(saved to {rest})")
        case "/help":
            _note(HELP)
        case _:
            raise ValueError(f"a command must be one of those of /help, got {command}")


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
            _note("\n(Ctrl-D ends)")


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
