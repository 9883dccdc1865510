"""A client of io.peervram.Broker, with a socket and nothing else: written from docs/broker-protocol.md alone.

Borrows, and writes to the memory. Is told of a reset, answers it, and returns the memory. Borrows once more, and looks
whether its broker lives when it is told to. Says each on a line.
"""

import json
import mmap
import os
import socket
import struct
import sys

INTERFACE = "io.peervram.Broker."


class Connection:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.bytes = b""
        self.descriptors = []

    def send(self, method, more=False, **parameters):
        call = {"method": INTERFACE + method, "parameters": parameters}
        if more:
            call["more"] = True
        self.socket.sendall(json.dumps(call).encode() + b"\0")

    def receive(self):
        while b"\0" not in self.bytes:
            piece, descriptors, _, _ = socket.recv_fds(self.socket, 65536, 1)
            if not piece:
                raise EOFError("the broker has ended")
            self.bytes += piece
            self.descriptors += descriptors
        message, self.bytes = self.bytes.split(b"\0", 1)
        reply = json.loads(message)
        if "error" in reply:
            raise RuntimeError(reply)
        return reply["parameters"]

    def call(self, method, **parameters):
        self.send(method, **parameters)
        return self.receive()


class Word:
    """Where a lease is, without a message."""

    def __init__(self, words, lease):
        self.words, self.lease = words, lease

    def read(self):
        """The generation of its memory; None where the lease is over."""
        (word,) = struct.unpack_from("=Q", self.words, 8 + 8 * self.lease["word"])
        (life,) = struct.unpack_from("=I", self.words, 0)
        if life == 0 or life & 1 << 30 or word & 0xFFFFFFFF != self.lease["lease"]:
            return None
        return word >> 32


broker, watch = Connection(sys.argv[1]), Connection(sys.argv[1])
watch.send("Watch", more=True)
lease = broker.call("Borrow", size=1 << 20, label="python")
dma_buf = broker.descriptors.pop()
print("borrowed", lease["size"], "of", lease["memory"], flush=True)
broker.call("Words")
words = mmap.mmap(broker.descriptors.pop(), 0, prot=mmap.PROT_READ)
word = Word(words, lease)
assert word.read() == lease["generation"], word.read()
with mmap.mmap(dma_buf, lease["size"]) as memory:
    assert memory[:4096] == bytes(4096), "somebody else's bytes"
    memory[:6] = b"python"

event = watch.receive()["event"]
assert (event["event"], event["lease"]) == ("draining", lease["lease"]), event
print("draining", event["cause"], flush=True)
assert word.read() == lease["generation"], word.read()
broker.call("Drained", lease=event["lease"], drain=event["drain"], generation=event["generation"])
event = watch.receive()["event"]
assert event["lease"] == lease["lease"] and event["generation"] == lease["generation"] + 1, event
print(event["event"], flush=True)
assert word.read() == lease["generation"] + 1, word.read()

os.close(dma_buf)
broker.call("Return", lease=lease["lease"])
print("returned", flush=True)
assert word.read() is None, word.read()
try:
    broker.call("Return", lease=lease["lease"])
except RuntimeError as error:
    print("refused", error.args[0]["parameters"]["code"], flush=True)

word = Word(words, broker.call("Borrow", size=4096))
assert word.read() == 1, word.read()
print("borrowed again", flush=True)
sys.stdin.readline()
print("has ended" if word.read() is None else "lives", flush=True)
