"""The house as DESIGN has it: what is where and imports what, how large a package may be, which files may print."""
import ast
import subprocess
import sys
import unittest
from functools import lru_cache

from tests import support

PACKAGE = support.ROOT / "socks5"
DOORS = {"__init__", "__main__"}            # of the package: test_main.py has both
MOST_LINES = 400                            # of a module; 300 is what to aim for
MOST_MODULES = 10                           # in a folder

# DESIGN's order: a module imports from its own folder and from lines above, never from below.
ORDER = ("values", "config", "protocol", "access", "net", "relay", "commands", "server", "process", "status", "brief",
         "client", "log", "selftest", "cli")
ALONE = {"values", "protocol"}              # import nothing of ours from outside of their own line
SOCKETS = {"socket", "select", "selectors", "threading", "socketserver", "asyncio", "ssl"}
WITHOUT_SOCKETS = {"values", "config", "protocol"}

TOP_LEVEL = {"setup.cfg", "pyproject.toml", "socks5_server.py", "socks5", "tests", "Makefile", "README.rst", "LICENSE",
             ".ci", ".gitignore"}

# Python before 3.10 cannot say what its standard library is: this is what we use of it.
STDLIB = set(getattr(sys, "stdlib_module_names", None) or """
    __future__ argparse array ast base64 binascii bisect collections concurrent configparser contextlib copy ctypes
    dataclasses datetime difflib email enum errno fcntl functools gc getpass grp hashlib heapq hmac html http
    importlib io ipaddress itertools json logging math mmap multiprocessing os pathlib pickle pkgutil platform pwd
    queue random re resource secrets select selectors shutil signal socket socketserver ssl stat string struct
    subprocess sys sysconfig tempfile termios textwrap threading time traceback types typing unicodedata urllib uuid
    warnings weakref""".split())


@lru_cache(maxsize=None)
def modules():
    """The dotted names of all modules; that of a folder's __init__.py is the folder's."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found.append(".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts))
    return tuple(sorted(found))


def path_of(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@lru_cache(maxsize=None)
def tree_of(name):
    return ast.parse(path_of(name).read_text(encoding="utf-8"), name + ".py")


def place(name):
    return ORDER.index(name.partition(".")[0])


def walk(node, types_too=False):
    """Every node below; what only the type checker reads is left out unless asked for."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test) and not types_too:
            child = ast.Module(child.orelse, [])
        yield child
        yield from walk(child, types_too)


def imports(tree, types_too=False, name="somewhere"):
    """(ours, others): the modules of this package and the top-level packages that the module `name` imports."""
    ours, others = set(), set()
    folder = [] if name in DOORS else name.split(".")[:None if path_of(name).name == "__init__.py" else -1]
    for node in walk(tree, types_too):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                (ours if first == "socks5" else others).add(rest if first == "socks5" else first)
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module.partition(".")[0] == "socks5"):
            base = folder[:len(folder) - node.level + 1] if node.level else []
            module = (node.module or "").split(".") if node.level else node.module.split(".")[1:]
            base = base + [part for part in module if part]
            for alias in node.names:
                whole = ".".join(base + [alias.name])
                found = whole if whole in modules() else ".".join(base)
                ours.update([found] if found else [])
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.partition(".")[0])
    return ours, others


class Imports(unittest.TestCase):
    def test_every_module_has_its_place(self):
        self.assertEqual({name.partition(".")[0] for name in modules()} - DOORS - set(ORDER), set())

    def test_only_from_the_same_folder_or_from_above(self):
        """Type-only imports count, too."""
        for name in set(modules()) - DOORS:
            for other in imports(tree_of(name), types_too=True, name=name)[0]:
                with self.subTest("%s imports %s" % (name, other)):
                    self.assertIn(other, modules())
                    self.assertLessEqual(place(other), place(name))
                    if name.partition(".")[0] in ALONE:
                        self.assertEqual(place(other), place(name))

    def test_no_circle(self):
        graph = {name: imports(tree_of(name), types_too=True, name=name)[0] for name in modules()}
        done = set()

        def visit(name, way):
            self.assertNotIn(name, way)
            if name not in done:
                for other in sorted(graph[name]):
                    visit(other, (*way, name))
                done.add(name)

        for name in graph:
            visit(name, ())

    def test_the_ground_floor_knows_no_sockets(self):
        for name in modules():
            if name.partition(".")[0] in WITHOUT_SOCKETS:
                with self.subTest(name):
                    self.assertEqual(imports(tree_of(name), types_too=True, name=name)[1] & SOCKETS, set())

    def test_nothing_outside_the_standard_library(self):
        for name in modules():
            with self.subTest(name):
                self.assertLessEqual(imports(tree_of(name), types_too=True, name=name)[1], STDLIB)
        script = ast.parse(support.SCRIPT.read_text(encoding="utf-8"))
        self.assertEqual(imports(script), ({"__main__"}, {"sys"}))

    def test_annotations_are_not_evaluated(self):
        for name in set(modules()) - DOORS:
            if path_of(name).name != "__init__.py":
                with self.subTest(name):
                    first = [node for node in tree_of(name).body if isinstance(node, ast.ImportFrom)][:1]
                    self.assertEqual([node.module for node in first], ["__future__"])

    def test_this_finder_of_imports_finds_them(self):
        messages = {"protocol.messages"}
        for text, found in (("import os.path", (set(), {"os"})), ("from os import path", (set(), {"os"})),
                            ("from .messages import VER", (messages, set())),
                            ("from .. import __version__", (set(), set())),
                            ("from . import messages", (messages, set())), ("import socks5.cli", ({"cli"}, set())),
                            ("from ..access.rules import Rules", ({"access.rules"}, set())),
                            ("from socks5.protocol.messages import VER", (messages, set())),
                            ("from socks5.protocol import messages", (messages, set())),
                            ("def f():\n    from ..cli import main", ({"cli"}, set())),
                            ("try:\n    import a\nexcept ImportError:\n    import b", (set(), {"a", "b"})),
                            ("if TYPE_CHECKING:\n    from ..cli import main\nelse:\n    import os", (set(), {"os"}))):
            with self.subTest(text):
                self.assertEqual(imports(ast.parse(text), name="protocol.trace"), found)


class Rooms(unittest.TestCase):
    def test_every_module_is_on_the_map(self):
        on_the_map = ast.get_docstring(tree_of("__init__")).replace("/", " ").split()
        for name in set(modules()) - DOORS:
            with self.subTest(name):
                self.assertTrue(name.rpartition(".")[2] in on_the_map, "not on the map, the docstring of __init__.py")

    def test_every_module_opens_with_what_it_does(self):
        for name in modules():
            with self.subTest(name):
                self.assertTrue(ast.get_docstring(tree_of(name)))

    def test_none_is_too_large(self):
        for name in modules():
            with self.subTest(name):
                self.assertLessEqual(len(path_of(name).read_text(encoding="utf-8").splitlines()), MOST_LINES)

    def test_folders_are_small_and_flat(self):
        for folder in (path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"):
            with self.subTest(folder.name):
                self.assertLessEqual(len(list(folder.glob("[!_]*.py"))), MOST_MODULES)
                self.assertEqual([path.name for path in folder.iterdir() if path.is_dir()
                                  and path.name != "__pycache__"], [])

    def test_top_level(self):
        support.need(self, (support.ROOT / ".git").exists(), "a git checkout")
        try:
            listed = subprocess.run(["git", "ls-files", "-z"], cwd=str(support.ROOT), stdout=subprocess.PIPE,
                                    stderr=subprocess.DEVNULL, check=True)
        except (OSError, subprocess.CalledProcessError):
            support.need(self, False, "a git that lists this checkout")
        tops = {name.partition("/")[0] for name in listed.stdout.decode().split("\0") if name}
        self.assertEqual(sorted(tops - TOP_LEVEL), [])
        self.assertEqual(sorted(TOP_LEVEL - tops), [], "missing")


PRINTERS = {"print", "input", "exit", "quit", "breakpoint"}
STREAMS = {"exit", "stdout", "stderr", "stdin", "__stdout__", "__stderr__", "_exit", "abort"}


def speaks(tree):
    """The places in a module that print, read the keyboard or end the process."""
    found = []
    for node in walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PRINTERS:
            found.append("%s()" % node.func.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) \
                and node.value.id in ("sys", "os") and node.attr in STREAMS:
            found.append("%s.%s" % (node.value.id, node.attr))
        elif isinstance(node, ast.ImportFrom) and node.module in ("sys", "os"):
            found.extend("%s.%s" % (node.module, alias.name) for alias in node.names if alias.name in STREAMS)
        elif isinstance(node, ast.Name) and node.id == "SystemExit":
            found.append("SystemExit")
    return found


class Voices(unittest.TestCase):
    # A forked worker must never return into the code of its parent, so it ends in os._exit. The trace goes to standard
    # error or a file: whichever it is, each worker opens it for itself. __main__ says why the command line is missing.
    ALLOWED = {"cli": None, "__main__": {"sys.exit", "sys.stderr"}, "process.worker": {"os._exit"},
               "server.tracing": {"sys.stderr"}}

    def test_only_the_command_line_prints_or_exits(self):
        for name in modules():
            allowed = self.ALLOWED.get(name, set())
            if allowed is not None:
                with self.subTest(name):
                    self.assertLessEqual(set(speaks(tree_of(name))), allowed)

    def test_this_finder_of_voices_finds_them(self):
        for text in ("print('x')", "import sys\nsys.exit(1)", "raise SystemExit", "from sys import stderr", "exit()",
                     "def f():\n    os._exit(0)", "sys.stdout.write('x')"):
            with self.subTest(text):
                self.assertEqual(len(speaks(ast.parse(text))), 1)
        self.assertEqual(speaks(ast.parse("pprint(sys.platform)\nself.exit()\nexited = 1")), [])
        self.assertTrue(speaks(tree_of("cli")))

    def test_only_the_command_line_configures_logging(self):
        for name in modules():
            if name != "cli":
                with self.subTest(name):
                    used = {node.attr for node in walk(tree_of(name)) if isinstance(node, ast.Attribute)}
                    self.assertEqual(used & {"basicConfig", "dictConfig", "addHandler", "setLevel", "StreamHandler"},
                                     {"addHandler", "setLevel"} if name == "log" else set())    # for the command line


class Clocks(unittest.TestCase):
    SHOWN = {"log", "brief", "protocol.facts", "status.history", "status.meter",    # dates that are only shown
             "process.systemd"}                                                     # which wants CLOCK_MONOTONIC

    def test_no_limit_goes_by_the_clock_that_is_set(self):
        """It jumps; monotonic() does not."""
        for name in modules():
            with self.subTest(name):
                tree = tree_of(name)
                wall = [alias.name for node in walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "time"
                        for alias in node.names if alias.name not in ("monotonic", "sleep")]
                wall += [alias.name for node in walk(tree) if isinstance(node, ast.Import) for alias in node.names
                         if alias.name in ("time", "datetime")]
                self.assertTrue(name in self.SHOWN or not wall, wall)


class Waiting(unittest.TestCase):
    def test_only_one_module_asks_the_kernel_to_wait(self):
        """select.select raises for descriptors from 1024 up: all modules take new_poll(). epoll has no such limit."""
        for name in modules():
            if name != "net.poller":
                with self.subTest(name):
                    calls = [node.func for node in walk(tree_of(name)) if isinstance(node, ast.Call)]
                    self.assertEqual([call.attr for call in calls if isinstance(call, ast.Attribute)
                                      and isinstance(call.value, ast.Name) and call.value.id == "select"], [])
