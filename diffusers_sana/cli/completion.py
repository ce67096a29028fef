"""`diffusers-sana completion`: a script that completes commands, options and their choices in a shell."""

import argparse

from diffusers_sana.checkpoints import BUNDLED, BUNDLED_CONTROLNETS, BUNDLED_LORAS


SCRIPT = """\
_diffusers_sana() {
    local words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="%(commands)s"
    else
        case "$3" in
%(choices)s
        esac
        if [[ -z "$words" && "$2" == -* ]]; then
            case "${COMP_WORDS[1]}" in
%(options)s
            esac
        fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$2"))
}
complete -o default -F _diffusers_sana diffusers-sana
"""
OF_BASH_IN_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
NAMES = {
    "--model": BUNDLED | BUNDLED_CONTROLNETS | BUNDLED_LORAS,
    "--controlnet": BUNDLED_CONTROLNETS,
    "--lora": BUNDLED_LORAS,
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("shell", metavar="SHELL", choices=("bash", "zsh"), help="bash or zsh")


def run(args: argparse.Namespace) -> None:
    """Prints a script that completes options: in ~/.bashrc, `eval "$(diffusers-sana completion bash)"`; zsh alike."""
    from diffusers_sana.cli import COMMANDS

    options = {}
    choices = {flag: " ".join(names) for flag, names in NAMES.items()}
    for name, (module, _) in COMMANDS.items():
        command = argparse.ArgumentParser(prog=name)
        module.add_arguments(command)
        flags = [(flag, action) for action in command._actions for flag in action.option_strings]
        options[name] = " ".join(flag for flag, _ in flags if flag.startswith("--"))
        choices |= {flag: " ".join(map(str, action.choices)) for flag, action in flags if action.choices}

    def cases(words: dict[str, str], indent: int) -> str:
        return "\n".join(f'{" " * indent}{name}) words="{found}" ;;' for name, found in words.items())

    fields = {"commands": " ".join(COMMANDS), "choices": cases(choices, 12), "options": cases(options, 16)}
    print((OF_BASH_IN_ZSH if args.shell == "zsh" else "") + SCRIPT % fields, end="")
