"""Checksums of a checkpoint's files, which Orbax has none of.

They stand in its SHA256SUMS, which `sha256sum -c` reads too. It is written last: a
checkpoint without it is none.
"""

import hashlib
from pathlib import Path

SUMS = "SHA256SUMS"


def write(checkpoint: Path) -> None:
    """Writes the checksums of all files in a folder."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    lines = [
        f"{_sum(path)}  {path.relative_to(checkpoint).as_posix()}" for path in files
    ]
    # Under another name until it is whole, and with its own sum: a line can be lost.
    text = "".join(f"{line}\n" for line in lines)
    temporary = checkpoint / f".{SUMS}"
    temporary.write_text(f"{text}# {_digest(text.encode())}\n", encoding="utf-8")
    temporary.rename(checkpoint / SUMS)


def damage(checkpoint: Path, *names: str) -> str | None:
    """Returns what is wrong with a checkpoint's files, None if nothing is.

    Args:
        checkpoint: Its folder.
        *names: The files to look at; by default all.
    """
    name = SUMS
    try:
        text, _, own = (checkpoint / SUMS).read_text("utf-8").rpartition("# ")
        if own != f"{_digest(text.encode())}\n":
            return f"{SUMS} has changed"
        sums = {
            file: sum_
            for sum_, _, file in (s.partition("  ") for s in text.splitlines())
        }
        for name in names or sums:
            if _sum(checkpoint / name) != sums[name]:
                return f"{name} has changed"
    except (OSError, ValueError) as error:
        return f"{name}: {getattr(error, 'strerror', None) or 'not readable'}"
    return None


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
