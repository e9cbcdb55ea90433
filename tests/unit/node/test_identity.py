"""The identity file: libp2p's own format, kept private, never replaced in silence."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import base58
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from node.errors import IdentityInvalid
from node.identity import load_or_create, peer_id_of

# RFC 8032, section 7.1, test 1.
SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC_KEY = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
FILE = b"\x08\x01\x12\x40" + SEED + PUBLIC_KEY


def written(path: Path, data: bytes, mode: int = 0o400) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_known_key_is_read(tmp_path: Path) -> None:
    identity = load_or_create(written(tmp_path / "key", FILE))
    assert (identity.seed, identity.public_key) == (SEED, PUBLIC_KEY)


def test_new_identity_is_private_and_lasts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "identity"
    identity = load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert load_or_create(path) == identity
    assert [entry.name for entry in path.parent.iterdir()] == ["identity"]
    assert load_or_create(tmp_path / "other") != identity


def test_peer_id_is_the_multihash_of_the_public_key() -> None:
    peer_id = peer_id_of(PUBLIC_KEY)
    assert peer_id.startswith("12D3KooW")  # every libp2p Ed25519 peer id does
    assert base58.b58decode(peer_id)[-32:] == PUBLIC_KEY
    Ed25519PublicKey.from_public_bytes(base58.b58decode(peer_id)[-32:])


def test_seed_does_not_show(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path / "key")
    assert identity.seed.hex() not in repr(identity)
    assert "seed" not in repr(identity)


def test_many_at_once_agree_on_one_identity(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        identities = set(pool.map(lambda _: load_or_create(tmp_path / "key"), range(32)))
    assert len(identities) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not an Ed25519 identity"),
        (FILE[:-1], "not an Ed25519 identity"),
        (FILE + b"\0", "not an Ed25519 identity"),
        (b"\x08\x00" + FILE[2:], "not an Ed25519 identity"),  # key type RSA
        (FILE[:-1] + b"\0", "damaged"),
        (FILE[:4] + bytes(32) + PUBLIC_KEY, "damaged"),
    ],
)
def test_damaged_files_are_refused_and_kept(tmp_path: Path, data: bytes, words: str) -> None:
    path = written(tmp_path / "key", data)
    with pytest.raises(IdentityInvalid, match=words):
        load_or_create(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("mode", [0o440, 0o404, 0o644, 0o420])
def test_files_open_to_others_are_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "key", FILE, mode)
    with pytest.raises(IdentityInvalid, match="may be used by others") as refusal:
        load_or_create(path)
    assert f"chmod 400 {path}" in refusal.value.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "key", FILE)
    os.chown(path, 12345, -1)
    with pytest.raises(IdentityInvalid, match="another user"):
        load_or_create(path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityInvalid, match=r"Not a directory|File exists"):
        load_or_create(tmp_path / "file" / "key")
