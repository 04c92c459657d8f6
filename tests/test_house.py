"""The house: packages import downwards only, no circles, no file that one reader cannot hold."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ABOVE = {  # a package, and those that it may import
    "base": set(),
    "fork": {"base"},
    "method": {"base", "fork"},
    "inputs": {"base", "fork", "method"},
    "run": {"base", "fork", "method", "inputs"},
    "answers": {"base", "fork", "method", "inputs"},
    "report": {"base", "fork", "method", "inputs", "answers"},
}


def modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / "noisefit").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """The modules of the project that a file imports, but for those that a type checker alone sees."""
    tree = ast.parse(path.read_text())
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    hidden = {id(node) for check in checks for node in ast.walk(check)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules().keys()


def package(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def test_packages_import_downwards_only():
    wrong = []
    for module, path in modules().items():
        own = package(module)
        for imported in imports(path) - {"noisefit"}:
            other = package(imported)
            if own in ABOVE and other != own and other not in ABOVE[own]:
                wrong.append(f"{module} imports {imported}")
    assert not wrong
    assert {package(module) for module in modules() if module.count(".") > 1} == ABOVE.keys()


def test_no_module_imports_itself_in_a_circle():
    graph = {module: imports(path) - {"noisefit", module} for module, path in modules().items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def names_imported(path: Path) -> set[str]:
    """The libraries that a file imports, and what it takes from the package as a whole."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"noisefit:{alias.name}" for alias in node.names} if node.module == "noisefit" else {node.module}
    return found


def test_no_module_imports_what_stands_above_all():
    for module, path in modules().items():
        allowed = {"noisefit:__version__", *(f"noisefit:{name}" for name in ABOVE)}
        above = {name for name in names_imported(path) if name.startswith("noisefit:")} - allowed
        if module != "noisefit":
            above |= names_imported(path) & {"train_loop", "generate"}
        assert not above, module


def test_method_and_fork_know_nothing_of_files_and_flags():
    for module, path in modules().items():
        if package(module) in ("method", "fork"):
            above = {"argparse", "pathlib", "os", "noisefit.base.files", "noisefit.base.command_line"}
            assert not above & names_imported(path) and "open(" not in path.read_text(), module


def test_no_file_is_more_than_one_reader_can_hold():
    lengths = {path: len(path.read_text().splitlines()) for path in modules().values()}
    assert not {str(path): length for path, length in lengths.items() if length > 300}
    assert len((ROOT / "train_loop.py").read_text().splitlines()) <= 250
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220
