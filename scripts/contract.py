"""Is TaiChi ready for another version of vLLM? Its Python sources are asked; nothing is installed.

usage: python scripts/contract.py VERSION [--wheel FILE] [PYTEST_ARGUMENT...]

Fetches the wheel of this version from the index (about 340 MB) and unpacks its Python sources into
build/vllm-VERSION; what is there is not fetched again. Then it says which of the names that TaiChi imports
have moved or changed against the installed vLLM, with both signatures, and runs the contract tests with these
sources in the place of the installed ones. Needs the development environment (`make setup`). Other arguments
go to pytest: `tests/frontend` runs those tests, too.

Only Python is there: nothing compiled, and the dependencies are those of the installed version, but for the
few in BESIDE. Tests that start an engine cannot run.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
TESTS = ("tests/contract", "tests/cluster/vllm/worker/test_seeds.py")
ITSELF = "tests/contract/test_next.py"  # runs this script
# What later versions import at once and 0.32 does not ask for: small, and put beside the sources.
BESIDE = ("orjson",)

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
Found: TypeAlias = tuple[
    str, ast.stmt | None
]  # the module that defines a name, and how; None: it is a module


# ------------------------------------------------------------------------------------------------ the sources


def tree(version: str, wheel: Path | None) -> Path:
    """The folder with the Python sources of this version."""
    folder = BUILD / f"vllm-{version}"
    if (folder / "vllm").is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=_made(BUILD)) as scratch:
        if wheel is None:
            pip("download", "--dest", scratch, "--only-binary", ":all:", f"vllm=={version}")
            (wheel,) = Path(scratch).glob("vllm-*.whl")
        if not wheel.is_file():
            sys.exit(f"there is no wheel {wheel}")
        whole = Path(scratch) / "sources"
        unpack(wheel, whole)
        pip("install", "--target", str(whole), *BESIDE)
        whole.rename(folder)  # at once: what was stopped halfway is not taken for all of it
    return folder


def unpack(wheel: Path, folder: Path) -> None:
    """The Python files of a wheel, and what its metadata says."""
    with zipfile.ZipFile(wheel) as archive:
        wanted = (n for n in archive.namelist() if n.endswith((".py", ".dist-info/METADATA")))
        archive.extractall(folder, wanted)


def pip(*words: str) -> None:
    """Run pip, without dependencies; ends here where it cannot."""
    command, *rest = words
    done = subprocess.run([sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *rest], check=False)
    if done.returncode:
        sys.exit(f"pip cannot {command} {rest[-1]}")


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


# --------------------------------------------------------------------------------------- what has moved in it


def imported(sources: Path) -> dict[tuple[str, str], list[str]]:
    """What is imported of vLLM, as (module, name), and by which files."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in sorted(sources.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    found[str(node.module), alias.name].append(str(path.relative_to(sources)))
    return found


def file_of(root: Path, module: str) -> Path | None:
    """The file of a module under this root."""
    base = root / module.replace(".", "/")
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()), None)


def defined(root: Path, module: str) -> dict[str, ast.stmt]:
    """What a module defines or imports, by name; empty where there is no such module."""
    path = file_of(root, module)
    return {} if path is None else dict(_statements(ast.parse(path.read_text()).body))


def _statements(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name, node
            case ast.ImportFrom(names=aliases):
                yield from ((alias.asname or alias.name, node) for alias in aliases)
            case ast.If(body=first, orelse=second):
                yield from _statements([*first, *second])
            case ast.Try(body=first, handlers=handlers):
                yield from _statements([*first, *(one for h in handlers for one in h.body)])


def find(root: Path, module: str, name: str) -> Found | None:
    """Where a name that is imported from a module comes from, through modules that only hand it on."""
    names = defined(root, module)
    node = names.get(name)
    if node is None:
        if file_of(root, f"{module}.{name}") is not None:
            return f"{module}.{name}", None
        return (module, None) if "__getattr__" in names else None  # made when it is asked for
    if isinstance(node, ast.ImportFrom):
        source = _absolute(root, module, node)
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        return (find(root, source, original) if source.startswith("vllm") else None) or (source, None)
    return module, node


def _absolute(root: Path, module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    path = file_of(root, module)
    own = 0 if path is not None and path.name == "__init__.py" else 1
    parts = module.split(".")
    above = parts[: len(parts) - own - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def signature(node: ast.stmt | None) -> str:
    """The parameters of a function, or what another statement says."""
    match node:
        case ast.FunctionDef(args=args, returns=_) | ast.AsyncFunctionDef(args=args, returns=_):
            return f"{'async ' * isinstance(node, ast.AsyncFunctionDef)}({ast.unparse(args)})"
        case ast.AnnAssign(annotation=kind, value=value):
            return ast.unparse(kind) + (f" = {ast.unparse(value)}" if value is not None else "")
    return ""


def changes(before: Found | None, after: Found | None, own: str) -> Iterator[str]:
    """In lines, how a name differs between two versions; of a class those of its methods and fields that are
    spoken of in `own`, the text of those that import it."""
    if after is None:
        yield "is gone"
        return
    if before is None or before[0] != after[0]:
        yield f"{'new' if before is None else before[0]} -> {after[0]}"
    old, new = (before[1] if before is not None else None), after[1]
    if isinstance(old, ast.ClassDef) and isinstance(new, ast.ClassDef):
        olds, news = dict(_statements(old.body)), dict(_statements(new.body))
        for name in sorted(name for name in {*olds, *news} if name in own):
            was, now = (signature(members[name]) if name in members else "-" for members in (olds, news))
            if was != now:
                yield f".{name}\n      {was}\n      {now}"
    elif signature(old) != signature(new):
        yield f"\n      {signature(old)}\n      {signature(new)}"


def report(installed: Path, other: Path) -> None:
    """Say what has moved or changed."""
    sources = ROOT / "src" / "taichi_serve"
    for (module, name), files in sorted(imported(sources).items()):
        own = "\n".join((sources / file).read_text() for file in files)
        lines = list(changes(find(installed, module, name), find(other, module, name), own))
        for line in lines:
            print(f"  {module} {name}{'' if line[0] == '.' else ' '}{line}    ({', '.join(files)})")


# ------------------------------------------------------------------------------------------------------- main


def run(sources: Path, arguments: list[str]) -> int:
    """The contract tests with these sources before the installed ones; pytest's exit code."""
    path = os.pathsep.join([str(sources), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_TARGET_DEVICE": "cpu"}
    words = [*("-m", "pytest", "-m", "not engine and not gpu", "--ignore", ITSELF), *TESTS, *arguments]
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    """As the first lines of this file say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", metavar="VERSION")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="a wheel that is here already")
    args, arguments = parser.parse_known_args()
    installed = find_spec("vllm")
    if installed is None or installed.origin is None:
        sys.exit("vLLM is not installed: make setup")
    other = tree(args.version, args.wheel)
    print(f"Imported names that differ between the installed vLLM and {args.version}:")
    report(Path(installed.origin).parents[1], other)
    return run(other, arguments)


if __name__ == "__main__":
    sys.exit(main())
