"""`agentic-flow models list`."""

from __future__ import annotations

from agentic_flow.cli.session import Session, command, new_app

app = new_app("Show the models that can be asked.")


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
