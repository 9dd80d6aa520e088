"""A second reader of PGV1, made from docs/format.md: opens the golden vault beside it and checks what it finds.

    python3 testdata/format/reader.py

Needs `cryptography` 44 or newer; digests are compared when the `blake3` module is there, frames decoded when `zstandard` is.
"""

import base64
import hashlib
import json
import pathlib

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PASSPHRASE = b"correct horse battery staple"
SYSTEM_ID, CLUSTER, NAME, KIND = 7441234567890123456, b"main", b"drill/example", 10


def optional(name):
    try:
        return __import__(name)
    except ImportError:
        return None


blake3, zstandard = optional("blake3"), optional("zstandard")


def ulid(text):
    value = 0
    for character in text:
        value = value << 5 | "0123456789ABCDEFGHJKMNPQRSTVWXYZ".index(character)
    return value.to_bytes(16, "big")


def u(number, length):
    return number.to_bytes(length, "little")


def hkdf(key, salt, info, length=32):
    return HKDF(SHA256(), length, salt, info).derive(key)


def document(path):
    text = path.read_bytes()
    fields = json.loads(text)
    expected = fields.pop("sha256")
    spelling = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert hashlib.sha256(spelling.encode()).hexdigest() == expected
    return fields, text


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


root = pathlib.Path(__file__).parent / "1"
prefix = root / f"c/{CLUSTER.decode()}-{SYSTEM_ID}"

vault, text = document(root / "vault.json")
vault_id, vault_document = ulid(vault["vault_id"]), hashlib.sha256(text).digest()
cluster_id = hashlib.sha256(b"pgvault/v1/cluster\0" + u(SYSTEM_ID, 8) + CLUSTER).digest()[:16]
ids = vault_id + cluster_id

slot, _ = document(next(prefix.glob("keys/*.json")))
method = slot["method"]
kek = Argon2id(
    salt=base64.b64decode(method["salt"]),
    length=32,
    iterations=method["passes"],
    lanes=method["lanes"],
    memory_cost=method["memory_kib"],
).derive(PASSPHRASE)
aad = b"pgvault/v1/slot" + ids + ulid(slot["key_id"])
master = AESGCM(kek).decrypt(bytes(12), base64.b64decode(method["wrapped"]), aad)

commitment = base64.b64encode(hkdf(master, b"", b"pgvault/v1/master" + ids)).decode()
assert document(prefix / "cluster.json")[0]["commitment"] == slot["commitment"] == commitment

epoch, _ = document(next(prefix.glob("epochs/*.json")))
epoch_id = ulid(epoch["epoch_id"])
opened = AESGCM(hkdf(master, epoch_id, b"pgvault/v1/epoch" + ids)).decrypt(bytes(12), base64.b64decode(epoch["wrapped"]), epoch_id)
data_key = opened[:32]
assert opened[32:] == vault_document

sealed = (prefix / NAME.decode()).read_bytes()
header, tail = sealed[:112], sealed[-48:]
assert header[:16] == b"PGV1\1\0" + bytes([KIND, 1]) + bytes(8)
assert header[16:64] == ids + epoch_id
assert tail[12:16] == b"1VGP" and tail[16:] == hashlib.sha256(sealed[:-32]).digest()
salt = header[64:96]
info = ids + bytes([KIND]) + NAME
assert header[96:] == hkdf(data_key, salt, b"pgvault/v1/commit" + info, 16)
cipher = AESGCM(hkdf(data_key, salt, b"pgvault/v1/object" + info))


def unseal(domain, number, codec, raw_length, data):
    return cipher.decrypt(u(domain, 4) + u(number, 8), data, header + u(number, 8) + u(codec, 1) + u(raw_length, 8))


footer_at, footer_length = int.from_bytes(tail[:8], "little"), int.from_bytes(tail[8:12], "little")
assert footer_at + footer_length + 48 == len(sealed)
footer = unseal(2, 0, 0, footer_length - 16, sealed[footer_at : footer_at + footer_length])

digest_key = hkdf(master, b"", b"pgvault/v1/digest" + ids)
count, at = varint(footer, 0)
offset = 112
for number in range(count):
    sealed_length, at = varint(footer, at)
    raw_length, at = varint(footer, at)
    codec, at = varint(footer, at)
    digest, at = footer[at : at + 16], at + 16
    raw = unseal(1, number, codec, raw_length, sealed[offset : offset + sealed_length])
    offset += sealed_length
    if codec == 1:
        raw = zstandard.ZstdDecompressor().decompress(raw, raw_length) if zstandard else None
    if raw is not None and blake3:
        leaves = b"".join(blake3.blake3(raw[i : i + 8192], key=digest_key).digest() for i in range(0, len(raw), 8192))
        assert blake3.blake3(leaves + u(len(raw), 8), key=digest_key).digest()[:16] == digest
    print(f"frame {number}: {raw!r}" if raw is not None else f"frame {number}: compressed, {raw_length} bytes")
assert offset == footer_at
length, at = varint(footer, at)
assert at + length == len(footer)
print(f"extra: {footer[at:]!r}")
