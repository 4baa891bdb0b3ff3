#!/usr/bin/env python3
"""The servers of the probes for guests, which have Python and no Node: echo (UDP and TCP) and stream, as in main.ts.

    servers.py ECHO_PORT STREAM_PORT [STREAM_BPS]

Under `mptcpize run` the TCP ones are MPTCP.
"""
import array
import socket
import sys
import threading
import time

PIECE = 16 * 1024
IDLE_SECONDS = 600


def sequence(offset):
    """PIECE bytes of the sequence: 32-bit words 0, 1, 2, ..., big-endian. `offset` is a multiple of PIECE."""
    first = offset // 4 % 2**32
    # Made by the interpreter itself: one word after the other takes a guest without KVM most of its time. A whole
    # number of pieces are a round of the words.
    words = array.array("I", range(first, first + PIECE // 4))
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


def echo_datagrams(port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", port))
        while True:
            message, sender = server.recvfrom(2048)
            try:
                server.sendto(message, sender)
            except OSError:
                pass  # No way to the sender at the moment.


def echo(client):
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while message := client.recv(PIECE):
        client.sendall(message)


def stream(client, bps):
    began = time.monotonic()
    offset = 0
    while True:
        client.sendall(sequence(offset))
        offset += PIECE
        if bps:
            time.sleep(max(0.0, began + offset * 8 / bps - time.monotonic()))


def serve(server, handle):
    def one(client):
        try:
            with client:
                client.settimeout(IDLE_SECONDS)
                handle(client)
        except OSError:
            pass  # The client went away.

    while True:
        client, _ = server.accept()
        threading.Thread(target=one, args=(client,), daemon=True).start()


def listen(port):
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("0.0.0.0", port))
    server.listen(64)
    return server


def main():
    echo_port, stream_port = int(sys.argv[1]), int(sys.argv[2])
    bps = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    echoes, streams = listen(echo_port), listen(stream_port)
    threading.Thread(target=echo_datagrams, args=(echo_port,), daemon=True).start()
    threading.Thread(target=serve, args=(echoes, echo), daemon=True).start()
    print('{"kind":"listening"}', flush=True)
    serve(streams, lambda client: stream(client, bps))


if __name__ == "__main__":
    main()
