"""The command line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from graphprune import __version__
from graphprune.errors import GraphPruneError
from graphprune.extensions import extension_names, load_extension

if TYPE_CHECKING:
    from rich.console import Console

    from graphprune.pipeline.exported import Exported
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
    extension: Annotated[
        list[str] | None,
        typer.Option(
            help="A .py file or module of yours that registers rules, saliencies or the like; "
            "may stand more than once, before the command."
        ),
    ] = None,
) -> None:
    """Take the options that stand before a command."""
    for name in extension or ():
        load_extension(name)


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
    str | None,
    typer.Option(help="A transformers folder, a hub id, demo, or a .onnx file; replaces the recipe's."),
]
_Fresh = Annotated[bool, typer.Option("--fresh", help="Discard an earlier run in the folder.")]
_Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print what is there at the end only.")]


@app.command()
def run(
    output: _Output,
    recipe: Annotated[
        Path | None, typer.Argument(help="The recipe, a YAML file; a .onnx file can do without.")
    ] = None,
    model: _Model = None,
    train: Annotated[
        str | None, typer.Option(help="Text to learn from or calibrate on; replaces the recipe's.")
    ] = None,
    evaluate: Annotated[str | None, typer.Option(help="Text to judge by; replaces the recipe's.")] = None,
    fresh: _Fresh = False,
    quiet: _Quiet = False,
) -> None:
    """Prune, quantize, recover, export and report, all in one run."""
    if recipe is None and model is None:
        raise typer.BadParameter("Missing argument 'RECIPE' (or --model with a .onnx file).")
    texts = {"train": train, "evaluate": evaluate}
    console, reporter = _prepared(recipe, model, quiet, texts)
    from graphprune.pipeline.run import run as run_recipe
    from graphprune.report.terminal import summary_table

    command = _command("run", recipe, output, model, texts)
    report = run_recipe(recipe, output, reporter, model=model, fresh=fresh, command=command, **texts)
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
    console, reporter = _prepared(recipe, model, quiet)
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
    console, reporter = _prepared(recipe, model, quiet)
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


_Target = Annotated[
    Path, typer.Argument(help="A run folder, a folder that holds model.onnx, or a .onnx file.")
]
_Provider = Annotated[Literal["cpu", "cuda"], typer.Option(help="What computes: cpu or cuda.")]
_Threads = Annotated[int | None, typer.Option(min=1, help="Threads of one operator.")]


@app.command("eval")
def evaluate(
    target: _Target,
    text: Annotated[
        str | None,
        typer.Option(help="A text file or hub data set; of a run without it: its evaluation text."),
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens of a window of the text.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Windows at most.")] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(help="A file of questions, or a folder of them; may stand more than once."),
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Questions of each task at most.")] = None,
    provider: _Provider = "cpu",
    threads: _Threads = None,
    json: Annotated[Path | None, typer.Option(help="Where to write the numbers.")] = None,
    quiet: _Quiet = False,
) -> None:
    """Measure an ONNX model with onnxruntime: perplexity, and accuracy on zero-shot tasks."""
    exported, console = _exported(target), _console()
    from graphprune.files import write_json
    from graphprune.pipeline.evaluate import Asked
    from graphprune.pipeline.evaluate import evaluate as evaluate_model
    from graphprune.pipeline.progress import Reporter
    from graphprune.report.evaluation_table import evaluation_table

    asked = Asked(text=text, window=window, limit=limit, tasks=tasks or (), questions=questions)
    reporter = Reporter(None if quiet else console)
    found = evaluate_model(exported, asked, reporter, provider=provider, threads=threads)
    console.print(evaluation_table(found))
    if json is not None:
        write_json(json, found.row())


@app.command()
def chat(
    target: _Target,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this share.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    provider: _Provider = "cpu",
    threads: _Threads = None,
) -> None:
    """Talk with an ONNX model; each line of a pipe is a turn. /exit, Ctrl-D or Ctrl-C ends it."""
    exported, console = _exported(target), _console()
    from graphprune.export.generation import sampled
    from graphprune.pipeline.chat import converse, open_chat

    try:
        talk = open_chat(
            exported,
            choose=sampled(temperature, top_p, seed),
            max_new_tokens=max_tokens,
            provider=provider,
            threads=threads,
        )
        if sys.stdin.isatty() and not talk.has_template:
            _say(console, "The tokenizer has no chat template: each line is a text to go on with.")
        converse(
            talk, _typed() if sys.stdin.isatty() else sys.stdin, lambda piece: typer.echo(piece, nl=False)
        )
    except KeyboardInterrupt:
        typer.echo()


def _typed() -> Iterator[str]:
    """Yield lines as a person types them, with what the terminal has for editing them."""
    import readline  # noqa: F401  (input() then knows the arrow keys)

    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return


@app.command()
def verify(
    target: _Target,
    text: Annotated[
        str | None, typer.Option(help="A text to verify with; else the run's evaluation text.")
    ] = None,
) -> None:
    """Verify an ONNX model again: a run's against its torch model, a file alone against itself."""
    exported, console = _exported(target), _console()
    from graphprune.export.check import raise_if_failed
    from graphprune.pipeline.verify_run import verify as verify_model
    from graphprune.report.check_table import check_table

    checks = verify_model(exported, text)
    console.print(check_table(str(exported.file), checks))
    raise_if_failed(str(exported.file), checks)


def _exported(target: Path) -> Exported:
    """Find the model before anything slow is imported, so that a typing error is told at once."""
    from graphprune.pipeline.exported import find_exported

    return find_exported(target)


def _console() -> Console:
    """Have other libraries keep quiet, and return where to tell results."""
    from rich.console import Console

    from graphprune.pipeline.quiet import quieten

    quieten()
    return Console()


def _prepared(
    recipe: Path | None, model: str | None, quiet: bool, texts: Mapping[str, str | None] | None = None
) -> tuple[Console, Reporter]:
    """Check what can be without torch, so that a typing error is told at once; return where to tell progress."""
    from graphprune.recipe_file import load_recipe
    from graphprune.source.location import check_model, find_text

    given = {"model.id": model, **{f"data.{key}": name for key, name in (texts or {}).items()}}
    settings = load_recipe(recipe, {key: value for key, value in given.items() if value is not None})
    base = recipe.resolve().parent if recipe is not None else Path.cwd()
    check_model(settings.model.id, base)
    for text in settings.texts:
        find_text(text, base)
    from graphprune.pipeline.progress import Reporter

    console = _console()
    return console, Reporter(None if quiet else console)


def _command(
    name: str,
    recipe: Path | None,
    output: Path,
    model: str | None,
    options: Mapping[str, str | None] | None = None,
) -> str:
    given = {"model": model, **(options or {})}
    added = [word for extension in extension_names() for word in ("--extension", extension)]
    words = ["graphprune", *added, name, *([str(recipe)] if recipe else []), "-o", str(output)]
    words += [word for key, value in given.items() if value for word in (f"--{key}", value)]
    return shlex.join(words)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
