"""What somebody does who is on the network and has no key. Run as a program: `stranger.py ADDRESS [PORT...]`.

Without ports it connects to every port there is, and writes those that are open. With ports it opens some
connections to each, sends hostile bytes, and writes for each port how many bytes it was answered at most.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

AT_ONCE = 512
PATIENCE = 1.0  # seconds for an answer
# What ZeroMQ says first, and the beginning of a handshake after it: as an old client, without security, with
# another kind of security, with CURVE and a HELLO that is none; and what is no ZeroMQ at all.
SIGNATURE = b"\xff" + bytes(7) + b"\x01\x7f"


def greeting(mechanism: bytes) -> bytes:
    """64 bytes of ZMTP 3.1, as a client."""
    return SIGNATURE + b"\x03\x01" + mechanism.ljust(20, b"\x00") + b"\x00" + bytes(31)


HOSTILE = (
    b"",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    bytes(65536),
    b"\xff" * 65536,
    os.urandom(65536),
    greeting(b"NULL") + b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER",
    greeting(b"PLAIN") + b"\x04\x08\x05HELLO\x00\x00",
    greeting(b"CURVE") + b"\x04\xc8\x05HELLO\x01\x00" + os.urandom(192),
    greeting(b"CURVE") + b"\x06\x7f\xff\xff\xff\xff\xff\xff\xff" + os.urandom(4096),
    b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",  # a pickle
)


async def is_open(address: str, port: int, gate: asyncio.Semaphore) -> bool:
    """Whether somebody listens there."""
    async with gate:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), PATIENCE)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True


async def answered(address: str, port: int, hostile: bytes) -> int:
    """How many bytes come back."""
    got = 0
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(address, port), PATIENCE)
        writer.write(hostile)
        async with asyncio.timeout(PATIENCE):
            while part := await reader.read(65536):
                got += len(part)
        writer.close()
    except (OSError, TimeoutError):
        pass
    return got


async def main(address: str, ports: list[int]) -> object:
    """What is written."""
    if not ports:
        gate, every = asyncio.Semaphore(AT_ONCE), range(1, 65536)
        found = await asyncio.gather(*(is_open(address, port, gate) for port in every))
        return [port for port, there in zip(every, found, strict=True) if there]
    said = {}
    for port in ports:
        said[port] = max(await asyncio.gather(*(answered(address, port, each) for each in HOSTILE)))
    return said


if __name__ == "__main__":
    found = asyncio.run(main(sys.argv[1], [int(word) for word in sys.argv[2:]]))
    sys.stdout.write(json.dumps(found))
