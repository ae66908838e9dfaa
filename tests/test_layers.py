"""The picture in docs/how-it-works.md is the rule: who may import whom, and which names stay out of which rooms."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "speculens"
METHODS = ("eagle", "specvlm", "vispec", "hivis", "lookup")
FAMILIES = ("llava", "qwen", "internvl", "smolvlm", "idefics", "gemma")  # PaliGemma is a gemma too
NAMELESS = ("engine", "capture", "training", "bench.measure", "server")
CACHE_OWNER = "cache"

Sources = Mapping[str, str]
"""Module name without the package ("" is the package itself, "targets.base" a file) -> its text."""


@dataclass(frozen=True)
class Layers:
    """Rooms by height. A room is a set of modules that may see each other; rooms of one height may not."""

    height: dict[str, int]
    room: dict[str, tuple[int, int]]

    @classmethod
    def parse(cls, block: str) -> Layers:
        """Read the picture: highest line first, `|` between rooms that never see each other."""
        lines = [line.split("#")[0] for line in block.splitlines() if line.split("#")[0].strip()]
        height, room = {}, {}
        for depth, line in enumerate(lines):
            for number, words in enumerate(line.split("|")):
                for word in words.split():
                    height[word], room[word] = len(lines) - depth, (depth, number)
        return cls(height, room)

    def may_import(self, importer: str, imported: str) -> bool:
        """Downward, or within the same room."""
        return self.room[importer] == self.room[imported] or self.height[importer] > self.height[imported]


def documented_layers() -> Layers:
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    found = re.search(r"```layers\n(.*?)```", text, re.DOTALL)
    assert found, "docs/how-it-works.md has lost its ```layers block"
    return Layers.parse(found[1])


def package_sources() -> dict[str, str]:
    base = ROOT / "src" / PACKAGE
    return {
        ".".join(path.relative_to(base).with_suffix("").parts).removesuffix("__init__").rstrip("."): path.read_text(
            encoding="utf-8"
        )
        for path in sorted(base.rglob("*.py"))
    }


def part(module: str) -> str:
    """The room's word in the picture: the first part of the module's name, `__init__` for the package itself."""
    return module.partition(".")[0] or "__init__"


def imports(module: str, sources: Sources) -> Iterator[tuple[int, str]]:
    """Line and name of every module of this package that `module` imports, wherever in the file the import stands."""
    is_package = any(other.startswith(f"{module}.") for other in sources) or not module
    for node in ast.walk(ast.parse(sources[module])):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node.level, is_package=is_package) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        else:
            continue
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                yield node.lineno, _module_of(name.removeprefix(PACKAGE).lstrip("."), sources)


def _absolute(module: str, level: int, *, is_package: bool) -> str:
    parts = [PACKAGE, *filter(None, module.split("."))]
    return ".".join(parts[: len(parts) - level + is_package])


def _module_of(name: str, sources: Sources) -> str:
    """`tree.DraftTree` -> `tree`: cut what is no file; what the package itself offers is `""`."""
    while name and name not in sources:
        name = name.rpartition(".")[0]
    return name


def layer_faults(sources: Sources, layers: Layers) -> list[str]:
    """Every import that does not go downward, and every room that the picture lacks."""
    faults = [
        f"src/{PACKAGE}: {word} has no place in the layers of docs/how-it-works.md"
        for word in sorted({part(module) for module in sources} - set(layers.room))
    ]
    for module in sources:
        if part(module) not in layers.room:
            continue
        for line, imported in imports(module, sources):
            if part(imported) in layers.room and not layers.may_import(part(module), part(imported)):
                faults.append(
                    f"{module or '__init__'}, line {line}: imports {imported or '__init__'}; "
                    f"{part(imported)} is not below {part(module)} (docs/how-it-works.md, layers)"
                )
    return faults


def cycle_faults(sources: Sources) -> list[str]:
    graph = {module: {imported for _, imported in imports(module, sources)} - {module, ""} for module in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"modules import each other: {' -> '.join(error.args[1])}"]
    return []


def name_faults(sources: Sources) -> list[str]:
    """Names of methods and families where the code must not know which one it runs; comments count."""
    pattern = re.compile("|".join((*METHODS, *FAMILIES)), re.IGNORECASE)
    return [
        f"{module}, line {number}: names {found[0]!r}; no method or family may appear there"
        for module, text in sources.items()
        if any(module == place or module.startswith(f"{place}.") for place in NAMELESS)
        for number, line in enumerate(text.splitlines(), 1)
        if (found := pattern.search(line))
    ]


def cache_faults(sources: Sources) -> list[str]:
    """Uses of transformers' cache classes outside the one file that knows them."""
    faults = []
    for module, text in sources.items():
        if module == CACHE_OWNER:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            else:
                continue
            faults += [
                f"{module}, line {node.lineno}: uses {name}; only {CACHE_OWNER}.py knows transformers' Cache"
                for name in names
                if re.match(r"transformers\.(cache_utils\b|(.*\.)?\w*Cache\w*$)", name)
            ]
    return faults


def test_imports_go_downward():
    faults = layer_faults(package_sources(), documented_layers())
    assert not faults, "\n" + "\n".join(faults)


def test_no_two_modules_import_each_other():
    assert not cycle_faults(package_sources())


def test_methods_and_families_stay_unnamed():
    faults = name_faults(package_sources())
    assert not faults, "\n" + "\n".join(faults)


def test_only_one_file_knows_the_cache():
    faults = cache_faults(package_sources())
    assert not faults, "\n" + "\n".join(faults)


def test_every_method_and_family_is_a_listed_name():
    """One added later must be kept out of the nameless rooms too."""
    trained = importlib.import_module("speculens.drafters").METHODS
    families = importlib.import_module("tiny").FAMILIES
    unlisted = [name for name in trained if not any(method in name for method in METHODS)]
    unlisted += [name for name in families if not any(family in name for family in FAMILIES)]
    assert not unlisted, "add these to METHODS or FAMILIES in this test"


# --- the checker itself: each rule must be able to fail

SKETCH = """
cli            # parses, calls, prints
__init__
training | engine
targets | drafters
tree sampling
errors
"""
HOUSE = {
    "": "from speculens.engine import Engine",
    "cli": "from speculens import Engine",
    "engine": "from speculens.tree import DraftTree\nfrom .targets.base import Target\nimport speculens.drafters.base",
    "training": "",
    "training.trainer": "from . import losses\nfrom ..drafters.base import Drafter",
    "training.losses": "",
    "targets": "from .base import Target",
    "targets.base": "from speculens.sampling import Sampling",
    "drafters": "",
    "drafters.base": "from speculens import tree",
    "tree": "from speculens.errors import UserError",
    "sampling": "from .tree import DraftTree",
    "errors": "",
}


def test_a_sound_house_has_no_faults():
    layers = Layers.parse(SKETCH)
    assert layer_faults(HOUSE, layers) == []
    assert cycle_faults(HOUSE) == []
    assert name_faults(HOUSE) == []
    assert cache_faults(HOUSE) == []


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        ("drafters.base", "from speculens.targets.base import Target", "targets.base"),
        ("targets.base", "from speculens.drafters import EagleDrafter", "drafters"),
        ("targets.base", "from ..drafters.base import Drafter", "drafters.base"),
        ("targets", "from ..drafters import base", "drafters.base"),
        ("targets.base", "from .. import drafters", "drafters"),
        ("training.trainer", "import speculens.engine", "engine"),
        ("engine", "def late():\n    from speculens.training import losses", "training.losses"),
        ("engine", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import speculens.cli as c", "cli"),
        ("engine", "import importlib\nx = importlib.import_module('speculens.training.trainer')", "training.trainer"),
        ("tree", "from speculens import Engine", "__init__"),
        ("errors", "from .tree import DraftTree", "tree"),
    ],
)
def test_an_upward_or_sideways_import_is_caught(module, source, imported):
    (fault,) = layer_faults(HOUSE | {module: source}, Layers.parse(SKETCH))
    assert fault.startswith(f"{module}, line {source.count(chr(10)) + 1}: imports {imported};")


def test_a_module_without_a_place_is_caught():
    (fault,) = layer_faults(HOUSE | {"utils": ""}, Layers.parse(SKETCH))
    assert "utils has no place" in fault


def test_a_cycle_within_a_room_is_caught():
    house = HOUSE | {"tree": "from speculens import sampling"}
    assert layer_faults(house, Layers.parse(SKETCH)) == []
    (fault,) = cycle_faults(house)
    assert "sampling" in fault
    assert "tree" in fault


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine", "x = 1\nif drafter.kind == 'hivis': ..."),
        ("training.trainer", "x = 1\nclass EagleTrainer: ..."),
        ("server.app", "x = 1\n# Qwen needs this"),
        ("bench.measure", "x = 1\ndef llava_next(): ..."),
        ("capture", "x = 1\nfrom speculens.drafters import lookup"),
    ],
)
def test_a_name_in_a_nameless_room_is_caught(module, source):
    (fault,) = name_faults({module: source})
    assert fault.startswith(f"{module}, line 2: names ")
    assert name_faults({"bench.report": source, "drafters.x": source}) == []


@pytest.mark.parametrize(
    "source",
    [
        "from transformers import Cache",
        "from transformers import DynamicCache as D",
        "from transformers.cache_utils import CacheLayerMixin",
        "import transformers.cache_utils",
        "import transformers\nx = transformers.StaticCache(1)",
    ],
)
def test_a_second_owner_of_the_cache_is_caught(source):
    assert cache_faults({"engine": source})
    assert cache_faults({"cache": source}) == []
    assert cache_faults({"engine": "from transformers import AutoModel\nfrom speculens.cache import SlotCache"}) == []
