"""What every data set here yields, and how its files are found."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path


class DataMissing(RuntimeError):
    """A package that only evaluation and training need is not installed; the message names the fix."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one image, with the only right answer.

    `image` is an encoded file (PNG or JPEG), as a user would upload it.
    """

    image: bytes
    question: str
    answer: str


def package_folder(package: str, install: str) -> Path:
    """The folder of an installed package, found without importing it (its own dependencies may be absent)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataMissing(f"the data of {package} is missing; install it with: pip install {install}")
    return Path(spec.submodule_search_locations[0])
