"""Against a real SSH daemon on the loopback interface."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from latency.device import REFERENCE, LocalDevice
from latency.layers import LayerKind
from latency.measure import cpu_name
from latency.remote import RemoteDevice, RemoteError
from latency.runtimes import ONNXRUNTIME, find_runtime
from latency.table import build_table, start_table

from .test_measure import relu_onnx

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
NEEDED = [shutil.which("ssh"), shutil.which("ssh-keygen"), SSHD]

pytestmark = pytest.mark.skipif(not all(NEEDED), reason="no SSH client or daemon on this machine")


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """The command that reaches a daemon of this test's own, with keys of its own, on a free port."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scratch = folder / "scratch"
    scratch.mkdir()
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile {folder}/pid\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f"SetEnv TMPDIR={scratch}\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD is not None
    daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "config")], stderr=subprocess.PIPE)
    command = ("ssh", "-F", "none", "-p", str(port), "-i", str(folder / "user"), "-o", "IdentitiesOnly=yes")
    command += ("-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={folder}/known", "-o", "LogLevel=ERROR")
    try:
        _wait_for(port, daemon)
        yield command
    finally:
        daemon.terminate()
        daemon.communicate()


def _wait_for(port: int, daemon: subprocess.Popen) -> None:
    for _ in range(200):
        if daemon.poll() is not None:
            pytest.skip(f"the SSH daemon does not start: {daemon.communicate()[1].decode().strip()}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    pytest.skip("the SSH daemon does not listen")


@pytest.fixture
def scratch(ssh: tuple[str, ...]) -> Path:
    """Where the other side makes its temporary folders."""
    return Path(ssh[ssh.index("-i") + 1]).with_name("scratch")


def device(ssh: tuple[str, ...], **options: object) -> RemoteDevice:
    host = f"{getpass.getuser()}@127.0.0.1"
    return RemoteDevice(host, **{"python": sys.executable, "ssh": ssh, "timeout_s": 120} | options)  # type: ignore[arg-type]


def emptied(folder: Path) -> bool:
    """Whether a folder is empty within some seconds: the other side cleans up once it notices."""
    for _ in range(200):
        if not list(folder.iterdir()):
            return True
        time.sleep(0.05)
    return False


def test_files_go_there_and_times_come_back(ssh: tuple[str, ...], scratch: Path, tmp_path: Path) -> None:
    path = tmp_path / "relu.onnx"
    path.write_bytes(relu_onnx())
    report = device(ssh).measure(
        {"content": relu_onnx(), "path": path}, torch.zeros(2, 3, 4, 4), n_runs=7, with_reference=True
    )
    assert [(entry.model, entry.runtime, entry.n_runs) for entry in report.entries] == [
        ("content", ONNXRUNTIME, 7),
        ("path", ONNXRUNTIME, 7),
        (REFERENCE, ONNXRUNTIME, 7),
    ]
    assert all(entry.median_ms > 0 for entry in report.entries)
    assert (report.cpu, report.batch_size, report.threads) == (cpu_name(), 2, 1)
    assert report.versions == {ONNXRUNTIME: find_runtime(ONNXRUNTIME).version()}
    assert emptied(scratch)


def test_a_table_is_built_over_there(ssh: tuple[str, ...], scratch: Path) -> None:
    remote = device(ssh)
    kind = LayerKind("conv", (3, 3), (1, 1), (4, 4))
    table = build_table(start_table(remote, n_runs=5), remote, {kind: ((16,), (16, 32))}, n_runs=5)
    assert table.times(kind)(16, 32) > 0
    assert table.fingerprint == LocalDevice(find_runtime(ONNXRUNTIME)).fingerprint
    assert emptied(scratch)


def test_a_machine_that_takes_too_long_is_given_up_and_nothing_stays(ssh: tuple[str, ...], scratch: Path) -> None:
    slow = device(ssh, timeout_s=3.0)
    message = (
        f"'{slow.host}' did not answer within 3 s; see that nothing else keeps it busy, or time fewer networks or "
        "rounds at once"
    )
    with pytest.raises(RemoteError, match=f"^{re.escape(message)}$"):
        slow.measure({"relu": relu_onnx()}, torch.zeros(1, 3, 4, 4), n_runs=10**9)
    assert emptied(scratch)


def test_a_broken_connection_is_told_and_nothing_stays(ssh: tuple[str, ...], scratch: Path) -> None:
    remote = device(ssh)

    def cut() -> None:
        while not list(scratch.iterdir()):
            time.sleep(0.02)
        # The processes that serve this connection, the one that holds it (the youngest) first.
        pids = sorted((int(found.name) for found in Path("/proc").iterdir() if found.name.isdigit()), reverse=True)
        for pid in pids:
            if _command(pid).startswith(("sshd-session:", "sshd:")) and _descends_from(pid, daemon_of(ssh)):
                os.kill(pid, 9)

    threading.Thread(target=cut, daemon=True).start()
    with pytest.raises(RemoteError, match=rf"^the connection to '{re.escape(remote.host)}' failed: "):
        remote.measure({"relu": relu_onnx()}, torch.zeros(1, 3, 4, 4), n_runs=10**9)
    assert emptied(scratch)


def daemon_of(ssh: tuple[str, ...]) -> int:
    return int(Path(ssh[ssh.index("-i") + 1]).with_name("pid").read_text())


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _descends_from(pid: int, ancestor: int) -> bool:
    if pid == ancestor:
        return False
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def test_a_machine_that_is_not_there_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nobody = RemoteDevice("127.0.0.1", ssh=("ssh", "-F", "none", "-p", str(port)))
    message = f"the connection to '127.0.0.1' failed: ssh: connect to host 127.0.0.1 port {port}: Connection refused"
    with pytest.raises(RemoteError, match=f"^{re.escape(message)}"):
        _ = nobody.fingerprint


def test_a_machine_without_that_python_is_told(ssh: tuple[str, ...]) -> None:
    with pytest.raises(RemoteError, match=r"^'.*' has no Python at '/nowhere/python': .*"):
        _ = device(ssh, python="/nowhere/python").fingerprint


def test_a_machine_without_onnxruntime_says_how_to_install_it(
    ssh: tuple[str, ...], scratch: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    remote = device(ssh, python=str(tmp_path / "bare/bin/python"))
    with pytest.raises(
        RemoteError, match=r"^'.*' lacks the package '(numpy|onnxruntime)'; there: .* -m pip install onnxruntime$"
    ):
        _ = remote.fingerprint
    assert emptied(scratch)


def test_a_file_that_is_no_network_is_told(ssh: tuple[str, ...], scratch: Path) -> None:
    with pytest.raises(RemoteError, match=r"^'.*' could not measure: .*(INVALID_PROTOBUF|Protobuf parsing failed).*"):
        device(ssh).measure({"net": b"not a network"}, torch.zeros(1))
    assert emptied(scratch)


def test_a_host_that_ssh_would_read_as_an_option_is_refused() -> None:
    message = "'-oProxyCommand=x' is no host; give user@host, or a name of the SSH configuration"
    with pytest.raises(RemoteError, match=f"^{re.escape(message)}$"):
        RemoteDevice("-oProxyCommand=x")


def test_a_module_cannot_be_sent(ssh: tuple[str, ...]) -> None:
    message = "another machine takes ONNX files (bytes or path), got ReLU; export it first"
    with pytest.raises(RemoteError, match=f"^{re.escape(message)}$"):
        device(ssh).times_ns([(nn.ReLU(), (torch.zeros(1),))], 5, 0)


@pytest.mark.parametrize(
    ("python", "command"),
    [
        ("python3", "python3 -c "),
        ("~/my env/bin/python", "~/'my env/bin/python' -c "),
        ("~me/python", "~me/python -c "),
        ("/a b/python", "'/a b/python' -c "),
        ("~/$(x)", "~/'$(x)' -c "),
    ],
)
def test_the_home_folder_is_left_to_the_shell_there(monkeypatch: pytest.MonkeyPatch, python: str, command: str) -> None:
    sent: list[str] = []

    def talk(line: list[str], *_: object) -> tuple[int, str, str]:
        sent.extend(line)
        return 255, "", "no route"

    monkeypatch.setattr("latency.remote._talk", talk)
    with pytest.raises(RemoteError):
        _ = RemoteDevice("board", python=python).fingerprint

    assert sent[-1].startswith(command)
