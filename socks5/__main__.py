"""python -m socks5, and the beginning of each other way to start the program."""
import signal
import sys
from typing import Callable


def load() -> Callable[[], int]:
    """Import the program and return its main function. SIGHUP and SIGUSR1 would end the process meanwhile, which takes
    a tenth of a second: they are blocked before, and obeyed as soon as the server runs."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
    try:
        from .cli import main as program
    except ModuleNotFoundError as exc:          # such as Debian's python3-minimal, which has no socketserver
        sys.stderr.write("socks5-server: no module %s: it needs all of Python's standard library (Debian: apt install "
                         "python3; python3-minimal is not enough)\n" % exc.name)
        sys.exit(2)
    return program


def main() -> int:
    """The entry point of the installed package."""
    return load()()


if __name__ == "__main__":
    sys.exit(main())
