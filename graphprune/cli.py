"""The command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from graphprune import __version__
from graphprune.errors import GraphPruneError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a transformer into a smaller, low-bit ONNX model, and prove that it was done correctly.",
)


def main() -> None:
    """Run the command line; errors that a person can act on are printed without a traceback."""
    try:
        app()
    except GraphPruneError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from the last finished stage\n")
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphprune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(help="A transformers folder, a config.json alone, a hub id, demo, or a .onnx file."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where to write the pages and pictures of the groups.")
    ] = Path("groups"),
    certified: Annotated[
        bool, typer.Option("--certify", help="Prove the groups on the model's weights; reads them.")
    ] = False,
) -> None:
    """Show a model's node groups: what must be pruned together, what may go, and why the rest may not."""
    from rich.console import Console

    from graphprune.pipeline.inspect import inspect as inspect_model
    from graphprune.pipeline.quiet import quieten
    from graphprune.report.terminal import certificate_line, groups_table

    quieten()
    console = Console()
    found = inspect_model(model, output, certified=certified)
    console.print(groups_table(found.document), highlight=False)
    if found.certificate is not None:
        console.print(certificate_line(found.certificate), highlight=False)
    console.print(f"\nThe page is {output / 'groups.html'}", markup=False, highlight=False, soft_wrap=True)
    found.raise_if_nothing_is_prunable()


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The run folder; a run in it is resumed.")],
    model: Annotated[
        str | None, typer.Option(help="A transformers folder, a hub id, or demo; replaces the recipe's.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard an earlier run in the folder.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the table at the end only.")] = False,
) -> None:
    """Prune, quantize, recover, export and report, all in one run."""
    from graphprune.recipe import load_recipe

    load_recipe(recipe)  # a typing error is told at once, before torch is imported
    from rich.console import Console

    from graphprune.pipeline.progress import Reporter
    from graphprune.pipeline.quiet import quieten
    from graphprune.pipeline.run import run as run_recipe
    from graphprune.report.terminal import summary_table

    quieten()
    console = Console()
    command = f"graphprune run {recipe} -o {output}" + (f" --model {model}" if model else "")
    report = run_recipe(
        recipe, output, Reporter(None if quiet else console), model=model, fresh=fresh, command=command
    )
    console.print()
    console.print(summary_table(report))
    for generation in report.generations:
        text = f"\nThe ONNX model, after “{generation.prompt}”, wrote:\n{generation.compact.strip()}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nThe report is {output / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
