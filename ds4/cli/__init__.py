"""The `ds4` command. Each subcommand has its own file, and imports what is heavy when it runs."""

import os
import sys
from typing import Annotated

import typer

from ..errors import Ds4Error
from .batch import batch
from .bench import bench
from .chat import chat
from .compare import compare
from .doctor import doctor
from .eval import evaluate
from .generate import generate
from .launch import launch
from .plan import plan
from .pull import pull
from .quantize import quantize
from .serve import serve
from .terminal import drop_output, open_streams, show_error
from .verify import verify

app = typer.Typer(
    help="DeepSeek-V4-Flash at home.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_running, _preparing = (
    (generate, chat, serve, launch, batch, bench),
    (compare, doctor, plan, pull, quantize),
)
for command in (*_running, *_preparing, verify):
    app.command()(command)
app.command("eval")(evaluate)


def main() -> None:
    """Run the command line: status 0, 1 for an error, 2 for a wrong option, 130 for Ctrl-C."""
    open_streams()
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
            from ..parallel.follow import main as follow  # torchrun started this one to help

            follow()
        try:
            app(prog_name="ds4")
        finally:
            sys.stdout.flush()
    except Ds4Error as error:
        show_error(error)
        sys.exit(1)
    except OSError as error:  # a full disk, mostly: of a file, or of standard output
        show_error(OSError(": ".join(filter(None, (error.filename, error.strerror or str(error))))))
        drop_output()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"ds4 {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass
