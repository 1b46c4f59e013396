"""The table of commands: `llm-basics COMMAND` runs `python -m llm_basics.COMMAND`."""

import ast
import runpy
import sys
from pathlib import Path

COMMANDS = (
    *("train", "sft", "dpo", "rl", "distill", "generate", "chat", "evaluate", "plot", "compare", "sweep"),
    *("prepare", "tokenizer", "checkpoint", "export", "import_model", "lm_harness", "learn", "probe"),
    *("steer", "lab", "doctor", "completion"),
)


def summary(command: str) -> str:
    """The first line of a command's docstring, read without importing it."""
    path = Path(__file__).with_name(f"{command}.py")
    source = path if path.exists() else Path(__file__).parent / command / "__main__.py"
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def main() -> None:
    """Run the command named on the command line; without one, list all commands."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        sys.argv[1:] = arguments
        runpy.run_module(f"llm_basics.{command}", run_name="__main__", alter_sys=True)
        return
    from llm_basics.cli import parse  # slow

    with parse.exit_on_error():
        if command not in ("-h", "--help"):
            raise ValueError(parse.unknown_name("command", command, COMMANDS))
        rows = "\n".join(f"  {name:14}{summary(name)}" for name in COMMANDS)
        print(f"usage: llm-basics COMMAND [OPTIONS]\n\n{rows}\n\nllm-basics COMMAND --help lists its options")


if __name__ == "__main__":
    main()
