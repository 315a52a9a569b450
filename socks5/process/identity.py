"""--run-as: give up root for good, once the port is bound. For the program only: it changes the whole process."""
from __future__ import annotations

import os
from typing import NamedTuple

from ..config import Config, ConfigError

try:
    import grp
    import pwd
except ImportError:                     # Windows
    grp = pwd = None                    # type: ignore[assignment]


class Identity(NamedTuple):
    uid: int
    gid: int


def look_up(text: str, to_become: bool = True) -> Identity:
    """USER[:GROUP], names or numbers. Without GROUP it is the user's own. Raises ConfigError; `to_become`: also without
    the right to become that user."""
    if pwd is None:
        raise ConfigError("--run-as %s: this system has no such users" % text)
    user, _, group = text.partition(":")
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
        gid = entry.pw_gid
    except (KeyError, OverflowError):
        raise ConfigError("--run-as %s: there is no user %s" % (text, user)) from None
    try:
        if group:
            gid = (grp.getgrgid(int(group)) if group.isdecimal() else grp.getgrnam(group)).gr_gid
    except (KeyError, OverflowError):
        raise ConfigError("--run-as %s: there is no group %s" % (text, group)) from None
    if not entry.pw_uid or not gid:
        raise ConfigError("--run-as %s: user and group must not be root's" % text)
    if to_become and os.geteuid():
        raise ConfigError("--run-as %s: only root may become another user" % text)
    return Identity(entry.pw_uid, gid)


def become(identity: Identity) -> None:
    """Group first, for only root may change it; and no supplementary group stays. Raises OSError."""
    os.setgroups([])
    if hasattr(os, "setresuid"):                        # real, effective and saved
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    else:
        os.setgid(identity.gid)                         # of root, these set all three
        os.setuid(identity.uid)
    try:
        os.setuid(0)
    except PermissionError:
        return
    raise OSError("there is a way back to root")


def unreadable(config: Config) -> str:
    """The first file that this user cannot read again on SIGHUP, and its option; "" if there is none."""
    for flag, path in (("--users", config.users), ("--rules", config.rules)):
        try:
            if path:
                open(path, "rb").close()
        except OSError as exc:
            return "%s %s: %s" % (flag, path, exc.strerror)
    return ""
