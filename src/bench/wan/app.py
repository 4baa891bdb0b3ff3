"""What the guest of the bench has in memory: about 100 MB of an application's records, and an SQLite beside them."""
import random
import sqlite3
import time

RECORDS = 80_000
WORDS = [
    "".join(random.Random(seed).choices("etaoinshrdlucmfwyp", k=2 + seed % 9)) for seed in range(5000)
]
SENTENCES = [" ".join(random.Random(-seed).choices(WORDS, k=10)) + "." for seed in range(1, 2001)]


def record(number, source):
    return {
        "id": number,
        "name": f"{source.choice(WORDS)} {source.choice(WORDS)}",
        "mail": f"{source.choice(WORDS)}@{source.choice(WORDS)}.example",
        "amount": source.randrange(10**6) / 100,
        "note": " ".join(source.choices(SENTENCES, k=5)),
    }


def main():
    source = random.Random(1)
    records = [record(number, source) for number in range(RECORDS)]
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE records (id INTEGER PRIMARY KEY, name TEXT, mail TEXT, amount REAL)")
    rows = [(each["id"], each["name"], each["mail"], each["amount"]) for each in records]
    database.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", rows)
    database.execute("CREATE INDEX by_name ON records (name)")
    del rows
    print("ready", flush=True)
    while True:
        time.sleep(1)
        number = source.randrange(RECORDS)
        records[number]["amount"] += 1
        database.execute("UPDATE records SET amount = amount + 1 WHERE id = ?", (number,))


main()
