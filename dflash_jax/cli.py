"""The command line. Everything heavy is imported by the command that needs it, so that --help answers at once."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from dflash_jax.console import Progress
    from dflash_jax.engine.request import Finished, Stats, TokenLogprobs

_FILE = click.Path(path_type=Path)
_INPUT_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_SWITCH = click.Choice(["auto", "on", "off"])


class _Failure(Exception):
    """An answer that the engine could not finish, or a checkpoint that is damaged."""


class _Commands(click.Group):
    """Turns what a user got wrong into one line on stderr and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(error, click.ClickException | click.exceptions.Exit | click.Abort):
                raise
            if os.environ.get("DFLASH_JAX_DEBUG") or not _is_expected(error):
                raise
            click.echo(f"error: {_line(error)}", err=True)
            ctx.exit(1)


def _is_expected(error: Exception) -> bool:
    if isinstance(error, UnicodeError) or _out_of_memory(error):
        return True
    if isinstance(error, OSError):
        return error.errno != errno.EPIPE  # click itself ends quietly when the reader of a pipe has gone
    from dflash_jax.engine.request import OverloadedError, RequestError

    if isinstance(error, _Failure | RequestError | OverloadedError):
        return True
    from checkpoints import CheckpointError
    from dflash_jax.engine.tokenizer import TokenizerError
    from dflash_jax.models.config import ConfigError

    return isinstance(error, CheckpointError | ConfigError | TokenizerError)


def _out_of_memory(error: Exception) -> bool:
    """XLA says the same of a kernel that wants more shared memory than there is, which is a defect of ours."""
    return "RESOURCE_EXHAUSTED" in str(error) and "shared memory" not in str(error).lower()


def _line(error: Exception) -> str:
    if _out_of_memory(error):
        return "the device's memory is full: choose a smaller --context-length, fewer --max-sessions or smaller weights"
    if isinstance(error, UnicodeError):
        return f"not UTF-8 text: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    try:
        version = importlib.metadata.version("dflash-jax")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    click.echo(f"dflash-jax {version}")
    ctx.exit()


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_model = click.argument("model", required=False, type=_FILE)
_drafter = click.option("--drafter", type=_FILE, help="The model that proposes blocks.")


class _TreeRows(click.IntRange):
    """Rows of a tree, or 0. The number may be left out, so the word after the option may be meant for the command."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            reason = f"{value!r} is not a number of rows, and --tree takes the word after it"
            self.fail(f"{reason}: put --tree last or write --tree=16", param, ctx)
        if number == 1:
            self.fail("a tree has 2 rows at least, the anchor's among them; 0 is a chain", param, ctx)
        return super().convert(number, param, ctx)


_tree = click.option(
    "--tree",
    type=_TreeRows(0, 32),
    is_flag=False,
    flag_value=16,
    metavar="ROWS",
    help="Verify a tree of so many rows (16 without a number) or a chain of proposals (0); by default GPUs take trees.",
)
_scoring_options = _options(
    click.option(
        "--scorer", type=_FILE, help="The model that ranks prompt tokens; without it, the target's first layers."
    ),
    click.option(
        "--keep-ratio", type=click.FloatRange(0, 1, min_open=True), help="Share of scored tokens to keep, fixed."
    ),
    click.option(
        "--pflash-scope",
        type=click.Choice(["agent", "document", "all"]),
        default="agent",
        show_default=True,
        help="What may be pruned: big tool results, files and old turns; all but the last user message; everything.",
    ),
    click.option(
        "--bsa", type=click.Choice(["on", "off"]), default="off", show_default=True, help="Block-sparse scoring."
    ),
    click.option(
        "--context-length", type=click.IntRange(min=1), help="Tokens in the window; the model's own by default."
    ),
)
_engine_options = _options(
    _drafter,
    click.option("--dflash", type=_SWITCH, default="auto", show_default=True, help="Draft blocks; auto: when it pays."),
    _tree,
    click.option(
        "--pflash", type=_SWITCH, default="auto", show_default=True, help="Prune prompts; auto: when it pays."
    ),
    _scoring_options,
)
_SAMPLING = {
    "temperature": {"type": click.FloatRange(0, 2), "default": 0.0, "show_default": True},
    "top_k": {"type": click.IntRange(min=0), "default": 0, "help": "Draw from so many tokens; 0: from all."},
    "top_p": {"type": click.FloatRange(0, 1, min_open=True), "default": 1.0},
    "min_p": {"type": click.FloatRange(0, 1), "default": 0.0},
    "seed": {"type": int, "help": "Makes a sampled answer repeatable, with and without DFlash."},
    "repetition_penalty": {"type": click.FloatRange(0.1, 10), "default": 1.0, "help": "Of prompt and answer; 1: none."},
    "presence_penalty": {"type": click.FloatRange(-2, 2), "default": 0.0},
    "frequency_penalty": {"type": click.FloatRange(-2, 2), "default": 0.0},
    "logprobs": {"type": click.IntRange(0, 20), "help": "With --json: log-probabilities, and of so many others."},
}
_sampling_options = _options(
    *(click.option(f"--{name.replace('_', '-')}", **settings) for name, settings in _SAMPLING.items())
)
_json_file = click.option("--json", "json_file", type=_FILE, help="Write the figures to this file.")
_shape_options = _options(
    click.option(
        "--shape",
        type=click.Choice(["gemma4-31b", "gemma4-12b", "gemma4-26b", "qwen3-8b"]),
        help="A big model's sizes.",
    ),
    click.option("--random", "random_weights", is_flag=True, help="Random weights for --shape; no MODEL is read."),
    click.option(
        "--context", "contexts", type=click.IntRange(min=1), multiple=True, help="With --shape; may be repeated."
    ),
)
_plot = click.option("--plot", type=_FILE, help="Draw the figures to this .png (needs the extra `plot`).")
_prompts = click.option("--prompts", type=_INPUT_FILE, help='JSON lines: {"messages": [...]} or {"prompt": "..."}.')


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def main() -> None:
    """Serve a big model to an agent, fast.

    MODEL is a converted folder, a Hugging Face folder or a .gguf file; without it, a small default model is prepared.
    """


@main.command()
@_model
@_engine_options
@click.option("--max-sessions", type=click.IntRange(min=1), help="Answers that run at the same time.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
@click.option("--api-key", envvar="DFLASH_JAX_API_KEY", help="Key that clients must send [env: DFLASH_JAX_API_KEY].")
def serve(model: Path | None, host: str, port: int, api_key: str | None, **options: Any) -> None:
    """Serve MODEL over HTTP to OpenAI's clients."""
    if api_key is not None and not api_key.strip():
        raise click.UsageError("the API key is empty: give one or leave --api-key and DFLASH_JAX_API_KEY out")
    from dflash_jax.server.serve import serve

    def load(progress: Progress) -> Any:
        return _load_engine(model, options, progress)

    serve(load, host, port, api_key)


@main.command()
@_model
@click.option("-p", "--prompt", required=True, help="What to say to the model; @FILE reads a file, - reads stdin.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens to generate; by default what the window holds.")
@_sampling_options
@click.option("--raw", is_flag=True, help="Continue the text as it stands, without the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: text, token_ids, stats.")
@_engine_options
def generate(
    model: Path | None,
    prompt: str,
    max_tokens: int | None,
    raw: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer one prompt."""
    sampling = {name: options.pop(name) for name in _SAMPLING}
    if sampling["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    text = _read_prompt(prompt)
    from dflash_jax.console import progress_bar
    from dflash_jax.engine.request import TextDelta

    with progress_bar() as progress:
        engine = _load_engine(model, options, progress)
    texts: list[str] = []
    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    try:
        for event in engine.stream(
            text if raw else [{"role": "user", "content": text}], max_tokens=max_tokens, **sampling
        ):
            if isinstance(event, TextDelta):
                texts.append(event.text)
                ids.extend(event.token_ids)
                logprobs.extend(event.logprobs)
                if not as_json:
                    click.echo(event.text, nl=False)
                continue
            if not as_json:
                click.echo()
            _raise_if_failed(event)
            if as_json:
                answer: dict[str, Any] = {"text": "".join(texts), "token_ids": ids}
                if sampling["logprobs"] is not None:
                    answer["logprobs"] = [_logprobs(entry) for entry in logprobs]
                answer["stats"] = {"finish_reason": event.reason, **_stats(event.stats)}
                click.echo(json.dumps(answer, ensure_ascii=False))
    finally:
        engine.close()


@main.command()
@click.argument("source", type=_FILE)
@click.argument("out", type=_FILE)
@click.option("--weights", type=click.Choice(["f32", "bf16", "w8", "w4"]), default="bf16", show_default=True)
@click.option(
    "--group-size", type=click.Choice(["32", "128"]), default="32", show_default=True, help="Inputs per w4 scale."
)
@click.option("--role", type=click.Choice(["target", "drafter", "scorer"]), default="target", show_default=True)
def convert(source: Path, out: Path, weights: str, group_size: str, role: str) -> None:
    """Convert SOURCE, a Hugging Face folder or a .gguf file, into the folder OUT."""
    import checkpoints
    from dflash_jax.console import progress_bar

    started = time.monotonic()
    with progress_bar() as progress:
        done = checkpoints.convert(
            source, out, weights=weights, group_size=int(group_size), role=role, progress=progress
        )
    click.echo(f"{done.bytes / 1e9:.2f} GB in {time.monotonic() - started:.0f} s", err=True)
    click.echo(f"{out} is ready")


@main.command()
@click.argument("path", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--verify", is_flag=True, help="Compare a converted folder with its checksums.")
def inspect(path: Path, as_json: bool, verify: bool) -> None:
    """Show what the checkpoint at PATH holds, and what fits on this device."""
    # Looking at a model must not take the device's memory from whoever serves it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import checkpoints

    description = checkpoints.describe(path)
    damaged = _verify(path) if verify else []
    if verify:
        description = {**description, "verified": "damaged" if damaged else "all checksums are right"}
    if as_json:
        click.echo(json.dumps(description, ensure_ascii=False, default=str))
    else:
        _print_table(description)
    if damaged:
        raise _Failure(f"{path}: {'; '.join(damaged)}; convert the model again")


def _verify(path: Path) -> list[str]:
    import checkpoints
    from dflash_jax.console import progress_bar

    with progress_bar() as progress:
        return checkpoints.verify(path, progress)


@main.command(name="train-drafter")
@click.argument("model", type=_FILE)
@click.argument("out", type=_FILE)
@click.option("--data", type=_INPUT_FILE, help="Prompts as JSON lines; without it the target asks itself.")
@click.option("--samples", type=_INPUT_FILE, multiple=True, help="samples.npz of another run: nothing is written anew.")
@click.option("--tokens", type=click.IntRange(min=1), default=12_000_000, show_default=True, help="To write first.")
@click.option("--slots", type=click.IntRange(min=1), default=512, show_default=True, help="Written at the same time.")
@click.option("--room", type=click.IntRange(min=128), default=1024, show_default=True, help="Tokens per conversation.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=8.0, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Stop after so many steps, if that comes first.")
@click.option("--start", type=_FILE, help="A drafter to train on from, instead of a random one.")
@click.option("--layers", type=click.IntRange(1, 32))
@click.option("--features", type=click.IntRange(1, 16), help="Target layers that the drafter reads.")
@click.option("--block-size", type=click.IntRange(2, 64))
@click.option("--path-rank", type=click.IntRange(min=0), help="Rank of the path selector; 0 for none.")
@click.option("--convolution/--no-convolution", default=None, help="Rows that see their left neighbours.")
@click.option("--window", type=click.IntRange(min=1), help="Context tokens that the drafter sees.")
@click.option("--weighting", type=click.Choice(["d-pace", "decay"]))
@click.option("--labels", type=click.Choice(["tokens", "target"]), help="What follows, or what the target thought.")
@click.option("--optimiser", type=click.Choice(["muon", "adamw"]))
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Peak learning rate.")
@click.option("--batch-tokens", type=click.IntRange(min=128))
@click.option("--tokens-per-anchor", type=click.IntRange(min=1))
@click.option("--seed", type=int, default=0, show_default=True)
def train_drafter(
    model: Path,
    out: Path,
    data: Path | None,
    samples: tuple[Path, ...],
    tokens: int,
    slots: int,
    room: int,
    minutes: float,
    steps: int | None,
    start: Path | None,
    seed: int,
    **recipe: Any,
) -> None:
    """Train a drafter for MODEL (`default` is the default model) into the folder OUT.

    A run that was stopped goes on when the same command is given again.
    """
    from dflash_jax.console import progress_bar
    from dflash_jax.train.recipe import Recipe
    from dflash_jax.train.run import Length, run

    with progress_bar() as progress:
        report = run(
            None if str(model) == "default" else model,
            out,
            recipe=Recipe(**{name: value for name, value in recipe.items() if value is not None}),
            data=data,
            samples=samples,
            tokens=tokens,
            slots=slots,
            room=room,
            length=Length(60 * minutes, steps),
            seed=seed,
            start=start,
            progress=progress,
        )
    length = report["held_out_accept_length"]
    told = "too few samples to hold some out" if length is None else f"accept length on held-out samples: {length}"
    click.echo(f"{told} ({report['steps']} steps)")
    click.echo(f"{out} is ready: dflash-jax serve {model} --drafter {out}")


@main.group()
def bench() -> None:
    """Measure on this machine."""


@bench.command()
@_model
@click.option(
    "--prompts",
    type=_INPUT_FILE,
    multiple=True,
    help='JSON lines: {"messages": [...]} or {"prompt": "..."}; may be repeated, files are summed up one by one.',
)
@_json_file
@_plot
@_drafter
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens per answer.")
@click.option("--limit", type=click.IntRange(min=1), help="Take the first prompts of each file.")
@click.option("--dflash", type=click.Choice(["auto", "on"]), default="on", show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@_tree
@_shape_options
def decode(
    model: Path | None, shape: str | None, random_weights: bool, contexts: tuple[int, ...], **options: Any
) -> None:
    """Tokens per second with and without DFlash, and whether the tokens are equal.

    With --shape and --random: the time of a step and of a block of a big model beside what reading its weights costs.
    """
    _check_shape(shape, random_weights, takes=("tree",))
    if shape is not None:
        from dflash_jax.bench import shapes

        shapes.run(shape, contexts or (4096, 32_768), options["json_file"], tree=options["tree"])
        return
    from dflash_jax.bench import decode

    decode.run(model, **options)


@bench.command()
@_model
@_prompts
@_json_file
@_plot
@_scoring_options
@_shape_options
def prefill(
    model: Path | None, shape: str | None, random_weights: bool, contexts: tuple[int, ...], **options: Any
) -> None:
    """Time to the first token with and without PFlash.

    With --shape and --random: of a big model, whose prompts are random tokens, beside what their products cost.
    """
    _check_shape(shape, random_weights, takes=("keep_ratio", "bsa", "plot"))
    options = _with_bsa(options)
    if shape is not None:
        from dflash_jax.bench import shape_prefill

        names = ("json_file", "plot", "keep_ratio", "bsa")
        shape_prefill.run(shape, contexts or (8192, 32_768), **{name: options[name] for name in names})
        return
    from dflash_jax.bench import prefill

    prefill.run(model, **options)


@bench.command()
@_json_file
@click.option("--operation", help="One operation by its folder's name; without it, all.")
@click.option("--tune", is_flag=True, help="Sweep the quantised matmul's configs for two minutes; writes tuned.json.")
def kernels(**options: Any) -> None:
    """Time of every operation beside the device's limit and what XLA makes of its reference, and its error."""
    from dflash_jax.bench import kernels

    kernels.run(**options)


def _check_shape(shape: str | None, random_weights: bool, *, takes: tuple[str, ...]) -> None:
    """Refuses what would be ignored: of the command's other options, those in `takes` go with a shape."""
    if (shape is None) == random_weights:
        raise click.UsageError("--shape and --random belong together")
    context = click.get_current_context()
    taken = {"shape", "random_weights", "contexts", "json_file", *takes}
    given = [
        parameter
        for parameter in context.command.params
        if parameter.name and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    for parameter in given:
        name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
        if shape is not None and parameter.name not in taken:
            raise click.UsageError(f"{name} does not go with --shape")
        if shape is None and parameter.name == "contexts":
            raise click.UsageError("--context goes with --shape only")


def _load_engine(model: Path | None, options: Mapping[str, Any], progress: Progress) -> Any:
    import dflash_jax

    return dflash_jax.Engine.load(model, **_with_bsa(options), progress=progress)


def _with_bsa(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, "bsa": options["bsa"] == "on"}


def _read_prompt(prompt: str) -> str:
    if prompt == "-":
        return sys.stdin.read()
    return Path(prompt[1:]).read_text(encoding="utf-8") if prompt.startswith("@") else prompt


def _raise_if_failed(event: Finished) -> None:
    if event.reason == "error":
        raise _Failure(event.error or "the generation failed")


def _stats(stats: Stats) -> dict[str, Any]:
    figures = {**dataclasses.asdict(stats), "decode_tokens_per_second": stats.decode_tokens_per_second}
    if stats.dflash:
        figures["dflash"]["accept_length"] = stats.dflash.accept_length
    return figures


def _logprobs(entry: TokenLogprobs) -> dict[str, Any]:
    own, *others = (
        {"token_id": one.token_id, "token": one.token_bytes.decode("utf-8", "replace"), "logprob": one.logprob}
        for one in (entry.token, *entry.top)
    )
    return {**own, "top": others}


_LONG_LIST = 8
"""A table shows so many entries of a list; --json shows all."""


def _print_table(description: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in _rows(description):
        table.add_row(name, value)
    Console().print(table)


def _rows(description: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in description.items():
        if isinstance(value, Mapping):
            rows += _rows(value, f"{prefix}{name}.")
        elif "bytes" in f"{prefix}{name}" and isinstance(value, int) and value >= 1_000_000:
            rows.append((f"{prefix}{name}", f"{value:,} ({value / 1e9:.2f} GB)"))
        elif isinstance(value, list) and len(value) > _LONG_LIST:
            rows.append((f"{prefix}{name}", f"{len(value)}: {', '.join(map(str, value[:_LONG_LIST]))} ..."))
        else:
            rows.append((f"{prefix}{name}", str(value)))
    return rows
