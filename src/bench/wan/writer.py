"""Rewrites memory at a steady rate: writer.py MB_PER_SECOND [MB_IN_ALL]. What it writes hardly compresses, and repeats late."""
import os
import sys
import time

PIECE = 64 * 1024
POOL = 16 << 20


def main():
    rate = float(sys.argv[1]) * 1e6
    region = bytearray(int(sys.argv[2] if len(sys.argv) > 2 else 64) << 20)
    pool = os.urandom(POOL)
    view = memoryview(region)
    source = memoryview(pool)
    began = time.monotonic()
    written = 0
    at = 0
    offset = 0
    print("writing", flush=True)
    while True:
        view[at : at + PIECE] = source[offset : offset + PIECE]
        at = (at + PIECE) % len(region)
        # Never aligned as it was before: each page is new.
        offset = (offset + PIECE + 4099 * 7) % (POOL - PIECE)
        written += PIECE
        time.sleep(max(0.0, began + written / rate - time.monotonic()))


main()
