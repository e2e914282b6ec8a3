"""`credits completion`: the script by which a shell completes our commands and options."""

from __future__ import annotations

from pathlib import PurePath

import click
from click.shell_completion import get_completion_class

import settings
from cli.main import main
from cli.output import answer, json_option
from refresh.errors import RefusedError

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_CREDITS_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False, metavar="[bash|zsh|fish]")
@json_option
def completion(*, shell: str | None, as_json: bool) -> None:
    """Print the script that makes a shell complete `credits` by the tab key. Without an argument: for your $SHELL.

    \b
    Install it, then open a new shell:
      bash  credits completion bash > ~/.credits-completion.bash
            echo '. ~/.credits-completion.bash' >> ~/.bashrc       (bash 4.4 or later)
      zsh   credits completion zsh > ~/.credits-completion.zsh
            echo '. ~/.credits-completion.zsh' >> ~/.zshrc         (after compinit)
      fish  credits completion fish > ~/.config/fish/completions/credits.fish

    The script calls `credits`, so it must be on the PATH. It asks no database.

    \b
    With --json: shell, script.

    \b
    Example, for this shell alone:
      eval "$(credits completion bash)"
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    chosen = shell or PurePath(settings.environment().get("SHELL", "")).name
    if chosen not in SHELLS:
        raise RefusedError(f"your SHELL is none of {', '.join(SHELLS)}: name one of them")
    made = get_completion_class(chosen)
    assert made is not None  # noqa: S101 - Click knows all three
    script = made(main, {}, "credits", _VARIABLE).source()
    answer(script.rstrip("\n"), {"shell": chosen, "script": script}, as_json=as_json)
