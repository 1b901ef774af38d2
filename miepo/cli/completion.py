"""``miepo completion bash | zsh``: a script that completes commands and options."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Sequence

from miepo.cli.configurations import packaged_configurations
from miepo.cli.quiet import quiet

BASH = """\
# completes the command miepo in bash; written by: miepo completion bash
_miepo() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD - 1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    elif [ "$before" = --config ] || [ "$before" = -c ]; then
        words="{configurations}"
    elif [ "${{word:0:1}}" = - ]; then
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _miepo miepo
"""

ZSH = """\
#compdef miepo
# completes the command miepo in zsh; written by: miepo completion zsh
_miepo() {{
    if (( CURRENT == 2 )); then
        compadd -- {commands}
    elif [[ $words[CURRENT-1] == (--config|-c) ]]; then
        compadd -- {configurations}
        _files
    elif [[ $words[CURRENT] == -* ]]; then
        case $words[2] in
{cases}
        esac
    else
        _files
    fi
}}
if [ "$funcstack[1]" = _miepo ]; then _miepo "$@"; else compdef _miepo miepo; fi
"""
SHELLS = {"bash": (BASH, '            {}) words="{}" ;;'), "zsh": (ZSH, "            {}) compadd -- {} ;;")}


def make_parser() -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(
        prog="miepo completion",
        description="Prints a script that completes commands, their options and names of configurations. In bash: "
        "miepo completion bash > ~/.local/share/bash-completion/completions/miepo, or source it in ~/.bashrc. In zsh: "
        "write it as _miepo into a folder of $fpath, or source it after compinit in ~/.zshrc.",
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(args: Sequence[str]) -> None:
    """Print the script."""
    options = make_parser().parse_args(args)
    frame, case = SHELLS[options.shell]
    helps = _helps()
    cases = [case.format(command, " ".join(option_names(text))) for command, text in helps.items()]
    commands = " ".join([*helps, "--help", "--version"])
    configurations = " ".join(packaged_configurations())
    print(frame.format(commands=commands, configurations=configurations, cases="\n".join(cases)), end="")


def _helps() -> dict[str, str]:
    """Return the help of each command."""
    from miepo.cli.command import COMMANDS, OTHER_COMMANDS, module_of

    quiet()
    from miepo.cli.trainer import command_parsers

    helps = {name: parser.format_help() for name, parser in command_parsers().items()}
    for name in OTHER_COMMANDS:
        helps[name] = module_of(name).make_parser().format_help()
    return {name: helps[name] for name in COMMANDS}


def option_names(text: str) -> list[str]:
    """Return the long options that a help describes.

    >>> option_names("  -c FILE, --config FILE  A file\\n  --data.prompts P, --data.prompts+ P\\n        see --out")
    ['--config', '--data.prompts', '--data.prompts+']
    """
    lines = re.findall(r"^  (-.*)$", text, flags=re.M)
    return list(dict.fromkeys(name for line in lines for name in re.findall(r"(?:^|, )(--[\w.]+\+?)", line)))
