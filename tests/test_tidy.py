"""House rules that a reader would otherwise have to police: sizes, names, docstrings, leftovers."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "agentic_flow"
MODULE_LINES_MAX = 900
REASON_FOR_LENGTH = "# long because "

_SKIPPED_FOLDERS = {".git", ".venv", ".venv-bench", "dist", "build", "node_modules", "__pycache__"}
_VAGUE_MODULES = {"utils", "util", "helpers", "helper", "manager", "managers", "base", "common", "misc"}
_VAGUE_CLASS = re.compile(r"(Manager|Helper|Helpers|Utils|Util|Base)$")
# Written in two pieces so that this file passes its own test.
_LEFTOVER = re.compile(r"\b(" + "TO" + "DO|FIX" + "ME|XX" + r"X)\b")
_HOME = re.compile(r"/(?:home|Users)/[a-zA-Z]|/ro" + r"ot/")
_HOSTS = ("pypi." + "org", "pythonhosted." + "org", "registry.npmjs." + "org")


def tracked_files() -> list[Path]:
    """Text files of the repository: tracked ones, and new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:  # a source archive without git
        paths = [p for p in ROOT.rglob("*") if not _SKIPPED_FOLDERS & set(p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


def modules(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    """Parsed Python files of these folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text("utf-8"), str(path))


def name(path: Path, node: ast.AST | None = None) -> str:
    """`path:line`, relative to the repository."""
    line = getattr(node, "lineno", None)
    return f"{path.relative_to(ROOT)}{f':{line}' if line else ''}"


def test_modules_are_short_or_say_why() -> None:
    """Catches a module that grew past what a reader can hold, unless it gives a reason."""
    offenders = []
    for path, _ in modules("src", "tests", "benchmarks", "scripts"):
        text = path.read_text("utf-8")
        if len(text.splitlines()) > MODULE_LINES_MAX and REASON_FOR_LENGTH not in text:
            offenders.append(name(path))
    assert not offenders, (
        f"over {MODULE_LINES_MAX} lines without a {REASON_FOR_LENGTH!r} comment: {offenders}"
    )


def test_names_say_what_things_are() -> None:
    """Catches modules and classes named for nothing in particular."""
    offenders = []
    for path, tree in modules("src"):
        if path.stem in _VAGUE_MODULES or path.parent.name in _VAGUE_MODULES:
            offenders.append(name(path))
        offenders += [
            f"{name(path, node)} {node.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and _VAGUE_CLASS.search(node.name)
        ]
    assert not offenders


def test_nothing_is_left_for_later() -> None:
    """Catches notes about work not done, which belong in an issue or nowhere."""
    offenders = [
        f"{name(path)}:{number}"
        for path in tracked_files()
        if path.suffix not in {".txt", ".lock"}
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1)
        if _LEFTOVER.search(line)
    ]
    assert not offenders


def test_errors_are_not_swallowed() -> None:
    """Catches `except Exception: pass` and its kin: a failure that nobody will ever hear of."""
    offenders = []
    for path, tree in modules("src", "tests", "benchmarks", "scripts"):
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
            )
            silent = all(
                isinstance(statement, ast.Pass | ast.Continue)
                or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
                for statement in node.body
            )
            if broad and silent:
                offenders.append(name(path, node))
    assert not offenders


def test_public_code_is_documented() -> None:
    """Catches a public module, class or function that does not say what it is for.

    Exempt, because a docstring could only repeat the name: classes that only list fields or an error's code,
    functions of at most three statements, and methods that a Protocol of ours already documents.
    """
    protocols = {method for _, tree in modules("src") for method in _protocol_methods(tree)}
    offenders = []
    for path, tree in modules("src"):
        empty = not tree.body
        if not empty and ast.get_docstring(tree) is None:
            offenders.append(name(path))
        for node, owner in _public(tree):
            if ast.get_docstring(node) is not None:
                continue
            if isinstance(node, ast.ClassDef):
                trivial = all(isinstance(s, ast.Assign | ast.AnnAssign | ast.Pass) for s in node.body)
            else:
                trivial = _statements(node) <= 3 or (owner is not None and node.name in protocols)
            if not trivial:
                offenders.append(f"{name(path, node)} {node.name}")
    assert not offenders, "\n".join(offenders)


def _public(
    tree: ast.Module,
) -> Iterator[tuple[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, ast.ClassDef | None]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node, None
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node, None
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and member.name[0] != "_":
                    yield member, node


def _protocol_methods(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(
            isinstance(parent, ast.Name) and parent.id == "Protocol" for parent in node.bases
        ):
            yield from (m.name for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef))


def _statements(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return sum(isinstance(child, ast.stmt) for child in ast.walk(node)) - 1


def test_every_test_says_what_it_catches() -> None:
    """Catches a test whose purpose a later reader would have to guess."""
    offenders = []
    for path, tree in modules("tests"):
        lines = path.read_text("utf-8").splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith(
                "test"
            ):
                continue
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            above = lines[first - 2].strip() if first >= 2 else ""
            inside = [line.strip() for line in lines[node.lineno : node.body[0].lineno - 1]]
            commented = above.startswith("#") or any(line.startswith("#") for line in inside)
            if ast.get_docstring(node) is None and not commented:
                offenders.append(f"{name(path, node)} {node.name}")
    assert not offenders, "\n".join(offenders)


def test_nothing_names_a_machine_or_a_registry() -> None:
    """Catches home folders and package registries' hosts: a clone must work on anybody's machine."""
    offenders = []
    for path in tracked_files():
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1):
            if _HOME.search(line) or any(host in line for host in _HOSTS):
                offenders.append(f"{name(path)}:{number}: {line.strip()[:100]}")
    assert not offenders, "\n".join(offenders)


def test_locks_hold_hashes_and_no_addresses() -> None:
    """Catches a lock that ties the project to one index, or a pin that pip could not check."""
    assert not (ROOT / "uv.lock").exists(), "uv.lock records addresses; requirements/*.txt are the locks"
    for lock in sorted((ROOT / "requirements").glob("*.txt")):
        text = lock.read_text("utf-8")
        assert "://" not in text, lock.name
        assert "index-url" not in text, lock.name
        pins = re.split(r"\n(?=[a-zA-Z])", text)
        assert all("--hash=sha256:" in pin for pin in pins if "==" in pin), lock.name


def test_locks_cover_what_the_package_needs() -> None:
    """Catches a dependency that pyproject.toml asks for and the lock does not pin."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = dict(
        re.findall(
            r"^([A-Za-z0-9._-]+)==([^ \\;]+)", (ROOT / "requirements/runtime.txt").read_text("utf-8"), re.M
        )
    )
    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert requirement.name in pins, f"{requirement.name} is not locked"
        assert pins[requirement.name] in requirement.specifier, f"the lock breaks {text!r}"
