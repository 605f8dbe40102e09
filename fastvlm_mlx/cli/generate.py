"""`fastvlm generate`: one answer about any number of pictures, to a terminal, a pipe or as JSON.

What can be wrong without a model (pictures, prompt, options) is checked before one is downloaded
or loaded. Knows nothing of how an answer is made.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Generator, Iterator
from typing import Any

import click

from fastvlm_mlx.cli import stats as stats_table
from fastvlm_mlx.cli.asking import answer_options, chosen_sampling, load_engine, model_options
from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.inputs import Pictures, read_prompt
from fastvlm_mlx.cli.interrupt import Interrupt
from fastvlm_mlx.cli.options import Command, chosen_model, image_options, option
from fastvlm_mlx.events import Finished, Generation, GenerationEvent
from fastvlm_mlx.prompt.template import DEFAULT_SYSTEM
from fastvlm_mlx.terminal.safe_text import safe

DEFAULT_PROMPT = "Describe the image."

log = logging.getLogger("fastvlm_mlx")


@click.command("generate", cls=Command, short_help="Answer a question about pictures.")
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@option("Prompt", "-p", "--prompt", metavar="TEXT", help=f'[default: "{DEFAULT_PROMPT}"]')
@option("Prompt", "--prompt-file", metavar="FILE", help="Read the prompt from a UTF-8 file.")
@option(
    "Prompt",
    "--system",
    metavar="TEXT",
    default=DEFAULT_SYSTEM,
    show_default=True,
    help='The system turn; "" leaves it out.',
)
@model_options
@image_options
@option(
    "Picture",
    "--reduced-jpeg",
    is_flag=True,
    help="Decode a large JPEG at a part of its size: quicker, slightly other pixels.",
)
@answer_options
@option("Answer", "--stop", metavar="TEXT", multiple=True, help="End before TEXT. Repeatable.")
@option(
    "Answer",
    "--num-beams",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Above 1 searches so many beams; the answer then comes all at once.",
)
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
@option("Output", "--logprobs", is_flag=True, help="With --json: each token's log-probability.")
@option(
    "Output",
    "--stats",
    is_flag=True,
    help="Time each stage: a table on stderr, or fields of --json.",
)
@click.pass_obj
def command(
    console: Console,
    images: tuple[str, ...],
    prompt: str | None,
    prompt_file: str | None,
    model: str | None,
    as_json: bool,
    logprobs: bool,
    stats: bool,
    **given: Any,
) -> int:
    """Answer a question about pictures, or just a question.

    \b
    fastvlm generate photo.jpg -p "What is this?"
    fastvlm generate before.png after.png -p "What changed?" --json
    cat photo.jpg | fastvlm generate -

    IMAGE is a file, an http(s) URL, a data: URI, or - for standard input.
    """
    if logprobs and not as_json:
        raise click.UsageError("--logprobs needs --json")
    if "" in given["stop"]:
        raise click.UsageError("--stop must not be empty")
    sampling = chosen_sampling(given)
    question = read_prompt(prompt, prompt_file, has_images=bool(images))
    if images:
        console.start("Reading the picture" if len(images) == 1 else "Reading the pictures")
    reduced = given["reduced_jpeg"]
    # Where TTFT is told, it must count from the encoded bytes: nothing is made ahead. Nor is a
    # reduced picture, whose size depends on the model.
    ahead = not (as_json or stats or reduced)
    pictures = Pictures(
        images,
        given["background"],
        asked=question is not None,
        ahead=ahead,
        reduced_to=1 if reduced else None,
    )
    import fastvlm_mlx.engine  # noqa: F401  (while the pictures are decoded)

    pictures.check()
    model = chosen_model(model, console)
    console.start(f"Loading {model}")
    form = {name: given[name] for name in ("resolution", "image_mode")}
    engine = load_engine(
        model,
        given,
        say=lambda line: console.line(f"fastvlm: {line}"),
        progress=console.report,
        on_config=(lambda config: pictures.fit(config, *form.values())) if ahead else None,
    )
    console.start("Answering")
    with Interrupt() as interrupt:
        events = engine.stream(
            question or DEFAULT_PROMPT,
            images=pictures.pixels() if ahead else pictures.encoded,
            sampling=sampling,
            logprobs=logprobs,
            profile=stats,
            cancelled=lambda: interrupt.wanted,
            **{name: given[name] for name in ("max_tokens", "stop", "num_beams", "system")},
            background=given["background"],
            reduced_jpeg=reduced,
            **form,
        )
        answer = _collect(_shown(events, console, interrupt, silent=as_json))
    console.close()
    if as_json:
        click.echo(_json(answer, model, with_logprobs=logprobs))
    elif stats:
        for line in stats_table.table(answer.stats):
            console.line(line)
    if not as_json and answer.finish_reason == "length":
        console.line(f"fastvlm: {_why_cut(answer, given['max_tokens'])}")
    return 130 if answer.finish_reason == "cancelled" else 0


def _shown(
    events: Iterator[GenerationEvent], console: Console, interrupt: Interrupt, *, silent: bool
) -> Generator[GenerationEvent, None, None]:
    """Pass events on, printing their text as it comes, and a line's end after it.

    A model can write bytes that a terminal would obey; a pipe gets them as they are.
    """
    text = ""
    to_terminal = sys.stdout.isatty()
    for event in events:
        if not interrupt.answering:
            interrupt.answering = True
            log.info("first token")
        if isinstance(event, Finished):
            if not silent:
                click.echo("" if text.endswith("\n") else "\n", nl=False)
        elif not silent and event.text:
            console.close()
            text = safe(event.text) if to_terminal else event.text
            click.echo(text, nl=False)
        yield event


def _collect(events: Generator[GenerationEvent, None, None]) -> Generation:
    from fastvlm_mlx.generate.session import collect

    return collect(events)


def _json(answer: Generation, model: str, *, with_logprobs: bool) -> str:
    values: dict[str, Any] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "model": model,
        "stats": dataclasses.asdict(answer.stats),
    }
    if with_logprobs:
        values["logprobs"] = answer.logprobs
    return json.dumps(values)


def _why_cut(answer: Generation, max_tokens: int) -> str:
    if answer.stats.generated_tokens >= max_tokens:
        return f"the answer was cut at --max-tokens {max_tokens}"
    return "the answer was cut: the model's context is full"
