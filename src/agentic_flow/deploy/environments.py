"""Templates of an operator's environment, one per way to choose models, with a comment per variable.

What a variable means is read from the settings themselves, so a template cannot say what the program does
not do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentic_flow.core.errors import Conflict, InvalidInput, InvalidSettings, PathNotFound
from agentic_flow.core.secrets import write_private
from agentic_flow.core.settings import ALIASES, Settings, env_name, load, setting_names, shown

NOTICE = (
    "# written by agentic-flow deploy render --target env; fill it in by agentic-flow config init --template"
)
_WIDTH = 100
_TEAM = ("SWARM_TOPOLOGY", "MAX_AGENTS", "BATCH_SIZE", "ENABLE_PARALLEL_EXECUTION")
_BENCH = ("BENCHMARK_MODE", "ITERATIONS")
_BY_SETTING = ("AGENTIC_FLOW_DATA_DIR", "AGENTIC_FLOW_TELEMETRY__LOG_LEVEL")
_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,~-]*")

ABOUT_PROVIDER = (
    "Provider whose first model is the default: anthropic, openrouter, openai, onnx, extractive; "
    "auto or multi: the first that has a key."
)


@dataclass(frozen=True, slots=True)
class Template:
    """One way to choose models.

    Args:
        about: What it is for, one line.
        values: Variable → value in place of the setting's default.
        required: Variables that must not stay empty.
        optional: Further variables that it shows, commented out.
    """

    name: str
    about: str
    values: Mapping[str, str]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


TEMPLATES = {
    one.name: one
    for one in (
        Template(
            "claude",
            "Claude by Anthropic.",
            {"MODEL_PROVIDER": "anthropic"},
            required=("ANTHROPIC_API_KEY",),
            optional=("ANTHROPIC_BASE_URL",),
        ),
        Template(
            "openrouter",
            "Llama, DeepSeek, Gemini and whatever else OpenRouter lists.",
            {
                "MODEL_PROVIDER": "openrouter",
                "AGENTIC_FLOW_GATEWAY__MODEL": "openrouter:meta-llama/llama-3.1-8b-instruct",
            },
            required=("OPENROUTER_API_KEY",),
            optional=("OPENROUTER_BASE_URL",),
        ),
        Template(
            "multi-model",
            "Several providers; a run or a policy says which model it wants.",
            {"MODEL_PROVIDER": "multi"},
            required=("ANTHROPIC_API_KEY", "OPENROUTER_API_KEY"),
            optional=("OPENAI_API_KEY", "OPENAI_BASE_URL"),
        ),
        Template(
            "local",
            "Without a key: the built-in model that selects and cites, or models on this machine.",
            {"MODEL_PROVIDER": "extractive"},
            optional=("AGENTIC_FLOW_GATEWAY__ONNX__MODELS_DIR", "OPENAI_BASE_URL"),
        ),
    )
}


def render() -> dict[str, str]:
    """Every template: path → text."""
    return {f"{name}.env": environment_text(one) for name, one in TEMPLATES.items()}


def template_named(name: str) -> Template:
    """A template; InvalidInput when there is none of this name."""
    found = TEMPLATES.get(name)
    if found is None:
        raise InvalidInput(f"{name!r} is not a template", hint=f"use one of {', '.join(TEMPLATES)}")
    return found


def variables_of(template: Template) -> tuple[str, ...]:
    """What a template shows, in its order."""
    first = (*template.required, *template.values, *template.optional, *_TEAM, *_BENCH, *_BY_SETTING)
    return tuple(dict.fromkeys(first))


def filled(template: Template, given: Mapping[str, str]) -> dict[str, str]:
    """The variables of a template that have a value: its own, and those given.

    Raises:
        InvalidInput: one is given that is no setting.
        InvalidSettings: a required one is empty.
    """
    known = {*ALIASES, "MODEL_PROVIDER", *(env_name(name) for name, _ in setting_names())}
    for name in given:
        if name not in known:
            raise InvalidInput(f"{name!r} is not a variable of ours", hint="see docs/reference/settings.md")
    values = {**template.values, **given}
    for name in template.required:
        if not values.get(name):
            raise InvalidSettings(
                f"{name} is empty, and the template {template.name!r} needs it",
                hint=f"give it by --set {name}=…, or have it in the environment",
            )
    return {name: value for name, value in values.items() if value}


def environment_text(template: Template, given: Mapping[str, str] | None = None) -> str:
    """A template as a `.env` file; what has no value is commented out.

    Args:
        given: Values by variable. None: nothing is filled in, and required ones stand empty.
    """
    values = {**template.values, **(given or {})}
    lines = [
        NOTICE,
        f"# {template.about}",
        "# Names of the setting's own (AGENTIC_FLOW_…) win over familiar ones.",
    ]
    shown_ = list(dict.fromkeys([*variables_of(template), *values]))
    for name in shown_:
        value = values.get(name, "")
        active = bool(value) or (given is None and name in template.required)
        lines += [
            "",
            *_comment(_about(name)),
            f"{'' if active else '#'}{name}={_quoted(value or _default(name))}",
        ]
    return "\n".join(lines) + "\n"


def _setting(variable: str) -> str | None:
    by_variable = {env_name(name): name for name, _ in setting_names()}
    return ALIASES.get(variable) or by_variable.get(variable)


def _about(variable: str) -> str:
    if variable == "MODEL_PROVIDER":
        return ABOUT_PROVIDER
    setting = _setting(variable)
    assert setting is not None, f"{variable} is no setting"
    info = next(info for name, info in setting_names() if name == setting)
    return f"{info.description} (setting {setting})"


def _default(variable: str) -> str:
    setting = _setting(variable)
    if setting is None or setting == "data_dir":
        return ""
    value: object = Settings()
    for part in setting.split("."):
        value = getattr(value, part)
    value = shown(value)
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _comment(text: str) -> Sequence[str]:
    import textwrap

    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH - 2, break_on_hyphens=False)]


def _quoted(value: str) -> str:
    """A value as python-dotenv and Compose both read it: in single quotes nothing is expanded."""
    if _PLAIN.fullmatch(value):
        return value
    if "'" in value or "\n" in value:
        raise InvalidInput(
            f"the value {value!r} cannot stand in a .env file", hint="leave out quotes and lines"
        )
    return f"'{value}'"


def write_environment(path: Path, template: Template, given: Mapping[str, str]) -> None:
    """Fill a template in, check it as the program will read it, and write it, for its owner alone.

    Args:
        path: The new file.
        template: What to write.
        given: Values by variable; empty ones count as absent.

    Raises:
        Conflict: the file exists.
        InvalidInput: a variable is none of ours, or cannot stand in the file.
        InvalidSettings: a required one is empty, or the program would refuse a value.
        PathNotFound: the file cannot be written.
    """
    if path.exists():
        raise Conflict(f"{str(path)!r} exists", hint="edit it, or move it away first")
    values = filled(template, given)
    nowhere = path.parent / "nowhere"  # only these values are checked, not what lies about
    load(environ=values, directory=nowhere, user_config=nowhere)
    try:
        write_private(path, environment_text(template, values).encode())
    except OSError as error:
        raise PathNotFound(
            f"{str(path)!r} cannot be written: {error.strerror}", hint="choose a folder that you may write to"
        ) from error
