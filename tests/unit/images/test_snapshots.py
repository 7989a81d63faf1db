import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.images import apply
from cri.images.snapshots import Meta, Snapshots, chain_ids
from shim.errors import Failure

D = [f"sha256:{hashlib.sha256(bytes([n])).hexdigest()}" for n in range(4)]


def test_chain_ids() -> None:
    chain = chain_ids(D[:3])
    assert chain[0] == D[0]
    assert chain[1] == "sha256:" + hashlib.sha256(f"{D[0]} {D[1]}".encode()).hexdigest()
    assert chain[2] == "sha256:" + hashlib.sha256(f"{chain[1]} {D[2]}".encode()).hexdigest()
    assert chain_ids([]) == ()
    assert len(set(chain_ids([D[0]] * 4))) == 4, "the same layer twice is two snapshots"


def committed(store: Snapshots, chain: str, *, boot: str = "this") -> None:
    path = store.begin(chain)
    (path / "fs" / "file").write_text(chain)
    store.commit(path, Meta(chain, chain, chain, 1, 4096, 2, boot))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    monkeypatch.setattr("cri.images.snapshots.boot_id", lambda: "this")
    store = Snapshots(tmp_path / "images")
    store.load()
    return store


def test_published_layers_survive_and_abandoned_ones_do_not(store: Snapshots) -> None:
    committed(store, D[0])
    store.begin(D[1])
    again = Snapshots(store.root)
    again.load()
    assert [m.chain_id for m in again.all()] == [D[0]]
    assert not list((store.root / "ingest").iterdir())


def test_after_a_reboot_only_what_was_synced_counts(store: Snapshots) -> None:
    committed(store, D[0], boot="earlier")
    committed(store, D[1], boot="earlier")
    store.mark_durable([D[0]])
    again = Snapshots(store.root)
    again.load()
    assert [m.chain_id for m in again.all()] == [D[0]]
    assert again.not_durable() == ()


@pytest.mark.parametrize("damage", ["meta.json", ""])
def test_a_torn_snapshot_is_dropped(store: Snapshots, damage: str) -> None:
    committed(store, D[0])
    path = store.directory / D[0][7:]
    if damage:
        (path / damage).write_bytes(b'{"chain_id"')
    else:
        path.rename(store.directory / D[1][7:])
    again = Snapshots(store.root)
    again.load()
    assert list(again.all()) == []


def test_directories_are_private_and_repaired(store: Snapshots) -> None:
    for name in ("", "snapshots", "ingest", "containers-rw", "trash"):
        (store.root / name).chmod(0o755)
    Snapshots(store.root).load()
    for name in ("", "snapshots", "ingest", "containers-rw", "trash"):
        assert (store.root / name).stat().st_mode & 0o777 == 0o700


def test_container_roots(store: Snapshots) -> None:
    for chain in D[:2]:
        committed(store, chain)
    (store.directory / D[1][7:] / "fs").chmod(0o1711)
    recipe = store.prepare("c1", D[:2])
    assert recipe.lower[:-1] == tuple(str(store.directory / c[7:] / "fs") for c in (D[1], D[0])), "topmost first"
    targets = Path(recipe.lower[-1])
    found = sorted(str(p.relative_to(targets)) for p in targets.rglob("*") if p.is_file())
    assert found == ["etc/hostname", "etc/hosts", "etc/resolv.conf"]
    assert Path(recipe.upper).stat().st_mode & 0o7777 == 0o1711, "the root directory looks like the image's"
    assert Path(recipe.upper).parent.stat().st_mode & 0o777 == 0o700
    assert store.remove_except([]) == 0, "layers in use stay, whatever happens to the image"

    again = Snapshots(store.root)
    again.load()
    assert again.containers() == {"c1"}
    assert again.release("c1") == tuple(D[:2])
    assert again.release("c1") == (), "idempotent"
    assert again.remove_except([]) == 2 and list(again.all()) == []


def test_an_image_without_layers_has_a_root(store: Snapshots) -> None:
    assert Path(store.prepare("c", ()).lower[0]).is_dir()


def test_missing_layers_are_named(store: Snapshots) -> None:
    with pytest.raises(Failure, match=D[3]):
        store.prepare("c", [D[3]])
    assert store.containers() == frozenset()


@given(st.lists(st.sampled_from([b"a", b"b", b".", b"..", b"", b".wh.x"])), st.booleans())
def test_clean_names_stay_inside(parts: list[bytes], absolute: bool) -> None:
    found = apply.clean((b"/" if absolute else b"") + b"/".join(parts))
    assert not found.startswith(b"/") and not set(found.split(b"/")) & {b"..", b"."}
    assert apply.clean(found) == found


def test_attributes_an_archive_may_set() -> None:
    assert [n for n in (b"user.a", b"security.capability") if not apply.allowed(n)] == []
    refused = (
        b"trusted.overlay.opaque",
        b"user.overlay.redirect",
        b"security.selinux",
        b"security.ima",
        b"system.posix_acl_access",
        b"trusted.x",
    )
    assert [n for n in refused if apply.allowed(n)] == []
