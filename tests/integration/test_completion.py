"""`credits completion`, and the completion itself, asked as a shell asks."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.integration.command import CREDITS, refused

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.command import Cli


def completed(cli: Cli, line: str) -> list[str]:
    """What bash would offer after this line; the word after the last space is being typed."""
    done = cli(COMP_WORDS=line, COMP_CWORD=str(line.count(" ")), _CREDITS_COMPLETE="bash_complete")
    assert (done.returncode, done.stderr) == (0, ""), done
    return [offer.partition(",")[2] for offer in done.stdout.splitlines() if offer]


def test_commands_groups_options_and_choices_complete(cli: Cli) -> None:
    assert completed(cli, "credits ru") == ["runs"]
    assert {"list", "show", "watch"} <= set(completed(cli, "credits runs "))
    assert completed(cli, "credits runs wa") == ["watch"]
    assert {"--status", "--since", "--source"} <= set(completed(cli, "credits runs list --s"))
    assert completed(cli, "credits runs list --status p") == ["partial"]
    assert completed(cli, "credits completion z") == ["zsh"]
    assert completed(cli, "credits nothing-like-it") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(cli: Cli, shell: str) -> None:
    script = cli.says("completion", shell)
    assert f"_CREDITS_COMPLETE={shell}_complete" in script
    assert cli.facts("completion", shell)["script"].startswith(script.rstrip("\n"))
    assert cli("completion", SHELL=f"/usr/bin/{shell}").stdout == script


def test_an_unknown_shell_is_refused(cli: Cli) -> None:
    refused(cli("completion", "tcsh"), 2, "'tcsh' is not one of")
    refused(cli("completion", SHELL="/bin/tcsh"), 2, "name one of them")
    refused(cli("completion", SHELL=""), 2, "name one of them")


def test_the_help_says_how_to_install_it(cli: Cli) -> None:
    text = cli.says("completion", "--help")
    for word in ("~/.bashrc", "~/.zshrc", "~/.config/fish/completions", "Example"):
        assert word in text


def test_bash_itself_completes_by_the_script(cli: Cli, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    script = tmp_path / "completion.bash"
    script.write_text(cli.says("completion", "bash"))
    asked = f"""
        . '{script}'
        complete -p credits
        COMP_WORDS=(credits runs sh) COMP_CWORD=2
        _credits_completion '{CREDITS}' sh runs
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run([bash, "-c", asked], capture_output=True, text=True, check=True, env=cli.environment)
    assert done.stdout.splitlines()[-1] == "show"
    assert "_credits_completion" in done.stdout
