"""What the guest of the demo does while it is moved: it keeps data in memory and on its disk, checks each block
against its checksum before it writes it anew, and says something to the host every 10 ms."""
import hashlib
import json
import os
import socket
import sys
import threading
import time

BLOCK = 1 << 20
state = {"memory_checked": 0, "memory_bad": 0, "disk_checked": 0, "disk_bad": 0, "replies": 0}


def keep(kind, directory, blocks, sync):
    os.makedirs(directory, exist_ok=True)
    sums = {}
    while True:
        for index in range(blocks):
            name = f"{directory}/{index}"
            if index in sums:
                with open(name, "rb") as file:
                    good = hashlib.sha256(file.read()).hexdigest() == sums[index]
                state[f"{kind}_checked"] += 1
                state[f"{kind}_bad"] += not good
            data = os.urandom(BLOCK)
            sums[index] = hashlib.sha256(data).hexdigest()
            with open(name, "wb") as file:
                file.write(data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            time.sleep(0.2)


def talk(port):
    link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    link.setblocking(False)
    count = 0
    while True:
        count += 1
        try:
            link.sendto(str(count).encode(), ("10.0.2.2", port))
            while link.recv(100):
                state["replies"] += 1
        except OSError:
            pass
        time.sleep(0.01)


threading.Thread(target=keep, args=("memory", "/dev/shm/demo", 48, False), daemon=True).start()
threading.Thread(target=keep, args=("disk", "/var/demo", 24, True), daemon=True).start()
threading.Thread(target=talk, args=(int(sys.argv[1]),), daemon=True).start()
while True:
    with open("/run/demo.new", "w") as file:
        json.dump(state, file)
    os.rename("/run/demo.new", "/run/demo.json")
    time.sleep(0.2)
