"""YAML as people like to read it, and always the same bytes for the same data."""

from __future__ import annotations

from typing import Any

import yaml

_WIDTH = 110


class _Dumper(yaml.SafeDumper):
    """Without anchors, with lists set in below their key."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def to_yaml(data: Any, head: str) -> str:
    """A document, keys in the order in which they are given, below the comment lines `head`."""
    body = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, width=_WIDTH, allow_unicode=True, default_flow_style=False
    )
    return f"{head}\n{body}"
