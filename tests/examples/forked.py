"""Console commands without their start-up: a server imports fairseq and the plugin once and forks for each command.

The examples run a dozen commands, each of which spends seconds on imports. ``make_commands`` writes stand-ins that hand
arguments, folder, environment and open files to the server; what runs is the real ``main`` in a process of its own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

MAINS = {
    "fairseq-train": ("fairseq_cli.train", "cli_main"),
    "fairseq-generate": ("fairseq_cli.generate", "cli_main"),
    "ap-record": ("ap_fairseq.cli.record", "main"),
    "ap-masks": ("ap_fairseq.cli.masks", "main"),
    "ap-apply": ("ap_fairseq.cli.apply", "main"),
    "ap-average": ("ap_fairseq.cli.average", "main"),
    "ap-evaluate": ("ap_fairseq.cli.evaluate", "main"),
}

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [1, 2])
    server.sendall(request)
    status = server.recv(1)
sys.exit(status[0] if status else 70)
"""


def make_commands(folder: Path, address: Path) -> None:
    folder.mkdir()
    for name in MAINS:
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=str(address)))
        (folder / name).chmod(0o755)


def start_server(address: Path) -> subprocess.Popen:
    server = subprocess.Popen([sys.executable, __file__, str(address)], stdout=subprocess.PIPE)
    server.stdout.readline()  # it listens
    return server


def receive(connection: socket.socket):
    size, (out, err), _, _ = socket.recv_fds(connection, 8, 2)
    size, data = int.from_bytes(size, "big"), b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    return json.loads(data), out, err


def run_command(request, out: int, err: int) -> int:
    """The command, in a process that was forked for it; returns its exit status."""
    name, arguments, folder, environment = request
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [name, *arguments]
    module, main = MAINS[name]
    try:
        getattr(sys.modules[module], main)()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def serve(address: str) -> None:
    for module, _ in MAINS.values():
        __import__(module)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no one waits for the forked processes
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            request, out, err = receive(connection)
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os._exit(answer(connection, request, out, err))
            for file in (out, err):
                os.close(file)
            connection.close()


def answer(connection: socket.socket, request, out: int, err: int) -> int:
    status = run_command(request, out, err)
    connection.sendall(bytes([status]))
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
