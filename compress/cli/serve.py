"""`compress serve`: transformers' server, which reads our native format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli import options
from compress.cli.guard import guarded
from compress.threads import compute_threads


def register(app: typer.Typer) -> None:
    app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(command)


@guarded
def command(
    context: typer.Context,
    artifact: Annotated[str, typer.Argument(help="An artifact of pack(format=native).", metavar="DIR")],
    host: Annotated[str, typer.Option(help="The address that it listens on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Its port.", min=1, max=65535)] = 8000,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Serve a packed model by `transformers serve`, over the OpenAI protocol. Other options go there as they are.

    Needs the extra `serve`. Talk to it by `transformers chat DIR http://localhost:8000`, or any client.
    """
    import compress.hf  # noqa: F401  (transformers then knows the format)
    from compress.checkpoint.reader import open_checkpoint
    from compress.errors import MachineError, UsageError
    from compress.runtime.fill import refuse_other

    checkpoint = open_checkpoint(Path(artifact))
    refuse_other(checkpoint)
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise MachineError("compress serve", "transformers with its server", "none", "pip install 'compress-llm[serve]'")
    from transformers.cli.transformers import app

    place = str(checkpoint.path.resolve())
    print(f"{place} at http://{host}:{port}/v1, its name in requests too; stop it with Ctrl-C", flush=True)
    try:
        with compute_threads(threads):
            app(["serve", place, "--host", host, "--port", str(port), *context.args], standalone_mode=False)
    except Exception as error:
        # typer may have click inside or beside it.
        if not hasattr(error, "format_message"):
            raise
        said, do = error.format_message().splitlines()[0], "`transformers serve --help` lists them"
        raise UsageError("compress serve", "options of `transformers serve`", said, do) from None
