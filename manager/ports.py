"""Ports of this machine: whether one is free, and who holds it."""

import socket

import psutil


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str) -> int:
    """A port that is free now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def holder(port: int) -> str:
    """Who listens on `port`, for people: ``"pid 4711 (python app.py)"``; says so where it may not be seen."""
    pid = holder_pid(port)
    if pid is None:
        return "a process that may not be seen"
    try:
        command = " ".join(psutil.Process(pid).cmdline())[:80]
    except psutil.Error:
        command = "gone"
    return f"pid {pid} ({command})"


def holder_pid(port: int) -> int | None:
    """The process that listens on `port`; None where none does, or this user may not see which."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port and connection.pid:
            return connection.pid
    return None
