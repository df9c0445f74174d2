"""The order of the packages: each imports only those before it, and no two modules import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    {"fedsim.errors"},
    {"fedsim.types"},
    {"fedsim.moved"},
    {"fedsim.base"},
    {"fedsim.data", "fedsim.models"},  # neither imports the other
    {"fedsim.report"},
    {"fedsim.training"},
    {"fedsim.federated"},
    {"fedsim.strategies"},
    {"fedsim.runtimes"},
    {"fedsim.experiment"},
    {"fedsim"},  # the root, which passes on what users import
    {"fedsim.flower"},
    {"fedsim.sweep"},
    {"fedsim.export"},
    {"fedsim.bench"},
    {"fedsim.listing"},
    {"fedsim.cli"},
]
PLACE = {package: place for place, packages in enumerate(ORDER) for package in packages}
FILES = {path: f"fedsim.{path.relative_to(ROOT / 'fedsim')}" for path in (ROOT / "fedsim").rglob("*.py")} | {
    path: f"fedsim.strategies.{path.name}" for path in (ROOT / "strategies").glob("*.py")
}
MODULES = {
    path: name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path, name in FILES.items()
}
KNOWN = set(MODULES.values())


def imports(path):
    """The modules of fedsim that a file imports, at its top, in functions and for types, with their lines."""
    package = MODULES[path] if path.name == "__init__.py" else MODULES[path].rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            within = [f"{module}.{alias.name}" for alias in node.names if f"{module}.{alias.name}" in KNOWN]
            found = within + [module] * (len(within) < len(node.names))
        else:
            continue
        yield from ((name, node.lineno) for name in found if name.partition(".")[0] == "fedsim")


def package_of(module):
    """Its place in ORDER: the package, or a module right under fedsim."""
    return ".".join(module.split(".")[:2])


def shortest(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sorted(FILES), ids=shortest)
def test_imports_go_down(path):
    if MODULES[path] == "fedsim":
        return
    own = package_of(MODULES[path])
    allowed = {"fedsim", "fedsim.types"} if own == "fedsim.strategies" else set(PLACE)
    for module, line in imports(path):
        other = package_of(module)
        if other == own:
            continue
        assert other in allowed, (
            f"{shortest(path)}:{line} imports {module}; strategies import fedsim and fedsim.types"
        )
        assert PLACE[other] < PLACE[own] or own == "fedsim.strategies", (
            f"{shortest(path)}:{line} imports {module}: {own} comes before {other} and may import only packages "
            f"before itself; move what it needs down, or hand it over as an argument"
        )


def test_no_two_modules_import_each_other():
    edges = {MODULES[path]: {name for name, _ in imports(path) if name in KNOWN} - {"fedsim"} for path in FILES}
    done, trail = set(), []

    def visit(module):
        if module in trail:
            pytest.fail(f"a circle of imports: {' -> '.join([*trail[trail.index(module) :], module])}")
        if module in done:
            return
        trail.append(module)
        for other in sorted(edges[module] - {module}):
            visit(other)
        done.add(trail.pop())

    for module in sorted(edges):
        visit(module)


def test_every_package_has_a_place():
    assert {package_of(module) for module in KNOWN} == set(PLACE)
