# SPDX-License-Identifier: Apache-2.0
"""The layers of the package, and what every module has."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
PACKAGE = "optpoline"
LAYERS = (
    *("errors", "model", "x86", "process", "discover", "learn", "promote", "simulate"),
    *("patch", "controller", "toolchain", "report", "cli"),
)
"""Each imports only itself and those before it."""

ONLY = {
    "errors": set[str](),
    "model": {"errors"},
    "x86": {"errors", "model"},
    "toolchain": {"errors"},
    "simulate": {"errors", "model", "learn", "promote"},
}
"""Layers that must know even less."""

TOP = {"", "__main__"}
"""The package's own face: may import anything but must not be imported inside it."""

# What lies in share is data: scripts that other programs run, and that import nothing of ours.
MODULES = sorted(p for p in (SRC / PACKAGE).rglob("*.py") if p.parent.name != "share")
NAMES = [str(path.relative_to(SRC)) for path in MODULES]

each_module = pytest.mark.parametrize("path", MODULES, ids=NAMES)


def layer_of(dotted: str) -> str:
    """Return the layer that a dotted module name of the package is in."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else ""


def dotted_name(path: Path) -> str:
    """Return a module's dotted name."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_imports(path: Path) -> list[tuple[int, str]]:
    """Return (line, dotted name) of everything a module imports, wherever it does so."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        match node:
            case ast.Import(names=names):
                found += [(node.lineno, alias.name) for alias in names]
            case ast.ImportFrom(module=module, level=0, names=names):
                assert module is not None
                if module == PACKAGE:
                    found += [(node.lineno, f"{module}.{alias.name}") for alias in names]
                else:
                    found.append((node.lineno, module))
            case ast.ImportFrom():
                raise AssertionError(f"{path}:{node.lineno}: relative import")
    return found


def own_imports(path: Path) -> list[tuple[int, str]]:
    """Return the imports of the package itself."""
    return [(line, name) for line, name in find_imports(path) if name.split(".")[0] == PACKAGE]


def sort_key(name: str) -> tuple[int, str]:
    """Return the order of names in ``__all__``: constants, classes, the rest."""
    if name.isupper():
        return 0, name
    return (1 if name[:1].isupper() else 2), name


def exported_names(tree: ast.Module) -> list[str] | None:
    """Return ``__all__``, or None if there is none."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
                names = ast.literal_eval(node.value)
                return [str(name) for name in names]
    return None


def defined_names(tree: ast.Module) -> set[str]:
    """Return the names that a module's own statements bind."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.alias(name=name, asname=asname):
                found.add(asname or name.split(".")[0])
    return found


def test_every_module_is_in_a_layer() -> None:
    layers = {layer_of(dotted_name(path)) for path in MODULES}
    assert layers <= {*LAYERS, *TOP}


@each_module
def test_imports_only_from_the_layers_above(path: Path) -> None:
    layer = layer_of(dotted_name(path))
    if layer in TOP:
        return
    allowed = ONLY.get(layer, set(LAYERS[: LAYERS.index(layer)])) | {layer}
    wrong = [
        f"{path.relative_to(SRC)}:{line}: {layer} imports {name}"
        for line, name in own_imports(path)
        if layer_of(name) not in allowed and not (layer == "cli" and layer_of(name) in PUBLIC)
    ]
    assert not wrong, "\n".join(wrong)


def public_names() -> set[str]:
    """Return the names of the public API, which the command line is written on."""
    names = exported_names(ast.parse((SRC / PACKAGE / "__init__.py").read_text()))
    return set(names or ())


PUBLIC = public_names() | {""}


@each_module
def test_only_x86_decodes_instructions(path: Path) -> None:
    if layer_of(dotted_name(path)) == "x86":
        return
    assert not [name for _, name in find_imports(path) if name.split(".")[0] == "iced_x86"]


@each_module
def test_only_the_command_line_needs_its_libraries(path: Path) -> None:
    if layer_of(dotted_name(path)) in {"cli", "report", *TOP}:
        return
    roots = {name.split(".")[0] for _, name in find_imports(path)}
    assert not roots & {"click", "rich", "logging.config"}


@each_module
def test_module_has_a_docstring_and_a_licence(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    tree = ast.parse(text)
    if not tree.body and path.name == "__init__.py":
        return  # a package that re-exports nothing is its directory's name
    docstring = ast.get_docstring(tree)
    assert docstring
    assert docstring.splitlines()[0].endswith(".")


@each_module
def test_exports_are_sorted_once_and_there(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = exported_names(tree)
    if names is None:
        assert not tree.body or path.name in {"__init__.py", "__main__.py"}, "no __all__"
        return
    assert names == sorted(names, key=sort_key)
    assert len(set(names)) == len(names)
    assert set(names) <= defined_names(tree)
    assert not [name for name in names if name.startswith("_") and name != "__version__"]


def test_walker_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import optpoline.cli.main\n"
        "from optpoline import errors\n"
        "def late():\n    from optpoline.patch.text import Poke\n"
        "import iced_x86 as x\n"
    )
    assert own_imports(path) == [
        (1, "optpoline.cli.main"),
        (2, "optpoline.errors"),
        (4, "optpoline.patch.text"),
    ]
    assert (5, "iced_x86") in find_imports(path)
