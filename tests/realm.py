"""A Kerberos realm of a test's own: a KDC on loopback, its database and keytabs in a temporary folder.

No file of the system is read or written: see `environment`. Where there is no KDC, need_realm() skips and says so.
"""
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from tests.support import PATIENCE_S, closed_port, need, wait_until

NAME = "EXAMPLE.ORG"
SERVICE = "rcmd"
PROGRAMS = ("kdb5_util", "krb5kdc", "kadmin.local", "kinit")
SBIN = "/usr/sbin:/usr/local/sbin:/sbin"

KRB5_CONF = """
[libdefaults]
    default_realm = {realm}
    dns_lookup_kdc = false
    dns_lookup_realm = false
    dns_canonicalize_hostname = false
    rdns = false
    udp_preference_limit = 1
[realms]
    {realm} = {{
        kdc = 127.0.0.1:{port}
    }}
"""
KDC_CONF = """
[kdcdefaults]
    kdc_listen = 127.0.0.1:{port}
    kdc_tcp_listen = 127.0.0.1:{port}
[realms]
    {realm} = {{
        database_name = {folder}/principal
        key_stash_file = {folder}/stash
        acl_file = {folder}/acl
        max_life = 1d
    }}
[logging]
    kdc = FILE:{folder}/kdc.log
    admin_server = FILE:{folder}/admin.log
    default = FILE:{folder}/default.log
"""


def program(name):
    return shutil.which(name) or shutil.which(name, path=SBIN)


def need_realm(test):
    """Skip where no realm can be made."""
    for name in PROGRAMS:
        need(test, program(name), "%s (Debian: krb5-kdc krb5-admin-server krb5-user)" % name)


def missing():
    return [name for name in PROGRAMS if not program(name)]


class Realm:
    """A running KDC. `keytab` has the key of rcmd/localhost, which is the proxy."""

    def __init__(self, folder, name=NAME):
        self.folder, self.name, self.port = Path(folder), name, closed_port()
        values = dict(realm=name, port=self.port, folder=folder)
        (self.folder / "krb5.conf").write_text(KRB5_CONF.format(**values))
        (self.folder / "kdc.conf").write_text(KDC_CONF.format(**values))
        self.environment = {
            "KRB5_CONFIG": str(self.folder / "krb5.conf"), "KRB5_KDC_PROFILE": str(self.folder / "kdc.conf"),
            "KRB5CCNAME": "FILE:%s/ccache" % folder, "KRB5_KTNAME": "FILE:%s/none.keytab" % folder,
            "KRB5_CLIENT_KTNAME": "FILE:%s/none.keytab" % folder, "KRB5RCACHENAME": "file2:%s/rcache" % folder}
        self.keytab = self.folder / "proxy.keytab"
        self.run("kdb5_util", "create", "-s", "-P", "master", "-r", name)
        self.principal("%s/localhost" % SERVICE, keytab=self.keytab)
        self.kdc = subprocess.Popen([program("krb5kdc"), "-n", "-r", name], env=self.env(), stdin=subprocess.DEVNULL,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def listens():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return True
        try:
            wait_until(listens, "the KDC listens")
        except BaseException:
            self.close()
            raise

    def env(self, **more):
        return {**os.environ, **self.environment, **more}

    def run(self, name, *args, input=None, **env):
        done = subprocess.run([program(name), *map(str, args)], env=self.env(**env), input=input, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE_S)
        assert not done.returncode, done.stdout
        return done.stdout

    def principal(self, name, password="secret", keytab=None, *options):
        """Make it; with a keytab, its key is random and goes there."""
        key = ["-randkey"] if keytab else ["-pw", password]
        self.run("kadmin.local", "-r", self.name, "addprinc", *options, *key, name)
        if keytab:
            self.run("kadmin.local", "-r", self.name, "ktadd", "-k", keytab, name)

    def login(self, name, password="secret", *options, ccache=None, prefix=()):
        """kinit; the environment in which a client then has the ticket."""
        env = {"KRB5CCNAME": "FILE:%s" % (ccache or self.folder / ("ccache-" + name))}
        done = subprocess.run([*prefix, program("kinit"), *options, name], env=self.env(**env), input=password + "\n",
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE_S)
        assert not done.returncode, done.stdout
        return {**self.environment, **env}

    def close(self):
        self.kdc.terminate()
        self.kdc.wait(PATIENCE_S)


@contextlib.contextmanager
def realm(name=NAME):
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Realm(folder, name)) as made:
        yield made
