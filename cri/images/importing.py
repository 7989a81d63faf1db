"""Images out of an archive, through the same checks and the same confined unpacking as a pull."""

from __future__ import annotations

from pathlib import Path

from cri.errors import InvalidArgument
from cri.images import reference
from cri.images.archive import Archive, Packed, with_name
from cri.images.model import Image
from cri.images.pull import Pulled
from cri.images.reference import BadReference
from cri.images.source import Source
from cri.images.store import Images


async def import_images(images: Images, path: str, name: str) -> list[tuple[Image, tuple[str, ...]]]:
    """Every image of the archive at ``path``, with the names it got. ``name`` as in ``archive.with_name``. What comes before an image that
    fails stays."""
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument("not an absolute path", field="path")
    archive = await Archive.open(Path(path), images.snapshots.root, images.platform)
    try:
        return [await _one(images, archive, packed, _names(archive, packed, name)) for packed in archive.images]
    finally:
        await archive.close()


def _names(archive: Archive, packed: Packed, name: str) -> tuple[str, ...]:
    try:
        names = with_name(packed, name)
    except BadReference as error:
        raise InvalidArgument(str(error), field="name") from error
    if len(archive.images) > 1 and name and len(names) == 1 and str(reference.parse(name)) == names[0] and ":" in name.rpartition("/")[2]:
        raise InvalidArgument(f"one name for {len(archive.images)} images: give a repository without tag", field="name")
    return names


async def _one(images: Images, archive: Archive, packed: Packed, names: tuple[str, ...]) -> tuple[Image, tuple[str, ...]]:
    references = [reference.parse(n) for n in names]

    async def admit(source: Source, digests: tuple[str, str]) -> None:
        for wanted in references:
            images.trust.admit_unsigned(wanted, digests[0])

    added: list[Image] = []

    def done(pulled: Pulled, digest: str) -> None:
        for each in references:
            # A digest that no registry has served would be a lie.
            added.append(images.add(pulled, str(each) if each.tag else "", each.with_digest(digest) if packed.original else ""))
        if not references:
            added.append(images.add(pulled, "", ""))

    with images.collected():
        await images.pulls.take(archive.share(), packed.digest, names[0] if names else packed.digest, admit, done)
    return added[-1], names
