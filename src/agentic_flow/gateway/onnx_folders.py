"""Model folders of the provider `onnx`, as far as they can be judged without loading them."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from agentic_flow.core.errors import DataCorrupted, InvalidSettings, UnknownModel

CONFIG = "genai_config.json"
MODELS_MAX = 1000
_CONFIG_MAX_BYTES = 1024 * 1024
_TOKENIZER_CONFIG_MAX_BYTES = 32 * 1024 * 1024
_WHOLE = "download the folder again, whole"
# Templates that have the model write calls as `<tool_call>{"name": …, "arguments": …}</tool_call>`.
_TOOLS = re.compile(r"\btools\b")
_XML_CALLS = "<function="


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a folder says of its model.

    `template` is None for a model without a chat template. `tools` is whether its template offers tools and
    has calls written in the one way that can be read back. `top_k` and `top_p` are the publisher's settings.
    """

    name: str
    path: Path
    context_tokens: int
    template: str | None
    tools: bool
    top_k: int
    top_p: float


def list_names(models_dir: Path) -> list[str]:
    """Names of the folders of `models_dir` that have a `genai_config.json`, sorted.

    Raises:
        InvalidSettings: `models_dir` is no folder that can be read.
    """
    try:
        entries = sorted(models_dir.iterdir())
    except OSError as error:
        raise InvalidSettings(
            f"gateway.onnx.models_dir {str(models_dir)!r} cannot be read: {error.strerror}",
            hint="make the folder, or set gateway.onnx.models_dir to the one that holds the model folders",
        ) from error
    return [entry.name for entry in entries[:MODELS_MAX] if (entry / CONFIG).is_file()]


def read_folder(models_dir: Path, name: str) -> ModelFolder:
    """Read and check a model folder.

    Raises:
        InvalidSettings: `models_dir` is no folder.
        UnknownModel: there is no such folder in it.
        DataCorrupted: a file of the model is missing, empty or not what it should be; says which.
    """
    names = list_names(models_dir)
    folder = models_dir / name
    # Only an entry of the folder: no path that leads out of it.
    if not name or Path(name).name != name or name in (".", "..") or not folder.is_dir():
        raise UnknownModel(
            f"there is no model folder {name!r} in {str(models_dir)!r}",
            hint=f"there are: {', '.join(names) or 'none; docs/guides/onnx.md says how to get one'}",
        )
    config = _load(folder / CONFIG, _CONFIG_MAX_BYTES)
    model = _section(config, "model", folder)
    decoder = _section(model, "decoder", folder)
    context = model.get("context_length")
    if not isinstance(context, int) or isinstance(context, bool) or not 0 < context < 2**31:
        raise _wrong(folder / CONFIG, f"`model.context_length` is {context!r}, not a number of tokens")
    filename = decoder.get("filename")
    if not isinstance(filename, str) or not filename:
        raise _wrong(folder / CONFIG, f"`model.decoder.filename` is {filename!r}, not the name of a file")
    _demand_file(folder / filename)
    tokenizer = _load(folder / "tokenizer_config.json", _TOKENIZER_CONFIG_MAX_BYTES)
    template = _template(folder, tokenizer)
    search = config.get("search")
    given: Mapping[str, Any] = cast(Mapping[str, Any], search) if isinstance(search, dict) else {}
    top_k, top_p = given.get("top_k"), given.get("top_p")
    return ModelFolder(
        name=name,
        path=folder,
        context_tokens=context,
        template=template,
        tools=template is not None
        and _TOOLS.search(template) is not None
        and "<tool_call>" in template
        and _XML_CALLS not in template,
        top_k=top_k if isinstance(top_k, int) else 0,
        top_p=float(top_p) if isinstance(top_p, int | float) and 0 < top_p <= 1 else 1.0,
    )


def _template(folder: Path, tokenizer: Mapping[str, Any]) -> str | None:
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        try:
            return alone.read_text("utf-8") or None
        except (OSError, UnicodeDecodeError) as error:
            raise _wrong(alone, f"it cannot be read: {error}") from error
    found: object = tokenizer.get("chat_template")
    if isinstance(found, list):  # several by name
        by_name = {
            entry.get("name"): entry.get("template")
            for entry in cast(list[object], found)
            if isinstance(entry, dict)
            for entry in (cast(dict[str, object], entry),)
        }
        found = by_name.get("default")
    return found if isinstance(found, str) and found else None


def _load(path: Path, max_bytes: int) -> Mapping[str, Any]:
    _demand_file(path)
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise _wrong(path, f"it cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise _wrong(path, f"it has more than {max_bytes} bytes")
    try:
        value: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _wrong(path, f"it is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise _wrong(path, "it is no JSON object")
    return cast(Mapping[str, Any], value)


def _section(parent: Mapping[str, Any], name: str, folder: Path) -> Mapping[str, Any]:
    value: object = parent.get(name)
    if not isinstance(value, dict):
        raise _wrong(folder / CONFIG, f"it has no section `{name}`")
    return cast(Mapping[str, Any], value)


def _demand_file(path: Path) -> None:
    try:
        about = path.stat()
    except OSError as error:
        raise DataCorrupted(
            f"the model folder has no {path.name!r}: {str(path)!r}: {error.strerror}", hint=_WHOLE
        ) from error
    if not stat.S_ISREG(about.st_mode) or about.st_size == 0:
        raise _wrong(path, "it is empty or no file")


def _wrong(path: Path, what: str) -> DataCorrupted:
    return DataCorrupted(f"{str(path)!r} of the model folder is broken: {what}", hint=_WHOLE)
