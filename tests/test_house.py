"""The floors of the house: imports run one way, and what refuses a bad command loads no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
# Each floor stands on those before it; the two of one line know nothing of each other.
FLOORS = (
    ("errors",),
    ("configs",),
    ("models", "preprocess"),
    ("metrics",),
    ("pipelines",),
    ("training",),
    ("scripts",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SCRIPTS = sorted(path.stem for path in PROJECT.glob("*.py") if path.stem != "errors")
ROOMS = sorted(path.parent.name for path in PROJECT.glob("pipelines/*/__init__.py"))
TOOLS = {"pipelines.doctor"}  # run by `python -m`: they look into every room, and nothing imports them


def modules() -> Iterator[tuple[str, ast.Module]]:
    for folder in (name for names in FLOORS for name in names):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            parts = path.relative_to(PROJECT).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), ast.parse(path.read_text())
    for name in (*SCRIPTS, "errors"):
        yield name, ast.parse((PROJECT / f"{name}.py").read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that a file imports of this project, also within functions; `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(module: str) -> int | None:
    top = module.split(".")[0]
    return FLOOR["scripts"] if top in SCRIPTS else FLOOR.get(top)


def is_part_of(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


IMPORTS = [(module, imported) for module, tree in modules() for imported in imports(tree)]


def test_every_import_is_seen():
    """The rules below hold over something: a known import of each floor is among what they go over."""
    expected = {
        ("infer", "errors.run_script"),
        ("configs", "errors.UsageError"),
        ("models.wan.transformer", "models.wan.slots.Prompt"),
        ("metrics.drift", "metrics.likeness.FaceScorer"),
        ("pipelines.scoring", "metrics.likeness.FaceScorer"),
    }
    assert expected <= set(IMPORTS)


def test_nothing_imports_upwards():
    strange = []
    for module, imported in IMPORTS:
        own, other = floor_of(module), floor_of(imported)
        is_neighbor = own == other and module.split(".")[0] != imported.split(".")[0]
        if other is not None and (other > own or (is_neighbor and own != FLOOR["scripts"])):
            strange.append(f"{module} imports {imported}")
    assert strange == []


def test_the_backbone_knows_no_plug_in():
    strange = [
        f"{module} imports {imported}"
        for module, imported in IMPORTS
        if is_part_of(module, "models.wan")
        and is_part_of(imported, "models")
        and not is_part_of(imported, "models.wan")
    ]
    assert strange == []


def test_what_rooms_share_knows_no_room():
    strange = [
        f"{module} imports {imported}"
        for module, imported in IMPORTS
        if is_part_of(module, "pipelines")
        and module not in TOOLS
        and not any(is_part_of(module, f"pipelines.{room}") for room in ROOMS)
        and any(is_part_of(imported, f"pipelines.{room}") for room in ROOMS)
    ]
    assert strange == [] and ROOMS
    assert [module for module, imported in IMPORTS if any(is_part_of(imported, tool) for tool in TOOLS)] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_refusal_loads_no_torch(script):
    """What a script needs for its flags, and all that makes settings of a command."""
    names = [script, "pipelines.lora_command", *(f"pipelines.{room}.command" for room in ROOMS)]
    assert loaded_by(names, ("torch", "diffusers", "transformers", "onnxruntime", "insightface")) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick(script):
    """Flags are told by settings classes, which need nothing that takes long to import."""
    names = [script, "pipelines.lora_settings", *(f"pipelines.{room}.settings" for room in ROOMS)]
    assert loaded_by(names, ("numpy", "cv2", "PIL", "psutil", "torch")) == []


def loaded_by(names: list[str], looked_for: tuple[str, ...]) -> list[str]:
    """What of `looked_for` is loaded in a process of its own that imports these modules."""
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += f"print(*(name for name in {looked_for} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_only_the_trainer_knows_training():
    """No script that makes a video depends on how its weights were trained."""
    strange = [
        f"{module} imports {imported}"
        for module, imported in IMPORTS
        if is_part_of(imported, "training") and not is_part_of(module, "training") and module != "train"
    ]
    assert strange == []


@pytest.mark.parametrize("folder", ["metrics", "preprocess", "training"])
def test_everything_public_is_annotated(folder):
    lacking = []
    for module, tree in modules():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in functions if is_part_of(module, folder) else ():
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            given = all(argument.annotation for argument in arguments if argument.arg not in ("self", "cls"))
            if not node.name.startswith("_") and not (given and node.returns):
                lacking.append(f"{module}.{node.name}")
    assert lacking == []
