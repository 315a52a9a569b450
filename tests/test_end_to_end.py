"""The whole server as its users get it: a copy of two things, a package, one file; with nothing installed."""
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import unittest

from tests.support import (ROOT, SCRIPT, Case, connect_through, echoes, need, need_program, run_python,
                           spawned, target, wait_until)

BIG_BYTES = 200 << 20
BLOCK = os.urandom(1 << 20)


def blocks(size):
    """`size` bytes of which no MiB is like another, piece by piece."""
    for number in range(size >> 20):
        yield b"%08d" % number
        yield memoryview(BLOCK)[8:]


def digest(pieces):
    found = hashlib.sha1()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def arriving(sock):
    """What comes until EOF, piece by piece."""
    buffer = bytearray(1 << 18)
    while True:
        size = sock.recv_into(buffer)
        if not size:
            return
        yield memoryview(buffer)[:size]


class Ways(Case):
    """Each way to start it, from a folder that is not the project's, by a Python that sees nothing else."""

    def setUp(self):
        self.folder = self.new_folder()
        self.elsewhere = self.folder / "elsewhere"
        self.elsewhere.mkdir()

    def copy(self):
        """A clean copy: the script and the package, no more."""
        copy = self.folder / "copy"
        copy.mkdir()
        shutil.copy(str(SCRIPT), str(copy))
        shutil.copytree(str(ROOT / "socks5"), str(copy / "socks5"), ignore=shutil.ignore_patterns("__pycache__"))
        return copy

    def check(self, *args, cwd, path="", **kwargs):
        env = {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}
        with target() as destination, spawned(*args, cwd=str(cwd), env=env, **kwargs) as server:
            port = server.port
            with connect_through(port, *destination) as tunnel:
                self.assertTrue(echoes(tunnel, b"from end to end"))
            server.wait_line(r"session client=127\.0\.0\.1:\d+ user=- cmd=CONNECT .*up=15 down=15 ")
            self.assertEqual(server.end(signal.SIGTERM), 0)
            self.assertEqual(server.lines[:1], ["listening on 127.0.0.1:%d" % port])

    def test_script(self):
        self.check(cwd=self.elsewhere, script=self.copy() / SCRIPT.name)

    def test_script_is_executable(self):
        need(self, os.name == "posix", "a system with #!")
        done = subprocess.run([str(self.copy() / SCRIPT.name), "--version"], capture_output=True)
        self.assertEqual((done.returncode, done.stderr), (0, b""))

    def test_module(self):
        self.check("socks5", "-p", "0", cwd=self.copy(), script="-m")

    def test_script_through_a_link(self):
        link = self.elsewhere / "socks"
        link.symlink_to(self.copy() / SCRIPT.name)
        self.check(cwd=self.folder, script=link)

    def test_zipapp(self):
        make = need_program(self, "make")
        copy = self.copy()
        for name in ("Makefile", "LICENSE"):
            shutil.copy(str(ROOT / name), str(copy))
        built = []
        for epoch in ("1700000000", "1700000000", "1600000000"):
            for path in copy.rglob("*.py"):
                os.utime(str(path))                                 # the time of a checkout says nothing
            done = subprocess.run([make, "zipapp", "PYTHON=" + sys.executable], cwd=str(copy), capture_output=True,
                                  text=True, env=dict(os.environ, SOURCE_DATE_EPOCH=epoch),
                                  preexec_fn=lambda: os.umask(0o077))
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            built.append((copy / "dist" / "socks5_server.pyz").read_bytes())
        self.assertEqual((copy / "dist" / "socks5_server.pyz").stat().st_mode & 0o777, 0o755)
        self.assertTrue(built[0] == built[1] != built[2], "the same bytes for the same SOURCE_DATE_EPOCH")
        app = self.elsewhere / "socks5_server.pyz"
        shutil.move(str(copy / "dist" / "socks5_server.pyz"), str(app))
        shutil.rmtree(str(copy))
        self.check(cwd=self.folder, script=app)

    def test_wheel_by_way_of_the_sdist(self):
        """Built by the hooks that pip calls (PEP 517), without a network; then installed by pip."""
        python = os.environ.get("SOCKS5_VENV_PYTHON")
        need(self, python and not subprocess.run([python, "-c", "import setuptools, wheel, pip"],
                                                 stderr=subprocess.DEVNULL).returncode,
             "a Python with pip, setuptools and wheel (SOCKS5_VENV_PYTHON)")
        copy = self.copy()
        for name in ("LICENSE", "README.rst", "pyproject.toml", "setup.cfg"):
            shutil.copy(str(ROOT / name), str(copy))

        def run(*args, cwd):
            done = subprocess.run([python, *map(str, args)], cwd=str(cwd), stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True)
            self.assertEqual(done.returncode, 0, done.stdout)

        build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
        run("-c", build, "build_sdist", self.folder, cwd=copy)
        shutil.rmtree(str(copy))
        sdist, = self.folder.glob("socks5*server-*.tar.gz")
        shutil.unpack_archive(str(sdist), str(self.folder))
        unpacked, = (path for path in self.folder.glob("socks5*server-*") if path.is_dir())
        self.assertLess({"LICENSE", "README.rst", "socks5_server.py"}, {path.name for path in unpacked.iterdir()})
        run("-c", build, "build_wheel", self.folder, cwd=unpacked)
        shutil.rmtree(str(unpacked))
        wheel, = self.folder.glob("*.whl")
        installed = self.folder / "installed"
        run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", installed, wheel, cwd=self.folder)
        shipped = {str(path.relative_to(ROOT)) for kind in ("*.py", "*.html") for path in (ROOT / "socks5").rglob(kind)}
        self.assertEqual({name for name in shipped if not (installed / name).exists()}, set())
        self.check(cwd=self.elsewhere, script=installed / "bin" / "socks5-server", path=installed, python=python)

    def test_a_python_without_all_of_its_library(self):
        """Such as Debian's python3-minimal."""
        for way in ("path(%r" % str(SCRIPT), "module('socks5'"):
            with self.subTest(way):
                code = "import runpy, sys; sys.modules['dataclasses'] = None; runpy.run_%s, run_name='__main__')" % way
                self.check_refused(run_python("-c", code), "no module dataclasses", "apt install python3;")
        shutil.copy(str(SCRIPT), str(self.folder))
        self.check_refused(run_python(self.folder / SCRIPT.name, cwd=self.folder), "the folder socks5 beside it")


class Big(unittest.TestCase):
    """A file as large as what people download; its hash must match."""

    def test_down(self):
        def serve(connection):
            for piece in blocks(BIG_BYTES):
                connection.sendall(piece)

        with target(serve) as destination, spawned() as server:
            with connect_through(server.port, *destination) as tunnel:
                self.assertEqual(digest(arriving(tunnel)), digest(blocks(BIG_BYTES)))
            server.wait_line("up=0 down=%d .*ended=remote why=-" % BIG_BYTES)

    def test_up(self):
        found = []
        with target(lambda connection: found.append(digest(arriving(connection)))) as destination, spawned() as server:
            with connect_through(server.port, *destination) as tunnel:
                for piece in blocks(BIG_BYTES // 4):
                    tunnel.sendall(piece)
            wait_until(lambda: found)
            server.wait_line("up=%d down=0 .*ended=client why=-" % (BIG_BYTES // 4))
        self.assertEqual(found, [digest(blocks(BIG_BYTES // 4))])
