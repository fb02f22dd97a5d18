"""`agentic-flow workflow validate|run|show`: workflow files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentic_flow.cli.queueing import After, AfterAnyEnd, Detach, Inputs, Priority, Queue, words_of
from agentic_flow.cli.session import Session, command, new_app

if TYPE_CHECKING:
    from agentic_flow.swarm.workflow_spec import Step, WorkflowSpec

app = new_app("Check, run and draw workflow files.")

File = Annotated[Path, typer.Argument(help="Workflow file: .yaml, .yml or .toml.", metavar="FILE")]


@command(
    app,
    "validate",
    examples=("agentic-flow workflow validate flow.yaml", "agentic-flow workflow validate flow.toml --json"),
)
def validate(session: Session, file: File) -> None:
    """Check a workflow file, and list everything that is wrong with it.

    Nothing runs. Names of agents, tools and models are checked against what is here. Exits with 2 when
    something is wrong.
    """
    with session.client() as client:
        found = client.workflows.validate(file)

    def human() -> None:
        for problem in found.problems:
            line = f":{problem.line}" if problem.line is not None else ""
            where = problem.path or "workflow"
            sys.stdout.write(f"{file}{line}: {where}: {problem.message}; {problem.hint}\n")
        if found.valid:
            sys.stdout.write(f"{file}: workflow {found.name} is valid, {found.steps} steps\n")

    session.show(found, human)
    if not found.valid:
        raise typer.Exit(2)


@command(
    app,
    "run",
    examples=(
        "agentic-flow workflow run flow.yaml --input folder=src",
        'agentic-flow workflow run flow.yaml --input \'names=["a", "b"]\' --idempotency-key nightly-7 --json',
        "agentic-flow workflow run flow.yaml --queue nightly --detach",
    ),
)
def run(
    session: Session,
    file: File,
    input: Inputs = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            "--idempotency-key", help="The same key, file and inputs give the same run.", metavar="KEY"
        ),
    ] = None,
    queue: Queue = None,
    priority: Priority = 0,
    after: After = None,
    after_any_end: AfterAnyEnd = False,
    detach: Detach = False,
) -> None:
    """Run a workflow file and print its outputs.

    It is followed, cancelled and resumed as a run is: `agentic-flow runs show|resume|cancel ID`. Steps that
    have ended are not repeated.
    """
    from agentic_flow.cli.follow import follow, leave
    from agentic_flow.client import AsyncClient
    from agentic_flow.swarm.workflow_bound import parsed_inputs, source_of, workflow_of

    inputs = parsed_inputs(workflow_of(source_of(file)), words_of(input))

    async def submit(client: AsyncClient) -> str:
        return await client.workflows.submit(
            file,
            inputs,
            idempotency_key=idempotency_key,
            queue=queue,
            priority=priority,
            after=after or (),
            after_any_end=after_any_end,
            detached=detach,
        )

    if detach:
        leave(session, submit)
    else:
        follow(session, submit)


@command(
    app,
    "show",
    examples=("agentic-flow workflow show flow.yaml", "agentic-flow workflow show flow.yaml --json"),
)
def show(session: Session, file: File) -> None:
    """Draw the steps of a workflow file as text: what runs after what, and in which rounds."""
    from agentic_flow.swarm.workflow_bound import source_of, workflow_of

    spec = workflow_of(source_of(file))
    session.show(spec.model_dump(mode="json", exclude_unset=True), lambda: _draw(spec))


def _draw(spec: WorkflowSpec) -> None:
    from agentic_flow.swarm.workflow_check import topological

    needs = {step.id: step.needs for step in spec.steps}
    depth: dict[str, int] = {}
    for name in topological(needs):
        depth[name] = 1 + max((depth[need] for need in needs[name]), default=0)
    fallbacks = spec.fallbacks
    out = sys.stdout.write
    out(f"{spec.name} {spec.version}{': ' + spec.description if spec.description else ''}\n")
    for name, declared in spec.inputs.items():
        given = "required" if declared.required else f"default {declared.default!r}"
        out(f"  input {name} ({declared.type}, {given})\n")
    for level in sorted(set(depth.values())):
        for step in spec.steps:
            if depth[step.id] == level and step.id not in fallbacks:
                out(f"{'  ' * level}{_line(step)}\n")
                if step.fallback is not None:
                    out(f"{'  ' * level}  if it fails: {_line(spec.step(step.fallback))}\n")
    for name in spec.outputs:
        out(f"  output {name}\n")


def _line(step: Step) -> str:
    what = step.kind
    if step.tool is not None:
        what = step.tool.name
    elif step.agent is not None:
        what = f"agent {step.agent.definition or step.agent.role}"
    elif step.team is not None:
        what = f"team {step.team.topology}"
    elif step.approval is not None:
        what = f"approval ({' | '.join(step.approval.options) or 'any text'})"
    elif step.wait_for is not None:
        what = f"waits for signal {step.wait_for.signal}"
    parts = [f"{step.id}: {what}"]
    if step.needs:
        parts.append(
            f"after {', '.join(step.needs)}" + ("" if step.start_when == "all" else f" ({step.start_when})")
        )
    if step.fan_out is not None:
        parts.append(f"for each of {step.fan_out.over}, {step.fan_out.parallel_max} at once")
    if step.when is not None:
        parts.append(f"when {step.when}")
    if step.retry.attempts > 1:
        parts.append(f"up to {step.retry.attempts} attempts")
    if step.on_failure == "continue":
        parts.append("may fail")
    return "; ".join(parts)
