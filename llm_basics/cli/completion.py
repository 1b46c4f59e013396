"""Shell completion of `llm-basics`, from the output of --help."""

from llm_basics.cli import commands, parse

# COMP_WORDS and COMP_CWORD are bash's: the words of the line, and the index of the one to complete
SCRIPT = r"""
_llm_basics() {
    local word="${COMP_WORDS[COMP_CWORD]}" words
    if [ "$COMP_CWORD" -eq 1 ]; then
        words=$(llm-basics --help 2>/dev/null | awk '/^  [a-z_]/ { print $1 }')
    elif [ "${word#-}" != "$word" ]; then
        words=$(llm-basics "${COMP_WORDS[@]:1:COMP_CWORD-1}" --help 2>/dev/null |
            grep -oE -e '--[a-z][A-Za-z0-9_.]*' | sort -u)
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _llm_basics llm-basics
"""


def script(shell: str) -> str:
    """The completion script for a shell; zsh loads that of bash.

    >>> script("zsh").startswith("autoload -Uz bashcompinit && bashcompinit")
    True
    """
    before = "autoload -Uz bashcompinit && bashcompinit" if shell == "zsh" else ""
    return f"{before}{SCRIPT}".lstrip()


def main(options: commands.CompletionConfig) -> int:
    """Print the script. Returns the exit status."""
    with parse.exit_on_error():
        print(script(options.shell), end="")
    return 0
