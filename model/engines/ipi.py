"""`rung ipi`: forces for an i-PI server, which moves the atoms (path integrals, thermostats, enhanced sampling).

The server is `i-pi input.xml`: <ffsocket mode='unix'> with <address>NAME</address> goes with --unix NAME, mode='inet'
with --host and --port. Several clients may serve one server. The structure gives what the server does not send: the
elements (in the server's order of atoms), charge, multiplicity and whether the cell is periodic.
"""

from __future__ import annotations

import argparse
import math
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from ase import Atoms
from ase.calculators.socketio import IPIProtocol, SocketClient, SocketClosed, SocketServer, actualunixsocketname
from ase.parallel import world
from numpy.typing import NDArray

from rung.model.ase_calculator import DTYPES
from rung.model.engines.start import calculator_of, describe, structure_of

LOCALHOST = "localhost"
POLL_SECONDS = 0.1  # between two attempts to reach a server that is not up yet
MAX_PORT = 65535


class ServerGone(OSError):
    """The connection to the server ended before it asked for anything, or in the midst of an evaluation."""


class Served(NamedTuple):
    """How a connection ended: after how many evaluations, and whether the server said EXIT."""

    evaluations: int
    said_exit: bool


class _Protocol(IPIProtocol):
    """ASE's protocol with the checks that keep a wrong structure or a lost server from passing in silence."""

    def __init__(self, connection: socket.socket, num_atoms: int) -> None:
        super().__init__(connection)  # type: ignore[no-untyped-call]
        self._num_atoms = num_atoms
        self.said_exit = self.closed_between = False

    def recvmsg(self) -> str:
        self.closed_between = not self.socket.recv(1, socket.MSG_PEEK)  # between two messages
        message = str(super().recvmsg())  # type: ignore[no-untyped-call]
        self.said_exit = message == "EXIT"
        return message

    def recvposdata(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        try:
            cell, inverse, positions = super().recvposdata()  # type: ignore[no-untyped-call]
        except AssertionError as error:
            raise ValueError(
                "the server sent positions or a cell that are not finite; did the dynamics blow up?"
            ) from error
        if len(positions) != self._num_atoms:
            raise ValueError(
                f"the server sent {len(positions)} atoms and the structure has {self._num_atoms}; "
                "give the same atoms, in the same order, to both"
            )
        return cell, inverse, positions


class _Client(SocketClient):
    """ASE's client on an open connection; ASE's constructor leaves a socket behind whenever it finds no server."""

    def __init__(self, protocol: IPIProtocol) -> None:
        self.comm = world
        self.protocol = protocol
        self.log = protocol.log
        self.closed = False
        self.state = "READY"
        self.bead_index, self.bead_initbytes = 0, b""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rung ipi` to `parser`."""
    parser.add_argument("checkpoint", help="checkpoint folder, .tar, or published name")
    parser.add_argument("structure", type=Path, help="any file that ASE reads")
    parser.add_argument("--fidelity", help="level of theory; needed where the checkpoint has several")
    parser.add_argument("--frame", type=int, help="which frame of a file of several: 0 is the first, -1 the last")
    parser.add_argument("--unix", metavar="NAME", help="UNIX socket: <address> of i-PI's input, or a path")
    parser.add_argument("--host", help=f"TCP socket: machine of the server; default: {LOCALHOST}")
    parser.add_argument("--port", type=int, help=f"TCP socket: port; default: {SocketServer.default_port}")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds to wait for a server to come up; default: %(default)g"
    )
    parser.add_argument("--charge", type=int, help="total charge; default: the file's, or 0")
    parser.add_argument("--multiplicity", type=int, help="spin multiplicity, 2S + 1; default: the file's, or 1")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Serve forces until the server says EXIT or, between two evaluations, closes the connection.

    Raises ServerGone when it ends otherwise.
    """
    _check_address(args)
    atoms = structure_of(args)
    calculator = atoms.calc = calculator_of(args)
    energy = atoms.get_potential_energy()  # here, so that a structure that cannot be done is no server's problem
    print(f"{describe(atoms, calculator)}; {energy:.6f} eV", flush=True)
    if not atoms.pbc.all():
        print("not periodic in three directions: the virial sent is zero, so use no barostat", flush=True)
    connection = _connect(args)
    print(f"connected to {_address(args)}", flush=True)
    count, said_exit = serve(connection, atoms)
    how = "said EXIT" if said_exit else "closed the connection, without saying EXIT (as ASE's servers do),"
    print(f"the server {how} after {count} evaluations", flush=True)
    return 0


def serve(connection: socket.socket, atoms: Atoms) -> Served:
    """Answer the server with forces of `atoms`, moved as it says, until it says EXIT or is done without a word.

    `atoms` has its calculator. Closes the connection. Raises ServerGone when it ends before or in the midst of an
    evaluation and ValueError when the server has another number of atoms, sends numbers that are not finite or makes
    two atoms meet.
    """
    protocol = _Protocol(connection, len(atoms))
    client = _Client(protocol)
    count = 0
    try:
        for _ in client.irun(atoms, use_stress=bool(atoms.pbc.all())):  # type: ignore[no-untyped-call]
            count += 1
    except (ConnectionError, SocketClosed) as error:
        reason = str(error) or "in the midst of a message"
        raise ServerGone(f"the server closed the connection after {count} evaluations: {reason}") from error
    done = protocol.closed_between and client.state == "READY" and count > 0
    if not (protocol.said_exit or done):
        when = "before it fetched the last one's forces" if count else "before it asked for any"
        raise ServerGone(f"the server closed the connection after {count} evaluations, {when}, without saying EXIT")
    return Served(count, protocol.said_exit)


def _check_address(args: argparse.Namespace) -> None:
    if not (math.isfinite(args.timeout) and args.timeout >= 0):
        raise ValueError(f"--timeout: expected seconds >= 0, found {args.timeout}")
    if args.unix is not None and (args.host is not None or args.port is not None):
        raise ValueError("--unix excludes --host and --port: i-PI's input says which of them it listens on")
    if args.unix == "":
        raise ValueError("--unix: expected the <address> of i-PI's input, found nothing")
    if args.port is not None and not 0 < args.port <= MAX_PORT:
        raise ValueError(f"--port: expected 1..{MAX_PORT}, found {args.port}")


def _address(args: argparse.Namespace) -> str:
    if args.unix is not None:
        return str(args.unix if "/" in args.unix else actualunixsocketname(args.unix))
    return f"{args.host or LOCALHOST}:{args.port or SocketServer.default_port}"


def _connect(args: argparse.Namespace) -> socket.socket:
    """Return a connection to the server, which may take until --timeout to come up."""
    deadline = time.monotonic() + args.timeout
    waiting = False
    while True:
        try:
            return _open(args)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if time.monotonic() >= deadline:
                raise OSError(
                    f"no i-PI server at {_address(args)} within {args.timeout:g} s ({error.strerror}); start it with "
                    "`i-pi input.xml` and compare the address, or raise --timeout"
                ) from error
        except OSError as error:
            raise OSError(f"cannot reach {_address(args)}: {error}") from error
        if not waiting:
            print(f"waiting for a server at {_address(args)}", file=sys.stderr, flush=True)
            waiting = True
        time.sleep(POLL_SECONDS)


def _open(args: argparse.Namespace) -> socket.socket:
    if args.unix is None:
        connection = socket.create_connection((args.host or LOCALHOST, args.port or SocketServer.default_port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # messages are small and waited for
        return connection
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(_address(args))
    except BaseException:
        connection.close()
        raise
    return connection
