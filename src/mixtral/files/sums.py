"""Lists of sha256 sums, as ``sha256sum`` writes and reads them: ``SHA256SUMS`` beside the files that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mixtral.errors import CheckpointError
from mixtral.files.commit import fingerprint

__all__ = ["SUMS", "check_sums", "compare_sums", "read_sums"]

SUMS = "SHA256SUMS"


def check_sums(files: Sequence[Path]) -> int:
    """Compare files with the lists ``SHA256SUMS`` beside them; how many were in one. Files of no list are not read.

    Raises:
        CheckpointError: a file has another sha256, or a line of a list is none.
    """
    count = 0
    for folder in sorted({file.parent for file in files}):
        if (folder / SUMS).is_file():
            sums = read_sums(folder / SUMS)
            listed = [file for file in files if file.parent == folder and file.name in sums]
            count += len(compare_sums(listed, sums))
    return count


def compare_sums(files: Sequence[Path], sums: Mapping[str, str]) -> dict[str, str]:
    """The sha256 of files by name; ``sums`` are those that are expected.

    Raises:
        CheckpointError: a file has another one.
    """
    found = {file.name: str(fingerprint(file)["sha256"]) for file in files}
    wrong = [name for name, expected in sums.items() if name in found and found[name] != expected]
    if wrong:
        raise CheckpointError(f"{wrong[0]}: sha256 is {found[wrong[0]]}, not the expected one; download it again")
    return found


def read_sums(path: Path) -> dict[str, str]:
    """The contents of a file as ``sha256sum`` writes it: name -> sha256.

    Raises:
        CheckpointError: a line is not two spaces or " *" between 64 hexadecimal digits and a name.
    """
    sums = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not UTF-8; expected lines as sha256sum writes them") from None
    for number, line in enumerate(lines, 1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if len(digest) != 64 or set(digest) - set("0123456789abcdef") or gap not in ("  ", " *") or not name:
            raise CheckpointError(f"{path}: line {number} is {line!r:.80}; expected sha256, two spaces, file name")
        sums[Path(name).name] = digest
    return sums
