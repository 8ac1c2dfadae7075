"""The command line."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune import __version__
from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from rich.console import Console

    from graphprune.pipeline.progress import Reporter

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


_Recipe = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
_Output = Annotated[Path, typer.Option("-o", "--output", help="The run folder; a run in it is resumed.")]
_Model = Annotated[
    str | None, typer.Option(help="A transformers folder, a hub id, or demo; replaces the recipe's.")
]
_Fresh = Annotated[bool, typer.Option("--fresh", help="Discard an earlier run in the folder.")]
_Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print what is there at the end only.")]


@app.command()
def run(
    recipe: _Recipe, output: _Output, model: _Model = None, fresh: _Fresh = False, quiet: _Quiet = False
) -> None:
    """Prune, quantize, recover, export and report, all in one run."""
    console, reporter = _prepared(recipe, quiet)
    from graphprune.pipeline.run import run as run_recipe
    from graphprune.report.terminal import summary_table

    command = _command("run", recipe, output, model)
    report = run_recipe(recipe, output, reporter, model=model, fresh=fresh, command=command)
    console.print()
    console.print(summary_table(report))
    for generation in report.generations:
        text = f"\nThe ONNX model, after “{generation.prompt}”, wrote:\n{generation.compact.strip()}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    _say(console, f"\nThe report is {output / 'report.html'}")


@app.command()
def prune(
    recipe: _Recipe, output: _Output, model: _Model = None, fresh: _Fresh = False, quiet: _Quiet = False
) -> None:
    """Do a run as far as the pruned model, which stock transformers opens."""
    console, reporter = _prepared(recipe, quiet)
    from graphprune.pipeline.run import run_until

    measured = run_until("reload", recipe, output, reporter, model=model, fresh=fresh)
    before, after = measured["parameters"], measured["parameters_after"]
    _say(
        console,
        f"The pruned model is {output / 'model'}: {after:,} of {before:,} parameters, perplexity "
        f"{measured['perplexity_dense']:.2f} → {measured['perplexity_pruned']:.2f}",
    )
    _say(console, f"Go on with: {_command('recover', recipe, output, model)}")


@app.command()
def recover(
    recipe: _Recipe, output: _Output, model: _Model = None, fresh: _Fresh = False, quiet: _Quiet = False
) -> None:
    """Do a run as far as the recovered model, from where it stands."""
    console, reporter = _prepared(recipe, quiet)
    from graphprune.pipeline.run import run_until

    measured = run_until("recover", recipe, output, reporter, model=model, fresh=fresh)
    place = (
        f"{output / 'recovered'}"
        if (output / "recovered").is_dir()
        else f"{output / 'quant'}, its adapters {output / 'adapter'}"
    )
    _say(
        console,
        f"The recovered model is {place}: perplexity {measured['perplexity_dense']:.2f} dense, "
        f"{measured['perplexity_pruned']:.2f} pruned, {measured['perplexity_recovered']:.2f} recovered",
    )
    _say(console, f"Go on with: {_command('run', recipe, output, model)}")


def _prepared(recipe: Path, quiet: bool) -> tuple[Console, Reporter]:
    """Check the recipe, then have other libraries keep quiet, and return where to tell results and progress."""
    from graphprune.recipe import load_recipe

    load_recipe(recipe)  # a typing error is told at once, before torch is imported
    from rich.console import Console

    from graphprune.pipeline.progress import Reporter
    from graphprune.pipeline.quiet import quieten

    quieten()
    console = Console()
    return console, Reporter(None if quiet else console)


def _command(name: str, recipe: Path, output: Path, model: str | None) -> str:
    words = ["graphprune", name, str(recipe), "-o", str(output), *(["--model", model] if model else [])]
    return shlex.join(words)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
