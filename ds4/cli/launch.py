"""`ds4 launch`: point a coding agent at a server."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer


def launch(
    client: Annotated[
        Literal["claude", "codex", "opencode", "pi"], typer.Argument(help="The agent.")
    ],
    url: Annotated[str, typer.Option(help="Where `ds4 serve` listens.")] = "http://127.0.0.1:8000",
    write: Annotated[
        bool, typer.Option("--write", help="Write the file; what else is in it stays.")
    ] = False,
) -> None:
    """Show, or write, what an agent needs to use a running `ds4 serve`.

    A key is taken from DS4_API_KEY, by the agent too: it is written nowhere.
    """
    from ..server.clients import CLIENTS, KEY, ask

    setup = CLIENTS[client](ask(url, os.environ.get(KEY)), Path.home())
    if write:
        setup.write()
        typer.echo(f"wrote {setup.file}; start with: {setup.command}")
    else:
        typer.echo(f"{setup.file}:\n\n{setup.shown()}\nwritten by --write; then start with:")
        typer.echo(f"  {setup.command}")
