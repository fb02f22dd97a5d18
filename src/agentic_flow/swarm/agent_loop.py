"""The agent loop: ask the model, run the tools it calls, feed the results back, until it answers.

`AgentLoop` is our port; `PydanticAgentLoop` fills it with pydantic-ai. The loop holds no durability of its
own: both of its effects, a model call and a tool call, go through `AgentCalls`, whose implementation makes
each a recorded step. On replay the library walks the same path over the recorded answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from agentic_flow.core.errors import AgenticFlowError, LimitExceeded
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    JsonObject,
    Message,
    Part,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
)

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage
    from pydantic_ai.models import ModelRequestParameters
    from pydantic_ai.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class AgentTask:
    """What one agent is asked, with what, and how far it may go.

    Args:
        system: System prompt.
        prompt: The user's message.
        model: Model name as the gateway knows it.
        tools: Tools it may call.
        steps_max: Model calls before it must have answered.
        tool_calls_max: Tool calls.
        output_tokens_max: Output tokens of one model call.
        stream: Ask for the provider's streaming wire format.
    """

    system: str
    prompt: str
    model: str
    tools: tuple[ToolSpec, ...] = ()
    steps_max: int = 12
    tool_calls_max: int = 40
    output_tokens_max: int = 4096
    stream: bool = False


class AgentCalls(Protocol):
    """The two effects of an agent."""

    async def complete(self, request: CompletionRequest) -> Completion: ...

    async def call_tool(self, call: ToolCallPart) -> ToolResultPart: ...


class AgentLoop(Protocol):
    """Runs one agent to its answer."""

    async def run(self, task: AgentTask, calls: AgentCalls) -> str:
        """The agent's final text.

        Raises:
            LimitExceeded: it did not answer within its limits.
            ProviderError: the model failed after the gateway's retries.
        """
        ...


class PydanticAgentLoop:
    """`AgentLoop` by pydantic-ai: an agent with our Completer as its model and our ToolBox as its toolset."""

    async def run(self, task: AgentTask, calls: AgentCalls) -> str:
        from pydantic_ai import Agent
        from pydantic_ai.exceptions import AgentRunError, UnexpectedModelBehavior, UsageLimitExceeded
        from pydantic_ai.usage import UsageLimits

        model, toolset = _bridge(task, calls)
        agent = Agent(model, output_type=str, instructions=task.system, toolsets=[toolset], retries=2)
        limits = UsageLimits(request_limit=task.steps_max, tool_calls_limit=task.tool_calls_max)
        try:
            result = await agent.run(task.prompt, usage_limits=limits)
        except UsageLimitExceeded as error:
            raise LimitExceeded(
                f"no answer within {task.steps_max} model calls and {task.tool_calls_max} tool calls",
                hint="raise swarm.steps_max or swarm.tool_calls_max, or ask a narrower question",
            ) from error
        except (UnexpectedModelBehavior, AgentRunError) as error:
            # Our own errors cross the library inside its own; the caller wants the original.
            cause = error.__cause__
            if isinstance(cause, AgenticFlowError):
                raise cause from None
            raise LimitExceeded(
                f"model {task.model!r} gave no usable answer: {error}",
                hint="try another model, or look at the steps with `agentic-flow runs show`",
            ) from error
        return result.output


def _bridge(task: AgentTask, calls: AgentCalls) -> tuple[Any, Any]:
    """The library's model and toolset over our two effects. A function, because the import is heavy."""
    from pydantic_ai import RunContext
    from pydantic_ai import messages as m
    from pydantic_ai.models import Model
    from pydantic_ai.tools import ToolDefinition
    from pydantic_ai.toolsets import AbstractToolset
    from pydantic_ai.toolsets.abstract import ToolsetTool
    from pydantic_ai.usage import RequestUsage
    from pydantic_core import SchemaValidator, core_schema

    # The ToolBox validates arguments against the schema and answers a model-readable error; a second
    # validation here could only disagree.
    any_object = SchemaValidator(core_schema.dict_schema(core_schema.str_schema(), core_schema.any_schema()))

    failed: set[str] = set()  # ids of tool calls whose result is an error; the library keeps only its text

    class CompleterModel(Model[Any]):
        _announces_lookalike_notes = False  # our prompts mark data as data themselves

        @property
        def model_name(self) -> str:
            return task.model

        @property
        def system(self) -> str:
            return "agentic-flow"

        async def request(
            self,
            messages: list[ModelMessage],
            model_settings: ModelSettings | None,
            model_request_parameters: ModelRequestParameters,
        ) -> m.ModelResponse:
            completion = await calls.complete(
                CompletionRequest(
                    model=task.model,
                    messages=(_system(task.system), *_from_library(messages, failed)),
                    tools=task.tools,
                    output_tokens_max=task.output_tokens_max,
                    stream=task.stream,
                )
            )
            usage = completion.usage
            return m.ModelResponse(
                parts=[_to_library(part) for part in completion.parts],
                usage=RequestUsage(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens),
                model_name=completion.model,
            )

    class ToolBoxToolset(AbstractToolset[None]):
        @property
        def id(self) -> str | None:
            return "toolbox"

        async def get_tools(self, ctx: RunContext[None]) -> dict[str, ToolsetTool[None]]:
            return {
                spec.name: ToolsetTool(
                    toolset=self,
                    tool_def=ToolDefinition(
                        name=spec.name,
                        description=spec.description,
                        parameters_json_schema=spec.input_schema,
                        sequential=True,  # recorded steps need one order, the same on every replay
                    ),
                    max_retries=task.tool_calls_max,
                    args_validator=any_object,
                )
                for spec in task.tools
            }

        async def call_tool(
            self, name: str, tool_args: JsonObject, ctx: RunContext[None], tool: ToolsetTool[None]
        ) -> str:
            call = ToolCallPart(id=ctx.tool_call_id or name, name=name, arguments=tool_args)
            result = await calls.call_tool(call)
            if result.is_error:
                failed.add(call.id)
            return result.content

    def _to_library(part: Part) -> Any:
        match part:
            case TextPart():
                return m.TextPart(part.text)
            case ThinkingPart():
                return m.ThinkingPart(part.text, signature=part.signature)
            case ToolCallPart():
                return m.ToolCallPart(part.name, part.arguments, tool_call_id=part.id)
            case _:
                raise LimitExceeded(
                    f"a model answered with a part of kind {part.kind!r}, which agents cannot use"
                )

    return CompleterModel(), ToolBoxToolset()


def _system(text: str) -> Message:
    return Message(role="system", parts=(TextPart(text=text),))


def _from_library(messages: list[ModelMessage], failed: set[str]) -> list[Message]:
    """The conversation in our vocabulary, roles alternating; the library's notes become user text."""
    from pydantic_ai import messages as m

    turns: list[Message] = []
    for message in messages:
        parts: list[Part] = []
        if isinstance(message, m.ModelResponse):
            for part in message.parts:
                match part:
                    case m.TextPart():
                        parts.append(TextPart(text=part.content))
                    case m.ThinkingPart():
                        parts.append(ThinkingPart(text=part.content, signature=part.signature))
                    case m.ToolCallPart():
                        parts.append(
                            ToolCallPart(
                                id=part.tool_call_id, name=part.tool_name, arguments=part.args_as_dict()
                            )
                        )
                    case _:
                        continue
            role = "assistant"
        else:
            for part in message.parts:
                match part:
                    case m.ToolReturnPart():
                        parts.append(
                            ToolResultPart(
                                id=part.tool_call_id,
                                name=part.tool_name,
                                content=part.model_response_str(),
                                is_error=part.tool_call_id in failed or part.outcome != "success",
                            )
                        )
                    case m.UserPromptPart():
                        parts.append(TextPart(text=str(part.content)))
                    case m.RetryFeedbackPart():
                        parts.append(TextPart(text=f"Your last answer could not be used: {part.content}"))
                    case _:
                        continue
            role = "user"
        if parts and turns and turns[-1].role == role:
            turns[-1] = Message(role=role, parts=(*turns[-1].parts, *parts))
        elif parts:
            turns.append(Message(role=role, parts=tuple(parts)))
    return turns
