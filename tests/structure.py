"""Imports between the rooms of the package: arrows, arrows that run upward, circles.

A room is a folder of ap_fairseq, a module outside the folders, or triton_ops. `FLOORS` puts every room on a floor; a
module imports from its own room and from lower floors only. Imports inside functions and for type checkers count too.

    python tests/structure.py [ROOT]
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx

FLOORS = (
    {"triton_ops"},
    {"version", "files", "logs", "compat", "cuda_graphs", "devices"},
    {"processes", "progress", "sites", "provenance"},
    {"lengths", "data_bin"},
    {"relative"},
    {"artifacts"},  # statistics and masks: what the stages hand to each other
    {"pruning", "model", "evaluation"},
    {"recording"},
    {"training", "search"},
    {"tasks"},
    {"plugin"},  # registers tasks and models with fairseq
    {"experiments", "report"},
    {"generation"},
    {"cli"},
)
PACKAGES = ("ap_fairseq", "triton_ops")
PLUGIN = {"ap_fairseq", "ap_fairseq.__main__", "ap_fairseq.plugin"}


def modules(root: Path) -> dict[str, Path]:
    """Return the file of every module of both packages."""
    files = (file for package in PACKAGES for file in sorted((root / package).rglob("*.py")))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name: str, file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules of both packages that a module imports, at its top or later."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield from [m for m in (f"{origin}.{alias.name}", origin) if m in known][:1]


def module_graph(root: Path) -> networkx.DiGraph:
    """Return the modules of both packages with an arrow from each to what it imports."""
    known = modules(root)
    graph = networkx.DiGraph()
    graph.add_nodes_from(known)
    graph.add_edges_from((name, other) for name, file in known.items() for other in imports(name, file, known))
    return graph


def room(module: str) -> str:
    """Return the room of a module."""
    if module in PLUGIN:
        return "plugin"
    return module.split(".")[module.startswith("ap_fairseq.")]


def room_graph(graph: networkx.DiGraph) -> networkx.DiGraph:
    """Return the rooms with an arrow from each to the other rooms that it imports from."""
    rooms = networkx.DiGraph()
    rooms.add_nodes_from(map(room, graph))
    rooms.add_edges_from((room(a), room(b)) for a, b in graph.edges if room(a) != room(b))
    return rooms


def circles(graph: networkx.DiGraph) -> list[list[str]]:
    """Return the groups of nodes that import each other, directly or through others."""
    return sorted(sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1)


def not_downward(rooms: networkx.DiGraph) -> list[tuple[str, str]]:
    """Return the arrows between rooms that do not lead to a lower floor; rooms without a floor are left out."""
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    return sorted((a, b) for a, b in rooms.edges if a in floor and b in floor and floor[b] >= floor[a])


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    graph = module_graph(root)
    rooms = room_graph(graph)
    for name in sorted(rooms):
        print(f"{name:12} -> {', '.join(sorted(rooms.successors(name))) or '-'}")
    print(f"{len(graph)} modules, {graph.number_of_edges()} arrows between them, circles: {circles(graph) or 'none'}")
    print(f"{len(rooms)} rooms, {rooms.number_of_edges()} arrows between them, circles: {circles(rooms) or 'none'}")
    print(f"arrows that do not lead downward: {not_downward(rooms) or 'none'}")


if __name__ == "__main__":
    main()
