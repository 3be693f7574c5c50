"""Do two safetensors files hold the same bytes under the same names?

    git show 845c525:ds4/demo/model.safetensors > before.safetensors
    python scripts/same_tensors.py before.safetensors ds4/demo/model.safetensors

Tells how many tensors are in both and alike, and which are not. The exit status is 1 if one that
is in both differs, or if the second file lacks one of the first.
"""

import sys
from pathlib import Path

from ds4.weights.shards import Stored, read_header


def data(stored: Stored) -> bytes:
    with stored.path.open("rb") as file:
        file.seek(stored.offset)
        return file.read(stored.nbytes)


def main(before: str, after: str) -> int:
    old, new = read_header(Path(before)), read_header(Path(after))
    lost, added = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    changed = [
        name
        for name in sorted(old.keys() & new.keys())
        if (old[name].dtype, old[name].shape, data(old[name]))
        != (new[name].dtype, new[name].shape, data(new[name]))
    ]
    print(f"{len(old) - len(lost) - len(changed)} of {len(old)} tensors are the same to the bit")
    for kind, names in (("changed", changed), ("lost", lost), ("added", added)):
        if names:
            print(f"{kind}: {len(names)}, {names[0]} to {names[-1]}")
    return int(bool(lost or changed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
