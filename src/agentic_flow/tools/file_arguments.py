"""Arguments that the file tools share. Paths are canonical before policy sees them, so that a rule on
`secret/*` is not passed by `./secret/x`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from agentic_flow.core.errors import InvalidInput
from agentic_flow.tools.confine import PATH_CHARS_MAX, canonical_path


def _canonical(text: str) -> str:
    try:
        return canonical_path(text)
    except InvalidInput as error:
        # ValueError is what pydantic turns into a located validation error.
        raise ValueError(f"{error.message}; {error.hint}" if error.hint else error.message) from None


CanonicalPath = Annotated[str, Field(max_length=PATH_CHARS_MAX), AfterValidator(_canonical)]
FolderPath = Annotated[CanonicalPath, Field(description="Folder to start from. Default: the root.")]
PathCursor = CanonicalPath
OptionalCursor = Annotated[PathCursor | None, Field(description="The `cursor` of the page before.")]
Glob = Annotated[
    Annotated[str, Field(min_length=1, max_length=1000)] | None,
    Field(description="gitignore-style: '*.py' at any depth, 'src/**/*.py' from the root, '*.{py,md}'."),
]
ShowHidden = Annotated[bool, Field(description="Include names that start with a dot.")]
ShowIgnored = Annotated[bool, Field(description="Include what .gitignore excludes.")]
Limit = Annotated[int, Field(ge=1, le=1000, description="Most entries of one page.")]
