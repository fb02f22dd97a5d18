"""`agentic-flow models list|compare|route`."""

from __future__ import annotations

from typing import Annotated

import typer

from agentic_flow.cli import usage
from agentic_flow.cli.session import Session, UrlOption, command, new_app

app = new_app("Show the models that can be asked, and what they cost.")


@command(app, "list", examples=("agentic-flow models list", "agentic-flow models list --json"))
def list_models(session: Session) -> None:
    """List the models of all configured providers, the default one first.

    Prices are US dollars per million tokens; `-` means that no price is known, not that it is free.
    """
    from agentic_flow.cli.output import print_table

    with session.client() as client:
        models = client.models()
    session.show(
        models,
        lambda: print_table(
            ("model", "provider", "kind", "context tokens", "input $/Mtok", "output $/Mtok"),
            [
                (
                    m.id,
                    m.provider,
                    "generative" if m.generative else "selects and cites",
                    m.context_tokens,
                    m.input_usd_per_mtok,
                    m.output_usd_per_mtok,
                )
                for m in models
            ],
        ),
    )


@command(
    app,
    "compare",
    examples=(
        "agentic-flow models compare",
        "agentic-flow models compare --tokens-in 20000 --tokens-out 1000 --cached 15000",
        "agentic-flow models compare --model sonnet --model openrouter:deepseek/deepseek-chat --json",
    ),
)
def compare_models(
    session: Session,
    tokens_in: Annotated[
        int, typer.Option("--tokens-in", help="Input tokens of a task, cached included.", metavar="N")
    ] = 10_000,
    tokens_out: Annotated[
        int, typer.Option("--tokens-out", help="Output tokens of a task, reasoning included.", metavar="N")
    ] = 3_333,
    cached: Annotated[
        int, typer.Option("--cached", help="Input tokens that come from the cache.", metavar="N")
    ] = 0,
    tasks: Annotated[
        int, typer.Option("--tasks", help="Number of tasks, one call each.", metavar="N")
    ] = 1_000,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="Compare these models only; repeatable.", metavar="PROVIDER:NAME"),
    ] = None,
) -> None:
    """Compare what the same tasks cost on different models, at dated list prices.

    `no price` means that none is known, not that it is free. Own prices are in gateway.prices_usd_per_mtok.
    No provider is asked.
    """
    from agentic_flow.cli.output import print_table
    from agentic_flow.gateway.comparison import Mix, compare
    from agentic_flow.gateway.prices import PriceList

    gateway = session.settings.gateway
    compared = compare(
        Mix(input_tokens=tokens_in, output_tokens=tokens_out, cached_tokens=cached, tasks=tasks),
        PriceList(gateway.prices_usd_per_mtok),
        models=model or (),
        base_urls={"openai": gateway.openai.base_url},
    )

    def human() -> None:
        print(f"mix: {tokens_in} tokens in ({cached} cached), {tokens_out} out per task; a task is one call")
        print(f"prices: {compared.snapshot}, newest change in force {compared.snapshot_date}; own prices win")
        print_table(
            ("model", f"$ per {tasks} tasks", "published $", "prices", "notes"),
            [
                (
                    line.model,
                    _dollars(line.cost_usd),
                    None if line.published_usd is None else f"${line.published_usd:.2f}",
                    line.price_source,
                    "; ".join(line.notes),
                )
                for line in compared.models
            ],
        )
        print(compared.published_note)

    session.show(compared, human)


@command(
    app,
    "route",
    examples=(
        'agentic-flow models route "Summarise this contract"',
        'agentic-flow models route "Summarise this contract" --route auto:privacy',
        'agentic-flow models route "Why is the sky blue?" --route cheap --tokens-out 200 --json',
        'agentic-flow models route "Summarise this contract" --url http://127.0.0.1:3000',
    ),
)
def route(
    session: Session,
    prompt: Annotated[str, typer.Argument(help="What would be asked.", metavar="PROMPT")],
    route: Annotated[
        str, typer.Option("--route", help="A route, an alias or a model.", metavar="NAME")
    ] = "auto",
    tokens_out: Annotated[
        int,
        typer.Option("--tokens-out", help="Expected output tokens.", metavar="N", min=0, max=100_000_000),
    ] = 1000,
    tokens_in: Annotated[
        int | None,
        typer.Option(
            "--tokens-in",
            help="Expected input tokens. [default: the prompt's, by its length]",
            metavar="N",
            min=0,
            max=100_000_000,
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            "--tenant", help="Whose call it is. [default: the owner's, or the key's]", metavar="NAME"
        ),
    ] = None,
    url: UrlOption = None,
) -> None:
    """Explain which model a prompt would go to, and why not to the others.

    Uses this machine's settings, the policies in force and the outcomes logged, or asks a running platform.
    No provider is asked, so a running gateway, which has seen how soon each answers, can order the strategy
    `latency` differently. Of the strategy `learned` it shows the quality predicted for this prompt, and how
    often each model comes first.
    """
    from agentic_flow.cli.output import print_table, talk
    from agentic_flow.core.errors import from_problem
    from agentic_flow.gateway.routing.choice import ChoiceRequest
    from agentic_flow.runtime.operations import explained_choice

    wanted = ChoiceRequest(
        prompt=prompt, model=route, tokens_in=tokens_in, tokens_out=tokens_out, tenant=tenant
    )
    explained = explained_choice(session.start(), wanted, url)
    learned = any(target.predicted is not None for target in explained.targets)
    drawn = any(target.propensity is not None for target in explained.targets)
    rows = [
        (
            target.position,
            f"{target.provider}:{target.model}" if target.provider else target.model,
            _dollars(target.cost_usd),
            target.quality,
            *([_two_digits(target.predicted)] if learned else []),
            *([_percent(target.propensity)] if drawn else []),
            "local" if target.local else "remote" if target.provider else None,
            target.reason,
        )
        for target in explained.targets
    ]

    def human() -> None:
        size = f"{explained.tokens_in} tokens in, {explained.tokens_out} out"
        talk(f"{explained.reason} ({size}; policies version {explained.policies_version})")
        columns = [*(["predicted"] if learned else []), *(["first in"] if drawn else [])]
        print_table(("", "model", "cost", "quality", *columns, "where", "why"), rows)

    if explained.refused is not None:
        if not session.as_json:
            human()
        raise from_problem(explained.refused)
    session.show(explained, human)


def _dollars(cost_usd: float | None) -> str:
    """As many digits as tell a small cost from none."""
    from agentic_flow.cli.output import money

    if cost_usd is None:
        return "no price"
    return money(cost_usd) if cost_usd == 0 or cost_usd >= 0.001 else f"${cost_usd:.3g}"


def _two_digits(share: float | None) -> str | None:
    return None if share is None else f"{share:.2f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.3g} %"


usage.register(app)
