"""The rules of the house: who may import whom, how long and how wide code may be, which words it
uses.

Every rule reads the source as text; nothing of the project is imported. One rule alone:

    pytest tests/test_house.py -k annotations
"""

import ast
import gc
import re
import subprocess
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("model", "dataset", "trainer", "scripts", "tests")

MAX_COLUMNS = 100
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_ARGUMENTS = 6
MAX_STAGE_LINES = {"ppo": 249, "grpo": 249, "spo": 249, "agent": 249}  # the others: 199
LONG_FILES = {"model/model_minimind.py"}  # the network in one file, top to bottom
# counts pairs of tokens without a gradient; another name of train_reason.py
NO_STEP = {"trainer/train_tokenizer.py", "trainer/train_distill_reason.py"}
STEP = ["optimizer", "set_learning_rate", "backward", "clip_and_step"]

# What each room may import besides itself. A stage script may not even import another.
MODEL = {"model", "model/files.py"}
DATA = {"dataset", "dataset/prepare", "dataset/chat", "dataset/files"}
TOY = {"dataset/toy"}
TRAINER = {"trainer/rl", "trainer/losses", "trainer/runtime"}
MAY_IMPORT = {
    "scripts": {"stage scripts"} | TRAINER | DATA | TOY | MODEL,
    "stage scripts": TRAINER | DATA | TOY | MODEL,
    "trainer": set(),  # no more files here
    "trainer/rl": {"trainer/losses", "trainer/runtime"} | DATA | MODEL,
    "trainer/losses": set(),
    "trainer/runtime": {"trainer/losses"} | DATA | TOY | MODEL,
    "dataset": DATA | TOY | {"model/files.py"},
    "dataset/prepare": {"dataset/chat", "dataset/files", "model/files.py"},
    "dataset/toy": {"dataset/chat", "dataset/files", "model/files.py"},
    "dataset/chat": {"dataset/files", "model/files.py"},
    "dataset/files": {"model/files.py"},
    "model": {"model/files.py"},
    "model/files.py": set(),
}

# Test files that mirror no file or folder of the source.
OWN_TESTS = {
    "tests/test_house.py": "about all folders",
    "tests/test_compatibility.py": "docs/compatibility.md against the flags of all programs",
    "tests/test_tutorial_commands.py": "commands that published tutorials type",
    "tests/model/test_tokenizer.py": "model/tokenizer.json and the chat template",
    "tests/trainer/runtime/test_bad_steps.py": "runs whose losses are not finite",
    "tests/trainer/runtime/test_faults.py": "runs that are killed and interrupted",
    "tests/trainer/runtime/test_no_room.py": "runs without disk or memory",
    "tests/trainer/test_recorded_numbers.py": "losses that an earlier version has given",
    "tests/trainer/test_tutorial_rows.py": "files of the minimind tutorials in several stages",
    "tests/trainer/test_stages.py": "what all stage scripts have in common",
    "tests/browser/test_web_demo_browser.py": "scripts/web_demo.py in a real browser",
}

# Words of the old dialect: whole identifiers, and parts between underscores.
OLD_NAMES = {
    "center_weight": "center_rewards_coefficient",
    "clip_high": "epsilon_high",
    "clip_low": "epsilon",
    "discount": "gamma",
    "initial_answers": "initial_completions",
    "kl_kind": "kl_estimator",
    "kl_weight": "beta",
    "mark_weight": "think_token_weight",
    "tool_seconds": "tool_timeout",
    "value_clip": "cliprange_value",
    "value_weight": "vf_coef",
    "is_first": "is_main_process",
    "say": "print0",
    "way_out": "fix",
    "Sharded": "DeepSpeedEngine",
    "Together": "OptimizerGroup",
}
OLD_WORDS = {
    "share": "ratio or fraction",
    "shares": "ratios or fractions",
    "figures": "metrics",
    "cure": "fix",
    "likeliest": "greedy",
    "ladder": "stage evaluation",
    "rung": "stage",
    "rungs": "stages",
}


@dataclass
class Source:
    """A Python file: its path from the root, and its text."""

    path: str
    text: str

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> dict[type, list[ast.AST]]:
        """All nodes by their type."""
        found, todo = defaultdict(list), [self.tree]
        while todo:
            node = todo.pop()
            found[type(node)].append(node)
            for value in vars(node).values():
                if isinstance(value, ast.AST):
                    todo.append(value)
                elif isinstance(value, list):
                    todo += [x for x in value if isinstance(x, ast.AST)]
        return found

    def all(self, *types: type) -> list[ast.AST]:
        """The nodes of some types."""
        return [node for kind in types for node in self.nodes[kind]]

    @cached_property
    def methods(self) -> dict[ast.AST, ast.ClassDef]:
        """The class of each function that stands directly in one."""
        return {
            child: node
            for node in self.all(ast.ClassDef)
            for child in node.body
            if isinstance(child, FUNCTION)
        }

    @cached_property
    def room(self) -> str:
        """The room of MAY_IMPORT in which the file stands; else its folder."""
        top, *rest = PurePosixPath(self.path).parts
        if self.path == "model/files.py":
            return self.path
        if self.path == "dataset/toy_world.py":
            return "dataset/toy"
        if self.path.startswith("trainer/train_"):
            return "stage scripts"
        if not rest:
            return "scripts"
        return f"{top}/{rest[0]}" if top in ("trainer", "dataset") and len(rest) > 1 else top

    @cached_property
    def is_test(self) -> bool:
        return self.path.startswith("tests/")

    @cached_property
    def is_helper(self) -> bool:
        return self.path.startswith("tests/helpers/")


@dataclass(frozen=True, order=True)
class Offence:
    """A place where a rule is broken."""

    path: str
    line: int
    text: str


Sources = dict[str, Source]
Rule = Callable[[Sources], Iterator[Offence]]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORT = (ast.Import, ast.ImportFrom, ast.Call)


# ---------------------------------------------------------------------------- who imports whom


@dataclass
class Import:
    """`line` of a file imports the module in `target`; for type checkers alone with is_typing."""

    line: int
    target: str
    is_typing: bool


def module_name(path: str) -> str:
    """The dotted name of a file."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def project_imports(source: Source, modules: dict[str, str]) -> Iterator[Import]:
    """What a file imports of the project, also inside functions; modules: {dotted name: path}."""
    typing_only = {
        child
        for node in source.all(ast.If)
        if "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in source.all(*IMPORT):
        for name in imported_names(source.path, node):
            while name and name not in modules:  # a.b.function: the module is a.b
                name = name.rpartition(".")[0]
            if name and modules[name] != source.path:
                yield Import(node.lineno, modules[name], node in typing_only)


def imported_names(path: str, node: ast.AST) -> list[str]:
    """Dotted names of what a node imports: modules, or modules and names in them."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = path.split("/")[: -node.level]
            base = ".".join([*package, *([base] if base else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = getattr(node.func, "id", getattr(node.func, "attr", None))
        if called in ("import_module", "__import__", "importorskip"):
            return [str(node.args[0].value)]
    return []


def modules_of(sources: Sources) -> dict[str, str]:
    return {module_name(path): path for path in sources}


def arrows(sources: Sources) -> Iterator[Offence]:
    """imports against the arrows; move what is shared down, or pass it in as an argument"""
    modules = modules_of(sources)
    for source in sources.values():
        if source.is_test:
            continue
        if source.room not in MAY_IMPORT:
            yield Offence(source.path, 1, f"{source.room} is no room of MAY_IMPORT")
            continue
        for found in project_imports(source, modules):
            target = sources[found.target].room
            is_inside = target == source.room != "stage scripts"
            if not is_inside and target not in MAY_IMPORT[source.room]:
                yield Offence(source.path, found.line, f"{source.room} imports {found.target}")


def circles(sources: Sources) -> Iterator[Offence]:
    """modules that import each other; move what both need into a third one"""
    modules = modules_of(sources)
    edges = {
        path: {
            found.target: found.line
            for found in project_imports(source, modules)
            if not found.is_typing
        }
        for path, source in sources.items()
    }
    reach = {path: reachable(path, edges) for path in edges}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in edges if a in reach[a]}
    for group in sorted(groups):
        line = min(line for target, line in edges[group[0]].items() if target in group)
        yield Offence(group[0], line, "is in a circle with " + ", ".join(group[1:]))


def reachable(path: str, edges: dict[str, dict[str, int]]) -> set[str]:
    """All that a file imports, directly or through others."""
    found, todo = set(), [path]
    while todo:
        new = edges[todo.pop()].keys() - found
        found |= new
        todo += new
    return found


def imports_of_tests(sources: Sources) -> Iterator[Offence]:
    """imports of tests; shared code goes to tests/helpers: `from tests.helpers.x import y`"""
    for source in sources.values():
        for node in source.all(*IMPORT):
            for name in imported_names(source.path, node):
                parts = name.split(".")
                is_relative = isinstance(node, ast.ImportFrom) and node.level
                if any(part == "conftest" or part.startswith("test_") for part in parts):
                    yield Offence(source.path, node.lineno, f"imports {name}")
                elif parts[0] == "helpers" or (source.is_test and is_relative):
                    yield Offence(source.path, node.lineno, f"imports {name} by another idiom")


def missing_names(sources: Sources) -> Iterator[Offence]:
    """imports of names that are not there; take them from their new home"""
    modules = modules_of(sources)
    names = {name: module_level_names(sources[path]) for name, path in modules.items()}
    ours = {name.partition(".")[0] for name in modules}
    for source in sources.values():
        for node in source.all(ast.Import, ast.ImportFrom):
            for name in imported_names(source.path, node):
                home, _, last = name.rpartition(".")
                is_there = name in modules or {last, "__getattr__"} & names.get(home, set())
                if name.partition(".")[0] in ours and not is_there:
                    yield Offence(source.path, node.lineno, f"imports {name}")


def module_level_names(source: Source) -> set[str]:
    """All names that other files can import from this one."""
    found, todo = set(), list(source.tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name):
            found.add(node.id)
        else:
            todo += ast.iter_child_nodes(node)
    return found


# ---------------------------------------------------------------------------- size


def file_lines(sources: Sources) -> Iterator[Offence]:
    """files over 400 lines; split them by what they do"""
    for source in sources.values():
        count = len(source.lines)
        if count > MAX_FILE_LINES and not source.is_test and source.path not in LONG_FILES:
            yield Offence(source.path, count, f"{count} lines")


def columns(sources: Sources) -> Iterator[Offence]:
    """lines over 100 columns; wrap them by hand where `ruff format` does not"""
    for source in sources.values():
        for number, line in enumerate(source.lines, 1):
            if len(line) > MAX_COLUMNS / 2 and width(line) > MAX_COLUMNS:
                yield Offence(source.path, number, f"{width(line)} columns")


def width(line: str) -> int:
    """Columns of a line on a screen: Chinese takes two for a character."""
    return len(line) + sum(unicodedata.east_asian_width(char) in "WF" for char in line)


def function_lines(sources: Sources) -> Iterator[Offence]:
    """functions over 80 lines; give their parts names"""
    for source in sources.values():
        for node in source.all(*FUNCTION):
            count = node.end_lineno - node.lineno + 1
            if count > MAX_FUNCTION_LINES:
                yield Offence(source.path, node.lineno, f"{node.name} has {count} lines")


def argument_lists(sources: Sources) -> Iterator[Offence]:
    """functions of more than 6 arguments; take a dataclass or **options, or give the reason in a
    docstring with the word "arguments"
    """
    for source in sources.values():
        for node in () if source.is_test else source.all(*FUNCTION):  # of a test: fixtures
            owner = source.methods.get(node)
            count = len(parameters(node, owner))
            docstrings = (ast.get_docstring(x) or "" for x in (node, owner) if x)
            if count > MAX_ARGUMENTS and not any("arguments" in text for text in docstrings):
                yield Offence(source.path, node.lineno, f"{node.name} takes {count}")


def parameters(node: ast.FunctionDef, owner: ast.ClassDef | None = None) -> list[ast.arg]:
    """The parameters of a function, without self and cls."""
    args = node.args
    named = [*args.posonlyargs, *args.args]
    is_static = any(getattr(x, "id", None) == "staticmethod" for x in node.decorator_list)
    found = [*named[owner is not None and not is_static :], *args.kwonlyargs]
    return found + [x for x in (args.vararg, args.kwarg) if x]


# ---------------------------------------------------------------------------- idioms


def annotations(sources: Sources) -> Iterator[Offence]:
    """public functions without annotations on all parameters and the return"""
    for source in sources.values():
        if source.is_test and not source.is_helper:
            continue
        for node in [*source.tree.body, *source.methods]:
            owner = source.methods.get(node)
            if not isinstance(node, FUNCTION) or node.name.startswith("_"):
                continue
            if owner and (owner.name.startswith("_") or owner not in source.tree.body):
                continue
            missing = [x.arg for x in parameters(node, owner) if not x.annotation]
            missing += [] if node.returns else ["return"]
            if missing:
                yield Offence(source.path, node.lineno, f"{node.name}: {' '.join(missing)}")


def encodings(sources: Sources) -> Iterator[Offence]:
    """text files without an encoding, read and written in another one on Windows; say "utf-8" """
    for source in sources.values():
        for node in () if source.is_test else source.all(ast.Call):
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            arguments = {"read_text": 0, "write_text": 1}.get(called)
            if called == "open" and isinstance(node.func, ast.Name):
                mode = node.args[1] if len(node.args) > 1 else named.get("mode", ast.Constant("r"))
                is_text = isinstance(mode, ast.Constant) and "b" not in mode.value
                arguments = 2 if is_text else None
            if arguments is not None and len(node.args) <= arguments and "encoding" not in named:
                yield Offence(source.path, node.lineno, f"{called} without an encoding")


def underscores(sources: Sources) -> Iterator[Offence]:
    """private names used outside their module; drop the underscore, or call something public"""
    homes = defaultdict(set)  # private name -> files that define it
    for source in sources.values():
        for _, name in defined_names(source):
            if is_private(name):
                homes[name].add(source.path)
    for source in sources.values():
        for node in source.all(ast.Attribute, ast.ImportFrom, ast.Call):
            for name in used_names(node):
                if is_private(name) and name in homes and source.path not in homes[name]:
                    home = min(homes[name])
                    yield Offence(source.path, node.lineno, f"{name} is private to {home}")


def is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not name.startswith("__")


def used_names(node: ast.AST) -> list[str]:
    """Names that a node takes from elsewhere: attributes, imports, the strings of setattr."""
    if isinstance(node, ast.Attribute):
        called = node.value.func if isinstance(node.value, ast.Call) else None
        return [] if getattr(called, "id", None) == "super" else [node.attr]
    if isinstance(node, ast.ImportFrom):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Call):
        called = getattr(node.func, "id", getattr(node.func, "attr", None))
        if called in ("setattr", "getattr", "hasattr", "delattr"):
            return [str(x.value) for x in node.args if isinstance(x, ast.Constant)]
    return []


def defined_names(source: Source) -> Iterator[tuple[int, str]]:
    """(line, name) of functions, classes, parameters, variables and attributes."""
    for node in source.all(*FUNCTION, ast.ClassDef):
        yield node.lineno, node.name
    for node in source.all(ast.arg):
        yield node.lineno, node.arg
    for node in source.all(ast.Name, ast.Attribute):
        if isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def old_words(sources: Sources) -> Iterator[Offence]:
    """names of the old dialect; the glossary is DESIGN section 10"""
    for source in sources.values():
        if source.is_test and not source.is_helper:
            continue
        for line, name in sorted(set(defined_names(source))):
            better = OLD_NAMES.get(name)
            for word in re.findall(r"[A-Z]?[a-z]+", name):
                better = better or OLD_WORDS.get(word.lower())
            if better:
                yield Offence(source.path, line, f"{name}: {better}")
        for node in source.all(ast.Constant):
            for flag in re.findall(r"--\w+_shares?\b", str(node.value)):
                yield Offence(source.path, node.lineno, f"{flag}: ratio")


# ---------------------------------------------------------------------------- stage scripts, tests


def stages_of(sources: Sources) -> list[Source]:
    return [source for source in sources.values() if source.room == "stage scripts"]


def stage_lines(sources: Sources) -> Iterator[Offence]:
    """stage scripts of 200 lines or more (RL: 250); move set-up to trainer/runtime or trainer/rl,
    and leave the step
    """
    for source in stages_of(sources):
        stage = PurePosixPath(source.path).stem.removeprefix("train_")
        if len(source.lines) > MAX_STAGE_LINES.get(stage, 199):
            yield Offence(source.path, len(source.lines), f"{len(source.lines)} lines")


def steps_in_view(sources: Sources) -> Iterator[Offence]:
    """stage scripts that hide the step; show in main, in this order: optimizer, set_learning_rate,
    backward, clip_and_step
    """
    for source in stages_of(sources):
        if source.path in NO_STEP:
            continue
        own = {node.name: node for node in source.tree.body if isinstance(node, FUNCTION)}
        line = own["main"].lineno if "main" in own else 1
        shown = shown_names("main", own)
        for step in STEP:
            if not any(step in name for name in shown):  # goes on behind the step before
                yield Offence(source.path, line, f"main shows no {step} in its place")
                break


def shown_names(
    name: str, own: dict[str, ast.FunctionDef], inside: tuple[str, ...] = ()
) -> Iterator[str]:
    """Names in a function, in the order of the text; a function of the same script is read where it
    is called.
    """
    if name not in own or name in inside:
        return
    nodes = [x for x in ast.walk(own[name]) if isinstance(x, (ast.Name, ast.Attribute))]
    for node in sorted(nodes, key=lambda x: (x.end_lineno, x.end_col_offset)):
        found = node.id if isinstance(node, ast.Name) else node.attr
        yield from shown_names(found, own, (*inside, name))
        yield found


def mirrors(sources: Sources) -> Iterator[Offence]:
    """test files that mirror no source; name them test_FILE.py or test_FILE_TOPIC.py after a file
    or folder in the same place of the tree, or list them in OWN_TESTS
    """
    files = [PurePosixPath(path) for path in sources if not path.startswith("tests/")]
    homes = {(str(path.parent), path.stem) for path in files}
    homes |= {(str(folder.parent), folder.name) for path in files for folder in path.parents}
    for source in sources.values():
        path = PurePosixPath(source.path)
        if not source.is_test or not path.name.startswith("test_") or source.path in OWN_TESTS:
            continue
        folder, name = str(path.parent.relative_to("tests")), path.stem.removeprefix("test_")
        if not any(
            (place == folder or place.startswith(f"{folder}/"))
            and f"{name}_".startswith(f"{stem}_")
            for place, stem in homes
        ):
            yield Offence(source.path, 1, f"no {folder}/{name}.py")


# ---------------------------------------------------------------------------- the tests

RULES: list[Rule] = [
    arrows,
    circles,
    imports_of_tests,
    missing_names,
    file_lines,
    columns,
    function_lines,
    argument_lists,
    annotations,
    encodings,
    underscores,
    old_words,
    stage_lines,
    steps_in_view,
    mirrors,
]


def read_sources() -> Sources:
    """All Python files that git knows or would add; without git, all in FOLDERS."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / path for path in listed.stdout.split()]
    if not paths:
        paths = [*ROOT.glob("*.py"), *(x for name in FOLDERS for x in (ROOT / name).rglob("*.py"))]
    names = [path.relative_to(ROOT).as_posix() for path in sorted(paths) if path.exists()]
    return {name: Source(name, (ROOT / name).read_text(encoding="utf-8")) for name in names}


def listing(offences: list[Offence], most: int = 60) -> str:
    """A line for each offence; if these are too many, for each file; else for each folder."""
    lines = [f"{x.path}:{x.line} {x.text}" for x in offences]
    for prefix in (r".*:", r".*/|"):
        if len(lines) <= most:
            break
        groups = defaultdict(list)
        for x in offences:
            place = re.match(prefix, f"{x.path}:")[0]
            groups[place].append(f"{x.path}:{x.line} {x.text}".removeprefix(place))
        lines = [f"{place} {'; '.join(texts)}" for place, texts in groups.items()]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def sources() -> Iterator[Sources]:
    sources = read_sources()
    gc.disable()  # looking for garbage among half a million nodes takes most of the time
    assert all(source.nodes for source in sources.values())
    gc.freeze()
    gc.enable()
    yield sources
    gc.unfreeze()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule, sources):
    offences = sorted(set(rule(sources)))
    if offences:
        title = " ".join(rule.__doc__.split())
        pytest.fail(f"{len(offences)} {title}\n{listing(offences)}", pytrace=False)


MAIN = """def main():
    optimizer = build_optimizer()
    for step in loop:
        set_learning_rate(optimizer)
        update(step)
        run.clip_and_step()
"""
UPDATE = """
def update(step):
    run.backward(step)
"""
C = "\u4e2d"  # two columns wide
CASES = [  # rule, line in which the first file breaks it or 0, first file, its text, other files
    (arrows, 1, "model/a.py", "import trainer.b", "trainer/b.py"),
    (arrows, 1, "model/a.py", "from ..dataset import b", "dataset/b.py"),
    (arrows, 1, "dataset/a.py", "from model.b import f", "model/b.py"),
    (arrows, 2, "trainer/losses/a.py", "def f():\n import trainer.rl.b", "trainer/rl/b.py"),
    (arrows, 1, "trainer/runtime/a.py", "from trainer.rl import b", "trainer/rl/b.py"),
    (arrows, 1, "trainer/train_a.py", "from .train_b import f", "trainer/train_b.py"),
    (arrows, 1, "trainer/rl/a.py", "from dataset.toy_world import f", "dataset/toy_world.py"),
    (arrows, 1, "dataset/chat/a.py", "import_module('dataset.toy.b')", "dataset/toy/b.py"),
    (arrows, 1, "model/a.py", "from tests.helpers import b", "tests/helpers/b.py"),
    (arrows, 1, "utilities/a.py", "x = 1"),
    (arrows, 0, "model/a.py", "from .b import f\nimport json", "model/b.py"),
    (arrows, 0, "dataset/chat/a.py", "from model.files import f", "model/files.py"),
    (arrows, 0, "tests/test_a.py", "import model.a", "model/a.py"),
    (circles, 1, "model/a.py", "from .b import f", "model/b.py: def f():\n import model.a"),
    (
        circles,
        1,
        "model/a.py",
        "from . import b",
        "model/b.py: import model.c",
        "model/c.py: import model.a",
    ),
    (circles, 0, "model/a.py", "import model.b", "model/b.py: if TYPE_CHECKING:\n import model.a"),
    (encodings, 1, "model/a.py", "open(path, 'w')"),
    (encodings, 1, "model/a.py", "path.read_text()"),
    (encodings, 2, "model/a.py", "open(path, 'rb')\npath.write_text(text)"),
    (
        encodings,
        0,
        "model/a.py",
        "path.write_text(x, 'utf-8')\nopen(x, mode='wb')\nopen(x, encoding=y)",
    ),
    (imports_of_tests, 1, "tests/test_a.py", "from tests.model.test_b import f"),
    (imports_of_tests, 1, "tests/test_a.py", "from tests import conftest"),
    (imports_of_tests, 1, "tests/test_a.py", "from helpers.runs import f"),
    (imports_of_tests, 1, "tests/model/test_a.py", "from . import f"),
    (imports_of_tests, 0, "tests/test_a.py", "from tests.helpers.runs import losses"),
    (missing_names, 1, "model/a.py", "from model.b import f", "model/b.py: def g(): f = 1"),
    (missing_names, 2, "model/a.py", "def f():\n    import model.c", "model/b.py"),
    (missing_names, 1, "model/a.py", "from .c import f", "model/b.py"),
    (missing_names, 0, "model/a.py", "from .b import f, g", "model/b.py: if g: import f"),
    (missing_names, 0, "model/a.py", "from model import b\nimport torch", "model/b.py"),
    (file_lines, 401, "model/a.py", "x = 1\n" * 401),
    (file_lines, 0, "model/a.py", "x = 1\n" * 400),
    (file_lines, 0, "model/model_minimind.py", "x = 1\n" * 401),
    (columns, 2, "tests/test_a.py", "\n#" + "x" * 100),
    (columns, 1, "model/a.py", "#" + C * 50),
    (columns, 0, "model/a.py", "#" + "x" * 99 + "\n##" + C * 49),
    (function_lines, 2, "model/a.py", "@f\ndef g():\n" + " x = 1\n" * 80),
    (function_lines, 0, "model/a.py", "@f\ndef g():\n" + " x = 1\n" * 79),
    (argument_lists, 1, "model/a.py", "def f(a, b, /, c, *d, e, f, **g): ..."),
    (argument_lists, 0, "model/a.py", "class A:\n def f(self, a, b, c, d, e, f): ..."),
    (argument_lists, 0, "model/a.py", "def f(a, b, c, d, e, f, g):\n 'All arguments of exp.'"),
    (annotations, 1, "model/a.py", "def f(a: int, *b) -> int: ..."),
    (annotations, 1, "model/a.py", "async def f(a: int): ..."),
    (annotations, 2, "model/a.py", "class A:\n def f(self, a) -> int: ..."),
    (annotations, 3, "model/a.py", "class A:\n @staticmethod\n def f(a) -> int: ..."),
    (annotations, 1, "tests/helpers/a.py", "def f(): ..."),
    (annotations, 0, "model/a.py", "def _f(a): ...\nclass _A:\n def f(self): ..."),
    (annotations, 0, "model/a.py", "class A:\n def __init__(self, a): ..."),
    (annotations, 0, "model/a.py", "def f() -> None:\n def g(a): ..."),
    (annotations, 0, "tests/test_a.py", "def f(a): ..."),
    (underscores, 1, "tests/test_a.py", "from model.a import _f", "model/a.py: def _f(): ..."),
    (underscores, 1, "model/a.py", "b._f()", "model/b.py: class A:\n def _f(self): ..."),
    (underscores, 1, "tests/test_a.py", "patch.setattr(a, '_x', 2)", "model/a.py: _x = 1"),
    (underscores, 0, "model/a.py", "def _f(): ...\n_f()\nother._f()\nos._exit(1)"),
    (old_words, 2, "model/a.py", "x = 1\nval_share = 2"),
    (old_words, 1, "model/a.py", "class Figures: ..."),
    (old_words, 1, "model/a.py", "def f(is_first): ..."),
    (old_words, 1, "model/a.py", "f('give --val_share 0.1')"),
    (old_words, 0, "model/a.py", "shared = sharding = 1\nx.share_memory_()"),
    (old_words, 0, "model/a.py", "arg(0.1, 'a help', aliases=('val_share',))"),
    (stage_lines, 200, "trainer/train_a.py", "x = 1\n" * 200),
    (stage_lines, 250, "trainer/train_ppo.py", "x = 1\n" * 250),
    (stage_lines, 0, "trainer/train_ppo.py", "x = 1\n" * 249),
    (steps_in_view, 1, "trainer/train_a.py", "def f(): ..."),
    (steps_in_view, 1, "trainer/train_a.py", MAIN),
    (steps_in_view, 1, "trainer/train_a.py", MAIN.replace("update", "") + UPDATE),
    (
        steps_in_view,
        1,
        "trainer/train_a.py",
        MAIN.replace("update", "f").replace("loop", "update()") + UPDATE,
    ),
    (steps_in_view, 0, "trainer/train_a.py", MAIN + UPDATE),
    (steps_in_view, 0, "trainer/train_a.py", MAIN.replace("update", "run.backward")),
    (steps_in_view, 0, "trainer/train_tokenizer.py", ""),
    (mirrors, 1, "tests/model/test_a.py", "", "model/b.py"),
    (mirrors, 1, "tests/test_a.py", "", "model/a.py"),
    (mirrors, 0, "tests/model/test_a.py", "", "model/a.py"),
    (mirrors, 0, "tests/model/test_a_more.py", "", "model/a.py"),
    (mirrors, 0, "tests/scripts/test_web.py", "", "scripts/web/a.py"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rules_find_breaks_and_nothing_else(case):
    rule, line, path, text, *others = case
    texts = {path: text} | {name: text for name, _, text in (x.partition(": ") for x in others)}
    found = set(rule({path: Source(path, text) for path, text in texts.items()}))
    assert [(x.path, x.line) for x in found] == ([(path, line)] if line else [])


def test_every_rule_can_fail():
    assert {rule for rule, line, *_ in CASES if line} == set(RULES)


def test_a_long_list_is_grouped():
    offences = [Offence(f"model/{i % 30}.py", i, "x") for i in range(90)]
    assert listing(offences[:60]).splitlines()[59] == "model/29.py:59 x"
    assert listing(offences).splitlines()[29] == "model/29.py: 29 x; 59 x; 89 x"
    many = [Offence(f"model/{i}.py", i, "x") for i in range(90)]
    assert listing(many).startswith("model/ 0.py:0 x; 1.py:1 x;")
