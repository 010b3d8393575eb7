"""Imports go one way. The table says what each part of the package may import of the others.

A part is a folder or a file right under the package. Those in the table may import what their row
lists (and themselves); parts that are not in it stand above all that are, and nothing in the table
may import them. A new library part gets a row here.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lact_jax"

ALLOWED = {
    "ops": set(),
    "sharding": {"ops"},
    "models": {"ops", "sharding"},
    "diffusion": set(),
    "objective": {"diffusion", "models", "ops"},
    "video_io": set(),
    "data": {"distributed", "video_io"},
    "gallery": {"video_io"},
    "text": {"models"},
    "wan_weights": {"models"},
    "umt5_weights": {"models", "wan_weights"},
    "vae_weights": {"models"},
    "torch_pickle": set(),
    "checkpoint_tree": set(),
    "checkpoint": {"checkpoint_tree", "distributed"},
    "convert": {
        "checkpoint", "models", "torch_pickle", "umt5_weights", "vae_weights", "wan_weights",
    },
    "wan_encoders": {"convert", "models", "text"},
    "encoders": {"models", "wan_encoders"},
    "flops": {"models", "objective", "ops"},
    "optim": set(),
    "distributed": set(),
    "interrupt": {"distributed"},
    "workdir": {"distributed"},
    "run_logging": {"workdir"},
    "run_protocol": set(),
    "tensorboard_run": {"run_protocol"},
    "wandb_run": {"run_protocol", "workdir"},
    "config": {
        "diffusion", "distributed", "models", "objective", "optim", "sharding", "tensorboard_run",
        "wandb_run",
    },
    "training_log": {"config", "flops", "run_logging", "tensorboard_run", "wandb_run"},
    "validation": {
        "batch_encoder", "config", "diffusion", "distributed", "models", "objective", "ops",
        "optim", "sharding", "workdir",
    },
    "pieces": set(),
    "train_state": {"config", "models", "objective", "ops", "optim", "pieces", "sharding"},
    "sizes": {"config", "data", "encoders", "objective", "ops"},
    "batch_encoder": {"encoders"},
    "pipeline": {
        "config", "diffusion", "distributed", "encoders", "models", "sharding", "sizes",
    },
}  # fmt: skip


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(tree, module):
    """Full names of everything a module imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(module):
    """Modules of the package that `module` imports."""
    tree = ast.parse(MODULES[module].read_text())
    found = set()
    for name in imported_names(tree, module):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", PACKAGE.name}


def part_of(module):
    return module.split(".")[1]


def parts_imported_by(part):
    return {
        part_of(imported)
        for module in MODULES
        if module != PACKAGE.name and part_of(module) == part
        for imported in imported_modules(module)
    } - {part}


@pytest.mark.parametrize("part", ALLOWED)
def test_part_imports_only_what_its_row_lists(part):
    assert parts_imported_by(part) - ALLOWED[part] == set()


def test_rows_name_parts_that_exist_and_list_parts_with_rows():
    parts = {part_of(module) for module in MODULES if module != PACKAGE.name}
    assert set(ALLOWED) <= parts
    assert set().union(*ALLOWED.values()) <= set(ALLOWED)


def test_no_module_imports_itself_by_way_of_others():
    unfinished, finished = [], set()

    def visit(module):
        assert module not in unfinished, f"a cycle: {[*unfinished, module]}"
        if module in finished:
            return
        unfinished.append(module)
        for imported in sorted(imported_modules(module)):
            visit(imported)
        finished.add(unfinished.pop())

    for module in MODULES:
        visit(module)


def test_pytorch_is_for_tests_only():
    peers = {"torch", "torchvision", "diffusers", "transformers", "tensorflow"}
    for module, path in MODULES.items():
        roots = {n.split(".")[0] for n in imported_names(ast.parse(path.read_text()), module)}
        assert not roots & peers, module
