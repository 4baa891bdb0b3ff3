"""Fills the disk of the guest: filler.py DIRECTORY FILES MB_PER_FILE. Half of each block is random, and no two are alike."""
import os
import sys

BLOCK = 4096
POOL = 16 << 20
TEXT = b"what a database or a log might hold, more or less; "


def main():
    directory, files, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.makedirs(directory, exist_ok=True)
    pool = os.urandom(POOL)
    text = (TEXT * (BLOCK // len(TEXT) + 1))[: BLOCK // 2 - 8]
    number = 0
    for name in range(files):
        with open(f"{directory}/{name}", "wb") as file:
            for _ in range(megabytes):
                blocks = []
                for _ in range((1 << 20) // BLOCK):
                    # Never aligned as it was before.
                    at = number * 2053 % (POOL - BLOCK)
                    blocks += [number.to_bytes(8, "little"), pool[at : at + BLOCK // 2], text]
                    number += 1
                file.write(b"".join(blocks))
            file.flush()
            os.fsync(file.fileno())


main()
